"""Tests of real_env.py on an emulated arm, through LeRobot's own driver: pip install 'lerobot[feetech]' to run them."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")
pytest.importorskip("scservo_sdk")
pytest.importorskip("cv2")

import real_env
from feetech_emulator import (
    CALIBRATION,
    HOMING,
    MIN,
    SPEED,
    SYNC_READ,
    SYNC_WRITE,
    TICK,
    WRITE,
    Emulator,
    install,
    unsigned,
)
from real_env import FLOOR, HOME, MAX_STEP, REST, ArmError, RealEnv

import prepare
import rl
import sample
import sim_env
from sim_env import FPS, HIGH, LOW, MOTORS

TASK = {"task": "put the red cube on the blue pad"}


@pytest.fixture
def arm(tmp_path, monkeypatch, request):
    """An emulated arm in a scene, with its calibration file, before anything is connected; indirect parameter False: no pseudo terminal."""
    sim = sim_env.SO100Env(px=48)
    sim.reset(seed=2_000_000)
    emulator = Emulator(sim)
    emulator.file = install(emulator, tmp_path / "calibration", monkeypatch, getattr(request, "param", True))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs are started without
    yield emulator
    for number, handler in handlers.items():
        signal.signal(number, handler)
    emulator.close()


def connect(arm, **more):
    return RealEnv(arm.port, more.pop("cameras", {"front": 0}), px=48, clock=arm, size=(64, 48), **more)


def targets(arm):
    """Every group of six targets that reached the servos, (n, 6), and the positions measured before."""
    assert [motor for motor, *_ in arm.goals] == list(MOTORS) * (len(arm.goals) // 6)
    return np.array([goal for *_, goal in arm.goals]).reshape(-1, 6), np.array(
        [now for _, now, _ in arm.goals]
    ).reshape(-1, 6)


def within_limits(arm):
    """Nothing that was sent, and nowhere the arm has been, is outside the limits."""
    for motor, now, goal in arm.goals:
        j = MOTORS.index(motor)
        assert LOW[j] - 0.1 <= goal <= HIGH[j] + 0.1 and abs(goal - now) <= MAX_STEP[j] + 0.3, (
            motor,
            now,
            goal,
        )
    trace = np.array(arm.trace)
    assert (trace > LOW - 3).all() and (trace < HIGH + 3).all()  # MuJoCo's own stops are soft


def test_observation_and_motion_are_those_of_the_simulation(arm):
    with connect(arm, cameras={"front": 0, "wrist": 2}) as env:
        assert arm.torque() == list(MOTORS)
        env.home = arm.sim.position()
        obs, info = env.reset(options=TASK)
        twin = sim_env.SO100Env(px=48)
        twin.reset(seed=2_000_000)
        twin.data.qpos[:], twin.data.qvel[:], twin.data.ctrl[:] = (
            arm.sim.data.qpos,
            arm.sim.data.qvel,
            arm.sim.data.ctrl,
        )
        start = obs["state"].astype(float)
        for k in range(25):
            action = start + [15 * np.sin(k / 3), 8 * np.sin(k / 4), -6 * np.sin(k / 2), 0, k, k]
            expected, *_ = twin.step(action)
            obs, reward, terminated, truncated, info = env.step(action)
            assert np.abs(obs["state"] - expected["state"]).max() < 1.5, (
                k
            )  # encoder ticks, and the servo's own speed limit
            truth = arm.sim._obs()
            assert np.abs(obs["state"] - truth["state"]).max() < 0.1 and obs["state"].dtype == np.float32
            for camera in sim_env.CAMERAS:  # RGB, centred, not late by a frame
                assert np.array_equal(obs["images"][camera], truth["images"][camera])
        assert (
            obs["task"] == TASK["task"]
            and (reward, terminated, truncated) == (0, False, False)
            and info["steps"] == 25
            and not env.faults
        )
        assert env.render(32, "wrist").shape == (32, 32, 3)
        assert set(twin._info()) - {"split", "family", "seed", "moved_at"} <= set(info)
    twin.close()


def test_a_live_picture_is_the_recorded_one(arm):
    cfg = prepare.PrepareConfig(fit="crop", image_size=31)
    with connect(arm, cameras={"front": 0, "wrist": 2}) as env:
        obs, _ = env.reset(options=TASK)
        for camera, frame in env.frames.items():
            assert frame.shape == (48, 64, 3) and np.array_equal(
                obs["images"][camera], frame[:, 8:56]
            )  # has the size already: bit for bit
            assert np.array_equal(
                env.render(31, camera), prepare.read_picture({"bytes": prepare.png(frame)}, None, cfg)
            )


def test_wild_actions_stay_within_limits(arm, monkeypatch):
    rng = np.random.default_rng(0)
    with connect(arm, limit=1000) as env:
        env.reset(options=TASK)
        reasons, first = set(), len(arm.goals)
        for k in range(80):
            *_, info = env.step(
                rng.uniform(LOW - 60, HIGH + 60)
                if k % 2
                else np.where(rng.random(6) < 0.5, LOW - 90, HIGH + 90)
            )
            reasons |= set(info["clipped"])
        assert reasons == {"joint", "step", "workspace"}
        arm.goals = arm.goals[first:]
        within_limits(arm)
        goals, now = targets(arm)
        assert (np.abs(goals - now) <= MAX_STEP + 0.3).all() and len(goals) == 80
        for name, slack in (
            ("FLOOR", -0.002),
            ("REACH", 0.002),
            ("BASE", [0.002, -0.002]),
        ):  # targets are whole encoder ticks
            monkeypatch.setattr(real_env, name, getattr(real_env, name) + np.array(slack))
        assert all(env.inside(goal) or np.abs(goal - before).max() < 0.3 for goal, before in zip(goals, now))


def test_forward_kinematics_of_the_workspace(arm):
    with connect(arm, dry_run=True) as env:
        assert env.inside(HOME) and env.inside(REST)
        for z, good in ((0, True), (-0.009, True), (-0.02, False), (-0.05, False)):  # the tip below the table
            assert (
                env.inside(
                    sim_env.inverse(20, 0.2, max(z, -0.03)) + ([0, 12, 0, 0, 0, 0] if z < -0.03 else 0)
                )
                == good
            ), z
        assert not env.inside([0, 90, -90, 0, 0, 10])  # stretched out
        env.measured = sim_env.inverse(20, 0.2, 0.02)
        near, why = env.limited(sim_env.inverse(20, 0.2, -0.03))
        assert why == ["workspace"] and env.inside(near)
        env.data.qpos[:6] = sim_env.to_qpos(near)
        sim_env.mujoco.mj_kinematics(env.model, env.data)
        assert (
            FLOOR <= min(env.data.site("gripper").xpos[2], env.data.site("jaw_tip").xpos[2]) < 0.01
        )  # as low as it may, not back


def test_rests_at_both_ends_and_is_limp_afterwards(arm):
    env = connect(arm)
    obs, _ = env.reset(options=TASK)
    assert np.abs(obs["state"] - HOME).max() < 4
    speed = np.abs(np.diff(np.array(arm.trace), axis=0)).max() / TICK
    env.step(HOME + [15, -10, 5, 0, 0, 0])
    env.close()
    env.close()
    assert (
        arm.torque() == [] and np.abs(arm.sim.position() - REST).max() < 4 and speed < 2 * real_env.CALM_SPEED
    )
    assert all(arm.get(motor, SPEED) == 0 for motor in MOTORS)
    arm.advance(2)
    assert np.abs(arm.sim.position() - REST).max() < 4  # does not fall
    with pytest.raises(ValueError, match="new RealEnv"):
        env.reset(options=TASK)


def test_torque_comes_on_where_the_arm_is(arm):
    for motor in MOTORS:
        arm.put(motor, 42, arm.ticks(motor, 40))  # yesterday's target
    before = arm.sim.position()
    env = connect(arm)
    arm.advance(1)
    assert np.abs(arm.sim.position() - before).max() < 3  # gravity
    env.close()


def test_dry_run_writes_nothing(arm, capsys):
    memory = {motor: bytes(arm.memory[motor][:56]) for motor in MOTORS}
    with connect(arm, dry_run=True) as env:
        env.reset(options=TASK)
        env.step(HOME + 90)
    assert (
        WRITE not in arm.counts
        and SYNC_WRITE not in arm.counts
        and memory == {motor: bytes(arm.memory[motor][:56]) for motor in MOTORS}
    )
    said = capsys.readouterr().out
    assert (
        "would move to shoulder_pan" in said
        and "would send shoulder_pan" in said
        and "clipped: joint, step" in said
    )


# -- errors of a person, in one line ----------------------------------------------------------------------------


def says(arm, *words, cameras=None, port=None, **more):
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError)) as caught:
        RealEnv(
            arm.port if port is None else port,
            {"front": 0} if cameras is None else cameras,
            clock=arm,
            **{"size": (64, 48), **more},
        ).close()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    assert arm.torque() == []


def test_port_and_servos(arm, monkeypatch):
    says(arm, "/dev/nothing", "lerobot-find-port", port="/dev/nothing")
    says(arm, "lerobot-find-port", port="")
    arm.dead = {"wrist_flex"}
    says(arm, "wrist_flex", "id 4", "powered", "lerobot-setup-motors")
    monkeypatch.setitem(sys.modules, "lerobot.motors", None)
    says(arm, "pip install 'lerobot[feetech]'")


def test_cameras(arm):
    says(
        arm, "camera wrist (7)", "lerobot-find-cameras opencv", "--wrist=", cameras={"front": 0, "wrist": "7"}
    )
    says(arm, "--front=", cameras={})
    says(arm, "camera front (0)", "capture_width=640", size=(640, 480))


def test_calibrations(arm):
    other = arm.file.with_name("other.json")
    other.write_text(arm.file.read_text())
    says(arm, "--id=", "emulated, other")
    connect(arm, name="emulated", dry_run=True).close()
    says(arm, "no calibration of missing", "lerobot-calibrate --robot.type=so100_follower", name="missing")
    other.unlink()
    narrow = json.loads(arm.file.read_text())
    narrow["elbow_flex"]["range_max"] = narrow["elbow_flex"]["range_min"] + 800
    arm.file.write_text(json.dumps(narrow))
    says(arm, "elbow_flex turns by 70 degrees", "190", "lerobot-calibrate", "--robot.id=emulated")
    arm.file.write_text("{}")
    says(arm, "no calibration of an SO-100", "lerobot-calibrate")
    arm.file.unlink()
    says(arm, "no calibration", "lerobot-calibrate")


def test_a_factory_fresh_servo_is_calibrated_from_the_file(arm):
    arm.put("shoulder_lift", HOMING, unsigned(-1000, 11))
    says(arm, "another calibration", "lerobot-calibrate", "press ENTER")
    from lerobot.motors import Motor, MotorCalibration, MotorNormMode
    from lerobot.motors.feetech import FeetechMotorsBus

    bus = FeetechMotorsBus(
        arm.port, {motor: Motor(i, "sts3215", MotorNormMode.DEGREES) for i, motor in enumerate(MOTORS, 1)}
    )
    bus.connect()
    bus.write_calibration(
        {motor: MotorCalibration(**values) for motor, values in CALIBRATION.items()}
    )  # what lerobot-calibrate and ENTER do
    bus.disconnect()
    with connect(arm) as env:
        assert np.abs(env.measured - arm.sim.position()).max() < 0.2


def test_a_calibration_that_is_another_arms(arm):
    shifted = json.loads(arm.file.read_text())
    for key in ("range_min", "range_max"):
        shifted["shoulder_lift"][key] += 1300
        arm.put("shoulder_lift", MIN if key == "range_min" else MIN + 2, shifted["shoulder_lift"][key])
    arm.file.write_text(json.dumps(shifted))
    says(arm, "shoulder_lift reads", "calibrate anew")


@pytest.mark.parametrize("action", [np.zeros(5), np.full(6, np.nan)])
def test_actions_that_are_none(arm, action):
    with connect(arm, dry_run=True) as env:
        with pytest.raises(ValueError, match="reset"):
            env.step(np.zeros(6))
        with pytest.raises(ValueError, match="instruction"):
            env.reset()
        env.reset(options=TASK)
        with pytest.raises(ValueError, match="6 numbers|finite"):
            env.step(action)


# -- faults -----------------------------------------------------------------------------------------------------


def noise(arm, share, seed=0, most=10**9):
    """A fault in that share of the packets, never two in a row: each then costs exactly one call of the driver."""
    rng, state = random.Random(seed), {"clean": True}

    def fault(instruction):
        state["clean"] = not (state["clean"] and len(arm.injected) < most and rng.random() < share)
        if state["clean"]:
            return None
        kinds = {
            SYNC_WRITE: ["lost", "corrupt"],
            SYNC_READ: ["lost", "silent", "corrupt", "corrupt", "absurd"],
        }
        return rng.choice(kinds.get(instruction, ["lost", "silent", "corrupt"]))

    return fault


@pytest.mark.parametrize("arm", [True, False], indirect=True, ids=["terminal", "direct"])
def test_connects_over_a_noisy_bus(arm):
    arm.fault = noise(arm, 0.03)
    with connect(arm) as env:
        env.reset(options=TASK)
    assert arm.torque() == [] and len(env.faults) == len(arm.injected) > 3, env.faults


@pytest.mark.parametrize("arm", [False], indirect=True, ids=["direct"])
def test_a_thousand_bus_faults(arm, capfd, monkeypatch):
    """No crash, no motion outside the limits, torque off at the end, every one reported."""
    monkeypatch.setattr(real_env, "STALE", 1000)
    arm.sleep = arm.advance  # no pictures: they are another test's matter
    rng, steps = np.random.default_rng(0), 0
    with connect(arm, limit=10**9) as env:
        env.reset(options=TASK)
        arm.fault = noise(arm, 0.1, most=1000)
        while len(arm.injected) < 1000:
            chunk = np.clip(env.measured + rng.normal(0, 25, (50, 6)).cumsum(0), LOW - 20, HIGH + 20)
            *_, info = env.step_chunk(chunk)
            steps += info["executed"]
    within_limits(arm)
    said = capfd.readouterr().err
    with capfd.disabled():
        kinds = ", ".join(f"{arm.injected.count(kind)} {kind}" for kind in sorted(set(arm.injected)))
        print(
            f"\n{len(arm.injected)} bus faults ({kinds}) in {steps} control steps: {len(env.faults)} reported, torque on at the end: {arm.torque() or 'none'}"
        )
    assert arm.torque() == [] and len(env.faults) == len(arm.injected) == said.count("arm: ") == 1000


def test_a_servo_that_stops_answering(arm):
    with connect(arm) as env:
        env.reset(options=TASK)
        env.step(HOME + [15, 0, 0, 0, 0, 0])
        arm.dead = {"elbow_flex"}
        with pytest.raises(ArmError, match="stopped") as caught:
            env.step(HOME + [30, 10, 0, 0, 0, 0])
        assert "\n" not in str(caught.value)
        where = arm.sim.position()
        arm.advance(1)
        assert np.abs(arm.sim.position() - where).max() < 8  # in place
    assert (
        arm.torque() == ["elbow_flex"]
        and "elbow_flex may still hold: switch off the arm's power" in env.faults[-1]
    )
    within_limits(arm)


def test_the_cable_is_pulled_in_mid_motion(arm):
    with connect(arm) as env:
        env.reset(options=TASK)
        calls = iter(range(10**6))
        arm.fault = lambda _: arm.unplug() if next(calls) == 7 else None
        with pytest.raises(ArmError, match="stopped.*check power and cables"):
            for k in range(9):
                env.step(HOME + [10 * k, 0, 0, 0, 0, 0])
        assert not os.path.exists(arm.port)
        arm.advance(2)
    within_limits(arm)
    assert "may still hold: switch off the arm's power" in env.faults[-1]


def test_the_cable_comes_back(arm):
    with connect(arm) as env:
        env.reset(options=TASK)
        arm.unplug()
        sleep, arm.sleep = arm.sleep, lambda seconds: (arm.pulled.is_set() and arm.plug(), sleep(seconds))
        env.step(HOME + [10, 0, 0, 0, 0, 0])
        assert env.faults and not arm.pulled.is_set()
    assert arm.torque() == []


@pytest.mark.parametrize(
    "fault, said", [("silent", "delivers no new pictures"), ("frozen", "shows the same picture")]
)
def test_a_stale_camera(arm, fault, said):
    with connect(arm) as env:
        env.reset(options=TASK)
        env.step(HOME)
        arm.camera_fault = {"front": fault}
        with pytest.raises(RuntimeError, match=f"camera front {said}.*stopped"):
            for k in range(12):
                env.step(HOME + [3 * k, 0, 0, 0, 0, 0])
        assert k < 9
    assert arm.torque() == [] and np.abs(arm.sim.position() - REST).max() < 4  # the bus is well: it folds up


def test_something_in_the_way(arm):
    with connect(arm) as env:
        env.reset(options=TASK)
        arm.sim.model.actuator_gainprm[1] = arm.sim.model.actuator_biasprm[1] = 0
    assert arm.torque() == [] and any("shoulder_lift does not follow" in fault for fault in env.faults)


def test_a_slow_policy_takes_from_its_own_time(arm):
    with connect(arm) as env:
        env.reset(options=TASK)
        began = arm.now
        for thinking in (0.03, 0, 0, 0.3, 0):
            arm.advance(thinking)
            *_, info = env.step(HOME)
            assert info["late"] == pytest.approx(0.25 if thinking == 0.3 else 0, abs=0.005)
        assert arm.now - began == pytest.approx(5 / FPS + 0.25, abs=0.02)


# -- exits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signals_in_mid_packet(arm, number, kind):
    env, calls = connect(arm), iter(range(10**6))
    env.reset(options=TASK)
    arm.fault = lambda _: os.kill(os.getpid(), number) if next(calls) == 4 else None
    with pytest.raises(kind), env:
        for _ in range(9):
            env.step(HOME + [10, 0, 0, 0, 0, 0])
    assert arm.torque() == [] and np.abs(arm.sim.position() - REST).max() < 4


def test_an_impatient_second_ctrl_c_lets_go_at_once(arm):
    env = connect(arm)
    env.reset(options=TASK)
    calls = iter(range(10**6))
    arm.fault = lambda _: os.kill(os.getpid(), signal.SIGINT) if next(calls) == 30 else None
    env.close()
    assert (
        arm.torque() == []
        and np.abs(arm.sim.position() - REST).max() > 10
        and any("not folded up" in fault for fault in env.faults)
    )


def test_a_program_that_dies_without_closing(tmp_path, root):
    """Not even a try: the interpreter's exit folds up and switches off."""
    script = """
import atexit, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import feetech_emulator, real_env, sim_env
sim = sim_env.SO100Env(px=48)
sim.reset(seed=2_000_000)
arm = feetech_emulator.Emulator(sim)
feetech_emulator.install(arm, sys.argv[2])
atexit.register(lambda: print("torque", arm.torque(), "rest", abs(sim.position() - real_env.REST).max() < 4))
env = real_env.RealEnv(arm.port, {"front": 0}, px=48, clock=arm, size=(64, 48))
env.reset(options={"task": "put the red cube on the blue pad"})
env.step(real_env.HOME)
raise ZeroDivisionError
"""
    done = subprocess.run(
        [sys.executable, "-c", script, root, tmp_path / "calibration"], capture_output=True, text=True
    )
    assert "ZeroDivisionError" in done.stderr and "torque [] rest True" in done.stdout, done.stderr


# -- sample.py --------------------------------------------------------------------------------------------------


@pytest.fixture
def command(arm, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(real_env, "RealEnv", functools.partial(RealEnv, clock=arm, limit=6, size=(64, 48)))
    return [
        "--config",
        "debug",
        f"--run={trained}",
        f"--out={tmp_path}",
        "--threads=1",
        "--env=real",
        f"--port={arm.port}",
        "--front=0",
        "--wrist=2",
    ]


def test_film(arm, command, tmp_path, capsys):
    sample.main([*command, TASK["task"]])
    assert "after 6 steps" in capsys.readouterr().out and list(tmp_path.glob("*.gif")) and arm.torque() == []


def test_eval_asks_a_person(arm, command, trained, capsys, monkeypatch):
    answers = iter(["", "y", "", "what", "n", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    sample.main([*command, "--eval=2", TASK["task"]])
    cell = json.loads((trained / "eval_real.json").read_text())["real"]["id"]
    assert (
        (cell["success"], cell["n"]) == (0.5, 2) and "50.0" in capsys.readouterr().out and arm.torque() == []
    )


def test_conversation(arm, command, tmp_path, capsys, monkeypatch):
    """It moves when it is told to, another instruction gets all its time, `new` folds it up, and so does the end."""
    poses, rest = [], RealEnv.rest
    monkeypatch.setattr(RealEnv, "rest", lambda self: (rest(self), poses.append(arm.sim.position())))
    person = Person(monkeypatch)
    person.press(
        "sing " * 3000 + f"\n{TASK['task']}\nput the green cube on the red pad\nnew\n{TASK['task']}\n"
    )
    person.leave()
    sample.main([*command, "--interactive"])
    said = capsys.readouterr().out
    assert (
        "tokens long" in said
        and f"step   0  {TASK['task']}" in said
        and "no, put the green cube" in said
        and "out of time" in said
    )
    assert (
        len(poses) == 1
        and np.abs(poses[0] - REST).max() < 4
        and arm.torque() == []
        and (tmp_path / "conversation.gif").is_file()
    )


def test_bad_input(arm, command, fails):
    assert "instruction" in fails(sample.main, command)
    assert "lerobot-find-port" in fails(sample.main, [*command, "--port=/dev/nothing", TASK["task"]])
    assert "does not open" in fails(sample.main, [*command, "--wrist=9", TASK["task"]])
    assert "--wrist=" in fails(sample.main, [*command, "--wrist=", TASK["task"]])
    assert "neither sim, real" in fails(sample.main, [*command, "--env=reel", TASK["task"]])


class Person:
    """Somebody at the keyboard: a pipe in the place of standard input."""

    def __init__(self, monkeypatch):
        read, self.write = os.pipe()
        monkeypatch.setattr(sys, "stdin", os.fdopen(read))

    def press(self, keys):
        os.write(self.write, keys.encode())

    def leave(self):
        os.close(self.write)


def test_practice_on_the_arm_with_a_person_who_judges(arm, trained, tmp_path, monkeypatch, capsys):
    """Two iterations of two episodes; the person leaves in the second, and after --resume only what was missing is played."""
    monkeypatch.setattr(
        real_env, "PracticeEnv", functools.partial(real_env.PracticeEnv, clock=arm, size=(64, 48), limit=8)
    )
    out = tmp_path / "practised"
    flags = [
        "--config",
        "debug",
        f"--init_from={trained}",
        f"--out={out}",
        "--env=real",
        f"--port={arm.port}",
        "--front=0",
        "--wrist=2",
        f"--task={TASK['task']}",
        "--episodes=2",
        "--eval=0",
        "--eval_episodes=0",
        "--device=cpu",
        "--threads=1",
    ]
    person = Person(monkeypatch)
    person.press(
        "\nxxxy\nxn\nxxxxxxxx"
    )  # success in the fourth step, failure in the second, and nobody judges
    person.leave()
    with pytest.raises(SystemExit):
        rl.main(flags)
    said = capsys.readouterr()
    assert (
        "nobody is at the keyboard" in said.err
        and "--resume" in said.err
        and "lay out the scene for: put the red" in said.out
    )
    kept = sorted((out / "episodes").iterdir())
    first, second, third = (torch.load(path, weights_only=True) for path in kept)
    assert [e["success"] for e in (first, second, third)] == [True, False, False] and [
        e["steps"] for e in (first, second, third)
    ] == [4, 2, 8]
    assert third["final"] and not first["final"] and arm.torque() == []
    before = [path.read_bytes() for path in kept]
    Person(monkeypatch).press("\ny")
    rl.main([*flags, "--resume"])
    assert [path.read_bytes() for path in kept] == before and len(list((out / "episodes").iterdir())) == 4
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["success place"] for line in lines] == [0.5, 0.5] and arm.torque() == []
    assert json.loads((out / "config.json").read_text())["env"] == "sim"
    within_limits(arm)


class Practice:
    """rl.py on an emulated arm of its own, in a process with a pipe for a keyboard, until it is killed."""

    script = """
import functools, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import feetech_emulator, real_env, rl, sim_env
signal.alarm(300)
sim = sim_env.SO100Env(px=48)
sim.reset(seed=2_000_000)
arm = feetech_emulator.Emulator(sim)
feetech_emulator.install(arm, sys.argv[2])
real_env.PracticeEnv = functools.partial(real_env.PracticeEnv, clock=arm, size=(64, 48), limit=10**6)
rl.main([*sys.argv[3:], f"--port={arm.port}"])
print("torque", arm.torque())
"""

    def __init__(self, root, folder, *argv):
        words = [
            sys.executable,
            "-c",
            self.script,
            root,
            folder / "calibration",
            "--config",
            "debug",
            "--episodes=2",
            "--eval=0",
            "--eval_episodes=0",
            "--env=real",
            "--front=0",
            "--wrist=2",
            "--device=cpu",
            "--threads=1",
            f"--task={TASK['task']}",
            *argv,
        ]
        folder.mkdir()
        self.program = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(folder)},
        )

    def asked(self):
        """Wait until it asks for the next episode: the one before is on disk."""
        said = []
        while not said or "press Enter" not in said[-1]:
            said.append(self.program.stdout.readline())
            assert said[-1], "".join(said)

    def press(self, keys):
        self.program.stdin.write(keys)
        self.program.stdin.flush()

    def kill(self):
        os.killpg(self.program.pid, signal.SIGKILL)
        assert self.program.wait() == -signal.SIGKILL


def test_practice_goes_on_after_kill_9(root, trained, tmp_path):
    """SIGKILL in mid episode, between episodes and in an update: what was played is kept and whole, and only what is missing is played."""
    out, rng, kept = tmp_path / "practised", random.Random(0), {}
    begin = lambda name, *more: Practice(
        root, tmp_path / name, f"--init_from={trained}", f"--out={out}", *more
    )

    def look(n):
        """n episodes are on disk, those of before unchanged, and all are whole."""
        there = {path.name: path.read_bytes() for path in (out / "episodes").glob("*.pt")}
        assert len(there) == n and kept.items() <= there.items()
        kept.update(there)
        for path in (out / "episodes").glob("*.pt"):
            episode = torch.load(path, weights_only=True)
            assert {len(episode[name]) for name in rl.CHUNKS} == {len(episode["reward"])} and int(
                episode["executed"].sum()
            ) == episode["steps"]
        sample.load_policy(out)
        assert torch.load(out / "train_state.pt", weights_only=True)["iteration"] in (0, 1)

    practice = begin("first")
    practice.asked()
    practice.press("\nxxy")
    practice.asked()
    practice.press("\nxx")  # it goes on until somebody judges
    time.sleep(0.5 + rng.random())
    practice.kill()
    look(1)

    practice = begin("second", "--resume")
    practice.asked()
    practice.press("\nn")
    while (
        len(list((out / "episodes").glob("*.pt"))) < 2
    ):  # then both of an iteration are there, and it learns
        time.sleep(0.01)
        assert practice.program.poll() is None
    time.sleep(0.1 * rng.random())
    practice.kill()
    look(2)

    practice = begin("third", "--resume")
    practice.asked()  # for the third: nothing is played again
    practice.kill()
    look(2)

    practice = begin("fourth", "--resume")
    said, _ = practice.program.communicate("\nxy\nxxn", timeout=300)
    assert practice.program.returncode == 0 and said.count("press Enter") == 2 and "torque []" in said, said
    there = {path.name: path.read_bytes() for path in (out / "episodes").iterdir()}
    assert len(there) == 4 and kept.items() <= there.items()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["success place"]) for line in lines] == [(1, 0.5), (2, 0.5)]
