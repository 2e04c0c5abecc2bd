"""The grammar: productions that return the text of an expression, by the kind of operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fuzz import templates, wider_templates
from fuzz.builder import Builder, Invalid, Value

TABLES: dict[str, list[str]] = {
    name.lower(): table.strip().splitlines()
    for module in (templates, wider_templates)
    for name, table in vars(module).items()
    if name.isupper()
}


class Fields(dict[str, Any]):
    """The operands of one template, each chosen when the template first uses it."""

    def __init__(
        self, builder: Builder, a: Value | None = None, sizes: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.builder = builder
        self.operand = a
        self.sizes = sizes

    def __missing__(self, key: str) -> str:
        self[key] = text = self.create(key)
        return text

    def create(self, key: str) -> str:
        builder = self.builder
        if key == "n":
            return builder.number()
        if key == "flag":
            return builder.pick(["True", "False"])
        if key in ("o", "i_"):
            assert self.sizes is not None
            return str(self.sizes[key == "i_"])
        if key == "p_1":
            return builder.param(1)
        if key.startswith(("p_", "p2_")) and self.sizes is not None:
            sizes = {"o": self.sizes[0], "i": self.sizes[1], "2": 2}
            return builder.param(*[sizes[letter] for letter in key.split("_")[1]])
        if self.operand is None:
            self.operand = builder.value(1 if key == "r" else None)
        a = self.operand
        if key in ("a", "r"):
            if key == "r" and len(a.shape) != 1:
                raise Invalid(f"{a} has {len(a.shape)} dimensions")
            return a.text
        if key in ("b", "c"):
            return like(builder, a)
        if key in ("m", "k"):
            return mask(builder, a)
        if key == "w":
            return str(a.width)
        if key == "i":
            return str(builder.integer(0, a.width - 1))
        if key == "q":
            return builder.param(a.width)
        if key == "p_1w":
            return builder.param(1, a.width)
        if key == "d":
            return f"(({a}) + torch.linspace(0, 0.137, {a.width}, dtype=x.dtype))"
        if key == "s":
            return builder.param(a.width, a.width)
        raise KeyError(key)


def fill(builder: Builder, table: str, a: Value | None = None, sizes: tuple[int, int] | None = None) -> str:
    """Return the text of a random template of a table."""
    template = builder.pick(TABLES[table])
    text = template.format_map(Fields(builder, a, sizes))
    return text if table == "changes" else f"({text})"


def like(builder: Builder, a: Value) -> str:
    """Return an operand that can be broadcast to another one."""
    if builder.chance(0.5):
        values = [v for v in builder.values if v.batched and v.dtype is builder.dtype and v.shape]
        return builder.fit(builder.pick(values), a.shape)
    return fill(builder, "like", a)


def mask(builder: Builder, a: Value) -> str:
    """Return a condition that can be broadcast to an operand."""
    masks = [v for v in builder.values if v.dtype is torch.bool and v.shape == a.shape]
    if masks and builder.chance(0.4):
        return builder.pick(masks).text
    if builder.chance(0.5):
        values = [v for v in builder.values if v.batched and v.dtype is builder.dtype and v.shape]
        value = builder.pick(values)
        a = Value(builder.fit(value, a.shape), a.shape, True, builder.dtype)
    return fill(builder, "masks", a)


def matrix(builder: Builder, rows: int, columns: int) -> str:
    """Return a matrix that consists of parameters."""
    return fill(builder, "matrices", None, (rows, columns))


def product(builder: Builder) -> str:
    """Return a matrix product of a value with parameters, or of two values."""
    a = builder.value(1)
    if builder.chance(0.2):
        a = builder.evaluate(f"({mask(builder, a)}).to(x.dtype)")
    if not a.batched or len(a.shape) != 1:
        raise Invalid(f"{a} is no batch of rows")
    n, o = a.width, builder.integer(1, 6)
    heads = builder.pick([h for h in (1, 2, 3, 4) if n % h == 0])
    part = n // heads
    split_a = f"({a}).unflatten(1, ({heads}, {part}))"
    bias = builder.pick(["", "", f", {builder.param(o, prefix='bias')}"]) if builder.chance(0.6) else ""
    products: list[Callable[[], str]] = [
        lambda: f"linear({a}, {matrix(builder, o, n)}{bias})",
        lambda: f"linear({a}, {matrix(builder, o, n)}{bias})",
        lambda: f"linear({a}, {builder.param(o, n)}{bias})",
        lambda: f"linear({a}, {builder.param(n, n)})",
        lambda: f"(({a}) @ {matrix(builder, n, o)})",
        lambda: f"(({a}) @ {builder.param(n)})[:, None]",
        lambda: f"({matrix(builder, o, n)} @ ({a}).t()).t()",
        lambda: f"torch.addmm({builder.param(o)}, {a}, {matrix(builder, n, o)}, beta=0.5, alpha=0.7)",
        lambda: f"torch.einsum('bi,oi->bo', {a}, {matrix(builder, o, n)})",
        lambda: f"torch.einsum('bi,ij,bj->b', {a}, {builder.param(n, n)}, {a})[:, None]",
        lambda: f"torch.einsum('bi,oi,o->bo', {a}, {builder.param(o, n)}, {builder.param(o)})",
        lambda: f"F.bilinear({a}, {like_value(builder, a)}, {builder.param(3, n, n)}, {builder.param(3)})",
        lambda: f"torch.einsum('bhi,hio->bho', {split_a}, {builder.param(heads, part, 3)}).flatten(1)",
        lambda: f"torch.einsum('bhi,hoi->bho', {split_a}, {builder.param(heads, 2, part)})",
        lambda: f"torch.bmm({split_a}.transpose(0, 1), {builder.param(heads, part, 3)}).transpose(0, 1)",
        lambda: f"({split_a}[:, :, None] @ {builder.param(heads, part, 3)}).flatten(1)",
        lambda: f"({split_a} @ {matrix(builder, part, o)})",
        lambda: f"(torch.softmax({split_a} @ {split_a}.mT, -1) @ {split_a})",
        lambda: f"torch.bmm({split_a}, {split_a}.mT)",
        lambda: f"((({a})[:, None] - {builder.param(3, n)}) ** 2).mean(-1)",
        lambda: f"({split_a}).transpose(1, 2).flatten(1)",
        lambda: f"({split_a}).permute(0, 2, 1)",
        lambda: f"({split_a}).sum(1)",
        lambda: f"({split_a}).softmax(1)",
        lambda: (
            f"torch.cat([linear(v, {builder.param(3, n)}[:, :v.shape[1]]) for v in ({a}).chunk(2, 1)], -1)"
        ),
        lambda: f"F.group_norm(torch.cat([{a}, ({a}) + 1], 1), {heads}, {builder.param(2 * n)}, eps=0.1)",
        lambda: f"F.prelu({a}, {builder.param(builder.pick([1, n]))})",
        lambda: f"linear(torch.tanh(linear({a}, {builder.param(o, n)})), {builder.param(n, o)})",
        lambda: f"linear({a} * torch.sigmoid({like_value(builder, a)}), {builder.param(o, n)})",
    ]
    return builder.pick(products)()


def like_value(builder: Builder, a: Value) -> str:
    """Return a value with the shape of another one."""
    values = [v for v in builder.values if v.batched and v.dtype is builder.dtype and v.shape]
    return builder.fit(builder.pick(values), a.shape)


def cast(builder: Builder) -> str:
    """Return a comparison as numbers."""
    a = builder.value()
    return f"({mask(builder, a)}).to(x.dtype)"


PRODUCTIONS: dict[str, tuple[int, Callable[[Builder], str]]] = {  # weight and production
    "unary": (18, lambda builder: fill(builder, "unary")),
    "jump": (5, lambda builder: fill(builder, "jumps")),
    "binary": (22, lambda builder: fill(builder, "binary")),
    "choice": (14, lambda builder: fill(builder, "choices")),
    "mask": (5, lambda builder: fill(builder, "masks")),
    "cast": (3, cast),
    "move": (14, lambda builder: fill(builder, "moves")),
    "reduction": (13, lambda builder: fill(builder, "reductions")),
    "option": (4, lambda builder: fill(builder, "options")),
    "change": (3, lambda builder: fill(builder, "changes")),
    "product": (22, product),
}
WIDER: dict[str, tuple[int, Callable[[Builder], str]]] = {
    **PRODUCTIONS,
    "scan": (9, lambda builder: fill(builder, "scans")),
    "sorted": (9, lambda builder: fill(builder, "sorted")),
    "integer": (10, lambda builder: fill(builder, "integers")),
    "dtype": (8, lambda builder: fill(builder, "casts")),
    "rare": (24, lambda builder: fill(builder, "rare")),
    "draw": (14, lambda builder: fill(builder, "draws")),
}


def random_lines(builder: Builder, count: int, wider: bool) -> None:
    """Add lines to a step.

    Args:
        builder: Builds the step.
        count: Number of lines.
        wider: Whether to choose among all productions.
    """
    productions = WIDER if wider else PRODUCTIONS
    names = [name for name, (weight, _) in productions.items() for _ in range(weight)]
    if builder.dtype is torch.float32:  # in float64, the numbers would differ
        names = [name for name in names if name != "draw"]
    names_inside = [name for name in names if name not in ("change", "mask")]
    builder.nested = lambda builder: productions[builder.pick(names_inside)][1](builder)
    attempts = 0
    while len(builder.lines) < count and attempts < 10 * count:
        attempts += 1
        try:
            text, *changes = productions[builder.pick(names)][1](builder).split(";")
            value = builder.evaluate(text, *changes)
            if value.batched and value.shape:
                builder.let(text, *changes)
        except Invalid:
            continue


def new_state(builder: Builder, name: str, width: int) -> str:
    """Return the expression of a state's new value."""
    values = [v for v in builder.values if v.batched and v.dtype is builder.dtype and v.shape]
    recent = values[-4:] if builder.chance(0.8) else values
    own = next(value for value in builder.values if value.text == name)
    fields = Fields(builder, own)
    fields |= {"h": name, "v": builder.fit(builder.pick(recent), (width,))}
    fields["o"] = builder.fit(builder.pick(values[:4]), (width,))
    template = builder.pick(TABLES["updates" if builder.chance(0.8) else "passed_on"])
    if "{p}" in template:
        fields["p"] = builder.param(width)
    text = template.format_map(fields)
    if builder.evaluate(text).shape != (width,):
        raise Invalid(f"{text} has another shape")
    return text
