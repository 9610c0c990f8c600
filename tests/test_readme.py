"""The README says what is true."""

import re
import shlex
import subprocess
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
COMMANDS += ["cakd " + words for words in re.findall(r"-m cakd_cli ([^'\n]*)", TEXT)]
(SLURM,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", TEXT, flags=re.DOTALL)


def test_the_test_command_is_what_runs_before_a_change_lands():
    (command,) = [line for line in TEXT.splitlines() if line.endswith("&& pytest")]

    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_there_are_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_their_flags_exist(command):
    words = shlex.split(command)[1:]
    name = " ".join(words[:2]) if words[0] in ("recipes", "teacher-memory", "data") else words[0]

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


@pytest.mark.parametrize(("code", "queued_again"), [(75, True), (0, False), (4, False)])
def test_the_slurm_script_queues_what_was_stopped_again(tmp_path, code, queued_again):
    """With stand-ins: srun starts two processes, each of which sees its own number, and one ends with a code."""
    stubs = {
        "scontrol": 'echo "$@" >> scontrol.txt; [ "$1" = show ] && printf "node1\\nnode2\\n"',
        "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" || code=$?; done; exit $code',
        "python": f'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $@" >> python.txt; exit {code}',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\ncode=0\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    subprocess.run(["bash", "-c", SLURM], cwd=tmp_path, env=environment, check=False)

    started = (tmp_path / "python.txt").read_text().splitlines()
    assert [line.split(" -m cakd_cli ")[0] for line in started] == ["0/2 0 node1:29500", "1/2 1 node1:29500"]
    assert "--resume" in started[0]
    assert ("requeue 7" in (tmp_path / "scontrol.txt").read_text()) is queued_again
