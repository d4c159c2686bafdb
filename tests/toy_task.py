"""A task that is learnt in seconds: letters to capitals. See toy.gin."""

import os
import random

import jax.numpy as jnp
import seqio
import tensorflow as tf

NAME = 'toy'
SIZES = {'train': 600, 'validation': 20, 'test': 10}
_FEATURE = seqio.Feature(seqio.ByteVocabulary(extra_ids=0), add_eos=True)


def _read(split, shuffle_files, seed=None):
  del shuffle_files, seed
  generator = random.Random(split)
  rows = [
    ''.join(generator.choices('abcdefgh', k=generator.randint(2, 7)))
    for _ in range(SIZES[split])
  ]
  texts = {'inputs': rows, 'targets': [row.upper() for row in rows]}
  return tf.data.Dataset.from_tensor_slices(texts)


def exact_match(targets, predictions):
  """Per cent of the predictions that equal their targets."""
  equal = [a == b for a, b in zip(targets, predictions, strict=True)]
  return {'exact_match': 100 * sum(equal) / len(equal)}


def add(name, read, metric=exact_match):
  """Registers a task that reads its rows by a function."""
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(read, splits=list(SIZES)),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={'inputs': _FEATURE, 'targets': _FEATURE},
    metric_fns=[metric] if metric else [],
  )


def _read_with_generator(split, shuffle_files, seed=None):
  rows = list(_read(split, shuffle_files, seed).as_numpy_iterator())
  text = tf.TensorSpec([], tf.string)
  return tf.data.Dataset.from_generator(
    lambda: iter(rows), output_signature={'inputs': text, 'targets': text}
  )


add(NAME, _read)
add('toy_plain', _read, None)  # Nothing is decoded.
# TensorFlow cannot save the state of what reads from a Python generator.
add('toy_generator', _read_with_generator)


def spiked():
  """A learning rate that is infinite in the tenth step, and then too high."""
  return lambda step: jnp.where(
    step == 9, jnp.inf, jnp.where(step < 9, 0.01, 2.0)
  )


# Whether the metric of `toy_fragile` fails as soon as a prediction is wrong.
BREAKS = {'now': 'TOY_BREAKS' in os.environ}


def fragile(targets, predictions):
  """Per cent that are right, or an error that no right prediction brings."""
  if BREAKS['now'] and list(targets) != list(predictions):
    raise KeyError('a wrong prediction')
  return exact_match(targets, predictions)


add('toy_fragile', _read, fragile)
add('toy_generator_fragile', _read_with_generator, fragile)


def broken(targets, predictions):
  """Fails whatever the predictions are."""
  raise LookupError('no such scores')


add('toy_unscored', _read, broken)
