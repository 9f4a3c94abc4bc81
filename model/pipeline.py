"""The same model as a list of layers, for an engine that spreads them over pipeline stages."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from l2e import L2EConfig
from model.block import Block
from model.config import ModelConfig
from model.embedding import InputEmbedding, OutputEmbedding
from model.linears import LayerNorm, tensor_parallel_size


class PipelineLayer(NamedTuple):
    """One layer, not yet built: `kind(*args, **kwargs)` on the stage that holds it."""

    prefix: str  # a parameter's name in the layer, after this prefix, is its canonical name
    kind: type[nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def build(self) -> nn.Module:
        return self.kind(*self.args, **self.kwargs)


class OutputStage(OutputEmbedding):
    """The output embedding where the engine, not the model, calls the loss.

    Hands on what `pipeline_loss` needs, so that logits are never held whole.
    """

    def forward(self, hidden: Tensor) -> tuple[Tensor, "OutputStage"]:  # type: ignore[override]
        return hidden, self


def pipeline_layers(
    config: ModelConfig,
    l2e: L2EConfig | None = None,
    *,
    seed: int,
    sequence_parallel: bool = False,
) -> list[PipelineLayer]:
    """The model's layers in order; between them the residual stream [sequence, batch, hidden].

    Built one after the other they are `GPTNeoX` with the same initial weights: the first takes
    tokens [batch, sequence], and `pipeline_loss(last output, labels)` is the loss.
    """
    sequence_parallel = sequence_parallel and tensor_parallel_size() > 1
    shared = {"seed": seed, "sequence_parallel": sequence_parallel}
    norm = (config.hidden_size, config.layer_norm_epsilon)
    return [
        PipelineLayer("gpt_neox.embed_in.", InputEmbedding, (config,), shared),
        *(
            PipelineLayer(f"gpt_neox.layers.{number}.", Block, (number, config, l2e), shared)
            for number in range(config.num_layers)
        ),
        PipelineLayer(
            "gpt_neox.final_layer_norm.", LayerNorm, norm, {"sequence_parallel": sequence_parallel}
        ),
        PipelineLayer("embed_out.", OutputStage, (config,), shared),
    ]


def pipeline_loss(output: tuple[Tensor, OutputStage], labels: Tensor) -> Tensor:
    """Mean cross-entropy of the last layer's output against labels [batch, sequence]."""
    hidden, stage = output
    return stage.loss(hidden, labels)
