// The heat maps of a layer: every gate and state, units down and time steps across.

import { colorScale } from "./color_scale.js";
import { createElement, createMarkup, replaceChildren, visibleLabel } from "./dom.js";
import { createGrid, statisticsLines } from "./heat_map_grid.js";
import { createMapControls, fewestSteps } from "./map_controls.js";
import { afterName, symbol } from "./names.js";
import { gateColor, valueColor } from "./numbers.js";

const MAX_ROW_HEIGHT = 14; // pixels
const MAP_HEIGHT = 88;
const MAX_PREDICTIONS = 40; // that are shown below the maps
const DRAG_DISTANCE = 4; // pixels; a shorter movement is a click

/** Create the maps of some quantities. Returns {element, update}. */
export function createHeatMaps(view, quantities) {
  const controls = createMapControls(view);
  const readout = createElement("p", { class: "quiet readout" }, "Hover to read a value; click to jump to it.");
  const container = createElement("div");
  const element = createElement("div", {}, createElement("div", { class: "map-head" }, readout, controls.element), container);
  let drawn = "";
  let parts = [];

  function update() {
    controls.update();
    const key = [view.partKey, view.theme, view.edits.runs, view.mapOrder, ...view.mapWindow].join();
    if (key !== drawn) {
      parts = ["x", ...quantities()].map((q) => createMap(view, q, readout));
      const predictions = createPredictions(view);
      if (predictions) parts.push(predictions);
      replaceChildren(container, ...parts.map((part) => part.element));
      drawn = key;
    }
    for (const part of parts) part.update();
  }

  return { element, update };
}

/** What the model predicts after each step, below the maps; if there are too many steps, only for the chosen one. */
function createPredictions(view) {
  if (!view.data.predictions) return null;
  const predictions = view.data.predictions.slice(...view.mapWindow);
  const now = createElement("span", { class: "quiet now" });
  const texts = predictions.length > MAX_PREDICTIONS ? [] : predictions.map((text) => createElement("span", {}, visibleLabel(text)));
  const element = createElement("div", { class: "map" }, createElement("div", { class: "map-name" }, createElement("b", {}, "prediction"), now),
    createElement("div", { class: "predictions", style: `--steps: ${predictions.length}` }, texts));
  return { element, update() { now.textContent = visibleLabel(view.data.predictions[view.step]); } };
}

/** A heat map. An image has its rows as time steps instead. */
function createMap(view, q, readout) {
  const { model, data } = view;
  const grid = createGrid(model, q, view.mapWindow, view.mapOrder);
  const isImage = q === "x" && data.inputs === "image";
  const [width, height] = isImage ? [grid.features, grid.steps] : [grid.steps, grid.features];
  const canvas = createElement("canvas", { width, height, tabindex: 0, role: "application", "aria-roledescription": "heat map" });
  paint(canvas, view, q, grid, isImage);
  canvas.style.height = isImage ? "auto" : `${Math.max(20, Math.min(MAP_HEIGHT, height * MAX_ROW_HEIGHT))}px`;
  const cursor = createElement("span", { class: "cursor", "aria-hidden": "true" });
  const row = createElement("span", { class: "row-cursor", "aria-hidden": "true" });
  const selection = createElement("span", { class: "selection", "aria-hidden": "true", hidden: true });
  const frame = createElement("div", { class: "frame" }, canvas, cursor, row, selection);
  if (isImage) frame.style.maxWidth = `${(200 * width) / Math.max(width, height)}px`;
  const name = createMarkup("div", `<b>${symbol(q)} <span></span></b><span class="quiet now"></span>`, "map-name");
  name.querySelector("b span").textContent = afterName(q, (model.descriptions[q] ?? "").split(": ")[0]);
  if (!isImage) name.append(createElement("span", { class: "text-scale", "aria-hidden": "true" }, colorScale(view, q)));
  const lines = statisticsLines(grid.statistics, model.quantity(q).node?.range);
  const [first, stop] = view.mapWindow;
  const part = grid.isWindow ? createElement("span", { class: "of" }, `in steps ${first}–${stop - 1}`) : null;
  const summary = createElement("div", { class: "map-summary quiet", "aria-hidden": "true" }, part, lines.map(([label, text]) => [createElement("span", {}, label), createElement("span", {}, text)]));
  const bins = [[grid.binSteps, "steps"], [grid.binFeatures, "units"]].filter(([size]) => size > 1).map((bin) => bin.join(" ")).join(" × ");
  canvas.setAttribute("aria-label", describe(view, q, lines, grid, bins));

  const positionOf = (event) => {
    const box = canvas.getBoundingClientRect();
    const column = clampIndex(((event.clientX - box.left) / box.width) * width, width);
    const line = clampIndex(((event.clientY - box.top) / box.height) * height, height);
    return isImage ? [line, column] : [column, line];
  };
  const read = ([x, y]) => {
    const step = grid.stepAt(x);
    const label = data.labels ? ` (${visibleLabel(data.labels[step])})` : "";
    readout.textContent = `${q}, step ${step}${label}, ${q === "x" ? "feature" : "unit"} ${grid.featureAt(y)}: ${grid.print(grid.values[x * grid.features + y])}${bins && ` (mean of ${bins})`}`;
  };
  const choose = ([x, y]) => {
    view.choose({ q, t: model.nearest(grid.stepAt(x)), u: grid.featureAt(y) });
    read([x, y]);
  };
  canvas.addEventListener("pointermove", (event) => read(positionOf(event)));
  const drag = isImage ? { isOver: () => false } : enableZoom(view, canvas, selection, (event) => grid.stepAt(positionOf(event)[0]), grid);
  canvas.addEventListener("click", (event) => { if (!drag.isOver()) choose(positionOf(event)); });
  canvas.addEventListener("keydown", (event) => {
    const moves = isImage ? { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }
      : { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const isOwn = view.number.q === q && !model.isStart(view.number);
    const at = isOwn ? [grid.columnOf(view.step), grid.rowOf(view.number.u)] : [grid.columnOf(view.step), 0];
    choose([clampIndex(at[0] + (isOwn ? move[0] : 0), grid.steps), clampIndex(at[1] + (isOwn ? move[1] : 0), grid.features)]);
  });
  return {
    element: createElement("div", { class: "map" }, name, frame, summary),
    update() {
      const unit = Math.min(view.unit, model.size(q) - 1);
      name.querySelector(".now").textContent = `[${unit}] = ${view.textOf({ q, t: view.step, u: unit })}`;
      const [across, down] = [grid.columnOf(view.step), grid.rowOf(unit)];
      const [x, y] = isImage ? [down, across] : [across, down];
      const isInside = across >= 0 && across < grid.steps;
      cursor.hidden = !isInside;
      row.hidden = isImage && !isInside;
      Object.assign(cursor.style, { left: `${(100 * x) / width}%`, width: `${100 / width}%` });
      Object.assign(row.style, { top: `${(100 * y) / height}%`, height: `${100 / height}%` });
    },
  };
}

function paint(canvas, view, q, grid, isImage) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const limit = view.scale({ q });
  const isGate = view.model.isGate(q);
  for (let x = 0; x < grid.steps; x += 1) {
    for (let y = 0; y < grid.features; y += 1) {
      const value = grid.values[x * grid.features + y];
      const color = isImage ? imageColor(value, limit) : isGate ? gateColor(value, view.theme) : valueColor(value, limit, view.theme);
      image.data.set([...color, 255], 4 * (isImage ? x * canvas.width + y : y * canvas.width + x));
    }
  }
  context.putImageData(image, 0, 0);
}

/** What a heat map shows, in words. */
function describe(view, q, lines, grid, bins) {
  const { model } = view;
  const [first, stop] = view.mapWindow;
  const what = (model.descriptions[q] ?? "").split(": ")[0];
  const steps = stop - first < model.length ? `steps ${first} to ${stop - 1} of ${model.length}` : `${model.length} steps`;
  const numbers = lines.map((line) => line.join(" ")).join(", ");
  const where = grid.isWindow || stop - first === model.length ? "" : " in all steps";
  return `${q}${what && what !== q ? `, ${what}` : ""}: ${model.size(q)} ${q === "x" ? "features" : "units"} over ${steps}, ${numbers}${where}${bins && `; each color is the mean of ${bins}`}. Use the arrow keys to read values.`;
}

/** Let the reader drag across a map to zoom into these steps. Returns {isOver}: whether a click ends a drag. */
function enableZoom(view, canvas, selection, stepOf, grid) {
  let start = null; // {x, step} where the pointer went down
  let isDragging = false;
  const ends = (event) => [start.step, stepOf(event)].sort((a, b) => a - b);
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    start = { x: event.clientX, step: stepOf(event) };
    isDragging = false;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!start || (!isDragging && Math.abs(event.clientX - start.x) < DRAG_DISTANCE)) return;
    if (!isDragging) canvas.setPointerCapture(event.pointerId);
    isDragging = true;
    const [from, to] = ends(event).map(grid.columnOf);
    selection.hidden = false;
    Object.assign(selection.style, { left: `${(100 * from) / grid.steps}%`, width: `${(100 * (to - from + 1)) / grid.steps}%` });
  });
  canvas.addEventListener("pointerup", (event) => {
    if (start && isDragging) {
      const [from, to] = ends(event);
      selection.hidden = true;
      if (to - from + 1 >= fewestSteps(view.model)) view.setMapView({ zoom: [from, Math.min(view.model.length, to + grid.binSteps) - 1] });
    }
    start = null;
  });
  canvas.addEventListener("pointercancel", () => {
    start = null;
    selection.hidden = true;
  });
  return { isOver: () => isDragging };
}

function imageColor(value, limit) {
  const gray = Math.round(255 * Math.max(0, Math.min(1, value / limit))) || 0;
  return [gray, gray, gray];
}

/** Round a position down to an index, and limit it to the range of indices. */
function clampIndex(position, count) {
  return Math.max(0, Math.min(count - 1, Math.floor(position)));
}
