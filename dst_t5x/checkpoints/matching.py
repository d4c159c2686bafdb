"""Checks that a checkpoint fits the configured model."""

from collections.abc import Mapping
from typing import Any

from dst_t5x.checkpoints import seeds
from dst_t5x.core import errors
from dst_t5x.core import parts
from dst_t5x.models import api
from dst_t5x.models import families


def check(
  seed: seeds.Seed, network: api.Network, expected: Mapping[str, Any]
) -> None:
  """Checks that a checkpoint fits the configured model.

  Args:
    seed: the checkpoint.
    network: the model.
    expected: what the checkpoint is to hold; see `check_matches`.

  Raises:
    UserError: see `check_matches` and `check_network`.
  """
  check_matches(seed.params, expected)
  check_network(seed, network)


def check_matches(
  params: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
  """Checks that a checkpoint's tensors are those of the configured model.

  Args:
    params: the checkpoint's parameters, an unstacked nested dict of arrays.
    expected: the model's, an unstacked nested dict of `jax.ShapeDtypeStruct`.

  Raises:
    UserError: the vocabulary or a size differs, or a tensor is missing,
      superfluous or of another shape. The message names the first such tensor.
  """
  found = _shapes(params)
  wanted = _shapes(expected)
  if found == wanted:
    return
  family = families.of_paths(wanted)
  _check_sizes(family.sizes(params), family.sizes(expected))
  for state, paths in (
    ('lacks', sorted(set(wanted) - set(found))),
    ('has, unlike the model,', sorted(set(found) - set(wanted))),
  ):
    if paths:
      raise errors.UserError(
        f'the checkpoint {state} tensor {paths[0]} ({len(paths)} in all); is'
        ' this the model file that belongs to it?'
      )
  path = min(path for path in wanted if found[path] != wanted[path])
  raise errors.UserError(
    f'tensor {path} is {found[path]} in the checkpoint, {wanted[path]} in the'
    ' model; is this the model file that belongs to it?'
  )


def check_network(seed: seeds.Seed, network: api.Network) -> None:
  """Checks that a network computes what its seed was made for.

  Args:
    seed: of the network's shapes; see `check_matches`.
    network: the configured model.

  Raises:
    UserError: the seed states another network. The message names the first
      option in which it differs.
  """
  if seed.network is None:
    return
  # Families compare networks of their own, which have a `config`.
  ours: Any = network.base
  theirs: Any = seed.network
  for name in families.of(seed.params).differing(ours, theirs):
    raise errors.UserError(
      f'{seed.path} states {name} = {getattr(theirs.config, name)!r}, the'
      f' model file {getattr(ours.config, name)!r}: choose the model file that'
      ' belongs to it; if another value is meant, state it in the config.json'
      ' of a copy'
    )


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  return {path: tuple(leaf.shape) for path, leaf in parts.flatten(tree).items()}


def _check_sizes(found: Mapping[str, int], wanted: Mapping[str, int]) -> None:
  """Raises UserError if sizes differ; the message uses the config's names."""
  different = {
    name: f'{name} is {found[name]} in the checkpoint, {wanted[name]} in the'
    ' model'
    for name in wanted
    if name in found and found[name] != wanted[name]
  }
  if list(different) == ['vocab_size']:
    raise errors.UserError(
      f'the checkpoint has another vocabulary: {different["vocab_size"]}'
    )
  if different:
    raise errors.UserError(
      f'the checkpoint is of another size: {"; ".join(different.values())};'
      ' choose the model file that belongs to it'
    )
