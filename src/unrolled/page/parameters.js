// The parameters of the layer as tables or images. The parameters behind the active value are highlighted.

import { createElement } from "./dom.js";
import { formatNumber, valueColor } from "./numbers.js";
import { formatIndex } from "./explain.js";
import { paintCell } from "./step.js";
import { clampIndex } from "./heatmaps.js";

const MAX_TABLE_SIZE = 12; // rows and columns; a larger parameter is an image
const MAX_MARKS = 64; // on an image

/** Create the parameters of the layer. Returns {element, update}. */
export function createParameters(view) {
  const element = createElement("div", { class: "parameters" });
  let renderedState = null;
  let figures = [];

  function update() {
    const state = `${view.layers.indexOf(view.layer)} ${view.theme}`;
    if (state !== renderedState) {
      figures = [...view.layer.parametersByKey.values()].map((parameter) => createParameter(view, parameter));
      element.replaceChildren(...figures.map((figure) => figure.element));
      renderedState = state;
    }
    const highlighted = new Map();
    for (const { key, index } of view.operands) highlighted.set(key, [...(highlighted.get(key) ?? []), index]);
    for (const figure of figures) figure.highlight(highlighted.get(figure.key) ?? []);
  }

  return { element, update };
}

function createParameter(view, parameter) {
  const [rows, columns] = parameter.shape.length === 2 ? parameter.shape : [1, parameter.shape.reduce((a, b) => a * b, 1)];
  const caption = createElement("figcaption", {}, createElement("b", {}, parameter.name),
    ` ${parameter.shape.join(" × ")} (${parameter.sizeNames.join(" × ")})`);
  if (!parameter.values) {
    return { key: parameter.key, element: createElement("figure", {}, caption, "not on this page"), highlight() {} };
  }
  const content = rows <= MAX_TABLE_SIZE && columns <= MAX_TABLE_SIZE
    ? createParameterTable(view, parameter, rows, columns)
    : createParameterImage(view, parameter, rows, columns);
  return { key: parameter.key, highlight: content.highlight, element: createElement("figure", {}, caption, content.element) };
}

function createParameterTable(view, parameter, rows, columns) {
  const cells = Array.from(parameter.values, (value, index) => {
    const position = rows > 1 ? `${Math.floor(index / columns)}, ${index % columns}` : index;
    const cell = createElement("td", { "data-index": index, "aria-label": `${parameter.name}[${position}]: ${formatNumber(value)}` });
    paintCell(cell, value, view.layer.parameterRange, view.theme);
    return cell;
  });
  const body = Array.from({ length: rows }, (_, row) => createElement("tr", {}, cells.slice(row * columns, (row + 1) * columns)));
  let highlighted = [];
  const onPointerOver = (event) => {
    const cell = event.target.closest("td");
    view.onPointerOver(event, cell && { key: parameter.key, index: Number(cell.dataset.index) });
  };
  const table = createElement("table", { class: "numbers", "aria-label": parameter.name, onpointerover: onPointerOver,
    onpointerleave: () => view.hover(null) }, createElement("tbody", {}, body));
  return {
    element: createElement("div", { class: "scroll" }, table),
    highlight(indices) {
      for (const cell of highlighted) cell.classList.remove("highlighted");
      highlighted = indices.map((index) => cells[index]);
      for (const cell of highlighted) cell.classList.add("highlighted");
    },
  };
}

function createParameterImage(view, parameter, rows, columns) {
  const canvas = createElement("canvas", { width: columns, height: rows, tabindex: 0, role: "application",
    "aria-roledescription": "matrix", "aria-label": `${parameter.name}, ${rows} rows and ${columns} columns, as colors` });
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  parameter.values.forEach((value, index) => {
    image.data.set([...valueColor(value, view.layer.parameterRange, view.theme), 255], 4 * index);
  });
  context.putImageData(image, 0, 0);
  canvas.style.height = `${Math.max(16, Math.min(320, rows * 9))}px`;
  const readout = createElement("output", { class: "readout" }, "Hover to read a value.");
  const marks = createElement("div", { class: "marks", "aria-hidden": "true" });
  const frame = createElement("div", { class: "canvas-frame" }, canvas, marks);
  Object.assign(frame.style, { width: `${columns * 16}px`, maxWidth: "100%" });

  let position = [0, 0];
  const showValue = (row, column) => {
    position = [clampIndex(row, rows), clampIndex(column, columns)];
    const indices = parameter.shape.length === 2 ? position.join(", ") : formatIndex(parameter.shape, position[1]);
    readout.textContent = `${parameter.name}[${indices}]: ${formatNumber(parameter.values[position[0] * columns + position[1]])}`;
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    showValue(((event.clientY - box.top) / box.height) * rows, ((event.clientX - box.left) / box.width) * columns);
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    showValue(position[0] + move[0], position[1] + move[1]);
  });
  return {
    element: createElement("div", {}, frame, readout),
    highlight: (indices) => marks.replaceChildren(...findRectangles(indices, columns).slice(0, MAX_MARKS).map(([top, bottom, left, right]) => {
      const mark = createElement("span", { class: "mark" });
      mark.style.inset = [top / rows, 1 - (right + 1) / columns, 1 - (bottom + 1) / rows, left / columns]
        .map((share) => `calc(${share * 100}% - 2px)`).join(" ");
      return mark;
    })),
  };
}

/** Enclose elements in rectangles [top, bottom, left, right]. Consecutive rows with the same columns share one. */
function findRectangles(indices, columns) {
  const columnRanges = new Map(); // by row
  for (const index of indices) {
    const row = Math.floor(index / columns);
    const [left, right] = columnRanges.get(row) ?? [Infinity, -Infinity];
    columnRanges.set(row, [Math.min(left, index % columns), Math.max(right, index % columns)]);
  }
  const rectangles = [];
  for (const [row, [left, right]] of [...columnRanges].sort((a, b) => a[0] - b[0])) {
    const last = rectangles.at(-1);
    if (last && last[1] === row - 1 && last[2] === left && last[3] === right) last[1] = row;
    else rectangles.push([row, row, left, right]);
  }
  return rectangles;
}
