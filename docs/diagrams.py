"""The pictures of the documentation, with the package's sizes; `python docs/diagrams.py` draws them again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from drawing import Colour, Drawing

import dsv4_jax as dsv4
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, VectorFormat
from dsv4_jax.spec.kinds import BLOCK_TOKENS, HEAD_DIM, KEY_DIM, entries_per_block

FOLDER = Path(__file__).parent / "pictures"
FLASH = dsv4.deepseek_v4_flash()
SCHEMA = dsv4.CacheSchema(FLASH, dsv4.CacheFormats(), slots=64, blocks=4096, max_context=65_536)
FIRST = {kind: FLASH.layer_kinds.index(kind) for kind in dsv4.LayerKind}
CSA, HCA = dsv4.LayerKind.CSA, dsv4.LayerKind.HCA
NAMES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float8_e4m3fn": "E4M3",
    "float8_e8m0fnu": "UE8M0",
    "float4_e2m1fn": "E2M1",
}


def _size(count: int) -> str:
    return f"{count:,} B"


def memory() -> Drawing:
    """What a slot and a block hold, and how the block table leads from one to the other."""
    picture = Drawing(760, 504, "What a request keeps in a slot, and what its blocks hold, in DeepSeek-V4-Flash")
    csa, hca = SCHEMA.layer(FIRST[CSA]), SCHEMA.layer(FIRST[HCA])
    counts = {kind: FLASH.count(kind) for kind in (CSA, HCA)}
    formats = SCHEMA.formats

    picture.text(20, 28, "A slot: one request", bold=True)
    picture.text(20, 46, "the same whatever its length", soft=True)
    slot: list[tuple[Colour, str, str, int]] = [
        (
            "window",
            f"window, {len(FLASH.layers)} layers",
            f"ring of {SCHEMA.ring} rows of {HEAD_DIM}, {formats.window}",
            csa.slot_bytes["window"],
        ),
        (
            "tails",
            f"CSA tail, {counts[CSA]} layers",
            f"kv and score, {csa.tail_rows} rows of {HEAD_DIM}, fp32",
            csa.slot_bytes["tail"],
        ),
        (
            "tails",
            f"its indexer's, {counts[CSA]} layers",
            f"kv and score, {csa.tail_rows} rows of {KEY_DIM}, fp32",
            csa.slot_bytes["key_tail"],
        ),
        (
            "tails",
            f"HCA tail, {counts[HCA]} layers",
            f"kv and score, {hca.tail_rows} rows of {HEAD_DIM}, fp32",
            hca.slot_bytes["tail"],
        ),
    ]
    for number, (colour, name, holds, size) in enumerate(slot):
        picture.box(20, 60 + 78 * number, 300, 66, colour, [name, holds, f"{_size(size)} a layer"])

    picture.text(20, 384, f"block_table of the slot, {SCHEMA.max_blocks} places", bold=True)
    cells = ["7", "2", "5", "-1", "-1", "…"]
    for number, cell in enumerate(cells):
        picture.box(20 + 50 * number, 412, 50, 30, "tables", [cell])
    of_place = f"tokens {BLOCK_TOKENS} i to {BLOCK_TOKENS} i + {BLOCK_TOKENS - 1}"
    picture.text(20, 474, f"place i names the block of {of_place}", soft=True)
    picture.text(20, 491, "-1: no block yet", soft=True)

    picture.text(410, 28, f"A block: {BLOCK_TOKENS} tokens of one request", bold=True)
    picture.text(410, 46, f"in all layers at once, {_size(SCHEMA.bytes_per_block)}", soft=True)
    picture.line((410, 60), (740, 60), (740, 342), (410, 342), (410, 60))
    picture.text(424, 80, f"block 7: tokens 0 to {BLOCK_TOKENS - 1}")
    inside: list[tuple[Colour, str, str, int]] = [
        (
            "entries",
            f"{csa.block_rows} CSA entries, {counts[CSA]} layers",
            f"a page of {csa.block_rows} rows of {HEAD_DIM}, {formats.entries}",
            csa.block_bytes["entries"],
        ),
        (
            "keys",
            f"{csa.block_rows} indexer keys, {counts[CSA]} layers",
            f"a page of {csa.block_rows} rows of {KEY_DIM}, {formats.keys}",
            csa.block_bytes["keys"],
        ),
        (
            "entries",
            f"{hca.block_rows} HCA entry, {counts[HCA]} layers",
            f"a page of {hca.block_rows} row of {HEAD_DIM}, {formats.entries}",
            hca.block_bytes["entries"],
        ),
    ]
    for number, (colour, name, holds, size) in enumerate(inside):
        picture.box(424, 90 + 82 * number, 302, 70, colour, [name, holds, f"{_size(size)} a layer"])
    picture.box(410, 364, 330, 40, "model", [f"block 2: tokens {BLOCK_TOKENS} to {2 * BLOCK_TOKENS - 1}"])
    picture.box(410, 420, 330, 40, "model", ["block 5: open, filled as tokens come"])
    picture.arrow((45, 412), (45, 394), (364, 394), (364, 200), (410, 200))
    picture.arrow((95, 412), (95, 403), (384, 403), (384, 384), (410, 384))
    picture.arrow((145, 442), (145, 453), (384, 453), (384, 440), (410, 440))
    return picture


def csa_layer() -> Drawing:
    """A token's way through a CSA layer: projections of the model, three calls, and what they write and read."""
    heads, index_heads, k = FLASH.num_heads, FLASH.index_num_heads, FLASH.index_topk
    ratio, formats = CSA.ratio, SCHEMA.formats
    compression = CSA.compression
    assert compression is not None
    picture = Drawing(772, 640, "A token's way through a CSA layer of DeepSeek-V4-Flash")
    for x, name in ((20, "your model"), (280, "the cache's calls"), (540, "stored")):
        picture.text(x, 28, name, bold=True)
    made = [
        (56, ["window row", f"[T, {HEAD_DIM}]"]),
        (116, ["kv, gate", f"[T, {compression.columns(HEAD_DIM)}] each"]),
        (176, ["indexer's kv, gate", f"[T, {compression.columns(KEY_DIM)}] each"]),
        (316, ["index queries", f"[T, {index_heads}, {KEY_DIM}]"]),
        (456, ["queries, rotated", f"[T, {heads}, {HEAD_DIM}]"]),
    ]
    for y, lines in made:
        picture.box(20, y, 200, 46, "model", lines, dashed=True)
    picture.text(20, 258, "all of it made of x, the layer's", soft=True)
    picture.text(20, 275, f"input, [T, {FLASH.hidden_size}]", soft=True)

    picture.box(280, 44, 200, 220, "tables")
    picture.text(380, 64, "update", anchor="middle", bold=True)
    for number, line in enumerate(
        (
            "row: RMSNorm, RoPE",
            f"each {ratio} tokens close a window:",
            f"softmax over {compression.pooled_rows} rows,",
            f"{ratio} of it, {ratio} of the one before",
            "RMSNorm, RoPE: an entry",
            "the same for a key",
            "all is rounded to its format",
        )
    ):
        picture.text(380, 92 + 23 * number, line, anchor="middle", soft=True)
    picture.box(
        280, 300, 200, 84, "tables", ["index_topk", "scores every key that", "the token may see,", f"gives {k} indices"]
    )
    picture.box(
        280,
        424,
        200,
        110,
        "tables",
        [
            "attend",
            f"{FLASH.window} window rows and",
            f"{k} entries: one softmax",
            "per head, with its sink",
            "output rotated back",
        ],
    )
    for y, _ in made[:3]:
        picture.arrow((220, y + 23), (280, y + 23))
    picture.arrow((220, 339), (280, 339))
    picture.arrow((220, 479), (280, 479))
    picture.arrow((380, 264), (380, 300))
    picture.arrow((380, 384), (380, 424))
    picture.arrow((380, 534), (380, 570))
    picture.box(
        280, 570, 200, 50, "model", [f"output [T, {heads}, {HEAD_DIM}]", "to the output projection"], dashed=True
    )

    rows = entries_per_block(ratio)
    stored: list[tuple[float, Colour, list[str]]] = [
        (44, "window", ["window", f"ring, {formats.window}"]),
        (104, "tails", ["tails", "what is still open, fp32"]),
        (164, "keys", ["keys", f"{rows} a block, {formats.keys}"]),
        (224, "entries", ["entries", f"{rows} a block, {formats.entries}"]),
    ]
    for y, colour, lines in stored:
        picture.box(540, y, 200, 46, colour, lines)
    for y in (67, 187, 240):
        picture.arrow((480, y), (540, y))
    picture.arrow((510, 127), (540, 127))
    picture.arrow((510, 127), (480, 127))
    picture.arrow((740, 187), (750, 187), (750, 342), (480, 342))
    picture.arrow((560, 270), (560, 460), (480, 460))
    picture.arrow((740, 67), (756, 67), (756, 500), (480, 500))
    picture.text(590, 360, "keys are read", soft=True, size=11)
    picture.text(574, 454, "chosen entries are read", soft=True, size=11)
    picture.text(590, 516, "the window is read", soft=True, size=11)
    return picture


def step() -> Drawing:
    """What host and device do in a step, and how the host runs ahead."""
    picture = Drawing(760, 300, "The timeline of a step: the host plans the next one while the device runs this one")
    picture.text(20, 76, "host", bold=True)
    picture.text(20, 186, "device", bold=True)
    host = [
        (90, 112, "plan step n"),
        (202, 84, "dispatch"),
        (310, 128, "plan step n + 1"),
        (438, 84, "dispatch"),
        (560, 128, "commit step n"),
    ]
    for x, width, name in host:
        picture.box(x, 54, width, 36, "tables", [name])
    first = FIRST[CSA]
    parts = [
        (260, 50, "begin"),
        (310, 66, f"0 to {first - 1}"),
        (376, 56, f"layer {first}"),
        (432, 26, "…"),
        (458, 62, f"layer {len(FLASH.layers) - 1}"),
        (520, 38, "end"),
    ]
    for x, width, name in parts:
        picture.box(x, 162, width, 36, "window", [name], size=12)
    picture.box(566, 162, 174, 36, "window", ["step n + 1, likewise"], size=12)
    picture.arrow((244, 90), (244, 126), (284, 126), (284, 162))
    picture.arrow((480, 90), (480, 126), (590, 126), (590, 162))
    picture.text(294, 130, "StepPlan: an int32 vector", soft=True)
    picture.line((376, 198), (376, 214))
    picture.line((432, 198), (432, 214))
    zoom: list[tuple[float, float, Colour, str]] = [
        (190, 150, "entries", "update"),
        (340, 130, "keys", "index_topk"),
        (470, 110, "window", "attend"),
    ]
    picture.line((376, 214), (190, 226), (190, 234))
    picture.line((432, 214), (580, 226), (580, 234))
    for x, width, colour, name in zoom:
        picture.box(x, 234, width, 34, colour, [name])
    picture.text(20, 28, "Time runs to the right; lengths mean nothing. The model is DeepSeek-V4-Flash.", soft=True)
    picture.text(
        20,
        290,
        "The cache is donated from step to step: step n + 1 is queued behind step n on the same arrays.",
        soft=True,
    )
    return picture


def _described(vector: VectorFormat) -> str:
    parts = [f"{run.count} {NAMES[run.dtype]}" for run in (*vector.data, *vector.scales)]
    return " + ".join(parts) + (f" + {vector.scale_padding} zero" if vector.scale_padding else "")


def rows() -> Drawing:
    """The bytes of one entry and of one key in every format, to scale."""
    tables: list[tuple[str, Mapping[str, VectorFormat]]] = [
        (f"An entry or window row, {HEAD_DIM} channels", ENTRY_FORMATS),
        (f"An indexer key, {KEY_DIM} channels", KEY_FORMATS),
    ]
    height = 50 + sum(34 + 46 * len(formats) for _, formats in tables)
    picture = Drawing(760, height, "Bytes of a row in every format, to scale")
    scale, left, y = 600 / ENTRY_FORMATS["fp32"].row_bytes, 110, 28
    for title, formats in tables:
        picture.text(20, y, title, bold=True)
        y += 12
        for name, vector in formats.items():
            picture.text(left - 8, y + 16, name, anchor="end")
            x = float(left)
            for run in (*vector.data, *vector.scales):
                role = "scales" if run.role in ("scales", "global_scale") else run.role
                picture.box(x, y, run.bytes * scale, 22, role)
                x += run.bytes * scale
            picture.text(left, y + 36, f"{vector.row_bytes:,} bytes: {_described(vector)}", soft=True, size=11)
            y += 46
        y += 22
    legend: list[tuple[float, Colour, str]] = [
        (left, "values", "stored as they are"),
        (left + 170, "codes", "codes"),
        (left + 260, "scales", "scales"),
    ]
    for x, colour, name in legend:
        picture.box(x, y - 14, 18, 14, colour)
        picture.text(x + 24, y - 2, name, soft=True)
    return picture


def pages() -> Drawing:
    """A page of 32 rows in the quantized formats: where the data and the scales of each row begin."""
    count = entries_per_block(CSA.ratio)
    shown = [
        *((f"{count} entries", vector) for vector in ENTRY_FORMATS.values() if vector.quantized),
        *((f"{count} keys", vector) for vector in KEY_FORMATS.values() if vector.name in ("fp8", "mxfp4")),
    ]
    picture = Drawing(
        760, 24 + 116 * len(shown), f"Pages of {count} rows: data of all rows, then scales of all rows, then zeros"
    )
    for number, (what, vector) in enumerate(shown):
        y = 28 + 116 * number
        page = math.prod(vector.page_shape(count))
        data, scale = vector.data_bytes, vector.scale_bytes
        picture.text(20, y, f"{vector.name}, {what}: {page:,} bytes", bold=True)
        last, begin, end = count - 1, data * count, (data + scale) * count
        strip: list[tuple[float, Colour, str, int | None]] = [
            (130, "codes", "data of row 0", 0),
            (130, "codes", "row 1", data),
            (40, "codes", "…", None),
            (100, "codes", f"row {last}", data * last),
            (100, "scales", "scales of 0", begin),
            (60, "scales", "1", begin + scale),
            (40, "scales", "…", None),
            (60, "scales", f"{last}", begin + scale * last),
        ]
        x = 20.0
        for width, colour, name, at in strip + [(60, "zeros", "zeros", end)] * (page > end):
            picture.box(x, y + 10, width, 32, colour, [name], size=12)
            if at is not None:
                picture.text(x, y + 56, f"{at:,}", soft=True, size=10.5)
            x += width
        picture.text(20, y + 74, f"a row: {_described(vector)}", soft=True, size=11)
    return picture


PICTURES: dict[str, Callable[[], Drawing]] = {
    "memory.svg": memory,
    "csa-layer.svg": csa_layer,
    "step.svg": step,
    "rows.svg": rows,
    "pages.svg": pages,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, draw in PICTURES.items():
        (FOLDER / file).write_text(draw().svg(), encoding="utf-8")
