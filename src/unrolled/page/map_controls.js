// Above the heat maps: the order of the units, and which steps are shown.

import { createElement } from "./dom.js";

const FEWEST_STEPS = 4; // that can be zoomed into
export const WIDE_UNITS = 8; // a layer with more units opens with its heat maps, and similar units are grouped
const FEWEST_UNITS = 3; // that have another order
const ORDERS = [["similar", "by similarity"], ["weights", "by index"]];

export const fewestSteps = ({ length }) => Math.min(FEWEST_STEPS, length);

/** The order of the units in heat maps: the chosen one, or what suits the layer. */
export const orderOf = ({ units }, chosen) => chosen ?? (units > WIDE_UNITS ? "similar" : "weights");

/** The window [first, stop) of the steps, given the first and last step that are zoomed into, or null. */
export function windowOf(model, zoom) {
  const last = Math.min(zoom?.[1] ?? Infinity, model.length - 1);
  const first = Math.min(zoom?.[0] ?? 0, last - fewestSteps(model) + 1);
  return [Math.max(0, first), last + 1];
}

/** Zoom in by a factor of two around the chosen step, or out. With 0, show all steps. */
export function zoomMaps(view, direction) {
  const { model, step } = view;
  const [first, stop] = view.mapWindow;
  const count = direction > 0 ? Math.max(fewestSteps(model), Math.floor((stop - first) / 2)) : direction < 0 ? 2 * (stop - first) : model.length;
  if (count >= model.length) {
    if (stop - first < model.length) view.setMapView({ zoom: null });
    return;
  }
  const center = step >= first && step < stop ? step : Math.floor((first + stop) / 2);
  const from = Math.max(0, Math.min(center - Math.floor(count / 2), model.length - count));
  if (from !== first || from + count !== stop) view.setMapView({ zoom: [from, from + count - 1] });
}

/** Create the controls. Returns {element, update}. */
export function createMapControls(view) {
  const button = (text, name, onclick) => createElement("button", { type: "button", class: "btn", "aria-label": name, title: name, onclick }, text);
  const orders = ORDERS.map(([order, text]) => createElement("button", { type: "button", onclick: () => view.setMapView({ order }) }, text));
  const order = createElement("span", { class: "order" }, createElement("span", { class: "quiet", "aria-hidden": "true" }, "Order of units"),
    createElement("span", { class: "seg", role: "group", "aria-label": "order of units" }, orders));
  const zoomIn = button("+", "zoom in", () => zoomMaps(view, 1));
  const zoomOut = button("−", "zoom out", () => zoomMaps(view, -1));
  const all = createElement("button", { type: "button", class: "btn", onclick: () => { zoomMaps(view, 0); zoomIn.focus(); } }, "All steps");
  const steps = createElement("span", { class: "quiet", role: "status" });
  const element = createElement("div", { class: "map-controls", role: "group", "aria-label": "heat maps" }, order,
    createElement("span", { class: "zoom" }, steps, zoomOut, zoomIn, all));

  function update() {
    const { model } = view;
    const [first, stop] = view.mapWindow;
    const isAll = stop - first === model.length;
    order.hidden = model.units < FEWEST_UNITS;
    orders.forEach((one, k) => one.setAttribute("aria-pressed", view.mapOrder === ORDERS[k][0]));
    const text = isAll ? `${model.length} steps. Drag across a map to zoom` : `Steps ${first}–${stop - 1} of ${model.length}`;
    if (steps.textContent !== text) steps.textContent = text;
    zoomIn.disabled = stop - first <= fewestSteps(model);
    zoomOut.disabled = isAll;
    all.hidden = isAll;
  }

  return { element, update };
}
