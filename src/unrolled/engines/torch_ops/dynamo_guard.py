"""A guard of torch.compile that compares the Python values that a cell's step reads."""

from __future__ import annotations

from typing import Any

from torch._guards import Guard, TracingContext

from unrolled.engines.compiler.step_values import StepValues


def recompile_after_change(values: StepValues) -> None:
    """Let torch.compile compile the current function again if the values change; otherwise do nothing."""
    context = TracingContext.try_get()
    if context is None:
        return
    from torch._dynamo.source import GlobalStateSource

    def create(builder: Any, _: Guard) -> None:
        def unchanged(_: Any) -> bool:
            return values.unchanged()

        description = ["the values that the step of a cell reads are the same"]
        builder.guard_manager.root.add_lambda_guard(unchanged, description, None)

    context.guards_context.dynamo_guards.add(Guard(GlobalStateSource(), create))
