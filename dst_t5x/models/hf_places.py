"""Where the tensors of our paths are in a Hugging Face model, by names alone.

Readers that have a module or a folder, and no config of ours, find tensors with
this. Each family says how it names them; nothing here needs JAX. The tensors of
a family that the package does not have keep their own names as paths.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from dst_t5x.models.decoder_only import hf_families
from dst_t5x.models.decoder_only import hf_names as decoder_only
from dst_t5x.models.t5 import hf_names as t5


class Place(NamedTuple):
  """Where a tensor is.

  Attributes:
    name: Hugging Face's.
    transposed: whether ours has the axes the other way round.
  """

  name: str
  transposed: bool


class Places(NamedTuple):
  """Where all tensors of a model are.

  Attributes:
    tensors: our path -> place.
    copies: name -> the name in `tensors` of what has to be the same tensor.
  """

  tensors: Mapping[str, Place]
  copies: Mapping[str, str]


def places(names: Collection[str], tied: Mapping[str, str]) -> Places:
  """Returns where the tensors of a model are.

  Args:
    names: of all its tensors.
    tied: name -> the name of the tensor that it is, too.
  """
  return (
    _of_t5(names) or _of_decoder_only(names, tied) or _of_others(names, tied)
  )


def tied_by(config: Mapping[str, object]) -> dict[str, str]:
  """Returns the names that a config.json ties, as `places` takes them."""
  family = hf_families.FAMILIES.get(str(config.get('model_type')))
  tied = config.get('tie_word_embeddings', bool(family and family.tied))
  return {decoder_only.HEAD: decoder_only.EMBEDDING} if tied else {}


def _of_t5(names: Collection[str]) -> Places | None:
  copies = [name for name in t5.COPIES if name in names]
  known = [n for n in names if n not in copies and not t5.UNUSED.fullmatch(n)]
  embedding = t5.EMBEDDING
  if embedding not in names and copies:
    embedding = copies.pop(0)
    known.append(t5.EMBEDDING)
  tensors = _mapped(known, t5.path_of, t5.transposed)
  if tensors is None:
    return None
  for path, place in tensors.items():
    if place.name == t5.EMBEDDING:
      tensors[path] = Place(embedding, place.transposed)
  if t5.HEAD not in names and t5.EMBEDDING in known:
    # Transformers omits the head from a file if it is the embedding.
    head = str(t5.path_of(t5.HEAD))
    tensors[head] = Place(embedding, t5.transposed(head))
  return Places(tensors, dict.fromkeys(copies, embedding))


def _of_decoder_only(
  names: Collection[str], tied: Mapping[str, str]
) -> Places | None:
  is_tied = tied.get(decoder_only.HEAD) == decoder_only.EMBEDDING
  copies = {}
  if is_tied and decoder_only.HEAD in names:
    copies[decoder_only.HEAD] = decoder_only.EMBEDDING
  known = [
    name
    for name in names
    if name not in copies and not decoder_only.UNUSED.fullmatch(name)
  ]
  post_norms = decoder_only.has_post_norms(names)
  tensors = _mapped(
    known,
    lambda name: decoder_only.path_of(name, post_norms),
    decoder_only.transposed,
  )
  return None if tensors is None else Places(tensors, copies)


def _of_others(names: Collection[str], tied: Mapping[str, str]) -> Places:
  copies = {a: b for a, b in tied.items() if a in names and b in names}
  own = [name for name in names if name not in copies]
  return Places({name: Place(name, False) for name in own}, copies)


def _mapped(
  names: Collection[str],
  path_of: Callable[[str], str | None],
  transposed: Callable[[str], bool],
) -> dict[str, Place] | None:
  """Returns path -> place; None if a name is not of the family."""
  tensors = {}
  for name in names:
    path = path_of(name)
    if path is None:
      return None
    tensors[path] = Place(name, transposed(path))
  return tensors
