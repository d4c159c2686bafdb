"""Where data is: in the folder `DST_DATA_DIR`, or in the libraries' defaults.

The package imports this module first, because TensorFlow Datasets and SacreBLEU
read their environment variables only once. A variable of a library takes
precedence over `DST_DATA_DIR`.
"""

from collections.abc import Mapping, MutableMapping
import os

DATA_DIR_VARIABLE = 'DST_DATA_DIR'
# Variable -> path within the folder.
PLACES = {
  'TFDS_DATA_DIR': 'tensorflow_datasets',
  'SACREBLEU': 'sacrebleu',
  'DST_VOCABULARY': 'sentencepiece.model',
}


def shared_folder(environment: Mapping[str, str] = os.environ) -> str | None:
  """Returns the folder for all data; None if the variable is not set."""
  folder = environment.get(DATA_DIR_VARIABLE)
  if not folder or is_remote(folder):
    return folder or None
  return os.path.abspath(os.path.expanduser(folder))


def is_remote(folder: str) -> bool:
  """Returns whether a folder is in an object store.

  The same as `object_stores.is_remote`, which imports fsspec.
  """
  return '://' in folder


def set_variables(environment: MutableMapping[str, str]) -> None:
  """Sets the libraries' unset variables to places in the shared folder."""
  folder = shared_folder(environment)
  if folder is not None:
    for variable, place in PLACES.items():
      if variable == 'SACREBLEU' and is_remote(folder):
        continue  # SacreBLEU reads local files only.
      environment.setdefault(variable, os.path.join(folder, place))


set_variables(os.environ)
