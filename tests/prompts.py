"""Requests whose tokens have ids, on a cache that shares prefixes and on one where each is computed from nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from harness import Driver, assert_same_bytes, random_tokens, random_weights

from dsv4_jax import CacheFormats, CacheFull, apply_transfers
from dsv4_jax.host.errors import CannotTruncate
from dsv4_jax.layout.schema import TABLES

BANK = 512
"""Token ids."""

SIZES = {"slots": 4, "blocks": 24, "max_context": 1280, "snapshots": 4, "lookahead": 0}


class Prompts:
    """Equal ids bring equal rows. What every request stored can be compared with its own tokens computed alone."""

    def __init__(self, rng, hca_tail="rows", poison=False, formats=None, **sizes):
        self.rng, self.bank = rng, random_tokens(rng, BANK)
        weights, formats = random_weights(rng), dataclasses.replace(formats or CacheFormats(), hca_tail=hca_tail)
        sizes = SIZES | sizes
        self.driver = Driver(weights, formats, **sizes)
        same = {name: sizes[name] for name in ("max_context", "lookahead")}
        self.alone = Driver(weights, formats, slots=1, blocks=12, **same)
        self.ids, self.poison = {}, poison
        self._apply = jax.jit(apply_transfers, donate_argnums=0)

    @property
    def manager(self):
        return self.driver.manager

    def tokens(self, count):
        """Ids of that many tokens."""
        return self.rng.integers(0, BANK, count)

    def admit(self, ids, max_new_tokens=None, salt=b""):
        """A request of this prompt; what it finds of it must be what was promised."""
        match = self.manager.match_prefix(ids, salt=salt)
        request = self.manager.admit(match, max_new_tokens)
        assert self.manager.length(request) == match.length
        self.ids[request] = np.asarray(ids)
        return request

    def transfer(self):
        if self.manager.transfers_wait:
            self.driver.cache = self._apply(self.driver.cache, self.manager.take_transfers())
        if self.poison:
            self.spoil()

    def step(self, counts, *, told=True, commit=True):
        """One step; the ids of tokens that the request's text does not have yet are random."""
        self.transfer()
        for request, count in counts.items():
            more = self.manager.length(request) + count - self.ids[request].size
            if more > 0:
                self.ids[request] = np.concatenate([self.ids[request], self.tokens(more)])
        plan = self.manager.prepare_forward(counts)
        starts = dict(zip(counts, plan.request_start.tolist(), strict=False))
        self.driver.run(plan, self._brought(plan, starts, counts))
        if commit:
            self.commit(plan, counts, starts, told)
        return plan

    def commit(self, plan, counts, starts, told=True):
        ids = {request: self.ids[request][starts[request] : starts[request] + n] for request, n in counts.items()}
        self.manager.commit(plan, lengths=plan.request_end, tokens=ids if told else None)

    def _brought(self, plan, starts, counts):
        ids = np.concatenate(
            [self.ids[request][starts[request] : starts[request] + n] for request, n in counts.items()]
        )
        padding = plan.layout.tokens - ids.size
        return [
            {
                name: jnp.asarray(np.concatenate([rows[ids], np.full((padding, rows.shape[1]), np.nan, rows.dtype)]))
                for name, rows in layer.items()
            }
            for layer in self.bank
        ]

    def prefill(self, request, until=None, cut=None):
        """A prompt in chunks that end where that is worth a snapshot."""
        until = self.ids[request].size if until is None else until
        while (left := until - self.manager.length(request)) > 0:
            self.step({request: min(left, self.manager.chunk_limit(request), cut or 1000)})

    def release(self, request):
        self.manager.release(request)
        del self.ids[request]

    def texts(self):
        """Three texts of 700 tokens, the second and third of which begin as the first does."""
        texts = [self.tokens(700) for _ in range(3)]
        for text in texts[1:]:
            same = int(self.rng.integers(1, 400))
            text[:same] = texts[0][:same]
        return texts

    def act(self, texts, seen):
        """Something that may happen: a prompt out of ``texts``, a fork, a step; ``seen`` gets to know what."""
        rng, manager, requests = self.rng, self.manager, list(self.ids)
        request = int(rng.choice(requests)) if requests else -1
        what = str(rng.choice(["admit", "admit", "fork", "truncate", "release", "cancel", *["step"] * 7]))
        try:
            match what:
                case "admit":
                    text = texts[int(rng.integers(3))][: int(rng.integers(100, 500))]
                    ids = np.concatenate([text, self.tokens(int(rng.integers(0, 200)))])
                    new = int(rng.integers(0, 100)) if rng.random() < 0.5 else None
                    match = manager.match_prefix(ids, salt=b"x" * (rng.random() < 0.1))
                    if manager.can_admit(match, new):
                        request = manager.admit(match, new)
                        self.ids[request] = ids
                        seen.add("hit" if manager.length(request) else "new")
                case "fork" if requests:
                    twin = manager.fork(request)
                    self.ids[twin] = self.ids[request].copy()
                case "truncate" if requests and manager.length(request):
                    length = max(manager.length(request) - int(rng.integers(1, 140)), 0)
                    manager.truncate(request, length)
                    self.ids[request] = self.ids[request][:length]
                case "release" if requests:
                    self.release(request)
                case "cancel" if requests:
                    self.transfer()
                    manager.cancel(manager.prepare_forward({request: 1}))
                case "step":
                    self.transfer()
                    some = [one for one in requests if rng.random() < 0.8 and manager.length(one) < 900]
                    counts = {one: int(rng.choice([1, rng.integers(1, 300), 300])) for one in some}
                    for one in counts:
                        if rng.random() < 0.8:
                            counts[one] = min(counts[one], manager.chunk_limit(one))
                    if counts:
                        self.step(counts, told=bool(rng.random() < 0.9), commit=bool(rng.random() < 0.9))
        except CacheFull:
            seen.add("full")
            if self.ids:
                self.release(max(self.ids, key=manager.length))
        except CannotTruncate:
            pass
        seen.add(what)

    def check(self, request):
        """What a request stored is what it stores if it is computed from nothing."""
        self.transfer()
        length = self.manager.length(request)
        if not length:
            return
        again = self.alone.admit(
            [{name: rows[self.ids[request]] for name, rows in layer.items()} for layer in self.bank]
        )
        for left in (length - length // 2, length // 2):
            if left:
                self.alone.feed({again: left})
        assert_same_bytes(self.driver.visible(request), self.alone.visible(again), f"{length} tokens of {request}")
        self.alone.release(again)

    def spoil(self):
        """NaN, or the like, in all blocks, slots and snapshots that hold nothing."""
        manager, schema = self.manager, self.driver.schema
        ledger, snapshots = manager._ledger, manager._prefix.snapshots
        unused = np.setdiff1d(
            np.arange(schema.blocks), np.concatenate([ledger.table[ledger.table >= 0], ledger._idle.blocks])
        )
        slots = [schema.slots + index for index in (snapshots.used == 0).nonzero()[0].tolist()]
        slots += [slot for slot in range(schema.slots) if manager._request_table.handles[slot] < 0]
        arrays = {}
        for name, array in self.driver.cache.arrays.items():
            if name in (*TABLES, "window_positions"):
                continue
            values = np.array(array)
            where = unused if name in schema.block_pools else [slot for slot in slots if slot < values.shape[1]]
            values.view(np.uint8)[:, where] = 0xFF
            arrays[name] = jnp.asarray(values)
        self.driver.cache = self.driver.cache.with_arrays(arrays)
