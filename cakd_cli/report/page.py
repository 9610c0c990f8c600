"""The report: one self-contained page about runs, for whoever decides and whoever reviews."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from cakd_cli import __version__
from cakd_cli.errors import RecipeError
from cakd_cli.evaluation import metrics, mistakes
from cakd_cli.files import write_text
from cakd_cli.recipe import strict_yaml
from cakd_cli.report import writing
from cakd_cli.report.comparison import headline_name
from cakd_cli.report.finished import FinishedRun
from cakd_cli.report.inspection import Inspected, inspect

# So many classes, pairs of classes and pictures are shown.
_CLASSES, _PAIRS, _PICTURES = 15, 6, 12
_LARGEST_SIDE = 160


def write(path: Path, document: Mapping[str, Any], runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Write the page.

    Args:
        path: Of the file.
        document: The comparison of the runs.
        runs: All of them.

    Returns:
        ``summary``, the sentences at its beginning, and ``student``, the run that is looked at closely.

    Raises:
        RecipeError: If the packages that it needs are not installed.
        CakdError: If the data or the teacher of the best student is gone.
    """
    try:
        import jinja2
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise RecipeError(f"the report needs {error.name}", hint="pip install 'cakd[report]'") from error
    best = best_run(document, runs)
    looked = inspect(best)
    sentences = summary(document)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cakd_cli.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        title=f"{document['data']}: {best.facts['model']['name']}",
        subtitle=f"{len(runs)} run{'s' * (len(runs) != 1)}, {document['samples']:,} test images, "
        f"{document['classes']} classes",
        version=__version__,
        summary=sentences,
        sections=[section for section in _sections(document, runs, best, looked) if section],
    )
    write_text(path, page)
    return {"summary": sentences, "student": str(best.path)}


def best_run(document: Mapping[str, Any], runs: Sequence[FinishedRun]) -> FinishedRun:
    """Choose the run that is looked at closely: the first seed of the best method, a distilled one if there is any."""
    groups = [group for group in document["groups"] if not group["alone"]] or document["groups"]
    seed = min(groups[0]["seeds"])
    return next(run for run in runs if run.group == groups[0]["name"] and run.seed == seed)


def summary(document: Mapping[str, Any]) -> list[str]:
    """Say in words whether distilling was worth it, and what the student keeps of its teacher."""
    key = document["headline"]
    alone = next((group for group in document["groups"] if group["alone"]), None)
    distilled = [group for group in document["groups"] if not group["alone"]]
    best = (distilled or document["groups"])[0]
    name, reached = headline_name(key), f"{best['figures'][key]['mean']:.2%}"
    found = best.get("difference")
    if alone is None or found is None or document["against"] != alone["name"] or found["mean"] is None:
        lines = [f"{writing.label(best)} reaches {name} {reached}."]
    else:
        base = f"{alone['figures'][key]['mean']:.2%}"
        interval = (
            "" if found["low"] is None else f" (95% interval {100 * found['low']:+.2f} to {100 * found['high']:+.2f})"
        )
        said, _, why = found["verdict"].partition(": ")
        begins = {"better": "Distilling was worth it", "worse": "Distilling did harm"}.get(said, "Not decided")
        lines = [
            f"{begins}: {best['name']} reaches {name} {reached}, the student alone {base}, "
            f"a difference of {100 * found['mean']:+.2f} points{interval} over the {found['pairs']} "
            f"seed{'s' * (found['pairs'] != 1)} that both have."
            + ("" if said in ("better", "worse") else f" That may be chance{f': {why}' if why else ''}.")
        ]
    teacher = document["teacher"]
    if teacher:
        share = best["figures"][key]["mean"] / max(teacher["quality"][key], 1e-9)
        sizes = _shares(best, teacher["cost"])
        agreement = best["figures"].get("agreement")
        lines.append(
            f"The teacher reaches {teacher['quality'][key]:.2%}; the student keeps {share:.1%} of that{sizes}"
            + (f", and gives the same answer to {agreement['mean']:.1%} of the images." if agreement else ".")
        )
    if "ece" in best["figures"]:
        lines.append(
            f"How sure it is differs from how often it is right by {best['figures']['ece']['mean']:.3f} on average "
            "(expected calibration error, 15 bins)."
        )
    return lines


def _shares(best: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    """Say the student's size as shares of its teacher's; empty where that is not known, as of an ONNX file."""
    if not teacher["parameters"]:
        return ""
    sizes = [best[what] / teacher[what] for what in ("parameters", "flops_per_image")]
    return f" with {sizes[0]:.1%} of its parameters and {sizes[1]:.1%} of its FLOPs"


def _section(key: str, title: str, **content: Any) -> dict[str, Any]:
    return {"id": key, "title": title, "figures": [], "groups": [], "blocks": [], "notes": [], **content}


def _sections(
    document: Mapping[str, Any], runs: Sequence[FinishedRun], best: FinishedRun, looked: Inspected
) -> list[dict[str, Any] | None]:
    headings, rows = writing.rows(document, " ± ")
    table = {"headings": headings, "rows": rows, "caption": "Test images; mean ± standard deviation over seeds"}
    parts = [
        _section("methods", "Methods", table=table, notes=writing.notes(document)),
        _course(document, runs, best),
        _price(document),
    ]
    if looked.has_one_label:
        parts += [_sureness(best, looked), _classes(best, looked), _confused(best, looked)]
        if looked.teacher_NC is not None:
            parts += [_disagreements(best, looked), _correlations(best, looked)]
    return [*parts, _made(best)]


def _course(document: Mapping[str, Any], runs: Sequence[FinishedRun], best: FinishedRun) -> dict[str, Any] | None:
    from cakd_cli.report import figures

    curves = {writing.label(group): group["curve"] for group in document["groups"]}
    members = [run.curve for run in runs if run.group == best.group]
    found = [set(line["train"]) for curve in members for line in curve]
    names = [name for name in (members[0][0]["train"] if members[0] else {}) if all(name in parts for parts in found)]
    names = [name for name in names if name not in ("loss", "top1")]
    parts = {
        name: [fmean(line["train"][name] for line in lines) for lines in zip(*members, strict=False)] for name in names
    }
    drawn = [figures.learning_curves(curves), figures.loss_parts(parts, best.group)]
    shown = [figure for figure in drawn if figure is not None]
    return _section("training", "Training", figures=shown) if shown else None


def _price(document: Mapping[str, Any]) -> dict[str, Any]:
    from cakd_cli.report import figures

    key, teacher = document["headline"], document["teacher"]
    points = {
        writing.label(group): (group["flops_per_image"], group["figures"][key]["mean"]) for group in document["groups"]
    }
    if teacher and teacher["cost"]["parameters"]:
        points["teacher"] = (teacher["cost"]["flops_per_image"], teacher["quality"][key])
    drawn = [figures.cost(points, "FLOP", "flops", headline_name(key))]
    timed = {group["model"]: group["latency_ms"] for group in document["groups"] if group["latency_ms"]}
    if len(timed) > 1:
        times = {
            writing.label(group): (timed[group["model"]], group["figures"][key]["mean"])
            for group in document["groups"]
            if group["model"] in timed
        }
        drawn.append(figures.cost(times, "milliseconds", "latency", headline_name(key)))
    fidelity = {
        writing.label(group): {kind: group["figures"][kind]["mean"] for kind in ("bcd", "scd", "wcd")}
        for group in document["groups"]
        if "bcd" in group["figures"]
    }
    if fidelity:
        drawn.append(figures.left_to_learn(fidelity))
    return _section("cost", "What it costs, and what is left to learn", figures=drawn)


def _sureness(best: FinishedRun, looked: Inspected) -> dict[str, Any]:
    from cakd_cli.report import figures

    bins = {best.group: mistakes.reliability(looked.student_NC, looked.labels_N)}
    if looked.teacher_NC is not None:
        bins["teacher"] = mistakes.reliability(looked.teacher_NC, looked.labels_N)
    return _section("reliability", "How sure it is", figures=[figures.reliability(bins)])


def _classes(best: FinishedRun, looked: Inspected) -> dict[str, Any] | None:
    from cakd_cli.report import figures

    names = looked.data.class_names
    ours = metrics.per_class(looked.student_NC, looked.labels_N, names)
    if looked.teacher_NC is None:
        worst = sorted((share, name) for name, share in ours.items() if share is not None)[:_CLASSES]
        rows = [[name, f"{100 * share:.1f}"] for share, name in worst]
        table = {"headings": ["class", "recognised %"], "rows": rows, "caption": "Least recognised classes"}
        return _section("classes", "Classes", table=table)
    theirs = metrics.per_class(looked.teacher_NC, looked.labels_N, names)
    both = [(name, ours[name], theirs[name]) for name in names]
    gaps = [(name, student, teacher) for name, student, teacher in both if student is not None and teacher is not None]
    gaps.sort(key=lambda gap: gap[1] - gap[2])
    words = f"Of {best.path.name}, beside its teacher."
    return _section("classes", "Classes", words=words, figures=[figures.class_gaps(gaps[:_CLASSES])]) if gaps else None


def _confused(best: FinishedRun, looked: Inspected) -> dict[str, Any] | None:
    names = looked.data.class_names
    groups = []
    for pair in mistakes.confusions(looked.student_NC, looked.labels_N, most=_PAIRS):
        title = f"{names[pair.label]} taken for {names[pair.answer]}: {pair.times} times"
        samples = list(pair.samples[: _PICTURES // 2])
        items = _pictures(looked, samples, [f"image {number}" for number in samples], title)
        groups.append({"title": title, "pictures": items})
    words = f"The classes that {best.path.name} confuses most; first the images on which it is surest."
    return _section("confused", "Most confused classes", words=words, groups=groups) if groups else None


def _disagreements(best: FinishedRun, looked: Inspected) -> dict[str, Any] | None:
    assert looked.teacher_NC is not None
    names, found = looked.data.class_names, mistakes.disagreements(looked.student_NC, looked.teacher_NC, most=_PICTURES)
    if not found:
        return None
    student, teacher = looked.student_NC.argmax(1), looked.teacher_NC.argmax(1)
    texts = [
        f"is {names[looked.labels_N[i]]}; student: {names[student[i]]}, teacher: {names[teacher[i]]}" for i in found
    ]
    right, theirs_right = student == looked.labels_N, teacher == looked.labels_N
    words = (
        f"{best.path.name} differs from its teacher on {(student != teacher).sum():,} of {len(student):,} images: the "
        f"student alone is right on {(right & ~theirs_right).sum():,}, the teacher alone on "
        f"{(theirs_right & ~right).sum():,}. First those on which both are surest."
    )
    group = {"title": "Surest disagreements", "pictures": _pictures(looked, found, texts, "disagreement")}
    return _section("disagreements", "Where student and teacher disagree", words=words, groups=[group])


def _pictures(looked: Inspected, samples: Sequence[int], texts: Sequence[str], what: str) -> list[dict[str, str]]:
    images = looked.images(list(samples))
    return [
        {"source": _data_url(image), "text": text, "alt": f"{what}: test image {number}"}
        for image, number, text in zip(images, samples, texts, strict=True)
    ]


def _data_url(image: Tensor) -> str:
    picture = to_pil_image(image if image.shape[0] in (1, 3) else image[:1])
    picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    buffer = io.BytesIO()
    # Photographs are smaller as JPEG, and drawings of a few pixels stay sharp as PNG.
    small = max(picture.size) <= 64
    picture.save(buffer, format="PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _correlations(best: FinishedRun, looked: Inspected) -> dict[str, Any]:
    from cakd_cli.report import figures

    assert looked.teacher_NC is not None
    names = looked.data.class_names
    ours, theirs = (mistakes.class_correlation(answers) for answers in (looked.student_NC, looked.teacher_NC))
    difference = ours - theirs
    first, second = torch.triu_indices(len(names), len(names), 1)
    order = difference[first, second].abs().argsort(descending=True)[:10]
    pairs = list(zip(first[order].tolist(), second[order].tolist(), strict=True))
    largest = [(names[i], names[j], ours[i, j].item(), theirs[i, j].item()) for i, j in pairs]
    words = f"How alike the logits of two classes are over all test images, to {best.path.name} and to its teacher."
    drawn = figures.correlation(difference.numpy(), names, largest)
    return _section("correlation", "Which classes belong together", words=words, figures=[drawn])


def _made(best: FinishedRun) -> dict[str, Any]:
    facts = best.facts
    hardware = facts.get("hardware", {})
    lines = [f"{name} {version}" for name, version in facts.get("versions", {}).items()]
    lines += [f"{key}: {value}" for key, value in hardware.items()]
    chosen = [f"{key}: {why}" for key, why in facts.get("chosen", {}).items()]
    blocks = [
        {"title": f"Recipe of {best.path.name}", "text": strict_yaml.dump(best.recipe.model_dump(mode="json"))},
        {"title": "Command", "text": " ".join(map(str, facts.get("command", [])))},
        {"title": "Versions and hardware", "text": "\n".join(lines)},
        {"title": "Chosen automatically", "text": "\n".join(chosen) or "nothing"},
    ]
    return _section("made", "How it was made", blocks=blocks)
