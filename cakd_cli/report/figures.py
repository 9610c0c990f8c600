"""Figures of the report as SVG: readable in light and dark, without colour, and by a screen reader.

Text and axes take the colour of the page. Lines differ in their dashes and marks as well as in colour; the colours are
those that people who cannot tell red from green can tell (Okabe and Ito, 2008).
"""

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C8C8C", "#A6761D", "#7570B3", "#66A61E")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "--", "-.", ":")
# Becomes the page's own colour of text.
_INK = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names are anybody's
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.color": _INK,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


@dataclass(frozen=True)
class Drawn:
    """A figure for the page.

    Attributes:
        title: What it shows, in a few words.
        svg: The picture.
        says: What is to be seen, for who cannot see it and for everybody else.
        headings: Of its numbers.
        rows: Its numbers.
    """

    title: str
    svg: str
    says: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@contextmanager
def _axes(width: float = 6.6, height: float = 3.4) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield figure, axes


def _svg(figure: Figure, name: str, title: str, says: str) -> str:
    """Write a figure as a piece of HTML, with names that no other figure on the page has."""
    name, buffer = f"figure-{name}", io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    width = 104 * figure.get_figwidth()  # in pixels, so that letters are as large as the page's
    labels = f'style="max-width: {width:.0f}px" role="img" aria-labelledby="{name}-title {name}-says"'
    described = (
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-says">{html.escape(says)}</desc>'
    )
    return re.sub(r"<svg([^>]*)>", lambda found: f"<svg{found[1]} {labels}>{described}", text, count=1)


def learning_curves(curves: Mapping[str, Sequence[float]]) -> Drawn | None:
    """Held-out top-1 after each epoch, by method; none where no method has two epochs."""
    shown = {name: values for name, values in curves.items() if len(values) > 1}
    if not shown:
        return None
    with _axes() as (figure, axes):
        _draw_by_epoch(figure, axes, shown)
        axes.set_ylabel("top-1 after each epoch")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        says = "Mean over seeds. " + "; ".join(f"{name} ends at {values[-1]:.1%}" for name, values in shown.items())
        title = "Learning curves"
        epochs = range(max(map(len, shown.values())))
        rows = [
            [str(i + 1), *(f"{100 * values[i]:.2f}" if i < len(values) else "" for values in shown.values())]
            for i in epochs
        ]
        return Drawn(title, _svg(figure, "curves", title, says), says, ["epoch", *shown], rows)


def loss_parts(parts: Mapping[str, Sequence[float]], method: str) -> Drawn | None:
    """The unweighted parts of a loss over the epochs of training; none where there is nothing to draw."""
    shown = {name: values for name, values in parts.items() if len(values) > 1}
    if not shown:
        return None
    with _axes() as (figure, axes):
        _draw_by_epoch(figure, axes, shown)
        axes.set_ylabel("part of the loss")  # not all of them are in nats
        if all(min(values) > 0 for values in shown.values()):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        title = f"Parts of the loss of {method}"
        says = "Before their weights, mean over seeds. " + "; ".join(
            f"{name} falls from {values[0]:.3g} to {values[-1]:.3g}"
            if values[-1] < values[0]
            else f"{name} goes from {values[0]:.3g} to {values[-1]:.3g}"
            for name, values in shown.items()
        )
        length = len(next(iter(shown.values())))
        rows = [[str(i + 1), *(f"{values[i]:.4g}" for values in shown.values())] for i in range(length)]
        return Drawn(title, _svg(figure, "parts", title, says), says, ["epoch", *shown], rows)


def _draw_by_epoch(figure: Figure, axes: Axes, lines: Mapping[str, Sequence[float]]) -> None:
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(range(1, len(values) + 1), values, label=_short(name), **_line(i, len(values)))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper")


def _line(number: int, points: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number // 2 % len(DASHES)],
        "marker": MARKS[number % len(MARKS)],
        "markersize": 4,
        "markevery": max(1, points // 10),
        "linewidth": 1.6,
    }


def reliability(bins: Mapping[str, Sequence[tuple[float, float, float]]]) -> Drawn:
    """How often answers of a confidence are right, by network."""
    with _axes(5.2, 4.0) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=_INK, alpha=0.4, linewidth=1, label="as sure as right")
        for i, (name, found) in enumerate(bins.items()):
            axes.plot([b[0] for b in found], [b[1] for b in found], label=_short(name), **_line(i, 1))
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="share that is right")
        axes.legend(loc="upper left")
        title = "Reliability"
        gaps = {name: sum(b[2] * abs(b[0] - b[1]) for b in found) for name, found in bins.items()}
        says = (
            "Answers sorted into ten bins by their confidence; below the diagonal a network is surer than it is right. "
            + "; ".join(f"{name}: {gap:.3f} from the diagonal on average" for name, gap in gaps.items())
        )
        rows = [
            [name, f"{confidence:.3f}", f"{accuracy:.3f}", f"{100 * share:.1f}"]
            for name, found in bins.items()
            for confidence, accuracy, share in found
        ]
        headings = ["network", "confidence", "share that is right", "% of images"]
        return Drawn(title, _svg(figure, "reliability", title, says), says, headings, rows)


def cost(points: Mapping[str, tuple[float, float]], unit: str, name: str, figure_name: str) -> Drawn:
    """Accuracy against what an image costs, by network; ``points`` are (cost, accuracy)."""
    with _axes(6.6, 3.2) as (figure, axes):
        for i, (network, (price, accuracy)) in enumerate(points.items()):
            mark: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)],
                "marker": MARKS[i % len(MARKS)],
                "linestyle": "none",
            }
            axes.plot([price], [accuracy], label=_short(network), markersize=8, **mark)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel(f"{unit} an image")
        axes.set_ylabel(f"test {figure_name}")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.margins(0.15)
        figure.legend(loc="outside right upper")
        title = f"Accuracy against {unit}"
        says = "; ".join(
            f"{network}: {accuracy:.1%} for {EngFormatter(places=1)(price)} {unit}"
            for network, (price, accuracy) in points.items()
        )
        rows = [[network, f"{price:.4g}", f"{100 * accuracy:.2f}"] for network, (price, accuracy) in points.items()]
        return Drawn(title, _svg(figure, name, title, says), says, ["network", unit, f"test {figure_name} %"], rows)


def left_to_learn(values: Mapping[str, Mapping[str, float]]) -> Drawn:
    """What of the teacher's answers each method has not learnt: bars of BCD, SCD and WCD."""
    names, kinds = list(values), ("bcd", "scd", "wcd")
    with _axes(6.6, 0.9 + 0.42 * len(names)) as (figure, axes):
        for i, kind in enumerate(kinds):
            places = [place + 0.26 * (i - 1) for place in range(len(names))]
            numbers = [values[name][kind] for name in names]
            hatch: dict[str, Any] = {"hatch": ("", "///", "...")[i], "edgecolor": _INK, "linewidth": 0.5}
            axes.barh(places, numbers, height=0.24, label=kind.upper(), color=COLOURS[i], **hatch)
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("nats at temperature 4")
        figure.legend(loc="outside right upper")
        title = "Not learnt yet of the teacher"
        says = (
            "BCD: the teacher's top classes against the rest; SCD: inside the top; WCD: inside the rest. Shorter is "
            "better. " + min(names, key=lambda name: values[name]["wcd"]) + " has the least WCD"
        )
        rows = [[name, *(f"{values[name][kind]:.4f}" for kind in kinds)] for name in names]
        return Drawn(title, _svg(figure, "left", title, says), says, ["method", "BCD", "SCD", "WCD"], rows)


def class_gaps(gaps: Sequence[tuple[str, float, float]]) -> Drawn:
    """Classes on which the student is furthest behind its teacher: (class, student's share, teacher's)."""
    with _axes(6.6, 0.8 + 0.27 * len(gaps)) as (figure, axes):
        places = range(len(gaps))
        for place, (_, student, teacher) in zip(places, gaps, strict=True):
            axes.plot([student, teacher], [place, place], color=_INK, alpha=0.35, linewidth=1.5)
        axes.plot([g[1] for g in gaps], places, "o", color=COLOURS[0], label="student", markersize=7)
        axes.plot([g[2] for g in gaps], places, "D", color=COLOURS[1], label="teacher", markersize=6, fillstyle="none")
        axes.set_yticks(places, [_short(gap[0]) for gap in gaps])
        axes.invert_yaxis()
        axes.set_xlabel("share of the class that is recognised")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        figure.legend(loc="outside right upper")
        title = "Classes on which the student is furthest behind"
        name, student, teacher = gaps[0]
        says = f"The largest gap: {name}, {student:.1%} beside the teacher's {teacher:.1%}"
        rows = [[name, f"{100 * s:.1f}", f"{100 * t:.1f}", f"{100 * (s - t):+.1f}"] for name, s, t in gaps]
        headings = ["class", "student %", "teacher %", "gap in points"]
        return Drawn(title, _svg(figure, "gaps", title, says), says, headings, rows)


def _short(name: str, most: int = 24) -> str:
    """Cut a long name; one that begins with _ would be left out of a legend."""
    name = name if len(name) <= most else name[: most - 1] + "…"
    return f" {name}" if name.startswith("_") else name


def correlation(difference: Any, names: Sequence[str], largest: Sequence[tuple[str, str, float, float]]) -> Drawn:
    """Where the student's correlation of two classes differs from the teacher's; ``largest`` are its extremes."""
    with _axes(5.6, 4.6) as (figure, axes):
        bound = max(0.01, float(abs(difference).max()))
        image = axes.imshow(difference, cmap="PuOr", vmin=-bound, vmax=bound, interpolation="nearest")
        axes.grid(visible=False)
        if len(names) <= 20:
            axes.set_xticks(range(len(names)), [_short(name, 12) for name in names], rotation=90)
            axes.set_yticks(range(len(names)), [_short(name, 12) for name in names])
        else:
            axes.set(xlabel="class", ylabel="class")
        figure.colorbar(image, ax=axes, label="student minus teacher")
        title = "Correlation of classes: student minus teacher"
        first, second, ours, theirs = largest[0]
        says = (
            "Orange: the student tells two classes apart more than the teacher does; violet: less. Furthest apart: "
            f"{first} and {second}, {ours:+.2f} beside the teacher's {theirs:+.2f}"
        )
        rows = [[a, b, f"{ours:+.3f}", f"{theirs:+.3f}"] for a, b, ours, theirs in largest]
        return Drawn(
            title, _svg(figure, "correlation", title, says), says, ["class", "class", "student", "teacher"], rows
        )
