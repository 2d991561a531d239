"""What ops take and refuse: formats and scales each for itself, dtypes that may differ, and numbers that are none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS, ops_of

from dsv4_jax import CompressorInputs, OperandError, Rotary, ops
from dsv4_jax.host.planning import build_plan
from dsv4_jax.layout.formats import ENTRY_FORMATS, KEY_FORMATS, WINDOW_FORMATS
from dsv4_jax.layout.plan import PlanLayout
from dsv4_jax.native.registration import REGISTERED
from dsv4_jax.ops.operands import Compressed, Window

EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
LAYOUT = PlanLayout(tokens=8, requests=1)
PLAN = build_plan(LAYOUT, [0], [0], [8], [True])
FP32 = WINDOW_FORMATS["fp32"]


def _window(vector_format=FP32):
    return Window(
        np.zeros((1, 1, *vector_format.page_shape(128)), vector_format.dtype), np.zeros((1, 1, 128), np.int32)
    )


def _inputs(rng, width, dtypes=(np.float32,) * 4):
    angles = rng.normal(size=(LAYOUT.closing_size(4), 32)).astype(np.float32)
    shapes = ((8, 2 * width), (8, 2 * width), (4, 2 * width), (width,))
    made = [rng.normal(size=shape).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return CompressorInputs(*made, Rotary(np.cos(angles), np.sin(angles)))


def _compressed(width, vector_format):
    return Compressed(
        np.zeros((1, 1, *vector_format.page_shape(32)), vector_format.dtype), np.zeros((1, 1, 2, 12, width), np.float32)
    )


def _update_csa(implementation, rng, entry_format, key_format, dtypes=(np.float32,) * 4):
    inputs = _inputs(rng, 512, dtypes), _inputs(rng, 128, dtypes)
    operands = (_window(), _compressed(512, entry_format), _compressed(128, key_format))
    rows, table = rng.normal(size=(8, 512)).astype(np.float32), np.zeros((1, 1), np.int32)
    options = {"window_format": FP32, "entry_format": entry_format, "key_format": key_format, "eps": 1e-6}
    function = jax.jit(functools.partial(ops_of(implementation).update_csa, **options))
    return function(*operands, rows, *inputs, table, PLAN, 0, 0)


@EACH
def test_entries_and_keys_have_a_global_scale_each(device, seed, implementation):
    """Of 4 and of a quarter: both read back as what was stored."""
    scaled = [
        dataclasses.replace(formats["nvfp4_static"], global_scale=scale)
        for formats, scale in ((ENTRY_FORMATS, 4.0), (KEY_FORMATS, 0.25))
    ]
    made = _update_csa(implementation, np.random.default_rng(seed), *scaled)
    exact = _update_csa(implementation, np.random.default_rng(seed), ENTRY_FORMATS["fp32"], KEY_FORMATS["fp32"])
    for index, vector_format in ((1, scaled[0]), (2, scaled[1])):
        expected = np.asarray(exact[index].pool)[0, 0, :2]

        @jax.jit
        def read_both(pool, expected, f=vector_format):
            by = {"format": f, "implementation": implementation}
            table = jnp.zeros((1, 1), jnp.int32)
            _, read = ops.gather_all_entries(pool, table, PLAN, 0, entries=2, ratio=4, dtype=jnp.float32, **by)
            return read.values[0], ops.dequantize(ops.quantize(expected, **by), rows=2, **by)

        np.testing.assert_array_equal(*read_both(made[index].pool, expected))


@EACH
@pytest.mark.parametrize(
    "dtypes",
    [(ml_dtypes.bfloat16,) * 4, (ml_dtypes.bfloat16, np.float32, np.float32, ml_dtypes.bfloat16)],
    ids=["all bf16", "kv bf16, gate fp32"],
)
def test_dtypes_of_projections_and_weights_may_differ(device, seed, implementation, dtypes):
    """bf16 values in fp32 are the same values, so the same bytes are stored."""
    fp32 = (ENTRY_FORMATS["fp32"], KEY_FORMATS["fp32"])
    made = _update_csa(implementation, np.random.default_rng(seed), *fp32, dtypes)

    rng = np.random.default_rng(seed)
    inputs = []
    for width in (512, 128):
        given = _inputs(rng, width, dtypes)
        inputs.append(
            given._replace(**{n: np.asarray(x, np.float32) for n, x in given._asdict().items() if n != "rotary"})
        )
    rows = rng.normal(size=(8, 512)).astype(np.float32)
    options = {"window_format": FP32, "entry_format": fp32[0], "key_format": fp32[1], "eps": 1e-6}
    expected = jax.jit(functools.partial(ops_of(implementation).update_csa, **options))(
        _window(), _compressed(512, fp32[0]), _compressed(128, fp32[1]), rows, *inputs,
        np.zeros((1, 1), np.int32), PLAN, 0, 0,
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, made, expected)


@EACH
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_static"])
def test_a_window_of_a_format_that_windows_do_not_have_is_refused(implementation, name):
    vector_format, by = ENTRY_FORMATS[name], {"implementation": implementation}
    window, rows = _window(vector_format), np.zeros((8, 512), np.float32)
    calls = {
        "append_window": lambda: ops.append_window(*window, rows, PLAN, 0, format=vector_format, **by),
        "gather_window": lambda: ops.gather_window(*window, PLAN, 0, format=vector_format, **by),
        "update_swa": lambda: ops.update_swa(window, rows, PLAN, 0, format=vector_format, eps=1e-6, **by),
    }
    for op, call in calls.items():
        with pytest.raises(
            OperandError, match=f"{op}: windows are not stored as {name} of width 512; choose one of fp32"
        ):
            jax.eval_shape(call)


def test_the_handler_refuses_such_a_window_too():
    assert "dsv4_append_window" in REGISTERED["cpu"]
    page = ENTRY_FORMATS["nvfp4"].page_shape(128)
    window = jax.ShapeDtypeStruct((1, 1, *page), jnp.uint8)
    positions = jax.ShapeDtypeStruct((1, 1, 128), jnp.int32)
    bare = jax.ffi.ffi_call("dsv4_append_window", (window, positions), input_output_aliases={0: 0, 1: 1})
    attributes = {"tokens": np.int64(8), "requests": np.int64(1), "codec": "nvfp4", "global_scale": np.float32(1)}
    with pytest.raises(Exception, match="append_window: window cannot be stored: windows have no codec nvfp4"):
        jax.block_until_ready(
            bare(
                np.zeros(window.shape, np.uint8),
                np.zeros(positions.shape, np.int32),
                np.zeros((8, 512), np.float32),
                PLAN.packed,
                np.int32(0),
                **attributes,
            )
        )


@EACH
def test_another_dtype_of_rows_is_refused_while_tracing(implementation):
    fp8, by = ENTRY_FORMATS["fp8"], {"implementation": implementation, "dtype": jnp.float16}
    page, table = np.zeros(fp8.page_shape(4), np.uint8), np.zeros((1, 1), np.int32)
    pool = np.zeros((1, 1, *fp8.page_shape(32)), np.uint8)
    calls = (
        lambda: ops.dequantize(page, format=fp8, rows=4, **by),
        lambda: ops.gather_all_entries(pool, table, PLAN, 0, ratio=4, format=fp8, entries=1, **by),
        lambda: ops.gather_window(*_window(), PLAN, 0, format=FP32, **by),
    )
    for call in calls:
        with pytest.raises(OperandError, match="dtype is float16, expected float32 or bfloat16"):
            jax.eval_shape(call)


@pytest.mark.parametrize("ratio", [0, 3, -4, True, 4.0, "4", None])
def test_a_ratio_that_no_layer_has_is_refused(ratio):
    tail = np.zeros((1, 1, 2, 12, 512), np.float32)
    fp8, table = ENTRY_FORMATS["fp8"], np.zeros((1, 1), np.int32)
    pool = np.zeros((1, 1, *fp8.page_shape(32)), np.uint8)
    for call in (
        lambda: ops.rotate(tail, PLAN, 0, ratio=ratio),
        lambda: ops.gather_all_entries(pool, table, PLAN, 0, ratio=ratio, format=fp8, entries=1),
    ):
        with pytest.raises(OperandError, match=r"ratio is .*, expected 4 \(CSA\) or 128 \(HCA\)"):
            jax.eval_shape(call)


def test_numpy_integers_are_integers():
    tail = np.zeros((1, 1, 2, 12, 512), np.float32)
    rotated = [ops.rotate(tail, PLAN, layer, ratio=ratio) for layer, ratio in ((0, 4), (np.int64(0), np.int64(4)))]
    np.testing.assert_array_equal(*rotated)
    for count in (-1, 2.0, True):
        with pytest.raises(OperandError, match=r"rows is .*, expected an integer from 0 on"):
            jax.eval_shape(lambda n=count: ops.dequantize(np.zeros((2, 512), np.float32), format=FP32, rows=n))


def test_an_implementation_that_is_none_is_refused():
    with pytest.raises(ValueError, match="implementation must be one of native, reference, got 'cuda'"):
        ops.quantize(np.zeros((2, 512), np.float32), format=FP32, implementation="cuda")
