// The gradient through time: how large ∂loss/∂quantity is at every step, on a logarithmic axis.

import { draw, make } from "./dom.js";
import { decode, number } from "./numbers.js";

const [CHART, TALL, LEFT, BOTTOM] = [720, 260, 56, 28];
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "10 4"]; // one less than colours: thirty lines differ
const COLOURS = { light: ["#d55e00", "#0072b2", "#009e73", "#a0508a", "#8a6d00", "#444"],
  dark: ["#ff9a4d", "#6cc0ff", "#4fd6ac", "#f0a6d3", "#e8cf55", "#ccc"] };

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
  return [
    ...words.map((text) => make("p", {}, text)),
    radii.length ? make("p", {}, "Spectral radius, above 1 what goes through grows and below 1 it fades: ",
      radii.map((one) => `${one.name}: ${one.radii.join(", ")}`).join("; "), ".") : "",
    chart(view, series),
    make("ul", { class: "key" }, series.map((one, k) => make("li", {}, sample(view, k, one), ` ∂loss/∂${one.name}`))),
    table(view, series),
  ];
}

function style(view, k, one) {
  return { fill: "none", stroke: COLOURS[view.theme][k % 6], "stroke-dasharray": DASHES[k % 5], "stroke-width": one.state ? 2.6 : 1.4 };
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
  const marks = [...new Set([0, 1, 2, 3, 4].map((part) => Math.round((part / 4) * (steps - 1))))];
  return draw("svg", { viewBox: `0 0 ${CHART} ${TALL}`, class: "chart", role: "img",
    "aria-label": "size of the gradient at every time step, on a logarithmic axis" },
    ticks.map((power) => [
      draw("line", { x1: LEFT, x2: CHART - 10, y1: y(10 ** power), y2: y(10 ** power), class: "grid" }),
      draw("text", { x: LEFT - 6, y: y(10 ** power) + 4, "text-anchor": "end" }, power >= -3 && power <= 3 ? String(Number((10 ** power).toPrecision(1))) : `1e${power}`)]),
    marks.map((step) => draw("text", { x: across(view, step), y: TALL - 8, "text-anchor": "middle" }, String(step))),
    draw("line", { class: "now", y1: 10, y2: TALL - BOTTOM }), lines);
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
