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

/** Replace the children of an element. If one of them had the focus, the one in its place gets it. */
export function replaceChildren(element, ...children) {
  const controls = () => [...element.querySelectorAll("button, input, select, [tabindex]")];
  const focused = controls().indexOf(element.getRootNode().activeElement);
  element.replaceChildren(...children);
  if (focused >= 0) controls()[Math.min(focused, controls().length - 1)]?.focus({ preventScroll: true });
}

/** Create an element whose content is markup that the page generated. */
export function createMarkup(tag, markup, className = null) {
  const element = createElement(tag, { class: className });
  element.innerHTML = markup;
  return element;
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
