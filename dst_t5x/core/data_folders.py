"""Where data lies: all in the folder `DST_DATA_DIR`, or where libraries look.

The package imports this before anything else: TensorFlow Datasets and SacreBLEU
look their own variables up only once. Such a variable goes before the folder.
"""

from collections.abc import Mapping, MutableMapping
import os

DATA_DIR_VARIABLE = 'DST_DATA_DIR'
# Variable -> the place within the folder.
PLACES = {
  'TFDS_DATA_DIR': 'tensorflow_datasets',
  'SACREBLEU': 'sacrebleu',
  'DST_VOCABULARY': 'sentencepiece.model',
}


def shared_folder(environment: Mapping[str, str] = os.environ) -> str | None:
  """Returns the folder for all data, None if there is none."""
  folder = environment.get(DATA_DIR_VARIABLE)
  if not folder or is_remote(folder):
    return folder or None
  return os.path.abspath(os.path.expanduser(folder))


def is_remote(folder: str) -> bool:
  """Whether a folder is in an object store, which SacreBLEU cannot use."""
  return '://' in folder


def set_variables(environment: MutableMapping[str, str]) -> None:
  """Sets the variables of libraries that are not set, if there is a folder."""
  folder = shared_folder(environment)
  if folder is not None:
    for variable, place in PLACES.items():
      if variable == 'SACREBLEU' and is_remote(folder):
        continue
      environment.setdefault(variable, os.path.join(folder, place))


set_variables(os.environ)
