"""Every family that the tests know: its sites, and that what is left of it computes, learns and speaks as it should."""

import copy
import json
import warnings

import pytest
import torch
from families import EAGER_ONLY, FAMILIES, HEADS, build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_kdprune import Plan, apply_plan, find_sites, gated
from hf_kdprune.inputs import made_up_inputs
from hf_kdprune.prune.describe import per_unit
from hf_kdprune.prune.discovery import trace_sites
from hf_kdprune.prune.trace import LINEAR

PAIRS = [("attention", 4, 8), ("ffn", 64, 1)]  # of one block: kind, units, channels of each
GROUPS = [("attention", 2, 16), ("ffn", 64, 1)]  # two query heads share a key
CROSSED = [*PAIRS * 2, *[("attention", 4, 8), *PAIRS] * 2]  # encoder, then decoder with an attention to the encoder
CHAINED = [*PAIRS, ("ffn", 64, 1), *[("attention", 4, 8)] * 2, *[("ffn", 64, 1)] * 2]
NEURONS = [("ffn", 64, 1)] * 2
SITES = {  # name -> what its blocks hold, in the order in which it runs, and how many linear layers none of that cuts
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"), (PAIRS * 2, 0)),
    "albert": (PAIRS, 0),  # one layer runs twice
    **dict.fromkeys(("deberta-v2", "modernbert"), (PAIRS * 2, 0)),
    "mpnet": ([*PAIRS, ("ffn", 64, 1)], 0),  # one table of position biases, a column for each head: both layers lose the same
    "convbert": (NEURONS, 12),  # its attention splits its channels with a convolution
    "nystromformer": (NEURONS, 8),  # a convolution over the values has as many groups as heads
    "squeezebert": ([], 0),  # convolutions in place of linear layers
    "xlnet": (NEURONS, 0),  # query, key and value are parameters of no layer
    **dict.fromkeys(("gpt2", "gptj", "gpt_bigcode", "opt", "gpt_neox", "falcon"), (PAIRS * 2, 0)),
    "bloom": ([("ffn", 128, 1)] * 2, 4),  # the model makes a position bias with a slope for each head of the config
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), (GROUPS * 2, 0)),
    "llama_mqa": (PAIRS * 2, 4),  # the one key and value of all queries stay
    **dict.fromkeys(("phi", "phi3", "olmo", "stablelm", "cohere", "starcoder2"), (GROUPS * 2, 0)),
    "olmo2": ([("attention", 1, 32), ("ffn", 64, 1)] * 2, 0),  # a norm over the queries of all heads: one unit
    "mixtral": (GROUPS * 2, 0),
    "qwen2_moe": ([*GROUPS, ("ffn", 64, 1)] * 2, 2),  # the gate of the shared expert gives one number
    "qwen3_moe": (GROUPS * 2, 0),
    **dict.fromkeys(("t5", "mt5"), (CHAINED, 0)),  # the position bias of the first block serves all: they lose the same heads
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus", "whisper"), (CROSSED, 0)),
    **dict.fromkeys(("vit", "deit", "beit", "dinov2"), (PAIRS * 2, 0)),
    "swin": ([("attention", 2, 8), ("ffn", 64, 1)] * 2 + [("attention", 4, 8), ("ffn", 128, 1)] * 2, 1),  # and merges patches
    **dict.fromkeys(("siglip", "clip"), (PAIRS * 4, 0)),
    **dict.fromkeys(("wav2vec2", "hubert", "data2vec-audio", "ast"), (PAIRS * 2, 0)),
}
PRUNED = [name for name in FAMILIES if SITES[name][0]]
WAYS = [(name, way) for name in PRUNED for way in ("eager", "sdpa") if way == "eager" or name not in EAGER_ONLY]
OTHER_HEADS = [(name, auto) for name, autos in HEADS.items() for auto in autos]
WRITERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")
WRITING = [(name, FAMILIES[name][2]) for name in PRUNED if FAMILIES[name][2] in WRITERS]
WRITING.append(("bart", "AutoModelForCausalLM"))


def inputs(model, rows=3, left=False):
    """Rows of what the model reads; tokens and raw audio are padded to one length, the first row has none."""
    batch = made_up_inputs(model, seq_len=10, rows=rows)
    for name in ("input_ids", "decoder_input_ids", "input_values"):
        if name in batch and batch[name].dim() == 2:
            size = batch[name].shape[1]
            lengths = torch.tensor([size - 3 * size // 10 * i for i in range(rows)])[:, None]
            mask = (torch.arange(size) < lengths).long()
            padded = batch[name].scatter(1, lengths - 1, batch[name][:, -1:]) * mask  # a text ends as it did
            mask_name = "decoder_attention_mask" if name.startswith("decoder") else "attention_mask"
            batch[name], batch[mask_name] = (padded.flip(1), mask.flip(1)) if left else (padded, mask)
    return batch


def numbers(output):
    """All tensors of an output, however deep, but for the cache."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return [number for part in parts for number in numbers(part)]


@torch.no_grad()
def everything(model, batch):
    """Logits, features of every layer, and whatever else comes out."""
    return numbers(model(**batch, output_hidden_states=True))


def assert_close(got, expected, atol=1e-5):
    """To `atol` of their scale, and numbers they are."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= atol * max(1.0, float(b.abs().max()))


def some(site, seed=0):
    """A random half of one site, never none."""
    draw = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(site.total, generator=draw)[: max(1, site.total // 2)].tolist())


def least(site):
    """As few units as a site may have."""
    return list(range(site.total))[site.total - site.least :]


def drawn(sites):
    """A random half of all."""
    kinds = {"attention": "heads=0.5", "ffn": "ffn=0.5"}
    return Plan.random(sites, ",".join(kinds[kind] for kind in sorted({site.kind for site in sites})))


def first_emptied(sites, keep):
    """Half of each site, but of the first of each kind as little as can be; in a model that writes, of its writing side."""
    kept = {site.name: some(site) for site in sites}
    writing = [site for site in sites if "decoder." in site.name] or sites
    for first in {site.kind: site for site in reversed(writing)}.values():
        kept[first.name] = least(first)
    return keep(sites, kept)


def beside_heads(model, sites, plan):
    """Parameters that no head owns, of the attentions that lose all heads: they go too, which the sites do not count."""
    count = 0
    for site in sites:
        owned = {cut.name for cut in site.cuts}
        for part in site.parts if site.kind == "attention" and not plan[site.name].kept else ():
            named = model.get_submodule(part.core).named_parameters(part.core)
            held = {name: p.numel() for name, p in named if not name.startswith(f"{part.consumer}.")}
            count += sum(size for name, size in held.items() if name not in owned)
            packed = [cut for cut in site.cuts if cut.name in held]
            count += sum(held[cut.name] - per_unit(model, cut) * site.total for cut in packed)
    return count


# ---------------------------------------------------------------------------------------------- found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_gives_all_that_it_holds(name):
    wanted, uncut = SITES[name]
    model = build(name)
    if not wanted:
        with pytest.raises(ValueError, match="has no prunable site"):
            find_sites(model)
        return
    sites = find_sites(model)
    assert [(s.kind, s.total, s.width) for s in sites] == wanted
    assert sites.params() == model.num_parameters()
    assert len({s.name for s in sites}) == len(sites)
    cut = {cut.path for site in sites for cut in site.cuts}
    linears = {n for n, m in model.named_modules() if isinstance(m, LINEAR) and any(part.isdigit() for part in n.split("."))}
    assert len(linears - cut) == uncut


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_any_family_is_the_gated_one(name, way, keep):
    model = build(name, way)
    batch, sites = inputs(model), find_sites(model)
    dense = everything(model, batch)
    fewest = keep(sites, {site.name: least(site) for site in sites})
    for plan in (drawn(sites), first_emptied(sites, keep), fewest):
        smaller = copy.deepcopy(model)
        with gated(smaller, plan, sites):
            expected = everything(smaller, batch)
        assert float((dense[0] - expected[0]).abs().max()) > 1e-3  # what goes matters
        apply_plan(smaller, plan)
        assert_close(everything(smaller, batch), expected)
        predicted = sites.params({n: len(kept) for n, kept in plan.kept.items()})
        assert smaller.num_parameters() == predicted - beside_heads(model, sites, plan)


@pytest.mark.parametrize(("name", "auto"), OTHER_HEADS)
def test_any_head_is_the_gated_one(name, auto, keep):
    model = build(name, auto=auto)
    batch, sites = inputs(model), find_sites(model)
    plan = first_emptied(sites, keep)
    with gated(model, plan, sites):
        expected = everything(model, batch)
    apply_plan(model, plan)
    assert_close(everything(model, batch), expected)


# ---------------------------------------------------------------------------------------------- learns


NO_CHANCE = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "mask_time_prob": 0.0}


def gradients(model, batch):
    """Name -> largest gradient of each parameter in train mode, without dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    output = model(**batch)[0]
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    return {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.numel() and p.grad is not None}


@pytest.mark.parametrize("name", PRUNED)
def test_gradients_reach_all_that_is_left_of_any_family(name, keep):
    dense = build(name, **NO_CHANCE)
    batch, sites = inputs(dense), find_sites(dense)
    halves = {site.name: some(site) for site in sites}
    first = next((site for site in sites if site.kind == "attention" and not site.least), None)
    plans = [keep(sites, halves)] + ([keep(sites, halves | {first.name: []})] if first else [])
    models = [copy.deepcopy(dense) for _ in plans]
    before = gradients(dense, batch)
    learn = {name for name, size in before.items() if size > 1e-4}  # a key's bias learns nothing but noise of rounding
    for model, plan in zip(models, plans, strict=True):
        apply_plan(model, plan)
        left, after = {name for name, p in model.named_parameters() if p.numel()}, gradients(model, batch)
        silent = {name for name in learn & left if not after.get(name)}
        cores = [part.core for site in sites for part in site.parts if not plan[site.name].kept and part.core]
        beside = tuple(core.rpartition(".")[0] + "." for core in cores)  # its own norm, which nothing reads any more
        assert all(name.startswith(beside) and "norm" in name.replace("ln_", "norm") for name in silent)


# ---------------------------------------------------------------------------------------------- writes


@pytest.mark.parametrize(("name", "auto"), WRITING)
def test_any_family_writes_what_the_gated_one_writes(name, auto, keep):
    model = build(name, auto=auto, seed=1)
    crossed = auto != "AutoModelForCausalLM"
    batch, sites = inputs(model, left=not crossed), find_sites(model)
    batch = {key: value for key, value in batch.items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": True}
    if name != "whisper":  # which then reads the cache of each layer, and an emptied attention to the encoder fills none
        options |= {"return_dict_in_generate": True, "output_logits": True}
    fewest = keep(sites, {site.name: least(site) if site.kind == "attention" else some(site) for site in sites})
    for plan in (drawn(sites), first_emptied(sites, keep), fewest):
        smaller = copy.deepcopy(model)
        with gated(smaller, plan, sites):
            expected = [smaller.generate(**batch, **options, num_beams=beams) for beams in (1, 3)]
        apply_plan(smaller, plan)
        for beams, wanted in zip((1, 3), expected, strict=True):
            got = smaller.generate(**batch, **options, num_beams=beams)
            if name == "whisper":
                assert torch.equal(got, wanted)
            else:
                assert torch.equal(got.sequences, wanted.sequences)
                assert_close(got.logits, wanted.logits, atol=1e-4)


# ---------------------------------------------------------------------------------------------- adapted


ADAPTED = {
    "bert": ["query", "value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "v", "o", "wi", "wo"],
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapted_model_is_the_gated_one_and_merges(name, keep):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own use of transformers
        settings = peft.LoraConfig(target_modules=ADAPTED[name], r=2, fan_in_fan_out=name == "gpt2", init_lora_weights=False)
        model = peft.get_peft_model(build(name), settings).eval()
    batch, sites = inputs(model), find_sites(model)
    assert [(s.kind, s.total, s.width) for s in sites] == SITES[name][0]
    for plan in (drawn(sites), first_emptied(sites, keep)):
        smaller = copy.deepcopy(model)
        with gated(smaller, plan, sites):
            expected = everything(smaller, batch)
        apply_plan(smaller, plan)
        assert_close(everything(smaller, batch), expected)
        assert_close(everything(smaller.merge_and_unload(), batch), expected)


# ---------------------------------------------------------------------------------------------- types and costs


HALVES = ("bert", "modernbert", "deberta-v2", "gpt2", "falcon", "llama", "gemma2", "mixtral", "t5", "bart", "vit", "wav2vec2")


@pytest.mark.parametrize("name", HALVES)
def test_bfloat16_has_the_sites_of_float32_and_stays_bfloat16(name):
    model = build(name)
    sites = find_sites(model)
    model = model.to(torch.bfloat16)
    weights = copy.deepcopy(model.state_dict())
    assert find_sites(model) == sites
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    apply_plan(model, drawn(sites))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in inputs(model).items()}
    assert all(bool(number.isfinite().all()) for number in everything(model, batch))


UNSEEN = {  # what torch's counter sees and the sites' sums do not, as it is the work of no linear layer and of no site
    "convbert": "its attention's products; only the FFNs are sites",
    "nystromformer": "the same, and the inverse of its landmarks",
    "xlnet": "the same, and query, key and value, which are parameters of no layer",
    "bloom": "its attention's products; only the FFNs are sites",
    "siglip": "an attention that pools the image, of torch's own; images by texts",
    "clip": "images by texts",
}


@torch.no_grad()
def counted(model, batch):
    """MACs of one pass by torch's own counter; it does not know grouped products, so experts run one by one."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "is_concatenated")}.values():
        config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", PRUNED)
def test_macs_are_those_that_torch_counts(name, keep):
    model = build(name)
    batch = made_up_inputs(model, seq_len=10)
    sites = find_sites(model, batch)
    unseen = counted(model, batch) - sites.macs()
    assert unseen > 0 if name in UNSEEN else unseen == 0
    plan = keep(sites, {site.name: some(site) for site in sites})
    apply_plan(model, plan)
    predicted = sites.macs({n: len(kept) for n, kept in plan.kept.items()})
    assert predicted == find_sites(model, batch).macs() == counted(model, batch) - unseen < sites.macs()


# ---------------------------------------------------------------------------------------------- untouched


def state(model):
    """All that could be seen of a call that should leave no trace; weights by value."""
    modules = dict(model.named_modules())
    return {
        "modules": [(n, id(m), m.training, m.forward.__func__) for n, m in modules.items()],
        "parameters": [(n, id(p), p.requires_grad, p.dtype, p.grad) for n, p in model.named_parameters()],
        "weights": {n: t.tolist() for n, t in model.state_dict().items() if not t.is_meta},
        "numbers": [(n, k, v) for n, m in modules.items() for k, v in vars(m).items() if type(v) in (int, bool, float, str)],
        "hooks": [(n, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for n, m in modules.items()],
        "config": json.dumps(model.config.to_dict(), default=str, sort_keys=True),
        "experts": model.config._experts_implementation,
        "plan": hasattr(model, "kdprune_plan"),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_looking_for_sites_leaves_any_family_as_it_was(name):
    model = build(name)
    with torch.no_grad():
        model(**made_up_inputs(model))  # Swin notes the size of its input
    model.train()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    list(model.modules())[5].eval()  # a frozen part
    before = state(model)
    trace_sites(model)
    assert state(model) == before


def quantised(model):
    """As after loading with a quantization_config."""
    model.hf_quantizer = object()
    return model


def offloaded(model):
    """Without the weights of its last block."""
    list(model.modules())[-1].to("meta")
    return model


def compiled_in_place(model):
    """With its own call compiled."""
    model.compile(backend="eager")
    return model


class Wrapper(nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.config = module.config


UNFIT = [  # what makes a model unfit, and what is said of it
    (quantised, "is quantised, and surgery cuts plain weights"),
    (offloaded, "has weights that are not in memory, such as .*load it without offloading"),
    (compiled_in_place, "was compiled in place, .*prune the model first"),
    (lambda model: torch.compile(model, backend="eager"), "not OptimizedModule: unwrap it first .*model._orig_mod"),
    (Wrapper, "not Wrapper: unwrap it first .*model.module for DDP"),
]


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize(("spoil", "message"), UNFIT, ids=["quantised", "offloaded", "in place", "compiled", "wrapped"])
def test_a_model_that_cannot_be_cut_is_refused_and_left_alone(name, spoil, message):
    model = build(name).train()
    plan = drawn(find_sites(model))
    unfit = spoil(model)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        find_sites(unfit)
    with pytest.raises(ValueError, match=message):
        apply_plan(unfit, plan)
    with pytest.raises(ValueError, match=message), gated(unfit, plan):
        pass
    assert state(model) == before


@pytest.mark.parametrize(("name", "other"), [("bert", "electra"), ("llama", "llama_mqa"), ("t5", "bart"), ("vit", "deit")])
def test_a_plan_of_another_family_is_refused_and_the_model_left_alone(name, other):
    model, plan = build(name), drawn(find_sites(build(other)))
    before = state(model)
    with pytest.raises(ValueError, match="the plan is for another model: .* make a plan for this model"):
        apply_plan(model, plan)
    assert state(model) == before


def test_experts_of_a_width_that_grouped_products_refuse_are_refused(keep):
    model = build("mixtral")
    sites = find_sites(model)
    before = state(model)
    assert [site.least for site in sites] == [0, 8, 0, 8]
    with pytest.raises(ValueError, match=r"experts must keep a multiple of 8 neurons.* the plan keeps 13: take round_to=8"):
        apply_plan(model, keep(sites, {sites[1].name: range(13)}))
    with pytest.raises(ValueError, match=r"must keep 8 or more.* the plan keeps none"):
        apply_plan(model, keep(sites, {sites[1].name: []}))
    assert state(model) == before
