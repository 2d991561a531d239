"""``python -m dsv4_jax`` is the ``dsv4-jax`` program."""

from dsv4_jax.tools.cli.main import main

if __name__ == "__main__":
    main()
