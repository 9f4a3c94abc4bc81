"""Which tensor of a module's output holds its neurons, and putting another in its place."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

Key = str | int


def find(output: Any, wanted: Key | None, module: str) -> Tensor:
    """The tensor that is meant.

    Args:
        output: a tensor, or tensors in tuples, lists, mappings and dataclasses.
        wanted: the key, field or index of the part that is meant; None for all of it. Of a part
            that is itself a container its first floating-point tensor is meant.
        module: its name, for messages.

    Raises:
        ValueError: there is no such part, or no real floating-point tensor in it.
    """
    part = output
    if wanted is not None:
        keys = [key for key, _ in _parts(output)]
        names = getattr(output, "_fields", None)
        if wanted not in keys and isinstance(wanted, str) and names and wanted in names:
            wanted = names.index(wanted)
        elif wanted not in keys and isinstance(wanted, int) and -len(keys) <= wanted < len(keys):
            wanted = keys[wanted]
        if wanted not in keys:
            raise ValueError(
                f"l2e: module {module} has no output {wanted!r}, it returned {_kind(output)}; "
                "name a part of that in attach(..., output=...)"
            )
        part = dict(_parts(output))[wanted]
    found = _first_floating(part)
    if found is None or found.dim() == 0:
        raise ValueError(
            f"l2e: module {module} returned {_kind(part)}, which has no neurons: expected a "
            "floating-point tensor with a dimension of neurons; name another part of the output "
            "in attach(..., output=...), or match another module"
        )
    return found


def replace(output: Any, old: Tensor, new: Tensor) -> Any:
    """A copy of `output` with `new` wherever `old` is in it; the types are kept.

    transformers gives a model's last hidden state twice where all of them are asked for.
    """
    if output is old:
        return new
    parts = {key: (part, replace(part, old, new)) for key, part in _parts(output)}
    changes = {key: after for key, (before, after) in parts.items() if after is not before}
    if not changes:
        return output
    if dataclasses.is_dataclass(output):
        fields = {str(key): after for key, after in changes.items()}
        return dataclasses.replace(output, **fields)  # type: ignore[type-var]
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed.update(changes)
        return changed
    items = [after for _, after in parts.values()]
    return output._make(items) if hasattr(output, "_make") else type(output)(items)


def _first_floating(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    for _, part in _parts(value):
        if (found := _first_floating(part)) is not None:
            return found
    return None


def _parts(value: Any) -> Iterable[tuple[Key, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return []


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {list(value.shape)}"
    parts = _parts(value)
    inside = ", ".join(f"{key}: {type(part).__name__}" for key, part in parts)
    return type(value).__name__ + (f" ({inside})" if inside else "")
