"""The model's parameters by name and whole shape, without building it."""

from model.config import ModelConfig


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of the unsharded tensor with the logical vocabulary, in order."""
    hidden, neurons = config.hidden_size, config.intermediate_size
    table = (config.vocab_size, hidden)
    matrices = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (neurons, hidden),
        "mlp.dense_4h_to_h": (hidden, neurons),
    }
    shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": table}
    for number in range(config.num_layers):
        block = f"gpt_neox.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{block}.{norm}.{part}": (hidden,) for part in ("weight", "bias")}
        for matrix, shape in matrices.items():
            shapes[f"{block}.{matrix}.weight"] = shape
            shapes[f"{block}.{matrix}.bias"] = shape[:1]
    shapes |= {f"gpt_neox.final_layer_norm.{part}": (hidden,) for part in ("weight", "bias")}
    shapes["embed_out.weight"] = table
    return shapes
