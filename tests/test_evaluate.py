"""Tests of evaluate.py: environments by name, many at once, episodes, tables, `--env` in every program."""

import importlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import evaluate
import rl
import sample
import train
from common import read_json, write_json
from data import save_episodes
from evaluate import (
    KINDS,
    Episode,
    SingleEnv,
    VecEnv,
    compare_reasoning,
    first_error,
    run_episodes,
    target_of,
    wilson,
)
from extras.realtime import Runner
from model import load_policy
from sim_env import FAMILIES, SEEDS, SO100Env

VAL = SEEDS["val"].start
DEBUG = ["--config", "debug", "--device=cpu", "--threads=1"]
NO_WORDS = ["--reasoning=false", "--families=reach", "--ground_steps=0", "--mix=0"]

# -- the simulation, many at once ---------------------------------------------------------------------------


def test_vec_env_matches_one_env():
    actions = np.tile([5, -20, 10, 80, -80, 50], (3, 4, 1)) + np.arange(3)[:, None, None]  # (arms, steps, 6)
    by_arm = dict(enumerate(actions))
    seeds = [VAL, VAL + 1, VAL + 2]
    env = SO100Env()
    with VecEnv(3, workers=2) as vec:
        vec.reset(range(3), seeds, [{"family": family} for family in FAMILIES])
        before = vec.observe(range(3))
        assert before["images"].shape == (3, 2, 96, 96, 3)
        assert [info["family"] for info in vec.infos] == list(FAMILIES)
        vec.step_chunk(by_arm)
        after = vec.observe(range(3))
        for i, family in enumerate(FAMILIES):
            alone, _ = env.reset(seed=seeds[i], options={"family": family})
            assert alone["task"] == before["task"][i]
            assert (alone["images"]["front"] == before["images"][i, 0]).all()
            alone = env.step_chunk(actions[i])[0]
            assert (alone["state"] == after["state"][i]).all()
            assert (alone["images"]["wrist"] == after["images"][i, 1]).all()
        for _ in range(14):  # place and calculate run out of time, sequence goes on
            vec.step_chunk(by_arm)
        assert vec.truncated.tolist() == [True, True, False]
        assert vec.infos[0]["steps"] == vec.infos[2]["steps"] == 60
        with pytest.raises(ValueError, match="training seed"):
            vec.reset([0], [1], [{"split": "ood_position"}])
        vec.reset([0], [VAL + 5], [{}])
        vec.step_chunk({0: actions[0]})
        assert vec.infos[0]["steps"] == 4
    env.close()


def test_run_episodes_keeps_the_order_of_episodes():
    seen = []

    def hold(obs):
        """Stay where the arm is, 20 steps at a time; the extra is the task."""
        seen.append(len(obs["task"]))
        return np.repeat(obs["state"][:, None], 20, axis=1), list(obs["task"])  # (n, 20, 6)

    seeds = [VAL + 3, VAL + 1, VAL + 2, VAL + 7, VAL + 5]
    ended = []
    jobs = [Episode(seed, {"family": "place"}) for seed in seeds]
    with VecEnv(2) as vec:
        episodes = run_episodes(vec, jobs, hold, final_fn=lambda obs: obs["task"], on_end=ended.append)
    assert [episode.seed for episode in episodes] == seeds
    assert seen == [2] * 6 + [1] * 3
    assert sorted(episode.number for episode in ended) == [0, 1, 2, 3, 4]
    for episode in episodes:
        assert not episode.success and episode.steps == 60
        assert episode.extras == [episode.task] * 3 and episode.executed == [20] * 3
        assert episode.final == episode.task  # the time limit ended it
        assert len(episode.teacher_reasoning) == 3 and " pad at t" in episode.teacher_reasoning[0]


def test_interval_of_a_success_rate():
    low, high = wilson(12, 14)  # Wilson's interval, worked out by hand from his formula
    assert (low, high) == (pytest.approx(0.60058, abs=1e-4), pytest.approx(0.95992, abs=1e-4))
    low, high = wilson(0, 10)
    assert low == pytest.approx(0, abs=1e-9) and high == pytest.approx(1 - wilson(10, 10)[0])


def test_target_of_a_reasoning():
    assert target_of("first , tomato is red , blue pad at t10 , red cube at t5 r3") == ("red", "blue")
    assert target_of("3 + 1 : 4 1 is pad 4 , red pad at t8 , green cube in hand") == ("green", "red")
    assert target_of("first , blue pad at t3 , red cube") == ("red", "blue")  # cut off
    assert target_of("done") is None and target_of("") is None


AT_T5_R3 = "first , tomato is red , green pad at t8 , red cube at t5 r3"
SECOND = AT_T5_R3.replace("at t5 r3", "there") + " , then , blue pad at t3 , lime cube in hand"
DONE = SECOND.replace("in hand", "there , done")
COUNTED = "3 + 2 : 4 1 5 2 is pad 5 , blue pad at t10 , red cube at t5 r3"


@pytest.mark.parametrize(
    "said, true, kind",
    [
        (AT_T5_R3, AT_T5_R3, "right"),
        (DONE, DONE, "right"),
        (DONE, AT_T5_R3, "false_done"),
        (DONE, SECOND, "false_done"),
        (AT_T5_R3, DONE, "missed_done"),
        (SECOND, DONE, "missed_done"),
        (SECOND, AT_T5_R3, "leg"),
        (AT_T5_R3, SECOND, "leg"),
        (SECOND.replace("green pad", "pink pad"), AT_T5_R3, "names"),  # it comes first
        (SECOND.replace("lime", "red"), SECOND, "names"),
        (SECOND.replace("in hand", "at t3 r2"), SECOND, "hand"),
        ("blue pad at t3 , red cube there , done", "blue pad at t3 , red cube in hand", "false_done"),
        (AT_T5_R3.replace("tomato", "cherry"), AT_T5_R3, "names"),
        (AT_T5_R3.replace("tomato is red , ", ""), AT_T5_R3, "names"),
        (AT_T5_R3.replace("green", "blue"), AT_T5_R3, "names"),
        (AT_T5_R3.replace("pad at t8", "pad at t9"), AT_T5_R3, "near"),
        (AT_T5_R3.replace("pad at t8", "pad at t6"), AT_T5_R3, "far"),
        (DONE.replace("pad at t8", "pad at t6"), SECOND, "false_done"),  # a wrong place counts less
        (SECOND.replace("pad at t3", "pad at t2"), SECOND, "near"),
        (AT_T5_R3.replace("red cube at t5 r3", "blue cube in hand"), AT_T5_R3, "names"),
        ("blue pad at t3 , red cube in hand", "pink pad at t3 , red cube in hand", "names"),
        (COUNTED, COUNTED, "right"),
        (COUNTED.replace("pad 5", "pad 4"), COUNTED, "names"),
        (COUNTED.replace("4 1", "4 2"), COUNTED, "names"),
        (COUNTED.replace("t5 r3", "t6 r3"), COUNTED, "near"),
        (AT_T5_R3.replace("at t5 r3", "in hand"), AT_T5_R3, "hand"),
        (AT_T5_R3, AT_T5_R3.replace("at t5 r3", "in hand"), "hand"),
        (AT_T5_R3.replace("t5 r3", "t4 r4"), AT_T5_R3, "near"),
        (AT_T5_R3.replace("t5 r3", "t4 r5"), AT_T5_R3, "far"),
        (AT_T5_R3.replace("t5 r3", "t7 r3"), AT_T5_R3, "far"),
        (AT_T5_R3.replace("t5 r3", "t10 r3"), AT_T5_R3.replace("t5 r3", "t9 r3"), "near"),
        (AT_T5_R3.removesuffix(" r3"), AT_T5_R3, "other"),
        ("", AT_T5_R3, "other"),
        ("done", DONE, "other"),
        (DONE + " done", DONE, "other"),
        (AT_T5_R3, "move left and down", "other"),  # another environment's teacher
    ],
)
def test_the_first_thing_that_is_wrong_in_a_reasoning(said, true, kind):
    assert first_error(said, true) == kind and kind in KINDS


def test_reasoning_is_compared_at_the_look_it_was_made_at(reach, capsys, tmp_path):
    """Telling's state is a step count, which its teacher reads: right only against what was shown."""
    env = SingleEnv(evaluate.make_env("glide:Telling", 32), 32, ("top",), 2)

    def read(obs):
        """Say what the picture's moment is, but two steps too much at the third look."""
        step = int(obs["state"][0, 0])
        return np.zeros((1, 2, 2)), [f"blue pad at t3 , red cube at t{step + 2 * (step == 4)} r1"]

    episodes = run_episodes(env, [Episode(seed, {"family": "reach"}) for seed in (3, 4)], read)
    assert [len(episode.extras) for episode in episodes] == [5, 5]
    cell = compare_reasoning(episodes)
    assert (cell["target_at_0"], cell["reasoning"]) == (1, 1)
    assert (cell["looks"]["right"], cell["looks"]["far"]) == (0.8, 0.2)
    assert list(cell["looks"]) == list(KINDS) and sum(cell["looks"].values()) == pytest.approx(1)
    evaluate.report({"reach": {"id": evaluate.summarise(episodes) | cell}}, tmp_path / "eval.json")
    header, row = re.findall(r"^(?:family|reach) .*$", capsys.readouterr().out, re.M)[2:]
    assert header.split()[-9:] == list(KINDS)
    assert row.split() == ["reach", "id", "100", "100", "80", *6 * ["0"], "20", "0"]
    assert read_json(tmp_path / "eval.json")["reach"]["id"]["looks"] == cell["looks"]


# -- environments of one's own ------------------------------------------------------------------------------


@pytest.fixture
def reach(tmp_path, monkeypatch, root):
    """The documentation's own module, importable from its folder, with demonstrations in data/reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    page = (root / "docs" / "environments.md").read_text()
    (code,) = re.findall(r"```python\n(# reach\.py.*?)```", page, re.S)
    (tmp_path / "reach.py").write_text(code)
    shutil.copy(root / "tests" / "glide.py", tmp_path)
    module = importlib.reload(importlib.import_module("reach"))
    importlib.reload(importlib.import_module("glide"))
    episodes = [module.demonstrate(module.Reach(px=32), seed) for seed in range(8)]
    save_episodes("data/reach", episodes, module.Reach.cameras, module.Reach.motors)
    return module


def test_an_environment_of_ones_own_from_data_to_practice(reach):
    learn = [*DEBUG, *NO_WORDS, "--data=data/reach", "--env=reach:Reach", "--eval=3", "--out=run"]
    train.main(learn)
    config = read_json("run/config.json")
    assert (config["cameras"], config["motors"], config["env"]) == ("top", "x,y", "reach:Reach")
    result = read_json("run/eval.json")["reach"]
    assert list(result) == ["id"] and result["id"]["n"] == 3
    sample.main(["--run=run", "go to the red square"])
    assert list(Path("run/sample").glob("*.gif"))
    rl.main([*DEBUG, "--init_from=run", "--families=reach", "--out=better"])
    assert len(Path("better/log.jsonl").read_text().splitlines()) == 2
    assert read_json("better/config.json")["env"] == "reach:Reach"


def test_checkpoints_from_before_the_state_had_names(reach):
    train.main([*DEBUG, *NO_WORDS, "--data=data/reach", "--eval=0", "--out=run"])
    config = read_json("run/config.json")
    assert config["state"] == ""
    obs, _ = reach.Reach(px=32).reset(seed=3)
    images, state = obs["images"]["top"][None, None], obs["state"][None]
    chunks = []
    without = {name: value for name, value in config.items() if name != "state"}
    for known in (config, without, config | {"state": "x,y"}):
        write_json("run/config.json", known)
        policy = load_policy("run")
        evaluate.camera_indices(policy, "reach:Reach")
        chunks.append(policy.act(images, state, [obs["task"]])[0])
    assert np.array_equal(chunks[0], chunks[1]) and np.array_equal(chunks[0], chunks[2])


def test_chunks_end_with_the_episode_and_count_steps(reach):
    env = evaluate.make_env("reach:Reach", 32)
    _, info = env.reset(seed=3)
    assert info["steps"] == info["executed"] == 0 and env.render(64, "top").shape == (64, 64, 3)
    goal = np.tile(env.env.goal, (4, 1))
    taken = reward = 0
    done = False
    while not done:
        _, r, done, truncated, info = env.step_chunk(goal)
        taken += info["executed"]
        reward += r
    assert reward == 1 and info["success"] and not truncated and taken == info["steps"] == env.env.steps


def test_success_in_info_is_believed_over_the_end(reach):
    def nowhere(obs):
        return np.repeat(obs["state"][:, None], 10, axis=1), [None]

    env = SingleEnv(evaluate.make_env("glide:Rolling", 32), 32, ("top",), 2)
    (episode,) = run_episodes(env, [Episode(3, {"family": "reach"})], nowhere)
    assert env.terminated[0] and not episode.success


@pytest.mark.parametrize("name, steps", [("Endless", 30), ("Falling", 10)])
def test_an_episode_ends_at_its_familys_limit_and_info_tells_success(reach, name, steps):
    def nowhere(obs):
        return np.repeat(obs["state"][:, None], 10, axis=1), [None]

    env = SingleEnv(evaluate.make_env(f"glide:{name}", 32), 32, ("top",), 2)
    (episode,) = run_episodes(env, [Episode(3, {"family": "reach"})], nowhere)
    assert env.truncated[0] == (name == "Endless") and not episode.success and episode.steps == steps


def test_an_environment_that_blocks_is_named(reach, monkeypatch):
    with VecEnv(1, 1, "glide:Blocked", 32) as vec:
        vec.reset([0], [1], [{}])
        monkeypatch.setattr(evaluate, "ANSWER_SECONDS", 0.5)
        with pytest.raises(ValueError, match="--env=glide:Blocked has not answered step_chunk"):
            vec.step_chunk({0: np.zeros((1, 2))})


def test_an_environment_that_does_not_fit_is_told_before_the_training(reach, fails):
    learn = [*DEBUG, *NO_WORDS, "--data=data/reach", "--eval=1", "--out=late"]
    assert "not finite" in fails(train.main, [*learn, "--env=glide:Blind"])
    assert not Path("late").exists()


def test_an_environment_that_cannot_step_is_told_before_the_training(reach, fails, monkeypatch):
    learn = [*DEBUG, *NO_WORDS, "--data=data/reach", "--eval=1", "--out=late"]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        train.main([*learn, "--env=glide:Broken"])
    reset = VecEnv.reset

    def reset_then_hurry(vec, *arguments):
        reset(vec, *arguments)  # the worker's start takes longer
        monkeypatch.setattr(evaluate, "ANSWER_SECONDS", 0.5)

    monkeypatch.setattr(VecEnv, "reset", reset_then_hurry)
    said = fails(train.main, [*learn, "--env=glide:Blocked"])
    assert "--env=glide:Blocked has not answered step_chunk" in said and not Path("late").exists()


def test_environments_that_cannot_be_are_named_in_one_line(reach, fails):
    learn = [*DEBUG, *NO_WORDS, "--data=data/reach", "--eval=0"]
    train.main([*learn, "--env=reach:Reach", "--out=run"])

    def tell(*flags):
        return fails(sample.main, ["--run=run", *flags])

    assert "package.module:Class" in tell("--env=reach")
    assert "cannot be imported" in tell("--env=reach:Rich")
    assert "cannot be imported" in tell("--env=none:None")
    late = [*learn[:-1], "--eval=1", "--env=none:None", "--out=late"]
    assert "cannot be imported" in fails(train.main, late) and not Path("late").exists()
    assert "lacks cameras" in tell("--env=json:JSONDecoder")
    assert "the model also wants ['top']" in tell("--env=sim")
    assert "--families" in tell("--families=push") and "--families" in tell("--eval=2", "--families=push")


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("state", [math.nan, 0], "state is not finite"),
        ("state", ["a", "b"], "state must be an array of numbers; it is (2,) <U1"),
        (
            "images",
            {"top": np.zeros((32, 32, 3))},
            "camera top must be (32, 32, 3) uint8 as its class says; it is (32, 32, 3) float64",
        ),
        (
            "images",
            {"top": np.zeros((33, 32, 3), np.uint8)},
            "camera top must be (32, 32, 3) uint8 as its class says; it is (33, 32, 3) uint8",
        ),
        ("images", {}, "gives an observation without ['top']"),
        ("task", "", "gives no instruction"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_observations_that_cannot_be_are_told_not_scored(reach, monkeypatch, key, value, said):
    env = SingleEnv(evaluate.make_env("glide:Odd", 32), 32, ("top",), 2)
    monkeypatch.setattr(type(env.env.env), "spoil", staticmethod(lambda obs: obs.update({key: value})))
    with pytest.raises(ValueError, match=re.escape(said)):
        env.reset([0], [1], [{"family": "reach"}])


def test_an_environments_own_exception_keeps_its_traceback(reach):
    actions = {0: np.zeros((1, 2))}
    with VecEnv(1, 1, "glide:Broken", 32) as vec:
        vec.reset([0], [1], [{}])
        with pytest.raises(RuntimeError, match="ZeroDivisionError") as caught:
            vec.step_chunk(actions)
    assert "glide.py" in str(caught.value)


def test_a_data_set_is_not_written_over(reach):
    with pytest.raises(ValueError, match="already holds a data set"):
        save_episodes("data/reach", [], ("top",), ("x", "y"))


# -- a state of other numbers than the action ---------------------------------------------------------------


@pytest.fixture
def glide(reach):
    """The module with demonstrations in data/glide."""
    module = importlib.import_module("glide")
    env = module.Glide(px=32)
    episodes = []
    for seed in range(8):
        obs, _ = env.reset(seed=seed)
        seen = []
        there = False
        while not there:
            seen.append((obs["images"]["top"], obs["state"], env.goal))
            obs, _, there, _, _ = env.step(env.goal)
        top, state, action = map(np.stack, zip(*seen))
        episode = {"images": {"top": top}, "state": state, "action": action, "task": obs["task"]}
        episodes.append(episode | {"family": "reach"})
    with pytest.raises(ValueError, match=r"\(frames, 2\) float32 for \['x', 'y'\]; it is \(\d+, 3\)"):
        save_episodes("data/glide", episodes, env.cameras, env.motors)
    save_episodes("data/glide", episodes, env.cameras, env.motors, state=env.state)
    return module


def test_a_state_of_other_numbers_than_the_action(glide, fails):
    learn = [*DEBUG, *NO_WORDS, "--data=data/glide", "--stale=2"]
    train.main([*learn, "--env=glide:Glide", "--eval=2", "--out=run"])
    config = read_json("run/config.json")
    assert (config["motors"], config["state"]) == ("x,y", "speed,x,y")
    assert read_json("run/eval.json")["reach"]["id"]["n"] == 2
    policy = load_policy("run")
    assert policy.expert.state_in.in_features == len(policy.state_low) == 3
    assert policy.expert.action_in.in_features == len(policy.action_low) == 2
    sample.main(["--run=run"])
    sample.main(["--run=run", "--replay"])
    practise = [*DEBUG, "--init_from=run", "--families=reach", "--iterations=2", "--out=better"]
    rl.main([*practise, "--eval_episodes=0"])
    log = json.loads(Path("better/log.jsonl").read_text().splitlines()[-1])
    assert log["iteration"] == 2 and np.isfinite([log["value_loss"], log["expert_loss"]]).all()

    # what does not fit, in one line with both sides
    def tell(*words):
        return fails(sample.main, ["--run=run", *words])

    both = ("['speed', 'x', 'y']", "['x', 'y']")
    assert all(side in tell("--env=reach:Reach") for side in both)
    start = ["--stage=finetune", "--init_from=run", "--eval=0", "--out=late"]
    assert all(side in fails(train.main, [*DEBUG, *start, "--data=data/reach"]) for side in both)
    assert "class attribute state" in tell("--env=glide:Wrong")
    broken = VecEnv(1, 1, "glide:Short", 32)
    with broken, pytest.raises(ValueError, match=r"must be \(4,\) float32 as its class says; it is \(3,\)"):
        broken.reset([0], [1], [{}])
    np.save("data/glide/state.npy", np.load("data/glide/state.npy")[:, :2])
    said = fails(train.main, [*learn, "--out=late"])
    assert "must be (frames, 3) float32 for ['speed', 'x', 'y']" in said


def test_an_arm_that_waits_stays_where_its_state_says_that_its_motors_are(glide, fails):
    train.main(
        [*DEBUG, *NO_WORDS, "--data=data/glide", "--env=glide:Glide", "--stale=2", "--eval=0", "--out=run"]
    )
    policy = load_policy("run")
    for mode, delay in (("wait", 2), ("naive", 2), ("async+rtc", 2)):
        runner = Runner(policy, mode, delay)
        env = SingleEnv(evaluate.make_env("glide:Glide", 32), 32, ("top",), 3)
        commands = []

        def follow(obs, runner=runner, commands=commands):
            actions, texts = runner(obs)
            commands.append((obs["state"][0], actions[0, 0]))
            return actions, texts

        run_episodes(env, [Episode(5, {"family": "reach"})], follow)
        state, command = commands[0]
        assert np.array_equal(command, state[1:]), mode  # speed, x, y
    write_json("run/config.json", read_json("run/config.json") | {"state": "speed,east,north"})
    for flags in (["--mode=naive", "--delay=2"], ["--mode=async+rtc"]):
        said = fails(sample.main, ["--run=run", "--env=glide:Veiled", *flags])
        assert "['x', 'y']" in said and "'east'" in said
    sample.main(["--run=run", "--env=glide:Veiled"])
