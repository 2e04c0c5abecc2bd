"""Compiled loops as torch operators, for torch.compile, torch.export, vmap and torch.func."""

from unrolled.engines.torch_ops import autograd, draws, onnx, operators, vmap

__all__ = ["autograd", "draws", "onnx", "operators", "vmap"]  # importing them registers the operators
