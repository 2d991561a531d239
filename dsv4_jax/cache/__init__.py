"""The device half: pools, steps, layers, views."""
