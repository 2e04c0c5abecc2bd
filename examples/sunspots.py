"""Train a layer to forecast next year's sunspots, then look inside it on the last years.

statsmodels contains the yearly mean sunspot numbers from 1700 to 2008. The layer reads 33 years, about three
solar cycles of eleven years. A linear layer on its last hidden state forecasts the next year.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import statsmodels.api as sm
import torch
from rich.table import Table
from statsmodels.tsa.ar_model import AutoReg
from torch import Tensor, nn

import unrolled as ur
from training import argument_parser, console, print_show_command, run_example, start, train

YEARS = 33  # in each input
TEST_YEARS = 60  # at the end of the series
LAGS = 9  # order of the autoregression, the usual one for this series


class Forecaster(nn.Module):
    """A recurrent layer over past years, and a linear layer on its last hidden state."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layer = ur.GRU(1, hidden, batch_first=True)
        self.next_year = nn.Linear(hidden, 1)

    def forward(self, past: Tensor) -> Tensor:
        """Return the change to the next year, of shape ``(batch,)``, for input ``(batch, years, 1)``."""
        output, _ = self.layer(past)
        change: Tensor = self.next_year(output[:, -1])
        return change.squeeze(-1)


def main() -> None:
    """Train the model, compare it with baselines, and show the layer."""
    args = argument_parser(
        "sunspots.py", "Forecast next year's sunspots.", epochs=150, hidden=16
    ).parse_args()
    run = start("sunspots", args)
    series = sm.datasets.sunspots.load_pandas().data
    years, values = series["YEAR"].to_numpy(int), series["SUNACTIVITY"].to_numpy(float)
    train_years = len(values) - TEST_YEARS
    scale = float(values[:train_years].std())  # without the test set
    scaled = torch.tensor(values / scale, dtype=torch.float32)

    windows = scaled.unfold(0, YEARS, 1)[:-1].unsqueeze(-1)
    changes = scaled[YEARS:] - scaled[YEARS - 1 : -1]
    train_count = len(windows) - TEST_YEARS
    model = Forecaster(args.hidden)
    console.print(
        f"Training {model.layer} on the years {years[0]} to {years[train_years - 1]}, {YEARS} at a time;"
    )
    console.print(f"{years[train_years]} to {years[-1]} are the test set. (The series is yearly.)")
    train(run, model, nn.functional.huber_loss, (windows[:train_count], changes[:train_count]))

    model.eval()
    with torch.no_grad():
        forecast = (model(windows[train_count:]) + scaled[train_years - 1 : -1]).double().numpy() * scale
    errors = {
        "layer": _mean_error(forecast, values[train_years:]),
        f"autoregression of {LAGS} years": _mean_error(
            _autoregression(values, train_years), values[train_years:]
        ),
        "same as last year": _mean_error(values[train_years - 1 : -1], values[train_years:]),
    }
    console.print("\nMean absolute error of the forecasts for the test years, in sunspots:")
    for name, error in errors.items():
        console.print(f"  {error:5.2f}  {name}{'' if name == 'layer' else ' (baseline)'}")
    show_layer(model, windows[-1], years)
    scores = run.save_scores({"mean_absolute_error": errors})
    csv = run.save_sample(windows[-1])
    console.print(
        f"\nWrote {run.checkpoint} (weights), {scores} (scores) and {csv} (these years).", soft_wrap=True
    )
    print_show_command(run, csv)


def show_layer(model: Forecaster, window: Tensor, years: Any) -> None:
    """Print the gates and the state of one unit over the last years of the test set."""
    t = ur.trace(model.layer, window)
    unit = int(t["h"][:, 0].std(0).argmax())
    console.print(f"\nThe trained layer on the last years: unit {unit}, the one that varies most.\n")
    table = Table(box=None, padding=(0, 1))
    gates = [name for name in t.names if t[name].shape == t["h"].shape and "_" not in name]
    for heading in ("year", "input", *gates):
        table.add_column(heading, justify="right")
    for step in range(YEARS - 11, YEARS):
        numbers = (f"{t[name][step, 0, unit]:.2f}" for name in gates)
        table.add_row(str(years[step - YEARS - 1]), f"{window[step].item():.2f}", *numbers)
    console.print(table)
    console.print(f"\nHow its last number is computed:  h: {t.explain('h', -1, unit)}", soft_wrap=True)
    console.print(f"Largest difference from torch.nn on these years: {t.check():.1e}")


def _autoregression(values: Any, train_years: int) -> Any:
    """Return one-step forecasts for the test years from an autoregression fitted on the years before."""
    model = AutoReg(values[:train_years], lags=LAGS).fit()
    past = np.lib.stride_tricks.sliding_window_view(values, LAGS)[train_years - LAGS : -1]
    return model.params[0] + past[:, ::-1] @ model.params[1:]


def _mean_error(forecast: Any, actual: Any) -> float:
    return float(np.abs(forecast - actual).mean())


if __name__ == "__main__":
    run_example(main)
