"""Tests of sample.py: films, questions, replay, evaluation with a debug run, and what it says to bad input."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image, ImageSequence

import sample
import sim_env
import train


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the debug run, so that a test may write into it."""
    return shutil.copytree(trained, tmp_path / "run")


def arguments(run, *words):
    return ["--config", "debug", f"--run={run}", "--threads=1", *words]


def with_config(run, **changes):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | changes))
    return run


@pytest.mark.parametrize(
    "words",
    [["put the red cube on the blue pad, señor \U0001f916"], ["--family=tiny"]],
    ids=["typed, not ASCII", "drawn"],
)
def test_film(run, capsys, words):
    sample.main(arguments(run, *words))
    said = capsys.readouterr().out
    steps = int(re.search(r"success after (\d+) steps", said).group(1))
    assert said.startswith("instruction: ") and "<reason>" in said
    (gif,), (sheet,) = (run / "sample").glob("*.gif"), (run / "sample").glob("*.png")
    assert gif.stem == sheet.stem and gif.name.isascii() and " " not in gif.name
    with Image.open(
        gif
    ) as film:  # one frame per control step, then the last one for a second; equal frames are merged
        length = sum(frame.info["duration"] for frame in ImageSequence.Iterator(film))
        assert film.size == (512, 368) and length == (steps + sim_env.FPS) * (1000 // sim_env.FPS)
    with Image.open(sheet) as picture:
        assert picture.size == (4 * 512 // 2, 4 * 368 // 2) and np.asarray(picture).std() > 10


def test_films_are_repeatable(trained, tmp_path):
    """The chunk and the importance of each query state depend on the seed alone."""
    policy = sample.load_policy(trained)
    env = sim_env.SO100Env(px=policy.cfg.image_size)
    obs, _ = env.reset(seed=2_000_000)
    runs = [policy.act(*sample.look(obs, policy), seed=5)[0][0] for _ in range(2)]
    bars = [sample.importance(policy, obs, runs[0]) for _ in range(2)]
    env.close()
    assert np.array_equal(*runs) and np.array_equal(*bars)
    assert (
        bars[0].shape == (policy.cfg.queries,) and bars[0].max() == pytest.approx(1) and (bars[0] >= 0).all()
    )


def test_ask(run, capsys):
    sample.main(arguments(run, "--ask", "Which pad is blue?", "--seed=2000003"))
    assert capsys.readouterr().out.startswith("Which pad is blue?\n")
    assert Image.open(run / "sample" / "scene_2000003.png").size == (768, 384)


def test_replay(run, capsys):
    sample.main(arguments(run, "--replay"))
    said = capsys.readouterr().out
    for motor in sim_env.MOTORS:
        numbers = re.search(rf"^{motor} +([\d. ]+)$", said, re.M).group(1).split()
        assert len(numbers) == 8 + 1 and all(0 < float(x) < 500 for x in numbers)
    assert Image.open(run / "sample" / "replay.png").size == (640, 6 * 110 + 24)


def test_replay_of_the_recording_itself_has_no_error(run, capsys, monkeypatch):
    """A policy that says what was recorded gets zeros in every cell, also where chunks reach over an episode's end."""
    policy = sample.load_policy(run)
    episodes = sample.Episodes(json.loads((run / "config.json").read_text())["data"], policy.cfg)
    real, truth = sample.Episodes.samples, []
    monkeypatch.setattr(
        sample.Episodes,
        "samples",
        lambda self, tokenizer, picks: truth.append(real(self, tokenizer, picks)) or truth[-1],
    )
    monkeypatch.setattr(policy, "act", lambda *_: (truth[-1]["actions"].numpy(), None))
    sample.replay(policy, sample.SampleConfig(config="debug", run=str(run)))
    assert len(episodes) > 8 and re.findall(r"\d+\.\d\d", capsys.readouterr().out).count("0.00") == 6 * 9


def test_eval(run, capsys):
    sample.main(arguments(run, "--eval=2", "--arms=6"))
    said = capsys.readouterr().out
    results = json.loads((run / "eval.json").read_text())
    assert list(results) == ["place"]  # the families that the run was trained on
    assert set(results["place"]) == {"id", "ood_position", "ood_instruction"}
    for cell in results["place"].values():
        assert set(cell) == {
            "success",
            "n",
            "low",
            "high",
            "target_at_0",
            "reasoning",
            "steps",
            "ms_per_chunk",
            "ms_by_stage",
        }
        assert (
            cell["n"] == 2
            and 0 <= cell["low"] <= cell["success"] <= cell["high"] <= 1
            and cell["ms_per_chunk"] > 0
        )
        assert all(
            cell[k] is None or 0 <= cell[k] <= 1 for k in ("target_at_0", "reasoning")
        )  # None: it wrote nothing
        assert (cell["steps"] is None) == (cell["success"] == 0)  # steps are those of the successes
    assert "place" in said and "ood_position" in said and "eval.json" in said and not list(run.glob("*.tmp"))


def test_eval_with_the_teachers_thoughts(run, capsys):
    sample.main(arguments(run, "--eval=2", "--arms=2", "--splits=id", "--thoughts=teacher"))
    cell = json.loads((run / "eval_teacher_id.json").read_text())["place"]["id"]
    assert (cell["target_at_0"], cell["reasoning"]) == (
        1,
        1,
    ) and "eval_teacher_id.json" in capsys.readouterr().out


def test_interval_of_a_success_rate():
    assert sim_env.wilson(12, 14) == (
        pytest.approx(0.60, abs=0.005),
        pytest.approx(0.96, abs=0.005),
    )  # the paper's best row: 14 trials
    low, high = sim_env.wilson(0, 10)
    assert low == pytest.approx(0, abs=1e-9) and high == pytest.approx(1 - sim_env.wilson(10, 10)[0])


def test_training_ends_with_the_same_table(run, capsys):
    cfg = train.TrainConfig(**train.PRESETS["debug"] | dict(eval=1))
    policy = sample.load_policy(run)
    train.evaluate(policy, {}, cfg, run, print)
    assert (
        json.loads((run / "eval.json").read_text())["place"]["id"]["n"] == 1
        and "ood_instruction" in capsys.readouterr().out
    )


def test_many_arms_are_seen_through_the_policys_cameras_in_its_order(run, monkeypatch):
    policy, seen = sample.load_policy(with_config(run, cameras="wrist,front")), []
    real = policy.act
    monkeypatch.setattr(
        policy, "act", lambda images, *rest, **more: seen.append(images) or real(images, *rest, **more)
    )
    images = np.zeros((1, 2, 32, 32, 3), np.uint8)
    images[:, sim_env.CAMERAS.index("wrist")] = 255
    actions, _ = sim_env.driver(policy)(
        {
            "images": images,
            "state": np.zeros((1, 6), np.float32),
            "task": ["put the red cube on the blue pad"],
        }
    )
    assert actions.shape == (1, policy.cfg.execute, 6)
    assert np.asarray(seen[0])[0, 0].min() == 255 and np.asarray(seen[0])[0, 1].max() == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["--family=plaice"], "place"),
        (["--split=odd"], "ood_position"),
        ([" "], "is empty"),
        (["sing me a song"], "cannot tell"),
        (["put the red cube on the red pad, the red block on the blue pad"], "cannot tell"),
        (["put it " * 1500], "tokens long"),
        (["--ask= "], "is empty"),
        (["--ask", "why " * 3000], "tokens long"),
        (["--eval=-1"], "0 or more"),
        (["--eval=1", "--arms=0"], "arms"),
        (["--eval=1", "--seeds=train"], "report or val"),
        (["--thoughts=mine"], "own or teacher"),
        (["--thoughts=teacher"], "add --eval=300"),
        (["--eval=1", "--splits=od"], "unknown split od"),
        (["--eval=9999999"], "report seeds"),
        (["--eval=1", "--families=plaice"], "place"),
        (["--replay", "--data=nowhere"], "python prepare.py"),
        (["one", "two"], "unexpected word 'two'"),
        (["--evall=3"], "did you mean eval"),
    ],
    ids=lambda words: " ".join(words)[:24] if isinstance(words, list) else "",
)
def test_bad_input_is_answered_in_one_line(trained, tmp_path, fails, words, said):
    assert said in fails(sample.main, arguments(trained, f"--out={tmp_path}", *words))
    assert not any(tmp_path.iterdir())


def test_missing_or_foreign_runs_are_answered_in_one_line(run, tmp_path, fails):
    assert "python train.py" in fails(sample.main, arguments(tmp_path / "nothing"))
    for words in ([], ["--ask", "which pad is blue"], ["--eval=1"]):
        said = fails(sample.main, arguments(with_config(run, cameras="front,top"), *words))
        assert "top" in said and "wrist" in said
    assert "'a', 'b', 'c', 'd', 'e', 'f'" in fails(
        sample.main, arguments(with_config(run, cameras="front,wrist", motors="a,b,c,d,e,f"), "--replay")
    )
    assert "does not fit" in fails(sample.main, arguments(with_config(run, width=64)))
    (run / "model.safetensors").unlink()
    assert "is no checkpoint" in fails(sample.main, arguments(run))
