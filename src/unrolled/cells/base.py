"""Base classes for cells: ``Cell`` with its states, options and step, and ``Param`` for its parameters."""

from __future__ import annotations

import ast
import inspect
import math
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
_OPTION_TYPES: dict[Any, type] = {int: int, float: numbers.Real, bool: bool, str: str}  # by annotation


def size_of(expression: str | int, sizes: Mapping[str, int]) -> int:
    """Evaluate a size such as ``"4*hidden"`` or ``"proj_size or hidden"``.

    Args:
        expression: Integers and names from ``sizes``, combined with ``+ - * //``, ``or`` and
            parentheses. ``a or b`` is ``b`` if ``a`` is 0.
        sizes: The value of each name.

    Raises:
        ValueError: If the expression contains an unknown name or anything else.
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
            f"the size {expression!r} may contain only integers, + - * // or, and the names "
            f"{', '.join(sizes)}, but it contains {ast.unparse(node)!r}"
        )

    try:
        tree = ast.parse(str(expression).strip(), mode="eval")
    except SyntaxError:
        raise ValueError(f"the size {expression!r} is not a valid expression") from None
    return evaluate(tree)


class Param:
    """Declare one parameter of a cell.

    A parameter whose name begins with ``bias`` is omitted if the layer has ``bias=False``. In the step an
    omitted parameter is None, which ``torch.nn.functional.linear`` accepts as its bias.

    Args:
        shape: The size of each dimension, as a number or an expression over the cell's sizes:
            ``Param("4*hidden", "input")``. The names are ``input``, ``hidden`` and every integer option
            of the cell. A parameter with a dimension of size 0 is omitted.
        init: A function that fills the new tensor in place, such as ``torch.nn.init.orthogonal_``. If it
            takes two arguments, the second is the cell, with its sizes, its options and the parameters
            declared earlier, which are already initialized. A parameter in half precision is filled in
            float32 and then rounded. The default is that of torch.nn's recurrent layers: uniform in
            ±1/sqrt(hidden).
        when: A function of the cell, with its sizes and options. If it returns False, the cell doesn't have
            this parameter. By default every cell has it.

    Raises:
        TypeError: If there is no shape.
    """

    def __init__(
        self,
        *shape: str | int,
        init: Callable[[Tensor], Any] | Callable[[Tensor, Any], Any] | None = None,
        when: Callable[[Any], bool] | None = None,
    ) -> None:
        if not shape:
            raise TypeError('Param needs the size of each dimension, for instance Param("4*hidden", "input")')
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
            f"{owner.__name__}.{self.name} has no tensor yet. A layer binds the tensors to its cell; to do "
            f"it yourself, call {owner.__name__}(...).bind({{{self.name!r}: tensor, ...}})"
        )

    def fill(self, tensor: Tensor, cell: Cell) -> None:
        """Initialize ``tensor``, this parameter of the bound ``cell``, in place."""
        init: Any = self.init
        with torch.no_grad():
            if init is None:
                bound = 1.0 / math.sqrt(cell.hidden)  # as in torch.nn: hidden**-0.5 rounds differently
                nn.init.uniform_(tensor, -bound, bound)
                return
            is_half = tensor.dtype in (torch.bfloat16, torch.float16)
            filled = torch.empty_like(tensor, dtype=torch.float32) if is_half else tensor
            if _accepts_cell(init):
                init(filled, _in_float32(cell) if is_half else cell)
            else:
                init(filled)
            if is_half:  # such as torch.nn.init.orthogonal_, which doesn't support half precision
                tensor.copy_(filled)


class Cell:
    """A recurrent cell: subclass it, declare states and parameters, and write the step.

    ::

        class Minimal(Cell):
            state = ("h",)
            weight_ih = Param("hidden", "input")
            weight_hh = Param("hidden", "hidden")
            activation: Literal["tanh", "relu"] = "tanh"      # an option

            def step(self, x, h):
                h = torch.tanh(linear(x, self.weight_ih) + linear(h, self.weight_hh))
                return h

    ``state`` names the states in the order in which ``step`` takes and returns them. The first state is
    the output. Each state has the shape ``(batch, hidden)``. If the sizes differ, ``state`` is a mapping
    from name to size expression: ``{"h": "proj_size or hidden", "c": "hidden"}``.

    An annotated attribute is an option, which a layer takes as a keyword argument. The local variables of
    ``step`` are the names in a trace. The sections ``Options:`` and ``Quantities:`` in the docstring may
    describe them, with a line ``name: description`` for each.

    Within ``step``, ``self.training`` is True if the layer is in training mode, as in torch.nn. For instance:
    ``dropout(h, 0.1, self.training)``. A tensor that isn't a parameter may be an attribute of the cell.

    Args:
        input_size: Number of input features.
        hidden_size: Number of units in the hidden state.
        bias: If False, parameters whose names begin with ``bias`` are omitted.
        options: Values for the cell's options.

    Raises:
        TypeError: If an argument has the wrong type, or an option is unknown or missing.
        ValueError: If a size or option has an invalid value.
    """

    state: ClassVar[tuple[str, ...] | Mapping[str, str | int]] = ("h",)
    training = False  # set while a step runs: whether its layer is in training mode
    unbound: Cell  # only in a bound cell: the cell that bind() was called on
    features: int  # number of columns of x that the step reads
    _engine_cache: dict[object, Any]  # what an engine derives from the cell; its bound copies share it
    _wrapper_spec: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # see CellWrapper.spec

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(cls.state, str) or not cls.state:
            raise TypeError(
                f"{cls.__name__}.state should be a tuple of names, such as ('h',), or a mapping from "
                f"name to size, got {cls.state!r}"
            )
        if "training" in (*inspect.get_annotations(cls), *vars(cls)):
            raise TypeError(f"{cls.__name__}.training is the mode of the layer: give the option another name")
        if "step" in cls.__dict__:
            parameters = list(inspect.signature(cls.step).parameters)[2:]
            if parameters != list(cls.state):
                raise TypeError(
                    f"{cls.__name__}.step should take (self, x, {', '.join(cls.state)}) to match its "
                    f"state, got (self, x{''.join(', ' + name for name in parameters)})"
                )

    def __init__(self, input_size: int, hidden_size: int, *, bias: bool = True, **options: Any) -> None:
        self.input = self.features = positive_int("input_size", input_size)
        self.hidden = positive_int("hidden_size", hidden_size)
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
        states = self.state if isinstance(self.state, Mapping) else dict.fromkeys(self.state, "hidden")
        self._state_sizes = {name: size_of(size, self._sizes()) for name, size in states.items()}
        self._engine_cache = {}

    def check(self) -> None:
        """Raise ValueError if the sizes and options are incompatible. Subclasses may override it."""

    def step(self, x: Tensor, *state: Any) -> Any:
        """Compute one time step.

        Args:
            x: Input of shape ``(batch, input)``.
            state: The previous states, each ``(batch, size)``.

        Returns:
            The new states, the output first. A cell with one state returns a tensor, others a tuple.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step: define step(self, x, ...)")

    @classmethod
    def params(cls) -> dict[str, Param]:
        """Return every declared parameter by name, in the order of declaration."""
        params: dict[str, Param] = {}
        for base in reversed(cls.__mro__):
            params |= {name: value for name, value in vars(base).items() if isinstance(value, Param)}
        return params

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Return the default of every option by name, ``inspect.Parameter.empty`` if it has none."""
        names = [
            name
            for base in reversed(cls.__mro__)
            if issubclass(base, Cell) and base is not Cell
            for name in inspect.get_annotations(base)
            if name != "state"
        ]
        defaults = {name: getattr(cls, name, inspect.Parameter.empty) for name in names}
        return {name: default for name, default in defaults.items() if not isinstance(default, Param)}

    def chosen_options(self) -> dict[str, Any]:
        """Return the value of every option in this cell."""
        return {name: getattr(self, name) for name in self.options()}

    @classmethod
    def check_options(cls, given: Mapping[str, Any]) -> None:
        """Check the values of options against their annotations.

        Args:
            given: Values by option name. Names that aren't options of this cell are ignored.

        Raises:
            TypeError: If a value doesn't have the annotated type ``int``, ``float``, ``bool`` or ``str``.
            ValueError: If the annotation is a ``Literal`` that doesn't include the value.
        """
        try:
            hints = typing.get_type_hints(cls)
        except (NameError, TypeError):  # an annotation may use names that only its own scope can resolve
            hints = {}
        for name, default in cls.options().items():
            value, hint = given.get(name, default), hints.get(name, object)
            if value is default:  # the author's choice, even if it doesn't match the annotation
                continue
            choices = typing.get_args(hint)
            if typing.get_origin(hint) is typing.Literal and value not in choices:
                allowed = " or ".join(map(repr, choices))
                raise ValueError(f"Unknown {name} {value!r}. Select from {allowed}.")
            if hint in _OPTION_TYPES and not _has_type(value, hint):
                raise TypeError(f"{name} should be of type {hint.__name__}, got: {type(value).__name__}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter that this cell has, by name."""
        return self._shapes

    def state_sizes(self) -> dict[str, int]:
        """Return the number of features of every state, by name. The first state is the output."""
        return self._state_sizes

    @property
    def innermost(self) -> Cell:
        """The cell without its wrappers: this cell, unless it is a wrapper."""
        return self

    def equations(self) -> Callable[..., Any]:
        """Return the function that contains the equations of the step, without decorators."""
        step: Callable[..., Any] = inspect.unwrap(type(self).step)
        return step

    def bind(self, tensors: Mapping[str, Tensor]) -> Self:
        """Return a copy of this cell with tensors for its parameters, on which ``step`` can be called."""
        bound = object.__new__(type(self))
        attributes = bound.__dict__  # not assigned, because torch.compile of torch 2.12 doesn't follow that
        attributes.update(self.__dict__)
        attributes.update(tensors)
        attributes.setdefault("unbound", self)
        return bound

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine_cache": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {"_engine_cache": {}, **state}

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

    def _set_options(self, values: dict[str, Any]) -> None:
        cls, defaults = type(self), self.options()
        for name in values:
            if name not in defaults:
                known = f"its options are {', '.join(defaults)}" if defaults else "it has no options"
                raise TypeError(f"{cls.__name__} has no option {name!r}: {known}")
        self.check_options(values)
        for name, default in defaults.items():
            value = values.get(name, default)
            if value is inspect.Parameter.empty:
                raise TypeError(f"{cls.__name__} needs the option {name!r}")
            setattr(self, name, value)


def _accepts_cell(init: Callable[..., Any]) -> bool:
    """Return whether an initializer has a second required argument, the cell."""
    try:
        parameters = inspect.signature(init).parameters.values()
    except (TypeError, ValueError):  # a function that isn't written in Python may have no signature
        return False
    return sum(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters) > 1


def _in_float32(cell: Cell) -> Cell:
    """Return a copy of a bound cell with parameters in float32."""
    tensors = {name: cell.__dict__.get(name) for name in cell.params()}
    return cell.bind({name: one.float() for name, one in tensors.items() if isinstance(one, Tensor)})


def _has_type(value: Any, hint: type) -> bool:
    """Return whether an option's value has this type. Unlike in Python, a bool doesn't count as a number."""
    return isinstance(value, _OPTION_TYPES[hint]) and isinstance(value, bool) is (hint is bool)


def positive_int(name: str, value: Any) -> int:
    """Return a Python or NumPy integer above 0 as an int.

    Args:
        name: Name of the argument, for error messages.
        value: The value to check.

    Raises:
        TypeError: If the value isn't an integer.
        ValueError: If the value isn't positive.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} should be of type int, got: {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} must be greater than zero, got {value}")
    return int(value)
