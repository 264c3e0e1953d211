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
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

from common import UserError, read_json, require, write_json
from data import read_meta
from sim_env import MOTORS, resize_image

Config = Any  # prepare.PrepareConfig: prepare imports this file, so this one cannot import prepare
FEATURES = {"state": "observation.state", "action": "action"}  # our array -> LeRobot's feature
OURS = "meta/nanosyvla.json"  # export() keeps there what LeRobot has no words for
SHARD_BYTES = 1 << 26  # pictures in a shard, about


@contextlib.contextmanager
def naming(place: Any) -> Iterator[None]:
    """Turn the errors of libraries that read a file into a UserError that names the place."""
    try:
        yield
    except UserError:
        raise
    # What pyarrow, PyAV and Pillow raise about damaged files is derived from these.
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{place} is missing or damaged ({reason:.200}); download it again") from None


def read_parquet(path: Path, **choice: Any) -> Any:
    """A parquet file, or a folder of such, as a pyarrow.Table. choice: columns, filters."""
    parquet = require("pyarrow.parquet", "pyarrow")
    with naming(path):
        return parquet.read_table(path, **choice)


def fetch(name: str, patterns: list) -> Path:
    """A folder as it is, or the matching files of a data set on the hub. Its cache resumes downloads."""
    if Path(name).is_dir():
        return Path(name)
    hub = require("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (OSError, hub.errors.HFValidationError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise UserError(
            f"there is no folder {name}, and the hub has no public data set of that name or cannot be "
            "reached (for a private one type: hf auth login)"
        ) from None


# -----------------------------------------------------------------------------------------------------------
# LeRobot data sets in


@dataclass
class LeRobotSet:
    """A LeRobot data set and how to read it. A shard is a copy with some of the episodes."""

    root: Path
    info: dict  # meta/info.json
    cameras: dict  # role -> feature
    films: list  # those features among the cameras that are stored as films
    columns: dict  # of "state" and "action": where the recording has our numbers
    convention: str  # of joint angles: new, old, percent, or "as recorded": not to be converted
    stride: int  # one of so many frames is kept
    episodes: list[dict]  # rows of meta/episodes; "entry" is that of meta.json if export() wrote the set
    tasks: dict  # number -> text

    def path(self, episode: dict, film: str = "") -> Path:
        """The file with the rows of an episode, or with its film of a feature."""
        pattern = self.info["video_path" if film else "data_path"]
        prefix = f"videos/{film}" if film else "data"
        return self.root / pattern.format(
            video_key=film,
            # In v3.0, a file holds several episodes.
            chunk_index=episode.get(f"{prefix}/chunk_index"),
            file_index=episode.get(f"{prefix}/file_index"),
            # In v2.0 and v2.1, it holds one.
            episode_chunk=episode["episode_index"] // self.info["chunks_size"],
            episode_index=episode["episode_index"],
        )


def plan_episodes(cfg: Config) -> tuple[list, dict, int]:
    """Check the data set --lerobot against the options.

    -> shards ("lerobot", "episodes", first episode, number, source of read_episodes); cameras, motors, state,
    fps and convention of the finished meta.json; number of pictures.
    """
    root = fetch(cfg.lerobot, ["meta/*"])
    info = read_json(root / "meta" / "info.json")
    fps = info["fps"]
    if cfg.fps and fps % cfg.fps:
        raise UserError(f"{cfg.lerobot} has {fps} frames per second; choose an --fps that divides them")
    stride = fps // (cfg.fps or fps)
    # The features are matched before anything large is downloaded.
    cameras = match_cameras(cfg, info["features"])
    films = [name for name in cameras.values() if info["features"][name]["dtype"] == "video"]
    names, columns, convention = match_motors(cfg, info["features"])
    # Films of cameras that nobody asked for are not downloaded.
    root = fetch(cfg.lerobot, ["meta/*", "data/*", *(f"videos/*{name}/*" for name in films)])
    episodes, tasks = read_lists(root / "meta", info["codebase_version"], films)
    if (root / OURS).is_file():
        # export() wrote the set: its angles are degrees, and its entries of meta.json come back unchanged.
        convention = "as recorded"
        entries = read_json(root / OURS)["episodes"]
        lengths = [episode["length"] for episode in episodes]
        if stride > 1 or [entry["length"] for entry in entries] != lengths:
            raise UserError(
                f"{root / OURS} describes other frames, as --fps or LeRobot changed them; delete that file "
                "to read the set like any other"
            )
        for episode, entry in zip(episodes, entries):
            episode["entry"] = entry
    found = LeRobotSet(root, info, cameras, films, columns, convention, stride, episodes, tasks)
    common = {
        "cameras": list(cameras),
        "motors": names["action"],
        "fps": fps // stride,
        "convention": convention,
    }
    # A set without "state" measures the positions of the motors.
    if names["state"] != names["action"]:
        common["state"] = names["state"]
    print(f"{cfg.lerobot}: {len(episodes)} episodes; {cameras}; {common}")
    pictures = len(cameras) * sum(math.ceil(episode["length"] / stride) for episode in episodes)
    # Episodes of mean length that fill a shard.
    n = max(1, SHARD_BYTES * len(episodes) // (pictures * cfg.image_size**2 * 3))
    shards = []
    # A worker gets the rows of its own episodes only.
    for first in range(0, len(episodes), n):
        some = episodes[first : first + n]
        shards.append(("lerobot", "episodes", first, len(some), replace(found, episodes=some)))
    return shards, common, pictures


def read_lists(meta: Path, version: str, films: list) -> tuple[list, dict]:
    """The rows of the episodes in their order, and the texts of the tasks by number."""
    if version == "v3.0":
        # Without the many columns of statistics.
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for name in films:
            columns += [f"videos/{name}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
        rows = read_parquet(meta / "episodes", columns=columns)
        tasks = read_parquet(meta / "tasks.parquet")
    elif version in ("v2.0", "v2.1"):
        with naming(meta):
            read_lines = require("pyarrow.json", "pyarrow").read_json
            rows = read_lines(meta / "episodes.jsonl")
            tasks = read_lines(meta / "tasks.jsonl")
    else:
        raise UserError(f"{meta.parent} has LeRobot's format {version}: convert it with LeRobot to v3.0")
    if not len(rows):
        raise UserError(f"{meta.parent} is empty: it has no episode")
    # In v3.0, the text is the index of a pandas frame, which may have no name.
    texts = {row["task_index"]: row.get("task", row.get("__index_level_0__")) for row in tasks.to_pylist()}
    return rows.sort_by("episode_index").to_pylist(), texts


def match_cameras(cfg: Config, features: dict) -> dict:
    """--cameras, by default all that there are -> {role: feature}."""
    there = {}  # last word of a feature's name -> feature
    for name, feature in features.items():
        if feature["dtype"] in ("image", "video"):
            there[name.rpartition(".")[2]] = name
    roles = {}
    for word in (cfg.cameras or ",".join(there)).split(","):
        # "front=top" and "top" are words of --cameras; by default all cameras keep their names.
        role, _, name = word.partition("=")
        feature = there.get(name or role, name)
        # A role becomes the name of a file, beside state.npy and action.npy.
        if feature not in there.values() or not re.fullmatch(r"\w+", role) or role in FEATURES:
            raise UserError(
                f"{word!r} does not give a camera of {cfg.lerobot} a simple name; write "
                f"--cameras=front=NAME,wrist=NAME with names from {', '.join(there.values())}"
            )
        roles[role] = feature
    return roles


def match_motors(cfg: Config, features: dict) -> tuple[dict, dict, str]:
    """-> names of the numbers of "state" and "action", their columns in the recording, the convention.

    The joints of an SO arm come in the order of MOTORS and are converted to degrees; all else stays as it is.
    """
    names = {}  # "state" and "action" -> names as recorded
    joints = {}  # the same without the decoration of LeRobot's versions
    for kind, feature in FEATURES.items():
        if feature not in features:
            raise UserError(f"{cfg.lerobot} has no {feature}; it has {', '.join(features)}")
        names[kind] = number_names(features[feature], kind)
        joints[kind] = [name.removeprefix("main_").removesuffix(".pos") for name in names[kind]]
    convention = cfg.convention
    if any(sorted(found) != sorted(MOTORS) for found in joints.values()):
        if convention != "auto":
            raise UserError(f"--convention is for SO-100 and SO-101 arms, not for {names}; leave it out")
        return names, {kind: list(range(len(found))) for kind, found in names.items()}, "as recorded"
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
    columns = {kind: [found.index(motor) for motor in MOTORS] for kind, found in joints.items()}
    return dict.fromkeys(FEATURES, list(MOTORS)), columns, convention


def number_names(feature: dict, kind: str) -> list:
    """A name for each number of a feature; state_0, state_1, ... where the set has none, or one for all."""
    names = feature.get("names")
    n = feature["shape"][0]
    # Some sets write {"motors": [...]}.
    if isinstance(names, dict):
        names = next(iter(names.values()))
    if not isinstance(names, list) or len(names) != n:
        names = [f"{kind}_{i}" for i in range(n)]
    return names


# Degrees from the middle of the range that no SO arm exceeds, even if it is calibrated badly.
REACH = np.array([150, 135, 135, 150, 200])


def to_degrees(recorded: ndarray, convention: str, calibration: str) -> ndarray:
    """Joints (n, 6) in the order of MOTORS -> degrees about the middle of each range, gripper 0 .. 100."""
    values = recorded.copy()
    if convention == "old":  # zero with the arm stretched out horizontally
        values[:, 1] = 90 - values[:, 1]
        values[:, 2] -= 90
    if convention == "percent":
        arm = read_json(calibration)
        with naming(f"{calibration}, a calibration file of LeRobot,"):
            ranges = [arm[motor]["range_max"] - arm[motor]["range_min"] for motor in MOTORS[:5]]
        # -100 .. 100 per cent are the range in servo steps, of which a turn has 4095.
        values[:, :5] *= np.array(ranges, np.float32) / 200 * 360 / 4095
    return values


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


def unit_note(cfg: Config, meta: dict) -> str:
    """A line for whoever made this data set if its angles may be no degrees, or ""."""
    found = meta["statistics"]["state"]
    reach = np.abs([found["min"][:5], found["max"][:5]]).max()
    if cfg.convention != "auto" or meta["convention"] != "new" or reach > 100:
        return ""
    return (
        "note: no joint leaves -100 .. 100, so these may be no degrees but per cent (LeRobot's "
        "use_degrees=False); then add --convention=percent --calibration=FILE\n"
    )


def read_episodes(cfg: Config, source: LeRobotSet) -> tuple[dict, list]:
    """One shard -> {camera: (n, px, px, 3) uint8, "state" (n, S), "action" (n, A)}, entries of meta.json.

    px: cfg.image_size. UserError names the file and the episode that cannot be used.
    """
    parts = []
    entries = []
    for episode in source.episodes:
        arrays, found = read_episode(cfg, source, episode)
        parts.append(arrays)
        entries += found
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, entries


def read_episode(cfg: Config, source: LeRobotSet, episode: dict) -> tuple[dict, list]:
    """The kept frames of an episode. If it changes its task, it gets several entries."""
    index = episode["episode_index"]
    length = episode["length"]
    fps = source.info["fps"]
    path = source.path(episode)
    place = f"{path}, episode {index}"
    columns = {*FEATURES.values(), "timestamp", "task_index", "reason", *source.cameras.values()}
    columns &= source.info["features"].keys() - source.films  # what the parquet files have of these
    table = read_parquet(path, columns=list(columns), filters=[("episode_index", "=", index)])
    if len(table) != length:
        raise UserError(f"{place}: the file holds {len(table)} of the {length} frames; download it again")
    # Films are read by time, so the clock must be that of info.json.
    times = np.array(table["timestamp"]).ravel()  # (length,) seconds
    if np.abs(times - np.arange(length) / fps).max() > 0.25 / fps:
        raise UserError(f"{place} was not recorded at {fps} frames per second, as meta/info.json says")

    kept = range(0, length, source.stride)
    # A command holds until the next picture. The last one given meanwhile says where the arm was sent.
    last = [min(row + source.stride, length) - 1 for row in kept]
    arrays = {}
    for kind, rows in (("state", kept), ("action", last)):
        numbers = np.array(table[FEATURES[kind]].to_pylist(), np.float32)  # (length, all columns)
        recorded = numbers[rows][:, source.columns[kind]]  # (kept, S or A)
        arrays[kind] = recorded
        if not np.isfinite(recorded).all():
            raise UserError(f"{place} holds numbers that are not finite in {kind}; delete it from the set")
        if source.convention != "as recorded":
            arrays[kind] = to_degrees(recorded, source.convention, cfg.calibration)
            if cfg.convention == "auto":
                check_reach(recorded, source.convention, place)

    table = table.take(list(kept))  # of what is left, only the kept rows are needed
    for role, feature in source.cameras.items():
        if feature in source.films:
            begin = episode.get(f"videos/{feature}/from_timestamp", 0)
            arrays[role] = read_film(cfg, source.path(episode, feature), begin, fps, kept)
        else:
            with naming(f"{place}, a picture"):
                pictures = [read_picture(cfg, cell, source.root) for cell in table[feature].to_pylist()]
                arrays[role] = np.stack(pictures)  # (kept, px, px, 3)
    if "entry" in episode:
        return arrays, [episode["entry"]]
    return arrays, make_entries(
        table, source.tasks, {"seed": index, "family": Path(cfg.out).name, "kind": "demo"}
    )


def make_entries(table: Any, tasks: dict, common: dict) -> list[dict]:
    """The entries of meta.json for an episode: one for each stretch of frames with the same task."""
    texts = [""] * len(table)
    if "reason" in table.column_names:  # as export() writes it: the reasoning that holds at each frame
        texts = table["reason"].to_pylist()
    entries = []
    before = None
    for task, text in zip(table["task_index"].to_pylist(), texts):
        if task != before:
            entry = {"length": 0, "task": tasks[task], "reason": [], "success": True, "disturbed": []}
            entries.append(entry | common)
            before = task
            said = ""
        entry = entries[-1]
        if text != said:
            entry["reason"].append([entry["length"], text])
            said = text
        entry["length"] += 1
    return entries


def read_picture(cfg: Config, cell: dict, root: Path) -> ndarray:
    """A picture in a parquet file, {"bytes", "path"}, or without bytes in a file -> (px, px, 3) uint8."""
    file = io.BytesIO(cell["bytes"]) if cell["bytes"] else root / cell["path"]
    with Image.open(file) as picture:
        return resize_image(picture, cfg.image_size, cfg.fit)


def read_film(cfg: Config, path: Path, begin: float, fps: int, kept: range) -> ndarray:
    """Frames of the episode that begins so many seconds into a film -> (kept, px, px, 3) uint8."""
    pictures = {}  # frame of the episode -> (px, px, 3)
    with naming(path), require("av").open(str(path)) as film:
        stream = film.streams.video[0]
        # Decoding starts at the key frame before the episode, with frames of the episode before.
        film.seek(max(0, int((begin - 0.5 / fps) / stream.time_base)), stream=stream)
        for frame in film.decode(stream):
            at = (frame.time - begin) * fps
            # Neighbouring frames lie at -1 and 1; a quarter allows for the rounding of time stamps.
            if round(at) in kept and abs(at - round(at)) < 0.25:
                pictures[round(at)] = resize_image(frame.to_image(), cfg.image_size, cfg.fit)
            if at > kept[-1] - 0.5:
                break
    if len(pictures) < len(kept):
        raise UserError(
            f"{path} ends early or has another frame rate than {fps}: {len(pictures)} of {len(kept)} frames "
            f"are found from {begin:.2f} s on; download it again"
        )
    return np.stack([pictures[frame] for frame in kept])


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
        with naming(path):
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
        repository, part = name, ""
        on_hub = re.fullmatch(r"([^/]+/[^/]+)/(.+)", name)
        if on_hub and not Path(name).is_dir():
            repository, part = on_hub.groups()
        folder = fetch(repository, [str(Path(part, "*.parquet"))]) / part
        found = sorted(folder.rglob("*.parquet"))
        if not found:
            raise UserError(
                f"{name} holds no parquet file; a part of a set on the hub is written USER/SET/PART"
            )
        files += found
    return files


def read_questions(cfg: Config, source: tuple, first: int, n: int) -> tuple[dict, list, Counter]:
    """Rows first .. first + n of a row group.

    -> {camera: (pictures, px, px, 3) uint8}; [kind, question, answer] of each picture; what was left out.
    """
    path, group, camera = source  # one row group is the least that parquet reads
    parquet = require("pyarrow.parquet", "pyarrow")
    with naming(path):
        table = parquet.ParquetFile(path).read_row_group(group, columns=["images", "texts"])
    pictures = []
    texts = []
    left_out = Counter()
    for row in table.slice(first, n).to_pylist():
        questions = []
        for turn in row["texts"] or ():
            words = [(turn[key] or "").strip() for key in ("user", "assistant")]
            # The model's rows have room for short texts only.
            if all(0 < len(text) <= cfg.longest for text in words):
                questions.append([turn.get("source") or path.parent.name, *words])
            else:
                left_out["empty or long questions"] += 1
        try:
            with naming(path):
                (cell,) = row["images"] if questions else ()  # ValueError unless there is exactly one
                pictures.append(read_picture(cfg, cell, path.parent))
            texts.append(questions)
        except UserError:
            left_out["rows without a question or without exactly one readable picture"] += 1
    images = np.array(pictures, np.uint8)  # (pictures, px, px, 3); (0,) if there are none
    return {camera: images.reshape(-1, cfg.image_size, cfg.image_size, 3)}, texts, left_out


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
    arrays = {}  # feature -> (frames, ...), mapped: a set need not fit in memory
    features = {"reason": {"dtype": "string", "shape": (1,), "names": None}}
    for name in ("state", "action", *meta["cameras"]):
        array = np.load(Path(cfg.export, f"{name}.npy"), mmap_mode="r")
        feature = FEATURES.get(name, f"observation.images.{name}")
        arrays[feature] = array
        kind = "video" if cfg.video else "image"
        names = ["height", "width", "channels"]
        if name in FEATURES:
            kind = "float32"
            names = (
                meta.get(name) or meta["motors"]
            )  # "state": names of its numbers if they are not the motors
            if names == list(MOTORS):
                names = [f"{motor}.pos" for motor in MOTORS]  # by this, LeRobot and we know the zero
        features[feature] = {"dtype": kind, "shape": array.shape[1:], "names": names}
    folder = Path(f"{cfg.out}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # what a killed export left
    dataset = create_dataset(cfg.video, folder, meta["fps"], features)
    for episode in tqdm(meta["episodes"], disable=None):
        begin = episode.pop("start")  # its first row in the arrays
        reasoning = dict(episode["reason"])  # step from which a text holds -> text
        text = ""
        for step in range(episode["length"]):
            text = reasoning.get(step, text)
            frame = {feature: array[begin + step] for feature, array in arrays.items()}
            dataset.add_frame(frame | {"task": episode["task"], "reason": text})
        dataset.save_episode()
    dataset.finalize()
    # What LeRobot has no words for: kind, family, seed, success and disturbed steps of the episodes.
    write_json(folder / OURS, {"episodes": meta["episodes"]})
    os.replace(folder, cfg.out)
    return f"{cfg.out}: {dataset.num_episodes} episodes, {dataset.num_frames} frames as a LeRobot data set"


def create_dataset(video: str, folder: Path, fps: int, features: dict) -> Any:
    """LeRobotDataset.create() of LeRobot 0.4 or 0.6, which choose the codec in different ways."""
    # The AV1 encoder and the datasets package would write lines for every episode.
    os.environ |= {"SVT_LOG": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    create = require("lerobot.datasets.lerobot_dataset", "lerobot").LeRobotDataset.create
    options = {}
    if video:
        options["vcodec"] = video.replace("av1", "libsvtav1")
        if "rgb_encoder" in inspect.signature(create).parameters:
            options = {"rgb_encoder": require("lerobot.configs.video").RGBEncoderConfig(**options)}
    return create("local/set", fps, features, root=folder, use_videos=bool(video), **options)
