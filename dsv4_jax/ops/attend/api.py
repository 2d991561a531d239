"""attend_window, attend_entries, attend_all_entries: softmax attention over rows where they are stored.

Keys and values are the same rows: a token's sliding window, and compressed entries behind it. Where the window's or the
entries' format is ``fp32``, and on the CPU, everything is in float32. Hopper's tensor cores take every other pair of
formats: they multiply queries and softmax weights that are rounded to bfloat16, and add in float32. On other GPUs that
is so for ``bf16`` and ``fp8_ds_mla``, and the rest is in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.layout.formats import WINDOW_FORMATS, VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.native.call import call
from dsv4_jax.native.signatures import signature
from dsv4_jax.ops.attend import reference
from dsv4_jax.ops.attend.operands import Attended, Displaced, EntryRows, WindowRows, displaced_rows
from dsv4_jax.ops.checks import (
    FLOATING,
    Implementation,
    OperandError,
    check,
    check_count,
    check_dtype,
    check_implementation,
    check_plan,
    check_pool,
    check_ratio,
    check_window,
    check_window_size,
    plan_attributes,
    take_layer,
    untransformed,
)
from dsv4_jax.ops.operands import Window
from dsv4_jax.spec.kinds import BLOCK_TOKENS, HEAD_DIM, ROPE_DIM
from dsv4_jax.spec.rotary import Rotary

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

_WINDOW = "window positions displaced displaced_positions"
_QUERIES = "queries sinks cos sin plan layer"
_RESULTS = "output lse block_sums part_rows part_shares"
_ATTEND_WINDOW = signature(
    "attend_window",
    f"{_WINDOW} {_QUERIES}",
    f"window positions {_RESULTS}",
    "tokens requests size scale window_codec",
)
_ATTEND_ENTRIES = signature(
    "attend_entries",
    f"{_WINDOW} entries block_table indices {_QUERIES} kind_layer",
    f"window positions entries {_RESULTS}",
    "tokens requests size ratio scale window_codec entry_codec entry_global_scale",
)
_ATTEND_ALL_ENTRIES = signature(
    "attend_all_entries",
    f"{_WINDOW} entries block_table {_QUERIES} kind_layer",
    f"window positions entries {_RESULTS}",
    "tokens requests size ratio count scale window_codec entry_codec entry_global_scale",
)

# How kernels for Hopper share a token: tiles of rows, heads of a block, and how many clusters an H200 runs at once, by
# their blocks. What merging costs, in the time of tiles, measured there: of blocks, for each 16 of their heads; of
# parts, the launch, and each part.
_TILE_ROWS, _BLOCK_HEADS = 64, (64, 32, 16)
_CLUSTERS_AT_ONCE = {16: 7, 8: 15, 4: 30, 2: 66, 1: 132}
_HEADS_TILES, _MERGE_TILES, _PART_TILES = 0.4, 4.5, 0.1


def attend_window(
    window: Window,
    queries: Float[Array, "tokens heads 512"],
    plan: StepPlan,
    layer: int | jax.Array,
    *,
    format: VectorFormat,
    size: int = 128,
    displaced: Displaced | None = None,
    sinks: Float[Array, " heads"] | None = None,
    rotary: Rotary | None = None,
    scale: float = HEAD_DIM**-0.5,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = "native",
) -> tuple[Window, Attended]:
    """Attention of each token over its sliding window, itself included; its row is stored before.

    Args:
      window: [layers, slots, *page(ring)] of `format` and positions int32 [layers, slots, ring]. A token at position t
        sees the rows that hold positions ``t - size + 1`` to ``t``; what the ring does not hold, it does not see.
      queries: float32 or bfloat16 [tokens, heads, 512], rotated.
      plan: the step; padding sees nothing.
      layer: index of the layer; out of range: no row is seen.
      format: how rows are stored.
      size: of the window, at most the ring's.
      displaced: rows that the ring has lost in this step and that its tokens still see; None: there are none.
      sinks: [heads] float32 or bfloat16; each adds exp(sink) to its head's denominator once. None: nothing is added.
      rotary: of the tokens; the trailing 64 channels of the output are rotated back by it. None: they are not.
      scale: of the logits.
      dtype: of the output, bfloat16 or float32.
      implementation: who runs it.

    Returns:
      window, unchanged (reads thread the pool), and Attended [tokens, heads, ...].

    Raises:
      OperandError: an operand does not fit, or it is differentiated or mapped.
    """
    given = _Given(window, displaced, queries, plan, sinks, rotary, layer)
    window, _, attended = _attend(given, _Asked("attend_window", implementation, format, size, scale, dtype))
    return window, attended


def attend_entries(
    window: Window,
    pool: jax.Array,
    block_table: Int32[Array, "slots max_blocks"],
    queries: Float[Array, "tokens heads 512"],
    indices: Int32[Array, "tokens count"],
    plan: StepPlan,
    layer: int | jax.Array,
    kind_layer: int | jax.Array,
    *,
    ratio: int,
    window_format: VectorFormat,
    entry_format: VectorFormat,
    size: int = 128,
    displaced: Displaced | None = None,
    sinks: Float[Array, " heads"] | None = None,
    rotary: Rotary | None = None,
    scale: float = HEAD_DIM**-0.5,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = "native",
) -> tuple[Window, jax.Array, Attended]:
    """Attention of each token over its sliding window and chosen entries.

    Args:
      window: as ``attend_window`` takes it.
      pool: [layers, blocks, *page(128 / ratio)] of `entry_format`.
      block_table: int32 [slots, max_blocks].
      queries: float32 or bfloat16 [tokens, heads, 512], rotated.
      indices: int32 [tokens, count], each token's entries in any order. Below 0, or not below ``(t + 1) // ratio`` for
        a token at position t: none. Twice: it counts twice.
      plan: the step; padding sees nothing.
      layer: index of the layer; out of range: no window row is seen.
      kind_layer: index of the layer among those of its kind; out of range: no entry is seen.
      ratio: 4 (CSA) or 128 (HCA).
      window_format: how window rows are stored.
      entry_format: how entries are stored.
      size: of the window, at most the ring's.
      displaced: as ``attend_window`` takes it, and so are the rest.
      sinks: [heads], or None.
      rotary: of the tokens, or None.
      scale: of the logits.
      dtype: of the output, bfloat16 or float32.
      implementation: who runs it.

    Returns:
      window and pool, unchanged, and Attended [tokens, heads, ...].

    Raises:
      OperandError: an operand does not fit, or it is differentiated or mapped.
    """
    op = "attend_entries"
    check(op, "indices", indices, (plan.layout.tokens, None), jnp.int32)
    count = jnp.shape(indices)[1]
    given = _Given(
        window, displaced, queries, plan, sinks, rotary, layer, pool, block_table, kind_layer, indices=indices
    )
    return _attend(given, _Asked(op, implementation, window_format, size, scale, dtype, entry_format, ratio, count))


def attend_all_entries(
    window: Window,
    pool: jax.Array,
    block_table: Int32[Array, "slots max_blocks"],
    queries: Float[Array, "tokens heads 512"],
    plan: StepPlan,
    layer: int | jax.Array,
    kind_layer: int | jax.Array,
    *,
    ratio: int,
    entries: int,
    window_format: VectorFormat,
    entry_format: VectorFormat,
    size: int = 128,
    displaced: Displaced | None = None,
    sinks: Float[Array, " heads"] | None = None,
    rotary: Rotary | None = None,
    scale: float = HEAD_DIM**-0.5,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = "native",
) -> tuple[Window, jax.Array, Attended]:
    """Attention of each token over its sliding window and every entry that it sees, of the first `entries`.

    What is not said is ``attend_entries``'s.
    """
    op = "attend_all_entries"
    count = check_count(op, "entries", entries)
    given = _Given(window, displaced, queries, plan, sinks, rotary, layer, pool, block_table, kind_layer)
    return _attend(given, _Asked(op, implementation, window_format, size, scale, dtype, entry_format, ratio, count))


class Split(NamedTuple):
    """How a token's rows are shared: by the blocks of a cluster, and where they are many by parts, a cluster each.

    Every so many heads have clusters of their own.
    """

    blocks: int
    parts: int
    heads: int


def split_of_token(tokens: int, heads: int, size: int, count: int) -> Split:
    """The split that takes the least time, of those whose clusters all run at once on an H200.

    Products take as long with fewer heads than 64, but blocks have less to tell each other. So where multiprocessors
    are idle, they look up and decode a token's rows once more.
    """
    tiles = -(-size // _TILE_ROWS) - (-count // _TILE_ROWS)

    def split(parts: int, block_heads: int) -> Split:
        clusters = parts * tokens * -(-heads // block_heads)
        fits = (n for n, at_once in _CLUSTERS_AT_ONCE.items() if clusters <= at_once and n < 2 * tiles)
        return Split(max(fits, default=1), parts, block_heads)

    def cost(split: Split) -> float:
        of_blocks = 0.0 if split.blocks <= 2 else _HEADS_TILES * split.heads / 16
        of_parts = 0.0 if split.parts == 1 else _MERGE_TILES + split.parts * _PART_TILES
        return -(-tiles // (split.parts * split.blocks)) + of_blocks + of_parts

    def most_parts(block_heads: int) -> int:
        return max(1, _CLUSTERS_AT_ONCE[1] // (tokens * -(-heads // block_heads)))

    # Of equals the first: with as many heads to a block as there can be.
    choices = (split(1 + extra, few) for few in _BLOCK_HEADS for extra in range(most_parts(few)))
    return min(choices, key=cost)


class _Given(NamedTuple):
    """The arrays of a call, as the ops take them; without a pool, the window alone."""

    window: Window
    displaced: Displaced | None
    queries: jax.Array
    plan: StepPlan
    sinks: jax.Array | None
    rotary: Rotary | None
    layer: Any
    pool: Any = None
    block_table: Any = None
    kind_layer: Any = 0
    indices: jax.Array | None = None


class _Asked(NamedTuple):
    """What is asked of them; what is of entries says nothing without a pool."""

    op: str
    implementation: Implementation
    window_format: VectorFormat
    size: int
    scale: float
    dtype: Any
    entry_format: VectorFormat = WINDOW_FORMATS["fp32"]
    ratio: int = 0
    entries: int = 0  # that a token looks at, at most


def _attend(given: _Given, asked: _Asked) -> tuple[Window, Any, Attended]:
    """Any of the three ops: window and pool, as they were, and what was attended to."""
    asked = _checked(given, asked)
    given = given._replace(layer=take_layer(given.layer), kind_layer=take_layer(given.kind_layer))
    given = jax.tree.map(jnp.asarray, untransformed(asked.op, given))
    if asked.implementation == "reference":
        return given.window, given.pool, _by_definition(given, asked)
    operands, results = _operands(given), _results(given.queries, asked)
    attributes = plan_attributes(given.plan) | {
        "size": asked.size,
        "scale": asked.scale,
        "window_codec": asked.window_format.codec,
    }
    if given.pool is None:
        stored, positions, output, lse, *_ = call(_ATTEND_WINDOW, operands, results=results, **attributes)
        return Window(stored, positions), None, Attended(output, lse)
    which = _ATTEND_ENTRIES
    attributes |= {
        "ratio": asked.ratio,
        "entry_codec": asked.entry_format.codec,
        "entry_global_scale": asked.entry_format.global_scale,
    }
    if given.indices is None:
        which, attributes = _ATTEND_ALL_ENTRIES, attributes | {"count": asked.entries}
    stored, positions, pool, output, lse, *_ = call(which, operands, results=results, **attributes)
    return Window(stored, positions), pool, Attended(output, lse)


def _checked(given: _Given, asked: _Asked) -> _Asked:
    """Raises OperandError if anything does not fit; numbers and dtype as they are used."""
    op, window, plan = asked.op, given.window, given.plan
    check_implementation(asked.implementation)
    check_window(op, window.window, window.positions, asked.window_format)
    check_plan(op, plan)
    size, dtype = check_window_size(op, asked.size, window.positions), check_dtype(op, asked.dtype)
    tokens = plan.layout.tokens
    check(op, "queries", given.queries, (tokens, None, HEAD_DIM), *FLOATING)
    heads = jnp.shape(given.queries)[1]
    if heads == 0:
        raise OperandError(f"{op}: queries have no heads.")
    if given.displaced is not None:
        rows, format = displaced_rows(plan.layout, size), asked.window_format
        check(op, "displaced.positions", given.displaced.positions, (rows,), jnp.int32)
        check(op, "displaced.rows", given.displaced.rows, (1, 1, *format.page_shape(rows)), format.dtype)
    if given.sinks is not None:
        check(op, "sinks", given.sinks, (heads,), *FLOATING)
    if given.rotary is not None:
        check(op, "cos", given.rotary.cos, (tokens, ROPE_DIM // 2), jnp.float32)
        check(op, "sin", given.rotary.sin, (tokens, ROPE_DIM // 2), jnp.float32)
    if isinstance(asked.scale, bool) or not isinstance(asked.scale, (int, float)):
        raise OperandError(f"{op}: scale is {asked.scale!r}, expected a number.")
    asked = asked._replace(size=size, dtype=dtype, scale=float(asked.scale))
    if given.pool is None:
        return asked
    ratio = check_ratio(op, asked.ratio)
    check_pool(op, "pool", given.pool, BLOCK_TOKENS // ratio, asked.entry_format)
    check(op, "block_table", given.block_table, (None, None), jnp.int32)
    return asked._replace(ratio=ratio)


def _by_definition(given: _Given, asked: _Asked) -> Attended:
    rows = WindowRows(*given.window, given.layer, asked.window_format, asked.size, given.displaced)
    entries = None
    if given.pool is not None:
        stored = (given.pool, given.block_table, given.kind_layer)
        entries = EntryRows(*stored, asked.ratio, asked.entry_format, asked.entries, given.indices)
    return reference.attend(
        rows,
        entries,
        given.queries,
        given.plan,
        sinks=given.sinks,
        rotary=given.rotary,
        scale=asked.scale,
        dtype=asked.dtype,
    )


def _operands(given: _Given) -> dict[str, Any]:
    """Operands by name; what may be left out and is has no elements."""

    def nothing(dtype: Any) -> jax.Array:
        return jnp.zeros(0, dtype)

    window, displaced, sinks, rotary = given.window, given.displaced, given.sinks, given.rotary
    operands = {
        "window": window.window,
        "positions": window.positions,
        "displaced": nothing(window.window.dtype) if displaced is None else displaced.rows,
        "displaced_positions": nothing(jnp.int32) if displaced is None else displaced.positions,
        "queries": given.queries,
        "sinks": nothing(jnp.float32) if sinks is None else jnp.asarray(sinks, jnp.float32),
        "cos": nothing(jnp.float32) if rotary is None else rotary.cos,
        "sin": nothing(jnp.float32) if rotary is None else rotary.sin,
        "plan": given.plan.packed,
        "layer": given.layer,
    }
    if given.pool is not None:
        operands |= {"entries": given.pool, "block_table": given.block_table, "kind_layer": given.kind_layer}
    return operands if given.indices is None else operands | {"indices": given.indices}


def _results(queries: jax.Array, asked: _Asked) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What is made: the output, its lse, and workspace of a cluster's blocks and of parts, where there are several."""
    tokens, heads, _ = jnp.shape(queries)
    blocks, parts, block_heads = split_of_token(tokens, heads, asked.size, asked.entries)
    clusters = parts * tokens * -(-heads // block_heads) if blocks > 2 else 0
    parts = 0 if parts == 1 else parts
    return {
        "output": ((tokens, heads, HEAD_DIM), asked.dtype),
        "lse": ((tokens, heads), jnp.float32),
        "block_sums": ((clusters, blocks, block_heads, HEAD_DIM), jnp.float32),
        "part_rows": ((parts, tokens, heads, HEAD_DIM), jnp.float32),
        "part_shares": ((parts, tokens, heads, 2), jnp.float32),
    }
