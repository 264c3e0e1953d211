"""Environments by name, many at once, one loop over episodes, the success table and films.

Everything that plays episodes goes through run_episodes(): evaluation, reinforcement learning, films, real
time. The worker processes of VecEnv import this file, so it needs no torch.

Families are the tasks of an environment, splits are kinds of scenes (id, ood_position, ood_instruction),
seeds choose scenes: "train" to learn from, "val" to choose between policies, "report" for the numbers that
one publishes.
"""

import contextlib
import importlib
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import sim_env
from common import (
    Stopwatch,
    UserError,
    as_floats,
    check_array,
    check_names,
    check_robot,
    write_json,
)
from sim_env import FPS, SEEDS, SPLITS

EVAL = f"[0, {len(SEEDS['report'])}]"  # options that count episodes: there are as many scenes

# -----------------------------------------------------------------------------------------------------------
# Environments by name


# An environment of one's own is a class with the attributes cameras, motors (tuples of names) and families
# ({name: step limit}), optionally splits, state (names of the state's numbers; without it they are the
# motors' positions) and fps (control steps a second). It is made by Class(px=...) and has Gymnasium's
# reset(*, seed, options), step(action) and close(); optionally step_chunk(actions), which draws pictures once
# a chunk, and instruct(task) -> observation, another instruction in mid motion. The options hold family,
# split and, if a person typed one, task. Observations are {"images": {camera: (px, px, 3) uint8},
# "state": (S,), "task": str}. docs/environments.md has an example.


def environment_class(name: str) -> type:
    """The class that `--env` names: "sim" or "package.module:Class"; UserError says what it lacks."""
    if name == "sim":
        return sim_env.SO100Env
    if name == "real":
        raise UserError("the real arm is no simulation: only sample.py and rl.py take --env=real")
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"--env={name} is neither sim, real nor package.module:Class")
    if os.getcwd() not in sys.path:  # the user's own file lies where the command is typed
        sys.path.append(os.getcwd())
    try:
        cls = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise UserError(f"--env={name} cannot be imported: {error}") from None
    if cls is None:
        raise UserError(f"--env={name} cannot be imported: {module} has no {attribute}")
    for need in ("cameras", "motors", "families", "reset", "step", "close"):
        if not hasattr(cls, need):
            raise UserError(f"--env={name} is no environment: the class lacks {need}")
    limits = list(cls.families.values()) if isinstance(cls.families, dict) else []
    if not limits or any(type(limit) is not int or limit < 1 for limit in limits):
        raise UserError(f"--env={name}: families must be {{task family: most control steps}}")
    for need in ("cameras", "motors", "state"):
        check_names(f"--env={name}: the class attribute {need}", getattr(cls, need, cls.motors))
    return cls


def state_names(cls: type) -> Sequence[str]:
    """Names of what an environment's state measures: its own, or its motors, whose positions it then is."""
    return getattr(cls, "state", cls.motors)


def check_families(families: Sequence[str], env: str) -> None:
    """UserError for task families that an environment does not have."""
    known = environment_class(env).families
    unknown = ", ".join(sorted(set(families) - set(known)))
    if unknown:
        raise UserError(f"--env={env} has no family {unknown}: set --families to some of {', '.join(known)}")


class ChunkedEnv:
    """An environment of one's own, played in chunks as SO100Env is."""

    def __init__(self, env: Any):
        self.env = env

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        limits = self.env.families
        self.limit = limits.get((options or {}).get("family"), max(limits.values()))
        self.steps = 0
        *_, info = self._keep("reset", self.env.reset(seed=seed, options=options), 2)
        return self.obs, self._info(info, False, 0)

    def _keep(self, method: str, returned: Any, n: int) -> tuple:
        """What the environment's method returned, if it is what Gymnasium's does; its observation is kept."""
        where = f"{type(self.env).__name__}.{method}()"
        is_one = isinstance(returned, tuple) and len(returned) == n
        if not is_one or not all(isinstance(returned[i], dict) for i in (0, -1)):
            raise UserError(f"{where} must return {n} values; observation (first) and info (last) are dicts")
        obs = returned[0]
        missing = [key for key in ("images", "state", "task") if key not in obs]
        missing = missing or [camera for camera in self.env.cameras if camera not in obs["images"]]
        if missing:
            raise UserError(f"{where} gives an observation without {missing}")
        if not isinstance(obs["task"], str) or not obs["task"].strip():
            raise UserError(f"{where} gives no instruction: its task is {obs['task']!r}")
        self.obs = obs
        return returned

    def _info(self, info: dict, terminated: bool, executed: int) -> dict:
        # Gymnasium's environments may terminate on failure, too: what info says of success counts more.
        success = bool(info.get("success", info.get("is_success", terminated)))
        return {
            "reason": "",  # an environment with a teacher says what to think
            "failure": "",
            **info,
            "success": success,
            "steps": self.steps,
            "executed": executed,
        }

    def step_chunk(self, actions: np.ndarray) -> tuple:
        actions = np.asarray(actions, np.float32)[: self.limit - self.steps]  # (h, A)
        before = self.steps
        total = 0.0
        if hasattr(self.env, "step_chunk"):
            returned = self._keep("step_chunk", self.env.step_chunk(actions), 5)
            _, total, terminated, truncated, info = returned
            self.steps += info.get("executed", len(actions))
        else:
            for action in actions:
                returned = self._keep("step", self.env.step(action), 5)
                _, reward, terminated, truncated, info = returned
                self.steps += 1
                total += float(reward)
                if terminated or truncated:
                    break
        if not math.isfinite(total):
            raise UserError(f"{type(self.env).__name__} gives a reward of {total}; it must be finite")
        # An episode that the environment does not end is cut off at the step limit of its family.
        truncated = bool(truncated) or (self.steps >= self.limit and not terminated)
        info = self._info(info, bool(terminated), self.steps - before)
        return self.obs, float(total), bool(terminated), truncated, info

    def instruct(self, task: str) -> dict:
        self.obs = self.env.instruct(task)
        return self.obs

    def render(self, px: int = 256, camera: str = "front") -> np.ndarray:
        """The last observation's picture, enlarged to (px, px, 3)."""
        picture = Image.fromarray(self.obs["images"][camera])
        return np.asarray(picture.resize((px, px), Image.Resampling.NEAREST))

    def close(self) -> None:
        self.env.close()


def make_env(name: str, px: int = 96, **options: Any) -> Any:
    """An environment by its name, with step_chunk() and render() whatever it brings itself."""
    env = environment_class(name)(px=px, **options)
    return env if isinstance(env, sim_env.SO100Env) else ChunkedEnv(env)


# -----------------------------------------------------------------------------------------------------------
# Many environments at once


ANSWER_SECONDS = 600  # a worker that is silent for so long has an environment that blocks


def serve() -> None:
    """Body of a worker process: answer pickled requests (method, {arm: arguments}) until the input closes."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what an environment prints must not end up among the answers
    arms, name, options = pickle.load(requests)
    envs = {}
    with contextlib.suppress(EOFError, BrokenPipeError):  # the program has ended
        while True:
            method, calls = pickle.load(requests)
            try:
                # Environments are made here, where what goes wrong is answered.
                envs = envs or {arm: make_env(name, **options) for arm in arms}
                results = {}
                for arm, arguments in calls.items():
                    results[arm] = getattr(envs[arm], method)(**arguments)
                answer = pickle.dumps(results, pickle.HIGHEST_PROTOCOL)
            except UserError as error:
                answer = pickle.dumps(error)
            except Exception:  # a traceback cannot be pickled, its text can
                said = f"--env={name} failed in a worker process:\n{traceback.format_exc()}"
                answer = pickle.dumps(RuntimeError(said))
            answers.write(answer)
            answers.flush()
    for env in envs.values():
        env.close()
    os._exit(0)  # without complaints about the closed pipe


class VecEnv:
    """n environments ("arms") in worker processes; use it in a `with` statement or call close().

    An arm whose episode ended rests until it is reset; its last observation stays.
    """

    # Workers are fresh Python processes behind pipes: neither fork's trouble with OpenGL and threads nor
    # spawn's second import of the main program.
    def __init__(self, n: int, workers: int = 2, env: str = "sim", px: int = 96, **options: Any):
        cls = environment_class(env)  # complain here, not in a worker
        self.name = env
        self._allocate(n, px, cls.cameras, len(state_names(cls)))
        here = os.path.dirname(os.path.abspath(__file__))
        variables = dict(os.environ, PYTHONPATH=os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-c", "import evaluate; evaluate.serve()"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.workers = {}  # worker -> its arms
        for arms in np.array_split(range(n), min(workers, n)):
            # In a session of their own Ctrl-C does not reach them; they end when their pipes close.
            worker = subprocess.Popen(command, env=variables, start_new_session=True, **pipes)
            self.workers[worker] = arms.tolist()
            with contextlib.suppress(BrokenPipeError):  # _call() will tell
                self._send(worker, (self.workers[worker], env, options | {"px": px}))

    def _allocate(self, n: int, px: int, cameras: Sequence[str], S: int) -> None:
        """Room for what n arms see and what comes of them."""
        self.n = n
        self.cameras = list(cameras)
        self.images = np.zeros((n, len(cameras), px, px, 3), np.uint8)
        self.state = np.zeros((n, S), np.float32)
        self.task = [""] * n
        self.infos: list[dict] = [{}] * n
        self.terminated = np.zeros(n, bool)
        self.truncated = np.ones(n, bool)  # nothing moves before its first reset

    def __enter__(self) -> "VecEnv":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @staticmethod
    def _send(worker: subprocess.Popen, message: Any) -> None:
        pickle.dump(message, worker.stdin, pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()

    def _call(self, method: str, calls: dict[int, dict]) -> dict[int, Any]:
        """Run env.method(**arguments) for {arm: arguments} in all workers at once -> {arm: result}."""
        began = time.monotonic()
        watchdog = threading.Timer(ANSWER_SECONDS, self.kill)
        watchdog.daemon = True  # Ctrl-C may come before it is cancelled
        watchdog.start()
        busy = []
        try:
            for worker, arms in self.workers.items():
                mine = {arm: calls[arm] for arm in arms if arm in calls}
                if mine:
                    self._send(worker, (method, mine))
                    busy.append(worker)
            # Read every answer before raising one: an unread answer would be taken for the next request's.
            answers = [pickle.load(worker.stdout) for worker in busy]
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            said = "died in a worker process: its message is above, or memory ran out"
            if time.monotonic() - began > ANSWER_SECONDS:
                said = f"has not answered {method} for {ANSWER_SECONDS} seconds: it blocks"
            raise UserError(f"--env={self.name} {said}") from None
        finally:
            watchdog.cancel()
        results = {}
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            results |= answer
        return results

    def _store(self, arm: int, obs: dict, info: dict) -> None:
        """Keep an observation; UserError where it is not what the environment's class says."""
        as_said = " as its class says"
        for view, camera in enumerate(self.cameras):
            if camera in obs["images"]:  # a real arm may have one alone
                image = np.asarray(obs["images"][camera])
                check_array(
                    f"the picture of camera {camera}", image, self.images.shape[2:], np.uint8, as_said
                )
                self.images[arm, view] = image
        state = as_floats("the environment's state", obs["state"])
        check_array("the environment's state", state, self.state.shape[1:], np.float32, as_said)
        self.state[arm] = state
        self.task[arm] = obs["task"]
        self.infos[arm] = info

    def observe(self, arms: Sequence[int]) -> dict[str, Any]:
        """What n arms see now: images (n, V, px, px, 3) uint8, state (n, S) float32, task, n strings."""
        arms = list(arms)
        return {
            "images": self.images[arms],
            "state": self.state[arms],
            "task": [self.task[arm] for arm in arms],
        }

    def reset(self, arms: Sequence[int], seeds: Sequence[int], options: Sequence[dict]) -> None:
        """Begin an episode on each of these arms."""
        calls = {}
        for arm, seed, chosen in zip(arms, seeds, options):
            calls[arm] = {"seed": int(seed), "options": dict(chosen)}
        for arm, (obs, info) in self._call("reset", calls).items():
            self._store(arm, obs, info)
            self.terminated[arm] = self.truncated[arm] = False

    def step_chunk(self, actions: dict[int, np.ndarray]) -> np.ndarray:
        """Actions {arm: (h, A)} -> rewards (n,), 0 for the others.

        Observations, infos and ends are kept in this object.
        """
        reward = np.zeros(self.n, np.float32)
        calls = {arm: {"actions": chunk} for arm, chunk in actions.items()}
        for arm, (obs, *outcome, info) in self._call("step_chunk", calls).items():
            self._store(arm, obs, info)
            # Gymnasium's two ends: the task's own, and the time limit's
            reward[arm], self.terminated[arm], self.truncated[arm] = outcome
        return reward

    def kill(self) -> None:
        """End the workers at once."""
        for worker in self.workers:
            worker.kill()

    def close(self) -> None:
        for worker in self.workers:
            for pipe in (worker.stdin, worker.stdout):
                with contextlib.suppress(OSError):  # it may have died already
                    pipe.close()
        try:
            for worker in self.workers:
                worker.wait(10)  # an environment may have something to put away
        except subprocess.TimeoutExpired:
            self.kill()


class SingleEnv(VecEnv):
    """VecEnv's interface to one environment in this process: for films, and for a real arm."""

    def __init__(self, env: Any, px: int, cameras: Sequence[str], S: int):
        self._allocate(1, px, cameras, S)
        self.env = env

    def _call(self, method: str, calls: dict[int, dict]) -> dict[int, Any]:
        function = getattr(self.env, method)
        try:
            return {arm: function(**arguments) for arm, arguments in calls.items()}
        except (OSError, ModuleNotFoundError) as error:  # the environment's own, no mistake of this command
            raise RuntimeError("the environment failed") from error

    def close(self) -> None:
        self.env.close()


# -----------------------------------------------------------------------------------------------------------
# The loop over episodes


@dataclass
class Episode:
    """One episode: what it is asked for, and what came of it."""

    seed: int
    options: dict  # of reset: family, split, task
    number: int = 0  # among the episodes of a run
    task: str = ""
    success: bool = False
    steps: int = 0
    failure: str = ""
    moved_at: int | None = None  # when the simulation moved the cube
    extras: list = field(default_factory=list)  # per decision: what policy_fn returned besides actions
    teacher_reasoning: list[str] = field(default_factory=list)  # per decision: what a teacher would think
    rewards: list[float] = field(default_factory=list)  # per decision
    executed: list[int] = field(default_factory=list)  # control steps per decision
    final: Any = None  # final_fn of the last observation, where the time limit ended the episode


PolicyFn = Callable[[dict], tuple[np.ndarray, list]]  # observation of n arms -> actions (n, h, A), n extras


def run_episodes(
    vec: VecEnv,
    episodes: Sequence[Episode],
    policy_fn: PolicyFn,
    name: str = "episodes",  # of the progress bar; empty: there is none
    final_fn: Callable[[dict], list] | None = None,
    on_end: Callable[[Episode], None] | None = None,
) -> list[Episode]:
    """Play episodes; an arm that finishes takes the next one, so all stay busy. -> the episodes, filled in.

    policy_fn gets VecEnv.observe() of the busy arms, with "episode", the Episode that each plays, and
    "teacher_reasoning", what a teacher would think now. final_fn(observation) -> a value for each arm that
    the time limit cut off, kept as Episode.final. on_end is called with each episode as it ends.
    """
    waiting = list(episodes)
    running: dict[int, Episode] = {}  # arm -> its episode
    for number, episode in enumerate(waiting):
        episode.number = number
    hidden = not (name and sys.stderr.isatty())
    bar = tqdm(total=len(waiting), desc=name, unit="episode", leave=False, disable=hidden)
    while waiting or running:
        # Free arms take the next episodes.
        free = [arm for arm in range(vec.n) if arm not in running][: len(waiting)]
        if free:
            running |= _start(vec, free, waiting)

        # One decision of the policy for all busy arms, and its control steps.
        busy = sorted(running)
        obs = vec.observe(busy)
        obs["episode"] = [running[arm] for arm in busy]
        obs["teacher_reasoning"] = [vec.infos[arm].get("reason") or "" for arm in busy]
        actions, extras = policy_fn(obs)  # (n, h, A), n extras
        rewards = vec.step_chunk(dict(zip(busy, actions)))
        for arm, extra, true in zip(busy, extras, obs["teacher_reasoning"]):
            running[arm].extras.append(extra)
            running[arm].teacher_reasoning.append(true)
            running[arm].rewards.append(float(rewards[arm]))
            running[arm].executed.append(vec.infos[arm]["executed"])

        # Where the time limit ended an episode, its last observation has a value, too.
        cut = [arm for arm in busy if vec.truncated[arm]]
        if cut and final_fn:
            for arm, value in zip(cut, final_fn(vec.observe(cut))):
                running[arm].final = value

        for arm in busy:
            if vec.terminated[arm] or vec.truncated[arm]:
                episode = running.pop(arm)
                info = vec.infos[arm]
                episode.success = bool(info["success"])
                episode.steps = info["steps"]
                episode.failure = info.get("failure", "")
                episode.moved_at = info.get("moved_at")
                if on_end:
                    on_end(episode)
                bar.update()
    bar.close()
    return list(episodes)


def _start(vec: VecEnv, arms: list[int], waiting: list[Episode]) -> dict[int, Episode]:
    """Begin the next waiting episodes on free arms -> {arm: its episode}."""
    begun = [waiting.pop(0) for _ in arms]
    seeds = [episode.seed for episode in begun]
    options = [episode.options for episode in begun]
    vec.reset(arms, seeds, options)
    started = dict(zip(arms, begun))
    for arm, episode in started.items():
        episode.task = vec.task[arm]
    return started


def camera_indices(policy: Any, env: str) -> list[int]:
    """Which of an environment's cameras the policy looks through.

    UserError where cameras, motors or state do not fit: a policy must not run on another robot.
    """
    if env == "real":
        env = "sim"  # the simulated arm has the real one's cameras and motors
    cls = environment_class(env)
    wanted = policy.cfg.camera_names
    missing = [camera for camera in wanted if camera not in cls.cameras]
    if missing:
        raise UserError(f"--env={env} has cameras {list(cls.cameras)}, the model also wants {missing}")
    fps = getattr(cls, "fps", policy.cfg.fps)
    check_robot(f"--env={env}", policy.cfg, cls.motors, state_names(cls), fps)
    return [cls.cameras.index(camera) for camera in wanted]


def policy_fn(policy: Any, env: str = "sim", teacher: bool = False) -> PolicyFn:
    """A policy as run_episodes() takes it; its extras are the reasoning texts.

    teacher: it acts on a teacher's reasoning.
    """
    views = camera_indices(policy, env)
    seeds = itertools.count()  # every call draws other noise, and every evaluation the same
    first = deque(maxlen=64)  # what it wrote at the first looks of earlier episodes

    def decide(obs: dict) -> tuple[np.ndarray, list[str]]:
        images = obs["images"][:, views]  # (n, V, px, px, 3)
        texts = {}
        if teacher:
            texts["reasoning"] = obs["teacher_reasoning"]
        else:  # most of what it wrote at the look before will hold again, and the phrases of other episodes
            texts["guess"] = [[*first, *episode.extras[-1:]] for episode in obs["episode"]]
        chunk, said = policy.act(images, obs["state"], obs["task"], seed=next(seeds), **texts)
        first.extend(text for text, episode in zip(said, obs["episode"]) if not episode.extras)
        return chunk[:, : policy.cfg.n_action_steps], said

    return decide


# -----------------------------------------------------------------------------------------------------------
# The policy's reasoning against the teacher's

# What is said of one leg, `first , tomato is red , blue pad at t3 , red cube at t5 r3`: all names up to the
# pad's colour, its direction, the cube's colour, where the cube is, with direction and distance if not known
# otherwise.
CLAUSE = r"(?:(?:first|then) , )?(\S.*? pad) at t(\d+) , (\w+) cube (there|in hand|at t(\d+) r(\d+))"
REASONING = re.compile(rf"{CLAUSE}(?: , {CLAUSE})?(?: , done)?")
KINDS = ("right", "false_done", "missed_done", "leg", "names", "hand", "near", "far", "other")


def first_error(said: str, true: str) -> str:
    """What is wrong in a policy's reasoning, given the teacher's at the same look: the first of KINDS.

    leg: a leg that is not done is left, or one that is done is not. near: all else is right, directions and
    distance are at most one bin off. other: text that is not of clauses.
    """
    if said == true:
        return "right"
    if not (REASONING.fullmatch(said) and REASONING.fullmatch(true)):
        return "other"
    off = []  # bins
    for mine, theirs in zip(re.findall(CLAUSE, said), re.findall(CLAUSE, true)):
        pad, pad_t, cube, state, *place = mine
        true_pad, true_pad_t, true_cube, true_state, *true_place = theirs
        if (pad, cube) != (true_pad, true_cube):
            return "names"
        if "there" in (state, true_state) and state != true_state:
            verdicts = {said: "false_done", true: "missed_done"}
            wrong = [kind for text, kind in verdicts.items() if text.endswith("done")]
            return wrong[0] if wrong else "leg"
        if "in hand" in (state, true_state) and state != true_state:
            return "hand"
        for said_bin, true_bin in zip((pad_t, *place), (true_pad_t, *true_place)):
            if true_bin:  # nothing where no place is said
                off.append(abs(int(said_bin) - int(true_bin)))
    if not any(off):
        return "other"
    return "near" if max(off) <= 1 else "far"


def target_of(reasoning: str) -> tuple[str, str] | None:
    """The cube and pad of the first leg: `blue pad at t3 , red cube at t5 r3` -> ("red", "blue")."""
    named = re.search(r"(\w+) pad at t\d+ , (\w+) cube", reasoning)
    return (named[2], named[1]) if named else None


def compare_reasoning(episodes: Sequence[Episode]) -> dict[str, Any]:
    """How the reasoning in some episodes agrees with the teacher's: a part of one of evaluate()'s cells."""
    on_target = []  # per episode: does the first reasoning name the right cube and pad?
    right = []  # and is all of it right?
    looks = Counter()  # of all decisions
    for episode in episodes:
        kinds = list(map(first_error, episode.extras, episode.teacher_reasoning))
        on_target.append(target_of(episode.extras[0]) == target_of(episode.teacher_reasoning[0]))
        right.append(kinds[0] == "right")
        looks.update(kinds)
    return {
        "target_at_0": float(np.mean(on_target)),
        "reasoning": float(np.mean(right)),
        "looks": {kind: looks[kind] / looks.total() for kind in KINDS},  # shares, together 1
    }


# -----------------------------------------------------------------------------------------------------------
# Success by family and split


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a success rate -> (low, high)."""
    z = 1.959964  # the normal distribution's 97.5th percentile
    # Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927. Unlike the
    # normal approximation it stays within [0, 1] and holds for few episodes.
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - spread) / scale, (centre + spread) / scale


def latency(policy: Any, family: str, env: str = "sim") -> dict[str, float]:
    """Median milliseconds of one policy.act on a single observation -> {stage: ms, ..., "total": ms}.

    "again": of the next one, whose reasoning is guessed from the first's.
    """
    decide = policy_fn(policy, env)
    samples = []
    with VecEnv(1, 1, env, policy.cfg.image_size) as vec:
        for seed in SEEDS["val"][:35]:
            vec.reset([0], [seed], [{"family": family}])
            episode = Episode(seed, {})
            with Stopwatch() as watch:
                began = time.perf_counter()
                actions, episode.extras = decide(vec.observe([0]) | {"episode": [episode]})
            watch.seconds["total"] = time.perf_counter() - began
            vec.step_chunk({0: actions[0]})
            began = time.perf_counter()
            decide(vec.observe([0]) | {"episode": [episode]})
            watch.seconds["again"] = time.perf_counter() - began
            samples.append(watch.seconds)
    warm = samples[5:]  # the first calls choose kernels and fill caches
    medians = {}
    for stage in warm[0]:
        seconds = [sample[stage] for sample in warm]
        medians[stage] = 1e3 * float(np.median(seconds))
    return medians


def evaluate(
    policy: Any,
    families: Sequence[str],
    n: int,  # episodes per family and split
    seeds: str = "report",
    splits: Sequence[str] = SPLITS,  # an environment's own are fewer
    env: str = "sim",
    teacher: bool = False,  # the policy acts on a teacher's reasoning
) -> dict[str, dict[str, dict]]:
    """Closed-loop episodes on the first n scenes of a range of seeds -> {family: {split: cell}}.

    A cell is what summarise() gives, with "ms_per_chunk", "ms_again" and "ms_by_stage", a decision's time at
    batch 1, and where policy and teacher reason what compare_reasoning() gives.
    """
    known = getattr(environment_class(env), "splits", ("id",))
    if not set(splits) & set(known):
        raise UserError(f"--env={env} has no split {', '.join(splits)}: set --splits to some of {known}")
    results = {}
    for family in families:
        results[family] = {}
        # milliseconds first: a policy that does not fit the environment is told within a second
        stages = latency(policy, family, env)
        total = stages.pop("total")
        again = stages.pop("again")
        wanted = ["id"] if family == "tiny" else [split for split in splits if split in known]
        for split in wanted:
            options = {"family": family, "split": split}
            jobs = [Episode(seed, options) for seed in SEEDS[seeds][:n]]
            decide = policy_fn(policy, env, teacher)
            with VecEnv(min(24, n), 2, env, policy.cfg.image_size) as vec:
                episodes = run_episodes(vec, jobs, decide, f"{family} {split}")
            cell = summarise(episodes)
            cell["ms_per_chunk"] = total
            cell["ms_again"] = again
            cell["ms_by_stage"] = stages
            has_teacher = any(episodes[0].teacher_reasoning)  # environments of one's own may have none
            if policy.cfg.reasoning and has_teacher:
                cell |= compare_reasoning(episodes)
            results[family][split] = cell
    return results


def check_evaluation(policy: Any, families: Sequence[str], env: str = "sim") -> None:
    """UserError where an environment does not fit the policy, before the work whose end is an evaluation."""
    check_families(families, env)
    camera_indices(policy, env)
    if env in ("sim", "real"):
        return
    with VecEnv(1, 1, env, policy.cfg.image_size) as vec:
        vec.reset([0], SEEDS["val"][:1], [{"family": families[0], "split": "id"}])
        policy.tokenizer.prompt(vec.task[0], policy.cfg.reasoning)
        # One step as well: an environment that fails or blocks in it would be told after the training alone.
        rest = np.zeros((1, policy.cfg.action_dim), np.float32)  # (h, A)
        if policy.cfg.state_names == policy.cfg.motor_names:
            rest = vec.state  # where the motors are: nothing moves
        vec.step_chunk({0: rest})


def summarise(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Success of some episodes, a cell of evaluate()'s table."""
    n = len(episodes)
    won = [episode.steps for episode in episodes if episode.success]
    low, high = wilson(len(won), n)
    cell = {
        "success": len(won) / n,
        "n": n,
        "low": low,  # ends of the 95 % interval
        "high": high,
        "steps": None,  # mean of the successful episodes
    }
    if won:
        cell["steps"] = float(np.mean(won))
    return cell


def report(results: dict[str, dict[str, dict]], path: Path) -> None:
    """Print evaluate()'s result as tables, then write it to a JSON file."""
    row = "{:<10} {:<16} {:>9} {:>5} {:>15} {:>6}".format
    print(row("family", "split", "success %", "n", "95 % interval", "steps"))
    look_row = "{:<10} {:<16} {:>11} {:>10} {:>6} {:>10} {:>11} {:>4} {:>5} {:>4} {:>4} {:>3} {:>5}".format
    looks = []  # rows of the table of reasoning
    times = []
    for family, splits in results.items():
        for split, c in splits.items():
            interval = f"{percent(c['low'])} - {percent(c['high'])}"
            steps = "-"  # no episode succeeded
            if c["steps"]:
                steps = f"{c['steps']:.1f}"
            print(row(family, split, percent(c["success"]), c["n"], interval, steps))
            if "looks" in c:
                shares = np.array([c["target_at_0"], c["reasoning"], *c["looks"].values()])
                looks.append(look_row(family, split, *(100 * shares).round().astype(int)))
        # All splits of a family share one measurement; the real arm has none.
        if "ms_per_chunk" in c:
            stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in c["ms_by_stage"].items())
            first = f"{family}: {c['ms_per_chunk']:.1f} ms for the first chunk at batch 1 ({stages})"
            times.append(f"{first}, {c['ms_again']:.1f} ms for the next")
    if looks:
        print("\nreasoning in %: at the first look; then all looks, by the first thing that is wrong")
        print(look_row("family", "split", "target at 0", "right at 0", *KINDS))
    for line in (*looks, *times):
        print(line)
    write_json(path, results)
    print(f"wrote {path}", flush=True)


def percent(share: float) -> str:
    """0.912 -> "91.2"."""
    return f"{100 * share:.1f}"


# -----------------------------------------------------------------------------------------------------------
# Films


def draw_frame(
    env: Any,
    cameras: Sequence[str],
    task: str,
    reasoning: str,
    weights: Sequence[float],  # (Q,)
    note: str = "",  # beside the bars
) -> Image.Image:
    """The first two views, and underneath instruction, reasoning and a bar per feature query state (0..1)."""
    px = 256  # of a view
    grey = (120, 120, 120)
    white = (250, 250, 247)
    frame = Image.new("RGB", (2 * px, px + 112), white)
    for i, camera in enumerate(cameras[:2]):
        frame.paste(Image.fromarray(env.render(px, camera)), (i * px, 0))
    pen = ImageDraw.Draw(frame)
    font = ImageFont.load_default(13)
    y = px + 4
    shown = f"<reason> {reasoning} </reason>" if reasoning else ""
    for text, colour in ((task, (20, 20, 20)), (shown, (170, 60, 20))):
        for line in textwrap.wrap(text, width=2 * px // 7)[:3]:  # a letter is about 7 px wide
            pen.text((6, y), line, fill=colour, font=font)
            y += 16
    # a bar for every feature query state: how much the chosen chunk depends on it
    label = f"query states {note}" if len(weights) else note
    pen.text((6, px + 92), label, fill=grey, font=ImageFont.load_default(11))
    width = 294 / max(1, len(weights))  # 294 px lie beside the label
    bottom = px + 106
    for i, weight in enumerate(weights):
        x = 206 + i * width
        top = bottom - 24 * float(weight)
        pen.rectangle((x, top, x + 0.7 * width, bottom), fill=(40, 90, 170))
    return frame


def save_film(frames: Sequence[Image.Image], folder: str | Path, title: str) -> Path:
    """Frames -> a GIF and a contact sheet in `folder`, named by the title -> their path without suffix."""
    words = re.findall("[a-zA-Z0-9]+", title)  # an instruction may hold what no file name can
    path = Path(folder, "_".join(words)[:60] or "task")
    path.parent.mkdir(parents=True, exist_ok=True)
    # GIFs have 256 colours; 128 without dithering make small files
    first, *others = (frame.quantize(128, dither=Image.Dither.NONE) for frame in frames)
    first.save(f"{path}.gif", save_all=True, append_images=others, duration=1000 // FPS, loop=0)
    # 16 frames, from the first to the last, at half their size
    w, h = frames[0].size
    sheet = Image.new("RGB", (4 * w, 4 * h))
    picks = np.linspace(0, len(frames) - 1, 16).round().astype(int)
    for i, pick in enumerate(picks):
        row, column = divmod(i, 4)
        sheet.paste(frames[pick], (column * w, row * h))
    sheet.resize((2 * w, 2 * h)).save(f"{path}.png")
    return path
