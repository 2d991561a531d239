"""Receipts: by what a manager knows the plans it made, also after it, or they, were copied or saved and loaded."""

from __future__ import annotations

import uuid
from typing import Literal

from dsv4_jax.host.drafts import Drafted
from dsv4_jax.host.errors import StalePlan
from dsv4_jax.host.journal import Write
from dsv4_jax.layout.plan import Receipt, StepPlan

_REMEMBERED = 1024

_Outcome = Literal["cancelled", "committed"]


class Receipts:
    """Issues receipts and remembers which plans were cancelled or committed.

    A copy of a manager knows the plans made before it was copied. From there on the two go separate ways, so the copy
    issues receipts under a new name.
    """

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex
        self._former_names: dict[str, int] = {}  # name -> when the last plan was made under it
        self._settled: dict[int, _Outcome] = {}  # by when the plan was made
        self._purge_at = _REMEMBERED

    def issue(self, now: int, drafts: Drafted | None, serial: int | None = None) -> Receipt:
        """The receipt of a plan made now, later than those before; ``serial`` if it runs in an earlier one's place."""
        return Receipt(self._name, now if serial is None else serial, now, drafts)

    def check(self, plan: StepPlan) -> Receipt:
        """The receipt of a plan that can be taken back as far as that tells; raises StalePlan or TypeError."""
        if not isinstance(plan, StepPlan):
            raise TypeError(f"a StepPlan as prepare_forward returned it is needed, got {type(plan).__name__}")
        receipt = plan.receipt
        known = isinstance(receipt, Receipt) and (
            receipt.manager == self._name or receipt.issued <= self._former_names.get(receipt.manager, -1)
        )
        if receipt is None or not known:
            raise StalePlan(
                "not a plan of this manager; pass what its prepare_forward returned, or a pickled copy of that"
            )
        if receipt.issued in self._settled:
            raise StalePlan(f"this plan was {self._settled[receipt.issued]} before")
        return receipt

    def settle(self, receipt: Receipt, how: _Outcome, oldest: int) -> Write:
        """The write that remembers how a plan was settled; plans before ``oldest`` are stale by themselves."""
        if len(self._settled) >= self._purge_at:
            self._settled = {old: was for old, was in self._settled.items() if was == "cancelled" and old >= oldest}
            self._purge_at = max(_REMEMBERED, 2 * len(self._settled))
        return self._settled, receipt.issued, how

    def rename(self, last: int, oldest: int) -> None:
        """For a copy: go on under a new name. ``last`` is the time of the last plan, ``oldest`` as in ``settle``."""
        self._former_names[self._name] = last
        self._former_names = {name: serial for name, serial in self._former_names.items() if serial >= oldest}
        self._name = uuid.uuid4().hex
