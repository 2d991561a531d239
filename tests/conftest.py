"""What every test shares: the environment JAX starts in, the printed seed, and the `gpu` marker."""

import os
import secrets
from pathlib import Path

import numpy as np
import pytest

GPU_PRESENT = Path("/dev/nvidiactl").exists()

if not GPU_PRESENT:
    # The CUDA plugin may be installed for ahead-of-time compilation; it must not try to start a device.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat a run: the seed that a failing test printed")


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--seed")
    if hasattr(config, "workerinput"):
        given = config.workerinput["seed"]
    config.stash[_SEED] = secrets.randbelow(2**31) if given is None else given


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """One seed for all processes of pytest-xdist."""
    node.workerinput["seed"] = node.config.stash[_SEED]


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.stash[_SEED]} (repeat with --seed), GPU: {'yes' if GPU_PRESENT else 'no'}"


LONG = ("test_lifecycle.py", "test_sharded_decode.py", "test_bench_cli.py", "test_sharded_life.py")
"""Begun first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    if GPU_PRESENT:
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


_SEED = pytest.StashKey[int]()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed in every run, printed; `--seed` repeats one."""
    value = request.config.stash[_SEED]
    print(f"--seed {value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A generator seeded with `seed`."""
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def module_rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """One of a module's own, for what its tests share; with the run's seed, which the header prints."""
    return np.random.default_rng(request.config.stash[_SEED])


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest):
    """Run the test once on the CPU and once on the GPU, as JAX's default device."""
    import jax

    chosen = jax.devices(request.param)[0]
    with jax.default_device(chosen):
        yield chosen
