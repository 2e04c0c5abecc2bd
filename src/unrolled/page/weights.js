// The weights behind the gates: one row for each unit, the same at every step.

import { createCell } from "./cells.js";
import { createElement, createMarkup } from "./dom.js";
import { unitsShown } from "./strip.js";
import { idOf } from "./model.js";
import { parameterText, Symbols } from "./symbols.js";

const MAX_SOURCE = 8; // columns of a matrix that are shown at once

/** Create the table of weights. Returns {element, update}. */
export function createWeights(view) {
  const element = createElement("div", { class: "weights" });
  let drawn = "";
  let cells = [];

  function update() {
    if (!element.offsetParent) return; // the tab is closed
    const key = [view.partKey, ...unitsShown(view), view.number.j ?? "", view.model.isParameter(view.number) ? idOf(view.number) : ""].join();
    if (key !== drawn) {
      cells = [];
      element.replaceChildren(...view.model.nodes.map(createGate).filter(Boolean), ...otherParameters(view.model).map(createParameter));
      drawn = key;
    }
    for (const cell of cells) cell.update();
    for (const button of element.querySelectorAll("[data-unit]")) button.classList.toggle("mine", Number(button.dataset.unit) === view.unit);
  }

  /** The table of a parameter that isn't part of a weighted sum. */
  function createParameter({ name, shape }) {
    const row = view.number.q === name ? view.number.u : view.unit;
    const indices = (size, center) => {
      const count = Math.min(size, MAX_SOURCE);
      const from = Math.max(0, Math.min(center - Math.floor(count / 2), size - count));
      return Array.from({ length: count }, (_, k) => from + k);
    };
    const columns = shape.length > 1 ? indices(shape[1], view.number.j ?? 0) : [0];
    const refer = (u, j) => (shape.length > 1 ? { q: name, u, j } : { q: name, u });
    const rows = indices(shape[0], row).map((u) => createElement("div", { class: "tr", role: "row" }, createElement("span", { role: "rowheader", class: "unit" }, `[${u}]`),
      createElement("span", { "aria-hidden": "true" }), columns.map((column) => createElement("span", { role: "cell" }, add(() => refer(u, column))))));
    const title = createElement("div", { class: "head", "aria-hidden": "true" });
    title.innerHTML = `<b>${parameterText(name)}</b>`;
    const style = `--widths: 26px 8px repeat(${columns.length}, minmax(var(--least, 0px), 92px))`;
    const head = createElement("div", { class: "tr", role: "row" }, createElement("span", { role: "columnheader" }, createElement("span", { class: "unseen" }, "row")),
      createElement("span", { role: "columnheader", "aria-colspan": columns.length, style: `grid-column: span ${columns.length + 1}` }, createElement("span", { class: "unseen" }, name)));
    return createElement("div", { class: "grp wide-grp", style, role: "table", "aria-label": name }, title, head, rows);
  }

  function createGate(node) {
    const { model, symbols } = view;
    const terms = gateTerms(model, node);
    if (!terms.length) return null;
    const blocks = terms.flatMap((term) => blocksOf(view, term));
    const style = `--widths: 26px ${blocks.map(({ columns }) => `8px repeat(${columns.length}, minmax(var(--least, 0px), 1fr))`).join(" ")}`;
    const title = createMarkup("div", `<b>${symbols.title(node)} <span></span></b><span class="quiet"></span>`, "head");
    title.setAttribute("aria-hidden", "true");
    title.querySelector("span").textContent = (model.descriptions[model.keys.get(node.id)] ?? "").split(": ")[0];
    title.lastChild.innerHTML = terms.map((term) => parameterText(term.text.split("{}").map((part) => part.replace(/[·+]/g, "").trim()).filter(Boolean).join(", "))).join(", ");
    const heads = blocks.map(({ name, columns }) => createElement("span", { role: "columnheader", "aria-colspan": columns.length, style: `grid-column: span ${columns.length + 1}` }, name));
    const units = unitsShown(view, model.size(model.keys.get(node.id)));
    const rows = units.map((unit) => createElement("div", { class: "tr", role: "row" }, createElement("span", { role: "rowheader" },
      createElement("button", { class: "unit", type: "button", tabindex: -1, "data-unit": unit, onclick: () => view.goToUnit(unit) }, `[${unit}]`)),
      blocks.map(({ columns, refer }) => [createElement("span", { "aria-hidden": "true" }), columns.map((column) => createElement("span", { role: "cell" }, add(() => refer(unit, column))))])));
    const corner = createElement("span", { role: "columnheader" }, createElement("span", { class: "unseen" }, "unit"));
    return createElement("div", { class: "grp wide-grp", style, role: "table", "aria-label": `weights of ${Symbols.plain(symbols.title(node))}` }, title, createElement("div", { class: "tr", role: "row" }, corner, heads), rows);
  }

  function add(refer) {
    const cell = createCell(view, refer);
    cells.push(cell);
    return cell.element;
  }

  return { element, update };
}

/** The terms of a node whose weights are shown with it. */
function gateTerms(model, node) {
  return node.terms.filter((term) => term.weighted && model.parameters.get(term.parameter)?.values && term.rows);
}

/** The vectors and matrices that no table of a gate has. */
function otherParameters(model) {
  const shown = new Set(model.nodes.flatMap((node) => gateTerms(model, node)).flatMap((term) => [term.parameter, term.bias]));
  return [...model.parameters.values()].filter(({ name, shape, values }) => values && !shown.has(name) && shape.length > 0 && shape.length < 3);
}

/** The columns of a term's matrix, and its bias: {name, columns, refer}. */
function blocksOf(view, term) {
  const { model } = view;
  const rows = model.weightedRows(term, 0, 0);
  const weights = rows.filter((row) => row.factors.length > 1).map((row) => row.factors[0]);
  const axis = term.transposed ? "u" : "j";
  const chosen = view.number.q === term.parameter ? weights.findIndex((one) => one[axis] === view.number[axis]) : 0;
  const count = Math.min(weights.length, MAX_SOURCE);
  const from = Math.max(0, Math.min(chosen - Math.floor(count / 2), weights.length - count));
  const columns = Array.from({ length: count }, (_, k) => from + k);
  const omitted = weights.length > count ? `, ${from} to ${from + count - 1} of ${weights.length}` : "";
  const refer = (unit, column) => model.weightedRows(term, 0, unit)[column].factors[0];
  const blocks = [{ name: `${term.parameter}${omitted}`, columns, refer }];
  if (term.bias) blocks.push({ name: term.bias, columns: [weights.length], refer: (unit, column) => model.weightedRows(term, 0, unit)[column].factors[0] });
  return blocks;
}
