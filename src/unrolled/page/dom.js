// Elements of the page. Texts are set as text, never read as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (on…: a listener) and children: elements, texts, or lists of them. */
export function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same in a drawing. */
export function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** A formula, which the library made of the cell's code. */
export function formula(markup) {
  const holder = document.createElement("template");
  holder.innerHTML = markup;
  return holder.content;
}

const INDICES = { "-": "₋" };
for (let digit = 0; digit < 10; digit += 1) INDICES[digit] = String.fromCharCode(0x2080 + digit);

/** A whole number as an index below the line. */
export function index(whole) {
  return [...String(whole)].map((letter) => INDICES[letter]).join("");
}

/** A label with signs for what would be a gap: line ends, and spaces where there is nothing else. */
export function visible(label) {
  const text = label.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  return text.trim() ? text : text.replaceAll(" ", "␣");
}

/** A section of the page under a heading. */
export function section(kind, heading, ...children) {
  return make("section", { "aria-label": heading, class: kind }, make("h2", {}, heading), ...children);
}
