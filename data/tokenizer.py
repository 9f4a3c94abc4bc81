"""Text to token ids and back: Hugging Face `tokenizer.json` files and sentencepiece models."""

import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.formats import refuse_lfs_pointer
from l2e.files import replacing
from l2e.problems import Problem

# Names under which tokenizers keep the token that ends a document, the Pile's first.
END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
# In a copy made for counting, the token for what a tokenizer.json leaves out.
LEFT_OUT = "\0left out"
# sentencepiece writes a space as this character, so the character itself goes byte by byte.
SPACE_MARK = "\u2581"
SENTENCE_BYTES = 4192  # the longest line that it learns from
NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))
LARGEST_ID = 2**31 - 1
# Texts of more characters are tokenized in parts, cut before the space between two words or
# after the line break between them, where GPT-2's splitting into words always cuts. Small parts
# stay in the processor's caches: on books that is half as fast again as whole texts.
LONG = 2**15
CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=[^\W_]\n)(?=[^\W_])")


def load_tokenizer(path: str | Path, end_of_text: str | None = None) -> "Tokenizer":
    """Open a tokenizer file: `*.json` is Hugging Face's format, `*.model` sentencepiece's.

    `end_of_text` names the token that ends a document, for a file where several may.
    Raises ValueError for a missing, damaged or unknown file, or one without that token.
    """
    path = Path(path)
    if not path.is_file():
        raise Problem("tokenizer", path, "no such file", "give a tokenizer.json or a .model file")
    kinds = {".json": HuggingFaceTokenizer, ".model": SentencePieceTokenizer}
    ending = path.suffix.lower()
    if ending not in kinds:
        raise Problem(
            "tokenizer",
            path,
            f"unknown ending {path.suffix!r}",
            "give a Hugging Face tokenizer.json or a sentencepiece .model file",
        )
    try:
        content = path.read_bytes()
        refuse_lfs_pointer("tokenizer", path, content)
        if not content:
            raise Problem("tokenizer", path, "is empty", "get a whole copy of it")
        loaded = kinds[ending](path, content, end_of_text)
        if loaded.vocab_size > LARGEST_ID + 1:
            reason = f"has an id of {loaded.vocab_size - 1:,}, and token files hold 32 bits"
            raise Problem("tokenizer", path, reason, "renumber its vocabulary")
        if not loaded._ends() or end_of_text is not None:
            loaded.find_end()
        return loaded
    except Problem:
        raise
    except Exception as error:  # both libraries raise kinds of their own for a damaged file
        reason = f"cannot be read ({spoken(str(error))})"
        raise Problem("tokenizer", path, reason, "get a whole copy of it") from error


class Unsaid(NamedTuple):
    """What a tokenizer has no token for in a text."""

    ids: int  # that stand for something unknown
    characters: int  # that these stand for, spaces aside


class Tokenizer(ABC):
    """A tokenizer file. `vocab_size` is one more than the largest id, `eod` ends a document."""

    vocab_size: int
    unknown: int | None  # the id of what there is no token for
    leaves_out: bool  # whether what there is no token for may leave no id at all

    def __init__(self, path: Path, content: bytes, end_of_text: str | None):
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._end_of_text = end_of_text

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without an end-of-text token."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, end-of-text tokens by their names."""

    @abstractmethod
    def unsaid(self, text: str) -> Unsaid:
        """What of a text has no token; slow, for texts that have something of it."""

    @abstractmethod
    def name_of(self, token: int) -> str:
        """A token as the file writes it."""

    @abstractmethod
    def _id_of(self, name: str) -> int | None:
        """The id of a token, None where there is none of that name."""

    @abstractmethod
    def _ends(self) -> list[str]:
        """The tokens that may end a document, by their names."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without an end-of-text token."""
        return self.encode_batch([text])[0]

    @cached_property
    def eod(self) -> int:
        return self.find_end()

    def find_end(self) -> int:
        """The id that ends a document. Raises ValueError where it is open which one does."""
        names = self._ends()
        if self._end_of_text is not None:
            names = [self._end_of_text] if self._id_of(self._end_of_text) is not None else []
        if len(names) == 1:
            end = self._id_of(names[0])
            assert end is not None
            return end
        if self._end_of_text is not None:
            reason, fix = f"has no token {self._end_of_text!r}", "name one that it has"
        elif names:
            reason = f"has {len(names)} tokens that may end a document: {', '.join(names)}"
            fix = (
                "choose one with prepare.py --end-of-text, or as eos_token in a "
                "tokenizer_config.json beside the file"
            )
        else:
            reason = f"has no end-of-text token, looked for {', '.join(END_OF_TEXT)}"
            fix = "documents could not be told apart: name one with --end-of-text, or take another"
        raise Problem("tokenizer", self.path, reason, fix)

    @property
    def dtype(self) -> type[np.integer]:
        """The smallest type token files may store every id in: uint16 or int32."""
        return np.uint16 if self.vocab_size <= 2**16 else np.int32


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` such as GPT-NeoX-20B's, through the `tokenizers` library.

    A normalizer in the file (GPT-NeoX-20B has Unicode NFC) is applied, as in Pythia's training;
    decoding gives the normalized text back exactly.
    """

    def __init__(self, path: Path, content: bytes, end_of_text: str | None):
        super().__init__(path, content, end_of_text)
        file = json.loads(content)
        if dropout := file["model"].get("dropout"):
            reason = f"leaves out merges at random (dropout {dropout}): no two preparations agree"
            raise Problem("tokenizer", path, reason, 'set "dropout" of its "model" to null')
        self._tokenizer = self._measured = _open(content.decode())
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._may_cut = _splits_like_gpt2(file)
        self._added = file.get("added_tokens") or []
        for token in self._added:  # the library renumbers those that don't fit, without a word
            if (given := self._id_of(token["content"])) != token["id"]:
                reason = f"gives {token['content']!r} the id {token['id']}, read as {given}"
                raise Problem("tokenizer", path, reason, "renumber it there")
        name = _unknown_token(file["model"])
        self.unknown = None if name is None else self._id_of(name)
        self.leaves_out = self.unknown is None and not _says_every_byte(file)
        if self.leaves_out and file["model"]["type"] == "BPE":
            self._measured = _open(json.dumps(_with_unknown_token(file)))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One by one: a batch would keep 160 bytes a character until its last text is done.
        return [self._encode_in_parts(text) for text in texts]

    def _encode_in_parts(self, text: str) -> list[int]:
        """The library's own ids, of a text cut where that changes nothing."""
        ids: list[int] = []
        start = 0
        while start < len(text):
            cut = CUT.search(text, start + LONG) if self._may_cut else None
            stop = cut.start() if cut else len(text)
            try:
                ids += self._tokenizer.encode(text[start:stop], add_special_tokens=False).ids
            except Exception as error:  # the library's own kind, for a word without any token
                shown = repr(text[start : start + 40])
                reason = f"can't express the text {shown} ({error})"
                fix = "take one that has a token for everything, or for what is unknown"
                raise Problem("tokenizer", self.path, reason, fix) from error
            start = stop
        return ids

    def unsaid(self, text: str) -> Unsaid:
        # Where nothing stands for what is left out, a copy that has an unknown token shows it.
        unknown = self._measured.token_to_id(LEFT_OUT) if self.leaves_out else self.unknown
        encoding = self._measured.encode(text, add_special_tokens=False)
        return _count(text, encoding.ids, encoding.offsets, unknown)

    def name_of(self, token: int) -> str:
        return self._tokenizer.id_to_token(token)

    def _id_of(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def _ends(self) -> list[str]:
        """Its special tokens; pieces of the same names are text, unless there is nothing else."""
        special = [token["content"] for token in self._added if token.get("special")]
        found = [name for name in END_OF_TEXT if self._id_of(name) is not None]
        found = [name for name in found if name in special] or found
        # What a model's own configuration, beside the file, calls its end of text decides.
        named = _end_beside(self.path)
        return [named] if named in found else found

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def _open(content: str):
    """The library's tokenizer of a tokenizer.json, which neither cuts nor fills up."""
    import tokenizers

    opened = tokenizers.Tokenizer.from_str(content)
    opened.no_truncation()
    opened.no_padding()
    return opened


def _end_beside(path: Path) -> str | None:
    """The end-of-text token that tokenizer_config.json names, as Hugging Face's folders have it."""
    try:
        end = json.loads((path.parent / "tokenizer_config.json").read_text("utf-8"))["eos_token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return end.get("content") if isinstance(end, dict) else end


def _splits_like_gpt2(file: dict) -> bool:
    """Whether a tokenizer.json splits text into words as GPT-2 does, so that no token, merge or
    normal form reaches over a place that `CUT` finds."""
    splitter, normalizer = file.get("pre_tokenizer") or {}, file.get("normalizer") or {}
    return (
        splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter.get("add_prefix_space")
        and normalizer.get("type", "NFC") == "NFC"
        and not any(map(_reaches_out, file.get("added_tokens") or []))
    )


def _reaches_out(token: dict) -> bool:
    """Whether an added token takes spaces beside it, or holds a space between other characters."""
    word = token["content"]
    strips = token.get("lstrip") or token.get("rstrip")
    return bool(strips) or not (word.isspace() or word.split() == [word])


def _unknown_token(model: dict) -> str | None:
    """The token that a tokenizer.json's model puts for what it doesn't know."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _says_every_byte(file: dict) -> bool:
    """Whether the model gets text as bytes and has a token for each that UTF-8 uses."""
    from tokenizers import pre_tokenizers

    vocabulary = file["model"]["vocab"]
    if file["model"].get("byte_fallback"):
        names = {f"<0x{byte:02X}>" for byte in range(256) if byte not in NEVER_IN_UTF8}
    elif '"ByteLevel"' in json.dumps([file.get("pre_tokenizer"), file.get("normalizer")]):
        # GPT-2 writes these bytes as the characters of the same numbers.
        names = set(pre_tokenizers.ByteLevel.alphabet()) - set(map(chr, NEVER_IN_UTF8))
    else:
        return False
    known = vocabulary if isinstance(vocabulary, Mapping) else {piece for piece, _ in vocabulary}
    # Inside a word, and at its end, a byte may have another name.
    inside = {"", file["model"].get("continuing_subword_prefix") or ""}
    at_end = {"", file["model"].get("end_of_word_suffix") or ""}
    forms = itertools.product(inside, names, at_end)
    return {"".join(form) for form in forms} <= set(known)


def _with_unknown_token(file: dict) -> dict:
    """A BPE tokenizer.json with a token for the characters that it would leave out."""
    model = {**file["model"], "unk_token": LEFT_OUT, "fuse_unk": False}
    model["vocab"] = {**model["vocab"], LEFT_OUT: len(model["vocab"])}
    return {**file, "model": model}


def _count(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], unknown: int | None
) -> Unsaid:
    """The unknown ids, and the characters that they cover."""
    places = {place for i, place in zip(ids, offsets, strict=True) if i == unknown}
    covered = {at for start, stop in places for at in range(start, stop)}
    return Unsaid(sum(i == unknown for i in ids), sum(not text[at].isspace() for at in covered))


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Models trained here give every UTF-8 text back exactly."""

    leaves_out = False

    def __init__(self, path: Path, content: bytes, end_of_text: str | None):
        from sentencepiece import SentencePieceProcessor

        super().__init__(path, content, end_of_text)
        self.model = SentencePieceProcessor(model_proto=content)
        self.vocab_size = self.model.vocab_size()
        self.unknown = self.model.unk_id()
        mark = [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = mark if self.unknown not in mark else None

    def unsaid(self, text: str) -> Unsaid:
        found = self.model.encode_as_offset_mapping(text)
        return _count(text, found["ids"], found["offsets"], self.unknown)

    def name_of(self, token: int) -> str:
        return self.model.id_to_piece(token)

    def _id_of(self, name: str) -> int | None:
        found = self.model.piece_to_id(name)
        return None if found == self.unknown else found

    def _ends(self) -> list[str]:
        end = self.model.eos_id()
        if end >= 0:
            return [self.model.id_to_piece(end)]
        return [name for name in END_OF_TEXT if self._id_of(name) is not None]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            ids if SPACE_MARK not in text or self._mark_ids is None else self._encode_marked(text)
            for text, ids in zip(texts, self.model.encode(list(texts)), strict=True)
        ]

    def _encode_marked(self, text: str) -> list[int]:
        """A text with U+2581 in it: sentencepiece itself would turn it into a space."""
        first, *rest = (self.model.encode(part) for part in text.split(SPACE_MARK))
        return first + [i for part in rest for i in self._mark_ids + part]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; sentencepiece drops control tokens, so the document ends are put in."""
        parts: list[str] = []
        part: list[int] = []
        for i in map(int, ids):
            if i == self.eod:
                parts += [self.model.decode(part), self.model.id_to_piece(i)]
                part = []
            else:
                part.append(i)
        return "".join([*parts, self.model.decode(part)])


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, the long ones cut before a space: no piece reaches over one. Blank ones are left out.

    sentencepiece itself would pass over a line of more than `SENTENCE_BYTES`, without a word.
    """
    for text in texts:
        for line in text.splitlines(keepends=True):
            start = 0
            if len(line) > SENTENCE_BYTES // 4 and len(line.encode()) > SENTENCE_BYTES:
                while len(line) - start > SENTENCE_BYTES // 4:  # of up to 4 bytes a character
                    stop = start + SENTENCE_BYTES // 4
                    cut = line.rfind(" ", start + 1, stop)
                    stop = stop if cut < 0 else cut
                    yield line[start:stop]
                    start = stop
            if line[start:].strip():
                yield line[start:]


def why_untrained(error: str) -> tuple[str, str]:
    """What sentencepiece's error means, and what mends it."""
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", error):
        reason = f"the texts give no more than {found[1]} pieces"
        return reason, "lower it to that, or train on more text (--sample-mb)"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"the characters of the texts alone are {found[1]} pieces", "raise it above that"
    if "sentences_.empty()" in error:
        return "there is no text to train a tokenizer on", "give --input with text in it"
    return f"sentencepiece could not train that ({spoken(error)})", "try another size, or more text"


def spoken(error: str) -> str:
    """A library's error without the place in its own code that sentencepiece puts before it."""
    return (
        re.sub(r"^INTERNAL: \S+\(\d+\) \[.*\]\s*", "", error)
        or "it is no sentencepiece model, or a cut one"
    )


def train_sentencepiece(
    texts: Iterable[str], path: str | Path, vocab_size: int, model_type: str = "bpe"
) -> SentencePieceTokenizer:
    """Train a sentencepiece model on `texts` and write it to `path`.

    Nothing is normalized and every byte has a piece of its own, so that any UTF-8 text comes
    back exactly. Id 0 ends a document, as in GPT-NeoX-20B's tokenizer. The result depends only
    on the texts (their order included), `vocab_size` and `model_type` ("bpe" or "unigram").
    """
    from sentencepiece import SentencePieceTrainer

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as model:
            SentencePieceTrainer.train(
                sentence_iterator=sentences(texts),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                split_digits=True,
                eos_id=0,
                eos_piece=END_OF_TEXT[0],
                unk_id=1,
                bos_id=-1,
                pad_id=-1,
                num_threads=1,  # more threads give another model
                max_sentence_length=SENTENCE_BYTES,
                minloglevel=2,
            )
    except OSError as error:
        reason = f"can't be written ({error})"
        raise Problem("tokenizer", path, reason, "free space, or choose another place") from error
    except RuntimeError as error:  # sentencepiece's word for everything
        raise Problem("--vocab-size", vocab_size, *why_untrained(str(error))) from error
    trained = load_tokenizer(path)
    assert isinstance(trained, SentencePieceTokenizer)
    return trained
