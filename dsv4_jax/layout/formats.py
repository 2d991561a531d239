"""How one vector is stored: every storage format of entries, window rows and indexer keys, as data.

A pool is an array of pages and a page holds a fixed number of rows. An unquantized page is a plain ``[rows, width]``
array. A quantized page is bytes: first the data of every row, then the scales of every row, then padding,

    data of row i    at  data_bytes * i
    scales of row i  at  data_bytes * rows + scale_bytes * i

which is FlashMLA's page layout, used for all formats here. The rounding rules behind each codec live in
``dsv4_jax/arithmetic/codecs.py`` (in words and jnp) and ``ffi/layout/codecs.h`` (for the kernels);
``tests/test_formats.py`` holds the two against each other, ``tests/test_format_table.py`` the byte counts below.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import jax.numpy as jnp
import numpy as np

from dsv4_jax.errors import Picklable
from dsv4_jax.spec.kinds import HEAD_DIM, KEY_DIM, ROPE_DIM

GLOBAL_SCALES = (2.0**-100, 2.0**100)
"""The smallest and largest ``CacheFormats.global_scale``: no block scale in units of it is subnormal or infinite."""


class FormatError(Picklable, ValueError):
    """A storage format that does not exist, or that cannot hold the component it was chosen for."""


_WIDTHS = MappingProxyType(
    {
        "fp32": (HEAD_DIM, KEY_DIM),
        "bf16": (HEAD_DIM, KEY_DIM),
        "fp8": (HEAD_DIM,),
        "fp8_ds_mla": (HEAD_DIM,),
        "nvfp4": (HEAD_DIM, KEY_DIM),
        "nvfp4_static": (HEAD_DIM, KEY_DIM),
        "fp8_pow2": (KEY_DIM,),
        "mxfp4": (KEY_DIM,),
    }
)


BITS: Mapping[str, int] = MappingProxyType(
    {"float32": 32, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e8m0fnu": 8, "float4_e2m1fn": 4},
)
"""Bits of one number, by the name of its type in ml_dtypes."""

Role = Literal["codes", "values", "scales", "global_scale"]
"""What numbers are: to be scaled, as they are, scales of groups of channels, or the scale of a row's scales."""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A run of equal numbers in a row's data or in its scales.

    Attributes:
      role: what they are.
      dtype: their type, a name of ``BITS``; little-endian. float8_e8m0fnu is 2^(byte - 127); of two float4_e2m1fn in a
        byte the even one is the low nibble.
      count: how many.
      first_channel: the first channel that they belong to.
      channels: channels that one of them covers, 1 for codes and values.
    """

    role: Role
    dtype: str
    count: int
    first_channel: int = 0
    channels: int = 1

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return self.count * BITS[self.dtype] // 8


@dataclasses.dataclass(frozen=True)
class VectorFormat:
    """How one vector of ``width`` channels is stored.

    Attributes:
      name: the word users choose the format by.
      codec: the name kernels and the reference know the arithmetic by.
      width: channels of a row, 512 (entries, window rows) or 128 (indexer keys).
      data: what one row's codes (and unquantized channels) are.
      scales: what one row's scales are; nothing for unquantized formats.
      scale_padding: zero bytes behind a row's scales.
      page_multiple: a page's size is padded up to a multiple of this many bytes; kernels copy 16 at once.
      global_scale: the constant fp32 scale of ``nvfp4_static``; unused by the others.

    Raises:
      FormatError: there is no such codec, or it cannot hold vectors of that width.
    """

    name: str
    codec: str
    width: int
    data: tuple[Numbers, ...]
    scales: tuple[Numbers, ...] = ()
    scale_padding: int = 0
    page_multiple: int = 16
    global_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.codec not in _WIDTHS:
            raise FormatError(f"There is no codec {self.codec!r}; choose one of {', '.join(_WIDTHS)}.")
        if self.width not in _WIDTHS[self.codec]:
            widths = " or ".join(map(str, _WIDTHS[self.codec]))
            raise FormatError(f"{self.codec} holds vectors of {widths} channels, not {self.width}.")

    @property
    def data_bytes(self) -> int:
        """Bytes of one row's codes (and unquantized channels)."""
        return sum(numbers.bytes for numbers in self.data)

    @property
    def scale_bytes(self) -> int:
        """Bytes of one row's scales, padding included; 0 for unquantized formats."""
        return sum(numbers.bytes for numbers in self.scales) + self.scale_padding

    @property
    def quantized(self) -> bool:
        """Whether pages are bytes (True) or plain arrays of ``dtype`` (False)."""
        return self.codec not in ("fp32", "bf16")

    @property
    def dtype(self) -> np.dtype:
        """The element type of a page array."""
        unquantized = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
        return np.dtype(unquantized.get(self.codec, jnp.uint8))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, page padding apart."""
        return self.data_bytes + self.scale_bytes

    def page_bytes(self, rows: int) -> int:
        """Bytes of a page of ``rows`` rows, padding included."""
        return math.ceil(rows * self.row_bytes / self.page_multiple) * self.page_multiple

    def page_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of a page of ``rows`` rows: ``[rows, width]``, or ``[page_bytes]`` when quantized."""
        return (self.page_bytes(rows),) if self.quantized else (rows, self.width)

    def page_rank(self) -> int:
        """Number of axes of a page."""
        return 1 if self.quantized else 2


def _table(*formats: VectorFormat) -> Mapping[str, VectorFormat]:
    return MappingProxyType({vector_format.name: vector_format for vector_format in formats})


def _plain(name: str, dtype: str, width: int) -> VectorFormat:
    return VectorFormat(name, name, width, (Numbers("values", dtype, width),))


_CODED = HEAD_DIM - ROPE_DIM
_FP8_DATA = (Numbers("codes", "float8_e4m3fn", _CODED), Numbers("values", "bfloat16", ROPE_DIM, _CODED))


def _nvfp4(width: int) -> tuple[VectorFormat, VectorFormat]:
    data = (Numbers("codes", "float4_e2m1fn", width),)
    scales = (Numbers("scales", "float8_e4m3fn", width // 16, channels=16),)
    of_row = Numbers("global_scale", "float32", 1, channels=width)
    return (
        VectorFormat("nvfp4", "nvfp4", width, data, (*scales, of_row)),
        VectorFormat("nvfp4_static", "nvfp4_static", width, data, scales),
    )


WINDOW_FORMATS = _table(
    _plain("fp32", "float32", HEAD_DIM),
    _plain("bf16", "bfloat16", HEAD_DIM),
    VectorFormat("fp8", "fp8", HEAD_DIM, _FP8_DATA, (Numbers("scales", "float32", 1, channels=_CODED),)),
    VectorFormat(  # page stride as FlashMLA's MODEL1 expects it
        "fp8_ds_mla",
        "fp8_ds_mla",
        HEAD_DIM,
        _FP8_DATA,
        (Numbers("scales", "float8_e8m0fnu", _CODED // 64, channels=64),),
        scale_padding=1,
        page_multiple=576,
    ),
)
"""Formats of sliding-window rows by name."""

ENTRY_FORMATS = _table(*WINDOW_FORMATS.values(), *_nvfp4(HEAD_DIM))
"""Formats of compressed entries by name."""

KEY_FORMATS = _table(
    _plain("fp32", "float32", KEY_DIM),
    _plain("bf16", "bfloat16", KEY_DIM),
    VectorFormat(
        "fp8",
        "fp8_pow2",
        KEY_DIM,
        (Numbers("codes", "float8_e4m3fn", KEY_DIM),),
        (Numbers("scales", "float32", 1, channels=KEY_DIM),),
    ),
    *_nvfp4(KEY_DIM),
    VectorFormat(
        "mxfp4",
        "mxfp4",
        KEY_DIM,
        (Numbers("codes", "float4_e2m1fn", KEY_DIM),),
        (Numbers("scales", "float8_e8m0fnu", KEY_DIM // 32, channels=32),),
    ),
)
"""Formats of indexer keys by name."""


HCA_TAILS = ("rows", "running")
"""Ways to keep an open HCA window."""


@dataclasses.dataclass(frozen=True)
class CacheFormats:
    """The storage format of every component of a cache, chosen by name.

    Attributes:
      entries: format of CSA and HCA entries, a name of ``ENTRY_FORMATS``.
      window: format of sliding-window rows, a name of ``WINDOW_FORMATS``.
      keys: format of indexer keys, a name of ``KEY_FORMATS``.
      keys_hadamard: whether keys are stored after a Hadamard transform (DeepSeek does, Hugging Face does
        not); queries must then be transformed too, see ``LayerCache.transform_query``.
      global_scale: the constant fp32 scale of ``nvfp4_static``, from 2^-100 to 2^100. What is stored saturates at
        2688 times this.
      hca_tail: how an HCA layer keeps its open window. "rows": all of its rows so far, 512 KiB per request and layer.
        "running": the softmax of those rows so far (max, denominator, sum), 6 KiB. Entries agree within fp32 rounding;
        tokens can be taken back from either as far as ``CacheSchema.lookahead`` says, for which a running tail keeps
        that many states more.

    Raises:
      FormatError: a name is unknown, or names a format that cannot hold the component; or ``global_scale`` is out of
        range.
    """

    entries: str = "fp8"
    window: str = "bf16"
    keys: str = "nvfp4"
    keys_hadamard: bool = False
    global_scale: float = 1.0
    hca_tail: str = "rows"

    def __post_init__(self) -> None:
        _ = (self.entry_format, self.window_format, self.key_format)
        if self.hca_tail not in HCA_TAILS:
            raise FormatError(f"hca_tail={self.hca_tail!r} is not a tail; choose one of {', '.join(HCA_TAILS)}.")
        if not isinstance(self.keys_hadamard, bool | np.bool_):
            raise FormatError(f"keys_hadamard must be True or False, got {self.keys_hadamard!r}.")
        object.__setattr__(self, "keys_hadamard", bool(self.keys_hadamard))
        smallest, largest = GLOBAL_SCALES
        number = isinstance(self.global_scale, numbers.Real) and not isinstance(self.global_scale, bool)
        if not number or not smallest <= self.global_scale <= largest:
            raise FormatError(
                f"global_scale must be from 2^-100 to 2^100 ({smallest:.3g} to {largest:.3g}), "
                f"got {self.global_scale!r}."
            )
        object.__setattr__(self, "global_scale", float(self.global_scale))

    @property
    def entry_format(self) -> VectorFormat:
        """How CSA and HCA entries are stored."""
        return self._resolve("entries", self.entries, ENTRY_FORMATS)

    @property
    def window_format(self) -> VectorFormat:
        """How sliding-window rows are stored."""
        return self._resolve("window", self.window, WINDOW_FORMATS)

    @property
    def key_format(self) -> VectorFormat:
        """How indexer keys are stored."""
        return self._resolve("keys", self.keys, KEY_FORMATS)

    def _resolve(self, component: str, name: str, table: Mapping[str, VectorFormat]) -> VectorFormat:
        if not isinstance(name, str) or name not in table:
            raise FormatError(
                f"{component}={name!r} is not a format for {component}; choose one of {', '.join(table)}."
            )
        vector_format = table[name]
        if vector_format.codec == "nvfp4_static":
            return dataclasses.replace(vector_format, global_scale=float(np.float32(self.global_scale)))
        return vector_format


PROFILES: Mapping[str, CacheFormats] = MappingProxyType(
    {
        "exact": CacheFormats("fp32", "fp32", "fp32"),
        "bf16": CacheFormats("bf16", "bf16", "bf16"),
        "default": CacheFormats(),
        "flashmla": CacheFormats("fp8_ds_mla", "fp8_ds_mla", "fp8"),
        "deepseek": CacheFormats("fp8_ds_mla", "fp8_ds_mla", "mxfp4", keys_hadamard=True),
        "compact": CacheFormats("nvfp4_static", "fp8", "mxfp4", keys_hadamard=True),
    }
)
"""Usual sets of formats by name."""
