"""Quantized weights for inference: int8, bfloat16 and float16."""
