"""prepare.py: the scripted expert succeeds, questions tell the truth, nothing held out leaks."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import prepare
import sim_env
from model import PRESETS
from prepare import PrepareConfig, ScriptedExpert, Shard, demonstrate
from sim_env import LIMIT, OPEN, SEEDS, SPLITS, SO100Env, polar_to_xy

ROOT = Path(__file__).resolve().parent.parent
VAL = SEEDS["val"].start
SMALLEST = ["--config", "debug", "--demos=3", "--scenes=5"]


def make(out, *more):
    """prepare.py in a process of its own: its forks never meet another test's OpenGL context."""
    command = [sys.executable, ROOT / "prepare.py", *SMALLEST, f"--out={out}", *more]
    return subprocess.run(command, capture_output=True, text=True)


def config(out, **changes):
    mine = set(asdict(PrepareConfig())) - {"episodes"}  # this one is rl.py's
    known = {name: value for name, value in PRESETS["debug"].items() if name in mine}
    return PrepareConfig(**known | changes | {"config": "debug", "out": str(out)})


# -- the expert


@pytest.fixture(scope="module")
def env():
    env = SO100Env()
    yield env
    env.close()


def begin(env, family, seed=VAL, split="id"):
    return env.reset(seed=seed, options={"family": family, "split": split})


def succeeds(env, expert, steps):
    """Does the expert finish the task within so many control steps?"""
    return any(env.advance(expert.action())[0] for _ in range(steps))


def test_physics_is_deterministic(env):
    ends = []
    for _ in range(2):
        begin(env, "place")
        expert = ScriptedExpert(env)
        for _ in range(12):
            env.advance(expert.action())
        ends.append(env.data.qpos.copy())
    assert (ends[0] == ends[1]).all()


@pytest.mark.parametrize("family", LIMIT)
def test_expert_succeeds(env, family):
    for seed in range(VAL, VAL + 3):
        for noise in (False, True):
            _, entry, failure = demonstrate(env, seed, family, noise=noise, images=False)
            assert entry["success"] and failure == "", (seed, noise, failure)


def test_expert_succeeds_out_of_distribution(env):
    for split in SPLITS[1:]:
        begin(env, "sequence", VAL + 1, split)
        assert succeeds(env, ScriptedExpert(env), LIMIT["sequence"])


def test_a_held_cube_is_not_placed(env):
    """While the gripper holds the cube over its pad the episode goes on."""
    begin(env, "tiny")
    expert = ScriptedExpert(env)
    held_over_pad = 0
    terminated = False
    for _ in range(LIMIT["tiny"]):
        terminated, _ = env.advance(expert.action())
        over = np.linalg.norm(env.cube_xyz("red")[:2] - env.pad_xy(3)) < 0.02
        if any(env.touching("red")):
            held_over_pad += over
            assert not terminated
        if env.held("red"):
            assert sim_env.reasoning(env.goal, env.scene()).endswith(" , red cube in hand")
    assert held_over_pad and terminated


def test_demonstration_contract(env):
    arrays, entry, failure = demonstrate(env, VAL, "place")
    n = entry["length"]
    assert arrays["front"].shape == arrays["wrist"].shape == (n, 96, 96, 3)
    assert arrays["state"].shape == arrays["action"].shape == (n, 6)
    assert {array.dtype for array in arrays.values()} == {np.dtype("uint8"), np.dtype("float32")}
    assert entry["reason"][0][0] == 0 and entry["reason"][-1][1].endswith("there , done")
    texts = [text for _, text in entry["reason"]]
    assert all(a != b for a, b in zip(texts, texts[1:]))
    assert failure == "" and entry["task"] == env.task and entry["kind"] == "demo"
    arrays, entry, failure = demonstrate(env, VAL, "place", start_steps=3)
    assert entry["length"] == len(arrays["action"]) == 3 and entry["kind"] == "start"
    assert not entry["success"] and failure == "never grasped"


def test_demonstration_says_where_the_arm_did_not_obey(env):
    """Outside the recorded spans the arm follows its action up to a small drift; inside them it does not."""
    obeyed = []
    strayed = []
    for seed in range(VAL, VAL + 12):
        arrays, entry, _ = demonstrate(env, seed, "place", images=False)
        errors = np.abs(arrays["state"][1:, :2] - arrays["action"][:-1, :2]).max(1)
        for step, error in enumerate(errors):
            disturbed = any(first <= step < last for first, last in entry["disturbed"])
            (strayed if disturbed else obeyed).append(error)
    assert len(strayed) > 30 and np.mean(strayed) > 1.2 * np.mean(obeyed)


def test_expert_recovers_from_a_mistake(env):
    """An expert that is wrong about where things lie fails; the right one finishes the task from there."""
    begin(env, "place", VAL)
    mistaken = ScriptedExpert(env, (0.03, 0.01))
    expert = ScriptedExpert(env)
    assert not np.allclose(mistaken.action(), expert.action(), atol=0.5)
    assert not succeeds(env, mistaken, 15)
    assert succeeds(env, expert, 45)


def test_expert_tolerates_the_errors_of_a_policy(env):
    """With an error of 9 mm that changes every four steps, as a policy's does, the rules still succeed."""
    wins = 0
    for seed in range(VAL, VAL + 30):
        begin(env, "calculate", seed)
        rng = np.random.default_rng(seed)
        expert = ScriptedExpert(env)
        for step in range(LIMIT["calculate"]):
            if step % 4 == 0:
                expert.mistake = rng.normal(0, 0.009, 2)
            if env.advance(expert.action())[0]:
                wins += 1
                break
    assert wins >= 24


def test_expert_aims_within_reach_whatever_it_is_asked(env):
    begin(env, "place", VAL)
    expert = ScriptedExpert(env)
    for z in np.linspace(0, 0.15, 6):
        for roll in np.linspace(-160, 0, 9):
            for gripper in np.linspace(0, 100, 9):
                for r in (0.02, 0.5):
                    position = np.array([0, 0, 0, 0, 0, gripper])
                    expert.towards(position, polar_to_xy(10, r), z, roll, OPEN)


def test_expert_starts_anywhere(env):
    for seed in range(VAL, VAL + 6):
        _, entry, failure = demonstrate(
            env, seed, "place", noise=False, start_steps=LIMIT["place"], images=False
        )
        assert entry["success"], failure


def test_check_expert_prints_its_success_and_films_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare.main(["--config", "tiny", "--check_expert=2", "--out=none"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("tiny, with noise and mistakes: 100.0 % of 2 (34.2 - 100.0), ")
    assert said[1].startswith("tiny, undisturbed: 100.0 % of 2")
    assert (tmp_path / "out" / "expert" / "tiny.gif").is_file() and not (tmp_path / "none").exists()


# -- questions


@pytest.fixture(scope="module")
def scenes(env):
    found = []
    for seed in range(40):
        env.reset(seed=seed, options={"family": "sequence", "start": True})
        found.append(env.scene())
    return found


def true_answer(kind, question, scene):
    """The answer that the scene gives, found another way than scene_questions does."""
    cubes = {cube["colour"]: cube for cube in scene["cubes"]}
    pads = {pad["colour"]: pad for pad in scene["pads"]}
    named = [colour for colour in sim_env.COLOURS if colour in question.split()]
    if kind == "where":
        return f"{cubes[named[0]]['t']} {cubes[named[0]]['r']}"
    if kind == "pad":
        return f"pad {pads[named[0]]['number']}"
    if kind == "describe pads":
        return " ".join(sorted(pads, key=lambda colour: pads[colour]["number"]))
    if kind == "count":
        return str(len(cubes))
    if kind == "nearer":
        return min(named, key=lambda colour: cubes[colour]["distance"])
    if kind == "left of":
        left = [colour for colour in cubes if cubes[colour]["x"] < cubes[named[0]]["x"]]
        return max(left, key=lambda colour: cubes[colour]["x"]) if left else "none"
    if kind == "sum":
        expression = question.removeprefix("what is ")
        result = eval(expression)
        first, last = int(expression[0]), int(expression[-1])
        numbers = range(first + 1, result + 1) if "+" in expression else range(last + 1, first + 1)
        steps = [f"{number} {i}" for i, number in enumerate(numbers, 1)]
        return " ".join([expression, ":", *steps, "is", str(result)])
    if kind == "in hand":
        held = [colour for colour in cubes if cubes[colour]["held"]]
        return f"{held[0]} cube" if held else "none"
    if kind == "point":
        things = scene["cubes" if question.endswith("cube") else "pads"]
        return next(thing["point"] for thing in things if thing["colour"] == named[0])
    return None


def test_answers_are_true(scenes):
    checked = set()
    for seed, scene in enumerate(scenes):
        for kind, question, answer in prepare.scene_questions(scene, np.random.default_rng(seed)):
            expected = true_answer(kind, question, scene)
            if expected is not None:
                assert answer == expected, (kind, question)
                checked.add(kind)
    assert len(checked) == 9


def test_two_names_are_answered_in_the_order_of_the_instruction():
    colour_of = {
        f"looks like {thing}": (name, colour)
        for colour, things in sim_env.WORDS["vague_names"].items()
        for name, thing in things.items()
    }
    for seed in range(50):
        question, answer = prepare.two_names(np.random.default_rng(seed))
        found = sorted(
            (question.index(phrase), *names)
            for phrase, names in colour_of.items()
            if re.search(rf"{phrase}\b", question)
        )
        (_, one, colour), (_, other, other_colour) = found if len(found) == 2 else found * 2
        assert answer == f"first , {one} is {colour} , then , {other} is {other_colour}"


def test_nothing_held_out_is_asked_in_training(scenes):
    new = sim_env.WORDING["ood_instruction"]
    held_out_names = {name for names in sim_env.VAGUE_NAMES.values() for name in names[new.names]}
    for seed in range(400):
        rng = np.random.default_rng(seed)
        for kind, question, answer in prepare.scene_questions(scenes[seed % len(scenes)], rng, sim_env.ASKED):
            text = f" {question} {answer} ".replace("plus", "+").replace("minus", "-")
            assert not any(f" {expression} " in text for expression in new.sums), text
            if kind != "looks like":  # the colour of a thing may be taught; an instruction never names it
                assert held_out_names.isdisjoint(text.split()), text


def test_replace_function_words_keeps_what_names_cubes_and_pads():
    task = "please put the red cube on the blue pad , then the one that looks like a tomato on top of it"
    replaced = set()
    for seed in range(50):
        words = prepare.replace_function_words(task, np.random.default_rng(seed)).split()
        replaced |= set(task.split()) - set(words)
        kept = [word for word in words if word in prepare.CONTENT]
        assert kept == [word for word in task.split() if word in prepare.CONTENT]
    assert replaced == {"please", "put", "on", "top", "of", "it"}


# -- shards and merging


def test_training_and_held_out_seeds_never_meet():
    for seed in (0, 50_000):
        used = {}
        for shard in prepare.plan_simulation(PrepareConfig(seed=seed)):
            seeds = range(shard.first, shard.first + shard.n)
            assert all(s in SEEDS["val" if shard.kind == "questions_val" else "train"] for s in seeds)
            used.setdefault(shard.kind, set()).update(seeds)
        assert sum(map(len, used.values())) == len(set().union(*used.values())) == 600 + 2000 + 26000 + 300


def test_data_do_not_depend_on_processes_or_on_a_kill(tmp_path):
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    assert make(whole).returncode == 0
    # A run that was killed leaves some shards and no meta.json. Build that state, then let the command go on.
    cfg = config(killed, demos=3, scenes=5)
    script = (
        "import json, sys, prepare; cfg = prepare.PrepareConfig(**json.loads(sys.argv[1]))\n"
        "for shard in prepare.plan_simulation(cfg)[:2]: prepare.make_shard(cfg, shard)"
    )
    subprocess.run([sys.executable, "-c", script, json.dumps(asdict(cfg))], cwd=ROOT, check=True)
    (killed / "parts" / "leftover.npz.tmp").write_bytes(b"half a file")
    result = make(killed, "--workers=2")
    assert result.returncode == 0 and "going on: 2 of" in result.stdout
    assert not (killed / "parts").exists()
    for file in whole.rglob("*.npy"):
        assert file.read_bytes() == (killed / file.relative_to(whole)).read_bytes(), file.name
    metas = [json.loads((folder / "meta.json").read_text()) for folder in (whole, killed)]
    for key in ("episodes", "statistics", "failures"):
        assert metas[0][key] == metas[1][key]
    assert metas[0]["made_by"]["fit"] == "stretch" and metas[0]["fps"] == 10


def test_shards_do_not_depend_on_the_order_in_which_they_are_made(data, tmp_path):
    cfg = config(tmp_path / "again")
    shards, common, _ = prepare.make_plan(cfg)
    for shard in reversed(shards):
        prepare.make_shard(cfg, shard)
    prepare.merge(cfg, shards, common)
    for file in data.rglob("*"):
        cached = file.name.startswith("states_")  # left by a test of train.py's --new_expert
        if (file.suffix == ".npy" and not cached) or file.name == "questions.json":
            assert file.read_bytes() == (tmp_path / "again" / file.relative_to(data)).read_bytes(), file.name


def write_questions(cfg, shard, pictures, left_out=None):
    """The file of a shard of brought pictures, each of one grey value, asked for that value."""
    shard.path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    images = np.zeros((len(pictures), 8, 8, 3), np.uint8)
    images += np.array(pictures, np.uint8)[:, None, None, None]
    texts = [[["grey", "how bright", str(value)]] for value in pictures]
    left_out = json.dumps(left_out or {})
    np.savez(shard.path(cfg.out), front=images, info=json.dumps(texts), left_out=left_out)


def test_brought_pictures_that_are_held_out_are_not_trained_on(tmp_path, capsys):
    cfg = config(tmp_path, questions_from="others")
    common = {"cameras": ["front", "wrist"], "motors": ["a"], "fps": 10}
    shards = [Shard("questions_val", "0", 0, 2, "source"), Shard("questions", "0", 2, 3, "source")]
    shards += [Shard("questions", "1", 0, 2, "source"), Shard("questions", "2", 0, 1, "source")]
    write_questions(cfg, shards[0], [1, 2], {"damaged pictures": 1})
    write_questions(cfg, shards[1], [2, 1])  # all of them are held out
    write_questions(cfg, shards[2], [3, 1, 4], {"long questions": 2})
    write_questions(cfg, shards[3], [3], {"long questions": 1})  # the same picture twice in training is fine
    prepare.merge(cfg, shards, common)
    said = capsys.readouterr().out
    assert "2 pictures, 2 questions; left out: {'damaged pictures': 1}" in said
    assert "3 pictures, 3 questions; left out: {'long questions': 3}" in said
    for name, values in (("questions_val", [1, 2]), ("questions", [3, 4, 3])):
        folder = tmp_path / name
        assert np.load(folder / "front.npy")[:, 0, 0, 0].tolist() == values
        texts = json.loads((folder / "questions.json").read_text())
        assert [answer for [[_, _, answer]] in texts] == [str(value) for value in values]
        assert json.loads((folder / "meta.json").read_text())["grey"] == ["wrist"]
        assert not (folder / "wrist.npy").exists()
    assert not (tmp_path / "meta.json").exists()


def test_a_shard_without_a_success_is_left_out(tmp_path):
    cfg = config(tmp_path)
    shard = Shard("demo", "place", 0, 1)
    shard.path(cfg.out).parent.mkdir()
    np.savez(shard.path(cfg.out), info="[]", left_out=json.dumps({"place: dropped": 1}))
    with pytest.raises(ValueError, match="place: dropped"):
        prepare.merge(cfg, [shard], {"cameras": ["front", "wrist"]})


def test_a_full_disk_is_one_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "wrist.npy").symlink_to("/dev/full")
    result = make(tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: the disk is full")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "meta.json").exists() and list((tmp_path / "parts").glob("*.npz"))


def test_too_little_disk_is_said_before_the_work(tmp_path):
    cfg = config(tmp_path)
    (tmp_path / "parts").mkdir()
    prepare.check_disk(cfg, 10)
    with pytest.raises(ValueError, match="GB are free"):
        prepare.check_disk(cfg, 10**12)


def test_a_finished_folder_and_foreign_parts_are_refused(data, tmp_path, fails):
    assert "already holds a data set" in fails(prepare.main, ["--config", "debug", f"--out={data}"])
    asked = ["--config", "debug", f"--out={data}", "--questions_from=nowhere"]
    assert "already holds questions" in fails(prepare.main, asked)
    assert not (data / "parts").exists()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "settings.json").write_text("{}")
    assert "other settings" in fails(prepare.main, ["--config", "debug", f"--out={tmp_path}"])


@pytest.mark.parametrize("name", ["parts/notes.txt", "films/x.tmp1", "questions/questions.json", "front.npy"])
def test_what_others_have_put_there_stays(tmp_path, fails, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("somebody's")
    assert "is left as it is" in fails(prepare.main, ["--config", "debug", f"--out={tmp_path}"])
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--families=plaice"], "--families must be one of place"),
        (["--seed=200000"], "seeds of that kind"),
        (["--families=place,place"], "--families must list different words"),
        (["--held_out_scenes=100000000"], "--held_out_scenes must lie in"),
        (["--video=h264"], "--video does nothing without --export"),
        (["--fit=crop"], "--fit does nothing without --lerobot and without --questions_from"),
        (["--lerobot=x", "--out=x", "--demos=3"], "--demos does nothing with --lerobot"),
        (["--seed=-1"], "--seed"),
        (["--starts=300000"], "--starts must lie in [0, 200000]"),
        (["--demos=-1"], "--demos"),
        (["--workers=-1"], "--workers"),
        (["--image_size=4"], "--image_size"),
        (["--fit=zoom"], "stretch, crop"),
        (["--convention=percent"], "without --lerobot"),
        (["--lerobot=x", "--out=x", "--calibration=arm.json"], "--calibration=FILE"),
        (["--episodes=0-2"], "without --lerobot"),
        (["--kinds=demo"], "without --export"),
        (["--cameras=front=top"], "--cameras does nothing without --lerobot"),
        (["--start_steps=3"], "unknown option"),
        (["--export=data/small", "--lerobot=x", "--out=x"], "leave out --lerobot"),
        (["--lerobot=x"], "--out="),
    ],
)
def test_mistakes_are_one_line(fails, options, words):
    assert words in fails(prepare.main, options)
