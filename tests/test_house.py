"""The house: who knows whom, and how large its rooms are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cakd_cli

ROOT = Path(cakd_cli.__file__).parent
# Who may import whom: a room knows those in lower rows; of its own row only itself.
ROWS = (
    ("errors", "files", "options"),
    ("console",),
    ("machine",),
    ("losses", "models", "data"),
    ("teachers",),
    ("recipe",),
    ("evaluation",),
    ("engine",),
    ("bench", "export", "report", "sweep"),
    ("commands",),
    ("app",),
    ("process",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ROWS) for room in rooms}
# What the command line needs to know to name its choices.
WITHOUT_TORCH = ("app", "console", "errors", "process", "export.formats", "recipe.shipped")
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms that a file imports, those that it imports late or for its types included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cakd_cli"):
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            found |= {name for name in names if name in LEVEL}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_know_only_what_is_below(path):
    room = room_of(path)
    if room == "__init__":
        return

    assert room in LEVEL, "a new room needs a row above"
    for other in imported(path) - {room}:
        assert LEVEL[other] < LEVEL[room], f"{room} must not know {other}"


def test_the_machine_knows_torch_alone():
    for path in (ROOT / "machine").glob("*.py"):
        assert imported(path) <= {"machine", "errors"}


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_functions_are_short():
    for path, node in functions():
        docstring = node.body[0] if ast.get_docstring(node) else None
        lines = node.end_lineno - node.lineno + 1
        lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
        assert lines < 50, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def test_functions_take_few_parameters():
    """Commands are Typer's; public losses have their papers' settings."""
    for path, node in functions():
        arguments = node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        public_loss = room_of(path) == "losses" and not node.name.startswith("_")
        assert count <= 6 or public_loss or room_of(path) == "app", f"{path.relative_to(ROOT)}: {node.name} has {count}"


def test_the_loop_is_read_in_one_sitting():
    assert len((ROOT / "engine" / "loop.py").read_text().splitlines()) < 300


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_answers_at_once_does_not_import_torch(module):
    code = f"import sys, cakd_cli.{module}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "cakd_cli", "--version"], capture_output=True, text=True, check=True)

    assert done.stdout.startswith("cakd ")
