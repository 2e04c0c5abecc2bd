// The page: its parts and the keyboard.

import { createDocumentation, createFindings, createParagraph } from "./about.js";
import { openAddress } from "./address.js";
import { createArithmetic } from "./arithmetic.js";
import { createComparison } from "./comparison.js";
import { createElement, createSection } from "./dom.js";
import { enableDragging } from "./dragging.js";
import { createDrawing } from "./drawing.js";
import { createEditor } from "./editor.js";
import { createEquations } from "./equations.js";
import { createGradient } from "./gradient.js";
import { createGuide } from "./guide.js";
import { createInlineArithmetic } from "./inline_arithmetic.js";
import { createKeyList, createKeys } from "./keys.js";
import { createLegend } from "./legend.js";
import { createLive } from "./live.js";
import { WIDE_UNITS, zoomMaps } from "./map_controls.js";
import { createPlayer } from "./player.js";
import { createRowPicker, rowData } from "./rows.js";
import { createSequence, isSmall } from "./sequence.js";
import { createStrip, unitsShown, windowText } from "./strip.js";
import { Symbols } from "./symbols.js";
import { createTables } from "./tables.js";
import { createText } from "./text.js";
import { differ, View } from "./view.js";
import { createWeights } from "./weights.js";

const WIDE_STEPS = 24; // a layer with more steps or units opens with its heat maps
const MAX_UNITS_OF_BOTH = 4; // of a layer whose numbers and weights are shown together

/**
 * Render the page of a trace into an element. Returns the view; its close() removes all listeners.
 *
 * If the layer is part of the page of a model, `inModel` is {title, entries, close}: the title of the model, the first entries
 * of the address, and a function that goes back to the model.
 */
export function mount(root, data, inModel = null) {
  const view = new View(root, data, inModel);
  view.hasAddress = (root.id === "page" || inModel !== null) && location.protocol !== "about:"; // not in a notebook, nor in its frame
  root.classList.add("unrolled");
  root.dataset.lmSuppressShortcuts = "true"; // turns off JupyterLab's own shortcuts in here
  const guide = createGuide(view);
  const comparison = createComparison(view);
  const strip = createStrip(view);
  const drawing = createDrawing(view);
  const tables = createTables(view);
  const equations = createEquations(view);
  const arithmetic = createArithmetic(view);
  const inline = createInlineArithmetic(view, arithmetic, drawing);
  const editor = createEditor(view);
  const weights = createWeights(view);
  const sequence = createSequence(view);
  const gradient = createGradient(view);
  const text = data.labels && createText(view);
  view.live = createLive(view);
  const player = createPlayer(view);
  const hasMaps = !view.models.every(isSmall);
  const keys = createKeys(data, hasMaps);
  const tabs = { numbers: createTab("Numbers"), weights: createTab("Weights") };
  const heads = { cell: createElement("h2"), step: createElement("h2"), number: createElement("h2") };
  const themeButton = createElement("button", { type: "button", class: "btn", onclick: () => setTheme(isDark() ? "light" : "dark") }, "Dark / light");
  const keysButton = createElement("button", { type: "button", class: "btn", onclick: () => keys.showModal() }, "Keys", createElement("kbd", { "aria-hidden": "true" }, "?"));
  const stepValues = createElement("section", { class: "step-values", "aria-label": "The numbers of the step" },
    createElement("div", { class: "head-row" }, heads.step, createElement("span", { class: "seg", role: "group", "aria-label": "numbers or weights" }, Object.values(tabs))), tables.element, weights.element);

  function createTab(text) {
    return createElement("button", { type: "button", onclick: () => openTab(text === "Weights") }, text);
  }

  function openTab(isWeights) {
    stepValues.classList.toggle("both", hasRoomForBoth(view.model));
    stepValues.classList.toggle("show-weights", isWeights);
    tabs.weights.setAttribute("aria-pressed", isWeights);
    tabs.numbers.setAttribute("aria-pressed", !isWeights);
    weights.update();
  }

  const isTabOfWeights = () => stepValues.classList.contains("show-weights") && getComputedStyle(tables.element).display === "none";

  function numbersTitle() {
    const units = unitsShown(view);
    return units.length < view.model.units ? `Step ${view.step}, ${windowText("units", units)} of ${view.model.units}` : `Every number of step ${view.step}`;
  }

  const changesText = createElement("span");
  const copyButton = createElement("button", { type: "button", class: "btn", onclick: copyLink }, "Copy link");
  const changes = createElement("span", { class: "changes", hidden: true }, changesText, copyButton,
    createElement("button", { type: "button", class: "btn", onclick: () => view.undo() }, "Undo"),
    createElement("button", { type: "button", class: "btn", onclick: () => view.reset() }, "Reset", createElement("kbd", { "aria-hidden": "true" }, "⇧R")));
  const options = data.layers.map((layer, k) => createElement("option", { value: k }, `layer ${layer.layer}, ${layer.direction}`));
  const layerPicker = createElement("select", { "aria-label": "layer", onchange: () => { const k = Number(layerPicker.value); view.layerIndex = k; view.choose(view.firstNumber()); } }, options);
  const rowPicker = createRowPicker(view);
  const legend = createLegend(view);
  const summary = createElement("span", { class: "what" });
  const parts = [comparison, rowPicker, legend, strip, drawing, tables, equations, arithmetic, editor, weights, sequence, gradient, player, guide, ...(text ? [text] : []), ...(view.live ? [view.live.picture] : []), { update: updateHeads }, inline];
  const longest = Math.max(...view.rowNumbers.map((_, k) => rowData(data, k).layers[0].length));
  const isWide = (view.model.units > WIDE_UNITS || longest > WIDE_STEPS) && !(isSmall(view.model) && longest === view.model.length);
  const wholeSequence = createSection("wide sequence", "The whole sequence", sequence.element);
  const textSection = text && createSection("wide text-section", "Text", text.element);
  const overview = !isWide ? strip.element : text && data.labels.length > WIDE_STEPS ? textSection : wholeSequence;
  root.classList.toggle("is-wide", isWide);
  root.replaceChildren(
    createElement("header", {}, inModel && createElement("button", { type: "button", class: "btn", "aria-label": `back to ${inModel.title}`, onclick: inModel.close }, `‹ ${inModel.title}`), createElement("h1", {}, data.title), summary, changes, rowPicker.element, data.layers.length > 1 ? layerPicker : null, keysButton, themeButton),
    comparison.element ?? "", guide.element, ...data.notes.map((note) => createElement("p", { role: "note", class: "note" }, note)), overview,
    createElement("main", { class: "stage" },
      createElement("section", { class: "draw", "aria-label": "The cell" }, createElement("div", { class: "head-row" }, heads.cell, player.element), drawing.element, legend.element, editor.element),
      stepValues,
      createElement("section", { class: "why", "aria-label": "The chosen number" }, heads.number, equations.element, arithmetic.element)),
    createElement("div", { class: "more" },
      overview === textSection ? null : textSection, overview === wholeSequence ? null : wholeSequence,
      view.live && createSection("wide", "New input", view.live.element),
      createSection("wide", "Gradient through time", gradient.element),
      createSection("health", "Diagnosis", createFindings(view)),
      createSection("about", `About ${data.cell}`, data.description.map(createParagraph), createElement("p", { class: data.comparison.status }, data.comparison.text), createDocumentation(data)),
      createSection("keys-section", "Keyboard", createKeyList(data, hasMaps))), keys);

  async function copyLink() {
    try {
      await navigator.clipboard.writeText(location.href);
      copyButton.textContent = "Copied";
    } catch {
      copyButton.textContent = "Copy the address above"; // a file, or a browser that doesn't allow it
    }
    setTimeout(() => { copyButton.textContent = "Copy link"; }, 2000);
  }

  function updateChanges() {
    const { edits, models } = view.row;
    changes.hidden = edits.size === 0;
    if (changes.hidden) return;
    changesText.textContent = `${edits.size === 1 ? "1 value" : `${edits.size} values`} changed${effect(edits, models)} `;
    copyButton.hidden = !view.hasAddress;
  }

  /** What the changes do: how many numbers differ, if all are stored. */
  function effect({ pending, isLong }, models) {
    if (pending) return `; recomputing: ${Math.floor(100 * pending.progress)} %`;
    if (isLong) return "";
    let [total, different] = [0, 0];
    for (const model of models) {
      total += model.recorded.values.length;
      model.values.values.forEach((value, k) => { different += differ(value, model.recorded.values[k]); });
    }
    return `: ${different} of ${total} numbers differ`;
  }

  view.allEdits.onProgress = (isDone) => (isDone ? view.refresh() : updateChanges());

  let lastNumber = null;

  function updateHeads() {
    updateChanges();
    const { model, symbols } = view;
    if (model.isParameter(view.number) !== stepValues.classList.contains("show-weights") && view.number !== lastNumber) openTab(model.isParameter(view.number));
    lastNumber = view.number;
    heads.cell.textContent = `The cell at step ${view.step}, unit ${view.unit}`;
    stepValues.classList.toggle("both", hasRoomForBoth(view.model));
    stepValues.classList.toggle("crowded", tables.element.classList.contains("dense"));
    heads.step.textContent = isTabOfWeights() ? "Weights, the same at every step" : numbersTitle();
    if (view.mode === "difference") heads.number.innerHTML = `<span>How much does ${symbols.of(view.number)} differ?</span>`;
    else heads.number.innerHTML = model.derive(view.number) ? `<span>Where does ${symbols.of(view.number)} come from?</span>` : `<span>What is ${symbols.of(view.number)}?</span>`;
    layerPicker.value = view.layerIndex;
    summary.textContent = view.data.summary;
    if (view.hasAddress) document.title = `${Symbols.plain(symbols.of(view.number))} · ${data.title}`;
  }

  const isDark = () => getComputedStyle(root).colorScheme === "dark";
  function setTheme(theme) {
    root.dataset.theme = theme;
    if (view.hasAddress) document.documentElement.dataset.theme = theme;
    view.theme = theme;
    view.refresh();
  }

  view.onKeyDown = (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "z" && !event.target.matches("input[type=text], input[type=number]")) {
      event.preventDefault();
      view.undo();
    }
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea")) return;
    const handled = handleKey(event.key, event.target);
    if (!handled) return;
    event.preventDefault();
    event.stopPropagation();
  };

  function handleKey(key, target) {
    const { model, number } = view;
    const moves = { ArrowLeft: -1, ArrowRight: 1, "[": -1, "]": 1 };
    const named = quantityOfKey(key);
    if (model.isParameter(number) && key.startsWith("Arrow")) {
      return moveInParameter(key);
    } else if (key in moves) {
      inOpenTab(() => view.move(moves[key]));
    } else if (key === "ArrowUp" || key === "ArrowDown") {
      const size = number.q === "x" ? model.features : model.size(number.q);
      inOpenTab(() => view.choose({ ...number, u: (number.u + (key === "ArrowDown" ? 1 : size - 1)) % size }));
    } else if (key === "b" && comparison.element) {
      comparison.next();
    } else if (key === "j" || key === "k") {
      const at = model.order.indexOf(number.q);
      const q = model.order[(at + (key === "j" ? 1 : model.order.length - 1)) % model.order.length];
      view.choose({ q, t: view.step, u: Math.min(view.unit, model.size(q) - 1) });
    } else if (named) {
      const size = named === "x" ? model.features : model.size(named);
      view.choose({ q: named, t: view.step, u: Math.min(view.unit, size - 1) });
    } else if (key === "Enter" && !target.closest("button, a, [role=button]")) {
      const [source] = model.sources(number);
      if (source) view.choose(source);
    } else if (key === "e" && view.isEditable(number)) {
      editor.focus();
    } else if (key === "R" && view.row.edits.size) {
      view.reset();
    } else if (key === " " && !target.closest("button, a, [role=button]")) {
      player.toggle();
    } else if (key === "w") {
      openTab(!stepValues.classList.contains("show-weights"));
      updateHeads();
      if (stepValues.classList.contains("both")) weights.element.scrollIntoView({ block: "nearest" });
    } else if ("+=-0".includes(key) && !isSmall(model)) {
      zoomMaps(view, { "-": -1, 0: 0 }[key] ?? 1);
    } else if (key === "d") {
      themeButton.click();
    } else if (key === "?") {
      keys.showModal();
    } else if (key === "Backspace" && view.hasAddress) {
      history.back();
    } else if (key === "t" && !guide.touring) {
      guide.start();
    } else if (key === "n" && guide.touring) {
      guide.next();
    } else if (key === "Escape" && guide.touring) {
      guide.stop();
    } else {
      return false;
    }
    return true;
  }

  /** Move to another step or unit without leaving the weights, if they are open: those of the unit light up. */
  function inOpenTab(move) {
    const isWeights = stepValues.classList.contains("show-weights");
    move();
    if (!isWeights || guide.touring) return;
    openTab(true);
    updateHeads();
  }

  /** The quantity that a letter stands for: its name, or with Shift if the letter is the key of something else. */
  function quantityOfKey(key) {
    const name = key.toLowerCase();
    if (key.length > 1 || (name !== "x" && !view.model.nodesByKey.has(name))) return null;
    const isTaken = "dejktw".includes(name) || (name === "b" && Boolean(comparison.element)) || (name === "n" && guide.touring);
    return isTaken === (key !== name) ? name : null;
  }

  /** Go to the next row or column of a parameter. */
  function moveInParameter(key) {
    const { number } = view;
    const [rows, columns] = view.model.parameters.get(number.q).shape;
    const [axis, size] = key === "ArrowUp" || key === "ArrowDown" ? ["u", rows] : ["j", columns];
    if (size === undefined) return false;
    view.choose({ ...number, [axis]: (number[axis] + (key === "ArrowDown" || key === "ArrowRight" ? 1 : size - 1)) % size });
    return true;
  }

  enableDragging(view, root);
  const listeners = new AbortController();
  root.tabIndex = -1;
  root.addEventListener("keydown", view.onKeyDown);
  if (view.hasAddress) {
    window.addEventListener("popstate", () => openAddress(view) || view.choose(view.firstNumber(), { push: false }), { signal: listeners.signal });
  }
  drawing.narrow.addEventListener("change", () => view.refresh(), { signal: listeners.signal });
  view.close = () => {
    listeners.abort();
    inline.close();
    player.stop();
  };
  view.render = () => parts.forEach((part) => part.update());
  const { jpThemeLight } = document.body.dataset; // in JupyterLab
  if (jpThemeLight) setTheme(jpThemeLight === "false" ? "dark" : "light");
  else view.theme = isDark() ? "dark" : "light";
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(isDark() ? "dark" : "light"), { signal: listeners.signal });
  const paint = (theme) => () => { view.theme = theme(); view.refresh(); };
  window.addEventListener("beforeprint", paint(() => "light"), { signal: listeners.signal });
  window.addEventListener("afterprint", paint(() => (isDark() ? "dark" : "light")), { signal: listeners.signal });
  openTab(false);
  if (!view.hasAddress || !openAddress(view)) view.refresh();
  return view;
}

/** Whether the weights fit below the numbers of a step on the first screen, as for a simple recurrent layer. */
function hasRoomForBoth(model) {
  return model.nodes.filter((node) => node.kind === "layer").length === 1 && model.nodes.length < 3 && model.units <= MAX_UNITS_OF_BOTH && model.parameters.size > 0;
}
