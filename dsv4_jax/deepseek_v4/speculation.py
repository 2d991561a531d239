"""Speculation: the drafts that a server's requests bring, and how many of them were right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsv4_jax.deepseek_v4.drafters import Drafter

NO_DRAFTS = np.zeros(0, np.int32)


class Speculation:
    """Asks a drafter about each request's text.

    Args:
      drafter: who guesses.
      most: drafts of a request in a step, 0 for none.

    Attributes:
      most: likewise.
      drafted: how many drafts there were.
      accepted: how many of them were what came.
    """

    def __init__(self, drafter: Drafter, most: int) -> None:
        if most < 0:
            raise ValueError(f"speculate must be the drafts of a request in a step, 0 for none; got {most}.")
        self.most, self.drafted, self.accepted = most, 0, 0
        self._drafter = drafter
        # A list of tokens takes long to become an array, so each request's array grows as its list does.
        self._texts: dict[int, NDArray[np.int32]] = {}
        self._known: dict[int, int] = {}

    def drafts(self, request: int, tokens: Sequence[int], total: int) -> NDArray[np.int32]:
        """Guesses of what follows, int32 [n]: at most ``most``, and no further than a text of ``total`` tokens goes.

        Raises:
          ValueError: the drafter gives more than it was asked for, or no list of tokens.
        """
        most = min(self.most, total - len(tokens))
        if most < 1:
            return NO_DRAFTS
        text, known = self._texts.setdefault(request, np.empty(total, np.int32)), self._known.get(request, 0)
        text[known : len(tokens)] = tokens[known:]
        self._known[request] = len(tokens)
        guesses = np.asarray(self._drafter.draft(text[: len(tokens)], most), np.int32)
        if guesses.ndim != 1 or guesses.size > most:
            raise ValueError(f"a drafter gives int32 [0 .. {most}], got {list(guesses.shape)} of {self._drafter}")
        return guesses

    def count(self, drafted: int, accepted: int) -> None:
        """So many drafts came to be verified, and so many were right."""
        self.drafted += drafted
        self.accepted += accepted

    def forget(self, request: int) -> None:
        """The request is over."""
        self._texts.pop(request, None)
        self._known.pop(request, None)
