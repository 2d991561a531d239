"""What commands that can draw have in common."""

from __future__ import annotations

import typer


def require_matplotlib() -> None:
    """Refuses ``--plot``, with what to do, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise typer.BadParameter(
            "drawing needs matplotlib: pip install 'dsv4-jax[plot]'.", param_hint="--plot"
        ) from None
