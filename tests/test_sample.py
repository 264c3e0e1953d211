"""Tests of sample.py: films, questions, replay, evaluation of a debug run, answers to bad input."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image, ImageSequence

import evaluate
import sample
from evaluate import Episode, SingleEnv
from model import load_policy
from sim_env import CAMERAS, FPS, MOTORS, SPLITS, SO100Env


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the debug run, so that a test may write into it."""
    return shutil.copytree(trained, tmp_path / "run")


def with_config(run, **changes):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | changes))
    return run


@pytest.mark.parametrize("words", [[], ["--families=tiny,place"]], ids=["place", "tiny"])
def test_film(run, capsys, words):
    sample.main([f"--run={run}", *words])
    said = capsys.readouterr().out
    steps = int(re.search(r"success after (\d+) steps", said).group(1))
    assert "<reason>" in said
    (gif,), (sheet,) = (run / "sample").glob("*.gif"), (run / "sample").glob("*.png")
    assert gif.stem == sheet.stem and gif.name.isascii() and " " not in gif.name
    # one frame per control step, then the last one for a second; equal frames are merged
    with Image.open(gif) as film:
        length = sum(frame.info["duration"] for frame in ImageSequence.Iterator(film))
        assert film.size == (512, 368) and length == (steps + FPS) * (1000 // FPS)
    with Image.open(sheet) as picture:
        assert picture.size == (4 * 512 // 2, 4 * 368 // 2) and np.asarray(picture).std() > 10


def test_a_film_is_what_the_policy_fn_does(run):
    """One action a call instead of a chunk changes nothing, and the bars are a share of the largest."""
    policy = load_policy(run)
    cfg = sample.SampleConfig(run=str(run), env="sim", families="place")
    logs = []
    for filmed in (True, False):
        with sample.single_env(policy, cfg) as vec:
            decide = sample.Film(policy, vec, cfg) if filmed else evaluate.policy_fn(policy)
            evaluate.run_episodes(vec, [Episode(2_000_000, cfg.scene)], decide)
            logs.append(vec.state.copy())
        if filmed:
            assert len(decide.frames) == vec.infos[0]["steps"] and len(decide.weights) == policy.cfg.queries
            assert max(decide.weights) == pytest.approx(1) and min(decide.weights) >= 0
    assert np.array_equal(*logs)


def test_films_are_repeatable(run):
    """The chunk and the importance of each query state depend on the seed alone."""
    policy = load_policy(run)
    px = policy.cfg.image_size
    with SingleEnv(SO100Env(px=px), px, CAMERAS, 6) as vec:
        vec.reset([0], [2_000_000], [{}])
        obs = vec.observe([0])
    chunks, bars = [], []
    for _ in range(2):
        chunk, (text,) = policy.act(obs["images"], obs["state"], obs["task"], seed=5)
        chunks.append(chunk)
        bars.append(sample.importance(policy, obs, chunk[0, :4], text))
    assert np.array_equal(*chunks) and np.array_equal(*bars)
    assert bars[0].shape == (policy.cfg.queries,) and bars[0].max() == pytest.approx(1)


def test_the_newest_policy_is_used(trained, tmp_path, capsys, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample.main(["--ask=which pad is blue"])
    assert capsys.readouterr().out.startswith("policy: small.safetensors, which ships with the repository")
    shutil.rmtree("out")
    for age, name in enumerate(("new", "old")):
        folder = shutil.copytree(trained, tmp_path / "out" / name)
        os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    (tmp_path / "out" / "unfinished").mkdir()
    (tmp_path / "out" / "unfinished" / "config.json").write_text("{}")  # no weights yet
    sample.main(["--ask=which pad is blue"])
    assert capsys.readouterr().out.startswith("policy: out/new\n")
    assert (tmp_path / "out" / "new" / "sample" / "scene_2000000.png").is_file()
    assert "out/debug is no checkpoint" in fails(sample.main, ["--config", "debug"])


def test_ask(run, capsys):
    sample.main([f"--run={run}", "--ask", "Which pad is blue?", "--seed=2000003"])
    assert capsys.readouterr().out.startswith("Which pad is blue?\n")
    with Image.open(run / "sample" / "scene_2000003.png") as picture:
        assert picture.size == (768, 384)


def test_ask_about_pictures(run, tmp_path, capsys, fails):
    for name in CAMERAS:
        Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")
    front, wrist, text = (tmp_path / f"{name}.png" for name in (*CAMERAS, "text"))

    def tell(words):
        return fails(sample.main, [f"--run={run}", "--ask=what is it", f"--image={words}"])

    sample.main([f"--run={run}", "--ask=what is it", f"--image={front},{wrist}"])
    assert capsys.readouterr().out.startswith("what is it\n")
    assert "--image=front,wrist" in tell(front)
    assert "cannot be read" in tell(f"{front},{text}")
    assert "cannot be read" in tell(f"{front},none.png")


def test_replay(run, capsys):
    sample.main([f"--run={run}", "--replay"])
    said = capsys.readouterr().out
    for motor in MOTORS:
        numbers = re.search(rf"^{motor} +([\d. ]+)$", said, re.M).group(1).split()
        assert len(numbers) == 8 and all(0 < float(x) < 500 for x in numbers)
    with Image.open(run / "sample" / "replay.png") as picture:
        assert picture.size == (640, 6 * 110)


def test_replay_of_the_recording_itself_has_no_error(run, capsys, monkeypatch):
    """A policy that does what was recorded gets zeros, also where chunks reach over an episode's end."""
    policy = load_policy(run)
    real = sample.Episodes.samples
    truth = []

    def watch(self, tokenizer, picks):
        truth.append(real(self, tokenizer, picks))
        return truth[-1]

    monkeypatch.setattr(sample.Episodes, "samples", watch)
    monkeypatch.setattr(policy, "act", lambda *_: (truth[-1]["actions"].numpy(), None))
    sample.replay(policy, sample.SampleConfig(run=str(run)))
    assert re.findall(r"\d+\.\d\d", capsys.readouterr().out).count("0.00") == 6 * 8


def test_eval(run, capsys):
    sample.main([f"--run={run}", "--eval=2"])
    said = capsys.readouterr().out
    results = json.loads((run / "eval.json").read_text())
    assert list(results) == ["place"]  # the families that the run was trained on
    assert list(results["place"]) == list(SPLITS)
    for cell in results["place"].values():
        assert cell["n"] == 2 and 0 <= cell["low"] <= cell["success"] <= cell["high"] <= 1
        assert cell["ms_per_chunk"] > 0
        shares = [cell["target_at_0"], cell["reasoning"], *cell["looks"].values()]
        assert all(0 <= share <= 1 for share in shares) and sum(shares[2:]) == pytest.approx(1)
        assert (cell["steps"] is None) == (cell["success"] == 0)  # steps are those of the successes
    # a row of success and one of reasoning for each cell
    assert len(re.findall(r"^place +(?:id|asked|ood)", said, re.M)) == 2 * len(SPLITS)
    assert "place: " in said and "eval.json" in said
    assert not list(run.glob("*.tmp"))


def test_eval_with_the_teachers_reasoning(run, capsys):
    sample.main([f"--run={run}", "--eval=2", "--splits=id", "--seeds=val", "--reasoning=teacher"])
    cell = json.loads((run / "eval_teacher_val_id.json").read_text())["place"]["id"]
    assert (cell["target_at_0"], cell["reasoning"], cell["looks"]["right"]) == (1, 1, 1)
    assert "eval_teacher_val_id.json" in capsys.readouterr().out


def test_a_policy_sees_through_its_cameras_in_its_order(run, monkeypatch):
    policy = load_policy(with_config(run, cameras="wrist,front"))
    seen = []
    real = policy.act

    def watch(images, *rest, **more):
        seen.append(images)
        return real(images, *rest, **more)

    monkeypatch.setattr(policy, "act", watch)
    images = np.zeros((1, 2, 32, 32, 3), np.uint8)
    images[:, CAMERAS.index("wrist")] = 255
    obs = {
        "images": images,
        "state": np.zeros((1, 6), np.float32),
        "task": ["put the red cube on the blue pad"],
        "episode": [evaluate.Episode(0, {})],
    }
    actions, _ = evaluate.policy_fn(policy)(obs)
    assert actions.shape == (1, policy.cfg.n_action_steps, 6)
    assert np.asarray(seen[0])[0, 0].min() == 255 and np.asarray(seen[0])[0, 1].max() == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["--families=plaice"], "place"),
        (["--splits=odd"], "ood_position"),
        ([" "], "is empty"),
        (["put it " * 1500], "tokens long"),
        (["--ask= "], "is empty"),
        (["--ask", "why " * 3000], "tokens long"),
        (["--eval=-1"], "--eval must lie in [0, 1000000]"),
        (["--eval=1", "--seeds=train"], "report, val"),
        (["--reasoning=mine"], "own, teacher"),
        (["--reasoning=teacher"], "--reasoning does nothing without --eval: add it"),
        (["--image=x.png"], "--image does nothing without --ask: add it"),
        (["--eval=1", "--splits=od"], "not 'od'"),
        (["--eval=9999999"], "--eval must lie in"),
        (["--eval=1", "--families=plaice"], "place"),
        (["--env=reel"], "neither sim, real"),
        (["--dry_run"], "--dry_run does nothing without --env=real"),
        (["--replay", "--splits=id"], "--splits does nothing with --replay"),
        (["--eval=1", "put it"], "--task does nothing with --eval and without --env=real"),
        (["--eval=1", "--interactive"], "--interactive does nothing with --eval"),
        (["--seeds=val"], "--seeds does nothing without --eval"),
        (["--delay=1,,2", "--eval=1"], "--delay must list different words"),
        (["--splits=id,id"], "--splits must list different words"),
        (["one", "two"], "given twice: 'one' and 'two'"),
        (["--evall=3"], "did you mean eval"),
    ],
    ids=lambda words: str(words)[:24],
)
def test_bad_input_is_answered_in_one_line(run, fails, words, said):
    assert said in fails(sample.main, [f"--run={run}", *words])
    assert not (run / "sample").exists()


@pytest.mark.parametrize(
    "task", ["sing me a song", "put the red cube on the red pad, the red block on the blue pad"]
)
def test_instructions_that_nobody_understands_are_answered_in_one_line(run, fails, task):
    assert "cannot tell" in fails(sample.main, [f"--run={run}", task])


def test_a_typed_instruction(run, capsys):
    sample.main([f"--run={run}", "put the red cube on the blue pad, señor \U0001f916"])
    assert "success after" in capsys.readouterr().out
    (gif,) = (run / "sample").glob("*.gif")
    assert gif.name.startswith("put_the_red_cube_on_the_blue_pad")


def test_missing_or_foreign_runs_are_answered_in_one_line(run, tmp_path, fails):
    assert "python train.py" in fails(sample.main, [f"--run={tmp_path / 'nothing'}"])
    argv = [f"--run={run}"]
    with_config(run, cameras="front,top")
    for words in ([], ["--ask", "which pad is blue"], ["--eval=1"]):
        said = fails(sample.main, [*argv, *words])
        assert "top" in said and "wrist" in said
    with_config(run, cameras="front,wrist", motors="a,b,c,d,e,f")
    assert "'a', 'b', 'c', 'd', 'e', 'f'" in fails(sample.main, [*argv, "--replay"])
    with_config(run, data="nowhere", motors=",".join(MOTORS))
    assert "python prepare.py" in fails(sample.main, [*argv, "--replay"])
    with_config(run, width=64)
    assert "does not fit" in fails(sample.main, argv)
    (run / "model.safetensors").unlink()
    assert "is no checkpoint" in fails(sample.main, argv)
