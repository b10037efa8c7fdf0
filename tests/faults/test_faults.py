"""What really ends trainings, in processes that really die; after each, training goes on as if nothing had happened."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hub_server import Blob, HubServer, Repo
from small import logits, tiny_bert

from hf_kdprune import load_pretrained
from hf_kdprune.publish.whole import last_whole, newest, why_broken

RUN = Path(__file__).with_name("run.py")


class Run:
    """A training in `folder`, whose processes are forked from one that has imported everything."""

    def __init__(self, server, folder):
        self.server, self.folder, self.out = server, folder, folder / "out"
        self.log, self.pid = folder / "log.txt", None

    def start(self, fault="none", resume=False, **order):
        self.log.unlink(missing_ok=True)
        order = {"out": str(self.out), "log": str(self.log), "fault": fault, "resume": resume, "settings": {}, **order}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        self.pid = self.answer("pid")

    def wait(self):
        """The exit code; negative: the signal."""
        code, self.pid = self.answer("exit"), None
        return code

    def kill(self):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def answer(self, wanted):
        kind, number = self.server.stdout.readline().split()
        assert kind == wanted
        return int(number)

    def end(self, *args, **order):
        self.start(*args, **order)
        return self.wait()

    def signal(self, send, number=signal.SIGTERM):
        """In mid-step, where the fault `wait` halts it."""
        wait_for(self.folder / "ready")
        send(self.pid, number)
        time.sleep(0.3)  # until what dies of it is dead
        (self.folder / "go").touch()


def wait_for(*files):
    end = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < end, files
        time.sleep(0.01)


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def server(hub, tmp_path_factory):
    env = {**hub.env(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(RUN)], env=env, **pipes) as process:
        yield process
        process.stdin.close()
        assert process.wait(timeout=60) == 0


@pytest.fixture
def start(server):
    """Begin a run in a folder; one that a failed test leaves behind is ended."""
    runs = []
    yield lambda folder: runs.append(Run(server, folder)) or runs[-1]
    for run in runs:
        if run.pid is not None:
            run.kill()


@pytest.fixture
def run(start, tmp_path):
    return start(tmp_path)


@pytest.fixture(scope="module")
def expected(server, tmp_path_factory):
    """The weights that the training has at its end if nothing happens."""
    whole = Run(server, tmp_path_factory.mktemp("whole"))
    whole.start()
    started = time.monotonic()
    assert whole.wait() == 0, whole.log.read_text()
    seconds, final = time.monotonic() - started, torch.load(whole.folder / "final.pt")
    assert final["kept"] == "after"  # else all runs would end alike
    return {"weights": final["weights"], "seconds": seconds}


def assert_goes_on(run, expected, checkpoint, **order):
    """The checkpoint that was said to be the last whole one is, loads, and leads to the same model."""
    assert last_whole(run.out) == str(checkpoint) and why_broken(checkpoint) is None
    assert torch.isfinite(logits(load_pretrained(checkpoint))).all()
    assert run.end(resume=True, **order) == 0, run.log.read_text()
    assert same(run, expected)


def same(run, expected):
    weights = torch.load(run.folder / "final.pt")["weights"]
    return all(torch.equal(tensor, expected["weights"][name]) for name, tensor in weights.items())


def assert_said(run, step, by, go_on):
    (line,) = [line for line in run.log.read_text().splitlines() if line.startswith("training ended at")]
    assert line.startswith(f"training ended at step {step} of 11 by {by}"), line
    assert line.endswith(go_on), line
    return line


GO_ON = "the last whole checkpoint is {}: once the cause is gone, go on with train(resume_from_checkpoint=True)"


def test_sigterm(run, expected):
    run.start("wait")
    run.signal(os.kill)
    assert run.wait() == 143, run.log.read_text()
    checkpoint = run.out / "checkpoint-4"
    assert_said(run, 4, "SIGTERM; ", f"checkpoint is {checkpoint}: go on with train(resume_from_checkpoint=True)")
    assert_goes_on(run, expected, checkpoint)


def test_sigterm_to_the_workers_of_the_data_loader_too(run, expected):
    """As torchrun and batch systems send it; save_steps is such that only the signal writes a checkpoint."""
    settings = {"dataloader_num_workers": 1, "save_steps": 50}
    run.start("wait", settings=settings)
    run.signal(os.killpg)
    assert run.wait() == 143, run.log.read_text()
    assert_goes_on(run, expected, run.out / "checkpoint-4", settings=settings)


def test_two_sigterms_end_it_at_once(run):
    run.start("wait")
    wait_for(run.folder / "ready")
    for _ in range(2):
        os.kill(run.pid, signal.SIGTERM)
        time.sleep(0.3)
    assert run.wait() == -signal.SIGTERM
    assert last_whole(run.out) == str(run.out / "checkpoint-2")


@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_at_any_moment(run, expected, seed):
    run.start()
    time.sleep(random.Random(seed).uniform(0, expected["seconds"]))
    assert run.kill() in (-signal.SIGKILL, 0)
    if checkpoint := newest(run.out)[0]:
        assert_goes_on(run, expected, checkpoint)
    else:
        assert run.end() == 0 and same(run, expected)


def test_sigkill_in_the_middle_of_a_save(run, expected):
    assert run.end("killed_in_save") == -signal.SIGKILL
    assert why_broken(run.out / "checkpoint-4") is not None
    assert_goes_on(run, expected, run.out / "checkpoint-2")
    assert "checkpoint-4 is passed over, for it is not whole: trainer_state.json, which is written last" in run.log.read_text()
    assert why_broken(run.out / "checkpoint-4") is None


def test_disk_full_by_a_limit(run, expected):
    assert run.end("full") == 1
    assert [entry.name for entry in run.out.iterdir()] == ["checkpoint-2"]
    assert "torch says so where a file could not be written" in assert_said(run, 4, "", GO_ON.format(run.out / "checkpoint-2"))
    assert_goes_on(run, expected, run.out / "checkpoint-2")


@pytest.mark.parametrize(
    "kilobytes", [400, 900]
)  # it ends among the files of the model, in the optimizer's of a later checkpoint
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root mounts a disk of a given size")
def test_disk_full(run, expected, kilobytes):
    run.out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(run.out)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        assert run.end() == 1
        checkpoint = last_whole(run.out)
        assert [entry.name for entry in run.out.iterdir() if why_broken(entry)] == []
        assert_said(run, int(checkpoint.split("-")[-1]) + 2, "", GO_ON.format(checkpoint))
        subprocess.run([*mount[:4], f"remount,size={kilobytes + 4000}k", *mount[5:]], check=True)
        assert_goes_on(run, expected, checkpoint)
    finally:
        subprocess.run(["umount", "-l", str(run.out)], check=True)


def test_output_directory_that_is_removed(run, expected):
    """The training goes on, says so, and what it saves from then on is whole."""
    assert run.end("gone") == 0, run.log.read_text()
    assert sorted(entry.name for entry in run.out.iterdir()) == [
        "checkpoint-10",
        "checkpoint-11",
        *(f"checkpoint-{i}" for i in (4, 6, 8)),
    ]
    assert f"{run.out} is gone, and made anew: earlier checkpoints are lost" in run.log.read_text()
    assert_goes_on(run, expected, run.out / "checkpoint-11")


def test_output_directory_that_something_else_replaces(run, expected):
    assert run.end("replaced") == 1
    assert_said(run, 4, "", f"{run.out} has no whole checkpoint: start anew, with save_strategy and save_steps to lose less")
    run.out.unlink()
    (run.folder / "moved").rename(run.out)
    assert_goes_on(run, expected, run.out / "checkpoint-2")


def test_output_directory_that_cannot_be_written_any_more(start, expected):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        Path(folder).chmod(0o777)
        run = start(Path(folder))
        assert run.end("unwritable") == 1
        assert_said(
            run, 4, "PermissionError: [Errno 13] the output directory must be writable", GO_ON.format(run.out / "checkpoint-2")
        )
        for entry in (run.out, *run.out.rglob("*")):
            entry.chmod(0o777)
        assert_goes_on(run, expected, run.out / "checkpoint-2")


def test_a_worker_of_the_data_loader_dies(run, expected):
    settings = {"dataloader_num_workers": 1}
    assert run.end("worker_dies", settings=settings) == 1
    checkpoint = last_whole(run.out)
    (step,) = {line.split()[4] for line in run.log.read_text().splitlines() if line.startswith("training ended at")}
    assert "worker" in assert_said(run, step, "", GO_ON.format(checkpoint))
    assert_goes_on(run, expected, checkpoint, settings=settings)


def test_interrupted_download_of_the_teacher(run, hub, tmp_path):
    """What is half there does not load; the next attempt has the whole."""
    teacher = tiny_bert(seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    files = {file.name: file.read_bytes() for file in (tmp_path / "teacher").iterdir()}
    hub.repos["user/teacher"] = Repo(private=False)
    hub.repos["user/teacher"].add("teacher", {name: Blob(data, name.endswith(".safetensors")) for name, data in files.items()})
    hub.cut_next(after=40_000, path_contains="/model.safetensors")
    hub.fail_next(None, path_contains="/model.safetensors", method="GET", times=6)
    assert run.end(teacher="user/teacher") == 0, run.log.read_text()
    lines = [json.loads(line) for line in run.log.read_text().splitlines() if line.startswith(('"', "[["))]
    assert len(lines) == 4
    assert isinstance(lines[0], str) and isinstance(lines[1], str), lines
    assert lines[2] == lines[3] == logits(teacher).tolist()
    asked = [r.status for r in hub.requests if r.method == "GET" and r.path.endswith("/model.safetensors")]
    assert asked == [200, *[None] * 6, 200]  # cut off, asked for the rest again and again; the second attempt has all


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["one", "launcher"])
def test_sigterm_with_two_ranks(tmp_path, whom):
    """All stop at the same step, whichever of them got the signal."""
    order = {
        "out": str(tmp_path / "out"),
        "fault": "wait",
        "resume": False,
        "settings": {"save_steps": 50, "ddp_backend": "gloo"},
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(RUN), json.dumps(order)]
    with (tmp_path / "log.txt").open("w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log)
    ready = [tmp_path / f"ready{rank}" for rank in (0, 1)]
    wait_for(*ready)
    os.kill(launcher.pid if whom == "launcher" else int(ready[1].read_text()), signal.SIGTERM)
    time.sleep(0.3)
    (tmp_path / "go").touch()
    assert launcher.wait(timeout=60) != 0
    said = (tmp_path / "log.txt").read_text()
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-4" and why_broken(checkpoint) is None, said
    assert {file.name for file in checkpoint.glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert said.count("training ended at step 4 of") == 1 and not list(tmp_path.glob("final*"))
