"""The cells that are checked and timed on a GPU."""

from __future__ import annotations

from unrolled import cells

TIMED = ("rnn", "gru", "lstm", "layernormlstm", "mingru", "slstm")
TIMED_WITH_COMPILE = "layernormlstm"
COMPARED = ("LSTM", "GRU", "LayerNormLSTM", "MinGRU", "SLSTM", "HGRN")  # in all dtypes and strategies
COMPARED_BY_STRATEGY = {
    "scan": ("MinGRU", "IndRNN", "SRU"),
    "registers": ("LSTM", "GRU", "LayerNormLSTM", "SLSTM"),
    "persistent": ("LSTM", "GRU", "LayerNormLSTM", "SLSTM", "HGRN"),
    "streamed": COMPARED,
}
REPEATED = (cells.LSTM, cells.LayerNormLSTM, cells.MinGRU)
OF_TORCHRL = ("gru", "lstm")
OF_FLASHRNN = ("lstm",)  # its GRU has another equation, and its sLSTM other initial states


class Checked(cells.LSTM):
    """The cell that most checks use."""


class FirstCaptured(cells.LSTM):
    """A cell whose kernels aren't compiled before the check of an early capture."""
