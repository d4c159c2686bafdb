"""Dynamic Subset Tuning as pure functions on pytrees.

Depends on JAX and NumPy only, so that any JAX training loop can use it:

    from dst_t5x.method import SubsetProjection

It works in any JAX loop, here with Optax's AdaFactor on a toy problem:

>>> import jax, optax
>>> import jax.numpy as jnp
>>> from dst_t5x.method import SubsetProjection
>>> seed = {'mlp': {'kernel': jnp.arange(1.0, 201.0).reshape(10, 20)}}
>>> optimizer, projection = optax.adafactor(0.1), SubsetProjection(epsilon=0.02)
>>> @jax.jit
... def step(params, optimizer_state, state):
...   gradients = jax.grad(lambda p: jnp.sum(p['mlp']['kernel'] ** 2))(params)
...   updates, optimizer_state = optimizer.update(
...       gradients, optimizer_state, params)
...   params = optax.apply_updates(params, updates)
...   params, state = projection.apply(params, seed, state)
...   return params, optimizer_state, state
>>> carry = seed, optimizer.init(seed), projection.init(seed)
>>> for _ in range(3):
...   carry = step(*carry)
>>> int(jnp.sum(carry[0]['mlp']['kernel'] != seed['mlp']['kernel']))
4
"""

from dst_t5x.method.api import Projection
from dst_t5x.method.projection import NoProjection
from dst_t5x.method.projection import SubsetProjection

__all__ = ['NoProjection', 'Projection', 'SubsetProjection']
