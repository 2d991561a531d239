"""ShardedManager: a shard's plans are those of its own manager; what concerns all is done for all, or for none."""

import copy

import numpy as np
import pytest
from managers import make_manager, state

from dsv4_jax import CacheFull, ShardedManager
from dsv4_jax.host.errors import CannotTruncate, ContextExceeded, InvalidStep, PromptTooLong, StalePlan, UnknownRequest
from dsv4_jax.host.parking import RequestRecord
from dsv4_jax.host.sharded_plan import largest

BUCKETS = (8, 64, 512)


def make_sharded(shards=3, **options) -> ShardedManager:
    sizes = {name: options.pop(name) for name in ("slots", "blocks", "lookahead", "snapshots") if name in options}
    return ShardedManager(make_manager(**sizes).schema, shards, token_buckets=BUCKETS, **options)


def states(manager: ShardedManager) -> list:
    return [state(one) for one in manager.managers]


def test_every_shards_plan_is_its_own_managers(rng):
    """A random history, of each shard a twin alone; plans differ by no more than the layout that all have."""
    manager = make_sharded(slots=5, blocks=30, lookahead=3)
    twins = [make_manager(slots=5, blocks=30, lookahead=3) for _ in manager.managers]
    live: dict[int, int] = {}  # by the handle of the twin
    for _ in range(60):
        if len(live) < 8 and manager.can_admit(100):
            request = manager.admit()
            shard, local = manager.place(request)
            live[request] = local
            assert twins[shard].admit() == local
        chosen = [request for request in live if rng.random() < 0.7 and manager.length(request) < 900]
        counts = {request: int(rng.choice([1, 2, 30])) for request in rng.permutation(chosen).tolist()}
        drafts = {request: min(2, count - 1) for request, count in counts.items()}
        steps = [None, 3][int(rng.integers(2))]
        if sum(counts.values()) > 200:
            continue
        try:
            plan = manager.prepare_forward(counts, drafts=drafts, steps=steps)
        except CacheFull:
            break
        assert plan.step_plan.packed.shape[-1] == 3 * plan.layout.size
        for shard, twin in enumerate(twins):
            mine = {live[request]: n for request, n in counts.items() if request % 3 == shard}
            of_mine = {live[request]: n for request, n in drafts.items() if request % 3 == shard}
            expected = twin.prepare_forward(mine, drafts=of_mine, steps=steps, layout=plan.layout)
            np.testing.assert_array_equal(plan.parts[shard].packed, expected.packed)
            lengths = [twin.length(local) - int(rng.integers(0, 2)) * of_mine[local] for local in mine]
            twin.commit(expected, lengths=lengths)
            manager.managers[shard].commit(plan.parts[shard], lengths=lengths)
        assert [manager.length(r) for r in live] == [twins[r % 3].length(local) for r, local in live.items()]
        if live and rng.random() < 0.1:
            request = int(rng.choice(list(live)))
            manager.release(request)
            twins[request % 3].release(live.pop(request))


def test_rows_and_tokens_are_found_again_in_what_all_shards_return():
    manager = make_sharded(3, slots=4)
    requests = [manager.admit(shard=shard) for shard in (1, 0, 1, 1)]
    plan = manager.prepare_forward((requests, [1, 2, 3, 1]))
    assert [part.layout for part in plan.parts] == [plan.layout] * 3
    assert plan.rows.tolist() == [4, 0, 5, 6]
    assert plan.columns.tolist() == [8, 0, 9, 12]
    tokens = plan.pack_tokens([[10], [20, 21], [30, 31, 32], 40])
    assert tokens.reshape(3, 8).tolist() == [[20, 21] + [0] * 6, [10, 30, 31, 32, 40, 0, 0, 0], [0] * 8]
    with pytest.raises(ValueError, match="holds 4 requests, got tokens for 1"):
        plan.pack_tokens([[1]])


def test_requests_go_where_their_prompt_is_cached_and_else_where_there_is_room():
    manager = make_sharded(3, slots=4, blocks=10, snapshots=2)
    prompt = np.arange(300)
    one = manager.admit(manager.match_prefix(prompt), shard=2)
    manager.take_transfers()
    for count in (256, 44):
        manager.commit(manager.prepare_forward({one: count}), 1)
        manager.take_transfers()
    assert manager.match_prefix(prompt).length == 256
    assert manager.place(manager.admit(manager.match_prefix(prompt)))[0] == 2
    assert [manager.place(manager.admit(100, 400))[0] for _ in range(4)] == [0, 1, 2, 0]  # by free blocks: 10, 10, 7
    rooms = manager.rooms(manager.match_prefix(prompt))
    assert [room.cached for room in rooms] == [0, 0, 256]
    assert manager.usage()["slots"].used == 6
    assert manager.metrics()["prefix_cache_hits"] == 256
    last_first = ShardedManager(manager.schema, 3, token_buckets=BUCKETS, route=lambda rooms: rooms[-1].shard)
    assert last_first.place(last_first.admit())[0] == 2


def preempted_after(manager: ShardedManager, prompt: np.ndarray, shard: int) -> RequestRecord:
    """The record of a request that computed its prompt there, and of which blocks are left."""
    request = manager.admit(manager.match_prefix(prompt), shard=shard)
    for start in range(0, prompt.size, 256):
        plan = manager.prepare_forward({request: min(256, prompt.size - start)})
        manager.commit(plan, 1)
        manager.take_transfers()
    return manager.preempt(request)


def test_a_request_is_resumed_where_the_policy_says_which_sees_what_is_left_of_it():
    manager = make_sharded(3, slots=2, blocks=10, snapshots=2)
    record = preempted_after(manager, np.arange(300), shard=2)
    rooms = manager.rooms(record, 100)
    assert [(room.admits, room.cached, room.stored) for room in rooms] == [(True, 0, 0)] * 2 + [(True, 256, 256)]
    assert manager.route(rooms) == 2
    for _ in range(2):
        manager.admit(shard=2)
    rooms = manager.rooms(record, 100)
    assert [room.admits for room in rooms] == [True, True, False]
    assert manager.route(rooms) == 0
    manager.managers[0].admit(0, 600)
    assert manager.route(manager.rooms(record, 100)) == 1


def test_what_can_be_resumed_is_told_exactly(rng):
    """Of caches with random room and what is left of a random request, against resuming in a copy."""
    told = []
    for _ in range(60):
        manager = make_sharded(1, slots=2, blocks=int(rng.integers(6, 10)), snapshots=2)
        record = preempted_after(manager, rng.integers(0, 9, int(rng.integers(100, 640))), shard=0)
        one = manager.managers[0]
        for _ in range(int(rng.integers(0, 3))):
            most = int(rng.integers(0, 900))
            if one.can_admit(0, most):
                other = one.admit(0, most)
                if most and rng.random() < 0.5:
                    one.prepare_forward({other: min(most, 512)})
        new = int(rng.integers(0, 500))
        told.append(one.can_resume(record, new))
        twin = copy.deepcopy(one)
        if told[-1]:
            kept = one.kept_tokens(record)
            assert twin.resume(record, new)[1].shared == kept // 128
        else:
            with pytest.raises((CacheFull, PromptTooLong)):
                twin.resume(record, new)
    assert len(set(told)) == 2


def test_a_full_shard_is_passed_over_and_a_full_cache_says_so():
    manager = make_sharded(2, slots=1)
    assert sorted(manager.place(manager.admit())[0] for _ in range(2)) == [0, 1]
    assert not manager.can_admit()
    with pytest.raises(CacheFull, match="1 slots needed, 0 of 1 free"):
        manager.admit()


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        ({0: 1, 1: 2000, 2: 1}, ContextExceeded, "asks for 2000 more"),
        ({0: 1, 1: 1, 2: 0}, InvalidStep, "is given 0 tokens"),
        ({0: 1, 1: 300, 2: 300}, CacheFull, "blocks needed"),
    ],
)
def test_a_step_that_one_shard_refuses_changes_none(step, error, message):
    manager = ShardedManager(make_manager(slots=2, blocks=2).schema, 3, token_buckets=[4000])
    requests = [manager.admit(shard=shard) for shard in range(3)]
    manager.prepare_forward(dict.fromkeys(requests, 5))
    before = [manager.length(request) for request in requests], manager.usage()
    with pytest.raises(error, match=message) as raised:
        manager.prepare_forward({requests[index]: count for index, count in step.items()})
    if error is not CacheFull:
        assert "of all" in " ".join(raised.value.__notes__)
    assert ([manager.length(request) for request in requests], manager.usage()) == before
    assert manager.prepare_forward(dict.fromkeys(requests, 1)).parts[0].request_start[0] == 5


def test_commit_and_cancel_settle_all_shards_or_none():
    manager = make_sharded(2, slots=3, lookahead=4)
    requests = [manager.admit(shard=shard) for shard in (0, 1, 0)]
    plan = manager.prepare_forward(dict.fromkeys(requests, 5), drafts=4)
    before = states(manager)
    with pytest.raises(InvalidStep, match="cannot have 9 tokens"):
        manager.commit(plan, lengths=[5, 9, 5])
    assert states(manager) == before
    manager.commit(plan, lengths=[2, 3, 4])
    assert [manager.length(request) for request in requests] == [2, 3, 4]
    with pytest.raises(StalePlan):
        manager.commit(plan, lengths=[2, 3, 4])

    plan = manager.prepare_forward(dict.fromkeys(requests, 2), drafts=1)
    devices = np.full(2 * plan.layout.requests, -7)
    devices[plan.rows] = [3, 5, 6]
    manager.commit(plan, lengths=devices)
    assert [manager.length(request) for request in requests] == [3, 5, 6]

    plan = manager.prepare_forward({requests[2]: 3, requests[1]: 70, requests[0]: 1})
    left = manager.cancel(plan, requests[1])
    assert (left.layout, left.handles.tolist()) == (plan.layout, [requests[2], requests[0]])
    assert [manager.length(request) for request in requests] == [4, 5, 9]
    assert left.parts[1].request_slot.max() == -1
    manager.cancel(left)
    assert [manager.length(request) for request in requests] == [3, 5, 6]


def test_handles_are_those_of_all_shards_in_errors_too():
    manager = make_sharded(3, slots=2)
    request = manager.admit(shard=1)
    manager.prepare_forward({request: 200})
    with pytest.raises(CannotTruncate) as error:
        manager.truncate(request, 3)
    assert "request h is request 3 h + 1 of all" in error.value.__notes__[0]
    manager.release(request)
    for use in (manager.length, manager.release, manager.chunk_limit, lambda r: manager.prepare_forward({r: 1})):
        with pytest.raises(UnknownRequest) as unknown:
            use(request)
        assert unknown.value.requests == (request,)
    twin = manager.fork(manager.admit(shard=2))
    assert manager.place(twin)[0] == 2
    assert manager.requests.size == 2
    with pytest.raises(ValueError, match="at least 1 shard"):
        make_sharded(0)


def test_victims_are_those_of_all_shards():
    manager = make_sharded(2, slots=3)
    requests = [manager.admit(shard=shard) for shard in (0, 1, 1)]
    manager.prepare_forward(dict(zip(requests, (30, 20, 40), strict=True)))
    assert [manager.lost_tokens(request) for request in requests] == [30, 20, 40]
    assert (manager.free_slots, manager.free_blocks) == (3, 77)
    assert manager.propose_victim() == requests[1]
    assert manager.propose_victim([r for r in requests if manager.place(r)[0] == 0]) == requests[0]
    assert manager.preempt(requests[1]).length == 20
    assert (manager.free_slots, manager.metrics()["num_preemptions"]) == (4, 1)


def test_the_layout_of_all_is_one_that_each_has():
    manager = make_sharded(2, slots=4, lookahead=2)
    decode, prefill = manager.layout_of({0: 1}), manager.layout_of(([0, 1], [20, 1]))
    assert largest([decode, prefill]) == prefill
    assert {prefill, decode} <= set(manager.layouts)
    with pytest.raises(InvalidStep, match="cannot have PlanLayout"):
        manager.prepare_forward({manager.admit(): 20}, layout=decode)


def test_transfers_lie_side_by_side():
    manager = make_sharded(2, slots=4)
    request = manager.admit(shard=1)
    manager.prepare_forward({request: 140})
    for _ in range(2):
        manager.fork(request)
    assert manager.transfers_wait
    transfers = manager.take_transfers()
    own = copy.deepcopy(manager.managers[1]).take_transfers(again=True)
    assert transfers.operations.shape == (2 * own.operations.shape[0], 5)
    np.testing.assert_array_equal(transfers.operations[len(own.operations) :], own.operations)
    assert not transfers.operations[: len(own.operations)].any()
    np.testing.assert_array_equal(transfers.blocks[len(own.blocks) :], own.blocks)
    assert not manager.transfers_wait
