"""All JSON that we write is JSON: no NaN, no infinity."""

import ast
import json
import math
import pathlib

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from dst_t5x.checkpoints import best
from dst_t5x.core import json_text
from dst_t5x.core import metrics_file
from dst_t5x.engine import budget
from dst_t5x.runs import artifacts

VALUES = st.recursive(
  st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    st.floats(width=32).map(np.float32),
    st.integers(-(2**31), 2**31 - 1).map(np.int32),
  ),
  lambda inner: st.one_of(
    st.lists(inner), st.tuples(inner), st.dictionaries(st.text(), inner)
  ),
)


def _strict(text):
  def refuse(constant):
    raise AssertionError(f'{constant} is no JSON')

  return json.loads(text, parse_constant=refuse)


@given(VALUES)
def test_whatever_is_written_any_reader_reads(value):
  assert _strict(json_text.dumps(value)) == json_text.loads(
    json_text.dumps(value)
  )


@given(VALUES)
def test_what_is_finite_is_kept(value):
  text = json.dumps(json_text.plain(value))
  assert json_text.dumps(value) == text
  assert json_text.loads(text) == json_text.plain(value)


@pytest.mark.parametrize(
  'text',
  [
    *('NaN', '[Infinity]', '{"a": -Infinity}', '1e999', '-1e999'),
    *('', '{', '[' * 10**5),
  ],
)
def test_what_is_no_json_is_refused(text):
  with pytest.raises(ValueError):  # noqa: PT011
    json_text.loads(text)


NUMBERS = {'a/em': math.nan, 'a/f1': 1.5, 'eval/loss': math.inf}


def test_metrics(tmp_path):
  metrics_file.append(tmp_path, 1, NUMBERS)
  metrics_file.append(tmp_path, 2, {'eval/loss': 2.0})
  metrics_file.drop_after(tmp_path, 1)
  _strict((tmp_path / 'metrics.jsonl').read_text())
  (row,) = metrics_file.read(tmp_path)
  assert math.isnan(row.pop('a/em'))
  assert math.isnan(row.pop('eval/loss'))
  assert row == {'step': 1, 'a/f1': 1.5}


def test_best_and_report(tmp_path):
  metrics_file.append(tmp_path, 1, NUMBERS)
  best.write(tmp_path, 'a/f1', [1])
  found = _strict((tmp_path / 'best.json').read_text())
  assert found['scores'] == {'a/em': None, 'a/f1': 1.5}
  cost = budget.Budget(10, 1, 100)
  artifacts.write_report(tmp_path, 1, cost, None, NUMBERS)
  found = _strict((tmp_path / 'report.json').read_text())
  assert found['results'] == {'a/em': None, 'a/f1': 1.5, 'eval/loss': None}


# What goes from one of our processes to another of them keeps its NaN.
_BETWEEN_PROCESSES = {
  *('processes.py', 'preflight.py', 'evaluations.py', 'worker.py', 'local.py'),
  'serving_load.py',
}


def test_nothing_else_writes_json(repository):
  folders = ('dst_t5x', 'launch', 'tasks', 'studies', 'benchmarks')
  files = [f for folder in folders for f in (repository / folder).rglob('*.py')]
  assert len(files) > 100
  for file in files:
    if file.name not in _BETWEEN_PROCESSES:
      _assert_no_nan(file)


def _assert_no_nan(file: pathlib.Path) -> None:
  for node in ast.walk(ast.parse(file.read_text())):
    if (
      isinstance(node, ast.Call)
      and isinstance(node.func, ast.Attribute)
      and ast.unparse(node.func) in ('json.dumps', 'json.dump')
    ):
      options = {k.arg: ast.unparse(k.value) for k in node.keywords}
      assert options.get('allow_nan') == 'False', f'{file}:{node.lineno}'
