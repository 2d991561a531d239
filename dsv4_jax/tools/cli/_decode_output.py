"""What `dsv4-jax decode` prints: text as it comes, and the tables of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
from rich.console import Console
from rich.table import Table

from dsv4_jax import CacheSchema

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dsv4_jax.deepseek_v4.phases import Phase
    from dsv4_jax.deepseek_v4.serve import Server
    from dsv4_jax.deepseek_v4.tokens import Tokenizer
    from dsv4_jax.deepseek_v4.verify import Verification

_LONG_CONTEXTS = (65_536, 1_048_576)


class StreamedText:
    """Prints the text of one request as it comes, and of the next one when that has ended: a ``Listener``.

    Args:
      console: where to.
      tokenizer: of the text.
      titles: one line for each request, printed before its text; empty for none.
    """

    def __init__(self, console: Console, tokenizer: Tokenizer, titles: Sequence[str]) -> None:
        self._console, self._titles = console, titles
        self._streams = [tokenizer.stream() for _ in titles]
        self._held = [""] * len(titles)
        self._ended = [False] * len(titles)
        self._speaking = -1
        self._go_on()

    def ran(self, phase: Phase, tokens: int) -> None:
        """Prints nothing."""

    def found(self, number: int, tokens: int) -> None:
        """Prints nothing."""

    def chose(self, number: int, token: int) -> None:
        """Prints the text that the token completes, or holds it back until it is the request's turn."""
        self._say(number, self._streams[number].push(token))

    def ended(self, number: int) -> None:
        """Prints what is held back of the request, and of those after it that ended earlier."""
        self._ended[number] = True
        self._say(number, self._streams[number].finish() + "\n")
        if number == self._speaking:
            self._go_on()

    def _go_on(self) -> None:
        """Turns to the next request, and on until one has not ended."""
        while self._speaking < 0 or self._ended[self._speaking]:
            self._speaking += 1
            if self._speaking == len(self._titles):
                return
            if self._titles[self._speaking]:
                self._print(f"{self._titles[self._speaking]}\n", style="bold")
            self._print(self._held[self._speaking])

    def _say(self, number: int, text: str) -> None:
        if number == self._speaking:
            self._print(text)
        else:
            self._held[number] += text

    def _print(self, text: str, style: str | None = None) -> None:
        # A model may say anything, and a terminal would obey.
        safe = "".join(one if one.isprintable() or one in "\n\t" else "\N{REPLACEMENT CHARACTER}" for one in text)
        self._console.print(safe, end="", style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def run_table(server: Server, requests: int) -> Table:
    """Steps, tokens and time by phase, and what was compiled."""
    kind, mesh = jax.devices()[0].device_kind, server.placement.mesh
    where = kind if mesh is None else f"{mesh.size} x {kind} ({_axes(mesh)})"
    table = Table("", "steps", "tokens", "seconds", "tokens/s", title=f"{requests} requests on {where}")
    _numbers_right(table)
    for phase, one in server.statistics.items():
        table.add_row(phase, str(one.steps), str(one.tokens), f"{one.seconds:.2f}", f"{one.tokens_per_second:,.0f}")
    layouts = sorted(server.compiles, key=lambda layout: (layout.tokens, layout.displaces))
    compiles = ", ".join(
        f"{server.compiles[layout]} for {layout.tokens} tokens{' in chunks' * layout.displaces}" for layout in layouts
    )
    table.add_section()
    table.add_row("compiles", str(server.compiles.total()), "", f"{server.compile_seconds:.2f}", "")
    table.caption = f"Compiles: {compiles}. A prefill step also carries the new tokens of requests that decode already."
    return table


def savings_table(server: Server) -> Table:
    """What need not be computed, or came a step early, of how much there was."""
    table = Table("", "found", "of", title="What sharing and guessing saved")
    _numbers_right(table)
    if server.prefixes:
        metrics, shared = server.manager.metrics(), server.prefixes
        hit, asked = metrics["prefix_cache_hits"], metrics["prefix_cache_queries"]
        table.add_row("prefix hits, tokens of prompts", f"{hit:,} ({hit / max(asked, 1):.1%})", f"{asked:,}")
        table.add_row("  requests that had one", f"{shared.hits:,}", f"{shared.requests:,}")
    if server.speculation.most:
        accepted, drafted = server.speculation.accepted, server.speculation.drafted
        table.add_row("accepted drafts", f"{accepted:,} ({accepted / max(drafted, 1):.1%})", f"{drafted:,}")
    copies, moved = (server.prefixes.copies, server.prefixes.bytes_moved) if server.prefixes else (0, 0)
    table.add_row("bytes moved", f"{moved:,}", f"{copies:,} copies")
    table.caption = "Moved: snapshots taken and restored between steps. Blocks are shared where they lie."
    return table


def memory_table(server: Server) -> Table:
    """Bytes of the weights, of the cache, and of requests by their context; of several devices, on each."""
    from dsv4_jax.deepseek_v4.placement import bytes_of_a_device

    schema, placement = server.schema, server.placement
    devices = 1 if placement.mesh is None else placement.mesh.size
    each = f" on each of {devices} devices" if devices > 1 else ""
    table = Table("memory", "bytes", title=f"Memory of {schema.slots} slots of {schema.max_context:,} tokens{each}")
    _numbers_right(table)
    table.add_row("weights", f"{bytes_of_a_device(server.weights):,}")
    table.add_section()
    components = {name: size // placement.shards for name, size in server.cache.memory_bytes().items()}
    for name, size in components.items():
        table.add_row(name, f"{size:,}")
    table.add_section()
    table.add_row("the cache together", f"{sum(components.values()):,}")
    table.add_row("uncompressed BF16 instead", f"{schema.slots * _uncompressed_bytes(schema, schema.max_context):,}")
    table.add_section()
    for context in (schema.max_context, *_LONG_CONTEXTS):
        size = schema.bytes_per_slot + schema.bytes_per_block * -(-context // 128)
        uncompressed = _uncompressed_bytes(schema, context)
        table.add_row(f"a request of {context:,} tokens", f"{size:,} of {uncompressed:,} ({size / uncompressed:.1%})")
    table.caption = (
        f"A slot takes {schema.bytes_per_slot:,} bytes (window and tails) whatever its length, "
        f"a token {schema.bytes_per_token:,.0f} more; uncompressed it takes {_uncompressed_bytes(schema, 1):,}."
    )
    return table


def _uncompressed_bytes(schema: CacheSchema, tokens: int) -> int:
    """Bytes of one BF16 row, key and value at once, per token and layer."""
    return tokens * len(schema.spec.layers) * schema.spec.head_dim * 2


def verification_table(result: Verification) -> Table:
    """What was found, beside what is accepted."""
    table = Table("verified against no cache", "found", "accepted")
    _numbers_right(table)
    table.add_row("logit vectors compared", f"{result.positions}", "")
    table.add_row("largest logit", f"{result.scale:.4g}", "")
    table.add_row("largest logit difference", f"{result.difference:.3g}", "")
    table.add_row("  relative to the largest logit", f"{result.relative:.3g}", f"{result.logit_tolerance:.3g}")
    for name, one in (("entries chosen by the indexer", result.entries), ("experts chosen", result.experts)):
        table.add_section()
        table.add_row(name, f"{one.chosen:,}", "")
        table.add_row("  that would not be chosen without a cache", f"{one.flips:,}", f"{one.flip_tolerance:,}")
        table.add_row("  by how much they score lower, at most", f"{one.gap:.3g}", f"{one.score_tolerance:.3g}")
        table.add_row("  tokens with an impossible choice", f"{one.malformed}", "0")
    return table


def _axes(mesh: Mesh) -> str:
    return ", ".join(f"{name}={size}" for name, size in mesh.shape.items())


def _numbers_right(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
