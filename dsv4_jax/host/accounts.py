"""What the pools of a cache are used for: the values that ``CacheManager.usage`` gives."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PoolUsage:
    """How many units of a pool are in which use. ``used + cached + free == total``.

    Attributes:
      total: slots or blocks that there are.
      used: those that requests hold.
      shared: of these, those that several requests hold.
      cached: those that no request holds, kept for what they contain until they are needed.
      free: those that hold nothing.
      reserved: how many of the cached and the free ones are promised to requests that do not need them yet.
      unit_bytes: of one slot or block, all arrays together.
    """

    total: int
    used: int
    shared: int
    cached: int
    free: int
    reserved: int
    unit_bytes: int

    @property
    def bytes(self) -> dict[str, int]:
        """The same numbers in bytes, by name."""
        names = ("total", "used", "shared", "cached", "free", "reserved")
        return {name: getattr(self, name) * self.unit_bytes for name in names}
