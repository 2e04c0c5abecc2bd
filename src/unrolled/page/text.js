// The text: the labels of the steps, colored by the chosen quantity and unit, and its passages.

import { colorScale } from "./color_scale.js";
import { createElement, visibleLabel } from "./dom.js";
import { fixed, shown } from "./digits.js";
import { decodeBytes, gateColor, textColor, valueColor } from "./numbers.js";
import { similarPassages, strongestPassages, unitsOnOver } from "./passages.js";
import { Symbols } from "./symbols.js";

const COMPUTED_STEPS = 16; // at a time
const MAX_LABELS = 4000; // that are on the page at once; a longer text is shown in parts
const WIDTHS = [1, 5, 10, 20, 40]; // steps of a strong passage
const PASSAGES = 5; // strong ones of each sign
const SIMILAR = 10;
const MAX_LISTED = 24; // units
const CONTEXT = 24; // characters before and after a passage
const GATE_THRESHOLD = 0.5;
const THRESHOLD = 0.3; // of the scale of the quantity

/** Create the section. Returns {element, update}. */
export function createText(view) {
  let labels = [];
  let gap = ""; // between two labels
  let source = null; // the labels of the page, without visible signs
  let values = null; // of the quantity at all steps, with all units: {key, model, data, units, count, isRounded, isWhole}
  let [drawnPart, drawnColors, drawnMarks, drawnLists] = ["", "", "", ""]; // what is on the page
  let spans = [];
  let firstStep = 0; // of the part that is on the page
  let isSimilar = false; // which of the lists is shown
  let shownRange = null;
  let readStep = null; // whose value is below the text
  let selection = null; // the range while the reader selects it
  const thresholds = new Map(); // that the reader has chosen, by quantity

  const number = createElement("input", { type: "number", min: 0, "aria-label": "unit of the text", onchange: () => chooseUnit(Number(number.value)) });
  const quantity = createElement("select", { "aria-label": "quantity of the text", onchange: () => view.choose({ q: quantity.value, t: view.step, u: Math.min(unit(), view.model.size(quantity.value) - 1) }) });
  const scale = createElement("span", { class: "text-scale" });
  const readout = createElement("p", { class: "quiet readout" });
  const note = createElement("p", { class: "note" });
  const earlier = createElement("button", { type: "button", class: "btn", onclick: () => view.goTo(firstStep - 1) }, "Earlier");
  const later = createElement("button", { type: "button", class: "btn", onclick: () => view.goTo(firstStep + MAX_LABELS) }, "Later");
  const part = createElement("span", { class: "text-part" }, earlier, createElement("span", { class: "quiet" }), later);
  const text = createElement("div", { class: "text", tabindex: 0, role: "group", "aria-label": "The text. The arrow keys go to another step or unit; Shift with an arrow key selects a range." });
  const width = createElement("select", { "aria-label": "steps of a passage", onchange: () => view.refresh() }, WIDTHS.map((one) => createElement("option", { value: one, selected: one === 10 }, one)));
  const lists = createElement("div", { class: "passages" });
  const tabs = [false, true].map((forSimilar) => createElement("button", { type: "button", onclick: () => { isSimilar = forSimilar; view.refresh(); } }, forSimilar ? "Find similar" : "Strongest passages"));
  const element = createElement("div", { class: "text-view" },
    createElement("div", {}, createElement("div", { class: "text-controls" }, createElement("label", {}, "Color: ", quantity), createElement("label", {}, "unit ", number), scale, part), text, readout, note),
    createElement("div", {}, createElement("span", { class: "seg", role: "group", "aria-label": "passages" }, tabs), lists));

  const current = () => {
    const { model, number: chosen } = view;
    const isPlain = !model.isParameter(chosen);
    const q = isPlain ? chosen.q : model.states[0].name;
    return { q, u: Math.min(isPlain ? chosen.u : view.unit, model.size(q) - 1) };
  };
  const unit = () => current().u;
  const chosenRange = () => (view.range && view.range[1] < labels.length ? view.range : null); // another row may be shorter
  const chooseUnit = (u) => {
    const { q } = current();
    if (Number.isInteger(u) && u >= 0 && u < view.model.size(q)) view.choose({ q, t: view.step, u });
    else number.value = unit();
  };

  function update() {
    if (source !== view.data.labels) readLabels();
    if (view.range && view.range !== shownRange) isSimilar = true;
    shownRange = view.range;
    const { q, u } = current();
    if (values?.key !== valuesKey(q) || values.model !== view.model) {
      values = { key: valuesKey(q), ...valuesAtAllSteps(view.model, view.edits.size ? {} : roundedStates(), q) };
      [drawnColors, drawnLists] = ["", ""];
      if (!values.isWhole && view.model.isComputed) setTimeout(computeValues, 0, values, view.model, q);
    }
    updateControls(q, u);
    drawPart();
    color(q, u);
    mark();
    for (const [k, tab] of tabs.entries()) tab.setAttribute("aria-pressed", (k === 1) === isSimilar);
    drawLists(q, u);
    if (view.step !== readStep || !text.matches(":hover")) read(view.step);
    readStep = view.step;
  }

  /** Compute values that the page doesn't store, a few steps at a time. */
  function computeValues(computed, model, q) {
    if (computed !== values) return;
    const last = Math.min(model.length, computed.count + COMPUTED_STEPS);
    copyValues(model, q, model.steps.slice(computed.count, last), computed);
    computed.count = last;
    computed.isWhole = last === model.length;
    if (computed.isWhole) view.refresh();
    else setTimeout(computeValues, 0, computed, model, q);
  }

  const roundedStates = () => view.data.layers[view.layerIndex].text ?? {};

  function readLabels() {
    source = view.data.labels;
    labels = source.map((label) => label.replaceAll("\n", "⏎").replaceAll("\t", "⇥"));
    gap = source.some((label) => label.length > 1) && !source.some((label) => /\s/.test(label)) ? " " : "";
    [values, drawnPart] = [null, ""];
  }

  const valuesKey = (q) => [q, view.edits.toText()].join();
  const valueAt = (step) => values.data[step * values.units + Math.min(unit(), values.units - 1)];

  function updateControls(q, u) {
    const { model, symbols } = view;
    const names = model.nodes.map((node) => model.keys.get(node.id)).filter((key, k) => key === model.nodes[k].name);
    const options = [...new Set([...names, "x", q])];
    if (quantity.dataset.options !== options.join()) {
      quantity.replaceChildren(...options.map((one) => createElement("option", { value: one }, names.includes(one) || one === "x" ? one : Symbols.plain(symbols.of({ q: one, t: view.step }, "t")))));
      quantity.dataset.options = options.join();
    }
    quantity.value = q;
    number.max = model.size(q) - 1;
    number.value = u;
    scale.replaceChildren(...colorScale(view, q));
    note.textContent = noteFor(q);
    note.hidden = !note.textContent;
  }

  function noteFor(q) {
    const { model } = view;
    if (model.isComputed && !values.isWhole) return `Computing ${q} at all steps.`;
    if (model.complete) return "";
    const contained = `This page contains ${model.steps.length} of ${model.length} steps in full, and a click goes to the nearest of them.`;
    if (values.isWhole) return `${contained} The colors of the other steps are rounded to 8 bits.`;
    const others = Object.keys(roundedStates());
    return `${contained} The other steps have no color for ${q}, and passages can't be found${others.length ? `: choose ${others.join(" or ")} to color all steps` : ""}.`;
  }

  const colorOf = (q, value) => (view.model.isGate(q) ? gateColor(value, view.theme) : valueColor(value, view.scale({ q }), view.theme));

  /** The labels around the chosen step. */
  function drawPart() {
    firstStep = Math.floor(view.step / MAX_LABELS) * MAX_LABELS;
    if (drawnPart !== String(firstStep)) {
      drawnPart = String(firstStep);
      drawnColors = "";
      drawnMarks = "";
      spans = labels.slice(firstStep, firstStep + MAX_LABELS).map((label, k) => createElement("span", { "data-step": firstStep + k }, label + gap));
      text.replaceChildren(...spans.flatMap((span, k) => (source[firstStep + k].endsWith("\n") ? [span, createElement("br")] : [span])));
    }
    const last = firstStep + spans.length - 1;
    part.hidden = labels.length <= MAX_LABELS;
    part.children[1].textContent = ` steps ${firstStep} to ${last} of ${labels.length} `;
    earlier.disabled = firstStep === 0;
    later.disabled = last === labels.length - 1;
  }

  function color(q, u) {
    const key = [values.key, u, view.theme, values.isWhole].join();
    if (key === drawnColors) return;
    drawnColors = key;
    spans.forEach((span, k) => {
      const value = valueAt(firstStep + k);
      const isKnown = values.isWhole || view.model.stepIndices.has(firstStep + k);
      const background = isKnown ? colorOf(q, value) : null;
      span.style.background = background ? css(background) : "";
      span.style.color = background ? textColor(background) : "";
    });
  }

  /** Mark the chosen step and the selected range. */
  function mark() {
    const range = selection ?? chosenRange();
    const key = [firstStep, view.step, range].join();
    if (key === drawnMarks) return;
    const isMoved = !drawnMarks.startsWith([firstStep, view.step, ""].join());
    drawnMarks = key;
    spans.forEach((span, k) => {
      const step = firstStep + k;
      span.classList.toggle("now", step === view.step);
      span.classList.toggle("selected", range !== null && step >= range[0] && step <= range[1]);
    });
    const now = spans[view.step - firstStep];
    const isVisible = now.offsetTop >= text.scrollTop && now.offsetTop + now.offsetHeight <= text.scrollTop + text.clientHeight;
    if (isMoved && !isVisible) text.scrollTop = now.offsetTop - text.clientHeight / 2;
  }

  function read(step) {
    const { q, u } = current();
    const isExact = view.model.stepIndices.has(step);
    const value = isExact ? view.value({ q, t: step, u }) : valueAt(step);
    const said = isExact ? `= ${shown(value)}` : Number.isNaN(value) ? "isn't on this page" : `≈ ${fixed(value, 2)}`;
    readout.textContent = `Step ${step}, “${visibleLabel(source[step])}”: ${q}[${u}] ${said}`;
  }

  // --- passages ---

  function drawLists(q, u) {
    const key = [values.key, values.isWhole, u, isSimilar, width.value, view.range, thresholds.get(q), view.theme].join();
    if (key === drawnLists) return;
    drawnLists = key;
    if (!values.isWhole) lists.replaceChildren(createElement("p", { class: "quiet" }, view.model.isComputed ? "" : `This page doesn't contain ${q} at all steps.`));
    else lists.replaceChildren(...(isSimilar ? createSimilar(q) : createStrongest(q, u)));
  }

  function createStrongest(q, u) {
    const series = Array.from({ length: labels.length }, (_, step) => valueAt(step));
    const list = (name, sign) => [createElement("b", {}, `${name} of ${q}[${u}]`), createElement("ol", {}, strongestPassages(series, Number(width.value), sign, PASSAGES)
      .map(({ range, mean }) => createPassage(range, values.isRounded ? fixed(mean, 2) : fixed(mean), css(colorOf(q, mean)), "mean")))];
    return [createElement("label", { class: "quiet" }, "Mean over ", width, " steps"), list("Highest", 1), list("Lowest", -1)].flat(2);
  }

  function createSimilar(q) {
    const { model } = view;
    const range = chosenRange();
    const fields = [0, 1].map((end) => createElement("input", { type: "number", min: 0, max: labels.length - 1, value: range?.[end] ?? "", "aria-label": end ? "last step of the range" : "first step of the range", onchange: () => setFields(fields) }));
    const limit = model.isGate(q) ? 1 : view.scale({ q });
    const threshold = thresholds.get(q) ?? (model.isGate(q) ? GATE_THRESHOLD : THRESHOLD * limit);
    const slider = createElement("input", { type: "range", min: limit / 50, max: limit, step: limit / 50, value: threshold, "aria-label": "threshold", onchange: () => { thresholds.set(q, Number(slider.value)); view.refresh(); } });
    const head = createElement("div", { class: "text-controls" }, createElement("label", {}, "Steps ", fields[0]), createElement("label", {}, "to ", fields[1]),
      createElement("label", {}, `on: above ${fixed(threshold, 2)} `, slider), range ? createElement("button", { type: "button", class: "btn", onclick: () => setRange(null) }, "Clear") : null);
    if (!range) return [head, createElement("p", { class: "quiet" }, "Select a range of the text: drag over it, or press Shift and the arrow keys. Then you see which units are on only in this range, and where else they are.")];
    const chosen = unitsOnOver(values.data, values.units, range, threshold, model.isGate(q) ? [1] : [1, -1]);
    const said = createElement("p", {}, chosen.length ? `${chosen.length} of ${values.units} units of ${q} are on over “${passageText(range)}” and off right before and after it: ` : `No unit of ${q} is on over “${passageText(range)}” and off right before and after it. Try a lower threshold, or a shorter range.`);
    said.append(...chosen.slice(0, MAX_LISTED).flatMap((one) => [createElement("button", { type: "button", class: "btn unit-chip", title: `mean ${fixed(one.mean, 2)}`, onclick: () => view.choose({ q, t: view.step, u: one.unit }) }, `${one.sign < 0 ? "−" : ""}${q}[${one.unit}]`), " "]),
      chosen.length > MAX_LISTED ? `and ${chosen.length - MAX_LISTED} more` : "");
    const similar = similarPassages(values.data, values.units, chosen, range, threshold, SIMILAR);
    if (!chosen.length) return [head, said];
    return [head, said, createElement("b", {}, similar.length ? "Where else they behave like this" : "There is no other such passage."),
      createElement("ol", {}, similar.map(({ range: other, matches }) => createPassage(other, `${matches}/${chosen.length}`, "", "units that are on exactly here")))];
  }

  const passageText = ([from, to]) => (to - from < 40 ? labels.slice(from, to + 1).join(gap) : `${labels.slice(from, from + 18).join(gap)} … ${labels.slice(to - 17, to + 1).join(gap)}`);

  function createPassage(range, value, background, title) {
    const [from, to] = range;
    const before = labels.slice(Math.max(0, from - CONTEXT), from).join(gap).slice(-CONTEXT);
    const after = labels.slice(to + 1, to + 1 + CONTEXT).join(gap).slice(0, CONTEXT);
    return createElement("li", {}, createElement("span", { class: "mean", title, style: background && `border-color: ${background}` }, value),
      createElement("button", { type: "button", class: "passage", "data-from": from, "data-to": to, "aria-label": `steps ${from} to ${to}: ${passageText(range)}`, onclick: () => view.goTo(from) },
        createElement("span", { class: "quiet" }, before + gap), createElement("b", {}, passageText(range)), createElement("span", { class: "quiet" }, gap + after)));
  }

  // --- selection ---

  function setRange(range) {
    selection = null;
    view.setRange(range);
  }

  function setFields(fields) {
    const ends = fields.map((field) => Number(field.value));
    if (fields.every((field) => field.value !== "") && ends.every((end) => Number.isInteger(end) && end >= 0 && end < labels.length)) setRange(ends.sort((a, b) => a - b));
  }

  const stepOf = (event) => {
    const step = event.target.closest?.("[data-step]")?.dataset.step;
    return step === undefined ? null : Number(step);
  };
  let from = null; // where the pointer went down
  text.addEventListener("pointerdown", (event) => {
    from = event.button || event.pointerType === "touch" ? null : stepOf(event); // a finger scrolls
    if (event.shiftKey && from !== null) from = view.range?.[0] ?? view.step;
  });
  text.addEventListener("pointermove", (event) => {
    const step = stepOf(event);
    if (step === null) return;
    read(step);
    if (from === null || !event.buttons || (step === from && !selection)) return;
    selection = [Math.min(from, step), Math.max(from, step)];
    update();
  });
  text.addEventListener("pointerup", (event) => {
    const step = stepOf(event);
    if (event.shiftKey && from !== null && step !== null) selection = [Math.min(from, step), Math.max(from, step)];
    if (selection) setRange(selection);
    from = null;
  });
  text.addEventListener("pointercancel", () => { from = null; selection = null; view.refresh(); });
  text.addEventListener("pointerleave", () => {
    if (selection) setRange(selection);
    from = null;
    read(view.step);
  });
  text.addEventListener("click", (event) => {
    const step = stepOf(event);
    if (step !== null && !event.shiftKey) view.goTo(step);
  });
  let anchor = null; // of a selection with the keys
  text.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape" && view.range) setRange(null);
    else if (by && event.shiftKey) extend(by);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  function extend(by) {
    if (anchor?.start !== view.step || !view.range) anchor = { start: view.step, head: view.step };
    anchor.head = Math.max(0, Math.min(labels.length - 1, anchor.head + by));
    setRange([Math.min(anchor.start, anchor.head), Math.max(anchor.start, anchor.head)]);
  }

  return { element, update };
}

const css = (color) => `rgb(${color.join()})`;

/** The values of a quantity at all steps; NaN where the page has none. A state may be there in 8 bits. */
function valuesAtAllSteps(model, roundedStates, q) {
  const units = model.size(q);
  const rounded = roundedStates[q];
  const isStored = model.complete && !model.isComputed;
  const values = { model, data: new Float64Array(model.length * units).fill(NaN), units, count: 0, isRounded: Boolean(rounded), isWhole: isStored || Boolean(rounded) };
  if (rounded) decodeBytes(rounded.data).forEach((level, k) => { values.data[k] = level ? ((level - 128) / 127) * rounded.largest : NaN; });
  if (!model.isComputed) copyValues(model, q, model.steps, values);
  return values;
}

function copyValues(model, q, steps, { data, units }) {
  const index = model.valueIndex(q);
  for (const step of steps) {
    for (let unit = 0; unit < units; unit += 1) data[step * units + unit] = model.at(model.values, step, index, unit);
  }
}
