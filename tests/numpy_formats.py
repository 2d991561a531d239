"""Storage formats a second time, in NumPy and from the formats' published rules alone, for tests to compare with.

Shares no code with the package. Codes come from a search in the table of all values that a code can have, in float64;
scales from `frexp`; pages are put together row by row from the layout as FlashMLA documents it.
"""

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16

E4M3 = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

# name: (data bytes of a 512 row, scale bytes), (data bytes of a 128 row, scale bytes)
LAYOUTS = {
    "fp8": {512: (448 + 2 * 64, 4)},
    "fp8_ds_mla": {512: (448 + 2 * 64, 8)},
    "fp8_pow2": {128: (128, 4)},
    "nvfp4": {512: (256, 32 + 4), 128: (64, 8 + 4)},
    "nvfp4_static": {512: (256, 32), 128: (64, 8)},
    "mxfp4": {128: (64, 4)},
}


def nearest_code(x, table, nan_code):
    """Index of the nearest table value to |x|, ties to the even index, saturating; the sign in the bit above."""
    sign_bit = len(table) if len(table) == 8 else 128
    size = np.abs(np.asarray(x, np.float64))
    middles = (table[1:] + table[:-1]) / 2
    below = np.searchsorted(middles, size, side="left")
    above = np.searchsorted(middles, size, side="right")
    code = np.where(below % 2 == 0, below, above)
    code = code + np.where(np.signbit(x), sign_bit, 0)
    return np.where(np.isnan(x), nan_code, code).astype(np.uint8)


def e4m3_code(x):
    return nearest_code(x, E4M3, 0x7F)


def e4m3_value(code):
    size = np.append(E4M3, np.nan)[code & 127]
    return np.where(code & 128, -size, size).astype(np.float32)


def e2m1_code(x):
    return nearest_code(x, E2M1, 7)


def e2m1_value(code):
    return np.where(code & 8, -E2M1[code & 7], E2M1[code & 7]).astype(np.float32)


def ceil_log2(x):
    """The smallest integer k with 2^k >= x."""
    fraction, exponent = np.frexp(x)
    return np.where(fraction == 0.5, exponent - 1, exponent)


def amax(x):
    """Largest magnitude along the last axis, kept: NaN does not count, infinity is the largest finite number."""
    size = np.where(np.isnan(x), np.float32(0), np.abs(x))
    return np.minimum(size.max(-1, keepdims=True), np.finfo(np.float32).max)


def bf16_bits(x):
    """fp32 to bf16 bits: ties to even, a NaN keeps its upper payload and becomes quiet."""
    quiet = (x.view(np.uint32) >> 16).astype(np.uint16) | np.uint16(0x40)
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(x), quiet, x.astype(BF16).view(np.uint16)).astype("<u2")


def as_bytes(x):
    return np.ascontiguousarray(x).view(np.uint8)


def encode_row(x, codec, global_scale=1.0):
    """(data bytes, scale bytes) of one fp32 row."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return _encode_row(np.asarray(x, np.float32), codec, np.float32(global_scale))


def _encode_row(x, codec, global_scale):
    f = np.float32
    if codec == "fp8":
        scale = np.maximum(amax(x[:448]), f(1e-12)) / f(448)
        return np.concatenate([e4m3_code(x[:448] / scale), as_bytes(bf16_bits(x[448:]))]), as_bytes(scale.astype("<f4"))
    if codec == "fp8_ds_mla":
        blocks = x[:448].reshape(7, 64)
        exponent = ceil_log2(np.maximum(amax(blocks), f(1e-4)) / f(448))
        codes = e4m3_code(blocks / np.ldexp(f(1), exponent))
        data = np.concatenate([codes.ravel(), as_bytes(bf16_bits(x[448:]))])
        return data, np.append(exponent.ravel() + 127, 0).astype(np.uint8)
    if codec == "fp8_pow2":
        scale = np.ldexp(f(1), ceil_log2(np.maximum(amax(x), f(1e-4)) / f(448)))
        return e4m3_code(x / scale), as_bytes(scale.astype("<f4"))
    if codec == "mxfp4":
        blocks = x.reshape(-1, 32)
        exponent = ceil_log2(np.maximum(amax(blocks), f(6 * 2.0**-126)) / f(6))
        codes = e2m1_code(blocks / np.ldexp(f(1), exponent)).reshape(-1, 2)
        return codes[:, 0] + 16 * codes[:, 1], (exponent.ravel() + 127).astype(np.uint8)
    if codec == "nvfp4":
        global_scale = np.maximum(amax(x), f(2.0**-100)) / f(2688)
    blocks = x.reshape(-1, 16)
    block_codes = e4m3_code(np.clip(amax(blocks) / f(6) / global_scale, f(2.0**-9), f(448)))
    codes = e2m1_code(blocks / (e4m3_value(block_codes) * global_scale)).reshape(-1, 2)
    scales = block_codes.ravel()
    if codec == "nvfp4":
        scales = np.concatenate([scales, as_bytes(global_scale.astype("<f4"))])
    return codes[:, 0] + 16 * codes[:, 1], scales


def decode_row(data, scales, codec, global_scale=1.0):
    """The fp32 row of its data and scale bytes."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return _decode_row(data, scales, codec, np.float32(global_scale))


def _decode_row(data, scales, codec, global_scale):
    if codec in ("fp8", "fp8_ds_mla"):
        if codec == "fp8":
            scale = scales.view("<f4")
        else:
            scale = np.repeat(np.ldexp(np.float32(1), scales[:7].astype(int) - 127), 64)
        rope = (data[448:].view("<u2").astype(np.uint32) << 16).view(np.float32)
        return np.concatenate([e4m3_value(data[:448]) * scale, rope])
    if codec == "fp8_pow2":
        return e4m3_value(data) * scales.view("<f4")
    values = e2m1_value(np.stack([data & 15, data >> 4], axis=1).ravel())
    if codec == "mxfp4":
        return values * np.repeat(np.ldexp(np.float32(1), scales.astype(int) - 127), 32)
    if codec == "nvfp4":
        scales, global_scale = scales[:-4], scales[-4:].view("<f4")
    return values * np.repeat(e4m3_value(scales) * global_scale, 16)


def encode_page(rows, codec, global_scale=1.0):
    """The bytes of a page of these fp32 rows: every row's data, every row's scales, zeros up to the page stride."""
    encoded = [encode_row(row, codec, global_scale) for row in rows]
    page = np.concatenate([data for data, _ in encoded] + [scales for _, scales in encoded]).astype(np.uint8)
    padding = -len(page) % (576 if codec == "fp8_ds_mla" else 16)
    return np.pad(page, (0, padding))


def decode_page(page, codec, rows, width, global_scale=1.0):
    """The fp32 rows [rows, width] of a page's bytes."""
    data_bytes, scale_bytes = LAYOUTS[codec][width]
    page = np.asarray(page)
    first_scale = data_bytes * rows
    return np.stack(
        [
            decode_row(
                page[data_bytes * i : data_bytes * (i + 1)].copy(),
                page[first_scale + scale_bytes * i : first_scale + scale_bytes * (i + 1)].copy(),
                codec,
                global_scale,
            )
            for i in range(rows)
        ]
    )
