// Where a number comes from: its value, a sentence about it, and the sum as one would write it on paper.

import { comparisonText, createComparedValue, createDifference } from "./comparison.js";
import { createElement, createMarkup, replaceChildren } from "./dom.js";
import { shown } from "./digits.js";
import { createDigitsNote, createLine, createNote, createNumberButton, createSpan, Ledger } from "./ledger.js";
import { Symbols } from "./symbols.js";
import { createWeightGradient, weightGradientText } from "./weight_gradient.js";
import { sentence } from "./words.js";

const QUIET_TIME = 500; // milliseconds between two announcements

/** Create the panel. Returns {element, update}. */
export function createArithmetic(view) {
  const announcement = createElement("p", { class: "unseen", role: "status" });
  const content = createElement("div");
  const element = createElement("div", { class: "arithmetic" }, content, announcement);
  let announced = null; // when something was announced last
  let timer = null;

  /** Let screen readers read a text. While numbers change quickly, they only read the last one. */
  function announce(text) {
    clearTimeout(timer);
    if (view.isPlaying || announcement.textContent === text) return;
    const wait = announced === null ? 0 : announced + QUIET_TIME - performance.now();
    if (wait > 0) {
      timer = setTimeout(() => announce(text), wait);
      return;
    }
    if (announcement.textContent) announced = performance.now();
    announcement.textContent = text;
  }

  function update() {
    const { model, symbols, number } = view;
    if (view.mode === "difference") {
      replaceChildren(content, ...createDifference(view));
      announce(`${symbols.spoken(number)}: ${comparisonText(view, number)}`);
      return;
    }
    const value = view.value(number);
    const digits = view.textOf(number);
    const head = view.pageData.baseline ? createComparedValue(view, number) : createMarkup("div", `<span class="symbol">${symbols.of(number)}</span> = <span>${digits}</span>`, "value");
    if (view.isChanged(number)) head.append(createElement("span", { class: "was" }, `was ${shown(view.original(number))}`));
    const said = sentence(view, number);
    replaceChildren(content, head, createMarkup("p", said, "say"), ...explanation(view, number, value), ...createWeightGradient(view));
    announce(`${symbols.spoken(number)}: ${digits}. ${Symbols.plain(said)}${weightGradientText(view)}`);
  }

  return { element, update };
}

function explanation(view, number, value) {
  const derived = view.model.derive(number);
  if (!derived) return view.isEditable(number) ? [createNote("Drag it, or type a new value, to see what depends on it.")] : [];
  if (view.isHeld(number)) return [createNote("Held by you, not computed.")];
  if (derived.opaque) return createOperands(view, number, derived);
  const ledger = new Ledger(view, number, value, derived);
  return [ledger.element, createDigitsNote(view, ledger)];
}

/** A function whose lines can't be written as a sum: its formula and its operands. */
function createOperands(view, number, derived) {
  const { symbols, model } = view;
  const { node, term } = model.quantity(number.q);
  const formula = createMarkup("p", term ? symbols.term(node, term, number.t) : symbols.expression(node, number, number.t), "formula");
  const operands = (derived.rows ?? []).flatMap((row) => row.factors).filter((one) => one.constant === undefined);
  const lines = operands.map((one) => createLine(createSpan("o", ""), createElement("span", { class: "lab" }, createNumberButton(view, one, symbols.of(one))),
    createSpan("r", ""), createSpan("o", ""), createSpan("r", ""), createSpan("o", "="), createElement("span", { class: "r" }, createNumberButton(view, one, shown(view.value(one))))));
  const note = derived.omitted ? [createNote(`And ${derived.omitted} more.`)] : [];
  return [formula, createElement("div", { class: "sum", role: "list", "aria-label": "what it is computed from" }, lines), ...note];
}
