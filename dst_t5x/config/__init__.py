"""Gin: files, names, checks, and the command lines of the commands."""
