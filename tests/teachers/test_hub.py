"""Teachers of other libraries: folders as they save them, the hub's cache, and their own pretrained networks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from cakd_cli.evaluation.predict import predict
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import load_teacher
from tests.conftest import write_tensors_file

CPU = choose_hardware("cpu", "fp32")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TRAIN = ("--student", "resnet8", "--epochs", 1, "--batch-size", 16, "data.crop_padding=0")


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    return write_tensors_file(tmp_path_factory.mktemp("colour") / "colour.safetensors", channels=3, size=16)


def labelled(colour):
    """All images and labels of training, as a library's own loop would have them."""
    data = resolve([], {"data": f"tensors:{colour}", "model": "resnet8"}).data.load()
    (batch,) = data.train.ordered_batches(batch_size=len(data.train), device=torch.device("cpu"))
    return data, batch.images, batch.labels


def prepared(images, size):
    """What the library's own pipeline would show, at the size of the network."""
    pixels = functional.interpolate(images.float() / 255, (size, size), mode="bilinear", antialias=True)
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def fit_head(network, answer, images, labels, size):
    """Train a tiny network until it is better than chance."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    shown, labels = prepared(images[:64], size), labels[:64]
    for _ in range(30):
        loss = functional.cross_entropy(answer(shown), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


@pytest.fixture(scope="module")
def of_timm(colour, tmp_path_factory):
    """A folder as timm saves it, and the network."""
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network = timm.create_model("test_resnet.r160_in1k", num_classes=4, in_chans=3)
    _, images, labels = labelled(colour)
    fit_head(network, network, images, labels, 32)
    folder = tmp_path_factory.mktemp("timm") / "net"
    network.pretrained_cfg.update(input_size=(3, 32, 32), mean=MEAN, std=STD)
    labels = {"num_classes": 4, "label_names": [f"class {i}" for i in range(4)]}
    save_for_hf(network, folder, labels, safe_serialization=True)
    return folder, network


@pytest.fixture(scope="module")
def of_transformers(colour, tmp_path_factory):
    """A folder as transformers saves it, of classes in another order, and the network."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        id2label={0: "Class_3", 1: "class 1", 2: "class 2", 3: "class 0", 4: "a fifth"},
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.ResNetForImageClassification(config)
    _, images, labels = labelled(colour)
    own = torch.tensor([3, 1, 2, 0])[labels]
    fit_head(network, lambda shown: network(pixel_values=shown).logits, images, own, 24)
    folder = tmp_path_factory.mktemp("transformers") / "net"
    network.save_pretrained(folder)
    shown = {
        "image_mean": MEAN,
        "image_std": STD,
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 24, "width": 24},
        "do_center_crop": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(shown))
    return folder, network


def logits_of(teacher, images, data):
    normalise = Normalisation(teacher.mean, teacher.std, CPU)
    found, _ = predict(teacher.model, data.train, normalise, CPU, batch_size=len(images))
    return found


def load(words, data):
    return load_teacher(resolve([], {"data": "digits", "model": "resnet8", "teacher": str(words)}).teacher, data, CPU)


def test_a_folder_of_timm_answers_as_timm_does(of_timm, colour):
    folder, network = of_timm
    data, images, _ = labelled(colour)

    teacher = load(folder, data)

    with torch.no_grad():
        expected = network(prepared(images, 32))
    torch.testing.assert_close(logits_of(teacher, images, data), expected, atol=1e-5, rtol=1e-5)
    assert teacher.notes == (f"the teacher test_resnet of {folder} sees images of 32 x 32, resized from 16 x 16",)
    assert teacher.mapped is None


def test_a_folder_of_transformers_answers_as_transformers_does(of_transformers, colour):
    folder, network = of_transformers
    data, images, _ = labelled(colour)

    teacher = load(folder, data)

    with torch.no_grad():
        expected = network(pixel_values=prepared(images, 24)).logits[:, [3, 1, 2, 0]]
    torch.testing.assert_close(logits_of(teacher, images, data), expected, atol=1e-5, rtol=1e-5)
    assert "4 of its 5 classes are the data's: by name" in teacher.notes[1]


@pytest.mark.parametrize("library", ["of_timm", "of_transformers"])
def test_a_student_learns_from_a_folder(cakd, colour, request, tmp_path, library):
    folder, _ = request.getfixturevalue(library)

    result = cakd("distill", "--data", f"tensors:{colour}", "--teacher", folder, *TRAIN, "--out", tmp_path / "run")

    assert result.code == 0, result.err
    assert " sees images of " in result.err
    measured = cakd("eval", tmp_path / "run", "--teacher", folder, "--json")
    assert measured.document["teacher"]["quality"]["top1"] > 0.4


def cached(folder, home, name):
    """Put a folder where the hub's client keeps what it has fetched."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize("library", ["of_timm", "of_transformers"])
def test_what_is_in_the_hubs_cache_needs_no_network(cakd, colour, request, offline, library):
    cached(request.getfixturevalue(library)[0], offline, "somebody/net")
    words = ("--data", f"tensors:{colour}", "--teacher", "hf-hub:somebody/net", *TRAIN)

    result = cakd("distill", *words, "--dry-run", "--json")

    assert result.code == 0, result.err
    assert result.document["teacher"]["name"].endswith(" of hf-hub:somebody/net")
    assert result.document["to_fetch"] == []


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("somebody/nowhere", 4, "cannot fetch hf-hub:somebody/nowhere: "),
        ("a/b/c", 4, "cannot fetch hf-hub:a/b/c: "),
        ("", 3, "teacher.name: input should not be empty"),
    ],
)
def test_what_is_not_there_is_one_error(cakd, colour, offline, name, code, message):
    for extra in ([], ["--dry-run"]):
        result = cakd("distill", "--data", f"tensors:{colour}", "--teacher", f"hf-hub:{name}", *TRAIN, *extra)

        assert (result.code, message in result.err) == (code, True), result.err
        assert "Traceback" not in result.err


def damaged(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def without_preprocessing(folder):
    (folder / "preprocessor_config.json").unlink()


def of_size(size):
    return lambda folder: (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "size": size})
    )


WRONG = [
    ("of_timm", lambda f: (f / "model.safetensors").unlink(), 4, "has no model.safetensors"),
    ("of_timm", lambda f: (f / "model.safetensors").write_bytes(b"x"), 4, "timm cannot read the network"),
    ("of_timm", lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors"), 4, "timm cannot read the network"),
    ("of_timm", lambda f: damaged(f, lambda c: c.update(architecture="nope")), 4, "timm cannot read the network"),
    ("of_timm", lambda f: (f / "config.json").write_text("{"), 4, "not a config.json"),
    ("of_timm", lambda f: damaged(f, lambda c: c.update(label_names=["a", "b", "c", "d"])), 3, "has no class for 4 of"),
    ("of_transformers", without_preprocessing, 4, "has no preprocessor_config.json"),
    (
        "of_transformers",
        of_size({"height": 24, "width": 24}),
        4,
        "how images are prepared: lacks 'image_std'",
    ),
    ("of_transformers", of_size("large"), 4, "does not say how images are prepared"),
    (
        "of_transformers",
        lambda f: damaged(f, lambda c: c.update(architectures=["Bert"])),
        3,
        "holds Bert, not an",
    ),
    ("of_transformers", lambda f: damaged(f, lambda c: c.update(model_type="x")), 4, "transformers cannot read the"),
    (
        "of_transformers",
        lambda f: (f / "model.safetensors").write_bytes(b"x"),
        4,
        "transformers cannot read",
    ),
]


@pytest.mark.parametrize(("library", "change", "code", "message"), WRONG, ids=range(len(WRONG)))
def test_a_damaged_folder_is_one_error(cakd, colour, request, tmp_path, library, change, code, message):
    folder = shutil.copytree(request.getfixturevalue(library)[0], tmp_path / "net")
    change(folder)

    result = cakd("distill", "--data", f"tensors:{colour}", "--teacher", folder, *TRAIN, "--dry-run")

    assert (result.code, message in result.err) == (code, True), result.err
    assert "Traceback" not in result.err


def test_nothing_of_a_folder_is_executed(cakd, colour, of_transformers, tmp_path):
    folder = shutil.copytree(of_transformers[0], tmp_path / "net")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    damaged(folder, lambda config: config.update(
        model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Net"}
    ))  # fmt: skip

    result = cakd("distill", "--data", f"tensors:{colour}", "--teacher", folder, *TRAIN, "--dry-run")

    assert result.code == 4
    assert not (tmp_path / "ran").exists()


def test_a_channel_too_few_is_an_error(cakd, toy_file, of_timm):
    result = cakd("distill", "--data", f"tensors:{toy_file}", "--teacher", of_timm[0], *TRAIN, "--dry-run")

    assert result.code == 3
    assert "takes images of 3 channels, those of toy have 1" in result.err


def test_a_librarys_published_classifier_keeps_its_head(cakd, colour, tmp_path):
    """By weights that stand where the library would have put them."""
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_resnet.r160_in1k")
    torch.save(network.state_dict(), tmp_path / "net.pth")
    (tmp_path / "map.yaml").write_text("class 0: tench\nclass 1: [n01443537, 2]\nclass 2: hammerhead\nclass 3: 5\n")
    words = ("--data", f"tensors:{colour}", "--teacher", "timm:test_resnet.r160_in1k", *TRAIN)
    words = (*words, f"teacher.weights={tmp_path / 'net.pth'}", "--loss", "kd", "--dry-run")

    result = cakd("distill", *words, "--class-map", tmp_path / "map.yaml")

    assert result.code == 0, result.err
    assert "5 of its 1,000 classes are 4 of the data's: as " in result.err
    refused = cakd("distill", *words)
    assert refused.code == 3
    assert "has no class for 4 of the 4 classes of colour: class 0, class 1, class 2, class 3" in refused.err


def test_a_file_of_weights_with_the_datas_classes_is_taken_in_order(colour, tmp_path):
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_resnet.r160_in1k", num_classes=4).eval()
    torch.save(network.state_dict(), tmp_path / "net.pth")
    data, images, _ = labelled(colour)
    words = [f"teacher.weights={tmp_path / 'net.pth'}"]
    flags = {"data": "digits", "model": "resnet8", "teacher": "timm:test_resnet.r160_in1k"}

    teacher = load_teacher(resolve(words, flags).teacher, data, CPU)

    assert (teacher.mapped, teacher.name) == (None, "timm:test_resnet.r160_in1k")
    with torch.no_grad():
        shown = functional.interpolate(images[:8].float(), (160, 160), mode="bilinear", antialias=True)
        torch.testing.assert_close(teacher.model(images[:8].float()), network(shown), atol=1e-5, rtol=1e-4)
