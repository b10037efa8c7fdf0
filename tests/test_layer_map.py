"""Which student layer learns from which teacher layer."""

import itertools

import pytest
import torch

from hf_kdprune.layer_map import layer_pairs, most_alike, similarity
from hf_kdprune.layers import match_layers


@pytest.mark.parametrize(
    ("layer_map", "students", "teachers", "pairs"),
    [
        ("auto", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ("uniform", 3, 6, [(1, 2), (2, 4), (3, 6)]),
        ("auto", 4, 2, [(1, 1), (2, 1), (3, 2), (4, 2)]),
        ("auto", 6, 1, [(i, 1) for i in range(1, 7)]),
        ("last", 3, 12, [(3, 12)]),
        ([[0, 0], [3, 5]], 3, 6, [(0, 0), (3, 5)]),
    ],
)
def test_layers_are_paired_by_depth(layer_map, students, teachers, pairs):
    assert layer_pairs(layer_map, students, teachers) == pairs


@pytest.mark.parametrize("layer_map", ["first", [], [[1]], [[4, 1]], [[1, 7]], [[-1, 1]], [[1, 2, 3]]])
def test_a_map_that_does_not_fit_is_refused_with_the_rule(layer_map):
    with pytest.raises(ValueError, match='layer_map must be "auto", "last", "uniform" or a list of .* got'):
        layer_pairs(layer_map, 3, 6)


@pytest.mark.parametrize("seed", range(5))
def test_the_layers_that_are_most_alike_are_found(seed):
    similar = torch.rand(3, 6, generator=torch.Generator().manual_seed(seed))
    orders = [(*way, 5) for way in itertools.combinations_with_replacement(range(6), 2)]
    best = max(orders, key=lambda order: float(sum(similar[i, t] for i, t in enumerate(order))))
    assert tuple(most_alike(similar)) == best


def test_similarity_does_not_see_rotation_scale_and_shift():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=draw), torch.randn(50, 4, generator=draw)
    turned = 3 * x @ torch.linalg.qr(torch.randn(6, 6, generator=draw))[0] + 7
    found = similarity([x], [turned, y])
    assert found[0, 0] == pytest.approx(1, abs=1e-6) and 0 < found[0, 1] < 0.5


def test_auto_follows_what_the_layers_do(tiny, ragged):
    """A teacher whose first two blocks do nothing: the student's layers learn from the others."""
    teacher, student = tiny(num_hidden_layers=4), tiny(num_hidden_layers=2)
    blocks = teacher.bert.encoder.layer
    for block, own in zip(blocks[2:], student.bert.encoder.layer, strict=True):
        block.load_state_dict(own.state_dict())
    teacher.bert.embeddings.load_state_dict(student.bert.embeddings.state_dict())
    with torch.no_grad():
        for block in blocks[:2]:
            for name in ("attention.output.dense", "output.dense"):
                block.get_submodule(name).weight.zero_()
                block.get_submodule(name).bias.zero_()
    found = match_layers(student, teacher, ragged(4, 8), "auto")
    assert [(m.student, m.teacher) for m in found] == [(1, 3), (2, 4)]
    uniform = match_layers(student, teacher, ragged(4, 8), "uniform")
    assert [(m.student, m.teacher) for m in uniform] == [(1, 2), (2, 4)]
