"""The one way from Python to a native op: operand checks at trace time, attribute types, aliasing, the FFI call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.errors import Picklable
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.geometry import TailGeometry
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.layout.schema import is_running
from dsv4_jax.spec.kinds import HEAD_DIM, ROPE_DIM, LayerKind, compression_of_ratio

FLOATING = (jnp.float32, jnp.bfloat16)


class OperandError(Picklable, ValueError):
    """An operand of an op has the wrong shape or dtype; raised while tracing, before anything runs."""


def check(op: str, name: str, array: Any, shape: Sequence[int | None], *dtypes: Any) -> None:
    """Raises OperandError unless `array` has that shape (None is any size) and one of those dtypes."""
    actual = jnp.shape(array)
    fits = len(actual) == len(shape) and all(want in (None, size) for want, size in zip(shape, actual, strict=True))
    if not fits:
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        raise OperandError(f"{op}: {name} has shape {list(actual)}, expected [{expected}] (* is any size).")
    dtype = jnp.result_type(array)
    if dtypes and dtype not in [jnp.dtype(allowed) for allowed in dtypes]:
        expected = " or ".join(jnp.dtype(allowed).name for allowed in dtypes)
        raise OperandError(f"{op}: {name} has dtype {dtype.name}, expected {expected}.")


def check_plan(op: str, plan: StepPlan) -> None:
    """Raises OperandError unless `plan` is the plan of one step."""
    check(op, "plan", plan.packed, (plan.layout.size,), jnp.int32)


def check_pool(op: str, name: str, pool: Any, rows: int, vector_format: VectorFormat) -> None:
    """Raises OperandError unless `pool` is [layers, pages, *page] for pages of `rows` rows."""
    check(op, name, pool, (None, None, *vector_format.page_shape(rows)), vector_format.dtype)


def check_tail(op: str, name: str, tail: Any, ratio: int) -> None:
    """Raises OperandError unless `tail` is float32 [layers, slots, 2, rows, width] for that ratio, or a running one."""
    try:
        compression = compression_of_ratio(ratio)
        if compression is LayerKind.HCA.compression and is_running(jnp.shape(tail)):
            check(op, name, tail, (None, None, 3, HEAD_DIM), jnp.float32)
            return
        check(op, name, tail, (None, None, 2, None, None), jnp.float32)
        TailGeometry.of_rows(ratio, jnp.shape(tail)[3])
    except OperandError:
        raise
    except ValueError as error:
        raise OperandError(f"{op}: {name}: {error}.") from error


def check_projections(op: str, tail: Any, kv: Any, gate: Any, ape: Any, plan: StepPlan, ratio: int) -> None:
    """Raises OperandError unless kv, gate and ape fit the tail, the plan and each other."""
    columns = compression_of_ratio(ratio).columns(jnp.shape(tail)[-1])
    check(op, "kv", kv, (plan.layout.tokens, columns), *FLOATING)
    check(op, "gate", gate, (plan.layout.tokens, columns), jnp.result_type(kv))
    check(op, "ape", ape, (ratio, columns), jnp.float32)


def check_finish(op: str, norm_weight: Any, cos: Any, sin: Any, width: int, rows: int) -> None:
    """Raises OperandError unless these normalize and rotate `rows` rows of that width."""
    check(op, "norm_weight", norm_weight, (width,), jnp.float32)
    check(op, "cos", cos, (rows, ROPE_DIM // 2), jnp.float32)
    check(op, "sin", sin, (rows, ROPE_DIM // 2), jnp.float32)


def format_attributes(vector_format: VectorFormat) -> dict[str, Any]:
    """The attributes by which kernels know a format."""
    return {"codec": vector_format.codec, "global_scale": vector_format.global_scale}


def plan_attributes(plan: StepPlan) -> dict[str, Any]:
    """The attributes by which kernels find the fields of a packed plan."""
    return {"tokens": plan.layout.tokens, "requests": plan.layout.requests}


def layer_operand(layer: Any) -> jax.Array:
    """The layer index as the int32 scalar that kernels read."""
    return jnp.asarray(layer, jnp.int32).reshape(())


def struct(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a result."""
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


def call(
    target: str,
    operands: Sequence[Any],
    *,
    in_place: int,
    results: Sequence[jax.ShapeDtypeStruct] = (),
    **attributes: Any,
) -> tuple[jax.Array, ...]:
    """Calls a native op whose first `in_place` operands are updated in place and returned, followed by `results`.

    Raises:
      NativeModuleError: the native module does not load; the message says how to mend it.
    """
    # Here, so that the package (its doctor, its reference) works where the native module does not.
    from dsv4_jax.native import registration  # noqa: F401

    outputs = (*(struct(jnp.shape(x), jnp.result_type(x)) for x in operands[:in_place]), *results)
    function = jax.ffi.ffi_call(
        f"dsv4_{target}", outputs, input_output_aliases={i: i for i in range(in_place)}, has_side_effect=False
    )
    with jax.named_scope(target):  # what a profile shows
        return tuple(function(*operands, **_typed(attributes)))


def _typed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    # JAX compares cached attributes by value, so np.int64(64) and np.int32(64) would share a compilation: only this
    # function chooses attribute types.
    types = {bool: np.bool_, int: np.int64, float: np.float32, str: str}
    return {name: types[type(value)](value) for name, value in attributes.items()}
