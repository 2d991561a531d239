"""BlockLedger against a dictionary of who has what; and that its two sides, blocks and places, always agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.host.blocks import BlockLedger
from dsv4_jax.host.errors import CacheFull
from dsv4_jax.host.journal import Journal


def assert_balanced(ledger: BlockLedger) -> None:
    """Every block is either free or at exactly one place of so many slots, and all records of it say the same."""
    slots, places = (ledger.table >= 0).nonzero()
    ids = ledger.table[slots, places]
    np.testing.assert_array_equal(ledger.references, np.bincount(ids, minlength=ledger.total))
    np.testing.assert_array_equal(ledger.place[ids], places)
    free = ledger._stack[: ledger.free - ledger.idle]
    idle, total = ledger._idle.blocks, ledger.total
    assert sorted([*set(ids.tolist()), *free.tolist(), *idle.tolist()]) == list(range(total))
    assert ledger.free == free.size + idle.size
    assert ledger.idle == idle.size
    assert ledger.kept[idle].all()
    assert not ledger.kept[free].any()
    assert (ledger.place[idle] >= 0).all()
    assert ledger.shared == np.count_nonzero(ledger.references > 1)
    held = (ledger.table >= 0).sum(axis=1)
    assert ledger.reserved == (ledger.promised - held).clip(0).sum()
    assert ledger.reserved <= ledger.free
    assert (ledger.place[free] == -1).all()


class Held:
    """A ledger, and what it should hold: (slot, place) -> block."""

    def __init__(self, slots, places, blocks):
        self.ledger, self.journal, self.blocks = BlockLedger(slots, places, blocks), Journal(), {}

    def take(self, slots, places):
        ids, writes = self.ledger.take(np.asarray(slots, np.int64), np.asarray(places, np.int64))
        self.journal.write(writes)
        self.blocks.update(zip(zip(slots, places, strict=True), ids.tolist(), strict=True))
        return ids.tolist()

    def share(self, source, target, full, held):
        ids, writes = self.ledger.attach(target, self.ledger.table[source, :full].copy(), held)
        self.journal.write(writes)
        for place, block in enumerate(ids.tolist()):
            assert (block == self.blocks[source, place]) == (place < full)
            self.blocks[target, place] = block

    def exchange(self, slot, place, end):
        old, new, writes = self.ledger.exchange(slot, place, end)
        self.journal.write(writes)
        assert old == self.blocks[slot, place]
        self.blocks[slot, place] = new
        for later in range(place + 1, end):
            del self.blocks[slot, later]

    def give_back(self, slots, first, end):
        self.journal.write(self.ledger.give_back(*(np.asarray(value, np.int64) for value in (slots, first, end))))
        for slot, low, high in zip(slots, first, end, strict=True):
            for place in range(low, high):
                del self.blocks[slot, place]

    def drain(self):
        """The free blocks in the order they would be handed out."""
        return self.ledger.take(np.zeros(self.ledger.free, int), np.zeros(self.ledger.free, int))[0].tolist()


def test_hands_out_every_block_once():
    held = Held(2, 5, 5)
    assert sorted(held.take([0, 0], [0, 1]) + held.take([1, 1, 1], [0, 1, 2])) == [0, 1, 2, 3, 4]
    assert (held.ledger.free, held.ledger.total) == (0, 5)


def test_full_takes_nothing_and_says_what_is_there():
    held = Held(2, 5, 5)
    held.take([0, 0], [0, 1])
    with pytest.raises(CacheFull, match="4 blocks needed, 3 of 5 free") as raised:
        held.take([1] * 4, range(4))
    error = raised.value
    assert (error.resource, error.needed, error.free, error.total) == ("blocks", 4, 3, 5)
    assert len(held.take([1] * 3, range(3))) == 3


def test_a_freed_block_is_the_next_one_handed_out():
    held = Held(2, 20, 100)
    ids = held.take([0] * 10, range(10))
    held.give_back([0], [8], [10])
    assert set(held.take([1, 1], [0, 1])) == set(ids[8:])


def test_giving_back_what_was_just_taken_restores_the_order(rng):
    untouched, held = Held(4, 9, 20), Held(4, 9, 20)
    slots, places = np.divmod(rng.permutation(16), 4)
    held.take(slots.tolist(), places.tolist())
    held.give_back([2, 0, 3, 1], [0] * 4, [4] * 4)
    assert held.drain() == untouched.drain()
    held.take([1], [3])
    held.journal.write(held.ledger.give_back_all())
    assert held.drain() == untouched.drain()


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 30),
    st.lists(
        st.tuples(
            st.sampled_from(["take", "give back", "give back", "share", "exchange"]), st.integers(0, 8), st.randoms()
        ),
        max_size=40,
    ),
)
def test_against_a_dictionary(total, operations):
    held = Held(3, 12, total)
    for what, count, random in operations:
        lengths = [sum(slot == s for slot, _ in held.blocks) for s in range(3)]
        free = total - len(set(held.blocks.values()))
        if what == "share":
            if 0 in lengths:
                source = max(range(3), key=lambda slot: lengths[slot])
                full = max(lengths[source] - random.randrange(2), 0)
                if lengths[source] - full <= free:
                    held.share(source, lengths.index(0), full, lengths[source])
        elif what == "exchange":
            slot = max(range(3), key=lambda slot: lengths[slot])
            if lengths[slot] and free:
                held.exchange(slot, random.randrange(lengths[slot]), lengths[slot])
            elif lengths[slot]:
                with pytest.raises(CacheFull):
                    held.exchange(slot, 0, lengths[slot])
        elif what == "take":
            slots = [random.randrange(3) for _ in range(count)]
            places = [lengths[slot] + slots[:i].count(slot) for i, slot in enumerate(slots)]
            if max(places, default=0) >= 12:
                continue
            if count > free:
                with pytest.raises(CacheFull):
                    held.take(slots, places)
            else:
                ids = held.take(slots, places)
                assert len(set(ids)) == count
        else:
            slots = random.sample(range(3), min(count, 3))
            held.give_back(slots, [random.randint(0, lengths[slot]) for slot in slots], [lengths[s] for s in slots])
        assert held.ledger.free == total - len(set(held.blocks.values()))
        for (slot, place), block in held.blocks.items():
            assert held.ledger.table[slot, place] == block
        assert_balanced(held.ledger)
