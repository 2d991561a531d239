"""`dsv4-jax bench` and `dsv4-jax trace`: what every op takes, and how far that is from a device copy."""
