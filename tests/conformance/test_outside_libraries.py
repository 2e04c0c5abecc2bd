"""The table in docs/other_libraries.md: what other libraries do with a converted model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close

PAGE = Path(__file__).parents[2] / "docs" / "other_libraries.md"
ROWS = re.findall(r"^\| (?!library \|)(\S.*?) \|", PAGE.read_text(), re.MULTILINE)

pytestmark = [
    pytest.mark.slow,
    NEEDS_COMPILER,
    pytest.mark.filterwarnings("ignore"),  # those of other libraries
]


class Model(nn.Module):
    """A layer, a cell and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4, num_layers=2, batch_first=True)
        self.cell = nn.GRUCell(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)[0]
        result: Tensor = self.head(self.cell(output[:, -1]))
        return result


def models() -> tuple[Model, Any]:
    """Return a model of torch.nn, and the same model converted, with parameters of its own."""
    model = Model()
    return model, ur.convert(copy.deepcopy(model))


def x() -> Tensor:
    return torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    model(x()).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """Compare the results and the gradients of two models."""
    assert_close(actual(x()), expected(x()), 1e-5)
    assert_close(gradients(actual), gradients(expected), 1e-4)


def torch_compile() -> None:
    theirs, ours = models()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=False):
        assert_same(torch.compile(ours, fullgraph=True, backend="aot_eager"), theirs)  # type: ignore[arg-type]


def torch_export() -> None:
    theirs, ours = models()
    sizes = ({0: torch.export.Dim("batch", max=9), 1: torch.export.Dim("time", max=9)},)
    exported = torch.export.export(ours, (x(),), dynamic_shapes=sizes)
    longer = torch.randn(4, 8, 3)
    assert_close(exported.module()(longer), theirs(longer), 1e-5)
    assert sum("recurrence" in str(node.target) for node in exported.graph.nodes) == 3


def torch_jit_script() -> None:
    theirs, ours = models()
    with pytest.raises(Exception, match="unrolled"):
        torch.jit.script(ours)
    assert_close(torch.jit.trace(ours, (x(),))(x()), theirs(x()), 1e-5)
    assert_close(torch.jit.script(ur.revert(ours))(x()), theirs(x()), 1e-5)


def torch_fx() -> None:
    theirs, ours = models()
    kinds = [[node.op for node in fx.symbolic_trace(model).graph.nodes] for model in (theirs, ours)]
    assert kinds[0] == kinds[1]
    assert_same(fx.symbolic_trace(ours), theirs)


def torch_onnx_export(folder: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    theirs, ours = models()
    for dynamo in (False, True):
        torch.onnx.export(ours.eval(), (x(),), folder / "model.onnx", dynamo=dynamo, verbose=False)
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        [output] = session.run(None, {session.get_inputs()[0].name: x().numpy()})
        assert_close(torch.from_numpy(output), theirs(x()), 1e-5)
        for layer, options in (
            (ur.Recurrent(ur.cells.MGU, 3, 4), {}),
            (ours.layer, {"lengths": torch.tensor([5, 3])}),
            (ur.LSTM(3, 4, initial_state="learned"), {}),
        ):
            other = Caller(layer, options).eval(), (x(),), folder / "other.onnx"
            if not dynamo:
                message = r"Pass dynamo=True. Or export the layer with unrolled.io.to_onnx"
                with pytest.raises(Exception, match=message):
                    torch.onnx.export(*other, dynamo=False, verbose=False)
                continue
            torch.onnx.export(*other, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(other[2], providers=["CPUExecutionProvider"])
            [output] = session.run(None, {session.get_inputs()[0].name: x().numpy()})
            assert_close(torch.from_numpy(output), other[0](x()), 1e-5)


class Caller(nn.Module):
    """Calls a layer with options."""

    def __init__(self, layer: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x, **self.options)[0]
        return output


def flop_counter_mode() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in models():
        with FlopCounterMode(display=False) as counter:
            model.double()(x().double()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def dynamic_quantization() -> None:
    _, ours = models()
    kinds = {nn.LSTM, nn.GRUCell, nn.Linear}
    quantized = torch.ao.quantization.quantize_dynamic(ours, kinds)
    assert (type(quantized.layer), type(quantized.cell)) == (ur.LSTM, ur.GRUCell)
    assert type(quantized.head) is not nn.Linear
    reverted = torch.ao.quantization.quantize_dynamic(ur.revert(ours), kinds)
    assert type(reverted.layer).__module__.startswith("torch.ao.nn.quantized")
    assert_close(reverted(x()), ours(x()), 0.1)


def pruning() -> None:
    theirs, ours = models()
    for model in (theirs, ours):
        torch.manual_seed(0)
        prune.random_unstructured(model.layer, "weight_hh_l1", 0.5)
        prune.l1_unstructured(model.cell, "weight_ih", 0.5)
    assert_same(ours, theirs)
    expected, expected_gradients = theirs(x()), gradients(theirs)
    assert type(ur.convert(theirs).layer) is ur.LSTM
    assert_close(theirs(x()), expected, 1e-5)
    assert_close(gradients(theirs), expected_gradients, 1e-4)


def parametrizations_of_weights() -> None:
    theirs, ours = models()
    for model in (theirs, ours):
        parametrizations.weight_norm(model.layer, "weight_hh_l0")
        parametrizations.weight_norm(model.cell, "weight_ih")
    assert_same(ours, theirs)
    with pytest.warns(UserWarning, match="it has parametrizations"):
        assert ur.convert(theirs).layer is theirs.layer


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """Start the smallest process group: this process."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed with gloo isn't available")
    torch.distributed.init_process_group("gloo", f"file://{folder / 'group'}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def distributed_data_parallel(folder: Path) -> None:
    theirs, ours = models()
    with process_group(folder):
        assert_same(nn.parallel.DistributedDataParallel(ours), theirs)


def fully_shard_of_layers(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    theirs, ours = models()
    with process_group(folder):
        mesh = init_device_mesh("cpu", (1,))
        for module in (ours.layer, ours):
            fully_shard(module, mesh=mesh)
        assert isinstance(ours.layer.weight_hh_l0, DTensor)
        assert_close(ours(x()), theirs(x()), 1e-5)
        actual = [grad.full_tensor() for grad in gradients(ours)]  # type: ignore[attr-defined]
        assert_close(actual, gradients(theirs), 1e-4)


def averaged_model() -> None:
    from torch.optim.swa_utils import AveragedModel

    theirs, ours = models()
    averages = [AveragedModel(model) for model in (theirs, ours)]
    for average in averages:
        average.update_parameters(average.module)
    assert_close(averages[1](x()), averages[0](x()), 1e-5)


def safetensors_files(folder: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    theirs, ours = models()
    files.save_model(ours, str(folder / "ours.safetensors"))
    files.load_model(fresh := Model(), str(folder / "ours.safetensors"))
    assert_same(ours, fresh)
    assert_same(ours, theirs)


def lightning(folder: Path) -> None:
    library = pytest.importorskip("lightning")

    class Module(library.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.model(batch[0]).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 5, 3)), batch_size=4)
    trained = []
    for model in models():
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": True}
        trainer = library.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=folder, **options)
        trainer.fit(module := Module(model), data)
        trainer.save_checkpoint(folder / "last.ckpt")
        trained.append(module)
    state = torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
    (fresh := Module(Model())).load_state_dict(state)
    assert_close(fresh.model(x()), trained[1].model(x()), 1e-5)
    assert_close(trained[1].model(x()), trained[0].model(x()), 1e-4)


def transformers() -> None:
    library = pytest.importorskip("transformers")
    model = library.EncodecModel(library.EncodecConfig(num_filters=4, hidden_size=16, codebook_size=32))

    def is_initialized(model: Any) -> bool:
        layers = [module for module in model.modules() if isinstance(module, (nn.LSTM, ur.LSTM))]
        assert layers
        for layer in layers:
            nn.init.ones_(layer.bias_hh_l0)
            library.PreTrainedModel._init_weights(model, layer)
        return all(not layer.bias_hh_l0.any() for layer in layers)

    assert is_initialized(model)
    assert is_initialized(ur.convert(copy.deepcopy(model), keep_types=True))
    assert not is_initialized(ur.convert(copy.deepcopy(model)))


def torchrl() -> None:
    modules, tensordict = pytest.importorskip("torchrl.modules"), pytest.importorskip("tensordict")

    is_init = torch.zeros(2, 5, 1, dtype=torch.bool)
    is_init[:, 0] = is_init[0, 3] = True  # in the first row, a second trajectory

    def run(lstm: nn.Module) -> Tensor:
        data = {"x": x(), "is_init": is_init.clone()}
        module = modules.LSTMModule(lstm=lstm, in_key="x", out_key="y")
        with modules.set_recurrent_mode(True):
            return module(tensordict.TensorDict(data, [2, 5]))["y"]  # type: ignore[no-any-return]

    layer = nn.LSTM(3, 4, batch_first=True)
    for keep_types in (False, True):
        assert_close(run(ur.convert(layer, keep_types=keep_types)), run(layer), 1e-5)


def captum() -> None:
    attribution = pytest.importorskip("captum.attr")
    theirs, ours = models()
    results = [attribution.IntegratedGradients(model).attribute(x(), target=1) for model in (ours, theirs)]
    assert_close(results[0], results[1], 1e-4)


def opacus() -> None:
    validators = pytest.importorskip("opacus.validators")
    layers = pytest.importorskip("opacus.layers")
    _, ours = models()
    assert type(validators.ModuleValidator.fix(copy.deepcopy(ours)).layer) is ur.LSTM
    assert isinstance(validators.ModuleValidator.fix(ur.revert(ours)).layer, layers.DPLSTM)


def pytorch_forecasting() -> None:
    recurrent = pytest.importorskip("pytorch_forecasting.models.nn")
    layer = recurrent.LSTM(3, 4, batch_first=True)
    converted = ur.convert(layer)
    assert isinstance(converted, ur.LSTM)
    lengths = torch.tensor([5, 3])
    assert_close(converted(x(), lengths=lengths)[0], layer(x(), lengths=lengths)[0], 1e-5)


CHECKS: dict[str, Callable[..., None]] = {
    "`torch.compile`": torch_compile,
    "`torch.export`": torch_export,
    "`torch.jit.script`": torch_jit_script,
    "`torch.fx`": torch_fx,
    "`torch.onnx.export`": torch_onnx_export,
    "`FlopCounterMode`": flop_counter_mode,
    "dynamic quantization": dynamic_quantization,
    "pruning": pruning,
    "parametrizations": parametrizations_of_weights,
    "`DistributedDataParallel`": distributed_data_parallel,
    "`fully_shard`": fully_shard_of_layers,
    "`AveragedModel`": averaged_model,
    "safetensors": safetensors_files,
    "Lightning": lightning,
    "transformers": transformers,
    "TorchRL": torchrl,
    "Captum": captum,
    "Opacus": opacus,
    "pytorch-forecasting": pytorch_forecasting,
}


def test_every_row_has_a_test() -> None:
    assert list(CHECKS) == ROWS


@pytest.mark.parametrize("row", CHECKS)
def test_row(row: str, tmp_path: Path) -> None:
    check = CHECKS[row]
    if check.__code__.co_argcount:
        check(tmp_path)
    else:
        check()
