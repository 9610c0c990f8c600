"""cakd predict."""

from collections.abc import Sequence
from pathlib import Path

from cakd_cli.console import Console
from cakd_cli.errors import InputError, UsageError
from cakd_cli.evaluation.classifier import Classifier, open_classifier
from cakd_cli.evaluation.pictures import Prediction, classify, find_pictures
from cakd_cli.report import tables

_TOP = 5


def run(run: str, images: Sequence[str], *, top: int | None, console: Console) -> None:
    """Say what each picture shows, the most probable classes first, then name what could not be used.

    Raises:
        UsageError: If more classes are wanted than the network knows.
        InputError: If the network cannot be used, or a picture; the other pictures are done first.
    """
    network = open_classifier(Path(run).expanduser())
    known = len(network.class_names)
    if top is not None and top > known:
        raise UsageError(f"--top is {top}, and {run} knows {known} classes", hint=f"--top {known}, or leave it out")
    paths, failed = find_pictures(images)
    asked = len(paths) + len(failed)
    done = _predict(network, paths, min(top or _TOP, known), console)
    failed |= {prediction.path: prediction.why for prediction in done if prediction.why}
    _note(network, done, console)
    report = {
        "run": run,
        "model": network.name,
        "several_labels": network.several_labels,
        "pictures": [{"path": each.path, "classes": each.classes} for each in done if not each.why],
        "failed": [{"path": path, "why": why} for path, why in failed.items()],
    }
    if failed:
        lines = (f"{path}: {why}" for path, why in failed.items())
        raise InputError(
            "\n  ".join([f"{len(failed):,} of {asked:,} could not be used:", *lines]),
            hint="replace or remove what is named",
            document=report,
        )
    console.result(report, lambda stdout: None)  # shown one by one


def _predict(network: Classifier, paths: Sequence[str], top: int, console: Console) -> list[Prediction]:
    """Ask about pictures, and show each answer to a person as soon as it is there."""
    width, done = max(map(len, paths), default=0), []
    for prediction in classify(network, paths, top=top):
        done.append(prediction)
        if prediction.classes and not console.json_mode:
            tables.show_prediction(console.stdout, prediction.path, prediction.classes, width)
    return done


def _note(network: Classifier, done: Sequence[Prediction], console: Console) -> None:
    fitted, several = (sum(getattr(each, name) for each in done) for name in ("fitted", "several_frames"))
    if fitted:
        height, width = network.input_size[1:]
        console.note(
            f"{fitted:,} of {len(done):,} pictures were not {width} x {height} pixels as what the network learnt from: "
            "resized, and their middle taken"
        )
    if several:
        console.note(f"{several:,} of {len(done):,} files hold several pictures: the first was taken")
