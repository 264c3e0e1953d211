"""prepare.py: questions tell the truth, nothing held out leaks in, and data sets come out the same however they were made."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import prepare
import sim_env
from sim_env import SO100Env

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--config",
    "debug",
    "--demos=3",
    "--starts=2",
    "--start_steps=3",
    "--scenes=5",
    "--held_out_scenes=2",
]


def make(out, *more):
    """prepare.py in a process of its own: forking never meets another test's OpenGL context."""
    return subprocess.run(
        [sys.executable, ROOT / "prepare.py", *TINY, f"--out={out}", *more], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def scenes():
    env = SO100Env()
    found = []
    for seed in range(40):
        env.reset(seed=seed, options={"family": "sequence", "start": True})
        found.append(env.scene())
    env.close()
    return found


def test_answers_are_true(scenes):
    for seed, scene in enumerate(scenes):
        cubes = {c["colour"]: c for c in scene["cubes"]}
        for kind, question, answer in prepare.questions(scene, np.random.default_rng(seed)):
            named = [c for c in sim_env.COLOURS if c in question.split()]
            if kind == "where":
                assert answer == f"{cubes[named[0]]['t']} {cubes[named[0]]['r']}"
            elif kind == "pad":
                (pad,) = [p for p in scene["pads"] if p["colour"] == named[0]]
                assert answer == f"pad {pad['number']} at {pad['t']}"
            elif kind == "describe pads":
                assert answer.split() == [
                    p["colour"] for p in sorted(scene["pads"], key=lambda p: p["number"])
                ]
            elif kind == "describe cubes":
                words = answer.split()
                assert len(words) == 12 and all(
                    cubes[w]["t"] == f"t{i}" for i, w in enumerate(words) if w != "none"
                )
                assert {c["t"] for c in cubes.values()} == {
                    f"t{i}" for i, w in enumerate(words) if w != "none"
                }
            elif kind == "count":
                assert int(answer) == len(cubes)
            elif kind == "nearer":
                assert answer == min(named, key=lambda c: cubes[c]["distance"])
            elif kind == "left of":
                left = [c for c in cubes.values() if c["x"] < cubes[named[0]]["x"]]
                assert answer == (max(left, key=lambda c: c["x"])["colour"] if left else "none")
            elif kind == "sum":
                assert int(answer) == eval(question.removeprefix("what is "))


def test_nothing_held_out_is_asked_in_training(scenes):
    held_out_names = {name for names in sim_env.HELD_OUT_NAMES.values() for name in names}
    for seed in range(400):
        for kind, question, answer in prepare.questions(
            scenes[seed % len(scenes)], np.random.default_rng(seed)
        ):
            text = f"{question} {answer}".replace("plus", "+").replace("minus", "-")
            assert not any(f" {s} " in f" {text} " for s in sim_env.HELD_OUT_SUMS), text
            if kind != "looks like":  # the colour of a thing may be taught; an instruction never names it
                assert held_out_names.isdisjoint(text.split()), text


def test_garble_keeps_what_carries_meaning():
    task = "please put the red cube on the blue pad , then the one that looks like a tomato on top of the green square"
    for seed in range(50):
        garbled = prepare.garble(task, np.random.default_rng(seed)).split()
        assert len(garbled) == len(task.split())
        assert all(a == b or b in prepare.FILLER for a, b in zip(garbled, task.split()))


def test_data_do_not_depend_on_processes_or_on_a_kill(tmp_path):
    assert make(tmp_path / "whole").returncode == 0
    # a run that was killed leaves some shards and no meta.json: build that state, then let the command go on
    cfg = prepare.PrepareConfig(
        **prepare.PRESETS["debug"]
        | dict(
            config="debug",
            demos=3,
            starts=2,
            start_steps=3,
            scenes=5,
            held_out_scenes=2,
            out=str(tmp_path / "killed"),
        )
    )
    half = "import prepare, sys, json; cfg = prepare.PrepareConfig(**json.loads(sys.argv[1])); [prepare.make_shard((cfg, s, None)) for s in prepare.shards(cfg)[:2]]"
    (tmp_path / "killed" / "parts").mkdir(parents=True)
    from dataclasses import asdict

    subprocess.run([sys.executable, "-c", half, json.dumps(asdict(cfg))], cwd=ROOT, check=True)
    (tmp_path / "killed" / "parts" / "leftover.tmp123").write_bytes(b"half a file")
    result = make(tmp_path / "killed", "--workers=2")
    assert result.returncode == 0 and "going on: 2 of" in result.stdout
    for file in sorted((tmp_path / "whole").rglob("*.npy")):
        other = tmp_path / "killed" / file.relative_to(tmp_path / "whole")
        assert file.read_bytes() == other.read_bytes(), file.name
    read = lambda folder: json.loads((tmp_path / folder / "meta.json").read_text())
    assert (
        read("whole")["episodes"] == read("killed")["episodes"]
        and read("whole")["statistics"] == read("killed")["statistics"]
    )


def test_bad_input_is_one_line(tmp_path):
    assert make(tmp_path / "data").returncode == 0
    for more, words in (
        (["--out=" + str(tmp_path / "data")], "already holds a data set"),
        (["--families=juggle"], "unknown family"),
        (["--demos=-1"], "0 or more"),
    ):
        result = make(tmp_path / "new", *more)
        assert (
            result.returncode == 2 and words in result.stderr and len(result.stderr.strip().splitlines()) == 1
        )
