"""Package metadata; the tools are configured in pyproject.toml."""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).parent
# Read, not imported: the dependencies are not there yet.
_INIT = (_HERE / 'dst_t5x' / '__init__.py').read_text(encoding='utf-8')
_VERSION = re.findall(r"^__version__ = '(.+)'$", _INIT, re.MULTILINE)[0]

# The JAX stack: from what was seen to work up to the next minor version, which
# may break. The others: from what was seen to work.
_INSTALL = [
  'jax>=0.10.2,<0.11',
  'flax>=0.12.8,<0.13',
  'optax>=0.2.8,<0.3',
  'orbax-checkpoint>=0.12.8,<0.13',
  'clu>=0.0.12,<0.1',
  'gin-config>=0.5,<0.6',
  # t5 asks for seqio-nightly, which installs the same module as seqio.
  'seqio-nightly>=0.0.18.dev20250227',
  't5>=0.9.4,<0.10',
  'tensorflow>=2.21',
  'tensorflow-text>=2.21',
  'tensorflow-datasets>=4.9.10',
  'importlib_resources',  # tensorflow-datasets 4.9.10 forgets to ask for it.
  'absl-py',
  'babel>=2.14',
  'etils[epath]>=1.15',
  'matplotlib>=3.9',
  'ml_dtypes>=0.5',
  'msgpack>=1.0',
  'numpy>=2.0',
  'sacrebleu>=2.6',
  'safetensors>=0.5',
  'tensorboard>=2.20',
  'tensorstore>=0.1.80',
  'tqdm>=4.66',
]

# `python -m dst_t5x.serve`, which those who train do not need.
_SERVE = [
  'cachetools>=6.0',
  'fastapi>=0.115',
  'prometheus-client>=0.20',
  'uvicorn>=0.30',
]

_TEST = [
  *_SERVE,
  'httpx2>=2.16',  # Starlette's test client.
  'hypothesis>=6.100',
  'mypy>=1.15',
  'peft>=0.21,<1',  # The judge of adapters in its format; brings accelerate.
  'pytest>=8.0',
  'pytest-xdist>=3.5',
  'ruff>=0.11',
  'selenium>=4.20',  # The server's page in Chromium, where there is one.
  'setuptools>=77',  # The test of the wheel builds one without a network.
  # The outside peer. Pinned: other versions of torch bring gigabytes of CUDA.
  'torch==2.13.0',
  'transformers>=5.0',
]

setuptools.setup(
  name='dst_t5x',
  version=_VERSION,
  description='Dynamic Subset Tuning for T5 1.1, in the T5X manner',
  long_description=(_HERE / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license_expression='Apache-2.0',
  license_files=['LICENSE'],
  packages=setuptools.find_packages(include=['dst_t5x', 'dst_t5x.*']),
  # In a checkout dst_t5x/gin and dst_t5x/tasks are links to the folders at the
  # top; in a wheel they are real folders.
  package_data={'dst_t5x': ['gin/**/*.gin', 'py.typed', 'serving/page.html']},
  include_package_data=False,
  # tensorflow-text has no wheels for Python 3.14 yet.
  python_requires='>=3.11,<3.14',
  install_requires=_INSTALL,
  extras_require={'serve': _SERVE, 'test': _TEST},
  classifiers=[
    'Development Status :: 3 - Alpha',
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
