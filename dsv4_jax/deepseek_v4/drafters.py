"""Who guesses the tokens that come next, for a step to verify: any ``Drafter``, of which prompt look-up is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Drafter(Protocol):
    """Guesses how a text goes on. A right guess saves a step, a wrong one changes no text."""

    def draft(self, tokens: NDArray[np.int32], most: int) -> Sequence[int] | NDArray[np.int32]:
        """The tokens that may come next, in order.

        Args:
          tokens: int32 [n], n at least 1: of the prompt, and after it. Not to be kept: it is a view.
          most: how many guesses there may be, at least 1.

        Returns:
          int32 [0 .. most].
        """
        ...


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """A text goes on as it did before: what followed the latest tokens where they last were, if they ever were.

    Of the places where the last token was before, those count after which the most tokens agree, looking back, and of
    these the latest. What is looked up there repeats itself where it runs into the end of the text.

    Attributes:
      longest: how many tokens are compared at most, at least 1.
      shortest: how many must agree for anything to be guessed, from 1 to ``longest``.

    Raises:
      ValueError: a number is out of range.
    """

    longest: int = 8
    shortest: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(f"1 <= shortest <= longest must hold, got {self.shortest} and {self.longest}")

    def draft(self, tokens: NDArray[np.int32], most: int) -> NDArray[np.int32]:
        """As ``Drafter`` has it."""
        places = np.flatnonzero(tokens[:-1] == tokens[-1])  # of the last token before
        agreeing = 1
        while agreeing < self.longest and places.size:
            longer = places[places >= agreeing]
            longer = longer[tokens[longer - agreeing] == tokens[-1 - agreeing]]
            if not longer.size:
                break
            places, agreeing = longer, agreeing + 1
        if not places.size or agreeing < self.shortest:
            return tokens[:0]
        return np.resize(tokens[places[-1] + 1 :], most)
