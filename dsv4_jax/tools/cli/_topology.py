"""What lies between the GPUs of a machine, as ``nvidia-smi topo -m`` has it."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Mapping

_SECONDS = 20  # a machine with eight GPUs takes a few if its driver does not stay loaded

_WAYS = {
    "PIX": "one PCIe bridge",
    "PXB": "several PCIe bridges",
    "PHB": "a PCIe host bridge",
    "NODE": "PCIe host bridges of one NUMA node",
    "SYS": "PCIe and the link between NUMA nodes",
}


def gpu_links() -> tuple[str, ...]:
    """A line for each way in which GPUs are joined; none where there are not several, or nobody says."""
    try:
        said = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    return describe(parse(said.stdout)) if said.returncode == 0 else ()


def parse(text: str) -> dict[tuple[int, int], str]:
    """What is between two GPUs, by their numbers in ascending order: ``NV18``, ``PIX``, …; empty if nothing is said.

    Args:
      text: of ``nvidia-smi topo -m``: a line of names, then one of each GPU, then others.
    """
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)  # the names are underlined
    columns: list[str] = []
    links = {}
    for line in plain.splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if not columns:
            columns = cells if "GPU0" in cells else []
        elif re.fullmatch(r"GPU\d+", cells[0]):
            first = int(cells[0][3:])
            for name, way in zip(columns[1:], cells[1:], strict=False):
                if re.fullmatch(r"GPU\d+", name) and (second := int(name[3:])) > first:
                    links[first, second] = way
    return links


def describe(links: Mapping[tuple[int, int], str]) -> tuple[str, ...]:
    """A line for each way in which GPUs are joined, most pairs first, such as ``18 NVLinks (NV18): 0-1, 0-2, 1-2``."""
    pairs: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for pair, way in sorted(links.items()):
        pairs[way].append(pair)
    lines = []
    for way, joined in sorted(pairs.items(), key=lambda item: -len(item[1])):
        nvlinks = re.fullmatch(r"NV(\d+)", way)
        name = f"{nvlinks[1]} NVLink{'s' * (nvlinks[1] != '1')}" if nvlinks else _WAYS.get(way, "unknown")
        which = "all pairs" if len(joined) == len(links) > 1 else ", ".join(f"{a}-{b}" for a, b in joined)
        lines.append(f"{name} ({way}): {which}")
    return tuple(lines)
