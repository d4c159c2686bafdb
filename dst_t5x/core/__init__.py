"""Shared helpers: errors, tensor paths, atomic files, object stores."""
