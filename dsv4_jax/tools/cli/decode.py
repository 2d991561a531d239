"""`dsv4-jax decode`: serve requests with a DeepSeek-V4 checkpoint, and check every logit if asked to."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dsv4_jax import CacheFormats, ConfigError
from dsv4_jax.layout.formats import ENTRY_FORMATS, HCA_TAILS, KEY_FORMATS, WINDOW_FORMATS
from dsv4_jax.tools.cli._decode_output import StreamedText, memory_table, run_table, savings_table, verification_table
from dsv4_jax.tools.cli._limits import LONGEST_CONTEXT, MOST_DRAFTS, MOST_REQUESTS, require_room_to_serve
from dsv4_jax.tools.cli._mesh import model_mesh, parse_mesh
from dsv4_jax.tools.cli._output import print_table

if TYPE_CHECKING:
    from dsv4_jax.deepseek_v4.checkpoint import ShardingOf
    from dsv4_jax.deepseek_v4.config import DeepseekV4Config
    from dsv4_jax.deepseek_v4.phases import Phase
    from dsv4_jax.deepseek_v4.serve import Listener, Request, Served, Server
    from dsv4_jax.deepseek_v4.tokens import Tokenizer
    from dsv4_jax.deepseek_v4.weights import ModelWeights

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
    MODEL = "model"


class Implementation(enum.StrEnum):
    """Which implementation of the cache operations runs."""

    NATIVE = "native"
    REFERENCE = "reference"


class Attention(enum.StrEnum):
    """How rows are attended to."""

    ATTEND = "attend"
    GATHER = "gather"


class Dtype(enum.StrEnum):
    """Of activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


_DEFAULTS = CacheFormats()
_ENTRIES, _WINDOW = EntryFormat(_DEFAULTS.entries), WindowFormat(_DEFAULTS.window)
_KEYS, _HCA_TAIL = KeyFormat(_DEFAULTS.keys), HcaTail(_DEFAULTS.hca_tail)


def decode(
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder with config.json, safetensors and perhaps tokenizer.json; by default a small random one, "
            "which is made in the cache folder.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to go on from; may be given several times, a request each.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="File to read requests from; without --prompt one in the package."
        ),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, max=MOST_REQUESTS, help="Requests over the text, each at its own place.")
    ] = 6,
    slots: Annotated[
        int,
        typer.Option(
            min=1, max=MOST_REQUESTS, help="Requests that a shard serves at once; the others wait for a slot."
        ),
    ] = 4,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=LONGEST_CONTEXT, help="The text's longest prompt; others have 3/7 of it or more.")
    ] = 700,
    new_tokens: Annotated[
        int, typer.Option(min=1, max=LONGEST_CONTEXT, help="The most tokens after each prompt.")
    ] = 40,
    chunk: Annotated[
        int,
        typer.Option(
            min=1, max=LONGEST_CONTEXT, help="The most tokens of a shard in a step, prompts and new ones together."
        ),
    ] = 256,
    tokens_from: Annotated[
        NewTokens | None,
        typer.Option(
            help="New tokens: as the text goes on, or the model's own; by default the text's, but for --prompt "
            "and --temperature."
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="The model's tokens are drawn at this temperature; 0: the likeliest.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest tokens that together have this probability, above 0 to 1.")
    ] = 1.0,
    share_prefix: Annotated[
        bool,
        typer.Option(
            "--share-prefix",
            help="Requests go on from what the cache has of their prompts, in blocks of 128 tokens. Those over a text "
            "then begin alike: with its first tokens, 3/7 of --prompt-tokens.",
        ),
    ] = False,
    speculate: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_DRAFTS,
            help="Guess so many tokens of each request a step, from what followed alike text before, and keep those "
            "that are right. The text is the same.",
        ),
    ] = None,
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
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of random weights, of prompts' lengths, of what is drawn.")
    ] = 0,
    implementation: Annotated[
        Implementation, typer.Option(help="native: the compiled kernels. reference: plain jax.numpy.")
    ] = Implementation.NATIVE,
    attention: Annotated[
        Attention, typer.Option(help="attend: over rows where they lie. gather: rows are read out first, in jax.numpy.")
    ] = Attention.ATTEND,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Several devices, as data=2,tensor=2: shards of the cache with requests of their own, times devices "
            "that share a shard's query heads."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of activations; by default float32 on CPUs and with --verify, else bfloat16.")
    ] = None,
) -> None:
    """Serve several concurrent requests with a DeepSeek-V4 checkpoint.

    Requests are admitted as slots become free, their prompts are prefilled in chunks, each then decodes one token a
    step, or more with --speculate, in a jitted step that owns the cache, and is released. With --mesh one step runs on
    several devices, and requests are spread over them. Text is split by the
    checkpoint's tokenizer.json, and into bytes where there is none. The random checkpoint has a release's form:
    quantized weights, hyper-connections, experts, and the cache geometry of the real models. Runs on the GPU if JAX
    has one.
    """
    console = Console()
    forced = _forced(prompt, text, tokens_from, temperature)
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"{top_p} is not above 0 and at most 1.", param_hint="--top-p")
    if speculate and speculate >= new_tokens:
        raise typer.BadParameter(
            f"{speculate} drafts are more than can be kept of {new_tokens:,} --new-tokens, of which the first is none.",
            param_hint="--speculate",
        )
    from dsv4_jax.deepseek_v4.placement import weight_sharding

    config = _config(checkpoint)
    size = parse_mesh(mesh)
    devices = None if mesh is None else model_mesh(config, size)
    tokenizer = _tokenizer(checkpoint, config)
    prompts = [_encoded(tokenizer, one) for one in prompt or []]
    longest = max(map(len, prompts)) if prompts else prompt_tokens
    formats = CacheFormats(str(entries), str(window), str(keys), keys_hadamard=hadamard, hca_tail=str(hca_tail))
    extras = {"share_prefix": share_prefix, "speculate": speculate or 0}
    require_room_to_serve(
        config,
        formats,
        checkpoint,
        requests=len(prompts) or requests,
        slots=slots,
        longest=longest + new_tokens,
        check=check,
        size=size,
        extras=extras,
    )
    work = _work(tokenizer, prompts, text, requests, longest, new_tokens, seed, forced, alike=share_prefix)
    weights = _load(console, checkpoint, seed, weight_sharding(config, devices))
    on_cpu = jax.devices()[0].platform == "cpu"
    chosen = dtype or (Dtype.FLOAT32 if on_cpu or check else Dtype.BFLOAT16)

    from dsv4_jax.deepseek_v4.sampling import Sampling
    from dsv4_jax.deepseek_v4.serve import Server

    server = Server(
        config,
        weights,
        formats,
        slots=slots,
        max_context=max(len(request.prompt) + request.new_tokens for request in work),
        chunk=min(chunk, slots * (longest + new_tokens)),  # more can never come
        sampling=Sampling(temperature, top_p),
        implementation=implementation.value,
        attention=attention.value,
        dtype=jnp.dtype(chosen.value),
        record=check,
        share_prefix=share_prefix,
        speculate=speculate or 0,
        mesh=devices,
    )
    try:
        if forced:
            served = _serve_text(console, server, work)
        else:
            titles = _titles(prompt or [], len(work))
            served = server.serve(work, StreamedText(console, tokenizer, titles))
        print_table(console, run_table(server, len(work)))
        if share_prefix or speculate:
            print_table(console, savings_table(server))
        print_table(console, memory_table(server))
        if check:
            _check(console, server, served)
    except KeyboardInterrupt:
        tokens = sum(one.tokens for one in server.statistics.values())
        console.print(f"\nInterrupted after {tokens:,} tokens.", highlight=False)
        raise typer.Exit(130) from None


def _forced(prompt: list[str] | None, text: Path | None, tokens_from: NewTokens | None, temperature: float) -> bool:
    """Whether new tokens are the text's own."""
    if prompt and text:
        raise typer.BadParameter("give --prompt or --text, not both.")
    if tokens_from is None:
        return not prompt and temperature == 0
    if tokens_from is NewTokens.TEXT and prompt:
        raise typer.BadParameter("a --prompt has no text to go on with.", param_hint="--tokens-from")
    if tokens_from is NewTokens.TEXT and temperature > 0:
        raise typer.BadParameter(
            "the text's own tokens are not drawn; leave out --temperature.", param_hint="--tokens-from"
        )
    return tokens_from is NewTokens.TEXT


def _config(checkpoint: Path | None) -> DeepseekV4Config:
    from dsv4_jax.deepseek_v4.config import read_config
    from dsv4_jax.deepseek_v4.random_checkpoint import SMALL_CONFIG

    try:
        return read_config(SMALL_CONFIG if checkpoint is None else checkpoint)
    except (ConfigError, OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--checkpoint") from error


def _tokenizer(checkpoint: Path | None, config: DeepseekV4Config) -> Tokenizer:
    from dsv4_jax.deepseek_v4.checkpoint_folder import CheckpointError
    from dsv4_jax.deepseek_v4.tokens import ByteTokenizer, load_tokenizer

    if checkpoint is None:
        return ByteTokenizer()
    try:
        return load_tokenizer(checkpoint, config.vocabulary)
    except (CheckpointError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint="--checkpoint") from error


def _encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise typer.BadParameter(f"{prompt!r} has no tokens; give some text.", param_hint="--prompt")
    return tokens


def _work(
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    text: Path | None,
    requests: int,
    longest_prompt: int,
    new_tokens: int,
    seed: int,
    forced: bool,
    *,
    alike: bool,
) -> list[Request]:
    from dsv4_jax.deepseek_v4.text import load_text, prompt_requests, text_requests

    if prompts:
        return prompt_requests(prompts, new_tokens=new_tokens, seed=seed)
    try:
        read = tokenizer.encode(load_text(text))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--text") from error
    options: dict[str, Any] = {"longest_prompt": longest_prompt, "new_tokens": new_tokens, "seed": seed}
    return text_requests(read, requests, forced=forced, alike=alike, **options)


def _load(console: Console, checkpoint: Path | None, seed: int, sharding: ShardingOf) -> ModelWeights:
    """The weights, with a bar of the bytes read."""
    from dsv4_jax.deepseek_v4.checkpoint import load_checkpoint
    from dsv4_jax.deepseek_v4.checkpoint_folder import CheckpointError
    from dsv4_jax.deepseek_v4.random_checkpoint import random_checkpoint

    columns = (TextColumn("{task.description:8}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    try:
        folder = checkpoint or random_checkpoint(seed)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("load", total=None)
            read = lambda path, done, total: progress.update(task, completed=done, total=total)  # noqa: E731
            return load_checkpoint(folder, sharding=sharding, progress=read)[1]
    except (CheckpointError, ConfigError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--checkpoint") from error


def _titles(prompts: list[str], requests: int) -> list[str]:
    """A line above each request's text; none above the only one."""
    if requests == 1:
        return [""]
    begins = [f": {prompt[:60]}{'…' * (len(prompt) > 60)}".replace("\n", " ") for prompt in prompts] or [""] * requests
    return [f"Request {number}{begin}" for number, begin in enumerate(begins, 1)]


class _Bar:
    """Shows how many tokens are behind the server: a ``Listener``."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._task = progress, progress.add_task("compile", total=total)

    def ran(self, phase: Phase, tokens: int) -> None:
        self._progress.update(self._task, description=phase, advance=tokens, refresh=True)

    def found(self, number: int, tokens: int) -> None:
        self._progress.update(self._task, advance=tokens)

    def chose(self, number: int, token: int) -> None:
        pass

    def ended(self, number: int) -> None:
        pass


def _serve_text(console: Console, server: Server, work: list[Request]) -> list[Served]:
    with _progress(console) as progress:
        listener: Listener = _Bar(progress, sum(len(request.prompt) + request.new_tokens for request in work))
        return server.serve(work, listener)


def _check(console: Console, server: Server, served: list[Served]) -> None:
    from dsv4_jax.deepseek_v4.verify import verify

    with _progress(console) as progress:
        task = progress.add_task("verify", total=len(served))
        result = verify(server, served, progress=lambda: progress.advance(task))
    print_table(console, verification_table(result))
    if not result.passed:
        console.print("[bold red]The cached run does not agree with the computation without a cache.[/]")
        raise typer.Exit(1)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)
