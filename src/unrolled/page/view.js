// The page put together: what is shown, and what the keys do.

import { equations } from "./equations.js";
import { gradient } from "./gradient.js";
import { Layer } from "./layer.js";
import { make, section } from "./dom.js";
import { parameters } from "./parameters.js";
import { behind, explanation, numbers } from "./step.js";
import { timeline } from "./timeline.js";
import { whole } from "./whole.js";

/** What is looked at: the layer, its step k of those kept, the number chosen and the one pointed at. */
class View {
  constructor(data, redraw) {
    this.data = data;
    this.redraw = redraw;
    this.layers = data.parts.map((part) => Object.assign(new Layer(part), { data: part }));
    this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.theme = "light";
    this.open(0);
  }

  open(which, k = null, chosen = null) {
    this.layer = this.layers[which];
    this.k = k ?? (this.layer.backward ? this.layer.steps.length - 1 : 0);
    this.chosen = chosen;
    this.hover = null;
    this.changed();
  }

  /** The number whose arithmetic is shown. */
  get shown() {
    return this.hover ?? this.chosen;
  }

  go(k) {
    this.k = Math.max(0, Math.min(this.layer.steps.length - 1, k));
    this.hover = null;
    this.changed();
  }

  goTo(step) {
    this.go(this.layer.nearest(step));
  }

  select(at) {
    if (this.chosen?.key !== at.key || this.chosen?.place !== at.place || this.hover) {
      this.chosen = at;
      this.hover = null;
      this.changed();
    }
  }

  point(at) {
    if (this.hover?.key !== at?.key || this.hover?.place !== at?.place) {
      this.hover = at;
      this.changed();
    }
  }

  /** Go to where a number was computed: a state before a step is a quantity of the step before. */
  follow({ key, place }) {
    const source = this.layer.previous(this.layer.steps[this.k]);
    if (key.startsWith("before") && this.layer.place.has(source)) {
      this.k = this.layer.place.get(source);
      this.chosen = { key: key.replace("before", "quantity"), place };
    } else {
      this.chosen = { key, place };
    }
    this.hover = null;
    this.changed();
  }

  changed() {
    this.explained = this.shown ? behind(this, this.shown) : { text: "", made: [] };
    this.reads = this.explained.made;
    this.redraw?.();
  }
}

/** Put the view of a trace into an element. */
export function mount(root, data) {
  const view = new View(data, null);
  root.classList.add("unrolled");
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab's own keys are not meant in here
  const time = timeline(view);
  const step = numbers(view);
  const pieces = [time, step, explanation(view, step.focus), equations(view), parameters(view), whole(view), gradient(view)];
  const [, , text, code, weights, maps, slopes] = pieces;
  pieces.push({ update() { picker.value = view.layers.indexOf(view.layer); } });

  const choices = data.parts.map((part, k) => make("option", { value: k }, `layer ${part.layer}, ${part.direction}`));
  const picker = make("select", { "aria-label": "layer", onchange: () => { time.stop(); view.open(Number(picker.value)); } }, choices);
  const shade = make("button", { type: "button", onclick: () => theme(view.theme === "dark" ? "light" : "dark") });
  root.replaceChildren(
    make("header", {}, make("h1", {}, data.title), data.title === data.module ? null : make("p", {}, data.module),
      data.words.map((words) => make("p", { class: "words" }, words)),
      data.row === null ? null : make("p", {}, `Row ${data.row} of a batch of ${data.rows}.`),
      make("div", { class: "bar-of-controls" }, data.parts.length > 1 ? picker : null, shade)),
    ...data.notes.map((note) => make("p", { role: "note", class: "note" }, note)),
    make("main", {},
      section("unrolled-layer", "The layer, unrolled through time", time.element),
      make("div", { class: "opened" }, // within which the explanation stays in sight
        make("div", { class: "halves" },
          section("step", "Every number of the step", step.element), section("equation", "Its equations", code.element)),
        text.element,
        section("weights", "Its parameters", weights.element),
        section("whole", "The whole sequence", maps.element)),
      section("slopes", "The gradient through time", slopes.element),
      section("check", "Beside torch.nn", make("p", { class: data.check.state }, data.check.text))),
    make("footer", {}, make("p", {}, "Keys: ← → or [ ] step, space plays; in the table of numbers the arrows go from number to number.")));

  function theme(name) {
    view.theme = name;
    root.dataset.theme = name;
    shade.textContent = name === "dark" ? "light colours" : "dark colours";
    view.changed();
  }

  view.keys = (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const busy = event.target.closest("input, select, button, summary");
    const by = { "[": -1, "]": 1, ...(busy ? {} : { ArrowLeft: -1, ArrowRight: 1 }) }[event.key];
    if (by) view.go(view.k + by);
    else if (event.key === " " && !busy) time.toggle();
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (event.target.closest("table.numbers")) step.focus();
  };
  root.tabIndex = -1;
  root.addEventListener("keydown", view.keys);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const ended = new AbortController();
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"), { signal: ended.signal });
  still.addEventListener("change", () => { view.still = still.matches; }, { signal: ended.signal });
  // On paper in the colours for white.
  let before = null;
  window.addEventListener("beforeprint", () => { before = view.theme; theme("light"); }, { signal: ended.signal });
  window.addEventListener("afterprint", () => theme(before ?? view.theme), { signal: ended.signal });
  view.close = () => { ended.abort(); time.stop(); step.close(); };
  view.redraw = () => pieces.forEach((piece) => piece.update());
  const { jpThemeLight } = document.body.dataset; // in JupyterLab
  theme((jpThemeLight ? jpThemeLight === "false" : dark.matches) ? "dark" : "light");
  return view;
}

/** Of a page of its own: show what stands in it. */
function start() {
  const view = mount(document.getElementById("page"), JSON.parse(document.getElementById("trace").textContent));
  document.addEventListener("keydown", (event) => { if (event.target === document.body) view.keys(event); });
}
