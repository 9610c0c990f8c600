"""What limits a run: its data, its teacher or its student, a term that hardly counts; and what would help."""

from collections.abc import Mapping, Sequence

from cakd_cli.errors import DeviceFullError, first_line
from cakd_cli.losses import Term, Weights
from cakd_cli.losses.weights import ChangingWeight
from cakd_cli.recipe.schema import Recipe

# A term whose gradient is less than this share of another's is worth a warning.
_FAINT = 0.01


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
    advice = {
        "data": recipe.data.faster_loading(),
        "teacher": _about_teacher(recipe),
        "student": _about_student(recipe),
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
    return "" if half else "engine.precision=bf16 is faster where the machine has it"


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
