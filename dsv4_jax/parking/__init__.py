"""Requests outside of the cache: in host memory, and in files."""
