"""Every task that a Trainer knows, on a tiny model: nine ragged samples, a collator, and the gradient of one optimizer step.

Run by `torch.distributed.run` it writes the gradients of two ranks: see tests/test_tasks.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from families import ANSWERS, CLASSIFIER, MASKED, TOKENS, build
from torch import Tensor

from hf_kdprune import KDPruneConfig, KDPruneTrainer
from hf_kdprune.distill import trained_only

NO_DROPOUT = {  # name -> fields that switch off what is random in training
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "wav2vec2": {"attention_dropout": 0.0, "hidden_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
    | {"mask_time_prob": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "feat_extract_norm": "layer"},
}
TASKS = {  # name -> family, Auto class, other fields, and what a row is labelled with
    "single_label": ("bert", CLASSIFIER, {}, lambda i, n: {"labels": -100 if i == 2 else i % 3}),
    "multi_label": (
        *("bert", CLASSIFIER, {"problem_type": "multi_label_classification"}),
        lambda i, n: {"labels": [float(i >> bit & 1) for bit in range(3)]},
    ),
    "regression": ("bert", CLASSIFIER, {"num_labels": 1}, lambda i, n: {"labels": float(i)}),
    "token_classification": ("bert", TOKENS, {}, lambda i, n: {"labels": [-100, *((i + k) % 3 for k in range(n - 1))]}),
    "masked_lm": ("bert", MASKED, {}, lambda i, n: {"labels": [7 if (i + k) % 4 == 0 and i != 1 else -100 for k in range(n)]}),
    "answers": ("bert", ANSWERS, {}, lambda i, n: {"start_positions": 99 if i == 3 else i % n, "end_positions": n - 1}),
    "causal_lm": ("llama", None, {}, lambda i, n: {"labels": [-100] * (i % 3) + [5 + i + k for k in range(n - i % 3)]}),
    "seq2seq": ("t5", None, {}, lambda i, n: {"labels": [9 + i + k for k in range(2 + i % 4)]}),
    "images": ("vit", None, {}, lambda i, n: {"labels": i % 3}),
    "ctc": ("wav2vec2", None, {}, lambda i, n: {"labels": [4 + i, 5, 6][: 1 + i % 3]}),
}


def rows_of(task: str, count: int = 9) -> list[dict]:
    """Samples of different length."""
    family, _, _, label = TASKS[task]
    draw, rows = torch.Generator().manual_seed(0), []
    for i in range(count):
        length = 4 + (5 * i) % 8
        if family == "vit":
            row = {"pixel_values": torch.randn(3, 32, 32, generator=draw)}
        elif family == "wav2vec2":
            row = {"input_values": torch.randn(16 * length, generator=draw)}
        else:
            row = {"input_ids": torch.randint(5, 200, (length,), generator=draw)}
        rows.append({**row, **label(i, length)})
    return rows


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Pad on the right: inputs with 0, labels with -100."""
    batch = {name: [torch.as_tensor(row[name]) for row in rows] for name in rows[0]}
    for name in ("input_ids", "input_values"):
        if name in batch:
            ones = [torch.ones(len(x), dtype=torch.long) for x in batch[name]]
            batch["attention_mask"] = ones
    pad = lambda name, parts: torch.nn.utils.rnn.pad_sequence(parts, True, -100 if name == "labels" else 0)  # noqa: E731
    ragged = ("input_ids", "input_values", "attention_mask", "labels")
    return {n: pad(n, v) if n in ragged and v[0].dim() else torch.stack(v) for n, v in batch.items()}


def trainer_of(task: str, folder: Path, **settings: object) -> KDPruneTrainer:
    """A trainer whose student was pruned, with another teacher so that every term has a gradient."""
    family, auto, fields, _ = TASKS[task]
    fields = {**NO_DROPOUT.get(family, {}), **fields}
    defaults = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "round_to": 1, "use_cpu": True}
    config = KDPruneConfig(str(folder), **{**defaults, "budget": "macs=0.8", "repair": False, **settings})
    config.remove_unused_columns = False
    trainer = KDPruneTrainer(
        build(family, auto=auto, **fields),
        config,
        teacher=build(family, auto=auto, seed=1, **fields),
        train_dataset=rows_of(task),
        data_collator=collate,
    )
    trainer.prune()
    trained_only.attach(trainer.model, trainer.teacher, trainer.calibration, trainer.lesson, trainer.loss_terms)
    return trainer


def gradient(trainer: KDPruneTrainer, sizes: list[int], rows: list[dict]) -> Tensor:
    """Of one optimizer step over micro-batches of these sizes, all parameters in one vector."""
    parts = [collate(list(part)) for part in torch.utils.data.DataLoader(rows, sizes[0], collate_fn=list)]
    batches, counts = trainer.get_batch_samples(iter(parts), len(parts), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    model = trainer.model_wrapped
    model.zero_grad()
    for batch in batches:
        trainer.training_step(model, batch, counts)
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def main(folder: Path) -> None:
    """On two ranks: the gradient of each task, ranks of 2 micro-batches of 2."""
    found = {}
    for task in TASKS:
        trainer = trainer_of(
            task, folder / f"run-{task}", auxiliary_weight=float(task in ("single_label", "token_classification"))
        )
        trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
        rank = trainer.accelerator.process_index
        found[task] = gradient(trainer, [2, 2], rows_of(task)[4 * rank : 4 * rank + 4])
        trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        torch.save(found, folder / "gradients.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
