"""The sLSTM of xLSTM: exponential gates, with a normalizer and a stabilizer."""

import torch

import unrolled as ur

x = torch.tensor([[1.0], [2.0], [-8.0], [2.0], [8.0], [0.0]])

torch.manual_seed(0)
slstm = ur.Recurrent(ur.cells.SLSTM, 1, 3)

t = ur.trace(slstm, x)
t.to_html("slstm.html", title="An sLSTM with three units")
