"""Two bidirectional layers in a model, recorded while the model runs."""

import torch

import unrolled as ur

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Embedding(128, 4),
    torch.nn.LSTM(4, 3, num_layers=2, bidirectional=True),
)

text = "unrolled"
with ur.record(model) as recorded:
    model(torch.tensor([ord(letter) for letter in text]))

t = recorded["1"]
t.to_html("bidirectional.html", labels=text, title="A bidirectional LSTM with two layers")
