"""Tests of extras/realtime.py: the timeline by hand, joining chunks, older query states, conversation."""

import json
import math
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import debug_config

import evaluate
import sample
from data import Episodes, Tokenizer
from evaluate import Episode, SingleEnv
from extras import realtime
from extras.realtime import Arm, Runner, TalkingEnv, measures, pulled_step, reaction
from model import SyVLA
from sim_env import CAMERAS, SO100Env


def flow_inputs(policy, n):
    """Query states, and the other arguments of flow_loss: state, actions, valid, eps, t."""
    cfg = policy.cfg
    generator = torch.Generator().manual_seed(0)
    H, A, M = cfg.chunk_size, cfg.action_dim, cfg.noise_samples

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    query_states = draw(n, cfg.queries, cfg.width)
    valid = torch.ones(n, H, dtype=torch.bool)
    state, actions, eps = draw(n, A), draw(n, H, A), draw(n, M, H, A)
    return query_states, state, actions, valid, eps, torch.rand(n, M, generator=generator)


# -- the timeline


class Clockwork:
    """A policy whose numbers say where they come from.

    Pictures and joint states of control step n hold n. An action is (n of the picture, n of the joint state,
    its place in the chunk, the age that the expert was told).
    """

    cfg = SimpleNamespace(
        n_action_steps=4,
        chunk_size=8,
        denoise_steps=1,
        action_dim=4,
        motor_names=["a", "b", "c", "d"],
        state_names=["a", "b", "c", "d"],
    )

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()

    def check_inputs(self, images, state, tasks):
        return images, state

    def reason(self, images, tasks, guess):
        assert self.gate.wait(20)
        return [f"{task} at {n}" for task, n in zip(tasks, images[:, 0])], torch.as_tensor(images)

    def plan(self, query_states, state, seed, age, step):
        rows = []
        for query_state, joints, a in zip(query_states, state, age):
            rows.append([(int(query_state[0]), joints[0], h, a) for h in range(8)])
        return np.array(rows, np.float32)


GO = Episode(0, {}, number=7)


def observation(now, task="go", episodes=(GO,)):
    n = len(episodes)
    now = np.broadcast_to(now, n)[:, None]
    state = np.repeat(now, 4, axis=1).astype(np.float32)
    return {"images": now.copy(), "state": state, "task": [task] * n, "episode": list(episodes)}


def last(arm):
    """The last command as a tuple of ints, or "-" where the arm waited."""
    return tuple(int(x) for x in arm.commands[-1]) if arm.origins[-1] else "-"


def play(runner, steps, task=lambda now: "go"):
    """One arm -> the command of every control step as last() writes it, the reasoning that was usable."""
    commands, texts = [], []
    for now in range(steps):
        actions, (text,) = runner(observation(now, task(now)))
        assert actions.shape == (1, 1, 4)
        commands.append(last(runner.arms[7]))
        texts.append(text)
    return commands, texts


def chunk(picture, joint, places, age=None):
    return [(picture, joint, h, joint - picture if age is None else age) for h in places]


def test_the_timeline_of_the_docstring():
    """Pictures at 0, 4, 8, each usable 3 steps later."""
    commands, texts = play(Runner(Clockwork(), "async", 3), 13)
    assert commands == ["-"] * 3 + chunk(0, 3, range(4)) + chunk(4, 7, range(4)) + chunk(8, 11, range(2))
    assert texts == [""] * 3 + ["go at 0"] * 4 + ["go at 4"] * 4 + ["go at 8"] * 2


def test_the_expert_does_not_wait_for_a_slow_vlm():
    """The VLM takes 6 steps: pictures at 0, 6, 12. The expert plans again after 4, from the same look."""
    commands, _ = play(Runner(Clockwork(), "async", 6), 20)
    first = ["-"] * 6 + chunk(0, 6, range(4)) + chunk(0, 10, range(2))
    second = chunk(6, 12, range(4)) + chunk(6, 16, range(2))
    assert commands == first + second + chunk(12, 18, range(2))


def test_naive_switching_joins_a_chunk_late():
    """The first chunk finds the arm at rest; later ones are 3 actions late."""
    commands, _ = play(Runner(Clockwork(), "naive", 3), 13)
    later = chunk(4, 4, range(3, 7), 0) + chunk(8, 8, range(3, 5), 0)
    assert commands == ["-"] * 3 + chunk(0, 0, range(4), 0) + later


def test_a_naive_chunk_can_be_over_before_it_is_there():
    commands, _ = play(Runner(Clockwork(), "naive", 8), 34)
    waits = ["-"] * 8
    assert commands == waits + chunk(0, 0, range(8), 0) + waits + chunk(16, 16, range(8), 0) + ["-"] * 2


@pytest.mark.parametrize("delay", [2, 6])
def test_waiting_stands_still_while_the_vlm_works(delay):
    runner = Runner(Clockwork(), "wait", delay)
    commands, _ = play(runner, 2 * delay + 9)
    waits = ["-"] * delay
    again = 4 + delay  # control step of the second picture
    second = chunk(again, again + delay, range(4), 0)
    assert commands == waits + chunk(0, delay, range(4), 0) + waits + second + ["-"]
    still = runner.arms[7].commands
    assert still[0].tolist() == [0] * 4  # at first the pose it was in, then the last command
    assert [tuple(c) for c in still[again : again + delay]] == [(0, delay, 3, 0)] * delay


def test_real_time_chunking_leaves_a_step_to_the_running_plan(monkeypatch):
    """Asked at 4, a plan is followed from 5 on, at its second action. At rest it begins at its first."""
    monkeypatch.setattr(realtime, "pulled_step", lambda policy, queues: None)
    commands, _ = play(Runner(Clockwork(), "async+rtc", 0), 10)
    assert commands == ["-"] + chunk(0, 0, range(4)) + chunk(4, 4, range(1, 5)) + chunk(8, 8, [1])


def test_a_new_instruction_drops_looks_and_plans():
    """It comes while the VLM is at work on the picture of 4."""
    runner = Runner(Clockwork(), "async", 3)
    commands, texts = play(runner, 11, lambda now: "go" if now < 6 else "stop")
    assert commands == ["-"] * 3 + chunk(0, 3, range(3)) + ["-"] * 3 + chunk(6, 9, range(2))
    assert texts == [""] * 3 + ["go at 0"] * 3 + [""] * 3 + ["stop at 6"] * 2


def test_arms_have_clocks_of_their_own():
    runner = Runner(Clockwork(), "async", 2)
    one, two = Episode(0, {}, number=0), Episode(0, {}, number=1)
    seen = []
    for now in range(8):
        episodes = (one, two) if now >= 3 else (one,)  # the second arm begins at 3
        runner(observation([now, now - 3][: len(episodes)], episodes=episodes))
        seen.append([last(runner.arms[episode.number]) for episode in episodes])
    assert [s[0] for s in seen] == ["-"] * 2 + chunk(0, 2, range(4)) + chunk(4, 6, range(2))
    assert [s[1] for s in seen[3:]] == ["-"] * 2 + chunk(0, 2, range(3))


def test_by_wall_clock_a_look_is_usable_when_the_vlm_is_done():
    """The arm waits, the loop never does."""
    policy = Clockwork()
    policy.gate.clear()
    runner = Runner(policy, "async", None)
    assert play(runner, 3)[0] == ["-"] * 3
    policy.gate.set()
    runner.arms[7].pending.batch.result()
    actions, texts = runner(observation(3))
    assert actions[0, 0].tolist() == [0, 3, 0, 3] and texts == ["go at 0"]


@pytest.mark.parametrize("mode", ["wait", "naive", "async"])
def test_without_a_delay_it_is_the_synchronous_policy_bit_for_bit(make_policy, mode):
    policy = make_policy(temperature=0.7)
    runs = []
    for act in (evaluate.policy_fn(policy), Runner(policy, mode)):
        commands, texts, episode = [], [], Episode(0, {})
        with SingleEnv(SO100Env(px=32), 32, CAMERAS, 6) as vec:
            vec.reset([0], [2_000_000], [{}])
            while len(commands) < 12:
                actions, (text,) = act(vec.observe([0]) | {"episode": [episode]})
                vec.step_chunk({0: actions[0]})
                episode.extras.append(text)
                commands += list(actions[0])
                texts += [text] * len(actions[0])
        runs.append((np.stack(commands), texts))
    assert np.array_equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not np.array_equal(runs[0][0][4], runs[0][0][3])


# -- real-time chunking


def test_a_plan_is_pulled_towards_the_queue(monkeypatch):
    """The plan of step 5: of the running one, made at 0 and followed from 1 on, four actions are left."""
    queues = []
    monkeypatch.setattr(realtime, "pulled_step", lambda policy, rows: queues.extend(rows))
    play(Runner(Clockwork(), "async+rtc", 0), 5)
    assert queues[0] == []  # at rest there is nothing to continue
    assert [tuple(action) for action, _ in queues[1]] == chunk(0, 0, range(3, 8), 0)


def queue_of(actions):
    return [(action, (0, 0)) for action in actions]


def test_pulled_step_by_hand(make_policy):
    """Two denoising steps with the velocity field v = 0.5 x + 0.3 and three actions in the queue."""
    policy = make_policy(denoise_steps=2)
    x = torch.randn(1, 8, 6) / 4
    target = torch.randn(1, 8, 6) / 4
    step = pulled_step(policy, [queue_of(policy.denormalise(target)[0, :3])])
    falling = np.array([2 / 3, 1 / 3])
    falling = falling * (np.exp(falling) - 1) / (math.e - 1)
    pull = torch.tensor([1, *falling, 0, 0, 0, 0, 0])[:, None].float()
    got, expected = x, x
    for k, (t, gain) in enumerate([(1.0, 2.0), (0.5, 2.0)]):  # (t^2 + (1-t)^2) / (t (1-t)), at most K = 2
        got = step(k, got, 0.5 * got + 0.3)
        v = 0.5 * expected + 0.3
        expected = expected - 0.5 * (v - gain * pull * (target - (expected - t * v)))
    assert torch.allclose(got, expected, atol=1e-4)
    assert torch.allclose(got[:, 0], target[:, 0], atol=1e-4)


def test_real_time_chunking_reduces_the_jump(make_policy):
    policy = make_policy()
    query_states, state, *_ = flow_inputs(policy, 3)
    noise = torch.randn(3, 8, 6)
    running = torch.randn(3, 8, 6).clamp(-1, 1)
    actions = policy.denormalise(running)
    plain = policy.denoise(query_states, state, noise, policy.euler_step)[:, -1]
    step = pulled_step(policy, [queue_of(actions[0, :6]), queue_of(actions[1, :4]), []])
    joined = policy.denoise(query_states, state, noise, step)[:, -1]
    gap = (joined - running).abs().mean(-1)  # (3, 8)
    plain_gap = (plain - running).abs().mean(-1)
    assert (gap[:2, 0] < 0.1 * plain_gap[:2, 0]).all() and (gap[:2, 1] < plain_gap[:2, 1]).all()
    assert torch.equal(joined[2], plain[2])


# -- older query states


def test_age_enters_the_time_embedding(make_policy):
    policy = make_policy(stale=3)
    untrained = SyVLA(debug_config(stale=3), policy.tokenizer)
    assert not untrained.expert.age.weight.any()  # it changes nothing
    query_states, *flow = flow_inputs(policy, 2)

    def loss(age):
        return policy.flow_loss(query_states, *flow, age=age if age is None else torch.tensor(age))

    assert torch.equal(loss(None), loss([0, 0])) and torch.equal(loss([0, 3])[0], loss(None)[0])
    assert not torch.isclose(loss([0, 3])[1], loss(None)[1]).any()
    told = [policy.plan(query_states, np.zeros((2, 6)), age=age) for age in ([0, 0], [2, 3], [2, 99])]
    assert np.abs(told[0] - told[1]).max() > 0.1
    assert np.array_equal(told[1], told[2])  # older than it ever met counts as the oldest
    plain = make_policy()
    aged = plain.plan(query_states, np.zeros((2, 6)), age=[2, 3])
    assert plain.expert.age is None and np.array_equal(aged, plain.plan(query_states, np.zeros((2, 6))))


def test_training_uses_age_in_both_passes(make_policy, data, monkeypatch):
    policy = make_policy(stale=3)
    batch = Episodes(data, policy.cfg).batch(policy.tokenizer, np.random.default_rng(0), 3)
    ages, modulation = [], policy.expert.modulation

    def watch(t, age=None):
        ages.append(age)
        return modulation(t, age)

    monkeypatch.setattr(policy.expert, "modulation", watch)
    policy(batch | {"age": torch.tensor([0, 1, 3])})["action"].backward()
    assert len(ages) == 2 and all(age.flatten().tolist() == [0, 1, 3] for age in ages)
    gradient = policy.expert.age.weight.grad
    assert gradient[[0, 1, 3]].any(dim=1).all() and not gradient[2].any()


def test_stale_batches_take_the_right_frames(data):
    episodes = Episodes(data, debug_config(stale=5))
    tokenizer = Tokenizer.train(episodes.texts(), 512)
    episodes.episodes[0]["reason"] = [[0, "red"], [4, "blue"]]
    episodes.episodes[1]["reason"] = [[0, "green"]]
    n, start = episodes.episodes[0]["length"], episodes.episodes[1]["start"]
    picks, older = [6, 6, 2, n, n + 3], [0, 3, 5, 4, 2]  # frame n is the second episode's first
    batch = episodes.samples(tokenizer, picks, older)
    at = [6, 6, 2, start, start + 3]
    seen = [6, 3, 0, start, start + 1]  # never a picture of the episode before
    assert batch["age"].tolist() == [0, 3, 2, 0, 2]
    for v, camera in enumerate(("front", "wrist")):
        assert np.array_equal(batch["images"][:, v], np.load(data / f"{camera}.npy")[seen])
    assert np.array_equal(batch["state"], np.load(data / "state.npy")[at])
    assert np.array_equal(batch["actions"][:, 0], np.load(data / "action.npy")[at])
    for labels, reasoning in zip(batch["labels"], ("blue", "red", "red", "green", "green")):
        assert labels[labels >= 0].tolist() == tokenizer.reasoning_ids(reasoning)
    fresh = episodes.samples(tokenizer, picks, [0] * 5)
    plain = episodes.samples(tokenizer, picks)
    assert fresh.pop("age").tolist() == [0] * 5 and fresh.keys() == plain.keys()
    assert all(torch.equal(fresh[key], plain[key]) for key in plain)


def test_stale_leaves_the_other_random_numbers_alone(data):
    batches = []
    for stale in (0, 5):
        episodes = Episodes(data, debug_config(stale=stale))
        tokenizer = Tokenizer.train(episodes.texts(), 512)
        batches.append(episodes.batch(tokenizer, np.random.default_rng(0), 64))
    off, on = batches
    assert off.keys() == on.keys() - {"age"}
    assert all(torch.equal(off[key], on[key]) for key in ("state", "actions", "valid", "eps", "t", "uniform"))
    assert on["age"].min() == 0 and on["age"].max() == 5


# -- measures


def test_measures_by_hand():
    runner = Runner(Clockwork(), "wait", 2)
    play(runner, 14)  # - - a a a a - - b b b b - -, a = (0, 2, h, 0), b = (6, 8, h, 0)
    found = measures(runner)
    assert found["waiting"] == 6 / 14 and found["waiting_later"] == 4 / 12
    assert found["jerk_inside"] == pytest.approx(1 / 4)
    assert found["jerk_border"] == pytest.approx((6 + 6 + 3) / 4)
    assert found["age"] == 3.5


def test_reaction_is_the_first_command_that_differs():
    """A difference of 1 is too little to tell, of 3 it is not."""

    def arms(*rows):
        arms = {}
        for number, row in enumerate(rows):
            commands = [np.array([command, 0.0]) for command in row]
            arms[number] = Arm(commands[0], commands=commands)
        return SimpleNamespace(arms=arms)

    still = arms([0, 0, 0, 0, 0, 0], [0, 0, 0, 0], [0, 9])
    moved = arms([0, 0, 0, 1, 1, 3], [0, 0, 0, 0], [0, 0])
    episodes = [Episode(0, {}, number, moved_at=at) for number, at in enumerate((2, 1, None))]
    assert reaction(moved, still, episodes) == {"reaction": 3, "reacted": 0.5}
    assert reaction(moved, still, episodes[2:]) == {"reacted": 0}


def test_cube_is_moved_once_where_and_when_the_seed_says():
    """Seed 2000001 is 1 modulo 4: the cube moves before the fourth control step."""
    env, unmoved = SO100Env(px=32, moved=2), SO100Env(px=32)
    for _ in range(2):
        _, info = env.reset(seed=2_000_001)
        unmoved.reset(seed=2_000_001)
        colour = env.goal["legs"][0][0]
        before = env.cube_xyz(colour)
        action = env.position()
        assert info["moved_at"] is None
        places = []
        for step in range(1, 6):
            *_, info = env.step(action)
            unmoved.step(action)
            places.append(env.cube_xyz(colour))
            assert np.array_equal(places[-1], unmoved.cube_xyz(colour)) == (step <= 3)
            assert info["moved_at"] == (3 if step > 3 else None)
        assert np.linalg.norm((places[-1] - before)[:2]) >= 0.05
        assert np.abs(places[-1] - places[-2]).max() < 1e-3
    env.close()
    unmoved.close()


# -- the command line


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_table_of_success_against_delay(run, capsys, monkeypatch):
    monkeypatch.setattr(realtime, "FPS", 1000)  # the live part need not take its time
    common = [f"--run={run}", "--eval=2", "--families=place", "--delay=3"]
    sample.main([*common, "--mode=async", "--moved=2"])
    moved = json.loads((run / "async_moved.json").read_text())["async 3"]["place id"]
    assert moved["n"] == 2 and 0 <= moved["low"] <= moved["success"] <= moved["high"] <= 1
    assert 0 <= moved["reacted"] <= 1
    sample.main([*common, "--mode=async,async+rtc"])
    sample.main([*common, "--mode=wait"])
    table = json.loads((run / "async.json").read_text())
    assert list(table) == ["async 3", "async+rtc 3", "wait 3"]  # the cells of both commands
    # 60 control steps, 3 of them before the first look; wait: 3 of 7 in every round
    assert table["async 3"]["place id"]["waiting"] == pytest.approx(3 / 60)
    assert table["async 3"]["place id"]["waiting_later"] == 0
    assert table["async+rtc 3"]["place id"]["waiting"] == pytest.approx(4 / 60)
    assert table["wait 3"]["place id"]["waiting"] == pytest.approx((8 * 3 + 3) / 60)
    said = capsys.readouterr().out
    assert "live, 1000 control steps a second  waiting" in said
    assert re.search(r"^async\+rtc 3 +place id", said, re.M)


def test_film_on_a_simulated_clock(run, capsys):
    sample.main([f"--run={run}", "--families=tiny", "--mode=async", "--delay=2"])
    said = capsys.readouterr().out
    assert "success after" in said and not re.search(r"step +[01]  <reason>", said)
    assert list((run / "sample").glob("*.gif"))


@pytest.mark.parametrize(
    "words, said",
    [
        (["--mode=asink"], "not 'asink'"),
        (["--delay=-1"], "--delay must lie in"),
        (["--delay=fast"], "--delay must lie in"),
        (["--mode=wait,async"], "add --eval"),
        (["--delay=0,4"], "add --eval"),
        (["--mode=wait+rtc"], "not 'wait+rtc'"),
        (["--moved=-1"], "must lie in"),
        (["--eval=1", "--mode=async", "--families=plaice"], "place"),
    ],
    ids=str,
)
def test_bad_input_is_answered_in_one_line(trained, fails, words, said):
    assert said in fails(sample.main, [f"--run={trained}", *words])


# -- conversation


def sit_down(monkeypatch):
    """A person at the keyboard: a pipe in the place of standard input -> a file to write lines to."""
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))
    return os.fdopen(write, "w", buffering=1)


def test_conversation(run, monkeypatch):
    """Nonsense is answered, an instruction interrupts the one before, the input's end does not."""
    read, write = os.pipe()
    screen = os.fdopen(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w", buffering=1))
    typist = sit_down(monkeypatch)
    monkeypatch.setattr(realtime, "FPS", 200)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    env = SO100Env(px=32)
    env.reset(seed=2_000_003, options={"family": "place"})
    one, two = env.cube_colours[:2]
    heard = []

    def wait_for(words):
        while not heard or words not in heard[-1]:
            heard.append(screen.readline())
            assert heard[-1], heard

    argv = [f"--run={run}", "--interactive", "--delay=2", "--seed=2000003"]
    with ThreadPoolExecutor(1) as thread:
        program = thread.submit(sample.main, argv)
        wait_for("type an instruction")
        typist.write("sing me a song\n")
        wait_for("cannot tell")
        typist.write(f"put the {one} cube on the blue pad\n")
        wait_for(f"instruction: put the {one}")
        typist.write(f"put the {two} cube on the red pad\n")
        wait_for(f"instruction: put the {two}")
        assert not any("success" in line for line in heard)  # the first one was interrupted
        typist.close()
        wait_for("wrote ")
        program.result(timeout=120)
    assert re.search(r"success after \d+ steps", "".join(heard))
    assert (run / "sample" / "conversation.gif").is_file()


class Scenes:
    """An environment that cannot be told another instruction; its scenes are numbered by their seeds."""

    def reset(self, *, seed, options):
        self.seed = seed
        return {"seed": seed, "task": "drawn"}, {}

    def step_chunk(self, actions):
        return {"seed": self.seed, "task": "drawn"}, 0.0, False, False, {}


def test_instructions_new_scenes_and_the_end_of_the_input(monkeypatch):
    typist = sit_down(monkeypatch)
    monkeypatch.setattr(realtime, "FPS", 1000)
    tokenizer = SimpleNamespace(prompt=lambda words: words)
    env = TalkingEnv(Scenes(), tokenizer, seed=5)
    typist.write("one\n")
    assert env.reset(seed=0, options={})[0] == {"seed": 5, "task": "one"}
    obs, _, _, truncated, _ = env.step_chunk(np.zeros((1, 6)))
    assert obs == {"seed": 5, "task": "one"} and not truncated
    typist.write("new\ntwo\n")
    while not truncated:
        *_, truncated, _ = env.step_chunk(np.zeros((1, 6)))
    assert env.reset(seed=0, options={})[0] == {"seed": 6, "task": "two"}
    typist.write("three\n")
    assert env.reset(seed=0, options={})[0] == {"seed": 7, "task": "three"}  # it cannot be told in this scene
    typist.close()
    for _ in range(3):
        env.step_chunk(np.zeros((1, 6)))  # goes on when the input has ended
    with pytest.raises(EOFError):
        env.reset(seed=0, options={})


def test_input_that_is_not_text_does_not_hang(monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))
    os.write(write, b"\xff\xfe red\n  \n")
    os.close(write)
    env = TalkingEnv(Scenes(), SimpleNamespace(prompt=lambda words: words), seed=0)
    assert env.reset(seed=0, options={})[0]["task"].endswith(" red")
    with pytest.raises(EOFError):
        env.reset(seed=0, options={})
