"""A user's own images: tables, folders without a test set, and what is said of them."""

import gzip
import io
import itertools
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from cakd_cli.commands.train import Wish, train
from cakd_cli.console import Console
from cakd_cli.data import DataOptions, ImageDataSet
from cakd_cli.data.images.pictures import decode
from cakd_cli.errors import InputError, RecipeError

CPU = torch.device("cpu")
COLOURS = {"cat": (200, 30, 30), "dog": (30, 30, 200), "élan noir": (30, 200, 30)}
SMALL = ("data.image_size=16", "data.workers=0", "data.min_crop_area=1.0", "--batch-size", 8, "--epochs", 1)


def load(kind: str, path: Path, **options) -> ImageDataSet:
    options = {"type": kind, "path": str(path), "image_size": 16, "workers": 0} | options
    return TypeAdapter(DataOptions).validate_python(options).load()


def picture(path: Path, name: str, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    red, green, blue = COLOURS[name]
    Image.new("RGB", (24, 20), (red, green + shade, blue)).save(path)
    return path


@pytest.fixture(scope="module")
def teacher_of_colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    for name, i in itertools.product(COLOURS, range(10)):
        picture(folder / "images" / name / f"{i}.png", name, i)
    settings = {"engine.epochs": 8, "engine.batch_size": 8, "optimizer.learning_rate": 0.05, "data.image_size": 16}
    settings |= {
        "data": f"folder:{folder / 'images'}",
        "data.workers": 0,
        "data.min_crop_area": 1.0,
        "model": "resnet8",
    }
    train([], settings, Wish(distil=False, out=str(folder / "teacher")), console=Console(quiet=True))
    return folder / "teacher"


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A folder a class, ten pictures each, and nothing else."""
    for name in COLOURS:
        for i in range(10):
            picture(tmp_path / "own images" / name / f"{i}.png", name, i)
    return tmp_path / "own images"


def names_of(split) -> list[str]:
    """Name the files of a split by their last two words."""
    return ["/".join(Path(split.files.path(i)).parts[-2:]) for i in split.index_N.tolist()]


def first_colours(data: ImageDataSet) -> dict[str, list[int]]:
    """Give the colour of one test picture of each class, by the class's name."""
    batches = list(data.test.ordered_batches(batch_size=64, device=CPU))
    images, labels = torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])
    return {name: images[labels == i][0, :, 0, 0].tolist() for i, name in enumerate(data.class_names)}


def check_colours(data: ImageDataSet) -> None:
    for name, (red, green, blue) in first_colours(data).items():
        expected = COLOURS[name]
        assert (red, blue) == (expected[0], expected[2])
        assert expected[1] <= green < expected[1] + 10


def test_a_folder_a_class_is_divided(classes):
    data = load("folder", classes, validation_fraction=0.25)
    parts = [names_of(split) for split in (data.train, data.validation, data.test)]

    assert data.class_names == tuple(sorted(COLOURS))
    assert [len(part) for part in parts] == [18, 6, 6]
    assert sorted(itertools.chain(*parts)) == sorted(f"{name}/{i}.png" for name in COLOURS for i in range(10))
    for part, each in zip(parts, (6, 2, 2), strict=True):
        assert [sum(name.startswith(f"{c}/") for name in part) for c in COLOURS] == [each] * 3
    assert names_of(load("folder", classes).test) == parts[2]
    assert names_of(load("folder", classes, split_seed=1).test) != parts[2]
    assert len(load("folder", classes, test_fraction=0.5).test) == 15
    why = "own images has no test/ and no val/: 6 of 30 images, the same share of every class, are the test set"
    assert data.reasons == {"test_fraction": why}
    check_colours(data)


def test_train_alone_is_divided_too(classes, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copytree(classes, tmp_path / "other" / "train")

    assert names_of(load("folder", tmp_path / "other").test) == names_of(load("folder", classes).test)


def test_a_small_class_has_one_image_in_the_test_set(classes):
    for path in sorted((classes / "cat").iterdir())[2:]:
        path.unlink()

    assert sum(name.startswith("cat/") for name in names_of(load("folder", classes).test)) == 1


def test_classes_are_found_in_the_names_of_files(classes, tmp_path):
    for path in classes.rglob("*.png"):
        name = path.parent.name
        picture(tmp_path / "flat" / "deeper" / f"{name}_{path.name}", name, int(path.stem))
    data = load("folder", tmp_path / "flat", class_pattern="^(.+)_")
    assert (data.class_names, len(data.test)) == (tuple(sorted(COLOURS)), 6)
    check_colours(data)

    for path in classes.rglob("*.png"):
        part = "test" if path.stem > "6" else "train"
        picture(tmp_path / "two" / part / f"{path.parent.name}_{path.name}", path.parent.name)
    data = load("folder", tmp_path / "two", class_pattern="^(.+)_", validation_fraction=0.0)
    assert (len(data.train), len(data.test), data.reasons) == (21, 9, {})


def test_val_as_the_test_set_is_said(classes, tmp_path):
    shutil.copytree(classes, tmp_path / "parts" / "train")
    shutil.copytree(classes, tmp_path / "parts" / "val")

    assert load("folder", tmp_path / "parts").reasons == {"path": "val/ is the test set: there is no test/"}


@pytest.fixture
def table(classes) -> Path:
    """Files here, in a folder below, and outside of the table's folder."""
    rows = ["path,label"]
    for name in COLOURS:
        rows += [f'"{name}/{i}.png","{name}"' for i in range(9)]
        picture(classes.parent / "elsewhere" / f"{name}.png", name)
        rows.append(f"../elsewhere/{name}.png,{name}")
    path = classes / "my table.csv"
    path.write_text("\n".join(rows) + "\n\n", encoding="utf-8-sig")
    return path


def test_a_table(table):
    data = load("csv", table)

    assert (data.name, data.class_names) == ("my table", tuple(sorted(COLOURS)))
    assert (len(data.train), len(data.validation), len(data.test)) == (21, 3, 6)
    assert data.reasons["test_fraction"].startswith("my table.csv has no column 'split': 6 of 30 images")
    assert data.fingerprint == load("csv", table, validation_fraction=0.5).fingerprint
    check_colours(data)


def test_a_table_is_torchvisions_folder(classes):
    """The same files, classes and order as ImageFolder has."""
    from torchvision.datasets import ImageFolder

    expected = ImageFolder(str(classes))
    rows = [f"{path}\t{expected.classes[label]}\ttrain" for path, label in expected.samples]
    rows += [f"elsewhere/{name}.png\t{name}\ttest" for name in COLOURS]
    for name in COLOURS:
        picture(classes / "elsewhere" / f"{name}.png", name)
    (classes / "t.TSV").write_text("\n".join(["file\tclass\tuse", *rows]))
    columns = {"path_column": "file", "label_column": "class", "split_column": "use"}
    data = load("csv", classes / "t.TSV", validation_fraction=0.0, **columns)

    assert list(data.class_names) == expected.classes
    assert list(zip(data.train.files, data.train.labels_by_number().tolist(), strict=True)) == expected.samples
    (batch,) = data.train.ordered_batches(batch_size=64, device=CPU)
    assert torch.equal(batch.labels, torch.tensor(expected.targets))


def test_a_table_divides(table):
    rows = [row for row in table.read_text(encoding="utf-8-sig").splitlines()[1:] if row]
    parts = ["test", *["train"] * 7, "val", "train"] * 3
    table.write_text("\n".join(["path,label,split", *(f"{r},{p}" for r, p in zip(rows, parts, strict=True))]))
    data = load("csv", table)
    assert (len(data.train), len(data.validation), len(data.test), data.reasons) == (24, 3, 3, {})

    table.write_text(table.read_text().replace(",test", ",train"))
    data = load("csv", table)
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 3, 3)
    assert data.reasons == {"path": "the rows of split val are the test set: none has the split test"}


def test_a_student_learns_from_a_table(table, teacher_of_colours, cakd, tmp_path):
    words = ("distill", "--data", f"csv:{table}", *SMALL, "--teacher", teacher_of_colours, "--student", "resnet8")
    result = cakd(*words, "--out", tmp_path / "student")

    assert result.code == 0, result.err
    assert "data.test_fraction: 0.2 (my table.csv has no column 'split': 6 of 30 images" in result.err
    facts = json.loads((tmp_path / "student" / "run.json").read_text())
    assert (facts["data"]["train"], facts["data"]["test"]) == (21, 6)
    assert "data.test_fraction" in facts["chosen"]
    assert cakd("eval", tmp_path / "student").code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"t.csv:1: has no column 'path'; it is empty"),
        ("path,label\n", r"t.csv: has no row below its header"),
        ("file,label\n0.png,a\n", r"t.csv:1: has no column 'path'; choose from file, label"),
        ("path,lable\n0.png,a\n", r"t.csv:1: has no column 'label'; did you mean lable\?"),
        ("path,label,path\n0.png,a,b\n", r"t.csv:1: has 2 columns 'path'"),
        ("path,label\n0.png\n", r"t.csv:2: has 1 column\(s\), the header has 2"),
        ("path,label\n0.png,a,b\n", r"t.csv:2: has 3 column\(s\), the header has 2"),
        ('path,label\n"0.png,a\n', r"t.csv:2: is no table: unexpected end of data"),
        ("path,label\n0.png,a\n\n,b\n", r"t.csv:4: the path is empty"),
        ("path,label\n0.png,a\n1.png, \n", r"t.csv:3: the label is empty"),
        ("path,label\n0.png,a\n9.png,b\n", r"t.csv:3: no such file: 9.png"),
        ("path,label\n0.png,a\n.,b\n", r"t.csv:3: no such file: \."),
        ("path,label\n8.png,a\n9.png,b\n", r"2 of 2 rows cannot be used:\n  .*t.csv:2: .*8.png\n  .*t.csv:3: .*9.png"),
        ("path,label\n" + "9.png,a\n" + "".join(f"x{i}.png,b\n" for i in range(9)), r"x3.png\n  and 5 more"),
        ("path,label\n0.png,a\n./0.png,a\n", r"t.csv:3: ./0.png was named in line 2, and could be trained on and"),
        ("path,label\n0.png,a\n0.png,b\n", r"t.csv:3: 0.png is 'b' here and 'a' in line 2"),
        ("path,label,split\n0.png,a,train\n0.png,a,test\n", r"t.csv:3: 0.png is in split test here and in train in"),
        ("path,label,split\n0.png,a,train\n1.png,b,valid\n", r"t.csv:3: the split is 'valid', not train, val or test"),
        ("path,label,split\n0.png,a,\n1.png,b,train\n", r"t.csv:2: the split is '', not train, val or test"),
        ("path,label,split\n0.png,a,train\n1.png,b,train\n", r"t.csv: no row has the split test"),
        ("path,label,split\n0.png,a,val\n1.png,b,test\n", r"t.csv: no row has the split train"),
        ("path,label,split\n0.png,a,train\n1.png,b,train\n2.png,b,test\n", r"no test image of class a"),
        ("path,label,split\n0.png,a,train\n1.png,a,train\n2.png,b,test\n", r"no train image of class b"),
        ("path,label\n0.png,a\n1.png,a\n", r"t.csv: all images are of one class, a"),
        ("path,label\n0.png,a\n1.png,a\n2.png,b\n", r"one image alone cannot be divided: class b"),
        (b"path,label\n0.png,caf\xe9\n", r"t.csv: is not text in UTF-8: "),
    ],
)
def test_a_wrong_table_is_explained(tmp_path, content, message):
    for i in range(3):
        picture(tmp_path / f"{i}.png", "cat", i)
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(InputError, match=message) as caught:
        load("csv", tmp_path / "t.csv")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda root: (root / "dog").rename(root / "Test"), {}, r"needs train/ and val/ or test/.* has Test, cat"),
        (
            lambda root: [shutil.rmtree(root / name) for name in ("dog", "élan noir")],
            {},
            r"or a folder a class, has cat",
        ),
        (lambda root: (root / "nothing").mkdir(), {}, r"no picture in the folder of nothing"),
        (lambda root: (root / "cat").rename(root / "val"), {}, r"needs train/ and val/ or test/, has dog, val"),
        (
            lambda root: None,
            {"class_pattern": "^([a-z]+)_"},
            r"finds no class in 30 of 30 names: cat/0.*25 more",
        ),
        (lambda root: None, {"class_pattern": "(png)$"}, r"all images are of one class, png"),
        (lambda root: None, {"class_pattern": "^(x*)"}, r"finds no class in 30 of 30"),
        (lambda root: picture(root / "cat" / "x1.png", "cat"), {"class_pattern": "(x?[0-9])"}, r"divided: class x1"),
        (lambda root: [shutil.rmtree(path) for path in root.iterdir()], {"class_pattern": "(.)"}, r"has no picture"),
    ],
)
def test_a_wrong_folder_is_explained(classes, change, options, message):
    change(classes)
    with pytest.raises(InputError, match=message) as caught:
        load("folder", classes, **options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_pattern": "("}, "is no regular expression: missing"),
        ({"class_pattern": "^[a-z]+"}, "needs one group in round brackets, which is the class, and has 0"),
        ({"class_pattern": "(a)(b)"}, "and has 2"),
        ({"type": "csv", "path_column": "label"}, "is 'label', and so is label_column"),
        ({"type": "csv", "label_column": ""}, "at least 1 character"),
        ({"test_fraction": 0.0}, "greater than 0"),
    ],
)
def test_wrong_keys_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(DataOptions).validate_python({"type": "folder", "path": "x"} | options)


def test_loose_pictures_bring_the_pattern_to_mind(tmp_path):
    picture(tmp_path / "cat_1.png", "cat")

    with pytest.raises(InputError) as caught:
        load("folder", tmp_path)
    assert "set data.class_pattern" in caught.value.hint


@pytest.fixture
def unlabelled(classes, tmp_path) -> Path:
    root = tmp_path / "unlabelled"
    for name in COLOURS:
        for i in range(8):
            picture(root / "train" / ("deep" if i % 2 else "") / f"{COLOURS[name][0]}-{i}-{len(name)}.png", name, i)
    for part in ("val", "test"):
        shutil.copytree(classes, root / part)
    return root


def test_images_without_labels(unlabelled):
    data = load("unlabelled", unlabelled)
    (batch,) = data.train.train_batches(batch_size=24, seed=0, epoch=0, start=0, device=CPU)

    assert (len(data.train), len(data.validation), len(data.test)) == (24, 30, 30)
    assert (data.class_names, data.labelled) == (tuple(sorted(COLOURS)), False)
    assert batch.labels.tolist() == [-1] * 24
    assert sorted(batch.samples.tolist()) == list(range(24))
    assert load("folder", unlabelled.parent / "own images").labelled
    check_colours(data)
    shutil.rmtree(unlabelled / "val")
    assert load("unlabelled", unlabelled).validation is None


def test_a_student_learns_without_labels(unlabelled, teacher_of_colours, cakd, tmp_path):
    out = tmp_path / "student"
    words = ("distill", "--data", f"unlabelled:{unlabelled}", "--teacher", teacher_of_colours, "--student", "resnet8")
    result = cakd(*words, *SMALL, "loss=[{type: kd}, {type: cakd, grouping: top-k}]", "--out", out)
    assert result.code == 0, result.err
    facts = json.loads((out / "run.json").read_text())
    (line,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert (facts["data"]["validation"], set(facts["metrics"])) == (30, {"validation", "test"})
    assert "top1" not in line["train"]
    assert cakd("eval", out).code == 0
    refused = cakd("eval", out, "--split", "train")
    assert (refused.code, "the training images of unlabelled have no labels" in refused.err) == (3, True)
    shutil.rmtree(unlabelled / "val")
    result = cakd(*words, *SMALL, "loss=[{type: dist}]", "--out", tmp_path / "last")
    assert result.code == 0, result.err
    assert "no image is held out: the last epoch's network is kept" in result.err
    assert "teacher teacher: top-1" not in result.err


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("kd", "loss.0: cross-entropy needs labels, and the training images of unlabelled have none"),
        ("dkd", "loss.0: cross-entropy, loss.1: dkd need labels"),
        ("[{type: cakd}]", "loss.0: cakd needs labels"),
        ("[{type: cmkd, difficulty: label}]", "loss.0: cmkd needs labels"),
        ("[{type: kd}, {type: crd}]", "loss.1: crd needs labels"),
    ],
)
def test_terms_that_need_labels_are_refused_without(unlabelled, teacher_of_colours, cakd, loss, message):
    words = ("distill", "--data", f"unlabelled:{unlabelled}", "--teacher", teacher_of_colours)
    result = cakd(*words, "--student", "resnet8", *SMALL, f"loss={loss}", "--dry-run")

    assert (result.code, message in " ".join(result.err.split())) == (3, True), result.err
    assert "hint:" in result.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "train"), r"lacks train"),
        (lambda root: (shutil.rmtree(root / "test"), shutil.rmtree(root / "train")), r"lacks train and test"),
        (lambda root: [p.unlink() for p in (root / "train").rglob("*.png")], r"train: has no picture"),
        (lambda root: shutil.rmtree(root / "val" / "cat"), r"only in test/: cat"),
        (lambda root: [shutil.rmtree(root / "test" / name) for name in ("cat", "dog")], r"has 1 class folder"),
        (lambda root: [p.unlink() for p in (root / "test" / "cat").iterdir()], r"no picture in the folder of cat"),
        (lambda root: (root / "train" / "x.png").write_bytes(b"x"), r"1 of 25 images cannot be used"),
    ],
)
def test_wrong_folders_without_labels_are_explained(unlabelled, change, message):
    change(unlabelled)

    with pytest.raises(InputError, match=message) as caught:
        load("unlabelled", unlabelled)
    assert caught.value.hint


def jpeg(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    pixels = torch.randint(0, 256, (*size[::-1], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    content = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(content, "JPEG")
    return content.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def tars(tmp_path) -> Path:
    """Three tars of twelve images each, in three classes, as webdataset's own writer names them."""
    for tar in range(3):
        members = {}
        for i in range(12):
            members[f"{tar}/{i:04d}.jpg"] = jpeg(100 * tar + i)
            members[f"{tar}/{i:04d}.cls"] = str(i % 3).encode()
            members[f"{tar}/{i:04d}.txt"] = b"an image of something"
        write_tar(tmp_path / f"set-{tar:03d}.tar", members)
    return tmp_path


# It leaves its tars open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tars_are_what_webdataset_reads(tars):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(tars / f"set-{tar:03d}.tar") for tar in range(2)]
    reader = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls")
    expected = list(reader)
    options = {"test_path": str(tars / "set-002.tar"), "validation_fraction": 0.0, "workers": 2}
    data = load("wds", tars / "set-{000..001}.tar", image_size=20, test_crop=1.0, **options)
    images = [data.train.pictures([lambda picture: picture])]
    batches = list(data.train.ordered_batches(batch_size=10, device=CPU))

    assert (data.class_names, len(data.train), len(data.test), data.name) == (("0", "1", "2"), 24, 12, "set")
    assert torch.cat([batch.labels for batch in batches]).tolist() == [label for _, _, label in expected]
    assert len(images[0]) == 24
    shown = torch.cat([batch.images for batch in batches])
    for (key, picture, _), path, image in zip(expected, data.train.files, shown, strict=True):
        assert path.endswith(f":{key}.jpg")
        # 24 x 20 pixels: the middle 20 x 20 as they are.
        assert torch.equal(image, torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, :, 2:22])


def test_tars_in_every_way(tars):
    by_braces = load("wds", tars / "set-00{0,1,2}.tar", validation_fraction=0.25)
    by_glob = load("wds", tars / "set-*.tar", validation_fraction=0.25)
    assert [len(split) for split in (by_glob.train, by_glob.validation, by_glob.test)] == [24, 6, 6]
    assert by_glob.reasons["test_fraction"].startswith("data.test_path is not set: 6 of 36 images")
    assert by_glob.fingerprints == by_braces.fingerprints
    (tars / "names.txt").write_text("ape\n bee\ncow\n")
    named = load("wds", tars / "set-000.tar", class_names=str(tars / "names.txt"), val_path=str(tars / "set-001.tar"))
    assert (named.class_names, len(named.validation), len(named.test)) == (("ape", "bee", "cow"), 12, 3)
    assert named.fingerprint != by_glob.fingerprint


def test_labels_of_tars_may_be_json_and_names(tmp_path):
    members = {}
    for i in range(12):
        members[f"{i}.png"] = picture(tmp_path / "x.png", "cat", i).read_bytes()
        members[f"{i}.json"] = json.dumps({"species": list(COLOURS)[i % 3], "label": 7}).encode()
    write_tar(tmp_path / "t.tar", members)
    data = load("wds", tmp_path / "t.tar", json_key="species", decoded_gb=0.01, views=2)

    assert data.class_names == tuple(sorted(COLOURS))
    assert data.train.views.samples == 9
    first, second = (
        torch.cat([b.images for b in data.train.train_batches(batch_size=4, seed=0, epoch=0, start=0, device=CPU)])
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_a_bad_image_of_a_tar_is_named(tars):
    members = {f"{i}.jpg": jpeg(i) for i in range(12)} | {f"{i}.cls": str(i % 2).encode() for i in range(12)}
    write_tar(tars / "t.tar", members | {"3.jpg": b"no picture", "5.jpg": members["5.jpg"][:-300]})
    with pytest.raises(
        InputError, match=r"1 of 10 images cannot be used:\n  .*t.tar:3.jpg: cannot be read as an"
    ) as caught:
        load("wds", tars / "t.tar")
    assert "object at 0x" not in str(caught.value)
    data = load("wds", tars / "t.tar", bad_images="skip")
    assert sorted(data.left_out) == [f"{tars / 't.tar'}:{name}.jpg" for name in (3, 5)]
    (tars / "t.tar").unlink()
    with pytest.raises(InputError, match=r"t.tar:.*.jpg: cannot be read as an image: .*No such file"):
        list(data.test.ordered_batches(batch_size=4, device=CPU))


def test_a_student_learns_from_tars(teacher_of_colours, cakd, tmp_path):
    for tar in range(3):
        members = {}
        for number, name in enumerate(COLOURS):
            for i in range(4):
                content = picture(tmp_path / "x.png", name, 4 * tar + i).read_bytes()
                members |= {f"{number}{i}.png": content, f"{number}{i}.cls": name.encode()}
        write_tar(tmp_path / f"{tar}.tar", members)
    words = ("--data", f"wds:{tmp_path}/{{0..1}}.tar", f"data.test_path={tmp_path / '2.tar'}", *SMALL)
    words += ("--teacher", teacher_of_colours, "--student", "resnet8", "--out", tmp_path / "student")
    result = cakd("distill", *words)

    assert result.code == 0, result.err
    assert json.loads((tmp_path / "student" / "run.json").read_text())["data"]["test"] == 12


GOOD = {f"{i}.{end}": content for i in range(12) for end, content in (("jpg", jpeg(i)), ("cls", b"%d" % (i % 2)))}


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ({}, {"path": "none.tar"}, r"no such tar: none.tar"),
        ({}, {"path": "none-{00..02}.tar"}, r"no such tar: none-00.tar"),
        ({}, {"path": "x-*.tar"}, r"no such tar: x-\*.tar"),
        ({}, {"path": "x-{9..1}.tar"}, r"x-\{9..1\}.tar: \{9..1\} is no range of numbers"),
        ({}, {"path": "x-{0..999999999}.tar"}, r"is no range of numbers"),
        ({"readme.txt": b"x"}, {}, r"t.tar: has no image"),
        ({**GOOD, "99.jpg": b""}, {}, r"t.tar:99: has no label"),
        ({**GOOD, "99.cls": b"1"}, {}, r"t.tar:99: has 0 images"),
        ({**GOOD, "0.png": b""}, {}, r"t.tar:0: has 2 images"),
        ({**GOOD, "0.cls": b" "}, {}, r"t.tar:0.cls: holds no number and no name"),
        ({**GOOD, "0.cls": b"\xff"}, {}, r"t.tar:0.cls: is no label"),
        ({**GOOD, "99.jpg": b"", "99.json": b"{}"}, {}, r"t.tar:99.json: has no key 'label'"),
        ({**GOOD, "99.jpg": b"", "99.json": b"[" * 9}, {}, r"t.tar:99.json: is no label"),
        ({**GOOD, "99.jpg": b"", "99.json": b'{"label": [1]}'}, {}, r"t.tar:99.json: holds no number and no name"),
        (GOOD, {"test_path": "none.tar"}, r"no such tar: none.tar"),
        (GOOD, {"class_names": "none.txt"}, r"data.class_names none.txt: cannot be read"),
        (GOOD, {"class_names": "one.txt"}, r"t.tar:1.jpg: has the label 1, and data.class_names has 1 names"),
        (
            {n: c for n, c in GOOD.items() if n[-3:] == "jpg"} | {f"{i}.cls": b"0" for i in range(12)},
            {},
            r"of one class",
        ),
        (GOOD, {"val_path": "t.tar"}, r"t.tar is both in train and in val"),
    ],
)
def test_wrong_tars_are_explained(tmp_path, monkeypatch, members, options, message):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "t.tar", members)
    (tmp_path / "one.txt").write_text("ape\n")

    with pytest.raises(InputError, match=message) as caught:
        load(**({"kind": "wds", "path": Path("t.tar")} | options))
    assert caught.value.hint


def test_damaged_tars_are_explained(tmp_path):
    content = write_tar(tmp_path / "t.tar", GOOD).read_bytes()
    starts = [512 * block for block in range(len(content) // 512) if content[512 * block + 257 :][:5] == b"ustar"]
    for end in (starts[3] - 700, starts[3] + 200):
        (tmp_path / "t.tar").write_bytes(content[:end])
        with pytest.raises(InputError, match=r"t.tar: is not whole: (unexpected end of data|it ends in the middle)"):
            load("wds", tmp_path / "t.tar")
    (tmp_path / "t.tar").write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match=r"t.tar: is compressed"):
        load("wds", tmp_path / "t.tar")
    (tmp_path / "t.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match=r"t.tar: is no tar"):
        load("wds", tmp_path / "t.tar")


def hugging_face(count: int, *, seed: int = 0, features: dict | None = None):
    """Make a table of datasets with images, as files and as bytes, and classes."""
    datasets = pytest.importorskip("datasets")
    rows = {"id": [], "picture": [], "species": []}
    for i in range(count):
        rows["id"].append(i)
        rows["picture"].append({"bytes": jpeg(seed + i), "path": None})
        rows["species"].append(i % 3)
    kinds = {
        "id": datasets.Value("int32"),
        "picture": datasets.Image(),
        "species": datasets.ClassLabel(names=["ape", "bee", "cow"]),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds | (features or {})))


def check_same(data: ImageDataSet, split, table) -> None:
    batches = list(split.ordered_batches(batch_size=8, device=CPU))
    shown = torch.cat([batch.images for batch in batches])
    assert torch.cat([batch.labels for batch in batches]).tolist() == list(table["species"])
    for image, row in zip(shown, table, strict=True):
        assert torch.equal(image, torch.from_numpy(np.array(row["picture"])).permute(2, 0, 1)[:, :, 2:22])


WHOLE = {"image_size": 20, "test_crop": 1.0, "validation_fraction": 0.0}


def test_a_folder_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": hugging_face(24), "test": hugging_face(12, seed=50), "validation": hugging_face(6, seed=90)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two words")
    data = load("hf", tmp_path / "two words", **WHOLE, workers=2)

    assert (data.name, data.class_names, data.reasons) == ("two words", ("ape", "bee", "cow"), {})
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 6, 12)
    for split, part in ((data.train, "train"), (data.validation, "validation"), (data.test, "test")):
        check_same(data, split, parts[part])
    assert load("hf", tmp_path / "two words", **WHOLE).fingerprints == data.fingerprints


def test_parquet_of_datasets(tmp_path):
    table = hugging_face(12)
    (tmp_path / "data").mkdir()
    for shard in range(2):
        rows = table.select(range(6 * shard, 6 * shard + 6))
        rows.to_parquet(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet")
    data = load("hf", tmp_path, **WHOLE)

    assert (len(data.train), len(data.test)) == (9, 3)
    assert data.reasons["test_fraction"].startswith(f"{tmp_path.name} has no test part: 3 of 12 images")
    hugging_face(6).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    data = load("hf", tmp_path, **WHOLE)
    check_same(data, data.train, table)
    assert data.reasons == {"path": "the validation part is the test set: there is no test part"}


def test_a_student_learns_from_datasets(teacher_of_colours, cakd, tmp_path):
    datasets = pytest.importorskip("datasets")
    names = sorted(COLOURS)
    paths = [str(picture(tmp_path / f"{i}.png", names[i % 3], i // 3)) for i in range(30)]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    rows = {"image": paths, "label": [i % 3 for i in range(30)]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).save_to_disk(tmp_path / "set")
    words = ("distill", "--data", f"hf:{tmp_path / 'set'}", *SMALL, "--teacher", teacher_of_colours)
    result = cakd(*words, "--student", "resnet8", "--out", tmp_path / "student")

    assert result.code == 0, result.err
    assert json.loads((tmp_path / "student" / "run.json").read_text())["data"]["test"] == 6


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda path: None, {}, r"has no part train, has nothing that datasets reads"),
        (lambda path: (path / "state.json").write_text("{"), {}, r"set: cannot be read: "),
        (lambda path: (path / "train.parquet").write_bytes(b"x"), {}, r"set: cannot be read: "),
        (lambda path: hugging_face(6).to_parquet(path / "testing.parquet"), {}, r"has no part train, has testing"),
        (lambda path: save(path, hugging_face(12).remove_columns("picture")), {}, r"has 0 columns of Image: none"),
        (lambda path: save(path, hugging_face(12).remove_columns("species")), {}, r"has 0 columns of ClassLabel: none"),
        (
            lambda path: save(path, hugging_face(12)),
            {"image_column": "image"},
            r"'image' is no column of Image; choose",
        ),
        (lambda path: save(path, hugging_face(12)), {"label_column": "id"}, r"'id' is no column of ClassLabel; choose"),
        (lambda path: save(path, hugging_face(2)), {}, r"no train image of class cow"),
        (lambda path: save(path, hugging_face(3)), {}, r"cannot be divided: class ape, bee, cow"),
        (lambda path: save(path, hidden(12)), {}, r"4 of 12 train images have no label"),
    ],
)
def test_wrong_folders_of_datasets_are_explained(tmp_path, change, options, message):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    change(tmp_path / "set")

    with pytest.raises(InputError, match=message) as caught:
        load("hf", tmp_path / "set", **options)
    assert caught.value.hint


def save(path: Path, table) -> None:
    table.save_to_disk(path)


def hidden(count: int):
    """Take the labels of a class away, as test sets of contests do."""
    table = hugging_face(count)
    return table.map(lambda row: {"species": None if row["species"] == 1 else row["species"]})


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(RecipeError, match="needs the library datasets") as caught:
        load("hf", tmp_path)
    assert "cakd[datasets]" in caught.value.hint


def test_large_jpegs_can_be_decoded_at_a_fraction(tmp_path):
    """What crops are taken of is the picture made smaller; small ones, and all that is measured, are the very same."""
    for part, name, i in itertools.product(("train", "test"), ("cat", "dog"), range(2)):
        (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
        size = (320, 240) if i else (30, 40)
        gradient = Image.radial_gradient("L").resize(size)
        Image.merge("RGB", (gradient, gradient.transpose(0), gradient)).save(tmp_path / part / name / f"{i}.jpg")
    options = {"validation_fraction": 0.0}
    plain, drafted = (load("folder", tmp_path, draft_jpeg=draft, **options) for draft in (False, True))
    seen = [
        torch.cat([b.images for b in split.train_batches(batch_size=4, seed=0, epoch=0, start=0, device=CPU)])
        for split in (plain.train, drafted.train)
    ]
    difference = (seen[0].float() - seen[1].float()).abs().flatten(1).mean(1)

    assert sorted((difference == 0).tolist()) == [False, False, True, True]
    path = str(tmp_path / "train" / "cat" / "1.jpg")
    whole, drafted_picture = decode(path, 16), decode(path, 16, draft=plain.train._spec.shorter_side)
    smaller = np.asarray(whole.resize((80, 60), Image.Resampling.BOX), dtype=float)
    assert drafted_picture.size == (80, 60)
    assert np.abs(smaller - np.asarray(drafted_picture)).mean() < 1
    first, second = (next(iter(d.test.ordered_batches(batch_size=4, device=CPU))).images for d in (plain, drafted))
    assert torch.equal(first, second)
    views = [load("folder", tmp_path, draft_jpeg=draft, views=2).train.views for draft in (False, True)]
    assert views[0].identity != views[1].identity
