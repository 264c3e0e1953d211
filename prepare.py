"""Everything that happens once, before training: demonstrations and questions, made in simulation by parallel processes.

    python prepare.py --config small             # writes data/small: 3 families of demonstrations, start episodes, questions

Work is cut into shards, each a file under <out>/parts written in one go: after a kill the same command goes on where it
stopped. A shard depends on its seeds alone, so the result is bit-identical whatever the number of processes. The layout of
the finished folder is described in data.py.
"""

import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import sim_env
from data import statistics
from model import opt, parse_config
from sim_env import CAMERAS, COLOURS, FPS, HELD_OUT_SUMS, MOTORS, SEEDS, VAGUE_NAMES, SO100Env, demonstrate, number_of, random_task


FIRST_SEED = {"demo": 0, "start": 200_000, "questions": 400_000}  # kinds never share a scene


@dataclass
class PrepareConfig:
    config: str = opt("small", "preset")
    out: str = opt("", "data set folder (default data/<config>)")
    families: str = opt("place,calculate,sequence", "task families to demonstrate")
    demos: int = opt(600, "demonstrations per family")
    starts: int = opt(2000, "start episodes per family: amid work, any arm pose, some cubes on pads, a few steps only")
    start_steps: int = opt(6, "length of a start episode, control steps")
    scenes: int = opt(26000, "pictures with questions for training; 0 for none")
    held_out_scenes: int = opt(300, "pictures with questions never trained on")
    image_size: int = opt(96, "pixels per side")
    randomise: float = opt(1.0, "strength of the randomisation of colours, light, cameras, friction, sizes, poses; 0 for none")
    workers: int = opt(0, "processes; 0 for one per core")
    seed: int = opt(0, "first seed of the training range")

    def __post_init__(self):
        self.out = self.out or f"data/{self.config}"
        if unknown := set(self.families.split(",")) - {*sim_env.FAMILIES, "tiny"}:
            raise ValueError(f"unknown family {', '.join(sorted(unknown))}; choose from {', '.join(sim_env.FAMILIES)}, tiny")
        if min(self.demos, self.starts, self.scenes, self.held_out_scenes) < 0 or self.demos + self.starts == 0:
            raise ValueError("demos, starts, scenes and held_out_scenes count things: 0 or more, and demos + starts at least 1")
        if self.workers < 0 or self.start_steps < 1 or not 8 <= self.image_size <= 1024:
            raise ValueError("workers must be 0 or more, start_steps at least 1, image_size between 8 and 1024")
        counts = {"demo": self.demos, "start": self.starts, "questions": self.scenes}
        for (kind, count), room in zip(counts.items(), (200_000, 200_000, 600_000)):
            if self.seed < 0 or count > room or self.seed + FIRST_SEED[kind] + count > len(SEEDS["train"]):
                raise ValueError(f"--seed={self.seed} with {count} {kind} scenes leaves the training seeds 0 .. {len(SEEDS['train']) - 1}; choose less")


PRESETS = {
    "debug": dict(families="place", demos=2, starts=2, start_steps=4, scenes=8, held_out_scenes=2, image_size=32, workers=1),
    "tiny": dict(families="tiny", demos=150, starts=300, scenes=0, held_out_scenes=0),
    "small": dict(),
}
SHARD = {"demo": 10, "start": 50, "questions": 100, "questions_val": 100}  # items per file

# ---------------------------------------------------------------------------------------------------------------
# Questions about a scene


def questions(scene, rng):
    """Questions with answers about SO100Env.scene() -> list of [kind, question, answer]. Kinds are what the held-out test reports."""
    cubes, pads = scene["cubes"], scene["pads"]
    ask = lambda long, short: long if rng.random() < 0.4 else short
    items = [["where", ask(f"where is the {c['colour']} cube", f"{c['colour']} cube"), f"{c['t']} {c['r']}"] for c in cubes]
    items += [["pad", ask(f"which pad is {p['colour']}", f"{p['colour']} pad"), f"pad {p['number']} at {p['t']}"] for p in pads]
    # Naming things by place needs no binding of words to colours, so it is learnt first and carries the rest.
    items.append(["describe pads", "describe the pads", " ".join(p["colour"] for p in pads)])
    by_direction = {c["t"]: c["colour"] for c in sorted(cubes, key=lambda c: -c["distance"])}  # the nearest one hides the others
    items.append(["describe cubes", "describe the cubes", " ".join(by_direction.get(f"t{i}", "none") for i in range(12))])
    pad = pads[rng.integers(len(pads))]
    items.append(["pad colour", f"what colour is pad {pad['number']}", pad["colour"]])
    items.append(["count", "how many cubes are there", str(len(cubes))])
    one, two = (cubes[i] for i in rng.permutation(len(cubes))[:2])
    near = min((one, two), key=lambda c: c["distance"])
    items.append(["nearer", f"which is nearer , the {one['colour']} cube or the {two['colour']} cube", near["colour"]])
    left = [c for c in cubes if c["x"] < one["x"]]  # left in the front picture
    answer = max(left, key=lambda c: c["x"])["colour"] if left else "none"
    items.append(["left of", f"what colour is the cube left of the {one['colour']} cube", answer])
    for _ in range(2):
        expression = random_sum(rng)
        items.append(["sum", f"what is {expression}", str(number_of(expression))])
    colour = COLOURS[rng.integers(len(COLOURS))]
    name = str(rng.choice(VAGUE_NAMES[colour]))
    items.append(["looks like", f"what colour is {name}", f"{name} is {colour}"])
    for family in ("place", "place", "calculate", "sequence", "sequence", "sequence"):
        task, reason = random_task(scene, family, rng)
        items.append(["instruction", "<task> " + (garble(task, rng) if rng.random() < 0.2 else task), reason])
    return items


def random_sum(rng):
    """Any sum or difference of digits with a result of 0 or more, except the held-out ones."""
    while True:
        a, b = rng.integers(10, size=2)
        expression = f"{a} + {b}" if rng.random() < 0.5 else f"{max(a, b)} - {min(a, b)}"
        if expression not in HELD_OUT_SUMS:
            return expression


FILLER = {*sim_env.VERBS, "on", "onto", "top", "of", "to", "goes", "gets", "please", "now", "robot"}


def garble(task, rng):
    """Replace words that carry no meaning by made-up ones: a model that meets only known words breaks at the first new one."""

    def made_up():
        return "".join(rng.choice(list("bcdfghklmnprstvw")) + rng.choice(list("aeiou")) for _ in range(rng.integers(2, 4)))

    return " ".join(made_up() if word in FILLER and rng.random() < 0.5 else word for word in task.split())


# ---------------------------------------------------------------------------------------------------------------
# Shards


def shards(cfg):
    """Every piece of work as (kind, family, first seed, number of items), in the order in which the data set holds them."""
    plan = []
    families = cfg.families.split(",")
    for kind, count in (("demo", cfg.demos), ("start", cfg.starts), ("questions", cfg.scenes), ("questions_val", cfg.held_out_scenes)):
        first = SEEDS["val"][0] if kind == "questions_val" else cfg.seed + FIRST_SEED[kind]
        for family in families if kind in ("demo", "start") else ("sequence",):  # sequence scenes have two cubes or more
            plan += [(kind, family, first + i, min(SHARD[kind], count - i)) for i in range(0, count, SHARD[kind])]
    return plan


def shard_path(cfg, shard):
    kind, family, first, n = shard
    return Path(cfg.out) / "parts" / f"{kind}_{family}_{first:07d}_{n}.npz"


def make_shard(job):
    """One shard: simulate its seeds, write its file. -> (number of items, Counter of failures)."""
    cfg, shard = job
    kind, family, first, n = shard
    env = SO100Env(px=cfg.image_size, randomise=cfg.randomise)
    try:
        if kind in ("demo", "start"):
            records, failures = make_episodes(env, cfg, *shard)
        else:
            records, failures = make_questions(env, *shard), Counter()
    finally:
        env.close()
    path = shard_path(cfg, shard)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with open(temporary, "wb") as f:
        np.savez(f, **records)
    os.replace(temporary, path)
    return n, failures


def make_episodes(env, cfg, kind, family, first, n):
    """Demonstrations (with noise and recoveries) or start episodes of n seeds; failed demonstrations are counted and left out."""
    frames, episodes, failures = {name: [] for name in (*CAMERAS, "state", "action")}, [], Counter()
    for seed in range(first, first + n):
        demo = demonstrate(env, seed, family, start=kind == "start", limit=cfg.start_steps if kind == "start" else None)
        if kind == "demo" and not demo["success"]:
            failures[f"{family}: {demo['failure']}"] += 1
            continue
        said = demo["reasons"]
        changes = [0] + [i for i in range(1, len(said)) if said[i] != said[i - 1]]
        episodes.append({"length": len(said), "task": demo["task"], "reason": [[i, said[i]] for i in changes], "success": bool(demo["success"]),
                         "seed": seed, "family": family, "kind": kind, "disturbed": demo["disturbed"]})  # fmt: skip
        for view, camera in enumerate(CAMERAS):
            frames[camera].append(demo["images"][:, view])
        frames["state"].append(demo["states"])
        frames["action"].append(demo["actions"].astype(np.float32))
    records = {name: np.concatenate(parts) for name, parts in frames.items()} if episodes else {}
    return records | {"info": json.dumps(episodes), "failures": json.dumps(failures)}, failures


def make_questions(env, kind, family, first, n):
    """Pictures of n random scenes in random arm poses, with their questions."""
    frames, texts = {camera: [] for camera in CAMERAS}, []
    for seed in range(first, first + n):
        obs, _ = env.reset(seed=seed, options={"family": family, "split": "id", "start": True})
        for camera in CAMERAS:
            frames[camera].append(obs["images"][camera])
        texts.append(questions(env.scene(), np.random.default_rng([7, seed])))
    return {camera: np.stack(images) for camera, images in frames.items()} | {"info": json.dumps(texts), "failures": "{}"}


# ---------------------------------------------------------------------------------------------------------------
# Merging


def write_arrays(folder, paths, names):
    """Concatenate arrays over shards straight into .npy files, one shard in memory at a time."""
    sizes = {}
    for path in paths:
        with np.load(path) as shard:
            if names[0] in shard:
                sizes[path] = {name: (shard[name].shape, shard[name].dtype) for name in names}
    files = {}
    for name in names:
        total = sum(s[name][0][0] for s in sizes.values())
        shape, dtype = next(iter(sizes.values()))[name]
        files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(total, *shape[1:]))
    at = 0
    for path in sizes:
        with np.load(path) as shard:
            for name in names:
                files[name][at : at + len(shard[name])] = shard[name]
            at += len(shard[names[0]])
    for file in files.values():
        file.flush()
    return files


def merge(cfg):
    """Shards -> the finished folder; meta.json comes last, so its presence means that the data set is whole."""
    out, plan = Path(cfg.out), shards(cfg)
    common = {"cameras": list(CAMERAS), "motors": list(MOTORS), "fps": FPS, "image_size": cfg.image_size, "made_by": {"program": "prepare.py", **asdict(cfg)}}
    for name in ("questions", "questions_val"):
        paths = [shard_path(cfg, s) for s in plan if s[0] == name]
        if paths:
            (out / name).mkdir(exist_ok=True)
            write_arrays(out / name, paths, CAMERAS)
            texts = list(itertools.chain.from_iterable(json.loads(str(np.load(p)["info"])) for p in paths))
            (out / name / "questions.json").write_text(json.dumps(texts))
            (out / name / "meta.json").write_text(json.dumps(common, indent=1))
    paths = [shard_path(cfg, s) for s in plan if s[0] in ("demo", "start")]
    files = write_arrays(out, paths, (*CAMERAS, "state", "action"))
    episodes = list(itertools.chain.from_iterable(json.loads(str(np.load(p)["info"])) for p in paths))
    failures = sum((Counter(json.loads(str(np.load(p)["failures"]))) for p in paths), Counter())
    at = 0
    for episode in episodes:
        episode["start"], at = at, at + episode["length"]
    meta = common | {"statistics": {name: statistics(files[name]) for name in ("state", "action")}, "failures": failures, "episodes": episodes}
    temporary = out / "meta.json.tmp"
    temporary.write_text(json.dumps(meta, indent=1))
    os.replace(temporary, out / "meta.json")
    shutil.rmtree(out / "parts")
    return meta


def main(argv=None):
    cfg = parse_config(PrepareConfig, PRESETS, sys.argv[1:] if argv is None else argv)
    out = Path(cfg.out)
    if (out / "meta.json").is_file():
        print(f"error: {out} already holds a data set; delete it or choose another --out", file=sys.stderr)
        raise SystemExit(2)
    began = time.time()
    (out / "parts").mkdir(parents=True, exist_ok=True)
    settings = json.dumps({k: v for k, v in asdict(cfg).items() if k != "workers"})
    saved = out / "parts" / "settings.json"
    if saved.is_file() and saved.read_text() != settings:
        print(f"error: {out} holds parts made with other settings; delete it or choose another --out", file=sys.stderr)
        raise SystemExit(2)
    saved.write_text(settings)
    plan = shards(cfg)
    todo = [s for s in plan if not shard_path(cfg, s).is_file()]
    if len(todo) < len(plan):
        print(f"going on: {len(plan) - len(todo)} of {len(plan)} shards are there already")
    workers = cfg.workers or os.cpu_count()
    try:
        with multiprocessing.Pool(workers) as pool, tqdm(total=sum(s[3] for s in todo), unit="episode", disable=not sys.stderr.isatty()) as bar:
            for n, _ in pool.imap_unordered(make_shard, [(cfg, s) for s in todo]):
                bar.update(n)
    except RuntimeError as e:  # no GL library
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    meta = merge(cfg)
    kinds = Counter(f"{e['family']} {e['kind']}" for e in meta["episodes"])
    frames = sum(e["length"] for e in meta["episodes"])
    print(f"{out}: {frames} frames; " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()) + f"; {cfg.scenes} + {cfg.held_out_scenes} pictures with questions")
    print(f"failed demonstrations: {dict(meta['failures']) or 'none'}; {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
