// What the colors of a text or a heat map mean.

import { createElement } from "./dom.js";
import { fixed } from "./digits.js";
import { gateColor, valueColor } from "./numbers.js";

const STOPS = [0, 0.25, 0.5, 0.75, 1];

/** The lowest value, a bar of colors, and the highest value of the scale of a quantity. */
export function colorScale(view, q) {
  const isGate = view.model.isGate(q);
  const limit = isGate ? 1 : view.scale({ q });
  const low = isGate ? 0 : -limit;
  const color = (value) => (isGate ? gateColor(value, view.theme) : valueColor(value, limit, view.theme));
  const stops = STOPS.map((share) => `rgb(${color(low + share * (limit - low)).join(" ")})`);
  const print = (value) => fixed(value, limit < 1 ? 2 : 1);
  return [print(low), createElement("i", { style: `background: linear-gradient(to right, ${stops.join(", ")})` }), print(limit)];
}
