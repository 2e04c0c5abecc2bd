"""Trainable modules: recurrent layers and single-step cells."""

from unrolled.layers.recurrent import Recurrent

__all__ = ["Recurrent"]  # pickled layers refer to unrolled.layers.Recurrent
