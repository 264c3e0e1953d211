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
    prepare.main([f"--export={ours}", f"--out={tmp_path / 'out'}", f"--video={codec}", "--workers=1"])
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
    prepare.main([f"--export={simulated}", f"--out={tmp_path / 'out'}", f"--video={codec}", "--workers=1"])
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
    argv = [f"--{kind}={source}", "--out=set", "--workers=1", f"--image_size={PX}", "--held_out_scenes=6"]
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
    assert "was not recorded at 15 frames" in go(root)
    path.write_text(json.dumps(info)[:200])
    assert "info.json cannot be read" in go(root)
    path.write_text(json.dumps(info))

    path = min(root.rglob("*.parquet"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "000000.parquet is missing or damaged" in go(root)
    table = pq.read_table(io.BytesIO(content))
    pq.write_table(table.slice(0, 5), path)
    assert "000000.parquet, episode 0: the file holds 5 of the 8" in go(root)
    cells = table["observation.images.top"].to_pylist()
    cells[3]["bytes"] = cells[3]["bytes"][:60]
    at = table.column_names.index("observation.images.top")
    pq.write_table(table.set_column(at, "observation.images.top", [cells]), path)
    assert "episode 0, a picture is missing or damaged" in go(root)
    path.unlink()
    assert "000000.parquet is missing or damaged" in go(root)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in go(root)
    monkeypatch.setitem(sys.modules, "lerobot.datasets.lerobot_dataset", None)
    assert "pip install lerobot" in fails(prepare.main, [f"--export={ours}", f"--out={tmp_path / 'x'}"])
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
    assert "episode_000001.mp4 ends early" in fails(prepare.main, argv)
    film.write_bytes(content[: len(content) // 2])
    assert "episode_000001.mp4 is missing or damaged" in fails(prepare.main, argv)
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install av" in fails(prepare.main, argv)
    assert not (tmp_path / "back" / "meta.json").exists()


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
    with pytest.raises(ValueError, match="no pictures of"):
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
    assert "a.parquet is missing or damaged" in go(empty)


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
    prepare.main([f"--export={ours}", f"--out={tmp_path / 'out'}", f"--video={codec}", "--workers=1"])
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
