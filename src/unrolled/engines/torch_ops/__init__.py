"""Compiled loops as torch operators, for torch.compile, torch.export, vmap and torch.func."""

from unrolled.engines.torch_ops import autograd, operators, vmap

__all__ = ["autograd", "operators", "vmap"]  # importing them registers the operators
