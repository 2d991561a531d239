"""What of a request can be taken back: the lengths whose state is still in its tails and its window's ring."""

from __future__ import annotations

from dsv4_jax.host.errors import CannotTruncate
from dsv4_jax.layout.schema import CacheSchema
from dsv4_jax.spec.kinds import LayerKind

CSA, HCA = LayerKind.CSA, LayerKind.HCA


def check_truncation(
    schema: CacheSchema, request: int, current: int, peak: int, length: int, is_open: bool, floor: int = 0
) -> None:
    """Raises CannotTruncate unless a request of ``current`` tokens can go on from ``length``; see ``truncate``.

    Args:
      schema: the cache.
      request: handle, for the error.
      current: tokens of the request, not 0.
      peak: the most it has had.
      length: the tokens to keep, neither 0 nor ``current``.
      floor: the request has no state below it, or none yet.
      is_open: whether ``current`` is only the most it can be, since it has drafts of which nothing is known.
    """
    if is_open and 0 < length < current:
        reason = "how many of its drafts were kept is not known; commit their plans first"
        raise CannotTruncate(request, current, length, current, reason)
    reach = min(current, peak - schema.lookahead)  # rows of whatever windows are open at or after this are there
    window_lowest = peak - schema.lookahead - 1 if peak > schema.ring else 1
    csa_lowest = max(reach, 0) // CSA.ratio * CSA.ratio if schema.spec.count(CSA) else 1
    running = schema.formats.hca_tail == "running"
    hca_lowest = 1
    if schema.spec.count(HCA):
        opened_a_window = running and (reach - 1) % HCA.ratio == 0  # without that token nothing is open
        hca_lowest = max(reach, 0) - opened_a_window if running else max(reach, 0) // HCA.ratio * HCA.ratio

    if not 0 < length < current:
        reason = "it never had that length" if length > current else "a length is at least 0"
    elif current < floor:
        reason = f"it is being rebuilt, from the blocks of its first {floor} tokens"
    elif length < floor:
        reason = f"it began at {floor}, with what was in the cache of its prompt"
    elif length < window_lowest:
        reason = f"the sliding window there was overwritten when the request grew to {peak}"
    elif length < csa_lowest:
        reason = f"the window of {CSA.ratio} tokens that was open there is closed and its rows are gone"
    elif length >= hca_lowest or length % HCA.ratio == 0:  # between two HCA windows nothing is open
        return
    elif running:
        reason = f"a running tail no longer has the state of the window of {HCA.ratio} tokens that was open there"
    else:
        reason = f"the window of {HCA.ratio} tokens that was open there is closed and its rows are gone"
    lowest = max(window_lowest, csa_lowest, hca_lowest, min(floor, current), 1)
    raise CannotTruncate(request, current, length, lowest, reason)
