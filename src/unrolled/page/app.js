// The page as a whole: its state, its sections and its keyboard shortcuts.

import { createEquations } from "./equations.js";
import { createGradient } from "./gradient.js";
import { Layer } from "./layer.js";
import { createElement, createSection } from "./dom.js";
import { createParameters } from "./parameters.js";
import { createExplanation, createGrid, explainValue } from "./step.js";
import { createTimeline } from "./timeline.js";
import { createHeatMaps } from "./heatmaps.js";

/** The state of the page: the layer, the index of its step, and the selected and hovered values as {key, index}. */
class View {
  constructor(data, render) {
    this.data = data;
    this.render = render;
    this.layers = data.layers.map((layerData) => new Layer(layerData));
    this.reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.theme = "light";
    this.pointerPosition = "";
    this.openLayer(0);
  }

  openLayer(layerIndex, stepIndex = null, selected = null) {
    this.layer = this.layers[layerIndex];
    this.stepIndex = stepIndex ?? (this.layer.backward ? this.layer.steps.length - 1 : 0);
    this.selected = selected;
    this.hovered = null;
    this.refresh();
  }

  /** The value whose arithmetic is shown. */
  get active() {
    return this.hovered ?? this.selected;
  }

  goToIndex(stepIndex) {
    this.stepIndex = Math.max(0, Math.min(this.layer.steps.length - 1, stepIndex));
    this.hovered = null;
    this.refresh();
  }

  goToStep(step) {
    this.goToIndex(this.layer.nearestStepIndex(step));
  }

  select(value) {
    if (this.selected?.key !== value.key || this.selected?.index !== value.index || this.hovered) {
      this.selected = value;
      this.hovered = null;
      this.refresh();
    }
  }

  hover(value) {
    if (this.hovered?.key !== value?.key || this.hovered?.index !== value?.index) {
      this.hovered = value;
      this.refresh();
    }
  }

  /** Hover over a value, unless it was scrolled below a resting pointer. */
  onPointerOver(event, value) {
    if (this.pointerPosition !== `${event.screenX} ${event.screenY}`) this.hover(value);
  }

  /** Go to where a value was computed. A state before the step is a quantity of the previous step. */
  follow({ key, index }) {
    const source = this.layer.previousStep(this.layer.steps[this.stepIndex]);
    if (key.startsWith("before") && this.layer.stepIndices.has(source)) {
      this.stepIndex = this.layer.stepIndices.get(source);
      this.selected = { key: key.replace("before", "quantity"), index };
    } else {
      this.selected = { key, index };
    }
    this.hovered = null;
    this.refresh();
  }

  /** Update the explanation and the whole page. */
  refresh() {
    this.explanation = this.active ? explainValue(this, this.active) : { text: "", operands: [] };
    this.operands = this.explanation.operands;
    this.render?.();
  }
}

/** Render the page of a trace into an element. Returns the view; its close() removes all listeners. */
export function mount(root, data) {
  const view = new View(data, null);
  root.classList.add("unrolled");
  root.dataset.lmSuppressShortcuts = "true"; // turns off JupyterLab's own shortcuts in here
  const timeline = createTimeline(view);
  const grid = createGrid(view);
  const explanation = createExplanation(view, grid.focusSelection);
  const equations = createEquations(view);
  const parameters = createParameters(view);
  const heatMaps = createHeatMaps(view);
  const gradient = createGradient(view);

  const options = data.layers.map((layer, k) => createElement("option", { value: k }, `layer ${layer.layer}, ${layer.direction}`));
  const layerPicker = createElement("select", { "aria-label": "layer", onchange: () => { timeline.stop(); view.openLayer(Number(layerPicker.value)); } }, options);
  const themeButton = createElement("button", { type: "button", onclick: () => setTheme(view.theme === "dark" ? "light" : "dark") });
  const parts = [timeline, grid, explanation, equations, parameters, heatMaps, gradient,
    { update() { layerPicker.value = view.layers.indexOf(view.layer); } }];
  root.replaceChildren(
    createElement("header", {}, createElement("h1", {}, data.title), data.title === data.module ? null : createElement("p", {}, data.module),
      data.description.map((paragraph) => createElement("p", { class: "description" }, paragraph)),
      data.row === null ? null : createElement("p", {}, `Row ${data.row} of a batch of ${data.batchSize}.`),
      createElement("div", { class: "toolbar" }, data.layers.length > 1 ? layerPicker : null, themeButton)),
    ...data.notes.map((note) => createElement("p", { role: "note", class: "note" }, note)),
    createElement("main", {},
      createSection("timeline-section", "The layer, unrolled through time", timeline.element),
      createElement("div", { class: "explained-sections" }, // the explanation stays visible in all of them
        createElement("div", { class: "split" },
          createSection("step-section", "All values of this step", grid.element),
          createSection("equations-section", "Equations", equations.element)),
        explanation.element,
        createSection("parameters-section", "Parameters", parameters.element),
        createSection("sequence-section", "The whole sequence", heatMaps.element)),
      createSection("gradient-section", "Gradient through time", gradient.element),
      createSection("comparison", "Compared with torch.nn", createElement("p", { class: data.comparison.status }, data.comparison.text))),
    createElement("footer", {}, createElement("p", {}, "Keys: ← → or [ ] change the step, space starts and stops playing. "
      + "In the table of values, the arrow keys move between values.")));

  function setTheme(theme) {
    view.theme = theme;
    root.dataset.theme = theme;
    themeButton.textContent = theme === "dark" ? "light theme" : "dark theme";
    view.refresh();
  }

  view.onKeyDown = (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const isOnControl = event.target.closest("input, select, button, summary");
    const change = { "[": -1, "]": 1, ...(isOnControl ? {} : { ArrowLeft: -1, ArrowRight: 1 }) }[event.key];
    if (change) view.goToIndex(view.stepIndex + change);
    else if (event.key === " " && !isOnControl) timeline.toggle();
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (event.target.closest("table.numbers")) grid.focusSelection();
  };
  root.tabIndex = -1;
  root.addEventListener("keydown", view.onKeyDown);
  root.addEventListener("pointermove", (event) => { view.pointerPosition = `${event.screenX} ${event.screenY}`; });
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const prefersReducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
  const listeners = new AbortController();
  prefersDark.addEventListener("change", () => setTheme(prefersDark.matches ? "dark" : "light"), { signal: listeners.signal });
  prefersReducedMotion.addEventListener("change", () => { view.reducedMotion = prefersReducedMotion.matches; }, { signal: listeners.signal });
  // Print with the light theme.
  let themeBeforePrint = null;
  window.addEventListener("beforeprint", () => { themeBeforePrint = view.theme; setTheme("light"); }, { signal: listeners.signal });
  window.addEventListener("afterprint", () => setTheme(themeBeforePrint ?? view.theme), { signal: listeners.signal });
  view.close = () => { listeners.abort(); timeline.stop(); grid.close(); };
  view.render = () => parts.forEach((part) => part.update());
  const { jpThemeLight } = document.body.dataset; // in JupyterLab
  setTheme((jpThemeLight ? jpThemeLight === "false" : prefersDark.matches) ? "dark" : "light");
  return view;
}

/** Start a page that contains its own data. */
function start() {
  const view = mount(document.getElementById("page"), JSON.parse(document.getElementById("trace").textContent));
  document.addEventListener("keydown", (event) => { if (event.target === document.body) view.onKeyDown(event); });
}
