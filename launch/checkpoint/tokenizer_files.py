"""A tokenizer in the form `transformers.AutoTokenizer` reads, whichever kind it is here."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from data.tokenizer import SPACE_MARK, SentencePieceTokenizer, load_tokenizer


def write_tokenizer(source: Path, folder: Path, texts: list[str]) -> None:
    """Write tokenizer.json and its configuration into `folder`.

    `texts` are encoded by both; they must agree to the last id.

    Raises:
        ValueError: a sentencepiece model that tokenizer.json cannot express.
    """
    original = load_tokenizer(source)
    if isinstance(original, SentencePieceTokenizer):
        backend = from_sentencepiece(original)
    else:
        backend = Tokenizer.from_file(str(source))
    end = backend.id_to_token(original.eod)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, bos_token=end, unk_token=end
    )
    fast.save_pretrained(folder)
    for text in texts:
        if fast.encode(text, add_special_tokens=False) != original.encode(text):
            raise ValueError(
                f"{source}: written as tokenizer.json it encodes text differently; only byte-pair "
                "sentencepiece models with byte fallback and no normalization can be exported"
            )


def from_sentencepiece(original: SentencePieceTokenizer) -> Tokenizer:
    """A byte-pair sentencepiece model as merges, best score first, as it applies them itself."""
    model = original._model
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
