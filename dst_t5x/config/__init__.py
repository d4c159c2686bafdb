"""Gin configuration: files, names, checks, and command lines."""
