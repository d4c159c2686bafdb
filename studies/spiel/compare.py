"""Compares SpIEL-AG with its authors' code, step by step on a toy network.

    git clone https://github.com/AlanAnsell/peft /tmp/peft
    git -C /tmp/peft checkout 73b455b
    python studies/spiel/compare.py --peft=/tmp/peft

Needs torch, transformers and accelerate. The authors' `SftSelector` and
`SftAdamW` run from the checkout, unchanged but for two things:

- Their extension `linear_sd` is not compiled; its two functions are written
  here in terms of PyTorch.
- With `--momenta=ours`, the optimizer's state of components that enter starts
  at zero, as in `dst_t5x`. With `--momenta=theirs` it starts from the window's
  gradients; then the values differ, and soon the subsets.
"""

import argparse
import importlib
import pathlib
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from dst_t5x.method import api
from dst_t5x.method import spiel

_SIZES = {'hidden': (48, 24), 'output': (16, 48)}  # Rows are outputs.
_EPSILON = 0.1
_STEPS = 70
_ADAM = {'lr': 0.01, 'betas': (0.9, 0.999), 'eps': 1e-12}


def _forward(
  x: torch.Tensor,
  weight: torch.Tensor,
  values: torch.Tensor,
  indices: torch.Tensor,
  bias: torch.Tensor | None,
) -> torch.Tensor:
  """Stands in for `linear_sd.forward`."""
  del bias
  full = weight.flatten().index_add(0, indices.long(), values)
  return x @ full.view_as(weight).T


def _backward(
  gradient: torch.Tensor,
  x: torch.Tensor,
  weight: torch.Tensor,
  values: torch.Tensor,
  indices: torch.Tensor,
  *which: Any,
) -> list[torch.Tensor | None]:
  """Stands in for `linear_sd.backward`."""
  del which
  full = weight.flatten().index_add(0, indices.long(), values).view_as(weight)
  of_weight = gradient.T @ x
  return [
    gradient @ full,
    of_weight,
    of_weight.flatten()[indices.long()],
    *[None] * 2,
  ]


def _authors(checkout: pathlib.Path) -> Any:
  """Returns the modules `layer`, `optimizer`, `trainer` and `config`."""

  def module(name: str, **members: Any) -> types.ModuleType:
    new = types.ModuleType(name)
    vars(new).update(members)
    sys.modules[name] = new
    return new

  # Before its optional dependency `peft` is replaced.
  importlib.import_module('transformers.trainer_callback')
  module('linear_sd', forward=_forward, backward=_backward)
  # Only what the four modules use of the rest of the package.
  for name in ('peft', 'peft.tuners'):
    module(name, __path__=[])
  module('peft.import_utils', is_bnb_available=lambda: False)
  module('peft.tuners.tuners_utils', BaseTunerLayer=object)
  module('peft.config', PeftConfig=object)
  module('peft.utils', PeftType=types.SimpleNamespace(SFT='SFT'))
  folder = checkout / 'src/peft/tuners/sft'
  module('sft', __path__=[str(folder)])
  names = ('layer', 'optimizer', 'trainer', 'config')
  return types.SimpleNamespace(
    **{name: importlib.import_module(f'sft.{name}') for name in names}
  )


def _keep_ages(optimizer: Any, param: Any, changing: Any, **more: Any) -> None:
  """Stands in for `update_optimizer`: zero moments, and one step count."""
  del more
  for name in ('exp_avg', 'exp_avg_sq'):
    optimizer.state[param][name][changing] = 0


class _Theirs:
  """The authors' implementation on the toy network."""

  def __init__(
    self, code: Any, seed: dict[str, Any], k: dict[str, int]
  ) -> None:
    kind = code.layer.AddSparseDelta(torch.nn.Linear)
    self.model = torch.nn.Module()
    for name, (rows, columns) in _SIZES.items():
      linear = kind('default', columns, rows, k[name], bias=False)
      linear.weight = torch.nn.Parameter(
        torch.tensor(seed[name]), requires_grad=False
      )
      self.model.add_module(name, linear)
    self.deltas = {
      name: getattr(self.model, name).sft_delta['default'] for name in _SIZES
    }
    values = [delta.values for delta in self.deltas.values()]
    self.optimizer = code.optimizer.SftAdamW(
      values, momentum_dtype=torch.float32, **_ADAM
    )
    self.selector = code.trainer.SftSelector(
      self.model, self.optimizer, code.config.SftConfig(), _STEPS, 1
    )

  def step(self, x: np.ndarray, y: np.ndarray) -> None:
    """Makes a training step."""
    hidden = torch.tanh(self.model.hidden(torch.tensor(x)))
    loss = ((self.model.output(hidden) - torch.tensor(y)) ** 2).mean()
    self.optimizer.zero_grad()
    loss.backward()
    self.optimizer.step()
    self.selector.step()

  def masks(self) -> dict[str, np.ndarray]:
    """Returns the subset."""
    found = {name: np.zeros(size, bool) for name, size in _SIZES.items()}
    for name, delta in self.deltas.items():
      found[name].reshape(-1)[delta.indices.numpy()] = True
    return found

  def moved(self) -> dict[str, np.ndarray]:
    """Returns θ − θ⁰."""
    found = {n: np.zeros(size, np.float32) for n, size in _SIZES.items()}
    for name, delta in self.deltas.items():
      indices = delta.indices.numpy()
      found[name].reshape(-1)[indices] = delta.values.detach().numpy()
    return found


class _Ours:
  """`dst_t5x` on the toy network, from a given first subset."""

  def __init__(
    self, seed: dict[str, Any], method: spiel.Spiel, masks: Any
  ) -> None:
    self.method, self.seed = method, seed
    self.frame = method.frame(seed)
    self.optimizer = optax.adam(_ADAM['lr'], *_ADAM['betas'], eps=_ADAM['eps'])
    params = jax.tree.map(jnp.asarray, seed)
    first = method.init(params)
    entries = self.frame.of_masks(jax.tree.map(jnp.asarray, masks))
    state = method.listed(entries, params, first.extra)
    opt_state = self.optimizer.init(method.tuned(params, state))
    self.tuning = api.Tuning(params, opt_state, state)
    self._step = jax.jit(self._traced)

  def _traced(self, tuning: api.Tuning, x: Any, y: Any, step: Any) -> Any:
    def loss(params: Any) -> jax.Array:
      hidden = jnp.tanh(x @ params['hidden'].T)
      return jnp.mean((hidden @ params['output'].T - y) ** 2)

    gradients = jax.grad(loss)(tuning.params)
    chosen = self.method.choose(tuning, gradients, (), step)
    before = self.method.tuned(chosen.params, chosen.state)
    updates, opt_state = self.optimizer.update(
      self.method.tuned(gradients, chosen.state), chosen.opt_state, before
    )
    params = self.method.put(
      chosen.params, optax.apply_updates(before, updates), chosen.state
    )
    after = api.Tuning(params, opt_state, chosen.state)
    return self.method.settle(after, (), step)

  def step(self, x: np.ndarray, y: np.ndarray, number: int) -> None:
    """Makes a training step."""
    self.tuning = self._step(self.tuning, x, y, jnp.int32(number))

  def masks(self) -> dict[str, np.ndarray]:
    """Returns the subset."""
    masks = self.frame.masks(self.tuning.state.entries, self.seed)
    return jax.tree.map(np.asarray, masks)

  def moved(self) -> dict[str, np.ndarray]:
    """Returns θ − θ⁰."""
    return jax.tree.map(lambda a, b: a - b, self.tuning.params, self.seed)


def main() -> None:
  """Prints the differences after each replacement and over all steps."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--peft', type=pathlib.Path, required=True)
  parser.add_argument('--momenta', choices=['ours', 'theirs'], default='ours')
  arguments = parser.parse_args()
  code = _authors(arguments.peft)
  if arguments.momenta == 'ours':
    code.trainer.update_optimizer = _keep_ages
  torch.manual_seed(0)
  torch.set_num_threads(1)
  random = np.random.default_rng(0)
  seed, target = (
    {
      name: (random.standard_normal(size) / size[1] ** 0.5).astype(np.float32)
      for name, size in _SIZES.items()
    }
    for _ in range(2)
  )
  method = spiel.Spiel(epsilon=_EPSILON, silos='per_tensor', steps=_STEPS)
  frame = method.frame(seed)
  k = dict(zip(sorted(_SIZES), frame.rooms, strict=True))
  theirs = _Theirs(code, seed, k)
  ours = _Ours(seed, method, theirs.masks())
  before, differ, farthest = theirs.masks(), 0, 0.0
  for step in range(_STEPS):
    x = random.standard_normal((32, _SIZES['hidden'][1])).astype(np.float32)
    y = np.tanh(x @ target['hidden'].T) @ target['output'].T
    theirs.step(x, y)
    ours.step(x, y, step)
    masks = theirs.masks()
    differ_now = _count(masks, ours.masks())
    a, b = theirs.moved(), ours.moved()
    distance = max(float(np.abs(a[n] - b[n]).max()) for n in _SIZES)
    differ, farthest = differ + (differ_now > 0), max(farthest, distance)
    replaced = _count(masks, before) // 2
    before = masks
    if replaced:
      print(
        f'step {step + 1:>3}: {replaced:>4} of {sum(k.values())} replaced; '
        f'{differ_now // 2} differ; values within {distance:.1e}'
      )
  print(
    f'{_STEPS} steps: subsets differ after {differ} of them; '
    f'values within {farthest:.1e}'
  )


def _count(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> int:
  return sum(int(np.sum(a[name] != b[name])) for name in a)


if __name__ == '__main__':
  main()
