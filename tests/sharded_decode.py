"""The model's serving run on meshes of CPU devices, beside the same requests of each shard served on one device.

Run by test_sharded_decode.py with a seed, in a process of its own: JAX settles the number of devices when it starts.
By itself, with GPUs: ``XLA_FLAGS=--xla_gpu_autotune_level=0 python tests/sharded_decode.py SEED``. Two programs that
choose their matrix products by timing them would differ in last bits.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from aot import assert_in_place
from served import EXACT, TINY_CONFIG, model_of

from dsv4_jax import init_cache, shard_of
from dsv4_jax.deepseek_v4.placement import server_mesh, weight_sharding
from dsv4_jax.deepseek_v4.serve import Request, Server
from dsv4_jax.deepseek_v4.verify import verify

MESHES = ((1, 2), (2, 2), (4, 2), (8, 1))  # of 8 devices
# Whole blocks of 128 of what is split over two devices; and no array of a step has the shape of a pool.
CONFIG = TINY_CONFIG | {"o_lora_rank": 256, "moe_intermediate_size": 256}
# A shard's requests, one more than there are slots. One fills a window of 128, an entry of each kind and a ring.
LENGTHS = ((126, 5), (61, 3), (30, 3))
COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-[a-z]+)(?:-start)?\("
# A product summed in two parts has other last bits. So have what follows it: the logits, and the last layer's rows.
# 1.3e-6 of the largest is what other orders of sums amount to, see verify.py.
SUMS = 1e-5


class Programs:
    """A server's step, compiled ahead for each layout. What would have been traced again is refused by a program."""

    def __init__(self, step):
        self.step, self.of_layout = step, {}

    def __call__(self, cache, plan, *others):
        if plan.layout not in self.of_layout:
            self.of_layout[plan.layout] = self.step.lower(cache, plan, *others).compile()
        return self.of_layout[plan.layout](cache, plan, *others)


def requests_of(rng, shards):
    """The first of every shard, then the second of every shard, and so on: as they are admitted."""

    def tokens(count):
        return rng.integers(0, CONFIG["vocab_size"], count, dtype=np.int32)

    return [Request(tokens(prompt), new, tokens(new)) for prompt, new in LENGTHS for _ in range(shards)]


def make(model, mesh=None):
    options = {"slots": 2, "max_context": 256, "chunk": 64, "dtype": jnp.float32, "record": True}
    server = Server(*model, EXACT, mesh=mesh, **options)
    server._step = Programs(server._step)
    return server


def logits_and_experts(one):
    """Of a request: those after each of its steps."""
    logits = [np.asarray(record.logits)[record.row] for record in one.steps]
    last = [record.column + record.tokens - 1 for record in one.steps]
    experts = [np.asarray(record.choices.experts)[:, at] for record, at in zip(one.steps, last, strict=True)]
    return np.stack(logits), np.stack(experts)


def check_programs(server, single, tensor):
    programs, alone = server._step.of_layout, single._step.of_layout
    assert set(server.compiles.values()) == {1}
    assert set(server.compiles) == set(programs) == set(alone)
    for layout, compiled in programs.items():
        found = re.findall(COLLECTIVES, compiled.as_text())
        # In each layer the heads' parts are summed up, and the experts', and nothing else.
        assert found == ["all-reduce"] * (2 * len(server.schema.spec.layers) if tensor > 1 else 0), (layout, found)
        # As the same step takes on one device, but for how XLA lays buffers out: less than any large pool.
        temporary = alone[layout].memory_analysis().temp_size_in_bytes + (1 << 17)
        assert_in_place(compiled, dict(server.schema.arrays), temporary_bytes=temporary)


def check_cache(server, single, shard, tensor):
    mine, alone = shard_of(server.cache, shard).arrays, single.cache.arrays
    for name, array in mine.items():
        found, expected, what = np.asarray(array), np.asarray(alone[name]), f"shard {shard}: {name}"
        # Layers before the first sum are the same to the last bit.
        exact = found.dtype == np.int32 or tensor == 1
        of_first = found.shape[0] if exact else int(name == "window" or name.startswith("csa"))
        assert found[:of_first].tobytes() == expected[:of_first].tobytes(), what
        np.testing.assert_allclose(found, expected, rtol=SUMS, atol=SUMS * np.abs(expected).max(), err_msg=what)


def check_copies(cache):
    """Devices that share a shard hold the same bytes."""
    for name, array in cache.arrays.items():
        copies = {}
        for part in array.addressable_shards:
            copies.setdefault(str(part.index), set()).add(np.asarray(part.data).tobytes())
        assert all(len(bytes_of) == 1 for bytes_of in copies.values()), name


def run(rng, seed, single, data, tensor):
    mesh, requests = server_mesh(single.config, data=data, tensor=tensor), requests_of(rng, data)
    server = make(model_of(CONFIG, seed, sharding=weight_sharding(single.config, mesh)), mesh)
    served = server.serve(requests)
    assert [one.shard for one in served] == [number % data for number in range(len(requests))]
    check_copies(server.cache)
    for shard in range(data):
        single.cache = init_cache(single.schema)
        single.manager.reset()
        for one, alone in zip(served[shard::data], single.serve(requests[shard::data]), strict=True):
            assert (one.slot, one.tokens) == (alone.slot, alone.tokens)
            (found, experts), (expected, of_alone) = logits_and_experts(one), logits_and_experts(alone)
            if tensor == 1:
                np.testing.assert_array_equal(found, expected)
            # Where two scores differ in their last bits only, one may be chosen here and the other there: in the last
            # layer, which concerns its token alone.
            alike = (experts == of_alone).all(axis=(1, 2))
            assert alike.sum() >= alike.size - 1
            difference = np.abs(found - expected)[alike].max()
            assert difference <= SUMS * np.abs(expected).max(), f"{difference} of {np.abs(expected).max()}"
        check_cache(server, single, shard, tensor)
    check_programs(server, single, tensor)
    if (data, tensor) == (2, 2):
        result = verify(server, served)
        assert result.passed, result
    print(f"equal: {data} x {tensor}")


def main(seed):
    devices = jax.device_count()
    rng, single = np.random.default_rng(seed), make(model_of(CONFIG, seed))
    for data, tensor in MESHES if devices == 8 else dict.fromkeys([(1, 2), (devices // 2, 2), (devices, 1)]):
        run(rng, seed, single, data, tensor)


if __name__ == "__main__":
    main(int(sys.argv[1]))
