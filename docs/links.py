"""Names in `literals` lead to the reference, where there is no doubt what they name."""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

NAME = re.compile(r"((?:[A-Za-z]\w*\.)*[A-Za-z]\w*)(?:\(.*\))?")
OBJECTS = ("class", "exception", "function", "method", "property")
VARIABLES = {  # as the pages name what they have in hand
    "cache": "Cache",
    "layer": "LayerCache",
    "manager": "CacheManager",
    "plan": "StepPlan",
    "schema": "CacheSchema",
    "step": "Step",
}


def targets(names: dict[str, str]) -> dict[str, str]:
    """What a name without its modules, as text has it, leads to, of all objects' full names and kinds.

    Words of a single lower-case part, and properties by themselves, are left out, since they mean other things as well;
    and names of several objects, unless one is the manager's, which those of the others are like.
    """
    found: dict[str, set[str]] = {}
    for name, kind in names.items():
        if kind not in OBJECTS:
            continue
        parts = name.split(".")
        for first in range(len(parts) - (kind == "property")):
            found.setdefault(".".join(parts[first:]), set()).add(name)
    chosen = {}
    for text, full in found.items():
        of_manager = {name for name in full if name.startswith("dsv4_jax.CacheManager.")}
        if len(full) > 1 and len(of_manager) == 1:
            full = of_manager
        if len(full) == 1 and ("_" in text or "." in text or text[0].isupper()):
            chosen[text] = next(iter(full))
    return chosen


def link(app: Sphinx, document: nodes.document, page: str) -> None:
    """Makes links of the page's literals; in the description of a class its own members come first."""
    objects = app.env.domains.python_domain.objects
    known = targets({name: entry.objtype for name, entry in objects.items() if not entry.aliased})
    for literal in list(document.findall(nodes.literal)):
        inside = literal.parent
        named = NAME.fullmatch(literal.astext().removeprefix("dsv4."))
        if not named or isinstance(inside, nodes.reference | nodes.title):
            continue
        first, dot, rest = named[1].partition(".")
        name = VARIABLES.get(first, first) + dot + rest if dot else first
        around = enclosing(literal)
        if name.islower() and any(re.search(rf"\b{name}\b", signature.astext()) for signature in around):
            continue  # an argument
        own = [f"{full}.{name}" for signature in around for full in signature.get("ids", ())]
        full = next((full for full in own if full in objects), known.get(name))
        if full is None or any(full in signature.get("ids", ()) for signature in around):
            continue
        entry = objects[full]
        literal.replace_self(make_refnode(app.builder, page, entry.docname, entry.node_id, literal.deepcopy()))


def enclosing(node: nodes.Element) -> list[nodes.Element]:
    """The signatures of the objects in whose description a node is."""
    found = []
    while node.parent is not None:
        node = node.parent
        if node.tagname == "desc":
            found.append(node[0])
    return found


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers it."""
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True}
