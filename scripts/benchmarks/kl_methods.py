"""Losses between logits, ours and the peers' own code: what `distillation.py` compares."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_kdprune.distill.logits import LOGITS_LOSSES, divergence


def ours(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """This package."""
    rows = torch.ones(len(student), dtype=torch.bool, device=student.device)
    return divergence(student, teacher, rows, temperature, kind) / len(student)


def plain(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The formula as most scripts have it."""
    s, t = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    pairs = {"forward_kl": [(t, s)], "reverse_kl": [(s, t)]}.get(kind)
    if pairs is None:
        mixture = torch.logaddexp(s, t) - torch.log(s.new_tensor(2.0))
        pairs = [(s, mixture), (t, mixture)]
    parts = [F.kl_div(q, p, reduction="batchmean", log_target=True) for p, q in pairs]
    return torch.stack(parts).mean() * temperature**2


def modelopt(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """LogitsDistillationLoss of NVIDIA ModelOpt, `modelopt/torch/distill/losses.py`."""
    loss = file_of("modelopt", "torch/distill/losses.py").LogitsDistillationLoss(temperature, "batchmean")
    return loss(student, teacher)


def trl(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """GKDTrainer.generalized_jsd_loss of TRL, which leaves T^2 out."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    beta = {"forward_kl": 0, "reverse_kl": 1, "js": 0.5}[kind]
    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature) * temperature**2


TORCHTUNE = {"forward_kl": "Forward", "reverse_kl": "Reverse"}


def torchtune(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """ForwardKLLoss or ReverseKLLoss of torchtune, `torchtune/modules/loss/kd_losses.py`."""
    loss = getattr(file_of("torchtune", "modules/loss/kd_losses.py"), f"{TORCHTUNE[kind]}KLLoss")()
    student, teacher = ((x if temperature == 1 else x / temperature) for x in (student, teacher))
    labels = torch.zeros(len(student), dtype=torch.long, device=student.device)
    return loss(student, teacher, labels) * temperature**2


def torchtune_chunked(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same in 8 chunks, its default, each a leaf: of views of one tensor, autograd would join the gradients in another."""
    student.leaves = [part.detach().requires_grad_() for part in student.chunk(8)]
    loss = getattr(file_of("torchtune", "modules/loss/kd_losses.py"), f"{TORCHTUNE[kind]}KLWithChunkedOutputLoss")(8)
    parts = [[(x if temperature == 1 else x / temperature)[None] for x in many] for many in (student.leaves, teacher.chunk(8))]
    labels = torch.zeros(1, len(student), dtype=torch.long, device=student.device)
    return loss(*parts, labels) * temperature**2


BOTH_KL, ALL = ("forward_kl", "reverse_kl"), tuple(LOGITS_LOSSES)
METHODS: dict[str, tuple[Callable, str, tuple[str, ...]]] = {  # name -> function, package, the kinds that it has
    "ours": (ours, "hf_kdprune", ALL),
    "plain PyTorch": (plain, "torch", ALL),
    "ModelOpt": (modelopt, "nvidia-modelopt", ("forward_kl",)),
    "TRL GKD": (trl, "trl", ALL),
    "torchtune": (torchtune, "torchtune", BOTH_KL),
    "torchtune, 8 chunks": (torchtune_chunked, "torchtune", BOTH_KL),
}
CROSS_ENTROPIES = (("torchtune", "forward_kl"), ("torchtune, 8 chunks", "forward_kl"))  # no entropy taken off: judged as such


def file_of(package: str, path: str) -> ModuleType:
    """One file of an installed package, which needs torch alone, without the package: that would import all it depends on."""
    name = f"{package}_{Path(path).stem}"
    if name not in sys.modules:
        root = importlib.util.find_spec(package).submodule_search_locations[0]
        spec = importlib.util.spec_from_file_location(name, Path(root) / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
