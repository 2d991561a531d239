"""LayerCache: what an attention layer is given to read and write its part of the cache; and begin_step, before them.

Functional throughout: a method that writes or reads the cache returns a new handle, and ``handle.cache`` goes on to the
next layer. Making a handle allocates nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax import ops
from dsv4_jax.cache.pools import Cache
from dsv4_jax.errors import Picklable
from dsv4_jax.layout.formats import VectorFormat
from dsv4_jax.layout.plan import StepPlan
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.ops import Implementation
from dsv4_jax.ops.operands import Compressed, CompressorInputs, RawRows, Rows, Window
from dsv4_jax.spec.kinds import LayerKind


class WrongLayerKind(Picklable, TypeError):
    """An operation that the layer's kind does not have, such as keys of an HCA layer."""


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's part of the cache during one step.

    Attributes:
      cache: the whole cache; take it from the last handle.
      plan: the step's.
      layer: index of the layer in the model.
      implementation: who runs the ops.
      layer_index: index of the layer in the window pool, ``layer`` unless given; may be traced, for a scan over layers.
      kind_index: index of the layer among those of its kind, from the model unless given; may be traced. In a scan,
        ``layer`` is any one layer of the kind that is scanned over.
    """

    cache: Cache
    plan: StepPlan
    layer: int
    implementation: Implementation = "native"
    layer_index: Any = None
    kind_index: Any = None

    @property
    def schema(self) -> CacheSchema:
        """What the cache looks like."""
        return self.cache.schema

    @property
    def kind(self) -> LayerKind:
        """The layer's kind."""
        return self.schema.spec.layers[self.layer].kind

    @property
    def visible(self) -> jax.Array:
        """int32 [tokens]: how many entries each token sees, ``(position + 1) // ratio``; 0 for padding."""
        ratio = self._ratio("entries")
        return (jnp.asarray(self.plan.token_position) + 1) // ratio

    def window_before(self, *, dtype: Any = jnp.bfloat16) -> tuple[LayerCache, Rows]:
        """The window rows of earlier steps that this step's tokens still see; call before ``append`` or ``update``.

        Returns:
          The handle, and Rows [requests, window - 1]: row j is position ``start - window + 1 + j`` of a request whose
          first token of the step is at ``start``. That token sees all of them, a later one those that are less than
          ``window`` before it.
        """
        return self._window(dtype, before=True)

    def window(self, *, dtype: Any = jnp.bfloat16) -> tuple[LayerCache, Rows]:
        """The window of each request's last token, itself included; call after ``append`` or ``update``.

        This is all that a step of one token per request needs. Returns the handle and Rows [requests, window].
        """
        return self._window(dtype, before=False)

    def stored(self, rows: jax.Array, *, dtype: Any = jnp.bfloat16) -> jax.Array:
        """The step's own window rows as they are (or would be) stored: quantized and back, [tokens, 512].

        Every token of a step attends to these, not to the exact rows, so that what it sees does not depend on how the
        prompt was cut into steps.
        """
        format = self.schema.formats.window_format
        page = ops.quantize(rows, format=format, implementation=self.implementation)
        return ops.dequantize(page, format=format, rows=rows.shape[0], dtype=dtype, implementation=self.implementation)

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
        """
        self._check_inputs(compressor, indexer)
        format = self.schema.formats.window_format
        window, positions = ops.append_window(
            self.cache.window,
            self.cache.window_positions,
            rows,
            self.plan,
            self._layer_index,
            format=format,
            implementation=self.implementation,
        )
        handle = self._with(window=window, window_positions=positions)
        for name, inputs in self._tails(compressor, indexer).items():
            handle = handle._append_tail(name, inputs)
        return handle

    def compress(self, compressor: CompressorInputs) -> tuple[LayerCache, jax.Array]:
        """The entries that this step closes, float32 [closing, 512]; see ``dsv4_jax.ops.compress``.

        Call before ``append`` (any number of tokens per request), or after it if every request brings one token.
        """
        return self._compress(self._tail_name("entries"), compressor, hadamard=False)

    def compress_keys(self, indexer: CompressorInputs) -> tuple[LayerCache, jax.Array]:
        """The indexer keys that this step closes, float32 [closing, 128]; CSA layers only."""
        self._require_csa()
        return self._compress("key_tail", indexer, hadamard=self.schema.formats.indexer_hadamard)

    def flush(self, entries: jax.Array) -> LayerCache:
        """Stores what ``compress`` returned in the blocks of its requests."""
        return self._flush(self._entries_name, entries, self.schema.formats.entry_format)

    def flush_keys(self, keys: jax.Array) -> LayerCache:
        """Stores what ``compress_keys`` returned; CSA layers only."""
        self._require_csa()
        return self._flush("csa_keys", keys, self.schema.formats.key_format)

    def rotate(self) -> LayerCache:
        """Clears what closed windows leave in the tails; call after ``append``, ``compress`` and ``flush``."""
        handle = self
        for name in self._tails(None, None):
            tail = ops.rotate(
                getattr(handle.cache, name),
                self.plan,
                self._kind_index,
                ratio=self.kind.ratio,
                implementation=self.implementation,
            )
            handle = handle._with(**{name: tail})
        return handle

    def normalize(self, raw: RawRows) -> jax.Array:
        """Raw window rows finished (RMSNorm, RoPE), float32 [tokens, 512]: what attention and ``append`` take."""
        return ops.normalize(raw, eps=self.schema.spec.norm_eps, implementation=self.implementation)

    def update(
        self,
        rows: jax.Array | RawRows,
        compressor: CompressorInputs | None = None,
        indexer: CompressorInputs | None = None,
    ) -> LayerCache:
        """All writes of one layer and step in one op, for any number of tokens per request.

        Stores what ``compress``, ``flush`` and ``append`` store. Tail rows that no later entry will pool are left as
        they are instead of cleared (``rotate``); nothing reads them either way.

        Args:
          rows: [tokens, 512] finished window rows, or ``RawRows`` to be normalized and rotated on the way.
          compressor: required for CSA and HCA layers, None for SWA.
          indexer: required for CSA layers, None otherwise.

        Raises:
          WrongLayerKind: the inputs are not those of the layer's kind.
        """
        self._check_inputs(compressor, indexer)
        cache, formats, eps = self.cache, self.schema.formats, self.schema.spec.norm_eps
        window = Window(cache.window, cache.window_positions)
        if self.kind is LayerKind.SWA:
            window = ops.update_swa(
                window,
                rows,
                self.plan,
                self._layer_index,
                format=formats.window_format,
                eps=eps,
                implementation=self.implementation,
            )
            return self._with(window=window.window, window_positions=window.positions)

        where = (cache.block_table, self.plan, self._layer_index, self._kind_index)
        options = {"window_format": formats.window_format, "entry_format": formats.entry_format, "eps": eps}
        if self.kind is LayerKind.HCA:
            entries = Compressed(cache.hca_entries, cache.hca_tail)
            window, entries = ops.update_hca(
                window, entries, rows, compressor, *where, **options, implementation=self.implementation
            )
            arrays = {"hca_entries": entries.pool, "hca_tail": entries.tail}
        else:
            window, entries, keys = ops.update_csa(
                window,
                Compressed(cache.csa_entries, cache.csa_tail),
                Compressed(cache.csa_keys, cache.key_tail),
                rows,
                compressor,
                indexer,
                *where,
                key_format=formats.key_format,
                hadamard=formats.indexer_hadamard,
                **options,
                implementation=self.implementation,
            )
            arrays = {"csa_entries": entries.pool, "csa_tail": entries.tail}
            arrays |= {"csa_keys": keys.pool, "key_tail": keys.tail}
        return self._with(window=window.window, window_positions=window.positions, **arrays)

    def entries(self, indices: jax.Array, *, dtype: Any = jnp.bfloat16) -> tuple[LayerCache, Rows]:
        """Chosen entries of each token's request.

        Args:
          indices: int32 [tokens, count]; below 0 or not yet visible to the token: zeros, invalid.
          dtype: of the values, bfloat16 or float32.

        Returns:
          The handle and Rows [tokens, count].
        """
        name, ratio = self._entries_name, self.kind.ratio
        pool, rows = ops.gather_entries(
            getattr(self.cache, name),
            self.cache.block_table,
            self.plan,
            indices,
            self._kind_index,
            ratio=ratio,
            format=self.schema.formats.entry_format,
            dtype=dtype,
            implementation=self.implementation,
        )
        return self._with(**{name: pool}), rows

    def all_entries(self, count: int, *, dtype: Any = jnp.bfloat16) -> tuple[LayerCache, Rows]:
        """Entries 0 .. count - 1 of each request, Rows [requests, count]; those that do not exist yet are invalid.

        In a step of several tokens per request, mask by ``visible``: an early token does not see the last entries.
        """
        return self._all(self._entries_name, count, self.schema.formats.entry_format, dtype)

    def all_keys(self, count: int, *, dtype: Any = jnp.bfloat16) -> tuple[LayerCache, Rows]:
        """Indexer keys 0 .. count - 1 of each request, Rows [requests, count] of width 128; CSA layers only."""
        self._require_csa()
        return self._all("csa_keys", count, self.schema.formats.key_format, dtype)

    def transform_query(self, queries: jax.Array) -> jax.Array:
        """Indexer queries [..., 128] as the stored keys want them: Hadamard-transformed exactly if the keys are."""
        self._require_csa()
        return ops.hadamard_transform(queries) if self.schema.formats.indexer_hadamard else queries

    # Which arrays are the layer's.

    @property
    def _layer_index(self) -> Any:
        return self.layer if self.layer_index is None else self.layer_index

    @property
    def _kind_index(self) -> Any:
        return self.schema.spec.kind_index(self.layer) if self.kind_index is None else self.kind_index

    def _with(self, **arrays: jax.Array) -> LayerCache:
        return dataclasses.replace(self, cache=dataclasses.replace(self.cache, **arrays))

    def _ratio(self, what: str) -> int:
        if self.kind is LayerKind.SWA:
            raise WrongLayerKind(f"layer {self.layer} is SWA and has no {what}; only CSA and HCA layers do.")
        return self.kind.ratio

    def _require_csa(self) -> None:
        if self.kind is not LayerKind.CSA:
            raise WrongLayerKind(f"layer {self.layer} is {self.kind.name} and has no indexer; only CSA layers do.")

    def _tail_name(self, what: str) -> str:
        self._ratio(what)
        return "csa_tail" if self.kind is LayerKind.CSA else "hca_tail"

    @property
    def _entries_name(self) -> str:
        self._ratio("entries")
        return "csa_entries" if self.kind is LayerKind.CSA else "hca_entries"

    def _tails(self, compressor: Any, indexer: Any) -> dict[str, Any]:
        tails = {
            LayerKind.SWA: {},
            LayerKind.CSA: {"csa_tail": compressor, "key_tail": indexer},
            LayerKind.HCA: {"hca_tail": compressor},
        }
        return tails[self.kind]

    def _check_inputs(self, compressor: Any, indexer: Any) -> None:
        needs = (self.kind is not LayerKind.SWA, self.kind is LayerKind.CSA)
        if (compressor is not None, indexer is not None) != needs:
            names = [name for name, needed in zip(("compressor", "indexer"), needs, strict=True) if needed]
            raise WrongLayerKind(
                f"layer {self.layer} is {self.kind.name} and takes "
                f"{' and '.join(names) or 'neither compressor nor indexer'}; got "
                f"compressor={'None' if compressor is None else 'given'}, "
                f"indexer={'None' if indexer is None else 'given'}."
            )

    # One op on one of the layer's arrays.

    def _window(self, dtype: Any, *, before: bool) -> tuple[LayerCache, Rows]:
        window, positions, rows = ops.gather_window(
            self.cache.window,
            self.cache.window_positions,
            self.plan,
            self._layer_index,
            format=self.schema.formats.window_format,
            dtype=dtype,
            rows=self.schema.spec.window - before,
            before=before,
            implementation=self.implementation,
        )
        return self._with(window=window, window_positions=positions), rows

    def _append_tail(self, name: str, inputs: CompressorInputs) -> LayerCache:
        tail = ops.append_tail(
            getattr(self.cache, name),
            inputs.kv,
            inputs.gate,
            inputs.position_bias,
            self.plan,
            self._kind_index,
            ratio=self.kind.ratio,
            implementation=self.implementation,
        )
        return self._with(**{name: tail})

    def _compress(self, name: str, inputs: CompressorInputs, *, hadamard: bool) -> tuple[LayerCache, jax.Array]:
        tail, entries = ops.compress(
            getattr(self.cache, name),
            inputs.kv,
            inputs.gate,
            inputs.position_bias,
            inputs.norm_weight,
            inputs.rotary.cos,
            inputs.rotary.sin,
            self.plan,
            self._kind_index,
            ratio=self.kind.ratio,
            eps=self.schema.spec.norm_eps,
            hadamard=hadamard,
            implementation=self.implementation,
        )
        return self._with(**{name: tail}), entries

    def _flush(self, name: str, rows: jax.Array, format: VectorFormat) -> LayerCache:
        pool = ops.flush(
            getattr(self.cache, name),
            rows,
            self.cache.block_table,
            self.plan,
            self._kind_index,
            ratio=self.kind.ratio,
            format=format,
            implementation=self.implementation,
        )
        return self._with(**{name: pool})

    def _all(self, name: str, count: int, format: VectorFormat, dtype: Any) -> tuple[LayerCache, Rows]:
        pool, rows = ops.gather_all_entries(
            getattr(self.cache, name),
            self.cache.block_table,
            self.plan,
            self._kind_index,
            ratio=self.kind.ratio,
            format=format,
            entries=count,
            dtype=dtype,
            implementation=self.implementation,
        )
        return self._with(**{name: pool}), rows
