"""examples/cluster: killed in mid-epoch and restarted it ends with the weights of a run that nobody
disturbed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from program_support import PYTHON, printed, ran
from source_support import ROOT

pytest.importorskip("sklearn")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)


TRAIN = ROOT / "examples/cluster/train.py"


def configuration():
    config = json.loads((ROOT / "examples/cluster/digits.json").read_text())
    small = {"model": {"width": 16, "depth": 1, "heads": 2}, "lr": 1e-2, "steps": 9}
    return config | small | {"batch": 300, "save_every": 4, "print_every": 4}  # five steps an epoch


def check_train(rank, world, out, kill_after=None):
    import train

    def after_step(step):
        if step == kill_after and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return train.train(configuration(), Path(out), torch.device("cpu"), after_step)


def test_a_run_that_is_killed_and_restarted_ends_with_the_same_weights(ranks, one_rank, tmp_path):
    want = ranks.run(check_train, str(tmp_path / "undisturbed"))[0]
    with pytest.raises(AssertionError, match="died"):
        # in the second epoch, three steps after a checkpoint
        ranks.run(check_train, str(tmp_path / "killed"), 7)
    assert (tmp_path / "killed/latest").read_text() == "4"
    got = ranks.run(check_train, str(tmp_path / "killed"))[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert any("log_variance" in name and (v - v[0]).abs().max() > 0 for name, v in want.items())
    # another number of processes: the same examples and the same noise, summed in another order
    single = check_train(0, 1, str(tmp_path / "alone"))
    torch.testing.assert_close(single, want, rtol=1e-2, atol=2e-3)


def test_a_checkpoint_that_was_not_written_whole_is_not_named(one_rank, tmp_path, monkeypatch):
    import train

    whole = train.dcp.save

    def save(content, checkpoint_id):
        if checkpoint_id.endswith("step-8"):
            raise KeyboardInterrupt
        whole(content, checkpoint_id=checkpoint_id)

    monkeypatch.setattr(train.dcp, "save", save)
    with pytest.raises(KeyboardInterrupt):
        check_train(0, 1, str(tmp_path))
    assert (tmp_path / "latest").read_text() == "4"


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_and_ends_with_the_same_weights(tmp_path):
    config, finals = tmp_path / "config.json", []
    config.write_text(json.dumps(configuration() | {"steps": 60, "save_every": 5}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    settings |= {"LOGLEVEL": "INFO"}  # torchrun tells of a restart
    for kill in (False, True):
        out = tmp_path / str(kill)
        process = subprocess.Popen(
            [PYTHON, *launcher, "--max-restarts=1", TRAIN, config, "--out", out],
            env=os.environ | settings,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if kill:
            deadline = time.time() + 300
            while (
                not (out / "latest").exists() and time.time() < deadline and process.poll() is None
            ):
                time.sleep(0.05)
            workers = ran("pgrep", "-P", str(process.pid)).stdout.split()
            os.kill(int(workers[-1]), signal.SIGKILL)
        text, _ = process.communicate(timeout=500)
        assert process.returncode == 0, text
        finals.append(torch.load(out / "final.pt"))
        if kill:
            # Not -9: torchrun shows the exit code of one worker, and the other dies of the loss.
            assert "will restart worker group" in text, text
    for name in finals[0]:
        assert torch.equal(finals[0][name], finals[1][name]), name


@pytest.mark.slow
def test_the_example_runs_without_torchrun(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(configuration() | {"steps": 4}))
    command = [PYTHON, "examples/cluster/train.py", tmp_path / "config.json"]
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    printed(*command, "--out", tmp_path / "out", without=ranks)
    assert (tmp_path / "out/final.pt").exists()
