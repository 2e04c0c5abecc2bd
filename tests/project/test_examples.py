"""The examples, run as users run them: results, baselines, and resuming after a kill."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path
from typing import Any

import numpy
import pytest
import statsmodels.api as sm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from helpers import processes
from helpers.browser import NOT_FOUND, find_browser, running_browser
from helpers.c_library import NEEDS_CC, compile_c
from helpers.wasm import NEEDS_WASM

EXAMPLES = Path(__file__).parents[2] / "examples"


def command(name: str, runs: Path, *arguments: object) -> list[str]:
    return [str(EXAMPLES / name), "--runs", str(runs), *map(str, arguments)]


def run(name: str, runs: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return processes.run(*command(name, runs, *arguments))


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: Any) -> tuple[Path, str]:
    """An uninterrupted run of ten epochs: the output folder and the printed text."""
    runs = tmp_path_factory.mktemp("runs")
    done = run("digits.py", runs, "--epochs", 10, "--hidden", 16)
    assert done.returncode == 0, done.stderr
    return runs, done.stdout


@pytest.mark.slow
def test_digits_prints_accuracy_baseline_and_files(finished: tuple[Path, str]) -> None:
    runs, out = finished
    result = json.loads((runs / "digits_lstm.json").read_text())
    assert f"{result['accuracy']:.1%} for the layer" in out
    assert f"{result['baseline']['logistic regression']:.1%} for logistic regression" in out
    assert result["accuracy"] > 0.3
    assert "the trained layer" in out.lower()
    assert "…" not in out, "a number doesn't fit into 80 columns"
    for name in ("digits_lstm.pt", "digits_lstm.json", "digits_lstm_sample.csv", "digits_lstm.html"):
        assert (runs / name).exists()
        assert str(runs / name) in out


@pytest.mark.slow
def test_the_printed_command_shows_the_trained_layer(finished: tuple[Path, str]) -> None:
    runs, out = finished
    commands = [line.split() for line in out.splitlines() if "unrolled show" in line]
    done = processes.run("-m", "unrolled", *commands[-1][1:], "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["layer"] == "LSTM(8, 16)"
    weights = checkpoint(runs / "digits_lstm.pt")["model"]
    reference = torch.nn.LSTM(8, 16)
    reference.load_state_dict(
        {k.removeprefix("layer."): v for k, v in weights.items() if k.startswith("layer.")}
    )
    x = torch.tensor(numpy.loadtxt(runs / "digits_lstm_sample.csv", delimiter=","), dtype=torch.float32)
    torch.testing.assert_close(torch.tensor(data["output"]), reference(x)[0])


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, pytest.param(0.3, marks=pytest.mark.exhaustive)])
def test_a_killed_run_resumes_with_the_same_result(
    finished: tuple[Path, str], tmp_path: Path, delay: float
) -> None:
    arguments = ("--epochs", 10, "--hidden", 16)
    path = tmp_path / "digits_lstm.pt"
    for _ in range(2):
        before = checkpoint(path)["epoch"] if path.exists() else 0
        process = processes.start(*command("digits.py", tmp_path, *arguments))
        while process.poll() is None and (not path.exists() or checkpoint(path)["epoch"] == before):
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 0 < checkpoint(path)["epoch"] <= 10
    done = run("digits.py", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Resuming after epoch" in done.stdout or "Nothing left to train" in done.stdout
    expected = checkpoint(finished[0] / "digits_lstm.pt")["model"]
    for name, value in checkpoint(path)["model"].items():
        assert torch.equal(value, expected[name]), name
    results = [json.loads((runs / "digits_lstm.json").read_text()) for runs in (tmp_path, finished[0])]
    assert results[0] == results[1]


@pytest.mark.slow
def test_ctrl_c_prints_one_line(tmp_path: Path) -> None:
    process = processes.start(*command("digits.py", tmp_path, "--epochs", 400, "--hidden", 16))
    while process.poll() is None and not (tmp_path / "digits_lstm.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "digits.py: stopped; rerun the command to resume after the last finished epoch" in err
    assert "Traceback" not in err
    assert checkpoint(tmp_path / "digits_lstm.pt")["epoch"] > 0


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_train(finished: tuple[Path, str]) -> None:
    done = run("digits.py", finished[0], "--epochs", 10, "--hidden", 16)
    assert done.returncode == 0
    assert "Nothing left to train" in done.stdout


@pytest.mark.slow
def test_an_unusable_checkpoint(finished: tuple[Path, str], tmp_path: Path) -> None:
    content = (finished[0] / "digits_lstm.pt").read_bytes()
    for damaged, epochs, message in (
        (content[: len(content) // 2], 10, "is damaged"),
        (b"", 10, "is damaged"),
        (content, 12, "was saved with a different epochs"),
    ):
        (tmp_path / "digits_lstm.pt").write_bytes(damaged)
        done = run("digits.py", tmp_path, "--epochs", epochs, "--hidden", 16)
        assert done.returncode == 2
        assert message in done.stderr
        assert "--restart" in done.stderr
        assert done.stderr.count("\n") == 1
    done = run("digits.py", tmp_path, "--epochs", 1, "--hidden", 16, "--restart")
    assert done.returncode == 0
    done = run("digits.py", tmp_path, "--epochs", 0)
    assert done.returncode == 2
    assert "expected a positive integer, got 0" in done.stderr


@pytest.mark.slow
def test_sunspots(tmp_path: Path) -> None:
    done = run("sunspots.py", tmp_path, "--epochs", 60)
    assert done.returncode == 0, done.stderr
    errors = json.loads((tmp_path / "sunspots.json").read_text())["mean_absolute_error"]
    values = sm.datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy()
    assert errors["same as last year"] == pytest.approx(numpy.abs(numpy.diff(values))[-60:].mean())
    lagged = numpy.stack([values[9 - k : len(values) - k] for k in range(1, 10)], 1)
    design = numpy.column_stack([numpy.ones(len(lagged)), lagged])
    weights = numpy.linalg.lstsq(design[:-60], values[9:-60], rcond=None)[0]
    expected = numpy.abs(design[-60:] @ weights - values[-60:]).mean()
    assert errors["autoregression of 9 years"] == pytest.approx(expected)
    assert errors["layer"] < errors["same as last year"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [pytest.param([], marks=pytest.mark.exhaustive, id="ddp"), pytest.param(["--sharded"], id="sharded")],
)
def test_several_processes_have_the_gradients_of_one(options: list[str], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(EXAMPLES / "data_parallel.py"), "--epochs", "5", "--hidden", "8", *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes, largest relative difference of the gradients: " in done.stdout
    first, last = (float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("epoch"))
    assert last < first


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Lightning triggers warnings in torch
def test_lightning_trains_like_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from data_parallel import Forecaster, load_windows
    from with_lightning import Training, fit

    batches = DataLoader(TensorDataset(*load_windows()), batch_size=64)
    training, plain = Training(8), Forecaster(8)
    plain.load_state_dict(training.model.state_dict())
    fit(training, batches, epochs=2)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        for past, change in batches:
            loss = torch.nn.functional.huber_loss(plain(past), change)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert training.losses == losses
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(training.model.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.slow
def test_a_folder_is_classified_in_parts(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, trained = tmp_path / "images", tmp_path / "scores", finished[0] / "digits_lstm.pt"
    folder.mkdir()
    heights = numpy.random.default_rng(0).integers(1, 9, 20)
    images = [image[:rows] / 16 for image, rows in zip(load_digits().images, heights, strict=False)]
    for number, image in enumerate(images):
        numpy.save(folder / f"{number:03}.npy", image)
    weights = checkpoint(trained)["model"]
    command_line = [
        str(EXAMPLES / "score_folder.py"),
        str(trained),
        str(folder),
        "--part",
        "7",
        "--out",
        str(out),
    ]
    done = subprocess.run([sys.executable, *command_line, "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "20 sequences in 3 parts, 3 parts left" in done.stdout

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import score_folder

    monkeypatch.setattr(sys, "argv", command_line)
    monkeypatch.setattr(score_folder, "run", lambda parts, *_: pytest.fail(f"{parts} exist already"))
    score_folder.main()  # finds no missing parts
    tables = [table.read_text().splitlines() for table in sorted(out.glob("*.csv"))]
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", [*command_line[:2], str(tmp_path / "empty"), *command_line[3:]])
    with pytest.raises(ValueError, match="empty has no .npy file"):
        score_folder.main()
    numpy.save(tmp_path / "bad.npy", numpy.zeros((3, 7)))
    with pytest.raises(ValueError, match=r"bad.npy: expected an array of shape \(rows, 8\), got \(3, 7\)"):
        score_folder.score((tmp_path / "bad.csv", [tmp_path / "bad.npy"]), checkpoint(trained))
    assert not (tmp_path / "bad.csv").exists()
    rows = [row for table in tables for row in csv.DictReader(table)]
    assert [row["file"] for row in rows] == [f"{number:03}.npy" for number in range(20)]
    layer = torch.nn.LSTM(8, 16)
    layer.load_state_dict(
        {name.removeprefix("layer."): value for name, value in weights.items() if "layer" in name}
    )
    for row, image in zip(rows, images, strict=True):
        last = layer(torch.tensor(image).float())[0][-1]
        scores = (weights["head.weight"] @ last + weights["head.bias"]).softmax(0)
        assert int(row["digit"]) == scores.argmax()
        assert float(row["sure"]) == pytest.approx(float(scores.max().detach()), rel=1e-5)


@pytest.fixture(scope="module")
def audio_effect(tmp_path_factory: Any) -> Path:
    """The folder that a short run of the audio effect exports to."""
    runs = tmp_path_factory.mktemp("runs")
    done = run("audio_effect.py", runs, "--epochs", 1, "--seconds", 1, "--hidden", 8)
    assert done.returncode == 0, done.stderr
    assert "with the dry sound" in done.stdout
    return runs / "audio_effect"


def read_wav(path: Path) -> torch.Tensor:
    with wave.open(str(path)) as file:
        samples = numpy.frombuffer(file.readframes(file.getnframes()), "<i2")
    return torch.tensor(samples.astype(numpy.float32)) / 32768


@pytest.mark.slow
@NEEDS_CC
def test_the_audio_effect_as_a_filter(audio_effect: Path, tmp_path: Path) -> None:
    sources = [audio_effect / name for name in ("filter.c", "effect.c")]
    compile_c("-O2", *sources, "-o", tmp_path / "filter")
    paths = [audio_effect / "dry.wav", tmp_path / "wet.wav"]
    done = subprocess.run([tmp_path / "filter", *paths], capture_output=True, text=True)
    assert re.fullmatch(r"4\.00 s of sound, load \d+\.\d\d % of real time\n", done.stdout), done.stderr
    weights = checkpoint(audio_effect.parent / "audio_effect.pt")["model"]
    layer, mix = torch.nn.LSTM(1, 8), torch.nn.Linear(8, 1)
    for part, name in ((layer, "lstm."), (mix, "mix.")):
        part.load_state_dict({k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)})
    dry, wet = (read_wav(path) for path in paths)
    with torch.no_grad():
        expected = dry + mix(layer(dry.unsqueeze(1))[0])[:, 0]
    assert len(wet) == len(dry)
    torch.testing.assert_close(wet, expected.clamp(-1, 32767 / 32768), atol=1 / 32768, rtol=0)
    (tmp_path / "no.wav").write_bytes(paths[0].read_bytes()[:30])
    for source, message in (
        ("no.wav", "expected a WAV file with one channel"),
        ("none.wav", "can't be read"),
    ):
        done = subprocess.run(
            [tmp_path / "filter", source, "out.wav"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert message in done.stderr


@pytest.mark.slow
@NEEDS_WASM
@pytest.mark.skipif(find_browser() is None, reason=NOT_FOUND)
def test_the_audio_effect_in_a_browser(audio_effect: Path) -> None:
    errors: list[str] = []
    with running_browser() as browser:
        page = browser.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((audio_effect / "effect.html").as_uri())
        page.get_by_role("button", name="Play strings").click()
        page.get_by_text("% of real time").wait_for()
        page.locator("#file").set_input_files(audio_effect / "dry.wav")
        page.locator("#effect").uncheck()
        page.get_by_text("% of real time").wait_for()
        page.get_by_role("button", name="Stop").click()
    assert not errors
