"""Scores written predictions: `python -m dst_t5x.score FILE …`.

FILE is an output of `train`, `eval` or `infer` for any task (JSON lines). Or it
is a text file with one prediction a line, and the references are in files of
their own:

    python -m dst_t5x.score runs/wmt/evaluation/wmt22_de_en-001000.jsonl
    python -m dst_t5x.score system.txt --references refA.txt refB.txt
    python -m dst_t5x.score FILE --metrics bleurt --bleurt_checkpoint BLEURT-20

The command prints the score of each metric and how it was computed. BLEU and
chrF are SacreBLEU's and use all references; BLEURT uses the first one. `eval`
computes a task's own metrics.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import functools
import sys
from typing import Any

from dst_t5x.core import command_line
from dst_t5x.core import json_text
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError, nearest, writing
from dst_t5x.data import text_files
from dst_t5x.data import text_scores

# Keys of a row that hold references; the first one found is used.
_REFERENCES = ('references', 'targets_pretokenized', 'targets')


def read_predictions(
  path: str, with_references: bool = True
) -> tuple[list[str], list[list[str]] | None]:
  """Reads predictions and the references that are written with them.

  Args:
    path: a file of JSON lines if its name ends in `.jsonl`, otherwise a text
      file with one prediction a line.
    with_references: whether to read references.

  Returns:
    The predictions, and the references of each: the task's `references`, or
    its target; None if the file has neither.

  Raises:
    UserError: the file is missing or malformed, or has no prediction.
  """
  if not path.endswith('.jsonl'):
    return _read_texts(path), None
  parse = functools.partial(_parse_row, with_references=with_references)
  rows = list(text_files.read(path, path, parse))
  if not rows:
    raise UserError(f'{path} is empty')
  references = [found for _, found in rows]
  without = references.count([])
  if 0 < without < len(rows):
    raise UserError(
      f'{path}: only some rows have references, {without} of {len(rows)} have'
      ' none'
    )
  return [prediction for prediction, _ in rows], None if without else references


def read_references(paths: Sequence[str]) -> list[list[str]]:
  """Reads references, one a line, from one file for each translator.

  Raises:
    UserError: a file is missing, or the numbers of lines differ.
  """
  streams = [_read_texts(path) for path in paths]
  for path, stream in zip(paths, streams, strict=True):
    if len(stream) != len(streams[0]):
      raise UserError(
        f'{path} has {len(stream)} lines, but {paths[0]} {len(streams[0])}'
      )
  return [list(several) for several in zip(*streams, strict=True)]


def score(
  predictions: Sequence[str],
  references: Sequence[Sequence[str]],
  scorers: Mapping[str, text_scores.Scorer],
) -> dict[str, text_scores.Score]:
  """Returns the score of each metric.

  Raises:
    UserError: the numbers of predictions and references differ.
  """
  if len(predictions) != len(references):
    raise UserError(
      f'{len(predictions)} predictions, but {len(references)} references'
    )
  return {
    name: scorer(predictions, references) for name, scorer in scorers.items()
  }


def _read_texts(path: str) -> list[str]:
  texts = list(text_files.read_texts(path, path))
  if not any(map(str.strip, texts)):
    raise UserError(f'{path} is empty')
  return texts


def _parse_row(
  line: str, with_references: bool
) -> tuple[str, list[str]] | None:
  """Returns the prediction of a row and its references, possibly none."""
  row = text_files.parse_object(line)
  if row is None:
    return None
  if not isinstance(row.get('prediction', ''), str):
    raise text_files.MalformedRow(
      f"has 'prediction' that is not text but {row['prediction']!r}; `eval`"
      " computes this task's metrics"
    )
  prediction = text_files.text_of(row, 'prediction')
  return prediction, _references(row) if with_references else []


def _references(row: Mapping[str, Any]) -> list[str]:
  """Returns the references of a prediction; [] if the row has none.

  Raises:
    MalformedRow: a reference is no text, or the name of a key is misspelt.
  """
  # `eval` and `train` write the whole example, `infer` only its texts.
  written_by_eval = isinstance(row.get('input'), dict)
  example: Mapping[str, Any] = row['input'] if written_by_eval else row
  for name in _REFERENCES:
    if name not in example:
      continue
    # Without the target's text, `eval` writes its pieces only.
    if not (written_by_eval and name == 'targets' and _has_pieces(example)):
      return text_files.texts_of(example, name)
  if not written_by_eval:
    others = [name for name in row if name not in ('inputs', 'prediction')]
    for name in _REFERENCES:
      if hint := nearest(name, others):
        raise text_files.MalformedRow(f'has no {name!r}{hint}')
  return []


def _has_pieces(example: Mapping[str, Any]) -> bool:
  """Returns whether the targets of a written example are pieces, not text."""
  targets = example['targets']
  return isinstance(targets, list) and all(isinstance(i, int) for i in targets)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser = command_line.Parser(
    prog='python -m dst_t5x.score',
    description=__doc__,
  )
  parser.add_argument('predictions', metavar='FILE', help='what to score')
  parser.add_argument(
    '--references',
    nargs='+',
    metavar='FILE',
    help="text, one a line, instead of the predictions' own",
  )
  parser.add_argument(
    '--metrics',
    nargs='+',
    choices=('bleu', 'chrf', 'bleurt'),
    default=('bleu', 'chrf'),
    help='bleu and chrf by default',
  )
  parser.add_argument(
    '--language',
    default='',
    help="of the references, such as zh: chooses BLEU's tokenizer",
  )
  parser.add_argument(
    '--bleurt_checkpoint',
    metavar='DIR',
    help=f'by default what {text_scores.BLEURT_VARIABLE} says',
  )
  parser.add_argument('--output', metavar='FILE', help='JSON with the scores')
  return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
  make: Mapping[str, Callable[[], text_scores.Scorer]] = {
    'bleu': lambda: text_scores.bleu(options.language),
    'chrf': text_scores.chrf,
    'bleurt': lambda: text_scores.bleurt(options.bleurt_checkpoint),
  }
  predictions, references = read_predictions(
    options.predictions, with_references=not options.references
  )
  if options.references:
    references = read_references(options.references)
  if references is None:
    raise UserError(
      f'{options.predictions} has no references; name them with --references'
    )
  # All scorers are made before any work, because one may be missing.
  scorers = {name: make[name]() for name in dict.fromkeys(options.metrics)}
  scores = score(predictions, references, scorers)
  for name, found in scores.items():
    print(f'{name} {found.value:.2f}  {found.signature}')
  if options.output:
    report = {
      'predictions': options.predictions,
      'references': options.references,
      'count': len(predictions),
    } | {name: found._asdict() for name, found in scores.items()}
    with writing(options.output):
      text = json_text.dumps(report, indent=2) + '\n'
      whole_files.write_text(options.output, text)


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit status."""
  try:
    _run(_parse(arguments))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0
