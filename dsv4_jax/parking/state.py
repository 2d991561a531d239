"""RequestState: all that a request has in a cache, in host memory or a file, to be resumed later or elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.cache.pools import Cache
from dsv4_jax.cache.shards import change_shard, shard_of
from dsv4_jax.errors import Picklable
from dsv4_jax.host.hashing import Match
from dsv4_jax.host.manager import CacheManager
from dsv4_jax.host.parking import RequestRecord, describe_requests, differences
from dsv4_jax.host.shards import ShardedManager
from dsv4_jax.parking import arrays, files
from dsv4_jax.parking.arrays import Rows
from dsv4_jax.tensor_files import TensorFileError


class StateError(Picklable, ValueError):
    """A request's state that does not fit a cache, or a file that does not hold one, or a damaged one."""


@dataclasses.dataclass(frozen=True, eq=False)
class RequestState:
    """A request's state outside of a cache, bit for bit.

    It takes what the request takes in the cache: its slot's row of every array, whatever lies there, and its blocks. So
    rows that nobody reads any more, of the slot's earlier requests, too, are among the bytes.

    Attributes:
      record: what the manager knows of it.
      slot: [layers, ...] of each array that a slot has a row in, by name.
      blocks: chunks of 64 blocks, the last one of fewer, padded to a power of two: [layers, blocks, *page] by name.
    """

    record: RequestRecord
    slot: Rows
    blocks: tuple[Rows, ...]

    @property
    def length(self) -> int:
        """The request's tokens in the cache."""
        return self.record.length

    @property
    def tokens(self) -> NDArray[np.int32]:
        """int32 [known]: as many of its first tokens, computed or not, as the manager was told."""
        return self.record.tokens

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take."""
        return sum(array.nbytes for rows in (self.slot, *self.blocks) for array in rows.values())

    def to_bytes(self) -> bytes:
        """The same as ``save_state`` writes."""
        return b"".join(files.encode(self.record, self.slot, self.blocks))

    @staticmethod
    def from_bytes(data: bytes | bytearray | memoryview) -> RequestState:
        """The state that ``to_bytes`` gave. Nothing of the data is executed.

        Raises:
          StateError: it is something else, or damaged.
        """
        return _decode(data, Path("these bytes"))


def take_state(cache: Cache, manager: CacheManager | ShardedManager, what: int | Match) -> RequestState:
    """Copies what a request, or what is cached of a prompt, has in the cache; the request goes on.

    Args:
      cache: as all plans made so far leave it. The copies are made before whatever is done to it next, so it may be
        donated at once, and the request may be released.
      manager: of the cache.
      what: handle, or what ``match_prefix`` found.

    Raises:
      UnknownRequest, LengthUnknown, NothingCached, TransfersWait: see ``CacheManager.record``.
      ShardingError: the cache is one of several shards, and the manager is not.
    """
    if isinstance(manager, ShardedManager):
        shard, local = (manager.shard_to_record(what), what) if isinstance(what, Match) else manager.place(what)
        return take_state(shard_of(cache, manager.first + shard), manager.managers[shard], local)
    record, places = manager.record(what)
    return RequestState(record, *arrays.read(cache, places))


def preempt(cache: Cache, manager: CacheManager | ShardedManager, request: int) -> RequestState:
    """Takes a request's slot and blocks for others and keeps its state in host memory.

    ``CacheManager.preempt`` keeps only what the host knows. ``CacheManager.propose_victim`` says whom.

    Args:
      cache: see ``take_state``.
      manager: of the cache.
      request: handle, unknown from here on. An exception from outside may come when it is taken and its state not yet
        handed over.

    Raises:
      UnknownRequest, LengthUnknown, TransfersWait, ShardingError: as ``take_state``.
    """
    if isinstance(manager, ShardedManager):
        shard, local = manager.place(request)
        return preempt(shard_of(cache, manager.first + shard), manager.managers[shard], local)
    state = take_state(cache, manager, request)
    manager.preempt(request)
    return state


def resume(
    cache: Cache,
    manager: CacheManager | ShardedManager,
    state: RequestState,
    max_new_tokens: int | None = None,
    *,
    shard: int | None = None,
) -> tuple[int, Cache]:
    """Puts a state into the cache, as a new request that goes on where the other one was, bit for bit.

    Blocks of its tokens that the cache still has are shared and not written. Where the manager knows the tokens, others
    can share its blocks afterwards; if it ends between two blocks, a transfer that waits then takes a snapshot: so a
    prefix is resumed, and released, to be there for others.

    Args:
      cache: as all plans made so far leave it; donated.
      manager: of the cache.
      state: of this cache or another one, of the same model, formats and lookahead.
      max_new_tokens: as in ``CacheManager.admit``, beyond the tokens that are known, or the length.
      shard: in which of several; ``route`` chooses by default. So a request moves to another shard.

    Returns:
      The request's handle, and the cache.

    Raises:
      StateError: the state is one of another model, of other formats, or of another lookahead; says which.
      CacheFull, PromptTooLong, TransfersWait: see ``CacheManager.resume``. The cache is as it was.
    """
    if isinstance(manager, ShardedManager):
        if shard is None:
            shard = manager.route(manager.rooms(state.record, max_new_tokens))
        of_shard, handles = manager.managers[shard], []

        def change(part: Cache) -> Cache:
            local, part = resume(part, of_shard, state, max_new_tokens)
            handles.append(local)
            return part

        cache = change_shard(cache, manager.first + shard, change)
        return manager.handle(shard, handles[0]), cache
    ours = describe_requests(manager.schema)
    if found := differences(ours, state.record.made_for):
        more = f", and {len(found) - 4} more" if len(found) > 4 else ""
        raise StateError(f"this state does not fit the cache: {'; '.join(found[:4])}{more}. Compute the tokens again.")
    if state.record.blocks != manager.blocks_needed(state.record.length):
        raise StateError(f"this state has {state.record.blocks} blocks for {state.record.length} tokens.")
    if problem := files.misfit(manager.schema, state.record, state.slot, state.blocks):
        raise StateError(problem)
    request, places = manager.resume(state.record, max_new_tokens)
    try:
        cache = arrays.write(cache, places, state.slot, state.blocks)
    except BaseException:
        manager.release(request)
        raise
    manager.resumed(request)
    return request, cache


def save_state(path: str | Path, state: RequestState) -> None:
    """Writes a state to one safetensors file.

    A file that is there is replaced once the new one is on the disk as a whole: whenever the process ends, there is
    the old file or the new one.

    Raises:
      OSError: it cannot be written.
    """
    files.write(Path(path), files.encode(state.record, state.slot, state.blocks))


def load_state(path: str | Path) -> RequestState:
    """The state that ``save_state`` wrote. Nothing of the file is executed; checksums are compared.

    Raises:
      StateError: the file is something else, or damaged.
      OSError: it cannot be read.
    """
    path = Path(path)
    return _decode(path.read_bytes(), path)


def _decode(data: bytes | bytearray | memoryview, path: Path) -> RequestState:
    try:
        return RequestState(*files.decode(bytes(data), path))
    except TensorFileError as error:
        raise StateError(str(error)) from error
