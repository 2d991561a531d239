"""The directive ``commands``: what `dsv4-jax --help` says of each command, from the program itself."""

from __future__ import annotations

import os

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.testing import CliRunner

from dsv4_jax.tools.cli.main import application

WIDTH = "92"


def help_of(name: str) -> str:
    """What `dsv4-jax NAME --help` prints, without boxes and colours."""
    app = application()
    app.rich_markup_mode = None
    with_width = os.environ | {"COLUMNS": WIDTH, "TERMINAL_WIDTH": WIDTH, "NO_COLOR": "1"}
    return CliRunner().invoke(app, [name, "--help"], env=with_width, prog_name="dsv4-jax").output.strip()


class Commands(SphinxDirective):
    """A section for each command that `dsv4-jax --help` shows."""

    def run(self) -> list[nodes.Node]:
        """The sections, each with the command's help as it is printed."""
        made = []
        for name, command in typer.main.get_command(application()).commands.items():
            if not command.hidden:
                section = nodes.section(ids=[f"dsv4-jax-{name}"], names=[f"dsv4-jax {name}"])
                section += nodes.title(text=f"dsv4-jax {name}")
                text = help_of(name)
                section += nodes.literal_block(text, text, language="none")
                made.append(section)
        return made


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
