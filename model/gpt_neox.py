"""GPT-NeoX: token embedding, blocks, final norm, output embedding."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l2e import L2EConfig
from model.block import Block
from model.config import ModelConfig
from model.embedding import InputEmbedding, OutputEmbedding
from model.linears import LayerNorm, tensor_parallel_size


class Body(nn.Module):
    """Everything but the output embedding: tokens [batch, sequence] -> residual stream.

    The residual stream is [sequence, batch, hidden], or this rank's part of the sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        l2e: L2EConfig | None,
        *,
        seed: int,
        sequence_parallel: bool,
        activation_checkpointing: bool,
    ):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.embed_in = InputEmbedding(config, seed=seed, sequence_parallel=sequence_parallel)
        self.layers = nn.ModuleList(
            Block(number, config, l2e, seed=seed, sequence_parallel=sequence_parallel)
            for number in range(config.num_layers)
        )
        self.final_layer_norm = LayerNorm(
            config.hidden_size, config.layer_norm_epsilon, sequence_parallel=sequence_parallel
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_in(tokens)
        for block in self.layers:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return self.final_layer_norm(x)


class GPTNeoX(nn.Module):
    """The whole model. Its parameters bear the names of Hugging Face's `GPTNeoXForCausalLM`.

    Build it after megatron-core's parallel state is initialised: its sharded layers hold this
    rank's part. `activation_checkpointing` keeps only each block's input for the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        l2e: L2EConfig | None = None,
        *,
        seed: int,
        sequence_parallel: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.config = config
        sequence_parallel = sequence_parallel and tensor_parallel_size() > 1
        self.gpt_neox = Body(
            config,
            l2e,
            seed=seed,
            sequence_parallel=sequence_parallel,
            activation_checkpointing=activation_checkpointing,
        )
        self.embed_out = OutputEmbedding(config, seed=seed, sequence_parallel=sequence_parallel)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [batch, sequence, vocab_size] of tokens [batch, sequence].

        With labels [batch, sequence], the token that follows each one, instead the mean
        cross-entropy over all positions: a float32 scalar in nats.
        """
        hidden = self.gpt_neox(tokens)
        if labels is None:
            return self.embed_out(hidden)
        return self.embed_out.loss(hidden, labels)
