"""LeRobot data sets in and out, image-text sets in: prepare.py with --lerobot, --questions_from and --export.

prepare.py calls plan_episodes() and plan_questions() once, then read_episodes() and read_questions() in
worker processes, a shard each. Reading needs pyarrow, and av where the data set has films. export() needs
LeRobot.

A LeRobot data set holds frames as rows of parquet files: the features "observation.state" and "action", a
timestamp, the number of the task. The pictures of a camera are a column of PNG files or a film. Its folder
meta holds the list of episodes, the texts of the tasks, and info.json, which describes the features.
"""

import contextlib
import errno
import inspect
import io
import json
import math
import os
import re
import shutil
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image, ImageOps
from tqdm import tqdm

from common import UserError, check_readable, claim_folder, read_json, require, write_json
from data import check_set, open_array, read_meta
from sim_env import HIGH, LOW, MOTORS, resize_image

# prepare.py imports this file, so this one cannot import its PrepareConfig and its Shard.
Config = Shard = Any
Scene = tuple[dict[str, ndarray], list, list[str]]  # see prepare.make_shard()
FEATURES = {"state": "observation.state", "action": "action"}  # our array -> LeRobot's feature
# What else is read where it is there.
BESIDE = {"time": "timestamp", "task": "task_index", "success": "next.success", "reason": "reason"}
# LeRobot's tools and people use other names for success, too, of frames or of episodes.
SUCCESS = ("next.success", "success", "is_success", "is_episode_successful")
OURS = "meta/nanosyvla.json"  # export() keeps there what LeRobot has no words for
SHARD_BYTES = 1 << 26  # pictures in a shard, about
# Where the files of an episode lie, if info.json does not say it. v2: v2.0 and v2.1.
PATHS = {
    "v2": {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    },
    "v3": {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
}


def read_parquet(path: Path, columns: list | None = None, filters: list | None = None) -> Any:
    """A parquet file, or a folder of such, as a pyarrow.Table of those columns that it has."""
    parquet = require("pyarrow.parquet", "pyarrow")
    with check_readable(path):
        if columns:
            columns = list(set(columns).intersection(parquet.ParquetDataset(path).schema.names))
        return parquet.read_table(path, columns=columns, filters=filters)


def fetch(name: str, patterns: list) -> Path:
    """A folder as it is, else a set in LeRobot's cache, else the matching files of a data set on the hub.

    name: a folder, or USER/SET or USER/SET/FOLDER. The hub's cache resumes downloads.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    on_hub = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)/?(.*)", name)
    if not on_hub:
        raise UserError(f"there is no folder {name}; a data set on the hub is written USER/SET")
    repository, part = on_hub.groups()
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface", "lerobot")
    home = Path(os.environ.get("HF_LEROBOT_HOME") or home).expanduser()
    # LeRobot 0.4 keeps sets under their names. Of some it has the folder meta alone.
    if (home / name / "data").is_dir():
        return home / name
    # LeRobot 0.6 keeps them as the hub's own cache does.
    cache = home / "hub"
    if not (cache / f"datasets--{repository.replace('/', '--')}").is_dir():
        cache = None
    hub = require("huggingface_hub")
    patterns = [str(Path(part, pattern)) for pattern in patterns]
    try:
        found = hub.snapshot_download(
            repository, repo_type="dataset", allow_patterns=patterns, cache_dir=cache
        )
    except (OSError, hub.errors.HFValidationError) as error:
        # A full disk is told as such.
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise UserError(
            f"there is no folder {name}, and the hub has no public data set of that name or cannot be "
            "reached (for a private one type: hf auth login)"
        ) from None
    return Path(found, part)


# -----------------------------------------------------------------------------------------------------------
# LeRobot data sets in


@dataclass
class LeRobotSet:
    """A LeRobot data set and how to read it. A shard is a copy with some of the episodes."""

    root: Path
    info: dict  # meta/info.json
    fps: float  # as recorded, perhaps 29.97
    stride: int  # one of so many frames is kept
    features: dict  # "state", "action", "time", "task", "success", "reason", if there -> feature
    cameras: dict  # role -> feature
    films: list  # those features among the cameras that are stored as films
    columns: dict  # of "state" and "action": where the recording has our numbers
    convention: str  # of joint angles: new, old, percent, or "as recorded": not to be converted
    numbers: list[int]  # of all episodes that are read
    episodes: list[dict]  # rows of meta/episodes; "entry" is that of meta.json if export() wrote the set
    tasks: dict  # number -> text

    def path(self, episode: dict, film: str = "") -> Path:
        """The file with the rows of an episode, or with its film of a feature."""
        kind, prefix = ("video_path", f"videos/{film}") if film else ("data_path", "data")
        number = episode["episode_index"]
        with check_readable(f"{self.root}/meta, the list of episodes: {prefix} of episode {number}"):
            return self.root / self.info[kind].format(
                video_key=film,
                # In v3.0, a file holds several episodes.
                chunk_index=episode.get(f"{prefix}/chunk_index"),
                file_index=episode.get(f"{prefix}/file_index"),
                # In v2.0 and v2.1, it holds one.
                episode_chunk=number // int(self.info.get("chunks_size") or 1000),
                episode_index=number,
            )

    def start_in_film(self, episode: dict, film: str) -> float:
        """Seconds at which the film of an episode begins in its file."""
        return episode.get(f"videos/{film}/from_timestamp") or 0

    def without(self, number: int) -> str:
        """What to type to read the set without an episode."""
        left = [other for other in self.numbers if other != number]
        return f"; to leave the episode out, add --episodes={write_spans(left)}" if left else ""


def plan_episodes(cfg: Config) -> tuple[list, dict, int]:
    """Check the data set --lerobot against the options.

    -> shards ("lerobot", name of its episodes, first, number, source of read_episodes); cameras, motors,
    state, fps, fit and convention of the finished meta.json; number of pictures.
    """
    found, common = open_set(cfg)
    check_lists(found)
    check_units(cfg, found)
    episodes = found.episodes
    # --fps keeps the first frame of every episode, so a short one counts for one at least.
    frames = sum(math.ceil(episode["length"] / found.stride) for episode in episodes)
    pictures = frames * len(found.cameras)
    # Episodes of mean length that fill a shard.
    n = max(1, SHARD_BYTES * len(episodes) // (pictures * cfg.image_size**2 * 3))
    shards = []
    for first in range(0, len(episodes), n):
        some = episodes[first : first + n]  # a worker gets the rows of these only
        # A shard is named after its episodes: after a run with other --episodes, what still fits is kept.
        name = f"{zlib.crc32(json.dumps(found.numbers[first : first + n]).encode()):08x}"
        shards.append(("lerobot", name, first, len(some), replace(found, episodes=some)))
    return shards, common, pictures


def open_set(cfg: Config) -> tuple[LeRobotSet, dict]:
    """Find --lerobot and choose what is read of it -> the set, and what meta.json will say of it."""
    root = fetch(cfg.lerobot, ["meta/*"])
    info = read_info(root)
    described = info["features"]
    fps, stride = frame_rate(cfg, root, info)
    # The features are matched before anything large is downloaded.
    features = find_features(cfg, described)
    cameras, depth = match_cameras(cfg, described)
    names, columns, convention = match_motors(cfg, described, features)
    films = []
    fit = ""  # square pictures are neither cropped nor stretched
    for name in cameras.values():
        if described[name]["dtype"] == "video":
            require("av")
            films.append(name)
        if is_oblong(described[name]):
            fit = cfg.fit
    # Films of cameras that nobody asked for are not downloaded.
    root = fetch(cfg.lerobot, ["meta/*", "data/*", *(f"videos/*{name}/*" for name in films)])
    episodes, tasks = read_lists(root, info, films)
    if (root / OURS).is_file():
        # export() wrote the set: its angles are degrees, and its entries of meta.json come back unchanged.
        convention = "as recorded"
        fit = add_entries(root / OURS, episodes, stride)
    common = {"cameras": list(cameras), "motors": names["action"], "fps": round(fps) // stride}
    common |= {"fit": fit, "convention": convention}
    # A set without "state" measures the positions of the motors.
    if names["state"] != names["action"]:
        common["state"] = names["state"]
    episodes, said = choose_episodes(cfg, episodes)
    if depth:
        said += f"; {len(depth)} depth or grey cameras not taken: {', '.join(depth)}"
    if fps != round(fps):
        said += f"; {fps:g} frames per second count as {round(fps)}"
    print(f"{cfg.lerobot}: {len(episodes)} episodes; {cameras}; {common}{said}")
    numbers = [episode["episode_index"] for episode in episodes]
    found = LeRobotSet(
        root, info, fps, stride, features, cameras, films, columns, convention, numbers, episodes, tasks
    )
    return found, common


def read_info(root: Path) -> dict:
    """meta/info.json of a LeRobot data set; UserError names the sets below a folder that is none itself."""
    path = root / "meta" / "info.json"
    if not path.is_file():
        # A folder of sets, or a repository with several of them.
        below = sorted([*root.glob("*/meta/info.json"), *root.glob("*/*/meta/info.json")])
        hint = "a set in a folder of a repository is written USER/SET/FOLDER"
        if below:
            hint = f"these are: {', '.join(str(found.parents[1]) for found in below[:10])}"
        raise UserError(f"{root} is no LeRobot data set, for it has no meta/info.json; {hint}")
    info = read_json(path)
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict):
        raise UserError(f"{path} describes no features; copy or record the set again")
    version = str(info.get("codebase_version"))
    if version[:3] not in ("v2.", "v3."):
        raise UserError(f"{root} has LeRobot's format {version}: convert it with LeRobot to v3.0")
    info["version"] = version[:2]
    for kind, pattern in PATHS[info["version"]].items():
        info[kind] = info.get(kind) or pattern
    return info


def frame_rate(cfg: Config, root: Path, info: dict) -> tuple[float, int]:
    """-> frames per second as recorded, and of how many frames --fps keeps one.

    A rate such as 29.97 counts as the whole number beside it: meta.json and control loops have whole ones.
    """
    said = info.get("fps")
    what = f"{root}/meta/info.json says fps {said!r}, which"
    with check_readable(what, "write the recording's rate there"):
        fps = float(said)  # some write 30.0 or "30"
    if not 0.99 < fps < 10_000 or abs(fps - round(fps)) > 0.01 * fps:
        raise UserError(
            f"{root}/meta/info.json says fps {said!r}; write the recording's rate there, a whole number of "
            "frames per second, or convert the set to one"
        )
    whole = round(fps)
    if cfg.fps and whole % cfg.fps:
        fitting = [n for n in range(1, whole + 1) if whole % n == 0]
        raise UserError(
            f"{cfg.lerobot} has {fps:g} frames per second; choose an --fps that divides them: "
            f"{str(fitting)[1:-1]}"
        )
    return fps, whole // (cfg.fps or whole)


def find_features(cfg: Config, features: dict) -> dict:
    """--rename and meta/info.json -> {"state", "action" and what else is there: their feature}."""
    known = FEATURES | BESIDE
    # The first of these names that is there counts, unless --rename says otherwise.
    there = [name for name in SUCCESS if name in features]
    renamed = {"next.success": there[0]} if there else {}
    for word in filter(None, cfg.rename.split(",")):
        ours, _, theirs = word.partition("=")
        # "next.success=" reads no such feature.
        if ours not in known.values() or (theirs and theirs not in features):
            raise UserError(
                f"--rename: {word!r} must be NAME=THEIRS with NAME from {', '.join(known.values())} and "
                f"THEIRS from {', '.join(features)}"
            )
        renamed[ours] = theirs
    found = {}
    for kind, name in known.items():
        theirs = renamed.get(name, name)
        if theirs in features:
            found[kind] = theirs
        elif kind in FEATURES:
            raise UserError(
                f"{cfg.lerobot} has no {name}; it has {', '.join(features) or 'none'}: add "
                f"--rename={name}=NAME with its name there"
            )
    return found


# -----------------------------------------------------------------------------------------------------------
# The list of episodes


def read_lines(path: Path) -> list[dict]:
    """A file with a JSON object a line; UserError names the line that is none."""
    rows = []
    with check_readable(path):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            with check_readable(f"{path}, line {number},", "delete it if the recording was cut off there"):
                rows.append(dict(json.loads(line)))
    return rows


def read_lists(root: Path, info: dict, films: list) -> tuple[list, dict]:
    """The rows of the episodes in their order, and the texts of the tasks by number."""
    meta = root / "meta"
    if info["version"] == "v3":
        # Without the many columns of statistics.
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index", *SUCCESS]
        for name in films:
            columns += [f"videos/{name}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
        rows = read_parquet(meta / "episodes", columns).to_pylist()
        tasks = read_parquet(meta / "tasks.parquet").to_pylist()
    else:
        rows = read_lines(meta / "episodes.jsonl")
        tasks = read_lines(meta / "tasks.jsonl")
    if not rows:
        raise UserError(f"{root} is empty: it has no episode")
    with check_readable(f"{meta}, the list of episodes"):
        for row in rows:
            for key, value in row.items():
                # Tables that had an empty cell give whole numbers as floats.
                if isinstance(value, float) and value.is_integer():
                    row[key] = int(value)
        rows.sort(key=lambda row: int(row["episode_index"]))
    for row, after in pairwise(rows):
        number = row["episode_index"]
        if number == after["episode_index"]:
            raise UserError(f"{meta}: the list of episodes has episode {number} twice; delete one of them")
    texts = {}
    for row in tasks:
        # In v3.0, the text is the index of a pandas frame, which may have another name or none.
        cells = (row.get("task"), *row.values())
        texts[row.get("task_index")] = next((cell for cell in cells if isinstance(cell, str)), "")
    return rows, texts


def check_lists(found: LeRobotSet) -> None:
    """UserError where an episode has no frames, or two have the same ones of a film by a wrong file index."""
    spans = []  # (film, begin, end, episode)
    for episode in found.episodes:
        number = episode["episode_index"]
        length = episode["length"]
        if not isinstance(length, int) or length < 1:
            raise UserError(
                f"{found.root}/meta gives episode {number} {length} frames{found.without(number)}"
            )
        for feature in found.films:
            begin = found.start_in_film(episode, feature)
            end = begin + (length - 0.5) / found.fps  # half a frame is left for rounding
            spans.append((str(found.path(episode, feature)), begin, end, number))
    spans.sort()
    for (film, _, end, one), (other_film, begin, _, other) in pairwise(spans):
        if film == other_film and begin < end:
            raise UserError(
                f"{found.root}/meta gives episodes {one} and {other} the same frames of {film}"
                f"{found.without(other)}"
            )


def add_entries(path: Path, episodes: list, stride: int) -> str:
    """Give episodes that export() wrote their "entry" of meta.json -> the set's own "fit"."""
    ours = read_json(path)
    # LeRobot's own tools may have cut, split or merged the set since.
    lengths = [episode["length"] for episode in episodes]
    if stride > 1 or [entry["length"] for entry in ours["episodes"]] != lengths:
        raise UserError(
            f"{path} describes other frames, as --fps or LeRobot changed them; delete that file "
            "to read the set like any other"
        )
    for episode, entry in zip(episodes, ours["episodes"]):
        episode["entry"] = entry
    return ours.get("fit", "")


def choose_episodes(cfg: Config, episodes: list) -> tuple[list, str]:
    """-> those of --episodes, as in "0-9,12", and words about the others."""
    if not cfg.episodes:
        return episodes, ""
    spans = []
    for word in cfg.episodes.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", word.strip())
        # Ranges, not lists: a typed 0-99999999999 must not fill the memory.
        span = range(int(found[1]), int(found[2] or found[1]) + 1) if found else ()
        if not span:
            raise UserError(
                f"--episodes={cfg.episodes}: {word!r} is no span; write it as in --episodes=0-9,12"
            )
        spans.append(span)
    chosen = []
    numbers = []
    rest = []
    for episode in episodes:
        number = episode["episode_index"]
        numbers.append(number)
        if any(number in span for span in spans):
            chosen.append(episode)
        else:
            rest.append(number)
    if not chosen or max(span[-1] for span in spans) > numbers[-1]:
        raise UserError(f"--episodes={cfg.episodes}: {cfg.lerobot} has episodes {write_spans(numbers)}")
    return chosen, f"; left out by --episodes: {len(rest)} episodes ({write_spans(rest) or 'none'})"


def write_spans(numbers: list[int]) -> str:
    """Rising numbers as --episodes has them: [0, 1, 2, 5] -> "0-2,5"."""
    spans = []
    # Numbers without a gap differ from their positions by the same amount.
    for _, span in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in span]
        spans.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ",".join(spans)


# -----------------------------------------------------------------------------------------------------------
# Cameras

# A word that begins or ends so: depth.front, front_depth, frontDepth, depthmap.
DEPTH = re.compile(r"(?<![A-Za-z])(?i:depth|disparity)|Depth|Disparity|(?i:depth)(?![A-Za-z])")


def is_depth(name: str, feature: dict) -> bool:
    """Does a feature hold something else than colour pictures: depth, or a single channel?"""
    # Versions and tools describe pictures in different places, some with a prefix.
    told = {}
    for place in (feature, feature.get("info"), feature.get("video_info")):
        for key, value in (place or {}).items():
            told[key.removeprefix("video.")] = value
    for key in ("is_depth_map", "is_depth", "depth_map", "depth"):
        if str(told.get(key)).lower() in ("true", "1"):
            return True
    # Height and width alone, or one channel, which stands first or last.
    shape = feature.get("shape") or [0, 0, 3]
    if len(shape) == 2 or 1 in (shape[0], shape[-1], told.get("channels")):
        return True
    if str(told.get("pix_fmt")).startswith("gray"):
        return True
    return bool(DEPTH.search(name))


def is_oblong(feature: dict) -> bool:
    """Are the pictures of a feature other than square, or of unknown size?"""
    sides = sorted(feature.get("shape") or [0, 1])[-2:]  # without the channels
    return len(set(sides)) > 1


def last_word(name: str) -> str:
    """What a camera is called for short: observation.images.top -> top."""
    return re.split("[./]", name)[-1]


def name_cameras(features: list) -> dict:
    """{role: feature}: the last word of its name, or more of it where two have the same last word."""
    count = Counter(map(last_word, features))
    roles = {}
    for name in features:
        word = last_word(name)
        if count[word] > 1 or word in FEATURES:
            word = name.removeprefix("observation.").removeprefix("images.")
        role = re.sub(r"\W+", "_", word)
        # A role becomes the name of a file, beside state.npy and action.npy.
        while role in roles or role in FEATURES:
            role += "_"
        roles[role] = name
    return roles


def find_camera(word: str, features: list) -> list:
    """Features that a word names: its full name, the role that it has by default, or the end of its name."""
    roles = name_cameras(features)
    if word in features or word in roles:
        return [roles.get(word, word)]
    return [name for name in features if f".{name}".replace("/", ".").endswith(f".{word}".replace("/", "."))]


def match_cameras(cfg: Config, features: dict) -> tuple[dict, list]:
    """--cameras, by default all that show colours -> {role: feature}, and depth that is not taken."""
    colour = []
    depth = []
    for name, feature in features.items():
        if feature.get("dtype") in ("image", "video"):
            kind = depth if is_depth(name, feature) else colour
            kind.append(name)
    there = ", ".join(colour + depth)
    roles = {} if cfg.cameras else name_cameras(colour)
    for word in filter(None, cfg.cameras.split(",")):
        # "front=top" and "top" are words of --cameras.
        role, _, name = word.rpartition("=")
        role = role or re.sub(r"\W+", "_", last_word(name))
        # A name that fits a colour camera and its depth means the colours.
        found = find_camera(name, colour) or find_camera(name, depth)
        if len(found) != 1 or not re.fullmatch(r"\w+", role) or role in FEATURES or role in roles:
            what = "does not give a camera of its own a simple name"
            if len(found) > 1:
                what = f"may be any of {', '.join(found)}"
            raise UserError(
                f"--cameras: {word!r} {what}; write --cameras=front=NAME,wrist=NAME with names from {there}"
            )
        roles[role] = found[0]
    if not roles:
        raise UserError(
            f"{cfg.lerobot} has no camera with colours; name one with --cameras=front=NAME, of "
            f"{there or 'which it has none'}"
        )
    return roles, sorted(set(depth).difference(roles.values()))


# -----------------------------------------------------------------------------------------------------------
# Joints


def match_motors(cfg: Config, features: dict, found: dict) -> tuple[dict, dict, str]:
    """-> names of the numbers of "state" and "action", their columns in the recording, the convention.

    The joints of an SO arm come in the order of MOTORS and are converted to degrees; all else stays as it is.
    """
    names = {}  # as recorded
    joints = {}  # the same without the decoration of LeRobot's versions
    for kind in FEATURES:
        names[kind] = number_names(features[found[kind]], kind)
        joints[kind] = [name.removeprefix("main_").removesuffix(".pos") for name in names[kind]]
    if any(sorted(words) != sorted(MOTORS) for words in joints.values()):
        if cfg.convention != "auto":
            raise UserError(f"--convention is for SO-100 and SO-101 arms, not for {names}; leave it out")
        return names, {kind: list(range(len(words))) for kind, words in names.items()}, "as recorded"
    convention = cfg.convention
    if convention == "auto":
        # The names changed together with the zero, in LeRobot's pull request 777.
        name = names["state"][0]
        if name.startswith("main_"):
            convention = "old"
        elif name.endswith(".pos"):
            convention = "new"
        else:
            raise UserError(
                f"{cfg.lerobot} names its joints {names['state']}, which does not tell their zero: add "
                "--convention=new (the middle of the range) or --convention=old (the arm stretched out)"
            )
    columns = {kind: [words.index(motor) for motor in MOTORS] for kind, words in joints.items()}
    return dict.fromkeys(FEATURES, list(MOTORS)), columns, convention


def number_names(feature: dict, kind: str) -> list:
    """A name for each number of a feature; state_0, state_1, ... where the set has none, or one for all."""
    n = int(np.prod(feature.get("shape") or 1))
    # Our lists of names are joined with commas.
    names = [re.sub(r"[,/\\\0]", "_", name).strip() for name in flat_names(feature.get("names"))]
    if len(names) != n or not all(names):
        return [f"{kind}_{i}" for i in range(n)]
    count = Counter(names)
    return [f"{name}_{i}" if count[name] > 1 else name for i, name in enumerate(names)]


def flat_names(names: Any) -> list[str]:
    """Names as sets write them: a list, lists in a list, {"motors": [...]}, or {name: column}."""
    if isinstance(names, dict):
        values = list(names.values())
        if all(isinstance(value, int) for value in values):
            return sorted(names, key=names.get)
        nested = any(isinstance(value, (list, dict)) for value in values)
        numbered = all(key.isdigit() for key in names)  # {"0": name}
        names = values if nested or numbered else list(names)  # or {name: unit}
    if isinstance(names, list):
        return sum(map(flat_names, names), [])
    return [] if names is None else [str(names)]


# Degrees from the middle of the range that no SO arm exceeds, even if it is calibrated badly.
REACH = np.array([150, 135, 135, 150, 200])
TURN = 4095  # servo steps of 360 degrees, as LeRobot counts
# Servo steps of a joint of an SO-100, by its drawings. LeRobot gives wrist_roll the whole turn.
NOMINAL = np.append((HIGH - LOW)[:4] / 360 * TURN, TURN)


def to_degrees(recorded: ndarray, convention: str, calibration: str) -> ndarray:
    """Joints (n, 6) in the order of MOTORS -> degrees about the middle of each range, gripper 0 .. 100."""
    values = recorded.copy()
    if convention == "old":  # zero with the arm stretched out horizontally
        values[:, 1] = 90 - values[:, 1]
        values[:, 2] -= 90
    if convention == "percent":
        # -100 .. 100 per cent are the range in servo steps.
        values[:, :5] *= (servo_steps(calibration) / 200 * 360 / TURN).astype(np.float32)
    return values


def servo_steps(calibration: str) -> ndarray:
    """Servo steps of the range of five joints, by a calibration file of LeRobot, or nominal without one."""
    if not calibration:
        return NOMINAL
    arm = read_json(calibration)
    with check_readable(f"{calibration}, a calibration file of LeRobot,"):
        return np.array([arm[motor]["range_max"] - arm[motor]["range_min"] for motor in MOTORS[:5]])


def check_reach(recorded: ndarray, convention: str, place: str) -> None:
    """UserError for angles that the arm cannot have: their convention is another than their names say."""
    possible = []  # conventions under which the arm can have all these angles
    for name in ("new", "old"):
        if (np.abs(to_degrees(recorded, name, "")[:, :5]) <= REACH).all():
            possible.append(name)
    if convention not in possible:
        hint = "they may be raw servo positions: record with LeRobot's use_degrees"
        if possible:
            hint = f"they fit the other convention: add --convention={possible[0]}"
        raise UserError(f"{place} holds joint angles that the arm cannot have; {hint}")


def check_units(cfg: Config, found: LeRobotSet) -> None:
    """UserError where joints of an SO arm are per cent by the look of their first episodes.

    A line about what --convention=percent takes for 100 % where no --calibration says it.
    """
    if found.convention == "percent":
        half = np.round(servo_steps(cfg.calibration) / 2 * 360 / TURN, 1)  # degrees, (5,)
        nominal = "the nominal range of an SO-100; --calibration=FILE of the recording arm is more exact"
        known = dict(zip(MOTORS, half.tolist()))
        print(f"100 % count as {known} degrees, by {cfg.calibration or nominal}")
    if cfg.convention != "auto" or found.convention != "new":
        return
    # Old sets and raw servo positions show in their angles, see check_reach(). Per cent do not.
    parts = []  # (frames, 5)
    feature = found.features["state"]
    for episode in found.episodes[:5]:
        # What is wrong with an episode is said when it is read.
        with contextlib.suppress(UserError):
            values = numbers_of(read_rows(found, episode, [feature]), feature, len(MOTORS), "")
            parts.append(values[:500, found.columns["state"][:5]])
    if parts and looks_like_percent(parts):
        raise UserError(
            f"{cfg.lerobot} holds joint positions that look like per cent, not degrees (LeRobot's "
            "use_degrees=False): add --convention=percent, best with --calibration=FILE of the recording "
            "arm, or --convention=new if they are degrees"
        )


def looks_like_percent(parts: list[ndarray]) -> bool:
    """Are these joint positions (n, 5) of some episodes per cent of each joint's range?

    Servos report whole steps. In degrees, a step is the same for all joints; in per cent, it depends on the
    range of the joint. And LeRobot clips per cent at 100.
    """

    def whole(steps: ndarray) -> ndarray:
        return np.abs(steps - np.round(steps)) < 0.03

    values = np.abs(np.concatenate(parts))  # (frames, 5)
    if values.max() > 100:
        return False
    if (values == 100).any(0).sum() >= 2:  # two joints were clipped at their end
        return True
    motion = np.concatenate([np.diff(part, axis=0) for part in parts])  # (frames, 5)
    if whole(motion * TURN / 360).all():  # whole steps of degrees
        return False
    # Here the steps differ by joint, or the numbers were made without a servo.
    ranges = np.arange(1000, TURN + 1)  # possible ranges of a joint in servo steps, (R,)
    fits = []  # of each joint that moves: is its motion in whole steps of that range?
    for joint in motion.T:
        joint = joint[joint != 0][:300]
        if len(joint) >= 20:
            fits.append(whole(joint[:, None] * ranges / 200).mean(0) > 0.95)  # (R,)
    # Rounded numbers fit one range for all joints, degrees that of 200 degrees.
    return len(fits) > 1 and all(map(np.any, fits)) and not np.all(fits, axis=0).any()


# -----------------------------------------------------------------------------------------------------------
# The frames of an episode


def read_episodes(cfg: Config, shard: Shard) -> Iterator[Scene]:
    """Of every episode {camera: (n, px, px, 3) uint8, "state" (n, S), "action" (n, A)}, entries of meta.json,
    and a line if it was left out or has a late frame.

    px: cfg.image_size. UserError names the file and the episode that cannot be used.
    """
    for episode in shard.source.episodes:
        try:
            yield read_episode(cfg, shard.source, episode)
        except UserError as error:
            raise UserError(f"{error}{shard.source.without(episode['episode_index'])}") from None


def read_episode(cfg: Config, source: LeRobotSet, episode: dict) -> Scene:
    """The kept frames of an episode, see read_episodes().

    An episode that changes its task has several entries, one that lacks frames has none.
    """
    index = episode["episode_index"]
    length = episode["length"]
    place = f"{source.path(episode)}, episode {index}"
    # Only these columns are read from disk: pictures are most of a file.
    columns = {*source.features.values(), *source.cameras.values()} - {*source.films}
    table = read_rows(source, episode, list(columns))
    begin, late, lost = check_clock(source, table, place)
    notes = []
    if late:
        notes.append(f"episode {index}: {'left out, ' * int(lost)}{late}")
    if lost:
        return {}, [], notes
    kept = range(0, length, source.stride)
    # A command holds until the next picture. The last one given meanwhile says where the arm was sent.
    last = np.minimum(np.array(kept) + source.stride, length) - 1  # (kept,)
    arrays = {}
    for kind, rows in (("state", kept), ("action", last)):
        columns = source.columns[kind]
        recorded = numbers_of(table, source.features[kind], len(columns), place)[rows][:, columns]
        arrays[kind] = recorded  # (kept, S or A)
        if source.convention != "as recorded":
            arrays[kind] = to_degrees(recorded, source.convention, cfg.calibration)
            if cfg.convention == "auto":
                check_reach(recorded, source.convention, place)
    good = succeeded(source, episode, table)  # any frame may tell, also one that is not kept
    table = table.take(list(kept))
    common = {"success": good, "seed": index, "family": Path(cfg.out).name, "kind": "demo", "disturbed": []}
    entries = [episode["entry"]] if "entry" in episode else make_entries(source, table, common, place)
    for role, feature in source.cameras.items():
        if feature in source.films:
            at = begin + source.start_in_film(episode, feature)
            film = source.path(episode, feature)
            with check_readable(f"{film}, episode {index},"):
                pictures = read_film(cfg, film, at, source.fps, kept)
        else:
            pictures = []
            with check_readable(f"{place}, a picture of {role}"):
                for cell in table[feature].to_pylist():
                    picture = open_picture(cell, source.root)
                    pictures.append(resize_image(picture, cfg.image_size, cfg.fit))
        arrays[role] = np.stack(pictures)  # (kept, px, px, 3)
    return arrays, entries, notes


def read_rows(source: LeRobotSet, episode: dict, columns: list) -> Any:
    """The rows of an episode as a pyarrow.Table."""
    index = episode["episode_index"]
    length = episode["length"]
    path = source.path(episode)
    mine = [("episode_index", "=", index)]
    table = []
    one_each = source.info["version"] == "v2"  # a file holds one episode
    if one_each or path.is_file():
        table = read_parquet(path, columns, mine)
    if not one_each and len(table) < length:
        # The list of episodes names the wrong file: the rows themselves know their episode.
        table = read_parquet(source.root / "data", columns, mine)
    missing = sorted(set(columns).difference(table.column_names))
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}, which meta/info.json describes")
    if len(table) != length:
        raise UserError(
            f"{path}, episode {index}: the file holds {len(table)} of the {length} frames that the list of "
            "episodes gives it"
        )
    return table


def numbers_of(table: Any, feature: str, n: int, place: str) -> ndarray:
    """A column of numbers, or of nested lists of such -> (frames, n) float32, all of them finite."""
    rows = []
    with check_readable(f"{place}: {feature}"):
        for number, cell in enumerate(table[feature].to_pylist()):
            row = np.array(cell, np.float32).ravel()  # an empty cell becomes NaN
            if len(row) != n or not np.isfinite(row).all():
                raise UserError(f"{place}, frame {number}: {feature} is {cell}, not {n} finite numbers")
            rows.append(row)
    return np.stack(rows)


def check_clock(source: LeRobotSet, table: Any, place: str) -> tuple[float, str, bool]:
    """-> seconds at which the episode begins in its film, words about a frame that comes late, and whether
    frames are lost there.

    Rows and films go frame by frame, so a clock that stumbles is no harm; another rate is.
    """
    feature = source.features.get("time")
    if feature is None or len(table) < 2:
        return 0, "", False
    times = numbers_of(table, feature, 1, place)[:, 0].astype(np.float64)  # (frames,) seconds
    steps = np.diff(times) * source.fps  # (frames - 1,) in frames
    median = np.median(steps)  # the mean would move with one late frame
    if abs(median - 1) > 0.05:
        rate = source.fps / max(median, 1e-9)
        raise UserError(
            f"{place} was recorded at {rate:.4g} frames per second, meta/info.json says {source.fps:g}; "
            'write the right "fps" there'
        )
    # Time stamps count from the first frame of the film. Rounding takes the jitter of the clock away.
    begin = round(times[0] * source.fps) / source.fps
    off = np.abs(steps - 1)  # (frames - 1,)
    if off.max() < 0.25:
        return begin, "", False
    first = (off > 0.25).argmax()
    late = f"frame {first + 1} comes {1000 * steps[first] / source.fps:.0f} ms after the one before"
    return begin, late, off.max() >= 1


def make_entries(source: LeRobotSet, table: Any, common: dict, place: str) -> list[dict]:
    """What meta.json says of kept frames: an entry for each stretch with the same task."""
    features = source.features
    tasks = np.zeros(len(table), int)
    if "task" in features:
        tasks = numbers_of(table, features["task"], 1, place)[:, 0].astype(int)
    texts = [""] * len(table)
    # As export() writes it: the reasoning that holds at each frame.
    if source.info["features"].get(features.get("reason"), {}).get("dtype") == "string":
        texts = table[features["reason"]].to_pylist()
    entries = []
    changes = np.flatnonzero(np.diff(tasks)) + 1  # frames at which another task begins
    for start, end in pairwise([0, *changes.tolist(), len(tasks)]):
        words = source.tasks.get(tasks[start]) or ""
        if not words.strip():
            raise UserError(
                f"{place}: its task is number {tasks[start]}, which has no text in "
                f"{source.root}/meta/tasks.*; write the instruction there"
            )
        reason = []
        said = ""
        for step, text in enumerate(texts[start:end]):
            if (text or "") != said:
                said = text or ""
                reason.append([step, said])
        entries.append({"length": end - start, "task": words, "reason": reason} | common)
    return entries


def succeeded(source: LeRobotSet, episode: dict, table: Any) -> bool:
    """Did an episode succeed, by its frames and by the list of episodes? Where nothing is said, it did."""
    told = [is_true(episode[name]) for name in SUCCESS if episode.get(name) is not None]
    if "success" in source.features:
        cells = table[source.features["success"]].drop_null().to_pylist()
        told += [any(map(is_true, cells))] if cells else []
    return all(told)


def is_true(cell: Any) -> bool:
    """A bool as tables hold it: true, 1.0, [true], "success"."""
    if isinstance(cell, str):
        return cell.strip().lower() in ("true", "yes", "success", "1")
    return bool(np.nan_to_num(np.array(cell, np.float32)).any())


def open_picture(cell: Any, root: Path) -> Image.Image:
    """A picture of a parquet file, in RGB: {"bytes", "path"}, bytes, a file's path, or rows of pixels."""
    if isinstance(cell, list):
        return to_rgb(Image.fromarray(np.array(cell, np.uint8)))
    if not isinstance(cell, dict):
        cell = {"path": cell} if isinstance(cell, str) else {"bytes": cell}
    file = io.BytesIO(cell["bytes"]) if cell.get("bytes") else root / cell["path"]
    with warnings.catch_warnings():
        # Pillow refuses the hugest pictures and only warns of huge ones.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as picture:
            return to_rgb(picture)


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture as a person sees it: upright, on white where it is transparent, 16 bits as 8."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF":  # I: whole numbers, F: floats up to 1 or up to 255
        grey = np.nan_to_num(np.asarray(picture))
        if picture.mode != "F":
            grey = grey / 257
        elif grey.max() <= 1:
            grey = grey * 255
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("RGB")


def read_film(cfg: Config, path: Path, begin: float, fps: float, kept: range) -> list[ndarray]:
    """The kept frames of the episode that begins so many seconds into a film, (px, px, 3) uint8 each."""
    pictures = {}  # frame of the episode -> (px, px, 3)
    with require("av").open(str(path)) as film:
        stream = film.streams.video[0]
        # Some films begin later than at 0.
        begin += float((stream.start_time or 0) * stream.time_base)
        # Decoding starts at the key frame before the episode, with frames of the episode before.
        film.seek(max(0, int((begin - 0.5 / fps) / stream.time_base)), stream=stream)
        for frame in film.decode(stream):
            at = (frame.time - begin) * fps
            # Neighbouring frames lie at -1 and 1; a quarter allows for the rounding of time stamps.
            if round(at) in kept and abs(at - round(at)) < 0.25:
                pictures[round(at)] = resize_image(frame.to_image(), cfg.image_size, cfg.fit)
            # What follows belongs to the next episodes.
            if at > kept[-1] - 0.5:
                break
    if len(pictures) < len(kept):
        raise ValueError(
            f"it ends early or has another frame rate than {fps:g}: {len(pictures)} of {len(kept)} frames "
            f"are found from {begin:.2f} s on"
        )
    return [pictures[frame] for frame in kept]


# -----------------------------------------------------------------------------------------------------------
# Image-text sets in, such as those of HuggingFaceM4/the_cauldron. A row has "images", a list of pictures, and
# "texts", a list of {"user", "assistant", "source"}.


def plan_questions(cfg: Config, camera: str) -> list[tuple]:
    """Choose row groups of --questions_from in random order: the first for the held-out test.

    -> shards (kind, name, first row, rows, source of read_questions).
    """
    parquet = require("pyarrow.parquet", "pyarrow")
    blocks = []  # name, number of rows, source
    for i, path in enumerate(find_parquet_files(cfg)):
        with check_readable(path):
            file = parquet.ParquetFile(path)
        if not {"images", "texts"}.issubset(file.schema_arrow.names):
            raise UserError(f"{path} is no image-text set: it has no columns images and texts")
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            blocks.append((f"{i:04d}-{group:05d}", rows, (path, group, camera)))
    shards = []
    # Held-out pictures come from other row groups than training, but for the one in which they end.
    wanted = {"questions_val": cfg.held_out_scenes, "questions": cfg.scenes}
    for k in np.random.default_rng(cfg.seed).permutation(len(blocks)):
        name, rows, source = blocks[k]
        first = 0
        for kind in wanted:
            n = min(wanted[kind], rows - first)
            if n > 0:
                shards.append((kind, name, first, n, source))
                wanted[kind] -= n
                first += n
    if wanted["questions"] == cfg.scenes:
        raise UserError(
            f"{cfg.questions_from} has no more pictures than are held out, which leaves none to train on; "
            "lower --held_out_scenes or raise --scenes"
        )
    return shards


def find_parquet_files(cfg: Config) -> list[Path]:
    """The files of --questions_from: folders, or names on the hub with or without /PART, comma-separated."""
    files = []
    for name in cfg.questions_from.split(","):
        found = sorted(fetch(name, ["*.parquet"]).rglob("*.parquet"))
        if not found:
            raise UserError(
                f"{name} holds no parquet file; a part of a set on the hub is written USER/SET/PART"
            )
        files += found
    return files


def read_questions(cfg: Config, shard: Shard) -> Iterator[Scene]:
    """Of every row with one readable picture {camera: (1, px, px, 3) uint8, "size" (1, 2) as it came}, its
    list of [kind, question, answer], and what was left out.
    """
    path, group, camera = shard.source  # one row group is the least that parquet reads
    parquet = require("pyarrow.parquet", "pyarrow")
    with check_readable(path):
        table = parquet.ParquetFile(path).read_row_group(group, columns=["images", "texts"])
    for row in table.slice(shard.first, shard.n).to_pylist():
        questions = []
        left_out = []
        for turn in row["texts"] or ():
            turn = turn if isinstance(turn, dict) else {}
            words = [str(turn.get(key) or "").strip() for key in ("user", "assistant")]
            # The model's rows have room for short texts only.
            if all(0 < len(text) <= cfg.longest for text in words):
                questions.append([turn.get("source") or path.parent.name, *words])
            else:
                left_out.append("empty or long questions")
        # One damaged picture of thousands is counted and costs nothing else.
        arrays = {}
        with contextlib.suppress(UserError), check_readable(path):
            (cell,) = row["images"] if questions else ()  # ValueError unless there is exactly one
            picture = open_picture(cell, path.parent)
            image = resize_image(picture, cfg.image_size, cfg.fit)
            arrays = {camera: image[None], "size": np.array([picture.size])}
        if not arrays:
            left_out.append("rows without a question or without exactly one readable picture")
        yield arrays, [questions] if arrays else [], left_out


# -----------------------------------------------------------------------------------------------------------
# LeRobot data sets out, by LeRobot's own writer. It is slow, about 100 frames a second and 50 with films, but
# what it writes is right for the version that is installed.


def export(cfg: Config) -> str:
    """Write the data set --export as a LeRobot data set to --out -> a line about it.

    It grows in <out>.tmp, which gets its name at the end: after a kill, the same command begins anew.
    """
    if Path(cfg.out).exists():
        raise UserError(f"{cfg.out} already exists; delete it or choose another --out")
    meta = read_meta(cfg.export)
    named = FEATURES | {camera: f"observation.images.{camera}" for camera in meta["cameras"]}
    arrays = {name: open_array(cfg.export, name) for name in named}  # mapped: they need not fit in memory
    check_set(cfg.export, meta, arrays)
    episodes = chosen_kinds(cfg, meta["episodes"])
    folder = Path(f"{cfg.out}.tmp")
    ours = folder.with_name(f".{folder.name}")  # there while an export is under way, and after a kill
    if folder.exists() and not ours.is_dir():
        raise UserError(f"{folder} is in the way and is left as it is; choose another --out")
    claim_folder(ours, "prepare.py", create=True)
    shutil.rmtree(folder, ignore_errors=True)  # what a killed export left
    dataset = create_dataset(cfg.video, folder, round(meta["fps"]), describe(cfg, meta, named, arrays))
    for episode in tqdm(episodes, disable=None):
        begin = episode.pop("start")  # its first row in the arrays
        reasoning = dict(episode["reason"])  # step from which a text holds -> text
        text = ""
        for step in range(episode["length"]):
            text = reasoning.get(step, text)
            frame = {feature: arrays[name][begin + step] for name, feature in named.items()}
            # As LeRobot's own recordings have it: the last frame tells of success.
            done = np.array([episode["success"] and step == episode["length"] - 1])
            dataset.add_frame(frame | {"task": episode["task"], "reason": text, "next.success": done})
        dataset.save_episode()
    dataset.finalize()
    # What LeRobot has no words for: kind, family, seed and disturbed steps of the episodes, fit of pictures.
    write_json(folder / OURS, {"fit": meta.get("fit", ""), "episodes": episodes})
    os.replace(folder, cfg.out)
    shutil.rmtree(ours)
    return f"{cfg.out}: {dataset.num_episodes} episodes, {dataset.num_frames} frames as a LeRobot data set"


def describe(cfg: Config, meta: dict, named: dict, arrays: dict) -> dict:
    """The features of the LeRobot data set, as its info.json has them. named: array -> feature."""
    features = {
        "reason": {"dtype": "string", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    for name, feature in named.items():
        kind = "video" if cfg.video else "image"
        names = ["height", "width", "channels"]
        if name in FEATURES:
            kind = "float32"
            # "state": names of its numbers if they are not the motors
            names = meta.get(name) or meta["motors"]
            if names == list(MOTORS):
                names = [f"{motor}.pos" for motor in MOTORS]  # by this, LeRobot and we know the zero
        features[feature] = {"dtype": kind, "shape": arrays[name].shape[1:], "names": names}
    return features


def chosen_kinds(cfg: Config, episodes: list) -> list:
    """The episodes of --kinds, by default all."""
    kinds = {episode.get("kind", "demo") for episode in episodes}
    wanted = set(cfg.kinds.split(",")) if cfg.kinds else kinds
    if not wanted <= kinds:
        raise UserError(f"--kinds={cfg.kinds}: {cfg.export} has episodes of kind {', '.join(sorted(kinds))}")
    return [episode for episode in episodes if episode.get("kind", "demo") in wanted]


def create_dataset(video: str, folder: Path, fps: int, features: dict) -> Any:
    """LeRobotDataset.create() of LeRobot 0.4 or 0.6, which choose the codec in different ways."""
    # The AV1 encoder and the datasets package would write lines for every episode.
    os.environ |= {"SVT_LOG": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    create = require("lerobot.datasets.lerobot_dataset", "'lerobot[dataset]'").LeRobotDataset.create
    options = {}
    if video:
        options["vcodec"] = video.replace("av1", "libsvtav1")
        if "rgb_encoder" in inspect.signature(create).parameters:
            options = {"rgb_encoder": require("lerobot.configs.video").RGBEncoderConfig(**options)}
    return create("local/set", fps, features, root=folder, use_videos=bool(video), **options)
