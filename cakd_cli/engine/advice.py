"""What limits a run: its data, its teacher or its student, a term that hardly counts; and what would help."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cakd_cli.errors import DeviceFullError, first_line
from cakd_cli.losses import Term, Weights
from cakd_cli.losses.weights import ChangingWeight
from cakd_cli.recipe.schema import Recipe

# A term whose gradient is less than this share of another's is worth a warning.
_FAINT = 0.01
# Training images under which two runs of one recipe may well differ by more than methods do.
_FEW_IMAGES = 500
# Of top-1, between a teacher and the student alone, under which there is little to gain.
_SMALL_GAP = 0.01


class Case(NamedTuple):
    """What is known of a distillation before it begins.

    Attributes:
        classes: Of the data.
        training_images: Without those held out.
        student_parameters: Elements of the student's weights.
        teacher_parameters: Of the teacher's; 0 where they cannot be counted.
        terms: Kinds of the terms that look at the teacher.
        teacher_top1: Of the teacher on held-out images, in [0, 1]; none where its own run has not recorded it.
        alone_top1: Of the same student without a teacher, likewise; none where no such run is known.
    """

    classes: int
    training_images: int
    student_parameters: int
    teacher_parameters: int
    terms: frozenset[str]
    teacher_top1: float | None = None
    alone_top1: float | None = None


def before_distilling(case: Case) -> list[str]:
    """Say what speaks against a distillation, or limits what it can gain; empty where nothing does."""
    lines = []
    if case.classes == 2:
        zero = "; DKD's NCKD is zero" if "dkd" in case.terms else ""
        one = "of two classes a teacher's logits tell how sure it is, one number an image, and nothing of other classes"
        lines.append(one + zero)
    if case.training_images < _FEW_IMAGES:
        lines.append(
            f"{case.training_images:,} training images are few: another seed may change more than a teacher does; "
            "cakd sweep compares several"
        )
    if case.student_parameters >= case.teacher_parameters > 0:  # of an ONNX file they are not known
        lines.append(
            f"the student is no smaller than its teacher: {case.student_parameters:,} parameters, "
            f"and {case.teacher_parameters:,}"
        )
    if case.teacher_top1 is not None and case.alone_top1 is not None:
        lines += _about_gap(case.teacher_top1, case.alone_top1)
    return lines


def _about_gap(teacher: float, alone: float) -> list[str]:
    if teacher - alone >= _SMALL_GAP:
        return []
    figures = f"top-1 of held-out images is {teacher:.1%} for the teacher and {alone:.1%} for the student alone"
    return [f"{figures}: there is {'little' if teacher > alone else 'nothing'} to gain in accuracy"]


def sentence(shares: Mapping[str, float], recipe: Recipe, *, fast_bf16: bool) -> str:
    """Say where an epoch's time went, and what would help.

    Args:
        shares: Of the time by part, as in metrics.jsonl.
        recipe: Without anything automatic.
        fast_bf16: Whether the device computes faster in bf16.
    """
    groups = {"data": shares.get("data", 0.0), "teacher": shares.get("teacher", 0.0)}
    groups["student"] = sum(shares.get(part, 0.0) for part in ("student", "loss", "backward", "optimizer"))
    limit = max(groups, key=groups.__getitem__)
    ordered = sorted(groups.items(), key=lambda item: -item[1])
    text = "time: " + ", ".join(f"{name} {share:.0%}" for name, share in ordered if share >= 0.005)
    advice = {
        "data": recipe.data.faster_loading(),
        "teacher": _about_teacher(recipe),
        "student": _about_student(recipe) if fast_bf16 else "",
    }
    return f"{text}; {advice[limit]}" if advice[limit] else text


def _about_teacher(recipe: Recipe) -> str:
    if recipe.engine.teacher_memory != "off":
        runs = " and runs" if recipe.engine.teacher_memory == "disk" else ""
        return f"its answers are kept: later epochs{runs} ask less"
    if recipe.data.countable_views():
        return f"{recipe.data.countable_views()} and keep the teacher's answers"
    return "engine.teacher_memory=disk would keep its answers, if engine.teacher_memory_gb is room enough"


def device_full(recipe: Recipe, ranks: int, error: BaseException) -> DeviceFullError:
    """Say how many images at a time were too many in a step, and into how many parts a batch may be cut instead."""
    batch, parts = recipe.engine.batch_size, recipe.engine.gradient_accumulation
    own = batch // ranks
    more = next((number for number in range(2 * parts, own + 1) if own % number == 0), None)
    hint = "a smaller network, or smaller images"
    if more is not None:
        hint = f"cut the batch into parts of {batch // more}: engine.gradient_accumulation={more}"
        hint += "; engine.out_of_memory=accumulate does so by itself" if ranks == 1 else ""
    message = f"the device's memory is full with {own // parts} images at a time: {first_line(error)}"
    return DeviceFullError(message, hint=hint, parts=more)


def _about_student(recipe: Recipe) -> str:
    half = recipe.engine.precision in ("bf16", "fp16")
    return "" if half else "engine.precision=bf16 is faster here"


def norms_by_term(terms: Sequence[Term], norms: Sequence[float]) -> dict[str, float]:
    """Name the gradients' norms; terms that do not look at the logits are left out."""
    named = zip(terms, norms, strict=True)
    return {f"{number}.{term.type}": norm for number, (term, norm) in enumerate(named) if norm >= 0}


def imbalance(weights: Weights, norms: Sequence[float]) -> list[str]:
    """Say which terms of the first epoch hardly count beside another, also once their warm-up is over.

    Terms whose weight changes by a schedule are left out: the first epoch says little of them.
    """
    full = norms_by_term(
        weights.terms,
        [
            -1.0 if isinstance(term.weight, ChangingWeight) else norm / weights.warmup(number, 1)
            for number, (term, norm) in enumerate(zip(weights.terms, norms, strict=True))
        ],
    )
    strongest = max(full, key=full.__getitem__, default="")
    return [
        f"the loss term {name} has a gradient of {norm:.1e} at the logits, {strongest} one of {full[strongest]:.1e}: "
        "it hardly counts"
        for name, norm in full.items()
        if norm < _FAINT * full[strongest]
    ]
