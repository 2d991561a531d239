"""Tables with much text get the class ``wide``: they keep a width, and scroll where the screen is narrower."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx

LETTERS = 100  # of the longest cell of every column together


def mark_wide(app: Sphinx, document: nodes.document) -> None:
    """Adds the class to tables of three columns or more that have so many letters, and ``word`` to cells of one."""
    for table in document.findall(nodes.table):
        rows = [[len(cell.astext()) for cell in row.children] for row in table.findall(nodes.row)]
        longest = [max(column) for column in zip(*rows, strict=False)]
        if len(longest) > 2 and sum(longest) > LETTERS:
            table["classes"].append("wide")
        for cell in table.findall(nodes.entry):
            if " " not in cell.astext():
                cell["classes"].append("word")


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers it."""
    app.connect("doctree-read", mark_wide)
    return {"parallel_read_safe": True}
