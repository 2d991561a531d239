"""The shapes and bytes of a model's cache, before there is one: ``CacheSchema``.

A layer keeps its sliding window and tail per *slot* (one request's row) and its entries and keys per *block* (128
tokens of context). A model's cache stacks the layers of a kind: one array per component, layers in front, so that a
step passes few arrays whatever the number of layers is. Block ids and slots are shared by all layers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import operator
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.errors import Picklable
from dsv4_jax.json_text import parse_json
from dsv4_jax.layout.formats import CacheFormats
from dsv4_jax.layout.layer_schema import Arrays, LayerCacheSchema, array_bytes
from dsv4_jax.spec.kinds import BLOCK_TOKENS, LayerKind
from dsv4_jax.spec.model import LayerSpec, ModelSpec, RopeSpec

LARGEST_INDEX = 2**31 - 1
"""Slots, block ids and positions are int32."""

TABLES: tuple[str, ...] = ("block_table", "write_table")
"""The arrays that name a slot's blocks: those that it reads, and those that it stores in."""


class LayerRows(NamedTuple):
    """Where a layer's part of the cache lies: indices along the first axis of its arrays.

    Attributes:
      window: of ``window`` and ``window_positions``.
      compressed: of its kind's pools and tails; None for SWA, which has none.
    """

    window: int
    compressed: int | None


class SchemaError(Picklable, ValueError):
    """A cache that cannot be: a size out of range, or more than the memory given for it."""


def integer(value: Any) -> int | None:
    """An int, NumPy's included, as an int; None for anything else, bools too."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


@dataclasses.dataclass(frozen=True)
class CacheSchema:
    """What the cache of a whole model looks like; hashable, the static part of a ``Cache``.

    Attributes:
      spec: the model.
      formats: how vectors are stored.
      slots: requests that can be in the cache at the same time.
      blocks: blocks of 128 tokens shared by all slots; 0 is allowed only for a model without CSA and HCA layers.
      max_context: longest context of a request in tokens, at most ``spec.max_position``.
      lookahead: how many of a request's latest tokens can always be taken back (``CacheManager.truncate``), and so how
        many drafts a step may bring. Every ring is that much deeper; with CSA layers, that of a tail by whole windows
        of 4. A running HCA tail (``CacheFormats.hca_tail``) keeps that many states more, 6 KiB each.
      snapshots: how many prefixes can be kept for requests that begin alike (``CacheManager.match_prefix``). A snapshot
        is what a slot holds of its own between two blocks of 128 tokens, ``bytes_per_snapshot``; it lies behind the
        slots in each array that has such.

    Raises:
      SchemaError: a number is out of range, or spec or formats is something else.
    """

    spec: ModelSpec
    formats: CacheFormats
    slots: int
    blocks: int
    max_context: int
    lookahead: int = 0
    snapshots: int = 0

    def __post_init__(self) -> None:
        for name, wanted, example in (
            ("spec", ModelSpec, "model_spec(config) makes one of a config.json"),
            ("formats", CacheFormats, "CacheFormats(entries='fp8') or PROFILES['default']"),
        ):
            if not isinstance(getattr(self, name), wanted):
                raise SchemaError(f"{name} must be a {wanted.__name__}, got {getattr(self, name)!r}: {example}.")
        compressed = any(kind.compression for kind in self.spec.layer_kinds)
        for name, smallest, largest, reason in (
            ("slots", 1, LARGEST_INDEX, "slots are int32"),
            ("blocks", int(compressed), LARGEST_INDEX, "block ids are int32, and CSA and HCA layers need blocks"),
            ("max_context", 1, self.spec.max_position, f"max_position of {self.spec.name} is {self.spec.max_position}"),
            ("snapshots", 0, LARGEST_INDEX // 2, "slots and snapshots lie in one array"),
            ("lookahead", 0, self.spec.max_position, f"max_position of {self.spec.name} is {self.spec.max_position}"),
        ):
            value = integer(getattr(self, name))
            if value is None or not smallest <= value <= largest:
                raise SchemaError(
                    f"{name} must be an int from {smallest} to {largest} ({reason}), got {getattr(self, name)!r}."
                )
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        # Hashed at every call of a jitted function that is given a Cache: the layers would take most of the call.
        return hash((self.slots, self.blocks, self.max_context, self.lookahead, self.snapshots, len(self.spec.layers)))

    def __reduce__(self) -> tuple[object, ...]:
        # Copies and pickles carry the fields, not what was derived from them.
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def ring(self) -> int:
        """Rows of a window's ring: ``spec.window + lookahead``. The row of a position is its remainder by this."""
        return self.spec.window + self.lookahead

    @property
    def max_blocks(self) -> int:
        """Blocks of a request at ``max_context``, the width of the tables."""
        return math.ceil(self.max_context / BLOCK_TOKENS)

    @functools.cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of the model's layers that compress their context, those with the smallest ratio first."""
        return tuple(sorted({kind for kind in self.spec.layer_kinds if kind.compression}, key=lambda kind: kind.ratio))

    def layer(self, layer: int) -> LayerCacheSchema:
        """What one layer of the model caches.

        Raises:
          IndexError: ``layer`` is negative or not less than the number of layers.
        """
        self._check_layer(layer)
        return self._of_kind(self.spec.layers[layer].kind)

    def rows(self, layer: int) -> LayerRows:
        """Which row of the window pool and of its kind's arrays a layer writes and reads.

        Raises:
          IndexError: ``layer`` is negative or not less than the number of layers.
        """
        self._check_layer(layer)
        return self._rows[layer]

    @functools.cached_property
    def _rows(self) -> tuple[LayerRows, ...]:
        count = dict.fromkeys(self.kinds, 0)
        rows = []
        for layer, kind in enumerate(self.spec.layer_kinds):
            rows.append(LayerRows(layer, count.get(kind)))
            if kind in count:
                count[kind] += 1
        return tuple(rows)

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < len(self.spec.layers):
            raise IndexError(f"{self.spec.name} has layers 0 to {len(self.spec.layers) - 1}, got {layer}.")

    def _of_kind(self, kind: LayerKind) -> LayerCacheSchema:
        return LayerCacheSchema(kind, self.formats, self.spec.window, self.lookahead)

    @functools.cached_property
    def block_pools(self) -> tuple[str, ...]:
        """Names of the arrays that have a page per block: ``{kind}_entries``, ``{kind}_keys``."""
        return tuple(f"{kind.value}_{name}" for kind in self.kinds for name in self._of_kind(kind).block_arrays)

    @functools.cached_property
    def tails(self) -> tuple[str, ...]:
        """Names of the arrays of what waits to be compressed, a row per slot: ``{kind}_tail``, ``{kind}_key_tail``."""
        return tuple(
            f"{kind.value}_{name}" for kind in self.kinds for name in self._of_kind(kind).slot_arrays if "tail" in name
        )

    @functools.cached_property
    def pools(self) -> tuple[str, ...]:
        """Names of the arrays that a kind has of its own, in order: block_pools, then tails."""
        return (*self.block_pools, *self.tails)

    @functools.cached_property
    def arrays(self) -> Arrays:
        """Shape and dtype of every array of the cache, by name. Kinds that no layer has, have no arrays.

        =================  ==========================================================================
        block_table        int32 [slots, max_blocks], -1 = no block
        write_table        int32 [slots, max_blocks], -1 = no block, or one that is only read
        window             [layers, slots, *page of ring rows]
        window_positions   int32 [layers, slots, ring], -1 = empty row
        csa_entries        [CSA layers, blocks, *page of 32 rows]
        csa_keys           [CSA layers, blocks, *page of 32 rows]
        hca_entries        [HCA layers, blocks, *page of 1 row]
        csa_tail           fp32 [CSA layers, slots, 2 (kv, score), 12, 512]
        csa_key_tail       fp32 [CSA layers, slots, 2 (kv, score), 12, 128]
        hca_tail           fp32 [HCA layers, slots, 2 (kv, score), 128, 512], or, running,
                           fp32 [HCA layers, slots, 3 (max, denominator, sum), 512]
        =================  ==========================================================================

        With ``snapshots``, there are slots + snapshots wherever it says slots, but for hca_tail: between two blocks
        nothing of it is in use.

        With ``lookahead``, tails have more rows: CSA 12 + 2 d, d being lookahead rounded up to a multiple of 4, and HCA
        128 + lookahead; running, 3 (1 + lookahead), the states after the latest tokens one behind the other.
        """
        layers = len(self.spec.layers)
        any_layer = self._of_kind(LayerKind.SWA).slot_arrays
        slots = self.slots + self.snapshots
        arrays = dict.fromkeys(TABLES, jax.ShapeDtypeStruct((slots, self.max_blocks), jnp.int32))
        for name, array in any_layer.items():
            arrays[name] = jax.ShapeDtypeStruct((layers, slots, *array.shape), array.dtype)
        of_kinds = {}
        for kind in self.kinds:
            of_kind, count = self._of_kind(kind), self.spec.count(kind)
            with_tails = self.slots if kind.ratio == BLOCK_TOKENS else slots
            for size, components in ((self.blocks, of_kind.block_arrays), (with_tails, of_kind.slot_arrays)):
                for name, array in components.items():
                    stacked = jax.ShapeDtypeStruct((count, size, *array.shape), array.dtype)
                    of_kinds[f"{kind.value}_{name}"] = stacked
        return MappingProxyType(arrays | {name: of_kinds[name] for name in self.pools})

    @property
    def bytes_by_component(self) -> dict[str, int]:
        """Bytes of every array of the cache, by name."""
        return array_bytes(self.arrays)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the whole cache."""
        return sum(self.bytes_by_component.values())

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block of 128 tokens takes, all layers together."""
        return sum(sum(self.layer(layer).block_bytes.values()) for layer in range(len(self.spec.layers)))

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one request takes whatever its length, all layers and its rows of the tables together."""
        layers = range(len(self.spec.layers))
        return sum(sum(self.layer(layer).slot_bytes.values()) for layer in layers) + self.table_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of one slot's rows of the tables."""
        return len(TABLES) * 4 * self.max_blocks

    @property
    def bytes_per_snapshot(self) -> int:
        """Bytes that one snapshot takes: a slot, without what windows of 128 tokens keep in their tails."""
        kinds = (self._of_kind(kind) for kind in self.spec.layer_kinds if kind.ratio == BLOCK_TOKENS)
        return self.bytes_per_slot - sum(kind.slot_bytes["tail"] for kind in kinds)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token of context takes on average, all layers together."""
        return self.bytes_per_block / BLOCK_TOKENS

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits, the same for equal schemas and in every process: what a plan or a file was made for."""
        described = json.loads(self.to_json(), parse_int=float)  # 1 and 1.0 make equal schemas
        del described["spec"]["name"]
        described["arrays"] = {name: [array.shape, array.dtype.name] for name, array in self.arrays.items()}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The schema as a JSON object, from which ``from_json`` makes an equal one."""
        return json.dumps(dataclasses.asdict(self), default=lambda kind: kind.value)

    @classmethod
    def from_json(cls, text: str) -> CacheSchema:
        """The schema that ``to_json`` wrote.

        Raises:
          SchemaError: the text is something else.
        """
        try:
            fields = parse_json(text)
            layers = tuple(
                LayerSpec(LayerKind(layer["kind"]), RopeSpec(**layer["rope"])) for layer in fields["spec"].pop("layers")
            )
            spec = ModelSpec(**fields.pop("spec"), layers=layers)
            return cls(spec=spec, formats=CacheFormats(**fields.pop("formats")), **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SchemaError(f"this is no cache schema as CacheSchema.to_json writes it: {error}") from error


def compute_block_budget(
    memory_bytes: int,
    spec: ModelSpec,
    formats: CacheFormats,
    *,
    slots: int,
    max_context: int,
    lookahead: int = 0,
    snapshots: int = 0,
) -> int:
    """The number of blocks with which a cache fills the memory it is given.

    Args:
      memory_bytes: bytes that all arrays of the cache may take together.
      spec: the model.
      formats: how vectors are stored.
      slots: as in ``CacheSchema``; so are the next two.
      max_context: longest context of a request in tokens.
      lookahead: as in ``CacheSchema``; so are snapshots.
      snapshots: see there.

    Returns:
      The largest ``blocks`` whose ``CacheSchema(...).memory_bytes`` is at most ``memory_bytes``: at least 1, or 0 for
      a model without CSA and HCA layers. More than ``slots * max_blocks`` are never in use at the same time.

    Raises:
      SchemaError: the slots alone, or with one block, take more than that; or a number is out of range.
    """
    smallest = CacheSchema(spec, formats, slots, 1, max_context, lookahead, snapshots)
    fixed = slots * smallest.bytes_per_slot + snapshots * smallest.bytes_per_snapshot
    per_block = smallest.bytes_per_block
    if memory_bytes < fixed + per_block:
        kept = f", {snapshots} snapshots of {smallest.bytes_per_snapshot:,}" if snapshots else ""
        raise SchemaError(
            f"{memory_bytes:,} bytes do not hold {slots} slots of {smallest.bytes_per_slot:,} bytes{kept} and one "
            f"block of {per_block:,} ({fixed + per_block:,} bytes); give more memory, or ask for fewer slots or "
            "smaller formats."
        )
    return int(min((memory_bytes - fixed) // per_block, LARGEST_INDEX)) if per_block else 0
