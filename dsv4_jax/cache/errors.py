"""The errors of the device half: misuse of a step, seen while JAX traces (or, if debugged, when it runs); damage."""

import dataclasses
from collections.abc import Sequence

from dsv4_jax.errors import Picklable

_SHOWN = 8


class StepError(Picklable, ValueError):
    """A step used in a way in which rows would be lost or land in the wrong place."""


class WrongLayerKind(Picklable, TypeError):
    """An operation that the layer's kind does not have, such as keys of an HCA layer, or inputs of another kind."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something in a cache that should not be so.

    Attributes:
      array: its name in ``Cache.arrays``.
      layer: index of the layer in the model; None for the tables, which all share.
      requests: the handles of those whose it is; several if they share a block, none if it is kept for prompts to come.
      place: where in the array.
      what: what is wrong there.
    """

    array: str
    layer: int | None
    requests: tuple[int, ...]
    place: str
    what: str

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        whose = "no request" if not self.requests else f"request {', '.join(map(str, self.requests))}"
        return f"{self.array}{layer}, {self.place} ({whose}): {self.what}"


class CacheDamaged(Picklable):
    """A cache that does not hold what its manager says.

    Attributes:
      faults: all that was found, the first of each page and layer.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        more = f"\nand {len(self.faults) - _SHOWN} more" * (len(self.faults) > _SHOWN)
        super().__init__(
            "the cache does not hold what its manager says; if all plans and transfers have run and were committed, "
            "something wrote where it must not, or a NaN was stored:\n"
            + "\n".join(map(str, self.faults[:_SHOWN]))
            + more
        )
