"""What it costs to serve subsets: swaps, mixed batches, requests, memory.

  python benchmarks/serving.py --json serving.json --figure serving.png
  python benchmarks/serving.py --figure serving.png --from serving.json

Random parameters in the shapes of T5 1.1, and random subsets of a share ε of
each tensor: what is timed hangs on neither. Random parameters never end a
sequence, so every answer has --output-length tokens. `--seed` takes a real
model instead, whose answers end where they end.

Metrics, all medians of --repeats rounds in which everything that is compared
takes its turn:

- `decode_s`: one input, its subset in place. `swap_and_decode_s`: each has
  another subset than the one before. `swap_latency_increase`: the median of the
  ratios of neighbours in time, less 1, over five times as many rounds, since it
  is small beside the noise of decoding. `swap_s`: the swap alone; `swap_share`:
  that over `decode_s`.
- `one_subset_s`: a batch of as many inputs with one subset, which is in place.
  `mixed_batch_ratio`: a batch in which `subsets` subsets take turns over that;
  `way` is `mixed` or `grouped`, and what a server chooses is the faster one.
- `requests_per_s`, `request_s`, `request_p99_s` (part `load`) of the real
  server over HTTP, when --clients ask at once, each for one of `subsets` at
  random; and of `dense`, as many servers as subsets, each with all parameters
  of its own, up to --dense of them.
- `subset_device_bytes`, `subset_host_bytes`: of one; `dense_bytes`: of a model;
  `subsets_in_dense`: how many fit in the memory of one more.

`work` is the model, and which input: `heute`, the paper's "Wie geht es dir
heute?", or `gsm8k`, GSM8K's first test questions (--data DIR), as tokens.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
import subset_file
import tables
import works

from dst_t5x import subsets as subset
from dst_t5x.analysis import style
from dst_t5x.checkpoints import seeds
from dst_t5x.core import json_text
from dst_t5x.models import families
from dst_t5x.models.t5 import network
from dst_t5x.serving import model as model_lib

MODELS = ('tiny', 'small', 'base')
_FINGERPRINT = '0' * 64  # Hashing is no part of what is measured.
# "Wie geht es dir heute?" in T5's vocabulary, with the end token.
_HEUTE = [2739, 3015, 3, 15, 7, 5141, 4270, 58, 1]


@dataclasses.dataclass
class Bench:
  """A model to measure, and where its rows go."""

  work: str
  config: network.T5Config
  seed: Any
  options: argparse.Namespace
  inputs: Sequence[np.ndarray]
  rows: list[tables.Row] = dataclasses.field(default_factory=list)

  def __post_init__(self) -> None:
    self.random = np.random.default_rng(0)
    self.model = model_lib.MultiSubsetModel(
      network.Transformer(self.config),
      lambda: self.seed,
      _FINGERPRINT,
      max_decode_length=self.options.output_length,
      device_bytes=8 * 2**30,
      max_batch=max(16, *self.options.subsets),
    )

  def subset(self, epsilon: float) -> subset.Subset:
    """Returns another random subset."""
    found = subset_file.random_subset(self.seed, epsilon, self.random)
    return dataclasses.replace(found, fingerprint=_FINGERPRINT)

  def add(self, metric: str, value: float, unit: str, **more: Any) -> None:
    """Adds a row, and prints it."""
    row = {
      'work': self.work,
      'epsilon': None,
      'subsets': None,
      'way': None,
      **more,
      'metric': metric,
      'value': value,
      'unit': unit,
      'device': jax.devices()[0].device_kind,
    }
    self.rows.append(row)
    print(json_text.dumps(row), file=sys.stderr, flush=True)

  def medians(self, calls: dict[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Returns how long each call takes; the first rounds compile."""
    times = defaultdict(list)
    for i in range(self.options.repeats + 2):
      # Forth and back, so that none always comes after the same one.
      for name in list(calls)[:: 1 if i % 2 else -1]:
        seconds, _ = tables.seconds(calls[name])
        if i >= 2:
          times[name].append(seconds)
    return tables.medians(times)


def swap(bench: Bench, epsilon: float) -> None:
  """Adds what a swap before every request costs."""
  names = [f'{epsilon}-{i}' for i in range(4)]
  subsets = {name: bench.subset(epsilon) for name in names}
  turn = 0

  def row(name: str) -> model_lib.Row:
    key = bench.work, name
    return model_lib.Row(bench.inputs[0], key, lambda: subsets[name])

  def swapped() -> None:
    nonlocal turn
    turn += 1
    bench.model.decode([row(names[turn % len(names)])])

  def stays() -> None:
    """The same subset again: what decoding costs without a swap."""
    bench.model.decode([row(names[turn % len(names)])])

  for name in names:
    bench.model.decode([row(name)])
  times: dict[str, list[float]] = defaultdict(list)
  for i in range(5 * bench.options.repeats + 1):
    for name, call in (('swap', swapped), ('stay', stays)):
      seconds, _ = tables.seconds(call)
      if i:
        times[name].append(seconds)
  found = tables.medians(times)
  # Neighbours in time are compared: the machine is not the same all the time.
  ratios = [a / b for a, b in zip(times['swap'], times['stay'], strict=True)]
  more = {'epsilon': epsilon, 'subsets': len(names)}
  bench.add('decode_s', found['stay'], 's', **more)
  bench.add('swap_and_decode_s', found['swap'], 's', **more)
  bench.add('swap_latency_increase', statistics.median(ratios) - 1, '', **more)
  alone = only_swap(bench, names)
  bench.add('swap_s', alone, 's', **more)
  bench.add('swap_share', alone / found['stay'], '', **more)
  bench.model.placed.clear()


def only_swap(bench: Bench, names: Sequence[str]) -> float:
  """Returns the seconds from one subset in the parameters to another."""
  model = bench.model
  placed = [model.placed[bench.work, name] for name in names]
  times = []
  for i in range(2 * bench.options.repeats):
    start = time.perf_counter()
    jax.block_until_ready(model.apply(placed[i % len(placed)]))
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def mixed(bench: Bench, epsilon: float) -> None:
  """Adds what batches of several subsets cost over one of one subset."""
  batch = bench.options.batch
  subsets = [bench.subset(epsilon) for _ in range(batch)]

  def rows(number: int) -> list[model_lib.Row]:
    return [
      model_lib.Row(
        bench.inputs[i % len(bench.inputs)],
        (bench.work, epsilon, i % number),
        lambda i=i: subsets[i % number],
      )
      for i in range(batch)
    ]

  size = bench.model.layout.size
  calls: dict[Any, Callable[[], Any]] = {}
  for number in (n for n in bench.options.subsets if n <= batch):
    for way, most in (('mixed', size), ('grouped', 0)):
      # Beyond that, a mixed batch is far from ever being chosen.
      if way == 'mixed' and epsilon > bench.options.mix_up_to:
        continue
      if number == 1 and way == 'grouped':
        continue

      def call(number: int = number, most: int = most) -> None:
        bench.model.most_mixed = most
        bench.model.decode(rows(number))

      calls[number, 'one' if number == 1 else way] = call
  calls.setdefault((1, 'one'), lambda: bench.model.decode(rows(1)))
  found = bench.medians(calls)
  one = found[1, 'one']
  bench.add('one_subset_s', one, 's', epsilon=epsilon, subsets=1, batch=batch)
  for (number, way), seconds in found.items():
    bench.add(
      'mixed_batch_ratio',
      seconds / one,
      '',
      epsilon=epsilon,
      subsets=number,
      way=way,
      batch=batch,
    )
  bench.model.placed.clear()


def memory(bench: Bench, epsilon: float) -> None:
  """Adds what a subset takes on the device and in memory."""
  found = bench.subset(epsilon)
  placed = bench.model.layout.place(found, bench.model.revert())
  host = sum(
    a.nbytes for of in (found.positions, found.values) for a in of.values()
  )
  dense = 4 * bench.model.layout.size
  more = {'epsilon': epsilon, 'subsets': 1}
  bench.add('dense_bytes', dense, 'bytes', **more)
  bench.add('subset_device_bytes', placed.nbytes, 'bytes', **more)
  bench.add('subset_host_bytes', host, 'bytes', **more)
  bench.add('memory_of_100_bytes', 100 * placed.nbytes, 'bytes', **more)
  bench.add('subsets_in_dense', dense // placed.nbytes, '', **more)


def inputs_of(kind: str, options: argparse.Namespace) -> list[np.ndarray]:
  """Returns tokens of real inputs.

  GSM8K's need the vocabulary: set DST_VOCABULARY.
  """
  if kind == 'heute' and not options.vocabulary:
    return [np.array(_HEUTE, np.int32)]
  from dst_t5x.data import vocabulary
  from dst_t5x.serving import texts as texts_lib

  texts = texts_lib.Texts(vocabulary.chosen(options.vocabulary), 512)
  if kind == 'heute':
    return [texts.encode('Wie geht es dir heute?')]
  path = pathlib.Path(options.data, 'gsm8k', 'test.jsonl')
  lines = path.read_text().splitlines()[:16]
  questions = [json.loads(line)['question'] for line in lines]
  return [texts.encode(f'gsm8k question: {text}') for text in questions]


def benches(options: argparse.Namespace) -> Iterator[Bench]:
  """Yields what there is to measure."""
  for name in options.models:
    if options.seed:
      seed = seeds.load_seed(options.seed).params
      config = families.network_of(seed).config
    else:
      config = works.network_of(f't5_1_1_{name}').config
      seed = subset_file.random_seed(config, np.random.default_rng(0))
    for kind in options.inputs:
      inputs = inputs_of(kind, options)
      yield Bench(f't5_1_1_{name}_{kind}', config, seed, options, inputs)


def figure(rows: Sequence[tables.Row], path: str) -> None:
  """Draws swaps and batches against ε (the paper's Fig. 3), and requests."""
  # A file of `accelerator` has other benchmarks' rows as well.
  rows = [row for row in rows if 'way' in row]
  if not rows:
    raise SystemExit(f'error: no times of serving to draw in {path}')
  with style.applied():
    drawn, axes = style.panels(3, columns=3, width=5.2, height=4.4)
    left, middle, right = axes
    for i, work in enumerate(dict.fromkeys(row['work'] for row in rows)):
      of = [row for row in rows if row['work'] == work]
      name, look = _name(work), style.series(i)
      options: dict[str, Any] = {
        'color': look.color,
        'marker': look.marker,
        'markeredgecolor': 'black',
      }
      _line(left, of, 'epsilon', label=name, scale=100, metric='swap_share',
            **options)  # fmt: skip
      for way, line in (('mixed', '-'), ('grouped', ':')):
        _line(middle, of, 'epsilon', metric='mixed_batch_ratio', way=way,
              subsets=8, linestyle=line, **options)  # fmt: skip
    for i, way in enumerate(('subsets', 'dense')):
      _line(right, rows, 'subsets', metric='requests_per_s', way=way,
            color='black', linestyle='-:'[i], marker='*X'[i],
            label=('one server, subsets of 1e-4', 'dense models')[i],
            )  # fmt: skip
    for axis, goals in ((left, (1, 5)), (middle, (1.3,))):
      for goal in goals:
        axis.axhline(goal, color=style.GREY, linewidth=1, linestyle='--')
    left.set(title='A swap', ylabel='of a decode (%)', yscale='log')
    middle.set(title='8 subsets: mixed –, grouped ···', yscale='log',
               ylabel='over a batch of one subset')  # fmt: skip
    right.set(title='Under load', ylabel='requests per second',
              xlabel='subsets', xscale='log', ylim=(0, None))  # fmt: skip
    for axis in (left, middle):
      axis.set(xlabel='ε', xscale='log')
      axis.yaxis.set_major_formatter('{x:g}')
      axis.yaxis.set_minor_formatter(lambda *_: '')
    style.legend(drawn, axes)
    drawn.savefig(path)


def _name(work: str) -> str:
  """Returns `Small, GSM8K` for `t5_1_1_small_gsm8k`."""
  size, text = work.removeprefix('t5_1_1_').split('_')
  asked = {'heute': '"Wie geht es dir heute?"', 'gsm8k': 'GSM8K'}
  return f'{size.capitalize()}, {asked[text]}'


def _line(
  axes: Any,
  rows: Sequence[tables.Row],
  by: str,
  *,
  metric: str,
  way: str | None = None,
  subsets: int | None = None,
  scale: float = 1,
  **options: Any,
) -> None:
  """Draws a metric against a column, if there are rows of it."""
  points = sorted(
    (row[by], scale * row['value'])
    for row in rows
    if row['metric'] == metric
    and way in (None, row['way'])
    and subsets in (None, row['subsets'])
  )
  if points:
    axes.plot(*zip(*points, strict=True), **options)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--json', metavar='FILE', help='write the rows here')
  add('--figure', metavar='FILE', help='draw them here')
  add('--from', dest='source', metavar='FILE', help='only draw these rows')
  add('--models', nargs='+', default=['small'], choices=MODELS)
  add('--seed', metavar='DIR', help='a real model instead of a random one')
  add('--inputs', nargs='+', default=['heute'], choices=['heute', 'gsm8k'])
  add('--data', metavar='DIR', help='has gsm8k/test.jsonl')
  add('--vocabulary', metavar='FILE', help="SentencePiece model, T5's")
  add('--parts', nargs='+', default=['swap', 'mixed', 'memory'],
      choices=['swap', 'mixed', 'memory', 'load'])  # fmt: skip
  add('--epsilon', nargs='+', type=float, default=[1e-4, 1e-2])
  add('--subsets', nargs='+', type=int, default=[1, 8], help='in a batch')
  add('--batch', type=int, default=8, help='inputs of a batch')
  add('--mix-up-to', type=float, default=1e-2, help='largest ε tried mixed')
  add('--output-length', type=int, default=32)
  add('--repeats', type=int, default=11)
  add('--load-subsets', nargs='+', type=int, default=[1, 10, 100])
  add('--clients', type=int, default=16)
  add('--requests', type=int, default=200, help='of each load')
  add('--dense', type=int, default=4, help='dense models that are loaded')
  return parser


def main() -> None:
  """Measures, prints, writes."""
  options = _parser().parse_args()
  rows: list[tables.Row] = []
  parts = {'swap': swap, 'mixed': mixed, 'memory': memory}
  if options.source:
    rows = json.loads(pathlib.Path(options.source).read_text())
  else:
    for bench in benches(options):
      for part in options.parts:
        if part == 'load':
          # Only where it is asked for: it needs what the server needs.
          import serving_load

          parts[part] = serving_load.measure
        for epsilon in options.epsilon:
          parts[part](bench, epsilon)
        tables.write_json(options.json, rows + bench.rows)
      rows += bench.rows
      tables.write_json(options.json, rows)
      del bench
    columns = 'work', 'epsilon', 'subsets', 'way', 'metric', 'value', 'unit'
    tables.show(rows, columns)
  if options.figure:
    figure(rows, options.figure)


if __name__ == '__main__':
  main()
