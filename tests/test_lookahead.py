"""Taking tokens back is only a smaller length: after it, a request stores what one stores that never had them."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from harness import random_tokens, random_weights, tail_rows_in_use, update

from dsv4_jax import CacheFormats, CacheManager, CacheSchema, init_cache, tiny_spec

SPEC = dataclasses.replace(tiny_spec(), layers=tiny_spec().layers[1:3])
"""A CSA and an HCA layer; each has a window."""
FORMATS = CacheFormats("fp8", "bf16", "mxfp4")


class Requests:
    """Requests of given lengths and what becomes of them. Their tokens are rows of a bank, chosen by id."""

    def __init__(self, weights, bank, lookahead, lengths, implementation):
        count, context = len(lengths), max(lengths) + 32
        blocks = count * -(-context // 128)
        self.schema = CacheSchema(SPEC, FORMATS, count, blocks, context, lookahead)
        self.manager = CacheManager(self.schema, token_buckets=[32 * count, sum(lengths)][-1 if count < 8 else 0 :])
        self.cache = init_cache(self.schema)
        self.requests = [self.manager.admit() for _ in lengths]

        self._weights, self._bank = jax.device_put((weights, bank))

        def step(cache, plan, ids, weights, bank):
            brought = jax.tree.map(lambda rows: rows[ids], bank)
            return update(cache, plan, weights, brought, implementation=implementation)

        self._step = jax.jit(step, donate_argnums=0)

    def feed(self, ids):
        """One step in which every request brings the tokens of its list of ids, which may be empty."""
        brings = {request: part for request, part in zip(self.requests, ids, strict=True) if len(part)}
        plan = self.manager.prepare_forward({request: len(part) for request, part in brings.items()})
        ids = plan.pack_tokens(list(brings.values()))
        self.cache = self._step(self.cache, plan, ids, self._weights, self._bank)
        return plan

    def truncate(self, lengths):
        for request, length in zip(self.requests, lengths, strict=True):
            self.manager.truncate(request, length)

    def in_use(self):
        """What is stored of every request and still counts: entries, keys, visible window rows and needed tail rows."""
        stored = []
        arrays = {name: np.asarray(array) for name, array in self.cache.arrays.items()}
        ring = self.schema.ring
        for request in self.requests:
            length, slot = self.manager.length(request), self.manager.slot(request)
            window = [position % ring for position in range(max(length - 127, 0), length)]
            mine = {name: arrays[name][:, slot][:, window] for name in ("window", "window_positions")}
            for name, ratio in (("csa_tail", 4), ("csa_key_tail", 4), ("hca_tail", 128)):
                mine[name] = arrays[name][:, slot][:, :, tail_rows_in_use(length, ratio, self.schema.lookahead)]
            for name, ratio, scale_bytes in (("csa_entries", 4, 4), ("csa_keys", 4, 4), ("hca_entries", 128, 4)):
                pages = arrays[name][:, self.manager.blocks(request)]
                mine[name] = rows_of(pages, 128 // ratio, scale_bytes)[:, : length // ratio]
            stored.append(mine)
        return stored


def rows_of(pages, rows, scale_bytes):
    """Pages of a quantized format, [layers, pages, bytes], as rows [layers, pages * rows, bytes of a row]."""
    layers, count = pages.shape[:2]
    data, scales = np.split(pages, [pages.shape[2] - rows * scale_bytes], axis=2)
    parts = [part.reshape(layers, count * rows, part.shape[2] // rows) for part in (data, scales)]
    return np.concatenate(parts, axis=2)


@pytest.mark.parametrize(
    ("implementation", "lookahead", "alignments"),
    [("native", lookahead, 128) for lookahead in (1, 3, 4, 16)] + [("reference", 3, 5)],
)
def test_tokens_taken_back_leave_no_trace(device, rng, implementation, lookahead, alignments):
    """From lengths of every alignment, to every length that the lookahead promises, other tokens written each time."""
    start = int(rng.integers(20, 130))
    peaks = (start + rng.permutation(128)[:alignments]).tolist()
    weights, common = random_weights(rng, SPEC), max(peaks)
    bank = random_tokens(rng, 3 * common, ml_dtypes.bfloat16, SPEC)  # the first are every request's, others are drawn
    subject = Requests(weights, bank, lookahead, peaks, implementation)
    subject.feed([range(peak) for peak in peaks])
    twin = Requests(weights, bank, 0, peaks, implementation)  # in every round, without what was taken back
    twin.feed([range(peak - lookahead) for peak in peaks])
    before = jax.tree.map(jnp.copy, twin.cache)
    for back in range(lookahead + 1):
        # Up to the peak, so that the next round can go back further; beyond it in the last one.
        most = back if back < lookahead else back + 8
        others = [rng.integers(common, 3 * common, rng.integers(min(most, 1), most + 1)) for _ in peaks]
        subject.truncate([peak - back for peak in peaks])
        if most:
            subject.feed(others)
        kept = [[*range(peak - lookahead, peak - back)] for peak in peaks]
        plan = twin.feed([[*first, *then] for first, then in zip(kept, others, strict=True)])
        for peak, one, other in zip(peaks, subject.in_use(), twin.in_use(), strict=True):
            for name, array in one.items():
                assert array.tobytes() == other[name].tobytes(), f"{name}: {back} tokens taken back at {peak}"
        twin.manager.cancel(plan)
        twin.cache = jax.tree.map(jnp.copy, before)
