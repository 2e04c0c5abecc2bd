// Every number of the chosen step: the gates, a unit in each row, and the numbers that follow from them.

import { createCell } from "./cells.js";
import { createElement, createMarkup } from "./dom.js";
import { unitsShown } from "./strip.js";
import { escape, symbol } from "./symbols.js";

const MAX_RESULTS = 6; // columns of the table of results, the values computed from the gates

/** Create the tables. Returns {element, update}. */
export function createTables(view) {
  const element = createElement("div", { class: "tables" });
  let drawn = "";
  let cells = [];

  function update() {
    const key = [view.partKey, ...unitsShown(view, view.model.units)].join();
    if (key !== drawn) {
      cells = [];
      element.replaceChildren(...draw());
      drawn = key;
    }
    for (const cell of cells) cell.update();
    for (const button of element.querySelectorAll("[data-unit]")) button.classList.toggle("mine", Number(button.dataset.unit) === view.unit);
  }

  function add(refer) {
    const cell = createCell(view, refer);
    cells.push(cell);
    return cell.element;
  }

  const unitButton = (unit) => createElement("button", { class: "unit", type: "button", tabindex: -1, "data-unit": unit, onclick: () => view.goToUnit(unit) }, `[${unit}]`);

  function draw() {
    const { model } = view;
    const layers = view.model.nodes.filter((node) => node.kind === "layer");
    const others = model.nodes.filter((node) => node.kind !== "layer");
    const columns = layers.map((node) => columnsOf(view, node));
    const shared = new Set(columns.map((one) => one.slice(0, -1).map((column) => column.head).join("|"))).size === 1;
    const results = [...new Set(columns.map((one) => one.at(-1).head))].join(" or ");
    const width = Math.max(...columns.map((one) => one.length));
    const groups = layers.map((node, k) => createGate(node, columns[k], width, shared ? k === 0 && results : columns[k].at(-1).head));
    const parts = [];
    for (let from = 0; from < others.length; from += MAX_RESULTS) parts.push(createOthers(others.slice(from, from + MAX_RESULTS)));
    return [createElement("div", { class: "gates" }, groups), ...parts];
  }

  /** The table of a gate. Without a head for its last column, it has the heads of the table above. */
  function createGate(node, columns, width, lastHead) {
    const key = view.model.keys.get(node.id);
    const style = `--columns: ${width}`;
    const blanks = Array.from({ length: width - columns.length }, () => createElement("span"));
    const head = createElement("div", { class: "cols", style }, createElement("span"), blanks.map((blank) => blank.cloneNode()), columns.map((column, k) => createMarkup("span", k === columns.length - 1 ? lastHead || "" : column.head)));
    const title = createElement("div", { class: "head" });
    title.innerHTML = `<b>${node.name ? symbol(node.name) : escape(node.glyph)} <span></span></b><span class="quiet"></span>`;
    const [word, text = ""] = (view.model.descriptions[key] ?? "").split(": ");
    title.querySelector("span").textContent = word;
    title.lastChild.textContent = text;
    const units = unitsShown(view, view.model.size(key));
    const rows = units.map((unit) => [unitButton(unit), blanks.map((blank) => blank.cloneNode()), columns.map((column, k) => createElement("div", { class: "pre", "data-op": operator(columns, k) },
      add(() => ({ q: column.q, t: view.step, u: unit }))))]);
    return createElement("div", { class: "gate", "data-node": key }, lastHead ? head : null,
      createElement("div", { class: "grp", style }, title, rows));
  }

  function createOthers(nodes) {
    const style = `--columns: ${nodes.length}`;
    const heads = nodes.map((node) => createMarkup("span", node.name ? symbol(node.name) : view.symbols.expression(node, null, "t"), "col"));
    const keys = nodes.map((node) => view.model.keys.get(node.id));
    const units = unitsShown(view, Math.max(...keys.map((key) => view.model.size(key))));
    const rows = units.map((unit) => [unitButton(unit), keys.map((key, k) => createElement("div", { class: "pre", "data-op": follows(nodes, k) },
      unit < view.model.size(key) ? add(() => ({ q: key, t: view.step, u: unit })) : null))]);
    return createElement("div", { class: "grp states", style }, createElement("span", { class: "col" }), heads, rows);
  }

  return { element, update };
}

/** The columns of a gate's table: its weighted sums, their sum and the result. */
function columnsOf(view, node) {
  const { model } = view;
  const key = model.keys.get(node.id);
  const terms = node.terms.flatMap((term, k) => {
    if (term.source === null) return [];
    if (model.isPart(node, term)) return [{ q: `${key}.${k}`, sign: term.sign, head: partHead(view, term) }];
    return term.weighted ? [] : [{ q: model.sourceNumber(term.source, 0, 0).q, sign: term.sign, head: view.symbols.source(term.source, "t"), shifted: term.source.startsWith("before:") }];
  });
  const sum = model.hasSum(node) ? [{ q: `sum.${key}`, head: "sum" }] : [];
  return [...(terms.length > 1 || sum.length ? terms.filter((column) => !column.shifted) : []), ...sum, { q: key, head: node.glyph === "W" ? "sum" : escape(node.glyph) }];
}

function partHead(view, term) {
  const { model } = view;
  if (term.source === "x") return "from the<br>input";
  if (term.source.startsWith("before:")) {
    const name = term.source.slice(7);
    const description = (model.descriptions[name] ?? name).split(/[:,]/)[0];
    return `from the last<br>${escape(description)}`;
  }
  const node = model.nodesById.get(term.source);
  return `from<br>${node.name ? symbol(node.name) : view.symbols.expression(node, null, "t")}`;
}

function operator(columns, k) {
  const { q, sign } = columns[k];
  if (q.startsWith("sum.")) return k > 1 ? "=" : "";
  if (k === columns.length - 1) return "→";
  return k === 0 ? (sign < 0 ? "−" : "") : sign < 0 ? "−" : "+";
}

/** The sign before a column of the table of results. A sum has = before it, and its terms have +. */
function follows(nodes, k) {
  const sumAt = nodes.findIndex((node, index) => index >= k && node.glyph === "+" && node.terms.length <= index
    && node.terms.every((term, j) => nodes[index - node.terms.length + j]?.id === term.source));
  if (sumAt < 0) return "";
  const first = sumAt - nodes[sumAt].terms.length;
  if (k === sumAt) return "=";
  return k > first ? (nodes[sumAt].terms[k - first].sign < 0 ? "−" : "+") : "";
}
