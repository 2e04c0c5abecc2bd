"""A simple RNN gets one pulse, and forgets it within a few steps."""

import torch

import unrolled as ur

pulse = torch.tensor([[2.0], [0.0], [0.0], [-1.0], [0.0], [0.0]])

torch.manual_seed(0)
t = ur.trace(torch.nn.RNN(1, 3, bias=False), pulse)
t.to_html("rnn.html", title="nn.RNN(1, 3) gets a pulse")
