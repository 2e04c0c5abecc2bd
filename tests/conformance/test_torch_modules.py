from __future__ import annotations

import pytest

import unrolled as ur
from conformance import mutants, torch_modules
from helpers.layer_pairs import NEEDS_COMPILER

OURS = {name: getattr(ur, name) for name in torch_modules.NAMES}


@pytest.mark.slow
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
def test_torchs_module_tests(check: str, engine: str) -> None:
    with ur.engine(engine):
        torch_modules.CHECKS[check](OURS)


def test_all_torch_modules_are_tested() -> None:
    assert {name for name, _ in torch_modules.infos()} == set(torch_modules.NAMES)
    assert len(list(torch_modules.samples(OURS))) >= 87


@pytest.mark.parametrize(("change", "kind"), mutants.MUTANTS)
def test_mutants_are_detected(change: str, kind: str) -> None:
    classes = mutants.classes_with(change, kind)
    with ur.engine("reference"):
        for check in torch_modules.NUMERIC:
            with pytest.raises(AssertionError):
                torch_modules.CHECKS[check](classes)
