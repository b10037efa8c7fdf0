"""Routed experts: their neurons are read and gated through an implementation of our own while that is asked for.

transformers computes all experts of a layer from stacked weights, with no module between up and down projection. The one here
does the same with one in between, `kdprune_read`, whose input is what the down projection reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

READ = "kdprune_read"
NAME = "kdprune"


def find_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of stacked experts in the common layout: gate and up in one tensor, no bias, not transposed."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "is_concatenated") and hasattr(module, "gate_up_proj") and common_layout(module)
    ]


def common_layout(experts: nn.Module) -> bool:
    """Whether `experts` computes down(act(gate) * up) from [gate; up]."""
    odd = experts.has_bias or experts.is_transposed or getattr(experts, "has_post_expert_norm", False)
    return experts.is_concatenated and experts.has_gate and not odd


@contextmanager
def readable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, each stack of experts has a module `kdprune_read` that passes on what the down projection reads."""
    found = [module for _, module in find_experts(model) if not hasattr(module, READ)]
    if not found:
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    configs = {id(m.config): (m.config, m.config._experts_implementation) for m in found}
    for module in found:
        module.add_module(READ, nn.Identity())
    for config, _ in configs.values():
        config._experts_implementation = NAME
    try:
        yield
    finally:
        for config, implementation in configs.values():
            config._experts_implementation = implementation
        for module in found:
            delattr(module, READ)


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As transformers' eager experts: hidden_states (tokens, hidden), routing (tokens, k) -> (tokens, hidden)."""
    routed = [torch.where(top_k_index == expert) for expert in range(len(experts.gate_up_proj))]
    read = hidden_states.new_zeros(*top_k_index.shape, experts.down_proj.shape[-1])
    for expert, (token, k) in enumerate(routed):
        gate, up = nn.functional.linear(hidden_states[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        read = read.index_put((token, k), experts.act_fn(gate) * up)
    read = getattr(experts, READ)(read)
    output = torch.zeros_like(hidden_states)
    for expert, (token, k) in enumerate(routed):
        made = nn.functional.linear(read[token, k], experts.down_proj[expert]) * top_k_weights[token, k, None]
        output = output.index_add(0, token, made.to(output.dtype))
    return output
