"""Keeps a model whole where a Trainer would wrap, shard or mark it: before training and after it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .distill.teacher import placed


def check_sharding(trainer: Trainer) -> None:
    """Raise unless the student is whole on each process until it was pruned; bring it to the device where nobody else does.

    Raises:
        ValueError: FSDP or DeepSpeed is set otherwise.
    """
    trainer.bare = None  # what it is called while a model without weights stands for the one that is sharded
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version must be 2, got {plugin.fsdp_version}: take scripts/accelerate/fsdp2.yaml")
    if plugin is not None and "FULL" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type must be FULL_STATE_DICT, so that any checkpoint can be loaded; got {plugin.state_dict_type}"
        )
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading must be false: with it only the first process has weights, and every process ranks"
        )
    if any(hasattr(p, "ds_id") for p in trainer.model.parameters()):
        raise ValueError(
            "the model must be whole when it is pruned, and DeepSpeed ZeRO-3 partitioned it while it was loaded: set "
            "zero3_init_flag to false (scripts/accelerate/zero3.yaml), or load it before KDPruneConfig is made"
        )
    if shards(trainer) and hasattr(trainer.model, "get_base_model"):
        raise ValueError("FSDP and ZeRO-3 train a model without adapters, got one of PEFT: merge them, or take DDP or ZeRO-2")
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = blocks_of(trainer.model)
    unplaced = trainer.args.bf16_full_eval or trainer.args.fp16_full_eval  # until the Trainer evaluates or trains
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or unplaced:
        placed(trainer.model, trainer.args.device)


def blocks_of(model: PreTrainedModel) -> list[str]:
    """Classes of modules to shard one by one; not what holds the embeddings (BERT), which accelerate would shard twice."""
    words, modules = model.get_input_embeddings(), list(model.modules())
    named = [module for module in modules if type(module).__name__ in (model._no_split_modules or ())]
    around = {type(module).__name__ for module in named if any(inner is words for inner in module.modules())}
    return sorted({type(module).__name__ for module in named} - around)


def shards(trainer: Trainer) -> bool:
    """Whether no process has all weights while it trains."""
    return trainer.is_fsdp_enabled or (
        trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    )


@contextmanager
def as_it_is(trainer: Trainer) -> Iterator[None]:
    """Evaluate in this block without preparing the model for it, unless it is being trained.

    Accelerate marks a model that is evaluated as prepared, and then no longer wraps it for training: the ranks would train each
    its own model, apart. FSDP and DeepSpeed would want an optimizer. And bf16_full_eval casts the weights, for good.

    Args:
        trainer: Whose model is evaluated, or another one that stands in for it.
    """
    if trainer.is_in_train:
        yield
        return
    sharded = trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled
    trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
    try:
        with uncast(trainer.model, trainer.args):
            yield
    finally:
        trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = sharded
        unprepare(trainer)


def unprepare(trainer: Trainer) -> None:
    """Undo what accelerate did to the model of a trainer, so that it is no longer in mixed precision by itself.

    Else it would be judged in bfloat16, and saved in float32; and a later training would not prepare it.
    """
    model = trainer.model
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    trainer.accelerator._models = [m for m in trainer.accelerator._models if m is not model]
    vars(model).pop("_is_accelerate_prepared", None)


@contextmanager
def uncast(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Behind this block the weights are those of before, also where an evaluation in half precision cast them."""
    if not (args.bf16_full_eval or args.fp16_full_eval):
        yield
        return
    weights, buffers = [(p, p.data) for p in model.parameters()], [(m._buffers, {**m._buffers}) for m in model.modules()]
    try:
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
        for mine, old in buffers:
            mine.update(old)


@contextmanager
def whole_afterwards(trainer: Trainer) -> Iterator[None]:
    """Train in this block; if that shards the model, the trainer has it whole again afterwards, on every process."""
    if not shards(trainer):
        yield
        return
    trainer.bare = without_weights(trainer.model)
    yield
    model, state = trainer.bare, whole_state(trainer)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    trainer.optimizer = trainer.lr_scheduler = trainer.deepspeed = trainer.bare = None
    trainer.accelerator.free_memory()
    model.load_state_dict({name: tensor.to(types[name]) for name, tensor in state.items()}, assign=True)
    model.tie_weights()
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model.to(trainer.args.device)


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with parameters that have shapes only; sharding changes the classes of the model itself."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)  # what stands in the memo is taken for the copy


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """All weights of a sharded model, on every process."""
    model = trainer.model
    if trainer.is_fsdp_enabled:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
