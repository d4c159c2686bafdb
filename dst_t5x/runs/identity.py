"""What makes a run this run, and the MODEL_DIR that belongs to it.

A run is its configuration, its seed and, as far as they can be told, the rows
that it is trained on. `run.json` says so, and so does each checkpoint: neither
a lost nor a foreign `run.json` lets a run go on from another one's parameters.
"""

from collections.abc import Callable, Mapping
import os
import re
from typing import Any

from etils import epath

from dst_t5x.checkpoints import run_folder
from dst_t5x.config import binaries
from dst_t5x.core.errors import UserError

# Bindings that may differ between two calls for the same run: they change
# nothing of what is computed in a step.
_MAY_CHANGE = re.compile(
  r'\.train\.(model_dir|initial_checkpoint_path|only_check)$'
  r'|\.Plan\.|\.evaluation\.|\.Evaluation\.|\.decoding\.|\.Partitioner\.'
)
_CHOOSE = 'go on with that, or choose another MODEL_DIR'


def of(binary: Callable[..., Any]) -> dict[str, str]:
  """Returns the bindings that make the run, as gin is configured now.

  Args:
    binary: what gin configured.
  """
  return {
    name: value
    for name, value in binaries.bindings(binary).items()
    if not _MAY_CHANGE.search(name)
  }


def records(model_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns what a folder says its run is: `run.json`, the last checkpoint.

  Args:
    model_dir: MODEL_DIR.

  Returns:
    As many of these as there are; none for a folder without a run. They have
    at least `config` and `seed`.

  Raises:
    UserError: a file is damaged, or there are checkpoints that nothing tells
      the run of.
  """
  path = epath.Path(model_dir)
  found = []
  if run_folder.is_run(path):
    found.append(run_folder.read_run_file(path))
  about = run_folder.last_about(path)
  if about is not None and 'run' in about:
    found.append(about['run'])
  if about is not None and not found:
    raise UserError(
      f'MODEL_DIR {path} has checkpoints, but no run.json, and nothing says '
      'which run they are of: put the file back, or choose another MODEL_DIR'
    )
  return found


def check(
  model_dir: str | os.PathLike[str], bindings: Mapping[str, str]
) -> None:
  """Checks that the folder is empty or that of a run.

  Args:
    model_dir: MODEL_DIR.
    bindings: `of` the run.

  Raises:
    UserError: the folder's run had another configuration.
  """
  for record in records(model_dir):
    before = record['config']
    for name in sorted(before.keys() | bindings.keys()):
      old, new = before.get(name), bindings.get(name)
      if old != new:
        raise UserError(
          f'the run in MODEL_DIR {epath.Path(model_dir)} has {name} = {old}, '
          f'not {new}: {_CHOOSE}'
        )


def check_seed(
  model_dir: str | os.PathLike[str], reference: Mapping[str, Any] | None
) -> None:
  """Checks that the folder is empty or that of a run from this seed.

  Args:
    model_dir: MODEL_DIR.
    reference: the seed's, with its `fingerprint`; None from scratch.

  Raises:
    UserError: the folder's run started from another seed.
  """
  for record in records(model_dir):
    before = record['seed']
    if (before or {}).get('fingerprint') != (reference or {}).get(
      'fingerprint'
    ):
      raise UserError(
        f'the run in MODEL_DIR {epath.Path(model_dir)} started from another '
        f'seed, {before["path"] if before else "random parameters"}: {_CHOOSE}'
      )


def check_rows(
  model_dir: str | os.PathLike[str], rows: Mapping[str, Any]
) -> None:
  """Checks that the folder is empty or that of a run on these rows.

  Args:
    model_dir: MODEL_DIR.
    rows: `task_checks.rows_of` what is trained on.

  Raises:
    UserError: the folder's run was trained on other rows.
  """
  for record in records(model_dir):
    before = record.get('rows', rows)
    for task in sorted(before.keys() | rows.keys()):
      old, new = before.get(task), rows.get(task)
      if old != new:
        raise UserError(
          f'the run in MODEL_DIR {epath.Path(model_dir)} was trained on other '
          f'rows of task {task!r}: {_told(old)}, not {_told(new)}; put the old '
          'data back, or choose another MODEL_DIR'
        )


def _told(rows: Mapping[str, Any] | None) -> str:
  """Returns `file TRAIN_FILE, rows 600, sha256 0123456789ab…`."""
  texts = {name: str(value) for name, value in (rows or {}).items()}
  return ', '.join(
    f'{name} {text if len(text) < 24 else f"{text[:12]}…"}'
    for name, text in texts.items()
  )
