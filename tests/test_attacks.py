"""Whatever somebody feeds to cakd: one clear error with its exit code, and no file anywhere else."""

import json
import os
import random
import shutil
import string
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cakd_cli.errors import InputError
from cakd_cli.models.weights import read_state
from tests.conftest import some_daily

ODD = (
    *("", " ", "0", "-1", "1e309", "nan", ".inf", "null", "true", "[]", "{}", "[[", "{a: 1"),
    *("!!python/object:os.system {}", "&a [*a]", "\x00", "\ud800", "\U0001f4a5" * 20, "a" * 5000, "../../etc/passwd"),
    *("~", "~nobody/x", "/dev/null", "%s%n", "1_0", "'", '"', "- 1", "a: b: c", "2024-01-01", "0x1F", "1e-3"),
    *("--help", "=", "a=b", "99999999999999999999"),
)
KEYS = (
    *("loss", "loss.0.weight", "loss.1.beta", "loss.9.type", "model", "model.weights", "teacher", "teacher.weights"),
    *(
        "engine.epochs",
        "engine.batch_size",
        "engine.device",
        "engine.precision",
        "engine.ema_decay",
        "schedule",
        "seed",
    ),
    *("optimizer.learning_rate", "data", "data.path", "data.crop_padding", "data.validation_fraction", "published"),
    *("methods", "x.y"),
)


@pytest.fixture
def box(toy_file, toy_teacher, tmp_path, monkeypatch):
    """A folder in which everything may be spoilt, and where the commands run."""
    shutil.copy(toy_file, tmp_path / "toy.safetensors")
    shutil.copytree(toy_teacher, tmp_path / "run")
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (9 + i, 8), (i * 40, 9, 9)).save(tmp_path / "images" / part / name / f"{i}.png")
    torch.save(load_file(toy_teacher / "model.safetensors"), tmp_path / "net.pth")
    text = f"data: tensors:{tmp_path}/toy.safetensors\nmodel: resnet8\nloss: kd\nteacher: {tmp_path}/run\nseed: 1\n"
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spoilt(content: bytes, draw: random.Random) -> bytes:
    """Change some bytes, cut, double or replace them."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0:
                data[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[place : place + draw.randint(1, 40)]
            case 2:
                data[place:place] = data[place : place + draw.randint(1, 200)]
            case 3:
                data[place:place] = draw.choice(ODD).encode("utf-8", "replace")
            case 4:
                data = data[:place]
    return bytes(data)


def words_for(draw: random.Random, box: Path) -> list[str]:
    """Spoil something, and return the command that meets it."""
    dry = ["--dry-run", "--out", str(box / "out")]
    toy, images = ["--data", f"tensors:{box}/toy.safetensors"], ["--data", f"folder:{box}/images", "data.image_size=8"]
    kind = draw.choice(["recipe", "words", "run", "weights", "tensors", "image", "flags"])
    if kind == "recipe":
        spoil(box / "mine.yaml", draw)
        return ["distill", str(box / "mine.yaml"), *dry]
    if kind == "words":
        assignments = [f"{draw.choice(KEYS)}={draw.choice(ODD)}" for _ in range(draw.randint(1, 3))]
        return ["distill", str(box / "mine.yaml"), *[a.replace("\x00", "\\0") for a in assignments], *dry]
    if kind == "run":
        spoil(box / "run" / draw.choice(["config.json", "model.safetensors", "recipe.yaml", "run.json"]), draw)
        return draw.choice([["eval", str(box / "run")], ["distill", str(box / "mine.yaml"), *dry]])
    if kind == "weights":
        spoil(box / "net.pth", draw)
        return ["train-teacher", *toy, "--model", "resnet8", f"model.weights={box}/net.pth", *dry]
    if kind == "tensors":
        spoil(box / "toy.safetensors", draw)
        return ["train-teacher", *toy, "--model", "resnet8", *dry]
    if kind == "image":
        spoil(draw.choice(sorted((box / "images").rglob("*.png"))), draw)
        return ["train-teacher", *images, "--model", "resnet8", "--batch-size", "2", *dry]
    flag = draw.choice(["--data", "--model", "--epochs", "--seed", "--device", "--batch-size", "--out", "--grace"])
    value = draw.choice(ODD).replace("\x00", "").encode("utf-8", "replace").decode()
    return ["train-teacher", *toy, "--model", "resnet8", *dry, flag, value]


def spoil(file: Path, draw: random.Random) -> None:
    file.write_bytes(spoilt(file.read_bytes(), draw))


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "home" not in path.parts}


@pytest.mark.parametrize("seed", some_daily(range(30), 0, 1))
def test_malformed_input_is_an_error_and_nothing_else(cakd, box, monkeypatch, seed):
    draw = random.Random(seed)
    kept = box.parent / f"kept-{seed}"
    shutil.copytree(box, kept)
    for _ in range(40):
        shutil.rmtree(box)
        shutil.copytree(kept, box)
        monkeypatch.chdir(box)
        words = words_for(draw, box)
        before = files_below(box)
        result = cakd(*words)
        context = f"{words}\n{result.err}"
        assert result.code in (0, 2, 3, 4, 5, 6, 7), context
        assert "Traceback" not in result.err, context
        assert files_below(box) == before, context
        if result.code:
            assert "error" in result.err.lower(), context


CONFIGS = {
    "crop_pct 0": lambda config: config["pretrained_cfg"].update(crop_pct=0),
    "crop_pct -1": lambda config: config["pretrained_cfg"].update(crop_pct=-1),
    "crop_pct NaN": lambda config: config["pretrained_cfg"].update(crop_pct=float("nan")),
    "input_size 60000": lambda config: config["pretrained_cfg"].update(input_size=[1, 60000, 60000]),
    "input_size Infinity": lambda config: config["pretrained_cfg"].update(input_size=[1, float("inf"), 8]),
    "names": lambda config: config.update(label_names={"a": 1}),
    "fingerprints": lambda config: config["cakd"]["data"].update(fingerprints=3),
    "mean": lambda config: config["pretrained_cfg"].update(mean="x"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_odd_configs(cakd, box, name):
    config = json.loads((box / "run" / "config.json").read_text())
    CONFIGS[name](config)
    (box / "run" / "config.json").write_text(json.dumps(config))

    result = cakd("eval", box / "run")

    assert (result.code, "not a config.json of cakd" in result.err) == (4, True), result.err


def test_deep_json_is_an_error(cakd, box):
    (box / "run" / "config.json").write_text("[" * 100_000)
    deep = cakd("eval", box / "run")
    tensors = load_file(box / "toy.safetensors")
    save_file(tensors, box / "toy.safetensors", metadata={"class_names": "[" * 100_000})
    names = cakd("train-teacher", "--data", f"tensors:{box}/toy.safetensors", "--model", "resnet8", "--dry-run")

    assert (deep.code, "nested too deeply" in deep.err) == (4, True)
    assert (names.code, "not a JSON list" in names.err) == (4, True)


def saved(content, path):
    torch.save(content, path)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({1: torch.zeros(2)}, "a key that is not a name"),
        ({"a": 3}, "is int, not a tensor"),
        ({"a": torch.zeros(3, 3).to_sparse()}, "sparse, quantized or nested"),
        ({"a": torch.zeros(3, device="meta")}, "without content"),
        ({"a": torch.zeros(3, dtype=torch.complex64)}, "is complex"),
        ([1, 2], "holds no state dict"),
        ({"state_dict": {"a": os.getcwd}}, "not a file of plain tensors"),
    ],
)
def test_weights_that_are_none(tmp_path, content, sentence):
    with pytest.raises(InputError, match=sentence):
        read_state(saved(content, tmp_path / "net.pth"))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(InputError, match="not a file of plain tensors"):
        read_state(saved({"a": torch.zeros(2), "b": Bomb()}, tmp_path / "net.pth"))
    assert not Path("exploded").exists()


def test_numbers_of_numpy_beside_the_weights_are_allowed(tmp_path):
    """As in the checkpoints of mdistiller."""
    content = {"epoch": 240, "best_acc": np.float64(79.4), "seen": np.int64(3), "model": {"module.a": torch.ones(2)}}

    assert read_state(saved(content, tmp_path / "net.pth"))["a"].tolist() == [1, 1]


def test_a_wrong_bit_in_a_pth_is_noticed(tmp_path):
    path = saved({"a": torch.arange(4000.0)}, tmp_path / "net.pth")
    content = path.read_bytes()
    start = content.index(torch.arange(4000.0).numpy().tobytes()[:400])
    for place in range(start, start + 16000, 500):
        spoiled = bytearray(content)
        spoiled[place] ^= 4
        path.write_bytes(spoiled)
        with pytest.raises(InputError, match="is not what was written"):
            read_state(path)


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path):
    path = saved({"a": torch.zeros(1_000_000)}, tmp_path / "net.pth")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for info in archive.infolist():
            bomb.writestr(info.filename, archive.read(info))

    with pytest.raises(InputError, match=r"unpacks to 4,\d+,\d+ bytes, more than it has"):
        read_state(tmp_path / "bomb.pth")


def test_a_safetensors_header_that_lies_is_refused(tmp_path):
    for header in (b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}', b"{", b'{"a":3}'):
        (tmp_path / "net.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        with pytest.raises(InputError, match="not a whole safetensors file"):
            read_state(tmp_path / "net.safetensors")
    (tmp_path / "net.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_state(tmp_path / "net.safetensors")


def test_another_number_of_classes_is_said_with_both(cakd, box):
    other = load_file(box / "run" / "model.safetensors")
    other["fc.weight"], other["fc.bias"] = torch.zeros(100, 64), torch.zeros(100)
    save_file(other, box / "other.safetensors")
    data = ("--data", f"tensors:{box}/toy.safetensors")

    student = cakd("train-teacher", *data, "--model", "resnet8", f"model.weights={box}/other.safetensors", "--dry-run")

    assert student.code == 4
    assert "the weights are of a network of 100 classes, and the data has 4" in student.err


@pytest.mark.slow
def test_words_that_are_no_text(box):
    """Bytes of another encoding, as a shell passes them on."""
    command = [sys.executable, "-m", "cakd_cli", "eval", b"caf\xe9", "--json"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "utf-8"}, capture_output=True, check=False)

    assert done.returncode == 4
    assert b"Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["message"].endswith("caf\udce9")


def test_a_folder_of_another_tool_is_not_emptied(cakd, box):
    other = box / "other"
    other.mkdir()
    (other / "run.json").write_text('{"tool": "other"}')
    (other / "README.md").write_text("mine")
    words = ("train-teacher", "--data", f"tensors:{box}/toy.safetensors", "--model", "resnet8", "--out", other)

    refused = cakd(*words, "--overwrite")

    assert (refused.code, "holds files that are not a run's" in refused.err) == (4, True)
    assert sorted(path.name for path in other.iterdir()) == ["README.md", "run.json"]
    (other / "recipe.yaml").write_text("a: 1")
    (other / "run.json").write_text('{"versions": {"other": "1.0"}}')
    assert cakd(*words, "--overwrite").code == 4


def test_names_that_are_no_text_are_said_at_once(cakd, tmp_path):
    for part in (b"train", b"test"):
        for name in (b"caf\xe9", b"dog"):
            folder = os.path.join(os.fsencode(tmp_path), b"images", part, name)
            os.makedirs(folder)
            Image.new("RGB", (8, 8)).save(os.path.join(folder, b"1.png").decode("utf-8", "surrogateescape"))

    result = cakd("train-teacher", "--data", f"folder:{tmp_path}/images", "--model", "resnet8", "--batch-size", 1)

    assert (result.code, "cannot be written as text" in result.err) == (4, True), result.err


def test_large_recipes_are_refused_at_once(cakd, tmp_path):
    for name, text in (("keys", "".join(f"k{i}: 1\n" for i in range(200_000))), ("scalar", "a: " + "x" * 5_000_000)):
        (tmp_path / f"{name}.yaml").write_text(text)
        result = cakd("distill", tmp_path / f"{name}.yaml")
        assert (result.code, "a recipe has at most 1,000,000" in result.err) == (3, True), result.err[:300]
        assert len(result.err) < 1000


@pytest.mark.parametrize("text", ['"a\\0b"', "!!python/object/apply:os.system [touch x]", "*a"])
def test_texts_that_no_recipe_has(cakd, box, text):
    (box / "mine.yaml").write_text(f"data: {{type: tensors, path: {text}}}\nmodel: resnet8\nloss: cross-entropy\n")

    result = cakd("train-teacher", box / "mine.yaml", "--dry-run")

    assert (result.code, "mine.yaml:1:" in result.err) == (3, True), result.err


def test_small_things(cakd, box, monkeypatch):
    assert (cakd("demo", "--out", "").code, cakd("demo", "--out", "").err) == (2, "error: --out is empty\n")
    monkeypatch.delenv("CAKD_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    from cakd_cli.files import home

    assert home() == Path("~/.cache/cakd").expanduser()


@pytest.mark.slow
def test_few_files_may_be_open(tmp_path):
    """With workers, which need several each: an error, and no wait for ever."""
    for part in ("train", "test"):
        for name in string.ascii_lowercase[:4]:
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(20):
                Image.new("RGB", (8, 8)).save(tmp_path / "images" / part / name / f"{i}.png")
    words = ["train-teacher", "--data", f"folder:{tmp_path}/images", "--model", "resnet8", "--batch-size", "2"]
    limited = f'ulimit -n 24; exec {sys.executable} -m cakd_cli "$@"'
    words += ["data.workers=8", "data.image_size=8", "--epochs", "1", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        ["bash", "-c", limited, "cakd", *words], capture_output=True, text=True, timeout=100, check=False
    )

    assert done.returncode == 4, done.stderr
    assert "8 processes that decode images need 256 open files, and this process may open 24" in done.stderr
    assert "hint: ulimit -n 256, or data.workers=0" in done.stderr
    assert "Traceback" not in done.stderr
