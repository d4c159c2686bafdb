"""The method as pure functions on pytrees; needs JAX and NumPy alone.

from dst_t5x.method import SubsetProjection
"""

from dst_t5x.method.api import Projection
from dst_t5x.method.projection import NoProjection
from dst_t5x.method.projection import SubsetProjection

__all__ = ['NoProjection', 'Projection', 'SubsetProjection']
