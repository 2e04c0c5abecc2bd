// What the reader's changes have done to the layer: numbers that are no longer finite, and gates that are stuck.

import { shown } from "./digits.js";
import { gatedFactor, isGate, shortNumber } from "./gates.js";
import { symbol } from "./names.js";
import { firstNotFinite } from "./not_finite.js";
import { nameOf, upper } from "./words.js";

// As in unrolled.tracing.thresholds:
const SHUT_GATE = 0.0127;
const OPEN_GATE = 0.999;
const MAX_VALUES = 50_000; // of a gate that are looked at whenever a number is dragged

/** Return the markup of a sentence about the worst effect of the changes on the layer that is shown; empty if there is none. */
export function effectOfChanges({ model, symbols, edits, mode }) {
  if (mode !== "this" || !edits.size || edits.isLong || model.values === model.recorded) return "";
  return notFinite(model, symbols) || stuckGate(model);
}

function notFinite(model, symbols) {
  for (const step of model.backward ? [...model.steps].reverse() : model.steps) {
    const found = firstNotFinite(model, step, (index, unit) => Number.isFinite(model.at(model.recorded, step, index, unit)));
    if (found) return `${symbols.of(found)} is ${shown(model.value(found))} at step ${step}.`;
  }
  return "";
}

function stuckGate(model) {
  for (const node of model.nodes.filter((one) => one.name && isGate(model, one))) {
    const size = model.sizes[node.value];
    if (size * model.steps.length > MAX_VALUES) continue;
    for (let unit = 0; unit < size; unit += 1) {
      const all = (values) => model.steps.map((step) => model.at(values, step, node.value, unit));
      const [before, now] = [all(model.recorded), all(model.values)];
      const state = stateOf(now);
      if (state && state !== stateOf(before)) return stuckText(model, node, unit, state, now);
    }
  }
  return "";
}

/** Whether a gate is always "shut", always "open", or always the same number "outside" of 0 to 1. Empty otherwise. */
function stateOf(values) {
  if (values.every((value) => value >= 0 && value <= SHUT_GATE)) return "shut";
  if (values.every((value) => value >= OPEN_GATE && value <= 1)) return "open";
  const [first] = values;
  return (first < 0 || first > 1) && values.every((value) => value === first) ? "outside" : "";
}

function stuckText(model, node, unit, state, values) {
  const steps = values.length === 1 ? "the only step" : `all ${values.length} steps`;
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const isExact = least === most && (state === "outside" || least === 0 || least === 1);
  const amount = isExact ? `is ${shortNumber(least)}` : `stays ${state}: ${state === "shut" ? `at most ${shown(most)}` : `at least ${shown(least)}`}`;
  const name = model.descriptions[node.name] ? `${upper(nameOf(model, node.name))} ` : "";
  const subject = `${name}${symbol(model.labels.get(node.id))}[${unit}] ${amount} in ${steps}`;
  const factor = gatedFactor(model, node);
  const what = factor && (factor.state ?? model.labels.get(factor.other.source));
  return what ? `${subject}, so ${effectOn(symbol(what), factor.keeps, unit, state, isExact, least)}.` : `${subject}.`;
}

function effectOn(what, keeps, unit, state, isExact, value) {
  if (state === "outside") return `it multiplies ${what} by ${shortNumber(value)}`;
  const all = isExact ? "all" : "nearly all";
  if (state === "open") return `unit ${unit} ${keeps ? `keeps ${all} of ${what} at every step` : `lets ${all} of ${what} through`}`;
  if (keeps) return `unit ${unit} forgets ${isExact ? "" : "nearly all of "}${what} at every step`;
  return `${isExact ? "nothing" : "almost nothing"} of ${what} gets through in unit ${unit}`;
}
