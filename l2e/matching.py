"""Which modules of a model a pattern of names means, and which layers of a saved state they are."""

import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from l2e.config import L2EConfig, select_layers

# Names that wrappers put between a module's own, which neither patterns nor states should see.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # have no forward: what is above them calls


def chosen(model: nn.Module, pattern: Any, config: L2EConfig) -> dict[str, nn.Module]:
    """The modules that match and that `config.layers` names, by name, in the model's order.

    The model itself never matches, and of modules inside one another the outermost does.

    Raises:
        ValueError: nothing matches, or a module that does has several places in the model.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(
            f"l2e.attach: pattern = {pattern!r}: expected one pattern of module names, such as "
            '"transformer.h.*.mlp.act"; * stands for any text, [ab] for one of several letters'
        )
    names: dict[int, list[str]] = {}
    modules: dict[str, nn.Module] = {}
    for raw, module in model.named_modules(remove_duplicate=False):
        name = ".".join(part for part in raw.split(".") if part not in WRAPPERS)
        names.setdefault(id(module), []).append(raw)
        if name and (fnmatchcase(name, pattern) or fnmatchcase(raw, pattern)):
            modules.setdefault(name, module)
    first_names = {id(module): name for name, module in reversed(modules.items())}
    modules = {name: module for name, module in modules.items() if first_names[id(module)] == name}
    modules = _outermost(modules, pattern)
    if not modules:
        raise ValueError(_no_match(model, pattern))
    for module in modules.values():
        if len(_places(model, names[id(module)])) > 1:
            raise ValueError(
                f"l2e.attach: one module serves as {', '.join(names[id(module)])}, so that their "
                "statistics could not be told apart: give each place a module of its own "
                "(copy.deepcopy), or match others"
            )
    matched = list(modules)
    return {
        matched[number]: modules[matched[number]]
        for number in select_layers(config.layers, len(matched))
    }


def leads_to(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether `name` still means this module, behind whatever wrappers."""
    here: nn.Module | None = model
    for part in name.split("."):
        while here is not None and part not in here._modules:
            here = _wrapped(here)
        if here is None:
            return False
        here = here._modules[part]
    while here is not None and here is not module:
        here = _wrapped(here)
    return here is module


def _wrapped(module: nn.Module) -> nn.Module | None:
    return next((m for name, m in module._modules.items() if name in WRAPPERS), None)


def owner(model: nn.Module, module: nn.Module) -> nn.Module:
    """The module inside whose forward this one is called; containers do not call."""
    name = next(name for name, other in model.named_modules() if other is module)
    while name:
        name = name.rpartition(".")[0]
        if not isinstance(parent := model.get_submodule(name), CONTAINERS):
            return parent
    return model


def renamed(tensors: dict[str, Tensor], saved: set[str], own: list[str]) -> dict[str, Tensor]:
    """A state with the names that this model gives its layers."""
    if not saved or set(own) <= saved:
        return tensors
    fits = []
    for name in sorted(saved):
        if name.endswith(f".{own[0]}"):
            old, new = name.removesuffix(own[0]), ""
        elif own[0].endswith(f".{name}"):
            old, new = "", own[0].removesuffix(name)
        else:
            continue
        if set(own) <= {new + other.removeprefix(old) for other in saved if other.startswith(old)}:
            fits.append((old, new))
    if len(fits) == 1:
        [(old, new)] = fits
        return {
            key if key == "step" else new + key.removeprefix(old): value
            for key, value in tensors.items()
            if key == "step" or key.startswith(old)
        }
    if fits:
        raise ValueError(
            f"l2e state of layers {', '.join(sorted(saved))}: this handle's {', '.join(own)} could "
            f"be those under {' or '.join(old or 'no prefix' for old, _ in fits)}: load it into "
            "the model it was saved from, or keep the entries of one prefix"
        )
    raise ValueError(
        f"l2e state of layers {', '.join(sorted(saved))}: this handle's are {', '.join(own)}; "
        "attach with the pattern that the state was saved under"
    )


def _outermost(modules: dict[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    inside = [name for name in modules if any(name.startswith(f"{other}.") for other in modules)]
    outermost = {name: module for name, module in modules.items() if name not in inside}
    if inside:
        warnings.warn(
            f"l2e.attach: {pattern!r} also matches {len(inside)} modules inside the matched "
            f"{', '.join(outermost)} ({', '.join(inside[:3])}, ...), which are passed over: for "
            "these name their end in the pattern, as in transformer.h.*.mlp.act",
            stacklevel=4,
        )
    return outermost


def _places(model: nn.Module, names: Iterable[str]) -> set[tuple[int, str]]:
    """Where a module of these names is called: one place for each parent that has it, and one for
    each number of a sequence; other names that one parent gives it are aliases."""
    places = set()
    for name in names:
        above, _, last = name.rpartition(".")
        parent = model.get_submodule(above)
        numbered = isinstance(parent, nn.Sequential | nn.ModuleList)
        places.add((id(parent), last if numbered else ""))
    return places


def _no_match(model: nn.Module, pattern: str) -> str:
    leaves = [n for n, module in model.named_modules() if n and not list(module.children())]
    if not leaves:
        return (
            f"l2e.attach: a {type(model).__name__} has no modules inside, and the model itself is "
            f"not matched by {pattern!r}: attach to the model it is part of, or to "
            "torch.nn.Sequential(module)"
        )
    return (
        f"l2e.attach: no module's name matches {pattern!r}; names of this model are, for "
        f"example, {', '.join(leaves[:: max(1, len(leaves) // 8)][:8])}"
    )
