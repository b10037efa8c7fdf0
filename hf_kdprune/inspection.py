"""Looks at a model before anything is removed: what a plan would keep, and what each size would lose. For `kdprune inspect`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedModel

from .demo.data import load_text_data, tokenize
from .layers import match_layers
from .prune.allocation import Scores
from .prune.budget import Budget
from .prune.importance import check_importance, score_units
from .prune.judge import feature_judge
from .prune.schedule import Pruning, check_budget, make_plan
from .prune.sites import Plan
from .publish.checkpoint import load_pretrained
from .samples import by_length, split

Batch = dict[str, Tensor]
BATCH = 32
POINTS = 40
JUDGES = 8  # every eighth text judges a budget of "loss="


@dataclass(frozen=True)
class Ranking:
    """A model whose units were ranked once on real text.

    Attributes:
        model: The model; it is not changed.
        batches: What ranks, and what repair would use.
        scores: What each unit is worth.
        pruning: How to plan.
        judging: What judges a budget of "loss="; none of `batches` is in it.
    """

    model: PreTrainedModel
    batches: list[Batch]
    scores: Scores
    pruning: Pruning
    judging: list[Batch] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What the sum of the removed units' scores is."""
        name = self.scores.importance
        return "predicted feature loss" if name.startswith("feature_loss") else f"sum of removed scores ({name})"

    def plan(self) -> Plan:
        """The plan under the budget; of a latency or a loss after it was measured."""
        judge = None
        if self.judging:
            judge = feature_judge(self.model, None, self.judging, match_layers(self.model, None, self.batches))
        return make_plan(self.model, self.scores, self.batches, self.pruning, judge)

    def curve(self, points: int = POINTS) -> list[dict[str, float]]:
        """Predicted feature loss against MACs, from the fewest that can be left to all of them.

        Returns:
            For each budget: "share" of the MACs that is left, "macs" of a sample, and "loss", the sum of the removed units'
            scores: the second loss, in the metric of the ranking, before any repair.
        """
        sites, rules, found = self.scores.sites, self.pruning.rules(), []
        for share in np.linspace(self.scores.lowest("macs", rules), 1, points):
            plan = self.scores.plan(f"macs={min(1, share + 5e-7):.6f}", **asdict(rules))
            macs = sites.macs({name: len(kept) for name, kept in plan.kept.items()})
            loss = sum(float(self.scores.values[site.name][site.removed].sum()) for site in plan.sites)
            found.append({"share": macs / sites.macs(), "macs": macs, "loss": loss})
        return found


def rank_on_text(name: str, dataset: str | None, samples: int, pruning: Pruning) -> Ranking:
    """Load a model and rank its units once on real text.

    Args:
        name: Hub id or path of the model.
        dataset: Hub id, or a folder with train and test files; None: Banking77, embedded.
        samples: Texts that rank.
        pruning: The score, and what will be planned for.

    Raises:
        ValueError: No score, no budget that can be planned for here, too few texts, or a model that reads no text.
    """
    check_importance(pruning.importance)
    pruning.rules()
    budget = Budget.parse(pruning.budget)
    if budget.limits[0].unit == "%":
        raise ValueError(
            f"budget {budget.asked!r} bounds a metric, which a command does not know: give a KDPruneTrainer compute_metrics= "
            f'and KDPruneConfig(budget="{budget.asked}"), or bound the feature loss: "loss=0.1"'
        )
    model = load_pretrained(name).eval()
    batches, judging = text_batches(model, name, dataset, samples)
    if budget.counts != "loss":  # what would judge may rank
        batches, judging = batches + judging, []
    check_budget(model, batches, pruning)
    return Ranking(model, batches, score_units(model, None, batches, pruning.importance), pruning, judging)


def text_batches(model: PreTrainedModel, name: str, dataset: str | None, samples: int) -> tuple[list[Batch], list[Batch]]:
    """Real texts through the model's own tokenizer, seven eighths and one, in batches of like length without labels."""
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"units are ranked on texts here, and {type(model).__name__} reads {model.main_input_name!r}: rank it by hand with "
            "score_units(model, None, batches)"
        )
    if samples < 2 * BATCH:
        raise ValueError(f"samples must be at least {2 * BATCH}, two batches, got {samples}: give --samples more")
    tokenizer, data = AutoTokenizer.from_pretrained(name), load_text_data(dataset)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = data.train.shuffle(seed=0).select(range(min(samples, len(data.train))))
    ids = tokenize(rows, tokenizer, data.texts).remove_columns("label")
    loaders = [by_length(part, DataCollatorWithPadding(tokenizer), BATCH) for part in split(ids, len(ids) // JUDGES, seed=0)]
    judging, batches = ([dict(batch.to(model.device)) for batch in loader] for loader in loaders)
    return batches, judging
