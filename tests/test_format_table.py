"""The table of storage formats, and what CacheFormats takes of it and refuses."""

import dataclasses

import numpy as np
import numpy_formats
import pytest
from test_formats import formats, quantized_formats

from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, PROFILES, WINDOW_FORMATS, CacheFormats, FormatError
from dsv4_jax.spec.model import ConfigError
from dsv4_jax.spec.presets import tiny_spec


def test_bytes_of_a_row_and_of_a_page():
    entries = {name: f.row_bytes for name, f in ENTRY_FORMATS.items()}
    assert entries == {"fp32": 2048, "bf16": 1024, "fp8": 580, "fp8_ds_mla": 584, "nvfp4": 292, "nvfp4_static": 288}
    keys = {name: f.row_bytes for name, f in KEY_FORMATS.items()}
    assert keys == {"fp32": 512, "bf16": 256, "fp8": 132, "nvfp4": 76, "nvfp4_static": 72, "mxfp4": 68}
    assert set(WINDOW_FORMATS) == {"fp32", "bf16", "fp8", "fp8_ds_mla"}
    assert [ENTRY_FORMATS["fp8_ds_mla"].page_bytes(rows) for rows in (32, 1)] == [19008, 1152]
    assert [ENTRY_FORMATS["fp8"].page_bytes(rows) for rows in (32, 1)] == [18560, 592]


@quantized_formats
def test_layout_is_the_independent_readers(vector_format):
    layout = numpy_formats.LAYOUTS[vector_format.codec][vector_format.width]
    assert (vector_format.data_bytes, vector_format.scale_bytes) == layout


@pytest.mark.parametrize(
    "chosen", [{"entries": "fp9"}, {"entries": "mxfp4"}, {"window": "nvfp4"}, {"keys": "fp8_ds_mla"}], ids=str
)
def test_a_format_that_does_not_fit_is_an_error_that_lists_what_does(chosen):
    component, name = next(iter(chosen.items()))
    table = {"entries": ENTRY_FORMATS, "window": WINDOW_FORMATS, "keys": KEY_FORMATS}[component]
    with pytest.raises(FormatError, match=component) as error:
        CacheFormats(**chosen)
    assert name in str(error.value)
    assert all(possible in str(error.value) for possible in table)


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**-101, 2.0**101, np.inf, np.nan])
def test_a_global_scale_out_of_range_is_refused(scale):
    with pytest.raises(FormatError, match=r"global_scale must be from 2\^-100 to 2\^100"):
        CacheFormats("nvfp4_static", global_scale=scale)


@formats
@pytest.mark.parametrize("width", [64, 128, 256, 512, 576])
def test_a_width_that_a_format_cannot_hold_is_refused(vector_format, width):
    possible = {"fp8": {512}, "fp8_ds_mla": {512}, "fp8_pow2": {128}, "mxfp4": {128}}
    possible = possible.get(vector_format.codec, {512, 128})
    if width in possible:
        assert dataclasses.replace(vector_format, width=width).width == width
        return
    with pytest.raises(FormatError, match=f"not {width}") as error:
        dataclasses.replace(vector_format, width=width)
    assert all(str(size) in str(error.value) for size in possible)


@pytest.mark.parametrize(("name", "built"), [("head_dim", 512), ("index_head_dim", 128), ("rope_dim", 64)])
def test_a_model_whose_heads_no_format_can_hold_is_refused(name, built):
    with pytest.raises(ConfigError, match=f"{name} is 256; the kernels are built for {built}"):
        dataclasses.replace(tiny_spec(), **{name: 256})


def test_an_unknown_codec_is_refused():
    with pytest.raises(FormatError, match=r"no codec 'fp9'.*fp8_ds_mla.*mxfp4"):
        dataclasses.replace(ENTRY_FORMATS["fp8"], codec="fp9")


def test_profiles_are_complete_choices():
    assert all(isinstance(profile, CacheFormats) for profile in PROFILES.values())
    assert PROFILES["default"] == CacheFormats()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"keys_hadamard": "no"}, "keys_hadamard must be True or False, got 'no'"),
        ({"keys_hadamard": 1}, "keys_hadamard must be True or False, got 1"),
        ({"global_scale": "1"}, "global_scale must be .*got '1'"),
        ({"global_scale": True}, "global_scale must be .*got True"),
        ({"global_scale": None}, "global_scale must be .*got None"),
        ({"entries": ["fp8"]}, r"entries=\['fp8'\] is not a format for entries; choose one of"),
        ({"keys": None}, "keys=None is not a format for keys; choose one of"),
    ],
    ids=str,
)
def test_what_is_no_choice_is_refused(chosen, message):
    with pytest.raises(FormatError, match=message):
        CacheFormats(**chosen)


def test_numpy_values_are_choices():
    formats = CacheFormats(keys_hadamard=np.True_, global_scale=np.float32(0.5))
    assert formats == CacheFormats(keys_hadamard=True, global_scale=0.5)
    assert type(formats.global_scale) is float
