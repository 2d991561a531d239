"""The `dsv4-jax` program: `decode`, `capacity`, `bench`, `trace` and `doctor`."""

import sys
from typing import Annotated

import typer

from dsv4_jax.native.compatibility import NativeModuleError
from dsv4_jax.tools.cli.doctor import doctor
from dsv4_jax.version import installed_version

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a program that the signal ended."""


def application(*, only_doctor: bool = False) -> typer.Typer:
    """Build the command line; `only_doctor` imports nothing that needs a working JAX or native module."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

    @app.callback()
    def about(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
        ] = False,
    ) -> None:
        """A compressed KV cache for DeepSeek-V4 in JAX."""

    if not only_doctor:
        from dsv4_jax.tools.cli.bench import bench
        from dsv4_jax.tools.cli.capacity import capacity
        from dsv4_jax.tools.cli.decode import decode
        from dsv4_jax.tools.cli.trace import trace

        app.command()(decode)
        app.command()(capacity)
        app.command("plan", hidden=True)(capacity)  # what it was called first
        app.command()(bench)
        app.command()(trace)
    app.command()(doctor)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dsv4-jax {installed_version() or '(not installed)'}")
        raise typer.Exit


def main() -> None:
    """Run the program named by the process's arguments.

    What the machine refuses (no native module, a backend that does not start, memory that does not suffice) is one
    line, and so is Ctrl-C.
    """
    try:
        application(only_doctor=sys.argv[1:2] == ["doctor"])()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except NativeModuleError as error:
        _fail(str(error))
    except MemoryError:
        _fail("There is not enough memory for this; ask for less.")
    except RuntimeError as error:
        text = str(error).strip()
        if "RESOURCE_EXHAUSTED" in text:
            _fail(f"The device has not enough memory for this; ask for less. ({text.splitlines()[0]})")
        if "Unable to initialize backend" in text or "no platforms" in text.lower():
            _fail(f"JAX does not start ({text.splitlines()[0]}). `dsv4-jax doctor` tells more.")
        raise


def _fail(message: str) -> None:
    print(f"dsv4-jax: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
