// Runs the steps of a layer again for changed numbers, from the programs of unrolled/tracing/step_graph.py.
// Change both together. Tensors are flat typed arrays in row-major order.

import { decodeValues } from "./numbers.js";
import { ELEMENT_FUNCTIONS, REDUCTIONS, VECTOR_FUNCTIONS } from "./tensor_functions.js";

// --- Instructions. Each function below returns a function from the values of all nodes to that of one. ---

const sizeOf = (shape) => shape.reduce((product, size) => product * size, 1);
const isReference = (arg) => arg !== null && typeof arg === "object" && "ref" in arg;
const referencesOf = (arg) => (Array.isArray(arg) ? arg.flatMap(referencesOf) : isReference(arg) ? [arg.ref] : []);
const toNumber = (arg) => {
  if (typeof arg === "boolean") return Number(arg);
  return arg !== null && typeof arg === "object" ? Number(arg.number.replace("inf", "Infinity")) : arg;
};
const toBool = (x) => (Number(x) === 0 ? 0 : 1);

function createArray(dtype, size) {
  if (dtype === "float32") return new Float32Array(size);
  return dtype === "bool" ? new Uint8Array(size) : new Float64Array(size); // integers, too
}

/** Return numbers in the array of a dtype: the array itself if it is one already. */
function convert(numbers, dtype) {
  const result = createArray(dtype, numbers.length);
  if (numbers.constructor === result.constructor && !dtype.includes("int")) return numbers;
  const rounded = dtype === "bool" ? toBool : dtype.startsWith("float") ? Number : Math.trunc;
  for (let i = 0; i < result.length; i += 1) result[i] = rounded(numbers[i]);
  return result;
}

/** Return how far apart the elements along each axis are, with 0 for axes of size 1, which are repeated. */
function stridesOf(shape) {
  let stride = 1;
  return shape.map((_, k) => {
    const axis = shape.length - 1 - k;
    const current = shape[axis] === 1 ? 0 : stride;
    stride *= shape[axis];
    return current;
  }).reverse();
}

/** Return the flat index in an operand for every combination of indices, the last one fastest. */
function flatIndices(sizes, strides) {
  let indices = [0];
  sizes.forEach((size, axis) => {
    indices = indices.flatMap((start) => Array.from({ length: size }, (_, k) => start + k * strides[axis]));
  });
  return Int32Array.from(indices);
}

function elementwise(compute, { args, shape, dtype }, nodes) {
  const size = sizeOf(shape);
  const operands = args.map((arg) => {
    if (!isReference(arg)) return { constant: new Array(size).fill(toNumber(arg)) };
    const from = nodes[arg.ref].shape;
    const missing = new Array(shape.length - from.length).fill(0);
    return { ref: arg.ref, map: sizeOf(from) === size ? null : flatIndices(shape, [...missing, ...stridesOf(from)]) };
  });
  const isFloat = dtype.startsWith("float");
  return (values) => {
    // The function ignores the operands that it doesn't take.
    const [a, b = a, c = a, d = a] = operands.map(({ ref, map, constant }) => {
      if (constant) return constant;
      return map ? Array.from(map, (k) => values[ref][k]) : values[ref];
    });
    const result = isFloat ? createArray(dtype, size) : new Array(size);
    for (let i = 0; i < size; i += 1) result[i] = compute(a[i], b[i], c[i], d[i]);
    return isFloat ? result : convert(result, dtype);
  };
}

/** Copy elements in runs: of which operand, from where, how many, how far apart. Operand -1 is a number. */
function move({ args: [sources, runs, fill], shape, dtype }, nodes) {
  const size = sizeOf(shape);
  const [operand, start, , stride] = runs[0] ?? [];
  const isSlice = runs.length === 1 && operand >= 0 && (stride === 1 || size === 1);
  if (isSlice && nodes[sources[operand].ref].dtype === dtype) {
    return (values) => values[sources[operand].ref].subarray(start, start + size);
  }
  return (values) => {
    const result = createArray(dtype, size).fill(toNumber(fill));
    let position = 0;
    for (const [from, first, count, step] of runs) {
      const source = from < 0 ? null : values[sources[from].ref];
      for (let k = 0; source && k < count; k += 1) result[position + k] = source[first + k * step];
      position += count;
    }
    return result;
  };
}

/** Sum products over the labels that the result doesn't have, in double precision, and round once. */
function einsum({ args: [operands, labels, outLabels, bias], shape, dtype }, nodes) {
  const sizes = {};
  const strides = operands.map(({ ref }, which) => {
    const byLabel = {};
    stridesOf(nodes[ref].shape).forEach((stride, axis) => {
      const label = labels[which][axis];
      sizes[label] = Math.max(sizes[label] ?? 0, nodes[ref].shape[axis]);
      byLabel[label] = (byLabel[label] ?? 0) + stride; // a label that occurs twice is a diagonal
    });
    return byLabel;
  });
  const summed = Object.keys(sizes).filter((label) => !outLabels.includes(Number(label)));
  const tables = (which) => [outLabels, summed].map((some) =>
    flatIndices(some.map((label) => sizes[label]), some.map((label) => strides[which][label] ?? 0)));
  const indices = operands.map((_, which) => tables(which));
  const isContiguous = operands.length === 2 && indices.every(([, steps]) => steps.every((step, k) => step === k));
  const size = sizeOf(shape);
  const count = sizeOf(summed.map((label) => sizes[label]));
  return (values) => {
    const result = createArray(dtype, size);
    const arrays = operands.map(({ ref }) => values[ref]);
    const [a, b] = arrays;
    const offsets = bias ? values[bias.ref] : [0]; // one for each column, or one for all
    if (isContiguous) {
      const [[startsA], [startsB]] = indices;
      for (let i = 0; i < size; i += 1) result[i] = dot(a, startsA[i], b, startsB[i], count) + offsets[i % offsets.length];
      return result;
    }
    for (let i = 0; i < size; i += 1) {
      let total = 0;
      if (arrays.length === 2) {
        const [[startsA, stepsA], [startsB, stepsB]] = indices;
        for (let k = 0; k < count; k += 1) total += a[startsA[i] + stepsA[k]] * b[startsB[i] + stepsB[k]];
      } else {
        for (let k = 0; k < count; k += 1) {
          total += indices.reduce((product, [starts, steps], which) => product * arrays[which][starts[i] + steps[k]], 1);
        }
      }
      result[i] = total + offsets[i % offsets.length];
    }
    return result;
  };
}

/** Return a sum of products. Four sums at a time take less time than one. */
function dot(a, startA, b, startB, count) {
  let first = 0;
  let second = 0;
  let third = 0;
  let fourth = 0;
  let k = 0;
  for (; k + 3 < count; k += 4) {
    first += a[startA + k] * b[startB + k];
    second += a[startA + k + 1] * b[startB + k + 1];
    third += a[startA + k + 2] * b[startB + k + 2];
    fourth += a[startA + k + 3] * b[startB + k + 3];
  }
  for (; k < count; k += 1) first += a[startA + k] * b[startB + k];
  return first + second + (third + fourth);
}

/** Apply a function to each vector, given the number of vectors before, their length and the number after. */
function alongVectors(compute, isReduction, { args: [{ ref }, [before, length, after], ...others], shape, dtype }) {
  const size = sizeOf(shape);
  const parameters = others.map(toNumber);
  return (values) => {
    const result = new Array(size);
    const source = values[ref];
    for (let i = 0; i < before; i += 1) {
      for (let j = 0; j < after; j += 1) {
        const first = i * length * after + j;
        const vector = compute(Array.from({ length }, (_, k) => source[first + k * after]), ...parameters);
        if (isReduction) result[i * after + j] = vector;
        else vector.forEach((x, k) => { result[first + k * after] = x; });
      }
    }
    return convert(result, dtype);
  };
}

function gather({ args: [{ ref }, [, length, after], index, count], shape, dtype }) {
  const size = sizeOf(shape);
  return (values) => {
    const result = createArray(dtype, size);
    for (let i = 0; i < size; i += 1) {
      const row = Math.floor(i / (count * after));
      result[i] = values[ref][(row * length + values[index.ref][i]) * after + (i % after)];
    }
    return result;
  };
}

const STRUCTURAL_FUNCTIONS = { move, einsum, gather };

function compileInstruction(node, nodes) {
  const name = node.function;
  if (Object.hasOwn(ELEMENT_FUNCTIONS, name)) return elementwise(ELEMENT_FUNCTIONS[name], node, nodes);
  if (Object.hasOwn(REDUCTIONS, name)) return alongVectors(REDUCTIONS[name], true, node);
  if (Object.hasOwn(VECTOR_FUNCTIONS, name)) return alongVectors(VECTOR_FUNCTIONS[name], false, node);
  return STRUCTURAL_FUNCTIONS[name](node, nodes);
}

// --- Steps, layers and models. ---

/** Runs one step. The program is one of those of a LayerProgram, the constants are all of them, as typed arrays. */
export class StepEvaluator {
  constructor(program, constants = []) {
    const { nodes } = program;
    this.program = program;
    this.nodes = nodes;
    this.constants = constants;
    this.compiled = nodes.map((node) => node.function && compileInstruction(node, nodes));
    this.isFixed = []; // whether a node follows from parameters and constants alone
    for (const node of nodes) {
      this.isFixed.push(node.function ? referencesOf(node.args).every((ref) => this.isFixed[ref]) : ["parameter", "constant"].includes(node.leaf));
    }
    this.fixed = new Map(); // the values of these nodes, for the parameters of the last run
  }

  /**
   * Run the step.
   *
   * The input, the draws and each state and parameter by name are arrays. An override {name, unit, value} holds a
   * quantity: everything after it uses the value. Without a unit, it holds all units, at a number or an array.
   * correct(k, value) returns the value of node k to continue with.
   * Returns {values, states}: each quantity and each new state by name.
   */
  run({ x, states, parameters, draws = null, overrides = [], correct = null }) {
    if (parameters !== this.parameters) this.fixed.clear();
    this.parameters = parameters;
    const { quantities, states: newStates } = this.program;
    const leaf = {
      input: () => x,
      draws: () => draws,
      state: ({ name }) => states[name],
      parameter: ({ name }) => parameters[name],
      constant: ({ index }) => this.constants[index],
    };
    const values = [];
    this.nodes.forEach((node, k) => {
      let value = this.fixed.get(k) ?? (node.function ? this.compiled[k](values) : convert(leaf[node.leaf](node), node.dtype));
      if (this.isFixed[k]) this.fixed.set(k, value);
      if (correct) value = correct(k, value);
      const held = overrides.filter(({ name }) => quantities[name] === k);
      values.push(held.length ? convert(withOverrides(Array.from(value), held), node.dtype) : value);
    });
    const read = (refs) => Object.fromEntries(Object.entries(refs).map(([name, ref]) => [name, values[ref]]));
    return { values: read(quantities), states: read(newStates) };
  }
}

/** Return a copy of an array with other values. */
export function withOverrides(array, overrides) {
  const result = array.slice();
  for (const { unit = null, value } of overrides) {
    if (unit !== null) result[unit] = value;
    else result.forEach((_, k) => { result[k] = typeof value === "number" ? value : value[k]; });
  }
  return result;
}

const evaluatorsOfPrograms = new WeakMap();

/** Return the evaluators of a layer's programs, which are kept for its next run. */
export function evaluatorsOf(data) {
  if (!evaluatorsOfPrograms.has(data)) {
    const constants = data.constants.map(decodeValues);
    const draws = data.draws && decodeValues(data.draws);
    const evaluators = data.programs.map((program) => new StepEvaluator(program, constants));
    evaluatorsOfPrograms.set(data, { evaluators, draws });
  }
  return evaluatorsOfPrograms.get(data);
}

/**
 * Run all steps of one layer in one direction.
 *
 * The layer has a program (the data of a LayerProgram), a direction, the input of all steps, and initialState and
 * parameters by name. The edits are a list of
 *   {kind: "input", step, unit, value}, {kind: "state", name, unit, value}, {kind: "parameter", name, index, value},
 *   {kind: "hold", name, unit, steps, value}: as an override of the steps in the list; without a list, of all steps.
 * Returns {values, stateBefore, finalState, output}: arrays by name, those over time as (time, size), and the first
 * state at each step.
 */
export function runLayer(layer, edits = []) {
  const { programs, programOfStep } = layer.program;
  const { evaluators, draws } = evaluatorsOf(layer.program);
  const length = programOfStep.length;
  const width = layer.input.length / length;
  const drawn = draws ? draws.length / length : 0;
  const input = layer.input.slice();
  const parameters = { ...layer.parameters };
  let states = { ...layer.initialState };
  for (const { kind, name, step, unit, index, value } of edits) {
    if (kind === "input") input[step * width + unit] = value;
    if (kind === "parameter") parameters[name] = withOverrides(parameters[name], [{ unit: index, value }]);
    if (kind === "state") states[name] = withOverrides(states[name], [{ unit, value }]);
  }
  const holds = edits.filter(({ kind }) => kind === "hold");
  const values = {};
  const stateBefore = {};
  const store = (arrays, step, all) => {
    for (const [name, array] of Object.entries(arrays)) {
      all[name] ??= new array.constructor(array.length * length);
      all[name].set(array, array.length * step);
    }
  };
  for (let count = 0; count < length; count += 1) {
    const step = layer.direction === "backward" ? length - 1 - count : count;
    store(states, step, stateBefore);
    const result = evaluators[programOfStep[step]].run({
      x: input.subarray(step * width, (step + 1) * width),
      states,
      parameters,
      draws: draws && draws.subarray(step * drawn, (step + 1) * drawn),
      overrides: holds.filter(({ steps = null }) => steps === null || steps.includes(step)),
    });
    store(result.values, step, values);
    states = result.states;
  }
  const output = values[Object.keys(programs[0].states)[0]];
  return { values, stateBefore, finalState: states, output };
}

/**
 * Run all layers and directions of a model. Each layer has its number as layer, and the layers are in the order in
 * which they run. An edit also has a part, the index of its layer in the list. Edits of the input have none.
 * Returns the result of each.
 */
export function runModel(layers, edits = []) {
  const results = [];
  layers.forEach((layer, part) => {
    const below = results.filter((_, k) => layers[k].layer === layer.layer - 1).map(({ output }) => output);
    const input = below.length ? joinFeatures(below, layer.program.programOfStep.length) : layer.input;
    const own = edits.filter((edit) => (edit.kind === "input" ? !below.length : edit.part === part));
    results.push(runLayer({ ...layer, input }, own));
  });
  return results;
}

/** Concatenate the features of the directions at each step. */
function joinFeatures(arrays, length) {
  const result = new arrays[0].constructor(arrays.reduce((total, array) => total + array.length, 0));
  const width = result.length / length;
  let column = 0;
  for (const array of arrays) {
    const size = array.length / length;
    for (let step = 0; step < length; step += 1) {
      result.set(array.subarray(step * size, (step + 1) * size), step * width + column);
    }
    column += size;
  }
  return result;
}
