"""Shapes and bytes of a cache against the byte counts of the storage formats, worked out by hand."""

import copy
import dataclasses
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.layout.formats import PROFILES, CacheFormats
from dsv4_jax.layout.layer_schema import LayerCacheSchema
from dsv4_jax.layout.schema import CacheSchema, SchemaError, compute_block_budget
from dsv4_jax.spec.kinds import LayerKind
from dsv4_jax.spec.presets import deepseek_v4_flash, deepseek_v4_pro, tiny_spec

SWA, CSA, HCA = LayerKind.SWA, LayerKind.CSA, LayerKind.HCA
BF16 = PROFILES["bf16"]
KIB, MIB, GIB = 2**10, 2**20, 2**30
SPECS = {"flash": deepseek_v4_flash(), "pro": deepseek_v4_pro(), "tiny": tiny_spec()}


def windows_only():
    spec = tiny_spec()
    return dataclasses.replace(spec, layers=spec.layers[:1] * 3)


PUBLISHED = (
    ("bf16", "bf16", 40960, 1024, 6.72, 9.62),
    ("fp8_ds_mla", "fp8", 23232, 1152, 3.90, 5.59),
    ("fp8_ds_mla", "mxfp4", 21184, 1152, 3.57, 5.12),
    ("nvfp4_static", "mxfp4", 11392, 288, 1.87, 2.68),
)
"""Formats of entries and keys, bytes of a CSA and an HCA block, GiB of a million tokens in Flash and in Pro."""


@pytest.mark.parametrize(
    ("entries", "indexer", "csa", "hca", "flash_gib", "pro_gib"),
    [
        *PUBLISHED,
        ("fp32", "fp32", 32 * (2048 + 512), 2048, None, None),
        ("fp8", "nvfp4", 32 * (580 + 76), 592, None, None),
    ],
)
def test_bytes_of_a_block_and_of_a_million_tokens(entries, indexer, csa, hca, flash_gib, pro_gib):
    formats = CacheFormats(entries, "bf16", indexer)
    assert sum(LayerCacheSchema(CSA, formats, 128).block_bytes.values()) == csa
    assert LayerCacheSchema(HCA, formats, 128).block_bytes == {"entries": hca}
    assert LayerCacheSchema(SWA, formats, 128).block_bytes == {}
    for name, gib in (("flash", flash_gib), ("pro", pro_gib)):
        schema = CacheSchema(SPECS[name], formats, 1, 8192, 2**20)
        sizes = schema.bytes_by_component
        pools = sum(sizes[component] for component in ("csa_entries", "csa_keys", "hca_entries"))
        assert pools == 8192 * schema.bytes_per_block == 2**20 * schema.bytes_per_token
        if gib is not None:
            assert round(pools / GIB, 2) == gib


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(("window", "flash_mib", "pro_mib"), [("bf16", 5.38, 7.63), ("fp8", 3.04, 4.32)])
def test_bytes_of_the_window(window, flash_mib, pro_mib, slots):
    formats = CacheFormats("bf16", window, "bf16")
    for name, mib in (("flash", flash_mib), ("pro", pro_mib)):
        sizes = CacheSchema(SPECS[name], formats, slots, 1, 128).bytes_by_component
        # 5.375 and 7.625 MiB exactly: the table rounds halves up, which Python's round does not.
        assert sizes["window"] / slots / MIB == pytest.approx(mib, abs=0.0051)
        assert sizes["window_positions"] == len(SPECS[name].layers) * slots * 128 * 4


def test_tail_keeps_an_open_window_and_for_csa_the_previous_one():
    csa = LayerCacheSchema(CSA, BF16, 128).slot_bytes
    open_window, previous_window = 4 * 2, 4
    for component, width in (("tail", 512), ("key_tail", 128)):
        assert csa[component] == 2 * 4 * (open_window + previous_window) * width
    assert csa["tail"] + csa["key_tail"] == 60 * KIB
    hca = LayerCacheSchema(HCA, BF16, 128).slot_bytes
    assert hca["tail"] == 512 * KIB
    assert hca.keys() == {"window", "window_positions", "tail"}
    running = LayerCacheSchema(HCA, CacheFormats("bf16", "bf16", "bf16", hca_tail="running"), 128)
    assert running.slot_bytes["tail"] == 6 * KIB
    assert running.tail_rows == 0
    assert LayerCacheSchema(SWA, BF16, 128).slot_bytes == {"window": 128 * 1024, "window_positions": 512}


def test_rows_of_a_block_and_of_a_tail():
    layers = [LayerCacheSchema(kind, BF16, 128) for kind in (SWA, CSA, HCA)]
    assert [layer.block_rows for layer in layers] == [0, 32, 1]
    assert [layer.tail_rows for layer in layers] == [0, 12, 128]


@pytest.mark.parametrize(("lookahead", "csa_rows"), [(0, 12), (1, 20), (4, 20), (7, 28)])
def test_shapes_of_a_cache(lookahead, csa_rows):
    schema = CacheSchema(tiny_spec(), CacheFormats("fp8", "fp8_ds_mla", "nvfp4"), 3, 50, 1000, lookahead)
    ring = 128 + lookahead
    window_page = -(-584 * ring // 576) * 576
    assert {name: (array.shape, array.dtype) for name, array in schema.arrays.items()} == {
        "block_table": ((3, 8), jnp.int32),
        "write_table": ((3, 8), jnp.int32),
        "window": ((4, 3, window_page), jnp.uint8),
        "window_positions": ((4, 3, ring), jnp.int32),
        "csa_entries": ((2, 50, 32 * 580), jnp.uint8),
        "csa_keys": ((2, 50, 32 * 76), jnp.uint8),
        "hca_entries": ((1, 50, 592), jnp.uint8),
        "csa_tail": ((2, 3, 2, csa_rows, 512), jnp.float32),
        "csa_key_tail": ((2, 3, 2, csa_rows, 128), jnp.float32),
        "hca_tail": ((1, 3, 2, 128 + lookahead, 512), jnp.float32),
    }


def test_unquantized_pages_have_rows():
    arrays = CacheSchema(tiny_spec(), CacheFormats("fp32", "bf16", "bf16"), 3, 50, 1000).arrays
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    assert shapes["window"] == ((4, 3, 128, 512), jnp.bfloat16)
    assert shapes["csa_entries"] == ((2, 50, 32, 512), jnp.float32)
    assert shapes["csa_keys"] == ((2, 50, 32, 128), jnp.bfloat16)
    assert shapes["hca_entries"] == ((1, 50, 1, 512), jnp.float32)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", SPECS)
def test_layers_and_stacked_arrays_add_up_to_the_same_bytes(profile, name, rng):
    slots, blocks, lookahead, snapshots = (int(number) for number in rng.integers(1, 300, 4))
    context = int(rng.integers(1, 2**20))
    schema = CacheSchema(SPECS[name], PROFILES[profile], slots, blocks, context, lookahead, snapshots)
    of_slots = slots * schema.bytes_per_slot + snapshots * schema.bytes_per_snapshot
    assert schema.memory_bytes == of_slots + blocks * schema.bytes_per_block
    for layer, layer_spec in enumerate(SPECS[name].layers):
        assert schema.layer(layer) == LayerCacheSchema(layer_spec.kind, PROFILES[profile], 128, lookahead)


@pytest.mark.parametrize(("context", "blocks"), [(1, 1), (128, 1), (129, 2), (2**20, 8192)])
def test_block_table_is_as_wide_as_the_longest_context(context, blocks):
    schema = CacheSchema(tiny_spec(), BF16, 2, 4, context)
    assert schema.max_blocks == blocks
    assert schema.arrays["block_table"].shape == (2, blocks)


def test_model_of_windows_only_has_no_blocks():
    schema = CacheSchema(windows_only(), BF16, 2, 0, 300)
    assert schema.bytes_per_block == schema.bytes_per_token == 0
    assert schema.memory_bytes == 2 * (3 * 128 * (1024 + 4) + 2 * 3 * 4)
    assert compute_block_budget(MIB, windows_only(), BF16, slots=2, max_context=300) == 0


@pytest.mark.parametrize("name", SPECS)
def test_budget_is_the_largest_that_fits(name, rng):
    formats = list(PROFILES.values())[rng.integers(len(PROFILES))]
    slots, context, lookahead = int(rng.integers(1, 9)), int(rng.integers(1, 2**20)), int(rng.integers(0, 9))
    snapshots = int(rng.choice([0, 5]))

    def memory(blocks):
        return CacheSchema(SPECS[name], formats, slots, blocks, context, lookahead, snapshots).memory_bytes

    def budget(memory_bytes):
        return compute_block_budget(
            memory_bytes,
            SPECS[name],
            formats,
            slots=slots,
            max_context=context,
            lookahead=lookahead,
            snapshots=snapshots,
        )

    available = memory(1) + int(rng.integers(0, 10 * GIB))
    blocks = budget(available)
    assert memory(blocks) <= available < memory(blocks + 1)
    assert budget(memory(1)) == 1
    with pytest.raises(SchemaError, match=rf"{memory(1) - 1:,} bytes do not hold {slots} slots .*{memory(1):,} bytes"):
        budget(memory(1) - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 0}, "slots must be an int from 1"),
        ({"slots": 2**31}, "slots must be an int from 1 to 2147483647"),
        ({"slots": True}, "slots must be an int"),
        ({"slots": 1.0}, "slots must be an int"),
        ({"slots": "2"}, "slots must be an int"),
        ({"lookahead": np.True_}, "lookahead must be an int"),
        ({"spec": "flash"}, "spec must be a ModelSpec, got 'flash'"),
        ({"formats": "fp8"}, "formats must be a CacheFormats, got 'fp8': .*PROFILES"),
        ({"blocks": 0}, "blocks must be an int from 1 .*CSA and HCA layers need blocks"),
        ({"blocks": 2**31}, "blocks must be an int from 1 to 2147483647"),
        ({"max_context": 0}, "max_context must be an int from 1 to 1048576"),
        ({"max_context": 2**20 + 1}, "max_position of tiny is 1048576.*got 1048577"),
        ({"lookahead": -1}, "lookahead must be an int from 0"),
    ],
)
def test_sizes_out_of_range_are_refused(changes, message):
    sizes = {"spec": tiny_spec(), "formats": BF16, "slots": 2, "blocks": 3, "max_context": 256, "lookahead": 0}
    with pytest.raises(SchemaError, match=message):
        CacheSchema(**(sizes | changes))


def test_layer_that_is_not_there_is_refused():
    schema = CacheSchema(tiny_spec(), BF16, 1, 1, 128)
    for layer in (-1, 4):
        with pytest.raises(IndexError, match="layers 0 to 3"):
            schema.layer(layer)


def test_equal_schemas_hash_alike_and_others_differ():
    schema = CacheSchema(tiny_spec(), BF16, 2, 3, 256)
    for twin in (CacheSchema(tiny_spec(), CacheFormats("bf16", "bf16", "bf16"), 2, 3, 256), copy.deepcopy(schema)):
        assert twin == schema
        assert hash(twin) == hash(schema)
    assert pickle.loads(pickle.dumps(schema)) == schema
    changes = {"slots": 1, "blocks": 4, "max_context": 255, "lookahead": 1, "snapshots": 1}
    for change in (*({name: value} for name, value in changes.items()), {"formats": PROFILES["exact"]}):
        assert dataclasses.replace(schema, **change) != schema
    assert dataclasses.replace(schema, spec=windows_only()) != schema


def test_numpy_integers_are_sizes():
    schema = CacheSchema(tiny_spec(), BF16, np.int64(2), np.int32(3), np.uint16(256), np.int8(4))
    assert schema == CacheSchema(tiny_spec(), BF16, 2, 3, 256, 4)
    assert {type(getattr(schema, name)) for name in ("slots", "blocks", "max_context", "lookahead")} == {int}


def test_a_fingerprint_names_a_schema():
    schema = CacheSchema(tiny_spec(), BF16, 2, 3, 256)
    renamed = dataclasses.replace(tiny_spec(), name="other")  # equal, as the name is for people
    same = [copy.deepcopy(schema), dataclasses.replace(schema, spec=renamed), CacheSchema.from_json(schema.to_json())]
    assert {twin.fingerprint for twin in same} == {schema.fingerprint}
    others = [
        dataclasses.replace(schema, **change)
        for change in ({"slots": 1}, {"blocks": 4}, {"max_context": 255}, {"lookahead": 1}, {"formats": CacheFormats()})
    ]
    others.append(dataclasses.replace(schema, spec=windows_only()))
    assert len({other.fingerprint for other in (schema, *others)}) == len(others) + 1
    assert len(schema.fingerprint) == 16


def test_copies_and_pickles_of_a_used_schema():
    schema = CacheSchema(tiny_spec(), BF16, 2, 3, 256)
    _ = (schema.arrays, schema.rows(1), schema.fingerprint)
    for twin in (copy.copy(schema), copy.deepcopy(schema), pickle.loads(pickle.dumps(schema))):
        assert twin == schema
        assert twin.arrays == schema.arrays
