"""What a model costs on this machine: figures that a user would quote."""

import copy

import pytest
import torch

from hf_kdprune import Plan, apply_plan, find_sites, measure
from hf_kdprune.inputs import at_length
from hf_kdprune.measure import compare, disk_bytes, macs_of, peak_memory


@pytest.fixture
def brief(monkeypatch):
    """Time for a tenth of a second, not three."""
    module = __import__("sys").modules["hf_kdprune.measure"]
    monkeypatch.setattr(module, "SECONDS", 0.1)


@pytest.mark.usefixtures("brief")
def test_a_measurement(tiny, ragged):
    model, batch = tiny().train(), ragged(1, 3)[0]
    result = measure(model, {**batch, "labels": torch.tensor([99, -7, 0])}, batch_sizes=(1, 5))
    assert result.params == model.num_parameters()
    assert result.macs == find_sites(model, seq_len=12).macs() and result.seq_len == 12
    assert list(result.latency_ms) == ["1", "5"] and all(0 < t < 1e4 for t in result.latency_ms.values())
    assert result.samples_per_second == pytest.approx(5000 / result.latency_ms["5"])
    assert result.peak_memory_bytes > 4 * result.params
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("brief")
def test_a_model_against_itself_and_against_a_deeper_one(tiny, ragged):
    model, deeper, batch = tiny(), tiny(num_hidden_layers=8), ragged(1, 8)[0]
    _, same = compare([model, copy.deepcopy(model)], batch, batch_sizes=(8,))
    assert 0.7 < same["8"] < 1.4
    results, ratio = compare([model, deeper], batch, batch_sizes=(8,))
    assert ratio["8"] > 1.5
    assert results[1].macs > 3 * results[0].macs and results[1].params > results[0].params


@pytest.mark.usefixtures("brief")
def test_a_pruned_and_an_emptied_model_can_be_measured(tiny, ragged, keep):
    model, batch = tiny(), ragged(1, 4)[0]
    whole = measure(model, batch, batch_sizes=(4,))
    half, empty = copy.deepcopy(model), copy.deepcopy(model)
    sites = find_sites(model)
    apply_plan(half, Plan.random(sites, "macs=0.5"))
    apply_plan(empty, keep(sites, {s.name: [] for s in sites}))
    smaller, smallest = (measure(m, batch, batch_sizes=(4,)) for m in (half, empty))
    for figure in ("params", "macs", "peak_memory_bytes"):
        assert getattr(whole, figure) > getattr(smaller, figure) > getattr(smallest, figure) > 0
    assert smallest.macs == find_sites(model, seq_len=12).macs({s.name: 0 for s in sites})


def test_peak_memory_is_weights_and_the_activations_of_the_batch(tiny, ragged):
    model = tiny()
    sizes = [peak_memory(model, ragged(1, size, seq=32)[0]) for size in (1, 16, 32)]
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert sizes[0] > weights
    # Activations grow with the batch; each step of 16 samples costs the same.
    assert (sizes[2] - sizes[1]) / (sizes[1] - sizes[0]) == pytest.approx(16 / 15, rel=0.1)
    longest = ragged(1, 16, seq=64)[0]
    assert peak_memory(model, longest) - weights > 2 * (sizes[1] - weights)  # attention is quadratic


def test_peak_memory_counts_what_lives_at_once_not_what_was_ever_made(tiny, ragged):
    batch = ragged(1, 16, seq=32)[0]
    peaks = []
    for layers in (2, 8):
        model = tiny(num_hidden_layers=layers)
        peaks.append(peak_memory(model, batch) - sum(t.numel() * t.element_size() for t in model.state_dict().values()))
    assert peaks[1] < 1.1 * peaks[0]  # layers run one after another


def test_at_length_gives_exactly_the_length_and_real_tokens_only(ragged):
    batch = ragged(1, 6)[0]
    for length in (1, 5, 12, 30):
        out = at_length({**batch, "labels": torch.arange(6)}, length)
        assert out.keys() == batch.keys()
        assert all(v.shape == (6, length) for v in out.values())
        assert bool(out["attention_mask"].all()) and bool((out["input_ids"] >= 5).all())
        for row, made in zip(batch["input_ids"], out["input_ids"], strict=True):
            real = row[row > 0]
            assert made.tolist() == [int(real[i % len(real)]) for i in range(length)]
    assert at_length({"input_ids": batch["input_ids"]}, 20)["input_ids"].shape == (6, 20)


def test_bytes_on_disk_are_the_weights(tiny):
    model = tiny()
    assert disk_bytes(model) == pytest.approx(4 * model.num_parameters(), rel=0.1)
    assert disk_bytes(model.to(torch.bfloat16)) == pytest.approx(2 * model.num_parameters(), rel=0.15)


class Packed(torch.nn.Linear):
    """A linear layer whose weight is in bytes, two numbers in each."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        packed = torch.zeros(linear.weight.numel() // 2, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_quantised_model_has_the_macs_of_the_plain_one(tiny, ragged, attention):
    model, batch = tiny(attention=attention), ragged(1, 4)[0]
    expected = macs_of(model, batch, 9)
    assert expected == find_sites(model, batch, 9).macs()
    for name, module in list(model.bert.encoder.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.bert.encoder.set_submodule(name, Packed(module))
    model.is_quantized = True
    assert macs_of(model, batch, 9) == expected
    assert not any("forward" in vars(module) for module in model.modules())
