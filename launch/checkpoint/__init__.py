"""Checkpoints of a run that any layout can load.

Every tensor is stored whole, in float32, under its canonical (Hugging Face) name, with the
vocabulary's own rows only: no trace of tensor, pipeline or data parallelism or of a ZeRO stage. A
rank that loads reads its slices. What a folder `step_0000100` holds:

    model-00001-of-00002.safetensors      master weights, spread over the ranks that wrote them
    exp_avg-..., exp_avg_sq-...           the optimizer's moments, likewise
    l2e.safetensors                       statistics and thresholds of the inhibited layers
    random.safetensors                    each rank's random state
    state.json                            step, tokens, layout, loss scale, optimizer
    tokenizer.json or tokenizer.model     the run's tokenizer
    config.json                           the run's configuration
    files.json                            size and SHA-256 of every file
"""

from launch.checkpoint.loading import load
from launch.checkpoint.resumable import find_resumable
from launch.checkpoint.saving import Saver, save

__all__ = ["Saver", "find_resumable", "load", "save"]
