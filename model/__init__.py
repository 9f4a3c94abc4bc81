"""GPT-NeoX on tensor-parallel linears: its configuration, the model, its pipeline form.

The configuration is here at once; the model itself is imported from `model.gpt_neox` and
`model.pipeline`, since megatron-core takes seconds to import and a look at a configuration
should not wait for it.
"""

from model.config import PRESETS, ModelConfig

__all__ = ["PRESETS", "ModelConfig"]
