"""Kinds of layers are data: what derives from the table, and that a kind that is not in it needs no code."""

import dataclasses
import enum

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import CacheFormats, CacheSchema, LayerKind, tiny_spec
from dsv4_jax.layout.geometry import TailGeometry
from dsv4_jax.spec.kinds import BLOCK_TOKENS, COMPRESSIONS, Compression, compression_of_ratio
from dsv4_jax.spec.model import LayerSpec

CSA, HCA = LayerKind.CSA.compression, LayerKind.HCA.compression
PAIRS = Compression(ratio=2, position_bias=False)
"""No kind of the table: entries of two tokens without overlap."""


class MadeUpKind(enum.Enum):
    PAIRS = "pairs"

    compression = property(lambda self: PAIRS)
    ratio = property(lambda self: PAIRS.ratio)


def test_what_the_table_says():
    assert LayerKind.SWA.compression is None
    assert COMPRESSIONS == {"csa": CSA, "hca": HCA}
    assert [(kind.ratio, kind.pooled_rows, kind.columns(512)) for kind in (CSA, HCA)] == [(4, 8, 1024), (128, 128, 512)]
    assert BLOCK_TOKENS == 128
    assert compression_of_ratio(128) is HCA
    with pytest.raises(ValueError, match=r"ratio is 2, expected 4 \(CSA\) or 128 \(HCA\)"):
        compression_of_ratio(2)


def test_kernels_have_the_same_table():
    native = pytest.importorskip("dsv4_jax_native")
    rows = {name: (*dataclasses.astuple(kind), TailGeometry(kind).rows) for name, kind in COMPRESSIONS.items()}
    assert native.kinds() == rows


def test_a_made_up_kind_gets_its_arrays_from_its_row():
    spec = tiny_spec()
    layers = (*spec.layers[:2], *[LayerSpec(MadeUpKind.PAIRS, spec.layers[1].rope)] * 3)  # SWA, CSA, three of pairs
    schema = CacheSchema(dataclasses.replace(spec, layers=layers), CacheFormats("bf16"), 2, 5, 300, lookahead=7)
    shapes = {name: array.shape for name, array in schema.arrays.items()}
    assert shapes["pairs_entries"] == (3, 5, 64, 512)
    assert shapes["pairs_tail"] == (3, 2, 2, 2 + 7, 512)
    assert shapes["csa_tail"] == (1, 2, 2, 12 + 2 * 8, 512)
    assert schema.pools == ("pairs_entries", "csa_entries", "csa_keys", "pairs_tail", "csa_tail", "csa_key_tail")
    assert [schema.rows(layer) for layer in range(5)] == [(0, None), (1, 0), (2, 0), (3, 1), (4, 2)]
    assert schema.memory_bytes == 2 * schema.bytes_per_slot + 5 * schema.bytes_per_block


@pytest.mark.parametrize("compression", [CSA, HCA, PAIRS], ids=["csa", "hca", "pairs"])
@pytest.mark.parametrize("lookahead", [0, 1, 2, 3, 4, 5, 8, 16, 130])
def test_rings_hold_what_any_earlier_length_needs(compression, lookahead):
    """Nothing that a length within the lookahead still needs shares a row with a later token, or is given up."""
    geometry, ratio = TailGeometry.of_lookahead(compression, lookahead), compression.ratio
    assert geometry.depth >= lookahead
    positions = np.arange(3 * 128 + 2 * 130 + 9)  # the same for all, so that equal shapes are compiled once
    lengths = jnp.asarray(positions + 1)
    used = np.asarray(geometry.rows_in_use(lengths))
    assert used.shape == (len(positions), geometry.rows)
    halves = [(0, geometry.current_row, geometry.current_survives)]
    if compression.overlap:
        halves.append((1, geometry.overlap_row, geometry.overlap_survives))
    for before, row_of, survives in halves:
        rows = np.asarray(row_of(positions))
        kept = np.asarray(survives(positions[None], lengths[:, None]))
        for index, length in enumerate(positions + 1):
            earliest = max(length - lookahead, 0)
            needed = range(max(earliest // ratio - before, 0) * ratio, length)
            assert len(set(rows[needed])) == len(needed)
            assert kept[index, needed].all()
            assert used[index, rows[needed]].all()
    if lookahead == 0:  # and no row more
        for length, count in zip(positions + 1, used.sum(axis=1), strict=True):
            window = length // ratio
            previous = min(window, 1) * ratio + length % ratio if compression.overlap else 0
            assert count == length % ratio + previous


def test_depth_follows_from_the_number_of_rows():
    for lookahead in range(40):
        for compression in (CSA, HCA):
            geometry = TailGeometry.of_lookahead(compression, lookahead)
            assert TailGeometry.of_rows(compression.ratio, geometry.rows) == geometry
    for ratio, rows in ((4, 11), (4, 13), (4, 16), (4, 4), (128, 127), (128, 0)):
        with pytest.raises(ValueError, match=f"{rows} rows are those of no depth"):
            TailGeometry.of_rows(ratio, rows)
