// The parameters as coloured cells; those behind the number that is pointed at light up.

import { make } from "./dom.js";
import { colour, number } from "./numbers.js";
import { paint } from "./step.js";

const CELLS = 12; // rows and columns that are written out; a larger parameter is a picture

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
    const cell = make("td", { "aria-label": `${weight.name}[${where}]: ${number(value)}` });
    paint(cell, value, view.layer.mostWeight, view.theme);
    return cell;
  });
  const body = Array.from({ length: rows }, (_, row) => make("tr", {}, cells.slice(row * columns, (row + 1) * columns)));
  let lit = [];
  return {
    element: make("div", { class: "scroll" }, make("table", { class: "numbers", "aria-label": weight.name }, make("tbody", {}, body))),
    light(places) {
      for (const cell of lit) cell.classList.remove("lit");
      lit = places.map((place) => cells[place]);
      for (const cell of lit) cell.classList.add("lit");
    },
  };
}

function picture(view, weight, rows, columns) {
  const canvas = make("canvas", { width: columns, height: rows, role: "img",
    "aria-label": `${weight.name}, ${rows} rows and ${columns} columns of numbers as colours` });
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  weight.values.forEach((value, place) => {
    image.data.set([...colour(value, view.layer.mostWeight, view.theme), 255], 4 * place);
  });
  context.putImageData(image, 0, 0);
  const mark = make("span", { class: "mark", hidden: true });
  const element = make("div", { class: "picture" }, canvas, mark);
  element.style.width = `min(100%, ${columns * 16}px)`;
  canvas.style.height = `${Math.max(16, Math.min(320, rows * 9))}px`;
  return {
    element,
    light(places) {
      mark.hidden = places.length === 0;
      if (mark.hidden) return;
      const down = places.map((place) => Math.floor(place / columns));
      const across = places.map((place) => place % columns);
      const [top, bottom] = ends(down);
      const [left, right] = ends(across);
      mark.style.inset = [top / rows, 1 - (right + 1) / columns, 1 - (bottom + 1) / rows, left / columns]
        .map((share) => `calc(${share * 100}% - 2px)`).join(" ");
    },
  };
}

/** The smallest and the largest. */
function ends(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}
