"""The modules that users train: recurrent layers and single-step cells."""

from unrolled.layers.recurrent import Recurrent

__all__ = ["Recurrent"]  # pickled layers refer to it by this name
