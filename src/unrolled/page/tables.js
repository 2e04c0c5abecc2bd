// Every number of the chosen step: the gates, a unit in each row, and the numbers that follow from them.

import { createCell } from "./cells.js";
import { createElement, createMarkup } from "./dom.js";
import { continuesNormalization } from "./formula.js";
import { unitsShown } from "./strip.js";
import { afterName, escape, symbol } from "./names.js";
import { Symbols } from "./symbols.js";

const MAX_RESULTS = 6; // columns of the table of results, the values computed from the gates
const MAX_DENSE_RESULTS = 7;

const MAX_ROOMY = 5; // tables that have room for their titles in lines of their own

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

  const rowHead = (unit) => createElement("span", { role: "rowheader" },
    createElement("button", { class: "unit", type: "button", tabindex: -1, "data-unit": unit, "aria-label": `unit ${unit}`, onclick: () => view.goToUnit(unit) }, `[${unit}]`));
  const createRow = (...cells) => createElement("div", { class: "tr", role: "row" }, cells);
  const columnHead = (markup, className = null) => {
    const head = createMarkup("span", markup, className);
    head.setAttribute("role", "columnheader");
    head.title = Symbols.plain(markup.replace("<br>", " ")); // the head of a narrow column is cut off
    return head;
  };

  function draw() {
    const { model } = view;
    const layers = model.nodes.filter((node) => node.kind === "layer");
    const columns = layers.map((node) => columnsOf(view, node));
    const inColumns = new Set(columns.flat().map((column) => column.q));
    const others = model.nodes.filter((node) => node.kind !== "layer" && !inColumns.has(model.keys.get(node.id)));
    const width = Math.max(...columns.map((one) => one.length));
    const groups = [];
    for (const { heads, members } of shareHeads(columns, width)) {
      const results = [...new Set(members.map(({ k }) => columns[k].at(-1).head))].join(" or ");
      members.forEach(({ k, slots }, at) => groups.push(createGate(layers[k], columns[k], slots, width, at ? null : [...heads, results])));
    }
    const isDense = groups.length + Math.ceil(others.length / MAX_RESULTS) > MAX_ROOMY;
    element.classList.toggle("dense", isDense);
    const count = Math.ceil(others.length / (isDense ? MAX_DENSE_RESULTS : MAX_RESULTS));
    const size = Math.ceil(others.length / count);
    const parts = Array.from({ length: count }, (_, k) => createOthers(others.slice(k * size, (k + 1) * size)));
    return [createElement("div", { class: "gates" }, groups), ...parts];
  }

  /** The table of a gate. Without heads, those of the table above are shown, and its own are there for screen readers. */
  function createGate(node, columns, slots, width, heads) {
    const { model } = view;
    const key = model.keys.get(node.id);
    const style = `--columns: ${width}`;
    const inSlots = (entries, blank) => Array.from({ length: width }, (_, slot) => (slots.includes(slot) ? entries[slots.indexOf(slot)] : blank()));
    const head = createElement("div", { class: heads ? "cols" : "cols unseen", style, role: "row" }, createElement("span", { role: "columnheader" }, createElement("span", { class: "unseen" }, "unit")),
      (heads ?? inSlots(columns.map((column) => column.head), () => "")).map((markup) => (markup ? columnHead(markup) : createElement("span", { role: "cell" }))));
    const [word, text = ""] = (model.descriptions[key] ?? "").split(": ");
    const name = view.symbols.distinctTitle(node);
    const title = createElement("div", { class: "head", "aria-hidden": "true", title: [word, text].filter(Boolean).join(": ") || null });
    title.innerHTML = `<b>${name} <span></span></b><span class="quiet"></span>`;
    title.querySelector("b > span:last-child").textContent = afterName(key, word);
    title.lastChild.textContent = text;
    const rows = unitsShown(view, model.size(key)).map((unit) => createRow(rowHead(unit), inSlots(columns.map((column, k) => createElement("div", { class: "pre", role: "cell", "data-op": operator(columns, k) },
      add(() => ({ q: column.q, t: view.step, u: unit })))), () => createElement("span", { role: "cell" }))));
    return createElement("div", { class: "gate", "data-node": key, role: "table", "aria-label": [afterName(key, word) === word ? `${word} ${Symbols.plain(name)}`.trim() : word, text].filter(Boolean).join(": ") },
      head, createElement("div", { class: "grp", style, role: "rowgroup" }, title, rows));
  }

  function createOthers(nodes) {
    const { model, symbols } = view;
    const heads = nodes.map((node) => columnHead(model.labels.get(node.id) ? symbol(model.labels.get(node.id)) : symbols.expression(node, null, "t"), "col"));
    const keys = nodes.map((node) => model.keys.get(node.id));
    const units = unitsShown(view, Math.max(...keys.map((key) => model.size(key))));
    const rows = units.map((unit) => createRow(rowHead(unit), keys.map((key, k) => createElement("div", { class: "pre", role: "cell", "data-op": follows(nodes, k) },
      unit < model.size(key) ? add(() => ({ q: key, t: view.step, u: unit })) : null))));
    return createElement("div", { class: "grp states", style: `--columns: ${nodes.length}`, role: "table", "aria-label": "computed from these" },
      createRow(createElement("span", { class: "col", role: "columnheader" }, createElement("span", { class: "unseen" }, "unit")), heads), rows);
  }

  return { element, update };
}

/** Join gates whose columns fit below the same heads: [{heads, members: [{k, slots}]}], with the slot of each column. */
function shareHeads(columns, width) {
  const found = [];
  columns.forEach((own, k) => {
    const heads = own.slice(0, -1).map((column) => column.head);
    const shared = found.at(-1);
    const [longer, shorter] = shared && shared.heads.length > heads.length ? [shared.heads, heads] : [heads, shared?.heads ?? [""]];
    if (slotsIn(longer, shorter).includes(-1)) {
      found.push({ heads, members: [{ k, own: heads }] });
    } else {
      shared.heads = longer;
      shared.members.push({ k, own: heads });
    }
  });
  return found.map(({ heads, members }) => {
    const padded = [...Array(width - 1 - heads.length).fill(""), ...heads];
    return { heads: padded, members: members.map(({ k, own }) => ({ k, slots: [...slotsIn(padded, own), width - 1] })) };
  });
}

/** The positions of some heads among others, in order; -1 for one that isn't there. */
function slotsIn(heads, some) {
  let from = 0;
  return some.map((head) => {
    const slot = heads.indexOf(head, from);
    from = slot < 0 ? heads.length : slot + 1;
    return slot;
  });
}

/** The columns of a gate's table: its weighted sums, their sum and the result. */
function columnsOf(view, node) {
  const { model } = view;
  const key = model.keys.get(node.id);
  const terms = node.terms.flatMap((term, k) => {
    if (term.source === null) return [];
    if (model.isPart(node, term)) return [{ q: `${key}.${k}`, sign: term.sign, head: partHead(view, node, term) }];
    return term.weighted ? [] : [{ q: model.sourceNumber(term.source, 0, 0).q, sign: term.sign, head: view.symbols.source(term.source, "t"), shifted: term.source.startsWith("before:") }];
  });
  const sum = model.hasSum(node) ? [{ q: `sum.${key}`, head: "sum" }] : [];
  const parts = terms.length > 1 || sum.length ? terms.filter((column) => !column.shifted) : [];
  return [...parts, ...sum, { q: key, head: node.glyph === "W" ? "sum" : escape(node.glyph), isSum: node.operation === "sum" }];
}

function partHead(view, node, term) {
  const { model } = view;
  if (node.terms.some((one) => continuesNormalization(one) && one.normalization.group === term.normalization?.group)) return "normalized<br>sum";
  if (term.source === "x") return "from the<br>input";
  if (term.source.startsWith("before:")) {
    const name = term.source.slice(7);
    const description = (model.descriptions[name] ?? name).split(/[:,]/)[0];
    return `from the ${model.changedStates ? "" : "last"}<br>${escape(description)}`;
  }
  return `from<br>${view.symbols.source(term.source, "t")}`;
}

function operator(columns, k) {
  const { q, sign, isSum } = columns[k];
  if (q.startsWith("sum.")) return k > 1 ? "=" : "";
  if (k === columns.length - 1) return k === 0 ? "" : isSum ? "=" : "→";
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
