// The start of a page that contains its own data.

import { mount } from "./app.js";
import { mountModel } from "./overview.js";

/** Show the data of the page: of a trace, or of a model. */
function start() {
  const data = JSON.parse(document.getElementById("trace").textContent);
  const shown = (data.pages ? mountModel : mount)(document.getElementById("page"), data);
  document.addEventListener("keydown", (event) => { if (event.target === document.body) shown.onKeyDown(event); });
}
