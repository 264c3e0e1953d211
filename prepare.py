"""Everything that happens once, before training: demonstrations and questions, simulated or brought along.

    python prepare.py --config small                                        # simulate: data/small
    python prepare.py --lerobot=lerobot/svla_so100_pickplace --out=data/mine --cameras=front=top,wrist=wrist
    python prepare.py --questions_from=HuggingFaceM4/the_cauldron/ai2d --out=data/mine     # adds data/mine/questions
    python prepare.py --export=data/small --out=lerobot_small               # a LeRobot data set (v3.0)

Parallel processes work on shards, each a file under <out>/parts written in one go: after a kill the same command goes on
where it stopped. A shard depends on its seeds or its source alone, so the result is bit-identical whatever the number of
processes. The layout of the finished folder is described in data.py.
"""

import errno
import functools
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import sim_env
from data import statistics
from model import opt, parse_config
from sim_env import (
    CAMERAS,
    COLOURS,
    FPS,
    HELD_OUT_SUMS,
    MOTORS,
    SEEDS,
    VAGUE_NAMES,
    SO100Env,
    demonstrate,
    number_of,
    random_task,
    square,
)


FIRST_SEED = {"demo": 0, "start": 200_000, "questions": 400_000}  # kinds never share a scene


@dataclass
class PrepareConfig:
    config: str = opt("small", "preset")
    out: str = opt("", "data set folder (default data/<config>)")
    families: str = opt("place,calculate,sequence", "task families to demonstrate")
    demos: int = opt(600, "demonstrations per family")
    starts: int = opt(
        2000, "start episodes per family: amid work, any arm pose, some cubes on pads, a few steps only"
    )
    start_steps: int = opt(6, "length of a start episode, control steps")
    scenes: int = opt(26000, "pictures with questions for training; 0 for none")
    held_out_scenes: int = opt(300, "pictures with questions never trained on")
    image_size: int = opt(96, "pixels per side")
    randomise: float = opt(
        1.0, "strength of the randomisation of colours, light, cameras, friction, sizes, poses; 0 for none"
    )
    lerobot: str = opt("", "LeRobot data set to read instead of simulating: a folder or a name on the hub")
    cameras: str = opt(
        "",
        "role=camera,... of --lerobot, as in front=observation.images.top or front=top; default: every camera by its own name",
    )
    fps: int = opt(0, "frames per second to keep of --lerobot, a divisor of its own; 0 for all")
    fit: str = opt(
        "stretch",
        "how a brought picture becomes square: stretch (all is seen), crop (the middle, in proportion)",
    )
    convention: str = opt(
        "auto",
        "joint angles of --lerobot from an SO arm: auto | new | old (zero: arm stretched out) | percent (-100..100; needs --calibration)",
    )
    calibration: str = opt(
        "", "LeRobot's calibration file of the arm that recorded, for --convention=percent"
    )
    questions_from: str = opt(
        "",
        "image-text sets with columns images and texts, separated by commas: folders, or names on the hub with or without /PART",
    )
    longest: int = opt(300, "characters of a brought question or answer; longer ones are left out")
    export: str = opt("", "data set folder to write to --out as a LeRobot data set")
    video: str = opt("", "codec of --export: h264 | av1; default PNG pictures, without loss")
    workers: int = opt(0, "processes; 0 for one per core")
    seed: int = opt(0, "first seed of the training range; for --questions_from, the choice of pictures")

    def __post_init__(self):
        if not self.out and (self.lerobot or self.questions_from or self.export):
            raise ValueError("say where the result goes: --out=" + ("FOLDER" if self.export else "data/NAME"))
        if self.export and (self.lerobot or self.questions_from):
            raise ValueError(
                "--export writes a finished data set; read the other one in a command of its own"
            )
        choices = {
            "fit": ("stretch", "crop"),
            "convention": ("auto", "new", "old", "percent"),
            "video": ("", "h264", "av1"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(filter(None, allowed))}, not {getattr(self, name)!r}"
                )
        if (self.convention == "percent") != bool(self.calibration):
            raise ValueError(
                "--convention=percent and --calibration=FILE go together: the file says how many degrees 100 % are"
            )
        self.out = self.out or f"data/{self.config}"
        if unknown := set(self.families.split(",")) - {*sim_env.FAMILIES, "tiny"}:
            raise ValueError(
                f"unknown family {', '.join(sorted(unknown))}; choose from {', '.join(sim_env.FAMILIES)}, tiny"
            )
        if (
            min(self.demos, self.starts, self.scenes, self.held_out_scenes) < 0
            or self.demos + self.starts == 0
        ):
            raise ValueError(
                "demos, starts, scenes and held_out_scenes count things: 0 or more, and demos + starts at least 1"
            )
        if (
            min(self.workers, self.fps) < 0
            or min(self.start_steps, self.longest) < 1
            or not 8 <= self.image_size <= 1024
        ):
            raise ValueError(
                "workers and fps must be 0 or more, start_steps and longest at least 1, image_size between 8 and 1024"
            )
        counts = {"demo": self.demos, "start": self.starts, "questions": self.scenes}
        for (kind, count), room in zip(counts.items(), (200_000, 200_000, 600_000)):
            if self.seed < 0 or count > room or self.seed + FIRST_SEED[kind] + count > len(SEEDS["train"]):
                raise ValueError(
                    f"--seed={self.seed} with {count} {kind} scenes leaves the training seeds 0 .. {len(SEEDS['train']) - 1}; choose less"
                )


PRESETS = {
    "debug": dict(
        families="place",
        demos=2,
        starts=2,
        start_steps=4,
        scenes=8,
        held_out_scenes=2,
        image_size=32,
        workers=1,
    ),
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
    items = [
        ["where", ask(f"where is the {c['colour']} cube", f"{c['colour']} cube"), f"{c['t']} {c['r']}"]
        for c in cubes
    ]
    items += [
        ["pad", ask(f"which pad is {p['colour']}", f"{p['colour']} pad"), f"pad {p['number']} at {p['t']}"]
        for p in pads
    ]
    # Naming things by place needs no binding of words to colours, so it is learnt first and carries the rest.
    items.append(["describe pads", "describe the pads", " ".join(p["colour"] for p in pads)])
    by_direction = {
        c["t"]: c["colour"] for c in sorted(cubes, key=lambda c: -c["distance"])
    }  # the nearest one hides the others
    items.append(
        [
            "describe cubes",
            "describe the cubes",
            " ".join(by_direction.get(f"t{i}", "none") for i in range(12)),
        ]
    )
    pad = pads[rng.integers(len(pads))]
    items.append(["pad colour", f"what colour is pad {pad['number']}", pad["colour"]])
    items.append(["count", "how many cubes are there", str(len(cubes))])
    one, two = (cubes[i] for i in rng.permutation(len(cubes))[:2])
    near = min((one, two), key=lambda c: c["distance"])
    items.append(
        ["nearer", f"which is nearer , the {one['colour']} cube or the {two['colour']} cube", near["colour"]]
    )
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
        return "".join(
            rng.choice(list("bcdfghklmnprstvw")) + rng.choice(list("aeiou"))
            for _ in range(rng.integers(2, 4))
        )

    return " ".join(made_up() if word in FILLER and rng.random() < 0.5 else word for word in task.split())


# ---------------------------------------------------------------------------------------------------------------
# Shards


def shards(cfg):
    """Every piece of simulation as (kind, family, first seed, number of items), in the order in which the data set holds them."""
    plan = []
    families = cfg.families.split(",")
    for kind, count in (
        ("demo", cfg.demos),
        ("start", cfg.starts),
        ("questions", cfg.scenes),
        ("questions_val", cfg.held_out_scenes),
    ):
        first = SEEDS["val"][0] if kind == "questions_val" else cfg.seed + FIRST_SEED[kind]
        for family in (
            families if kind in ("demo", "start") else ("sequence",)
        ):  # sequence scenes have two cubes or more
            plan += [
                (kind, family, first + i, min(SHARD[kind], count - i)) for i in range(0, count, SHARD[kind])
            ]
    return plan


def shard_path(cfg, shard):
    kind, family, first, n = shard
    return Path(cfg.out) / "parts" / f"{kind}_{family}_{first:07d}_{n}.npz"


@contextmanager
def whole(path):
    """A temporary path to write to; the file takes its own name once it is complete, and is gone if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_shard(job):
    """One shard: simulate its seeds or read its part of `source` (None: simulation), write its file. -> number of items."""
    cfg, shard, source = job
    kind, family, first, n = shard
    if kind == "lerobot":
        records, failures = read_episodes(cfg, source), Counter()
    elif source is not None:
        records, failures = read_texts(cfg, source, first, n)
    else:
        env = SO100Env(px=cfg.image_size, randomise=cfg.randomise)
        try:
            records, failures = (
                make_episodes(env, cfg, *shard)
                if kind in ("demo", "start")
                else (make_questions(env, *shard), Counter())
            )
        finally:
            env.close()
    with whole(shard_path(cfg, shard)) as temporary, open(temporary, "wb") as f:
        np.savez(f, **records, failures=json.dumps(failures))
    return n


def make_episodes(env, cfg, kind, family, first, n):
    """Demonstrations (with noise and recoveries) or start episodes of n seeds; failed demonstrations are counted and left out."""
    frames, episodes, failures = {name: [] for name in (*CAMERAS, "state", "action")}, [], Counter()
    for seed in range(first, first + n):
        demo = demonstrate(
            env, seed, family, start=kind == "start", limit=cfg.start_steps if kind == "start" else None
        )
        if kind == "demo" and not demo["success"]:
            failures[f"{family}: {demo['failure']}"] += 1
            continue
        said = demo["reasons"]
        changes = [0] + [i for i in range(1, len(said)) if said[i] != said[i - 1]]
        episodes.append(
            {
                "length": len(said),
                "task": demo["task"],
                "reason": [[i, said[i]] for i in changes],
                "success": bool(demo["success"]),
                "seed": seed,
                "family": family,
                "kind": kind,
                "disturbed": demo["disturbed"],
            }
        )
        for view, camera in enumerate(CAMERAS):
            frames[camera].append(demo["images"][:, view])
        frames["state"].append(demo["states"])
        frames["action"].append(demo["actions"].astype(np.float32))
    records = {name: np.concatenate(parts) for name, parts in frames.items()} if episodes else {}
    return records | {"info": json.dumps(episodes)}, failures


def make_questions(env, kind, family, first, n):
    """Pictures of n random scenes in random arm poses, with their questions."""
    frames, texts = {camera: [] for camera in CAMERAS}, []
    for seed in range(first, first + n):
        obs, _ = env.reset(seed=seed, options={"family": family, "split": "id", "start": True})
        for camera in CAMERAS:
            frames[camera].append(obs["images"][camera])
        texts.append(questions(env.scene(), np.random.default_rng([7, seed])))
    return {camera: np.stack(images) for camera, images in frames.items()} | {"info": json.dumps(texts)}


# ---------------------------------------------------------------------------------------------------------------
# What others recorded: folders, the hub, optional packages


def package(name, pip=None):
    """A package that only some users need, or a ValueError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"this needs a package that is not there; type: pip install {pip or name.split('.')[0]}"
        ) from None


def fetch(name, patterns):
    """A folder as it is, or the matching files of a data set on the hub (its cache resumes a broken download) -> folder."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(
            f"there is no folder {name}, and a name on the hub looks like lerobot/svla_so100_pickplace"
        )
    hub = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (hub.errors.RepositoryNotFoundError, hub.errors.HFValidationError):
        raise FileNotFoundError(
            f"there is no folder {name}, nor a public data set of that name on the hub; for a private one type: hf auth login"
        ) from None
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as e:
        if getattr(e, "errno", None) == errno.ENOSPC:
            raise
        raise ValueError(
            f"the hub cannot be reached for {name} (is there a network?); run again to go on, or give a folder that holds the data set"
        ) from None


def read_parquet(path, **choice):
    """pyarrow.parquet.read_table with errors of one line."""
    pq = package("pyarrow.parquet")
    try:
        return pq.read_table(path, **choice)
    except (ValueError, OSError, KeyError) as e:  # pyarrow's own errors are ValueErrors and OSErrors
        raise ValueError(
            f"{path} cannot be read ({str(e).splitlines()[0][:200]}); it is missing or damaged: download it again"
        ) from None


SHARD_BYTES = 1 << 26  # pictures in a file of brought or exported episodes, about


def groups(lengths, frame_bytes):
    """Consecutive episodes whose pictures fill about one shard -> [(first, number)]."""
    found, room = [], 0
    for i, length in enumerate(lengths):
        if not found or length * frame_bytes > room:
            found, room = [*found, (i, 0)], SHARD_BYTES
        found[-1] = (found[-1][0], found[-1][1] + 1)
        room -= length * frame_bytes
    return found


# ---------------------------------------------------------------------------------------------------------------
# LeRobot data sets in


def open_lerobot(cfg):
    """Check a LeRobot data set against the flags -> all that reading it takes: root, cameras {role: feature}, names, episodes, ..."""
    root = fetch(cfg.lerobot, ["meta/*"])
    try:
        info = json.loads((root / "meta" / "info.json").read_text())
        version, features, fps = info["codebase_version"], info["features"], info["fps"]
        if version not in ("v3.0", "v2.1", "v2.0"):
            raise ValueError(
                f"{cfg.lerobot} is in LeRobot's format {version}; this reads v3.0, v2.1 and v2.0: convert it with LeRobot first"
            )
        cameras = match_cameras(cfg, features)
        names, columns, convention = match_motors(cfg, features)
        videos = [name for name in cameras.values() if features[name]["dtype"] == "video"]
        if root != Path(cfg.lerobot):
            root = fetch(cfg.lerobot, ["meta/*", "data/*", *(f"videos/*{name}/*" for name in videos)])
        if version == "v3.0":
            wanted = ["episode_index", "length", "data/chunk_index", "data/file_index"]
            wanted += [
                f"videos/{name}/{field}"
                for name in videos
                for field in ("chunk_index", "file_index", "from_timestamp")
            ]
            rows = [
                row
                for path in sorted((root / "meta" / "episodes").rglob("*.parquet"))
                for row in read_parquet(path, columns=wanted).to_pylist()
            ]
            tasks = read_parquet(root / "meta" / "tasks.parquet").to_pylist()
        else:
            rows, tasks = (
                [
                    json.loads(line)
                    for line in (root / "meta" / f"{name}.jsonl").read_text().splitlines()
                    if line.strip()
                ]
                for name in ("episodes", "tasks")
            )
        episodes = []
        for row in sorted(rows, key=lambda row: row["episode_index"]):
            i = row["episode_index"]
            place = lambda pattern, at, **more: pattern.format(
                chunk_index=row.get(f"{at}/chunk_index"),
                file_index=row.get(f"{at}/file_index"),
                episode_chunk=i // info["chunks_size"],
                episode_index=i,
                **more,
            )
            films = {
                name: (
                    place(info["video_path"], f"videos/{name}", video_key=name),
                    row.get(f"videos/{name}/from_timestamp", 0.0),
                )
                for name in videos
            }
            episodes.append(
                {
                    "index": i,
                    "length": row["length"],
                    "data": place(info["data_path"], "data"),
                    "videos": films,
                }
            )
        texts = {row["task_index"]: row.get("task", row.get("__index_level_0__", "")) for row in tasks}
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"{cfg.lerobot} is no LeRobot data set: it lacks {Path(e.filename or 'meta/info.json').name}"
        ) from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise ValueError(
            f"{cfg.lerobot} has damaged metadata ({type(e).__name__}: {e}); download it again"
        ) from None
    if not episodes:
        raise ValueError(f"{cfg.lerobot} is empty: it has no episode")
    if (len(episodes), sum(e["length"] for e in episodes)) != (info["total_episodes"], info["total_frames"]):
        raise ValueError(
            f"{cfg.lerobot} says it has {info['total_episodes']} episodes, its list {len(episodes)} with other frames; download it again"
        )
    every = fps // (cfg.fps or fps)
    if every * (cfg.fps or fps) != fps:
        rates = ", ".join(str(fps // k) for k in range(1, fps + 1) if fps % k == 0)
        raise ValueError(
            f"{cfg.lerobot} has {fps} frames per second, {cfg.fps} does not divide them; choose --fps from {rates}"
        )
    extra = root / "meta" / "nanosyvla.json"  # what export() could not say in LeRobot's words
    ours = json.loads(extra.read_text())["episodes"] if extra.is_file() else None
    if ours is not None and [e["length"] for e in ours] != [e["length"] for e in episodes]:
        raise ValueError(
            f"{extra} describes other episodes than the data set has: it was edited since; delete that file to read it like any other"
        )
    return {
        "root": root,
        "fps": fps,
        "every": every,
        "cameras": cameras,
        "names": names,
        "columns": columns,
        "convention": "as recorded" if ours else convention,
        "tasks": texts,
        "reason": features.get("reason", {}).get("dtype") == "string",
        "episodes": [e | {"ours": ours and ours[i]} for i, e in enumerate(episodes)],
    }


def match_cameras(cfg, features):
    """--cameras -> {role: feature}; an error that prints what the set has."""
    there = {
        name: f
        for name, f in features.items()
        if f["dtype"] in ("image", "video") and not (f.get("info") or {}).get("video.is_depth_map")
    }
    short = {name.rsplit(".", 1)[-1]: name for name in there}
    pairs = (
        [word.partition("=")[::2] for word in cfg.cameras.split(",")] if cfg.cameras else list(short.items())
    )
    listed = (
        ", ".join(f"{name} ({f['dtype']}, {'x'.join(map(str, f['shape']))})" for name, f in there.items())
        or "no camera"
    )
    roles = {role.strip(): short.get(name.strip(), name.strip()) for role, name in pairs}
    if not roles or set(roles.values()) - set(there):
        raise ValueError(
            f"{cfg.lerobot} has {listed}, not {', '.join(sorted(set(roles.values()) - set(there))) or 'any'}; write --cameras=front=NAME,wrist=NAME"
        )
    if bad := [role for role in roles if not re.fullmatch(r"\w+", role) or role in ("state", "action")]:
        raise ValueError(
            f"{bad[0]!r} is no name for a camera (it names a file): write --cameras=front=NAME,wrist=NAME for {listed}"
        )
    return roles


def names_of(feature, unnamed):
    """One name for each of a feature's numbers; where the set has none, or one for all of them: `unnamed`_0, ..."""
    names, n = feature.get("names"), feature["shape"][0]
    if isinstance(names, dict):  # {"motors": [...]} or, rarely, {name: column}
        names = next((v for v in names.values() if isinstance(v, list)), list(names))
    return (
        [str(name) for name in names] if names and len(names) == n else [f"{unnamed}_{i}" for i in range(n)]
    )


def match_motors(cfg, features):
    """-> names of the numbers of {"state", "action"}, their columns in the recording, convention.

    If both are an SO arm's joints, they come in sim_env's order and units; all others as they are.
    """
    kinds = {"state": "observation.state", "action": "action"}
    if missing := [name for name in kinds.values() if name not in features]:
        raise ValueError(f"{cfg.lerobot} has no {missing[0]}; it has {', '.join(features)}")
    alike = features["observation.state"]["shape"] == features["action"]["shape"]
    names = {kind: names_of(features[name], "motor" if alike else kind) for kind, name in kinds.items()}
    bare = {
        kind: [name.removeprefix("main_").removesuffix(".pos") for name in recorded]
        for kind, recorded in names.items()
    }
    if any(sorted(found) != sorted(MOTORS) for found in bare.values()):
        if cfg.convention != "auto":
            raise ValueError(
                f"--convention is for SO-100 and SO-101 arms; {cfg.lerobot} measures {names['state']} and moves {names['action']}: leave it out to keep its units"
            )
        return names, {kind: list(range(len(found))) for kind, found in names.items()}, "as recorded"
    convention, every = cfg.convention, names["state"] + names["action"]
    if convention == "auto":
        convention = (
            "old"
            if all(name.startswith("main_") for name in every)
            else "new"
            if all(name.endswith(".pos") for name in every)
            else None
        )
    if convention is None:
        raise ValueError(
            f"{cfg.lerobot} names its joints {names['state']}, which does not tell their zero: add --convention=new (the middle of the range) or --convention=old"
        )
    return (
        dict.fromkeys(kinds, list(MOTORS)),
        {kind: [found.index(motor) for motor in MOTORS] for kind, found in bare.items()},
        convention,
    )


REACH = np.array(
    [150, 135, 135, 150, 200]
)  # degrees from the middle that no SO arm exceeds, some miscalibration included


def to_degrees(values, convention, calibration=None):
    """(n, 6) joint values as recorded, in MOTORS' order -> LeRobot's degrees about the middle of each joint's range, gripper 0..100."""
    values = values.copy()
    if convention == "old":  # until LeRobot's pull request 777: zero with the arm stretched out horizontally
        values[:, 1] = 90 - values[:, 1]
        values[:, 2] -= 90
    if convention == "percent":
        ranges = [calibration[motor]["range_max"] - calibration[motor]["range_min"] for motor in MOTORS[:5]]
        values[:, :5] *= np.array(ranges, np.float32) / 200 * 360 / 4095
    return values


def check_reach(cfg, values, recorded, convention):
    """Angles that the arm cannot have were recorded in another convention than their names say: refuse them with the reason."""
    fits = lambda x: bool((np.abs(x[:, :5]) <= REACH).all())
    if cfg.convention != "auto" or fits(values):
        return
    row, joint = np.unravel_index(np.argmax(np.abs(values[:, :5]) - REACH), (len(values), 5))
    better = [c for c in ("new", "old") if c != convention and fits(to_degrees(recorded, c))]
    hint = (
        f"they fit the other convention: add --convention={better[0]}"
        if better
        else "they may be raw servo positions: record with LeRobot's use_degrees"
    )
    raise ValueError(
        f"{cfg.lerobot}: {MOTORS[joint]} would be at {values[row, joint]:.0f} degrees, which the arm cannot reach; {hint}"
    )


@functools.cache
def read_calibration(path):
    try:
        found = json.loads(Path(path).read_text())
        return {
            motor: {end: int(found[motor][end]) for end in ("range_min", "range_max")} for motor in MOTORS
        }
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ValueError(
            f"{path} is no LeRobot calibration file with range_min and range_max of {', '.join(MOTORS)} ({e})"
        ) from None


def read_episodes(cfg, source):
    """The recorded episodes of one shard -> arrays by name and the episodes' entries for meta.json."""
    stored = [name for name in source["cameras"].values() if name not in source["episodes"][0]["videos"]]
    columns = [
        "observation.state",
        "action",
        "timestamp",
        "episode_index",
        "task_index",
        *stored,
        *(["reason"] if source["reason"] else []),
    ]
    frames, entries = {name: [] for name in (*source["cameras"], "state", "action")}, []
    for episode in source["episodes"]:
        path, i, n, every = (
            source["root"] / episode["data"],
            episode["index"],
            episode["length"],
            source["every"],
        )
        table = read_parquet(path, columns=columns, filters=[("episode_index", "=", i)])
        if table.num_rows != n:
            raise ValueError(
                f"{path} holds {table.num_rows} of the {n} frames of episode {i}; download it again"
            )
        if (
            np.abs(np.array(table["timestamp"]).ravel() - np.arange(n) / source["fps"]).max()
            > 0.25 / source["fps"]
        ):
            raise ValueError(
                f"{path}: episode {i} was not recorded at {source['fps']} frames per second; its meta/info.json is wrong"
            )
        keep = np.arange(0, n, every)
        # A command holds until the next picture is looked at; of those given in the meantime the last says where the arm was sent.
        for name, feature, rows in (
            ("state", "observation.state", keep),
            ("action", "action", np.minimum(keep + every - 1, n - 1)),
        ):
            recorded = np.array(table[feature].to_pylist(), np.float32)[rows][
                :, source["columns"][name]
            ]  # (frames, S or A)
            if not np.isfinite(recorded).all():
                raise ValueError(f"{path}: episode {i} holds numbers that are not finite in {feature}")
            values = recorded
            if source["convention"] != "as recorded":
                values = to_degrees(
                    recorded, source["convention"], cfg.calibration and read_calibration(cfg.calibration)
                )
                check_reach(cfg, values, recorded, source["convention"])
            frames[name].append(values)
        for role, feature in source["cameras"].items():
            if feature in episode["videos"]:
                film, start = episode["videos"][feature]
                frames[role].append(read_video(source["root"] / film, start, source["fps"], keep, cfg))
            else:
                frames[role].append(
                    np.stack(
                        [
                            read_picture(cell, source["root"], cfg)
                            for cell in table[feature].take(keep).to_pylist()
                        ]
                    )
                )
        task, reason = (
            np.array(table["task_index"])[keep],
            [r or "" for r in table["reason"].take(keep).to_pylist()]
            if source["reason"]
            else [""] * len(keep),
        )
        cuts = [
            0,
            *(np.flatnonzero(np.diff(task)) + 1).tolist(),
            len(keep),
        ]  # an episode that changes its task becomes several
        for a, b in zip(cuts, cuts[1:]):
            said = [
                [j - a, reason[j]]
                for j in range(a, b)
                if (reason[j] != reason[j - 1] if j > a else reason[j])
            ]
            entry = {
                "length": b - a,
                "task": source["tasks"][int(task[a])],
                "reason": said,
                "success": True,
                "seed": i,
                "family": Path(cfg.out).name,
                "kind": "demo",
                "disturbed": [],
            }
            entries.append(entry | (rescale(episode["ours"], every, len(keep)) if episode["ours"] else {}))
    return {name: np.concatenate(parts) for name, parts in frames.items()} | {"info": json.dumps(entries)}


def rescale(entry, every, length):
    """An entry of meta.json that went out with export(), with its steps counted in every `every`-th frame."""
    up = lambda step: -(-step // every)
    return entry | {
        "length": length,
        "reason": [[up(step), text] for step, text in entry["reason"]],
        "disturbed": [[first // every, up(end)] for first, end in entry.get("disturbed", ())],
    }


def read_picture(cell, root, cfg):
    """A picture cell {"bytes", "path"} of a parquet file -> (px, px, 3) uint8."""
    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else root / cell["path"]) as image:
            return square(image, cfg.image_size, cfg.fit)
    except (OSError, TypeError) as e:
        raise ValueError(
            f"a picture ({cell and cell['path']}) in {root} is damaged ({str(e)[:100]}); download it again"
        ) from None


def read_video(path, start, fps, keep, cfg):
    """Frames `keep` of the episode that begins `start` seconds into a film -> (len(keep), px, px, 3) uint8."""
    av = package("av")
    out, missing = (
        np.empty((len(keep), cfg.image_size, cfg.image_size, 3), np.uint8),
        {int(k): row for row, k in enumerate(keep)},
    )
    try:
        with av.open(str(path)) as film:
            stream = film.streams.video[0]
            film.seek(
                max(0, int((start - 0.5 / fps) / stream.time_base)), stream=stream
            )  # to the key frame before it
            for frame in film.decode(stream):
                at = (frame.time - start) * fps
                if round(at) in missing and abs(at - round(at)) < 0.25:
                    out[missing.pop(round(at))] = square(frame.to_image(), cfg.image_size, cfg.fit)
                if not missing or at > keep[-1] + 0.5:
                    break
    except (av.error.FFmpegError, IndexError) as e:
        raise ValueError(f"{path} cannot be decoded ({str(e)[:150]}); download it again") from None
    if missing:
        first = start + min(missing) / fps
        raise ValueError(
            f"{path} ends early or has another frame rate than {fps}: {len(missing)} of {len(keep)} frames are not there, the first at {first:.2f} s"
        )
    return out


# ---------------------------------------------------------------------------------------------------------------
# Questions that others asked


def open_texts(cfg):
    """-> shards (kind, "file-row group", first row, rows) and the parquet files of --questions_from.

    Row groups in random order: the first rows are held out, the next are trained on.
    """
    pq, files = package("pyarrow.parquet"), []
    for name in cfg.questions_from.split(","):
        on_hub = not Path(name).is_dir() and re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)/(.+)", name)
        repository, part = on_hub.groups() if on_hub else (name, "")
        root = fetch(repository, [f"{part}/*.parquet" if part else "*.parquet"])
        found = sorted((root / part).rglob("*.parquet"))
        if not found:
            raise FileNotFoundError(
                f"{name} holds no parquet file"
                + ("" if part else "; a part of a set on the hub is written name/set/PART")
            )
        files += found
    blocks = []
    for i, path in enumerate(files):
        try:
            parquet = pq.ParquetFile(path)
        except (ValueError, OSError) as e:
            raise ValueError(
                f"{path} cannot be read ({str(e).splitlines()[0][:200]}); it is damaged: download it again"
            ) from None
        if missing := {"images", "texts"} - set(parquet.schema_arrow.names):
            raise ValueError(
                f"{path} has columns {parquet.schema_arrow.names}, not {', '.join(sorted(missing))}: no image-text set like HuggingFaceM4/the_cauldron"
            )
        blocks += [
            (i, group, parquet.metadata.row_group(group).num_rows)
            for group in range(parquet.metadata.num_row_groups)
        ]
    plan, left = [], {"questions_val": cfg.held_out_scenes, "questions": cfg.scenes}
    for k in np.random.default_rng(cfg.seed).permutation(len(blocks)):
        (i, group, rows), first = blocks[k], 0
        for kind in left:
            n = min(left[kind], rows - first)
            if n > 0:
                plan.append((kind, f"{i:04d}-{group:05d}", first, n))
                left[kind], first = left[kind] - n, first + n
    if not any(shard[0] == "questions" for shard in plan):
        raise ValueError(
            f"{cfg.questions_from} has {sum(rows for *_, rows in blocks)} pictures, which leaves none to train on; lower --held_out_scenes or raise --scenes"
        )
    return plan, files


def read_texts(cfg, source, first, n):
    """Rows [first, first + n) of a row group -> the pictures with their questions, and what was left out."""
    path, group, camera = source
    try:
        table = (
            package("pyarrow.parquet").ParquetFile(path).read_row_group(group, columns=["images", "texts"])
        )
    except (ValueError, OSError) as e:
        raise ValueError(
            f"{path} cannot be read ({str(e).splitlines()[0][:200]}); it is damaged: download it again"
        ) from None
    pictures, texts, left_out = [], [], Counter()
    for row in table.slice(first, n).to_pylist():
        turns = [
            (
                turn.get("source") or path.parent.name,
                (turn.get("user") or "").strip(),
                (turn.get("assistant") or "").strip(),
            )
            for turn in row["texts"] or []
        ]
        fitting = [list(turn) for turn in turns if all(0 < len(text) <= cfg.longest for text in turn[1:])]
        left_out["empty or long questions"] += len(turns) - len(fitting)
        if len(row["images"] or []) != 1 or not fitting:
            left_out["rows without a question, or without exactly one picture"] += 1
            continue
        try:
            pictures.append(read_picture(row["images"][0], path.parent, cfg))
        except ValueError:
            left_out["damaged pictures"] += 1
            continue
        texts.append(fitting)
    return {
        camera: np.array(pictures, np.uint8).reshape(-1, cfg.image_size, cfg.image_size, 3),
        "info": json.dumps(texts),
    }, +left_out


# ---------------------------------------------------------------------------------------------------------------
# LeRobot data sets out

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
CODECS = {
    "h264": ("libx264", {"g": "2", "crf": "18"}),
    "av1": ("libsvtav1", {"g": "2", "crf": "20", "preset": "8"}),
}


def open_export(cfg):
    """-> shards of episodes with what writing them takes: meta.json, the tasks and LeRobot's features."""
    folder = Path(cfg.export)
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no data set (no meta.json); run: python prepare.py --config small"
        )
    meta = json.loads((folder / "meta.json").read_text())
    shape = np.load(folder / f"{meta['cameras'][0]}.npy", mmap_mode="r").shape  # (frames, px, px, 3)
    if cfg.video and shape[1] % 2:
        raise ValueError(
            f"{folder} has pictures of {shape[1]} px, and a film takes an even number: leave --video out"
        )
    names = {"action": meta["motors"], "observation.state": meta.get("state") or meta["motors"]}
    if all(found == list(MOTORS) for found in names.values()):
        names = dict.fromkeys(names, [f"{motor}.pos" for motor in MOTORS])
    info = {
        "video.height": shape[1],
        "video.width": shape[2],
        "video.codec": cfg.video,
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": meta["fps"],
        "video.channels": 3,
        "has_audio": False,
    }
    features = {
        feature: {"dtype": "float32", "shape": [len(found)], "names": found}
        for feature, found in names.items()
    }
    picture = {
        "dtype": "video" if cfg.video else "image",
        "shape": list(shape[1:]),
        "names": ["height", "width", "channels"],
    }
    features |= {
        f"observation.images.{camera}": picture | ({"info": info} if cfg.video else {})
        for camera in meta["cameras"]
    }
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    features |= {
        name: {"dtype": "int64", "shape": [1], "names": None}
        for name in ("frame_index", "episode_index", "index", "task_index")
    }
    features["reason"] = {"dtype": "string", "shape": [1], "names": None}
    source = {
        "meta": meta,
        "features": features,
        "tasks": list(dict.fromkeys(e["task"] for e in meta["episodes"])),
    }
    bounds = groups([e["length"] for e in meta["episodes"]], int(np.prod(shape[1:])) * len(meta["cameras"]))
    return [("export", str(k), first, n) for k, (first, n) in enumerate(bounds)], source


def lerobot_file(cfg, kind, k, end="parquet"):
    return Path(cfg.out) / kind / f"chunk-{k // 1000:03d}" / f"file-{k % 1000:03d}.{end}"


def export_path(cfg, shard):
    return lerobot_file(cfg, "meta/episodes", int(shard[1]))


def export_shard(job):
    """Some episodes -> one parquet file of frames, one film per camera, and last their entries in meta/episodes. -> number of episodes."""
    cfg, (_, k, first, n), source = job
    pa, pq = package("pyarrow"), package("pyarrow.parquet")
    meta, features, k, folder = source["meta"], source["features"], int(k), Path(cfg.export)
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*meta["cameras"], "state", "action")
    }
    index = sum(e["length"] for e in meta["episodes"][:first])
    begin, rows = index, []
    types = {
        name: {"float32": pa.float32(), "int64": pa.int64(), "string": pa.string()}.get(f["dtype"])
        for name, f in features.items()
        if f["dtype"] != "video"
    }
    types |= {
        name: pa.list_(pa.float32(), features[name]["shape"][0]) for name in ("action", "observation.state")
    }
    types |= {
        name: pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        for name, f in features.items()
        if f["dtype"] == "image"
    }
    schema = pa.schema(
        types, metadata={"huggingface": json.dumps({"info": {"features": huggingface_features(features)}})}
    )
    with whole(lerobot_file(cfg, "data", k)) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for i, episode in list(enumerate(meta["episodes"]))[first : first + n]:
            length, at = episode["length"], slice(episode["start"], episode["start"] + episode["length"])
            columns = {
                "action": arrays["action"][at],
                "observation.state": arrays["state"][at],
                "timestamp": (np.arange(length) / meta["fps"]).astype(np.float32),
                "frame_index": np.arange(length),
                "episode_index": np.full(length, i),
                "index": index + np.arange(length),
                "task_index": np.full(length, source["tasks"].index(episode["task"])),
            }
            reason = [
                ([text for step, text in episode["reason"] if step <= j] or [""])[-1] for j in range(length)
            ]
            pictures = {f"observation.images.{camera}": arrays[camera][at] for camera in meta["cameras"]}
            cells = (
                {}
                if cfg.video
                else {
                    name: [{"bytes": png(x), "path": f"frame-{j:06d}.png"} for j, x in enumerate(images)]
                    for name, images in pictures.items()
                }
            )
            writer.write_table(
                pa.table(
                    {name: list(column) for name, column in ({"reason": reason} | columns | cells).items()},
                    schema=schema,
                )
            )  # a row group each
            row = {
                "episode_index": i,
                "tasks": [episode["task"]],
                "length": length,
                "dataset_from_index": index,
                "dataset_to_index": index + length,
            }
            row |= {
                f"{at}/{what}_index": value
                for at in ("data", "meta/episodes")
                for what, value in (("chunk", k // 1000), ("file", k % 1000))
            }
            for name in pictures if cfg.video else ():
                row |= {f"videos/{name}/chunk_index": k // 1000, f"videos/{name}/file_index": k % 1000}
                row |= {
                    f"videos/{name}/from_timestamp": (index - begin) / meta["fps"],
                    f"videos/{name}/to_timestamp": (index - begin + length) / meta["fps"],
                }
            for name, values in (columns | pictures).items():
                row |= {
                    f"stats/{name}/{stat}": value
                    for stat, value in lerobot_statistics(values, length).items()
                }
            rows.append(row)
            index += length
    for camera in meta["cameras"] if cfg.video else ():
        # the parts of the film are the episodes, in the order of the parquet file
        parts = (
            arrays[camera][e["start"] : e["start"] + e["length"]] for e in meta["episodes"][first : first + n]
        )
        with whole(lerobot_file(cfg, f"videos/observation.images.{camera}", k, "mp4")) as temporary:
            write_video(temporary, itertools.chain.from_iterable(parts), meta["fps"], cfg.video)
    with whole(export_path(cfg, job[1])) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    return n


def huggingface_features(features):
    """LeRobot's features in the words of the datasets package, for the viewers that read the parquet files by themselves."""
    scalar = lambda f: {"dtype": f["dtype"], "_type": "Value"}
    words = {
        "image": lambda f: {"_type": "Image"},
        "float32": lambda f: (
            {"feature": scalar(f), "length": f["shape"][0], "_type": "List"} if f["names"] else scalar(f)
        ),
    }
    return {name: words.get(f["dtype"], scalar)(f) for name, f in features.items() if f["dtype"] != "video"}


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def write_video(path, images, fps, codec):
    """(px, px, 3) uint8 pictures -> an mp4 that can be entered at every second frame, as LeRobot's own."""
    av, (encoder, options) = package("av"), CODECS[codec]
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder reports errors only
    try:
        with av.open(str(path), "w", format="mp4") as film:
            stream = film.add_stream(encoder, rate=fps, options=options)
            stream.pix_fmt = "yuv420p"
            for i, image in enumerate(images):
                if i == 0:  # newer av refuses it once the encoder is open
                    stream.height, stream.width = image.shape[:2]
                film.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            film.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as e:  # ValueError: this build of av has no such encoder
        if getattr(e, "errno", None) == errno.ENOSPC:
            raise OSError(errno.ENOSPC, "No space left on device") from None
        raise ValueError(
            f"{path} cannot be encoded with {encoder} ({str(e)[:150]}); leave --video out or choose the other codec"
        ) from None


def lerobot_statistics(values, count):
    """What LeRobot keeps of a feature: (N, D) or (N,) numbers, or pictures (N, px, px, 3) as (3, 1, 1) numbers in 0..1."""
    values = np.asarray(values)
    if pictures := values.ndim == 4:
        some = values[
            np.linspace(0, len(values) - 1, min(len(values), 32)).astype(int),
            :: max(1, values.shape[1] // 96),
            :: max(1, values.shape[2] // 96),
        ]
        values = some.reshape(-1, 3) / 255
    values = values.reshape(len(values), -1)  # (N, D)
    found = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0, dtype=np.float64),
        "std": values.std(0, dtype=np.float64),
    }
    found |= {name: np.quantile(values, q, axis=0) for name, q in QUANTILES.items()}
    return {name: (v.reshape(3, 1, 1) if pictures else v).tolist() for name, v in found.items()} | {
        "count": [count]
    }


def finish_export(cfg, source):
    """tasks, statistics, what LeRobot has no word for, and last meta/info.json: its presence means that the set is whole."""
    pa, pq = package("pyarrow"), package("pyarrow.parquet")
    meta, tasks, out, folder = source["meta"], source["tasks"], Path(cfg.out), Path(cfg.export)
    episodes, fps = meta["episodes"], meta["fps"]
    lengths = np.array([e["length"] for e in episodes])
    frames = np.concatenate([np.arange(e["start"], e["start"] + e["length"]) for e in episodes])
    step = np.concatenate([np.arange(n) for n in lengths])
    columns = {
        "timestamp": (step / fps).astype(np.float32),
        "frame_index": step,
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "index": np.arange(len(frames)),
        "task_index": np.repeat([tasks.index(e["task"]) for e in episodes], lengths),
    }
    columns |= {
        name: np.load(folder / f"{file}.npy", mmap_mode="r")[frames]
        for name, file in (("action", "action"), ("observation.state", "state"))
    }
    some = frames[np.linspace(0, len(frames) - 1, min(len(frames), 32)).astype(int)]
    columns |= {
        f"observation.images.{camera}": np.load(folder / f"{camera}.npy", mmap_mode="r")[some]
        for camera in meta["cameras"]
    }
    pandas = {
        "index_columns": ["__index_level_0__"],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": None,
            }
        ],
        "columns": [
            {
                "name": "task_index",
                "field_name": "task_index",
                "pandas_type": "int64",
                "numpy_type": "int64",
                "metadata": None,
            },
            {
                "name": None,
                "field_name": "__index_level_0__",
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": None,
            },
        ],
    }
    table = pa.table(
        {"task_index": list(range(len(tasks))), "__index_level_0__": tasks}
    ).replace_schema_metadata({"pandas": json.dumps(pandas)})
    with whole(out / "meta" / "tasks.parquet") as temporary:
        pq.write_table(table, temporary)
    info = {
        "codebase_version": "v3.0",
        "robot_type": "so100_follower" if meta["motors"] == list(MOTORS) else "unknown",
        "total_episodes": len(lengths),
        "total_frames": len(frames),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if cfg.video
        else None,
        "features": source["features"],
    }
    ours = {"episodes": [{name: value for name, value in e.items() if name != "start"} for e in episodes]}
    for name, content in (
        ("stats", {name: lerobot_statistics(v, len(frames)) for name, v in columns.items()}),
        ("nanosyvla", ours),
        ("info", info),
    ):
        with whole(out / "meta" / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1))
    return f"{out}: {len(lengths)} episodes, {len(frames)} frames, {len(tasks)} tasks as a LeRobot data set"


# ---------------------------------------------------------------------------------------------------------------
# Merging


def write_arrays(folder, paths, names, keep=None):
    """Concatenate arrays over shards into .npy files, one shard in memory at a time; keep {path: mask} chooses rows. -> the arrays."""
    files, like, lengths = {}, {}, Counter()
    with (
        ExitStack() as stack
    ):  # plain writes: a memory map on a full disk would kill the process instead of raising an error
        for path in tqdm(paths, desc=f"writing {folder.name}", unit="shard", disable=not sys.stderr.isatty()):
            with np.load(path) as shard:
                for name in names if names[0] in shard else ():
                    array = np.ascontiguousarray(shard[name] if keep is None else shard[name][keep[path]])
                    if name not in files:
                        files[name], like[name] = (
                            stack.enter_context(open(folder / f"{name}.npy", "wb")),
                            array[:0],
                        )
                        np.lib.format.write_array_header_1_0(
                            files[name], np.lib.format.header_data_from_array_1_0(like[name])
                        )
                    files[name].write(array)
                    lengths[name] += len(array)
        for name, file in files.items():  # numpy leaves room in a header for the length to grow
            file.seek(0)
            np.lib.format.write_array_header_1_0(
                file,
                np.lib.format.header_data_from_array_1_0(like[name])
                | {"shape": (lengths[name], *like[name].shape[1:])},
            )
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in files}


def load_info(paths, field="info"):
    for path in paths:
        with np.load(path) as shard:
            yield json.loads(str(shard[field]))


def merge_questions(cfg, name, paths, common, held):
    """Shards -> <out>/<name>, renamed when it is whole. Brought pictures among the hashes `held` are left out. -> the hashes of this set's."""
    folder, views, keep = (
        Path(cfg.out, f"{name}.tmp"),
        [c for c in common["cameras"] if c not in common.get("grey", ())],
        None,
    )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    hashes = {}
    if cfg.questions_from:  # others' sets may repeat a picture: a held-out one must not be trained on
        for path in paths:
            with np.load(path) as shard:
                hashes[path] = [hashlib.sha1(picture).digest() for picture in shard[views[0]]]
        keep = {path: np.array([h not in held for h in found], bool) for path, found in hashes.items()}
    write_arrays(folder, paths, views, keep)
    texts = [
        text
        for path, info in zip(paths, load_info(paths))
        for i, text in enumerate(info)
        if keep is None or keep[path][i]
    ]
    if not texts:
        raise ValueError(
            f"no usable picture with questions for {name} in {cfg.questions_from}; raise --longest or choose another set"
        )
    (folder / "questions.json").write_text(json.dumps(texts))
    (folder / "meta.json").write_text(json.dumps(common, indent=1))
    shutil.rmtree(Path(cfg.out, name), ignore_errors=True)
    os.replace(folder, Path(cfg.out, name))
    left_out = sum((Counter(f) for f in load_info(paths, "failures")), Counter())
    print(
        f"{cfg.out}/{name}: {len(texts)} pictures, {sum(map(len, texts))} questions; left out: {dict(left_out) or 'none'}"
    )
    return {h for found in hashes.values() for h in found}


def merge(cfg, plan, common):
    """Shards -> the finished folder; meta.json comes last, so its presence means that the data set is whole."""
    out, held = Path(cfg.out), set()
    common = common | {"image_size": cfg.image_size, "made_by": {"program": "prepare.py", **asdict(cfg)}}
    for name in ("questions_val", "questions"):
        if paths := [shard_path(cfg, s) for s in plan if s[0] == name]:
            held |= merge_questions(
                cfg,
                name,
                paths,
                common | ({"grey": common["cameras"][1:]} if cfg.questions_from else {}),
                held,
            )
    if paths := [shard_path(cfg, s) for s in plan if s[0] in ("demo", "start", "lerobot")]:
        files = write_arrays(out, paths, (*common["cameras"], "state", "action"))
        episodes = list(itertools.chain.from_iterable(load_info(paths)))
        failures = sum((Counter(f) for f in load_info(paths, "failures")), Counter())
        if not episodes:
            raise ValueError(f"not one demonstration succeeded ({dict(failures)})")
        at = 0
        for episode in episodes:
            episode["start"], at = at, at + episode["length"]
        meta = common | {
            "statistics": {name: statistics(files[name]) for name in ("state", "action")},
            "failures": failures,
            "episodes": episodes,
        }
        with whole(out / "meta.json") as temporary:
            temporary.write_text(json.dumps(meta, indent=1))
        kinds = Counter(f"{e['family']} {e['kind']}" for e in episodes)
        print(
            f"{out}: {at} frames, {len({e['task'] for e in episodes})} tasks; "
            + ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        )
        print(f"failed demonstrations: {dict(failures) or 'none'}")
        low, high = (np.array(meta["statistics"]["state"][name][:5]) for name in ("min", "max"))
        if (
            cfg.convention == "auto"
            and common.get("convention") == "new"
            and max(-low.min(), high.max()) <= 100
        ):
            print(
                "note: no joint leaves -100 .. 100, so these may be no degrees but per cent (LeRobot's use_degrees=False); then add --convention=percent --calibration=FILE"
            )


# ---------------------------------------------------------------------------------------------------------------
# All of it


def make_plan(cfg):
    """-> jobs (cfg, shard, source), what the finished data set says of itself, and how many pictures it will hold."""
    out, jobs, pictures = Path(cfg.out), [], 0
    common = {"cameras": list(CAMERAS), "motors": list(MOTORS), "fps": FPS}
    if cfg.lerobot:
        source = open_lerobot(cfg)
        state, motors = source["names"]["state"], source["names"]["action"]
        common = {
            "cameras": list(source["cameras"]),
            "motors": motors,
            **({"state": state} if state != motors else {}),
            "fps": source["fps"] // source["every"],
            "convention": source["convention"],
        }
        bounds = groups(
            [e["length"] for e in source["episodes"]], cfg.image_size**2 * 3 * len(source["cameras"])
        )
        jobs = [
            (
                cfg,
                ("lerobot", "episodes", first, n),
                source | {"episodes": source["episodes"][first : first + n]},
            )
            for first, n in bounds
        ]
        pictures = sum(-(-e["length"] // source["every"]) for e in source["episodes"]) * len(
            source["cameras"]
        )
        print(
            f"{cfg.lerobot}: {len(source['episodes'])} episodes; cameras "
            + ", ".join(f"{role} = {name}" for role, name in source["cameras"].items())
            + f"; motors {','.join(motors)} ({source['convention']}){'' if state == motors else '; state ' + ','.join(state)}; {common['fps']} frames per second"
        )
    elif not cfg.questions_from:
        jobs = [(cfg, shard, None) for shard in shards(cfg)]
    elif (
        out / "meta.json"
    ).is_file():  # questions for demonstrations that are there: they are shown through the same cameras
        common = {
            name: value
            for name, value in json.loads((out / "meta.json").read_text()).items()
            if name in common
        }
        cfg.image_size = np.load(out / f"{common['cameras'][0]}.npy", mmap_mode="r").shape[1]
    if cfg.questions_from:
        plan, files = open_texts(cfg)
        for shard in plan:
            i, group = map(int, shard[1].split("-"))
            jobs.append((cfg, shard, (files[i], group, common["cameras"][0])))
            pictures += shard[3]
    return jobs, common, pictures


def run(jobs, work, path_of, workers):
    """Do what of the jobs is not done yet, in parallel."""
    todo = [job for job in jobs if not path_of(*job[:2]).is_file()]
    if len(todo) < len(jobs):
        print(f"going on: {len(jobs) - len(todo)} of {len(jobs)} shards are there already")
    if not todo:
        return
    with (
        multiprocessing.Pool(min(workers or os.cpu_count(), len(todo))) as pool,
        tqdm(total=sum(job[1][3] for job in todo), unit="item", disable=not sys.stderr.isatty()) as bar,
    ):
        processes, finished, left = (
            multiprocessing.active_children(),
            pool.imap_unordered(work, todo),
            len(todo),
        )
        while left:
            try:
                bar.update(finished.next(timeout=1))
                left -= 1
            except (
                multiprocessing.TimeoutError
            ):  # the pool would wait for ever for what a killed process was doing
                if not all(process.is_alive() for process in processes):
                    raise RuntimeError(
                        "a process was killed, perhaps for lack of memory; run the same command again with fewer --workers, it goes on where it stopped"
                    ) from None


def clear(out):
    """Remove what only the making took, and what killed processes left; the settings last, because without them shards could be taken for another data set's."""
    for path in [*out.rglob("*.tmp[0-9]*"), *(out / "parts").glob("*.npz")]:
        path.unlink()
    shutil.rmtree(out / "parts")


def prepare(cfg):
    out, parts = Path(cfg.out), Path(cfg.out) / "parts"
    settings = json.dumps({k: v for k, v in asdict(cfg).items() if k != "workers"})
    saved = parts / "settings.json"
    ours = saved.is_file() and saved.read_text() == settings
    asked = cfg.questions_from and (out / "questions").exists() and (not cfg.lerobot or not parts.exists())
    shown = (out / ("meta/info.json" if cfg.export else "meta.json")).is_file() and not (
        cfg.questions_from and not cfg.lerobot
    )
    if ours and (asked or shown):
        clear(out)
        return print(f"{out} is whole already; cleared away what was left of the making")
    if asked:
        raise ValueError(
            f"{out} already holds questions; delete {out}/questions and {out}/questions_val or choose another --out"
        )
    if shown:
        raise ValueError(f"{out} already holds a data set; delete it or choose another --out")
    if saved.is_file() and not ours:
        raise ValueError(
            f"{out} holds parts made with other settings; delete {parts} or choose another --out"
        )
    began = time.time()
    if cfg.export:
        plan, source = open_export(cfg)
        jobs = [(cfg, shard, source) for shard in plan]
    else:
        jobs, common, pictures = make_plan(cfg)
    with whole(saved) as temporary:
        temporary.write_text(settings)
    if not cfg.export:
        there = sum(path.stat().st_size for path in parts.iterdir())
        needed, free = 2 * pictures * cfg.image_size**2 * 3 - there, shutil.disk_usage(parts).free
        if needed > free:
            raise ValueError(
                f"{out} takes {needed / 1e9:.1f} GB while it is made, {free / 1e9:.1f} GB are free; lower --image_size, --fps or --scenes, or choose another --out"
            )
        run(jobs, make_shard, shard_path, cfg.workers)
        merge(cfg, [shard for _, shard, _ in jobs], common)
    else:
        run(jobs, export_shard, export_path, cfg.workers)
        print(finish_export(cfg, source))
    clear(out)
    print(f"{time.time() - began:.0f} s")


def main(argv=None):
    cfg = parse_config(PrepareConfig, PRESETS, sys.argv[1:] if argv is None else argv)
    try:
        prepare(cfg)
    except (ValueError, OSError, RuntimeError) as e:  # RuntimeError: no GL library
        full = getattr(e, "errno", None) == errno.ENOSPC
        message = (
            f"the disk is full; free some space there ({cfg.out}) and run the same command again, it goes on where it stopped"
            if full
            else e
        )
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
