"""The shape of a GPT-NeoX model, and Pythia's shapes by name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Pythia's published shapes. The two largest were trained on a vocabulary padded for 2 and 4
# tensor-parallel ranks, and their files name no initialisation, which means GPT-NeoX's default.
PRESETS: dict[str, dict[str, Any]] = {
    "14m": {"num_layers": 6, "hidden_size": 128, "num_attention_heads": 4},
    "31m": {"num_layers": 6, "hidden_size": 256, "num_attention_heads": 8},
    "70m": {"num_layers": 6, "hidden_size": 512, "num_attention_heads": 8},
    "160m": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "410m": {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16},
    "1b": {"num_layers": 16, "hidden_size": 2048, "num_attention_heads": 8},
    "1.4b": {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16},
    "2.8b": {"num_layers": 32, "hidden_size": 2560, "num_attention_heads": 32},
    "6.9b": {
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "vocab_size": 50432,
        "initialization": "normal",
    },
    "12b": {
        "num_layers": 36,
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "vocab_size": 50688,
        "initialization": "normal",
    },
}

Preset = Literal["14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]

# Vocabulary rows on one tensor-parallel rank come in multiples of this (GPT-NeoX's rule).
VOCABULARY_MULTIPLE = 128


def padded_vocab_size(vocab_size: int, tensor_parallel: int = 1) -> int:
    """Rows of the embeddings that a layout allocates, over all tensor-parallel ranks.

    Rows past `vocab_size` take no part in the softmax, so every layout has the same loss.
    """
    multiple = VOCABULARY_MULTIPLE * tensor_parallel
    return -(-vocab_size // multiple) * multiple


class ModelConfig(BaseModel):
    """One GPT-NeoX model. `preset` fills in a Pythia size; every key given beside it wins."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    preset: Preset | None = Field(
        None, description=f"Pythia size to start from: {', '.join(PRESETS)}; other keys override it"
    )
    num_layers: int = Field(ge=1, le=10_000, description="Number of transformer blocks")
    hidden_size: int = Field(
        ge=1, le=2**20, description="Width of the residual stream, in channels"
    )
    num_attention_heads: int = Field(ge=1, description="Attention heads; must divide hidden_size")
    intermediate_size: int = Field(
        0, ge=0, le=2**22, description="Neurons of each MLP; 0 means 4 x hidden_size"
    )
    vocab_size: int = Field(
        50304,
        ge=2,
        le=2**24,
        description="Rows of the embeddings, in tokens; layouts pad further by masking",
    )
    max_position_embeddings: int = Field(
        2048, ge=1, le=2**24, description="Longest sequence, in tokens"
    )
    rotary_percent: float = Field(
        0.25, gt=0, le=1, description="Share of each head's channels that rotary positions turn"
    )
    rotary_base: float = Field(10000.0, ge=1, le=1e12, description="Base of the rotary frequencies")
    parallel_residual: bool = Field(
        True, description="x + attention(ln1 x) + mlp(ln2 x) if true, one after the other if false"
    )
    activation: Literal["gelu", "gelu_tanh"] = Field(
        "gelu", description="MLP non-linearity: gelu (erf form) or gelu_tanh (tanh approximation)"
    )
    layer_norm_epsilon: float = Field(
        1e-5, ge=1e-30, le=1, description="Added to LayerNorm's variance"
    )
    initialization: Literal["pythia", "normal"] = Field(
        "pythia",
        description="pythia: std sqrt(2/(5*hidden)), outputs 2/(layers*sqrt(hidden)); "
        "normal: std 0.02, outputs 0.02/sqrt(2*layers)",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        """The preset's keys, then the given ones over them."""
        if not isinstance(given, dict) or given.get("preset") is None:
            return given
        preset = given["preset"]
        known = isinstance(preset, str) and preset in PRESETS
        return PRESETS[preset] | given if known else given

    @field_validator("num_attention_heads")
    @classmethod
    def _heads_divide_hidden_size(cls, heads: int, info: Any) -> int:
        hidden = info.data.get("hidden_size")
        if hidden and hidden % heads:
            raise ValueError(
                f"{heads} heads do not divide hidden_size {hidden}; choose a divisor of {hidden}"
            )
        return heads

    @model_validator(mode="after")
    def _complete(self) -> "ModelConfig":
        if self.intermediate_size == 0:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        if self.rotary_dims < 2 or self.rotary_dims % 2:
            raise ValueError(
                f"rotary_percent {self.rotary_percent} of {self.head_dim} channels a head turns "
                f"{self.rotary_dims} of them, but rotary positions need an even number of 2 or "
                "more; change rotary_percent or num_attention_heads"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dims(self) -> int:
        """Channels of each head that carry positions."""
        return int(self.head_dim * self.rotary_percent)
