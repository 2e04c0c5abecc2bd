// A written sum: a line for each term, with as many digits as a check by hand needs.

import { createElement, createMarkup } from "./dom.js";
import { ALL_DECIMALS, chooseDecimals, decimalsOf, factorDecimals, fixed, printedDecimals, restValue, rowValue, shown, splitRows } from "./digits.js";
import { nameOf } from "./words.js";

const MIN_DECIMALS = 4;
const FOUR_DECIMALS = { factor: MIN_DECIMALS, product: MIN_DECIMALS, part: MIN_DECIMALS, sum: MIN_DECIMALS };
const MAX_OF_VECTOR = 4; // numbers of a vector that a function is applied to

/**
 * The lines of a sum. Each line is a × b = c, or a total; the numbers are buttons.
 *
 * What is derived is as from LayerModel.derive. It may have a label, the markup of the last line, if the sum isn't the number itself.
 */
export class Ledger {
  constructor(view, number, value, derived) {
    Object.assign(this, { view, number, value, derived });
    this.valueOf = (one) => (one.constant === undefined ? view.value(one) : one.constant);
    this.operands = derived.rows.flatMap((row) => row.factors.map(this.valueOf));
    this.isFinite = [value, ...this.operands].every(Number.isFinite);
    const chosen = view.allDigits || !this.isFinite ? null : this.chooseDecimals();
    this.isRight = chosen !== null;
    this.decimals = chosen ?? (this.isFinite || view.allDigits ? ALL_DECIMALS : FOUR_DECIMALS);
    this.end = view.allDigits ? ALL_DECIMALS.sum : decimalsOf(value);
    this.lines = [];
    this.addAll();
    this.element = createElement("div", { class: "sum", role: "list", "aria-label": "the sum, line by line" }, this.lines);
  }

  chooseDecimals() {
    return chooseDecimals(this.derived, this.value, this.valueOf);
  }

  addAll() {
    const { parts, rows } = this.derived;
    if (parts) {
      this.addParts(parts);
    } else {
      this.addBefore();
      this.addRows(rows);
    }
  }

  /** What isn't shown of the numbers that a line is computed from. */
  get omission() {
    const size = this.derived.vector?.length ?? 0;
    return size > MAX_OF_VECTOR ? `, the last one with all ${size} numbers` : "";
  }

  addParts(parts) {
    const { of } = this.derived;
    const glyph = this.derived.glyph?.replace(/\(·.*\)$/, ""); // σ(·−1) is σ of a sum with −1
    parts.forEach((part, k) => {
      const isTotal = part.total && part.rows.length > 1;
      if (isTotal && k && this.lines.at(-1).className !== "gap") this.lines.push(createRule("gap")); // its total is only of its own rows
      this.addSum(isTotal ? part.rows : part.rows.map((row) => ({ ...row, sign: part.sign })), k === 0);
      if (isTotal) {
        this.addRule("part");
        this.addTotal(this.partName(part), part.total, this.decimals.part, part.sign < 0 ? "−" : "");
        this.lines.push(createRule("gap"));
      }
    });
    this.addRule();
    if (of) this.addTotal(parts.length > 1 ? "sum of both parts".replace("both", parts.length > 2 ? "all" : "both") : "sum", of, this.decimals.sum);
    if (this.derived.vector) this.addVectorFunction(this.decimals.sum);
    else if (glyph) this.addLine("", [`${glyph}(${fixed(this.valueOf(of), this.decimals.sum)})`], [], this.result(), "total");
    else this.addLine("", [this.name(this.number)], [], this.result(), "total");
  }

  /** Add the lines before a product, such as the sum that is c and then tanh(c). */
  addBefore() {
    for (const { number, rows, isQuotient } of this.derived.before ?? []) {
      if (isQuotient) {
        this.addRow(rows[0], true, this.decimals.product);
        this.addRule();
      } else if (rows) {
        this.addSum(rows, true);
        this.addRule("part");
        this.addTotal(null, number, this.decimals.part);
        this.addRule();
      } else {
        this.addTotal(null, number, printedDecimals(this.valueOf(number), this.decimals.factor));
      }
    }
  }

  addRows(rows) {
    const { glyph, vector } = this.derived;
    if (vector) {
      vector.slice(0, MAX_OF_VECTOR).forEach((one) => this.addLine("", [this.name(one)], [], this.factor(one)));
      this.addVectorFunction(this.decimals.factor);
    } else if (glyph) {
      const [operand] = rows[0].factors;
      this.addLine("", [this.name(operand)], [], this.factor(operand));
      this.addLine("", [`${glyph}(${this.print(operand)})`], [], this.result(), "total");
    } else if (rows.length === 1) {
      this.addRow(rows[0], true, this.end, "total");
    } else {
      this.addSum(rows, true);
      this.addRule();
      this.addLine("", [this.derived.label ? createMarkup("span", this.derived.label) : this.name(this.number)], [], this.result(), "total");
    }
  }

  /** Add a function of a whole vector, with its first numbers. */
  addVectorFunction(decimals) {
    const { vector, glyph, element } = this.derived;
    const numbers = vector.slice(0, MAX_OF_VECTOR).flatMap((one, k) => [k ? ", " : "", this.createButton(one, fixed(this.valueOf(one), decimals))]);
    this.addLine("", [`${glyph}(`, ...numbers, `${vector.length > MAX_OF_VECTOR ? ", …" : ""})[${element}]`], [], this.result(), "total");
  }

  /** Add the rows of a sum; of a long one only the largest. */
  addSum(rows, isFirst) {
    const [kept, rest] = splitRows(rows, this.valueOf);
    kept.forEach((row, k) => this.addRow(row, isFirst && k === 0, this.decimals.product));
    if (!rest.length) return;
    this.addLine("+", [`and ${rest.length} more`], [], fixed(restValue(rest, this.valueOf), this.decimals.product), "rest");
  }

  addRow(row, isFirst, decimals, className = "") {
    const names = row.factors.flatMap((one, k) => [...(k ? [row.quotient ? " / " : "·"] : []), this.name(one, row.factors.length > 1, row.quotient && k > 0)]);
    const isSingle = row.factors.length < 2;
    const result = isSingle ? this.factor(row.factors[0]) : className ? this.result() : fixed(rowValue(row, this.valueOf), decimals);
    this.addLine(row.sign < 0 ? "−" : isFirst ? "" : "+", names, isSingle ? [] : row.factors.map((one) => this.factor(one)), result, className, row.quotient ? "÷" : "×");
  }

  addTotal(label, number, decimals, operator = "") {
    this.addLine(operator, [label ?? this.name(number)], [], this.createButton(number, fixed(this.valueOf(number), decimals)), "sub");
  }

  addLine(operator, label, factors, result, className = "", times = "×") {
    const operands = factors.length
      ? [createElement("span", { class: "r" }, factors.slice(0, -1).flatMap((one, k) => (k ? [` ${times} `, one] : [one]))), createSpan("o", times), createElement("span", { class: "r" }, factors.at(-1)), createSpan("o", "=")]
      : [createSpan("none", ""), createSpan("none", ""), createSpan("none", ""), createSpan("o", className && className !== "rest" ? "=" : "")];
    this.lines.push(createLine(createSpan("o", operator), createElement("span", { class: factors.length ? "lab" : "lab long" }, label), ...operands, createElement("span", { class: `r ${className}`.trim() }, result)));
  }

  addRule(className = "") {
    this.lines.push(createRule(`rule ${className}`.trim()));
  }

  result() {
    return createElement("b", {}, this.view.allDigits ? fixed(this.value, this.end) : shown(this.value));
  }

  /** The digits of a factor: as few as it has, or as many as the sum needs. */
  print(one) {
    const value = this.valueOf(one);
    if (value === 0 || (Math.abs(value) > 1e-3 && Number(value.toFixed(2)) === Number(value.toFixed(7)))) return fixed(value, 2);
    return fixed(value, printedDecimals(value, Math.max(MIN_DECIMALS, factorDecimals(this.derived, one, this.decimals))));
  }

  factor(one) {
    return one.constant === undefined ? this.createButton(one, this.print(one)) : createSpan("", this.print(one));
  }

  name(one, isFactor = false, isDivisor = false) {
    const { symbols } = this.view;
    if (one.constant === undefined) return this.createButton(one, isFactor ? symbols.factor(one, isDivisor) : symbols.of(one));
    return createMarkup("span", one.source ? one.text.replace("{}", symbols.of(one.source)) : one.text);
  }

  partName(part) {
    if (part.source === "x") return "input part";
    if (part.source?.startsWith("before:")) return createMarkup("span", `${nameOf(this.view.model, part.source.slice(7)).replace(/ state$/, "")} part`);
    return "part";
  }

  /** The digits of a number as a button. It is named in words, since screen readers also list buttons on their own. */
  createButton(number, markup) {
    const button = createNumberButton(this.view, number, markup);
    if (!markup.includes("<")) button.setAttribute("aria-label", `${this.view.symbols.spoken(number)}: ${markup}`);
    return button;
  }
}

/** A number as a button that chooses it. */
export function createNumberButton(view, number, markup) {
  const button = createMarkup("button", markup, view.isChanged(number) ? "changed" : null);
  button.type = "button";
  button.addEventListener("click", () => view.choose(number));
  return button;
}

/** A line of a sum, whose parts are in the columns of the sum. */
export const createLine = (...parts) => createElement("div", { class: "line", role: "listitem" }, parts);

const createRule = (className) => createElement("span", { class: className, "aria-hidden": "true" });

export const createSpan = (className, text) => createElement("span", { class: className || null }, text);

/** A line in small print. */
export function createNote(...children) {
  return createElement("p", { class: "note" }, children);
}

/** Why a number isn't finite; empty if it is, although one that it is computed from isn't. */
function notFiniteText({ value, operands }) {
  if (Number.isFinite(value)) return "";
  if (operands.some(Number.isNaN)) return "What is computed from NaN is NaN. ";
  return operands.every(Number.isFinite) ? "The result is too large for the dtype of the layer. " : "What is computed from ∞ can be ∞ or NaN. ";
}

/** Say below a sum that it can be checked, with the switch to all digits. */
export function createDigitsNote(view, ledger) {
  const toggle = createElement("button", { type: "button", onclick: () => view.toggleDigits() }, view.allDigits ? "fewer digits" : "all digits");
  if (ledger.isRight) return createNote(`Each line is right when checked by hand${ledger.omission}. `, toggle);
  if (!ledger.isFinite) return createNote(notFiniteText(ledger), toggle);
  return createNote("8 decimals. The last digits can differ when checked by hand, because the layer rounds every number that it computes. ", view.allDigits ? toggle : "");
}
