"""What every test may use: the shared real data, where it is present."""

import os
from pathlib import Path

import pytest

# Two cores are shared by all processes a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests are of any machine, and many start more processes than one has GPUs: they see none, and
# Triton's kernels are interpreted. Triton must know before it is first imported. Tests of kernels
# run on a GPU where they are told to (docs/gpu.md).
if os.environ.get("L2E_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora, feature sets and benchmarks; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not present at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """One process as its own group of ranks, which the model's layers need to exist."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
