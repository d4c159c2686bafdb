r"""Numbers in texts of models: `1,080`, `$1080.00`, `−5`, `2 1/2`, `1e3`.

Each number has a canonical text, so that equal numbers have equal texts: a
hyphen as the only sign, a point as the only separator, no superfluous zeros. A
fraction without a finite decimal expansion is in lowest terms, `-1/3`. Values
are exact and may have any number of digits.

The patterns include: digits, dashes, spaces and currencies of all scripts;
thousands separated by commas, no-break spaces, apostrophes, underscores, or at
least two points; LaTeX's `1{,}080`, `\$5`, `\frac{1}{2}` and `\boxed{5}`;
common fractions, alone or after a whole number; powers of ten such as `1.5e3`.
Units and words are not read: `2 million` is 2, `1:30` is 1 and 30.
"""

import decimal
from fractions import Fraction
import re
import unicodedata

# A comma always separates thousands; a decimal comma looks the same.
_WHOLE = (
  r'\d{{1,3}}(?:[{apart}]\d{{3}})+(?!\d)|\d{{1,3}}(?:\.\d{{3}}){{2,}}(?!\.?\d)'
  r'|\d[\d,]*'
)
_FRACTION = r'(?<![\d/])(?:\d{1,9} )?\d{1,9}/0*[1-9]\d{0,8}(?![\d/]|[.,]\d)'
_EXPONENT = r'(?:[eE][-+]?\d{1,3}(?!\.?\d))?'
_APART = "'’_\xa0"


def _number(apart: str, space: str) -> str:
  """Returns a pattern of a number with a sign and possibly a currency."""
  whole = _WHOLE.format(apart=apart)
  plain = rf'(?:(?:{whole})(?:\.\d+)?|\.\d+){_EXPONENT}'
  return rf'(?:-{space})?(?:\$ ?)?(?:-{space})?(?:{_FRACTION}|{plain})'


# After a marker only the answer follows, so it may have more forms.
_ANSWER = re.compile(
  rf'[^\w#]*?(?:\\boxed ?\{{)?({_number(_APART + " ", " ?")})'
)
# A hyphen after a letter or a number is not a sign: `10-5`, `year-3`.
_ANYWHERE = re.compile(rf'(?:(?<![\w)])|(?=[$\d.])){_number(_APART, "")}')


class _Plain(dict[int, str]):
  """Code point -> its form in ASCII and no-break spaces."""

  def __missing__(self, code: int) -> str:
    self[code] = plain = self._find(chr(code))
    return plain

  def _find(self, char: str) -> str:
    category = unicodedata.category(char)
    if category == 'Nd':
      return str(unicodedata.decimal(char))
    if category == 'Sc':
      return '$'
    if category == 'Zs' and char != ' ':
      return '\xa0'
    # Longer dashes separate sentences.
    if char == '−' or (category == 'Pd' and char not in '—―'):
      return '-'
    if unicodedata.name(char, '').startswith('VULGAR FRACTION'):
      return ' ' + unicodedata.normalize('NFKC', char).replace('⁄', '/')
    is_wide = '！' <= char <= '～'
    return unicodedata.normalize('NFKC', char) if is_wide else char


_PLAIN = _Plain()


def _plain(text: str) -> str:
  text = text.translate(_PLAIN)
  text = re.sub(r'(?<=\d)(?:\{,\}|\\[,!:; ])(?=\d)', ',', text)
  text = re.sub(r'\\[dt]?frac ?\{(\d+)\}\{(\d+)\}', r' \1/\2', text)
  return re.sub(r'\\(?=[$%])', '', text)


def after(marker: str, text: str) -> str | None:
  """Returns the number after a marker: the first marker with a number.

  Args:
    marker: for example `####`. Only punctuation may be between the marker and
      the number.
    text: a model's text.
  """
  plain = _plain(text)
  for place in re.finditer(re.escape(marker), plain):
    if match := _ANSWER.match(plain, place.end()):
      return _canonical(match.group(1))
  return None


def last(text: str) -> str | None:
  """Returns the last number of a text, or None."""
  matches = _ANYWHERE.findall(_plain(text))
  return _canonical(matches[-1]) if matches else None


def _canonical(number: str) -> str:
  """Returns the canonical form of a match of the patterns."""
  start = re.search(r'[\d.]', number)
  assert start is not None
  sign, size = number[: start.start()], number[start.start() :]
  if '/' in size:
    size = _of_fraction(sum(map(Fraction, size.split())))
  size = re.sub(f'[,{_APART} ]', '', size)
  if size.count('.') > 1:
    size = size.replace('.', '')
  if 'e' in size.lower():
    size = format(decimal.Decimal(size), 'f')
  # Texts instead of arithmetic: a number may have any length.
  whole, _, decimals = size.partition('.')
  decimals = decimals.rstrip('0')
  digits = (whole.lstrip('0') or '0') + (decimals and f'.{decimals}')
  return f'-{digits}' if '-' in sign and digits != '0' else digits


def _of_fraction(value: Fraction | int) -> str:
  """Returns decimals if there are finitely many, or the reduced fraction."""
  top, bottom = value.as_integer_ratio()
  with decimal.localcontext(prec=80):
    quotient = decimal.Decimal(top) / bottom
  return format(quotient, 'f') if Fraction(quotient) == value else str(value)
