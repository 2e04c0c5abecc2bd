// The whole sequence: a heat map of every quantity, units by time, on one scale; a click goes to a step and unit.

import { called } from "./layer.js";
import { make, visible } from "./dom.js";
import { colour, number } from "./numbers.js";

/** {element, update}: the heat maps, the legend of their colours, and the switch that sorts units. */
export function whole(view) {
  const maps = make("div", { class: "maps" });
  const sorted = make("input", { type: "checkbox", onchange: () => { drawn = null; update(); } });
  const read = make("output", { class: "read" }, "Point at a map to read a number; a click goes there.");
  const scale = make("div", { class: "scale" });
  const choice = make("label", {});
  const element = make("div", {},
    make("div", { class: "bar-of-controls" }, choice, scale), read, maps);
  let drawn = null;
  let shown = [];

  function update() {
    const { layer, data, theme } = view;
    const wanted = `${data.parts.indexOf(layer.data)} ${theme} ${sorted.checked}`;
    if (wanted !== drawn) {
      if (layer.all) choice.replaceChildren(sorted, " sort units by what they do");
      else choice.replaceChildren("Units are sorted by what they do.");
      const [plain, sums] = [[], []];
      for (const row of layer.quantities.map((one) => layer.rows.get(one.key))) {
        (row.wide ? sums : plain).push(row);
      }
      shown = [...plain, ...sums].map((row) => map(view, row, sorted.checked, read));
      const figures = shown.map((one) => one.element);
      maps.replaceChildren(...figures.slice(0, plain.length));
      if (sums.length) {
        maps.append(make("details", {}, make("summary", {}, `sums with several numbers a unit: ${sums.map((row) => called(row.key)).join(", ")}`),
          figures.slice(plain.length)));
      }
      scale.replaceChildren(...legend(view));
      drawn = wanted;
    }
    for (const one of shown) one.mark();
  }

  return { element, update };
}

function legend(view) {
  const most = view.layer.most || 1;
  const stops = Array.from({ length: 33 }, (_, k) => `rgb(${colour((k / 16 - 1) * most, most, view.theme)})`);
  const strip = make("span", { class: "bar wide", "aria-hidden": "true" });
  strip.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const swatch = (value, name) => {
    const square = make("span", { class: "swatch", "aria-hidden": "true" });
    square.style.background = `rgb(${colour(value, 1, view.theme)})`;
    return make("span", {}, square, ` ${name}`);
  };
  const own = [...view.layer.rows.values()].filter((row) => row.own !== null && !row.key.startsWith("before"));
  const apart = `${own.map((row) => called(row.key)).join(", ")}: each on a scale of its own`;
  return [make("span", {}, number(-most)), strip, make("span", {}, number(most)), swatch(NaN, "NaN"), swatch(Infinity, "infinite"),
    make("span", { class: "apart" }, apart)];
}

/** One quantity: features down, time across. */
function map(view, row, sorted, read) {
  const { layer, data } = view;
  const grid = row.heat ? binned(row) : plain(layer, row, sorted);
  const picture = row.key === "input" && data.inputs === "image";
  const most = layer.scale(row.key);
  const negative = picture && grid.values.some((value) => value < 0); // then zero is the middle grey
  const [wide, tall] = picture ? [grid.down, grid.across] : [grid.across, grid.down]; // an image stands upright
  const canvas = make("canvas", { width: wide, height: tall, tabindex: 0, role: "application", "aria-roledescription": "heat map" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(wide, tall);
  let [low, high] = [Infinity, -Infinity];
  for (let x = 0; x < grid.across; x += 1) {
    for (let y = 0; y < grid.down; y += 1) {
      const value = grid.values[x * grid.down + y];
      if (Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
      const grey = Math.round(255 * (negative ? (value / most + 1) / 2 : value / most));
      const shade = picture && Number.isFinite(value) ? [grey, grey, grey] : colour(value, most, view.theme);
      image.data.set([...shade, 255], 4 * (picture ? x * wide + y : y * wide + x));
    }
  }
  context.putImageData(image, 0, 0);
  const frame = make("div", { class: "picture" }, canvas);
  if (picture) canvas.style.aspectRatio = `${wide} / ${tall}`;
  else canvas.style.height = `${Math.max(28, Math.min(170, grid.down * 14))}px`;
  frame.style.maxWidth = picture ? `${(260 * wide) / Math.max(wide, tall)}px` : `${grid.across * 72}px`;
  const bins = [[grid.tall, "steps"], [grid.wide, "units"]].filter(([size]) => size > 1).map((one) => one.join(" "));
  const means = bins.length ? `; each colour is the mean of ${bins.join(" × ")}` : "";
  canvas.setAttribute("aria-label", `${called(row.key)}, ${row.words || "a quantity of the step"}: ${row.size} units over `
    + `${data.length} steps, ${low <= high ? `from ${number(low)} to ${number(high)}` : "none of them finite"}${means}`);
  const cursor = make("span", { class: "cursor", "aria-hidden": "true" });
  frame.append(cursor);

  let here = [0, 0];
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const column = inside(((event.clientX - box.left) / box.width) * wide, wide);
    const line = inside(((event.clientY - box.top) / box.height) * tall, tall);
    return picture ? [line, column] : [column, line];
  };
  const tell = ([x, y]) => {
    const label = data.labels ? ` (${visible(data.labels[grid.step(x)])})` : "";
    read.textContent = `${called(row.key)}, step ${grid.step(x)}${label}, unit ${grid.unit(y)}: `
      + `${number(grid.values[x * grid.down + y])}${means && " (a mean)"}`;
  };
  const choose = ([x, y]) => {
    view.goTo(grid.step(x));
    view.select({ key: row.key, place: grid.unit(y) });
    here = [x, y];
    tell(here);
  };
  canvas.addEventListener("pointermove", (event) => tell(at(event)));
  canvas.addEventListener("click", (event) => choose(at(event)));
  canvas.addEventListener("keydown", (event) => {
    const along = picture ? { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }
      : { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = along[event.key];
    if (!move && event.key !== "Enter") return;
    event.preventDefault();
    event.stopPropagation();
    if (move) {
      here = [inside(here[0] + move[0], grid.across), inside(here[1] + move[1], grid.down)];
    }
    choose(here);
  });

  const own = row.own === null ? "" : `a scale of its own, up to ${number(most)}`;
  const aside = [means.slice(2), own].filter(Boolean).join("; ");
  const caption = make("figcaption", {}, make("b", {}, called(row.key)), row.words ? ` ${row.words}` : "",
    make("small", {}, aside));
  const labels = row.key === "input" && !picture && data.labels && data.length <= 120
    ? make("div", { class: "texts", "aria-hidden": "true" }, data.labels.map((text) => make("span", {}, visible(text))))
    : null;
  if (labels) labels.style.maxWidth = frame.style.maxWidth;
  return {
    element: make("figure", { class: "map" }, caption, frame, labels),
    mark() {
      const step = layer.steps[view.k];
      const x = Math.floor(step / grid.tall);
      const [begin, size] = [`${(x / grid.across) * 100}%`, `${100 / grid.across}%`];
      Object.assign(cursor.style, picture ? { top: begin, height: size, left: "-3px", right: "-3px" } : { left: begin, width: size });
      here = [x, here[1]];
    },
  };
}

/** The place that a position falls into, of so many. */
export function inside(position, count) {
  return Math.max(0, Math.min(count - 1, Math.floor(position)));
}

function plain(layer, row, sorted) {
  const units = layer.order.length;
  const order = Array.from({ length: row.size }, (_, place) =>
    (sorted && row.key !== "input" && row.size % units === 0
      ? place - (place % units) + layer.order[place % units] : place));
  const across = layer.steps.length;
  const values = new Float64Array(across * row.size);
  for (let k = 0; k < across; k += 1) order.forEach((unit, y) => { values[k * row.size + y] = layer.value(row.key, k, unit); });
  return { values, across, down: row.size, tall: 1, wide: 1, step: (x) => layer.steps[x], unit: (y) => order[y] };
}

function binned(row) {
  const { steps: tall, features: wide, size: down, values, order } = row.heat;
  return { values, across: values.length / down, down, tall, wide, step: (x) => x * tall, unit: (y) => order[y * wide] };
}
