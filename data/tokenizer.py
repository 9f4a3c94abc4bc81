"""Text to token ids and back: Hugging Face `tokenizer.json` files and sentencepiece models."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from l2e.problems import Problem

# Names under which tokenizers keep the token that ends a document, the Pile's first.
END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
# sentencepiece writes a space as this character, so the character itself goes byte by byte.
SPACE_MARK = "\u2581"
# Texts of more characters are tokenized in parts, cut before the space between two words or
# after the line break between them, where GPT-2's splitting into words always cuts. Small parts
# stay in the processor's caches: on books that is half as fast again as whole texts.
LONG = 2**15
CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=[^\W_]\n)(?=[^\W_])")


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Open a tokenizer file: `*.json` is Hugging Face's format, `*.model` sentencepiece's.

    Raises ValueError for a missing, damaged or unknown file.
    """
    path = Path(path)
    if not path.is_file():
        raise Problem("tokenizer", path, "no such file", "give a tokenizer.json or a .model file")
    kinds = {".json": HuggingFaceTokenizer, ".model": SentencePieceTokenizer}
    if path.suffix not in kinds:
        raise Problem(
            "tokenizer",
            path,
            f"unknown ending {path.suffix!r}",
            "give a Hugging Face tokenizer.json or a sentencepiece .model file",
        )
    try:
        return kinds[path.suffix](path)
    except Problem:
        raise
    except Exception as error:  # both libraries raise kinds of their own for a damaged file
        reason = f"cannot be read ({error})"
        raise Problem("tokenizer", path, reason, "get a whole copy of it") from error


class Tokenizer(ABC):
    """A tokenizer file. `vocab_size` is one more than the largest id, `eod` ends a document."""

    vocab_size: int
    eod: int

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without an end-of-text token."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, end-of-text tokens by their names."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without an end-of-text token."""
        return self.encode_batch([text])[0]

    def __init__(self, path: Path):
        self.path = path
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    def _find_eod(self, ids: dict[str, int | None]) -> int:
        found = [i for name in END_OF_TEXT if (i := ids[name]) is not None]
        if not found:
            raise Problem(
                "tokenizer",
                self.path,
                f"has no end-of-text token, looked for {', '.join(END_OF_TEXT)}",
                "documents could not be told apart: take another tokenizer",
            )
        return found[0]

    @property
    def dtype(self) -> type[np.integer]:
        """The smallest type token files may store every id in: uint16 or int32."""
        return np.uint16 if self.vocab_size <= 2**16 else np.int32


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` such as GPT-NeoX-20B's, through the `tokenizers` library.

    A normalizer in the file (GPT-NeoX-20B has Unicode NFC) is applied, as in Pythia's training;
    decoding gives the normalized text back exactly.
    """

    def __init__(self, path: Path):
        import tokenizers

        super().__init__(path)
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = self._find_eod({n: self._tokenizer.token_to_id(n) for n in END_OF_TEXT})
        self._may_cut = _splits_like_gpt2(json.loads(path.read_text("utf-8")))

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
            ids += self._tokenizer.encode(text[start:stop], add_special_tokens=False).ids
            start = stop
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def _splits_like_gpt2(file: dict) -> bool:
    """Whether a tokenizer.json splits text into words as GPT-2 does, so that no token, merge or
    normal form reaches over a place that `CUT` finds."""
    splitter, normalizer = file.get("pre_tokenizer") or {}, file.get("normalizer") or {}
    words = [token["content"] for token in file.get("added_tokens", [])]
    return (
        splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter.get("add_prefix_space")
        and normalizer.get("type", "NFC") == "NFC"
        and not any(word.strip() and len(word.split()) > 1 for word in words)
    )


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Models trained here give every UTF-8 text back exactly."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        super().__init__(path)
        self._model = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._model.vocab_size()
        unknown = self._model.unk_id()
        pieces = {name: self._model.piece_to_id(name) for name in END_OF_TEXT}
        self.eod = self._find_eod({n: i if i != unknown else None for n, i in pieces.items()})
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = mark if unknown not in mark else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            ids if SPACE_MARK not in text or self._mark_ids is None else self._encode_marked(text)
            for text, ids in zip(texts, self._model.encode(list(texts)), strict=True)
        ]

    def _encode_marked(self, text: str) -> list[int]:
        """A text with U+2581 in it: sentencepiece itself would turn it into a space."""
        first, *rest = (self._model.encode(part) for part in text.split(SPACE_MARK))
        return first + [i for part in rest for i in self._mark_ids + part]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; sentencepiece drops control tokens, so the document ends are put in."""
        parts: list[str] = []
        part: list[int] = []
        for i in map(int, ids):
            if i == self.eod:
                parts += [self._model.decode(part), self._model.id_to_piece(i)]
                part = []
            else:
                part.append(i)
        return "".join([*parts, self._model.decode(part)])


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
    partial = path.with_name(path.name + ".partial")
    lines = (line for text in texts for line in text.splitlines(keepends=True) if line.strip())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as model:
            SentencePieceTrainer.train(
                sentence_iterator=lines,
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
                minloglevel=2,
            )
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        reason = f"can't be written ({error})"
        raise Problem("tokenizer", path, reason, "free space, or choose another place") from error
    except RuntimeError as error:  # sentencepiece's word for everything
        partial.unlink(missing_ok=True)
        raise Problem(
            "--vocab-size",
            vocab_size,
            f"sentencepiece could not train that ({error})",
            "a vocabulary needs at least 300 pieces, and a sample that is large enough for it",
        ) from error
    return SentencePieceTokenizer(path)
