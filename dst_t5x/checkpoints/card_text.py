"""The text of a model card, in Hugging Face's form."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import huggingface_hub

from dst_t5x.checkpoints import best
from dst_t5x.core import json_text
from dst_t5x.models import families
from dst_t5x.subsets import definition

_LIBRARY = 'dst_t5x'
_TAGS = ('dynamic-subset-tuning', 'sparse-fine-tuning', 'dst')
# What stands for a name that nobody states.
_UNKNOWN_BASE = 'BASE_MODEL'


class _Kind(NamedTuple):
  """What Transformers and the Hub call a kind of networks."""

  auto_class: str
  pipeline: str


# PEFT's name of the kind -> others' names.
_KINDS = {
  'CAUSAL_LM': _Kind('AutoModelForCausalLM', 'text-generation'),
  'SEQ_2_SEQ_LM': _Kind('AutoModelForSeq2SeqLM', 'text2text-generation'),
}


class Base(NamedTuple):
  """The base model.

  Attributes:
    name: of its repository on the Hub; None if unknown.
    revision: of it; None for the newest.
    fingerprint: of the seed.
  """

  name: str | None
  revision: str | None
  fingerprint: str

  @property
  def path(self) -> str:
    """Its path for this package."""
    at = f'@{self.revision}' if self.revision else ''
    return f'hf://{self.name or _UNKNOWN_BASE}{at}'


class Entry(NamedTuple):
  """A subset file.

  Attributes:
    name: of the file.
    subset: in it.
    about: its metadata that may be shown.
    num_bytes: of the file.
  """

  name: str
  subset: definition.Subset
  about: Mapping[str, Any]
  num_bytes: int

  @property
  def scores(self) -> dict[str, float]:
    """Metric -> value, of those that are numbers."""
    scores = self.about.get('scores')
    return {
      name: value
      for name, value in (scores if isinstance(scores, dict) else {}).items()
      if '/' in name
      and isinstance(value, int | float)
      and not isinstance(value, bool)
    }


@dataclasses.dataclass(frozen=True)
class Card:
  """What a card says.

  Attributes:
    entries: the files, one or more, of one seed.
    base: their seed.
    repository: where the folder will be; None if unknown.
    license: its identifier; None if unknown.
    datasets: their identifiers.
  """

  entries: Sequence[Entry]
  base: Base
  repository: str | None
  license: str | None
  datasets: list[str]

  @property
  def title(self) -> str:
    """The repository's name, else the files'."""
    if self.repository:
      return self.repository.partition('/')[2]
    return ', '.join(entry.name.removesuffix('.dst') for entry in self.entries)

  @property
  def kind(self) -> _Kind | None:
    """The kind of the network; None if this package does not have it."""
    family = families.of_paths(self.entries[0].subset.tensors)
    return _KINDS.get(family.task_type or '')


def of(card: Card) -> str:
  """Returns the text of README.md: metadata in YAML, and Markdown."""
  sections = [
    f'# {card.title}',
    _introduction(card),
    _table(card.entries),
    _facts(card),
    _scores(card.entries),
    '## How to use it',
    _torch_lines(card),
    _jax_lines(card),
    _server(card),
  ]
  body = '\n\n'.join(section for section in sections if section)
  text = f'---\n{_metadata(card).to_yaml()}\n---\n\n{body}\n'
  return str(huggingface_hub.ModelCard(text))


def _metadata(card: Card) -> huggingface_hub.ModelCardData:
  results = [
    huggingface_hub.EvalResult(
      task_type=card.kind.pipeline if card.kind else 'other',
      dataset_type=card.datasets[0] if len(card.datasets) == 1 else task,
      dataset_name=task,
      metric_type=metric,
      metric_name=f'{metric} ({entry.name})',
      metric_value=value,
    )
    for entry in card.entries
    for name, value in entry.scores.items()
    if (task := best.task_of(name))
    for metric in [name.removeprefix(f'{task}/')]
  ]
  return huggingface_hub.ModelCardData(
    base_model=card.base.name,
    base_model_relation='adapter' if card.base.name else None,
    library_name=_LIBRARY,
    license=card.license,
    pipeline_tag=card.kind.pipeline if card.kind else None,
    tags=list(_TAGS),
    datasets=card.datasets or None,
    metrics=sorted({result.metric_type for result in results}) or None,
    model_name=card.title,
    eval_results=results or None,
  )


def _introduction(card: Card) -> str:
  base = card.base.name
  of_base = (
    f'[{base}](https://huggingface.co/{base})'
    if base
    else 'a base model (**its name on the Hub is not stated**)'
  )
  return (
    f'Subsets of the parameters of {of_base}, tuned; everything else is the'
    ' base. A `.dst` file has the positions of the parameters that changed, and'
    ' their new values, bit for bit. It is a safetensors file, without pickle.'
  )


def _table(entries: Sequence[Entry]) -> str:
  rows = [
    ('file', 'task', 'steps', 'free parameters', 'share', 'bytes'),
    ('---', '---', '---:', '---:', '---:', '---:'),
  ]
  for entry in entries:
    size = sum(tensor.size for tensor in entry.subset.tensors.values())
    rows.append(
      (
        _code(entry.name),
        _code(entry.about.get('task')),
        _code(entry.about.get('step')),
        f'{entry.subset.size:,} of {size:,}',
        f'{100 * entry.subset.size / max(size, 1):.3g} %',
        f'{entry.num_bytes:,}',
      )
    )
  return _markdown(rows)


def _facts(card: Card) -> str:
  lines = [f'- Fingerprint of the base (SHA-256): `{card.base.fingerprint}`']
  if card.base.revision:
    lines.append(f'- Revision of the base: `{card.base.revision}`')
  lines.append(f'- License: {card.license or "**not stated**"}')
  for entry in card.entries:
    budget = [
      f'{key} {_code(entry.about[key])}'
      for key in ('epsilon', 'silos', 'distance')
      if entry.about.get(key) is not None
    ]
    if budget:
      lines.append(f'- Budget of `{entry.name}`: {", ".join(budget)}')
  return '\n'.join(lines)


def _scores(entries: Sequence[Entry]) -> str:
  rows = [
    (_code(entry.name), _code(name), f'{value:.6g}')
    for entry in entries
    for name, value in sorted(entry.scores.items())
  ]
  header = [('file', 'score', 'value'), ('---', '---', '---:')]
  return f'## Scores\n\n{_markdown([*header, *rows])}' if rows else ''


def _torch_lines(card: Card) -> str:
  """Returns how to use the first file in PyTorch."""
  lines = ['from dst_t5x.subsets import torch as dst', '']
  if card.kind:
    name, revision = card.base.name or _UNKNOWN_BASE, card.base.revision
    words = [f'{name!r}', revision and f'revision={revision!r}']
    arguments = ', '.join([*filter(None, words), "dtype='float32'"])
    lines.insert(0, f'from transformers import {card.kind.auto_class}')
    lines.append(f'model = {card.kind.auto_class}.from_pretrained({arguments})')
    before = 'In PyTorch, in place; `dst.revert(model)` brings back the base:'
  else:
    before = 'In PyTorch, with the base in float32 as `model`, in place:'
  lines += [f'subset = dst.load({_path(card)!r})', 'dst.apply(model, subset)']
  return _block(before, 'python', lines)


def _jax_lines(card: Card) -> str:
  """Returns how to use the first file in JAX, if it is of a network there."""
  if not card.kind:
    return ''
  lines = [
    'from dst_t5x import subsets',
    'from dst_t5x.checkpoints import seeds',
    '',
    f'seed = seeds.load_seed({card.base.path!r})',
    f'subset, about = subsets.load({_path(card)!r})',
    'params = subsets.apply(subset, seed.params, seed.fingerprint)',
  ]
  return _block('In JAX:', 'python', lines)


def _server(card: Card) -> str:
  if not card.kind:
    return ''
  where = f'hf://{card.repository}' if card.repository else '.'
  command = f'python -m dst_t5x.serve --seed={card.base.path} --subsets={where}'
  return _block('As a server:', 'sh', [command])


def _path(card: Card) -> str:
  name = card.entries[0].name
  return f'hf://{card.repository}/{name}' if card.repository else name


def _block(before: str, language: str, lines: Sequence[str]) -> str:
  return '\n'.join([before, '', f'```{language}', *lines, '```'])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _code(value: Any) -> str:
  """Returns untrusted metadata as code, which is no markup; '' for None."""
  if value is None:
    return ''
  text = value if isinstance(value, str) else json_text.dumps(value)
  text = text.replace('`', "'").replace('|', '\\|').strip()
  return f'`{text}`' if text else ''
