"""A corpus that needs no download: the running Python's standard library.

Every module gives its source as one document (subset "source") and its docstrings, read one
after the other, as another ("docstrings"). One module in 25 is held out for validation, both
its documents, so that no text is in both parts. Same Python, same corpus.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from data.files import sha256

TRAIN, VALIDATION = "builtin:train", "builtin:validation"
HELD_OUT = 25
# Not the library itself: its tests, its installed packages and generated tables.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
LEFT_OUT |= {"ensurepip", "encodings", "pydoc_data", "lib2to3", "__phello__"}


def documents(part: str) -> Iterator[dict]:
    """Rows {"text", "meta": {"pile_set_name", "source"}} of `TRAIN` or of `VALIDATION`."""
    for path, name in _module_files(part):
        source = path.read_text("utf-8", errors="replace")
        for subset, text in (("source", source), ("docstrings", _docstrings(source))):
            if text.strip():
                yield {"text": text, "meta": {"pile_set_name": subset, "source": name}}


def content_hash(part: str) -> str:
    """Hash of the modules of `TRAIN` or of `VALIDATION`, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path, name in _module_files(part):
        digest.update(f"{name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def _module_files(part: str) -> Iterator[tuple[Path, str]]:
    """Files of the part's modules, with their names inside the library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if LEFT_OUT & set(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        name = "/".join(parts)
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0
        if held_out == (part == VALIDATION):
            yield path, name


def _docstrings(source: str) -> str:
    """The docstrings of a module, its classes and its functions, in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules have invalid escapes
        tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
