"""A network that rounds while it trains as the 8-bit file will."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.testing import assert_close

from cakd_cli.engine import build
from cakd_cli.engine.distributed import Ranks
from cakd_cli.errors import RecipeError
from cakd_cli.models import int8, saving
from cakd_cli.models.resnet import ResNetSpec
from cakd_cli.recipe.resolve import resolve
from tests.conftest import write_tensors_file
from tests.engine.test_resume import assert_same_run, killed_after, lines


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ResNetSpec(type="resnet8").build(in_channels=3, num_classes=5)


RANGES = {
    "both signs": random(4, 3, 5, 5),
    "positive": random(4, 3, 5, 5).abs() + 1,
    "negative": -random(4, 3, 5, 5).abs() - 1,
    "far to one side": random(4, 3, 5, 5) * 1e-3 + 40,
    "small": random(4, 3, 5, 5) * 1e-20,
    "zero": torch.zeros(4, 3, 5, 5),
}


@pytest.mark.parametrize("values", RANGES.values(), ids=RANGES)
def test_an_input_is_rounded_as_onnxruntime_does(values):
    tools = pytest.importorskip("onnxruntime.quantization").quant_utils
    array = values.numpy()
    limits = (np.array(limit, dtype=np.uint8) for limit in (0, 255))
    zero, scale = tools.compute_scale_zp(array.min(), array.max(), *limits)
    integers = tools.quantize_nparray(2, array, scale, zero)  # 2 is ONNX's uint8

    expected = (integers.astype(np.float32) - np.float32(zero)) * scale
    # Divided in another precision, a value in the middle between two may go to the other.
    assert_close(int8.rounded_input(values), torch.from_numpy(expected), rtol=1e-5, atol=float(scale) / 1000)


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (6, 1, 3, 3), (6, 10)])
def test_a_weight_is_rounded_by_output_channel(shape):
    weight = random(*shape)
    weight[2] = 0
    expected = weight.clone()
    for channel in expected:
        scale = channel.abs().max() / 64
        if scale > 0:
            channel.copy_((channel / scale).round() * scale)

    assert_close(int8.rounded_weight(weight), expected)
    assert all(len(channel.unique()) <= 129 for channel in int8.rounded_weight(weight))


def test_a_factor_on_a_channel_changes_no_integer():
    """A batch norm may be folded before or after."""
    weight, factors = random(6, 3, 3, 3), random(6, 1, 1, 1)

    assert_close(int8.rounded_weight(weight * factors), int8.rounded_weight(weight) * factors)


@pytest.mark.parametrize("round_", [int8.rounded_weight, int8.rounded_input])
def test_rounding_has_the_gradient_one(round_):
    values, upstream = random(4, 6).requires_grad_(), random(4, 6)
    round_(values).backward(upstream)

    assert_close(values.grad, upstream)


def test_half_precision_is_rounded_in_float32():
    assert int8.rounded_input(random(4, 6).bfloat16()).dtype == torch.float32


def naive(network, images):
    """Round what each layer takes, and its weight, from outside."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            with torch.no_grad():
                module.weight.copy_(int8.rounded_weight(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: int8.rounded_input(inputs[0]))
    return copied(images)


def test_it_rounds_in_training_alone_and_keeps_its_state(network):
    images, plain = random(8, 3, 16, 16), copy.deepcopy(network)
    expected = naive(plain.train(), images)
    int8.train_in_int8(network, name="resnet8")

    assert_close(network.train()(images), expected)
    assert list(network.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(images), plain.eval()(images))
    copied = copy.deepcopy(network).train()
    with torch.no_grad():
        copied.fc.weight.zero_()
    assert not torch.equal(copied(images), network.train()(images)), "a copy has weights of its own"


def test_what_trained_rounded_bears_it_better(monkeypatch):
    """Of five values a weight, where rounding hurts, against as many steps without it."""
    monkeypatch.setattr(int8, "WEIGHT_LARGEST", 2)
    torch.manual_seed(0)
    inputs, network = random(256, 8), nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    labels = inputs[:, :4].argmax(1)

    def trained(model, steps, learning_rate):
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        return model

    def rounded(model):
        int8.train_in_int8(model, name="its net")
        return model

    trained(network, 100, 0.1)
    after, during = copy.deepcopy(network), rounded(copy.deepcopy(network))
    after, during = rounded(trained(after, 50, 0.02)), trained(during, 50, 0.02)
    losses = [functional.cross_entropy(model(inputs), labels).item() for model in (during, after)]
    assert losses[0] < 0.8 * losses[1]


def test_on_a_gpu_it_would_not_wait():
    """A value that the host reads raises there."""
    with FakeTensorMode(), torch.device("cuda"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
        int8.train_in_int8(model, name="its net")
        assert model(torch.zeros(8, 3, 4, 4)).device.type == "cuda"


class Own(nn.Conv2d):
    """A layer that a library derived, as timm's Conv2dSame."""


@pytest.mark.parametrize(
    ("module", "where"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.MultiheadAttention(4, 2)), "1.in_proj_weight"),
        (nn.Sequential(nn.Linear(3, 4), Own(3, 4, 1)), "1.weight"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 1)), "0.weight"),
    ],
)
def test_weights_that_would_not_be_rounded_are_refused(module, where):
    with pytest.raises(RecipeError, match=rf"its net has weights in other layers than .*: {where}") as refused:
        int8.train_in_int8(module, name="its net")
    assert "cakd export --format onnx-int8 needs no training" in refused.value.hint


def test_several_processes_are_refused():
    recipe = resolve(["engine.quantize=int8"], {"data": "digits", "model": "resnet8"})
    with pytest.raises(RecipeError, match="one process measures the range of what it rounds; this run has 2"):
        build._check_ranks(recipe, Ranks(rank=0, count=2))


@pytest.fixture
def words(toy_file, toy_teacher):
    """A finished run is trained further."""
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    words = (*words, f"model.weights={toy_teacher}", "--loss", "kd", "--epochs", 1, "--batch-size", 24)
    return (*words, "--device", "cpu", "optimizer.learning_rate=0.01")


def test_a_run_that_was_killed_ends_as_one_that_was_not(cakd, words, tmp_path):
    words = (*words, "engine.quantize=int8", "engine.checkpoint_seconds=0")
    assert cakd(*words, "--out", tmp_path / "whole").code == 0
    with killed_after(3):
        cakd(*words, "--out", tmp_path / "killed")
    assert cakd("distill", "--resume", "--out", tmp_path / "killed").code == 0

    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_what_is_saved_is_a_float_network(cakd, words, toy_teacher, tmp_path):
    run, plain = tmp_path / "run", tmp_path / "plain"
    assert cakd(*words, "--out", run, "engine.quantize=int8").code == 0
    assert cakd(*words, "--out", plain).code == 0

    saved = load_file(run / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in saved.items()} == {
        name: tensor.dtype for name, tensor in load_file(toy_teacher / "model.safetensors").items()
    }
    assert type(saving.read(run).model.conv1) is nn.Conv2d
    recorded = json.loads((run / "run.json").read_text())["metrics"]["test"]
    assert cakd("eval", run, "--json").document["quality"]["top1"] == recorded["top1"]
    assert lines(run)[0]["train"] != lines(plain)[0]["train"], "it was rounded"


WRONG = [
    (3, "engine.quantize: no 'int4' here; did you mean int8?", ("engine.quantize=int4",)),
    (3, "engine.quantise: unknown key; did you mean quantize?", ("engine.quantise=int8",)),
    (4, "no such weights file: none.safetensors", ("engine.quantize=int8", "model.weights=none.safetensors")),
]


@pytest.mark.parametrize(("code", "message", "more"), WRONG, ids=[message[:40] for _, message, _ in WRONG])
def test_wrong_words_get_one_clear_error(cakd, words, tmp_path, code, message, more):
    result = cakd(*words, *more, "--out", tmp_path / "run")

    assert result.code == code, result.err
    assert message in " ".join(result.err.split())
    assert "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_as_it_began(cakd, toy_teacher):
    result = cakd("train-teacher", "--resume", "--out", toy_teacher, "engine.quantize=int8")

    assert result.code == 3
    assert "engine.quantize: 'off' in the run, 'int8' now" in result.err


@pytest.mark.slow
def test_a_network_with_attention_is_refused(cakd, tmp_path):
    pytest.importorskip("timm")
    data = write_tensors_file(tmp_path / "toy.safetensors", channels=3, size=160)
    words = ("train-teacher", "--data", f"tensors:{data}", "--model", "timm:test_vit", "engine.quantize=int8")
    result = cakd(*words, "--out", tmp_path / "run")

    assert result.code == 3
    assert "timm:test_vit has weights in other layers" in result.err
    assert not (tmp_path / "run").exists()
