"""The cells, one file each. A new cell is one file here and one line below."""

from unrolled.cells.gru import GRU
from unrolled.cells.lstm import LSTM
from unrolled.cells.peephole_lstm import PeepholeLSTM
from unrolled.cells.reset_before_gru import ResetBeforeGRU
from unrolled.cells.rnn import RNN

__all__ = ["GRU", "LSTM", "RNN", "PeepholeLSTM", "ResetBeforeGRU"]
