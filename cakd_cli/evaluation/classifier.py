"""A trained network that says what a picture shows, from wherever it was left.

Shape suffixes: B batch, C classes, H and W height and width.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cakd_cli.errors import InputError, RecipeError, first_line
from cakd_cli.evaluation.measure import check_finite
from cakd_cli.machine.hardware import Hardware, choose_hardware
from cakd_cli.models import saving
from cakd_cli.models.normalisation import Normalisation

_EXPORT = "cakd export RUN --format onnx writes a file that cakd reads"


class Classifier(NamedTuple):
    """What can be asked about pictures.

    Attributes:
        name: What a person calls it.
        class_names: One name a class, in the order of the answers.
        input_size: Channels, height and width of an image, in pixels.
        resize: Pixels of the shorter side before the middle is cropped; none if images are taken as they are.
        several_labels: Whether each class is decided by itself, so that probabilities do not sum to one.
        answer: From uint8 images (batch, channels, height, width) on the CPU to float64 probabilities (batch, classes).
    """

    name: str
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    resize: int | None
    several_labels: bool
    answer: Callable[[Tensor], Tensor]


def open_classifier(path: Path) -> Classifier:
    """Open a run directory, an exported folder, or an ONNX file that cakd wrote.

    Raises:
        InputError: If it is missing, unfinished, damaged or something else.
        RecipeError: If onnxruntime is needed and not installed.
    """
    if path.suffix == ".onnx":
        return _of_onnx(path)
    if path.is_file():
        raise InputError(f"{path} is neither the folder of a run nor an .onnx file", hint=_EXPORT)
    return _of_folder(path)


def _of_folder(path: Path) -> Classifier:
    saved = saving.read(path)
    machine = choose_hardware("auto", "fp32")
    shown = saved.preprocessing
    normalise = Normalisation(shown.mean, shown.std, machine)
    model = machine.place(saved.model).eval()

    @torch.inference_mode()
    def answer(images: Tensor) -> Tensor:
        logits_BC = model(normalise(images.to(machine.device))).float().cpu()
        return _probabilities(logits_BC, several_labels=saved.several_labels, source=str(path))

    return Classifier(saved.spec.label, saved.class_names, shown.input_size, shown.resize, saved.several_labels, answer)


def _probabilities(logits_BC: Tensor, *, several_labels: bool, source: str) -> Tensor:
    """In float64, in which near logits of a sure network do not tie."""
    check_finite(logits_BC, source)
    return logits_BC.double().sigmoid() if several_labels else logits_BC.double().softmax(1)


def _of_onnx(path: Path) -> Classifier:
    session = _session(path)
    told = session.get_modelmeta().custom_metadata_map
    if not told.get("producer", "").startswith("cakd "):
        raise InputError(f"{path}: not written by cakd, so it does not say what is done to a picture", hint=_EXPORT)
    (taken,) = session.get_inputs()
    output = session.get_outputs()[0].name
    try:
        shown, names = json.loads(told["preprocessing"]), json.loads(told["class_names"])
        several_labels = told.get("probabilities") == "sigmoid"
        height, width = shown["centre_crop"] if "resize" in shown else shown["size"]
        channels = taken.shape[3] if taken.type == "tensor(uint8)" else taken.shape[1]
        prepare = _prepare(shown, pixels=taken.type == "tensor(uint8)")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path}: its metadata are not what cakd writes: {first_line(error)}", hint=_EXPORT) from error

    def answer(images: Tensor) -> Tensor:
        answers_BC = torch.from_numpy(session.run([output], {taken.name: prepare(images).numpy()})[0])
        if output == "logits":
            return _probabilities(answers_BC, several_labels=several_labels, source=str(path))
        check_finite(answers_BC, str(path))
        return answers_BC.double()

    return Classifier(path.name, tuple(names), (channels, height, width), shown.get("resize"), several_labels, answer)


def _prepare(shown: dict[str, Any], *, pixels: bool) -> Callable[[Tensor], Tensor]:
    """Turn uint8 images into what the file takes."""
    if pixels:
        return lambda images: images.permute(0, 2, 3, 1).contiguous()
    return Normalisation(shown["mean"], shown["std"], Hardware(torch.device("cpu"), "fp32", channels_last=False))


def _session(path: Path) -> Any:
    """Open an ONNX file.

    Raises:
        InputError: If it is missing or damaged.
        RecipeError: If onnxruntime is not installed.
    """
    if not path.is_file():
        raise InputError(f"no such ONNX file: {path}", hint=_EXPORT)
    try:
        import onnxruntime
    except ImportError as error:
        raise RecipeError(f"{path} needs onnxruntime", hint="pip install 'cakd[export]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors, which it raises as well
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # Of no common kind in onnxruntime.
        raise InputError(f"{path}: not an ONNX file that onnxruntime can run: {first_line(error)}") from error
