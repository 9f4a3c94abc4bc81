"""To and from Hugging Face's GPTNeoX form: the configuration, names and rows of the weights."""

from typing import Any

from model.config import ModelConfig

HIDDEN_ACT = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """The shape as a `config.json` in the form Pythia's repositories have."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": HIDDEN_ACT[config.activation],
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_pct": config.rotary_percent,
        "rotary_emb_base": config.rotary_base,
        "layer_norm_eps": config.layer_norm_epsilon,
        "use_parallel_residual": config.parallel_residual,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
