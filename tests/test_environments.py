"""Tests of --env: the README's own environment is recorded, trained on, filmed, evaluated and practised on."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

import rl
import sample
import sim_env
import train


@pytest.fixture
def reach(tmp_path, monkeypatch):
    """The module of the README, importable from the folder it is in, with a few demonstrations in data/reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    readme = Path(sim_env.__file__).with_name("README.md").read_text()
    (code,) = re.findall(r"```python\n(# reach\.py.*?)```", readme, re.S)
    (tmp_path / "reach.py").write_text(code)
    module = importlib.reload(importlib.import_module("reach"))
    episodes = [module.demonstrate(module.Reach(px=32), seed) for seed in range(8)]
    module.save_episodes("data/reach", episodes, module.Reach.cameras, module.Reach.motors)
    return module


def test_an_environment_of_ones_own_from_data_to_practice(reach, capsys):
    flags = ["--config", "debug", "--device=cpu", "--threads=1"]
    train.main([*flags, "--reasoning=false", "--data=data/reach", "--env=reach:Reach", "--families=reach", "--ground_steps=0", "--mix=0", "--eval=3", "--out=run"])
    config = json.loads(Path("run/config.json").read_text())
    assert (config["cameras"], config["motors"], config["env"]) == ("top", "x,y", "reach:Reach")
    result = json.loads(Path("run/eval.json").read_text())["reach"]
    assert list(result) == ["id"] and result["id"]["n"] == 3
    sample.main(["--run=run", "--threads=1", "go to the red square"])
    assert list(Path("run/sample").glob("*.gif"))
    rl.main([*flags, "--init_from=run", "--families=reach", "--out=better"])
    assert len(Path("better/log.jsonl").read_text().splitlines()) == 2
    assert json.loads(Path("better/config.json").read_text())["env"] == "reach:Reach"


def test_chunks_end_with_the_episode_and_count_steps(reach):
    env = sim_env.make_env("reach:Reach", 32)
    obs, info = env.reset(seed=3)
    assert info["steps"] == info["executed"] == 0 and env.render(64, "top").shape == (64, 64, 3)
    goal = np.tile(env.env.goal, (4, 1))
    taken = reward = 0
    done = False
    while not done:
        obs, r, done, truncated, info = env.step_chunk(goal)
        taken, reward = taken + info["executed"], reward + r
    assert reward == 1 and info["success"] and not truncated and taken == info["steps"] == env.env.steps


def test_environments_that_cannot_be_are_named_in_one_line(reach, fails):
    data = ["--reasoning=false", "--data=data/reach", "--families=reach", "--ground_steps=0", "--mix=0", "--out=run"]
    train.main(["--config", "debug", "--device=cpu", "--threads=1", *data, "--env=reach:Reach"])
    tell = lambda *flags: fails(sample.main, ["--run=run", "--threads=1", *flags])
    assert "package.module:Class" in tell("--env=reach")
    assert "cannot be imported" in tell("--env=reach:Rich") and "cannot be imported" in tell("--env=none:None")
    assert "cannot be imported" in fails(train.main, ["--config", "debug", *data[:-1], "--out=late", "--eval=1", "--env=none:None"]) and not Path("late").exists()
    assert "lacks cameras" in tell("--env=json:JSONDecoder")
    assert "['top'] missing" in tell("--env=sim")
    assert "--families" in tell("--family=push") and "--families" in tell("--eval=2", "--families=push")


def test_a_data_set_is_not_written_over(reach):
    with pytest.raises(ValueError, match="already holds a data set"):
        reach.save_episodes("data/reach", [], ("top",), ("x", "y"))
