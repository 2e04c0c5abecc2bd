"""A GRU gets one pulse; its update gate mixes the old state with the new one."""

import torch

import unrolled as ur

pulse = torch.tensor([[2.0], [0.0], [0.0], [-1.0], [0.0], [0.0]])

torch.manual_seed(0)
t = ur.trace(torch.nn.GRU(1, 3), pulse)
t.to_html("gru.html", title="nn.GRU(1, 3) gets a pulse")
