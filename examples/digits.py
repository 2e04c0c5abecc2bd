"""Train a layer to classify handwritten digits row by row, then look inside it on a test image.

scikit-learn's digits are 1797 images of 8 × 8 pixels. The layer reads an image as a sequence, one row of
pixels per time step. A linear layer classifies its last hidden state.
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
from training import Run, argument_parser, console, print_show_command, run_example, start, train
from unrolled.layers.torch_layers import LAYERS

SHADES = " .:-=+*#%@"


class Classifier(nn.Module):
    """A recurrent layer over the rows of an image, and a linear layer on its last hidden state."""

    def __init__(self, layer: ur.Recurrent) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape ``(batch, 10)`` for images of shape ``(batch, 8, 8)``."""
        output, _ = self.layer(images)
        logits: Tensor = self.head(output[:, -1])
        return logits


def main() -> None:
    """Train the model, compare it with a baseline, and show the layer."""
    layer_classes = {layer.__name__.lower(): layer for layer in LAYERS}
    parser = argument_parser("digits.py", "Classify handwritten digits row by row.", epochs=40, hidden=128)
    parser.add_argument(
        "--cell", choices=layer_classes, default="lstm", help="recurrent layer (default: lstm)"
    )
    args = parser.parse_args()
    run = start(f"digits_{args.cell}", args)

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    # a fixed split, independent of the seed: a quarter of the digits is the test set
    split = train_test_split(range(len(labels)), test_size=0.25, stratify=data.target, random_state=0)
    train_rows, test_rows = (torch.tensor(rows) for rows in split)

    model = Classifier(layer_classes[args.cell](8, args.hidden, batch_first=True))
    console.print(f"Training {model.layer} on {len(train_rows)} digits; {len(test_rows)} are the test set.")
    train(run, model, nn.functional.cross_entropy, (images[train_rows], labels[train_rows]))

    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test_rows]).argmax(1) == labels[test_rows]).float().mean().item()
    flat = images.flatten(1).numpy()
    regression = LogisticRegression(max_iter=2000).fit(flat[train_rows], data.target[train_rows])
    baseline = float(regression.score(flat[test_rows], data.target[test_rows]))
    console.print(f"\nTest accuracy: {accuracy:.1%} for the layer, which reads row by row;")
    console.print(f"{baseline:.1%} for logistic regression on all 64 pixels at once, the baseline.")

    sample, label = images[test_rows[0]], labels[test_rows[0]]
    t = ur.trace(model.layer, sample)
    show_layer(model, t, sample, int(label))
    t.backward(lambda output: nn.functional.cross_entropy(model.head(output[-1]), label))
    with torch.no_grad():
        predictions = model.head(t.output).argmax(-1).tolist()
    title = f"A {label} of the test set, read row by row"
    page = t.to_html(run.page, inputs="image", title=title, predictions=predictions)
    save_results(run, accuracy, baseline, sample)
    console.print(f"Interactive page of the trained layer: {page}", soft_wrap=True)


def show_layer(model: Classifier, t: ur.Trace, image: Tensor, label: int) -> None:
    """Print what the trained layer reads and predicts at each step, and how a number is computed."""
    state = next(iter(model.layer.cell.state))
    with torch.no_grad():
        probabilities = model.head(t[state][:, 0]).softmax(-1)
    gates = [name for name in t.names if t[name].shape == t[state].shape and "_" not in name]
    console.print(f"\nThe trained layer on a {label} of the test set: the pixels and the prediction at each")
    console.print(f"step, and the means of {', '.join(gates)} over the units.\n")
    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("step", "pixels", "digit", "probability", *gates):
        table.add_column(heading, justify="right" if heading in gates else "left", no_wrap=True)
    for step, row in enumerate(image):
        shades = "".join(2 * SHADES[min(int(pixel * 10), 9)] for pixel in row.tolist())
        probability, digit = probabilities[step].max(0)
        means = [f"{t[name][step].mean():.2f}" for name in gates]
        table.add_row(str(step), Text(shades), str(digit.item()), f"{probability:.0%}", *means)
    console.print(table)
    unit = int(t[state][-1, 0].abs().argmax())
    console.print(f"\nHow the largest number of the last hidden state is computed (unit {unit}):")
    for name in t.names[-2:]:
        console.print(f"  {name}: {t.explain(name, -1, unit)}", markup=False)
    console.print(f"Largest difference from torch.nn on this image: {t.check():.1e}")


def save_results(run: Run, accuracy: float, baseline: float, sample: Tensor) -> None:
    """Write the scores and the sample, and print where all files are."""
    scores = run.save_scores({"accuracy": accuracy, "baseline": {"logistic regression": baseline}})
    csv = run.save_sample(sample)
    console.print(
        f"\nWrote {run.checkpoint} (weights), {scores} (scores) and {csv} (this image).", soft_wrap=True
    )
    print_show_command(run, csv)


if __name__ == "__main__":
    run_example(main)
