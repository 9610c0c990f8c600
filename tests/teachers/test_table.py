"""Answers on the device, and the thread that keeps them: what is recalled and kept is what the files alone would give.

The CPU stands for the device: nothing here asks which one it is.
"""

import dataclasses
import errno
import os
import threading

import pytest
import torch

from cakd_cli.engine.choices import fits_device
from cakd_cli.errors import InputError
from cakd_cli.machine.hardware import Hardware
from cakd_cli.machine.stopwatch import Stopwatch
from cakd_cli.teachers import memory as teacher_memory
from cakd_cli.teachers import recorder as recorder_module
from cakd_cli.teachers.answers import AnswerSource
from cakd_cli.teachers.memory import TeacherMemory
from cakd_cli.teachers.recorder import Recorder
from cakd_cli.teachers.table import AnswerTable
from tests.conftest import train_toy
from tests.engine.test_resume import assert_same_run, command, killed_after
from tests.teachers.test_memory import (
    CPU,
    EVERY,
    FACTS,
    IDENTITY,
    Asked,
    asked_in,
    epochs_of,
    losses_of,
    toy_split,
    truth,
)


@pytest.fixture
def memory(home):
    return TeacherMemory.open(IDENTITY, FACTS)


@pytest.mark.parametrize("stored", ["fp16", "fp32"])
def test_the_table_recalls_what_the_memory_does(home, stored):
    memory = TeacherMemory.open(dataclasses.replace(IDENTITY, stored=stored), FACTS)
    memory.record(EVERY[:100], truth(EVERY[:100]))
    table = AnswerTable(memory, CPU)
    table._rows.fill_(torch.nan)  # what the device held before

    for views in (torch.tensor([7, 0, 179, 44]), torch.tensor([44, 99, 100, 7]), EVERY[:0], EVERY):
        expected, known = memory.recall(views)
        found, also_known = table.recall(views)

        assert torch.equal(also_known, known)
        assert torch.equal(found[known], expected[known])
        assert found.dtype == torch.float32


def test_a_row_is_read_once_and_what_others_write_is_found(memory, monkeypatch):
    other, table = TeacherMemory.open(IDENTITY, FACTS), AnswerTable(memory, CPU)
    read = []
    original = memory.recall
    monkeypatch.setattr(memory, "recall", lambda views: (read.append(views.tolist()), original(views))[1])
    views = torch.tensor([3, 5, 8])

    other.record(views[:2], truth(views[:2]))
    assert table.recall(views)[1].tolist() == [True, True, False]
    other.record(views, truth(views))
    assert torch.equal(table.recall(views)[0], truth(views))
    table.recall(views)

    assert read == [[3, 5, 8], [8]]


def test_a_damaged_row_is_not_laid_into_the_table(memory):
    memory.record(EVERY, truth(EVERY))
    with (memory.folder / "answers.bin").open("r+b") as file:
        file.seek(4 * IDENTITY.row_bytes)
        file.write(b"\xff")
    table = AnswerTable(memory, CPU)

    found, known = table.recall(EVERY)

    assert (~known).nonzero().flatten().tolist() == [4]
    assert torch.equal(found[known], truth(EVERY)[known])
    assert memory.damaged == 1


def test_what_has_been_put_is_known_once_it_is_seen_to_be_finite(home):
    memory = TeacherMemory.open(dataclasses.replace(IDENTITY, stored="fp16"), FACTS)
    table, views, rows = AnswerTable(memory, CPU), torch.tensor([3, 4, 9]), torch.ones(3, 5)
    rows[0, 0], rows[2, 4] = 1e5, torch.nan

    table.put(views, rows)
    assert not table.recall(views)[1].any()
    table.confirm(views, rows.half())

    assert table.recall(views)[1].tolist() == [False, True, False]
    assert table.recall(views)[0][1].tolist() == [1.0] * 5


def identity_of(split, **changes):
    return dataclasses.replace(IDENTITY, samples=split.views.samples, per_sample=split.views.per_sample, **changes)


@pytest.mark.parametrize("in_ram", [False, True])
def test_with_and_without_a_table_the_same_is_asked_and_answered(toy_file, home, in_ram):
    split = toy_split(toy_file)
    found, counts = [], []
    for table in (False, True):
        identity = identity_of(split, form=str(table))
        memory = TeacherMemory(identity) if in_ram else TeacherMemory.open(identity, FACTS)
        source = AnswerSource(Asked(), memory, CPU, print, 16, table=table)
        answers, asked = [], []
        for epoch in range(3):
            answers += epochs_of(split, source, 1, seed=epoch)
            asked.append(source.take_counts())
        found.append(torch.cat(answers))
        counts.append(asked)

    assert torch.equal(*found)
    assert counts[0] == counts[1]
    assert counts[1][-1]["remembered"] > 0
    if not in_ram:
        folders = teacher_memory.folders()
        for name in ("answers.bin", "checksums.bin"):
            assert len({(folder / name).read_bytes() for folder in folders}) == 1


class Killed(BaseException):
    """What no handler of errors catches."""


def test_killed_at_any_write_leaves_only_whole_answers(toy_file, home, monkeypatch):
    split, original = toy_split(toy_file), os.pwrite
    # 144 views an epoch: their rows, and then their checksums.
    for moment in (0, 1, 143, 144, 145, 287):
        identity = identity_of(split, form=str(moment))
        written = []

        def mortal(file, content, place, written=written, moment=moment):
            if len(written) == moment:
                original(file, content[: len(content) // 2], place)
                raise Killed
            written.append(place)
            return original(file, content, place)

        source = AnswerSource(Asked(), TeacherMemory.open(identity, FACTS), CPU, print, 16, table=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", mortal)
            with pytest.raises(Killed):
                epochs_of(split, source, 1)

        memory = TeacherMemory.open(identity, FACTS)
        assert memory.verify()[0] == max(0, moment - 144)
        assert memory.verify()[1] <= 1  # half a checksum
        again = AnswerSource(Asked(), memory, CPU, print, 16, table=True)
        straight = AnswerSource(Asked(), None, CPU, print)
        assert torch.equal(*(epochs_of(split, each, 1)[0] for each in (again, straight)))
        assert memory.verify() == (144, 0)


def test_a_full_disk_ends_the_recording_and_the_table_goes_on(toy_file, home, monkeypatch):
    def full(file, content, place):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    split, notes = toy_split(toy_file), []
    source = AnswerSource(Asked(), TeacherMemory.open(identity_of(split), FACTS), CPU, notes.append, 16, table=True)
    first, again = epochs_of(split, source, 1)[0], epochs_of(split, source, 1)[0]

    assert torch.equal(first, again)
    assert source.take_counts() == {"asked": 144, "remembered": 144}
    assert len(notes) == 1
    assert "new answers are not kept" in notes[0]
    assert "No space left on device" in notes[0]
    assert not len(source.memory.written())


@pytest.mark.parametrize("table", [False, True])
def test_a_file_that_is_cut_while_answers_are_recorded_ends_the_run(toy_file, home, table):
    split = toy_split(toy_file)
    memory = TeacherMemory.open(identity_of(split), FACTS)
    source = AnswerSource(Asked(), memory, CPU, print, 16, table=table)
    batches = source.beside(split.train_batches(batch_size=16, seed=0, epoch=0, start=0, device=CPU), Stopwatch(CPU))
    source._keep(EVERY[:1], truth(EVERY[:1]))
    source.flush()
    os.truncate(memory.folder / "checksums.bin", 100)

    with pytest.raises(InputError, match="a file has 100 bytes instead of") as caught:
        list(batches)
    assert caught.value.hint.startswith("cakd teacher-memory prune")


def test_what_goes_wrong_in_the_thread_is_told_once(home):
    failing = [InputError("cut"), None]
    recorder = Recorder(lambda views, rows: (_ for _ in ()).throw(failing[0]) if failing[0] else None)
    recorder.give(EVERY[:1], truth(EVERY[:1]))

    with pytest.raises(InputError, match="cut"):
        recorder.flush()
    failing[0] = None
    recorder.give(EVERY[:1], truth(EVERY[:1]))
    recorder.flush()


def test_no_step_waits_for_a_disk_before_much_is_under_way(monkeypatch):
    monkeypatch.setattr(recorder_module, "_MOST_UNDER_WAY", 3)
    disk, recorded, given = threading.Event(), [], []

    def slow(views, rows):
        assert disk.wait(10)
        recorded.append(views.item())

    recorder = Recorder(slow)

    def give():
        for number in range(5):
            recorder.give(EVERY[number : number + 1], truth(EVERY[number : number + 1]))
            given.append(number)

    giving = threading.Thread(target=give)
    giving.start()
    giving.join(0.1)
    assert (given, recorded) == ([0, 1, 2], [])
    disk.set()
    giving.join(10)
    recorder.flush()

    assert recorded == [0, 1, 2, 3, 4]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("teacher-memory")]


def test_the_device_is_waited_for_by_the_thread_alone(monkeypatch):
    """A copy from the device has arrived when its event has come, and nothing is read before."""
    log, come = [], threading.Event()

    class Event:
        def synchronize(self):
            log.append(f"waits in {threading.current_thread().name}")
            assert come.wait(10)
            log.append("has come")

    monkeypatch.setattr(recorder_module, "_to_host", lambda rows: (rows, Event()))
    recorder = Recorder(lambda views, rows: log.append(rows.tolist()))
    rows = torch.zeros(1, 2)
    recorder.give(EVERY[:1], rows)
    rows.fill_(3.0)
    come.set()
    recorder.flush()

    assert log == ["waits in teacher-memory_0", "has come", [[3.0, 3.0]]]


@pytest.mark.parametrize(
    ("free", "fits", "said"),
    [
        (None, False, ""),
        (2 * 180 * 5 * 4, True, "those met are held on cuda too"),
        (2 * 180 * 5 * 4 - 1, False, "not held on cuda, where 7.2 kB are free"),
    ],
)
def test_half_of_the_free_memory_is_room_for_a_table(monkeypatch, free, fits, said):
    monkeypatch.setattr(Hardware, "free_bytes", lambda machine: free)

    assert fits_device(IDENTITY, Hardware(torch.device("cuda"), "fp32")) == (fits, said)


@pytest.fixture
def made(monkeypatch):
    """The tables that are made from here on."""
    tables, original = [], AnswerTable.__init__

    def noted(table, *arguments):
        tables.append(table)
        original(table, *arguments)

    monkeypatch.setattr(AnswerTable, "__init__", noted)
    return tables


ROOM = "at most 1.1 MB for 25 views of 160 images"


@pytest.mark.parametrize(
    ("free", "where", "said"),
    [
        pytest.param(10**9, "auto", f"disk ({ROOM}; those met are held on cpu too)", id="room"),
        pytest.param(
            *(1000, "auto", f"disk ({ROOM}; not held on cpu, where 1.0 kB are free)"), id="none", marks=pytest.mark.slow
        ),
        pytest.param(10**9, "ram", "ram (those met are held on cpu too)", id="asked for", marks=pytest.mark.slow),
        pytest.param(10**9, "off", None, id="off", marks=pytest.mark.slow),
    ],
)
def test_whether_there_is_a_table_is_said(cakd, toy_file, toy_teacher, tmp_path, monkeypatch, made, free, where, said):
    monkeypatch.setattr(Hardware, "free_bytes", lambda machine: free)
    words = ("distill", "--data", f"tensors:{toy_file}", "--teacher", toy_teacher, "--student", "resnet8")
    words = (*words, "--epochs", 1, "--batch-size", 16, f"engine.teacher_memory={where}")
    result = cakd(*words, "--out", tmp_path / "run")

    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("engine.teacher_memory: ")]
    assert lines == ([] if said is None else [f"engine.teacher_memory: {said}"])
    assert len(made) == (said is not None and "too)" in said)


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["fp16", "fp32"])
def test_a_table_changes_no_loss_of_a_run(toy_file, toy_teacher, tmp_path, home, monkeypatch, made, stored):
    """207 steps to the last bit: with files alone, with a table that fills, and with one that meets what is known."""
    monkeypatch.setattr(Hardware, "free_bytes", lambda machine: 10**9 if runs else None)
    runs, words = {}, ("data.crop_padding=1", f"engine.teacher_memory_precision={stored}")
    flags = {"teacher": str(toy_teacher), "loss": "dkd", "engine.epochs": 23}
    for name, folder in (("files", "one"), ("table", "other"), ("table again", "other")):
        monkeypatch.setenv("CAKD_HOME", str(home / folder))
        runs[name] = train_toy(toy_file, tmp_path / name, *words, **flags)

    losses = {name: losses_of(run) for name, run in runs.items()}
    assert len(made) == 2
    assert len(losses["files"]) * 9 == 207
    assert losses["files"] == losses["table"] == losses["table again"]
    assert asked_in(runs["files"]) == asked_in(runs["table"])
    assert asked_in(runs["table again"]) == [0, 23 * 9 * 16]


@pytest.mark.slow
def test_a_run_that_is_killed_with_a_table_goes_on_as_it_would_have(
    cakd, toy_file, toy_teacher, tmp_path, home, monkeypatch, made
):
    monkeypatch.setattr(Hardware, "free_bytes", lambda machine: 10**9)
    words, straight, killed = (*command(toy_file, toy_teacher), "data.crop_padding=1"), tmp_path / "1", tmp_path / "2"
    assert cakd(*words, "--out", straight).code == 0
    monkeypatch.setenv("CAKD_HOME", str(home / "other"))
    with killed_after(8):
        cakd(*words, "--out", killed)
    result = cakd(*words, "--out", killed, "--resume")

    assert result.code == 0, result.err
    assert "resumed after" in result.err
    assert len(made) == 3
    assert_same_run(straight, killed)
