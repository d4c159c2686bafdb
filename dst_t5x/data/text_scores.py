"""Scores of texts against references, each with a signature.

BLEU and chrF are SacreBLEU's (Post 2018, "A Call for Clarity in Reporting BLEU
Scores"). A signature says how the score was computed, so that papers can be
compared. BLEURT (Sellam et al. 2020) needs a package and a checkpoint that are
not installed with this package.
"""

from collections.abc import Callable, Mapping, Sequence
import importlib
import itertools
import os
import re
from typing import Any, NamedTuple

from absl import logging
import babel
from babel import core as babel_core
from sacrebleu.metrics import BLEU
from sacrebleu.metrics import CHRF

from dst_t5x.core.errors import UserError, first_line

# Script -> SacreBLEU's tokenizer; 13a for all others. 13a splits at spaces, so
# in a script without spaces it would take a whole sentence for one word.
_TOKENIZERS = {
  'Hani': 'zh',
  'Hans': 'zh',
  'Hant': 'zh',
  'Jpan': 'ja-mecab',
  'Kore': 'ko-mecab',
} | dict.fromkeys(('Khmr', 'Laoo', 'Mymr', 'Thai', 'Tibt'), 'char')
_ANY_OTHER = BLEU.TOKENIZER_DEFAULT
# Thai and Lao, Tibetan, Burmese, Khmer; kana and ideographs.
_WITHOUT_SPACES = re.compile(
  '[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]'
)

BLEURT_VARIABLE = 'BLEURT_CHECKPOINT'
BLEURT_PACKAGE = 'git+https://github.com/google-research/bleurt.git'
BLEURT_20 = 'https://storage.googleapis.com/bleurt-oss-21/BLEURT-20.zip'


class Score(NamedTuple):
  """The score of a set of texts.

  Attributes:
    value: higher is better; 100 is perfect for BLEU and chrF.
    signature: how the score was computed.
  """

  value: float
  signature: str


# (predictions, references of each) -> score
Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], Score]


def bleu(language: str = '', tokenize: str | None = None) -> Scorer:
  """Returns SacreBLEU's BLEU of a corpus, mixed case.

  Args:
    language: the references' language; see `tokenizer_for`.
    tokenize: one of SacreBLEU's tokenizers; overrides the language.

  Raises:
    UserError: there is no such language or tokenizer, or its package is
      missing.
  """
  tokenizer = tokenize or tokenizer_for(language)
  try:
    scorer = _sacrebleu(BLEU(tokenize=tokenizer))
  except Exception as error:  # SacreBLEU raises Exception itself.
    lines = [line.strip() for line in str(error).splitlines()]
    raise UserError(' '.join(filter(None, lines))) from error

  def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
  ) -> Score:
    if tokenizer == _ANY_OTHER and _lack_spaces(references):
      logging.warning(
        'the references are in a script without spaces, but BLEU splits them'
        ' at spaces (tok:%s): name their language (--language, or LANGUAGE)',
        _ANY_OTHER,
      )
    return scorer(predictions, references)

  return score


def tokenizer_for(language: str) -> str:
  """Returns SacreBLEU's tokenizer for the script of a language.

  As in the command `sacrebleu -l`, the tokenizer is `zh` for Chinese,
  `ja-mecab` for Japanese and `ko-mecab` for Korean. It is `char` for Thai, Lao,
  Khmer, Burmese and Tibetan, and `13a` for all others.

  Args:
    language: a code such as `zh`, `zho`, `zh-TW` or `zho_Hans`, or the English
      name. '' stands for any language with spaces.

  Raises:
    UserError: there is no such language.
  """
  return (
    _TOKENIZERS.get(_script(language), _ANY_OTHER) if language else _ANY_OTHER
  )


def _script(language: str) -> str:
  """Returns the code of a language's script, such as `Hans`."""
  known = babel.Locale('en')
  codes = {name.casefold(): code for code, name in known.languages.items()}
  code = codes.get(language.casefold(), language.replace('-', '_'))
  try:
    spoken, territory, script, *_ = babel_core.parse_locale(code)
  except ValueError:
    spoken, territory, script = '', None, None
  spoken = babel_core.get_global('language_aliases').get(spoken, spoken)
  likely = babel_core.get_global('likely_subtags')
  # `en_ZH` is a pair of languages; ZH is no territory.
  pair = territory and territory not in known.territories
  if pair or spoken not in {*likely, *known.languages}:
    raise UserError(
      f'no language is called {language!r}; name that of the references alone,'
      " by a code such as 'zh' or in English"
    )
  place = likely.get(f'{spoken}_{territory}', likely.get(spoken, 'und_Latn'))
  return script or babel_core.parse_locale(place)[2] or ''


def _lack_spaces(references: Sequence[Sequence[str]]) -> bool:
  """Returns whether most letters are in scripts without spaces."""
  text = ' '.join(several[0] for several in references if several)
  letters = sum(map(str.isalpha, text))
  return 2 * len(_WITHOUT_SPACES.findall(text)) > letters > 0


def chrf() -> Scorer:
  """Returns SacreBLEU's chrF2: character 6-grams, no words."""
  return _sacrebleu(CHRF())


def _sacrebleu(metric: BLEU | CHRF) -> Scorer:
  def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
  ) -> Score:
    # SacreBLEU takes a list for each translator, with None for no reference.
    streams = list(itertools.zip_longest(*references))
    result = metric.corpus_score(list(predictions), streams)
    return Score(result.score, metric.get_signature().format())

  return score


def bleurt(checkpoint: str | None = None, batch_size: int = 16) -> Scorer:
  """Returns BLEURT against the first reference, averaged, times 100.

  Args:
    checkpoint: a folder; by default the value of BLEURT_CHECKPOINT. Papers
      report BLEURT-20.
    batch_size: number of texts scored at once.

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
  except Exception as error:  # BLEURT's assertions, TensorFlow's errors.
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
    language: the references' language.

  Raises:
    UserError: there is no such language, or the package of its tokenizer is
      missing.
  """
  import seqio  # Scoring files does not need TensorFlow.

  scorers = {'bleu': bleu(language), 'chrf': chrf()}

  def translation(
    targets: Sequence[Sequence[str]], predictions: Sequence[str]
  ) -> Mapping[str, Any]:
    """Returns the scores against all references."""
    scores = {
      name: scorer(predictions, targets) for name, scorer in scorers.items()
    }
    return {name: score.value for name, score in scores.items()} | {
      f'{name}_signature': seqio.metrics.Text(score.signature)
      for name, score in scores.items()
    }

  return translation
