"""Skips all tests of this folder if T5X is not installed."""

import gc
import importlib.util

import pytest

_OF_T5X = (
  # T5X and the libraries that it calls in old ways.
  'ignore::pytest.PytestUnraisableExceptionWarning',
  'ignore::DeprecationWarning',
  'ignore::FutureWarning',
  'ignore::UserWarning',
)


class _Skipped(pytest.Module):
  """A test file that is skipped without being imported."""

  def collect(self):
    pytest.skip(
      'T5X is not installed: see docs/t5x.md', allow_module_level=True
    )


def pytest_pycollect_makemodule(module_path, parent):
  found = importlib.util.find_spec('t5x')
  # This very folder is found, too, as a package without an origin.
  if found is None or found.origin is None:
    return _Skipped.from_parent(parent, path=module_path)
  return None


def pytest_collection_modifyitems(items):
  """Ignores event loops and files that T5X leaves open."""
  for item in items:
    if item.path.parent.name == 't5x':
      for warning in _OF_T5X:
        item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True)
def what_t5x_leaves_is_collected():
  """Collects here, where warnings are ignored, not during another test."""
  yield
  gc.collect()
