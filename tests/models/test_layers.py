"""Layers by name: what a tapped network answers, and a whole run that learns from features."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from cakd_cli import models
from cakd_cli.errors import RecipeError
from cakd_cli.machine import compiling
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models.layers import LOGITS, Tap, Tapped, locate, preactivation, stages
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import forms
from cakd_cli.teachers.forms import Form
from tests.conftest import some_daily, train_toy
from tests.engine.test_resume import assert_same_run, killed_after
from tests.teachers.test_forms import used_teacher

CPU = choose_hardware("cpu", "fp32")
FEATURES = Tap("fc", of_input=True)


@pytest.fixture
def network():
    return used_teacher("resnet8", CPU).model


@pytest.fixture
def images():
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def naive(network, images):
    """The last map, by the network's own pieces."""
    x = functional.relu(network.bn1(network.conv1(images)))
    return network.layer3(network.layer2(network.layer1(x)))


def test_a_network_answers_with_its_logits_and_what_each_tap_gives(network, images):
    found = locate(network, [Tap("layer2"), Tap(""), Tap("layer3.0", "map")], 10, images[:1], name="it")

    answers = Tapped(network, found.taps)(images)

    assert found.shapes == {LOGITS: (10,), "layer2": (32,), "input of fc": (64,), "layer3.0 as map": (64, 4, 4)}
    assert {name: tuple(answer.shape[1:]) for name, answer in answers.items()} == found.shapes
    assert found.taps[1] == FEATURES
    assert_close(answers[LOGITS], network(images))
    assert_close(answers["input of fc"], naive(network, images).mean((2, 3)))
    assert_close(answers[LOGITS], network.fc(answers["input of fc"]))
    stem = functional.relu(network.bn1(network.conv1(images)))
    assert_close(answers["layer3.0 as map"], network.layer3[0](network.layer2(network.layer1(stem))))


def test_maps_are_averaged_in_float32(network, images):
    tapped = Tapped(network, [Tap("layer1"), Tap("layer1", "map")])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = tapped(images)

    assert answers["layer1"].dtype == torch.float32
    assert torch.equal(answers["layer1"], answers["layer1 as map"].mean((2, 3)))
    assert not torch.equal(answers["layer1"], answers["layer1"].bfloat16().float())


def test_stages_have_names_of_their_own(network, images):
    found = locate(network, [Tap("stage2", "map"), Tap("stage3")], 10, images[:1], name="it")

    assert [tap.layer for tap in found.taps] == ["layer2", "layer3"]


@pytest.mark.parametrize("name", [name for name in models.names() if name not in ("torchvision", "timm", "python")])
def test_every_network_of_ours_names_its_stages(name):
    network = resolve([], {"data": "digits", "model": name}).model.build(in_channels=3, num_classes=10)
    found = locate(network, [Tap(stage, "map") for stage in stages(network)], 10, torch.zeros(1, 3, 32, 32), name="it")

    sizes = [found.shapes[str(tap)][1] for tap in found.taps]
    assert len(sizes) >= 3
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet8", "wrn-16-1", "vgg8", "mobilenet-v1", "mobilenet-v2", "mobilenet-v2-tiny-imagenet"),
        *("shufflenet-v1", "shufflenet-v2", "torchvision:resnet18"),
    ],
)
def test_class_maps_average_to_the_logits_without_their_bias(name):
    network = resolve([], {"data": "digits", "model": name}).model.build(in_channels=3, num_classes=10).eval()
    _make_lively(network)
    found = locate(network, [Tap("", "class maps"), Tap("", "map")], 10, torch.zeros(1, 3, 32, 32), name="it")
    classifier = network.get_submodule(found.taps[0].classifier)
    nn.init.normal_(classifier.bias)
    answers = Tapped(network, found.taps)(torch.randn(2, 3, 32, 32))
    maps, features = (answers[str(tap)] for tap in found.taps)

    assert maps.shape[1:] == found.shapes[str(found.taps[0])] == (10, *features.shape[2:])
    assert_close(maps.mean((2, 3)) + classifier.bias, answers[LOGITS])
    weight = classifier.weight.flatten(1)
    assert_close(maps, torch.einsum("bdhw,cd->bchw", features, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet8", "resnet8x4", "resnet18", "resnet34", "resnet50"),
        *("vgg8", "mobilenet-v1", "shufflenet-v1", "torchvision:resnet18"),
    ],
)
def test_a_stage_is_the_relu_of_what_it_was_before(name):
    network = resolve([], {"data": "digits", "model": name}).model.build(in_channels=3, num_classes=10).eval()
    _make_lively(network)
    names = list(stages(network))
    taps = [Tap(stage, form) for stage in names for form in ("map", "preactivation")]
    found = locate(network, taps, 10, torch.zeros(1, 3, 32, 32), name="it")
    answers = Tapped(network, found.taps)(torch.randn(2, 3, 32, 32))

    for after, before in zip(found.taps[::2], found.taps[1::2], strict=True):
        assert (answers[str(before)] < 0).any()
        assert_close(answers[str(after)], answers[str(before)].relu())


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *(("wrn-16-1", 3), ("mobilenet-v1", 4), ("mobilenet-v2", 4), ("mobilenet-v2-tiny-imagenet", 4)),
        *(("vgg8", 4), ("resnet18", 4), ("resnet20", 3)),
    ],
)
def test_the_norm_before_the_activation(name, number):
    network = resolve([], {"data": "digits", "model": name}).model.build(in_channels=3, num_classes=10).eval()
    _make_lively(network)
    names = list(stages(network))
    assert len(names) == number
    for stage in names:
        layer, norm = preactivation(network, stage, "it")
        assert isinstance(network.get_submodule(norm), nn.BatchNorm2d)
        found = locate(network, [Tap(stage, "preactivation")], 10, torch.zeros(1, 3, 32, 32), name="it")
        (tap,) = found.taps
        answers = Tapped(network, [tap, Tap(norm, "map")])(torch.randn(2, 3, 32, 32))
        assert tap.layer == layer
        if "resnet" in name:  # the shortcut comes after the norm
            assert tap.of_input
            assert answers[str(tap)].shape == answers[f"{norm} as map"].shape
        elif "mobilenet-v2" not in name or stage == "stage4":  # elsewhere MobileNetV2 has a shortcut
            assert_close(answers[str(tap)], answers[f"{norm} as map"])


def _make_lively(network):
    """Give norms something to do: fresh ones would leave signs to the convolutions alone."""
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.1)


def test_a_network_that_does_not_tell_what_comes_before_its_activations(images):
    network = resolve([], {"data": "digits", "model": "shufflenet-v2"}).model.build(in_channels=3, num_classes=10)

    with pytest.raises(RecipeError, match="it does not tell what 'stage2' is before its last activation"):
        locate(network, [Tap("stage2", "preactivation")], 10, images[:1], name="it")


def test_stages_of_the_network_for_tiny_imagenet_are_counted_as_in_the_literature(images):
    network = resolve([], {"data": "digits", "model": "mobilenet-v2-tiny-imagenet"}).model
    network = network.build(in_channels=3, num_classes=10).eval()
    taps = [Tap("stage1", "map"), Tap("stage4", "map"), Tap("stage4", "preactivation"), Tap("")]
    found = locate(network, taps, 10, images[:1], name="it")
    answers = Tapped(network, found.taps)(images)

    assert [tap.layer for tap in found.taps] == ["stage2", "conv1", "conv1.1", "conv2"]
    assert_close(answers["conv1 as map"], functional.relu6(answers["conv1.1 as map"]))
    assert_close(answers[LOGITS], network.conv2(answers["input of conv2"]))


def test_a_vector_is_not_a_map(network, images):
    with pytest.raises(RecipeError, match="layer 'fc' of it gives 10 numbers an image, not a map"):
        locate(network, [Tap("fc", "map")], 10, images[:1], name="it")


def test_grad_cam_of_the_last_map_is_its_classifiers_weight(network, images):
    answers = Tapped(network, [Tap("layer1"), Tap("layer3"), Tap("layer3", "importance")])(images)

    last = naive(network, images)
    # d logit / d map is the weight of the predicted class, shared by all positions of the mean.
    gradient = network.fc.weight[answers[LOGITS].argmax(1)] / (last.shape[2] * last.shape[3])
    assert_close(answers["layer3 by grad-cam"], (gradient[:, :, None, None] * last).relu().mean((2, 3)))
    assert_close(answers["layer3"], last.mean((2, 3)))


def test_grad_cam_reaches_through_later_taps(network, images):
    first = Tap("layer1", "importance")
    alone = Tapped(network, [first])(images)
    both = Tapped(network, [first, Tap("layer3", "importance")])(images)

    assert_close(both[str(first)], alone[str(first)])
    assert alone[str(first)].abs().sum() > 0


def test_tapping_changes_neither_the_network_nor_its_weights_names(network, images):
    before, names = network(images), list(network.state_dict())

    tapped = Tapped(network, [FEATURES])
    tapped(images)

    assert torch.equal(network(images), before)
    assert list(network.state_dict()) == names
    tapped.close()
    assert not network.fc._forward_pre_hooks


def test_a_copy_tells_itself(network, images):
    tapped = Tapped(network, [FEATURES])
    other = copy.deepcopy(tapped)
    alone = copy.deepcopy(network)
    with torch.no_grad():
        other.network.conv1.weight.mul_(2)

    assert not torch.equal(other(images)[LOGITS], tapped(images)[LOGITS])
    assert_close(other(images)["input of fc"], naive(other.network, images).mean((2, 3)))
    assert_close(tapped(images)["input of fc"], naive(network, images).mean((2, 3)))
    assert_close(alone(images), network(images))


@pytest.mark.parametrize("importance", [False, True])
def test_what_follows_in_place_does_not_touch_what_was_heard(images, importance):
    """The block adds its shortcut to this batch norm's output and cuts it at 0, both in place."""
    network = resolve([], {"data": "digits", "model": "torchvision:resnet18"}).model
    network = network.build(in_channels=3, num_classes=10).eval()
    taps = [Tap("layer4.1.bn2"), *([Tap("layer4.1.bn2", "importance")] if importance else [])]
    found = locate(network, taps, 10, images[:1], name="it")

    answers = Tapped(network, found.taps)(images)

    told = []
    network.layer4[1].bn2.register_forward_hook(lambda module, inputs, output: told.append(output.clone()))
    logits = network(images)
    assert len(answers) == len(found.shapes) == 2 + importance
    assert_close(answers[LOGITS], logits)
    assert_close(answers["layer4.1.bn2"], told[0].mean((2, 3)))
    assert (answers["layer4.1.bn2"] < 0).any()


def test_channels_may_come_last(images):
    class Last(torch.nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.fc = Last(), torch.nn.Linear(3, 10)

        def forward(self, x):
            return self.fc(self.last(x).mean((1, 2)))

    found = locate(Network(), [Tap("last"), Tap("")], 10, images[:1], name="it")
    answers = Tapped(Network(), found.taps)(images)

    assert found.shapes == {LOGITS: (10,), "last": (3,), "input of fc": (3,)}
    assert_close(answers["last"], images.mean((2, 3)))


@pytest.mark.parametrize("layer", ["layer2", "layer3.0.conv2"])
def test_inner_layers_keep_the_teacher_plain(cakd, words, tmp_path, layer):
    pair = "{student: layer2, teacher: " + layer + "}"
    loss = "loss.2={type: cakd-features, mask: activation, layers: [" + pair + "]}"

    asked = cakd(*words, loss, "engine.teacher_form=folded", "--out", tmp_path / "run")

    assert asked.code == 3
    assert "the teacher cannot take the form 'folded': layers inside a network are not what they were" in asked.err
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.slow
def test_compiled_rows_are_the_same(network, images):
    tapped = Tapped(network, [FEATURES, Tap("layer2")])

    answers = compiling.compiled(tapped, graphed=False)(images)

    for name, answer in tapped(images).items():
        assert_close(answers[name], answer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["folded", "folded-nchw"])
def test_a_folded_teacher_gives_the_same_features(form):
    teacher = used_teacher("wrn-16-1", CPU)
    found = locate(teacher.model, [Tap("")], 10, torch.zeros(1, 3, 16, 16), name="it")
    teacher = replace(teacher, taps=found.taps, shapes=found.shapes)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)

    plain, folded = (Form(teacher, name, CPU).answers_to(images) for name in ("plain", form))

    assert plain["input of fc"].shape == (4, 64)
    assert forms._distance(folded, plain) < 1e-5
    folded["input of fc"] = folded["input of fc"] * 1.1
    assert forms._distance(folded, plain) > 0.05


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Tap("layer9"), "it has no layer 'layer9'"),
        (Tap("unused"), "layer 'unused' of it cannot be tapped: a tapped layer was not used"),
        (Tap("pair"), "layer 'pair' of it cannot be tapped"),
        (Tap("network.layer2", "class maps"), "cannot be tapped: it has 32 channels, and the classifier takes 64"),
        (Tap("network.fc", "class maps"), "cannot be tapped: it has 10 channels, and the classifier takes 64"),
        (Tap("", "class maps"), "it does not tell which map its classifier sees the average of"),
    ],
)
def test_layers_that_cannot_be_tapped(network, images, layer, message):
    class Pair(torch.nn.Module):
        def forward(self, x):
            return x, x

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.unused, self.pair = network, torch.nn.Linear(3, 3), Pair()

        def forward(self, x):
            return self.network(self.pair(x)[0])

    with pytest.raises(RecipeError, match=message):
        locate(Odd(), [layer], 10, images[:1], name="it")


@pytest.mark.parametrize(
    ("layer", "hint"),
    [
        ("layr1", "did you mean layer1"),
        ("blocks", "choose from first, layer1, stage1 (or a layer inside one)"),
        ("layer1.activation", "choose from layer1.0, layer1.1 (or"),
        ("first.deeper", "first has no layers inside"),
    ],
)
def test_a_wrong_layer_is_answered_with_those_beside_it(images, layer, hint):
    network = torch.nn.Sequential()
    network.add_module("first", torch.nn.Flatten())
    network.add_module("layer1", torch.nn.Sequential(torch.nn.ReLU(), torch.nn.LazyLinear(10)))

    with pytest.raises(RecipeError) as caught:
        locate(network, [Tap(layer)], 10, images[:1], name="it")

    assert hint in caught.value.hint


def test_a_network_without_a_linear_classifier(images):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    with pytest.raises(RecipeError, match="it has no linear classifier of 10 classes") as caught:
        locate(network, [Tap("")], 10, images[:1], name="it")

    assert "--loss cakd-logits" in caught.value.hint


# Whole runs.


@pytest.fixture(scope="session")
def wide_teacher(toy_file, tmp_path_factory):
    return train_toy(toy_file, tmp_path_factory.mktemp("wide") / "teacher", model="resnet8x4")


@pytest.fixture
def words(toy_file, wide_teacher):
    return (
        *("distill", "--data", f"tensors:{toy_file}", "--teacher", wide_teacher, "--student", "resnet8"),
        *("--epochs", 2, "--batch-size", 16, "--device", "cpu", "engine.checkpoint_seconds=0"),
    )


LAYERS = (
    "{type: cakd-features, layers: [{student: layer2, teacher: layer2}, {student: layer3, teacher: layer3}], mask: %s}"
)


@pytest.mark.parametrize(
    "loss", [None, "{type: cakd-features, mask: grad-cam}", LAYERS % "grad-cam", LAYERS % "activation"]
)
def test_the_connector_is_trained_and_never_saved(cakd, words, tmp_path, loss):
    result = cakd(*words, *([f"loss.2={loss}"] if loss else []), "--out", tmp_path / "run")

    assert result.code == 0, result.err
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["train"]["feature_scd"] > 0
    plain = resolve([], {"data": "digits", "model": "resnet8"}).model.build(in_channels=1, num_classes=4)
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(plain.state_dict())
    assert cakd("eval", tmp_path / "run").code == 0


@pytest.mark.slow
def test_a_run_on_features_asks_nobody_what_another_has_asked(cakd, words, tmp_path):
    logits = cakd(*words, "--out", tmp_path / "logits", "--loss", "kd")
    first = cakd(*words, "--out", tmp_path / "one")
    second = cakd(*words, "--out", tmp_path / "two", "optimizer.learning_rate=0.03")
    layers = cakd(*words, "--out", tmp_path / "layers", f"loss.2={LAYERS % 'activation'}")
    narrow = cakd(*words, "--out", tmp_path / "narrow", "--loss", "kd", "engine.teacher_memory_gb=0.0001")

    assert [run.code for run in (logits, first, second, layers, narrow)] == [0] * 5
    assert sum(asked(tmp_path / "logits")) > 0
    # The classifier's input is kept beside the logits, whoever asks.
    assert sum(asked(tmp_path / "one")) == sum(asked(tmp_path / "two")) == 0
    # Other layers are another memory, and so are logits where there is room for them alone.
    assert sum(asked(tmp_path / "layers")) > 0
    assert sum(asked(tmp_path / "narrow")) > 0
    listed = cakd("teacher-memory", "list", "--json").document
    assert sorted(row["says"] for row in listed) == ["logits", "logits, input of fc", "logits, layer2, layer3"]


def asked(path):
    return [json.loads(line)["teacher"]["asked"] for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("moment", some_daily([4, 13], 4))
def test_killed_and_resumed_with_a_connector(cakd, words, tmp_path, moment):
    assert cakd(*words, "--out", tmp_path / "straight").code == 0
    with killed_after(moment):
        cakd(*words, "--out", tmp_path / "killed")
    assert cakd(*words, "--out", tmp_path / "killed", "--resume").code == 0

    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_a_wrong_layer_is_told_before_anything_is_written(cakd, words, tmp_path):
    layers = LAYERS.replace("student: layer3", "student: layr3") % "activation"

    result = cakd(*words, f"loss.2={layers}", "--out", tmp_path / "run")

    assert result.code == 3
    assert "the student has no layer 'layr3'" in result.err
    assert "did you mean layer3" in result.err
    assert not (tmp_path / "run").exists()


def test_a_learnt_temperature(cakd, words, tmp_path):
    result = cakd(*words, "--loss", "ctkd", "--epochs", 4, "--out", tmp_path / "run")

    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    temperatures = [line["train"]["temperature"] for line in lines]
    # 1 + 20 sigmoid(1) at first; nothing is reversed in the first epoch, so only weight decay moves it.
    assert temperatures[0] == pytest.approx(15.6, abs=0.1)
    assert len(set(temperatures)) == 4
    assert lines[0]["weights"]["1.ctkd.reversal"] == 0


@pytest.mark.parametrize(
    ("loss", "part"), [("cat-kd", "cat_kd"), pytest.param("sdd-dkd", "sdd_dkd", marks=pytest.mark.slow)]
)
def test_a_run_learns_from_class_maps(cakd, words, tmp_path, loss, part):
    result = cakd(*words, "--loss", loss, "--out", tmp_path / "run", "optimizer.learning_rate=0.01")

    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[1]["train"][part] < lines[0]["train"][part]
    (row,) = cakd("teacher-memory", "list", "--json").document
    assert row["says"] == "logits, layer3 as class maps"


def test_class_maps_of_other_classes_cannot_be_compared(cakd, words, tmp_path):
    (tmp_path / "map.yaml").write_text("class 0: 0\nclass 1: 2\nclass 2: 1\nclass 3: 3\n")

    result = cakd(*words, "--loss", "cat-kd", f"class_map={tmp_path / 'map.yaml'}", "--out", tmp_path / "run")

    assert (result.code, "tells other classes apart than those of" in result.err) == (3, True), result.err
    assert not (tmp_path / "run").exists()


def test_fitnet_learns_from_maps(cakd, words, tmp_path):
    assert cakd(*words, "--loss", "fitnet", "--out", tmp_path / "straight").code == 0
    with killed_after(13):
        cakd(*words, "--loss", "fitnet", "--out", tmp_path / "killed")
    result = cakd(*words, "--loss", "fitnet", "--out", tmp_path / "killed", "--resume")

    assert result.code == 0, result.err
    # The connector's batch norm goes on as well.
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["train"]["fitnet"] < lines[0]["train"]["fitnet"]
    assert sum(asked(tmp_path / "straight")) > 0
    (row,) = cakd("teacher-memory", "list", "--json").document
    assert row["says"] == "logits, layer2 as map"
    with safe_open(tmp_path / "straight" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "connector" in name]  # noqa: SIM118 - not a mapping


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("{student: stage9, teacher: stage2}", "the student has no layer 'stage9'"),
        ("{student: fc, teacher: stage2}", "layer 'fc' of the student gives 4 numbers an image, not a map"),
        (
            "{student: stage3, teacher: stage1}",
            "fitnet does not fit: no convolution leads from a map of 2",
        ),
    ],
)
def test_maps_that_do_not_fit_are_explained(cakd, words, tmp_path, pair, message):
    result = cakd(
        *words, f"loss=[{{type: cross-entropy}}, {{type: fitnet, layers: [{pair}]}}]", "--out", tmp_path / "run"
    )

    assert (result.code, message in result.err) == (3, True), result.err
    assert not (tmp_path / "run").exists()
