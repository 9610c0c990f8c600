"""The teacher's memory: asked once per view, and no wrong answer is ever used, whatever happens to the files."""

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import struct
import tempfile
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cakd_cli.data import Share
from cakd_cli.errors import InputError
from cakd_cli.machine.stopwatch import Stopwatch
from cakd_cli.models.layers import LOGITS
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import memory as teacher_memory
from cakd_cli.teachers.answers import AnswerSource
from cakd_cli.teachers.memory import Identity, TeacherMemory
from cakd_cli.teachers.recorder import Recorder
from tests.conftest import train_toy

CPU = torch.device("cpu")
IDENTITY = Identity(
    teacher="t",
    architecture="a",
    mean=(0.5,),
    std=(0.25,),
    data="d",
    views="v",
    samples=20,
    per_sample=9,
    computed="cpu fp32",
    form="plain",
    stored="fp32",
    answers=(("logits", (5,)),),
)
FACTS = {"teacher": "t", "data": "d"}
EVERY = torch.arange(IDENTITY.rows)


def truth(views, width=5):
    """An answer that its view alone decides."""
    return torch.stack([torch.sin(views.double() * (d + 1)) for d in range(width)], 1).float()


@pytest.fixture
def filled(home):
    memory = TeacherMemory.open(IDENTITY, FACTS)
    memory.record(EVERY, truth(EVERY))
    return memory


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("stored", ["fp16", "fp32"])
def test_what_was_recorded_is_recalled(home, on_disk, stored):
    identity = dataclasses.replace(IDENTITY, stored=stored)
    memory = TeacherMemory.open(identity, FACTS) if on_disk else TeacherMemory(identity)
    views = torch.tensor([7, 0, 179, 44])
    memory.record(views, truth(views))

    answers, known = memory.recall(torch.tensor([0, 1, 44, 7, 179, 178]))

    assert known.tolist() == [True, False, True, True, True, False]
    assert torch.equal(answers[known], memory.rounded(truth(torch.tensor([0, 44, 7, 179]))))
    assert memory.written().tolist() == [0, 7, 44, 179]
    assert (stored == "fp32") == torch.equal(answers[3], truth(torch.tensor([7]))[0])


@pytest.mark.parametrize("stored", ["fp16", "fp32"])
def test_the_files_are_what_they_are_said_to_be(home, stored):
    """Memories outlive versions: a row a view, and its CRC-32 begun with the view's name."""
    identity = dataclasses.replace(IDENTITY, stored=stored)
    memory = TeacherMemory.open(identity, FACTS)
    rows = truth(EVERY).to(teacher_memory.DTYPES[stored])
    views = [179, 0, 44, 7]
    memory.record(torch.tensor(views), truth(torch.tensor(views)))
    expected = [bytearray(identity.rows * size) for size in (identity.row_bytes, 4)]
    for view in views:
        row = rows[view].numpy().tobytes()
        for content, part in zip(expected, (row, struct.pack("<I", zlib.crc32(row, view) or 1)), strict=True):
            content[view * len(part) : (view + 1) * len(part)] = part

    for name, content in zip(("answers.bin", "checksums.bin"), expected, strict=True):
        assert (memory.folder / name).read_bytes() == content
        # What another version has written.
        (memory.folder / name).write_bytes(content)
    answers, known = TeacherMemory.open(identity, FACTS).recall(EVERY)
    assert known.nonzero().flatten().tolist() == sorted(views)
    assert torch.equal(answers[known], rows[known].float())
    assert not answers[~known].any()


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_first_of_two_answers_to_a_view_is_kept(home, on_disk):
    memory = TeacherMemory.open(IDENTITY, FACTS) if on_disk else TeacherMemory(IDENTITY)
    views = torch.tensor([9, 3, 9, 5, 3])
    answers = truth(views) + torch.arange(5)[:, None]
    answers[1, 2] = torch.nan
    memory.record(views, answers)
    memory.record(views, answers + 1)

    assert torch.equal(memory.recall(torch.tensor([9, 5, 3]))[0], answers[[0, 3, 4]])
    assert memory.verify() == (3, 0)


def test_nothing_asked_for_is_nothing_recalled(filled):
    none = EVERY[:0]
    filled.record(none, truth(none))
    answers, known = filled.recall(none)

    assert answers.shape == (0, 5)
    assert known.shape == (0,)


def test_looking_for_an_answer_takes_no_room(home):
    """In /dev/shm a hole that is read through a map becomes a page, and where there is no room for it a signal."""
    wide = dataclasses.replace(IDENTITY, samples=2000, answers=(("logits", (1000,)),))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        memory = TeacherMemory.open(wide, FACTS, Path(folder) / wide.key)
        files = [memory.folder / name for name in ("checksums.bin", "answers.bin")]
        before = [file.stat().st_blocks * 512 for file in files]

        assert before[0] >= 4 * wide.rows
        assert not memory.recall(torch.arange(wide.rows))[1].any()
        assert [file.stat().st_blocks * 512 for file in files] == before


def test_an_answer_that_the_precision_cannot_hold_is_used_as_it_is_and_not_kept(home):
    memory = TeacherMemory.open(dataclasses.replace(IDENTITY, stored="fp16"), FACTS)
    answers = torch.tensor([[1e5, 0, 0, 0, 0], [1.0, 2, 3, 4, 5]])

    assert memory.rounded(answers)[0, 0] == 1e5
    memory.record(torch.tensor([3, 4]), answers)

    assert memory.recall(torch.tensor([3, 4]))[1].tolist() == [False, True]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Identity)])
def test_every_part_of_the_identity_makes_another_memory(field):
    value = getattr(IDENTITY, field)
    other = {int: lambda: value + 1, str: lambda: value + "x", tuple: lambda: (0.1,)}[type(value)]()
    if field == "answers":
        other = (("logits", (6,)),)
    if field == "stored":
        other = "fp16"

    assert dataclasses.replace(IDENTITY, **{field: other}).key != IDENTITY.key


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_done_to_the_files_no_wrong_answer_is_used(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAKD_HOME", str(tmp_path_factory.mktemp("home")))
        memory = TeacherMemory.open(IDENTITY, FACTS)
        memory.record(EVERY, truth(EVERY))
        folder = teacher_memory.folder_of(IDENTITY)
        changed = set()
        for _ in range(data.draw(st.integers(1, 5))):
            file = folder / data.draw(st.sampled_from(["answers.bin", "checksums.bin"]))
            content = bytearray(file.read_bytes())
            place = data.draw(st.integers(0, len(content) - 1))
            length = data.draw(st.integers(1, 60))
            size = {"answers.bin": IDENTITY.row_bytes, "checksums.bin": 4}[file.name]
            kind = data.draw(st.sampled_from(["flip", "zeros", "copy"]))
            end = min(place + length, len(content))
            if kind == "flip":
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            elif kind == "zeros":
                content[place:end] = bytes(end - place)
            else:  # a block of another place
                start = data.draw(st.integers(0, len(content) - (end - place)))
                content[place:end] = content[start : start + end - place]
            changed |= set(range(place // size, (end - 1) // size + 1))
            with file.open("r+b") as opened:
                opened.write(content)

        answers, known = memory.recall(EVERY)

        assert torch.equal(answers[known], truth(EVERY)[known])
        assert set((~known).nonzero().flatten().tolist()) <= changed
        # Asked again, the memory is whole again.
        memory.record(EVERY, truth(EVERY))
        assert memory.verify() == (IDENTITY.rows, 0)
        memory.close()


def test_an_answer_in_the_place_of_another_is_not_used(filled):
    folder = teacher_memory.folder_of(IDENTITY)
    for name, size in (("answers.bin", IDENTITY.row_bytes), ("checksums.bin", 4)):
        content = bytearray((folder / name).read_bytes())
        content[:size], content[size : 2 * size] = content[size : 2 * size], content[:size]
        with (folder / name).open("r+b") as opened:
            opened.write(content)

    assert filled.recall(EVERY)[1].tolist() == [False, False] + [True] * 178
    assert filled.damaged == 2


def test_an_answer_that_another_writes_at_this_moment_is_unknown_not_damaged(home, monkeypatch):
    reader, writer = TeacherMemory.open(IDENTITY, FACTS), TeacherMemory.open(IDENTITY, FACTS)
    original = reader._read

    def meanwhile(part, place, size):
        content = original(part, place, size)
        writer.record(EVERY[:1], truth(EVERY[:1]))
        return content

    monkeypatch.setattr(reader, "_read", meanwhile)

    assert reader.recall(EVERY[:1])[1].tolist() == [False]
    assert reader.damaged == 0
    assert reader.recall(EVERY[:1])[1].tolist() == [True]


@pytest.mark.parametrize("name", ["answers.bin", "checksums.bin"])
def test_a_truncated_file_is_refused_open_or_not(filled, name):
    os.truncate(teacher_memory.folder_of(IDENTITY) / name, 100)

    with pytest.raises(InputError, match="damaged: a file has 100 bytes instead of") as caught:
        filled.recall(EVERY)
    assert caught.value.hint == f"cakd teacher-memory prune {IDENTITY.key}"
    with pytest.raises(InputError, match="100 bytes"):
        TeacherMemory.open(IDENTITY, FACTS)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"identity": {"layout": 1}}', '{"identity": 3}', '{"identity": {"layout": 1}, "form": 1}'],
)
def test_a_memory_that_does_not_say_what_it_is_is_refused(filled, content):
    (teacher_memory.folder_of(IDENTITY) / "memory.json").write_text(content)

    for reader in (lambda: TeacherMemory.open(IDENTITY, FACTS), lambda: teacher_memory.read(filled.folder)):
        with pytest.raises(InputError, match=r"is damaged: memory.json"):
            reader()


def test_a_missing_file_is_named(filled):
    (filled.folder / "answers.bin").unlink()

    with pytest.raises(InputError, match=r"answers.bin is missing"):
        TeacherMemory.open(IDENTITY, FACTS)


@pytest.mark.parametrize("failure", ["error", "short"])
def test_a_full_disk_ends_the_recording_and_nothing_else(home, monkeypatch, failure):
    memory = TeacherMemory.open(IDENTITY, FACTS)
    memory.record(EVERY[:10], truth(EVERY[:10]))
    written = []
    original = os.pwrite

    def full(file, content, place):
        written.append(place)
        if len(written) < 8:
            return original(file, content, place)
        if failure == "error":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(file, content[:3], place)

    monkeypatch.setattr(os, "pwrite", full)
    memory.record(EVERY[10:], truth(EVERY[10:]))
    memory.record(EVERY[10:], truth(EVERY[10:]))

    assert "No space left on device" in memory.stopped
    assert len(written) == 8
    answers, known = memory.recall(EVERY)
    assert 10 <= known.sum() <= 14
    assert torch.equal(answers[known], truth(EVERY)[known])


def test_a_memory_that_may_only_be_read_is_read(filled, monkeypatch):
    original = os.open

    def guarded(path, flags, *rest, **options):
        if flags & os.O_RDWR and "teacher-memory" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", guarded)
    memory = TeacherMemory.open(IDENTITY, FACTS)
    memory.record(EVERY, truth(EVERY) + 1)

    assert "may only be read" in memory.stopped
    assert torch.equal(memory.recall(EVERY)[0], truth(EVERY))


WIDE = dataclasses.replace(IDENTITY, samples=2000, answers=(("logits", (60,)), ("layer", (5, 2, 4))), stored="fp16")


def fill_for_ever(seed, home):
    """Record, in this thread or in one beside it."""
    os.environ["CAKD_HOME"] = home
    memory = TeacherMemory.open(WIDE, FACTS)
    keep = memory.record if seed == 1 else Recorder(memory.record).give
    generator = torch.Generator().manual_seed(seed)
    while True:
        views = torch.randint(WIDE.rows, (64,), generator=generator)
        keep(views, truth(views, 100))


@pytest.mark.slow
def test_two_processes_that_fill_at_once_and_are_killed_leave_only_whole_answers(home):
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=fill_for_ever, args=(seed, str(home))) for seed in (1, 2)]
    for process in processes:
        process.start()
    folder = teacher_memory.folder_of(WIDE)
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if folder.exists() and len(teacher_memory.read(folder).written()) > 3000:
                break
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    memory = TeacherMemory.open(WIDE, FACTS)
    views = memory.written()
    answers, known = memory.recall(views)
    assert len(views) > 3000
    assert known.all()
    assert torch.equal(answers, memory.rounded(truth(views, 100)))
    # The lock went with its holders.
    memory.record(EVERY, truth(EVERY, 100))
    assert memory.recall(EVERY)[1].all()


def test_two_processes_may_create_one_memory(home, monkeypatch):
    original = teacher_memory.whole_folder

    def slower(path):
        monkeypatch.setattr(teacher_memory, "whole_folder", original)
        TeacherMemory.open(IDENTITY, FACTS | {"teacher": "first"}).record(EVERY, truth(EVERY))
        return original(path)

    monkeypatch.setattr(teacher_memory, "whole_folder", slower)
    memory = TeacherMemory.open(IDENTITY, FACTS | {"teacher": "second"})

    assert memory.facts["teacher"] == "first"
    assert memory.recall(EVERY)[1].all()


def shown(images):
    """Count images; black ones only fill a batch up."""
    return int(images.flatten(1).any(1).sum())


class Asked:
    """A teacher that counts."""

    def __init__(self):
        self.images = 0

    def answer(self, batch):
        self.images += shown(batch.images)
        return {LOGITS: batch.images.float().mean((1, 2, 3))[:, None].expand(-1, 5).contiguous()}

    def close(self): ...


def toy_split(toy_file, *words):
    return (
        resolve(["data.crop_padding=1", *words], {"data": f"tensors:{toy_file}", "model": "resnet8"}).data.load().train
    )


def epochs_of(split, answers, count, *, seed=0):
    return [
        torch.cat(
            [
                said[LOGITS]
                for _, said in answers.beside(
                    split.train_batches(batch_size=16, seed=seed, epoch=epoch, start=0, device=CPU), Stopwatch(CPU)
                )
            ]
        )
        for epoch in range(count)
    ]


def test_the_teacher_is_asked_once_per_view_and_answers_as_if_it_were_asked_each_time(toy_file, home):
    split = toy_split(toy_file)
    identity = dataclasses.replace(IDENTITY, samples=split.views.samples, per_sample=split.views.per_sample)
    live, teacher = Asked(), Asked()
    expected = epochs_of(split, AnswerSource(live, None, CPU, print), 12)
    answers = AnswerSource(teacher, TeacherMemory.open(identity, FACTS), CPU, print)
    found = epochs_of(split, answers, 12)

    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    names = {
        int(name)
        for epoch in range(12)
        for batch in split.train_batches(batch_size=16, seed=0, epoch=epoch, start=0, device=CPU)
        for name in batch.views
    }
    assert live.images == 12 * 9 * 16
    assert teacher.images == len(names)
    assert answers.take_counts() == {"asked": len(names), "remembered": live.images - len(names)}
    # Another seed meets views that the first has met; another process would, too.
    second = AnswerSource(teacher, TeacherMemory.open(identity, FACTS), CPU, print)
    epochs_of(split, second, 12, seed=1)
    assert second.asked < 0.3 * live.images
    assert teacher.images <= identity.rows


def test_an_incomplete_batch_alone_is_asked_about_as_it_was_among_others(toy_file, home):
    """A killed run may go on with the last batch of an epoch; its answers must not depend on that."""
    split = toy_split(toy_file)
    identity = dataclasses.replace(IDENTITY, samples=split.views.samples, per_sample=split.views.per_sample)
    (last,) = split.train_batches(batch_size=64, seed=0, epoch=0, start=2, device=CPU, share=Share(incomplete=True))
    sizes = []

    class Noting(Asked):
        def answer(self, batch):
            sizes.append(len(batch.images))
            return super().answer(batch)

    source = AnswerSource(Noting(), TeacherMemory.open(identity, FACTS), CPU, print, 64)
    ((batch, answers),) = source.beside(iter([last]), Stopwatch(CPU))

    assert 0 < len(last.labels) < 64
    assert sizes == [64]
    assert len(answers[LOGITS]) == len(batch.labels)


@pytest.mark.parametrize("fraction", ["0", "0.3"])
def test_a_view_has_one_name_whatever_is_held_out(toy_file, fraction):
    split = toy_split(toy_file, f"data.validation_fraction={fraction}", "data.horizontal_flip=true")
    seen = {}
    for epoch in range(6):
        for batch in split.train_batches(batch_size=16, seed=0, epoch=epoch, start=0, device=CPU):
            for name, image in zip(batch.views.tolist(), batch.images, strict=True):
                assert name < split.views.count
                assert torch.equal(seen.setdefault(name, image), image)
    whole = toy_split(toy_file, "data.validation_fraction=0", "data.horizontal_flip=true")
    assert whole.views == split.views
    for batch in whole.train_batches(batch_size=16, seed=5, epoch=3, start=0, device=CPU):
        for name, image in zip(batch.views.tolist(), batch.images, strict=True):
            assert torch.equal(seen.get(name, image), image)


def asked_in(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [sum(line["teacher"][kind] for line in lines) for kind in ("asked", "remembered")]


def test_six_students_of_one_teacher_ask_once_per_view(toy_file, toy_teacher, tmp_path, monkeypatch):
    from cakd_cli.teachers.forms import Form

    asked = []
    original = Form.answers_to
    monkeypatch.setattr(
        Form, "answers_to", lambda self, images: (asked.append(shown(images)), original(self, images))[1]
    )
    counts = []
    for loss in ("kd", "dkd", "cakd"):
        for seed in (0, 1):
            flags = {"teacher": str(toy_teacher), "loss": loss, "seed": seed, "engine.epochs": 5}
            run = train_toy(toy_file, tmp_path / f"{loss}{seed}", "data.crop_padding=1", **flags)
            counts.append(asked_in(run))

    (memory,) = [teacher_memory.read(folder) for folder in teacher_memory.folders()]
    assert sum(found for found, _ in counts) == len(memory.written()) <= memory.identity.rows
    # The first run times the plain form on its first batch, twice; nothing else is shown.
    assert sum(asked) == len(memory.written()) + 2 * 16
    assert [found for found, _ in counts[2:]] == [0] * 4
    assert sum(map(sum, counts)) == 6 * 5 * 9 * 16


def losses_of(run):
    return [json.loads(line)["train"]["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_nothing_changes_but_time(toy_file, toy_teacher, tmp_path):
    """The training loss over 200 steps, with and without, in float32."""
    found = {}
    for where in ("off", "ram", "disk", "disk again"):
        flags = {"teacher": str(toy_teacher), "loss": "dkd", "engine.epochs": 23, "engine.batch_size": 16}
        words = ("data.crop_padding=1", f"engine.teacher_memory={where.split()[0]}")
        found[where] = losses_of(train_toy(toy_file, tmp_path / where, *words, **flags))

    assert len(found["off"]) * 9 == 207
    for where in ("ram", "disk", "disk again"):
        assert found[where] == pytest.approx(found["off"], rel=1e-5)


def test_a_damaged_answer_is_said_and_asked_again(cakd, toy_file, toy_teacher, tmp_path):
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    words = (*words, "--loss", "kd", "--epochs", 1, "--batch-size", 16, "engine.precision=fp32")
    assert cakd(*words, "--out", tmp_path / "one").code == 0
    (folder,) = teacher_memory.folders()
    view = int(teacher_memory.read(folder).written()[3])
    with (folder / "answers.bin").open("r+b") as file:
        file.seek(view * teacher_memory.read(folder).identity.row_bytes)
        file.write(b"\xff")
    broken = cakd("teacher-memory", "verify", "--json")
    result = cakd(*words, "--out", tmp_path / "two")

    assert broken.code == 4
    assert broken.document["memories"][0]["damaged"] == 1
    assert result.code == 0
    assert "holds answers that are not what was written: asked again" in result.err
    assert asked_in(tmp_path / "two")[0] == 1
    assert losses_of(tmp_path / "one") == losses_of(tmp_path / "two")
    assert cakd("teacher-memory", "verify").code == 0


def test_a_truncated_memory_ends_the_run_before_it_begins(cakd, toy_file, toy_teacher, tmp_path):
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    words = (*words, "--loss", "kd", "--epochs", 1, "--batch-size", 16)
    assert cakd(*words, "--out", tmp_path / "one").code == 0
    (folder,) = teacher_memory.folders()
    os.truncate(folder / "checksums.bin", 8)
    result = cakd(*words, "--out", tmp_path / "two")

    assert result.code == 4
    assert f"hint: cakd teacher-memory prune {folder.name}" in result.err
    assert not (tmp_path / "two").exists()
    assert "damaged" in cakd("teacher-memory", "list").out
    assert cakd("teacher-memory", "prune", folder.name).out == f"removed {folder.name}\n"
    assert cakd(*words, "--out", tmp_path / "two").code == 0


def test_a_full_disk_while_filling_ends_nothing(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    def full(file, content, place):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    result = cakd(*words, "--loss", "kd", "--epochs", 2, "--batch-size", 16, "--out", tmp_path / "run")

    assert result.code == 0, result.err
    assert result.err.count("new answers are not kept") == 1
    assert asked_in(tmp_path / "run") == [2 * 9 * 16, 0]


def test_fill_asks_before_the_run_does(cakd, toy_file, toy_teacher, tmp_path):
    words = ("--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8", "--epochs", 3)
    words = (*words, "--seed", 4, "engine.batch_size=16")
    filled = cakd("teacher-memory", "fill", *words, "--json")
    again = cakd("teacher-memory", "fill", *words)
    run = cakd("distill", *words, "--loss", "cakd", "--out", tmp_path / "run")

    assert filled.document["asked"] == filled.document["known"] > 300
    assert "0 images asked about" in again.out
    assert run.code == 0
    assert asked_in(tmp_path / "run") == [0, 3 * 9 * 16]
    assert "100%" not in cakd("teacher-memory", "list").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["engine.teacher_memory=ram"], None),
        (
            ["engine.teacher_memory_gb=0.000001"],
            " kB for 25 views of 160 images are more than engine.teacher_memory_gb=1e-06",
        ),
        (["engine.teacher_memory=disk", "engine.teacher_memory_gb=0.000001"], "are more than engine.teacher_memory_gb"),
    ],
)
def test_the_limit_is_said_and_kept(cakd, toy_file, toy_teacher, tmp_path, words, said):
    command = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    result = cakd(*command, "--loss", "kd", "--epochs", 12, "--batch-size", 16, "--out", tmp_path / "run", *words)

    assert result.code == 0
    assert teacher_memory.folders() == []
    asked, remembered = asked_in(tmp_path / "run")
    if said is None:
        assert asked + remembered == 12 * 9 * 16
        assert remembered > 200
    else:
        assert said in result.err
        assert remembered == 0


def test_too_little_room_on_the_disk_is_said(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    command = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    result = cakd(*command, "--epochs", 1, "--batch-size", 16, "--out", tmp_path / "run")

    assert result.code == 0
    assert "engine.teacher_memory: off (" in result.err
    assert "1 byte free" in result.err or "1 bytes free" in result.err


def test_prune_wants_to_know_what(cakd, filled):
    assert cakd("teacher-memory", "prune").code == 2
    assert cakd("teacher-memory", "prune", "--all", IDENTITY.key).code == 2
    assert cakd("teacher-memory", "prune", "nothing").code == 4
    assert cakd("teacher-memory", "prune", "--all").code == 0
    assert "no teacher memory in" in cakd("teacher-memory", "list").out


def test_a_full_memory_needs_no_more_room(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    command = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    command = (*command, "--epochs", 3, "--batch-size", 16, "data.crop_padding=0")
    assert cakd(*command, "--out", tmp_path / "one").code == 0
    (folder,) = teacher_memory.folders()
    used = teacher_memory.used_bytes(teacher_memory.read(folder).identity)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1, 1))

    assert cakd(*command, "--out", tmp_path / "two").code == 0
    assert used >= 160 * 4 * 2
    assert asked_in(tmp_path / "two") == [0, 3 * 9 * 16]


def test_a_home_that_cannot_be_written_keeps_answers_in_ram(cakd, toy_file, toy_teacher, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CAKD_HOME", str(tmp_path / "file" / "home"))
    command = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    result = cakd(*command, "--epochs", 1, "--batch-size", 16, "--out", tmp_path / "run")

    assert result.code == 0, result.err
    assert f"engine.teacher_memory: ram (nothing can be kept on disk: {tmp_path / 'file'}" in result.err


def test_fill_that_keeps_nothing_is_an_error(cakd, toy_file, toy_teacher, monkeypatch):
    def full(file, content, place):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    words = ("--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8", "engine.batch_size=16")
    result = cakd("teacher-memory", "fill", *words)

    assert result.code == 4
    assert "answers are not kept" in result.err
    assert "No space left on device" in result.err


def test_each_form_has_a_memory_of_its_own(cakd, toy_file, toy_teacher, tmp_path):
    """Whoever names a form never reads the answers of another."""
    command = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    command = (*command, "--epochs", 1, "--batch-size", 16)
    for name in ("plain", "folded"):
        assert cakd(*command, "--out", tmp_path / name, f"engine.teacher_form={name}").code == 0
        assert asked_in(tmp_path / name) == [9 * 16, 0]
    assert len(teacher_memory.folders()) == 2


def test_pruning_leaves_what_is_being_created(cakd, filled):
    young, old = (teacher_memory.root() / f".{name}.tmp" for name in ("young", "old"))
    young.mkdir()
    old.mkdir()
    os.utime(old, (1, 1))

    assert cakd("teacher-memory", "prune", "--all").code == 0
    assert [path.name for path in teacher_memory.root().iterdir()] == [young.name]
