"""Reasoning while acting: the VLM and the action expert each go at their own pace.

    python sample.py --config small --eval=300 --families=place --mode=wait,naive,async,async+rtc --delay=0,4
    python sample.py --config small --interactive

The VLM is slow, the expert is fast, and a real arm moves on while both compute. To measure what that costs,
Runner counts time in control steps of 1 / FPS seconds: --delay=3 says that what the VLM makes of a picture is
usable 3 control steps after the picture was taken. So the same numbers come out on every machine.

The timeline of one arm in mode async, with delay 3 and n_action_steps 4. P0 is the picture of control step 0,
R0 the reasoning and the feature query states made from it, E(R0, 3) the expert's chunk a0, a1, ... from R0
and the joint state of step 3:

    control step    0     1     2     3     4     5     6     7     8     9     10    11
    picture         P0                      P4                      P8
    usable                            R0                      R4                      R8
    expert                            E(R0, 3)                E(R4, 7)                E(R8, 11)
    the arm does    -     -     -     a0    a1    a2    a3    b0    b1    b2    b3    c0

    1. A picture is taken n_action_steps after the one before, or later, when the VLM is free again (_look).
    2. `delay` steps after its picture a look is usable: Arm.pending becomes Arm.newest (_receive).
    3. The expert makes a plan from every new look. In async it makes another one after n_action_steps, from
       the same query states, which are older then, and from the joint state of now (_plan).
    4. The plan's actions replace those in the arm's queue (_join). In every control step the arm does the
       first action of its queue. When the queue is empty, the arm waits (-): it repeats its last target, and
       before the first plan it holds the joint positions in which the episode found it.

What the modes do while the VLM is at work:
    wait        The arm stands still. It does n_action_steps of a plan, then takes the next picture.
    naive       One plan per look, from the joint state of its picture. That is `delay` steps old when the
                plan is there, so a moving arm enters the plan at its action number `delay`.
    async       As drawn above. --stale=N trains the expert to use query states up to N steps old.
    async+rtc   As async, but the expert takes one control step, too. Meanwhile the arm does one more action
                of the old plan, towards which the new one is pulled: real-time chunking.

All times are control steps since the episode began. Without a delay, wait, naive and async are the
synchronous policy bit for bit.

Papers: real-time chunking, Black et al. 2025, arXiv 2506.07339; slow and fast systems, DuoCore-FS,
arXiv 2512.20188; old query states with the joint state of now, TIC-VLA, arXiv 2602.02459.
"""

import math
import os
import queue
import sys
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import UserError, read_json, require, write_json
from evaluate import (
    Episode,
    SingleEnv,
    VecEnv,
    camera_indices,
    report,
    run_episodes,
    summarise,
)
from model import DenoisingStep
from sim_env import FPS, SEEDS

# ------------------------------------------------------------------------------------------------------------
# The timeline


@dataclass
class Look:
    """What the VLM makes of one picture."""

    picture: int  # control step at which it was taken
    state: np.ndarray  # (S,) joint state at that step
    batch: Future  # -> reasoning texts and query states (n, Q, D) of n arms
    row: int  # of the batch


@dataclass
class Arm:
    """One episode as the runner knows it. An action's origin: control steps of (its picture, its plan)."""

    command: np.ndarray  # (A,) the last target; at first where the motors are
    task: str = ""
    pending: Look | None = None  # the VLM is at work on it
    newest: Look | None = None  # the newest that is usable
    text: str = ""  # its reasoning
    query_states: Tensor | None = None  # its query states (Q, D)
    next_look: float = 0  # control step from which the next picture may be taken
    next_plan: float = math.inf  # control step from which the expert may plan
    queue: list = field(default_factory=list)  # (action (A,), its origin) of the control steps ahead
    commands: list = field(default_factory=list)  # (A,) of every control step so far
    origins: list = field(default_factory=list)  # of these commands; None where the arm waited

    @property
    def now(self) -> int:
        """The control step that is to be decided on."""
        return len(self.commands)


class Runner:
    """A policy_fn for run_episodes() that gives one action a call; the timeline above is what it does.

    delay: as above; None: by wall clock, a look is usable as soon as the VLM is done, which works in a thread
    of its own. views: the policy's cameras among those of the environment.
    """

    def __init__(self, policy: Any, mode: str, delay: int | None = 0, views: Any = slice(None)):
        names = policy.cfg.state_names
        motors = policy.cfg.motor_names
        if not set(motors) <= set(names):  # an arm that waits holds its motors where they are
            raise UserError(
                f"the state {names} does not tell where the motors {motors} are: "
                "leave out --mode, --delay and --interactive"
            )
        self.positions = [names.index(motor) for motor in motors]  # of the motors in the state
        self.policy = policy
        self.mode = mode
        self.delay = delay
        self.views = views
        self.every = policy.cfg.n_action_steps
        self.vlm = ThreadPoolExecutor(1)
        self.arms = {}  # by the number of the episode
        self.first = deque(maxlen=64)  # what was said at the first looks of episodes, as in policy_fn()
        self.plans = 0  # made so far: the seed of the expert's noise

    def __call__(self, obs: dict) -> tuple[np.ndarray, list[str]]:
        """Observation of n arms -> actions (n, 1, A) in LeRobot units, the newest usable reasoning texts."""
        arms = []
        for episode, task, state in zip(obs["episode"], obs["task"], obs["state"]):
            arm = self.arms.get(episode.number) or Arm(state[self.positions])
            if task != arm.task:  # looks and plans made for another instruction do not count any more
                arm = Arm(arm.command, task, commands=arm.commands, origins=arm.origins)
            self.arms[episode.number] = arm
            arms.append(arm)
        self._receive(arms)  # first, because a VLM that has just finished can take the next picture
        self._look(arms, obs)
        self._receive(arms)  # without a delay a look is usable at once
        self._plan(arms, obs["state"])
        for arm in arms:
            origin = None
            if arm.queue:
                arm.command, origin = arm.queue.pop(0)
            arm.commands.append(arm.command)
            arm.origins.append(origin)
        # what the arms do in this control step
        actions = np.stack([arm.command for arm in arms])  # (n, A)
        return actions[:, None], [arm.text for arm in arms]

    def _receive(self, arms: list[Arm]) -> None:
        """A look becomes the newest when its time has come."""
        for arm in arms:
            look = arm.pending
            if look is None:
                continue
            # by wall clock the loop does not wait for the VLM
            usable = look.batch.done() if self.delay is None else arm.now >= look.picture + self.delay
            if usable:
                texts, query_states = look.batch.result()
                if arm.newest is None:
                    self.first.append(texts[look.row])
                arm.text = texts[look.row]
                arm.query_states = query_states[look.row]
                arm.newest = look
                arm.pending = None
                arm.next_plan = arm.now

    def _look(self, arms: list[Arm], obs: dict) -> None:
        """The VLM gets a picture of every arm that is due for one."""
        due = [i for i, arm in enumerate(arms) if arm.pending is None and arm.now >= arm.next_look]
        if not due:
            return
        tasks = [arms[i].task for i in due]
        state = obs["state"][due]  # (n, S)
        images = obs["images"][due][:, self.views]  # (n, V, px, px, 3)
        images, _ = self.policy.check_inputs(images, state, tasks)
        guess = [[*self.first, arms[i].text] for i in due]
        batch = self.vlm.submit(self.policy.reason, images, tasks, guess=guess)
        for row, i in enumerate(due):
            arm = arms[i]
            arm.pending = Look(arm.now, state[row], batch, row)
            arm.next_look = arm.now + self.every
            if self.mode == "wait":
                arm.next_look = math.inf  # until there is a plan (_join)

    def _plan(self, arms: list[Arm], state: np.ndarray) -> None:
        """The expert makes a plan for every arm that is due for one."""
        due = [i for i, arm in enumerate(arms) if arm.now >= arm.next_plan]
        if not due:
            return
        arms = [arms[i] for i in due]
        query_states = torch.stack([arm.query_states for arm in arms])  # (n, Q, D)
        state = state[due]  # (n, S)
        age = [arm.now - arm.newest.picture for arm in arms]
        if self.mode == "naive":
            state = np.stack([arm.newest.state for arm in arms])
        if self.mode in ("naive", "wait"):  # picture and joint state belong together, as in training
            age = [0] * len(due)
        step = None
        if self.mode == "async+rtc":
            step = pulled_step(self.policy, [arm.queue for arm in arms])
        # the expert is fast: the arm waits for it
        chunks = self.policy.plan(query_states, state, self.plans, age, step)  # (n, H, A)
        self.plans += 1
        for arm, chunk in zip(arms, chunks):
            self._join(arm, [(action, (arm.newest.picture, arm.now)) for action in chunk])

    def _join(self, arm: Arm, actions: list) -> None:
        """A new plan's actions replace those in the arm's queue."""
        ahead = arm.queue[:1]
        arm.queue = actions
        arm.next_plan = math.inf
        if self.mode == "wait":
            arm.queue = actions[: self.every]
            arm.next_look = arm.now + self.every
        elif self.mode == "naive":
            past = arm.origins[arm.newest.picture :]
            if any(past):  # an arm at rest begins at the beginning
                arm.queue = actions[len(past) :]
        else:
            arm.next_plan = arm.now + self.every
        # Real-time chunking: this control step passes before the expert is done. An arm at rest waits.
        if self.mode == "async+rtc":
            arm.queue = ahead + actions[1:] if ahead else [(arm.command, None), *actions]


def pulled_step(policy: Any, queues: list[list]) -> DenoisingStep:
    """Real-time chunking (arXiv 2506.07339): Euler's step, pulled towards what B arms have in their queues.

    The first action of a queue will be done in any case: weight 1. From there the weight falls exponentially,
    to 0 where the queue ends (eq. 5). The paper differentiates through the network. Here its Jacobian counts
    as the identity, so no backward pass is needed.
    """
    K = policy.cfg.denoise_steps
    target = torch.zeros(len(queues), policy.cfg.chunk_size, policy.cfg.action_dim)  # (B, H, A)
    weight = torch.zeros(len(queues), policy.cfg.chunk_size, 1)  # (B, H, 1)
    for row, ahead in enumerate(queues):
        for i, (action, _) in enumerate(ahead):
            c = (len(ahead) - i) / len(ahead)
            weight[row, i] = c * math.expm1(c) / math.expm1(1)
            target[row, i] = torch.as_tensor(action)
    weight = weight.to(policy.action_low.device)
    target = policy.normalise(target.to(weight.device), "action")

    def step(k: int, x: Tensor, v: Tensor) -> Tensor:
        t = 1 - k / K
        gain = K  # the whole way in one step
        if k > 0:
            gain = min(K, (t * t + (1 - t) ** 2) / (t * (1 - t)))
        clean = x - t * v  # (B, H, A), the chunk as it looks from here
        return policy.euler_step(k, x, v - gain * weight * (target - clean))

    return step


# ------------------------------------------------------------------------------------------------------------
# Success against delay


def measures(runner: Runner) -> dict[str, float]:
    """What a runner's arms did; a measure of something that never happened is left out.

    waiting: share of control steps without an action. waiting_later: the same from the first action on.
    jerk_border, jerk_inside: mean |a_t - a_(t-1)| over joints in LeRobot units, where one plan takes over
    from another, and within a plan. age: mean number of control steps from a picture to an action that came
    of it.
    """
    found = defaultdict(list)
    for arm in runner.arms.values():
        last = None  # origin of the last action
        for now, origin in enumerate(arm.origins):
            waits = origin is None
            found["waiting"].append(waits)
            if last or origin:
                found["waiting_later"].append(waits)
            if waits:
                continue
            found["age"].append(now - origin[0])
            if last:
                jerk = np.abs(arm.commands[now] - arm.commands[now - 1]).mean()
                found["jerk_inside" if origin == last else "jerk_border"].append(jerk)
            last = origin
    return {name: float(np.mean(values)) for name, values in found.items()}


def reaction(moved: Runner, unmoved: Runner, episodes: list[Episode]) -> dict[str, float]:
    """How soon a command answers a cube's move: it differs by more than 2 LeRobot units in some joint.

    moved, unmoved: runners that played the same episodes with and without the move. -> {"reacted": share of
    the episodes with a move, "reaction": the median of those, in control steps}.
    """
    times = []
    moves = [episode for episode in episodes if episode.moved_at is not None]
    for episode in moves:
        pairs = zip(moved.arms[episode.number].commands, unmoved.arms[episode.number].commands)
        for now, (one, other) in enumerate(pairs):
            if now >= episode.moved_at and np.abs(one - other).max() > 2:
                times.append(now - episode.moved_at)
                break
    found = {"reacted": len(times) / max(1, len(moves))}
    if times:
        found["reaction"] = float(np.median(times))  # control steps
    return found


def compare(policy: Any, cfg: Any, vec: SingleEnv) -> None:
    """Success by mode, delay, family and split on the same seeds: a table, async.json in the run's folder.

    The cells of several commands gather in that file; the same cell again replaces itself. vec: for live().
    """
    live(policy, cfg, vec)
    name = "async" + "_moved" * bool(cfg.moved) + "_val" * (cfg.seeds == "val")
    path = Path(cfg.run, f"{name}.json")
    table = read_json(path) if path.is_file() else {}
    choices = (cfg.families, cfg.splits or "id", cfg.delay or "0", cfg.mode or "async")
    for family, split, delay, mode in product(*(words.split(",") for words in choices)):
        runners = []
        for moved in sorted({0, cfg.moved}):  # with a move the same episodes without it come first
            runner = Runner(policy, mode, int(delay), camera_indices(policy, cfg.env))
            runners.append(runner)
            scene = {"family": family, "split": split}
            episodes = [Episode(seed, scene) for seed in SEEDS[cfg.seeds][: cfg.eval]]
            options = {"moved": moved} if moved else {}  # environments of one's own do not know it
            with VecEnv(min(24, cfg.eval), 2, cfg.env, policy.cfg.image_size, **options) as arms:
                run_episodes(arms, episodes, runner, f"{mode} {delay} {family}")
        cell = summarise(episodes) | measures(runner)
        if cfg.moved:
            cell |= reaction(runner, runners[0], episodes)
        table.setdefault(f"{mode} {delay}", {})[f"{family} {split}"] = cell
        write_json(path, table)  # after every cell: a table takes a while
        show(f"{mode} {delay} {family} {split}", cell)  # the measures; success follows in one table
    report(table, path)


def show(title: str, cell: dict[str, Any]) -> None:
    """Print the measures in a cell of the table."""
    names = ("success", "waiting", "waiting_later", "jerk_border", "jerk_inside", "age", "reaction")
    print(title, *(f"{name} {cell[name]:.3f}" for name in names if name in cell), sep="  ", flush=True)


# ------------------------------------------------------------------------------------------------------------
# By wall clock


def make_runner(policy: Any, cfg: Any) -> Runner:
    """The runner of a film, a conversation or the real arm; without --delay the last two go by wall clock."""
    mode = cfg.mode
    if not mode:  # an expert that learnt from fresh query states only does badly with old ones
        mode = "async" if policy.cfg.stale else "naive"
    delay = int(cfg.delay or 0)
    if not cfg.delay and (cfg.interactive or cfg.env == "real"):
        delay = None
    return Runner(policy, mode, delay, camera_indices(policy, cfg.env))


class PacedEnv:
    """An environment whose control steps take 1 / FPS seconds, or longer if the policy does."""

    def __init__(self, env: Any):
        self.env = env
        self.due = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step_chunk(self, actions: np.ndarray) -> tuple:
        """Sleep until the next control step is due, then as SO100Env's."""
        time.sleep(max(0.0, self.due - time.perf_counter()))
        self.due = time.perf_counter() + 1 / FPS
        return self.env.step_chunk(actions)


def live(policy: Any, cfg: Any, vec: SingleEnv) -> None:
    """Print the measures of three async episodes by wall clock. vec: an environment to play them in."""
    runner = Runner(policy, "async", None, camera_indices(policy, cfg.env))
    vec.env = PacedEnv(vec.env)
    family = cfg.families.split(",")[0]
    with vec:
        run_episodes(vec, [Episode(seed, {"family": family}) for seed in SEEDS["val"][:3]], runner, "live")
    show(f"live, {FPS} control steps a second", measures(runner))


class TalkingEnv(PacedEnv):
    """An environment whose instructions a person types, also in mid motion; in a window where there is one.

    reset() waits for an instruction and goes on in the scene as it is. The word new lays out another scene.
    When the input ends (a pipe), the next reset() raises EOFError; the word quit does so at once.
    """

    def __init__(self, env: Any, tokenizer: Any, seed: int):
        super().__init__(env)
        self.tokenizer = tokenizer
        self.seeds = count(seed)
        self.is_real = hasattr(env, "rest")
        self.can_instruct = hasattr(getattr(env, "env", env), "instruct")
        self.obs = None  # of the scene that an instruction goes on in; None where it needs another
        self.task = ""
        self.viewer = None if self.is_real else open_viewer(env)
        self.lines = queue.SimpleQueue()
        threading.Thread(target=listen, args=(self.lines,), daemon=True).start()
        print("type an instruction, such as: put the red cube on the blue pad; or: new, quit", flush=True)

    def reset(self, *, seed: int, options: dict) -> tuple[dict, dict]:
        """Wait for an instruction -> obs, info. options: family and split of the scenes."""
        if not self.can_instruct:  # what cannot be told anew begins anew
            self.obs = None
        heard = None
        while heard is None:
            if self.obs is None and not self.is_real:
                self.obs, _ = self.env.reset(seed=next(self.seeds), options=options)
            line = self.lines.get()
            if line is None:
                raise EOFError
            heard = self.hear(line)
        return heard, {"steps": 0}

    def hear(self, line: str) -> dict | None:
        """What a person typed -> the observation of a new instruction, None where there is none."""
        if line == "quit":
            raise EOFError
        if line == "new":
            self.obs = None
            if self.is_real:  # out of the way of the person who lays out the scene
                self.env.rest()
            return None
        try:
            self.tokenizer.prompt(line)  # complain about the words before anything moves
            if self.obs is None:  # a person has laid out the scene
                self.obs, _ = self.env.reset(options={"task": line})
            elif self.can_instruct:
                self.obs = self.env.instruct(line)
        except UserError as error:
            if type(error) is not UserError:  # ArmError: the arm was stopped
                raise
            print(error, flush=True)
            return None
        self.task = line
        print(f"instruction: {line}", flush=True)
        return self.obs | {"task": line}

    def step_chunk(self, actions: np.ndarray) -> tuple:
        """As SO100Env's; a line that was typed meanwhile is obeyed at once."""
        with self.viewer.lock() if self.viewer else nullcontext():
            obs, reward, terminated, truncated, info = super().step_chunk(actions)
        if self.viewer:
            self.viewer.sync()
        if not (terminated or truncated or self.lines.empty()):
            line = self.lines.get()
            if line is None:  # the end of the input counts when the instruction is carried out
                self.lines.put(None)
            else:
                obs = self.hear(line) or obs
                truncated = self.obs is None
        return obs | {"task": self.task}, reward, terminated, truncated, info


def listen(lines: queue.SimpleQueue) -> None:
    """Lines of standard input -> queue, then None, however the input ends."""
    try:
        if sys.stdin is None:  # closed before the program began
            return
        # not sys.stdin itself: a thread that waits inside it would block the exit
        with open(sys.stdin.fileno(), errors="replace", closefd=False) as words:
            for line in filter(str.strip, words):
                lines.put(line.strip())
    finally:
        lines.put(None)


def open_viewer(env: Any) -> Any:
    """MuJoCo's window on a simulated arm where there is a display, else None."""
    has_display = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if not (has_display and hasattr(env, "model")):
        return None
    try:
        return require("mujoco.viewer").launch_passive(env.model, env.data)
    except RuntimeError as error:  # macOS wants the program started by mjpython
        print(f"no window ({error}); there will be a film instead")
        return None
