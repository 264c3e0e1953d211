"""Tests of data.py: tokenizer, packing, statistics, ends of chunks, batches, questions, error messages."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import debug_config

import sim_env
from data import Episodes, Questions, Tokenizer, check_set, pack, read_meta, save_episodes, statistics
from model import Config

CFG = debug_config()


@pytest.fixture(scope="module")
def episodes(data):
    return Episodes(data, CFG)


@pytest.fixture(scope="module")
def questions(data):
    return Questions(data / "questions", CFG)


@pytest.fixture(scope="module")
def tokenizer(episodes, questions):
    return Tokenizer.train(episodes.texts() + questions.texts(), CFG.vocab_size)


# -- text ---------------------------------------------------------------------------------------------------


def test_tokenizer_is_lossless_for_every_string(tokenizer):
    rng = random.Random(0)
    known = "put the red cube on the blue pad . where is"

    def character():
        while True:
            c = rng.choice(
                [
                    rng.randrange(32),
                    rng.randrange(32, 127),
                    rng.randrange(127, 0x3000),
                    rng.randrange(0x110000),
                ]
            )
            if not 0xD800 <= c < 0xE000:  # a lone surrogate is no text
                return chr(c)

    texts = [
        "",
        " ",
        "  ",
        "\n",
        " put",
        "put ",
        " put  the\tred ",
        "PUT The Red Cube",
        "\x00\x1f\x7f",
        "🤖🦾👩‍🔬 cube",
        "e\u0301 é ß İ",
        "빨간 큐브",
        "<pad></reason><task>",
        known * 250,
    ]
    texts += [
        "".join(
            rng.choice([character(), character(), " ", rng.choice(known.split())])
            for _ in range(rng.randrange(40))
        )
        for _ in range(500)
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(known * 250) > 10_000


def test_frequent_words_are_one_token_and_unknown_ones_bytes():
    tokenizer = Tokenizer.train(["put the red cube"] * 20 + ["put the zorb"] * 19, 512)
    assert len(tokenizer.encode("put the red cube")) == 4 and len(tokenizer) == 7 + 256 + 4
    assert tokenizer.encode("zorb") == [7 + byte for byte in b" zorb"]  # 19 times is too rare
    assert (
        len(Tokenizer.train(["put the red cube"] * 20, 7 + 256 + 2)) == 7 + 256 + 2
    )  # never more than the model has rows for
    assert (
        tokenizer.decode([0, 3, *tokenizer.encode("red"), 6, 10**6]) == "red"
    )  # special and unheard-of ids say nothing


def test_prompts(tokenizer):
    t = tokenizer
    words = t.encode("put the red cube")
    assert t.prompt("put the red cube") == [t.task, *words, t.reason]
    assert t.prompt("Put  the RED cube\n") == t.prompt("put the red cube")
    assert t.prompt("put the cube, please!") == t.prompt("put the cube , please !")
    assert t.prompt("put the red cube", reasoning=False) == [t.task, *words]
    assert t.question("Where is it?") == [t.ask, *t.encode("where is it ?"), t.reply]
    assert t.question("<task> put the red cube") == t.prompt("put the red cube")
    assert t.answer("where is it ?", "left") == [*t.encode("left"), t.end_answer]
    assert t.answer("<task> x", "left") == [*t.encode("left"), t.end_reasoning] == t.reasoning_ids("left")
    assert len({t.task, t.reason, t.end_reasoning, t.ask, t.reply, t.end_answer, 0}) == len(t.SPECIAL)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("put it " * 1500, "tokens long"),
        ("zx" * 5000, "tokens long"),
        ("🤖" * 100, "tokens long"),
    ],
    ids=["empty", "blank", "words", "letters", "emoji"],
)
def test_unusable_instructions_say_why_in_one_line(tokenizer, text, said):
    for call in (tokenizer.prompt, tokenizer.question):
        with pytest.raises(ValueError) as caught:
            call(text)
        assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_tokenizer_on_disk(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.words))
    assert Tokenizer.load(tmp_path).words == tokenizer.words
    with pytest.raises(ValueError, match="python train.py"):
        Tokenizer.load(tmp_path / "nothing")


def test_every_training_text_fits_the_model():
    """The longest reasoning must fit max_reasoning_tokens, or it would be cut silently; the vocabulary must
    hold all words.
    """
    small = Config()
    env, texts = sim_env.SO100Env(px=8), []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        env.reset(seed=seed, options={"family": "sequence"})
        texts += [
            sim_env.random_task(env.scene(), family, rng) for family in sim_env.FAMILIES for _ in range(60)
        ]
    env.close()
    tokenizer = Tokenizer.train(
        [text for pair in texts for text in pair] * 20, small.vocab_size
    )  # so that no word is too rare
    assert len(tokenizer) < small.vocab_size
    assert max(len(tokenizer.reasoning_ids(reason)) for _, reason in texts) <= small.max_reasoning_tokens
    assert max(len(tokenizer.prompt(task)) for task, _ in texts) <= Tokenizer.LONGEST // 2


# -- packing ------------------------------------------------------------------------------------------------


def test_pack_by_hand():
    got = pack([[([10, 11], [12, 13]), ([14], [15])], [([20, 21, 22], [])]])
    assert got["tokens"].tolist() == [[10, 11, 12, 13, 14, 15], [20, 21, 22, 0, 0, 0]]
    assert got["segments"].tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, -1, -1, -1]]
    assert got["positions"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    # the last word of the prompt predicts the first of the target; the last of the target predicts nothing
    assert got["labels"].tolist() == [[-100, 12, 13, -100, 15, -100], [-100] * 6]


# -- statistics ---------------------------------------------------------------------------------------------


def test_statistics_against_numpy(data, episodes):
    x = np.load(data / "action.npy").astype(np.float64)
    s = episodes.meta["statistics"]["action"]
    assert (
        np.allclose(s["mean"], x.mean(0))
        and np.allclose(s["std"], x.std(0))
        and np.allclose(s["min"], x.min(0))
        and np.allclose(s["max"], x.max(0))
    )
    for name, q in (("q01", 1), ("q50", 50), ("q99", 99)):
        assert np.allclose(s[name], np.percentile(x, q, axis=0))
    known = statistics(np.arange(101)[:, None] * np.array([[1.0, -2]]))
    assert (
        known["q01"] == pytest.approx([1, -198])
        and known["q99"] == pytest.approx([99, -2])
        and json.loads(json.dumps(known)) == known
    )


# -- episodes -----------------------------------------------------------------------------------------------


def test_data_set_is_whole(data, episodes):
    meta, n = episodes.meta, len(np.load(data / "state.npy", mmap_mode="r"))
    assert [e["start"] for e in meta["episodes"]] == [
        sum(e["length"] for e in meta["episodes"][:i]) for i in range(len(meta["episodes"]))
    ]
    assert sum(e["length"] for e in meta["episodes"]) == n == len(np.load(data / "action.npy", mmap_mode="r"))
    assert not (data / "parts").exists()
    for camera in meta["cameras"]:
        images = np.load(data / f"{camera}.npy", mmap_mode="r")
        assert images.shape == (n, 32, 32, 3) and images.dtype == np.uint8 and images[0].std() > 5
    assert {e["kind"] for e in meta["episodes"]} == {"demo", "start"} and all(
        e["reason"][0][0] == 0 for e in meta["episodes"]
    )


def test_chunk_stops_at_the_end_of_its_episode(data, episodes, tokenizer):
    action, H = np.load(data / "action.npy"), CFG.chunk_size
    first = episodes.episodes[0]
    picks = [
        0,
        first["length"] - H,
        first["length"] - 3,
        first["length"] - 1,
        first["length"],
    ]  # the last is the next episode's first frame
    batch = episodes.samples(tokenizer, picks)
    assert batch["valid"].sum(1).tolist() == [H, H, 3, 1, min(H, episodes.episodes[1]["length"])]
    for b, i in enumerate(picks[:4]):
        n = int(batch["valid"][b].sum())
        at = first["start"] + i
        assert batch["valid"][b, :n].all()
        assert np.array_equal(batch["actions"][b, :n], action[at : at + n])
        assert np.array_equal(
            batch["actions"][b, n:], np.repeat(action[[first["start"] + first["length"] - 1]], H - n, axis=0)
        )
        assert np.array_equal(batch["state"][b], np.load(data / "state.npy")[at])
        for v, camera in enumerate(CFG.cameras.split(",")):
            assert np.array_equal(batch["images"][b, v], np.load(data / f"{camera}.npy")[at])


def test_chunk_stops_at_what_answers_a_disturbance(data, tmp_path, tokenizer):
    """The arm strays in steps 3 and 4: the action of step 3 is still planned before that, and from step 5 on
    all is well again.
    """
    for file in data.iterdir():
        if file.name != "meta.json":
            (tmp_path / file.name).symlink_to(file)
    meta = json.loads((data / "meta.json").read_text())
    meta["episodes"][0]["disturbed"] = [[3, 5]]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    episodes = Episodes(tmp_path, CFG)
    assert episodes.episodes[0]["length"] > 5 + CFG.chunk_size
    assert episodes.samples(tokenizer, range(7))["valid"].sum(1).tolist() == [
        4,
        3,
        2,
        1,
        1,
        CFG.chunk_size,
        CFG.chunk_size,
    ]


def test_reason_of_a_frame_and_weights(data):
    episodes = Episodes(data, CFG)
    episodes.episodes[0]["reason"] = [[0, "one"], [7, "two"]]
    assert [episodes.reason_at(i)[1] for i in (0, 6, 7, 8)] == ["one", "one", "two", "two"]
    meta = json.loads((data / "meta.json").read_text())
    i = 0
    weights = np.diff(episodes.cumulative, prepend=0)
    for e in meta["episodes"]:
        changes = [step for step, _ in e["reason"]]
        expected = [
            3 if min([step - c for c in changes if c <= step]) < 3 else 1 for step in range(e["length"])
        ]
        assert np.allclose(weights[i : i + e["length"]] / weights.min(), expected)
        i += e["length"]
    assert i == len(episodes) and episodes.cumulative[-1] == pytest.approx(1)


def test_labels_train_the_thought_alone(episodes, tokenizer):
    batch = episodes.samples(tokenizer, [0])
    task, reason = episodes.reason_at(0)
    labels = batch["labels"][0]
    assert labels[labels >= 0].tolist() == tokenizer.reasoning_ids(reason)
    assert batch["tokens"][0].tolist() == tokenizer.prompt(task) + tokenizer.reasoning_ids(reason)
    without = Episodes.__new__(Episodes)
    without.__dict__ = episodes.__dict__ | {"cfg": debug_config(reasoning=False)}
    assert (without.samples(tokenizer, [0])["labels"] == -100).all()


def same(a, b):
    """Batches agree up to the padding that their longest row asks for."""
    n = min(a["tokens"].shape[1], b["tokens"].shape[1])
    for key in a:
        x, y = a[key], b[key]
        if key in ("tokens", "segments", "positions", "labels"):
            fill = {"tokens": 0, "segments": -1, "positions": 0, "labels": -100}[key]
            if not ((x[:, n:] == fill).all() and (y[:, n:] == fill).all()):
                return False
            x, y = x[:, :n], y[:, :n]
        if not torch.equal(x, y):
            return False
    return a.keys() == b.keys()


def test_batch_is_a_function_of_the_seed_and_slices_agree_with_the_whole(episodes, questions, tokenizer):
    for draw in (
        lambda seed, rows=slice(None): episodes.batch(tokenizer, np.random.default_rng(seed), 6, rows),
        lambda seed, rows=slice(None): questions.batch(
            tokenizer, np.random.default_rng(seed), 6, 60, rows=rows
        ),
    ):
        whole = draw([0, 1])
        assert same(whole, draw([0, 1])) and not same(whole, draw([0, 2]))
        for i in range(3):
            assert same(draw([0, 1], slice(i, None, 3)), {k: v[i::3] for k, v in whole.items()})


def test_times_and_noise_of_a_batch(episodes, tokenizer):
    batch = episodes.batch(tokenizer, np.random.default_rng(0), 400)
    t = batch["t"]
    assert (
        t.min() >= 0.001 and t.max() <= 1 and t.mean().item() == pytest.approx(0.6, abs=0.03)
    )  # Beta(1.5, 1): more mass at noise
    assert batch["eps"].mean().abs() < 0.02 and batch["eps"].std().item() == pytest.approx(1, abs=0.02)
    assert (
        batch["uniform"].min() >= 0
        and batch["uniform"].max() < 1
        and batch["uniform"].shape == (400, CFG.queries)
    )


# -- questions ----------------------------------------------------------------------------------------------


def test_questions_fit_the_room_and_change(questions, tokenizer):
    room = 60
    batch = questions.batch(tokenizer, np.random.default_rng(0), 8, room)
    assert (
        batch["tokens"].shape[1] <= room or (batch["segments"].max(1).values == 1).any()
    )  # only a single long question may exceed it
    assert batch["segments"].max() >= 2
    packed = {
        tuple(row.tolist())
        for step in range(5)
        for row in questions.batch(tokenizer, np.random.default_rng(step), 8, room)["tokens"]
    }
    assert len(packed) > 8  # the same picture comes back with other questions
    everything = questions.batch(tokenizer, np.random.default_rng(0), 1, 10**6)
    assert everything["segments"].max() == max(
        len(scene) for scene in questions.questions if len(scene) == everything["segments"].max()
    )


def test_accuracy_counts_exact_matches_by_kind(questions):
    truth = {
        (question, i): answer for i, scene in enumerate(questions.questions) for _, question, answer in scene
    }
    scene_of = {image.tobytes(): i for i, image in enumerate(questions.images[0])}

    def answer(images, asked):
        return [
            "no idea" if re.match(r"what is \d", q) else truth[q, scene_of[image[0].tobytes()]]
            for image, q in zip(images, asked)
        ]

    result = questions.accuracy(answer, n=10**6, batch=7)
    total = sum(len(scene) for scene in questions.questions)
    assert result["all"]["n"] == total and result["sum"]["accuracy"] == 0 and result["where"]["accuracy"] == 1
    assert result["all"]["accuracy"] == pytest.approx(1 - result["sum"]["n"] / total)


# -- what does not fit --------------------------------------------------------------------------------------


def test_mismatches_show_both_sides(data, tmp_path):
    def refused(folder=data, families=None, **changes):
        with pytest.raises(ValueError) as caught:
            Episodes(folder, debug_config(**changes), families)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert all(word in refused(cameras="front,top") for word in ("'front', 'wrist'", "'top'", "--cameras"))
    assert all(word in refused(motors="a,b") for word in ("['a', 'b']", "'shoulder_pan'"))
    assert all(word in refused(image_size=48) for word in ("32, 32, 3)", "48, 48, 3)", "--image_size=48"))
    assert all(word in refused(families=["sequence"]) for word in ("sequence", "place"))
    assert "python prepare.py" in refused(tmp_path)


def test_cameras_come_in_the_models_order(data, episodes, tokenizer):
    turned = Episodes(data, debug_config(cameras="wrist,front"))
    assert torch.equal(
        turned.samples(tokenizer, [3])["images"].flip(1), episodes.samples(tokenizer, [3])["images"]
    )


def test_questions_too_long_for_the_tokenizer_are_left_out(data, tokenizer):
    asked = Questions(data / "questions", CFG)
    asked.questions[1] = [["long", "word " * 200, "yes"]]
    asked.questions[2] = [["long", "zqx!" * 60, "yes"], ["short", "how many cubes are there", "2"]]
    asked.drop_long(tokenizer)
    assert 1 not in asked.scenes and 2 in asked.scenes and [q[0] for q in asked.questions[2]] == ["short"]
    asked.batch(tokenizer, np.random.default_rng(0), 200, 64)  # none of them is met
    asked.questions = [[["long", "word " * 200, "yes"]]]
    with pytest.raises(ValueError, match="--longest"):
        asked.drop_long(tokenizer)


# -- the door for data --------------------------------------------------------------------------------------


def a_set():
    """A right meta.json and its arrays: two episodes of 6 frames, one camera."""
    x = np.arange(24, dtype=np.float32).reshape(12, 2)
    episodes = []
    for start in (0, 6):
        entry = {
            "start": start,
            "length": 6,
            "task": "push",
            "reason": [[0, "go"], [3, "on"]],
            "success": True,
        }
        episodes.append(entry | {"family": "push", "kind": "demo", "disturbed": [[2, 15]]})
    meta = {"cameras": ["top"], "motors": ["x", "y"], "fps": 10, "episodes": episodes}
    meta["statistics"] = {"state": statistics(x), "action": statistics(x)}
    return meta, {"state": x.copy(), "action": x.copy(), "top": np.zeros((12, 8, 8, 3), np.uint8)}


def test_a_right_set_passes():
    """Also one whose disturbance was planned for after a start episode's end."""
    meta, arrays = a_set()
    check_set("set", meta, arrays)


def turned_around(meta, arrays):
    meta["statistics"]["action"]["q01"] = [100.0, 100.0]


def of_another_set(meta, arrays):
    meta["statistics"]["state"] = statistics(arrays["state"] * 10)


def not_a_number(meta, arrays):
    arrays["state"][5, 1] = np.nan


def one_action_less(meta, arrays):
    arrays["action"] = arrays["action"][:-1]


@pytest.mark.parametrize(
    "spoil, said",
    [
        (turned_around, "set/meta.json: the statistics of action are not those of action.npy"),
        (of_another_set, "set/meta.json: the statistics of state are not those of state.npy"),
        (not_a_number, "set/state.npy is not finite: its entry 5"),
        (one_action_less, "set has different numbers of frames"),
    ],
)
def test_arrays_that_cannot_be_are_named(spoil, said):
    meta, arrays = a_set()
    spoil(meta, arrays)
    with pytest.raises(ValueError, match=re.escape(said)):
        check_set("set", meta, arrays)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, ">f4", object, bool, complex], ids=str)
def test_numbers_of_another_type_are_refused(dtype):
    meta, arrays = a_set()
    arrays["action"] = arrays["action"].astype(dtype)
    with pytest.raises(ValueError, match=r"set/action.npy must be \(frames, 2\) float32"):
        check_set("set", meta, arrays)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((12, 8, 8, 3), np.float32),
        ((12, 8, 8), np.uint8),
        ((12, 8, 8, 4), np.uint8),
        ((12, 8, 6, 3), np.uint8),
    ],
    ids=["float", "grey", "alpha", "oblong"],
)
def test_pictures_that_are_no_square_colour_bytes_are_refused(shape, dtype):
    meta, arrays = a_set()
    arrays["top"] = np.zeros(shape, dtype)
    with pytest.raises(ValueError, match=r"set/top.npy must be \(frames, px, px, 3\) uint8"):
        check_set("set", meta, arrays)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"start": -1}, "is frames -1 to 5, the set has 12"),
        ({"start": 0}, "overlap"),
        ({"start": 6.0}, "start must be int, not 6.0"),
        ({"length": 7}, "is frames 6 to 13, the set has 12"),
        ({"length": 0}, "is frames 6 to 6"),
        ({"task": " "}, "has no instruction"),
        ({"task": None}, "task must be str"),
        ({"success": "no"}, "success must be bool"),
        ({"reason": [[3, "b"], [0, "a"]]}, "reason must be [step, text] pairs"),
        ({"reason": [[0, "a"], [6, "b"]]}, "reason must be [step, text] pairs with steps rising from 0 to 5"),
        ({"reason": [[0, 5]]}, "reason must be"),
        ({"disturbed": [[3, 1]]}, "disturbed must be [first, end] pairs"),
        ({"family": 3}, "family must be str"),
    ],
    ids=str,
)
def test_episodes_that_cannot_be_are_named(changes, said):
    meta, arrays = a_set()
    meta["episodes"][1] |= changes
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        check_set("set", meta, arrays)
    assert "set/meta.json: episode" in str(caught.value)


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "meta.json cannot be read"),
        ("[]", "lacks cameras, motors, fps, statistics, episodes"),
        ("{}", "lacks cameras, motors, fps, statistics, episodes"),
        ({"fps": 0}, "fps must be a whole number above 0, not 0"),
        ({"fps": "10"}, "fps must be"),
        ({"fps": None}, "fps must be"),
        ({"cameras": ["top", "top"]}, "cameras must be a list of different names"),
        ({"cameras": "top"}, "cameras must be a list"),
        ({"motors": ["x,y", "z"]}, "motors must be a list of different names without commas"),
        ({"state": ["x", "x"]}, "state must be a list of different names"),
    ],
    ids=str,
)
def test_meta_json_that_cannot_be_is_named(tmp_path, content, said):
    text = content if isinstance(content, str) else json.dumps(a_set()[0] | content)
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_meta(tmp_path)
    assert str(tmp_path / "meta.json") in str(caught.value)


def test_a_whole_frame_rate_may_be_written_as_a_float(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps(a_set()[0] | {"fps": 30.0}))
    assert type(read_meta(tmp_path)["fps"]) is int


@pytest.mark.parametrize("task", ["put " * 2500, "zqx! " * 100], ids=["10 kB", "bytes"])
def test_an_instruction_too_long_names_its_episode(data, tmp_path, tokenizer, task):
    shutil.copytree(data, tmp_path / "long")
    meta = json.loads((data / "meta.json").read_text())
    meta["episodes"][2]["task"] = task
    (tmp_path / "long" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="meta.json: episode 2: the instruction is"):
        Episodes(tmp_path / "long", CFG).check_tasks(tokenizer)


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "questions.json cannot be read"),
        ({}, "must be a list"),
        ([["abc"], []], "picture 0 has 'abc', not [kind, question, answer]"),
        ([[["kind", "why", ""]], []], "not [kind, question, answer]"),
        ([[]], "different numbers of frames: {'questions': 1, 'front': 2, 'wrist': 2}"),
    ],
    ids=str,
)
def test_questions_that_cannot_be_are_named(data, tmp_path, content, said):
    folder = tmp_path / "asked"
    shutil.copytree(data / "questions_val", folder)
    (folder / "questions.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        Questions(folder, CFG)
    assert str(folder / "questions.json") in str(caught.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"state": np.zeros((13, 2))}, "episode 1 has different numbers of frames"),
        ({"action": np.full((6, 2), np.nan)}, "episode 1: action is not finite: its entry 0"),
        ({"state": [["a", "b"]] * 6}, "episode 1: state must be an array of numbers"),
        ({"state": [[1], [2, 3]] * 3}, "episode 1: state must be an array of numbers"),
        ({"images": {"top": np.zeros((6, 8, 8, 3))}}, "episode 1: top must be (frames, 8, 8, 3) uint8"),
        ({"images": {"front": np.zeros((6, 8, 8, 3), np.uint8)}}, "images lacks top"),
        ({"images": {"top": np.zeros((6, 9, 9, 3), np.uint8)}}, "episode 1: top must be (frames, 8, 8, 3)"),
        ({"task": ""}, "episode 1 has no instruction"),
        ({"reason": [[9, "a"]]}, "episode 1: reason must be"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_save_episodes_goes_through_the_same_door(tmp_path, changes, said):
    x = np.arange(12.0).reshape(6, 2)
    episode = {"images": {"top": np.zeros((6, 8, 8, 3), np.uint8)}, "state": x, "action": x, "task": "push"}
    with pytest.raises(ValueError, match=re.escape(said)):
        save_episodes(tmp_path / "new", [episode, episode | changes], ("top",), ("x", "y"))
    assert not (tmp_path / "new").exists()
    save_episodes(
        tmp_path / "new", [episode, episode | {"start": 99, "seed": np.int64(3)}], ["top"], ["x", "y"]
    )
    entries = read_meta(tmp_path / "new")["episodes"]
    assert [entry["start"] for entry in entries] == [0, 6] and entries[1]["seed"] == 3
