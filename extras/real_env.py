"""The same environment on a real SO-100 or SO-101, through LeRobot's motor bus and camera classes, with its calibration.

    pip install 'lerobot[feetech]'
    python sample.py --env=real --port=/dev/ttyACM0 --front=0 --wrist=2 --dry_run "put the red cube on the blue pad"

The arm is commanded at FPS like the simulated one. Whatever the policy says, a target that is sent is finite, within the joint limits
of the arm and of its calibration, at most MAX_STEP from where the arm is, and leaves the gripper above the table, within reach and
clear of the base. Every target is read back, every failed call of the driver repeated and reported. When that does not help the arm
stops where it is. At any exit but kill -9 it folds up slowly, if the bus still works, and is switched off.
"""

import atexit
import contextlib
import json
import math
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from sim_env import CAMERAS, FPS, HIGH, LOW, MJCF, MOTORS, OPEN, PAN_AXIS, inverse, mujoco, square, to_qpos

HOME = inverse(0, 0.15, 0.11, -90, OPEN)  # where episodes begin, in simulation too
REST = np.array([0, -100, 88, 67, -90, 5.0])  # folded onto itself: it stays so without torque
MAX_STEP = np.array(
    [20, 20, 20, 20, 30, 15.0]
)  # a target's largest distance from the measured position; teachers stay below 18, 24, 10
MAX_SPEED = 3000  # of a servo, encoder ticks/s (264 degrees/s), kept by the servo itself
CALM_SPEED, CALM_RATE = 45, 50  # moves to HOME and REST: degrees/s, targets/s
LAG = 25  # degrees behind its target in such a move, and something is in the way
JUMP = 60  # degrees between two readings, and the reading is wrong
FLOOR, REACH, BASE = (
    -0.012,
    0.40,
    np.array([(-0.05, 0.05), (-0.07, 0.03), (-1, 0.085)]),
)  # metres; teachers aim up to 8 mm below the table
TRIES = 5  # calls of the driver before giving up
STALE = 0.5  # seconds without a new camera frame, or with the same one while the arm moves
SETTINGS = {
    "Return_Delay_Time": 0,
    "Maximum_Acceleration": 254,
    "Acceleration": 254,
    "Operating_Mode": 0,
    "P_Coefficient": 16,
    "I_Coefficient": 0,
    "D_Coefficient": 32,
}  # those of LeRobot's SO follower
GRIPPER_SETTINGS = {"Max_Torque_Limit": 500, "Protection_Current": 250, "Overload_Torque": 25}


class ArmError(RuntimeError):
    """The servo bus or a camera failed for good; the arm was told to stop where it is."""


class RealEnv:
    """A real arm with Gymnasium's signatures and the units of sim_env: degrees, gripper 0..100.

    port: of the servo bus. cameras: {"front": index or path, ...}. name: LeRobot's robot id, whose calibration file is used (not
    needed if there is only one). px: side of the images, cut square from the middle of the frame. dry_run: write nothing to the
    arm, print what would be sent. limit: control steps before truncation. judge: function that says whether the task is done
    (nobody does by default). clock: module or object with monotonic() and sleep(). size: width and height that the cameras deliver,
    best those of the recordings: other shapes show another part of the world.
    Raises ValueError, FileNotFoundError or RuntimeError, one line that says what to do.
    """

    def __init__(
        self, port, cameras, name="", px=96, dry_run=False, limit=200, judge=None, clock=time, size=(640, 480)
    ):
        self.port, self.px, self.dry_run, self.limit, self.judge, self.clock = (
            port,
            px,
            dry_run,
            limit,
            judge,
            clock,
        )
        self.home, self.task, self.steps, self.measured = HOME, None, 0, None
        self.faults, self.clipped, self.shown, self.frames = (
            [],
            [],
            {},
            {},
        )  # shown: camera -> last new frame, position and time then
        self.bus, self.cameras, self.powered, self.broken, self.closed = None, {}, False, False, False
        self.model = mujoco.MjModel.from_xml_string(MJCF)
        self.data = mujoco.MjData(self.model)
        atexit.register(self.close)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
                signal.signal(number, lambda *_: sys.exit(143))  # an exit like others: atexit runs
        try:
            self._open_bus(name)
            self._open_cameras(cameras, *size)
            self._prepare_servos()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # -- connecting ---------------------------------------------------------------------------------------------

    def _open_bus(self, name):
        """Open the port and make sure that these are the six servos, with the calibration that the file holds."""
        try:
            from lerobot.motors import Motor, MotorCalibration, MotorNormMode
            from lerobot.motors.feetech import FeetechMotorsBus
        except ImportError as error:
            raise RuntimeError(
                f"the real arm is driven by LeRobot ({error}); type: pip install 'lerobot[feetech]'"
            ) from None
        if not os.path.exists(self.port):
            raise FileNotFoundError(
                f"no port {self.port or 'given'}: plug in and power the arm, type lerobot-find-port, and give what it says as --port=..."
            )
        path = find_calibration(name)
        self.again = f"type: lerobot-calibrate --robot.type=so100_follower --robot.port={self.port} --robot.id={path.stem}"
        self.low, self.high = limits_of(path, self.again)
        calibration = {
            motor: MotorCalibration(**values) for motor, values in json.loads(path.read_text()).items()
        }
        modes = [MotorNormMode.DEGREES] * 5 + [MotorNormMode.RANGE_0_100]
        motors = {motor: Motor(i, "sts3215", mode) for i, (motor, mode) in enumerate(zip(MOTORS, modes), 1)}
        self.bus = FeetechMotorsBus(self.port, motors, calibration)
        try:
            self.bus.connect(handshake=False)
        except Exception as error:  # LeRobot says ConnectionError, the reason is its cause
            raise RuntimeError(
                f"cannot open {self.port} ({one_line(error.__cause__ or error)}): is another program using it? On Linux you need "
                "the group dialout: sudo usermod -aG dialout $USER, then log in again"
            ) from None
        for number, motor in enumerate(MOTORS, 1):
            try:
                self._try(f"asking {motor}", self.bus.ping, motor, raise_on_error=True)
            except ArmError as error:
                raise RuntimeError(
                    f"{error}; is the arm powered, and {motor} (id {number}) plugged in? A new servo gets its id from "
                    f"lerobot-setup-motors --robot.type=so100_follower --robot.port={self.port}"
                ) from None
        if not self._try("reading the servos' calibration", lambda: self.bus.is_calibrated):
            raise ValueError(
                f"the servos hold another calibration than {path}: if the file is this arm's, {self.again} and press ENTER; else calibrate anew"
            )
        position = self._read()
        if (bad := (position < LOW - 25) | (position > HIGH + 25)).any():
            j = int(bad.argmax())
            raise ValueError(
                f"{MOTORS[j]} reads {position[j]:.0f}, the arm can reach {LOW[j]:.0f} .. {HIGH[j]:.0f}: calibrate anew, {self.again}"
            )

    def _open_cameras(self, cameras, width, height):
        if not cameras:
            raise ValueError(
                f"no camera: type lerobot-find-cameras opencv, then {' '.join(f'--{view}=...' for view in CAMERAS)}"
            )
        try:
            from lerobot.cameras.opencv import OpenCVCamera, OpenCVCameraConfig
        except ImportError as error:
            raise RuntimeError(
                f"the cameras are read by LeRobot ({error}); type: pip install 'lerobot[feetech]'"
            ) from None
        for view, source in cameras.items():
            source = int(source) if str(source).isdigit() else Path(source)
            camera = OpenCVCamera(OpenCVCameraConfig(source, fps=30, width=width, height=height))
            try:
                camera.connect()
            except Exception as error:
                raise RuntimeError(
                    f"camera {view} ({source}) does not open ({one_line(error)}): type lerobot-find-cameras opencv, then --{view}=... "
                    "with the number it says"
                ) from None
            self.cameras[view] = camera

    def _prepare_servos(self):
        """LeRobot's settings, then torque on where the arm is: a servo's old target, from whenever, would make it leap."""
        if self.dry_run:
            return
        self._try("switching torque off", self.bus.disable_torque)
        for motor in MOTORS:
            for register, value in {
                **SETTINGS,
                "Goal_Velocity": MAX_SPEED,
                **(GRIPPER_SETTINGS if motor == "gripper" else {}),
            }.items():
                self._try(f"setting {register} of {motor}", self.bus.write, register, motor, value)
        self._send(self._read())
        self.powered = True
        for motor in MOTORS:
            self._try(f"switching torque on for {motor}", self.bus.enable_torque, motor)

    # -- the bus ------------------------------------------------------------------------------------------------

    def _report(self, text):
        self.faults.append(text)
        print(f"arm: {text}", file=sys.stderr, flush=True)

    def _try(self, what, call, *args, tries=TRIES, **kwargs):
        """A call of the driver, repeated while it fails: lost and garbled packets are part of life with these servos."""
        for attempt in range(1, tries + 1):
            try:
                return call(*args, **kwargs)
            except Exception as error:  # ConnectionError, RuntimeError (a servo's own complaint), SerialException, termios.error, IndexError
                self._report(f"{what} failed, {attempt} of {tries}: {one_line(error)}")
                why = error
                self._recover()
        self.broken = True
        raise ArmError(f"{what} failed {tries} times: {one_line(why)}")

    def _recover(self):
        """After an error: no packet is under way, no late answer waits to be taken for another's, and the port is open."""
        port = self.bus.port_handler
        port.is_using = (
            False  # stays set after an exception, and every later call would fail with "port is in use"
        )
        time.sleep(0.02)  # a late answer arrives
        try:
            port.ser.reset_input_buffer()
        except Exception:  # the cable was pulled; it may come back under the same name
            self.clock.sleep(0.2)
            with contextlib.suppress(Exception):  # the next call fails and says so
                port.openPort()

    def _read(self):
        """Measured position (6,). A reading that no arm can have moved to is an error of the bus, too; the first one is read twice."""

        def once():
            values = self.bus.sync_read("Present_Position")
            return np.array([values[motor] for motor in MOTORS], float)

        def read():
            known = once() if self.measured is None else self.measured
            position = once()
            if (far := np.abs(position - known) > JUMP).any():
                j = int(far.argmax())
                raise ConnectionError(f"{MOTORS[j]} reads {position[j]:.0f} right after {known[j]:.0f}")
            return position

        self.measured = self._try("reading the positions", read)
        return self.measured

    def _send(self, goal):
        """Target positions (6,), within the limits, to the servos. The driver's group write is not acknowledged: read it back."""

        def send():
            self.bus.sync_write("Goal_Position", {motor: float(g) for motor, g in zip(MOTORS, goal)})
            held = self.bus.sync_read("Goal_Position")
            if wrong := [
                motor for motor, g in zip(MOTORS, goal) if abs(held[motor] - g) > 0.15
            ]:  # an encoder tick or two
                raise ConnectionError(f"{', '.join(wrong)} did not take the target")

        self._try("sending a target", send)

    def _stop(self):
        """Stay where you are: tell every servo one by one, because some may be out of reach."""
        if not self.powered or self.measured is None:
            return
        for motor, position in zip(MOTORS, np.clip(self.measured, self.low, self.high)):
            try:
                self.bus.write("Goal_Position", motor, float(position), num_retry=2)
            except Exception as error:
                self._report(f"{motor} could not be told to stop: {one_line(error)}")
                self._recover()

    def _release(self):
        """Torque off, servo by servo: one that is dead must not keep the others on."""
        left = []
        for motor in MOTORS if self.powered else ():
            try:
                self._try(f"switching off {motor}", self.bus.disable_torque, motor, tries=3 * TRIES)
                self._try(
                    f"freeing the speed of {motor}", self.bus.write, "Goal_Velocity", motor, 0
                )  # for LeRobot's own programs
            except ArmError:
                left.append(motor)
        self.powered = bool(left)
        if left:
            self._report(f"{', '.join(left)} may still hold: switch off the arm's power")

    # -- limits -------------------------------------------------------------------------------------------------

    def inside(self, position):
        """Are fingertips, jaws and wrist above the table, within reach and clear of the base, by forward kinematics?"""
        self.data.qpos[:6] = to_qpos(position)
        mujoco.mj_kinematics(self.model, self.data)
        points = np.array(
            [self.data.site("gripper").xpos, self.data.site("jaw_tip").xpos, self.data.body("fixed_jaw").xpos]
        )  # (3, 3)
        on_base = ((points > BASE[:, 0]) & (points < BASE[:, 1])).all(1)
        return bool(
            (points[:, 2] >= FLOOR).all()
            and np.hypot(*(points[:, :2] - PAN_AXIS).T).max() <= REACH
            and not on_base.any()
        )

    def limited(self, goal):
        """The target (6,) nearest to `goal` that may be sent from the measured position, and why it differs: joint, step, workspace."""
        why, now = [], self.measured
        near = np.clip(goal, self.low, self.high)
        why += ["joint"] * (not np.array_equal(near, goal))
        goal, near = near, np.clip(near, now - MAX_STEP, now + MAX_STEP)
        why += ["step"] * (not np.array_equal(near, goal))
        if not self.inside(near):
            why.append("workspace")
            start = np.clip(now, self.low, self.high)
            near = next(
                (p for s in np.linspace(0.9, 0.1, 9) if self.inside(p := start + s * (near - start))), start
            )
        return near, why

    def _way(self, target):
        """Targets along a straight line in joint space, slow at both ends, and whether they all stay inside the workspace."""
        target, start = np.clip(target, self.low, self.high), self._read()
        n = max(1, math.ceil(np.abs(target - start).max() / CALM_SPEED * CALM_RATE))
        way = [start + (target - start) * (1 - math.cos(math.pi * k / n)) / 2 for k in range(1, n + 1)]
        return way, all(self.inside(p) for p in way) or not self.inside(
            start
        )  # from outside, any way to a good pose leads in

    def _calmly(self, target):
        """Slowly to a pose; stops if something is in the way."""
        way, clear = self._way(target)
        if not clear:
            raise RuntimeError(
                "the way to the next pose leads through the table or the base: fold the arm up by hand, then start again"
            )
        if self.dry_run:
            return print(f"dry run: would move to {words(way[-1])} in {len(way) / CALM_RATE:.1f} s")
        for goal in way:
            self._send(np.clip(goal, self.low, self.high))
            self.clock.sleep(1 / CALM_RATE)
            if (late := np.abs(self._read() - goal) > LAG).any():
                self._stop()
                raise RuntimeError(
                    f"{MOTORS[int(late.argmax())]} does not follow its target: something is in the way, or the servo is overloaded; "
                    "free the arm, then start again"
                )

    # -- episodes -----------------------------------------------------------------------------------------------

    def reset(self, *, seed=None, options=None):
        """Move slowly to the start pose -> obs, info. options: task, the instruction. The scene is laid out by a person; seed is ignored."""
        options = dict(options or {})
        self.task = options.pop("task", self.task)
        if options:
            raise ValueError(f"unknown reset options {sorted(options)}: type task")
        if not self.task or not self.task.strip():
            raise ValueError(
                'the real arm needs an instruction: type it in quotes, like "put the red cube on the blue pad"'
            )
        if self.closed:
            raise ValueError("the arm was closed: make a new RealEnv")
        before, self.measured, self.steps, self.clipped, self.success, self.late = (
            len(self.faults),
            None,
            0,
            [],
            False,
            0.0,
        )
        try:
            self._calmly(self.home)
            self.clock.sleep(0.5)  # it settles, and the cameras see it
            self._read()
        except ArmError as error:
            self._give_up(error)
        self.tick = self.clock.monotonic()
        return self._obs(), self._info(0, before)

    def instruct(self, task):
        """Another instruction, also in mid motion, with a step limit of its own -> obs: people may have moved things while the arm had nothing to do."""
        self.task, self.steps = task, 0
        try:
            self._read()
        except ArmError as error:
            self._give_up(error)
        return self._obs()

    def rest(self):
        """Fold up, out of the way: no load on the motors while people lay out scenes and gradients are computed."""
        try:
            self._calmly(REST)
        except ArmError as error:
            self._give_up(error)

    def step(self, action):
        """One control step of 1 / FPS seconds; action (6,) target positions -> obs, reward, terminated, truncated, info."""
        return self.step_chunk(np.asarray(action)[None])

    def step_chunk(self, actions):
        """Up to n control steps, actions (n, 6); pictures are taken once, at the end. Raises ArmError when the arm had to be stopped."""
        if self.task is None or self.closed:
            raise ValueError("the episode has not begun: call reset() first")
        actions = np.asarray(actions, np.float64)
        if actions.ndim != 2 or actions.shape[1] != 6 or not len(actions):
            raise ValueError(
                f"an action has 6 numbers, one for each of {', '.join(MOTORS)}; got shape {actions.shape[1:]}"
            )
        if not np.isfinite(actions).all():
            raise ValueError(f"an action must be finite; got {actions[~np.isfinite(actions).all(1)][0]}")
        before, self.clipped = len(self.faults), []
        for executed, action in enumerate(actions, 1):
            terminated, truncated = self._advance(action)
            if terminated or truncated:
                break
        return self._obs(), float(terminated), terminated, truncated, self._info(executed, before)

    def _advance(self, action):
        goal, why = self.limited(action)
        self.clipped += why
        try:
            if self.dry_run:
                print(f"dry run: would send {words(goal)}{'  clipped: ' + ', '.join(why) if why else ''}")
            else:
                self._send(goal)
            now, due = self.clock.monotonic(), self.tick + 1 / FPS
            self.tick = max(
                due, now + 0.5 / FPS
            )  # time that the policy took counts, but a target holds for half a period at least
            self.late = self.tick - due
            self.clock.sleep(self.tick - now)
            self._read()
        except ArmError as error:
            self._give_up(error)
        self.steps += 1
        terminated = self.success = bool(self.judge and self.judge())
        return terminated, self.steps >= self.limit and not terminated

    def _give_up(self, error):
        self._stop()
        raise ArmError(f"the arm was stopped: {error}; check power and cables, then start again") from None

    def _obs(self):
        images = {}
        for view, camera in self.cameras.items():
            try:
                frame = camera.async_read(timeout_ms=STALE * 1000)  # (height, width, 3) RGB
            except Exception as error:
                self._stop()
                raise ArmError(
                    f"camera {view} delivers no new pictures ({one_line(error)}); the arm was stopped: check the cable, then start again"
                ) from None
            now, known = self.clock.monotonic(), self.shown.get(view)
            if known is None or not np.array_equal(frame, known[0]):
                self.shown[view] = frame, self.measured, now
            elif now - known[2] > STALE and np.abs(self.measured - known[1])[:5].max() > 5:
                self._stop()
                raise ArmError(
                    f"camera {view} shows the same picture since {now - known[2]:.1f} s although the arm moved; the arm was stopped: "
                    "unplug the camera and plug it in again"
                )
            self.frames[view] = frame
            images[view] = square(Image.fromarray(frame), self.px, "crop")
        return {"images": images, "state": self.measured.astype(np.float32), "task": self.task}

    def _info(self, executed, before):
        return {
            "success": self.success,
            "reason": "",
            "steps": self.steps,
            "executed": executed,
            "failure": "",
            "clipped": list(self.clipped),
            "faults": self.faults[before:],
            "late": self.late,
        }

    def render(self, px=256, camera="front"):
        """The last picture of a camera, larger: (px, px, 3) uint8."""
        return square(Image.fromarray(self.frames[camera]), px, "crop")

    def close(self):
        """Fold up slowly, switch off torque, close cameras and port. Safe to call twice; any exit but kill -9 calls it."""
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)
        try:
            if self.powered and not self.broken:
                self._recover()  # a Ctrl-C may have come in mid packet
                if not self._way(REST)[1]:
                    self._calmly(HOME)
                self._calmly(REST)
        except BaseException as error:  # also a second, impatient Ctrl-C: let go at once
            self._report(f"not folded up: {one_line(error) or type(error).__name__}")
        finally:
            numbers = (
                (signal.SIGINT, signal.SIGTERM)
                if threading.current_thread() is threading.main_thread()
                else ()
            )
            handlers = [
                signal.signal(number, signal.SIG_IGN) for number in numbers
            ]  # nothing may come between the arm and its release
            if self.bus is not None:
                self._release()  # also when the port is gone: it may have come back
            for disconnect in (
                lambda: self.bus.disconnect(disable_torque=False),
                *(camera.disconnect for camera in self.cameras.values()),
            ):
                with contextlib.suppress(Exception):  # what was never opened, or has gone
                    disconnect()
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler or signal.SIG_DFL)


class Keys:
    """Key presses of the person beside the arm: without Enter on a terminal, else (a pipe) the next character."""

    def __init__(self):
        self.fd, self.before = sys.stdin.fileno(), None
        if sys.stdin.isatty():
            import termios
            import tty

            self.before = termios.tcgetattr(self.fd)
            tty.setcbreak(self.fd)
            atexit.register(self.close)

    def pressed(self, patience=0.0):
        """The next key if there is one within `patience` seconds (None: however long that takes), else an empty string."""
        if not select.select([self.fd], [], [], patience)[0]:
            return ""
        key = os.read(self.fd, 1).decode(errors="replace")
        if not key:
            raise ArmError("nobody is at the keyboard to begin and judge the episodes")
        return key

    def wait(self, keys):
        while self.pressed(None) not in keys:
            pass

    def close(self):
        if self.before:
            import termios

            termios.tcsetattr(self.fd, termios.TCSADRAIN, self.before)
            self.before = None


class PracticeEnv(RealEnv):
    """A real arm whose episodes a person begins and judges, as rl.py practises on it: Enter begins, y is success, n failure.

    instruction: what every episode asks for. An episode that nobody judges fails at the time limit.
    """

    def __init__(self, port, cameras, name="", instruction="", limit=200, **more):
        self.instruction, self.longest, self.keys = instruction, limit, Keys()
        super().__init__(port, cameras, name, limit=limit, judge=self.verdict, **more)

    def reset(self, *, seed=None, options=None):
        """Let the person lay out the scene, then begin -> obs, info. Seed and options are the simulation's, and ignored."""
        self.rest()
        print(
            f"\nlay out the scene for: {self.instruction}\nkeep clear of the arm and press Enter; then y: done, n: failed",
            flush=True,
        )
        self.keys.wait("\r\n")
        self.limit = self.longest
        return super().reset(options={"task": self.instruction})

    def verdict(self):
        key = self.keys.pressed()
        if key == "n":
            self.limit = self.steps  # no more time
        return key == "y"

    def close(self):
        super().close()
        self.keys.close()


def by_flags(cls, cfg, views, **more):
    """An arm by a program's flags --port, --id, --front, --wrist and --task. views: the cameras that the policy looks through."""
    if missing := [f"--{view}=" for view in views if not getattr(cfg, view, "")]:
        raise ValueError(
            f"the policy looks through {views}: type {' and '.join(missing)} with the number that lerobot-find-cameras opencv says"
        )
    if not cfg.task.strip() and not getattr(cfg, "interactive", False):
        raise ValueError('the real arm needs an instruction, like "put the red cube on the blue pad"')
    return cls(cfg.port, {view: getattr(cfg, view) for view in views}, cfg.id, **more)


def one_line(error):
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def words(position):
    """A position (6,) to read: shoulder_pan -6.9, ..."""
    return ", ".join(f"{motor} {p:.1f}" for motor, p in zip(MOTORS, position))


def find_calibration(name=""):
    """The file that lerobot-calibrate wrote for the robot id `name`, or the only one there is."""
    from lerobot.utils import constants

    folders = [
        constants.HF_LEROBOT_CALIBRATION / constants.ROBOTS / kind
        for kind in ("so_follower", "so100_follower", "so101_follower")
    ]
    found = [path for folder in folders for path in sorted(folder.glob("*.json")) if name in ("", path.stem)]
    if not found:
        raise FileNotFoundError(
            f"no calibration {f'of {name} ' if name else ''}in {folders[0].parent}: "
            f"type lerobot-calibrate --robot.type=so100_follower --robot.port=... --robot.id={name or 'my_arm'}"
        )
    if len({path.stem for path in found}) > 1:
        raise ValueError(
            f"several arms are calibrated: type --id= one of {', '.join(sorted({path.stem for path in found}))}"
        )
    return found[0]


def limits_of(path, again):
    """Lowest and highest targets, each (6,): the arm's joint limits, and the calibrated range less a degree at each end."""
    try:
        ranges = json.loads(path.read_text())
        width = (
            np.array([ranges[motor]["range_max"] - ranges[motor]["range_min"] for motor in MOTORS])
            * 360
            / 4095
        )  # degrees
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no calibration of an SO-100 or SO-101 ({one_line(error)}): {again}"
        ) from None
    nominal = np.append(
        (HIGH - LOW)[:5], math.degrees(1.924)
    )  # the gripper's 0..100 are 110 degrees of its servo
    if (bad := (width < 0.6 * nominal) | (width > nominal + 60)).any():
        j = int(bad.argmax())
        raise ValueError(
            f"{path} says that {MOTORS[j]} turns by {width[j]:.0f} degrees, an SO-100's turns by {nominal[j]:.0f}: "
            f"calibrate anew and move it from end to end, {again} and then c"
        )
    low, high = np.maximum(LOW, 1 - width / 2), np.minimum(HIGH, width / 2 - 1)
    low[5], high[5] = 0, 100
    return low, high
