// The formula of a node, with parentheses where they are needed.

import { escape, parameterText } from "./names.js";

// What holds a formula together. One that is held less firmly than its place requires gets parentheses.
const RELATION = 0;
const SUM = 1;
const NEGATIVE = 2;
const PRODUCT = 3;
export const ATOM = 4;

const parenthesize = ({ markup, precedence }, required) => (precedence < required ? `(${markup})` : markup);

/** The markup of a formula as a factor, or as what something is divided by. */
export const asFactor = (written, isDivisor) => parenthesize(written, isDivisor ? ATOM : PRODUCT);

export const indexText = ({ u, j }) => `<span class="ix">[${u}${j === undefined ? "" : `,${j}`}]</span>`;

/** The formula of an element of a vector. */
export const withIndex = (vector, number) => ({ markup: parenthesize(vector, ATOM) + indexText(number), precedence: ATOM });

const MAX_INDICES = 4; // of elements that aren't next to each other

/** The formula of the elements of a vector that a term reads. */
export function elementsOf(vector, { elements }) {
  if (!elements?.length) return vector;
  const [first] = elements;
  const isRange = elements.every((element, k) => element === first + k);
  const text = elements.length === 1 ? first : isRange ? `${first}:${first + elements.length}` : elements.slice(0, MAX_INDICES).join(", ") + (elements.length > MAX_INDICES ? ", …" : "");
  return withIndex(vector, { u: text });
}

/** The formula of a constant, or of one of its elements. */
export function constantFormula(text, unit = null) {
  const written = { markup: parameterText(text), precedence: textPrecedence(text) };
  return unit === null ? written : withIndex(written, { u: unit });
}

/** The weights and the bias of a weighted sum, from its formula, without the factor of the sum. */
export function parametersOf({ text, gain }) {
  const [before, after] = text.split("·{}");
  const bias = gain === null ? after : after.replace(/\)?(\/.*)?$/, "");
  return [before.split(/[⊙·(]/).at(-1), bias.replace(/^ \+ /, "")];
}

/** The line of a constant that is the same at every step. */
export const definitionText = ({ name, text }) => `${parameterText(name)} = ${parameterText(text)}`;

/** The formula of a node that is a named function, with a text in place of its arguments; null for any other node. */
export function callFormula({ operation, glyph }, inner) {
  const name = glyph.split("(·")[0];
  return !["sum", "difference", "product", "quotient"].includes(operation) && /^[\p{L}\w√ ]+$/u.test(name) && name !== "if" ? writeCall(name, inner) : null;
}

const writeCall = (name, inner) => ({ markup: `<span class="rm">${escape(name)}</span>(${inner})`, precedence: ATOM });

/** Return the formula of a term as {markup, precedence}. The formula of its operand replaces {} in its text. */
export function termFormula(term, source) {
  if (term.text === "{}") return source;
  const [before, after = ""] = term.text.split("{}");
  const inner = parenthesize(source, requiredBetween(before, after, term.weighted));
  return { markup: parameterText(before) + inner + parameterText(after), precedence: textPrecedence(term.text) };
}

function requiredBetween(before, after, isWeighted) {
  if (before.endsWith("/") || (isWeighted && before.endsWith("·"))) return ATOM;
  if (/[·⊙]$/.test(before) || /^[·⊙/]/.test(after)) return PRODUCT;
  return /^[^,)]/.test(after) ? SUM : RELATION;
}

function textPrecedence(text) {
  let outer = text;
  for (let last = ""; last !== outer; ) {
    last = outer;
    outer = outer.replace(/\([^()]*\)|\[[^[\]]*\]/g, "");
  }
  if (/[<>≤≥=≠]/.test(outer)) return RELATION;
  if (/ [+−] /.test(outer)) return SUM;
  return outer.startsWith("−") ? NEGATIVE : /[·⊙/]/.test(outer) ? PRODUCT : ATOM;
}

/** Whether a term is a later one of those that are added and then normalized. */
export const continuesNormalization = (term) => term.normalization !== null && term.value === null;

/** The formula of a term with those that are normalized together with it. operand(term) is the formula of a term. */
export function addendFormula(node, term, operand) {
  if (!term.normalization) return operand(term);
  const terms = node.terms.filter(({ normalization }) => normalization?.group === term.normalization.group);
  const sum = writeSum({ operation: "sum", terms: terms.map(({ normalization }) => normalization) }, terms.map(operand));
  const [name, after] = term.normalization.text.split("({}");
  return { markup: `<span class="rm">${escape(name)}</span>(${sum.markup}${parameterText(after)}`, precedence: ATOM };
}

/**
 * The formula of a node.
 *
 * operand(term) returns the formula of a term. times is the sign between factors. mark(formula, term) may change the formula of an addend.
 */
export function formula(node, operand, times = " ⊙ ", mark = (written) => written) {
  const terms = node.terms.filter((term) => !continuesNormalization(term));
  const operands = terms.map((term) => mark(addendFormula(node, term, operand), term));
  return combine({ ...node, terms }, operands, times);
}

function combine(node, operands, times) {
  switch (node.operation) {
    case "activation": return writeCall(node.glyph.split("(·")[0], writeSum(node, operands).markup + otherArguments(node));
    case "sum": case "difference": return writeSum(node, operands);
    default: {
      const signed = operands.map((one, k) => (node.terms[k].sign < 0 ? negate(one) : one));
      if (node.operation === "product") return writeProduct(node, signed, times);
      return node.operation === "quotient" ? writeQuotient(signed) : writeFunction(node, signed);
    }
  }
}

const negate = (one) => ({ markup: `−${parenthesize(one, PRODUCT)}`, precedence: NEGATIVE });

function writeSum(node, operands) {
  const isMinus = (k) => node.terms[k].sign < 0 || (k > 0 && node.operation === "difference");
  if (operands.length === 1) return isMinus(0) ? negate(operands[0]) : operands[0];
  const markup = operands.map((one, k) => {
    const required = isMinus(k) || (k && one.markup.startsWith("−")) ? PRODUCT : SUM;
    return (k ? (isMinus(k) ? " − " : " + ") : isMinus(k) ? "−" : "") + parenthesize(one, required);
  }).join("");
  return { markup, precedence: SUM };
}

/** A product. Numbers come first, without a sign. */
function writeProduct(node, operands, times) {
  const isNumber = (k) => node.terms[k].source === null && /^\d[\d.e+−]*$/.test(node.terms[k].text);
  const order = operands.map((_, k) => k).sort((one, other) => isNumber(other) - isNumber(one));
  const factors = order.map((k, place) => parenthesize(operands[k], place ? PRODUCT : NEGATIVE));
  const markup = factors.reduce((all, factor, place) => all + (times === " ⊙ " && isNumber(order[place - 1]) ? " " : times) + factor);
  return { markup, precedence: markup.startsWith("−") ? NEGATIVE : PRODUCT };
}

function writeQuotient([above, below]) {
  const markup = `${parenthesize(above, NEGATIVE)} / ${parenthesize(below, ATOM)}`;
  return { markup, precedence: markup.startsWith("−") ? NEGATIVE : PRODUCT };
}

/** The arguments of an elementwise function after its operand, such as the limits of hardtanh. Those of other functions are mostly dimensions. */
function otherArguments({ call, shapes }) {
  if (shapes.length || !call.includes("{}")) return "";
  return argumentText(call.slice(call.indexOf("{}") + 2, -1));
}

const argumentText = (text) => escape(text.replace(/, inplace=False/g, "").replace(/(\W)-(?=\d)/g, "$1−"));

function writeFunction(node, operands) {
  const { glyph, call, shapes } = node;
  const at = (k, required = SUM) => parenthesize(operands[k], required);
  const list = operands.map(({ markup }) => markup).join(", ");
  if (glyph === "if" && operands.length === 3) return { markup: `if ${at(0, RELATION)} then ${at(1)} else ${at(2)}`, precedence: RELATION };
  if (/^[<>≤≥=≠]/.test(glyph)) {
    return { markup: `${at(0)} ${escape(glyph[0])} ${operands.length === 2 ? at(1) : escape(glyph.slice(1))}`, precedence: RELATION };
  }
  if (/\(·\)|\|·\|/.test(glyph)) return { markup: escape(glyph).replace("·", list), precedence: ATOM };
  if (shapes.length || glyph === "cast" || call.split("{}").length !== operands.length + 1) return writeCall(glyph, list);
  const [first, ...others] = call.slice(call.indexOf("(") + 1, -1).split("{}").map(argumentText);
  return writeCall(glyph, others.reduce((all, text, k) => all + operands[k].markup + text, first));
}
