"""Everything that happens once, before training: demonstrations and questions, simulated or brought along.

    python prepare.py --config small                       # simulate: data/small
    python prepare.py --lerobot=lerobot/svla_so100_pickplace --cameras=front=top,wrist=wrist --out=data/mine
    python prepare.py --questions_from=HuggingFaceM4/the_cauldron/ai2d --out=data/mine  # data/mine/questions
    python prepare.py --export=data/small --out=lerobot_small    # a LeRobot data set (v3.0)
    python prepare.py --check_expert=500                   # how often the scripted expert succeeds

Read it in this order: ScriptedExpert, Disturbance, demonstrate, scene_questions; then how work is divided,
done in parallel and merged. The layout of the finished folder is described in data.py. Data sets that others
recorded are read and written by extras/lerobot_io.py.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

from common import (
    UserError,
    atomic_path,
    check_options,
    lock_folder,
    opt,
    parse_config,
    read_json,
    run_program,
    terminable,
    write_json,
)
from data import read_meta, statistics
from evaluate import save_film, wilson
from model import PRESETS, Config, load_policy
from sim_env import (
    ASKED,
    ASKED_SUMS,
    CAMERAS,
    CLOSED,
    COLOURS,
    CUBE,
    FPS,
    HELD_OUT_SUMS,
    HIGH,
    LIMIT,
    LOW,
    MOTORS,
    OPEN,
    SEEDS,
    VAGUE_NAMES,
    WORDS,
    SO100Env,
    count_out,
    inverse,
    number_of,
    random_task,
    reasoning,
    wrap,
    xy_to_polar,
)

# -----------------------------------------------------------------------------------------------------------
# The scripted expert

HOVER = 0.055  # metres: the tool travels this far above the height at which it grasps
GAIN = 1.3  # aim a little past the target: the servos yield to gravity and to the noise of demonstrate()
STRIDE = np.array([18, 16, 16, 16, 24, 10])  # LeRobot units from the measured position to a command

Pose = tuple[ndarray, float, float, float]  # of the tool: xy (2,) and z in metres, roll in degrees, gripper


class ScriptedExpert:
    """A controller that knows the true scene. Each action depends on the present state alone.

    A policy without memory can therefore imitate it, and after a disturbance it goes on from wherever things
    are. Its thresholds are as loose as fingers and pads allow, because a policy that imitates it errs by a
    centimetre: one that waits for perfect alignment before it moves the gripper would then wait for ever.

    mistake (2,): metres by which it takes cubes and pads to lie elsewhere than they do.
    """

    def __init__(self, env: SO100Env, mistake: Sequence[float] = (0.0, 0.0)):
        self.env = env
        self.mistake = np.array(mistake)

    def action(self) -> ndarray:
        """The next target position (6,) float32 in LeRobot units."""
        env = self.env
        position = env.position()  # (6,)
        tool = env.tool()  # (3,)
        pad_of = {cube["colour"]: cube["pad"] for cube in env.scene()["cubes"]}
        legs = [leg for leg in env.goal["legs"] if pad_of[leg.cube] != leg.number]  # those not done yet
        if not legs:
            return self.towards(position, *self.leave(tool, -90, position[5]))
        leg = legs[0]
        cube = env.cube_xyz(leg.cube)  # (3,)
        if env.held(leg.cube):
            pad = env.pad_xy(leg.number) + 2 * self.mistake  # (2,); pads are larger than cubes
            return self.towards(position, *self.carry(tool, cube, pad))
        cube[:2] += self.mistake
        return self.towards(position, *self.fetch(tool, position, cube, env.cube_yaw(leg.cube)))

    def leave(self, tool: ndarray, roll: float, gripper: float) -> Pose:
        """Open the gripper here, then rise."""
        z = CUBE + HOVER if gripper > OPEN - 7 else tool[2]  # wait until the cube is free
        return tool[:2], z, roll, OPEN

    def fetch(self, tool: ndarray, position: ndarray, cube: ndarray, yaw: float) -> Pose:
        """Go above the cube, descend around it, close the gripper."""
        phi, _ = xy_to_polar(cube)
        # A cube can be held in four ways: choose the one that turns the wrist least, unless it lies more than
        # 60 degrees away from the middle of the wrist's range.
        roll = position[4] + wrap(yaw - phi - position[4], 90)
        if abs(roll + 90) > 60:
            roll = -90 + wrap(yaw - phi, 90)
        gap = np.linalg.norm(cube[:2] - tool[:2])  # metres, horizontally
        height = tool[2] - CUBE
        # Around the cube: close. A gripper that has closed on nothing opens again.
        if gap < 0.02 and height < 0.009 and position[5] > CLOSED + 1.5:
            return cube[:2], CUBE, roll, CLOSED
        # Low beside something: open and rise before going anywhere.
        if height < 0.03 and gap > 0.028:
            return self.leave(tool, position[4], position[5])
        # The tool descends as it comes near, turns and opens.
        unready = gap + 0.0007 * abs(roll - position[4]) + 0.002 * max(OPEN - 4 - position[5], 0)
        return cube[:2], CUBE + np.clip(4 * (unready - 0.02), 0, HOVER), roll, OPEN

    def carry(self, tool: ndarray, cube: ndarray, pad: ndarray) -> Pose:
        """Rise, go above the pad, descend, open. The cube is aimed, wherever it sits between the fingers."""
        gap = np.linalg.norm(pad - cube[:2])
        # The cube or the fingertips are down.
        if gap < 0.02 and min(cube[2] - CUBE, tool[2] - 0.008) < 0.007:
            return tool[:2], tool[2], -90, OPEN
        z = CUBE + np.clip(4 * (gap - 0.015), 0, HOVER)  # of the cube's centre: it descends near the pad
        free = 1  # share of the way to the pad that the tool may take now
        if gap > 0.03:
            # Do not drag the cube through its neighbours.
            free = np.clip((cube[2] - 0.028) / 0.02, 0, 1)
        return tool[:2] + free * (pad - cube[:2]), z + (tool[2] - cube[2]), -90, CLOSED

    def towards(self, position: ndarray, xy: ndarray, z: float, roll: float, gripper: float) -> ndarray:
        """One step in joint space towards a pose of the tool -> target position (6,) float32."""
        phi, r = xy_to_polar(xy)
        z = np.clip(z, 0.008, 0.12)
        target = inverse(phi, np.clip(r, 0.09 + 0.4 * z, 0.34), z, roll, position[5])  # (6,)
        target[5] = gripper
        step = GAIN * (target - position) / STRIDE  # (6,) in strides
        step[:5] /= max(1, np.abs(step[:5]).max())  # all joints arrive together
        step[5] = np.clip(step[5], -1, 1)  # the gripper moves at its own speed
        return np.clip(position + step * STRIDE, LOW, HIGH).astype(np.float32)


class Disturbance:
    """What the arm executes instead of the expert's actions, so that the data show how to come back.

    The arm drifts off the clean action, which remains the label (DART: Laskey et al. 2017, arXiv:1703.09327).
    In half of the episodes it obeys for a while an expert that is mistaken about where things lie, as a
    policy will be: it misses the cube or the pad. In 8 % the gripper opens or the arm is pushed.
    """

    def __init__(self, env: SO100Env, family: str, seed: int, noise: bool):
        # The order of these draws is the data set: another one gives other demonstrations.
        self.rng = np.random.default_rng([seed, 7])
        third = LIMIT[family] // 3
        self.noise = noise
        self.accident = self.rng.choice(["open", "push", ""], p=[0.04, 0.04, 0.92]) if noise else ""
        begin = int(self.rng.integers(4, third))
        self.struck = range(begin, begin + 3 * bool(self.accident))  # steps of the accident, if there is one
        self.push = self.rng.normal(0, 12, 6)  # LeRobot units
        self.expert = ScriptedExpert(env, self.rng.normal(0, 0.016, 2))
        self.mistaken = range(0)  # steps at which the arm obeys the mistaken expert
        if noise and self.rng.random() < 0.5:
            first = int(self.rng.integers(0, third))
            self.mistaken = range(first, first + int(self.rng.integers(6, 16)))
        self.drift = np.zeros(6)

    def executed(self, step: int, action: ndarray) -> ndarray:
        """Clean action (6,) -> what the arm does at this step (6,)."""
        self.drift = 0.8 * self.drift + self.rng.normal(0, 0.9, 6) * self.noise  # stays near 1.5 degrees
        if step in self.mistaken:
            action = self.expert.action()
        action = action + self.drift
        if step in self.struck and self.accident == "push":
            action += self.push
        elif step in self.struck:
            action[5] = OPEN
        return action


def demonstrate(
    env: SO100Env,
    seed: int,
    family: str,
    noise: bool = True,
    start_steps: int = 0,
    images: bool = True,
) -> tuple[dict[str, ndarray], dict[str, Any], str]:
    """One episode by the expert, from split id -> arrays, its entry in meta.json, why it failed ("" if not).

    arrays: per camera (n, px, px, 3) uint8, "state" and "action" (n, 6) float32. The episode ends three steps
    after success. noise: see Disturbance. start_steps: a start episode of at most so many steps, amid work
    and from any arm pose. images: draw the cameras.
    """
    env.reset(seed=seed, options={"family": family, "split": "id", "start": start_steps > 0})
    expert = ScriptedExpert(env)
    disturbance = Disturbance(env, family, seed, noise)
    arrays = {name: [] for name in (*CAMERAS, "state", "action")}
    text = reasoning(env.goal, env.scene())
    texts = []  # the reasoning at each step
    outcome = "never grasped"  # what a failure is called
    steps_since_success = 0
    for step in range(start_steps or LIMIT[family]):
        action = expert.action()
        # What the policy will see and be asked for: the clean action, never the executed one.
        arrays["state"].append(env.position().astype(np.float32))  # (6,)
        arrays["action"].append(action)  # (6,)
        for camera in CAMERAS if images else ():
            arrays[camera].append(env.render(env.px, camera))  # (px, px, 3)
        texts.append(text)
        success, _ = env.advance(disturbance.executed(step, action))
        text = reasoning(env.goal, env.scene())
        if text.endswith("in hand"):
            outcome = "timeout"
        elif outcome == "timeout":
            outcome = "dropped"
        if success or steps_since_success:
            steps_since_success += 1
        if steps_since_success == 4:  # a few steps at the goal teach the policy to stay there
            break
    spans = (disturbance.mistaken, disturbance.struck)
    # A demonstration's entry has no "start" yet: merge_episodes() knows how many frames come before.
    entry = {
        "length": len(texts),
        "task": env.task,
        "reason": changes(enumerate(texts)),
        "success": steps_since_success > 0,
        "seed": seed,
        "family": family,
        "kind": "start" if start_steps else "demo",
        "disturbed": [[span.start, span.stop] for span in spans if span],
    }
    failure = "" if entry["success"] else env.failure or outcome
    return {name: np.array(values) for name, values in arrays.items()}, entry, failure


def changes(texts: Iterable[tuple[int, str]]) -> list[list]:
    """(step, text) of all steps -> [[step, text], ...] of those at which another text begins."""
    found = []
    for step, text in texts:
        if not found or text != found[-1][1]:
            found.append([step, text])
    return found


def check_expert(families: Sequence[str], n: int) -> None:
    """Print how often the expert succeeds on the first n training seeds; film an episode of each family."""
    for family in families:
        env = SO100Env(px=256)
        for noise, name in ((True, "with noise and mistakes"), (False, "undisturbed")):
            failures = Counter()
            steps = 0
            for seed in tqdm(range(n), family, leave=False, disable=None):
                _, entry, failure = demonstrate(env, seed, family, noise, images=False)
                failures[failure] += 1
                steps += entry["length"]
            won = failures.pop("", 0)  # no reason to fail
            low, high = wilson(won, n)
            share = f"{100 * won / n:.1f} % of {n} ({100 * low:.1f} - {100 * high:.1f})"
            why = dict(failures) or "none"
            print(f"{family}, {name}: {share}, {steps / n:.0f} steps; failed: {why}", flush=True)
        # Statistics need no pictures; this one episode is drawn.
        arrays, _, _ = demonstrate(env, 1, family, noise=False)
        frames = np.concatenate((arrays["front"], arrays["wrist"]), axis=2)  # (n, px, 2 px, 3)
        path = save_film(list(map(Image.fromarray, frames)), "out/expert", family)
        print(f"film: {path}.gif")
        env.close()


# -----------------------------------------------------------------------------------------------------------
# Questions about a scene


def scene_questions(
    scene: dict, rng: np.random.Generator, split: str = "id"
) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer) about SO100Env.scene(), in the words of a split.

    The held-out test reports its accuracy by kind.
    """
    cubes = scene["cubes"]
    pads = scene["pads"]

    for cube in cubes:
        question = phrase(rng, f"where is the {cube['colour']} cube", f"{cube['colour']} cube")
        yield "where", question, f"{cube['t']} {cube['r']}"
    for pad in pads:
        question = phrase(rng, f"which pad is {pad['colour']}", f"{pad['colour']} pad")
        yield "pad", question, f"pad {pad['number']}"

    yield "describe pads", "describe the pads", " ".join(pad["colour"] for pad in pads)
    pad = pads[rng.integers(len(pads))]
    yield "pad colour", f"what colour is pad {pad['number']}", pad["colour"]
    yield "count", "how many cubes are there", str(len(cubes))
    one, two = (cubes[i] for i in rng.permutation(len(cubes))[:2])
    question = f"which is nearer , the {one['colour']} cube or the {two['colour']} cube"
    yield "nearer", question, min((one, two), key=by_distance)["colour"]
    left = [(cube["x"], cube["colour"]) for cube in cubes if cube["x"] < one["x"]]  # in the front picture
    # The rightmost of those to the left is the next one.
    neighbour = max(left, default=(0, "none"))[1]
    yield "left of", f"what colour is the cube left of the {one['colour']} cube", neighbour
    in_hand = [cube["colour"] for cube in cubes if cube["held"]]
    yield "in hand", "what is in the hand", f"{in_hand[0]} cube" if in_hand else "none"
    yield from sums_and_names(rng, split)
    for family in ("place", "place", "calculate", "calculate", "sequence", "sequence", "sequence"):
        task, answer = random_task(scene, family, rng, split)
        if split == ASKED and rng.random() < 0.3:
            task = replace_function_words(task, rng)
        yield "instruction", f"<task> {task}", answer  # the answer is the reasoning
    for _ in range(2):
        yield ("looks like", *two_names(rng))
    for what, things in (("cube", cubes), ("pad", pads)):
        for thing in things:
            yield "point", f"point at the {thing['colour']} {what}", thing["point"]


def phrase(rng: np.random.Generator, long: str, short: str) -> str:
    """Questions are mostly asked in short."""
    return long if rng.random() < 0.4 else short


def sums_and_names(rng: np.random.Generator, split: str) -> Iterator[tuple[str, str, str]]:
    """Of scene_questions() those that no picture answers."""
    for _ in range(2):
        expression = random_sum(rng, split)
        yield "sum", f"what is {expression}", f"{count_out(expression)} is {number_of(expression)}"
    for _ in range(2):
        colour = COLOURS[rng.integers(len(COLOURS))]
        name = rng.choice(VAGUE_NAMES[colour])  # held-out ones too: instructions never name those in training
        thing = WORDS["vague_names"][colour][name]
        question = phrase(rng, f"what colour is {name}", f"what colour is the one that looks like {thing}")
        if rng.random() < 0.5:  # reasoning begins with such an answer
            question = f"<task> {question}"
        yield "looks like", question, f"{name} is {colour}"


def two_names(rng: np.random.Generator) -> tuple[str, str]:
    """A question about two names, in the order of a reasoning's legs -> question, answer."""
    nouns = []
    answers = []
    for colour in rng.choice(COLOURS, 2):
        name = rng.choice(VAGUE_NAMES[colour])
        nouns.append(f"the one that looks like {WORDS['vague_names'][colour][name]}")
        answers.append(f"{name} is {colour}")
    question = rng.choice(WORDS["joins"]).format(*nouns)
    return f"<task> {question}", f"first , {answers[0]} , then , {answers[1]}"


def by_distance(cube: dict) -> float:
    """Order of cubes: the nearest to the arm first."""
    return cube["distance"]


def random_sum(rng: np.random.Generator, split: str) -> str:
    """Any sum or difference of digits with a result of 0 to 9, except those new to the split."""
    banned = HELD_OUT_SUMS if split == ASKED else HELD_OUT_SUMS + ASKED_SUMS
    while True:
        a, b = rng.integers(10, size=2)  # digits
        expression = f"{a} + {b}" if rng.random() < 0.5 else f"{max(a, b)} - {min(a, b)}"
        # An instruction's sum takes at most five steps.
        short = len(count_out(expression).split()) <= 4 + 2 * 5
        if expression not in banned and number_of(expression) < 10 and short:
            return expression


# Words of instructions that name things and their order. All others may be said in another way.
THINGS = [thing for things in WORDS["vague_names"].values() for thing in things.values()]
CONTENT = {*COLOURS, *WORDS["naming"], *" ".join(THINGS).split(), *"0123456789"}


def replace_function_words(task: str, rng: np.random.Generator) -> str:
    """Replace some of the words that name neither things nor order by invented ones, or leave them out.

    A model that meets nothing but known words in training fails at the first unknown one.
    """
    words = []
    for word in task.split():
        fate = rng.random()
        if word in CONTENT or fate < 0.4:
            words.append(word)
        elif fate < 0.85:
            words.append(invented_word(rng))
    return " ".join(words)


def invented_word(rng: np.random.Generator) -> str:
    """One to three syllables."""
    word = ""
    for _ in range(rng.integers(1, 4)):
        word += rng.choice(list("bcdfghklmnprstvw")) + rng.choice(list("aeiou"))
    return word + rng.choice(["", "n", "s", "t", "r"])


# -----------------------------------------------------------------------------------------------------------
# What is asked for

SCENES = {  # seeds by kind of shard: no scene has two uses
    "demo": range(0, 200_000),
    "start": range(200_000, 400_000),
    "questions": range(400_000, 1_000_000),
    "questions_val": SEEDS["val"],
}
SHARD_FILE = re.compile(r"(_\d{7}_\d+\.npz|\.npz\.tmp|settings\.json\.tmp)$")  # in <out>/parts
SHARD_SIZE = {"demo": 10, "start": 50, "questions": 100, "questions_val": 100}  # scenes per shard
EPISODES = ("demo", "start", "lerobot")  # kinds of shards; the other two hold questions
QUESTION_SETS = ("questions_val", "questions")  # in this order: what is held out is known before the rest

# What some options need: the simulation's demonstrations, questions, see common.check_needs()
SIMULATED = ("not lerobot", "not questions_from", "not export")
QUESTIONS = ("not lerobot|questions_from", "not export")


@dataclass
class PrepareConfig:
    """The options of prepare.py. A data set keeps them in its meta.json as "made_by"."""

    config: str = opt("small", "preset")
    out: str = opt("", "data set folder (default data/<config>)")
    families: str = opt(
        "place,calculate,sequence", "task families to demonstrate", tuple(LIMIT), SIMULATED, True
    )
    demos: int = opt(600, "demonstrations per family", "[0, 200000]", needs=SIMULATED)
    starts: int = opt(
        2000,
        "start episodes per family: a few steps amid work, from any arm pose",
        "[0, 200000]",
        needs=SIMULATED,
    )
    start_steps: int = opt(6, allowed="[1, 1000]")  # control steps of a start episode
    scenes: int = opt(
        26000, "pictures with questions for training; 0 for none", "[0, 600000]", needs=QUESTIONS
    )
    held_out_scenes: int = opt(
        300, "pictures with questions never trained on", "[0, 1000000]", needs=QUESTIONS
    )
    ask_beyond: bool = opt(
        True,
        "training questions also about places, sums, names and phrasings that no demonstration has",
        needs=SIMULATED,
    )
    image_size: int = opt(96, "pixels per side", "[8, 1024]", needs="not export")
    lerobot: str = opt("", "LeRobot data set to read instead of simulating: a folder or a name on the hub")
    cameras: str = opt(
        "", "role=camera,... of --lerobot, as in front=top,wrist=wrist (default: all)", needs="lerobot"
    )
    fps: int = opt(
        0, "frames per second to keep of --lerobot, a divisor of its own; 0 for all", "[0, 10000]", "lerobot"
    )
    fit: str = opt(
        "stretch",
        "how a brought picture becomes square; crop: its middle, in proportion",
        ("stretch", "crop"),
        needs="lerobot|questions_from",
    )
    convention: str = opt(
        "auto",
        "joint angles of --lerobot from an SO arm; old: zero is the arm stretched out, percent: -100..100",
        ("auto", "new", "old", "percent"),
        needs="lerobot",
    )
    calibration: str = opt(
        "",
        "LeRobot's calibration file of the recording arm, for --convention=percent (default: nominal)",
        needs="lerobot",
    )
    episodes: str = opt("", "episodes of --lerobot to read, as in 0-9,12 (default: all)", needs="lerobot")
    rename: str = opt(
        "",
        "features of --lerobot by other names, as in observation.state=state,action=actions",
        needs="lerobot",
    )
    reasoning_from: str = opt(
        "",
        "checkpoint folder of a policy whose reasoning stands in where --lerobot has none, as in out/small",
        needs="lerobot",
    )
    questions_from: str = opt(
        "",
        "image-text sets (columns images, texts), comma-separated: folders or hub names, also with /PART",
    )
    longest: int = opt(
        300,
        "characters of a brought question or answer; longer ones are left out",
        "[1, 100000]",
        needs="questions_from",
    )
    export: str = opt("", "data set folder to write to --out as a LeRobot data set")
    kinds: str = opt(
        "", "kinds of episodes to --export, as in demo (default: all, start episodes too)", needs="export"
    )
    video: str = opt(
        "", "codec of --export (default: PNG pictures, without loss)", ("", "h264", "av1"), "export"
    )
    workers: int = opt(0, "processes; 0 for one per core", "[0, 1024]")
    seed: int = opt(
        0,
        "first training scene; the choice of pictures of --questions_from",
        "[0, 1000000]",
        needs=QUESTIONS,
    )
    check_expert: int = opt(
        0,
        "only print the scripted expert's success on so many seeds, film it in out/expert",
        "[0, 100000]",
        SIMULATED,
    )

    def __post_init__(self):
        check_options(self)
        for kind, count in self.counts().items():
            if self.seed + count > len(SCENES[kind]):
                said = f"--seed={self.seed} with {count} {kind} scenes"
                raise UserError(f"{said} exceeds the {len(SCENES[kind])} seeds of that kind; lower one")
        read = self.lerobot or self.questions_from
        if not self.out and (read or self.export):
            raise UserError("say where the result goes: --out=FOLDER, for example --out=data/mine")
        self.out = self.out or f"data/{self.config}"
        if self.export and read:
            raise UserError("--export writes a finished set: leave out --lerobot and --questions_from")
        # What is made. Where others' episodes or questions are read, nothing is simulated beside them.
        self.makes_episodes = bool(self.lerobot or not self.questions_from)
        self.makes_questions = bool(self.questions_from or not self.lerobot)
        if self.calibration and self.convention != "percent":
            raise UserError("--calibration=FILE tells the degrees of 100 %: add --convention=percent")

    def counts(self) -> dict[str, int]:
        """Scenes to simulate by kind of shard, those of episodes for each family."""
        return {
            "demo": self.demos,
            "start": self.starts,
            "questions": self.scenes,
            "questions_val": self.held_out_scenes,
        }


# -----------------------------------------------------------------------------------------------------------
# Shards. A shard depends on its seeds or its source alone, and its file under <out>/parts appears when it is
# whole. So the result is bit-identical whatever the number of processes, and a killed run continues.


@dataclass(frozen=True)
class Shard:
    """Some scenes to simulate, or a part of a data set that others made."""

    kind: str  # demo, start, lerobot, questions or questions_val
    name: str  # the task family, or a word for the part
    first: int  # seed, or number within the part
    n: int
    source: Any = None  # what lerobot_io needs to read it; None: it is simulated

    def path(self, out: str) -> Path:
        return Path(out, "parts", f"{self.kind}_{self.name}_{self.first:07d}_{self.n}.npz")


def plan_simulation(cfg: PrepareConfig) -> list[Shard]:
    """The shards of a simulated data set, in the order in which it holds them."""
    shards = []
    for kind, count in cfg.counts().items():
        size = SHARD_SIZE[kind]
        # Scenes of sequence have at least two cubes, which the questions need.
        families = cfg.families.split(",") if kind in EPISODES else ["sequence"]
        # The held-out pictures are the same whatever the seed.
        seed = 0 if kind == "questions_val" else cfg.seed
        first = SCENES[kind].start + seed
        for family in families:
            for i in range(0, count, size):
                shards.append(Shard(kind, family, first + i, min(size, count - i)))
    return shards


def make_plan(cfg: PrepareConfig) -> tuple[list[Shard], dict[str, Any], int]:
    """-> shards, what meta.json says of cameras, motors and frame rate, number of pictures brought along."""
    common = {"cameras": list(CAMERAS), "motors": list(MOTORS), "fps": FPS}
    if cfg.makes_episodes and not cfg.lerobot:
        return plan_simulation(cfg), common, 0

    from extras import lerobot_io

    shards = []
    pictures = 0  # of simulated ones it is not known: failures are left out
    if cfg.lerobot:
        shards, common, pictures = lerobot_io.plan_episodes(cfg)
        if cfg.reasoning_from:
            check_reasoner(cfg, common["cameras"])
    elif Path(cfg.out, "meta.json").is_file():
        # Questions for demonstrations that are there get the same cameras and picture size.
        meta = read_meta(cfg.out)
        common = {name: meta[name] for name in common}
        cfg.image_size = np.load(Path(cfg.out, f"{common['cameras'][0]}.npy"), mmap_mode="r").shape[1]
    if cfg.questions_from:
        asked = lerobot_io.plan_questions(cfg, common["cameras"][0])
        shards = shards + asked
        pictures += sum(n for _, _, _, n, _ in asked)
    return [Shard(*shard) for shard in shards], common, pictures


def make_shard(cfg: PrepareConfig, shard: Shard) -> None:
    """Simulate or read one shard and write its file. Runs in a process of the pool."""
    if shard.source is None:
        scenes = simulate(cfg, shard)
    else:
        from extras import lerobot_io

        read = lerobot_io.read_episodes if shard.kind == "lerobot" else lerobot_io.read_questions
        scenes = read(cfg, shard)
    # A shard is small, so all of it is held in memory: what is large is merged from files.
    pieces = defaultdict(list)  # name of an array -> one piece for each scene
    info = []  # entries of meta.json for episodes, or a list of questions for each picture
    left_out = Counter()
    for arrays, entries, failures in scenes:
        info += entries
        left_out.update(failures)
        for name, array in arrays.items():
            pieces[name].append(array)
    arrays = {name: np.concatenate(found) for name, found in pieces.items()}
    with atomic_path(shard.path(cfg.out)) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, info=json.dumps(info), left_out=json.dumps(left_out))


def simulate(cfg: PrepareConfig, shard: Shard) -> Iterator[tuple[dict[str, ndarray], list, list[str]]]:
    """Of every scene its arrays, its entry of meta.json or its questions, and why a demonstration failed."""
    start_steps = cfg.start_steps if shard.kind == "start" else 0
    with closing(SO100Env(px=cfg.image_size)) as env:
        for seed in range(shard.first, shard.first + shard.n):
            if shard.kind in EPISODES:
                arrays, entry, failure = demonstrate(env, seed, shard.name, start_steps=start_steps)
                # A start episode is too short to succeed.
                if failure and not start_steps:
                    yield {}, [], [f"{shard.name}: {failure}"]
                else:
                    yield arrays, [entry], []
            else:
                split = ASKED if cfg.ask_beyond and shard.kind == "questions" else "id"
                obs, _ = env.reset(
                    seed=seed, options={"family": shard.name, "split": split, "start": True, "reach": True}
                )
                arrays = {camera: image[None] for camera, image in obs["images"].items()}  # (1, px, px, 3)
                questions = scene_questions(env.scene(), np.random.default_rng([7, seed]), split)
                yield arrays, [list(questions)], []


def make_shards(cfg: PrepareConfig, shards: Sequence[Shard]) -> None:
    """Make the shards that are not there yet, in parallel."""
    missing = [shard for shard in shards if not shard.path(cfg.out).is_file()]
    if len(missing) < len(shards):
        print(f"going on: {len(shards) - len(missing)} of {len(shards)} shards are there already")
    in_parallel(functools.partial(make_shard, cfg), missing, cfg.workers, "shard")


def in_parallel(work: Callable[[Any], None], items: Sequence[Any], workers: int, unit: str) -> None:
    """work(item) for every item, in so many processes (0: one a core), with a progress bar.

    UserError if a process was killed; what goes wrong inside one is raised here.
    """
    workers = min(workers or multiprocessing.cpu_count(), len(items))
    bar = functools.partial(tqdm, total=len(items), unit=unit, disable=None)
    if workers <= 1:  # nothing to fork
        for _ in bar(map(work, items)):
            pass
        return
    with terminable(), ProcessPoolExecutor(workers, initializer=leave_signals) as pool:
        try:
            for _ in bar(pool.map(work, items)):
                pass
        except BrokenProcessPool:
            hint = "run the same command again with fewer --workers, it goes on where it stopped"
            raise UserError(f"a process was killed, perhaps for lack of memory; {hint}") from None
        finally:
            # After Ctrl-C or an error, leaving the pool would wait for all items that were begun.
            for process in multiprocessing.active_children():
                process.terminate()


def leave_signals() -> None:
    """In a process of the pool: Ctrl-C is for the first process, which then ends the others by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# -----------------------------------------------------------------------------------------------------------
# Merging


def read_parts(paths: Sequence[Path]) -> tuple[list[Path], list[list], Counter]:
    """Of files of shards: those with something in them, what each says of its episodes or pictures, and how
    much was left out of all.
    """
    parts = []
    infos = []
    left_out = Counter()
    for path in paths:
        with np.load(path) as part:
            info = json.loads(str(part["info"]))
            left_out.update(json.loads(str(part["left_out"])))
        # All demonstrations of a shard may have failed. Its file has no arrays then.
        if info:
            parts.append(path)
            infos.append(info)
    return parts, infos, left_out


def write_array(path: Path, parts: Sequence[Path], rows: Sequence[Any], length: int) -> ndarray:
    """Join one array of the files of shards, of each the chosen rows -> the array of that length, mapped.

    One shard is in memory at a time. On a full disk a plain write raises an error; writing to a memory map
    would end the process by a signal.
    """
    with open(path, "wb") as file:
        for part, chosen in zip(tqdm(parts, f"writing {path}", leave=False, disable=None), rows):
            with np.load(part) as arrays:
                array = np.ascontiguousarray(arrays[path.stem][chosen])
            if part == parts[0]:  # the header tells the whole length, the shards only their own
                header = np.lib.format.header_data_from_array_1_0(array)
                whole = header | {"shape": (length, *array.shape[1:])}
                np.lib.format.write_array_header_1_0(file, whole)
            file.write(array)
    return np.load(path, mmap_mode="r")


def merge_questions(
    cfg: PrepareConfig, name: str, shards: Sequence[Shard], common: dict, held_out: set
) -> set:
    """The shards of that kind, if any -> <out>/<name>, renamed when it is whole -> hashes of the pictures.

    Pictures with a hash in held_out are left out: sets of others may hold a picture twice.
    """
    parts, infos, left_out = read_parts([shard.path(cfg.out) for shard in shards if shard.kind == name])
    if not parts and not left_out:
        return set()
    folder = Path(cfg.out, f"{name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a killed run
    folder.mkdir()
    cameras = common["cameras"]
    if cfg.questions_from:  # a picture of others stands for the first camera, the other views are grey
        common = common | {"grey": cameras[1:]}
        cameras = cameras[:1]
    texts = []
    rows = []  # for each shard, the pictures that stay
    hashes = set()
    for part, info in zip(parts, infos):
        with np.load(part) as arrays:
            pictures = arrays[cameras[0]]  # (n, px, px, 3)
            # Blank pictures of different sizes are different pictures.
            sizes = arrays.get("size", [""] * len(pictures))
        found = [(hashlib.sha1(picture).digest(), str(size)) for picture, size in zip(pictures, sizes)]
        chosen = [i for i, picture in enumerate(found) if picture not in held_out]
        rows.append(chosen)
        texts += [info[i] for i in chosen]
        hashes.update(found)
    if not texts:
        raise UserError(
            f"no usable picture with {name} in {cfg.questions_from}; raise --longest or choose another set"
        )
    for camera in cameras:
        write_array(folder / f"{camera}.npy", parts, rows, len(texts))
    write_json(folder / "questions.json", texts)
    write_json(folder / "meta.json", common)
    shutil.rmtree(Path(cfg.out, name), ignore_errors=True)  # of a run killed after this point
    os.replace(folder, Path(cfg.out, name))
    asked = sum(map(len, texts))
    print(f"{cfg.out}/{name}: {len(texts)} pictures, {asked} questions; left out: {dict(left_out) or 'none'}")
    return hashes


def merge_episodes(cfg: PrepareConfig, shards: Sequence[Shard], common: dict) -> None:
    """The shards of episodes -> arrays in <out>, and last meta.json: it means that the data set is whole."""
    out = Path(cfg.out)
    parts, infos, failures = read_parts([shard.path(cfg.out) for shard in shards if shard.kind in EPISODES])
    episodes = sum(infos, [])
    if not episodes:
        hint = "choose another set" if cfg.lerobot else "set --demos to more"
        raise UserError(f"not one episode can be used ({dict(failures)}); {hint}")
    # Shards are merged in the order of the plan, whichever was ready first.
    frames = 0
    for episode in episodes:
        episode["start"] = frames
        frames += episode["length"]
    arrays = {}
    for name in (*common["cameras"], "state", "action"):
        arrays[name] = write_array(out / f"{name}.npy", parts, [...] * len(parts), frames)
    if cfg.reasoning_from:
        add_reasoning(cfg.reasoning_from, episodes, arrays)
    meta = common | {
        "statistics": {name: statistics(arrays[name]) for name in ("state", "action")},
        "failures": failures,
        "episodes": episodes,
    }
    write_json(out / "meta.json", meta)
    kinds = Counter(f"{episode['family']} {episode['kind']}" for episode in episodes)
    said = f"failed demonstrations: {dict(failures) or 'none'}"
    if cfg.lerobot:
        failed = [episode["seed"] for episode in episodes if not episode["success"]]
        said = f"failed, kept but not taught: {failed or 'none'}; "
        said += f"left out or late: {dict(failures) or 'none'}"
        # Many recorders write False everywhere.
        if len(failed) == len(episodes):
            said += "; if nobody judged them, add --rename=next.success="
    print(f"{out}: {frames} frames of {dict(kinds)}; {said}")


def check_reasoner(cfg: PrepareConfig, cameras: Sequence[str]) -> None:
    """UserError, before any work, for a policy of --reasoning_from that cannot reason about the set."""
    # The config alone is read here: loading the weights takes a while.
    policy = Config.read(cfg.reasoning_from)
    wanted = {"cameras": set(policy.camera_names) <= set(cameras), "reasoning": policy.reasoning}
    wanted["image_size"] = policy.image_size == cfg.image_size
    for name, fits in wanted.items():
        if not fits:
            raise UserError(
                f"--reasoning_from={cfg.reasoning_from} has {name} {getattr(policy, name)}, which does not "
                f"suit {cfg.lerobot} (cameras {','.join(cameras)}; {cfg.image_size} pixels): leave it out"
            )


REASON_EVERY = 2  # control steps; a policy that runs reasons every n_action_steps


def add_reasoning(run: str, episodes: list[dict], arrays: dict[str, ndarray]) -> None:
    """Put a policy's own reasoning where episodes have none, so that fine-tuning it does not unlearn it.

    Without this the target of the language model would be empty text in every frame.
    """
    policy = load_policy(run)
    for episode in tqdm(episodes, "reasoning", unit="episode", leave=False, disable=None):
        if any(text for _, text in episode["reason"]):
            continue
        # One batch is an episode.
        steps = range(0, episode["length"], REASON_EVERY)
        rows = [episode["start"] + step for step in steps]
        tasks = [episode["task"]] * len(rows)
        images = np.stack([arrays[camera][rows] for camera in policy.cfg.camera_names], axis=1)
        images, _ = policy.check_inputs(images, arrays["state"][rows], tasks)
        texts, _ = policy.reason(images, tasks)
        episode["reason"] = changes(zip(steps, texts))


def merge(cfg: PrepareConfig, shards: Sequence[Shard], common: dict) -> None:
    """The files of all shards -> the finished folder."""
    common = common | {"image_size": cfg.image_size, "made_by": {"program": "prepare.py"} | asdict(cfg)}
    seen = set()
    for name in QUESTION_SETS:
        seen = merge_questions(cfg, name, shards, common, held_out=seen)
    if cfg.makes_episodes:
        merge_episodes(cfg, shards, common)


# -----------------------------------------------------------------------------------------------------------
# All of it


def is_whole(cfg: PrepareConfig, saved: Path, settings: dict[str, Any]) -> bool:
    """Has this command made its data set already? UserError if <out> holds another one, whole or begun.

    saved: the file that keeps the settings of the shards while a data set is made.
    """
    out = Path(cfg.out)
    result = out / ("meta.json" if cfg.makes_episodes else "questions")  # what appears last
    if saved.is_file():
        lock_folder(out, "prepare.py")
        # A set goes on without the episode that could not be read: its shards are named after their episodes.
        may_change = {} if result.exists() else {"episodes": cfg.episodes}
        if read_json(saved) | may_change != settings:
            raise UserError(
                f"{out} holds parts made with other settings; delete {saved.parent} or choose another --out"
            )
    elif result.exists():
        content, old = ("a data set", out) if cfg.makes_episodes else ("questions", result)
        raise UserError(f"{out} already holds {content}; delete {old} or choose another --out")
    else:
        check_free(cfg)
    return result.exists()


def check_free(cfg: PrepareConfig) -> None:
    """UserError if a new data set would take the place of files in <out> that this program has not made."""
    questions = {*QUESTION_SETS, *(f"{name}.tmp" for name in QUESTION_SETS)}
    foreign = []
    for path in sorted(Path(cfg.out).glob("[!.]*")):
        # Demonstrations may get questions later, and questions demonstrations.
        replaced = cfg.makes_questions if path.name in questions else cfg.makes_episodes
        if path.name == "parts":
            foreign += [part for part in path.iterdir() if not SHARD_FILE.search(part.name)]
        elif replaced and (path.is_dir() or path.is_file()):
            foreign.append(path)
    if foreign:
        raise UserError(f"{foreign[0]} is in the way and is left as it is; choose another --out")


def clear_parts(folder: Path) -> None:
    """Remove the files of the shards and what a kill left of them.

    The settings go last: without them, shards could be taken for another data set's.
    """
    for path in sorted(folder.iterdir()):
        if SHARD_FILE.search(path.name):
            path.unlink()
    (folder / "settings.json").unlink()
    if any(folder.iterdir()):
        return print(f"{folder} holds files that are not prepare.py's: it stays")
    folder.rmdir()


def check_disk(cfg: PrepareConfig, pictures: int) -> None:
    """UserError if the disk cannot hold the pictures twice, in shards and merged."""
    parts = Path(cfg.out, "parts")
    # After a kill, what is there already needs no more room.
    there = sum(path.stat().st_size for path in parts.iterdir())
    needed = 2 * pictures * cfg.image_size**2 * 3 - there  # bytes
    free = shutil.disk_usage(parts).free
    if needed > free:
        raise UserError(
            f"{cfg.out} takes {needed / 1e9:.1f} GB while it is made, {free / 1e9:.1f} GB are free; "
            "lower --image_size, --fps or --scenes, or choose another --out"
        )


def prepare(cfg: PrepareConfig) -> None:
    """Make what the options ask for, or continue a killed run of the same command."""
    if cfg.check_expert:
        return check_expert(cfg.families.split(","), cfg.check_expert)
    if cfg.export:
        # The core runs without extras/.
        from extras import lerobot_io

        return print(lerobot_io.export(cfg))
    saved = Path(cfg.out, "parts", "settings.json")
    settings = asdict(cfg) | {"workers": 0}  # the number of processes may change
    # After a kill at the very end, only the parts are still there to be cleared away.
    if is_whole(cfg, saved, settings):
        print(f"{cfg.out} is whole already; its parts are cleared away")
    else:
        shards, common, pictures = make_plan(cfg)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        lock_folder(cfg.out, "prepare.py")
        write_json(saved, settings)  # not earlier: a mistake found in planning leaves nothing behind
        check_disk(cfg, pictures)
        make_shards(cfg, shards)
        merge(cfg, shards, common)
    clear_parts(saved.parent)


def main(argv: Sequence[str] | None = None) -> None:
    presets = {name: {**preset} for name, preset in PRESETS.items()}
    for preset in presets.values():
        preset.pop("episodes", None)  # a number for rl.py
    cfg = parse_config(PrepareConfig, presets, sys.argv[1:] if argv is None else argv)
    run_program(prepare, cfg)


if __name__ == "__main__":
    main()
