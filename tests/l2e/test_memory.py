"""Memory that runs out is told from other errors, and a limit around the process counts."""

import errno
from pathlib import Path

import pytest
import torch

from l2e import memory
from tests.launch.running import succeeds


def test_errors_of_memory_and_others() -> None:
    cases = {
        "GPU": [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")],
        "host": [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")],
        None: [RuntimeError("shapes do not fit"), OSError(errno.ENOSPC, "full"), ValueError()],
    }
    for whose, errors in cases.items():
        assert [memory.exhausted(error) for error in errors] == [whose] * len(errors)


@pytest.mark.parametrize(
    "library", ["torch.empty(2**40)", "numpy.empty(2**40)", "bytearray(2**42)"]
)
def test_what_the_libraries_raise_is_known(library) -> None:
    """In a process that may have 4 GiB, so that the refusal is the kernel's."""
    program = (
        "import numpy, torch\nfrom l2e.memory import exhausted\n"
        f"try:\n    {library}\nexcept Exception as error:\n    print(exhausted(error))\n"
    )
    done = succeeds("-c", program, memory=4 * 2**30)
    assert done.stdout.strip() == "host"


@pytest.mark.parametrize("version", [0, 1])
def test_a_containers_limit_is_the_machine(tmp_path, monkeypatch, version) -> None:
    whole = memory.host_bytes()
    assert 2**28 < whole < 2**50
    files = [str(tmp_path / "second"), str(tmp_path / "first")]
    monkeypatch.setattr(memory, "LIMITS", files)
    assert memory.host_bytes() == pytest.approx(whole, rel=1)
    Path(files[0]).write_text("max\n")
    Path(files[version]).write_text(f"{2**27}\n")
    assert memory.host_bytes() == 2**27
    memory.refuse_larger("a model", 2**26, "")
    with pytest.raises(ValueError, match=r"a model takes 1\.0 GiB .* has 0\.1; buy some"):
        memory.refuse_larger("a model", 2**30, "buy some")
