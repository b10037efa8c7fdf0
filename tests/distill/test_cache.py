"""The cached teacher: what it says is what the live one says, and it says so of nothing else."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
import transformers
from families import ANSWERS, CLASSIFIER, TOKENS, build
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_kdprune.distill import cache_build
from hf_kdprune.distill.cache import Kept, TeacherCache, cached_teacher
from hf_kdprune.distill.rows import ROW, CollateWithRows, WithRows, checksums, mix, with_rows
from hf_kdprune.inputs import completed
from hf_kdprune.layers import inputs_of

COUNT = 23


def texts(labels="one", count=COUNT, seed=0):
    """Samples of random tokens, 3 to 12 each."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        ids = torch.randint(5, 200, (int(torch.randint(3, 13, (), generator=draw)),), generator=draw).tolist()
        told = {"one": {"labels": ids[0] % 3}, "token": {"labels": [i % 3 for i in ids]}, "same": {"labels": ids}}
        told |= {"span": {"start_positions": 1, "end_positions": 2}, "other": {"labels": ids[: len(ids) // 2 + 1]}}
        samples.append({"input_ids": ids, **told[labels]})
    return datasets.Dataset.from_list(samples)


class Pad:
    """A collator: `left` or right padding, to a multiple of `to`."""

    def __init__(self, left=False, to=1):
        self.left, self.to = left, to

    def rows(self, lists, fill):
        length = -(-max(map(len, lists)) // self.to) * self.to
        pads = [[fill] * (length - len(x)) for x in lists]
        return torch.tensor([p + x if self.left else x + p for x, p in zip(lists, pads, strict=True)])

    def __call__(self, samples):
        ids = [s["input_ids"] for s in samples]
        assert not any(ROW in s for s in samples)
        batch = {"input_ids": self.rows(ids, 0), "attention_mask": self.rows([[1] * len(x) for x in ids], 0)}
        for name in set(samples[0]) - {"input_ids"}:
            values = [s[name] for s in samples]
            batch[name] = self.rows(values, -100) if isinstance(values[0], list) else torch.tensor(values)
        return batch


class Images(torch.utils.data.Dataset):
    """A torch Dataset, not one of `datasets`."""

    def __len__(self):
        return COUNT

    def __getitem__(self, row):
        return {"pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(row)), "labels": row % 3}


class Random(Pad):
    """Masks at random."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def __call__(self, samples):
        batch = super().__call__(samples)
        hidden = (torch.rand(batch["input_ids"].shape) < self.share) & batch["attention_mask"].bool()
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden, 3)
        return batch


CASES = {  # name -> model, labels, collator when built, when looked up
    "classes": (("bert", CLASSIFIER), "one", Pad(), Pad(to=16)),
    "tokens": (("bert", TOKENS), "token", Pad(), Pad(to=16)),
    "tokens of a decoder": (("llama", TOKENS), "token", Pad(to=5), Pad(left=True)),
    "answers": (("bert", ANSWERS), "span", Pad(), Pad(to=16)),
    "answers of t5": (("t5", ANSWERS), "span", Pad(), Pad(to=16)),
    "causal": (("llama", None), "same", Pad(), Pad(left=True, to=7)),
    "t5": (("t5", None), "other", Pad(), Pad(to=8)),
    "t5, as long as its encoder": (("t5", None), "same", Pad(), Pad(to=16)),
    "t5, padded to one length": (("t5", None), "other", Pad(to=16), Pad(to=16)),
    "bart": (("bart", None), "other", Pad(), Pad(to=8)),
    "images": (("vit", None), None, default_data_collator, default_data_collator),
    "speech": (("wav2vec2", None), None, default_data_collator, default_data_collator),
}


def case(name):
    """Teacher, data set, and the two collators."""
    (family, auto), labels, built, looked = CASES[name]
    data = texts(labels) if labels else Images()
    if family == "wav2vec2":
        draw = torch.Generator().manual_seed(0)
        data = [{"input_values": torch.randn(60, generator=draw), "labels": [3, 4]} for _ in range(COUNT)]
    return build(family, auto=auto), data, built, looked


@pytest.fixture
def causal(tmp_path):
    """A teacher of text, its data, and the folder of its cache, which is computed."""
    teacher, data, collate, _ = case("causal")
    cached_teacher(tmp_path / "cache", teacher, data, collate, 4)
    return teacher, data, collate, tmp_path / "cache"


def silent(teacher):
    """The teacher, which must not be asked."""

    def forward(*args, **kwargs):
        raise AssertionError("the teacher was asked")

    teacher.forward = forward
    return teacher


def shuffled(data, collate, teacher, size=5, **options):
    """Rows and batches, in another order and other company than the cache was built in."""
    draw = torch.Generator().manual_seed(1)
    loader = DataLoader(with_rows(data), size, shuffle=True, collate_fn=CollateWithRows(collate), generator=draw, **options)
    for batch in loader:
        yield batch.pop(ROW), completed(teacher, dict(batch))


@torch.no_grad()
def ask(teacher, batch):
    return teacher(**inputs_of(batch))


def real_of(batch, logits):
    """Real positions by the test's own rule."""
    if logits.dim() == 3 and "decoder_input_ids" in batch:
        return batch["labels"] != -100
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(logits.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_the_live_teacher_says(name, tmp_path):
    teacher, data, built, looked = case(name)
    cache, seen = cached_teacher(tmp_path / "cache", teacher, data, built, 4), []
    for rows, batch in shuffled(data, looked, teacher):
        said, live = cache.look_up(rows, batch), ask(teacher, batch)
        seen += rows.tolist()
        for field in ("start_logits", "end_logits") if "answers" in name else ("logits",):
            mine, wanted = getattr(said, field), getattr(live, field)
            assert mine.shape == wanted.shape and mine.dtype == torch.float32
            if mine.dim() == 2 and "answers" not in name:
                torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)
                continue
            real = real_of(batch, wanted)
            torch.testing.assert_close(mine[real], wanted[real], atol=1e-5, rtol=1e-5)
            assert (mine[~real] == (torch.finfo(torch.float32).min if "answers" in name else 0)).all()
    assert sorted(seen) == list(range(COUNT))


@pytest.mark.parametrize("k", [1, 7, 200])
def test_of_a_language_model_the_likeliest_classes_are_kept(k, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "CHUNK", 10)  # several in a batch
    teacher, data, built, looked = case("causal")
    cache = cached_teacher(tmp_path / "cache", teacher, data, built, 4, Kept(temperature=2.0, top_k=k))
    for rows, batch in shuffled(data, looked, teacher):
        top, real = cache.look_up(rows, batch).logits, batch["attention_mask"].bool()
        wanted = (ask(teacher, batch).logits / 2.0).log_softmax(-1)
        assert top.indices.dtype == torch.int64 and top.log_probs.shape == (*real.shape, k)
        torch.testing.assert_close(top.log_probs[real], wanted.topk(k).values[real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(wanted.gather(-1, top.indices)[real], top.log_probs[real], atol=1e-5, rtol=1e-5)
        assert (top.indices.sort(-1).values.diff(dim=-1) > 0).all()  # none twice, at padding either
        torch.testing.assert_close(top.log_probs[~real].exp(), torch.full_like(top.log_probs[~real], 1 / 200))


def test_a_second_run_does_not_ask_the_teacher(causal):
    teacher, data, collate, folder = causal
    cache = cached_teacher(folder, silent(teacher), data, collate, 9)
    assert cache.look_up(torch.tensor([3]), collate([data[3]])).logits.shape[-1] == 200


def test_a_whole_cache_serves_any_temperature_and_a_cut_one_only_its_own(causal, tmp_path):
    teacher, data, collate, folder = causal
    cached_teacher(folder, silent(teacher), data, collate, 4, Kept(temperature=3.0))
    with pytest.raises(ValueError, match="top_k None, now 5"):
        cached_teacher(folder, teacher, data, collate, 4, Kept(temperature=3.0, top_k=5))
    teacher = case("causal")[0]
    cached_teacher(tmp_path / "cut", teacher, data, collate, 4, Kept(temperature=3.0, top_k=5))
    with pytest.raises(ValueError, match=r"temperature 3.0, now 2.0"):
        cached_teacher(tmp_path / "cut", teacher, data, collate, 4, Kept(temperature=2.0, top_k=5))


def test_another_teacher_is_refused(causal):
    teacher, data, collate, folder = causal
    with pytest.raises(ValueError, match="has teacher"):
        cached_teacher(folder, build("llama", seed=1), data, collate, 4)
    with torch.no_grad():
        teacher.lm_head.weight += 1e-6
    with pytest.raises(ValueError, match="has teacher"):
        cached_teacher(folder, teacher, data, collate, 4)


def test_another_rotary_base_is_another_teacher(causal):
    teacher, data, collate, folder = causal
    other = build("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})  # the same weights
    assert all(torch.equal(x, y) for x, y in zip(teacher.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="has teacher"):
        cached_teacher(folder, other, data, collate, 4)


def test_labels_in_another_order_are_another_teacher(tmp_path):
    teacher, data, collate, _ = case("classes")
    cached_teacher(tmp_path / "cache", teacher, data, collate)
    teacher.config.id2label = {0: "LABEL_1", 1: "LABEL_0", 2: "LABEL_2"}
    with pytest.raises(ValueError, match="has teacher"):
        cached_teacher(tmp_path / "cache", teacher, data, collate)


def test_other_data_is_refused(causal):
    teacher, data, collate, folder = causal
    silent(teacher)
    with pytest.raises(ValueError, match="23 of 23 rows.*gave other inputs"):
        cached_teacher(folder, teacher, texts("same", seed=1), collate, 4)
    with pytest.raises(ValueError, match="rows 23, now 22"):
        cached_teacher(folder, teacher, data.select(range(22)), collate, 4)
    with pytest.raises(ValueError, match="gave other inputs"):
        cached_teacher(folder, teacher, data.shuffle(seed=0), collate, 4)
    relabelled = data.map(lambda s: {"labels": [7] * len(s["labels"])})
    cached_teacher(folder, teacher, relabelled, collate, 4)  # the teacher never saw labels
    assert TeacherCache(folder).look_up(torch.tensor([0]), collate([data[0]]))


def test_a_changed_row_is_noticed_in_its_batch(causal):
    cache, (_, data, collate, _) = TeacherCache(causal[3]), causal
    other = {**data[5], "input_ids": [*data[5]["input_ids"][:-1], 4]}
    with pytest.raises(ValueError, match="1 of the 2 of a batch do not, row 5 "):
        cache.look_up(torch.tensor([2, 5]), collate([data[2], other]))
    with pytest.raises(ValueError, match="row 23 is none"):
        cache.look_up(torch.tensor([2, 23]), collate([data[2], data[3]]))
    with pytest.raises(ValueError, match="got 2 and 1"):
        cache.look_up(torch.tensor([2]), collate([data[2], data[3]]))


def test_random_masking_is_refused_before_the_teacher_is_asked_and_noticed_when_it_comes_later(causal, tmp_path):
    teacher, data, _, folder = causal
    silent(teacher)
    with pytest.raises(ValueError, match="same inputs each time"):
        cached_teacher(tmp_path / "other", teacher, data, Random(0.3), 4)
    with pytest.raises(ValueError, match="draws at random"):
        cached_teacher(folder, teacher, data, Random(0.3), 4)
    cache = TeacherCache(folder)
    with pytest.raises(ValueError, match="draws at random"):
        for rows, batch in shuffled(data, Random(0.3), teacher):
            cache.look_up(rows, batch)
    assert not (tmp_path / "other").exists()


def test_padding_without_a_mask_is_refused(tmp_path):
    teacher, data, collate, _ = case("classes")
    with pytest.raises(ValueError, match="attention_mask|attention mask"):
        cached_teacher(
            tmp_path / "c", teacher, data, lambda s: {k: v for k, v in collate(s).items() if k != "attention_mask"}, 4
        )


def test_decoder_tokens_of_which_no_mask_tells_are_refused(tmp_path):
    teacher, data, _, _ = case("t5")
    collate = lambda s: {("decoder_input_ids" if k == "labels" else k): v.clamp(min=0) for k, v in Pad(to=16)(s).items()}  # noqa: E731
    with pytest.raises(ValueError, match="it must be known which of the teacher's 16 positions are padding"):
        cached_teacher(tmp_path / "cache", teacher, data, collate, 4)


@pytest.mark.parametrize("damage", ["short", "fewer", "empty", "gone", "json", "other columns", "version"])
def test_a_damaged_cache_is_refused_and_left_alone(damage, causal):
    teacher, data, collate, folder = causal
    arrow, identity = folder / "teacher.arrow", folder / "teacher.json"
    bytes_, fields = arrow.read_bytes(), json.loads(identity.read_text())
    if damage == "short":
        arrow.write_bytes(bytes_[: len(bytes_) // 2])
        identity.write_text(json.dumps(fields | {"bytes": len(bytes_) // 2}))  # the size alone would tell
    elif damage == "fewer":
        with pyarrow.ipc.open_stream(bytes_) as stream:
            records = list(stream)
        with pyarrow.OSFile(str(arrow), "wb") as sink, pyarrow.ipc.new_stream(sink, records[0].schema) as writer:
            for record in records[:-1]:
                writer.write_batch(record)
        identity.write_text(json.dumps(fields | {"bytes": arrow.stat().st_size}))
    elif damage == "empty":
        arrow.write_bytes(b"")
    elif damage == "gone":
        arrow.unlink()
    elif damage == "json":
        identity.write_text(identity.read_text()[:-20])
    elif damage == "version":
        identity.write_text(json.dumps(fields | {"version": 2}))
    else:
        identity.write_text(json.dumps(fields | {"widths": {"start_logits": 1}}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    says = "20 rows of 23" if damage == "fewer" else "is damaged|must be readable"
    with pytest.raises(ValueError, match=says):
        cached_teacher(folder, silent(teacher), data, collate, 4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_cut_file_of_the_wrong_size_is_refused(causal):
    arrow = causal[3] / "teacher.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-8])
    with pytest.raises(ValueError, match="bytes of"):
        TeacherCache(causal[3])


def test_a_folder_of_something_else_is_refused(tmp_path):
    teacher, data, collate, _ = case("classes")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for folder, says in ((tmp_path / "mine", r"holds \['thesis.tex'\]"), (tmp_path / "mine" / "thesis.tex", "is a file")):
        with pytest.raises(ValueError, match=says):
            cached_teacher(folder, teacher, data, collate)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_nan_is_refused_with_its_row_and_nothing_is_left(tmp_path):
    teacher, data, collate, _ = case("tokens")
    number = [row for row, sample in enumerate(data) if 77 in sample["input_ids"]]
    if not number:
        number, data = (
            [9],
            data.map(lambda s, i: {"input_ids": [77, *s["input_ids"][1:]] if i == 9 else s["input_ids"]}, with_indices=True),
        )
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight[77] = torch.nan
    with pytest.raises(ValueError, match=f"of row ({'|'.join(map(str, number))}) it gives NaN"):
        cached_teacher(tmp_path / "cache", teacher, data, collate, 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "k"), [("classes", 2), ("answers", 2), ("causal", 201)])
def test_top_k_is_of_language_models(name, k, tmp_path):
    teacher, data, collate, _ = case(name)
    with pytest.raises(ValueError, match="top_k keeps the likeliest"):
        cached_teacher(tmp_path / "cache", teacher, data, collate, 4, Kept(top_k=k))
    with pytest.raises(ValueError, match="top_k >= 1"):
        Kept(top_k=0)


def test_workers_and_their_pickles_keep_the_rows(causal):
    teacher, data, collate, folder = causal
    cache, seen = TeacherCache(folder), []
    assert pickle.loads(pickle.dumps(CollateWithRows(collate))).collate.to == collate.to
    for rows, batch in shuffled(data, collate, teacher, 8, num_workers=2):
        seen += rows.tolist()
        wanted, real = ask(teacher, batch).logits, batch["attention_mask"].bool()
        torch.testing.assert_close(cache.look_up(rows, batch).logits[real], wanted[real], atol=1e-5, rtol=1e-5)
    assert sorted(seen) == list(range(COUNT)) and seen != sorted(seen)


def test_rows_stay_with_their_samples():
    data = with_rows(texts())
    assert isinstance(data, datasets.Dataset) and with_rows(data) is data
    assert data.shuffle(seed=0).select([4, 2])[ROW] == [data.shuffle(seed=0)[i][ROW] for i in (4, 2)]
    chosen = with_rows(texts().select([5, 2, 9]))  # a column would copy it
    assert isinstance(chosen, WithRows) and chosen[1] == {**texts()[2], ROW: 1} and with_rows(chosen) is chosen
    made = with_rows(texts().with_transform(lambda s: {"twice": [2 * x for x in s["labels"]]}))
    assert made[3] == {"twice": 2 * texts()[3]["labels"], ROW: 3}
    assert made.__getitems__([3, 0]) == [made[3], made[0]]
    assert with_rows(Images()).__getitems__([4])[0][ROW] == 4
    part = torch.utils.data.Subset(with_rows(Images()), [7, 3])
    assert with_rows(part) is part and part[0][ROW] == 7


def test_a_part_of_a_numbered_set_keeps_the_numbers(tmp_path):
    teacher, data, collate, _ = case("classes")
    part = with_rows(data).select([20, 3, 11])
    cache = cached_teacher(tmp_path / "cache", teacher, part, collate, 2)
    live = ask(teacher, collate([data[11], data[20]])).logits
    torch.testing.assert_close(cache.look_up(torch.tensor([11, 20]), collate([data[11], data[20]])).logits, live)


def test_samples_without_rows_are_collated_as_ever():
    assert ROW not in CollateWithRows(Pad())([texts()[0]])
    assert CollateWithRows(CollateWithRows(Pad())).collate.__class__ is Pad


def test_checksums_see_every_input_at_real_positions_alone():
    samples = [texts()[i] for i in range(4)]
    base = checksums(Pad()(samples))
    assert torch.equal(base, checksums(Pad(left=True, to=16)(samples))) and len(set(base.tolist())) == 4
    batch = Pad()(samples)
    for name in ("input_ids", "attention_mask"):
        changed = {**batch, name: batch[name].clone()}
        changed[name][2, 0] = 0
        assert (checksums(changed) != base).tolist() == [False, False, True, False]
    swapped = {**batch, "input_ids": batch["input_ids"].clone()}
    swapped["input_ids"][1, :2] = swapped["input_ids"][1, :2].flip(0)
    assert (checksums(swapped) != base).tolist() == [False, True, False, False]
    assert torch.equal(checksums({**batch, "labels": batch["labels"] + 1}), base)
    with pytest.raises(ValueError, match="do not pack"):
        checksums({**batch, "pixel_values": torch.randn(9, 5)})


def test_numbers_are_scrambled_one_to_one():
    x = torch.cat([torch.arange(-5, 5), torch.tensor([2**63 - 1, -(2**63), 0x123456789ABCDEF0])])
    both = torch.cat([x, ~x]).unique()
    assert len(mix(both).unique()) == len(both)


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
import test_cache
teacher, data, collate, _ = test_cache.case("causal")
forward, passes = teacher.forward, []
def slow(*args, **kwargs):
    passes.append(1)
    if len(passes) == 4:
        print("half-way", flush=True)
        time.sleep(600)
    return forward(*args, **kwargs)
teacher.forward = slow
test_cache.cached_teacher({folder!r}, teacher, data, collate, 4)
"""


def test_a_killed_build_leaves_nothing_that_opens(tmp_path, caplog):
    here, folder = Path(__file__).parent, tmp_path / "cache"
    code = f"import sys; sys.path.insert(0, {str(here.parent)!r})" + CHILD.format(tests=str(here), folder=str(folder))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        assert child.stdout.readline() == b"half-way\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.endswith(".building") and not folder.exists()
    with pytest.raises(ValueError, match="folder of its own"):
        TeacherCache(left[0])
    teacher, data, collate, _ = case("causal")
    with caplog.at_level(logging.WARNING):
        cached_teacher(folder, teacher, data, collate, 4)
    assert str(left[0]) in caplog.text and left[0].is_dir()
    assert len(cached_teacher(folder, silent(teacher), data, collate, 4).rows) == COUNT


def test_the_modes_of_the_teacher_and_the_random_state_are_left_alone(tmp_path):
    teacher, data, collate, _ = case("classes")
    teacher.train()
    teacher.bert.pooler.eval()
    state = torch.get_rng_state()
    cached_teacher(tmp_path / "cache", teacher, data, collate, 4)
    assert torch.equal(state, torch.get_rng_state()) and teacher.training and not teacher.bert.pooler.training


def test_an_empty_folder_is_filled_and_of_two_builds_one_counts(tmp_path, monkeypatch):
    teacher, data, collate, _ = case("classes")
    (tmp_path / "cache").mkdir()
    forward = teacher.forward

    def overtaken(*args, **kwargs):
        teacher.forward = forward
        cached_teacher(tmp_path / "cache", teacher, data, collate, 8)
        return forward(*args, **kwargs)

    teacher.forward = overtaken
    cached_teacher(tmp_path / "cache", teacher, data, collate, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


class Wired(transformers.Trainer):
    """A Trainer that hands each batch to the cache, as KDPruneTrainer is to be wired."""

    cache, seen = None, ()

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns.append(ROW)

    def compute_loss(self, model, inputs, *args, **kwargs):
        batch = dict(inputs)
        rows = batch.pop(ROW, None)
        if model.training:
            self.seen = [*self.seen, *rows.tolist()]
            taught, learnt = self.cache.look_up(rows, batch).logits, ask(self.model.eval(), batch).logits
            model.train()
            torch.testing.assert_close(taught, learnt, atol=1e-5, rtol=1e-5)  # the learning rate is 0
        return super().compute_loss(model, batch, *args, **kwargs)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_trainer_that_removes_columns_gets_the_right_rows(wrapped, strategy, tmp_path):
    teacher, data, collate, _ = case("classes")
    data = data.add_column("title", ["unused"] * COUNT)
    data = with_rows(data.select(range(COUNT)[::-1])) if wrapped else with_rows(data)
    assert isinstance(data, WithRows) == wrapped
    args = transformers.TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=0.0, report_to=[]
    )
    args.train_sampling_strategy, args.disable_tqdm, args.save_strategy = strategy, True, "no"
    args.dataloader_pin_memory = False
    tidy = lambda samples: collate([{k: v for k, v in s.items() if k != "title"} for s in samples])  # noqa: E731
    trainer = Wired(teacher, args, train_dataset=data, eval_dataset=texts(), data_collator=CollateWithRows(collate))
    trainer.cache = cached_teacher(tmp_path / "cache", teacher, data, tidy, 4)
    trainer.train()
    assert sorted(trainer.seen) == sorted([*range(COUNT)] * 2)
    assert trainer.evaluate()["eval_loss"] > 0
