// On a narrow screen, the arithmetic opens below the block that was tapped.

const NARROW_SCREEN = "(max-width: 820px)"; // as in the style sheet

/** Move the arithmetic between its own column and the block of the chosen number. Returns {update, close}. */
export function createInlineArithmetic(view, { element }, drawing) {
  const { root } = view;
  const narrow = matchMedia(NARROW_SCREEN);
  const listeners = new AbortController();
  let home = null;
  let host = null; // the block that it is below
  let tapped = null; // the block of the last tap: the drawing, the strip or the arithmetic; null for a table

  root.addEventListener("click", ({ target }) => { tapped = target.closest(".drawing, .strip, .arithmetic"); }, { capture: true, signal: listeners.signal });
  narrow.addEventListener("change", update, { signal: listeners.signal });

  function findHost() {
    if (tapped === element && host?.isConnected) return host; // a term of the sum was followed
    if (tapped !== null && tapped !== element && tapped.isConnected) return tapped;
    const cell = [...root.querySelectorAll(".stage .n.on")].find((one) => one.getClientRects().length);
    return cell?.closest(".gate") ?? cell?.closest(".grp") ?? drawing.element;
  }

  function update() {
    home ??= element.parentNode;
    host = narrow.matches ? findHost() : null;
    element.classList.toggle("inline", host !== null);
    if (host && host.nextElementSibling !== element) host.after(element);
    if (!host && element.parentNode !== home) home.append(element);
  }

  return { update, close: () => listeners.abort() };
}
