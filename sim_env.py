"""The SO-100 arm in MuJoCo: tasks, language, inverse kinematics, the environment and its success tests.

    python sim_env.py        # a picture of every family and split, and the viewer where there is a display

Everything that a policy sees is in LeRobot's units: degrees for five joints, 0 (closed) .. 100 (open) for the
gripper.

Geometry. The arm stands at the back of the table and points to -y; the pan axis is vertical, through
PAN_AXIS. Places on the table are polar coordinates about it: `phi` in degrees, 0 straight ahead, positive
towards the arm's left (+x), and the radius `r` in metres. The front camera looks back at the arm, so phi
grows from left to right in its image, and pads 1..5 stand in this order. LeRobot's shoulder_pan is -phi.
"""

import cmath
import contextlib
import copy
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator, default_rng
from PIL import Image, ImageOps

from common import POINTS, UserError, atomic_path

GL_HELP = (
    "MuJoCo cannot draw ({}). A machine without a display needs EGL. On Debian or Ubuntu type: "
    "apt-get install libegl1 libgl1 (or: apt-get install libosmesa6, then export MUJOCO_GL=osmesa)"
)
try:
    import mujoco
except AttributeError as error:  # PyOpenGL: the library that MUJOCO_GL names is not installed
    raise UserError(GL_HELP.format(error)) from error

ASSETS = Path(__file__).parent / "assets"
MJCF = (ASSETS / "so100.xml").read_text()
WORDS = json.loads((ASSETS / "tasks.json").read_text())
MOTORS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
COLOURS = ("red", "green", "blue", "yellow", "purple")
CAMERAS = ("front", "wrist")
FAMILIES = ("place", "calculate", "sequence")
LIMIT = {"place": 60, "calculate": 60, "sequence": 110, "tiny": 60}  # control steps before truncation
LEGS = {"place": 1, "calculate": 1, "sequence": 2, "tiny": 1}  # cubes that the task moves
# Kinds of scenes. What is new in asked_* is in training questions, but in no demonstration. What is new in
# ood_* is in neither. Their order is part of every scene's seed.
SPLITS = ("id", "ood_position", "ood_instruction", "asked_position", "asked_instruction")
ASKED = "asked"  # scenes of training questions: all of id, and what the asked_* splits hold
SEEDS = {
    "train": range(1_000_000),
    "val": range(1_000_000, 2_000_000),
    "report": range(2_000_000, 3_000_000),
}
Array = np.ndarray

# ------------------------------------------------------------------------------------------------------------
# The arm and the table. Kinematics, inertias and gripper pads are the real SO-100's. Shapes are a few
# primitives, because on a CPU drawing costs more than physics. Only jaws, wrist and base can touch anything.

FPS = 10  # control steps a second
SUBSTEPS = 25  # physics steps of 4 ms in one control step
PAN_AXIS = np.array([0.0, -0.0452])  # x, y in metres
CUBE = 0.012  # half the side of a cube, metres
PAD = 0.03  # half the side of a pad, metres
MODEL = mujoco.MjModel.from_xml_string(MJCF)  # environments change copies of it
JOINT_RANGE = MODEL.jnt_range[:6]  # radians (6, 2)
# LeRobot's units = radians * SCALE + OFFSET
SCALE = np.array([-180 / np.pi] + [180 / np.pi] * 4 + [100 / 1.924])
OFFSET = np.array([0, 90, -90, 0, 0, 100 * 0.174 / 1.924])


def to_position(qpos: Array) -> Array:
    """Joint angles of the model in radians (..., 6) -> LeRobot units (..., 6)."""
    return qpos * SCALE + OFFSET


def to_qpos(position: Array) -> Array:
    """LeRobot units (..., 6) -> joint angles of the model in radians (..., 6)."""
    return (position - OFFSET) / SCALE


LOW, HIGH = np.sort(to_position(JOINT_RANGE.T), axis=0)  # joint limits in LeRobot units, (6,) each


def polar_to_xy(phi: float, r: float) -> Array:
    """Degrees and metres about the pan axis -> world x, y (2,)."""
    angle = math.radians(phi)
    return PAN_AXIS + r * np.array([math.sin(angle), -math.cos(angle)])


def xy_to_polar(xy: Array) -> tuple[float, float]:
    """World x, y (a third number is ignored) -> (phi in degrees, r in metres) about the pan axis."""
    x, y = xy[:2] - PAN_AXIS  # metres from the pan axis
    phi = math.degrees(math.atan2(x, -y))
    return phi, math.hypot(x, y)


def wrap(degrees: float, period: float = 360) -> float:
    """The same angle in [-period/2, period/2)."""
    return (degrees + period / 2) % period - period / 2


def direction_bin(phi: float) -> str:
    """Word for a direction: t0..t11, 12 bins of 8 degrees over [-48, 48]."""
    return f"t{int(np.clip((phi + 48) // 8, 0, 11))}"


def distance_bin(r: float) -> str:
    """Word for a distance: r0..r7, 8 bins of 15 mm over [.12, .24]."""
    return f"r{int(np.clip((r - 0.12) // 0.015, 0, 7))}"


# ------------------------------------------------------------------------------------------------------------
# Tasks. A goal is a dict {"legs": [Leg, ...], "sum": "3 + 1" or None}. Family place has one leg, calculate
# one leg whose pad is named by a sum, sequence two legs in this order. Family tiny has one cube, one pad and
# one sentence, so that a first policy succeeds after minutes of training.


class Leg(NamedTuple):
    """One cube and the pad on which it shall lie."""

    cube: str  # its colour
    vague: str | None  # the thing of this colour by which the instruction names the cube
    pad: str  # its colour
    number: int  # of the pad, 1..5


def number_of(expression: str) -> int:
    """The result of a sum: "3 + 1" -> 4, "3 - 1" -> 2."""
    a, sign, b = expression.split()
    return int(a) + int(sign + b)  # "-" and "1" are -1


VAGUE_NAMES = {colour: list(phrases) for colour, phrases in WORDS["vague_names"].items()}  # six a colour
EXPRESSIONS = map(" ".join, itertools.product("0123456789", "+-", "0123456789"))
SUMS = [expression for expression in EXPRESSIONS if 1 <= number_of(expression) <= 5]
SUMS.sort(key=lambda expression: (number_of(expression), expression[2]))  # 11 for each result
HELD_OUT_SUMS = SUMS[2::5]  # two or three for each result
ASKED_SUMS = SUMS[4::5]  # the same
SUMS = [expression for expression in SUMS if expression not in HELD_OUT_SUMS + ASKED_SUMS]


def count_out(expression: str) -> str:
    """A sum in numbered steps of one: "3 + 2" -> "3 + 2 : 4 1 5 2", "9 - 7" -> "9 - 7 : 8 1 9 2".

    A difference is counted from its smaller number up. A table of sums could not be continued to one that was
    never shown; steps can, and when to stop is seen from the digits.
    """
    a, sign, b = expression.split()
    start, n = (int(a), int(b)) if sign == "+" else (int(b), number_of(expression))
    steps = [f"{start + i} {i}" for i in range(1, n + 1)]
    return " ".join((expression, ":", *steps))


class Wording(NamedTuple):
    """What the instructions of a split are made of."""

    sums: list[str]
    names: slice  # of each colour's vague names
    frames: list[str]  # sentences with gaps


def grammar_frames() -> list[str]:
    """Every sentence frame that the grammar of training questions makes: some nine hundred."""
    frames = []
    for order, pieces in WORDS["asked_grammar"].items():
        for lead, link in itertools.product(pieces["leads"], pieces["links"]):
            # The gaps of the frame itself stay open.
            frames.append(order.replace("{lead}", lead).replace("{link}", link))
    return frames


# A question has a demonstration's frame, one of asked_frames or one of the grammar about equally often: the
# lists are 5, 16 and some 900 frames long.
ASKED_FRAMES = 180 * WORDS["frames"] + 56 * WORDS["asked_frames"] + grammar_frames()
WORDING = {
    "id": Wording(SUMS, slice(0, 3), WORDS["frames"]),
    "asked_instruction": Wording(ASKED_SUMS, slice(3, 4), WORDS["asked_frames"]),
    "ood_instruction": Wording(HELD_OUT_SUMS, slice(4, 6), WORDS["held_out_frames"]),
    ASKED: Wording(SUMS + ASKED_SUMS, slice(0, 4), ASKED_FRAMES),
}
NEW_WORDS = ("asked_instruction", "ood_instruction")  # splits whose words no demonstration has


def wording(split: str) -> Wording:
    """The words of a split; where positions are new the words are those of demonstrations."""
    return WORDING.get(split, WORDING["id"])


def contents(scene: dict) -> tuple[list, dict]:
    """The cubes' colours [colour, ...] and the pads' {number: colour} of SO100Env.scene()."""
    cubes = [cube["colour"] for cube in scene["cubes"]]
    pads = {pad["number"]: pad["colour"] for pad in scene["pads"]}
    return cubes, pads


def sample_goal(scene: dict, family: str, rng: Generator, split: str = "id") -> dict:
    """A random goal that the cubes and pads of SO100Env.scene() allow; UserError if there are too few.

    Where positions are new the target cubes are the first in the list. Pads that hold a cube are not asked
    for. Where there is such a pad, a share of the goals has its first leg done already; of the goals in
    training questions some have both.
    """
    n = LEGS[family]
    colours, pad_colour = contents(scene)
    if min(len(colours), len(pad_colour)) < n:
        raise UserError(f"family {family} needs {n} cubes and {n} pads in the scene")
    if split not in TARGET_AREA:
        colours = rng.permutation(colours).tolist()
    cube_on = {cube["pad"]: cube["colour"] for cube in scene["cubes"] if cube["pad"]}
    free = [number for number in pad_colour if number not in cube_on]  # pads on which no cube lies
    # The pad is drawn before the sum: pads are equally frequent, however many sums name them.
    numbers = [int(rng.choice(free))] if family == "calculate" else rng.permutation(free)[:n].tolist()
    # A policy also has to learn to say `then` and `done`: as if the first leg had been carried out.
    done_already = 0.5 if n == 2 else 0.2
    if cube_on and rng.random() < done_already:
        numbers[0] = int(rng.choice(list(cube_on)))
        done = cube_on[numbers[0]]
        colours.remove(done)
        colours.insert(0, done)
        others = [number for number in cube_on if number != numbers[0]]
        if split == ASKED and n == 2 and others and rng.random() < 0.5:  # the second leg, too
            numbers[1] = int(rng.choice(others))
            done = cube_on[numbers[1]]
            colours.remove(done)
            colours.insert(1, done)
    said = wording(split)
    new = split in NEW_WORDS
    # probability that the instruction says a cube's vague name
    named = 0.0 if new else 0.15
    if split == ASKED:
        named = 0.3
    expression = None
    if family == "calculate":
        expression = str(rng.choice([s for s in said.sums if number_of(s) == numbers[0]]))
    elif rng.random() < 0.5 and new:  # drawn in every split, so that all consume the same random numbers
        named = 1.0
    legs = []
    for colour, number in zip(colours, numbers):  # there are n numbers
        vague = None
        if family != "tiny" and rng.random() < named:
            vague = str(rng.choice(VAGUE_NAMES[colour][said.names]))
        legs.append(Leg(colour, vague, pad_colour[number], number))
    return {"legs": legs, "sum": expression}


# ------------------------------------------------------------------------------------------------------------
# Language: instructions from goals, the teacher's reasoning, and goals from a person's own words

VERBS = WORDS["verbs"]


def phrases(leg: Leg, expression: str | None, rng: Generator, plain: bool) -> tuple[str, str]:
    """What a leg's cube and pad are called. Plain sentences have the usual words.

    "the red cube", "the red block" or "the one that looks like a tomato"; "the blue pad" or "the blue
    square", for a sum "pad 3 + 1", "pad number 3 plus 1", ...
    """

    def noun(usual: str, rare: str) -> str:
        return usual if plain or rng.random() < 0.6 else rare

    if leg.vague:
        cube = f"the one that looks like {WORDS['vague_names'][leg.cube][leg.vague]}"
    else:
        cube = f"the {leg.cube} {noun('cube', 'block')}"
    if expression is None:
        return cube, f"the {leg.pad} {noun('pad', 'square')}"
    if not plain and rng.random() < 0.5:
        expression = expression.replace("+", "plus").replace("-", "minus")
    return cube, f"{noun('pad', 'pad number')} {expression}"


def instruction(family: str, goal: dict, rng: Generator, split: str = "id") -> str:
    """The sentence for a goal, lower case, words and punctuation separated by single spaces.

    Training sentences are the canonical one (30 %) or a random phrasing. Where words are new the sentence
    frame is one that demonstrations never have, except where something else is new already: in half of the
    sums, and for new vague names.
    """

    def pick(kind: str) -> str:
        return rng.choice(WORDS[kind])

    legs = goal["legs"]
    new = split in NEW_WORDS and family != "tiny"
    if new and goal["sum"]:
        new = rng.random() < 0.5
    elif new:
        new = not any(leg.vague for leg in legs)
    plain = family == "tiny" or (not new and rng.random() < 0.3)
    clauses = []  # one for each leg
    for leg in legs:
        cube, pad = phrases(leg, goal["sum"], rng, plain)
        if plain:
            clauses.append(f"{cube} on {pad}")
            continue
        frames = wording(split if new or split == ASKED else "id").frames
        frame = frames[rng.integers(len(frames))]
        if clauses and not new and rng.random() < 0.3:
            frame = "{cube} {preposition} {pad}"  # "... , then the green cube onto the yellow pad"
        verb = pick("verbs")
        clauses.append(frame.format(cube=cube, pad=pad, verb=verb, preposition=pick("prepositions")))
    if plain:  # the canonical sentence
        return f"put {' , then '.join(clauses)}"
    text = clauses[0]
    if len(clauses) == 2:
        text = pick("joins").format(*clauses)
    if new or rng.random() >= 0.4:
        return text
    if rng.random() < 0.5:
        return f"{pick('prefixes')} {text}"
    return f"{text} {pick('suffixes')}"


def reasoning(goal: dict, scene: dict) -> str:
    """The teacher's reasoning, `blue pad at t3 , red cube at t5 r3`, from the truth in SO100Env.scene().

    It goes from leg to leg as far as the first whose cube does not lie on its pad, and ends in `done` where
    there is none: `first , blue pad at t3 , red cube there , then , green pad at t8 , yellow cube in hand`.
    What is seen is said before what follows from it: a policy that had to begin with the verdict would have
    to reach it without thinking.
    """
    cubes = {cube["colour"]: cube for cube in scene["cubes"]}
    pads = {pad["colour"]: pad for pad in scene["pads"]}
    # The order is said where there are two legs.
    orders = ("first , ", "then , ") if len(goal["legs"]) == 2 else ("",)
    text = ""
    for order, leg in zip(orders, goal["legs"]):
        cube = cubes[leg.cube]
        name = f"{leg.vague} is {leg.cube} , " if leg.vague else ""
        counted = f"{count_out(goal['sum'])} is pad {leg.number} , " if goal["sum"] else ""
        pad = f"{leg.pad} pad at {pads[leg.pad]['t']}"
        text += f"{order}{name}{counted}{pad} , {leg.cube} cube "
        if cube["held"]:
            return text + "in hand"
        if cube["pad"] != leg.number:
            return text + f"at {cube['t']} {cube['r']}"
        text += "there , "
    return text + "done"


def random_task(scene: dict, family: str, rng: Generator, split: str = "id") -> tuple[str, str]:
    """A random instruction about any scene and the reasoning for it; UserError if too little lies there."""
    goal = sample_goal(scene, family, rng, split)
    return instruction(family, goal, rng, split), reasoning(goal, scene)


COLOUR_OF = {name: colour for colour, names in VAGUE_NAMES.items() for name in names}
ANY_COLOUR = "|".join(COLOURS)
CUBE_PATTERN = rf"\b({ANY_COLOUR}) (?:cube|block)\b|looks like (?:an? |the )?({'|'.join(COLOUR_OF)})\b"
PAD_PATTERN = rf"\b({ANY_COLOUR}) (?:pad|square)\b|pad (?:number )?(\d [+-] \d)\b"


def understand(task: str, scene: dict) -> dict:
    """A person's own words -> the goal that they name in SO100Env.scene().

    The first cube named goes on the first pad named, the second on the second. UserError if it is not clear
    which cube goes where, or if the scene has not got what the words name.
    """
    words = " ".join(re.findall(r"\w+|[^\w\s]", task.lower()))
    words = words.replace(" plus ", " + ").replace(" minus ", " - ")
    # What is mentioned, in the order in which it is: [(colour, vague name or ""), ...]
    cubes = [(colour or COLOUR_OF[name], name) for colour, name in re.findall(CUBE_PATTERN, words)]
    pads = re.findall(PAD_PATTERN, words)  # [(colour, "") or ("", sum), ...]
    expression = "".join(text for _, text in pads)
    # As many pads as cubes, none of them twice; a sum names one pad of one leg.
    distinct = len(dict(cubes)) == len(cubes) == len(pads) == len(set(pads))
    if not distinct or not 1 <= len(cubes) <= (1 if expression else 2):
        raise UserError(
            f"cannot tell which cube goes where in {task!r}; say: put the red cube on the blue pad"
        )
    present, pad_colour = contents(scene)
    number_with = {colour: number for number, colour in pad_colour.items()}
    legs = []
    for (cube, vague), (pad, _) in zip(cubes, pads):
        number = number_with.get(pad) if pad else number_of(expression)
        if cube not in present or number not in pad_colour:
            raise UserError(
                f"no {cube} cube or no pad {pad or expression} in this scene: there are {', '.join(present)} "
                f"cubes and, from left to right, {', '.join(number_with)} pads; choose another --seed"
            )
        legs.append(Leg(cube, vague or None, pad_colour[number], number))
    return {"legs": legs, "sum": expression or None}


# ------------------------------------------------------------------------------------------------------------
# Where things lie. An area is ((lowest phi, highest phi), (lowest r, highest r)).

PAD_R = 0.265  # all pads lie on this arc
PAD_PHI = (-40, -20, 0, 20, 40)  # pads 1..5
CUBE_AREA = ((-42, 42), (0.13, 0.21))
TINY_AREA = ((-25, 25), (0.15, 0.20))
DROPPED_AREA = ((-50, 50), (0.13, 0.30))
HELD_OUT_AREA = ((9, 25), (0.165, 0.21))  # empty in training
ASKED_AREA = ((-25, -9), (0.165, 0.21))  # empty in demonstrations
TARGET_AREA = {"ood_position": HELD_OUT_AREA, "asked_position": ASKED_AREA}  # where all target cubes are
TOOL_AREA = ((-60, 60), (0.13, 0.29))  # where the tool is when an episode starts amid work
CUBE_GAP = 0.055  # between centres: room for an open jaw between two cubes


def sample_place(rng: Generator, area: tuple) -> tuple[float, float]:
    """A place (phi, r), uniform on the surface of an area."""
    (phi0, phi1), (r0, r1) = area
    phi = rng.uniform(phi0, phi1)
    # The surface within r grows with its square.
    return phi, math.sqrt(rng.uniform(r0**2, r1**2))


def inside(area: tuple, phi: float, r: float) -> bool:
    """Does a place lie in an area?"""
    (phi0, phi1), (r0, r1) = area
    return phi0 <= phi <= phi1 and r0 <= r <= r1


def is_free(xy: Array, others: list) -> bool:
    """Is there room for a cube at (x, y), with other cubes at these places?"""
    return all(math.dist(xy, other) >= CUBE_GAP for other in others)


def sample_cubes(rng: Generator, family: str, split: str, n: int, pads: list) -> list[tuple]:
    """Places of n cubes [(phi, r), ...], at least CUBE_GAP apart; targets in TARGET_AREA come first.

    With the places of pads [(phi, r), ...], some cubes lie on a pad already and some anywhere, as amid work.
    """
    usual = TINY_AREA if family == "tiny" else CUBE_AREA
    targets = LEGS[family] if split in TARGET_AREA else 0
    empty = [HELD_OUT_AREA]  # where no other cube may lie
    if split in ("id", "asked_position", "asked_instruction"):
        empty.append(ASKED_AREA)
    while True:
        places = []
        for i in range(n):
            area = TARGET_AREA[split] if i < targets else usual
            others = [polar_to_xy(*place) for place in places]
            for _ in range(50):  # trials for this cube
                phi, r = sample_place(rng, amid_work(rng, area, places, pads))
                allowed = i < targets or not any(inside(hole, phi, r) for hole in empty)
                if allowed and is_free(polar_to_xy(phi, r), others):
                    places.append((phi, r))
                    break
        if len(places) == n:  # otherwise there was no room for one of them: begin again
            return places


def amid_work(rng: Generator, usual: tuple, places: list, pads: list) -> tuple:
    """The area of a cube's next trial: about one of the pads (25 %), anywhere (15 %) or the usual area."""
    if not pads or sum(r > 0.22 for _, r in places) >= 2:  # goals need free pads
        return usual
    kind = rng.random()  # which of the three
    if kind < 0.25:
        phi, r = pads[rng.integers(len(pads))]
        return (phi - 4, phi + 4), (r - 0.02, r + 0.02)
    if kind < 0.4:
        return DROPPED_AREA
    return usual


# ------------------------------------------------------------------------------------------------------------
# Inverse kinematics, in closed form but for the tilt of the tool. Points of the arm's vertical plane are
# complex numbers u + v * 1j in metres, u forward and v up. Tilts are angles downwards from u in radians: pi/2
# points straight down.

SHOULDER = 0.0306 + 0.119j  # from the foot of the pan axis
UPPER_ARM = 0.11257 - 0.028j  # shoulder to elbow, at tilt 0
FOREARM = 0.1349 + 0.0052j  # elbow to wrist, at tilt 0
FINGER = 0.1014  # origin of the fixed jaw to the centre of its fingertip
TIP = 0.0601 + FINGER  # wrist axis to the centre of the fingertips
OPEN = 33.0  # gripper: 53 mm between the fingers
CLOSED = 11.0  # gripper: a little narrower than a cube, so that it squeezes
# of shoulder_lift, elbow_flex, wrist_flex in radians; the last a little inside the joint's 1.66
PLANE_RANGES = (*JOINT_RANGE[1:3], (-1.62, 1.62))


def pinch_x(gripper: float) -> float:
    """Middle between the fingers across the jaw, metres in the fixed jaw's frame, for a gripper in 0..100."""
    jaw = (gripper - OFFSET[5]) / SCALE[5]  # radians
    moving = -0.0202 + 0.0103 * math.cos(jaw) - 0.077 * math.sin(jaw)  # the moving finger
    return max((0.0079 + moving) / 2, -0.018)  # wider open, the cube stays near the fixed finger


def length(vector: complex) -> float:
    """abs() with the rounding of math.hypot, so that joint positions stay the same to the bit."""
    return math.hypot(vector.real, vector.imag)


def corner(a: float, b: float, opposite: float) -> float:
    """The angle of a triangle between its sides a and b, by the law of cosines."""
    return math.acos((a * a + b * b - opposite * opposite) / (2 * a * b))


def solve_plane(point: complex, tool: complex, tilt: float) -> tuple | None:
    """Angles that bring the tool's end to a point at a tilt; None where they cannot.

    tool: from the wrist to the tool's end at tilt 0.
    """
    # the wrist's place, seen from the shoulder
    wrist = point - tool * cmath.rect(1, -tilt) - SHOULDER
    # the sides of the triangle shoulder, elbow, wrist
    a = length(UPPER_ARM)
    b = length(FOREARM)
    d = length(wrist)
    if not abs(a - b) < d < a + b:
        return None
    down = -cmath.phase(wrist)  # tilt of the line from shoulder to wrist
    # tilts of the two links, with the elbow above the line from shoulder to wrist
    upper = down - corner(a, d, b)
    fore = down + corner(b, d, a)
    # Angles of the joints: differences of tilts, which are counted from the links' own directions.
    lift = upper + cmath.phase(UPPER_ARM)
    elbow = fore + cmath.phase(FOREARM) - lift
    angles = (lift, elbow, tilt - lift - elbow)
    possible = all(low < angle < high for angle, (low, high) in zip(angles, PLANE_RANGES))
    return angles if possible else None


def solve_steepest(point: complex, tool: complex) -> tuple | None:
    """solve_plane() at the tilt nearest to the vertical that the joints allow; None if there is none."""
    for degrees in range(90, -45, -5):  # from the vertical upwards
        flat = math.radians(degrees)
        best = solve_plane(point, tool, flat)
        if best:
            break
    if best is None or degrees == 90:
        return best
    steep = flat + math.radians(5)
    for _ in range(12):  # halve the interval between a tilt that works and one that does not
        middle = (steep + flat) / 2
        solution = solve_plane(point, tool, middle)
        if solution:
            best = solution
            flat = middle
        else:
            steep = middle
    return best


def inverse(phi: float, r: float, z: float, roll: float = -90.0, gripper: float = CLOSED) -> Array:
    """Joint positions (6,) in LeRobot units that bring the middle between the fingertips to a place.

    phi (degrees) and r (metres) about the pan axis, z (metres) above the table, roll: wrist_roll in degrees,
    gripper in 0..100. The tool is as close to vertical as the joints allow: exactly vertical is impossible
    higher than about 9 cm. UserError for a place out of reach.
    """
    pinch = -pinch_x(gripper) * cmath.rect(1, math.radians(roll))  # from the roll axis: rise + side * 1j
    # The arm's plane passes beside the place, by the pinch's distance from the roll axis.
    u = math.sqrt(max(r * r - pinch.imag * pinch.imag, 0))
    angles = solve_steepest(complex(u, z), complex(TIP, pinch.real))
    if angles is None:
        raise UserError(f"out of reach: r={r:.3f} z={z:.3f} metres; stay within r .13 to .38 and z 0 to .15")
    pan = math.radians(phi) - math.atan2(pinch.imag, u)
    position = to_position([pan, *angles, math.radians(roll), 0])
    position[5] = gripper
    return position


# ------------------------------------------------------------------------------------------------------------
# Pictures

if sys.platform == "linux" and not os.environ.get("DISPLAY") and not os.environ.get("MUJOCO_GL"):
    # Without a display MuJoCo draws through EGL. Setting MUJOCO_GL=egl here would come too late where a
    # program imported mujoco first, but every new renderer looks the class of its OpenGL context up in this
    # module. Where EGL is missing the class stays, and the first drawing raises UserError.
    with contextlib.suppress(ImportError, AttributeError):
        from mujoco.egl import GLContext
        from mujoco.rendering.classic import gl_context

        gl_context.GLContext = GLContext


def resize_image(picture: Image.Image, px: int, fit: str) -> Array:
    """A camera's picture of any size -> (px, px, 3) uint8; one of this size already stays bit for bit.

    fit: stretch (all of it) or crop (the middle, in proportion). Recordings and live cameras both come
    through here, so that a policy sees the same scene in the same way.
    """
    resize = ImageOps.fit if fit == "crop" else Image.Image.resize
    return np.asarray(resize(picture.convert("RGB"), (px, px), Image.Resampling.BILINEAR))


def picture_point(model: Any, data: Any, name: str, xyz: Array, flips: tuple[int, int] = (1, 1)) -> str:
    """Words for where world xyz lies in a camera's square picture: columns x0 .. x31 and rows y0 .. y31.

    flips: -1 where columns, rows of the picture are in reverse order.
    """
    camera = data.camera(name)
    right, down, depth = (xyz - camera.xpos) @ camera.xmat.reshape(3, 3) * [1, -1, -1]  # metres
    reach = depth * math.tan(math.radians(model.camera(name).fovy[0]) / 2)  # half the picture
    place = np.array([right, down]) / reach * flips  # (2,) -1 .. 1
    x, y = np.clip((place + 1) / 2 * POINTS, 0, POINTS - 1).astype(int).tolist()
    return f"x{x} y{y}"


# ------------------------------------------------------------------------------------------------------------
# The environment

# Bodies of so100.xml in their order; 0 is the world with the table.
ARM = range(1, 8)  # base .. fixed jaw, moving jaw
# Pads and cubes are the last rows of the model's bodies, and also of its geoms: each has one geom.
PADS = slice(-9, -4)
CUBES = slice(-4, None)
PAD_ROWS = range(-9, -4)
HOME = np.array([0, 0.15, 0.11, -90])  # phi, r, z, roll of the tool when an episode starts
HOME_SPREAD = np.array([10, 0.015, 0.01, 10])
SHADE_SPREAD = np.array([0.12, 0.04, 0.04, 0.04])  # of a colour: brightness, red, green, blue
CAMERA_SPREAD = np.repeat([[0.01, 0.005], [0.02, 0.003]], 3, axis=1)  # (2, 6): radians, metres


def check_task(family: str, split: str) -> None:
    """UserError for a family or a split that does not exist."""
    for kind, word, known in (("family", family, LIMIT), ("split", split, (*SPLITS, ASKED))):
        if word not in known:
            raise UserError(f"unknown {kind} {word!r}: type one of {', '.join(known)}")


def quaternion(yaw: float) -> tuple:
    """A turn by `yaw` radians about the vertical as MuJoCo's (w, x, y, z)."""
    return math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)


def check_actions(actions: Array) -> Array:
    """Actions as float64 (n, 6); UserError unless each has one finite number for every motor."""
    actions = np.asarray(actions, np.float64)
    if actions.shape[1:] != (6,) or len(actions) == 0:
        raise UserError(f"an action has 6 numbers, {', '.join(MOTORS)}; got shape {actions.shape[1:]}")
    if not np.isfinite(actions).all():
        raise UserError(f"an action must be finite; got {actions[~np.isfinite(actions).all(1)][0]}")
    return actions


class SO100Env:
    """One simulated arm with Gymnasium's signatures.

    family: place, calculate, sequence or tiny. split: one of SPLITS, or ASKED. px: side of the
    images. moved: at this control step (plus the seed modulo 4, so that no fixed interval of looking has an
    advantage) the cube to be fetched is suddenly elsewhere; 0: never.

    Observations are {"images": {camera: (px, px, 3) uint8}, "state": (6,) float32 in LeRobot units,
    "task": str}.
    """

    # what the programs ask an environment class for
    cameras = CAMERAS
    motors = MOTORS
    families = LIMIT
    fps = FPS
    splits = SPLITS

    def __init__(self, family: str = "place", split: str = "id", px: int = 96, moved: int = 0):
        check_task(family, split)
        self.family = family
        self.split = split
        self.px = px
        self.moved = moved
        self.model = copy.copy(MODEL)
        self.data = mujoco.MjData(self.model)
        self.cube_pose = self.data.qpos[6:].reshape(4, 7)  # a view: x, y, z, quaternion
        self.cube_velocity = self.data.qvel[6:].reshape(4, 6)  # a view: linear, angular
        self.goal = None
        self.renderers = {}  # px -> renderer

    # -- episodes --------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Start an episode -> observation, info. The same seed and options give the same bits.

        options: family, split, start (True: amid work, with any valid arm pose and some cubes on pads
        already), reach (True: the hand is often about a cube or holds one) and task (a person's own
        instruction: the first scene from `seed` on that has what it names, a scene of sequence or of tiny).
        Without a seed a training one is drawn, or for the other splits a report one.
        """
        known = {
            "family": self.family,
            "split": self.split,
            "start": False,
            "reach": False,
            "task": "",
        }
        chosen = known | (options or {})
        if len(chosen) > len(known):
            raise UserError(f"unknown reset options {sorted(chosen.keys() - known)}: type {', '.join(known)}")
        family, split, start, reach, task = chosen.values()  # in the order of `known`
        check_task(family, split)
        if seed is None:
            usual = "train" if split == "id" else "report"
            seed = int(default_rng().choice(SEEDS[usual]))
        if seed in SEEDS["train"] and split not in ("id", ASKED):
            raise UserError(
                f"seed {seed} is a training seed and split {split} must never be trained on: "
                f"type a seed of at least {SEEDS['val'].start}"
            )
        self.family = family
        self.split = split
        if not task:
            self._make_scene(seed, start, reach)
            return self._obs(), self._info()
        if family != "tiny":
            self.family = "sequence"
        for candidate in range(seed, seed + 200):
            self._make_scene(candidate, start, reach)
            with contextlib.suppress(UserError):
                understand(task, self.scene())
                break
        return self.instruct(task), self._info()  # UserError if no scene has what the task names

    def instruct(self, task: str) -> dict:
        """Another instruction, in a person's own words, for the scene as it is -> observation.

        The time limit begins anew. UserError if the instruction names what is not there.
        """
        self.goal = understand(task, self.scene())
        self.task = task
        if self.family != "tiny":  # the time limit depends on the family
            self.family = "calculate" if self.goal["sum"] else "place"
            if len(self.goal["legs"]) == 2:
                self.family = "sequence"
        self._begin()
        return self._obs()

    def _begin(self) -> None:
        self.steps = 0
        self.failure = ""
        self.in_order = False

    def _make_scene(self, seed: int, start: bool, reach: bool) -> None:
        """A scene and its instruction, without a picture; start and reach as in reset()."""
        self.seed = seed
        self.moved_at = None
        # Every kind of scene has random numbers of its own.
        kind = (list(LIMIT).index(self.family), (*SPLITS, ASKED).index(self.split))
        rng = default_rng([*kind, seed, int(start)])
        mujoco.mj_resetData(self.model, self.data)
        self._place_things(rng, start)
        self._vary(rng)
        self._pose_arm(rng, start)
        if reach and rng.random() < 0.6:
            self._reach(rng)
        self.goal = sample_goal(self.scene(), self.family, rng, self.split)
        self.task = instruction(self.family, self.goal, rng, self.split)
        self._begin()

    def _place_things(self, rng: Generator, start: bool) -> None:
        """Lay out cubes and pads. Unused ones are parked under the table, out of touch."""
        m = self.model
        if self.family == "tiny":
            self.cube_colours = ["red"]
            self.pad_colours = [None, None, "blue", None, None]
        else:
            n = rng.integers(2, 5)
            self.cube_colours = rng.permutation(COLOURS)[:n].tolist()
            self.pad_colours = rng.permutation(COLOURS).tolist()
        if self.split == "ood_position":
            turned = rng.choice([-1, 1]) * rng.uniform(5, 8)  # degrees
        else:
            turned = rng.uniform(-3, 3)
        r = PAD_R + rng.uniform(-0.006, 0.006)
        pads = [(phi + turned, r) for phi in PAD_PHI]
        for row, pad, colour in zip(PAD_ROWS, pads, self.pad_colours):
            m.body_pos[row] = (*polar_to_xy(*pad), 0 if colour else -1)
            m.body_quat[row] = quaternion(math.radians(pad[0]))
        if not start or self.family == "tiny":  # no cube begins on a pad
            pads = []
        n = len(self.cube_colours)
        places = sample_cubes(rng, self.family, self.split, n, pads)
        used = np.arange(4) < n  # (4,)
        m.body_gravcomp[CUBES] = ~used
        m.geom_contype[CUBES] = used
        m.geom_conaffinity[CUBES] = used
        yaws = rng.uniform(0, math.pi / 2, 4)
        for i, yaw in enumerate(yaws):
            # Parked ones lie one metre deep and one metre apart. _vary() lifts the others onto the table.
            x, y = polar_to_xy(*places[i]) if i < n else (i, 0)
            self.cube_pose[i] = (x, y, -1, *quaternion(yaw))

    def _vary(self, rng: Generator) -> None:
        """Colours, light, cameras, friction and size: fields of the model, written anew at every reset."""
        m = self.model
        n = len(self.cube_colours)
        # A colour changes in brightness and a little in hue.
        noise = rng.uniform(-SHADE_SPREAD, SHADE_SPREAD, (7, 4))
        rgb = np.array(list(WORDS["rgb"].values()))  # (7, 3)
        rgb = rgb * (1 + noise[:, :1]) + noise[:, 1:]
        shades = dict(zip(WORDS["rgb"], rgb.clip(0, 1)))
        colour = m.geom_rgba[:, :3]  # a view (geoms, 3)
        colour[0] = shades["table"]
        colour[MODEL.geom_rgba[:, 0] > 0.9] = shades["link"]  # the lightest parts of the arm
        colour[PADS] = [shades[name or "table"] for name in self.pad_colours]
        colour[CUBES][:n] = [shades[name] for name in self.cube_colours]
        # One lamp: its brightness and direction.
        # An array of one number, because a plain float would be multiplied in float32 as the field is.
        brightness = 1 + rng.uniform(-0.3, 0.3, 1)
        m.light_diffuse[0] = MODEL.light_diffuse[0] * brightness
        direction = MODEL.light_dir[0] + rng.uniform(-0.25, 0.25, 3)
        m.light_dir[0] = direction / np.linalg.norm(direction)
        # Cameras: somewhere near, turned a little.
        noise = rng.uniform(-CAMERA_SPREAD, CAMERA_SPREAD)  # (2, 6)
        m.cam_pos[:] = MODEL.cam_pos + noise[:, 3:]
        for old, quat, half in zip(MODEL.cam_quat, m.cam_quat, noise[:, :3] / 2):
            mujoco.mju_mulQuat(quat, old, np.array([1, *half]))  # (4,): a turn by 2 * half about each axis
            quat /= np.linalg.norm(quat)
        friction = MODEL.geom_friction[CUBES, 0]
        m.geom_friction[CUBES, 0] = friction * (1 + rng.uniform(-0.2, 0.2, 4))
        # The sides of a cube are equal. It stands on the table.
        m.geom_size[CUBES] = CUBE + rng.uniform(-0.0005, 0.0005, (4, 1))
        self.cube_pose[:n, 2] = m.geom_size[CUBES, 2][:n]

    def _pose_arm(self, rng: Generator, start: bool) -> None:
        """Near home, or (start) anywhere the tool is above the table and touches nothing."""
        d = self.data
        while True:
            if start:
                phi, r = sample_place(rng, TOOL_AREA)
                z, roll, gripper = rng.uniform((0.02, -160, 0), (0.15, 0, 70))
                position = inverse(phi, r, z, roll, gripper) + rng.uniform(-12, 12, 6)
            else:
                pose = HOME + rng.uniform(-HOME_SPREAD, HOME_SPREAD)
                position = inverse(*pose, OPEN) + rng.uniform(-2, 2, 6)
            d.qpos[:6] = to_qpos(position.clip(LOW, HIGH))
            d.ctrl[:] = d.qpos[:6]  # the servos hold this pose
            mujoco.mj_forward(self.model, d)
            touching = np.isin(self._contacts(), ARM).any()
            if not touching and d.site_xpos[:, 2].min() > 0.012:  # the lower fingertip
                return

    def _reach(self, rng: Generator) -> None:
        """The open hand about a cube, or a cube in the hand: where it lay, above that, or about a pad."""
        before = self.data.qpos.copy()
        for _ in range(20):  # trials: often something is in the way
            colour = rng.choice(self.cube_colours)
            held = rng.random() < 0.6
            phi, r = xy_to_polar(self.cube_xyz(colour))
            roll = -90 + wrap(self.cube_yaw(colour) - phi, 90)
            if held and rng.random() < 0.5:
                phi, r = xy_to_polar(self.pad_xy(rng.integers(1, 6)) + rng.uniform(-0.03, 0.03, 2))
                roll = rng.uniform(-130, -50)
            z = CUBE + 0.003 if rng.random() < 0.3 else rng.uniform(CUBE, 0.09)  # metres
            position = inverse(phi, min(r, 0.3), z, roll, rng.uniform(OPEN - 8, OPEN + 4))
            self.data.qpos[:] = before
            self.data.qpos[:6] = to_qpos(position.clip(LOW, HIGH))
            if held:
                self._hold(colour)
            mujoco.mj_forward(self.model, self.data)
            pairs = self._contacts()
            pairs = pairs[np.isin(pairs, ARM).any(1)]  # (n, 2): what the arm touches
            if held:  # it may touch this cube
                pairs = pairs[(pairs != self.model.nbody + self._row(colour)).all(1)]
            if held == self.held(colour) and not len(pairs) and self.data.site_xpos[:, 2].min() > 0.004:
                self.data.ctrl[:] = self.data.qpos[:6]
                return
        self.data.qpos[:] = before
        mujoco.mj_forward(self.model, self.data)

    def _hold(self, colour: str) -> None:
        """Close the gripper on a cube that is put between the fingers."""
        for gripper in np.arange(14, 10, -0.5):
            self.data.qpos[5] = (gripper - OFFSET[5]) / SCALE[5]
            mujoco.mj_forward(self.model, self.data)
            self.cube_pose[self._row(colour)] = (*self.tool(), *self.data.body("fixed_jaw").xquat)
            mujoco.mj_forward(self.model, self.data)
            if self.held(colour):
                return

    def _move_target(self) -> None:
        """Put the cube to be fetched at least 5 cm away, where the seed says; not while a jaw touches it."""
        todo = [leg.cube for leg in self.goal["legs"] if self.pad_under(leg.cube) != leg.number]
        if not todo or any(self.touching(todo[0])):
            return
        rng = default_rng([self.seed, self.moved])
        here = self.cube_xyz(todo[0])[:2]
        others = [self.cube_xyz(colour)[:2] for colour in self.cube_colours if colour != todo[0]]
        while self.moved_at is None:
            phi, r = sample_place(rng, CUBE_AREA)
            there = polar_to_xy(phi, r)
            far = math.dist(there, here) >= 0.05
            if far and not inside(HELD_OUT_AREA, phi, r) and is_free(there, others):
                row = self._row(todo[0])
                self.cube_pose[row, :2] = there
                self.cube_velocity[row] = 0
                self.moved_at = self.steps

    # -- truth -----------------------------------------------------------------------------------------------

    def position(self) -> Array:
        """Measured joint positions (6,) in LeRobot units."""
        return to_position(self.data.qpos[:6])

    def tool(self) -> Array:
        """The point in the middle between the fingertips (3,), metres."""
        jaw = self.data.body("fixed_jaw")
        return jaw.xpos + jaw.xmat.reshape(3, 3) @ (pinch_x(self.position()[5]), -FINGER, 0)

    def _row(self, colour: str) -> int:
        """A cube's row in the arrays of bodies, geoms, cube_pose and cube_velocity: -4..-1."""
        return self.cube_colours.index(colour) - 4

    def cube_xyz(self, colour: str) -> Array:
        """Centre of a cube (3,), metres."""
        return self.data.xpos[self._row(colour)].copy()

    def cube_axes(self, colour: str) -> Array:
        """A cube's axes in the world: the columns of a rotation matrix (3, 3)."""
        return self.data.xmat[self._row(colour)].reshape(3, 3)

    def cube_yaw(self, colour: str) -> float:
        """Yaw of a cube in degrees, modulo 90, from whichever of its axes lies flattest."""
        axes = self.cube_axes(colour)
        x, y, _ = axes[:, np.abs(axes[2]).argmin()]
        return wrap(math.degrees(math.atan2(y, x)), 90)

    def pad_xy(self, number: int) -> Array:
        """Centre of pad 1..5 (2,), metres."""
        return self.model.body_pos[PAD_ROWS[number - 1], :2].copy()

    def _contacts(self) -> Array:
        """The two bodies of every contact (contacts, 2)."""
        return self.model.geom_bodyid[self.data.contact.geom]

    def touching(self, colour: str) -> tuple[bool, bool]:
        """Does the cube touch the (fixed, moving) jaw?"""
        cube = self.model.nbody + self._row(colour)
        pairs = self._contacts()
        touched = pairs[(pairs == cube).any(1)]  # (n, 2): those of this cube
        return ARM[-2] in touched, ARM[-1] in touched

    def held(self, colour: str) -> bool:
        """Is the cube between the jaws?"""
        return all(self.touching(colour))

    def over_pad(self, colour: str, number: int) -> bool:
        """Is the cube's centre above that pad, at any height?"""
        row = PAD_ROWS[number - 1]
        offset = self.cube_xyz(colour) - self.data.xpos[row]  # (3,)
        axes = self.data.xmat[row].reshape(3, 3)  # columns
        within = np.abs(offset @ axes) < PAD  # (3,) in the pad's frame
        return bool(within[:2].all())

    def pad_under(self, colour: str) -> int | None:
        """Number of the pad on which the cube lies, let go of, or None. It may still move: see resting()."""
        # higher than on the pad, or not let go of
        if self.cube_xyz(colour)[2] > CUBE + 0.006 or self.held(colour):
            return None
        for number, there in enumerate(self.pad_colours, 1):
            if there and self.over_pad(colour, number):
                return number
        return None

    def resting(self, colour: str, number: int) -> bool:
        """Does the cube lie still and released on that pad?"""
        velocity = self.cube_velocity[self._row(colour)].reshape(2, 3)
        slow = np.linalg.norm(velocity, axis=1) < (0.02, 0.3)  # m/s, rad/s
        return bool(slow.all()) and self.pad_under(colour) == number

    def placed(self, colour: str, number: int) -> bool:
        """The strict test: at rest and level on the pad, touching no jaw, no other cube over the pad."""
        if not self.resting(colour, number) or any(self.touching(colour)):
            return False
        half = self.model.geom_size[self._row(colour), 2]
        height = self.cube_xyz(colour)[2] - half
        upright = np.abs(self.cube_axes(colour)[2]).max()  # 1: some face is exactly level
        if abs(height) >= 0.002 or upright <= 0.995:
            return False
        return not any(self.over_pad(other, number) for other in self.cube_colours if other != colour)

    def scene(self) -> dict:
        """The truth in words and numbers, plain Python: {"cubes": [...], "pads": [...]}."""
        cubes = []
        pads = []
        for colour in self.cube_colours:
            xyz = self.cube_xyz(colour)
            phi, r = xy_to_polar(xyz)
            cube = {
                "colour": colour,
                "t": direction_bin(phi),
                "r": distance_bin(r),
                "x": float(xyz[0]),  # orders cubes from left to right in the front picture
                "distance": r,  # from the pan axis
                "point": self.point(xyz),
                "held": self.held(colour),
                "pad": self.pad_under(colour),
            }
            cubes.append(cube)
        for number, colour in enumerate(self.pad_colours, 1):
            if colour:
                xy = self.pad_xy(number)
                pad = {
                    "colour": colour,
                    "number": number,
                    "t": direction_bin(xy_to_polar(xy)[0]),
                    "point": self.point(np.array([*xy, 0.0])),
                }
                pads.append(pad)
        return {"cubes": cubes, "pads": pads}

    def point(self, xyz: Array) -> str:
        """Words for where world xyz lies in the front picture: columns x0 .. x31 and rows y0 .. y31."""
        return picture_point(self.model, self.data, "front", xyz)

    def _judge(self) -> bool:
        """Is the whole task done? It fails once the second cube rests on its pad before the first."""
        legs = self.goal["legs"]
        if len(legs) == 2:
            # Later the first cube may be knocked off and put back: the order was right all the same.
            first, second = (self.resting(leg.cube, leg.number) for leg in legs)
            self.in_order = self.in_order or first
            if second and not self.in_order:
                self.failure = "wrong order"
        done = all(self.placed(leg.cube, leg.number) for leg in legs)
        return done and not self.failure

    def _info(self, executed: int = 0) -> dict:
        return {
            "success": self._judge(),
            "reason": reasoning(self.goal, self.scene()),
            "split": self.split,
            "family": self.family,
            "seed": self.seed,
            "steps": self.steps,
            "executed": executed,
            "failure": self.failure,
            "moved_at": self.moved_at,
        }

    # -- acting and seeing -----------------------------------------------------------------------------------

    def step(self, action: Array) -> tuple:
        """One control step of 1 / FPS seconds; action (6,) target positions in LeRobot units.

        -> observation, reward, terminated, truncated, info.
        """
        return self.step_chunk([action])

    def step_chunk(self, actions: Array) -> tuple:
        """Up to n control steps, actions (n, 6), ending early with the episode; one picture, at the end.

        The reward is 1 for success, info["executed"] says how many steps were executed, info["steps"] how
        many since reset. UserError for actions of another shape and for numbers that are not finite.
        """
        if self.goal is None:
            raise UserError("the episode has not begun: call reset() first")
        before = self.steps
        for action in check_actions(actions):
            terminated, truncated = self.advance(action)
            if terminated or truncated:
                break
        info = self._info(self.steps - before)
        return self._obs(), float(terminated), terminated, truncated, info

    def advance(self, action: Array) -> tuple[bool, bool]:
        """One control step without drawing, action (6,) in LeRobot units -> terminated, truncated."""
        if self.moved and self.moved_at is None and self.steps >= self.moved + self.seed % 4:
            self._move_target()
        self.data.ctrl[:] = to_qpos(np.clip(action, LOW, HIGH))
        mujoco.mj_step(self.model, self.data, SUBSTEPS)
        mujoco.mj_forward(self.model, self.data)  # contacts and places of the new state
        self.steps += 1
        terminated = self._judge()
        return terminated, self.steps >= LIMIT[self.family] and not terminated

    def _obs(self) -> dict:
        images = {camera: self.render(self.px, camera) for camera in CAMERAS}
        state = self.position().astype(np.float32)  # (6,)
        return {"images": images, "state": state, "task": self.task}

    def render(self, px: int = 256, camera: str = "front") -> Array:
        """A picture (px, px, 3) uint8; UserError if px is not in 8..1024 or MuJoCo cannot draw."""
        if not 8 <= px <= 1024:
            raise UserError(f"images of {px} pixels: type a px between 8 and 1024")
        if px not in self.renderers:
            try:
                self.renderers[px] = mujoco.Renderer(self.model, px, px, max_geom=100)
            except (RuntimeError, ImportError, AttributeError, mujoco.FatalError) as error:
                raise UserError(GL_HELP.format(error)) from error
        renderer = self.renderers[px]
        renderer.update_scene(self.data, camera)
        return renderer.render()

    def close(self) -> None:
        """Free the OpenGL contexts."""
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers.clear()


def main() -> None:
    """Draw every family (rows) in every split (columns), then open the viewer if there is a display."""
    env = SO100Env(px=224)
    rows = []
    for family in FAMILIES:
        row = []
        for split in SPLITS:
            options = {"family": family, "split": split}
            obs, _ = env.reset(seed=SEEDS["val"].start, options=options)
            row += obs["images"].values()
            print(f"{family:10} {split:16} {env.task}")
        rows.append(np.hstack(row))
    with atomic_path("out/sim/contact_sheet.png") as temporary:
        Image.fromarray(np.vstack(rows)).save(temporary, "png")
    print("wrote out/sim/contact_sheet.png")
    if os.environ.get("DISPLAY") or sys.platform in ("darwin", "win32"):
        import mujoco.viewer

        print("the viewer is open: move the sliders under Control; close the window to end")
        mujoco.viewer.launch(env.model, env.data)


if __name__ == "__main__":
    main()
