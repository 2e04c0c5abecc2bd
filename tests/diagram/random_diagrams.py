"""Random diagrams: valid ones, as no cell has them."""

from __future__ import annotations

import random

from unrolled.diagram.model import Diagram, DiagramNode, DiagramState, Term

GLYPHS = {
    "layer": ("σ", "tanh", "W", "ReLU"),
    "operation": ("×", "+", "÷", "1−"),
    "function": ("tanh", "max", "where", "softplus"),
    "gain": ("×0.6", "×across"),
}
NAMES = ("", "", "", "i", "gate", "log_f", "candidate", "hidden_candidate_sum", "theta")


def random_diagram(seed: int) -> Diagram:
    """Return a diagram of 3 to 16 nodes with one to three states, in which everything is read."""
    generator = random.Random(seed)
    states = [f"s{k}" for k in range(generator.randint(1, 3))]
    count = generator.randint(len(states) + 2, 16)
    unread: list[str] = ["x", *[f"before:{name}" for name in states]]
    read: list[str] = []
    nodes = []
    for k in range(count):
        kind = generator.choice(("layer", "layer", "operation", "operation", "function", "gain"))
        glyph = generator.choice(GLYPHS[kind])
        wanted = 1 if kind == "gain" or glyph == "1−" else generator.randint(1, 3)
        sources = [unread.pop(0)] if unread else []
        while len(sources) < wanted and (choices := [s for s in (*read, *unread) if s not in sources]):
            sources.append(generator.choice(choices))
        terms = tuple(
            Term(s, "{}", kind == "layer" and generator.random() < 0.7, generator.choice((1, 1, 1, -1)))
            for s in sources
        )
        unread = [s for s in unread if s not in sources]
        read += [s for s in sources if s not in read]
        node = DiagramNode(f"n{k}", kind, glyph, generator.choice(NAMES), terms, value=k)
        nodes.append(node)
        unread.append(node.id)
    # What nothing reads goes into the last node of a state.
    ends = [node.id for node in nodes[-len(states) :]]
    left = [s for s in unread if s not in ends]
    last = nodes[-1]
    extra = tuple(Term(s) for s in left)
    nodes[-1] = DiagramNode(last.id, "operation", "+", last.name, (*last.terms, *extra), value=last.value)
    values = [
        DiagramState(name, end, count + k) for k, (name, end) in enumerate(zip(states, ends, strict=True))
    ]
    return Diagram(f"random {seed}", tuple(values), tuple(nodes), count + len(states))
