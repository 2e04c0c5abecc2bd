// The equations of the cell, as its code and as formulas; the one behind the number pointed at is marked.

import { formula, make } from "./dom.js";

/** {element, update}: the code line by line, and the formulas. */
export function equations(view) {
  const { code } = view.data;
  const element = make("div", { class: "equations" });
  let drawn = null;
  let lines = [];
  let formulas = [];

  function build() {
    lines = code.map((text) => make("li", {}, make("code", {}, text || " ")));
    formulas = view.layer.equations.map((one) => make("li", {}, formula(one.math)));
    element.replaceChildren(code.length
      ? make("ol", { class: "code", "aria-label": "one step, as the code of the cell has it" }, lines)
      : make("p", {}, "The source of this cell is not at hand."));
    if (formulas.length) {
      element.append(make("ol", { class: "formulas", "aria-label": "the same as formulas" }, formulas));
    }
  }

  function update() {
    const { layer, shown } = view;
    if (drawn !== layer) {
      build();
      drawn = layer;
    }
    const marked = shown ? (layer.rows.get(shown.key)?.lines ?? []) : [];
    formulas.forEach((item, place) => mark(item, marked.includes(place)));
    const spans = marked.map((place) => layer.equations[place]);
    lines.forEach((item, place) => mark(item, spans.some((one) => one.line <= place && place <= one.last)));
  }

  return { element, update };
}

function mark(item, is) {
  if (is) item.setAttribute("aria-current", "true");
  else item.removeAttribute("aria-current");
}
