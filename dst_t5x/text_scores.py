"""Scores of texts against references, each with how it was computed.

BLEU and chrF are SacreBLEU's (Post 2018, "A Call for Clarity in Reporting BLEU
Scores"), whose signature makes a number comparable with other papers'. BLEURT
(Sellam et al. 2020) needs a package and a checkpoint that are not installed
with this one.
"""

from collections.abc import Callable, Mapping, Sequence
import importlib
import itertools
import os
from typing import Any, NamedTuple

from sacrebleu.metrics import BLEU
from sacrebleu.metrics import CHRF

from dst_t5x.errors import UserError, first_line

BLEURT_VARIABLE = 'BLEURT_CHECKPOINT'
BLEURT_PACKAGE = 'git+https://github.com/google-research/bleurt.git'
BLEURT_20 = 'https://storage.googleapis.com/bleurt-oss-21/BLEURT-20.zip'


class Score(NamedTuple):
  """A score of a whole set of texts.

  Attributes:
    value: the larger the better; 100 is perfect for BLEU and chrF.
    signature: how it was computed.
  """

  value: float
  signature: str


# (predictions, references of each) -> score
Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], Score]


def bleu(language: str = '', tokenize: str | None = None) -> Scorer:
  """Returns SacreBLEU's BLEU, mixed case, over the whole set.

  Args:
    language: of the references; like the command `sacrebleu -l`, Chinese,
      Japanese and Korean get their own tokenizer, all others 13a.
    tokenize: one of SacreBLEU's tokenizers, whatever the language.

  Raises:
    UserError: there is no such tokenizer, or its package is missing.
  """
  try:
    return _sacrebleu(BLEU(tokenize=tokenize, trg_lang=language))
  except Exception as error:  # SacreBLEU raises the plain class.
    lines = [line.strip() for line in str(error).splitlines()]
    raise UserError(' '.join(filter(None, lines))) from error


def chrf() -> Scorer:
  """Returns SacreBLEU's chrF2: characters up to 6-grams, no words."""
  return _sacrebleu(CHRF())


def _sacrebleu(metric: BLEU | CHRF) -> Scorer:
  def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
  ) -> Score:
    # SacreBLEU wants one sequence for each reference; None is no reference.
    streams = list(itertools.zip_longest(*references))
    result = metric.corpus_score(list(predictions), streams)
    return Score(result.score, metric.get_signature().format())

  return score


def bleurt(checkpoint: str | None = None, batch_size: int = 16) -> Scorer:
  """Returns BLEURT against the first reference, averaged and times 100.

  Args:
    checkpoint: a folder; by default the one that BLEURT_CHECKPOINT names.
      Papers report BLEURT-20.
    batch_size: texts that are scored at once.

  Raises:
    UserError: the package or the checkpoint is missing.
  """
  path = checkpoint or os.environ.get(BLEURT_VARIABLE)
  try:
    importlib.import_module('bleurt')
  except ImportError as error:
    raise UserError(
      f"BLEURT needs the package 'bleurt': pip install {BLEURT_PACKAGE}"
    ) from error
  if not path:
    raise UserError(
      f'BLEURT needs a checkpoint: unpack {BLEURT_20} and name its folder with'
      f' --bleurt_checkpoint or {BLEURT_VARIABLE}'
    )
  if not os.path.isfile(os.path.join(path, 'bleurt_config.json')):
    raise UserError(
      f'{path} is no BLEURT checkpoint, it has no bleurt_config.json: unpack'
      f' {BLEURT_20} and name its folder'
    )
  try:
    library = importlib.import_module('bleurt.score')
  except ImportError as error:
    raise UserError(
      f"the package 'bleurt' is not complete ({error}): pip install"
      f' {BLEURT_PACKAGE}'
    ) from error
  try:
    scorer = library.BleurtScorer(path)
  except Exception as error:  # Assertions of BLEURT's, TensorFlow's errors.
    raise UserError(
      f'cannot load the BLEURT checkpoint {path}: {first_line(error)}'
    ) from error
  name = os.path.basename(os.path.normpath(path))

  def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
  ) -> Score:
    values = scorer.score(
      references=[several[0] for several in references],
      candidates=list(predictions),
      batch_size=batch_size,
    )
    average = 100.0 * sum(values) / len(values)
    return Score(average, f'checkpoint:{name}|reference:first|times:100')

  return score


def translation_metric(
  language: str,
) -> Callable[[Sequence[Sequence[str]], Sequence[str]], Mapping[str, Any]]:
  """Returns a metric function for seqio: BLEU and chrF with signatures.

  Args:
    language: of the references.

  Raises:
    UserError: the language needs a tokenizer whose package is missing.
  """
  import seqio  # Scoring files needs no TensorFlow.

  scorers = {'bleu': bleu(language), 'chrf': chrf()}

  def translation(
    targets: Sequence[Sequence[str]], predictions: Sequence[str]
  ) -> Mapping[str, Any]:
    """Scores against all references."""
    scores = {
      name: scorer(predictions, targets) for name, scorer in scorers.items()
    }
    return {name: score.value for name, score in scores.items()} | {
      f'{name}_signature': seqio.metrics.Text(score.signature)
      for name, score in scores.items()
    }

  return translation
