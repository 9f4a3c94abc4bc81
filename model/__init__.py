"""GPT-NeoX on tensor-parallel linears: its configuration, the model, its pipeline form."""

from model.config import PRESETS, ModelConfig
from model.gpt_neox import GPTNeoX
from model.linears import reduce_sequence_parallel_gradients
from model.pipeline import PipelineLayer, pipeline_layers, pipeline_loss

__all__ = [
    "PRESETS",
    "GPTNeoX",
    "ModelConfig",
    "PipelineLayer",
    "pipeline_layers",
    "pipeline_loss",
    "reduce_sequence_parallel_gradients",
]
