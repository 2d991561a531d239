"""Whatever a file says, its parser reads it or raises the error that it documents, in memory of the file's size.

How much: FUZZ_EXAMPLES=3000 in the environment, for a night. Hypothesis prints how a failure is repeated (the text or
the bytes); a run is repeated by its --hypothesis-seed.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from fuzz import RAW, damaged_bytes, damaged_json, encoded, small_memory
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_checkpoint import CONFIG

from dsv4_jax import (
    PROFILES,
    CacheSchema,
    ConfigError,
    ModelSpec,
    RequestState,
    StateError,
    load_state,
    model_spec,
    tensor_files,
)
from dsv4_jax.cache import pools
from dsv4_jax.deepseek_v4.checkpoint import load_checkpoint
from dsv4_jax.deepseek_v4.checkpoint_folder import CheckpointError, read_folder
from dsv4_jax.deepseek_v4.config import DeepseekV4Config, read_config
from dsv4_jax.deepseek_v4.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from dsv4_jax.deepseek_v4.tokens import load_tokenizer
from dsv4_jax.host.parking import RequestRecord, describe_requests, differences
from dsv4_jax.layout import plan
from dsv4_jax.layout.plan import PlanLayout
from dsv4_jax.layout.schema import SchemaError
from dsv4_jax.parking import files
from dsv4_jax.spec.presets import tiny_spec
from dsv4_jax.tensor_files import TensorFileError, read_file

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
TINY = json.loads((Path(__file__).parent / "data" / "tiny_deepseek_v4" / "config.json").read_text())
SMALL = dict(SMALL_CONFIG)
SCHEMA = CacheSchema(tiny_spec(), PROFILES["default"], slots=2, blocks=9, max_context=500)
DEEP = "[" * 100_000
TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def fuzz(examples: int = EXAMPLES):
    return settings(
        max_examples=max(examples, 1),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def is_whole(spec):
    """A spec that was accepted can be used: hashed, described, and asked for its bytes."""
    assert isinstance(spec, ModelSpec)
    assert isinstance(spec.name, str)
    hash(spec)
    schema = CacheSchema(spec, PROFILES["default"], slots=1, blocks=1, max_context=1)
    assert CacheSchema.from_json(schema.to_json()) == schema
    assert len(schema.fingerprint) == 16
    assert str(schema.memory_bytes)


@contextlib.contextmanager
def refused_as(kind, message):
    """As ``suppress``, for a kind that Python's own errors are of too: it has to be the one with this message."""
    try:
        yield
    except kind as error:
        if message not in str(error):
            raise


# config.json


@fuzz(3 * EXAMPLES)
@given(text=st.one_of(damaged_json(SMALL), damaged_json(TINY), RAW), mtp=st.booleans())
@example(text='{"a": ' + DEEP, mtp=False)
@example(text=json.dumps(SMALL | {"rms_norm_eps": 10**400}), mtp=False)
@example(text=json.dumps(SMALL | {"partial_rotary_factor": 1e308}), mtp=False)
@example(text=json.dumps(SMALL | {"_name_or_path": ["a"]}), mtp=False)
@example(text=json.dumps(SMALL | {"num_hash_layers": "3"}), mtp=False)
@example(text=json.dumps(SMALL | {"eos_token_id": 1.5}), mtp=False)
@example(text=json.dumps(SMALL | {"mlp_layer_types": [["moe"]] * 9}), mtp=False)
@example(text=json.dumps(SMALL)[:-1] + ', "index_topk": 3}', mtp=False)
def test_a_config_is_read_or_refused(text, mtp, tmp_path):
    (tmp_path / "config.json").write_bytes(encoded(text))
    with small_memory(len(text)):
        with contextlib.suppress(ConfigError):
            is_whole(model_spec(tmp_path, include_mtp=mtp))
        with contextlib.suppress(ConfigError):
            config = read_config(tmp_path)
            assert isinstance(config, DeepseekV4Config)
            hash(config)
            is_whole(config.spec)


@fuzz()
@given(data=st.one_of(st.binary(max_size=50), damaged_bytes(json.dumps(TINY).encode())))
def test_config_bytes_are_read_or_refused(data, tmp_path):
    (tmp_path / "config.json").write_bytes(data)
    for read in (model_spec, read_config):
        with contextlib.suppress(ConfigError):
            read(tmp_path)


@pytest.mark.parametrize("read", [model_spec, read_config])
@pytest.mark.parametrize("again", ["128", "129"])
def test_a_config_says_nothing_twice(read, again, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL)[:-1] + f', "hidden_size": {again}}}')
    with pytest.raises(ConfigError, match=r"'hidden_size' occurs twice"):
        read(tmp_path)


# Saved states


def some_state() -> RequestState:
    """A state of two blocks, of arrays of every kind of number, and one without bytes."""
    rng = np.random.default_rng(5)
    some = lambda dtype, *shape: rng.integers(0, 99, shape).astype(dtype)  # noqa: E731
    slot = {"window": some("u1", 2, 12), "hca_tail": some("<f4", 1, 6), "empty": some("u1", 0, 5)}
    chunk = {"csa_entries": some("u1", 1, 2, 30), "csa_keys": some("i1", 2, 2, 8)}
    tokens = some(np.int32, 200)
    record = RequestRecord(describe_requests(SCHEMA), 190, 2, 190, 0, 190, tokens, b"salt", (0, 1))
    return RequestState(record, slot, (chunk,))


STATE = some_state().to_bytes()
(_LENGTH,) = struct.unpack("<Q", STATE[:8])
HEADER, DATA = json.loads(STATE[8 : 8 + _LENGTH]), STATE[8 + _LENGTH :]
CONTENT = json.loads(HEADER["__metadata__"][files._KEY])


def file_with(header: str, data: bytes = DATA) -> bytes:
    text = encoded(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def state_with(content: str, header: dict = HEADER, data: bytes = DATA) -> bytes:
    """A file with what whoever wants to deceive writes about its request, all checksums being right."""
    metadata = {files._KEY: content, files._DIGEST: hashlib.sha256(encoded(content)).hexdigest()}
    return file_with(json.dumps(header | {"__metadata__": metadata}, separators=(",", ":")), data)


def without_bytes(blocks: int, pages: dict) -> bytes:
    """A file that says a number of blocks, and has arrays of blocks without a byte."""
    of = {"tokens": np.zeros(0, np.int32)} | {f"blocks.{name}": np.zeros(shape, "u1") for name, shape in pages.items()}
    sums = {name: files._digest(array) for name, array in of.items()}
    content = json.dumps(CONTENT | {"blocks": blocks, "stored": 0, "sha256": sums})
    digest = hashlib.sha256(content.encode()).hexdigest()
    return b"".join(tensor_files.encode(of, {files._KEY: content, files._DIGEST: digest}))


def read_or_refused(data: bytes) -> None:
    with small_memory(len(data)), contextlib.suppress(StateError):
        state = RequestState.from_bytes(data)
        assert RequestState.from_bytes(again := state.to_bytes()).to_bytes() == again
        differences(describe_requests(SCHEMA), state.record.made_for)
        assert files.misfit(SCHEMA, state.record, state.slot, state.blocks)  # for it is made up


def test_the_state_that_is_damaged_here_is_one():
    again = RequestState.from_bytes(STATE)
    assert again.to_bytes() == STATE == state_with(json.dumps(CONTENT, sort_keys=True))
    read_or_refused(STATE)


@fuzz(3 * EXAMPLES)
@given(data=damaged_bytes(STATE))
@example(data=STATE.replace(b'"slot.window":{"dtype":"U8"', b'"slot.window":{"dtype":"I8"'))
@example(data=STATE.replace(b'"shape":[0,5]', b'"shape":[0,6]'))
@example(data=STATE.replace(b"} ", b"}\t", 1) if b"} " in STATE else STATE[:-1])
def test_a_damaged_state_is_refused(data, tmp_path):
    if data == STATE:  # such as a byte dropped from a run of equal ones, and the same byte put in
        return
    with pytest.raises(StateError):
        RequestState.from_bytes(data)
    (tmp_path / "state").write_bytes(data)
    with pytest.raises(StateError):
        load_state(tmp_path / "state")


@fuzz()
@given(data=st.one_of(st.binary(max_size=60), damaged_json(HEADER).map(file_with), RAW.map(file_with)))
@example(data=file_with(json.dumps(HEADER | {"x": TENSOR | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}})))
@example(data=file_with(json.dumps(HEADER | {"x": TENSOR | {"shape": [1] * 70, "data_offsets": [0, 4]}})))
@example(data=file_with(json.dumps(HEADER | {"x": TENSOR | {"shape": [2**62] * 400}})))
@example(data=file_with(json.dumps({"__metadata__": {files._KEY: "\ud800"}}), b""))
def test_a_state_with_another_header_is_refused(data):
    read_or_refused(data)


@fuzz(2 * EXAMPLES)
@given(content=st.one_of(damaged_json(CONTENT), RAW))
@example(content=json.dumps(CONTENT | {"made_for": DEEP}))
@example(content=json.dumps(CONTENT | {"made_for": '{"\ud800": 1}'}))
@example(content=json.dumps(CONTENT | {"made_for": '{"a": ' + "[" * 300 + "]" * 300 + "}"}))
@example(content=json.dumps(CONTENT | {"sha256": ["tokens"]}))
def test_a_state_that_says_something_else_is_read_or_refused(content):
    read_or_refused(state_with(content))


@pytest.mark.parametrize("pages", [{}, {"csa_entries": (0, 2**31 - 1, 4)}], ids=["none", "of no layer"])
def test_blocks_without_bytes_are_refused(pages):
    with small_memory(10_000), pytest.raises(StateError, match="other tensors than a request of 2147483647 blocks"):
        RequestState.from_bytes(without_bytes(2**31 - 1, pages))


# Checkpoints


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed") / "release"
    write_random_checkpoint(folder, CONFIG, 3)
    return folder


def header_and_data(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def loaded_or_refused(folder: Path, size: int) -> None:
    with small_memory(size), contextlib.suppress(CheckpointError, ConfigError):
        load_checkpoint(folder)


@fuzz(EXAMPLES // 2)
@given(data=st.data())
def test_a_checkpoint_is_loaded_or_refused(data, release, tmp_path):
    """With another header, config or index, or other bytes in the first 100,000."""
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(release, folder)
    file = folder / "model.safetensors"
    header, tensors = header_and_data(file)
    size = file.stat().st_size
    match data.draw(st.sampled_from(("header", "header", "config", "bytes", "index"))):
        case "header":
            few = data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3, unique=True))
            text = data.draw(damaged_json({name: header[name] for name in few}))
            rest = json.dumps({name: entry for name, entry in header.items() if name not in few})
            file.write_bytes(file_with(rest[:-1] + "," + text[1:], tensors))
        case "config":
            (folder / "config.json").write_bytes(encoded(data.draw(damaged_json(CONFIG))))
        case "bytes":
            file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
        case _:
            places = dict.fromkeys(list(header)[: data.draw(st.sampled_from([3, len(header)]))], file.name)
            index = data.draw(st.one_of(damaged_json({"metadata": {}, "weight_map": places}), RAW))
            (folder / "model.safetensors.index.json").write_bytes(encoded(index))
    loaded_or_refused(folder, size)


@pytest.mark.parametrize("name", ["x" * 5000, "\0", "\ud800", "..", "", ".", "model.safetensors\0"])
def test_no_index_names_another_file(name, release, tmp_path):
    shutil.copytree(release, tmp_path / "copy")
    index = tmp_path / "copy" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": name}}))
    with pytest.raises(CheckpointError, match=r"which is not beside it|half of a surrogate pair"):
        read_folder(tmp_path / "copy")


@pytest.mark.parametrize("key", ["n_routed_experts", "vocab_size", "hidden_size", "hc_mult", "o_lora_rank"])
@pytest.mark.parametrize("value", [2**31 - 1, 10**9 + 7, 10**30])
def test_a_config_of_a_huge_model_is_refused_at_once(key, value, release, tmp_path):
    shutil.copytree(release, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    with small_memory(1 << 20), pytest.raises((CheckpointError, ConfigError)):
        load_checkpoint(tmp_path / "copy")


@fuzz()
@given(text=damaged_json({"a": TENSOR, "b": TENSOR | {"data_offsets": [24, 48]}, "__metadata__": {"format": "pt"}}))
def test_a_tensor_file_is_read_or_refused(text, tmp_path):
    (tmp_path / "one").write_bytes(data := file_with(text, bytes(48)))
    with small_memory(len(data)), contextlib.suppress(TensorFileError):
        assert sum(tensor.array.nbytes for tensor in read_file(tmp_path / "one").values()) == 48


TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": 2,
            "content": "<s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": [["a", "b"]]},
}


PADDING = {
    "strategy": {"Fixed": 10**12},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "a",
}


@pytest.mark.skipif(importlib.util.find_spec("tokenizers") is None, reason="the package tokenizers is not installed")
@fuzz()
@given(text=st.one_of(damaged_json(TOKENIZER), RAW))
@example(text=json.dumps(TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": {"a": 0, "b": 1, "ab": 5000}}}))
@example(text=json.dumps(TOKENIZER | {"padding": PADDING}))
@example(text=json.dumps(TOKENIZER | {"model": TOKENIZER["model"] | {"continuing_subword_prefix": "##"}}))
def test_a_tokenizer_is_read_or_refused(text, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(encoded(text))
    with contextlib.suppress(CheckpointError):
        tokenizer = load_tokenizer(tmp_path, 1000)
        assert all(0 <= token < 1000 for token in tokenizer.encode("ab <s>b"))


# What a Cache and a plan are in an exported program


@fuzz(2 * EXAMPLES)
@given(text=st.one_of(damaged_json(json.loads(SCHEMA.to_json())), RAW))
@example(text='{"spec": ' + DEEP)
@example(text=SCHEMA.to_json().replace('"norm_eps": 1e-06', f'"norm_eps": {10**400}'))
@example(text=SCHEMA.to_json().replace('"window": 128', f'"window": {"9" * 4000}'))
@example(text=SCHEMA.to_json()[:-1] + ', "slots": 3}')
def test_a_schema_is_read_or_refused(text):
    with small_memory(len(text)), contextlib.suppress(SchemaError):
        schema = CacheSchema.from_json(text)
        hash(schema)
        assert CacheSchema.from_json(schema.to_json()) == schema
        assert len(schema.fingerprint) == 16
        assert str(schema.memory_bytes)


STATIC = json.loads(pools._static_to_bytes((SCHEMA, 2, True)))
LAYOUT = dataclasses.asdict(PlanLayout(8, 2, "f" * 16, False))


@fuzz()
@given(text=st.one_of(damaged_json(STATIC), RAW))
@example(text=DEEP)
@example(text=json.dumps([STATIC[0], 10**30, True]))
def test_a_cache_of_an_exported_program_is_read_or_refused(text):
    with small_memory(len(text)), contextlib.suppress(SchemaError):
        schema, shards, partitioned = pools._static_from_bytes(bytearray(encoded(text)))
        assert isinstance(schema, CacheSchema)
        assert type(shards) is int
        assert shards >= 1
        assert type(partitioned) is bool


@fuzz()
@given(text=st.one_of(damaged_json(LAYOUT), RAW))
@example(text=DEEP)
@example(text=json.dumps(LAYOUT | {"tokens": "8"}))
@example(text=json.dumps(LAYOUT | {"tokens": 10**30}))
def test_a_plan_of_an_exported_program_is_read_or_refused(text):
    with small_memory(len(text)), refused_as(ValueError, "no StepPlan of an exported"):
        (layout,) = plan._layout_from_bytes(bytearray(encoded(text)))
        hash(layout)
        assert json.loads(plan._layout_to_bytes((layout,))) == dataclasses.asdict(layout)
        assert 0 < layout.size < 2**31
