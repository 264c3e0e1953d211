"""Run a trained policy: films, success tables, questions, open-loop replay.

    python sample.py --config small "put the red cube on the blue pad"    # a GIF and a contact sheet, reasoning drawn in
    python sample.py --config small --eval 300                            # success by family and split, eval.json
    python sample.py --config small --ask "which pad is blue"             # a question about a scene
    python sample.py --config base --ask "what is on the table" --image x.png    # or about a picture of yours
    python sample.py --config small --replay                              # open-loop error per joint on recorded episodes
    python sample.py --config small --env=real --port=/dev/ttyACM0 --front=0 --wrist=2 --dry_run "put the red cube on the blue pad"
    python sample.py --config small --interactive                         # type instructions, also while the arm moves
    python sample.py --config small --eval 300 --families=place --mode=wait,naive,async,async+rtc --delay=0,1,2,4,8    # success against the VLM's delay

A checkpoint folder is all that a policy needs; only --replay reads the data set, because it compares with recorded actions.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import queue
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import torch
import sim_env
from model import read_checkpoint_config


MODES = {  # how thinking and acting share time, when a thought takes a while
    "wait": "the arm stands still while the VLM thinks",
    "naive": "one chunk a thought, for the joint state of its picture; the arm joins it late",
    "async": "the expert plans from the newest thought that is ready and the joint state of now",
}
JOINS = {  # how a plan follows the one before; without a word: at once
    "ensemble": "the arm does the mean of all plans that still speak (temporal ensembling)",
    "rtc": "a new plan is pulled towards the running one (real-time chunking)",
    "prefix": "a new plan continues what is done and decided already (the same, by an expert trained with --committed)",
}
MODES_AND_JOINS = [*MODES, *(f"{mode}+{join}" for mode in ("naive", "async") for join in JOINS)]


# ---------------------------------------------------------------------------------------------------------------
# Thinking while acting


@dataclass
class Plan:
    """A chunk and when it holds; all times are control steps since the episode began."""

    chunks: Future  # -> (n, H, A), of which this plan is one row
    row: int
    begin: int  # when its first action is due
    ready: int  # from when on the arm may follow it: the expert takes its time, too
    seen: int  # when the picture behind it was taken


class Arm:
    """One episode as the runner knows it. log: per control step (command (A,), the plan it came from or None: the arm waits)."""

    def __init__(self, command):
        self.now, self.task, self.command, self.moved, self.log = -1, None, command, -1, []

    def listen(self, task):
        """A new instruction: no thought and no plan made for the old one counts any more."""
        self.task, self.reason, self.plans = task, "", []
        self.thinking = self.looked = self.states = self.seen = self.planned = self.asked = None


class Runner:
    """Drives arms one control step a call, the VLM and the expert each at its own pace (what the modes do: MODES, JOINS).

    The VLM takes a picture every `refresh` control steps, but only when it has finished the thought before. A thought can be seen
    `delay` control steps after its picture, on a clock that counts steps, the same on every machine; with a thread `pool` and no
    delay, when it is ready. The expert plans as soon as there is a new thought, at the latest after `execute` steps, and the
    arm follows a plan `commit` steps after it was asked for. Where there is nothing to follow, the arm waits in its last pose:
    at its last target or, before the first one, where its state says that its motors are.
    """

    def __init__(
        self, policy, mode="async", delay=0, refresh=0, commit=0, views=slice(None), seed=0, pool=None
    ):
        cfg, (mode, _, join) = policy.cfg, mode.partition("+")
        self.policy, self.mode, self.join, self.delay, self.views, self.seed, self.pool = (
            policy,
            mode,
            join,
            delay,
            views,
            seed,
            pool,
        )
        self.refresh, self.commit = (
            refresh or cfg.execute,
            max(commit, int(mode == "async" and join in ("rtc", "prefix"))),
        )  # these need something to join
        if self.commit + cfg.execute > cfg.chunk:
            raise ValueError(
                f"commit ({self.commit}) and execute ({cfg.execute}) together must fit into a chunk of {cfg.chunk}; lower --commit or --execute"
            )
        given = self.commit + (delay or 0 if mode == "naive" else 0)
        if join == "prefix" and given > cfg.committed:
            raise ValueError(
                f"the expert was trained to continue {cfg.committed} given actions, not {given}; train one with --committed={given} or more"
            )
        names, motors = cfg.state_names, cfg.motors.split(",")
        self.held = [
            names.index(motor) for motor in motors if motor in names
        ]  # where in the state the motors' positions are
        if len(self.held) < len(motors) and (delay != 0 or self.commit):
            raise ValueError(
                f"an arm that waits for its first plan holds its motors {motors} where they are, and its state {names} does not tell of all: "
                "leave out --mode, --delay and --commit; for --interactive add --delay=0"
            )
        self.life = cfg.execute if mode == "wait" else cfg.chunk  # how many actions of a plan are followed
        self.arms, self.seconds = (
            {},
            defaultdict(list),
        )  # seconds: wall clock of every call of the VLM and of the expert

    def __call__(self, obs):
        """obs as sim_env.rollout gives it -> (commands (n, 1, A), the n thoughts seen so far)."""
        for episode, state in zip(obs["episode"], obs["state"]):
            if episode not in self.arms:
                self.arms[episode] = Arm(state[self.held])
        arms = [self.arms[episode] for episode in obs["episode"]]
        for arm, task in zip(arms, obs["task"]):
            arm.now += 1
            if task != arm.task:
                arm.listen(task)
            arm.plans = [p for p in arm.plans if arm.now < p.begin + self.life]
        self._see(arms)
        self._look(arms, obs)
        self._see(arms)  # without a delay a thought is seen at once
        self._plan(arms, obs["state"])
        return np.stack([self._command(arm) for arm in arms])[:, None], [arm.reason for arm in arms]

    def _call(self, name, work, *arguments):
        """work(*arguments) in the pool, or at once without one -> Future; its seconds are booked."""

        def timed():
            began = time.perf_counter()
            result = work(*arguments)
            self.seconds[name].append(time.perf_counter() - began)
            return result

        if self.pool:
            return self.pool.submit(timed)
        done = Future()
        done.set_result(timed())
        return done

    def _think(self, images, state, tasks):
        images, _ = self.policy.check_inputs(images, state, tasks)
        return self.policy.think(images, tasks)

    def _look(self, arms, obs):
        """The VLM gets pictures of the arms whose last thought is finished, when it is time."""
        due = []
        for i, arm in enumerate(arms):
            if self.mode == "wait":
                in_time = not arm.plans and arm.seen == arm.planned  # what was thought has been done
            else:
                in_time = arm.looked is None or arm.now >= arm.looked + self.refresh
            if arm.thinking is None and in_time:
                due.append(i)
        if due:
            thoughts = self._call(
                "VLM",
                self._think,
                obs["images"][due][:, self.views],
                obs["state"][due],
                [arms[i].task for i in due],
            )
            for row, i in enumerate(due):
                arms[i].looked, arms[i].thinking = arms[i].now, (thoughts, row, obs["state"][i])

    def _see(self, arms):
        """Thoughts that are ready become what the expert goes by."""
        for arm in arms:
            if arm.thinking and (
                arm.thinking[0].done() if self.delay is None else arm.now >= arm.looked + self.delay
            ):
                thoughts, row, arm.posture = arm.thinking
                reasons, states = thoughts.result()
                arm.reason, arm.states, arm.seen, arm.thinking = reasons[row], states[row], arm.looked, None

    def _plan(self, arms, state):
        """The expert makes new plans for the arms that want one."""
        steady = self.mode in ("wait", "naive")  # one chunk a thought
        wanting = []
        for i, arm in enumerate(arms):
            idle = not arm.plans or arm.plans[-1].ready <= arm.now
            if (
                arm.states is not None
                and idle
                and (arm.seen != arm.planned or not steady and arm.now >= arm.asked + self.policy.cfg.execute)
            ):
                wanting.append(i)
        if not wanting:
            return
        chosen = [arms[i] for i in wanting]
        joints = np.stack(
            [arm.posture if self.mode == "naive" else state[i] for i, arm in zip(wanting, chosen)]
        )  # (n, S)
        # An arm that stood still since the picture is where the picture shows it: for the expert the thought is as good as fresh.
        more = {"age": [0 if steady else arm.now - arm.seen for arm in chosen]}
        since = [
            arm.seen if self.mode == "naive" else arm.now for arm in chosen
        ]  # the moment of the joint state that a plan starts from
        moving = [arm.moved >= start or bool(self._live(arm)) for arm, start in zip(chosen, since)]
        if self.join in ("rtc", "prefix"):
            more |= self._join(chosen, since, moving)
        states = torch.stack([arm.states for arm in chosen])  # (n, Q, D)
        chunks = self._call("expert", functools.partial(self.policy.plan, **more), states, joints, self.seed)
        self.seed += 1
        for row, arm in enumerate(chosen):
            arm.asked, arm.planned, ready = arm.now, arm.seen, arm.now + self.commit
            begin = (
                since[row] if moving[row] else ready
            )  # an arm at rest can start whenever the plan is there
            arm.plans.append(Plan(chunks, row, begin, ready, arm.seen))

    def _live(self, arm):
        return [p for p in arm.plans if p.ready <= arm.now < p.begin + self.life]

    def _join(self, arms, since, moving):
        """What plans that start from the moments `since` are to continue: arguments of SyVLA.plan."""
        n, H = len(arms), self.policy.cfg.chunk
        running, pull, given = (
            np.zeros((n, H, self.policy.cfg.action_dim)),
            np.zeros((n, H)),
            np.zeros(n, int),
        )
        for row, (arm, start) in enumerate(zip(arms, since)):
            if moving[row]:
                done = [command for command, _ in arm.log[start:]]
                ahead = [
                    action
                    for p in self._live(arm)[-1:]
                    for action in p.chunks.result()[p.row, arm.now - p.begin :]
                ]
                rest = np.stack(done + ahead)[:H]
                running[row, : len(rest)], given[row] = rest, min(len(done) + min(self.commit, len(ahead)), H)
                pull[row] = rtc_pull(given[row], len(rest), H)
        return {"running": running} | ({"given": given} if self.join == "prefix" else {"pull": pull})

    def _command(self, arm):
        live = self._live(arm)
        if live:
            said = np.stack(
                [p.chunks.result()[p.row, arm.now - p.begin] for p in live]
            )  # (plans, A), the oldest first
            arm.command = (
                np.average(said, axis=0, weights=np.exp(-0.01 * np.arange(len(live))))
                if self.join == "ensemble"
                else said[-1]
            )  # ACT's weights
            arm.moved = arm.now
        arm.log.append((arm.command, live[-1] if live else None))
        return arm.command


def rtc_pull(committed, rest, H):
    """How firmly a new plan holds to what the running one would do, (H,): 1 for the committed steps, from there exponentially
    less, 0 from where the running one ends, `rest` steps ahead (arXiv 2506.07339, eq. 5)."""
    i = np.arange(H)
    c = (rest - i) / (rest - committed + 1)
    return np.where(i < committed, 1.0, np.where(i < rest, c * np.expm1(c) / (math.e - 1), 0.0))


def runner_by_flags(policy, cfg):
    """In conversation and on the real arm a thought takes as long as it takes, in threads; else --delay steps, or none."""
    live = cfg.interactive or cfg.env == "real"
    mode = cfg.mode or (
        "async" if policy.cfg.stale else "naive"
    )  # an expert that never met old thoughts follows them badly
    return Runner(
        policy,
        mode,
        int(cfg.delay) if cfg.delay else None if live else 0,
        cfg.refresh,
        cfg.commit,
        seed=cfg.seed,
        pool=ThreadPoolExecutor(2) if live else None,
    )


def measures(arms):
    """What the arms' logs tell -> {"waiting": share of control steps in which the arm had nothing to do, "waiting_later": without
    those before its first action, "jerk_border", "jerk_inside": mean |a_t - a_t-1| over joints (LeRobot units) where one plan takes
    over from another, and within one, "staleness": {age of the picture behind an action, in control steps: share of actions}, "age":
    its mean}."""
    border, inside, ages, waited, opening, steps = [], [], Counter(), 0, 0, 0
    for arm in arms:
        first = next((i for i, (_, plan) in enumerate(arm.log) if plan), len(arm.log))
        opening, steps = opening + first, steps + len(arm.log)
        for now, (command, plan) in enumerate(arm.log):
            if plan is None:
                waited += 1
                continue
            ages[now - plan.seen] += 1
            if now > first:
                before, previous = arm.log[now - 1]
                (inside if previous is plan else border).append(np.abs(command - before).mean())
    mean = lambda x: float(np.mean(x)) if x else None
    return {
        "waiting": waited / steps,
        "waiting_later": (waited - opening) / max(1, steps - opening),
        "jerk_border": mean(border),
        "jerk_inside": mean(inside),
        "staleness": {str(age): ages[age] / ages.total() for age in sorted(ages)},
        "age": mean(list(ages.elements())),
    }


def reaction(moved, unmoved, episodes, threshold=2.0):
    """Control steps from a cube's move to the first command that differs by more than `threshold` from the same seed's where nothing
    was moved: {"median", "p90", "reacted": share of the episodes in which it was moved, "moved": their number}."""
    times = []
    for i, episode in enumerate(episodes):
        if (at := episode["moved_at"]) is not None:
            pairs = zip(moved.arms[i].log[at:], unmoved.arms[i].log[at:])
            times.append(
                next((n for n, ((a, _), (b, _)) in enumerate(pairs) if np.abs(a - b).max() > threshold), None)
            )
    seen = [t for t in times if t is not None]
    quantile = lambda q: float(np.quantile(seen, q)) if seen else None
    return {
        "median": quantile(0.5),
        "p90": quantile(0.9),
        "reacted": len(seen) / max(1, len(times)),
        "moved": len(times),
    }


def compare(policy, cfg):
    """Success against the VLM's delay, for each mode on the same seeds: a printed table, and async.json in the run folder, where the
    cells of several commands gather (the same cell again replaces itself)."""
    families = (
        cfg.families or read_checkpoint_config(cfg.run).get("families", ",".join(sim_env.FAMILIES))
    ).split(",")
    sim_env.check_families(families, cfg.env)
    if cfg.eval > len(sim_env.SEEDS[cfg.seeds]):
        raise ValueError(f"there are {len(sim_env.SEEDS[cfg.seeds])} {cfg.seeds} seeds, not {cfg.eval}")
    began, views, path = time.time(), sim_env.views_of(policy, cfg.env), Path(cfg.run, "async.json")
    cells = json.loads(path.read_text())["cells"] if path.is_file() else []
    now = live(policy, cfg, families[0])
    calls = ", ".join(
        f"{part} {now[part]['p50']:.0f} ms (p95 {now[part]['p95']:.0f})" for part in ("VLM", "expert")
    )
    print(
        f"live, {sim_env.FPS} control steps a second: {calls}, picture behind an action {now['age']:.1f} steps old, "
        f"the arm waits {now['waiting']:.1%} of the time, {now['late']:.1%} of the steps late"
    )

    def play(mode, delay, family, split, **options):
        runner = Runner(policy, mode, delay, cfg.refresh, cfg.commit, views)
        seeds, name = sim_env.SEEDS[cfg.seeds][: cfg.eval], f"{mode} {delay} {family}"
        return runner, sim_env.rollout(
            runner, seeds, family, split, cfg.arms, policy.cfg.image_size, name=name, env=cfg.env, **options
        )

    print(
        COLUMNS.format(
            "mode",
            "delay",
            "family",
            "split",
            "success %",
            "95 % interval",
            "steps",
            "waits %",
            "later %",
            "jerk border",
            "inside",
            "age",
            "reaction",
        )
    )
    for family, split, delay, mode in itertools.product(
        families,
        (cfg.splits or "id").split(","),
        map(int, (cfg.delay or "0").split(",")),
        (cfg.mode or "async").split(","),
    ):
        runner, episodes = play(mode, delay, family, split, **scene_options(cfg))
        what = {
            "mode": mode,
            "delay": delay,
            "family": family,
            "split": split,
            "seeds": cfg.seeds,
            "n": cfg.eval,
            "execute": policy.cfg.execute,
            "refresh": runner.refresh,
            "commit": runner.commit,
            "moved": cfg.moved,
            "patience": cfg.patience,
        }
        wins = [e["steps"] for e in episodes if e["success"]]
        low, high = sim_env.wilson(len(wins), cfg.eval)
        c = (
            what
            | {
                "success": len(wins) / cfg.eval,
                "low": low,
                "high": high,
                "steps": float(np.mean(wins)) if wins else None,
            }
            | measures(runner.arms.values())
        )
        if cfg.moved:  # the same seeds once more, with nothing moved: the first difference is the reaction
            c["reaction"] = reaction(
                runner, play(mode, delay, family, split, **scene_options(cfg) | {"moved": 0})[0], episodes
            )
        cells = [old for old in cells if any(old.get(k) != v for k, v in what.items())] + [c]
        write_json(path, {"live": now, "cells": cells})  # after every cell: a table takes a while
        number = lambda x, digits=1: "-" if x is None else f"{x:.{digits}f}"
        print(
            COLUMNS.format(
                mode,
                delay,
                family,
                split,
                number(100 * c["success"]),
                f"{100 * low:.1f} - {100 * high:.1f}",
                number(c["steps"]),
                number(100 * c["waiting"]),
                number(100 * c["waiting_later"]),
                number(c["jerk_border"], 2),
                number(c["jerk_inside"], 2),
                number(c["age"]),
                number(c["reaction"]["median"]) if cfg.moved else "-",
            ),
            flush=True,
        )
    print(f"{time.time() - began:.0f} s; wrote {path}")


COLUMNS = "{:<14} {:>5} {:<10} {:<16} {:>9} {:>13} {:>6} {:>8} {:>8} {:>12} {:>7} {:>5} {:>9}"


def scene_options(cfg):
    """What the simulation is asked for beyond its task; other environments know nothing of it."""
    return ({"moved": cfg.moved} if cfg.moved else {}) | (
        {"patience": cfg.patience} if cfg.patience != 1 else {}
    )


def live(policy, cfg, family, n=3):
    """n episodes at the arm's own pace, the VLM and the expert in threads: milliseconds of their calls by wall clock, and how the arm fared."""
    env, late, ticks = sim_env.make_env(cfg.env, policy.cfg.image_size), 0, 0
    with ThreadPoolExecutor(2) as pool:
        runner = Runner(policy, "async", None, cfg.refresh, cfg.commit, pool=pool)
        policy.act(
            *look(env.reset(seed=sim_env.SEEDS["val"][0], options={"family": family})[0], policy)
        )  # the first call is slower
        for episode in range(n):
            obs, _ = env.reset(seed=sim_env.SEEDS["val"][episode], options={"family": family})
            due, done = time.perf_counter(), False
            while not done:
                actions, _ = runner(batch_of_one(obs, policy, episode))
                obs, _, terminated, truncated, _ = env.step(actions[0, 0])
                done, ticks, due = terminated or truncated, ticks + 1, due + 1 / sim_env.FPS
                late += not wait_until(due)
    env.close()
    calls = {
        part: {f"p{q}": float(np.percentile(seconds, q)) * 1e3 for q in (50, 95)}
        for part, seconds in runner.seconds.items()
    }
    told = measures(runner.arms.values())
    return calls | {"age": told["age"], "waiting": told["waiting"], "late": late / ticks, "steps": ticks}


def wait_until(due):
    """Sleep until the clock shows `due`; False if it is past already."""
    left = due - time.perf_counter()
    time.sleep(max(0, left))
    return left >= 0


# ---------------------------------------------------------------------------------------------------------------
# Conversation


def interactive(policy, cfg):
    """A person types instructions, also in mid motion: the arm drops what it thought and planned, and goes on from where it is.

    It all happens at the arm's own pace, in a window where there is a display; else the last minute is written as a film. When
    the input ends (a pipe), so does the conversation, once the last instruction is carried out. The real arm moves when it is told to.
    """
    runner, real, cameras = runner_by_flags(policy, cfg), cfg.env == "real", policy.cfg.cameras.split(",")
    env = (
        real_arm(policy, cfg)
        if real
        else sim_env.make_env(cfg.env, policy.cfg.image_size, **scene_options(cfg))
    )
    seed, scene, lines, frames = (
        cfg.seed,
        {"family": cfg.family, "split": cfg.split},
        queue.SimpleQueue(),
        deque(maxlen=60 * sim_env.FPS),
    )

    def listen():
        with open(
            sys.stdin.fileno(), closefd=False
        ) as words:  # not sys.stdin: a thread that waits inside it would break the exit
            for line in words:
                lines.put(line.strip())
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    obs, info = (None, {"steps": 0}) if real else env.reset(seed=seed, options=scene)
    viewer = None if real else open_viewer(env)
    print(
        'type an instruction, such as: put the red cube on the blue pad (another one interrupts it; "new": another scene; "quit")',
        flush=True,
    )
    task, ended, listening, said, due = None, False, True, None, 0.0
    with contextlib.suppress(KeyboardInterrupt):
        while (task or listening) and (viewer is None or viewer.is_running()):
            try:
                line = lines.get(timeout=0 if task else 0.1)
            except queue.Empty:
                line = ""
            if line is None:
                listening = False
            elif line == "quit":
                break
            elif (
                line == "new" or line and ended and not hasattr(env, "instruct")
            ):  # what cannot be told anew begins anew
                seed, task, ended = seed + 1, None, False
                if real:
                    env.rest()
                    obs = None
                else:
                    obs, info = env.reset(seed=seed, options=scene)
                runner.arms.clear()
            if line and line != "new":
                try:
                    policy.tokenizer.prompt(line)  # complain about the words before anything moves
                    if obs is None:
                        obs, info = env.reset(options={"task": line})
                    elif hasattr(env, "instruct"):
                        obs = env.instruct(line)
                    print(f"step {info['steps']:3d}  {'no, ' if task else ''}{line}", flush=True)
                    task, ended, said, due = line, False, None, max(due, time.perf_counter())
                    for arm in runner.arms.values():
                        arm.listen(None)  # also when the words are the same again
                except ValueError as error:
                    print(error, flush=True)
            if task:
                actions, (reasoning,) = runner(batch_of_one(obs, policy, task=task))
                if reasoning != said and runner.arms[0].states is not None:
                    print(f"step {info['steps']:3d}  <reason> {reasoning} </reason>", flush=True)
                    said = reasoning
                if viewer is None:
                    frames.append(
                        draw_frame(
                            env,
                            cameras,
                            task,
                            reasoning,
                            (),
                            "" if runner.arms[0].log[-1][1] else "(waiting)",
                        )
                    )
                with viewer.lock() if viewer else contextlib.nullcontext():
                    obs, _, terminated, truncated, info = env.step(actions[0, 0])
                ended = terminated or truncated
                if ended:
                    print(f"step {info['steps']:3d}  {'done' if terminated else 'out of time'}", flush=True)
                    task = None
                due = max(
                    due + 1 / sim_env.FPS, time.perf_counter() - 1
                )  # late steps are caught up with, but no more than a second
                wait_until(due)
            if viewer:
                viewer.sync()
    if frames:
        print(f"wrote {save_film(list(frames), cfg, 'conversation')}.gif and .png")
    if viewer:
        viewer.close()
    env.close()


def open_viewer(env):
    """MuJoCo's window on a simulated arm where there is a display, else None."""
    if not hasattr(env, "model") or not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform in ("darwin", "win32")
    ):
        return None
    import mujoco.viewer

    try:
        return mujoco.viewer.launch_passive(env.model, env.data)
    except RuntimeError as error:  # macOS wants the program started by mjpython
        print(f"no window ({error}); there will be a film instead")
