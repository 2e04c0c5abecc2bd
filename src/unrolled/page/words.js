// One sentence about a number, for someone who sees the layer for the first time.

import { blockOf, escape, symbol } from "./names.js";

const NEARLY = 0.05; // a gate below is shut, and above 1 - NEARLY open

const percent = (value) => `${Math.round(value * 100)} %`;
const lower = (text) => text.charAt(0).toLowerCase() + text.slice(1);

/** What a quantity is called: "forget gate", or its symbol. */
export function nameOf(model, q) {
  const description = (model.descriptions[q] ?? "").split(":")[0];
  return description ? escape(description) : symbol(model.labels.get(model.nodesByKey.get(q)?.id) || q);
}

/** Return the markup of a sentence about a number. */
export function sentence(view, number) {
  const { model, symbols } = view;
  const { q, t, u } = number;
  if (model.isParameter(number)) return parameterSentence(view, number);
  if (model.isStart(number)) return `The initial ${nameOf(model, q)}. It is zero unless the layer is called with another one.`;
  const { kind, node, term } = model.quantity(q);
  if (kind === "input") return `Feature ${u} of the input at step ${t}. It is given, not computed.`;
  const key = model.keys.get(node.id);
  const owner = node.name ? `${nameOf(model, node.name)} of unit ${u}` : `unit ${u}`;
  if (kind === "term") {
    const bias = term.bias ? ", plus a bias" : "";
    if (term.source === "x") return `What the input adds to the ${owner}: its weights times ${symbols.source("x", t)}${bias}.`;
    const isInitial = term.source.startsWith("before:") && model.previous(t) === model.start;
    const zero = isInitial && Array.from({ length: model.sourceSize(term.source) }, (_, k) => view.value({ q: term.source.slice(7), t: model.start, u: k })).every((one) => one === 0);
    if (zero) return `What the previous ${nameOf(model, term.source.slice(7))} adds. At the first step it is zero${term.bias ? ", so only the bias is left" : ""}.`;
    const source = term.source.startsWith("before:") ? `the previous ${nameOf(model, term.source.slice(7))}` : nameOf(model, model.keys.get(term.source));
    return `What ${source} adds to the ${owner}: its weights times all of ${symbols.source(term.source, t)}${bias}.`;
  }
  const squeezes = { gate: "into 0 to 1", tanh: "into −1 to 1" }[node.range];
  if (kind === "sum") return `All parts together.${squeezes ? ` ${escape(node.glyph)} squeezes this ${squeezes}.` : ""}`;
  if (node.range === "gate") return gateSentence(view, node, number);
  const state = model.states.find((one) => one.end === node.id);
  const description = (model.descriptions[node.name] ?? "").replace(/^[^:]*: /, "");
  if (state) {
    const next = model.next(t);
    const isOutput = model.states[0] === state;
    const role = isOutput ? `, and the output of step ${t}` : "";
    return `The ${nameOf(model, state.name)} of unit ${u}${role}${origin(view, node, state, t)}. ${next === null ? "This is the last step, so it is also the final state." : `Step ${next} reads it.`}`;
  }
  const passed = letThrough(view, node, t);
  if (passed) return `${upper(passed)}.`;
  if (node.operation === "activation" && squeezes && node.terms.length === 1 && node.terms[0].source) {
    return `${upper(symbols.source(node.terms[0].source, t))}, squeezed ${squeezes}.`;
  }
  if (node.operation === "unknown") return `${upper(nameOf(model, key))}${description ? `: ${lower(escape(description))}` : ""}. How it is computed isn't known.`;
  if (model.labels.get(node.id)) return `${upper(nameOf(model, key))}${description && description !== (model.descriptions[node.name] ?? "") ? `: ${lower(escape(description))}` : ""}.`;
  return "A number on the way, without a name in the cell's code.";
}

/** What a product with a gate is: "what the output gate lets through of tanh(c)". Empty for anything else. */
function letThrough({ model, symbols }, node, t) {
  if (node.operation !== "product") return "";
  const gate = node.terms.find((one) => model.nodesById.get(one.source)?.range === "gate");
  const other = node.terms.find((one) => one !== gate);
  if (!gate || !other?.source || node.terms.length > 2) return "";
  const what = other.source.startsWith("before:") ? `the old ${nameOf(model, other.source.slice(7))}` : symbols.source(other.source, t);
  return `what the ${nameOf(model, model.keys.get(gate.source))} lets through of ${what}`;
}

/** What a new state is made of, if that can be said in a few words. */
function origin(view, node, state, t) {
  const { model } = view;
  const passed = letThrough(view, node, t);
  if (passed) return `: ${passed}`;
  const keeps = (term) => model.nodesById.get(term.source)?.operation === "product" && model.nodesById.get(term.source).terms.some(({ source }) => source === `before:${state.name}`);
  const isMixed = node.operation === "sum" && node.terms.length === 2 && node.terms.every(({ sign, source }) => sign > 0 && source) && node.terms.filter(keeps).length === 1;
  return isMixed ? ": what is left of the old one, plus what is new" : "";
}

/** Begin a text with a capital letter, unless it begins with a symbol. */
export function upper(text) {
  const words = String(text);
  return words.startsWith("<") ? words : words.charAt(0).toUpperCase() + words.slice(1);
}

function parameterSentence(view, { q, u, j }) {
  const { model } = view;
  const { shape } = model.parameters.get(q);
  const block = blockOf(model, { q, u });
  const owner = block?.gate ? `the ${nameOf(model, block.gate)} of unit ${u - block.start + block.firstUnit}` : `row ${u}`;
  if (shape.length < 2) return `A parameter of ${owner}. It is the same at every step.`;
  const reader = model.nodes.flatMap((node) => node.terms).find((term) => term.parameter === q && term.source);
  const source = reader?.source === "x" ? `input feature ${j}` : reader?.source?.startsWith("before:") ? `unit ${j} of the previous ${nameOf(model, reader.source.slice(7))}` : `column ${j}`;
  return `The weight from ${source} to ${owner}. It is the same at every step.`;
}

/** What a gate does to the other factor of the product that it goes into. */
function gateSentence(view, node, number) {
  const { model, symbols } = view;
  const value = view.value(number);
  const name = node.name ? nameOf(model, node.name) : "gate";
  const state = value < NEARLY ? "shut" : value > 1 - NEARLY ? "open" : "";
  const product = model.readers.get(node.id).find((reader) => reader.operation === "product");
  const other = product?.terms.find((term) => term.source !== node.id && term.source);
  const start = `The ${name} of unit ${number.u}`;
  if (!other) return state ? `${start} is ${state}.` : `${start} is ${percent(value)} open.`;
  const what = symbols.of(model.sourceOf(other, number.t, number.u));
  if (other.source.startsWith("before:")) {
    const old = `the old ${nameOf(model, other.source.slice(7))} ${what}`;
    if (state === "shut") return `${start} is shut. ${upper(old)} is erased.`;
    return state ? `${start} is open. It keeps ${old} as it was.` : `${start} keeps ${percent(value)} of ${old}.`;
  }
  if (state === "shut") return `${start} is shut. Nothing of ${what} gets through.`;
  return state ? `${start} is open. It lets ${what} through.` : `${start} lets ${percent(value)} of ${what} through.`;
}
