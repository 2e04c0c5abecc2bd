"""The view of a trace as a widget, for notebooks of any kind."""

from __future__ import annotations

import anywidget
import traitlets

from unrolled.page import assets


class TraceView(anywidget.AnyWidget):
    """Shows the contents of a page, which :func:`unrolled.page.contents.contents` makes, as JSON."""

    _esm = (
        assets.script()
        + """
export default {
  render({ model, el }) {
    return mount(el, JSON.parse(model.get("contents"))).close;
  },
};
"""
    )
    _css = assets.style()
    contents = traitlets.Unicode().tag(sync=True)
