"""The report of :meth:`unrolled.Trace.health`: findings in words, and how they are shown."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType

Severity = Literal["error", "warning", "note"]

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_LISTED = 6  # maximum number of units, steps or rows in a sentence
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True, eq=False)
class Finding:
    """One problem of a layer.

    Attributes:
        kind: What kind of problem, such as ``"gate shut"``. :data:`unrolled.tracing.thresholds.KINDS` lists
            all kinds.
        severity: ``"error"`` for NaN and infinity, ``"warning"`` for what keeps a layer from learning or
            remembering, ``"note"`` for what is unused.
        message: What happens, how much, where, the effect and the cause, in one or a few sentences.
        layer, direction: The layer, counted from the lowest, and its direction.
        quantity: The name of the quantity or parameter, or of several states joined with ``", "``.
        units: The affected units.
        steps: The affected time steps.
        rows: The affected rows of the batch. Empty if it isn't about certain rows.
        values: The numbers behind the message, by name.
        parameter: The parameter that causes it and the index of its row, if known.
        locations: Numbers that show it, the best first and at most one per row of the batch: each is a
            quantity with ``(step, row, unit)``, or a parameter with its index. The step of an initial state
            is the one before the first. Empty if ``parameter``, ``steps`` and ``units`` say it all.
        module: Name of the module, in a report of a whole model.
        parts: How many layers and directions the trace has.
    """

    kind: str
    severity: Severity
    message: str
    layer: int
    direction: str
    quantity: str
    units: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    values: dict[str, float] = field(default_factory=dict)
    parameter: tuple[str, int] | None = None
    locations: tuple[tuple[str, tuple[int, ...]], ...] = ()
    module: str = ""
    parts: int = 1

    def __str__(self) -> str:
        return self.message


class HealthReport(Sequence[Finding]):
    """The problems of a layer or a model, the worst first. It is a sequence of findings.

    Attributes:
        findings: The problems, the worst first.
        checked: What was checked and found fine, in short sentences.
        not_checked: What couldn't be checked, and why.
    """

    def __init__(
        self, findings: Iterable[Finding], checked: Iterable[str] = (), not_checked: Iterable[str] = ()
    ) -> None:
        ordered = sorted(findings, key=lambda one: _SEVERITIES.index(one.severity))
        self.findings: tuple[Finding, ...] = tuple(ordered)
        self.checked, self.not_checked = tuple(checked), tuple(not_checked)

    def __getitem__(self, index: Any) -> Any:
        return self.findings[index]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __repr__(self) -> str:
        return f"<HealthReport: {self.headline}>"

    def __str__(self) -> str:
        lines = [self.headline + "."]
        lines += [f"{one.severity}: {where(one)}{one.message}" for one in self.findings]
        lines += [f"fine: {text}" for text in self.checked]
        lines += [f"not checked: {text}" for text in self.not_checked]
        return "\n".join(lines)

    @property
    def headline(self) -> str:
        """The number of findings as text."""
        if not self.findings:
            return "No problem found"
        counts = ((severity, sum(one.severity == severity for one in self)) for severity in _SEVERITIES)
        return ", ".join(plural(count, severity) for severity, count in counts if count)

    def __rich__(self) -> RenderableType:
        from rich.text import Text

        text = Text(self.headline + ".\n", "bold")
        for one in self.findings:
            text.append(f"{one.severity}: ", _STYLES[one.severity])
            text.append(f"{where(one)}{one.message}\n")
        for label, sentences in (("fine", self.checked), ("not checked", self.not_checked)):
            for sentence in sentences:
                text.append(f"{label}: {sentence}\n", "dim")
        text.rstrip()
        return text

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        items = [
            f"<li><b>{one.severity}:</b> {html.escape(where(one) + one.message)}</li>"
            for one in self.findings
        ]
        parts = [
            f"<p><b>{html.escape(self.headline)}.</b></p>",
            f"<ol>{''.join(items)}</ol>" if items else "",
        ]
        for label, sentences in (("Fine", self.checked), ("Not checked", self.not_checked)):
            listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
            parts.append(f"<details><summary>{label}</summary><ul>{listed}</ul></details>" if listed else "")
        return "".join(parts)

    def of_module(self, name: str) -> HealthReport:
        """Return the report with the name of a module in each finding."""
        prefix = f"{name}: " if name else ""
        return HealthReport(
            [replace(one, module=name) for one in self.findings],
            [prefix + text for text in self.checked],
            [prefix + text for text in self.not_checked],
        )


def joined(reports: Iterable[HealthReport]) -> HealthReport:
    """Return one report with the contents of several."""
    reports = list(reports)
    return HealthReport(
        [finding for report in reports for finding in report.findings],
        [text for report in reports for text in report.checked],
        [text for report in reports for text in report.not_checked],
    )


def where(finding: Finding) -> str:
    """Return the place of a finding as a prefix of its message; empty if there is only layer 0, forward."""
    is_only = finding.parts == 1 and (finding.layer, finding.direction) == (0, "forward")
    place = "" if is_only else place_of(finding.layer, finding.direction)
    parts = [part for part in (finding.module, place) if part]
    return f"{', '.join(parts)}: " if parts else ""


def place_of(layer: int, direction: str) -> str:
    """Return a layer and its direction as text."""
    return f"layer {layer}, {direction}"


def number(value: float, digits: int = 3) -> str:
    """Format a number with some significant digits and a minus sign: ``0.000017``, ``−12``, ``1.2e+30``."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinity" if value > 0 else "−infinity"
    size = math.floor(math.log10(abs(value))) if value else 0
    digits = 2 if size < -3 else digits
    text = f"{value:.{digits - 1 - size}f}" if -6 <= size < -3 else f"{value:.{digits}g}"
    return text.replace("-", "−", 1) if value < 0 else text


def gate_value(value: float) -> str:
    """Format the value of a gate. Close to 1, it is as exact as its distance to 1: ``0.999978``."""
    if 0.9 < value < 1:
        return f"{value:.{1 - math.floor(math.log10(1 - value))}f}"
    return number(value)


def percent(share: float) -> str:
    """Format a share in percent. Only all is 100 %, and only none is 0 %."""
    rounded = round(share * 100)
    if 0 < share < 0.01:
        return "under 1 %"
    return f"{min(rounded, 99) if share < 1 else 100} %"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 step``, ``4 steps``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def listed(indices: Sequence[int]) -> str:
    """Return indices as text: ``0, 1 and 5``. Ranges are joined, and a long list is cut."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    texts: list[str] = []
    for run in runs:
        texts += [f"{run[0]}–{run[-1]}"] if len(run) > 2 else map(str, run)
    if len(texts) > _LISTED:
        return f"{', '.join(texts[: _LISTED - 1])} and more"
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
