"""What a cell is: parameters with their shapes, states, options, and the equations of one step."""

from __future__ import annotations

import ast
import inspect
import numbers
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor, nn

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
}
_FITS: dict[Any, type] = {int: int, float: numbers.Real, bool: bool, str: str}  # values by annotation


def size_of(expression: str | int, sizes: Mapping[str, int]) -> int:
    """Evaluate a size such as ``"4*hidden"`` or ``"proj_size or hidden"``.

    Args:
        expression: whole numbers and names of ``sizes``, joined by ``+ - * //``, ``or`` and
            brackets; ``a or b`` is ``b`` where ``a`` is 0.
        sizes: the value of each name.

    Raises:
        ValueError: the expression holds an unknown name or anything else.
    """

    def evaluate(node: ast.AST) -> int:
        match node:
            case ast.Expression(body=body):
                return evaluate(body)
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name) if name in sizes:
                return sizes[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](evaluate(left), evaluate(right))
            case ast.BoolOp(op=ast.Or(), values=values):
                return next((v for v in map(evaluate, values) if v), 0)
        raise ValueError(
            f"the size {expression!r} should be made of whole numbers, + - * // or, and the names "
            f"{', '.join(sizes)}; {ast.unparse(node)!r} is none of these"
        )

    try:
        tree = ast.parse(str(expression).strip(), mode="eval")
    except SyntaxError:
        raise ValueError(f"the size {expression!r} is not an expression") from None
    return evaluate(tree)


class Param:
    """Declares one parameter of a cell.

    Args:
        shape: the size of each axis, as a number or an expression over the cell's sizes:
            ``Param("4*hidden", "input")``. The names are ``input``, ``hidden`` and every whole-number
            option of the cell. A parameter with an axis of size 0 is left out: the step sees None.
        init: fills the new tensor in place, for instance ``torch.nn.init.orthogonal_``; one that takes
            two arguments gets the cell too, with its sizes, its options and its parameters, of which
            those that are declared earlier are drawn. Without it the draw is torch.nn's for recurrent
            layers, uniform in ±1/sqrt(hidden).
        when: tells of a cell, with its sizes and options, whether it has this parameter; where not, the
            step sees None. Without it every cell has it.

    A parameter whose name begins with ``bias`` is left out in a layer made with ``bias=False``: the
    step sees None, which ``torch.nn.functional.linear`` takes as it is.
    """

    def __init__(
        self,
        *shape: str | int,
        init: Callable[[Tensor], Any] | Callable[[Tensor, Any], Any] | None = None,
        when: Callable[[Any], bool] | None = None,
    ) -> None:
        if not shape:
            raise TypeError('Param needs the size of each axis, for instance Param("4*hidden", "input")')
        self.shape = shape
        self.init = init
        self.when = when
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, cell: None, owner: type) -> Param: ...
    @overload
    def __get__(self, cell: Cell, owner: type) -> Tensor: ...
    def __get__(self, cell: Cell | None, owner: type) -> Param | Tensor:
        if cell is None:
            return self
        raise AttributeError(
            f"{owner.__name__}.{self.name} has no tensor yet: a cell gets its tensors from a layer, "
            f"or from {owner.__name__}(...).bind({{{self.name!r}: tensor, ...}})"
        )

    def fill(self, tensor: Tensor, cell: Cell) -> None:
        """Draw the initial values of a bound cell's parameter in place."""
        init: Any = self.init
        with torch.no_grad():
            if init is None:
                bound = cell.hidden**-0.5
                nn.init.uniform_(tensor, -bound, bound)
            elif _takes_two(init):
                init(tensor, cell)
            else:
                init(tensor)


class Cell:
    """A recurrent cell: subclass it, declare states and parameters, and write the step.

    ::

        class Minimal(Cell):
            state = ("h",)
            weight_ih = Param("hidden", "input")
            weight_hh = Param("hidden", "hidden")
            activation: Literal["tanh", "relu"] = "tanh"      # an option of the cell

            def step(self, x, h):
                h = torch.tanh(linear(x, self.weight_ih) + linear(h, self.weight_hh))
                return h

    ``state`` names the states in the order in which ``step`` takes and returns them; the first one
    is the output. Each is ``(batch, hidden)``; where a size differs, ``state`` is a mapping from name
    to size expression: ``{"h": "proj_size or hidden", "c": "hidden"}``. An annotated attribute is an
    option that a layer takes by keyword. Local variables of ``step`` are the names in a trace; a
    section ``Quantities:`` of the docstring may say what each is, a line ``name: words`` for each.

    In a step ``self.training`` says whether the layer is in training mode, as in torch.nn: for instance
    ``dropout(h, 0.1, self.training)``. A tensor that is no parameter may be an attribute of the cell.

    Args:
        input_size: features of the input of a step.
        hidden_size: units of the hidden state.
        bias: whether the parameters whose names begin with ``bias`` exist.
        options: values for the cell's options.

    Raises:
        TypeError, ValueError: a size, option or declaration that can't be used, named.
    """

    state: ClassVar[tuple[str, ...] | Mapping[str, str | int]] = ("h",)
    training = False  # in a step: whether its layer is in training mode
    unbound: Cell  # of a bound one: the cell that it was made of
    features: int  # columns of x that a step reads

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(cls.state, str) or not cls.state:
            raise TypeError(
                f"{cls.__name__}.state should be a tuple of names such as ('h',) or a mapping from "
                f"name to size, got {cls.state!r}"
            )
        if "training" in (*inspect.get_annotations(cls), *vars(cls)):
            raise TypeError(f"{cls.__name__}.training is the mode of the layer: name the option otherwise")
        if "step" in cls.__dict__:
            taken = list(inspect.signature(cls.step).parameters)[2:]
            if taken != list(cls.state):
                raise TypeError(
                    f"{cls.__name__}.step should take (self, x, {', '.join(cls.state)}) to match its "
                    f"state, got (self, x{''.join(', ' + name for name in taken)})"
                )

    def __init__(self, input_size: int, hidden_size: int, *, bias: bool = True, **options: Any) -> None:
        self.input = self.features = whole("input_size", input_size)
        self.hidden = whole("hidden_size", hidden_size)
        if not isinstance(bias, bool):
            raise TypeError(f"bias should be of type bool, got: {type(bias).__name__}")
        self.bias = bias
        self._set_options(options)
        self.check()
        shapes = {name: self._shape(param) for name, param in self.params().items()}
        for name, shape in shapes.items():
            when = self.params()[name].when
            if (name.startswith("bias") and not bias) or 0 in shape or not (when is None or when(self)):
                self.__dict__[name] = None
        self._shapes = {n: shape for n, shape in shapes.items() if self.__dict__.get(n, shape) is not None}
        declared = self.state if isinstance(self.state, Mapping) else dict.fromkeys(self.state, "hidden")
        chosen = tuple((name, repr(value)) for name, value in self.chosen_options().items())
        self._identity = (type(self), self.input, self.hidden, bias, chosen)
        self._state_sizes = {name: size_of(size, self._sizes()) for name, size in declared.items()}

    def check(self) -> None:
        """Raise ValueError where the sizes and options don't go together; a cell may override it."""

    def step(self, x: Tensor, *state: Any) -> Any:
        """One time step: x ``(batch, input)`` and the states to the new states, the output first."""
        raise NotImplementedError(f"{type(self).__name__} has no step: write def step(self, x, ...)")

    @classmethod
    def params(cls) -> dict[str, Param]:
        """Every declared parameter by name, in the order of declaration."""
        found: dict[str, Param] = {}
        for base in reversed(cls.__mro__):
            found |= {name: value for name, value in vars(base).items() if isinstance(value, Param)}
        return found

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Every option by name with its default; ``inspect.Parameter.empty`` where it has none."""
        names = [
            name
            for base in reversed(cls.__mro__)
            if issubclass(base, Cell) and base is not Cell
            for name in inspect.get_annotations(base)
            if name != "state"
        ]
        found = {name: getattr(cls, name, inspect.Parameter.empty) for name in names}
        return {name: default for name, default in found.items() if not isinstance(default, Param)}

    def chosen_options(self) -> dict[str, Any]:
        """The value of every option in this cell."""
        return {name: getattr(self, name) for name in self.options()}

    @classmethod
    def check_options(cls, given: Mapping[str, Any]) -> None:
        """Raise where an option that this cell has can't take the value given for it.

        Raises:
            TypeError: a value of another type than its annotation ``int``, ``float``, ``bool`` or ``str``.
            ValueError: a value that its annotation ``Literal`` doesn't list.
        """
        try:
            hints = typing.get_type_hints(cls)
        except (NameError, TypeError):  # an annotation that only its author's scope can resolve
            hints = {}
        for name, default in cls.options().items():
            value, hint = given.get(name, default), hints.get(name, object)
            if value is default:  # as its author declares it
                continue
            choices = typing.get_args(hint)
            if typing.get_origin(hint) is typing.Literal and value not in choices:
                allowed = " or ".join(map(repr, choices))
                raise ValueError(f"Unknown {name} {value!r}. Select from {allowed}.")
            if hint in _FITS and not _fits(value, hint):
                raise TypeError(f"{name} should be of type {hint.__name__}, got: {type(value).__name__}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter that this cell has, by name."""
        return self._shapes

    def state_sizes(self) -> dict[str, int]:
        """The features of every state, by name; the first one is the output."""
        return self._state_sizes

    def identity(self) -> tuple[object, ...]:
        """What makes two cells compute the same from the same tensors: class, sizes and options."""
        return self._identity

    @property
    def innermost(self) -> Cell:
        """The cell that its author wrote: this one, unless it is a variant of another."""
        return self

    def equations(self) -> Callable[..., Any]:
        """The function that holds the equations of the step, as its author wrote it."""
        step: Callable[..., Any] = inspect.unwrap(type(self).step)
        return step

    def bind(self, tensors: Mapping[str, Tensor]) -> Self:
        """A copy of this cell whose parameters are these tensors: the ``self`` that a step sees."""
        bound = object.__new__(type(self))
        bound.__dict__ = {"unbound": self, **self.__dict__, **tensors}
        return bound

    def _sizes(self) -> dict[str, int]:
        options = {name: value for name, value in self.chosen_options().items() if isinstance(value, int)}
        return {"input": self.input, "hidden": self.hidden, **options}

    def _shape(self, param: Param) -> tuple[int, ...]:
        try:
            shape = tuple(size_of(expression, self._sizes()) for expression in param.shape)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}.{param.name}: {error}") from None
        if min(shape) < 0:
            raise ValueError(f"{type(self).__name__}.{param.name} would have the shape {shape}")
        return shape

    def _set_options(self, given: dict[str, Any]) -> None:
        cls, known = type(self), self.options()
        for name in given:
            if name not in known:
                has = f"its options are {', '.join(known)}" if known else "it has no options"
                raise TypeError(f"{cls.__name__} has no option {name!r}: {has}")
        self.check_options(given)
        for name, default in known.items():
            value = given.get(name, default)
            if value is inspect.Parameter.empty:
                raise TypeError(f"{cls.__name__} needs the option {name!r}")
            setattr(self, name, value)


def _takes_two(init: Callable[..., Any]) -> bool:
    """Whether an initialisation has two arguments that a call must give."""
    try:
        given = inspect.signature(init).parameters.values()
    except (TypeError, ValueError):  # of what isn't written in Python
        return False
    return sum(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in given) > 1


def _fits(value: Any, hint: type) -> bool:
    """Whether an option's value is of this type; a bool is no number here, though Python's is one."""
    return isinstance(value, _FITS[hint]) and isinstance(value, bool) is (hint is bool)


def whole(name: str, value: Any) -> int:
    """A whole number above 0, of Python's or of NumPy's; raises with its name where it is none."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} must be greater than zero, got {value}")
    return int(value)
