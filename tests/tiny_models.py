"""Small random Hugging Face models, and a tokenizer of bytes that needs no file."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from model import ModelConfig
from model.huggingface import hugging_face_config

END_OF_TEXT = "<|endoftext|>"


def gpt_neox(layers: int = 2, hidden: int = 32, **settings) -> GPTNeoXForCausalLM:
    """GPT-NeoX of four heads; `settings` are transformers' own."""
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 4}
    shape |= {"intermediate_size": 4 * hidden, "vocab_size": 64}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape | settings))


def gpt2(layers: int = 2, hidden: int = 32, **settings) -> GPT2LMHeadModel:
    """GPT-2 without dropout."""
    shape = {"n_layer": layers, "n_embd": hidden, "n_head": 2, "vocab_size": 50}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**shape | still | settings))


def llama(layers: int = 2, hidden: int = 32, **settings) -> LlamaForCausalLM:
    """Llama with keys and values of two heads."""
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 2 * hidden, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**shape | settings))


def counterpart(
    config: ModelConfig, weights: dict[str, torch.Tensor] | None = None, **settings
) -> GPTNeoXForCausalLM:
    """transformers' model of our configuration, with our model's weights where they are given."""
    form = GPTNeoXConfig.from_dict(hugging_face_config(config) | settings)
    theirs = GPTNeoXForCausalLM(form)
    if weights is not None:
        theirs.load_state_dict(their_names(weights, config.vocab_size))
    return theirs


def their_names(weights: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """This version of transformers calls the output embedding lm_head; padding rows go."""
    state = {name.replace("embed_out.", "lm_head."): value for name, value in weights.items()}
    for name in ("gpt_neox.embed_in.weight", "lm_head.weight"):
        state[name] = state[name][:rows]
    return state


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, and `<|endoftext|>` as id 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer
