// The numbers of the steps of a layer: stored, or computed from stored states when they are looked at.

import { evaluatorsOf } from "./evaluator.js";
import { decodeBytes, decodeValues } from "./numbers.js";

const CACHED_VALUES = 4e6; // of the steps that were computed last

/** Numbers that are stored one step after the other. */
export class StoredSteps {
  constructor(values, steps, stepSize) {
    this.values = values;
    this.stepSize = stepSize;
    this.indices = new Map(steps.map((step, k) => [step, k]));
  }

  /** The numbers of a step. */
  row(step) {
    const from = this.indices.get(step) * this.stepSize;
    return this.values.subarray(from, from + this.stepSize);
  }
}

/**
 * Numbers that are computed a few steps at a time, from the state before them.
 *
 * The layer has length, backward and stepSize. The run has interval; starts, the states before every interval-th step
 * in the order of computation; and compute(step, states), which returns {row, states}: the numbers of the step, and
 * the states after it.
 */
export class ComputedSteps {
  constructor(layer, run) {
    this.layer = layer;
    this.run = run;
    this.cache = new Map(); // from the number of an interval to its steps; the one that was used last is at the end
    this.capacity = Math.max(2, Math.floor(CACHED_VALUES / (layer.stepSize * run.interval)));
  }

  row(step) {
    const { backward, length } = this.layer;
    const at = backward ? length - 1 - step : step;
    const interval = Math.floor(at / this.run.interval);
    const rows = this.cache.get(interval) ?? this.compute(interval);
    this.cache.delete(interval);
    this.cache.set(interval, rows);
    if (this.cache.size > this.capacity) this.cache.delete(this.cache.keys().next().value);
    return rows[at - interval * this.run.interval];
  }

  compute(interval) {
    const { backward, length } = this.layer;
    const from = interval * this.run.interval;
    const rows = [];
    let states = this.run.starts[interval];
    for (let at = from; at < Math.min(length, from + this.run.interval); at += 1) {
      const result = this.run.compute(backward ? length - 1 - at : at, states);
      rows.push(result.row);
      states = result.states;
    }
    return rows;
  }
}

/** What makes computed quantities the recorded ones: differences of their bits, and exceptions. */
class Corrections {
  constructor(data, quantities) {
    this.nodes = new Map(Object.entries(data).map(([name, { width, codes, positions, values }]) => [quantities[name], {
      width,
      codes: decodeBytes(codes),
      positions: new Int32Array(decodeBytes(positions).buffer),
      values: new Float32Array(decodeBytes(values).buffer),
    }]));
  }

  /** Return the recorded values of a node at a step. */
  correct(node, computed, step) {
    const found = this.nodes.get(node);
    if (!found) return computed;
    const { width, codes, positions, values } = found;
    const result = computed.slice();
    const from = step * result.length;
    if (width) {
      const bits = new Int32Array(result.buffer);
      const perByte = 8 / width;
      for (let i = 0; i < result.length; i += 1) {
        const position = from + i;
        const code = codes[Math.floor(position / perByte)] >> (width * (position % perByte));
        bits[i] += (code << (32 - width)) >> (32 - width); // with its sign
      }
    }
    for (let k = firstAtLeast(positions, from); positions[k] < from + result.length; k += 1) result[positions[k] - from] = values[k];
    return result;
  }
}

/** The index of the first number of a sorted list that isn't below a limit. */
function firstAtLeast(sorted, limit) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < limit) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Return the recorded run of a layer from the data that its steps are computed from. */
export function recordedRun(model, data, parameters) {
  const { interval, states, corrections } = data.computed;
  const { evaluators: [evaluator], draws } = evaluatorsOf(data.program);
  const found = new Corrections(corrections, data.program.programs[0].quantities);
  const drawn = draws ? draws.length / data.length : 0;
  const count = Math.ceil(data.length / interval);
  const decoded = Object.entries(states).map(([name, values]) => [name, decodeValues(values)]);
  const starts = Array.from({ length: count }, (_, k) => Object.fromEntries(decoded.map(([name, values]) => {
    const size = values.length / count;
    return [name, values.subarray(k * size, (k + 1) * size)];
  })));
  const compute = (step, before) => {
    const result = evaluator.run({ x: model.recordedInput(step), states: before, parameters,
      draws: draws && draws.subarray(step * drawn, (step + 1) * drawn), correct: (node, value) => found.correct(node, value, step) });
    return { row: model.numbersOf(result.values, step), states: result.states };
  };
  return { interval, starts, compute };
}
