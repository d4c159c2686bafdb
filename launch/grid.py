"""Sweep files and the runs that they expand to.

A file is YAML with gin's values, as on the command line of training:

    model: small                  # gin/models/t5_1_1_small.gin
    task: [gsm8k, wmt22_de_en]    # A list is an axis of the grid.
    TRAIN_STEPS: 1000
    INITIAL_CHECKPOINT_PATH: gs://bucket/t5_1_1_{model}
    grids:                        # Each inherits the settings around it.
    - method: dst
      EPSILON: [1e-6, 1e-4]
      LEARNING_RATE: [0.1, 0.3]
    - method: full

Lower-case keys choose gin files: the name of one of the package's, or the path
of another one. Other keys are macros, or parameters if they have a dot. A run's
name consists of its model, task and method and of every setting that is a list,
also a list of one value. A value of gin with brackets or quotes is a text:
`METRICS: "['bleu', 'chrf']"`. `launch/gin_grid.py` reads the same in gin.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
import os
import pathlib
import re
from typing import Any

from etils import epath
import yaml

from dst_t5x.core.errors import UserError, nearest
from dst_t5x.launch import gin_grid

# In the order in which training reads the files.
FILES = {
  'model': 'gin/models/t5_1_1_{}.gin',
  'task': 'gin/tasks/{}.gin',
  'method': 'gin/methods/{}.gin',
  'run': 'gin/runs/{}.gin',
}
_GRIDS = 'grids'
_BINDING = re.compile(r'[A-Z][A-Z0-9_]*|[\w./]*\w\.\w+')
_SHIPPED = pathlib.Path(__file__).parent / 'sweeps'
_LONGEST_NAME = 200  # Bytes; file systems allow 255.

Settings = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep.

  Attributes:
    name: the name of its folder.
    settings: key of the sweep's file -> value, as in training's flags.
    named_keys: the keys that are lists in the file and so part of the name.
  """

  name: str
  settings: Settings
  named_keys: tuple[str, ...] = ()

  def flags(self, model_dir: str | os.PathLike[str]) -> list[str]:
    """Returns the arguments of `python -m dst_t5x.train`."""
    names = [f'--gin_file={name}' for name in files(self.settings).values()]
    bindings = [
      f'--gin.{name}={value}'
      for name, value in self.settings.items()
      if name not in FILES
    ]
    return [*names, *bindings, f'--gin.MODEL_DIR={os.fspath(model_dir)!r}']

  @property
  def train_steps(self) -> int | None:
    """TRAIN_STEPS; None if the sweep does not set it."""
    value = self.settings.get('TRAIN_STEPS', '')
    return int(value) if value.isdigit() else None


def is_override(argument: str) -> bool:
  """Returns whether a command-line argument overrides a setting of the file."""
  name = argument.removeprefix('--').partition('=')[0]
  return argument.startswith('--') and (
    name.startswith('gin.') or name in FILES
  )


def shipped() -> list[str]:
  """Returns the names of the package's sweeps."""
  root = _SHIPPED.parent.parent
  return sorted(
    path.relative_to(root).as_posix()
    for path in _SHIPPED.rglob('*')
    if path.suffix in ('.gin', '.yaml')
  )


def read(name: str, flags: Sequence[str] = ()) -> list[Run]:
  """Returns the runs of a sweep, in the file's order.

  Args:
    name: a path, or one of `shipped`.
    flags: `--gin.NAME=VALUE` or `--model=NAME`; they override the file.

  Raises:
    UserError: there is no such file, or it is invalid.
  """
  content = _content(_find(name), name)
  overrides = dict(map(_override, flags))
  runs: dict[str, Run] = {}
  for settings, named_keys in _expand(_checked(content, name), overrides):
    filled = _filled_in(settings, name)
    run = Run(_run_name(settings, named_keys), filled, tuple(named_keys))
    if runs.setdefault(run.name, run).settings != run.settings:
      key = _difference(runs[run.name].settings, run.settings)
      raise UserError(
        f'{name}: two runs are called {run.name}; they differ in {key}: write '
        'its values as lists, [x], and their names tell them'
      )
  return list(runs.values())


def _content(path: epath.Path, name: str) -> Any:
  """Returns the content of a file: mappings, lists and texts."""
  try:
    text = path.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{name} cannot be read: {error}') from None
  if path.suffix == '.gin':
    return gin_grid.read(text, name, _GRIDS, FILES)
  try:
    return yaml.load(text, _Loader)
  except yaml.MarkedYAMLError as error:
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    raise UserError(f'{name}:{line}: {error.problem}') from None


class _Loader(yaml.BaseLoader):
  """Reads all scalars as texts; refuses a key that appears twice."""

  def construct_mapping(self, node: Any, deep: bool = False) -> Any:
    """Returns the mapping."""
    seen = set()
    for key, _ in node.value:
      if key.value in seen:
        raise yaml.constructor.ConstructorError(
          None, None, f'{key.value} is there twice', key.start_mark
        )
      seen.add(key.value)
    return super().construct_mapping(node, deep)


def _find(name: str) -> epath.Path:
  for path in (
    epath.Path(name).expanduser(),
    epath.Path(_SHIPPED.parent.parent) / name,
  ):
    if path.is_file():
      return path
  raise UserError(f'there is no sweep {name!r}{nearest(name, shipped())}')


def _checked(node: Any, where: str) -> dict[str, Any]:
  """Returns a node of the file after checking its form."""
  if not isinstance(node, dict):
    raise UserError(f'{where}: `key: value` is wanted, not {node!r}')
  for key, value in node.items():
    if key == _GRIDS:
      if not isinstance(value, list) or not value:
        raise UserError(f'{where}: {_GRIDS} must be a list')
      for child in value:
        _checked(child, where)
      continue
    if key not in FILES and not _BINDING.fullmatch(key):
      hint = nearest(key, [*FILES, _GRIDS])
      raise UserError(
        f'{where}: {key!r} is none of {", ".join(FILES)}, {_GRIDS}, nor a '
        f'macro of gin{hint}'
      )
    for item in value if isinstance(value, list) else [value]:
      if not isinstance(item, str):
        raise UserError(
          f'{where}: {key} holds {item!r}; write lists and dictionaries of '
          'gin as text, in quotes'
        )
      if not item.strip():
        raise UserError(f'{where}: {key} has no value')
    if not value:
      raise UserError(f'{where}: {key} has no values')
  return node


def _expand(
  node: Mapping[str, Any], overrides: Settings, inside: bool = False
) -> Iterator[tuple[dict[str, str], dict[str, None]]]:
  """Yields the settings of each run, and the keys that are part of its name."""
  own = {
    key: value if isinstance(value, list) else [value]
    for key, value in node.items()
    if key != _GRIDS and key not in overrides
  }
  named_keys = [key for key in own if isinstance(node[key], list)]
  added = {} if inside else dict(overrides)
  for values in itertools.product(*own.values()):
    settings = dict(zip(own, values, strict=True)) | added
    if _GRIDS not in node:
      yield settings, dict.fromkeys(named_keys)
      continue
    for child in node[_GRIDS]:
      for inner, inner_keys in _expand(child, overrides, inside=True):
        yield settings | inner, dict.fromkeys([*named_keys, *inner_keys])


def _override(flag: str) -> tuple[str, str]:
  """Returns name and value of `--gin.NAME=VALUE` or `--model=NAME`."""
  name, equals, value = flag.removeprefix('--').partition('=')
  if not equals or not value:
    raise UserError(f'{flag} needs a value: {flag}=…')
  return name.removeprefix('gin.'), value


def _filled_in(settings: Settings, where: str) -> dict[str, str]:
  """Returns the settings with `{key}` replaced by the value of the key."""

  def value_of(match: re.Match[str]) -> str:
    key = match[1]
    if key not in settings:
      hint = nearest(key, settings)
      raise UserError(f'{where}: {match[0]} is no key of the run{hint}')
    return stem(settings[key]) if key in FILES else settings[key]

  return {
    key: re.sub(r'\{([\w.]+)\}', value_of, value)
    for key, value in settings.items()
  }


def _run_name(settings: Settings, named_keys: Mapping[str, None]) -> str:
  """Returns the name of a run, such as `small_gsm8k_dst_epsilon=1e-4`."""
  parts = [stem(settings[key]) for key in FILES if key in settings]
  for key in named_keys:
    if key not in FILES:
      short = key.lower() if key.isupper() else key
      value = settings[key].strip('\'"')
      parts.append(f'{short}={value}')
  name = re.sub(r'[^\w.+=,-]+', '-', '_'.join(parts)).strip('-') or 'run'
  if len(name.encode()) > _LONGEST_NAME:
    raise UserError(f'a run would be called {name}, which is too long')
  return name


def files(settings: Settings) -> dict[str, str]:
  """Returns `model`, `task`, … -> the gin file that it chooses, in order."""
  chosen = {'run': 'finetune', **settings}
  return {
    kind: name if name.endswith('.gin') else pattern.format(name)
    for kind, pattern in FILES.items()
    if (name := chosen.get(kind))
  }


def stem(value: str) -> str:
  """Returns the name of a value of `model`, `task` or `method` in run names."""
  return pathlib.PurePath(value).stem if value.endswith('.gin') else value


def _difference(a: Settings, b: Settings) -> str:
  keys = dict.fromkeys([*a, *b])
  return next(key for key in keys if a.get(key) != b.get(key))
