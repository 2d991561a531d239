"""Where commands write: tables that cut no number, and files that are known to be writable before any work."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table


def print_table(console: Console, table: Table) -> None:
    """Prints a table as wide as its numbers need, also where the console is narrower."""
    for column in table.columns:
        column.no_wrap = True
    unlimited = console.options.update(max_width=10_000)
    needed = console.measure(table, options=unlimited).maximum
    if needed > console.width:
        console = Console(file=console.file, width=needed, no_color=console.no_color)
    console.print(table)


def writable_file(path: Path, option: str) -> Path:
    """A path that can be written; makes its folders, and leaves no file.

    Raises:
      typer.BadParameter: it is a folder, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot write {path}: {_reason(error)}.", param_hint=option) from None
    return path


def writable_folder(path: Path, option: str) -> Path:
    """A folder that files can be written into; it is made if there is none.

    Raises:
      typer.BadParameter: it is a file, or cannot be made or written into.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".dsv4-jax"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot write into {path}: {_reason(error)}.", param_hint=option) from None
    return path


def writable_picture(path: Path, name: str, option: str = "--plot") -> Path:
    """Where a picture goes: the path itself, or in a folder a PNG of that name.

    Raises:
      typer.BadParameter: matplotlib is not installed, it cannot draw such a file, or the path cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    if path.is_dir():
        path = path / f"{name}.png"
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise typer.BadParameter(
            f"cannot draw {path}: its name must end in one of {', '.join(f'.{kind}' for kind in kinds)}, "
            "or be a folder that exists.",
            param_hint=option,
        )
    return writable_file(path, option)


def require_matplotlib() -> None:
    """Refuses ``--plot``, with what to do, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise typer.BadParameter(
            "drawing needs matplotlib: pip install 'dsv4-jax[plot]'.", param_hint="--plot"
        ) from None


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")
