"""The ops of one implementation, under their own names, for tests that run once for each."""

import functools
from collections.abc import Callable
from typing import Any

from dsv4_jax import ops

IMPLEMENTATIONS = ("reference", "native")


class Ops:
    """``Ops("native").flush`` is ``ops.flush(..., implementation="native")``."""

    def __init__(self, implementation: str):
        self.implementation = implementation

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = functools.partial(getattr(ops, name), implementation=self.implementation)
        setattr(self, name, operation)  # the same object for the same word, by which what is compiled of it is found
        return operation


@functools.cache
def ops_of(implementation: str) -> Ops:
    """The same object for the same word."""
    return Ops(implementation)
