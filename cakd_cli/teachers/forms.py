"""The forms in which a frozen teacher can answer, and which is the fastest here.

plain         as the recipe's precision and memory layout say
folded        each batch norm multiplied into the convolution before it
folded-bf16   folded, with weights and images in bf16 instead of autocast
folded-fp32   folded, in float32 although the recipe says bf16: faster where bf16 is emulated
folded-nchw   folded, in the layout of channels first
compiled      folded, then compiled

A teacher whose inner layers are tapped has the plain form alone: folding changes what layers say. So has one that
is asked for gradients on its way, and one without weights, as an ONNX file.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from cakd_cli.data import Batch
from cakd_cli.errors import HardwareError, RecipeError, first_line
from cakd_cli.machine import compiling
from cakd_cli.machine.hardware import Hardware
from cakd_cli.models.layers import Answers, Tapped
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.teachers.network import Teacher

# A run in which the teacher answers for less than this does not measure forms.
WORTH_MEASURING_SECONDS = 60.0
# An answering time that pays for a compilation of half a minute even where it gains a tenth.
WORTH_COMPILING_SECONDS = 600.0
_ROUNDS = 3
# A form may be this many times as far from the float32 answers as the plain form is; rounding in float32 is the floor.
_SLACK, _FLOOR = 2.0, 1e-4


class Form:
    """A teacher that answers in one of the forms above.

    Attributes:
        network: That computes.

    Args:
        teacher: Whose answers.
        name: Of the form.
        hardware: The run's.

    Raises:
        ValueError: If the network cannot take the form.
    """

    def __init__(self, teacher: Teacher, name: str, hardware: Hardware) -> None:
        if name != "plain" and plain_alone(teacher):
            raise ValueError(plain_alone(teacher))
        self.name = name
        if name in ("folded-fp32", "folded-bf16"):
            hardware = replace(hardware, precision="fp32")
        if name == "folded-nchw":
            hardware = replace(hardware, channels_last=False)
        self._dtype = torch.bfloat16 if name == "folded-bf16" else torch.float32
        self.network = teacher.model if name == "plain" else hardware.place(_fold(teacher.model).to(self._dtype))
        self._model = Tapped(self.network, teacher.taps)
        # Without graphs: it answers while the student works, whose graphs' memory they would share.
        self._answer = compiling.compiled(self._model, graphed=False) if name == "compiled" else self._model
        self._hardware = hardware
        self._normalise = Normalisation(teacher.mean, teacher.std, hardware)

    @contextlib.contextmanager
    def _compiler(self) -> Iterator[None]:
        """Explain what the compiler, which begins with the first images, may fail with."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.name != "compiled":
                raise
            raise HardwareError(
                f"the teacher cannot be compiled: {first_line(error)}", hint="engine.teacher_form=folded"
            ) from error

    def answer(self, batch: Batch) -> Answers:
        """Answer about the images of a batch."""
        return self.answers_to(batch.images)

    @torch.no_grad()
    def answers_to(self, images: Tensor) -> Answers:
        """Map uint8 images (batch, channels, height, width) to float32 answers by name, without gradient."""
        with self._hardware.autocast(), self._compiler():
            answers: Answers = self._answer(self._normalise(images).to(self._dtype))
        return answers

    def close(self) -> None:
        """Remove what was hooked into the network."""
        self._model.close()


def plain_alone(teacher: Teacher) -> str:
    """Why a teacher can only answer in its plain form; empty if it can in others."""
    if next(teacher.model.parameters(), None) is None:
        return "it has no weights that could be folded"
    inside = any(tap.form != "vector" or not tap.of_input for tap in teacher.taps)
    return "layers inside a network are not what they were once it is folded" if inside else ""


def make_form(teacher: Teacher, name: str, hardware: Hardware) -> Form:
    """Put a teacher into a form that was asked for.

    Raises:
        RecipeError: If it cannot take it.
    """
    try:
        return Form(teacher, name, hardware)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Tracing runs the code of anybody's network, which may fail with anything.
        raise RecipeError(
            f"the teacher cannot take the form '{name}': {first_line(error)}", hint="engine.teacher_form=plain"
        ) from error


def loses_digits_in_half(answers: Answers) -> bool:
    """Whether fp16 would change answers: those of a network in bf16 have fewer digits, and are far from its ends.

    Of an ensemble, of averaged maps and of Grad-CAM, which are computed in float32, it would.
    """
    return not all(torch.equal(answer, answer.bfloat16().float()) for answer in answers.values())


def fastest_form(
    teacher: Teacher, hardware: Hardware, images: Tensor, *, asks: int, compiled: str, float32: bool
) -> tuple[str, str]:
    """Measure the forms on real images and take the fastest whose answers agree.

    Args:
        teacher: Whose forms.
        hardware: The run's.
        images: A batch of the run's, uint8 and on the device: which form is the fastest depends on its size.
        asks: Images that the run will ask about, at most.
        compiled: The recipe's ``engine.compile``: whether to try, ``auto`` where the work is long enough.
        float32: Whether answers with the digits of float32 are of use where the recipe says bf16.

    Returns:
        The form's name, and why it was taken; empty where the answers take too little time for it to matter, or no
        other can be.
    """
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(contextlib.closing(Form(teacher, "plain", hardware)))
        plain.answers_to(images)  # the first call of a kernel is not like the others
        seconds = {"plain": _seconds(plain, images, hardware)}
        expected = seconds["plain"] / len(images) * asks
        if expected < WORTH_MEASURING_SECONDS or plain_alone(teacher):
            return "plain", ""
        names = _candidates(hardware, compiled, expected, float32=float32)
        forms, refused = _forms_that_agree(teacher, hardware, images, names, asked_for=compiled == "on")
        forms = {"plain": plain, **forms}
        for form in forms.values():
            stack.callback(form.close)
        for _ in range(_ROUNDS):
            for name, form in forms.items():
                seconds[name] = min(seconds.get(name, math.inf), _seconds(form, images, hardware))
    best = min(forms, key=seconds.__getitem__)
    rates = ", ".join(f"{name} {len(images) / seconds[name]:,.0f}" for name in sorted(forms, key=seconds.__getitem__))
    return best, "; ".join([f"images/s: {rates}", *refused])


def _forms_that_agree(
    teacher: Teacher, hardware: Hardware, images: Tensor, names: list[str], *, asked_for: bool
) -> tuple[dict[str, Form], list[str]]:
    """Make the forms of these names whose answers agree, and say why the others are left out."""
    with contextlib.closing(Form(teacher, "plain", hardware.full_precision())) as form:
        exact = form.answers_to(images)
    with contextlib.closing(Form(teacher, "plain", hardware)) as form:
        bar = max(_SLACK * _distance(form.answers_to(images), exact), _FLOOR)
    forms: dict[str, Form] = {}
    refused = []
    for name in names:
        try:
            form = Form(teacher, name, hardware)
            distance = _distance(form.answers_to(images), exact)
        except Exception as error:
            if name == "compiled" and asked_for:
                raise HardwareError(
                    f"the teacher cannot be compiled: {first_line(error)}", hint="engine.compile=off"
                ) from error
            refused.append(f"{name} cannot be made")
            continue
        if distance <= bar:
            forms[name] = form
        else:
            form.close()
            refused.append(f"{name} answers differently by {distance:.1e}")
    return forms, refused


def _candidates(hardware: Hardware, compiled: str, expected_seconds: float, *, float32: bool) -> list[str]:
    names = ["folded"]
    if hardware.precision == "bf16":
        names += ["folded-bf16", *(["folded-fp32"] if float32 else [])]
    if hardware.channels_last:
        names.append("folded-nchw")
    if compiled == "on" or (compiled == "auto" and expected_seconds > WORTH_COMPILING_SECONDS):
        names.append("compiled")
    return names


def _fold(model: nn.Module) -> nn.Module:
    """Copy a network with each batch norm multiplied into the convolution that it alone follows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of asserts in the networks of other libraries
        return fuse(model).eval()


def _seconds(form: Form, images: Tensor, hardware: Hardware) -> float:
    hardware.wait()
    started = time.perf_counter()
    form.answers_to(images)
    hardware.wait()
    return time.perf_counter() - started


def _distance(answers: Answers, exact: Answers) -> float:
    """Compare logits, and then each layer, up to what softmax ignores; the largest distance counts.

    It is the root of the squared error over that of the exact answers.
    """
    distances = []
    for name in exact:
        found_BD, exact_BD = (x[name].flatten(1) for x in (answers, exact))
        found_BD, exact_BD = (x - x.mean(1, keepdim=True) for x in (found_BD, exact_BD))
        distances.append(float((found_BD - exact_BD).norm() / exact_BD.norm().clamp(min=1e-30)))
    return max(distances)
