"""The operations against golden data and float64 NumPy: entries, keys, tails and windows, however a prompt is cut."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from golden import GOLDEN, META
from implementations import IMPLEMENTATIONS, ops_of

from dsv4_jax.cache.rotary import closing_rotary
from dsv4_jax.host.planning import build_plan
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, WINDOW_FORMATS
from dsv4_jax.layout.plan import PlanLayout
from dsv4_jax.spec.model import RopeSpec

LENGTH, EPS = META["seq"], META["eps"]
ROPE = RopeSpec(theta=160000.0, factor=16.0)
INVERSE_FREQUENCIES = GOLDEN["rope.compress_inv_freq"]

SLOTS, BLOCKS, MAX_BLOCKS, RING = 4, 16, 6, 128
BUCKETS = (2, 264, LENGTH)
CSA, KEY, HCA = "L1.", "L1.idx_", "L2."
WIDTHS = {CSA: 512, KEY: 128, HCA: 512}
RATIOS = {CSA: 4, KEY: 4, HCA: 128}
TAILS = {CSA: "csa_tail", KEY: "csa_key_tail", HCA: "hca_tail"}
POOLS = {CSA: "csa_entries", KEY: "csa_keys", HCA: "hca_entries"}
FORMATS = {CSA: ENTRY_FORMATS["fp32"], KEY: KEY_FORMATS["fp32"], HCA: ENTRY_FORMATS["fp32"]}
EXPECTED = {CSA: "L1.compressed", KEY: "L1.idx_keys", HCA: "L2.compressed"}
LAYER = {CSA: 1, KEY: 1, HCA: 0}  # of 2, 2 and 1; the others stay poisoned
WINDOW_LAYER = 2  # of 3
FP32 = WINDOW_FORMATS["fp32"]


@pytest.fixture(params=IMPLEMENTATIONS)
def ops(request, device):
    return ops_of(request.param)


def golden_inputs():
    """Per-token inputs of the golden request: name -> [703, columns]."""
    inputs = {"rows": GOLDEN["L1.swa_k"]}
    for kind in TAILS:
        inputs |= {kind + "kv": GOLDEN[kind + "kv"], kind + "gate": GOLDEN[kind + "gate"]}
    return inputs


def random_inputs(rng, length=LENGTH):
    """Inputs of another request, of the golden shapes."""
    return {name: rng.standard_normal((length, x.shape[1])).astype(np.float32) for name, x in golden_inputs().items()}


def poisoned_state():
    """Every array of a cache with NaN (and wrong positions and blocks) in every place, as a former owner leaves it."""
    nan = np.float32(np.nan)
    state = {
        "block_table": np.full((SLOTS, MAX_BLOCKS), 3, np.int32),
        "write_table": np.full((SLOTS, MAX_BLOCKS), 3, np.int32),
        "window": np.full((3, SLOTS, RING, 512), nan),
        "window_positions": np.broadcast_to(np.arange(RING, dtype=np.int32), (3, SLOTS, RING)),
        "csa_tail": np.full((2, SLOTS, 2, 12, 512), nan),
        "csa_key_tail": np.full((2, SLOTS, 2, 12, 128), nan),
        "hca_tail": np.full((1, SLOTS, 2, 128, 512), nan),
        "csa_entries": np.full((2, BLOCKS, 32, 512), nan),
        "csa_keys": np.full((2, BLOCKS, 32, 128), nan),
        "hca_entries": np.full((1, BLOCKS, 1, 512), nan),
    }
    return {name: jnp.asarray(x) for name, x in state.items()}


def begin(ops, state, plan):
    names = ("block_table", "write_table", "window_positions")
    *arrays, plan = ops.begin_step(*(state[name] for name in names), plan)
    return state | dict(zip(names, arrays, strict=True)), plan


@functools.cache
def jitted(function, *arguments, donate=(), **options):
    """One, whoever asks. What is not jitted is compiled piece by piece."""
    return jax.jit(functools.partial(function, *arguments, **options), donate_argnums=donate)


def run_step(ops, append_first, state, plan, inputs):
    state, plan = begin(ops, state, plan)

    def append():
        for kind, tail in TAILS.items():
            state[tail] = ops.append_tail(
                state[tail],
                inputs[kind + "kv"],
                inputs[kind + "gate"],
                GOLDEN[kind + "ape"],
                plan,
                LAYER[kind],
                ratio=RATIOS[kind],
            )
        state["window"], state["window_positions"] = ops.append_window(
            state["window"], state["window_positions"], inputs["rows"], plan, WINDOW_LAYER, format=FP32
        )

    if append_first:
        append()
    for kind, tail in TAILS.items():
        rotary = closing_rotary(plan, RATIOS[kind], ROPE)
        state[tail], entries = ops.compress(
            state[tail],
            inputs[kind + "kv"],
            inputs[kind + "gate"],
            GOLDEN[kind + "ape"],
            GOLDEN[kind + "norm_w"],
            rotary.cos,
            rotary.sin,
            plan,
            LAYER[kind],
            ratio=RATIOS[kind],
            eps=EPS,
        )
        pool = POOLS[kind]
        state[pool] = ops.flush(
            state[pool],
            entries,
            state["block_table"],
            plan,
            LAYER[kind],
            ratio=RATIOS[kind],
            format=FORMATS[kind],
        )
    if not append_first:
        append()
    for kind, tail in TAILS.items():
        state[tail] = ops.rotate(state[tail], plan, LAYER[kind], ratio=RATIOS[kind])
    return state


class Server:
    """A cache of one implementation, served step by step."""

    def __init__(self, ops, *, append_first=False):
        self.ops = ops
        self.step = jitted(run_step, ops, append_first, donate=0)
        self.state = poisoned_state()
        self.blocks = np.random.default_rng(0).permutation(BLOCKS)

    def admit(self, slot, order):
        """A new owner for a slot, with the six blocks from the order-th on; begin_step does both."""
        blocks = self.blocks[MAX_BLOCKS * order : MAX_BLOCKS * (order + 1)]
        changes = (np.full(MAX_BLOCKS, slot), np.arange(MAX_BLOCKS), blocks)
        layout = PlanLayout(tokens=128 * MAX_BLOCKS, requests=2)
        plan = build_plan(layout, [slot], [0], [1], [True], changes)
        self.state, _ = jitted(begin, self.ops)(self.state, plan)

    def run(self, requests):
        """One step: requests is [(slot, start, inputs of its new tokens)]."""
        slots, starts = [slot for slot, _, _ in requests], [start for _, start, _ in requests]
        counts = [len(inputs["rows"]) for _, _, inputs in requests]
        tokens = next(bucket for bucket in BUCKETS if bucket >= sum(counts))
        plan = build_plan(PlanLayout(tokens, 2), slots, starts, counts, np.zeros(len(slots), bool))
        inputs = {}
        for name in requests[0][2]:
            x = np.concatenate([inputs[name] for _, _, inputs in requests])
            padding = np.full((tokens - len(x), x.shape[1]), np.nan, x.dtype)
            inputs[name] = np.concatenate([x, padding])
        self.state = self.step(self.state, plan, inputs)

    def entries(self, kind, slot, length):
        """The entries stored for a slot of that length: fp32 [n, width]."""
        count, asked = length // RATIOS[kind], LENGTH // RATIOS[kind] + 3
        options = {"ratio": RATIOS[kind], "format": FORMATS[kind], "dtype": jnp.float32, "entries": asked}
        _, rows = jitted(self.ops.gather_all_entries, **options)(
            self.state[POOLS[kind]],
            self.state["block_table"],
            build_plan(PlanLayout(1, 1), [slot], [length - 1], [1], False),
            LAYER[kind],
        )
        values, positions, valid = (np.asarray(x[0]) for x in rows)
        np.testing.assert_array_equal(valid, np.arange(asked) < count)
        np.testing.assert_array_equal(positions, np.where(valid, RATIOS[kind] * np.arange(asked), -1))
        assert not values[count:].any()
        return values[:count]

    def window(self, slot, last):
        """The window of a slot at a position: Rows of [128]."""
        _, _, rows = jitted(self.ops.gather_window, format=FP32, dtype=jnp.float32)(
            self.state["window"],
            self.state["window_positions"],
            build_plan(PlanLayout(1, 1), [slot], [last], [1], False),
            WINDOW_LAYER,
        )
        return tuple(np.asarray(x[0]) for x in rows)

    def tail(self, kind, slot):
        return np.asarray(self.state[TAILS[kind]][LAYER[kind], slot])


def chunks(cuts, length=LENGTH):
    """(start, end) between cuts."""
    return list(itertools.pairwise([0, *cuts, length]))


def piece(inputs, start, end):
    return {name: x[start:end] for name, x in inputs.items()}


def ragged_cuts(rng):
    """Cuts that give chunks of one token, of less than a window, on, before and after every kind of boundary."""
    cuts = {1, 2, 3, 4, 8, 127, 128, 129, 131, 256, 400, 511, 512, 513} | set(rng.integers(1, LENGTH, 6).tolist())
    return sorted(cuts)


SCHEDULES = {
    "one-shot": lambda rng: ([], False),
    "ragged": lambda rng: (ragged_cuts(rng), False),
    "decode": lambda rng: (list(range(1, LENGTH)), False),
    "decode, append first": lambda rng: (list(range(1, LENGTH)), True),
}
# The definition is the same function for every cut, and slow: two say what all would.
schedules = pytest.mark.parametrize(
    ("ops", "schedule"),
    [("native", name) for name in SCHEDULES] + [("reference", "ragged"), ("reference", "decode, append first")],
    indirect=["ops"],
)


def served(ops, cuts, append_first, slot=2, length=LENGTH):
    server = Server(ops, append_first=append_first)
    server.admit(slot, 1)
    inputs = golden_inputs()
    for start, end in chunks(cuts, length):
        server.run([(slot, start, piece(inputs, start, end))])
    return server


@schedules
def test_golden_entries_keys_tails_and_window(ops, schedule, rng):
    server = served(ops, *SCHEDULES[schedule](rng))
    inputs = golden_inputs()
    for kind in TAILS:
        entries = server.entries(kind, 2, LENGTH)
        np.testing.assert_allclose(entries, GOLDEN[EXPECTED[kind]], atol=1e-5, rtol=0)
        tail = numpy_reference.tail(inputs[kind + "kv"], inputs[kind + "gate"], GOLDEN[kind + "ape"], WIDTHS[kind])
        np.testing.assert_array_equal(server.tail(kind, 2), tail)
    values, positions, valid = server.window(2, LENGTH - 1)
    assert valid.all()
    np.testing.assert_array_equal(positions, np.arange(LENGTH - 128, LENGTH))
    np.testing.assert_array_equal(values, GOLDEN["L1.swa_k"][-128:])


@pytest.mark.parametrize(("length", "name"), [(META["prefill"], "prefill"), (LENGTH, "final")])
def test_golden_tail_states_of_hugging_face(ops, length, name, rng):
    """HF keeps raw gates for the open window and gates with ape for the previous one."""
    cuts = [cut for cut in ragged_cuts(rng) if cut < length]
    server = served(ops, cuts, False, length=length)
    for kind, layer, part in ((CSA, "L1", "compressor"), (KEY, "L1", "indexer"), (HCA, "L2", "compressor")):
        ratio, width, ape = RATIOS[kind], WIDTHS[kind], GOLDEN[kind + "ape"]
        filled = length % ratio
        kv, score = server.tail(kind, 2)
        open_kv = GOLDEN[f"state.{name}.{layer}.buffer_kv.{part}"]
        open_score = GOLDEN[f"state.{name}.{layer}.buffer_gate.{part}"] + ape[:filled]
        current = slice(len(kv) - ratio, len(kv) - ratio + filled)
        np.testing.assert_array_equal(kv[current], open_kv[:, -width:])
        np.testing.assert_array_equal(score[current], open_score[:, -width:])
        if ratio == 128:
            continue
        window = length // ratio
        opened, previous = (slice(4 * (w % 2), 4 * (w % 2) + n) for w, n in ((window, filled), (window - 1, 4)))
        np.testing.assert_array_equal(kv[opened], open_kv[:, :width])
        np.testing.assert_array_equal(score[opened], open_score[:, :width])
        np.testing.assert_array_equal(kv[previous], GOLDEN[f"state.{name}.{layer}.overlap_kv.{part}"])
        np.testing.assert_array_equal(score[previous], GOLDEN[f"state.{name}.{layer}.overlap_gate.{part}"])


def test_the_numpy_model_reproduces_the_golden_entries():
    for kind in TAILS:
        expected = numpy_reference.entries(
            GOLDEN[kind + "kv"],
            GOLDEN[kind + "gate"],
            GOLDEN[kind + "ape"],
            GOLDEN[kind + "norm_w"],
            INVERSE_FREQUENCIES,
            RATIOS[kind],
            EPS,
        )
        np.testing.assert_allclose(expected, GOLDEN[EXPECTED[kind]], atol=1e-5, rtol=0)


def test_two_requests_of_different_lengths_and_a_reused_slot(ops, rng):
    """Random requests, interleaved in one cache; the first ends early and its slot and blocks go to a third."""
    lengths = {"first": 260, "second": int(rng.integers(300, 600)), "third": int(rng.integers(130, 400))}
    inputs = {name: random_inputs(rng, length) for name, length in lengths.items()}
    inputs["second"] = {name: x.astype(jnp.bfloat16).astype(np.float32) for name, x in inputs["second"].items()}
    slots, done = {"first": 3, "second": 0, "third": 3}, dict.fromkeys(lengths, 0)
    server = Server(ops)
    server.admit(3, 0)
    server.admit(0, 1)
    running = ["first", "second"]
    while running:
        step = []
        for name in running:
            count = int(rng.choice([1, 3, 64, 130]))
            end = min(done[name] + count, lengths[name])
            step.append((slots[name], done[name], piece(inputs[name], done[name], end)))
            done[name] = end
        server.run(step)
        for name in [name for name in running if done[name] == lengths[name]]:
            assert_request_as_modelled(server, slots[name], inputs[name])
            running.remove(name)
            if name == "first":
                server.admit(3, 0)
                running.append("third")
    assert_request_as_modelled(server, 0, inputs["second"])


def assert_request_as_modelled(server, slot, inputs):
    """Everything a slot shows against the NumPy model of the whole request."""
    length = len(inputs["rows"])
    for kind in TAILS:
        expected = numpy_reference.entries(
            inputs[kind + "kv"],
            inputs[kind + "gate"],
            GOLDEN[kind + "ape"],
            GOLDEN[kind + "norm_w"],
            INVERSE_FREQUENCIES,
            RATIOS[kind],
            EPS,
        )
        np.testing.assert_allclose(server.entries(kind, slot, length), expected, atol=1e-5, rtol=0)
        tail = numpy_reference.tail(inputs[kind + "kv"], inputs[kind + "gate"], GOLDEN[kind + "ape"], WIDTHS[kind])
        np.testing.assert_array_equal(server.tail(kind, slot), tail)
    values, positions, valid = server.window(slot, length - 1)
    expected_positions = numpy_reference.window_positions(length - 1)
    np.testing.assert_array_equal(valid, expected_positions >= 0)
    np.testing.assert_array_equal(positions, np.where(valid, expected_positions, -1))
    np.testing.assert_array_equal(values[valid], inputs["rows"][expected_positions[valid]])
    assert not values[~valid].any()
