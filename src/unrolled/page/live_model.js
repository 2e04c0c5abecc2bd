// A layer as a WebAssembly module, written by unrolled.export.wasm.

/** Runs the layer over rows of numbers, and keeps its state between calls. */
export class LiveModel {
  /** Load a module from its bytes. */
  static async load(bytes) {
    const { instance } = await WebAssembly.instantiate(bytes, {});
    return new LiveModel(instance.exports);
  }

  constructor(functions) {
    this.functions = functions;
    this.inputSize = functions.input_size();
    this.outputSize = functions.output_size();
    this.mostSteps = functions.most_steps();
    functions.init();
    this.isRight = functions.selftest() === 0;
    this.reset();
  }

  /** Begin a new sequence. */
  reset() {
    this.functions.reset();
    this.steps = 0;
    this.milliseconds = 0;
  }

  /** Run the layer on some time steps: their inputs one after another. Returns the outputs in the same order. */
  run(inputs) {
    const { functions, inputSize, outputSize, mostSteps } = this;
    const count = Math.floor(inputs.length / inputSize);
    const outputs = new Float32Array(count * outputSize);
    const { buffer } = functions.memory;
    const x = new Float32Array(buffer, functions.input(), mostSteps * inputSize);
    const y = new Float32Array(buffer, functions.output(), mostSteps * outputSize);
    const start = performance.now();
    for (let t = 0; t < count; t += mostSteps) {
      const steps = Math.min(mostSteps, count - t);
      x.set(inputs.subarray(t * inputSize, (t + steps) * inputSize));
      functions.run(steps);
      outputs.set(y.subarray(0, steps * outputSize), t * outputSize);
    }
    this.milliseconds += performance.now() - start;
    this.steps += count;
    return outputs;
  }
}

/**
 * Read rows of numbers from a text: a line for each time step, with spaces, commas or semicolons between the numbers.
 * Throws an error that names the line if a line has other content.
 */
export function parseRows(text, size) {
  const rows = [];
  text.split("\n").forEach((line, k) => {
    if (line.trim() === "") return;
    const numbers = line.trim().split(/[\s,;]+/).filter((part) => part !== "").map(Number);
    if (numbers.some(Number.isNaN)) throw new Error(`Line ${k + 1} should contain only numbers, got: ${line.trim().slice(0, 40)}`);
    if (numbers.length !== size) throw new Error(`Line ${k + 1} should have ${count(size, "number")}, one for each input, got ${numbers.length}.`);
    rows.push(...numbers);
  });
  if (rows.length === 0) throw new Error(`The input is empty: enter one line with ${count(size, "number")} per time step.`);
  return Float32Array.from(rows);
}

/** A count with its noun. */
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
