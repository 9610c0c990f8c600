"""A comparison as text: for a terminal of 80 columns, in Markdown and in LaTeX."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cakd_cli.report.comparison import headline_name, significance_note
from cakd_cli.report.tables import count

# Heading, and factor and digits of each figure.
FIGURES = {
    "map": ("mAP %", 100, 2),
    "top1": ("top-1 %", 100, 2),
    "top5": ("top-5 %", 100, 2),
    "nll": ("NLL", 1, 3),
    "ece": ("ECE", 1, 3),
    "agreement": ("agree %", 100, 1),
    "kl": ("KL", 1, 3),
    "bcd": ("BCD", 1, 3),
    "scd": ("SCD", 1, 3),
    "wcd": ("WCD", 1, 3),
}
# What the literature's tables hold: top-1 of the epoch that is best on the test images.
BEST_ON_TEST = "best on test %"
_BARS = " ▁▂▃▄▅▆▇█"


def label(group: Mapping[str, Any]) -> str:
    """Name a group for people."""
    name = str(group["name"])
    return name.replace("cross-entropy", "student alone", 1) if group["alone"] and "cross-entropy" in name else name


def figure(found: Mapping[str, Any] | None, key: str, *, joint: str = " ± ", deviation: bool = True) -> str:
    """Write mean and standard deviation in the figure's unit; empty if unknown."""
    if found is None:
        return ""
    _, factor, digits = FIGURES[key]
    text = f"{factor * found['mean']:.{digits}f}"
    return text + (f"{joint}{factor * found['sd']:.{digits}f}" if deviation and found["sd"] is not None else "")


def change(group: Mapping[str, Any]) -> str:
    """Write the difference to the baseline with its interval, in points; empty for the baseline."""
    found = group.get("difference")
    if not found or found["mean"] is None:
        return ""
    text = f"{100 * found['mean']:+.2f}"
    return text if found["low"] is None else f"{text} [{100 * found['low']:+.2f}, {100 * found['high']:+.2f}]"


def verdict(group: Mapping[str, Any]) -> str:
    """Write what a difference shows; empty for the baseline."""
    return str(group.get("difference", {}).get("verdict", "")).partition(":")[0]


def p_value(group: Mapping[str, Any]) -> str:
    """Write the corrected p; empty for the baseline."""
    return f"{group['difference']['p_holm']:.3f}" if "difference" in group else ""


def small_curve(values: Sequence[float], width: int = 10) -> str:
    """Draw values as a line of little bars, from the least to the largest."""
    if len(values) < 2:
        return ""
    picked = (
        [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)] if len(values) > width else values
    )
    low, high = min(picked), max(picked)
    return "".join(_BARS[1 + round((value - low) / ((high - low) or 1) * (len(_BARS) - 2))] for value in picked)


def show(stdout: Console, document: Mapping[str, Any]) -> None:
    """Print the comparison for a terminal, or the table of several recipes."""
    if "sets" in document:
        _show_sets(stdout, document)
        return
    key = document["headline"]
    stdout.print(f"{document['data']}, {document['samples']:,} test images", markup=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for name in ("n", FIGURES[key][0], "difference", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    more = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = [name for name in ("agreement", "ece", "nll", "kl", "bcd", "scd", "wcd") if _any(document, name)]
    best = _headings_of_literature(document)
    for name in ("", *best, *(FIGURES[name][0] for name in shown), "epochs"):
        more.add_column(name, justify="left" if name in ("", "epochs") else "right", overflow="fold")
    for group in document["groups"]:
        figures = group["figures"]
        table.add_row(
            Text(label(group)),
            str(len(group["seeds"])),
            figure(figures[key], key),
            change(group),
            p_value(group),
            verdict(group),
        )
        cells = _cells_of_literature(group, best, deviation=False)
        cells += [figure(figures.get(name), name, deviation=False) for name in shown]
        more.add_row(Text(label(group)), *cells, small_curve(group["curve"]))
    teacher = document["teacher"]
    if teacher:
        name = teacher["name"].partition(" of ")[0]
        table.add_row(Text(f"teacher {name}"), "1", f"{100 * teacher['quality'][key]:.2f}")
    stdout.print(table)
    stdout.print(more)
    for line in notes(document):
        stdout.print(line, markup=False, style="dim")


def _show_sets(stdout: Console, document: Mapping[str, Any]) -> None:
    headings, cells = _rows_of_sets(document, deviation=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(headings):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    stdout.print(table)
    for line in notes(document):
        stdout.print(line, markup=False, style="dim")


def _rows_of_sets(
    document: Mapping[str, Any], *, joint: str = " ± ", deviation: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Give headings and cells of methods by recipes: our figure, and what was published with the difference to it."""
    sets = document["sets"]
    groups = {name: {label(group): group for group in found["groups"]} for name, found in sets.items()}
    methods = dict.fromkeys(method for of_set in groups.values() for method in of_set)

    def cell(group: Mapping[str, Any] | None, key: str) -> str:
        if group is None:
            return ""
        best, published = group.get("best_on_test"), group.get("published")
        text = figure(best or group["figures"][key], "top1" if best else key, joint=joint, deviation=deviation)
        return f"{text} ({published:.2f}, {100 * best['mean'] - published:+.2f})" if best and published else text

    cells = [
        [method, *(cell(groups[name].get(method), found["headline"]) for name, found in sets.items())]
        for method in methods
    ]
    teachers = [found["teacher"] for found in sets.values()]
    if any(teachers):
        figures = (
            f"{100 * teacher['quality'][found['headline']]:.2f}" if teacher else ""
            for teacher, found in zip(teachers, sets.values(), strict=True)
        )
        cells.append(["teacher", *figures])
    return ["student", *sets], cells


def show_sweep(stdout: Console, document: Mapping[str, Any]) -> None:
    """Print how a sweep ended."""
    if "comparison" in document:
        show(stdout, document["comparison"])
    for failed in document["failed"]:
        stdout.print(f"{failed['run']}: exit {failed['exit']}: {failed['said']}", style="yellow", markup=False)
    stdout.print(f"\ncakd compare {shlex.quote(document['out'])} --markdown", markup=False)


def _has_best_on_test(document: Mapping[str, Any]) -> bool:
    return any(group.get("best_on_test") for group in document["groups"])


def _headings_of_literature(document: Mapping[str, Any]) -> list[str]:
    """Head the columns that only runs of the literature's protocol fill."""
    published = ["published", "to it"] if any(group.get("published") for group in document["groups"]) else []
    return [*([BEST_ON_TEST] if _has_best_on_test(document) else []), *published]


def _cells_of_literature(
    group: Mapping[str, Any], headings: Sequence[str], *, joint: str = " ± ", deviation: bool = True
) -> list[str]:
    best, published = group.get("best_on_test"), group.get("published")
    cells = {BEST_ON_TEST: figure(best, "top1", joint=joint, deviation=deviation)}
    if published:
        cells["published"] = f"{published:.2f}"
        cells["to it"] = f"{100 * best['mean'] - published:+.2f}" if best else ""
    return [cells.get(heading, "") for heading in headings]


def _any(document: Mapping[str, Any], name: str) -> bool:
    return any(name in group["figures"] for group in document["groups"])


def notes(document: Mapping[str, Any]) -> list[str]:
    """Say how to read the table, and what it cannot show."""
    if "sets" in document:
        return _notes_of_sets(document)
    lines = []
    if document["comparisons"]:
        against = next(label(group) for group in document["groups"] if group["name"] == document["against"])
        lines.append(
            f"± standard deviation over seeds; differences to {against} in points of "
            f"{headline_name(document['headline'])}, seed by seed, from six on with 95% intervals (BCa bootstrap); "
            "p by sign flips, after Holm's correction"
        )
    if any(group.get("difference", {}).get("low") is not None for group in document["groups"]):
        lines.append("intervals of few seeds are too narrow, 85% where they say 95% at six: verdicts go by p")
    lines += filter(None, [significance_note(document)])
    if _has_best_on_test(document):
        lines.append(
            "protocol literature: figures are of the last epoch; best on test is of the epoch that the test images "
            "themselves chose, as in the literature's tables, and higher for it"
        )
    if any(group.get("published") for group in document["groups"]):
        lines.append(
            "published: the paper's own best on test (recipes/published.yaml); to it: our best on test less that"
        )
    networks = document["networks"]
    if networks:
        lines.append(
            f"two networks, not two methods: {networks['only_first']} images only {networks['names'][0]} gets right, "
            f"{networks['only_second']} only {networks['names'][1]}, McNemar p {networks['p']:.3g}"
        )
    for name, values in document["different"].items():
        lines.append(f"not alike: {name} ({' or '.join(values)})")
    sizes = {group["model"]: (group["parameters"], group["flops_per_image"]) for group in document["groups"]}
    for model, (parameters, flops) in sizes.items():
        times = [group["latency_ms"] for group in document["groups"] if group["model"] == model and group["latency_ms"]]
        latency = min(times, default=None)
        timed = f", {latency:.2f} ms an image here" if latency else ""
        lines.append(f"{model}: {parameters:,} parameters, {count(flops)}FLOP an image{timed}")
    if document["teacher"]:
        cost = document["teacher"]["cost"]
        size = f"{cost['parameters']:,} parameters, {count(cost['flops_per_image'])}FLOP an image"
        lines.append(f"teacher: {size if cost['parameters'] else 'unknown parameters and FLOP'}")
    return lines


def _notes_of_sets(document: Mapping[str, Any]) -> list[str]:
    groups = [group for found in document["sets"].values() for group in found["groups"]]
    counts = sorted({len(group["seeds"]) for group in groups})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    lines = [f"test top-1 in percent, mean over seeds, n {seeds}"]
    if any(group.get("best_on_test") for group in groups):
        lines[0] += "; students' of the epoch that the test images themselves chose, as in the literature's tables"
    if any(group.get("published") for group in groups):
        lines.append("in brackets: what the paper published, and our figure less that")
    return [*lines, "each recipe by itself, with intervals and verdicts: cakd compare FOLDER/RECIPE"]


def rows(document: Mapping[str, Any], joint: str) -> tuple[list[str], list[list[str]]]:
    """Give headings and cells of one wide table."""
    if "sets" in document:
        return _rows_of_sets(document, joint=joint)
    shown = [name for name in FIGURES if _any(document, name)]
    against = next(label(group) for group in document["groups"] if group["name"] == document["against"])
    key = document["headline"]
    shown = [key, *(name for name in shown if name != key)]
    decisive = [f"vs {against} [95%]", "p (Holm)", "verdict"]
    best = _headings_of_literature(document)
    headings = ["student", "n", FIGURES[key][0], *decisive, *best, *(FIGURES[name][0] for name in shown[1:])]
    cells = [
        [
            label(group),
            str(len(group["seeds"])),
            figure(group["figures"].get(key), key, joint=joint),
            change(group),
            p_value(group),
            str(group.get("difference", {}).get("verdict", "")),
            *_cells_of_literature(group, best, joint=joint),
            *(figure(group["figures"].get(name), name, joint=joint) for name in shown[1:]),
        ]
        for group in document["groups"]
    ]
    return headings, cells


def markdown(document: Mapping[str, Any]) -> str:
    """Write the comparison as a table of Markdown."""
    headings, cells = rows(document, " ± ")
    lines = [headings, ["---"] * len(headings), *([part.replace("|", "\\|") for part in row] for row in cells)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return table + "\n\n" + "\n".join(f"- {line}" for line in notes(document)) + "\n"


_SPECIAL = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$", "{": r"\{", "}": r"\}"}
_SPECIAL |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}


def latex(document: Mapping[str, Any]) -> str:
    """Write the comparison as a table of LaTeX, which needs the package booktabs."""
    headings, cells = rows(document, " @PM@ ")

    def line(parts: Sequence[str]) -> str:
        plain = ("".join(_SPECIAL.get(letter, letter) for letter in part) for part in parts)
        return " & ".join(plain).replace("@PM@", r"$\pm$").replace("±", r"$\pm$") + r" \\"

    body = "\n".join(map(line, cells))
    comments = "\n".join(f"% {text}" for text in notes(document))
    columns = "l" + "r" * (len(headings) - 1) if "sets" in document else "lrrrrl" + "r" * (len(headings) - 6)
    return (
        f"{comments}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(headings)}\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )
