// The layer unrolled through time: a box for each step, an arrow for each thing that flows, and what plays them.

import { called } from "./layer.js";
import { draw, index, make, visible } from "./dom.js";
import { colour } from "./numbers.js";

const BESIDE = 12; // boxes on each side of the current one
const PAUSE = 700; // milliseconds a step takes when playing

/** {element, update, toggle}: the boxes and the controls below them. */
export function timeline(view) {
  const strip = make("div", { class: "strip", role: "group", "aria-label": "steps of the layer" });
  const slider = make("input", {
    type: "range", min: 0, step: 1, "aria-label": "time step",
    oninput: () => view.go(Number(slider.value)),
  });
  const where = make("output", { class: "where" });
  let timer = null;

  const buttons = {
    first: button("first step", "«", () => view.go(0)),
    back: button("previous step", "‹", () => view.go(view.k - 1)),
    play: button("play", "▶︎ play", toggle),
    next: button("next step", "›", () => view.go(view.k + 1)),
    last: button("last step", "»", () => view.go(view.layer.steps.length - 1)),
  };
  buttons.play.classList.add("play");
  const controls = make("div", { class: "controls" }, ...Object.values(buttons), slider, where);

  function toggle() {
    if (timer !== null) return stop();
    const { steps, backward } = view.layer;
    const [begin, end] = backward ? [steps.length - 1, 0] : [0, steps.length - 1];
    if (view.k === end) view.go(begin);
    timer = setInterval(() => {
      view.go(view.k + (view.layer.backward ? -1 : 1));
      if (view.k === end) stop();
    }, PAUSE);
    label("pause", "❚❚ pause");
    return undefined;
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    label("play", "▶︎ play");
  }

  function label(name, text) {
    buttons.play.setAttribute("aria-label", name);
    buttons.play.textContent = text;
  }

  let drawn = null;
  function update() {
    const { layer, k } = view;
    const count = layer.steps.length;
    slider.max = count - 1;
    slider.value = k;
    const step = layer.steps[k];
    const text = `step ${step} of 0–${view.data.length - 1}${view.data.labels ? `: ${visible(view.data.labels[step])}` : ""}`;
    slider.setAttribute("aria-valuetext", text);
    where.textContent = text;
    for (const one of [buttons.first, buttons.back]) one.setAttribute("aria-disabled", k === 0);
    for (const one of [buttons.last, buttons.next]) one.setAttribute("aria-disabled", k === count - 1);
    const from = Math.max(0, Math.min(k - BESIDE, count - 2 * BESIDE - 1));
    const to = Math.min(count, from + 2 * BESIDE + 1);
    const wanted = `${view.data.parts.indexOf(layer.data)} ${from} ${to} ${view.theme}`;
    const reached = strip.matches(":focus-within"); // by the keyboard, which is to stay there
    if (drawn !== wanted) {
      strip.replaceChildren(...boxes(view, from, to));
      drawn = wanted;
    }
    for (const box of strip.querySelectorAll(".box")) {
      const current = Number(box.dataset.k) === k;
      box.setAttribute("aria-current", current ? "step" : "false");
      if (current) {
        const middle = box.parentElement.offsetLeft + box.offsetWidth / 2 - strip.clientWidth / 2;
        strip.scrollTo({ left: middle, behavior: view.still ? "auto" : "smooth" });
        if (reached && !strip.matches(":focus-within")) box.focus({ preventScroll: true });
      }
    }
  }

  return { element: make("div", { class: "timeline" }, strip, controls), update, toggle, stop };
}

function button(name, text, onclick) {
  return make("button", { type: "button", "aria-label": name, title: name, onclick }, text);
}

function boxes(view, from, to) {
  const { layer } = view;
  const found = [];
  const output = `quantity ${layer.states[0]}`;
  for (let k = from; k < to; k += 1) {
    const step = layer.steps[k];
    found.push(flows(view, k, layer.backward ? step : step - 1));
    const name = view.data.labels ? view.data.labels[step] : `x${index(step)}`;
    const shown = visible(name);
    found.push(make("div", { class: "column" },
      make("span", { class: "name out", "aria-hidden": "true" }, `${called(output)}${index(step)}`),
      bar(view, output, k), arrow("up"),
      make("button", { type: "button", class: "box", "data-k": k, onclick: () => view.go(k) },
        make("b", {}, view.data.cell), make("span", {}, `step ${step}`)),
      arrow("up"), bar(view, "input", k),
      make("span", { class: "name in", "aria-hidden": "true" }, shown)));
  }
  if (to > from) found.push(flows(view, to, layer.backward ? layer.steps[to - 1] + 1 : layer.steps[to - 1]));
  return found;
}

/** The arrows between two boxes: every state that goes from one to the next. */
function flows(view, k, source) {
  const { layer, data } = view;
  const initial = source < 0 || source >= data.length;
  const gap = k > 0 && k < layer.steps.length && layer.steps[k] - layer.steps[k - 1] > 1;
  return make("div", { class: "flows", "aria-hidden": "true" }, layer.states.map((name) =>
    make("div", { class: "flow" },
      make("span", {}, initial ? `initial ${name}` : `${name}${index(source)}`),
      gap ? make("span", { class: "gap" }, "⋯") : arrow(layer.backward ? "left" : "right"))));
}

function arrow(direction) {
  const paths = { up: "M6 18V2M2 6l4-4 4 4", right: "M1 6h40M36 2l5 4-5 4", left: "M41 6H1M6 2L1 6l5 4" };
  const [wide, tall] = direction === "up" ? [12, 20] : [42, 12];
  return draw("svg", { width: wide, height: tall, class: `arrow ${direction}`, "aria-hidden": "true" },
    draw("path", { d: paths[direction], fill: "none", stroke: "currentColor", "stroke-width": 1.6 }));
}

/** The numbers of a quantity as a narrow bar of colours. */
function bar(view, key, k) {
  const row = view.layer.rows.get(key);
  const many = Math.min(row.size, 32);
  const colours = Array.from({ length: many }, (_, at) => {
    const place = Math.floor((at * row.size) / many);
    return `rgb(${colour(view.layer.value(key, k, place), view.layer.scale(key), view.theme)})`;
  });
  const stops = colours.map((one, at) => `${one} ${(at / many) * 100}% ${((at + 1) / many) * 100}%`);
  const strip = make("span", { class: "bar", "aria-hidden": "true" });
  strip.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  return strip;
}
