"""The MLP of a block: the place of the neurons."""

import torch.nn.functional as F
from torch import Tensor, nn

from l2e import L2ELayer
from l2e.kernels import APPROXIMATE
from model.config import ModelConfig
from model.init import initializer
from model.linears import ColumnLinear, RowLinear


class MLP(nn.Module):
    """gelu(x W_in^T + b_in) W_out^T + b_out; an inhibited block's gelu is its `L2ELayer`."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        inhibitor: L2ELayer | None,
        *,
        seed: int,
        sequence_parallel: bool,
    ):
        super().__init__()
        hidden, neurons = config.hidden_size, config.intermediate_size
        self.dense_h_to_4h = ColumnLinear(
            hidden,
            neurons,
            initializer(f"{name}.dense_h_to_4h.weight", config, seed),
            sequence_parallel=sequence_parallel,
        )
        self.dense_4h_to_h = RowLinear(
            neurons,
            hidden,
            initializer(f"{name}.dense_4h_to_h.weight", config, seed),
            sequence_parallel=sequence_parallel,
        )
        self.inhibitor = inhibitor
        self.approximation = APPROXIMATE[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[sequence, batch, hidden] -> the same shape."""
        if self.inhibitor is None or not self.training:
            neurons = F.gelu(self.dense_h_to_4h(x), approximate=self.approximation)
        elif self.inhibitor.adds_bias(x):
            neurons = self.inhibitor(*self.dense_h_to_4h(x, bias_apart=True))
        else:
            neurons = self.inhibitor(self.dense_h_to_4h(x))
        return self.dense_4h_to_h(neurons)
