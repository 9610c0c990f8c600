"""The official vectors: inputs, values and gradients."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "vectors"


class Vectors:
    """One file of cases, and the tensors that they name.

    Args:
        name: Of the json file; its tensors may be cut into several files.
    """

    def __init__(self, name: str) -> None:
        self.content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
        self.tensors = {
            key: value
            for path in sorted(FOLDER.glob(f"{name}*.safetensors"))
            if path.name.split(".")[0] == name
            for key, value in load_file(path).items()
        }

    def cases(self, *methods: str) -> list[str]:
        return [name for name, case in self.content["cases"].items() if case["method"] in methods]

    def case(self, name: str) -> dict[str, Any]:
        case: dict[str, Any] = self.content["cases"][name]
        return case

    def tensor(self, name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """A copy, in the wanted type if it holds numbers that are not counted."""
        value = self.tensors[name]
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()

    def inputs(self, name: str, dtype: torch.dtype) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor]:
        """The case, student logits that want a gradient, teacher logits, labels."""
        case = self.case(name)
        return case, *self.input_set(case["input_set"], dtype)

    def input_set(self, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Student logits that want a gradient, teacher logits, labels."""
        names = self.content["input_sets"][name]
        student = self.tensor(names["student"], dtype).requires_grad_()
        return student, self.tensor(names["teacher"], dtype), self.tensor(names["target"])

    def assert_values(
        self, case: Mapping[str, Any], total: torch.Tensor, parts: Mapping[str, torch.Tensor], relative: float
    ) -> None:
        """Hold the total and every component of the case to the reference."""
        for name, expected in case["components"].items():
            assert abs(parts[name].item() - expected) <= relative * max(abs(expected), 1e-3), name
        assert abs(total.item() - case["total"]) <= relative * max(abs(case["total"]), 1e-3)

    def assert_gradient(self, name: str, total: torch.Tensor, student: torch.Tensor, relative: float) -> None:
        """Hold the gradient of the total to the tensor of this name."""
        (gradient,) = torch.autograd.grad(total, student, retain_graph=True)
        expected = self.tensors[name]
        largest = max(expected.abs().max().item(), 1e-3)
        assert (gradient.double() - expected).abs().max().item() <= relative * largest, name


LOGITS = Vectors("logit_losses")
NEWER_LOGITS = Vectors("newer_logit_losses")
FEATURES = Vectors("feature_losses")
NEWER_FEATURES = Vectors("newer_feature_losses")


def tolerance(dtype: torch.dtype) -> float:
    """Relative: 1e-9 in float64, 1e-5 in float32."""
    return 1e-9 if dtype == torch.float64 else 1e-5


CONTENT, TENSORS = LOGITS.content, LOGITS.tensors
cases, inputs = LOGITS.cases, LOGITS.inputs


def mask(case: dict[str, Any]) -> torch.Tensor:
    return TENSORS[case["mask_strong"]].bool()


def assert_matches(
    case: dict[str, Any],
    total: torch.Tensor,
    parts: dict[str, torch.Tensor],
    student: torch.Tensor,
    *,
    relative: float | None = None,
    vectors: Vectors = LOGITS,
) -> None:
    """Hold values and the gradient of the total to the reference."""
    relative = relative or tolerance(student.dtype)
    vectors.assert_values(case, total, parts, relative)
    vectors.assert_gradient(case["grad_student"], total, student, relative)


def assert_gradient(name: str, total: torch.Tensor, student: torch.Tensor) -> None:
    """Hold the gradient of the total to the tensor of this name."""
    LOGITS.assert_gradient(name, total, student, tolerance(student.dtype))
