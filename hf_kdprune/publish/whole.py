"""Which training checkpoints are whole: all that resuming reads is there, and no file was cut off when the process died."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

logger = logging.getLogger(__name__)
STATE, BEFORE, PLAN = "kdprune_state.json", "kdprune_before.safetensors", "plan.json"
CODE = "modeling_kdprune"
SENTINEL = "checkpoint-is-incomplete.txt"  # transformers' JITCheckpointCallback has it lie there while it saves
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
LEFTOVER = re.compile(rf"\.{PREFIX_CHECKPOINT_DIR}-\d+-\w{{8}}(-old)?")  # of a save that was killed: see checkpoint.staged
ZIPPED = re.compile(r".*\.(pt|pth)|(training_args|optimizer|pytorch_model|adapter_model).*\.bin")  # what torch.save wrote
# Weights and optimizer lie in one of these; a sharded one (FSDP) is whole once .metadata, written last, is there.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model*.bin")
SHARDED_WEIGHTS, DEEPSPEED = "pytorch_model_fsdp_*/.metadata", "global_step*/*.pt"
OPTIMIZERS = (OPTIMIZER_NAME, "optimizer*.bin", "optimizer_*/.metadata", "rank*-optimizer.pt", DEEPSPEED)


def why_broken(folder: str | Path) -> str | None:
    """Why training cannot be resumed from a training checkpoint, or None if it is whole.

    What resuming does not read (a tokenizer, training_args.bin) may be missing, but what is there must not be cut off. No
    tensor is read: of weights the header, of what torch.save wrote the end.

    Args:
        folder: checkpoint-N, written by KDPruneTrainer on one rank or several.
    """
    folder = Path(folder)
    try:
        return next((why for check in (unfinished, cut_off, lacking) for why in check(folder)), None)
    except OSError as error:
        return f"it cannot be read ({error})"


def last_whole(output_dir: str | Path) -> str:
    """The training checkpoint of the highest step that is whole; those passed over are named in a warning.

    Args:
        output_dir: That of the run.

    Raises:
        ValueError: There is none.
    """
    found, broken = newest(output_dir)
    for name, why in broken.items():
        logger.warning("%s is passed over, for it is not whole: %s", name, why)
    if found is None:
        lies = f"none of the {len(broken)} there is whole" if broken else "there is none"
        raise ValueError(
            f"resuming needs a whole training checkpoint in {output_dir}, and {lies}: train without resume_from_checkpoint, "
            'with save_strategy="steps" and save_steps'
        )
    return found


def newest(output_dir: str | Path) -> tuple[str | None, dict[str, str]]:
    """The whole checkpoint of the highest step, None if there is none, and why those of higher steps are not whole."""
    folders = [entry for entry in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if NAME.fullmatch(entry.name)]
    broken = {}
    for folder in sorted(folders, key=lambda entry: int(NAME.fullmatch(entry.name)[1]), reverse=True):
        if (why := why_broken(folder)) is None:
            return str(folder), broken
        broken[str(folder)] = why
    return None, broken


def sweep(output_dir: str | Path) -> None:
    """Remove what killed saves left beside the checkpoints: hidden folders that no name was given to."""
    for entry in Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*"):
        if LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry)


def unfinished(folder: Path) -> Iterator[str]:
    """Signs that the process died while it was written."""
    if (folder / SENTINEL).exists():
        yield f"{SENTINEL} lies in it"
    if not (folder / TRAINER_STATE_NAME).is_file():
        yield f"{TRAINER_STATE_NAME}, which is written last, is missing"


def cut_off(folder: Path) -> Iterator[str]:
    """Files that end too early."""
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".json":
            try:
                json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                yield f"{file.name} is no JSON ({error})"
        elif file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):  # compares the length of the file with what its header says
                    pass
            except SafetensorError as error:
                yield f"{file.name} is cut off ({error})"
        elif ZIPPED.fullmatch(file.name) and not zipfile.is_zipfile(file):
            yield f"{file.name} is cut off (its {file.stat().st_size} bytes are no whole zip archive)"


def lacking(folder: Path) -> Iterator[str]:
    """Files that resuming reads and that are not there."""
    for name in (CONFIG_NAME, PLAN, STATE):
        if not (folder / name).is_file():
            yield f"{name} is missing"
    if not has(folder, *WEIGHTS, SHARDED_WEIGHTS, DEEPSPEED):
        yield "there are no weights in it"
    for index in folder.glob("*.index.json"):
        for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (folder / shard).is_file():
                yield f"{shard} is missing, which {index.name} names"
    if CODE in str(json.loads((folder / CONFIG_NAME).read_text()).get("auto_map")) and not (folder / f"{CODE}.py").is_file():
        yield f"{CODE}.py is missing, which {CONFIG_NAME} names"
    yield from without_optimizer(folder, json.loads((folder / STATE).read_text()))


def without_optimizer(folder: Path, state: dict) -> Iterator[str]:
    """What an ordinary checkpoint has beside the model, of `save_only_model` nothing."""
    ranks = state.get("ranks")  # older checkpoints do not say
    numbered = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks or 0)]
    if not has(folder, *OPTIMIZERS, SCHEDULER_NAME, "rng_state*.pth"):
        yield "it holds a model only (save_only_model): training cannot be resumed from it, load_pretrained loads it"
    if not has(folder, *OPTIMIZERS):
        yield f"{OPTIMIZER_NAME} is missing"
    if not has(folder, SCHEDULER_NAME, DEEPSPEED):  # DeepSpeed keeps its own
        yield f"{SCHEDULER_NAME} is missing"
    for name in numbered or ["rng_state*.pth"]:
        if not has(folder, name):
            yield f"{name} is missing, the state of random numbers{f' of one of {ranks} ranks' if len(numbered) > 1 else ''}"
    finished = "steps" in state and state.get("done") == len(state["steps"])
    if finished and not (folder / BEFORE).is_file():
        yield f"{BEFORE} is missing, with which recovery is compared"


def has(folder: Path, *patterns: str) -> bool:
    """Whether a file of one of these names lies in `folder`."""
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)
