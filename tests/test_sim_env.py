"""Tests of sim_env.py: kinematics, units, determinism, success tests, splits, language, pictures."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sim_env
from common import UserError
from sim_env import (
    ASKED,
    ASKED_AREA,
    CLOSED,
    COLOURS,
    CUBE,
    FAMILIES,
    HELD_OUT_AREA,
    HELD_OUT_SUMS,
    HIGH,
    LIMIT,
    LOW,
    NEW_WORDS,
    OPEN,
    SEEDS,
    SPLITS,
    TARGET_AREA,
    VAGUE_NAMES,
    WORDING,
    Leg,
    SO100Env,
    inside,
    instruction,
    inverse,
    mujoco,
    number_of,
    pinch_x,
    polar_to_xy,
    random_task,
    reasoning,
    resize_image,
    sample_goal,
    to_position,
    to_qpos,
    understand,
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
    """Put a cube somewhere. It comes to rest before the test goes on, unless it shall move."""
    i = env.cube_colours.index(colour)
    env.cube_pose[i] = (*xyz, 1, 0, 0, 0)
    env.cube_velocity[i] = (speed, 0, 0, 0, 0, 0)
    if not speed:
        mujoco.mj_step(env.model, env.data, 100)
    mujoco.mj_forward(env.model, env.data)


# -- geometry and units ------------------------------------------------------------------------------------


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


def test_motors_reach_as_far_as_the_joints(env):
    limits = to_position(env.model.jnt_range[:6].T)  # (2, 6)
    np.testing.assert_allclose(np.sort(limits, axis=0), [LOW, HIGH], atol=1e-9)
    np.testing.assert_allclose(env.model.actuator_ctrlrange, env.model.jnt_range[:6])


def test_bodies_are_numbered_as_the_module_says(env):
    names = [env.model.body(i).name for i in range(env.model.nbody)]
    assert names[sim_env.ARM[0]] == "base"
    assert names[sim_env.ARM[-2]] == "fixed_jaw" and names[sim_env.ARM[-1]] == "moving_jaw"
    assert names[sim_env.PADS] == [f"pad{i}" for i in range(1, 6)]
    assert names[sim_env.CUBES] == [f"cube{i}" for i in range(4)]
    bodies = env.model.geom_bodyid
    assert (bodies[sim_env.PADS] == range(8, 13)).all() and (bodies[sim_env.CUBES] == range(13, 17)).all()


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
    with pytest.raises(UserError, match="out of reach"):
        inverse(0, 0.6, 0.02)


def test_inverse_kinematics_is_vertical_where_it_can_be():
    for r in (0.14, 0.18, 0.22, 0.26):
        assert inverse(0, r, 0.012)[1:4].sum() == pytest.approx(90, abs=0.1)  # lift + elbow + wrist = tilt


def test_pads_read_left_to_right_in_the_front_image(env):
    begin(env, "place")
    columns = []
    for i in range(5):
        colours = env.model.geom_rgba[sim_env.PADS, :3]  # (5, 3), a view
        colours[:] = 0
        colours[i] = (1, 0, 1)
        picture = env.render().astype(int)
        pad = (picture[..., 0] > 120) & (picture[..., 2] > 120) & (picture[..., 1] < 60)
        columns.append(np.nonzero(pad)[1].mean())
    assert columns == sorted(columns)


def test_unused_things_are_out_of_sight(env):
    """Parked cubes and pads are neither seen nor touched."""
    begin(env, "tiny")
    before = env.render()
    env.model.geom_rgba[sim_env.CUBES][1:] = 0
    env.model.geom_rgba[sim_env.PADS][[0, 1, 3, 4]] = 0
    assert (env.render() == before).all()
    assert (env.cube_pose[1:, 2] == -1).all() and len(env.scene()["pads"]) == 1


# -- the interface ------------------------------------------------------------------------------------


def test_observation_contract(env):
    obs, info = begin(env, "place")
    for image in obs["images"].values():
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8 and image.std() > 10
    assert list(obs["images"]) == list(SO100Env.cameras) and isinstance(obs["task"], str)
    assert obs["state"].shape == (6,) and obs["state"].dtype == np.float32
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


def pick_up(env, colour):
    """Close the gripper round a cube and lift it."""
    phi, r = xy_to_polar(env.cube_xyz(colour))
    roll = -90 + sim_env.wrap(env.cube_yaw(colour) - phi, 90)
    for z, gripper, steps in ((0.07, OPEN, 12), (CUBE, OPEN, 8), (CUBE, CLOSED, 5), (0.07, CLOSED, 8)):
        for _ in range(steps):
            env.advance(inverse(phi, r, z, roll, gripper))


def test_physics_is_deterministic(env):
    ends = []
    for _ in range(2):
        begin(env, "place")
        pick_up(env, env.goal["legs"][0].cube)
        ends.append(env.data.qpos.copy())
    assert (ends[0] == ends[1]).all()


def test_chunk_equals_single_steps(env):
    actions = np.tile([5, -20, 10, 80, -80, 50], (4, 1)) + np.arange(4)[:, None]
    begin(env, "place")
    for action in actions:
        one = env.step(action)
    begin(env, "place")
    chunk = env.step_chunk(actions)
    assert (one[0]["state"] == chunk[0]["state"]).all()
    assert (one[0]["images"]["wrist"] == chunk[0]["images"]["wrist"]).all()
    assert chunk[4]["executed"] == chunk[4]["steps"] == one[4]["steps"] == 4
    assert one[1:4] == chunk[1:4]


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
    with pytest.raises(UserError, match="action"):
        env.step(action)


def test_user_mistakes_raise(env):
    with pytest.raises(UserError, match="training seed"):
        env.reset(seed=5, options={"split": "ood_position"})
    with pytest.raises(UserError, match="place"):
        SO100Env("plaice")
    with pytest.raises(UserError, match="ood_position"):
        env.reset(seed=5, options={"split": "ood"})
    with pytest.raises(UserError, match="options"):
        env.reset(seed=5, options={"famly": "place"})
    with pytest.raises(UserError, match="reset"):
        SO100Env().step(np.zeros(6))
    with pytest.raises(UserError, match="between 8 and 1024"):
        SO100Env(px=2000).reset(seed=5)
    env.reset(options={"split": "id", "family": "place"})  # without a seed


def test_a_thousand_random_steps_without_a_warning(env):
    begin(env, "sequence")
    rng, action = np.random.default_rng(0), env.position()
    for _ in range(1000):
        action = np.clip(action + rng.normal(0, 15, 6), LOW, HIGH)
        env.advance(action)
    assert np.isfinite(env.data.qpos).all()
    assert sum(w.number for w in env.data.warning) == 0


# -- success tests ------------------------------------------------------------------------------------


def test_success_and_near_misses(env):
    begin(env, "place")
    ((colour, _, _, number),) = env.goal["legs"]
    x, y = env.pad_xy(number)
    other = next(c for c in env.cube_colours if c != colour)

    def place(dx=0, dz=0, speed=0.0):
        put_cube(env, colour, (x + dx, y, CUBE + dz), speed)

    place()
    assert env._info()["success"] and env._info()["reason"].endswith(f"{colour} cube there , done")
    place(dx=0.045)
    assert not env._judge() and not env._info()["reason"].endswith("done")  # beside the pad
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
    """While the gripper holds the cube on its pad the episode goes on."""
    begin(env, "tiny")
    pick_up(env, "red")
    assert env.held("red") and env._info()["reason"] == "blue pad at t6 , red cube in hand"
    phi, r = xy_to_polar(env.pad_xy(3))
    for z in (0.07, CUBE + 0.002):
        for _ in range(10):
            terminated, _ = env.advance(inverse(phi, r, z, -90, CLOSED))
    assert env.over_pad("red", 3) and env.held("red") and env.pad_under("red") is None and not terminated
    for z in (CUBE + 0.002, 0.07):
        for _ in range(8):
            terminated, _ = env.advance(inverse(phi, r, z, -90, OPEN))
    assert terminated and env.pad_under("red") == 3


def test_sequence_needs_the_right_order(env):
    begin(env, "sequence")
    (first, _, _, one), (second, _, _, two) = env.goal["legs"]
    assert env._info()["reason"].startswith("first , ")
    put_cube(env, first, (*env.pad_xy(one), CUBE))
    assert "there , then , " in env._info()["reason"] and not env._judge()
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


# -- splits and language ------------------------------------------------------------------------------------


def test_layouts_keep_to_their_split(env):
    for family in LIMIT:
        for seed in range(75):
            begin_layout(env, family, seed, "id")
            places = [xy_to_polar(env.cube_xyz(colour)) for colour in env.cube_colours]
            assert not any(inside(area, *place) for place in places for area in TARGET_AREA.values())
            if family != "tiny":
                turned = xy_to_polar(env.pad_xy(3))[0]
                assert abs(turned) <= 3 and len(set(env.pad_colours)) == 5 and 2 <= len(places) <= 4
            xy = [env.cube_xyz(colour)[:2] for colour in env.cube_colours]
            assert all(np.linalg.norm(a - b) > 0.054 for i, a in enumerate(xy) for b in xy[:i])
    for family in FAMILIES:
        for seed in range(VAL, VAL + 20):
            for split, area in TARGET_AREA.items():
                begin_layout(env, family, seed, split)
                goal = sample_goal(env.scene(), family, np.random.default_rng(seed), split)
                assert all(inside(area, *xy_to_polar(env.cube_xyz(leg[0]))) for leg in goal["legs"])
                turned = abs(xy_to_polar(env.pad_xy(3))[0])
                assert 5 <= turned <= 8 if split == "ood_position" else turned <= 3


def test_questions_go_where_demonstrations_never_go(env):
    """Scenes of kind ASKED have cubes in the area of asked_position, and never in that of ood_position."""
    asked = 0
    for seed in range(100):
        begin_layout(env, "sequence", seed, ASKED, start=True)
        places = [xy_to_polar(env.cube_xyz(colour)) for colour in env.cube_colours]
        assert not any(inside(HELD_OUT_AREA, *place) for place in places)
        asked += sum(inside(ASKED_AREA, *place) for place in places)
    assert asked > 5


def test_words_for_a_place_lie_on_the_thing_in_the_front_picture(env):
    apart = []
    for seed in range(4):
        env.reset(seed=seed, options={"family": "sequence"})
        with mujoco.Renderer(env.model, 96, 96) as renderer:
            renderer.enable_segmentation_rendering()
            renderer.update_scene(env.data, "front")
            geoms = renderer.render()[..., 0]  # (96, 96) the geom at every pixel
        things = zip(range(env.model.ngeom)[sim_env.CUBES], env.scene()["cubes"])
        pads = zip(range(env.model.ngeom)[sim_env.PADS], env.scene()["pads"])
        for geom, thing in [*things, *pads]:
            rows, columns = np.nonzero(geoms == geom)
            if not len(rows):  # the arm hides it
                continue
            column, row = (int(word[1:]) for word in thing["point"].split())
            apart.append((abs(columns.mean() / 3 - column - 0.5), abs(rows.mean() / 3 - row - 0.5)))
    # words name columns and rows of 3 pixels; a cube's corners move its middle, the arm may hide a part
    assert np.median(apart) < 0.5 and np.quantile(apart, 0.9) < 1.5


def test_scenes_amid_work(env):
    """Start scenes have cubes on pads. Goals name free pads, and some have their first leg done already."""
    cubes = 0
    on_pads = 0
    says = Counter()
    for seed in range(100):
        begin_layout(env, "sequence", seed, "id", start=True)
        scene = env.scene()
        cubes += len(scene["cubes"])
        on_pads += sum(cube["pad"] is not None for cube in scene["cubes"])
        places = [xy_to_polar(env.cube_xyz(colour)) for colour in env.cube_colours]
        assert not any(inside(area, *place) for place in places for area in TARGET_AREA.values())
        for family in FAMILIES:
            goal = sample_goal(scene, family, np.random.default_rng(seed))
            assert goal["sum"] is None or number_of(goal["sum"]) == goal["legs"][0][3]
            for colour, _, _, number in goal["legs"]:
                assert [cube["colour"] for cube in scene["cubes"] if cube["pad"] == number] in ([], [colour])
            text = reasoning(goal, scene)
            says["then"] += "then" in text
            says["done"] += text.endswith("done")
            says["first"] += text.startswith("first")
    assert 0.2 < on_pads / cubes < 0.45
    assert says["first"] > 60 and says["then"] > 15 and says["done"] > 8


def begin_layout(env, family, seed, split, start=False):
    """Only the part of reset() that lays things out: a reset without pictures."""
    env.family, env.split = family, split
    mujoco.mj_resetData(env.model, env.data)
    rng = np.random.default_rng([list(LIMIT).index(family), (*SPLITS, ASKED).index(split), seed, int(start)])
    env._place_things(rng, start)
    env.cube_pose[: len(env.cube_colours), 2] = CUBE
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
    # what demonstrations say, what questions say, and what is said in a split alone
    said = {split: {task for task, _ in texts(family, split)} for split in ("id", ASKED, *NEW_WORDS)}
    banned = {"id": WORDING["asked_instruction"].sums + HELD_OUT_SUMS, ASKED: HELD_OUT_SUMS}
    for split, sums in banned.items():
        sums = sums + [s.replace("+", "plus").replace("-", "minus") for s in sums]
        names = {
            name for of_colour in VAGUE_NAMES.values() for name in of_colour[WORDING[split].names.stop :]
        }
        for task in said[split]:
            words = task.split()
            assert names.isdisjoint(words)
            assert not any(s in task for s in sums)
            assert not {"want", "make", "hold", "drop", "carry", "has", "take", "let"} & set(words)
            assert task == task.lower() == " ".join(words)
    assert not {"find", "belongs", "transfer", "waits"} & set(" ".join(said["id"]).split())
    assert {"find", "belongs", "transfer", "waits"} <= set(" ".join(said[ASKED]).split())
    assert not said["id"] & said["asked_instruction"] and not said[ASKED] & said["ood_instruction"]
    assert len(said["id"]) > 150
    new = " ".join(said["ood_instruction"])
    assert all(word in new for word in ("i want", "make sure", "should hold"))


def test_sums_are_counted_out():
    assert sim_env.count_out("3 + 2") == "3 + 2 : 4 1 5 2"
    assert sim_env.count_out("9 - 6") == "9 - 6 : 7 1 8 2 9 3"
    assert sim_env.count_out("4 + 0") == "4 + 0 :"
    for expression in sim_env.SUMS + sim_env.HELD_OUT_SUMS + sim_env.ASKED_SUMS:
        a, sign, b, colon, *steps = sim_env.count_out(expression).split()
        assert colon == ":" and len(steps) <= 10
        if sign == "-":  # up to the greater one, and the number of steps is the result
            assert steps[-2:] == [a, str(eval(expression))]
        elif steps:
            assert steps[-2:] == [str(eval(expression)), b]


def test_the_grammar_of_questions_has_no_word_that_only_held_out_frames_have():
    def words(frames):
        return {word for frame in frames for word in re.findall("[a-z]+", re.sub("{.*?}", "", frame))}

    taught = words(sim_env.grammar_frames())
    assert len(set(sim_env.grammar_frames())) > 800
    elsewhere = words(sim_env.WORDS["frames"] + sim_env.WORDS["asked_frames"] + sim_env.WORDS["prepositions"])
    # "be" says nothing; the others do
    only_held_out = words(sim_env.WORDS["held_out_frames"]) - elsewhere - {"be"}
    assert {"want", "sure", "hold", "drop", "carry", "leave", "rest"} <= only_held_out
    assert taught.isdisjoint(only_held_out)


def test_the_hand_reaches_for_cubes_and_holds_them():
    env = SO100Env(family="sequence", px=32)
    seen = Counter()
    for seed in range(60):
        options = {"family": "sequence", "start": True, "reach": True, "split": sim_env.ASKED}
        env.reset(seed=seed, options=options)
        scene = env.scene()
        held = [cube["colour"] for cube in scene["cubes"] if cube["held"]]
        seen[len(held)] += 1
        for colour in scene["cubes"]:
            on_table = colour["colour"] not in held
            if on_table:  # nothing else moved
                assert abs(env.cube_xyz(colour["colour"])[2] - sim_env.CUBE) < 0.001
        if held:  # it stays in the hand when the physics runs
            for _ in range(3):
                env.advance(env.position() * [1, 1, 1, 1, 1, 0] + [0, 0, 0, 0, 0, sim_env.CLOSED])
            assert env.held(held[0])
    assert set(seen) == {0, 1} and seen[1] >= 10
    env.close()


def test_canonical_sentences_and_reasoning():
    assert "put the red cube on the blue pad" in {task for task, _ in texts("place", "id", 3000)}
    canonical = [task.startswith("put the ") and " on the " in task for task, _ in texts("place", "id")]
    short = [len(task.split()) == 8 for task, _ in texts("place", "id")]
    share = np.mean(np.array(canonical) & np.array(short))
    assert 0.2 < share < 0.45
    goal = {"legs": [Leg("red", None, "blue", 3)], "sum": None}
    scene = {**SCENE, "cubes": [dict(SCENE["cubes"][0], t="t5")]}
    assert reasoning(goal, scene) == "blue pad at t4 , red cube at t5 r3"
    vague = {"legs": [Leg("red", "tomato", "yellow", 4)], "sum": "3 + 1"}
    counted = "tomato is red , 3 + 1 : 4 1 is pad 4 , yellow pad at t6 , red cube at t5 r3"
    assert reasoning(vague, scene) == counted
    scene["cubes"][0]["held"] = True
    assert reasoning(goal, scene) == "blue pad at t4 , red cube in hand"
    both = {"legs": [Leg("green", None, "red", 1), Leg("red", None, "blue", 3)], "sum": None}
    assert reasoning(both, SCENE) == "first , red pad at t0 , green cube at t1 r3"
    scene["cubes"][0] |= {"held": False, "pad": 3}
    assert reasoning(goal, scene) == "blue pad at t4 , red cube there , done"
    turned = {"legs": both["legs"][::-1], "sum": None}
    then = "then , red pad at t0 , green cube at t1 r3"
    scene["cubes"] += SCENE["cubes"][1:]
    assert reasoning(turned, scene) == f"first , blue pad at t4 , red cube there , {then}"
    assert instruction("tiny", goal, np.random.default_rng(0)) == "put the red cube on the blue pad"


def test_sums_and_names():
    sums = [WORDING[split].sums for split in ("id", *NEW_WORDS)]
    assert len({*sum(sums, [])}) == len(sum(sums, [])) == 55  # none is in two of them
    assert all({number_of(s) for s in some} == {1, 2, 3, 4, 5} for some in sums)
    names = [name for group in VAGUE_NAMES.values() for name in group]
    assert len(names) == len(set(names)) == 30
    frames = [set(WORDING[split].frames) for split in ("id", *NEW_WORDS)]
    assert len(set.union(*frames)) == sum(map(len, frames))
    assert not set(SEEDS["train"]) & set(SEEDS["val"]) and SEEDS["val"].stop <= SEEDS["report"].start


def test_random_task_says_what_is_missing():
    with pytest.raises(UserError, match="needs 2 cubes"):
        random_task({**SCENE, "cubes": SCENE["cubes"][:1]}, "sequence", np.random.default_rng(0))


def test_a_persons_own_words():
    one = understand("Please put the GREEN block onto the red square!", SCENE)
    assert one == {"legs": [Leg("green", None, "red", 1)], "sum": None}
    two = understand(
        "the one that looks like a tomato on the blue pad, then the blue cube on the red pad", SCENE
    )
    assert two["legs"] == [Leg("red", "tomato", "blue", 3), Leg("blue", None, "red", 1)]
    for words in ("pad 3 + 1", "pad number 3 plus 1"):
        assert understand(f"move the red cube to {words}", SCENE) == {
            "legs": [Leg("red", None, "yellow", 4)],
            "sum": "3 + 1",
        }


@pytest.mark.parametrize(
    "task",
    [
        "put it there",
        "put the red cube away",
        "put the pink cube on the red pad",
        "put the red cube on the blue pad and the red cube on the red pad",
        "put the red cube on the blue pad and the green cube on the blue pad",
        "put the red cube on pad 1 + 1 and the green cube on the red pad",
    ],
)
def test_unclear_words_are_refused(task):
    with pytest.raises(UserError, match="which cube goes where"):
        understand(task, SCENE)


def test_words_for_what_is_not_there_are_refused():
    for task in ("put the purple cube on the red pad", "put the red cube on pad 9 + 9"):
        with pytest.raises(UserError, match="in this scene"):
            understand(task, SCENE)


def test_every_instruction_is_understood(env):
    """What the simulation says itself is read back as the goal that it was made from."""
    for family in FAMILIES:
        for split in SPLITS:
            rng = np.random.default_rng(0)
            for _ in range(200):
                goal = sample_goal(SCENE, family, rng, split)
                task = instruction(family, goal, rng, split)
                assert understand(task, SCENE) == goal, task


def test_reset_with_a_persons_own_task(env):
    """The first scene from the seed on that has the cubes and pads; the same again for the same seed."""
    task = "put the red cube on pad 3 + 1"
    obs, info = env.reset(seed=VAL, options={"task": task, "split": "id", "family": "place"})
    assert obs["task"] == env.task == task and info["family"] == "calculate" and info["steps"] == 0
    assert env.goal["legs"][0][:2] == ("red", None) and env.goal["sum"] == "3 + 1"
    for seed in range(VAL, info["seed"]):
        begin(env, "sequence", seed)
        assert "red" not in env.cube_colours
    again, same = env.reset(seed=info["seed"], options={"task": task})
    assert same == info and (again["images"]["front"] == obs["images"]["front"]).all()
    with pytest.raises(UserError, match="which cube goes where"):
        env.reset(seed=VAL, options={"task": "tidy up"})


def test_another_instruction_in_mid_motion(env):
    begin(env, "place")
    env.step_chunk(np.tile(env.position(), (5, 1)))
    one, two = env.cube_colours[:2]
    obs = env.instruct(f"put the {one} cube on the red pad , then the {two} cube on the blue pad")
    assert obs["task"] == env.task and env.family == "sequence" and env.steps == 0
    assert [leg.cube for leg in env.goal["legs"]] == [one, two]


def test_the_target_moves_once():
    """With `moved` the cube to be fetched is elsewhere after so many steps, and nothing else is."""
    env = SO100Env(px=32, moved=2)
    begin(env, "place")
    colour = env.goal["legs"][0].cube
    before = {c: env.cube_xyz(c) for c in env.cube_colours}
    hold = np.tile(env.position(), (8, 1))
    info = env.step_chunk(hold)[4]
    assert 2 <= info["moved_at"] <= 5
    for c, place in before.items():
        distance = np.linalg.norm(env.cube_xyz(c) - place)
        assert distance >= 0.049 if c == colour else distance < 0.002
    assert not inside(HELD_OUT_AREA, *xy_to_polar(env.cube_xyz(colour)))
    assert env.step_chunk(hold)[4]["moved_at"] == info["moved_at"]
    env.close()


# -- pictures ------------------------------------------------------------------------------------


def draw_in_a_process(*modules, **changes):
    """tests/draw_without_display.py, without a display and without MUJOCO_GL -> the finished process."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM")
    }
    command = [sys.executable, Path(__file__).with_name("draw_without_display.py"), *modules]
    return subprocess.run(command, env=environment | changes, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's way to draw without a display")
@pytest.mark.parametrize("modules", [["sim_env"], ["mujoco", "sim_env"]])
def test_draws_without_a_display_whoever_imports_mujoco_first(modules):
    done = draw_in_a_process(*modules)
    assert done.returncode == 0 and "drawn" in done.stdout, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's way to draw without a display")
def test_a_missing_opengl_library_is_one_line_at_the_first_drawing(tmp_path):
    """A package OpenGL that fails as PyOpenGL does without libEGL stands in for the missing library."""
    (tmp_path / "OpenGL").mkdir()
    (tmp_path / "OpenGL" / "__init__.py").write_text("raise AttributeError('no eglQueryString')\n")
    done = draw_in_a_process("sim_env", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stdout == "imported\n"
    assert done.stderr.splitlines()[-1].startswith("error: MuJoCo cannot draw")
    assert "apt-get install libegl1" in done.stderr
    chosen = draw_in_a_process("sim_env", PYTHONPATH=str(tmp_path), MUJOCO_GL="egl")
    assert "UserError: MuJoCo cannot draw (no eglQueryString)" in chosen.stderr.splitlines()[-1]


def test_pictures_become_square():
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    wide = Image.fromarray(noise)
    high = Image.fromarray(noise.swapaxes(0, 1))
    same = resize_image(Image.fromarray(noise[:, :48]), 48, "stretch")  # already this size
    assert np.array_equal(same, noise[:, :48])
    assert np.array_equal(resize_image(wide, 48, "crop"), noise[:, 8:56])
    assert np.array_equal(resize_image(high, 48, "crop"), noise.swapaxes(0, 1)[8:56])
    ramp = np.arange(0, 200, 2, dtype=np.uint8)[None, :, None]
    brighter = Image.fromarray(np.tile(ramp, (50, 1, 3)))  # 100 x 50, brighter to the right
    stretched = resize_image(brighter, 20, "stretch")
    cropped = resize_image(brighter, 20, "crop")
    assert stretched.shape == cropped.shape == (20, 20, 3)
    assert stretched[0, 0, 0] < 10 and stretched[0, -1, 0] > 185  # all of it
    assert 45 < cropped[0, 0, 0] < 60 and 140 < cropped[0, -1, 0] < 155  # the middle half
    # Stripes of one pixel: a filter that looks at fewer pixels than it merges shows them as moire.
    stripes = Image.fromarray(np.tile(np.uint8([0, 250])[None, :, None], (60, 30, 3)))
    assert np.ptp(resize_image(stripes, 20, "stretch")[:, 1:-1].astype(int)) < 60


def test_the_program_draws_every_family_and_split(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")  # no viewer
    sim_env.main()
    assert Image.open("out/sim/contact_sheet.png").size == (len(SPLITS) * 2 * 224, 3 * 224)
    assert len(capsys.readouterr().out.splitlines()) == 3 * len(SPLITS) + 1
