"""The examples of the pages in docs/ run and print what the pages say, and what they show about masks is right."""

import contextlib
import io
import re
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax as dsv4

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(
    page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md") if "```python" in page.read_text(encoding="utf-8")
)
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def run_page(name: str) -> dict:
    """Runs a page's examples one after the other, as a reader would; their names.

    A block of text right behind an example is what it prints.
    """
    names: dict = {"__name__": f"docs.{name}"}
    for block, shown in EXAMPLE.findall((DOCS / name).read_text(encoding="utf-8")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, f"docs/{name}", "exec"), names)
        if shown:
            assert printed.getvalue() == shown
    return names


@pytest.fixture
def gauges(monkeypatch):
    """What is registered with a stand-in of prometheus_client, which the tests do not install: gauges by name."""
    found: dict = {}
    client, core = types.ModuleType("prometheus_client"), types.ModuleType("prometheus_client.core")
    core.GaugeMetricFamily = lambda name, documentation, value: (name, value)
    client.REGISTRY = types.SimpleNamespace(register=lambda collector: found.update(collector.collect()))
    for module in (client, core):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page, gauges):
    names = run_page(page)
    if page == "prefixes.md":
        assert gauges == {f"vllm:{name}": value for name, value in names["manager"].metrics().items()}


def test_all_examples_are_found():
    for page in (*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert text.count("```py") == len(EXAMPLE.findall(text)), page


def test_prefill_masks_show_each_token_its_own_past(rng):
    """Rows hold their position and request, so what a token sees can be counted; chunks of several requests at once."""
    window_source = run_page("prefill.md")["window_source"]
    schema = dsv4.CacheSchema(dsv4.tiny_spec(), dsv4.PROFILES["exact"], slots=3, blocks=32, max_context=1024)
    manager, cache = dsv4.CacheManager(schema, token_buckets=[512]), dsv4.init_cache(schema)
    requests = [manager.admit() for _ in range(3)]
    for _ in range(4):
        counts = {request: int(rng.integers(1, 170)) for request in requests if rng.random() < 0.9}
        plan = manager.prepare_forward(counts)
        marks = plan.token_request * 10_000 + plan.token_position
        step = dsv4.begin(cache, plan)
        layer, before = step.layer(0).window_before(dtype=jnp.float32)
        rows = jnp.broadcast_to(jnp.asarray(marks, jnp.float32)[:, None], (len(marks), 512))
        marks_before = np.asarray(before.values[..., 0])
        layer = layer.append(rows)
        cache = layer.step.end(partial=True)
        values, seen = window_source(plan, before, layer.stored(rows, dtype=jnp.float32), schema.spec.window)
        assert marks_before.shape == (plan.layout.requests, schema.spec.window - 1)
        for token in np.flatnonzero(plan.token_position >= 0):
            position = plan.token_position[token]
            found = np.asarray(values)[np.asarray(seen)[token], 0] % 10_000
            assert sorted(found) == list(range(max(0, position - 127), position + 1))
