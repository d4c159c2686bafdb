"""Converts checkpoints between T5X's format and Hugging Face's.

    python -m dst_t5x.convert MODEL.gguf TARGET --format=hf
    python -m dst_t5x.convert SOURCE TARGET --format=hf
    python -m dst_t5x.convert SOURCE TARGET --format=t5x
    python -m dst_t5x.convert SOURCE TARGET --format=hf --dtype=bfloat16
    python -m dst_t5x.convert MODEL_DIR TARGET --format=peft
    python -m dst_t5x.convert FILE.dst TARGET --format=peft

SOURCE is whatever `seeds.load_seed` knows: a T5X checkpoint, a Hugging Face
folder, an adapter of Hugging Face PEFT, a GGUF file, or a run of this package.
Values are the same bit for bit, in float32 (to which those of a GGUF file are
dequantised), or in bfloat16 if SOURCE is a Hugging Face folder in bfloat16.
Only --dtype=bfloat16 rounds them, to the nearest, and makes another seed. An
adapter is merged into the weights. A Hugging Face folder gets the tokenizer of
SOURCE, too. The last commands write an adapter alone: that of a run that
trained one, or a subset of linear maps as SHiRA, see `shira_files`.
"""

import dataclasses
import sys
from typing import Any

from etils import epath
import ml_dtypes
import numpy as np

from dst_t5x.adapters import api as adapters
from dst_t5x.checkpoints import finite
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import peft_files
from dst_t5x.checkpoints import run_folder
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import shira_files
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core import command_line
from dst_t5x.core import errors
from dst_t5x.core import parts
from dst_t5x.models import families
from dst_t5x.subsets import extraction


def convert(
  source: epath.PathLike,
  target: epath.PathLike,
  kind: str,
  as_bfloat16: bool = False,
) -> str:
  """Writes a checkpoint anew in another format.

  Args:
    source: what `seeds.load_seed` reads.
    target: the new folder; for T5X, one that holds `checkpoint_<step>`, or that
      one itself.
    kind: 'hf', 't5x' or 'peft'.
    as_bfloat16: whether to round all values to bfloat16; not for 'peft'.

  Returns:
    One line that says what was done.

  Raises:
    UserError: the source cannot be read, is of no family that the format has,
      has no adapter to take out or one that PEFT has not, or the target exists.
  """
  if kind == 'peft':
    if as_bfloat16:
      raise errors.UserError('--dtype rounds whole models: use hf or t5x')
    return _write_adapter(epath.Path(source), target)
  seed = seeds.load_seed(source).merged()
  if as_bfloat16:
    seed = rounded(seed)
  written = write(target, seed, kind)
  return (
    f'{seed.path} ({seed.described}) -> {written} ({kind}),'
    f' fingerprint {seed.fingerprint}'
  )


def rounded(seed: seeds.Seed) -> seeds.Seed:
  """Returns a seed with all values rounded to bfloat16, half to even.

  Raises:
    UserError: a value becomes infinite.
  """

  def round_tensor(array: Any) -> np.ndarray:
    return np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float32)

  flat = parts.flatten(seed.params)
  params = parts.unflatten({k: round_tensor(x) for k, x in flat.items()})
  finite.check(params, f'{seed.path}, in bfloat16,')
  note = ', '.join(filter(None, [seed.note, 'rounded to bfloat16']))
  return dataclasses.replace(seed, params=params, is_bfloat16=True, note=note)


def write(target: epath.PathLike, model: seeds.Seed, kind: str) -> epath.Path:
  """Writes a whole model; returns the folder that holds it.

  Args:
    target: see `convert`.
    model: without adapter. Hugging Face's format does not keep its step, T5X's
      not its companions.
    kind: 'hf' or 't5x'.

  Raises:
    UserError: the model is of no known family, or the target exists.
  """
  if kind == 'hf':
    network = model.network or families.network_of(model.params)
    hf_checkpoint.save(
      target,
      model.params,
      network,
      companions=model.companions(),
      as_bfloat16=model.is_bfloat16,
    )
    return epath.Path(target)
  return t5x_checkpoint.save(target, model.params, model.step)


def _write_adapter(source: epath.Path, target: epath.PathLike) -> str:
  """Writes the adapter of a run, or a subset, in PEFT's format."""
  if source.suffix == '.dst':
    subset, seed, step = seeds.subset_and_seed(source)
    found = write_shira(target, subset, seed, step)
    return f'{source} (dst, step {step}) -> {target} (peft: {found})'
  run = seeds.load_seed(source)
  is_known = peft_files.is_known(run.adapter)
  reference = None
  if run.format == 'run' and (is_known or not run.adapter.added):
    reference = run_folder.read_run_file(source)['seed']
  if reference is None:
    raise errors.UserError(
      f'{source} is no run that trained an adapter (LoRA, (IA)³, a prompt, …)'
      ' or a subset, and no subset file: take --format=hf or t5x'
    )
  done = f'{source} (run, step {run.step}) -> {target}'
  if is_known:
    added, base = parts.split(run.params, [run.adapter.added])
    flat, seed_flat = parts.flatten(added), parts.flatten(base)
    modules = adapters.modules_of(flat, run.adapter.added)
    flat |= run.adapter.fixed_tensors(modules, seed_flat)
    peft_files.save(target, run.adapter, flat, base, reference, run.step)
    return f'{done} (peft)'
  seed = seeds.seed_of(reference, f'the run in {source}', None)
  subset = extraction.extract(run.params, seed.params, seed.fingerprint)
  found = write_shira(target, subset, seed, run.step)
  return f'{done} (peft: {found})'


def write_shira(
  target: epath.PathLike,
  subset: extraction.Subset,
  seed: seeds.Seed,
  step: int,
) -> shira_files.Summary:
  """Writes a subset of a seed in PEFT's format; see `shira_files.save`."""
  return shira_files.save(target, subset, seed.params, seed.reference, step)


def main(arguments: list[str]) -> int:
  """The command line."""
  parser = command_line.Parser(
    prog='python -m dst_t5x.convert', description=__doc__.splitlines()[0]
  )
  parser.add_argument(
    'source',
    help='T5X or Hugging Face folder, a GGUF or subset file, or a run',
  )
  parser.add_argument('target', help='new folder')
  parser.add_argument('--format', choices=('hf', 't5x', 'peft'), required=True)
  parser.add_argument(
    '--dtype',
    choices=('bfloat16',),
    help='round all values, for SEED_DTYPE; the result is another seed',
  )
  parsed = parser.parse_args(arguments)
  try:
    as_bfloat16 = parsed.dtype is not None
    print(convert(parsed.source, parsed.target, parsed.format, as_bfloat16))
  except errors.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0
