"""What a model's output is, and which rows of it count."""

import pytest
import torch
from families import ANSWERS, CLASSIFIER, MASKED, TOKENS, build
from transformers.modeling_outputs import CausalLMOutput

from hf_kdprune.distill.head import Head, check_head, counts_of, head_of, rows_of, spans_of, total_of
from hf_kdprune.inputs import completed, made_up_inputs
from hf_kdprune.layers import inputs_of, positions_of, stacks_of


@pytest.mark.parametrize(
    ("name", "auto", "fields", "kind"),
    [
        ("bert", CLASSIFIER, {}, "single_label"),
        ("bert", CLASSIFIER, {"num_labels": 1}, "regression"),
        ("bert", CLASSIFIER, {"problem_type": "multi_label_classification"}, "multi_label"),
        ("bert", TOKENS, {}, "tokens"),
        ("bert", MASKED, {}, "tokens"),
        ("bert", ANSWERS, {}, "span"),
        ("gpt2", None, {}, "next_token"),
        ("opt", None, {}, "next_token"),
        ("t5", None, {}, "tokens"),
        ("bart", "AutoModelForCausalLM", {}, "next_token"),
        ("whisper", None, {}, "tokens"),
        ("vit", None, {}, "single_label"),
        ("wav2vec2", None, {}, "frames"),
        ("clip", None, {}, "none"),
        ("bert", "AutoModel", {}, "none"),
    ],
)
def test_the_head_is_read_from_the_model(name, auto, fields, kind):
    model = build(name, auto=auto, **fields)
    with torch.no_grad():
        assert head_of(model, model(**made_up_inputs(model)), None).kind == kind


def test_labels_of_several_classes_are_known_by_their_type():
    model = build("bert")
    with torch.no_grad():
        output = model(**made_up_inputs(model))
    assert head_of(model, output, torch.zeros(1, 3)).kind == "multi_label"


def test_a_head_that_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="BertModel gives none of these: set logits_weight=0"):
        check_head(Head("none"), build("bert", auto="AutoModel"))


def test_the_next_token_counts_where_it_is_labelled_and_this_one_real():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[-100, 5, 6, 7], [5, -100, 6, -100]])
    batch = {"input_ids": mask, "attention_mask": mask, "labels": labels}
    assert rows_of(Head("next_token"), batch).tolist() == [[False, True, True, False], [False, True, False, False]]
    assert counts_of(Head("next_token"), batch) == {"samples": 2, "one": 1, "main": 6, "decoder": 6, "rows": 3, "task": 4}
    unlabelled = rows_of(Head("next_token"), {k: v for k, v in batch.items() if k != "labels"})
    assert unlabelled.tolist() == [[False, True, True, False], [True, True, False, False]]


def test_answers_outside_of_the_text_do_not_count():
    ids = torch.ones(3, 6, dtype=torch.long)
    batch = {"input_ids": ids, "start_positions": torch.tensor([0, 6, -1]), "end_positions": torch.tensor([5, 9, 2])}
    assert [s.tolist() for s in spans_of(batch)] == [[0, -100, -100], [5, -100, 2]]
    counts = counts_of(Head("span"), batch)
    assert (counts["span0"], counts["span1"]) == (1, 2)


def test_counts_add_up():
    assert total_of([{"rows": 2, "one": 1}, {"rows": 3, "frames": 4, "one": 1}]) == {"rows": 5, "frames": 4, "one": 1}


def test_a_decoder_is_masked_where_its_labels_are(ragged):
    """Also where it reads as many tokens as the encoder, so that their number does not tell the two apart."""
    model, (batch,) = build("t5"), ragged(1, 4, seq=6)
    labels = torch.arange(24).view(4, 6) + 5
    labels[1:, 3:] = -100
    batch = completed(model, {**batch, "labels": labels})
    with torch.no_grad():
        stacks = stacks_of(model(**inputs_of(batch), output_hidden_states=True))
    assert torch.equal(positions_of(batch, stacks["decoder"][1], "decoder"), labels != -100)
    assert torch.equal(positions_of(batch, stacks["encoder"][1], "encoder"), batch["attention_mask"].bool())


def test_frames_of_padded_audio_are_known():
    model = build("wav2vec2", feat_extract_norm="layer")
    values, mask = torch.randn(2, 80), torch.ones(2, 80, dtype=torch.long)
    mask[1, 40:] = 0
    batch = completed(model, {"input_values": values, "attention_mask": mask})
    with torch.no_grad():
        output = model(**inputs_of(batch), output_hidden_states=True)
    found = positions_of(batch, output.hidden_states[1], "main")
    assert found[0].all() and 0 < int(found[1].sum()) < found.shape[1]
    assert isinstance(output, CausalLMOutput) and torch.equal(rows_of(Head("frames"), batch), found)
