// The arithmetic behind one number, as unrolled/tracing/explain.py formats it with four digits. Change both together.

import { formatNumber, formatOperand, MINUS, withMinus } from "./numbers.js";
import { visibleLabel } from "./dom.js";
import { nameOf } from "./layer.js";

const INFIX = { add: " + ", sub: ` ${MINUS} `, mul: "·", div: " / " };
const [SUM, QUOTIENT, PRODUCT, ATOM] = [0, 1, 2, 3]; // operator precedence, loosest first
const PRECEDENCE = { // of the expression, and the minimum of its left and right operands
  add: [SUM, SUM, SUM], sub: [SUM, SUM, QUOTIENT], mul: [PRODUCT, PRODUCT, PRODUCT], div: [QUOTIENT, PRODUCT, ATOM],
};

const MAX_VISITED = 20000; // elements without a name that are searched for the named values behind them

/**
 * Explain how one element of a quantity was computed.
 *
 * Returns {text, operands, missing}: the arithmetic, the values it uses as {key, index, weight} from the largest
 * weight to the smallest, and whether some of these values are not on the page.
 */
export function explain(layer, stepIndex, name, index, maxTerms = 8) {
  const value = withMinus(formatNumber(layer.value(`quantity ${name}`, stepIndex, index)));
  const { graph, unnamed, notReproduced } = layer.stepGraphs[stepIndex];
  const { nodes, roots } = layer.graphs[graph];
  const isReproduced = !(Object.hasOwn(notReproduced, name) && notReproduced[name].includes(index));
  if (!Object.hasOwn(roots, name) || !isReproduced) return { text: `${value} = ${value}`, operands: [] };
  const formatter = new ArithmeticFormatter(layer, stepIndex, nodes, unnamed, maxTerms);
  const [nodeIndex, elementIndex] = formatter.source(roots[name], index);
  const node = nodes[nodeIndex];
  const text = node.kind !== "value" ? formatter.format(nodeIndex, elementIndex)[0]
    : node.name ? node.name + formatSubscript(node.shape, elementIndex) : value;
  if (node.kind === "value") formatter.read(nodeIndex, elementIndex, 0);
  const operands = formatter.operands.sort((a, b) => b.weight - a.weight);
  return { text: `${text} = ${value}`, operands: withoutDuplicates(operands), missing: formatter.missing };
}

class ArithmeticFormatter {
  constructor(layer, stepIndex, nodes, unnamed, maxTerms) {
    Object.assign(this, { layer, stepIndex, nodes, unnamed, maxTerms, operands: [], missing: false, visited: new Set() });
  }

  /** Follow an element through functions that only move elements, to where it came from. */
  source(node, index) {
    while (this.nodes[node].kind === "moved") {
      const { runs, operands } = this.nodes[node];
      let offset = index;
      const run = runs.find(([, , count]) => (offset < count ? true : ((offset -= count), false)));
      [node, index] = [operands[run[0]], run[1] + offset * run[3]];
    }
    return [node, index];
  }

  /** Return the value of an element, and record it as an operand. */
  read(node, index, weight) {
    const [sourceNode, sourceIndex] = this.source(node, index);
    const { source, computedBy } = this.nodes[sourceNode];
    if (computedBy !== undefined) return this.read(computedBy, sourceIndex, weight);
    if (source === "complex") {
      this.missing = true;
      return NaN;
    }
    if (source.startsWith("unnamed")) {
      this.collectOperands(sourceNode, sourceIndex, weight ?? 0);
      return this.layer.unnamedTensors[this.unnamed[Number(source.slice(8))]][sourceIndex];
    }
    const value = this.layer.value(source, this.stepIndex, sourceIndex);
    if (value === undefined) this.missing = true;
    this.operands.push({ key: source, index: sourceIndex, weight: weight ?? Math.abs(value) });
    return value ?? NaN;
  }

  /** Record the named values that an element without a name was computed from. */
  collectOperands(node, index, weight) {
    const [sourceNode, sourceIndex] = this.source(node, index);
    const id = `${sourceNode}:${sourceIndex}`;
    if (this.visited.has(id) || this.visited.size > MAX_VISITED) return;
    this.visited.add(id);
    const data = this.nodes[sourceNode];
    const { kind, source, computedBy, operands } = data;
    if (computedBy !== undefined) this.collectOperands(computedBy, sourceIndex, weight);
    else if (kind === "value") {
      if (!source.startsWith("unnamed") && source !== "complex") this.operands.push({ key: source, index: sourceIndex, weight });
    } else if (kind === "sum") {
      const { outputSize, inputSize, weightTransposed } = data;
      const unit = sourceIndex % outputSize;
      const row = Math.floor(sourceIndex / outputSize);
      for (let k = 0; k < inputSize; k += 1) {
        this.collectOperands(operands[0], row * inputSize + k, weight);
        this.collectOperands(operands[1], weightTransposed ? k * outputSize + unit : unit * inputSize + k, weight);
      }
      if (operands.length > 2) this.collectOperands(operands[2], unit, weight);
    } else if (kind === "rows") {
      const { hasRows, operandSizes, rowCount, shape } = data;
      const row = Math.floor((sourceIndex * rowCount) / shape.reduce((a, b) => a * b, 1));
      operands.forEach((operand, which) => {
        const count = hasRows[which] ? operandSizes[which] / rowCount : operandSizes[which];
        for (let k = 0; k < count; k += 1) this.collectOperands(operand, (hasRows[which] ? row * count : 0) + k, weight);
      });
    } else {
      operands.forEach((operand, which) => this.collectOperands(operand, data.elementMaps?.[which]?.[sourceIndex] ?? sourceIndex, weight));
    }
  }

  /** Format one element. Returns the expression and its precedence. */
  format(node, index) {
    const { kind, name, operands, elementMaps } = this.nodes[node];
    const operand = (which) => [operands[which], elementMaps?.[which]?.[index] ?? index];
    switch (kind) {
      case "constant": return [withMinus(name), ATOM];
      case "infix": return this.infix(name, operand(0), operand(1));
      case "negated": return [MINUS + this.operand(operand(0), ATOM, false), PRODUCT];
      case "sum": return this.weightedSum(this.nodes[node], index);
      case "moved": return this.format(...this.source(node, index));
      case "call": return [`${name}(${operands.map((_, which) => this.format(...operand(which))[0]).join(", ")})`, ATOM];
      case "rows": return [this.functionOfRows(this.nodes[node], index), ATOM];
      default: return [formatOperand(this.read(node, index)), ATOM];
    }
  }

  /** Format an operand, in parentheses if its precedence is below the minimum, or a sign may not come first. */
  operand([node, index], minimum, signed = true) {
    const [text, precedence] = this.format(node, index);
    return precedence >= minimum && (signed || !text.startsWith(MINUS)) ? text : `(${text})`;
  }

  infix(name, left, right) {
    const [precedence, leftMinimum, rightMinimum] = PRECEDENCE[name];
    const leftText = this.operand(left, leftMinimum);
    if (name === "add") return [joinTerms([leftText, this.operand(right, rightMinimum)]), precedence];
    return [leftText + INFIX[name] + this.operand(right, rightMinimum, false), precedence];
  }

  /** Format a weighted sum: each weight times its input, plus the bias. */
  weightedSum({ operands, outputSize, inputSize, weightTransposed }, index) {
    const unit = index % outputSize;
    const row = Math.floor(index / outputSize);
    const products = [];
    for (let k = 0; k < inputSize; k += 1) {
      const operandsBefore = this.operands.length;
      const value = this.read(operands[0], row * inputSize + k);
      const weight = this.read(operands[1], weightTransposed ? k * outputSize + unit : unit * inputSize + k);
      const magnitude = Math.abs(weight * value);
      const size = Number.isFinite(magnitude) ? magnitude : Infinity;
      for (const operand of this.operands.slice(operandsBefore)) operand.weight = size;
      products.push({ k, weight, value, size });
    }
    const largest = [...products].sort((a, b) => b.size - a.size).slice(0, this.maxTerms);
    const shown = new Set(largest.map((product) => product.k));
    const texts = products.filter((product) => shown.has(product.k))
      .map(({ weight, value }) => `${formatOperand(weight)}·${formatOperand(value).replace(/^−.*/, "($&)")}`);
    const others = products.filter((product) => !shown.has(product.k));
    if (others.length) {
      const rest = exactSum(others.map(({ weight, value }) => weight * value));
      texts.push(`(${others.length} more terms: ${formatOperand(rest)})`);
    }
    if (operands.length > 2) texts.push(formatOperand(this.read(operands[2], unit)));
    return [joinTerms(texts), texts.length > 1 ? SUM : PRODUCT];
  }

  /** Format one element of a function of whole rows: the function, its operands and a subscript. */
  functionOfRows({ name, operands, rowCount, hasRows, operandSizes, shape }, index) {
    const row = Math.floor((index * rowCount) / shape.reduce((a, b) => a * b, 1));
    const texts = operands.map((operand, which) => {
      const count = hasRows[which] ? operandSizes[which] / rowCount : operandSizes[which];
      const first = hasRows[which] ? row * count : 0;
      const values = Array.from({ length: count }, (_, k) => formatOperand(this.read(operand, first + k)));
      return `[${count > this.maxTerms ? [...values.slice(0, this.maxTerms), "…"].join(", ") : values.join(", ")}]`;
    });
    return `${name}(${texts.join(", ")})${formatSubscript(shape, index)}`;
  }
}

/** Join the terms of a sum. A minus sign of a term replaces the plus sign before it. */
function joinTerms(texts) {
  return texts.reduce((sum, text) => (text.startsWith(MINUS) ? `${sum} ${MINUS} ${text.slice(1)}` : `${sum} + ${text}`));
}

/** Sum with compensation for rounding errors (Neumaier, 1974). */
function exactSum(values) {
  let sum = 0;
  let compensation = 0;
  for (const value of values) {
    const next = sum + value;
    compensation += Math.abs(sum) >= Math.abs(value) ? sum - next + value : value - next + sum;
    sum = next;
  }
  return Number.isFinite(sum) ? sum + compensation : sum;
}

/** Format the position of an element in its row as [3]; empty if it is the only element. */
function formatSubscript(shape, index) {
  if (shape.reduce((a, b) => a * b, 1) <= 1) return "";
  return `[${formatIndex(shape.length > 1 && shape[0] === 1 ? shape.slice(1) : shape, index)}]`;
}

/** Format a flat index as one index for each axis. */
export function formatIndex(shape, index) {
  const indices = [];
  for (const size of [...shape].reverse()) {
    indices.unshift(index % size);
    index = Math.floor(index / size);
  }
  return indices.join(", ");
}

function withoutDuplicates(operands) {
  const seen = new Set();
  return operands.filter(({ key, index }) => {
    const id = `${key}:${index}`;
    return seen.has(id) ? false : seen.add(id);
  });
}

/** Describe a value that isn't computed by the step: an input, a parameter or an initial state. */
export function describeSource(layer, stepIndex, key, { labels, dropout }) {
  const step = layer.steps[stepIndex];
  const label = labels ? ` (${visibleLabel(labels[step])})` : "";
  if (key === "input") {
    return layer.layer === 0
      ? `x is the input of the layer at step ${step}${label}. It is not computed.`
      : `x is the output of the layer below at step ${step}${label}${dropout ? ", after dropout" : ""}.`;
  }
  if (key.startsWith("parameter")) return `${nameOf(key)} is a parameter. It is the same at every step, and training updates it.`;
  return `${nameOf(key)} before the first step is the initial state. It is not computed.`;
}
