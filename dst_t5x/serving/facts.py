"""The facts about a subset that the server shows."""

from typing import Any, NamedTuple


class Facts(NamedTuple):
  """Facts about a subset; the server keeps them when it drops the subset.

  Attributes:
    digest: the SHA-256 of its file, the subset's identity.
    size: the number of its entries.
    file_bytes: the file's size in bytes.
    about: the file's metadata that are shown.
  """

  digest: str
  size: int
  file_bytes: int
  about: dict[str, Any]
