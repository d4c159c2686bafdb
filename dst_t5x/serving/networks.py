"""The network and the vocabulary of a served seed.

Some seeds state their network, such as a Hugging Face folder, which also has
the tokenizer. Of T5, the shapes of the tensors tell the network. Any other seed
needs the model's gin file, which also names the vocabulary.
"""

from collections.abc import Sequence
import os

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from etils import epath
import seqio

from dst_t5x.checkpoints import matching
from dst_t5x.checkpoints import seeds
from dst_t5x.config import binaries
from dst_t5x.core import hub
from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError
from dst_t5x.data import tokenizers_vocabulary
from dst_t5x.data import vocabulary as vocabulary_lib
from dst_t5x.models import api
from dst_t5x.models import families

_GIN_FILE = '--gin_file=gin/runs/serve.gin'


def configured(network: api.Network) -> api.Network:
  """Returns the network that gin passes."""
  return network


def of_gin(arguments: Sequence[str]) -> api.Network | None:
  """Configures gin, and returns the network of its files; None without any.

  Args:
    arguments: `--gin_file=…` and `--gin.NAME=VALUE`.

  Raises:
    UserError: a file does not exist, or a setting makes no sense.
  """
  if not arguments:
    return None
  network: api.Network = binaries.parse([*arguments, _GIN_FILE], configured)()
  return network


def of_seed(seed: seeds.Seed, network: api.Network | None) -> api.Network:
  """Returns the network of a seed.

  Args:
    seed: the model.
    network: of gin, if there is one.

  Raises:
    UserError: nothing tells the network, or it is not the seed's.
  """
  if network is not None:
    matching.check(seed, network, api.shapes(network))
    return network
  if seed.network is not None:
    return seed.network
  try:
    found: api.Network = families.network_of(seed.params)
  except UserError as e:
    raise UserError(
      f'{seed.path}: {e}; name the gin file: --gin_file=gin/models/….gin'
    ) from e
  return found


def vocabulary(
  name: str | None, seed_path: str, is_configured: bool
) -> seqio.Vocabulary:
  """Returns the vocabulary, which has not been read yet.

  Args:
    name: that the user chose; by default gin's, that of `DST_VOCABULARY`, the
      tokenizer in the seed's folder, or T5's, the first that there is.
    seed_path: the seed's folder, also on the Hub.
    is_configured: whether there are gin files.
  """
  is_chosen = is_configured or os.environ.get(
    vocabulary_lib.VOCABULARY_VARIABLE
  )
  if name is None and not is_chosen and _has_tokenizer(seed_path):
    name = seed_path
  return (
    vocabulary_lib.chosen() if name is None else vocabulary_lib.chosen(name)
  )


def _has_tokenizer(seed_path: str) -> bool:
  """Returns whether there is a tokenizer in the seed's folder."""
  if hub.is_path(seed_path) and not hub.is_subset(seed_path):
    return (hub.snapshot(seed_path)[0] / tokenizers_vocabulary.FILE).exists()
  return (
    not object_stores.is_remote(seed_path)
    and (epath.Path(seed_path) / tokenizers_vocabulary.FILE).exists()
  )
