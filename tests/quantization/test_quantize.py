"""``quantize``: quantized modules are used like the original; invalid calls raise an error."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER
from helpers.sampling import sample

FORMATS = ["int8", "bfloat16", "float16"]
SAMPLED = sample(FORMATS, fast=["int8"])
LIMITS = {"int8": 0.03, "bfloat16": 0.01, "float16": 0.002}  # relative error of an output


class Model(nn.Module):
    """An embedding, a layer, a single-step cell and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.rnn = nn.GRU(16, 24, num_layers=2, bidirectional=True)
        self.cell = nn.LSTMCell(48, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        state = None
        for x in self.rnn(self.embedding(tokens))[0]:
            state = self.cell(x, state)
        assert state is not None
        return self.head(state[0])


def model() -> Model:
    return Model().eval()


def tokens() -> Tensor:
    return torch.randint(20, (9, 4))


def relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).detach().norm() / right.detach().norm())


@pytest.mark.parametrize("weights", SAMPLED)
def test_a_whole_model(weights: str) -> None:
    original, x = model(), tokens()
    before = copy.deepcopy(original.state_dict())
    quantized = ur.quantize(original, weights)
    assert 0 < relative(quantized(x), original(x)) < LIMITS[weights]
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert type(original.rnn) is nn.GRU
    assert original.rnn.weight_hh_l0.requires_grad
    assert not quantized(x).requires_grad
    assert f"weights='{weights}'" in repr(quantized.rnn)
    assert f"weights='{weights}'" in repr(quantized.cell)
    assert isinstance(quantized, Model)
    assert isinstance(quantized.rnn, ur.GRU)


@pytest.mark.parametrize("weights", SAMPLED)
def test_state_dicts_are_small_and_load(weights: str) -> None:
    quantized, other, x = ur.quantize(model(), weights), ur.quantize(model(), weights), tokens()
    state = quantized.state_dict()
    assert state["rnn.weight_hh_l1_reverse"].dtype is getattr(torch, weights)
    assert state["rnn.bias_hh_l0"].dtype is torch.float32
    assert ("rnn.weight_ih_l0_scale" in state) is (weights == "int8")
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), quantized(x))
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


@pytest.mark.slow
def test_a_state_dict_of_the_original_loads() -> None:
    original, x = model(), tokens()
    quantized = ur.quantize(model())
    quantized(x)  # packs the weights
    quantized.load_state_dict(original.state_dict())
    assert torch.equal(quantized(x), ur.quantize(original)(x))


def test_a_state_dict_without_scales_is_refused() -> None:
    quantized = ur.quantize(model())
    state = quantized.state_dict()
    del state["rnn.weight_ih_l0_scale"]
    with pytest.raises(ValueError, match=r"weight_ih_l0 in int8, but .*weight_ih_l0_scale is missing"):
        quantized.load_state_dict(state)


def test_a_state_dict_in_int8_needs_its_scales() -> None:
    """In a module that doesn't read them, whole numbers would become weights."""
    layer = ur.GRU(4, 6).eval()
    state = ur.quantize(layer).state_dict()
    for other in (copy.deepcopy(layer), ur.quantize(layer, quantize_input=False)):
        with pytest.raises(ValueError, match="has weight_ih_l0 in int8, but GRU has it in float"):
            other.load_state_dict(state, strict=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_state_dict_of_a_module_in_another_dtype(dtype: torch.dtype) -> None:
    quantized = ur.quantize(ur.GRU(4, 6).eval())
    expected = {name: value.clone() for name, value in quantized.named_parameters()}
    state = quantized.to(dtype).state_dict()
    assert state["weight_hh_l0"].dtype is torch.int8
    restored = ur.quantize(ur.GRU(4, 6).eval())
    restored.load_state_dict(state)
    for name, value in restored.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(duplicate: Callable[[Any], Any]) -> None:
    quantized, x = ur.quantize(model()), tokens()
    expected = quantized(x)
    other = duplicate(quantized)
    assert torch.equal(other(x), expected)
    with pytest.raises(ValueError, match="pass reference=model"):
        other.report([x])


@NEEDS_COMPILER
@pytest.mark.parametrize("weights", SAMPLED)
def test_streams_frozen_blocks_and_steps_have_the_same_bits(weights: str) -> None:
    quantized = ur.quantize(ur.LSTM(9, 14, num_layers=2).eval(), weights)
    x = torch.randn(11, 3, 9)
    with torch.no_grad(), ur.engine("native"):
        expected, final = quantized(x)
        stream = ur.Stream(quantized)
        chunks = torch.cat([stream(x[a:b]) for a, b in ((0, 1), (1, 2), (2, 7), (7, 11))])
        with ur.frozen(quantized):
            frozen = quantized(x)[0]
        state, steps = None, []
        for row in x:
            output, state = quantized.step(row, state)
            steps.append(output)
    assert torch.equal(chunks, expected)
    assert torch.equal(frozen, expected)
    assert torch.equal(torch.stack(steps), expected)
    assert state is not None
    assert torch.equal(state[1], final[1])


@NEEDS_COMPILER
def test_weights_stay_packed_between_calls() -> None:
    for module, x in ((ur.GRU(5, 7), torch.randn(1, 2, 5)), (ur.GRUCell(5, 7), torch.randn(2, 5))):
        quantized = ur.quantize(module.eval())
        calls = quantized._frozen if isinstance(module, ur.GRU) else quantized._packed
        with ur.engine("native"):
            first = quantized(x)
            assert calls(x, None) is not None
            quantized.weight_hh_l0.zero_() if isinstance(module, ur.GRU) else quantized.weight_hh.zero_()
            second = quantized(x)  # a change is noticed
        a, b = (value[0] if isinstance(value, tuple) else value for value in (first, second))
        assert a.shape == b.shape


@pytest.mark.slow
@NEEDS_COMPILER
def test_other_calls() -> None:
    """Options, packed sequences, learned states, projections and zoneout."""
    layer = ur.LSTM(6, 8, proj_size=3, bidirectional=True, initial_state="learned", zoneout=0.1).eval()
    quantized, x = ur.quantize(layer), torch.randn(5, 4, 6)
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3, 2, 1])
    calls: list[Callable[[Any], Any]] = [
        lambda one: one(x)[0],
        lambda one: one(x, lengths=torch.tensor([5, 0, 2, 3]))[0],
        lambda one: one(x, mask=torch.arange(20).view(5, 4) % 3 > 0)[0],
        lambda one: one(x, resets=torch.arange(20).view(5, 4) % 4 == 0, all_states=True)[2]["c"],
        lambda one: one(packed)[0].data,
        lambda one: one(x[:, 0])[0],
    ]
    for call in calls:
        for engine in ("native", "reference"):
            with ur.engine(engine):
                assert relative(call(quantized), call(layer)) < 0.03


@pytest.mark.slow
def test_layers_that_are_kept() -> None:
    original, x = model(), tokens()
    quantized = ur.quantize(original, keep=["rnn"])
    assert quantized.rnn.weight_storage is None
    assert quantized.cell.weight_storage is not None
    only_input = relative(quantized(x), original(x))
    assert 0 < only_input < relative(ur.quantize(original)(x), original(x)) + 0.01
    nested = nn.ModuleDict({"a": model(), "b": model()})
    nested.forward = None
    assert ur.quantize(nested, keep="a")["a"].rnn.weight_storage is None


@pytest.mark.slow
def test_products_of_the_input_stay_in_float32() -> None:
    original = ur.GRU(40, 30).eval()
    x = torch.randn(20, 3, 40)
    quantized = ur.quantize(original, quantize_input=False)
    assert set(quantized.weight_storage.dims) == {"weight_hh_l0"}
    assert torch.equal(quantized.weight_ih_l0, original.weight_ih_l0)
    expected = original(x)[0]
    assert relative(quantized(x)[0], expected) < relative(ur.quantize(original)(x)[0], expected)


@pytest.mark.slow
def test_calibration_fixes_the_scales() -> None:
    """The scales are those of the largest values, and values beyond them are clipped."""
    layer = ur.LSTM(12, 16).eval()
    x = torch.randn(30, 4, 12).clamp(-2, 2)
    x[:, :, 0] = 2
    quantized = ur.quantize(layer, calibration=[x, (x, None)])
    [wrapper] = quantized._cells.values()
    scale_of_x, scale_of_h = wrapper.arguments[2]
    largest = layer(x)[0][:-1].detach().abs().max()
    assert scale_of_x == pytest.approx(2 / 127)
    assert scale_of_h == pytest.approx(float(largest) / 127, rel=1e-5)
    assert relative(quantized(x)[0], layer(x)[0]) < 0.03
    with ur.engine("reference"):
        clipped = quantized(10 * x)[0]
        inside = quantized(torch.where(x.abs() < 0.2, 10 * x, 2 * x.sign()))[0]
    assert torch.allclose(clipped, inside, atol=0.02)  # values beyond the range count as its ends


@pytest.mark.slow
@NEEDS_COMPILER
def test_calibrated_layers_run_on_the_native_engine() -> None:
    layer, x = ur.GRU(7, 20, num_layers=2).eval(), torch.randn(9, 3, 7)
    quantized = ur.quantize(layer, calibration=[x])
    with ur.engine("reference"):
        expected = quantized(x)[0]
    with ur.engine("native"):
        assert relative(quantized(x)[0], expected) < 0.005


@pytest.mark.slow
def test_compiled_and_exported_models() -> None:
    quantized, x = ur.quantize(ur.LSTM(4, 6).eval()), torch.randn(5, 2, 4)
    expected = quantized(x)[0]
    assert torch.equal(torch.compile(quantized, backend="eager")(x)[0], expected)
    assert torch.equal(torch.export.export(quantized, (x,)).module()(x)[0], expected)


@pytest.mark.slow
def test_other_dtypes() -> None:
    layer, x = ur.GRU(4, 6).eval(), torch.randn(5, 2, 4)
    quantized, expected = ur.quantize(layer), layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(quantized(x)[0].float(), expected) < 0.03
    with pytest.warns(UserWarning, match="it has int8 weights, which need all values"):
        double = copy.deepcopy(quantized).double()(x.double())[0]
    assert double.dtype is torch.float64
    assert relative(double, expected.double()) < 0.03


class Elementwise(ur.Cell):
    """A cell without matrix products."""

    state = ("h",)
    decay = ur.Param("hidden")

    def step(self, x: Tensor, h: Tensor) -> Any:
        h = x * self.decay + h
        return h


def changed(**values: Any) -> Callable[[], Any]:
    def layer() -> Any:
        module = ur.LSTM(3, 4).eval()
        for name, value in values.items():
            getattr(module, name).data.view(-1)[1] = value
        return module

    return layer


X = torch.randn(5, 2, 3)
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "no module": (lambda: 3, {}, TypeError, "expects a torch.nn.Module, got int"),
    "format": (changed(), {"weights": "int4"}, ValueError, "weights should be 'int8' or .*, got 'int4'"),
    "no layer": (lambda: nn.Linear(2, 3), {}, ValueError, "Linear has no recurrent layer"),
    "no products": (lambda: ur.Recurrent(Elementwise, 3, 3).eval(), {}, ValueError, "no recurrent layer"),
    "training": (lambda: ur.LSTM(3, 4), {}, ValueError, r"LSTM is in training mode: call .eval\(\)"),
    "float64": (lambda: ur.LSTM(3, 4).eval().double(), {}, ValueError, "be float32, got torch.float64: call"),
    "lazy": (lambda: ur.LSTM(None, 4).eval(), {}, ValueError, "no weights yet: run the model once"),
    "meta": (lambda: ur.LSTM(3, 4, device="meta").eval(), {}, ValueError, "on the CPU, but is on meta"),
    "nan": (changed(weight_hh_l0=torch.nan), {}, ValueError, "weight_hh_l0 contains NaN or infinity"),
    "large": (changed(weight_hh_l0=1e6), {"weights": "float16"}, ValueError, "float16 only reaches 65504"),
    "twice": (lambda: ur.quantize(ur.LSTM(3, 4).eval()), {}, ValueError, "already has int8 weights"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(ur.LSTM(3, 4), "weight_hh_l0").eval(),
        {}, ValueError, "weight_hh_l0 isn't a parameter, .*: remove that",
    ),
    "keep": (changed(), {"keep": ["head"]}, ValueError, "keep contains 'head', which isn't a rec"),
    "keep all": (lambda: nn.Sequential(nn.GRU(2, 3)).eval(), {"keep": "0"}, ValueError, r"in keep \(0\)"),
    "keep 3": (changed(), {"keep": [3]}, TypeError, "keep should be a list of layer names, got 3"),
    "quantize_input": (changed(), {"quantize_input": 1}, TypeError, "should be a bool, got int"),
    "calibration": (changed(), {"calibration": X}, TypeError, r"got Tensor: pass calibration=\[x\]"),
    "no batches": (changed(), {"calibration": []}, ValueError, "calibration is empty"),
    "nan batch": (changed(), {"calibration": [X, X * torch.nan]}, ValueError, "batch 1 contains NaN"),
    "shape": (changed(), {"calibration": [X[..., :2]]}, ValueError, "batch 0 can't be passed .* got 2"),
    "16 bits": (changed(), {"weights": "bfloat16", "calibration": [X]}, ValueError, "needs weights='int8'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    create, arguments, error, message = REFUSED[case]
    module = create()
    with pytest.raises(error, match=message) as raised:
        ur.quantize(module, **arguments)
    assert "\n" not in str(raised.value)


def test_calls_for_training_are_refused() -> None:
    quantized = ur.quantize(ur.LSTM(3, 4).eval())
    with pytest.raises(ValueError, match="LSTM has int8 weights, which can't be trained"):
        quantized.train()(X)
    with pytest.raises(ValueError, match="LSTMCell has int8 weights, which can't be trained"):
        ur.quantize(ur.LSTMCell(3, 4).eval()).train()(X[0])
    quantized.eval()
    with pytest.raises(ValueError, match=r"don't support gradients, .*: call it in torch.no_grad\(\)"):
        quantized(X.clone().requires_grad_())
    with torch.no_grad():
        quantized(X.clone().requires_grad_())


def test_what_needs_the_float_layer() -> None:
    quantized = ur.quantize(ur.LSTM(3, 4).eval())
    with pytest.raises(ValueError, match="trace doesn't support int8 weights"):
        ur.trace(quantized, X)
    with pytest.warns(UserWarning, match="it has int8 weights"):
        ur.revert(quantized)
