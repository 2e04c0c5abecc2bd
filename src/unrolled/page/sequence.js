// The whole sequence: every state and gate, as numbers of a small layer, else as colors.

import { createCell } from "./cells.js";
import { colorScale } from "./color_scale.js";
import { createElement, createMarkup, visibleLabel } from "./dom.js";
import { fixed, shown } from "./digits.js";
import { decodeBytes, gateColor, valueColor } from "./numbers.js";
import { symbol } from "./symbols.js";

const TABLE_UNITS = 4; // a layer with more units, or a longer sequence, is shown as colors
const TABLE_STEPS = 12;
const MAX_ROW_HEIGHT = 14; // pixels
const MAP_HEIGHT = 88;
const MAX_CODE = 252; // of a finite mean in a heat map that is coded in 8 bits
const SPECIAL_CODES = new Map([[253, NaN], [254, Infinity], [255, -Infinity]]);
const MAX_PREDICTIONS = 40; // that are shown below the maps

/** Whether all numbers of a layer fit into tables. */
export function isSmall(model) {
  return model.units <= TABLE_UNITS && model.length <= TABLE_STEPS && model.complete;
}

/** Create the section. Returns {element, update}. */
export function createSequence(view) {
  const element = createElement("div");
  let drawn = "";
  let parts = [];

  function update() {
    const { model } = view;
    const isTable = isSmall(model);
    const key = [view.partKey, isTable ? "" : view.theme, isTable ? "" : view.edits.runs].join();
    if (key !== drawn) {
      parts = [];
      element.replaceChildren(isTable ? createTables() : createMaps());
      drawn = key;
    }
    for (const part of parts) part.update();
  }

  const quantities = () => view.model.nodes.map((node) => view.model.keys.get(node.id)).filter((key, k) => key === view.model.nodes[k].name);
  const steps = () => Array.from({ length: view.model.length }, (_, step) => step);

  function createTables() {
    const names = quantities();
    const units = Array.from({ length: view.model.units }, (_, unit) => unit);
    return createElement("div", { class: "seq" }, units.map((unit) => createElement("div", { class: "tab", role: "table", "aria-label": `unit ${unit}`, style: `--steps: ${view.model.length}` },
      createElement("b", { "aria-hidden": "true" }, `unit ${unit}`),
      createElement("div", { class: "tr", role: "row" }, createElement("span", { role: "columnheader" }, createElement("span", { class: "unseen" }, "quantity")),
        steps().map((step) => createElement("span", { class: "hd", role: "columnheader" }, `step ${step}`))),
      names.map((q) => createElement("div", { class: "tr", role: "row" }, createElement("span", { role: "rowheader" }, createMarkup("span", symbol(q))), steps().map((step) => {
        const cell = createCell(view, () => ({ q, t: step, u: unit }));
        parts.push(cell);
        return createElement("span", { role: "cell" }, cell.element);
      }))))));
  }

  function createMaps() {
    const readout = createElement("output", { class: "quiet readout" }, "Hover to read a value; click to jump to it.");
    const maps = ["x", ...quantities()].map((q) => createMap(q, readout));
    parts.push(...maps);
    return createElement("div", {}, readout, maps.map((map) => map.element), createPredictions());
  }

  /** What the model predicts after each step, below the maps; if there are too many steps, only for the chosen one. */
  function createPredictions() {
    const { predictions } = view.data;
    if (!predictions) return null;
    const now = createElement("span", { class: "quiet now" });
    const texts = predictions.length > MAX_PREDICTIONS ? [] : predictions.map((text) => createElement("span", {}, visibleLabel(text)));
    parts.push({ update() { now.textContent = visibleLabel(predictions[view.step]); } });
    return createElement("div", { class: "map" }, createElement("div", { class: "map-name" }, createElement("b", {}, "prediction"), now),
      createElement("div", { class: "predictions", style: `--steps: ${predictions.length}` }, texts));
  }

  /** A heat map: units down, time across. An image has its rows as time steps instead. */
  function createMap(q, readout) {
    const { model, data } = view;
    const grid = model.maps ? binnedGrid(model.maps[q]) : fullGrid(model, q);
    const isImage = q === "x" && data.inputs === "image";
    const [width, height] = isImage ? [grid.features, grid.steps] : [grid.steps, grid.features];
    const canvas = createElement("canvas", { width, height, tabindex: 0, role: "application", "aria-roledescription": "heat map" });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const limit = view.scale({ q });
    const isGate = model.isGate(q);
    for (let x = 0; x < grid.steps; x += 1) {
      for (let y = 0; y < grid.features; y += 1) {
        const value = grid.values[x * grid.features + y];
        const color = isImage ? imageColor(value, limit) : isGate ? gateColor(value, view.theme) : valueColor(value, limit, view.theme);
        image.data.set([...color, 255], 4 * (isImage ? x * width + y : y * width + x));
      }
    }
    context.putImageData(image, 0, 0);
    canvas.style.height = isImage ? "auto" : `${Math.max(20, Math.min(MAP_HEIGHT, height * MAX_ROW_HEIGHT))}px`;
    const cursor = createElement("span", { class: "cursor", "aria-hidden": "true" });
    const row = createElement("span", { class: "row-cursor", "aria-hidden": "true" });
    const frame = createElement("div", { class: "frame" }, canvas, cursor, row);
    if (isImage) frame.style.maxWidth = `${(200 * width) / Math.max(width, height)}px`;
    const name = createMarkup("div", `<b>${symbol(q)} <span></span></b><span class="quiet now"></span>`, "map-name");
    name.querySelector("b span").textContent = (model.descriptions[q] ?? "").split(": ")[0];
    if (!isImage) name.append(createElement("span", { class: "text-scale" }, colorScale(view, q)));
    const lines = statisticsLines(grid.statistics ?? statistics(grid.values), model.quantity(q).node?.range);
    const summary = createElement("div", { class: "map-summary quiet" }, lines.map(([label, text]) => [createElement("span", {}, label), createElement("span", {}, text)]));
    const bins = [[grid.binSteps, "steps"], [grid.binFeatures, "units"]].filter(([size]) => size > 1).map((bin) => bin.join(" ")).join(" × ");
    canvas.setAttribute("aria-label", `${q}: ${model.size(q)} units over ${model.length} steps, ${lines.map((line) => line.join(" ")).join(", ")}${bins && `; each color is the mean of ${bins}`}`);

    let position = [0, 0];
    const positionOf = (event) => {
      const box = canvas.getBoundingClientRect();
      const column = clampIndex(((event.clientX - box.left) / box.width) * width, width);
      const line = clampIndex(((event.clientY - box.top) / box.height) * height, height);
      return isImage ? [line, column] : [column, line];
    };
    const read = ([x, y]) => {
      const step = grid.stepAt(x);
      const label = data.labels ? ` (${visibleLabel(data.labels[step])})` : "";
      readout.textContent = `${q}, step ${step}${label}, unit ${grid.featureAt(y)}: ${grid.print(grid.values[x * grid.features + y])}${bins && ` (mean of ${bins})`}`;
    };
    const choose = ([x, y]) => {
      position = [x, y];
      view.choose({ q, t: model.nearest(grid.stepAt(x)), u: grid.featureAt(y) });
      read(position);
    };
    canvas.addEventListener("pointermove", (event) => read(positionOf(event)));
    canvas.addEventListener("click", (event) => choose(positionOf(event)));
    canvas.addEventListener("keydown", (event) => {
      const moves = isImage ? { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }
        : { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      event.stopPropagation();
      choose([clampIndex(position[0] + move[0], grid.steps), clampIndex(position[1] + move[1], grid.features)]);
    });
    return {
      element: createElement("div", { class: "map" }, name, frame, summary),
      update() {
        const unit = Math.min(view.unit, model.size(q) - 1);
        name.querySelector(".now").textContent = `[${unit}] = ${view.textOf({ q, t: view.step, u: unit })}`;
        const [across, down] = [view.step / grid.binSteps, grid.rowOf(unit)].map(Math.floor);
        const [x, y] = isImage ? [down, across] : [across, down];
        Object.assign(cursor.style, { left: `${(100 * x) / width}%`, width: `${100 / width}%` });
        Object.assign(row.style, { top: `${(100 * y) / height}%`, height: `${100 / height}%` });
      },
    };
  }

  return { element, update };
}

/** The values of a quantity at all steps. */
function fullGrid(model, q) {
  const index = model.valueIndex(q);
  const features = model.sizes[index];
  const values = new Float64Array(model.length * features);
  for (let x = 0; x < model.length; x += 1) {
    for (let y = 0; y < features; y += 1) values[x * features + y] = model.at(model.values, x, index, y);
  }
  return { values, steps: model.length, features, binSteps: 1, binFeatures: 1, stepAt: (x) => x, featureAt: (y) => y, rowOf: (unit) => unit, print: shown };
}

/** The means of a heat map. Those of a recorded run are coded in 8 bits. */
export function mapMeans({ low, high, codes, means }) {
  return means ?? Float64Array.from(decodeBytes(codes), (code) => SPECIAL_CODES.get(code) ?? low + ((high - low) * code) / MAX_CODE);
}

/** The distance between two means that a heat map can tell apart. */
export const mapResolution = ({ low, high, means, resolution }) => resolution ?? (means ? 0 : (high - low) / MAX_CODE);

/** Means over bins of steps and features. */
function binnedGrid(map) {
  const { binSteps, binFeatures, rows: features, featureOrder, statistics: exact } = map;
  const values = mapMeans(map);
  const resolution = mapResolution(map);
  const print = (value) => (resolution > 0 ? `about ${fixed(value, Math.max(0, Math.min(8, Math.floor(-Math.log10(resolution)))))}` : shown(value));
  return { values, steps: values.length / features, features, binSteps, binFeatures, stepAt: (x) => x * binSteps,
    featureAt: (y) => featureOrder[y * binFeatures], rowOf: (unit) => featureOrder.indexOf(unit) / binFeatures, statistics: exact, print };
}

/** The statistics of the finite values. */
function statistics(values) {
  const found = { low: Infinity, high: -Infinity, sum: 0, finite: 0, count: values.length, saturated: { gate: 0, tanh: 0 } };
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    [found.low, found.high, found.sum, found.finite] = [Math.min(found.low, value), Math.max(found.high, value), found.sum + value, found.finite + 1];
    if (value < 0.01 || value > 0.99) found.saturated.gate += 1;
    if (Math.abs(value) > 0.99) found.saturated.tanh += 1;
  }
  return found;
}

/** The smallest, mean and largest value, and the share that is saturated, as [label, text]. */
function statisticsLines({ low, high, sum, finite, count, saturated }, range) {
  const lines = finite ? [["min", fixed(low, 2)], ["mean", fixed(sum / finite, 2)], ["max", fixed(high, 2)]] : [];
  if (range) lines.push(["saturated", `${Math.round((100 * saturated[range]) / Math.max(1, finite))} %`]);
  if (finite < count) lines.push(["not finite", String(count - finite)]);
  return lines;
}

function imageColor(value, limit) {
  const gray = Math.round(255 * Math.max(0, Math.min(1, value / limit))) || 0;
  return [gray, gray, gray];
}

/** Round a position down to an index, and limit it to the range of indices. */
function clampIndex(position, count) {
  return Math.max(0, Math.min(count - 1, Math.floor(position)));
}

