"""`dsv4-jax decode` as a user runs it, small."""

import json
import re

import jax.numpy as jnp
import pytest
import typer
from rich.console import Console
from served import TINY_CONFIG, cheap_step
from typer.testing import CliRunner

from dsv4_jax import CacheFormats
from dsv4_jax.deepseek_v4 import serve
from dsv4_jax.deepseek_v4 import verify as verification
from dsv4_jax.deepseek_v4.random_checkpoint import write_random_checkpoint
from dsv4_jax.tools.cli._decode_output import StreamedText
from dsv4_jax.tools.cli.decode import _check as check
from dsv4_jax.tools.cli.decode import decode

# 132 to 256 tokens a request, whatever the seed: two blocks.
SMALL = ["--requests", "3", "--slots", "2", "--prompt-tokens", "216", "--new-tokens", "40", "--chunk", "64"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    application = typer.Typer()
    application.command()(decode)
    runner = CliRunner(env={"COLUMNS": "120"})
    return lambda *arguments: runner.invoke(application, [*arguments])


@pytest.fixture
def checkpoint(tmp_path, seed):
    folder = tmp_path / "checkpoint"
    write_random_checkpoint(folder, TINY_CONFIG, seed)
    return folder


def rows_of(output: str) -> dict[str, str]:
    cells = [re.split("[│┃]", line) for line in output.splitlines()]
    return {line[1].strip(): line[2].strip() for line in cells if len(line) > 2}


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_serves_a_file_and_verifies(run, tmp_path, seed):
    """With a checkpoint that it makes in the cache folder."""
    text = tmp_path / "text.txt"
    text.write_text("A window, a tail and a table. " * 30)
    result = run(*SMALL, "--text", str(text), "--verify", "--seed", str(seed), "--hca-tail", "running")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "cache" / "dsv4-jax").iterdir())) == 1

    rows = rows_of(result.output)
    assert number(rows["tokens with an impossible choice"]) == 0
    assert number(rows["logit vectors compared"]) >= 3 * 40
    assert number(rows["entries chosen by the indexer"]) > 0
    assert number(rows["experts chosen"]) % (4 * 2) == 0  # 2 in each of 4 layers
    components = ["block_table", "write_table", "window", "window_positions", "csa_entries", "csa_keys", "hca_entries"]
    components += ["csa_tail", "csa_key_tail", "hca_tail"]
    assert sum(number(rows[name]) for name in components) == number(rows["the cache together"])
    assert 9e6 < number(rows["weights"]) < 12e6
    # 2 slots of 256 tokens, 4 layers, one BF16 row of 512 each.
    assert number(rows["uncompressed BF16 instead"]) == 2 * 256 * 4 * 512 * 2
    assert "1 for 2 tokens, 1 for 64 tokens in chunks" in " ".join(result.output.split())


def test_goes_on_from_prompts_and_says_what_it_draws(run, checkpoint, monkeypatch):
    """Two prompts of one text have seeds of their own, and so two texts."""
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "Once upon", "--prompt", "Once upon", "--new-tokens", "9"]
    arguments += ["--temperature", "0.8", "--top-p", "0.9", "--attention", "gather"]
    steps = []
    step = serve.step
    monkeypatch.setattr(serve, "step", lambda *a, **options: steps.append(options) or step(*a, **options))
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert {(options["attention"], options["dtype"]) for options in steps} == {("gather", jnp.dtype(jnp.float32))}
    texts = texts_of(result.output)
    assert len(texts) == 2
    assert texts[0] != texts[1]


def test_shares_and_guesses_and_says_what_that_saved(run, checkpoint, seed):
    """Texts that begin alike, taken from one that repeats itself; verified."""
    text = checkpoint / "text.txt"
    text.write_text("To be, or not to be. " * 40)
    arguments = ["--checkpoint", str(checkpoint), "--text", str(text), "--requests", "4", "--slots", "2"]
    arguments += ["--prompt-tokens", "310", "--new-tokens", "20", "--chunk", "96", "--seed", str(seed)]
    result = run(*arguments, "--share-prefix", "--speculate", "3", "--verify")
    assert result.exit_code == 0, result.output
    rows = rows_of(result.output)
    hits, requests = rows["prefix hits, tokens of prompts"], rows["requests that had one"]
    # All begin with 132 tokens that are the same, and a snapshot is left after 128 of them by the second at the latest.
    assert number(hits.split()[0]) >= 2 * 128
    assert number(hits.split()[0]) % 128 == 0
    assert 2 <= number(requests) <= 3
    assert number(rows["accepted drafts"].split()[0]) >= 40
    assert number(rows["bytes moved"]) > 0
    assert number(rows["logit vectors compared"]) >= 4 * 20


def test_says_nothing_of_savings_that_were_not_asked_for(run, checkpoint, seed, monkeypatch):
    monkeypatch.setattr(serve, "step", cheap_step(seed))
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "ab" * 20, "--new-tokens", "4", "--slots", "1"]
    plain, guessed = run(*arguments), run(*arguments, "--speculate", "3")
    assert plain.exit_code == guessed.exit_code == 0
    assert not {"accepted drafts", "bytes moved"} & rows_of(plain.output).keys()
    assert {"accepted drafts", "bytes moved"} <= rows_of(guessed.output).keys()
    assert "prefix hits, tokens of prompts" not in rows_of(guessed.output)
    # What the one prompt says, above the table.
    assert plain.output.split("requests on")[0][:-2] == guessed.output.split("requests on")[0][:-2]


def test_the_summary_names_the_mesh(run, checkpoint, seed, monkeypatch):
    monkeypatch.setattr(serve, "step", cheap_step(seed))
    arguments = ["--checkpoint", str(checkpoint), "--prompt", "ab" * 20, "--new-tokens", "4", "--slots", "1"]
    plain, meshed = run(*arguments), run(*arguments, "--mesh", "data=1,tensor=1")
    assert plain.exit_code == meshed.exit_code == 0, meshed.output
    assert "(data=1, tensor=1)" not in plain.output
    assert re.search(r"requests on 1 x .* \(data=1, tensor=1\)", meshed.output)
    assert plain.output.split("1 requests on")[0].rstrip() == meshed.output.split("1 requests on")[0].rstrip()


def texts_of(output: str) -> list[str]:
    """What stands below each request's title, before the tables."""
    spoken = output[: output.index("2 requests on")]
    return [part.strip() for part in re.split(r"^Request \d: Once upon\n", spoken, flags=re.MULTILINE)[1:]]


def test_fails_when_the_logits_differ(monkeypatch):
    result = verification.tolerances(CacheFormats())
    result.positions, result.difference, result.scale = 5, 1.0, 1.0
    monkeypatch.setattr(verification, "verify", lambda *_, **__: result)
    application = typer.Typer()
    application.command()(lambda: check(Console(), None, []))
    ran = CliRunner().invoke(application, [])
    assert ran.exit_code == 1
    assert "does not agree" in ran.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--entries", "fp7"], "fp7"),
        (["--keys", "fp8_ds_mla"], "fp8_ds_mla"),
        (["--text", "no/such/file"], "no/such/file"),
        (["--requests", "0"], "requests"),
        (["--prompt", ""], "no tokens"),
        (["--prompt", "a", "--text", __file__], "not both"),
        (["--prompt", "a", "--tokens-from", "text"], "tokens-from"),
        (["--temperature", "1", "--tokens-from", "text"], "temperature"),
        (["--prompt", "a", "--new-tokens", "1048576"], "1,048,577"),
        (["--mesh", "tensor=3"], "tensor can be 1, 2."),
        (["--mesh", "data=9999"], "takes 9999 devices; JAX has"),
        (["--mesh", "data=2,model=2"], "is no mesh"),
        (["--speculate", "0"], "speculate"),
        (["--speculate", "-3"], "speculate"),
        (["--speculate", "65", "--new-tokens", "100"], "speculate"),
        (["--speculate", "40"], "--new-tokens"),
    ],
)
def test_bad_options_are_refused(run, arguments, named):
    result = run(*arguments)
    assert result.exit_code == 2
    assert named in result.output


def test_empty_text_is_refused(run, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    result = run("--text", str(empty))
    assert result.exit_code == 2
    assert "empty" in result.output


def test_a_folder_that_is_no_checkpoint_is_refused(run, checkpoint):
    """Without a config, with a config of something else, without a tensor, without a tokenizer that can be read."""
    config = checkpoint / "config.json"
    whole = config.read_text()

    def refused(*named: str) -> None:
        result = run("--checkpoint", str(checkpoint), "--prompt", "a")
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit)
        said = "".join(re.findall(r"[^│\s]+", result.output))
        assert all(name in said for name in named), result.output

    config.unlink()
    refused("config.json")
    config.write_text("{}")
    refused("--checkpoint")
    config.write_text(json.dumps(json.loads(whole) | {"num_hidden_layers": 3, "compress_ratios": [4, 128, 4]}))
    refused("layers.2")
    config.write_text(whole)
    (checkpoint / "tokenizer.json").write_text("{}")
    refused("tokenizer.json")


class Printed:
    """Keeps what is printed."""

    def __init__(self):
        self.text = ""

    def print(self, text, **_):
        self.text += text


class Letters:
    """A tokenizer whose streams hold the last letter back."""

    def stream(self):
        return self.Stream()

    class Stream:
        def __init__(self):
            self.held = ""

        def push(self, token):
            said, self.held = self.held, chr(token)
            return said

        def finish(self):
            return self.held


def test_texts_are_streamed_one_after_the_other():
    console = Printed()
    streamed = StreamedText(console, Letters(), ["first", "second", "third"])
    for letter in "xyz":
        streamed.chose(2, ord(letter))
    assert console.text == "first\n"
    streamed.chose(0, ord("a"))
    streamed.chose(0, ord("b"))
    assert console.text == "first\na"  # as it comes
    streamed.ended(2)
    streamed.chose(1, ord("k"))
    streamed.chose(1, ord("l"))
    assert console.text == "first\na"
    streamed.ended(0)
    assert console.text == "first\nab\nsecond\nk"
    streamed.ended(1)
    assert console.text == "first\nab\nsecond\nkl\nthird\nxyz\n"


def test_a_terminal_is_told_no_escape_sequences():
    console = Printed()
    streamed = StreamedText(console, Letters(), [""])
    for letter in "a\x1b[2J\a\tß\n":
        streamed.chose(0, ord(letter))
    streamed.ended(0)
    assert console.text == "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\tß\n\n"
