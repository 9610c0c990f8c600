"""The networks of the literature against the reference's shapes, counts and logits."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from cakd_cli import models
from cakd_cli.errors import CakdError, InputError, RecipeError
from cakd_cli.models import ModelOptions, saving
from cakd_cli.models.initial import initial_network
from cakd_cli.models.preprocessing import Preprocessing

FOLDER = Path(__file__).parents[1] / "vectors"
REFERENCE = json.loads((FOLDER / "models.json").read_text())
LOGITS = load_file(FOLDER / "models.safetensors")
OWN = [name for name in models.names() if name not in ("torchvision", "timm", "python")]


def build(name: str, in_channels: int = 3, num_classes: int = 100) -> torch.nn.Module:
    return (
        TypeAdapter(ModelOptions)
        .validate_python({"type": name})
        .build(in_channels=in_channels, num_classes=num_classes)
    )


def reference_name(name: str) -> str:
    named = {
        "mobilenet-v2": "MobileNetV2",
        "mobilenet-v2-tiny-imagenet": "MobileNetV2_tinyimagenet",
        "resnet18": "ResNet18",
        "resnet50": "ResNet50",
    }
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


@pytest.mark.parametrize("name", [name for name in OWN if reference_name(name) in REFERENCE["models"]])
def test_parameters_and_shapes(name):
    expected = REFERENCE["models"][reference_name(name)]
    model = build(name, num_classes=expected["num_classes"])

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
    assert len(OWN) == 26
    assert sum(reference_name(name) in REFERENCE["logits_for"] for name in OWN) == 12
    assert {name for name in OWN if reference_name(name) not in REFERENCE["models"]} == {"resnet34", "mobilenet-v1"}


def like(theirs: torch.nn.Module, own: torch.nn.Module) -> torch.nn.Module:
    """Give another library's network the weights of ours, in their order, but for the biases that it does not have."""
    names = dict(own.named_modules())
    values = [
        value
        for name, value in own.state_dict().items()
        if not (name.endswith(".bias") and isinstance(names[name.removesuffix(".bias")], torch.nn.Conv2d))
    ]
    state = theirs.double().eval().state_dict()
    assert [value.numel() for value in state.values()] == [value.numel() for value in values]
    theirs.load_state_dict({name: value.reshape(state[name].shape) for name, value in zip(state, values, strict=True)})
    return theirs


def lively(name: str) -> torch.nn.Module:
    """A network in whose answer every weight can be seen, but for the biases of convolutions."""
    torch.manual_seed(5)
    model = build(name).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                torch.nn.init.uniform_(tensor, 0.8, 1.2)
            for tensor in (module.bias, module.running_mean):
                torch.nn.init.normal_(tensor, std=0.1)
        elif isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            torch.nn.init.zeros_(module.bias)
    return model


@torch.inference_mode()
def test_resnet34_is_torchvisions_but_for_the_stem():
    model = lively("resnet34")
    theirs = torchvision.models.resnet34(num_classes=100)
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()

    torch.testing.assert_close(model(reference_images()), like(theirs, model)(reference_images()))


@torch.inference_mode()
def test_mobilenet_v1_is_timms_but_for_its_activation():
    model = lively("mobilenet-v1")
    theirs = timm.create_model("mobilenetv1_100", num_classes=100, act_layer=torch.nn.ReLU)
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)

    torch.testing.assert_close(model(images), like(theirs, model)(images))
    assert models.num_parameters(build("mobilenet-v1", num_classes=1000)) == 4_231_976


@torch.inference_mode()
def test_mobilenet_v2_for_tiny_imagenet_is_torchvisions_but_for_its_beginning():
    model = lively("mobilenet-v2-tiny-imagenet")
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1))
    theirs = torchvision.models.mobilenet_v2(num_classes=100, inverted_residual_setting=stages)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    begun = model.stage1(model.pre(images))

    # Their first bottleneck does not widen; ours does, by 1.
    own = [*(model.get_submodule(f"stage{number}") for number in range(2, 8)), model.conv1, model.conv2]
    rest = like(torch.nn.Sequential(theirs.features[2:], theirs.classifier), torch.nn.Sequential(*own))

    assert begun.shape == (2, 16, 66, 66)
    torch.testing.assert_close(model(images), rest[1](rest[0](begun).mean((2, 3))))


@pytest.mark.parametrize("name", ["resnet8", "wrn-16-1", "resnet18", "mobilenet-v1", "mobilenet-v2-tiny-imagenet"])
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


def test_published_weights_by_name():
    default = spec(type="torchvision", name="resnet50", pretrained=True)
    first = spec(type="torchvision", name="resnet50", pretrained="IMAGENET1K_V1")
    other = spec(type="torchvision", name="vit_b_16", pretrained="IMAGENET1K_SWAG_LINEAR_V1")

    assert first.origin == "torchvision's published weights IMAGENET1K_V1"
    assert default.origin == "torchvision's published weights"
    assert first.architecture == default.architecture
    assert (first.label, other.label) == ("torchvision:resnet50", "torchvision:vit_b_16")
    assert (
        first.published_form()[:3]
        == other.published_form()[:3]
        == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (3, 224, 224))
    )


def test_the_named_weights_are_those_that_are_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fetched = []
    state = spec(type="torchvision", name="resnet50").build(in_channels=3, num_classes=1000).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, **options: fetched.append(url) or state
    )
    first, second, default = (
        spec(type="torchvision", name="resnet50", pretrained=pretrained)
        for pretrained in ("IMAGENET1K_V1", "IMAGENET1K_V2", True)
    )

    assert "resnet50-0676ba61.pth" in first.missing_file()
    assert default.missing_file() == second.missing_file() != first.missing_file()
    model = first.published(in_channels=3, num_classes=7)
    assert [url.rpartition("/")[2] for url in fetched] == ["resnet50-0676ba61.pth"]
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert not list(tmp_path.iterdir())


def test_a_saved_network_says_which_weights_it_began_with(tmp_path):
    began = spec(type="torchvision", name="resnet18", pretrained="IMAGENET1K_V1")
    shown = Preprocessing((3, 32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    network = began.build(in_channels=3, num_classes=2)

    saving.write(tmp_path, saving.SavedModel(network.eval(), began, ("cat", "dog"), shown, {}))

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["cakd"]["model"]["pretrained"] == "IMAGENET1K_V1"
    assert config["architecture"] == "cakd_torchvision_resnet18"
    assert saving.read(tmp_path).spec == began


def test_a_run_is_where_another_begins_whatever_its_classes(tmp_path):
    began = spec(type="resnet8")
    network = began.build(in_channels=1, num_classes=4).eval()
    shown = Preprocessing((1, 8, 8), (0.5,), (0.25,))
    saving.write(tmp_path, saving.SavedModel(network, began, tuple("abcd"), shown, {}))
    again = spec(type="resnet8", weights=str(tmp_path))

    same, other = (initial_network(again, torch.zeros(1, 1, 8, 8), classes) for classes in (4, 7))

    assert all(torch.equal(value, same.state_dict()[name]) for name, value in network.state_dict().items())
    assert torch.equal(other.conv1.weight, network.conv1.weight)
    assert other(torch.zeros(1, 1, 8, 8)).shape == (1, 7)
    with pytest.raises(InputError, match="the weights do not fit the network"):
        initial_network(spec(type="resnet20", weights=str(tmp_path)), torch.zeros(1, 1, 8, 8), 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no such weights file"):
        initial_network(spec(type="resnet8", weights=str(tmp_path / "empty")), torch.zeros(1, 1, 8, 8), 4)


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
        ({"type": "torchvision", "name": "resnet50", "pretrained": "V1"}, 3, "no weights 'V1' of resnet50"),
        # Weights of the features alone do not classify.
        (
            {"type": "torchvision", "name": "vgg16", "pretrained": "IMAGENET1K_FEATURES"},
            3,
            "no weights 'IMAGENET1K_FEATURES' of vgg16",
        ),
        ({"type": "timm", "name": "resnet10x"}, 3, "no model 'resnet10x'"),
    ],
)
def test_wrong_names_are_answered(options, channels, message):
    with pytest.raises(CakdError, match=message) as caught:
        spec(**options).build(in_channels=channels, num_classes=10)
    assert caught.value.hint


def test_a_wrong_name_of_weights_is_answered_with_those_that_exist():
    wrong = spec(type="torchvision", name="resnet50", pretrained="IMAGENET1K_V3")
    for ask in (wrong.missing_file, wrong.published_form, lambda: wrong.published(in_channels=3, num_classes=10)):
        with pytest.raises(RecipeError, match="torchvision has no weights 'IMAGENET1K_V3' of resnet50") as caught:
            ask()
        assert caught.value.hint == "choose from IMAGENET1K_V1, IMAGENET1K_V2"
