// The gradient through time: how large ∂loss/∂quantity is at every step, on a logarithmic axis.

import { draw, make } from "./dom.js";
import { decode, number } from "./numbers.js";

const [CHART, TALL, LEFT, BOTTOM] = [720, 260, 56, 28];
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "10 4"]; // together with the colours no two alike up to 55
const COLOURS = {
  light: ["#d55e00", "#0072b2", "#009e73", "#a0508a", "#8a6d00", "#444", "#5b3fb5", "#b3123f", "#00798c", "#7a4a1e", "#5c8a00"],
  dark: ["#ff9a4d", "#6cc0ff", "#4fd6ac", "#f0a6d3", "#e8cf55", "#ccc", "#b9a3ff", "#ff8f9f", "#5fd3e0", "#d6a77a", "#b6e05a"],
};
const ROW = 9; // height of a row of marks: what has no place on a logarithmic axis

/** {element, update}: a line for each state and quantity, what they tell in words, and the same as a table. */
export function gradient(view) {
  const element = make("div", { class: "gradients" });
  let drawn = null;

  function update() {
    const wanted = `${view.data.parts.indexOf(view.layer.data)} ${view.theme}`;
    if (wanted !== drawn) {
      element.replaceChildren(...contents(view));
      drawn = wanted;
    }
    const cursor = element.querySelector(".now");
    if (cursor) {
      const x = across(view, view.layer.steps[view.k]);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
    }
  }

  return { element, update };
}

const across = (view, step) => LEFT + ((step + 0.5) / view.data.length) * (CHART - LEFT - 10);

function contents(view) {
  const { layer } = view;
  if (!layer.gradient) {
    return [make("p", {}, "There is no gradient in this trace. In Python ", make("code", {}, "trace.backward(loss)"),
      " before ", make("code", {}, "trace.to_html(…)"), " gives it.")];
  }
  const { norms, radii, words } = layer.gradient;
  const series = Object.entries(norms).map(([name, values]) => ({ name, values: decode(values), state: layer.states.includes(name) }));
  series.sort((a, b) => b.state - a.state);
  const all = series.flatMap((one) => [...one.values]);
  const marked = [all.includes(0) && "a ring where a gradient is exactly 0", all.some((value) => !Number.isFinite(value))
    && "a square where it is NaN or infinite"].filter(Boolean);
  return [
    ...words.map((text) => make("p", {}, text)),
    radii.length ? make("p", {}, "Spectral radius, above 1 what goes through grows and below 1 it fades: ",
      radii.map((one) => `${one.name}: ${one.radii.join(", ")}`).join("; "), ".") : "",
    chart(view, series),
    make("ul", { class: "key" }, series.map((one, k) => make("li", {}, sample(view, k, one), ` ∂loss/∂${one.name}`))),
    marked.length ? make("p", {}, make("small", {}, `Below the axis: ${marked.join(", ")}.`)) : "",
    table(view, series),
  ];
}

const colourOf = (view, k) => COLOURS[view.theme][k % COLOURS[view.theme].length];

function style(view, k, one) {
  return { fill: "none", stroke: colourOf(view, k), "stroke-dasharray": DASHES[k % 5], "stroke-width": one.state ? 2.6 : 1.4 };
}

function sample(view, k, one) {
  return draw("svg", { width: 34, height: 10, "aria-hidden": "true" }, draw("path", { d: "M1 5h32", ...style(view, k, one) }));
}

function chart(view, series) {
  const sizes = series.flatMap((one) => [...one.values]).filter((value) => value > 0 && Number.isFinite(value));
  const low = Math.floor(Math.log10(sizes.reduce((a, b) => Math.min(a, b), Infinity)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(sizes.reduce((a, b) => Math.max(a, b), 0))));
  if (!sizes.length) return make("p", {}, "Every gradient is zero or not finite.");
  const y = (value) => 10 + ((high - Math.log10(value)) / (high - low)) * (TALL - BOTTOM - 10);
  const each = Math.max(1, Math.ceil((high - low) / 8));
  const ticks = [];
  for (let power = low; power <= high; power += each) ticks.push(power);
  const lines = series.map((one, k) => {
    let pen = "M";
    const path = [...one.values].map((value, step) => {
      if (!(value > 0) || !Number.isFinite(value)) {
        pen = "M";
        return "";
      }
      const text = `${pen}${across(view, step).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
      return text;
    });
    return draw("path", { d: path.join(""), ...style(view, k, one), "stroke-linecap": "round" });
  });
  const steps = view.data.length;
  const apart = wholeSteps(steps);
  const marks = Array.from({ length: Math.ceil(steps / apart) }, (_, k) => k * apart);
  const beside = series.map((one, k) => ({ ...one, k })).filter((one) => one.values.some(offAxis));
  const band = beside.length ? beside.length * ROW + 6 : 0;
  const bottom = TALL - BOTTOM + band;
  const points = beside.flatMap((one, row) => [...one.values].flatMap((value, step) =>
    (offAxis(value) ? [sign(view, one, across(view, step), TALL - BOTTOM + 3 + (row + 0.5) * ROW, value)] : [])));
  return draw("svg", { viewBox: `0 0 ${CHART} ${TALL + band}`, class: "chart", role: "img",
    "aria-label": "size of the gradient at every time step, on a logarithmic axis" },
    ticks.map((power) => [
      draw("line", { x1: LEFT, x2: CHART - 10, y1: y(10 ** power), y2: y(10 ** power), class: "grid" }),
      draw("text", { x: LEFT - 6, y: y(10 ** power) + 4, "text-anchor": "end" }, power >= -3 && power <= 3 ? String(Number((10 ** power).toPrecision(1))) : `1e${power}`)]),
    marks.map((step) => draw("text", { x: across(view, step), y: bottom + 20, "text-anchor": "middle" }, String(step))),
    band ? draw("rect", { class: "zeros", x: LEFT, y: TALL - BOTTOM, width: CHART - LEFT - 10, height: band }) : null,
    draw("line", { class: "now", y1: 10, y2: bottom }), lines, points);
}

const offAxis = (value) => !(value > 0 && value < Infinity);

/** A ring where a gradient is exactly 0, a square where it is NaN or infinite. */
function sign(view, one, x, y, value) {
  const [kind, stroke] = [value === 0 ? "zero" : "broken", colourOf(view, one.k)];
  const words = draw("title", {}, `∂loss/∂${one.name}: ${number(value)}`);
  return value === 0 ? draw("circle", { class: kind, cx: x, cy: y, r: 3, fill: "none", stroke, "stroke-width": 1.5 }, words)
    : draw("rect", { class: kind, x: x - 3, y: y - 3, width: 6, height: 6, fill: "#f0e442", stroke }, words);
}

/** Steps between the ticks: 1, 2 or 5 times a power of ten, so that there are nine at most. */
function wholeSteps(steps) {
  for (let power = 1; ; power *= 10) {
    for (const each of [1, 2, 5]) if (steps / (each * power) <= 9) return each * power;
  }
}

/** The same as numbers; of a long sequence some of its steps. */
function table(view, series) {
  const steps = view.data.length;
  const each = Math.ceil(steps / 50);
  const shown = Array.from({ length: Math.ceil(steps / each) }, (_, k) => k * each);
  return make("details", {}, make("summary", {}, "the sizes as a table"),
    make("div", { class: "scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "step"), series.map((one) => make("th", { scope: "col" }, one.name)))),
      make("tbody", {}, shown.map((step) => make("tr", {}, make("th", { scope: "row" }, step), series.map((one) => make("td", {}, number(one.values[step])))))))));
}
