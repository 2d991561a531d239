"""Phases of serving, and the wall time that steps of each took."""

from __future__ import annotations

import dataclasses
import time
from typing import Literal

import jax

Phase = Literal["prefill", "decode"]


@dataclasses.dataclass
class PhaseStatistics:
    """Steps, tokens and wall time of one phase, compile time apart."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """0 before anything ran."""
        return self.tokens / self.seconds if self.seconds else 0.0


class PhaseClock:
    """Adds wall time to the phase it was spent in; waits for the device only where the phase changes."""

    def __init__(self, statistics: dict[Phase, PhaseStatistics]) -> None:
        self._statistics = statistics
        self._phase: Phase | None = None
        self._since = 0.0

    def enter(self, phase: Phase, cache: object) -> None:
        """The next step is of this phase; the cache is what the last one left."""
        if phase != self._phase:
            self.leave(cache)
            self._phase, self._since = phase, time.perf_counter()

    def leave(self, cache: object) -> None:
        """No step follows."""
        if self._phase is not None:
            jax.block_until_ready(cache)
            self._statistics[self._phase].seconds += time.perf_counter() - self._since
            self._phase = None

    def exclude(self, seconds: float) -> None:
        """So many of the seconds since are not counted."""
        self._since += seconds

    def count(self, tokens: int) -> None:
        """A step of so many tokens is sent."""
        if self._phase is not None:
            self._statistics[self._phase].steps += 1
            self._statistics[self._phase].tokens += tokens
