"""An LSTM with open forget gates gets one pulse, and keeps it."""

import torch

import unrolled as ur

pulse = torch.tensor([[2.0], [0.0], [0.0], [-1.0], [0.0], [0.0]])

torch.manual_seed(0)
lstm = torch.nn.LSTM(1, 3)
with torch.no_grad():
    lstm.bias_ih_l0.zero_()
    lstm.bias_hh_l0.zero_()
    lstm.bias_ih_l0[3:6] = 4.0  # rows 3 to 5 are the forget gate: open it

t = ur.trace(lstm, pulse)
t.to_html("lstm.html", title="nn.LSTM(1, 3) gets a pulse")
