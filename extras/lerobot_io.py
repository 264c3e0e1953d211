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
import importlib
import io
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path
import numpy as np
from PIL import Image
from sim_env import (
    MOTORS,
    square,
)


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
