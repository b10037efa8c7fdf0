"""Losses between logits: each against its formula in float64 with autograd, whatever the chunks, the mask and the dtype."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_kdprune.distill import divergence as chunked
from hf_kdprune.distill.logits import LOGITS_LOSSES, TopK, binary_divergence, divergence, squared_difference


def plain(student, teacher, rows, temperature, kind):
    """The definition, in float64, of the rows that count."""
    s, t = ((x[rows].double() / temperature).softmax(-1) for x in (student, teacher))
    m = (s + t) / 2
    if kind == "js":
        each = (s * (s / m).log() + t * (t / m).log()).sum(-1) / 2
    else:
        p, q = (t, s) if kind == "forward_kl" else (s, t)
        each = (p * (p / q).log()).sum(-1)
    return temperature**2 * each.sum()


def bucketed(student, top, indices, rows, temperature):
    """The forward KL between the k classes and all others as one, in float64."""
    s = (student[rows].double() / temperature).softmax(-1)
    s_top, t_top = s.gather(-1, indices[rows]), top[rows].double().exp()
    each = (t_top * (t_top / s_top).log()).sum(-1)
    s_rest, t_rest = 1 - s_top.sum(-1), 1 - t_top.sum(-1)
    return temperature**2 * (each + t_rest * (t_rest / s_rest).log()).sum()


def derivative(loss, logits, *args):
    """The loss of logits, and its gradient by them."""
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, *args)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def drawn(*shape, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(*shape, generator=draw)).to(dtype) for _ in range(2)]


def mask_of(*shape, seed=1):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask.view(-1)[0], mask.view(-1)[1] = True, False
    return mask


def top_of(logits, k, temperature):
    return TopK(*(logits / temperature).log_softmax(-1).topk(k))


@pytest.fixture(params=[1, 3, 1000], ids=lambda rows: f"chunks of {rows}")
def chunk(request, monkeypatch):
    """Chunks of so many rows of 7 float64 classes: of one, ragged at the end, all at once."""
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", request.param * 7 * 8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("kind", LOGITS_LOSSES)
def test_value_and_gradient_are_those_of_the_formula(kind, temperature, masked, chunk):
    student, teacher = drawn(2, 5, 7, dtype=torch.float64)
    rows = mask_of(2, 5) if masked else torch.ones(2, 5, dtype=torch.bool)
    value, gradient = derivative(divergence, student, teacher, rows, temperature, kind)
    expected, by_autograd = derivative(plain, student, teacher, rows, temperature, kind)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-10, atol=1e-12)
    assert (gradient[~rows] == 0).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", LOGITS_LOSSES)
def test_low_precision_rounds_the_gradient_and_not_the_loss(kind, masked, dtype, tolerance, chunk):
    student, teacher = drawn(11, 7, dtype=dtype)
    rows = mask_of(11) if masked else torch.ones(11, dtype=torch.bool)
    value, gradient = derivative(divergence, student, teacher.double(), rows, 2.0, kind)
    expected, by_autograd = derivative(plain, student.double(), teacher, rows, 2.0, kind)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    assert value.item() == pytest.approx(expected.item(), rel=2e-6)
    torch.testing.assert_close(gradient.double(), by_autograd, rtol=2 * tolerance, atol=tolerance / 100 + 2e-7)


def test_a_scale_that_bfloat16_cannot_hold_does_not_bias_the_gradient():
    student, teacher = drawn(64, 50, dtype=torch.bfloat16)
    rows, n = torch.ones(64, dtype=torch.bool), 357  # 1/357 is 0.17 % off in bfloat16
    _, gradient = derivative(lambda s: divergence(s, teacher, rows, 1.0, "forward_kl") / n, student)
    _, exact = derivative(lambda s: plain(s, teacher, rows, 1.0, "forward_kl") / n, student.double())
    slope = (gradient.double() * exact).sum() / exact.square().sum()
    assert slope.item() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("kind", LOGITS_LOSSES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_do_not_count_may_hold_anything(kind, bad, chunk):
    student, teacher = drawn(2, 5, 7)
    rows = mask_of(2, 5)
    clean = derivative(divergence, student, teacher, rows, 2.0, kind)
    student[~rows], teacher[~rows] = bad, bad
    value, gradient = derivative(divergence, student, teacher, rows, 2.0, kind)
    assert value == clean[0] and torch.equal(gradient, clean[1])


def test_nan_in_a_row_that_counts_is_not_hidden():
    student, teacher = drawn(3, 7)
    student[1, 2] = math.nan
    assert divergence(student, teacher, torch.ones(3, dtype=torch.bool), 2.0, "forward_kl").isnan()


@pytest.mark.parametrize("shape", [(2, 5, 7), (0, 7)])
@pytest.mark.parametrize("loss", ["divergence", "binary", "squared", "top"])
def test_no_rows_are_zero_with_a_graph(loss, shape):
    student, teacher = drawn(*shape)
    rows = torch.zeros(shape[:-1], dtype=torch.bool)
    value, gradient = derivative(
        {
            "divergence": lambda s: divergence(s, teacher, rows, 2.0, "js"),
            "binary": lambda s: binary_divergence(s, teacher, rows, 2.0, "js"),
            "squared": lambda s: squared_difference(s, teacher, rows),
            "top": lambda s: divergence(s, top_of(teacher, 3, 2.0), rows, 2.0, "forward_kl"),
        }[loss],
        student,
    )
    assert value == 0 and torch.equal(gradient, torch.zeros(shape))


@pytest.mark.parametrize("masked", [False, True])
def test_strides_do_not_matter(masked):
    student, teacher = drawn(7, 6, 2)
    rows = mask_of(2, 5) if masked else torch.ones(2, 5, dtype=torch.bool)
    student, teacher = (x.permute(2, 1, 0)[:, :-1] for x in (student, teacher))
    assert not student.is_contiguous()
    value, gradient = derivative(divergence, student, teacher, rows, 2.0, "forward_kl")
    expected, by_autograd = derivative(plain, student, teacher, rows, 2.0, "forward_kl")
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LOGITS_LOSSES)
def test_extreme_logits_and_ruled_out_classes_give_no_nan(kind):
    student, teacher = (1e4 * x for x in drawn(5, 7))
    student[:, 3], teacher[:, 3] = -math.inf, -math.inf  # as where a vocabulary is padded
    rows, others = torch.ones(5, dtype=torch.bool), [0, 1, 2, 4, 5, 6]
    value, gradient = derivative(divergence, student, teacher, rows, 2.0, kind)
    expected = divergence(student[:, others].double(), teacher[:, others].double(), rows, 2.0, kind)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradient.isfinite().all() and (gradient[:, 3] == 0).all()


@pytest.mark.parametrize("kind", LOGITS_LOSSES)
def test_zero_at_equality_and_shifts_change_nothing(kind):
    student, teacher = drawn(5, 7, dtype=torch.float64)
    rows = torch.ones(5, dtype=torch.bool)
    value, gradient = derivative(divergence, student, student + 3.0, rows, 2.0, kind)
    assert abs(value) < 1e-12 and gradient.abs().max() < 1e-12
    assert divergence(student, teacher, rows, 2.0, kind) > 0.1


def test_forward_kl_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert divergence(student, teacher, torch.tensor([True]), 1.0, "forward_kl").item() == pytest.approx(expected, rel=1e-5)


def test_gradient_keeps_its_size_as_temperature_grows():
    """T^2 KL tends to the squared difference of centred logits over twice the classes (Hinton 2015, section 2.1)."""
    student, teacher = drawn(5, 7, dtype=torch.float64)
    difference = (student - teacher) - (student - teacher).mean(-1, keepdim=True)
    value = divergence(student, teacher, torch.ones(5, dtype=torch.bool), 1e4, "forward_kl")
    assert value.item() == pytest.approx(difference.square().sum().item() / 2 / 7, rel=1e-2)


def test_js_is_bounded():
    student, teacher = (100 * x for x in drawn(50, 7))
    value = divergence(student, teacher, torch.ones(50, dtype=torch.bool), 1.0, "js").item()
    assert 20 * math.log(2) < value <= 50 * math.log(2) * (1 + 1e-6)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad])
def test_no_gradient_is_computed_unless_wanted(grad, monkeypatch):
    student, teacher = drawn(5, 7)
    monkeypatch.setattr(chunked, "put", lambda *_: pytest.fail("a gradient was written"))
    with grad():
        value = divergence(student.requires_grad_(grad is torch.no_grad), teacher, mask_of(5), 2.0, "js")
    assert not value.requires_grad and value.item() == pytest.approx(plain(student, teacher, mask_of(5), 2.0, "js").item())


def test_teacher_gets_no_gradient():
    student, teacher = (x.requires_grad_() for x in drawn(5, 7))
    (divergence(student, teacher, mask_of(5), 2.0, "js") + squared_difference(student, teacher, mask_of(5))).backward()
    assert student.grad is not None and teacher.grad is None


def test_autocast_changes_nothing():
    student, teacher = drawn(5, 7)
    rows = torch.ones(5, dtype=torch.bool)
    outside = derivative(divergence, student, teacher, rows, 2.0, "forward_kl")
    with torch.autocast("cpu", torch.bfloat16):
        inside = derivative(divergence, student, teacher, rows, 2.0, "forward_kl")
    assert inside[0].dtype == torch.float32 and all(map(torch.equal, inside, outside))


def test_gradient_is_the_buffer_itself_and_is_asked_for_once():
    student, teacher = drawn(5, 7)
    student.requires_grad_()
    value = divergence(student, teacher, torch.ones(5, dtype=torch.bool), 2.0, "forward_kl")
    address = value.grad_fn.gradient.data_ptr()
    value.backward(retain_graph=True)
    assert student.grad.data_ptr() == address
    with pytest.raises(RuntimeError, match="compute the loss again"):
        value.backward()


class Allocations(TorchDispatchMode):
    """Sizes in bytes of all storages that operations gave, by address; none is freed while this looks."""

    def __init__(self):
        super().__init__()
        self.sizes, self.held = {}, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.sizes[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
                self.held.append(leaf)
        return out


@pytest.mark.parametrize("inputs", ["whole", "masked", "strided", "bfloat16", "top"])
def test_one_tensor_of_the_size_of_the_logits_is_made(inputs, monkeypatch):
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 2 * 500 * 4)
    student, teacher = drawn(2, 21, 500, dtype=torch.bfloat16 if inputs == "bfloat16" else torch.float32)
    rows = mask_of(2, 20) if inputs == "masked" else torch.ones(2, 20, dtype=torch.bool)
    student, teacher = (x[:, :-1] if inputs == "strided" else x[:, :-1].contiguous() for x in (student, teacher))
    teacher = top_of(teacher, 3, 2.0) if inputs == "top" else teacher
    student = student.detach().requires_grad_()
    given = {x.untyped_storage().data_ptr() for x in (student, teacher) if isinstance(x, torch.Tensor)}
    with Allocations() as seen:
        torch.autograd.grad(divergence(student, teacher, rows, 2.0, "forward_kl"), student)
    sizes = sorted(size for address, size in seen.sizes.items() if address not in given)
    assert sizes[-1] == student.numel() * student.element_size() and sizes[-2] <= 2 * 500 * 4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_likeliest_classes_are_buckets(k, masked, chunk):
    student, teacher = drawn(2, 5, 7, dtype=torch.float64)
    rows = mask_of(2, 5) if masked else torch.ones(2, 5, dtype=torch.bool)
    top = top_of(teacher, k, 2.0)
    value, gradient = derivative(divergence, student, top, rows, 2.0, "forward_kl")
    expected, by_autograd = derivative(bucketed, student, top.log_probs, top.indices, rows, 2.0)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-9, atol=1e-12)
    whole = divergence(student, teacher, rows, 2.0, "forward_kl")
    assert value < whole if k < 6 else value.item() == pytest.approx(whole.item())  # of 7: one other class is no bucket


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_classes_as_the_likeliest_are_the_whole(dtype):
    student, teacher = drawn(2, 5, 7, dtype=dtype)
    rows = mask_of(2, 5)
    whole = derivative(divergence, student, teacher, rows, 2.0, "forward_kl")
    top = derivative(divergence, student, top_of(teacher.float(), 7, 2.0), rows, 2.0, "forward_kl")
    assert top[0].item() == pytest.approx(whole[0].item(), rel=2e-6)
    torch.testing.assert_close(top[1], whole[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_an_empty_rest_is_no_nan_and_its_rounding_is_not_seen():
    student, teacher = drawn(64, 7)
    teacher[:, 2:] -= 300.0  # the teacher is sure that it is one of two
    student[:32, 2:] = -math.inf  # and so, of half of the rows, is the student
    rows, top = torch.ones(64, dtype=torch.bool), top_of(teacher, 2, 1.0)
    assert (top.log_probs[:32].logsumexp(-1) < 0).any()
    value, gradient = derivative(divergence, student, top, rows, 1.0, "forward_kl")
    ruled_out = teacher.where(student.isfinite(), -math.inf)
    expected, whole = derivative(divergence, student, ruled_out, rows, 1.0, "forward_kl")
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [6, 7])
def test_rounded_probabilities_are_made_to_sum_to_one(k):
    student, teacher = drawn(64, 7)
    top = top_of(teacher, k, 1.0)
    rounded = TopK(top.log_probs.to(torch.bfloat16), top.indices)
    sums = rounded.log_probs.double().exp().sum(-1)
    assert sums.max() > 1 + 1e-4 and sums.min() < 1 - 1e-4
    _, gradient = derivative(divergence, student, rounded, torch.ones(64, dtype=torch.bool), 1.0, "forward_kl")
    assert gradient.sum(-1).abs().max() < 1e-6  # as softmax has it


@pytest.mark.parametrize("kind", ["reverse_kl", "js"])
def test_other_kinds_need_the_whole_teacher(kind):
    student, teacher = drawn(5, 7)
    with pytest.raises(ValueError, match=f"only forward_kl .* got '{kind}' with a TopK of 3 classes: set logits_loss"):
        divergence(student, top_of(teacher, 3, 2.0), mask_of(5), 2.0, kind)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", LOGITS_LOSSES)
def test_labels_that_do_not_exclude_each_other_are_bernoulli(kind, masked, chunk):
    student, teacher = drawn(2, 5, 7, dtype=torch.float64)
    rows = mask_of(2, 5) if masked else torch.ones(2, 5, dtype=torch.bool)

    def formula(student):
        s, t = ((x[rows] / 2.0).sigmoid() for x in (student, teacher))
        kl = lambda p, q: p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()  # noqa: E731
        m = (s + t) / 2
        each = {"forward_kl": kl(t, s), "reverse_kl": kl(s, t), "js": (kl(s, m) + kl(t, m)) / 2}[kind]
        return 4 * each.mean(-1).sum()

    value, gradient = derivative(binary_divergence, student, teacher, rows, 2.0, kind)
    expected, by_autograd = derivative(formula, student)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_difference_is_a_mean_over_outputs(dtype):
    student, teacher = drawn(2, 5, 7, dtype=dtype)
    rows = mask_of(2, 5)
    student[~rows] = math.nan
    value, gradient = derivative(squared_difference, student, teacher, rows)
    pairs = zip(student[rows].double(), teacher[rows].double(), strict=True)
    by_hand = sum(float((a - b).square().mean()) for a, b in pairs)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(by_hand, rel=1e-6)
    expected = (2 * (student.float() - teacher.float()) / 7).where(rows[..., None], 0).to(dtype)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [*LOGITS_LOSSES, "top"])
def test_cuda_gives_the_same(kind, masked, monkeypatch):
    monkeypatch.setattr(chunked, "ACCELERATOR_CHUNK_BYTES", 3 * 7 * 4)
    student, teacher = drawn(2, 5, 7)
    rows, name = mask_of(2, 5) if masked else torch.ones(2, 5, dtype=torch.bool), "forward_kl" if kind == "top" else kind
    top = top_of(teacher, 3, 2.0)
    there = TopK(top.log_probs.cuda(), top.indices.cuda()) if kind == "top" else teacher.cuda()
    here = derivative(divergence, student, top if kind == "top" else teacher, rows, 2.0, name)
    value, gradient = derivative(divergence, student.cuda(), there, rows.cuda(), 2.0, name)
    torch.testing.assert_close(value.cpu(), here[0])
    torch.testing.assert_close(gradient.cpu(), here[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "kl"}, "must be one of .*forward_kl.* got 'kl'"),
        ({"teacher": torch.zeros(5, 8)}, r"teacher \(5, 8\)"),
        ({"rows": torch.ones(4, dtype=torch.bool)}, r"rows \(4,\)"),
        ({"rows": torch.ones(5)}, "float32"),
        ({"teacher": TopK(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long))}, r"teacher \(4, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"teacher": torch.zeros(5, 7), "rows": torch.ones(5, dtype=torch.bool), "temperature": 2.0, "kind": "js"}
    with pytest.raises(ValueError, match=message):
        divergence(torch.zeros(5, 7), **{**given, **change})
