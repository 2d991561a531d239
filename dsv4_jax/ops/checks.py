"""What every op checks about its operands while tracing, and who runs it. The first mistake raises OperandError."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.errors import Picklable
from dsv4_jax.layout.formats import WINDOW_FORMATS, VectorFormat
from dsv4_jax.layout.geometry import TailGeometry
from dsv4_jax.layout.layer_schema import STATE_ROWS, is_running
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.spec.kinds import HEAD_DIM, RATIOS, ROPE_DIM, LayerKind, compression_of_ratio

Implementation = Literal["native", "reference"]
"""Who runs an op: the native FFI handlers (the platform picks CPU or CUDA), or the plain jnp definition."""

IMPLEMENTATIONS = ("native", "reference")

FLOATING = (jnp.float32, jnp.bfloat16)

T = TypeVar("T")


class OperandError(Picklable, ValueError):
    """An operand of an op is not what the op takes; raised while tracing, before anything runs."""


def check_implementation(implementation: Any) -> None:
    """Raises ValueError unless `implementation` is one of the two words."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}.")


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


def check_dtype(op: str, dtype: Any) -> np.dtype:
    """The dtype of rows handed out; raises OperandError unless it is float32 or bfloat16."""
    if jnp.dtype(dtype) not in [jnp.dtype(allowed) for allowed in FLOATING]:
        raise OperandError(f"{op}: dtype is {jnp.dtype(dtype).name}, expected float32 or bfloat16.")
    return jnp.dtype(dtype)


def check_count(op: str, name: str, count: Any, smallest: int = 0) -> int:
    """A static number; raises OperandError unless it is an integer from `smallest` on."""
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < smallest:
        raise OperandError(f"{op}: {name} is {count!r}, expected an integer from {smallest} on.")
    return int(count)


def check_ratio(op: str, ratio: Any) -> int:
    """The tokens of an entry; raises OperandError unless they are those of a kind of layer."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, np.integer)) or ratio not in RATIOS:
        raise OperandError(f"{op}: ratio is {ratio!r}, expected 4 (CSA) or 128 (HCA).")
    return int(ratio)


def check_plan(op: str, plan: StepPlan) -> None:
    """Raises OperandError unless `plan` is the plan of one step."""
    check(op, "plan", plan.packed, (plan.layout.size,), jnp.int32)


def check_pool(op: str, name: str, pool: Any, rows: int, vector_format: VectorFormat) -> None:
    """Raises OperandError unless `pool` is [layers, pages, *page] for pages of `rows` rows."""
    check(op, name, pool, (None, None, *vector_format.page_shape(rows)), vector_format.dtype)


def check_window(op: str, window: Any, positions: Any, vector_format: VectorFormat) -> None:
    """Raises OperandError unless these are a sliding window and its positions, in a format that windows have."""
    if (vector_format.codec, vector_format.width) not in [(f.codec, f.width) for f in WINDOW_FORMATS.values()]:
        raise OperandError(
            f"{op}: windows are not stored as {vector_format.name} of width {vector_format.width}; "
            f"choose one of {', '.join(WINDOW_FORMATS)}."
        )
    check(op, "positions", positions, (*jnp.shape(window)[:2], None), jnp.int32)
    check_pool(op, "window", window, jnp.shape(positions)[2], vector_format)


def check_window_size(op: str, size: Any, positions: Any) -> int:
    """How many rows a token sees; raises OperandError unless it is an integer from 1 to what the ring holds."""
    size, ring = check_count(op, "size", size, smallest=1), jnp.shape(positions)[2]
    if size > ring:
        raise OperandError(f"{op}: a window of {size} asked of a ring of {ring}.")
    return size


def check_tail(op: str, name: str, tail: Any, ratio: int) -> None:
    """Raises OperandError unless `tail` is float32 [layers, slots, 2, rows, width] for that ratio, or a running one."""
    if ratio == LayerKind.HCA.ratio and is_running(jnp.shape(tail)):
        states = max(jnp.shape(tail)[2] // STATE_ROWS, 1)
        check(op, name, tail, (None, None, STATE_ROWS * states, HEAD_DIM), jnp.float32)
        return
    check(op, name, tail, (None, None, 2, None, None), jnp.float32)
    try:
        TailGeometry.of_rows(ratio, jnp.shape(tail)[3])
    except ValueError as error:
        raise OperandError(f"{op}: {name}: {error}.") from error


def take_projections(
    op: str, tail: Any, kv: Any, gate: Any, position_bias: Any, plan: StepPlan, ratio: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Kv and gate in one dtype, float32 where either is, and the position bias in float32.

    Raises:
      OperandError: they do not fit the tail, the plan and each other.
    """
    columns = compression_of_ratio(ratio).columns(jnp.shape(tail)[-1])
    check(op, "kv", kv, (plan.layout.tokens, columns), *FLOATING)
    check(op, "gate", gate, (plan.layout.tokens, columns), *FLOATING)
    check(op, "position_bias", position_bias, (ratio, columns), *FLOATING)
    same = jnp.result_type(kv) == jnp.result_type(gate)
    kv, gate = (jnp.asarray(x) if same else jnp.asarray(x, jnp.float32) for x in (kv, gate))
    return kv, gate, jnp.asarray(position_bias, jnp.float32)


def take_finish(op: str, norm_weight: Any, cos: Any, sin: Any, width: int, rows: int) -> jax.Array:
    """The norm weight in float32; raises OperandError unless the three normalize and rotate `rows` rows."""
    check(op, "norm_weight", norm_weight, (width,), *FLOATING)
    check(op, "cos", cos, (rows, ROPE_DIM // 2), jnp.float32)
    check(op, "sin", sin, (rows, ROPE_DIM // 2), jnp.float32)
    return jnp.asarray(norm_weight, jnp.float32)


def take_layer(layer: Any) -> jax.Array:
    """The layer index as the int32 scalar that kernels read."""
    return jnp.asarray(layer, jnp.int32).reshape(())


def format_attributes(vector_format: VectorFormat) -> dict[str, Any]:
    """The attributes by which kernels know a format."""
    return {"codec": vector_format.codec, "global_scale": vector_format.global_scale}


def plan_attributes(plan: StepPlan) -> dict[str, Any]:
    """The attributes by which kernels find the fields of a packed plan."""
    return {"tokens": plan.layout.tokens, "requests": plan.layout.requests}


def untransformed(op: str, operands: T) -> T:
    """The operands as they are, which no derivative and no ``jax.vmap`` goes through: either raises OperandError."""
    return _guard(op)(operands)


@functools.cache
def _guard(op: str) -> Callable[[Any], Any]:
    @jax.custom_batching.custom_vmap
    def unmapped(operands: Any) -> Any:
        return operands

    @unmapped.def_vmap
    def _(axis_size: int, batched: Any, operands: Any) -> Any:
        raise OperandError(f"{op} has no rule for jax.vmap: the requests of a step are batched by its plan.")

    @jax.custom_jvp
    def untransformed(operands: Any) -> Any:
        return unmapped(operands)

    @untransformed.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise OperandError(
            f"{op} has no derivative, the cache being state of inference: "
            "put jax.lax.stop_gradient around what is given to it."
        )

    return untransformed
