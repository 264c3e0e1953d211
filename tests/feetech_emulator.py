"""A servo bus and two cameras without hardware: LeRobot's unmodified driver talks to MuJoCo's arm.

    python tests/feetech_emulator.py out/small 300   # a policy in sim_env and through LeRobot's driver

Three things are replaced. The serial port is a pseudo terminal that answers Feetech's protocol as six STS3215
servos do; for long runs it is a class in the place of pyserial's. cv2.VideoCapture is a class that hands over
rendered pictures. real_env's clock is the emulator's: the arm moves while real_env sleeps. Everything between
is what runs on a real arm: LeRobot's motor bus, its camera class with its threads, servo SDK and pyserial.
"""

import atexit
import functools
import json
import os
import pty
import select
import signal
import sys
import tempfile
import threading
import time
import tty
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import fast_cpu
from evaluate import Episode, SingleEnv, make_env, percent, policy_fn, run_episodes, wilson
from extras import real_env
from sim_env import CAMERAS, LIMIT, MOTORS, SEEDS, SO100Env, mujoco, to_qpos

# Instructions of the protocol
PING = 1
READ = 2
WRITE = 3
SYNC_READ = 0x82
SYNC_WRITE = 0x83

# Registers
FIRMWARE = 0  # two bytes
MODEL = 3
ID = 5
MIN = 9
MAX = 11
HOMING = 31
TORQUE = 40
GOAL = 42
SPEED = 46
TORQUE_LIMIT = 48
LOCK = 55
PRESENT = 56
VOLTAGE = 62
TEMPERATURE = 63

TICK = 0.004  # seconds of a physics step
TIMEOUT = 0.05  # seconds that the driver waits for an answer that does not come
TASK = "put the red cube on the blue pad"


def servo_calibration(number: int, offset: int, low: int, high: int) -> dict[str, int]:
    """One motor's entry of the file that lerobot-calibrate writes; encoder ticks."""
    return {"id": number, "drive_mode": 0, "homing_offset": offset, "range_min": low, "range_max": high}


CALIBRATION = {
    "shoulder_pan": servo_calibration(1, 310, 795, 3301),
    "shoulder_lift": servo_calibration(2, -1020, 905, 3190),
    "elbow_flex": servo_calibration(3, 95, 930, 3094),
    "wrist_flex": servo_calibration(4, -14, 967, 3127),
    "wrist_roll": servo_calibration(5, 1511, 0, 4095),
    "gripper": servo_calibration(6, -700, 2010, 3262),
}


def signed(value: int, bit: int) -> int:
    """A register's content -> number. These servos write negative numbers as sign bit and magnitude."""
    magnitude = value & (1 << bit) - 1
    return -magnitude if value >> bit & 1 else magnitude


def unsigned(value: int, bit: int) -> int:
    """A number -> register's content."""
    return abs(int(value)) | (value < 0) << bit


def checksum(body: bytes) -> int:
    """The last byte of a packet; body: everything between the two header bytes and it."""
    return ~sum(body) & 255


def no_fault(instruction: int) -> None:
    """What befalls a packet: nothing."""


class Emulator:
    """Six servos around the arm of a SO100Env that was reset, and its clock and cameras.

    fault: function of an instruction (PING ...) that says what befalls its packet. None: nothing, "lost": no
    servo hears it, "silent": it is obeyed, but the last answer is lost, "corrupt": a bit of the answer, or of
    a group write, flips, "absurd": a valid packet with a wrong position. dead: names of servos that neither
    obey nor answer. camera_fault: {camera: "frozen" or "silent"}. camera_rate: frames a
    second that the driver names.
    goals: every target that reached a servo, as (motor, measured position, target). trace: the arm's position
    (6,) after every TICK.
    """

    def __init__(self, sim: SO100Env, calibration: dict = CALIBRATION, seed: int = 0):
        self.sim = sim
        self.calibration = calibration
        self.rng = np.random.default_rng(seed)
        self.fault: Callable[[int], str | None] = no_fault
        self.injected = []  # the faults so far
        self.dead = set()
        self.camera_fault = {}
        self.camera_rate = 30.0
        self.counts = Counter()  # packets by instruction
        self.goals = []
        self.trace = []
        self.lock = threading.RLock()
        self.now = 0.0  # seconds
        self.owed = 0.0  # seconds by which the physics is behind the clock, less than a TICK
        self.withheld = False  # the driver waits for an answer in vain
        self.waited = 0.0  # seconds that it has waited so
        self.gain = sim.model.actuator_gainprm.copy()
        self.bias = sim.model.actuator_biasprm.copy()
        self.memory = {motor: bytearray(128) for motor in calibration}
        for motor, c in calibration.items():
            self.put(motor, FIRMWARE, 3 + 256 * 10)
            self.put(motor, MODEL, 777)
            self.put(motor, ID, c["id"], 1)
            self.put(motor, MIN, c["range_min"])
            self.put(motor, MAX, c["range_max"])
            self.put(motor, HOMING, unsigned(c["homing_offset"], 11))
            self.put(motor, TORQUE_LIMIT, 1000)
            self.put(motor, LOCK, 1, 1)
            self.put(motor, VOLTAGE, 120, 1)
            self.put(motor, TEMPERATURE, 30, 1)
        self.port = os.path.join(tempfile.mkdtemp(), "ttyACM0")
        self.frames = {}  # camera -> its newest picture, BGR
        self.version = 0  # of the pictures
        self.captures = []
        self.drawn = -1.0  # when the pictures were drawn
        self.changed = threading.Condition()
        self.plug()
        self.settle()

    # -- time ------------------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return self.now

    def driver_time(self) -> float:
        """The clock of the driver's time-outs. It leaps when an answer is missing, else it creeps.

        On a busy machine a late answer is then not taken for a bad cable.
        """
        return time.process_time() / 10 + self.waited

    def sleep(self, seconds: float) -> None:
        """The physics goes on for so long; then the cameras see it."""
        time.sleep(0.002)  # late answers of the pseudo terminal arrive
        self.advance(seconds)
        if self.now - self.drawn > 1 / 31:
            self.draw()

    def advance(self, seconds: float) -> None:
        """The physics goes on for so long."""
        with self.lock:
            self.owed += seconds
            n = round(self.owed / TICK)
            self.owed -= n * TICK
            self.now += n * TICK
            for _ in range(n):
                self.tick()
            mujoco.mj_forward(self.sim.model, self.sim.data)

    def tick(self) -> None:
        """One step of physics. A servo's inner target moves to its target at the speed that is allowed."""
        ticks = np.array([self.get(motor, SPEED) for motor in MOTORS])  # encoder ticks/s
        step = ticks * 2 * np.pi / 4096 * TICK  # radians
        target = [self.position_of(motor, GOAL) for motor in MOTORS]
        target = to_qpos(np.clip(target, *self.range()))
        inner = self.sim.data.ctrl
        limited = inner + np.clip(target - inner, -step, step)
        inner[:] = np.where(step > 0, limited, target)
        mujoco.mj_step(self.sim.model, self.sim.data)
        self.trace.append(self.sim.position())

    def settle(self) -> None:
        """After the simulation was reset: torque as it is, targets where the arm stands."""
        with self.lock:
            for motor, position in zip(MOTORS, self.sim.position()):
                self.put(motor, GOAL, unsigned(self.ticks(motor, position), 15))
        self.draw()

    # -- servos ----------------------------------------------------------------------------------------------

    def put(self, motor: str, register: int, value: int, size: int = 2) -> None:
        self.memory[motor][register : register + size] = int(value).to_bytes(size, "little")

    def get(self, motor: str, register: int, size: int = 2) -> int:
        return int.from_bytes(self.memory[motor][register : register + size], "little")

    def ticks(self, motor: str, position: float) -> int:
        """LeRobot units -> encoder ticks with homing applied, by the calibration the arm was built with."""
        c = self.calibration[motor]
        if motor == "gripper":
            return round(c["range_min"] + position / 100 * (c["range_max"] - c["range_min"]))
        return round((c["range_min"] + c["range_max"]) / 2 + position * 4095 / 360)

    def position_of(self, motor: str, register: int) -> float:
        """A register's ticks -> LeRobot units. A homing offset unlike the calibration's moves the zero."""
        c = self.calibration[motor]
        ticks = signed(self.get(motor, register), 15)
        ticks += signed(self.get(motor, HOMING), 11) - c["homing_offset"]
        if motor == "gripper":
            return 100 * (ticks - c["range_min"]) / (c["range_max"] - c["range_min"])
        return (ticks - (c["range_min"] + c["range_max"]) / 2) * 360 / 4095

    def range(self) -> list[np.ndarray]:
        """What the servos' own limit registers allow, in LeRobot units: lowest and highest, each (6,)."""
        return [np.array([self.position_of(motor, register) for motor in MOTORS]) for register in (MIN, MAX)]

    def read(self, motor: str, register: int, size: int) -> bytes:
        """Some bytes of a servo's memory. The present position is measured when it is asked for."""
        if register == PRESENT:
            position = self.sim.position()[MOTORS.index(motor)]
            encoder = self.ticks(motor, position) + self.calibration[motor]["homing_offset"]
            self.put(motor, PRESENT, unsigned(encoder - signed(self.get(motor, HOMING), 11), 15))
        return bytes(self.memory[motor][register : register + size])

    def write(self, motor: str, register: int, data: bytes) -> None:
        """Some bytes into a servo's memory; a new torque switches the actuator."""
        j = MOTORS.index(motor)
        before = self.memory[motor][TORQUE]
        self.memory[motor][register : register + len(data)] = bytes(data)
        if register == GOAL:
            self.goals.append((motor, self.position_of(motor, PRESENT), self.position_of(motor, GOAL)))
        if register == TORQUE and bool(before) != bool(data[0]):
            self.sim.model.actuator_gainprm[j] = self.gain[j] * bool(data[0])
            self.sim.model.actuator_biasprm[j] = self.bias[j] * bool(data[0])
            self.sim.data.ctrl[j] = self.sim.data.qpos[j]

    def torque(self) -> list[str]:
        """Motors whose torque is on."""
        return [motor for motor in MOTORS if self.memory[motor][TORQUE]]

    # -- the bus ---------------------------------------------------------------------------------------------

    def plug(self) -> None:
        """Plug in the cable: a new pseudo terminal under the old name, and a thread that answers."""
        self.master, slave = pty.openpty()
        for end in (self.master, slave):
            tty.setraw(end)
        if os.path.islink(self.port):
            os.unlink(self.port)
        os.symlink(os.ttyname(slave), self.port)
        self.pulled = threading.Event()
        self.thread = threading.Thread(target=self.serve, args=(self.master, slave, self.pulled), daemon=True)
        self.thread.start()

    def unplug(self) -> None:
        """Pull the cable: the port is gone, the servos stay powered and go to their last target."""
        self.pulled.set()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def serve(self, master: int, slave: int, pulled: threading.Event) -> None:
        """Body of the thread that answers at the pseudo terminal."""
        buffer = bytearray()
        while not pulled.is_set():
            if select.select([master], [], [], 0.02)[0]:
                buffer += os.read(master, 4096)
                os.write(master, self.hear(buffer))
                if self.withheld:
                    time.sleep(0.001)  # the driver looks at its clock when it has sent
                    self.wait_in_vain()
        os.unlink(self.port)
        os.close(master)
        os.close(slave)

    def wait_in_vain(self) -> None:
        """The driver's clock leaps beyond its time-out."""
        self.waited += TIMEOUT + 0.01
        self.withheld = False

    def hear(self, buffer: bytearray) -> bytes:
        """Take whole packets out of the bytes that the driver has sent -> the servos' answers."""
        answers = b""
        while len(buffer) >= 6:
            if buffer[:2] != b"\xff\xff":
                del buffer[0]
                continue
            length = buffer[3] + 4
            if len(buffer) < length:
                break
            packet = bytes(buffer[:length])
            del buffer[:length]
            if checksum(packet[2:-1]) == packet[-1]:
                with self.lock:
                    answers += self.answer(packet[2], packet[4], packet[5:-1])
        return answers

    def answer(self, target: int, instruction: int, parameters: bytes) -> bytes:
        """What the servos say to one packet, faults included."""
        self.counts[instruction] += 1
        kind = self.fault(instruction)
        if kind and (instruction != SYNC_WRITE or self.changes_a_register(*parameters)):
            self.injected.append(kind)
        names = {c["id"]: motor for motor, c in self.calibration.items() if motor not in self.dead}
        asked = [target]
        if instruction == SYNC_READ:
            asked = parameters[2:]
        elif instruction == SYNC_WRITE:
            asked = []  # nobody answers a group write
        faulty = kind in ("lost", "silent", "corrupt")
        self.withheld = (faulty and bool(asked)) or any(i not in names for i in asked)
        # a servo drops a packet whose checksum is wrong
        if kind == "lost" or (kind == "corrupt" and instruction == SYNC_WRITE):
            if asked:
                self.advance(TIMEOUT)  # the arm moves on while the driver waits
            return b""
        answers = self.obey(names, target, instruction, parameters)
        return b"".join(self.packets(answers, kind))

    def obey(self, names: dict[int, str], target: int, instruction: int, parameters: bytes) -> list[tuple]:
        """Read or write registers of the servos {id: motor} -> [(id, data), ...], their answers."""
        if instruction == SYNC_WRITE:
            register, size = parameters[:2]
            for k in range(2, len(parameters), size + 1):
                if parameters[k] in names:
                    self.write(names[parameters[k]], register, parameters[k + 1 : k + 1 + size])
            return []
        if instruction == SYNC_READ:
            return [(i, self.read(names[i], *parameters[:2])) for i in parameters[2:] if i in names]
        if target not in names:
            return []
        data = b""
        if instruction == READ:
            data = self.read(names[target], *parameters)
        elif instruction == WRITE:
            self.write(names[target], parameters[0], parameters[1:])
        return [(target, data)]

    def packets(self, answers: list[tuple], kind: str | None) -> list[bytearray]:
        """Answers [(id, data), ...] as packets, spoilt by a fault of that kind."""
        if kind == "absurd":
            i, data = answers[-2]  # not the gripper, whose readings LeRobot clips
            answers[-2] = i, bytes([data[0], data[1] ^ 8])  # half a turn off
        packets = []
        for i, data in answers:
            body = bytes([i, len(data) + 2, 0]) + data
            packets.append(bytearray(b"\xff\xff" + body + bytes([checksum(body)])))
        if kind == "silent":
            packets.pop()
            self.advance(TIMEOUT)
        elif kind == "corrupt":
            packet = packets[self.rng.integers(len(packets))]
            packet[self.rng.integers(2, len(packet))] ^= 1 << self.rng.integers(8)
        return packets

    def changes_a_register(self, register: int, size: int, *data: int) -> bool:
        """Does a group write say anything that the servos do not hold? If not, its loss changes nothing."""
        names = {c["id"]: motor for motor, c in self.calibration.items()}
        for k in range(0, len(data), size + 1):
            held = self.get(names[data[k]], register, size)
            if abs(int.from_bytes(data[k + 1 : k + 1 + size], "little") - held) > 1:
                return True
        return False

    # -- cameras ---------------------------------------------------------------------------------------------

    def draw(self) -> None:
        """Render both cameras, and wait until LeRobot's threads have fetched the pictures.

        Simulated time does not run on meanwhile.
        """
        pictures = self.pictures()
        self.drawn = self.now
        with self.changed:
            for camera, picture in pictures.items():
                self.frames[camera] = picture[..., ::-1].copy()
            self.version += 1
            self.changed.notify_all()
            self.changed.wait_for(self.all_fetched, timeout=1)

    def pictures(self) -> dict[str, np.ndarray]:
        """What the cameras see, each (px, px * 4 / 3, 3): sim_env's squares, with margins to be cropped."""
        side = self.sim.px // 6
        images = self.sim._obs()["images"]
        return {
            camera: np.pad(image, ((0, 0), (side, side), (0, 0)), "edge") for camera, image in images.items()
        }

    def all_fetched(self) -> bool:
        """Has every camera's thread stored the newest picture?"""
        return all(c.stored >= self.version for c in self.captures if c.camera not in self.camera_fault)

    def close(self) -> None:
        self.unplug()
        self.sim.close()


def capture_class(emulator: Emulator) -> type:
    """A class to put in the place of cv2.VideoCapture. Camera 0 is front, 2 is wrist, no other opens."""
    import cv2

    class Capture:
        def __init__(self, index: int, backend: int = 0):
            self.camera = {0: "front", 2: "wrist"}.get(index)
            self.seen = 0  # version of the last picture that was handed over
            self.stored = 0  # version of the last one that LeRobot's thread has stored
            if self.camera:
                emulator.captures.append(self)

        def is_opened(self) -> bool:
            return self.camera is not None

        def set(self, key: int, value: float) -> bool:
            return True

        def get(self, key: int) -> float:
            height, width, _ = emulator.frames[self.camera].shape
            sizes = {
                cv2.CAP_PROP_FRAME_WIDTH: width,
                cv2.CAP_PROP_FRAME_HEIGHT: height,
                cv2.CAP_PROP_FPS: emulator.camera_rate,
            }
            return sizes.get(key, 0)

        def read(self) -> tuple[bool, np.ndarray]:
            fault = emulator.camera_fault.get(self.camera)
            with emulator.changed:
                self.stored = self.seen  # whoever asks again has stored what it got
                emulator.changed.notify_all()
                emulator.changed.wait_for(lambda: emulator.version > self.seen or fault, timeout=1 / 30)
                if not fault:
                    self.seen = emulator.version
                    self.frame = emulator.frames[self.camera]
            if fault == "silent":
                threading.Event().wait(0.7)  # the device waits for a picture that does not come
            elif fault:
                threading.Event().wait(1 / 30)
            return fault != "silent", self.frame.copy()

        def release(self) -> None:
            if self in emulator.captures:
                emulator.captures.remove(self)
            self.camera = None

    Capture.isOpened = Capture.is_opened  # cv2's name
    return Capture


def serial_class(emulator: Emulator) -> type:
    """A class to put in the place of serial.Serial: the servos without the pseudo terminal and its thread."""

    class Serial:
        def __init__(self, port: str, **_: Any):
            self.sent = bytearray()
            self.received = bytearray()

        def write(self, packet: bytes) -> int:
            self.sent += bytes(packet)
            self.received += emulator.hear(self.sent)
            return len(packet)

        def read(self, length: int) -> bytes:
            if not self.received and emulator.withheld:
                emulator.waited += TIMEOUT + 0.01
            taken = bytes(self.received[:length])
            del self.received[:length]
            return taken

        def reset_input_buffer(self) -> None:
            self.received.clear()

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    return Serial


def install(emulator: Emulator, folder: str | Path, monkeypatch: Any = None, terminal: bool = True) -> Path:
    """Put clock and cameras in place and write the calibration where LeRobot keeps it -> the file.

    RealEnv then finds an arm at emulator.port. terminal=False replaces pyserial as well, for long runs: there
    are no pseudo terminal and no threads that wait for each other.
    """
    import cv2
    import scservo_sdk.port_handler
    from lerobot.utils import constants

    put = monkeypatch.setattr if monkeypatch else setattr
    put(real_env, "time", emulator)
    put(cv2, "VideoCapture", capture_class(emulator))
    put(scservo_sdk.port_handler, "time", SimpleNamespace(time=emulator.driver_time))
    put(constants, "HF_LEROBOT_CALIBRATION", Path(folder))
    if not terminal:
        put(scservo_sdk.port_handler.serial, "Serial", serial_class(emulator))
    path = Path(folder, constants.ROBOTS, "so_follower", "emulated.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(emulator.calibration))
    return path


def emulated_arm(folder: str | Path, monkeypatch: Any = None, terminal: bool = True) -> Emulator:
    """An emulated arm in a scene, installed."""
    sim = SO100Env(px=48)
    sim.reset(seed=SEEDS["report"][0])
    emulator = Emulator(sim)
    emulator.file = install(emulator, folder, monkeypatch, terminal)
    return emulator


# ------------------------------------------------------------------------------------------------------------
# A policy in sim_env and through LeRobot's driver


class EmulatedEnv(real_env.RealEnv):
    """RealEnv on an emulated arm: the simulation lays out the scenes and judges.

    px: side of the images. reasons: why targets were limited, counted.
    """

    def __init__(self, emulator: Emulator, px: int, limit: int):
        self.emulator = emulator
        self.world = emulator.sim
        self.reasons = Counter()
        height, width, _ = emulator.frames["front"].shape
        super().__init__(emulator.port, {"front": 0, "wrist": 2}, px=px, limit=limit, size=(width, height))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        self.world.reset(seed=seed, options=options)
        self.emulator.settle()
        self.home = self.world.position()  # the scene's own first pose, so that both begin alike
        return super().reset(options={"task": self.world.task})

    def judge(self) -> bool | None:
        return self.world._judge() or None

    def _limited(self, action: np.ndarray) -> tuple[np.ndarray, list[str]]:
        target, why = super()._limited(action)
        self.reasons.update(why)
        return target, why


def compare(run: str, n: int = 100, family: str = "place") -> None:
    """The same scenes in sim_env and through RealEnv and LeRobot's driver; prints both success rates."""
    from model import load_policy

    fast_cpu(1)
    policy = load_policy(run)
    px = policy.cfg.image_size
    world = make_env("sim", px)
    world.reset(seed=SEEDS["report"][0], options={"family": family})
    emulator = Emulator(world)
    install(emulator, tempfile.mkdtemp(), terminal=False)
    arm = EmulatedEnv(emulator, px, LIMIT[family])
    simulated = SingleEnv(make_env("sim", px), px, CAMERAS, policy.cfg.state_dim)
    real = SingleEnv(arm, px, CAMERAS, policy.cfg.state_dim)
    won = {"sim_env": [], "real_env": []}
    with simulated, real:
        for seed in SEEDS["report"][:n]:
            line = f"{seed}"
            for name, vec in (("sim_env", simulated), ("real_env", real)):
                episode = Episode(seed, {"family": family})
                run_episodes(vec, [episode], policy_fn(policy))  # of the same noise in both
                won[name].append(episode.success)
                line += f"   {name} {'yes' if episode.success else 'no':3s} {episode.steps:3d} steps"
            print(line, flush=True)
    emulator.close()
    for name, successes in won.items():
        low, high = wilson(sum(successes), n)
        share = sum(successes) / n
        print(f"{name:9s} {percent(share)} % of {n} ({percent(low)} - {percent(high)})")
    pairs = Counter(zip(won["sim_env"], won["real_env"]))
    print(f"only in sim_env {pairs[True, False]}, only in real_env {pairs[False, True]}")
    print(f"limited targets: {dict(arm.reasons)}; bus faults: {len(arm.faults)}")


# ------------------------------------------------------------------------------------------------------------
# Programs of tests/test_real_env.py, each in a process of its own


def die_without_closing(folder: str) -> None:
    """An error in mid episode; after the interpreter's exit hooks it prints the arm's state."""
    arm = emulated_arm(folder)
    atexit.register(print_state, arm)
    env = real_env.RealEnv(arm.port, {"front": 0}, px=48, size=(64, 48))
    env.reset(options={"task": TASK})
    env.step(real_env.HOME)
    raise ZeroDivisionError


def print_state(arm: Emulator) -> None:
    """Which motors hold, and is the arm in its rest pose?"""
    at_rest = np.abs(arm.sim.position() - real_env.REST).max() < 4
    print(f"torque {arm.torque()} rest {bool(at_rest)}", flush=True)


def practise(folder: str, *argv: str) -> None:
    """rl.py on an emulated arm; an episode ends when it is judged."""
    import rl

    signal.alarm(300)
    arm = emulated_arm(folder)
    real_env.JudgedEnv = functools.partial(real_env.JudgedEnv, size=(64, 48), limit=10**6)
    rl.main([*argv, f"--port={arm.port}"])
    print_state(arm)


if __name__ == "__main__":
    compare(sys.argv[1], *map(int, sys.argv[2:3]), *sys.argv[3:])
