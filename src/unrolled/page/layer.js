// The numbers of one layer in one direction, by key: "input", "quantity i", "before h", "parameter weight_ih".

import { decode, largest } from "./numbers.js";

/** One layer in one direction; k counts the steps that are kept, and steps[k] is the time step. */
export class Layer {
  constructor(data) {
    Object.assign(this, data);
    this.backward = data.direction === "backward";
    this.rows = new Map();
    for (const one of data.quantities) {
      this.rows.set(one.key, { ...one, values: decode(one.values), heat: one.heat && opened(one.heat) });
    }
    for (const [name, values] of Object.entries(data.before)) {
      const { size, own, words } = this.rows.get(`quantity ${name}`);
      this.rows.set(`before ${name}`, { key: `before ${name}`, size, own, words, values: decode(values), lines: [] });
    }
    this.weights = new Map();
    for (const one of data.parameters) {
      const values = one.values && decode(one.values);
      this.weights.set(`parameter ${one.name}`, { ...one, key: `parameter ${one.name}`, values });
    }
    this.unnamed = data.unnamed.map(decode);
    this.place = new Map(data.steps.map((step, k) => [step, k]));
    this.mostWeight = largest([...this.weights.values()].map((one) => one.values || [])) || 1;
  }

  /** One number of a kept step, or of a parameter; undefined where it isn't on the page. */
  value(key, k, place) {
    const row = this.rows.get(key);
    if (row) return row.values[k * row.size + place];
    const weight = this.weights.get(key);
    return weight?.values?.[place];
  }

  /** The number that has the strongest colour: one for all quantities but those with a scale of their own. */
  scale(key) {
    return (this.rows.get(key).own ?? this.most) || 1;
  }

  /** The kept step nearest to a time step. */
  nearest(step) {
    let best = 0;
    this.steps.forEach((kept, k) => {
      if (Math.abs(kept - step) < Math.abs(this.steps[best] - step)) best = k;
    });
    return best;
  }

  /** The time step that was computed before this one, whether or not it is kept. */
  previous(step) {
    return this.backward ? step + 1 : step - 1;
  }
}

function opened(heat) {
  return { ...heat, values: decode(heat.values) };
}

/** What a key is called: the name in the code, with the time step where it has one. */
export function called(key) {
  return key === "input" ? "x" : key.slice(key.indexOf(" ") + 1);
}
