// The run of large layers with the reader's changes: in slices, so that the page stays usable.

import { evaluatorsOf, withOverrides } from "./evaluator.js";
import { joinArrays } from "./numbers.js";
import { ComputedSteps } from "./steps.js";

const INTERVAL = 16; // steps from one state that is kept to the next

/** All layers, run with some changes. */
export class LongRun {
  constructor(models, edits) {
    this.parts = [];
    models.forEach((model, k) => {
      const below = this.parts.filter((part) => part.model.index === model.index - 1);
      this.parts.push(new PartRun(model, below, edits.filter((edit) => (edit.kind === "input" ? !below.length : edit.part === k))));
    });
    this.steps = this.run();
    this.done = 0;
    this.total = this.parts.reduce((total, part) => total + part.length, 0);
  }

  get progress() {
    return this.total ? this.done / this.total : 1;
  }

  /** Run for some time. Returns whether all steps are done. */
  advance(milliseconds) {
    const end = performance.now() + milliseconds;
    do {
      if (this.steps.next().done) return true;
      this.done += 1;
    } while (performance.now() < end);
    return false;
  }

  *run() {
    for (const part of this.parts) yield* part.run();
  }

  /** Show the numbers of the run. */
  apply() {
    for (const { model, rows, maps, edits } of this.parts) {
      model.replace(rows, maps.length ? Object.fromEntries(maps.map((map) => [map.name, map.result()])) : model.recordedMaps, edits.filter(({ kind }) => kind === "parameter"));
    }
  }
}

/** One layer in one direction, above the runs of others. */
class PartRun {
  constructor(model, below, edits) {
    Object.assign(this, { model, below, edits });
    this.range = this.findRange();
    const isChanged = this.range !== null;
    this.length = isChanged ? model.length : 0; // steps to run
    this.maps = isChanged ? Object.entries(model.recordedMaps ?? {}).filter(([name]) => model.quantity(name)).map(([name, map]) => new MapOfRun(model, name, map)) : [];
    this.outputs = isChanged ? new Float64Array(model.length * model.outputOf(model.recorded.row(0)).length) : null;
    this.parameters = { ...model.recordedParameterValues };
    for (const { kind, name, index, value } of edits) {
      if (kind === "parameter") this.parameters[name] = withOverrides(this.parameters[name], [{ unit: index, value }]);
    }
    this.holds = edits.filter(({ kind }) => kind === "hold");
    this.starts = [];
    this.rows = isChanged ? new ComputedSteps(model, { interval: INTERVAL, starts: this.starts, compute: (step, states) => this.compute(step, states) }) : model.recorded;
  }

  /** The first and last step whose numbers may change, or null. */
  findRange() {
    const { model, below, edits } = this;
    const last = model.length - 1;
    const steps = edits.flatMap((edit) => (edit.kind === "input" ? [edit.step] : edit.steps ?? [0, last]));
    steps.push(...below.flatMap((part) => part.range ?? []));
    if (!steps.length) return null;
    return model.backward ? [0, Math.max(...steps)] : [Math.min(...steps), last];
  }

  input(step) {
    if (this.below.length) return joinArrays(this.below.map((part) => part.output(step)));
    const edits = this.edits.filter((edit) => edit.kind === "input" && edit.step === step);
    return edits.length ? withOverrides(this.model.recordedInput(step), edits) : this.model.recordedInput(step);
  }

  output(step) {
    if (!this.outputs) return this.model.outputOf(this.model.recorded.row(step));
    const size = this.outputs.length / this.model.length;
    return this.outputs.subarray(step * size, (step + 1) * size);
  }

  /** The numbers of a step, and the states after it. Those that can't have changed are the recorded ones. */
  compute(step, states) {
    const { model, range: [low, high] } = this;
    if (step < low || step > high) {
      const row = model.recorded.row(step);
      return { row, states: model.statesAfter(row) };
    }
    const { programs, programOfStep } = model.program;
    const { evaluators, draws } = evaluatorsOf(model.program);
    const drawn = draws ? draws.length / model.length : 0;
    const result = evaluators[programs.length > 1 ? programOfStep[step] : 0].run({
      x: this.input(step), states, parameters: this.parameters,
      draws: draws && draws.subarray(step * drawn, (step + 1) * drawn),
      overrides: this.holds.filter(({ steps }) => steps === null || steps.includes(step)),
    });
    return { row: model.numbersOf(result.values, step), states: result.states };
  }

  *run() {
    const { model } = this;
    if (!this.length) return;
    let states = model.statesBefore(model.recorded.row(model.firstStep));
    for (const { kind, name, unit, value } of this.edits) {
      if (kind === "state") states[name] = withOverrides(states[name], [{ unit, value }]);
    }
    for (let at = 0; at < model.length; at += 1) {
      const step = model.backward ? model.length - 1 - at : at;
      if (at % INTERVAL === 0) this.starts.push(states);
      const result = this.compute(step, states);
      states = result.states;
      const output = model.outputOf(result.row);
      this.outputs.set(output, step * output.length);
      for (const map of this.maps) map.add(step, result.row);
      yield;
    }
  }
}

/** A heat map of the run: the means over bins, and statistics. */
class MapOfRun {
  constructor(model, name, { binSteps, binFeatures, rows, featureOrder, byIndex }) {
    Object.assign(this, { model, name, binSteps, binFeatures, rows, featureOrder });
    this.byIndex = byIndex ? new MapOfRun(model, name, byIndex) : null; // the same with the units in order
    this.index = model.valueIndex(name);
    this.sums = new Float64Array(Math.ceil(model.length / binSteps) * rows);
    this.line = new Int32Array(featureOrder.length); // of the map, for each feature
    featureOrder.forEach((feature, at) => { this.line[feature] = Math.floor(at / binFeatures); });
    this.statistics = { low: Infinity, high: -Infinity, sum: 0, finite: 0, count: 0, saturated: { gate: 0, tanh: 0 } };
  }

  add(step, row) {
    this.byIndex?.add(step, row);
    const { statistics, sums, line, rows } = this;
    const from = Math.floor(step / this.binSteps) * rows;
    const values = this.model.read(row, this.index);
    for (let k = 0; k < values.length; k += 1) {
      const value = values[k];
      sums[from + line[k]] += value;
      statistics.count += 1;
      if (!Number.isFinite(value)) continue;
      statistics.finite += 1;
      statistics.sum += value;
      if (value < statistics.low) statistics.low = value;
      if (value > statistics.high) statistics.high = value;
      if (value < 0.01 || value > 0.99) statistics.saturated.gate += 1;
      if (Math.abs(value) > 0.99) statistics.saturated.tanh += 1;
    }
  }

  result() {
    const { model, binSteps, binFeatures, rows, featureOrder, statistics } = this;
    const size = (at, bin, count) => Math.min(bin, count - at * bin);
    const means = this.sums.map((sum, k) => sum / (size(Math.floor(k / rows), binSteps, model.length) * size(k % rows, binFeatures, featureOrder.length)));
    return { binSteps, binFeatures, rows, featureOrder, statistics, means, byIndex: this.byIndex?.result() };
  }
}
