"""The loopback Hub against the real client, each in a process of its own: HF_ENDPOINT is read at import."""

import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

CARD = "---\nlicense: apache-2.0\npipeline_tag: text-classification\nbase_model: user/teacher\n---\n# tiny\n"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

# The model's code travels with it, so that loading needs trust_remote_code as a pruned checkpoint does.
MAKE = """
import sys, torch
from transformers import BertConfig, BertForSequenceClassification
torch.manual_seed(0)
config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
config.auto_map = {"AutoModelForSequenceClassification": "modeling_tiny.Tiny"}
BertForSequenceClassification(config).save_pretrained(sys.argv[1])
"""
MODELING = """
from transformers import BertForSequenceClassification
class Tiny(BertForSequenceClassification):
    travelled = True
"""
PUSH = """
import sys
from huggingface_hub import HfApi
api = HfApi()
url = api.create_repo(sys.argv[2], private=True, exist_ok=True)
api.create_repo(sys.argv[2], private=True, exist_ok=True)
commit = api.upload_folder(folder_path=sys.argv[1], repo_id=url.repo_id, commit_message="m", ignore_patterns=["*.log"])
print(url.repo_id, commit.oid)
"""
PULL = """
import sys, torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from safetensors.torch import load_file
assert AutoConfig.from_pretrained(sys.argv[1]).hidden_size == 16
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
expected = load_file(sys.argv[2])
assert model.travelled and set(expected) == set(model.state_dict())
assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
assert AutoTokenizer.from_pretrained(sys.argv[1])("a b")["input_ids"] == [2, 5, 6, 3]
print(pipeline(model=sys.argv[1], trust_remote_code=True)("a b")[0]["label"])
"""
LOOK = """
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
api = HfApi()
files = {file.path: file for file in api.list_repo_tree("user/tiny", recursive=True) if hasattr(file, "size")}
assert files["dummy.bin"].lfs.size == 11 * 2**20 and files["README.md"].lfs is None
assert sorted(files) == sorted(api.list_repo_files("user/tiny"))
found = api.get_paths_info("user/tiny", ["pictures", "README.md", "no"])
assert {entry.path for entry in found} == {"pictures", "README.md"}
info = api.model_info("user/tiny", revision=api.model_info("user/tiny").sha, files_metadata=True)
assert info.pipeline_tag == "text-classification" and info.private and len(info.siblings) == len(files)
def refused(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error:
        return
    raise AssertionError(f"{call} {args} was not refused with {error}")
refused(EntryNotFoundError, hf_hub_download, "user/tiny", "no.txt")
refused(RevisionNotFoundError, hf_hub_download, "user/tiny", "README.md", revision="no")
refused(RepositoryNotFoundError, hf_hub_download, "user/no", "README.md")
refused(RepositoryNotFoundError, api.model_info, "user/tiny", token=False)
"""


def run(script: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `script` in a fresh Python."""
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def done(result: subprocess.CompletedProcess) -> str:
    """What the process printed; fails with its errors if it failed."""
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with code of its own, a card, a picture, a large file and a file to leave behind."""
    path = tmp_path_factory.mktemp("tiny")
    done(run(MAKE, path))
    (path / "pictures").mkdir()
    (path / "pictures" / "plan.png").write_bytes(PNG)
    (path / "modeling_tiny.py").write_text(MODELING)
    (path / "README.md").write_text(CARD)
    (path / "train.log").write_text("not to be uploaded")
    (path / "dummy.bin").write_bytes(bytes(range(256)) * (11 * 2**12))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (path / "vocab.txt").write_text("\n".join(words))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return path


def local(folder: Path) -> dict[str, bytes]:
    """The files of `folder` that an upload takes."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_is_pushed_loads_by_id_in_a_fresh_process(folder: Path, tmp_path: Path):
    """Upload through LFS, then a model with code of its own, its tokenizer and its pipeline from an empty cache."""
    with HubServer() as hub:
        repo_id, oid = done(run(PUSH, folder, "tiny", env=hub.env(tmp_path / "push"))).split()
        assert repo_id == "user/tiny"
        files = hub.files(repo_id)
        assert files.pop(".gitattributes") and files == local(folder)
        put = [request for request in hub.requests if request.method == "PUT"]
        assert {len(request.body) for request in put} >= {11 * 2**20, len(PNG)}
        assert all(request.token == "hf_test" for request in hub.requests if request.method == "POST")
        weights = folder / "model.safetensors"
        assert done(run(PULL, repo_id, weights, env=hub.env(tmp_path / "pull"))) in ("LABEL_0", "LABEL_1")
        done(run(LOOK, env=hub.env(tmp_path / "look")))
        assert list(hub.repos[repo_id].commits)[-1] == oid


def test_a_client_with_xet_on_is_declined(folder: Path, tmp_path: Path):
    """huggingface_hub 2 does not ask whether there is xet: without LFS it never comes to it."""
    with HubServer(lfs=False) as hub:
        done(run(PUSH, folder, "user/tiny", env=hub.env(tmp_path, HF_HUB_DISABLE_XET="")))
        assert hub.files("user/tiny").items() >= local(folder).items()


@pytest.mark.parametrize(
    ("token", "card", "says"),
    [
        ("", CARD, "Invalid username or password"),
        ("stolen", CARD, "Invalid credentials in Authorization header"),
        ("hf_test", "---\nbase_model: ../teacher\n---\n", '"base_model" with value "../teacher" is not valid'),
        ("hf_test", "---\nmodel-index:\n- name: x\n  results:\n  - task: {type: t}\n---\n", "dataset.name"),
    ],
    ids=["no token", "bad token", "base model is a path", "incomplete results"],
)
def test_refuses_what_the_hub_refuses(tmp_path: Path, token: str, card: str, says: str):
    """Nothing is stored, and the client says why."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text(card)
    with HubServer() as hub:
        result = run(PUSH, tmp_path / "model", "user/x", env=hub.env(tmp_path / "home", token=token))
        assert result.returncode != 0 and says in result.stderr, result.stderr
        assert "user/x" not in hub.repos or set(hub.files("user/x")) == {".gitattributes"}


def test_fails_on_demand(tmp_path: Path):
    """A failed commit leaves the repository as it was; a dropped preupload is tried again by the client."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with HubServer() as hub:
        hub.fail_next(status=500, path_contains="/commit/")
        hub.fail_next(status=None, path_contains="/preupload/", method="POST")
        failed = run(PUSH, tmp_path / "model", "user/x", env=hub.env(tmp_path / "home"))
        assert failed.returncode != 0 and "A failure that was asked for" in failed.stderr
        assert [request.status for request in hub.requests if "/preupload/" in request.path] == [None, 200]
        assert set(hub.files("user/x")) == {".gitattributes"}
        done(run(PUSH, tmp_path / "model", "user/x", env=hub.env(tmp_path / "home")))
        assert hub.files("user/x")["config.json"] == b"{}"
