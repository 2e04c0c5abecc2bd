// The gradient through time: the norm of ∂loss/∂quantity at every step, on a logarithmic axis.

import { createElement, createSvg } from "./dom.js";
import { NAN_COLOR, decodeValues, formatNumber } from "./numbers.js";
import { createWeightGradientTable } from "./weight_gradient.js";

const [CHART_WIDTH, CHART_HEIGHT, MARGIN_LEFT, MARGIN_BOTTOM, MARGIN] = [720, 260, 56, 28, 10];
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "10 4"]; // with the colors, 55 combinations
const LINE_COLORS = {
  light: ["#d55e00", "#0072b2", "#009e73", "#a0508a", "#8a6d00", "#444", "#5b3fb5", "#b3123f", "#00798c", "#7a4a1e", "#5c8a00"],
  dark: ["#ff9a4d", "#6cc0ff", "#4fd6ac", "#f0a6d3", "#e8cf55", "#ccc", "#b9a3ff", "#ff8f9f", "#5fd3e0", "#d6a77a", "#b6e05a"],
};
const MARKER_ROW_HEIGHT = 9; // of the markers below the axis, for values without a logarithm
const MAX_TABLE_ROWS = 50;
const MAX_TICKS = 9;

/** Create the sentences, the chart and the table of the gradients. Returns {element, update}. */
export function createGradient(view) {
  const element = createElement("div", { class: "gradients" });
  let renderedState = null;

  function update() {
    const state = `${view.partKey} ${view.theme}`;
    if (state !== renderedState) {
      element.replaceChildren(...createGradientContent(view));
      renderedState = state;
    }
    const cursor = element.querySelector(".current-step");
    if (cursor) {
      const x = xOfStep(view, view.step);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
    }
  }

  return { element, update };
}

const xOfStep = (view, step) => MARGIN_LEFT + ((step + 0.5) / view.model.length) * (CHART_WIDTH - MARGIN_LEFT - MARGIN);

function createGradientContent(view) {
  const { model } = view;
  if (view.mode === "difference") return [createElement("p", {}, "Choose “this” or “baseline” at the top to see its gradient.")];
  if (!model.gradient) {
    return [createElement("p", {}, "This trace has no gradients. Call ", createElement("code", {}, "trace.backward(target)"),
      " or ", createElement("code", {}, "trace.backward(lambda y: y.sum())"), " before ", createElement("code", {}, "trace.to_html(…)"), " to add them.")];
  }
  const { norms, radii, summaries } = model.gradient;
  const series = Object.entries(norms)
    .map(([name, values]) => ({ name, values: decodeValues(values), isState: model.statesByName.has(name) }));
  series.sort((a, b) => b.isState - a.isState);
  const allValues = series.flatMap(({ values }) => [...values]);
  const markers = [allValues.includes(0) && "a ring marks a gradient of exactly 0",
    allValues.some((value) => !Number.isFinite(value)) && "a square marks NaN or infinity"].filter(Boolean);
  return [
    ...summaries.map((text) => createElement("p", {}, text)),
    radii.length ? createElement("p", {}, "Spectral radius (above 1 amplifies, below 1 damps): ",
      radii.map(({ name, radius }) => `${name}: ${radius}`).join(", "), ".") : "",
    createChart(view, series),
    createElement("ul", { class: "chart-legend" }, series.map((line, k) =>
      createElement("li", {}, createLineSample(view, k, line), ` ∂loss/∂${line.name}`))),
    createElement("p", {}, createElement("small", {}, `Norm of each gradient at every time step, on a logarithmic scale.${markers.length ? ` Below the axis, ${markers.join(", and ")}.` : ""}`)),
    createGradientTable(view, series),
    createWeightGradientTable(view) ?? "",
  ];
}

const lineColor = (view, k) => LINE_COLORS[view.theme][k % LINE_COLORS[view.theme].length];

function lineStyle(view, k, line) {
  return { fill: "none", stroke: lineColor(view, k), "stroke-dasharray": DASHES[k % DASHES.length], "stroke-width": line.isState ? 2.6 : 1.4 };
}

function createLineSample(view, k, line) {
  return createSvg("svg", { width: 34, height: 10, "aria-hidden": "true" }, createSvg("path", { d: "M1 5h32", ...lineStyle(view, k, line) }));
}

function createChart(view, series) {
  const positive = series.flatMap(({ values }) => [...values]).filter((value) => value > 0 && Number.isFinite(value));
  const low = Math.floor(Math.log10(positive.reduce((a, b) => Math.min(a, b), Infinity)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(positive.reduce((a, b) => Math.max(a, b), 0))));
  if (!positive.length) return createElement("p", {}, "Every gradient is zero or not finite.");
  const axisBottom = CHART_HEIGHT - MARGIN_BOTTOM;
  const yOf = (value) => MARGIN + ((high - Math.log10(value)) / (high - low)) * (axisBottom - MARGIN);
  const powersPerTick = Math.max(1, Math.ceil((high - low) / 8));
  const powers = [];
  for (let power = low; power <= high; power += powersPerTick) powers.push(power);
  const paths = series.map((line, k) => {
    let command = "M";
    const path = [...line.values].map((value, step) => {
      if (isOffScale(value)) {
        command = "M";
        return "";
      }
      const text = `${command}${xOfStep(view, step).toFixed(1)} ${yOf(value).toFixed(1)}`;
      command = "L";
      return text;
    });
    return createSvg("path", { d: path.join(""), ...lineStyle(view, k, line), "stroke-linecap": "round" });
  });
  const stepsPerTick = tickDistance(view.model.length);
  const stepTicks = Array.from({ length: Math.ceil(view.model.length / stepsPerTick) }, (_, k) => k * stepsPerTick);
  const markedSeries = series.map((line, k) => ({ ...line, k })).filter((line) => line.values.some(isOffScale));
  const bandHeight = markedSeries.length ? markedSeries.length * MARKER_ROW_HEIGHT + 6 : 0;
  const bottom = axisBottom + bandHeight;
  const markers = markedSeries.flatMap((line, row) => [...line.values].flatMap((value, step) =>
    (isOffScale(value) ? [createMarker(view, line, xOfStep(view, step), axisBottom + 3 + (row + 0.5) * MARKER_ROW_HEIGHT, value)] : [])));
  return createSvg("svg", { viewBox: `0 0 ${CHART_WIDTH} ${CHART_HEIGHT + bandHeight}`, class: "chart", role: "img",
    "aria-label": "norm of the gradient at every time step, on a logarithmic axis" },
    powers.map((power) => [
      createSvg("line", { x1: MARGIN_LEFT, x2: CHART_WIDTH - MARGIN, y1: yOf(10 ** power), y2: yOf(10 ** power), class: "grid" }),
      createSvg("text", { x: MARGIN_LEFT - 6, y: yOf(10 ** power) + 4, "text-anchor": "end" }, formatPower(power))]),
    stepTicks.map((step) => createSvg("text", { x: xOfStep(view, step), y: bottom + 20, "text-anchor": "middle" }, step ? String(step) : "step 0")),
    bandHeight ? createSvg("rect", { class: "off-scale", x: MARGIN_LEFT, y: axisBottom, width: CHART_WIDTH - MARGIN_LEFT - MARGIN, height: bandHeight }) : null,
    createSvg("line", { class: "current-step", y1: MARGIN, y2: bottom }), paths, markers);
}

const formatPower = (power) => (power >= -3 && power <= 3 ? String(Number((10 ** power).toPrecision(1))) : `1e${power}`);

const isOffScale = (value) => !(value > 0 && value < Infinity);

/** Create a ring for a gradient of exactly 0, or a square for NaN or infinity. */
function createMarker(view, line, x, y, value) {
  const stroke = lineColor(view, line.k);
  const title = createSvg("title", {}, `∂loss/∂${line.name}: ${formatNumber(value)}`);
  return value === 0
    ? createSvg("circle", { class: "zero", cx: x, cy: y, r: 3, fill: "none", stroke, "stroke-width": 1.5 }, title)
    : createSvg("rect", { class: "not-finite", x: x - 3, y: y - 3, width: 6, height: 6, fill: `rgb(${NAN_COLOR})`, stroke }, title);
}

/** Return the steps between two ticks: 1, 2 or 5 times a power of ten, so that there are at most nine ticks. */
function tickDistance(steps) {
  for (let power = 1; ; power *= 10) {
    for (const factor of [1, 2, 5]) if (steps / (factor * power) <= MAX_TICKS) return factor * power;
  }
}

/** Create a table of the norms. A long sequence has some of its steps. */
function createGradientTable(view, series) {
  const stepsPerRow = Math.ceil(view.model.length / MAX_TABLE_ROWS);
  const steps = Array.from({ length: Math.ceil(view.model.length / stepsPerRow) }, (_, k) => k * stepsPerRow);
  const header = createElement("tr", {}, createElement("th", { scope: "col" }, "step"),
    series.map(({ name }) => createElement("th", { scope: "col" }, name)));
  const rows = steps.map((step) => createElement("tr", {}, createElement("th", { scope: "row" }, step),
    series.map(({ values }) => createElement("td", {}, formatNumber(values[step])))));
  return createElement("details", {}, createElement("summary", {}, "gradient norms as a table"),
    createElement("div", { class: "scroll" }, createElement("table", {},
      createElement("thead", {}, header), createElement("tbody", {}, rows))));
}
