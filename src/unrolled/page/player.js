// Playing the steps one after another.

import { createElement } from "./dom.js";

const SPEEDS = [["slow", 1600], ["normal", 800], ["fast", 250]]; // milliseconds per step

/** Create the buttons for the previous and next step, playing, and the speed. Returns {element, update, toggle, stop}. */
export function createPlayer(view) {
  let timer = null;
  const button = (name, text, onclick) => createElement("button", { type: "button", class: "btn", "aria-label": name, title: name, onclick }, text);
  const play = button("play", "▶", toggle);
  const speed = createElement("select", { "aria-label": "speed", onchange: () => { if (timer !== null) run(); } },
    SPEEDS.map(([name, milliseconds]) => createElement("option", { value: milliseconds, selected: name === "normal" }, name)));
  const element = createElement("span", { class: "player" }, button("previous step", "‹", () => view.move(-1)), play, button("next step", "›", () => view.move(1)), speed);

  function run() {
    clearInterval(timer);
    view.isPlaying = true; // screen readers aren't told of each step
    timer = setInterval(() => {
      view.move(view.model.backward ? -1 : 1, { push: false });
      if (isLast()) stop();
    }, Number(speed.value));
    play.textContent = "❚❚";
    play.setAttribute("aria-label", "pause");
  }

  const isLast = () => view.step === (view.model.backward ? view.model.steps[0] : view.model.steps.at(-1));

  function toggle() {
    if (timer !== null) return stop();
    if (isLast()) view.goTo(view.model.firstStep, { push: false });
    return run();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶";
    play.setAttribute("aria-label", "play");
    if (view.isPlaying) {
      view.isPlaying = false;
      view.refresh();
    }
  }

  return { element, update() { element.hidden = view.model.steps.length < 2; }, toggle, stop };
}
