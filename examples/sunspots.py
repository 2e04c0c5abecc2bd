"""Next year's sunspots from the years before, then the trained layer opened on the last ones.

statsmodels ships the yearly mean sunspot numbers from 1700 to 2008. A layer reads 33 years, three of the
sun's cycles of about eleven, and a linear map of its last hidden state forecasts the year after.
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
from training import console, options, say_how_to_open, start, told, train

YEARS = 33  # that a forecast sees
HELD_OUT = 60  # the last years, which no model is fitted on
LAGS = 9  # of the autoregression: the order that is usual for this series


class Forecaster(nn.Module):
    """A recurrent layer over past years, and a linear map of its last hidden state."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layer = ur.GRU(1, hidden, batch_first=True)
        self.next_year = nn.Linear(hidden, 1)

    def forward(self, past: Tensor) -> Tensor:
        """``(batch, years, 1)`` to ``(batch,)``: the change from the last year to the next."""
        output, _ = self.layer(past)
        change: Tensor = self.next_year(output[:, -1])
        return change.squeeze(-1)


def main() -> None:
    """Train, compare with baselines, open the layer."""
    given = options("sunspots.py", "Forecast next year's sunspots.", epochs=150, hidden=16).parse_args()
    run = start("sunspots", given)
    series = sm.datasets.sunspots.load_pandas().data
    years, values = series["YEAR"].to_numpy(int), series["SUNACTIVITY"].to_numpy(float)
    fitted = len(values) - HELD_OUT
    scale = float(values[:fitted].std())  # nothing of the held-out years enters
    scaled = torch.tensor(values / scale, dtype=torch.float32)

    windows = scaled.unfold(0, YEARS, 1)[:-1].unsqueeze(-1)
    changes = scaled[YEARS:] - scaled[YEARS - 1 : -1]
    training = len(windows) - HELD_OUT
    model = Forecaster(given.hidden)
    console.print(f"{model.layer} reads {YEARS} years at a time of {years[0]} to {years[fitted - 1]};")
    console.print(f"{years[fitted]} to {years[-1]} are held out. (The series is yearly.)")
    train(run, model, nn.functional.huber_loss, (windows[:training], changes[:training]))

    model.eval()
    with torch.no_grad():
        forecast = (model(windows[training:]) + scaled[fitted - 1 : -1]).double().numpy() * scale
    errors = {
        "layer": _error(forecast, values[fitted:]),
        f"autoregression of {LAGS} years": _error(_autoregression(values, fitted), values[fitted:]),
        "same as last year": _error(values[fitted - 1 : -1], values[fitted:]),
    }
    console.print("\nMean absolute error of the forecasts of the held-out years, in sunspots:")
    for name, error in errors.items():
        console.print(f"  {error:5.2f}  {name}{'' if name == 'layer' else ', a baseline'}")
    open_layer(model, windows[-1], years)
    scores = run.save_scores({"mean_absolute_error": errors})
    csv = run.save_sample(windows[-1])
    console.print(
        f"\nWritten: {run.checkpoint} (weights), {scores} (scores), {csv} (those years).", soft_wrap=True
    )
    say_how_to_open(run, csv)


def open_layer(model: Forecaster, window: Tensor, years: Any) -> None:
    """Trace the trained layer on the last held-out years."""
    t = ur.trace(model.layer, window)
    unit = int(t["h"][:, 0].std(0).argmax())
    console.print(f"\nThe trained layer, opened on the last years: unit {unit}, the one that moves most:\n")
    table = Table(box=None, padding=(0, 1))
    gates = [name for name in t.names if t[name].shape == t["h"].shape and "_" not in name]
    for heading in ("year", "reads", *gates):
        table.add_column(heading, justify="right")
    for step in range(YEARS - 11, YEARS):
        numbers = (f"{t[name][step, 0, unit]:.2f}" for name in gates)
        table.add_row(str(years[step - YEARS - 1]), f"{window[step].item():.2f}", *numbers)
    console.print(table)
    console.print(f"\nWhere its last number comes from:  h: {t.explain('h', -1, unit)}", soft_wrap=True)
    console.print(f"Largest difference from torch.nn on these years: {t.check():.1e}")


def _autoregression(values: Any, fitted: int) -> Any:
    """One-step forecasts of the held-out years by an autoregression fitted on the years before."""
    model = AutoReg(values[:fitted], lags=LAGS).fit()
    past = np.lib.stride_tricks.sliding_window_view(values, LAGS)[fitted - LAGS : -1]
    return model.params[0] + past[:, ::-1] @ model.params[1:]


def _error(forecast: Any, actual: Any) -> float:
    return float(np.abs(forecast - actual).mean())


if __name__ == "__main__":
    told(main)
