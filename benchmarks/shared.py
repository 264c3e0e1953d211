"""What the adapters of benchmarks share: drawing, scripted demonstrations as a data set, evaluation of a run.

An adapter (metaworld.py, libero.py) brings an environment of the contract in docs/environments.md, a function
that demonstrates a task, and a Bench that names both. Read it in this order: Bench, making a data set,
evaluation, motion phrases.
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from common import (
    UserError,
    atomic_path,
    check_options,
    claim_folder,
    fast_cpu,
    opt,
    read_json,
    write_json,
)
from data import statistics
from evaluate import Episode, VecEnv, percent, policy_fn, run_episodes, wilson
from model import load_policy
from prepare import in_parallel, read_parts, write_array
from sim_env import GL_HELP, SEEDS, mujoco


@dataclass(frozen=True)
class Bench:
    """What an adapter tells this file."""

    program: str  # the adapter's file, which claims the folders of its data sets
    env: type  # the environment's class
    spec: str  # its name, as --env takes it
    # (environment, task, seed, reasoning) -> arrays of an episode and its entry in meta.json
    demonstrate: Callable[[Any, str, int, str], tuple[dict[str, ndarray], dict]]


REASONING = ("none", "phrases", "places")  # what demonstrations can say


@dataclass
class BenchConfig:
    """The options of an adapter's two programs."""

    config: str = opt("", "there are no presets here", ("",))
    work: str = opt("demonstrate", "demonstrate or evaluate; a word without --", ("demonstrate", "evaluate"))
    out: str = opt("", "data set folder to make", needs="work=demonstrate")
    demos: int = opt(50, "successful demonstrations per task", "[1, 10000]", "work=demonstrate")
    image_size: int = opt(96, "pixels per side", "[8, 1024]", "work=demonstrate")
    reasoning: str = opt(
        "none",
        "what demonstrations say: `move left and down`, or where things are",
        REASONING,
        "work=demonstrate",
    )
    run: str = opt("", "run folder to evaluate", needs="work=evaluate")
    episodes: int = opt(10, "episodes per task", f"[1, {len(SEEDS['report'])}]", "work=evaluate")
    seeds: str = opt("report", "scenes; val: to choose between runs", ("report", "val"), "work=evaluate")
    arms: int = opt(4, "environments that play at once", "[1, 1000]", "work=evaluate")
    threads: int = opt(0, "CPU threads of the policy; 0 lets torch choose", "[0, 1024]", "work=evaluate")
    workers: int = opt(2, "processes that simulate", "[1, 1024]")

    def __post_init__(self):
        check_options(self)
        if self.work == "evaluate" and not self.run:
            raise UserError("say which run to evaluate: --run=FOLDER")


def make_renderer(model: Any, px: int) -> Any:
    """What draws a MuJoCo model in (px, px), without shadows, reflections and oversampling.

    In software these take most of the time: 65 ms a picture of Meta-World with them, 6 ms without.
    """
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
    try:
        renderer = mujoco.Renderer(model, px, px)
    except (RuntimeError, ImportError, AttributeError, mujoco.FatalError) as error:
        raise UserError(GL_HELP.format(error)) from error
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = False
    return renderer


# -----------------------------------------------------------------------------------------------------------
# A data set. Each task is a file under <out>/parts, which appears when it is whole; so a killed run goes on.

HOPELESS = 5  # failures before the first success, after which a task is left out


def part_path(cfg: BenchConfig, name: str) -> Path:
    """The file of a task's demonstrations."""
    return Path(cfg.out, "parts", f"{name}.npz")


def make_part(bench: Bench, cfg: BenchConfig, name: str) -> None:
    """The demonstrations of one task -> its file. Runs in a process of the pool."""
    pieces = defaultdict(list)
    entries = []
    failed = Counter()
    env = bench.env(px=cfg.image_size)
    seed = SEEDS["train"].start
    # Seeds go on until enough episodes have succeeded, so a part does not depend on the others.
    while len(entries) < cfg.demos:
        arrays, entry = bench.demonstrate(env, name, seed, cfg.reasoning)
        seed += 1
        if not entry["success"]:
            failed[name] += 1
            if failed[name] > 10 + cfg.demos or (failed[name] == HOPELESS and not entries):
                # A task that the script cannot do must not stop the others; merge_parts() tells.
                break
            # A failed episode would teach the failure.
            continue
        entries.append(entry)
        for key, array in arrays.items():
            pieces[key].append(array)
    env.close()
    # A part of a hopeless task has no arrays, only its failures.
    joined = {key: np.concatenate(found) for key, found in pieces.items()}  # (frames, ...)
    with atomic_path(part_path(cfg, name)) as temporary, open(temporary, "wb") as file:
        np.savez(file, **joined, info=json.dumps(entries), left_out=json.dumps(failed))


def make_parts(bench: Bench, cfg: BenchConfig) -> None:
    """Make the files that are not there yet, in parallel."""
    names = cfg.names()
    missing = [name for name in names if not part_path(cfg, name).is_file()]
    if len(missing) < len(names):
        print(f"going on: {len(names) - len(missing)} of {len(names)} tasks are there already")
    in_parallel(partial(make_part, bench, cfg), missing, cfg.workers, "task")


def merge_parts(bench: Bench, cfg: BenchConfig) -> None:
    """The files of all tasks -> arrays in <out>, and last meta.json: it means that the data set is whole."""
    out = Path(cfg.out)
    parts, infos, failed = read_parts([part_path(cfg, name) for name in cfg.names()])
    episodes = sum(infos, [])
    if not episodes:
        # No array could be written, and no statistics computed.
        raise UserError(f"not one scripted episode succeeded ({dict(failed)}); choose other --tasks")
    # Tasks are merged in the order of the benchmark, whichever was ready first.
    frames = 0
    for episode in episodes:
        episode["start"] = frames
        frames += episode["length"]
    arrays = {}
    for key in (*bench.env.cameras, "state", "action"):
        arrays[key] = write_array(out / f"{key}.npy", parts, [...] * len(parts), frames)
    meta = {
        "cameras": list(bench.env.cameras),
        "motors": list(bench.env.motors),
        "state": list(bench.env.state),
        "fps": bench.env.fps,
        "image_size": cfg.image_size,
        "made_by": {"program": bench.program} | cfg.settings(),
        "statistics": {key: statistics(arrays[key]) for key in ("state", "action")},
        "failures": failed,
        "episodes": episodes,
    }
    write_json(out / "meta.json", meta)
    tried = len(episodes) + failed.total()
    print(f"{out}: {frames} frames of {len(episodes)} episodes")
    print(f"{len(episodes)} of {tried} scripted episodes succeeded; failed: {dict(failed) or 'none'}")
    made = Counter(episode["name"] for episode in episodes)
    short = {name: made[name] for name in cfg.names() if made[name] < cfg.demos}
    if short:
        print(f"tasks with fewer demonstrations than {cfg.demos}, for the script fails there: {short}")


def make_data_set(bench: Bench, cfg: BenchConfig) -> None:
    """Demonstrations of all tasks -> a data set, or the rest of one that was begun."""
    out = Path(cfg.out)
    if (out / "meta.json").is_file():
        raise UserError(f"{out} already holds a data set; delete it or choose another --out")
    claim_folder(out, bench.program, create=True)
    saved = out / "parts" / "settings.json"
    # Parts of two kinds in one set would be a mixture that its meta.json does not tell.
    if saved.is_file() and read_json(saved) != cfg.settings():
        raise UserError(f"{out} holds parts made with other settings; delete it or choose another --out")
    write_json(saved, cfg.settings())
    make_parts(bench, cfg)
    merge_parts(bench, cfg)
    # Only now: until meta.json is there, a killed run still needs its parts.
    shutil.rmtree(out / "parts")


# -----------------------------------------------------------------------------------------------------------
# Evaluation


def play(bench: Bench, cfg: BenchConfig, title: str) -> list[Episode]:
    """Episodes of a run on the first scenes of a range of seeds, task by task; the family is the task."""
    fast_cpu(cfg.threads)
    policy = load_policy(cfg.run)
    # One task after the other: an arm that changes its task loads another model, which takes a while.
    jobs = []
    # Every policy plays the same scenes, from the first one on.
    for name in cfg.names():
        for seed in SEEDS[cfg.seeds][: cfg.episodes]:
            jobs.append(Episode(seed, {"family": name, "split": "id"}))
    ended = Counter()

    def tell(episode: Episode) -> None:
        ended[episode.success] += 1
        if ended.total() % 50 == 0:
            print(f"{ended.total()} of {len(jobs)} episodes, {ended[True]} succeeded", flush=True)

    arms = min(cfg.arms, len(jobs))
    with VecEnv(arms, cfg.workers, bench.spec, policy.cfg.image_size) as vec:
        run_episodes(vec, jobs, policy_fn(policy, bench.spec), title, on_end=tell)
    return jobs


def count(episodes: Sequence[Episode], limit: int) -> dict[str, float]:
    """Success of some episodes within so many control steps, with its 95 % Wilson interval."""
    won = sum(episode.success and episode.steps <= limit for episode in episodes)
    low, high = wilson(won, len(episodes))
    return {"success": won / len(episodes), "n": len(episodes), "low": low, "high": high}


def table_row(name: str, success: str, n: Any, interval: str, more: str = "") -> str:
    """A line of a table of success."""
    return f"{name:<34} {success:>9} {n:>5} {interval:>15} {more:>12}".rstrip()


def count_row(name: str, cell: dict[str, float], more: str = "") -> str:
    """The same for what count() gives."""
    interval = f"{percent(cell['low'])} - {percent(cell['high'])}"
    return table_row(name, percent(cell["success"]), cell["n"], interval, more)


# -----------------------------------------------------------------------------------------------------------
# Motion phrases: words for what the hand does next, as reasoning to learn

PHRASE_STEPS = 6  # control steps that a phrase looks ahead
STILL = 0.006  # metres: a hand that moves less in so many steps stands still


def motion_phrases(hand: ndarray, closing: ndarray, directions: Sequence) -> list[list]:
    """Words for what the hand does next -> [[first step, phrase], ...], as meta.json keeps reasoning.

    hand (n, 4): x, y, z in metres and opening, 0 to 1, of an episode; closing (n,): is the gripper told to
    close. directions: for x, y and z what less and more of it is called. The phrases are like those of RT-H
    (Belkhale et al. 2024, arXiv:2403.01823): grasp, let go, lift, move left and down, stay.
    """
    reasons = []
    last = len(hand) - 1
    for step in range(len(hand)):
        # Looking ahead smooths the noise of single steps.
        change = hand[min(step + PHRASE_STEPS, last)] - hand[step]  # (4,)
        holding = closing[step] and hand[step, 3] < 0.9
        phrase = name_motion(change, holding, directions)
        # At the end of an episode there is nothing to look at: the phrase before goes on.
        if step > last - PHRASE_STEPS // 2 and reasons:
            break
        if not reasons or phrase != reasons[-1][1]:
            reasons.append([step, phrase])
    return reasons


def name_motion(change: ndarray, holding: bool, directions: Sequence) -> str:
    """The phrase for a change (4,) of hand xyz in metres and opening."""
    if abs(change[3]) > 0.1:
        return "let go" if change[3] > 0 else "grasp"
    size = np.abs(change[:3])  # (3,)
    if size.max() < STILL:
        return "stay"
    if holding and change[2] == size.max():
        return "lift"
    words = []
    for axis in np.argsort(-size):  # the largest first
        # A second direction is worth a word where it has more than half of the first one's length.
        if size[axis] > size.max() / 2:
            words.append(directions[axis][int(change[axis] > 0)])
    return f"move {' and '.join(words[:2])}"
