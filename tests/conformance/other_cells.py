"""Functions that run a sequence with another library's cell and this library's parameters.

A cell that differs from its paper can't be used to check this library's cell: see :data:`DEPARTS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
Peer = Callable[[Any, Parameters, Tensor], Tensor]

DEPARTS = {
    "LEM": "y depends on the old z, but on the new z in eq. 3",
    "NAS": "all eight pairs are added, but TensorFlow's cell multiplies the fourth",
    "SCRN": "the recurrent input is the output, but the hidden layer in the paper",
}

LIBRARIES = {  # the libraries that other tests compare a cell with
    "RNN": ("torch.nn", "ONNX Runtime", "Keras", "flax"),
    "LSTM": ("torch.nn", "ONNX Runtime", "Keras", "flax"),
    "GRU": ("torch.nn", "ONNX Runtime", "Keras", "flax"),
    "ResetBeforeGRU": ("ONNX Runtime", "Keras"),
}


def torchrecurrent(
    name: str, *, state: int = 0, names: dict[str, str | None] | None = None, **arguments: Any
) -> Peer:
    """Return a function that runs a cell of torchrecurrent step by step. Its additional biases are zero.

    Args:
        name: The class of the cell.
        state: The index of the returned value that is the next state, if only one is. 0: all of them.
        names: For a parameter of theirs, the names of ours joined by ``+``, which are concatenated.
            None: the parameter keeps its initial value. By default the names are the same.
        arguments: Arguments of the class. A callable is called with our cell.
    """

    def run(cell: Any, params: Parameters, x: Tensor) -> Tensor:
        library = importlib.import_module("torchrecurrent")
        kwargs = {key: value(cell) if callable(value) else value for key, value in arguments.items()}
        theirs = getattr(library, name)(cell.input, cell.hidden, dtype=x.dtype, **kwargs)
        unused = dict(params)
        for theirs_name, parameter in theirs.named_parameters():
            ours = (names or {}).get(theirs_name, theirs_name)
            if ours is None:
                continue
            values = [unused.pop(part) for part in ours.split("+") if part in params]
            value = torch.cat([*values, *([] if values else [torch.zeros_like(parameter)])])
            padded = torch.cat([value, value.new_zeros(len(parameter) - len(value), *value.shape[1:])])
            parameter.copy_(padded)
        assert not unused, f"{name} has no {', '.join(unused)}"
        outputs, carry = [], None
        for row in x:
            result = theirs(row, carry)
            outputs.append(result[0] if isinstance(result, tuple) else result)
            carry = result[1] if state and isinstance(result, tuple) else result
        return torch.stack(outputs)

    return run


def lru(cell: Any, params: Parameters, x: Tensor) -> Tensor:
    from LRU_pytorch import LRU

    theirs = LRU(cell.input, cell.hidden, cell.state_sizes()["re"])
    for name, ours in (("nu_log", "nu"), ("theta_log", "theta"), ("gamma_log", "gamma"), ("D", "weight_d")):
        getattr(theirs, name).data = params[ours].float()
    theirs.B.data = torch.complex(*params["weight_b"].float().chunk(2))
    theirs.C.data = torch.complex(params["weight_re"].float(), params["weight_im"].float())
    return theirs(x.float().transpose(0, 1)).transpose(0, 1).to(x.dtype)


def minimal(name: str, gates: int) -> Peer:
    """Return a function that runs minGRU or minLSTM of minGRU-pytorch, which scans in log space.

    Args:
        name: ``"minGRU"`` or ``"minLSTM"``.
        gates: The number of gates.
    """

    def run(cell: Any, params: Parameters, x: Tensor) -> Tensor:
        assert cell.positive
        module = importlib.import_module(f"minGRU_pytorch.{name}")
        theirs = getattr(module, name)(cell.input).double()
        *gate_weights, candidate = params["weight_ih"].chunk(gates + 1)
        next(theirs.parameters()).data = torch.cat([candidate, *gate_weights])
        return theirs(x.transpose(0, 1)).transpose(0, 1)

    return run


def rg_lru(cell: Any, params: Parameters, x: Tensor) -> Tensor:
    from recurrentgemma.torch.layers import RGLRU

    theirs = RGLRU(cell.hidden, cell.heads, dtype=x.dtype)
    blocks = cell.heads, cell.hidden // cell.heads, cell.hidden // cell.heads
    for gate, ours in (("input_gate", "i"), ("a_gate", "r")):
        getattr(theirs, gate).w.data = params[f"weight_{ours}"].reshape(blocks).transpose(1, 2)
        getattr(theirs, gate).b.data = params[f"bias_{ours}"].reshape(blocks[:2])
    theirs.a_param.data = params["decay"]
    positions = torch.arange(1, len(x) + 1).expand(x.shape[1], -1)  # position 0 would reset the state
    start = x.new_zeros(x.shape[1], cell.hidden, dtype=torch.float32)
    return theirs(x.transpose(0, 1), positions, start)[0].transpose(0, 1)


def slstm(cell: Any, params: Parameters, x: Tensor) -> Tensor:
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    heads, units = cell.heads, cell.hidden // cell.heads
    config = sLSTMCellConfig(
        cell.hidden, heads, backend="vanilla", dtype="float32", enable_automatic_mixed_precision=False
    )
    theirs = sLSTMCell(config).double()
    kernel = (
        params["weight_hh"].reshape(4, heads, units, units).transpose(0, 1)
    )  # (heads, gates, outputs, inputs)
    theirs._recurrent_kernel_.data = kernel.reshape(heads, 4 * units, units)
    theirs._bias_.data = params["bias_ih"]
    sums = (x @ params["weight_ih"].T).transpose(0, 1)
    return theirs(sums)[0].transpose(1, 2).reshape(x.shape[1], len(x), -1).transpose(0, 1)


def sru(cell: Any, params: Parameters, x: Tensor) -> Tensor:
    from sru import SRU

    params = {name: value.float() for name, value in params.items()}
    theirs = SRU(cell.input, cell.hidden, 1, highway_bias=cell.highway_bias, rescale=cell.rescale)
    [layer] = theirs.rnn_lst
    scale = layer.scale_x if cell.rescale else 1
    columns = [
        params["weight_ih"],
        *params["weight_gates"].chunk(2),
        *([params["weight_x"] * scale] if "weight_x" in params else []),
    ]
    layer.weight.data = torch.stack([column.T for column in columns], -1).flatten(1)
    layer.weight_c.data, layer.bias.data = params["weight_c"], params["bias_gates"]
    return theirs(x.float())[0].to(x.dtype)


PEERS: dict[str, tuple[str, Peer]] = {
    name: ("torchrecurrent", peer)
    for name, peer in {
        "PeepholeLSTM": torchrecurrent("PeepholeLSTMCell", names={"weight_ph": "peep_i+peep_f+peep_o"}),
        "MultiplicativeLSTM": torchrecurrent(
            "MultiplicativeLSTMCell",
            names={"weight_ih": "weight_mx+weight_ih", "weight_hh": "weight_mh", "weight_mh": "weight_im",
                   "bias_mh": "bias_ih", "bias_ih": ""},
        ),
        "JANET": torchrecurrent("JANETCell", names={"beta": None}),
        "MGU": torchrecurrent("MGUCell"),
        "LightRU": torchrecurrent("LightRUCell"),
        "LiGRU": torchrecurrent("LiGRUCell"),
        "UGRNN": torchrecurrent("UGRNNCell"),
        "IntersectionRNN": torchrecurrent("IntersectionRNNCell", state=1),
        "CFN": torchrecurrent("CFNCell"),
        "RAN": torchrecurrent("RANCell", names={"bias_ih": "bias_hh", "bias_hh": ""}),
        "STAR": torchrecurrent("STARCell"),
        "ATR": torchrecurrent("ATRCell"),
        "IndRNN": torchrecurrent("IndRNNCell", names={"vector_u": "weight_u"}, nonlinearity="relu"),
        "AntisymmetricRNN": torchrecurrent(
            "AntisymmetricRNNCell", epsilon=lambda cell: cell.epsilon, gamma=lambda cell: cell.gamma
        ),
        "GatedAntisymmetricRNN": torchrecurrent(
            "GatedAntisymmetricRNNCell", epsilon=lambda cell: cell.epsilon, gamma=lambda cell: cell.gamma
        ),
        "FastRNN": torchrecurrent("FastRNNCell"),
        "FastGRNN": torchrecurrent(
            "FastGRNNCell", names={"bias_ih": "bias_z+bias_h"}, nonlinearity="sigmoid"
        ),
        "CoRNN": torchrecurrent(
            "coRNNCell", names={"weight_ch": "weight_zh"}, dt=lambda cell: cell.dt,
            gamma=lambda cell: cell.gamma, epsilon=lambda cell: cell.epsilon,
        ),
        "UnICORNN": torchrecurrent(
            "UnICORNNCell", names={"weight_ch": "control"}, dt=lambda cell: cell.dt,
            alpha=lambda cell: cell.alpha,
        ),
        "BRC": torchrecurrent(
            "BRCell", names={"weight_ih": "weight_gates+weight_ih", "weight_hh": "weight_a+weight_c",
                             "bias_ih": "bias_gates"},
        ),
        "NBRC": torchrecurrent(
            "NBRCell", names={"weight_ih": "weight_gates+weight_ih", "bias_ih": "bias_gates"}
        ),
        "LEM": torchrecurrent("LEMCell", names={"weight_ch": "weight_zy"}),
        "NAS": torchrecurrent("NASCell", names={"bias_ih": ""}),
        "SCRN": torchrecurrent(
            "SCRNCell", names={"weight_ih": "weight_sx+weight_ih", "weight_hh": "weight_hh",
                               "weight_ch": "weight_hs", "alpha": None}, alpha=lambda cell: cell.alpha,
        ),
    }.items()
} | {
    "LRU": ("LRU_pytorch", lru),
    "MinGRU positive=True": ("minGRU_pytorch", minimal("minGRU", 1)),
    "MinLSTM positive=True": ("minGRU_pytorch", minimal("minLSTM", 2)),
    "RGLRU": ("recurrentgemma", rg_lru),
    "RGLRU heads=2": ("recurrentgemma", rg_lru),
    "SLSTM": ("xlstm", slstm),
    "SLSTM heads=2": ("xlstm", slstm),
    "SRU": ("sru", sru),
    "SRU rescale=False": ("sru", sru),
}  # fmt: skip
