// The address of the page: the chosen number, what is shown of it, and the reader's changes.

/** Return the address of the chosen number and of what is shown of it: the part after #. */
export function addressText(view) {
  const { number, model, mapView: { order, zoom } } = view;
  const entries = { ...view.inModel?.entries, ...(view.mode === "this" ? {} : { show: view.mode }), ...(view.rowIndex ? { row: view.rowNumbers[view.rowIndex] } : {}), ...(view.layerIndex ? { layer: view.layerIndex } : {}),
    step: number.t === undefined ? view.step : number.t === model.start ? "start" : number.t, unit: number.u, number: number.q, ...(number.j === undefined ? {} : { column: number.j }),
    ...(order ? { order } : {}), ...(zoom ? { zoom: zoom.join("-") } : {}),
    ...(view.range ? { range: view.range.join("-") } : {}), ...(view.allEdits.edits.size ? { edit: view.edits.toText() } : {}) };
  return `#${new URLSearchParams(entries)}`;
}

/** Show what is in the address. Returns whether there is a number in it that the page has. */
export function openAddress(view) {
  const entries = new URLSearchParams(location.hash.slice(1));
  const rowIndex = entries.has("row") ? view.rowNumbers.indexOf(Number(entries.get("row"))) : 0;
  view.rowIndex = Math.max(0, rowIndex);
  view.mode = Object.hasOwn(view.row, "baseline") && ["baseline", "difference"].includes(entries.get("show")) ? entries.get("show") : "this";
  view.row.edits.fromText(entries.get("edit") ?? "");
  view.range = readRange(entries.get("range"), view.model.length);
  view.mapView = { order: ["similar", "weights"].find((one) => one === entries.get("order")) ?? null, zoom: readRange(entries.get("zoom"), view.model.length) };
  if (!entries.has("number")) return false;
  const layerIndex = Number(entries.get("layer") ?? 0);
  const model = view.models[layerIndex];
  if (!model || rowIndex < 0) return false;
  const number = { q: entries.get("number"), u: Number(entries.get("unit")) };
  const step = entries.get("step") === "start" ? model.start : Number(entries.get("step"));
  if (entries.has("column")) number.j = Number(entries.get("column"));
  if (!model.parameters.has(number.q)) number.t = step;
  if (!model.exists(number)) return false;
  view.layerIndex = layerIndex;
  view.step = model.nearest(view.step);
  if (model.stepIndices.has(step)) view.step = step;
  view.choose(number, { push: false });
  return true;
}

/** Return the range of steps in the address, or null if there is no valid one. */
function readRange(text, length) {
  const [first, last] = /^\d+-\d+$/.test(text) ? text.split("-").map(Number) : [];
  return first <= last && last < length ? [first, last] : null;
}
