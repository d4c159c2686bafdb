"""LoRA in PyTorch: transformers' T5 with Hugging Face PEFT, on CPUs."""

import os
import time
from typing import Any

import numpy as np
import peft
import torch
import transformers

from dst_t5x.core import parts
from dst_t5x.engine import trainer as trainer_lib
from dst_t5x.models.t5 import hf_names
from dst_t5x.models.t5 import network


class PeftLora:
  """An optimizer step, and how long each took.

  LoRA on all four attention matrices, float32, AdaFactor as T5X runs it. Its
  threads wait for one another in every product: where other processes want the
  processors as well, it takes up to ten times as long, so look for idle ones.
  """

  def __init__(self, config: network.T5Config, seed: Any, rank: int) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.T5ForConditionalGeneration(
      transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.emb_dim,
        d_kv=config.head_dim,
        d_ff=config.mlp_dim,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        dropout_rate=config.dropout_rate,
        feed_forward_proj='gated-gelu',
        tie_word_embeddings=False,
      )
    )
    model.load_state_dict(_state(config, parts.flatten(seed)), strict=False)
    settings = peft.LoraConfig(
      task_type='SEQ_2_SEQ_LM', r=rank, target_modules=['q', 'k', 'v', 'o']
    )
    self._model = peft.get_peft_model(model, settings).train()
    self._optimizer = transformers.Adafactor(
      [p for p in self._model.parameters() if p.requires_grad],
      lr=0.001,
      relative_step=False,
    )
    self.times: list[float] = []
    self.figures: dict[str, float] = {}

  def __call__(self, batch: trainer_lib.Batch) -> None:
    """Takes a step."""
    inputs, decoder_inputs, labels = (
      torch.from_numpy(np.array(batch[name])).long()
      for name in (
        'encoder_input_tokens',
        'decoder_input_tokens',
        'decoder_target_tokens',
      )
    )
    start = time.perf_counter()
    self._model(
      input_ids=inputs, decoder_input_ids=decoder_inputs, labels=labels
    ).loss.backward()
    self._optimizer.step()
    self._optimizer.zero_grad()
    self.times.append(time.perf_counter() - start)


def _state(
  config: network.T5Config, seed: dict[str, Any]
) -> dict[str, torch.Tensor]:
  """Returns their name -> tensor of a model's parameters."""
  state = {}
  for name, tensor in hf_names.layout(config, num_buckets=32).items():
    array = np.array(seed[tensor.path])
    state[name] = torch.from_numpy(array.T if tensor.transposed else array)
  return state
