"""Colors, fonts and the style sheet of a diagram."""

from __future__ import annotations

LIGHT = {
    "ground": "#ffffff", "raised": "#f4f6f8", "ink": "#16191d", "quiet": "#56606b", "wire": "#7d8894",
    "positive": "#b2182b", "negative": "#2166ac", "gate": "#0b7a63",
    "alarm": "#a3201a", "alarm-ground": "#fdeeec", "belt": "#f0f3f6", "faint": "#d9dee4",
}  # fmt: skip
DARK = {
    "ground": "#14171b", "raised": "#1d2228", "ink": "#e9ecef", "quiet": "#a3adb8", "wire": "#7d8995",
    "positive": "#ff8a78", "negative": "#79b8ff", "gate": "#4fd3b2",
    "alarm": "#ff9a90", "alarm-ground": "#38201f", "belt": "#1d2228", "faint": "#39424c",
}  # fmt: skip
SANS = 'Helvetica, Arial, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif'
SERIF = '"STIX Two Text", "Latin Modern Roman", Cambria, "Times New Roman", "DejaVu Serif", serif'

_RULES = """
{scope} {{ {light} font-family: {sans}; }}
{dark}
{scope} text {{ fill: var(--d-ink); }}
{scope} .ground {{ fill: var(--d-ground); }}
{scope} .belt {{ fill: var(--d-belt); }}
{scope} .halo {{ fill: none; stroke: var(--d-ground); stroke-width: 7; stroke-opacity: .85; }}
{scope} .vector > .halo {{ stroke-width: 5; }}
{scope} .line {{ fill: none; stroke: var(--d-wire); stroke-width: 1.5; stroke-linecap: round;
  stroke-linejoin: round; }}
{scope} .arrow, {scope} .dot {{ fill: var(--d-wire); }}
{scope} .positive {{ --d-tone: var(--d-positive); }}
{scope} .negative {{ --d-tone: var(--d-negative); }}
{scope} .gate {{ --d-tone: var(--d-gate); }}
{scope} .alarm {{ --d-tone: var(--d-alarm); }}
{scope} .scalar .under {{ stroke: var(--d-faint); }}
{scope} .scalar .line {{ stroke: var(--d-tone); }}
{scope} .scalar .arrow, {scope} .dot.scalar {{ fill: var(--d-tone); }}
{scope} .scalar .arrow.under, {scope} .dot.under {{ fill: var(--d-faint); }}
{scope} .minus {{ font-size: 14px; font-weight: 700; text-anchor: middle; }}
{scope} .symbol {{ font-family: {serif}; font-style: italic; }}
{scope} .word {{ font-weight: 600; }}
{scope} .digits {{ font-size: 12.5px; fill: var(--d-quiet); font-variant-numeric: tabular-nums; }}
{scope} .layer .digits {{ fill: var(--d-ink); }}
{scope} .layer text {{ paint-order: stroke; stroke: var(--d-raised); stroke-width: 2.6px;
  stroke-linejoin: round; }}
{scope} .alarm .digits, {scope} .digits.alarm {{ fill: var(--d-alarm); font-weight: 700; }}
{scope} .small {{ font-size: 12px; fill: var(--d-quiet); }}
{scope} .small .symbol {{ fill: var(--d-quiet); }}
{scope} .middle {{ text-anchor: middle; }}
{scope} .end {{ text-anchor: end; }}
{scope} .body {{ fill: var(--d-raised); }}
{scope} .operation .body {{ fill: var(--d-ground); stroke: var(--d-wire); stroke-width: 1.4; }}
{scope} .function .body, {scope} .gain .body {{ fill: var(--d-ground); }}
{scope} .alarm > .body {{ fill: var(--d-alarm-ground); }}
{scope} .fill {{ fill: var(--d-tone); fill-opacity: .36; }}
{scope} .gate > .fill {{ fill-opacity: .44; }}
{scope} .share {{ fill: var(--d-gate); fill-opacity: .2; stroke: var(--d-ground); }}
{scope} .share.mine {{ fill-opacity: .55; }}
{scope} .fader {{ stroke: var(--d-wire); stroke-width: 2; stroke-linecap: round; }}
{scope} .knob {{ fill: var(--d-gate); }}
{scope} .zero {{ stroke: var(--d-wire); stroke-dasharray: 1.5 3; stroke-opacity: .8; }}
{scope} .rim {{ fill: none; stroke: var(--d-wire); stroke-width: 1.4; }}
{scope} .gate > .rim {{ stroke: var(--d-gate); }}
{scope} .alarm > .rim, {scope} .operation.alarm > .body {{ stroke: var(--d-alarm); stroke-width: 2; }}
{scope} .track, {scope} .ring {{ fill: none; stroke: var(--d-gate); stroke-width: 4; }}
{scope} .track {{ stroke-opacity: .18; }}
{scope} .output {{ stroke: var(--d-ink); stroke-width: 1.6; }}
{scope} .output-head {{ fill: var(--d-ink); stroke: none; }}
"""


def style_sheet(scope: str, theme: str) -> str:
    """Return the CSS of a picture.

    Args:
        scope: Selector of the picture. Rules apply to nothing else, since a page may hold many pictures.
        theme: ``"light"``, ``"dark"``, or ``"auto"`` for what the reader's system prefers.
    """

    def properties(colors: dict[str, str]) -> str:
        return " ".join(f"--d-{name}: {color};" for name, color in colors.items())

    dark = ""
    if theme == "auto":
        dark = f"@media (prefers-color-scheme: dark) {{ {scope} {{ {properties(DARK)} }} }}"
    light = properties(DARK if theme == "dark" else LIGHT)
    return _RULES.format(scope=scope, light=light, dark=dark, sans=SANS, serif=SERIF)
