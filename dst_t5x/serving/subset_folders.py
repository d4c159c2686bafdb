"""The folder of subsets that a server works in.

The cache of the Hugging Face Hub is not the server's to write to, so subsets of
the Hub are copied from it to a temporary folder.
"""

from collections.abc import Iterator
import contextlib
import shutil
import tempfile

from dst_t5x.core import hub


@contextlib.contextmanager
def opened(path: str) -> Iterator[str]:
  """Yields a folder on this disk, with subsets in it.

  Args:
    path: the folder; or `hf://organisation/name[@revision][/file.dst]`, whose
      copy is deleted in the end, with all that the server has added to it.

  Raises:
    UserError: the Hub has no such subsets, or cannot be reached and the cache
      lacks them.
  """
  if not hub.is_path(path):
    yield path
    return
  names = hub.subsets(path)
  with tempfile.TemporaryDirectory(prefix='dst_t5x-') as folder:
    for name in names:
      shutil.copy(hub.local(name), folder)
    yield folder
