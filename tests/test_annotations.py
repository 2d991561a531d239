"""Shapes in annotations are those of the arrays: what public functions are given and return in a step is checked."""

import contextlib
import functools
import inspect
import types
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from harness import SPEC, Driver, inputs_of, random_tokens, random_weights

import dsv4_jax
from dsv4_jax import CacheFormats, RawRows, begin, ops, token_rotary
from dsv4_jax.cache import rotary as step_rotary
from dsv4_jax.cache.layer_reads import LayerReads
from dsv4_jax.cache.layer_state import LayerState
from dsv4_jax.cache.layer_writes import LayerWrites
from dsv4_jax.cache.step import Step
from dsv4_jax.ops.attend.operands import Attended
from dsv4_jax.ops.operands import CompressorInputs, Rows
from dsv4_jax.spec.rotary import Rotary

NAMES = {name: getattr(jaxtyping, name) for name in ("Array", "Bool", "Float", "Float32", "Int32")} | {"Step": Step}
STRUCTURES = (Attended, CompressorInputs, RawRows, Rotary, Rows)
HEADS = 6  # not as many as tokens, requests or index heads


def annotations(thing):
    """The annotations of a function or class, with what only type checkers import."""
    return typing.get_type_hints(thing, localns=NAMES)


def is_shape(hint):
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def has_shape(hint):
    return is_shape(hint) or hint in STRUCTURES or any(map(has_shape, typing.get_args(hint)))


def fits(value, hint):
    """Whether a value is what its annotation says, as far as that is of arrays with shapes."""
    if is_shape(hint):
        return isinstance(value, hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple and Ellipsis not in (parts := typing.get_args(hint)):
        return len(value) == len(parts) and all(map(fits, value, parts))
    if hint in STRUCTURES:
        return isinstance(value, hint) and fields_fit(value, annotations(hint))
    return value is None if hint is types.NoneType else True


def fields_fit(structure, hints):
    # A layer has two compressors, whose axes differ.
    own_axes = jaxtyping.jaxtyped("context") if isinstance(structure, CompressorInputs) else contextlib.nullcontext()
    with own_axes:
        return all(fits(getattr(structure, name), hint) for name, hint in hints.items())


def checked(function, seen):
    """The function, which asserts that its arguments and results fit; an axis has one size within a call."""
    hints, signature = annotations(function), inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        __tracebackhide__ = True
        given = signature.bind(*args, **kwargs).arguments
        with jaxtyping.jaxtyped("context"):
            for name, value in given.items():
                assert fits(value, hints.get(name)), f"{function.__qualname__}: {name} is not {hints[name]}: {value}"
            result = function(*args, **kwargs)
            assert fits(result, hints.get("return")), f"{function.__qualname__}: not {hints['return']}: {result}"
        seen.add(function.__qualname__)
        return result

    return call


def check_everything(monkeypatch):
    """All public functions with shapes, checked from here on; the names of all, and of those called so far."""
    public = [(ops, name) for name in ops.__all__]
    public += [(owner, name) for owner in (LayerState, LayerReads, LayerWrites) for name in vars(owner)]
    public += [(step_rotary, "closing_positions"), (dsv4_jax, "apply_rotary")]
    named, seen = set(), set()
    for owner, name in public:
        found = inspect.getattr_static(owner, name)
        function = found.fget if isinstance(found, property) else found
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        if any(map(has_shape, annotations(function).values())):
            named.add(function.__qualname__)
        wrapped = checked(function, seen)
        monkeypatch.setattr(owner, name, property(wrapped) if isinstance(found, property) else wrapped)
    return named, seen


def whole_step(cache, given, brought, driver):
    """A step that calls everything: every layer written as a whole and by its parts, and every read."""
    step = begin(cache, given, implementation="native")
    plan = step.plan
    queries = jnp.ones((plan.layout.tokens, HEADS, 512), jnp.bfloat16)
    read = []
    for index, arrays in enumerate(brought):
        layer, rope = step.layer(index), SPEC.layers[index].rope
        inputs = [inputs_of(plan, SPEC, index, driver.weights[index], arrays, prefix) for prefix in ("", "index_")]
        rotary = token_rotary(plan, rope)
        raw = RawRows(arrays["rows"], jnp.ones(512), rotary)
        read.append(layer.window_before())
        by_op, rows = layer, layer.normalize(raw)
        if inputs[0] is not None:
            by_op, entries = by_op.compress(inputs[0])
            by_op = by_op.flush(entries)
        if inputs[1] is not None:
            by_op, keys = by_op.compress_keys(inputs[1])
            by_op = by_op.flush_keys(keys)
        read.append((by_op.append(rows, *inputs).step.cache, layer.stored(rows)))
        read.append(layer.update(rows, *inputs).step.cache)
        layer = layer.update(raw, *inputs)
        options = {"rotary": rotary}
        if inputs[1] is not None:
            heads = SPEC.index_num_heads
            index_queries = layer.transform_query(jnp.ones((plan.layout.tokens, heads, 128)))
            head_weights = jnp.ones((plan.layout.tokens, heads))
            layer, indices, scores = layer.index_topk(index_queries, head_weights, k=3, scores=True)
            layer, options["indices"] = layer.index_topk(index_queries, head_weights, k=3)
            read += [indices, scores, layer.entries(indices)[1], layer.all_keys(5)[1], layer.visible]
        if inputs[0] is not None:
            read.append(layer.all_entries(2)[1])
        read.append(layer.window()[1])
        layer, _ = layer.attend(queries, **options)
        layer, attended = layer.attend(queries, jnp.zeros(HEADS), **options)
        read.append((attended, dsv4_jax.apply_rotary(attended.output, rotary)))
        step = layer.step
    tail, plan = step.cache.pools["csa_tail"], step.plan
    read.append(ops.rotate(tail, plan, 0, ratio=4))
    return jax.tree.map(jnp.shape, read), step.end()


def trace_steps(rng, tokens):
    """Traces a step for each of these numbers of tokens a request; shapes are the same as when it runs."""
    driver = Driver(random_weights(rng), CacheFormats(keys_hadamard=True), buckets=(4, 64))
    requests = [driver.admit(random_tokens(rng, 40)) for _ in range(3)]
    for count in tokens:
        plan, brought = driver.prepare(dict.fromkeys(requests, count))
        jax.eval_shape(functools.partial(whole_step, driver=driver), driver.cache, plan, brought)


def test_a_steps_arrays_are_as_annotated(rng, monkeypatch):
    named, seen = check_everything(monkeypatch)
    trace_steps(rng, (1, 9))
    assert len(named) > 30
    assert named <= seen


@pytest.mark.parametrize(
    ("changed", "name", "wrong"),
    [
        (ops.attend_window, "queries", 'Int32[Array, "tokens heads 512"]'),
        (ops.attend_window, "sinks", 'Float[Array, " tokens"]'),
        (ops.attend_all_entries, "sinks", 'Float[Array, " heads"]'),  # may be left out
        (ops.normalize, "return", 'Float32[Array, "512 tokens"]'),
        (LayerReads.index_topk, "head_weights", 'Float[Array, "tokens index_heads 128"]'),
        (Attended, "lse", 'Float32[Array, "heads tokens"]'),
        (CompressorInputs, "gate", 'Float[Array, "tokens tokens"]'),
        (Rotary, "cos", 'Float32[Array, "pairs"]'),
    ],
)
def test_a_wrong_annotation_is_found(rng, monkeypatch, changed, name, wrong):
    monkeypatch.setitem(changed.__annotations__, name, typing.ForwardRef(wrong))
    check_everything(monkeypatch)
    with pytest.raises(AssertionError, match=r"is not |: not "):
        trace_steps(rng, (1,))
