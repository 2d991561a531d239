"""BlockAllocator against a set of free blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.host.blocks import BlockAllocator
from dsv4_jax.host.errors import AllocatorError, CacheFull


def drain(allocator: BlockAllocator) -> list[int]:
    """The free blocks in the order they would be handed out."""
    return allocator.allocate(allocator.free_blocks).tolist()


def test_hands_out_every_block_once():
    allocator = BlockAllocator(5)
    first, second = allocator.allocate(2), allocator.allocate(3)
    assert first.dtype == np.int32
    assert sorted([*first, *second]) == [0, 1, 2, 3, 4]
    assert (allocator.free_blocks, allocator.total) == (0, 5)


def test_full_takes_nothing_and_says_what_is_there():
    allocator = BlockAllocator(5)
    allocator.allocate(2)
    with pytest.raises(CacheFull, match="4 blocks needed, 3 of 5 free") as raised:
        allocator.allocate(4)
    error = raised.value
    assert (error.resource, error.needed, error.free, error.total) == ("blocks", 4, 3, 5)
    assert allocator.free_blocks == 3
    assert allocator.allocate(3).size == 3


def test_a_freed_block_is_the_next_one_handed_out():
    allocator = BlockAllocator(100)
    ids = allocator.allocate(10)
    allocator.free(ids[3:5])
    assert set(allocator.allocate(2)) == set(ids[3:5])


def test_freeing_what_was_just_allocated_restores_the_order():
    untouched, allocator = BlockAllocator(9), BlockAllocator(9)
    allocator.free(allocator.allocate(4))
    assert drain(allocator) == drain(untouched)


@pytest.mark.parametrize(
    ("ids", "message", "offending"),
    [
        ([0, 7], "not allocated: 7", (7,)),
        ([0, 1, 0], "freed twice in one call: 0", (0,)),
        ([0, 10], "which has 10: 10", (10,)),
        ([-1, 0], "which has 10: -1", (-1,)),
    ],
    ids=["free", "repeated", "foreign", "negative"],
)
def test_a_bad_free_changes_nothing(ids, message, offending):
    allocator, same = BlockAllocator(10), BlockAllocator(10)
    assert set(allocator.allocate(3).tolist()) == {0, 1, 2}
    same.allocate(3)
    with pytest.raises(AllocatorError, match=message) as raised:
        allocator.free(ids)
    assert raised.value.ids == offending
    assert allocator.free_blocks == 7
    allocator.free([0])
    same.free([0])
    assert drain(allocator) == drain(same)


def test_a_second_free_raises():
    allocator = BlockAllocator(4)
    ids = allocator.allocate(2)
    allocator.free(ids)
    with pytest.raises(AllocatorError, match="not allocated"):
        allocator.free(ids)
    assert allocator.free_blocks == 4


@pytest.mark.parametrize("ids", [[0.0], [[0]], [True]], ids=["float", "matrix", "bool"])
def test_ids_are_a_vector_of_integers(ids):
    allocator = BlockAllocator(2)
    allocator.allocate(2)
    with pytest.raises(ValueError, match="must be integers"):
        allocator.free(ids)
    assert allocator.free_blocks == 0


def test_negative_counts():
    with pytest.raises(ValueError, match="at least 0"):
        BlockAllocator(-1)
    with pytest.raises(ValueError, match="at least 0"):
        BlockAllocator(3).allocate(-1)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.randoms()), max_size=40))
def test_against_a_set(total, operations):
    allocator, free, used = BlockAllocator(total), set(range(total)), set()
    for allocating, count, random in operations:
        if allocating:
            if count > len(free):
                with pytest.raises(CacheFull):
                    allocator.allocate(count)
            else:
                ids = allocator.allocate(count).tolist()
                assert len(set(ids)) == count
                assert set(ids) <= free
                free -= set(ids)
                used |= set(ids)
        else:
            ids = [random.randrange(-1, total + 1) for _ in range(count)]
            if random.random() < 0.7:
                ids = random.sample(sorted(used), min(count, len(used)))
            if len(set(ids)) == len(ids) and set(ids) <= used:
                allocator.free(ids)
                used -= set(ids)
                free |= set(ids)
            else:
                with pytest.raises(AllocatorError):
                    allocator.free(ids)
        assert allocator.free_blocks == len(free)
    assert set(drain(allocator)) == free
