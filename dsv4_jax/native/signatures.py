"""What every op takes and gives, by name: the operands, results and attributes of a native call, in their order.

Each op states its signature beside its checks; the native module has the same table (``ffi/ops/signatures.h``), and the
two are held against each other when the module is first used.
"""

from __future__ import annotations

import dataclasses

SIGNATURES: dict[str, Signature] = {}
"""Every op's signature by its name, complete once ``dsv4_jax.ops`` is imported."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """The names of an op's operands, results and attributes; a result named like an operand is updated in place."""

    op: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    attributes: tuple[str, ...]

    @property
    def in_place(self) -> tuple[str, ...]:
        """The operands that are updated in place and come back as results."""
        return tuple(name for name in self.results if name in self.operands)


def signature(op: str, operands: str, results: str, attributes: str) -> Signature:
    """States an op's signature; names are separated by spaces."""
    SIGNATURES[op] = Signature(op, *(tuple(names.split()) for names in (operands, results, attributes)))
    return SIGNATURES[op]
