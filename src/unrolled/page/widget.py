"""The view of a trace as a notebook widget."""

from __future__ import annotations

import anywidget
import traitlets

from unrolled.page import assets


class TraceView(anywidget.AnyWidget):
    """A widget that shows a trace.

    Attributes:
        contents: The data of the page as JSON; see :func:`unrolled.page.contents.page_data`.
    """

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
