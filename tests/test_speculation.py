"""Drafts that were kept are stored as if decoded one by one; of the others nothing is left."""

import functools
import hashlib

import jax
import numpy as np
import pytest
from aot import assert_in_place, compile_for_h200
from speculation import Speculation, assert_same, keep_some, material

from dsv4_jax.layout.formats import HCA_TAILS


def speculate(cache, plans, lengths, kept, ends, weights, bank):
    """All steps of a plan in one loop on the device; ``kept`` [steps, R] and after how many steps each ends, [R]."""

    def step(state):
        index, cache, lengths = state
        plan = plans.step(index).stop(index >= ends)
        return index + 1, *keep_some(cache, plan, lengths, kept[index], index, weights, bank)

    return jax.lax.while_loop(lambda state: state[0] < kept.shape[0], step, (0, cache, lengths))[1:]


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_a_loop_on_the_device_is_decoding_one_by_one(device, rng, hca_tail):
    """One dispatch: how much is kept decides, on the device, where the next step starts; some requests end early."""
    drafts, steps, lengths = 4, 12, [1, 124, 251, 400]
    given = material(rng)
    sizes = {"slots": 4, "blocks": 24, "max_context": 640, "hca_tail": hca_tail}
    subject = Speculation(given, lookahead=drafts, buckets=[5 * 4, 1024], **sizes)
    twin = Speculation(given, lookahead=0, buckets=[4, 1024], **sizes)
    for each in (subject, twin):
        requests = [each.manager.admit() for _ in lengths]
        each.run(each.manager.prepare_forward(dict(zip(requests, lengths, strict=True))), lengths)

    kept = rng.integers(1, drafts + 2, (steps, 4)).astype(np.int32)
    ends = np.array([2, steps, 7, steps])  # each runs so many steps
    print(kept, ends)

    plans = subject.manager.prepare_forward(dict.fromkeys(requests, 1 + drafts), drafts=drafts, steps=steps)
    run = jax.jit(speculate, donate_argnums=0)
    subject.cache, subject.lengths = run(subject.cache, plans, subject.lengths, kept, ends, *subject.material)
    expected = [n + int(kept[:end, i].sum()) for i, (n, end) in enumerate(zip(lengths, ends, strict=True))]
    assert subject.lengths.tolist() == expected
    subject.manager.commit(plans, lengths=subject.lengths)
    assert [subject.manager.length(request) for request in requests] == expected

    for _ in range(max(expected) - min(lengths)):
        going = [i for i in range(4) if twin.manager.length(requests[i]) < expected[i]]
        if going:
            twin.run(twin.manager.prepare_forward({requests[i]: 1 for i in going}), [1] * len(going))
    assert subject.manager.free_blocks == twin.manager.free_blocks
    assert_same(subject.stored(requests, expected), twin.stored(requests, expected), "after the loop")
    for each in (subject, twin):
        each.run(each.manager.prepare_forward(dict.fromkeys(requests, 30)), [30] * 4)
    expected = [length + 30 for length in expected]
    assert_same(subject.stored(requests, expected), twin.stored(requests, expected), "gone on")


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
@pytest.mark.parametrize("target", ["cpu", "h200"])
def test_the_loop_is_in_place_and_its_step_one_graph(rng, tmp_path, target, hca_tail):
    sizes = {"slots": 128, "blocks": 1 << 12, "max_context": 512, "buckets": [128], "hca_tail": hca_tail}
    made = Speculation(material(rng, np.float32), lookahead=3, **sizes)
    requests = [made.manager.admit() for _ in range(20)]
    plans = made.manager.prepare_forward(dict.fromkeys(requests, 4), drafts=3, steps=6)
    given = (made.cache, plans, made.lengths, np.ones((6, 128), np.int32), np.full(128, 6), *made.material)
    if target == "cpu":
        with jax.default_device(jax.devices("cpu")[0]):
            compiled = jax.jit(speculate, donate_argnums=0).lower(*given).compile()
    else:
        program = compile_for_h200(speculate, *given, dump=tmp_path, donate_argnums=0)
        assert (program.graphs, program.custom_calls(captured=False)) == (1, 0), program.thunks
        compiled = program.compiled
    assert_in_place(compiled, made.cache, temporary_bytes=8 << 20)


LARGEST = 16


@pytest.fixture(scope="module", params=HCA_TAILS)
def one_by_one(request, module_rng):
    """128 requests at every alignment to 128, decoded one by one: (a maker of caches with such requests, their first
    lengths, what is stored of each of them after 1, 3, 6, 10, … tokens).
    """
    given, first = material(module_rng), int(module_rng.integers(20, 130))
    lengths = (first + module_rng.permutation(128)).tolist()
    make = functools.partial(at_every_alignment, given, lengths, request.param)
    twin = make(0)
    requests, stored, grown = twin.manager.requests.tolist(), [], 0
    for count in range(LARGEST + 1):
        for _ in range(count + 1):
            twin.run(twin.manager.prepare_forward(dict.fromkeys(requests, 1)), [1] * 128)
        grown += count + 1
        stored.append(digests(twin.stored(requests, [length + grown for length in lengths])))
    return make, lengths, stored


def at_every_alignment(given, lengths, hca_tail, lookahead):
    """A cache whose requests have these lengths."""
    sizes = {"slots": 128, "blocks": 128 * 5, "max_context": 640, "buckets": [128, 128 * (LARGEST + 1), 128 * 260]}
    made = Speculation(given, lookahead=lookahead, hca_tail=hca_tail, **sizes)
    requests = [made.manager.admit() for _ in lengths]
    made.run(made.manager.prepare_forward(dict(zip(requests, lengths, strict=True))), lengths)
    return made


def digests(stored):
    return [{name: hashlib.sha256(data).digest() for name, data in mine.items()} for mine in stored]


@pytest.mark.parametrize("drafts", range(1, LARGEST + 1))
def test_every_number_of_drafts_kept_at_every_alignment(one_by_one, drafts):
    """n of k drafts, for every n in turn, in plans that were all made before anything was known of any."""
    make, lengths, expected = one_by_one
    subject = make(drafts)
    requests, grown = subject.manager.requests.tolist(), 0
    plans = [
        subject.manager.prepare_forward(dict.fromkeys(requests, 1 + drafts), drafts=drafts) for _ in range(drafts + 1)
    ]
    free = subject.manager.free_blocks
    for kept, plan in enumerate(plans):
        after = subject.run(plan, [1 + kept] * 128, salt=kept)
        grown += 1 + kept
        now = [length + grown for length in lengths]
        assert_same(digests(subject.stored(requests, now)), expected[kept], f"{kept} of {drafts} kept")
        subject.manager.commit(plan, lengths=after)
        left = (drafts - kept) * (1 + drafts)
        assert [subject.manager.length(request) for request in requests] == [length + left for length in now]
    assert subject.manager.free_blocks >= free
    assert subject.manager.free_blocks == 128 * 5 - sum(subject.manager.blocks_needed(now))
