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
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import ExitStack
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
)


# ---------------------------------------------------------------------------------------------------------------
# The scripted expert.

HOVER = 0.055  # the tool travels this far above the height at which it grasps
GAIN = 1.3  # aim a little past the target: the servo gives way to gravity and to the noise of demonstrate()
STRIDE = np.array(
    [18, 16, 16, 16, 24, 10]
)  # largest step of a command away from the measured position, LeRobot units


class Expert:
    """A teacher that sees the truth. Each action depends on the present state alone, never on a clock or a remembered
    phase: a policy without memory can imitate it, and after a disturbance it simply carries on from where things are.

    Its thresholds are as loose as the fingers and the pads allow, for the sake of a pupil that is a centimetre wrong: one that
    waits for perfect alignment before it closes or lets go never does either.
    """

    def __init__(self, env, mistake=(0, 0)):
        self.env, self.mistake = (
            env,
            np.array(mistake),
        )  # metres (2,) by which it believes cubes and pads to lie elsewhere

    def action(self):
        """The next target position (6,) float32 in LeRobot units."""
        env, scene = self.env, self.env.scene()
        at = env.position()
        jaw = env.data.body("fixed_jaw")
        tool = jaw.xpos + jaw.xmat.reshape(3, 3) @ (pinch_x(at[5]), -0.1014, 0)
        pads = {cube["colour"]: cube["pad"] for cube in scene["cubes"]}
        todo = [leg for leg in env.goal["legs"] if pads[leg[0]] != leg[3]]
        if not todo:
            xy, z, gripper = self.leave(tool, at[5])
            return self.towards(at, xy, z, -90, gripper)
        colour, _, _, number = todo[0]
        cube = env.cube_xyz(colour)
        if env.held(colour):
            return self.towards(
                at, *self.carry(tool, cube, env.pad_xy(number) + 2 * self.mistake)
            )  # pads are larger
        cube[:2] += self.mistake
        return self.towards(at, *self.fetch(tool, at, cube, env.cube_yaw(colour)))

    def leave(self, tool, gripper):
        """Open where we are, then rise."""
        return tool[:2], CUBE + HOVER if gripper > OPEN - 7 else tool[2], OPEN

    def fetch(self, tool, at, cube, yaw):
        """Above the cube, down around it, close -> xy, z, roll, gripper."""
        phi, _ = xy_to_polar(cube)
        roll = at[4] + wrap(
            yaw - phi - at[4], 90
        )  # of the four ways to hold a cube the one that turns the wrist least,
        if abs(roll + 90) > 60:
            roll = -90 + wrap(yaw - phi, 90)  # unless that leads away from the middle of its range
        gap = np.linalg.norm(cube[:2] - tool[:2])
        if gap < 0.02 and tool[2] < CUBE + 0.009 and at[5] > CLOSED + 1.5:  # closed on nothing: try again
            return cube[:2], CUBE, roll, CLOSED
        if (
            tool[2] < CUBE + 0.03 and gap > 0.028
        ):  # low beside something: open, then rise, before going anywhere
            xy, z, gripper = self.leave(tool, at[5])
            return xy, z, at[4], gripper
        unready = gap + 0.0007 * abs(roll - at[4]) + 0.002 * max(OPEN - 4 - at[5], 0)
        return cube[:2], CUBE + np.clip(4 * (unready - 0.02), 0, HOVER), roll, OPEN

    def carry(self, tool, cube, pad):
        """Up, over the pad, down, open -> xy, z, roll, gripper. Aims with the cube, wherever it sits between the fingers."""
        gap = np.linalg.norm(pad - cube[:2])
        if gap < 0.02 and min(cube[2] - CUBE, tool[2] - 0.008) < 0.007:  # the cube or the fingertips are down
            return tool[:2], tool[2], -90, OPEN
        sink = tool[2] - cube[2]
        z = CUBE + np.clip(4 * (gap - 0.015), 0, HOVER)
        free = (
            np.clip((cube[2] - 0.028) / 0.02, 0, 1) if gap > 0.03 else 1
        )  # do not drag it through its neighbours
        return tool[:2] + free * (pad - cube[:2]), z + sink, -90, CLOSED

    def towards(self, at, xy, z, roll, gripper):
        """One stride in joint space towards a pose of the tool."""
        phi, r = xy_to_polar(xy)
        z = np.clip(z, 0.008, 0.12)
        target = inverse(phi, np.clip(r, 0.09 + 0.4 * z, 0.34), z, roll, at[5])
        target[5] = gripper
        step = GAIN * (target - at) / STRIDE
        step[:5] /= max(1, np.abs(step[:5]).max())  # all joints arrive together
        step[5] = np.clip(step[5], -1, 1)
        return np.clip(at + step * STRIDE, LOW, HIGH).astype(np.float32)


def demonstrate(env, seed, family, noise=True, start=False, limit=None, images=True):
    """One episode by the expert, from the id split -> dict: states and actions (n, 6) float32, images (n, V, px, px, 3)
    uint8, reasons [n strings], disturbed [[first step, end], ...], task, success, failure ("" or why not).

    With noise the arm executes disturbed actions, but the label is always the clean one the expert would take there, so
    the data show how to come back (DART: Laskey et al. 2017, arXiv:1703.09327). For a while in half of the episodes the arm
    obeys an expert that is mistaken about where things lie, as a policy will be: it misses the cube or the pad, and the data
    show what to do then. Goes on for three steps after success.
    start: from any arm pose; limit: at most so many steps; images=False saves the time of drawing.
    """
    _, info = env.reset(seed=seed, options={"family": family, "split": "id", "start": start})
    rng = np.random.default_rng([seed, 7])
    accident = rng.choice(["open", "push", ""], p=[0.04, 0.04, 0.92]) if noise else ""
    begin, push, drift = int(rng.integers(4, LIMIT[family] // 3)), rng.normal(0, 12, 6), np.zeros(6)
    mistaken, astray = Expert(env, rng.normal(0, 0.016, 2)), range(0)
    if noise and rng.random() < 0.5:
        first = int(rng.integers(0, LIMIT[family] // 3))
        astray = range(first, first + int(rng.integers(6, 16)))
    expert, success, lifted, after = Expert(env), False, False, 0
    hit = range(begin, begin + 3) if accident else range(0)
    states, actions, reasons, frames = [], [], [], []
    while after < 4 and len(actions) < (limit or LIMIT[family]):
        states.append(env.position())
        actions.append(expert.action())
        reasons.append(info["reason"])
        if images:
            frames.append([draw(env.renderer, env.data, camera) for camera in CAMERAS])
        drift = 0.8 * drift + rng.normal(0, 0.9, 6) * noise  # stays near 1.5 degrees
        step = len(actions) - 1
        executed = (mistaken.action() if step in astray else actions[-1]) + drift
        if step in hit:
            executed = executed + push if accident == "push" else np.append(executed[:5], OPEN)
        env._advance(executed)
        info = env._info()
        lifted = lifted or info["reason"].endswith("in hand")
        success = success or info["success"]
        after += success
    why = env.failure or (
        "never grasped" if not lifted else "timeout" if info["reason"].endswith("in hand") else "dropped"
    )
    return {
        "states": np.array(states, np.float32),
        "actions": np.array(actions),
        "images": np.array(frames, np.uint8),
        "reasons": reasons,
        "disturbed": [[r.start, r.stop] for r in (astray, hit) if r],
        "task": env.task,
        "success": success,
        "failure": "" if success else why,
    }


# ---------------------------------------------------------------------------------------------------------------


def contact_sheet():
    """Every family (rows) in every split (columns), both cameras, as one picture."""
    from PIL import ImageDraw

    px, rows, env = 224, [], SO100Env()
    for family in FAMILIES:
        row = []
        for split in SPLITS:
            env.reset(seed=SEEDS["val"].start, options={"family": family, "split": split})
            tile = Image.new("RGB", (2 * px, px + 32), "white")
            for i, camera in enumerate(CAMERAS):
                tile.paste(Image.fromarray(env.render(px, camera)), (i * px, 32))
            ImageDraw.Draw(tile).text((4, 2), f"{family}, {split}\n{env.task}", fill="black")
            row.append(np.asarray(tile))
        rows.append(np.hstack(row))
    env.close()
    return Image.fromarray(np.vstack(rows))


def expert_film(family, seed=1, px=256):
    """Frames [(px, 2 * px, 3), ...] of the expert at work, one for each control step."""
    env, frames = SO100Env(family), []
    env.reset(seed=seed)
    expert, terminated, truncated = Expert(env), False, False
    while not terminated and not truncated:
        frames.append(np.hstack([env.render(px, camera) for camera in CAMERAS]))
        terminated, truncated = env._advance(expert.action())
    frames += [np.hstack([env.render(px, camera) for camera in CAMERAS])] * FPS
    env.close()
    return frames


def expert_success(n):
    """Print how often the expert succeeds on the first n training seeds of each family, with noise and mistakes and without."""
    for family in LIMIT:
        env = SO100Env(family)
        for noise in (True, False):
            demos = [
                demonstrate(env, seed, family, noise, images=False)
                for seed in tqdm(range(n), family, leave=False, disable=not sys.stderr.isatty())
            ]
            low, high = wilson(sum(demo["success"] for demo in demos), n)
            why = ", ".join(sorted({demo["failure"] for demo in demos if demo["failure"]}))
            print(
                f"{family}, {'with noise and mistakes' if noise else 'undisturbed'}: {100 * np.mean([demo['success'] for demo in demos]):.1f} % of {n} "
                f"({100 * low:.1f} - {100 * high:.1f}), {np.mean([len(demo['actions']) for demo in demos]):.0f} steps{'; failed: ' + why if why else ''}",
                flush=True,
            )
        env.close()


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
