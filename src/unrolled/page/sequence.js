// The whole sequence: every state and gate, as numbers of a small layer, else as colors.

import { createCell } from "./cells.js";
import { createElement, createMarkup } from "./dom.js";
import { createHeatMaps } from "./heat_maps.js";
import { symbol } from "./symbols.js";

const TABLE_UNITS = 4; // a layer with more units, or a longer sequence, is shown as colors
const TABLE_STEPS = 12;

/** Whether all numbers of a layer fit into tables. */
export function isSmall(model) {
  return model.units <= TABLE_UNITS && model.length <= TABLE_STEPS && model.complete;
}

/** Create the section. Returns {element, update}. */
export function createSequence(view) {
  const element = createElement("div");
  const maps = createHeatMaps(view, () => quantities());
  let drawn = "";
  let parts = [];

  function update() {
    const isTable = isSmall(view.model);
    const key = isTable ? view.partKey : "maps";
    if (key !== drawn) {
      parts = isTable ? [] : [maps];
      element.replaceChildren(isTable ? createTables() : maps.element);
      drawn = key;
    }
    for (const part of parts) part.update();
  }

  const quantities = () => view.model.nodes.map((node) => view.model.keys.get(node.id)).filter((key, k) => key === view.model.nodes[k].name);
  const steps = () => Array.from({ length: view.model.length }, (_, step) => step);

  function createTables() {
    const names = quantities();
    const units = Array.from({ length: view.model.units }, (_, unit) => unit);
    return createElement("div", { class: "seq" }, units.map((unit) => createElement("div", { class: "tab", role: "table", "aria-label": `unit ${unit}`, style: `--steps: ${view.model.length}` },
      createElement("b", { "aria-hidden": "true" }, `unit ${unit}`),
      createElement("div", { class: "tr", role: "row" }, createElement("span", { role: "columnheader" }, createElement("span", { class: "unseen" }, "quantity")),
        steps().map((step) => createElement("span", { class: "hd", role: "columnheader" }, `step ${step}`))),
      names.map((q) => createElement("div", { class: "tr", role: "row" }, createElement("span", { role: "rowheader" }, createMarkup("span", symbol(q))), steps().map((step) => {
        const cell = createCell(view, () => ({ q, t: step, u: unit }));
        parts.push(cell);
        return createElement("span", { role: "cell" }, cell.element);
      }))))));
  }

  return { element, update };
}
