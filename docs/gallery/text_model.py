"""A character LSTM that has learned the Zen of Python, Python's own short poem, by heart."""

import codecs
import contextlib
import io

import torch
from torch.nn.functional import cross_entropy

import unrolled as ur

with contextlib.redirect_stdout(io.StringIO()):  # importing it prints the poem
    import this

poem = codecs.decode(this.s, "rot13").partition("\n\n")[2]
letters = sorted(set(poem))
codes = torch.tensor([letters.index(letter) for letter in poem])

torch.manual_seed(0)
embed = torch.nn.Embedding(len(letters), 16)
lstm = ur.LSTM(16, 48)
score = torch.nn.Linear(48, len(letters))
parameters = [*embed.parameters(), *lstm.parameters(), *score.parameters()]
optimizer = torch.optim.Adam(parameters, lr=0.01)
for _ in range(400):
    starts = torch.randint(len(poem) - 60, (16,))
    pieces = codes[starts + torch.arange(61)[:, None]]  # (time, batch): 60 letters and the next one
    loss = cross_entropy(score(lstm(embed(pieces[:-1]))[0]).flatten(0, 1), pieces[1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

begin = poem[:240]
t = ur.trace(lstm, embed(codes[: len(begin)]).detach())
with torch.no_grad():
    predicted = [letters[code] for code in score(t.output).argmax(-1)]
t.to_html("text_model.html", labels=begin, predictions=predicted, title="An LSTM recites the Zen of Python")
