// How a number follows from others.

import { functionOf } from "./digits.js";
import { constantFormula, continuesNormalization } from "./formula.js";
import { parameterText } from "./names.js";
import { weightedRows } from "./weighted_rows.js";

const MAX_OPERAND_ELEMENTS = 8; // of a vector that a function reads

/**
 * How a number of a step follows from others.
 *
 * Returns null if that isn't known, else {parts, rows, of, glyph}: rows {sign, factors} whose products are added, as several parts {rows, total, sign}
 * if they are weighted sums of their own, and the function that is applied to the sum. A function of a whole vector has the numbers of the vector, too.
 * If a number can't be written as a sum, opaque is true, and the rows are the numbers that it is computed from.
 */
export function derive(model, number) {
  const { kind, node, term } = model.quantity(number.q);
  const { t: step, u: unit } = number;
  if (kind === "term" && !term.weighted) return { rows: [gainRow(model, term, step, unit)] };
  if (kind === "term") return isPlainSum(model, term) ? { rows: weightedRows(model, term, step, unit) } : opaqueRows(model, joinedTerms(node, term), step, unit);
  const parts = node.terms.flatMap((one, index) => (continuesNormalization(one) ? [] : [derivePart(model, node, one, index, step, unit)]));
  if (kind === "sum") return { rows: parts.map((one) => ({ sign: one.sign, factors: one.total ? [one.total] : one.rows[0].factors })), parts };
  switch (node.operation) {
    case "activation":
      return deriveActivation(model, node, number, parts);
    case "sum":
      if (parts.length === 1 && parts[0].isOpaque) return opaqueRows(model, node.terms, step, unit);
      return parts.some((one) => one.weighted) ? { parts, rows: parts.flatMap((one) => one.rows) } : { rows: node.terms.map((one) => expanded(model, one, step, unit)) };
    case "difference":
      return { rows: node.terms.map((one, index) => ({ ...expanded(model, one, step, unit), sign: index ? -1 : 1 })) };
    case "product":
      return { ...stepsBefore(model, node, step, unit), rows: [{ sign: 1, factors: factorsOf(model, node, step, unit) }] };
    case "quotient":
      return { rows: [{ sign: 1, factors: factorsOf(model, node, step, unit), quotient: true }] };
    case "unknown":
      return null;
    default:
      if (node.terms.length === 1 && functionOf(node.call) && !parts[0].weighted) return deriveActivation(model, node, number, parts);
      return opaqueRows(model, node.terms, step, unit, node.shapes.length > 0);
  }
}

function deriveActivation(model, node, { t, u }, parts) {
  const hasSum = model.hasSum(node);
  const of = hasSum ? { q: `sum.${model.keys.get(node.id)}`, t, u } : null;
  const size = node.shapes[0]?.reduce((product, length) => product * length, 1);
  const element = (k) => (hasSum ? { ...of, u: k } : model.sourceOf(node.terms[0], t, k));
  const vector = size ? Array.from({ length: size }, (_, k) => element(k)) : null;
  return { parts: hasSum ? parts : null, rows: parts.flatMap((one) => one.rows), of, glyph: node.glyph, call: node.call, vector, element: u };
}

const joinedTerms = (node, term) => (term.normalization ? node.terms.filter(({ normalization }) => normalization?.group === term.normalization.group) : [term]);

/** What some terms read: one element each, or the first elements of a vector. How many others there are is omitted. */
function opaqueRows(model, terms, step, unit, readsVectors = false) {
  let omitted = 0;
  const rows = terms.flatMap((term) => {
    const readsVector = term.source !== null && !term.call && (term.weighted || readsVectors);
    if (!readsVector) return [{ sign: 1, factors: [factorOf(model, term, step, unit)] }];
    const size = term.elements?.length ?? model.sourceSize(term.source);
    omitted += Math.max(0, size - MAX_OPERAND_ELEMENTS);
    return Array.from({ length: Math.min(size, MAX_OPERAND_ELEMENTS) }, (_, k) => ({ sign: 1, factors: [model.sourceOf(term, step, k)] }));
  });
  return { opaque: true, rows, omitted };
}

/** Lines to show before a product with a function or quotient that has no name, such as tanh(c): how c and it are computed. */
function stepsBefore(model, node, step, unit) {
  const isNameless = (source) => source && !model.labels.get(source.id);
  const quotient = node.terms.find((one) => isNameless(model.nodesById.get(one.source)) && model.nodesById.get(one.source).operation === "quotient");
  if (quotient) {
    const number = model.sourceOf(quotient, step, unit);
    return { before: [{ number, rows: model.derive(number).rows, isQuotient: true }] };
  }
  const term = node.terms.find((one) => {
    const source = model.nodesById.get(one.source);
    return source && !source.name && source.operation === "activation" && !source.shapes.length && source.terms.length === 1 && !source.terms[0].weighted;
  });
  if (!term) return {};
  const inner = model.sourceOf(term, step, unit);
  const { of, rows } = model.derive(inner);
  const operand = of ?? rows[0].factors[0];
  const before = operand.constant === undefined && operand.t === step && operand.q !== "x" ? model.derive(operand) : null;
  const isSum = before?.rows && !before.glyph && !before.opaque && !before.parts;
  return { before: [...(isSum ? [{ number: operand, rows: before.rows }] : []), { number: inner, call: model.nodesById.get(term.source).call, of: operand }] };
}

function isPlainSum(model, term) {
  return model.parameters.get(term.parameter)?.values && !term.normalization && term.gain === null && term.parameter !== "";
}

function derivePart(model, node, term, index, step, unit) {
  const total = model.isPart(node, term) ? { q: `${model.keys.get(node.id)}.${index}`, t: step, u: unit } : null;
  if (!term.weighted && total) return { sign: term.sign, rows: [gainRow(model, term, step, unit)], total };
  if (!term.weighted) return { sign: term.sign, rows: [{ sign: 1, factors: [factorOf(model, term, step, unit)] }], total: null };
  const rows = isPlainSum(model, term) ? weightedRows(model, term, step, unit) : null;
  const isOpaque = !rows && !total;
  const source = term.normalization ? null : term.source;
  return { sign: term.sign, weighted: true, isOpaque, source, rows: rows ?? [{ sign: 1, factors: [total ?? factorOf(model, term, step, unit)] }], total };
}

/** The markup of a constant. One of several elements has its index. */
const constantText = (model, text, valueIndex, unit) => constantFormula(text, valueIndex !== null && model.sizes[valueIndex] > 1 ? unit : null).markup;

/** The row of a product with parameters, or with numbers made of them. */
function gainRow(model, term, step, unit) {
  const text = constantText(model, term.text.replace(/[⊙·/]?\{\}[⊙·]?/, ""), term.gain, unit);
  return { sign: 1, factors: [model.sourceOf(term, step, unit), { constant: model.at(model.values, step, term.gain, unit), text, source: null }], quotient: term.divides };
}

/** The factors of a product or quotient. A weighted sum is a number of its own. */
function factorsOf(model, node, step, unit) {
  const key = model.keys.get(node.id);
  return node.terms.map((term, k) => (term.weighted && model.isPart(node, term) ? { q: `${key}.${k}`, t: step, u: unit } : factorOf(model, term, step, unit)));
}

/** What a term reads for one unit: a number, or a constant {constant, text}. */
export function factorOf(model, term, step, unit) {
  if (term.source === null || term.call || term.gain !== null) {
    const value = term.value === null ? Number(term.text) : model.at(model.values, step, term.value, unit);
    const text = term.source === null ? constantText(model, term.text, term.value, unit) : parameterText(term.text);
    return { constant: value, text, source: term.source && model.sourceOf(term, step, unit) };
  }
  return model.sourceOf(term, step, unit);
}

/** A term of a sum as a row. A product without a name is shown with its factors. */
function expanded(model, term, step, unit) {
  const source = model.nodesById.get(term.source);
  if (source && !model.labels.get(source.id) && source.operation === "product" && !term.call && term.gain === null) {
    const element = term.elements ? term.elements[unit] : unit;
    return { sign: term.sign, factors: factorsOf(model, source, step, element), product: model.sourceOf(term, step, unit) };
  }
  return { sign: term.sign, factors: [factorOf(model, term, step, unit)] };
}
