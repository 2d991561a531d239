"""A cache that is driven by hand, beside texts that know what each of their tokens must have left in it.

A token's vectors follow from a hash of it and of all tokens before it. So equal beginnings bring equal vectors, as in a
model, and a row that was computed after any other beginning differs. What must be stored is never read back from the
cache under test: window rows are the vectors themselves, and entries and keys are what the same operations store if
the whole text is brought in one step to a cache of one slot, where nothing is shared, taken back, or cut.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from harness import SPEC, random_tokens, random_weights, reader, update

from dsv4_jax import CacheFormats, CacheManager, CacheSchema, LayerKind, apply_transfers, init_cache
from dsv4_jax.host.planning import build_plan
from dsv4_jax.layout.plan import PlanLayout
from dsv4_jax.layout.schema import TABLES

CONTEXT = 640
"""Tokens of a text, all of which a request has room for."""

SLOTS = 4
SIZES = {"slots": SLOTS, "blocks": 11, "max_context": CONTEXT, "snapshots": 5}
BUCKETS = (SLOTS, 300)
BANK = 512
ROTATE = 0x9E3779B97F4A7C15


@functools.cache
def material():
    """Weights, and the rows that tokens' vectors are sums of; the last one is NaN, what padding brings."""
    rng = np.random.default_rng(0)
    bank = random_tokens(rng, BANK + 1)
    for layer in bank:
        for rows in layer.values():
            rows[BANK] = np.nan
    return random_weights(rng), bank


@functools.cache
def on_device():
    """The same, on the default device."""
    return jax.device_put(material())


def chain(ids, root):
    """uint64 [n]: of each token a hash of it and of all before it."""
    hashes, value = np.empty(len(ids), np.uint64), root
    for place, token in enumerate(ids.tolist()):
        value = ((value ^ (token + 1)) * ROTATE) % 2**64
        value ^= value >> 29
        hashes[place] = value
    return hashes


def bank_rows(hashes):
    """int32 [2, n]: the two rows of the bank whose sum is a token's vectors."""
    return np.stack([hashes % BANK, (hashes >> np.uint64(32)) % BANK]).astype(np.int32)


class Text:
    """CONTEXT tokens, and what each of them leaves in a cache.

    Attributes:
      ids: int32 [CONTEXT].
      rows: int32 [2, CONTEXT], of the bank.
      window: of each layer, float32 [CONTEXT, 512].
      pools: of each layer, name -> float32 [entries, width].
    """

    def __init__(self, ids, salt, alone):
        self.ids, self.salt, self._alone = ids, salt, alone
        self.rows = bank_rows(chain(ids, 7919 * (1 + len(salt))))
        first, second = self.rows
        self.window = [layer["rows"][first] + layer["rows"][second] for layer in material()[1]]
        self.pools = alone(self.rows)

    def branch(self, length, seed):
        """A text of the same first tokens."""
        ids = self.ids.copy()
        ids[length:] = np.random.default_rng([length, seed]).integers(0, 1000, CONTEXT - length)
        return text_of(ids.tobytes(), self.salt, self._alone)


@functools.lru_cache(maxsize=32)
def text_of(ids, salt, alone):
    """The text of these ids, int32 as bytes."""
    return Text(np.frombuffer(ids, np.int32).copy(), salt, alone)


def _poison(cache, slots, blocks):
    arrays = {}
    for name, array in cache.arrays.items():
        which = blocks if name in cache.schema.block_pools else slots[: array.shape[1 if array.ndim > 2 else 0]]
        match name:
            case name if name in TABLES:  # of slots whose next request has them reset
                arrays[name] = jnp.where(which[:, None], 0, array)
            case "window_positions":
                arrays[name] = jnp.where(slots[None, :, None], jnp.arange(array.shape[2]), array)
            case _:
                arrays[name] = jnp.where(which.reshape(1, -1, *[1] * (array.ndim - 2)), jnp.nan, array)
    return cache.with_arrays(arrays)


def _strangers(cache, empty, slots, blocks):
    """Of each array, in how many of some slots and blocks, bool each, it is not as in an empty cache, to the bit."""
    found = {}
    for name, array in cache.arrays.items():
        values = [jax.lax.bitcast_convert_type(a, jnp.int32) for a in (array, empty.arrays[name])]
        differ = values[0] != values[1]
        if name not in TABLES:
            differ = differ.any(0)
        which = blocks if name in cache.schema.block_pools else slots[: differ.shape[0]]
        found[name] = (differ.reshape(differ.shape[0], -1).any(1) & which).sum()
    return found


def _run(cache, plan, lengths, rows, weights, bank):
    brought = jax.tree.map(lambda vectors: vectors[rows[0]] + vectors[rows[1]], bank)
    return update(cache, plan.rebase(lengths), weights, brought)


def _read(cache, plan):
    layers = []
    for layer, of in enumerate(SPEC.layers):
        entries = cache.schema.max_context // of.kind.ratio if of.kind.compression else 0
        handle, window = reader(cache, plan, layer).window(dtype=jnp.float32)
        found, chosen = {"window": window}, {}
        if entries:
            handle, found["entries"] = handle.all_entries(entries, dtype=jnp.float32)
        if of.kind == LayerKind.CSA:
            handle, found["keys"] = handle.all_keys(entries, dtype=jnp.float32)
            chosen = {"indices": jnp.tile(jnp.arange(entries, dtype=jnp.int32), (plan.layout.tokens, 1))}
        queries = jnp.ones((plan.layout.tokens, SPEC.num_heads, 512), jnp.float32)
        handle, attended = handle.attend(queries, dtype=jnp.float32, **chosen)
        cache = handle.step.cache
        layers.append((found, attended))
    return cache, layers


_run, _read, _poison, _apply = (
    jax.jit(function, donate_argnums=0) for function in (_run, _read, _poison, apply_transfers)
)
_strangers = jax.jit(_strangers)


class Device:
    """A cache's arrays; what holds nothing holds NaN, or if it is to be wiped what an empty cache holds."""

    def __init__(self, schema, wiped=False):
        self.cache, self._empty = init_cache(schema), init_cache(schema) if wiped else None
        self.poison(np.ones(schema.slots + schema.snapshots, bool), np.ones(schema.blocks, bool))
        self._reads = PlanLayout(schema.slots, schema.slots, schema.fingerprint, False)

    def poison(self, slots, blocks):
        """Slots (snapshots behind them) and blocks that hold nothing, bool each."""
        if self._empty is not None:
            found = jax.device_get(_strangers(self.cache, self._empty, slots, blocks))
            assert not any(found.values()), f"not wiped: {found}"
            return
        self.cache = _poison(self.cache, slots, blocks)

    def run(self, plan, lengths, rows):
        """A plan from lengths [requests], that brings these rows of the bank [2, tokens]."""
        padded = np.full(plan.layout.requests, CONTEXT, np.int32)
        padded[: len(lengths)] = lengths
        brought = np.full((2, plan.layout.tokens), BANK, np.int32)
        brought[:, : rows.shape[1]] = rows
        self.cache = _run(self.cache, plan, padded, brought, *on_device())

    def apply(self, transfers):
        """What waits to be done between plans."""
        self.cache = _apply(self.cache, transfers)

    def read(self, slots, lengths):
        """Of each layer what the last tokens of requests of these lengths see: gathered Rows by name, and Attended."""
        plan = build_plan(self._reads, slots, np.asarray(lengths) - 1, np.ones(len(slots), int), False)
        self.cache, layers = _read(self.cache, plan)
        return jax.device_get(layers)

    def block_bytes(self, block):
        """All that is stored in a block."""
        return b"".join(
            np.asarray(self.cache.arrays[name][:, block]).tobytes() for name in self.cache.schema.block_pools
        )


class Alone:
    """A cache of one slot: what a text stores if it is brought at once."""

    def __init__(self, formats):
        schema = CacheSchema(SPEC, formats, 1, CONTEXT // 128, CONTEXT)
        self._manager, self._device = CacheManager(schema, token_buckets=(CONTEXT,)), Device(schema)

    def __call__(self, rows):
        request = self._manager.admit()
        self._device.run(self._manager.prepare_forward({request: CONTEXT}), [0], rows)
        layers = self._device.read([0], [CONTEXT])
        self._manager.release(request)
        return [{name: read.values[0] for name, read in found.items() if name != "window"} for found, _ in layers]


@functools.cache
def setting(hca_tail, lookahead):
    """(schema, Alone) of a setting; kept, so that each program is compiled once."""
    formats = CacheFormats("fp32", "fp32", "fp32", hca_tail=hca_tail)
    return CacheSchema(SPEC, formats, lookahead=lookahead, **SIZES), Alone(formats)


@dataclasses.dataclass(eq=False)
class Request:
    """A request as it should be.

    Attributes:
      text: what it has brought, and what it will.
      bound: so many of its tokens must be those of its text, the prompt.
      limit: up to there it was promised blocks, 0 for no promise.
      length: tokens on the device, once all that was dispatched has run.
      plans: those that the host can still hear of, oldest first.
      found: until it is as long, it is being rebuilt: it has the blocks of so many tokens, and no state.
      restoring: its state waits for a transfer.
      shortened: tokens were taken back. The next one sees 127 before it, so the oldest that the last saw may be gone.
    """

    handle: int
    slot: int
    text: Text = dataclasses.field(repr=False)
    bound: int = 0
    limit: int = 0
    length: int = 0
    plans: list = dataclasses.field(default_factory=list, repr=False)
    found: int = 0
    restoring: bool = False
    shortened: bool = False

    @property
    def most(self):
        """Its length as the host knows it."""
        return self.length + sum(plan.unknown(self) for plan in self.plans)

    @property
    def is_open(self):
        """Whether it has drafts of which the host has not heard."""
        return any(plan.parts[self].drafts for plan in self.plans)


@dataclasses.dataclass
class Part:
    """What a plan brings of a request: so many tokens, the last ones drafts, and of these the last ones wrong."""

    tokens: int
    drafts: int
    wrong: int
    start: int | None = None  # once it was dispatched

    @property
    def kept(self):
        return self.tokens - self.wrong


@dataclasses.dataclass(eq=False)
class Made:
    """A plan that was made, and its parts by request."""

    plan: object = dataclasses.field(repr=False)
    parts: dict

    def unknown(self, request):
        """How much longer the host takes a request to be for this plan than it is."""
        part = self.parts[request]
        return part.tokens if part.start is None else part.wrong

    @property
    def live(self):
        """The requests for which the host can still hear of it."""
        return [request for request in self.parts if self in request.plans]
