"""Hits of any length, from a block to a million tokens, whatever prompts were cut into; and forks that evict."""

import numpy as np
import pytest
from harness import random_chunks
from test_blocks import assert_balanced
from test_prefix_books import Device, fed, make

from dsv4_jax.host.events import BlockRemoved
from dsv4_jax.layout.transfers import TransferKind


@pytest.mark.parametrize("largest", [1000, 300, 90])
def test_every_length_is_met_whatever_the_cuts(rng, largest):
    """Each hit that was promised is one of state and blocks of just these tokens."""
    manager = make(every=1, snapshots=32, blocks=80, max_context=4224)
    device, text = Device(manager), rng.integers(0, 9999, 4097).astype(np.int32)
    first = manager.admit(manager.match_prefix(text))
    for chunk in random_chunks(rng, 4097, largest):
        while chunk:
            device.transfer()
            tokens = min(chunk, manager.chunk_limit(first))
            plan, chunk = manager.prepare_forward({first: tokens}), chunk - tokens
            device.run(plan, {first: text})
            manager.commit(plan, 1)
    for blocks in rng.permutation(32) + 1:
        device.transfer()
        other = np.concatenate([text[: 128 * blocks], rng.integers(0, 9999, 9).astype(np.int32)])
        match = manager.match_prefix(other)
        request = manager.admit(match)
        assert manager.length(request) == match.length == 128 * blocks
        device.transfer()
        device.check(request, other)
        plan = manager.prepare_forward({request: 9})
        device.run(plan, {request: other})
        device.check(request, other)
        manager.commit(plan, 1)
        manager.release(request)
        assert_balanced(manager._ledger)
    device.check(first, text)


def test_a_million_tokens_into_a_slot_that_was_just_released(rng):
    length = 1 << 20
    manager = make(snapshots=2, slots=2, blocks=8200, max_context=length)
    text = rng.integers(0, 9999, length).astype(np.int32)
    first = fed(manager, text)
    other = manager.admit()
    plan, slot = manager.prepare_forward({other: 7}), manager.slot(other)
    manager.commit(plan, 1)
    manager.release(other)
    request = manager.admit(manager.match_prefix(text))
    assert (manager.slot(request), manager.length(request)) == (slot, length - 128)
    np.testing.assert_array_equal(manager.blocks(request), manager.blocks(first)[:8191])
    taken = manager.take_transfers()
    operations = taken.operations[taken.operations[:, 0] > 0]
    assert operations[:, 0].tolist() == [TransferKind.RESET, TransferKind.COPY, TransferKind.SHARE]
    assert (operations[:, 1] == slot).all()
    assert operations[1, 2] >= manager.schema.slots  # a snapshot
    np.testing.assert_array_equal(taken.blocks[:8191], manager.blocks(request))
    plan = manager.prepare_forward({request: 128})
    assert (plan.request_start[0], plan.request_reset[0]) == (length - 128, 0)
    assert manager.blocks(request)[-1] != manager.blocks(first)[-1]
    assert_balanced(manager._ledger)


def test_a_fork_takes_the_block_that_was_not_used_for_longest(rng):
    """For the copy of the open one: what was known there is gone, what the twins share is not."""
    manager = make(every=1, blocks=6, snapshots=6)
    device, gone, text = Device(manager), rng.integers(0, 99, 257), rng.integers(0, 99, 300).astype(np.int32)
    manager.release(fed(manager, gone))
    request = manager.admit(manager.match_prefix(text))
    for tokens in (128, 128, 44):
        device.transfer()
        plan = manager.prepare_forward({request: tokens})
        device.run(plan, {request: text})
        manager.commit(plan, 1)
    device.transfer()
    other = manager.admit()
    manager.take_events()
    device.run(manager.prepare_forward({other: 4}), {other: text})
    assert manager.usage()["blocks"].free == 0
    assert manager.match_prefix(gone).length == 256
    twin = manager.fork(request)
    assert [type(event) for event in manager.take_events()] == [BlockRemoved]
    assert manager.match_prefix(gone).length == 128
    assert manager.match_prefix(text).length == 256
    device.transfer()
    for one in (request, twin):
        device.check(one, text)
    assert_balanced(manager._ledger)
