"""Every model, task and method file of gin/ under T5X's own binaries."""

import binaries
import commands
import gin
import pytest
from t5x.examples.t5 import network

from dst_t5x.core.errors import UserError
from dst_t5x.method import family
from dst_t5x.models.t5 import network as network_lib
from dst_t5x.t5x import model as model_lib

_GIN = binaries.ROOT / 'gin'
_SIZES = ['tiny', 'small', 'base', 'large', 'xl', 'xxl']


def _names(room):
  return sorted(path.stem for path in (_GIN / room).glob('*.gin'))


def _model(binary, *files, **bindings):
  """Returns the model that a binary would make, with its vocabulary loaded."""
  flags = [f'--gin_file=gin/{file}.gin' for file in files]
  with binaries.parsed(binary, *flags, *commands.flags(**bindings)):
    made = gin.get_configurable(model_lib.model)()
    assert made.output_vocabulary.vocab_size > 256
    return made


_BYTES = {'VOCABULARY': 'bytes'}
_RUN = {**_BYTES, 'MODEL_DIR': 'run', 'INITIAL_CHECKPOINT_PATH': 'seed'}


@pytest.mark.parametrize('size', _SIZES)
def test_models(size):
  model = f'models/t5_1_1_{size}'
  for run, binary, bindings in (
    ('pretrain', 'train', {'MODEL_DIR': 'run'}),
    ('finetune', 'train', _RUN),
    ('eval', 'eval', {'CHECKPOINT_PATH': 'a', 'EVAL_OUTPUT_DIR': 'b'}),
    ('infer', 'infer', {'CHECKPOINT_PATH': 'a', 'INFER_OUTPUT_DIR': 'b'}),
  ):
    files = [model, 'tasks/gsm8k', 'methods/dst', f't5x/{run}']
    made = _model(binary, *files, **{**_BYTES, **bindings})
    assert isinstance(made.module, network_lib.Transformer)
    assert (made.optimizer_def is None) == (binary != 'train')
    if run == 'finetune':
      assert made.optimizer_def.projection.epsilon == 1e-4


@pytest.mark.parametrize('task', _names('tasks'))
def test_tasks(task, tmp_path):
  rows = tmp_path / 'rows.jsonl'
  rows.write_text('{"inputs": "a", "targets": "b"}\n')
  files = 'models/t5_1_1_demo', f'tasks/{task}', 'methods/full', 't5x/finetune'
  own = {'TRAIN_FILE': rows, 'EVAL_FILE': rows} if task == 'jsonl' else {}
  _model('train', *files, **_RUN, **own)


@pytest.mark.parametrize('method', sorted(family.METHODS))
def test_methods_that_t5x_cannot_run(method):
  files = 'models/t5_1_1_tiny', 'tasks/gsm8k', f'methods/{method}'
  message = 'T5X runs only methods.*use python -m dst_t5x.train'
  with pytest.raises(UserError, match=message):
    _model('train', *files, 't5x/finetune', **_RUN)


@pytest.mark.parametrize(
  'method', sorted({*_names('methods')} - family.METHODS.keys())
)
def test_methods(method):
  files = 'models/t5_1_1_tiny', 'tasks/gsm8k', f'methods/{method}'
  optimizer = _model('train', *files, 't5x/finetune', **_RUN).optimizer_def
  assert optimizer.projection.constrains == (
    method in ('dst', 'dst_no_churn', 'random')
  )


def test_t5x_own_network_has_the_same_sizes():
  files = 'models/t5_1_1_base', 't5x/t5x_network', 'tasks/gsm8k', 'methods/dst'
  made = _model('train', *files, 't5x/finetune', **_RUN)
  assert isinstance(made.module, network.Transformer)
  assert made.module.config.emb_dim == 768
  assert made.module.config.dropout_rate == 0.0
