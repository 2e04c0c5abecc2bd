"""Weights and models of other libraries: what they hold as our layers, and ours as theirs."""

from unrolled.io.nodes import RecurrentNode, from_onnx

__all__ = ["RecurrentNode", "from_onnx"]
