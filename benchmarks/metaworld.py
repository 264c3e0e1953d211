"""Meta-World MT50: fifty tasks of one Sawyer arm, as an environment, as demonstrations, and as a test.

    python -m benchmarks.metaworld --demos=50 --out=data/mt50                  # scripted demonstrations
    python train.py --config small --data=data/mt50 --env=benchmarks.metaworld:MT50 --out=out/mt50 ...
    python -m benchmarks.metaworld evaluate --run=out/mt50 --episodes=10       # success of every task

docs/benchmarks.md has the whole commands, what to install, and published results. Tasks, success tests, step
limit and scripted policies are the benchmark's own (Yu et al. 2019, arXiv:1910.10897; pip: metaworld, MIT).

Read it in this order: the tables, MT50, demonstrate, then evaluation.
What it shares with libero.py is in shared.py.
"""

import pickle
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from benchmarks.shared import (
    Bench,
    BenchConfig,
    count,
    count_row,
    make_data_set,
    make_renderer,
    motion_phrases,
    play,
    table_row,
)
from common import UserError, opt, parse_config, require, run_program, write_json
from evaluate import Episode, percent
from sim_env import SEEDS, mujoco, picture_point

# -----------------------------------------------------------------------------------------------------------
# The tasks. Groups are those of TinyVLA (Wen et al. 2024, arXiv:2409.12514), as LeRobot lists them in
# src/lerobot/envs/metaworld.py. The instructions are our own: no two tasks share one, which published lists
# do for push and push-back.

GROUPS = {
    "easy": {
        "button-press-v3": "press the button from the front",
        "button-press-topdown-v3": "press the button from above",
        "button-press-topdown-wall-v3": "press the button behind the wall from above",
        "button-press-wall-v3": "press the button behind the wall from the front",
        "coffee-button-v3": "start the coffee machine",
        "dial-turn-v3": "turn the dial",
        "door-close-v3": "close the door",
        "door-lock-v3": "lock the door",
        "door-open-v3": "open the door",
        "door-unlock-v3": "unlock the door",
        "drawer-close-v3": "close the drawer",
        "drawer-open-v3": "open the drawer",
        "faucet-close-v3": "turn the faucet off",
        "faucet-open-v3": "turn the faucet on",
        "handle-press-v3": "press the handle down from the front",
        "handle-press-side-v3": "press the handle down from the side",
        "handle-pull-v3": "pull the handle up from the front",
        "handle-pull-side-v3": "pull the handle up from the side",
        "lever-pull-v3": "pull the lever up",
        "plate-slide-v3": "slide the plate forward into the goal",
        "plate-slide-back-v3": "slide the plate back out of the goal",
        "plate-slide-back-side-v3": "slide the plate sideways out of the goal",
        "plate-slide-side-v3": "slide the plate sideways into the goal",
        "reach-v3": "reach the target",
        "reach-wall-v3": "reach the target behind the wall",
        "window-close-v3": "close the window",
        "window-open-v3": "open the window",
        "peg-unplug-side-v3": "pull the peg out of the socket",
    },
    "medium": {
        "basketball-v3": "put the ball into the basket",
        "bin-picking-v3": "move the cube into the other bin",
        "box-close-v3": "put the lid on the box",
        "coffee-pull-v3": "pull the mug away from the coffee machine",
        "coffee-push-v3": "push the mug under the coffee machine",
        "hammer-v3": "hit the nail with the hammer",
        "peg-insert-side-v3": "put the peg into the hole at the side",
        "push-wall-v3": "push the puck around the wall to the target",
        "soccer-v3": "push the ball into the goal",
        "sweep-v3": "sweep the cube off the table",
        "sweep-into-v3": "sweep the cube into the hole",
    },
    "hard": {
        "assembly-v3": "put the ring on the peg",
        "hand-insert-v3": "put the hand into the hole",
        "pick-out-of-hole-v3": "take the puck out of the hole",
        "pick-place-v3": "lift the puck to the target",
        "push-v3": "push the puck forward to the target",
        "push-back-v3": "pull the puck back to the target",
    },
    "very_hard": {
        "shelf-place-v3": "put the cube on the shelf",
        "disassemble-v3": "take the ring off the peg",
        "stick-pull-v3": "pull the box with the stick",
        "stick-push-v3": "push the box with the stick",
        "pick-place-wall-v3": "lift the puck over the wall to the target",
    },
}
INSTRUCTIONS = {name: words for tasks in GROUPS.values() for name, words in tasks.items()}
GROUP_OF = {name: group for group, tasks in GROUPS.items() for name in tasks}

ENV = "benchmarks.metaworld:MT50"
LIMIT = 500  # control steps: SawyerXYZEnv.max_path_length, which LeRobot uses, too
SHORT_LIMIT = 160  # a second, harder count of the same episodes; the scripted policies take 77 on average
CAMERA = "corner2"
CAMERA_XYZ = (0.75, 0.075, 0.7)  # metres; nearer than the benchmark's own, as in LeRobot and arXiv:2206.14244
CAMERA_FOVY = 36  # degrees; with its own 60, hand and things lie in the middle quarter of the picture
HAND_CAMERA = "gripperPOV"  # between the fingers
INSTALL = "gymnasium scipy imageio && pip install --no-deps metaworld"


def import_metaworld() -> Any:
    """The package, mended for MuJoCo 4; UserError says what to install.

    metaworld 3.1 pins MuJoCo 3.3, because it writes 11 numbers into rows of eq_data that hold more. The
    numbers below are its own.
    """
    metaworld = require("metaworld", INSTALL)
    require("metaworld.policies")  # which the package does not import by itself
    from metaworld.sawyer_xyz_env import SawyerMocapBase

    def reset_mocap_welds(env: Any) -> None:
        welds = np.flatnonzero(env.model.eq_type == mujoco.mjtEq.mjEQ_WELD)
        for row in welds:
            env.model.eq_data[row, :11] = [0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5]

    SawyerMocapBase.reset_mocap_welds = reset_mocap_welds
    return metaworld


# -----------------------------------------------------------------------------------------------------------
# The environment


# Built tasks that no arm of this process plays: (name, pixels), environment, renderer
PARKED: list[tuple[tuple[str, int], Any, Any]] = []


class MT50:
    """The fifty tasks as one environment of the project's contract (docs/environments.md).

    The family of reset()'s options is a group, of which the seed draws a task, or a task's own name. The seed
    also draws the scene. Actions are steps of the hand, 1 is a centimetre in x, y or z, and the effort
    that closes the gripper; all lie in [-1, 1]. The state is the hand's position in metres and how far the
    gripper is open, 0 to 1. An episode ends at success.
    """

    cameras = (CAMERA, HAND_CAMERA)
    motors = ("step_x", "step_y", "step_z", "close")
    state = ("hand_x", "hand_y", "hand_z", "opening")
    limit = LIMIT
    families = dict.fromkeys(GROUPS, limit)
    parked = 0  # built tasks that a process keeps for its arms; each takes 110 MB
    fps = 80  # control steps a second: 5 physics steps of 2.5 ms

    def __init__(self, px: int = 96):
        self.px = px
        self.metaworld = import_metaworld()
        self.name = ""  # of the task that is built
        self.env: Any = None
        self.renderer: Any = None

    def _take(self, name: str) -> None:
        """Change to a task: one that another arm has left behind, or one built anew."""
        self._leave()
        for built in PARKED:
            if built[0] == (name, self.px):
                PARKED.remove(built)
                _, self.env, self.renderer = built
                self.name = name
                return
        self._build(name)

    def _leave(self) -> None:
        """Leave the task that is built to other arms of this process, as far as there is room."""
        if self.env is None:
            return
        PARKED.append(((self.name, self.px), self.env, self.renderer))
        self.env = None
        self.name = ""
        while len(PARKED) > self.parked:
            _, env, renderer = PARKED.pop(0)  # the oldest
            renderer.close()
            env.close()

    def _build(self, name: str) -> None:
        """Make the benchmark's environment of a task, and what draws it."""
        cls = self.metaworld.env_dict.ALL_V3_ENVIRONMENTS[name]
        env = cls()
        # set_task() makes the target's position observable, which the scripted policies need.
        task = {"env_cls": cls, "rand_vec": None, "partially_observable": False}
        env.set_task(self.metaworld.Task(name, pickle.dumps(task)))
        # reset(seed=...) of the benchmark ignores its seed. What chooses a scene is a vector that set_task()
        # freezes. Thawed, it is drawn at every reset by the generator that env.seed() seeds.
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env.model.camera(CAMERA).pos = CAMERA_XYZ
        env.model.camera(CAMERA).fovy = CAMERA_FOVY
        self.renderer = make_renderer(env.model, self.px)
        self.env = env
        self.name = name

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Begin the episode that a seed names."""
        options = options or {}
        family = options.get("family", "easy")
        if seed is None:
            seed = int(np.random.default_rng().choice(SEEDS["train"]))
        name = family
        if family in GROUPS:
            # Drawn, not taken in turns: rl.py gives a group every fourth seed.
            tasks = list(GROUPS[family])
            name = tasks[np.random.default_rng(seed).integers(len(tasks))]
        if name not in INSTRUCTIONS:
            raise UserError(f"MT50 has no task {family!r}; it has {', '.join([*GROUPS, *INSTRUCTIONS])}")
        # Seeds of one task use the same model.
        if name != self.name:
            self._take(name)
        self.env.seed(seed)
        self.raw, _ = self.env.reset()  # (39,): what the scripted policies see
        # The benchmark moves targets and furniture in the model after it has computed where things are. Until
        # the first step its pictures would show them where they were before.
        mujoco.mj_kinematics(self.env.model, self.env.data)
        self.task = options.get("task") or INSTRUCTIONS[name]
        self.steps = 0
        self.success = False
        return self.observe(), self._info(0)

    def _info(self, executed: int) -> dict[str, Any]:
        return {"success": self.success, "steps": self.steps, "executed": executed, "name": self.name}

    def hand(self) -> ndarray:
        """The state (4,) float32: hand xyz in metres, opening of the gripper."""
        return self.raw[:4].astype(np.float32)

    def pictures(self) -> dict[str, ndarray]:
        """What the cameras see now, (px, px, 3) uint8 each."""
        found = {}
        for camera in self.cameras:
            self.renderer.update_scene(self.env.data, camera=camera)
            found[camera] = self.renderer.render()  # (px, px, 3)
        # This camera hangs upside down: turn its picture by 180 degrees.
        found[CAMERA] = found[CAMERA][::-1, ::-1].copy()
        return found

    def observe(self) -> dict[str, Any]:
        """The observation of now."""
        return {"images": self.pictures(), "state": self.hand(), "task": self.task}

    def places(self) -> str:
        """Where the first picture shows the target and what the hand must go to: the truth, as reasoning.

        As in "puck target at x30 y19 , push the puck at x21 y21".
        """
        point = partial(picture_point, self.env.model, self.env.data, CAMERA, flips=(-1, -1))
        thing = point(self.raw[4:7])
        goal = point(self.raw[36:39])
        first, the, noun, *_ = self.task.split()
        if first == "reach":
            return f"{first} {the} {noun} at {goal}"
        return f"{noun} target at {goal} , {first} {the} {noun} at {thing}"

    def advance(self, action: ndarray) -> None:
        """One control step, not drawn."""
        clipped = np.clip(action, -1, 1).astype(np.float32)  # (4,)
        self.raw, _, _, _, info = self.env.step(clipped)
        self.steps += 1
        self.success = self.success or bool(info["success"])

    def step(self, action: ndarray) -> tuple[dict, float, bool, bool, dict]:
        return self.step_chunk(np.asarray(action)[None])

    def step_chunk(self, actions: ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Control steps (h, 4) until success, then one picture. The reward is 1 at success."""
        before = self.steps
        for action in actions:
            self.advance(action)
            # What follows success is not executed, and a policy sees no picture of it.
            if self.success or self.steps == self.limit:
                break
        out_of_time = self.steps == self.limit and not self.success
        info = self._info(self.steps - before)
        return self.observe(), float(self.success), self.success, out_of_time, info

    def instruct(self, task: str) -> dict[str, Any]:
        """The observation of now, under another instruction."""
        self.task = task
        return self.observe()

    def close(self) -> None:
        if self.env is not None:
            self.renderer.close()
            self.env.close()
        self.env = None
        self.name = ""


class Practice(MT50):
    """MT50 for rl.py. Failures end sooner, as they mostly stand still; and tasks are kept, as arms change
    theirs after every episode and building one takes as long as playing it.
    """

    limit = SHORT_LIMIT
    families = dict.fromkeys(GROUPS, limit)
    parked = 24


# -----------------------------------------------------------------------------------------------------------
# Demonstrations

DEMO_LIMIT = 250  # control steps; the scripted policies take 77 on average
AFTER_SUCCESS = 2  # control steps that follow, so that chunks do not all end just before success
NOISE = 0.05  # of each step's push, in units of the action; twice as much costs basketball 3 of 9 episodes
NOISE_DECAY = 0.8
DIRECTIONS = (("left", "right"), ("back", "forward"), ("down", "up"))  # of x, y, z, as the arm sees it


def demonstrate(env: MT50, name: str, seed: int, reasoning: str = "none") -> tuple[dict[str, ndarray], dict]:
    """One episode of the benchmark's scripted policy -> arrays, and its entry in meta.json.

    The arm executes disturbed actions. The label is always the clean action that the scripted policy would
    take there, so the data show how to come back (DART: Laskey et al. 2017, arXiv:1703.09327).
    """
    env.reset(seed=seed, options={"family": name})
    expert = env.metaworld.policies.ENV_POLICY_MAP[name]()
    rng = np.random.default_rng([seed, 7])
    drift = np.zeros(3)
    found = defaultdict(list)
    places = []  # [first step, words]
    left = AFTER_SUCCESS + 1  # the step that succeeds counts, too
    # Each demonstration begins with another drift, and the same seed always with the same.
    while env.steps < DEMO_LIMIT and left:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the scripted policies ask for more than the arm can do
            action = np.clip(expert.get_action(env.raw), -1, 1)  # (4,)
        if reasoning == "places":
            said = env.places()
            if not places or places[-1][1] != said:
                places.append([env.steps, said])
        for camera, picture in env.pictures().items():
            found[camera].append(picture)  # (px, px, 3)
        found["state"].append(env.hand())  # (4,)
        found["action"].append(action.astype(np.float32))  # (4,)
        drift = NOISE_DECAY * drift + rng.normal(0, NOISE, 3)  # (3,)
        # The gripper is not disturbed: it would drop what it holds.
        executed = action.copy()
        executed[:3] += drift
        env.advance(executed)
        left -= env.success
    arrays = {key: np.stack(values) for key, values in found.items()}
    entry = {
        "length": env.steps,
        "task": env.task,
        "reason": places,
        "success": env.success,
        "seed": seed,
        "family": GROUP_OF[name],
        "kind": "demo",
        "name": name,
    }
    # The state's fourth number is the opening, as the phrases need it; the action's is the closing effort.
    if reasoning == "phrases":
        entry["reason"] = motion_phrases(arrays["state"], arrays["action"][:, 3] > 0, DIRECTIONS)
    return arrays, entry


BENCH = Bench("benchmarks/metaworld.py", MT50, ENV, demonstrate)

# -----------------------------------------------------------------------------------------------------------
# The programs


@dataclass
class MetaworldConfig(BenchConfig):
    """The options of both programs."""

    out: str = opt("data/mt50", "data set folder to make", needs="work=demonstrate")
    tasks: str = opt(
        "", "only these tasks, as in reach-v3,push-v3 (default: all)", ("", *INSTRUCTIONS), many=True
    )

    def names(self) -> list[str]:
        """The tasks that are asked for."""
        return self.tasks.split(",") if self.tasks else list(INSTRUCTIONS)

    def settings(self) -> dict[str, Any]:
        """What the parts of a data set have in common."""
        kept = ("demos", "tasks", "image_size", "reasoning")
        return {key: getattr(self, key) for key in kept}


def summarise(episodes: Sequence[Episode], limit: int) -> dict[str, Any]:
    """Success by task and by group.

    "episodes" is the share of all episodes. "groups_mean" is the mean of the four groups' rates, which is
    what papers quote as the average: 68.2 of SmolVLA is the mean of 87.1, 51.8, 70.0 and 64.0.
    """
    by_task = defaultdict(list)
    by_group = defaultdict(list)
    for episode in episodes:
        name = episode.options["family"]
        by_task[name].append(episode)
        by_group[GROUP_OF[name]].append(episode)
    # The groups have 28, 11, 6 and 5 tasks, so their mean is not that of the episodes.
    groups = {group: count(played, limit) for group, played in by_group.items()}
    return {
        "limit": limit,
        "tasks": {name: count(played, limit) for name, played in by_task.items()},
        "groups": groups,
        "groups_mean": float(np.mean([cell["success"] for cell in groups.values()])),
        "episodes": count(episodes, limit),
    }


def print_summary(full: dict[str, Any], short: dict[str, Any]) -> None:
    """The table of success within both limits."""
    print(table_row("task or group", "success %", "n", "95 % interval", f"{SHORT_LIMIT} steps %"))
    for part in ("tasks", "groups"):
        for name, cell in full[part].items():
            print(count_row(name, cell, percent(short[part][name]["success"])))
    print(count_row("all episodes", full["episodes"], percent(short["episodes"]["success"])))
    within = percent(short["groups_mean"])
    print(table_row("mean of the groups", percent(full["groups_mean"]), "", "", within))


def evaluate_run(cfg: MetaworldConfig) -> None:
    """Play every task, print a table and write it to the run's folder."""
    jobs = play(BENCH, cfg, "MT50")
    # One set of episodes, counted twice: the second count asks for speed as well.
    full = summarise(jobs, LIMIT)
    short = summarise(jobs, SHORT_LIMIT)
    print_summary(full, short)
    path = Path(cfg.run, f"eval_metaworld_{cfg.seeds}.json")
    write_json(path, {"full": full, "short": short})
    print(f"wrote {path}")


def work(cfg: MetaworldConfig) -> None:
    """What the command line asks for."""
    import_metaworld()  # complain before there is a folder
    if cfg.work == "evaluate":
        evaluate_run(cfg)
    else:
        make_data_set(BENCH, cfg)


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    cfg = parse_config(MetaworldConfig, {}, words, "work")
    run_program(work, cfg)


if __name__ == "__main__":
    main()
