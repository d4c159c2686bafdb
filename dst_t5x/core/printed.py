"""What a command prints, spelt for terminals that lack some of its characters.

Under a locale such as ISO-8859-1, Python ends a program that prints `ε` or `█`
to them. Messages, `--help` and tables shall be readable there, too.
"""

import codecs
import io
import sys
import unicodedata

_NAME = 'dst_t5x.printed'
_SPELT = {'█': '#', '░': '-', '−': '-', '–': '-', '—': '-', '→': '->'}
_SPELT |= {'·': '*', '×': 'x', '±': '+-', '≥': '>=', '≤': '<=', '’': "'"}
_GREEK = 'GREEK SMALL LETTER '


def everywhere() -> None:
  """Makes what is printed from now on pass through any encoding."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors=_NAME)


def is_command() -> bool:
  """Whether Python was started with `-m`, and has not found the module yet."""
  return sys.argv[:1] == ['-m']


def _spell(error: UnicodeError) -> tuple[str, int]:
  """Returns ASCII for what cannot be encoded; see `codecs.register_error`."""
  if not isinstance(error, UnicodeEncodeError):
    raise error
  unknown = error.object[error.start : error.end]
  return ''.join(map(_ascii, unknown)), error.end


def _ascii(char: str) -> str:
  name = unicodedata.name(char, '')
  if name.startswith(_GREEK):
    return name.removeprefix(_GREEK).lower()
  found = _SPELT.get(char, unicodedata.normalize('NFKC', char))
  return found.encode('ascii', 'backslashreplace').decode()


codecs.register_error(_NAME, _spell)
