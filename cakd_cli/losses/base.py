"""What every loss shares: its result, its place in a recipe, and the preparation of logits.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

# Differences of two logits and their batch sums stay finite in float32 up to here.
LARGEST_SOFTENED_LOGIT = 1e30


@dataclass(frozen=True)
class LossOutput:
    """A loss and what it is made of.

    Attributes:
        total: Differentiable scalar, nats (times temperature squared where the method scales so).
        parts: Named parts before any weight, batch means; they carry gradients too.
    """

    total: Tensor
    parts: dict[str, Tensor]


class LossTerm(BaseModel):
    """One entry of a recipe's ``loss:`` list."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    needs_teacher: ClassVar[bool] = True
    # The method's whole training objective as published, as raw recipe entries.
    objective: ClassVar[Sequence[Mapping[str, Any]]] = ()

    weight: float = Field(1.0, ge=0, description="factor on this term")
    warmup_epochs: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        0.0, description="epochs over which the weight grows linearly from 0; auto = a twelfth of the run"
    )

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target_B: Tensor) -> LossOutput:
        """Compute the unweighted term for one batch."""
        raise NotImplementedError


class TeacherTerm(LossTerm):
    """A term that compares the student with a teacher."""

    temperature: float = Field(4.0, gt=0, le=1000, description="softening of both networks' logits")

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor | None, target_B: Tensor) -> LossOutput:
        """Compute the unweighted term for one batch."""
        assert teacher_BC is not None, "the recipe schema refuses a distillation term without a teacher"
        return self.compare(student_BC, teacher_BC, target_B)

    def compare(self, student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor) -> LossOutput:
        """Compute the unweighted term for one batch."""
        raise NotImplementedError


def soften(logits_BC: Tensor, temperature: float) -> Tensor:
    """Divide logits by a temperature, in float32 at least.

    Logits beyond 1e30 times the temperature are held there, with gradient 0: differences of any two
    results, and sums of such differences over a batch, are then finite. A logit that is itself not finite becomes
    NaN, so that it cannot pass unseen.
    """
    precise_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    held_BC = (precise_BC / temperature).clamp(-LARGEST_SOFTENED_LOGIT, LARGEST_SOFTENED_LOGIT)
    return torch.where(precise_BC.isfinite(), held_BC, torch.nan)


def check_pair(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> None:
    """Refuse what would broadcast into a wrong number.

    Raises:
        ValueError: If the shapes differ, are not two-dimensional, or the temperature is not positive.
    """
    if student_BC.ndim != 2 or student_BC.shape != teacher_BC.shape:
        raise ValueError(
            "student and teacher logits must have one shape (batch, classes), "
            f"got {tuple(student_BC.shape)} and {tuple(teacher_BC.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def check_target(student_BC: Tensor, target_B: Tensor) -> None:
    """Refuse labels that are not one class index per sample.

    Raises:
        ValueError: If the shape or type of ``target_B`` is wrong. Ranges are not read: that would wait for the device.
    """
    if target_B.shape != student_BC.shape[:1] or target_B.dtype.is_floating_point or target_B.dtype == torch.bool:
        raise ValueError(
            f"labels must be {student_BC.shape[0]} class indices, got {tuple(target_B.shape)} of {target_B.dtype}"
        )
