"""Finds the sizes of a T5 1.1 network from the shapes of its parameters."""

from collections.abc import Mapping
import re
from typing import Any

from dst_t5x.core import parts


def sizes(params: Mapping[str, Any]) -> dict[str, int]:
  """Returns the sizes that the shapes determine, by `T5Config`'s names.

  Args:
    params: unstacked nested dict of anything with a shape.
  """
  flat = parts.flatten(params)
  shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
  result = {}
  embedding = shapes.get('token_embedder/embedding', ())
  if len(embedding) == 2:
    result['vocab_size'], result['emb_dim'] = embedding
  for stack in ('encoder', 'decoder'):
    layers = {
      match.group(1)
      for match in (re.match(rf'{stack}/layers_(\d+)/', path) for path in flat)
      if match
    }
    result[f'num_{stack}_layers'] = len(layers)
  up = shapes.get('encoder/layers_0/mlp/wi_0/kernel', ())
  if len(up) == 2:
    result['mlp_dim'] = up[1]
  heads = shapes.get('encoder/relpos_bias/rel_embedding', ())
  query = shapes.get('encoder/layers_0/attention/query/kernel', ())
  if len(heads) == 2 and len(query) == 2 and heads[0]:
    result['num_heads'] = heads[0]
    result['head_dim'] = query[1] // heads[0]
  return result
