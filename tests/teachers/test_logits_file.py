"""A teacher that is a file of its logits: looked up by the numbers of images and views."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.machine.stopwatch import Stopwatch
from cakd_cli.models.layers import LOGITS
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import load_teacher
from cakd_cli.teachers.answers import AnswerSource
from cakd_cli.teachers.logits_file import SNIPPET

CPU = choose_hardware("cpu", "fp32")
IMAGES, CLASSES, VIEWS = 160, 4, 9
NAMES = [f"class {label}" for label in range(CLASSES)]
LEARN = ("--student", "resnet8", "--epochs", 1, "--batch-size", 16, "engine.precision=fp32", "--loss", "kd")


def load(path, toy_file, *words):
    """A teacher of the toy data, of which one pixel of padding makes nine views."""
    flags = {"data": f"tensors:{toy_file}", "model": "resnet8", "teacher": f"logits:{path}"}
    recipe = resolve(["data.crop_padding=1", *words], flags)
    data = recipe.data.load()
    return load_teacher(recipe.teacher, data, CPU), data


def write(path, logits, **metadata):
    save_file({"logits": logits}, path, {key: json.dumps(value) for key, value in metadata.items()} or None)
    return path


def some_logits(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def right_logits(classes=CLASSES):
    """The right class is the largest: labels of the toy data come in turns."""
    return some_logits(IMAGES, classes) + 8 * torch.eye(CLASSES, classes)[torch.arange(IMAGES) % CLASSES]


def answered(teacher, data):
    """Each batch of two epochs with the answers to it, as a run gets them."""
    source = AnswerSource(teacher.model, None, CPU.device, print)
    for epoch in range(2):
        batches = data.train.train_batches(batch_size=16, seed=0, epoch=epoch, start=0, device=CPU.device)
        yield from ((batch, answers[LOGITS]) for batch, answers in source.beside(batches, Stopwatch(CPU.device)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_row_an_image_answers_every_view_of_it(toy_file, tmp_path, dtype):
    logits = some_logits(IMAGES, CLASSES, dtype=dtype)

    teacher, data = load(write(tmp_path / "a.safetensors", logits), toy_file)

    for batch, found in answered(teacher, data):
        assert found.dtype == torch.float32
        assert found.tolist() == [logits[int(number)].float().tolist() for number in batch.samples]
    assert teacher.notes == (
        f"the teacher {teacher.name} has one row an image: all 9 views of it get the answer to the image as it is",
    )


def test_a_row_a_view_answers_that_view(toy_file, tmp_path):
    logits = some_logits(IMAGES, VIEWS, CLASSES)

    teacher, data = load(write(tmp_path / "a.safetensors", logits), toy_file)

    seen = set()
    for batch, found in answered(teacher, data):
        for name, row in zip(batch.views.tolist(), found, strict=True):
            image, view = divmod(name, VIEWS)
            seen.add(view)
            assert torch.equal(row, logits[image, view])
    assert len(seen) == VIEWS
    assert teacher.notes == ()


def test_new_views_in_every_epoch_are_answered_by_a_row_an_image(toy_file, tmp_path):
    logits = some_logits(IMAGES, CLASSES)

    teacher, data = load(write(tmp_path / "a.safetensors", logits), toy_file, "data.augment=rand-augment")

    batch, found = next(answered(teacher, data))
    assert batch.views is None
    assert torch.equal(found, logits[batch.samples])
    assert "every view of it" in teacher.notes[0]


def test_its_classes_are_found_by_name(toy_file, tmp_path):
    logits = some_logits(IMAGES, 6)
    names = ["class 2", "other", "class 0", "class 3", "another", "class 1"]

    teacher, data = load(write(tmp_path / "a.safetensors", logits, class_names=names), toy_file)

    batch, found = next(answered(teacher, data))
    assert torch.equal(found, logits[batch.samples][:, [2, 5, 0, 3]])
    assert "4 of its 6 classes are the data's: by name" in teacher.notes[0]


def test_a_student_of_a_file_learns_as_one_of_the_teacher_itself(cakd, toy_file, toy_teacher, tmp_path):
    """The file holds the teacher's answer to each view that the run meets."""
    flags = {"data": f"tensors:{toy_file}", "model": "resnet8", "teacher": str(toy_teacher)}
    recipe = resolve(["data.crop_padding=1"], flags)
    data = recipe.data.load()
    teacher = load_teacher(recipe.teacher, data, CPU)
    logits = torch.zeros(IMAGES * VIEWS, CLASSES)
    for batch in data.train.train_batches(batch_size=16, seed=0, epoch=0, start=0, device=CPU.device):
        with torch.no_grad():
            logits[batch.views] = teacher.model(Normalisation(teacher.mean, teacher.std, CPU)(batch.images))
    path = write(tmp_path / "a.safetensors", logits.view(IMAGES, VIEWS, CLASSES), class_names=NAMES)

    lines = []
    for name, of in (("live", toy_teacher), ("file", f"logits:{path}")):
        words = ("--data", f"tensors:{toy_file}", "--teacher", of, *LEARN, "--out", tmp_path / name)
        result = cakd("distill", *words, "data.crop_padding=1")
        assert result.code == 0, result.err
        lines.append(json.loads((tmp_path / name / "metrics.jsonl").read_text())["train"])

    assert lines[1] == pytest.approx(lines[0], abs=1e-5)


def test_what_it_cannot_say_is_left_out_and_said(cakd, toy_file, tmp_path):
    path, run = write(tmp_path / "a.safetensors", right_logits()), tmp_path / "run"
    words = ("--data", f"tensors:{toy_file}", "--teacher", f"logits:{path}", *LEARN, "data.crop_padding=0")

    planned, result = cakd("distill", *words, "--dry-run"), cakd("distill", *words, "--out", run)

    assert (planned.code, result.code) == (0, 0), result.err
    assert "engine.teacher_memory: off (the answers are in a file)" in result.err
    assert f"teacher logits:{path}: top-1 100.0% of 144 training images" in result.err
    assert "one row an image" not in result.err  # of one view there is nothing to say
    unknown = "a file that answers about training images alone, so agreement on test images is not known"
    assert f"teacher   logits:{path}, {unknown}" in planned.out
    assert f"- teacher: logits:{path}; {unknown}" in (run / "README.md").read_text()
    assert json.loads((run / "run.json").read_text())["teacher"]["origin"] == unknown
    measured = cakd("eval", run, "--teacher", f"logits:{path}", "--json")
    assert (measured.code, "teacher" in measured.document) == (0, False)
    said = f"logits:{path} says nothing of test images: agreement with the teacher is left out"
    assert measured.document["warnings"] == [said]
    compared = cakd("compare", run, "--json")
    assert (compared.code, compared.document["teacher"]) == (0, None), compared.err


def test_a_file_is_told_by_what_it_holds(toy_file, tmp_path):
    """A run does not go on, and nothing is shared, under other answers."""
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, added in zip(paths, (0, 0, 1), strict=True):
        write(path, right_logits() + added)

    first, copied, other = (load(path, toy_file)[0].weights_hash for path in paths)

    assert first == copied != other


def test_the_hint_shows_how_such_a_file_is_written(toy_file, tmp_path, monkeypatch):
    def network(images):
        return torch.stack([images.float().mean((1, 2, 3)), images.float().amax((1, 2, 3))], 1).repeat(1, 2)

    monkeypatch.chdir(tmp_path)
    exec(SNIPPET.replace("folder:PATH", f"tensors:{toy_file}"), {"network": network})

    teacher, data = load("answers.safetensors", toy_file, "data.crop_padding=0")
    batch, found = next(answered(teacher, data))
    assert torch.equal(found, network(batch.images))
    assert teacher.mapped is None  # the names that it wrote are the data's


def broken(path):
    path.write_bytes(b"no header")


def with_one(value, *shape):
    logits = some_logits(*shape)
    logits.view(-1, CLASSES)[20, 1] = value
    return lambda path: write(path, logits)


def of(*shape, dtype=torch.float32):
    return lambda path: write(path, some_logits(*shape).to(dtype))


def right(path):
    write(path, right_logits())


EACH = (IMAGES, VIEWS, CLASSES)
NEW_VIEWS = ("data.augment=rand-augment",)
WRONG = [
    (lambda path: None, (), 4, "no such file of logits"),
    (broken, (), 4, "not a whole safetensors file"),
    (lambda path: save_file({"weight": torch.ones(2)}, path), (), 4, "has no tensor 'logits'; it has weight"),
    (of(IMAGES), (), 4, "logits has the shape 160, not (images, classes) or (images, views, classes)"),
    (of(0, CLASSES), (), 4, "logits has the shape 0 x 4"),
    (of(IMAGES, CLASSES, dtype=torch.int64), (), 4, "logits is int64, not floating point"),
    (of(144, CLASSES), (), 4, "has rows of 144 images, and toy has 160 to train on, those held out included"),
    (with_one(float("nan"), IMAGES, CLASSES), (), 4, "the logits of image 20, counted from 0, are not finite"),
    (with_one(float("inf"), *EACH), (), 4, "the logits of view 2 of image 2, counted from 0, are not finite"),
    (lambda path: write(path, right_logits().softmax(1)), (), 4, "holds probabilities: all rows are in [0, 1]"),
    (of(IMAGES, 4, CLASSES), (), 3, "has rows of 4 views of an image, and toy shows 9"),
    (of(*EACH), NEW_VIEWS, 3, "has a row for each of 9 views of an image, and every epoch draws new views of toy"),
    (of(IMAGES, 5), (), 3, "has 5 classes, toy has 4, and which is which is not known"),
    (lambda path: write(path, right_logits(), class_names=["a", "b", "c", "d"]), (), 3, "has no class for 4 of the 4"),
    (lambda path: write(path, right_logits(), class_names="a"), (), 4, "'class_names' is not a JSON list of names"),
    (right, ("--loss", "cakd"), 3, "is a file of logits, which shows no layers, and the term cakd-features"),
    (right, ("--loss", "mlkd"), 3, "is a file of logits of one view of an image, and the loss looks at two"),
    (right, ("data.mix=cutmix",), 3, "data.mix: makes one image of two, and the teacher is a file of the logits"),
    (right, ("engine.teacher_memory=disk",), 3, "is disk, and the teacher is a file of logits, which is not asked"),
    (right, ("engine.teacher_form=folded",), 3, "is folded, and the teacher is a file of logits, which is not asked"),
    (right, ("--teacher", "resnet8"), 3, "is a file of logits, which answers alone; average the files into one"),
]


@pytest.mark.parametrize(("make", "words", "code", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_or_use_is_one_error(cakd, toy_file, tmp_path, make, words, code, message):
    path = tmp_path / "a.safetensors"
    make(path)
    words = ("--data", f"tensors:{toy_file}", "--teacher", f"logits:{path}", *LEARN, "data.crop_padding=1", *words)

    result = cakd("distill", *words, "--dry-run")

    assert (result.code, message in result.err) == (code, True), result.err
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1


def test_rows_in_another_order_are_told_before_an_epoch(cakd, toy_file, tmp_path):
    path = write(tmp_path / "a.safetensors", right_logits().sort(0).values)

    result = cakd(
        "distill", "--data", f"tensors:{toy_file}", "--teacher", f"logits:{path}", *LEARN, "--out", tmp_path / "run"
    )

    assert result.code == 4
    assert "is near chance: top-1" in result.err
    assert "hint: check that its rows are in the order of the training images" in result.err


def test_other_commands_name_what_is_missing(cakd, toy_file, tmp_path):
    path = write(tmp_path / "a.safetensors", right_logits())
    words = ("--data", f"tensors:{toy_file}", "--student", "resnet8", "engine.batch_size=16")

    bench = cakd("bench", *words, "--teacher", f"logits:{path}", "loss=kd")
    fill = cakd("teacher-memory", "fill", *words, "--teacher", f"logits:{path}", "loss=kd")
    network = cakd("distill", *words, "--teacher", path, "--dry-run")

    assert (bench.code, "measures a teacher that is asked, and a file of logits is not" in bench.err) == (3, True)
    assert (fill.code, "teacher_memory is off (the answers are in a file)" in fill.err) == (3, True), fill.err
    assert (network.code, f"hint: --teacher logits:{path}" in network.err) == (4, True), network.err
