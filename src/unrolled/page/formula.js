// The formula of a node, with parentheses where they are needed.

import { escape, parameterText } from "./names.js";

// What holds a formula together. One that is held less firmly than its place requires gets parentheses.
const RELATION = 0;
const SUM = 1;
const NEGATIVE = 2;
const PRODUCT = 3;
export const ATOM = 4;

const parenthesize = ({ markup, precedence }, required) => (precedence < required ? `(${markup})` : markup);
const writeCall = (name, inner) => ({ markup: `<span class="rm">${escape(name)}</span>(${inner})`, precedence: ATOM });

/** The formula of a term: its text, with the formula of what it reads. Formulas are {markup, precedence}. */
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

/** The formula of a node. operand(term, k) is the formula of a term, and times the sign between factors. */
export function formula(node, operand, times = " ⊙ ") {
  const operands = node.terms.map(operand);
  switch (node.operation) {
    case "activation": return writeCall(node.glyph.split("(·")[0], writeSum(node, operands).markup);
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

function writeFunction({ glyph }, operands) {
  const at = (k, required = SUM) => parenthesize(operands[k], required);
  const list = operands.map(({ markup }) => markup).join(", ");
  if (glyph === "if" && operands.length === 3) return { markup: `if ${at(0, RELATION)} then ${at(1)} else ${at(2)}`, precedence: RELATION };
  if (/^[<>≤≥=≠]/.test(glyph)) {
    return { markup: `${at(0)} ${escape(glyph[0])} ${operands.length === 2 ? at(1) : escape(glyph.slice(1))}`, precedence: RELATION };
  }
  if (/\(·\)|\|·\|/.test(glyph)) return { markup: escape(glyph).replace("·", list), precedence: ATOM };
  return writeCall(glyph, list);
}
