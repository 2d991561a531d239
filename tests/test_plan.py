"""StepPlan: the packed vector says exactly what a loop over requests and tokens says, on the host and inside jit."""

import dsv4_jax_native
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.host.planning import build_plan, build_plans
from dsv4_jax.layout.plan import PlanLayout, Receipt, StepPlan

FIELDS = ("token_slot", "token_position", "token_request", "request_slot", "request_reset", "query_start", "longest")
TABLE_FIELDS = ("table_slot", "table_index", "table_block")
DERIVED = ("request_start", "request_end", "last_token")


def every_field(plan: StepPlan) -> dict:
    fields = {name: getattr(plan, name) for name in (*FIELDS, *TABLE_FIELDS, *DERIVED)}
    return fields | {"closing_csa": plan.closing(4), "closing_hca": plan.closing(128)}


def by_loop(layout: PlanLayout, slots, starts, counts, resets, changes=()) -> dict:
    """Every field of a plan, from a loop over requests and tokens: name -> list, padded."""
    fields = {name: [] for name in (*FIELDS, *TABLE_FIELDS, *DERIVED, "closing_csa", "closing_hca")}
    flat = 0
    for request, (slot, start, count, reset) in enumerate(zip(slots, starts, counts, resets, strict=True)):
        fields["request_slot"].append(slot)
        fields["request_reset"].append(int(reset))
        fields["query_start"].append(flat)
        fields["request_start"].append(start)
        for position in range(start, start + count):
            fields["token_slot"].append(slot)
            fields["token_position"].append(position)
            fields["token_request"].append(request)
            for name, ratio in (("closing_csa", 4), ("closing_hca", 128)):
                if position % ratio == ratio - 1:
                    fields[name].append(flat)
                elif layout.tokens == layout.requests:  # every token has its own place
                    fields[name].append(-1)
            flat += 1
        fields["request_end"].append(start + count)
        fields["last_token"].append(flat - 1)
    for change in changes:
        for name, value in zip(TABLE_FIELDS, change, strict=True):
            fields[name].append(value)

    fields["longest"].append(max(counts, default=0))

    tokens, requests = layout.tokens, layout.requests
    sizes = dict.fromkeys(("token_slot", "token_position", "token_request"), tokens)
    sizes |= dict.fromkeys(("request_slot", "request_reset", *DERIVED), requests) | {
        "query_start": requests + 1,
        "longest": 1,
    }
    sizes |= dict.fromkeys(TABLE_FIELDS, tokens // 128 + requests)
    sizes |= {"closing_csa": (tokens + 3 * requests) // 4, "closing_hca": (tokens + 127 * requests) // 128}
    pads = {"request_reset": 0, "query_start": flat}
    for name, values in fields.items():
        assert len(values) <= sizes[name], f"{name} cannot hold this step"
        values.extend([pads.get(name, -1)] * (sizes[name] - len(values)))
    return fields


def without(expected: dict, stopped) -> dict:
    """What is left of a plan's fields (as of ``by_loop``) once some of its requests are stopped, by a loop."""
    left = {name: list(values) for name, values in expected.items()}
    gone = {slot for slot, stop in zip(left["request_slot"], stopped, strict=True) if stop}
    tokens = [flat for flat, slot in enumerate(left["token_slot"]) if slot in gone]
    requests = [request for request, slot in enumerate(left["request_slot"]) if slot in gone]
    changes = [change for change, slot in enumerate(left["table_slot"]) if slot in gone]
    for names, places in (
        (("token_slot", "token_position", "token_request"), tokens),
        (("request_slot", *DERIVED), requests),
        (TABLE_FIELDS, changes),
    ):
        for name in names:
            for place in places:
                left[name][place] = -1
    for request in requests:
        left["request_reset"][request] = 0
    for name in ("closing_csa", "closing_hca"):
        left[name] = [-1 if flat in tokens else flat for flat in left[name]]
    return left


def assert_fields(plan: StepPlan, expected: dict) -> None:
    for name, values in every_field(plan).items():
        assert values.dtype == np.int32, name
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@st.composite
def steps(draw: st.DrawFn):
    """(layout, slots, starts, counts): a step that fits its layout, often filling it to the last token and request."""
    slots = draw(st.lists(st.integers(0, 40), max_size=6, unique=True))
    starts = [draw(st.one_of(st.just(0), st.integers(0, 300), st.integers(2**20 - 300, 2**20))) for _ in slots]
    counts = [draw(st.one_of(st.just(1), st.integers(1, 5), st.integers(1, 300))) for _ in slots]
    tokens = max(1, sum(counts) + draw(st.sampled_from((0, 0, 1, 37))))
    return PlanLayout(tokens, max(1, len(slots) + draw(st.integers(0, 3)))), slots, starts, counts


def test_layout_sizes():
    layout = PlanLayout(tokens=256, requests=8)
    assert layout.table_changes == 10
    assert layout.closing_size(4) == 70
    assert layout.closing_size(128) == 9
    assert layout.size == 3 * 256 + 2 * 8 + 9 + 3 * 10 + 70 + 9 + 1


def test_layout_fields_tile_the_vector():
    layout = PlanLayout(tokens=1000, requests=7)
    covered = np.concatenate([np.arange(layout.size)[field] for field in layout.fields.values()])
    np.testing.assert_array_equal(covered, np.arange(layout.size))


@pytest.mark.parametrize(("tokens", "requests"), [(1, 1), (8, 8), (128, 128), (8, 4), (300, 5)])
def test_where_each_token_has_a_closing_place(tokens, requests):
    layout = PlanLayout(tokens, requests)
    plan = build_plan(layout, [0], [3], [1], False)
    assert plan.closing(4)[0] == 0
    if layout.closings_by_token:
        assert layout.closing_size(4) == layout.closing_size(128) == tokens
    else:
        assert requests < tokens


def test_plans_of_another_schema_have_another_layout():
    assert PlanLayout(64, 4, "a") != PlanLayout(64, 4, "b")
    assert PlanLayout(64, 4, "a").fields == PlanLayout(64, 4).fields


def test_plans_of_several_shards_have_no_fields_outside_shard_map():
    layout = PlanLayout(8, 2)
    shards = [build_plan(layout, [slot], [0], [3], True).packed for slot in (0, 1)]
    one_step, two_steps = np.concatenate(shards), np.tile(np.concatenate(shards), (2, 1))
    for packed in (one_step, two_steps):
        together = StepPlan(packed, layout)
        for read in (lambda p: p.token_slot, lambda p: p.closing(4), lambda p: p.request_end, lambda p: p.last_token):
            with pytest.raises(ValueError, match=r"several shards lie side by side.*shard_map"):
                read(together)
    with pytest.raises(ValueError, match="several shards"):
        StepPlan(one_step, layout).stop([True, True])
    with pytest.raises(ValueError, match="several shards"):
        StepPlan(one_step, layout).pack_tokens([[1, 2, 3]])


def test_inside_shard_map_each_shard_has_a_plan_of_its_own():
    layout = PlanLayout(8, 2)
    mesh = jax.sharding.AbstractMesh((2,), ("shards",), axis_types=(jax.sharding.AxisType.Auto,))
    for steps in ((), (3,)):
        plan = StepPlan(jax.ShapeDtypeStruct((*steps, 2 * layout.size), np.int32), layout)
        spec = jax.sharding.PartitionSpec(*[None] * len(steps), "shards")
        seen = []

        def read(plan, seen=seen):
            seen.append(plan.packed.shape)
            return plan.request_end

        ends = jax.eval_shape(jax.shard_map(read, mesh=mesh, in_specs=spec, out_specs=spec), plan)
        assert seen[0] == (*steps, layout.size)
        assert ends.shape == (*steps, 2 * layout.requests)


def test_layouts_are_equal_by_value():
    assert PlanLayout(64, 4) == PlanLayout(64, 4)
    assert hash(PlanLayout(64, 4)) == hash(PlanLayout(64, 4))
    assert PlanLayout(64, 4) != PlanLayout(64, 5)


@pytest.mark.parametrize(("tokens", "requests"), [(0, 1), (1, 0), (-4, 2)])
def test_layout_holds_at_least_one(tokens, requests):
    with pytest.raises(ValueError, match="at least 1"):
        PlanLayout(tokens, requests)


@settings(deadline=None, max_examples=200)
@given(steps(), st.booleans(), st.data())
def test_build_plan_equals_a_loop(step, one_for_all, data):
    layout, slots, starts, counts = step
    resets = [data.draw(st.booleans()) for _ in starts]
    if one_for_all:
        resets = resets[:1] * len(starts)
    change = st.tuples(st.integers(0, 40), st.integers(0, 99), st.integers(0, 999))
    changes = data.draw(st.lists(change, max_size=layout.table_changes))
    table_changes = tuple(np.array(changes).T) if changes else None
    plan = build_plan(layout, slots, starts, counts, any(resets) if one_for_all else resets, table_changes)
    assert_fields(plan, by_loop(layout, slots, starts, counts, resets, changes))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), min_size=1, max_size=8))
def test_capacities_hold_for_any_step(requests):
    layout = PlanLayout(sum(count for _, count in requests), len(requests))
    for ratio in (4, 128):
        closing = sum((start + count) // ratio - start // ratio for start, count in requests)
        assert closing <= layout.closing_size(ratio)
    fourth = [{e // 32 for e in range((s + c) // 4)} - {e // 32 for e in range(s // 4)} for s, c in requests]
    assert sum(map(len, fourth)) <= layout.table_changes


def test_capacities_are_reached():
    layout = PlanLayout(tokens=4 * 130, requests=4)
    plan = build_plan(layout, range(4), [127] * 4, [129 + 1] * 4, False)
    assert np.count_nonzero(plan.closing(128) >= 0) == 4 * 2
    assert layout.closing_size(128) == 8
    layout = PlanLayout(tokens=4, requests=4)
    plan = build_plan(layout, range(4), [3] * 4, [1] * 4, False)
    np.testing.assert_array_equal(plan.closing(4), [0, 1, 2, 3])


def test_no_request_is_nothing_but_padding():
    layout = PlanLayout(8, 3)
    plan = build_plan(layout, [], [], [], [])
    assert_fields(plan, by_loop(layout, [], [], [], []))
    np.testing.assert_array_equal(plan.pack_tokens([]), np.zeros(8))


@pytest.mark.parametrize(
    ("slots", "counts", "changes"),
    [([0, 1, 2], [1, 1, 1], 0), ([0, 1], [4, 5], 0), ([0, 1], [1, 1], 3)],
    ids=["requests", "tokens", "table changes"],
)
def test_build_plan_refuses_what_does_not_fit(slots, counts, changes):
    table_changes = (np.zeros(changes, int),) * 3 if changes else None
    with pytest.raises(ValueError, match="do not fit a plan"):
        build_plan(PlanLayout(8, 2), slots, [5] * len(slots), counts, False, table_changes)


def test_unknown_ratio():
    plan = build_plan(PlanLayout(8, 2), [0], [0], [8], [True])
    with pytest.raises(ValueError, match=r"\(4, 128\)"):
        plan.closing(8)
    with pytest.raises(ValueError, match=r"\(4, 128\)"):
        plan.layout.closing_size(0)


def test_packed_vector_is_read_only():
    plan = build_plan(PlanLayout(8, 2), [0], [0], [8], [True])
    with pytest.raises(ValueError, match="read-only"):
        plan.packed[0] = 1


def test_every_field_is_the_same_inside_jit_without_a_retrace(rng):
    traces = 0

    @jax.jit
    def fields(plan):
        nonlocal traces
        traces += 1
        return every_field(plan)

    layout = PlanLayout(640, 5)
    for requests in range(6):
        slots = rng.permutation(9)[:requests].tolist()
        starts = [int(rng.choice([0, 3, 127, 128, 1_000_000])) for _ in slots]
        counts = rng.integers(1, 129, requests).tolist()
        resets = rng.random(requests) < 0.5
        expected = by_loop(layout, slots, starts, counts, resets)
        for name, values in fields(
            build_plan(layout, slots, starts, counts, resets, receipt=Receipt("a", 1, 1))
        ).items():
            assert values.dtype == np.int32, name
            np.testing.assert_array_equal(values, expected[name], err_msg=name)
    assert traces == 1


def test_stacked_plans_have_stacked_fields_and_scan_apart():
    layout = PlanLayout(6, 3)
    plans = [build_plan(layout, [4, 1], [step, 127 + step], [1, 1], [True, False]) for step in range(3)]
    stacked = StepPlan(np.stack([plan.packed for plan in plans]), layout)
    for name, values in every_field(stacked).items():
        np.testing.assert_array_equal(values, np.stack([every_field(plan)[name] for plan in plans]), err_msg=name)
    _, ends = jax.jit(lambda plans: jax.lax.scan(lambda carry, plan: (carry, plan.request_end), 0, plans))(stacked)
    np.testing.assert_array_equal(ends, [[1, 128, -1], [2, 129, -1], [3, 130, -1]])


@settings(deadline=None, max_examples=100)
@given(steps(), st.integers(1, 5), st.data())
def test_build_plans_is_a_loop_over_steps(first, count, data):
    layout, slots, starts, counts = first
    change = st.tuples(st.integers(0, 40), st.integers(0, 99), st.integers(0, 999))
    changes = [data.draw(st.lists(change, max_size=layout.table_changes)) for _ in range(count)]
    flat = [(step, *change) for step, of_step in enumerate(changes) for change in of_step]
    first_resets = [data.draw(st.booleans()) for _ in starts]
    plan = build_plans(layout, count, slots, starts, counts, first_resets, tuple(np.array(flat).T) if flat else None)
    assert plan.packed.shape == (count, layout.size)
    for step in range(count):
        now = [start + step * tokens for start, tokens in zip(starts, counts, strict=True)]
        resets = [step == 0 and reset for reset in first_resets]
        assert_fields(plan.step(step), by_loop(layout, slots, now, counts, resets, changes[step]))


def test_build_plans_refuses_too_many_changes_in_one_step():
    layout = PlanLayout(8, 2)
    fit = ([0, 0, 1, 1], *np.zeros((3, 4), int))
    build_plans(layout, 2, [0], [5], [1], False, fit)
    with pytest.raises(ValueError, match="3 table changes in one step do not fit a plan of 2"):
        build_plans(layout, 2, [0], [5], [1], False, ([0, 1, 1, 1], *fit[1:]))


@pytest.mark.parametrize("layout", [PlanLayout(5, 5), PlanLayout(300, 5), PlanLayout(400, 6)], ids=str)
def test_stop_leaves_a_plan_of_the_others(layout, rng):
    stop = jax.jit(StepPlan.stop)
    for _ in range(30):
        requests = int(rng.integers(0, layout.requests + 1))
        slots = rng.permutation(9)[:requests].tolist()
        starts = [int(rng.choice([0, 3, 126, 127, 1_000_000])) for _ in slots]
        counts = [int(rng.integers(1, layout.tokens // requests + 1)) for _ in slots]
        changes = [
            (int(rng.choice(slots)), int(rng.integers(99)), int(rng.integers(999)))
            for _ in range(int(rng.integers(0, layout.table_changes + 1)) if slots else 0)
        ]
        resets = rng.random(requests) < 0.5
        plan = build_plan(layout, slots, starts, counts, resets, tuple(np.array(changes).T) if changes else None)
        expected = by_loop(layout, slots, starts, counts, resets, changes)
        stopped, more = rng.random((2, layout.requests)) < rng.random()
        left = stop(plan, stopped)
        assert left.layout == layout
        assert_fields(left, without(expected, stopped & (np.arange(layout.requests) < requests)))
        np.testing.assert_array_equal(stop(left, more).packed, stop(plan, stopped | more).packed)


def test_stop_inside_a_scan_and_a_while_loop():
    layout = PlanLayout(6, 3)
    plans = build_plans(layout, 4, [4, 1], [0, 126], [1, 2], [True, False], ([1], [1], [0], [9]))
    ends = np.array([1, 3, 0])  # the step before which each request stops

    def by_scan(plans, ends):
        return jax.lax.scan(lambda i, plan: (i + 1, plan.stop(i >= ends).packed), 0, plans)[1]

    def by_while(plans, ends):
        def body(state):
            i, packed = state
            return i + 1, packed.at[i].set(plans.step(i).stop(i >= ends).packed)

        return jax.lax.while_loop(lambda state: state[0] < 4, body, (0, jax.numpy.zeros_like(plans.packed)))[1]

    expected = [plans.step(i).stop(i >= ends).packed for i in range(4)]
    assert jax.jit(lambda plan: plan.stop(ends > 0))(plans.step(0)).receipt is None
    for program in (by_scan, by_while):
        np.testing.assert_array_equal(jax.jit(program)(plans, ends), expected)


@pytest.mark.parametrize("layout", [PlanLayout(5, 5), PlanLayout(300, 5), PlanLayout(400, 6)], ids=str)
def test_a_rebased_plan_is_one_made_for_the_real_lengths(layout, rng):
    rebase, stop = jax.jit(StepPlan.rebase), jax.jit(StepPlan.stop)
    for _ in range(30):
        requests = int(rng.integers(0, layout.requests + 1))
        slots = rng.permutation(9)[:requests].tolist()
        starts = [int(rng.choice([0, 3, 126, 255, 1_000_000])) for _ in slots]
        counts = [int(rng.integers(1, layout.tokens // requests + 1)) for _ in slots]
        resets = rng.random(requests) < 0.5
        lengths = rng.integers(-1, 2**31 - 1, layout.requests)
        lengths[:requests] = np.asarray(starts, int) - rng.integers(-2, 140, requests)
        real = [min(max(int(n), 0), start) for n, start in zip(lengths, starts, strict=False)]
        changes = ([4], [2], [7]) if requests else None
        plan = build_plan(layout, slots, starts, counts, resets, changes)
        expected = by_loop(layout, slots, real, counts, resets, [(4, 2, 7)] if requests else [])
        assert_fields(rebase(plan, lengths.astype(np.int32)), expected)
        stopped = rng.random(layout.requests) < 0.4
        left = stop(rebase(plan, lengths), stopped)
        assert_fields(left, without(expected, stopped & (np.arange(layout.requests) < requests)))
        other = every_field(rebase(stop(plan, stopped), lengths))
        for name, values in every_field(left).items():
            if name.startswith("closing") and not layout.closings_by_token:  # which stop leaves in their places
                np.testing.assert_array_equal(other[name], sorted(values, key=lambda token: token < 0), err_msg=name)
            else:
                np.testing.assert_array_equal(other[name], values, err_msg=name)


def test_rebase_takes_the_plan_and_the_lengths_it_is_for():
    plans = build_plans(PlanLayout(8, 3), 2, [3], [0], [3], [True])
    for plan, lengths in ((plans, [0] * 3), (plans.step(0), [0] * 2), (plans.step(0), 0), (plans.step(0), [0.0] * 3)):
        with pytest.raises(ValueError, match=r"one step and integers \[3\]"):
            plan.rebase(lengths)


def test_step_and_stop_take_the_plans_they_are_for():
    layout = PlanLayout(8, 3)
    plans = build_plans(layout, 2, [3], [0], [3], [True])
    with pytest.raises(ValueError, match="stacked"):
        plans.step(0).step(0)
    for plan, mask in ((plans, [True] * 3), (plans.step(0), [True] * 2), (plans.step(0), True)):
        with pytest.raises(ValueError, match=r"one step and a mask \[3\]"):
            plan.stop(mask)


def test_pytree_has_one_leaf_and_leaves_the_receipt_behind():
    layout = PlanLayout(6, 3)
    one, other = (build_plan(layout, [0], [0], [1], [True], receipt=Receipt("a", i, i)) for i in range(2))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert len(jax.tree.leaves(one)) == 1
    assert jax.tree.map(lambda leaf: leaf, one).receipt is None
    assert jax.device_put(one).layout == layout


def test_pack_tokens_in_plan_order():
    plan = build_plan(PlanLayout(8, 4), [3, 0, 2], [0, 9, 5], [3, 1, 2], False)
    expected = [11, 12, 13, 21, 31, 32, 0, 0]
    for tokens in (
        [[11, 12, 13], 21, np.array([31, 32])],
        np.array([11, 12, 13, 21, 31, 32]),
        (t for t in ((11, 12, 13), [21], (31, 32))),
    ):
        packed = plan.pack_tokens(tokens)
        assert packed.dtype == np.int32
        np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(np.array(expected)[plan.last_token[:3]], [13, 21, 32])


def test_pack_tokens_of_a_single_request():
    plan = build_plan(PlanLayout(8, 4), [3], [9], [3], False)
    for tokens in ([1, 2, 3], (1, 2, 3), [[1, 2, 3]], [np.int32(1), 2, 3], range(1, 4), np.arange(1, 4), [(1, 2, 3)]):
        np.testing.assert_array_equal(plan.pack_tokens(tokens), [1, 2, 3, 0, 0, 0, 0, 0])
    for tokens in ([1, 2], [1, 2, 3, 4], [[1, 2]], []):
        with pytest.raises(ValueError, match="tokens"):
            plan.pack_tokens(tokens)
    with pytest.raises(ValueError, match="integers"):
        plan.pack_tokens([1.0, 2, 3])
    one = build_plan(PlanLayout(8, 4), [3], [9], [1], False)
    np.testing.assert_array_equal(one.pack_tokens([7])[:2], [7, 0])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2, 3], [4]], "3 requests, got tokens for 2"),
        ([[1, 2], [3, 4], [5, 6]], "request 0 of the plan has 3 tokens"),
        (np.arange(5), "6 tokens, got 5"),
        (np.ones(6), "must be integers"),
    ],
)
def test_pack_tokens_refuses_the_wrong_tokens(tokens, message):
    plan = build_plan(PlanLayout(8, 4), [3, 0, 2], [0, 9, 5], [3, 1, 2], False)
    with pytest.raises(ValueError, match=message):
        plan.pack_tokens(tokens)


def test_pack_tokens_refuses_stacked_plans():
    plan = build_plan(PlanLayout(8, 4), [3], [0], [3], [True])
    with pytest.raises(ValueError, match="one step"):
        StepPlan(np.stack([plan.packed] * 2), plan.layout).pack_tokens([[1, 2, 3]])


@pytest.mark.parametrize(("tokens", "requests"), [(1, 1), (64, 64), (8192, 7), (300, 5)])
def test_kernels_look_for_every_field_where_the_layout_has_it(tokens, requests):
    layout = PlanLayout(tokens, requests)
    assert dsv4_jax_native.plan_offsets(tokens, requests) == {
        name: where.start for name, where in layout.fields.items()
    }
