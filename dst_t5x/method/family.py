"""The sparse methods by the names of their gin files."""

from collections.abc import Callable, Mapping
from typing import Any

from dst_t5x.method import fixed
from dst_t5x.method import growing
from dst_t5x.method import reselecting
from dst_t5x.method import sparse
from dst_t5x.method import spiel
from dst_t5x.method import two_phases

# The tensors that are not matrices of attention and feed-forward layers.
_NO_MATRICES = '(?!.*(attention|mlp)/).*'
METHODS: Mapping[str, Callable[..., sparse.Sparse]] = {
  'shira_random': fixed.ShiraRandom,
  'shira_magnitude': fixed.ShiraMagnitude,
  'super_tuning': fixed.SuperTuning,
  'pafi': fixed.Pafi,
  'shira_snip': fixed.ShiraSnip,
  'fish': fixed.Fish,
  'child_tuning': fixed.ChildTuning,
  'lt_sft': two_phases.LtSft,
  'prune_after': two_phases.PruneAfter,
  'spiel': spiel.Spiel,
  'id3': growing.Id3,
  'gasdu': reselecting.Gasdu,
  'nano_adam': reselecting.NanoAdam,
  'lift': reselecting.Lift,
}
# What the gin files exclude.
_EXCLUDED = {
  **dict.fromkeys(
    ('shira_random', 'shira_magnitude', 'shira_snip', 'super_tuning'),
    _NO_MATRICES,
  ),
  **dict.fromkeys(('spiel', 'lift'), _NO_MATRICES),
  'child_tuning': '(?!.*/layers_).*',
  'lt_sft': '.*norm/scale',
  'gasdu': '(?!.*attention/).*',
}
# The settings that need the length of the run.
_LENGTH = {'prune_after': 'after', 'spiel': 'steps', 'id3': 'grow_steps'}


def make(
  name: str, epsilon: float, steps: int = 1000, **settings: Any
) -> sparse.Sparse:
  """Returns a method with the settings of its gin file.

  Args:
    name: the name of the gin file.
    epsilon: EPSILON.
    steps: TRAIN_STEPS, for the methods that need it.
    **settings: more of the method's settings, which replace those of the file.
  """
  defaults: dict[str, Any] = {}
  if name in _EXCLUDED:
    defaults['exclude'] = (_EXCLUDED[name],)
  if name in _LENGTH:
    defaults[_LENGTH[name]] = steps
  return METHODS[name](epsilon, **defaults | settings)
