"""Requests that bring drafts: every request has a text, and a draft is a token of it or one that is not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from harness import random_tokens, random_weights, tail_rows_in_use, update
from test_lookahead import rows_of

from dsv4_jax import CacheFormats, CacheManager, CacheSchema, init_cache, tiny_spec

SPEC = dataclasses.replace(tiny_spec(), layers=tiny_spec().layers[1:3])
"""A CSA and an HCA layer; each has a window."""

TEXT = 1024
"""Rows of the bank that texts are made of; the next as many are of tokens that no text has."""


@functools.cache
def _jitted(function, implementation):
    return jax.jit(functools.partial(function, implementation=implementation), donate_argnums=0)


def keep_some(cache, plan, lengths, kept, salt, weights, bank, *, implementation="native"):
    """A step from the lengths that requests have, int32 [R], that keeps the first ``kept`` [R] of each one's tokens.

    Those are the next of its text, the others are wrong. Gives the cache and the lengths after it.
    """
    plan = plan.rebase(lengths)
    place = plan.token_position - plan.request_start[plan.token_request]
    ids = (plan.token_position + 37 * plan.token_slot) % TEXT
    wrong = TEXT + (ids * 5 + salt) % TEXT
    ids = jnp.where(place < kept[plan.token_request], ids, wrong)
    cache = update(cache, plan, weights, jax.tree.map(lambda rows: rows[ids], bank), implementation=implementation)
    return cache, jnp.where(plan.request_slot >= 0, plan.request_start + kept, lengths)


class Speculation:
    """A cache and its manager, fed with texts and drafts. Lengths by slot are on the device and never asked for."""

    def __init__(self, material, *, slots, blocks, max_context, lookahead, buckets, hca_tail="rows", **options):
        formats = CacheFormats("fp8", "bf16", "mxfp4", hca_tail=hca_tail)
        self.schema = CacheSchema(SPEC, formats, slots, blocks, max_context, lookahead)
        self.manager = CacheManager(self.schema, token_buckets=buckets)
        self.cache = init_cache(self.schema)
        self.material = jax.device_put(material)
        self.lengths = jnp.zeros(slots, jnp.int32)
        self._step = _jitted(keep_some, options.get("implementation", "native"))

    def run(self, plan, kept, salt=0):
        """Dispatches a plan of one step; ``kept`` has as many integers as it has requests."""
        slots, padded = plan.request_slot, np.zeros(plan.layout.requests, np.int32)
        padded[: len(kept)] = kept
        self.cache, lengths = self._step(self.cache, plan, self.lengths[slots], padded, salt, *self.material)
        self.lengths = self.lengths.at[jnp.where(slots >= 0, slots, self.schema.slots)].set(lengths, mode="drop")
        return lengths

    def stored(self, requests, lengths):
        """What counts of these requests at these lengths: entries, keys, visible window rows, needed tail rows."""
        arrays = {name: np.asarray(array) for name, array in self.cache.arrays.items()}
        everything = []
        for request, length in zip(requests, lengths, strict=True):
            slot, window = self.manager.slot(request), np.arange(max(length - 127, 0), length) % self.schema.ring
            mine = {name: arrays[name][:, slot][:, window] for name in ("window", "window_positions")}
            for name, ratio in (("csa_tail", 4), ("csa_key_tail", 4), ("hca_tail", 128)):
                if arrays[name].ndim == 4:  # running: the state of the open window
                    row = 3 * ((length - 1) % (1 + self.schema.lookahead))
                    mine[name] = arrays[name][:, slot, row : row + 3 * (length % ratio > 0)]
                    continue
                rows = tail_rows_in_use(length, ratio, self.schema.lookahead)
                mine[name] = arrays[name][:, slot][:, :, rows]
            blocks = arrays["block_table"][slot, : self.manager.blocks_needed(length)]
            for name, ratio in (("csa_entries", 4), ("csa_keys", 4), ("hca_entries", 128)):
                mine[name] = rows_of(arrays[name][:, blocks], 128 // ratio, 4)[:, : length // ratio]
            everything.append({name: array.tobytes() for name, array in mine.items()})
        return everything


def material(rng, dtype=ml_dtypes.bfloat16):
    """Weights, and a bank of tokens."""
    return random_weights(rng, SPEC), random_tokens(rng, 2 * TEXT, dtype, SPEC)


def assert_same(ours, theirs, what):
    """Equal bytes of all that two ``stored`` found."""
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for name, stored in one.items():
            assert stored == other[name], f"{what}, request {index}: {name}"
