"""The loss of a run's seed on held-out text: `MODEL_DIR/held_out.json`.

It is computed once, before the first step, so that a run that goes on later
measures its forgetting from the same number. The file also says of which text
the loss is. If an evaluation has other text, it is computed again.
"""

import json
import math
from typing import Any

from absl import logging
from etils import epath

from dst_t5x.core import json_text
from dst_t5x.core import whole_files
from dst_t5x.engine import held_out as held_out_lib
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning
from dst_t5x.models import api
from dst_t5x.runs import claim
from dst_t5x.runtime import processes

_FILE = 'held_out.json'
_LOSS = 'loss_of_seed'


def loss_of_seed(
  held_out: held_out_lib.HeldOut | None,
  seed: claim.LoadedSeed,
  network: api.Network,
  partitioner: partitioning.Partitioner,
) -> float | None:
  """Returns the seed's loss on held-out text, in nats per token.

  It is that of the network without an adapter, the same for all methods.

  Args:
    held_out: the text; None for none.
    seed: θ⁰ of the run.
    network: the model.
    partitioner: the mesh and its shardings.

  Returns:
    The loss; None without a seed or held-out text.
  """
  if held_out is None or seed.params is None:
    return None
  fingerprint = (seed.reference or {}).get('fingerprint')
  about = {'seed': fingerprint, **held_out.about()}
  path = seed.folder.path / _FILE
  recorded = _recorded(path)
  if recorded is not None and recorded[0] == about:
    return recorded[1]
  base = network.base
  params = parameters.ParameterSpace(base, partitioner).to_devices(seed.params)
  loss = held_out.evaluator(partitioner)(base, params).loss
  logging.info(
    'the loss of the seed on %s is %.4g', held_out.examples.task, loss
  )
  if processes.is_first():
    text = json_text.dumps({**about, _LOSS: loss}, indent=2) + '\n'
    whole_files.write_text(path, text)
  return loss


def _recorded(path: epath.Path) -> tuple[dict[str, Any], float] | None:
  """Returns what the file says of the text, and the loss; None without it."""
  # The first process wrote the file; others may not see it yet.
  content = processes.gather(path.read_text() if path.exists() else '')[0]
  try:
    about = json.loads(content)
    loss = about.pop(_LOSS)
  except (AttributeError, KeyError, ValueError):
    return None
  return about, math.nan if loss is None else float(loss)
