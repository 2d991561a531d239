"""Chunks of prompts, decoding and drafts of different requests in one step, in any order, with clients that leave."""

import pytest
from histories import steps_until
from speculation import Speculation, assert_same, material

from dsv4_jax.host.errors import CacheFull, StalePlan
from dsv4_jax.layout.formats import HCA_TAILS

SIZES = {"slots": 4, "blocks": 8, "max_context": 512}
LOOKAHEAD = 5


class Traffic:
    """Requests on two caches: one with drafts and plans of which nothing is known yet, one fed with what was kept."""

    def __init__(self, rng, given, hca_tail):
        self.rng, options = rng, {**SIZES, "hca_tail": hca_tail}
        self.subject = Speculation(given, lookahead=LOOKAHEAD, buckets=[4, 24, 128, 400], **options)
        self.twin = Speculation(given, lookahead=0, buckets=[4, 400], **options)
        self.prompts, self.lengths, self.under_way = {}, {}, []
        self.seen = set()

    def admit(self):
        request, other = (each.manager.admit() for each in (self.subject, self.twin))
        assert request == other
        self.prompts[request], self.lengths[request] = int(self.rng.integers(1, 330)), 0

    def release(self, request):
        self.seen.add("gave up a prompt" if self.lengths[request] < self.prompts[request] else "released")
        for each in (self.subject, self.twin):
            each.manager.release(request)
        del self.prompts[request], self.lengths[request]

    def counts(self):
        """Tokens of a step, drafts among them, how many are kept; by request."""
        rng, tokens, drafts, kept = self.rng, {}, {}, {}
        for request in rng.permutation(list(self.lengths)).tolist():
            left = self.prompts[request] - self.lengths[request]
            kind = rng.choice(["nothing", "decode", "drafts"]) if left <= 0 else "prompt"
            if kind == "nothing":
                continue
            count = {"decode": 1, "drafts": int(rng.integers(2, LOOKAHEAD + 2))}.get(kind)
            tokens[request] = count or int(rng.integers(1, min(left, 90) + 1))
            drafts[request] = min(tokens[request] - 1, LOOKAHEAD) * (kind == "drafts")
            kept[request] = tokens[request] - int(rng.integers(0, drafts[request] + 1))
            self.seen.add(kind)
        if {drafts[r] > 0 for r in tokens} == {True, False} and any(self.prompts[r] > self.lengths[r] for r in tokens):
            self.seen.add("mixed")
        return tokens, drafts, kept

    def step(self):
        manager = self.subject.manager
        tokens, drafts, kept = self.counts()
        try:
            plan = manager.prepare_forward(tokens, drafts=drafts)
        except CacheFull:
            self.seen.add("full")
            if self.under_way:
                self.commit(len(self.under_way) - 1)
            else:
                self.release(max(self.lengths, key=self.lengths.get))
            return
        if len(tokens) > 1 and self.rng.random() < 0.25:
            leaves = int(self.rng.choice(list(tokens)))
            plan = manager.cancel(plan, leaves)
            del tokens[leaves], kept[leaves]
            self.seen.add("left a plan")
            if self.rng.random() < 0.5:
                self.release(leaves)
        after = self.subject.run(plan, list(kept.values()), salt=int(self.rng.integers(1000)))
        self.under_way.append((plan, after))
        for request, count in kept.items():
            self.lengths[request] += count
        if kept:
            self.twin.run(self.twin.manager.prepare_forward(kept), list(kept.values()))

    def commit(self, index):
        plan, after = self.under_way[index]
        del self.under_way[: index + 1]
        slots = [self.subject.manager.slot(request) for request in self.lengths]
        if any(slot in slots for slot in plan.request_slot.tolist()):
            try:
                self.subject.manager.commit(plan, lengths=after)
            except StalePlan:
                self.seen.add("stale")

    def check(self):
        assert [self.lengths[r] for r in self.lengths] == [self.twin.manager.length(r) for r in self.lengths]
        stored = [each.stored(list(self.lengths), self.lengths.values()) for each in (self.subject, self.twin)]
        assert_same(*stored, f"lengths {self.lengths}")


@pytest.mark.parametrize("hca_tail", HCA_TAILS)
def test_traffic_of_every_kind(device, rng, hca_tail):
    traffic = Traffic(rng, material(rng), hca_tail)
    wanted = {"prompt", "decode", "drafts", "mixed", "full", "left a plan", "gave up a prompt", "released"}
    for step in steps_until(250, traffic.seen, wanted):
        while len(traffic.lengths) < SIZES["slots"] and rng.random() < 0.7:
            traffic.admit()
        if traffic.lengths:
            traffic.step()
        while len(traffic.under_way) > 3 or (traffic.under_way and rng.random() < 0.4):
            traffic.commit(int(rng.choice([0, 0, rng.integers(len(traffic.under_way))])))
        ended = [r for r, n in traffic.lengths.items() if n > traffic.prompts[r] + 100 or n > 440]
        for request in ended + [r for r in traffic.lengths if rng.random() < 0.01 and r not in ended]:
            traffic.release(request)
        if step % 10 == 9:
            traffic.check()
    assert traffic.seen >= wanted
