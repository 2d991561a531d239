"""Storage formats to the byte: reference and native codecs against golden bytes and an independent NumPy codec."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy_formats
import pytest
from implementations import IMPLEMENTATIONS, ops_of

from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, CacheFormats

with np.load(Path(__file__).parent / "data" / "dsv4_quant_golden.npz") as _file:
    GOLDEN = dict(_file)

STATIC = {
    f"static_{scale}": dataclasses.replace(ENTRY_FORMATS["nvfp4_static"], global_scale=float(np.float32(scale)))
    for scale in (0.37, 0.002)
}
FORMATS = (
    {f"{name}-512": f for name, f in ENTRY_FORMATS.items()}
    | {f"{name}-128": f for name, f in KEY_FORMATS.items()}
    | {f"{name}-512": f for name, f in STATIC.items()}
)
QUANTIZED = {name: f for name, f in FORMATS.items() if f.quantized}
FP8 = {name: f for name, f in QUANTIZED.items() if f.name.startswith("fp8")}

formats = pytest.mark.parametrize("vector_format", FORMATS.values(), ids=FORMATS)
quantized_formats = pytest.mark.parametrize("vector_format", QUANTIZED.values(), ids=QUANTIZED)
fp8_formats = pytest.mark.parametrize("vector_format", FP8.values(), ids=FP8)


@functools.cache
def jitted(operation, **options):
    return jax.jit(functools.partial(operation, **options))


def resized(page, vector_format, rows, wanted):
    """A page of so many rows with the first rows of this one; what it has not is zero."""
    if not vector_format.quantized:
        return np.concatenate([page[:wanted], np.zeros((max(0, wanted - rows), page.shape[1]), page.dtype)])
    made, kept = np.zeros(vector_format.page_shape(wanted), np.uint8), min(rows, wanted)
    for part, to in zip(split_page(page, vector_format, rows), split_page(made, vector_format, wanted), strict=True):
        to[:kept] = part[:kept]
    return made


class Codec:
    """quantize and dequantize of one implementation on the test's device, NumPy in and out.

    The definition is slow to compile, so it works on pages of one size, of which the first rows count; test_ops.py has
    it make pages of other sizes.
    """

    ROWS = 1024

    def __init__(self, module):
        self.module = module

    def quantize(self, rows, vector_format):
        count = len(rows)
        if self.module.implementation == "native":
            return np.asarray(jitted(self.module.quantize, format=vector_format)(rows))
        rows = np.concatenate([rows, np.zeros((self.ROWS - count, rows.shape[1]), rows.dtype)])
        page = np.asarray(jitted(self.module.quantize, format=vector_format)(rows))
        return resized(page, vector_format, self.ROWS, count)

    def dequantize(self, page, vector_format, rows, dtype=jnp.float32):
        if self.module.implementation == "native":
            return np.asarray(jitted(self.module.dequantize, format=vector_format, rows=rows, dtype=dtype)(page))
        page = resized(page, vector_format, rows, self.ROWS)
        read = jitted(self.module.dequantize, format=vector_format, rows=self.ROWS, dtype=dtype)(page)
        return np.asarray(read)[:rows]

    def round_trip(self, rows, vector_format):
        return self.dequantize(self.quantize(rows, vector_format), vector_format, len(rows))


@pytest.fixture(params=IMPLEMENTATIONS)
def codec(request, device):
    return Codec(ops_of(request.param))


def bf16_rows(name):
    return GOLDEN[name].view(jnp.bfloat16)


def split_page(page, vector_format, rows):
    """Data bytes and scale bytes of a page, a row each."""
    data, scales = np.split(page[: rows * vector_format.row_bytes], [rows * vector_format.data_bytes])
    return data.reshape(rows, -1), scales.reshape(rows, -1)


def expected_page(rows, vector_format):
    """What a page of these rows must be, from the independent codec."""
    values = np.asarray(rows)
    if values.dtype == jnp.bfloat16:
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if vector_format.codec == "fp32":
        return values
    if vector_format.codec == "bf16":
        return numpy_formats.bf16_bits(values).view(jnp.bfloat16)
    return numpy_formats.encode_page(values, vector_format.codec, vector_format.global_scale)


def assert_same_bytes(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(numpy_formats.as_bytes(actual), numpy_formats.as_bytes(expected))


# --- the golden file ---


@pytest.mark.parametrize("rows", ["csa", "hca", "swa"])
def test_fp8_ds_mla_writes_the_golden_codes_and_scales(codec, rows):
    vector_format, x = ENTRY_FORMATS["fp8_ds_mla"], bf16_rows(f"{rows}.in_bf16")
    data, scales = split_page(codec.quantize(x, vector_format), vector_format, len(x))
    np.testing.assert_array_equal(data[:, :448], GOLDEN[f"{rows}.v4.e4m3"])
    np.testing.assert_array_equal(data[:, 448:].copy().view(np.uint16), GOLDEN[f"{rows}.in_bf16"][:, 448:])
    np.testing.assert_array_equal(scales[:, :7], GOLDEN[f"{rows}.v4.ue8m0"])
    np.testing.assert_array_equal(scales[:, 7], 0)


@pytest.mark.parametrize("rows", ["csa", "hca", "swa"])
def test_nvfp4_static_writes_the_golden_codes_and_scales(codec, rows):
    global_scale = float(GOLDEN[f"{rows}.nv2.gs"][0])
    vector_format, x = (
        CacheFormats("nvfp4_static", global_scale=global_scale).entry_format,
        bf16_rows(f"{rows}.in_bf16"),
    )
    data, scales = split_page(codec.quantize(x, vector_format), vector_format, len(x))
    np.testing.assert_array_equal(data, GOLDEN[f"{rows}.nv2.e2m1"])
    np.testing.assert_array_equal(scales, GOLDEN[f"{rows}.nv2.e4m3"])


def test_mxfp4_writes_the_golden_codes_and_scales(codec):
    vector_format, x = KEY_FORMATS["mxfp4"], bf16_rows("idx.hadamard_bf16")
    data, scales = split_page(codec.quantize(x, vector_format), vector_format, len(x))
    np.testing.assert_array_equal(data, GOLDEN["idx.mxfp4.e2m1"])
    np.testing.assert_array_equal(scales, GOLDEN["idx.mxfp4.ue8m0"])


def test_indexer_fp8_writes_the_golden_codes_and_scales(codec):
    vector_format, x = KEY_FORMATS["fp8"], bf16_rows("idx.in_bf16")
    data, scales = split_page(codec.quantize(x, vector_format), vector_format, len(x))
    np.testing.assert_array_equal(data, GOLDEN["idx.fp8.e4m3"])
    exponents = GOLDEN["idx.fp8.ue8m0"].astype(np.uint32) << 23
    np.testing.assert_array_equal(scales.copy().view(np.float32), exponents.view(np.float32))


REL_L2 = {
    "fp32": 0,
    "bf16": 2**-8,
    "fp8": 0.030,
    "fp8_ds_mla": 0.030,
    "nvfp4": 0.10,
    "nvfp4_static": 0.10,
    "mxfp4": 0.13,
}


@formats
def test_relative_error_over_the_golden_rows(codec, vector_format):
    names = ["csa.in_bf16", "hca.in_bf16", "swa.in_bf16"] if vector_format.width == 512 else ["idx.hadamard_bf16"]
    x = np.concatenate([bf16_rows(name) for name in names]).astype(np.float32)
    error = np.linalg.norm(codec.round_trip(x, vector_format) - x) / np.linalg.norm(x)
    assert error <= REL_L2[vector_format.name]


# --- bytes against the independent codec ---


@formats
@pytest.mark.parametrize(("count", "dtype"), [(1, jnp.float32), (37, jnp.bfloat16)])
def test_bytes_of_random_rows(codec, vector_format, count, dtype, rng):
    magnitudes = np.exp(rng.normal(0, 6, (count, 1))) * np.exp(rng.normal(0, 1, (count, vector_format.width)))
    x = (rng.standard_normal((count, vector_format.width)) * magnitudes).astype(dtype)
    page = codec.quantize(x, vector_format)
    assert_same_bytes(page, expected_page(x, vector_format))


def ordered_and_shuffled(values, width, rng):
    """The values as rows of `width`, in order (neighbours share a scale) and shuffled (they don't); zeros fill up."""
    values = np.concatenate([values, np.zeros(-len(values) % width, values.dtype)])
    return np.concatenate([values, rng.permutation(values)]).reshape(-1, width)


@formats
def test_bytes_of_every_bf16_value(codec, vector_format, rng):
    every = np.arange(65536).astype(np.uint16).view(jnp.bfloat16)
    x = ordered_and_shuffled(every, vector_format.width, rng)
    assert_same_bytes(codec.quantize(x, vector_format), expected_page(x, vector_format))


@formats
def test_bytes_of_powers_of_two_and_their_neighbours(codec, vector_format, rng):
    powers = np.ldexp(np.float32(1), np.arange(-149, 128))
    around = np.stack([np.nextafter(powers, np.float32(0)), powers, np.nextafter(powers, np.float32(np.inf))], axis=1)
    x = ordered_and_shuffled(np.concatenate([around.ravel(), -around.ravel()]), vector_format.width, rng)
    assert_same_bytes(codec.quantize(x, vector_format), expected_page(x, vector_format))


@formats
def test_bytes_of_finite_numbers_of_any_size(codec, vector_format, rng):
    x = rng.integers(0, 2**32, (64, vector_format.width), dtype=np.uint32).view(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(0))
    assert_same_bytes(codec.quantize(x, vector_format), expected_page(x, vector_format))


@quantized_formats
def test_bytes_of_every_tie_and_its_neighbours(codec, vector_format, rng):
    four_bit = vector_format.codec in ("nvfp4", "nvfp4_static", "mxfp4")
    table = numpy_formats.E2M1 if four_bit else numpy_formats.E4M3
    ties = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    around = np.stack([np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(np.inf))], axis=1).ravel()
    around = np.concatenate([around, -around])
    # The table's largest value in every 16 channels makes every scale a power of two, so that ties stay ties.
    per_block = [np.append(part, table[-1]) for part in np.split(np.resize(around, 15 * 64), 64)]
    x = np.resize(np.concatenate(per_block), (8, vector_format.width)).astype(np.float32)
    if vector_format.codec == "nvfp4":
        x[:, 0] = table[-1] * numpy_formats.E4M3[-1]  # a row scale of 1
    x = np.concatenate([x, x * 2.0**-20, x * 2.0**5]).astype(np.float32)
    page = codec.quantize(x, vector_format)
    assert_same_bytes(page, expected_page(x, vector_format))
    on_ties = np.isin(np.abs(x[:8, :448]), ties)
    if vector_format.codec != "nvfp4_static" or vector_format.global_scale == 1:
        stored = codec.dequantize(page, vector_format, len(x))[:8, :448]
        stored_codes = np.searchsorted(table, np.abs(stored[on_ties]))
        np.testing.assert_array_equal(table[stored_codes], np.abs(stored[on_ties]))
        assert np.all(stored_codes % 2 == 0)


def test_jit_and_eager_store_the_same_bytes(codec, rng):
    x = rng.standard_normal((3, 512)).astype(np.float32)
    eager = np.asarray(codec.module.quantize(jnp.asarray(x), format=ENTRY_FORMATS["fp8"]))
    assert_same_bytes(codec.quantize(x, ENTRY_FORMATS["fp8"]), eager)


# --- reading ---


@quantized_formats
def test_pages_read_as_an_independent_reader_reads_them(codec, vector_format, rng):
    rows = 5
    x = (rng.standard_normal((rows, vector_format.width)) * np.exp(rng.normal(0, 3, (rows, 1)))).astype(np.float32)
    page = codec.quantize(x, vector_format)
    codes = page.copy()
    codes[: rows * vector_format.data_bytes] = rng.integers(0, 256, rows * vector_format.data_bytes)
    for stored in (page, codes):
        expected = numpy_formats.decode_page(
            stored, vector_format.codec, rows, vector_format.width, vector_format.global_scale
        )
        np.testing.assert_array_equal(codec.dequantize(stored, vector_format, rows), expected)
        as_bf16 = codec.dequantize(stored, vector_format, rows, jnp.bfloat16)
        np.testing.assert_array_equal(
            as_bf16.astype(np.float32), numpy_formats.bf16_bits(expected).view(jnp.bfloat16).astype(np.float32)
        )


@formats
def test_subnormal_numbers_read_back(codec, vector_format):
    size = np.ldexp(np.float32(1), np.arange(-149, -121))
    x = np.resize(np.concatenate([size, -size]), (1, vector_format.width)).astype(np.float32)
    page = expected_page(x, vector_format)
    if vector_format.quantized:
        expected = numpy_formats.decode_page(page, vector_format.codec, 1, x.shape[1], vector_format.global_scale)
    else:
        expected = page.astype(np.float32)
    actual = codec.dequantize(page, vector_format, 1)
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def test_fp32_and_bf16_are_the_rows_themselves(codec, rng):
    x = rng.standard_normal((4, 512)).astype(np.float32)
    np.testing.assert_array_equal(codec.quantize(x, ENTRY_FORMATS["fp32"]), x)
    np.testing.assert_array_equal(codec.round_trip(x, ENTRY_FORMATS["fp32"]), x)
    np.testing.assert_array_equal(codec.quantize(x, ENTRY_FORMATS["bf16"]), x.astype(jnp.bfloat16))


# --- what the formats promise ---


@fp8_formats
def test_fp8_error_bound_of_every_element(codec, vector_format, rng):
    x = (rng.standard_normal((40, vector_format.width)) ** 3 * np.exp(rng.normal(0, 4, (40, 1)))).astype(np.float32)
    channels = 448 if vector_format.width == 512 else 128
    page = codec.quantize(x, vector_format)
    _, scales = split_page(page, vector_format, len(x))
    if vector_format.codec == "fp8_ds_mla":
        scale = np.repeat(np.ldexp(1.0, scales[:, :7].astype(int) - 127), 64, axis=1)
    else:
        scale = scales.copy().view(np.float32).astype(np.float64)
    stored, values = codec.dequantize(page, vector_format, len(x))[:, :channels], x[:, :channels]
    bound = np.maximum(np.abs(values) / 17, 2.0**-10 * scale) + np.spacing(np.abs(values))
    assert np.all(np.abs(stored.astype(np.float64) - values) <= bound)


@pytest.mark.parametrize("name", ["fp8", "fp8_ds_mla"])
def test_rope_half_of_bf16_rows_is_exact(codec, name, rng):
    x = rng.integers(0, 2**16, (16, 512), dtype=np.uint16).view(jnp.bfloat16)
    x = np.where(np.isfinite(x.astype(np.float32)), x, jnp.bfloat16(1))
    page = codec.quantize(x, ENTRY_FORMATS[name])
    read = codec.dequantize(page, ENTRY_FORMATS[name], 16, jnp.bfloat16)
    np.testing.assert_array_equal(read[:, 448:].view(np.uint16), x[:, 448:].view(np.uint16))


def test_nvfp4_keys_decode_to_the_grid(codec, rng):
    x = rng.standard_normal((9, 128)).astype(np.float32)
    page = codec.quantize(x, KEY_FORMATS["nvfp4"])
    _, scales = split_page(page, KEY_FORMATS["nvfp4"], 9)
    global_scale = scales[:, 8:].copy().view(np.float32)
    unit = numpy_formats.e4m3_value(scales[:, :8]) * global_scale
    grid = np.concatenate([numpy_formats.E2M1, -numpy_formats.E2M1]).astype(np.float32)
    allowed = unit[:, :, None, None] * grid
    read = codec.dequantize(page, KEY_FORMATS["nvfp4"], 9).reshape(9, 8, 16, 1)
    assert np.all((read == allowed).any(-1))
    np.testing.assert_array_equal(global_scale[:, 0], np.abs(x).max(1) / np.float32(2688))


def test_nvfp4_static_saturates_above_what_its_scale_reaches(codec):
    x = np.zeros((1, 512), np.float32)
    x[0, :3] = [5000.0, -1e9, 2688.0]
    read = codec.round_trip(x, ENTRY_FORMATS["nvfp4_static"])
    np.testing.assert_array_equal(read[0, :4], [2688.0, -2688.0, 2688.0, 0.0])


@quantized_formats
def test_zero_rows_stay_zero_and_keep_their_signs(codec, vector_format):
    x = np.zeros((2, vector_format.width), np.float32)
    x[1] = -0.0
    read = codec.round_trip(x, vector_format)
    np.testing.assert_array_equal(read.view(np.uint32), x.view(np.uint32))


@quantized_formats
def test_non_finite_numbers_have_their_documented_codes(codec, vector_format):
    x = np.ones((3, vector_format.width), np.float32)
    x[0, 1], x[1, 2], x[2, :] = np.nan, -np.inf, np.nan
    data, _ = split_page(codec.quantize(x, vector_format), vector_format, 3)
    codes = data
    nan_code, one_code, negative_infinity = 0x7F, {"fp8": 0x7E}.get(vector_format.codec, 0x78), 0xFE
    if vector_format.codec in ("nvfp4", "nvfp4_static", "mxfp4"):
        codes = np.stack([data & 15, data >> 4], axis=2).reshape(3, -1)
        nan_code, one_code, negative_infinity = 7, 6 if vector_format.codec == "mxfp4" else 7, 15
    if vector_format.codec == "fp8_pow2":
        one_code = numpy_formats.e4m3_code(np.float32(1) / np.float32(2.0**-8))
    if vector_format.codec == "fp8_ds_mla":
        one_code = numpy_formats.e4m3_code(np.float32(1) / np.float32(2.0**-8))
    assert codes[0, 1] == nan_code
    assert codes[0, 0] == one_code
    assert codes[1, 2] == negative_infinity
    assert np.all(codes[2, :128] == nan_code)


@pytest.mark.parametrize("exponent", [-100, 100])
def test_the_extreme_global_scales_store_what_they_should(codec, exponent, rng):
    vector_format = CacheFormats("nvfp4_static", global_scale=2.0**exponent).entry_format
    x = np.ldexp(rng.standard_normal((9, 512)) * 500, exponent).astype(np.float32)
    page = codec.quantize(x, vector_format)
    assert_same_bytes(page, expected_page(x, vector_format))
    expected = numpy_formats.decode_page(page, "nvfp4_static", 9, 512, vector_format.global_scale)
    np.testing.assert_array_equal(codec.dequantize(page, vector_format, 9), expected)
    unscaled, error = (np.ldexp(values.astype(np.float64), -exponent) for values in (x, expected - x))
    assert np.linalg.norm(error) < 0.10 * np.linalg.norm(unscaled)
