"""Attention over rows as they are stored."""
