// One number as a cell: its digits, and a bar on the scale of its quantity.

import { createElement } from "./dom.js";
import { comparisonText } from "./comparison.js";
import { shown } from "./digits.js";
import { Symbols } from "./symbols.js";

const LONG = 8; // characters, from which on a number is in smaller print

/** Create the cell of a number. `refer` returns the number, which may follow the chosen step and unit. */
export function createCell(view, refer, className = "") {
  const digits = createElement("span");
  const element = createElement("button", { class: `n ${className}`.trim(), type: "button", tabindex: -1 },
    createElement("i"), createElement("u"), digits);
  element.refer = refer;
  element.addEventListener("click", () => view.choose(refer()));
  return {
    element,
    update() {
      const number = refer();
      const { model } = view;
      element.hidden = !model.exists(number);
      if (element.hidden) return;
      const value = view.value(number);
      const isGate = model.isGate(number.q);
      const place = (one) => (isGate ? 100 * Math.max(0, Math.min(1, one)) : 50 + 50 * Math.max(-1, Math.min(1, one / view.scale(number) || 0)));
      const at = place(value);
      digits.textContent = view.textOf(number);
      element.classList.toggle("long", digits.textContent.length > LONG);
      element.dataset.tone = tone(value, isGate);
      element.style.setProperty("--a", `${isGate ? 0 : Math.min(50, at)}%`);
      element.style.setProperty("--w", `${isGate ? at : Math.abs(at - 50)}%`);
      const isChanged = view.isChanged(number);
      element.classList.toggle("changed", isChanged);
      if (isChanged) element.style.setProperty("--o", `${place(view.original(number))}%`);
      element.classList.toggle("can", view.isEditable(number));
      element.classList.toggle("set", view.isSet(number));
      view.mark(element, number);
      element.tabIndex = element.classList.contains("on") ? 0 : -1; // of all numbers, Tab goes to the chosen one
      const name = Symbols.plain(view.symbols.of(number));
      const was = isChanged ? `, was ${shown(view.original(number))}` : "";
      const both = view.pageData.baseline ? comparisonText(view, number) : null;
      element.title = both ? `${name}: ${both}${was}` : `${name}${was}`;
      element.setAttribute("aria-label", `${view.symbols.spoken(number)}: ${both ?? digits.textContent}${was}`);
    },
  };
}

/** The class of a color: of a gate, of a positive or negative number, or of one that isn't finite. */
export function tone(value, isGate) {
  if (!Number.isFinite(value)) return "alarm";
  if (value === 0 && !isGate) return "";
  return isGate ? "gate" : value < 0 ? "neg" : "pos";
}
