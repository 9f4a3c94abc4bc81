"""What a tokenizer cannot say, and which of its tokens ends a document."""

import json

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data import tokenizer as tokenizer_module
from data.tokenizer import load_tokenizer
from tests.data.conftest import make_texts, write_jsonl

TEXTS = make_texts(100)


def byte_level(
    path, *special: str, plain: tuple[str, ...] = (), vocab_size: int = 300, normalizer=None
):
    """A small tokenizer.json as GPT-2's, with these special and plain added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=list(special),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in plain])
    tokenizer.normalizer = normalizer
    tokenizer.save(str(path))
    return path


def words(path, unknown: str | None = "[UNK]"):
    """Whole words only: what isn't one of the corpus's is unknown."""
    vocabulary = sorted({word for text in TEXTS for word in text.replace(".", " .").split()})
    names = ["[UNK]", "</s>", *vocabulary]
    model = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=unknown or "?")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))
    return path


def letters(path):
    """BPE over the letters of the corpus, which leaves out all others without a trace."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<eos>"], show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))
    return path


def sentences(path, **settings):
    """A sentencepiece model as its trainer makes one by default."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(path.with_suffix("")), vocab_size=60,
        hard_vocab_limit=False, minloglevel=2, **settings,
    )  # fmt: skip
    return path


@pytest.fixture
def prepare_texts(tmp_path, prepare):
    """`prepare` of these texts with the tokenizer `file`."""

    def run(texts, *options, **named):
        path = write_jsonl(tmp_path / "x.jsonl", texts)
        return prepare("--input", path, *options, **named)

    return run


MAKERS = {"words.json": words, "letters.json": letters, "default.model": sentences}


@pytest.mark.parametrize("name", MAKERS)
def test_unknown_text_is_counted_told_and_refused(tmp_path, prepare_texts, name) -> None:
    """Forty documents are in letters that the tokenizers have not seen."""
    file = MAKERS[name](tmp_path / name)
    strange = "ψυχή και σώμα"
    texts = [*TEXTS, *[strange] * 40]
    total = sum(map(len, TEXTS)) + 40 * len(strange)
    for _ in range(2):  # nothing of a refused one is in the way of another
        with pytest.raises(ValueError, match=r"σώμα', above --max-unknown 0\.01") as error:
            prepare_texts(texts, file=file)
        assert f"has nothing for 440 of {total:,} characters" in str(error.value)
    done = prepare_texts(texts, "--max-unknown", 0.5, file=file)
    assert done.manifest["wording"]["unknown_characters"] == 40 * len("ψυχήκαισώμα")
    assert "the tokenizer has nothing for 440 characters" in done.printed


def test_text_that_is_all_known_is_not_spoken_of(tmp_path, prepare_texts) -> None:
    file = byte_level(tmp_path / "t.json", "<|endoftext|>")
    done = prepare_texts([*TEXTS, "ψυχή"], file=file)
    assert done.manifest["wording"]["unknown_ids"] == 0
    assert "nothing for" not in done.printed


def test_documents_that_become_nothing_are_counted_and_refused(tmp_path, prepare_texts) -> None:
    """A normalisation takes every mark away, and these documents have nothing else."""
    file = byte_level(tmp_path / "t.json", "<eos>", normalizer=normalizers.Replace("#", ""))
    texts = [*TEXTS, "##", "#"]
    with pytest.raises(ValueError, match=r"has nothing for 2 of 102 documents \(2\.0%\)"):
        prepare_texts(texts, file=file)
    done = prepare_texts(texts, "--max-unknown", 0.1, file=file)
    assert done.manifest["wording"]["empty_documents"] == 2
    assert "2 documents have no token but their end" in done.printed


def test_a_word_tokenizer_without_an_unknown_token_says_which_text(tmp_path, prepare_texts) -> None:
    file = words(tmp_path / "words.json", unknown=None)
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"words\.json: can't express the text 'unheard of'"):
            prepare_texts([*TEXTS, "unheard of"], "--workers", workers, file=file)


def test_lost_line_breaks_and_spaces_are_told_with_an_example(tmp_path, prepare_texts) -> None:
    file = sentences(tmp_path / "default.model")
    done = prepare_texts([*TEXTS, "the layer\n\nreads  a\ttoken"], file=file)
    assert r"doesn't keep line breaks, as in 'the layer\n\nreads  a\ttoken'" in done.printed
    assert "doesn't keep runs of spaces, as in " in done.printed
    assert "doesn't keep tabs, as in " in done.printed
    assert all(done.manifest["wording"]["spaces"].values())


NORMALIZERS = {
    "capital letters": (normalizers.Lowercase(), "Café"),
    "accents": (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "Café"),
    "line breaks": (normalizers.Replace("\n", " "), "one\n\ntwo"),
    "tabs": (normalizers.Replace("\t", " "), "one\t\t\ttwo"),
}


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_what_a_normalisation_loses_is_told_with_an_example(tmp_path, prepare_texts, kind) -> None:
    """Several spaces in the place of several breaks are as little what was written as one."""
    normalizer, text = NORMALIZERS[kind]
    file = byte_level(tmp_path / "t.json", "<eos>", normalizer=normalizer)
    done = prepare_texts([text, "one\n\nTwo\t\tthré  e"], file=file)
    lost = {name for name, example in done.manifest["wording"]["spaces"].items() if example}
    assert lost == {kind}
    assert f"the tokenizer doesn't keep {kind}, as in {text!r}" in done.printed


def test_unknown_capitals_are_unknown_and_not_lost(tmp_path, prepare_texts) -> None:
    done = prepare_texts([*TEXTS, "XXX"], file=words(tmp_path / "words.json"))
    assert "capital letters" not in done.printed


def edited(tmp_path, change) -> str:
    """The path of a byte-level tokenizer.json with something else in it."""
    path = byte_level(tmp_path / "t.json", "<eos>")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def added(identity: int) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": identity, "content": "<x>", "special": False, **flags}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda file: file["model"].update(dropout=0.1), r"at random \(dropout 0\.1\)"),
        (lambda file: file["model"]["vocab"].update(x=2**31), "an id of 2,147,483,648"),
        (lambda file: file["added_tokens"].append(added(70_000)), "'<x>' the id 70000, .* as 300"),
        (
            lambda file: file["added_tokens"].append(added(5)),
            "'<x>' the id 5, read as 300",
        ),
    ],
)
def test_tokenizers_that_no_token_files_can_be_made_with(tmp_path, change, told) -> None:
    with pytest.raises(ValueError, match=rf"t\.json: .*{told}"):
        load_tokenizer(edited(tmp_path, change))
    assert load_tokenizer(edited(tmp_path, lambda file: file["model"].update(dropout=None)))


@pytest.mark.parametrize("key", ["end_of_word_suffix", "continuing_subword_prefix"])
def test_bytes_that_have_no_name_at_their_place_are_counted(tmp_path, prepare_texts, key) -> None:
    """Such a piece leaves nothing, not even an unknown id: the last letter of each word here."""
    file = edited(tmp_path, lambda content: content["model"].update({key: "</w>", "merges": []}))
    with pytest.raises(ValueError, match="nothing for 10 of 20 characters"):
        prepare_texts(["ab"] * 10, file=file)


def test_a_configuration_beside_that_names_no_end(tmp_path) -> None:
    file = edited(tmp_path, lambda content: None)
    for end in ({}, [], None, {"content": None}, 3):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        assert load_tokenizer(file).name_of(load_tokenizer(file).eod) == "<eos>"


def test_kept_spaces_are_not_spoken_of(prepare_texts) -> None:
    done = prepare_texts(["the layer\n\nreads  a\ttoken"])
    assert "doesn't keep" not in done.printed
    assert set(done.manifest["wording"]["spaces"].values()) == {""}


def test_ends_written_out_in_texts_are_counted(tmp_path, prepare_texts) -> None:
    file = byte_level(tmp_path / "t.json", "<|endoftext|>")
    done = prepare_texts([*TEXTS, "a</s> b<|endoftext|>c<|endoftext|>", "</s>"], file=file)
    wording = done.manifest["wording"]
    assert wording["end_of_text_written_out"] == {"<|endoftext|>": 2, "</s>": 2}
    assert wording["end_of_text_ids"] == 2
    assert "'<|endoftext|>' is written out 2 times" in done.printed
    assert (done.tokens.tokens == 0).sum() == len(done.tokens) + 2


def test_the_special_token_ends_documents_and_a_plain_piece_does_not(
    tmp_path, prepare_texts
) -> None:
    file = byte_level(tmp_path / "t.json", "<pad>", "<eos>", "<bos>", plain=("<s>", "</s>"))
    done = prepare_texts(TEXTS, file=file)
    assert "documents end with '<eos>' (id 1)" in done.printed
    assert done.tokens.read(0)[-1] == done.manifest["end_of_text"] == 1
    assert done.manifest["end_of_text_token"] == "<eos>"


def test_several_special_tokens_are_a_question(tmp_path, prepare_texts) -> None:
    file = byte_level(tmp_path / "t.json", "<|endoftext|>", "</s>", "<|im_end|>")
    with pytest.raises(ValueError, match=r"2 tokens that may end .* --end-of-text") as error:
        prepare_texts(TEXTS, file=file)
    assert "<|endoftext|>, </s>" in str(error.value)
    done = prepare_texts(TEXTS, "--end-of-text", "<|im_end|>", file=file)
    assert done.tokens.read(0)[-1] == done.manifest["end_of_text"] == 2
    with pytest.raises(ValueError, match="has no token 'nothing'"):
        prepare_texts(TEXTS, "--end-of-text", "nothing", file=file)
    with pytest.raises(ValueError, match="already; delete them"):  # another end is another corpus
        prepare_texts(TEXTS, "--end-of-text", "</s>", file=file)


def test_the_models_own_configuration_answers_it(tmp_path) -> None:
    file = byte_level(tmp_path / "t.json", "<|endoftext|>", "</s>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert load_tokenizer(file).eod == 1


def test_sentencepiece_says_itself_which_piece_ends_documents(tmp_path) -> None:
    file = sentences(
        tmp_path / "own.model", eos_id=5, eos_piece="<end>", user_defined_symbols=["<|endoftext|>"]
    )
    assert load_tokenizer(file).eod == 5
    file = sentences(tmp_path / "none.model", eos_id=-1, user_defined_symbols=["<eos>"])
    assert load_tokenizer(file).name_of(load_tokenizer(file).eod) == "<eos>"
    with pytest.raises(ValueError, match="has no end-of-text token"):
        load_tokenizer(sentences(tmp_path / "endless.model", eos_id=-1))


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("layer", rstrip=True, normalized=False),
        AddedToken("reads", lstrip=True, normalized=False),
        AddedToken("token", lstrip=True, rstrip=True, normalized=False),
        AddedToken("scale ", normalized=False),
        AddedToken("\nthe", normalized=False),
        AddedToken("neuron", single_word=True, normalized=False),
        AddedToken("   ", normalized=False),
    ],
    ids=str,
)
def test_long_texts_have_the_ids_of_the_whole(tmp_path, monkeypatch, token) -> None:
    file = byte_level(tmp_path / "t.json", "<eos>", vocab_size=280)
    opened = Tokenizer.from_file(str(file))
    opened.add_tokens([token])
    opened.save(str(file))
    words = ["layer", "reads", "token", "scale", "the", "neuron", "neurons", "a"]
    text = "".join(word + gap for word in words * 9 for gap in (" ", "\n", "   ", " x"))
    monkeypatch.setattr(tokenizer_module, "LONG", 7)
    assert load_tokenizer(file).encode(text) == opened.encode(text, add_special_tokens=False).ids


def test_a_pointer_in_a_tokenizers_place(tmp_path, prepare_texts) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for name in ("t.json", "t.model", "T.JSON"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(ValueError, match=f"{name}: is a Git LFS pointer.*git lfs pull"):
            prepare_texts(TEXTS, file=tmp_path / name)
