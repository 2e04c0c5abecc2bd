// The parameters as coloured cells; those behind the number that is pointed at light up.

import { make } from "./dom.js";
import { colour, number } from "./numbers.js";
import { places } from "./explain.js";
import { paint } from "./step.js";
import { inside } from "./whole.js";

const CELLS = 12; // rows and columns that are written out; a larger parameter is a picture
const MARKS = 64; // on a picture at most

/** {element, update}: every parameter of the layer. */
export function parameters(view) {
  const element = make("div", { class: "parameters" });
  let drawn = null;
  let shown = [];

  function update() {
    const wanted = `${view.data.parts.indexOf(view.layer.data)} ${view.theme}`;
    if (wanted !== drawn) {
      shown = [...view.layer.weights.values()].map((weight) => one(view, weight));
      element.replaceChildren(...shown.map((part) => part.element));
      drawn = wanted;
    }
    const lit = new Map();
    for (const { key, place } of view.reads) lit.set(key, [...(lit.get(key) ?? []), place]);
    for (const part of shown) part.light(lit.get(part.key) ?? []);
  }

  return { element, update };
}

function one(view, weight) {
  const [rows, columns] = weight.shape.length === 2 ? weight.shape : [1, weight.shape.reduce((a, b) => a * b, 1)];
  const title = make("figcaption", {}, make("b", {}, weight.name), ` ${weight.shape.join(" × ")} (${weight.sizes.join(" × ")})`);
  if (!weight.values) {
    return { key: weight.key, element: make("figure", {}, title, "not on this page"), light() {} };
  }
  const part = rows <= CELLS && columns <= CELLS ? grid(view, weight, rows, columns) : picture(view, weight, rows, columns);
  return { key: weight.key, light: part.light, element: make("figure", {}, title, part.element) };
}

function grid(view, weight, rows, columns) {
  const cells = Array.from(weight.values, (value, place) => {
    const where = rows > 1 ? `${Math.floor(place / columns)}, ${place % columns}` : place;
    const cell = make("td", { "data-place": place, "aria-label": `${weight.name}[${where}]: ${number(value)}` });
    paint(cell, value, view.layer.mostWeight, view.theme);
    return cell;
  });
  const body = Array.from({ length: rows }, (_, row) => make("tr", {}, cells.slice(row * columns, (row + 1) * columns)));
  let lit = [];
  const at = (event) => {
    const cell = event.target.closest("td");
    view.point(cell && { key: weight.key, place: Number(cell.dataset.place) });
  };
  const table = make("table", { class: "numbers", "aria-label": weight.name, onpointerover: at,
    onpointerleave: () => view.point(null) }, make("tbody", {}, body));
  return {
    element: make("div", { class: "scroll" }, table),
    light(places) {
      for (const cell of lit) cell.classList.remove("lit");
      lit = places.map((place) => cells[place]);
      for (const cell of lit) cell.classList.add("lit");
    },
  };
}

function picture(view, weight, rows, columns) {
  const canvas = make("canvas", { width: columns, height: rows, tabindex: 0, role: "application",
    "aria-roledescription": "matrix", "aria-label": `${weight.name}, ${rows} rows and ${columns} columns of numbers as colours` });
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  weight.values.forEach((value, place) => {
    image.data.set([...colour(value, view.layer.mostWeight, view.theme), 255], 4 * place);
  });
  context.putImageData(image, 0, 0);
  canvas.style.height = `${Math.max(16, Math.min(320, rows * 9))}px`;
  const read = make("output", { class: "read" }, "Point at it to read a number.");
  const marks = make("div", { class: "marks", "aria-hidden": "true" });
  const frame = make("div", { class: "picture" }, canvas, marks);
  Object.assign(frame.style, { width: `${columns * 16}px`, maxWidth: "100%" });

  let here = [0, 0];
  const tell = (row, column) => {
    here = [inside(row, rows), inside(column, columns)];
    const where = weight.shape.length === 2 ? here.join(", ") : places(weight.shape, here[1]);
    read.textContent = `${weight.name}[${where}]: ${number(weight.values[here[0] * columns + here[1]])}`;
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    tell(((event.clientY - box.top) / box.height) * rows, ((event.clientX - box.left) / box.width) * columns);
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    tell(here[0] + move[0], here[1] + move[1]);
  });
  return {
    element: make("div", {}, frame, read),
    light: (lit) => marks.replaceChildren(...blocks(lit, columns).slice(0, MARKS).map(([top, bottom, left, right]) => {
      const mark = make("span", { class: "mark" });
      mark.style.inset = [top / rows, 1 - (right + 1) / columns, 1 - (bottom + 1) / rows, left / columns]
        .map((share) => `calc(${share * 100}% - 2px)`).join(" ");
      return mark;
    })),
  };
}

/** Places as rectangles [top, bottom, left, right]: what is lit of a row, rows alike that follow each other as one. */
function blocks(lit, columns) {
  const lines = new Map();
  for (const place of lit) {
    const row = Math.floor(place / columns);
    const [left, right] = lines.get(row) ?? [Infinity, -Infinity];
    lines.set(row, [Math.min(left, place % columns), Math.max(right, place % columns)]);
  }
  const found = [];
  for (const [row, [left, right]] of [...lines].sort((a, b) => a[0] - b[0])) {
    const last = found.at(-1);
    if (last && last[1] === row - 1 && last[2] === left && last[3] === right) last[1] = row;
    else found.push([row, row, left, right]);
  }
  return found;
}
