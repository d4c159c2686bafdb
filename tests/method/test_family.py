"""The family's methods are those of the gin files."""

import jax
import numpy as np
import pytest

from dst_t5x.config import gin_files
from dst_t5x.core import json_text
from dst_t5x.method import family

_MACROS = {
  'EPSILON': 'epsilon',
  'SILOS': 'silos',
  'EXCLUDE': 'exclude',
  'SUPER_TUNING_END': 'end',
  'SCORE_STEPS': 'score_steps',
  'ID3_SMOOTHING': 'smoothing',
  'ID3_EXPONENT': 'exponent',
  'FIRST_STEPS': 'first_steps',
  'SPIEL_ACCUMULATE': 'accumulate',
  'SPIEL_SHARE': 'share',
  'SPIEL_DECAY': 'decay',
}


@pytest.mark.parametrize('name', family.METHODS)
def test_a_method_has_the_settings_of_its_gin_file(name):
  said = gin_files.literals(f'gin/methods/{name}.gin')
  settings = family.make(name, said['EPSILON']).settings()
  assert settings.pop('method') == name
  for macro, field in _MACROS.items():
    if said.get(macro) is not None:
      wanted = json_text.plain(said[macro])
      assert settings[field] == wanted, macro


@pytest.mark.parametrize('name', family.METHODS)
def test_what_it_frees_at_most_is_not_less(name):
  shapes = {
    'encoder': {
      'layers_0': {
        'attention': {'query': {'kernel': np.zeros((16, 16))}},
        'mlp': {'wi': {'kernel': np.zeros((16, 32))}},
        'norm': {'scale': np.zeros(16)},
      }
    },
    'token_embedder': {'embedding': np.zeros((64, 16))},
  }
  method = family.make(name, 0.1)
  layout = method.layout(shapes)
  assert method.free(shapes) == round(0.1 * layout.included)
  assert method.free(shapes) <= method.free_at_most(shapes)
  assert method.free_at_most(shapes) <= layout.size
  assert method.phase_starts[0] == 0
  assert [method.at(i) for i in method.phase_starts] == [
    method.phase(k) for k in range(len(method.phase_starts))
  ]
  assert method.phase(len(method.phase_starts) - 1) == method
  assert jax.tree.leaves(method) == []
