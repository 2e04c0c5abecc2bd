from __future__ import annotations

import os

import hypothesis
import pytest
import torch

import unrolled as ur
from helpers.layer_pairs import COMPILER_ERROR, FALLBACK_FILTER

hypothesis.settings.register_profile("no deadlines", deadline=None)  # other work may keep the machine busy
hypothesis.settings.load_profile("no deadlines")
os.environ.setdefault("UNROLLED_VERIFY", "1")  # verify the kernel IR of every loop
os.environ.setdefault("UNROLLED_CAPTURES", "0")  # capture every step, whatever is in the kernel cache


def pytest_configure(config: pytest.Config) -> None:
    if COMPILER_ERROR:
        config.addinivalue_line("filterwarnings", FALLBACK_FILTER)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(20261123)


@pytest.fixture
def walkthrough_layer() -> ur.RNN:
    """Return the layer of the introductory example, with its published weights, rounded to four decimals."""
    layer = ur.RNN(input_size=2, hidden_size=3, batch_first=True)
    weights = {
        "weight_ih_l0": [[0.5407, -0.1051], [0.1025, 0.3401], [-0.1288, 0.4972]],
        "weight_hh_l0": [[-0.2017, -0.4285, -0.0833], [0.4595, 0.3113, -0.0283], [-0.5705, -0.0535, -0.1654]],
        "bias_ih_l0": [-0.5645, 0.1087, -0.1245],
        "bias_hh_l0": [0.3875, 0.5334, -0.2906],
    }
    layer.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return layer


@pytest.fixture
def walkthrough_input() -> torch.Tensor:
    """Return four time steps with two features and a batch of one: ``(1, 4, 2)``."""
    return torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]).unsqueeze(0)
