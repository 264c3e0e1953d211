"""Tests of extras/real_env.py on an emulated arm, through LeRobot's own driver.

To run them: pip install 'lerobot[feetech]'
"""

import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lerobot")
pytest.importorskip("scservo_sdk")
pytest.importorskip("cv2")

from feetech_emulator import (
    CALIBRATION,
    GOAL,
    HOMING,
    MAX,
    MIN,
    SPEED,
    SYNC_READ,
    SYNC_WRITE,
    TASK,
    TICK,
    WRITE,
    emulated_arm,
    unsigned,
)

import sim_env
from common import UserError
from evaluate import Episode, run_episodes
from extras import real_env
from extras.real_env import FLOOR, HOME, MAX_STEP, REST, ArmError, JudgedEnv, RealEnv
from sim_env import FPS, HIGH, LOW, MOTORS

ASK = {"task": TASK}
SIZE = (64, 48)  # of the emulated cameras
MEMORY = 56  # bytes of a servo's memory that only the driver writes


@pytest.fixture
def arm(tmp_path, monkeypatch, request):
    """An emulated arm in a scene, with its calibration file; nothing is connected yet.

    Indirect parameter False: no pseudo terminal.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    emulator = emulated_arm(tmp_path / "calibration", monkeypatch, getattr(request, "param", True))
    yield emulator
    for number, handler in handlers.items():
        signal.signal(number, handler)
    emulator.close()


@pytest.fixture
def opened(arm):
    """opened(**options) -> a RealEnv on the emulated arm, closed when the test ends."""
    envs = []

    def make(**options):
        envs.append(RealEnv(arm.port, options.pop("cameras", {"front": 0}), px=48, size=SIZE, **options))
        return envs[-1]

    yield make
    for env in envs:
        env.close()


@pytest.fixture
def env(opened):
    """A RealEnv with one camera whose episode has begun."""
    env = opened()
    env.reset(options=ASK)
    return env


def targets(arm):
    """Every group of six targets that reached the servos, and the positions measured before, each (n, 6)."""
    assert [motor for motor, *_ in arm.goals] == list(MOTORS) * (len(arm.goals) // 6)
    goals = np.array([goal for *_, goal in arm.goals]).reshape(-1, 6)
    measured = np.array([now for _, now, _ in arm.goals]).reshape(-1, 6)
    return goals, measured


def within_limits(arm):
    """Nothing that was sent, and nowhere the arm has been, is outside the limits."""
    for motor, now, goal in arm.goals:
        j = MOTORS.index(motor)
        assert LOW[j] - 0.1 <= goal <= HIGH[j] + 0.1, motor
        assert abs(goal - now) <= MAX_STEP[j] + 0.3, (motor, now, goal)
    trace = np.array(arm.trace)
    assert (trace > LOW - 3).all() and (trace < HIGH + 3).all()  # MuJoCo's own stops are soft


def folded(arm):
    """Torque is off and the arm lies in its rest pose."""
    return arm.torque() == [] and np.abs(arm.sim.position() - REST).max() < 4


def after(n, act):
    """A fault of the emulator: call act() at the n-th packet from now, and leave the packets alone."""
    calls = itertools.count()

    def fault(instruction):
        if next(calls) == n:
            act()

    return fault


def test_observation_and_motion_are_those_of_the_simulation(arm, opened):
    env = opened(cameras={"front": 0, "wrist": 2})
    assert arm.torque() == list(MOTORS)
    env.home = arm.sim.position()
    obs, info = env.reset(options=ASK)
    twin = sim_env.SO100Env(px=48)
    twin.reset(seed=2_000_000)
    for name in ("qpos", "qvel", "ctrl"):
        getattr(twin.data, name)[:] = getattr(arm.sim.data, name)
    start = obs["state"].astype(float)
    for k in range(25):
        action = start + [15 * np.sin(k / 3), 8 * np.sin(k / 4), -6 * np.sin(k / 2), 0, k, k]
        expected, *_ = twin.step(action)
        obs, reward, terminated, truncated, info = env.step(action)
        # the difference: encoder ticks, and the servo's own speed limit
        assert np.abs(obs["state"] - expected["state"]).max() < 1.5, k
        truth = arm.sim._obs()
        assert np.abs(obs["state"] - truth["state"]).max() < 0.1
        assert obs["state"].dtype == np.float32
        for camera in sim_env.CAMERAS:  # RGB, centred, not late by a frame
            assert np.array_equal(obs["images"][camera], truth["images"][camera])
    assert obs["task"] == TASK
    assert (reward, terminated, truncated) == (0, False, False)
    assert info["steps"] == 25 and not env.faults
    assert env.render(32, "wrist").shape == (32, 32, 3)
    assert {"success", "reason", "steps", "executed", "failure"} <= set(info)
    twin.close()


def test_it_is_reset_as_a_simulated_environment_is(opened):
    env = opened(dry_run=True)
    obs, info = env.reset(seed=7, options={"family": "real", "split": "id", "task": TASK})
    assert obs["task"] == TASK and info["executed"] == 0
    assert (RealEnv.cameras, RealEnv.motors, list(RealEnv.families)) == (sim_env.CAMERAS, MOTORS, ["real"])
    *_, info = env.step_chunk(np.tile(HOME, (3, 1)))
    assert (info["executed"], info["steps"]) == (3, 3)
    assert env.instruct("put the blue cube on the red pad")["task"] == "put the blue cube on the red pad"
    *_, info = env.step(HOME)
    assert (info["executed"], info["steps"]) == (1, 1)


def test_a_live_picture_is_the_recorded_one(opened):
    """A recorded frame comes through resize_image, too: the policy sees the same scene in the same way."""
    env = opened(cameras={"front": 0, "wrist": 2})
    obs, _ = env.reset(options=ASK)
    for camera, (frame, _, _) in env.shown.items():
        assert frame.shape == (48, 64, 3)
        assert np.array_equal(obs["images"][camera], frame[:, 8:56])  # has the size already: bit for bit
        recorded = sim_env.resize_image(Image.fromarray(frame), 31, "crop")
        assert np.array_equal(env.render(31, camera), recorded)


def test_wild_actions_stay_within_limits(arm, opened, monkeypatch):
    rng = np.random.default_rng(0)
    env = opened(limit=1000)
    env.reset(options=ASK)
    reasons = set()
    first = len(arm.goals)
    for k in range(80):
        action = rng.uniform(LOW - 60, HIGH + 60)
        if k % 2:
            action = np.where(rng.random(6) < 0.5, LOW - 90, HIGH + 90)
        *_, info = env.step(action)
        reasons |= set(info["clipped"])
    assert reasons == {"joint", "step", "workspace"}
    arm.goals = arm.goals[first:]
    within_limits(arm)
    goals, now = targets(arm)
    assert (np.abs(goals - now) <= MAX_STEP + 0.3).all() and len(goals) == 80
    # targets are whole encoder ticks: two millimetres of slack
    monkeypatch.setattr(real_env, "FLOOR", FLOOR - 0.002)
    monkeypatch.setattr(real_env, "REACH", real_env.REACH + 0.002)
    monkeypatch.setattr(real_env, "BASE", real_env.BASE + [[0.002], [-0.002]])
    for goal, before in zip(goals, now):
        assert env._inside(goal) or np.abs(goal - before).max() < 0.3


def test_forward_kinematics_of_the_workspace(opened):
    env = opened(dry_run=True)
    assert env._inside(HOME) and env._inside(REST)
    for z, good in ((0, True), (-0.009, True), (-0.02, False)):  # metres, the fingertips below the table
        assert env._inside(sim_env.inverse(20, 0.2, z)) == good, z
    deep = sim_env.inverse(20, 0.2, -0.03) + [0, 12, 0, 0, 0, 0]
    assert not env._inside(deep)
    assert not env._inside(np.array([0, 90, -90, 0, 0, 10]))  # stretched out
    env.measured = sim_env.inverse(20, 0.2, 0.02)
    near, why = env._limited(sim_env.inverse(20, 0.2, -0.03))
    assert why == ["workspace"] and env._inside(near)
    env.data.qpos[:6] = sim_env.to_qpos(near)
    sim_env.mujoco.mj_kinematics(sim_env.MODEL, env.data)
    lowest = min(env.data.site(name).xpos[2] for name in ("gripper", "jaw_tip"))
    assert FLOOR <= lowest < 0.01  # as low as it may, not back


def test_rests_at_both_ends_and_is_limp_afterwards(arm, opened):
    env = opened()
    obs, _ = env.reset(options=ASK)
    assert np.abs(obs["state"] - HOME).max() < 4
    speed = np.abs(np.diff(np.array(arm.trace), axis=0)).max() / TICK  # degrees/s
    assert speed < 2 * real_env.MOVE_SPEED
    env.step(HOME + [15, -10, 5, 0, 0, 0])
    env.close()
    env.close()
    assert folded(arm)
    assert all(arm.get(motor, SPEED) == 0 for motor in MOTORS)
    arm.advance(2)
    assert folded(arm)  # does not fall
    with pytest.raises(UserError, match="new RealEnv"):
        env.reset(options=ASK)


def test_torque_comes_on_where_the_arm_is(arm, opened):
    for motor in MOTORS:
        arm.put(motor, GOAL, arm.ticks(motor, 40))  # yesterday's target
    before = arm.sim.position()
    opened()
    arm.advance(1)
    assert np.abs(arm.sim.position() - before).max() < 3  # gravity


def test_dry_run_writes_nothing(arm, opened, capsys):
    memory = {motor: bytes(arm.memory[motor][:MEMORY]) for motor in MOTORS}
    env = opened(dry_run=True)
    env.reset(options=ASK)
    env.step(HOME + 90)
    env.close()
    assert WRITE not in arm.counts and SYNC_WRITE not in arm.counts
    assert memory == {motor: bytes(arm.memory[motor][:MEMORY]) for motor in MOTORS}
    said = capsys.readouterr().out
    assert "would move to shoulder_pan" in said
    assert "would send shoulder_pan" in said and "clipped: joint, step" in said


# -- errors of a person, in one line -----------------------------------------------------------------------


def says(arm, *words, cameras=None, port=None, **options):
    """RealEnv(...) ends in a UserError of one line that contains these words, and no servo holds."""
    cameras = {"front": 0} if cameras is None else cameras
    options = {"size": SIZE} | options
    with pytest.raises(UserError) as caught:
        RealEnv(arm.port if port is None else port, cameras, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text
    assert arm.torque() == []


def test_port_and_servos(arm, monkeypatch):
    says(arm, "/dev/nothing", "lerobot-find-port", port="/dev/nothing")
    says(arm, "lerobot-find-port", port="")
    arm.dead = {"wrist_flex"}
    says(arm, "wrist_flex", "id 4", "power", "lerobot-setup-motors")
    monkeypatch.setitem(sys.modules, "lerobot.motors", None)
    says(arm, "pip install 'lerobot[feetech]'")


def test_a_port_that_does_not_open(arm, tmp_path):
    port = tmp_path / "ttyACM1"
    port.write_text("no terminal")
    says(arm, f"port {port} cannot be read", "another program", "dialout", port=str(port))


def test_cameras(arm):
    both = {"front": 0, "wrist": "7"}
    says(arm, "camera wrist (7)", "lerobot-find-cameras opencv", "--wrist=", cameras=both)
    says(arm, "camera front ()", "--front=", cameras={"front": ""})
    says(arm, "camera front (0)", "capture_width=640", size=(640, 480))
    arm.camera_rate = 5.0
    says(arm, "camera front (0) gives 5 frames a second", "needs 10", "--front=")


def test_a_camera_of_another_rate_than_30(arm, opened):
    arm.camera_rate = 25.0
    assert opened(dry_run=True).opened["front"].fps == 25


def test_calibrations(arm, opened):
    other = arm.file.with_name("other.json")
    other.write_text(arm.file.read_text())
    says(arm, "--id=", "emulated, other")
    opened(name="emulated", dry_run=True)
    says(arm, "no calibration of missing", "lerobot-calibrate --robot.type=so100_follower", name="missing")
    other.unlink()
    for width in (70, 127, 168):  # degrees, of 190; what is left after a third is lost, and a ninth
        calibrated_to(arm, width)
        says(arm, f"elbow_flex turns by {width} degrees", "190", "lerobot-calibrate", "--robot.id=emulated")
    arm.file.write_text("{}")
    says(arm, "no calibration of an SO-100", "lerobot-calibrate")
    arm.file.unlink()
    says(arm, "no calibration", "lerobot-calibrate")


def calibrated_to(arm, width):
    """Write a calibration whose elbow turns by so many degrees about the same middle, also into its servo."""
    narrow = json.loads(arm.file.read_text())
    elbow = narrow["elbow_flex"]
    middle = (elbow["range_min"] + elbow["range_max"]) // 2
    ticks = round(width * 4095 / 360)
    elbow["range_min"], elbow["range_max"] = middle - ticks // 2, middle + ticks - ticks // 2
    arm.file.write_text(json.dumps(narrow))
    for register, key in ((MIN, "range_min"), (MAX, "range_max")):
        arm.put("elbow_flex", register, elbow[key])


def test_a_calibration_that_lost_a_few_degrees_is_one(arm, opened):
    calibrated_to(arm, 176)
    env = opened(dry_run=True)
    assert env.high[2] == pytest.approx(87, abs=0.2) and env.low[2] == pytest.approx(-87, abs=0.2)


def test_a_factory_fresh_servo_is_calibrated_from_the_file(arm, opened):
    arm.put("shoulder_lift", HOMING, unsigned(-1000, 11))
    says(arm, "another calibration", "lerobot-calibrate", "press ENTER")
    from lerobot.motors import Motor, MotorCalibration, MotorNormMode
    from lerobot.motors.feetech import FeetechMotorsBus

    # what lerobot-calibrate and ENTER do
    motors = {motor: Motor(i, "sts3215", MotorNormMode.DEGREES) for i, motor in enumerate(MOTORS, 1)}
    bus = FeetechMotorsBus(arm.port, motors)
    bus.connect()
    bus.write_calibration({motor: MotorCalibration(**values) for motor, values in CALIBRATION.items()})
    bus.disconnect()
    assert np.abs(opened().measured - arm.sim.position()).max() < 0.2


def test_a_calibration_that_is_another_arms(arm):
    shifted = json.loads(arm.file.read_text())
    for register, key in ((MIN, "range_min"), (MAX, "range_max")):
        shifted["shoulder_lift"][key] += 1300
        arm.put("shoulder_lift", register, shifted["shoulder_lift"][key])
    arm.file.write_text(json.dumps(shifted))
    says(arm, "shoulder_lift reads", "calibrate anew")


@pytest.mark.parametrize("action", [np.zeros(5), np.full(6, np.nan)])
def test_actions_that_are_none(opened, action):
    env = opened(dry_run=True)
    with pytest.raises(UserError, match="reset"):
        env.step(np.zeros(6))
    with pytest.raises(UserError, match="instruction"):
        env.reset()
    env.reset(options=ASK)
    with pytest.raises(UserError, match="6 numbers|finite"):
        env.step(action)


# -- faults --------------------------------------------------------------------------------------------------


def noise(arm, share, seed=0, most=10**9):
    """A fault in that share of the packets, never two in a row: each costs exactly one call of the driver."""
    rng = random.Random(seed)
    after_a_fault = False
    kinds = {
        SYNC_WRITE: ["lost", "corrupt"],
        SYNC_READ: ["lost", "silent", "corrupt", "corrupt", "absurd"],
    }

    def fault(instruction):
        nonlocal after_a_fault
        after_a_fault = not after_a_fault and len(arm.injected) < most and rng.random() < share
        if after_a_fault:
            return rng.choice(kinds.get(instruction, ["lost", "silent", "corrupt"]))
        return None

    return fault


@pytest.mark.parametrize("arm", [True, False], indirect=True, ids=["terminal", "direct"])
def test_connects_over_a_noisy_bus(arm, opened, request):
    arm.fault = noise(arm, 0.03)
    env = opened()
    env.reset(options=ASK)
    env.close()
    assert arm.torque() == []
    assert len(env.faults) >= len(arm.injected) > 3, env.faults
    # On a busy machine an answer through the pseudo terminal may come too late: a fault of nobody's making.
    if "direct" in request.node.name:
        assert len(env.faults) == len(arm.injected), env.faults


@pytest.mark.parametrize("arm", [False], indirect=True, ids=["direct"])
def test_a_thousand_bus_faults(arm, opened, capfd, monkeypatch):
    """No crash, no motion outside the limits, torque off at the end, every one reported."""
    monkeypatch.setattr(real_env, "STALE", 1000)
    arm.sleep = arm.advance  # no pictures: they are another test's matter
    rng = np.random.default_rng(0)
    steps = 0
    env = opened(limit=10**9)
    env.reset(options=ASK)
    arm.fault = noise(arm, 0.1, most=1000)
    while len(arm.injected) < 1000:
        walk = env.measured + rng.normal(0, 25, (50, 6)).cumsum(0)  # (50, 6)
        *_, info = env.step_chunk(np.clip(walk, LOW - 20, HIGH + 20))
        steps += info["executed"]
    env.close()
    within_limits(arm)
    said = capfd.readouterr().err
    with capfd.disabled():
        kinds = ", ".join(f"{arm.injected.count(kind)} {kind}" for kind in sorted(set(arm.injected)))
        print(
            f"\n{len(arm.injected)} bus faults ({kinds}) in {steps} control steps, {len(env.faults)} reported"
        )
    assert arm.torque() == []
    assert len(env.faults) == len(arm.injected) == said.count("arm: ") == 1000


def test_a_servo_that_stops_answering(arm, env):
    env.step(HOME + [15, 0, 0, 0, 0, 0])
    arm.dead = {"elbow_flex"}
    with pytest.raises(ArmError, match="stopped") as caught:
        env.step(HOME + [30, 10, 0, 0, 0, 0])
    assert "\n" not in str(caught.value) and isinstance(caught.value, UserError)
    arm.advance(1)
    assert np.abs(arm.sim.position() - env.measured).max() < 8  # where it was last measured
    env.close()
    assert arm.torque() == ["elbow_flex"]
    assert "elbow_flex may still hold: switch off the arm's power" in env.faults[-1]
    assert np.abs(arm.sim.position() - REST).max() > 10  # nothing is moved over a broken bus
    within_limits(arm)


def test_the_cable_is_pulled_in_mid_motion(arm, env):
    arm.fault = after(7, arm.unplug)
    with pytest.raises(ArmError, match="stopped.*check power and cables"):
        for k in range(9):
            env.step(HOME + [10 * k, 0, 0, 0, 0, 0])
    assert not os.path.exists(arm.port)
    arm.advance(2)
    env.close()
    within_limits(arm)
    assert "may still hold: switch off the arm's power" in env.faults[-1]


def test_the_cable_comes_back(arm, env):
    arm.unplug()
    sleep = arm.sleep

    def sleep_and_plug(seconds):
        if arm.pulled.is_set():
            arm.plug()
        sleep(seconds)

    arm.sleep = sleep_and_plug
    env.step(HOME + [10, 0, 0, 0, 0, 0])
    assert env.faults and not arm.pulled.is_set()
    env.close()
    assert arm.torque() == []


@pytest.mark.parametrize(
    "fault, said", [("silent", "delivers no new pictures"), ("frozen", "shows the same picture")]
)
def test_a_stale_camera(arm, env, fault, said):
    env.step(HOME)
    arm.camera_fault = {"front": fault}
    with pytest.raises(ArmError, match=f"stopped: camera front {said}"):
        for k in range(12):
            env.step(HOME + [3 * k, 0, 0, 0, 0, 0])
    assert k < 9
    env.close()
    assert folded(arm)  # the bus is well


def test_something_in_the_way(arm, env):
    arm.sim.model.actuator_gainprm[1] = 0
    arm.sim.model.actuator_biasprm[1] = 0
    env.close()
    assert arm.torque() == []
    assert any("shoulder_lift does not follow" in fault for fault in env.faults)


def test_a_slow_policy_takes_from_its_own_time(arm, env):
    began = arm.now
    for computing in (0.03, 0, 0, 0.3, 0):
        due = env.tick + 1 / FPS
        arm.advance(computing)
        env.step(HOME)
        late = 0.25 if computing == 0.3 else 0  # the target holds for half a period
        assert env.tick - due == pytest.approx(late, abs=0.005)
    assert arm.now - began == pytest.approx(5 / FPS + 0.25, abs=0.02)


# -- exits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_in_mid_packet(arm, env, number):
    arm.fault = after(4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        for _ in range(9):
            env.step(HOME + [10, 0, 0, 0, 0, 0])
    env.close()
    assert folded(arm)


def test_an_impatient_second_ctrl_c_lets_go_at_once(arm, env):
    arm.fault = after(30, lambda: os.kill(os.getpid(), signal.SIGINT))
    env.close()
    assert arm.torque() == []
    assert np.abs(arm.sim.position() - REST).max() > 10
    assert any("not folded up: KeyboardInterrupt" in fault for fault in env.faults)


def test_nothing_interrupts_the_release(arm, env):
    arm.fault = after(6, lambda: os.kill(os.getpid(), signal.SIGINT))
    env.broken = True  # it does not fold up, and begins with the release
    env.close()
    assert arm.torque() == [] and not env.faults


def child(folder, words, **options):
    """A Python process that calls a function of feetech_emulator: words are its name and its arguments."""
    code = "import sys, feetech_emulator as f; getattr(f, sys.argv[1])(*sys.argv[2:])"
    tests = Path(__file__).parent
    variables = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "TMPDIR": str(folder)}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=variables, text=True, **options)


def test_a_program_that_dies_without_closing(tmp_path):
    """Not even a try: the interpreter's exit folds up and switches off."""
    words = ["die_without_closing", str(tmp_path / "calibration")]
    program = child(tmp_path, words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, errors = program.communicate(timeout=300)
    assert "ZeroDivisionError" in errors and "torque [] rest True" in said, errors


# -- a person at the keyboard ------------------------------------------------------------------------------


class Person:
    """Somebody at the keyboard: a pipe in the place of standard input."""

    def __init__(self, monkeypatch):
        read, self.write = os.pipe()
        monkeypatch.setattr(sys, "stdin", os.fdopen(read))

    def press(self, keys):
        os.write(self.write, keys.encode())

    def leave(self):
        os.close(self.write)


def options(arm, **changes):
    """The options of a program that connect() looks at."""
    values = {"port": arm.port, "id": "", "front": "0", "wrist": "2", "task": TASK}
    return SimpleNamespace(**values | changes)


def stand_still(obs):
    """A policy as run_episodes() takes it."""
    return obs["state"][:, None], [""] * len(obs["state"])


@pytest.fixture
def small(arm, monkeypatch):
    """The classes that connect() makes take the emulator's pictures; episodes last 8 control steps."""
    for kind in (RealEnv, JudgedEnv):
        monkeypatch.setattr(real_env, kind.__name__, functools.partial(kind, size=SIZE, limit=8))


def test_a_person_begins_and_judges(arm, small, make_policy, monkeypatch, capsys):
    """Success in the fourth step, failure in the second; nobody judges the third; then the person leaves."""
    person = Person(monkeypatch)
    person.press("\nxxxy\nxn\nxxxxxxxx")
    person.leave()
    episodes = [Episode(seed, {"family": "real", "task": TASK}) for seed in range(4)]
    rests = []
    with real_env.connect(options(arm), make_policy(), judged=True) as vec:
        assert np.abs(arm.sim.position() - REST).max() < 4  # folded while the scene is laid out
        with pytest.raises(ArmError, match="nobody is at the keyboard"):
            run_episodes(vec, episodes, stand_still, on_end=lambda _: rests.append(arm.sim.position() - REST))
    assert [(e.success, e.steps) for e in episodes[:3]] == [(True, 4), (False, 2), (False, 8)]
    assert np.abs(rests).max() < 4  # and after every episode
    assert f"lay out the scene for: {TASK}" in capsys.readouterr().out
    assert folded(arm)
    within_limits(arm)


def test_nobody_judges_a_film(arm, small, make_policy):
    episode = Episode(0, {"family": "real", "task": TASK})
    with real_env.connect(options(arm), make_policy(), judged=False) as vec:
        run_episodes(vec, [episode], stand_still)
        assert vec.images.any()
    assert (episode.success, episode.steps) == (False, 8) and folded(arm)


def test_connect_complains_before_anything_moves(arm, small, make_policy):
    policy = make_policy()
    for changes, word in ({"task": " "}, "instruction"), ({"wrist": ""}, "--wrist="):
        with pytest.raises(UserError, match=word):
            real_env.connect(options(arm, **changes), policy, judged=False)
    policy.cfg.cameras = "front,top"
    with pytest.raises(UserError, match="top"):
        real_env.connect(options(arm), policy, judged=False)
    assert not arm.goals and arm.torque() == []
    policy.cfg.cameras = "front"
    real_env.connect(options(arm, task="", interactive=True, wrist=""), policy, False, dry_run=True).close()
    assert not arm.goals


def test_connect_refuses_a_policy_of_other_pictures_or_another_rate(arm, small, make_policy):
    for changes, word in ({"fps": 30}, "--fps=10"), ({"fit": "stretch"}, "--fit=crop"):
        policy = make_policy()
        for name, value in changes.items():
            setattr(policy.cfg, name, value)
        with pytest.raises(UserError, match=word):
            real_env.connect(options(arm), policy, judged=False)
    assert not arm.goals and arm.torque() == []


def test_episodes_begin_where_the_recorded_ones_did(arm, small, make_policy):
    policy = make_policy()
    folded_up = REST + [20, 0, 0, 0, 90, 0]
    for home, there in (("", HOME), (",".join(map(str, folded_up)), folded_up)):
        policy.cfg.home = home
        with real_env.connect(options(arm), policy, judged=False) as vec:
            vec.reset([0], [0], [ASK])
            assert np.abs(vec.observe([0])["state"][0] - there).max() < 4


def test_a_terminal_is_restored(arm, small, make_policy, monkeypatch):
    import pty
    import termios

    master, slave = pty.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(slave))
    before = termios.tcgetattr(slave)
    os.write(master, b"\n")  # pressed too early, and ignored
    with real_env.connect(options(arm), make_policy(), judged=True) as vec:
        assert termios.tcgetattr(slave) != before  # keys arrive without Enter
        os.write(master, b"\nn")
        episode = Episode(0, {"family": "real", "task": TASK})
        run_episodes(vec, [episode], stand_still)
    assert episode.steps == 1 and termios.tcgetattr(slave) == before


# -- sample.py -----------------------------------------------------------------------------------------------


@pytest.fixture
def sample():
    import sample

    return sample


@pytest.fixture
def run(trained, tmp_path):
    """A run folder of the test's own."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def command(arm, small, run):
    """The words of a command of sample.py on the emulated arm."""
    return [f"--run={run}", "--env=real", f"--port={arm.port}", "--front=0", "--wrist=2"]


def test_film(arm, command, run, capsys, sample):
    sample.main([*command, TASK])
    assert "after 8 steps" in capsys.readouterr().out
    assert list(run.rglob("*.gif")) and folded(arm)


def test_eval_asks_a_person(arm, command, run, capsys, monkeypatch, sample):
    person = Person(monkeypatch)
    person.press("\nxy\n n")
    sample.main([*command, "--eval=2", TASK])
    cell = json.loads((run / "eval_real.json").read_text())["real"]["id"]
    assert (cell["success"], cell["n"], cell["steps"]) == (0.5, 2, 2)
    assert "50.0" in capsys.readouterr().out and folded(arm)


def test_conversation(arm, command, run, capsys, monkeypatch, sample):
    """It moves when told to, another instruction gets all its time, `new` and the end fold it up."""
    poses = []
    rest = RealEnv.rest

    def rest_and_note(self):
        rest(self)
        poses.append(arm.sim.position())

    monkeypatch.setattr(RealEnv, "rest", rest_and_note)
    person = Person(monkeypatch)
    other = "put the green cube on the red pad"
    person.press("sing " * 3000 + f"\n{TASK}\n{other}\nnew\n{TASK}\n")
    person.leave()
    sample.main([*command, "--interactive"])
    said = capsys.readouterr().out
    assert "tokens long" in said and "no success after 8 steps" in said
    assert f"instruction: {TASK}" in said and f"instruction: {other}" in said
    assert len(poses) == 1 and np.abs(poses[0] - REST).max() < 4
    assert folded(arm) and list(run.rglob("conversation.gif"))


def test_bad_input(arm, command, fails, sample):
    assert "instruction" in fails(sample.main, command)
    assert "lerobot-find-port" in fails(sample.main, [*changed(command, "--port=/dev/nothing"), TASK])
    assert "camera wrist (9) cannot be read" in fails(sample.main, [*changed(command, "--wrist=9"), TASK])
    assert "--wrist" in fails(sample.main, [*changed(command, "--wrist="), TASK])
    assert "neither sim, real" in fails(sample.main, [command[0], "--env=reel", TASK])


def changed(command, option):
    """A command with one option replaced."""
    name = option.partition("=")[0]
    return [option if word.startswith(f"{name}=") else word for word in command]


# -- rl.py ---------------------------------------------------------------------------------------------------

PRACTICE = ["--config", "debug", "--env=real", "--front=0", "--wrist=2", f"--task={TASK}", "--episodes=2"]
PRACTICE += ["--eval=0", "--eval_episodes=0", "--device=cpu", "--threads=1"]


def kept_episodes(out):
    """{file: bytes} of the episodes on disk; all are whole."""
    for path in (out / "episodes").glob("*.pt"):
        episode = torch.load(path, weights_only=True)
        assert len(episode["extras"]) == len(episode["rewards"]) == len(episode["executed"])
        assert sum(episode["executed"]) == episode["steps"]
    return {path.name: path.read_bytes() for path in (out / "episodes").glob("*.pt")}


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_practice_with_a_person_who_judges(arm, small, trained, tmp_path, monkeypatch, capsys):
    """Two iterations of two episodes; the person leaves in the second; --resume plays what is missing."""
    import rl

    out = tmp_path / "practised"
    flags = [*PRACTICE, f"--init_from={trained}", f"--out={out}", f"--port={arm.port}"]
    person = Person(monkeypatch)
    person.press("\nxxxy\nxn\nxxxxxxxx")  # success in the fourth step, failure in the second, nobody judges
    person.leave()
    with pytest.raises(SystemExit):
        rl.main(flags)
    said = capsys.readouterr()
    assert "nobody is at the keyboard" in said.err and "--resume" in said.err
    before = kept_episodes(out)
    first, second, third = (torch.load(out / "episodes" / name, weights_only=True) for name in sorted(before))
    assert [e["success"] for e in (first, second, third)] == [True, False, False]
    assert [e["steps"] for e in (first, second, third)] == [4, 2, 8]
    assert third["final"] is not None and first["final"] is None
    assert arm.torque() == []
    Person(monkeypatch).press("\ny")
    rl.main([*flags, "--resume"])
    now = kept_episodes(out)
    assert len(now) == 4 and before.items() <= now.items()
    assert [line["success real"] for line in read_log(out)] == [0.5, 0.5]
    assert arm.torque() == []
    assert json.loads((out / "config.json").read_text())["env"] == "sim"
    within_limits(arm)


class Practice:
    """rl.py on an emulated arm of its own, in a process with a pipe for a keyboard, until it is killed."""

    def __init__(self, folder, *argv):
        folder.mkdir()
        words = ["practise", str(folder / "calibration"), *PRACTICE, *argv]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.program = child(folder, words, start_new_session=True, **pipes)

    def wait_until_asked(self):
        """Wait until it asks for the next episode: the one before is on disk."""
        said = [""]
        while "press Enter" not in said[-1]:
            said.append(self.program.stdout.readline())
            assert said[-1], "".join(said)

    def press(self, keys):
        self.program.stdin.write(keys)
        self.program.stdin.flush()

    def kill(self):
        os.killpg(self.program.pid, signal.SIGKILL)
        assert self.program.wait() == -signal.SIGKILL


def test_practice_goes_on_after_kill_9(trained, tmp_path):
    """SIGKILL in mid episode, between episodes and in an update: --resume plays what is missing."""
    from model import load_policy

    out = tmp_path / "practised"
    rng = random.Random(0)
    kept = {}

    def begin(name, *more):
        return Practice(tmp_path / name, f"--init_from={trained}", f"--out={out}", *more)

    def check(n):
        """n episodes are on disk, those of before unchanged; policy and state can be read."""
        now = kept_episodes(out)
        assert len(now) == n and kept.items() <= now.items()
        kept.update(now)
        load_policy(out)
        assert torch.load(out / "train_state.pt", weights_only=True)["iteration"] in (0, 1)

    practice = begin("first")
    practice.wait_until_asked()
    practice.press("\nxxy")
    practice.wait_until_asked()
    practice.press("\nxx")  # it goes on until somebody judges
    time.sleep(0.5 + rng.random())
    practice.kill()
    check(1)

    practice = begin("second", "--resume")
    practice.wait_until_asked()
    practice.press("\nn")
    while len(list((out / "episodes").glob("*.pt"))) < 2:  # then an iteration is complete, and it learns
        time.sleep(0.01)
        assert practice.program.poll() is None
    time.sleep(0.1 * rng.random())
    practice.kill()
    check(2)

    practice = begin("third", "--resume")
    practice.wait_until_asked()  # for the third: nothing is played again
    practice.kill()
    check(2)

    practice = begin("fourth", "--resume")
    said, _ = practice.program.communicate("\nxy\nxxn", timeout=300)
    assert practice.program.returncode == 0, said
    assert said.count("press Enter") == 2 and "torque []" in said, said
    now = kept_episodes(out)
    assert len(now) == 4 and kept.items() <= now.items()
    assert [(line["iteration"], line["success real"]) for line in read_log(out)] == [(1, 0.5), (2, 0.5)]


# -- from a recording to the arm -----------------------------------------------------------------------------


def test_a_recording_through_lerobots_arm_and_back(trained, tmp_path, fails):
    """benchmarks/recording_to_arm.py: an episode is recorded, converted, and a policy is run in one scene."""
    import prepare
    from model import load_policy

    program = Path(__file__).parent.parent / "benchmarks" / "recording_to_arm.py"

    def command(*words):
        done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    level = tmp_path / "level"
    status, said = command("record", f"--out={level}", "--episodes=1")
    assert status == 0 and "1 episodes" in said, said
    status, said = command("record", f"--out={level}")
    assert status == 2 and "already exists" in said
    info = json.loads((level / "meta" / "info.json").read_text())
    assert (info["fps"], info["features"]["observation.images.wrist"]["shape"]) == (30, [480, 640, 3])

    policy = load_policy(trained)
    convert = [f"--lerobot={level}", "--fps=10", "--fit=crop", f"--out={tmp_path / 'data'}", "--workers=1"]
    convert.append(f"--reasoning_from={trained}")
    assert "image_size" in fails(prepare.main, [*convert, f"--image_size={policy.cfg.image_size + 8}"])
    prepare.main([*convert, f"--image_size={policy.cfg.image_size}"])
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    assert (meta["fps"], meta["fit"]) == (10, "crop")
    (episode,) = meta["episodes"]
    cameras = [np.load(tmp_path / "data" / f"{name}.npy")[:1] for name in policy.cfg.camera_names]
    pictures = torch.from_numpy(np.stack(cameras, axis=1))  # (1, V, px, px, 3)
    assert episode["reason"][0] == [0, policy.reason(pictures, [episode["task"]])[0][0]]

    state, action = (np.load(tmp_path / "data" / f"{name}.npy") for name in ("state", "action"))
    assert np.abs(state[0] - REST - [0, 0, 0, 0, 90, 0]).max() < 12  # folded up, with level jaws
    assert np.abs(state[:, 4]).max() < 70  # about 0, where the simulation's wrist is about -90
    lead = np.abs(action - state).max(axis=0)  # of a target before the position
    assert (lead[:5] > 5).all() and (lead < 30).all()
    assert len(state) == -(-info["total_frames"] // 3)

    run = shutil.copytree(trained, tmp_path / "run")
    status, said = command("evaluate", f"--run={run}", "--episodes=1")
    assert status == 0, said
    assert json.loads((run / "eval_emulated.json").read_text())["n"] == 1
    status, again = command("evaluate", f"--run={run}", "--episodes=1")  # it is known: nothing is played
    assert status == 0 and "after" not in again
