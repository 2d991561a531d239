"""What ``CacheManager.take_events`` gives: which blocks can be shared, in the field names of vLLM's KV events."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockStored:
    """Blocks that requests can share from now on, one behind the other.

    Attributes:
      block_hashes: of each, which covers all tokens before it as well.
      parent_block_hash: of the block before the first, None if there is none.
      token_ids: of all of them.
      block_size: tokens of a block.
      extra_keys: of each block, what but tokens went into its hash: the salt, None if it is empty.
      medium: where they are.
    """

    block_hashes: tuple[bytes, ...]
    parent_block_hash: bytes | None
    token_ids: tuple[int, ...]
    block_size: int
    extra_keys: tuple[tuple[bytes, ...] | None, ...]
    medium: str = "GPU"


@dataclasses.dataclass(frozen=True)
class BlockRemoved:
    """Blocks that can no longer be shared.

    Attributes:
      block_hashes: of each.
      medium: where they were.
    """

    block_hashes: tuple[bytes, ...]
    medium: str = "GPU"


@dataclasses.dataclass(frozen=True)
class AllBlocksCleared:
    """No block can be shared any longer."""


Event = BlockStored | BlockRemoved | AllBlocksCleared
