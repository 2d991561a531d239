"""What ``CacheManager`` is told, checked: single integers, token buckets, and many requests at once as arrays."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.errors import InvalidStep


def integer(name: str, value: Any) -> int:
    """``value`` as an int; raises TypeError for anything that is not an integer, a bool among them."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None


def count(name: str, value: Any) -> int:
    """``value`` as an int of at least 0; raises TypeError and ValueError."""
    number = integer(name, value)
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {number}")
    return number


def bucket_list(token_buckets: Sequence[int]) -> list[int]:
    """``token_buckets`` sorted and without repetition; raises TypeError and ValueError."""
    if not isinstance(token_buckets, (Sequence, np.ndarray)) or isinstance(token_buckets, str):
        raise TypeError(f"token_buckets must be a sequence of token counts, such as (64, 2048), got {token_buckets!r}")
    buckets = sorted({integer("each of token_buckets", bucket) for bucket in token_buckets})
    if not buckets or buckets[0] < 1:
        raise ValueError(f"token_buckets must be one or more token counts of at least 1, got {list(token_buckets)}")
    return buckets


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
    if handles.dtype == np.int64 == counts.dtype:
        return handles, counts
    for name, values in (("requests", handles), ("token counts", counts)):
        if values.size and values.dtype.kind not in "iu":
            raise InvalidStep(f"{name} must be 64-bit integers, got {values.dtype}")
    return handles.astype(np.int64), counts.astype(np.int64)


def drafts_in_order(drafts: Mapping[int, int] | ArrayLike, handles: NDArray[np.int64]) -> NDArray[Any]:
    """``prepare_forward``'s drafts as an array; of a mapping, those of ``handles`` in order. Raises InvalidStep."""
    if isinstance(drafts, Mapping):
        unknown = drafts.keys() - set(handles.tolist())
        if unknown:
            raise InvalidStep(f"request {min(unknown, key=str)} has drafts and no tokens; drafts are among its tokens")
        drafts = [drafts.get(handle, 0) for handle in handles.tolist()]
    try:
        return np.asarray(drafts)
    except ValueError as error:
        raise InvalidStep(f"drafts must be integers: {error}") from error


def draft_array(
    drafts: Mapping[int, int] | ArrayLike, handles: NDArray[np.int64], counts: NDArray[np.int64], lookahead: int
) -> NDArray[np.int64]:
    """``prepare_forward``'s drafts as int64 [n], those of ``handles``, which bring ``counts``; raises InvalidStep."""
    given = drafts_in_order(drafts, handles)
    if (given.size and given.dtype.kind not in "iu") or given.shape not in ((), handles.shape):
        raise InvalidStep(
            f"drafts must be a mapping, one integer, or one for each of {handles.size} requests; "
            f"got {given.dtype} {list(given.shape)}"
        )
    of_step = np.broadcast_to(given, handles.shape).astype(np.int64)
    wrong = (of_step < 0) | (of_step > np.minimum(lookahead, counts - 1))
    if wrong.any():
        first = int(wrong.argmax())
        raise InvalidStep(
            f"request {handles[first]} cannot have {of_step[first]} drafts among its {counts[first]} tokens: one token "
            f"at least is none, and the schema's lookahead, the most that can be taken back, is {lookahead}"
        )
    return of_step


def step_count(steps: int | None) -> int:
    """``prepare_forward``'s number of steps, 1 for None; raises InvalidStep."""
    if steps is None:
        return 1
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise InvalidStep(f"steps must be an integer of at least 1, or None for a single step; got {steps!r}")
    return int(steps)


def length_array(lengths: ArrayLike, requests: int, padded: int) -> NDArray[np.int64]:
    """``commit``'s lengths as int64 [requests]; ``padded`` is R. Raises InvalidStep."""
    try:
        given = np.asarray(lengths)
    except ValueError as error:
        raise InvalidStep(f"lengths must be integers: {error}") from error
    if (given.size and given.dtype.kind not in "iu") or given.shape not in ((requests,), (padded,)):
        raise InvalidStep(
            f"lengths must be an integer for each of the plan's {requests} requests; got {given.dtype} "
            f"{list(given.shape)}"
        )
    return given[:requests].astype(np.int64)


def run_array(steps_run: ArrayLike, handles: NDArray[np.int64], padded: int, steps: int) -> NDArray[np.int64]:
    """``commit``'s argument as int64 [requests], those of ``handles``; ``padded`` is R. Raises InvalidStep."""
    requests = handles.size
    try:
        run = np.asarray(steps_run)
    except ValueError as error:
        raise InvalidStep(f"steps_run must be integers: {error}") from error
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
