"""Which method is better, by how much, and whether that is more than chance."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from cakd_cli.errors import InputError, RecipeError, UsageError, nearest
from cakd_cli.evaluation import metrics
from cakd_cli.recipe import published
from cakd_cli.report import statistics
from cakd_cli.report.finished import Evaluations, FinishedRun, differing

# Figures of a network beside its teacher, and of a network alone.
FIDELITY = ("agreement", "kl", "bcd", "scd", "wcd")
QUALITY = ("map", "top1", "top5", "nll", "ece")


def compare(
    runs: Sequence[FinishedRun], evaluations: Evaluations, *, against: str | None = None, different: bool = False
) -> dict[str, Any]:
    """Compare groups of runs that differ in the seed alone.

    Args:
        runs: All of them.
        evaluations: Measures them on their test images.
        against: The group that the others are compared with; none is the student alone, or else the first.
        different: Compare although more than the method differs.

    Returns:
        ``groups``, best first, each with its figures as mean, standard deviation (none of one run) and n, and its
        ``difference``: over the seeds that both groups have, the mean, its 95% interval (BCa bootstrap), p (sign
        flips), p after Holm's correction and a verdict.

    Raises:
        UsageError: If there is no group ``against``.
        RecipeError: If the runs are not comparable.
        InputError: If two runs of a group have one seed.
    """
    differs = differing(runs)
    if differs and not different:
        what = "; ".join(f"{name}: {' or '.join(values)}" for name, values in differs.items())
        raise RecipeError(f"these runs are no fair comparison: they differ in {what}", hint="--different compares them")
    groups = _grouped(runs)
    base = _baseline(groups, against)
    documents = {name: _group(name, members, evaluations) for name, members in groups.items()}
    several = [name for name, document in documents.items() if "map" in document["figures"]]
    if several and len(several) < len(documents):
        raise RecipeError(f"images of {several[0]} have several labels, those of others one: no figure is of both")
    headline = "map" if several else "top1"
    values = {
        name: {run.seed: evaluations.of(run)["quality"][headline] for run in members}
        for name, members in groups.items()
    }
    _add_differences(documents, values, base)
    _add_published(documents, groups)
    teachers = [report["teacher"] for report in map(evaluations.of, runs) if "teacher" in report]
    alike = len({(teacher["name"], teacher["quality"][headline]) for teacher in teachers}) == 1
    teacher = teachers[0] if alike else None
    first = evaluations.of(runs[0])
    return {
        "data": first["data"],
        "samples": first["samples"],
        "headline": headline,
        "against": base,
        "comparisons": len(groups) - 1,
        "groups": sorted(documents.values(), key=lambda group: -group["figures"][headline]["mean"]),
        "teacher": teacher and {key: teacher[key] for key in ("name", "quality", "cost")},
        "networks": None if "test images" in differs or "data" in differs else _two_networks(runs, evaluations),
        "different": differs,
        "classes": len(first["per_class"]),
    }


def _grouped(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        members = groups.setdefault(run.group, [])
        if any(other.seed == run.seed for other in members):
            other = next(other for other in members if other.seed == run.seed)
            raise InputError(
                f"{other.path} and {run.path} are both {run.group} with seed {run.seed}",
                hint="runs are told apart by the names of their folders",
            )
        members.append(run)
    return groups


def _baseline(groups: Mapping[str, Sequence[FinishedRun]], against: str | None) -> str:
    if against is not None:
        if against not in groups:
            raise UsageError(f"--against {against}: there is no such group; {nearest(against, list(groups))}")
        return against
    return next((name for name, members in groups.items() if members[0].is_alone), next(iter(groups)))


def _group(name: str, members: Sequence[FinishedRun], evaluations: Evaluations) -> dict[str, Any]:
    reports = [evaluations.of(run) for run in members]
    sources = [report["quality"] | report.get("teacher", {}).get("fidelity", {}) for report in reports]
    held_out = [run.facts["metrics"].get("validation", {}).get("top1") for run in members]
    latency = next(
        (report["cost"]["latency"][0]["median_ms"] for report in reports if "latency" in report["cost"]), None
    )
    return {
        "name": name,
        "alone": members[0].is_alone,
        "model": members[0].facts["model"]["name"],
        "runs": [str(run.path) for run in members],
        "seeds": [run.seed for run in members],
        "parameters": reports[0]["cost"]["parameters"],
        "flops_per_image": reports[0]["cost"]["flops_per_image"],
        "latency_ms": latency,
        "figures": {
            key: spread([source[key] for source in sources])
            for key in (*QUALITY, *FIDELITY)
            if all(key in source for source in sources)
        },
        "validation": spread([value for value in held_out if value is not None]),
        "best_on_test": spread(
            [run.facts["best_on_test"]["top1"] for run in members if "top1" in run.facts["best_on_test"]]
        ),
        "curve": _curve(members),
    }


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, standard deviation (none of one value) and n; none of nothing."""
    if not values:
        return None
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None, "n": len(values)}


def _curve(members: Sequence[FinishedRun]) -> list[float]:
    """Top-1 after each epoch on what was looked at then, mean over the runs that have it."""
    lines = [[line.get("validation", line.get("test", {})) for line in run.curve] for run in members]
    curves = [[figures["top1"] for figures in of_run if "top1" in figures] for of_run in lines]
    return [fmean(values) for values in zip(*curves, strict=False)]


def _add_differences(
    documents: dict[str, dict[str, Any]], values: Mapping[str, Mapping[int, float]], base: str
) -> None:
    others = [name for name in documents if name != base]
    pairs = {
        name: [values[name][seed] - values[base][seed] for seed in sorted(values[name].keys() & values[base].keys())]
        for name in others
    }
    raw = {name: statistics.sign_flip(found) if found else 1.0 for name, found in pairs.items()}
    corrected = dict(zip(others, statistics.holm([raw[name] for name in others]), strict=True))
    for name in others:
        found = pairs[name]
        low, high = statistics.bca_interval(found) if len(found) >= statistics.LEAST_FOR_INTERVAL else (None, None)
        documents[name]["difference"] = {
            "pairs": len(found),
            "mean": fmean(found) if found else None,
            "low": low,
            "high": high,
            "p": raw[name],
            "p_holm": corrected[name],
            "verdict": statistics.verdict(found, corrected[name], comparisons=len(others)),
        }


def _add_published(documents: dict[str, dict[str, Any]], groups: Mapping[str, Sequence[FinishedRun]]) -> None:
    """Put what was published beside the groups that are named after a method and follow the literature's protocol."""
    names = {run.facts["teacher"]["name"] for members in groups.values() for run in members if run.facts["teacher"]}
    teacher = _architecture(names.pop()) if len(names) == 1 else ""
    for name, document in documents.items():
        first = groups[name][0]
        if first.recipe.protocol == "literature":
            known = published.figures(first.recipe.data.type, f"{teacher}-{_architecture(document['model'])}")
            document["published"] = known.get("student" if document["alone"] else name)


def _architecture(name: str) -> str:
    """Name a network as tables of pairs do: without its library, its weights and where it lies."""
    return name.partition(" of ")[0].rpartition(":")[2].partition("@")[0]


def _two_networks(runs: Sequence[FinishedRun], evaluations: Evaluations) -> dict[str, Any] | None:
    """Compare two networks image by image, which says nothing of their methods; none unless there are two."""
    if len(runs) != 2:
        return None
    first, second = (int(evaluations.of(run)["right"], 16) for run in runs)
    only_first, only_second = (first & ~second).bit_count(), (second & ~first).bit_count()
    return {
        "names": [run.path.name for run in runs],
        "only_first": only_first,
        "only_second": only_second,
        "p": statistics.mcnemar(only_first, only_second),
    }


def significance_note(document: Mapping[str, Any]) -> str:
    """Say what the number of seeds can show at all."""
    comparisons = document["comparisons"]
    if not comparisons:
        return ""
    needed = statistics.pairs_needed(comparisons)
    most = max(group["difference"]["pairs"] for group in document["groups"] if "difference" in group)
    if most >= needed:
        return ""
    least = min(1.0, comparisons * statistics.least_p(most))
    return (
        f"with {most} seed{'s' * (most != 1)} in common and {comparisons} comparison{'s' * (comparisons != 1)} p "
        f"cannot be below {least:.2g}, so nothing can be significant: {needed} seeds are needed"
    )


def headline_name(key: str) -> str:
    """Name the figure that decides, as people write it."""
    return metrics.headline({key: 0.0})[0]
