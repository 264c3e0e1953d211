"""The environment of sim_env on a real SO-100 or SO-101, driven by LeRobot's motor bus and camera classes.

    pip install 'lerobot[feetech]'
    python sample.py --env=real --port=/dev/ttyACM0 --front=0 --wrist=2 "put the red cube on the blue pad"

Actions and state have sim_env's units: degrees for five joints, 0 (closed) to 100 (open) for the gripper.
One target is sent every 1 / FPS seconds.

What protects the arm:
- Every target that is sent is finite, within the joint limits of the arm and of its calibration, at most
  MAX_STEP from the measured position, and keeps the gripper above the table, in reach and outside the base.
- The servos limit their own speed (MAX_SPEED). Every target is read back from them.
- A failed call of the driver is reported and repeated. When it has failed TRIES times, the servos are told to
  hold their position, and ArmError is raised.
- At every exit except kill -9 the arm folds up slowly, if the bus still works, and torque is switched off.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common import UserError, check_readable, read_json, require
from evaluate import SingleEnv, camera_indices
from sim_env import (
    CAMERAS,
    FPS,
    HIGH,
    LOW,
    MODEL,
    MOTORS,
    OPEN,
    PAN_AXIS,
    check_actions,
    inverse,
    mujoco,
    resize_image,
    to_qpos,
)

# Poses: six joint positions in LeRobot units
HOME = inverse(0, 0.15, 0.11, -90, OPEN)  # episodes begin here, in simulation too
REST = np.array([0, -100, 88, 67, -90, 5.0])  # folded: the arm keeps this pose without torque

# Limits of a target
# MAX_STEP is counted from the measured position; scripted experts need 18, 24, 10.
MAX_STEP = np.array([20, 20, 20, 20, 30, 15.0])
MAX_SPEED = 3000  # encoder ticks/s (264 degrees/s), kept by the servo itself
FLOOR = -0.012  # metres, lowest height of the fingertips; scripted experts aim up to 8 mm below the table
REACH = 0.40  # metres, largest distance from the pan axis
BASE = np.array([(-0.05, -0.07, -1), (0.05, 0.03, 0.085)])  # metres, two corners (x, y, z) of the base's box

# Slow moves to HOME and REST
MOVE_SPEED = 45  # degrees/s, on average
MOVE_RATE = 50  # targets/s
MAX_LAG = 25  # degrees behind its target: then something is in the way

# Faults
TRIES = 5  # calls of the driver before ArmError
MAX_JUMP = 60  # degrees between two readings: then the second one is wrong
STALE = 0.5  # seconds without a new camera frame, or with the same frame although the arm moves

# Servo registers, with the values of LeRobot's SO follower
SETTINGS = {
    "Return_Delay_Time": 0,
    "Maximum_Acceleration": 254,
    "Acceleration": 254,
    "Operating_Mode": 0,  # position control
    "P_Coefficient": 16,
    "I_Coefficient": 0,
    "D_Coefficient": 32,
    "Goal_Velocity": MAX_SPEED,
}
GRIPPER_SETTINGS = {"Max_Torque_Limit": 500, "Protection_Current": 250, "Overload_Torque": 25}

LIMIT = 200  # control steps of an episode
PACKAGE = "'lerobot[feetech]'"
NO_TASK = 'the real arm needs an instruction: type it in quotes, like "put the red cube on the blue pad"'
SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP


class ArmError(UserError):
    """The servo bus or a camera failed for good, or the arm is blocked. It was told to hold its position."""


class RealEnv:
    """A real arm with Gymnasium's signatures. Nobody judges its episodes: they end at the step limit.

    port: serial port of the servo bus. cameras: {"front": index or path, ...}. name: LeRobot's robot id,
    whose calibration file is used; not needed if there is only one. px: side of the images, cut square from
    the middle of the frame. dry_run: write nothing to the servos, print what would be sent. limit: control
    steps of an episode. size: width and height that the cameras deliver, best those of the recordings; other
    proportions show another part of the scene.
    Raises UserError: one line that says what to do.
    """

    # what the programs ask an environment class for
    cameras = CAMERAS
    motors = MOTORS
    families = {"real": LIMIT}
    fps = FPS

    # before anything is opened
    powered = False  # torque may be on
    broken = False  # the bus failed for good
    closed = False
    measured = None  # the last position that was read, (6,)
    task = ""
    home = HOME

    def __init__(
        self,
        port: str,
        cameras: dict[str, Any],
        name: str = "",
        px: int = 96,
        dry_run: bool = False,
        limit: int = LIMIT,
        size: tuple[int, int] = (640, 480),
    ):
        self.port = port
        self.px = px
        self.dry_run = dry_run
        self.limit = limit
        self.faults = []  # every failed call of the driver, in words
        self.opened = {}  # camera name -> LeRobot's camera
        self.shown = {}  # camera name -> its last new frame (height, width, 3), position and time then
        self.data = mujoco.MjData(MODEL)  # for kinematics only
        self.exits = contextlib.ExitStack()  # what remains to be done after the arm's release
        atexit.register(self.close)
        # SIGTERM and SIGHUP end the program as Ctrl-C does, so that close() is called
        _on_signals(signal.default_int_handler)
        try:
            self._open_bus(name)
            self._check_servos()
            self._open_cameras(cameras, size)
            self._prepare_servos()
        except BaseException:
            self.close()
            raise

    # -- connecting ------------------------------------------------------------------------------------------

    def _open_bus(self, name):
        """Read the calibration file and open the port."""
        motors = require("lerobot.motors", PACKAGE)
        feetech = require("lerobot.motors.feetech", PACKAGE)
        path = _find_calibration(name)
        self.again = (
            "calibrate anew, type: lerobot-calibrate --robot.type=so100_follower "
            f"--robot.port={self.port} --robot.id={path.stem}"
        )
        ranges = read_json(path, self.again)
        with check_readable(f"{path} is no calibration of an SO-100 or SO-101, it", self.again):
            calibration = {motor: motors.MotorCalibration(**ranges[motor]) for motor in MOTORS}
        self._set_limits(calibration, path)
        servos = {}
        for number, motor in enumerate(MOTORS, 1):
            mode = "range_0_100" if motor == "gripper" else "degrees"
            servos[motor] = motors.Motor(number, "sts3215", motors.MotorNormMode(mode))
        self.bus = feetech.FeetechMotorsBus(self.port, servos, calibration)
        hint = (
            "plug in and power the arm, type lerobot-find-port, give what it says as --port=..., and end "
            "another program that uses it. On Linux you need the group dialout: "
            "sudo usermod -aG dialout $USER; log in again"
        )
        with check_readable(f"the arm's port {self.port}", hint):
            self.bus.connect(handshake=False)
        self.exits.callback(self.bus.disconnect, disable_torque=False)

    def _set_limits(self, calibration, path):
        """Lowest and highest target, each (6,): the arm's and the calibrated range, less one degree each."""
        ticks = [calibration[motor].range_max - calibration[motor].range_min for motor in MOTORS]
        width = np.array(ticks) * 360 / 4095  # degrees, (6,)
        nominal = HIGH - LOW  # (6,)
        nominal[5] = 110.2  # the gripper's 0 to 100, in degrees of its servo
        # A joint that was not moved to both ends has its zero elsewhere: table and reach would be wrong.
        for j in np.flatnonzero((width < 0.9 * nominal) | (width > nominal + 60)):
            raise UserError(
                f"{path} says that {MOTORS[j]} turns by {width[j]:.0f} degrees, an SO-100's turns by "
                f"{nominal[j]:.0f}: move it from end to end when you {self.again} and then c"
            )
        self.low = np.maximum(LOW, 1 - width / 2)
        self.high = np.minimum(HIGH, width / 2 - 1)
        self.low[5] = 0
        self.high[5] = 100

    def _check_servos(self):
        """Make sure that all servos answer, hold the file's calibration, and stand where an arm can be."""
        setup = f"lerobot-setup-motors --robot.type=so100_follower --robot.port={self.port}"
        for number, motor in enumerate(MOTORS, 1):
            remedy = f"power the arm, plug in {motor} (id {number}); a new servo gets its id from {setup}"
            self._try(f"asking {motor}", self.bus.ping, motor, raise_on_error=True, remedy=remedy)
        if not self._try("reading the calibration", lambda: self.bus.is_calibrated):
            raise UserError(
                "the servos hold another calibration than the file. If the file is this arm's, press ENTER "
                f"when asked, else c: {self.again}"
            )
        position = self._read()
        for j in np.flatnonzero((position < LOW - 25) | (position > HIGH + 25)):
            raise UserError(
                f"{MOTORS[j]} reads {position[j]:.0f}, it can be {LOW[j]:.0f} to {HIGH[j]:.0f}: {self.again}"
            )

    def _open_cameras(self, cameras, size):
        opencv = require("lerobot.cameras.opencv", PACKAGE)
        width, height = size
        for view, source in cameras.items():
            device = int(source) if str(source).isdigit() else Path(source)
            # At the camera's own rate: not all have the 30 frames a second that LeRobot's guide asks for.
            camera = opencv.OpenCVCamera(opencv.OpenCVCameraConfig(device, width=width, height=height))
            hint = f"type lerobot-find-cameras opencv, then --{view}=... with the number it says"
            with check_readable(f"camera {view} ({source})", hint):
                camera.connect()
            self.opened[view] = camera
            self.exits.callback(camera.disconnect)
            if 0 < camera.fps < FPS:  # 0: the driver does not say
                raise UserError(
                    f"camera {view} ({source}) gives {camera.fps:g} frames a second, the arm needs {FPS}: "
                    f"give it more light, or choose another one with --{view}=..."
                )

    def _prepare_servos(self):
        """Write LeRobot's settings, then switch torque on in place.

        The measured position becomes the target first: a servo keeps the target of its last session, and
        would leap to it.
        """
        if self.dry_run:
            return
        self._try("switching torque off", self.bus.disable_torque)
        for motor in MOTORS:
            settings = SETTINGS | GRIPPER_SETTINGS if motor == "gripper" else SETTINGS
            for register, value in settings.items():
                self._try(f"setting {register} of {motor}", self.bus.write, register, motor, value)
        self._send(self._read())
        self.powered = True
        for motor in MOTORS:
            self._try(f"switching torque on for {motor}", self.bus.enable_torque, motor)

    # -- the bus ---------------------------------------------------------------------------------------------

    def _report(self, text):
        self.faults.append(text)
        print(f"arm: {text}", file=sys.stderr, flush=True)

    def _try(self, what, call, *args, tries=TRIES, remedy="check power and cables", **options):
        """A call of the driver, repeated while it fails: these servos lose and garble packets now and then.

        The driver raises ConnectionError, RuntimeError (a servo reports a fault), SerialException,
        termios.error and IndexError. what: the call in words. remedy: what a person can do when it has failed
        `tries` times.
        """
        for attempt in range(1, tries + 1):
            try:
                return call(*args, **options)
            except Exception as error:
                why = _one_line(error)
            self._report(f"{what} failed, {attempt} of {tries}: {why}")
            self._recover()
        if not self.broken:  # stop once: the servos that stop() cannot reach come here, too
            self.broken = True
            self._stop()
        raise ArmError(
            f"the arm was stopped: {what} failed {tries} times ({why}); {remedy}, then start again"
        )

    def _recover(self):
        """After an error: no packet is under way, late answers are thrown away, and the port is open."""
        port = self.bus.port_handler
        # The flag stays set after an exception, and every later call would fail with "port is in use".
        port.is_using = False
        time.sleep(0.02)  # a late answer arrives, and is thrown away
        try:
            port.ser.reset_input_buffer()
        except Exception:  # the cable was pulled; the port may come back under the same name
            time.sleep(0.2)
            with contextlib.suppress(Exception):  # if it has not, the next call reports it
                port.openPort()

    def _read(self):
        """Read the position (6,), and keep it as self.measured."""
        self.measured = self._try("reading the positions", self._plausible_position)
        return self.measured

    def _plausible_position(self):
        """A position that the arm cannot have moved to is a fault of the bus. The first one is read twice."""
        before = self._position() if self.measured is None else self.measured
        position = self._position()
        for j in np.flatnonzero(np.abs(position - before) > MAX_JUMP):
            raise ConnectionError(f"{MOTORS[j]} reads {position[j]:.0f} right after {before[j]:.0f}")
        return position

    def _position(self):
        values = self.bus.sync_read("Present_Position")
        return np.array([values[motor] for motor in MOTORS])  # (6,)

    def _send(self, target):
        """Send a target (6,) to the servos. It must be within the limits."""
        self._try("sending a target", self._write_target, dict(zip(MOTORS, target.tolist())))

    def _write_target(self, target):
        """One group write. Servos do not acknowledge it, so the targets are read back."""
        self.bus.sync_write("Goal_Position", target)
        held = self.bus.sync_read("Goal_Position")
        # Degrees: an encoder tick or two. The servo rounds what it was told.
        wrong = [motor for motor in MOTORS if abs(held[motor] - target[motor]) > 0.15]
        if wrong:
            raise ConnectionError(f"{', '.join(wrong)} did not take the target")

    def _stop(self):
        """Let the arm hold its position. The servos are told one by one, because some may be out of reach."""
        if not self.powered or self.measured is None:
            return
        position = np.clip(self.measured, self.low, self.high)
        for motor, target in zip(MOTORS, position.tolist()):
            with contextlib.suppress(ArmError):  # it is reported
                self._try(f"stopping {motor}", self.bus.write, "Goal_Position", motor, target)

    def _give_up(self, what, remedy):
        """Stop the arm and raise ArmError."""
        self._stop()
        raise ArmError(f"the arm was stopped: {what}; {remedy}, then start again") from None

    def _release(self):
        """Switch torque off servo by servo. One that does not answer must not keep the others on."""
        if not self.powered:
            return
        self.broken = True  # from here on a failure must not send targets
        holding = []
        for motor in MOTORS:
            try:
                self._try(f"switching off {motor}", self.bus.disable_torque, motor, tries=3 * TRIES)
                # LeRobot's own programs expect servos without a speed limit
                self._try(f"freeing the speed of {motor}", self.bus.write, "Goal_Velocity", motor, 0)
            except ArmError:
                holding.append(motor)
        if holding:
            self._report(f"{', '.join(holding)} may still hold: switch off the arm's power")

    # -- limits ----------------------------------------------------------------------------------------------

    def _inside(self, position):
        """Are fingertips, jaw and wrist above the table, within reach and outside the base?"""
        data = self.data
        data.qpos[:6] = to_qpos(position)
        mujoco.mj_kinematics(MODEL, data)
        parts = [data.site("gripper"), data.site("jaw_tip"), data.body("fixed_jaw")]
        points = np.array([part.xpos for part in parts])  # (3, 3) metres
        above = points[:, 2] >= FLOOR  # (3,)
        distance = np.linalg.norm(points[:, :2] - PAN_AXIS, axis=1)  # (3,)
        in_base = ((points > BASE[0]) & (points < BASE[1])).all(1)  # (3,)
        return bool((above & (distance <= REACH) & ~in_base).all())

    def _limited(self, action):
        """Action (6,) -> the nearest target that may be sent, and why it differs: joint, step, workspace."""
        why = []
        joint = np.clip(action, self.low, self.high)
        if (joint != action).any():
            why.append("joint")
        step = np.clip(joint, self.measured - MAX_STEP, self.measured + MAX_STEP)
        if (step != joint).any():
            why.append("step")
        if self._inside(step):
            return step, why
        # the longest part of the way that stays in the workspace, in tenths; at last no motion
        start = np.clip(self.measured, self.low, self.high)
        for share in np.linspace(0.9, 0, 10):
            target = start + share * (step - start)
            if self._inside(target):
                break
        return target, [*why, "workspace"]

    def _path(self, pose):
        """A line in joint space, slow at both ends -> targets (n, 6), and are they in the workspace?"""
        start = self._read()
        way = np.clip(pose, self.low, self.high) - start  # (6,)
        n = 2 + int(np.abs(way).max() / MOVE_SPEED * MOVE_RATE)
        share = (1 - np.cos(np.linspace(0, np.pi, n))) / 2  # (n,) from 0 to 1
        path = start + share[:, None] * way  # (n, 6)
        # outside of the workspace, every way to a good pose leads in
        return path, not self._inside(start) or all(map(self._inside, path))

    def _move(self, pose):
        """Move slowly to a pose (6,). ArmError if the way leaves the workspace or the arm does not follow."""
        path, clear = self._path(pose)
        if not clear:
            self._give_up("the way to its next pose leads through table or base", "fold it up by hand")
        if self.dry_run:
            print(f"dry run: would move to {_words(path[-1])} in {len(path) / MOVE_RATE:.1f} s")
            return
        for target in path:
            self._send(np.clip(target, self.low, self.high))
            time.sleep(1 / MOVE_RATE)
            for j in np.flatnonzero(np.abs(self._read() - target) > MAX_LAG):
                self._give_up(
                    f"{MOTORS[j]} does not follow its target",
                    "something is in the way, or the servo is overloaded: free the arm",
                )

    # -- episodes --------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Move slowly to the start pose -> obs, info. options: task, the instruction.

        A person lays out the scene: the seed and other options are the simulation's, and ignored.
        """
        self.task = (options or {}).get("task", self.task)
        if not self.task.strip():
            raise UserError(NO_TASK)
        if self.closed:
            raise UserError("the arm was closed: make a new RealEnv")
        self.measured = None  # people may have moved the arm
        self.steps = 0
        self.success = False
        self.clipped = []  # reasons for which the last targets were limited
        self.begin()
        self._move(self.home)
        time.sleep(0.5)  # the arm settles, and the cameras see it
        self._read()
        self.tick = time.monotonic()  # when the next control step begins
        return self._obs(), self._info(0)

    def begin(self) -> None:
        """Called before the arm moves to its start pose."""

    def judge(self) -> bool | None:
        """Called after every control step: True is success, False failure, None: the episode goes on."""

    def instruct(self, task: str) -> dict:
        """Another instruction, also in mid motion, with a step limit of its own -> a new observation."""
        self.task = task
        self.steps = 0
        self._read()
        return self._obs()

    def rest(self) -> None:
        """Fold up: no load on the motors while people lay out scenes and gradients are computed."""
        self._move(REST)

    def step(self, action: np.ndarray) -> tuple:
        """One control step: action (6,) target positions -> obs, reward, terminated, truncated, info."""
        return self.step_chunk([action])

    def step_chunk(self, actions: np.ndarray) -> tuple:
        """Up to n control steps, actions (n, 6). Pictures are taken once, at the end."""
        if not self.task or self.closed:
            raise UserError("the episode has not begun: call reset() first")
        before = self.steps
        self.clipped = []
        for action in check_actions(actions):
            terminated, truncated = self._advance(action)
            if terminated or truncated:
                break
        return self._obs(), float(terminated), terminated, truncated, self._info(self.steps - before)

    def _advance(self, action):
        """One control step without pictures -> terminated, truncated."""
        target, why = self._limited(action)
        self.clipped += why
        if self.dry_run:
            print(f"dry run: would send {_words(target)}  clipped: {', '.join(why) or 'nothing'}")
        else:
            self._send(target)
        # The policy's computing counts as part of the period, but a target holds for half a period at least.
        now = time.monotonic()
        self.tick = max(self.tick + 1 / FPS, now + 0.5 / FPS)
        time.sleep(self.tick - now)
        self._read()
        self.steps += 1
        verdict = self.judge()
        self.success = verdict is True
        over = verdict is False or self.steps >= self.limit
        return self.success, over and not self.success

    def _look(self, view):
        """Take a camera's newest frame; ArmError if it does not show the scene of now."""
        try:
            frame = self.opened[view].async_read(timeout_ms=1000 * STALE)
        except Exception as error:
            self._give_up(f"camera {view} delivers no new pictures ({_one_line(error)})", "check its cable")
        now = time.monotonic()
        before, position, since = self.shown.get(view, (None, None, None))
        if not np.array_equal(frame, before):
            self.shown[view] = frame, self.measured, now
        elif now - since > STALE and np.abs(self.measured - position)[:5].max() > 5:  # degrees
            self._give_up(
                f"camera {view} shows the same picture since {now - since:.1f} s although the arm moved",
                "unplug it and plug it in again",
            )

    def _obs(self):
        images = {}
        for view in self.opened:
            self._look(view)
            images[view] = self.render(self.px, view)
        return {"images": images, "state": self.measured.astype(np.float32), "task": self.task}

    def _info(self, executed):
        return {
            "success": self.success,
            "reason": "",
            "steps": self.steps,
            "executed": executed,
            "failure": "",
            "clipped": self.clipped,
        }

    def render(self, px: int = 256, camera: str = "front") -> np.ndarray:
        """The last picture of a camera in another size: (px, px, 3) uint8, the middle of the frame."""
        frame, _, _ = self.shown[camera]
        return resize_image(Image.fromarray(frame), px, "crop")

    def close(self) -> None:
        """Fold up slowly, switch torque off, close cameras and port. Every exit but kill -9 calls it."""
        if self.closed:
            return
        self.closed = True
        try:
            if self.powered and not self.broken:
                self._recover()  # Ctrl-C may have come in mid packet
                if not self._path(REST)[1]:
                    self._move(HOME)
                self._move(REST)
        except BaseException as error:  # also a second Ctrl-C: then the arm is released at once
            self._report(f"not folded up: {_one_line(error)}")
        finally:
            _on_signals(signal.SIG_IGN)  # nothing may come between the arm and its release
            self._release()  # also when the port is gone: it may have come back
            with contextlib.suppress(Exception):  # of a port or camera that is gone
                self.exits.close()
            _on_signals(signal.default_int_handler)


class JudgedEnv(RealEnv):
    """A real arm and a person, who begins every episode with Enter, and ends it with y (success) or n.

    An episode that nobody judges fails at the step limit. Arguments are RealEnv's.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.keyboard = sys.stdin.fileno()
        if sys.stdin.isatty():
            import termios
            import tty

            settings = termios.tcgetattr(self.keyboard)
            self.exits.callback(termios.tcsetattr, self.keyboard, termios.TCSADRAIN, settings)
            tty.setcbreak(self.keyboard)  # keys arrive without Enter
        self.rest()

    def begin(self) -> None:
        """Wait until the person has laid out the scene."""
        print(f"\nlay out the scene for: {self.task}")
        print("keep clear of the arm and press Enter; then y: done, n: failed", flush=True)
        while self._key(None) not in ("\r", "\n"):
            pass

    def judge(self) -> bool | None:
        """The person's verdict, if there is one already."""
        return {"y": True, "n": False}.get(self._key(0))

    def step_chunk(self, actions: np.ndarray) -> tuple:
        """Like RealEnv's. The arm folds up when the episode has ended, and stays so until the next begins."""
        result = super().step_chunk(actions)
        if result[2] or result[3]:  # terminated or truncated
            self.rest()
        return result

    def _key(self, patience):
        """The next key, or "" if none is pressed within `patience` seconds; None waits for ever."""
        if not select.select([self.keyboard], [], [], patience)[0]:
            return ""
        key = os.read(self.keyboard, 1).decode(errors="replace")
        if not key:
            raise ArmError("nobody is at the keyboard to begin and judge the episodes")
        return key


def connect(cfg: Any, policy: Any, judged: bool, dry_run: bool = False) -> SingleEnv:
    """The arm that a program's options --port, --id, --front, --wrist name, as run_episodes() takes it.

    judged: a person begins and judges the episodes (JudgedEnv). dry_run: nothing is sent to the servos.
    UserError, before anything is opened, for a policy that does not fit the arm and a missing instruction.
    """
    check_policy(policy)
    if not cfg.task.strip() and not getattr(cfg, "interactive", False):
        raise UserError(NO_TASK)
    kind = JudgedEnv if judged else RealEnv
    cameras = {view: getattr(cfg, view) for view in policy.cfg.camera_names}
    arm = kind(cfg.port, cameras, cfg.id, policy.cfg.image_size, dry_run)
    arm.home = start_pose(policy)
    return SingleEnv(arm, arm.px, CAMERAS, policy.cfg.state_dim)


def check_policy(policy: Any) -> None:
    """UserError for a policy that learnt to see, to move or to keep time in another way than the arm does."""
    camera_indices(policy, "real")
    if policy.cfg.fit == "stretch":
        raise UserError(
            "the policy learnt from stretched pictures, but of the arm's cameras it would see the middle, in "
            "proportion: convert its recordings with prepare.py --fit=crop, and train on them"
        )


def start_pose(policy: Any) -> np.ndarray:
    """Where an episode begins (6,): as in the policy's recordings, or as in the simulation if it has none."""
    if not policy.cfg.home:
        return HOME
    return np.array([float(position) for position in policy.cfg.home.split(",")])


# -----------------------------------------------------------------------------------------------------------
# Calibration, words, signals


def _find_calibration(name):
    """The file that lerobot-calibrate wrote for the robot id `name`; without name, the only one there is."""
    constants = require("lerobot.utils.constants", PACKAGE)
    folder = constants.HF_LEROBOT_CALIBRATION / constants.ROBOTS
    # the folder is so100_follower or so101_follower, in newer versions of LeRobot so_follower
    found = list(folder.glob(f"so*_follower/{name or '*'}.json"))
    names = {path.stem for path in found}
    if len(names) > 1:
        raise UserError(f"several arms are calibrated: type --id= one of {', '.join(sorted(names))}")
    if not names:
        raise UserError(
            f"no calibration of {name or 'any arm'} in {folder}: type lerobot-calibrate "
            f"--robot.type=so100_follower --robot.port=... --robot.id={name or 'my_arm'}"
        )
    return max(found)  # the newer version's


def _one_line(error):
    """The first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _words(position):
    """A position (6,) to read: shoulder_pan -6.9, ..."""
    return ", ".join(f"{motor} {p:.1f}" for motor, p in zip(MOTORS, position))


def _on_signals(handler):
    """Set what Ctrl-C, SIGTERM and SIGHUP do."""
    for number in SIGNALS:
        with contextlib.suppress(ValueError):  # only the main thread may
            signal.signal(number, handler)
