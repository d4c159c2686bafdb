"""What Hugging Face calls the networks here, and how it stores them.

A family of models is a subclass of `Family`, in the family's own folder;
`families` knows all of them. Checkpoints ask the family, and contain nothing
that is true of one family alone. The base class is the family of a network that
Hugging Face does not have.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
import re
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from dst_t5x.core import json_object
from dst_t5x.core.errors import UserError

PyTree = Any
T = TypeVar('T')
# How a network runs; no checkpoint states it.
OF_RUNS = ('dtype', 'dropout_rate', 'scan_layers', 'remat')
# What `run.json` states of a network besides sizes and options.
_BESIDES = ('id', *OF_RUNS)
_NEVER = re.compile(r'(?!)')


class Tensor(NamedTuple):
  """A tensor of a Hugging Face model.

  Attributes:
    path: its place in our tree.
    shape: as they store it.
    transposed: whether ours has the axes the other way round. Linear maps are
      [out, in] there and [in, out] here.
  """

  path: str
  shape: tuple[int, ...]
  transposed: bool = False

  @property
  def our_shape(self) -> tuple[int, ...]:
    """Its shape in our tree."""
    return self.shape[::-1] if self.transposed else self.shape

  @property
  def num_bytes(self) -> int:
    """Its bytes in float32."""
    return 4 * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Model:
  """A model as a folder of Hugging Face's holds it.

  Attributes:
    network: with these sizes, an `api.Network`.
    architecture: Transformers' class.
    tensors: their name -> tensor, all that there are.
    copies: other name -> name in `tensors`. A folder may hold the tensor under
      this name, too, or only under this one.
    substitutes: name in `tensors` -> another one, which stands for it in a
      folder that does not hold it.
    unused: names of what a folder may hold besides, and nobody reads.
  """

  network: Any
  architecture: str
  tensors: Mapping[str, Tensor]
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  substitutes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  unused: re.Pattern[str] = _NEVER


@dataclasses.dataclass(frozen=True)
class GgufModel:
  """A model in a GGUF file.

  Attributes:
    model: Hugging Face's.
    restored: returns a tensor as Hugging Face's files hold it; takes Hugging
      Face's name, and the tensor of the GGUF file.
    unused: names of the file's tensors that are none of Hugging Face's.
  """

  model: Model
  restored: Callable[[str, np.ndarray], np.ndarray]
  unused: Collection[str] = ()


def from_record(
  kind: type[T],
  record: json_object.JsonObject,
  inner: Mapping[str, type] | None = None,
) -> T:
  """Returns the sizes and options that `run.json` states.

  Args:
    kind: the dataclass of them.
    record: its settings; those of how a run computes are left out.
    inner: name of a setting -> the dataclass that it is, where it is one.

  Raises:
    UserError: the record is damaged.
  """
  content = {k: v for k, v in record.content.items() if k not in _BESIDES}
  for name, its_kind in (inner or {}).items():
    if content.get(name) is not None:
      content[name] = from_record(its_kind, record.inner(name))
  try:
    return kind(**content)
  except (TypeError, UserError) as e:  # Of an unknown setting, or a value.
    raise UserError(f'{record.where} is damaged: {e}') from e


class Family:
  """A family of models; this one is of those that Hugging Face does not have.

  Parameters are nested dicts with unstacked layers, of arrays or of anything
  with a shape.

  Attributes:
    name: for messages.
    model_types: of config.json.
    task_type: that PEFT has for it.
    default_targets: PEFT's kind of adapter -> the linear maps that it adapts
      where adapter_config.json names none, as PEFT has it.
    head: their name of the linear map that gives the logits.
    network_id: stable id of the network, by which `run.json` calls it.
    gguf_architectures: names of the family's architectures in GGUF files.
  """

  name: ClassVar[str] = 'model of a known family'
  model_types: ClassVar[Collection[str]] = ()
  task_type: ClassVar[str | None] = None
  default_targets: ClassVar[Mapping[str, list[str]]] = {}
  head: ClassVar[str] = ''
  network_id: ClassVar[str] = ''
  gguf_architectures: ClassVar[Collection[str]] = ()

  def has(self, paths: Collection[str]) -> bool:
    """Returns whether parameters of these paths are of the family."""
    del paths
    return True

  def read(self, stated: json_object.JsonObject) -> Model:
    """Returns what a config.json states.

    Raises:
      UserError: it is damaged, or states what the network here has not.
    """
    raise NotImplementedError

  def read_gguf(
    self,
    metadata: json_object.JsonObject,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
  ) -> GgufModel:
    """Returns what a GGUF file of the family holds.

    Args:
      metadata: of the file.
      shapes: of the file's tensors, by the file's names.
      tensor: reads one of them, float32.

    Raises:
      UserError: the file states what the network here has not.
    """
    raise NotImplementedError

  def written(
    self, network: Any, params: PyTree
  ) -> tuple[Model, dict[str, Any]]:
    """Returns what a folder is to hold, and its config.json.

    Args:
      network: of the family, an `api.Network`.
      params: its parameters.

    Raises:
      UserError: Hugging Face has no such model.
    """
    raise UserError(f'no {self.name}: Hugging Face has no such network')

  def network_of(self, params: PyTree) -> Any:
    """Returns the `api.Network` that has such parameters.

    Raises:
      UserError: their shapes do not tell.
    """
    raise NotImplementedError

  def recorded(self, config: json_object.JsonObject) -> Any:
    """Returns the `api.Network` of a run.

    Args:
      config: `config` of the network in the run's `run.json`.

    Raises:
      UserError: it is damaged.
    """
    raise NotImplementedError

  def differing(self, network: Any, stated: Any) -> Collection[str]:
    """Returns the fields of `config` in which two networks compute differently.

    Args:
      network: of the family, an `api.Network`.
      stated: the one that a checkpoint states, whose parameters have the same
        shapes.
    """
    del network, stated
    return ()

  def sizes(self, params: PyTree) -> dict[str, int]:
    """Returns the network's sizes by name, as many as the shapes tell."""
    del params
    return {}

  def linear_map(self, path: str) -> str:
    """Returns their name of a linear map, which is that of its module.

    Args:
      path: ours of its module, such as `layers_0/attention/query`.
    """
    return path.replace('/', '.')

  def module_name(self, module: str) -> str:
    """Returns what a module is called in figures.

    Args:
      module: its path, without the layer's.
    """
    return module
