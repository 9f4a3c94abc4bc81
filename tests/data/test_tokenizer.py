"""Round trips, and what a broken tokenizer file says."""

from unittest import mock

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizer as tokenizer_module
from data.tokenizer import load_tokenizer, train_sentencepiece
from tests.data.conftest import make_texts

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
# What a cut could tear: words, runs of spaces that are tokens, contractions, marks, end of text.
PARTS = [
    "word",
    " ",
    "  ",
    "\n",
    "\n\n",
    "I'll",
    "e",
    "\u0301",
    "日本",
    "x1",
    "<|endoftext|>",
    "\t",
]
AWKWARD = [
    " a",
    "  a  b\n",
    "▁",
    "x▁ ▁y",
    "<0x0A><|endoftext|>",
    "\r\n\t",
    "e\u0301",
    "\u2047",
    "\0",
]


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_sentencepiece_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_gives_awkward_text_back(tmp_path, model_type):
    trained = train_sentencepiece(make_texts(200), tmp_path / "t.model", 300, model_type)
    for text in AWKWARD:
        assert trained.decode(trained.encode(text)) == text
    assert trained.vocab_size == 300


def test_sentencepiece_marks_document_ends(tokenizer):
    ids = [*tokenizer.encode("the neuron"), tokenizer.eod, *tokenizer.encode(" reads")]
    assert tokenizer.decode(ids) == "the neuron<|endoftext|> reads"
    assert tokenizer.eod == 0


def test_training_again_gives_the_same_file(tmp_path, tokenizer):
    again = train_sentencepiece(make_texts(200), tmp_path / "again.model", 320)
    assert again.sha256 == tokenizer.sha256


@pytest.mark.parametrize(
    ("texts", "size", "told"),
    [
        (make_texts(50), 200, r"--vocab-size 200: the characters .* alone are \d+ pieces; raise"),
        (make_texts(1), 5000, r"--vocab-size 5000: .* no more than \d+ pieces; lower it to that"),
        ([" \n", "\n"], 300, "there is no text to train a tokenizer on"),
    ],
)
def test_impossible_vocabulary_leaves_nothing(tmp_path, texts, size, told):
    with pytest.raises(ValueError, match=told) as refused:
        train_sentencepiece(texts, tmp_path / "t.model", size)
    assert "INTERNAL" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_long_lines_are_learned_from(tmp_path):
    """A document a line, as in many corpora: words and letters past sentencepiece's limit."""
    words = [f"{syllable}metro" for syllable in ("baro", "chrono", "ki\N{HIRAGANA LETTER O}lo")]
    line = " ".join([*["x" * 6000], *words * 800])
    trained = train_sentencepiece([line], tmp_path / "t.model", 300)
    assert len(trained.encode(" chronometro")) == 1
    assert trained.unknown not in trained.encode(line)
    assert trained.decode(trained.encode(line)) == line


@pytest.mark.parametrize("name", ["t.model", "t.json"])
@pytest.mark.parametrize("content", [b"", b"no tokenizer at all", bytes(50)])
def test_what_is_no_tokenizer_is_told(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"is empty|cannot be read \([^\n]+\)") as refused:
        load_tokenizer(tmp_path / name)
    assert "INTERNAL" not in str(refused.value)


@pytest.fixture(scope="session")
def neox(shared_data):
    return load_tokenizer(shared_data / "tokenizer" / "20B_tokenizer.json")


@pytest.fixture(scope="module")
def library(neox):
    """The same file as the tokenizers library itself reads it."""
    return tokenizers.Tokenizer.from_file(str(neox.path))


def test_neox_is_pythias(neox):
    assert (neox.vocab_size, neox.eod, neox.dtype) == (50277, 0, np.uint16)
    assert neox.decode([0]) == "<|endoftext|>"


def test_neox_has_a_token_for_everything(neox):
    """So its texts need not be looked through for what it leaves out, which would take as long
    as tokenizing them; the 13 bytes it lacks are in no UTF-8."""
    assert not neox.leaves_out
    assert neox.unknown is None


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_neox_gives_its_normal_form_back(neox, library, text):
    """The file itself asks for NFC, so that form is what comes back."""
    normal_form = library.normalizer.normalize_str(text)
    assert neox.decode(neox.encode(text)) == normal_form


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.one_of(st.sampled_from(PARTS), ANY_TEXT)).map("".join))
def test_long_texts_are_cut_without_a_trace(neox, library, text):
    """In parts of a few characters, for the sake of the test, the ids are the library's own."""
    expected = library.encode(text, add_special_tokens=False).ids
    with mock.patch.object(tokenizer_module, "LONG", 5):
        assert neox.encode(text) == expected


def test_long_texts_are_cut_at_all(neox):
    text = "some words are here\nand there"
    with (
        mock.patch.object(tokenizer_module, "LONG", 5),
        mock.patch.object(tokenizer_module, "CUT", wraps=tokenizer_module.CUT) as cut,
    ):
        neox.encode(text)
    assert cut.search.called
    parts = tokenizer_module.CUT.split(text)
    assert parts == ["some", " words", " are", " here\n", "and", " there"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "no such file"),
        ("broken.json", b"{", "cannot be read"),
        ("broken.model", b"nonsense", "cannot be read"),
        ("vocab.txt", b"a b c", "unknown ending '.txt'"),
        (
            "endless.json",
            b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, '
            b'"unk_token": "a"}}',
            "no end-of-text token",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path / name)
    assert name in str(error.value)
