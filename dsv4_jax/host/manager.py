"""CacheManager: which request has which slot, which blocks and how many tokens, between steps and on the host.

The device never sees a request handle, the host never sees a cache: all that crosses is the ``StepPlan`` of each step.
What the manager knows of the cache is what the plans it made will have done once they have run, in the order made.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsv4_jax.host.arguments import bucket_list, count, step_arrays, step_count
from dsv4_jax.host.batch import Batch, Standing
from dsv4_jax.host.errors import InvalidStep, StepTooLarge
from dsv4_jax.host.journal import Write
from dsv4_jax.host.settling import Outstanding, plan_of
from dsv4_jax.host.telling import Telling, Tokens, told_tokens
from dsv4_jax.host.truncation import Truncation
from dsv4_jax.layout.plan import PlanLayout, StepPlan
from dsv4_jax.layout.schema import CacheSchema


class CacheManager(Truncation):
    """Admits requests, reserves their blocks step by step, and takes both back; forks them, lets them share prefixes.

    Every operation is all or nothing: one that raises has changed nothing. One that an exception from outside
    interrupts, such as KeyboardInterrupt, has happened as a whole or not at all. Not thread-safe.

    It pickles and deep-copies with all it knows, which is worth nothing without the cache that it describes. The copy
    knows the plans made before; of later ones each of the two knows its own only.

    A request's *length* is the number of its tokens in the cache once every plan made so far has run, so plans must run
    in the order they were made, each once, on one cache; one that will not run must be cancelled, one that ran in part
    (see ``StepPlan.stop``) committed. ``release`` and ``truncate`` may come while plans are still running: the donated
    cache queues later plans behind them, so a freed block or slot is reused at once.

    Args:
      schema: the cache the plans are for.
      token_buckets: the token counts T that steps are padded to; the largest is the most tokens of a step. A step is
        compiled once for each of ``layouts`` in use: a bucket has one for steps in which no request brings more than
        ``lookahead + 1`` tokens, as in decoding, and one for all others.
      snapshot_every: a snapshot is worth its place after every so many blocks of 128 tokens, too. Without, only where
        prompts end and part: after a prompt's last block that leaves a token to compute, and where one that is admitted
        stops being like those before it.
      rebuild: whether a prompt may share blocks without a snapshot at their end, where that leaves fewer tokens to
        compute or no snapshot is there. The state there is computed again, from the last 128 tokens for each layer of
        the model, or all if there are fewer: at the first of them a layer's window is empty, and lacks nothing 128
        tokens later, each layer after the one before. What they would store in the shared blocks is not stored. The
        state is that of other steps than those which made the blocks: equal bit for bit only as far as the model's
        vectors do not depend on how tokens are cut into steps, which matrix products' do.
      events: whether ``take_events`` tells of them.
      wipe: whether all that is nobody's any more is wiped, by transfers: see ``release``. Those of ``release``,
        ``truncate``, ``commit`` and others then wait, to run after all plans made so far.

    Raises:
      TypeError, ValueError: a number is no integer, or too small.
    """

    def __init__(
        self,
        schema: CacheSchema,
        *,
        token_buckets: Sequence[int],
        snapshot_every: int | None = None,
        rebuild: bool = False,
        events: bool = False,
        wipe: bool = False,
    ) -> None:
        buckets = bucket_list(token_buckets)
        fingerprint = schema.fingerprint
        if snapshot_every is not None and count("snapshot_every", snapshot_every) < 1:
            raise ValueError(
                "snapshot_every must be at least 1 block; None for none, and no snapshots in the schema for none"
            )
        super().__init__(schema, every=snapshot_every, rebuild=rebuild, events=events, wipe=wipe)
        self._buckets = buckets
        self._layouts = [
            tuple(PlanLayout(bucket, min(schema.slots, bucket), fingerprint, displaces) for displaces in (False, True))
            for bucket in buckets
        ]
        self._standing: Standing | None = None  # after the latest plan

    @property
    def layouts(self) -> tuple[PlanLayout, ...]:
        """All the layouts that a plan of this manager can have, smallest token bucket first."""
        spare, fewest = self._schema.lookahead + 1, 0
        possible: list[PlanLayout] = []
        for bucket, (keeps, displaces) in zip(self._buckets, self._layouts, strict=True):
            possible += [keeps] * (fewest < self._schema.slots * spare) + [displaces] * (bucket > spare)
            fewest = bucket
        return tuple(possible)

    def prepare_forward(
        self,
        tokens: Mapping[int, int] | tuple[ArrayLike, ArrayLike],
        *,
        drafts: Mapping[int, int] | ArrayLike | None = None,
        steps: int | None = None,
        layout: PlanLayout | None = None,
    ) -> StepPlan:
        """Reserves what a step needs and plans it: all of the requests given, or none.

        Advances each request's length, takes the blocks its new entries need, picks the smallest bucket that fits.

        With ``steps``, the same for that many steps in a row, each of the same counts: to be run by one dispatch, a
        ``lax.scan`` over the plan or a ``lax.while_loop`` over ``plan.step(i)``. A block or reset appears in the step
        that first needs it. Requests may stop on the way (``StepPlan.stop``); then ``commit`` says how far each came.

        With ``drafts``, the last tokens of a request are guesses, which the step itself verifies. How many are kept is
        known on the device, and ``commit`` tells the manager, whenever it is known there. Until then ``length`` is the
        most that the request can be, the blocks for that are reserved, and whatever is planned for it, later steps of
        the same plan included, must be brought to the real length on the device, by ``StepPlan.rebase``.

        Args:
          tokens: handle -> token count of the step (1 when decoding), or the same as a tuple of two integer arrays,
            (handles [n], counts [n]), the faster form for many requests. The plan keeps the order given. No request at
            all gives a plan of nothing but padding.
          drafts: handle -> how many of a step's tokens are drafts, or integers [n] in the order of requests, or one for
            all: of a request's 1 + k tokens when decoding, k. At least one token is none.
          steps: how many steps of these counts; None for the plan of one step.
          layout: the one of ``layouts`` that the plan is to have, where plans of several managers must have one; by
            default the smallest that fits, ``layout_of``.

        Returns:
          The plan, on the host: packed [size], or [steps, size] if ``steps`` is given.

        An exception from outside (KeyboardInterrupt) may come when the plan is made and not yet handed over. ``length``
        then tells that it was: what it would have brought never runs, so release its requests or truncate them to 0.

        Raises:
          InvalidStep: a request twice, a count or ``steps`` below 1, no integers of matching shape, more drafts than
            the schema's ``lookahead`` or the request's other tokens allow, or a ``layout`` that the step does not fit.
          UnknownRequest: a handle that is not admitted.
          ContextExceeded: a request would grow beyond ``schema.max_context``.
          StepTooLarge: more tokens than the largest bucket.
          CacheFull: too few free blocks.
          TransfersWait: ``take_transfers`` first. With ``wipe`` also if the step needs blocks that are kept for what
            they contain: these are then free, and transfers that wipe them wait, so take them and call again.
        """
        handles, counts = step_arrays(tokens)
        repeats = step_count(steps)
        table, _ = self._state()
        self._require_no_transfers()
        at = self._standing
        if at is None or not at.allows(
            handles, counts, repeats, layout, self._journal.number, self._schema.max_context
        ):
            at = self._stand(handles, counts, repeats, layout)
        batch, changes = at.batch, None
        writes: tuple[Write, ...] = ()
        ends = at.lengths + (batch.counts if steps is None else batch.counts * repeats)
        blocks, block_due = at.new_blocks(ends, self._need, by_step=steps is not None)
        if blocks is not None:
            # Blocks go out in order of need: those of several steps as if these were prepared one by one.
            ids, writes = self._ledger.take(*blocks[1:])
            changes = (*blocks, ids)

        drafted, draft_writes = self._drafts.bring(drafts, handles, batch.slots, batch.counts, repeats)
        if changes is not None:
            self._require_wiped(changes[0].size)
        receipt = self._receipts.issue(table.clock + 1, drafted)
        if steps is None:
            plan = batch.frame.plan(at.lengths, at.resets, changes and changes[1:], receipt=receipt)
        else:
            plan = batch.frame.plans(repeats, at.lengths, at.resets, changes, receipt=receipt)
        if at.resets is not None:
            writes = (*writes, (table.reset_due, batch.slots, False))
        self._journal.write((*writes, *draft_writes, (table.lengths, batch.slots, ends), table.tick()))
        self._standing = at.after(repeats, block_due, ends, self._journal.number)
        return plan

    def layout_of(self, counts: ArrayLike) -> PlanLayout:
        """The smallest of ``layouts`` for a step of requests that bring so many tokens each; integers [n].

        Raises:
          StepTooLarge: more tokens than the largest bucket.
        """
        counts = np.asarray(counts)
        total = int(counts.sum())
        if total > self._buckets[-1]:
            raise StepTooLarge(total, self._buckets[-1])
        return self._layout(counts.size, total, int(counts.max(initial=0)))

    def _stand(
        self, handles: NDArray[np.int64], counts: NDArray[np.int64], steps: int, wanted: PlanLayout | None
    ) -> Standing:
        """Looks up the requests of a step, and checks all but blocks; raises as ``prepare_forward``."""
        table = self._request_table
        slots = table.slots(handles)
        lengths, resets = table.lengths.take(slots), table.reset_due.take(slots)
        stored = np.maximum(lengths, self._prefix.floors.take(slots))
        limit = self._schema.max_context
        total, most, longest = table.check_growth(handles, slots, lengths, counts, steps, limit)
        if total > self._buckets[-1]:
            raise StepTooLarge(total, self._buckets[-1])
        layout = self._chosen(self._layout(counts.size, total, most), wanted)
        batch = Batch(handles, counts, slots, most, layout, wanted)
        any_resets = resets if np.count_nonzero(resets) else None
        return Standing(batch, lengths, self._need.due(stored), longest, any_resets, self._journal.number)

    def _layout(self, requests: int, total: int, most: int) -> PlanLayout:
        """The layout of a step that brings so many tokens of so many requests, at most ``most`` of one."""
        displaces = total > requests and most > self._schema.lookahead + 1
        return self._layouts[bisect.bisect_left(self._buckets, total)][displaces]

    def _chosen(self, smallest: PlanLayout, wanted: PlanLayout | None) -> PlanLayout:
        """The layout that is wanted, if the smallest one's steps fit it. Raises InvalidStep."""
        if wanted is None:
            return smallest
        fits = wanted.tokens >= smallest.tokens and wanted.displaces >= smallest.displaces
        if not fits or all(wanted not in of_bucket for of_bucket in self._layouts):
            raise InvalidStep(f"a step that needs {smallest} cannot have {wanted}; give None, or one of layouts")
        return wanted

    def cancel(
        self, plan: StepPlan, requests: ArrayLike | None = None, *, layout: PlanLayout | None = None
    ) -> StepPlan:
        """Takes back a plan that has not run and will not, or some of its requests' part of it.

        Lengths, blocks and resets are as if the plan, or that part, had never been made. Possible while it is the
        latest plan of each request that is taken out; so cancel several in reverse order. A plan of several steps is
        taken back whole; if some of them ran, ``commit`` it.

        Args:
          plan: what ``prepare_forward`` returned (not a copy that came out of jit).
          requests: handles of the plan's requests, integers [n] or one, whose tokens will not be computed: their client
            is gone, say. All of them by default.
          layout: of the plan that is returned, as in ``prepare_forward``.

        Returns:
          The plan of the requests that are left, in their order, to be run in place of the one given, which is stale
          from here on; of nothing but padding if none is left. Tokens are packed anew with it, and its layout may be a
          smaller one. As with ``prepare_forward``, an exception from outside may come when it is made and not yet
          handed over.

        Raises:
          StalePlan: a request that is taken out has a later plan, or any of the plan's was released or truncated since;
            or the plan was cancelled or committed before, or is not this manager's.
          InvalidStep: the plan does not hold one of ``requests``, or what is left does not fit the ``layout``.
          UnknownRequest: one of ``requests`` is not admitted.
        """
        left, writes = self._cancel(plan, requests, layout)
        self._journal.write(writes)
        return left

    def _cancel(
        self, plan: StepPlan, requests: ArrayLike | None, wanted: PlanLayout | None
    ) -> tuple[StepPlan, tuple[Write, ...]]:
        """What is left, and the writes; nothing has changed yet."""
        table, _ = self._state()
        whole = Outstanding.of_plan(plan, self._receipts, table, self._drafts)
        whole.unchanged(table, all_of_them=True)
        chosen = whole.chosen(requests, table)
        part, rest = whole.of(chosen), whole.of(~chosen)
        part.check_latest(table)
        drafts = whole.receipt.drafts and self._drafts.remember(rest.slots, rest.drafts, rest.made)
        receipt = self._receipts.issue(table.clock + 1, drafts, whole.receipt.serial)
        layout = self._chosen(self.layout_of(rest.counts), wanted)
        left = plan_of(rest, plan, layout, receipt)
        settled = self._receipts.settle(whole.receipt, "cancelled", table.oldest_plan())
        uncounted = self._drafts.made, part.slots, part.made - part.drafts * part.steps
        # Its blocks were wiped, and it did not run. But plans before it may have written there, of drafts since lost.
        clean = not self._schema.lookahead
        return left, (*self._keep(part, part.starts, clean=clean), uncounted, table.tick(), settled)

    def commit(
        self,
        plan: StepPlan,
        steps_run: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        """Says how far each of a plan's requests really came; takes the rest back, lengths and blocks.

        For drafts that were not kept, and for requests that stopped on the way and go on later. If all ran every step
        and had no drafts there is nothing to say, and for one that is over, ``release`` says enough: what is said of
        requests that were released or truncated since, or had a later plan committed, is ignored.

        Where a request had no drafts, no token can be taken back once it has a later plan, so commit first and prepare
        then. With drafts, in this plan or earlier ones, later plans may be under way (``StepPlan.rebase``): their part
        of the length, and the blocks that it may reach, stay reserved.

        It also says that the plan's tokens are in the cache, as soon as it was dispatched. The full blocks of requests
        that were admitted with a match are then known, for others to share; and if the plan ends where that is worth
        it, and no later plan of the request was made, a transfer takes a snapshot. Tokens of the prompt are known
        already, others have to be told: where they are not, the request's later blocks stay unknown.

        Args:
          plan: what ``prepare_forward`` returned (not a copy that came out of jit).
          steps_run: integers, the steps each request ran before it was stopped, or the loop ended: [requests] in the
            plan's order, or [R] as the device has them (padding is ignored), or one number for all. It must be what the
            device did. A request that ran further cannot be taken back this way, only by ``truncate``. Not for drafts.
          lengths: instead of ``steps_run``, the length of each request once the plan has run, [requests] or [R].
          tokens: what the plan brought and was kept: for each of its requests, in order, the int32 tokens; or a mapping
            of handles to them. Where each kept one, int32 [requests] is the fast form.

        Raises:
          InvalidStep: ``steps_run`` or ``lengths`` has another shape, is not of integers, or cannot be; or both are
            given, or neither; or ``tokens`` are not so many.
          StalePlan: a request has a later plan that must not be; or none of the plan's is as it left them; or the plan
            was cancelled or committed before, or is not this manager's.
        """
        self._journal.write(self._commit(plan, steps_run, lengths, tokens))

    def _commit(
        self, plan: StepPlan, steps_run: ArrayLike | None, lengths: ArrayLike | None, tokens: Tokens | None
    ) -> tuple[Write, ...]:
        """The writes of ``commit``; nothing has changed yet."""
        table, _ = self._state()
        whole = Outstanding.of_plan(plan, self._receipts, table, self._drafts)
        part, kept = whole.kept(steps_run, lengths, plan.layout.requests, table)
        following = self._told(whole, part, kept, tokens)
        # It ran, and so did all plans before it.
        stale = table.changed, part.slots, whole.receipt.serial
        settled = self._receipts.settle(whole.receipt, "committed", table.oldest_plan())
        learned = part.learn(kept, table, self._drafts, self._schema.lookahead)
        return *self._keep(part, kept), *learned, stale, settled, *following

    def _told(
        self, whole: Outstanding, part: Outstanding, kept: NDArray[np.int64], tokens: Tokens | None
    ) -> tuple[Write, ...]:
        """What follows for the prefix cache if a part of a plan's requests had ``kept`` tokens [n] once it had run."""
        table, prefix = self._request_table, self._prefix
        if tokens is None and not np.count_nonzero(prefix.follows[part.slots]):
            return ()
        certain = part.earlier == 0  # where the part's first token is
        if not certain.all():
            part, kept = part.of(certain), kept[certain]
        told = None
        if tokens is not None:
            chosen = np.isin(whole.slots, part.slots)
            told = told_tokens(tokens, table.handles[whole.slots], chosen, kept - part.starts)
        telling = Telling(prefix, self._ledger)
        telling.stored(part.slots, part.starts, kept, table.lengths[part.slots] == part.ends, told)
        writes, wishes = telling.finish(self._schema.slots)
        return *writes, *self._transfers.add(*wishes)

    def _keep(self, part: Outstanding, kept: NDArray[np.int64], *, clean: bool = False) -> tuple[Write, ...]:
        """Takes back what is beyond ``kept`` tokens [n] of a part of a plan; later plans start so much earlier."""
        table = self._request_table
        lengths, not_reset = table.lengths[part.slots] - (part.ends - kept), part.slots[part.resets & (kept == 0)]
        return (
            *self._free_blocks(part.slots, self._held(part.slots, lengths), clean=clean),
            (table.lengths, part.slots, lengths),
            (table.reset_due, not_reset, True),
        )
