// The numbers of the current step as rows of coloured cells, and where the one pointed at comes from.

import { explain, given, places } from "./explain.js";
import { called } from "./layer.js";
import { index, make } from "./dom.js";
import { colour, ink, number } from "./numbers.js";

const WIDE = 32; // cells side by side at most; no more than there is room for, the others are a page further
const ASIDE = 3; // columns that stay free beside words that need not be broken into lines

/** {element, update}: a grid with a line for every quantity, or for each block of one that has several. */
export function numbers(view) {
  const body = make("tbody");
  const head = make("thead");
  const table = make("table", { role: "grid", class: "numbers", "aria-label": "numbers of the step" }, head, body);
  const element = make("div", { class: "scroll" }, table);
  const cells = new Map(); // by key and place
  let windows = new Map(); // by how many numbers lines have, the first column that is shown
  let room = WIDE; // columns
  let filled = 0; // the width that they fill
  let built = null;
  let reached = null; // the chosen number when it was last brought into sight

  table.addEventListener("keydown", (event) => moved(event));
  let pointer = ""; // where it was: what moves below a pointer at rest isn't pointed at
  table.addEventListener("pointerover", (event) => {
    const place = `${event.screenX} ${event.screenY}`;
    if (place !== pointer) view.point(of(event.target));
    pointer = place;
  });
  table.addEventListener("pointerleave", () => view.point(null));
  table.addEventListener("focusin", (event) => of(event.target) && view.select(of(event.target)));

  function of(target) {
    const cell = target.closest("td[data-key]");
    return cell ? { key: cell.dataset.key, place: Number(cell.dataset.place) } : null;
  }

  /** The lines as {key, start, count}. */
  function lines() {
    const { layer } = view;
    const keys = [...layer.states.map((name) => `before ${name}`), ...layer.quantities.map((one) => one.key)];
    return keys.flatMap((key) => {
      const { size } = layer.rows.get(key);
      const { wide, block: count } = layer.rows.get(key.replace("before", "quantity"));
      if (!wide || key.startsWith("before")) return [{ key, start: 0, count: size }];
      return Array.from({ length: size / count }, (_, part) => ({ key, start: part * count, count }));
    });
  }

  const lineOf = ({ key, place }) => lines().find((one) => one.key === key && one.start <= place && place < one.start + one.count);
  const firstOf = (count) => Math.min(windows.get(count) ?? 0, Math.floor((count - 1) / room) * room);

  function build() {
    cells.clear();
    const { units } = view.layer;
    const first = firstOf(units);
    const shown = Math.min(room, units - first);
    const corner = make("th", { scope: "col" }, make("small", {}, "unit"), units > room ? pager(units, "units", first, shown) : null);
    head.replaceChildren(make("tr", {}, corner,
      Array.from({ length: shown }, (_, at) => make("th", { scope: "col" }, first + at))));
    body.replaceChildren(...lines().map(line));
  }

  /** Fill the width that there is. */
  function fit() {
    const [cell, heading] = [body.querySelector("td"), body.querySelector("th")];
    if (!cell || element.clientWidth === filled) return;
    filled = element.clientWidth;
    table.classList.remove("roomy");
    const widest = Math.max(...[...cells.values()].map((one) => one.offsetWidth));
    const wanted = Math.max(2, Math.min(WIDE, Math.floor((element.clientWidth - heading.offsetWidth - 10) / (widest + 2))));
    table.classList.toggle("roomy", Math.max(...lines().map((one) => one.count)) + ASIDE <= wanted);
    if (wanted === room) return;
    room = wanted;
    reached = null;
    built = null;
    const held = body.contains(document.activeElement);
    update();
    if (held) focus();
  }

  function line({ key, start, count }) {
    const row = view.layer.rows.get(key);
    const first = start + firstOf(count);
    const shown = Math.min(room, start + count - first);
    const across = Array.from({ length: shown }, (_, at) => {
      const cell = make("td", { role: "gridcell", tabindex: -1, "data-key": key, "data-place": first + at });
      cells.set(`${key} ${first + at}`, cell);
      return cell;
    });
    const words = key.startsWith("before") ? `${called(key)} before the step` : row.words;
    const name = make("span", { class: "name" });
    const heading = make("th", { scope: "row" }, name, start ? null : make("small", { class: "words" }, words));
    if (count < row.size) heading.append(make("small", { class: "range" }, `${start}–${start + count - 1}`));
    if (count > room && count !== view.layer.units) {
      heading.append(pager(count, key.startsWith("before") ? words : `numbers of ${called(key)}`, first - start, shown));
    }
    const kind = key.startsWith("before") ? "before" : key === "input" ? "given" : "";
    return make("tr", { "data-key": key, class: `${kind} ${start ? "more" : ""}` }, heading, across);
  }

  /** Goes on to other columns of all lines that have so many numbers. */
  function pager(count, whose, first, shown) {
    const page = (to, label) => {
      windows.set(count, to);
      build();
      view.changed();
      const buttons = [...table.querySelectorAll(".pager button")].filter((one) => !one.disabled);
      (buttons.find((one) => one.ariaLabel === label) ?? buttons.find((one) => one.ariaLabel.endsWith(whose)))?.focus();
    };
    const turn = (name, to, disabled, sign) => make("button", { type: "button", "aria-label": `${name} ${whose}`, disabled,
      onclick: () => page(to, `${name} ${whose}`) }, sign);
    return make("span", { class: "pager" },
      turn("earlier", Math.max(0, first - room), first === 0, "‹"),
      `${first}–${first + shown - 1} of ${count}`,
      turn("later", first + room, first + shown >= count, "›"));
  }

  /** The arrow keys go from number to number. */
  function moved(event) {
    const at = of(event.target);
    if (!at) return;
    const order = lines();
    const own = lineOf(at);
    const { size } = view.layer.rows.get(at.key);
    const to = {
      ArrowLeft: () => [at.key, at.place - 1], ArrowRight: () => [at.key, at.place + 1],
      ArrowUp: () => beside(-1), ArrowDown: () => beside(1),
      Home: () => [at.key, 0], End: () => [at.key, size - 1],
    }[event.key];
    function beside(way) {
      const next = order[order.findIndex((one) => one.key === own.key && one.start === own.start) + way];
      return next ? [next.key, next.start + Math.min(at.place - own.start, next.count - 1)] : [at.key, at.place];
    }
    if (!to || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    const [key, place] = to();
    if (place < 0) return;
    view.select({ key, place: Math.min(place, view.layer.rows.get(key).size - 1) });
    focus();
  }

  /** Have the keyboard on the chosen number. */
  function focus() {
    const { key, place } = view.chosen;
    cells.get(`${key} ${place}`)?.focus({ preventScroll: false });
  }

  function update() {
    const { layer, k, chosen } = view;
    if (built !== layer) {
      windows = new Map();
      build();
      built = layer;
    }
    if (chosen && chosen !== reached && layer.rows.has(chosen.key)) {
      if (!cells.has(`${chosen.key} ${chosen.place}`)) {
        const { start, count } = lineOf(chosen);
        windows.set(count, Math.floor((chosen.place - start) / room) * room);
        build();
      }
      reached = chosen;
    }
    const step = layer.steps[k];
    for (const line of body.rows) {
      const { key } = line.dataset;
      line.querySelector(".name").textContent = named(view, key, step);
    }
    const lit = new Map(view.reads.map((one) => [`${one.key} ${one.place}`, one]));
    const shown = view.shown;
    for (const [name, cell] of cells) {
      const { key } = cell.dataset;
      const place = Number(cell.dataset.place);
      const value = layer.value(key, k, place);
      paint(cell, value, layer.scale(key), view.theme);
      cell.setAttribute("aria-label", `${cell.parentElement.querySelector(".name").textContent}, unit ${place}: ${number(value)}`);
      cell.classList.toggle("lit", lit.has(name));
      const is = shown && shown.key === key && shown.place === place;
      cell.classList.toggle("shown", Boolean(is));
      const picked = chosen && chosen.key === key && chosen.place === place;
      cell.setAttribute("aria-selected", picked ? "true" : "false");
      cell.tabIndex = picked || (!chosen && name === cells.keys().next().value) ? 0 : -1;
    }
  }

  const watched = new ResizeObserver(fit);
  watched.observe(element);
  return { element, update, focus, close: () => watched.disconnect() };
}

/** A quantity with its time step: a state before the step has the one of the step that it comes from. */
export function named(view, key, step) {
  if (!key.startsWith("before")) {
    const twice = key === "input" && view.layer.rows.has("quantity x"); // where the step gives x another value
    return `${twice ? "given " : ""}${called(key)}${index(step)}`;
  }
  const source = view.layer.previous(step);
  return source < 0 || source >= view.data.length ? `initial ${called(key)}` : `${called(key)}${index(source)}`;
}

/** A number as text on its colour. */
export function paint(cell, value, most, theme) {
  const shade = colour(value, most, theme);
  cell.style.background = `rgb(${shade})`;
  cell.style.color = ink(shade);
  cell.textContent = number(value);
}

/** {element, update}: the arithmetic behind the number that is pointed at or chosen. */
export function explanation(view, focus) {
  const heading = make("h3");
  const words = make("small", { class: "words" });
  const text = make("p", { class: "arithmetic" });
  const made = make("ul", { class: "made" });
  const element = make("div", { class: "explanation", tabindex: -1, role: "region", "aria-label": "where a number comes from" },
    make("div", { class: "head" }, heading, words), text, made);
  const spoken = make("p", { class: "spoken", "aria-live": "polite" });
  element.append(spoken);

  function update() {
    const reached = made.matches(":focus-within"); // by the keyboard, which is to stay here
    write();
    if (reached) element.focus({ preventScroll: true });
  }

  function write() {
    const { shown, layer, k } = view;
    element.classList.toggle("chosen", Boolean(view.chosen));
    if (!shown) {
      heading.textContent = "Where does a number come from?";
      text.textContent = "Point at a number, or go to it with the keys: what it is made of lights up.";
      made.replaceChildren();
      words.textContent = "";
      return;
    }
    const step = layer.steps[k];
    heading.replaceChildren(`${title(view, shown, step)} = ${number(layer.value(shown.key, k, shown.place))}`);
    words.textContent = shown.key.startsWith("before") ? "" : layer.rows.get(shown.key)?.words ?? "";
    const found = view.explained;
    text.textContent = found.text;
    made.replaceChildren(...found.made.slice(0, 24).map((one) => chip(one, step)));
    if (found.from) made.prepend(origin(found.from));
    if (found.made.length > 24) made.append(make("li", {}, `and ${found.made.length - 24} more`));
    if (view.chosen === shown) spoken.textContent = `${heading.textContent}. ${found.text}`;
  }

  function chip(one, step) {
    const value = number(view.layer.value(one.key, view.k, one.place));
    const label = `${title(view, one, step)} = ${value}`;
    const weight = one.key.startsWith("parameter");
    const go = () => {
      view.follow(one);
      if (weight) element.focus();
      else focus();
    };
    return make("li", { class: weight ? "weight" : null }, make("button", { type: "button", onclick: go }, label));
  }

  /** The number of another step or layer that this one is. */
  function origin({ layer, k, key, place }) {
    const step = layer.steps[k];
    const other = layer === view.layer ? `step ${step}` : layerName(view, layer);
    const go = () => {
      view.open(view.layers.indexOf(layer), k, { key, place });
      focus();
    };
    return make("li", {}, make("button", { type: "button", class: "origin", onclick: go },
      `go to ${title(view, { key, place }, step, layer)} = ${number(layer.value(key, k, place))} of ${other}`));
  }

  return { element, update };
}

function title(view, { key, place }, step, layer = view.layer) {
  const weight = layer.weights.get(key);
  const { shape } = weight ?? layer.rows.get(key);
  return `${weight ? called(key) : named(view, key, step)}[${shape?.length > 1 ? places(shape, place) : place}]`;
}

/** What stands behind a number: {text, made}, and {from} where it is a number of another step or layer. */
export function behind(view, { key, place }) {
  const { layer, k, data } = view;
  if (key.startsWith("quantity")) return computed(view, layer, k, called(key), place);
  const step = layer.steps[k];
  if (key.startsWith("before")) {
    const source = layer.previous(step);
    const name = called(key);
    if (source >= 0 && source < data.length) {
      if (!layer.place.has(source)) return { text: `${name} as step ${source} left it. That step is not on this page.`, made: [] };
      return passed(view, { layer, k: layer.place.get(source), key: `quantity ${name}`, place }, `As step ${source} left it`);
    }
  }
  const below = key === "input" && beneath(view, step, place);
  if (below) {
    const where = `The output of ${layerName(view, below.layer)}${data.dropout ? ", after dropout" : ""}`;
    return passed(view, below, where);
  }
  return { text: given(layer, k, key, data), made: [] };
}

/** How a number of any layer and step is made. */
function computed(view, layer, k, name, place) {
  const found = explain(layer, k, name, place);
  if (!found.missing) return found;
  const text = "Not all that this number is made of is on this page; in Python: "
    + `trace.layers[${view.layers.indexOf(layer)}].explain("${name}", ${layer.steps[k]}, ${place}`
    + `${view.data.row ? `, ${view.data.row}` : ""})`;
  return { text, made: found.made.filter((one) => layer.value(one.key, k, one.place) !== undefined) };
}

/** What a number is that comes from elsewhere, with the arithmetic that made it there. */
function passed(view, from, words) {
  return { text: `${words}: ${computed(view, from.layer, from.k, called(from.key), from.place).text}`, made: [], from };
}

/** The number of a layer below that an input of a layer is; outputs of two directions stand one after the other. */
function beneath(view, step, place) {
  let at = place;
  for (const layer of view.layers.filter((one) => one.layer === view.layer.layer - 1)) {
    const key = `quantity ${layer.states[0]}`;
    const { size } = layer.rows.get(key);
    if (at < size) return layer.place.has(step) ? { layer, k: layer.place.get(step), key, place: at } : null;
    at -= size;
  }
  return null;
}

/** A layer in words. */
export function layerName(view, layer) {
  const both = view.layers.some((one) => one.backward);
  return `layer ${layer.layer}${both ? `, ${layer.direction}` : ""}`;
}
