// The layer unrolled through time: a box for each step, arrows between them, and controls to change the step.

import { nameOf } from "./layer.js";
import { createElement, createSvg, subscript, visibleLabel } from "./dom.js";
import { valueColor } from "./numbers.js";

const BOXES_PER_SIDE = 12; // on each side of the current step
const PLAY_INTERVAL = 700; // milliseconds per step
const MAX_BAR_COLORS = 32;

/** Create the boxes and the controls below them. Returns {element, update, toggle, stop}. */
export function createTimeline(view) {
  const strip = createElement("div", { class: "strip", role: "group", "aria-label": "time steps" });
  const slider = createElement("input", {
    type: "range", min: 0, step: 1, "aria-label": "time step",
    oninput: () => view.goToIndex(Number(slider.value)),
  });
  const stepLabel = createElement("output", { class: "step-label" });
  let timer = null;

  const buttons = {
    first: createButton("first step", "«", () => view.goToIndex(0)),
    back: createButton("previous step", "‹", () => view.goToIndex(view.stepIndex - 1)),
    play: createButton("play", "▶︎ play", toggle),
    next: createButton("next step", "›", () => view.goToIndex(view.stepIndex + 1)),
    last: createButton("last step", "»", () => view.goToIndex(view.layer.steps.length - 1)),
  };
  buttons.play.classList.add("play");
  const controls = createElement("div", { class: "controls" }, ...Object.values(buttons), slider, stepLabel);

  function toggle() {
    if (timer !== null) return stop();
    const { steps, backward } = view.layer;
    const [begin, end] = backward ? [steps.length - 1, 0] : [0, steps.length - 1];
    if (view.stepIndex === end) view.goToIndex(begin);
    timer = setInterval(() => {
      view.goToIndex(view.stepIndex + (view.layer.backward ? -1 : 1));
      if (view.stepIndex === end) stop();
    }, PLAY_INTERVAL);
    setPlayLabel("pause", "❚❚ pause");
    return undefined;
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    setPlayLabel("play", "▶︎ play");
  }

  function setPlayLabel(name, text) {
    buttons.play.setAttribute("aria-label", name);
    buttons.play.textContent = text;
  }

  let renderedState = null;
  function update() {
    const { layer, stepIndex } = view;
    const count = layer.steps.length;
    slider.max = count - 1;
    slider.value = stepIndex;
    const step = layer.steps[stepIndex];
    const text = `step ${step} (0–${view.data.length - 1})${view.data.labels ? `: ${visibleLabel(view.data.labels[step])}` : ""}`;
    slider.setAttribute("aria-valuetext", text);
    stepLabel.textContent = text;
    for (const button of [buttons.first, buttons.back]) button.setAttribute("aria-disabled", stepIndex === 0);
    for (const button of [buttons.last, buttons.next]) button.setAttribute("aria-disabled", stepIndex === count - 1);
    const from = Math.max(0, Math.min(stepIndex - BOXES_PER_SIDE, count - 2 * BOXES_PER_SIDE - 1));
    const to = Math.min(count, from + 2 * BOXES_PER_SIDE + 1);
    const state = `${view.layers.indexOf(layer)} ${from} ${to} ${view.theme}`;
    const hadFocus = strip.matches(":focus-within"); // then the focus moves to the current box
    if (renderedState !== state) {
      strip.replaceChildren(...createBoxes(view, from, to));
      renderedState = state;
    }
    for (const box of strip.querySelectorAll(".box")) {
      const isCurrent = Number(box.dataset.stepIndex) === stepIndex;
      box.setAttribute("aria-current", isCurrent ? "step" : "false");
      if (isCurrent) {
        const left = box.parentElement.offsetLeft + box.offsetWidth / 2 - strip.clientWidth / 2;
        strip.scrollTo({ left, behavior: view.reducedMotion ? "auto" : "smooth" });
        if (hadFocus && !strip.matches(":focus-within")) box.focus({ preventScroll: true });
      }
    }
  }

  return { element: createElement("div", { class: "timeline" }, strip, controls), update, toggle, stop };
}

function createButton(name, text, onclick) {
  return createElement("button", { type: "button", "aria-label": name, title: name, onclick }, text);
}

function createBoxes(view, from, to) {
  const { layer } = view;
  const children = [];
  const output = `quantity ${layer.states[0]}`;
  for (let stepIndex = from; stepIndex < to; stepIndex += 1) {
    const step = layer.steps[stepIndex];
    children.push(createTransition(view, stepIndex, layer.backward ? step : step - 1));
    const inputLabel = view.data.labels ? view.data.labels[step] : `x${subscript(step)}`;
    children.push(createElement("div", { class: "column" },
      createElement("span", { class: "name out", "aria-hidden": "true" }, `${nameOf(output)}${subscript(step)}`),
      createColorBar(view, output, stepIndex), createArrow("up"),
      createElement("button", { type: "button", class: "box", "data-step-index": stepIndex, onclick: () => view.goToIndex(stepIndex) },
        createElement("b", {}, view.data.cell), createElement("span", {}, `step ${step}`)),
      createArrow("up"), createColorBar(view, "input", stepIndex),
      createElement("span", { class: "name in", "aria-hidden": "true" }, visibleLabel(inputLabel))));
  }
  if (to > from) children.push(createTransition(view, to, layer.backward ? layer.steps[to - 1] + 1 : layer.steps[to - 1]));
  return children;
}

/** Create the arrows to the left of a box: one for each state, with the step that it comes from. */
function createTransition(view, stepIndex, sourceStep) {
  const { layer, data } = view;
  const isInitial = sourceStep < 0 || sourceStep >= data.length;
  const hasGap = stepIndex > 0 && stepIndex < layer.steps.length && layer.steps[stepIndex] - layer.steps[stepIndex - 1] > 1;
  return createElement("div", { class: "transition", "aria-hidden": "true" }, layer.states.map((name) =>
    createElement("div", { class: "state-arrow" },
      createElement("span", {}, isInitial ? `initial ${name}` : `${name}${subscript(sourceStep)}`),
      hasGap ? createElement("span", { class: "gap" }, "⋯") : createArrow(layer.backward ? "left" : "right"))));
}

function createArrow(direction) {
  const paths = { up: "M6 18V2M2 6l4-4 4 4", right: "M1 6h40M36 2l5 4-5 4", left: "M41 6H1M6 2L1 6l5 4" };
  const [width, height] = direction === "up" ? [12, 20] : [42, 12];
  return createSvg("svg", { width, height, class: `arrow ${direction}`, "aria-hidden": "true" },
    createSvg("path", { d: paths[direction], fill: "none", stroke: "currentColor", "stroke-width": 1.6 }));
}

/** Create a narrow bar with the colors of a quantity's values. */
function createColorBar(view, key, stepIndex) {
  const row = view.layer.rows.get(key);
  const count = Math.min(row.size, MAX_BAR_COLORS);
  const colors = Array.from({ length: count }, (_, position) => {
    const index = Math.floor((position * row.size) / count);
    return `rgb(${valueColor(view.layer.value(key, stepIndex, index), view.layer.colorRange(key), view.theme)})`;
  });
  const stops = colors.map((color, position) => `${color} ${(position / count) * 100}% ${((position + 1) / count) * 100}%`);
  const bar = createElement("span", { class: "color-bar", "aria-hidden": "true" });
  bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  return bar;
}
