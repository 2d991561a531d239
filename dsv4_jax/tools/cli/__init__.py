"""The `dsv4-jax` command line."""
