"""Environments by name, many at once, one loop over episodes, the success table and films.

Everything that plays episodes goes through run_episodes(): evaluation, reinforcement learning, films, real
time. The worker processes of VecEnv import this file, so it needs no torch.

Families are the tasks of an environment, splits are kinds of scenes (id, ood_position, ood_instruction),
seeds choose scenes: "train" to learn from, "val" to choose between policies, "report" for the numbers that
one publishes.
"""

import contextlib
import importlib
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import sim_env
from common import Stopwatch, UserError, check_names, write_json
from sim_env import FPS, SEEDS, SPLITS

EVAL = f"[0, {len(SEEDS['report'])}]"  # options that count episodes: there are as many scenes

# -----------------------------------------------------------------------------------------------------------
# Environments by name


def environment_class(name: str) -> type:
    """The class that `--env` names: "sim" or "package.module:Class"; UserError says what it lacks.

    It has class attributes cameras, motors (tuples of names) and families ({name: step limit}), optionally
    splits, state (names of the state's numbers; without it they are the motors' positions) and fps (control
    steps a second). It is made by Class(px=...) and has Gymnasium's reset(*, seed, options), step(action) and
    close(); optionally step_chunk(actions), which draws pictures once a chunk, and instruct(task) ->
    observation, another instruction in mid motion. options hold family, split and, if a person typed one,
    task. Observations are
    {"images": {camera: (px, px, 3) uint8}, "state": (S,), "task": str}.
    """
    if name == "sim":
        return sim_env.SO100Env
    if name == "real":
        raise UserError(
            "the real arm is no simulation: sample.py and rl.py take --env=real, with a person beside it"
        )
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
    needed = ("cameras", "motors", "families", "reset", "step", "close")
    missing = [need for need in needed if not hasattr(cls, need)]
    if missing:
        raise UserError(f"--env={name} is no environment: the class lacks {', '.join(missing)}")
    limits = cls.families.values() if isinstance(cls.families, dict) else ()
    if not limits or any(type(limit) is not int or limit < 1 for limit in limits):
        raise UserError(
            f"--env={name}: the class attribute families must be {{task family: most control steps}}"
        )
    for attribute in ("cameras", "motors", "state"):
        check_names(f"--env={name}: the class attribute {attribute}", getattr(cls, attribute, cls.motors))
    return cls


def state_names(cls: type) -> Sequence[str]:
    """Names of what an environment's state measures: its own, or its motors, whose positions it then is."""
    return getattr(cls, "state", cls.motors)


def check_families(families: Sequence[str], env: str) -> None:
    """UserError for task families that an environment does not have."""
    known = environment_class(env).families
    check_names("families", families)
    unknown = [family for family in families if family not in known]
    if unknown:
        raise UserError(
            f"--env={env} has no family {', '.join(unknown)}: set --families to some of {', '.join(known)}"
        )


class ChunkedEnv:
    """An environment of one's own, played in chunks as SO100Env is.

    An episode that the environment does not end is cut off at the step limit of its family.
    """

    def __init__(self, env: Any):
        self.env = env
        self.steps = 0
        self.limit = max(env.families.values())

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        family = (options or {}).get("family")
        self.limit = self.env.families.get(family, max(self.env.families.values()))
        _, info = self._keep("reset", self.env.reset(seed=seed, options=options), 2)
        self.steps = 0
        return self.obs, self._info(info, False, 0)

    def _keep(self, method: str, returned: Any, n: int) -> tuple:
        """What the environment's method returned, if it is what Gymnasium's does; its observation is kept."""
        where = f"{type(self.env).__name__}.{method}()"
        if not isinstance(returned, tuple) or len(returned) != n or not isinstance(returned[-1], dict):
            raise UserError(
                f"{where} must return {n} values, the first an observation, the last an info dict"
            )
        obs = returned[0]
        if not isinstance(obs, dict):
            raise UserError(f"{where} must give a dict as observation, not {type(obs).__name__}")
        missing = [key for key in ("images", "state", "task") if key not in obs]
        missing = missing or [camera for camera in self.env.cameras if camera not in obs["images"]]
        if missing:
            raise UserError(f"{where} gives an observation without {missing}")
        if not isinstance(obs["task"], str) or not obs["task"].strip():
            raise UserError(f"{where} gives no instruction: its task is {obs['task']!r}")
        self.obs = obs
        return returned

    def _info(self, info: dict, terminated: bool, executed: int) -> dict:
        success = bool(info.get("success", info.get("is_success", terminated)))
        counted = {"success": success, "steps": self.steps, "executed": executed}
        return {"reason": "", "failure": "", **info, **counted}

    def step(self, action: np.ndarray) -> tuple:
        return self.step_chunk(np.asarray(action)[None])

    def step_chunk(self, actions: np.ndarray) -> tuple:
        actions = np.asarray(actions, np.float32)[: self.limit - self.steps]
        before = self.steps
        if hasattr(self.env, "step_chunk"):
            returned = self._keep("step_chunk", self.env.step_chunk(actions), 5)
            _, total, terminated, truncated, info = returned
            self.steps += info.get("executed", len(actions))
        else:
            total = 0.0
            for action in actions:
                returned = self._keep("step", self.env.step(action), 5)
                _, reward, terminated, truncated, info = returned
                self.steps += 1
                total += float(reward)
                if terminated or truncated:
                    break
        if not math.isfinite(total):
            raise UserError(f"{type(self.env).__name__} gives a reward of {total}; it must be finite")
        truncated = bool(truncated) or (self.steps >= self.limit and not terminated)
        info = self._info(info, bool(terminated), self.steps - before)
        return self.obs, float(total), bool(terminated), truncated, info

    def instruct(self, task: str) -> dict:
        self.obs = self.env.instruct(task)
        return self.obs

    def seconds(self) -> dict[str, float]:
        return {}

    def render(self, px: int = 256, camera: str = "front") -> np.ndarray:
        """The last observation's picture, enlarged to (px, px, 3)."""
        image = self.obs["images"][camera]
        rows = np.arange(px) * len(image) // px
        return image[rows][:, rows]

    def close(self) -> None:
        self.env.close()


def make_env(name: str, px: int = 96, **options: Any) -> Any:
    """An environment by its name, with step_chunk(), render() and seconds() whatever it brings itself."""
    env = environment_class(name)(px=px, **options)
    return env if isinstance(env, sim_env.SO100Env) else ChunkedEnv(env)


# -----------------------------------------------------------------------------------------------------------
# Many environments at once


ANSWER_SECONDS = 600  # a worker that is silent for so long has an environment that blocks


def serve() -> None:
    """Body of a worker process: answer pickled requests (method, {arm: arguments}) until the input closes."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what an environment prints must not end up among the answers
    n, name, options = pickle.load(requests)
    envs = []
    with contextlib.suppress(EOFError, BrokenPipeError):  # the program has ended
        while True:
            method, calls = pickle.load(requests)
            try:
                envs = envs or [make_env(name, **options) for _ in range(n)]
                answer = {arm: getattr(envs[arm], method)(**arguments) for arm, arguments in calls.items()}
                answer = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
            except UserError as error:
                answer = pickle.dumps(error)
            except Exception:
                said = f"--env={name} failed in a worker process:\n{traceback.format_exc()}"
                answer = pickle.dumps(RuntimeError(said))
            answers.write(answer)
            answers.flush()
    for env in envs:
        env.close()
    os._exit(0)  # without complaints about the closed pipe


class VecEnv:
    """n environments in worker processes.

    One whose episode ended rests until it is reset; its last observation stays.

    Workers are fresh Python processes behind pipes: neither fork's trouble with OpenGL and threads nor
    spawn's second import of the main program. Use it in a `with` statement or call close().
    """

    def __init__(self, n: int, workers: int = 2, env: str = "sim", px: int = 96, **options: Any):
        cls = environment_class(env)  # complain here, not in a worker
        self.name = env
        self._allocate(n, px, cls.cameras, len(state_names(cls)))
        self.groups = np.array_split(np.arange(n), min(workers, n))  # arms of each worker
        here = os.path.dirname(os.path.abspath(__file__))
        variables = dict(os.environ, PYTHONPATH=os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-c", "import evaluate; evaluate.serve()"]
        self.workers = []
        for group in self.groups:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            # In a session of their own Ctrl-C does not reach them; they end when their pipes close.
            worker = subprocess.Popen(command, env=variables, start_new_session=True, **pipes)
            self.workers.append(worker)
            with contextlib.suppress(BrokenPipeError):  # _call() will tell
                self._send(worker, (len(group), env, options | {"px": px}))

    def _allocate(self, n: int, px: int, cameras: Sequence[str], S: int) -> None:
        self.n = n
        self.cameras = list(cameras)
        self.images = np.zeros((n, len(cameras), px, px, 3), np.uint8)
        self.state = np.zeros((n, S), np.float32)
        self.task = [""] * n
        self.infos: list[dict] = [{} for _ in range(n)]
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
        busy = []
        try:
            watchdog.start()
            for worker, group in zip(self.workers, self.groups):
                mine = {arm - group[0]: arguments for arm, arguments in calls.items() if arm in group}
                if mine:
                    self._send(worker, (method, mine))
                    busy.append((worker, group[0]))
            # Read every answer before raising one: an unread answer would be taken for the next request's.
            answers = [(pickle.load(worker.stdout), first) for worker, first in busy]
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            if time.monotonic() - began > ANSWER_SECONDS:
                said = f"has not answered {method} for {ANSWER_SECONDS} seconds: it blocks"
            else:
                said = "died in a worker process: its message is above, or memory ran out"
            raise UserError(f"--env={self.name} {said}") from None
        finally:
            watchdog.cancel()
        results = {}
        for answer, first in answers:
            if isinstance(answer, Exception):
                raise answer
            results |= {arm + first: result for arm, result in answer.items()}
        return results

    def _store(self, arm: int, obs: dict, info: dict) -> None:
        """Keep an observation; UserError where it is not what the environment's class says."""
        shape = self.images.shape[2:]  # (px, px, 3)
        for view, camera in enumerate(self.cameras):
            if camera in obs["images"]:  # a real arm may have one alone
                image = np.asarray(obs["images"][camera])
                if image.shape != shape or image.dtype != np.uint8:
                    raise UserError(
                        f"the environment's camera {camera} gives {image.shape} {image.dtype}, "
                        f"it must be {shape} uint8"
                    )
                self.images[arm, view] = image
        state = np.asarray(obs["state"])
        if state.shape != self.state.shape[1:] or state.dtype.kind not in "fiub":
            raise UserError(
                f"the environment's state is {state.shape} {state.dtype}, "
                f"its class names {self.state.shape[1]} numbers"
            )
        if not np.isfinite(state).all():
            raise UserError(f"the environment's state is not finite: {state}")
        self.state[arm] = state
        self.task[arm] = obs["task"]
        self.infos[arm] = info

    def observe(self, arms: Sequence[int]) -> dict[str, Any]:
        """What n arms see now: images (n, V, px, px, 3) uint8, state (n, S) float32, task, n strings."""
        arms = list(arms)
        task = [self.task[arm] for arm in arms]
        return {"images": self.images[arms], "state": self.state[arms], "task": task}

    def reset(self, arms: Sequence[int], seeds: Sequence[int], options: Sequence[dict]) -> None:
        """Begin an episode on each of these arms."""
        calls = {int(arm): {"seed": int(s), "options": dict(o)} for arm, s, o in zip(arms, seeds, options)}
        for arm, (obs, info) in self._call("reset", calls).items():
            self._store(arm, obs, info)
            self.terminated[arm] = self.truncated[arm] = False

    def step_chunk(self, actions: dict[int, np.ndarray]) -> np.ndarray:
        """Actions {arm: (h, A)} -> rewards (n,), 0 for the others.

        Observations, infos and ends are kept in this object.
        """
        reward = np.zeros(self.n, np.float32)
        calls = {int(arm): {"actions": chunk} for arm, chunk in actions.items()}
        for arm, (obs, r, terminated, truncated, info) in self._call("step_chunk", calls).items():
            self._store(arm, obs, info)
            reward[arm], self.terminated[arm], self.truncated[arm] = r, terminated, truncated
        return reward

    def seconds(self) -> dict[str, float]:
        """Seconds that a worker has spent so far, on average -> {"physics": s, "rendering": s}."""
        arms = self._call("seconds", {arm: {} for arm in range(self.n)}).values()
        stages = ("physics", "rendering")
        return {stage: sum(arm.get(stage, 0.0) for arm in arms) / len(self.workers) for stage in stages}

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
        try:
            return {arm: getattr(self.env, method)(**arguments) for arm, arguments in calls.items()}
        except (OSError, ModuleNotFoundError) as error:  # the environment's own, no mistake of this command
            raise RuntimeError("the environment failed") from error

    def seconds(self) -> dict[str, float]:
        return {}

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
    teacher_reasoning: str = ""  # what a teacher would think at the start
    success: bool = False
    steps: int = 0
    failure: str = ""
    moved_at: int | None = None  # when the simulation moved the cube
    extras: list = field(default_factory=list)  # per decision: what policy_fn returned besides actions
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
        obs["teacher_reasoning"] = [vec.infos[arm].get("reason", "") for arm in busy]
        actions, extras = policy_fn(obs)  # (n, h, A), n extras
        rewards = vec.step_chunk(dict(zip(busy, actions)))
        for arm, extra in zip(busy, extras):
            running[arm].extras.append(extra)
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
                _finish(episode, vec.infos[arm])
                if on_end:
                    on_end(episode)
                bar.update()
    bar.close()
    return list(episodes)


def _start(vec: VecEnv, arms: list[int], waiting: list[Episode]) -> dict[int, Episode]:
    """Begin the next waiting episodes on free arms -> {arm: its episode}."""
    started = {arm: waiting.pop(0) for arm in arms}
    begun = started.values()
    vec.reset(arms, [episode.seed for episode in begun], [episode.options for episode in begun])
    for arm, episode in started.items():
        episode.task = vec.task[arm]
        episode.teacher_reasoning = vec.infos[arm].get("reason", "")
    return started


def _finish(episode: Episode, info: dict) -> None:
    """Keep what the last info says of an episode."""
    episode.success = bool(info["success"])
    episode.steps = info["steps"]
    episode.failure = info.get("failure", "")
    episode.moved_at = info.get("moved_at")


def camera_indices(policy: Any, env: str) -> list[int]:
    """Which of an environment's cameras the policy looks through.

    UserError where cameras, motors or state do not fit: a policy must not run on another robot.
    """
    cls = environment_class("sim" if env == "real" else env)
    wanted = policy.cfg.camera_names
    missing = [camera for camera in wanted if camera not in cls.cameras]
    if missing:
        raise UserError(
            f"the policy looks through {wanted}, the environment has {list(cls.cameras)}: {missing} missing"
        )
    if policy.cfg.motor_names != list(cls.motors):
        raise UserError(f"the policy moves {policy.cfg.motor_names}, the environment has {list(cls.motors)}")
    if policy.cfg.state_names != list(state_names(cls)):
        raise UserError(
            f"the policy's state is {policy.cfg.state_names}, the environment's {list(state_names(cls))}"
        )
    rate = getattr(cls, "fps", policy.cfg.fps)
    if policy.cfg.fps != rate:
        raise UserError(
            f"the policy learnt from {policy.cfg.fps} frames a second, the environment makes {rate} steps: "
            f"convert its recordings with prepare.py --fps={rate}"
        )
    return [cls.cameras.index(camera) for camera in wanted]


def policy_fn(policy: Any, env: str = "sim", teacher: bool = False) -> PolicyFn:
    """A policy as run_episodes() takes it; its extras are the reasoning texts.

    teacher: it acts on a teacher's reasoning.
    """
    views = camera_indices(policy, env)
    calls = 0

    def decide(obs: dict) -> tuple[np.ndarray, list[str]]:
        nonlocal calls
        reasoning = obs["teacher_reasoning"] if teacher else None
        images = obs["images"][:, views]
        chunk, texts = policy.act(images, obs["state"], obs["task"], seed=calls, reasoning=reasoning)
        calls += 1
        return chunk[:, : policy.cfg.n_action_steps], texts

    return decide


# -----------------------------------------------------------------------------------------------------------
# Success by family and split


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a success rate -> (low, high)."""
    z = 1.959964  # the normal distribution's 97.5th percentile
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def target_of(reasoning: str | None) -> tuple[str, str] | None:
    """The cube and pad that a reasoning names: `blue is pad 2 , red cube at t5 r3` -> ("red", "2")."""
    named = re.search(r"is pad (\d) , (\w+) cube", reasoning or "")
    return (named[2], named[1]) if named else None


def latency(policy: Any, family: str, env: str = "sim", n: int = 30) -> dict[str, float]:
    """Median milliseconds of one policy.act on a single observation -> {stage: ms, ..., "total": ms}."""
    decide = policy_fn(policy, env)
    vec = VecEnv(1, 1, env, policy.cfg.image_size)
    samples = []
    with vec:
        # the first five warm up: they are left out below
        for seed in SEEDS["val"][: n + 5]:
            vec.reset([0], [seed], [{"family": family}])
            obs = vec.observe([0])
            with Stopwatch() as watch:
                began = time.perf_counter()
                decide(obs)
            watch.seconds["total"] = time.perf_counter() - began
            samples.append(watch.seconds)
    warm = samples[5:]
    return {stage: 1e3 * float(np.median([sample[stage] for sample in warm])) for stage in samples[0]}


def evaluate(
    policy: Any,
    families: Sequence[str],
    n: int,
    seeds: str = "report",
    splits: Sequence[str] = SPLITS,
    env: str = "sim",
    teacher: bool = False,
    arms: int = 24,
) -> dict[str, dict[str, dict]]:
    """Closed-loop episodes on the first n scenes of a range of seeds.

    -> {family: {split: {"success", "n", "low", "high" (95 % interval), "target_at_0" (cube and pad named
    correctly in the first reasoning), "reasoning" (the first one equals the teacher's), "steps" (mean of the
    successful episodes), "ms_per_chunk" (at batch 1), "ms_by_stage"}}}; target_at_0 and reasoning are None
    for a policy that does not reason.
    """
    if seeds not in SEEDS or not 1 <= n <= len(SEEDS[seeds]):
        raise UserError(
            f"n must lie in [1, {len(SEEDS['report'])}] and seeds in {list(SEEDS)}: {n} {seeds!r}"
        )
    check_families(families, env)
    known = getattr(environment_class(env), "splits", ("id",))
    if not set(splits) & set(known):
        raise UserError(f"--env={env} has no split {', '.join(splits)}: set --splits to some of {known}")
    results = {}
    for family in families:
        results[family] = {}
        # milliseconds first: a policy that does not fit the environment is told within a second
        stages = latency(policy, family, env)
        total = stages.pop("total")
        wanted = ["id"] if family == "tiny" else [split for split in splits if split in known]
        for split in wanted:
            jobs = [Episode(seed, {"family": family, "split": split}) for seed in SEEDS[seeds][:n]]
            with VecEnv(min(arms, n), 2, env, policy.cfg.image_size) as vec:
                episodes = run_episodes(vec, jobs, policy_fn(policy, env, teacher), f"{family} {split}")
            results[family][split] = summarise(episodes) | {"ms_per_chunk": total, "ms_by_stage": stages}
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


def summarise(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Success and first reasoning of some episodes, a cell of evaluate()'s table."""
    n = len(episodes)
    won = [episode.steps for episode in episodes if episode.success]
    low, high = wilson(len(won), n)
    # what the policy and a teacher reasoned about the first picture
    first = [(episode.extras[0], episode.teacher_reasoning) for episode in episodes]
    reasons = any(text for text, _ in first)
    named = float(np.mean([target_of(own) == target_of(teachers) for own, teachers in first]))
    exact = float(np.mean([own == teachers for own, teachers in first]))
    return {
        "success": len(won) / n,
        "n": n,
        "low": low,
        "high": high,
        "target_at_0": named if reasons else None,
        "reasoning": exact if reasons else None,
        "steps": float(np.mean(won)) if won else None,
    }


def report(results: dict[str, dict[str, dict]], path: Path) -> None:
    """Print evaluate()'s result as a table, then write it to a JSON file."""
    row = "{:<10} {:<16} {:>9} {:>5} {:>15} {:>14} {:>17} {:>6}"
    print(
        row.format(
            "family",
            "split",
            "success %",
            "n",
            "95 % interval",
            "target at 0 %",
            "reasoning exact %",
            "steps",
        )
    )
    for family, splits in results.items():
        for split, c in splits.items():
            interval = f"{percent(c['low'])} - {percent(c['high'])}"
            steps = "-" if c["steps"] is None else f"{c['steps']:.1f}"
            numbers = (
                percent(c["success"]),
                c["n"],
                interval,
                percent(c["target_at_0"]),
                percent(c["reasoning"]),
                steps,
            )
            print(row.format(family, split, *numbers))
    for family, splits in results.items():
        for c in list(splits.values())[:1]:
            if "ms_per_chunk" in c:
                stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in c["ms_by_stage"].items())
                print(f"{family}: {c['ms_per_chunk']:.1f} ms a chunk at batch 1 ({stages})")
    write_json(path, results)
    print(f"wrote {path}", flush=True)


def percent(share: float | None) -> str:
    """0.912 -> "91.2", None -> "-"."""
    return "-" if share is None else f"{100 * share:.1f}"


# -----------------------------------------------------------------------------------------------------------
# Films


def draw_frame(
    env: Any,
    cameras: Sequence[str],
    task: str,
    reasoning: str,
    weights: Sequence[float],
    note: str = "",
    px: int = 256,
) -> Image.Image:
    """The first two views, and underneath instruction, reasoning and a bar per feature query state (0..1)."""
    frame = Image.new("RGB", (2 * px, px + 112), (250, 250, 247))
    for i, camera in enumerate(cameras[:2]):
        frame.paste(Image.fromarray(env.render(px, camera)), (i * px, 0))
    pen = ImageDraw.Draw(frame)
    font = ImageFont.load_default(13)
    y = px + 4
    shown = f"<reason> {reasoning} </reason>" if reasoning else ""
    for text, colour in ((task, (20, 20, 20)), (shown, (170, 60, 20))):
        for line in textwrap.wrap(text, width=2 * px // 7)[:3]:
            pen.text((6, y), line, fill=colour, font=font)
            y += 16
    # a bar for every feature query state: how much the chosen chunk depends on it
    label = f"query states {note}" if len(weights) else note
    pen.text((6, px + 92), label, fill=(120, 120, 120), font=ImageFont.load_default(11))
    left = 206
    width = (2 * px - 218) / max(1, len(weights))
    for i, weight in enumerate(weights):
        x = left + i * width
        pen.rectangle((x, px + 106 - 24 * float(weight), x + 0.7 * width, px + 106), fill=(40, 90, 170))
    return frame


def save_film(frames: Sequence[Image.Image], folder: str | Path, title: str) -> Path:
    """Frames -> a GIF and a contact sheet in `folder`, named by the title -> their path without suffix."""
    letters = "".join(c if c.isascii() and c.isalnum() else " " for c in title)
    path = Path(folder) / ("_".join(letters.split())[:60] or "task")
    path.parent.mkdir(parents=True, exist_ok=True)
    # GIFs have 256 colours; 128 without dithering make small files
    palette = [frame.quantize(128, dither=Image.Dither.NONE) for frame in frames]
    gif = path.with_name(f"{path.name}.gif")
    palette[0].save(gif, save_all=True, append_images=palette[1:], duration=1000 // FPS, loop=0)
    picks = np.linspace(0, len(frames) - 1, 16).round().astype(int)
    contact_sheet([frames[i] for i in picks], columns=4).save(path.with_name(f"{path.name}.png"))
    return path


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in a grid, at half their size."""
    w, h = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * w, rows * h))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * w, i // columns * h))
    return sheet.resize((columns * w // 2, rows * h // 2))
