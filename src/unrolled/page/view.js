// The state of the page, its address, and what follows from them.

import { baselineData, DifferenceModel, signed, withoutEdits } from "./comparison.js";
import { given, shown } from "./digits.js";
import { Edits } from "./edits.js";
import { orderOf, windowOf } from "./map_controls.js";
import { createModels, idOf } from "./model.js";
import { blockOf } from "./names.js";
import { firstNotFinite } from "./not_finite.js";
import { rowData, rowNumbers } from "./rows.js";
import { findScales } from "./scales.js";
import { Symbols } from "./symbols.js";

/** The state of the page: the layer, the chosen number, and the step and unit of the drawing. */
export class View {
  constructor(root, data, model) {
    this.inModel = model; // the model that the layer is in, or null
    this.root = root;
    this.pageData = data;
    this.rowNumbers = rowNumbers(data);
    this.rows = [];
    this.rowIndex = 0;
    this.mode = "this"; // or "baseline" or "difference": which numbers are shown
    this.layerIndex = 0;
    this.allEdits = { edits: new Map(), firstRow: data.row, editsOf: (row) => this.rowOf(row)?.edits };
    this.allDigits = false;
    this.isPlaying = false;
    this.past = []; // the changes before each one, as text
    this.lastChanged = "";
    this.chosenId = "";
    this.sourceIds = new Set(); // of the numbers that the chosen one is computed from
    this.hovered = null;
    this.mapView = { order: null, zoom: null }; // of the heat maps: the order of the units, and the first and last step
    this.range = null; // of the steps that are selected in the text, as [first, last]
    this.number = this.firstNumber();
    this.step = this.number.t;
    this.unit = this.number.u;
  }

  /** The data, models, symbols, scales and edits of a row, created when it is first shown. */
  rowAt(index) {
    if (!this.rows[index]) {
      const data = rowData(this.pageData, index);
      const row = this.createRow(data, createModels(data.layers), findScales);
      this.rows[index] = row;
      const baseline = baselineData(this.pageData, index);
      if (baseline) this.addBaseline(row, baseline);
    }
    return this.rows[index];
  }

  createRow(data, models, scalesOf) {
    return { data, models, symbols: models.map((model) => new Symbols(model)), scales: models.map(scalesOf), edits: new Edits(data, models, this.allEdits) };
  }

  /** Add the same for the numbers of the baseline, on common scales, and for the differences. */
  addBaseline(row, data) {
    row.baseline = this.createRow(data, createModels(data.layers), findScales);
    const pairs = row.scales.map((scale, k) => [scale, row.baseline.scales[k]]);
    row.scales = pairs.map(([ours, theirs]) => (number) => Math.max(ours(number), theirs(number)));
    row.baseline.scales = row.scales;
    const layers = row.data.layers.map(withoutEdits);
    const models = layers.map((layer, k) => new DifferenceModel(layer, row.models[k], row.baseline.models[k]));
    row.difference = this.createRow({ ...row.data, layers }, models, (model) => model.scales());
  }

  /** The same of a row with this number in the batch; undefined if it isn't on the page. */
  rowOf(row) {
    const index = this.rowNumbers.indexOf(row);
    return index < 0 ? undefined : this.rowAt(index);
  }

  get row() {
    return this.rowAt(this.rowIndex);
  }

  /** The row with the numbers of this trace, of the baseline, or the differences. */
  get shownRow() {
    return this.mode === "this" ? this.row : this.row[this.mode];
  }

  get data() {
    return this.row.data;
  }

  get models() {
    return this.shownRow.models;
  }

  get edits() {
    return this.shownRow.edits;
  }

  get model() {
    return this.models[this.layerIndex];
  }

  get symbols() {
    return this.shownRow.symbols[this.layerIndex];
  }

  /** What decides which numbers are shown. */
  get partKey() {
    return `${this.mode} ${this.rowIndex} ${this.layerIndex}`;
  }

  /** The number that is explained on opening: the output of the third step. */
  firstNumber() {
    const { model } = this;
    const step = model.nearest(model.length > 2 ? (model.backward ? model.length - 3 : 2) : model.firstStep);
    return { q: model.states[0].name, t: step, u: Math.min(1, model.units - 1) };
  }

  value(number) {
    return this.edits.pendingValue(this.layerIndex, number) ?? this.model.value(number);
  }

  original(number) {
    return this.model.value(number, this.model.recorded, this.model.recordedParameters);
  }

  /** The largest value of a number's bar. It doesn't change when a value is edited. */
  scale(number) {
    return this.shownRow.scales[this.layerIndex](number);
  }

  /** The text of a number. A difference has a sign. */
  textOf(number) {
    const value = this.value(number);
    if (this.mode === "difference") return signed(value);
    return this.model.isParameter(number) || number.q === "x" ? given(value) : shown(value);
  }

  /** A number of this trace and of the baseline. */
  compared(number) {
    const [ours, baseline] = [this.row, this.row.baseline].map((one) => one.models[this.layerIndex].value(number));
    return { ours, baseline };
  }

  /** Whether a number differs from that of the recorded run. */
  isChanged(number) {
    const value = this.value(number);
    const original = this.original(number);
    return this.edits.size > 0 && differ(value, original);
  }

  isEditable(number) {
    return this.edits.editOf(this.layerIndex, number) !== null;
  }

  /** Whether the reader has set this number. */
  isSet(number) {
    return this.edits.size > 0 && this.edits.find(this.layerIndex, number) !== null;
  }

  /** Whether the reader holds this quantity at a value. */
  isHeld(number) {
    return this.isSet(number) && this.edits.find(this.layerIndex, number).kind === "hold";
  }

  edit(number, value, steps = null) {
    const edit = this.edits.editOf(this.layerIndex, number, steps);
    if (edit) this.setEdit(edit, value);
  }

  /** Hold a quantity that is held in other steps: only in one step, or in all. */
  holdSteps(number, steps) {
    const held = this.edits.find(this.layerIndex, number);
    if (!held) return;
    this.remember("");
    this.edits.edits.delete(this.edits.key(held));
    this.setEdit({ ...held, steps }, held.value);
  }

  setEdit(edit, value) {
    this.setEdits([[edit, value]]);
  }

  setEdits(pairs) {
    this.remember(pairs.map(([edit]) => this.edits.key(edit)).join());
    for (const [edit, value] of pairs) this.edits.put(edit, value);
    this.edits.rerun();
    this.replaceAddress();
    this.refresh();
  }

  removeEdit(edit) {
    this.remember("");
    this.edits.remove(edit);
    this.replaceAddress();
    this.refresh();
  }

  reset() {
    this.remember("");
    this.row.edits.clear();
    this.replaceAddress();
    this.refresh();
  }

  /** Remember the changes before the next one. A number that is dragged counts once. */
  remember(what) {
    if (!what || what !== this.lastChanged) this.past.push(this.row.edits.toText());
    this.lastChanged = what;
  }

  /** Undo the last change. */
  undo() {
    if (!this.past.length) return;
    this.row.edits.fromText(this.past.pop());
    this.lastChanged = "";
    this.replaceAddress();
    this.refresh();
  }

  /** Go to a step before or after the chosen one, among those on the page. */
  move(by, options = {}) {
    const { steps, stepIndices } = this.model;
    this.goTo(steps[Math.max(0, Math.min(steps.length - 1, stepIndices.get(this.step) + by))], options);
  }

  /** The node of the hovered or chosen number, if it belongs to the chosen step. */
  get highlightedNode() {
    const number = this.hovered ?? this.number;
    if (this.model.isGiven(number) || number.t !== this.step || !this.model.drawing || !this.model.quantity(number.q)) return null;
    const valueIndex = this.model.valueIndex(number.q);
    return this.model.drawing.nodes.find((node) => node.value === valueIndex)?.id ?? this.model.drawing.nodes.find((node) => node.id === this.model.quantity(number.q).node.id)?.id ?? null;
  }

  choose(number, { push = true } = {}) {
    this.number = number;
    if (this.model.stepIndices.has(number.t)) this.step = number.t;
    if (!this.model.isParameter(number) && number.q !== "x") this.unit = number.u;
    if (push) this.pushAddress();
    this.refresh();
  }

  /** Show another row: the same number, or that of the nearest step. */
  openRow(index) {
    const { number } = this;
    const isStart = this.model.isStart(number);
    this.setRow(index);
    const { model } = this;
    const moved = model.isParameter(number) ? number : { ...number, t: isStart ? model.start : this.step };
    this.choose(model.exists(moved) ? moved : this.firstNumber());
  }

  setRow(index) {
    this.rowIndex = index;
    this.step = this.model.nearest(this.step);
    this.row.edits.catchUp();
  }

  /** Show the numbers of this trace, of the baseline, or the differences. */
  setMode(mode, options = {}) {
    this.mode = mode;
    this.choose(this.number, options);
  }

  /** Show the number of a finding. */
  openFinding(finding) {
    const number = this.numberOf(finding);
    if (finding.row !== null) this.setRow(this.rowNumbers.indexOf(finding.row));
    this.layerIndex = finding.layer;
    const block = blockOf(this.model, number);
    if (block?.gate) this.unit = number.u - block.start + block.firstUnit; // the weights table has the rows near it
    this.choose(number);
  }

  /** The number that shows a finding, or the nearest one on the page; null if there is none. */
  numberOf({ layer, number, row }) {
    if (!number) return null;
    const model = (row === null ? this : this.rowOf(row)).models[layer];
    const nearest = number.t === undefined || model.isStart(number) ? number : { ...number, t: model.nearest(number.t) };
    if (model.exists(nearest)) return nearest;
    return !model.quantity(number.q) && model.stepIndices.has(nearest.t) ? firstNotFinite(model, nearest.t) : null;
  }

  goTo(step, options = {}) {
    const to = this.model.nearest(step);
    if (this.model.isParameter(this.number)) {
      this.step = to;
      this.refresh();
    } else {
      this.choose({ ...this.number, t: to }, options);
    }
  }

  goToUnit(unit) {
    const { number } = this;
    if (this.model.isParameter(number)) this.unit = unit;
    const isUnit = !this.model.isParameter(number) && number.q !== "x" && unit < this.model.size(number.q);
    this.choose(isUnit ? { ...number, u: unit } : { q: this.model.states[0].name, t: this.step, u: unit });
  }

  hover(number) {
    this.hovered = number;
    this.refresh();
  }

  setRange(range) {
    this.range = range;
    this.replaceAddress();
    this.refresh();
  }

  /** The order of the units in heat maps, and the window [first, stop) of the steps. */
  get mapOrder() {
    return orderOf(this.model, this.mapView.order);
  }

  get mapWindow() {
    return windowOf(this.model, this.mapView.zoom);
  }

  setMapView(changes) {
    Object.assign(this.mapView, changes);
    this.pushAddress();
    this.refresh();
  }

  toggleDigits() {
    this.allDigits = !this.allDigits;
    this.refresh();
  }

  /** Mark an element as the chosen number, or as one that it is computed from. */
  mark(element, number) {
    const id = idOf(number);
    element.classList.toggle("on", id === this.chosenId);
    element.classList.toggle("src", this.sourceIds.has(id));
    element.classList.toggle("near", this.hovered !== null && idOf(this.hovered) === id);
  }

  refresh() {
    this.root.dataset.mode = this.mode;
    if (this.mode === "difference") this.models.forEach((model) => model.update());
    this.chosenId = idOf(this.number);
    this.sourceIds = new Set(this.model.sources(this.number).map(idOf));
    this.render?.();
  }

  // --- the address ---

  get address() {
    const { number, mapView: { order, zoom } } = this;
    const entries = { ...this.inModel?.entries, ...(this.mode === "this" ? {} : { show: this.mode }), ...(this.rowIndex ? { row: this.rowNumbers[this.rowIndex] } : {}), ...(this.layerIndex ? { layer: this.layerIndex } : {}),
      step: number.t === undefined ? this.step : number.t === this.model.start ? "start" : number.t, unit: number.u, number: number.q, ...(number.j === undefined ? {} : { column: number.j }),
      ...(order ? { order } : {}), ...(zoom ? { zoom: zoom.join("-") } : {}),
      ...(this.range ? { range: this.range.join("-") } : {}), ...(this.allEdits.edits.size ? { edit: this.edits.toText() } : {}) };
    return `#${new URLSearchParams(entries)}`;
  }

  pushAddress() {
    if (this.hasAddress && location.hash !== this.address) history.pushState(null, "", this.address);
  }

  /** Put the changes into the address. They are no entries of the history. */
  replaceAddress() {
    if (this.hasAddress) history.replaceState(null, "", this.address);
  }

  /** Choose the number in the address. Returns whether there is one. */
  readAddress() {
    const entries = new URLSearchParams(location.hash.slice(1));
    const rowIndex = entries.has("row") ? this.rowNumbers.indexOf(Number(entries.get("row"))) : 0;
    this.rowIndex = Math.max(0, rowIndex);
    this.mode = Object.hasOwn(this.row, "baseline") && ["baseline", "difference"].includes(entries.get("show")) ? entries.get("show") : "this";
    this.row.edits.fromText(entries.get("edit") ?? "");
    this.range = readRange(entries.get("range"), this.model.length);
    this.mapView = { order: ["similar", "weights"].find((one) => one === entries.get("order")) ?? null, zoom: readRange(entries.get("zoom"), this.model.length) };
    if (!entries.has("number")) return false;
    const layerIndex = Number(entries.get("layer") ?? 0);
    const model = this.models[layerIndex];
    if (!model || rowIndex < 0) return false;
    const number = { q: entries.get("number"), u: Number(entries.get("unit")) };
    const step = entries.get("step") === "start" ? model.start : Number(entries.get("step"));
    if (entries.has("column")) number.j = Number(entries.get("column"));
    if (!model.parameters.has(number.q)) number.t = step;
    if (!model.exists(number)) return false;
    this.layerIndex = layerIndex;
    this.step = model.nearest(this.step);
    if (model.stepIndices.has(step)) this.step = step;
    this.choose(number, { push: false });
    return true;
  }
}

/** Whether two numbers differ by more than the rounding of single precision. */
export function differ(a, b) {
  return !Object.is(a, b) && !(Math.abs(a - b) <= 1e-6 * Math.max(1, Math.abs(b)));
}

/** Return the range of steps in the address, or null if there is no valid one. */
function readRange(text, length) {
  const [first, last] = /^\d+-\d+$/.test(text) ? text.split("-").map(Number) : [];
  return first <= last && last < length ? [first, last] : null;
}
