"""What gin will call, told without calling it."""

import config_toy
import pytest

from dst_t5x.config import binaries
from dst_t5x.config import described

_HEADER = """
from __gin__ import dynamic_registration
import config_toy
"""


def _calls(tmp_path, text, *flags):
  file = tmp_path / 'toy.gin'
  file.write_text(_HEADER + text)
  argv = [f'--gin_file={file}', '--gin.fit.model_dir=x', *flags]
  binaries.parse(argv, config_toy.fit)
  return described.calls(config_toy.fit)


def test_macros_references_and_defaults(tmp_path):
  call, others = _calls(
    tmp_path,
    """
EPSILON = 0.1
METHOD = @config_toy.ToyMethod()
config_toy.ToyMethod.epsilon = %EPSILON
config_toy.fit.method = %METHOD
config_toy.fit.extras = {'all': [1, (%EPSILON, @config_toy.rate)]}
config_toy.rate.base = 3.0
""",
  )
  assert others == []
  assert described.to_json(call) == {
    'id': 'fit',
    'model_dir': 'x',
    'steps': 10,
    'method': {'id': 'toy_method', 'epsilon': 0.1, 'distance': 'absolute'},
    'network': None,
    'extras': {'all': [1, [0.1, {'function': 'rate', 'base': 3.0}]]},
  }
  assert described.defaults_in(call) == {'steps', 'network', 'method.distance'}
  assert call.settings['method'].make() == config_toy.ToyMethod(0.1)
  assert call.settings['extras']['all'][1][1].partial()() == 3.0


def test_what_counts_in_a_scope(tmp_path):
  call, _ = _calls(
    tmp_path,
    """
config_toy.fit.network = @outer/config_toy.ToyNetwork()
config_toy.fit.extras = @config_toy.ToyNetwork()
config_toy.ToyNetwork.layers = 3
outer/config_toy.ToyNetwork.layers = 4
outer/config_toy.ToyNetwork.inner = @config_toy.rate
config_toy.rate.base = 5.0
outer/config_toy.rate.base = 6.0
""",
  )
  said = described.to_json(call)
  assert said['extras'] == {'id': 'toy_network', 'layers': 3, 'inner': None}
  assert said['network']['layers'] == 4
  # It may be called in the scope, or later, outside of it.
  assert said['network']['inner'] == {
    'function': 'rate',
    'base': 6.0,
    'unscoped': {'function': 'rate', 'base': 5.0},
  }
  assert call.settings['network'].make().inner() == 6.0


def test_what_code_calls_without_a_reference(tmp_path):
  _, others = _calls(
    tmp_path,
    """
config_toy.registered.rate = 2.0
scope/config_toy.registered.rate = 4.0
""",
  )
  assert [(scope, call.settings) for scope, call in others] == [
    ('', {'rate': 2.0}),
    ('scope', {'rate': 4.0}),
  ]


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    ({}, ('toy_method', 0.5)),
    ({'EPSILON': '0.25'}, ('toy_method', 0.25)),
    ({'ToyMethod.epsilon': '1.0', 'OTHER.x': '1'}, ('toy_method', 1.0)),
  ],
)
def test_macros_of_some_files(tmp_path, flags, expected):
  file = tmp_path / 'method.gin'
  file.write_text(
    _HEADER
    + """
METHOD = @config_toy.ToyMethod()
config_toy.ToyMethod.epsilon = %EPSILON
"""
  )
  method, nothing = described.macros(
    [str(file)], flags, {'EPSILON': 0.5}, ('METHOD', 'NOTHING')
  )
  assert nothing is None
  said = described.to_json(method)
  assert (said['id'], said['epsilon']) == expected
