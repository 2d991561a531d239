"""LayerWrites: how a step's tokens are stored in a layer: in one call, ``update``, or compress, flush and append."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Self

import jax

from dsv4_jax import ops
from dsv4_jax.cache.errors import WrongLayerKind
from dsv4_jax.cache.layer_state import APPEND, FLUSH, FLUSH_KEYS, LayerState, parts_of
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.ops.operands import Compressed, CompressorInputs, RawRows, Window
from dsv4_jax.spec.kinds import LayerKind

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


class LayerWrites(LayerState):
    """What stores rows, entries and keys; each returns the handle to go on with."""

    def update(
        self,
        rows: Float[Array, "tokens 512"] | RawRows,
        compressor: CompressorInputs | None = None,
        indexer: CompressorInputs | None = None,
    ) -> Self:
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

        where = (cache.write_table, self.plan, self._window_row, self._kind_row)
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

    def append(
        self,
        rows: Float[Array, "tokens 512"],
        compressor: CompressorInputs | None = None,
        indexer: CompressorInputs | None = None,
    ) -> Self:
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

    def compress(self, compressor: CompressorInputs) -> tuple[Self, Float32[Array, "closing 512"]]:
        """The entries that this step closes, float32 [closing, 512]; see ``dsv4_jax.ops.compress``.

        Call before ``append`` (any number of tokens per request), or after it if every request brings one token.
        """
        return self._compress(self._name_of("tail"), compressor, hadamard=False)

    def compress_keys(self, indexer: CompressorInputs) -> tuple[Self, Float32[Array, "closing 128"]]:
        """The indexer keys that this step closes, float32 [closing, 128]; CSA layers only."""
        return self._compress(self._name_of("key_tail"), indexer, hadamard=self.schema.formats.keys_hadamard)

    def flush(self, entries: Float32[Array, "closing 512"]) -> Self:
        """Stores what ``compress`` returned in the blocks of its requests."""
        return self._written(FLUSH)._flush(self._name_of("entries"), entries, self.schema.formats.entry_format)

    def flush_keys(self, keys: Float32[Array, "closing 128"]) -> Self:
        """Stores what ``compress_keys`` returned; CSA layers only."""
        return self._written(FLUSH_KEYS)._flush(self._name_of("keys"), keys, self.schema.formats.key_format)

    def normalize(self, raw: RawRows) -> Float32[Array, "tokens 512"]:
        """Raw window rows finished (RMSNorm, RoPE), float32 [tokens, 512]: what attention and ``append`` take."""
        self._check_rotary("rows", raw.rotary, "tokens")
        return ops.normalize(raw, eps=self.schema.spec.norm_eps, **self._by)

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

    def _tails(self, compressor: Any, indexer: Any) -> dict[str, Any]:
        """The inputs of each of the kind's tails, by its name."""
        compression = self.kind.compression
        if compression is None:
            return {}
        tails = {self._name_of("tail"): compressor}
        return tails | {self._name_of("key_tail"): indexer} if compression.indexed else tails

    def _save_displaced(self, rows: jax.Array | RawRows) -> Self:
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

    def _append_tail(self, name: str, inputs: CompressorInputs) -> Self:
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

    def _compress(self, name: str, inputs: CompressorInputs, *, hadamard: bool) -> tuple[Self, jax.Array]:
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

    def _flush(self, name: str, rows: jax.Array, format: VectorFormat) -> Self:
        pool = ops.flush(
            self._cache.pools[name],
            rows,
            self._cache.write_table,
            self.plan,
            self._kind_row,
            ratio=self.kind.ratio,
            format=format,
            **self._by,
        )
        return self._with(**{name: pool})
