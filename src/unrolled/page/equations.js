// The equations of the cell, as code and as formulas. The equation of the active value is highlighted.

import { createElement, parseMath } from "./dom.js";

/** Create the list of code lines and the list of formulas. Returns {element, update}. */
export function createEquations(view) {
  const { code } = view.data;
  const element = createElement("div", { class: "equations" });
  let renderedLayer = null;
  let lineItems = [];
  let formulaItems = [];

  function render() {
    lineItems = code.map((text) => createElement("li", {}, createElement("code", {}, text || " ")));
    formulaItems = view.layer.equations.map((equation) => createElement("li", {}, parseMath(equation.math)));
    element.replaceChildren(code.length
      ? createElement("ol", { class: "code", "aria-label": "one step, in the cell's own code" }, lineItems)
      : createElement("p", {}, "The source code of this cell is not available."));
    if (formulaItems.length) {
      element.append(createElement("ol", { class: "formulas", "aria-label": "one step, as formulas" }, formulaItems));
    }
  }

  function update() {
    const { layer, active } = view;
    if (renderedLayer !== layer) {
      render();
      renderedLayer = layer;
    }
    const current = active ? (layer.rows.get(active.key)?.equations ?? []) : [];
    formulaItems.forEach((item, index) => setCurrent(item, current.includes(index)));
    const ranges = current.map((index) => layer.equations[index]);
    lineItems.forEach((item, line) =>
      setCurrent(item, ranges.some(({ firstLine, lastLine }) => firstLine <= line && line <= lastLine)));
  }

  return { element, update };
}

function setCurrent(item, isCurrent) {
  if (isCurrent) item.setAttribute("aria-current", "true");
  else item.removeAttribute("aria-current");
}
