// The guided tour: six stops, each with a text, the number that is chosen, and what is framed.

import { isGate } from "./gates.js";
import { symbol } from "./names.js";
import { nameOf, upper } from "./words.js";
import { inputDescription, inputName, outputDescription, outputName } from "./tensor_names.js";

/** Return the stops of the tour of a layer: {title, text, number, target}. */
export function tourStops(view) {
  const { model } = view;
  const step = model.nearest(model.length > 2 ? (model.backward ? model.length - 3 : 2) : model.firstStep);
  const unit = Math.min(1, model.units - 1);
  const at = (q, more = {}) => ({ q, t: step, u: Math.min(unit, model.quantity(q)?.kind === "input" ? 0 : model.size(q) - 1), ...more });
  const after = model.next(step);
  const stops = { RNN: rnnStops, LSTM: lstmStops }[view.data.cell] ?? otherStops;
  const changed = model.changedStates ? ", after the model has changed it" : "";
  return stops(view, { step, unit, at, after, before: beforeText(model, step), changed }).filter((stop) => model.exists(stop.number)); // the last step has no next one
}

/** Where a step gets its states: "the step before". In the backward direction, that is the step with the next number. */
function beforeText(model, step) {
  const previous = model.previous(step);
  if (previous === model.start) return "before the first step";
  if (model.changedStates) return "the step before, which the model changed in between";
  return model.backward ? `step ${previous}, which runs before it` : "the step before";
}

function whatEnters(model, step) {
  const name = inputName(model, step);
  if (!name) return `At every step the layer reads one row of ${inputDescription(model)}.`;
  return `At every step the layer reads one row of the input. Steps and rows are counted from 0, so step ${step} reads ${name}.`;
}

function outputText(model, step) {
  const name = outputName(model, step);
  return `${outputDescription(model)} of this step${name ? `: ${name} holds these numbers` : ""}`;
}

/** A row of a step in the sequence: the states, those that the model has changed, and the input. */
const stripRow = (step, row) => `.strip [data-step="${step}"] .cells:nth-of-type(${row})`;
const inputRow = (model, step) => stripRow(step, model.states.length * (model.changedStates ? 2 : 1) + 1);
const stateBeforeRow = (model, step) => (model.changedStates ? stripRow(step, model.states.length + 1) : stripRow(model.previous(step), 1));

function rnnStops(view, { step, unit, at, after, before, changed }) {
  const { glyph } = view.model.nodesByKey.get("h");
  const effect = glyph === "tanh" ? "tanh squeezes it into −1 to 1, so a state can't grow without limit." : "ReLU replaces negative sums with 0. Nothing bounds large ones, so a state can grow from step to step.";
  return [
    { title: "What enters", number: at("x", { u: 0 }), target: inputRow(view.model, step),
      text: whatEnters(view.model, step) },
    { title: "The weighted sum of the input", number: at("h.0"), target: ".sum",
      text: `Each unit has its own weights. Unit ${unit} multiplies the inputs by the weights in its row of weight_ih, adds a bias, and gets one number.` },
    { title: "What the previous state adds", number: at("h.1"), target: `${stateBeforeRow(view.model, step)}, .sum`, // a narrow strip shows one step
      text: `The layer remembers through its hidden state. Unit ${unit} also reads all numbers of the state from ${before}, with the weights in its row of weight_hh.` },
    { title: glyph, number: at("h"), target: '[data-node="h"].node',
      text: `The two parts are added. The activation function is applied to the sum. ${effect}` },
    { title: "The output", number: at("h"), target: stripRow(step, 1),
      text: `The result is the new hidden state. It is also ${outputText(view.model, step)}.` },
    { title: "The next step", number: at("h.1", { t: after }), target: `.strip [data-step="${after}"]`,
      text: `Step ${after} starts from this state${changed}, with the same weights and the next input. All that the layer knows of the steps ${view.model.backward ? "that ran before" : "before"} is in these numbers.` },
  ];
}

function lstmStops(view, { step, unit, at, after, before, changed }) {
  return [
    { title: "What enters", number: at("x", { u: 0 }), target: inputRow(view.model, step),
      text: `At every step the layer reads one row of the input, and two vectors from ${before}: the hidden state h and the cell state c.` },
    { title: "Four weighted sums", number: at("sum.f"), target: '.gate[data-node="f"]',
      text: "As in nn.RNN, each sum has an input part and a part from the previous hidden state. Each unit of an LSTM has four: one for each of the three gates, and one for the candidate." },
    { title: "Gates", number: at("f"), target: '[data-node="f"].node',
      text: "σ turns a sum into a number between 0 (shut) and 1 (open). A gate doesn't carry anything itself. It scales another number." },
    { title: "The cell state", number: at("c"), target: ".grp.states", narrowTarget: ".whatif",
      text: `c is the memory. The forget gate scales the old value, the input gate scales the candidate, and the two are added. Press “Shut the forget gate of unit ${unit}” below the drawing: the old value is multiplied by 0, and only the candidate’s part is left.` },
    { title: "Hidden state and output", number: at("h"), target: '[data-node="h"].node',
      text: `tanh squeezes the cell state, and the output gate decides how much of it gets out. The result is h. It is also ${outputText(view.model, step)}.` },
    { title: "The next step", number: at("c", { t: after }), target: `.strip [data-step="${after}"]`,
      text: `${changed ? "The model changes the states, and passes them to" : "Both states go on to"} step ${after}, where the forget gate scales c again. On its way from step to step, c passes no weight matrix and no tanh. That is how an LSTM remembers for many steps.` },
  ];
}

const COUNTS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];

/** A quantity with what it is: "the update gate z", "the real part re of the state", or only "z". */
function called(model, q) {
  if (!model.descriptions[q]) return symbol(q);
  const [noun, ...rest] = nameOf(model, q).split(" of ");
  return [`the ${noun} ${symbol(q)}`, ...rest].join(" of ");
}

/** The tour of any other cell, from what its step computes. */
function otherStops(view, { step, at, after, before, changed }) {
  const { model } = view;
  const names = model.states.map((state) => called(model, state.name));
  const states = names.length > 1 ? `${names.slice(0, -1).join(", ")} and ${names.at(-1)}` : names[0];
  const layers = model.nodes.filter((node) => node.kind === "layer");
  const gate = model.nodes.find((node) => node.name && isGate(model, node));
  const output = model.states[0].name;
  const memory = (model.states[1] ?? model.states[0]).name; // the cell state, if there is one
  const first = layers[0] && model.keys.get(layers[0].id);
  const stops = [
    { title: "What enters", number: at("x", { u: 0 }), target: `.strip [data-step="${step}"]`,
      text: `At every step the cell reads one row of the input, and ${states} from ${before}.` },
  ];
  if (first) {
    const count = COUNTS[layers.length] ?? layers.length;
    stops.push({ title: layers.length > 1 ? `${upper(count)} weighted sums` : "A weighted sum", number: at(model.quantitiesOf(layers[0])[0]), target: `.gate[data-node="${first}"]`,
      text: `${layers.length > 1 ? `The cell computes ${count} weighted sums for each unit` : "The cell computes one weighted sum for each unit"}. Each has weights of its own. They are the same at every step.` });
  }
  if (gate) {
    stops.push({ title: "Gates", number: at(gate.name), target: `[data-node="${gate.name}"].node`,
      text: `${upper(called(model, gate.name))} is a number between 0 (shut) and 1 (open). A gate doesn't carry anything itself. It scales another number.` });
  }
  stops.push({ title: "The state", number: at(memory), target: `[data-node="${memory}"].node`, text: `This is the new ${nameOf(model, memory)}. Click the numbers in the arithmetic to see what it is made of.` });
  const isNamedOutput = nameOf(model, output) === "output" && outputDescription(model) === "the output";
  stops.push({ title: "The output", number: at(output), target: `.strip [data-step="${step}"]`, text: `${upper(called(model, output))} is ${isNamedOutput ? "" : "also "}${outputText(model, step)}.` });
  stops.push({ title: "The next step", number: at(output, { t: after }), target: `.strip [data-step="${after}"]`, text: `Step ${after} starts from the new state${changed}, with the same weights and the next input.` });
  return stops;
}
