// Run the layer's WebAssembly module on new input: typed, drawn, from a file or from the microphone.

import { createElement } from "./dom.js";
import { count, LiveModel, parseRows } from "./live_model.js";
import { decodeBytes, formatNumber, largestMagnitude, valueColor } from "./numbers.js";

const DRAWN_STEPS = 240;
const MAX_LIVE_COLUMNS = 2000; // columns of the picture; for longer sequences, it skips steps
const TYPED_STEPS = 40; // steps of the recorded input that the text field contains at first
const MICROPHONE_BLOCK = 1024;
const MICROPHONE_EVERY = 64; // steps of the microphone for one column
const MICROPHONE_COLUMNS = 600;

/** Create the section, or null if the page has no WebAssembly. */
export function createLive(view) {
  const { live } = view.data;
  if (!live) return null;
  const status = createElement("p", { role: "status", class: "live-status" }, "Loading the layer.");
  const picture = createPicture(view);
  const panel = createElement("div", { class: "live-input" });
  const element = createElement("div", { class: "live" }, panel, status, picture.element);
  LiveModel.load(decodeBytes(live.module)).then(
    (model) => {
      if (!model.isRight) say("The self-test failed: in this browser, the WebAssembly module computes other values than the layer in Python.");
      else panel.append(...createSources(view, model, { show, say, start }));
      if (model.isRight) say(`${count(model.inputSize, "input")} and ${count(model.outputSize, "output")} per time step. Each run starts from the layer's initial state.`);
    },
    (error) => say(`This browser can't load the WebAssembly module: ${error.message}`),
  );

  function say(text) {
    status.textContent = text;
  }

  /** Run the layer on a new sequence, and show it. The input may have its own duration, in seconds. */
  function show(model, inputs, seconds = null) {
    start(model);
    const steps = inputs.length / model.inputSize;
    if (!model.functions.causal() && steps > model.mostSteps) {
      say(`A sequence for this bidirectional layer can have at most ${model.mostSteps} steps, but this one has ${steps}. Use a shorter one.`);
      return;
    }
    picture.show(model.run(inputs), model.outputSize);
    say(describeTiming(model, seconds));
  }

  function start(model) {
    model.reset();
    picture.clear();
  }

  return { element, picture };
}

/** How long the layer took, and its share of real time. */
export function describeTiming({ steps, milliseconds }, seconds = null) {
  const each = ((milliseconds * 1000) / steps).toPrecision(2);
  const load = seconds === null ? "" : `, ${((milliseconds / 10) / seconds).toPrecision(2)} % of real time`;
  return `${count(steps, "step")} in ${milliseconds.toPrecision(3)} ms: ${each} µs per step${load}.`;
}

/** The ways to enter an input, each with a button that opens it. */
function createSources(view, model, actions) {
  const sources = { Type: createTyped(view, model, actions), Draw: createDrawn(view, model, actions), File: createFile(model, actions) };
  if (model.inputSize === 1 && model.functions.causal()) sources.Microphone = createMicrophone(view, model, actions);
  const tabs = Object.keys(sources).map((name) => createElement("button", { type: "button", role: "tab", "aria-selected": name === "Type", onclick: () => open(name) }, name));
  function open(name) {
    sources.Microphone?.stop?.();
    Object.values(sources).forEach((source, k) => {
      const isOpen = sources[name] === source;
      source.element.hidden = !isOpen;
      tabs[k].setAttribute("aria-selected", isOpen);
    });
  }
  open("Type");
  return [createElement("span", { class: "seg", role: "tablist", "aria-label": "input source" }, tabs), ...Object.values(sources).map((source) => source.element)];
}

function createTyped(view, model, { show, say }) {
  const { model: recorded } = view;
  const steps = Math.min(TYPED_STEPS, recorded.length);
  const rows = Array.from({ length: steps }, (_, t) => Array.from({ length: model.inputSize }, (__, u) => Number(recorded.value({ q: "x", t, u }).toPrecision(6))).join(" "));
  const field = createElement("textarea", { rows: 6, spellcheck: "false", "aria-label": "input, one line per time step" });
  field.value = rows.join("\n");
  const run = () => {
    try {
      show(model, parseRows(field.value, model.inputSize));
    } catch (error) {
      say(error.message);
    }
  };
  return { element: createElement("div", {}, field, createElement("button", { type: "button", class: "btn", onclick: run }, "Run")) };
}

function createDrawn(view, model, { show }) {
  const values = new Float32Array(DRAWN_STEPS * model.inputSize);
  const height = 120;
  const canvas = createElement("canvas", { width: DRAWN_STEPS, height, role: "img", "aria-label": "draw the input over time with the pointer, from -1 to 1" });
  const feature = createElement("input", { type: "number", min: 0, max: model.inputSize - 1, value: 0, "aria-label": "input feature to draw", onchange: paint });
  const chosen = () => Math.min(model.inputSize - 1, Math.max(0, Math.trunc(Number(feature.value)) || 0));
  let last = null;
  function move(event) {
    if (!event.buttons) return;
    const box = canvas.getBoundingClientRect();
    const t = Math.min(DRAWN_STEPS - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * DRAWN_STEPS)));
    const value = Math.min(1, Math.max(-1, 1 - (2 * (event.clientY - box.top)) / box.height));
    const from = last ?? { t, value };
    for (let k = Math.min(from.t, t); k <= Math.max(from.t, t); k += 1) {
      const share = t === from.t ? 1 : (k - from.t) / (t - from.t);
      values[k * model.inputSize + chosen()] = from.value + share * (value - from.value);
    }
    last = { t, value };
    paint();
    show(model, values);
  }
  function paint() {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, DRAWN_STEPS, height);
    context.strokeStyle = getComputedStyle(canvas).color;
    context.beginPath();
    for (let t = 0; t < DRAWN_STEPS; t += 1) context.lineTo(t + 0.5, ((1 - values[t * model.inputSize + chosen()]) * height) / 2);
    context.stroke();
  }
  canvas.addEventListener("pointerdown", (event) => { last = null; canvas.setPointerCapture(event.pointerId); move(event); });
  canvas.addEventListener("pointermove", move);
  requestAnimationFrame(paint);
  const clear = () => { values.fill(0); paint(); show(model, values); };
  return { element: createElement("div", {}, canvas, model.inputSize > 1 ? createElement("label", {}, "feature ", feature) : null, createElement("button", { type: "button", class: "btn", onclick: clear }, "Clear")) };
}

function createFile(model, { show, say }) {
  const isAudio = model.inputSize === 1;
  const choose = async () => {
    const [file] = input.files;
    if (!file) return;
    try {
      if (isAudio && !/^(text\/|$)/.test(file.type)) {
        const audio = await new OfflineAudioContext(1, 1, 44100).decodeAudioData(await file.arrayBuffer());
        show(model, audio.getChannelData(0), audio.duration);
      } else {
        show(model, parseRows(await file.text(), model.inputSize));
      }
    } catch (error) {
      say(`${file.name}: ${error.message}`);
    }
  };
  const input = createElement("input", { type: "file", onchange: choose, "aria-label": "file with the input" });
  const what = isAudio ? "An audio file, or a text file with one number per line." : `A text file with ${model.inputSize} numbers per line.`;
  return { element: createElement("div", {}, input, createElement("p", {}, what)) };
}

function createMicrophone(view, model, { say, start }) {
  let current = null; // what listens now, or waits for the permission
  const columns = [];
  const listen = async () => {
    const own = (current = { stream: null, audio: null });
    button.textContent = "Stop";
    try {
      if (!navigator.mediaDevices) throw new Error("open the page from a file or over https");
      own.stream = await navigator.mediaDevices.getUserMedia({ audio: true });
      if (current !== own) return release(own); // stopped meanwhile
      own.audio = new AudioContext();
      const processor = own.audio.createScriptProcessor(MICROPHONE_BLOCK, 1, 1);
      start(model);
      columns.length = 0;
      processor.onaudioprocess = ({ inputBuffer }) => {
        if (current === own) hear(inputBuffer.getChannelData(0), inputBuffer.sampleRate);
      };
      own.audio.createMediaStreamSource(own.stream).connect(processor);
      processor.connect(own.audio.destination);
    } catch (error) {
      if (current !== own) return;
      stop();
      say(`Can't use the microphone: ${error.message}`);
    }
  };
  function hear(samples, rate) {
    const outputs = model.run(samples);
    for (let t = MICROPHONE_EVERY - 1; t < samples.length; t += MICROPHONE_EVERY) columns.push(outputs.slice(t * model.outputSize, (t + 1) * model.outputSize));
    columns.splice(0, columns.length - MICROPHONE_COLUMNS);
    const shown = new Float32Array(columns.length * model.outputSize);
    columns.forEach((column, k) => shown.set(column, k * model.outputSize));
    view.live.picture.show(shown, model.outputSize);
    say(describeTiming(model, model.steps / rate));
  }
  function stop() {
    if (current) release(current);
    current = null;
    button.textContent = "Listen";
  }
  function release({ stream, audio }) {
    stream?.getTracks().forEach((track) => track.stop());
    audio?.close();
  }
  const button = createElement("button", { type: "button", class: "btn", onclick: () => (current ? stop() : listen()) }, "Listen");
  return { element: createElement("div", {}, button), stop };
}

/** The outputs as a picture: a column for each time step, a row for each unit. */
function createPicture(view) {
  const canvas = createElement("canvas", { role: "img", hidden: true, onpointermove: point });
  const readout = createElement("output", {});
  let shown = null;
  function show(values, units) {
    const steps = values.length / units;
    const every = Math.ceil(steps / MAX_LIVE_COLUMNS);
    shown = { values, units, steps, every, columns: Math.ceil(steps / every) };
    paint();
  }
  function paint() {
    if (shown === null) return;
    const { values, units, columns, every } = shown;
    [canvas.width, canvas.height, canvas.hidden] = [columns, units, false];
    const limit = largestMagnitude([values]);
    const image = new ImageData(columns, units);
    for (let k = 0; k < columns; k += 1) {
      for (let u = 0; u < units; u += 1) image.data.set([...valueColor(values[k * every * units + u], limit, view.theme), 255], 4 * (u * columns + k));
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", `the outputs of ${count(units, "unit")} over ${count(shown.steps, "step")}`);
    readout.textContent = describeNumber(shown.steps - 1, 0);
  }
  function describeNumber(t, u) {
    return `step ${t}, unit ${u}: ${formatNumber(shown.values[t * shown.units + u])}`;
  }
  function point(event) {
    const box = canvas.getBoundingClientRect();
    const k = Math.min(shown.columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * shown.columns)));
    const u = Math.min(shown.units - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * shown.units)));
    readout.textContent = describeNumber(k * shown.every, u);
  }
  const clear = () => { shown = null; canvas.hidden = true; readout.textContent = ""; };
  return { element: createElement("div", {}, canvas, readout), show, clear, update: paint };
}
