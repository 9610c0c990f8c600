"""cakd data check, and what of it every training says, of images that were damaged, copied and mirrored by hand."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cakd_cli.data import checking
from cakd_cli.data.images.folder import FolderSpec
from cakd_cli.data.images.unlabelled import UnlabelledSpec


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """Noise that no other number gives."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which nothing is wrong: 3 classes of 24 training and 8 test images."""
    root = tmp_path / "images of é"
    number = 0
    for part, count in (("train", 24), ("test", 8)):
        for name in ("cat", "dog", "gnu"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture(number).save(root / part / name / f"{i}.png")
                number += 1
    return root


def kinds(findings: list[dict[str, object]]) -> list[object]:
    return [finding["kind"] for finding in findings]


def test_a_good_folder_is_ready_and_nothing_else_is_said(cakd, folder):
    result = cakd("data", "check", f"folder:{folder}", "engine.batch_size=4")
    document = cakd("data", "check", f"folder:{folder}", "--json").document

    assert result.code == 0, result.err
    assert "verdict    ready\n" in result.out
    assert "warning" not in result.out
    assert "to mend" not in result.out
    assert document["splits"] == {"train": 66, "validation": 6, "test": 24}
    assert document["classes"]["dog"] == {"train": 22, "validation": 2, "test": 8}
    assert document["pictures"]["width"] == [20, 20, 20]
    assert document["pictures"]["aspect"] == [1.25, 1.25, 1.25]
    assert (document["pictures"]["formats"], document["pictures"]["modes"]) == ({"PNG": 96}, {"RGB": 96})
    assert (document["ready"], document["must_mend"], document["warnings"]) == (True, [], [])
    assert checking.at_start(FolderSpec(path=str(folder)).load()) == []


def test_what_is_wrong_is_named_worst_first(cakd, folder):
    train, test = folder / "train", folder / "test"
    shutil.copy(train / "cat" / "0.png", test / "cat" / "same bytes.png")
    Image.open(train / "cat" / "1.png").save(test / "cat" / "same pixels.bmp")
    shutil.copy(test / "gnu" / "0.png", train / "dog" / "other class.png")
    shutil.copy(train / "dog" / "3.png", train / "dog" / "copy.png")
    shutil.copy(train / "cat" / "5.png", train / "dog" / "conflict.png")
    Image.new("RGB", (9, 9), "red").save(train / "gnu" / "red.png")
    for number in range(20):
        (train / "gnu" / f"{number}.png").unlink()
    document = cakd("data", "check", f"folder:{folder}", "data.validation_fraction=0", "--json").document
    cases = {finding["kind"]: finding["cases"] for finding in document["warnings"]}

    assert kinds(document["warnings"]) == ["test-in-train", "conflict", "copies", "one-colour", "few"]
    assert sorted(map(sorted, cases["test-in-train"])) == [
        ["test/cat/same bytes.png", "train/cat/0.png"],
        ["test/cat/same pixels.bmp", "train/cat/1.png"],
        ["test/gnu/0.png", "train/dog/other class.png"],
    ]
    assert sorted(map(sorted, cases["conflict"])) == [
        ["test/gnu/0.png", "train/dog/other class.png"],
        ["train/cat/5.png", "train/dog/conflict.png"],
    ]
    assert cases["copies"] == [["train/dog/3.png", "train/dog/copy.png"]]
    assert cases["one-colour"] == [["train/gnu/red.png"]]
    assert cases["few"] == [["gnu: 5"]]
    assert "3 of 26" in document["warnings"][0]["says"]
    assert document["ready"]


def test_an_image_that_is_held_out_and_trained_on_is_found(cakd, folder):
    """Whatever the seed holds out: one of two copies of every image of a class."""
    for path in sorted((folder / "train" / "cat").iterdir()):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    document = cakd("data", "check", f"folder:{folder}", "data.validation_fraction=0.25", "--json").document
    (finding,) = [finding for finding in document["warnings"] if finding["kind"] == "validation-in-train"]

    assert document["classes"]["cat"] == {"train": 36, "validation": 12, "test": 8}
    assert all(len(case) == 2 for case in finding["cases"])
    assert 1 <= len(finding["cases"]) <= 12


def test_files_that_cannot_be_read_end_with_exit_code_4(cakd, folder):
    whole = (folder / "train" / "cat" / "0.png").read_bytes()
    for number in range(7):
        (folder / "train" / "cat" / f"{number}.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(torch.full((16, 20), 60_000).numpy().astype("uint16")).save(folder / "test" / "dog" / "deep.png")
    result = cakd("data", "check", f"folder:{folder}")
    failed = cakd("data", "check", f"folder:{folder}", "--json")
    left_out = cakd("data", "check", f"folder:{folder}", "data.bad_images=skip", "--json")

    assert result.code == failed.code == 4
    assert "8 of 97 files cannot be used" in result.err
    assert "hint: replace or remove the files, or leave them out: data.bad_images=skip" in result.err
    assert result.out.count(": cannot be read as an image: ") == 5
    assert "and 3 more: --json" in result.out
    assert "verdict    not ready" in result.out
    assert len(failed.document["unreadable"]) == 8
    assert "more than 8 bits" in failed.document["unreadable"]["test/dog/deep.png"]
    assert failed.document["error"]["code"] == "input"
    assert (left_out.code, kinds(left_out.document["warnings"])) == (0, ["unreadable"])


def test_a_class_without_a_readable_image_is_to_be_mended_even_where_files_are_left_out(cakd, folder):
    for path in (folder / "test" / "gnu").iterdir():
        path.write_bytes(b"no picture")
    result = cakd("data", "check", f"folder:{folder}", "data.bad_images=skip", "--json")

    assert result.code == 4
    assert result.document["must_mend"][0]["cases"] == [["gnu: none in test"]]


def test_training_images_without_labels_are_compared_with_those_of_the_test(cakd, folder):
    shutil.copy(folder / "test" / "dog" / "1.png", folder / "train" / "cat" / "leak.png")
    result = cakd("data", "check", f"unlabelled:{folder}", "--json")
    data = UnlabelledSpec(path=str(folder)).load()

    assert result.code == 0, result.err
    assert kinds(result.document["warnings"]) == ["test-in-train"]
    assert result.document["splits"] == {"train": 73, "test": 24}
    assert [line.partition(" (")[0] for line in checking.at_start(data)] == [
        "test images that are training images as well: 1 of 24"
    ]


def test_images_in_tars_are_looked_at(cakd, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for number in range(40):
            content = io.BytesIO()
            picture(number % 39).save(content, "png")
            for name, text in (
                (f"{number:02}.png", content.getvalue()),
                (f"{number:02}.cls", b"%d" % (number % 39 % 2)),
            ):
                facts = tarfile.TarInfo(name)
                facts.size = len(text)
                tar.addfile(facts, io.BytesIO(text))
    document = cakd("data", "check", f"wds:{tmp_path / 'set.tar'}", "--json").document
    (finding,) = [finding for finding in document["warnings"] if finding["kind"] != "few"]

    assert sum(document["splits"].values()) == 40
    assert sorted(finding["cases"][0]) == ["set.tar:00.png", "set.tar:39.png"]


def tensors_file(path: Path, images: torch.Tensor, labels: torch.Tensor, test_from: int) -> Path:
    names = {"class_names": json.dumps([f"class {i}" for i in range(int(labels.max()) + 1)])}
    parts = {
        "train_images": images[:test_from].contiguous(),
        "train_labels": labels[:test_from].contiguous(),
        "test_images": images[test_from:].contiguous(),
        "test_labels": labels[test_from:].contiguous(),
    }
    save_file(parts, path, metadata=names)
    return path


def test_tensors_are_looked_at_likewise(cakd, tmp_path):
    images = torch.randint(0, 256, (60, 2, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(60) % 3
    images[50], images[51] = images[0], 7
    path = tensors_file(tmp_path / "small.safetensors", images, labels, 45)
    document = cakd("data", "check", f"tensors:{path}", "data.validation_fraction=0", "--json").document
    cases = {finding["kind"]: finding["cases"] for finding in document["warnings"]}

    assert cases == {
        "test-in-train": [["test 5", "train 0"]],
        "conflict": [["train 0", "test 5"]],
        "one-colour": [["test 6"]],
    }
    assert document["pictures"]["width"] == [5, 5, 5]


def test_flips_are_measured(cakd, tmp_path):
    """A bar at the left is another class than one at the right; a bar at the top is its own mirror image."""
    noise = torch.randint(0, 60, (180, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(180) % 2
    sided, level = noise.clone(), noise.clone()
    sided[labels == 0, :, :, :4] += 150
    sided[labels == 1, :, :, -4:] += 150
    level[labels == 0, :, :4] += 150
    level[labels == 1, :, -4:] += 150
    said = {}
    for name, images in (("sided", sided), ("level", level)):
        path = tensors_file(tmp_path / f"{name}.safetensors", images, labels, 150)
        for flip in ("true", "false"):
            words = (f"data.horizontal_flip={flip}", "engine.batch_size=4", "--json")
            found = cakd("data", "check", f"tensors:{path}", *words).document["suggestions"]
            said[name, flip] = {row["setting"]: row["why"] for row in found}

    assert set(said["sided", "true"]) == {"data.horizontal_flip=false"}
    assert "for 100% of the images, and for 0% mirrored" in said["sided", "true"]["data.horizontal_flip=false"]
    assert said["sided", "false"] == {}
    assert said["level", "true"] == {}
    assert set(said["level", "false"]) == {"data.horizontal_flip=true"}


def test_settings_that_are_suggested_do_what_is_said_of_them(cakd, folder):
    for number in range(4, 24):
        (folder / "train" / "gnu" / f"{number}.png").unlink()
    words = ("data", "check", f"folder:{folder}", "--json")
    suggested = [row["setting"] for row in cakd(*words).document["suggestions"]]
    document = cakd(*words, *suggested).document

    assert suggested[0] == "data.image_size=16"
    assert suggested[-2:] == ["engine.batch_size=4", "data.validation_fraction=0.13"]
    assert document["classes"]["gnu"]["validation"] == 1
    assert document["suggestions"] == []
    assert document["splits"]["train"] // 4 >= 10


WRONG = [
    (4, "no such folder of images", ("folder:{tmp}/none",)),
    (4, "no such folder of images", ("folder:{tmp}/file.png",)),
    (4, "", ("folder:{tmp}/empty",)),
    (4, "a classifier needs two", ("folder:{tmp}/one",)),
    (4, "no such data file", ("tensors:{tmp}/none.safetensors",)),
    (3, "DATA: data: no 'fodler' here; did you mean folder?", ("fodler:{tmp}",)),
    (3, "lacks its path", ("folder",)),
    (3, "takes nothing after a colon", ("digits:{tmp}",)),
    (3, "data.bad_image: unknown key; did you mean bad_images", ("folder:{tmp}/one", "data.bad_image=skip")),
    (3, "--data-root: data.root: unknown key", ("digits", "--data-root", "{tmp}")),
    (2, "Missing argument", ()),
]


@pytest.mark.parametrize(("code", "message", "words"), WRONG, ids=[f"{c} {m[:30]}" for c, m, _ in WRONG])
def test_wrong_uses_get_one_clear_error(cakd, tmp_path, code, message, words):
    picture(0).save(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    for part in ("train", "test"):
        (tmp_path / "one" / part / "cat").mkdir(parents=True)
        picture(1).save(tmp_path / "one" / part / "cat" / "0.png")
    result = cakd("data", "check", *(word.format(tmp=tmp_path) for word in words))

    assert result.code == code, result.err
    assert message in " ".join(result.err.split()), result.err
    assert "Traceback" not in result.err
    assert sum(line.startswith("error: ") or "─ Error ─" in line for line in result.err.splitlines()) == 1
    assert result.out == ""


def test_a_training_starts_with_the_quick_half(cakd, folder, tmp_path):
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "test" / "cat" / "leak.png")
    shutil.copy(folder / "train" / "cat" / "1.png", folder / "train" / "dog" / "conflict.png")
    for number in range(2, 24):
        (folder / "train" / "gnu" / f"{number}.png").unlink()
    words = ("train-teacher", "--data", f"folder:{folder}", "--model", "resnet8", "--batch-size", 8, "--dry-run")
    result = cakd(*words, "data.validation_fraction=0")

    assert result.code == 0, result.err
    text = " ".join(result.out.split())
    assert "warning: test images that are training images as well: 1 of 25 (" in text
    assert "warning: images that are the same as one of another class: 2 (" in text
    assert "warning: training images are uneven: dog 25, gnu 2" in text
    assert "warning: classes of fewer than 10 training images: 1 of 3 (gnu: 2)" in text
