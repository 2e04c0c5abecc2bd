"""Replace modules of a model by others that take over their contents, and report what was replaced."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from unrolled.layers import subclasses

_log = logging.getLogger("unrolled.convert")
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, training mode and so on


@dataclass
class Report:
    """The recurrent modules that were replaced in a model, and those that weren't.

    Attributes:
        verb: What was done to the modules, such as ``"converted"``.
        replaced: Their descriptions.
        left: The descriptions of the others, and the reasons.
    """

    verb: str
    replaced: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} {self.verb}, {len(self.left)} not {self.verb}"]
        lines += [f"  {name}: {self.verb}" for name in self.replaced]
        lines += [f"  {name}: not {self.verb}: {reason}" for name, reason in self.left]
        return "\n".join(lines)

    def publish(self, to_stdout: bool, stacklevel: int) -> None:
        """Log the report at INFO. Print it, or warn of each module that was left.

        Args:
            to_stdout: Whether to print it.
            stacklevel: Number of calls between the user's line and this function.
        """
        _log.info("%s", self)
        if to_stdout:
            print(self)
            return
        for name, reason in self.left:
            warnings.warn(f"{name} is not {self.verb}: {reason}", stacklevel=stacklevel + 1)


def replace_modules(
    model: nn.Module, replacement: Callable[[nn.Module], nn.Module | str | None], report: Report
) -> nn.Module:
    """Replace modules of a model in place.

    Args:
        model: The model. It changes only when nothing can fail any more.
        replacement: Returns the module that replaces a module, or the reason why none can, or None for
            modules that aren't concerned.
        report: Filled with what happened.

    Returns:
        The model, or what replaces it.
    """
    replacements: dict[int, nn.Module] = {}
    children: list[tuple[nn.Module, str, nn.Module]] = []
    for path, module in model.named_modules():
        result = replacement(module)
        kind = class_name(module)
        name = f"module {path!r} ({kind})" if path else f"the model ({kind})"
        if isinstance(result, nn.Module):
            replacements[id(module)] = result
            report.replaced.append(name)
        elif result is not None:
            report.left.append((name, result))
        children += [(module, name, child) for name, child in module._modules.items() if child is not None]
    for parent, name, child in children:
        if id(child) in replacements:
            parent._modules[name] = replacements[id(child)]
    return replacements.get(id(model), model)


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class; of a scripted module, that of the class that was scripted."""
    name: str = getattr(module, "original_name", type(module).__name__)
    return name


def find_conflict(module: nn.Module, replacement: nn.Module, pristine: nn.Module) -> str | None:
    """Return why a module's contents can't be transferred to its replacement, or None if they can.

    Args:
        module: The user's module.
        replacement: Its empty counterpart in the other library.
        pristine: An empty module of the library's class, to find attributes that users added.
    """
    for name in sorted(_attribute_names(module) - _attribute_names(pristine)):
        if name == "forward":
            return "its forward method was replaced"
        reason = subclasses.conflict(name, replacement, pristine)
        if reason is not None:
            return reason
    for name, expected in replacement._parameters.items():
        parameter = module._parameters.get(name)
        if parameter is not None and expected is not None and parameter.shape != expected.shape:
            return f"its {name} has the shape {tuple(parameter.shape)}, expected {tuple(expected.shape)}"
    return None


def _attribute_names(module: nn.Module) -> set[str]:
    """Return the names of all attributes of an instance, including parameters, buffers and submodules."""
    return {*vars(module), *module._parameters, *module._buffers, *module._modules}


def transfer_contents(replacement: nn.Module, module: nn.Module, pristine: nn.Module) -> nn.Module:
    """Give a module's parameters, submodules, hooks and additional attributes to its replacement.

    Args:
        replacement: The empty counterpart in the other library.
        module: The user's module.
        pristine: An empty module of the library's class.

    Returns:
        The replacement.
    """
    class_attributes = {*vars(replacement), *vars(pristine)}
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            contents, theirs = vars(replacement)[name], vars(pristine)[name]
            # None stands for a parameter that is left out. The other library may have no such parameter.
            unknown = {key for key, one in theirs.items() if one is None and key not in contents}
            contents.clear()
            contents.update((key, one) for key, one in value.items() if one is not None or key not in unknown)
        elif name in _MODULE_ATTRIBUTES or name not in class_attributes:
            vars(replacement)[name] = value
    if isinstance(replacement, nn.RNNBase):
        replacement._init_flat_weights()
    return replacement
