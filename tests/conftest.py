"""What all tests share: JAX on the CPU, quiet TensorFlow, the shared data."""

import os
import pathlib

import pytest

# Before anything imports JAX or TensorFlow: both read these only once. Other
# accelerators may be present, but exact comparisons are made for the CPU.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def repository() -> pathlib.Path:
  """The root folder of the checkout."""
  return _REPOSITORY


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """The folder of shared data: `DST_SHARED`, else `../shared/data`."""
  folder = pathlib.Path(
    os.environ.get('DST_SHARED', _REPOSITORY.parent / 'shared' / 'data')
  )
  if not folder.is_dir():
    pytest.skip(f'no shared data at {folder}; set DST_SHARED to its folder')
  return folder
