"""Layers as leaves of graphs that torch.fx records, as torch.nn's modules are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy

# The keyword arguments of a layer's call.
OPTIONS = ("lengths", "mask", "resets", "reset_state", "all_states", "checkpoint")


def record_call(module: nn.Module, x: Proxy, state: Any, options: dict[str, Any]) -> Proxy:
    """Record a call of a module as one node of a graph.

    Args:
        module: The module.
        x: The input, a value of the graph.
        state: The state, or None.
        options: Keyword arguments. Those that are None are left out.

    Returns:
        The result, a value of the graph.

    Raises:
        TypeError: If the module isn't part of the model that is traced.
    """
    name = type(module).__name__
    find_path: Any = getattr(x.tracer, "path_of_module", None)
    try:
        path = find_path(module) if find_path is not None else ""
    except NameError:  # not a submodule
        path = ""
    if not path:
        raise TypeError(
            f"torch.fx can't trace into {name}, which becomes one node of the graph: trace a module that has "
            f"it as a submodule, such as torch.nn.Sequential({name}(…))"
        )
    args = (x,) if state is None else (x, state)
    kwargs = {key: value for key, value in options.items() if value is not None}
    return x.tracer.create_proxy("call_module", path, args, kwargs)
