"""Compress a text classifier, on one device or on many, by a recipe: recipes/banking77.yaml explains the keys of one.

accelerate launch scripts/compress.py RECIPE.yaml [--model HUB_ID_OR_PATH]
"""

import argparse
import io
import json
import os
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import evaluate
import yaml
from datasets import ClassLabel, Dataset, load_dataset
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, PreTrainedConfig

from hf_kdprune import KDPruneConfig, KDPruneTrainer, load_pretrained
from hf_kdprune.cli import as_table, quiet_libraries
from hf_kdprune.publish.card import table


@dataclass(frozen=True)
class Recipe:
    """What to compress, and on which data: a field for each key of a recipe."""

    model: str
    dataset: str | dict
    text: str | list
    trainer: dict
    teacher: str | None = None
    label: str = "label"
    metric: str = str(Path(__file__).parent / "metrics" / "accuracy")
    max_length: int = 128


class Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number; YAML 1.1, which PyYAML follows, makes a text of it."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d.]*[eE][-+]?\d+$"), list("-+0123456789"))


def read_recipe(path: Path, model: str | None = None) -> tuple[Recipe, KDPruneConfig]:
    """Read a recipe, whose relative paths start at its own folder; `model` takes the place of the one in it."""
    said = yaml.load(path.read_text(), Loader)
    keys, got = {field.name: field.default for field in fields(Recipe)}, set(said) if isinstance(said, dict) else set()
    unknown, missing = got - set(keys), {k for k, default in keys.items() if default is MISSING} - got
    if unknown or missing:
        raise ValueError(f"a recipe has the keys {list(keys)}; {path} has no {missing}, and none is called {unknown}")
    data = said["dataset"]
    said["dataset"] = {"path": data} if isinstance(data, str) else {"path": str(path.parent.resolve()), **data}
    for where in (said, said["dataset"], said["trainer"]):
        for key in ("model", "teacher", "metric", "path", "resume_from_checkpoint"):
            if isinstance(where.get(key), str) and (path.parent / where[key]).exists():
                where[key] = os.path.normpath(path.parent / where[key])
    said["model"] = model or said["model"]
    output_dir = os.path.normpath(path.parent / said["trainer"].get("output_dir", path.stem))
    return Recipe(**said), HfArgumentParser(KDPruneConfig).parse_dict({**said["trainer"], "output_dir": output_dir})[0]


def label_ids(data: Dataset, column: str, config: PreTrainedConfig) -> dict[str | int, int]:
    """What stands in the column of labels -> the model's label id; by name where both name their labels."""
    feature, values = data.features[column], data.unique(column)
    names = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}
    ids = {str(name).casefold(): i for i, name in config.id2label.items()}
    said = {v: str(names.get(v, v)).casefold() for v in values}
    unnamed = all(name == f"label_{i}" for name, i in ids.items())  # what transformers writes for want of names
    if unnamed or not (names or any(isinstance(v, str) for v in values)):
        ids, said = {i: i for i in range(config.num_labels)}, {v: v for v in values}
    if wrong := [names.get(v, v) for v in values if said[v] not in ids]:
        raise ValueError(
            f"{column}: every label must be one of the model's {len(ids)}, such as {list(ids)[:3]}; {len(wrong)} of "
            f"{len(values)} are not, such as {wrong[:3]}: take a model that was fine-tuned on this data set, or write "
            "the data set's names into id2label and label2id of the model's config.json"
        )
    return {v: ids[said[v]] for v in values}


def encode(data: Dataset, recipe: Recipe, config: PreTrainedConfig) -> Dataset:
    """Token ids in place of texts, and `labels` as the model numbers them."""
    texts = [recipe.text] if isinstance(recipe.text, str) else recipe.text
    if missing := {*texts, recipe.label} - set(data.column_names):
        raise ValueError(f"text, label: must be columns of the data set, {data.column_names}; got {missing}")
    ids, tokenizer = label_ids(data, recipe.label, config), AutoTokenizer.from_pretrained(recipe.model)
    cut = {"truncation": True, "max_length": min(recipe.max_length, tokenizer.model_max_length)}

    def row(rows: dict) -> dict:
        return {**tokenizer(*(rows[c] for c in texts), **cut), "labels": [ids[v] for v in rows[recipe.label]]}

    return data.map(row, batched=True, remove_columns=data.column_names)


def compress(recipe: Recipe, args: KDPruneConfig) -> Path:
    """Read, check, compress and save; returns the directory of the compact model."""
    config = AutoConfig.from_pretrained(recipe.model)
    if "ForSequenceClassification" not in str(config.architectures):
        raise ValueError(f"model: must be a fine-tuned text classifier; {recipe.model} is {config.architectures}")
    with args.main_process_first(desc="read the data"):  # the others find it in the cache
        metric = evaluate.load(recipe.metric, keep_in_memory=True)
        data = load_dataset(**recipe.dataset)
        judge = next((split for split in ("validation", "test") if split in data), None)
        if "train" not in data or judge is None:
            raise ValueError(f"dataset: must have the splits train and validation or test; it has {list(data)}")
        train, test = (encode(data[split], recipe, config) for split in ("train", judge))
    trainer = KDPruneTrainer(
        load_pretrained(recipe.model),
        args,
        teacher=load_pretrained(recipe.teacher) if recipe.teacher else None,
        train_dataset=train,
        eval_dataset=test,
        processing_class=AutoTokenizer.from_pretrained(recipe.model),
        compute_metrics=lambda p: metric.compute(predictions=p.predictions.argmax(-1), references=p.label_ids),
    )
    places = recipe.model, recipe.dataset["path"]  # the last part of a local path is enough on a card
    model, name = (Path(place).resolve().name if os.path.exists(place) else place for place in places)
    trainer.about = {
        "model": {"student": model, "base_model": None if os.path.exists(recipe.model) else model},
        "dataset": {"name": name, "license": None, "source": None},
        "command": shlex.join(["accelerate", "launch", "--num_processes", str(args.world_size), *sys.argv]),
    }
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(os.path.join(args.output_dir, "compact"))
    trainer.accelerator.end_training()
    return Path(args.output_dir, "compact")


def main() -> None:
    """Run a recipe; the first process tells, the others are silent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a YAML file")
    parser.add_argument("--model", help="Hub id or path of a classifier, in place of the recipe's")
    asked = parser.parse_args()
    quiet_libraries()
    recipe, args = read_recipe(asked.recipe, asked.model)
    told = io.StringIO() if args.process_index else sys.stderr
    with redirect_stdout(told), redirect_stderr(told):
        folder = compress(recipe, args)
    if told is sys.stderr:
        report = json.loads((folder / "report.json").read_text())
        print(as_table(table(report), ("", "teacher", "compact", "")))
        print(f"card and pictures: {folder}\nload it: {report['load']}")


if __name__ == "__main__":
    main()
