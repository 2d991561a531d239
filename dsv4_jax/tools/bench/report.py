"""What a run found, as a table, as JSON, and as a picture."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from dsv4_jax.tools.bench.attended_step import PARTS
from dsv4_jax.tools.bench.mesh_step import MOST
from dsv4_jax.tools.bench.runner import Result, Run
from dsv4_jax.tools.cli.doctor import examine


def table(run: Run) -> Table:
    """One line a case."""
    made = Table(title=f"{jax.devices()[0].device_kind}, {run.scale.name} sizes")
    made.add_column("case", no_wrap=True)
    with_reference = any(result.reference for result in run.results)
    columns = ["µs", "±", "bytes", "GB/s", "% of copy", "% of matmul", "at most", "try for"]
    columns += ["jnp µs", "times"] * with_reference
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for result in (run.roofs.copy, run.roofs.read, run.roofs.matmul, *run.results):
        made.add_row(*_cells(result, run, with_reference))
    made.caption = (
        "bytes: the fewest that the op must move, read and written. copy: a device copy in the same run; for attend, "
        "index_topk, step/flash, life/drafts, mesh and model a device read. matmul: a product of bfloat16 matrices in "
        "the same run. step/, mesh/, model/, life/ and host/: what host and device take together, and the host alone."
    )
    return made


def _cells(result: Result, run: Run, with_reference: bool) -> list[str]:
    if result.timing is None:
        return [result.name, "no figure"]
    timing, target = result.timing, result.target
    rate, shares = result.bytes_per_second, (percent_of_memory(result, run), percent_of_matmul(result, run))
    cells = [result.name, _number(timing.microseconds), _number(timing.spread)]
    cells.append("" if result.bytes_moved is None else f"{result.bytes_moved:,}")
    cells += ["" if rate is None else f"{rate / 1e9:,.0f}"]
    cells += ["" if share is None else f"{share:.1f}" for share in shares]
    if target is None:
        cells += ["", ""]
    else:
        style = "green" if timing.microseconds <= target.at_most else "red"
        cells += [f"[{style}]{_number(target.at_most)}[/]", _number(target.try_for)]
    if with_reference and result.reference is not None:
        ratio = result.reference.microseconds / timing.microseconds if timing.microseconds > 0 else float("nan")
        cells += [_number(result.reference.microseconds), f"{ratio:,.1f}"]
    return cells


def model_table(run: Run) -> Table | None:
    """The cases of a whole model in the terms of who serves it; None if there are none."""
    made = Table(title="Whole model, random weights")
    made.add_column("case", no_wrap=True)
    columns = ["tokens/s", "ms a step", "layers", "experts, of which", "chosen", "weights GB", "cache GB"]
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for result in run.results:
        if result.timing is not None and "tokens_per_second" in result.remarks:
            found = result.remarks
            made.add_row(
                result.name,
                _number(found["tokens_per_second"]),
                f"{result.timing.microseconds / 1e3:.2f}",
                str(found["layers"]),
                str(found["experts"]),
                str(found["experts_chosen"]),
                f"{found['weight_bytes'] / 1e9:.1f}",
                f"{found['cache_bytes'] / 1e9:.1f}",
            )
    return made if made.rows else None


def mesh_table(run: Run) -> Table | None:
    """The cases of several devices beside one device; None if there are none."""
    made = Table("case", title="Steps on several devices, shards x devices that share one, beside one device alone: µs")
    parts = [f"{part}: all, one" for part in PARTS]
    for column in ["on all", "on one", "times as long", "at most", *parts]:
        made.add_column(column, justify="right", no_wrap=True)
    for result in run.results:
        if result.timing is not None and "one_device_microseconds" in result.remarks:
            found = result.remarks
            times, one = found["times_one_device"], found["one_device_microseconds"]
            shares = [[found.get(f"{at}{part}_microseconds") for at in ("", "one_device_")] for part in PARTS]
            made.add_row(
                result.name,
                _number(result.timing.microseconds),
                _number(one),
                "" if times is None else f"{times:.3f}",
                f"{MOST:.2f}" if found["devices_a_shard"] == 1 else "",
                *(", ".join("-" if time is None else _number(time) for time in share) for share in shares),
            )
    return made if made.rows else None


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def percent_of_memory(result: Result, run: Run) -> float | None:
    """The rate of a result as a percentage of that of the device copy, or of the device read if it reads."""
    roof = run.roofs.read if result.reads else run.roofs.copy
    rate, most = result.bytes_per_second, roof.bytes_per_second
    return None if rate is None or most is None else 100 * rate / most


def percent_of_matmul(result: Result, run: Run) -> float | None:
    """The operations of a result in its time, as a percentage of what the matrix product makes."""
    rate, most = result.operations_per_second, run.roofs.matmul.operations_per_second
    return None if rate is None or most is None else 100 * rate / most


def machine() -> dict[str, Any]:
    """The device, and the versions that figures depend on."""
    facts = examine()
    driver = Path("/proc/driver/nvidia/version")
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "versions": {name: version for name, version in facts.versions.items() if version},
        "python": platform.python_version(),
        "driver": driver.read_text().splitlines()[0].strip() if driver.exists() else None,
        "driver_cuda": facts.driver_cuda,
        "built_with_cuda": facts.cuda_built or None,
        "cpu_cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def as_json(run: Run, command: str) -> dict[str, Any]:
    """A run as plain data: the machine, the command, the sizes, what cases are compared with, and every case."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        **machine(),
        "command": command,
        "date": now.isoformat(timespec="seconds"),
        "scale": dataclasses.asdict(run.scale),
        **{name: _case_json(getattr(run.roofs, name), run) for name in ("copy", "read", "matmul", "floor")},
        "cases": [_case_json(result, run) for result in run.results],
    }


def _case_json(result: Result, run: Run) -> dict[str, Any]:
    made: dict[str, Any] = {"name": result.name}
    if result.timing is None:
        return made | {"error": result.error}
    timing, rate, share = result.timing, result.bytes_per_second, percent_of_memory(result, run)
    of_matmul = percent_of_matmul(result, run)
    made |= {
        "microseconds": round(timing.microseconds, 4),
        "spread": round(timing.spread, 4),
        "bytes": result.bytes_moved,
        "gigabytes_per_second": None if rate is None else round(rate / 1e9, 2),
        "percent_of_read" if result.reads else "percent_of_copy": None if share is None else round(share, 2),
        "calls": timing.calls,
        "host_share": round(timing.host_share, 3),
        "evictions": timing.evictions,
        "compile_seconds": round(timing.compile_seconds, 3),
    }
    if result.operations:
        made |= {
            "operations": result.operations,
            "percent_of_matmul": None if of_matmul is None else round(of_matmul, 2),
        }
    if result.target is not None:
        made |= {"at_most": round(result.target.at_most, 4), "try_for": round(result.target.try_for, 4)}
    if result.reference is not None:
        made["reference_microseconds"] = round(result.reference.microseconds, 4)
    return made | result.remarks


def write_json(run: Run, command: str, path: Path) -> None:
    """Writes ``as_json``."""
    path.write_text(json.dumps(as_json(run, command), indent=1) + "\n")


def draw(run: Run, path: Path) -> None:
    """Draws every case by its bytes and its rate, under the two roofs: the copy's speed, and the smallest call's time.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[tuple[int, float, str]]] = {}
    for result in run.results:
        if result.bytes_per_second is not None and result.bytes_moved is not None:
            point = (result.bytes_moved, result.bytes_per_second / 1e9, result.name)
            groups.setdefault("/".join(result.name.split("/")[:2]), []).append(point)
    markers = "osD^v<>ph*XPd"
    for index, (group, points) in enumerate(sorted(groups.items())):
        x, y, _ = zip(*points, strict=True)
        axes.loglog(x, y, markers[index % len(markers)], label=group, alpha=0.8)
    copy = run.roofs.copy.bytes_per_second
    xs = [point[0] for points in groups.values() for point in points]
    if xs and copy is not None:
        ends = [min(xs) / 2, max(xs) * 2]
        axes.loglog(ends, [copy / 1e9] * 2, "k-", linewidth=1)
        axes.annotate("device copy", (ends[0], copy / 1e9), va="bottom")
        floor = run.roofs.floor.timing.microseconds if run.roofs.floor.timing else 0
        last = min(ends[1], copy * floor / 1e6)
        if last > ends[0]:
            axes.loglog([ends[0], last], [x / floor / 1e3 for x in (ends[0], last)], "k--", linewidth=1)
            axes.annotate(f"smallest call, {floor:.2f} µs", (ends[0], ends[0] / floor / 1e3), va="bottom")
        figure.legend(loc="outside right upper", fontsize="small")
    axes.set_xlabel("bytes that the op must move")
    axes.set_ylabel("GB/s")
    axes.set_title(f"{jax.devices()[0].device_kind}: rate of every op, {run.scale.name} sizes")
    axes.grid(True, which="major", alpha=0.3)
    figure.savefig(path, dpi=150)
