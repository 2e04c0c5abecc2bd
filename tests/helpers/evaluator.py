"""Run the page's evaluator of steps, in Node.js if there is one, else in Chromium."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import unrolled as ur
from helpers.browser import NOT_FOUND, find_browser, running_browser
from unrolled.page.assets import script
from unrolled.page.sampling import encode_values
from unrolled.page.step_programs import program_data
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.step_graph import LayerProgram, model_programs

NODE = shutil.which("node") or shutil.which("nodejs")
needs_javascript = pytest.mark.skipif(NODE is None and find_browser() is None, reason=NOT_FOUND)

# Encodes all arrays of a result. Numbers that aren't finite survive.
_ENCODE = """
const encode = (value) => {
  if (ArrayBuffer.isView(value)) {
    const bytes = new Uint8Array(Float64Array.from(value).buffer);
    let text = "";
    for (const byte of bytes) text += String.fromCharCode(byte);
    return { base64: btoa(text) };
  }
  if (Array.isArray(value)) return value.map(encode);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, encode(part)]));
};
const decodeAll = (arrays) =>
  Object.fromEntries(Object.entries(arrays).map(([name, array]) => [name, decodeValues(array)]));
const decodeLayer = (layer) => ({
  ...layer,
  input: decodeValues(layer.input),
  initialState: decodeAll(layer.initialState),
  parameters: decodeAll(layer.parameters),
});
"""
# The cases are [program, constants, parameters] for single steps.
_RUN_STEPS = """
const runSteps = (cases) => cases.map(([program, constants, parameters]) =>
  new StepEvaluator(program, constants.map(decodeValues)).run({ parameters: decodeAll(parameters) }).values);
"""
_FUNCTION_NAMES = """
const functionNames = () =>
  Object.keys({ ...ELEMENT_FUNCTIONS, ...REDUCTIONS, ...VECTOR_FUNCTIONS, ...STRUCTURAL_FUNCTIONS });
"""
# The cases are [layers, several edits]: the results of a model for each.
_RUN_MODELS = """
const runModels = (cases) => cases.map(([layers, editsOfRuns]) => {
  const decoded = layers.map(decodeLayer);
  return editsOfRuns.map((edits) => runModel(decoded, edits));
});
"""
# The cases are [layers of a page, edits]: the quantities of each layer, and its heat maps.
_RUN_PAGES = """
const runPages = (cases) => cases.map(([layers, edits]) => {
  const models = createModels(layers);
  if (edits.length) {
    const run = new LongRun(models, edits);
    run.advance(Infinity);
    run.apply();
  }
  return models.map((model) => {
    const names = model.nodes.map(({ name }) => name).filter((name) => name && model.nodesByKey.has(name));
    const ofStep = (q, step) => [...model.read(model.values.row(step), model.valueIndex(q))];
    const read = (q) => Float64Array.from(model.steps.flatMap((step) => ofStep(q, step)));
    const values = Object.fromEntries(["x", ...names].map((q) => [q, read(q)]));
    return { values, maps: edits.length ? model.maps : null };
  });
});
"""
# The cases are the layers of pages: the gradients of each layer's parameters, as the totals of the sums of
# each element, and as the page adds up all of them.
_WEIGHT_GRADIENTS = """
const parameterGradients = (cases) => cases.map((layers) => createModels(layers).map((model) => {
  const found = weightGradients(model);
  return Object.fromEntries([...model.parameters.values()].map(({ name, shape }) => {
    const columns = shape[1] ?? 1;
    const size = shape[0] * columns;
    const number = (k) => (shape.length > 1
      ? { q: name, u: Math.floor(k / columns), j: k % columns } : { q: name, u: k });
    const each = Float64Array.from({ length: size }, (_, k) => found.total(number(k)));
    return [name, { each, all: totalGradients(found, name, shape) }];
  }));
}));
"""
# The cases are the layers of pages: the equations of each layer, as text.
_EQUATIONS = """
const equations = (cases) => cases.map((layers) => createModels(layers).map((model) => {
  const symbols = new Symbols(model);
  const plain = (markup) => Symbols.plain(markup.replace(/<sub>(.*?)<\\/sub>/g, "_$1"));
  const lines = model.nodes.filter((node) => model.labels.get(node.id)).map((node) =>
    `${model.labels.get(node.id)} = ${plain(symbols.expression(node, null, "t"))}`);
  return [...model.definitions.map((one) => plain(definitionText(one))), ...lines];
}));
"""
# The cases are the layers of pages: the titles of the tables of each layer's gates, as text.
_TITLES = """
const gateTitles = (cases) => cases.map((layers) => createModels(layers).map((model) => {
  const symbols = new Symbols(model);
  const gates = model.nodes.filter((node) => node.kind === "layer");
  return gates.map((node) => Symbols.plain(symbols.distinctTitle(node)));
}));
"""
# The cases are [layers of a page, quantity]: how unit 1 of the first layer at step 2 is computed, with its
# names as text. A name has the value that it is of, and a number of a weighted sum also its rows.
_DERIVATIONS = """
const derivations = (cases) => cases.map(([layers, q]) => {
  const [model] = createModels(layers);
  const symbols = new Symbols(model);
  const plain = (markup) => Symbols.plain(markup.replace(/<sub>(.*?)<\\/sub>/g, "_$1"));
  const named = (one) => (one.constant === undefined
    ? [plain(symbols.of(one)), model.value(one)] : [plain(one.text), one.constant]);
  const number = { q, t: 2, u: 1 };
  const { parts, rows, vector } = model.derive(number);
  const written = (found) => found.map(({ sign, factors }) => [sign, ...factors.map(named)]);
  return {
    value: model.value(number),
    parts: parts && parts.map(({ sign, total, rows: own }) => [sign, total && named(total), written(own)]),
    rows: written(rows),
    vector: vector && vector.map((one) => model.value(one)),
  };
});
"""
# The cases are [data of a page, index of the layer, edits as in the address, numbers]: what the page says.
_SENTENCES = """
const sentences = (cases) => cases.map(([data, layer, edits, numbers]) => {
  const view = new View({ dataset: {} }, data, null);
  view.layerIndex = layer;
  view.number = view.firstNumber();
  [view.step, view.unit] = [view.number.t, view.number.u];
  view.row.edits.fromText(edits);
  view.refresh();
  const { model } = view;
  const plain = (markup) => Symbols.plain(String(markup).replace(/<sub>(.*?)<\\/sub>/g, "_$1"));
  const parameters = [...model.parameters.values()].filter(({ values }) => values)
    .map(({ name, shape }) => ({ q: name, u: 0, ...(shape.length > 1 ? { j: 0 } : {}) }));
  const all = [model.firstStep, view.step]
    .flatMap((t) => ["x", ...model.order].map((q) => ({ q, t, u: Math.min(1, model.size(q) - 1) })));
  return {
    numbers: numbers.map((number) => plain(sentence(view, number))),
    every: [...all, ...parameters].map((number) => plain(sentence(view, number))),
    effect: plain(effectOfChanges(view)),
    tour: tourStops(view).map(({ title, text }) => `${title}: ${plain(text)}`),
    experiments: experiments(view).map(({ text }) => plain(text)),
    names: [...["x", ...model.states.map(({ name }) => name)].map((name) => rowDescription(view, name)),
      ...model.nodes.flatMap(({ name }) => (name ? [name] : []))
        .map((name) => `${name}: ${afterName(name, model.descriptions[name] ?? "")}`)],
    checked: checkedText(data.health),
    findings: data.health.findings.map((finding) => view.numberOf(finding)),
  };
});
"""


def run_javascript(function: str, data: Any, folder: Path) -> Any:
    """Call one of the functions above, and return its result with all arrays as tensors.

    Args:
        function: The name of the function.
        data: Its argument.
        folder: A folder for temporary files.
    """
    pages = _RUN_PAGES + _WEIGHT_GRADIENTS + _EQUATIONS + _TITLES + _DERIVATIONS + _SENTENCES
    helpers = _ENCODE + _FUNCTION_NAMES + _RUN_STEPS + _RUN_MODELS + pages
    text = json.dumps(data, allow_nan=False)
    if NODE is None:
        with running_browser() as browser:
            page = browser.new_page()
            source = f"(data) => {{ {script()}\n{helpers}\nreturn encode({function}(data)); }}"
            result = page.evaluate(source, json.loads(text))
    else:
        (folder / "data.json").write_text(text)
        head = 'import { readFileSync, writeFileSync } from "fs";\n'
        run = 'const data = JSON.parse(readFileSync("data.json"));\n'
        run += f'writeFileSync("result.json", JSON.stringify(encode({function}(data))));\n'
        (folder / "run.mjs").write_text(head + script() + "\n" + helpers + run)
        subprocess.run([NODE, "run.mjs"], cwd=folder, check=True)
        result = json.loads((folder / "result.json").read_text())
    return _decoded(result)


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    if isinstance(value, dict) and "base64" in value:
        return torch.from_numpy(numpy.frombuffer(base64.b64decode(value["base64"])).copy())
    return {key: _decoded(part) for key, part in value.items()} if isinstance(value, dict) else value


def layer_data(part: LayerTrace, program: LayerProgram, batch: int = 0) -> dict[str, Any]:
    """Return a layer as ``runModel`` takes it, except that its arrays are encoded."""
    length = int(part.lengths[batch])
    return {
        "layer": part.layer,
        "direction": part.direction,
        "program": program_data(program),
        "input": encode_values(part.input[:length, batch]),
        "initialState": {name: encode_values(state[batch]) for name, state in part.initial_state.items()},
        "parameters": {name: encode_values(getattr(part.cell, name)) for name in part.cell.shapes()},
    }


def model_data(trace: ur.Trace, batch: int = 0) -> list[dict[str, Any]]:
    """Return all layers of a trace as ``runModel`` takes them. Fails if a layer has no program."""
    programs = model_programs(trace, batch)
    assert [program.reason for program in programs] == [None] * len(programs)
    return [layer_data(part, program, batch) for part, program in zip(trace.layers, programs, strict=True)]


def assert_equal_on_page(actual: Tensor, expected: Tensor, describe: Callable[[], str]) -> None:
    """Check that numbers agree as the page shows them: to four decimals, or to 1e-9 in double precision."""
    tolerance = 1e-9 if expected.dtype is torch.float64 else 5e-5
    expected = expected.double().flatten()
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
        msg=lambda text: f"{describe()}: {text}",
    )
