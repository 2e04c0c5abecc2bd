// The arithmetic behind one number, word for word as unrolled/explain.py writes it.

import { number } from "./numbers.js";
import { visible } from "./dom.js";
import { called } from "./layer.js";

const INFIX = { add: " + ", sub: " - ", mul: "·", div: " / " };
const [SUM, QUOTIENT, PRODUCT, ATOM] = [0, 1, 2, 3]; // how tightly a text holds together
const STRENGTHS = { // of the text, and those that its operands need
  add: [SUM, SUM, SUM], sub: [SUM, SUM, QUOTIENT], mul: [PRODUCT, PRODUCT, PRODUCT], div: [QUOTIENT, PRODUCT, ATOM],
};

const FOLLOWED = 20000; // elements without a name, to which what a number is made of is followed at most

/** {text, made}: the arithmetic, and the numbers that it reads as {key, place, weight}, the weightiest first. */
export function explain(layer, k, name, place, terms = 8) {
  const value = number(layer.value(`quantity ${name}`, k, place));
  const { graph, unnamed, alone } = layer.made[k];
  const { nodes, roots } = layer.graphs[graph];
  if (!Object.hasOwn(roots, name) || (Object.hasOwn(alone, name) && alone[name].includes(place))) return { text: `${value} = ${value}`, made: [], alone: true };
  const writer = new Writer(layer, k, nodes, unnamed, terms);
  let [node, at] = writer.source(roots[name], place);
  const found = nodes[node];
  const text = found.kind === "value" && found.name
    ? found.name + bracketed(found.shape, at)
    : writer.write(node, at)[0];
  if (found.kind === "value") writer.read(node, at, 0);
  const made = writer.made.sort((a, b) => b.weight - a.weight);
  return { text: `${text} = ${value}`, made: unique(made), missing: writer.missing };
}

class Writer {
  constructor(layer, k, nodes, unnamed, terms) {
    Object.assign(this, { layer, k, nodes, unnamed, terms, made: [], missing: false, followed: new Set() });
  }

  /** Where an element came from, through all functions that only move elements. */
  source(node, place) {
    while (this.nodes[node].kind === "moved") {
      const { runs, parts } = this.nodes[node];
      let left = place;
      const run = runs.find(([, , count]) => (left < count ? true : ((left -= count), false)));
      [node, place] = [parts[run[0]], run[1] + left * run[3]];
    }
    return [node, place];
  }

  /** The number of an element, noted as one that was read. */
  read(node, place, weight) {
    const [from, at] = this.source(node, place);
    const { of, via } = this.nodes[from];
    if (via !== undefined) return this.read(via, at, weight);
    if (of === "complex") {
      this.missing = true;
      return NaN;
    }
    if (of.startsWith("unnamed")) {
      this.follow(from, at, weight ?? 0);
      return this.layer.unnamed[this.unnamed[Number(of.slice(8))]][at];
    }
    const value = this.layer.value(of, this.k, at);
    if (value === undefined) this.missing = true;
    this.made.push({ key: of, place: at, weight: weight ?? Math.abs(value) });
    return value ?? NaN;
  }

  /** Note the numbers that an element without a name is made of. */
  follow(node, place, weight) {
    const [from, at] = this.source(node, place);
    const text = `${from}:${at}`;
    if (this.followed.has(text) || this.followed.size > FOLLOWED) return;
    this.followed.add(text);
    const { kind, of, via, parts, at: places, size, length, turned, counts, own, rows, shape } = this.nodes[from];
    if (via !== undefined) this.follow(via, at, weight);
    else if (kind === "value") {
      if (!of.startsWith("unnamed") && of !== "complex") this.made.push({ key: of, place: at, weight });
    } else if (kind === "sum") {
      const unit = at % size;
      const row = Math.floor(at / size);
      for (let k = 0; k < length; k += 1) {
        this.follow(parts[0], row * length + k, weight);
        this.follow(parts[1], turned ? k * size + unit : unit * length + k, weight);
      }
      if (parts.length > 2) this.follow(parts[2], unit, weight);
    } else if (kind === "rows") {
      const which = Math.floor((at * rows) / shape.reduce((a, b) => a * b, 1));
      parts.forEach((part, k) => {
        const count = own[k] ? counts[k] / rows : counts[k];
        for (let one = 0; one < count; one += 1) this.follow(part, (own[k] ? which * count : 0) + one, weight);
      });
    } else parts.forEach((part, k) => this.follow(part, places?.[k]?.[at] ?? at, weight));
  }

  write(node, place) {
    const { kind, name, parts, at } = this.nodes[node];
    const operand = (which) => [parts[which], at?.[which]?.[place] ?? place];
    switch (kind) {
      case "constant": return [name, ATOM];
      case "infix": return this.infix(name, operand(0), operand(1));
      case "negated": {
        const text = this.held(operand(0), ATOM);
        return [text.startsWith("-") ? `-(${text})` : `-${text}`, PRODUCT];
      }
      case "sum": return this.products(this.nodes[node], place);
      case "moved": return this.write(...this.source(node, place));
      case "call": return [`${name}(${parts.map((_, which) => this.write(...operand(which))[0]).join(", ")})`, ATOM];
      case "rows": return [this.whole(this.nodes[node], place), ATOM];
      default: return [number(this.read(node, place)), ATOM];
    }
  }

  held([node, place], strength) {
    const [text, own] = this.write(node, place);
    return own >= strength ? text : `(${text})`;
  }

  infix(name, left, right) {
    const [own, before, after] = STRENGTHS[name];
    return [this.held(left, before) + INFIX[name] + this.held(right, after), own];
  }

  /** A weighted sum: every weight times what it weighs, and the bias. */
  products({ parts, size, length, turned }, place) {
    const unit = place % size;
    const row = Math.floor(place / size);
    const pairs = [];
    for (let k = 0; k < length; k += 1) {
      const noted = this.made.length;
      const value = this.read(parts[0], row * length + k);
      const weight = this.read(parts[1], turned ? k * size + unit : unit * length + k);
      const product = Math.abs(weight * value);
      for (const one of this.made.slice(noted)) one.weight = Number.isFinite(product) ? product : Infinity;
      pairs.push({ k, weight, value, size: Number.isFinite(product) ? product : Infinity });
    }
    const largest = [...pairs].sort((a, b) => b.size - a.size).slice(0, this.terms);
    const shown = new Set(largest.map((pair) => pair.k));
    const texts = pairs.filter((pair) => shown.has(pair.k))
      .map(({ weight, value }) => `${number(weight)}·${number(value)}`);
    const others = pairs.filter((pair) => !shown.has(pair.k));
    if (others.length) {
      const rest = total(others.map(({ weight, value }) => weight * value));
      texts.push(`(${others.length} more terms: ${number(rest)})`);
    }
    if (parts.length > 2) texts.push(number(this.read(parts[2], unit)));
    return [texts.join(" + "), texts.length > 1 ? SUM : PRODUCT];
  }

  /** A function of whole rows, of which the element is a part. */
  whole({ name, parts, rows, own, counts, shape }, place) {
    const which = Math.floor((place * rows) / shape.reduce((a, b) => a * b, 1));
    const texts = parts.map((part, at) => {
      const count = own[at] ? counts[at] / rows : counts[at];
      const first = own[at] ? which * count : 0;
      const values = Array.from({ length: count }, (_, k) => number(this.read(part, first + k)));
      return `[${count > this.terms ? [...values.slice(0, this.terms), "…"].join(", ") : values.join(", ")}]`;
    });
    return `${name}(${texts.join(", ")})${bracketed(shape, place)}`;
  }
}

/** A sum to the last digit (Neumaier, 1974). */
function total(values) {
  let sum = 0;
  let lost = 0;
  for (const value of values) {
    const next = sum + value;
    lost += Math.abs(sum) >= Math.abs(value) ? sum - next + value : value - next + sum;
    sum = next;
  }
  return Number.isFinite(sum) ? sum + lost : sum;
}

/** Where an element stands in its row, in brackets; nothing where it is the only one. */
function bracketed(shape, place) {
  if (shape.reduce((a, b) => a * b, 1) <= 1) return "";
  return `[${places(shape.length > 1 && shape[0] === 1 ? shape.slice(1) : shape, place)}]`;
}

/** A place among all elements as one along each axis. */
export function places(shape, place) {
  const at = [];
  for (const size of [...shape].reverse()) {
    at.unshift(place % size);
    place = Math.floor(place / size);
  }
  return at.join(", ");
}

function unique(made) {
  const seen = new Set();
  return made.filter(({ key, place }) => {
    const text = `${key}:${place}`;
    return seen.has(text) ? false : seen.add(text);
  });
}

/** In plain words what a number is, where no arithmetic stands behind it. */
export function given(layer, k, key, { labels, dropout }) {
  const step = layer.steps[k];
  const label = labels ? ` (${visible(labels[step])})` : "";
  if (key === "input") {
    return layer.layer === 0
      ? `x is what the layer reads at step ${step}${label}: it is given, not computed.`
      : `x is the output of the layer below at step ${step}${label}${dropout ? ", after dropout" : ""}.`;
  }
  if (key.startsWith("parameter")) return `${called(key)} is a parameter: the same at every step, and what training changes.`;
  return `${called(key)} before the first step is the initial state: it is given, not computed.`;
}
