"""Inspects, checks, applies, exports, compares, publishes subset files.

    python -m dst_t5x.subset extract TUNED --seed SEED --output a.dst
    python -m dst_t5x.subset info a.dst
    python -m dst_t5x.subset verify a.dst --seed SEED
    python -m dst_t5x.subset apply a.dst --seed SEED --output DIR
    python -m dst_t5x.subset export a.dst --seed SEED --format=hf --output DIR
    python -m dst_t5x.subset export a.dst --seed SEED --format=peft --output DIR
    python -m dst_t5x.subset overlap a.dst b.dst
    python -m dst_t5x.subset combine a.dst b.dst --rule=mean --output ab.dst
    python -m dst_t5x.subset card a.dst --base-model LAB/BASE --output DIR

SEED and TUNED are anything that `python -m dst_t5x.convert` reads: a T5X
checkpoint, a Hugging Face folder, a GGUF file, or a run. TUNED can also be an
adapter of Hugging Face PEFT, a SHiRA adapter of SEED above all.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import math
import os
import sys
from typing import Any, get_args

from etils import epath

import dst_t5x
from dst_t5x.core import command_line
from dst_t5x.core import hub
from dst_t5x.core import json_text
from dst_t5x.core.errors import UserError
from dst_t5x.method import silos
from dst_t5x.subsets import algebra
from dst_t5x.subsets import extraction
from dst_t5x.subsets import file

_BAR = 30
# Above this share of the parameters, a subset file is larger than the model.
_MOST = 0.8

Rows = list[tuple[str, ...]]


def extract(options: argparse.Namespace) -> None:
  """Writes the subset in which a tuned model differs from its seed."""
  (path,) = options.files
  seed = _load_seed(options.seed).merged()
  tuned = _load_tuned(path, options.seed).merged()
  subset = extraction.extract(tuned.params, seed.params, seed.fingerprint)
  parameters = sum(math.prod(t.shape) for t in subset.tensors.values())
  if subset.size > _MOST * parameters:
    raise UserError(
      f'{subset.size:,} of {parameters:,} parameters differ: is {options.seed} '
      f'the seed of {path}? If it is, the model is no subset: use '
      '`python -m dst_t5x.convert`'
    )
  about = {
    'seed': seed.reference,
    'step': tuned.step,
    'parameters': parameters,
    'version': dst_t5x.__version__,
  }
  size = file.save(options.output, subset, about)
  print(
    f'{options.output}: {subset.size:,} of {parameters:,} parameters differ '
    f'from {seed.path}, {size:,} bytes'
  )
  if tuned.note:
    print(f'{path}: {tuned.note}')


def info(options: argparse.Namespace) -> None:
  """Prints the metadata of files, and the free parameters by module."""
  for i, path in enumerate(options.files):
    subset, about = file.load(path)
    size = _bytes_of(path)
    print('\n' * bool(i), end='')
    print(f'{path}: {size:,} bytes, {subset.size:,} values, {file.FORMAT}')
    # JSON escapes control characters, which a terminal would obey.
    for key in sorted(about):
      print(f'{json_text.dumps(key)[1:-1]}: {json_text.dumps(about[key])}')
    _show(_modules(subset))


def _bytes_of(path: str) -> int:
  """Returns the size of a file that has been read."""
  return (
    epath.Path(hub.local(path) if hub.is_path(path) else path).stat().length
  )


def _modules(subset: extraction.Subset) -> Rows:
  """Returns a table by module: parameters, free ones, their share, a bar."""
  sizes: dict[str, int] = {}
  free: dict[str, int] = {}
  for path, tensor in subset.tensors.items():
    module = silos.per_module(path)
    sizes[module] = sizes.get(module, 0) + math.prod(tensor.shape)
    count = len(subset.positions.get(path, ()))
    free[module] = free.get(module, 0) + count
  shares = {m: free[m] / size if size else 0.0 for m, size in sizes.items()}
  most = max(shares.values(), default=0) or 1
  rows: Rows = [('module', 'parameters', 'free', 'share', '')]
  for module in sorted(sizes):
    bar = '█' * math.ceil(_BAR * shares[module] / most)
    rows.append((module, *_counts(sizes[module], free[module]), bar))
  total = _counts(sum(sizes.values()), sum(free.values()))
  return [*rows, ('all', *total, '')]


def _counts(parameters: int, free: int) -> tuple[str, str, str]:
  share = 100 * free / parameters if parameters else 0.0
  return f'{parameters:,}', f'{free:,}', f'{share:.3g} %'


def _show(rows: Rows) -> None:
  """Prints rows: names flush left, numbers flush right, the last column raw."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  for name, *numbers, last in rows:
    cells = [f'{n:>{w}}' for n, w in zip(numbers, widths[1:-1], strict=True)]
    print('  '.join([f'{name:<{widths[0]}}', *cells, last]).rstrip())


def verify(options: argparse.Namespace) -> None:
  """Checks that files are whole, and that they belong to a seed."""
  subsets = {path: file.load(path)[0] for path in options.files}
  seed = _load_seed(options.seed) if options.seed else None
  for path, subset in subsets.items():
    if seed is not None:
      check = extraction.check_seed
      _for_file(path, check, subset, seed.params, seed.fingerprint)
    belongs = 'is for' if seed is None else 'belongs to'
    print(
      f'{path} is whole: {subset.size:,} values; it {belongs} the seed '
      f'{subset.fingerprint}'
    )


def _for_file(path: str, function: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a function; its UserErrors get the file's path."""
  try:
    return function(*arguments)
  except UserError as e:
    raise UserError(f'{path}: {str(e).removeprefix("subset: ")}') from e


def _load_seed(path: str) -> Any:
  # Reading models imports many libraries that reading subsets does not need.
  from dst_t5x.checkpoints import seeds

  return seeds.load_seed(path)


def _load_tuned(path: str, seed: str) -> Any:
  """Returns a tuned model; if it is a SHiRA adapter, on the seed named."""
  from dst_t5x.checkpoints import seeds
  from dst_t5x.checkpoints import shira_files

  of = seed if shira_files.is_adapter(path) else None
  return seeds.load_seed(path, seed_path=of)


def apply(options: argparse.Namespace) -> None:
  """Applies a file to its seed, and writes the model in the seed's format."""
  _write_tuned(options, None)


def export(options: argparse.Namespace) -> None:
  """Applies a file to its seed, and writes the model or PEFT's SHiRA."""
  _write_tuned(options, options.format)


def _write_tuned(options: argparse.Namespace, kind: str | None) -> None:
  """Writes the tuned model, by default as T5X unless the seed is `hf`.

  Of `peft`, only the subset is written.
  """
  from dst_t5x.checkpoints import conversion
  from dst_t5x.subsets import fingerprint

  (path,) = options.files
  subset, about = file.load(path)
  seed = _load_seed(options.seed)
  kind = kind or ('hf' if seed.format in ('gguf', 'hf') else 't5x')
  step = about.get('step')
  step = step if isinstance(step, int) else seed.step
  if kind == 'peft':
    check = extraction.check_seed
    _for_file(path, check, subset, seed.params, seed.fingerprint)
    found = conversion.write_shira(options.output, subset, seed, step)
    print(f'{path} of {seed.path} -> {options.output} (peft: {found})')
    return
  params = _for_file(
    path, extraction.apply, subset, seed.params, seed.fingerprint
  )
  tuned = dataclasses.replace(seed, params=params, step=step)
  written = conversion.write(options.output, tuned, kind)
  print(
    f'{seed.path} with {subset.size:,} values of {path} -> {written} '
    f'({kind}), fingerprint {fingerprint.fingerprint(params)}'
  )


def overlap(options: argparse.Namespace) -> None:
  """Prints the overlap of each pair of files (Eq. 9); of two, by module too."""
  subsets = [subset for subset, _ in _load_several(options.files)]
  overlaps = {
    (i, j): algebra.overlap(subsets[i], subsets[j])
    for i, j in itertools.combinations(range(len(subsets)), 2)
  }
  modules = {}
  if len(subsets) == 2:
    modules = algebra.overlap_by_module(*subsets)
  _show_overlaps(options.files, overlaps, modules)


def _load_several(
  files: Sequence[str],
) -> list[tuple[extraction.Subset, dict[str, Any]]]:
  if len(files) < 2:
    raise UserError(f'there is only {files[0]}: name two files or more')
  return [file.load(path) for path in files]


def _show_overlaps(
  files: Sequence[str],
  overlaps: Mapping[tuple[int, int], algebra.Overlap],
  modules: Mapping[str, algebra.Overlap],
) -> None:
  """Prints the overlaps of pairs of files; files are numbered from 1."""
  for i, path in enumerate(files, start=1):
    print(f'{i}: {path}')
  rows: Rows = [('', 'first', 'second', 'shared', 'of first', 'Jaccard', '')]
  rows += [_overlap_row(module, found) for module, found in modules.items()]
  rows += [
    _overlap_row(f'{i + 1} and {j + 1}', found)
    for (i, j), found in overlaps.items()
  ]
  _show(rows)


def _overlap_row(name: str, found: algebra.Overlap) -> tuple[str, ...]:
  counts = (f'{n:,}' for n in (found.first, found.second, found.shared))
  shares = (
    '' if math.isnan(share) else f'{100 * share:.2f} %'
    for share in (found.share, found.jaccard)
  )
  return (name, *counts, *shares, '')


def combine(options: argparse.Namespace) -> None:
  """Combines the values of several files into one file."""
  loaded = _load_several(options.files)
  combined, overlaps = algebra.combine(
    [subset for subset, _ in loaded], options.rule
  )
  _show_overlaps(options.files, overlaps, {})
  about = {
    'seed': loaded[0][1]['seed'],
    'rule': options.rule,
    'combined': [os.path.basename(path) for path in options.files],
    'parameters': sum(math.prod(t.shape) for t in combined.tensors.values()),
    'version': dst_t5x.__version__,
  }
  size = file.save(options.output, combined, about)
  print(f'{options.output}: {combined.size:,} values, {size:,} bytes')


def card(options: argparse.Namespace) -> None:
  """Writes a folder for the Hugging Face Hub: files and their model card."""
  from dst_t5x.checkpoints import subset_card

  stated = subset_card.Stated(
    options.base_model, options.repository, options.license, options.dataset
  )
  written = subset_card.write(options.output, options.files, stated)
  print(
    f'{options.output}: {subset_card.README} and {len(options.files)} subsets,'
    f' {written.num_bytes:,} bytes; upload it with `hf upload'
    f' {options.repository or "LAB/NAME"} {options.output}`'
  )
  if written.unknown:
    print(f'the card does not say: {", ".join(written.unknown)}')


def _parser() -> command_line.Parser:
  parser = command_line.Parser(
    prog='python -m dst_t5x.subset',
    description=__doc__,
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  def add(
    run: Callable[..., None],
    files: str | int,
    metavar: str = 'FILE',
    what: str = '*.dst',
  ) -> command_line.Parser:
    summary = (run.__doc__ or '').splitlines()[0]
    command = commands.add_parser(
      run.__name__, help=summary, description=summary
    )
    command.set_defaults(run=run)
    command.add_argument('files', nargs=files, metavar=metavar, help=what)
    return command

  command = add(extract, 1, 'TUNED', 'a tuned model of any format')
  command.add_argument('--seed', metavar='DIR', required=True)
  command.add_argument(
    '--output', metavar='FILE', required=True, help='*.dst to write'
  )
  add(info, '+')
  add(verify, '+').add_argument('--seed', metavar='DIR', help='their seed')
  for run in (apply, export):
    command = add(run, 1)
    command.add_argument('--seed', metavar='DIR', required=True)
    command.add_argument(
      '--output', metavar='DIR', required=True, help='new folder'
    )
  command.add_argument('--format', choices=('hf', 't5x', 'peft'), required=True)
  add(overlap, '+')
  command = add(combine, '+')
  command.add_argument(
    '--rule',
    choices=get_args(algebra.Rule),
    default='disjoint',
    help='where several have a value: none may differ (the default), the '
    'first counts, or their mean',
  )
  command.add_argument(
    '--output', metavar='FILE', required=True, help='*.dst to write'
  )
  _add_options_of_card(add(card, '+'))
  return parser


def _add_options_of_card(command: command_line.Parser) -> None:
  """Adds the options of what no file knows."""
  command.add_argument(
    '--output', metavar='DIR', required=True, help='new folder'
  )
  command.add_argument(
    '--base-model',
    metavar='LAB/BASE[@REVISION]',
    help="the seed's name on the Hub; by default what the files say",
  )
  command.add_argument(
    '--repository', metavar='LAB/NAME', help='where the folder will be'
  )
  command.add_argument(
    '--license', metavar='ID', help="the Hub's identifier, such as apache-2.0"
  )
  command.add_argument(
    '--dataset',
    metavar='LAB/DATA',
    action='append',
    default=[],
    help='of the tuning, by its name on the Hub; can be repeated',
  )


def main(arguments: Sequence[str]) -> int:
  """Runs the command and returns its exit status."""
  options = _parser().parse_args(arguments)
  try:
    options.run(options)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0
