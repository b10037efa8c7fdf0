"""Losses between the teacher's and the student's logits.

Each takes student and teacher logits (..., classes) and a temperature, and returns the loss of each row (...), scaled by T^2
so that its gradient keeps its size as T grows. Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student): the student covers all that the teacher deems likely."""
    return kl((teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)) * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(student || teacher): the student keeps to what the teacher deems likely. Source: Gu et al. 2024, MiniLLM."""
    return kl((student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)) * temperature**2


def js(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Jensen-Shannon: mean KL of both to their mixture; at most T^2 log 2. Source: Agarwal et al. 2024, GKD."""
    s, t = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    mixture = torch.logaddexp(s, t) - torch.log(s.new_tensor(2.0))
    return (kl(s, mixture) + kl(t, mixture)) / 2 * temperature**2


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities (..., classes), by row."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


LOGITS_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
}
