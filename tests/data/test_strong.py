"""Strong augmentation, and the second view of an image: repeated by their numbers, whatever else is drawn."""

import json

import pytest
import torch
from PIL import Image

from cakd_cli import losses
from cakd_cli.data import Share
from cakd_cli.data.images.strong import each
from cakd_cli.recipe.resolve import resolve
from tests.conftest import some_daily
from tests.engine.test_resume import assert_same_run, killed_after, lines

CPU = torch.device("cpu")
POLICIES = ("rand-augment", "auto-augment", "trivial-augment")


def split(path, **settings):
    flags = {"data": f"tensors:{path}", "model": "resnet8", **{f"data.{key}": value for key, value in settings.items()}}
    return resolve([], flags).data.load().train


def batches(train, *, epoch=0, start=0, size=16, share=None):
    return list(
        train.train_batches(
            batch_size=size, seed=3, epoch=epoch, start=start, device=CPU, share=share or Share(incomplete=True)
        )
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_changes_images_and_repeats_itself(toy_file, policy):
    plain, strong = split(toy_file), split(toy_file, augment=policy)

    before, after, again, other = (
        torch.cat([batch.images for batch in batches(train, epoch=epoch)])
        for train, epoch in ((plain, 0), (strong, 0), (strong, 0), (strong, 1))
    )

    assert after.dtype == torch.uint8
    assert (before != after).flatten(1).any(1).float().mean() > 0.5
    assert torch.equal(after, again)
    assert not torch.equal(after, other)
    assert plain.views is not None
    assert strong.views is None
    assert batches(strong)[0].views is None


def test_a_view_does_not_depend_on_its_neighbours_or_on_what_was_drawn(toy_file):
    train = split(toy_file, augment="rand-augment", cutout=2, erasing=0.5).with_second_view()
    whole = batches(train)

    torch.manual_seed(99)
    state = torch.get_rng_state()
    late = batches(train, start=5)
    assert torch.equal(torch.get_rng_state(), state)

    for one, other in zip(whole[5:], late, strict=True):
        for name in ("images", "strong", "labels", "samples"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    ranks = [batches(train, share=Share(rank, 2, incomplete=True)) for rank in range(2)]
    assert torch.equal(torch.cat([ranks[0][0].strong, ranks[1][0].strong]), whole[0].strong)


def test_a_second_view_leaves_the_first_as_it_is(toy_file):
    train = split(toy_file)

    alone, both = batches(train), batches(train.with_second_view())

    for one, two in zip(alone, both, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.views, two.views)
        assert one.strong is None
        assert two.strong.shape == two.images.shape
        assert (two.strong != two.images).flatten(1).any(1).float().mean() > 0.5


@pytest.mark.parametrize("views", [0, 3], ids=["new crops", "recorded crops"])
def test_a_second_view_of_files(tmp_path, views):
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(6):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / part / name / f"{i}.png")
    settings = {"data.image_size": 24, "data.workers": 0, "data.validation_fraction": 0.0, "data.views": views}
    flags = {"data": f"folder:{tmp_path}", "model": "resnet8", **settings}
    train = resolve([], flags).data.load().train

    alone, both, late, other = (
        batches(split, size=4, start=start, epoch=epoch)
        for split, start, epoch in (
            (train, 0, 0),
            (train.with_second_view(), 0, 0),
            (train.with_second_view(), 2, 0),
            (train.with_second_view(), 0, 1),
        )
    )

    for one, two in zip(alone, both, strict=True):
        assert torch.equal(one.images, two.images)
        assert one.strong is None
        assert two.strong.shape == two.images.shape
        assert (two.strong != two.images).flatten(1).any(1).all()
        assert (one.views is None) == (two.views is None) == (views == 0)
    assert torch.equal(both[2].strong, late[0].strong)
    by_number = [
        dict(zip(torch.cat([b.samples for b in some]).tolist(), torch.cat([b.strong for b in some]), strict=True))
        for some in (both, other)
    ]
    assert any(not torch.equal(by_number[0][i], by_number[1][i]) for i in range(12))
    augmented = resolve([], flags | {"data.augment": "trivial-augment", "data.cutout": 8}).data.load().train
    assert not torch.equal(batches(augmented, size=4)[0].images, alone[0].images)


def test_cutout_blackens_a_square():
    transform = resolve([], {"data": "digits", "model": "resnet8", "data.cutout": 4}).data.augmentation()
    images = torch.full((200, 3, 12, 12), 255, dtype=torch.uint8)

    black = (each(transform, images, range(200)) == 0).all(1)

    counts = black.sum((1, 2))
    assert counts.max() == 16
    assert counts.min() >= 4  # a corner: half of each side lies outside
    for one in black:
        rows, columns = one.any(1).nonzero(), one.any(0).nonzero()
        assert one.sum() == len(rows) * len(columns)
    assert images.min() == 255


@pytest.mark.parametrize("method", some_daily(["mlkd", "crld", "sld"], "mlkd"))
def test_methods_of_two_views_train_and_go_on_where_they_were_killed(cakd, toy_file, toy_teacher, tmp_path, method):
    words = ("distill", "--data", f"tensors:{toy_file}", "--student", "resnet8", "--teacher", toy_teacher)
    words = (*words, "--loss", method, "--epochs", 2, "--batch-size", 48, "--device", "cpu", "engine.precision=fp32")
    words = (*words, "optimizer.learning_rate=0.005", "engine.checkpoint_seconds=0", "engine.log_interval=1")
    straight = cakd(*words, "--out", tmp_path / "straight")
    assert straight.code == 0, straight.err

    with killed_after(4):
        cakd(*words, "--out", tmp_path / "killed")
    assert cakd(*words, "--out", tmp_path / "killed", "--resume").code == 0

    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    # Of 144 images each first view may be remembered; the second ones are asked about.
    assert lines(tmp_path / "straight")[0]["teacher"]["asked"] == 288
    facts = json.loads((tmp_path / "straight" / "run.json").read_text())
    assert facts["ended"] == "completed"


def test_the_objective_of_two_views_is_the_papers(toy_file):
    """What the terms of a recipe sum up to, against the whole objective that the official code is held to."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, mine, theirs = (2 * torch.randn(8, 10, generator=generator).double() for _ in range(4))
    target = torch.arange(8) % 10
    lesson = losses.Lesson(student, teacher, target, epoch=151, student_strong_BC=mine, teacher_strong_BC=theirs)
    views = (student, teacher, target, mine, theirs)
    whole = {
        "mlkd": losses.mlkd_step(*views, temperature=4, ce_weight=0.1, kd_weight=0.9, reference_quirks=True),
        "crld": losses.crld_step(*views, temperature=4),
        "sld": losses.sld_step(*views, ce_weight=0.1, kd_weight=0.9, epoch=151),
    }

    for method, expected in whole.items():
        flags = {"data": "cifar100", "model": "resnet8", "teacher": "t", "loss": method, "engine.epochs": 240}
        terms = losses.Weights(resolve([], flags).loss).at(151)
        total = sum(term.factor * term(lesson).total for term in terms)
        torch.testing.assert_close(total, expected.total)
        assert all(term.needs.second_view for term in terms)
