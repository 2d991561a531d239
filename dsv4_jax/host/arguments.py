"""What ``CacheManager`` is told about many requests at once, as checked arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.errors import InvalidStep


def step_arrays(
    tokens: Mapping[int, int] | tuple[ArrayLike, ArrayLike],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``prepare_forward``'s argument as two int64 arrays [n]; raises InvalidStep."""
    if isinstance(tokens, Mapping):
        tokens = list(tokens.keys()), list(tokens.values())
    if not isinstance(tokens, tuple) or len(tokens) != 2:
        raise InvalidStep(f"tokens must be a mapping or a tuple (handles, counts), got {type(tokens).__name__}")
    try:
        handles, counts = np.asarray(tokens[0]), np.asarray(tokens[1])
    except ValueError as error:
        raise InvalidStep(f"requests and token counts must be integers: {error}") from error
    if handles.shape != counts.shape or handles.ndim != 1:
        raise InvalidStep(f"one token count per request is needed, got shapes {handles.shape} and {counts.shape}")
    for name, values in (("requests", handles), ("token counts", counts)):
        if values.size and values.dtype.kind not in "iu":
            raise InvalidStep(f"{name} must be 64-bit integers, got {values.dtype}")
    return handles.astype(np.int64, copy=False), counts.astype(np.int64, copy=False)


def run_array(steps_run: ArrayLike, handles: NDArray[np.int64], padded: int, steps: int) -> NDArray[np.int64]:
    """``commit``'s argument as int64 [requests], those of ``handles``; ``padded`` is R. Raises InvalidStep."""
    run, requests = np.asarray(steps_run), handles.size
    if (run.size and run.dtype.kind not in "iu") or run.shape not in ((), (requests,), (padded,)):
        raise InvalidStep(
            f"steps_run must be one integer, or one for each of the plan's {requests} requests; "
            f"got {run.dtype} {list(run.shape)}"
        )
    run = run[:requests] if run.ndim else np.full(requests, run)
    wrong = (run < 0) | (run > steps)
    if wrong.any():
        first = int(wrong.argmax())
        raise InvalidStep(f"request {handles[first]} cannot have run {run[first]} steps of a plan of {steps}")
    return run.astype(np.int64)
