"""Dynamic Subset Tuning as pure functions on pytrees.

Depends on JAX and NumPy only, so that any JAX training loop can use it:

    from dst_t5x.method import SubsetProjection
"""

from dst_t5x.method.api import Projection
from dst_t5x.method.projection import NoProjection
from dst_t5x.method.projection import SubsetProjection

__all__ = ['NoProjection', 'Projection', 'SubsetProjection']
