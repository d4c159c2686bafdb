"""Evaluates a mixture whose every example can be told from all others.

Targets repeat the inputs and so does the decoder: a prediction is right only if
it is that of its own example. As a program it is one of several processes.
"""

import json
import os
import sys

import jax
import networks
import seqio
import tensorflow as tf

from dst_t5x.engine import evaluation
from dst_t5x.engine import parameters
from dst_t5x.engine import partitioning

NAME = 'echo'
SIZES = {'echo_a': 7, 'echo_b': 5}
BATCH_SIZES = (1, 5)
LENGTHS = {'inputs': 8, 'targets': 8}
PROCESSES = 2


def _count(targets, predictions):
  """How many examples there are, and how many differ from all others."""
  assert len(targets) == len(predictions)
  return {'examples': len(targets), 'different': len(set(predictions))}


def _exact_match(targets, predictions):
  equal = sum(map(str.__eq__, targets, predictions))
  return {'exact_match': 100 * equal / len(targets)}


def _add(name):
  def read(split, shuffle_files, seed=None):
    texts = [f'{name[-1]}{i}' for i in range(SIZES[name])]
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': texts, 'targets': texts}
    )

  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(read, splits=['validation']),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features=dict.fromkeys(
      ('inputs', 'targets'), seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    ),
    metric_fns=[_count, _exact_match],
  )


def add_tasks():
  """Registers the mixture."""
  for name in SIZES:
    _add(name)
  seqio.MixtureRegistry.add(NAME, list(SIZES), default_rate=1.0)


def _echo(network, params, tokens, length, numbers):
  """Decodes by repeating the inputs."""
  del network, params, numbers
  return tokens[:, :length], tokens[:, 0].astype('float32')


def evaluate(folder, **options):
  """Returns the results of one evaluation by all processes there are."""
  partitioner = partitioning.Partitioner()
  network = networks.tiny(vocab_size=264)
  with partitioner.activate():
    space = parameters.ParameterSpace(network, partitioner)
    params = space.to_devices(networks.random_params(network))
    planned = evaluation.Evaluation(NAME, LENGTHS, _echo, **options)
    planned.check(network)
    return planned.prepare(network, partitioner, str(folder))(params, 3)


if __name__ == '__main__':
  index, port, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
  jax.distributed.initialize(f'localhost:{port}', PROCESSES, index)
  add_tasks()
  results = {
    size: evaluate(os.path.join(output, str(size)), batch_size=size)
    for size in BATCH_SIZES
  }
  with open(os.path.join(output, f'results-{index}.json'), 'w') as file:
    json.dump({'devices': jax.device_count(), 'results': results}, file)
