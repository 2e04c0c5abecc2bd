"""The base class of layers and single-step modules, which owns the parameters of cells."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.utils import parametrize

from unrolled.cells.base import Cell
from unrolled.engines.torch_ops import transforms
from unrolled.layers import lazy
from unrolled.layers.draws import CallDraws
from unrolled.layers.planned_calls import PlannedCalls, Signature
from unrolled.layers.sequence import InputError

State = Tensor | tuple[Tensor, ...]
States = tuple[Tensor, ...]
Run = Callable[..., list[tuple[Tensor, States]]]


class WeightStorage(Protocol):
    """How the weights of a quantized module are stored in a state dict.

    Attributes:
        weights: The format of the weights, such as ``"int8"``.
    """

    weights: str

    def is_stored(self, name: str) -> bool:
        """Return whether a parameter is stored in this format."""

    def save(self, state_dict: Any, prefix: str) -> None:
        """Convert the weights of a state dict to their format."""

    def load(self, state_dict: Any, prefix: str) -> None:
        """Convert the weights of a state dict to float32."""


class CellModule(nn.Module):
    """A module that owns the parameters of its cells.

    Args:
        cells: The cells by suffix, such as ``_l0_reverse``. The name of a parameter is its name in the cell
            followed by the suffix.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        has_input_size: False if the cells only stand for those of the right input size, which are created
            when the module is called for the first time, or loads a state dict.

    Raises:
        TypeError: If a cell has torch.nn parameters as attributes.
        ValueError: If ``dtype`` is complex and a cell can't be computed in it.
    """

    input_size: int  # 0 until it is known
    weight_storage: WeightStorage | None = None  # set by unrolled.quantize

    def __init__(self, cells: dict[str, Cell], device: Any, dtype: Any, has_input_size: bool = True) -> None:
        nn.Module.__init__(self)  # not super(), because torch.nn's classes may follow
        for cell in cells.values():
            _check_no_parameters(cell)
            if dtype is not None and dtype.is_complex:
                _check_complex(cell, dtype)
        self._set_cells(cells)
        for suffix, cell in cells.items():
            for name, shape in cell.shapes().items():
                if has_input_size:
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                else:
                    parameter = lazy.uninitialized_parameter(device, dtype)
                self.register_parameter(name + suffix, parameter)
        if has_input_size:
            self.reset_parameters()
        else:
            self.register_forward_pre_hook(lazy.take_input_size, with_kwargs=True)

    def _set_cells(self, cells: dict[str, Cell]) -> None:
        self._cells = cells
        self._named = {
            suffix: [(name, name + suffix, shape) for name, shape in cell.shapes().items()]
            for suffix, cell in cells.items()
        }

    @abstractmethod
    def _new_cells(self, input_size: int) -> dict[str, Cell]:
        """Return cells by suffix for another number of input features."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.input_size == 0:
            input_size = lazy.find_input_size(self, state_dict, prefix)
            if input_size is not None:
                lazy.set_input_size(self, input_size)
        if self.weight_storage is not None:
            self.weight_storage.load(state_dict, prefix)
        self._check_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_state_dict(self, state_dict: Any, prefix: str) -> None:
        """Raise ValueError for weights in int8, whose scales nothing would read."""
        for name in self._parameters:
            weights = state_dict.get(prefix + name)
            if isinstance(weights, Tensor) and weights.dtype is torch.int8:
                raise ValueError(
                    f"the state dict has {prefix}{name} in int8, but {self._label} has it in float: load it "
                    "into a module that unrolled.quantize returned for the same arguments"
                )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Parameters that aren't created yet can't be detached.
        super()._save_to_state_dict(destination, prefix, keep_vars or self.input_size == 0)
        if self.weight_storage is not None:
            self.weight_storage.save(destination, prefix)

    @property
    def _label(self) -> str:
        """The name of the class, for error messages."""
        return type(self).__name__

    @property
    def _first(self) -> Cell:
        """The cell of layer 0, forward direction. All cells have the same class, states and options."""
        return next(iter(self._cells.values()))

    def chosen_options(self) -> dict[str, Any]:
        """Return the value of every option of the cell."""
        return self._first.innermost.chosen_options()

    def reset_parameters(self) -> None:
        """Initialize every parameter with its ``Param``, in the order of registration."""
        for suffix in self._cells:
            cell = self._bind(suffix)
            params = cell.params()
            for name, full_name, _ in self._named[suffix]:
                if parametrize.is_parametrized(self, full_name):  # assigning sets the underlying parameters
                    value = torch.empty_like(getattr(self, full_name))
                    params[name].fill(value, cell)
                    setattr(self, full_name, value)
                else:
                    unpruned = self._parameters.get(f"{full_name}_orig")  # set by torch.nn.utils.prune
                    params[name].fill(getattr(self, full_name) if unpruned is None else unpruned, cell)

    def _bind(self, suffix: str) -> Cell:
        """Return the cell with this suffix, bound to its current parameters, in the mode of the module."""
        cell, parameters = self._cells[suffix], self._parameters
        if self.training and self.weight_storage is not None:
            raise InputError(
                f"{self._label} has {self.weight_storage.weights} weights, which can't be trained, but it is "
                "in training mode: call .eval(), or train the float32 model and quantize it again"
            )
        tensors = {}
        for name, full_name, shape in self._named[suffix]:
            tensor = parameters.get(full_name)
            if tensor is None:
                tensor = getattr(self, full_name)  # computed by a parametrization
                if tensor is None:
                    raise InputError(f"{self._label}: the parameter {full_name} is None, expected a tensor")
            if tensor.shape != shape:
                raise InputError(
                    f"{self._label}: the parameter {full_name} should have the shape {shape}, but has "
                    f"{tuple(tensor.shape)}"
                )
            tensors[name] = tensor
        bound = cell.bind(tensors)
        bound.training = self.training
        return bound

    def with_cells(self, cells: Iterable[Cell] | None = None) -> Self:
        """Return a shallow copy of this module with the parameters of bound cells.

        Later changes of this module don't affect the copy, except in-place changes of parameters.

        Args:
            cells: One bound cell for each of the module's cells, in their order. None: the module's own cells
                with its current parameters.
        """
        cells = map(self._bind, self._cells) if cells is None else cells
        clone = object.__new__(type(self))
        vars(clone).update(vars(self))
        pairs = zip(self._named.values(), cells, strict=True)
        parameters = {full: getattr(cell, name) for named, cell in pairs for name, full, _ in named}
        others = {name: value for name, value in self._parameters.items() if name not in parameters}
        vars(clone)["_parameters"] = parameters | others
        vars(clone).pop("_frozen", None)
        vars(clone).pop("_packed", None)
        vars(clone).pop("_planned_calls", None)
        return clone

    def _run_planned(self, x: Any, state: Any) -> Any:
        """Run a call by its plan, and return its result, or None if it must run as usual."""
        plans: PlannedCalls | None = self.__dict__.get("_planned_calls")
        return None if plans is None else plans.run(self, x, state)

    def _note_call(self, x: Any, state: Any, signature: Signature) -> None:
        """Take note of a call that ran as usual, and make a plan if it comes again."""
        plans = self.__dict__.get("_planned_calls")
        if plans is None:  # also of modules that were saved before there were plans
            plans = self.__dict__["_planned_calls"] = PlannedCalls()
        plans.note(self, x, state, signature)

    def _state_tuple(self, state: State | None, label: str) -> tuple[Tensor, ...]:
        """Return the user's state as a tuple with one tensor for each state of the cell.

        Args:
            state: A tensor if the cell has one state, else a tuple of tensors.
            label: Name of the layer, for error messages.

        Raises:
            TypeError: If the state is anything else.
            InputError: If the number of tensors is wrong.
        """
        names = tuple(self._first.state)
        single = len(names) == 1
        states: Any = (state,) if single else state
        expected = "a tensor" if single else f"a tuple of {len(names)} tensors"
        if not isinstance(states, (tuple, list)) or not all(isinstance(part, Tensor) for part in states):
            raise TypeError(
                f"{label}: Expected the state ({', '.join(names)}) to be {expected}, got {_describe(state)}"
            )
        if len(states) != len(names):
            raise InputError(
                f"{label}: Expected the state ({', '.join(names)}) to be {expected}, got {len(states)}"
            )
        for part in states:
            if part.is_nested:
                raise InputError(f"{label}: a nested tensor is not supported as a state: pad it")
        return tuple(states)

    def _check_dtype_and_device(self, what: str, tensor: Tensor) -> None:
        """Raise InputError if a tensor's dtype or device differs from that of the parameters.

        Args:
            what: The tensor in words: ``"input"`` or which state it is.
            tensor: The tensor.
        """
        weight = next(iter(self._parameters.values()), None)
        if weight is None and (weight := next(self.parameters(), None)) is None:
            return
        if tensor.dtype == weight.dtype and tensor.device == weight.device:
            return
        what = f"{self._label} {what}"
        if tensor.device != weight.device:
            raise InputError(
                f"{what} is on {tensor.device} but the layer's parameters are on {weight.device}: move "
                f"it with .to({str(weight.device)!r})"
            )
        convertible = tensor.is_floating_point() or tensor.is_complex()
        if tensor.dtype != weight.dtype and not (
            convertible and transforms.autocast_enabled(weight.device.type)
        ):
            noun = "input" if what.endswith("input") else "state"
            raise InputError(
                f"{what} dtype ({tensor.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert {noun}: {noun}.to({weight.dtype})"
                + (f", or convert model: model.to({tensor.dtype})" if convertible else "")
            )

    def check_float(self, what: str) -> None:
        """Raise ValueError if the module is quantized.

        Args:
            what: The operation that doesn't support it, for the error message.
        """
        if self.weight_storage is not None:
            raise ValueError(
                f"{self._label}: {what} doesn't support {self.weight_storage.weights} weights. Pass the "
                "float32 module instead"
            )

    def _storage_arguments(self) -> list[str]:
        """Return the format of the weights of a quantized module, for its repr."""
        return [] if self.weight_storage is None else [f"weights={self.weight_storage.weights!r}"]

    def _check_no_gradients(self, *tensors: Tensor) -> None:
        """Raise InputError if a call of a quantized module would be differentiated."""
        assert self.weight_storage is not None
        error = f"{self._label} has {self.weight_storage.weights} weights, which don't support gradients, "
        tensors = (*tensors, *self.parameters())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise InputError(
                f"{error}but its input, its state or a parameter requires grad: call it in torch.no_grad()"
            )
        if torch.compiler.is_compiling() or not transforms.in_forward_mode():
            return
        duals = [unpack_dual(tensor) for tensor in tensors]  # type: ignore[no-untyped-call]
        if any(dual.tangent is not None for dual in duals):
            raise InputError(f"{error}but its input or its state has a tangent: detach it")

    def _run(
        self,
        run: Run,
        suffixes: list[str],
        steps: Tensor,
        initial_states: list[States | None],
        sizes: Any,
        draws: CallDraws,
    ) -> list[tuple[Tensor, States]]:
        """Run the cells with these suffixes.

        Args:
            run: Runs bound cells, as :func:`unrolled.engines.dispatch.run` does. If the steps draw random
                numbers, it is also given ``wrapper_specs`` and ``extra_inputs``.
            suffixes: The suffixes of the cells.
            steps: The input.
            initial_states: The initial states of each cell. None: zeros.
            sizes: The batch sizes if the input is packed, else None.
            draws: The random numbers of the call.

        Returns:
            The output and the final states of each cell.

        Raises:
            InputError: If the step fails because parameters have different dtypes or devices.
        """
        cells = [self._bind(suffix) for suffix in suffixes]
        if self.weight_storage is not None:
            self._check_no_gradients(steps, *(part for states in initial_states for part in states or ()))
        try:
            return run(cells, steps, initial_states, sizes, **draws.arguments(cells, steps, sizes))
        except RuntimeError as error:
            kinds: dict[tuple[Any, Any], str] = {}
            for cell, suffix in zip(cells, suffixes, strict=True):
                for name in cell.shapes():
                    tensor = getattr(cell, name)
                    kinds.setdefault((tensor.dtype, tensor.device), name + suffix)
            if len(kinds) <= 1:
                raise
            examples = " and ".join(f"{name} ({kind[0]}, {kind[1]})" for kind, name in kinds.items())
            raise InputError(
                f"{self._label} has parameters with different dtypes or devices, {examples}: convert all of "
                "them with .to()"
            ) from error


def _check_complex(cell: Cell, dtype: torch.dtype) -> None:
    """Raise ValueError if the cell's step fails with complex numbers."""
    params = {name: torch.zeros(shape, dtype=dtype, device="cpu") for name, shape in cell.shapes().items()}
    widths = cell.features, *cell.state_sizes().values()
    try:
        with torch.no_grad():
            cell.bind(params).step(*(torch.zeros(1, width, dtype=dtype, device="cpu") for width in widths))
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{type(cell).__name__} can't be computed in {dtype} ({reason}): use a real dtype, or write a "
            "cell with the real and imaginary parts as separate states"
        ) from None


def _check_no_parameters(cell: Cell) -> None:
    """Raise TypeError if a cell has a torch.nn parameter as an attribute, or a module that has parameters."""
    for owner in (*type(cell).__mro__, cell):
        for name, value in vars(owner).items():
            if isinstance(value, nn.Parameter) or (
                isinstance(value, nn.Module) and next(value.parameters(), None) is not None
            ):
                raise TypeError(
                    f"{type(cell).__name__}.{name} is a {type(value).__name__}, which a layer would neither "
                    f"train nor save: declare its parameters, such as {name} = unrolled.Param('hidden', "
                    "'input'), and use them with torch.nn.functional"
                )


def _describe(value: object) -> str:
    """Return the type of a value in words."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value)}"
    return f"a {type(value).__name__}"


@contextlib.contextmanager
def parametrizations_in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module's parametrizations in eval mode, where they neither draw numbers nor update buffers."""
    root: Any = getattr(module, "parametrizations", None)
    training = [child for child in root.modules() if child.training] if isinstance(root, nn.Module) else []
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
