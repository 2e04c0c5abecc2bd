// The gradient of a parameter: what each time step of each row adds to it.

import { createElement, createMarkup } from "./dom.js";
import { shown } from "./digits.js";
import { createDigitsNote, createNote, Ledger } from "./ledger.js";
import { decodeValues } from "./numbers.js";

const decodeArrays = (values) => Object.fromEntries(Object.entries(values).map(([name, one]) => [name, decodeValues(one)]));

/** The recorded gradients of a layer's parameters, from the data of weight_gradients.py. A sample is a step of a row. */
export class WeightGradients {
  constructor(model, data) {
    this.model = model;
    this.steps = data.steps;
    this.rows = data.rows;
    this.count = data.steps.length;
    this.isBatch = new Set(data.rows).size > 1;
    this.deltas = decodeArrays(data.deltas); // the gradients of weighted sums
    this.operands = decodeArrays(data.operands); // what their weights are multiplied with
    this.others = decodeArrays(data.others); // what each sample adds to the gradient of other parameters
    this.terms = model.nodes.flatMap((node) => node.terms.map((term, k) => ({ node, term, key: `${node.id}.${k}` }))).filter(({ key }) => key in this.deltas);
  }

  /** Where a parameter's element is in weighted sums: [{node, term, key, unit, element}]. A bias has no element. */
  uses({ q, u, j }) {
    return this.terms.flatMap((use) => {
      const { term } = use;
      const [first, stop] = term.rows;
      if (q === term.bias) {
        const unit = u - (term.biasRows?.[0] ?? 0);
        return unit >= 0 && unit < stop - first ? [{ ...use, unit, element: null }] : [];
      }
      const unit = (term.transposed ? j : u) - first;
      if (q !== term.parameter || unit < 0 || unit >= stop - first) return [];
      const found = this.model.weightedRows(term, this.steps[0], unit).find(({ factors: [one, source] }) => source && one.u === u && one.j === j);
      return found ? [{ ...use, unit, element: found.factors[1].u }] : [];
    });
  }

  /** What a sample adds through a weighted sum: the gradient of the sum, and what the weight is multiplied with. */
  factors({ term, key, unit, element }, sample) {
    const at = (values, index) => values[(sample * values.length) / this.count + index];
    return [at(this.deltas[key], unit), element === null ? 1 : at(this.operands[term.source], element)];
  }

  /** What a sample adds to the gradient of a parameter that isn't in a weighted sum. */
  other({ q, u, j }, sample) {
    const columns = this.model.parameters.get(q).shape[1];
    return this.others[q][(sample * this.others[q].length) / this.count + (columns === undefined ? u : u * columns + j)];
  }

  /** The gradient of an element of a parameter. */
  total(number) {
    let sum = 0;
    const uses = number.q in this.others ? [] : this.uses(number);
    for (let sample = 0; sample < this.count; sample += 1) {
      if (number.q in this.others) sum += this.other(number, sample);
      for (const use of uses) {
        const [delta, operand] = this.factors(use, sample);
        sum += delta * operand;
      }
    }
    return sum;
  }
}

const gradientCache = new WeakMap();

/** The gradients of a layer's parameters; null if they aren't on the page. */
export function weightGradients(model) {
  if (!model.weightGradient || model.weightGradient.reason) return null;
  if (!gradientCache.has(model)) gradientCache.set(model, new WeightGradients(model, model.weightGradient));
  return gradientCache.get(model);
}

/** Say for screen readers what the gradient of a chosen parameter is. */
export function weightGradientText({ model, number }) {
  const found = model.isParameter(number) && weightGradients(model);
  return found ? ` Gradient: ${shown(found.total(number))}.` : "";
}

/** Write out the gradient of the chosen parameter: elements, or none if the trace has no gradients. */
export function createWeightGradient(view) {
  const { model, number, symbols } = view;
  if (!model.isParameter(number) || !model.weightGradient) return [];
  if (model.weightGradient.reason) return [createNote(model.weightGradient.reason)];
  const found = weightGradients(model);
  const value = found.total(number);
  const label = `∂loss/∂${symbols.of(number)}`;
  const rows = sampleRows(view, found, number);
  const derived = { rows, label };
  const head = createMarkup("h3", `<span class="symbol">${label}</span> = <span>${shown(value)}</span>`, "value gradient-value");
  const said = createMarkup("p", gradientSentence(view, found, number), "say");
  const changed = view.edits.size ? [createNote("This is the gradient of the recorded run, without your changes.")] : [];
  if (rows.length === 1 && rows[0].factors.length < 2) return [head, said, ...changed];
  const ledger = new Ledger(view, number, value, derived);
  return [head, said, ledger.element, createDigitsNote(view, ledger), ...changed];
}

/** The rows of the sum: the gradient of a weighted sum times an operand, for each sample. */
function sampleRows(view, found, number) {
  const { model, symbols, data } = view;
  const uses = number.q in found.others ? [] : found.uses(number);
  const index = (sample) => `${found.steps[sample]}${found.isBatch ? `, row ${found.rows[sample]}` : ""}`;
  const samples = Array.from({ length: found.count }, (_, sample) => sample);
  if (number.q in found.others) {
    return samples.map((sample) => ({ sign: 1, factors: [{ constant: found.other(number, sample), text: `step ${index(sample)}`, source: null }] }));
  }
  return samples.flatMap((sample) => uses.map((use) => {
    const [delta, operand] = found.factors(use, sample);
    const first = { constant: delta, text: `δ<sub>${index(sample)}</sub>`, source: null };
    if (use.element === null) return { sign: 1, factors: [first] };
    const source = model.sourceNumber(use.term.source, found.steps[sample], use.element);
    const isShown = !view.edits.size && found.rows[sample] === (data.row ?? 0) && model.exists(source);
    return { sign: 1, factors: [first, isShown ? source : { constant: operand, text: symbols.of(source), source: null }] };
  }));
}

function gradientSentence({ model, symbols }, found, number) {
  const each = `each step${found.isBatch ? " of each row" : ""}`;
  if (number.q in found.others) return `The gradient of the loss with respect to this parameter: a sum with one term for ${each}.`;
  const uses = found.uses(number);
  if (!uses.length) return "The loss doesn't depend on this parameter.";
  const names = uses.map(({ node, term, unit }) => {
    const key = model.keys.get(node.id);
    const isSum = term.sign > 0 && model.hasSum(node);
    return `∂loss/∂${isSum || !model.isPart(node, term) ? symbols.of({ q: isSum ? `sum.${key}` : key, t: model.firstStep, u: unit }, "t") : `(${symbols.term(node, term, "t")})<span class="ix">[${unit}]</span>`}`;
  });
  const [{ term, element }] = uses;
  const source = element === null ? "" : ` times ${symbols.source(term.source, "t")}<span class="ix">[${element}]</span>`;
  return `The gradient of the loss with respect to this ${element === null ? "bias" : "weight"}: ${each} adds δ${source}. Here, δ is ${[...new Set(names)].join(" or ")}.`;
}

/** A table of the gradients of all parameters: their norms, and the largest element of each. */
export function createWeightGradientTable(view) {
  const { model, symbols } = view;
  if (!model.weightGradient) return null;
  if (model.weightGradient.reason) return createElement("p", {}, model.weightGradient.reason);
  const found = weightGradients(model);
  const rows = [...model.parameters.values()].filter(({ shape, values }) => values && shape.length > 0 && shape.length < 3).map(({ name, shape }) => {
    const gradients = totalGradients(found, name, shape);
    const largest = gradients.reduce((best, value, k) => (Math.abs(value) > Math.abs(gradients[best]) ? k : best), 0);
    const number = shape.length > 1 ? { q: name, u: Math.floor(largest / shape[1]), j: largest % shape[1] } : { q: name, u: largest };
    const button = createMarkup("button", symbols.of(number), "btn");
    Object.assign(button, { type: "button", onclick: () => view.choose(number) });
    button.setAttribute("aria-label", `explain the gradient of ${symbols.spoken(number)}`);
    return createElement("tr", {}, createElement("th", { scope: "row" }, name), createElement("td", {}, shown(Math.hypot(...gradients))),
      createElement("td", {}, button), createElement("td", {}, shown(gradients[largest])));
  });
  const heads = ["parameter", "gradient norm", "element with the largest gradient", "its gradient"].map((text) => createElement("th", { scope: "col" }, text));
  return createElement("div", { class: "scroll" }, createElement("table", { class: "weight-gradients" }, createElement("caption", {}, "Gradients of the parameters. Click an element to see its gradient as a sum over steps."),
    createElement("thead", {}, createElement("tr", {}, heads)), createElement("tbody", {}, rows)));
}

/** The gradients of all elements of a parameter. */
function totalGradients(found, name, shape) {
  const { model, count } = found;
  const columns = shape[1] ?? 1;
  const result = new Float64Array(shape.reduce((product, size) => product * size, 1));
  for (let sample = 0; sample < count && name in found.others; sample += 1) {
    for (let k = 0; k < result.length; k += 1) result[k] += found.others[name][sample * result.length + k];
  }
  if (name in found.others) return result;
  for (const { term, key } of found.terms.filter((one) => name === one.term.parameter || name === one.term.bias)) {
    for (let unit = 0; unit < term.rows[1] - term.rows[0]; unit += 1) {
      for (const { factors: [one, source] } of model.weightedRows(term, found.steps[0], unit)) {
        if (one.q !== name) continue;
        const use = { term, key, unit, element: source ? source.u : null };
        for (let sample = 0; sample < count; sample += 1) {
          const [delta, operand] = found.factors(use, sample);
          result[one.u * columns + (one.j ?? 0)] += delta * operand;
        }
      }
    }
  }
  return result;
}
