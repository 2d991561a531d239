"""Docstrings are plain text: what docutils would take for markup in them, and is not meant so, is made literal."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import re
from typing import Any

import jax
from docutils import nodes
from numpy.typing import ArrayLike
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

from dsv4_jax.errors import Picklable

LITERAL = re.compile(r"(``.*?``)")
QUOTED = re.compile(r"(?<!`)`([^`]+)`(?!`)")
COLON = "\ue000"  # in place of one that napoleon must not read
FIELD = re.compile(r"^    (\w+): [^#\n]+  # (.+)$", re.MULTILINE)
ARRAY_LIKE = stringify_annotation(ArrayLike, "smart")
ARRAY = re.compile(r"~?numpy\.ndarray\[~?tuple\[~?typing\.Any, \.\.\.\], ~?numpy\.dtype\[([\w.~]+)\]\]")
SHAPE = re.compile(r"(?<![\w\]])\[[^\[\]`]*(?:\[[^\[\]`]*\][^\[\]`]*)*\]")


def plain(text: str) -> str:
    """A line outside of its literals: names in backticks and shapes are literals too, bars and stars are text."""
    text = QUOTED.sub(r"``\1``", text)
    parts = LITERAL.split(text)
    for place in range(0, len(parts), 2):
        shaped = LITERAL.split(SHAPE.sub(lambda found: f"``{found[0]}``", parts[place]))
        shaped[::2] = [re.sub(r"\||\*(?=page|shape)", r"\\\g<0>", rest) for rest in shaped[::2]]
        parts[place] = "".join(shaped)
    return "".join(parts)


def dataclass_or_tuple(thing: Any) -> bool:
    """Whether a class has fields, which a comment behind each may say more of."""
    return isinstance(thing, type) and (dataclasses.is_dataclass(thing) or hasattr(thing, "_fields"))


def process(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon, which takes words before a colon for a type, where it reads of an attribute or of a result."""
    if what == "class" and dataclass_or_tuple(thing) and "Attributes:" not in lines:
        fields = FIELD.findall(inspect.getsource(thing))
        lines += ["", "Attributes:", *(f"  {field}: {comment}" for field, comment in fields)] if fields else []
    lines[:] = [line if line.lstrip().startswith(".. ") else plain(line) for line in lines]
    for number, line in enumerate(lines):
        of_attribute = number == 0 and what in ("attribute", "property", "data")
        if of_attribute or (number > 0 and lines[number - 1].strip() == "Returns:"):
            lines[number] = line.replace(":", COLON)


def process_again(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """After napoleon."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def skip(app: Sphinx, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Fields of named tuples are in the class's docstring, and have none of their own."""
    return True if (getattr(thing, "__doc__", None) or "").startswith("Alias for field number") else None


def process_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None] | None:
    """Names of NumPy's types in place of what they stand for; none for errors, which are caught and not made."""
    if what == "exception" or signature == "(*args, **kwargs)":  # and protocols are not made either
        return ("", None) if signature else None
    return named(signature), named(returned)


def named(signature: str | None) -> str | None:
    """A part of a signature with ``ArrayLike`` and ``NDArray`` by name, and single axes without the space before."""
    if not signature:
        return signature
    signature = signature.replace(ARRAY_LIKE, "~numpy.typing.ArrayLike").replace("<factory>", "...")
    signature = signature.replace("[Array, ' ", "[Array, '")
    return ARRAY.sub(r"~numpy.typing.NDArray[\1]", signature)


class Shaped:
    """In place of jaxtyping's types, which only type checkers import: what is shown of them is what the source says."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, array_and_axes: tuple[Any, str]) -> type:
        shown = f"{self.name}[Array, '{array_and_axes[1].strip()}']"
        return type(shown, (), {"__module__": "jaxtyping", "__qualname__": shown})


def process_bases(app: Sphinx, name: str, thing: type, options: Any, bases: list[type]) -> None:
    """That errors pickle is said once, not as a base of each."""
    shown = [base for base in bases if base is not Picklable]
    bases[:] = shown or [Exception]


def process_document(app: Sphinx, document: nodes.document) -> None:
    """Python's own types have no page here, and are not what some class has a member of the same name for.

    And what docstrings call attributes is called so.
    """
    for name in document.findall(nodes.field_name):
        if name.astext() == "Variables":
            name.children = [nodes.Text("Attributes")]
    for reference in list(document.findall(pending_xref)):
        if reference["reftype"] == "class" and hasattr(builtins, reference["reftarget"]):
            reference.replace_self(nodes.Text(reference["reftarget"]))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers all of it."""
    for shaped in ("Bool", "Float", "Float32", "Int32"):
        setattr(builtins, shaped, Shaped(shaped))
    builtins.Array = jax.Array
    app.connect("autodoc-process-docstring", process, priority=100)
    app.connect("autodoc-process-docstring", process_again, priority=900)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-process-bases", process_bases)
    app.connect("doctree-read", process_document)
    return {"parallel_read_safe": True}
