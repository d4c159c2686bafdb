"""Options of commands: whatever is typed, one line or a number in range."""

import argparse
import contextlib

from hypothesis import given
from hypothesis import strategies as st
import pytest

from dst_t5x.analysis import report
from dst_t5x.analysis import watch
from dst_t5x.checkpoints import conversion
from dst_t5x.checkpoints import subset_command as subset
from dst_t5x.core import command_line
from dst_t5x.data import score_command
from dst_t5x.launch import choose
from dst_t5x.launch import records
from dst_t5x.launch import sweep
from dst_t5x.serving import server

_BAD = ('nan', 'inf', '-inf', '1e999', '-1', '', 'x', '1e', '0x10', '٣,٥')
_NUMBERS = st.one_of(
  st.text(max_size=5),
  st.sampled_from(_BAD),
  st.integers().map(str),
  st.floats().map(repr),
)


@given(text=_NUMBERS, least=st.integers(-9, 9), more=st.none() | st.just(5))
def test_whole_numbers_of_a_range(text, least, more):
  most = None if more is None else least + more
  expected = None
  with contextlib.suppress(ValueError):
    value = int(text)
    if value >= least and (most is None or value <= most):
      expected = value
  assert _parsed(command_line.whole(least, most), text) == expected


@given(
  text=_NUMBERS, most=st.sampled_from((1, 60, 1e300)), with_zero=st.booleans()
)
def test_finite_numbers_of_a_range(text, most, with_zero):
  value = _parsed(command_line.number(most, with_zero=with_zero), text)
  if value is not None:
    assert value == float(text)
    assert value <= most
    assert value >= 0 if with_zero else value > 0


def _parsed(parse, text):
  """Returns a number, or None if it is refused as argparse wants it."""
  with contextlib.suppress(argparse.ArgumentTypeError):
    return parse(text)
  return None


def _refused(capsys, main, *arguments):
  """Returns the one line with which a command refuses its arguments."""
  with pytest.raises(SystemExit) as stop:
    main(list(arguments))
  assert stop.value.code == 2
  out, err = capsys.readouterr()
  assert not out
  (line,) = err.splitlines()
  assert line.startswith('error: ')
  return line


_NUMERIC = [
  (server.main, ('--seed=x', '--subsets=x'), action.option_strings[0])
  for action in server._parser()._actions
  if isinstance(action.default, int | float | list)
  and action.type is not None  # Texts, such as a list of files.
]
_NUMERIC += [
  (watch.main, ('x',), '--every'),
  (sweep.main, ('x.yaml',), '--parallel'),
]


@pytest.mark.parametrize('value', _BAD)
@pytest.mark.parametrize(('main', 'others', 'option'), _NUMERIC)
def test_no_command_takes_what_is_no_number(
  capsys, main, others, option, value
):
  line = _refused(capsys, main, *others, f'{option}={value}')
  assert f'argument {option}: must be a ' in line
  assert repr(value) in line


def test_all_numbers_of_the_server_are_checked():
  assert len(_NUMERIC) > 15


@pytest.mark.parametrize(
  ('option', 'values'),
  [
    ('--port', ('65536', '1.5')),
    ('--max-share', ('0', '1.001')),
    ('--mix-up-to', ('1.001', '2')),
    ('--deadline', ('0', '1e9')),
    ('--max-wait', ('1e9',)),
    ('--drain-seconds', ('0', '1' + '0' * 400)),
    ('--warm-up', ('0', '1.5')),
  ],
)
def test_ranges(capsys, option, values):
  for value in values:
    line = _refused(
      capsys, server.main, '--seed=x', '--subsets=x', f'{option}={value}'
    )
    assert option in line


@pytest.mark.parametrize(
  ('main', 'arguments', 'named'),
  [
    (server.main, (), '--seed'),
    (conversion.main, ('a', 'b', '--format=onnx'), 'onnx'),
    (score_command.main, (), 'FILE'),
    (subset.main, ('inform', 'x'), 'inform'),
    (subset.main, ('info',), 'FILE'),
    (report.main, ('x', '--split=y'), '--split'),
    (watch.main, (), 'RUN_DIR'),
    (sweep.main, (), 'SWEEP'),
    (sweep.main, ('x', '--paralel=2'), '--paralel'),
    (choose.main, ('x',), '--by'),
    (records.main, (), 'FOLDER'),
  ],
)
def test_other_mistakes(capsys, main, arguments, named):
  line = _refused(capsys, main, *arguments)
  assert named in line
  assert line.endswith('(see --help)')
