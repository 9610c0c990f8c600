"""Data sets of the literature, as their archives unpack, but small."""

import hashlib
import io
import shutil
import sys
import tarfile

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torchvision import datasets
from torchvision.datasets import imagenet

from cakd_cli.data import DataOptions
from cakd_cli.errors import InputError
from tests.data.test_sets import CPU, load, no_network

WNIDS = ("n02012849", "n01440764", "n03126707")  # not sorted, as in wnids.txt
WORDS = {"n02012849": "crane", "n01440764": "tench, Tinca tinca", "n03126707": "crane"}
NAMES = ("tench", "crane (n02012849)", "crane (n03126707)")


def picture(path, value, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path, "JPEG", quality=100)


def labelled_values(split):
    """Labels with the grey value of their images, in order."""
    (batch,) = split.ordered_batches(batch_size=len(split), device=CPU)
    return list(zip(batch.labels.tolist(), batch.images.float().mean((1, 2, 3)).round().int().tolist(), strict=True))


@pytest.fixture
def tiny(tmp_path):
    """Three classes of two training images and four test images."""
    root = tmp_path / "tiny-imagenet-200"
    for wnid in WNIDS:
        for i in range(2):
            picture(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 100, (64, 64))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t62\t7\t41\n")
    rows = []
    for i, wnid in enumerate((*WNIDS, WNIDS[0])):
        picture(root / "val" / "images" / f"val_{i}.JPEG", 10 * i, (64, 64))
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    picture(root / "test" / "images" / "test_0.JPEG", 0)
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    words = WORDS | {"n00001740": "entity"}
    (root / "words.txt").write_text("".join(f"{wnid}\t{word}\n" for wnid, word in words.items()))
    return root


def tiny_data(root, **options):
    return load(type="tiny-imagenet", path=str(root), workers=0, **options)


def test_tiny_imagenet(tiny):
    data = tiny_data(tiny, validation_fraction=0.5)

    assert (len(data.train), len(data.validation), len(data.test)) == (3, 3, 4)
    assert (data.name, data.class_names, data.image_size, data.crop_pct) == ("tiny-imagenet", NAMES, (64, 64), 1.0)
    assert data.mean == (0.4802, 0.4481, 0.3975)
    # Labels in the order of sorted wnids, whatever that of wnids.txt.
    assert labelled_values(data.test) == [(1, 0), (0, 10), (2, 20), (1, 30)]
    assert sorted(data.fingerprints) == ["test", "train"]


def test_tiny_imagenet_with_val_sorted_into_folders(tiny):
    annotated = tiny_data(tiny)
    for i, wnid in enumerate((*WNIDS, WNIDS[0])):
        (tiny / "val" / wnid).mkdir(exist_ok=True)
        (tiny / "val" / "images" / f"val_{i}.JPEG").rename(tiny / "val" / wnid / f"val_{i}.JPEG")
    (tiny / "val" / "images").rmdir()
    data = tiny_data(tiny)

    assert labelled_values(data.test) == [(0, 10), (1, 0), (1, 30), (2, 20)]
    assert data.fingerprints["train"] == annotated.fingerprints["train"]


def test_a_fingerprint_is_of_the_files_and_not_of_their_place(tiny, tmp_path):
    before = tiny_data(tiny).fingerprints
    tiny.rename(tmp_path / "moved")
    assert tiny_data(tmp_path / "moved").fingerprints == before

    picture(tmp_path / "moved" / "val" / "images" / "val_0.JPEG", 200, (60, 60))
    after = tiny_data(tmp_path / "moved").fingerprints
    assert after["train"] == before["train"]
    assert after["test"] != before["test"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root), "no such folder of images"),
        (lambda root: (root / "wnids.txt").unlink(), "lacks wnids.txt"),
        (lambda root: shutil.rmtree(root / "val"), "lacks val"),
        (lambda root: shutil.rmtree(root / "train" / WNIDS[1]), r"only in wnids.txt: n01440764"),
        (lambda root: shutil.rmtree(root / "train" / WNIDS[1] / "images"), r"no picture in the folder of n01440764"),
        (lambda root: (root / "val" / "val_annotations.txt").unlink(), "val: lacks val_annotations.txt"),
        (lambda root: (root / "val" / "images" / "val_3.JPEG").unlink(), "lacks 1 of 4 images, as val_3"),
        (
            lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG n02012849 1 2\nval_1.JPEG n9 1"),
            r"val_annotations.txt: knows no class of 3 of 4 images, as val_1",
        ),
    ],
)
def test_half_of_tiny_imagenet_is_explained(tiny, change, message):
    change(tiny)

    spec = TypeAdapter(DataOptions).validate_python({"type": "tiny-imagenet", "path": str(tiny)})
    for fetch in (True, False):
        with pytest.raises(InputError, match=message) as caught:
            spec.load(fetch=fetch)
        assert caught.value.hint


@pytest.fixture
def flat_imagenet(tmp_path):
    """Three classes of two training images; four validation images that a table has to name."""
    root = tmp_path / "imagenet"
    write_imagenet(root)
    return root


VALIDATION = (WNIDS[2], WNIDS[0], WNIDS[1], WNIDS[1])


def write_imagenet(root):
    for wnid in WNIDS:
        for i in range(2):
            picture(root / "train" / wnid / f"{wnid}_{i}.JPEG", 100)
    for number in range(1, 5):
        picture(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", 10 * number)


def imagenet_data(root, **options):
    return load(type="imagenet", path=str(root), workers=0, validation_fraction=0.0, **options)


def write_val_txt(root):
    numbers = [sorted(WNIDS).index(wnid) for wnid in VALIDATION]
    rows = [f"ILSVRC2012_val_{i:08d}.JPEG {number}\n" for i, number in enumerate(numbers, 1)]
    (root / "val.txt").write_text("".join(rows))


def write_val_txt_of_wnids(root):
    rows = [f"ILSVRC2012_val_{i:08d}.JPEG\t{wnid}\n" for i, wnid in enumerate(VALIDATION, 1)]
    (root / "val.txt").write_text("".join(rows))


def write_solution(root):
    rows = [f"ILSVRC2012_val_{i:08d},{wnid} 85 1 499 272 {wnid} 1 2 3 4 \n" for i, wnid in enumerate(VALIDATION, 1)]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows[::-1]))


def write_meta(root):
    torch.save(({wnid: (word,) for wnid, word in WORDS.items()}, list(VALIDATION)), root / "meta.bin")


@pytest.mark.parametrize("write", [write_val_txt, write_val_txt_of_wnids, write_solution, write_meta])
def test_imagenet_with_a_flat_val(flat_imagenet, write):
    write(flat_imagenet)
    data = imagenet_data(flat_imagenet)

    assert (len(data.train), data.validation, len(data.test)) == (6, None, 4)
    assert (data.image_size, data.crop_pct, data.class_names) == ((224, 224), 0.875, tuple(sorted(WNIDS)))
    assert labelled_values(data.test) == [(2, 10), (1, 20), (0, 30), (0, 40)]


def test_the_devkit_is_read_where_nothing_may_be_written(flat_imagenet, monkeypatch):
    """meta.mat counts the synsets in an order of its own, and has more of them than there are classes."""
    import numpy as np
    from scipy.io import savemat

    kind = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    rows = [(i, wnid, WORDS[wnid], "", 0) for i, wnid in enumerate(WNIDS, 1)] + [(4, "n00001740", "entity", "", 3)]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array(rows, dtype=kind)})
    truth = "".join(f"{WNIDS.index(wnid) + 1}\n" for wnid in VALIDATION).encode()
    devkit = flat_imagenet / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(devkit, "w:gz") as archive:
        for name, content in (("meta.mat", mat.getvalue()), ("ILSVRC2012_validation_ground_truth.txt", truth)):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match=r"devkit_t12.tar.gz: is not whole"):
        imagenet_data(flat_imagenet)
    digest = hashlib.md5(devkit.read_bytes()).hexdigest()
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (devkit.name, digest))

    assert labelled_values(imagenet_data(flat_imagenet).test) == [(2, 10), (1, 20), (0, 30), (0, 40)]
    assert not (flat_imagenet / "meta.bin").exists()
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match="cannot be read without scipy") as caught:
        imagenet_data(flat_imagenet)
    assert caught.value.hint == "pip install scipy"


def test_imagenet_as_kaggle_has_it(tmp_path):
    write_imagenet(tmp_path / "ILSVRC" / "Data" / "CLS-LOC")
    write_solution(tmp_path)
    picture(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "test" / "ILSVRC2012_test_00000001.JPEG", 0)
    (tmp_path / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {word}\n" for wnid, word in WORDS.items()))
    data = imagenet_data(tmp_path)

    assert data.class_names == NAMES
    assert labelled_values(data.test) == [(2, 10), (1, 20), (0, 30), (0, 40)]


def test_imagenet_with_val_in_folders(flat_imagenet):
    for i, wnid in enumerate(VALIDATION, 1):
        (flat_imagenet / "val" / wnid).mkdir(exist_ok=True)
        name = f"ILSVRC2012_val_{i:08d}.JPEG"
        (flat_imagenet / "val" / name).rename(flat_imagenet / "val" / wnid / name)

    assert labelled_values(imagenet_data(flat_imagenet).test) == [(0, 30), (0, 40), (1, 20), (2, 10)]
    shutil.rmtree(flat_imagenet / "val" / WNIDS[0])
    with pytest.raises(InputError, match="only in train/: n02012849"):
        imagenet_data(flat_imagenet)


def test_half_of_imagenet_is_explained(flat_imagenet):
    def error():
        with pytest.raises(InputError) as caught:
            imagenet_data(flat_imagenet)
        assert caught.value.hint
        return caught.value

    assert "nothing says which class its images have" in error().message
    assert "LOC_val_solution.csv, val.txt, meta.bin, ILSVRC2012_devkit_t12.tar.gz" in error().hint
    (flat_imagenet / "meta.bin").write_bytes(b"nothing")
    assert "meta.bin: is not whole" in error().message
    write_val_txt(flat_imagenet)
    picture(flat_imagenet / "val" / "ILSVRC2012_val_00000005.JPEG", 0)
    assert "val.txt: knows no class of 1 of 5 images, as ILSVRC2012_val_00000005" in error().message
    for number in (4, 5):
        (flat_imagenet / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").unlink()
    assert "val: lacks 1 of 4 images, as ILSVRC2012_val_00000004" in error().message
    for wnid in WNIDS[1:]:
        shutil.rmtree(flat_imagenet / "train" / wnid)
    assert "has 1 class folder(s)" in error().message
    shutil.rmtree(flat_imagenet / "train")
    assert "imagenet: lacks train" in error().message


@pytest.fixture
def cub(tmp_path):
    """Two kinds of three birds; the split is no matter of order."""
    root = tmp_path / "CUB_200_2011"
    kinds = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    images = [(i, f"{kinds[i // 4]}/bird_{i}.jpg", i // 4 + 1, int(i % 3 == 1)) for i in range(1, 7)]
    for i, path, _, _ in images:
        picture(root / "images" / path, 10 * i, (30, 24))
    (root / "images.txt").write_text("".join(f"{i} {path}\n" for i, path, _, _ in images))
    (root / "image_class_labels.txt").write_text("".join(f"{i} {kind}\n" for i, _, kind, _ in images))
    (root / "train_test_split.txt").write_text("".join(f"{i} {train}\n" for i, _, _, train in images))
    (root / "classes.txt").write_text("".join(f"{i} {kind}\n" for i, kind in enumerate(kinds, 1)))
    return tmp_path


def cub_data(root, **options):
    return load(type="cub200", path=str(root), workers=0, validation_fraction=0.0, **options)


def test_cub200(cub):
    data = cub_data(cub)

    assert (data.class_names, data.image_size) == (("Black footed Albatross", "Laysan Albatross"), (224, 224))
    assert labelled_values(data.train) == [(0, 10), (1, 40)]
    assert labelled_values(data.test) == [(0, 20), (0, 30), (1, 50), (1, 60)]
    assert cub_data(cub / "CUB_200_2011").fingerprints == data.fingerprints


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "classes.txt").unlink(), "CUB_200_2011: lacks classes.txt"),
        (lambda root: shutil.rmtree(root / "images"), "CUB_200_2011: lacks images"),
        (lambda root: (root / "image_class_labels.txt").write_text("1 1\n2 1\n3 3\n"), "does not know 4 of 6 images"),
        (
            lambda root: (root / "train_test_split.txt").write_text("1 1\n2 yes\n"),
            "does not know 5 of 6 images, as 001",
        ),
        (lambda root: (root / "images.txt").write_text("1 001.Black_footed_Albatross/bird_1.jpg\n"), "has no image"),
        (lambda root: (root / "images" / "002.Laysan_Albatross" / "bird_4.jpg").unlink(), "1 of 2 images cannot be"),
    ],
)
def test_half_of_cub200_is_explained(cub, change, message):
    change(cub / "CUB_200_2011")

    with pytest.raises(InputError, match=message) as caught:
        cub_data(cub)
    assert caught.value.hint


def stl10_files(root, monkeypatch):
    """Write the binary files of the labelled images, column by column as they are, and return the test pixels."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    sums = {}
    for part, count in (("train", 20), ("test", 10)):
        pixels = torch.randint(0, 256, (count, 3, 96, 96), dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10 + 1
        for name, tensor in ((f"{part}_X.bin", pixels.transpose(2, 3)), (f"{part}_y.bin", labels)):
            (folder / name).write_bytes(tensor.contiguous().numpy().tobytes())
            sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    named = [[name, digest] for name, digest in sums.items()]
    monkeypatch.setattr(datasets.STL10, "train_list", [*named[:2], ["unlabeled_X.bin", "0"]])
    monkeypatch.setattr(datasets.STL10, "test_list", named[2:])
    return pixels


def test_stl10(tmp_path, monkeypatch):
    pixels = stl10_files(tmp_path, monkeypatch)
    data = load(type="stl10", root=str(tmp_path), validation_fraction=0.5)

    assert (len(data.train), len(data.validation), len(data.test)) == (10, 10, 10)
    assert (data.class_names[2], data.image_size) == ("car", (96, 96))
    batch = next(iter(data.test.ordered_batches(batch_size=10, device=CPU)))
    assert torch.equal(batch.images, pixels)
    assert batch.labels.tolist() == list(range(10))


def test_damaged_stl10_is_fetched_again(tmp_path, monkeypatch):
    stl10_files(tmp_path, monkeypatch)
    (tmp_path / "stl10_binary" / "test_y.bin").write_bytes(b"1")
    monkeypatch.setattr("urllib.request.urlopen", no_network)

    with pytest.raises(InputError, match=r"no stl10 in .*no route to host") as caught:
        load(type="stl10", root=str(tmp_path))
    assert "stl10_binary.tar.gz" in caught.value.hint


def test_data_of_the_literature_is_listed(cakd):
    names = [row["name"] for row in cakd("list", "data", "--json").document]

    assert {"tiny-imagenet:PATH", "imagenet:PATH", "cub200:PATH", "stl10"} <= set(names)


def test_a_network_learns_from_tiny_imagenet(cakd, tiny, tmp_path):
    words = ("train-teacher", "--data", f"tiny-imagenet:{tiny}", "--model", "resnet8", "--batch-size", 3)
    result = cakd(*words, "--epochs", 1, "data.workers=0", "--out", tmp_path / "run")

    assert result.code == 0, result.err
    assert "rotation: 20.0" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert cakd("eval", tmp_path / "run", "--json").document["samples"] == 4
