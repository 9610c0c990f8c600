"""A checkpoint is what was written, or is not used."""

import json
import random
import shutil
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from cakd_cli.engine import checkpoints, loop, run
from cakd_cli.errors import InputError
from cakd_cli.process import main
from tests.engine.test_resume import assert_same_run, command, killed_after, straight, words

__all__ = ["straight", "words"]
FILES = ("model.safetensors", "training.safetensors", "best.safetensors", "state.json", "manifest.json")


@pytest.fixture(scope="session")
def killed_once(toy_file, toy_teacher, tmp_path_factory):
    """A run that died in its second epoch, with a checkpoint after every step."""
    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patch, killed_after(9):
        patch.setattr(sys, "argv", ["cakd", *command(toy_file, toy_teacher), "--out", str(out)])
        main()
    return out


@pytest.fixture
def killed(killed_once, tmp_path):
    shutil.copytree(killed_once, tmp_path / "run")
    return tmp_path / "run"


def kept(path):
    return sorted((path / "checkpoints").iterdir())


def flip(file, place, bit=3):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def test_the_last_two_are_kept(killed):
    assert [path.name for path in kept(killed)] == ["epoch-00001-step-000002", "epoch-00001-step-000003"]
    assert sorted(path.name for path in kept(killed)[0].iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_one_wrong_bit_is_named_and_the_one_before_is_used(cakd, words, straight, killed, name):
    file = kept(killed)[1] / name
    flip(file, len(file.read_bytes()) - 20)

    result = cakd(*words, "--out", killed, "--resume")

    assert result.code == 0
    # A wrong manifest speaks of another file.
    assert f"warning: {file if name != 'manifest.json' else file.parent}" in result.err
    assert "damaged checkpoint" in result.err
    assert "the one before it is used" in result.err
    assert "resumed after epoch 1, step 2" in result.err
    assert_same_run(straight[0], killed)


def test_a_damaged_one_takes_no_place_of_a_whole_one(killed):
    flip(kept(killed)[1] / "model.safetensors", 500)
    found = checkpoints.Checkpoints(killed / "checkpoints")
    moment = found.latest()
    found.save(replace(moment, state=moment.state | {"step": 2, "epoch": 0}))

    assert [path.name for path in kept(killed)] == ["epoch-00000-step-000002", "epoch-00001-step-000002"]


def test_any_wrong_bit_is_noticed(killed):
    draw = random.Random(0)
    newest = kept(killed)[1]
    for _ in range(100):
        file = newest / draw.choice(FILES)
        content = file.read_bytes()
        flip(file, draw.randrange(len(content)), draw.randrange(8))
        found = checkpoints.Checkpoints(killed / "checkpoints")
        assert found.latest().state["step"] == 2, file
        assert len(found.damaged) == 1
        file.write_bytes(content)
    assert checkpoints.Checkpoints(killed / "checkpoints").latest().state["step"] == 3


@pytest.mark.parametrize("name", FILES)
def test_cut_files_are_noticed(killed, name):
    for path in kept(killed):
        (path / name).write_bytes((path / name).read_bytes()[:-5])

    with pytest.raises(InputError, match="damaged checkpoint"):
        checkpoints.Checkpoints(killed / "checkpoints").latest()


def test_without_a_whole_one_the_run_says_what_is_left(cakd, words, killed):
    for path in kept(killed):
        flip(path / "training.safetensors", 50)

    result = cakd(*words, "--out", killed, "--resume")

    assert result.code == 4
    assert result.err.count("damaged checkpoint") == 2
    assert "whole are only epoch-00001-step-000003/model.safetensors, epoch-00001-step-000003/best" in result.err
    assert "hint: start again with --overwrite" in result.err
    assert len(kept(killed)) == 2
    assert cakd(*words, "--out", killed, "--overwrite").code == 0


@pytest.mark.parametrize(
    "state", ["{}", "[]", '{"epoch": "x"}', '{"epoch": 9999, "step": 0, "part_names": [], "best": null}', "[" * 99999]
)
def test_a_checkpoint_that_does_not_fit_is_named(cakd, words, killed, state):
    """Somebody edited it, and its checksum too."""
    for path in kept(killed):
        (path / "state.json").write_text(state)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["state.json"] = checkpoints._digest(path / "state.json")
        (path / "manifest.json").write_text(json.dumps(manifest))

    result = cakd(*words, "--out", killed, "--resume")

    assert (result.code, "damaged checkpoint" in result.err) == (4, True), result.err


def test_a_run_whose_end_fails_is_not_trained_again(cakd, words, straight, tmp_path, monkeypatch):
    def unreadable(*arguments, **options):
        raise InputError("test/cat/1.png: cannot be read as an image")

    monkeypatch.setattr(run.metrics, "quality", unreadable)
    assert cakd(*words, "--out", tmp_path / "run").code == 4
    monkeypatch.undo()

    monkeypatch.setattr(loop.Trainer, "train_step", lambda *arguments: pytest.fail("trained again"))
    result = cakd(*words, "--out", tmp_path / "run", "--resume")

    assert result.code == 0, result.err
    assert_same_run(straight[0], tmp_path / "run")


def test_repaired_test_images_are_no_other_data(cakd, toy_file, toy_teacher, straight, tmp_path):
    data = tmp_path / "data.safetensors"
    shutil.copy(toy_file, data)
    words = (*command(data, toy_teacher), "--out", tmp_path / "run")
    with killed_after(9):
        cakd(*words)
    tensors = load_file(data)
    tensors["test_images"][0] += 1
    save_file(tensors, data, metadata={"class_names": json.dumps([f"class {i}" for i in range(4)])})

    result = cakd(*words, "--resume")

    assert result.code == 0, result.err
    assert "warning: the test images of" in result.err
    assert load_file(straight[0] / "model.safetensors").keys() == load_file(tmp_path / "run/model.safetensors").keys()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", '{"ended": [], "data": 3, "teacher": "x", "resumed": {"a": 1}, "metrics": null}'),
        ("run.json", "[" * 99999),
        ("metrics.jsonl", '{"epoch": "a", "images_per_second": "b"}\n'),
        ("metrics.jsonl", '[1, 2]\n"epoch"\n'),
    ],
)
def test_edited_records_of_a_run_do_not_stop_it(cakd, words, killed, name, content):
    (killed / name).write_text(content)

    result = cakd(*words, "--out", killed, "--resume")

    assert result.code == 0, result.err
