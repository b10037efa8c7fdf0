"""Losses between the teacher's and the student's outputs: summed over the rows that count, scaled by T^2.

T^2 keeps the size of the gradient as T grows. Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network.

A kind of divergence is a function of one chunk of log-probabilities at temperature T, student's and teacher's
(rows, classes), which returns the loss of each row (rows,) and its derivative by the student's logits / T (rows, classes).
Below, s and t are the two models' probabilities, z the student's logits / T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .divergence import FLOOR, log_probs, summed


@dataclass(frozen=True)
class TopK:
    """The teacher's likeliest classes of each row; what they lack to 1 is one bucket, "all other classes".

    Attributes:
        log_probs: (..., k) at the training temperature.
        indices: (..., k) int64, the classes; none twice in a row.
    """

    log_probs: Tensor
    indices: Tensor


def forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(t || s) = sum t log(t/s); d/dz = s - t. The student covers all that the teacher deems likely.

    Source: Hinton et al. 2015.
    """
    t = teacher.exp()
    return (teacher - student).mul_(t).sum(-1), student.exp().sub_(t)


def reverse_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(s || t) = sum s log(s/t); d/dz = s (log(s/t) - KL). The student keeps to what the teacher deems likely.

    Source: Gu et al. 2024, MiniLLM.
    """
    s, ratio = student.exp(), student - teacher
    loss = (s * ratio).sum(-1)
    return loss, ratio.sub_(loss[:, None]).mul_(s)


def js(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Half of KL(s || m) + KL(t || m), m = (s + t)/2; d/dz = s (log(s/m) - KL(s || m)) / 2. At most log 2.

    Source: Agarwal et al. 2024, GKD, its generalised divergence with a mixture of 1/2.
    """
    s, t = student.exp(), teacher.exp()
    mixture = (s + t).div_(2).clamp_(min=torch.finfo(s.dtype).tiny).log_()
    ratio = student - mixture
    of_student = (s * ratio).sum(-1)
    of_teacher = mixture.neg_().add_(teacher).mul_(t).sum(-1)
    return (of_student + of_teacher) / 2, ratio.sub_(of_student[:, None]).mul_(s).div_(2)


def bucketed_forward_kl(student: Tensor, top: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """KL between the k + 1 buckets of both models: at most the whole KL, equal to it where k is all classes.

    With r the teacher's bucket of other classes: d/dz is s - t for the k, s - r s / (sum of s over the others) for the rest.

    Args:
        student: Log-probabilities (rows, classes).
        top: The teacher's (rows, k); where they sum to more than 1, by rounding, they are made to sum to 1.
        indices: Their classes (rows, k).
    """
    top = top.to(student.dtype)
    total = top.logsumexp(-1, keepdim=True)
    whole = indices.shape[-1] == student.shape[-1]
    top = (top - (total if whole else total.clamp(min=0))).clamp_(min=FLOOR)
    t = top.exp()
    loss, derivative = (top - student.gather(-1, indices)).mul_(t).sum(-1), student.exp()
    if not whole:
        rest = -total.clamp(max=0).expm1()
        rest = rest.where(rest > 8 * torch.finfo(rest.dtype).eps, 0)  # less is rounding, which no logarithm should see
        others = student.scatter(-1, indices, -torch.inf)
        loss = loss + (torch.xlogy(rest, rest) - rest * others.logsumexp(-1, keepdim=True))[:, 0]
        derivative.sub_(others.softmax(-1).mul_(rest))
    return loss, derivative.scatter_add_(-1, indices, -t)


LOGITS_LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
}


def divergence(student: Tensor, teacher: Tensor | TopK, rows: Tensor, temperature: float, kind: str) -> Tensor:
    """T^2 times the divergence of two categorical distributions, summed over the rows that count.

    Above its inputs it holds the student's gradient and a few MiB. Give logits whole, and leave out positions by `rows`:
    of a slice, such as logits[:, :-1], autograd makes the gradient of the whole anew.

    Args:
        student: Logits (..., classes), of any float dtype.
        teacher: Logits of the same shape, or its likeliest classes; no gradient flows to it.
        rows: (...) bool, the rows that count; others may hold anything, and get a gradient of exactly zero.
        temperature: T.
        kind: A name of `LOGITS_LOSSES`.

    Returns:
        A scalar, float32 (float64 where the student is); its gradient can be asked for once.

    Raises:
        ValueError: The shapes do not fit, the kind is unknown, or it needs more of the teacher than a TopK.
    """
    top = isinstance(teacher, TopK)
    check(student, teacher.indices if top else teacher, rows, kind, leading=top)
    if not top:
        return summed(student, (teacher,), rows, temperature, partial(dense, LOGITS_LOSSES[kind], temperature))
    if kind != "forward_kl":
        raise ValueError(
            f"of the teacher's likeliest classes alone, only forward_kl can be computed; got {kind!r} with a TopK of "
            f"{teacher.indices.shape[-1]} classes: set logits_loss to forward_kl, or give the teacher's logits whole"
        )
    return summed(student, (teacher.log_probs, teacher.indices), rows, temperature, bucketed_forward_kl)


def dense(kind: Callable, temperature: float, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """A kind of divergence, given the student's log-probabilities and the teacher's logits."""
    return kind(student, log_probs(teacher, temperature, student.dtype))


def binary_divergence(student: Tensor, teacher: Tensor, rows: Tensor, temperature: float, kind: str) -> Tensor:
    """The same for labels that do not exclude each other: each class is a Bernoulli variable, a row the mean of its classes.

    A Bernoulli variable of logit z is a choice between two classes of logits z and 0. Arguments as of `divergence`.
    """
    check(student, teacher, rows, kind)
    pairs = [torch.stack([x, torch.zeros_like(x)], -1) for x in (student, teacher)]
    return divergence(*pairs, rows[..., None].expand(student.shape), temperature, kind) / student.shape[-1]


def squared_difference(student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    """For regression: squared difference (..., outputs), mean over a row's outputs, summed over the rows that count."""
    check(student, teacher, rows)
    dtype = torch.promote_types(student.dtype, torch.float32)
    return (student[rows].to(dtype) - teacher.detach()[rows].to(dtype)).square().mean(-1).sum()


def check(student: Tensor, teacher: Tensor, rows: Tensor, kind: str = "forward_kl", leading: bool = False) -> None:
    """Raise ValueError unless shapes fit (`leading`: but for the teacher's last dimension) and the kind is known."""
    shapes = [tuple(x.shape[:-1] if leading else x.shape) for x in (student, teacher)]
    if kind not in LOGITS_LOSSES:
        raise ValueError(f"the logits loss must be one of {sorted(LOGITS_LOSSES)}, got {kind!r}: set logits_loss to one")
    if shapes[0] != shapes[1] or rows.shape != student.shape[:-1] or rows.dtype != torch.bool or not rows.dim():
        raise ValueError(
            "student and teacher must be (..., classes) of the same rows and classes, and rows their bool (...); got student "
            f"{tuple(student.shape)}, teacher {tuple(teacher.shape)}, rows {tuple(rows.shape)} {rows.dtype}: "
            "give one logit a class of each row, and True where a row counts"
        )
