"""Auxiliary classifiers: their loss by hand for each kind of head, what of a batch they read, and that nothing stays."""

import math

import pytest
import torch
from families import ANSWERS, CLASSIFIER, CTC, MASKED, TOKENS, build

from hf_kdprune.distill import auxiliary
from hf_kdprune.distill.auxiliary import AuxiliaryClassifiers, attach, auxiliary_loss, check_auxiliary, detach
from hf_kdprune.distill.first_loss import blocks
from hf_kdprune.distill.head import Head, head_of

WIDTHS, CLASSES, LENGTHS = [6, 4, 8], 3, [5, 2, 4, 1]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
LABELS = {
    "single_label": torch.tensor([2, -100, 0, 1]),
    "multi_label": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.5, 1.0, 0.0], [1.0, 1.0, 1.0]]),
    "regression": torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [2.0, 2.0, 2.0]]),
    "tokens": torch.tensor([[0, 1, 2, -100, 1], [1, -100, -100, -100, -100], [-100, 0, 2, 2, -100], [1, *[-100] * 4]]),
}


def drawn(dtype=torch.float32):
    """Features of three blocks, and classifiers."""
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(4, 5, width, generator=draw).to(dtype) for width in WIDTHS]
    torch.manual_seed(0)
    return states, AuxiliaryClassifiers(WIDTHS, CLASSES)


def loss_of(kind, states, classifiers, rows=slice(None)):
    """The package's loss of some rows, and the gradients by features and classifiers."""
    states = [state[rows].detach().requires_grad_() for state in states]
    head, batch = Head(kind), {"attention_mask": MASK[rows].long(), "labels": LABELS[kind][rows]}
    loss = auxiliary_loss(head, classifiers(states, [MASK[rows]] * 3, head.by_token), batch)
    return loss.detach(), torch.autograd.grad(loss, [*states, *classifiers.parameters()])


def by_hand(kind, states, classifiers):
    """The same, item by item."""
    total = 0.0
    for state, linear in zip(states, classifiers.heads, strict=True):
        weight, bias = linear.weight.double(), linear.bias.double()
        for x, length, label in zip(state.double(), LENGTHS, LABELS[kind], strict=True):
            read = x[:length] if kind == "tokens" else [sum(x[:length]) / length]
            for vector, wanted in zip(read, label if kind == "tokens" else [label], strict=False):
                logits = weight @ vector + bias
                if kind == "multi_label":
                    p = 1 / (1 + (-logits).exp())
                    total -= (wanted * p.log() + (1 - wanted) * (1 - p).log()).sum() / CLASSES
                elif kind == "regression":
                    total += (logits - wanted).square().sum() / CLASSES
                elif wanted != -100:
                    total -= logits[wanted] - logits.exp().sum().log()
    return total / len(states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LABELS)
def test_it_is_the_task_loss_summed_over_items_and_a_mean_over_blocks(kind, dtype):
    states, classifiers = drawn(dtype)
    value, gradients = loss_of(kind, states, classifiers)
    states = [state.requires_grad_() for state in states]
    expected = by_hand(kind, states, classifiers)
    wanted = torch.autograd.grad(expected, [*states, *classifiers.parameters()])
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(gradients, wanted, strict=True):
        rounding = 4 * torch.finfo(mine.dtype).eps if mine.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(mine, theirs, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("kind", LABELS)
def test_rows_one_at_a_time_add_up(kind):
    states, classifiers = drawn()
    value, gradients = loss_of(kind, states, classifiers)
    parts = [loss_of(kind, states, classifiers, slice(i, i + 1)) for i in range(4)]
    assert value.item() == pytest.approx(sum(part.item() for part, _ in parts), rel=1e-6)
    for i, whole in enumerate(gradients[3:], 3):
        torch.testing.assert_close(whole, sum(part[i] for _, part in parts))


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("kind", LABELS)
def test_padding_may_hold_anything(kind, junk):
    states, classifiers = drawn()
    value, gradients = loss_of(kind, states, classifiers)
    for state in states:
        state[~MASK] = junk
    again, now = loss_of(kind, states, classifiers)
    assert torch.equal(again, value) and all(torch.equal(a, b) for a, b in zip(now, gradients, strict=True))
    assert all((gradient[~MASK] == 0).all() for gradient in now[:3])


def test_labels_may_stand_in_a_column():
    _, classifiers = drawn()
    logits = [torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(1))] * 3
    mask = MASK.long()
    for kind, labels in (("single_label", LABELS["single_label"]), ("regression", torch.arange(4.0))):
        outputs = logits if kind == "single_label" else [x[:, :1] for x in logits]
        flat, column = (
            auxiliary_loss(Head(kind), outputs, {"attention_mask": mask, "labels": y}) for y in (labels, labels[:, None])
        )
        assert flat == column > 0


def test_a_batch_without_a_label_is_zero_and_has_a_graph():
    states, classifiers = drawn()
    logits = classifiers([state.requires_grad_() for state in states], [MASK] * 3, True)
    batch = {"attention_mask": MASK.long(), "labels": torch.full((4, 5), -100)}
    loss = auxiliary_loss(Head("tokens"), logits, batch)
    assert loss == 0 and (torch.autograd.grad(loss, states[0])[0] == 0).all()


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "regression"])
def test_a_sample_without_a_real_position_is_judged_by_the_bias(kind):
    states, classifiers = drawn()
    states = [state.requires_grad_() for state in states]
    logits = classifiers(states, [MASK & (torch.arange(4) != 1)[:, None]] * 3, False)
    for x, linear in zip(logits, classifiers.heads, strict=True):
        assert torch.equal(x[1], linear.bias)
    loss = auxiliary_loss(Head(kind), logits, {"attention_mask": MASK.long(), "labels": LABELS[kind]})
    gradients = torch.autograd.grad(loss, states)
    assert loss.isfinite() and all(g.isfinite().all() and (g[1] == 0).all() and g.any() for g in gradients)


@pytest.mark.parametrize("kind", LABELS)
def test_classifiers_of_a_bf16_model_are_bf16_and_the_loss_float32(kind):
    model = build("bert", auto=CLASSIFIER).to(torch.bfloat16)
    attach(model, WIDTHS, CLASSES)
    classifiers, (states, _) = getattr(model, auxiliary.NAME), drawn(torch.bfloat16)
    assert {p.dtype for p in classifiers.parameters()} == {torch.bfloat16}
    logits = classifiers(states, [MASK] * 3, kind == "tokens")
    batch = {"attention_mask": MASK.long(), "labels": LABELS[kind]}
    low, high = (auxiliary_loss(Head(kind), [x.to(dtype) for x in logits], batch) for dtype in (torch.bfloat16, torch.float64))
    assert low.dtype == torch.float32 and low.item() == pytest.approx(high.item(), rel=1e-6)


def inputs(model, family):
    """A batch that the family reads."""
    draw = torch.Generator().manual_seed(0)
    if family in ("vit", "swin"):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=draw)}
    if family == "wav2vec2":
        return {"input_values": torch.randn(2, 200, generator=draw)}
    ids = torch.randint(5, 200, (2, 6), generator=draw)
    ids[:, -1] = 2  # by which some heads know the end
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids[:, :4]} if family == "t5" and model.can_generate() else batch


@pytest.mark.parametrize("family, auto", [("bert", CLASSIFIER), ("llama", TOKENS), ("bart", CLASSIFIER), ("swin", None)])
def test_each_block_of_a_model_has_one_and_learns_from_it(family, auto):
    model = build(family, auto=auto)
    before = set(model.state_dict())
    batch = inputs(model, family)
    output = model(**batch, output_hidden_states=True)
    states, masks = blocks(output, batch)
    head = head_of(model, output, None)
    check_auxiliary(head, model)
    attach(model, [state.shape[-1] for state in states], 3)
    classifiers = getattr(model, auxiliary.NAME)
    assert len(classifiers.heads) == len(states) >= 2
    mine = {name for name in model.state_dict() if name.startswith(auxiliary.NAME)}
    assert set(model.state_dict()) == before | mine and len(mine) == 2 * len(states)
    assert {id(p) for p in classifiers.parameters()} <= {id(p) for p in model.parameters()}
    shape = batch["input_ids"].shape if head.by_token else (2,)
    labels = torch.arange(math.prod(shape)).view(shape) % 3
    loss = auxiliary_loss(head, classifiers(states, masks, head.by_token), {**batch, "labels": labels})
    for state in states:  # the last of a swin is reached through its own classifier alone
        assert torch.autograd.grad(loss, state, retain_graph=True)[0].abs().max() > 0
    detach(model)
    assert set(model.state_dict()) == before and not hasattr(model, auxiliary.NAME)
    detach(model)  # of nothing is nothing


TAKEN = [("bert", CLASSIFIER), ("bert", TOKENS), ("llama", CLASSIFIER), ("llama", TOKENS), ("vit", None), ("t5", CLASSIFIER)]
REFUSED = {
    ("bert", MASKED): "the head of BertForMaskedLM is a language model: set auxiliary_weight=0",
    ("llama", None): "the head of LlamaForCausalLM is a language model: set auxiliary_weight=0",
    ("t5", None): "the head of T5ForConditionalGeneration is a language model: set auxiliary_weight=0",
    ("bert", "AutoModelForMultipleChoice"): "the head of BertForMultipleChoice is multiple choice: set auxiliary_weight=0",
    ("bert", ANSWERS): "the head of BertForQuestionAnswering is of kind 'span': set auxiliary_weight=0",
    ("bert", "AutoModel"): "the head of BertModel is of kind 'none': set auxiliary_weight=0",
    ("wav2vec2", CTC): "the head of Wav2Vec2ForCTC is of kind 'frames': set auxiliary_weight=0",
}


@torch.no_grad()
def headed(family, auto):
    """A model and its head."""
    model = build(family, auto=auto)
    batch = inputs(model, family)
    if auto == "AutoModelForMultipleChoice":
        batch = {name: x[None] for name, x in batch.items()}
    return model, head_of(model, model(**batch), None)


@pytest.mark.parametrize("family, auto", TAKEN)
def test_classifiers_are_taken(family, auto):
    model, head = headed(family, auto)
    check_auxiliary(head, model)


@pytest.mark.parametrize("family, auto", REFUSED)
def test_other_heads_are_refused(family, auto):
    model, head = headed(family, auto)
    with pytest.raises(ValueError, match="auxiliary_weight > 0 wants a classification or regression head") as error:
        check_auxiliary(head, model)
    assert str(error.value).endswith(REFUSED[family, auto])


def test_adapters_do_not_hide_what_is_under_them(lora, tiny):
    model = lora(tiny("bert"))
    check_auxiliary(Head("single_label"), model)
    with pytest.raises(ValueError, match="the head of BertForSequenceClassification is of kind 'span'"):
        check_auxiliary(Head("span"), model)
