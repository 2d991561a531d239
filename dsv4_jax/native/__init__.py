"""The native module: whether it fits, its registration, its calls."""
