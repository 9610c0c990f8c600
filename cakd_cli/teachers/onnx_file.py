"""An ONNX file that answers, run by onnxruntime on the CPU.

It shows no layers and gives no gradients: only what it answers can be learnt.

Shape suffixes: N images, C classes.
"""

import hashlib
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from cakd_cli.data import ImageDataSet
from cakd_cli.errors import InputError, RecipeError, first_line
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.options import mistakes
from cakd_cli.teachers.network import Found, TeacherSpec

# onnxruntime's words for what an input may hold.
_KINDS: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}
# Images on which its answers are looked at, and how far the sum of probabilities may be from one.
_SHOWN = 8
_SLACK = 1e-3
# Probabilities that float32 takes for zero have a logarithm all the same.
_SMALLEST = torch.finfo(torch.float32).tiny


class _Input(NamedTuple):
    """What a file takes: sizes that it leaves open are none."""

    name: str
    kind: type[np.generic]
    channels_last: bool
    batch: int | None
    channels: int | None
    height: int | None
    width: int | None


class OnnxTeacher(TeacherSpec):
    """An ONNX file of one input and logits: onnx:FILE, or any path that ends in .onnx."""

    shorthand: ClassVar[str | None] = "path"

    type: Literal["onnx"] = "onnx"
    path: str = Field(min_length=1, description="ONNX file")
    mean: tuple[float, ...] = Field(
        (), strict=False, description="of each channel, for pixels in [0, 1]; none = as the file says, else the data's"
    )
    std: tuple[float, ...] = Field((), strict=False, description="likewise")
    probabilities: bool = Field(False, description="whether it answers with probabilities; their logarithm is taken")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.mean) != len(self.std):
            wrong = f"has {len(self.std)} numbers, and mean has {len(self.mean)}; give both, one a channel"
            raise mistakes([(("std",), wrong)], self)
        if not all(map(math.isfinite, self.mean)) or any(not 0 < value < math.inf for value in self.std):
            raise mistakes([(("std",), "must be above 0, and mean finite")], self)
        return self

    @property
    def label(self) -> str:
        return f"onnx:{self.path}"

    def find(self, data: ImageDataSet, hardware: Hardware, *, fetch: bool) -> Found:
        path = Path(self.path).expanduser()
        session, sha256 = _opened(path)
        told = _metadata(session, path)
        taken, output = _input(session, self.label), _output(session, self.label)
        shape = tuple(own or given for own, given in zip(taken[-3:], data.input.shape, strict=True))
        model = OnnxNetwork(session, taken, output, sha256, probabilities=self.probabilities)
        mean, std = self._normalisation(taken, told, data)
        found = Found(
            model=model,
            mean=mean,
            std=std,
            name=self.label,
            architecture=json.dumps(
                ["onnx", sha256, self.probabilities, f"onnxruntime {importlib.metadata.version('onnxruntime')}"]
            ),
            class_names=told.get("class_names"),
            input_size=(shape[0], shape[1], shape[2]),
        )
        if shape[0] == data.input.shape[0]:
            self._check_answers(found, data)
        return found

    def _normalisation(
        self, taken: _Input, told: dict[str, Any], data: ImageDataSet
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        channels = taken.channels or data.input.shape[0]
        if taken.kind is np.uint8:
            if self.mean:
                raise RecipeError(
                    f"{self.label} takes pixels of 0 to 255, which it normalises itself",
                    hint="leave out teacher.mean and teacher.std",
                )
            return (0.0,) * channels, (1 / 255,) * channels
        mean, std = (self.mean, self.std) if self.mean else (told.get("mean", data.mean), told.get("std", data.std))
        if self.mean and len(mean) != channels:
            raise RecipeError(f"teacher.mean has {len(mean)} numbers, and {self.label} takes {channels} channels")
        return mean, std

    def _check_answers(self, found: Found, data: ImageDataSet) -> None:
        """Show it a few of the data's images: whether they are probabilities must be as the recipe says."""
        cpu = torch.device("cpu")
        normalise = Normalisation(found.mean, found.std, Hardware(cpu, "fp32", channels_last=False))
        few = data.train.subset(torch.arange(min(_SHOWN, len(data.train))))
        (batch,) = few.ordered_batches(batch_size=_SHOWN, device=cpu)
        images = normalise(batch.images)
        assert found.input_size is not None
        if images.shape[1:] != found.input_size:
            images = functional.interpolate(images, found.input_size[1:], mode="bilinear", antialias=True)
        assert isinstance(found.model, OnnxNetwork)
        try:
            answers_NC = found.model.answers(images)
        except Exception as error:
            raise RecipeError(f"{self.label} cannot take the images of {data.name}: {_said(error)}") from error
        if answers_NC.ndim != 2 or len(answers_NC) != len(images):
            shape = " x ".join(map(str, answers_NC.shape))
            raise RecipeError(
                f"{self.label} answers {len(images)} images with {shape} numbers, not a logit for each class"
            )
        looks_so = are_probabilities(answers_NC)
        if looks_so and not self.probabilities:
            raise RecipeError(
                f"{self.label} answers with probabilities: of {len(images)} images they are in [0, 1] and sum to one",
                hint="teacher.probabilities=true takes their logarithm",
            )
        if _are_shares(answers_NC) and not looks_so:
            raise RecipeError(
                f"{self.label} answers {len(images)} images with numbers in [0, 1] that do not sum to one, "
                "as those of a sigmoid",
                hint="export it again without it: cakd needs logits, or probabilities of one label an image",
            )
        if self.probabilities and not looks_so:
            raise RecipeError(
                f"teacher.probabilities is true, but {self.label} answers {len(images)} images with numbers that are "
                "not in [0, 1] or do not sum to one",
                hint="leave it out: these are logits",
            )


class OnnxNetwork(nn.Module):
    """An ONNX file as a module, without parameters; its file's sha256 is all of its state.

    Args:
        session: Of onnxruntime.
        taken: The file's only input.
        output: Name of the output that is meant.
        sha256: Of the file, and of those that hold its weights.
        probabilities: Whether it answers with probabilities, whose logarithm is taken.
    """

    def __init__(self, session: Any, taken: _Input, output: str, sha256: str, *, probabilities: bool) -> None:
        super().__init__()
        self._session, self._taken, self._output = session, taken, output
        self._probabilities = probabilities
        self.register_buffer("sha256", torch.tensor([*bytes.fromhex(sha256)], dtype=torch.uint8))

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images, on any device, to float32 logits (batch, classes) on the same."""
        answers = self.answers(images.detach().float().cpu())
        if self._probabilities:
            answers = answers.clamp(min=_SMALLEST).log()
        return answers.to(images.device)

    def answers(self, images: Tensor) -> Tensor:
        """Map normalised images on the CPU to what the file itself answers, in float32."""
        array = images.contiguous().numpy()
        if self._taken.kind is np.uint8:
            array = array.round().clip(0, 255)
        if self._taken.channels_last:
            array = array.transpose(0, 2, 3, 1)
        array = array.astype(self._taken.kind)
        size = self._taken.batch or len(array)
        parts = [self._ask(array[start : start + size], size) for start in range(0, len(array), size)]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))

    def _ask(self, part: NDArray[Any], size: int) -> NDArray[Any]:
        missing = size - len(part)
        if missing:  # a file of a fixed batch takes no smaller one
            part = np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)])
        (answers,) = self._session.run([self._output], {self._taken.name: part})
        return np.asarray(answers)[: size - missing]


def _opened(path: Path) -> tuple[Any, str]:
    """Open a file, and hash it with the files that hold its weights.

    Raises:
        RecipeError: If onnxruntime is not installed.
        InputError: If the file is missing or damaged.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise RecipeError(f"a teacher in an ONNX file needs {error.name}", hint="pip install 'cakd[export]'") from error
    if not path.is_file():
        raise InputError(f"no such ONNX file: {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors, which it raises as well
    try:
        content = path.read_bytes()
        digest = hashlib.sha256(content)
        graph = onnx.load_from_string(content).graph
        for name in _files_of_weights(graph, onnx.TensorProto.EXTERNAL):
            digest.update((path.parent / name).read_bytes())
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise InputError(f"{path}: cannot read {error.filename}: {error.strerror}") from error
    except Exception as error:
        # Of no common kind in the two libraries.
        raise InputError(f"{path}: not an ONNX file that onnxruntime can run: {_said(error)}") from error
    return session, digest.hexdigest()


def _files_of_weights(graph: Any, external: int) -> list[str]:
    """Name the files beside an ONNX file in which it keeps its weights."""
    places = [
        place for tensor in graph.initializer if tensor.data_location == external for place in tensor.external_data
    ]
    return sorted({str(place.value) for place in places if place.key == "location"})


def _metadata(session: Any, path: Path) -> dict[str, Any]:
    """Read what cakd's own exports say of themselves; empty of any other file.

    Raises:
        InputError: If it is damaged.
    """
    written = session.get_modelmeta().custom_metadata_map
    if not str(written.get("producer", "")).startswith("cakd "):
        return {}
    try:
        shown = json.loads(written["preprocessing"])
        # A file that takes pixels does the rest itself.
        keys = () if "uint8" in shown.get("layout", "") else ("mean", "std")
        told: dict[str, Any] = {key: tuple(map(float, shown[key])) for key in keys}
        return {**told, "class_names": tuple(map(str, json.loads(written["class_names"])))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its metadata is not what cakd writes: {first_line(error)}") from error


def _input(session: Any, label: str) -> _Input:
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(given.name for given in inputs)
        raise RecipeError(f"{label} takes {len(inputs)} inputs ({names}), and cakd shows it images alone")
    (given,) = inputs
    # Sizes that are left open have a name, or nothing.
    sizes = [size if isinstance(size, int) and size > 0 else None for size in given.shape]
    if len(sizes) != 4:
        raise RecipeError(
            f"{label} takes an input of {len(sizes)} dimensions, not images (batch, channels, height, width)"
        )
    if given.type not in _KINDS:
        raise RecipeError(f"{label} takes {given.type}, and cakd gives {', '.join(_KINDS)}")
    channels_last = sizes[1] not in (1, 3) and sizes[3] in (1, 3)
    if channels_last:
        sizes = [sizes[0], sizes[3], *sizes[1:3]]
    return _Input(given.name, _KINDS[given.type], channels_last, *sizes)


def _output(session: Any, label: str) -> str:
    names = [output.name for output in session.get_outputs()]
    if len(names) > 1 and "logits" not in names:
        raise RecipeError(
            f"{label} has {len(names)} outputs ({', '.join(names)}), and none is called logits",
            hint="export it again with the logits alone",
        )
    return "logits" if "logits" in names else str(names[0])


def _are_shares(answers_NC: Tensor) -> bool:
    return bool(((answers_NC >= 0) & (answers_NC <= 1 + _SLACK)).all())


def are_probabilities(answers_NC: Tensor) -> bool:
    """Whether all numbers are in [0, 1] and those of each sample sum to one, but for rounding."""
    return _are_shares(answers_NC) and bool(((answers_NC.sum(1) - 1).abs() <= _SLACK).all())


def _said(error: BaseException) -> str:
    """What onnxruntime says, without its numbers and names of errors, in one line."""
    return " ".join(str(error).rpartition("] : ")[2].split(" : ")[-1].split())[:200] or type(error).__name__
