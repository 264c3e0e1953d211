"""prepare.py with what others recorded: LeRobot data sets in and out, image-text sets in.

Needs pyarrow; films need av. What writes LeRobot sets needs lerobot, in an environment of its own.
"""

import io
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import debug_config
from PIL import Image

import prepare
import train
from data import Episodes, Questions, Tokenizer, statistics
from extras import lerobot_io
from sim_env import MOTORS

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask the network
pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
PX = 32
FPS = 30


@pytest.fixture
def lerobot():
    """LeRobotDataset, and its format's packages; the test is skipped where lerobot is not installed."""
    pytest.importorskip("av")
    return pytest.importorskip("lerobot.datasets.lerobot_dataset").LeRobotDataset


def png(image):
    """A picture as a cell of a parquet file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def write_film(path, pictures, fps):
    """Pictures (n, px, px, 3) -> an mp4 with a key frame at every second one."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="mp4") as film:
        stream = film.add_stream("libx264", rate=fps, options={"g": "2"})
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = pictures.shape[1:3]
        for picture in pictures:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())


def scene(episode, step, view=0):
    """A picture that tells which frame it is: the colour is the episode's, the square's place the step's."""
    image = np.full((PX, PX, 3), 60 + 30 * view, np.uint8)
    image[..., episode % 3] = 160
    image[8:24, 2 * step : 2 * step + 6] = 250
    return image


def joints(rng, n):
    return (rng.uniform(-90, 90, (n, 6)) * [1, 1, 1, 1, 1, 0.5] + [0, 0, 0, 0, 0, 50]).astype(np.float32)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A small data set in our layout with everything that an episode's entry can say."""
    folder, rng = tmp_path_factory.mktemp("ours") / "set", np.random.default_rng(0)
    folder.mkdir()
    lengths = [7, 9, 4, 12]
    episodes = [
        {
            "length": n,
            "task": f"put the cube on pad {i % 3} → ü",
            "reason": [[0, "red at t1"], [2, "done"]] if i != 2 else [],
            "success": i != 2,
            "seed": 40 + i,
            "family": ("place", "sequence")[i % 2],
            "kind": "start" if i == 2 else "demo",
            "disturbed": [[1, 3]] if i == 1 else [],
        }
        for i, n in enumerate(lengths)
    ]
    for i, e in enumerate(episodes):
        e["start"] = sum(lengths[:i])
    for view, camera in enumerate(("front", "wrist")):
        np.save(
            folder / f"{camera}.npy",
            np.concatenate([[scene(i, step, view) for step in range(n)] for i, n in enumerate(lengths)]),
        )
    arrays = {name: joints(rng, sum(lengths)) for name in ("state", "action")}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    stats = {name: statistics(array) for name, array in arrays.items()}
    meta = {
        "cameras": ["front", "wrist"],
        "motors": list(MOTORS),
        "fps": 10,
        "image_size": PX,
        "statistics": stats,
        "episodes": episodes,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def write_set(
    root,
    version="v2.1",
    names=None,
    lengths=(8, 10),
    cameras=("top", "wrist"),
    tasks=("lift", "push"),
    values=None,
    fps=FPS,
    state=None,
    films=False,
):
    """A LeRobot data set with PNG pictures or films as older versions of that project wrote it.

    state: other names for the state, or the feature itself.
    """
    names = names or [f"{motor}.pos" for motor in MOTORS]
    features = {
        name: {"dtype": "float32", "shape": [len(names)], "names": names}
        for name in ("observation.state", "action")
    }
    if state:
        features["observation.state"] |= (
            state if isinstance(state, dict) else {"shape": [len(state)], "names": {"motors": state}}
        )
    features |= {
        f"observation.images.{camera}": {
            "dtype": "video" if films else "image",
            "shape": [PX, PX, 3],
            "names": ["height", "width", "channels"],
        }
        for camera in cameras
    }
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    info = {
        "codebase_version": version,
        "robot_type": "so100",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "chunks_size": 1000,
        "fps": fps,
        "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (root / "meta" / "tasks.jsonl").write_text(
        "\n".join(json.dumps({"task_index": i, "task": task}) for i, task in enumerate(tasks))
    )
    (root / "meta" / "episodes.jsonl").write_text(
        "\n".join(
            json.dumps({"episode_index": i, "tasks": [tasks[i % len(tasks)]], "length": n})
            for i, n in enumerate(lengths)
        )
    )
    rng = np.random.default_rng(1)
    for i, n in enumerate(lengths):
        sizes = (features[name]["shape"][0] for name in ("observation.state", "action"))
        state, action = (
            np.hstack([joints(rng, n)] * 2)[:, :size]
            if values is None
            else np.tile(np.float32(values), (n, 1))
            for size in sizes
        )
        columns = {
            "observation.state": list(state),
            "action": list(action),
            "timestamp": np.float32(np.arange(n) / FPS),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, i),
            "task_index": np.full(n, i % len(tasks)),
        }
        for view, camera in enumerate(cameras):
            pictures = np.array([scene(i, step, view) for step in range(n)])
            if films:
                path = root / "videos" / "chunk-000" / f"observation.images.{camera}" / f"episode_{i:06d}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_film(path, pictures, fps)
            else:
                columns[f"observation.images.{camera}"] = [png(picture) for picture in pictures]
        pq.write_table(pa.table(columns), root / "data" / "chunk-000" / f"episode_{i:06d}.parquet")
    return root


def video(codec):
    return [f"--video={codec}"] if codec else []


def read(folder):
    return json.loads((Path(folder) / "meta.json").read_text()), {
        path.stem: np.load(path) for path in Path(folder).glob("*.npy")
    }


def bring(root, out, *more, px=PX):
    """Read a LeRobot set to out -> its meta.json and arrays."""
    prepare.main([f"--lerobot={root}", f"--out={out}", f"--image_size={px}", "--workers=2", *more])
    return read(out)


# -----------------------------------------------------------------------------------------------------------
# Out and back


def test_pictures_come_back_bit_for_bit(lerobot, ours, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(lerobot_io, "SHARD_BYTES", 12 * PX * PX * 3 * 2)  # several shards
    prepare.main([f"--export={ours}", f"--out={tmp_path / 'out'}", "--workers=2"])
    (before, arrays), (meta, back) = read(ours), bring(tmp_path / "out", tmp_path / "back")
    for name in arrays:
        assert arrays[name].dtype == back[name].dtype and np.array_equal(arrays[name], back[name]), name
    for name in ("cameras", "motors", "fps", "image_size", "statistics", "episodes"):
        assert before[name] == meta[name], name
    # Its entries do not fit another frame rate.
    argv = [f"--lerobot={tmp_path / 'out'}", f"--out={tmp_path / 'slow'}", "--fps=5"]
    assert "nanosyvla.json describes other frames" in fails(prepare.main, argv)
    # Without our own file, the set is read like any other: reasoning has a column, family and kind are lost.
    (tmp_path / "out" / "meta" / "nanosyvla.json").unlink()
    meta, back = bring(tmp_path / "out", tmp_path / "plain")
    assert [(e["reason"], e["task"], e["length"]) for e in meta["episodes"]] == [
        (e["reason"], e["task"], e["length"]) for e in before["episodes"]
    ]
    assert np.array_equal(arrays["front"], back["front"]) and {e["family"] for e in meta["episodes"]} == {
        "plain"
    }


def test_training_on_what_came_back_gives_the_same_bits(lerobot, data, trained, tmp_path):
    prepare.main([f"--export={data}", f"--out={tmp_path / 'out'}", "--workers=1"])
    bring(tmp_path / "out", tmp_path / "back")
    for name in ("questions", "questions_val"):
        shutil.copytree(data / name, tmp_path / "back" / name)
    train.main(
        [
            "--config",
            "debug",
            f"--data={tmp_path / 'back'}",
            f"--out={tmp_path / 'run'}",
            "--device=cpu",
            "--threads=1",
        ]
    )
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        trained / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_film_comes_back_frame_by_frame(lerobot, ours, tmp_path, codec):
    prepare.main([f"--export={ours}", f"--out={tmp_path / 'out'}", *video(codec), "--workers=1"])
    (_, arrays), (meta, back) = read(ours), bring(tmp_path / "out", tmp_path / "back")
    assert (
        np.array_equal(arrays["state"], back["state"])
        and np.array_equal(arrays["action"], back["action"])
        and meta["episodes"] == read(ours)[0]["episodes"]
    )
    for camera in meta["cameras"]:
        a, b = (x.reshape(len(x), -1).astype(float) for x in (arrays[camera], back[camera]))
        distance = ((a[:, None] - b[None]) ** 2).mean(-1)  # (frames, frames)
        same = np.array([[np.array_equal(x, y) for y in a] for x in a])
        assert (
            np.where(same, distance, np.inf).min(0) < np.where(same, np.inf, distance).min(0)
        ).all()  # the right frame at the right time
        assert 10 * np.log10(255**2 / np.diag(distance).mean()) > 22, camera


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Four demonstrations of the simulation at 96 px."""
    folder = tmp_path_factory.mktemp("simulated") / "set"
    prepare.main(
        [
            "--config",
            "debug",
            "--demos=4",
            "--starts=0",
            "--scenes=0",
            "--held_out_scenes=0",
            "--image_size=96",
            f"--out={folder}",
        ]
    )
    return folder


@pytest.mark.parametrize("codec, least", [("", math.inf), ("h264", 27), ("av1", 27)])
def test_what_films_cost(lerobot, simulated, tmp_path, codec, least):
    """Peak signal to noise in dB of simulated pictures that went out and came back; bytes of a picture."""
    prepare.main([f"--export={simulated}", f"--out={tmp_path / 'out'}", *video(codec), "--workers=1"])
    bring(tmp_path / "out", tmp_path / "back", px=96)
    (meta, before), (_, after) = read(simulated), read(tmp_path / "back")
    size = (
        sum(path.stat().st_size for path in (tmp_path / "out" / ("videos" if codec else "data")).rglob("*.*"))
        / len(before["state"])
        / len(meta["cameras"])
    )
    for camera in meta["cameras"]:
        error = (before[camera].astype(float) - after[camera]) ** 2  # (frames, 96, 96, 3)
        decibel = math.inf if not error.any() else 10 * math.log10(255**2 / error.mean())
        print(f"{codec or 'PNG':4s} {camera:5s} {decibel:.1f} dB, {size:.0f} bytes a picture of 96 px")
        assert decibel >= least


# -----------------------------------------------------------------------------------------------------------
# In: cameras, rates, joints


def test_old_sets_cameras_rates_and_joints(tmp_path):
    root = write_set(tmp_path / "old", names=[f"main_{motor}" for motor in MOTORS], lengths=(8, 10))
    raw = [pq.read_table(path) for path in sorted(root.rglob("*.parquet"))]
    # joints recorded around the old zero: make them reachable there
    for path, table in zip(sorted(root.rglob("*.parquet")), raw):
        shifted = {
            name: [
                list(np.float32(row) * 0.4 + np.float32([0, 90, 90, 0, 0, 0]))
                for row in table[name].to_pylist()
            ]
            for name in ("observation.state", "action")
        }
        pq.write_table(pa.table({name: shifted.get(name, table[name]) for name in table.column_names}), path)
    meta, arrays = bring(
        root, tmp_path / "new", "--cameras=front=top,wrist=observation.images.wrist", "--fps=10"
    )
    assert (
        meta["cameras"] == ["front", "wrist"]
        and meta["motors"] == list(MOTORS)
        and meta["fps"] == 10
        and meta["convention"] == "old"
    )
    assert [(e["length"], e["task"], e["seed"]) for e in meta["episodes"]] == [(3, "lift", 0), (4, "push", 1)]
    tables = [pq.read_table(path) for path in sorted(root.rglob("*.parquet"))]
    values = {
        name: [np.array(t[f]) for t in tables]
        for name, f in (("state", "observation.state"), ("action", "action"))
    }
    kept = {
        "state": [[0, 3, 6], [0, 3, 6, 9]],
        "action": [[2, 5, 7], [2, 5, 8, 9]],
    }  # the last command before the next picture
    for name in values:
        for i, start in enumerate((0, 3)):
            expected = np.stack([np.float32(list(v)) for v in values[name][i]])[kept[name][i]]
            expected = np.stack(
                [expected[:, 0], 90 - expected[:, 1], expected[:, 2] - 90, *expected[:, 3:].T], axis=1
            )
            assert np.allclose(arrays[name][start : start + len(expected)], expected, atol=1e-5), name
    assert np.array_equal(
        arrays["front"], [scene(i, k, 0) for i, k in ((0, 0), (0, 3), (0, 6), (1, 0), (1, 3), (1, 6), (1, 9))]
    )
    assert np.array_equal(arrays["wrist"][1], scene(0, 3, 1))
    assert np.allclose(meta["statistics"]["state"]["mean"], arrays["state"].mean(0), atol=1e-4)


def test_joint_conventions_are_recognised_or_refused(tmp_path, fails):
    rest_new, rest_old = [0, -100, 95, 75, 0, 3], [0, 190, 185, 75, 0, 3]
    bring(write_set(tmp_path / "a", values=rest_new), tmp_path / "a_out")
    _, arrays = bring(
        write_set(tmp_path / "b", names=[f"main_{m}" for m in MOTORS], values=rest_old), tmp_path / "b_out"
    )
    assert np.allclose(arrays["state"], rest_new) and np.allclose(arrays["action"], rest_new)
    flags = [f"--image_size={PX}", "--workers=1"]
    cases = [
        ("c", [f"{m}.pos" for m in MOTORS], rest_old, "--convention=old"),
        ("d", [f"main_{m}" for m in MOTORS], rest_new, "--convention=new"),
        ("e", list(MOTORS), rest_new, "does not tell their zero"),
        ("f", None, [2048] * 6, "servo positions"),
    ]
    for name, names, values, words in cases:
        root = write_set(tmp_path / name, names=names, values=values)
        assert words in fails(prepare.main, [f"--lerobot={root}", f"--out={tmp_path / name}_out", *flags])
        assert not (tmp_path / f"{name}_out" / "meta.json").exists()
    # another order is put right; another robot keeps its own names and units
    shuffled = [5, 3, 1, 0, 2, 4]
    meta, arrays = bring(
        write_set(
            tmp_path / "g", names=[f"{MOTORS[i]}.pos" for i in shuffled], values=np.array(rest_new)[shuffled]
        ),
        tmp_path / "g_out",
    )
    assert meta["motors"] == list(MOTORS) and np.allclose(arrays["state"], rest_new)
    meta, arrays = bring(write_set(tmp_path / "h", names=["x", "y"], values=[900, -1]), tmp_path / "h_out")
    assert (
        meta["motors"] == ["x", "y"]
        and np.allclose(arrays["state"], [900, -1])
        and meta["convention"] == "as recorded"
    )
    # per cent of each joint's calibrated range: half of 2000 servo steps is 1000 * 360 / 4095 degrees
    (tmp_path / "arm.json").write_text(
        json.dumps({m: {"range_min": 1000, "range_max": 3000} for m in MOTORS})
    )
    _, arrays = bring(
        write_set(tmp_path / "i", values=[100, -50, 0, 10, 1, 42]),
        tmp_path / "i_out",
        "--convention=percent",
        f"--calibration={tmp_path / 'arm.json'}",
    )
    assert np.allclose(arrays["state"][0], [87.912, -43.956, 0, 8.7912, 0.87912, 42], atol=1e-3)


def test_state_and_action_of_other_names(tmp_path, fails):
    state, motors = (
        ["x", "y", "z", "rx", "ry", "rz", "rw", "gripper"],
        ["x", "y", "z", "roll", "pitch", "yaw", "gripper"],
    )
    root = write_set(tmp_path / "libero", names=motors, state=state)
    meta, arrays = bring(root, tmp_path / "new")
    assert (meta["state"], meta["motors"], meta["convention"]) == (state, motors, "as recorded")
    for name, feature in (("state", "observation.state"), ("action", "action")):
        told = np.concatenate(
            [np.stack(pq.read_table(path)[feature].to_pylist()) for path in sorted(root.rglob("*.parquet"))]
        )
        assert (
            np.array_equal(arrays[name], told.astype(np.float32))
            and len(meta["statistics"][name]["q01"]) == told.shape[1] == {"state": 8, "action": 7}[name]
        )
    train.main(
        [
            "--config",
            "debug",
            f"--data={tmp_path / 'new'}",
            "--families=new",
            "--reasoning=false",
            "--ground_steps=0",
            "--mix=0",
            f"--out={tmp_path / 'run'}",
            "--device=cpu",
            "--threads=1",
        ]
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["state"] == ",".join(state)
    # an SO arm's joints with more beside them: nothing is converted, and nobody may ask for it
    more = write_set(
        tmp_path / "more",
        names=[f"main_{m}" for m in MOTORS],
        state=[f"main_{m}" for m in MOTORS] + ["current"],
    )
    meta, _ = bring(more, tmp_path / "more_out")
    assert (
        meta["motors"] == [f"main_{m}" for m in MOTORS]
        and meta["state"][-1] == "current"
        and meta["convention"] == "as recorded"
    )
    line = fails(
        prepare.main, [f"--lerobot={more}", f"--out={tmp_path / 'x'}", "--convention=old", "--workers=1"]
    )
    assert "'current'" in line and "leave it out" in line
    # no names, or one for all the numbers
    for i, feature in enumerate(({"shape": [8], "names": None}, {"shape": [8], "names": ["state"]})):
        meta, arrays = bring(
            write_set(tmp_path / f"set{i}", names=motors, state=feature), tmp_path / f"nameless{i}"
        )
        assert meta["state"] == [f"state_{j}" for j in range(8)] and arrays["state"].shape[1] == 8


def test_other_names_go_out_and_come_back(lerobot, tmp_path):
    root = write_set(tmp_path / "set", names=["x", "y", "gripper"], state=["x", "y", "vx", "vy", "gripper"])
    meta, arrays = bring(root, tmp_path / "new")
    prepare.main([f"--export={tmp_path / 'new'}", f"--out={tmp_path / 'out'}"])
    again, back = bring(tmp_path / "out", tmp_path / "back")
    assert all(np.array_equal(arrays[name], back[name]) for name in arrays)
    assert all(again[name] == meta[name] for name in ("state", "motors", "episodes"))


def test_one_motor_goes_out_and_comes_back(lerobot, tmp_path):
    meta, arrays = bring(write_set(tmp_path / "set", names=["slider"]), tmp_path / "new", "--fit=crop")
    prepare.main([f"--export={tmp_path / 'new'}", f"--out={tmp_path / 'out'}"])
    theirs = lerobot("someone/set", root=tmp_path / "out")
    assert theirs[5]["action"].reshape(1).numpy() == arrays["action"][5] and theirs.fps == FPS
    again, back = bring(tmp_path / "out", tmp_path / "back")
    assert np.array_equal(arrays["state"], back["state"]) and back["state"].shape == (18, 1)
    assert again["motors"] == ["slider"] and again["episodes"] == meta["episodes"]


def test_success_goes_out_and_start_episodes_stay(lerobot, ours, tmp_path, fails):
    meta, arrays = read(ours)
    argv = [f"--export={ours}", f"--out={tmp_path / 'out'}", "--kinds=demo"]
    assert "has episodes of kind demo, start" in fails(prepare.main, [*argv[:2], "--kinds=rollout"])
    prepare.main(argv)
    theirs = lerobot("someone/set", root=tmp_path / "out")
    chosen = [episode for episode in meta["episodes"] if episode["kind"] == "demo"]
    assert theirs.num_episodes == len(chosen) == 3
    ends = np.cumsum([episode["length"] for episode in chosen]) - 1
    told = [bool(theirs[i]["next.success"]) for i in range(len(theirs))]
    assert np.flatnonzero(told).tolist() == ends.tolist()
    again, back = bring(tmp_path / "out", tmp_path / "back")
    rows = np.concatenate([np.arange(e["start"], e["start"] + e["length"]) for e in chosen])
    assert np.array_equal(back["front"], arrays["front"][rows])
    assert [e["seed"] for e in again["episodes"]] == [e["seed"] for e in chosen]
    # Read like any other set, a failure stays one.
    prepare.main([f"--export={ours}", f"--out={tmp_path / 'all'}"])
    (tmp_path / "all" / "meta" / "nanosyvla.json").unlink()
    again, _ = bring(tmp_path / "all", tmp_path / "plain")
    assert [e["success"] for e in again["episodes"]] == [e["success"] for e in meta["episodes"]]


def test_an_episode_that_changes_its_task_becomes_several(tmp_path):
    root = write_set(tmp_path / "set", lengths=(8,))
    path = next(root.rglob("*.parquet"))
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(table.column_names.index("task_index"), "task_index", [[0] * 5 + [1] * 3]), path
    )
    meta, _ = bring(root, tmp_path / "out")
    assert [(e["start"], e["length"], e["task"]) for e in meta["episodes"]] == [
        (0, 5, "lift"),
        (5, 3, "push"),
    ]


def test_a_conversion_goes_on_after_a_full_disk(tmp_path, fails, monkeypatch, capsys):
    monkeypatch.setattr(lerobot_io, "SHARD_BYTES", 1)
    root, out = write_set(tmp_path / "set"), tmp_path / "out"
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    out.mkdir()
    (out / "wrist.npy").symlink_to("/dev/full")
    argv = [f"--lerobot={root}", f"--out={out}", f"--image_size={PX}", "--workers=1"]
    assert "disk is full" in fails(prepare.main, argv)
    assert not (out / "meta.json").exists()
    (out / "wrist.npy").unlink()
    first = sorted((out / "parts").glob("*.npz"))[0]
    first.unlink()  # as if it had been the disk of the shards
    prepare.main(argv)
    assert "going on: 1 of 2" in capsys.readouterr().out
    assert read(out)[0]["episodes"] == bring(root, tmp_path / "again" / "out")[0]["episodes"]
    assert (
        np.array_equal(read(out)[1]["wrist"], read(tmp_path / "again" / "out")[1]["wrist"])
        and not (out / "parts").exists()
    )


KILLS = {  # what is made -> (part of a path, its nth change on disk) right before which the program is killed
    "lerobot": [
        ("settings.json", 2),
        (".npz", 2),
        (".npz", 2),
        ("set/wrist.npy", 1),
        ("set/meta.json", 2),
        (".npz", 1),
    ],
    "questions_from": [
        (".npz", 4),
        ("questions_val.tmp/front.npy", 1),
        ("set/questions.tmp", 4),
        (".npz", 1),
    ],
    "export": [("set.tmp/images", 30), ("set.tmp/meta/stats.json", 1), ("nanosyvla.json", 2)],
}


@pytest.mark.parametrize("kind", KILLS)
def test_a_killed_conversion_counts_as_none_and_goes_on_to_the_same_bytes(
    request, strike, ours, tmp_path, fails, kind
):
    """SIGKILL at one moment after the other. At the last one of what goes in, all is there and only the parts
    are still to be cleared away.
    """
    if kind == "lerobot":
        source = write_set(tmp_path / "theirs")
    elif kind == "questions_from":
        source = write_texts(tmp_path / "texts" / "train.parquet")
    else:
        request.getfixturevalue("lerobot")
        source = ours
    argv = [f"--{kind}={source}", "--out=set", "--workers=1"]
    if kind != "export":
        argv.append(f"--image_size={PX}")
    if kind == "questions_from":
        argv.append("--held_out_scenes=6")
    settings = {"extras.lerobot_io.SHARD_BYTES": 12 * PX * PX * 3 * 2}

    def go(folder, at=None, nth=1):
        return strike("prepare", argv, tmp_path / folder, at, nth, **settings)

    def content(folder):
        return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}

    assert go("alone")[0] == 0
    expected = tmp_path / "alone" / "set"
    out = tmp_path / "killed" / "set"
    for at, nth in KILLS[kind]:
        status, said = go("killed", at, nth)
        assert status == -9, said
        if kind == "export":
            assert not out.exists()
        elif (at, nth) != KILLS[kind][-1]:
            with pytest.raises(ValueError, match=r"is no data set \(no meta.json\)"):
                if kind == "lerobot":
                    Episodes(out, debug_config(cameras="wrist"))
                else:
                    Questions(out / "questions", debug_config(cameras="front"))
    status, said = go("killed")
    assert status == 0, said
    assert content(out) == content(expected)
    assert [path.name for path in out.parent.iterdir()] == ["set"]


def test_bad_data_sets_are_one_line(tmp_path, fails, monkeypatch, ours):
    root = write_set(tmp_path / "set")
    flags = [f"--out={tmp_path / 'out'}", f"--image_size={PX}", "--workers=1"]

    def go(root, *more):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return fails(prepare.main, [f"--lerobot={root}", *flags, *more])

    assert "names from observation.images.top, obs" in go(root, "--cameras=front=side,wrist=wrist")
    assert "a simple name" in go(root, "--cameras=state=top")
    assert "has 30 frames per second" in go(root, "--fps=20")
    assert "SO-100" in go(write_set(tmp_path / "xy", names=["x", "y"]), "--convention=old")
    assert "there is no folder" in go(tmp_path / "nowhere")
    assert "cannot be reached" in go("someone/not_there_at_all")
    assert "info.json" in go(tmp_path)
    assert "no data set" in fails(prepare.main, [f"--export={tmp_path}", f"--out={tmp_path / 'x'}"])
    assert "v1.6" in go(write_set(tmp_path / "v1", version="v1.6"))
    assert "--out=" in fails(prepare.main, [f"--lerobot={root}"])
    assert "already holds a data set" in fails(prepare.main, [f"--lerobot={root}", f"--out={ours}"])
    assert "already exists" in fails(prepare.main, [f"--export={ours}", f"--out={ours}"])

    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fps": 15}))
    assert "was recorded at 30 frames per second, meta/info.json says 15" in go(root)
    path.write_text(json.dumps(info)[:200])
    assert "info.json cannot be read" in go(root)
    path.write_text(json.dumps(info))

    path = min(root.rglob("*.parquet"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "000000.parquet cannot be read" in go(root)
    table = pq.read_table(io.BytesIO(content))
    pq.write_table(table.slice(0, 5), path)
    assert "000000.parquet, episode 0: the file holds 5 of the 8" in go(root)
    cells = table["observation.images.top"].to_pylist()
    cells[3]["bytes"] = cells[3]["bytes"][:60]
    at = table.column_names.index("observation.images.top")
    pq.write_table(table.set_column(at, "observation.images.top", [cells]), path)
    assert "episode 0, a picture of top cannot be read" in go(root)
    path.unlink()
    assert "000000.parquet cannot be read" in go(root)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in go(root)
    monkeypatch.setitem(sys.modules, "lerobot.datasets.lerobot_dataset", None)
    assert "pip install 'lerobot[dataset]'" in fails(
        prepare.main, [f"--export={ours}", f"--out={tmp_path / 'x'}"]
    )
    assert not (tmp_path / "out" / "meta.json").exists()


def test_frames_of_films_in_an_old_set(tmp_path):
    _, arrays = bring(write_set(tmp_path / "set", films=True), tmp_path / "out", "--fps=15")
    kept = [(0, step) for step in range(0, 8, 2)] + [(1, step) for step in range(0, 10, 2)]
    for view, camera in enumerate(("top", "wrist")):
        truth = np.array([scene(*frame, view) for frame in kept]).astype(float)
        distance = np.abs(arrays[camera][:, None] - truth[None]).mean((2, 3, 4))  # (frames, frames)
        assert (distance.argmin(1) == np.arange(len(kept))).all()


def test_a_film_that_ends_early_is_one_line(tmp_path, fails, monkeypatch):
    root = write_set(tmp_path / "set", films=True)
    film = root / "videos" / "chunk-000" / "observation.images.wrist" / "episode_000001.mp4"
    content = film.read_bytes()
    argv = [f"--lerobot={root}", f"--out={tmp_path / 'back'}", f"--image_size={PX}", "--workers=1"]
    write_film(film, np.array([scene(1, step, 1) for step in range(7)]), FPS)
    line = fails(prepare.main, argv)
    assert "episode_000001.mp4, episode 1," in line and "ends early" in line and "download" not in line
    assert line.endswith("to leave the episode out, add --episodes=0")
    film.write_bytes(content[: len(content) // 2])
    assert "episode_000001.mp4, episode 1, cannot be read" in fails(prepare.main, argv)
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install av" in fails(prepare.main, argv)
    assert not (tmp_path / "back" / "meta.json").exists()


# -----------------------------------------------------------------------------------------------------------
# Sets as they really come


def edit(path, **columns):
    """Replace or add columns of a parquet file; __ in a name stands for a dot."""
    table = pq.read_table(path)
    for name, cells in columns.items():
        name = name.replace("__", ".")
        kept = [other for other in table.column_names if other != name]
        table = table.select(kept).append_column(name, pa.array(cells))
    pq.write_table(table, path)


def edit_info(root, **entries):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return root


def edit_feature(root, name, **entries):
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    features[name] |= entries
    return edit_info(root, features=features)


def rows_of(root, episode):
    return sorted(root.rglob("*.parquet"))[episode]


@pytest.fixture
def go(tmp_path, fails):
    """go(root, *more) -> the line with which reading a set fails."""
    flags = [f"--out={tmp_path / 'failed'}", f"--image_size={PX}", "--workers=1"]

    def call(root, *more):
        shutil.rmtree(tmp_path / "failed", ignore_errors=True)
        return fails(prepare.main, [f"--lerobot={root}", *flags, *more])

    return call


def test_names_nested_or_as_dicts(tmp_path):
    joints = [f"{motor}.pos" for motor in MOTORS]
    shapes = [
        (joints, list(MOTORS)),
        ({"motors": joints}, list(MOTORS)),
        ({name: i for i, name in enumerate(joints)}, list(MOTORS)),
        ({"motors": {name: i for i, name in enumerate(joints)}}, list(MOTORS)),
        ([[name] for name in joints], list(MOTORS)),
        ({"arm": joints[:5], "hand": joints[5:]}, list(MOTORS)),
        ({"left": ["a", "b", "c"], "right": ["a", "b", "c"]}, ["a_0", "b_1", "c_2", "a_3", "b_4", "c_5"]),
        ({str(i): name for i, name in enumerate("uvwxyz")}, list("uvwxyz")),
        (dict.fromkeys("uvwxyz", "rad"), list("uvwxyz")),
        (["a/b", "c,d", *"wxyz"], ["a_b", "c_d", *"wxyz"]),
        (None, [f"action_{i}" for i in range(6)]),
        ("action", [f"action_{i}" for i in range(6)]),
    ]
    for names, right in shapes:
        assert lerobot_io.number_names({"shape": [6], "names": names}, "action")[:6] == [
            f"{name}.pos" if name in MOTORS else name for name in right
        ]
    # {name: column}: the order is that of the columns
    root = write_set(tmp_path / "set")
    for feature in ("observation.state", "action"):
        edit_feature(root, feature, names={"motors": {name: 5 - i for i, name in enumerate(joints)}})
    _, arrays = bring(root, tmp_path / "out")
    first = pq.read_table(rows_of(root, 0))["action"].to_pylist()[0]
    assert np.allclose(arrays["action"][0], first[::-1])


def test_cameras_with_the_same_last_word(tmp_path, go):
    cameras = ("rgb.head", "seg.head", "wrist", "state")
    root = write_set(tmp_path / "set", cameras=cameras, lengths=(3,))
    meta, arrays = bring(root, tmp_path / "all")
    assert meta["cameras"] == ["rgb_head", "seg_head", "wrist", "state_"]
    for view, camera in enumerate(meta["cameras"]):
        assert np.array_equal(arrays[camera][1], scene(0, 1, view))
    line = go(root, "--cameras=front=head")
    assert "may be any of observation.images.rgb.head, observation.images.seg.head" in line
    assert "of its own" in go(root, "--cameras=front=wrist,front=seg.head")
    for i, word in enumerate(("seg.head", "seg_head", "observation.images.seg.head")):
        _, arrays = bring(root, tmp_path / f"some{i}", f"--cameras=front={word}")
        assert np.array_equal(arrays["front"][1], scene(0, 1, 1))


DEPTH = [
    ("cam", {"info": {"is_depth_map": True}}),
    ("cam", {"info": {"video.is_depth_map": True}}),
    ("cam", {"video_info": {"video.is_depth_map": "true"}}),
    ("cam", {"is_depth_map": 1}),
    ("cam", {"info": {"pix_fmt": "gray12le"}}),
    ("cam", {"info": {"video.channels": 1}}),
    ("cam", {"shape": [PX, PX, 1]}),
    ("cam", {"shape": [1, PX, PX]}),
    ("cam", {"shape": [PX, PX]}),
    ("front_depth", {}),
    ("frontDepth", {}),
    ("depth.front", {}),
    ("front.depth", {}),
    ("depthmap", {}),
]


def test_depth_is_no_colour_camera(tmp_path, go, capsys):
    for name, told in DEPTH:
        assert lerobot_io.is_depth(f"observation.images.{name}", {"shape": [PX, PX, 3]} | told), (name, told)
    colour = {"info": {"is_depth_map": False, "bit_depth": 8, "pix_fmt": "yuv420p"}, "video_info": None}
    assert not lerobot_io.is_depth("observation.images.front", colour)
    root = write_set(tmp_path / "set", cameras=("front", "front_depth"), lengths=(3,))
    assert bring(root, tmp_path / "out")[0]["cameras"] == ["front"]
    assert "1 depth or grey cameras not taken: observation.images.front_depth" in capsys.readouterr().out
    _, arrays = bring(root, tmp_path / "asked", "--cameras=d=front_depth")
    assert np.array_equal(arrays["d"][1], scene(0, 1, 1))
    assert "no camera with colours" in go(write_set(tmp_path / "only", cameras=("depth",)))


def test_rates_and_clocks(tmp_path, go, capsys):
    root = write_set(tmp_path / "set", lengths=(9, 9, 9))
    for fps, kept in ((30.0, 30), (29.97, 30), ("30", 30)):
        meta, _ = bring(edit_info(root, fps=fps), tmp_path / f"out{fps}")
        assert meta["fps"] == kept and isinstance(meta["fps"], int)
        meta, arrays = bring(root, tmp_path / f"slow{fps}", "--fps=10")
        assert meta["fps"] == 10 and len(arrays["state"]) == 9
    assert "has 29.97 frames per second; choose an --fps that divides them: 1, 2, 3, 5" in go(
        edit_info(root, fps=29.97), "--fps=7"
    )
    for fps in (0, None, "x", -30, 12.5, 1e9, math.nan, [30]):
        assert "info.json says fps" in go(edit_info(root, fps=fps))
    times = np.arange(9) / 25
    for episode in range(3):
        edit(rows_of(root, episode), timestamp=times)
    assert "was recorded at 25 frames per second, meta/info.json says 30" in go(edit_info(root, fps=30))
    assert "divides them: 1, 5, 25" in go(edit_info(root, fps=25), "--fps=10")
    # One late frame does no harm, and is told. Where frames are missing, the episode is left out.
    capsys.readouterr()
    edit(rows_of(root, 1), timestamp=times + (np.arange(9) > 4) * 0.4 / 25)
    edit(rows_of(root, 2), timestamp=times + (np.arange(9) > 4) * 3 / 25)
    meta, arrays = bring(root, tmp_path / "late")
    assert [episode["seed"] for episode in meta["episodes"]] == [0, 1] and len(arrays["state"]) == 18
    said = capsys.readouterr().out
    assert "episode 1: frame 5 comes 56 ms after" in said and "episode 2: left out, frame 5 comes 160" in said


def test_some_episodes(tmp_path, go, capsys):
    root = write_set(tmp_path / "set", lengths=(4, 5, 6, 7, 8))
    edit(rows_of(root, 1), action=[[None] * 6] + [[0.0] * 6] * 4)
    line = go(root)
    assert "episode 1, frame 0: action is [None" in line and "add --episodes=0,2-4" in line
    capsys.readouterr()
    # The advice is followed with the same --out.
    meta, arrays = bring(root, tmp_path / "failed", "--episodes=0,2-4")
    assert [episode["seed"] for episode in meta["episodes"]] == [0, 2, 3, 4] and len(arrays["state"]) == 25
    assert np.array_equal(arrays["top"][4], scene(2, 0))
    assert "left out by --episodes: 1 episodes (1)" in capsys.readouterr().out
    for text in ("3-1", "a", "1,", "-1"):
        assert "is no span" in go(root, f"--episodes={text}")
    for text in ("7", "0-99999999999"):
        assert "has episodes 0-4" in go(root, f"--episodes={text}")


def test_cells_and_lists_that_are_damaged_name_the_episode(tmp_path, go):
    whole = write_set(tmp_path / "whole", lengths=(4, 4, 4))

    def damaged(**columns):
        root = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        shutil.copytree(whole, root)
        edit(rows_of(root, 1), **columns)
        return root

    for column, cells in (
        ("observation__state", [None] + [[0.0] * 6] * 3),
        ("action", [[0.0] * 5] + [[0.0] * 6] * 3),
        ("timestamp", [0, 1 / 30, None, 3 / 30]),
        ("task_index", [1, 1, 1, None]),
        ("task_index", [7] * 4),
        ("observation__images__top", [{"bytes": None, "path": None}] * 4),
        ("observation__images__top", [{"bytes": b"", "path": "images/nowhere.png"}] * 4),
        ("episode_index", [2] * 4),
    ):
        line = go(damaged(**{column: cells}))
        assert "episode 1" in line and line.endswith("add --episodes=0,2") and "download" not in line, line
    # whole numbers that became float, or lists of one, are as good
    root = damaged(episode_index=[1.0] * 4, task_index=[[1.0]] * 4)
    lists = root / "meta" / "episodes.jsonl"
    rows = [json.loads(line) for line in lists.read_text().splitlines()]
    for row in rows:
        row["length"] = float(row["length"])
    lists.write_text("\n".join(map(json.dumps, rows)))
    assert [e["task"] for e in bring(root, tmp_path / "out")[0]["episodes"]] == ["lift", "push", "lift"]
    lists.write_text(lists.read_text()[:-10])
    line = go(root)
    assert "episodes.jsonl, line 3, cannot be read" in line and "; delete it if the recording was cut" in line
    lists.write_text("\n".join(map(json.dumps, rows + rows[:1])))
    assert "has episode 0 twice" in go(root)
    rows[1]["length"] = 0
    lists.write_text("\n".join(map(json.dumps, rows)))
    assert "gives episode 1 0 frames; to leave the episode out, add --episodes=0,2" in go(root)


def write_v3(root, films=True):
    """A set of the same content as write_set() in format v3.0: all episodes in one file."""
    old = write_set(root.with_name(root.name + "_old"), lengths=(4, 5, 6), cameras=("top",), films=films)
    info = json.loads((old / "meta" / "info.json").read_text())
    info |= {"codebase_version": "v3.0", "data_path": None, "video_path": None}
    tables = [pq.read_table(rows_of(old, i)) for i in range(3)]
    (root / "meta" / "episodes").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.concat_tables(tables), root / "data" / "chunk-000" / "file-000.parquet")
    pq.write_table(pa.table({"__index_level_0__": ["lift", "push"], "task_index": [0, 1]}), root / "tasks")
    (root / "tasks").rename(root / "meta" / "tasks.parquet")
    (root / "meta" / "info.json").write_text(json.dumps(info))
    film = root / "videos" / "observation.images.top" / "chunk-000" / "file-000.mp4"
    if films:
        film.parent.mkdir(parents=True)
        pictures = [scene(i, step) for i, n in enumerate((4, 5, 6)) for step in range(n)]
        write_film(film, np.array(pictures), FPS)
    columns = {"episode_index": [0, 1, 2], "length": [4, 5, 6]}
    columns |= {"data/chunk_index": [0] * 3, "data/file_index": [0] * 3}
    for key in ("chunk_index", "file_index"):
        columns[f"videos/observation.images.top/{key}"] = [0] * 3
    columns["videos/observation.images.top/from_timestamp"] = [0, 4 / FPS, 9 / FPS]
    pq.write_table(pa.table(columns), root / "meta" / "episodes" / "file-000.parquet")
    return root, root / "meta" / "episodes" / "file-000.parquet"


def test_wrong_file_indices(tmp_path, go):
    root, lists = write_v3(tmp_path / "set")
    expected = bring(root, tmp_path / "out")[1]
    edit(lists, **{"data/file_index": [0.0, 3.0, 0.0]})  # the rows themselves know their episode
    arrays = bring(root, tmp_path / "rows")[1]
    assert np.array_equal(arrays["state"], expected["state"]) and len(arrays["top"]) == 15
    edit(lists, **{"videos/observation.images.top/file_index": [0, 3, 0]})
    assert "file-003.mp4, episode 1, cannot be read" in go(root)
    assert len(bring(root, tmp_path / "some", "--episodes=0,2")[1]["state"]) == 10
    edit(lists, **{"videos/observation.images.top/file_index": [0] * 3})
    edit(lists, **{"videos/observation.images.top/from_timestamp": [0, 0.0, 9 / FPS]})
    assert "gives episodes 0 and 1 the same frames of" in go(root)
    data = root / "data" / "chunk-000" / "file-000.parquet"
    pq.write_table(pq.read_table(data).slice(0, 6), data)  # the recording was cut off in the middle
    edit(lists, **{"videos/observation.images.top/from_timestamp": [0, 4 / FPS, 9 / FPS]})
    assert "episode 1: the file holds 2 of the 5 frames" in go(root)


def test_success_comes_in(tmp_path, capsys):
    def judged(name, cells, kind="next.success"):
        root = write_set(tmp_path / name, lengths=(4,) * 4, cameras=("top",))
        features = json.loads((root / "meta" / "info.json").read_text())["features"]
        edit_info(root, features=features | {kind: {"dtype": "bool", "shape": [1], "names": None}})
        for i in range(4):
            edit(rows_of(root, i), **{kind: cells(i % 2 == 0)})
        return root

    for i, cells in enumerate(
        (
            lambda good: [False, False, False, good],
            lambda good: [[good]] * 4,
            lambda good: [0.0, 0.0, 0.0, float(good)],
            lambda good: [None, None, None, good],
        )
    ):
        meta, _ = bring(judged(f"set{i}", cells), tmp_path / f"out{i}")
        assert [episode["success"] for episode in meta["episodes"]] == [True, False, True, False]
    assert "failed, kept but not taught: [1, 3]" in capsys.readouterr().out
    cfg = debug_config(cameras="top", fps=30, image_size=PX)
    assert [episode["seed"] for episode in Episodes(tmp_path / "out0", cfg).episodes] == [0, 2]
    root = judged("words", lambda good: ["success" if good else "failure"] * 4, "is_success")
    assert not bring(root, tmp_path / "words_out")[0]["episodes"][1]["success"]
    root = judged("never", lambda good: [False] * 4)
    bring(root, tmp_path / "never_out")
    assert "if nobody judged them, add --rename=next.success=" in capsys.readouterr().out
    meta, _ = bring(root, tmp_path / "unjudged", "--rename=next.success=")
    assert all(episode["success"] for episode in meta["episodes"])
    lists = root / "meta" / "episodes.jsonl"
    rows = [json.loads(line) | {"success": i != 2} for i, line in enumerate(lists.read_text().splitlines())]
    lists.write_text("\n".join(map(json.dumps, rows)))
    meta, _ = bring(root, tmp_path / "listed", "--rename=next.success=")
    assert [episode["success"] for episode in meta["episodes"]] == [True, True, False, True]


def test_features_by_other_names(tmp_path, go):
    root = write_set(tmp_path / "set", names=["x", "y"], lengths=(3,))
    theirs = {"observation.state": "state", "action": "actions"}
    theirs |= {"observation.images.top": "image", "observation.images.wrist": "wrist_image"}
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    edit_info(root, features={theirs.get(name, name): feature for name, feature in features.items()})
    table = pq.read_table(rows_of(root, 0))
    pq.write_table(
        table.rename_columns([theirs.get(name, name) for name in table.column_names]), rows_of(root, 0)
    )
    assert "add --rename=observation.state=NAME" in go(root)
    rename = "--rename=observation.state=state,action=actions"
    meta, arrays = bring(root, tmp_path / "out", rename, "--cameras=front=image,wrist=wrist_image")
    assert meta["cameras"] == ["front", "wrist"] and meta["motors"] == ["x", "y"]
    assert np.array_equal(arrays["action"], np.array(table["action"].to_pylist(), np.float32))
    assert np.array_equal(arrays["wrist"][2], scene(0, 2, 1))
    for word in ("state=observation.state", "observation.state=nope", "a=b"):
        assert "must be NAME=THEIRS" in go(root, f"--rename={word}")


def test_one_motor_and_other_encodings(tmp_path):
    root = write_set(tmp_path / "one", names=["slider"], cameras=("top",), lengths=(4,))
    edit(rows_of(root, 0), observation__state=[0.0, 1.0, 2.0, 3.0], action=[[1.0], [2.0], [3.0], [4.0]])
    meta, arrays = bring(root, tmp_path / "one_out")
    assert meta["motors"] == ["slider"] and arrays["state"].tolist() == [[0], [1], [2], [3]]
    root = write_set(tmp_path / "set", cameras=("top",), lengths=(4,))
    table = pq.read_table(rows_of(root, 0))
    numbers = table["action"].to_pylist()
    cells = table["observation.images.top"].to_pylist()
    (root / "pictures").mkdir()
    for i, cell in enumerate(cells):
        (root / "pictures" / f"{i}.png").write_bytes(cell["bytes"])
    struct = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    encodings = [
        (pa.array(numbers, pa.large_list(pa.float64())), pa.array(cells, struct)),
        (pa.array(numbers, pa.list_(pa.float32(), 6)), pa.array([cell["bytes"] for cell in cells])),
        (pa.array([[row] for row in numbers]), pa.array([f"pictures/{i}.png" for i in range(4)])),
        (pa.array(numbers), pa.array([scene(0, i).tolist() for i in range(4)])),
    ]
    for i, (action, pictures) in enumerate(encodings):
        edit(rows_of(root, 0), action=action, observation__images__top=pictures)
        _, arrays = bring(root, tmp_path / f"out{i}")
        assert np.array_equal(arrays["action"], np.array(numbers, np.float32))
        assert np.array_equal(arrays["top"], [scene(0, step) for step in range(4)])


def test_where_sets_lie(tmp_path, go, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "home"))
    write_set(tmp_path / "home" / "me" / "cubes", lengths=(4,))
    assert len(bring("me/cubes", tmp_path / "out")[1]["state"]) == 4
    assert f"these are: {tmp_path / 'home' / 'me' / 'cubes'}" in go(tmp_path / "home" / "me")
    # as LeRobot 0.6 and the hub's own cache keep it, here a set in a folder of a repository
    pytest.importorskip("huggingface_hub")
    kept = tmp_path / "home" / "hub" / "datasets--me--films"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("a" * 40)
    root = write_set(kept / "snapshots" / ("a" * 40) / "sets" / "one", lengths=(5,))
    assert len(bring("me/films/sets/one", tmp_path / "part")[1]["state"]) == 5
    rows_of(root, 0).write_bytes(b"x")
    assert "download it again" in go("me/films/sets/one")


def test_per_cent_is_told_from_degrees(tmp_path, go, capsys):
    """Servos count whole steps: as many degrees for all joints, but per cent of each one's range."""
    steps = np.array([2503, 2275, 2161, 2161, 4095])  # of the ranges of an SO-100
    t = np.linspace(0, 1, 60)[:, None]
    ticks = np.round(steps * 0.3 * np.sin(2 * np.pi * t + np.arange(5)))  # (60, 5)

    def recorded(name, values):
        root = write_set(tmp_path / name, lengths=(60,), cameras=("top",))
        cells = np.hstack([values, np.full((60, 1), 30.0)]).astype(np.float32)
        edit(rows_of(root, 0), observation__state=list(cells), action=list(cells))
        return root

    degrees = ticks * 360 / 4095
    right = [degrees, degrees + 0.044, ticks * 360 / 4096, np.round(degrees, 1), np.round(degrees)]
    right.append(np.random.default_rng(0).uniform(-80, 80, (60, 5)))
    for i, values in enumerate(right):
        capsys.readouterr()
        meta, arrays = bring(recorded(f"right{i}", values), tmp_path / f"right{i}_out")
        assert np.allclose(arrays["state"][:, :5], values, atol=1e-4)
        said = capsys.readouterr().out
        assert meta["convention"] == "new" and "per cent" not in said and "note" not in said
    percent = ticks / steps * 200
    for i, values in enumerate((percent, np.clip(percent * 1.7, -100, 100))):
        line = go(recorded(f"percent{i}", values))
        assert "look like per cent" in line and "--convention=percent" in line and "--convention=new" in line
    root = tmp_path / "percent0"
    meta, arrays = bring(root, tmp_path / "nominal", "--convention=percent")
    assert np.allclose(arrays["state"][:, :5], degrees, atol=0.1) and meta["convention"] == "percent"
    assert "nominal range of an SO-100" in capsys.readouterr().out
    meta, arrays = bring(root, tmp_path / "said", "--convention=new")
    assert np.allclose(arrays["state"][:, :5], percent, atol=1e-4)
    assert "add --convention=percent" in go(root, "--calibration=arm.json")


def test_fit_and_rate_travel(tmp_path):
    root = write_set(tmp_path / "square", lengths=(3,))
    assert bring(root, tmp_path / "a", "--fit=crop")[0]["fit"] == ""
    for view in ("top", "wrist"):
        edit_feature(root, f"observation.images.{view}", shape=[480, 640, 3])
    assert bring(root, tmp_path / "b")[0]["fit"] == "stretch"
    assert bring(root, tmp_path / "c", "--fit=crop")[0]["fit"] == "crop"
    edit_feature(root, "observation.images.top", shape=[3, 64, 64])
    assert bring(root, tmp_path / "d", "--cameras=top")[0]["fit"] == ""


def test_pictures_as_a_person_sees_them():
    """Upright, on white where they are transparent, 16 bits as 8."""
    pixels = np.full((12, 16, 3), (30, 30, 220), np.uint8)
    pixels[:, :8] = (220, 30, 30)
    upright = Image.fromarray(pixels)
    turns = [None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90"]
    turns += ["TRANSVERSE", "ROTATE_270"]

    def seen(picture, kind="PNG", **options):
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        return np.asarray(lerobot_io.open_picture({"bytes": stream.getvalue()}, Path())).astype(int)

    for number, turn in enumerate(turns, 1):
        exif = Image.Exif()
        exif[0x0112] = number
        stored = upright.transpose(Image.Transpose[turn]) if turn else upright
        assert np.abs(seen(stored, "PNG", exif=exif) - pixels).max() == 0
        assert np.abs(seen(stored, "JPEG", exif=exif, quality=95, subsampling=0) - pixels).mean() < 3
    assert np.abs(seen(upright.quantize(4)) - pixels).max() == 0
    clear = Image.fromarray(np.dstack([pixels, np.full((12, 16), 255, np.uint8)]))
    clear.paste((0, 0, 0, 0), (0, 0, 16, 6))
    assert (seen(clear)[:6] == 255).all() and (seen(clear)[6:] == pixels[6:]).all()
    assert (seen(upright, transparency=(220, 30, 30))[:, :8] == 255).all()
    assert (seen(Image.fromarray(np.full((4, 4), 30000, np.uint16))) == 116).all()
    assert (seen(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF") == 127).all()
    assert (seen(Image.new("1", (4, 4), 1)) == 255).all()


def test_huge_and_damaged_pictures_are_left_out(tmp_path, capsys):
    rows = []
    pictures = [png(np.full((8 + i, 8, 3), 255, np.uint8)) for i in range(6)]  # white: told apart by size
    for size in ((15000, 12000), (10000, 10000)):
        stream = io.BytesIO()
        Image.new("1", size).save(stream, "PNG")
        pictures.append({"bytes": stream.getvalue(), "path": None})
    pictures += [{"bytes": pictures[0]["bytes"][:50], "path": None}, {"bytes": b"GIF89a", "path": None}]
    for picture in pictures:
        rows.append({"images": [picture], "texts": [{"user": "what", "assistant": "this", "source": None}]})
    rows.append({"images": None, "texts": [None]})
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "a.parquet")
    flags = [f"--out={tmp_path / 'out'}", f"--image_size={PX}", "--workers=1"]
    prepare.main([f"--questions_from={tmp_path / 'set'}", "--scenes=11", "--held_out_scenes=1", *flags])
    said = capsys.readouterr().out
    assert "questions: 5 pictures" in said and "without exactly one readable picture': 5" in said


# -----------------------------------------------------------------------------------------------------------
# Questions that others asked


def write_texts(path, n=30, size=(PX, PX), group=7):
    """An image-text set as the common ones on the hub; the last picture repeats the first."""
    rows = []
    for i in range(n):
        pixels = np.random.default_rng(0 if i in (0, n - 1) else i + 1).integers(
            0, 256, (*size, 3), dtype=np.uint8
        )
        texts = [
            {"user": f"what is in picture {i} ?", "assistant": f"thing {i}", "source": "AI2D"},
            {"user": "x" * 400, "assistant": "no", "source": "AI2D"},
        ]
        rows.append({"images": [png(pixels)] * (2 if i == 5 else 1), "texts": texts})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path.parent


def test_questions_of_others(ours, tmp_path, fails, capsys):
    folder, out = write_texts(tmp_path / "texts" / "train.parquet"), tmp_path / "set"
    shutil.copytree(ours, out)
    argv = [f"--questions_from={folder}", f"--out={out}", "--held_out_scenes=6", "--workers=2"]
    prepare.main(argv)
    said = capsys.readouterr().out
    assert "6 pictures" in said and "without exactly one readable picture" in said
    sets = {}
    for name in ("questions", "questions_val"):
        meta, pictures = json.loads((out / name / "meta.json").read_text()), np.load(out / name / "front.npy")
        texts = json.loads((out / name / "questions.json").read_text())
        assert (
            meta["cameras"] == ["front", "wrist"]
            and meta["grey"] == ["wrist"]
            and not (out / name / "wrist.npy").exists()
            and len(texts) == len(pictures)
        )
        sets[name] = {}
        for picture, ((kind, question, answer),) in zip(pictures, texts):
            i = int(question.split()[-2])
            assert kind == "AI2D" and answer == f"thing {i}"
            assert np.array_equal(
                picture,
                np.random.default_rng(0 if i in (0, 29) else i + 1).integers(
                    0, 256, (PX, PX, 3), dtype=np.uint8
                ),
            )
            sets[name][i] = picture.tobytes()
    assert not set(sets["questions"].values()) & set(
        sets["questions_val"].values()
    )  # nothing held out is trained on, a repeated picture neither
    assert 5 not in sets["questions"] and len(sets["questions"]) + len(sets["questions_val"]) in (28, 29)
    cfg = debug_config()
    batch = Questions(out / "questions", cfg).batch(Tokenizer([]), np.random.default_rng(0), 4, 200)
    assert (
        batch["images"].shape == (4, 2, PX, PX, 3)
        and (batch["images"][:, 1] == 128).all()
        and batch["images"][:, 0].float().std() > 50
    )
    assert Questions(out / "questions_val", cfg).accuracy(
        lambda images, questions: [f"thing {q.split()[-2]}" for q in questions]
    )["AI2D"] == {"accuracy": 1.0, "n": 6}
    assert "already holds questions" in fails(prepare.main, argv)
    with pytest.raises(ValueError, match="without pictures: .*the model wants .*--mix=0"):
        Questions(out / "questions", debug_config(cameras="wrist"))


def test_bad_image_text_sets_are_one_line(tmp_path, fails):
    flags = [f"--out={tmp_path / 'out'}", f"--image_size={PX}", "--workers=1"]

    def go(name, *more):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return fails(prepare.main, [f"--questions_from={name}", *flags, *more])

    folder = write_texts(tmp_path / "texts" / "train.parquet")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "lower --held_out_scenes" in go(folder)
    assert "raise --longest" in go(folder, "--held_out_scenes=6", "--longest=3")
    assert "no parquet file" in go(empty)
    assert "there is no folder" in go(tmp_path / "nowhere")
    assert "cannot be reached" in go("HuggingFaceM4/the_cauldron/not_there")
    pq.write_table(pa.table({"image": [1]}), empty / "a.parquet")
    assert "no image-text set" in go(empty)
    (empty / "a.parquet").write_bytes((folder / "train.parquet").read_bytes()[:1000])
    assert "a.parquet cannot be read" in go(empty)


# -----------------------------------------------------------------------------------------------------------
# The real lerobot


@pytest.mark.parametrize("codec", ["image", "h264", "libsvtav1"])
def test_every_frame_of_a_real_lerobot_set(lerobot, tmp_path, codec):
    kind = "image" if codec == "image" else "video"
    features = {
        name: {"dtype": "float32", "shape": (6,), "names": [f"{m}.pos" for m in MOTORS]}
        for name in ("observation.state", "action")
    }
    features |= {
        f"observation.images.{c}": {
            "dtype": kind,
            "shape": (PX, PX, 3),
            "names": ["height", "width", "channels"],
        }
        for c in ("front", "wrist")
    }
    video = {"image": "", "libsvtav1": "av1"}.get(codec, codec)
    dataset = lerobot_io.create_dataset(video, tmp_path / "set", FPS, features)
    rng, lengths = np.random.default_rng(3), (8, 9, 12)
    state, action = joints(rng, sum(lengths)), joints(rng, sum(lengths))
    at = 0
    for i, n in enumerate(lengths):
        for k in range(n):
            pictures = {f"observation.images.{c}": scene(i, k, v) for v, c in enumerate(("front", "wrist"))}
            dataset.add_frame(
                {
                    "observation.state": state[at],
                    "action": action[at],
                    "task": ("lift", "push")[i % 2],
                    **pictures,
                }
            )
            at += 1
        dataset.save_episode()
    dataset.finalize()
    meta, arrays = bring(tmp_path / "set", tmp_path / "back")
    assert np.array_equal(arrays["state"], state) and np.array_equal(arrays["action"], action)
    assert [(e["length"], e["task"]) for e in meta["episodes"]] == [(8, "lift"), (9, "push"), (12, "lift")]
    truth = {
        c: np.array([scene(i, k, v) for i, n in enumerate(lengths) for k in range(n)])
        for v, c in enumerate(("front", "wrist"))
    }
    for camera, pictures in truth.items():
        if codec == "image":
            assert np.array_equal(arrays[camera], pictures)
        else:  # 4:2:0 and quantisation blur edges; a neighbouring frame would be off by far more
            distance = np.abs(arrays[camera].astype(float)[:, None] - pictures[None]).mean(
                (2, 3, 4)
            )  # (frames, frames)
            assert (distance.argmin(1) == np.arange(len(pictures))).all() and np.diag(distance).max() < 8


@pytest.mark.parametrize("codec", ["", "h264", "av1"])
def test_the_real_lerobot_opens_iterates_and_trains_act_on_ours(lerobot, ours, tmp_path, codec):
    act = pytest.importorskip("lerobot.policies.act.configuration_act")
    factory = pytest.importorskip("lerobot.policies.factory")
    prepare.main([f"--export={ours}", f"--out={tmp_path / 'out'}", *video(codec), "--workers=1"])
    meta, arrays = read(ours)
    dataset = lerobot(
        "someone/set",
        root=tmp_path / "out",
        delta_timestamps={"action": [i / 10 for i in range(4)]},
        video_backend="pyav",
    )
    assert (
        dataset.num_episodes == len(meta["episodes"])
        and dataset.num_frames == len(dataset) == len(arrays["state"])
        and dataset.fps == 10
    )
    for e in meta["episodes"]:
        for k in range(e["length"]):
            try:
                frame = dataset[e["start"] + k]
            except AttributeError as error:  # torchvision dropped the film reader that this LeRobot uses
                pytest.skip(f"this torchvision cannot decode films: {error}")
            assert np.array_equal(
                frame["observation.state"], arrays["state"][e["start"] + k]
            ) and np.array_equal(frame["action"][0], arrays["action"][e["start"] + k])
            assert (
                frame["task"] == e["task"]
                and frame["reason"] == ([text for step, text in e["reason"] if step <= k] or [""])[-1]
            )
            error = np.abs(
                frame["observation.images.front"].permute(1, 2, 0).numpy() * 255
                - arrays["front"][e["start"] + k]
            )
            assert error.max() < 1e-3 if not codec else error.mean() < 6
    assert np.allclose(
        dataset.meta.stats["action"]["mean"], arrays["action"].mean(0), atol=1e-4
    ) and dataset.meta.stats["observation.images.wrist"]["mean"].shape == (3, 1, 1)
    torch.manual_seed(0)
    cfg = act.ACTConfig(
        dim_model=32,
        n_heads=2,
        dim_feedforward=32,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        latent_dim=4,
        chunk_size=4,
        n_action_steps=4,
        pretrained_backbone_weights=None,
        push_to_hub=False,
        device="cpu",
    )
    policy = factory.make_policy(cfg, ds_meta=dataset.meta)
    preprocess, _ = factory.make_pre_post_processors(cfg, dataset_stats=dataset.meta.stats)
    optimizer, losses = torch.optim.AdamW(policy.parameters(), 1e-3), []
    batch = preprocess(next(iter(torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True))))
    for _ in range(5):
        loss, _ = policy.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
