"""Handwritten digits read row by row, then the trained layer opened on one that it never saw.

scikit-learn's digits are 1797 pictures of 8 × 8 pixels. A layer reads a picture as a sequence, a row of
pixels at each time step, and a linear map of its last hidden state names the digit.
"""

from __future__ import annotations

import torch
from rich.table import Table
from rich.text import Text
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import unrolled as ur
from training import Run, console, options, say_how_to_open, start, told, train
from unrolled.layers.torch_layers import LAYERS

SHADES = " .:-=+*#%@"


class Classifier(nn.Module):
    """A recurrent layer over the rows of a picture, and a linear map of its last hidden state."""

    def __init__(self, layer: ur.Recurrent) -> None:
        super().__init__()
        self.layer = layer
        self.name_it = nn.Linear(layer.hidden_size, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """``(batch, 8, 8)`` pictures to ``(batch, 10)`` scores."""
        output, _ = self.layer(pictures)
        scores: Tensor = self.name_it(output[:, -1])
        return scores


def main() -> None:
    """Train, compare with a baseline, open the layer."""
    kinds = {layer.__name__.lower(): layer for layer in LAYERS}
    parser = options("digits.py", "Read handwritten digits row by row.", epochs=40, hidden=128)
    parser.add_argument("--cell", choices=kinds, default="lstm", help="which layer reads them (lstm)")
    given = parser.parse_args()
    run = start(f"digits_{given.cell}", given)

    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    # one fixed split, whatever the seed: a quarter of the digits is held out
    split = train_test_split(range(len(labels)), test_size=0.25, stratify=data.target, random_state=0)
    known, held_out = (torch.tensor(rows) for rows in split)

    model = Classifier(kinds[given.cell](8, given.hidden, batch_first=True))
    console.print(f"{model.layer} reads {len(known)} digits row by row; {len(held_out)} are held out.")
    train(run, model, nn.functional.cross_entropy, (pictures[known], labels[known]))

    model.eval()
    with torch.no_grad():
        score = (model(pictures[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    flat = pictures.flatten(1).numpy()
    baseline = LogisticRegression(max_iter=2000).fit(flat[known], data.target[known])
    base = float(baseline.score(flat[held_out], data.target[held_out]))
    console.print(f"\nHeld-out digits named rightly: {score:.1%} by the layer, reading row by row;")
    console.print(f"{base:.1%} by logistic regression on all 64 pixels at once, the baseline.")

    sample, label = pictures[held_out[0]], labels[held_out[0]]
    t = ur.trace(model.layer, sample)
    open_layer(model, t, sample, int(label))
    t.backward(lambda output: nn.functional.cross_entropy(model.name_it(output[-1]), label))
    page = t.to_html(run.page, inputs="image", title=f"A held-out {label}, read row by row")
    tell(run, score, base, sample)
    console.print(f"The trained layer as a page, to look at in a browser: {page}", soft_wrap=True)


def open_layer(model: Classifier, t: ur.Trace, picture: Tensor, label: int) -> None:
    """The trained layer on a held-out picture: what it reads, what it thinks, and why."""
    state = next(iter(model.layer.cell.state))
    with torch.no_grad():
        belief = model.name_it(t[state][:, 0]).softmax(-1)
    gates = [name for name in t.names if t[name].shape == t[state].shape and "_" not in name]
    console.print(f"\nThe trained layer, opened on a held-out {label}: what it reads at each step, what it")
    console.print(f"would name it by then, and the means of {', '.join(gates)} over its units.\n")
    table = Table(box=None, padding=(0, 1))
    for heading in ("step", "reads", "names", "sure", *gates):
        table.add_column(heading, justify="right" if heading in gates else "left", no_wrap=True)
    for step, row in enumerate(picture):
        shades = "".join(2 * SHADES[min(int(pixel * 10), 9)] for pixel in row.tolist())
        sure, digit = belief[step].max(0)
        means = [f"{t[name][step].mean():.2f}" for name in gates]
        table.add_row(str(step), Text(shades), str(digit.item()), f"{sure:.0%}", *means)
    console.print(table)
    unit = int(t[state][-1, 0].abs().argmax())
    console.print(f"\nWhere the strongest number of the last hidden state comes from (unit {unit}):")
    for name in t.names[-2:]:
        console.print(f"  {name}: {t.explain(name, -1, unit)}", markup=False)
    console.print(f"Largest difference from torch.nn on this picture: {t.check():.1e}")


def tell(run: Run, score: float, baseline: float, sample: Tensor) -> None:
    """Write the result and say where everything is."""
    scores = run.save_scores({"accuracy": score, "baseline": {"logistic regression": baseline}})
    csv = run.save_sample(sample)
    console.print(
        f"\nWritten: {run.checkpoint} (weights), {scores} (scores), {csv} (that digit).", soft_wrap=True
    )
    say_how_to_open(run, csv)


if __name__ == "__main__":
    told(main)
