"""A minGRU: its gate reads the input only, so all steps can be computed at once."""

import torch

import unrolled as ur

pulse = torch.tensor([[2.0], [0.0], [0.0], [-1.0], [0.0], [0.0]])

torch.manual_seed(0)
t = ur.trace(ur.Recurrent(ur.cells.MinGRU, 1, 3), pulse)
t.to_html("min_gru.html", title="A minGRU with three units gets a pulse")
