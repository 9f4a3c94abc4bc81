"""One transformer block."""

from functools import partial

from torch import Tensor, nn

from l2e import L2EConfig, L2ELayer, select_layers
from model.attention import Attention
from model.config import ModelConfig
from model.linears import LayerNorm, tensor_parallel_size
from model.mlp import MLP


class Block(nn.Module):
    """x + attention(ln1 x) + mlp(ln2 x), or the two one after the other."""

    def __init__(
        self,
        number: int,
        config: ModelConfig,
        l2e: L2EConfig | None = None,
        *,
        seed: int,
        sequence_parallel: bool = False,
    ):
        """`number` counts from 0; `l2e` says which blocks are inhibited, and how."""
        super().__init__()
        name = f"gpt_neox.layers.{number}"
        norm = partial(LayerNorm, config.hidden_size, config.layer_norm_epsilon)
        inhibitor = inhibitor_of(number, config, l2e)
        self.number = number
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = norm(sequence_parallel=sequence_parallel)
        self.post_attention_layernorm = norm(sequence_parallel=sequence_parallel)
        self.attention = Attention(
            f"{name}.attention", config, seed=seed, sequence_parallel=sequence_parallel
        )
        self.mlp = MLP(
            f"{name}.mlp", config, inhibitor, seed=seed, sequence_parallel=sequence_parallel
        )
        if inhibitor is not None and inhibitor.config.method == "silence":
            # The control of a switched-off MLP stays off in evaluation and in an export: these
            # weights get no gradient while their input is 0.
            nn.init.zeros_(self.mlp.dense_4h_to_h.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[sequence, batch, hidden] -> the same shape."""
        after_attention = x + self.attention(self.input_layernorm(x))
        residual = x if self.parallel_residual else after_attention
        mlp_output = self.mlp(self.post_attention_layernorm(residual))
        if self.mlp.inhibitor is not None:
            self.mlp.inhibitor.observe_output(mlp_output, residual)
        return after_attention + mlp_output


def inhibitor_of(number: int, config: ModelConfig, l2e: L2EConfig | None) -> L2ELayer | None:
    """The non-linearity that inhibits this block's neurons, or None if the block is plain."""
    if l2e is None:
        return None
    inhibited = select_layers(l2e.layers, config.num_layers)
    if number not in inhibited:
        return None
    return L2ELayer(
        config.intermediate_size // tensor_parallel_size(),
        l2e,
        activation=config.activation,
        name=str(number),
        inhibited_layers=len(inhibited),
        total_neurons=config.intermediate_size,
        sequence_first=True,
    )
