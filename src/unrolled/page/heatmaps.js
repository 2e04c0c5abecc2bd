// Heat maps of the whole sequence: one for each quantity, units down and time across. A click selects a value.

import { nameOf } from "./layer.js";
import { createElement, visibleLabel } from "./dom.js";
import { formatNumber, valueColor } from "./numbers.js";

const MAX_LABELED_STEPS = 120; // a longer sequence has no labels below its input

/** Create the heat maps, the color scale, and the switch that groups similar units. Returns {element, update}. */
export function createHeatMaps(view) {
  const container = createElement("div", { class: "heat-maps" });
  const groupUnits = createElement("input", { type: "checkbox", onchange: () => { renderedState = null; update(); } });
  const readout = createElement("output", { class: "readout" }, "Hover to read a value; click to jump to it.");
  const colorScale = createElement("div", { class: "color-scale" });
  const option = createElement("label", {});
  const element = createElement("div", {},
    createElement("div", { class: "toolbar" }, option, colorScale), readout, container);
  let renderedState = null;
  let heatMaps = [];

  function update() {
    const { layer, theme } = view;
    const state = `${view.layers.indexOf(layer)} ${theme} ${groupUnits.checked}`;
    if (state !== renderedState) {
      if (layer.complete) option.replaceChildren(groupUnits, " group similar units");
      else option.replaceChildren("Similar units are grouped.");
      const rows = layer.quantities.map((quantity) => layer.rows.get(quantity.key));
      const [narrow, wide] = [rows.filter((row) => !row.hasBlocks), rows.filter((row) => row.hasBlocks)];
      heatMaps = [...narrow, ...wide].map((row) => createHeatMap(view, row, groupUnits.checked, readout));
      const figures = heatMaps.map((heatMap) => heatMap.element);
      container.replaceChildren(...figures.slice(0, narrow.length));
      if (wide.length) {
        const names = wide.map((row) => nameOf(row.key)).join(", ");
        const summary = `larger quantities, such as the pre-activations of all gates together: ${names}`;
        container.append(createElement("details", {}, createElement("summary", {}, summary), figures.slice(narrow.length)));
      }
      colorScale.replaceChildren(...createColorScale(view));
      renderedState = state;
    }
    for (const heatMap of heatMaps) heatMap.markStep();
  }

  return { element, update };
}

function createColorScale(view) {
  const range = view.layer.sharedRange || 1;
  const stops = Array.from({ length: 33 }, (_, k) => `rgb(${valueColor((k / 16 - 1) * range, range, view.theme)})`);
  const bar = createElement("span", { class: "color-bar wide", "aria-hidden": "true" });
  bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const createSwatch = (value, name) => {
    const swatch = createElement("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = `rgb(${valueColor(value, 1, view.theme)})`;
    return createElement("span", {}, swatch, ` ${name}`);
  };
  const ownScales = [...view.layer.rows.values()].filter((row) => row.ownRange !== null && !row.key.startsWith("before"));
  const note = `own color scale: ${ownScales.map((row) => nameOf(row.key)).join(", ")}`;
  return [createElement("span", {}, formatNumber(-range)), bar, createElement("span", {}, formatNumber(range)),
    createSwatch(NaN, "NaN"), createSwatch(Infinity, "infinite"), createElement("span", { class: "own-scales" }, note)];
}

/** Create the heat map of one quantity: features down, time across. An image has its rows as time steps instead. */
function createHeatMap(view, row, isGrouped, readout) {
  const { layer, data } = view;
  const grid = row.heatMap ? binnedGrid(row) : fullGrid(layer, row, isGrouped);
  const isImage = row.key === "input" && data.inputs === "image";
  const range = layer.colorRange(row.key);
  const hasNegatives = isImage && grid.values.some((value) => value < 0); // then zero is medium gray
  const [width, height] = isImage ? [grid.features, grid.steps] : [grid.steps, grid.features];
  const canvas = createElement("canvas", { width, height, tabindex: 0, role: "application", "aria-roledescription": "heat map" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  let [low, high] = [Infinity, -Infinity];
  for (let x = 0; x < grid.steps; x += 1) {
    for (let y = 0; y < grid.features; y += 1) {
      const value = grid.values[x * grid.features + y];
      if (Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
      const gray = Math.round(255 * (hasNegatives ? (value / range + 1) / 2 : value / range));
      const color = isImage && Number.isFinite(value) ? [gray, gray, gray] : valueColor(value, range, view.theme);
      image.data.set([...color, 255], 4 * (isImage ? x * width + y : y * width + x));
    }
  }
  context.putImageData(image, 0, 0);
  const frame = createElement("div", { class: "canvas-frame" }, canvas);
  if (isImage) canvas.style.aspectRatio = `${width} / ${height}`;
  else canvas.style.height = `${Math.max(28, Math.min(170, grid.features * 14))}px`;
  frame.style.maxWidth = isImage ? `${(260 * width) / Math.max(width, height)}px` : `${grid.steps * 72}px`;
  const bins = [[grid.binSteps, "steps"], [grid.binFeatures, "units"]].filter(([size]) => size > 1).map((bin) => bin.join(" "));
  const binNote = bins.length ? `each color is the mean of ${bins.join(" × ")}` : "";
  canvas.setAttribute("aria-label", `${nameOf(row.key)}, ${row.description || "a quantity of the step"}: ${row.size} units over `
    + `${data.length} steps, ${low <= high ? `from ${formatNumber(low)} to ${formatNumber(high)}` : "no finite values"}`
    + `${binNote && `; ${binNote}`}`);
  const cursor = createElement("span", { class: "cursor", "aria-hidden": "true" });
  frame.append(cursor);

  let position = [0, 0];
  const positionOf = (event) => {
    const box = canvas.getBoundingClientRect();
    const column = clampIndex(((event.clientX - box.left) / box.width) * width, width);
    const line = clampIndex(((event.clientY - box.top) / box.height) * height, height);
    return isImage ? [line, column] : [column, line];
  };
  const showValue = ([x, y]) => {
    const label = data.labels ? ` (${visibleLabel(data.labels[grid.stepAt(x)])})` : "";
    readout.textContent = `${nameOf(row.key)}, step ${grid.stepAt(x)}${label}, unit ${grid.featureAt(y)}: `
      + `${formatNumber(grid.values[x * grid.features + y])}${binNote && " (a mean)"}`;
  };
  const select = ([x, y]) => {
    view.goToStep(grid.stepAt(x));
    view.select({ key: row.key, index: grid.featureAt(y) });
    position = [x, y];
    showValue(position);
  };
  canvas.addEventListener("pointermove", (event) => showValue(positionOf(event)));
  canvas.addEventListener("click", (event) => select(positionOf(event)));
  canvas.addEventListener("keydown", (event) => {
    const moves = isImage ? { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }
      : { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (!move && event.key !== "Enter") return;
    event.preventDefault();
    event.stopPropagation();
    if (move) {
      position = [clampIndex(position[0] + move[0], grid.steps), clampIndex(position[1] + move[1], grid.features)];
    }
    select(position);
  });

  const scaleNote = row.ownRange === null ? "" : `own color scale, up to ${formatNumber(range)}`;
  const caption = createElement("figcaption", {}, createElement("b", {}, nameOf(row.key)), row.description ? ` ${row.description}` : "",
    createElement("small", {}, [binNote, scaleNote].filter(Boolean).join("; ")));
  const axisLabels = row.key === "input" && !isImage && data.labels && data.length <= MAX_LABELED_STEPS
    ? createElement("div", { class: "axis-labels", "aria-hidden": "true" }, data.labels.map((text) => createElement("span", {}, visibleLabel(text))))
    : null;
  if (axisLabels) axisLabels.style.maxWidth = frame.style.maxWidth;
  return {
    element: createElement("figure", { class: "heat-map" }, caption, frame, axisLabels),
    markStep() {
      const x = Math.floor(layer.steps[view.stepIndex] / grid.binSteps);
      const [start, size] = [`${(x / grid.steps) * 100}%`, `${100 / grid.steps}%`];
      Object.assign(cursor.style, isImage ? { top: start, height: size, left: "-3px", right: "-3px" } : { left: start, width: size });
      position = [x, position[1]];
    },
  };
}

/** Round a position down to an index, and limit it to the range of indices. */
export function clampIndex(position, count) {
  return Math.max(0, Math.min(count - 1, Math.floor(position)));
}

/** Return the values of a quantity at all steps, with similar units next to each other if isGrouped. */
function fullGrid(layer, row, isGrouped) {
  const units = layer.unitOrder.length;
  const order = Array.from({ length: row.size }, (_, index) =>
    (isGrouped && row.key !== "input" && row.size % units === 0
      ? index - (index % units) + layer.unitOrder[index % units] : index));
  const steps = layer.steps.length;
  const values = new Float64Array(steps * row.size);
  for (let x = 0; x < steps; x += 1) order.forEach((index, y) => { values[x * row.size + y] = layer.value(row.key, x, index); });
  return { values, steps, features: row.size, binSteps: 1, binFeatures: 1, stepAt: (x) => layer.steps[x], featureAt: (y) => order[y] };
}

/** Return the means over bins of steps and features. */
function binnedGrid(row) {
  const { binSteps, binFeatures, rows: features, values, featureOrder } = row.heatMap;
  return { values, steps: values.length / features, features, binSteps, binFeatures,
    stepAt: (x) => x * binSteps, featureAt: (y) => featureOrder[y * binFeatures] };
}
