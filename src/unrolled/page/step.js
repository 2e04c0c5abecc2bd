// The values of the current step as a grid of colored cells, and a panel that explains the active one.

import { describeSource, explain, formatIndex } from "./explain.js";
import { nameOf } from "./layer.js";
import { createElement, subscript } from "./dom.js";
import { formatNumber, textColor, valueColor } from "./numbers.js";

const MAX_COLUMNS = 32; // fewer if the page is narrow; buttons show the other columns
const SPARE_COLUMNS = 3; // if this many columns stay empty, descriptions are not wrapped
const MAX_OPERANDS = 24; // in the explanation

/** Create the grid: a line for each quantity, or for each block of a quantity with several. */
export function createGrid(view) {
  const body = createElement("tbody");
  const head = createElement("thead");
  const table = createElement("table", { role: "grid", class: "numbers", "aria-label": "values of this step" }, head, body);
  const element = createElement("div", { class: "scroll" }, table);
  const cells = new Map(); // by key and index
  let firstColumns = new Map(); // the first column shown, by the number of values in a line
  let columns = MAX_COLUMNS;
  let fittedWidth = 0;
  let renderedLayer = null;
  let revealedSelection = null; // the selection that was scrolled into view last

  table.addEventListener("keydown", onKeyDown);
  table.addEventListener("pointerover", (event) => view.onPointerOver(event, cellOf(event.target)));
  table.addEventListener("pointerleave", () => view.hover(null));
  table.addEventListener("focusin", (event) => cellOf(event.target) && view.select(cellOf(event.target)));

  function cellOf(target) {
    const cell = target.closest("td[data-key]");
    return cell ? { key: cell.dataset.key, index: Number(cell.dataset.index) } : null;
  }

  /** Return the lines of the grid as {key, start, count}. */
  function lines() {
    const { layer } = view;
    const keys = [...layer.states.map((name) => `before ${name}`), ...layer.quantities.map((quantity) => quantity.key)];
    return keys.flatMap((key) => {
      const { size } = layer.rows.get(key);
      const { hasBlocks, blockSize: count } = layer.rows.get(key.replace("before", "quantity"));
      if (!hasBlocks || key.startsWith("before")) return [{ key, start: 0, count: size }];
      return Array.from({ length: size / count }, (_, block) => ({ key, start: block * count, count }));
    });
  }

  const lineOf = ({ key, index }) =>
    lines().find((line) => line.key === key && line.start <= index && index < line.start + line.count);
  const firstColumnOf = (count) => Math.min(firstColumns.get(count) ?? 0, Math.floor((count - 1) / columns) * columns);

  function render() {
    cells.clear();
    const { units } = view.layer;
    const first = firstColumnOf(units);
    const shown = Math.min(columns, units - first);
    const corner = createElement("th", { scope: "col" }, createElement("small", {}, "unit"),
      units > columns ? createPager(units, "units", first, shown) : null);
    head.replaceChildren(createElement("tr", {}, corner,
      Array.from({ length: shown }, (_, column) => createElement("th", { scope: "col" }, first + column))));
    body.replaceChildren(...lines().map(createLine));
  }

  /** Change the number of columns to what fits into the width of the page. */
  function fitColumns() {
    const [cell, heading] = [body.querySelector("td"), body.querySelector("th")];
    if (!cell || element.clientWidth === fittedWidth) return;
    fittedWidth = element.clientWidth;
    table.classList.remove("spacious");
    const widest = Math.max(...[...cells.values()].map((one) => one.offsetWidth));
    const fitting = Math.max(2, Math.min(MAX_COLUMNS, Math.floor((element.clientWidth - heading.offsetWidth - 10) / (widest + 2))));
    table.classList.toggle("spacious", Math.max(...lines().map((line) => line.count)) + SPARE_COLUMNS <= fitting);
    if (fitting === columns) return;
    columns = fitting;
    revealedSelection = null;
    renderedLayer = null;
    const hadFocus = body.contains(document.activeElement);
    update();
    if (hadFocus) focusSelection();
  }

  function createLine({ key, start, count }) {
    const row = view.layer.rows.get(key);
    const first = start + firstColumnOf(count);
    const shown = Math.min(columns, start + count - first);
    const lineCells = Array.from({ length: shown }, (_, column) => {
      const cell = createElement("td", { role: "gridcell", tabindex: -1, "data-key": key, "data-index": first + column });
      cells.set(`${key} ${first + column}`, cell);
      return cell;
    });
    const isBefore = key.startsWith("before");
    const description = isBefore ? `${nameOf(key)} before the step` : row.description;
    const heading = createElement("th", { scope: "row" }, createElement("span", { class: "name" }),
      start ? null : createElement("small", { class: "description" }, description));
    if (count < row.size) heading.append(createElement("small", { class: "range" }, row.blockNames[start / count]));
    if (count > columns && count !== view.layer.units) {
      heading.append(createPager(count, isBefore ? description : `values of ${nameOf(key)}`, first - start, shown));
    }
    const kind = isBefore ? "state-before" : key === "input" ? "input-line" : "";
    return createElement("tr", { "data-key": key, class: `${kind} ${start ? "continued" : ""}` }, heading, lineCells);
  }

  /** Create the buttons that show other columns, in all lines with the same number of values. */
  function createPager(count, subject, first, shown) {
    const showColumns = (newFirst, label) => {
      firstColumns.set(count, newFirst);
      render();
      view.refresh();
      const enabled = [...table.querySelectorAll(".pager button")].filter((button) => !button.disabled);
      (enabled.find((button) => button.ariaLabel === label) ?? enabled.find((button) => button.ariaLabel.endsWith(subject)))?.focus();
    };
    const createPagerButton = (direction, newFirst, disabled, sign) => createElement("button", { type: "button",
      "aria-label": `${direction} ${subject}`, disabled, onclick: () => showColumns(newFirst, `${direction} ${subject}`) }, sign);
    return createElement("span", { class: "pager" },
      createPagerButton("previous", Math.max(0, first - columns), first === 0, "‹"),
      `${first}–${first + shown - 1} of ${count}`,
      createPagerButton("next", first + columns, first + shown >= count, "›"));
  }

  /** Move the selection with the arrow keys. */
  function onKeyDown(event) {
    const current = cellOf(event.target);
    if (!current) return;
    const order = lines();
    const line = lineOf(current);
    const { size } = view.layer.rows.get(current.key);
    const move = {
      ArrowLeft: () => [current.key, current.index - 1], ArrowRight: () => [current.key, current.index + 1],
      ArrowUp: () => inNeighborLine(-1), ArrowDown: () => inNeighborLine(1),
      Home: () => [current.key, 0], End: () => [current.key, size - 1],
    }[event.key];
    function inNeighborLine(direction) {
      const neighbor = order[order.findIndex((one) => one.key === line.key && one.start === line.start) + direction];
      return neighbor
        ? [neighbor.key, neighbor.start + Math.min(current.index - line.start, neighbor.count - 1)]
        : [current.key, current.index];
    }
    if (!move || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    const [key, index] = move();
    if (index < 0) return;
    view.select({ key, index: Math.min(index, view.layer.rows.get(key).size - 1) });
    focusSelection();
  }

  /** Move the keyboard focus to the selected value. */
  function focusSelection() {
    const { key, index } = view.selected;
    cells.get(`${key} ${index}`)?.focus({ preventScroll: false });
  }

  function update() {
    const { layer, stepIndex, selected, active } = view;
    if (renderedLayer !== layer) {
      firstColumns = new Map();
      render();
      renderedLayer = layer;
    }
    if (selected && selected !== revealedSelection && layer.rows.has(selected.key)) {
      if (!cells.has(`${selected.key} ${selected.index}`)) {
        const { start, count } = lineOf(selected);
        firstColumns.set(count, Math.floor((selected.index - start) / columns) * columns);
        render();
      }
      revealedSelection = selected;
    }
    const step = layer.steps[stepIndex];
    for (const line of body.rows) {
      line.querySelector(".name").textContent = nameAtStep(view, line.dataset.key, step);
    }
    const highlighted = new Set(view.operands.map(({ key, index }) => `${key} ${index}`));
    for (const [id, cell] of cells) {
      const { key } = cell.dataset;
      const index = Number(cell.dataset.index);
      const value = layer.value(key, stepIndex, index);
      paintCell(cell, value, layer.colorRange(key), view.theme);
      const name = cell.parentElement.querySelector(".name").textContent;
      cell.setAttribute("aria-label", `${name}, unit ${index}: ${formatNumber(value)}`);
      cell.classList.toggle("highlighted", highlighted.has(id));
      cell.classList.toggle("active", Boolean(active && active.key === key && active.index === index));
      const isSelected = selected && selected.key === key && selected.index === index;
      cell.setAttribute("aria-selected", isSelected ? "true" : "false");
      cell.tabIndex = isSelected || (!selected && id === cells.keys().next().value) ? 0 : -1;
    }
  }

  const resizeObserver = new ResizeObserver(fitColumns);
  resizeObserver.observe(element);
  return { element, update, focusSelection, close: () => resizeObserver.disconnect() };
}

/** Return the name of a quantity with its time step. A state before the step has that of the step it comes from. */
export function nameAtStep(view, key, step) {
  if (!key.startsWith("before")) {
    const isReassigned = key === "input" && view.layer.rows.has("quantity x"); // then there are two quantities x
    return `${isReassigned ? "input " : ""}${nameOf(key)}${subscript(step)}`;
  }
  const source = view.layer.previousStep(step);
  return source < 0 || source >= view.data.length ? `initial ${nameOf(key)}` : `${nameOf(key)}${subscript(source)}`;
}

/** Write a value into a cell with its color as background. */
export function paintCell(cell, value, range, theme) {
  const color = valueColor(value, range, theme);
  cell.style.background = `rgb(${color})`;
  cell.style.color = textColor(color);
  cell.textContent = formatNumber(value);
}

/** Create the panel with the arithmetic behind the active value. Returns {element, update}. */
export function createExplanation(view, focusGrid) {
  const heading = createElement("h3");
  const description = createElement("small", { class: "description" });
  const arithmetic = createElement("p", { class: "arithmetic" });
  const operands = createElement("ul", { class: "operands" });
  const element = createElement("div", { class: "explanation", tabindex: -1, role: "region", "aria-label": "how a value was computed" },
    createElement("div", { class: "head" }, heading, description), arithmetic, operands);
  const liveRegion = createElement("p", { class: "live-region", "aria-live": "polite" });
  element.append(liveRegion);

  function update() {
    const hadFocus = operands.matches(":focus-within"); // its buttons are replaced
    render();
    if (hadFocus) element.focus({ preventScroll: true });
  }

  function render() {
    const { active, layer, stepIndex, explanation } = view;
    element.classList.toggle("pinned", Boolean(view.selected));
    if (!active) {
      heading.textContent = "How was a number computed?";
      arithmetic.textContent = "Hover over a number, or use the arrow keys, to see how it was computed.";
      operands.replaceChildren();
      description.textContent = "";
      return;
    }
    const step = layer.steps[stepIndex];
    heading.replaceChildren(`${elementName(view, active, step)} = ${formatNumber(layer.value(active.key, stepIndex, active.index))}`);
    description.textContent = active.key.startsWith("before") ? "" : layer.rows.get(active.key)?.description ?? "";
    arithmetic.textContent = explanation.text;
    operands.replaceChildren(...explanation.operands.slice(0, MAX_OPERANDS).map((operand) => createOperand(operand, step)));
    if (explanation.origin) operands.prepend(createOriginLink(explanation.origin));
    const hidden = explanation.operands.length - MAX_OPERANDS;
    if (hidden > 0) operands.append(createElement("li", {}, `and ${hidden} more`));
    if (view.selected === active) liveRegion.textContent = `${heading.textContent}. ${explanation.text}`;
  }

  function createOperand(operand, step) {
    const value = formatNumber(view.layer.value(operand.key, view.stepIndex, operand.index));
    const isParameter = operand.key.startsWith("parameter");
    const onclick = () => {
      view.follow(operand);
      if (isParameter) element.focus();
      else focusGrid();
    };
    return createElement("li", { class: isParameter ? "parameter" : null },
      createElement("button", { type: "button", onclick }, `${elementName(view, operand, step)} = ${value}`));
  }

  /** Create the button that goes to the same value in another step or layer. */
  function createOriginLink({ layer, stepIndex, key, index }) {
    const step = layer.steps[stepIndex];
    const place = layer === view.layer ? `step ${step}` : layerName(view, layer);
    const onclick = () => {
      view.openLayer(view.layers.indexOf(layer), stepIndex, { key, index });
      focusGrid();
    };
    const name = elementName(view, { key, index }, step, layer);
    return createElement("li", {}, createElement("button", { type: "button", class: "origin", onclick },
      `go to ${name} = ${formatNumber(layer.value(key, stepIndex, index))} in ${place}`));
  }

  return { element, update };
}

function elementName(view, { key, index }, step, layer = view.layer) {
  const parameter = layer.parametersByKey.get(key);
  const { shape } = parameter ?? layer.rows.get(key);
  const name = parameter ? nameOf(key) : nameAtStep(view, key, step);
  return `${name}[${shape?.length > 1 ? formatIndex(shape, index) : index}]`;
}

/** Explain a value of the current step: {text, operands}, with {origin} if it comes from another step or layer. */
export function explainValue(view, { key, index }) {
  const { layer, stepIndex, data } = view;
  if (key.startsWith("quantity")) return explainQuantity(view, layer, stepIndex, nameOf(key), index);
  const step = layer.steps[stepIndex];
  if (key.startsWith("before")) {
    const source = layer.previousStep(step);
    const name = nameOf(key);
    if (source >= 0 && source < data.length) {
      if (!layer.stepIndices.has(source)) return { text: `${name} from step ${source}, which is not on this page.`, operands: [] };
      const origin = { layer, stepIndex: layer.stepIndices.get(source), key: `quantity ${name}`, index };
      return explainOrigin(view, origin, `From step ${source}`);
    }
  }
  const origin = key === "input" && findInLayerBelow(view, step, index);
  if (origin) return explainOrigin(view, origin, `Output of ${layerName(view, origin.layer)}${data.dropout ? ", after dropout" : ""}`);
  return { text: describeSource(layer, stepIndex, key, data), operands: [] };
}

/** Explain a quantity of any layer and step. If the page lacks values for it, say how to get them in Python. */
function explainQuantity(view, layer, stepIndex, name, index) {
  const explanation = explain(layer, stepIndex, name, index);
  if (!explanation.missing) return explanation;
  const text = "Some values behind this number are not on this page. In Python, use "
    + `trace.layers[${view.layers.indexOf(layer)}].explain("${name}", ${layer.steps[stepIndex]}, ${index}`
    + `${view.data.row ? `, ${view.data.row}` : ""})`;
  return { text, operands: explanation.operands.filter((one) => layer.value(one.key, stepIndex, one.index) !== undefined) };
}

/** Explain a value that comes from another step or layer, with the arithmetic there. */
function explainOrigin(view, origin, prefix) {
  const { text } = explainQuantity(view, origin.layer, origin.stepIndex, nameOf(origin.key), origin.index);
  return { text: `${prefix}: ${text}`, operands: [], origin };
}

/** Find the output of the layer below that is an input of this layer. Its two directions are concatenated. */
function findInLayerBelow(view, step, inputIndex) {
  let index = inputIndex;
  for (const layer of view.layers.filter((one) => one.layer === view.layer.layer - 1)) {
    const key = `quantity ${layer.states[0]}`;
    const { size } = layer.rows.get(key);
    if (index < size) return layer.stepIndices.has(step) ? { layer, stepIndex: layer.stepIndices.get(step), key, index } : null;
    index -= size;
  }
  return null;
}

function layerName(view, layer) {
  const isBidirectional = view.layers.some((one) => one.backward);
  return `layer ${layer.layer}${isBidirectional ? `, ${layer.direction}` : ""}`;
}
