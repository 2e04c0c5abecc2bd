// The sequence: the states and the input of every step.

import { createCell } from "./cells.js";
import { createElement, createMarkup, visibleLabel } from "./dom.js";
import { escape, symbol } from "./names.js";
import { inputDescription, outputDescription } from "./tensor_names.js";

const MAX_COLUMNS = 24; // steps that are shown at once, if there is room
const NUMBER_WIDTH = 58; // pixels
const COLUMN_GAP = 34;
const NAMES_WIDTH = 128;
const [NARROW_GAP, NARROW_NAMES] = [14, 20];
const NARROW = 800; // as in the style sheet
const MAX_UNITS = 8; // of a state; the chosen unit is always among them

/** Create the strip. Returns {element, update}. */
export function createStrip(view) {
  const table = createElement("div", { class: "tr", role: "table", "aria-label": "states and input of each step" });
  const captions = createElement("p", { class: "captions" });
  const element = createElement("nav", { class: "strip", "aria-label": "The sequence" }, table, captions);
  let drawn = "";
  let cells = [];
  let width = 0;
  let isNarrow = false;
  let limit = MAX_UNITS;
  new ResizeObserver(() => { if (element.clientWidth !== width) requestAnimationFrame(update); }).observe(element);

  function update() {
    if (!element.isConnected) return; // the page opens with heat maps instead
    const { model } = view;
    width = element.clientWidth;
    isNarrow = width < NARROW;
    const [gap, room] = isNarrow ? [NARROW_GAP, width - NARROW_NAMES] : [COLUMN_GAP, width - NAMES_WIDTH];
    limit = Math.max(1, Math.min(MAX_UNITS, Math.floor((room - gap) / NUMBER_WIDTH)));
    const widest = Math.max(units().length, units(model.features).length);
    const columns = Math.floor(room / (widest * NUMBER_WIDTH + gap));
    const shown = stepsShown(model, view.step, Math.min(MAX_COLUMNS + 1, columns));
    const key = [view.partKey, ...shown, ...units(), ...units(model.features)].join();
    if (key !== drawn) {
      cells = [];
      table.replaceChildren(...draw(shown));
      drawCaptions(shown);
      drawn = key;
    }
    for (const cell of cells) cell.update();
    for (const column of element.querySelectorAll(".step")) {
      if (Number(column.dataset.step) === view.step) column.setAttribute("aria-current", "step");
      else column.removeAttribute("aria-current");
    }
  }

  const units = (size = view.model.units) => unitsShown(view, size, limit);

  function draw(steps) {
    const { model } = view;
    const rows = rowNames(model);
    const { predictions } = view.data;
    element.style.setProperty("--rows", rows.length + (predictions ? 1 : 0));
    element.style.setProperty("--columns", steps.length);
    const names = rows.map((name, k) => {
      const label = createElement("div", { class: "rowname", role: "columnheader", style: `grid-row: ${k + 2}` });
      label.innerHTML = `${rowSymbol(name)}<span></span>`;
      label.lastChild.textContent = rowDescription(view, name);
      return label;
    });
    if (predictions) names.push(createElement("div", { class: "rowname", role: "columnheader", style: `grid-row: ${rows.length + 2}` }, "prediction"));
    const corner = createElement("span", { class: "unseen", role: "columnheader" }, "step");
    return [createElement("div", { class: "tr", role: "row" }, corner, names), ...steps.map((step, position) => createColumn(rows, step, position, steps))];
  }

  /** What the letters mean, where there is no room beside them, and what of the sequence isn't shown. */
  function drawCaptions(shown) {
    const { model } = view;
    const names = rowNames(model).map((name) => createMarkup("span", `${rowSymbol(name)} ${escape(rowDescription(view, name))}`, "names"));
    const steps = shown.filter((step) => step !== model.start);
    const windows = [["steps", model.steps.length, steps], ["units", model.units, units()], ["features", model.features, units(model.features)]];
    const omitted = windows.filter(([, size, some]) => size > some.length).map(([what, size, some]) => createElement("span", {}, `${windowText(what, some)} of ${size}`));
    captions.replaceChildren(...names, ...omitted);
    captions.hidden = !omitted.length && !isNarrow;
  }

  function createColumn(rows, step, position, steps) {
    const { model } = view;
    const isStart = step === model.start;
    const label = isStart ? "start" : `step ${step}`;
    const text = !isStart && view.data.labels ? ` ${visibleLabel(view.data.labels[step])}` : "";
    const title = createElement("span", { class: "head", role: "rowheader" }, isStart ? createElement("span", { class: "title" }, label)
      : createElement("button", { class: "title", type: "button", onclick: () => view.goTo(step) }, label, text ? createElement("b", {}, text) : null));
    // The arrow between this column and the next one to the right points the way that the layer reads the sequence.
    const [from, to] = model.backward ? [steps[position + 1], step] : [step, steps[position + 1]];
    const isNext = from === model.start ? to === model.firstStep : to === model.next(from);
    const flow = position === steps.length - 1 || model.changedStates ? "" : `${model.backward ? " back" : " flow"}${isNext ? "" : " gap"}`;
    const blocks = rows.map((name) => {
      if (name === "x" && isStart) return createElement("div", { class: "cells", role: "cell" });
      const shown = units(model.size(name));
      const row = shown.map((unit) => {
        const cell = createCell(view, () => ({ q: name, t: step, u: unit }));
        cells.push(cell);
        return cell.element;
      });
      return createElement("div", { role: "cell", class: `cells${name === "x" ? "" : flow}`, style: `--units: ${Math.max(shown.length, units().length)}` }, row);
    });
    return createElement("div", { role: "row", class: `step${isStart ? " start" : ""}`, "data-step": step, style: `--c: ${position + 2}`,
      onclick: (event) => { if (!isStart && !event.target.closest("button")) view.goTo(step); } }, title, blocks,
      view.data.predictions ? createElement("div", { class: "prediction", role: "cell" }, isStart ? "" : visibleLabel(view.data.predictions[step])) : null);
  }

  return { element, update };
}

/** The steps that are shown: a window around the chosen one. It has the initial state only before the first step. */
function stepsShown(model, chosen, columns) {
  const { backward, start, steps } = model;
  const all = columns < 2 || model.changedStates ? steps : backward ? [...steps, start] : [start, ...steps];
  const count = Math.max(1, Math.min(all.length, columns));
  const from = Math.max(0, Math.min(all.indexOf(chosen) - Math.floor(count / 2), all.length - count));
  return all.slice(from, from + count);
}

/** The units that are shown: all, or a window around the chosen one. */
export function unitsShown(view, size = view.model.units, limit = MAX_UNITS) {
  const count = Math.min(size, limit);
  const from = Math.max(0, Math.min(view.unit - Math.floor(count / 2), size - count));
  return Array.from({ length: count }, (_, k) => from + k);
}

/** Name a window of numbers: "units 0–7", or "unit 3". */
export function windowText(what, shown) {
  return shown.length > 1 ? `${what} ${shown[0]}–${shown.at(-1)}` : `${what.slice(0, -1)} ${shown[0]}`;
}

/** The quantities of the rows: the states, those before the step if they aren't in the column to the left, and the input. */
function rowNames(model) {
  const states = model.states.map((state) => state.name).reverse();
  return [...states, ...(model.changedStates ? states.map((name) => `before.${name}`) : []), "x"];
}

const rowSymbol = (name) => (name.startsWith("before.") ? symbol(name.slice("before.".length), "before") : symbol(name));

function rowDescription(view, name) {
  if (name.startsWith("before.")) return "from the model";
  if (name === "x") return inputDescription(view.model).replace("the ", "");
  const text = (view.model.descriptions[name] ?? "state").split(":")[0];
  const isOutput = view.model.states[0].name === name;
  const role = outputDescription(view.model).replace(/^(part of )?the /, "$1");
  return isOutput && role !== text ? `${text}, ${role}` : text;
}
