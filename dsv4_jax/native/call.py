"""The one way from Python to a native op: operands by name, attribute types, result types, aliasing, the FFI call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dsv4_jax.native.signatures import Signature


def call(
    signature: Signature,
    operands: Mapping[str, Any],
    *,
    results: Mapping[str, tuple[tuple[int, ...], Any]] | None = None,
    **attributes: Any,
) -> tuple[jax.Array, ...]:
    """Calls a native op.

    Args:
      signature: the op's. Results that have an operand's name are that operand, updated in place.
      operands: every operand by name.
      results: (shape, dtype) of every result that is not an operand, by name.
      attributes: every attribute by name.

    Returns:
      The results in the signature's order.

    Raises:
      NativeModuleError: the native module does not load or does not fit; the message says how to mend it.
      TypeError: a name is missing, or is not the op's.
    """
    # Here, so that the package (its doctor, its reference) works where the native module does not.
    from dsv4_jax.native import registration  # noqa: F401

    made = results or {}
    _check_names(signature, "operands", signature.operands, operands)
    _check_names(signature, "results", [name for name in signature.results if name not in signature.operands], made)
    _check_names(signature, "attributes", signature.attributes, attributes)
    given = [operands[name] for name in signature.operands]
    types = {name: jax.typeof(operand) for name, operand in operands.items()}
    outputs = [
        _struct(types[name].shape, types[name].dtype, [types[name]])
        if name in types
        else _struct(*made[name], types.values())
        for name in signature.results
    ]
    aliases = {
        signature.operands.index(name): place
        for place, name in enumerate(signature.results)
        if name in signature.operands
    }
    function = jax.ffi.ffi_call(f"dsv4_{signature.op}", outputs, input_output_aliases=aliases, has_side_effect=False)
    with jax.named_scope(signature.op):  # what a profile shows
        return tuple(function(*given, **_typed(attributes)))


def _check_names(signature: Signature, what: str, expected: Iterable[str], given: Mapping[str, Any]) -> None:
    if set(expected) != set(given):
        raise TypeError(f"{signature.op} has the {what} {', '.join(expected)}; got {', '.join(given)}.")


def _struct(shape: Sequence[int], dtype: Any, types: Iterable[Any]) -> Any:
    """The type of a result, varying over every manual axis (of ``jax.shard_map``) that one of these types varies over.

    Made from the type of an operand that varies over as many axes as any, which knows the mesh as well.
    """
    types = list(types)
    varying = frozenset().union(*(kind.manual_axis_type.varying for kind in types))
    base = max(types, key=lambda kind: len(kind.manual_axis_type.varying))
    if not varying:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)
    axes = base.manual_axis_type.update(varying=varying)
    sharding = base.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    return base.update(
        shape=tuple(shape), dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding, manual_axis_type=axes
    )


def _typed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    # JAX compares cached attributes by value, so np.int64(64) and np.int32(64) would share a compilation: only this
    # function chooses attribute types.
    types = {bool: np.bool_, int: np.int64, float: np.float32, str: str}
    return {name: types[type(value)](value) for name, value in attributes.items()}
