// The rows of the batch: their data, and the chooser in the header.

import { createElement } from "./dom.js";

/** Return the data of a row of the page. That of another row than the first one is stored as what differs, in rows.py. */
export function rowData(data, index) {
  return index ? withDifferences(data, data.rows[index - 1]) : data;
}

/** Merge data with what differs from it. */
export function withDifferences(data, changes) {
  const layers = data.layers.map((layer, k) => {
    const { diagram, program, ...others } = changes.layers[k];
    return { ...layer, ...others, diagram: { ...layer.diagram, ...diagram }, program: { ...layer.program, ...program } };
  });
  return { ...data, ...changes, layers };
}

/** The numbers of the rows in the batch. */
export const rowNumbers = (data) => [data.row, ...data.rows.map((one) => one.row)];

/** Create the chooser of the row; if there is only one on the page, its number. Returns {element, update}. */
export function createRowPicker(view) {
  const texts = view.rowNumbers.map((row) => `row ${row} of ${view.data.batchSize}`);
  if (texts.length === 1) return { element: view.data.batchSize > 1 ? createElement("span", { class: "quiet row" }, texts[0]) : null, update() {} };
  const omitted = view.data.batchSize - texts.length;
  const element = createElement("select", { "aria-label": "row", onchange: () => view.openRow(Number(element.value)) },
    texts.map((text, k) => createElement("option", { value: k }, text)), omitted ? createElement("option", { disabled: true }, `${omitted} more: not on this page`) : null);
  return { element, update() { element.value = view.rowIndex; } };
}
