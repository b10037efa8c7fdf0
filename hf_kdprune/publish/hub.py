"""Push a checkpoint directory to the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from .card import write_card

# What else lies in a Trainer's output directory and is nobody's business on the Hub.
IGNORED = ["checkpoint-*", "checkpoint-*/**", "runs/**", "_*", ".*", "training_args.bin", "**/__pycache__/**"]


def push(
    path: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload compact model",
) -> CommitInfo:
    """Upload a checkpoint; the load line in its card and report becomes that of the Hub.

    Args:
        path: A directory that `save_pretrained` wrote.
        repo_id: "user/name", or "name" for the token's own user.
        token: One that may write; default: the one that is logged in.
        private: Whether a new repository is private.
        revision: The branch.
        commit_message: Of the commit.

    Raises:
        ValueError: There is no checkpoint at `path`.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"a checkpoint has a config.json; {path} has none: save the model there first")
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    name_after_hub(path, repo)
    return api.upload_folder(
        repo_id=repo, folder_path=path, commit_message=commit_message, revision=revision, ignore_patterns=IGNORED
    )


def name_after_hub(path: Path, repo: str) -> None:
    """Put the id on the Hub into the load line of report.json and of the card."""
    file = path / "report.json"
    if file.is_file():
        report = json.loads(file.read_text())
        call, _, rest = report["load"].partition("(")
        trust = rest.partition(",")[2]
        report["load"] = f"{call}({json.dumps(repo)}{',' + trust if trust else ')'}"
        report["name"] = repo.split("/")[-1]
        file.write_text(json.dumps(report, indent=1) + "\n")
        write_card(path)
