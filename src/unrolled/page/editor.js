// "Change something": a slider and a field for the chosen number, and experiments to try.

import { createElement, createMarkup, replaceChildren } from "./dom.js";
import { given, shown } from "./digits.js";
import { isGate } from "./gates.js";
import { elementOf } from "./words.js";

const MAX_LEAVES = 5;

/** Create the controls. Returns {element, update, focus}. */
export function createEditor(view) {
  const hint = createElement("span", { class: "quiet small" });
  const slider = createElement("input", { type: "range", step: 0.01, "aria-label": "new value", oninput: () => view.edit(view.number, Number(slider.value), steps()) });
  const refusal = createElement("p", { class: "refusal small", role: "alert" });
  const field = createElement("input", { type: "text", inputmode: "decimal", "aria-label": "type a value", onchange: () => {
    const text = field.value.trim();
    const value = Number(text.replace("−", "-").replace(",", "."));
    const reason = text && reasonAgainst(view.model, value);
    if (text && !reason) view.edit(view.number, value, steps());
    else showValue();
    refusal.textContent = reason && `“${text}” ${reason}, so nothing was changed. Type a number such as 0.5 or −2e3.`;
  }, onkeydown: ({ key }) => {
    if (key === "Escape") showValue();
    if (key === "Escape" || key === "Enter") element.closest(".unrolled").focus({ preventScroll: true }); // the page's keys work again
  } });
  const everyStep = createElement("input", { type: "checkbox", checked: true, onchange: () => view.holdSteps(view.number, steps()) });
  const everyLabel = createElement("label", { class: "every" }, everyStep, "in all steps");
  const label = createElement("label");
  const row = createElement("div", { class: "drag" }, label, slider, field);
  const leaves = createElement("div", { class: "chips", role: "group", "aria-label": "computed from" });
  const tries = createElement("div", { class: "chips", role: "group", "aria-label": "experiments" });
  const element = createElement("div", { class: "whatif" }, createElement("div", { class: "head-row" }, createElement("h2", {}, "Change something"), hint), row, refusal, leaves, tries);

  const showValue = () => {
    const isHold = view.edits.editOf(view.layerIndex, view.number)?.kind === "hold";
    field.value = (isHold ? shown : given)(view.value(view.number));
  };
  const steps = () => (everyStep.checked ? null : [view.number.t]);

  function update() {
    const { model, number, symbols, edits } = view;
    refusal.textContent = "";
    if (!edits.possible) {
      hint.textContent = view.mode === "this" ? `Not possible on this page. ${edits.reasons.find(Boolean)}` : edits.reasons.find(Boolean);
      row.hidden = leaves.hidden = tries.hidden = true;
      return;
    }
    const edit = edits.editOf(view.layerIndex, number);
    row.hidden = !edit;
    leaves.hidden = edit !== null;
    tries.hidden = false;
    if (edit) {
      const value = view.value(number);
      label.innerHTML = symbols.of(number);
      slider.setAttribute("aria-label", `new value of ${symbols.spoken(number)}`);
      field.setAttribute("aria-label", `type a value of ${symbols.spoken(number)}`);
      [slider.min, slider.max] = limits(view, number, edit);
      slider.value = value;
      if (document.activeElement !== field) showValue();
      const isHold = edit.kind === "hold";
      if (isHold !== everyLabel.isConnected) isHold ? row.after(everyLabel) : everyLabel.remove();
      const set = edits.find(view.layerIndex, number);
      if (isHold && set) everyStep.checked = set.steps === null;
      hint.textContent = isHold ? (set ? "set by you" : "drag or type to set it") : edit.kind === "parameter" ? "the same in all steps" : "";
    } else {
      everyLabel.remove();
      hint.textContent = "drag or type in any framed number";
      const found = leavesOf(view);
      leaves.hidden = !found.length;
      const more = found.length > MAX_LEAVES ? [createElement("span", { class: "quiet" }, `and ${found.length - MAX_LEAVES} more`)] : [];
      replaceChildren(leaves, createElement("span", { class: "quiet" }, "Computed from"), ...found.slice(0, MAX_LEAVES).map((one) => chip(symbols.of(one), () => view.choose(one))), ...more);
    }
    replaceChildren(tries, createElement("span", { class: "quiet" }, "Try"), ...experiments(view).map(({ text, run, pressed }) => chip(text, run, pressed)));
  }

  function chip(markup, onclick, pressed = null) {
    const button = createMarkup("button", markup, "btn");
    button.type = "button";
    if (pressed !== null) button.setAttribute("aria-pressed", pressed);
    button.addEventListener("click", onclick);
    return button;
  }

  /** Go to the field. What is typed replaces the value in it. */
  function focus() {
    field.focus();
    field.select();
  }

  return { element, update, focus };
}

/** Why a typed value can't be that of a number; empty if it can. */
function reasonAgainst({ stored }, value) {
  if (Number.isNaN(value)) return "is not a number";
  if (Number.isFinite(stored.constructor.of(value)[0])) return "";
  return `is too large for ${stored instanceof Float64Array ? "float64" : "float32"}`;
}

/** The ends of the slider. */
function limits(view, number, edit) {
  const { model } = view;
  if (edit.kind === "hold") return model.isGate(number.q) ? [0, 1] : [-1, 1];
  const scale = Math.max(edit.kind === "parameter" ? 3 : 4, Math.abs(view.original(number)) * 1.5);
  return [-scale, scale];
}

/** The numbers that can be changed and that the chosen one is computed from in this step. */
function leavesOf(view) {
  const found = new Map();
  const visit = (number, depth) => {
    if (view.isEditable(number)) found.set(JSON.stringify(number), number);
    else if (depth && (number.t === view.step || number.t === undefined)) view.model.sources(number).forEach((source) => visit(source, depth - 1));
  };
  view.model.sources(view.number).forEach((source) => visit(source, 3));
  return [...found.values()];
}

/** The gate that decides how much of an old state is kept, or another one. */
function mainGate(model) {
  const gates = model.nodes.filter((node) => node.name && isGate(model, node) && model.held.includes(node.name));
  const keeps = (node) => model.readers.get(node.id).some((reader) => reader.operation === "product" && reader.terms.some((term) => term.source?.startsWith("before:")));
  return gates.find(keeps) ?? gates[0] ?? null;
}

function experiments(view) {
  const { model, layerIndex, edits } = view;
  const found = [];
  const gate = mainGate(model);
  if (gate) {
    const unit = Math.min(view.unit, model.size(gate.name) - 1);
    const edit = edits.editOf(layerIndex, { q: gate.name, t: model.firstStep, u: unit });
    const held = edits.edits.get(edits.key(edit))?.value;
    const toggle = (value) => () => (held === value ? view.removeEdit(edit) : view.setEdit(edit, value));
    found.push({ text: `Shut ${elementOf(model, gate.name, unit)}`, run: toggle(0), pressed: held === 0 }, { text: "Open it", run: toggle(1), pressed: held === 1 });
  }
  const recurrent = model.nodes.flatMap((node) => node.terms).find((term) => term.weighted && term.parameter && term.source?.startsWith("before:"));
  if (!gate && recurrent) {
    const { values, shape } = model.parameters.get(recurrent.parameter);
    const scaled = (factor) => () => view.setEdits(Array.from(values, (value, index) => [{ part: layerIndex, kind: "parameter", name: recurrent.parameter, index }, value * factor]));
    if (shape.reduce((a, b) => a * b, 1) <= 64) {
      found.push({ text: `Cut the memory: all of ${recurrent.parameter} = 0`, run: scaled(0) }, { text: `${recurrent.parameter} × 3`, run: scaled(3) });
    }
  }
  if (model.index === 0 && model.features <= 64) {
    const step = model.firstStep;
    found.push({ text: `No input at step ${step}`, run: () => view.setEdits(Array.from({ length: model.features }, (_, unit) => [{ part: layerIndex, kind: "input", step, unit }, 0])) });
  }
  return found;
}
