"""`dsv4-jax capacity`: what a cache will take, and how many requests will fit, before anything is allocated."""

from __future__ import annotations

import dataclasses
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dsv4_jax.layout.capacity import CapacityPlan, capacity_plan, requests_that_fit
from dsv4_jax.layout.formats import PROFILES
from dsv4_jax.layout.schema import SchemaError
from dsv4_jax.spec.config_json import model_spec
from dsv4_jax.spec.kinds import BLOCK_TOKENS
from dsv4_jax.spec.model import ConfigError, ModelSpec
from dsv4_jax.spec.presets import deepseek_v4_flash, deepseek_v4_pro, tiny_spec
from dsv4_jax.tools.cli._mesh import MeshSize, parse_mesh
from dsv4_jax.tools.cli._output import print_table, writable_file, writable_picture
from dsv4_jax.tools.cli.decode import EntryFormat, HcaTail, KeyFormat, WindowFormat

MODELS = {"deepseek-v4-flash": deepseek_v4_flash, "deepseek-v4-pro": deepseek_v4_pro, "tiny": tiny_spec}
_UNITS = {"": 1} | {f"{prefix}B": 1000**power for power, prefix in enumerate(["", "k", "M", "G", "T"])}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate(["K", "M", "G", "T"], start=1)}
_SHORTEST = 1024
_ONE_DEVICE = MeshSize()


def capacity(
    context: Annotated[int, typer.Option(min=1, help="Longest context of a request, in tokens.")],
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODELS)}; or a config.json, or a folder with one.")
    ] = "deepseek-v4-flash",
    formats: Annotated[
        str, typer.Option(help=f"Storage formats as a profile: {', '.join(PROFILES)}. The next four change one each.")
    ] = "default",
    entries: Annotated[EntryFormat | None, typer.Option(help="How compressed entries are stored.")] = None,
    window: Annotated[WindowFormat | None, typer.Option(help="How window rows are stored.")] = None,
    keys: Annotated[KeyFormat | None, typer.Option(help="How indexer keys are stored.")] = None,
    hca_tail: Annotated[HcaTail | None, typer.Option(help="How an open HCA window is kept.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory for the cache on a device, as 141GB, 80GiB or bytes.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests at the same time.")] = None,
    lookahead: Annotated[int, typer.Option(min=0, help="Tokens that can be taken back: rings are so much deeper.")] = 0,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Several devices, as data=4,tensor=2: shards with requests of their own, times devices each."
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers here instead; - for standard output.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw this picture (PNG, SVG or PDF), or capacity.png in this folder.")
    ] = None,
) -> None:
    """Bytes per token, block and request, and how many requests fit at which context.

    Exactly what init_cache allocates. With --memory alone: the requests of --context tokens that fit. With --requests
    alone: the memory they need. With both: a slot for each request, and as many blocks as the rest holds. With --mesh
    the bytes are those of one device, and the requests those of all.
    """
    console = Console()
    spec = _model(model)
    if formats not in PROFILES:
        raise typer.BadParameter(f"{formats!r} is none of {', '.join(PROFILES)}.", param_hint="--formats")
    chosen = {"entries": entries, "window": window, "keys": keys, "hca_tail": hca_tail}
    changes: dict[str, Any] = {component: str(name) for component, name in chosen.items() if name is not None}
    cache_formats = dataclasses.replace(PROFILES[formats], **changes)
    memory_bytes, shards = None if memory is None else parse_bytes(memory), parse_mesh(mesh)
    picture = None if plot is None else writable_picture(plot, "capacity")
    to_file = json_path is not None and str(json_path) != "-"
    if json_path is not None and to_file:
        writable_file(json_path, "--json")
    of_shard = None if requests is None else -(-requests // shards.data)
    try:
        planned = capacity_plan(
            spec, cache_formats, context=context, memory_bytes=memory_bytes, requests=of_shard, lookahead=lookahead
        )
    except SchemaError as error:
        raise typer.BadParameter(str(error)) from error
    ladder = context_ladder(planned, memory_bytes, shards.data)
    if picture is not None:
        draw(planned, ladder, picture)
    if json_path is not None:
        text = json.dumps(as_json(planned, ladder, memory_bytes, shards), indent=1) + "\n"
        if not to_file:
            typer.echo(text, nl=False)
            return
        json_path.write_text(text)
        console.print(f"Written to {json_path}.", markup=False, highlight=False, soft_wrap=True)
    else:
        print_table(console, _bytes_table(planned, shards))
        print_table(console, _requests_table(ladder, memory_bytes, shards))
    if picture is not None:
        console.print(f"Drawn in {picture}.", markup=False, highlight=False, soft_wrap=True)


def parse_bytes(text: str) -> int:
    """A number of bytes: 141GB, 80 GiB, 1.5TB, 1000000.

    Raises:
      typer.BadParameter: it is not one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if not match or match[2].lower() not in units:
        raise typer.BadParameter(
            f"{text!r} is no amount of memory; write a number and one of {', '.join(filter(None, _UNITS))}.",
            param_hint="--memory",
        )
    return int(Fraction(match[1]) * units[match[2].lower()])


def context_ladder(
    planned: CapacityPlan, memory_bytes: int | None, shards: int = 1
) -> list[tuple[CapacityPlan, int | None]]:
    """One request of 1024, 4096, ... tokens and of the longest context, and how many of each fit in all shards.

    Below a longest context of 1024 it begins at the largest of 256, 64, 16, 4 and 1 that is shorter.
    """
    schema, shortest = planned.schema, _SHORTEST
    while shortest >= planned.context and shortest > 1:
        shortest //= 4
    contexts = {planned.context} | {shortest * 4**step for step in range(12)}
    ladder = []
    for context in sorted(context for context in contexts if context <= planned.context):
        given = {"context": context, "lookahead": schema.lookahead}
        fit = None
        if memory_bytes is not None:
            fit = shards * requests_that_fit(schema.spec, schema.formats, memory_bytes=memory_bytes, **given)
        ladder.append((capacity_plan(schema.spec, schema.formats, **given), fit))
    return ladder


def as_json(
    planned: CapacityPlan,
    ladder: list[tuple[CapacityPlan, int | None]],
    memory_bytes: int | None,
    mesh: MeshSize = _ONE_DEVICE,
) -> dict[str, Any]:
    """The tables as plain data; all sizes in bytes, of one device."""
    schema = planned.schema
    return {
        "model": schema.spec.name,
        "formats": dataclasses.asdict(schema.formats),
        "context": planned.context,
        "mesh": mesh._asdict(),
        "requests": mesh.data * planned.requests,
        "slots": planned.requests,
        "blocks": schema.blocks,
        "common_context": planned.common_context,
        "memory_given": memory_bytes,
        "memory": planned.memory_bytes,
        "per_block": planned.block_bytes,
        "per_request": planned.request_bytes,
        "cache": dict(schema.bytes_by_component),
        "by_context": [
            {"context": one.context, "per_request": one.bytes_per_request, "requests_that_fit": fit}
            for one, fit in ladder
        ],
    }


def draw(planned: CapacityPlan, ladder: list[tuple[CapacityPlan, int | None]], path: Path) -> None:
    """A picture of the ladder: bytes of a request by component, and the requests that fit."""
    from matplotlib.figure import Figure

    contexts = [one.context for one, _ in ladder]
    counts = [(one.context, fit) for one, fit in ladder if fit]
    figure = Figure(figsize=(11 if counts else 6, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if counts else 1, squeeze=False)[0]
    components = [name for name, size in planned.request_bytes.items() if size]
    for name in components:
        axes[0].plot(contexts, [one.request_bytes[name] for one, _ in ladder], ".-", label=name)
    axes[0].plot(contexts, [one.bytes_per_request for one, _ in ladder], "k.--", label="together")
    axes[0].set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="bytes", title="A request")
    if counts:
        axes[1].plot(*zip(*counts, strict=True), "o-")
        axes[1].set(xscale="log", yscale="log", xlabel="context (tokens)", title="Requests that fit")
    for one in axes:
        one.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    formats = planned.schema.formats
    figure.suptitle(
        f"{planned.schema.spec.name}: entries {formats.entries}, window {formats.window}, keys {formats.keys}"
    )
    figure.savefig(path, dpi=150)


def _model(name: str) -> ModelSpec:
    preset = MODELS.get(name.lower().replace("_", "-"))
    if preset is not None:
        return preset()
    try:
        return model_spec(Path(name))
    except FileNotFoundError as error:
        message = f"{name!r} is none of {', '.join(MODELS)}, nor a model config. {error}"
        raise typer.BadParameter(message, param_hint="--model") from error
    except (ConfigError, OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error


def _bytes_table(planned: CapacityPlan, mesh: MeshSize) -> Table:
    formats, block_bytes = planned.schema.formats, planned.block_bytes
    table = Table("component", "per token", "per block", "per request", "the cache")
    table.title = (
        f"Bytes of {planned.schema.spec.name}, {planned.context:,} tokens of context: "
        f"entries {formats.entries}, window {formats.window}, keys {formats.keys}"
    )
    whole = planned.schema.bytes_by_component
    for name, size in planned.request_bytes.items():
        if whole[name]:
            of_block = block_bytes.get(name)
            growing = ("", "") if of_block is None else (_decimal(of_block / BLOCK_TOKENS), f"{of_block:,}")
            table.add_row(name, *growing, f"{size:,}", f"{whole[name]:,}")
    together = sum(block_bytes.values())
    table.add_section()
    table.add_row(
        "together",
        _decimal(together / BLOCK_TOKENS),
        f"{together:,}",
        f"{planned.bytes_per_request:,}",
        f"{planned.memory_bytes:,}",
    )
    table.caption = f"slots: {planned.requests:,}, blocks: {planned.schema.blocks:,}"
    if planned.common_context < planned.context:
        table.caption += f", enough for {planned.common_context:,} tokens each"
    if mesh.devices > 1:
        table.caption += (
            f"; on each of {mesh.devices} devices, {mesh.data} shards: {mesh.data * planned.requests:,} slots in all"
        )
    return _numbers_right(table)


def _requests_table(ladder: list[tuple[CapacityPlan, int | None]], memory_bytes: int | None, mesh: MeshSize) -> Table:
    table = Table("context", "bytes per request", title="A request by its context")
    if memory_bytes is not None:
        each = f" on each of {mesh.devices} devices" * (mesh.devices > 1)
        table.title = f"Requests that fit in {memory_bytes:,} bytes{each}"
        table.add_column("requests")
    for one, fit in ladder:
        row = [f"{one.context:,}", f"{one.bytes_per_request:,}"]
        table.add_row(*row if fit is None else [*row, f"{fit:,}"])
    return _numbers_right(table)


def _numbers_right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _decimal(value: float) -> str:
    return f"{value:,.6f}".rstrip("0").rstrip(".")
