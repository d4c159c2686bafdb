"""The same training step in PyTorch: transformers, and Hugging Face PEFT."""

import os
import time
from typing import Any

import numpy as np
import peft
import torch
import transformers
import works

from dst_t5x.core import parts
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.models import families

_NAMES = {
  'encoder_input_tokens': 'input_ids',
  'decoder_input_tokens': 'decoder_input_ids',
}


class TorchStep:
  """An optimizer step, and how long each took.

  All parameters, or LoRA on the four linear maps of attention; float32,
  transformers' own choice of attention, AdaFactor as T5X runs it. Its threads
  wait for one another in every product: where other processes want the
  processors as well, it takes up to ten times as long, so look for idle ones.
  """

  def __init__(
    self, work: works.Work, seed: Any, rank: int | None = None
  ) -> None:
    """Makes the model with the parameters of `seed`; a rank means LoRA."""
    torch.set_num_threads(os.cpu_count() or 1)
    found, self._is_decoder_only = model(work, seed)
    if rank is not None:
      kind = 'CAUSAL_LM' if self._is_decoder_only else 'SEQ_2_SEQ_LM'
      found = peft.get_peft_model(
        found,
        peft.LoraConfig(
          task_type=kind, r=rank, target_modules=list(work.modules)
        ),
      )
    self._model = found.train()
    self._optimizer = transformers.Adafactor(
      [p for p in self._model.parameters() if p.requires_grad],
      lr=0.001,
      relative_step=False,
    )
    self.times: list[float] = []
    self.figures: dict[str, float] = {}

  def compile(self) -> None:
    """There is nothing to compile."""

  def __call__(self, *batches: trainer_lib.Batch) -> None:
    """Takes steps in a row."""
    self.times.append(sum(map(self._step, batches)) / len(batches))

  def _step(self, batch: trainer_lib.Batch) -> float:
    """Takes a step; returns the seconds, without those of copying."""
    tensors = {
      name: torch.from_numpy(np.array(array)).long()
      for name, array in batch.items()
    }
    names = dict(_NAMES)
    if self._is_decoder_only:
      names = {'decoder_input_tokens': 'input_ids'}
    inputs = {their: tensors[our] for our, their in names.items()}
    is_target = tensors['decoder_loss_weights'] > 0
    labels = tensors['decoder_target_tokens'].where(is_target, -100)
    start = time.perf_counter()
    logits = self._model(**inputs, use_cache=False).logits
    torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), labels.flatten()
    ).backward()
    self._optimizer.step()
    self._optimizer.zero_grad()
    return time.perf_counter() - start


def model(work: works.Work, seed: Any) -> tuple[Any, bool]:
  """Returns transformers' model, and whether it has no encoder."""
  family = families.of(seed)
  written, content = family.written(work.network, seed)
  config = transformers.AutoConfig.for_model(**content)
  made = getattr(transformers, written.architecture)(config)
  flat = parts.flatten(seed)
  state = {}
  for name, tensor in written.tensors.items():
    array = np.array(flat[tensor.path])
    state[name] = torch.from_numpy(array.T if tensor.transposed else array)
  made.load_state_dict(state, strict=False)
  return made, family.task_type == 'CAUSAL_LM'
