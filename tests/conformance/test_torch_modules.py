from __future__ import annotations

import pytest

import unrolled as ur
from conformance import mutants, torch_modules
from helpers.layer_pairs import NEEDS_COMPILER

OURS = {name: getattr(ur, name) for name in torch_modules.NAMES}


@pytest.mark.parametrize(
    "engine",
    [pytest.param("native", marks=NEEDS_COMPILER), pytest.param("reference", marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, marks=[pytest.mark.exhaustive] if check == "factory_arguments" else [])
        for check in torch_modules.CHECKS
    ],
)
def test_torchs_own_inputs(check: str, engine: str) -> None:
    with ur.engine(engine):
        torch_modules.CHECKS[check](OURS)


def test_all_of_torchs_modules_are_there() -> None:
    assert {name for name, _ in torch_modules.infos()} == set(torch_modules.NAMES)
    assert len(list(torch_modules.samples(OURS))) >= 87


@pytest.mark.parametrize(("what", "kind"), mutants.MUTANTS)
def test_a_wrong_cell_is_noticed(what: str, kind: str) -> None:
    classes = mutants.classes_with(what, kind)
    with ur.engine("reference"):
        for check in torch_modules.NUMERIC:
            with pytest.raises(AssertionError):
                torch_modules.CHECKS[check](classes)
