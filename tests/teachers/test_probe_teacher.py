"""A teacher that is a backbone and a linear classifier fitted to the training images."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from torch.nn import functional
from torchvision import models

from cakd_cli.evaluation.predict import predict
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models import linear
from cakd_cli.models.layers import Tap, Tapped
from cakd_cli.models.linear import Labelled, best_linear
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import load_teacher
from tests.conftest import write_tensors_file

CPU = choose_hardware("cpu", "fp32")
LEARN = ("--student", "resnet8", "--epochs", 1, "--batch-size", 16, "data.crop_padding=0", "engine.precision=fp32")
NAME = "test_vit3.r160_in1k"  # of 160 pixels, and 96 features


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    return write_tensors_file(tmp_path_factory.mktemp("colour") / "colour.safetensors", channels=3, size=16)


@pytest.fixture(scope="module")
def weights(timm, tmp_path_factory):
    """Weights of a network of timm with the classifier that it was published with."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(timm.create_model(NAME).state_dict(), path)
    return path


def load(backbone, data, *words):
    flags = {"data": f"tensors:{data}", "model": "resnet8", "teacher": f"probe:{backbone}"}
    recipe = resolve([*words], flags)
    loaded = recipe.data.load()
    return load_teacher(recipe.teacher, loaded, CPU), loaded


def logits_of(teacher, split):
    return predict(teacher.model, split, Normalisation(teacher.mean, teacher.std, CPU), CPU, batch_size=50)


@pytest.fixture(scope="module")
def of_timm(colour, weights, tmp_path_factory):
    """The teacher, fitted once, the data, and where the classifier is kept."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("kept")
        patch.setenv("CAKD_HOME", str(home))
        yield *load(f"timm:{NAME}", colour, f"teacher.weights={weights}"), home


def test_its_features_are_the_librarys(timm, weights, of_timm):
    teacher, data, _ = of_timm
    (batch,) = data.test.ordered_batches(batch_size=len(data.test), device=CPU.device)
    network = timm.create_model(NAME, num_classes=0)
    network.load_state_dict({name: x for name, x in load_file(weights).items() if not name.startswith("head.")})
    config = timm.get_pretrained_cfg(NAME)
    images = functional.interpolate(batch.images.float() / 255, (160, 160), mode="bilinear", antialias=True)
    shown = (images - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(3, 1, 1)
    with torch.no_grad():
        features = network.eval()(shown)

    tapped = teacher.with_taps((Tap(),), data, CPU)

    own = Normalisation(teacher.mean, teacher.std, CPU)(batch.images)
    with torch.no_grad():
        found = Tapped(teacher.model, tapped.taps)(own)[str(tapped.taps[0])]
    torch.testing.assert_close(found, features, atol=1e-5, rtol=1e-5)
    assert tapped.shapes["input of classifier"] == (96,)


def test_it_is_as_good_as_it_says(of_timm):
    teacher, data, _ = of_timm
    logits, labels = logits_of(teacher, data.validation)

    top1 = (logits.argmax(1) == labels).double().mean()

    assert top1 > 0.9  # bright quarters are seen by any backbone
    begin = f"probe:timm:{NAME}: a linear classifier of 96 features, fitted to 144 training images"
    assert teacher.notes[0].startswith(f"{begin}: top-1 {top1:.1%} of 16 held-out images, which chose its penalty")
    assert teacher.mapped is None


def test_the_classifier_is_the_optimum_of_the_features_as_they_are():
    generator = torch.Generator().manual_seed(0)
    train_ND = 3 + 5 * torch.randn(200, 6, generator=generator)
    labels_N = ((train_ND - 3) @ torch.randn(6, 3, generator=generator)).argmax(1)
    train, held_out = Labelled(train_ND[:150], labels_N[:150]), Labelled(train_ND[150:], labels_N[150:])

    classifier, penalty = best_linear(train, held_out, 3, penalties=(0.01,))

    mean, std = (statistic.double().numpy() for statistic in (train.features.mean(0), train.features.std(0)))
    scaled, rows = (train.features.double().numpy() - mean) / std, np.arange(150)

    def loss(flat):
        logits = scaled @ flat[:18].reshape(3, 6).T + flat[18:]
        log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        return (log_sum - logits[rows, train.labels.numpy()]).mean() + 0.005 * (flat[:18] ** 2).sum()

    found = minimize(loss, np.zeros(21), method="BFGS", options={"gtol": 1e-7}).x
    expected = ((held_out.features.double().numpy() - mean) / std) @ found[:18].reshape(3, 6).T + found[18:]
    logits = classifier(held_out.features).numpy()
    assert penalty == 0.01
    assert logits - logits.mean(1, keepdims=True) == pytest.approx(expected - expected.mean(1, keepdims=True), abs=1e-2)


def test_the_penalty_is_the_best_on_held_out_images():
    """Labels of noise: the largest penalty says the least, and that is the best."""
    generator = torch.Generator().manual_seed(0)
    train, held_out = (
        Labelled(torch.randn(60, 8, generator=generator), torch.randint(0, 3, (60,), generator=generator))
        for _ in range(2)
    )

    assert best_linear(train, held_out, 3)[1] == max(linear.PENALTIES)


def test_a_second_student_has_the_same_teacher_without_another_fit(colour, weights, of_timm, monkeypatch):
    teacher, _, home = of_timm
    monkeypatch.setenv("CAKD_HOME", str(home))

    def fitted_again(*arguments):
        raise AssertionError

    monkeypatch.setattr("cakd_cli.teachers.probe._Fit.made", fitted_again)
    again, _ = load(f"timm:{NAME}", colour, f"teacher.weights={weights}")
    assert (again.weights_hash, again.notes) == (teacher.weights_hash, teacher.notes)
    # Of other training images it is another.
    with pytest.raises(AssertionError):
        load(f"timm:{NAME}", colour, f"teacher.weights={weights}", "data.split_seed=1")


def test_a_damaged_classifier_is_fitted_again(toy_teacher, toy_file, home):
    first, _ = load(toy_teacher, toy_file)
    (kept,) = (home / "probes").iterdir()
    whole = kept.read_bytes()

    for damaged in (b"x", b"", whole[:-8], whole.replace(b"figures", b"figurez")):
        kept.write_bytes(damaged)
        again, _ = load(toy_teacher, toy_file)
        assert (again.weights_hash, again.notes) == (first.weights_hash, first.notes)
        assert kept.read_bytes() == whole


def test_a_full_disk_costs_no_more_than_the_next_fit(toy_teacher, toy_file, home):
    home.write_text("no folder")

    teacher, data = load(toy_teacher, toy_file)

    logits, labels = logits_of(teacher, data.test)
    assert (logits.argmax(1) == labels).double().mean() > 0.9


def test_where_nothing_is_held_out_some_training_images_choose_the_penalty(toy_teacher, toy_file):
    teacher, _ = load(toy_teacher, toy_file, "data.validation_fraction=0")

    assert "fitted to 144 training images" in teacher.notes[0]
    assert "of 16 held-out images" in teacher.notes[0]


@pytest.mark.slow
def test_networks_of_torchvision_lose_their_classifier(colour, tmp_path):
    torch.manual_seed(0)
    network = models.resnet18()
    torch.save(network.state_dict(), tmp_path / "net.pth")

    teacher, data = load("torchvision:resnet18", colour, f"teacher.weights={tmp_path / 'net.pth'}")

    assert teacher.with_taps((Tap("stage4"), Tap()), data, CPU).shapes == {
        "logits": (4,),
        "backbone.layer4": (512,),
        "input of classifier": (512,),
    }


def test_a_run_learns_from_it_and_goes_on(cakd, toy_teacher, toy_file, tmp_path):
    """From features too: it is a network like any other."""
    words = ("--data", f"tensors:{toy_file}", "--teacher", f"probe:{toy_teacher}", *LEARN)

    planned = cakd("distill", *words, "--dry-run")
    first = cakd("distill", *words, "--out", tmp_path / "a")
    second = cakd("distill", *words, "--out", tmp_path / "b")

    assert (planned.code, first.code, second.code) == (0, 0, 0), planned.err + first.err + second.err
    assert f"probe:{toy_teacher}: its classifier is not fitted before the run begins" in planned.err
    assert f"probe:{toy_teacher}: a linear classifier of 64 features" in first.err
    assert f"teacher probe:{toy_teacher}: top-1 100.0% of 16 held-out images" in first.err
    lines = [(tmp_path / run / "metrics.jsonl").read_text().partition('"train"')[2] for run in "ab"]
    assert lines[0] == lines[1] != ""
    measured = cakd("eval", tmp_path / "a", "--teacher", f"probe:{toy_teacher}", "--json").document
    assert measured["teacher"]["name"] == f"probe:{toy_teacher}"


WRONG = [
    ("probe:timm:", (), 3, "'timm:' lacks its name; write probe:timm:NAME"),
    ("probe:torchvision:resnet8", (), 3, "torchvision has no classifier 'resnet8'"),
    ("probe:nowhere", (), 4, "no such run directory: nowhere"),
    ("probe:{run}", ("teacher.weights=net.pth",), 3, "is for a network of timm or torchvision, and the backbone is"),
    ("probe:torchvision:resnet18", ("teacher.weights=none.pth",), 4, "no such weights file: none.pth"),
    ("probe:{run}", ("--data", "tensors:{colour}"), 3, "takes images of 1 channels, those of colour have 3"),
    ("probe:{run}", ("--data", "unlabelled:{pictures}"), 3, "learns from one label an image, and training images of"),
    ("probe:timm:test_vi", (), 3, "timm has no model 'test_vi'"),
    ("probe:timm:" + NAME, ("teacher.weights={run}/model.safetensors",), 4, "the weights do not fit timm:" + NAME),
]


@pytest.mark.parametrize(("teacher", "words", "code", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_probe_is_one_error(cakd, toy_teacher, toy_file, colour, tmp_path, teacher, words, code, message):
    if "timm" in teacher:
        pytest.importorskip("timm")
    from PIL import Image

    for name in ("train", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(20):
            Image.new("L", (8, 8), 5 * number).convert("RGB").save(tmp_path / name / f"{number}.png")
    places = {"run": toy_teacher, "colour": colour, "pictures": tmp_path}
    words = [str(word).format(**places) for word in ("--teacher", teacher, *words)]

    result = cakd("distill", "--data", f"tensors:{toy_file}", *LEARN[:6], "loss=[{type: kd}]", *words, "--dry-run")

    assert (result.code, message in result.err) == (code, True), result.err
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1
