// Layer normalization and root mean square normalization: what is normalized, and with which parameters.

import { constantFormula } from "./formula.js";
import { weightedRows } from "./weighted_rows.js";

const MAX_PRODUCTS = 20_000; // of all sums that are normalized together

/**
 * What a number is normalized from: {rowsOf, size, index, gain, bias, eps, isCentered}. Null if it isn't normalized, or isn't known in full.
 *
 * rowsOf(k) returns the rows of arithmetic of the k-th number that is normalized; the number is the one at the index. The gain and the bias are constants, or null.
 */
export function normalizationOf(model, { q, t, u }) {
  const { kind, node, term } = model.quantity(q);
  if (kind === "term" && term.normalization) return ofSums(model, node, term, t, u);
  return kind === "node" && !node.terms[0]?.normalization ? ofVector(model, node, t, u) : null;
}

/** The function of a call: {isCentered, eps, names}, with the names of its parameters; null if it is another one, or not of the whole vector. */
function readCall({ stored }, call, size) {
  const match = /^(layer|rms)_norm\(\{\}, torch\.Size\(\[(\d+)\]\)(.*)\)$/.exec(call ?? "");
  if (!match || Number(match[2]) !== size) return null;
  const [, text] = /eps=([\w.-]+)/.exec(match[3]) ?? [];
  const smallest = stored instanceof Float64Array ? 2 ** -52 : 2 ** -23; // what torch adds by default
  return { isCentered: match[1] === "layer", eps: text === "None" ? smallest : Number(text), names: [...match[3].matchAll(/(\w+)=\{\}/g)].map(([, name]) => name) };
}

/** Add the gain and the bias of one element to what a call says. */
function withParameters(model, { names, ...read }, values, texts, step, index) {
  const constant = (name) => {
    const k = names.indexOf(name);
    return k < 0 ? null : { constant: model.at(model.values, step, values[k], index), text: constantFormula(texts[k], index).markup, source: null };
  };
  return names.length === values.length ? { ...read, index, gain: constant("weight"), bias: constant("bias") } : null;
}

function ofVector(model, node, step, unit) {
  const [of, ...parameters] = node.terms;
  const size = model.sizes[node.value];
  const read = readCall(model, node.call, size);
  if (!read || !of.source || of.weighted || of.call || of.gain !== null || parameters.some((one) => one.source !== null)) return null;
  const found = withParameters(model, read, parameters.map((one) => one.value), parameters.map((one) => one.text), step, unit);
  return found && { ...found, size, rowsOf: (k) => [{ sign: of.sign, factors: [model.sourceOf(of, step, k)] }] };
}

function ofSums(model, node, term, step, unit) {
  const { group, rows: [first], size, call, parameters, text } = term.normalization;
  const read = readCall(model, call, size);
  const terms = node.terms.filter(({ normalization }) => normalization?.group === group);
  const isWhole = (rows) => !rows || (rows[0] === 0 && rows[1] === size);
  const areKnown = terms.every((one) => one.weighted && one.gain === null && one.rows && isWhole(one.rows) && isWhole(one.biasRows) && model.parameters.get(one.parameter)?.values);
  const isShort = size * terms.reduce((count, one) => count + model.sourceSize(one.source), 0) <= MAX_PRODUCTS;
  if (!read || !areKnown || !isShort) return null;
  const texts = text.slice(text.indexOf("{}") + 2, text.lastIndexOf(")")).split(", ").slice(1);
  const found = withParameters(model, read, parameters, texts, step, first + unit);
  const rowsOf = (k) => terms.flatMap((one) => weightedRows(model, one, step, k).map((row) => ({ ...row, sign: row.sign * one.normalization.sign })));
  return found && { ...found, size, rowsOf };
}
