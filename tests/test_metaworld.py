"""Tests of benchmarks/metaworld.py and mini_vla.py. What simulates is skipped without metaworld."""

import importlib
import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import torch

from common import UserError
from evaluate import Episode, environment_class, make_env, wilson
from sim_env import SEEDS, mujoco

bench = importlib.import_module("benchmarks.metaworld")
mini_vla = importlib.import_module("benchmarks.mini_vla")
shared = importlib.import_module("benchmarks.shared")
there = importlib.util.find_spec("metaworld") is not None
simulates = pytest.mark.skipif(not there, reason="metaworld is not installed")


@pytest.fixture(scope="module")
def env():
    env = bench.MT50(px=32)
    yield env
    env.close()


def scene(env, name, seed):
    """What chooses a scene, and what the scripted policies see of it."""
    env.reset(seed=seed, options={"family": name})
    return np.concatenate([env.env._last_rand_vec, env.raw])


def test_groups_are_the_published_ones():
    sizes = {group: len(tasks) for group, tasks in bench.GROUPS.items()}
    assert sizes == {"easy": 28, "medium": 11, "hard": 6, "very_hard": 5}
    assert len(bench.INSTRUCTIONS) == 50
    assert len(set(bench.INSTRUCTIONS.values())) == 50, "two tasks share an instruction"


def test_motion_phrases_say_what_the_hand_does_next():
    down = np.linspace(0.3, 0.1, 21)  # metres
    state = np.zeros((60, 4), np.float32)
    state[:, 2] = np.concatenate([down, np.full(19, 0.1), down[19::-1]])
    state[:, 3] = np.clip(np.linspace(3, -1, 60), 0.4, 1)  # the gripper closes amid the episode
    closing = np.arange(60) >= 25
    phrases = shared.motion_phrases(state, closing, bench.DIRECTIONS)
    words = [phrase for _, phrase in phrases]
    assert words[0] == "move down" and "grasp" in words and words[-1] == "lift", phrases
    steps = [step for step, _ in phrases]
    assert steps[0] == 0 and steps == sorted(set(steps)) and steps[-1] < 60


def test_phrases_name_at_most_two_directions():
    assert shared.name_motion(np.array([-0.05, 0.001, 0.0, 0.0]), False, bench.DIRECTIONS) == "move left"
    assert (
        shared.name_motion(np.array([0.03, 0.05, 0.04, 0.0]), False, bench.DIRECTIONS)
        == "move forward and up"
    )
    assert shared.name_motion(np.array([0.0, 0.0, 0.0, 0.5]), False, bench.DIRECTIONS) == "let go"
    assert shared.name_motion(np.zeros(4), True, bench.DIRECTIONS) == "stay"


def test_averages_of_episodes_and_of_groups():
    """One of two easy episodes, the hard one after the short limit: 2 of 3, but 3/4 of the groups' mean."""
    episodes = [
        Episode(0, {"family": "reach-v3"}, success=True, steps=50),
        Episode(1, {"family": "reach-v3"}, success=False, steps=500),
        Episode(0, {"family": "push-v3"}, success=True, steps=200),
    ]
    full = bench.summarise(episodes, bench.LIMIT)
    short = bench.summarise(episodes, bench.SHORT_LIMIT)
    assert full["groups_mean"] == 0.75 and full["episodes"]["success"] == pytest.approx(2 / 3)
    assert (full["episodes"]["low"], full["episodes"]["high"]) == wilson(2, 3)
    assert short["groups"]["hard"]["success"] == 0 and full["tasks"]["push-v3"]["success"] == 1
    bench.print_summary(full, short)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate"], "--run"),
        (["--episodes=3"], "does nothing"),
        (["--tasks=fly"], "one of"),
        (["dance"], "one of"),
    ],
)
def test_mistakes_end_in_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1, error


@pytest.mark.skipif(there, reason="metaworld is installed")
def test_without_the_package_a_line_says_what_to_install():
    with pytest.raises(UserError, match="pip install --no-deps metaworld"):
        bench.MT50()


@simulates
def test_seeds_choose_scenes_and_repeat_them(env):
    for name in ("reach-v3", "drawer-open-v3"):
        first = scene(env, name, SEEDS["report"].start)
        other = scene(env, name, SEEDS["train"].start)
        env.step_chunk(np.ones((9, 4)))
        again = scene(env, name, SEEDS["report"].start)
        assert not np.allclose(first, other)
        np.testing.assert_array_equal(first, again)


@simulates
def test_a_task_that_another_arm_has_left_is_as_new(env):
    first, second, small = bench.Practice(px=32), bench.Practice(px=32), bench.Practice(px=16)
    first.reset(seed=1, options={"family": "push-v3"})
    first.step_chunk(np.ones((20, 4)))
    first.reset(seed=1, options={"family": "reach-v3"})  # leaves push-v3
    small.reset(seed=5, options={"family": "push-v3"})  # of another size: it builds its own
    obs, _ = second.reset(seed=5, options={"family": "push-v3"})
    fresh, _ = env.reset(seed=5, options={"family": "push-v3"})
    assert not bench.PARKED
    assert np.array_equal(obs["images"]["corner2"], fresh["images"]["corner2"])
    assert np.array_equal(second.raw, env.raw)
    for arm in (first, second, small):
        arm.close()


@simulates
def test_the_first_picture_shows_the_scene_of_now(env):
    """The benchmark moves its marker in reset() without computing where things are; MT50 does."""
    obs, _ = env.reset(seed=1, options={"family": "reach-v3"})
    marker = env.env.data.site("goal").xpos
    np.testing.assert_allclose(marker, env.env._target_pos)
    later, _, _, _, _ = env.step_chunk(np.zeros((1, 4)))
    change = np.abs(obs["images"]["corner2"].astype(int) - later["images"]["corner2"])
    assert change.max(-1).mean() < 3, "the pictures before and after a step without motion differ"


@simulates
def test_every_fourth_seed_of_a_group_meets_all_its_tasks(env):
    """rl.py lets four families take turns, so that a group gets seeds four apart."""
    tasks = set()
    for seed in range(0, 120, 4):
        _, info = env.reset(seed=seed, options={"family": "hard"})
        tasks.add(info["name"])
    assert tasks == set(bench.GROUPS["hard"])
    with pytest.raises(UserError, match="no task"):
        env.reset(seed=0, options={"family": "fly"})


@simulates
@pytest.mark.parametrize(
    ("spec", "limit"), [(bench.ENV, bench.LIMIT), ("benchmarks.metaworld:Practice", bench.SHORT_LIMIT)]
)
def test_the_contract_and_an_episode_that_runs_out_of_time(spec, limit):
    assert environment_class(spec).families["easy"] == limit
    env = make_env(spec, px=32)
    obs, _ = env.reset(seed=0, options={"family": "push-v3"})
    pictures = list(obs["images"].values())
    assert list(obs["images"]) == ["corner2", "gripperPOV"] and not np.array_equal(*pictures)
    assert all(picture.shape == (32, 32, 3) and picture.std() > 10 for picture in pictures)
    assert obs["state"].shape == (4,) and obs["task"] == bench.INSTRUCTIONS["push-v3"]
    ends = []
    while not ends or not any(ends[-1]):
        _, reward, terminated, truncated, info = env.step_chunk(np.zeros((60, 4)))
        ends.append((terminated, truncated))
    assert ends[-1] == (False, True) and info["steps"] == limit and reward == 0
    assert info["executed"] == limit % 60
    env.close()


@simulates
def test_reasoning_says_where_the_first_picture_shows_thing_and_target():
    env = bench.MT50(px=96)
    env.reset(seed=3, options={"family": "push-v3"})
    said = re.fullmatch(r"puck target at x(\d+) y(\d+) , push the puck at x(\d+) y(\d+)", env.places())
    words = np.array(said.groups(), int).reshape(2, 2)
    env.renderer.enable_segmentation_rendering()
    env.renderer.update_scene(env.env.data, camera=bench.CAMERA)
    shown = env.renderer.render()[::-1, ::-1]  # (96, 96, 2) what is at every pixel: its number and kind
    site = (env.env.model.site("goal").id, mujoco.mjtObj.mjOBJ_SITE)
    geom = (env.env.model.geom("objGeom").id, mujoco.mjtObj.mjOBJ_GEOM)
    for thing, (column, row) in zip((site, geom), words):
        rows, columns = np.nonzero((shown == thing).all(-1))
        assert abs(columns.mean() / 3 - column - 0.5) < 1 and abs(rows.mean() / 3 - row - 0.5) < 1
    env.close()
    _, entry = bench.demonstrate(bench.MT50(px=16), "reach-v3", 3, reasoning="places")
    steps, texts = zip(*entry["reason"])
    assert steps[0] == 0 and len(set(texts)) == len(steps) and texts[0].startswith("reach the target at x")


@simulates
def test_replayed_actions_of_the_scripted_policy_succeed(env, monkeypatch):
    """Without noise the labels are what was executed, so a policy that repeats them ends at success."""
    monkeypatch.setattr(bench, "NOISE", 0.0)
    arrays, entry = bench.demonstrate(env, "drawer-open-v3", 3, reasoning="phrases")
    assert entry["success"] and entry["reason"][0][0] == 0 and entry["family"] == "easy"
    assert np.abs(arrays["action"]).max() <= 1
    env.reset(seed=3, options={"family": "drawer-open-v3"})
    _, reward, terminated, truncated, info = env.step_chunk(arrays["action"])
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info["success"] and info["executed"] == entry["length"] - bench.AFTER_SUCCESS


@simulates
def test_a_data_set_goes_on_after_a_kill(tmp_path, capsys):
    out = tmp_path / "set"
    words = ["--demos=1", "--image_size=16", f"--out={out}", "--tasks=reach-v3,door-close-v3"]
    cfg = bench.parse_config(bench.MetaworldConfig, {}, words, "work")
    parts = out / "parts"
    parts.mkdir(parents=True)
    (out / ".lock").write_text("benchmarks/metaworld.py\n")
    (parts / "settings.json").write_text(json.dumps(cfg.settings()))
    shared.make_part(bench.BENCH, cfg, "reach-v3")  # what was done before the kill
    bench.main([*words, "--workers=1"])
    assert "going on: 1 of 2" in capsys.readouterr().out
    meta = json.loads((out / "meta.json").read_text())
    assert [episode["name"] for episode in meta["episodes"]] == ["reach-v3", "door-close-v3"]
    assert len(np.load(out / "corner2.npy")) == sum(episode["length"] for episode in meta["episodes"])
    assert not parts.exists()
    with pytest.raises(SystemExit):
        bench.main(words)
    assert "already holds" in capsys.readouterr().err


# -----------------------------------------------------------------------------------------------------------
# mini-VLA, benchmarks/mini_vla.py

THEIR_MODEL = """
import torch

class VLADiffusionPolicy(torch.nn.Module):
    def __init__(self, vocab_size, state_dim, action_dim, d_model, diffusion_T):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))

    def act(self, image, text, state):
        assert image.shape[1] == 3 and 0 <= image.min() and 0 < image.max() <= 1
        assert text.tolist() == [[2, 3, 4, 5, 6, 3, 7]] * len(text)  # "the" has one number
        return self.gain * torch.cat((state[:, :3], image.mean((1, 2, 3))[:, None]), dim=1)
"""


def test_what_mini_vla_cannot_use_is_refused(tmp_path):
    with pytest.raises(UserError, match="git clone"):
        mini_vla.Policy(str(tmp_path), "model.pt")


def test_mini_vla_is_fed_with_its_own_units(tmp_path, monkeypatch):
    """A stand-in of its interface: pictures in [0, 1], words by its vocabulary, the action as it comes."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vla_diffusion_policy.py").write_text(THEIR_MODEL)
    words = ["<pad>", "<unk>", "push", "the", "puck", "forward", "to", "target"]
    saved = {"vocab": {word: i for i, word in enumerate(words)}, "model_state_dict": {"gain": torch.ones(1)}}
    saved |= {"state_dim": 39, "action_dim": 4, "d_model": 8, "diffusion_T": 4}
    torch.save(saved, tmp_path / "model.pt")
    policy = mini_vla.Policy(str(tmp_path), str(tmp_path / "model.pt"))
    obs = {
        "images": np.full((2, 1, 8, 8, 3), 51, np.uint8),
        "state": np.arange(78, dtype=np.float32).reshape(2, 39),
        "task": [bench.INSTRUCTIONS["push-v3"]] * 2,
    }
    with torch.no_grad():
        actions, _ = policy.decide(obs)
    assert actions.tolist() == [[[0, 1, 2, pytest.approx(0.2)]], [[39, 40, 41, pytest.approx(0.2)]]]


@simulates
def test_mini_vla_gets_the_demonstrations_that_we_have(tmp_path, capsys):
    data, out = tmp_path / "push", tmp_path / "push.npz"
    bench.main(
        [
            "--tasks=push-v3",
            "--demos=2",
            "--image_size=16",
            "--reasoning=places",
            "--workers=1",
            f"--out={data}",
        ]
    )
    mini_vla.main([f"--data={data}", f"--out={out}"])
    given = np.load(out, allow_pickle=True)
    assert np.array_equal(given["images"], np.load(data / "corner2.npy"))
    assert np.array_equal(given["actions"], np.load(data / "action.npy"))
    assert np.array_equal(given["states"][:, :4], np.load(data / "state.npy"))
    assert given["states"].shape[1] == 39 and given["states"][:, 36:].any(), "the target is hidden"
    words = {number: word for word, number in given["vocab"].item().items()}
    assert " ".join(words[i] for i in given["text_ids"][-1]) == bench.INSTRUCTIONS["push-v3"]
