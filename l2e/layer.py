"""The inhibited non-linearity, as a module that stands where GELU stood."""

import torch
from torch import Tensor, nn

from l2e import inhibition, kernels, pull
from l2e.config import L2EConfig
from l2e.state import LayerState


class L2ELayer(nn.Module):
    """A block's non-linearity that observes its activations and inhibits the selected ones.

    In eval mode it is exactly the plain activation. It has no parameters and no buffers.

    Args:
        neurons: hidden units of this process (its tensor-parallel shard); None to learn it from
            the first activations.
        activation: "gelu" (erf), "gelu_tanh", or None for the identity.
        name: the layer's name in metrics and checkpoints.
        inhibited_layers: L_inh, inhibited layers of the whole model.
        total_neurons: hidden units of the whole layer; None if they are not sharded.
        sequence_first: activations are [sequence, batch, neurons], not [batch, sequence, neurons].
    """

    def __init__(
        self,
        neurons: int | None,
        config: L2EConfig,
        *,
        activation: str | None = "gelu",
        name: str,
        inhibited_layers: int,
        total_neurons: int | None = None,
        sequence_first: bool = False,
    ) -> None:
        super().__init__()
        if activation is not None and activation not in kernels.APPROXIMATE:
            raise ValueError(
                f"activation = {activation!r}: expected one of {list(kernels.APPROXIMATE)} or None"
            )
        self.activation = activation
        self.config = config
        # Where the position in a sequence matters, the operator wants sequences together.
        positions_matter = (
            config.neuron_axes == "position"
            or config.memel_code_compat
            or config.selection == "random"
        )
        self.transposed = sequence_first and positions_matter
        self.state = LayerState(
            name,
            neurons,
            config,
            activation=activation if config.site == "post" else None,
            inhibited_layers=inhibited_layers,
            total_units=total_neurons or neurons,
        )
        self.handle = inhibition.register(self.state)

    def forward(self, pre: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., neurons] -> [..., neurons].

        `bias` [neurons] is added before the non-linearity, in the same pass; leave it out where
        `pre` has it already.
        """
        if not self.training:
            return kernels.activate(pre if bias is None else pre + bias, self.activation)
        if self.transposed:
            pre = pre.transpose(0, 1)
        out = self._inhibited(pre, bias)
        if self.transposed:
            out = out.transpose(0, 1)
        return out if self.config.site == "post" else kernels.activate(out, self.activation)

    def adds_bias(self, like: Tensor) -> bool:
        """Whether a bias costs nothing in the layer's own pass over activations like these."""
        return not pull.serves(self.state, like)

    def _inhibited(self, pre: Tensor, bias: Tensor | None) -> Tensor:
        if self.state.activation is None or not pull.serves(self.state, pre):
            return self.operate(pre, bias)[0]
        return pull.activated(pre if bias is None else pre + bias, self.state)

    def operate(
        self,
        pre: Tensor,
        bias: Tensor | None = None,
        counted: Tensor | None = None,
        neuron_dim: int = -1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`inhibition.inhibit` with this layer's state."""
        keep_mask = self.config.selection != "threshold"
        return inhibition.inhibit(pre, bias, counted, self.handle, keep_mask, neuron_dim)

    def observe_output(self, mlp_output: Tensor, residual: Tensor) -> None:
        """Compare the MLP's output with the residual stream it is added to (measured steps)."""
        # A compiled graph must not depend on the step; elsewhere a call that does nothing is saved.
        if self.training and (torch.compiler.is_compiling() or self.state.measuring):
            inhibition.observe_output(
                self.state.squares, mlp_output.detach(), residual.detach(), self.handle
            )

    def extra_repr(self) -> str:
        return f"{self.state.name!r}, {self.state.units}, {self.activation}, {self.config.method}"

    def __deepcopy__(self, memo: dict) -> "L2ELayer":
        raise TypeError(
            f"l2e layer {self.state.name} cannot be copied: its statistics belong to one model; "
            "build the copy anew, or detach first"
        )
