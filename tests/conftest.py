"""What the tests share: the repository on sys.path, a policy with live weights, one debug data set, one debug run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from data import Tokenizer
from model import PRESETS, Config, SyVLA

torch.set_num_threads(1)  # the models are tiny: a second thread only costs
WORDS = [" put", " the", " red", " blue", " cube", " on", " pad", " where", " is", " left", " near"]


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def make_policy():
    """make_policy(**changes to the debug preset) -> SyVLA whose every weight is random.

    The real initialisation starts residual branches, gates and output at zero: most wrong formulas would not show.
    """

    def make(seed=0, statistics=True, **changes):
        torch.manual_seed(seed)
        policy = SyVLA(Config(**{**PRESETS["debug"], **changes}), Tokenizer(WORDS)).eval()
        for parameter in policy.parameters():
            if not parameter.any() or parameter.ndim == 1 or (parameter == 1).all():
                parameter.data += 0.3 * torch.randn_like(parameter)
        policy.vlm.queries.data.mul_(20)
        if statistics:
            low = torch.tensor([-90.0, -80, -70, -60, -50, 0])[: policy.cfg.action_dim]
            policy.set_statistics({name: {"q01": low, "q99": low + 100} for name in ("state", "action")})
        return policy

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set made by prepare.py in the real simulation (a few seconds)."""
    folder = tmp_path_factory.mktemp("data") / "debug"
    subprocess.run([sys.executable, ROOT / "prepare.py", "--config", "debug", f"--out={folder}"], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A run folder that train.py wrote: 2 steps of grounding, 2 of actions."""
    folder = tmp_path_factory.mktemp("run") / "debug"
    train.main(["--config", "debug", f"--data={data}", f"--out={folder}", "--device=cpu", "--threads=1"])
    return folder


@pytest.fixture
def fails(capsys):
    """fails(main, argv) -> the one line on stderr with which main gave up; exit status 2 and no traceback are checked."""

    def call(main, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(argv)
        lines = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return call
