"""Published cells. Each file contains one cell or a family of cells."""

from unrolled.cells.antisymmetric_rnn import AntisymmetricRNN, GatedAntisymmetricRNN
from unrolled.cells.atr import ATR
from unrolled.cells.brc import BRC, NBRC
from unrolled.cells.cfn import CFN
from unrolled.cells.cifg import CIFG
from unrolled.cells.co_rnn import CoRNN, UnICORNN
from unrolled.cells.fast_rnn import FastGRNN, FastRNN
from unrolled.cells.gru import GRU
from unrolled.cells.hgrn import HGRN
from unrolled.cells.ind_rnn import IndRNN
from unrolled.cells.intersection_rnn import IntersectionRNN
from unrolled.cells.janet import JANET
from unrolled.cells.layer_norm_gru import LayerNormGRU
from unrolled.cells.layer_norm_lstm import LayerNormLSTM
from unrolled.cells.lem import LEM
from unrolled.cells.li_gru import LiGRU
from unrolled.cells.light_ru import LightRU
from unrolled.cells.lru import LRU
from unrolled.cells.lstm import LSTM
from unrolled.cells.mgu import MGU, MGU1, MGU2, MGU3
from unrolled.cells.min_gru import MinGRU, MinLSTM
from unrolled.cells.multiplicative_lstm import MultiplicativeLSTM
from unrolled.cells.nas import NAS
from unrolled.cells.peephole_lstm import PeepholeLSTM
from unrolled.cells.qrnn import QRNN
from unrolled.cells.ran import RAN
from unrolled.cells.reset_before_gru import ResetBeforeGRU
from unrolled.cells.rg_lru import RGLRU
from unrolled.cells.rhn import RHN
from unrolled.cells.rnn import RNN
from unrolled.cells.scrn import SCRN
from unrolled.cells.slstm import SLSTM
from unrolled.cells.sru import SRU
from unrolled.cells.star import STAR
from unrolled.cells.ugrnn import UGRNN

__all__ = [
    "ATR",
    "BRC",
    "CFN",
    "CIFG",
    "GRU",
    "HGRN",
    "JANET",
    "LEM",
    "LRU",
    "LSTM",
    "MGU",
    "MGU1",
    "MGU2",
    "MGU3",
    "NAS",
    "NBRC",
    "QRNN",
    "RAN",
    "RGLRU",
    "RHN",
    "RNN",
    "SCRN",
    "SLSTM",
    "SRU",
    "STAR",
    "UGRNN",
    "AntisymmetricRNN",
    "CoRNN",
    "FastGRNN",
    "FastRNN",
    "GatedAntisymmetricRNN",
    "IndRNN",
    "IntersectionRNN",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LiGRU",
    "LightRU",
    "MinGRU",
    "MinLSTM",
    "MultiplicativeLSTM",
    "PeepholeLSTM",
    "ResetBeforeGRU",
    "UnICORNN",
]
