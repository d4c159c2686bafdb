"""A deprecated call in our own code fails a test, one in others' does not."""

import warnings

import pytest

_WARN = "warnings.warn('old', DeprecationWarning)"


def _run_as(module):
  """Runs a deprecated call as if it stood in a module of that name."""
  exec(_WARN, {'__name__': module, 'warnings': warnings})


@pytest.mark.parametrize(
  'module', ['dst_t5x.method.projection', 'launch.sweep', 'test_projection']
)
def test_ours_is_an_error(module):
  with pytest.raises(DeprecationWarning, match='old'):
    _run_as(module)


@pytest.mark.parametrize('module', ['flax.core', 'jax._src.dtypes', 'orbax'])
def test_that_of_others_is_not(module):
  _run_as(module)
