"""Convert layers from and to the formats of other libraries: ONNX, Keras and flax."""

from unrolled.io.keras_flax import from_flax, from_keras, to_flax, to_keras
from unrolled.io.onnx_export import to_onnx
from unrolled.io.onnx_import import RecurrentNode, from_onnx

__all__ = ["RecurrentNode", "from_flax", "from_keras", "from_onnx", "to_flax", "to_keras", "to_onnx"]
