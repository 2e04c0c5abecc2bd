"""Train a small LSTM to sound like a tube amplifier, and export it to a C program and to a web page.

The training data is synthesized: plucked strings, and the same strings through a model of an amplifier with
distortion, sag and a filter. The layer reads one audio sample per time step, like an audio plugin.
"""

from __future__ import annotations

import base64
import shutil
import wave
from pathlib import Path

import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor, nn

import unrolled as ur
from training import argument_parser, console, run_example, start, train

RATE = 44100
STEPS = 2048  # of a training sequence
WARM_UP = 512  # the loss ignores the first steps of a sequence, in which the state settles
FILES = Path(__file__).with_name("audio")


Sound = np.ndarray[tuple[int], np.dtype[np.float64]]


class Effect(nn.Module):
    """An LSTM with a linear output layer. Its output is added to the dry sound."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = ur.LSTM(1, hidden, batch_first=True)
        self.mix = nn.Linear(hidden, 1)

    def forward(self, sound: Tensor) -> Tensor:
        """Return the sound with the effect, of the same shape ``(batch, time, 1)`` as the dry sound."""
        output, _ = self.lstm(sound)
        wet: Tensor = sound + self.mix(output)
        return wet


def pluck(frequency: float, seconds: float, random: np.random.Generator) -> Sound:
    """Return a plucked string (Karplus & Strong, 1983)."""
    period = round(RATE / frequency)
    string = random.uniform(-1, 1, period)
    parts = []
    for _ in range(int(seconds * RATE) // period + 1):
        parts.append(string)
        string = 0.498 * (string + np.roll(string, 1))
    return np.concatenate(parts)[: int(seconds * RATE)]


def melody(seconds: float, seed: int) -> Sound:
    """Return plucked strings of random pitch and loudness, with a peak of 1."""
    random = np.random.default_rng(seed)
    sound = np.zeros(int(seconds * RATE))
    for start_time in np.arange(0, seconds, 0.3):
        note = random.uniform(0.2, 1) * pluck(80 * 2 ** (random.integers(0, 30) / 12), 0.9, random)
        first = int(start_time * RATE)
        sound[first : first + len(note)] += note[: len(sound) - first]
    loudest: float = np.abs(sound).max()
    return sound / loudest


def amplifier(sound: Sound) -> Sound:
    """Return a sound through an amplifier with asymmetric clipping, whose gain drops for loud sound."""
    loudness = lfilter([1e-3], [1, 1e-3 - 1], np.abs(sound))
    driven = np.tanh(6 * sound / (1 + 4 * loudness) + 0.3) - np.tanh(0.3)
    wet: Sound = 0.7 * lfilter([0.4], [1, -0.6], driven)
    return wet


def cut(sound: Sound) -> Tensor:
    """Return a sound as sequences, ``(sequences, STEPS, 1)``."""
    count = len(sound) // STEPS
    return torch.tensor(sound[: count * STEPS], dtype=torch.float32).view(count, STEPS, 1)


def error_to_signal(output: Tensor, target: Tensor) -> Tensor:
    """Return the energy of the error relative to that of the target, after the warm-up."""
    output, target = output[:, WARM_UP:], target[:, WARM_UP:]
    return (output - target).square().sum() / target.square().sum()


def write_wav(path: Path, sound: Sound) -> None:
    """Write a sound as a WAV file with 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())


def export(model: Effect, folder: Path) -> None:
    """Write the C of the model with the WAV filter, and the web page, into a folder."""
    ur.export.c(model, folder, name="effect")
    shutil.copy(FILES / "filter.c", folder)
    console.print(
        f"Wrote the model as C, with a filter for WAV files, to {folder}. To build and run it:",
        soft_wrap=True,
    )
    console.print(
        f"  cc -O3 -march=native -ffp-contract=off {folder}/filter.c {folder}/effect.c -o {folder}/filter\n"
        f"  {folder}/filter {folder}/dry.wav {folder}/wet.wav",
        soft_wrap=True,
    )
    try:
        module = ur.export.wasm(model).content
    except ValueError as error:  # no compiler for WebAssembly
        console.print(f"Skipped the web page: {error}.", soft_wrap=True)
        return
    page = (FILES / "page.html").read_text(encoding="utf-8")
    sound = (melody(4, seed=3) * 32767).astype("<i2").tobytes()
    for name, content in {"module": module, "sound": sound}.items():
        page = page.replace(f"@{name}@", base64.b64encode(content).decode())
    (folder / "effect.html").write_text(page, encoding="utf-8")
    console.print(f"Wrote the effect as a web page: {folder / 'effect.html'}", soft_wrap=True)


def main() -> None:
    """Train the model, compare it with the dry sound, and export it."""
    parser = argument_parser("audio_effect.py", "Train and export an audio effect.", epochs=25, hidden=16)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="length of the training sound (default: 10)"
    )
    args = parser.parse_args()
    run = start("audio_effect", args)

    dry, test = melody(args.seconds, seed=1), melody(4, seed=2)
    model = Effect(args.hidden)
    console.print(f"Training {model.lstm} on {args.seconds:g} s of sound at {RATE} Hz.")
    train(run, model, error_to_signal, (cut(dry), cut(amplifier(dry))))

    model.eval()
    with torch.no_grad():
        inputs, targets = cut(test), cut(amplifier(test))
        error, baseline = (
            float(error_to_signal(output, targets)) for output in (model(inputs), 0.5 * inputs)
        )
    console.print(
        f"Error relative to the signal: {error:.2%} with the model, {baseline:.2%} with the dry sound."
    )
    run.save_scores({"error": error, "baseline": baseline})
    folder = run.folder / "audio_effect"
    export(model, folder)
    write_wav(folder / "dry.wav", test)


if __name__ == "__main__":
    run_example(main)
