"""The method as pure functions on pytrees; needs JAX and NumPy alone."""
