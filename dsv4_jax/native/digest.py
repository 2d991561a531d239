"""Do Python and the native module mean the same? Every table that both keep, held against each other.

A module of another version may load and run, and read a field of the plan, or an operand, where another one lies. So
what both sides know is compared once, when the module is first used: signatures of ops, kinds of layers, where the
fields of a plan lie, and the bytes of every storage format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS
from dsv4_jax.layout.geometry import TailGeometry
from dsv4_jax.layout.plan import PlanLayout
from dsv4_jax.native.compatibility import REBUILD, NativeModuleError
from dsv4_jax.native.signatures import SIGNATURES
from dsv4_jax.spec.kinds import COMPRESSIONS

LAYOUTS = ((1, 1), (600, 5))
"""(tokens, requests) whose fields are compared: together they tell every size apart."""


def of_python() -> dict[str, Mapping[Any, Any]]:
    """Python's tables by what they are about."""
    from dsv4_jax import ops  # noqa: F401  (states the signatures)

    formats = [*ENTRY_FORMATS.values(), *KEY_FORMATS.values()]
    plans = {shape: PlanLayout(*shape).fields for shape in LAYOUTS}
    return {
        "op": {op: (s.operands, s.results, s.attributes) for op, s in SIGNATURES.items()},
        "kind": {
            name: (*dataclasses.astuple(compression), TailGeometry(compression).rows)
            for name, compression in COMPRESSIONS.items()
        },
        "plan field": {(*shape, name): where.start for shape, f in plans.items() for name, where in f.items()},
        "format": {(f.codec, f.width): (f.data_bytes, f.scale_bytes, f.page_multiple) for f in formats},
    }


def of_module(module: Any) -> dict[str, Mapping[Any, Any]]:
    """The same of a native module."""
    plans = {shape: module.plan_offsets(*shape) for shape in LAYOUTS}
    return {
        "op": {op: tuple(tuple(names.split()) for names in parts) for op, parts in module.signatures().items()},
        "kind": dict(module.kinds()),
        "plan field": {(*shape, name): start for shape, f in plans.items() for name, start in f.items()},
        "format": dict(module.codecs()),
    }


def check_digest(module: Any) -> None:
    """Raises NativeModuleError, with the first difference, unless `module` has Python's tables."""
    ours = of_python()
    try:
        theirs = of_module(module)
    except AttributeError as error:
        raise NativeModuleError(f"The native module is of another version of dsv4_jax ({error}).", REBUILD) from None
    for what, table in ours.items():
        for name in sorted(table.keys() | theirs[what].keys(), key=str):
            here, there = table.get(name), theirs[what].get(name)
            if here != there:
                raise NativeModuleError(
                    f"The native module does not fit this dsv4_jax: {what} {name} is {here} here and {there} there.",
                    REBUILD,
                )
