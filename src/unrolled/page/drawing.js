// The cell, drawn: lines whose width and color are the numbers of the chosen unit, and gates that fill.

import { createElement, createSvg } from "./dom.js";
import { tone } from "./cells.js";
import { factorOf } from "./derivation.js";
import { fixed } from "./digits.js";
import { afterName, splitName } from "./names.js";
import { Symbols } from "./symbols.js";

const THIN = 1.3;
const THICK = 4.4;
const FAINT = 30; // percent of color in a line that carries zero
export const MAX_BARS = 6; // units that a box shows beside the chosen one
const BELT = 26;
const MAX_CHARACTERS = 14; // of a glyph, as the layout has room for

const FRAME_WIDTH = 42; // of a state: its name above its digits
const INPUT_FRAME_WIDTH = 30;

/** Create the drawing of the cell. Returns {element, update}. */
export function createDrawing(view) {
  const element = document.createElement("div");
  element.className = "drawing";
  const narrow = matchMedia("(max-width: 560px)");
  let drawn = null;
  let painters = [];

  function update() {
    const state = [view.partKey, narrow.matches, view.model.isFolded].join();
    if (drawn !== state) {
      painters = [];
      element.classList.toggle("is-open", !view.model.isFolded);
      element.replaceChildren(view.model.drawing ? draw() : createElement("p", { class: "quiet" }, view.edits.reasons[view.layerIndex]));
      drawn = state;
    }
    for (const paint of painters) paint();
  }

  function draw() {
    const { model } = view;
    const { nodes } = model.drawing;
    const layout = currentLayout();
    const svg = createSvg("svg", { class: "cell", viewBox: `0 0 ${layout.width} ${layout.height}`, role: "group", "aria-label": `One step of the cell, with the numbers of one unit` });
    svg.style.setProperty("--natural", `${layout.width}px`);
    svg.append(
      ...layout.belts.map(([, place]) => createSvg("rect", { class: "belt", ...(layout.orientation === "vertical"
        ? { x: place - BELT / 2, width: BELT, height: layout.height } : { y: place - BELT / 2, width: layout.width, height: BELT }) })),
      ...routes(layout), ...layout.dots.map(dot), ...layout.ports.map(port), output(layout),
      ...nodes.map((node, k) => nodeMark(node, layout.nodes[k])), ...nodes.map((node, k) => foldButton(node, layout.nodes[k])).filter(Boolean));
    return svg;
  }

  /** The layout in which time runs down on a narrow screen. */
  const currentLayout = () => (narrow.matches ? view.model.drawing.upright : view.model.drawing.layout);

  const isVector = (route) => route.weighted || route.kind === "rail" || route.kind === "tap";

  function routes(layout) {
    const lanes = new Set(layout.routes.filter((route) => route.kind === "lane").map((route) => route.net));
    const nets = [...new Set(layout.routes.map((route) => route.net))].sort((a, b) => lanes.has(a) - lanes.has(b));
    return nets.flatMap((net) => {
      const mine = layout.routes.filter((route) => route.net === net);
      const halos = mine.map((route) => createSvg("path", { class: `halo${isVector(route) ? " thin" : ""}`, d: route.path }));
      return [createSvg("g", {}, halos), ...mine.map(line)];
    });
  }

  function line(route) {
    const path = createSvg("path", { class: "line", d: route.path });
    const head = route.arrow;
    const turn = head && `translate(${head.x} ${head.y}) rotate(${head.dx ? (head.dx > 0 ? 0 : 180) : head.dy > 0 ? 90 : -90})`;
    const arrow = head && createSvg("path", { class: "arrow", transform: turn, d: "M0 0L-8.5 -4.3L-8.5 4.3Z" });
    const minus = route.minus && createSvg("text", { "aria-hidden": "true", class: "minus", x: route.minus[0], y: route.minus[1] + 4 }, "−");
    const group = createSvg("g", { class: `wire${isVector(route) ? " vector" : ""}` }, path, arrow, minus);
    if (!isVector(route)) {
      painters.push(() => {
        const number = view.model.drawnNumber(route.sources[0], view.step, view.unit);
        const share = tint(group, number);
        path.style.strokeWidth = `${THIN + THICK * share}px`;
        arrow?.setAttribute("transform", `${turn} scale(${1 + 0.12 * share} ${1 + 0.75 * share})`);
      });
    }
    painters.push(() => {
      const node = view.highlightedNode;
      group.classList.toggle("on", node !== null && route.target === node);
    });
    return group;
  }

  /** Color a group by a number. Returns its share of the scale. */
  function tint(group, number) {
    const { model } = view;
    const value = view.value({ ...number, u: clamp(number) });
    const share = Number.isFinite(value) ? Math.min(1, Math.abs(value) / view.scale(number)) || 0 : 1;
    group.dataset.tone = tone(value, model.isGate(number.q)) || "pos";
    group.style.setProperty("--share", `${FAINT + (100 - FAINT) * share}%`);
    return share;
  }

  /** The unit of a quantity that belongs to the chosen unit. */
  function clamp(number) {
    const size = number.q === "x" ? view.model.features : view.model.size(number.q);
    return Math.min(number.u, size - 1);
  }

  function dot({ x, y, net }) {
    const mark = createSvg("circle", { class: "dot", cx: x, cy: y, r: 3 });
    const isScalar = currentLayout().routes.some((route) => route.net === net && !isVector(route));
    if (isScalar && !net.startsWith("rail")) {
      painters.push(() => {
        const share = tint(mark, view.model.drawnNumber(net, view.step, view.unit));
        mark.setAttribute("r", 2.6 + 2 * share);
      });
    }
    return mark;
  }

  function port(place) {
    const group = createSvg("g", { class: "port", role: "button", tabindex: 0 });
    const { model } = view;
    const size = place.name === "x" ? model.features : model.sizes[model.statesByName.get(place.name).value];
    const isBefore = place.side === "in" && place.name !== "x";
    const refer = () => {
      const unit = Math.min(view.unit, size - 1);
      return isBefore ? model.stateBefore(place.name, view.step, unit) : { q: place.name, t: view.step, u: unit };
    };
    const name = createSvg("text", { "aria-hidden": "true", x: place.text_x, y: place.name_y, "text-anchor": place.anchor, class: "portname" });
    const value = place.value_y === null ? null : createSvg("text", { "aria-hidden": "true", x: place.text_x, y: place.value_y, "text-anchor": place.anchor, class: "digits" });
    const width = value ? FRAME_WIDTH : INPUT_FRAME_WIDTH;
    const left = place.anchor === "start" ? place.text_x - 5 : place.text_x + 5 - width;
    group.append(createSvg("rect", { class: "hit", x: left, y: place.name_y - 13, width, height: value ? place.value_y - place.name_y + 17 : 21, rx: 5 }), name, ...(value ? [value] : []));
    chooseOnClick(group, refer);
    painters.push(() => {
      const number = refer();
      name.replaceChildren(...symbolSpans(place.name, 15, isBefore && model.changedStates ? "before" : view.symbols.step(number.t)));
      if (value) value.textContent = fixed(view.value(number), 2);
      mark(group, number, `${isBefore ? "previous " : place.side === "out" ? "new " : ""}${spokenName(place.name)}`);
    });
    return group;
  }

  /** What a node or the end of a line is called by screen readers: "forget gate f". */
  function spokenName(q) {
    const [description] = (view.model.descriptions[q] ?? "").split(":");
    const name = view.symbols.spokenQuantity(q === "x" ? null : view.model.quantity(q), q);
    return description && afterName(name, description) === description ? `${description} ${name}` : description || name;
  }

  function chooseOnClick(group, refer) {
    group.refer = refer;
    onPress(group, () => view.choose(refer()));
  }

  function onPress(group, action) {
    group.addEventListener("click", action);
    group.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      action();
      event.preventDefault();
      event.stopPropagation();
    });
  }

  function output({ output: [x, y], orientation }) {
    const isUpright = orientation === "vertical";
    const arrow = createSvg("g", isUpright ? { transform: "rotate(90)" } : {},
      createSvg("path", { class: "outline", d: "M0 0v-26" }), createSvg("path", { class: "outhead", d: "M0 -33l-4.6 8h9.2z" }));
    const text = createSvg("text", { "aria-hidden": "true", class: "small", x: isUpright ? 3 : 0, y: isUpright ? 15 : -37, "text-anchor": isUpright ? "start" : "middle" }, "output");
    return createSvg("g", { "aria-hidden": "true", transform: `translate(${x} ${y})` }, arrow, text);
  }

  function mark(group, number, name) {
    view.mark(group, number);
    group.classList.toggle("changed", view.isChanged(number));
    group.classList.toggle("set", view.isSet(number));
    group.setAttribute("aria-label", `${name}: ${fixed(view.value(number))}`);
  }

  function nodeMark(node, place) {
    const { model } = view;
    const { q: key } = model.drawnNumber(node.id, 0, 0);
    const size = model.sizes[node.value];
    const refer = () => ({ q: key, t: view.step, u: Math.min(view.unit, size - 1) });
    const group = createSvg("g", { class: `node ${node.kind}${node.range === "gate" ? " isgate" : ""}`, "data-node": key, role: "button",
      tabindex: 0, transform: `translate(${place.x} ${place.y})` });
    const { width: w, height: h } = place;
    const isCircle = node.kind === "operation" && place.radius >= w / 2;
    if (isCircle) circle(group, node, w);
    else box(group, node, place, key, size);
    if (place.label) label(group, node, place, refer);
    group.append(isCircle ? createSvg("circle", { class: "focus", r: w / 2 + 4 }) : createSvg("rect", { class: "focus", x: -w / 2 - 4, y: -h / 2 - 4, width: w + 8, height: h + 8, rx: place.radius + 3 }));
    chooseOnClick(group, refer);
    group.addEventListener("pointerenter", () => view.hover(refer()));
    group.addEventListener("pointerleave", () => view.hover(null));
    painters.push(() => {
      const number = refer();
      const value = view.value(number);
      const limit = view.scale(number);
      group.dataset.tone = tone(value, model.isGate(key)) || "pos";
      group.style.setProperty("--share", `${4 + 40 * Math.min(1, Math.abs(value / limit) || 0)}%`);
      mark(group, number, spokenName(key));
      group.classList.toggle("holds", isFoldedInto(node));
    });
    return group;
  }

  /** The button at the last node of a group that opens all groups, or folds them again. */
  function foldButton(node, { x, y, width, height }) {
    const { model } = view;
    const group = model.groups.get(node.id);
    if (!group) return null;
    const { isFolded } = model;
    const text = `${isFolded ? "Open" : "Fold"} ${node.name || group.title}: ${group.nodes.length} nodes`;
    const button = createSvg("g", { class: "fold", role: "button", tabindex: 0, "aria-expanded": String(!isFolded), "aria-label": text, transform: `translate(${x - width / 2} ${y + height / 2})` },
      createSvg("title", {}, text), createSvg("circle", { r: 8 }), createSvg("path", { d: isFolded ? "M-4 0h8M0 -4v8" : "M-4 0h8" }));
    onPress(button, () => {
      model.foldGroups(!isFolded);
      view.refresh();
      element.querySelector(`.fold[data-group="${node.id}"]`)?.focus();
    });
    button.dataset.group = node.id;
    return button;
  }

  /** Whether the chosen number belongs to a node that is folded into another one. */
  function isFoldedInto(node) {
    const { model, number } = view;
    const inner = model.isFolded ? model.groups.get(node.id)?.nodes.slice(0, -1) ?? [] : [];
    return inner.some((id) => model.quantitiesOf(model.nodesById.get(id)).includes(number.q));
  }

  function circle(group, node, width) {
    const { model } = view;
    group.append(createSvg("circle", { class: "body", r: width / 2 }));
    const gates = node.glyph === "×" ? node.sources.map((source) => model.drawnNodes.get(source)).filter((one) => one?.range === "gate") : [];
    const gate = gates.find((one) => one.glyph !== "1−") ?? gates[0];
    if (gate) {
      const ring = createSvg("circle", { class: "ring", r: width / 2 - 2, pathLength: 100, transform: "rotate(-90)" });
      group.append(createSvg("circle", { class: "track", r: width / 2 - 2 }), ring);
      painters.push(() => {
        const share = 100 * Math.max(0, Math.min(1, view.value(model.drawnNumber(gate.id, view.step, view.unit)))) || 0;
        ring.style.strokeDasharray = `${share} 100`;
        ring.style.display = share < 0.2 ? "none" : "";
      });
    }
    const isShort = node.glyph.length === 1;
    group.append(createSvg("text", { "aria-hidden": "true", class: "glyph", y: isShort ? 6 : 4.5, "font-size": isShort ? 19 : 13 }, node.glyph));
  }

  function box(group, node, place, key, size) {
    const { width: w, height: h, radius } = place;
    const rect = { x: -w / 2, y: -h / 2, width: w, height: h, rx: radius };
    group.append(createSvg("rect", { class: "body", ...rect }));
    if (node.glyph.startsWith("softmax")) shares(group, place, key, size);
    else if (node.kind === "layer") bars(group, place, key, size);
    else group.append(createSvg("rect", { class: "tint", ...rect }));
    group.append(createSvg("rect", { class: "rim", ...rect }));
    if (node.isFader) fader(group, node, w);
    const text = node.glyph.length > MAX_CHARACTERS ? `${node.glyph.slice(0, MAX_CHARACTERS - 1)}…` : node.glyph;
    if (node.kind !== "layer") {
      group.append(createSvg("text", { "aria-hidden": "true", class: "glyph", y: node.isFader ? 0 : 4.5, "font-size": 13.5 }, text));
      return;
    }
    const glyph = createSvg("text", node.name ? { class: "small", x: -w / 2 + 5, y: -h / 2 + 12 } : { class: "glyph", y: 3, "font-size": node.glyph === "W" ? 18 : 15 },
      node.weight ? symbolSpans(`W_${node.weight}`, 18) : createSvg("tspan", { class: node.glyph === "W" ? "symbol" : null }, text));
    group.append(glyph);
    if (node.name) {
      if (node.normalized) group.append(createSvg("text", { "aria-hidden": "true", class: "small", x: w / 2 - 4, y: -h / 2 + 11, "text-anchor": "end" }, "norm"));
      const [base, index] = splitName(node.name);
      const points = base.length > 6 ? 11 : base.length + index.length > 5 ? 13 : 17;
      group.append(createSvg("text", { "aria-hidden": "true", y: 5, "text-anchor": "middle" }, symbolSpans(node.name, points)));
    }
    const value = createSvg("text", { "aria-hidden": "true", class: "digits", y: h / 2 - 5, "text-anchor": "middle" });
    group.append(value);
    painters.push(() => { value.textContent = fixed(view.value({ q: key, t: view.step, u: Math.min(view.unit, size - 1) }), 2); });
  }

  /** The values of a layer as levels: from the floor for a gate, else from a line in the middle. */
  function bars(group, place, key, size) {
    const { width: w, height: h } = place;
    const isGate = view.model.isGate(key);
    const count = size <= MAX_BARS ? size : 1;
    const levels = Array.from({ length: count }, () => createSvg("rect", { class: "level" }));
    fill(group, place, key, levels, isGate ? null : createSvg("path", { class: "zero", d: `M${-w / 2} 0h${w}` }));
    painters.push(() => levels.forEach((level, k) => {
      const number = { q: key, t: view.step, u: count === 1 ? Math.min(view.unit, size - 1) : k };
      const value = view.value(number);
      const share = Math.max(-1, Math.min(1, value / view.scale(number))) || 0;
      const tall = isGate ? Math.max(0, share) * h : Math.abs(share) * (h / 2);
      const attributes = { x: -w / 2 + (k * w) / count, width: w / count, y: isGate ? h / 2 - tall : share > 0 ? -tall : 0, height: tall };
      for (const [name, one] of Object.entries(attributes)) level.setAttribute(name, one);
      level.dataset.tone = tone(value, isGate) || "pos";
      level.classList.toggle("mine", number.u === view.unit);
    }));
  }

  /** Fill the shape of a node. */
  function fill(group, { width: w, height: h, radius }, key, ...children) {
    const clip = `clip-${view.layerIndex}-${key}`.replace(/[^\w-]/g, "_");
    group.append(createSvg("clipPath", { id: clip }, createSvg("rect", { x: -w / 2, y: -h / 2, width: w, height: h, rx: radius })),
      createSvg("g", { "clip-path": `url(#${clip})` }, children));
  }

  /** The values of a softmax as shares of the whole. */
  function shares(group, place, key, size) {
    const { width: w, height: h } = place;
    const units = Array.from({ length: size }, () => createSvg("rect", { class: "level share", "data-tone": "gate", y: -h / 2, height: h }));
    fill(group, place, key, units);
    painters.push(() => {
      const values = units.map((_, u) => Math.max(0, view.value({ q: key, t: view.step, u })) || 0);
      const scale = w / (values.reduce((sum, value) => sum + value, 0) || 1);
      let left = -w / 2;
      units.forEach((unit, u) => {
        unit.setAttribute("x", left);
        unit.setAttribute("width", values[u] * scale);
        unit.classList.toggle("mine", u === Math.min(view.unit, size - 1));
        left += values[u] * scale;
      });
    });
  }

  /** A slider between the two operands of lerp: at the left end the first one, at the right end the second one. */
  function fader(group, node, width) {
    const { model } = view;
    const weight = model.nodesById.get(node.id).terms.at(-1);
    const half = width / 2 - 9;
    const knob = createSvg("circle", { class: "knob", cy: 8, r: 3.2 });
    group.append(createSvg("path", { class: "fader", d: `M${-half} 8h${2 * half}` }), knob);
    painters.push(() => {
      const factor = factorOf(model, weight, view.step, view.unit);
      const value = factor.constant ?? view.value(factor);
      knob.setAttribute("cx", half * (2 * Math.max(0, Math.min(1, value)) - 1) || 0);
    });
  }

  function label(group, node, place, refer) {
    const x = place.label.text_x - place.x;
    if (place.label.name_y !== null) {
      group.append(createSvg("text", { "aria-hidden": "true", class: "tag", x, y: place.label.name_y - place.y, "text-anchor": place.label.anchor }, symbolSpans(node.name, 14)));
    }
    const value = createSvg("text", { "aria-hidden": "true", class: "digits", x, y: place.label.value_y - place.y, "text-anchor": place.label.anchor });
    group.append(value);
    painters.push(() => { value.textContent = fixed(view.value(refer()), 2); });
  }

  return { element, update, narrow };
}

/** The spans of a symbol in SVG. */
function symbolSpans(name, size, time = "") {
  const [base, index] = splitName(name);
  const isWord = base.length > 2;
  const below = [index, time].filter((one) => one !== "").join(",");
  return [createSvg("tspan", { class: isWord ? "word" : "symbol", "font-size": isWord ? size * 0.82 : size }, base),
    below ? createSvg("tspan", { class: "index", "font-size": size * 0.66, dy: size * 0.24 }, below) : null].filter(Boolean);
}
