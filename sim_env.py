"""The SO-100 arm in MuJoCo: scene, language tasks, cameras, success tests, scripted expert, many arms at once.

    python sim_env.py              # contact sheet and expert GIFs in out/sim/, expert success, viewer if there is a display
    python sim_env.py 500          # the expert's success with noise over 500 seeds a family

Everything a policy sees is in LeRobot's units: degrees for five joints, 0 (closed) .. 100 (open) for the gripper.

Geometry. The arm stands at the back of the table and points to -y; the pan axis is vertical, through PAN_AXIS. Places on
the table are polar about it: `phi` in degrees, 0 straight ahead, positive towards the arm's left (+x), and radius `r` in
metres. The front camera looks back at the arm, so phi grows from left to right in its image and pads 1..5 read left to
right there. LeRobot's shoulder_pan is -phi.
"""

import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image


from common import UserError

GL_HELP = (
    "MuJoCo cannot draw: no working OpenGL library. On Debian or Ubuntu type: apt-get install libegl1 libgl1 "
    "(or, without EGL: apt-get install libosmesa6, then MUJOCO_GL=osmesa)"
)
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # must be set before mujoco is imported
try:
    import mujoco
except (ImportError, AttributeError) as error:  # what PyOpenGL raises when libEGL is not there
    if getattr(error, "name", None) == "mujoco":
        raise
    sys.exit(GL_HELP)  # whichever program imported this: a person reads one line, not a traceback

MOTORS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
COLOURS = ("red", "green", "blue", "yellow", "purple")
CAMERAS = ("front", "wrist")
FAMILIES = (
    "place",
    "calculate",
    "sequence",
)  # and "tiny": one cube, one pad, one sentence; a first success in minutes
SPLITS = ("id", "ood_position", "ood_instruction")
SEEDS = {
    "train": range(0, 1_000_000),
    "val": range(1_000_000, 2_000_000),
    "report": range(2_000_000, 3_000_000),
}
FPS = 10
LIMIT = {"place": 60, "calculate": 60, "sequence": 110, "tiny": 60}  # control steps before truncation


# ---------------------------------------------------------------------------------------------------------------
# The arm and the table. Kinematics, inertias and gripper pads are the real SO-100's, every rotation a right angle; shapes
# are a few primitives, because on a CPU drawing costs more than physics. Only jaws, wrist and base can touch anything.

MJCF = (Path(__file__).parent / "assets" / "so100.xml").read_text()
SUBSTEPS = 25  # physics steps of 4 ms in one control step
PAN_AXIS = np.array([0.0, -0.0452])
CUBE = 0.012  # half size of a cube, metres
PAD = 0.03  # half size of a pad
RGB = {
    "red": (0.86, 0.1, 0.1),
    "green": (0.1, 0.62, 0.15),
    "blue": (0.08, 0.25, 0.9),
    "yellow": (0.97, 0.82, 0.08),
    "purple": (0.62, 0.15, 0.7),
}
TABLE, LINK = (0.72, 0.70, 0.66), (0.93, 0.92, 0.88)
JOINT_RANGE = np.array(
    [(-1.92, 1.92), (-3.32, 0.174), (-0.174, 3.14), (-1.66, 1.66), (-2.79, 2.79), (-0.174, 1.75)]
)
SCALE = np.array([-180 / np.pi] + [180 / np.pi] * 4 + [100 / 1.924])  # LeRobot = radians * SCALE + OFFSET
OFFSET = np.array([0, 90, -90, 0, 0, 100 * 0.174 / 1.924])


def to_position(qpos):
    """Joint angles of the model in radians (..., 6) -> LeRobot units (..., 6)."""
    return np.asarray(qpos) * SCALE + OFFSET


def to_qpos(position):
    """LeRobot units (..., 6) -> joint angles of the model in radians (..., 6)."""
    return (np.asarray(position) - OFFSET) / SCALE


LOW, HIGH = np.sort(to_position(JOINT_RANGE.T), axis=0)  # joint limits in LeRobot units, each (6,)


def polar_to_xy(phi, r):
    """Degrees and metres about the pan axis -> world x, y (2,)."""
    return PAN_AXIS + r * np.array([math.sin(math.radians(phi)), -math.cos(math.radians(phi))])


def xy_to_polar(xy):
    """World x, y -> (phi in degrees, r in metres) about the pan axis."""
    x, y = xy[0] - PAN_AXIS[0], xy[1] - PAN_AXIS[1]
    return math.degrees(math.atan2(x, -y)), math.hypot(x, y)


def wrap(degrees, period=360):
    """The same angle in [-period/2, period/2)."""
    return (degrees + period / 2) % period - period / 2


def direction_bin(phi):
    """Word for a direction: t0..t11, 12 bins of 8 degrees over [-48, 48]."""
    return f"t{min(max(int((phi + 48) // 8), 0), 11)}"


def distance_bin(r):
    """Word for a distance: r0..r7, 8 bins of 15 mm over [.12, .24]."""
    return f"r{min(max(int((r - 0.12) // 0.015), 0), 7)}"


# ---------------------------------------------------------------------------------------------------------------
# Language. A goal is a plain dict {"legs": [(cube colour, vague name or None, pad colour, pad number), ...],
# "sum": "3 + 1" or None}. One leg is "place" (or "calculate", with a sum), two legs are "sequence".

VAGUE_NAMES = {
    "red": ("tomato", "strawberry", "cherry", "fire", "blood", "ketchup"),
    "green": ("grass", "frog", "leaf", "lime", "cucumber", "broccoli"),
    "blue": ("sky", "sea", "sapphire", "blueberry", "ocean", "jeans"),
    "yellow": ("banana", "lemon", "sun", "corn", "butter", "canary"),
    "purple": ("grape", "plum", "lavender", "lilac", "eggplant", "amethyst"),
}
HELD_OUT_NAMES = {
    colour: names[-2:] for colour, names in VAGUE_NAMES.items()
}  # instructions say them in ood_instruction only
ARTICLE = {
    "the": ("sky", "sea", "sun", "ocean"),
    "": ("grass", "fire", "blood", "ketchup", "jeans", "corn", "butter", "lavender", "lilac", "broccoli"),
}
ALL_SUMS = [
    f"{a} {op} {b}"
    for result in range(1, 6)
    for op in "+-"
    for a in range(10)
    for b in range(10)
    if result == (a + b if op == "+" else a - b)
]  # 11 for each result 1..5
HELD_OUT_SUMS = ALL_SUMS[2::5]  # two or three for each result, never trained on
SUMS = [s for s in ALL_SUMS if s not in HELD_OUT_SUMS]


# {c} cube, {d} destination, {v} verb, {p} preposition
FRAMES = ("{v} {c} {p} {d}", "{v} {c} {p} {d}", "{p} {d} {v} {c}", "{c} goes {p} {d}", "{d} gets {c}")
VERBS = ("put", "place", "move", "set", "bring", "lay")
PREPOSITIONS = ("on", "onto", "on top of", "to")
PREFIXES, SUFFIXES = ("now ,", "robot ,", "hello robot ,"), (", please", "now", ", robot", ", robot , please")
JOINS = (
    "{a} , then {b}",
    "{a} and then {b}",
    "first {a} , then {b}",
    "{a} , after that {b}",
    "first {a} , after that {b}",
)
NEW_FRAMES = (
    "i want {c} on {d}",
    "make sure {c} ends up on {d}",
    "{d} should hold {c}",
    "drop {c} onto {d}",
    "could you carry {c} over to {d}",
    "{c} has to be on {d}",
    "take {c} and leave it on {d}",
    "let {c} rest on {d}",
)


def number_of(expression):
    """ "3 + 1" -> 4."""
    a, op, b = expression.split()
    return int(a) + int(b) if op == "+" else int(a) - int(b)


def cube_phrase(colour, vague, rng, plain):
    """ "the red cube", "the red block" or "the one that looks like a tomato"."""
    if vague is None:
        return f"the {colour} cube" if plain or rng.random() < 0.6 else f"the {colour} block"
    article = next(
        (a for a, names in ARTICLE.items() if vague in names), "an" if vague[0] in "aeiou" else "a"
    )
    return " ".join(f"the one that looks like {article} {vague}".split())


def pad_phrase(colour, expression, rng, plain):
    """ "the blue pad", or for a sum "pad 3 + 1", "pad number 3 plus 1", ..."""
    if expression is None:
        return f"the {colour} pad" if plain or rng.random() < 0.6 else f"the {colour} square"
    if not plain and rng.random() < 0.5:
        expression = expression.replace("+", "plus").replace("-", "minus")
    return ("pad " if plain or rng.random() < 0.6 else "pad number ") + expression


def instruction(family, goal, rng, split="id"):
    """The sentence for a goal, lower case, words and punctuation separated by single spaces.

    Training sentences are the canonical one (30 %) or a random phrasing. Split ood_instruction uses sentence frames that
    training never has, except where something else is already new: half the sums, and goals with held-out vague names.
    """
    new = split == "ood_instruction" and family != "tiny"
    if new:
        new = rng.random() < 0.5 if goal["sum"] else not any(vague for _, vague, _, _ in goal["legs"])
    plain = family == "tiny" or (not new and rng.random() < 0.3)
    clauses = []
    for i, (cube, vague, pad, _) in enumerate(goal["legs"]):
        c, d = cube_phrase(cube, vague, rng, plain), pad_phrase(pad, goal["sum"], rng, plain)
        frame = rng.choice(NEW_FRAMES) if new else FRAMES[0] if plain else rng.choice(FRAMES)
        if i == 1 and not new and (plain or rng.random() < 0.3):
            frame = "{c} {p} {d}"  # "... , then the green cube on the yellow pad"
        verb, preposition = ("put", "on") if plain else (rng.choice(VERBS), rng.choice(PREPOSITIONS))
        clauses.append(frame.format(v=verb, p=preposition, c=c, d=d))
    if len(clauses) == 2:
        join = JOINS[0] if plain else rng.choice(JOINS)
        clauses = [join.format(a=clauses[0], b=clauses[1])]
    text = clauses[0]
    if not plain and not new and rng.random() < 0.4:
        text = f"{rng.choice(PREFIXES)} {text}" if rng.random() < 0.5 else f"{text} {rng.choice(SUFFIXES)}"
    return text


def reasoning(goal, scene):
    """What a teacher would think now: `blue is pad 2 , red cube at t5 r3`, from the truth in `scene` (SO100Env.scene()).

    The first leg whose cube does not lie on its pad is the one being worked on; none left: `done`.
    """
    cubes = {cube["colour"]: cube for cube in scene["cubes"]}
    for i, (colour, vague, pad, number) in enumerate(goal["legs"]):
        cube = cubes[colour]
        if cube["pad"] == number:
            continue
        where = "in hand" if cube["held"] else f"at {cube['t']} {cube['r']}"
        order = "" if len(goal["legs"]) == 1 else ("first , ", "then , ")[i]
        name = f"{vague} is {colour} , " if vague else ""
        return f"{order}{name}{goal['sum'] or pad} is pad {number} , {colour} cube {where}"
    return "done"


def sample_goal(scene, family, rng, split="id"):
    """A random goal that the cubes and pads in `scene` allow. Target cubes are the first in the list for ood_position.

    Pads that hold a cube are not asked for, but where there is one, a share of the goals has its first leg done already.
    """
    n = 2 if family == "sequence" else 1
    if len(scene["cubes"]) < n or len(scene["pads"]) < n:
        raise UserError(
            f"family {family!r} needs {n} cubes and {n} pads, the scene has "
            f"{len(scene['cubes'])} and {len(scene['pads'])}"
        )
    colours = [cube["colour"] for cube in scene["cubes"]]
    colours = colours[:n] if split == "ood_position" else [str(c) for c in rng.permutation(colours)[:n]]
    lying = {cube["pad"]: cube["colour"] for cube in scene["cubes"] if cube["pad"]}
    pads = [pad for pad in scene["pads"] if pad["number"] not in lying]
    expression = None
    if family == "calculate":
        numbers = {pad["number"]: pad for pad in pads}
        pads = [
            numbers[int(rng.choice(list(numbers)))]
        ]  # pads equally often, whatever the number of sums that name them
    else:
        pads = [pads[i] for i in rng.permutation(len(pads))[:n]]
    if lying and rng.random() < (0.5 if n == 2 else 0.2):  # as if the first leg were done
        number = int(rng.choice(list(lying)))
        others = [colour for colour in colours if colour != lying[number]]
        colours, pads[0] = (
            [lying[number], *others][:n],
            next(pad for pad in scene["pads"] if pad["number"] == number),
        )
    if family == "calculate":
        sums = HELD_OUT_SUMS if split == "ood_instruction" else SUMS
        expression = str(rng.choice([s for s in sums if number_of(s) == pads[0]["number"]]))
    chance = {
        "id": 0.15,
        "ood_position": 0.15,
        "ood_instruction": 0 if expression else float(rng.random() < 0.5),
    }[split]
    legs = []
    for colour, pad in zip(colours, pads):
        vague = None
        if family != "tiny" and rng.random() < chance:
            vague = str(
                rng.choice(HELD_OUT_NAMES[colour] if split == "ood_instruction" else VAGUE_NAMES[colour][:-2])
            )
        legs.append((colour, vague, pad["colour"], pad["number"]))
    return {"legs": legs, "sum": expression}


def parse(task):
    """A person's own words -> cubes [(colour, vague name or None), ...] and pads [(colour, None) or (None, sum), ...], or ValueError."""
    words = " ".join(re.findall(r"\w+|[^\w\s]", task.lower()))
    vague = {name: colour for colour, names in VAGUE_NAMES.items() for name in names}
    colours, names = "|".join(COLOURS), "|".join(vague)
    cubes = [
        (c or vague[v], v or None)
        for c, v in re.findall(rf"\b({colours}) (?:cube|block)\b|looks like (?:an? |the )?({names})\b", words)
    ]
    sums = [
        f"{a} {'+' if op in ('+', 'plus') else '-'} {b}"
        for a, op, b in re.findall(r"pad (?:number )?(\d) (\+|-|plus|minus) (\d)\b", words)
    ]
    pads = [(c, None) for c in re.findall(rf"\b({colours}) (?:pad|square)\b", words)] + [
        (None, s) for s in sums
    ]
    different = len({c for c, _ in cubes}) == len(cubes) and len(set(pads)) == len(pads)
    if not cubes or len(cubes) != len(pads) or len(cubes) > 2 or (sums and len(cubes) != 1) or not different:
        raise UserError(
            f"cannot tell which cube goes where in {task[:80]!r}; say it like: put the red cube on the blue pad"
        )
    return cubes, pads


def understand(task, scene):
    """A person's own words -> the goal they name in this scene, or ValueError. Cubes and pads pair up in the order said."""
    cubes, pads = parse(task)
    colour_of = {pad["number"]: pad["colour"] for pad in scene["pads"]}
    number_with = {colour: number for number, colour in colour_of.items()}
    present = {cube["colour"] for cube in scene["cubes"]}
    if missing := [c for c, _ in cubes if c not in present]:
        raise UserError(
            f"there is no {missing[0]} cube in this scene, only {', '.join(sorted(present))}; choose another --seed"
        )
    numbers = [number_with.get(colour) if colour else number_of(s) for colour, s in pads]
    if missing := [p for p, n in zip(pads, numbers) if n not in colour_of]:
        raise UserError(
            f"there is no pad {missing[0][0] or missing[0][1]} in this scene; pads are {', '.join(f'{n} {c}' for n, c in colour_of.items())}"
        )
    return {"legs": [(c, v, colour_of[n], n) for (c, v), n in zip(cubes, numbers)], "sum": pads[0][1]}


def random_task(scene, family, rng, split="id"):
    """A random instruction about any scene and the reasoning that answers it: (task, reason)."""
    goal = sample_goal(scene, family, rng, split)
    return instruction(family, goal, rng, split), reasoning(goal, scene)


# ---------------------------------------------------------------------------------------------------------------
# Where things lie.

PAD_R, PAD_PHI = 0.265, (-40, -20, 0, 20, 40)
CUBE_AREA = ((-42, 42), (0.13, 0.21))  # phi, r
TINY_AREA = ((-25, 25), (0.15, 0.20))
DROPPED_AREA = ((-50, 50), (0.13, 0.30))
HELD_OUT_AREA = (
    (9, 25),
    (0.165, 0.21),
)  # no training scene has a cube there; in ood_position every target cube is
CUBE_GAP = 0.055  # between centres: room for an open jaw between two cubes


def sample_place(rng, area):
    """Uniform on an arc-shaped area ((phi, phi), (r, r)) -> (phi, r)."""
    (phi0, phi1), (r0, r1) = area
    return rng.uniform(phi0, phi1), math.sqrt(rng.uniform(r0**2, r1**2))


def held_out(phi, r):
    (phi0, phi1), (r0, r1) = HELD_OUT_AREA
    return phi0 <= phi <= phi1 and r0 <= r <= r1


def sample_cubes(rng, family, split, n, pads=()):
    """Places of n cubes [(phi, r), ...], targets of ood_position first, at least CUBE_GAP apart.

    With the places of pads, some cubes lie on a pad already and some anywhere, as after work half done.
    """
    targets = 0 if split != "ood_position" else 2 if family == "sequence" else 1
    while True:
        places = []
        for i in range(n):
            for _ in range(50):
                area = HELD_OUT_AREA if i < targets else TINY_AREA if family == "tiny" else CUBE_AREA
                kind = (
                    rng.random() if pads and sum(r > 0.22 for _, r in places) < 2 else 1
                )  # goals need free pads
                if kind < 0.25:
                    phi, r = pads[rng.integers(len(pads))]
                    area = (phi - 4, phi + 4), (r - 0.02, r + 0.02)
                elif kind < 0.4:
                    area = DROPPED_AREA
                phi, r = sample_place(rng, area)
                apart = all(np.linalg.norm(polar_to_xy(phi, r) - polar_to_xy(*p)) >= CUBE_GAP for p in places)
                if apart and (i < targets or not held_out(phi, r)):
                    places.append((phi, r))
                    break
        if len(places) == n:
            return places


# ---------------------------------------------------------------------------------------------------------------
# Inverse kinematics, in closed form but for the tilt of the tool. In the vertical plane of the arm, u points forward and
# v up; angles are measured downwards from u, so pi/2 is straight down.

SHOULDER = np.array([0.0306, 0.119])  # from the foot of the pan axis
UPPER, FOREARM = np.array([0.11257, -0.028]), np.array([0.1349, 0.0052])
TIP = 0.0601 + 0.1014  # wrist axis to the centre of the fingertips
WRIST_LIMIT = 1.62  # a little inside the joint's 1.66
OPEN, CLOSED = (
    33.0,
    11.0,
)  # gripper: 53 mm between the fingers; and a little narrower than a cube, so that it squeezes


def turn(vector, angle):
    """Rotate (u, v) downwards."""
    u, v = vector
    return np.array([u * math.cos(angle) + v * math.sin(angle), v * math.cos(angle) - u * math.sin(angle)])


def pinch_x(gripper):
    """Middle between the fingers across the jaw, metres in the fixed jaw's frame, for a gripper in 0..100."""
    jaw = (gripper - OFFSET[5]) / SCALE[5]
    moving = -0.0202 + 0.0103 * math.cos(jaw) - 0.077 * math.sin(jaw)
    return max((0.0079 + moving) / 2, -0.018)  # wider open, the cube stays near the fixed finger


def solve_plane(u, v, tool, tilt):
    """Angles (lift, elbow, wrist) in radians that bring the tool's end to (u, v) at a tilt, or None."""
    wrist = np.array([u, v]) - turn(tool, tilt) - SHOULDER
    a, b, d = math.hypot(*UPPER), math.hypot(*FOREARM), math.hypot(*wrist)
    if not abs(a - b) < d < a + b:
        return None
    down = math.atan2(-wrist[1], wrist[0])
    upper = down - math.acos((a * a + d * d - b * b) / (2 * a * d))  # elbow up
    fore = down + math.acos((b * b + d * d - a * a) / (2 * b * d))
    lift = upper + math.atan2(UPPER[1], UPPER[0])
    elbow = fore + math.atan2(FOREARM[1], FOREARM[0]) - lift
    inside = JOINT_RANGE[1, 0] < lift < JOINT_RANGE[1, 1] and JOINT_RANGE[2, 0] < elbow < JOINT_RANGE[2, 1]
    return (lift, elbow, tilt - lift - elbow) if inside and abs(tilt - lift - elbow) <= WRIST_LIMIT else None


def inverse(phi, r, z, roll=-90.0, gripper=CLOSED):
    """Joint positions (6,) in LeRobot units that bring the middle between the fingertips to a place.

    phi (degrees) and r (metres) about the pan axis, z (metres) above the table, roll: wrist_roll in degrees, gripper 0..100.
    The tool is as close to vertical as the joints allow: exactly vertical is impossible higher than about 9 cm.
    """
    x = pinch_x(gripper)
    side, rise = (
        -x * math.sin(math.radians(roll)),
        -x * math.cos(math.radians(roll)),
    )  # of the pinch from the roll axis
    u, tool = math.sqrt(max(r * r - side * side, 0)), np.array([TIP, rise])
    steep, flat = math.pi / 2, None
    best = solve_plane(u, z, tool, steep)
    for degrees in range(85, -45, -5) if best is None else ():
        best, flat = solve_plane(u, z, tool, math.radians(degrees)), math.radians(degrees)
        if best:
            steep = flat + math.radians(5)
            break
    if best is None:
        raise UserError(f"out of reach: r={r:.3f} z={z:.3f} metres; stay within r .13 to .38 and z 0 to .15")
    for _ in range(
        12 if flat is not None else 0
    ):  # halve the interval between a tilt that works and one that does not
        middle = (steep + flat) / 2
        solution = solve_plane(u, z, tool, middle)
        best, steep, flat = (solution, steep, middle) if solution else (best, middle, flat)
    pan = math.radians(phi) - math.atan2(side, u)
    position = to_position(np.array([pan, *best, math.radians(roll), 0]))
    position[5] = gripper
    return position


def check_task(family, split):
    if family not in LIMIT:
        raise UserError(f"unknown family {family!r}: type one of {', '.join(LIMIT)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: type one of {', '.join(SPLITS)}")


class SO100Env:
    """One simulated arm with Gymnasium's signatures.

    family: place, calculate, sequence or tiny. split: id, ood_position or ood_instruction. px: side of the images.
    randomise: how much colours, light, cameras, friction, cube size and the first arm pose vary; 0 is not at all.
    moved: at this control step (plus the seed modulo 4, which favours no rhythm of looking) the cube to be fetched is suddenly
    elsewhere; 0 never. patience: the step limit as a multiple of the family's.
    """

    cameras, motors, families, splits = (
        CAMERAS,
        MOTORS,
        LIMIT,
        SPLITS,
    )  # what the programs ask an environment class for

    def __init__(self, family="place", split="id", px=96, randomise=1.0, moved=0, patience=1.0):
        check_task(family, split)
        self.family, self.split, self.px, self.randomise, self.moved, self.patience = (
            family,
            split,
            px,
            randomise,
            moved,
            patience,
        )
        self.model = mujoco.MjModel.from_xml_string(MJCF)
        self.data = mujoco.MjData(self.model)
        self.seeder = np.random.default_rng()
        self.goal = self.task = self.renderer = self.big = None
        self.seconds = {"physics": 0.0, "rendering": 0.0}  # spent so far
        self._name_things()

    def _name_things(self):
        """Look up the model's indices once, and keep the fields that reset() varies as they were."""
        m = self.model
        geoms_of = lambda body: np.flatnonzero(m.geom_bodyid == m.body(body).id)
        self.cube_body = [m.body(f"cube{i}").id for i in range(4)]
        self.cube_geom = [int(geoms_of(f"cube{i}")[0]) for i in range(4)]
        self.cube_q = [
            m.jnt_qposadr[m.body_jntadr[b]] for b in self.cube_body
        ]  # 7 numbers: place and quaternion
        self.cube_v = [m.jnt_dofadr[m.body_jntadr[b]] for b in self.cube_body]
        self.pad_body = [m.body(f"pad{i}").id for i in range(1, 6)]
        self.pad_geom = [geoms_of(f"pad{i}")[0] for i in range(1, 6)]
        self.fixed, self.moving = ({int(g) for g in geoms_of(body)} for body in ("fixed_jaw", "moving_jaw"))
        self.arm_geoms = np.flatnonzero(
            (m.geom_bodyid >= m.body("base").id) & (m.geom_bodyid <= m.body("moving_jaw").id)
        )
        self.links = self.arm_geoms[np.isclose(m.geom_rgba[self.arm_geoms, 0], LINK[0])]
        self.table = m.geom("table").id
        self.original = {
            name: getattr(m, name).copy()
            for name in (
                "cam_pos",
                "cam_quat",
                "light_diffuse",
                "light_dir",
                "geom_rgba",
                "geom_friction",
                "geom_size",
            )
        }

    # -- episodes -----------------------------------------------------------------------------------------------

    def reset(self, *, seed=None, options=None):
        """Start an episode -> obs, info. options: family, split, start (True: amid work, with any valid arm pose and some cubes
        on pads already).

        The same seed, family, split and start give the same episode, bit for bit. Without a seed a training one is drawn,
        or for the two out-of-distribution splits a report one.
        """
        options = dict(options or {})
        start = options.pop("start", False)
        family, split = options.pop("family", self.family), options.pop("split", self.split)
        if options:
            raise UserError(f"unknown reset options {sorted(options)}: type family, split or start")
        check_task(family, split)
        if seed is None:
            seed = int(self.seeder.choice(SEEDS["train" if split == "id" else "report"]))
        if seed in SEEDS["train"] and split != "id":
            raise UserError(
                f"seed {seed} is a training seed and split {split} must never be trained on: "
                f"type a seed of at least {SEEDS['val'].start}"
            )
        self.family, self.split, self.seed = family, split, seed
        rng = np.random.default_rng([list(LIMIT).index(family), SPLITS.index(split), seed, int(start)])
        mujoco.mj_resetData(self.model, self.data)
        self._place_things(rng, start)
        self._vary(rng)
        self._pose_arm(rng, start)
        self.steps, self.failure, self.in_order, self.moved_at = 0, "", False, None
        self.goal = sample_goal(self.scene(), family, rng, split)
        self.task = instruction(family, self.goal, rng, split)
        return self._obs(), self._info(0)

    def reset_for(self, task, seed, family="sequence"):
        """Like reset(), for a person's own instruction: the first of the family's scenes from `seed` on that has the cubes it names."""
        parse(task)  # complain about the words before 200 scenes are searched
        problem = None
        for s in range(seed, seed + 200):
            self.reset(seed=s, options={"family": family})
            try:
                return self.instruct(task), self._info()
            except UserError as error:
                problem = error
        raise problem

    def instruct(self, task):
        """From now on a person's own instruction holds, in the scene as it is, with the whole time for it -> obs; ValueError if it
        names what is not there."""
        self.goal, self.task = understand(task, self.scene()), task
        if self.family != "tiny":
            self.family = (
                "sequence" if len(self.goal["legs"]) == 2 else "calculate" if self.goal["sum"] else "place"
            )
        self.steps, self.failure, self.in_order = 0, "", False
        return self._obs()

    def _place_things(self, rng, start=False):
        """Lay out cubes and pads."""
        m, d = self.model, self.data
        tiny = self.family == "tiny"
        n = 1 if tiny else int(rng.integers(2, 5))
        self.cube_colours = ["red"] if tiny else [str(c) for c in rng.permutation(COLOURS)[:n]]
        self.pad_colours = (
            [None, None, "blue", None, None] if tiny else [str(c) for c in rng.permutation(COLOURS)]
        )
        far = self.split == "ood_position"
        turned = rng.choice([-1, 1]) * rng.uniform(5, 8) if far else rng.uniform(-3, 3)
        shift = rng.uniform(-0.006, 0.006)
        for body, phi, colour in zip(self.pad_body, PAD_PHI, self.pad_colours):
            m.body_pos[body] = (*polar_to_xy(phi + turned, PAD_R + shift), 0 if colour else -1)
            half = math.radians(phi + turned) / 2
            m.body_quat[body] = (math.cos(half), 0, 0, math.sin(half))
        pads = [(phi + turned, PAD_R + shift) for phi in PAD_PHI] if start and not tiny else ()
        places = sample_cubes(rng, self.family, self.split, n, pads)
        for i, (q, body, geom) in enumerate(zip(self.cube_q, self.cube_body, self.cube_geom)):
            used = i < n
            m.body_gravcomp[body] = 0 if used else 1
            m.geom_contype[geom] = m.geom_conaffinity[geom] = int(used)
            yaw = rng.uniform(0, math.pi / 2)
            xy = polar_to_xy(*places[i]) if used else (i, 0)
            d.qpos[q : q + 7] = (*xy, CUBE if used else -1, math.cos(yaw / 2), 0, 0, math.sin(yaw / 2))

    def _vary(self, rng):
        """Colours, light, cameras, friction and size: fields of the model, written anew at every reset."""
        m, k = self.model, self.randomise
        for name, value in self.original.items():
            getattr(m, name)[:] = value
        spread = lambda size, shape=3: k * rng.uniform(-size, size, shape)
        shade = lambda rgb: np.clip(np.array(rgb) * (1 + spread(0.12, 1)) + spread(0.04), 0, 1)
        shades = {colour: shade(RGB[colour]) for colour in COLOURS}
        for geom, colour in [*zip(self.cube_geom, self.cube_colours), *zip(self.pad_geom, self.pad_colours)]:
            m.geom_rgba[geom, :3] = shades.get(colour, (0, 0, 0))
        m.geom_rgba[self.table, :3] = shade(TABLE)
        m.geom_rgba[self.links, :3] = shade(LINK)
        m.light_diffuse[0] *= 1 + spread(0.3, 1)
        m.light_dir[0] += spread(0.25)
        m.light_dir[0] /= np.linalg.norm(m.light_dir[0])
        for camera, (metres, radians) in enumerate(((0.005, 0.01), (0.003, 0.02))):  # front, wrist
            turned = np.zeros(4)
            mujoco.mju_mulQuat(turned, m.cam_quat[camera], np.array([1, *(spread(radians) / 2)]))
            m.cam_pos[camera] += spread(metres)
            m.cam_quat[camera] = turned / np.linalg.norm(turned)
        m.geom_friction[self.cube_geom, 0] *= 1 + spread(0.2, 4)
        m.geom_size[self.cube_geom] = (CUBE + spread(0.0005, 4))[:, None]
        for q, geom in zip(self.cube_q[: len(self.cube_colours)], self.cube_geom):
            self.data.qpos[q + 2] = m.geom_size[geom, 2]

    def _pose_arm(self, rng, start):
        """Near home, or anywhere the tool is above the table and touches nothing."""
        m, d, k = self.model, self.data, self.randomise
        while True:
            if start:
                place = sample_place(rng, ((-60, 60), (0.13, 0.29)))
                z, roll, gripper = rng.uniform(0.02, 0.15), rng.uniform(-160, 0), rng.uniform(0, 70)
                noise = rng.uniform(-12, 12, 6)
            else:
                place = k * rng.uniform(-10, 10), 0.15 + k * rng.uniform(-0.015, 0.015)
                z, roll, gripper = 0.11 + k * rng.uniform(-0.01, 0.01), -90 + k * rng.uniform(-10, 10), OPEN
                noise = k * rng.uniform(-2, 2, 6)
            position = np.clip(inverse(*place, z, roll, gripper) + noise, LOW, HIGH)
            d.qpos[:6] = to_qpos(position)
            d.ctrl[:] = d.qpos[:6]
            mujoco.mj_forward(m, d)
            touching = np.isin(d.contact.geom, self.arm_geoms).any() if d.ncon else False
            low = min(d.site("gripper").xpos[2], d.site("jaw_tip").xpos[2])
            if not touching and low > 0.012:
                return

    def _move_target(self):
        """The cube to be fetched is suddenly at least 5 cm away, at a place that the seed draws; never while a jaw touches it."""
        colour = next((c for c, _, _, number in self.goal["legs"] if self.pad_under(c) != number), None)
        if colour is None or any(self.touching(colour)):
            return
        rng = np.random.default_rng([self.seed, self.moved])
        others = [self.cube_xyz(c)[:2] for c in self.cube_colours if c != colour]
        here = self.cube_xyz(colour)[:2]
        while True:
            phi, r = sample_place(rng, CUBE_AREA)
            there = np.array(polar_to_xy(phi, r))
            if (
                not held_out(phi, r)
                and np.linalg.norm(there - here) >= 0.05
                and all(np.linalg.norm(there - o) >= CUBE_GAP for o in others)
            ):
                break
        i = self.cube_colours.index(colour)
        self.data.qpos[self.cube_q[i] :][:2] = there
        self.data.qvel[self.cube_v[i] :][:6] = 0
        self.moved_at = self.steps

    # -- truth --------------------------------------------------------------------------------------------------

    def position(self):
        """Measured joint positions (6,) in LeRobot units."""
        return to_position(self.data.qpos[:6])

    def cube_xyz(self, colour):
        """Centre of a cube (3,), metres."""
        return self.data.xpos[self.cube_body[self.cube_colours.index(colour)]].copy()

    def cube_yaw(self, colour):
        """Yaw of a cube in degrees, modulo 90, from whichever of its axes lies flattest."""
        R = self.data.xmat[self.cube_body[self.cube_colours.index(colour)]].reshape(3, 3)
        axis = R[:, np.abs(R[2]).argmin()]
        return wrap(math.degrees(math.atan2(axis[1], axis[0])), 90)

    def pad_xy(self, number):
        """Centre of pad 1..5 (2,), metres."""
        return self.model.body_pos[self.pad_body[number - 1], :2].copy()

    def touching(self, colour):
        """Does the cube touch the (fixed, moving) jaw?"""
        cube = self.cube_geom[self.cube_colours.index(colour)]
        others = {g for pair in self.data.contact.geom.tolist() if cube in pair for g in pair}
        return not others.isdisjoint(self.fixed), not others.isdisjoint(self.moving)

    def held(self, colour):
        return all(self.touching(colour))

    def over_pad(self, colour, number):
        """Is the cube's centre above that pad, at any height?"""
        (x, y), (w, _, _, z) = self.pad_xy(number), self.model.body_quat[self.pad_body[number - 1]]
        (dx, dy), cos, sin = self.cube_xyz(colour)[:2] - (x, y), w * w - z * z, 2 * w * z
        return max(abs(cos * dx + sin * dy), abs(cos * dy - sin * dx)) < PAD

    def pad_under(self, colour):
        """Number of the pad that the cube lies on and is let go of, or None. Says nothing about rest: see resting()."""
        if self.cube_xyz(colour)[2] > CUBE + 0.006 or self.held(colour):
            return None
        return next(
            (n for n, there in enumerate(self.pad_colours, 1) if there and self.over_pad(colour, n)), None
        )

    def resting(self, colour, number):
        """Does the cube lie still and released on that pad?"""
        speed = self.data.qvel[self.cube_v[self.cube_colours.index(colour)] :][:6]
        return (
            self.pad_under(colour) == number
            and np.linalg.norm(speed[:3]) < 0.02
            and np.linalg.norm(speed[3:]) < 0.3
        )

    def placed(self, colour, number):
        """Strictly: resting on the pad, flat at table height, touching no jaw, and no other cube over that pad."""
        i = self.cube_colours.index(colour)
        upright = np.abs(
            self.data.xmat[self.cube_body[i]].reshape(3, 3)[2]
        ).max()  # 1: some face is exactly level
        height = self.cube_xyz(colour)[2] - self.model.geom_size[self.cube_geom[i], 2]
        return (
            self.resting(colour, number)
            and abs(height) < 0.002
            and upright > 0.995
            and not any(self.touching(colour))
            and not any(self.over_pad(other, number) for other in self.cube_colours if other != colour)
        )

    def scene(self):
        """The truth in words and numbers, plain Python: {"cubes": [...], "pads": [...]}."""
        cubes, pads = [], []
        for colour in self.cube_colours:
            x, y, _ = self.cube_xyz(colour)
            phi, r = xy_to_polar((x, y))
            cubes.append(
                {
                    "colour": colour,
                    "t": direction_bin(phi),
                    "r": distance_bin(r),
                    "x": float(x),
                    "distance": r,
                    "held": self.held(colour),
                    "pad": self.pad_under(colour),
                }
            )
        for number, colour in enumerate(self.pad_colours, 1):
            if colour:
                pads.append(
                    {
                        "colour": colour,
                        "number": number,
                        "t": direction_bin(xy_to_polar(self.pad_xy(number))[0]),
                    }
                )
        return {"cubes": cubes, "pads": pads}

    def _judge(self):
        """Is the whole task done? Notes for ever when the second cube came to rest on its pad before the first ever did."""
        if len(self.goal["legs"]) == 2:
            first, second = (self.resting(colour, number) for colour, _, _, number in self.goal["legs"])
            self.in_order = self.in_order or first
            if second and not self.in_order:
                self.failure = "wrong order"
        return not self.failure and all(
            self.placed(colour, number) for colour, _, _, number in self.goal["legs"]
        )

    def _info(self, executed=1):
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

    # -- acting and seeing --------------------------------------------------------------------------------------

    def step(self, action):
        """One control step of 1 / FPS seconds; action (6,) target positions -> obs, reward, terminated, truncated, info."""
        return self.step_chunk(np.asarray(action)[None])

    def step_chunk(self, actions):
        """Up to n control steps, actions (n, 6), ending early with the episode; images are drawn once, at the end.

        The reward is the sum, info["executed"] says how many were executed, info["steps"] how many since reset.
        """
        if self.goal is None:
            raise UserError("the episode has not begun: call reset() first")
        actions = np.asarray(actions, np.float64)
        if actions.ndim != 2 or actions.shape[1] != 6 or not len(actions):
            raise UserError(
                f"an action has 6 numbers, one for each of {', '.join(MOTORS)}; got shape {actions.shape[1:]}"
            )
        if not np.isfinite(actions).all():
            raise UserError(f"an action must be finite; got {actions[~np.isfinite(actions).all(1)][0]}")
        for executed, action in enumerate(actions, 1):
            terminated, truncated = self._advance(action)
            if terminated or truncated:
                break
        return self._obs(), float(terminated), terminated, truncated, self._info(executed)

    def _advance(self, action):
        """One control step without drawing -> terminated, truncated."""
        began = time.perf_counter()
        if self.moved and self.moved_at is None and self.steps >= self.moved + self.seed % 4:
            self._move_target()
        self.data.ctrl[:] = to_qpos(np.clip(action, LOW, HIGH))
        mujoco.mj_step(self.model, self.data, SUBSTEPS)
        mujoco.mj_forward(self.model, self.data)  # contacts and places of the state we now look at
        self.seconds["physics"] += time.perf_counter() - began
        self.steps += 1
        terminated = self._judge()
        return terminated, self.steps >= self.patience * LIMIT[self.family] and not terminated

    def _obs(self):
        if self.renderer is None:
            self.renderer = make_renderer(self.model, self.px)
        began = time.perf_counter()
        images = {camera: draw(self.renderer, self.data, camera) for camera in CAMERAS}
        self.seconds["rendering"] += time.perf_counter() - began
        return {"images": images, "state": self.position().astype(np.float32), "task": self.task}

    def spent(self):
        """Seconds of physics and rendering so far."""
        return dict(self.seconds)

    def render(self, px=256, camera="front"):
        """A larger picture (px, px, 3) uint8, for videos."""
        if self.big is None or self.big.width != px:
            if self.big:
                self.big.close()
            self.big = make_renderer(self.model, px)
        return draw(self.big, self.data, camera)

    def close(self):
        for renderer in (self.renderer, self.big):
            if renderer:
                renderer.close()
        self.renderer = self.big = None


def make_renderer(model, px):
    """An offscreen renderer without shadows and reflections, which cost twenty times the rest."""
    if not 8 <= px <= 1024:
        raise UserError(f"images of {px} pixels: type a px between 8 and 1024")
    try:
        renderer = mujoco.Renderer(model, px, px, max_geom=100)
    except (RuntimeError, ImportError, AttributeError, mujoco.FatalError) as error:
        raise UserError(GL_HELP) from error
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = 0
    return renderer


def draw(renderer, data, camera):
    """One camera's image (px, px, 3) uint8."""
    renderer.update_scene(data, camera)
    return renderer.render()


def resize_image(picture, px, fit):
    """A camera's picture, PIL's, of any size -> (px, px, 3) uint8; one that has this size already comes out bit for bit.

    fit: stretch (all is seen) or crop (the middle, in proportion). Recordings and live cameras both come through here: a policy
    must not see the same scene in two ways.
    """
    (w, h), side = picture.size, min(picture.size)
    box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2) if fit == "crop" else None
    return np.asarray(picture.convert("RGB").resize((px, px), Image.Resampling.BILINEAR, box=box))
