"""LayerCache: what an attention layer is given to read and write its part of the cache, by ``Step.layer``.

Functional throughout: a method that writes or reads the cache returns a new handle, and ``layer.step`` goes on to the
next layer. Making a handle allocates nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsv4_jax import ops
from dsv4_jax.cache import debug as run_time
from dsv4_jax.cache.errors import StepError, WrongLayerKind
from dsv4_jax.cache.pools import Cache
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.ops.attend.operands import Attended, Displaced
from dsv4_jax.ops.operands import Compressed, CompressorInputs, RawRows, Rows, Window
from dsv4_jax.spec.kinds import HEAD_DIM, LayerKind, entries_per_block
from dsv4_jax.spec.rotary import Purpose, Rotary

if TYPE_CHECKING:
    from dsv4_jax.cache.step import Step

APPEND, FLUSH, FLUSH_KEYS = "append", "flush", "flush_keys"


def parts_of(kind: LayerKind) -> tuple[str, ...]:
    """What is to be written of a layer in every step, by the method that writes it; ``update`` writes all of it."""
    if kind.compression is None:
        return (APPEND,)
    return (APPEND, FLUSH, FLUSH_KEYS) if kind.compression.indexed else (APPEND, FLUSH)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's part of the cache during one step; ``Step.layer`` makes it. A pytree.

    Attributes:
      step: goes on to the next layer; with what this layer has written.
      kind: the layer's kind.
      layer: index of the layer in the model; None where it is traced.
      traced: the traced index, int32 scalar.
      written: the parts of the layer that were written, see ``parts_of``.
      displaced: window rows that the step took the place of and that its tokens still see, for ``attend``; None where
        the plan's layout says that there are none.
    """

    step: Step
    kind: LayerKind = dataclasses.field(metadata={"static": True})
    layer: int | None = dataclasses.field(metadata={"static": True})
    traced: Any = None
    written: frozenset[str] = dataclasses.field(default=frozenset(), metadata={"static": True})
    displaced: Displaced | None = None

    @property
    def plan(self) -> StepPlan:
        """The step's."""
        return self.step.plan

    @property
    def schema(self) -> CacheSchema:
        """What the cache looks like."""
        return self.step.schema

    @property
    def visible(self) -> jax.Array:
        """int32 [tokens]: how many entries each token sees, ``(position + 1) // ratio``; 0 for padding."""
        self._name_of("entries")
        return (jnp.asarray(self.plan.token_position) + 1) // self.kind.ratio

    def window_before(self, *, dtype: Any = jnp.bfloat16) -> tuple[LayerCache, Rows]:
        """The window rows of earlier steps that this step's tokens still see; call before ``append`` or ``update``.

        Returns:
          The handle, and Rows [requests, window - 1]: row j is position ``start - (window - 1) + j`` of a request whose
          first token of the step is at ``start``. That token sees all of them; a later one, ``k`` tokens on, all but
          the first ``k``.

        Raises:
          StepError: the step's rows are stored already, over some of these.
        """
        if APPEND in self.written:
            raise StepError(
                f"{self._name}: window_before comes after the step's rows were stored, which may have taken the place "
                "of the rows that it reads; call it before update (or append)."
            )
        return self._window(dtype, before=True)

    def window(self, *, dtype: Any = jnp.bfloat16) -> tuple[LayerCache, Rows]:
        """The window of each request's last token, itself included; call after ``append`` or ``update``.

        This is all that a step of one token per request needs. Returns the handle and Rows [requests, window].
        """
        self._require_written(APPEND, "window")
        return self._window(dtype, before=False)

    def stored(self, rows: jax.Array, *, dtype: Any = jnp.bfloat16) -> jax.Array:
        """The step's own window rows as they are (or would be) stored: quantized and back, [tokens, 512].

        Every token of a step attends to these, not to the exact rows, so that what it sees does not depend on how the
        prompt was cut into steps.
        """
        format = self.schema.formats.window_format
        page = ops.quantize(rows, format=format, **self._by)
        return ops.dequantize(page, format=format, rows=rows.shape[0], dtype=dtype, **self._by)

    def append(
        self, rows: jax.Array, compressor: CompressorInputs | None = None, indexer: CompressorInputs | None = None
    ) -> LayerCache:
        """Stores the step's window rows in the ring and its compressor inputs in the tails.

        Args:
          rows: [tokens, 512] float32 or bfloat16, normalized and rotated.
          compressor: required for CSA and HCA layers, None for SWA.
          indexer: required for CSA layers, None otherwise.

        Raises:
          WrongLayerKind: the inputs are not those of the layer's kind.
          StepError: the rows are stored already, or a rotary is not what it should be.
        """
        self._check_inputs(compressor, indexer)
        format = self.schema.formats.window_format
        handle = self._written(APPEND)._save_displaced(rows)
        window, positions = ops.append_window(
            handle._cache.window,
            handle._cache.window_positions,
            rows,
            self.plan,
            self._window_row,
            format=format,
            **self._by,
        )
        handle = handle._with(window=window, window_positions=positions)
        for name, inputs in self._tails(compressor, indexer).items():
            handle = handle._append_tail(name, inputs)
        return handle

    def compress(self, compressor: CompressorInputs) -> tuple[LayerCache, jax.Array]:
        """The entries that this step closes, float32 [closing, 512]; see ``dsv4_jax.ops.compress``.

        Call before ``append`` (any number of tokens per request), or after it if every request brings one token.
        """
        return self._compress(self._name_of("tail"), compressor, hadamard=False)

    def compress_keys(self, indexer: CompressorInputs) -> tuple[LayerCache, jax.Array]:
        """The indexer keys that this step closes, float32 [closing, 128]; CSA layers only."""
        return self._compress(self._name_of("key_tail"), indexer, hadamard=self.schema.formats.keys_hadamard)

    def flush(self, entries: jax.Array) -> LayerCache:
        """Stores what ``compress`` returned in the blocks of its requests."""
        return self._written(FLUSH)._flush(self._name_of("entries"), entries, self.schema.formats.entry_format)

    def flush_keys(self, keys: jax.Array) -> LayerCache:
        """Stores what ``compress_keys`` returned; CSA layers only."""
        return self._written(FLUSH_KEYS)._flush(self._name_of("keys"), keys, self.schema.formats.key_format)

    def normalize(self, raw: RawRows) -> jax.Array:
        """Raw window rows finished (RMSNorm, RoPE), float32 [tokens, 512]: what attention and ``append`` take."""
        self._check_rotary("rows", raw.rotary, "tokens")
        return ops.normalize(raw, eps=self.schema.spec.norm_eps, **self._by)

    def update(
        self,
        rows: jax.Array | RawRows,
        compressor: CompressorInputs | None = None,
        indexer: CompressorInputs | None = None,
    ) -> LayerCache:
        """All writes of one layer and step in one op, for any number of tokens per request.

        Stores what ``compress``, ``flush`` and ``append`` store.

        Args:
          rows: [tokens, 512] finished window rows, or ``RawRows`` to be normalized and rotated on the way.
          compressor: required for CSA and HCA layers, None for SWA.
          indexer: required for CSA layers, None otherwise.

        Raises:
          WrongLayerKind: the inputs are not those of the layer's kind.
          StepError: the layer is written already, or a rotary is not what it should be: the tokens' in ``RawRows``, the
            closing entries' in ``CompressorInputs``, with the layer's RoPE.
        """
        self._check_inputs(compressor, indexer)
        if isinstance(rows, RawRows):
            self._check_rotary("rows", rows.rotary, "tokens")
        handle = self._written(*parts_of(self.kind))._save_displaced(rows)
        cache, formats, eps = handle._cache, self.schema.formats, self.schema.spec.norm_eps
        window = Window(cache.window, cache.window_positions)
        if self.kind.compression is None:
            window = ops.update_swa(
                window, rows, self.plan, self._window_row, format=formats.window_format, eps=eps, **self._by
            )
            return handle._with(window=window.window, window_positions=window.positions)

        where = (cache.block_table, self.plan, self._window_row, self._kind_row)
        options: dict[str, Any] = {
            "window_format": formats.window_format,
            "entry_format": formats.entry_format,
            "eps": eps,
        } | self._by
        pool, tail = self._name_of("entries"), self._name_of("tail")
        entries = Compressed(cache.pools[pool], cache.pools[tail])
        made: Any = (compressor, indexer)  # both there where the kind has them, as checked above
        if self.kind is LayerKind.HCA:
            window, entries = ops.update_hca(window, entries, rows, made[0], *where, **options)
            arrays = {}
        else:
            key_pool, key_tail = self._name_of("keys"), self._name_of("key_tail")
            window, entries, keys = ops.update_csa(
                window,
                entries,
                Compressed(cache.pools[key_pool], cache.pools[key_tail]),
                rows,
                made[0],
                made[1],
                *where,
                key_format=formats.key_format,
                hadamard=formats.keys_hadamard,
                **options,
            )
            arrays = {key_pool: keys.pool, key_tail: keys.tail}
        arrays |= {
            "window": window.window,
            "window_positions": window.positions,
            pool: entries.pool,
            tail: entries.tail,
        }
        return handle._with(**arrays)

    def attend(
        self,
        queries: jax.Array,
        sinks: jax.Array | None = None,
        *,
        indices: jax.Array | None = None,
        entries: int | None = None,
        scale: float = HEAD_DIM**-0.5,
        rotary: Rotary | None = None,
        dtype: Any = jnp.bfloat16,
    ) -> tuple[LayerCache, Attended]:
        """Attention of the step's tokens over the layer's rows where they are stored; call after ``update``.

        A token sees its window, itself included, and of entries those that are complete at its position: the chosen
        ones (CSA), all (HCA), none (SWA). Rows that a long chunk has displaced from the ring were saved by ``update``.
        A plan whose layout says that it ``displaces`` nothing, and that does, gives NaN, output and lse, to tokens that
        lack rows; ``begin(debug=True)`` names them. ``CacheManager`` makes no such plan.

        Args:
          queries: [tokens, heads, 512] float32 or bfloat16, rotated.
          sinks: [heads] float32 or bfloat16; each adds exp(sink) to its head's denominator. None: nothing is added, so
            that results over parts of the rows can be merged by their lse.
          indices: CSA layers only, and required: int32 [tokens, count], each token's entries in any order; below 0 or
            not yet visible: none.
          entries: HCA layers only: no entry from this one on is seen. None: all that the block table has room for.
          scale: of the logits.
          rotary: of the tokens, from ``token_rotary``: the trailing 64 channels of the output are rotated back.
          dtype: of the output, bfloat16 or float32.

        Returns:
          The handle and Attended: output [tokens, heads, 512], and lse float32 [tokens, heads], the natural logarithm
          of the sum over exp(logits) without the sink. Padding: zeros and -inf.

        Raises:
          WrongLayerKind: indices or entries are not those of the layer's kind.
          StepError: the step's rows are not stored yet, or the rotary is not the tokens' with the layer's RoPE.
          OperandError: an operand does not fit.
        """
        self._check_attended(indices, entries)
        for part in parts_of(self.kind):
            if part != FLUSH_KEYS:
                self._require_written(part, "attend")
        if rotary is not None:
            self._check_rotary("the output", rotary, "tokens")
        if self.step.debug and self.displaced is None:
            run_time.check_chunks(self.plan, self.schema)
        cache, formats = self._cache, self.schema.formats
        window = Window(cache.window, cache.window_positions)
        options: dict[str, Any] = {
            "size": self.schema.spec.window,
            "displaced": self.displaced,
            "sinks": sinks,
            "rotary": rotary,
            "scale": scale,
            "dtype": dtype,
        } | self._by
        if self.kind.compression is None:
            window, attended = ops.attend_window(
                window, queries, self.plan, self._window_row, format=formats.window_format, **options
            )
            return self._with(window=window.window, window_positions=window.positions), attended

        options |= {
            "ratio": self.kind.ratio,
            "window_format": formats.window_format,
            "entry_format": formats.entry_format,
        }
        name = self._name_of("entries")
        stored = (window, cache.pools[name], cache.block_table, queries)
        where = (self.plan, self._window_row, self._kind_row)
        if indices is None:
            most = self.schema.max_blocks * entries_per_block(self.kind.ratio) if entries is None else entries
            window, pool, attended = ops.attend_all_entries(*stored, *where, entries=most, **options)
        else:
            window, pool, attended = ops.attend_entries(*stored, indices, *where, **options)
        return self._with(**{"window": window.window, "window_positions": window.positions, name: pool}), attended

    def entries(self, indices: jax.Array, *, dtype: Any = jnp.bfloat16) -> tuple[LayerCache, Rows]:
        """Chosen entries of each token's request.

        Args:
          indices: int32 [tokens, count]; below 0 or not yet visible to the token: zeros, invalid.
          dtype: of the values, bfloat16 or float32.

        Returns:
          The handle and Rows [tokens, count].
        """
        name, ratio = self._name_of("entries"), self.kind.ratio
        self._require_written(FLUSH, "entries")
        pool, rows = ops.gather_entries(
            self._cache.pools[name],
            self._cache.block_table,
            self.plan,
            indices,
            self._kind_row,
            ratio=ratio,
            format=self.schema.formats.entry_format,
            dtype=dtype,
            **self._by,
        )
        return self._with(**{name: pool}), rows

    def all_entries(self, count: int, *, dtype: Any = jnp.bfloat16) -> tuple[LayerCache, Rows]:
        """Entries 0 .. count - 1 of each request, Rows [requests, count]; those that do not exist yet are invalid.

        In a step of several tokens per request, mask by ``visible``: an early token does not see the last entries.
        """
        name = self._name_of("entries")
        self._require_written(FLUSH, "all_entries")
        return self._all(name, count, self.schema.formats.entry_format, dtype)

    def all_keys(self, count: int, *, dtype: Any = jnp.bfloat16) -> tuple[LayerCache, Rows]:
        """Indexer keys 0 .. count - 1 of each request, Rows [requests, count] of width 128; CSA layers only."""
        name = self._name_of("keys")
        self._require_written(FLUSH_KEYS, "all_keys")
        return self._all(name, count, self.schema.formats.key_format, dtype)

    def transform_query(self, queries: jax.Array) -> jax.Array:
        """Indexer queries [..., 128] as the stored keys want them: Hadamard-transformed exactly if the keys are."""
        self._name_of("keys")
        return ops.hadamard_transform(queries) if self.schema.formats.keys_hadamard else queries

    def index_topk(
        self, queries: jax.Array, head_weights: jax.Array, *, k: int | None = None, scores: bool = False
    ) -> tuple[LayerCache, jax.Array] | tuple[LayerCache, jax.Array, jax.Array]:
        """The entries of each token that the indexer scores best, read from the keys where they lie; CSA layers only.

        Args:
          queries: float32 or bfloat16 [tokens, index_heads, 128], not transformed: the op transforms and rounds them
            as the stored keys want it, see ``dsv4_jax.ops.index_topk``.
          head_weights: float32 or bfloat16 [tokens, index_heads].
          k: how many; the model's ``index_topk`` by default.
          scores: whether to hand out the chosen scores too.

        Returns:
          The handle; int32 [tokens, k], the chosen entries, ascending, then -1; and with `scores` float32 [tokens, k].

        Raises:
          WrongLayerKind: the layer has no indexer.
          StepError: the layer is not written yet: entries that close in this step would be missed.
          OperandError: an operand does not fit, or does not have the model's index heads.
        """
        name, spec = self._name_of("keys"), self.schema.spec
        self._require_written(FLUSH_KEYS, "index_topk")
        if jnp.ndim(queries) == 3 and jnp.shape(queries)[1] != spec.index_num_heads:
            raise ops.OperandError(
                f"index_topk: queries have {jnp.shape(queries)[1]} heads, the model's indexer has "
                f"{spec.index_num_heads}."
            )
        made = ops.index_topk(
            self._cache.pools[name],
            self._cache.block_table,
            self.plan,
            queries,
            head_weights,
            self._kind_row,
            format=self.schema.formats.key_format,
            k=spec.index_topk if k is None else k,
            hadamard=self.schema.formats.keys_hadamard,
            scores=scores,
            **self._by,
        )
        handle = self._with(**{name: made[0]})
        return (handle, made[1], made[2]) if scores else (handle, made[1])

    # Which arrays and which of their rows are the layer's.

    @property
    def _cache(self) -> Cache:
        return self.step.cache

    @property
    def _by(self) -> dict[str, Any]:
        return {"implementation": self.step.implementation}

    @property
    def _name(self) -> str:
        return f"a {self.kind.name} layer" if self.layer is None else f"layer {self.layer} ({self.kind.name})"

    @property
    def _window_row(self) -> Any:
        return self._row("window")

    @property
    def _kind_row(self) -> Any:
        return self._row("compressed")

    def _row(self, pool: str) -> Any:
        if self.layer is not None:
            return getattr(self.schema.rows(self.layer), pool)
        rows = [
            getattr(self.schema.rows(layer), pool) if kind is self.kind else -1
            for layer, kind in enumerate(self.schema.spec.layer_kinds)
        ]
        return _look_up(rows, self.traced)

    def _with(self, **arrays: jax.Array) -> LayerCache:
        cache = self._cache.with_arrays(arrays)
        return dataclasses.replace(self, step=dataclasses.replace(self.step, cache=cache))

    def _written(self, *parts: str) -> LayerCache:
        """The handle with these parts ticked off."""
        again = [part for part in parts if part in self.written]
        if again:
            raise StepError(
                f"{self._name}: {', '.join(again)} a second time in one step, asked by "
                f"{'update' if len(parts) > 1 else again[0]}; a layer is "
                "written once, by update or by append, flush and flush_keys."
            )
        step = self.step
        if step.written is not None and self.layer is not None:
            step = dataclasses.replace(step, written=step.written | {(self.layer, part) for part in parts})
        return dataclasses.replace(self, step=step, written=self.written | set(parts))

    def _name_of(self, component: str) -> str:
        """The name in ``Cache.pools`` of one of the kind's arrays: entries, keys, tail or key_tail."""
        compression = self.kind.compression
        if compression is None:
            raise WrongLayerKind(f"{self._name} has no {component}; only layers that compress their context do.")
        if component.startswith("key") and not compression.indexed:
            raise WrongLayerKind(f"{self._name} has no indexer; only CSA layers do.")
        return f"{self.kind.value}_{component}"

    def _tails(self, compressor: Any, indexer: Any) -> dict[str, Any]:
        """The inputs of each of the kind's tails, by its name."""
        compression = self.kind.compression
        if compression is None:
            return {}
        tails = {self._name_of("tail"): compressor}
        return tails | {self._name_of("key_tail"): indexer} if compression.indexed else tails

    def _require_written(self, part: str, read: str) -> None:
        if part in parts_of(self.kind) and part not in self.written:
            raise StepError(
                f"{self._name}: {read} before {part} (or update) would read without what this step's tokens "
                "bring; write the layer first, and read from what that returns."
            )

    def _check_attended(self, indices: Any, entries: Any) -> None:
        compression = self.kind.compression
        takes = None if compression is None else "indices" if compression.indexed else "entries"
        for name, given in (("indices", indices), ("entries", entries)):
            if given is not None and name != takes:
                raise WrongLayerKind(
                    f"{self._name}: attend takes {takes or 'neither indices nor entries'}; got {name}."
                )
        if takes == "indices" and indices is None:
            raise WrongLayerKind(f"{self._name}: attend needs indices, the entries that its indexer chose.")

    def _check_inputs(self, compressor: Any, indexer: Any) -> None:
        compression = self.kind.compression
        needs = (compression is not None, compression is not None and compression.indexed)
        if (compressor is not None, indexer is not None) != needs:
            names = [name for name, needed in zip(("compressor", "indexer"), needs, strict=True) if needed]
            raise WrongLayerKind(
                f"{self._name} takes "
                f"{' and '.join(names) or 'neither compressor nor indexer'}; got "
                f"compressor={'None' if compressor is None else 'given'}, "
                f"indexer={'None' if indexer is None else 'given'}."
            )
        for name, inputs in (("compressor", compressor), ("indexer", indexer)):
            if inputs is not None:
                self._check_rotary(name, inputs.rotary, ("closing", self.kind.ratio))

    def _check_rotary(self, name: str, rotary: Rotary, purpose: Purpose) -> None:
        spec = self.schema.spec
        layers = range(len(spec.layers)) if self.layer is None else (self.layer,)
        ropes = {spec.layers[layer].rope for layer in layers if spec.layers[layer].kind is self.kind}
        wanted = "token_rotary(plan, rope)" if purpose == "tokens" else f"closing_rotary(plan, {self.kind.ratio}, rope)"
        if rotary.purpose != purpose:
            raise StepError(
                f"{self._name}: the rotary of {name} is for {_shown(rotary.purpose)}, expected that for "
                f"{_shown(purpose)}: {wanted}."
            )
        if rotary.rope is not None and rotary.rope not in ropes:
            raise StepError(
                f"{self._name}: the rotary of {name} was made with {rotary.rope}, the layer has "
                f"{' or '.join(map(str, ropes))}: {wanted} with the rope of spec.layers[layer]."
            )

    # One op on one of the layer's arrays.

    def _save_displaced(self, rows: jax.Array | RawRows) -> LayerCache:
        if not self.plan.layout.displaces:
            return self
        window, displaced = ops.save_displaced(
            Window(self._cache.window, self._cache.window_positions),
            self.normalize(rows) if isinstance(rows, RawRows) else rows,
            self.plan,
            self._window_row,
            format=self.schema.formats.window_format,
            size=self.schema.spec.window,
            **self._by,
        )
        handle = dataclasses.replace(self, displaced=displaced)
        return handle._with(window=window.window, window_positions=window.positions)

    def _window(self, dtype: Any, *, before: bool) -> tuple[LayerCache, Rows]:
        window, positions, read = ops.gather_window(
            self._cache.window,
            self._cache.window_positions,
            self.plan,
            self._window_row,
            format=self.schema.formats.window_format,
            dtype=dtype,
            rows=self.schema.spec.window - before,
            before=before,
            **self._by,
        )
        return self._with(window=window, window_positions=positions), read

    def _append_tail(self, name: str, inputs: CompressorInputs) -> LayerCache:
        tail = ops.append_tail(
            self._cache.pools[name],
            inputs.kv,
            inputs.gate,
            inputs.position_bias,
            self.plan,
            self._kind_row,
            ratio=self.kind.ratio,
            **self._by,
        )
        return self._with(**{name: tail})

    def _compress(self, name: str, inputs: CompressorInputs, *, hadamard: bool) -> tuple[LayerCache, jax.Array]:
        self._check_rotary("compressor", inputs.rotary, ("closing", self.kind.ratio))
        tail, entries = ops.compress(
            self._cache.pools[name],
            inputs.kv,
            inputs.gate,
            inputs.position_bias,
            inputs.norm_weight,
            inputs.rotary.cos,
            inputs.rotary.sin,
            self.plan,
            self._kind_row,
            ratio=self.kind.ratio,
            eps=self.schema.spec.norm_eps,
            hadamard=hadamard,
            **self._by,
        )
        return self._with(**{name: tail}), entries

    def _flush(self, name: str, rows: jax.Array, format: VectorFormat) -> LayerCache:
        pool = ops.flush(
            self._cache.pools[name],
            rows,
            self._cache.block_table,
            self.plan,
            self._kind_row,
            ratio=self.kind.ratio,
            format=format,
            **self._by,
        )
        return self._with(**{name: pool})

    def _all(self, name: str, count: int, format: VectorFormat, dtype: Any) -> tuple[LayerCache, Rows]:
        pool, rows = ops.gather_all_entries(
            self._cache.pools[name],
            self._cache.block_table,
            self.plan,
            self._kind_row,
            ratio=self.kind.ratio,
            format=format,
            entries=count,
            dtype=dtype,
            **self._by,
        )
        return self._with(**{name: pool}), rows


def _look_up(rows: Sequence[int], layer: jax.Array) -> jax.Array:
    """The row of a traced layer, -1 for a layer that does not exist."""
    if list(rows) == list(range(len(rows))):
        return layer  # every layer is its own row, and kernels skip what is out of range
    found = jnp.asarray(rows, jnp.int32)[jnp.clip(layer, 0, len(rows) - 1)]
    return jnp.where((layer >= 0) & (layer < len(rows)), found, -1)


def _shown(purpose: Purpose | None) -> str:
    if purpose is None:
        return "positions of no known purpose"
    return "the step's tokens" if purpose == "tokens" else f"closing entries of {purpose[1]} tokens"
