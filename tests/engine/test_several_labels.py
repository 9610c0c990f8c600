"""Images with several labels, or none: what each part of cakd makes of them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from torch.testing import assert_close

from cakd_cli.evaluation import metrics
from cakd_cli.losses import cakd, cross_entropy, dkd, grouping


def draw(batch=6, classes=5):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(batch, classes, generator=generator).double() for _ in "st")
    positive = torch.rand(batch, classes, generator=generator) < 0.4
    positive[0], positive[1] = False, True
    return student, teacher, positive


def test_binary_cross_entropy_is_summed_over_classes():
    student, _, positive = draw()

    loss = cross_entropy(student, positive).total

    p = student.sigmoid()
    naive = [-(p[i, c].log() if positive[i, c] else (1 - p[i, c]).log()) for i in range(6) for c in range(5)]
    assert_close(loss, sum(naive) / 6)


def test_softmax_spreads_the_target_evenly_and_leaves_empty_samples_out():
    student, _, positive = draw()

    loss = cross_entropy(student, positive, multi_label="softmax").total

    log = student.log_softmax(1)
    naive = [-log[i][positive[i]].mean() for i in range(1, 6) if positive[i].any()]
    assert 0 < len(naive) < 6
    assert_close(loss, sum(naive) / len(naive))


def test_one_label_of_several_is_the_ordinary_cross_entropy():
    student, _, _ = draw()
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    positive = functional.one_hot(target, 5).bool()

    for smoothing in (0.0, 0.1):
        several = cross_entropy(student, positive, multi_label="softmax", label_smoothing=smoothing).total
        assert_close(several, cross_entropy(student, target, label_smoothing=smoothing).total)


def test_cakd_has_something_inside_the_strong_classes():
    student, teacher, positive = draw()

    loss = cakd(student, teacher, grouping.label(teacher, positive), temperature=4, alpha=1, beta=1)
    one = cakd(student, teacher, grouping.label(teacher, torch.arange(5).repeat(2)[:6]), temperature=4, alpha=1, beta=1)

    assert loss.parts["scd"] > 0
    assert one.parts["scd"] == 0
    assert_close(dkd(student, teacher, positive, temperature=4, alpha=1, beta=1).parts["tckd"], loss.parts["bcd"])


def test_average_precision_is_its_definition():
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    positive = torch.tensor([[True], [False], [True], [False]])

    # Precision 1 at the first, 2/3 at the third.
    assert metrics.average_precision(scores, positive) == [pytest.approx((1 + 2 / 3) / 2)]


def test_a_class_that_nobody_has_is_left_out_of_the_mean():
    logits = torch.tensor([[3.0, 0.0, 1.0], [-3.0, 0.0, 2.0]])
    positive = torch.tensor([[True, False, False], [False, False, True]])

    assert metrics.average_precision(logits, positive) == [1.0, None, 1.0]
    assert metrics.brief(logits, positive)["map"] == 1.0
    assert metrics.brief(logits, torch.zeros(2, 3, dtype=torch.bool))["map"] == 0.0


def test_top1_counts_a_first_answer_that_is_one_of_the_labels():
    logits = torch.tensor([[3.0, 0.0, 1.0], [-3.0, 0.0, 2.0], [1.0, 0.0, 0.0]])
    positive = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])

    assert metrics.hits(logits, positive).tolist() == [True, False, False]
    assert metrics.chance(positive, 3) == pytest.approx(3 / 9)


@pytest.fixture(scope="session")
def several_file(tmp_path_factory):
    """Each quarter of an image is bright where its class is there."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for part, count in (("train", 200), ("test", 80)):
        positive = torch.rand(count, 4, generator=generator) < 0.4
        noise = torch.randint(0, 90, (count, 1, 8, 8), generator=generator)
        bright = positive.view(count, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
        tensors[f"{part}_images"] = (noise + 130 * bright).to(torch.uint8)
        tensors[f"{part}_labels"] = positive.to(torch.uint8)
    path = tmp_path_factory.mktemp("several") / "several.safetensors"
    save_file(tensors, path, metadata={"class_names": json.dumps(["a", "b", "c", "d"])})
    return path


def test_teacher_student_and_evaluation(cakd, several_file, tmp_path):
    words = ("--data", f"tensors:{several_file}", "--batch-size", 20, "data.crop_padding=0")
    trained = cakd("train-teacher", *words, "--model", "resnet8", "--epochs", 12, "--out", tmp_path / "teacher")
    assert trained.code == 0, trained.err
    assert "held-out mAP" in trained.err
    assert "test mAP" in trained.out
    words = (*words, "--teacher", tmp_path / "teacher", "--student", "resnet8", "--epochs", 3)
    for loss in ("kd", "cakd-logits", "cakd", "gdkd", "dist", "cmkd"):
        out = tmp_path / loss
        result = cakd("distill", *words, "--loss", loss, "--out", out)
        assert result.code == 0, result.err
    line = json.loads((tmp_path / "cakd" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["train"]["scd"] > 0
    report = cakd("eval", tmp_path / "cakd", "--teacher", tmp_path / "teacher", "--json").document
    assert set(report["quality"]) == {"top1", "map", "nll"}
    assert report["teacher"]["quality"]["map"] > 0.8
    assert set(report["per_class"]) == {"a", "b", "c", "d"}
    text = cakd("eval", tmp_path / "cakd", "--teacher", tmp_path / "teacher").out
    assert "mAP" in text
    assert "ECE" not in text
    assert "mean_average_precision" in (tmp_path / "cakd" / "README.md").read_text()
    exported = cakd("export", tmp_path / "cakd", "--format", "safetensors", "--out", tmp_path / "exported")
    assert exported.code == 0, exported.err


@pytest.mark.parametrize("loss", ["nkd", "[{type: cmkd, difficulty: label}]"])
def test_losses_of_one_label_are_refused(cakd, several_file, tmp_path, loss):
    words = ("distill", "--data", f"tensors:{several_file}", "--student", "resnet8", "--teacher", tmp_path / "none")

    result = cakd(*words, f"loss={loss}", "--out", tmp_path / "run")

    assert result.code == 3
    assert "needs one label an image, and images of several may have several" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (torch.full((4, 3), 2), torch.zeros(4, 3), "run from 2 to 2"),
        (torch.eye(4)[:, :3], torch.zeros(4, 2), "test labels are (4, 2)"),
        (torch.eye(4)[:, :3], torch.zeros(4), "train labels are (4, 3), test labels (4,)"),
        (torch.eye(4)[:, :3], torch.zeros(4, 3), "test labels are all 0"),
    ],
)
def test_wrong_labels(cakd, tmp_path, train, test, message):
    path = tmp_path / "wrong.safetensors"
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    labels = {"train_labels": train.to(torch.uint8), "test_labels": test.to(torch.uint8)}
    save_file({"train_images": images, "test_images": images.clone(), **labels}, path)

    result = cakd("train-teacher", "--data", f"tensors:{path}", "--model", "resnet8", "--out", tmp_path / "run")

    assert result.code == 4
    assert message in result.err
