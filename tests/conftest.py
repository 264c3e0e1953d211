"""What the tests share: a policy with live weights, a debug data set and run, programs that are killed."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from data import Tokenizer
from model import PRESETS, Config, SyVLA

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # the models are tiny: a second thread only costs
WORDS = [" put", " the", " red", " blue", " cube", " on", " pad", " where", " is", " left", " near"]


def debug_config(**changes):
    """The model's share of the debug preset, with changes."""
    known = {field.name for field in dataclasses.fields(Config)}
    preset = {name: value for name, value in PRESETS["debug"].items() if name in known}
    return Config(**preset | {"cameras": "front,wrist"} | changes)


def differences(a, b):
    """Largest absolute difference between two structures of tensors and numbers; infinite if they are shaped
    differently.
    """
    if isinstance(a, torch.Tensor):
        return (
            (a.double() - b.double()).abs().nan_to_num(math.inf).max().item()
            if a.shape == b.shape
            else math.inf
        )
    if isinstance(a, dict):
        return max((differences(a[k], b[k]) for k in a), default=0) if a.keys() == b.keys() else math.inf
    if isinstance(a, (list, tuple)):
        return max((differences(x, y) for x, y in zip(a, b)), default=0) if len(a) == len(b) else math.inf
    return 0 if a == b else math.inf


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def make_policy():
    """make_policy(**changes to the debug preset) -> SyVLA whose every weight is random.

    The real initialisation starts residual branches, gates and output at zero: most wrong formulas would not
    show.
    """

    def make(seed=0, statistics=True, words=WORDS, **changes):
        torch.manual_seed(seed)
        policy = SyVLA(debug_config(**changes), Tokenizer(words)).eval()
        for parameter in policy.parameters():
            if not parameter.any() or parameter.ndim == 1 or (parameter == 1).all():
                parameter.data += 0.3 * torch.randn_like(parameter)
        policy.vlm.queries.data.mul_(20)
        if statistics:
            low = torch.tensor([-90.0, -80, -70, -60, -50, 0])[: policy.cfg.action_dim]
            ends = {"q01": low, "min": low, "q99": low + 100, "max": low + 100}
            policy.set_statistics(dict.fromkeys(("state", "action"), ends))
        return policy

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set made by prepare.py in the real simulation (a few seconds)."""
    folder = tmp_path_factory.mktemp("data") / "debug"
    command = [sys.executable, ROOT / "prepare.py", "--config", "debug", f"--out={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A run folder that train.py wrote: 2 steps of grounding, 2 of actions."""
    folder = tmp_path_factory.mktemp("run") / "debug"
    train.main(["--config", "debug", f"--data={data}", f"--out={folder}", "--device=cpu", "--threads=1"])
    return folder


@pytest.fixture
def fails(capsys):
    """fails(main, argv) -> the one line on stderr with which main gave up; exit status 2 and no traceback are
    checked.
    """

    def call(main, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(argv)
        lines = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return call


@pytest.fixture(scope="session")
def strike():
    """strike(program, argv, folder, at=None, nth=1, delay=0.0, alone=False, **settings) -> exit status, last
    words.

    Runs a program in `folder` and kills it with its children, by SIGKILL, right before the nth change on disk
    of a path below the folder that contains `at`, or `delay` seconds after that moment (then perhaps too
    late); never if `at` is None. What is on disk changes by such calls only, so no clock is needed to reach a
    moment. alone: only the process that would make the change is killed. settings: variables of the program's
    module, set before it begins.
    """
    command = [sys.executable, ROOT / "tests" / "striker.py"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(program, argv, folder, at=None, nth=1, delay=0.0, alone=False, **settings):
        folder.mkdir(exist_ok=True)
        moment = [at or "", nth if at is not None else 0, delay, alone]
        print(json.dumps([program, argv, str(folder), *moment, settings]), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        log = folder.with_name(folder.name + ".log").read_text()
        return status, ([""] + log.splitlines())[-1]

    yield run
    server.stdin.close()
    server.wait()
