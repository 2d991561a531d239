"""LayerReads: what attention asks of a layer: the indexer's choice, attention itself, or dense rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self, overload

import jax.numpy as jnp

from dsv4_jax import ops
from dsv4_jax.cache import debug as run_time
from dsv4_jax.cache.errors import StepError, WrongLayerKind
from dsv4_jax.cache.layer_state import APPEND, FLUSH, FLUSH_KEYS, LayerState, parts_of
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.ops.attend.operands import Attended
from dsv4_jax.ops.operands import Rows, Window
from dsv4_jax.spec.kinds import HEAD_DIM, entries_per_block
from dsv4_jax.spec.rotary import Rotary

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32


class LayerReads(LayerState):
    """What reads; each returns the handle to go on with, and what was read."""

    @overload
    def index_topk(
        self,
        queries: Float[Array, "tokens index_heads 128"],
        head_weights: Float[Array, "tokens index_heads"],
        *,
        k: int | None = None,
        scores: Literal[False] = False,
    ) -> tuple[Self, Int32[Array, "tokens k"]]: ...
    @overload
    def index_topk(
        self,
        queries: Float[Array, "tokens index_heads 128"],
        head_weights: Float[Array, "tokens index_heads"],
        *,
        k: int | None = None,
        scores: Literal[True],
    ) -> tuple[Self, Int32[Array, "tokens k"], Float32[Array, "tokens k"]]: ...
    def index_topk(
        self,
        queries: Float[Array, "tokens index_heads 128"],
        head_weights: Float[Array, "tokens index_heads"],
        *,
        k: int | None = None,
        scores: bool = False,
    ) -> tuple[Self, Int32[Array, "tokens k"]] | tuple[Self, Int32[Array, "tokens k"], Float32[Array, "tokens k"]]:
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

    def attend(
        self,
        queries: Float[Array, "tokens heads 512"],
        sinks: Float[Array, " heads"] | None = None,
        *,
        indices: Int32[Array, "tokens count"] | None = None,
        entries: int | None = None,
        scale: float = HEAD_DIM**-0.5,
        rotary: Rotary | None = None,
        dtype: Any = jnp.bfloat16,
    ) -> tuple[Self, Attended]:
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

    def window_before(self, *, dtype: Any = jnp.bfloat16) -> tuple[Self, Rows]:
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

    def window(self, *, dtype: Any = jnp.bfloat16) -> tuple[Self, Rows]:
        """The window of each request's last token, itself included; call after ``append`` or ``update``.

        This is all that a step of one token per request needs. Returns the handle and Rows [requests, window].
        """
        self._require_written(APPEND, "window")
        return self._window(dtype, before=False)

    def stored(self, rows: Float[Array, "tokens 512"], *, dtype: Any = jnp.bfloat16) -> Float[Array, "tokens 512"]:
        """The step's own window rows as they are (or would be) stored: quantized and back, [tokens, 512].

        Every token of a step attends to these, not to the exact rows, so that what it sees does not depend on how the
        prompt was cut into steps.
        """
        format = self.schema.formats.window_format
        page = ops.quantize(rows, format=format, **self._by)
        return ops.dequantize(page, format=format, rows=rows.shape[0], dtype=dtype, **self._by)

    def entries(self, indices: Int32[Array, "tokens count"], *, dtype: Any = jnp.bfloat16) -> tuple[Self, Rows]:
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

    def all_entries(self, count: int, *, dtype: Any = jnp.bfloat16) -> tuple[Self, Rows]:
        """Entries 0 .. count - 1 of each request, Rows [requests, count]; those that do not exist yet are invalid.

        In a step of several tokens per request, mask by ``visible``: an early token does not see the last entries.
        """
        name = self._name_of("entries")
        self._require_written(FLUSH, "all_entries")
        return self._all(name, count, self.schema.formats.entry_format, dtype)

    def all_keys(self, count: int, *, dtype: Any = jnp.bfloat16) -> tuple[Self, Rows]:
        """Indexer keys 0 .. count - 1 of each request, Rows [requests, count] of width 128; CSA layers only."""
        name = self._name_of("keys")
        self._require_written(FLUSH_KEYS, "all_keys")
        return self._all(name, count, self.schema.formats.key_format, dtype)

    def transform_query(self, queries: Float[Array, "... 128"]) -> Float[Array, "... 128"]:
        """Indexer queries [..., 128] as the stored keys want them: Hadamard-transformed exactly if the keys are."""
        self._name_of("keys")
        return ops.hadamard_transform(queries) if self.schema.formats.keys_hadamard else queries

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

    def _window(self, dtype: Any, *, before: bool) -> tuple[Self, Rows]:
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

    def _all(self, name: str, count: int, format: VectorFormat, dtype: Any) -> tuple[Self, Rows]:
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
