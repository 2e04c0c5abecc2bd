// The page: its state, its parts, the address and the keyboard.

import { createArithmetic } from "./arithmetic.js";
import { baselineData, createComparison, DifferenceModel, signed, withoutEdits } from "./comparison.js";
import { given, shown } from "./digits.js";
import { createElement, createSection } from "./dom.js";
import { createDrawing } from "./drawing.js";
import { createLegend } from "./legend.js";
import { createEditor } from "./editor.js";
import { Edits } from "./edits.js";
import { createEquations } from "./equations.js";
import { createGradient } from "./gradient.js";
import { createGuide, findingText } from "./guide.js";
import { createModels, idOf } from "./model.js";
import { createRowPicker, rowData, rowNumbers } from "./rows.js";
import { createSequence, isSmall } from "./sequence.js";
import { createPlayer } from "./player.js";
import { createStrip, unitsShown, windowText } from "./strip.js";
import { Symbols } from "./symbols.js";
import { createTables } from "./tables.js";
import { createText } from "./text.js";
import { createWeights } from "./weights.js";

const WIDE_UNITS = 8; // a layer with more units or steps opens with its heat maps
const WIDE_STEPS = 24;
const MAX_UNITS_OF_BOTH = 4; // of a layer whose numbers and weights are shown together

/** The state of the page: the layer, the chosen number, and the step and unit of the drawing. */
class View {
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
    this.chosenId = "";
    this.sourceIds = new Set(); // of the numbers that the chosen one is computed from
    this.hovered = null;
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
    this.edits.edits.delete(this.edits.key(held));
    this.setEdit({ ...held, steps }, held.value);
  }

  setEdit(edit, value) {
    this.setEdits([[edit, value]]);
  }

  setEdits(pairs) {
    for (const [edit, value] of pairs) this.edits.put(edit, value);
    this.edits.rerun();
    this.replaceAddress();
    this.refresh();
  }

  removeEdit(edit) {
    this.edits.remove(edit);
    this.replaceAddress();
    this.refresh();
  }

  reset() {
    this.row.edits.clear();
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
    if (this.model.isParameter(number) || number.q === "x" || this.model.isStart(number) || number.t !== this.step) return null;
    if (!this.model.drawing || !this.model.quantity(number.q)) return null;
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
    this.choose(number);
  }

  /** The number that shows a finding, or the nearest one on the page; null if there is none. */
  numberOf({ layer, number, row }) {
    if (!number) return null;
    const model = (row === null ? this : this.rowOf(row)).models[layer];
    const nearest = number.t === undefined ? number : { ...number, t: model.nearest(number.t) };
    return model.exists(nearest) ? nearest : null;
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
    const { number } = this;
    const entries = { ...this.inModel?.entries, ...(this.mode === "this" ? {} : { show: this.mode }), ...(this.rowIndex ? { row: this.rowNumbers[this.rowIndex] } : {}), ...(this.layerIndex ? { layer: this.layerIndex } : {}),
      step: number.t === undefined ? this.step : number.t === this.model.start ? "start" : number.t, unit: number.u, number: number.q, ...(number.j === undefined ? {} : { column: number.j }),
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
function differ(a, b) {
  return !Object.is(a, b) && !(Math.abs(a - b) <= 1e-6 * Math.max(1, Math.abs(b)));
}

/** Return a function that gives the scale of a number: fixed for gates and tanh, else from the recorded run. */
function findScales(model) {
  const over = (valueIndex) => model.largestOf(valueIndex);
  let parameters = 0;
  for (const { values } of model.parameters.values()) for (const value of values ?? []) if (Math.abs(value) < 5) parameters = Math.max(parameters, Math.abs(value));
  const input = over(model.inputValue) || 1;
  const lanes = new Map((model.drawing?.layout.nodes ?? []).map((node) => [node.id, node.lane]));
  const sums = [];
  const states = new Map();
  for (const node of model.nodes) {
    for (const q of model.quantitiesOf(node)) if (model.quantity(q).kind !== "node" || (node.kind === "layer" && !node.range)) sums.push(over(model.valueIndex(q)));
    const lane = lanes.get(node.id) ?? model.states.find((state) => state.end === node.id)?.name;
    if (lane) states.set(lane, Math.max(states.get(lane) ?? 1, over(node.value)));
  }
  for (const state of model.states) states.set(state.name, Math.max(states.get(state.name) ?? 1, over(state.value)));
  const sum = Math.max(...sums, 1e-9);
  const cache = new Map();
  return (number) => {
    if (model.isParameter(number)) return parameters || 1;
    if (number.q === "x") return input;
    if (!cache.has(number.q)) cache.set(number.q, find(number.q));
    return cache.get(number.q);
  };
  function find(q) {
    if (states.has(q)) return states.get(q);
    const { kind, node } = model.quantity(q);
    if (kind !== "node" || (node.kind === "layer" && !node.range)) return sum;
    if (node.range) return 1;
    const lane = lanes.get(node.id);
    return lane ? states.get(lane) : Math.max(over(node.value), 1e-9);
  }
}

/**
 * Render the page of a trace into an element. Returns the view; its close() removes all listeners.
 *
 * If the layer is part of the page of a model, `inModel` is {title, entries, close}: the title of the model, the first entries
 * of the address, and a function that goes back to the model.
 */
export function mount(root, data, inModel = null) {
  const view = new View(root, data, inModel);
  view.hasAddress = (root.id === "page" || inModel !== null) && location.protocol !== "about:"; // not in a notebook, nor in its frame
  root.classList.add("unrolled");
  root.dataset.lmSuppressShortcuts = "true"; // turns off JupyterLab's own shortcuts in here
  const guide = createGuide(view);
  const comparison = createComparison(view);
  const strip = createStrip(view);
  const drawing = createDrawing(view);
  const tables = createTables(view);
  const equations = createEquations(view);
  const arithmetic = createArithmetic(view);
  const editor = createEditor(view);
  const weights = createWeights(view);
  const sequence = createSequence(view);
  const gradient = createGradient(view);
  const text = data.labels && createText(view);
  const player = createPlayer(view);
  const keys = createKeys(data);
  const tabs = { numbers: createTab("Numbers"), weights: createTab("Weights") };
  const heads = { cell: createElement("h2"), step: createElement("h2"), number: createElement("h2") };
  const themeButton = createElement("button", { type: "button", class: "btn", onclick: () => setTheme(isDark() ? "light" : "dark") }, "Dark / light");
  const keysButton = createElement("button", { type: "button", class: "btn", onclick: () => keys.showModal() }, "Keys", createElement("kbd", { "aria-hidden": "true" }, "?"));
  const stepValues = createElement("section", { class: "step-values", "aria-label": "The numbers of the step" },
    createElement("div", { class: "head-row" }, heads.step, createElement("span", { class: "seg", role: "tablist" }, Object.values(tabs))), tables.element, weights.element);

  function createTab(text) {
    return createElement("button", { type: "button", role: "tab", onclick: () => openTab(text === "Weights") }, text);
  }

  function openTab(isWeights) {
    stepValues.classList.toggle("both", hasRoomForBoth(view.model));
    stepValues.classList.toggle("show-weights", isWeights);
    tabs.weights.setAttribute("aria-selected", isWeights);
    tabs.numbers.setAttribute("aria-selected", !isWeights);
    weights.update();
  }

  const isTabOfWeights = () => stepValues.matches(".show-weights:not(.both)");

  function numbersTitle() {
    const units = unitsShown(view);
    return units.length < view.model.units ? `Step ${view.step}, ${windowText("units", units)} of ${view.model.units}` : `Every number of step ${view.step}`;
  }

  const changesText = createElement("span");
  const copyButton = createElement("button", { type: "button", class: "btn", onclick: copyLink }, "Copy link");
  const changes = createElement("span", { class: "changes", hidden: true }, changesText, copyButton,
    createElement("button", { type: "button", class: "btn", onclick: () => view.reset() }, "Reset", createElement("kbd", { "aria-hidden": "true" }, "R")));
  const options = data.layers.map((layer, k) => createElement("option", { value: k }, `layer ${layer.layer}, ${layer.direction}`));
  const layerPicker = createElement("select", { "aria-label": "layer", onchange: () => { const k = Number(layerPicker.value); view.layerIndex = k; view.choose(view.firstNumber()); } }, options);
  const rowPicker = createRowPicker(view);
  const legend = createLegend(view);
  const summary = createElement("span", { class: "what" });
  const parts = [comparison, rowPicker, legend, strip, drawing, tables, equations, arithmetic, editor, weights, sequence, gradient, player, guide, ...(text ? [text] : []), { update: updateHeads }];
  const longest = Math.max(...view.rowNumbers.map((_, k) => rowData(data, k).layers[0].length));
  const isWide = (view.model.units > WIDE_UNITS || longest > WIDE_STEPS) && !(isSmall(view.model) && longest === view.model.length);
  const wholeSequence = createSection("wide sequence", "The whole sequence", sequence.element);
  const textSection = text && createSection("wide text-section", "Text", text.element);
  const overview = !isWide ? strip.element : text && data.labels.length > WIDE_STEPS ? textSection : wholeSequence;
  root.classList.toggle("is-wide", isWide);
  root.replaceChildren(
    createElement("header", {}, inModel && createElement("button", { type: "button", class: "btn", "aria-label": `back to ${inModel.title}`, onclick: inModel.close }, `‹ ${inModel.title}`), createElement("h1", {}, data.title), summary, changes, rowPicker.element, data.layers.length > 1 ? layerPicker : null, keysButton, themeButton),
    comparison.element ?? "", guide.element, ...data.notes.map((note) => createElement("p", { role: "note", class: "note" }, note)), overview,
    createElement("main", { class: "stage" },
      createElement("section", { class: "draw", "aria-label": "The cell" }, createElement("div", { class: "head-row" }, heads.cell, player.element), drawing.element, legend.element, editor.element),
      stepValues,
      createElement("section", { class: "why", "aria-label": "The chosen number" }, heads.number, equations.element, arithmetic.element)),
    createElement("div", { class: "more" },
      overview === textSection ? null : textSection, overview === wholeSequence ? null : wholeSequence,
      createSection("wide", "Gradient through time", gradient.element),
      createSection("health", "Diagnosis", createFindings(view)),
      createSection("about", `About ${data.cell}`, data.description.map(createParagraph), createElement("p", { class: data.comparison.status }, data.comparison.text), createDocumentation(data)),
      createSection("keys-section", "Keyboard", createKeyList(data))), keys);

  async function copyLink() {
    try {
      await navigator.clipboard.writeText(location.href);
      copyButton.textContent = "Copied";
    } catch {
      copyButton.textContent = "Copy the address above"; // a file, or a browser that doesn't allow it
    }
    setTimeout(() => { copyButton.textContent = "Copy link"; }, 2000);
  }

  function updateChanges() {
    const { edits, models } = view.row;
    changes.hidden = edits.size === 0;
    if (changes.hidden) return;
    changesText.textContent = `${edits.size === 1 ? "1 value" : `${edits.size} values`} changed${effect(edits, models)} `;
    copyButton.hidden = !view.hasAddress;
  }

  /** What the changes do: how many numbers differ, if all are stored. */
  function effect({ pending, isLong }, models) {
    if (pending) return `; recomputing: ${Math.floor(100 * pending.progress)} %`;
    if (isLong) return "";
    let [total, different] = [0, 0];
    for (const model of models) {
      total += model.recorded.values.length;
      model.values.values.forEach((value, k) => { different += differ(value, model.recorded.values[k]); });
    }
    return `: ${different} of ${total} numbers differ`;
  }

  view.allEdits.onProgress = (isDone) => (isDone ? view.refresh() : updateChanges());

  let lastNumber = null;

  function updateHeads() {
    updateChanges();
    const { model, symbols } = view;
    if (model.isParameter(view.number) !== stepValues.classList.contains("show-weights") && view.number !== lastNumber) openTab(model.isParameter(view.number));
    lastNumber = view.number;
    heads.cell.textContent = `The cell at step ${view.step}, unit ${view.unit}`;
    stepValues.classList.toggle("both", hasRoomForBoth(view.model));
    heads.step.textContent = isTabOfWeights() ? "Weights, the same at every step" : numbersTitle();
    if (view.mode === "difference") heads.number.innerHTML = `<span>How much does ${symbols.of(view.number)} differ?</span>`;
    else heads.number.innerHTML = model.derive(view.number) ? `<span>Where does ${symbols.of(view.number)} come from?</span>` : `<span>What is ${symbols.of(view.number)}?</span>`;
    layerPicker.value = view.layerIndex;
    summary.textContent = view.data.summary;
    if (view.hasAddress) document.title = `${Symbols.plain(symbols.of(view.number))} · ${data.title}`;
  }

  const isDark = () => getComputedStyle(root).colorScheme === "dark";
  function setTheme(theme) {
    root.dataset.theme = theme;
    if (view.hasAddress) document.documentElement.dataset.theme = theme;
    view.theme = theme;
    view.refresh();
  }

  view.onKeyDown = (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea")) return;
    const handled = handleKey(event.key, event.target);
    if (!handled) return;
    event.preventDefault();
    event.stopPropagation();
  };

  function handleKey(key, target) {
    const { model, number } = view;
    const moves = { ArrowLeft: -1, ArrowRight: 1, "[": -1, "]": 1 };
    if (key in moves) {
      view.move(moves[key]);
    } else if (key === "ArrowUp" || key === "ArrowDown") {
      if (model.isParameter(number)) return false;
      const size = number.q === "x" ? model.features : model.size(number.q);
      view.choose({ ...number, u: (number.u + (key === "ArrowDown" ? 1 : size - 1)) % size });
    } else if (key === "b" && comparison.element) {
      comparison.next();
    } else if (key === "j" || key === "k") {
      const at = model.order.indexOf(number.q);
      const q = model.order[(at + (key === "j" ? 1 : model.order.length - 1)) % model.order.length];
      view.choose({ q, t: view.step, u: Math.min(view.unit, model.size(q) - 1) });
    } else if (key.length === 1 && (key === "x" || model.nodesByKey.has(key)) && !"ntwedrjk".includes(key)) {
      const size = key === "x" ? model.features : model.size(key);
      view.choose({ q: key, t: view.step, u: Math.min(view.unit, size - 1) });
    } else if (key === "Enter" && !target.closest("button, a, [role=button]")) {
      const [source] = model.sources(number);
      if (source) view.choose(source);
    } else if (key === "e" && view.isEditable(number)) {
      editor.focus();
    } else if (key === "r" && view.row.edits.size) {
      view.reset();
    } else if (key === " " && !target.closest("button, a, [role=button]")) {
      player.toggle();
    } else if (key === "w") {
      openTab(!stepValues.classList.contains("show-weights"));
      updateHeads();
      if (stepValues.classList.contains("both")) weights.element.scrollIntoView({ block: "nearest" });
    } else if (key === "d") {
      themeButton.click();
    } else if (key === "?") {
      keys.showModal();
    } else if (key === "Backspace" && view.hasAddress) {
      history.back();
    } else if (key === "t" && !guide.touring) {
      guide.start();
    } else if (key === "n" && guide.touring) {
      guide.next();
    } else if (key === "Escape" && guide.touring) {
      guide.stop();
    } else {
      return false;
    }
    return true;
  }

  enableDragging(view, root);
  const listeners = new AbortController();
  root.tabIndex = -1;
  root.addEventListener("keydown", view.onKeyDown);
  if (view.hasAddress) {
    window.addEventListener("popstate", () => view.readAddress() || view.choose(view.firstNumber(), { push: false }), { signal: listeners.signal });
  }
  drawing.narrow.addEventListener("change", () => view.refresh(), { signal: listeners.signal });
  view.close = () => {
    listeners.abort();
    player.stop();
  };
  view.render = () => parts.forEach((part) => part.update());
  const { jpThemeLight } = document.body.dataset; // in JupyterLab
  if (jpThemeLight) setTheme(jpThemeLight === "false" ? "dark" : "light");
  else view.theme = isDark() ? "dark" : "light";
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(isDark() ? "dark" : "light"), { signal: listeners.signal });
  const paint = (theme) => () => { view.theme = theme(); view.refresh(); };
  window.addEventListener("beforeprint", paint(() => "light"), { signal: listeners.signal });
  window.addEventListener("afterprint", paint(() => (isDark() ? "dark" : "light")), { signal: listeners.signal });
  openTab(false);
  if (!view.hasAddress || !view.readAddress()) view.refresh();
  return view;
}

const KEYS = [
  ["← →", "step"], ["↑ ↓", "unit"], ["j k", "next and previous number, in the order of computation"], ["Enter", "the first number that this one is computed from"],
  ["a letter", "the gate or state of that name"], ["space", "play and pause"], ["e", "change the number"], ["r", "undo all changes"], ["w", "weights"], ["t n Esc", "tour: start, next, end"], ["d", "dark or light"], ["Backspace", "back"], ["?", "this list"],
];

function createKeyList({ baseline, labels }) {
  const own = [...(labels ? [["Shift ← →", "select a range of the text"]] : []), ...(baseline ? [["b", "this trace, the baseline, the difference"]] : [])];
  const keys = [...KEYS.slice(0, -2), ...own, ...KEYS.slice(-2)];
  return createElement("div", { class: "keys" }, keys.map(([key, text]) => [createElement("span", {}, key.split(" ").length > 1 && key !== "a letter" ? key.split(" ").map((one) => [createElement("kbd", {}, one), " "]) : createElement("kbd", {}, key)), createElement("span", {}, text)]));
}

function createKeys(data) {
  return createElement("dialog", { class: "keys-dialog", "aria-label": "Keyboard" }, createElement("h2", {}, "Keyboard"), createKeyList(data),
    createElement("form", { method: "dialog" }, createElement("button", { class: "btn" }, "Close", createElement("kbd", {}, "Esc"))));
}

/** Return the range of steps in the address, or null if there is no valid one. */
function readRange(text, length) {
  const [first, last] = /^\d+-\d+$/.test(text) ? text.split("-").map(Number) : [];
  return first <= last && last < length ? [first, last] : null;
}

/** Whether the weights fit below the numbers of a step on the first screen, as for a simple recurrent layer. */
function hasRoomForBoth(model) {
  return model.nodes.filter((node) => node.kind === "layer").length === 1 && model.nodes.length < 3 && model.units <= MAX_UNITS_OF_BOTH && model.parameters.size > 0;
}

/** Create a paragraph in which identifiers of papers are links. */
function createParagraph(text) {
  const parts = text.split(/(arXiv:\d{4}\.\d{4,5}|doi:10\.\d+\/[\w./-]*\w)/);
  return createElement("p", {}, parts.map((part) => {
    const [, site, id] = /^(arXiv|doi):(.*)/.exec(part) ?? [];
    return site ? createLink(`https://${site === "doi" ? "doi.org" : "arxiv.org/abs"}/${id}`, part) : part;
  }));
}

const createLink = (href, text) => createElement("a", { href, rel: "noreferrer" }, text);

/** Say where to read more: this library has no address that a page could link to, torch has one. */
function createDocumentation({ documentation, shortName }) {
  const torch = /^nn\./.test(shortName) ? [" Online: ", createLink(`https://docs.pytorch.org/docs/stable/generated/torch.${shortName}.html`, `torch.${shortName}`), "."] : [];
  return createElement("p", { class: "quiet" }, "Documentation in Python: ", documentation.flatMap((name, k) => [k ? " and " : "", createElement("code", {}, `help(${name})`)]), ".", torch);
}

function createFindings(view) {
  const { findings, checked } = view.data.health;
  return createElement("ol", { class: "findings" },
    findings.map((finding, k) => createElement("li", {}, createElement("span", { class: "bad" }, k + 1), createElement("span", {}, findingText(finding), " ",
      finding.missing ? createElement("span", { class: "quiet" }, finding.missing) : null,
      view.numberOf(finding) ? createElement("button", { type: "button", class: "btn link", onclick: () => view.openFinding(finding) }, "Show it") : null))),
    checked.map((text) => createElement("li", {}, createElement("span", { class: "fine" }, "✓"), createElement("span", { class: "quiet" }, text))));
}

/** Let the reader drag framed numbers with a mouse or pen. On touch screens, there is the slider. */
function enableDragging(view, root) {
  let drag = null;
  root.addEventListener("pointerdown", (event) => {
    const cell = event.target.closest(".n.can");
    if (!cell || event.button || event.pointerType === "touch") return;
    const number = cell.refer();
    drag = { number, x: event.clientX, value: view.value(number), moved: false };
  });
  root.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const distance = event.clientX - drag.x;
    if (!drag.moved && Math.abs(distance) < 4) return;
    if (!drag.moved) {
      drag.moved = true;
      root.setPointerCapture(event.pointerId);
      view.choose(drag.number);
    }
    const isGate = view.model.isGate(drag.number.q);
    const value = drag.value + distance * (isGate ? 0.005 : 0.01) * (event.shiftKey ? 0.1 : 1);
    view.edit(drag.number, Math.round((isGate ? Math.max(0, Math.min(1, value)) : value) * 1000) / 1000);
    event.preventDefault();
  });
  const end = () => { drag = null; };
  root.addEventListener("pointerup", end);
  root.addEventListener("pointercancel", end);
}
