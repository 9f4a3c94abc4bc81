"""A tokenizer in the form `transformers.AutoTokenizer` reads, whichever kind it is here."""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from data.files import write_json
from data.tokenizer import SPACE_MARK, SentencePieceTokenizer, load_tokenizer
from launch.checkpoint.stored import GENERATION, IDENTITY_FILES, identity_files


def write_tokenizer(
    source: Path, folder: Path, texts: list[str], end_of_text: str | None = None
) -> dict[str, int]:
    """Write tokenizer.json and its configuration into `folder`; the ids of its special tokens.

    `texts` are encoded by both; they must agree to the last id. end_of_text: the token that ended
    the documents of the training, which ends those of the exported model, whatever lies beside the
    file. The rest of that, in Hugging Face's form, stays as it is; elsewhere only those tokens are
    special that the file has.

    Raises:
        ValueError: a sentencepiece model that tokenizer.json cannot express.
    """
    original = load_tokenizer(source, end_of_text)
    if isinstance(original, SentencePieceTokenizer):
        backend = from_sentencepiece(original)
        special = named(original)
    else:
        backend = Tokenizer.from_file(str(source))
        special = {}
    end = original.name_of(original.eod)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, **special)
    fast.save_pretrained(folder)
    for path in identity_files(source):
        shutil.copyfile(path, folder / path.name)
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    if end_of_text is not None and fast.eos_token != end:
        end_texts_with(end, original.eod, folder)
        fast = PreTrainedTokenizerFast.from_pretrained(folder)
    for text in texts:
        if fast.encode(text, add_special_tokens=False) != original.encode(text):
            raise ValueError(
                f"{source}: written as tokenizer.json it encodes text differently; only byte-pair "
                "sentencepiece models with byte fallback and no normalization can be exported. "
                "--no-tokenizer exports the weights alone"
            )
    ids = {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id}
    return {name: number for name, number in ids.items() if number is not None}


def end_texts_with(name: str, number: int, folder: Path) -> None:
    """Let what lies beside the tokenizer call this token the end of a text."""
    for file in IDENTITY_FILES:
        end = {"eos_token_id": number} if file == GENERATION else {"eos_token": name}
        if (folder / file).is_file():
            write_json(folder / file, json.loads((folder / file).read_text("utf-8")) | end)


def named(original: SentencePieceTokenizer) -> dict[str, str]:
    """The special pieces that a sentencepiece model has."""
    model = original.model
    ids = {"bos_token": model.bos_id(), "unk_token": model.unk_id(), "pad_token": model.pad_id()}
    return {name: model.id_to_piece(number) for name, number in ids.items() if number >= 0}


def from_sentencepiece(original: SentencePieceTokenizer) -> Tokenizer:
    """A byte-pair sentencepiece model as merges, best score first, as it applies them itself."""
    model = original.model
    pieces = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    merges = []
    for piece, number in pieces.items():
        if model.is_control(number) or model.is_byte(number) or model.is_unknown(number):
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        score = model.get_score(number)
        merges += [(-score, split) for split in splits if pieces.keys() >= set(split)]
    merges.sort(key=lambda merge: merge[0])
    tokenizer = Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=[split for _, split in merges],
            unk_token=model.id_to_piece(model.unk_id()),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE_MARK)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [piece for piece, number in pieces.items() if model.is_control(number)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    return tokenizer
