"""MixUp and CutMix: what is shown, whose labels count, and that a resume repeats it."""

import random

import pytest
import torch

from cakd_cli.data import Batch
from cakd_cli.data.images.mixing import mixed
from cakd_cli.engine.task import _of_both
from cakd_cli.losses import Lesson
from cakd_cli.losses.supervised import CrossEntropyTerm
from cakd_cli.recipe.resolve import resolve
from tests.conftest import some_daily, train_toy
from tests.engine.test_resume import assert_same_run, killed_after, lines


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 8, 10), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.arange(6), views=torch.arange(6), samples=torch.arange(6))


def test_mixup_is_the_weighted_mean_of_a_pair(batch):
    found = mixed(batch, "mixup", 1.0, random.Random(1))

    share = found.own_share[0].item()
    for place in range(6):
        mean = share * batch.images[place].double() + (1 - share) * batch.images[5 - place].double()
        assert (found.images[place].double() - mean).abs().max() <= 0.5 + 1e-4
    assert 0 < share < 1
    assert found.images.dtype == torch.uint8
    assert found.other_labels.tolist() == [5, 4, 3, 2, 1, 0]
    assert found.views is None


def test_cutmix_pastes_a_rectangle_whose_area_is_the_others_share(batch):
    images = torch.stack([torch.full((1, 8, 10), value, dtype=torch.uint8) for value in range(6)])
    for seed in range(50):
        found = mixed(batch._replace(images=images), "cutmix", 1.0, random.Random(seed))

        pasted = found.images[0, 0] == 5
        rows, columns = pasted.any(1).nonzero().flatten(), pasted.any(0).nonzero().flatten()
        if len(rows):
            assert pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert ((found.images[0, 0] == 0) == ~pasted).all()
        assert found.own_share[0].item() == pytest.approx(1 - pasted.float().mean().item())
    assert images[0].eq(0).all(), "the images given stay as they were"


def test_shares_are_beta_distributed_and_both_kinds_are_drawn(batch):
    shares = torch.tensor([mixed(batch, "mixup", 0.2, random.Random(seed)).own_share[0] for seed in range(2000)])
    exact = [mixed(batch, "both", 1.0, random.Random(seed)).images for seed in range(200)]
    pasted = sum(bool(((images == batch.images) | (images == batch.images.flip(0))).all()) for images in exact)

    assert shares.mean() == pytest.approx(0.5, abs=0.04)
    assert shares.var(correction=0) == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.02)
    assert 60 < pasted < 140


def test_cross_entropy_is_that_of_both_labels():
    logits = torch.randn(4, 3)
    labels, others, share = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 1, 0]), 0.3
    batch = Batch(torch.empty(0), labels, other_labels=others, own_share=torch.full((4,), share))
    soft = share * torch.eye(3)[labels] + (1 - share) * torch.eye(3)[others]

    found = _of_both(CrossEntropyTerm(), Lesson(logits, None, labels), batch, None)

    torch.testing.assert_close(found.total, torch.nn.functional.cross_entropy(logits, soft))
    torch.testing.assert_close(found.parts["cross_entropy"], found.total)


@pytest.mark.parametrize("mix", some_daily(["mixup", "cutmix", "both"], "both"))
def test_a_killed_run_goes_on_as_it_would_have(cakd, toy_file, toy_teacher, tmp_path, mix):
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    words = (*words, "--loss", "dkd", "--epochs", 2, "--batch-size", 48, f"data.mix={mix}", "loss.1.warmup_epochs=0")
    words = (*words, "engine.gradient_accumulation=2", "engine.checkpoint_seconds=0", "engine.precision=fp32")
    assert cakd(*words, "--out", tmp_path / "straight").code == 0
    with killed_after(4):
        cakd(*words, "--out", tmp_path / "killed")

    assert cakd(*words, "--out", tmp_path / "killed", "--resume").code == 0

    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    assert [line["teacher"] for line in lines(tmp_path / "straight")] == [{"asked": 144, "remembered": 0}] * 2


def test_mixed_images_are_other_images(toy_file, tmp_path):
    plain, other = (
        train_toy(toy_file, tmp_path / mix, f"data.mix={mix}", **{"engine.epochs": 1}) for mix in ("none", "mixup")
    )

    assert lines(plain)[0]["train"] != lines(other)[0]["train"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("data.mix=mixup", "loss=mlkd"), "data.mix: goes with one view of each image, and the loss looks at two"),
        (("data.mix=cutmix", "loss=crd"), "crd keeps what it learns of each label, and mixed images have two"),
        (("data.mix=mixup", "loss=gkl"), "keeps what it learns of each label"),
        (("data.mix=blend",), "no 'blend' here"),
        (("data.mix_alpha=0",), "greater than 0"),
    ],
)
def test_what_does_not_go_together(words, sentence):
    with pytest.raises(Exception, match="the recipe has a mistake") as caught:
        resolve(["model=resnet8", "teacher=x", *words], {"data": "digits"})

    assert sentence in str(caught.value)
