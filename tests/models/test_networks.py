"""The networks of the literature against the reference's shapes, counts and logits."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from cakd_cli import models
from cakd_cli.errors import CakdError, InputError
from cakd_cli.models import ModelOptions

FOLDER = Path(__file__).parents[1] / "vectors"
REFERENCE = json.loads((FOLDER / "models.json").read_text())
LOGITS = load_file(FOLDER / "models.safetensors")
OWN = [name for name in models.names() if name not in ("torchvision", "timm")]


def build(name: str, in_channels: int = 3, num_classes: int = 100) -> torch.nn.Module:
    return (
        TypeAdapter(ModelOptions)
        .validate_python({"type": name})
        .build(in_channels=in_channels, num_classes=num_classes)
    )


def reference_name(name: str) -> str:
    named = {"mobilenet-v2": "MobileNetV2", "resnet50": "ResNet50"}
    return named.get(name, name.replace("shufflenet-v", "ShuffleV").replace("-", "_"))


def noise(count: int, tensor_number: int) -> torch.Tensor:
    """The reference's integer hash: values in [-1, 1) from positions alone."""
    x = (torch.arange(count) + 0x9E3779B9 * (tensor_number + 1)) % 2**32
    x ^= x >> 16
    x = (x * 0x7FEB352D) % 2**32
    x ^= x >> 15
    x = (x * 0x846CA68B) % 2**32
    x ^= x >> 16
    return 2 * (x.double() / 2**32) - 1


def reference_weights(name: str) -> dict[str, torch.Tensor]:
    state = {}
    for number, (key, shape) in enumerate(REFERENCE["models"][reference_name(name)]["state_dict"]):
        size = torch.Size(shape)
        value = noise(max(1, size.numel()), number).reshape(size)
        if key.endswith("num_batches_tracked"):
            value = torch.zeros((), dtype=torch.long)
        elif len(shape) >= 2:
            value = value * (6 / size[1:].numel()) ** 0.5
        elif key.endswith(("running_mean", "bias")):
            value = 0.1 * value
        elif key.endswith("running_var"):
            value = 1 + 0.2 * value
        else:
            value = 0.75 + 0.2 * value
        state[key] = value
    return state


def reference_images() -> torch.Tensor:
    fine = noise(2 * 3 * 32 * 32, 1000003).reshape(2, 3, 32, 32)
    coarse = noise(2 * 3 * 4 * 4, 1000004).reshape(2, 3, 4, 4)
    return fine + 2 * coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.mark.parametrize("name", OWN)
def test_parameters_and_shapes(name):
    model = build(name)
    expected = REFERENCE["models"][reference_name(name)]

    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == expected["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["parameters"]


@pytest.mark.parametrize("name", [name for name in OWN if reference_name(name) in REFERENCE["logits_for"]])
def test_logits(name):
    model = build(name).double().eval()
    models.load_state(model, reference_weights(name), source="reference")

    with torch.inference_mode():
        logits = model(reference_images())

    torch.testing.assert_close(logits, LOGITS[f"{reference_name(name)}.logits"], rtol=1e-9, atol=1e-9)


def test_enough_logits_are_compared():
    assert len(OWN) == 22
    assert sum(reference_name(name) in REFERENCE["logits_for"] for name in OWN) == 11


@pytest.mark.parametrize("name", ["resnet8", "wrn-16-1"])
def test_any_channels_classes_and_sizes(name):
    for channels, classes, size in ((1, 2, 8), (4, 7, 28), (3, 10, 64)):
        assert build(name, channels, classes)(torch.zeros(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "wrn-16-2"])
def test_memory_layout_does_not_change_the_answer(name):
    model, images = build(name).eval(), torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        expected = model(images)
        answer = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))

    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_others_are_read_without_running_their_code(tmp_path):
    model = build("resnet8")
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "a.pth")
    state = models.read_state(tmp_path / "a.pth")

    assert state.keys() == model.state_dict().keys()

    torch.save({"model": build}, tmp_path / "code.pth")
    with pytest.raises(InputError, match="not a file of plain tensors"):
        models.read_state(tmp_path / "code.pth")


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = build("resnet8", num_classes=10).state_dict()
    del state["conv1.weight"]
    state["extra"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")

    with pytest.raises(InputError, match=r"of another shape: fc.weight .*missing: conv1.weight; unknown: extra"):
        models.load_state(build("resnet8"), models.read_state(tmp_path / "w.safetensors"), source="w.safetensors")


def test_published_weights_fit_but_for_the_head():
    source = spec(type="torchvision", name="resnet18").build(in_channels=3, num_classes=1000).state_dict()
    model = spec(type="torchvision", name="resnet18").build(in_channels=3, num_classes=4)

    models.load_but_head(model, source, source="file")

    assert torch.equal(model.conv1.weight, source["conv1.weight"])
    assert model.fc.weight.shape == (4, 512)
    with pytest.raises(InputError, match=r"of another shape: conv1.weight"):
        models.load_but_head(model, source | {"conv1.weight": torch.zeros(1)}, source="file")


def spec(**options):
    return TypeAdapter(ModelOptions).validate_python(options)


def test_torchvision_and_timm_networks():
    for options in ({"type": "torchvision", "name": "mobilenet_v3_small"}, {"type": "timm", "name": "resnet10t"}):
        model = spec(**options).build(in_channels=3, num_classes=7)
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("options", "channels", "message"),
    [
        ({"type": "torchvision", "name": "resnet19"}, 3, "no classifier 'resnet19'"),
        ({"type": "torchvision", "name": "resnet18"}, 1, "takes 3 channels, the images have 1"),
        ({"type": "timm", "name": "resnet10x"}, 3, "no model 'resnet10x'"),
    ],
)
def test_wrong_names_are_answered(options, channels, message):
    with pytest.raises(CakdError, match=message) as caught:
        spec(**options).build(in_channels=channels, num_classes=10)
    assert caught.value.hint
