"""Train the small GPT-NeoX that the analysis report in docs/ is about, on one CPU core.

    OMP_NUM_THREADS=1 python bench/report_model.py --corpus CORPUS --output CHECKPOINTS

CORPUS holds train.jsonl.zst and valid.jsonl.zst in the Pile's record format. Deliberately plain
(no engine, no inhibition): it needs torch, transformers and tokenizers alone, and leaves a series
of checkpoints in Hugging Face form, step 0 included, for `launch/analyze.py`.
"""

import argparse
import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

VOCABULARY, HIDDEN, LAYERS, HEADS, LENGTH, SEQUENCES = 2048, 224, 4, 4, 192, 24
PEAK_RATE, WARMUP, SEED = 2e-3, 100, 1234
END_OF_TEXT = "<|endoftext|>"


def documents(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        stream = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8")
        for line in stream:
            yield json.loads(line)["text"]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents, each closed by the end-of-text token: int64 [tokens]."""
    parts = []
    for start in range(0, len(texts), 500):
        for encoded in tokenizer.encode_batch(texts[start : start + 500]):
            parts.append(np.array([*encoded.ids, 0], dtype=np.uint16))
    return np.concatenate(parts).astype(np.int64)


def initialize(model: GPTNeoXForCausalLM) -> None:
    """Pythia's initialisation: sqrt(2/(5h)), and 2/(L sqrt(h)) for the two projections back."""
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
            torch.nn.init.normal_(parameter, std=2 / LAYERS / math.sqrt(HIDDEN))
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=math.sqrt(2 / 5 / HIDDEN))


def loss_of(model: GPTNeoXForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def learning_rate(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP)
    return PEAK_RATE * warmup * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4341, help="4,608 tokens each (20.0 M)")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    options.output.mkdir(parents=True, exist_ok=True)

    texts = list(documents(options.corpus / "train.jsonl.zst"))
    np.random.default_rng(SEED).shuffle(texts)
    tokenizer = train_tokenizer(texts[:: max(1, len(texts) // 1500)])
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
    rows = token_stream(tokenizer, texts)
    rows = rows[: len(rows) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    valid = token_stream(tokenizer, list(documents(options.corpus / "valid.jsonl.zst")))
    valid = valid[: 200 * (LENGTH + 1)].reshape(200, LENGTH + 1)
    order = np.random.default_rng(SEED).permutation(len(rows))
    print(f"{rows.size:,} training tokens, {options.steps * SEQUENCES * LENGTH:,} of them used")
    if options.steps * SEQUENCES > len(rows):
        raise SystemExit("the corpus is too small for one epoch of so many steps")

    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * HIDDEN,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    initialize(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)

    keep = {0, *(2**i for i in range(10)), *range(1000, options.steps, 1000), options.steps}
    log = (options.output / "train.jsonl").open("w")
    start = time.perf_counter()
    for step in range(options.steps + 1):
        if step in keep:
            folder = options.output / f"step{step}"
            model.save_pretrained(folder)
            saved.save_pretrained(folder)
            model.eval()
            with torch.no_grad():
                losses = [loss_of(model, torch.from_numpy(part)) for part in np.split(valid, 10)]
            model.train()
            entry = {"step": step, "validation_loss": float(torch.stack(losses).mean())}
            log.write(json.dumps(entry) + "\n")
        if step == options.steps:
            break
        batch = torch.from_numpy(rows[order[step * SEQUENCES : (step + 1) * SEQUENCES]])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            seconds = round(time.perf_counter() - start, 1)
            log.write(json.dumps({"step": step, "loss": float(loss), "seconds": seconds}) + "\n")
            log.flush()
    log.close()


if __name__ == "__main__":
    main()
