// The values of one layer in one direction, by key: "input", "quantity i", "before h", "parameter weight_ih".

import { decodeValues, largestMagnitude } from "./numbers.js";

/** One layer in one direction. A step index counts the steps on the page: steps[stepIndex] is the time step. */
export class Layer {
  constructor(data) {
    Object.assign(this, data);
    this.backward = data.direction === "backward";
    this.rows = new Map(); // what has values at every step, by key
    for (const quantity of data.quantities) {
      const heatMap = quantity.heatMap && { ...quantity.heatMap, values: decodeValues(quantity.heatMap.values) };
      this.rows.set(quantity.key, { ...quantity, values: decodeValues(quantity.values), heatMap });
    }
    for (const [name, values] of Object.entries(data.stateBefore)) {
      const { size, ownRange, description } = this.rows.get(`quantity ${name}`);
      const key = `before ${name}`;
      this.rows.set(key, { key, size, ownRange, description, values: decodeValues(values), equations: [] });
    }
    this.parametersByKey = new Map();
    for (const parameter of data.parameters) {
      const values = parameter.values && decodeValues(parameter.values);
      const key = `parameter ${parameter.name}`;
      this.parametersByKey.set(key, { ...parameter, key, values });
    }
    this.unnamedTensors = data.unnamedTensors.map(decodeValues);
    this.stepIndices = new Map(data.steps.map((step, stepIndex) => [step, stepIndex]));
    this.parameterRange = largestMagnitude([...this.parametersByKey.values()].map((one) => one.values || [])) || 1;
  }

  /** Return a value of a step, or of a parameter. It is undefined if it isn't on the page. */
  value(key, stepIndex, index) {
    const row = this.rows.get(key);
    if (row) return row.values[stepIndex * row.size + index];
    return this.parametersByKey.get(key)?.values?.[index];
  }

  /** Return the value with the strongest color, which most quantities share. */
  colorRange(key) {
    return (this.rows.get(key).ownRange ?? this.sharedRange) || 1;
  }

  /** Return the index of the step on the page that is nearest to a time step. */
  nearestStepIndex(step) {
    let nearest = 0;
    this.steps.forEach((candidate, stepIndex) => {
      if (Math.abs(candidate - step) < Math.abs(this.steps[nearest] - step)) nearest = stepIndex;
    });
    return nearest;
  }

  /** Return the time step that was computed before this one, whether or not it is on the page. */
  previousStep(step) {
    return this.backward ? step + 1 : step - 1;
  }
}

/** Return the name of a quantity, state or parameter in the code, given its key. */
export function nameOf(key) {
  return key === "input" ? "x" : key.slice(key.indexOf(" ") + 1);
}
