"""What every test may use: the shared real data, where it is present."""

import os
from pathlib import Path

import pytest

# Two cores are shared by all processes a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, Triton's kernels are interpreted. It must know before it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora, feature sets and benchmarks; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not present at {SHARED_DATA}")
    return SHARED_DATA
