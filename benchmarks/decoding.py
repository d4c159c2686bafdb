"""How many tokens a second are decoded, beside `transformers.generate`.

  python benchmarks/decoding.py --json decoding.json

SmolLM2-135M with random parameters, prompts of random tokens, greedy, float32,
on a CPU. The two take turns, so that both see the same machine; the numbers are
of the medians. The prompt is read in the time that is measured.
"""

import argparse
from collections.abc import Callable
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import tables
import torch
import torch_step
import works

from dst_t5x.models import decoding

# Number of tokens -> int32 `[batch, tokens]`.
Decode = Callable[[int], np.ndarray]


def random_prompts(batch: int, length: int) -> np.ndarray:
  """Returns prompts of random tokens, int32 `[batch, length]`."""
  random = np.random.default_rng(0)
  return random.integers(2, 32000, (batch, length)).astype(np.int32)


def ours(work: works.Work, params: works.PyTree, prompts: np.ndarray) -> Decode:
  """Returns what decodes the prompts."""
  decode = jax.jit(decoding.GreedyDecoder(), static_argnums=(0, 3, 4))
  on_device = jnp.asarray(prompts)

  def call(tokens: int) -> np.ndarray:
    # No token has this id, so that none ends early.
    end = work.network.vocab_size
    found, _ = decode(work.network, params, on_device, tokens, end)
    return np.asarray(found)

  return call


def theirs(
  work: works.Work, params: works.PyTree, prompts: np.ndarray
) -> Decode:
  """Returns the same, by transformers."""
  torch.set_num_threads(os.cpu_count() or 1)
  model = torch_step.model(work, params)[0].eval()
  given = torch.from_numpy(prompts).long()

  def call(tokens: int) -> np.ndarray:
    with torch.inference_mode():
      found = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=work.network.pad_id,
      )
    return found[:, given.shape[1] :].numpy()

  return call


ENGINES = {'ours': ours, 'transformers': theirs}


def main() -> None:
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--json', metavar='FILE', help='write the rows here')
  parser.add_argument('--batch', nargs='+', type=int, default=[1, 8])
  parser.add_argument('--prompt', type=int, default=128, help='tokens')
  parser.add_argument('--tokens', type=int, default=64, help='of the answer')
  parser.add_argument('--repeats', type=int, default=9)
  options = parser.parse_args()
  work = works.make('smollm2_135m')
  params = works.params(work.network)
  rows = []
  for batch in options.batch:
    prompts = random_prompts(batch, options.prompt)
    rows += _compare(work, params, prompts, options)
  tables.write_json(options.json, rows)
  tables.show(rows, list(rows[0]))


def _compare(
  work: works.Work,
  params: works.PyTree,
  prompts: np.ndarray,
  options: argparse.Namespace,
) -> list[tables.Row]:
  """Returns a row for each engine."""
  engines = {name: of(work, params, prompts) for name, of in ENGINES.items()}
  first = {name: decode(options.tokens) for name, decode in engines.items()}
  agree = np.mean(first['ours'] == first['transformers'])
  times: dict[str, list[float]] = {name: [] for name in engines}
  for _ in range(options.repeats):
    for name, decode in engines.items():
      taken, _ = tables.seconds(functools.partial(decode, options.tokens))
      times[name].append(taken)
  return [
    {
      'engine': name,
      'batch': len(prompts),
      'prompt': options.prompt,
      'tokens': options.tokens,
      'seconds': seconds,
      'tokens_per_second': len(prompts) * options.tokens / seconds,
      'same_tokens': float(agree),
    }
    for name, seconds in tables.medians(times).items()
  ]


if __name__ == '__main__':
  main()
