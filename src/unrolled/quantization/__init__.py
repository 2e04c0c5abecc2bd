"""Weights in fewer bits, for inference."""
