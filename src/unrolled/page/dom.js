// Elements of the page. Text is always set as text and never parsed as markup.

const SVG = "http://www.w3.org/2000/svg";

/** Create an HTML element with attributes (on…: a listener) and children: elements, texts, or lists of them. */
export function createElement(tag, attributes = {}, ...children) {
  return initialize(document.createElement(tag), attributes, children);
}

/** Create an SVG element in the same way. */
export function createSvg(tag, attributes = {}, ...children) {
  return initialize(document.createElementNS(SVG, tag), attributes, children);
}

function initialize(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Parse a formula, which the library generated from the cell's code. */
export function parseMath(markup) {
  const template = document.createElement("template");
  template.innerHTML = markup;
  return template.content;
}

const SUBSCRIPTS = { "-": "₋" };
for (let digit = 0; digit < 10; digit += 1) SUBSCRIPTS[digit] = String.fromCharCode(0x2080 + digit);

/** Return an integer as a subscript. */
export function subscript(integer) {
  return [...String(integer)].map((letter) => SUBSCRIPTS[letter]).join("");
}

/** Return a label with visible signs for line breaks, tabs, and spaces if there is nothing else. */
export function visibleLabel(label) {
  const text = label.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  return text.trim() ? text : text.replaceAll(" ", "␣");
}

/** Create a section of the page with a heading. */
export function createSection(className, heading, ...children) {
  return createElement("section", { "aria-label": heading, class: className }, createElement("h2", {}, heading), ...children);
}
