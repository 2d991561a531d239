"""Text to tokens and back: streamed text is the whole text, however its characters fall into tokens."""

import sys

import pytest

from dsv4_jax.deepseek_v4.checkpoint_folder import CheckpointError
from dsv4_jax.deepseek_v4.tokens import ByteTokenizer, load_tokenizer

TEXT = "DeepSeek — 深度求索, Καλημέρα, \N{GRINNING FACE}\N{ZERO WIDTH JOINER}é e\u0301\n\0"


def streamed(tokenizer, tokens) -> str:
    stream = tokenizer.stream()
    pieces = [stream.push(int(token)) for token in tokens]
    return "".join(pieces) + stream.finish()


def test_bytes_stream_whole_characters(tmp_path):
    tokenizer = load_tokenizer(tmp_path, 256)
    tokens = tokenizer.encode(TEXT)
    assert tokens == list(TEXT.encode())
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens]
    assert pieces == [piece for character in TEXT for piece in [""] * (len(character.encode()) - 1) + [character]]
    assert stream.finish() == ""


def test_any_bytes_become_the_text_that_they_are(rng):
    for _ in range(20):
        tokens = rng.integers(0, 256, 30)
        assert streamed(ByteTokenizer(), tokens) == bytes(tokens.tolist()).decode(errors="replace")


def test_what_is_no_byte_and_what_never_ends():
    first, *_ = "é".encode()
    assert streamed(ByteTokenizer(), [65, 256, 66]) == "A\N{REPLACEMENT CHARACTER}B"
    assert streamed(ByteTokenizer(), [first, 999, 66]) == "\N{REPLACEMENT CHARACTER}" * 2 + "B"
    assert streamed(ByteTokenizer(), [65, first]) == "A\N{REPLACEMENT CHARACTER}"


def test_a_model_with_too_few_tokens_for_bytes(tmp_path):
    with pytest.raises(CheckpointError, match="255 token ids are too few for bytes"):
        load_tokenizer(tmp_path, 255)


def test_a_tokenizer_file_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'dsv4-jax\[text\]'"):
        load_tokenizer(tmp_path, 1000)


@pytest.fixture
def file_tokenizer(tmp_path):
    """A byte-level BPE, in which a character may be several tokens and a token several characters."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["to be or not to be, deep seek deep sea"] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path, tokenizer.get_vocab_size()


def test_a_tokenizer_file(file_tokenizer):
    folder, vocabulary = file_tokenizer
    tokenizer = load_tokenizer(folder, vocabulary)
    for text in (TEXT, "to be or not to be"):
        tokens = tokenizer.encode(text)
        assert len(tokens) < len(text.encode())
        assert streamed(tokenizer, tokens) == text
        assert streamed(tokenizer, [0, *tokens, 0]) == text  # special tokens are no text
    tokens = tokenizer.encode("é")
    assert streamed(tokenizer, tokens[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_tokenizer_files_that_do_not_fit(file_tokenizer):
    folder, vocabulary = file_tokenizer
    with pytest.raises(CheckpointError, match=f"has {vocabulary} token ids, the model {vocabulary - 1}"):
        load_tokenizer(folder, vocabulary - 1)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(folder, vocabulary)
