// One sentence about a number, for someone who sees the layer for the first time.

import { shown } from "./digits.js";
import { continuesNormalization } from "./formula.js";
import { gatedFactor, isGate, percent, shortNumber } from "./gates.js";
import { blockOf, escape, parameterText, symbol } from "./names.js";
import { inputDescription, outputDescription } from "./tensor_names.js";

const lower = (text) => text.charAt(0).toLowerCase() + text.slice(1);

/** What a quantity is called in the cell's docstring: "forget gate". Empty if it has no description. */
const nounOf = (model, q) => escape((model.descriptions[q] ?? "").split(/[:,]/)[0]);

/** What a quantity is called: "forget gate", or its symbol. */
export function nameOf(model, q) {
  return nounOf(model, q) || symbol(model.labels.get(model.nodesByKey.get(q)?.id) || q);
}

/** A quantity with an article: "the forget gate", "the old cell state", or its symbol. */
function theName(model, q, adjective = "") {
  const name = `${adjective}${nameOf(model, q)}`;
  return nounOf(model, q) || adjective ? `the ${name}` : name;
}

/** One element of a quantity: "the forget gate of unit 1", or "f[1]". */
export function elementOf(model, q, unit) {
  const noun = nounOf(model, q);
  if (!noun) return `${nameOf(model, q)}[${unit}]`;
  return `the ${noun}${/ of /.test(noun) ? ", " : " of "}unit ${unit}`;
}

/** What a term of a node reads: "the previous hidden state", "the candidate", or a formula. */
function sourceName({ model, symbols }, source, t) {
  if (source.startsWith("before:")) return theName(model, source.slice(7), model.changedStates ? "" : "previous ");
  const key = model.keys.get(source);
  return nounOf(model, key) ? theName(model, key) : symbols.source(source, t);
}

/** Return the markup of a sentence about a number. */
export function sentence(view, number) {
  const { model, symbols } = view;
  const { q, t, u } = number;
  if (model.isParameter(number)) return parameterSentence(view, number);
  if (model.isStart(number)) return `The initial ${nameOf(model, q)}. It is zero unless the layer is called with another one.`;
  const { kind, node, term, state: before } = model.quantity(q);
  if (kind === "before") return `The ${nameOf(model, before.name)} that the model passes to step ${t}. It isn't that of the step before, so the page can't say how it is computed.`;
  if (kind === "input") return model.index ? `Feature ${u} of ${inputDescription(model)} at step ${t}.` : `Feature ${u} of the input at step ${t}. It is given, not computed.`;
  const key = model.keys.get(node.id);
  const owner = node.name ? elementOf(model, node.name, u) : `unit ${u}`;
  if (kind === "term") {
    const isSeveral = term.normalization && node.terms.some((one) => continuesNormalization(one) && one.normalization.group === term.normalization.group);
    if (isSeveral) return `What the layer reads, times its weights, added up and normalized for ${owner}. The normalization reads the sums of all units.`;
    const bias = (term.bias ? ", plus a bias" : "") + (term.normalization ? ", normalized" : "");
    if (term.source === "x") return `What the input adds to ${owner}: its weights times ${symbols.source("x", t)}${bias}.`;
    const isInitial = term.source.startsWith("before:") && model.previous(t) === model.start;
    const zero = isInitial && Array.from({ length: model.sourceSize(term.source) }, (_, k) => view.value(model.sourceNumber(term.source, t, k))).every((one) => one === 0);
    if (zero) return `What the previous ${nameOf(model, term.source.slice(7))} adds. At the first step it is zero${term.normalization ? ", before the normalization" : term.bias ? ", so only the bias is left" : ""}.`;
    return `What ${sourceName(view, term.source, t)} adds to ${owner}: its weights times all of ${symbols.source(term.source, t)}${bias}.`;
  }
  const squeezes = { gate: "into 0 to 1", tanh: "into −1 to 1" }[node.range];
  if (kind === "sum") return `All parts together.${squeezes ? ` ${escape(node.glyph)} squeezes this ${squeezes}.` : ""}`;
  if (isGate(model, node)) return gateSentence(view, node, number);
  const state = model.states.find((one) => one.end === node.id);
  const description = (model.descriptions[node.name] ?? "").replace(/^[^:]*: /, "");
  if (state) {
    const next = model.next(t);
    const isOutput = model.states[0] === state && `the ${nounOf(model, state.name)}` !== outputDescription(model);
    const role = isOutput ? `, and ${outputDescription(model)} of step ${t}` : "";
    const subject = nounOf(model, state.name) ? upper(elementOf(model, state.name, u)) : `The state ${nameOf(model, state.name)} of unit ${u}`;
    return `${subject}${role}${origin(view, node, state, t)}. ${next === null ? "This is the last step, so it is also the final state." : model.changedStates ? `The model changes it before step ${next} reads it.` : `Step ${next} reads it.`}`;
  }
  const passed = letThrough(view, node, t);
  if (passed) return `${upper(passed)}.`;
  if (node.operation === "activation" && squeezes && !view.isHeld(number) && node.terms.length === 1 && node.terms[0].source) {
    return `${upper(symbols.source(node.terms[0].source, t))}, squeezed ${squeezes}.`;
  }
  const known = normalized(view, node, t) || shareOfState(model, node);
  if (known) return `${upper(known)}.`;
  if (node.operation === "unknown") return `${upper(nameOf(model, key))}${description ? `: ${lower(escape(description))}` : ""}. How it is computed isn't known.`;
  if (!node.name) return "An intermediate value without a name in the cell's code.";
  if (node.name === "x") return "The variable x in the code of the step, after the step has changed it.";
  if (!nounOf(model, node.name)) return `The variable ${escape(node.name)} in the code of the step.`;
  return `${upper(escape(model.descriptions[node.name]))}.`;
}

/** What a product with a gate is: "what the output gate lets through of tanh(c)". Empty for anything else. */
function letThrough(view, node, t) {
  const { model, symbols } = view;
  if (node.operation !== "product") return "";
  const gate = node.terms.find((one) => model.nodesById.get(one.source)?.range === "gate");
  const other = node.terms.find((one) => one !== gate);
  if (!gate || !other?.source || node.terms.length > 2) return "";
  const what = other.source.startsWith("before:") ? theName(model, other.source.slice(7), "old ") : symbols.source(other.source, t);
  return `what ${sourceName(view, gate.source, t)} lets through of ${what}`;
}

/** What a normalization of a vector does. Empty for anything else. */
function normalized({ symbols }, node, t) {
  const does = { LayerNorm: "normalized to mean 0 and variance 1 over all units", RMSNorm: "divided by its root mean square over all units" }[node.glyph];
  const [of, gain, bias] = node.terms;
  if (!does || !of?.source || node.name) return "";
  const parameter = (term, verb) => (term && term.source === null ? ` ${verb} ${parameterText(term.text)}` : "");
  const then = [parameter(gain, "multiplied by"), parameter(bias, "shifted by")].filter(Boolean).join(" and");
  return `${symbols.source(of.source, t)}, ${does}${then && `, then${then}`}`;
}

/** The two terms of a new state: what is left of the old one, and what is new. Empty for anything else. */
function shareOfState(model, node) {
  const state = model.states.find((one) => mixOf(model, one)?.terms.some(({ source }) => source === node.id));
  if (!state || node.name) return "";
  const old = theName(model, state.name, "old ");
  return keepsState(model, node.id, state) ? `what is left of ${old}` : `what is new. It is added to what is left of ${old}`;
}

/** Whether a node is a product with a state before the step. */
function keepsState(model, source, state) {
  const node = model.nodesById.get(source);
  return node?.operation === "product" && node.terms.some((term) => term.source === `before:${state.name}`);
}

/** Return the node that computes a new state as a sum of two terms, one of which is a part of the old state; otherwise null. */
function mixOf(model, state) {
  const node = model.nodesById.get(state.end);
  const isMixed = node?.operation === "sum" && node.terms.length === 2 && node.terms.every(({ sign, source }) => sign > 0 && source);
  return isMixed && node.terms.filter(({ source }) => keepsState(model, source, state)).length === 1 ? node : null;
}

/** What a new state is made of, if that can be said in a few words. */
function origin(view, node, state, t) {
  const { model } = view;
  const passed = letThrough(view, node, t);
  if (passed) return `: ${passed}`;
  return mixOf(model, state) === node ? ": what is left of the old one, plus what is new" : "";
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
  const owner = block?.gate ? elementOf(model, block.gate, u - block.start + block.firstUnit) : `row ${u}`;
  if (shape.length < 2) return `A parameter of ${owner}. It is the same at every step.`;
  const reader = model.nodes.flatMap((node) => node.terms).find((term) => term.parameter === q && term.source);
  const source = reader?.source === "x" ? `input feature ${j}` : reader?.source?.startsWith("before:") ? `unit ${j} of ${sourceName(view, reader.source)}` : `column ${j}`;
  return `The weight from ${source} to ${owner}. It is the same at every step.`;
}

/** What a gate does to the other factor of the product that it goes into. */
function gateSentence(view, node, number) {
  const { model, symbols } = view;
  const value = view.value(number);
  const subject = node.name ? upper(elementOf(model, node.name, number.u)) : symbols.of(number);
  const state = value === 0 ? "shut" : value === 1 ? "open" : "";
  const isShare = value >= 0 && value <= 1;
  const factor = gatedFactor(model, node);
  if (!Number.isFinite(value) || (!factor && !isShare)) return `${subject} is ${shown(value)}.`;
  if (!factor) return `${subject} is ${state || `${percent(value)} open`}.`;
  const symbolOf = symbols.of(model.sourceOf(factor.other, number.t, number.u));
  const isNamed = factor.state && nounOf(model, factor.state);
  const what = !factor.state ? symbolOf : isNamed ? `the old ${nameOf(model, factor.state)} ${symbolOf}` : `the old ${symbolOf}`;
  if (!isShare) return `${subject} multiplies ${what} by ${shortNumber(value)}.`;
  if (factor.keeps) {
    if (state === "shut") return `${subject} is shut. ${upper(what)} is erased.`;
    return state ? `${subject} is open. It keeps all of ${what}.` : `${subject} keeps ${percent(value)} of ${what}.`;
  }
  if (state === "shut") return `${subject} is shut. Nothing of ${what} gets through.`;
  return state ? `${subject} is open. It lets all of ${what} through.` : `${subject} lets ${percent(value)} of ${what} through.`;
}
