"""The teacher: checked before an hour is spent on it, and asked in its own terms."""

import json
import shutil

import pytest
import torch

from cakd_cli.engine.task import Task
from cakd_cli.errors import InputError
from cakd_cli.evaluation.teacher_check import check_teacher
from cakd_cli.losses import KDTerm
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models import saving as saved_model
from cakd_cli.models.layers import LOGITS
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import RunTeacher, Teacher, load_teacher
from cakd_cli.teachers.forms import Form


def same_data(teacher):
    """What a run on the teacher's own data records of it."""
    return teacher.facts.get("data", {})


CPU = choose_hardware("cpu", "fp32")


@pytest.fixture
def data(toy_file):
    return resolve([], {"data": f"tensors:{toy_file}", "model": "resnet8"}).data.load()


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_teacher_that_answers_as_recorded_passes(data, toy_teacher):
    teacher = load_teacher(RunTeacher(path=str(toy_teacher)), data, CPU)

    checked = check_teacher(teacher, data, same_data(teacher), CPU, batch_size=64, on="validation")

    recorded = json.loads((toy_teacher / "run.json").read_text())["metrics"]["validation"]["top1"]
    assert checked == {"top1": pytest.approx(recorded), "samples": 16}


def test_teacher_that_does_not_answer_as_recorded_is_refused(data, toy_teacher, tmp_path):
    shutil.copytree(toy_teacher, tmp_path / "t")
    edit_config(tmp_path / "t", lambda config: config["cakd"]["metrics"]["validation"].update(top1=0.42))
    teacher = load_teacher(RunTeacher(path=str(tmp_path / "t")), data, CPU)

    with pytest.raises(InputError, match=r"its run recorded 42.0%"):
        check_teacher(teacher, data, same_data(teacher), CPU, batch_size=64, on="validation")


def test_on_other_data_the_record_does_not_count(data, toy_teacher, tmp_path):
    shutil.copytree(toy_teacher, tmp_path / "t")
    edit_config(tmp_path / "t", lambda config: config["cakd"]["metrics"]["validation"].update(top1=0.42))
    teacher = load_teacher(RunTeacher(path=str(tmp_path / "t")), data, CPU)

    check_teacher(teacher, data, same_data(teacher) | {"split_seed": 1}, CPU, batch_size=64, on="validation")


def test_another_normalisation_than_in_training_is_caught(data, toy_teacher, tmp_path):
    shutil.copytree(toy_teacher, tmp_path / "t")
    edit_config(tmp_path / "t", lambda config: config["pretrained_cfg"].update(mean=[9.0]))
    teacher = load_teacher(RunTeacher(path=str(tmp_path / "t")), data, CPU)

    with pytest.raises(InputError, match=r"near chance|its run recorded"):
        check_teacher(teacher, data, same_data(teacher), CPU, batch_size=64, on="validation")


class Brightness(torch.nn.Module):
    """Answers with what it is shown."""

    def forward(self, images):
        return images.mean((2, 3)).expand(-1, 4)


def test_each_network_gets_its_own_normalisation(data):
    mean, std = (0.5,), (0.25,)
    teacher = Teacher(Brightness(), mean, std, "brightness", "", "", {LOGITS: (4,)})
    student = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    seen = []
    teacher.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = next(data.train.train_batches(batch_size=8, seed=0, epoch=0, start=0, device=torch.device("cpu")))

    answers = Form(teacher, "plain", CPU).answer(batch)
    task = Task(student, [KDTerm()], data, CPU, teacher)
    task(batch, answers, [KDTerm()], 1)

    pixels = batch.images.double() / 255
    for shown, (m, s) in zip(seen, ((mean, std), (data.mean, data.std)), strict=True):
        torch.testing.assert_close(shown.double(), (pixels - m[0]) / s[0], atol=1e-5, rtol=0)


def test_a_teacher_of_the_literature_is_read_from_its_file(data, tmp_path):
    spec = resolve([], {"data": "digits", "model": "resnet20"}).model
    torch.save({"model": spec.build(in_channels=1, num_classes=4).state_dict()}, tmp_path / "t.pth")
    words = [f"teacher.weights={tmp_path / 't.pth'}"]
    recipe = resolve(words, {"data": "digits", "model": "resnet8", "teacher": "resnet20", "loss": "kd"})

    teacher = load_teacher(recipe.teacher, data, CPU)

    assert teacher.name == "resnet20"
    with pytest.raises(InputError, match="near chance"):
        check_teacher(teacher, data, same_data(teacher), CPU, batch_size=64, on="validation")


def test_hash_is_of_the_weights_alone():
    one, other = {"a": torch.ones(2), "b": torch.zeros(1)}, {"b": torch.zeros(1), "a": torch.ones(2)}

    assert saved_model.weights_hash(one) == saved_model.weights_hash(other)
    assert saved_model.weights_hash(one) != saved_model.weights_hash({**one, "b": torch.ones(1)})
    bf16 = {"a": torch.ones(2).bfloat16(), "n": torch.tensor(3)}
    assert saved_model.weights_hash(bf16) != saved_model.weights_hash({**bf16, "n": torch.tensor(4)})
