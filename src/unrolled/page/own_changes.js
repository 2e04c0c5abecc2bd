// What the reader's changes have done to the layer: numbers that are no longer finite, and gates that are stuck.

import { shown } from "./digits.js";
import { symbol } from "./symbols.js";
import { nameOf } from "./words.js";

// As in unrolled.tracing.thresholds:
const SHUT_GATE = 0.0127;
const OPEN_GATE = 0.999;
const MAX_VALUES = 50_000; // of a gate that are looked at whenever a number is dragged

/** Return the markup of a sentence about the worst effect of the changes on the layer that is shown; empty if there is none. */
export function effectOfChanges({ model, edits, mode }) {
  if (mode !== "this" || !edits.size || edits.isLong || model.values === model.recorded) return "";
  return notFinite(model) || stuckGate(model);
}

function notFinite(model) {
  for (const step of model.backward ? [...model.steps].reverse() : model.steps) {
    for (const q of model.order) {
      const index = model.valueIndex(q);
      const unit = model.read(model.values.row(step), index).findIndex((value) => !Number.isFinite(value));
      if (unit < 0 || !Number.isFinite(model.at(model.recorded, step, index, unit))) continue;
      return `${symbolOf(model, q)}[${unit}] is ${shown(model.at(model.values, step, index, unit))} at step ${step}.`;
    }
  }
  return "";
}

function stuckGate(model) {
  for (const node of model.nodes.filter((one) => one.range === "gate" && one.name)) {
    const size = model.sizes[node.value];
    if (size * model.steps.length > MAX_VALUES) continue;
    for (let unit = 0; unit < size; unit += 1) {
      const all = (values) => model.steps.map((step) => model.at(values, step, node.value, unit));
      const [before, now] = [all(model.recorded), all(model.values)];
      const is = (values) => (values.every((value) => value <= SHUT_GATE) ? "shut" : values.every((value) => value >= OPEN_GATE) ? "open" : "");
      const state = is(now);
      if (state && state !== is(before)) return stuckText(model, node, unit, state, now);
    }
  }
  return "";
}

function stuckText(model, node, unit, state, values) {
  const steps = values.length === 1 ? "the only step" : `all ${values.length} steps`;
  const amount = state === "shut" ? `at most ${shown(Math.max(...values))}` : `at least ${shown(Math.min(...values))}`;
  const name = nameOf(model, node.name);
  const subject = `${name.charAt(0).toUpperCase()}${name.slice(1)} ${symbolOf(model, node.name)}[${unit}] stays ${state}: ${amount} in ${steps}`;
  const other = model.readers.get(node.id).find((reader) => reader.operation === "product")?.terms.find((term) => term.source !== node.id && term.source);
  if (!other) return `${subject}.`;
  const isOld = other.source.startsWith("before:");
  const what = isOld ? symbol(other.source.slice(7)) : symbol(model.labels.get(other.source) || node.name);
  if (!isOld && !model.labels.get(other.source)) return `${subject}.`;
  if (state === "open") return `${subject}, so unit ${unit} ${isOld ? `keeps all of ${what} at every step` : `lets all of ${what} through`}.`;
  return `${subject}, so ${isOld ? `unit ${unit} forgets ${what} at every step` : `nothing of ${what} gets through in unit ${unit}`}.`;
}

const symbolOf = (model, q) => symbol(model.labels.get(model.nodesByKey.get(q.split(".").at(-1))?.id) || q);
