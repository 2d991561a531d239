"""What the benchmark counts for `attend`, `index_topk` and the step of all layers, and what it gives them to read."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import LayerKind, ops, tiny_spec
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS
from dsv4_jax.tools.bench import attention, traffic
from dsv4_jax.tools.bench.attended_step import step_traffic
from dsv4_jax.tools.bench.decode import update_bytes
from dsv4_jax.tools.bench.stored import filled_pool, filled_window
from dsv4_jax.tools.bench.traffic import StepShape
from dsv4_jax.tools.bench.workload import TINY, block_table, schema_of

SWA, CSA, HCA = LayerKind
FP8_ROW, FP8_KEY, NVFP4_KEY = 448 + 2 * 64 + 4, 128 + 4, 64 + 8 + 4


def random_shape(rng):
    starts, counts = rng.integers(0, 300, 4), rng.integers(1, 60, 4)
    starts[0] = 0
    return StepShape(starts, counts)


def test_rows_that_a_step_sees(rng):
    """Counted token by token, as sets of (request, row)."""
    shape, count = random_shape(rng), 9
    indices = rng.integers(-2, 80, (shape.tokens, count)).astype(np.int32)
    windows, chosen, everything = [], [], []
    token = 0
    for request, (start, end) in enumerate(zip(shape.starts.tolist(), shape.ends.tolist(), strict=True)):
        for position in range(start, end):
            visible = (position + 1) // 4
            windows += [(request, row) for row in range(max(position - 127, 0), position + 1)]
            chosen += [(request, entry) for entry in indices[token].tolist() if 0 <= entry < visible]
            everything += [(request, entry) for entry in range(min(visible, count))]
            token += 1
    for seen, rows in [
        (traffic.window_seen(shape, 128), windows),
        (traffic.chosen_seen(shape, 4, indices), chosen),
        (traffic.all_seen(shape, 4, count), everything),
    ]:
        assert (seen.looks, seen.rows) == (len(rows), len(set(rows)))


def test_choices_are_as_index_topk_gives_them(rng):
    shape, count = random_shape(rng), 20
    chosen = attention.choices(rng, shape, 4, count)
    assert chosen.shape == (shape.tokens, count)
    for entries, visible in zip(chosen, np.concatenate(shape.visible(4)), strict=True):
        real = entries[entries >= 0]
        assert len(real) == min(count, visible)
        assert (np.diff(real) > 0).all()
        assert (real < visible).all()
        assert (entries[len(real) :] == -1).all()
    spread = attention.choices(rng, attention.decode_shape(64, 4096), 4, 64)
    assert spread.min() < 100
    assert spread.max() > 924
    assert len(np.unique(spread, axis=0)) == 64


def test_bytes_and_operations_of_attention_in_words():
    """Two tokens of a request in HCA, at positions 254 and 255, of which only the second sees the second entry."""
    shape = attention.decode_shape(1, 256, 2)
    made = attention.attend(HCA, attention.ATTENDED["fp8"], 8, shape, TINY, "native", slots=1, lookahead=2)
    window, entries = 129 * (FP8_ROW + 4), 2 * FP8_ROW
    queries_output_lse = 2 * 8 * (512 * 2 + 512 * 2 + 4)
    assert made.bytes_moved == window + entries + queries_output_lse
    assert made.operations == 8 * (2 * 128 + 1 + 2) * (2 * 512 + 2 * 512)


def test_bytes_and_operations_of_chosen_entries(rng):
    made = attention.attend(
        CSA, attention.ATTENDED["default"], 2, attention.decode_shape(3, 512), TINY, "native", slots=3, chosen=8
    )
    assert made.bytes_moved == 3 * (128 * (1024 + 4) + 8 * (FP8_ROW + 4) + 2 * (1024 + 1024 + 4))
    assert made.operations == 3 * 2 * (128 + 8) * 2048


@pytest.mark.parametrize(("keys", "row", "share"), [("fp8", FP8_KEY, 2), ("mxfp4", 68, 2), ("nvfp4", NVFP4_KEY, 1)])
def test_bytes_and_operations_of_index_topk(keys, row, share):
    shape = attention.decode_shape(3, 64)
    made = attention.index_topk(attention.KEYS[keys], 8, 10, shape, 3, TINY, "native")
    assert made.bytes_moved == 3 * (16 * row + 8 * (128 * 2 + 4) + 10 * 4)
    assert made.operations == 3 * 16 * 8 * 128 * 2 // share
    everything = attention.index_topk(attention.KEYS[keys], 8, 16, shape, 3, TINY, "native")
    assert (everything.bytes_moved, everything.operations) == (3 * 16 * 4, 0)  # nothing is scored


def test_only_tokens_that_must_choose_score(rng):
    """Of a chunk that begins at 0 with k = 5, tokens from position 23 on see 6 entries and more."""
    shape, format = attention.chunk_shape(30, 0), KEY_FORMATS["nvfp4"]
    assert traffic.index_operations(shape, 4, format, 1, 5) == 2 * 128 * (4 * 6 + 3 * 7)
    assert traffic.index_topk(shape, 4, format, 1, 5, 2) == 7 * NVFP4_KEY + 7 * (256 + 4) + 30 * 5 * 4


def test_traffic_of_a_step_is_that_of_its_layers():
    """The tiny model: an SWA, an HCA and two CSA layers, 2 heads; 4 index heads choose 32."""
    schema, shape = schema_of(tiny_spec(), 2, 640), attention.decode_shape(2, 512)
    moved, operations = step_traffic(schema, shape)
    written = sum(update_bytes(kind, shape, schema, 4) for kind in (SWA, CSA, CSA, HCA))
    rows = 4 * 128 + 2 * 32 + 512 // 128
    of_attention = 4 * 128 * 4 + rows * FP8_ROW + 2 * 32 * 4 + 4 * 2 * (1024 + 1024 + 4)
    of_indexer = 2 * (128 * NVFP4_KEY + 4 * (256 + 4) + 32 * 4)
    assert moved == written + 2 * (of_attention + of_indexer)
    assert operations == 2 * (rows * 2 * 2048 + 2 * 128 * 4 * 256)


@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        (CSA, attention.decode_shape(2, 512), {"chosen": 8}),
        (CSA, attention.decode_shape(2, 512, 4), {"chosen": 8, "lookahead": 4}),
        (CSA, attention.chunk_shape(16, 256), {"chosen": 8}),
        (HCA, attention.decode_shape(1, 1024), {}),
    ],
    ids=["decode", "drafts", "chunk", "hca"],
)
def test_attention_sees_what_is_counted(kind, shape, options, monkeypatch):
    """Queries of zeros weigh all rows alike, so that lse tells how many a token sees."""
    heads, attended = 2, []
    made = attention.attend(kind, attention.ATTENDED["fp8"], heads, shape, TINY, "native", slots=2, **options)
    name = "attend_entries" if kind is CSA else "attend_all_entries"
    op = getattr(attention.ops, name)

    def recorded(*args, **kwargs):
        attended.append(op(*args, **kwargs)[-1])
        return *args[:2], attended[-1]

    monkeypatch.setattr(attention.ops, name, recorded)
    table, queries, _, *rest = made.operands[0]
    for layer in range(made.layers):
        made.call(made.state(), made.gates[0], (table, jnp.zeros_like(queries), None, *rest), layer)
    for result in attended:
        looks = np.exp(np.asarray(result.lse, np.float64)).sum()
        assert made.operations == 2 * 2 * 512 * round(looks)


@pytest.mark.parametrize("format", [KEY_FORMATS["fp8"], KEY_FORMATS["bf16"], ENTRY_FORMATS["fp8_ds_mla"]])
def test_filled_pools_hold_normal_numbers_and_no_page_twice_in_a_request(format):
    table = block_table(3, 40)
    pool = np.asarray(filled_pool(format, 4, 2, table))
    assert pool.shape == (2, 120, *format.page_shape(4))
    for pages in (layer[slot] for layer in pool for slot in table):
        assert len({page.tobytes() for page in pages}) == 40
        rows = np.stack([ops.dequantize(page, format=format, rows=4) for page in pages])
        assert abs(rows.mean()) < 0.05
        assert abs(rows.std() - 1) < 0.05
        assert 2.8 < np.abs(rows).max() < 6
    window = np.asarray(filled_window(format, 3, 2, 5))
    assert window.shape == (2, 5, *format.page_shape(3))
    assert len({page.tobytes() for page in window[0]}) == 5
