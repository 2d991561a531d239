"""What a fork wants done: the twin's slot made like the other one's, on the host and, by transfers, on the device.

At length n a request holds n // 128 blocks, or more if it found more, that nothing writes any more; these the twin
shares. One more may be open: that the twin gets a copy of at once, so that a shared block is never one that somebody
still writes.
"""

from __future__ import annotations

from dsv4_jax.host.blocks import BlockLedger
from dsv4_jax.host.journal import Write
from dsv4_jax.host.pending import Pending
from dsv4_jax.host.requests import RequestTable
from dsv4_jax.host.transfers import Wish
from dsv4_jax.spec.kinds import BLOCK_TOKENS


def fork(
    table: RequestTable,
    ledger: BlockLedger,
    queue: Pending[Wish],
    source: int,
    target: int,
    floor: int,
    held: int,
    promised: int,
) -> tuple[Write, ...]:
    """The writes that make the request in slot ``target``, just admitted, a twin of the one in ``source``.

    Args:
      table: of the requests.
      ledger: of the blocks.
      queue: of the transfers.
      source: slot of a request.
      target: slot without blocks.
      floor: tokens of which the source found the blocks when it was admitted.
      held: blocks that the source holds.
      promised: blocks that the target can have, 0 for no promise.

    Raises:
      CacheFull: there is no block for a copy of the open one, or too few for the promise.
    """
    length = int(table.lengths[source])
    found, full = floor // BLOCK_TOKENS, min(max(length, floor) // BLOCK_TOKENS, held)
    blocks, writes = ledger.attach(target, ledger.table[source, :full].copy(), held, promised)
    if not length and not found:  # as any other new request
        return writes
    wishes: list[Wish] = [
        ("reset", (target,)),
        ("copy", (source, target)),
        ("install", (target, blocks[found:], found)),
    ]
    wishes += [("share", (target, blocks[:found]))] * bool(found)
    wishes += [("copy_block", (int(ledger.table[source, place]), int(blocks[place]))) for place in range(full, held)]
    return (
        *writes,
        (table.lengths, target, length),
        (table.peaks, target, max(int(table.peaks[source]), length)),
        (table.reset_due, target, False),
        *table.make_stale(source),
        *queue.add(*wishes),
    )
