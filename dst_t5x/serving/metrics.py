"""Metrics for Prometheus: requests, batches, caches."""

from collections.abc import Iterator, Mapping

import prometheus_client
from prometheus_client import core
from prometheus_client import registry

from dst_t5x.serving import library as library_lib
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import scheduler as scheduler_lib

_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics(registry.Collector):
  """Counts and times; `text` returns them for Prometheus."""

  def __init__(
    self, model: model_lib.MultiSubsetModel, library: library_lib.Library
  ) -> None:
    """Registers the metrics, under names that begin with `dst_`."""
    self._model = model
    self._library = library
    self._registry = prometheus_client.CollectorRegistry()
    to = self._registry
    self._requests = prometheus_client.Counter(
      'dst_requests',
      'Requests by path and status',
      ['path', 'status'],
      registry=to,
    )
    self.seconds = prometheus_client.Histogram(
      'dst_generate_seconds', 'From request to answer', registry=to
    )
    self._waiting = prometheus_client.Gauge(
      'dst_queue_length', 'Inputs that wait', registry=to
    )
    self._rows = prometheus_client.Histogram(
      'dst_batch_rows', 'Inputs of a batch', buckets=_ROWS, registry=to
    )
    self._subsets = prometheus_client.Histogram(
      'dst_batch_subsets', 'Subsets of a batch', buckets=_ROWS, registry=to
    )
    self._decoding = prometheus_client.Histogram(
      'dst_batch_seconds', 'Time that a batch took on the device', registry=to
    )
    self._registry.register(self)

  def queue(self, scheduler: scheduler_lib.Scheduler) -> None:
    """Reports the length of a scheduler's queue from now on."""
    self._waiting.set_function(lambda: len(scheduler))

  def note(self, path: str, status: int) -> None:
    """Counts a request by its route and status."""
    self._requests.labels(path, str(status)).inc()

  def watch(self, batch: list[scheduler_lib.Request], seconds: float) -> None:
    """Records a decoded batch and the seconds that it took."""
    self._rows.observe(len(batch))
    self._subsets.observe(len({r.row.subset for r in batch}))
    self._decoding.observe(seconds)

  def collect(self) -> Iterator[core.Metric]:
    """Yields the counts that the model and the library keep."""
    library = self._library
    happened = {**_counts_of(self._model), **library.counts}
    for name in ('device_subsets', 'device_bytes'):
      value = happened.pop(name)
      yield core.GaugeMetricFamily(f'dst_{name}', 'On the device', value=value)
    yield core.GaugeMetricFamily(
      'dst_host_bytes', 'Subsets in memory', value=library.host.currsize
    )
    for name, count in happened.items():
      yield core.CounterMetricFamily(
        f'dst_{name}', f'How often: {name.replace("_", " ")}', value=count
      )

  def text(self) -> bytes:
    """Returns all metrics in Prometheus' text format."""
    return prometheus_client.generate_latest(self._registry)


def _counts_of(model: model_lib.MultiSubsetModel) -> Mapping[str, int]:
  """Returns the model's event counts and the size of its device cache."""
  return {
    **model.counts,
    'device_subsets': len(model.placed),
    'device_bytes': int(model.placed.currsize),
  }
