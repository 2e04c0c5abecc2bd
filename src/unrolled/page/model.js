// The numbers of one layer in one direction, and how each of them follows from others.
//
// A number is {q, t, u}: quantity, time step and unit, or {q, u, j}: parameter, row and column. Quantities are
// "x", the named quantities ("f"), the ids of nodes without a name ("n4"), the sum that an activation function is
// applied to ("sum.f"), and the weighted sums that are part of it ("f.0", "f.1"). If the model changed the states between
// the steps, "before.h" is a state at the beginning of a step. Otherwise, that is "h" of the step before.

import { derive } from "./derivation.js";
import { findLabels } from "./labels.js";
import { decodeValues, joinArrays, largestMagnitude } from "./numbers.js";
import { ComputedSteps, recordedRun, StoredSteps } from "./steps.js";
import { weightedRows } from "./weighted_rows.js";

/** Return the layers of a page, in the order in which they run. */
export function createModels(layers) {
  const models = [];
  for (const layer of layers) models.push(new LayerModel(layer, models.filter((model) => model.index === layer.layer - 1)));
  return models;
}

/** One layer in one direction, above others whose outputs it reads. */
export class LayerModel {
  constructor(data, below) {
    Object.assign(this, { index: data.layer, direction: data.direction, backward: data.direction === "backward", length: data.length, tensorNames: data.tensorNames });
    this.changedStates = data.changedStates; // whether the model changed the states between the steps
    this.nodes = data.diagram.nodes;
    this.states = data.diagram.states;
    this.definitions = data.diagram.definitions; // of the names in formulas that are neither quantities nor parameters
    this.descriptions = Object.assign(Object.create(null), data.descriptions); // a quantity may be named "constructor"
    this.folded = data.drawing; // the drawing, with its groups folded if it is large
    this.groups = new Map((data.drawing?.groups ?? []).map((group) => [group.nodes.at(-1), group]));
    Object.assign(this, { gradient: data.gradient, weightGradient: data.weightGradient ?? null, unitOrder: data.unitOrder });
    this.sizes = data.diagram.sizes;
    this.inputValue = data.diagram.inputValue;
    this.start = this.backward ? this.length : -1; // the step of the initial states
    this.steps = data.steps; // those whose numbers are on the page
    this.stepIndices = new Map(data.steps.map((step, k) => [step, k]));
    this.complete = data.steps.length === data.length;
    this.recordedMaps = data.maps; // means over time and units, if not all numbers are stored
    this.maps = this.recordedMaps;
    this.parameters = new Map(data.parameters.map((one) => [one.name, { ...one, values: one.values && decodeValues(one.values) }]));
    this.nodesById = new Map(this.nodes.map((node) => [node.id, node]));
    const isTaken = (name) => name === "x" || this.parameters.has(name); // such as x = linear(x, …)
    this.keys = new Map(this.nodes.map((node) => [node.id, node.name && !isTaken(node.name) ? node.name : node.id]));
    this.nodesByKey = new Map(this.nodes.map((node) => [this.keys.get(node.id), node]));
    for (const state of this.states) if (!this.nodesByKey.has(state.name)) this.nodesByKey.set(state.name, this.nodesById.get(state.end));
    this.statesByName = new Map(this.states.map((state) => [state.name, state]));
    this.readers = new Map(this.nodes.map((node) => [node.id, this.nodes.filter((other) => other.terms.some((term) => term.source === node.id))]));
    this.labels = findLabels(this);
    this.offsets = [];
    let total = 0;
    for (const size of this.sizes) {
      this.offsets.push(total);
      total += size;
    }
    this.stepSize = total;
    this.below = below;
    this.program = data.program;
    this.stored = decodeValues(data.diagram.values);
    this.largest = data.computed?.largest ?? null;
    this.input = data.computed?.input ? decodeValues(data.computed.input) : null;
    this.isComputed = data.computed !== null;
    this.recordedParameters = this.parameters;
    this.recordedParameterValues = Object.fromEntries([...this.parameters].map(([name, one]) => [name, one.values]));
    this.recorded = this.isComputed ? new ComputedSteps(this, recordedRun(this, data, this.recordedParameterValues)) : new StoredSteps(this.stored, data.steps, total);
    this.values = this.recorded;
    this.held = data.program.programs[0]?.held ?? []; // quantities that can be held at other values
    this.valueSources = data.valueSources; // what a run returns, for each value
    this.units = Math.max(...this.states.map((state) => this.sizes[state.value]));
    this.features = this.sizes[this.inputValue];
    this.quantitiesByValue = new Map(this.nodes.flatMap((node) => this.quantitiesOf(node).map((q) => [this.valueIndex(q), q])).reverse());
    this.equations = data.equations;
    this.foldGroups(true);
    this.order = this.nodes.flatMap((node) => this.quantitiesOf(node));
  }

  /** Draw each group as one node, or draw all nodes. */
  foldGroups(isFolded) {
    this.isFolded = isFolded;
    this.drawing = isFolded ? this.folded : this.folded.open;
    this.drawnNodes = new Map((this.drawing?.nodes ?? []).map((node) => [node.id, node]));
  }

  /** The step that is computed before another one. */
  previous(step) {
    return this.backward ? step + 1 : step - 1;
  }

  /** The step that is computed after another one, or null after the last one. */
  next(step) {
    const after = this.backward ? step - 1 : step + 1;
    return after < 0 || after >= this.length ? null : after;
  }

  get firstStep() {
    return this.backward ? this.length - 1 : 0;
  }

  /** Whether an activation function is applied to a sum of several terms. */
  hasSum(node) {
    return node.operation === "activation" && (node.terms.length > 1 || node.terms[0].weighted) && node.preActivation !== null;
  }

  /** The quantities of a node in the order in which they are computed: weighted sums, their sum, the result. */
  quantitiesOf(node) {
    const key = this.keys.get(node.id);
    const terms = node.terms.flatMap((term, k) => (this.isPart(node, term) ? [`${key}.${k}`] : []));
    return [...terms, ...(this.hasSum(node) ? [`sum.${key}`] : []), key];
  }

  /** Whether a term has a value of its own: a weighted sum, or a product with parameters. */
  isPart(node, term) {
    return term.source !== null && (term.weighted || term.gain !== null) && term.value !== null && term.value !== node.value;
  }

  /** What a quantity is: {kind: "input" | "parameter" | "node" | "sum" | "term" | "before", node, term, state}. Null if there is none. */
  quantity(q) {
    if (q === "x") return { kind: "input" };
    if (this.parameters.has(q)) return { kind: "parameter", parameter: this.parameters.get(q) };
    const [head, tail] = q.split(".");
    if (tail === undefined) {
      const node = this.nodesByKey.get(q);
      return node ? { kind: "node", node } : null;
    }
    if (head === "before" && this.changedStates) {
      const state = this.statesByName.get(tail);
      return state ? { kind: "before", state } : null;
    }
    if (head === "sum") {
      const node = this.nodesByKey.get(tail);
      return node && this.hasSum(node) ? { kind: "sum", node } : null;
    }
    const node = this.nodesByKey.get(head);
    const term = node?.terms[tail];
    return term && this.isPart(node, term) ? { kind: "term", node, term, k: Number(tail) } : null;
  }

  /** The index of the values of a quantity. */
  valueIndex(q) {
    const { kind, node, term, state } = this.quantity(q);
    return { input: () => this.inputValue, node: () => node.value, sum: () => node.preActivation, term: () => term.value, before: () => state.value }[kind]();
  }

  /** The number of elements of a quantity. */
  size(q) {
    return this.sizes[this.valueIndex(q)];
  }

  /** The step on the page that is nearest to a time step. */
  nearest(step) {
    return this.steps.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best));
  }

  at(values, step, valueIndex, unit) {
    const wrapped = this.sizes[valueIndex] === 1 ? 0 : unit;
    return values.row(step)[this.offsets[valueIndex] + wrapped];
  }

  /** All elements of a value, from the numbers of a step. */
  read(row, valueIndex) {
    return row.subarray(this.offsets[valueIndex], this.offsets[valueIndex] + this.sizes[valueIndex]);
  }

  /** The largest finite magnitude of a value in the recorded run. */
  largestOf(valueIndex) {
    return this.largest?.[valueIndex] ?? largestMagnitude(this.steps.map((step) => this.read(this.recorded.row(step), valueIndex)));
  }

  /** The input of a step in the recorded run. */
  recordedInput(step) {
    if (!this.isComputed) return this.read(this.recorded.row(step), this.inputValue);
    if (this.input) return this.input.subarray(step * this.features, (step + 1) * this.features);
    return joinArrays(this.below.map((model) => model.outputOf(model.recorded.row(step))));
  }

  /** The output, from the numbers of a step. */
  outputOf(row) {
    return this.read(row, this.nodesById.get(this.states[0].end).value);
  }

  /** The states before and after a step by name, from its numbers. */
  statesBefore(row) {
    return Object.fromEntries(this.states.map(({ name, value }) => [name, this.read(row, value)]));
  }

  statesAfter(row) {
    return Object.fromEntries(this.states.map(({ name, end }) => [name, this.read(row, this.nodesById.get(end).value)]));
  }

  /** The numbers of a step from the result of its program: arrays by name. */
  numbersOf(values, step) {
    const row = new Float64Array(this.isComputed ? this.stored : this.recorded.row(step)); // for values that are always the same
    const write = (from, elements, offset) => {
      if (elements) elements.forEach((element, k) => { row[offset + k] = from[element]; });
      else row.set(from, offset);
      return offset + (elements ?? from).length;
    };
    this.valueSources.forEach((pieces, k) => {
      let offset = this.offsets[k];
      for (const { name, elements } of pieces ?? []) offset = write(values[name], elements, offset);
    });
    // The value of a name goes over that of its node, since it may be held after a product with 1 that isn't drawn.
    for (const node of this.nodes) {
      if (this.held.includes(this.keys.get(node.id)) && values[node.name].length === this.sizes[node.value]) write(values[node.name], null, this.offsets[node.value]);
    }
    return row;
  }

  /** The step whose previous state is that of a step that isn't on the page, such as the initial one; else null. */
  readerOf(step) {
    if (this.stepIndices.has(step) || this.changedStates) return null;
    return step === this.start ? this.firstStep : this.next(step);
  }

  isParameter(number) {
    return this.parameters.has(number.q);
  }

  /** Whether a number is an initial state. */
  isStart(number) {
    return number.t === this.start;
  }

  /** The value of a number; of the recorded run, or with the reader's changes. */
  value(number, values = this.values, parameters = this.parameters) {
    if (parameters.has(number.q)) {
      const { values: weights, shape } = parameters.get(number.q);
      return weights[shape.length > 1 ? number.u * shape[1] + (number.j ?? 0) : number.u];
    }
    const reader = this.readerOf(number.t);
    if (reader !== null) return this.at(values, reader, this.statesByName.get(number.q).value, number.u);
    return this.at(values, number.t, this.valueIndex(number.q), number.u);
  }

  /** Show the recorded numbers. */
  restore() {
    this.values = this.recorded;
    this.maps = this.recordedMaps;
    this.parameters = this.recordedParameters;
  }

  /** Show the numbers of another run, with some parameters changed. */
  replace(steps, maps, parameterEdits) {
    this.values = steps;
    this.maps = maps;
    this.parameters = new Map(this.recordedParameters);
    for (const { name, index, value } of parameterEdits) {
      const parameter = this.parameters.get(name);
      const changed = parameter.values.slice();
      changed[index] = value;
      this.parameters.set(name, { ...parameter, values: changed });
    }
  }

  /** Whether there is such a number. */
  exists(number) {
    if (this.isParameter(number)) {
      const { shape, values } = this.parameters.get(number.q);
      const isColumn = shape.length < 2 || (Number.isInteger(number.j) && number.j >= 0 && number.j < shape[1]);
      return values !== null && Number.isInteger(number.u) && number.u >= 0 && number.u < shape[0] && isColumn;
    }
    if (!Number.isInteger(number.t) || !Number.isInteger(number.u) || number.u < 0) return false;
    if (!this.stepIndices.has(number.t)) {
      const state = this.statesByName.get(number.q);
      return state !== undefined && this.stepIndices.has(this.readerOf(number.t)) && number.u < this.sizes[state.value];
    }
    return this.quantity(number.q) !== null && number.u < this.size(number.q);
  }

  /** Whether the values of a quantity are from 0 to 1. */
  isGate(q) {
    const found = this.quantity(q);
    return found?.kind === "node" && found.node.range === "gate";
  }

  /** The number that a term of a node reads for one unit. */
  sourceOf(term, step, unit) {
    const element = term.elements ? term.elements[Math.min(unit, term.elements.length - 1)] : unit;
    return this.sourceNumber(term.source, step, element);
  }

  /** A state at the beginning of a step: that of the step before, unless the model changed it in between. */
  stateBefore(name, step, unit) {
    return this.changedStates ? { q: `before.${name}`, t: step, u: unit } : { q: name, t: this.previous(step), u: unit };
  }

  /** Whether a number isn't computed by the steps: a parameter, an input, or a state that the layer begins with. */
  isGiven(number) {
    return this.isParameter(number) || number.q === "x" || this.isStart(number) || this.quantity(number.q)?.kind === "before";
  }

  sourceNumber(source, step, unit) {
    if (source === "x") return { q: "x", t: step, u: unit };
    if (source.startsWith("before:")) return this.stateBefore(source.slice(7), step, unit);
    return { q: this.keys.get(source), t: step, u: unit };
  }

  /** The number that a node of the drawing, or another source of its lines, shows for one unit. */
  drawnNumber(source, step, unit) {
    const node = this.drawnNodes.get(source);
    if (!node) return this.sourceNumber(source, step, unit);
    return { q: this.quantitiesByValue.get(node.value) ?? this.keys.get(source), t: step, u: Math.min(unit, this.sizes[node.value] - 1) };
  }

  sourceSize(source) {
    if (source === "x") return this.features;
    if (source.startsWith("before:")) return this.sizes[this.statesByName.get(source.slice(7)).value];
    return this.sizes[this.nodesById.get(source).value];
  }

  /** The rows of arithmetic of a weighted sum. */
  weightedRows(term, step, unit) {
    return weightedRows(this, term, step, unit);
  }

  /** How a number follows from others; null if it is given or if its step isn't on the page. */
  derive(number) {
    return this.isGiven(number) || !this.stepIndices.has(number.t) ? null : derive(this, number);
  }

  /** The numbers that a number is directly computed from. */
  sources(number) {
    const derived = this.derive(number);
    if (!derived) return [];
    const factors = (derived.rows ?? []).flatMap((row) => row.factors).flatMap((one) => (one.constant === undefined ? [one] : one.source ? [one.source] : []));
    return derived.of ? [derived.of, ...factors] : factors;
  }
}

export const idOf = (number) => [number.q, number.t ?? "", number.u, number.j ?? ""].join("|");
