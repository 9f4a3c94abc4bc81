"""A map of a file that is cut short: a sentence that names the file, in whichever thread."""

import pytest

from tests.launch.running import python

BEGIN = """
import os, sys, threading
import numpy as np
from l2e.mapped import explain_bus_errors
explain_bus_errors(lambda: "; and so on")
path = sys.argv[1]
numbers = np.arange(10**5)
"""
READERS = {
    "one number": "found = np.memmap(path, np.int64, 'r'); os.truncate(path, 0); found[-1]",
    "a long copy": "found = np.memmap(path, np.int64, 'r'); os.truncate(path, 10); found.copy()",
    "a thread": "found = np.memmap(path, np.int64, 'r'); os.truncate(path, 0)\n"
    "reader = threading.Thread(target=found.sum); reader.start(); reader.join()",
    "half of it": "found = np.memmap(path, np.int64, 'r'); os.truncate(path, 4 * 10**5)\n"
    "assert found[1000] == 1000; np.concatenate([found, found])",
    "a .npy file": "path += '.npy'; np.save(path, numbers); found = np.load(path, mmap_mode='r')\n"
    "os.truncate(path, 128); np.searchsorted(found, 7)",
    "Python's own map": "import mmap; file = open(path, 'r+b')\n"
    "found = mmap.mmap(file.fileno(), 0); os.truncate(path, 0); found[-1]",
}


@pytest.mark.parametrize("how", READERS)
def test_a_file_that_is_cut_short_is_named(tmp_path, how) -> None:
    path = tmp_path / "tokens with a space.bin"
    program = f"{BEGIN}\nnumbers.tofile(path)\n{READERS[how]}\nprint('read')"
    done = python("-c", program, path, timeout=60)
    assert done.returncode == 1, done.stderr
    assert not done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {path}")
    assert "was cut short while it was read" in last
    assert last.endswith("; and so on")
