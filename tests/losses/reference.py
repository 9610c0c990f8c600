"""The official vectors: inputs, values and gradients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "vectors"
CONTENT: dict[str, Any] = json.loads((FOLDER / "logit_losses.json").read_text())
TENSORS = load_file(FOLDER / "logit_losses.safetensors")


def cases(*methods: str) -> list[str]:
    return [name for name, case in CONTENT["cases"].items() if case["method"] in methods]


def inputs(name: str, dtype: torch.dtype) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The case, student logits that want a gradient, teacher logits, labels."""
    case = CONTENT["cases"][name]
    names = CONTENT["input_sets"][case["input_set"]]
    student = TENSORS[names["student"]].to(dtype).requires_grad_()
    return case, student, TENSORS[names["teacher"]].to(dtype), TENSORS[names["target"]]


def mask(case: dict[str, Any]) -> torch.Tensor:
    return TENSORS[case["mask_strong"]].bool()


def assert_matches(
    case: dict[str, Any],
    total: torch.Tensor,
    parts: dict[str, torch.Tensor],
    student: torch.Tensor,
    *,
    relative: float | None = None,
) -> None:
    """Hold values and the gradient of the total to the reference: 1e-9 relative in float64, 1e-5 in float32."""
    relative = relative or _tolerance(student)
    for name, expected in case["components"].items():
        assert abs(parts[name].item() - expected) <= relative * max(abs(expected), 1e-3), name
    assert abs(total.item() - case["total"]) <= relative * max(abs(case["total"]), 1e-3)
    assert_gradient(case["grad_student"], total, student, relative=relative)


def assert_gradient(name: str, total: torch.Tensor, student: torch.Tensor, *, relative: float | None = None) -> None:
    """Hold the gradient of the total to the tensor of this name."""
    (gradient,) = torch.autograd.grad(total, student, retain_graph=True)
    expected = TENSORS[name]
    largest = max(expected.abs().max().item(), 1e-3)
    assert (gradient.double() - expected).abs().max().item() <= (relative or _tolerance(student)) * largest


def _tolerance(student: torch.Tensor) -> float:
    return 1e-9 if student.dtype == torch.float64 else 1e-5


FEATURES: dict[str, Any] = json.loads((FOLDER / "feature_losses.json").read_text())
FEATURE_TENSORS = load_file(FOLDER / "feature_losses.safetensors")


def feature_cases(*methods: str) -> list[str]:
    return [name for name, case in FEATURES["cases"].items() if case["method"] in methods]


def feature_case(name: str) -> tuple[dict[str, Any], Callable[[str], torch.Tensor]]:
    """The case, and its tensors by name in float64."""
    return FEATURES["cases"][name], lambda tensor: FEATURE_TENSORS[tensor].clone()
