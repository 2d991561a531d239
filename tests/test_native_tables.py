"""Tables that Python and the native module both keep, and what is said where they differ."""

import re
import types
from pathlib import Path

import dsv4_jax_native
import numpy as np
import pytest

from dsv4_jax import ops
from dsv4_jax.native import digest
from dsv4_jax.native.call import call
from dsv4_jax.native.compatibility import REBUILD, NativeModuleError
from dsv4_jax.native.signatures import SIGNATURES
from dsv4_jax.ops.attend import api as attend

ATTEND = Path(__file__).parents[1] / "ffi/cuda/attend"


def test_the_tables_are_equal():
    ours, theirs = digest.of_python(), digest.of_module(dsv4_jax_native)
    assert ours == theirs
    assert all(ours.values())
    assert set(ours["op"]) == {name for name in vars(ops) if name in SIGNATURES}


def _module(**changed):
    """A native module with one of its tables changed."""
    tables = {name: getattr(dsv4_jax_native, name) for name in ("signatures", "codecs", "kinds", "plan_offsets")}
    return types.SimpleNamespace(**tables | {name: lambda *_, made=made: made for name, made in changed.items()})


def _swapped_signatures():
    operands, results, attributes = dsv4_jax_native.signatures()["compress"]
    return dsv4_jax_native.signatures() | {"compress": (operands.replace("cos sin", "sin cos"), results, attributes)}


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"signatures": _swapped_signatures()}, "op compress"),
        ({"signatures": {k: v for k, v in dsv4_jax_native.signatures().items() if k != "flush"}}, "op flush"),
        ({"codecs": dsv4_jax_native.codecs() | {("fp8", 512): (512, 8, 1)}}, r"format \('fp8', 512\)"),
        ({"kinds": dsv4_jax_native.kinds() | {"csa": (2, 12)}}, "kind csa"),
        ({"plan_offsets": dsv4_jax_native.plan_offsets(1, 1) | {"token_slot": 1}}, "plan field"),
    ],
    ids=["signature", "missing op", "format", "kind", "plan"],
)
def test_a_module_of_another_version_is_refused(changed, what):
    digest.check_digest(_module())
    with pytest.raises(NativeModuleError, match=f"does not fit this dsv4_jax: {what}") as raised:
        digest.check_digest(_module(**changed))
    assert raised.value.command == REBUILD


def test_a_module_without_tables_is_refused():
    with pytest.raises(NativeModuleError, match="of another version"):
        digest.check_digest(types.SimpleNamespace(plan_offsets=dsv4_jax_native.plan_offsets))


@pytest.mark.parametrize("wrong", [{}, {"rows": 0, "page": 0}, {"row": 0}])
def test_operands_that_the_op_does_not_have_are_refused(wrong):
    signature = SIGNATURES["quantize"]
    with pytest.raises(TypeError, match="quantize has the operands rows; got"):
        call(signature, {name: np.zeros((1, 512), np.float32) for name in wrong}, codec="fp32", global_scale=1.0)


def test_every_result_and_attribute_has_to_be_named():
    signature, rows = SIGNATURES["quantize"], {"rows": np.zeros((1, 512), np.float32)}
    with pytest.raises(TypeError, match="quantize has the results page; got"):
        call(signature, rows, codec="fp32", global_scale=1.0)
    with pytest.raises(TypeError, match="quantize has the attributes codec, global_scale; got codec"):
        call(signature, rows, results={"page": ((1, 512), np.float32)}, codec="fp32")


def test_what_attend_plans_with_is_what_its_kernels_have():
    """Workspace is allocated in Python; Hopper's kernels that fill it have the same tiles and clusters."""
    sources = "".join((ATTEND / name).read_text() for name in ("rows.cuh", "shared.cuh", "../../ops/params.h"))
    in_kernels = {name: int(value) for name, value in re.findall(r"^constexpr int (k\w+) = (\d+);", sources, re.M)}
    assert (
        in_kernels["kTileRows"],
        in_kernels["kAttendedHeads"],
        in_kernels["kLargestCluster"],
    ) == (attend._TILE_ROWS, max(attend._BLOCK_HEADS), max(attend._CLUSTERS_AT_ONCE))
