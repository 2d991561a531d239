"""Transfers against a loop in NumPy: random operations in order, on arrays of every role, and on a whole cache."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import assert_in_place, compile_for_h200
from harness import SPEC, Driver, assert_same_bytes, random_tokens, random_weights

from dsv4_jax import (
    PROFILES,
    Cache,
    CacheFormats,
    CacheSchema,
    OperandError,
    TransferList,
    apply_transfers,
    init_cache,
    ops,
)
from dsv4_jax.layout.formats import HCA_TAILS
from dsv4_jax.layout.schema import TABLES
from dsv4_jax.layout.transfers import SlotArray, TransferKind, Transfers

NONE, RESET, INSTALL, COPY, COPY_BLOCK, SHARE, WIPE, WIPE_BLOCKS = TransferKind
TABLE, WRITE_TABLE, POSITIONS, STATE, TAIL, BLOCKS = SlotArray

IMPLEMENTATION = pytest.mark.parametrize("implementation", ["native", "reference"])


def by_loop(array: np.ndarray, transfers: Transfers, role: SlotArray) -> np.ndarray:
    """What a role's array [layers, slots, ...] (a table [slots, max_blocks]) becomes, an operation at a time."""
    array = array.copy()
    is_table = role in (TABLE, WRITE_TABLE)
    by_layer = array[None] if is_table else array
    slots = by_layer.shape[1]
    for kind, slot, source, offset, count in np.asarray(transfers.operations).tolist():
        if kind == WIPE_BLOCKS and role == BLOCKS and offset >= 0:
            listed = transfers.blocks[offset : offset + max(count, 0)]
            by_layer[:, listed[(listed >= 0) & (listed < slots)]] = 0
        if not 0 <= slot < slots:
            continue
        if kind == RESET and (is_table or role == POSITIONS):
            by_layer[:, slot] = -1
        if kind == WIPE and role != BLOCKS:
            by_layer[:, slot] = -1 if is_table or role == POSITIONS else 0
            if role == TAIL and array.ndim == 5:
                by_layer[:, slot, 1] = -1e9
            elif role == TAIL:
                by_layer[:, slot, ::3] = -1e9
        if kind == (COPY_BLOCK if role == BLOCKS else COPY) and not is_table and 0 <= source < slots:
            by_layer[:, slot] = by_layer[:, source].copy()
        if kind in (INSTALL, SHARE) and is_table and offset >= 0:
            for nth in range(min(count, len(transfers.blocks) - offset)):
                if 0 <= source + nth < by_layer.shape[2]:
                    only_read = kind == SHARE and role == WRITE_TABLE
                    by_layer[0, slot, source + nth] = -1 if only_read else transfers.blocks[offset + nth]
    return array


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_copies_are_counted_in_bytes(hca_tail, rng):
    """Of slots, of snapshots and of blocks: as much as each has in the arrays, but for the table."""
    formats = dataclasses.replace(CacheFormats(), hca_tail=hca_tail)
    schema = CacheSchema(SPEC, formats, slots=3, blocks=8, max_context=512, lookahead=2, snapshots=2)
    sizes = {name: array.size * array.dtype.itemsize // array.shape[1] for name, array in schema.arrays.items()}
    for name in TABLES:
        sizes.pop(name)
    of_block = sum(size for name, size in sizes.items() if schema.arrays[name].shape[1] == schema.blocks)
    of_slot = sum(sizes.values()) - of_block
    twins, taken, given, blocks = rng.integers(0, 4, 4).tolist()
    made = TransferList()
    for _ in range(twins):
        made.copy(0, 2)
    for _ in range(taken):
        made.copy(1, 3)
    for _ in range(given):
        made.reset(2)
        made.copy(4, 2)
        made.install(2, [5, 6])
        made.share(2, [4])
    for _ in range(blocks):
        made.copy_block(7, 1)
    expected = twins * of_slot + (taken + given) * (of_slot - sizes["hca_tail"]) + blocks * of_block
    assert made.pack().copies(schema) == (twins + taken + given + blocks, expected)


def random_list(rng: np.random.Generator, slots: int, max_blocks: int, operations: int) -> TransferList:
    """Operations that follow each other on few slots, so that their order matters."""
    made = TransferList()
    for _ in range(operations):
        slot, other = rng.integers(0, slots + 1, 2)
        match rng.integers(7):
            case 0:
                made.reset(slot)
            case 1:
                count = rng.integers(0, max_blocks + 3)
                made.install(slot, rng.integers(0, 10**6, count), first=int(rng.integers(0, max_blocks + 2)))
            case 2:
                made.copy(slot, other)
            case 3:
                made.copy_block(slot, other)
            case 4:
                made.wipe(slot)
            case 5:
                made.wipe_blocks([slot, other])
            case 6:
                count = rng.integers(0, max_blocks + 3)
                made.share(slot, rng.integers(0, 10**6, count), first=int(rng.integers(0, max_blocks + 2)))
    return made


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> np.ndarray:
    """Any bytes."""
    return rng.integers(0, 256, (*shape[:-1], shape[-1] * np.dtype(dtype).itemsize), np.uint8).view(dtype)


ARRAYS = {
    "table": (TABLE, (5, 300), np.int32),
    "write table": (WRITE_TABLE, (5, 300), np.int32),
    "positions": (POSITIONS, (3, 5, 131), np.int32),
    "bytes, odd": (STATE, (2, 5, 333), np.uint8),
    "bytes, by 4": (STATE, (2, 5, 580), np.uint8),
    "bytes, by 16": (STATE, (3, 5, 9344), np.uint8),
    "rows": (STATE, (2, 5, 131, 512), jnp.bfloat16),
    "tail": (TAIL, (2, 5, 2, 12, 128), np.float32),
    "tail, by 4": (TAIL, (2, 5, 2, 3, 3), np.float32),
    "running tail": (TAIL, (1, 5, 3, 512), np.float32),
    "running tails": (TAIL, (2, 5, 9, 7), np.float32),
    "pages": (BLOCKS, (3, 5, 18560), np.uint8),
    "entries of a block": (BLOCKS, (2, 5, 32, 512), jnp.bfloat16),
    "no layers": (STATE, (0, 5, 3, 512), np.float32),
}
EVERY_ARRAY = pytest.mark.parametrize(("role", "shape", "dtype"), ARRAYS.values(), ids=ARRAYS)


@IMPLEMENTATION
@EVERY_ARRAY
def test_operations_happen_in_order(device, rng, implementation, role, shape, dtype):
    transfer = jax.jit(partial(ops.transfer, role=role, implementation=implementation), donate_argnums=0)
    for operations in (0, 1, 7, 40):
        array = random_array(rng, shape, dtype)
        transfers = random_list(rng, 5, shape[-1], operations).pack()
        expected = by_loop(array, transfers, role)
        assert np.asarray(transfer(jnp.array(array), transfers)).tobytes() == expected.tobytes()


@IMPLEMENTATION
@EVERY_ARRAY
def test_what_is_out_of_range_writes_nothing(device, rng, implementation, role, shape, dtype):
    """Numbers that no ``TransferList`` would write down, the largest and smallest among them."""
    transfer = jax.jit(partial(ops.transfer, role=role, implementation=implementation))
    strange = np.array([-(2**31), -7, -1, 0, 1, 2, 3, 4, 5, 6, 7, 2**31 - 1], np.int32)
    for _ in range(4):
        array = random_array(rng, shape, dtype)
        transfers = Transfers(rng.choice(strange, (64, 5)), rng.integers(-1, 9, 4).astype(np.int32))
        expected = by_loop(array, transfers, role)
        assert np.asarray(transfer(array, transfers)).tobytes() == expected.tobytes()


def test_roles_and_kinds_are_told_apart(rng):
    """A check of the loop itself: each kind changes the arrays that it should."""
    arrays = {role: rng.permutation(100).reshape(2, 5, 10) for role in SlotArray}
    for table in (TABLE, WRITE_TABLE):
        arrays[table] = 1000 + arrays[table][0]
        arrays[TAIL] = rng.permutation(100).reshape(2, 5, 2, 5, 1)
    changed = {
        (role, kind): (by_loop(array, Transfers([[kind, 1, 2, 0, 1]], np.array([3])), role) != array).any()
        for role, array in arrays.items()
        for kind in TransferKind
    }
    assert {where for where, did in changed.items() if did} == {
        (TABLE, RESET),
        (TABLE, INSTALL),
        (TABLE, SHARE),
        (WRITE_TABLE, RESET),
        (WRITE_TABLE, INSTALL),
        (WRITE_TABLE, SHARE),
        (POSITIONS, RESET),
        (POSITIONS, COPY),
        (STATE, COPY),
        (TAIL, COPY),
        *((role, WIPE) for role in (TABLE, WRITE_TABLE, POSITIONS, STATE, TAIL)),
        (BLOCKS, WIPE_BLOCKS),
        (BLOCKS, COPY_BLOCK),
    }


def test_a_list_is_padded_to_few_shapes():
    made = TransferList()
    assert [array.shape for array in jax.tree.leaves(made.pack())] == [(8, 5), (8,)]
    for slot in range(9):
        made.reset(slot)
    made.install(3, range(17), first=2)
    packed = made.pack()
    assert [array.shape for array in jax.tree.leaves(packed)] == [(16, 5), (32,)]
    assert packed.operations.dtype == packed.blocks.dtype == np.int32
    assert packed.operations[9].tolist() == [INSTALL, 3, 2, 0, 17]
    assert (packed.operations[10:] == 0).all()
    assert len(made) == 10


@pytest.mark.parametrize(
    ("operation", "error", "message"),
    [
        (lambda made: made.reset(-1), ValueError, "slot must be from 0"),
        (lambda made: made.reset(1.0), TypeError, "slot must be an integer, got 1.0"),
        (lambda made: made.reset(True), TypeError, "slot must be an integer"),
        (lambda made: made.copy_block(0, -1), ValueError, "target must be from 0"),
        (lambda made: made.copy(2**31, 0), ValueError, "source must be from 0"),
        (lambda made: made.copy(0, None), TypeError, "target must be an integer"),
        (lambda made: made.wipe(-1), ValueError, "slot must be from 0"),
        (lambda made: made.wipe_blocks([0, -1]), ValueError, "block ids are from 0"),
        (lambda made: made.wipe_blocks(3), TypeError, "blocks must be integers"),
        (lambda made: made.install(0, [1.5]), TypeError, "blocks must be integers"),
        (lambda made: made.install(0, 3), TypeError, "blocks must be integers"),
        (lambda made: made.install(0, [-1]), ValueError, "block ids are from 0"),
        (lambda made: made.install(0, [2**31]), ValueError, "block ids are from 0"),
        (lambda made: made.install(0, [1], first=-1), ValueError, "first must be from 0"),
    ],
)
def test_a_list_refuses_what_cannot_be(operation, error, message):
    made = TransferList()
    with pytest.raises(error, match=message):
        operation(made)
    assert len(made) == 0


@pytest.mark.parametrize(
    ("array", "transfers", "role"),
    [
        (np.zeros((5, 9), np.float32), TransferList().pack(), TABLE),
        (np.zeros((2, 5, 9), np.int32), TransferList().pack(), TABLE),
        (np.zeros((2, 5), np.int32), TransferList().pack(), POSITIONS),
        (np.zeros(5, np.int32), TransferList().pack(), STATE),
        (np.zeros((2, 5, 3), np.float32), TransferList().pack(), TAIL),
        (np.zeros((2, 5, 3, 8), np.int32), TransferList().pack(), TAIL),
        (np.zeros((5, 9), np.int32), Transfers(np.zeros((8, 4), np.int32), np.zeros(8, np.int32)), TABLE),
        (np.zeros((5, 9), np.int32), Transfers(np.zeros((8, 5), np.int32), np.zeros((8, 1), np.int32)), TABLE),
    ],
)
def test_operands_are_checked_while_tracing(array, transfers, role):
    with pytest.raises(OperandError, match="transfer: "):
        jax.eval_shape(lambda: ops.transfer(array, transfers, role=role))


def slot_state(cache: Cache, slot: int) -> dict[str, np.ndarray]:
    """Everything a slot holds of its own, its table row aside."""
    names = ("window", "window_positions", *(name for name in cache.schema.arrays if "tail" in name))
    return {name: np.asarray(cache.arrays[name])[:, slot] for name in names}


@IMPLEMENTATION
@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_a_copied_slot_goes_on_as_the_original(device, rng, implementation, hca_tail):
    """A request is moved to another slot that held another one, by reset, install and copy in one call."""
    apply = jax.jit(lambda cache, t: apply_transfers(cache, t, implementation=implementation), donate_argnums=0)
    driver = Driver(random_weights(rng), CacheFormats(hca_tail=hca_tail), slots=4, blocks=20)
    sequence = random_tokens(rng, 600)
    one, twin, former = driver.admit(sequence), driver.admit(sequence), driver.admit(random_tokens(rng, 600))
    length = int(rng.integers(100, 300))
    print("length:", length)
    driver.feed({one: length, former: 200})
    driver.feed({twin: length})
    manager = driver.manager
    # The twin's rows are spoiled by a copy of another's, then its slot is made again from the first one's.
    source, target = manager.slot(one), manager.slot(twin)
    blocks = manager.blocks(twin)
    made = TransferList()
    made.copy(manager.slot(former), target)
    made.install(target, manager.blocks(former))
    made.reset(target)
    made.install(target, blocks[:1])
    made.install(target, blocks[1:], first=1)
    made.copy(source, target)
    before = driver.cache
    kept = {name: np.asarray(array) for name, array in slot_state(before, source).items()}
    driver.cache = apply(driver.cache, made.pack())
    assert_same_bytes(slot_state(driver.cache, source), kept, "the source")
    assert_same_bytes(slot_state(driver.cache, target), kept, "the target")
    row = np.asarray(driver.cache.block_table)[target]
    assert row[: blocks.size].tolist() == blocks.tolist()
    assert (row[blocks.size :] == -1).all()
    driver.feed({one: 250, twin: 250})
    assert_same_bytes(driver.stored(one), driver.stored(twin), "gone on")


@IMPLEMENTATION
@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_what_is_wiped_is_as_it_was_made(device, rng, implementation, hca_tail):
    """Slots, snapshots and blocks of a cache of any bytes; what is not named keeps its own."""
    apply = jax.jit(lambda cache, t: apply_transfers(cache, t, implementation=implementation), donate_argnums=0)
    formats = CacheFormats(hca_tail=hca_tail)
    schema = CacheSchema(SPEC, formats, slots=4, blocks=9, max_context=512, lookahead=3, snapshots=2)
    new = {name: np.asarray(array) for name, array in init_cache(schema).arrays.items()}
    full = {name: random_array(rng, array.shape, array.dtype) for name, array in new.items()}
    slots, blocks = rng.choice(6, 3, replace=False), rng.choice(9, 4, replace=False)
    made = TransferList()
    for slot in slots.tolist():
        made.wipe(slot)
    made.wipe_blocks(blocks)
    cache = apply(init_cache(schema).with_arrays({name: jnp.array(a) for name, a in full.items()}), made.pack())
    for name, array in cache.arrays.items():
        axis = 0 if name in TABLES else 1
        size = array.shape[axis]
        wiped = np.isin(np.arange(size), blocks if name in schema.block_pools else slots)
        for where, expected in ((wiped, new), (~wiped, full)):
            kept = [np.compress(where, values, axis).tobytes() for values in (np.asarray(array), expected[name])]
            assert kept[0] == kept[1], name


def test_a_row_of_8192_blocks_into_a_slot_released_in_the_step_before(device, rng):
    """A prefix of a million tokens: more table changes than any plan holds."""
    places, context = 8192, 8192 * 128
    driver = Driver(random_weights(rng), CacheFormats(), slots=2, blocks=2 * places, max_context=context)
    former, other = driver.admit(random_tokens(rng, 300)), driver.admit(random_tokens(rng, 300))
    driver.feed({former: 260, other: 140})
    slot, others = driver.manager.slot(former), np.asarray(driver.cache.block_table)[driver.manager.slot(other)]
    driver.manager.release(former)
    free = rng.permutation(np.setdiff1d(np.arange(2 * places), others))[:places]
    made = TransferList()
    made.reset(slot)
    made.install(slot, free)
    driver.cache = jax.jit(apply_transfers, donate_argnums=0)(driver.cache, made.pack())
    table = np.asarray(driver.cache.block_table)
    np.testing.assert_array_equal(table[slot], free)
    np.testing.assert_array_equal(table[driver.manager.slot(other)], others)
    assert (np.asarray(driver.cache.window_positions)[:, slot] == -1).all()
    driver.feed({other: 150})
    np.testing.assert_array_equal(np.asarray(driver.cache.block_table)[slot], free)


FORMATS = pytest.mark.parametrize(
    "formats",
    [PROFILES["exact"], PROFILES["default"], CacheFormats(hca_tail="running")],
    ids=["exact", "default", "running"],
)


def shapes(formats: CacheFormats) -> tuple[Cache, Transfers]:
    """A large cache and a list of operations, shapes only."""
    schema = CacheSchema(SPEC, formats, slots=512, blocks=1 << 16, max_context=4096, snapshots=64)
    lists = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), TransferList().pack())
    return jax.eval_shape(lambda: init_cache(schema)), lists


@FORMATS
def test_in_place_on_the_cpu(formats):
    cache, transfers = shapes(formats)
    compiled = jax.jit(apply_transfers, donate_argnums=0).lower(cache, transfers).compile()
    assert_in_place(compiled, cache, temporary_bytes=1 << 16)


@FORMATS
def test_in_place_on_an_h200(formats, tmp_path):
    cache, transfers = shapes(formats)
    gpu = compile_for_h200(apply_transfers, cache, transfers, dump=tmp_path, donate_argnums=0)
    assert_in_place(gpu.compiled, cache, temporary_bytes=1 << 16)
    assert (gpu.graphs, gpu.custom_calls(captured=False)) == (1, 0)


def test_a_reset_by_transfer_is_the_reset_of_a_plan(rng):
    """The next request of a slot reads the same, whoever cleared it."""
    weights, sequence = random_weights(rng), random_tokens(rng, 200)
    drivers, former = [Driver(weights, CacheFormats(), slots=1) for _ in range(2)], random_tokens(rng, 200)
    for number, driver in enumerate(drivers):
        driver.feed({driver.admit(former): 180})
        driver.release(next(iter(driver.sequences)))
        made = TransferList()
        if number:
            made.reset(0)
        driver.cache = apply_transfers(driver.cache, made.pack())
        if number:
            assert (np.asarray(driver.cache.block_table) == -1).all()
        plan, brought = driver.prepare({driver.admit(sequence): 150})
        if number:
            packed = plan.packed.copy()
            packed[plan.layout.fields["request_reset"]] = 0
            plan = dataclasses.replace(plan, packed=packed)
        driver.cache = driver._step(driver.cache, plan, driver.weights, brought)
    request = [next(iter(driver.sequences)) for driver in drivers]
    assert_same_bytes(drivers[0].stored(request[0]), drivers[1].stored(request[1]), "after either reset")
