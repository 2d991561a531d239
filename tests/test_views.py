"""Views of the pools: a reader that has nothing but a view's numbers finds the rows that were stored, uncopied."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import numpy_formats
import pytest
from harness import SPEC, Driver, random_tokens, random_weights

from dsv4_jax import PROFILES, CacheFormats, CacheSchema, entries_view, init_cache, keys_view, tiny_spec, window_view
from dsv4_jax.cache.errors import WrongLayerKind
from dsv4_jax.cache.views import row_fields
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, WINDOW_FORMATS

SWA, CSA, HCA = range(3)
TOKENS = 300
COMPONENTS = {
    "csa entries": (entries_view, CSA, "entries", ENTRY_FORMATS),
    "hca entries": (entries_view, HCA, "entries", ENTRY_FORMATS),
    "keys": (keys_view, CSA, "keys", KEY_FORMATS),
    "window": (window_view, HCA, "window", WINDOW_FORMATS),
}
CASES = [
    pytest.param(name, choice, id=f"{name}-{choice}") for name, (*_, table) in COMPONENTS.items() for choice in table
]


def cache_bytes(pool):
    """The memory behind an array, as it lies there."""
    array = np.asarray(pool)
    assert array.__array_interface__["data"][0] == pool.unsafe_buffer_pointer(), "a copy"
    return array.reshape(-1).view(np.uint8)


def read_field(memory, view, field, page, row):
    """One field of one row as fp32 per channel it covers."""
    start = view.layer_offset + page * view.page_stride + field.offset + row * field.stride
    stored = memory[start : start + field.bytes]
    if field.dtype == "float4_e2m1fn":
        numbers = numpy_formats.e2m1_value(np.stack([stored & 15, stored >> 4], axis=1).ravel())
    elif field.dtype == "float8_e8m0fnu":
        numbers = np.ldexp(np.float32(1), stored.astype(int) - 127)
    else:
        numbers = stored.view(getattr(ml_dtypes, field.dtype, np.float32)).astype(np.float32)
    assert numbers.size == field.count
    return np.repeat(numbers, field.channels)


def read_row(memory, view, page, row):
    """One row as fp32, from the view's numbers alone."""
    scale = np.full(view.width, view.constant_scale, np.float32)
    values = np.full(view.width, np.nan, np.float32)
    for field in view.fields:
        numbers = read_field(memory, view, field, page, row)
        covered = slice(field.first_channel, field.first_channel + len(numbers))
        if field.role in ("codes", "values"):
            assert np.isnan(values[covered]).all(), "two fields for one channel"
            values[covered] = numbers
        else:
            scale[covered] *= numbers
    return values * scale


def filled(formats, weights, other, sequence):
    """A cache whose slot 1 holds `sequence`, in blocks that are out of order because another request came and went."""
    driver = Driver(weights, formats, slots=3, blocks=9)
    first, second = driver.admit(other), driver.admit(sequence)
    driver.feed({first: 129})
    driver.feed({second: 200})
    driver.release(first)
    driver.feed({second: TOKENS - 200})
    return driver, second


def every_row(view, slot):
    """(position, page, row) of all rows that a slot holds, as a view says."""
    if view.positions is not None:
        positions = np.asarray(view.positions)[view.layer_index, slot]
        return [(position, slot, row) for row, position in enumerate(positions) if position >= 0]
    table = np.asarray(view.block_table)[slot]
    return [
        (entry * view.tokens_per_row, table[entry // view.rows_per_page], entry % view.rows_per_page)
        for entry in range(TOKENS // view.tokens_per_row)
    ]


def round_trip(row, vector_format):
    """What an fp32 row is after it was stored, from the independent codec."""
    if vector_format.codec == "fp32":
        return row
    if vector_format.codec == "bf16":
        return row.astype(ml_dtypes.bfloat16).astype(np.float32)
    stored = numpy_formats.encode_row(row, vector_format.codec, vector_format.global_scale)
    return numpy_formats.decode_row(*stored, vector_format.codec, vector_format.global_scale)


@pytest.mark.parametrize(("name", "choice"), CASES)
def test_a_reader_with_a_views_numbers_finds_the_rows_that_were_stored(rng, name, choice):
    view_of, layer, component, _ = COMPONENTS[name]
    tokens = (random_weights(rng), random_tokens(rng, TOKENS), random_tokens(rng, TOKENS))
    exact, request = filled(PROFILES["exact"], *tokens)
    formats = dataclasses.replace(PROFILES["exact"], **{component: choice}, global_scale=0.37)
    driver, _ = filled(formats, *tokens)
    vector_format = {"entries": formats.entry_format, "keys": formats.key_format, "window": formats.window_format}
    view, exact_view = view_of(driver.cache, layer), view_of(exact.cache, layer)
    memory, exact_memory = cache_bytes(view.pool), cache_bytes(exact_view.pool)
    slot = driver.manager.slot(request)
    rows = every_row(view, slot)
    assert rows == every_row(exact_view, slot)
    assert len(rows) == {"csa entries": TOKENS // 4, "keys": TOKENS // 4, "hca entries": 2, "window": 128}[name]
    for _, page, row in rows:
        original = read_row(exact_memory, exact_view, page, row)
        assert np.abs(original).max() > 0.1
        expected = round_trip(original, vector_format[component])
        np.testing.assert_array_equal(read_row(memory, view, page, row), expected)


def test_window_rows_lie_where_their_positions_say(rng):
    sequence = random_tokens(rng, TOKENS)
    driver, request = filled(PROFILES["exact"], random_weights(rng), random_tokens(rng, TOKENS), sequence)
    view = window_view(driver.cache, SWA)
    memory = cache_bytes(view.pool)
    rows = every_row(view, driver.manager.slot(request))
    assert {position for position, _, _ in rows} == set(range(TOKENS - 128, TOKENS))
    for position, page, row in rows:
        np.testing.assert_array_equal(read_row(memory, view, page, row), sequence[SWA]["rows"][position])


@pytest.mark.parametrize("name", ["csa entries", "hca entries", "window"])
def test_an_fp8_ds_mla_page_is_flashmlas(rng, name):
    """Read by FlashMLA's layout with every offset spelled out: 576 i, 576 i + 448 and 576 P + 8 i."""
    view_of, layer, component, _ = COMPONENTS[name]
    tokens = (random_weights(rng), random_tokens(rng, TOKENS), random_tokens(rng, TOKENS))
    exact, request = filled(PROFILES["exact"], *tokens)
    driver, _ = filled(dataclasses.replace(PROFILES["exact"], **{component: "fp8_ds_mla"}), *tokens)
    view, exact_view = view_of(driver.cache, layer), view_of(exact.cache, layer)
    per_page = {"csa entries": 32, "hca entries": 1, "window": 128}[name]
    stride = {"csa entries": 19008, "hca entries": 1152, "window": 74880}[name]
    pages = cache_bytes(view.pool).reshape(-1, stride)
    exact_memory = cache_bytes(exact_view.pool)
    for _, page, row in every_row(view, driver.manager.slot(request)):
        stored = pages[view.layer_index * view.pages + page]
        codes = stored[576 * row : 576 * row + 448].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        rope = stored[576 * row + 448 : 576 * row + 576].view(ml_dtypes.bfloat16)
        scale_bytes = stored[576 * per_page + 8 * row :][:8]
        scales = np.repeat(2.0 ** (scale_bytes[:7].astype(int) - 127), 64)
        original = read_row(exact_memory, exact_view, page, row)
        error = np.abs(codes * scales - original[:448])
        assert (error <= np.maximum(np.abs(original[:448]) / 17, 2.0**-10 * scales) * (1 + 1e-6)).all()
        np.testing.assert_array_equal(rope, original[448:].astype(ml_dtypes.bfloat16))
        assert scale_bytes[7] == 0
        amax = np.abs(original[:448]).reshape(7, 64).max(1)
        np.testing.assert_array_equal(scale_bytes[:7], np.ceil(np.log2(amax.astype(np.float64) / 448)) + 127)


@pytest.mark.parametrize("rows", [1, 32, 128])
@pytest.mark.parametrize(
    "vector_format", [*ENTRY_FORMATS.values(), *KEY_FORMATS.values()], ids=lambda f: f"{f.name}-{f.width}"
)
def test_fields_fill_a_page_and_do_not_overlap(vector_format, rows):
    owners = np.zeros(vector_format.page_bytes(rows), int)
    covered = np.zeros(vector_format.width, int)
    for field in row_fields(vector_format, rows):
        for row in range(rows):
            owners[field.offset + row * field.stride :][: field.bytes] += 1
        if field.role in ("codes", "values"):
            covered[field.first_channel : field.first_channel + field.count] += 1
    unused = owners.size - rows * vector_format.row_bytes
    if vector_format.name == "fp8_ds_mla":
        unused += rows  # the eighth scale byte
    assert owners.max() == 1
    assert np.count_nonzero(owners == 0) == unused
    assert (covered == 1).all()


def test_pools_go_through_dlpack_without_a_copy():
    cache = init_cache(CacheSchema(SPEC, CacheFormats("fp8", "bf16", "fp32"), 2, 3, 300))
    entries, keys, window = entries_view(cache, CSA), keys_view(cache, CSA), window_view(cache, SWA)
    for view in (entries, keys):
        assert np.from_dlpack(view.pool).__array_interface__["data"][0] == view.pool.unsafe_buffer_pointer()
    for view in (entries, keys, window):  # NumPy's DLPack knows no bfloat16
        again = jax.dlpack.from_dlpack(view.pool)
        assert (again.shape, again.dtype) == (view.pool.shape, view.pool.dtype)
        assert again.unsafe_buffer_pointer() == view.pool.unsafe_buffer_pointer()
    assert entries.pool is cache.pools["csa_entries"]
    assert entries.block_table is cache.block_table
    assert window.positions is cache.window_positions


def test_a_view_ends_with_the_next_donated_step():
    cache = init_cache(CacheSchema(SPEC, CacheFormats(), 2, 3, 300))
    view = entries_view(cache, CSA)
    address = view.pool.unsafe_buffer_pointer()
    cache = jax.jit(lambda cache: jax.tree.map(lambda array: array + 1, cache), donate_argnums=0)(cache)
    assert view.pool.is_deleted()
    assert entries_view(cache, CSA).pool.unsafe_buffer_pointer() == address


def test_a_layer_lies_behind_those_of_its_kind_before_it():
    """Also inside jit, where numbers are plain and arrays are operands."""
    spec = tiny_spec()  # SWA, CSA, HCA, CSA
    cache = init_cache(CacheSchema(spec, CacheFormats(), 2, 3, 300))
    marked = {"csa_entries": 7, "csa_keys": 8, "window": 9}
    cache = cache.with_arrays({name: cache.arrays[name].at[-1, 1, 5:6].set(value) for name, value in marked.items()})

    @jax.jit
    def read(cache):
        return [
            view.pool.reshape(-1)[(view.layer_offset + view.page_stride) // view.pool.dtype.itemsize + first]
            for view, first in ((entries_view(cache, 3), 5), (keys_view(cache, 3), 5), (window_view(cache, 3), 5 * 512))
        ]

    assert [int(value) for value in read(cache)] == [7, 8, 9]
    assert [entries_view(cache, layer).layer_index for layer in (1, 2, 3)] == [0, 0, 1]


def test_views_say_what_queries_need():
    formats = CacheFormats(keys="mxfp4", keys_hadamard=True)
    cache = init_cache(CacheSchema(SPEC, formats, 2, 3, 300))
    assert keys_view(cache, CSA).hadamard
    assert not entries_view(cache, CSA).hadamard
    assert not keys_view(init_cache(CacheSchema(SPEC, CacheFormats(), 2, 3, 300)), CSA).hadamard


def test_layers_without_the_component_are_named():
    cache = init_cache(CacheSchema(SPEC, CacheFormats(), 2, 3, 300))
    with pytest.raises(WrongLayerKind, match="layer 0 is SWA and has no entries"):
        entries_view(cache, SWA)
    for layer, kind in ((SWA, "SWA"), (HCA, "HCA")):
        with pytest.raises(WrongLayerKind, match=f"layer {layer} is {kind} and has no indexer keys"):
            keys_view(cache, layer)
    for view_of in (entries_view, keys_view, window_view):
        with pytest.raises(IndexError, match="layers 0 to 2"):
            view_of(cache, 3)
        with pytest.raises(IndexError, match="layers 0 to 2"):
            view_of(cache, -1)
