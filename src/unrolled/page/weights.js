// The weights behind the gates: one row for each unit, the same at every step.

import { createCell } from "./cells.js";
import { createElement, createMarkup } from "./dom.js";
import { parametersOf } from "./formula.js";
import { unitsShown } from "./strip.js";
import { idOf } from "./model.js";
import { afterName, escape, parameterText, symbol } from "./names.js";
import { Symbols } from "./symbols.js";

const MAX_SOURCE = 8; // columns of a matrix that are shown at once, if there is room
const MIN_SOURCE = 2;
const LEAST_WIDTH = 424; // pixels; a narrower table scrolls
// Pixels, as in the style sheet:
const WEIGHT_WIDTH = 51;
const ROW_NAME_WIDTH = 26;
const PARAMETER_GAP = 8; // before each parameter
const WEIGHTS_PADDING = 6;

/** Create the table of weights. Returns {element, update}. */
export function createWeights(view) {
  const element = createElement("div", { class: "weights" });
  let drawn = "";
  let cells = [];
  let width = 0;
  new ResizeObserver(() => { if (element.clientWidth - WEIGHTS_PADDING !== width) requestAnimationFrame(update); }).observe(element);

  function update() {
    if (!element.offsetParent) return; // the tab is closed
    width = element.clientWidth - WEIGHTS_PADDING;
    const key = [view.partKey, width, ...unitsShown(view), view.number.j ?? "", view.model.isParameter(view.number) ? idOf(view.number) : ""].join();
    if (key !== drawn) {
      cells = [];
      element.replaceChildren(createElement("h2", {}, "Weights, the same at every step"), ...createGates(), ...otherParameters(view.model).map(createParameter));
      drawn = key;
    }
    for (const cell of cells) cell.update();
    if (cells.length && cells.every((cell) => cell.element.tabIndex)) cells[0].element.tabIndex = 0; // the way in for Tab
    for (const button of element.querySelectorAll("[data-unit]")) button.classList.toggle("mine", Number(button.dataset.unit) === view.unit);
  }

  /** The table of a parameter that isn't part of a weighted sum. */
  function createParameter({ name, shape }) {
    const row = view.number.q === name ? view.number.u : view.unit;
    const indices = (size, center, limit = MAX_SOURCE) => {
      const count = Math.min(size, limit);
      const from = Math.max(0, Math.min(center - Math.floor(count / 2), size - count));
      return Array.from({ length: count }, (_, k) => from + k);
    };
    const columns = shape.length > 1 ? indices(shape[1], view.number.j ?? 0, Math.max(MIN_SOURCE, Math.min(MAX_SOURCE, columnsIn(width, 1)))) : [0];
    const refer = (u, j) => (shape.length > 1 ? { q: name, u, j } : { q: name, u });
    const rows = indices(shape[0], row).map((u) => createElement("div", { class: "tr", role: "row" }, createElement("span", { role: "rowheader", class: "unit", "aria-label": `row ${u}` }, `[${u}]`),
      createElement("span", { "aria-hidden": "true" }), columns.map((column) => createElement("span", { role: "cell" }, add(() => refer(u, column))))));
    const title = createElement("div", { class: "head", "aria-hidden": "true" });
    const windows = [["rows", shape[0], indices(shape[0], row)], ["columns", shape[1] ?? 1, columns]].filter(([, size, shown]) => size > shown.length);
    title.innerHTML = `<b>${parameterText(name)}</b><span class="quiet">${windows.map(([what, size, shown]) => `${what} ${shown[0]}–${shown.at(-1)} of ${size}`).join(", ")}</span>`;
    const style = `--widths: 26px 6px repeat(${columns.length}, minmax(var(--least), 92px))`;
    const head = createElement("div", { class: "tr", role: "row" }, createElement("span", { role: "columnheader" }, createElement("span", { class: "unseen" }, "row")),
      createElement("span", { role: "columnheader", "aria-colspan": columns.length, style: `grid-column: span ${columns.length + 1}` }, createElement("span", { class: "unseen" }, name)));
    return createElement("div", { class: "grp wide-grp", style, role: "table", "aria-label": name }, title, head, rows);
  }

  /** The tables of the weighted sums. Tables with the same columns have one head, above the first of them. */
  function createGates() {
    let above = "";
    return view.model.nodes.filter((node) => gateTerms(view.model, node).length).map((node) => {
      const blocks = blocksOf(view, gateTerms(view.model, node), width);
      const head = JSON.stringify(blocks.map(({ name, heads }) => [name, heads]));
      const table = createGate(node, blocks, head !== above);
      above = head;
      return table;
    });
  }

  function createGate(node, blocks, hasHead) {
    const { model, symbols } = view;
    const terms = gateTerms(model, node);
    const style = `--widths: 26px ${blocks.map(({ columns }) => `6px repeat(${columns.length}, minmax(var(--least), 1fr))`).join(" ")}`;
    const title = createMarkup("div", `<b>${symbols.title(node)} <span></span></b><span class="quiet"></span>`, "head");
    title.setAttribute("aria-hidden", "true");
    title.querySelector("b > span:last-child").textContent = afterName(model.keys.get(node.id), (model.descriptions[model.keys.get(node.id)] ?? "").split(": ")[0]);
    const formulas = terms.map((term) => parameterText(parametersOf(term).filter(Boolean).join(", ")));
    title.lastChild.innerHTML = [rowsText(model, terms), formulas.join(", ")].filter(Boolean).join(": ");
    const headCells = (texts) => blocks.map(({ columns }, k) => createMarkup("span", texts[k], "over")).map((cell, k) => {
      cell.setAttribute("role", "columnheader");
      cell.setAttribute("aria-colspan", blocks[k].columns.length);
      cell.style.gridColumn = `span ${blocks[k].columns.length + 1}`;
      return cell;
    });
    const units = unitsShown(view, model.size(model.keys.get(node.id)));
    const rows = units.map((unit) => createElement("div", { class: "tr", role: "row" }, createElement("span", { role: "rowheader" },
      createElement("button", { class: "unit", type: "button", tabindex: -1, "data-unit": unit, "aria-label": `unit ${unit}`, onclick: () => view.goToUnit(unit) }, `[${unit}]`)),
      blocks.map(({ columns, refer }) => [createElement("span", { "aria-hidden": "true" }), columns.map((column) => createElement("span", { role: "cell" }, add(() => refer(unit, column))))])));
    const corner = createElement("span", { role: "columnheader" }, createElement("span", { class: "unseen" }, "unit"));
    const names = createElement("div", { class: hasHead ? "tr" : "unseen", role: "row" }, corner, headCells(blocks.map(({ name }) => name)));
    const sources = hasHead && createElement("div", { class: "tr", "aria-hidden": "true" }, createElement("span"),
      blocks.map(({ heads }) => [createElement("span"), heads.map((head) => createMarkup("span", head, "over"))]));
    return createElement("div", { class: "grp wide-grp", style, role: "table", "aria-label": `weights of ${Symbols.plain(symbols.title(node))}` }, names, sources || null, title, rows);
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

/** How many columns of several parameters fit into a width. */
const columnsIn = (width, count) => Math.floor((Math.max(width, LEAST_WIDTH) - ROW_NAME_WIDTH - count * PARAMETER_GAP) / WEIGHT_WIDTH);

/** The rows of the parameters that belong to a gate: "rows 3–5". Empty if they are all rows, or differ. */
function rowsText(model, terms) {
  const [first, stop] = terms[0].rows;
  const isSame = terms.every((term) => !term.transposed && term.rows[0] === first && term.rows[1] === stop);
  const isAll = terms.every((term) => model.parameters.get(term.parameter).shape[0] === stop - first);
  return isSame && !isAll ? `rows ${first}–${stop - 1}` : "";
}

/** The columns of the matrices of terms, and their biases: [{name, heads, columns, refer}]. */
function blocksOf(view, terms, width) {
  const biases = terms.filter((term) => term.bias).length;
  const sizes = terms.map((term) => matrixColumns(view, term).length);
  let room = columnsIn(width, terms.length + biases) - biases;
  const counts = new Map();
  // A narrow matrix leaves its room to the others.
  [...terms.keys()].sort((a, b) => sizes[a] - sizes[b]).forEach((k, at) => {
    const count = Math.min(sizes[k], MAX_SOURCE, Math.max(MIN_SOURCE, Math.floor(room / (terms.length - at))));
    counts.set(k, count);
    room -= count;
  });
  return terms.flatMap((term, k) => blocksOfTerm(view, term, counts.get(k)));
}

/** The weights of a term for its first unit. */
const matrixColumns = (view, term) => view.model.weightedRows(term, 0, 0).filter((row) => row.factors.length > 1);

/** The columns of a term's matrix, a window around the chosen one, and its bias. */
function blocksOfTerm(view, term, count) {
  const { model } = view;
  const rows = matrixColumns(view, term);
  const axis = term.transposed ? "u" : "j";
  const chosen = view.number.q === term.parameter ? rows.findIndex(({ factors: [one] }) => one[axis] === view.number[axis]) : 0;
  const from = Math.max(0, Math.min(chosen - Math.floor(count / 2), rows.length - count));
  const columns = Array.from({ length: count }, (_, k) => from + k);
  const source = term.source.startsWith("before:") ? term.source.slice(7) : term.source === "x" ? "x" : null;
  const heads = columns.map((column) => `${source === null ? "" : symbol(source)}[${rows[column].factors[1].u}]`);
  const refer = (unit, column) => model.weightedRows(term, 0, unit)[column].factors[0];
  const name = escape(rows.length > count ? `${term.parameter}, ${count} of ${rows.length}` : term.parameter);
  const blocks = [{ name, heads, columns, refer }];
  if (term.bias) blocks.push({ name: escape(term.bias), heads: [""], columns: [rows.length], refer });
  return blocks;
}
