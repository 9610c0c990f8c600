"""What a run is: one typed, frozen recipe for train-teacher and distill alike."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cakd_cli.data import DataOptions
from cakd_cli.losses import LossOptions
from cakd_cli.models import ModelOptions, ModelSpec, OwnCodeSpec
from cakd_cli.options import Options, mistakes
from cakd_cli.teachers import EnsembleTeacher, LogitsTeacher, OnnxTeacher, TeacherOptions, single_teachers

Keys = tuple[str | int, ...]


class _OptimizerOptions(Options):
    decay_norms: bool = Field(True, description="whether weight decay acts on the weights of norms and on biases")


class SGDOptions(_OptimizerOptions):
    """Stochastic gradient descent with momentum."""

    type: Literal["sgd"] = "sgd"
    learning_rate: float = Field(0.1, gt=0, le=100, description="at its peak, for the batch size as given")
    momentum: float = Field(0.9, ge=0, lt=1, description="share of the last step that is kept")
    nesterov: bool = Field(True, description="look ahead along the momentum")
    weight_decay: float = Field(5e-4, ge=0, le=1, description="L2 penalty, added to the gradient")
    delta: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="DOT (arXiv 2307.08436): terms that look at the teacher have a momentum of their own, larger by "
        "this, and the others one smaller by this; 0 = one for all",
    )


class AdamWOptions(_OptimizerOptions):
    """Adam with decoupled weight decay."""

    type: Literal["adamw"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0, le=100, description="at its peak")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    weight_decay: float = Field(0.05, ge=0, le=1, description="decoupled, times the learning rate")


class _Schedule(Options):
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


class EngineOptions(Options):
    """How the run runs."""

    epochs: int = Field(30, ge=1, le=100_000, description="passes over the training split")
    batch_size: int = Field(
        128,
        ge=1,
        le=1_000_000,
        description="images an optimizer step; an incomplete batch is left out, unless protocol is literature",
    )
    gradient_accumulation: int = Field(1, ge=1, le=4096, description="parts into which a batch is cut to save memory")
    out_of_memory: Literal["fail", "accumulate"] = Field(
        "fail", description="what to do where a batch does not fit: end, or cut it into parts and go on"
    )
    device: str = Field("auto", description="auto, cpu, or a name such as cuda, cuda:1, mps, xpu")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the networks; losses are always fp32; fp16 scales them, where there is no bf16"
    )
    quantize: Literal["off", "int8"] = Field(
        "off",
        description="int8: the student's layers round while it trains as cakd export --format onnx-int8 will; what is "
        "validated and saved is the float32 network",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="whether to compile the student's step; auto where the run is long enough to pay for it"
    )
    teacher_form: Literal["auto", "plain", "folded", "folded-bf16", "folded-fp32", "folded-nchw", "compiled"] = Field(
        "auto", description="how the frozen teacher computes; auto is the fastest on its first images"
    )
    teacher_memory: Literal["auto", "off", "ram", "disk"] = Field(
        "auto", description="where the teacher's answers are kept; disk is shared by all runs under $CAKD_HOME"
    )
    teacher_memory_features: Literal["auto"] | bool = Field(
        "auto", description="whether the classifier's input is kept beside the logits, for students of features to come"
    )
    teacher_memory_precision: Literal["auto", "fp16", "fp32"] = Field(
        "auto", description="of the kept answers; auto loses nothing: fp16 where all of them fit into it"
    )
    teacher_memory_gb: float = Field(
        8.0, gt=0, le=1e6, description="most room for all answers, in 10^9 bytes; over it the teacher is asked live"
    )
    sync_batch_norm: bool = Field(
        True, description="whether batch norms see the batch of all processes together, or each its own share"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="what each of several processes holds of a network: all of it, or a share of each weight"
    )
    channels_last: bool = Field(True, description="memory layout that convolutions prefer")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay a step of an average of the weights, which is what is saved; 0 = off"
    )
    evaluation_batch_size: int = Field(256, ge=1, le=1_000_000, description="images at a time when nothing is learnt")
    log_interval: int = Field(50, ge=1, description="steps between two looks at the loss; each waits for the device")
    tracking: Literal["off", "tensorboard", "wandb", "trackio"] = Field(
        "off", description="where an epoch's figures go beside metrics.jsonl"
    )
    checkpoint_seconds: float = Field(60.0, ge=0, description="least time between two checkpoints")


def _given(options: Options, key: str) -> bool:
    """Whether somebody set a key, and did not leave it to its default."""
    return key in options.model_fields_set


class Recipe(Options):
    """Everything that decides the result of a run."""

    data: DataOptions = Field(description="what to look at")
    model: ModelOptions = Field(description="the network that learns: the student, or the teacher in train-teacher")
    teacher: TeacherOptions | None = Field(None, description="the network to learn from")
    class_map: str | None = Field(
        None, min_length=1, description="file that says which of the teacher's classes are the data's; none = by name"
    )
    loss: tuple[LossOptions, ...] = Field(strict=False, description="terms of the loss, summed")
    optimizer: Annotated[SGDOptions | AdamWOptions, Field(discriminator="type")] = Field(default_factory=SGDOptions)
    schedule: Annotated[CosineSchedule | StepSchedule | ConstantSchedule, Field(discriminator="type")] = Field(
        default_factory=CosineSchedule
    )
    engine: EngineOptions = Field(default_factory=EngineOptions)
    protocol: Literal["held-out", "literature"] = Field(
        "held-out",
        description="how the reported network is chosen: the best epoch on images held out of training; or, as the "
        "literature does, all images train, and the last epoch is reported beside the best on the test images",
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of the fresh weights, the order and the views of images")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of the loss looks at a teacher."""
        return any(term.needs.teacher for term in self.loss)

    @property
    def comparable_teacher(self) -> TeacherOptions | None:
        """The teacher, if it can be shown other images than those of training; a file of its logits cannot."""
        return None if isinstance(self.teacher, LogitsTeacher) else self.teacher

    @property
    def delta(self) -> float:
        """How far the momentum of what is learnt from the teacher is from the mean of both (DOT); 0 = there is one."""
        return self.optimizer.delta if isinstance(self.optimizer, SGDOptions) else 0.0

    @property
    def needs_second_view(self) -> bool:
        """Whether any term of the loss looks at a second view of each image."""
        return any(term.needs.second_view for term in self.loss)

    @model_validator(mode="after")
    def _check_keys_together(self) -> Self:
        wrong = [*self._wrong_loss(), *self._wrong_teacher(), *self._wrong_engine()]
        if self.data.mix != "none":
            wrong += self._wrong_mix()
        if self.protocol == "literature" and self.data.validation_fraction and _given(self.data, "validation_fraction"):
            wrong.append((("data", "validation_fraction"), "holds images out, and protocol literature trains on all"))
        if wrong:
            raise mistakes(wrong, self)
        return self

    def _wrong_mix(self) -> Iterator[tuple[Keys, str]]:
        if self.needs_second_view:
            yield ("data", "mix"), "goes with one view of each image, and the loss looks at two"
        for i, term in enumerate(self.loss):
            if term.needs_label and term.trains_itself:
                yield ("loss", i, "type"), f"{term.type} keeps what it learns of each label, and mixed images have two"

    def _wrong_loss(self) -> Iterator[tuple[Keys, str]]:
        if not self.loss:
            yield ("loss",), "needs at least one term"
        elif all(term.weight == 0 for term in self.loss):
            yield ("loss",), "no term has a weight above 0"
        elif not any(term.of_logits for term in self.loss):
            yield (
                ("loss",),
                "no term looks at the logits, so the classifier would not learn; add cross-entropy or kd",
            )
        for i, term in enumerate(self.loss):
            if term.warmup_epochs != "auto" and term.warmup_epochs > self.engine.epochs:
                yield (
                    ("loss", i, "warmup_epochs"),
                    f"is {term.warmup_epochs:g}, longer than the run of {self.engine.epochs} epochs; "
                    "auto is a twelfth of it",
                )

    def _wrong_teacher(self) -> Iterator[tuple[Keys, str]]:
        if self.needs_teacher and self.teacher is None:
            term = next(term for term in self.loss if term.needs.teacher)
            yield ("teacher",), f"is missing, and the term {term.type} needs one; give --teacher"
        if self.class_map is not None and self.teacher is None:
            yield ("class_map",), "is of a teacher's classes, and there is no teacher; give --teacher"
        several = isinstance(self.teacher, EnsembleTeacher)
        for teacher in single_teachers(self.teacher):
            if not isinstance(teacher, ModelSpec) or self.data.is_noise:
                continue
            if not (teacher.weights or getattr(teacher, "pretrained", False)):
                place = f"{{type: {teacher.label}, weights: FILE}} in the list" if several else "teacher.weights=FILE"
                other = "teacher.pretrained=true" if isinstance(teacher, OwnCodeSpec) else "name a run directory"
                yield ("teacher",), f"{teacher.label} has fresh weights; give {place}, or {other}"
        inside = next((term for term in self.loss if term.looks_inside), None)
        if isinstance(self.teacher, OnnxTeacher) and inside is not None:
            yield (
                ("teacher",),
                f"is an ONNX file, which shows no layers, and the term {inside.type} compares them; "
                "use --loss cakd-logits",
            )
        if several and inside is not None:
            yield (
                ("teacher",),
                "is several networks, and features are compared with one; use --loss cakd-logits",
            )
        if isinstance(self.teacher, LogitsTeacher) and self.needs_teacher:
            yield from self._wrong_logits(inside)

    def _wrong_logits(self, inside: LossOptions | None) -> Iterator[tuple[Keys, str]]:
        if inside is not None:
            wrong = f"is a file of logits, which shows no layers, and the term {inside.type} compares them"
            yield ("teacher",), f"{wrong}; use --loss cakd-logits"
        if self.needs_second_view:
            yield ("teacher",), "is a file of logits of one view of an image, and the loss looks at two"
        if self.data.mix != "none":
            yield ("data", "mix"), "makes one image of two, and the teacher is a file of the logits of each alone"
        for key, usual in (("teacher_memory", "off"), ("teacher_form", "plain")):
            value = getattr(self.engine, key)
            if value not in ("auto", usual):
                yield ("engine", key), f"is {value}, and the teacher is a file of logits, which is not asked"

    def _wrong_engine(self) -> Iterator[tuple[Keys, str]]:
        engine = self.engine
        if isinstance(self.optimizer, SGDOptions) and self.optimizer.nesterov and not self.optimizer.momentum:
            yield ("optimizer", "nesterov"), "needs a momentum above 0; set optimizer.nesterov=false"
        if isinstance(self.optimizer, SGDOptions) and self.delta:
            yield from self._wrong_momenta(self.optimizer)
        if engine.parallel == "fsdp":
            for key, value in (("compile", "on"), ("teacher_form", "compiled")):
                if getattr(engine, key) == value:
                    yield (
                        ("engine", key),
                        f"is {value}, and what is cut over processes (parallel: fsdp) is not compiled",
                    )
        if engine.batch_size % engine.gradient_accumulation:
            yield (
                ("engine", "gradient_accumulation"),
                f"must divide the batch size {engine.batch_size}, got {engine.gradient_accumulation}",
            )
        if self.schedule.warmup_epochs > engine.epochs:
            yield (
                ("schedule", "warmup_epochs"),
                f"is {self.schedule.warmup_epochs:g}, longer than the run of {engine.epochs} epochs; "
                "set schedule.warmup_epochs=0",
            )

    def _wrong_momenta(self, options: SGDOptions) -> Iterator[tuple[Keys, str]]:
        if options.nesterov:
            yield ("optimizer", "nesterov"), "does not go with two momenta (delta); set optimizer.nesterov=false"
        if not options.delta <= options.momentum < 1 - options.delta:
            yield ("optimizer", "delta"), f"is {options.delta:g}: momentum {options.momentum:g} +- delta leaves [0, 1)"
        if len({bool(term.needs.teacher) for term in self.loss}) == 1:
            yield ("optimizer", "delta"), "tells the teacher's terms from the labels', and the loss has one kind alone"
        if self.engine.compile == "on":
            yield ("engine", "compile"), "is on, and two momenta (optimizer.delta) go through the student's graph twice"
