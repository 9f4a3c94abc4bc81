"""The verbs a user types, one a file, and by subject what they drive."""

import warnings

# megatron-core says on import what it runs without; nothing here uses either.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
# DeepSpeed calls collectives by their old names.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
