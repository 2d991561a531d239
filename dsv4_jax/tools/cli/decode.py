"""`dsv4-jax decode`: serve a text to several requests through the cache, and check every logit if asked to."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsv4_jax import CacheFormats, CacheSchema, tiny_spec
from dsv4_jax.example.serve import Request, Served, Server, server_schema
from dsv4_jax.example.text import load_text, text_requests
from dsv4_jax.example.verify import Verification, verify
from dsv4_jax.example.weights import init_weights
from dsv4_jax.layout.formats import ENTRY_FORMATS, HCA_TAILS, KEY_FORMATS, WINDOW_FORMATS
from dsv4_jax.layout.schema import SchemaError
from dsv4_jax.tools.cli._limits import LONGEST_CONTEXT, MOST_REQUESTS, require_memory
from dsv4_jax.tools.cli._output import print_table

if TYPE_CHECKING:
    # A type checker sees no members in an enum made of a table; every one of them is a str.
    EntryFormat = str
    WindowFormat = str
    KeyFormat = str
    HcaTail = str
else:
    EntryFormat = enum.StrEnum("EntryFormat", {name: name for name in ENTRY_FORMATS})
    WindowFormat = enum.StrEnum("WindowFormat", {name: name for name in WINDOW_FORMATS})
    KeyFormat = enum.StrEnum("KeyFormat", {name: name for name in KEY_FORMATS})
    HcaTail = enum.StrEnum("HcaTail", {name: name for name in HCA_TAILS})


class NewTokens(enum.StrEnum):
    """Where the tokens after the prompt come from."""

    TEXT = "text"
    GREEDY = "greedy"


class Implementation(enum.StrEnum):
    """Which implementation of the cache operations runs."""

    NATIVE = "native"
    REFERENCE = "reference"


_DEFAULTS = CacheFormats()
_ENTRIES, _WINDOW = EntryFormat(_DEFAULTS.entries), WindowFormat(_DEFAULTS.window)
_KEYS, _HCA_TAIL = KeyFormat(_DEFAULTS.keys), HcaTail(_DEFAULTS.hca_tail)
_LONG_CONTEXTS = (65_536, 1_048_576)


def decode(
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File to read; by default a text in the package.")
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, max=MOST_REQUESTS, help="Requests, each at its own place in the text.")
    ] = 6,
    slots: Annotated[
        int, typer.Option(min=1, max=MOST_REQUESTS, help="Requests served at once; the others wait for a slot.")
    ] = 4,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=LONGEST_CONTEXT, help="The longest prompt; others have 3/7 of it or more.")
    ] = 700,
    new_tokens: Annotated[
        int, typer.Option(min=1, max=LONGEST_CONTEXT, help="Tokens after each prompt, one per step.")
    ] = 40,
    chunk: Annotated[
        int, typer.Option(min=1, max=LONGEST_CONTEXT, help="The most tokens of a step, prompts and new ones together.")
    ] = 256,
    tokens_from: Annotated[
        NewTokens,
        typer.Option(
            help="New tokens: as the text goes on, or greedily the model's own (noise: its weights are random)."
        ),
    ] = NewTokens.TEXT,
    entries: Annotated[EntryFormat, typer.Option(help="How compressed entries are stored.")] = _ENTRIES,
    window: Annotated[WindowFormat, typer.Option(help="How window rows are stored.")] = _WINDOW,
    keys: Annotated[KeyFormat, typer.Option(help="How indexer keys are stored.")] = _KEYS,
    hadamard: Annotated[
        bool, typer.Option("--hadamard", help="Store indexer keys after a Hadamard transform.")
    ] = _DEFAULTS.keys_hadamard,
    hca_tail: Annotated[HcaTail, typer.Option(help="How an open HCA window is kept.")] = _HCA_TAIL,
    check: Annotated[
        bool, typer.Option("--verify", help="Recompute everything without a cache; exit 1 if the logits differ.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the weights and the prompts' lengths.")] = 0,
    implementation: Annotated[
        Implementation, typer.Option(help="native: the compiled kernels. reference: plain jax.numpy.")
    ] = Implementation.NATIVE,
) -> None:
    """Serve several concurrent requests over a text (a token is a byte) with a small DeepSeek-V4 attention stack.

    The stack has the cache geometry of the real models, few heads, a narrow residual stream and random weights.
    Requests are admitted as slots become free, their prompts are prefilled in chunks, each then decodes one token a
    step, in a jitted step that owns the cache, and is released. Runs on the GPU if JAX has one.
    """
    console = Console()
    spec = tiny_spec()
    formats = CacheFormats(str(entries), str(window), str(keys), keys_hadamard=hadamard, hca_tail=str(hca_tail))
    longest = prompt_tokens + new_tokens
    try:
        schema = server_schema(spec, formats, slots=slots, max_context=longest)
    except SchemaError as error:
        raise typer.BadParameter(f"--prompt-tokens and --new-tokens make {longest:,} tokens: {error}") from error
    fewer = "Fewer --slots, --prompt-tokens or --new-tokens take less."
    require_memory(schema.memory_bytes, f"A cache of {slots:,} slots of {longest:,} tokens takes", fewer)
    if check:
        # Every head's scores of queries by keys in float32, before and after the softmax.
        scores = 2 * 4 * spec.num_heads * schema.max_context**2
        require_memory(scores, f"--verify of {longest:,} tokens, which compares all with all, takes", fewer)
    require_memory(8 * requests * longest, f"The text of {requests:,} requests takes", "Fewer --requests take less.")
    try:
        read = load_text(text)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--text") from error
    weights = init_weights(spec, seed)
    work = text_requests(
        read,
        requests,
        longest_prompt=prompt_tokens,
        new_tokens=new_tokens,
        seed=seed,
        greedy=tokens_from is NewTokens.GREEDY,
    )
    server = Server(
        weights,
        spec,
        formats,
        slots=slots,
        max_context=max(len(request.prompt) + request.new_tokens for request in work),
        chunk=min(chunk, slots * longest),  # more can never come
        implementation=implementation.value,
        record=check,
    )
    try:
        served = _serve(console, server, work)
        print_table(console, _run_table(server, requests))
        print_table(console, _memory_table(server))
        if check:
            _check(console, server, served)
    except KeyboardInterrupt:
        tokens = sum(one.tokens for one in server.statistics.values())
        console.print(f"Interrupted after {tokens:,} tokens.", highlight=False)
        raise typer.Exit(130) from None


def _serve(console: Console, server: Server, work: list[Request]) -> list[Served]:
    with _progress(console) as progress:
        total = sum(len(request.prompt) + request.new_tokens for request in work)
        task = progress.add_task("compile", total=total)
        return server.serve(
            work, lambda phase, tokens: progress.update(task, description=phase, advance=tokens, refresh=True)
        )


def _check(console: Console, server: Server, served: list[Served]) -> None:
    with _progress(console) as progress:
        task = progress.add_task("verify", total=len(served))
        result = verify(
            server.weights,
            server.schema.spec,
            server.schema.formats,
            served,
            max_context=server.schema.max_context,
            progress=lambda: progress.advance(task),
        )
    print_table(console, _verification_table(result))
    if not result.passed:
        console.print("[bold red]The cached run does not agree with the computation without a cache.[/]")
        raise typer.Exit(1)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _run_table(server: Server, requests: int) -> Table:
    device = jax.devices()[0]
    table = Table("", "steps", "tokens", "seconds", "tokens/s", title=f"{requests} requests on {device.device_kind}")
    for column in table.columns[1:]:
        column.justify = "right"
    for phase, one in server.statistics.items():
        table.add_row(phase, str(one.steps), str(one.tokens), f"{one.seconds:.2f}", f"{one.tokens_per_second:,.0f}")
    compiles = ", ".join(f"{count} for {bucket} tokens" for bucket, count in sorted(server.compiles.items()))
    table.add_section()
    table.add_row("compiles", str(server.compiles.total()), "", f"{server.compile_seconds:.2f}", "")
    table.caption = f"Compiles: {compiles}. A prefill step also carries the new tokens of requests that decode already."
    return table


def _memory_table(server: Server) -> Table:
    schema = server.schema
    table = Table("cache", "bytes", title=f"Memory of {schema.slots} slots of {schema.max_context:,} tokens")
    table.columns[1].justify = "right"
    components = server.cache.memory_bytes()
    for name, size in components.items():
        table.add_row(name, f"{size:,}")
    table.add_section()
    table.add_row("together", f"{sum(components.values()):,}")
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


def _verification_table(result: Verification) -> Table:
    table = Table("verified against no cache", "found", "accepted")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("logit vectors compared", f"{result.positions}", "")
    table.add_row("largest logit", f"{result.scale:.4g}", "")
    table.add_row("largest logit difference", f"{result.difference:.3g}", "")
    table.add_row("  relative to the largest logit", f"{result.relative:.3g}", f"{result.logit_tolerance:.3g}")
    table.add_row("entries chosen by the indexer", f"{result.chosen:,}", "")
    table.add_row("  that would not be chosen without a cache", f"{result.flips:,}", f"{result.flip_tolerance:,}")
    table.add_row("  by how much they score lower, at most", f"{result.gap:.3g}", f"{result.score_tolerance:.3g}")
    table.add_row("tokens with an impossible choice", f"{result.malformed}", "0")
    return table
