"""What losses share of logits: checks, softening, standardising, and how two networks' are compared.

Shape suffixes: B batch, C classes, N numbers.
"""

import torch
from torch import Tensor
from torch.nn import functional

# Differences of two logits and their batch sums stay finite in float32 up to here.
LARGEST_SOFTENED_LOGIT = 1e30
STANDARDISING_EPSILON = 1e-7


def soften(logits_BC: Tensor, temperature: float | Tensor) -> Tensor:
    """Divide logits by a temperature, in float32 at least.

    Logits beyond 1e30 times the temperature are held there, with gradient 0: differences of any two
    results, and sums of such differences over a batch, are then finite. A logit that is itself not finite becomes
    NaN, so that it cannot pass unseen.
    """
    precise_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    unchanged = not isinstance(temperature, Tensor) and temperature == 1
    softened_BC = precise_BC if unchanged else precise_BC / temperature
    # As clamp, whose gradient takes five kernels instead of one.
    held_BC = functional.hardtanh(softened_BC, -LARGEST_SOFTENED_LOGIT, LARGEST_SOFTENED_LOGIT)
    # 0 times what is not finite is NaN.
    return torch.add(held_BC, precise_BC.detach(), alpha=0)


def standardise(logits_BC: Tensor) -> Tensor:
    """Z-score logits over the classes: (z - mean) / (std + 1e-7), in float32 at least (LSKD, arXiv 2403.01427 eq. 8).

    The deviation is the unbiased one, and gradients flow through mean and deviation. Logits that are all equal
    become equal numbers near 0. With two classes the result is +-0.707 whatever the logits were.
    """
    logits_BC = soften(logits_BC, 1.0)
    # Squares of large logits would overflow: the size cancels.
    size_B1: Tensor = torch.linalg.vector_norm(logits_BC.detach(), torch.inf, dim=1, keepdim=True).clamp(min=1)
    small_BC = logits_BC / size_B1
    deviation_B1, mean_B1 = torch.std_mean(small_BC, 1, keepdim=True)
    return (small_BC - mean_B1) / torch.add(deviation_B1, size_B1.reciprocal(), alpha=STANDARDISING_EPSILON)


def kl(student_BC: Tensor, teacher_BC: Tensor, temperature: float | Tensor) -> Tensor:
    """KL(teacher || student) of each sample's softened probabilities, (batch,), in nats; the teacher is constant."""
    student_log_BC = soften(student_BC, temperature).log_softmax(1)
    teacher_log_BC = soften(teacher_BC.detach(), temperature).log_softmax(1)
    return (teacher_log_BC.exp() * (teacher_log_BC - student_log_BC)).sum(1)


def pearson(a_BN: Tensor, b_BN: Tensor) -> Tensor:
    """Pearson correlation of each row, in [-1, 1]; 0 for a row that is constant.

    As published with DIST, 1e-8 is added to the product of the norms, so the values must not be tiny.
    """
    a_BN = a_BN - a_BN.mean(1, keepdim=True)
    b_BN = b_BN - b_BN.mean(1, keepdim=True)
    product_B = (a_BN * b_BN).sum(1)
    norms_B: Tensor = torch.linalg.vector_norm(a_BN, dim=1) * torch.linalg.vector_norm(b_BN, dim=1)
    return product_B / (norms_B + 1e-8)


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
