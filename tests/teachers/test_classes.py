"""A teacher of other classes and another size: what is asked of it is what it was made for."""

import copy
import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional

from cakd_cli.errors import RecipeError
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models import saving
from cakd_cli.recipe import class_map
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import RunTeacher, load_teacher
from cakd_cli.teachers.classes import ClassMap, map_classes
from cakd_cli.teachers.fitted import fitted
from cakd_cli.teachers.forms import Form
from tests.conftest import write_tensors_file
from tests.engine.test_resume import killed_after

CPU = choose_hardware("cpu", "fp32")
WORDS = ("--epochs", 1, "--batch-size", 16, "data.crop_padding=0", "-q")


def renamed(source, path, names):
    """The same images, of the classes that are named."""
    with safe_open(source, "pt") as file:
        known = json.loads(file.metadata()["class_names"])
    tensors = {}
    for part, rows in ((part, load_file(source)) for part in ("train", "test")):
        labels = rows[f"{part}_labels"]
        kept = torch.tensor([known[label] in names for label in labels.tolist()])
        tensors[f"{part}_images"] = rows[f"{part}_images"][kept].clone()
        tensors[f"{part}_labels"] = torch.tensor([list(names).index(known[label]) for label in labels[kept].tolist()])
    save_file(tensors, path, metadata={"class_names": json.dumps(list(names.values()))})
    return path


def toy(path):
    return resolve([], {"data": f"tensors:{path}", "model": "resnet8"}).data.load()


@pytest.fixture
def part(toy_file, tmp_path):
    """Three of the teacher's four classes, in another order and written in another way."""
    names = {"class 3": "Class-3", "class 0": "class 0", "class 1": "CLASS_1"}
    return renamed(toy_file, tmp_path / "part.safetensors", names)


def images_of(data):
    return next(data.test.ordered_batches(batch_size=16, device=torch.device("cpu"))).images


def logits_of(teacher, images, form="plain"):
    return Form(teacher, form, CPU).answers_to(images)["logits"]


def own_logits(folder, images):
    saved = saving.read(folder)
    (mean,), (std,) = saved.preprocessing.mean, saved.preprocessing.std
    with torch.no_grad():
        return saved.model((images.float() / 255 - mean) / std)


@pytest.mark.parametrize("form", ["plain", "folded"])
def test_a_part_of_its_classes_is_answered_as_the_whole_restricted(part, toy_teacher, form):
    data = toy(part)
    teacher = load_teacher(RunTeacher(path=str(toy_teacher)), data, CPU)

    found = logits_of(teacher, images_of(data), form)

    torch.testing.assert_close(found, own_logits(toy_teacher, images_of(data))[:, [3, 0, 1]], atol=1e-5, rtol=1e-5)
    assert teacher.shapes["logits"] == (3,)
    assert teacher.notes == (f"the teacher resnet8 of {toy_teacher}: 3 of its 4 classes are the data's: by name",)


@pytest.mark.parametrize("form", ["plain", "folded"])
def test_several_classes_in_one_have_their_mass(toy_file, toy_teacher, tmp_path, form):
    data = toy(renamed(toy_file, tmp_path / "two.safetensors", {"class 1": "odd", "class 2": "even"}))
    (tmp_path / "map.yaml").write_text("even: [class 0, 2]\nodd:\n  - class 1\n  - Class 3\n")
    known = class_map.read(str(tmp_path / "map.yaml"))
    teacher = load_teacher(RunTeacher(path=str(toy_teacher)), data, CPU, class_map=known)

    found = logits_of(teacher, images_of(data), form).softmax(1)

    whole = own_logits(toy_teacher, images_of(data)).softmax(1)
    torch.testing.assert_close(found, torch.stack([whole[:, [1, 3]].sum(1), whole[:, [0, 2]].sum(1)], 1))
    assert teacher.classes == {"odd": ["class 1", "class 3"], "even": ["class 0", "class 2"]}


@pytest.mark.parametrize("form", ["plain", "folded"])
def test_images_are_resized_to_the_teachers_own_size(toy_teacher, tmp_path, form):
    data = toy(write_tensors_file(tmp_path / "large.safetensors", size=12))
    teacher = load_teacher(RunTeacher(path=str(toy_teacher)), data, CPU)
    images = images_of(data)
    small = functional.interpolate(images.float(), (8, 8), mode="bilinear", antialias=True)

    found = logits_of(teacher, images, form)

    torch.testing.assert_close(found, own_logits(toy_teacher, small), atol=1e-4, rtol=1e-4)
    assert teacher.notes == (f"the teacher resnet8 of {toy_teacher} sees images of 8 x 8, resized from 12 x 12",)


def test_what_is_fitted_keeps_its_layers_and_its_weights_and_is_remembered_apart(part, toy_file, toy_teacher):
    spec = RunTeacher(path=str(toy_teacher))
    whole, fit = (load_teacher(spec, toy(path), CPU) for path in (toy_file, part))

    assert [*whole.model.state_dict()] == [*fit.model.state_dict()]
    assert whole.weights_hash == fit.weights_hash
    assert whole.architecture != fit.architecture
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(copy.deepcopy(fit.model)(images), fit.model(images))


def test_the_whole_way_by_name_file_and_size(cakd, part, toy_teacher, tmp_path):
    words = ("distill", "--data", f"tensors:{part}", "--teacher", toy_teacher, "--student", "resnet8", *WORDS)

    result = cakd(*words, "--out", tmp_path / "run")

    assert result.code == 0, result.err
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["teacher"]["classes"]
    assert recorded == {"Class-3": ["class 3"], "class 0": ["class 0"], "CLASS_1": ["class 1"]}
    (tmp_path / "map.yaml").write_text("class 0: 1\nCLASS_1: class 0\n")
    measured = cakd("eval", tmp_path / "run", "--teacher", toy_teacher, "--class-map", tmp_path / "map.yaml", "--json")
    by_name = cakd("eval", tmp_path / "run", "--teacher", toy_teacher, "--json")
    assert measured.document["teacher"]["quality"]["top1"] < by_name.document["teacher"]["quality"]["top1"] == 1


def test_a_run_goes_on_with_the_classes_that_it_began_with(cakd, part, toy_teacher, tmp_path):
    (tmp_path / "map.yaml").write_text("class 0: class 0\n")
    words = ("distill", "--data", f"tensors:{part}", "--teacher", toy_teacher, "--student", "resnet8", *WORDS)
    words = (*words, "--class-map", tmp_path / "map.yaml", "--out", tmp_path / "run", "--resume")
    words = (*words, "engine.checkpoint_seconds=0")
    with killed_after(4):
        cakd(*words)
    (tmp_path / "map.yaml").write_text("class 0: class 2\n")

    result = cakd(*words)

    assert result.code == 4
    assert "not the same as when it began: its teacher's classes" in result.err


@pytest.mark.parametrize(
    ("loss", "code", "message"),
    [
        ("srrl", 3, "one weight a class"),
        ("cakd", 3, "needs a linear classifier, one weight a class; take mask=grad-cam"),
        ("wkd-l", 3, "one weight a class"),
        ("rkd", 0, ""),
    ],
)
def test_a_term_that_needs_a_weight_a_class(cakd, toy_file, toy_teacher, tmp_path, loss, code, message):
    data = renamed(toy_file, tmp_path / "two.safetensors", {"class 1": "odd", "class 2": "even"})
    (tmp_path / "map.yaml").write_text("even: [class 0, class 2]\nodd: [class 1, class 3]\n")
    words = ("--data", f"tensors:{data}", "--teacher", toy_teacher, "--student", "resnet8", "--loss", loss)

    result = cakd("distill", *words, "--class-map", tmp_path / "map.yaml", *WORDS, "--out", tmp_path / "run")

    assert (result.code, message in result.err) == (code, True)


@pytest.mark.parametrize("loss", ["srrl", "cakd"])
def test_where_each_class_has_one_of_the_teachers_its_weight_is_that_ones(cakd, part, toy_teacher, tmp_path, loss):
    words = ("--data", f"tensors:{part}", "--teacher", toy_teacher, "--student", "resnet8", "--loss", loss)

    assert cakd("distill", *words, *WORDS, "--out", tmp_path / "run").code == 0


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (None, 4, "cannot read the class map"),
        ("", 3, "map.yaml:1: must map each class of the data to the teacher's, as cat: tabby"),
        ("- class 0\n", 3, "map.yaml:1: must map each class"),
        ("Class-3: class 3\nclass 4: class 1\n", 3, "map.yaml:2: part has no class 'class 4'; did you mean class 0?"),
        ("Class-3: clas 3\n", 3, "map.yaml:1: Class-3: the teacher resnet8 of {teacher} has no class 'clas 3'; did"),
        ("Class-3:\n  - class 3\n  - 4\n", 3, "map.yaml:3: Class-3: the teacher resnet8 of {teacher} has classes 0 to"),
        ("Class-3: -1\n", 3, "has classes 0 to 3, got -1"),
        ("Class-3: 1.5\n", 3, "map.yaml:1: Class-3: must be the name or the number of a class, or a list of them"),
        ("Class-3: true\n", 3, "map.yaml:1: Class-3: must be the name or the number"),
        ("Class-3: []\n", 3, "map.yaml:1: Class-3: names no class"),
        ("Class-3: 3\nClass-3: 2\n", 3, "map.yaml:2: Class-3: given twice, first on line 1"),
        ("Class-3: class 0\n", 3, "the classes Class-3 and class 0 of part are one class of the teacher"),
        ("x: 1\ny: 2\n", 3, "the class map has 2 mistakes:"),
    ],
)
def test_a_wrong_class_map_gets_one_clear_error(cakd, part, toy_teacher, tmp_path, text, code, message):
    if text is not None:
        (tmp_path / "map.yaml").write_text(text)
    words = ("--data", f"tensors:{part}", "--teacher", toy_teacher, "--student", "resnet8", *WORDS, "--dry-run")

    result = cakd("distill", *words, "--class-map", tmp_path / "map.yaml")

    assert result.code == code
    assert message.format(teacher=toy_teacher) in result.err
    assert "Traceback" not in result.err


def test_a_class_map_without_a_teacher_is_a_mistake(cakd, toy_file):
    words = ("--data", f"tensors:{toy_file}", "--student", "resnet8", "--loss", "cross-entropy")

    result = cakd("distill", *words, "class_map=x")

    assert result.code == 3
    assert "class_map: is of a teacher's classes, and there is no teacher; give --teacher" in result.err


class Data:
    """As much of a data set as its classes are."""

    name, fingerprint = "pets", "1"

    def __init__(self, *names, ids=()):
        self.class_names, self.num_classes, self.wordnet_ids = names, len(names), ids


def mapped(names, *data, class_map=None, total=None, ids=()):
    found = map_classes(names, total or len(names), Data(*data, ids=ids), class_map, teacher="the teacher")
    return found and found.groups


def test_names_are_found_as_written_then_as_they_sound_then_by_their_other_names():
    names = ("tench, Tinca tinca", "Cardigan", "cardigan", "red-fox", "crane", "crane")

    assert mapped(names, "cardigan", "Red Fox") == ((2,), (3,))
    assert mapped(names, "tinca_tinca", "Cardigan") == ((0,), (1,))
    assert mapped(("a", "b"), "a", "b") is None
    assert mapped(None, "a", "b", total=2) is None
    with pytest.raises(RecipeError, match="several classes of one name: crane may be 4 or 5; CARDIGAN may be 1 or 2"):
        mapped(names, "crane", "CARDIGAN")
    with pytest.raises(RecipeError, match="no class for 2 of the 3 classes of pets: fax, zebra") as caught:
        mapped(names, "fax", "tench", "zebra")
    assert "--class-map FILE" in caught.value.hint
    with pytest.raises(RecipeError, match="has 3 classes, pets has 2, and which is which is not known"):
        mapped(None, "a", "b", total=3)
    assert mapped(None, "a", "b", total=3, class_map=ClassMap("f", {"a": (2,), "b": (0, 1)}, {})) == ((2,), (0, 1))


def test_imagenets_classes_are_known_by_their_wordnet_ids():
    pytest.importorskip("timm")
    torchvision = resolve([], {"data": "digits", "model": "torchvision:resnet18", "teacher": "torchvision:resnet18"})
    timm = resolve([], {"data": "digits", "model": "resnet8", "teacher": "timm:test_resnet.r160_in1k"})

    for recipe in (torchvision, timm):
        names = recipe.teacher.published_form().class_names
        ids = "n01440764", "n02012849", "n03126707"
        assert mapped(names, ids[0], "tiger_shark", *ids[1:]) == ((0,), (3,), (134,), (517,))


def of_torchvision():
    recipe = resolve([], {"data": "digits", "model": "torchvision:resnet18", "teacher": "torchvision:resnet18"})
    return recipe.teacher.published_form().class_names


@pytest.mark.parametrize("has_timm", [True, False])
def test_imagenet_and_its_networks_have_one_order_whatever_they_call_their_classes(monkeypatch, has_timm):
    """imagenet:PATH, and a folder with its thousand folders, by WordNet's words or ids; without timm as well."""
    info = pytest.importorskip("timm.data.imagenet_info").ImageNetInfo("imagenet-1k")
    ids = tuple(info.index_to_label_name(number) for number in range(1000))
    words = tuple(text.split(",")[0] for text in info.label_descriptions())
    named = tuple(word if words.count(word) == 1 else f"{word} ({own})" for word, own in zip(words, ids, strict=True))
    by_words = tuple(info.label_descriptions())
    if not has_timm:
        monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)

    for teacher in (of_torchvision(), ids, by_words):
        assert mapped(teacher, *named, ids=ids) is None
        assert mapped(teacher, *ids, ids=ids) is None
        assert mapped(teacher, *ids) is None
    shuffled = (*ids[1:], ids[0])
    if has_timm:
        assert mapped(of_torchvision(), *shuffled) == (*((number,) for number in range(1, 1000)), (0,))
        assert mapped(of_torchvision(), "either crane", ids=(ids[134],)) == ((134,),)
    else:
        with pytest.raises(RecipeError, match="no class for 1000 of the 1000") as caught:
            mapped(of_torchvision(), *shuffled)
        assert "pip install 'cakd[timm]'" in caught.value.hint
    other = tuple(f"class {number}" for number in range(1000))
    with pytest.raises(RecipeError, match="has no class for 1000 of the 1000"):
        mapped(other, *ids)


def test_a_layer_of_what_is_fitted_is_named_as_before(part, toy_teacher):
    network = saving.read(toy_teacher).model
    names = [name for name, _ in network.named_modules()]

    assert [name for name, _ in fitted(network, (9, 9), [[1], [2, 3]]).named_modules()] == names
