"""The README says what is true."""

import re
import shlex
from pathlib import Path

import pytest

from tests.test_cli import FLAGS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for page in (TEXT, *(path.read_text() for path in (ROOT / "recipes").rglob("*.yaml")))
    for line in re.findall(r"^(?:#   )?(cakd .*)$", page, flags=re.MULTILINE)
]


def test_the_test_command_is_what_runs_before_a_change_lands():
    (command,) = [line for line in TEXT.splitlines() if line.endswith("&& pytest")]

    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_there_are_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_their_flags_exist(command):
    words = shlex.split(command)[1:]
    name = " ".join(words[:2]) if words[0] in ("recipes", "teacher-memory") else words[0]

    assert name in FLAGS
    assert {word for word in words if word.startswith("--")} <= FLAGS[name]


def test_its_python_runs(monkeypatch):
    import torch

    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    logits = torch.randn(2, 8, 10)
    names = {"student_logits": logits[0].requires_grad_(), "teacher_logits": logits[1]}

    exec(code, names)

    assert set(names["loss"].parts) == {"bcd", "scd", "wcd"}


def test_its_loss_is_a_loss():
    from cakd_cli.recipe import strict_yaml
    from cakd_cli.recipe.schema import Recipe

    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    document = strict_yaml.parse(text)
    base = {"data": {"type": "digits"}, "model": {"type": "resnet8"}, "teacher": {"type": "run", "path": "t"}}

    assert len(Recipe.model_validate(base | document.value).loss) == 4


def test_its_error_is_the_error(cakd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["data: digits", "model: resnet8", "teacher: t", "loss:", "  - {type: cross-entropy}", "  - type: cakd"]
    (tmp_path / "mine.yaml").write_text("\n".join([*lines, "    temprature: 4"]))

    assert cakd("distill", "mine.yaml", "engine.epochs=0").err.strip() in TEXT
