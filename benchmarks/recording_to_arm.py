"""From a recording to the arm, on the emulated one: does it help to start from a policy of the simulation?

    python benchmarks/recording_to_arm.py record --out=recordings/level --episodes=50
    python benchmarks/recording_to_arm.py evaluate --run=out/level --episodes=100

`record` writes a LeRobot data set as lerobot-record does, through LeRobot's follower arm and cameras, and
tests/feetech_emulator.py behind them. The scripted expert stands for the person at the leader arm. Nothing in
the recordings is as in the simulation: the arm begins folded, its jaws are turned by 90 degrees, it works at
30 frames a second and at another speed, the cameras deliver 640x480, and nobody notes any reasoning.

`evaluate` runs a policy in scenes that were not recorded, through extras/real_env.py, as sample.py does on a
real arm. The simulation behind the emulator judges. The clock of the emulator stands still while the policy
computes. The result is RUN/eval_emulated.json. After a break the same command plays only what is missing.

docs/real_arm.md has the commands between the two. Needs: pip install 'lerobot[feetech]'
"""

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # which adds the programs' folder
from feetech_emulator import EmulatedEnv, Emulator, install

from common import (
    UserError,
    append_log,
    check_options,
    fast_cpu,
    opt,
    parse_config,
    read_log,
    require,
    run_program,
    write_json,
)
from evaluate import Episode, SingleEnv, percent, policy_fn, run_episodes, wilson
from extras.lerobot_io import create_dataset
from extras.real_env import REST, RealEnv
from prepare import Pose, ScriptedExpert
from sim_env import CAMERAS, HIGH, LOW, MOTORS, SEEDS, SO100Env, mujoco, to_qpos

RATE = 30  # frames a second of the recording
WIDTH, HEIGHT = 640, 480  # of the cameras' pictures
TURN = np.array([0, 0, 0, 0, 90.0, 0])  # level jaws, where the simulation's stand upright
PACE = 0.45  # share of the simulated expert's stride: it decides three times as often
FOLDED = REST + TURN  # the pose in which episodes begin
SPREAD = np.array([10, 3, 3, 5, 8, 2])  # of this pose in recordings, in LeRobot units
TREMOR = 0.6  # LeRobot units a frame: the arm does not quite what it is told, and the recording shows why
HOLD = 15  # recorded frames after success
LONGEST = 10  # seconds of an episode
JOINTS = [f"{motor}.pos" for motor in MOTORS]  # LeRobot's names


@dataclass
class Options:
    """The command line."""

    program: str = opt("", "what to do", ("record", "evaluate"))
    episodes: int = opt(50, "successful episodes to record, or scenes to evaluate", "[1, inf)")
    seed: int = opt(0, "first scene; 0: of the training scenes that small has not seen, or of the report's")
    out: str = opt("", "record: folder of the LeRobot data set")
    run: str = opt("", "evaluate: checkpoint folder")

    def __post_init__(self):
        check_options(self)
        if not (self.out if self.program == "record" else self.run):
            raise UserError("type record --out=FOLDER or evaluate --run=FOLDER")


# ------------------------------------------------------------------------------------------------------------
# The arm, and the person at its leader


class WideEmulator(Emulator):
    """An emulator whose cameras show 640x480: the height of the simulation's pictures, and more beside it."""

    def __init__(self, sim: SO100Env):
        # Before the emulator's own start, which draws the first pictures.
        self.renderer = mujoco.Renderer(sim.model, HEIGHT, WIDTH, max_geom=100)
        super().__init__(sim)

    def pictures(self) -> dict[str, np.ndarray]:
        pictures = {}
        for camera in CAMERAS:
            self.renderer.update_scene(self.sim.data, camera)
            pictures[camera] = self.renderer.render()  # (480, 640, 3)
        return pictures

    def close(self) -> None:
        super().close()
        self.renderer.close()


class LevelExpert(ScriptedExpert):
    """The scripted expert with its wrist turned by TURN, at PACE. Four sides of a cube are alike."""

    def fetch(self, tool: np.ndarray, position: np.ndarray, cube: np.ndarray, yaw: float) -> Pose:
        # The simulation's expert reasons about an upright jaw.
        return super().fetch(tool, position - TURN, cube, yaw)

    def towards(
        self, position: np.ndarray, xy: np.ndarray, z: float, roll: float, gripper: float
    ) -> np.ndarray:
        target = super().towards(position, xy, z, roll + TURN[4], gripper)
        return position + PACE * (target - position)


def lay_out(emulator: Emulator, seed: int, spread: np.ndarray) -> None:
    """Another scene of `place`, with the arm folded up about as a person leaves it."""
    sim = emulator.sim
    sim.reset(seed=seed, options={"family": "place"})
    # Another stream of random numbers than the scene's.
    pose = FOLDED + np.random.default_rng([seed, 8]).uniform(-spread, spread)
    sim.data.qpos[:6] = to_qpos(pose.clip(LOW, HIGH))
    sim.data.qvel[:6] = 0
    sim.data.ctrl[:] = sim.data.qpos[:6]  # the servos hold this pose
    mujoco.mj_forward(sim.model, sim.data)
    emulator.settle()


@contextmanager
def emulated() -> Iterator[tuple[Emulator, Path]]:
    """-> an emulated arm with wide cameras, and its calibration file."""
    sim = SO100Env()
    sim.reset(seed=SEEDS["report"][0])
    emulator = WideEmulator(sim)
    with tempfile.TemporaryDirectory() as folder:
        yield emulator, install(emulator, folder, terminal=False)
    emulator.close()


# ------------------------------------------------------------------------------------------------------------
# Recording


def record(cfg: Options) -> None:
    """Write the LeRobot data set --out. It grows in <out>.tmp, and gets its name when it is whole."""
    out = Path(cfg.out)
    if out.exists():
        raise UserError(f"{out} already exists; delete it or choose another --out")
    require("av").logging.set_libav_level(16)  # errors; the encoder has a page to say about every film
    shutil.rmtree(f"{out}.tmp", ignore_errors=True)  # of a run that was killed
    # Films, as lerobot-record makes them by default.
    dataset = create_dataset("h264", Path(f"{out}.tmp"), RATE, features())
    with emulated() as (emulator, calibration):
        robot = follower(emulator.port, calibration)
        robot.connect()
        record_episodes(robot, emulator, dataset, cfg)
        robot.disconnect()
    dataset.finalize()
    os.replace(f"{out}.tmp", out)
    print(f"{out}: {dataset.num_episodes} episodes, {dataset.num_frames} frames at {RATE} a second")


def follower(port: str, calibration: Path) -> Any:
    """LeRobot's follower arm with two cameras, as lerobot-record makes it."""
    from lerobot.cameras.opencv import OpenCVCameraConfig
    from lerobot.robots.so_follower import SO100Follower, SO100FollowerConfig

    cameras = {}
    # These are the numbers at which the emulator answers, as /dev/video0 and 2 do for two USB cameras.
    for camera, number in zip(CAMERAS, (0, 2)):
        cameras[camera] = OpenCVCameraConfig(number, fps=RATE, width=WIDTH, height=HEIGHT)
    config = SO100FollowerConfig(port, cameras=cameras, use_degrees=True)
    # LeRobot looks for the calibration in this folder, under the arm's name.
    config.id = calibration.stem
    config.calibration_dir = calibration.parent
    return SO100Follower(config)


def features() -> dict[str, dict]:
    """The features of a LeRobot data set, as lerobot-record names them."""
    numbers = {"dtype": "float32", "shape": (len(JOINTS),), "names": JOINTS}
    pictures = {"dtype": "video", "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
    found = {"observation.state": numbers, "action": numbers}
    return found | {f"observation.images.{camera}": pictures for camera in CAMERAS}


def record_episodes(robot: Any, emulator: Emulator, dataset: Any, cfg: Options) -> None:
    """Play scenes until so many have succeeded; the others are thrown away, as a person would."""
    # Far behind the scenes that `small` has been trained on.
    seed = cfg.seed or SEEDS["train"][900_000]
    began = time.time()  # for the estimate of what is left
    while dataset.num_episodes < cfg.episodes:
        frames = play(robot, emulator, dataset, seed)
        keep = dataset.save_episode if frames else dataset.clear_episode_buffer
        keep()
        minutes = (time.time() - began) / 60
        left = minutes * (cfg.episodes / max(dataset.num_episodes, 1) - 1)
        print(
            f"scene {seed}: {frames / RATE:.1f} s  {emulator.sim.task} | "
            f"{dataset.num_episodes} of {cfg.episodes} episodes, eta {left:.1f} m",
            flush=True,
        )
        seed += 1


def play(robot: Any, emulator: Emulator, dataset: Any, seed: int) -> int:
    """One episode by the expert into the data set's buffer -> its frames, 0 if it failed.

    The arm is told something a little wrong, and what would have been right is recorded, so the data show how
    to come back (DART: Laskey et al. 2017, arXiv:1703.09327).
    """
    lay_out(emulator, seed, SPREAD)
    expert = LevelExpert(emulator.sim)
    rng = np.random.default_rng([seed, 9])
    drift = np.zeros(6)
    succeeded = 0  # frames ago
    for frame in range(LONGEST * RATE):
        # The order of lerobot-record: first the pictures and positions, then the leader's target for them.
        seen = robot.get_observation()
        action = expert.action().astype(np.float32)  # (6,)
        values = {
            "observation.state": np.array([seen[joint] for joint in JOINTS], np.float32),
            "action": action,
            "task": emulator.sim.task,
        }
        for camera in CAMERAS:
            values[f"observation.images.{camera}"] = seen[camera]
        dataset.add_frame(values)
        drift = 0.9 * drift + rng.normal(0, TREMOR, 6)  # (6,), stays near 1.4 units
        sent = np.clip(action + drift, LOW, HIGH)
        robot.send_action(dict(zip(JOINTS, sent.tolist())))
        # The emulator's clock stands still meanwhile: a slow encoder does not slow the arm.
        emulator.advance(1 / RATE)
        emulator.draw()
        # After the first success the episode goes on for HOLD frames: they teach the policy to stay there.
        if succeeded or emulator.sim._judge():
            succeeded += 1
        if succeeded > HOLD:
            return frame + 1
    return 0


# ------------------------------------------------------------------------------------------------------------
# Evaluation


class LevelEnv(EmulatedEnv):
    """RealEnv on the emulated arm, in scenes that begin as the recorded ones did."""

    home = FOLDED

    def reset(self, *, seed: int, options: dict | None = None) -> tuple:
        # A scene is the same for every policy, and so is the pose. RealEnv then takes over the arm.
        lay_out(self.emulator, seed, 0 * SPREAD)
        return RealEnv.reset(self, options={"task": self.world.task})


def evaluate(cfg: Options) -> None:
    """Success of --run on report scenes, told as they end."""
    from model import load_policy

    fast_cpu(1)
    policy = load_policy(cfg.run)
    # Scenes that other weights have played in this folder do not count.
    weights = hashlib.sha1(Path(cfg.run, "model.safetensors").read_bytes()).hexdigest()[:12]
    log = Path(cfg.run, "emulated.jsonl")
    done = {line["seed"]: line for line in read_log(log) if line["weights"] == weights}
    first = cfg.seed or SEEDS["report"].start
    seeds = range(first, first + cfg.episodes)
    with emulated() as (emulator, _):
        arm = LevelEnv(emulator, policy.cfg.image_size, LONGEST * RealEnv.fps)
        decide = policy_fn(policy)
        with SingleEnv(arm, arm.px, CAMERAS, policy.cfg.state_dim) as vec:
            for seed in sorted(set(seeds) - set(done)):
                # Both gather until they are cleared; a line is about one scene.
                arm.reasons.clear()
                emulator.trace.clear()
                episode = Episode(seed, {"family": "place"})
                run_episodes(vec, [episode], decide, "")
                done[seed] = {
                    "seed": seed,
                    "success": episode.success,
                    "steps": episode.steps,
                    "wrist_roll": float(np.median(emulator.trace, axis=0)[4]),
                    "limited": dict(arm.reasons),
                    "weights": weights,
                }
                append_log(log, done[seed])
                # Scenes of an earlier run of this command count, too.
                won = [done[s]["success"] for s in seeds if s in done]
                outcome = "success" if episode.success else "no success"
                share = f"{sum(won)} of {len(won)}"
                print(f"{seed}: {outcome} after {episode.steps} steps | {share} | {episode.task}", flush=True)
            faults = len(arm.faults)
    report(cfg, [done[seed] for seed in seeds], faults)


def report(cfg: Options, lines: list[dict], faults: int) -> None:
    """Print the share of successful episodes, then write it."""
    n = len(lines)
    won = [line["steps"] for line in lines if line["success"]]
    low, high = wilson(len(won), n)
    limited = Counter()
    sent = 0
    for line in lines:
        limited.update(line["limited"])
        sent += line["steps"]
    roll = float(np.median([line["wrist_roll"] for line in lines]))
    result = {
        "success": len(won) / n,
        "n": n,
        "low": low,
        "high": high,
        "limited": limited,
        "wrist_roll": roll,
        # How fast it is, by what it finishes: failures all last as long as they may.
        "steps": float(np.mean(won)) if won else None,
    }
    print(f"{cfg.run}: {percent(len(won) / n)} % of {n} ({percent(low)} - {percent(high)})")
    print(f"limited targets: {dict(limited) or 'none'} of {sent}; bus faults: {faults}")
    # A policy that did not learn the new arm falls back to the simulation's angle.
    print(
        f"wrist_roll was {roll:.0f} degrees; {FOLDED[4]:.0f} where recorded, {REST[4]:.0f} in the simulation"
    )
    path = Path(cfg.run, "eval_emulated.json")
    write_json(path, result)
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    cfg = parse_config(Options, {}, sys.argv[1:] if argv is None else argv, positional="program")
    run_program({"record": record, "evaluate": evaluate}[cfg.program], cfg)


if __name__ == "__main__":
    main()
