"""Output for terminals whose encoding lacks some characters.

Under a locale such as ISO-8859-1, Python raises an error when a program prints
`ε` or `█`. Here such characters are replaced by ASCII.
"""

import codecs
import io
import sys
import unicodedata

_NAME = 'dst_t5x.output_encoding'
_SPELT = {'█': '#', '░': '-', '−': '-', '–': '-', '—': '-', '→': '->'}
_SPELT |= {'·': '*', '×': 'x', '±': '+-', '≥': '>=', '≤': '<=', '’': "'"}
_GREEK = 'GREEK SMALL LETTER '


def replace_unencodable() -> None:
  """Replaces characters that the streams cannot encode from now on."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors=_NAME)


def is_command() -> bool:
  """Returns whether Python was started with `-m` and still finds the module."""
  return sys.argv[:1] == ['-m']


def _spell(error: UnicodeError) -> tuple[str, int]:
  """Returns ASCII for unknown characters; see `codecs.register_error`."""
  if not isinstance(error, UnicodeEncodeError):
    raise error
  unknown = error.object[error.start : error.end]
  return ''.join(map(_ascii, unknown)), error.end


def _ascii(char: str) -> str:
  name = unicodedata.name(char, '')
  if name.startswith(_GREEK):
    return name.removeprefix(_GREEK).lower()
  spelt = _SPELT.get(char, unicodedata.normalize('NFKC', char))
  return spelt.encode('ascii', 'backslashreplace').decode()


codecs.register_error(_NAME, _spell)
