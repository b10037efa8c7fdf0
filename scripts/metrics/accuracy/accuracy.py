"""Accuracy as a local module of `evaluate`: `evaluate.load("scripts/metrics/accuracy")` needs no network."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = "The share of rows whose predicted class is the label."
INPUTS = """
Args:
    predictions: (rows,) predicted classes.
    references: (rows,) labels.

Returns:
    {"accuracy": share in [0, 1]}
"""


class Accuracy(evaluate.Metric):
    """The share of rows whose predicted class is the label."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}
