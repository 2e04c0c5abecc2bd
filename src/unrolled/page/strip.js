// The sequence: the states and the input of every step.

import { createCell } from "./cells.js";
import { createElement, visibleLabel } from "./dom.js";
import { symbol } from "./symbols.js";

const MAX_COLUMNS = 24; // steps that are shown at once, if there is room
const NUMBER_WIDTH = 58; // pixels
const COLUMN_GAP = 34;
const NAMES_WIDTH = 128;
const [NARROW_GAP, NARROW_NAMES] = [14, 20];
const NARROW = 800; // as in the style sheet
const MAX_UNITS = 8; // of a state; the chosen unit is always among them

/** Create the strip. Returns {element, update}. */
export function createStrip(view) {
  const element = createElement("nav", { class: "strip", "aria-label": "The sequence" });
  let drawn = "";
  let cells = [];
  let width = 0;
  let limit = MAX_UNITS;
  new ResizeObserver(() => { if (element.clientWidth !== width) requestAnimationFrame(update); }).observe(element);

  function update() {
    if (!element.isConnected) return; // the page opens with heat maps instead
    const { model } = view;
    width = element.clientWidth;
    const isNarrow = width < NARROW;
    const [gap, room] = isNarrow ? [NARROW_GAP, width - NARROW_NAMES] : [COLUMN_GAP, width - NAMES_WIDTH];
    limit = Math.max(1, Math.min(MAX_UNITS, Math.floor((room - gap) / NUMBER_WIDTH)));
    const columns = Math.floor(room / (units().length * NUMBER_WIDTH + gap));
    const hasStart = columns > 1;
    const count = Math.max(1, Math.min(model.steps.length, MAX_COLUMNS, columns - hasStart));
    const at = model.stepIndices.get(view.step);
    const from = Math.max(0, Math.min(at - Math.floor(count / 2), model.steps.length - count));
    const key = [view.partKey, from, count, hasStart, ...units()].join();
    if (key !== drawn) {
      cells = [];
      element.replaceChildren(...draw(from, count, hasStart));
      drawn = key;
    }
    for (const cell of cells) cell.update();
    for (const column of element.querySelectorAll(".step")) {
      if (Number(column.dataset.step) === view.step) column.setAttribute("aria-current", "step");
      else column.removeAttribute("aria-current");
    }
  }

  const units = (size = view.model.units) => unitsShown(view, size, limit);

  function draw(from, count, hasStart) {
    const { model } = view;
    const rows = [...model.states.map((state) => state.name).reverse(), "x"];
    const { predictions } = view.data;
    element.style.setProperty("--rows", rows.length + (predictions ? 1 : 0));
    const steps = model.steps.slice(from, from + count);
    if (hasStart && model.backward) steps.push(model.start);
    else if (hasStart) steps.unshift(model.start);
    element.style.setProperty("--columns", steps.length);
    const names = rows.map((name, k) => {
      const label = createElement("div", { class: "rowname", style: `grid-row: ${k + 2}` });
      label.innerHTML = `${symbol(name)}<span></span>`;
      label.lastChild.textContent = rowDescription(view, name);
      return label;
    });
    if (predictions) names.push(createElement("div", { class: "rowname", style: `grid-row: ${rows.length + 2}` }, "prediction"));
    return [...names, ...steps.map((step, position) => createColumn(rows, step, position, steps))];
  }

  function createColumn(rows, step, position, steps) {
    const { model } = view;
    const isStart = step === model.start;
    const label = isStart ? "start" : `step ${step}`;
    const text = !isStart && view.data.labels ? ` ${visibleLabel(view.data.labels[step])}` : "";
    const title = isStart ? createElement("span", { class: "title" }, label)
      : createElement("button", { class: "title", type: "button", onclick: () => view.goTo(step) }, label, text ? createElement("b", {}, text) : null);
    const isLast = model.backward ? position === 0 : position === steps.length - 1;
    const blocks = rows.map((name) => {
      if (name === "x" && isStart) return createElement("div", { class: "cells" });
      const shown = units(name === "x" ? model.features : model.sizes[model.statesByName.get(name).value]);
      const row = shown.map((unit) => {
        const cell = createCell(view, () => ({ q: name, t: step, u: unit }));
        cells.push(cell);
        return cell.element;
      });
      return createElement("div", { class: `cells${name === "x" || isLast ? "" : model.backward ? " back" : " flow"}`, style: `--units: ${Math.max(shown.length, units().length)}` }, row);
    });
    return createElement("div", { class: `step${isStart ? " start" : ""}`, "data-step": step, style: `--c: ${position + 2}`,
      onclick: (event) => { if (!isStart && !event.target.closest("button")) view.goTo(step); } }, title, blocks,
      view.data.predictions ? createElement("div", { class: "prediction" }, isStart ? "" : visibleLabel(view.data.predictions[step])) : null);
  }

  return { element, update };
}

/** The units that are shown: all, or a window around the chosen one. */
export function unitsShown(view, size = view.model.units, limit = MAX_UNITS) {
  const count = Math.min(size, limit);
  const from = Math.max(0, Math.min(view.unit - Math.floor(count / 2), size - count));
  return Array.from({ length: count }, (_, k) => from + k);
}

function rowDescription(view, name) {
  if (name === "x") return "input";
  const text = (view.model.descriptions[name] ?? "state").split(":")[0];
  return view.model.states[0].name === name ? `${text}, output` : text;
}
