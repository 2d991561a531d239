"""`dsv4-jax trace`: decode steps under the JAX profiler, summed up by layer kind and op."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.table import Table

from dsv4_jax.layout.schema import SchemaError
from dsv4_jax.tools.bench.attended_step import PARTS
from dsv4_jax.tools.bench.measure import NoFigureError
from dsv4_jax.tools.bench.model_step import model_config, model_schema, trace_model
from dsv4_jax.tools.bench.trace import Op, Spent, trace_schema, trace_steps
from dsv4_jax.tools.bench.workload import FULL, TINY
from dsv4_jax.tools.cli._limits import LONGEST_CONTEXT, MOST_REQUESTS, require_memory
from dsv4_jax.tools.cli._output import print_table, writable_folder


def trace(
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Decode steps to trace.")] = 10,
    requests: Annotated[int, typer.Option(min=1, max=MOST_REQUESTS, help="Requests, one token each a step.")] = 64,
    context: Annotated[
        int, typer.Option(min=128, max=LONGEST_CONTEXT, help="Tokens of each request before the first step.")
    ] = 4096,
    model: Annotated[
        bool,
        typer.Option(
            "--model", help="Trace the whole model of `dsv4-jax bench --only model`: projections, experts and all."
        ),
    ] = False,
    logdir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Keep the profile here, for TensorBoard or XProf.")
    ] = None,
) -> None:
    """Run decode steps of a small stack (writes, indexer, attention; no projections) and print where the time went.

    On a GPU the steps run without CUDA graphs, so that every kernel can be told from the others; times are the
    kernels' own, not their launches'. On a CPU they are what the host spent in each op. The last lines are the shares
    of cache updates, the indexer's choice, attention, and everything else.
    """
    console = Console(width=None if sys.stdout.isatty() else 132)
    config = None
    try:
        if model:
            config = model_config(TINY if jax.default_backend() == "cpu" else FULL)
            schema = model_schema(config, requests, context + 2 * steps)
        else:
            schema = trace_schema(steps=steps, requests=requests, context=context)
    except SchemaError as error:
        raise typer.BadParameter(f"--context and --steps: {error}") from error
    except NoFigureError as error:
        raise typer.BadParameter(f"--model: {error}") from error
    require_memory(
        schema.memory_bytes,
        f"A cache of {requests:,} requests of {schema.max_context:,} tokens takes",
        "Fewer --requests or a shorter --context take less.",
    )
    if logdir is not None:
        writable_folder(logdir, "--logdir")
    with contextlib.nullcontext(logdir) if logdir else tempfile.TemporaryDirectory() as folder:
        if config is not None:
            spent = trace_model(Path(folder), config, schema, steps=steps, context=context)
        else:
            spent = trace_steps(Path(folder), steps=steps, requests=requests, context=context)
    print_table(console, _table(spent, steps))
    if logdir is not None:
        console.print(f"The profile is in {logdir}.", markup=False, highlight=False, soft_wrap=True)


def _table(spent: dict[Op, Spent], steps: int) -> Table:
    total = sum(one.microseconds for one in spent.values())
    table = Table(title=f"{steps} steps on {jax.devices()[0].device_kind}")
    for column in ("layer", "scope", "op"):
        table.add_column(column, no_wrap=True)
    for column in ("calls a step", "µs a call", "µs a step", "%"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("kernels")
    order = ["step", "swa", "csa", "hca", "model"]
    rows = sorted(spent.items(), key=lambda item: (order.index(item[0].kind), -item[1].microseconds))
    for index, (op, one) in enumerate(rows):
        if index and rows[index - 1][0].kind != op.kind:
            table.add_section()
        table.add_row(
            op.kind,
            op.scope,
            op.target,
            f"{one.calls / steps:.1f}",
            f"{one.microseconds / one.calls:.2f}",
            f"{one.microseconds / steps:.2f}",
            f"{100 * one.microseconds / total:.1f}",
            ", ".join(sorted(_short(name) for name in one.kernels)),
        )
    table.add_section()
    table.add_row("together", "", "", "", "", f"{total / steps:.2f}", "100.0", "")
    for name, microseconds in _shares(spent).items():
        table.add_row(name, "", "", "", "", f"{microseconds / steps:.2f}", f"{100 * microseconds / total:.1f}", "")
    return table


def _shares(spent: dict[Op, Spent]) -> dict[str, float]:
    """Microseconds of all layers' updates, choices and attention, and of everything else."""
    shares: dict[str, float] = dict.fromkeys((*PARTS, "everything else"), 0.0)
    for op, one in spent.items():
        shares[op.scope if op.scope in PARTS else "everything else"] += one.microseconds
    return shares


def _short(kernel: str) -> str:
    """A kernel's name without its parameters and template arguments."""
    name = kernel.replace("(anonymous namespace)::", "").split("(")[0].split("<")[0]
    return name.split("::")[-1].removeprefix("void ")
