"""Data sets: the real loading code on small files of the real formats."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import tracemalloc
import urllib.error
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torchvision import datasets

from cakd_cli.data import DataOptions, ImageDataSet
from cakd_cli.data.base import hold_out
from cakd_cli.data.images.pictures import Files
from cakd_cli.errors import InputError
from tests.conftest import write_tensors_file

CPU = torch.device("cpu")


def load(**options) -> ImageDataSet:
    return TypeAdapter(DataOptions).validate_python(options).load()


def test_digits():
    data = load(type="digits")

    assert (len(data.train) + len(data.validation), len(data.test)) == (1437, 360)
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, (8, 8))
    assert data.fingerprint == load(type="digits", validation_fraction=0.3).fingerprint


def test_digits_say_where_they_are_from():
    from safetensors import safe_open

    import cakd_cli.data

    file = Path(cakd_cli.data.__file__).parent / "images" / "assets" / "digits.safetensors"
    with safe_open(file, "pt") as content:
        assert "CC BY 4.0" in content.metadata()["licence"]
        assert "UCI" in content.metadata()["source"]


def test_held_out_share_is_stratified_and_fixed_by_its_seed():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3 + [3])
    keep, held = hold_out(labels, 0.1, seed=3)

    assert labels[held].bincount(minlength=4).tolist() == [10, 5, 0, 0]
    assert sorted([*keep.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert torch.equal(held, hold_out(labels, 0.1, seed=3)[1])
    assert not torch.equal(held, hold_out(labels, 0.1, seed=4)[1])
    assert len(hold_out(labels, 0.0, seed=3)[1]) == 0


def test_normalisation_is_measured_on_the_training_images(tmp_path):
    path = write_tensors_file(tmp_path / "d.safetensors", channels=2)
    pixels = load_file(path)["train_images"].double() / 255

    data = load(type="tensors", path=str(path))

    torch.testing.assert_close(torch.tensor(data.mean).double(), pixels.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(data.std).double(), pixels.std((0, 2, 3), correction=0), atol=1e-6, rtol=0)


def test_an_epoch_shows_every_sample_once_and_resumes_in_the_middle(toy_file):
    data = load(type="tensors", path=str(toy_file))
    epoch = {"batch_size": 16, "seed": 1, "epoch": 4, "device": CPU}
    whole = list(data.train.train_batches(**epoch, start=0))
    rest = list(data.train.train_batches(**epoch, start=3))

    assert len(whole) == 144 // 16
    assert torch.cat([batch.labels for batch in whole]).bincount().tolist() == [36] * 4
    for expected, answer in zip(whole[3:], rest, strict=True):
        assert torch.equal(expected.images, answer.images)
        assert torch.equal(expected.labels, answer.labels)
    other = next(iter(data.train.train_batches(**(epoch | {"epoch": 5}), start=0)))
    assert not torch.equal(whole[0].images, other.images)


def test_without_padding_and_flip_training_shows_the_file(toy_file):
    data = load(type="tensors", path=str(toy_file), crop_padding=0, validation_fraction=0.0)
    shown = torch.cat([b.images for b in data.train.train_batches(batch_size=16, seed=0, epoch=0, start=0, device=CPU)])
    rows = {bytes(image.flatten().tolist()) for image in shown}

    assert rows == {bytes(image.flatten().tolist()) for image in load_file(toy_file)["train_images"]}


def test_class_names_come_from_the_metadata_or_are_numbers(tmp_path):
    named = write_tensors_file(tmp_path / "a.safetensors")
    numbered = write_tensors_file(tmp_path / "b.safetensors", names=False)

    assert load(type="tensors", path=str(named)).class_names == ("class 0", "class 1", "class 2", "class 3")
    assert load(type="tensors", path=str(numbered)).class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("test_labels"), "lacks test_labels"),
        (lambda t: t.update(train_images=t["train_images"].float()), "of float32"),
        (lambda t: t.update(train_images=t["train_images"][:, 0]), r"train images are \(160, 8, 8\)"),
        (lambda t: t.update(train_labels=t["train_labels"][:5]), r"train labels are \(5,\)"),
        (lambda t: t.update(test_labels=t["test_labels"] + 9), "test labels run from 9 to 12, but there are 4"),
        (lambda t: t.update(test_images=t["test_images"][:, :, :4].contiguous()), r"test images \(1, 4, 8\)"),
    ],
)
def test_tensors_that_do_not_fit_are_explained(tmp_path, change, message):
    path = write_tensors_file(tmp_path / "d.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"class_names": json.dumps(["a", "b", "c", "d"])})

    with pytest.raises(InputError, match=message):
        load(type="tensors", path=str(path))


def cifar_archive(root: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Write cifar-100-python.tar.gz as its authors do, but small, and return the test pixels.

    torchvision's checksums are replaced by those of the small files.
    """
    generator = torch.Generator().manual_seed(0)
    sums = {}
    with tarfile.open(root / "cifar-100-python.tar.gz", "w:gz") as archive:
        for name, count in (("train", 200), ("test", 100)):
            pixels = torch.randint(0, 256, (count, 3072), generator=generator, dtype=torch.uint8)
            content = {
                "data": pixels.numpy(),
                "fine_labels": [i % 100 for i in range(count)],
                "coarse_labels": [0] * count,
            }
            sums[name] = _add(archive, name, content)
        sums["meta"] = _add(archive, "meta", {"fine_label_names": [f"thing {i}" for i in range(100)]})
    digest = hashlib.md5((root / "cifar-100-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", digest)
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": sums["meta"]})
    return pixels


def _add(archive: tarfile.TarFile, name: str, content: object) -> str:
    data = pickle.dumps(content)
    info = tarfile.TarInfo(f"cifar-100-python/{name}")
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
    return hashlib.md5(data).hexdigest()


def test_cifar100_archive_is_unpacked_and_read(tmp_path, monkeypatch):
    pixels = cifar_archive(tmp_path, monkeypatch)

    data = load(type="cifar100", root=str(tmp_path), validation_fraction=0.5)

    assert (len(data.train), len(data.validation), len(data.test)) == (100, 100, 100)
    assert (data.class_names[99], data.channels, data.image_size) == ("thing 99", 3, (32, 32))
    batch = next(iter(data.test.ordered_batches(batch_size=100, device=CPU)))
    assert torch.equal(batch.images.flatten(1), pixels)
    assert batch.labels.tolist() == list(range(100))


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no route to host")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "stl10"])
def test_without_network_the_error_says_what_to_place_where(tmp_path, monkeypatch, name):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("CAKD_HOME", str(tmp_path))

    with pytest.raises(InputError, match=f"no {name} in {tmp_path}/data, and it cannot be downloaded") as caught:
        load(type=name)
    assert f"in {tmp_path}/data" in caught.value.hint
    assert "--data-root" in caught.value.hint


def fashion_files(root: Path) -> None:
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
        images = struct.pack(">iiii", 0x803, count, 28, 28) + bytes(pixels.flatten().tolist())
        labels = struct.pack(">ii", 0x801, count) + bytes(i % 10 for i in range(count))
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (root / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def test_fashion_mnist_is_read_from_its_packed_files(tmp_path):
    fashion_files(tmp_path)

    data = load(type="fashion-mnist", root=str(tmp_path), validation_fraction=0.0)

    assert (len(data.train), len(data.test), data.image_size) == (40, 20, (28, 28))
    assert data.class_names[9] == "Ankle boot"
    assert data.validation is None


def test_a_damaged_fashion_file_is_named(tmp_path):
    fashion_files(tmp_path)
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(InputError, match="files are not whole"):
        load(type="fashion-mnist", root=str(tmp_path))


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 12), ("test", 4)):
        for name, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 30), colour).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def folder_data(path, **options):
    return load(type="folder", path=str(path), image_size=24, workers=0, **options)


def test_folder(folder):
    data = folder_data(folder, validation_fraction=0.25)

    assert (len(data.train), len(data.validation), len(data.test)) == (18, 6, 8)
    assert (data.class_names, data.image_size) == (("cat", "dog"), (24, 24))
    batch = next(iter(data.test.ordered_batches(batch_size=8, device=CPU)))
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (8, 3, 24, 24))
    assert batch.images[0, :, 0, 0].tolist() == [200, 30, 30]
    assert batch.labels.tolist() == [0] * 4 + [1] * 4


def test_folder_with_val_and_test_holds_out_val(folder):
    (folder / "test").rename(folder / "val")
    assert len(folder_data(folder).test) == 8

    for name in ("cat", "dog"):
        (folder / "test" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / "test" / name / "x.png")
    data = folder_data(folder)
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 8, 2)


def test_folder_views_are_the_same_from_workers_and_after_a_resume(folder):
    epoch = {"batch_size": 4, "seed": 1, "epoch": 2, "device": CPU}
    here = list(folder_data(folder).train.train_batches(**epoch, start=0))
    random_state = torch.get_rng_state()
    workers = load(type="folder", path=str(folder), image_size=24, workers=2)
    there = list(workers.train.train_batches(**epoch, start=2))

    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(there) == len(here) - 2
    for expected, answer in zip(here[2:], there, strict=True):
        assert torch.equal(expected.images, answer.images)
        assert torch.equal(expected.labels, answer.labels)


def test_hidden_folders_are_not_classes(folder):
    for part in ("train", "test"):
        (folder / part / ".ipynb_checkpoints").mkdir()
        Image.new("RGB", (9, 9)).save(folder / part / ".ipynb_checkpoints" / "x.png")
    data = folder_data(folder, validation_fraction=0.0)
    (batch,) = data.test.ordered_batches(batch_size=8, device=CPU)

    assert data.class_names == ("cat", "dog")
    assert len(data.train) == 24
    assert batch.labels.tolist() == [0] * 4 + [1] * 4


def test_an_unreadable_image_is_named(folder):
    """Before anything begins, and where only the rest of a file is wrong when it is its turn."""
    content = (folder / "train" / "dog" / "3.png").read_bytes()
    (folder / "train" / "dog" / "3.png").write_bytes(content[:-30])
    data = folder_data(folder, validation_fraction=0.0)
    with pytest.raises(InputError, match=r"train/dog/3.png: cannot be read as an image"):
        list(data.train.train_batches(batch_size=4, seed=0, epoch=0, start=0, device=CPU))

    (folder / "train" / "dog" / "3.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"1 of 24 images cannot be used:\n  .*train/dog/3.png: cannot be read"):
        folder_data(folder, validation_fraction=0.0)


def test_bad_images_can_be_left_out(folder):
    content = (folder / "train" / "dog" / "3.png").read_bytes()
    (folder / "train" / "dog" / "3.png").write_bytes(content[:-30])
    (folder / "test" / "cat" / "0.png").write_bytes(b"not a picture")
    data = folder_data(folder, validation_fraction=0.0, bad_images="skip")

    assert len(data.train) == 23
    assert data.left_out == (str(folder / "train" / "dog" / "3.png"), str(folder / "test" / "cat" / "0.png"))
    assert len(list(data.train.train_batches(batch_size=23, seed=0, epoch=0, start=0, device=CPU))) == 1
    for path in (folder / "test" / "cat").iterdir():
        path.write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"cannot be used, all of a class"):
        folder_data(folder, bad_images="skip")


def test_what_was_checked_is_not_looked_at_again(folder, monkeypatch, home):
    folder_data(folder)
    assert len(list((home / "checked").iterdir())) == 2
    monkeypatch.setattr("cakd_cli.data.images.pictures._why_bad", lambda *a, **o: pytest.fail("looked at again"))
    folder_data(folder)
    next((home / "checked").iterdir()).write_text('{"999": 1}')
    with pytest.raises(pytest.fail.Exception, match="looked at again"):
        folder_data(folder)


def test_an_error_of_the_system_is_not_a_bad_picture(folder, home, monkeypatch):
    original = Image.open

    def denied(path, *arguments):
        if str(path).endswith("3.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments)

    monkeypatch.setattr(Image, "open", denied)
    for choice in ("fail", "skip"):
        with pytest.raises(PermissionError):
            folder_data(folder, bad_images=choice)
    monkeypatch.undo()
    assert len(folder_data(folder, bad_images="skip", validation_fraction=0.0).train) == 24


def test_links_are_followed_once_and_pipes_not_at_all(folder, tmp_path):
    before = list(folder_data(folder).train.files)
    (folder / "train" / "cat" / "up").symlink_to(folder / "train")
    (folder / "train" / "cat" / "self").symlink_to(folder / "train" / "cat")
    (folder / "train" / "cat" / "everything").symlink_to("/")
    os.mkfifo(folder / "train" / "cat" / "pipe.png")
    assert list(folder_data(folder).train.files) == before

    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "elsewhere" / "a.png")
    for name in ("one", "two"):
        (folder / "train" / "cat" / name).symlink_to(tmp_path / "elsewhere")
    assert len(folder_data(folder).train.files) == len(before) + 1


def test_a_picture_that_would_take_gigabytes_is_named(folder):
    Image.new("L", (1, 65000)).save(folder / "train" / "dog" / "line.png")

    with pytest.raises(InputError, match=r"line.png: 1 x 65000 pixels are too long and narrow"):
        load(type="folder", path=str(folder), image_size=224)


def test_sixteen_bits_are_refused_not_cut_to_white(folder):
    Image.new("I;16", (20, 20), 40000).save(folder / "train" / "dog" / "deep.png")

    with pytest.raises(InputError, match=r"deep.png: has more than 8 bits a channel"):
        folder_data(folder, validation_fraction=0.0)


def test_folders_that_do_not_fit_are_explained(folder, tmp_path):
    (folder / "test" / "dog").rename(folder / "test" / "dig")
    with pytest.raises(InputError, match=r"only in test/: dig; only in train/: dog"):
        folder_data(folder)
    with pytest.raises(InputError, match="no such folder"):
        folder_data(tmp_path / "nowhere")
    shutil.rmtree(folder / "train")
    with pytest.raises(InputError, match=r"needs train/ and val/ or test/, has test"):
        folder_data(folder)


def views_of(split, *, seed, epochs):
    seen = {}
    for epoch in range(epochs):
        for batch in split.train_batches(batch_size=4, seed=seed, epoch=epoch, start=0, device=CPU):
            for name, image in zip(batch.views.tolist(), batch.images, strict=True):
                assert torch.equal(seen.setdefault(name, image), image)
    return seen


def test_recorded_folder_views_are_replayed_in_every_run(folder):
    noisy(folder)
    assert folder_data(folder).train.views is None
    split = folder_data(folder, views=3).train
    assert (split.views.samples, split.views.per_sample) == (24, 3)
    one, other = views_of(split, seed=0, epochs=12), views_of(split, seed=7, epochs=12)

    assert len(set(one) | set(other)) > 0.9 * len(split) * 3
    assert max(one) < split.views.count
    for name in set(one) & set(other):
        assert torch.equal(one[name], other[name])
    # Another share held out names the same views alike.
    for name, image in views_of(folder_data(folder, views=3, validation_fraction=0.5).train, seed=1, epochs=3).items():
        assert torch.equal(one.get(name, image), image)
    some = [name for name in one if name // 3 == next(iter(one)) // 3]
    assert len(some) > 1
    assert not all(torch.equal(one[name], one[some[0]]) for name in some)


def test_a_picture_that_is_written_again_makes_other_views(folder):
    before = folder_data(folder, views=3).train.views
    path = folder / "train" / "cat" / "0.png"
    os.utime(path, ns=(1, 1))

    assert folder_data(folder, views=3).train.views.identity != before.identity


def test_pictures_are_turned_before_they_are_cropped(folder):
    """By an angle of their own in every epoch, the corners black, and not where nothing is learnt."""
    options = {"validation_fraction": 0.0, "min_crop_area": 1.0, "horizontal_flip": False}
    data = folder_data(folder, rotation=90.0, **options)
    epochs = [in_order(data.train, epoch) for epoch in (0, 1)]

    assert torch.equal(epochs[0], in_order(folder_data(folder, rotation=90.0, **options).train, 0))
    assert not torch.equal(epochs[0], epochs[1])
    assert (epochs[0].amax(1) == 0).flatten(1).any(1).float().mean() > 0.8
    assert in_order(folder_data(folder, **options).train, 0).amax(1).min() > 0
    (shown,) = data.test.ordered_batches(batch_size=8, device=CPU)
    assert shown.images.amax(1).min() > 0
    views = [folder_data(folder, views=3, rotation=angle).train.views.identity for angle in (0.0, 20.0)]
    assert "turned by 20 degrees at most" in views[1]
    assert "turned" not in views[0]


def in_order(split, epoch):
    """Give an epoch's images by number."""
    batches = list(split.train_batches(batch_size=4, seed=0, epoch=epoch, start=0, device=CPU))
    return torch.cat([b.images for b in batches])[torch.cat([b.samples for b in batches]).argsort()]


def test_the_plain_loop_sees_the_same_pictures(folder):
    pictures = folder_data(folder, validation_fraction=0.25, rotation=20.0).train.pictures([lambda picture: picture])

    assert len(pictures) == 18
    assert [pictures[i][1] for i in range(18)] == [0] * 9 + [1] * 9
    assert pictures[0][0].size == (24, 24)


def test_a_million_files_are_listed_in_little_memory():
    tracemalloc.start()
    files = Files((f"/data/imagenet/train/n01440764/n01440764_{i:06d}.JPEG", i % 1000) for i in range(100_000))
    used, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert (len(files), files.path(99_999)[-11:], int(files.labels_N[1234])) == (100_000, "099999.JPEG", 234)
    # 52 letters, and 8 bytes of where they end; the 8 of a label are torch's, which is not traced.
    assert used < 70 * len(files)
    assert most < 200 * len(files)
    assert list(Files(iter(()))) == []


def test_names_of_files_may_be_bytes_that_are_no_text(folder):
    odd = os.fsdecode(b"caf\xe9\n.png")
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "cat" / odd)

    assert str(folder / "train" / "cat" / odd) in list(folder_data(folder, validation_fraction=0.0).train.files)


def noisy(folder):
    """Pictures of which every crop is different."""
    generator = torch.Generator().manual_seed(1)
    for path in sorted((folder / "train").rglob("*.png")):
        pixels = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(path)


def epoch_of(data, number=0, workers=0):
    batches = data.train.train_batches(batch_size=4, seed=0, epoch=number, start=0, device=CPU)
    return torch.cat([batch.images for batch in batches])


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_images_are_decoded_once(folder, monkeypatch, workers):
    noisy(folder)
    options = {"decoded_gb": 0.01, "validation_fraction": 0.25}
    data = load(type="folder", path=str(folder), image_size=24, workers=workers, **options)
    first = [epoch_of(data, number) for number in range(2)]
    monkeypatch.setattr("cakd_cli.data.images.files.decode", lambda *a: pytest.fail("decoded again"))
    again = folder_data(folder, **options)
    second = [epoch_of(again, number) for number in range(2)]

    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_decoded_images_are_shrunk_to_what_crops_need(folder, home):
    noisy(folder)
    data = folder_data(folder, decoded_gb=0.01)
    # Nothing is written before the first image is asked for.
    assert not (home / "decoded").exists()
    epoch_of(data)
    (kept,) = (home / "decoded").iterdir()

    # 24 pixels of a crop of a quarter of the area: 48 on the shorter side of 70 x 90.
    sizes = torch.frombuffer(bytearray((kept / "sizes.bin").read_bytes()), dtype=torch.int32).reshape(-1, 2)
    assert sizes.unique(dim=0).tolist() == [[62, 48]]
    # Held-out images are looked at as they are.
    whole, shrunk = (
        next(iter(data.validation.ordered_batches(batch_size=8, device=CPU))).images
        for data in (folder_data(folder), folder_data(folder, decoded_gb=0.01))
    )
    assert torch.equal(whole, shrunk)


def test_a_damaged_decoded_image_is_decoded_again(folder, home):
    noisy(folder)
    data = folder_data(folder, decoded_gb=0.01)
    expected = epoch_of(data)
    (kept,) = (home / "decoded").iterdir()
    with (kept / "pixels.bin").open("r+b") as file:
        file.seek(1000)
        file.write(bytes(9000))

    assert torch.equal(epoch_of(folder_data(folder, decoded_gb=0.01)), expected)


def test_a_decoded_cache_that_does_not_fit_is_refused(folder, home, monkeypatch):
    noisy(folder)
    with pytest.raises(InputError, match=r"more than data.decoded_gb=1e-06"):
        folder_data(folder, decoded_gb=1e-6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match=r"GB more in .*, 0.0 GB are free"):
        folder_data(folder, decoded_gb=0.01)
    monkeypatch.undo()
    monkeypatch.setenv("CAKD_HOME", str(home))
    epoch_of(folder_data(folder, decoded_gb=0.01))
    (kept,) = (home / "decoded").iterdir()
    os.truncate(kept / "pixels.bin", 10)
    with pytest.raises(InputError, match="are damaged"):
        folder_data(folder, decoded_gb=0.01)


def test_a_full_disk_only_costs_the_cache(folder, monkeypatch):
    noisy(folder)
    expected = epoch_of(folder_data(folder, decoded_gb=0.01))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("CAKD_HOME", str(folder / "other"))
    monkeypatch.setattr(os, "pwrite", full)
    assert torch.equal(epoch_of(folder_data(folder, decoded_gb=0.01)), expected)


def test_noise_has_the_shape_that_was_asked_for():
    data = load(type="noise", channels=1, image_size=12, classes=7, images=50, validation_fraction=0.0)

    assert (len(data.train), data.channels, data.image_size, data.num_classes) == (50, 1, (12, 12), 7)
    assert data.fingerprint == load(type="noise", channels=1, image_size=12, classes=7, images=50).fingerprint


def test_the_size_of_a_folders_images_is_chosen_from_its_files(folder):
    spec = TypeAdapter(DataOptions).validate_python({"type": "folder", "path": str(folder)})

    chosen, why = spec.without_auto()

    # The pictures are 40 x 30 and wider.
    assert chosen.image_size == 24
    assert why == {"image_size": "the shorter side of the median training image has 30 pixels"}
    assert spec.load().image_size == chosen.load().image_size == (24, 24)
    assert chosen.without_auto() == (chosen, {})


@pytest.mark.parametrize(("side", "size"), [(5, 8), (32, 32), (100, 96), (224, 224), (900, 224)])
def test_large_images_are_shown_in_the_usual_size(tmp_path, side, size):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (side + 7, side)).save(tmp_path / part / name / "0.png")

    assert load(type="folder", path=str(tmp_path), workers=0).image_size == (size, size)


def test_the_number_of_workers_is_the_one_that_is_recorded(folder, monkeypatch):
    monkeypatch.setattr("cakd_cli.data.images.files._cores", lambda: 3)
    auto = TypeAdapter(DataOptions).validate_python({"type": "folder", "path": str(folder)}).without_auto()[0]
    asked = TypeAdapter(DataOptions).validate_python({"type": "folder", "path": str(folder), "workers": 5})

    assert auto.workers == auto.num_workers == 3
    assert asked.without_auto()[0].workers == asked.num_workers == 5


def test_a_sample_has_its_number_in_the_file(folder, toy_file):
    for data in (folder_data(folder, validation_fraction=0.25), load(type="tensors", path=str(toy_file))):
        batches = list(data.train.train_batches(batch_size=4, seed=0, epoch=0, start=0, device=CPU))
        numbers = torch.cat([batch.samples for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])

        assert len(set(numbers.tolist())) == len(numbers)
        if data.name == "toy":
            assert torch.equal(labels, numbers % 4)
        else:
            assert torch.equal(labels, (numbers >= 12).long())


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "stl10"])
def test_a_plan_needs_no_data(tmp_path, monkeypatch, name):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    spec = TypeAdapter(DataOptions).validate_python({"type": name, "root": str(tmp_path / "none")})

    data = spec.load(fetch=False)

    assert f"into {tmp_path}/none" in spec.missing_file()
    assert len(data.train) + len(data.validation) + len(data.test) in (13_000, 60_000, 70_000)
    assert data.num_classes == (100 if name == "cifar100" else 10)
    assert not (tmp_path / "none").exists()


def test_data_that_is_here_is_not_missing(tmp_path):
    fashion_files(tmp_path)

    assert (
        TypeAdapter(DataOptions).validate_python({"type": "fashion-mnist", "root": str(tmp_path)}).missing_file()
        is None
    )
