"""safetensors files: what is written reads the same, and no bytes bring anything but tensors or TensorFileError."""

import contextlib
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_jax.deepseek_v4.checkpoint_folder import CheckpointError, read_folder
from dsv4_jax.tensor_files import TensorFileError, read_file, write_file


def test_a_written_file_reads_the_same(tmp_path, rng):
    dtypes = [
        *(bool, *"bBhHiIqQefd"),
        *(getattr(ml_dtypes, f"float8_{kind}") for kind in ("e4m3fn", "e5m2", "e8m0fnu")),
    ]
    tensors = {}
    for index, dtype in enumerate([*dtypes, ml_dtypes.bfloat16]):
        shape = tuple(rng.integers(0, 4, rng.integers(0, 4)))
        data = rng.integers(0, 2, (*shape, np.dtype(dtype).itemsize), np.uint8)
        tensors[f"tensor {index} ü"] = data.reshape(-1).view(dtype).reshape(shape)
    write_file(tmp_path / "some.safetensors", tensors)
    found = read_file(tmp_path / "some.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert tensor.array.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert tensor.array.tobytes() == tensors[name].tobytes()
        assert tensor.array.flags.aligned
        assert not tensor.array.flags.writeable


def header_file(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return file


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DAMAGED = {
    "no length": (b"", b"", None, r"no safetensors file: it has 8 bytes|its JSON"),
    "a length beyond the file": (b"{}", b"", 2**60, r"its header would have"),
    "no JSON": (b"nothing", b"", None, r"its JSON cannot be read"),
    "no UTF-8": (b'{"\xff": 1}', b"", None, r"its JSON cannot be read"),
    "deep JSON": (b'{"a":' + b"[" * 10_000, b"", None, r"its JSON cannot be read"),
    "a list": (b"[]", b"", None, r"its JSON is a list"),
    "a name twice": (b'{"a": 1, "a": 2}', b"", None, r"'a' occurs twice"),
    "no entry": ({"some.weight": 7}, b"", None, r"'some.weight' is 7"),
    "dtype": ({"some.weight": entry("F4")}, bytes(8), None, r"'some.weight' has dtype 'F4'"),
    "shape": ({"some.weight": entry(shape=[-2])}, bytes(8), None, r"'some.weight' has shape \[-2\]"),
    "no such array": (
        {"some.weight": entry(shape=[2**62, 2**62, 0], offsets=(0, 0))},
        b"",
        None,
        r"'some.weight' has shape \[.*, 0\], more than any array has",
    ),
    "axes": ({"some.weight": entry(shape=[1] * 65, offsets=(0, 4))}, bytes(4), None, r"'some.weight' .* of 65 axes"),
    "shape of a bool": ({"some.weight": entry(shape=[True])}, bytes(8), None, r"'some.weight' has shape \[True\]"),
    "offsets": ({"some.weight": entry(offsets=[0, 4, 8])}, bytes(8), None, r"'some.weight' has data_offsets"),
    "backwards": ({"some.weight": entry(offsets=[8, 0])}, bytes(8), None, r"'some.weight' lies from byte 8 to 0"),
    "size": ({"some.weight": entry(shape=[3])}, bytes(8), None, r"'some.weight' lies from .* takes 12 bytes"),
    "beyond the end": ({"some.weight": entry()}, bytes(7), None, r"its tensors take 8 bytes, and it has 7; .* cut off"),
    "bytes left over": ({"some.weight": entry()}, bytes(9), None, r"its tensors take 8 bytes, and it has 9"),
    "overlap": (
        {"a": entry(), "some.weight": entry(offsets=[4, 12])},
        bytes(12),
        None,
        r"'some.weight' begins at byte 4 of the data, where byte 8 is next",
    ),
    "hole": ({"some.weight": entry(offsets=[4, 12])}, bytes(12), None, r"'some.weight' begins at byte 4 .* 0 is next"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused(damage, tmp_path):
    header, data, length, message = DAMAGED[damage]
    file = header_file(tmp_path, header if isinstance(header, bytes) else json.dumps(header).encode(), data, length)
    with pytest.raises(TensorFileError, match=message):
        read_file(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_folder(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_file_brings_anything_but_the_error(data, tmp_path):
    """Whatever the bytes: tensors within the file that do not overlap, or TensorFileError."""
    count = st.one_of(st.integers(-2, 20), st.integers(), st.booleans(), st.floats(), st.none(), st.text(max_size=2))
    counts = st.one_of(st.lists(st.integers(0, 6), max_size=3), st.lists(count, max_size=3), count)
    dtype = st.one_of(st.sampled_from(["F32", "BF16", "F8_E8M0", "I64", "F4", ""]), count)
    fields = {"dtype": dtype, "shape": counts, "data_offsets": counts}
    one = st.one_of(st.fixed_dictionaries(fields), st.fixed_dictionaries({}, optional=fields), count)
    headers = st.dictionaries(st.one_of(st.just("__metadata__"), st.text(max_size=3)), one, max_size=3)
    header = data.draw(st.one_of(headers.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40)))
    content = struct.pack("<Q", len(header)) + header + data.draw(st.binary(max_size=24))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with contextlib.suppress(TensorFileError):
        tensors = read_file(file).values()
        assert sum(tensor.array.nbytes for tensor in tensors) == len(content) - 8 - len(header)
