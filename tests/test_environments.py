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
    train.main(
        [
            *flags,
            "--reasoning=false",
            "--data=data/reach",
            "--env=reach:Reach",
            "--families=reach",
            "--ground_steps=0",
            "--mix=0",
            "--eval=3",
            "--out=run",
        ]
    )
    config = json.loads(Path("run/config.json").read_text())
    assert (config["cameras"], config["motors"], config["env"]) == ("top", "x,y", "reach:Reach")
    result = json.loads(Path("run/eval.json").read_text())["reach"]
    assert list(result) == ["id"] and result["id"]["n"] == 3
    sample.main(["--run=run", "--threads=1", "go to the red square"])
    assert list(Path("run/sample").glob("*.gif"))
    rl.main([*flags, "--init_from=run", "--families=reach", "--out=better"])
    assert len(Path("better/log.jsonl").read_text().splitlines()) == 2
    assert json.loads(Path("better/config.json").read_text())["env"] == "reach:Reach"


GLIDE = """
import numpy as np
from reach import Reach

class Glide(Reach):  # its state says more than where the motors are
    state = ("speed", "x", "y")

    def step(self, action):
        before = self.dot
        obs, *rest = super().step(action)
        return obs | {"state": np.append(np.abs(self.dot - before).max(), self.dot).astype(np.float32)}, *rest

    def look(self):
        obs = super().look()
        return obs | {"state": np.append(0, obs["state"]).astype(np.float32)}

class Veiled(Glide):
    state = ("speed", "east", "north")

class Short(Glide):
    state = ("speed", "x", "y", "z")

class Wrong(Glide):
    state = property(lambda self: self.dot)
"""


def test_a_state_of_other_numbers_than_the_action(reach, fails, capsys):
    Path("glide.py").write_text(GLIDE)
    env, episodes = importlib.reload(importlib.import_module("glide")).Glide(px=32), []
    for seed in range(8):
        obs, there, seen = env.reset(seed=seed)[0], False, []
        while not there:
            seen.append((obs["images"]["top"], obs["state"], env.goal))
            obs, _, there, _, _ = env.step(env.goal)
        top, state, action = map(np.stack, zip(*seen))
        episodes.append(
            {"images": {"top": top}, "state": state, "action": action, "task": obs["task"], "family": "reach"}
        )
    with pytest.raises(ValueError, match=r"state has shape \(\d+, 3\), its names are \['x', 'y'\]"):
        reach.save_episodes("data/glide", episodes, env.cameras, env.motors)
    reach.save_episodes("data/glide", episodes, env.cameras, env.motors, state=env.state)
    flags = ["--config", "debug", "--device=cpu", "--threads=1"]
    learn = [
        *flags,
        "--reasoning=false",
        "--data=data/glide",
        "--families=reach",
        "--ground_steps=0",
        "--mix=0",
        "--stale=2",
        "--committed=2",
    ]
    train.main([*learn, "--env=glide:Glide", "--eval=2", "--out=run"])
    config = json.loads(Path("run/config.json").read_text())
    assert (config["motors"], config["state"]) == ("x,y", "speed,x,y") and json.loads(
        Path("run/eval.json").read_text()
    )["reach"]["id"]["n"] == 2
    policy = load_policy("run")
    assert (
        policy.expert.state_in.in_features == len(policy.state_low) == 3
        and policy.expert.action_in.in_features == len(policy.action_low) == 2
    )
    sample.main(["--run=run", "--threads=1"])
    sample.main(["--run=run", "--threads=1", "--replay"])
    rl.main(
        [
            *flags,
            "--init_from=run",
            "--families=reach",
            "--iterations=1",
            "--critic_warmup=0",
            "--eval_episodes=0",
            "--out=better",
        ]
    )
    log = json.loads(Path("better/log.jsonl").read_text())
    assert log["iteration"] == 1 and np.isfinite([log["value_loss"], log["expert_loss"]]).all()

    # thinking while acting: an arm that waits stays where its state says that its motors are
    for mode, delay in (("wait", 2), ("naive+rtc", 2), ("async+rtc", 2), ("async+prefix", 1)):
        runner, obs = sample.Runner(policy, mode, delay), env.reset(seed=5)[0]
        start = obs["state"]
        for _ in range(12):
            commands, _ = runner(sample.batch_of_one(obs, policy))
            obs = env.step(commands[0, 0])[0]
        (command, plan), (later, followed) = runner.arms[0].log[0], runner.arms[0].log[-1]
        assert plan is None and np.array_equal(command, start[1:]) and followed and later.shape == (2,), mode

    # what does not fit, in one line with both sides
    tell = lambda *words: fails(sample.main, ["--run=run", "--threads=1", *words])
    both = ("['speed', 'x', 'y']", "['x', 'y']")
    assert all(side in tell("--env=reach:Reach") for side in both)
    assert all(side in fails(train.main, [*learn, "--state=x,y", "--out=late"]) for side in both)
    assert all(
        side in fails(train.main, [*learn[:-2], "--data=data/reach", "--state=speed,x,y", "--out=late"])
        for side in both
    )
    assert "class attribute state" in tell("--env=glide:Wrong")
    Path("run/config.json").write_text(json.dumps(config | {"state": "speed,east,north"}))
    assert all(
        word in tell("--env=glide:Veiled", *flags)
        for flags in (["--mode=naive", "--delay=2"], ["--mode=async+rtc"])
        for word in ("['x', 'y']", "'east'", "--delay")
    )
    sample.main(["--run=run", "--threads=1", "--env=glide:Veiled"])
    with (
        pytest.raises(ValueError, match=r"shape \(3,\), its class names 4 numbers"),
        evaluate.VecEnv(1, 1, "glide:Short", 32) as vec,
    ):
        vec.reset([0], "reach")
    np.save("data/glide/state.npy", np.load("data/glide/state.npy")[:, :2])
    assert "states of 2 and actions of 2 numbers, its meta.json names 3 and 2" in fails(
        train.main, [*learn, "--out=late"]
    )


def test_checkpoints_from_before_the_state_had_names(reach):
    learn = [
        "--config",
        "debug",
        "--device=cpu",
        "--threads=1",
        "--reasoning=false",
        "--data=data/reach",
        "--families=reach",
        "--ground_steps=0",
        "--mix=0",
    ]
    train.main([*learn, "--out=run"])
    env, chunks, config = reach.Reach(px=32), [], json.loads(Path("run/config.json").read_text())
    obs = env.reset(seed=3)[0]
    for known in (
        config,
        {name: value for name, value in config.items() if name != "state"},
        config | {"state": "x,y"},
    ):
        Path("run/config.json").write_text(json.dumps(known))
        policy = load_policy("run")
        evaluate.camera_indices(policy, "reach:Reach")
        chunks.append(policy.act(*sample.look(obs, policy))[0])
    assert (
        config["state"] == ""
        and np.array_equal(chunks[0], chunks[1])
        and np.array_equal(chunks[0], chunks[2])
    )


def test_chunks_end_with_the_episode_and_count_steps(reach):
    env = evaluate.make_env("reach:Reach", 32)
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
    data = [
        "--reasoning=false",
        "--data=data/reach",
        "--families=reach",
        "--ground_steps=0",
        "--mix=0",
        "--out=run",
    ]
    train.main(["--config", "debug", "--device=cpu", "--threads=1", *data, "--env=reach:Reach"])
    tell = lambda *flags: fails(sample.main, ["--run=run", "--threads=1", *flags])
    assert "package.module:Class" in tell("--env=reach")
    assert "cannot be imported" in tell("--env=reach:Rich") and "cannot be imported" in tell(
        "--env=none:None"
    )
    assert (
        "cannot be imported"
        in fails(train.main, ["--config", "debug", *data[:-1], "--out=late", "--eval=1", "--env=none:None"])
        and not Path("late").exists()
    )
    assert "lacks cameras" in tell("--env=json:JSONDecoder")
    assert "['top'] missing" in tell("--env=sim")
    assert "--families" in tell("--family=push") and "--families" in tell("--eval=2", "--families=push")


def test_a_data_set_is_not_written_over(reach):
    with pytest.raises(ValueError, match="already holds a data set"):
        reach.save_episodes("data/reach", [], ("top",), ("x", "y"))
