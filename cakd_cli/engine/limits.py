"""What limits a run: its data, its teacher or its student, and what would help."""

import os
from collections.abc import Mapping

from cakd_cli.data import FolderSpec
from cakd_cli.recipe.schema import Recipe


def sentence(shares: Mapping[str, float], recipe: Recipe) -> str:
    """Say where an epoch's time went, and what would help.

    Args:
        shares: Of the time by part, as in metrics.jsonl.
        recipe: Without anything automatic.
    """
    groups = {"data": shares.get("data", 0.0), "teacher": shares.get("teacher", 0.0)}
    groups["student"] = sum(shares.get(part, 0.0) for part in ("student", "loss", "backward", "optimizer"))
    limit = max(groups, key=groups.__getitem__)
    ordered = sorted(groups.items(), key=lambda item: -item[1])
    text = "time: " + ", ".join(f"{name} {share:.0%}" for name, share in ordered if share >= 0.005)
    advice = {"data": _about_data, "teacher": _about_teacher, "student": _about_student}[limit](recipe)
    return f"{text}; {advice}" if advice else text


def _about_data(recipe: Recipe) -> str:
    spec, cores = recipe.data, os.cpu_count() or 1
    if not isinstance(spec, FolderSpec):
        return ""
    if spec.workers < cores:
        return f"data.workers={cores} would decode more images at a time (now {spec.workers})"
    if not spec.decoded_gb:
        return "data.decoded_gb=20 would keep decoded images, in 20 GB at most"
    return ""


def _about_teacher(recipe: Recipe) -> str:
    if recipe.engine.teacher_memory != "off":
        runs = " and runs" if recipe.engine.teacher_memory == "disk" else ""
        return f"its answers are kept: later epochs{runs} ask less"
    if isinstance(recipe.data, FolderSpec) and not recipe.data.views:
        return "data.views=8 would draw 8 crops of each image once and keep the teacher's answers"
    return "engine.teacher_memory=disk would keep its answers, if engine.teacher_memory_gb is room enough"


def _about_student(recipe: Recipe) -> str:
    return "" if recipe.engine.precision == "bf16" else "engine.precision=bf16 is faster where the machine has it"
