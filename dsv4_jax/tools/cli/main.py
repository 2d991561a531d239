"""The `dsv4-jax` program: `decode`, `plan`, `bench`, `trace` and `doctor`."""

import sys

import typer

from dsv4_jax.tools.cli.doctor import doctor


def application(*, only_doctor: bool = False) -> typer.Typer:
    """Build the command line; `only_doctor` imports nothing that needs a working JAX or native module."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

    @app.callback()
    def about() -> None:
        """A compressed KV cache for DeepSeek-V4 in JAX."""

    if not only_doctor:
        from dsv4_jax.tools.cli.bench import bench
        from dsv4_jax.tools.cli.decode import decode
        from dsv4_jax.tools.cli.plan import plan
        from dsv4_jax.tools.cli.trace import trace

        app.command()(decode)
        app.command()(plan)
        app.command()(bench)
        app.command()(trace)
    app.command()(doctor)
    return app


def main() -> None:
    """Run the program named by the process's arguments."""
    application(only_doctor=sys.argv[1:2] == ["doctor"])()


if __name__ == "__main__":
    main()
