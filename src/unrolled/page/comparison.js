// Two traces on one page: this one and a baseline, such as from before training, and the differences of their numbers.

import { createElement, createMarkup } from "./dom.js";
import { fixed, shown } from "./digits.js";
import { LayerModel } from "./model.js";
import { withDifferences } from "./rows.js";
import { mapMeans, mapResolution } from "./heat_map_grid.js";
import { nameOf } from "./words.js";

const MODES = [["this", "this"], ["baseline", "baseline"], ["difference", "difference"]];
const MAX_SOURCES = 12; // rows of the table of a difference
const FEWEST_DECIMALS = 4;
const MOST_DECIMALS = 10;
const CACHED_STEPS = 200;

/** Return the data of the baseline for a row of the page; null if there is no baseline. Its numbers can't be changed. */
export function baselineData(data, index) {
  if (!data.baseline) return null;
  const first = withDifferences(data, data.baseline);
  const row = index ? withDifferences(first, data.rows[index - 1].baseline) : first;
  return { ...row, layers: row.layers.map(withoutEdits) };
}

/** Return the data of a layer with a program that isn't run. */
export function withoutEdits(layer) {
  return { ...layer, program: { ...layer.program, reason: layer.program.reason ?? "Only the numbers of this trace can be changed." } };
}

/** Equal infinities and NaNs differ by 0. */
const subtract = (a, b) => (Object.is(a, b) || a === b ? 0 : a - b);
const subtractAll = (a, b) => Float64Array.from(a, (value, k) => subtract(value, b[k]));

const largestDifference = (values, most = 0) => values.reduce((more, value) => (Number.isFinite(value) ? Math.max(more, Math.abs(value)) : more), most);

/** The differences of the numbers of steps. */
class DifferenceSteps {
  constructor(ours, baseline) {
    Object.assign(this, { ours, baseline, cache: new Map() });
  }

  row(step) {
    if (!this.cache.has(step)) {
      if (this.cache.size >= CACHED_STEPS) this.cache.clear();
      this.cache.set(step, subtractAll(this.ours.row(step), this.baseline.row(step)));
    }
    return this.cache.get(step);
  }
}

/** The differences of a layer's numbers between two traces. None of them is a gate, so zero is always in the middle. */
export class DifferenceModel extends LayerModel {
  constructor(data, ours, baseline) {
    const unranged = (nodes) => nodes.map((node) => ({ ...node, range: "" }));
    const withoutRanges = (drawing) => drawing && { ...drawing, nodes: unranged(drawing.nodes), ...(drawing.open && { open: withoutRanges(drawing.open) }) };
    super({ ...data, gradient: null, weightGradient: null, maps: null, diagram: { ...data.diagram, nodes: unranged(data.diagram.nodes) }, drawing: withoutRanges(data.drawing) }, []);
    Object.assign(this, { ours, baseline, from: null });
    this.recordedMaps = subtractMaps(ours.recordedMaps, baseline.recordedMaps);
    this.update();
    this.recorded = this.values;
    this.recordedParameters = this.parameters;
  }

  /** Follow changes of this trace's numbers. */
  update() {
    if (this.from === this.ours.values && this.fromParameters === this.ours.parameters) return;
    this.values = new DifferenceSteps(this.ours.values, this.baseline.values);
    this.maps = subtractMaps(this.ours.maps, this.baseline.maps);
    this.parameters = new Map([...this.ours.parameters].map(([name, one]) => [name, { ...one, values: one.values && subtractAll(one.values, this.baseline.parameters.get(name).values) }]));
    this.from = this.ours.values;
    this.fromParameters = this.ours.parameters;
  }

  /** Return the scale of the differences: one for gates, states and inputs, and one for all parameters. */
  scales() {
    const parameters = [...this.recordedParameters.values()].reduce((most, { values }) => (values ? largestDifference(values, most) : most), 0);
    const numbers = this.largestShown();
    return (number) => (this.isParameter(number) ? parameters : numbers) || 1;
  }

  /** The largest difference of gates, states and inputs; of their means if the steps are computed when they are shown. */
  largestShown() {
    if (this.isComputed) return Object.values(this.recordedMaps).reduce((most, { means }) => largestDifference(means, most), 0);
    const shownValues = new Set([this.inputValue, ...this.states.map((state) => state.value), ...this.nodes.map((node) => node.value)]);
    return this.steps.reduce((most, step) => [...shownValues].reduce((more, k) => largestDifference(this.read(this.recorded.row(step), k), more), most), 0);
  }
}

function subtractMaps(ours, baseline) {
  if (!ours) return null;
  return Object.fromEntries(Object.entries(ours).filter(([name]) => baseline[name]).map(([name, map]) => [name, subtractMap(map, baseline[name])]));
}

function subtractMap(map, other) {
  const means = subtractAll(mapMeans(map), mapMeans(other));
  return { ...map, means, statistics: null, resolution: mapResolution(map) + mapResolution(other), byIndex: map.byIndex && subtractMap(map.byIndex, other.byIndex) };
}

/** Format a difference with its sign. */
export const signed = (value, format = shown) => `${value > 0 ? "+" : ""}${format(value)}`;

/** Format two numbers and their difference with as many decimals as a subtraction by hand needs. */
export function subtraction(ours, baseline) {
  const difference = subtract(ours, baseline);
  if (![ours, baseline].every((value) => Math.abs(value) < 1e5)) return { ours: shown(ours), baseline: shown(baseline), difference: signed(difference) };
  const units = (value, decimals) => Math.round(Number(value.toFixed(decimals)) * 10 ** decimals);
  const isTiny = (decimals) => difference !== 0 && units(difference, decimals) === 0;
  const isRight = (decimals) => units(ours, decimals) - units(baseline, decimals) === units(difference, decimals) && !isTiny(decimals);
  let decimals = FEWEST_DECIMALS;
  while (decimals < MOST_DECIMALS && !isRight(decimals)) decimals += 1;
  const format = (value) => fixed(value, decimals);
  return { ours: format(ours), baseline: format(baseline), difference: isTiny(decimals) ? signed(difference) : signed(difference, format) };
}

/** A number of both traces: "0.5407, baseline 0.1290, difference +0.4117". */
export function comparisonText(view, number) {
  const { ours, baseline, difference } = comparedTexts(view, number);
  return `${ours}, baseline ${baseline}, difference ${difference}`;
}

function comparedTexts(view, number) {
  const { ours, baseline } = view.compared(number);
  return subtraction(ours, baseline);
}

/** Create the line with a number of both traces, for the arithmetic's column. The one that is shown stands out. */
export function createComparedValue(view, number) {
  const texts = comparedTexts(view, number);
  const parts = [["this", `${texts.ours}, `], ["baseline", `baseline ${texts.baseline}, `], ["difference", `difference ${texts.difference}`]];
  return createMarkup("div", `<span class="symbol">${view.symbols.of(number)}</span> = ${parts.map(([mode, text]) => `<span class="${mode === view.mode ? "" : "other"}">${text}</span>`).join("")}`, "value compared");
}

/** The content of the arithmetic's column for a difference: both numbers, and those that they are computed from. */
export function createDifference(view) {
  const { number, symbols, model } = view;
  const sources = [...new Map(model.sources(number).map((one) => [JSON.stringify(one), one])).values()];
  const size = (one) => Math.abs(model.value(one)) || 0;
  const kept = new Set([...sources].sort((a, b) => size(b) - size(a)).slice(0, MAX_SOURCES));
  const omitted = sources.length - kept.size;
  const rows = sources.filter((one) => kept.has(one)).map((one) => {
    const printed = comparedTexts(view, one);
    const button = createMarkup("button", symbols.of(one));
    button.type = "button";
    button.addEventListener("click", () => view.choose(one));
    return createElement("tr", { class: model.value(one) === 0 ? "quiet" : null }, createElement("th", { scope: "row" }, button),
      [printed.ours, printed.baseline, printed.difference].map((text) => createElement("td", {}, text)));
  });
  const heads = ["", "this", "baseline", "difference"].map((text) => createElement("th", { scope: "col" }, text));
  const isGiven = model.isGiven(number);
  return [createComparedValue(view, number), ...(rows.length ? [
    createElement("p", { class: "say" }, "It is computed from these numbers. Choose “this” or “baseline” at the top to see the arithmetic."),
    createElement("table", { class: "compare" }, createElement("thead", {}, createElement("tr", {}, heads)), createElement("tbody", {}, rows)),
    omitted ? createElement("p", { class: "note" }, `${omitted} more differ by less.`) : ""]
    : [createElement("p", { class: "say" }, isGiven ? "It is given, not computed." : "How it is computed isn't known.")])];
}

/** The legend of the drawing for differences. */
export const differenceLegend = (view) => `Differences from the baseline; full width: ${shown(view.scale({ q: view.model.states[0].name }))}. Gray: the whole vector.`;

/** Create the line with the switch between the traces, and where they differ most. Returns {element, update, next}. */
export function createComparison(view) {
  const { baseline } = view.pageData;
  if (!baseline) return { element: null, update() {}, next() {} };
  const buttons = MODES.map(([mode, text]) => createElement("button", { type: "button", onclick: () => view.setMode(mode) }, text));
  const { summary } = baseline;
  const show = view.numberOf(summary.largest ?? {}) ? createElement("button", { type: "button", class: "btn", onclick: () => view.openFinding(summary.largest) }, "Show it") : null;
  const text = createElement("p");
  const element = createElement("div", { class: "guide comparison" }, createElement("span", { class: "seg", role: "group", "aria-label": "numbers to show" }, buttons), text,
    createElement("span", { class: "acts" }, show));

  function update() {
    MODES.forEach(([mode], k) => buttons[k].setAttribute("aria-pressed", view.mode === mode));
    text.innerHTML = summaryText(view, summary);
  }

  return { element, update, next: () => view.setMode(MODES[(MODES.findIndex(([mode]) => mode === view.mode) + 1) % MODES.length][0]) };
}

/** The markup of the sentences about two traces. */
function summaryText(view, { status, count, largest, inputs, initialStates, parameters }) {
  const names = [[inputs, "inputs"], [initialStates, "initial states"], [parameters, "weights"]].filter(([differs]) => differs).map(([, name]) => name);
  const also = names.length ? ` The ${names.join(" and ").replace(/ and (?=.* and )/, ", ")} differ.` : status === "identical" ? " So are inputs and weights." : "";
  if (status === "identical") return `<b>Bit-identical:</b> all ${count.toLocaleString("en")} gates, states and other numbers of the two traces are the same.${also}`;
  const place = largest && placeText(view, largest);
  if (status === "rounding") return `<b>The same up to rounding</b>${place ? `: the largest difference is in ${place}` : ""}.${also}`;
  return `<b>Largest difference:</b> ${place ?? "in numbers that the page doesn't show"}.${also}`;
}

function placeText(view, { layer, row, number }) {
  const { models, baseline, symbols } = row === null ? view.row : view.rowOf(row);
  const model = models[layer];
  if (!view.numberOf({ layer, row, number })) return null;
  const where = [row === null || view.rowNumbers.length < 2 ? "" : ` in row ${row}`, view.models.length < 2 ? "" : ` of layer ${model.index}, ${model.direction}`].join("");
  const name = `${nameOf(model, number.q)} ${symbols[layer].of(number)}${where}`;
  if (!model.exists(number)) return `${name}, at a step that is not on this page`;
  const texts = subtraction(model.value(number, model.recorded), baseline.models[layer].value(number));
  return `${name}: ${texts.ours}, baseline ${texts.baseline}, difference ${texts.difference}`;
}
