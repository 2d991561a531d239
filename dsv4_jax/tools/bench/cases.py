"""Every case of the benchmark by name."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS
from dsv4_jax.ops import Implementation
from dsv4_jax.spec.kinds import LayerKind
from dsv4_jax.tools.bench import attention, decode, formats, reads
from dsv4_jax.tools.bench.attended_step import stack_of, whole_decode
from dsv4_jax.tools.bench.attention import chunk_shape, decode_shape
from dsv4_jax.tools.bench.lifecycle import OPERATIONS, lifecycle
from dsv4_jax.tools.bench.measure import Outcome
from dsv4_jax.tools.bench.mesh_step import step_of_shards
from dsv4_jax.tools.bench.model_step import whole_model
from dsv4_jax.tools.bench.step import floor, host_part, prepare_forward, reset_slots, whole_step
from dsv4_jax.tools.bench.targets import TARGETS, Target
from dsv4_jax.tools.bench.traffic import StepShape
from dsv4_jax.tools.bench.workload import Scale, Workload

SWA, CSA, HCA = LayerKind


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the benchmark.

    Attributes:
      name: path-like, for a regular expression to choose by.
      build: makes the workload for an implementation ("native" or "reference"); or
      run: measures by itself, with a scale and an implementation.
      quick: whether a quick run includes it.
      has_reference: whether it can run on the plain jnp definition too.
    """

    name: str
    build: Callable[[Scale, Implementation], Workload] | None = None
    run: Callable[[Scale, Implementation], Outcome] | None = None
    quick: bool = False
    has_reference: bool = True

    @property
    def target(self) -> Target | None:
        """What the case is held to, if anything."""
        return TARGETS.get(self.name)


def all_cases(scale: Scale) -> list[Case]:
    """The cases of a scale; those that share a state lie together."""
    return [
        Case("floor", floor, quick=True, has_reference=False),
        *_updates(scale),
        *_drafts(scale),
        *_lookahead(scale),
        *_ops(scale),
        *_prefills(scale),
        *_reads(scale),
        *_attend(scale),
        *_index_topk(scale),
        *_formats(),
        *_steps(scale),
        *_meshes(scale),
        *_models(scale),
        *_lifecycle(scale),
    ]


def _updates(scale: Scale) -> Iterator[Case]:
    everywhere, in_a_step = scale.batches, [_step_batch(scale)]
    for kind, hca_tail, boundary, batches in [
        (CSA, "rows", "mixed", everywhere),
        (HCA, "rows", "none", everywhere),
        (HCA, "rows", "all", everywhere),
        (HCA, "rows", "mixed", in_a_step),
        (HCA, "running", "mixed", everywhere),
        (HCA, "running", "all", in_a_step),
        (SWA, "rows", "mixed", everywhere),
    ]:
        for batch in batches:
            build = functools.partial(decode.update, kind, hca_tail, boundary, batch)
            yield Case(f"update/{_label(kind, hca_tail)}/{boundary}/b{batch}", build, quick=True)


def _lookahead(scale: Scale) -> Iterator[Case]:
    """What rings that are eight rows deeper cost, beside the cases of the same name without."""
    batch, rows = _step_batch(scale), 8
    for kind in (CSA, HCA, SWA):
        build = functools.partial(decode.update, kind, "rows", "mixed", batch, lookahead=rows)
        yield Case(f"update/{kind.value}/mixed/b{batch}/lookahead{rows}", build, quick=True)
        build = functools.partial(decode.update, kind, "rows", "mixed", batch, tokens=4, lookahead=rows)
        yield Case(f"drafts/{kind.value}/{batch}x4/lookahead{rows}", build)


def _drafts(scale: Scale) -> Iterator[Case]:
    tokens = 4
    for kind in (CSA, HCA, SWA):
        for batch in scale.batches[-2:]:
            build = functools.partial(decode.update, kind, "rows", "mixed", batch, tokens=tokens)
            yield Case(f"drafts/{kind.value}/{batch}x{tokens}", build)


def _label(kind: LayerKind, hca_tail: str) -> str:
    return f"{kind.value}_running" if hca_tail == "running" else kind.value


def _step_batch(scale: Scale) -> int:
    return scale.step_requests if scale.step_requests in scale.batches else scale.batches[-1]


def _ops(scale: Scale) -> Iterator[Case]:
    for kind, op in [
        (CSA, "append_window"),
        *((kind, op) for kind in (CSA, HCA) for op in ("append_tail", "compress", "flush", "rotate")),
    ]:
        label = op if op == "append_window" else f"{op}/{kind.value}"
        for batch in scale.batches[-2:]:
            yield Case(f"op/{label}/b{batch}", functools.partial(decode.separate_op, op, kind, batch))
    for boundary in ("none", "all"):
        name = {"none": "op/begin_step", "all": "op/begin_step/reset"}[boundary]
        yield Case(f"{name}/b{scale.step_requests}", functools.partial(reset_slots, boundary == "all"))


def _prefills(scale: Scale) -> Iterator[Case]:
    for kind, hca_tail in ((CSA, "rows"), (HCA, "rows"), (HCA, "running")):
        for requests in (1, scale.prefill_requests):
            for dtype in ("fp32", "bf16"):
                name = f"prefill/{_label(kind, hca_tail)}/{dtype}/{requests}x{scale.prefill // requests}"
                build = functools.partial(decode.prefill, kind, hca_tail, requests, dtype)
                yield Case(name, build, quick=requests == 1)


def _reads(scale: Scale) -> Iterator[Case]:
    for queries in scale.queries:
        name = f"gather/entries/{queries}x{scale.chosen}"
        yield Case(name, functools.partial(reads.entries, queries), quick=True)
    for queries in scale.queries[:1]:
        name = f"gather/all_entries/hca/{queries}x{scale.chosen}"
        yield Case(name, functools.partial(reads.all_entries, queries))
    for batch in scale.batches[-2:]:
        yield Case(f"gather/window/b{batch}", functools.partial(reads.window, batch))


def _attend(scale: Scale) -> Iterator[Case]:
    """Attention over the window and chosen entries (CSA), or all entries of the longest contexts (HCA)."""
    flash, pro, *shards = scale.heads
    slots, fewer, tokens = max(scale.read_batches), scale.chosen // 2, 4

    def csa(heads: int, formats: str, name: str, shape: StepShape, quick: bool = False, **options: Any) -> Case:
        options = {"chosen": scale.chosen if heads == pro else fewer, "slots": slots} | options
        build = functools.partial(attention.attend, CSA, attention.ATTENDED[formats], heads, shape, **options)
        return Case(f"attend/csa/h{heads}/{formats}/{name}", build, quick=quick)

    decoded = {f"b{batch}": decode_shape(batch, scale.gather_context) for batch in scale.read_batches}
    for heads in scale.heads:
        for name, shape in decoded.items():
            yield csa(heads, "fp8", name, shape, quick=heads not in shards)
    drafts = scale.read_batches[-2:][0]
    shape = decode_shape(drafts, scale.gather_context, tokens)
    yield csa(flash, "fp8", f"{drafts}x{tokens}/lookahead{tokens}", shape, lookahead=tokens)
    shape = chunk_shape(scale.chunk, scale.gather_context)
    yield csa(flash, "fp8", f"1x{scale.chunk}", shape, quick=True, slots=4, share=16)
    for others in ("fp8_ds_mla", "default", "nvfp4"):
        for name, shape in decoded.items():
            yield csa(flash, others, name, shape, quick=others == "default")
    for batch in scale.long_batches:
        shape = decode_shape(batch, scale.long_context)
        asked = (HCA, attention.ATTENDED["fp8"], flash, shape)
        build = functools.partial(attention.attend, *asked, slots=max(scale.long_batches))
        yield Case(f"attend/hca/h{flash}/fp8/b{batch}", build, quick=True)


def _index_topk(scale: Scale) -> Iterator[Case]:
    """The indexer's choice, by the format and the number of the keys that a token sees."""

    def case(keys: str, context: int, name: str, shape: StepShape, slots: int, **options: Any) -> Case:
        asked = (attention.KEYS[keys], scale.index_heads, scale.chosen // 2, shape, slots)
        build = functools.partial(attention.index_topk, *asked, **options)
        return Case(f"index_topk/{keys}/{context // CSA.ratio}/{name}", build, quick=context == scale.gather_context)

    contexts = ((scale.gather_context, scale.read_batches), (scale.long_context, scale.long_batches[:2]))
    for keys in attention.KEYS:
        for context, batches in contexts if keys != "nvfp4" else contexts[:1]:
            for batch in batches:
                yield case(keys, context, f"b{batch}", decode_shape(batch, context), max(batches))
    context, shape = scale.gather_context, chunk_shape(scale.chunk, scale.gather_context)
    yield case("mxfp4", context, f"1x{scale.chunk}", shape, 4, share=16)


def _formats() -> Iterator[Case]:
    for component, table in (("entries", ENTRY_FORMATS), ("keys", KEY_FORMATS)):
        for op in ("flush", "gather", "quantize", "dequantize"):
            for format in table.values():
                build = functools.partial(getattr(formats, op), component, format)
                yield Case(f"format/{op}/{component}/{format.name}", build)


def _steps(scale: Scale) -> Iterator[Case]:
    name = f"step/pro/b{scale.step_requests}"
    for way, suffix in (
        ("turns", ""),
        ("one", "/one_plan"),
        ("scan", "/8_per_dispatch"),
        ("planned", "/planned"),
        ("transferred", "/planned/device_put"),
        ("ahead", "/planned/8_ahead"),
    ):
        yield Case(
            name + suffix,
            run=functools.partial(whole_step, way),
            quick=way in ("turns", "planned"),
            has_reference=way == "turns",
        )
    for batch in scale.step_batches:
        run = functools.partial(whole_decode, batch)
        yield Case(f"step/flash/b{batch}", run=run, quick=True, has_reference=False)
    for part in ("prepare_forward", "device_put", "dispatch", "send_and_dispatch"):
        run = functools.partial(host_part, part)
        yield Case(f"host/step/b{scale.step_requests}/{part}", run=run, has_reference=False)
    name = f"host/prepare_forward/{scale.host_requests}"
    yield Case(name, run=prepare_forward, quick=True, has_reference=False)


def _meshes(scale: Scale) -> Iterator[Case]:
    """A shard on each device, where there are several; then shards whose query heads several devices split."""
    devices, batch = jax.device_count(), max(scale.step_batches)
    for tensor in (1, 2, 4, 8):
        if devices > 1 and devices % tensor == 0 and stack_of(scale).num_heads % tensor == 0:
            run = functools.partial(step_of_shards, batch, tensor)
            yield Case(f"mesh/flash/b{batch}/{devices // tensor}x{tensor}", run=run, quick=True, has_reference=False)


def _models(scale: Scale) -> Iterator[Case]:
    for batch, context in itertools.product(scale.model_batches, scale.model_contexts):
        run = functools.partial(whole_model, batch, context)
        yield Case(f"model/flash/b{batch}/{context}", run=run, has_reference=False)


def _lifecycle(scale: Scale) -> Iterator[Case]:
    for tokens in (scale.prefill, scale.gather_context):
        for operation in OPERATIONS:
            run = functools.partial(lifecycle, operation, tokens)
            yield Case(f"life/{operation}/{tokens}", run=run, has_reference=False)
    batch, drafts = scale.step_batches[-1], 3
    for tokens in (1 + drafts, 1):  # what a step with drafts takes, and what each of as many steps without takes
        run = functools.partial(whole_decode, batch, tokens=tokens, lookahead=drafts)
        yield Case(f"life/drafts/{batch}x{tokens}", run=run, has_reference=False)
