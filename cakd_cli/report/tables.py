"""Tables for a terminal of 80 columns."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text


def show_catalogue(stdout: Console, rows: Sequence[Mapping[str, str]]) -> None:
    """Print names and what they are."""
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        line = Text(_hanging(stdout, f"{row['name'].ljust(width)}  {row['summary']}", width + 2), style="default")
        line.stylize("bold", 0, width)
        stdout.print(line)


def show_models(stdout: Console, rows: Sequence[Mapping[str, Any]], classes: int) -> None:
    """Print networks with what they cost; what several in a row are is said once."""
    width = max(len(row["name"]) for row in rows)
    before = ""
    for row in rows:
        sized = "parameters" in row
        cost = f"{count(row['parameters']):>8} {count(row['flops_per_image']):>8}FLOP" if sized else " " * 21
        summary = "" if row["summary"] == before else row["summary"]
        side = row["image"][-1] if sized else _SIDE
        before, other = row["summary"], "" if side == _SIDE else f" (FLOPs at {side} px)"
        head = f"{row['name'].ljust(width)}  {cost}  "
        line = Text(_hanging(stdout, f"{head}{summary}{other}".rstrip(), len(head)), style="default")
        line.stylize("bold", 0, width)
        stdout.print(line)
    stdout.print(
        f"\nparameters, and FLOPs of one image of {_SIDE} px (2 per multiply-add), with {classes} classes\n"
        "those of torchvision's and timm's networks: cakd train-teacher --model NAME --data DATA --dry-run",
        markup=False,
    )


# Pixels of the images of most figures that are listed.
_SIDE = 32


def _hanging(stdout: Console, text: str, indent: int) -> str:
    """Break a line for a person, and leave it whole for a file or a pipe."""
    if stdout.soft_wrap:
        return text
    return textwrap.fill(
        text, stdout.width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def show_loss(stdout: Console, loss: Mapping[str, Any]) -> None:
    """Print a method: what it stands for, its terms with every setting, and what was published."""

    def say(text: str, *, indent: int = 0) -> None:
        line = _hanging(stdout, " " * indent + text, indent + 4)
        stdout.print(line, markup=False, highlight=False)

    say(f"{loss['name']}  {loss['summary']}")
    if loss["objective"]:
        say("")
        say(f"--loss {loss['name']} stands for")
    for entry in loss["objective"]:
        say(_settings(entry), indent=2)
    for term in loss["terms"]:
        say("")
        say(f"{term['type']} = {term['formula']}")
        if term["paper"]:
            say(term["paper"], indent=2)
        for setting in term["settings"]:
            default = "none" if setting["default"] is None else _setting(setting["default"])
            say(f"{setting['name']}: {default}  ({setting['range']})", indent=2)
            say(setting["meaning"], indent=6)
    if loss["published"]:
        say("")
        say("published; what a pair's row does not say is in that of *")
    for row in loss["published"]:
        settings = row["settings"]
        entries = [settings] if isinstance(settings, Mapping) else settings
        say(f"{row['pair']}: {' + '.join(map(_settings, entries))}", indent=2)


def _settings(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {_setting(value)}" for key, value in entry.items())


def show_memories(stdout: Console, rows: Sequence[Mapping[str, Any]], folder: str) -> None:
    """Print the teacher memories of this machine."""
    if not rows:
        stdout.print(f"no teacher memory in {folder}", markup=False)
        return
    for row in rows:
        if "error" in row:
            stdout.print(f"{row['key']}  {row['error']}", markup=False)
            continue
        known = f"{row['known'] / row['rows']:.0%} of {row['rows']:,} answers"
        stdout.print(
            f"{row['key']}  {known}, {decimal(row['bytes'])} on disk\n"
            f"  {row['says']} of {row['teacher']}, {row['computed']}, kept in {row['stored']}\n"
            f"  about {row['data']}, {row['views_per_image']} views an image",
            markup=False,
        )


def show_bench(stdout: Console, report: Mapping[str, Any]) -> None:
    """Print rates, ratios to the plain loop, shares of the time and memory."""
    image = " x ".join(map(str, report["image"]))
    stdout.print(
        f"{report['teacher']} -> {report['student']}, batch {report['batch_size']}, {image}, "
        f"{report['engine']['precision']}, {report['device']}, torch {report['versions']['torch']}",
        markup=False,
    )
    table = Table(box=SIMPLE_HEAD)
    against = bool(report["ratio_spread"])
    for name in ("", "images/s", *(["to plain"] if against else []), "of peak", "peak memory"):
        table.add_column(name, justify="right" if name else "left")
    for name, rate in report["images_per_second"].items():
        spread = report["ratio_spread"].get(name)
        table.add_row(
            {"live": "teacher live", "memory_warm": "memory warm"}.get(name, name),
            f"{rate['median']:,.0f}",
            *(
                [f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})" if spread else ""]
                if against
                else []
            ),
            f"{report['share_of_peak'][name]:.0%}" if name in report["share_of_peak"] else "",
            _peak(report["peak_memory_bytes"][name]),
        )
    stdout.print(table)
    for name, shares in report["time"].items():
        parts = ", ".join(f"{part} {share:.1%}" for part, share in sorted(shares.items(), key=lambda item: -item[1]))
        stdout.print(f"{name.replace('_', ' ')}: {parts}", markup=False)
    flops = report["flops_per_image"]
    stdout.print(
        f"an image: student forward {count(flops['student'])}FLOP, teacher {count(flops['teacher'])}FLOP "
        f"(2 per multiply-add); peak: {count(report['peak_flops_per_second'])}FLOP/s by a matrix product\n"
        f"medians of {report['rounds']} rounds{', least to most in brackets' if against else ''}; data loading counts"
        f"{'; plain is float32' if against else ''}\n"
        "peak memory is the main process's, without answers on disk",
        markup=False,
    )


def _peak(peaks: Mapping[str, int]) -> str:
    return decimal(peaks.get("device", peaks["resident"])) if peaks else "?"


def show_check(stdout: Console, report: Mapping[str, Any]) -> None:
    """Print what a data set has, what is wrong with it and which settings suit it."""

    def say(key: str, text: str, *, indent: int = 11) -> None:
        stdout.print(_hanging(stdout, f"{key:<{indent}}{text}", indent + 2 * (not key)), markup=False)

    parts = ", ".join(f"{count:,} {_PARTS[part]}" for part, count in report["splits"].items())
    training = sorted((counts["train"], name) for name, counts in report["classes"].items())
    (least, fewest), (most, largest) = training[0], training[-1]
    ratio = f", {most / least:.1f} to 1" if least else ""
    say("images", parts)
    spread = f"{least:,} of {fewest} to {most:,} of {largest}{ratio}" if most else "without labels"
    say("classes", f"{len(training):,}; training images {spread}")
    pictures = report["pictures"]
    if pictures:
        say("pictures", "; ".join(f"{name} {_range(pictures[name])}" for name in ("width", "height", "aspect")))
        kinds = [pictures[key] for key in ("formats", "modes") if key in pictures]
        if kinds:
            say("files", "; ".join(", ".join(f"{kind} {count:,}" for kind, count in of.items()) for of in kinds))
    say("looked at", f"in {report['seconds']:.1f} s, {report['images_per_second']:,.0f} images/s")
    for line in report["notes"]:
        say("note", line)
    for key, findings in (("to mend", report["must_mend"]), ("warning", report["warnings"])):
        for finding in findings:
            say(key, finding["says"])
            for case in finding["cases"][:_CASES]:
                more = [f"{len(case) - _ALIKE:,} more"] if len(case) > _ALIKE else []
                say("", " = ".join([*case[:_ALIKE], *more]))
            if len(finding["cases"]) > _CASES:
                say("", f"and {len(finding['cases']) - _CASES:,} more: --json")
    for suggestion in report["suggestions"]:
        say("suggested", f"{suggestion['setting']}: {suggestion['why']}")
    count = len(report["warnings"])
    warned = f", with {count} warning{'s' * (count > 1)}" if count else ""
    say("verdict", f"ready{warned}" if report["ready"] else f"not ready: mend what is named above{warned}")


_PARTS = {"train": "train", "validation": "held out", "test": "test"}
# Of each finding that are printed, and names of each.
_CASES, _ALIKE = 5, 3


def _range(figures: Sequence[float]) -> str:
    least, median, most = (f"{figure:.4g}" for figure in figures)
    return least if least == most else f"{least} to {most}, median {median}"


def show_plan(stdout: Console, plan: Mapping[str, Any]) -> None:
    """Print what a run would do."""
    data, teacher, distils = plan["data"], plan["teacher"], plan["command"] == "distill"
    lines = {
        "data": f"{data['name']}: {data['train']:,} train, {data['validation']:,} held out, {data['test']:,} test, "
        f"{data['classes']} classes, {' x '.join(map(str, data['image']))}{_reason(plan, 'data.image_size')}",
        "student" if distils else "network": _network(plan["student"]),
        "teacher": _network(teacher) if teacher else "none" * distils,
        "loss": " + ".join(_term(term) for term in plan["loss"]),
        "steps": f"{plan['epochs']} epochs x {plan['steps_per_epoch']} = {plan['steps']:,}",
        "time": _time(plan),
        "memory": f"about {plan['training_memory_bytes'] / 2**20:,.0f} MiB for "
        f"{'the student' if distils else 'the network'}'s training step",
        "device": f"{plan['device']}{_reason(plan, 'engine.device')}",
        "precision": f"{plan['precision']}{_reason(plan, 'engine.precision')}",
        "answers": f"{plan['teacher_memory']}{_reason(plan, 'engine.teacher_memory')}" if teacher else "",
        "download": "; ".join(plan["to_fetch"]),
        "out": plan["out"],
    }
    for key, value in lines.items():
        if value:
            stdout.print(_hanging(stdout, f"{key:<10}{value}", 10), markup=False)
    for line in plan["worth_knowing"]:
        stdout.print(_hanging(stdout, f"{'note':<10}{line}", 10), markup=False)
    for line in plan["warnings"]:
        stdout.print(_hanging(stdout, f"warning: {line}", 10), style="yellow", markup=False)


def _time(plan: Mapping[str, Any]) -> str:
    seconds, epochs = plan["seconds"], plan["epochs"]
    if seconds is None:
        return f"not measured {'before the download' if plan['to_fetch'] else 'with several processes'}"
    first, later = _duration(seconds["first_epoch"]), _duration(seconds["later_epochs"])
    parts = (
        f"{epochs} epoch{'s' * (epochs > 1)} x {first}"
        if first == later
        else f"the first epoch {first}, each later {later}"
    )
    steps = f"{seconds['steps']} step{'s' * (seconds['steps'] > 1)}"
    return f"about {_duration(seconds['total'])} ({parts}), measured over {steps}, nothing compiled; without validation"


def _duration(seconds: float) -> str:
    """Write a time as people say it: 0.4 s, 24 s, 12 min, 3.5 h, 2.1 days."""
    for unit, size, least in (("days", 86_400, 2 * 86_400), ("h", 3_600, 2 * 3_600), ("min", 60, 120)):
        if seconds >= least:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.2g} s"


def _network(size: Mapping[str, Any]) -> str:
    begin = f"{size['name']}, {size['starts_from']}"
    if not size["parameters"]:
        return f"{begin}: unknown parameters and FLOP"
    flops = count(size["flops_per_image"])
    return f"{begin}: {size['parameters']:,} parameters, {flops}FLOP an image (2 per multiply-add)"


def _reason(plan: Mapping[str, Any], key: str) -> str:
    return f" (auto: {plan['chosen'][key]})" if key in plan["chosen"] else ""


def _term(term: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in term.items() if key not in ("type", "weight")}
    settings = ", ".join(f"{key} {_setting(value)}" for key, value in rest.items())
    return f"{_setting(term['weight'])} {term['type']} ({settings})"


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_setting(part)}" for key, part in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_setting(part) for part in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def count(number: float) -> str:
    """Write a large number with a prefix: 81.6 M."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {prefix}"
    return f"{number:.0f} "


# Letters of a path that a line has room for beside the answers.
_PATH_WIDTH = 32


def show_prediction(stdout: Console, path: str, classes: Sequence[Mapping[str, Any]], width: int) -> None:
    """Print what one picture shows, below and beside others whose longest path has ``width`` letters."""
    width = min(width, _PATH_WIDTH)
    answers = ", ".join(f"{found['name']} {found['probability']:.1%}" for found in classes)
    stdout.print(_hanging(stdout, f"{path:<{width}}  {answers}", min(width, 8) + 2), markup=False)


def show_evaluation(stdout: Console, report: Mapping[str, Any]) -> None:
    """Print a network's figures, beside its teacher's where there is one."""
    teacher = report.get("teacher")
    table = Table(box=SIMPLE_HEAD, title=f"{report['data']}, {report['samples']:,} {report['split']} images")
    table.add_column("")
    table.add_column(report["model"], justify="right")
    if teacher:
        # Without the folders that runs of cakd are in.
        networks = " and ".join(name.partition(" of ")[0] for name in teacher["name"].split(" and "))
        table.add_column(f"{networks} (teacher)", justify="right")
    for label, key, style in (
        ("mAP", "map", "{:.2%}"),
        ("top-1", "top1", "{:.2%}"),
        ("top-5", "top5", "{:.2%}"),
        ("NLL (nats)", "nll", "{:.4f}"),
        ("ECE", "ece", "{:.4f}"),
    ):
        values = [source["quality"][key] for source in (report, teacher) if source and key in source["quality"]]
        if not values:
            continue
        table.add_row(label, *(style.format(value) for value in values))
    costs = [source["cost"] for source in (report, teacher) if source]
    table.add_row("parameters", *(f"{value['parameters']:,}" if value["parameters"] else "unknown" for value in costs))
    flops = (count(value["flops_per_image"]) if value["parameters"] else "unknown" for value in costs)
    table.add_row("FLOP an image", *flops)
    stdout.print(table)
    if "ece" in report["quality"]:
        stdout.print(_hanging(stdout, _ECE, 5), markup=False)
    for timing in report["cost"].get("latency", ()):
        low, high = timing["quartiles_ms"]
        stdout.print(
            f"batch {timing['batch_size']:>2}: {timing['median_ms']:.2f} ms (quartiles {low:.2f} to {high:.2f}, "
            f"n {timing['n']}) on {report['cost']['device']}",
            markup=False,
        )
    if "probe" in report:
        stdout.print(_probe(report["probe"]), markup=False)
    if teacher:
        stdout.print(_fidelity(teacher["fidelity"]), markup=False)
    worst = sorted((share, name) for name, share in report["per_class"].items() if share is not None)[:5]
    stdout.print(
        "\nleast recognised classes: " + ", ".join(f"{name} {share:.1%}" for share, name in worst), markup=False
    )


_ECE = "ECE: expected calibration error, how far confidence is from accuracy, on average (0 is best)"


def _fidelity(values: Mapping[str, float]) -> str:
    return (
        f"\nagreement with the teacher {values['agreement']:.2%}\n"
        f"not learnt yet: KL {values['kl']:.4f} nats at temperature 4, made of\n"
        f"  BCD {values['bcd']:.4f}  strong classes against weak (strong = the teacher's top, "
        f"{values['strong_mass']:.0%} of its probability)\n"
        f"  SCD {values['scd']:.4f}  inside the strong classes\n"
        f"  WCD {values['wcd']:.4f}  inside the weak classes"
    )


def _probe(found: Mapping[str, Any]) -> str:
    return (
        f"linear probe on {found['data']}: top-1 {found['top1']:.2%} of {found['test']:,} test images, "
        f"{found['classes']} classes from {found['features']} features and {found['train']:,} training images"
    )


def comparison(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Make one table of several networks; each figure is [mean, standard deviation], blank where unknown."""
    table = Table(box=SIMPLE_HEAD, title=title, padding=(0, 1, 0, 0))
    table.add_column("")
    columns = {"top1": "top-1 %", "agreement": "agree %", "ece": "ECE", "bcd": "BCD", "scd": "SCD", "wcd": "WCD"}
    for column in (*columns.values(), "parameters"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [_spread(row.get(key), percent=key in ("top1", "agreement")) for key in columns]
        table.add_row(row["name"], *cells, f"{row['parameters']:,}")
    return table


def _spread(figure: Sequence[float | None] | None, *, percent: bool) -> str:
    if figure is None:
        return ""
    scale, style = (100, "{:.1f}") if percent else (1, "{:.3f}")
    mean, deviation = figure
    assert mean is not None
    # The deviation of small figures would not fit 80 columns; it is in the JSON.
    spread = f"±{style.format(scale * deviation)}" if percent and deviation is not None else ""
    return style.format(scale * mean) + spread
