"""Changing a task in PyTorch: a subset in place, beside PEFT's adapters.

  python benchmarks/torch_swap.py --json torch_swap.json

The model has the sizes of SmolLM2-135M and random weights. In turn, in every
repetition: subsets are applied and reverted; PEFT changes the active LoRA
adapter, which costs time in every forward pass later; and PEFT merges an
adapter into the weights and takes it out again. `wrong` counts components that
are not the base's afterwards.
"""

import argparse
from collections.abc import Callable
import statistics
import time
from typing import Any

import numpy as np
import peft
import tables
import torch
import transformers

from dst_t5x.subsets import definition
from dst_t5x.subsets import torch as dst
from dst_t5x.subsets.torch import base_hash
from dst_t5x.subsets.torch import tensors as tensors_lib

_SIZES = {
  'hidden_size': 576,
  'intermediate_size': 1536,
  'num_attention_heads': 9,
  'num_hidden_layers': 30,
  'num_key_value_heads': 3,
  'tie_word_embeddings': True,
  'vocab_size': 49_152,
}
_TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj',
            'down_proj']  # fmt: skip
_COLUMNS = ('dtype', 'what', 'milliseconds', 'bytes', 'wrong')


def main() -> None:
  """Prints a table, and writes rows."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'])
  parser.add_argument('--epsilon', type=float, nargs='+', default=[1e-4, 1e-3])
  parser.add_argument('--rank', type=int, default=8)
  parser.add_argument('--repeats', type=int, default=21)
  parser.add_argument('--device', default='cpu')
  # With more, they wait for one another where others want the processors.
  parser.add_argument('--threads', type=int, default=1)
  parser.add_argument('--json')
  options = parser.parse_args()
  torch.set_num_threads(options.threads)
  rows: list[tables.Row] = []
  for dtype in options.dtypes:
    rows += _rows(options, getattr(torch, dtype))
    tables.write_json(options.json, rows)
  tables.show(rows, _COLUMNS)


def _model(options: argparse.Namespace, dtype: torch.dtype) -> Any:
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**_SIZES)
  model = transformers.LlamaForCausalLM(config).to(dtype)
  return model.to(options.device).eval()


def _subset(model: Any, epsilon: float, seed: int) -> dst.Subset:
  """Returns a random subset of a model, as it would be loaded."""
  random = np.random.default_rng(seed)
  found = tensors_lib.of_module(model)
  types = {
    path: definition.TensorType(tensor.our_shape, np.float32)
    for path, tensor in found.items()
  }
  positions, values = {}, {}
  for path, kind in types.items():
    if count := round(epsilon * kind.size):
      where = np.unique(random.integers(kind.size, size=count))
      positions[path] = where
      values[path] = random.standard_normal(len(where)).astype(np.float32)
  return dst.Subset(types, positions, values, base_hash.of_tensors(found))


def _lora(options: argparse.Namespace, dtype: torch.dtype) -> Any:
  """Returns PEFT's model with two random adapters, first and second."""
  config = peft.LoraConfig(
    r=options.rank, target_modules=_TARGETS, init_lora_weights=False
  )
  model = peft.get_peft_model(
    _model(options, dtype), config, adapter_name='first'
  )
  model.add_adapter('second', config)
  return model


def _rows(options: argparse.Namespace, dtype: torch.dtype) -> list[tables.Row]:
  model, lora = _model(options, dtype), _lora(options, dtype)
  before = {n: t.clone() for n, t in model.state_dict().items()}
  works: dict[str, Callable[[], Any]] = {}
  first: list[float] = []
  sizes: dict[str, int] = {}
  for epsilon in options.epsilon:
    subset = _subset(model, epsilon, 1)
    start = time.perf_counter()
    placed = dst.place(model, subset)
    first.append(time.perf_counter() - start)
    works[f'subset {epsilon:g}: apply'] = lambda p=placed: dst.apply(model, p)
    works[f'subset {epsilon:g}: revert'] = lambda: dst.revert(model)
    works[f'subset {epsilon:g}: place'] = lambda s=subset: dst.place(model, s)
    sizes[f'subset {epsilon:g}: place'] = placed.nbytes
  names = iter(['second', 'first'] * (options.repeats + 1))
  works['LoRA: set_adapter'] = lambda: lora.set_adapter(next(names))
  works['LoRA: merge_adapter'] = lambda: lora.merge_adapter()
  works['LoRA: unmerge_adapter'] = lambda: lora.unmerge_adapter()
  sizes['LoRA: set_adapter'] = sum(
    p.nbytes for n, p in lora.named_parameters() if '.first.' in n
  )
  base = {n: p.clone() for n, p in _bases(lora).items()}
  times: dict[str, list[float]] = {what: [] for what in works}
  for _ in range(options.repeats + 1):
    for what, work in works.items():
      times[what].append(_seconds(options, work))
  wrong = {
    f'subset {options.epsilon[0]:g}: revert': _wrong(
      before, model.state_dict()
    ),
    'LoRA: unmerge_adapter': _wrong(base, _bases(lora)),
  }
  rows = [
    {
      'dtype': str(dtype).removeprefix('torch.'),
      'what': what,
      'milliseconds': 1000 * statistics.median(series[1:]),
      'bytes': sizes.get(what, ''),
      'wrong': wrong.get(what, ''),
    }
    for what, series in times.items()
  ]
  hashing = {'dtype': rows[0]['dtype'], 'what': 'first place, with the hash'}
  return [*rows, hashing | {'milliseconds': 1000 * first[0]}]


def _bases(lora: Any) -> dict[str, torch.Tensor]:
  return {n: p for n, p in lora.named_parameters() if 'lora_' not in n}


def _wrong(
  before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> int:
  """Returns how many components are not what they were."""
  return sum(int((t != after[name]).sum()) for name, t in before.items())


def _seconds(options: argparse.Namespace, work: Callable[[], Any]) -> float:
  start = time.perf_counter()
  work()
  if options.device != 'cpu':
    torch.cuda.synchronize()
  return time.perf_counter() - start


if __name__ == '__main__':
  main()
