"""Scores predictions that were written: `python -m dst_t5x.score FILE …`.

FILE is what `train`, `eval` or `infer` wrote for whichever task (JSON lines),
or text with one prediction a line and the references in files of their own:

    python -m dst_t5x.score runs/wmt/evaluation/wmt22_de_en-001000.jsonl
    python -m dst_t5x.score system.txt --references refA.txt refB.txt
    python -m dst_t5x.score FILE --metrics bleurt --bleurt_checkpoint BLEURT-20

prints for each metric the score and how it was computed. BLEU and chrF are
SacreBLEU's against all references, BLEURT is against the first one. A task's
own metrics are computed by `eval`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import json
import sys
from typing import Any

from etils import epath

from dst_t5x import json_text
from dst_t5x import text_scores
from dst_t5x.errors import UserError, writing


def read_predictions(path: str) -> tuple[list[str], list[list[str]] | None]:
  """Reads predictions and, where they are written beside them, references.

  Args:
    path: JSON lines if its name ends in `.jsonl`, else one prediction a line.

  Returns:
    The predictions, and the references of each: the task's `references`, else
    its target alone; None if the file has neither.

  Raises:
    UserError: the file is missing, malformed, or has no prediction.
  """
  lines = _read_lines(path)
  if not path.endswith('.jsonl'):
    return lines, None
  rows = [
    _read_row(line, f'{path}:{number}')
    for number, line in enumerate(lines, start=1)
  ]
  references = [found for _, found in rows if found is not None]
  if references and len(references) < len(rows):
    raise UserError(f'{path}: only some rows have references')
  return [prediction for prediction, _ in rows], references or None


def read_references(paths: Sequence[str]) -> list[list[str]]:
  """Reads references, one a line, from one file for each translator.

  Raises:
    UserError: a file is missing, or the files differ in their number of lines.
  """
  streams = [_read_lines(path) for path in paths]
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
    UserError: there are not as many references as predictions.
  """
  if len(predictions) != len(references):
    raise UserError(
      f'{len(predictions)} predictions, but {len(references)} references'
    )
  return {
    name: scorer(predictions, references) for name, scorer in scorers.items()
  }


def _read_lines(path: str) -> list[str]:
  try:
    text = epath.Path(path).read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'cannot read {path}: {error}') from error
  if not text.strip():
    raise UserError(f'{path} is empty')
  # Not splitlines: some sentences contain exotic separators.
  return text.removesuffix('\n').split('\n')


def _read_row(line: str, place: str) -> tuple[str, list[str] | None]:
  """Returns a row's prediction and references."""
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise UserError(f'{place}: not JSON: {error}') from error
  if not isinstance(row, dict) or 'prediction' not in row:
    raise UserError(f'{place}: no "prediction"')
  if not isinstance(row['prediction'], str):
    raise UserError(
      f'{place}: the prediction is not a text but {row["prediction"]!r}; `eval`'
      " computes this task's metrics"
    )
  return row['prediction'], _references(row)


def _references(row: Mapping[str, Any]) -> list[str] | None:
  # `eval` and `train` write the whole example, `infer` its texts alone.
  example = row.get('input', row)
  if 'references' in example:
    return list(example['references'])
  for name in ('targets_pretokenized', 'targets'):
    if isinstance(example.get(name), str):
      return [example[name]]
  return None


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='python -m dst_t5x.score',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
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
    '--language', default='', help="of the references, for BLEU's tokenizer"
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
  predictions, references = read_predictions(options.predictions)
  if options.references:
    references = read_references(options.references)
  if references is None:
    raise UserError(
      f'{options.predictions} has no references; name them with --references'
    )
  # All scorers before any work: one may be missing.
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
      epath.Path(options.output).write_text(
        json_text.dumps(report, indent=2) + '\n'
      )


def main(arguments: Sequence[str]) -> int:
  """The command line; returns the exit status."""
  try:
    _run(_parse(arguments))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
