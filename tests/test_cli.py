"""The command line: its words, its streams, its exit codes."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from cakd_cli import app as app_module
from cakd_cli import process
from cakd_cli.app import app
from cakd_cli.commands import demo
from cakd_cli.console import Console
from cakd_cli.errors import CakdError, ExitCode
from cakd_cli.models import ResNetSpec
from tests.conftest import train_toy, write_tensors_file

COMMON_TRAIN = {
    *("--data", "--data-root", "--out", "--epochs", "--seed", "--device", "--batch-size"),
    *("--resume", "--overwrite", "--grace", "--trust", "--dry-run", "--json", "-q", "--quiet", "-v", "--verbose"),
}
FLAGS = {
    "": {"--version"},
    "demo": {"--out", "--overwrite", "--json", "-q", "--quiet", "-v", "--verbose"},
    "train-teacher": COMMON_TRAIN | {"--model"},
    "distill": COMMON_TRAIN | {"--teacher", "--class-map", "--student", "--loss"},
    "eval": {
        *("--data", "--data-root", "--split", "--teacher", "--class-map", "--min-top1", "--probe", "--device"),
        *("--batch-size", "--trust"),
        *("--json", "-q", "--quiet", "-v", "--verbose"),
    },
    "predict": {"--top", "--json", "-q", "--quiet"},
    "export": {
        *("--format", "--out", "--overwrite", "--max-drop", "--trust", "--json", "-q", "--quiet", "-v", "--verbose"),
    },
    "bench": {
        *("--data", "--data-root", "--teacher", "--class-map", "--student", "--against", "--device", "--batch-size"),
        *("--json", "-q", "--quiet", "-v", "--verbose"),
    },
    "sweep": {
        *("--data", "--data-root", "--teacher", "--student", "--loss", "--seeds", "--out", "--epochs", "--device"),
        *("--class-map", "--batch-size", "--jobs", "--on", "--json", "-q", "--quiet", "-v", "--verbose"),
    },
    "compare": {
        *("--against", "--different", "--markdown", "--latex", "--trust"),
        *("--json", "-q", "--quiet", "-v", "--verbose"),
    },
    "report": {
        *("--out", "--against", "--different", "--overwrite", "--trust", "--json", "-q", "--quiet", "-v", "--verbose"),
    },
    "runs": {"--json"},
    "list": {"--json"},
    "env": {"--json"},
    "data check": {"--data-root", "--json"},
    "recipes list": {"--json"},
    "recipes show": set(),
    "recipes copy": set(),
    "teacher-memory list": {"--json"},
    "teacher-memory verify": {"--json"},
    "teacher-memory prune": {"--all", "--json"},
    "teacher-memory fill": {
        *("--data", "--data-root", "--teacher", "--class-map", "--student", "--epochs", "--seed", "--device"),
        *("--json", "-q", "--quiet", "-v", "--verbose"),
    },
}


def commands(group, prefix=""):
    yield prefix, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{prefix} {name}".strip())


def test_the_set_of_flags_is_frozen():
    """A recipe key carries everything else. To add a flag, change this test and say why in the changelog."""
    found = {
        name: {flag for parameter in command.params for flag in parameter.opts if flag.startswith("-")}
        for name, command in commands(typer.main.get_command(app))
        if name not in ("recipes", "teacher-memory", "data")
    }
    found[""] -= {"--install-completion", "--show-completion"}

    assert found == FLAGS


HEAVY = ("torch", "torchvision", "torchmetrics", "yaml", "safetensors")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["distill", "--help"], ["recipes", "list"]])
def test_help_does_not_wait_for_torch(words):
    code = (
        "import sys; from cakd_cli.process import main\n"
        f"sys.argv = ['cakd', *{words!r}]\n"
        "try: main()\n"
        f"except SystemExit as stop: print(stop.code, [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "0 []"


def test_help_says_the_exit_codes(cakd):
    help_text = " ".join(cakd("--help").out.split())

    for code in ExitCode:
        assert f"{code.value} " in help_text
    assert {word.split()[0] for word in FLAGS if word} <= set(help_text.split())


def test_error_classes_have_the_documented_codes():
    def all_below(kind):
        return [kind, *(found for child in kind.__subclasses__() for found in all_below(child))]

    tree = __import__("cakd_cli.errors", fromlist=["errors"]).__doc__
    for kind in all_below(CakdError):
        (line,) = [line for line in tree.splitlines() if kind.__name__ in line]
        assert line.split(kind.__name__)[1].split()[0] == str(kind.exit_code.value)


@pytest.mark.slow
def test_json_alone_reaches_stdout(toy_teacher):
    """cakd eval R --json 2>/dev/null | python -m json.tool."""
    command = f"{sys.executable} -m cakd_cli eval {toy_teacher} --json 2>/dev/null | {sys.executable} -m json.tool"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)

    assert done.returncode == 0
    assert json.loads(done.stdout)["quality"]["top1"] > 0


def test_a_failing_command_still_ends_with_json(cakd):
    result = cakd("eval", "nowhere", "--json")

    assert result.code == 4
    assert json.loads(result.out.splitlines()[-1])["error"]["code"] == "input"
    assert "error: no such run directory: nowhere" in result.err
    assert "\nhint: " in result.err


def test_quiet_says_only_the_result(cakd, toy_file, tmp_path):
    words = ("train-teacher", "--data", f"tensors:{toy_file}", "--model", "resnet8", "--epochs", 1, "--batch-size", 16)
    result = cakd(*words, "--out", tmp_path / "run", "-q")

    assert result.err == ""
    assert len(result.out.splitlines()) == 1


def test_one_line_an_epoch_without_a_terminal(cakd, toy_file, tmp_path):
    words = ("train-teacher", "--data", f"tensors:{toy_file}", "--model", "resnet8", "--epochs", 2, "--batch-size", 16)
    lines = [line for line in cakd(*words, "--out", tmp_path / "run").err.splitlines() if line.startswith("epoch")]

    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    for word in ("loss", "cross_entropy", "held-out top-1", "images/s", "left"):
        assert word in lines[0]


def test_verbose_shows_the_whole_recipe(cakd, toy_file, tmp_path):
    words = ("train-teacher", "--data", f"tensors:{toy_file}", "--model", "resnet8", "--epochs", 1, "--batch-size", 16)

    assert "gradient_accumulation: 1" in cakd(*words, "--out", tmp_path / "run", "-v").err


def test_dry_run_plans_and_writes_nothing(cakd, toy_file, toy_teacher, tmp_path):
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    result = cakd(*words, "--loss", "cakd", "--batch-size", 16, "--out", tmp_path / "run", "--dry-run", "--json")

    plan = result.document
    assert plan["steps"] == 30 * 9
    assert plan["student"]["parameters"] == plan["teacher"]["parameters"] == 77364
    assert plan["student"]["flops_per_image"] > 1e6
    assert plan["training_memory_bytes"] > 3 * 4 * 77364
    assert set(plan["chosen"]) == {"engine.device", "engine.precision", "engine.teacher_memory"}
    assert plan["teacher_memory"] == "disk"
    assert not (tmp_path / "run").exists()
    text = cakd(*words, "--batch-size", 16, "--dry-run").out
    for word in ("parameters", "FLOP", "steps", "memory", "device", "precision", "auto:"):
        assert word in text


def test_by_default_a_run_has_a_name_of_its_own(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")

    assert cakd(*words, "--loss", "dkd", "--batch-size", 16, "--epochs", 1).code == 0
    assert (tmp_path / "runs" / "toy-resnet8-dkd-seed0" / "model.safetensors").is_file()


def test_a_run_directory_holds_what_design_promises(toy_teacher):
    names = {path.name for path in toy_teacher.iterdir()}
    facts = json.loads((toy_teacher / "run.json").read_text())

    assert names == {
        *("recipe.yaml", "run.json", "metrics.jsonl", "model.safetensors", "config.json", "README.md", ".lock")
    }
    assert "auto" not in (toy_teacher / "recipe.yaml").read_text()
    for key in ("command", "versions", "hardware", "seed", "started_at", "finished_at", "ended", "metrics", "data"):
        assert key in facts
    assert facts["ended"] == "completed"


def test_lists(cakd):
    for what, expected in (("models", "wrn-16-2"), ("losses", "cakd"), ("data", "tensors:PATH")):
        rows = cakd("list", what, "--json").document
        assert expected in [row["name"] for row in rows]
        assert all(row["summary"] for row in rows)
        assert expected in cakd("list", what).out


def test_env(cakd):
    facts = cakd("env", "--json").document

    assert facts["torch"] == torch.__version__.partition("+")[0]
    assert facts["device"]


@pytest.mark.parametrize(("cuda", "said"), [("13.0", True), (None, False)])
def test_env_says_how_to_do_without_cuda(cakd, monkeypatch, cuda, said):
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)

    assert ("--index-url https://download.pytorch.org/whl/cpu" in cakd("env").err) == said


def test_figures_that_few_know_are_explained_beside_them(cakd, toy_teacher):
    assert "ECE: expected calibration error, how far confidence is from accuracy" in cakd("eval", toy_teacher).out


def test_networks_are_listed_with_their_sizes(cakd):
    rows = {row["name"]: row for row in cakd("list", "models", "--json").document}
    text = cakd("list", "models").out

    assert rows["resnet8"]["parameters"] == 83_892
    assert rows["resnet8"]["image"] == [3, 32, 32]
    assert "parameters" not in rows["timm:NAME"]
    assert re.search(r"resnet8 +83\.9 k +25\.0 MFLOP  ResNet for small images", text)
    assert "(FLOPs at 224 px)" in text


def test_recipes_are_listed_shown_and_copied(cakd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [row["name"] for row in cakd("recipes", "list", "--json").document]

    assert "digits/student" in names
    assert "methods:" in cakd("recipes", "show", "digits/student").out
    assert cakd("recipes", "copy", "digits/student").code == 0
    assert (tmp_path / "student.yaml").read_text() == cakd("recipes", "show", "digits/student").out
    again = cakd("recipes", "copy", "digits/student")
    assert (again.code, "student.yaml exists" in again.err) == (4, True)


@pytest.mark.slow
def test_two_small_networks_by_three_losses_on_a_folder_and_back(cakd, tmp_path):
    """The practitioner's way: a folder of images, a torchvision network, ONNX."""
    from PIL import Image

    for part, count in (("train", 12), ("test", 4)):
        for name, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 36), colour).save(tmp_path / "images" / part / name / f"{i}.jpg")
    data = ("--data", f"folder:{tmp_path / 'images'}", "data.image_size=32", "data.workers=0", "--batch-size", 6)
    data += ("optimizer.learning_rate=0.02", "engine.precision=fp32")

    teacher = cakd("train-teacher", *data, "--model", "resnet8", "--epochs", 8, "--out", tmp_path / "teacher")
    assert teacher.code == 0, teacher.err
    student = cakd(
        *("distill", *data, "--teacher", tmp_path / "teacher", "--student", "torchvision:resnet18"),
        *("--loss", "kd", "--epochs", 2, "--out", tmp_path / "student"),
    )
    assert student.code == 0, student.err
    assert cakd("eval", tmp_path / "student", "--teacher", tmp_path / "teacher").code == 0
    assert cakd("export", tmp_path / "student", "--format", "onnx").code == 0


def test_a_short_demo_tells_the_whole_story(cakd, tmp_path, monkeypatch):
    train = demo.train
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    monkeypatch.setattr(demo, "METHODS", ("cross-entropy", "cakd"))
    monkeypatch.setattr(demo, "train", lambda words, *rest, **how: train([*words, "engine.epochs=3"], *rest, **how))
    result = cakd("demo", "--out", tmp_path / "demo", "--json")

    assert result.code == 0, result.err
    rows = {row["name"]: row for row in result.document["rows"]}
    assert list(rows) == ["teacher", "student alone", "student, cakd"]
    assert all(row["n"] == 2 and row["wcd"][0] > 0 for name, row in rows.items() if name != "teacher")
    assert result.document["export"]["agreement"] == 1
    assert (tmp_path / "demo" / "cakd-seed0" / "model.onnx").is_file()


@pytest.mark.slow
def test_demo(cakd, tmp_path, monkeypatch):
    """Takes two minutes and a half on two slow cores."""
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    result = cakd("demo", "--out", tmp_path / "demo", "--json")

    assert result.code == 0, result.err
    rows = {row["name"]: row for row in result.document["rows"]}
    assert list(rows) == ["teacher", "student alone", "student, kd", "student, dkd", "student, cakd"]
    for name, row in rows.items():
        assert row["top1"][0] > 0.9, name
    assert rows["teacher"]["parameters"] > 8 * rows["student, cakd"]["parameters"]
    # Fidelity is what distillation is for; on so few images accuracy is not what a test can hold.
    for name in ("student, kd", "student, dkd", "student, cakd"):
        assert rows[name]["wcd"][0] < rows["student alone"]["wcd"][0] / 2
    assert result.document["export"]["agreement"] == 1
    assert (tmp_path / "demo" / "cakd-seed0" / "model.onnx").is_file()


@pytest.fixture(scope="session")
def wrong(tmp_path_factory, toy_file, toy_teacher):
    """A folder full of things that do not fit."""
    root = tmp_path_factory.mktemp("wrong")
    write_tensors_file(root / "five.safetensors", classes=5)
    write_tensors_file(root / "renamed.safetensors", names=False)
    write_tensors_file(root / "colour.safetensors", channels=3)
    write_tensors_file(root / "large.safetensors", size=16)
    write_tensors_file(root / "one.safetensors", classes=1)
    content = load_file(toy_file)
    save_file(content | {"train_labels": content["train_labels"] + 2**40}, root / "huge.safetensors")
    (root / "deep.yaml").write_text("a: " + "[" * 3000)
    (root / "cut.safetensors").write_bytes(toy_file.read_bytes()[:500])
    (root / "data.safetensors.xz").write_bytes(b"xz")
    (root / "data.npz").write_bytes(b"npz")
    (root / "broken.yaml").write_text("data: [digits\n")
    (root / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (root / "code.yaml").write_text("data: !!python/name:os.system\n")
    (root / "other").mkdir()
    (root / "other" / "thesis.tex").write_text("precious")
    (root / "empty").mkdir()
    (root / "file").write_text("a file")
    (root / "unfinished").mkdir()
    (root / "unfinished" / "recipe.yaml").write_text("data: digits\nmodel: resnet8\n")
    for name in ("no-config", "bad-config", "cut-weights", "two-means", "odd-metrics"):
        (root / name).mkdir()
        for file in ("recipe.yaml", "config.json", "model.safetensors"):
            (root / name / file).write_bytes((toy_teacher / file).read_bytes())
    (root / "no-config" / "config.json").unlink()
    (root / "bad-config" / "config.json").write_text('{"architecture": "resnet18"}')
    for name, change in (
        ("two-means", lambda config: config["pretrained_cfg"].update(mean=[0.1, 0.2])),
        ("odd-metrics", lambda config: config["cakd"]["metrics"]["test"].update(top1="good")),
    ):
        config = json.loads((root / name / "config.json").read_text())
        change(config)
        (root / name / "config.json").write_text(json.dumps(config))
    weights = root / "cut-weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    train_toy(toy_file, root / "untrained", "optimizer.learning_rate=1e-9", **{"engine.epochs": 1})
    torch.save({"state_dict": "nothing"}, root / "nothing.pth")
    return root


TOY = ("--data", "tensors:{toy}", "--batch-size", "16", "--epochs", "1")
DISTIL = ("distill", *TOY, "--student", "resnet8")
ON = ("distill", "--student", "resnet8", "--batch-size", "16", "--teacher", "{teacher}", "--data")
EVAL_ON = ("eval", "{teacher}", "--data")
TRAIN_ON = ("train-teacher", "--model", "resnet8", "--data")
INTO = (*DISTIL, "--teacher", "{teacher}", "--out")

# (exit code, what the message must say, the words)
WRONG = [
    (2, "No such command 'distil'", ("distil",)),
    (2, "No such option", ("distill", "--temperature", "4")),
    (2, "Invalid value for '--epochs': Input should be a valid integer", ("distill", "--epochs", "many")),
    (
        3,
        "features are compared with one",
        (*DISTIL, "--teacher", "{teacher}", "--teacher={teacher}", "--loss", "cakd"),
    ),
    (2, "more than one recipe", ("distill", "digits/student", "digits/teacher")),
    (2, "Missing argument 'RUN'", ("eval",)),
    (2, "Missing option '--format'", ("export", "{teacher}")),
    (2, "Invalid value for '--format': 'tflite' is not one of", ("export", "{teacher}", "--format", "tflite")),
    (2, "is not one of", ("eval", "{teacher}", "--split", "all")),
    (
        2,
        "Invalid value for '--min-top1': Input should be less than or equal to 1",
        ("eval", "{teacher}", "--min-top1", "97.5"),
    ),
    (2, "Invalid value for 'what': 'optimizers' is not one of 'models',", ("list", "optimizers")),
    (3, "no recipe 'digits/studnet'", ("distill", "digits/studnet")),
    (3, "broken.yaml:2: expected", ("distill", "{wrong}/broken.yaml", *DISTIL[1:])),
    (3, "seed: given twice, first on line 1", ("distill", "{wrong}/twice.yaml", *DISTIL[1:])),
    (3, "cannot read the recipe", ("distill", "{wrong}/binary.yaml")),
    (3, "tag", ("distill", "{wrong}/code.yaml")),
    (3, "data: is missing", ("train-teacher", "--model", "resnet8")),
    (3, "unknown key; did you mean engine.epochs?", ("train-teacher", *TOY, "--model", "resnet8", "epochs=3")),
    (3, "does not say what kind of data it is; write folder:{wrong}", (*TRAIN_ON, "{wrong}")),
    (3, "does not say what kind of data it is; write tensors:{toy}", (*TRAIN_ON, "{toy}")),
    (3, "data is given by --data folder:{wrong}", ("train-teacher", "{wrong}")),
    (3, "is a run; name its network, and model.weights=", ("train-teacher", *TOY, "--model", "{teacher}")),
    (3, "several are for cakd sweep --loss kd,dkd", (*DISTIL, "--teacher", "{teacher}", "--loss", "kd,dkd")),
    (3, "model: is missing", ("train-teacher", "--data", "digits")),
    (3, "no 'resnt8' here; did you mean resnet8", ("train-teacher", "--data", "digits", "--model", "resnt8")),
    (3, "no method 'cakdd'; did you mean cakd", (*DISTIL, "--teacher", "{teacher}", "--loss", "cakdd")),
    (3, "the term cakd needs one; give --teacher", DISTIL),
    (3, "learns from labels alone", ("train-teacher", *TOY, "--model", "resnet8", "loss=kd", "teacher={teacher}")),
    (3, "input should be greater than 0, got -4", (*DISTIL, "--teacher", "{teacher}", "loss.1.temperature=-4")),
    (3, "engine.epochs: input should be greater than or equal to 1, got 0", (*DISTIL, "--epochs", "0")),
    (3, "unknown key", (*DISTIL, "--teacher", "{teacher}", "engine.batchsize=3")),
    (3, "more than the 144 training images", (*DISTIL, "--teacher", "{teacher}", "--batch-size", "500")),
    (
        3,
        "--data-root: data.root: unknown key",
        ("train-teacher", "--data", "digits", "--data-root", "/x", "--model", "resnet8"),
    ),
    (3, "takes 3 channels, the images have 1", ("train-teacher", *TOY, "--model", "torchvision:resnet18")),
    (3, "answers with several outputs", ("train-teacher", *TOY, "--model", "torchvision:googlenet")),
    (
        3,
        "vit_tiny_patch16_224 cannot take images of 3 x 8 x 8",
        (
            "train-teacher",
            "--model",
            "timm:vit_tiny_patch16_224",
            "--data",
            "tensors:{wrong}/colour.safetensors",
            "--batch-size",
            "9",
        ),
    ),
    (3, "no classifier 'resnet19'", ("train-teacher", *TOY, "--model", "torchvision:resnet19")),
    (3, "exclude each other", ("train-teacher", *TOY, "--model", "resnet8", "--resume", "--overwrite")),
    (3, "has no class for 1 of the 5 classes of five: class 4", (*ON, "tensors:{wrong}/five.safetensors")),
    (3, "has no class for 4 of the 4 classes of renamed: 0, 1, 2, 3", (*ON, "tensors:{wrong}/renamed.safetensors")),
    (
        3,
        "takes images of 1 channels, those of colour have 3",
        (*ON, "tensors:{wrong}/colour.safetensors"),
    ),
    (3, "knows 4 classes, digits has 10", (*EVAL_ON, "digits")),
    (
        3,
        "was trained on images of 1 channels, those of colour have 3",
        (*EVAL_ON, "tensors:{wrong}/colour.safetensors"),
    ),
    (3, "has no held-out images", (*EVAL_ON, "tensors:{toy}", "--split", "val")),
    (3, "does not end in .onnx", ("export", "{teacher}", "--format", "onnx", "--out", "{tmp}/model.bin")),
    (4, "no such data file", (*TRAIN_ON, "tensors:{wrong}/none.safetensors")),
    (4, "not a whole safetensors file", (*TRAIN_ON, "tensors:{wrong}/cut.safetensors")),
    (4, "xz -dk", (*TRAIN_ON, "tensors:{wrong}/data.safetensors.xz")),
    (4, "not a .safetensors file", (*TRAIN_ON, "tensors:{wrong}/data.npz")),
    (4, "no such folder of images", (*TRAIN_ON, "folder:{wrong}/none")),
    (4, "needs train/ and val/ or test/", (*TRAIN_ON, "folder:{wrong}/empty")),
    (4, "no such run directory", (*DISTIL, "--teacher", "{wrong}/none")),
    (4, "its run is not finished", (*DISTIL, "--teacher", "{wrong}/unfinished")),
    (4, "has no config.json", (*DISTIL, "--teacher", "{wrong}/no-config")),
    (4, "timm cannot read the network: Error(s) in loading", (*DISTIL, "--teacher", "{wrong}/bad-config")),
    (4, "not a whole safetensors file", (*DISTIL, "--teacher", "{wrong}/cut-weights")),
    (4, "is near chance", (*DISTIL, "--teacher", "{wrong}/untrained")),
    (4, "'state_dict' is str, not a tensor", (*DISTIL, "--teacher", "resnet20", "teacher.weights={wrong}/nothing.pth")),
    (4, "no such weights file", (*DISTIL, "--teacher", "resnet20", "teacher.weights={wrong}/none.pth")),
    (3, "resnet20 has fresh weights", (*DISTIL, "--teacher", "resnet20")),
    (4, "holds files that are not a run's: thesis.tex", (*INTO, "{wrong}/other", "--overwrite")),
    (4, "already holds a run", (*INTO, "{teacher}")),
    (4, "is a file", (*INTO, "{wrong}/file")),
    (4, "no such run directory", ("eval", "{wrong}/none")),
    (4, "no such run directory", ("export", "{wrong}/none", "--format", "onnx")),
    (4, "holds other files: thesis.tex", ("export", "{teacher}", "--format", "safetensors", "--out", "{wrong}/other")),
    (3, "was trained on images of (8, 8) pixels", (*EVAL_ON, "tensors:{wrong}/large.safetensors")),
    (3, "no classifier 'nope'", ("distill", *TOY[:2], "--student", "resnet8", "--teacher", "torchvision:nope")),
    (3, "teacher: is empty", (*DISTIL, "--teacher", "")),
    (3, "--student: model: no 'reznet8' here", ("distill", *TOY, "--student", "reznet8", "--teacher", "{teacher}")),
    (3, "--batch-size: engine.evaluation_batch_size", ("eval", "{teacher}", "--batch-size", "0")),
    (3, "lies in", (*DISTIL, "--teacher", "{teacher}", "--out", "{teacher}", "--resume", "--epochs", "9")),
    (3, "the tag", (*DISTIL, "--teacher", "{teacher}", "seed=!!int abc")),
    (3, "²: unknown key", (*DISTIL, "--teacher", "{teacher}", "²=1")),
    (3, "not a number that can be read", (*DISTIL, "--teacher", "{teacher}", "seed=" + "9" * 5000)),
    (3, "nested too deeply", ("distill", "{wrong}/deep.yaml")),
    (3, "optimizer: no 'adam' here; did you mean adamw", (*DISTIL, "--teacher", "{teacher}", "optimizer=adam")),
    (4, "1 class names", (*TRAIN_ON, "tensors:{wrong}/one.safetensors")),
    (4, "a label is 1099511627779", (*TRAIN_ON, "tensors:{wrong}/huge.safetensors")),
    (4, "no run to resume", ("distill", "--resume", "--out", "{tmp}/none")),
    (4, "no user's", ("eval", "~nobody-here/run")),
    (4, "must have 1 numbers", ("eval", "{wrong}/two-means")),
    (4, "metrics must be numbers", ("export", "{wrong}/odd-metrics", "--format", "safetensors", "--out", "{tmp}/hub")),
    (4, "cannot read the recipe", ("recipes", "show", "{wrong}/binary.yaml")),
    (2, "--out is empty", (*DISTIL, "--teacher", "{teacher}", "--out", "")),
    (7, "no device 'cpu:5'", (*DISTIL, "--teacher", "{teacher}", "--device", "cpu:5")),
    (7, "no device 'cuda:9'", (*DISTIL, "--teacher", "{teacher}", "--device", "cuda:9")),
    (7, "no such device 'gpu'", (*DISTIL, "--teacher", "{teacher}", "--device", "gpu")),
]


@pytest.mark.parametrize(("code", "message", "words"), WRONG, ids=[f"{c} {m[:40]}" for c, m, _ in WRONG])
def test_wrong_input_gets_one_clear_error(
    cakd, wrong, toy_file, toy_teacher, tmp_path, monkeypatch, code, message, words
):
    monkeypatch.chdir(tmp_path)
    places = {"wrong": wrong, "toy": toy_file, "teacher": toy_teacher, "tmp": tmp_path}
    words = [word.format(**places) if "type" not in word else word for word in words]
    before = {path: path.stat().st_mtime_ns for path in (*wrong.rglob("*"), *toy_teacher.rglob("*"))}
    if "--split" in words and "val" in words:
        words += ["--data", f"tensors:{_without_validation(tmp_path, toy_file)}"]

    result = cakd(*words)

    assert result.code == code, result.err
    assert message.format(**places) in " ".join(result.err.split()), result.err
    assert "Value error" not in result.err
    assert "Traceback" not in result.err
    assert sum(line.startswith("error: ") or "─ Error ─" in line for line in result.err.splitlines()) == 1
    assert result.out == ""
    left = [path for path in tmp_path.rglob("*") if path.name != "flat.safetensors"]
    assert left == []
    assert before == {path: path.stat().st_mtime_ns for path in (*wrong.rglob("*"), *toy_teacher.rglob("*"))}


def _without_validation(folder: Path, toy_file: Path) -> Path:
    """Two images a class: too few to hold one out."""
    tensors = load_file(toy_file)
    part = {key: value[:8] for key, value in tensors.items()}
    save_file(part, folder / "flat.safetensors", metadata={"class_names": json.dumps([f"class {i}" for i in range(4)])})
    return folder / "flat.safetensors"


def test_many_wrong_inputs_are_tried():
    assert len(WRONG) >= 40


def test_a_bug_is_one_line_and_a_traceback_on_demand(monkeypatch, capsys):
    def broken():
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(app_module, "app", broken)
    monkeypatch.setattr(sys, "argv", ["cakd"])
    with pytest.raises(SystemExit) as stop:
        process.main()
    err = capsys.readouterr().err
    assert stop.value.code == 1
    assert "a bug in cakd: ZeroDivisionError: oh" in err
    assert "CAKD_DEBUG=1" in err

    monkeypatch.setenv("CAKD_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        process.main()


def test_no_colour_codes_where_they_are_not_wanted(toy_teacher):
    environment = os.environ | {"NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "cakd_cli", "recipes", "show", "nowhere"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )

    assert "\x1b" not in done.stderr
    assert done.returncode == 3


def test_names_with_an_equals_sign_are_paths_where_they_must_be(cakd, toy_file, tmp_path):
    words = ("train-teacher", "--data", f"tensors:{toy_file}", "--model", "resnet8", "--batch-size", 16)
    assert cakd(*words, "--epochs", 1, "--out", tmp_path / "lr=0.1").code == 0

    assert cakd("eval", tmp_path / "lr=0.1").code == 0
    assert cakd("train-teacher", "--resume", "--out", tmp_path / "lr=0.1").code == 0
    (tmp_path / "a=b.yaml").write_text((tmp_path / "lr=0.1" / "recipe.yaml").read_text())
    assert cakd("train-teacher", tmp_path / "a=b.yaml", "--dry-run").code == 0


def test_replacing_a_run_removes_its_exports(cakd, toy_file, toy_teacher, tmp_path):
    shutil.copytree(toy_teacher, tmp_path / "run")
    for kind in ("pt2", "safetensors"):
        assert cakd("export", tmp_path / "run", "--format", kind).code == 0
    words = ("train-teacher", "--data", f"tensors:{toy_file}", "--model", "resnet8", "--batch-size", 16)

    assert cakd(*words, "--epochs", 1, "--out", tmp_path / "run", "--overwrite").code == 0
    assert not (tmp_path / "run" / "model.pt2").exists()
    assert not (tmp_path / "run" / "export").exists()


def test_a_project_with_a_recipe_is_not_a_run(cakd, toy_teacher, toy_file, tmp_path):
    for name in ("recipe.yaml", "README.md", "config.json"):
        shutil.copy(toy_teacher / name, tmp_path / name)
    words = ("train-teacher", "--data", f"tensors:{toy_file}", "--model", "resnet8", "--batch-size", 16)

    result = cakd(*words, "--out", tmp_path, "--overwrite")

    assert (result.code, "not a run's" in result.err) == (4, True)
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "README.md", "config.json"}


def test_a_finished_run_without_its_model_is_trained_again(cakd, toy_file, tmp_path):
    words = ("train-teacher", "--data", f"tensors:{toy_file}", "--model", "resnet8", "--batch-size", 16)
    words += ("--epochs", 1, "--out", tmp_path / "run")
    assert cakd(*words).code == 0
    (tmp_path / "run" / "model.safetensors").unlink()

    assert "--resume" in cakd("eval", tmp_path / "run").err
    assert cakd(*words, "--resume").code == 0
    assert cakd("eval", tmp_path / "run").code == 0


@pytest.mark.parametrize("redirect", ["| true", "> /dev/full", ">&-", "2>&-", "2> /dev/full"])
@pytest.mark.parametrize("mode", ["", "--json"])
def test_output_that_goes_nowhere(redirect, mode):
    command = f"{sys.executable} -m cakd_cli recipes list {mode} {redirect}; echo ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)

    assert "Traceback" not in done.stderr
    assert "bug in cakd" not in done.stderr
    assert int(done.stderr.split()[-1]) in ({0, 4, 141} if redirect.startswith((">", "|")) else {0})


def test_an_interrupt_is_said(cakd, monkeypatch, toy_teacher):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("cakd_cli.models.saving.read_config", interrupted)
    result = cakd("eval", toy_teacher, "--json")

    assert result.code == 130
    assert result.document["error"]["code"] == "interrupted"
    assert "error: interrupted" in result.err


def test_no_emoji_in_messages(cakd, tmp_path):
    (tmp_path / "l.yaml").write_text("# \n" * 99 + "foo: 1\n")

    assert "l.yaml:100: foo: unknown key" in cakd("distill", tmp_path / "l.yaml").err


def test_a_short_form_of_one_kind_keeps_the_other_settings(cakd, tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "a" / part / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (30 + i, 30), (i, 0, 255 * (name == "dog"))).save(
                    tmp_path / "a" / part / name / f"{i}.png"
                )
    words = ("--model", "resnet8", "--batch-size", 4, "--epochs", 1, "data.workers=0", "data.image_size=16")
    assert cakd("train-teacher", "--data", f"folder:{tmp_path / 'a'}", *words, "--out", tmp_path / "run").code == 0
    plain = cakd("eval", tmp_path / "run", "--json").document

    assert (
        cakd("eval", tmp_path / "run", "--data", f"folder:{tmp_path / 'a'}", "--json").document["quality"]
        == plain["quality"]
    )


def test_a_loss_is_told_whole(cakd):
    document = cakd("list", "losses", "gdkd", "--json").document
    text = cakd("list", "losses", "gdkd").out

    assert [entry["type"] for entry in document["objective"]] == ["cross-entropy", "gdkd"]
    settings = {row["name"]: row for row in document["terms"][0]["settings"]}
    assert settings["k"] == {"name": "k", "default": 5, "range": "a whole number >= 1", "meaning": "classes at the top"}
    assert settings["temperature"]["range"] == "a number > 0, <= 1000"
    assert {"pair": "cifar100/wrn-40-2-wrn-16-2", "settings": {"w1": 2, "w2": 6}} in document["published"]
    assert (
        settings["w1"]["range"]
        == "a number >= 0 or {type: linear | cosine | step, start, end, epochs} or {type: adaptive, base, bound}"
    )
    assert "adaptive" not in settings["weight"]["range"]
    for part in ("w0 T^2 mean KL(b)", "arXiv 2512.04625", "cifar100/wrn-40-2-wrn-16-2: w1: 2, w2: 6"):
        assert part in text


def test_every_loss_can_be_told(cakd):
    rows = cakd("list", "losses", "--json").document

    assert len(rows) == len({row["name"] for row in rows}) >= 19
    for row in rows:
        document = cakd("list", "losses", row["name"], "--json").document
        assert all(term["formula"] and term["settings"] for term in document["terms"]), row
        assert all(
            setting["meaning"] and setting["range"] for term in document["terms"] for setting in term["settings"]
        )


def test_a_term_without_a_method_of_its_name_is_told_too(cakd):
    text = cakd("list", "losses", "cakd-features").out

    assert "stands for" not in text
    assert "layers: none  (a list, each {student, teacher})" in text


def test_what_cannot_be_told(cakd):
    unknown, other = cakd("list", "losses", "gdkdd"), cakd("list", "models", "resnet8")

    assert (unknown.code, other.code) == (2, 2)
    assert "no loss 'gdkdd'; did you mean gdkd" in unknown.err
    assert "cakd list models takes no name" in other.err


def test_a_plan_says_where_weights_come_from_and_fetches_nothing(cakd, home, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("urllib.request.urlopen", lambda *arguments, **options: pytest.fail("fetched"))
    torch.save(ResNetSpec(type="resnet20").build(in_channels=3, num_classes=100).state_dict(), tmp_path / "t.pth")
    words = ("distill", "--data", "cifar100", "--loss", "kd", "--dry-run", "--teacher", "resnet20")
    words = (*words, f"teacher.weights={tmp_path / 't.pth'}")
    pretrained = "model={type: torchvision, name: resnet18, pretrained: true}"

    fresh = cakd(*words, "--student", "resnet8")
    document = cakd(*words, pretrained, "--json").document

    assert fresh.code == 0, fresh.err
    assert "student   resnet8, fresh weights: " in fresh.out
    assert f"teacher   resnet20, weights of {tmp_path / 't.pth'}: " in fresh.out
    assert "download  cifar100, 170 MB, into " in fresh.out
    assert document["student"]["starts_from"] == "torchvision's published weights"
    assert [text.split(",")[0] for text in document["to_fetch"]] == ["cifar100", "the weights of torchvision:resnet18"]
    assert document["steps_per_epoch"] == 45_000 // 128
    assert not home.exists()
    assert not (tmp_path / "torch").exists()


def test_a_plan_of_a_folder_creates_nothing(cakd, home, tmp_path):
    write_pictures(tmp_path / "images")
    words = ("train-teacher", "--data", f"folder:{tmp_path / 'images'}", "--model", "resnet8", "--batch-size", 4)
    plan = cakd(*words, "data.decoded_gb=1", "--dry-run")

    assert plan.code == 0, plan.err
    assert "3 x 32 x 32 (auto: the shorter side of the median training image has 36 pixels)" in plan.out
    assert not home.exists()


def write_pictures(root):
    from PIL import Image

    for part, count in (("train", 12), ("test", 4)):
        for name, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 36), colour).save(root / part / name / f"{i}.png")


def test_the_chosen_size_is_said_and_kept(cakd, tmp_path):
    write_pictures(tmp_path / "images")
    words = ("train-teacher", "--data", f"folder:{tmp_path / 'images'}", "--model", "resnet8", "--batch-size", 6)
    result = cakd(*words, "--epochs", 1, "data.workers=0", "--out", tmp_path / "run")

    assert result.code == 0, result.err
    assert "data.image_size: 32 (the shorter side of the median training image has 36 pixels)" in result.err
    assert "image_size: 32" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert cakd("eval", tmp_path / "run", "--json").document["samples"] == 8


def test_several_teachers_are_the_flag_given_again(cakd, toy_file, toy_teacher, tmp_path):
    words = ("distill", "--data", f"tensors:{toy_file}", "--student", "resnet8", "--loss", "kd", "--epochs", 1)
    words = (*words, "--batch-size", 16, "--teacher", toy_teacher, f"--teacher={toy_teacher}")
    result = cakd(*words, "--out", tmp_path / "run")

    assert result.code == 0, result.err
    assert f"teacher resnet8 of {toy_teacher} and resnet8 of {toy_teacher}: top-1" in result.err
    report = cakd("eval", tmp_path / "run", "--teacher", toy_teacher, "--teacher", toy_teacher, "--json").document
    assert " and " in report["teacher"]["name"]


def test_the_bar_moves_between_two_looks_at_the_loss():
    from rich.console import Console as RichConsole

    console = Console()
    console.stderr = RichConsole(force_terminal=True, file=io.StringIO(), width=80)
    console.start(epochs=2, steps_per_epoch=50, done=10, title="resnet8")
    try:
        (task,) = console._bar.tasks
        assert (task.total, task.completed) == (100, 10)
        console.tick(epoch=0, step=11)
        assert task.completed == 11
        # Not more often than an eye can see.
        console.tick(epoch=0, step=12)
        assert task.completed == 11
    finally:
        console.end()


def test_an_epoch_is_one_line_of_a_terminal():
    """However many parts a loss has; a file gets all of them."""
    from rich.console import Console as RichConsole

    parts = dict.fromkeys(("bcd", "scd", "wcd", "feature_bcd", "feature_scd", "feature_wcd"), 0.5)
    line = {"epoch": 1, "step": 50, "images_per_second": 1234.0, "validation": {"top1": 0.5}}
    line["train"] = {"loss": 51.051, "top1": 0.2, "cross_entropy": 1.444, **parts}
    said = {}
    for width in (80, 110, None):
        console = Console(bar=False)
        terminal = {"force_terminal": width is not None, "no_color": True, "soft_wrap": True}
        console.stderr = RichConsole(file=io.StringIO(), width=width, **terminal)
        console.start(epochs=2, steps_per_epoch=50, done=0, title="resnet8")
        console.epoch(line)
        said[width] = re.sub(r"\x1b\[[0-9;]*m", "", console.stderr.file.getvalue()).rstrip()

    tail = "  held-out top-1 50.0%  1,234 images/s  0:00 left"
    assert said[80] == f"epoch 1/2  loss 51.051{tail}"
    assert said[110] == f"epoch 1/2  loss 51.051 (cross_entropy 1.444, bcd 0.500, ...){tail}"
    assert "feature_wcd 0.500)" in said[None]
