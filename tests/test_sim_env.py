"""Tests of sim_env.py: kinematics, units, determinism, success tests, splits, expert, many arms. About half a minute."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import sim_env
from sim_env import (
    COLOURS,
    CUBE,
    FAMILIES,
    HELD_OUT_NAMES,
    HELD_OUT_SUMS,
    HIGH,
    LIMIT,
    LOW,
    OPEN,
    SEEDS,
    SPLITS,
    SUMS,
    VAGUE_NAMES,
    Expert,
    SO100Env,
    VecEnv,
    demonstrate,
    held_out,
    instruction,
    inverse,
    mujoco,
    number_of,
    pinch_x,
    polar_to_xy,
    random_task,
    reasoning,
    rollout,
    sample_goal,
    to_position,
    to_qpos,
    xy_to_polar,
)

VAL = SEEDS["val"].start

# MuJoCo Menagerie's trs_so_arm100 (f3475402): joint angles in radians, places of the two fingertips in metres
VECTORS = [
    ([0, 0, 0, 0, 0, 0], [0, -0.484770, 0.087298], [0, -0.484771, 0.105097]),
    ([0, -1.57, 1.57, 1.57, -1.57, 0], [0.008900, -0.238910, 0.075247], [-0.008899, -0.238924, 0.075247]),
    ([0, -3.32, 3.11, 1.18, 0, -0.174], [0, -0.174854, 0.021534], [0, -0.176918, 0.026729]),
    (
        [0.5259328793, -2.3773652221, -0.0382137417, -1.60512825, 1.7480479347, 1.5821417307],
        [-0.126770, 0.155742, 0.177397],
        [-0.022266, 0.183983, 0.240617],
    ),
    (
        [0.4094813789, -0.7711390159, 1.6275732217, 1.444440447, 1.762462832, -0.1687311257],
        [0.038448, -0.155731, -0.042602],
        [0.043486, -0.154940, -0.039734],
    ),
    (
        [1.3724324221, -3.2026519999, 2.2440781495, -1.0768233396, 2.0265383867, 0.8677713878],
        [-0.085950, -0.036077, 0.396091],
        [-0.032462, 0.026935, 0.395348],
    ),
]


@pytest.fixture(scope="module")
def env():
    env = SO100Env()
    yield env
    env.close()


def begin(env, family, seed=VAL, split="id"):
    return env.reset(seed=seed, options={"family": family, "split": split})


def put_cube(env, colour, xyz, speed=0.0):
    """Teleport a cube, let the physics settle unless it shall move, and look."""
    i = env.cube_colours.index(colour)
    env.data.qpos[env.cube_q[i] : env.cube_q[i] + 7] = (*xyz, 1, 0, 0, 0)
    env.data.qvel[env.cube_v[i] : env.cube_v[i] + 6] = (speed, 0, 0, 0, 0, 0)
    for _ in range(0 if speed else 100):
        mujoco.mj_step(env.model, env.data)
    mujoco.mj_forward(env.model, env.data)


# -- geometry and units ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qpos, gripper, jaw_tip", VECTORS)
def test_kinematics_are_those_of_the_so100(env, qpos, gripper, jaw_tip):
    env.data.qpos[:6] = qpos
    mujoco.mj_forward(env.model, env.data)
    np.testing.assert_allclose(env.data.site("gripper").xpos, gripper, atol=1e-5)
    np.testing.assert_allclose(env.data.site("jaw_tip").xpos, jaw_tip, atol=1e-5)


def test_units():
    np.testing.assert_allclose(to_position([0, 0, 0, 0, 0, 0]), [0, 90, -90, 0, 0, 9.043659], atol=1e-4)
    np.testing.assert_allclose(
        to_position([0, -3.32, 3.11, 1.18, 0, -0.174]), [0, -100.222, 88.190, 67.609, 0, 0], atol=1e-3
    )
    qpos = np.random.default_rng(0).normal(size=(4, 5, 6))
    np.testing.assert_allclose(to_qpos(to_position(qpos)), qpos, atol=1e-12)
    assert LOW[5] == pytest.approx(0) and HIGH[5] == pytest.approx(100) and (LOW < HIGH).all()


def test_model_limits_match_the_units(env):
    np.testing.assert_allclose(
        np.sort(to_position(env.model.jnt_range[:6].T), axis=0), [LOW, HIGH], atol=1e-9
    )
    np.testing.assert_allclose(env.model.actuator_ctrlrange, env.model.jnt_range[:6])


def test_inverse_kinematics_round_trip(env):
    rng = np.random.default_rng(0)
    for _ in range(100):
        phi, r, z, roll, gripper = rng.uniform((-60, 0.13, 0.01, -150, 3), (60, 0.29, 0.12, 0, 40))
        position = inverse(phi, r, z, roll, gripper)
        assert (position >= LOW).all() and (position <= HIGH).all()
        env.data.qpos[:6] = to_qpos(position)
        mujoco.mj_forward(env.model, env.data)
        jaw = env.data.body("fixed_jaw")
        tool = jaw.xpos + jaw.xmat.reshape(3, 3) @ (pinch_x(gripper), -0.1014, 0)
        np.testing.assert_allclose(tool, [*polar_to_xy(phi, r), z], atol=1e-6)
    with pytest.raises(ValueError, match="out of reach"):
        inverse(0, 0.6, 0.02)


def test_inverse_kinematics_is_vertical_where_it_can_be():
    for r in (0.14, 0.18, 0.22, 0.26):
        assert inverse(0, r, 0.012)[1:4].sum() == pytest.approx(90, abs=0.1)  # lift + elbow + wrist = tilt


def test_pads_read_left_to_right_in_the_front_image(env):
    begin(env, "place")
    columns = []
    for geom in env.pad_geom:
        env.model.geom_rgba[env.pad_geom, :3] = 0
        env.model.geom_rgba[geom, :3] = 1, 0, 1
        picture = env.render().astype(int)
        pad = (picture[..., 0] > 120) & (picture[..., 2] > 120) & (picture[..., 1] < 60)
        columns.append(np.nonzero(pad)[1].mean())
    assert columns == sorted(columns)
    begin(env, "place")  # put the colours back


# -- the interface --------------------------------------------------------------------------------------------------


def test_observation_contract(env):
    obs, info = begin(env, "place")
    assert all(image.shape == (96, 96, 3) and image.dtype == np.uint8 for image in obs["images"].values())
    assert obs["state"].shape == (6,) and obs["state"].dtype == np.float32 and isinstance(obs["task"], str)
    assert obs["images"]["front"].std() > 10 and obs["images"]["wrist"].std() > 10
    assert not info["success"] and info["split"] == "id" and info["family"] == "place" and info["seed"] == VAL


@pytest.mark.parametrize("family", LIMIT)
@pytest.mark.parametrize("split", SPLITS)
def test_reset_is_deterministic(env, family, split):
    first, info = begin(env, family, VAL + 3, split)
    env.step_chunk(np.tile(env.position(), (3, 1)))
    begin(env, "place", VAL + 4)
    again, same = begin(env, family, VAL + 3, split)
    assert first["task"] == again["task"] and info == same and (first["state"] == again["state"]).all()
    assert all((first["images"][camera] == again["images"][camera]).all() for camera in first["images"])


def test_physics_is_deterministic(env):
    ends = []
    for _ in range(2):
        begin(env, "place")
        expert = Expert(env)
        for _ in range(12):
            env._advance(expert.action())
        ends.append(env.data.qpos.copy())
    assert (ends[0] == ends[1]).all()


def test_randomise_zero_is_off():
    env = SO100Env(randomise=0)
    for seed in (1, 2):
        env.reset(seed=seed)
        np.testing.assert_array_equal(env.model.cam_pos, env.original["cam_pos"])
        np.testing.assert_allclose(env.position()[4:], [-90, sim_env.OPEN])
    env.close()


def test_chunk_equals_single_steps(env):
    actions = np.tile([5, -20, 10, 80, -80, 50], (4, 1)) + np.arange(4)[:, None]
    begin(env, "place")
    for action in actions:
        one = env.step(action)
    begin(env, "place")
    chunk = env.step_chunk(actions)
    assert (one[0]["state"] == chunk[0]["state"]).all() and (
        one[0]["images"]["wrist"] == chunk[0]["images"]["wrist"]
    ).all()
    assert chunk[4]["executed"] == chunk[4]["steps"] == one[4]["steps"] == 4 and one[1:4] == chunk[1:4]


def test_truncation(env):
    begin(env, "place")
    hold = np.tile(env.position(), (200, 1))
    _, reward, terminated, truncated, info = env.step_chunk(hold)
    assert truncated and not terminated and reward == 0 and info["steps"] == LIMIT["place"]


@pytest.mark.parametrize(
    "action", [np.zeros(5), np.zeros((2, 6)), np.array([0, 0, 0, 0, 0, np.nan]), np.full(6, np.inf)]
)
def test_bad_actions_raise(env, action):
    begin(env, "place")
    with pytest.raises(ValueError, match="action"):
        env.step(action)


def test_user_mistakes_raise(env):
    with pytest.raises(ValueError, match="training seed"):
        env.reset(seed=5, options={"split": "ood_position"})
    with pytest.raises(ValueError, match="place"):
        SO100Env("plaice")
    with pytest.raises(ValueError, match="ood_position"):
        env.reset(seed=5, options={"split": "ood"})
    with pytest.raises(ValueError, match="options"):
        env.reset(seed=5, options={"famly": "place"})
    with pytest.raises(ValueError, match="reset"):
        SO100Env().step(np.zeros(6))
    env.reset(options={"split": "id", "family": "place"})


def test_a_thousand_random_steps_without_a_warning(env):
    begin(env, "sequence")
    rng, action = np.random.default_rng(0), env.position()
    for _ in range(1000):
        action = np.clip(action + rng.normal(0, 15, 6), LOW, HIGH)
        env._advance(action)
    assert np.isfinite(env.data.qpos).all()
    assert sum(w.number for w in env.data.warning) == 0


# -- success tests ----------------------------------------------------------------------------------------------------


def test_success_and_near_misses(env):
    begin(env, "place")
    ((colour, _, _, number),) = env.goal["legs"]
    x, y = env.pad_xy(number)
    other = next(c for c in env.cube_colours if c != colour)
    place = lambda dx=0, dz=0, speed=0.0: put_cube(env, colour, (x + dx, y, CUBE + dz), speed)
    place()
    assert env._info()["success"] and env._info()["reason"] == "done"
    place(dx=0.045)
    assert not env._judge() and env._info()["reason"] != "done"  # beside the pad
    place(speed=0.2)
    assert not env._judge()  # sliding through
    place(dz=0.02, speed=1e-9)
    assert not env._judge()  # in the air
    put_cube(env, colour, polar_to_xy(0, 0.17).tolist() + [CUBE])
    put_cube(env, other, (x, y, CUBE))
    assert not env._judge()  # the wrong cube
    put_cube(env, other, (x - 0.013, y, CUBE))
    put_cube(env, colour, (x + 0.013, y, CUBE))
    assert not env._judge()  # the right one, but another beside it on the pad
    put_cube(env, other, (x, y, CUBE))
    put_cube(env, colour, (x, y, 3 * CUBE))
    assert not env._judge()  # on top of another
    place()
    put_cube(env, other, (x, y, 3 * CUBE))
    assert not env._judge()  # another on top of it
    wrong = number % 5 + 1
    put_cube(env, colour, (*env.pad_xy(wrong), CUBE))
    assert not env._judge()  # the wrong pad


def test_a_held_cube_is_not_placed(env):
    begin(env, "tiny")
    expert, held_over_pad = Expert(env), 0
    for _ in range(LIMIT["tiny"]):
        terminated, _ = env._advance(expert.action())
        over = np.linalg.norm(env.cube_xyz("red")[:2] - env.pad_xy(3)) < 0.02
        if any(env.touching("red")):
            held_over_pad += over
            assert not terminated
        if env.held("red"):
            assert env._info()["reason"] == "blue is pad 3 , red cube in hand"
    assert held_over_pad and env._judge()


def test_sequence_needs_the_right_order(env):
    begin(env, "sequence")
    (first, _, _, one), (second, _, _, two) = env.goal["legs"]
    assert env._info()["reason"].startswith("first , ")
    put_cube(env, first, (*env.pad_xy(one), CUBE))
    assert env._info()["reason"].startswith("then , ") and not env._judge()
    put_cube(env, second, (*env.pad_xy(two), CUBE))
    assert env._info()["success"]
    begin(env, "sequence")
    put_cube(env, second, (*env.pad_xy(two), CUBE))
    assert not env._judge()
    put_cube(env, first, (*env.pad_xy(one), CUBE))
    info = env._info()
    assert not info["success"] and info["failure"] == "wrong order"
    begin(env, "sequence")  # first in place, then knocked off again: still the right order
    for colour, place in (
        (first, (*env.pad_xy(one), CUBE)),
        (first, (*env.pad_xy(one) - (0, 0.08), CUBE)),
        (second, (*env.pad_xy(two), CUBE)),
    ):
        put_cube(env, colour, place)
        assert not env._judge()
    put_cube(env, first, (*env.pad_xy(one), CUBE))
    assert env._info()["success"]


def test_another_cube_on_the_pad_hides_no_wrong_order(env):
    for seed in range(VAL, VAL + 20):
        begin(env, "sequence", seed)
        if len(env.cube_colours) > 2:
            break
    (first, _, _, one), (second, _, _, two) = env.goal["legs"]
    third = next(colour for colour in env.cube_colours if colour not in (first, second))
    for colour, place in (
        (third, (*env.pad_xy(two) + (0.012, 0), CUBE)),
        (second, (*env.pad_xy(two) - (0.014, 0), CUBE)),
        (first, (*env.pad_xy(one), CUBE)),
        (third, (0, -0.2, CUBE)),
    ):
        put_cube(env, colour, place)
        assert not env._judge()
    assert env.failure == "wrong order"


# -- splits and language ----------------------------------------------------------------------------------------------


def test_layouts_keep_to_their_split(env):
    for family in LIMIT:
        for seed in range(75):
            begin_layout(env, family, seed, "id")
            places = [xy_to_polar(env.cube_xyz(colour)) for colour in env.cube_colours]
            assert not any(held_out(*place) for place in places)
            if family != "tiny":
                turned = xy_to_polar(env.pad_xy(3))[0]
                assert abs(turned) <= 3 and len(set(env.pad_colours)) == 5 and 2 <= len(places) <= 4
            xy = [env.cube_xyz(colour)[:2] for colour in env.cube_colours]
            assert all(np.linalg.norm(a - b) > 0.054 for i, a in enumerate(xy) for b in xy[:i])
    for family in FAMILIES:
        for seed in range(VAL, VAL + 20):
            begin_layout(env, family, seed, "ood_position")
            goal = sample_goal(env.scene(), family, np.random.default_rng(seed), "ood_position")
            assert all(held_out(*xy_to_polar(env.cube_xyz(leg[0]))) for leg in goal["legs"])
            assert 5 <= abs(xy_to_polar(env.pad_xy(3))[0]) <= 8


def test_scenes_amid_work(env):
    """Start scenes have cubes on pads; no goal asks for a pad that another cube holds; first legs may be done already."""
    cubes, on_pads, first_words = 0, 0, {"first": 0, "then": 0, "done": 0}
    for seed in range(100):
        begin_layout(env, "sequence", seed, "id", start=True)
        scene = env.scene()
        cubes, on_pads = (
            cubes + len(scene["cubes"]),
            on_pads + sum(cube["pad"] is not None for cube in scene["cubes"]),
        )
        assert not any(held_out(*xy_to_polar(env.cube_xyz(colour))) for colour in env.cube_colours)
        for family in FAMILIES:
            goal = sample_goal(scene, family, np.random.default_rng(seed))
            assert goal["sum"] is None or number_of(goal["sum"]) == goal["legs"][0][3]
            for colour, _, _, number in goal["legs"]:
                assert [cube["colour"] for cube in scene["cubes"] if cube["pad"] == number] in ([], [colour])
            thought = reasoning(goal, scene).split()[0]
            first_words[thought] = first_words.get(thought, 0) + 1
    assert (
        0.2 < on_pads / cubes < 0.45
        and first_words["first"] > 40
        and first_words["then"] > 15
        and first_words["done"] > 8
    )


def begin_layout(env, family, seed, split, start=False):
    """Only the part of reset() that lays things out: a reset without pictures."""
    env.family, env.split = family, split
    mujoco.mj_resetData(env.model, env.data)
    env._place_things(
        np.random.default_rng([list(LIMIT).index(family), SPLITS.index(split), seed, int(start)]), start
    )
    mujoco.mj_forward(env.model, env.data)


SCENE = {
    "cubes": [
        {"colour": c, "t": f"t{i}", "r": "r3", "x": 0.0, "y": -0.2, "held": False, "pad": None}
        for i, c in enumerate(COLOURS[:4])
    ],
    "pads": [{"colour": c, "number": i + 1, "t": f"t{2 * i}"} for i, c in enumerate(COLOURS)],
}


def texts(family, split, n=500):
    rng = np.random.default_rng([FAMILIES.index(family), n])
    return [random_task(SCENE, family, rng, split) for _ in range(n)]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_text_has_nothing_held_out(family):
    train = {task for task, _ in texts(family, "id")}
    held_sums = HELD_OUT_SUMS + [s.replace("+", "plus").replace("-", "minus") for s in HELD_OUT_SUMS]
    for task in train:
        words = task.split()
        assert not any(name in words for names in HELD_OUT_NAMES.values() for name in names)
        assert not any(s in task for s in held_sums)
        assert not {"want", "make", "should", "drop", "carry", "has", "take", "let"} & set(words)
        assert task == task.lower() == " ".join(words)
    new = {task for task, _ in texts(family, "ood_instruction")}
    assert not train & new and len(train) > 150
    said = " ".join(new)
    assert all(word in said for word in ("i want", "make sure", "should hold"))


def test_canonical_sentences_and_reasons():
    assert "put the red cube on the blue pad" in {task for task, _ in texts("place", "id", 3000)}
    canonical = [task.startswith("put the ") and " on the " in task for task, _ in texts("place", "id")]
    share = np.mean(
        [yes and len(task.split()) == 8 for yes, (task, _) in zip(canonical, texts("place", "id"))]
    )
    assert 0.2 < share < 0.45
    goal = {"legs": [("red", None, "blue", 3)], "sum": None}
    scene = {**SCENE, "cubes": [dict(SCENE["cubes"][0], t="t5")]}
    assert reasoning(goal, scene) == "blue is pad 3 , red cube at t5 r3"
    vague = {"legs": [("red", "tomato", "blue", 4)], "sum": "3 + 1"}
    assert reasoning(vague, scene) == "tomato is red , 3 + 1 is pad 4 , red cube at t5 r3"
    scene["cubes"][0]["held"] = True
    assert reasoning(goal, scene) == "blue is pad 3 , red cube in hand"
    both = {"legs": [("green", None, "red", 1), ("red", None, "blue", 3)], "sum": None}
    assert reasoning(both, SCENE) == "first , red is pad 1 , green cube at t1 r3"
    assert instruction("tiny", goal, np.random.default_rng(0)) == "put the red cube on the blue pad"


def test_sums_and_names():
    assert not set(SUMS) & set(HELD_OUT_SUMS)
    assert {number_of(s) for s in HELD_OUT_SUMS} == {number_of(s) for s in SUMS} == {1, 2, 3, 4, 5}
    assert 0.15 < len(HELD_OUT_SUMS) / len(SUMS + HELD_OUT_SUMS) < 0.25
    names = [name for group in VAGUE_NAMES.values() for name in group]
    assert len(names) == len(set(names)) and all(HELD_OUT_NAMES[c] == VAGUE_NAMES[c][-2:] for c in COLOURS)
    assert not set(SEEDS["train"]) & set(SEEDS["val"]) and SEEDS["val"].stop <= SEEDS["report"].start


def test_random_task_says_what_is_missing():
    with pytest.raises(ValueError, match="needs 2 cubes"):
        random_task({**SCENE, "cubes": SCENE["cubes"][:1]}, "sequence", np.random.default_rng(0))


# -- the expert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LIMIT)
def test_expert_succeeds(env, family):
    demos = [
        demonstrate(env, VAL + seed, family, noise=noise, images=False)
        for seed in range(3)
        for noise in (False, True)
    ]
    assert all(demo["success"] for demo in demos), [demo["failure"] for demo in demos]


def test_expert_succeeds_out_of_distribution(env):
    for split in SPLITS[1:]:
        begin(env, "sequence", VAL + 1, split)
        expert = Expert(env)
        assert any(env._advance(expert.action())[0] for _ in range(LIMIT["sequence"]))


def test_demonstration_contract(env):
    demo = demonstrate(env, VAL, "place")
    n = len(demo["actions"])
    assert demo["images"].shape == (n, 2, 96, 96, 3) and demo["states"].shape == demo["actions"].shape == (
        n,
        6,
    )
    assert len(demo["reasons"]) == n and demo["reasons"][-1] == "done" and demo["failure"] == ""
    short = demonstrate(env, VAL, "place", start=True, limit=3)
    assert len(short["actions"]) == 3 and not short["success"]


def test_demonstration_says_where_the_arm_did_not_obey(env):
    """Away from the recorded spans the arm goes where its action says, give or take the small drift; in them it does not."""
    obeyed, strayed = [], []
    for seed in range(VAL, VAL + 12):
        demo = demonstrate(env, seed, "place", images=False)
        n = len(demo["actions"])
        astray = [any(first <= step < last for first, last in demo["disturbed"]) for step in range(n - 1)]
        error = np.abs(demo["states"][1:, :2] - demo["actions"][:-1, :2]).max(1)
        obeyed += error[~np.array(astray)].tolist()
        strayed += error[np.array(astray)].tolist()
    assert len(strayed) > 30 and np.mean(strayed) > 1.2 * np.mean(obeyed)


def test_expert_recovers_from_a_mistake(env):
    """What demonstrations show in part: one that is wrong about where things lie fails, the right one goes on from there."""
    begin(env, "place", VAL)
    mistaken, expert = Expert(env, (0.03, 0.01)), Expert(env)
    assert not np.allclose(mistaken.action(), expert.action(), atol=0.5)
    assert not any(env._advance(mistaken.action())[0] for _ in range(15))
    assert any(env._advance(expert.action())[0] for _ in range(45))


def test_expert_bears_errors_of_a_pupil(env):
    """Someone who is about 9 mm wrong, and differently so every four steps, still succeeds by the expert's rules."""
    wins = 0
    for seed in range(VAL, VAL + 30):
        begin(env, "calculate", seed)
        rng, expert = np.random.default_rng(seed), Expert(env)
        for step in range(LIMIT["calculate"]):
            if step % 4 == 0:
                expert.mistake = rng.normal(0, 0.009, 2)
            if env._advance(expert.action())[0]:
                wins += 1
                break
    assert wins >= 24


def test_expert_aims_within_reach_whatever_it_is_asked(env):
    begin(env, "place", VAL)
    for z in np.linspace(0, 0.15, 6):
        for roll in np.linspace(-160, 0, 9):
            for gripper in np.linspace(0, 100, 9):
                for r in (0.02, 0.5):
                    Expert(env).towards(np.array([0, 0, 0, 0, 0, gripper]), polar_to_xy(10, r), z, roll, OPEN)


def test_expert_starts_anywhere(env):
    for seed in range(6):
        assert demonstrate(env, VAL + seed, "place", noise=False, start=True, images=False)["success"]


# -- many arms ----------------------------------------------------------------------------------------------------------


def test_vec_env_matches_one_env(env):
    actions = np.tile([5, -20, 10, 80, -80, 50], (3, 4, 1)) + np.arange(3)[:, None, None]
    with VecEnv(3, workers=2) as vec:
        obs, infos = vec.reset([VAL, VAL + 1, VAL + 2], ["place", "calculate", "sequence"])
        assert obs["images"].shape == (3, 2, 96, 96, 3) and [info["family"] for info in infos] == list(
            FAMILIES
        )
        after, reward, terminated, truncated, _ = vec.step_chunk(actions)
        for i, family in enumerate(FAMILIES):
            alone, _ = begin(env, family, VAL + i)
            assert alone["task"] == obs["task"][i] and (alone["images"]["front"] == obs["images"][i, 0]).all()
            alone = env.step_chunk(actions[i])[0]
            assert (alone["state"] == after["state"][i]).all() and (
                alone["images"]["wrist"] == after["images"][i, 1]
            ).all()
        for _ in range(14):  # place and calculate run out of time, then rest; sequence goes on
            last, reward, terminated, truncated, infos = vec.step_chunk(actions)
        assert truncated.tolist() == [True, True, False] and infos[0]["steps"] == infos[2]["steps"] == 60
        assert vec.step_chunk(actions)[4][0]["executed"] == 0
        with pytest.raises(ValueError, match="training seed"):
            vec.reset([1], splits="ood_position", arms=[0])
        vec.reset([VAL + 5], arms=[0])
        assert vec.step_chunk(actions)[4][0]["steps"] == 4


def test_rollout_keeps_the_order_of_seeds():
    seen = []

    def policy(obs):
        seen.append(len(obs["task"]))
        return np.repeat(obs["state"][:, None], 20, axis=1), list(obs["task"])

    seeds = [VAL + 3, VAL + 1, VAL + 2, VAL + 7, VAL + 5]
    results = rollout(policy, seeds, "place", n_arms=2)
    assert [r["seed"] for r in results] == seeds and not any(r["success"] for r in results)
    assert all(r["extra"] == r["task"] and r["steps"] == 60 and " is pad " in r["reason"] for r in results)
    assert seen == [2] * 6 + [1] * 3


def test_import_needs_neither_torch_nor_a_display():
    code = "import sys, sim_env; assert 'torch' not in sys.modules; sim_env.SO100Env().reset(seed=0)"
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MUJOCO_GL")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_pictures_become_square():
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    assert np.array_equal(
        sim_env.square(Image.fromarray(noise[:, :48]), 48, "stretch"), noise[:, :48]
    )  # already this size
    assert np.array_equal(
        sim_env.square(Image.fromarray(noise), 48, "crop"), noise[:, 8:56]
    ) and np.array_equal(
        sim_env.square(Image.fromarray(noise.swapaxes(0, 1)), 48, "crop"), noise.swapaxes(0, 1)[8:56]
    )
    wide = Image.fromarray(
        np.tile(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (50, 1, 3))
    )  # 100 x 50, brighter to the right
    stretched, cropped = sim_env.square(wide, 20, "stretch"), sim_env.square(wide, 20, "crop")
    assert stretched.shape == cropped.shape == (20, 20, 3)
    assert stretched[0, 0, 0] < 10 and stretched[0, -1, 0] > 185  # all of it
    assert 45 < cropped[0, 0, 0] < 60 and 140 < cropped[0, -1, 0] < 155  # the middle half
    stripes = np.tile(
        np.uint8([0, 250])[None, :, None], (60, 30, 3)
    )  # one pixel wide: a filter that looks at fewer shows them as moire
    assert np.ptp(sim_env.square(Image.fromarray(stripes), 20, "stretch")[:, 1:-1].astype(int)) < 60
