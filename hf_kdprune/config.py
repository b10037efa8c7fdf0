"""KDPruneConfig: TrainingArguments and what this package adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .distill.objective import TERMS, Objective
from .prune.budget import Budget
from .prune.importance import check_importance
from .prune.schedule import SCHEDULES, Pruning


@dataclass
class KDPruneConfig(TrainingArguments):
    """Settings of KDPruneTrainer: all of TrainingArguments, and these.

    Raises:
        ValueError: A setting is none of those that this version knows; the message lists them.
    """

    task_weight: float = field(default=1.0, metadata={"help": "Weight of the ground truth in the first loss."})
    logits_weight: float = field(default=1.0, metadata={"help": "Weight of the teacher's output."})
    features_weight: float = field(default=1.0, metadata={"help": "Weight of the teacher's features."})
    auxiliary_weight: float = field(default=0.0, metadata={"help": "Weight of classifiers on each block (off)."})
    temperature: float = field(default=2.0, metadata={"help": "T of the logits term."})
    logits_loss: str = field(default="forward_kl", metadata={"help": "forward_kl, reverse_kl or js."})
    feature_loss: str = field(default="mse", metadata={"help": "mse, cosine, relations or cka."})
    layer_map: list | str | None = field(  # in this order HfArgumentParser takes it for a text
        default="auto", metadata={"help": "auto, last, uniform, or [[student, teacher], ...]; 0 is the embeddings."}
    )
    remap_labels: bool = field(
        default=False, metadata={"help": "The teacher's labels may stand in another order; they are matched by name."}
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "A folder for the teacher's logits, computed once and read by later runs."}
    )
    teacher_top_k: int | None = field(
        default=None, metadata={"help": "Keep only so many classes of each position there (language models)."}
    )
    evaluate_terms: bool = field(default=False, metadata={"help": "Log each term of the first loss in evaluation too."})
    learning_rate: float = field(  # the best of a sweep: docs/recovery.md
        default=1e-4, metadata={"help": "The initial learning rate of recovery."}
    )
    budget: str = field(default="macs=0.5", metadata={"help": "macs=, params=, latency=, heads=..,ffn=.., loss="})
    importance: str = field(default="feature_loss", metadata={"help": "The score that ranks units."})
    repair: bool = field(default=True, metadata={"help": "Refit output projections in closed form after surgery."})
    schedule: str = field(default="one_shot", metadata={"help": "one_shot, or gradual: in stages, with training between them."})
    pruning_rounds: int | None = field(
        default=None,
        metadata={"help": "Rounds of ranking without training. None: 4 where over 4/5 of what can go goes, else 1."},
    )
    pruning_stages: int = field(default=4, metadata={"help": "Stages of the gradual schedule."})
    shapes: str = field(default="free", metadata={"help": "free, uniform (all layers alike), or stock (no custom code)."})
    round_to: int = field(default=8, metadata={"help": "FFN widths are multiples of it (1: any)."})
    keep: list[str] = field(
        default_factory=list, metadata={"help": "Never removed: sites, layers, or units of a site (name:0,5 or name:0-3)."}
    )
    least: float | None = field(
        default=None,
        metadata={"help": "Units each site keeps: a share in (0, 1), or a number. None: none loses twice the mean share."},
    )
    latency_batch: int = field(default=32, metadata={"help": "Samples of the passes that a latency budget times."})
    calibration_samples: int = field(default=1024, metadata={"help": "Training samples that rank and repair use."})

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        super().__post_init__()
        Budget.parse(self.budget)
        check_importance(self.importance)
        self.objective()
        self.pruning().rules()  # raises where they are none
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {list(SCHEDULES)}, got {self.schedule!r}")
        if self.teacher_cache and self.features_weight:
            raise ValueError(
                f"teacher_cache holds the teacher's logits and not its features; got features_weight={self.features_weight}: "
                "set features_weight=0, or leave teacher_cache out"
            )
        if self.teacher_top_k is not None and not (self.teacher_cache and self.teacher_top_k > 0):
            raise ValueError(
                f"teacher_top_k is a number of classes, 1 or more, that teacher_cache keeps; got {self.teacher_top_k} with "
                f"teacher_cache={self.teacher_cache!r}"
            )
        if self.pruning_rounds is not None and self.pruning_rounds < 1:
            raise ValueError(f"pruning_rounds must be None or at least 1, got {self.pruning_rounds}")
        for name, least in (("latency_batch", 1), ("calibration_samples", 2), ("pruning_stages", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def objective(self) -> Objective:
        """The first loss as set here."""
        weights = {term: getattr(self, f"{term}_weight") for term in TERMS}
        return Objective(weights, self.temperature, self.logits_loss, self.feature_loss)

    def pruning(self) -> Pruning:
        """How to prune, as set here; the probe's seed follows `data_seed`, else `seed`."""
        seed = self.seed if self.data_seed is None else self.data_seed
        names = ("budget", "importance", "repair", "round_to", "shapes", "keep", "least", "latency_batch")
        return Pruning(**{name: getattr(self, name) for name in names}, seed=seed, rounds=self.pruning_rounds)
