"""Save, load and verify: a directory that `from_pretrained` loads, whole or not there at all."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..inputs import made_up_inputs
from ..layers import evaluating
from ..prune.sites import Plan
from . import modeling_kdprune
from .card import write_card

TOLERANCE = 1e-5
CODE = Path(modeling_kdprune.__file__)
TRAINED_ONLY = ("kdprune_auxiliary.", "kdprune_projection.")  # what trains with a model and is dropped on save
PROBE = ".probe.safetensors"


def save_pretrained(
    model: PreTrainedModel,
    path: str | Path,
    processing_class: object = None,
    *,
    report: dict | None = None,
    verify: bool = True,
    **options: object,
) -> str:
    """Save a model that was (or was not) made smaller as an ordinary checkpoint.

    Args:
        model: The model; the plan that made it smaller goes into plan.json.
        path: The directory. It is written beside its final name and moved there when it is whole; other files that lie
            in it stay.
        processing_class: Tokenizer or processor, saved along.
        report: What the card shows; with it report.json, README.md and pictures are written.
        verify: Reload the checkpoint in a fresh process and compare the outputs.
        **options: For transformers' own save_pretrained: max_shard_size, or state_dict where `model` does not hold the
            weights whole (FSDP).

    Returns:
        The line that loads it.

    Raises:
        OSError: The directory cannot be written.
        RuntimeError: It does not reload, or gives other outputs; nothing was put under the final name.
    """
    path = Path(path)
    check_writable(path.parent)
    model = merged(model)
    auto = auto_class(model)
    with staged(path) as folder:
        write_model(model, folder, auto, **options)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        if report is not None:
            (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
            write_card(folder)
        if verify:
            verify_checkpoint(model, folder, auto)
    return load_line(model, str(path))


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is published: with adapters of PEFT a copy in whose weights they are, else the model itself."""
    if not hasattr(model, "get_base_model"):
        return model
    plain = copy.deepcopy(model).merge_and_unload()
    plain.kdprune_plan = getattr(model, "kdprune_plan", None)
    return plain


def write_model(
    model: PreTrainedModel, folder: Path, auto: str, state_dict: dict[str, Tensor] | None = None, **options: object
) -> None:
    """Weights, config and plan; for a smaller model that its own class cannot build also the file that travels along."""
    state = model.state_dict() if state_dict is None else state_dict
    state = {k: v for k, v in state.items() if not k.startswith(TRAINED_ONLY)}
    stock = getattr(model.config, "auto_map", None)
    if is_pruned(model):
        model.config.auto_map = {auto: f"{CODE.stem}.{type(model).__name__}"}
        state[modeling_kdprune.HINT] = torch.ones(1)
        options = {**options, "save_original_format": False}  # older names are not translated back for custom code
    try:
        model.save_pretrained(folder, state_dict=state, **options)
    finally:
        if is_pruned(model):
            model.config.auto_map = stock
    if is_pruned(model):
        shutil.copyfile(CODE, folder / CODE.name)
    if (plan := getattr(model, "kdprune_plan", None)) is not None:
        plan.save(folder / "plan.json")


def is_pruned(model: PreTrainedModel) -> bool:
    """Whether surgery was done on `model`, now or before it was loaded."""
    return bool(getattr(model.config, "kdprune", None))


def auto_class(model: PreTrainedModel) -> str:
    """The Auto class that loads this class of model: "AutoModelForSequenceClassification".

    Raises:
        ValueError: No Auto class knows it.
    """
    autos = [a for a in vars(modeling_auto).values() if isinstance(a, type) and a.__name__.startswith("AutoModel")]
    general = [modeling_auto.AutoModelForPreTraining]  # what others know better; masks are no task of a decoder
    general += [modeling_auto.AutoModelForMaskedLM] if model.config.is_encoder_decoder else []
    autos.sort(key=lambda auto: (auto is not modeling_auto.AutoModel, auto in general))
    for auto in autos:
        known = auto._model_mapping.get(type(model.config), ())
        if type(model).__name__ in [c.__name__ for c in (known if isinstance(known, (tuple, list)) else (known,))]:
            return auto.__name__
    raise ValueError(
        f"a checkpoint needs an Auto class that loads it; transformers {transformers.__version__} has none for "
        f"{type(model).__name__}: save a model of a class that AutoModel or AutoModelFor... knows"
    )


def load_line(model: PreTrainedModel, path: str) -> str:
    """The line of Python that loads the checkpoint at `path` or under that id on the Hub."""
    trust = ", trust_remote_code=True" if is_pruned(model) else ""
    return f"{auto_class(model)}.from_pretrained({json.dumps(path)}{trust})"


def load_pretrained(path: str | Path, **kwargs: object) -> PreTrainedModel:
    """Load a checkpoint of this package; runs no code from the checkpoint.

    Args:
        path: A directory or an id on the Hub.
        **kwargs: For `from_pretrained`.

    Raises:
        ValueError: The checkpoint names no class of transformers, or its config and its weights do not go together.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    name = (config.architectures or ["none"])[0]
    stock = getattr(transformers, name, None)
    if stock is None:
        raise ValueError(f"{path}: its architecture must be a class of transformers, got {name!r}")
    section = getattr(config, "kdprune", None)
    if section is None and CODE.stem in str(getattr(config, "auto_map", None)):
        raise ValueError(f"{path}: config.json must state the shapes under 'kdprune', and does not: save the model again")
    try:
        model = (getattr(modeling_kdprune, name) if section else stock).from_pretrained(path, config=config, **kwargs)
    except (RuntimeError, AttributeError) as error:
        if section is None:
            raise
        raise ValueError(
            f"{path}: the weights must have the shapes that config.json states under 'kdprune', and do not ({error}): put "
            "the config.json and the weights of one save together"
        ) from error
    model.config.auto_map = None
    if (file := Path(path) / "plan.json").is_file():
        model.kdprune_plan = Plan.load(file)
    return model


def check_writable(path: str | Path) -> None:
    """Raise OSError unless a file can be made in `path`, which is made if it is not there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise type(error)(
            error.errno, f"the output directory must be writable ({error.strerror}): choose another", str(path)
        ) from error


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a new directory beside `path` that takes its name if the block ends well, and vanishes if it does not.

    Files of an older directory of that name that the new one lacks are kept.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    folder.chmod(0o777 & ~current_umask())
    old = folder.with_name(folder.name + "-old")
    try:
        yield folder
        if path.exists():
            path.rename(old)
        folder.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if old.exists():
        for entry in old.iterdir():
            if not (path / entry.name).exists():
                entry.rename(path / entry.name)
        shutil.rmtree(old)


def current_umask() -> int:
    """The umask of this process; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def verify_checkpoint(model: PreTrainedModel, folder: Path, auto: str) -> None:
    """Reload `folder` in a fresh process and compare outputs on a probe.

    Raises:
        RuntimeError: It does not load, or the outputs differ by more than 1e-5 of their scale.
    """
    probe = folder / PROBE
    save_file({**probe_inputs(model), "expected": probe_output(model, probe_inputs(model))}, probe)
    code = "import sys; from hf_kdprune.publish.checkpoint import compare_reloaded; compare_reloaded(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder), auto]
    try:
        child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    finally:
        probe.unlink()
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    if child.returncode:
        raise RuntimeError(f"the saved checkpoint does not reload, nothing was kept:\n{child.stderr[-3000:]}")


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Made-up inputs for the comparison; of tokens two rows, the second padded."""
    inputs = made_up_inputs(model, 16, 2)
    text = model.config.get_text_config()
    one = "ForSequenceClassification" in type(model).__name__ and (text.pad_token_id is None or text.is_encoder_decoder)
    if "attention_mask" in inputs and not one:  # these look for the end of each row
        inputs["attention_mask"][1, 9:] = 0
        inputs["input_ids"][1, 9:] = text.pad_token_id or 0
    return {name: value[:1] if one else value for name, value in inputs.items()}


@torch.no_grad()
def probe_output(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """What the model gives first for the probe, in eval mode."""
    with evaluating(model):
        output = model(**{k: v.to(model.device) for k, v in inputs.items()})[0]
    return output.float().cpu().contiguous()


def compare_reloaded(folder: str, auto: str) -> None:
    """In the fresh process: load both ways, compare, exit with an error if anything differs."""
    probe = load_file(Path(folder) / PROBE)
    expected = probe.pop("expected")
    for load in (
        lambda: getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True),
        lambda: load_pretrained(folder),
    ):
        difference = float((probe_output(load(), probe) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise SystemExit(f"outputs after reload differ by {difference:.2e}")
