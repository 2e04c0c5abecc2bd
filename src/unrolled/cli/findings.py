"""Print the problems of a layer."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from unrolled.tracing.findings import HealthReport, plural, where


def print_findings(console: Console, report: HealthReport, full: bool) -> None:
    """Print the problems of a layer, the worst first, or only the worst one.

    Args:
        console: The console to print to.
        report: The problems.
        full: Whether to print all of them, and what else was checked.
    """
    for finding in report.findings if full else report.findings[:1]:
        color = {"error": "bold red", "warning": "yellow"}.get(finding.severity, "cyan")
        label = (f"{finding.severity.capitalize()}: ", color)
        console.print(Text.assemble(label, where(finding), finding.message))
    if full:
        for heading, sentences in (("Fine", report.checked), ("Not checked", report.not_checked)):
            if sentences:
                console.print(Text(f"{heading}: {', '.join(sentences)}.", "dim"))
    elif len(report) > 1:
        console.print(f"Use --full to see {plural(len(report) - 1, 'other finding')}.", style="dim")
    elif not report:
        console.print("No problem found. Use --full to see what was checked.", style="dim")
