"""One process as its own tensor-parallel group, which the model's layers need to exist."""

import pytest
import torch.distributed as dist
from megatron.core import parallel_state


@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    """A gloo group of one rank, and megatron-core's parallel state on it."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
