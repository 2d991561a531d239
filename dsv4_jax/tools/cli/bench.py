"""`dsv4-jax bench`: what every op and the whole decode step take, beside a device copy."""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console

from dsv4_jax.tools.bench.cases import all_cases
from dsv4_jax.tools.bench.report import draw, mesh_table, model_table, table, write_json
from dsv4_jax.tools.bench.runner import Result, run_cases
from dsv4_jax.tools.bench.workload import FULL, TINY
from dsv4_jax.tools.cli._output import print_table, writable_file, writable_picture


def bench(
    only: Annotated[str | None, typer.Option(help="Only cases whose name this regular expression finds.")] = None,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Write machine and results here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the roofline here (PNG, SVG or PDF), or as bench.png in this folder.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the main cases.")] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Time the plain jnp definition too.")] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Sizes that say nothing about speed; the default without a GPU.")
    ] = False,
    names: Annotated[bool, typer.Option("--list", help="List the cases and leave.")] = False,
) -> None:
    """Measure every op and the whole decode step on this device, and compare with a device copy.

    The time of an op is the difference of two programs, one of which makes twice as many calls, divided by the number
    of calls; on a GPU each program is a CUDA graph. What the host was too slow to measure, or what came out faster than
    a copy (or, where an op reads, a read) of the same bytes, a matrix product of as many operations, or the smallest
    call, has no figure. Memory: about 40 GB on a GPU; `model/…` takes as many experts of DeepSeek-V4-Flash as fit into
    what is there. `mesh/…` takes all devices, where there are several. Exits with 1 if a case failed or has no figure.
    """
    # Piped into a file, rich would assume 80 columns, too few for the table.
    console = Console(width=None if sys.stdout.isatty() else 132)
    scale = TINY if tiny or jax.default_backend() == "cpu" else FULL
    try:
        pattern = re.compile(only or "")
    except re.error as error:
        raise typer.BadParameter(f"{only!r} is no regular expression: {error}", param_hint="--only") from error
    cases = [case for case in all_cases(scale) if pattern.search(case.name) and (case.quick or not quick)]
    if not cases:
        raise typer.BadParameter(f"no case matches {only!r}; --list shows their names", param_hint="--only")
    if names:
        for case in cases:
            console.print(case.name, highlight=False)
        return
    picture = None if plot is None else writable_picture(plot, "bench")
    if json is not None:
        writable_file(json, "--json")

    def found(result: Result) -> None:
        if not console.is_terminal and result.timing is not None:  # a log keeps what an interrupted run has found
            print(f"{result.name}: {result.timing.microseconds:.2f} µs", flush=True)

    begin = time.perf_counter()
    with console.status("copy") as status:
        run = run_cases(cases, scale, reference=reference, progress=status.update, found=found)
    print_table(console, table(run))
    for more in (model_table(run), mesh_table(run)):
        if more is not None:
            print_table(console, more)
    for result in run.results:
        if result.error:
            console.print(f"{result.name}: {result.error}", style="red", markup=False, highlight=False)
    console.print(f"{len(run.results)} cases in {time.perf_counter() - begin:.0f} s", highlight=False)
    if json is not None:
        write_json(run, shlex.join(["dsv4-jax", *sys.argv[1:]]), json)
    if picture is not None:
        draw(run, picture)
        console.print(f"Drawn in {picture}.", markup=False, highlight=False, soft_wrap=True)
    if any(result.error for result in run.results):
        raise typer.Exit(1)
