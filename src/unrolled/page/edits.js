// The reader's changes: inputs, initial states and parameters with other values, and quantities that are held.
//
// An edit is {part, kind, value} with the index of its layer: {kind: "input", step, unit}, {kind: "state", name, unit},
// {kind: "parameter", name, index} or {kind: "hold", name, unit, steps}, where steps is null for all steps. Edits of
// parameters are for all rows of the batch. Any other edit belongs to one row, which it has as its row.

import { runModel } from "./evaluator.js";
import { LongRun } from "./long_run.js";
import { StoredSteps } from "./steps.js";

const SLICE = 60; // milliseconds of a long run after which the page can react

const PATTERN = /^(?:row(\d+)\/)?(?:(\d+):)?(\w+)(?:@(\w+))?\[(\d+)(?:,(\d+))?\]=(.+)$/;

/** The changes of a page as one of its rows sees them, and the run with them. */
export class Edits {
  /** The page has the edits of all rows, the number of its first row, and editsOf(number), the Edits of a row. */
  constructor(data, models, page) {
    this.models = models;
    this.page = page;
    this.row = data.row;
    this.edits = page.edits;
    this.lastRun = "";
    this.reasons = data.layers.map((layer) => layer.program.reason);
    this.isLong = models.some((model) => model.isComputed);
    this.layers = this.possible && !this.isLong ? data.layers.map((layer, k) => ({ ...layer, ...this.inputsOf(models[k]) })) : [];
    this.pending = null; // a long run that isn't done
    this.runs = 0; // how many have been shown
  }

  /** The edits that change this row. */
  get own() {
    if (!this.possible) return [];
    return [...this.edits.values()].filter((edit) => edit.kind === "parameter" || edit.row === this.row);
  }

  /** How many edits change this row. */
  get size() {
    return this.own.length;
  }

  /** Whether layers can run again. All layers above a changed one have to. */
  get possible() {
    return this.reasons.every((reason) => !reason);
  }

  inputsOf(model) {
    const input = new model.stored.constructor(model.features * model.length);
    for (let step = 0; step < model.length; step += 1) input.set(model.recordedInput(step), step * model.features);
    return { input, initialState: model.statesBefore(model.recorded.row(model.firstStep)), parameters: model.recordedParameterValues };
  }

  /** The edit that sets a number; null if it can't be set. */
  editOf(part, number, steps = null) {
    const model = this.models[part];
    if (!this.possible) return null;
    if (model.isParameter(number)) {
      const { shape, values } = model.parameters.get(number.q);
      return values && { part, kind: "parameter", name: number.q, index: shape.length > 1 ? number.u * shape[1] + number.j : number.u };
    }
    if (number.q === "x") return model.index === 0 ? { part, kind: "input", step: number.t, unit: number.u } : null;
    if (model.isStart(number)) return { part, kind: "state", name: number.q, unit: number.u };
    const found = model.quantity(number.q);
    const isHeld = found.kind === "node" && found.node.range && model.held.includes(number.q);
    return isHeld ? { part, kind: "hold", name: number.q, unit: number.u, steps } : null;
  }

  key(edit) {
    return [edit.kind === "parameter" ? "" : this.row, edit.part, edit.kind, edit.name, edit.index ?? edit.unit, edit.step ?? (edit.steps ?? ["*"]).join()].join("|");
  }

  /** The edit of exactly this number, or of the quantity in all steps. */
  find(part, number) {
    const edit = this.editOf(part, number);
    if (!edit) return null;
    if (edit.kind !== "hold") return this.edits.get(this.key(edit)) ?? null;
    return this.edits.get(this.key({ ...edit, steps: [number.t] })) ?? this.edits.get(this.key(edit)) ?? null;
  }

  /** Set a value without running the layers. */
  put(edit, value) {
    this.edits.set(this.key(edit), { ...edit, row: this.row, value });
  }

  remove(edit) {
    this.edits.delete(this.key(edit));
    this.rerun();
  }

  /** Remove the edits of all rows. */
  clear() {
    this.edits.clear();
    this.rerun();
  }

  /** The value of a number that the reader has set, until the run with it is done; else null. */
  pendingValue(part, number) {
    return (this.pending && this.find(part, number)?.value) ?? null;
  }

  /** Run the layers if edits were made while another row was shown. */
  catchUp() {
    if (this.lastRun !== this.toText(this.own)) this.rerun();
  }

  /** Run all layers with the changes. A hold of one step goes over that of all steps. */
  rerun() {
    const list = this.own.sort((a, b) => (a.steps ? 1 : 0) - (b.steps ? 1 : 0));
    this.lastRun = this.toText(this.own);
    clearTimeout(this.timer);
    this.pending = null;
    if (!list.length) {
      for (const model of this.models) model.restore();
      this.runs += 1;
    } else if (this.isLong) {
      this.pending = new LongRun(this.models, list);
      this.continue(true);
    } else {
      const results = runModel(this.layers, list);
      results.forEach((result, part) => this.show(this.models[part], result, list.filter((edit) => edit.part === part && edit.kind === "parameter")));
      this.runs += 1;
    }
  }

  /** Run another slice of a long run. */
  continue(isFirst = false) {
    const isDone = this.pending.advance(SLICE);
    if (isDone) {
      this.pending.apply();
      this.pending = null;
      this.runs += 1;
    } else {
      this.timer = setTimeout(() => this.continue());
    }
    if (!isFirst) this.page.onProgress?.(isDone);
  }

  /** Show the result of a run. */
  show(model, result, parameterEdits) {
    const { length, stepSize, steps } = model;
    const values = new Float64Array(length * stepSize);
    const arrays = Object.entries(result.values);
    for (let step = 0; step < length; step += 1) {
      const ofStep = arrays.map(([name, all]) => [name, all.subarray((step * all.length) / length, ((step + 1) * all.length) / length)]);
      values.set(model.numbersOf(Object.fromEntries(ofStep), step), step * stepSize);
    }
    model.replace(new StoredSteps(values, steps, stepSize), model.recordedMaps, parameterEdits);
  }

  // --- the address ---

  toText(edits = [...this.edits.values()]) {
    return edits.map((edit) => {
      const model = this.models[edit.part];
      const row = edit.kind === "parameter" || edit.row === this.page.firstRow ? "" : `row${edit.row}/`;
      const part = `${row}${edit.part ? `${edit.part}:` : ""}`;
      const columns = edit.kind === "parameter" && model.parameters.get(edit.name).shape[1];
      const index = columns ? `${Math.floor(edit.index / columns)},${edit.index % columns}` : edit.index ?? edit.unit;
      const step = edit.kind === "input" ? `@${edit.step}` : edit.kind === "state" ? "@start" : edit.steps ? `@${edit.steps[0]}` : "";
      return `${part}${edit.kind === "input" ? "x" : edit.name}${step}[${index}]=${Number(edit.value.toPrecision(7))}`;
    }).join(";");
  }

  /** Read the changes from text; those that don't exist on this page are ignored. */
  fromText(text) {
    this.edits.clear();
    for (const entry of text.split(";").filter(Boolean)) {
      const [, row, ...parts] = PATTERN.exec(entry) ?? [];
      this.page.editsOf(row === undefined ? this.page.firstRow : Number(row))?.readEntry(...parts);
    }
    this.rerun();
  }

  /** Read one change of this row, or of all rows. */
  readEntry(part = "0", q, step, unit, column, value) {
    const model = this.models[part];
    if (!model || !Number.isFinite(Number(value))) return;
    const isParameter = model.parameters.has(q);
    const number = { q, u: Number(unit), ...(column === undefined ? {} : { j: Number(column) }) };
    if (!isParameter) number.t = step === "start" ? model.start : step === undefined ? model.firstStep : Number(step);
    if (!model.exists(number)) return;
    const edit = this.editOf(Number(part), number, isParameter || step === undefined ? null : [number.t]);
    if (edit) this.put(edit, Number(value));
  }
}
