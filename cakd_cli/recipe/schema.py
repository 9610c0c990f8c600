"""What a run is: one typed, frozen recipe for train-teacher and distill alike."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cakd_cli.data import DataOptions
from cakd_cli.losses import LossOptions
from cakd_cli.models import ModelOptions, ModelSpec


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, and nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunTeacher(Section):
    """A teacher trained by cakd, or any folder with model.safetensors and config.json."""

    type: Literal["run"] = "run"
    path: str = Field(description="run directory or exported folder")


OneTeacher = Annotated[RunTeacher | ModelOptions, Field(discriminator="type")]


class EnsembleTeacher(Section):
    """Several teachers that answer as one; a list of teachers is short for it."""

    type: Literal["ensemble"] = "ensemble"
    members: tuple[OneTeacher, ...] = Field(strict=False, min_length=2, description="teachers, as one would be given")
    weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), strict=False, description="of the members in their order; none = all the same"
    )
    combine: Literal["probabilities", "logits", "confidence"] = Field(
        "probabilities", description="what is averaged; confidence trusts whoever is sure of a sample"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights and len(self.weights) != len(self.members):
            raise ValueError(f"there are {len(self.members)} members and {len(self.weights)} weights")
        return self


TeacherOptions = Annotated[RunTeacher | ModelOptions | EnsembleTeacher, Field(discriminator="type")]


def single_teachers(teacher: "RunTeacher | ModelSpec | EnsembleTeacher | None") -> "list[RunTeacher | ModelSpec]":
    """List the teachers of a recipe one by one."""
    if teacher is None:
        return []
    return list(teacher.members) if isinstance(teacher, EnsembleTeacher) else [teacher]


class SGDOptions(Section):
    """Stochastic gradient descent with momentum."""

    type: Literal["sgd"] = "sgd"
    learning_rate: float = Field(0.1, gt=0, le=100, description="at its peak, for the batch size as given")
    momentum: float = Field(0.9, ge=0, lt=1, description="share of the last step that is kept")
    nesterov: bool = Field(True, description="look ahead along the momentum")
    weight_decay: float = Field(5e-4, ge=0, le=1, description="L2 penalty, added to the gradient")


class AdamWOptions(Section):
    """Adam with decoupled weight decay."""

    type: Literal["adamw"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0, le=100, description="at its peak")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    weight_decay: float = Field(0.05, ge=0, le=1, description="decoupled, times the learning rate")


class _Schedule(Section):
    warmup_epochs: float = Field(0.0, ge=0, description="epochs over which the rate grows linearly from 0")


class CosineSchedule(_Schedule):
    """Half a cosine from the peak to the final share, step by step."""

    type: Literal["cosine"] = "cosine"
    final_factor: float = Field(0.0, ge=0, le=1, description="share of the peak rate at the end")


class StepSchedule(_Schedule):
    """Constant, multiplied by gamma at each milestone.

    Milestones are shares of the run, so that a shortened run keeps its decays: 150, 180 and 210 of the
    literature's 240 epochs are 0.625, 0.75 and 0.875.
    """

    type: Literal["step"] = "step"
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.625, 0.75, 0.875), strict=False, description="shares of the run"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each milestone")


class ConstantSchedule(_Schedule):
    """The peak rate throughout."""

    type: Literal["constant"] = "constant"


class EngineOptions(Section):
    """How the run runs."""

    epochs: int = Field(30, ge=1, le=100_000, description="passes over the training split")
    batch_size: int = Field(
        128, ge=1, le=1_000_000, description="images an optimizer step; an incomplete batch is left out"
    )
    gradient_accumulation: int = Field(1, ge=1, le=4096, description="parts into which a batch is cut to save memory")
    device: str = Field("auto", description="auto, cpu, or a name such as cuda, cuda:1, mps, xpu")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of the networks; losses are always fp32")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="whether to compile the student's step; auto where the run is long enough to pay for it"
    )
    teacher_form: Literal["auto", "plain", "folded", "folded-bf16", "folded-fp32", "folded-nchw", "compiled"] = Field(
        "auto", description="how the frozen teacher computes; auto is the fastest on its first images"
    )
    teacher_memory: Literal["auto", "off", "ram", "disk"] = Field(
        "auto", description="where the teacher's answers are kept; disk is shared by all runs under $CAKD_HOME"
    )
    teacher_memory_precision: Literal["auto", "fp16", "fp32"] = Field(
        "auto", description="of the kept answers; auto loses nothing: fp16 where the teacher computes in bf16"
    )
    teacher_memory_gb: float = Field(
        8.0, gt=0, le=1e6, description="most room for all answers, in 10^9 bytes; over it the teacher is asked live"
    )
    channels_last: bool = Field(True, description="memory layout that convolutions prefer")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay a step of an average of the weights, which is what is saved; 0 = off"
    )
    evaluation_batch_size: int = Field(256, ge=1, le=1_000_000, description="images at a time when nothing is learnt")
    log_interval: int = Field(50, ge=1, description="steps between two looks at the loss; each waits for the device")
    checkpoint_seconds: float = Field(60.0, ge=0, description="least time between two checkpoints")


class Recipe(Section):
    """Everything that decides the result of a run."""

    data: DataOptions = Field(description="what to look at")
    model: ModelOptions = Field(description="the network that learns: the student, or the teacher in train-teacher")
    teacher: TeacherOptions | None = Field(None, description="the network to learn from")
    loss: tuple[LossOptions, ...] = Field(strict=False, description="terms of the loss, summed")
    optimizer: Annotated[SGDOptions | AdamWOptions, Field(discriminator="type")] = Field(default_factory=SGDOptions)
    schedule: Annotated[CosineSchedule | StepSchedule | ConstantSchedule, Field(discriminator="type")] = Field(
        default_factory=CosineSchedule
    )
    engine: EngineOptions = Field(default_factory=EngineOptions)
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of the fresh weights, the order and the views of images")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of the loss compares with a teacher."""
        return any(term.needs_teacher for term in self.loss)
