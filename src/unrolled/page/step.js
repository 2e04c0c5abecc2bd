// The numbers of the current step as rows of coloured cells, and where the one pointed at comes from.

import { explain, given, places } from "./explain.js";
import { called } from "./layer.js";
import { index, make } from "./dom.js";
import { colour, ink, number } from "./numbers.js";

const WIDE = 32; // cells of a quantity side by side; the others are a page further

/** {element, update}: a grid with a row for every quantity. */
export function numbers(view) {
  const body = make("tbody");
  const table = make("table", { role: "grid", class: "numbers", "aria-label": "numbers of the step" }, body);
  const cells = new Map(); // by key and place
  let windows = new Map(); // by key, the first place that is shown
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

  function keys() {
    const { layer } = view;
    return [...layer.states.map((name) => `before ${name}`), ...layer.quantities.map((one) => one.key)];
  }

  function build() {
    cells.clear();
    body.replaceChildren(...keys().map(line));
  }

  /** Show the numbers of a quantity from this place on. */
  function turn(key, first) {
    windows.set(key, first);
    const old = [...body.rows].find((row) => row.dataset.key === key);
    for (const cell of old.cells) cells.delete(`${key} ${cell.dataset.place}`);
    old.replaceWith(line(key));
  }

  function line(key) {
    const row = view.layer.rows.get(key);
    const first = windows.get(key) ?? 0;
    const shown = Math.min(WIDE, row.size - first);
    const across = Array.from({ length: shown }, (_, at) => {
      const cell = make("td", { role: "gridcell", tabindex: -1, "data-key": key, "data-place": first + at });
      cells.set(`${key} ${first + at}`, cell);
      return cell;
    });
    const words = key.startsWith("before") ? `${called(key)} before the step` : row.words;
    const heading = make("th", { scope: "row" }, make("span", { class: "name" }), make("small", {}, words));
    if (row.size > WIDE) heading.append(pager(key, words, row.size, first, shown));
    return make("tr", { "data-key": key, class: key.startsWith("before") ? "before" : key === "input" ? "given" : "" },
      heading, across);
  }

  function pager(key, words, size, first, shown) {
    const whose = key.startsWith("before") ? words : called(key);
    const page = (to, label) => {
      turn(key, to);
      view.changed();
      const buttons = [...body.querySelectorAll(`tr[data-key="${CSS.escape(key)}"] button`)];
      (buttons.find((one) => one.ariaLabel === label && !one.disabled) ?? buttons.find((one) => !one.disabled))?.focus();
    };
    return make("span", { class: "pager" },
      make("button", { type: "button", "aria-label": `earlier numbers of ${whose}`, disabled: first === 0,
        onclick: (event) => page(Math.max(0, first - WIDE), event.currentTarget.ariaLabel) }, "‹"),
      `${first}–${first + shown - 1} of ${size}`,
      make("button", { type: "button", "aria-label": `later numbers of ${whose}`,
        disabled: first + shown >= size,
        onclick: (event) => page(first + WIDE, event.currentTarget.ariaLabel) }, "›"));
  }

  /** The arrow keys go from number to number. */
  function moved(event) {
    const at = of(event.target);
    if (!at) return;
    const order = keys();
    const line = order.indexOf(at.key);
    const size = (key) => view.layer.rows.get(key).size;
    const to = {
      ArrowLeft: () => [at.key, at.place - 1], ArrowRight: () => [at.key, at.place + 1],
      ArrowUp: () => [order[line - 1], at.place], ArrowDown: () => [order[line + 1], at.place],
      Home: () => [at.key, 0], End: () => [at.key, size(at.key) - 1],
    }[event.key];
    if (!to || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    const [key, place] = to();
    if (!key || place < 0) return;
    view.select({ key, place: Math.min(place, size(key) - 1) });
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
      const first = Math.floor(chosen.place / WIDE) * WIDE;
      if (!cells.has(`${chosen.key} ${chosen.place}`)) turn(chosen.key, first);
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

  return { element: make("div", { class: "scroll" }, table), update, focus };
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
  const text = make("p", { class: "arithmetic" });
  const made = make("ul", { class: "made" });
  const element = make("div", { class: "explanation", tabindex: -1, role: "region", "aria-label": "where a number comes from" },
    heading, text, made);
  const spoken = make("p", { class: "spoken", "aria-live": "polite" });
  element.append(spoken);

  function update() {
    const reached = made.matches(":focus-within"); // by the keyboard, which is to stay here
    write();
    if (reached) element.focus({ preventScroll: true });
  }

  function write() {
    const { shown, layer, k } = view;
    if (!shown) {
      heading.textContent = "Where does a number come from?";
      text.textContent = "Point at a number, or go to it with the keys: what it is made of lights up.";
      made.replaceChildren();
      return;
    }
    const step = layer.steps[k];
    heading.textContent = `${title(view, shown, step)} = ${number(layer.value(shown.key, k, shown.place))}`;
    const found = view.explained;
    text.textContent = found.text;
    made.replaceChildren(...found.made.slice(0, 24).map((one) => chip(one, step)));
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

  return { element, update };
}

function title(view, { key, place }, step) {
  const weight = view.layer.weights.get(key);
  const { shape } = weight ?? view.layer.rows.get(key);
  return `${weight ? called(key) : named(view, key, step)}[${shape?.length > 1 ? places(shape, place) : place}]`;
}

/** What stands behind a number: {text, made}. */
export function behind(view, { key, place }) {
  const { layer, k, data } = view;
  if (key.startsWith("quantity")) {
    const found = explain(layer, k, called(key), place);
    if (!found.missing) return found;
    const text = "Not all that this number is made of is on this page; in Python: "
      + `trace.layers[${data.parts.indexOf(layer.data)}].explain("${called(key)}", ${layer.steps[k]}, ${place}`
      + `${data.row ? `, ${data.row}` : ""})`;
    return { text, made: found.made.filter((one) => layer.value(one.key, k, one.place) !== undefined) };
  }
  if (key.startsWith("before")) {
    const source = layer.previous(layer.steps[k]);
    const name = called(key);
    if (source >= 0 && source < data.length) {
      const known = layer.place.has(source);
      const text = `${name} as step ${source} left it.${known ? "" : " That step is not on this page."}`;
      return { text, made: known ? [{ key, place }] : [] };
    }
  }
  return { text: given(layer, k, key, data), made: [] };
}
