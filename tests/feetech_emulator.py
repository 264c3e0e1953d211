"""A servo bus and two cameras without hardware: LeRobot's unmodified driver talks to MuJoCo's arm through a pseudo terminal.

    python tests/feetech_emulator.py out/small 100      # success of a policy in sim_env and through LeRobot's driver, same seeds

The seams are the serial port (a pseudo terminal that answers Feetech's protocol like six STS3215 servos; for long runs, pyserial's class)
and cv2.VideoCapture (replaced by a class that hands over rendered pictures). Everything between, LeRobot's motor bus, its camera class with
its threads, the servo SDK and pyserial, is what runs on a real arm. Time is simulated: the arm moves while RealEnv sleeps on this emulator's clock.
"""

import json
import os
import pty
import select
import sys
import tempfile
import threading
import time
import tty
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sim_env import LIMIT, MOTORS, SEEDS, SO100Env, mujoco, to_qpos, wilson

PING, READ, WRITE, SYNC_READ, SYNC_WRITE = 1, 2, 3, 0x82, 0x83
MODEL, ID, MIN, MAX, HOMING, TORQUE, GOAL, SPEED, PRESENT, VOLTAGE, TEMPERATURE = (
    3,
    5,
    9,
    11,
    31,
    40,
    42,
    46,
    56,
    62,
    63,
)  # registers
TICK = 0.004  # seconds of a physics step
CALIBRATION = {
    motor: {
        "id": i,
        "drive_mode": 0,
        "homing_offset": offset,
        "range_min": low,
        "range_max": high,
    }  # as lerobot-calibrate writes it
    for i, (motor, offset, low, high) in enumerate(
        zip(
            MOTORS,
            (310, -1020, 95, -14, 1511, -700),
            (795, 905, 930, 967, 0, 2010),
            (3301, 3190, 3094, 3127, 4095, 3262),
        ),
        1,
    )
}


def signed(value, bit):
    """Sign and magnitude, as these servos write negative numbers."""
    return -(value & (1 << bit) - 1) if value >> bit & 1 else value


def unsigned(value, bit):
    return abs(int(value)) | (value < 0) << bit


class Emulator:
    """Six servos around the arm of a SO100Env that was reset, and its clock and cameras.

    fault: function of an instruction (PING ...) that says what befalls it: None, "lost" (no servo hears it), "silent" (obeyed, but
    the last answer is lost), "corrupt" (a bit of the answer, or of a group write, flips) or "absurd" (a wrong position, valid packet).
    dead: names of servos that neither obey nor answer. camera_fault: {camera: "frozen" or "silent"}.
    """

    def __init__(self, sim, calibration=CALIBRATION, seed=0):
        self.sim, self.calibration, self.rng = sim, calibration, np.random.default_rng(seed)
        self.fault, self.injected, self.dead, self.camera_fault, self.counts = (
            lambda instruction: None,
            [],
            set(),
            {},
            {},
        )
        self.goals, self.trace = (
            [],
            [],
        )  # every target that reached a servo, as (motor, last measured position, target), and where the arm was at every TICK
        self.lock, self.now, self.owed = threading.RLock(), 0.0, 0.0
        self.withheld, self.waited = False, 0.0  # is the driver waiting in vain? seconds that it has
        self.gain, self.bias = sim.model.actuator_gainprm.copy(), sim.model.actuator_biasprm.copy()
        self.memory = {}
        for motor, c in calibration.items():
            self.memory[motor] = memory = bytearray(128)
            memory[0], memory[1], memory[ID], memory[55], memory[VOLTAGE], memory[TEMPERATURE] = (
                3,
                10,
                c["id"],
                1,
                120,
                30,
            )
            for register, value in (
                (MODEL, 777),
                (MIN, c["range_min"]),
                (MAX, c["range_max"]),
                (HOMING, unsigned(c["homing_offset"], 11)),
                (48, 1000),
            ):
                self.put(motor, register, value)
        self.port = os.path.join(tempfile.mkdtemp(), "ttyACM0")
        self.frames, self.version, self.captures, self.drawn = {}, 0, [], -1.0
        self.changed = threading.Condition()
        self.plug()
        self.settle()

    # -- time ---------------------------------------------------------------------------------------------------

    def monotonic(self):
        return self.now

    def driver_time(self):
        """The clock of the driver's time-outs: it leaps when an answer is missing, else it creeps: a busy machine is no bad cable."""
        return time.process_time() / 10 + self.waited

    def sleep(self, seconds):
        """The physics goes on for so long; then the cameras see it."""
        self.advance(seconds)
        if self.now - self.drawn > 1 / 31:
            self.draw()

    def advance(self, seconds):
        with self.lock:
            self.owed += seconds
            n = round(self.owed / TICK)
            self.owed -= n * TICK
            self.now += n * TICK
            for _ in range(n):
                # a servo's own speed limit: its inner target moves that fast, from wherever it was
                speed = np.array([self.get(motor, SPEED) for motor in MOTORS]) * 2 * np.pi / 4096 * TICK
                goal, now = (
                    to_qpos(np.clip([self.position_of(motor, GOAL) for motor in MOTORS], *self.range)),
                    self.sim.data.ctrl,
                )
                now[:] = np.where(speed > 0, now + np.clip(goal - now, -speed, speed), goal)
                mujoco.mj_step(self.sim.model, self.sim.data)
                self.trace.append(self.sim.position())
            mujoco.mj_forward(self.sim.model, self.sim.data)

    def settle(self):
        """After the simulation was reset: torque as it is, targets where the arm stands."""
        with self.lock:
            for motor, position in zip(MOTORS, self.sim.position()):
                self.put(motor, GOAL, unsigned(self.ticks(motor, position), 15))
        self.draw()

    # -- servos -------------------------------------------------------------------------------------------------

    def put(self, motor, register, value, size=2):
        self.memory[motor][register : register + size] = int(value).to_bytes(size, "little")

    def get(self, motor, register, size=2):
        return int.from_bytes(self.memory[motor][register : register + size], "little")

    def ticks(self, motor, position):
        """LeRobot units -> encoder ticks, homing applied, by the calibration that the arm was given when it was built."""
        c = self.calibration[motor]
        if motor == "gripper":
            return round(c["range_min"] + position / 100 * (c["range_max"] - c["range_min"]))
        return round((c["range_min"] + c["range_max"]) / 2 + position * 4095 / 360)

    def position_of(self, motor, register):
        c, ticks = self.calibration[motor], signed(self.get(motor, register), 15)
        ticks += (
            signed(self.get(motor, HOMING), 11) - c["homing_offset"]
        )  # other offsets than those it was calibrated with move its zero
        if motor == "gripper":
            return 100 * (ticks - c["range_min"]) / (c["range_max"] - c["range_min"])
        return (ticks - (c["range_min"] + c["range_max"]) / 2) * 360 / 4095

    @property
    def range(self):
        """What the servos' own limit registers allow, in LeRobot units: two arrays (6,)."""
        return [np.array([self.position_of(motor, register) for motor in MOTORS]) for register in (MIN, MAX)]

    def read(self, motor, register, size):
        j = MOTORS.index(motor)
        encoder = self.ticks(motor, self.sim.position()[j]) + self.calibration[motor]["homing_offset"]
        self.put(motor, PRESENT, unsigned(encoder - signed(self.get(motor, HOMING), 11), 15))
        return bytes(self.memory[motor][register : register + size])

    def write(self, motor, register, data):
        j, on = MOTORS.index(motor), self.memory[motor][TORQUE]
        self.memory[motor][register : register + len(data)] = bytes(data)
        if register == GOAL:
            self.goals.append((motor, self.position_of(motor, PRESENT), self.position_of(motor, GOAL)))
        if register == TORQUE and bool(on) != bool(data[0]):
            self.sim.model.actuator_gainprm[j] = self.gain[j] * bool(data[0])
            self.sim.model.actuator_biasprm[j] = self.bias[j] * bool(data[0])
            self.sim.data.ctrl[j] = self.sim.data.qpos[j]

    def torque(self):
        return [motor for motor in MOTORS if self.memory[motor][TORQUE]]

    # -- the bus ------------------------------------------------------------------------------------------------

    def plug(self):
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

    def unplug(self):
        """Pull the cable: the port is gone, the servos stay powered and go to their last target."""
        self.pulled.set()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def serve(self, master, slave, pulled):
        buffer = bytearray()
        while not pulled.is_set():
            if select.select([master], [], [], 0.02)[0]:
                buffer += os.read(master, 4096)
                os.write(master, self.hear(buffer))
                if self.withheld:
                    time.sleep(0.001)  # the driver looks at its clock when it has sent
                    self.waited, self.withheld = self.waited + 0.06, False
        os.unlink(self.port)
        os.close(master)
        os.close(slave)

    def hear(self, buffer):
        """Take whole packets out of a bytearray -> the servos' answers."""
        answers = b""
        while len(buffer) >= 6:
            if buffer[:2] != b"\xff\xff":
                del buffer[0]
                continue
            if len(buffer) < buffer[3] + 4:
                break
            packet = bytes(buffer[: buffer[3] + 4])
            del buffer[: len(packet)]
            if ~sum(packet[2:-1]) & 255 == packet[-1]:
                with self.lock:
                    answers += self.answer(packet[2], packet[4], packet[5:-1])
        return answers

    def serial_class(emulator):
        """A class to put in the place of serial.Serial: the same servos without the pseudo terminal, its thread and their waiting for each other."""

        class Serial:
            def __init__(self, port, **_):
                self.sent, self.received = bytearray(), bytearray()

            def write(self, packet):
                self.sent += bytes(packet)
                self.received += emulator.hear(self.sent)
                return len(packet)

            def read(self, length):
                if not self.received and emulator.withheld:
                    emulator.waited += 0.06
                taken = bytes(self.received[:length])
                del self.received[:length]
                return taken

            def reset_input_buffer(self):
                self.received.clear()

            def flush(self):
                pass

            close = flush

        return Serial

    def answer(self, target, instruction, parameters):
        """What the servos say to one packet, faults included, as bytes."""
        self.counts[instruction] = self.counts.get(instruction, 0) + 1
        kind = self.fault(instruction)
        if kind and (instruction != SYNC_WRITE or self.news(*parameters)):
            self.injected.append(kind)
        names = {c["id"]: motor for motor, c in self.calibration.items() if motor not in self.dead}
        asked = parameters[2:] if instruction == SYNC_READ else [] if instruction == SYNC_WRITE else [target]
        self.withheld = (
            bool(asked) and kind in ("lost", "silent", "corrupt") or any(i not in names for i in asked)
        )
        if (
            kind == "lost" or kind == "corrupt" and instruction == SYNC_WRITE
        ):  # a servo drops a packet whose checksum is wrong
            self.advance(
                0.05 if instruction != SYNC_WRITE else 0
            )  # the driver waits for the answer, the arm moves on
            return b""
        answers = []
        if instruction == SYNC_WRITE:
            register, size = parameters[:2]
            for k in range(2, len(parameters), size + 1):
                if parameters[k] in names:
                    self.write(names[parameters[k]], register, parameters[k + 1 : k + 1 + size])
        elif instruction == SYNC_READ:
            answers = [(i, self.read(names[i], *parameters[:2])) for i in parameters[2:] if i in names]
        elif target in names and instruction in (PING, READ):
            answers = [(target, self.read(names[target], *parameters) if instruction == READ else b"")]
        elif target in names and instruction == WRITE:
            self.write(names[target], parameters[0], parameters[1:])
            answers = [(target, b"")]
        if kind == "absurd":
            i, data = answers[-2]  # not the gripper, whose readings LeRobot clips
            answers[-2] = i, bytes([data[0], data[1] ^ 8])  # half a turn off
        packets = []
        for i, data in answers:
            body = bytes([i, len(data) + 2, 0]) + data
            packets.append(bytearray(b"\xff\xff" + body + bytes([~sum(body) & 255])))
        if kind == "silent":
            packets.pop()
            self.advance(0.05)
        elif kind == "corrupt":
            packet = packets[self.rng.integers(len(packets))]
            packet[self.rng.integers(2, len(packet))] ^= 1 << self.rng.integers(8)
        return b"".join(packets)

    def news(self, register, size, *data):
        """Does a group write say anything that the servos do not hold already? If not, its loss changes nothing."""
        names = {c["id"]: motor for motor, c in self.calibration.items()}
        rows = [data[k : k + size + 1] for k in range(0, len(data), size + 1)]
        return any(
            abs(int.from_bytes(row[1:], "little") - self.get(names[row[0]], register, size)) > 1
            for row in rows
        )

    # -- cameras ------------------------------------------------------------------------------------------------

    def draw(self):
        """Render both cameras, and wait until LeRobot's threads have fetched the pictures: simulated time does not run on meanwhile."""
        images = self.sim._obs()["images"]
        self.drawn = self.now
        with self.changed:
            side = self.sim.px // 6
            # sim_env draws squares, cameras deliver 4:3; the cropped margins are never seen
            self.frames = {
                camera: np.pad(image, ((0, 0), (side, side), (0, 0)), "edge")[..., ::-1].copy()
                for camera, image in images.items()
            }
            self.version += 1
            self.changed.notify_all()
            self.changed.wait_for(
                lambda: all(
                    c.stored >= self.version for c in self.captures if c.camera not in self.camera_fault
                ),
                timeout=1,
            )

    def capture_class(emulator, sources=None):
        """A class to put in the place of cv2.VideoCapture: `sources` {index: camera}, other indices do not open."""
        sources = {0: "front", 2: "wrist"} if sources is None else sources
        import cv2

        class Capture:
            def __init__(self, index, backend=0):
                self.camera, self.seen, self.stored, self.settings = sources.get(index), 0, 0, {}
                if self.camera:
                    emulator.captures.append(self)

            def isOpened(self):
                return self.camera is not None

            def set(self, key, value):
                self.settings[key] = value
                return True

            def get(self, key):
                height, width, _ = emulator.frames[self.camera].shape
                return {
                    cv2.CAP_PROP_FRAME_WIDTH: width,
                    cv2.CAP_PROP_FRAME_HEIGHT: height,
                    cv2.CAP_PROP_FPS: 30.0,
                }.get(key, 0)

            def read(self):
                fault = emulator.camera_fault.get(self.camera)
                with emulator.changed:
                    self.stored = self.seen  # whoever asks again has stored what it got
                    emulator.changed.notify_all()
                    emulator.changed.wait_for(lambda: emulator.version > self.seen or fault, timeout=1 / 30)
                    if not fault:
                        self.seen, self.frame = emulator.version, emulator.frames[self.camera]
                if fault == "silent":
                    threading.Event().wait(0.7)  # the device waits for a picture that does not come
                elif fault:
                    threading.Event().wait(1 / 30)
                return fault != "silent", self.frame.copy()

            def release(self):
                if self in emulator.captures:
                    emulator.captures.remove(self)
                self.camera = None

        return Capture

    def close(self):
        self.unplug()
        self.sim.close()


def install(emulator, folder, monkeypatch=None, terminal=True):
    """Put the cameras in cv2's place and write the calibration where LeRobot keeps it: RealEnv then finds an arm at emulator.port.

    terminal=False replaces pyserial as well, for long runs: no pseudo terminal, no threads that wait for each other.
    """
    import cv2
    import scservo_sdk.port_handler
    from lerobot.utils import constants

    put = monkeypatch.setattr if monkeypatch else setattr
    put(cv2, "VideoCapture", emulator.capture_class())
    put(scservo_sdk.port_handler, "time", SimpleNamespace(time=emulator.driver_time))
    put(constants, "HF_LEROBOT_CALIBRATION", Path(folder))
    if not terminal:
        put(scservo_sdk.port_handler.serial, "Serial", emulator.serial_class())
    path = Path(folder, constants.ROBOTS, "so_follower", "emulated.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(emulator.calibration))
    return path


def play(env, policy, obs):
    """One episode as sample.py plays it -> last info, and the reasons for which actions were clipped."""
    from sample import look

    clipped = []
    while True:
        chunk, _ = policy.act(*look(obs, policy))
        for action in chunk[0, : policy.cfg.execute]:
            obs, _, terminated, truncated, info = env.step(action)
            clipped += info.get("clipped", [])
            if terminated or truncated:
                return info, clipped


def main(run, n=100, family="place"):
    """The same seeds in sim_env, and through RealEnv, LeRobot's driver and the emulator."""
    from real_env import RealEnv
    from tqdm import tqdm

    from model import fast_cpu
    from sample import load_policy

    fast_cpu(1)
    policy = load_policy(run)
    sim, world = (SO100Env(family, px=policy.cfg.image_size) for _ in range(2))
    world.reset(seed=SEEDS["report"][0])
    emulator = Emulator(world)
    install(emulator, tempfile.mkdtemp(), terminal=False)
    results, reasons = [], []
    px = policy.cfg.image_size
    with RealEnv(
        emulator.port,
        {"front": 0, "wrist": 2},
        px=px,
        limit=LIMIT[family],
        judge=world._judge,
        clock=emulator,
        size=(px // 6 * 2 + px, px),
    ) as env:
        for seed in tqdm(SEEDS["report"][: int(n)], disable=not sys.stderr.isatty()):
            obs, _ = sim.reset(seed=seed)
            simulated, _ = play(sim, policy, obs)
            world.reset(seed=seed)
            emulator.settle()
            env.home = world.position()  # the scene's own first pose, so that both begin alike
            obs, _ = env.reset(options={"task": world.task})
            real, clipped = play(env, policy, obs)
            results.append((simulated["success"], real["success"]))
            reasons += clipped
            print(
                f"{seed}  sim_env {'yes' if results[-1][0] else 'no ':3s} {simulated['steps']:3d} steps   real_env {'yes' if results[-1][1] else 'no ':3s} "
                f"{real['steps']:3d} steps  clipped: {', '.join(f'{clipped.count(r)} {r}' for r in sorted(set(clipped))) or '-'}",
                flush=True,
            )
    emulator.close()
    for name, wins in zip(("sim_env", "real_env"), zip(*results)):
        low, high = wilson(sum(wins), len(wins))
        print(f"{name:9s} {100 * np.mean(wins):.1f} % of {len(wins)} ({100 * low:.1f} - {100 * high:.1f})")
    only = [sum(a and not b for a, b in results), sum(b and not a for a, b in results)]
    print(
        f"only in sim_env {only[0]}, only in real_env {only[1]}; clipped steps: {', '.join(f'{reasons.count(r)} {r}' for r in sorted(set(reasons))) or 'none'}; "
        f"bus faults: {len(env.faults)}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
