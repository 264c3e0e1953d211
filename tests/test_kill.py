"""kill -9 at awkward moments: what counts as complete loads, and the same command, run again, ends with the
same bits.
"""

import json
import random
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import debug_config, differences
from PIL import Image

from data import Episodes
from model import load_policy

DEVICE = ["--device=cpu", "--threads=1"]
CLOCK = ("seconds", "samples_per_s", "data_ms", "steps_per_s", "chunks_per_s", "time")


def log_of(run):
    """The whole lines of a log, without what the clock said."""
    lines = (run / "log.jsonl").read_text().rpartition("\n")[0].splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def whole(run):
    """Everything in a run folder that is there loads."""
    for folder in (run, run / "grounded"):
        if (folder / "config.json").is_file():
            load_policy(folder)
    if (run / "train_state.pt").is_file():  # what a resume asks for
        torch.load(run / "train_state.pt", weights_only=True)
        assert (run / "config.json").is_file()
    if (run / "log.jsonl").is_file():
        log_of(run)
    if (run / "questions.json").is_file():
        json.loads((run / "questions.json").read_text())
    if (run / "curves.png").is_file():
        Image.open(run / "curves.png").load()


def killed_and_resumed(strike, program, argv, folder, moments):
    """Kill the program at these moments, another run of it at random ones, look at what is there and go on as
    a person would: both end like a run that was let alone.
    """
    assert strike(program, argv, folder / "alone")[0] == 0
    expected, rng = folder / "alone" / "run", random.Random(0)
    anywhere = [("", rng.randint(3, 12), 0.02 * rng.random()) for _ in range(3)]
    for name, kills in (("moments", moments), ("anywhere", anywhere)):
        run = folder / name / "run"
        for at, nth, delay in (*kills, (None, 0, 0)):
            resume = ["--resume"] if (run / "train_state.pt").is_file() else []
            status, said = strike(program, [*argv, *resume], run.parent, at, nth, delay)
            assert status == (0 if at is None else -9) or delay and status == 0, said
            whole(run)
            if at is not None and (run / "log.jsonl").is_file():
                with open(run / "log.jsonl", "a") as f:
                    f.write('{"step": 7, "iteration": 7, "lo')  # a kill may come in the middle of a line, too
        assert {p.relative_to(run) for p in run.rglob("*")} == {
            p.relative_to(expected) for p in expected.rglob("*")
        }
        assert all(
            (run / path).read_bytes() == (expected / path).read_bytes()
            for path in ("model.safetensors", "tokenizer.json")
        )
        assert differences(
            *(torch.load(r / "train_state.pt", weights_only=True) for r in (run, expected))
        ) == 0 and log_of(run) == log_of(expected)


def test_rl(strike, trained, tmp_path):
    argv = [
        "--config",
        "debug",
        f"--init_from={trained}",
        "--out=run",
        "--episodes=1",
        "--eval_episodes=0",
        *DEVICE,
    ]
    moments = [
        ("run/config.json", 2, 0),  # the weights are there alone
        ("run/train_state.pt", 2, 0),  # the policy and the log are an iteration ahead of the state
        *([("run/curves.png", 2, 0)] if find_spec("matplotlib") else []),
    ]
    killed_and_resumed(strike, "rl", argv, tmp_path, moments)


def test_train(strike, data, tmp_path):
    argv = ["--config", "debug", f"--data={data}", "--out=run", *DEVICE]
    moments = [
        ("run/model.safetensors", 1, 0),  # lines in the log, no checkpoint
        ("run/grounded/model.safetensors", 1, 0),
        ("run/train_state.pt", 1, 0),
        ("run/questions.json", 2, 0),
        ("run/train_state.pt", 1, 0),
        ("run/questions.json", 2, 0),
    ]
    killed_and_resumed(strike, "train", argv, tmp_path, moments)


def test_demonstrations(strike, tmp_path):
    argv = ["--config", "debug", "--out=set", "--workers=1"]
    assert strike("prepare", argv, tmp_path / "whole")[0] == 0
    a, b = (tmp_path / name / "set" for name in ("whole", "killed"))
    moments = [
        ("parts/settings.json", 2),
        ("place_0000000_2.npz", 2),
        ("start_place", 2),
        ("questions.tmp/wrist.npy", 1),
        ("set/wrist.npy", 1),
        ("set/meta.json", 2),
        (".npz", 2),
    ]  # the last: it was whole, and was clearing away
    for at, nth in (*moments, (None, 0)):
        status, said = strike("prepare", argv, tmp_path / "killed", at, nth)
        assert status == (0 if at is None else -9), said
        if (b / "meta.json").is_file():
            assert len(Episodes(b, debug_config())) == len(np.load(b / "state.npy"))
        else:
            with pytest.raises(ValueError, match="no data set"):
                Episodes(b, debug_config())
        for path in b.glob("parts/*.npz"):
            assert {name: array.shape for name, array in np.load(path).items()}
    assert {p.relative_to(a): p.is_file() and p.read_bytes() for p in a.rglob("*")} == {
        p.relative_to(b): p.is_file() and p.read_bytes() for p in b.rglob("*")
    }


def test_one_worker_alone_is_killed(strike, tmp_path):
    """As the kernel does when memory runs out."""
    argv = ["--config", "debug", "--out=set", "--workers=2"]
    status, said = strike("prepare", argv, tmp_path / "killed", "start_place", alone=True)
    assert status == 2 and "a process was killed" in said and "run the same command again" in said
    assert strike("prepare", argv, tmp_path / "killed")[0] == 0
