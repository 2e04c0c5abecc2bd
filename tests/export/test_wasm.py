"""WebAssembly: its numbers in Node, its size, and what bad input gets."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unrolled as ur
from helpers.wasm import NEEDS_WASM
from unrolled.cli.main import main

RUN = """
const fs = require("fs");
const inputs = JSON.parse(fs.readFileSync(process.argv[3]));
WebAssembly.instantiate(fs.readFileSync(process.argv[2]), {}).then(({ instance: { exports: e } }) => {
  const failed = e.init() || e.selftest();
  e.reset();
  const outputs = [];
  for (let t = 0; t < inputs.length; t += e.most_steps()) {
    const part = inputs.slice(t, t + e.most_steps());
    const kind = e.output_size() && process.argv[4] === "int" ? Int32Array : Float32Array;
    new kind(e.memory.buffer, e.input(), part.length * e.input_size()).set(part.flat());
    e.run(part.length);
    outputs.push(...new Float32Array(e.memory.buffer, e.output(), part.length * e.output_size()));
  }
  console.log(JSON.stringify({ failed, outputs }));
});
"""


class Speller(nn.Module):
    """An embedding and a layer that also runs from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.layer = ur.GRU(3, 4, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(x))[0]


@NEEDS_WASM
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("simd", [True, False])
@pytest.mark.parametrize(
    ("create", "x", "tolerance"),
    [
        (lambda: ur.LSTM(1, 32), torch.randn(300, 1), 5e-7),
        (Speller, torch.randint(7, (20,)), 5e-7),
        # Without fused multiply-adds, an activation is sometimes rounded to the next integer.
        (lambda: ur.quantize(ur.LSTM(1, 32).eval()), torch.randn(300, 1), 0.01),
    ],
)
def test_its_numbers(create: Any, x: torch.Tensor, tolerance: float, simd: bool, tmp_path: Path) -> None:
    model = create()
    path = tmp_path / "model.wasm"
    result = ur.export.wasm(model, path, simd)
    assert result.content == path.read_bytes()
    assert len(result.content) <= 30 * 1024
    (tmp_path / "run.js").write_text(RUN)
    (tmp_path / "x.json").write_text(json.dumps(x.tolist()))
    kind = "float" if x.is_floating_point() else "int"
    line = ["node", "run.js", "model.wasm", "x.json", kind]
    done = json.loads(subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    expected = model(x.unsqueeze(1) if kind == "int" else x)
    expected = (expected[0] if kind == "float" else expected).detach()
    assert not done["failed"]
    outputs = torch.tensor(done["outputs"]).reshape(len(x), result.output)
    torch.testing.assert_close(outputs, expected.reshape(len(x), -1), atol=tolerance, rtol=0)


@pytest.mark.slow
def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with ur.engine("reference"):  # the native engine would remember that there is no compiler
        with pytest.raises(ValueError, match=r"Install zig \(pip install ziglang\), or clang with wasm-ld"):
            ur.export.wasm(ur.LSTM(1, 2), tmp_path / "model.wasm")
        with pytest.raises(ValueError, match=r"to_html\(live=True\): no compiler for WebAssembly"):
            ur.trace(ur.LSTM(1, 2), torch.randn(3, 1)).to_html(tmp_path / "page.html", live=True)
        code = tmp_path / "model.py"
        code.write_text("import unrolled as ur\n\ndef build():\n    return ur.LSTM(1, 2)\n")
        line = ["export", f"{code}:build", "--out", str(tmp_path / "out")]
        assert main([*line, "--wasm", str(tmp_path / "m.wasm")]) == 2
        assert "no compiler for WebAssembly was found" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [code]


@NEEDS_WASM
@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, path = tmp_path / "model.py", tmp_path / "m.wasm"
    code.write_text("import unrolled as ur\n\ndef build():\n    return ur.LSTM(1, 2)\n")
    assert main(["export", f"{code}:build", "--out", str(tmp_path / "out"), "--wasm", str(path)]) == 0
    assert f"Wrote the WebAssembly module to {path}: " in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\0asm")
