"""Tokens to channels, and channels to the next token: two untied tables."""

from torch import Tensor

from model.config import ModelConfig, padded_vocab_size
from model.init import initializer
from model.linears import (
    ColumnLinear,
    TokenEmbedding,
    tensor_parallel_group,
    tensor_parallel_size,
    whole_sequence,
    whole_vocabulary,
)
from model.loss import cross_entropy


class InputEmbedding(TokenEmbedding):
    """tokens [batch, sequence] -> [sequence, batch, hidden]."""

    def __init__(self, config: ModelConfig, *, seed: int, sequence_parallel: bool = False):
        super().__init__(
            padded_vocab_size(config.vocab_size, tensor_parallel_size()),
            config.hidden_size,
            initializer("gpt_neox.embed_in.weight", config, seed),
            sequence_parallel=sequence_parallel,
        )
        self.longest = config.max_position_embeddings

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.longest:
            raise ValueError(
                f"sequences of {tokens.shape[1]} tokens, but model.max_position_embeddings is "
                f"{self.longest}: shorten them or raise that key"
            )
        return super().forward(tokens)


class OutputEmbedding(ColumnLinear):
    """The last matrix: [sequence, batch, hidden] -> logits or loss."""

    def __init__(self, config: ModelConfig, *, seed: int, sequence_parallel: bool = False):
        super().__init__(
            config.hidden_size,
            padded_vocab_size(config.vocab_size, tensor_parallel_size()),
            initializer("embed_out.weight", config, seed),
            bias=False,
            sequence_parallel=sequence_parallel,
        )
        self.vocab_size = config.vocab_size

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """Logits [batch, sequence, vocab_size], whole on every tensor-parallel rank."""
        logits = whole_vocabulary(self.product(hidden))
        return logits[..., : self.vocab_size].transpose(0, 1)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy against labels [batch, sequence]: a float32 scalar in nats."""
        hidden = whole_sequence(hidden, sequence_parallel=self.sequence_parallel)
        return cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            labels.t().flatten(),
            self.vocab_size,
            tensor_parallel_group(),
        )
