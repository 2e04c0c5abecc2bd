// Framed numbers that are dragged.

/** Let the reader drag framed numbers with a mouse or pen. On touch screens, there is the slider. */
export function enableDragging(view, root) {
  let drag = null;
  root.addEventListener("pointerdown", (event) => {
    const cell = event.target.closest(".n.can");
    if (!cell || event.button || event.pointerType === "touch") return;
    const number = cell.refer();
    drag = { number, x: event.clientX, value: view.value(number), moved: false };
  });
  root.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const distance = event.clientX - drag.x;
    if (!drag.moved && Math.abs(distance) < 4) return;
    if (!drag.moved) {
      drag.moved = true;
      root.setPointerCapture(event.pointerId);
      view.choose(drag.number);
    }
    const isGate = view.model.isGate(drag.number.q);
    const value = drag.value + distance * (isGate ? 0.005 : 0.01) * (event.shiftKey ? 0.1 : 1);
    view.edit(drag.number, Math.round((isGate ? Math.max(0, Math.min(1, value)) : value) * 1000) / 1000);
    event.preventDefault();
  });
  const end = () => { drag = null; };
  root.addEventListener("pointerup", end);
  root.addEventListener("pointercancel", end);
}
