"""Tests of thinking while acting: the clock by hand, joining chunks, training on older frames, the measures, conversation."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
import sim_env
from data import Episodes
from model import PRESETS, Config, SyVLA
from sample import Plan, Runner, measures, reaction, rtc_pull


def flow_inputs(policy, n):
    """states, and the other arguments of flow_loss: state, actions, valid, eps, t."""
    cfg, g = policy.cfg, torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    H, A, M = cfg.chunk, cfg.action_dim, cfg.noise_samples
    return (
        draw(n, cfg.queries, cfg.width),
        draw(n, A),
        draw(n, H, A),
        torch.ones(n, H, dtype=torch.bool),
        draw(n, M, H, A),
        torch.rand(n, M, generator=g),
    )


# -- the clock ---------------------------------------------------------------------------------------------------


class Clockwork:
    """A policy whose numbers say where they come from. Pictures and joint states of control step n hold n; an action is
    (n of the picture, n of the joint state, its place in the chunk, the age that the expert was told)."""

    cfg = SimpleNamespace(
        execute=4, chunk=8, committed=0, action_dim=4, motors="a,b,c,d", state_names=["a", "b", "c", "d"]
    )

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()

    def check_inputs(self, images, state, tasks):
        return images, state

    def think(self, images, tasks):
        assert self.gate.wait(20)
        return [f"{task} at {n}" for task, n in zip(tasks, images[:, 0])], torch.as_tensor(images)

    def plan(self, states, state, seed, age, **joined):
        self.joined = joined
        rows = [[(int(s[0]), j[0], h, a) for h in range(8)] for s, j, a in zip(states, state, age)]
        return np.array(rows, np.float32)


def play(runner, steps, task=lambda now: "go"):
    """One arm -> per control step the command as a tuple of ints, or "-" where the arm waits; and the thoughts seen."""
    said, thoughts = [], []
    for now in range(steps):
        actions, (thought,) = runner(
            {
                "images": np.full((1, 1), now),
                "state": np.full((1, 4), now, np.float32),
                "task": [task(now)],
                "episode": [7],
            }
        )
        assert actions.shape == (1, 1, 4)
        said.append(tuple(int(x) for x in actions[0, 0]) if runner.arms[7].log[-1][1] else "-")
        thoughts.append(thought)
    return said, thoughts


def chunk(picture, joint, places, age=None):
    return [(picture, joint, h, joint - picture if age is None else age) for h in places]


def test_states_are_visible_a_delay_after_their_picture():
    said, thoughts = play(Runner(Clockwork(), "async", 3), 13)  # pictures at 0, 4, 8, each seen 3 steps later
    assert said == ["-"] * 3 + chunk(0, 3, range(4)) + chunk(4, 7, range(4)) + chunk(8, 11, range(2))
    assert thoughts == [""] * 3 + ["go at 0"] * 4 + ["go at 4"] * 4 + ["go at 8"] * 2


def test_the_expert_does_not_wait_for_a_slow_thought():
    """A thought of 6 steps: pictures at 0, 6, 12. Plans at 6, and 4 later on the same thought, older now; at 12 on the next one."""
    said, _ = play(Runner(Clockwork(), "async", 6), 20)
    assert said == ["-"] * 6 + chunk(0, 6, range(4)) + chunk(0, 10, range(2)) + chunk(
        6, 12, range(4)
    ) + chunk(6, 16, range(2)) + chunk(12, 18, range(2))


def test_pictures_are_taken_as_often_as_asked_but_one_thought_at_a_time():
    said, _ = play(Runner(Clockwork(), "async", 0, refresh=1), 4)
    assert said == [(n, n, 0, 0) for n in range(4)]
    _, thoughts = play(Runner(Clockwork(), "async", 2, refresh=1), 8)  # pictures at 0, 2, 4, ...
    assert thoughts == ["", "", "go at 0", "go at 0", "go at 2", "go at 2", "go at 4", "go at 4"]
    _, thoughts = play(Runner(Clockwork(), "async", 0, refresh=6), 8)
    assert thoughts == ["go at 0"] * 6 + ["go at 6"] * 2


def test_naive_switching_joins_a_chunk_late():
    said, _ = play(
        Runner(Clockwork(), "naive", 3), 13
    )  # the first chunk found the arm at rest; later ones are 3 actions late
    assert said == ["-"] * 3 + chunk(0, 0, range(4), 0) + chunk(4, 4, range(3, 7), 0) + chunk(
        8, 8, range(3, 5), 0
    )
    said, _ = play(
        Runner(Clockwork(), "naive", 8), 34
    )  # a chunk of 8 that begins with a moving arm is over when it is there
    assert said == ["-"] * 8 + chunk(0, 0, range(8), 0) + ["-"] * 8 + chunk(16, 16, range(8), 0) + ["-"] * 2


def test_waiting_stands_still_while_thinking():
    runner = Runner(Clockwork(), "wait", 2)
    said, _ = play(runner, 14)
    assert said == ["-"] * 2 + chunk(0, 2, range(4), 0) + ["-"] * 2 + chunk(6, 8, range(4), 0) + ["-"] * 2
    log = runner.arms[7].log
    assert [tuple(c) for c, _ in log[6:8]] == [(0, 2, 3, 0)] * 2 and log[0][0].tolist() == [
        0
    ] * 4  # the last command, at first the pose it was in


def test_a_committed_step_is_left_to_the_running_plan():
    """The expert takes one step: asked at 4, the new plan is followed from 5 on, at its second action. At rest it starts at its first."""
    said, _ = play(Runner(Clockwork(), "async", 0, commit=1), 10)
    assert said == ["-"] + chunk(0, 0, range(4)) + chunk(4, 4, range(1, 5)) + chunk(8, 8, [1])


def test_a_new_instruction_drops_what_was_thought_and_planned():
    runner = Runner(Clockwork(), "async", 3)
    said, thoughts = play(
        runner, 11, lambda now: "go" if now < 6 else "stop"
    )  # interrupted while the picture of 4 is thought about
    assert said == ["-"] * 3 + chunk(0, 3, range(3)) + ["-"] * 3 + chunk(6, 9, range(2))
    assert thoughts == [""] * 3 + ["go at 0"] * 3 + [""] * 3 + ["stop at 6"] * 2


def test_arms_have_clocks_of_their_own():
    runner, seen = Runner(Clockwork(), "async", 2), []
    for now in range(8):
        arms = [0, 1] if now >= 3 else [0]  # the second arm begins at 3
        images = np.array([[now], [now - 3]])[: len(arms)]
        runner(
            {
                "images": images,
                "state": np.repeat(images, 4, 1).astype(np.float32),
                "task": ["go"] * len(arms),
                "episode": arms,
            }
        )
        seen.append(
            [
                tuple(int(x) for x in runner.arms[a].log[-1][0]) if runner.arms[a].log[-1][1] else "-"
                for a in arms
            ]
        )
    assert [s[0] for s in seen] == ["-"] * 2 + chunk(0, 2, range(4)) + chunk(4, 6, range(2))
    assert [s[1] for s in seen[3:]] == ["-"] * 2 + chunk(0, 2, range(3))


def test_threads_have_the_same_interface():
    """On real time a thought is seen in the first step after it is ready; the arm waits, the loop never does."""
    policy = Clockwork()
    policy.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        runner = Runner(policy, "async", None, pool=pool)
        assert play(runner, 3)[0] == ["-"] * 3
        policy.gate.set()
        runner.arms[7].thinking[0].result()
        actions, thoughts = runner(
            {
                "images": np.full((1, 1), 3),
                "state": np.full((1, 4), 3, np.float32),
                "task": ["go"],
                "episode": [7],
            }
        )
    assert actions[0, 0].tolist() == [0, 3, 0, 3] and thoughts == ["go at 0"]
    assert len(runner.seconds["VLM"]) == len(runner.seconds["expert"]) == 1


@pytest.mark.parametrize("mode", ["wait", "naive", "async"])
def test_without_a_delay_it_is_the_synchronous_policy_bit_for_bit(make_policy, mode):
    policy = make_policy(temperature=0.7)
    env = sim_env.SO100Env(px=32)
    runs = []
    for act in (sim_env.driver(policy), Runner(policy, mode)):
        obs, _ = env.reset(seed=2_000_000)
        commands, thoughts = [], []
        while len(commands) < 12:
            actions, said = act(sample.batch_of_one(obs, policy))
            for action in actions[0]:
                commands.append(action)
                obs, *_ = env.step(action)
            thoughts += said * len(actions[0])
        runs.append((np.stack(commands), thoughts))
    env.close()
    assert np.array_equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not np.array_equal(runs[0][0][4], runs[0][0][3])


# -- joining chunks ----------------------------------------------------------------------------------------------


def test_temporal_ensembling_weighs_all_plans_that_speak():
    runner = Runner(Clockwork(), "async+ensemble", 0)
    _, _ = play(runner, 9)
    one, two, three = (np.array(chunk(n, n, range(8)), float) for n in (0, 4, 8))
    w = np.exp(-0.01)  # ACT: the oldest weighs 1
    commands = [c for c, _ in runner.arms[7].log]
    assert np.allclose(commands[:4], one[:4]) and np.allclose(commands[5], (one[5] + w * two[1]) / (1 + w))
    assert np.allclose(commands[8], (two[4] + w * three[0]) / (1 + w))  # the first plan has ended


def test_a_plan_continues_what_is_done_and_what_is_decided():
    """naive, delay 3: the plan of step 7 starts at its picture's step 4; since then three actions are done, and four are to come.
    async, commit 2: the plan of step 4 starts now, with two actions decided of the six that the running plan still has."""
    for mode, options, asked, start, committed, rest in (
        ("naive", {"delay": 3}, 7, 4, 3, range(1, 8)),
        ("async", {"delay": 0, "commit": 2}, 4, 4, 2, range(2, 8)),
    ):
        policy = Clockwork()
        runner = Runner(policy, f"{mode}+rtc", **options)
        play(runner, asked)
        now = {
            "images": np.full((1, 1), asked),
            "state": np.full((1, 4), asked, np.float32),
            "task": ["go"],
            "episode": [7],
        }
        runner(now)
        assert [tuple(a) for a in policy.joined["running"][0][: len(rest)]] == chunk(
            0, 0, rest, 0
        ) and not policy.joined["running"][0][len(rest) :].any()
        assert np.array_equal(policy.joined["pull"][0], rtc_pull(committed, len(rest), 8))
        log = [tuple(c) for c, _ in runner.arms[7].log]
        assert log[start] == chunk(0, 0, rest, 0)[0]
    first = Runner(policy, "async+rtc", 0)
    play(first, 1)
    assert not policy.joined["pull"].any()  # at rest there is nothing to continue


def test_pull_of_real_time_chunking_by_hand(make_policy, monkeypatch):
    assert rtc_pull(0, 0, 4).tolist() == [0] * 4 and rtc_pull(2, 2, 4).tolist() == [1, 1, 0, 0]
    c = np.array(
        [2 / 3, 1 / 3]
    )  # committed 1, the running plan has 3 more: (3 - i) / (3 - 1 + 1) for i = 1, 2
    assert np.allclose(rtc_pull(1, 3, 5), [1, *(c * (np.exp(c) - 1) / (np.e - 1)), 0, 0])

    policy = make_policy(denoise_steps=2)
    monkeypatch.setattr(policy.expert, "forward", lambda x, *_: 0.5 * x + 0.3)
    x, y, p = torch.randn(1, 8, 6) / 4, torch.randn(1, 8, 6) / 4, torch.linspace(1, 0, 8)[None]
    got = policy.sample_chunk(torch.zeros(1, 4, 32), torch.zeros(1, 6), x, running=y, pull=p)
    for t, gain in ((1.0, 2.0), (0.5, 2.0)):  # (t^2 + (1-t)^2) / (t (1-t)) = 2 at 0.5, and at most K = 2
        v = 0.5 * x + 0.3
        x = x - 0.5 * (v - gain * p[..., None] * (y - (x - t * v)))
    assert torch.allclose(got, x, atol=1e-6) and torch.allclose(got[:, 0], y[:, 0], atol=1e-6)


def test_real_time_chunking_reduces_the_jump(make_policy):
    policy = make_policy()
    states, state, *_ = flow_inputs(policy, 3)
    noise, running = torch.randn(3, 8, 6), torch.randn(3, 8, 6).clamp(-1, 1)
    plain = policy.sample_chunk(states, state, noise)
    pull = torch.as_tensor(np.stack([rtc_pull(2, 6, 8), rtc_pull(2, 4, 8), np.zeros(8)]), dtype=torch.float32)
    joined = policy.sample_chunk(states, state, noise, running=running, pull=pull)
    gap = lambda chunk: (chunk - running).abs().mean(-1)
    assert (gap(joined)[:2, :2] < 0.5 * gap(plain)[:2, :2]).all() and torch.equal(joined[2], plain[2])


def test_committed_prefix_is_kept_exactly(make_policy):
    policy = make_policy(committed=3)
    states, state, *_ = flow_inputs(policy, 3)
    noise, running = torch.randn(3, 8, 6), torch.randn(3, 8, 6).clamp(-1, 1)
    given = torch.tensor([3, 0, 2])
    joined, plain = (
        policy.sample_chunk(states, state, noise, running=running, given=given),
        policy.sample_chunk(states, state, noise),
    )
    assert torch.equal(joined[0, :3], running[0, :3]) and torch.equal(joined[2, :2], running[2, :2])
    assert torch.allclose(joined[1], plain[1], atol=1e-6) and not torch.allclose(
        joined[0, 3:], plain[0, 3:], atol=1e-2
    )  # the rest answers the prefix
    other = policy.sample_chunk(
        states,
        state,
        noise,
        running=torch.where(torch.arange(8)[:, None] < given[:, None, None], running, 0.7),
        given=given,
    )
    assert torch.equal(other, joined)  # what the running plan does after the prefix is nothing to it


def test_prefix_tokens_are_clean_at_time_zero_and_not_trained(make_policy):
    policy = make_policy()
    states, state, actions, valid, eps, t = flow_inputs(policy, 2)
    seen = []
    policy.expert.register_forward_pre_hook(lambda _, args: seen.append(args))
    each = t[..., None].expand(-1, -1, 8)
    assert torch.allclose(
        policy.flow_loss(states, state, actions, valid, eps, each),
        policy.flow_loss(states, state, actions, valid, eps, t),
        atol=1e-5,
    )
    prefix = each * (torch.arange(8) >= torch.tensor([0, 1, 3, 7])[None, :, None])  # (2, 4, 8)
    loss = policy.flow_loss(states, state, actions, valid, eps, prefix)
    x, modulation = seen[-1][:2]
    assert (
        torch.equal(x[:, 2, :3], actions[:, :3])
        and not torch.isclose(x[:, 2, 3:], actions[:, 3:]).all(-1).any()
    )
    at = lambda time: policy.expert.modulation(torch.full((1, 1), time))[0][0, 0, 0]
    assert torch.allclose(
        modulation[0][1, 2, 1:4], at(0.0).expand(3, -1), atol=1e-5
    )  # tokens: joint state, H actions
    assert torch.allclose(
        modulation[0][1, 2, 4:], at(t[1, 2].item()).expand(5, -1), atol=1e-4
    ) and torch.allclose(modulation[0][1, 2, 0], at(t[1, 2].item()), atol=1e-4)
    other = torch.where(prefix[..., None] > 0, eps, torch.randn_like(eps))
    assert torch.equal(
        policy.flow_loss(states, state, actions, valid, other, prefix), loss
    )  # the noise of given actions is nowhere
    v = policy.expert(x, modulation, *seen[-1][2:])
    error = (v - (eps - actions[:, None])).square().mean(-1)
    assert torch.allclose(loss[:, 3], error[:, 3, 7]) and torch.allclose(loss[:, 2], error[:, 2, 3:].mean(-1))


# -- older states ------------------------------------------------------------------------------------------------


def test_age_enters_the_time_embedding(make_policy):
    policy = make_policy(stale=3)
    assert not SyVLA(
        Config(**PRESETS["debug"] | {"stale": 3}), policy.tokenizer
    ).expert.age.weight.any()  # untrained, it changes nothing
    states, *flow = flow_inputs(policy, 2)
    loss = lambda age: policy.flow_loss(states, *flow, **({} if age is None else {"age": torch.tensor(age)}))
    assert (
        torch.equal(loss(None), loss([0, 0]))
        and torch.equal(loss([0, 3])[0], loss(None)[0])
        and not torch.isclose(loss([0, 3])[1], loss(None)[1]).any()
    )
    told = [policy.plan(states, np.zeros((2, 6)), age=age) for age in ([0, 0], [2, 3], [2, 99])]
    assert np.abs(told[0] - told[1]).max() > 0.1 and np.array_equal(
        told[1], told[2]
    )  # older than it ever met counts as the oldest
    plain = make_policy()
    assert plain.expert.age is None and np.array_equal(
        plain.plan(states, np.zeros((2, 6)), age=[2, 3]), plain.plan(states, np.zeros((2, 6)))
    )


def test_training_uses_age_in_both_passes(make_policy, data):
    policy = make_policy(stale=3)
    batch = Episodes(data, policy.cfg).batch(policy.tokenizer, np.random.default_rng(0), 3)
    ages, flow_loss = [], policy.flow_loss
    policy.flow_loss = lambda *args, **more: ages.append(more["age"]) or flow_loss(*args, **more)
    policy(batch | {"age": torch.tensor([0, 1, 3])})["action"].backward()
    assert len(ages) == 2 and all(a.tolist() == [0, 1, 3] for a in ages)
    assert (
        policy.expert.age.weight.grad[[0, 1, 3]].any(dim=1).all()
        and not policy.expert.age.weight.grad[2].any()
    )


def test_stale_batches_take_the_right_frames(data):
    episodes = Episodes(data, Config(**PRESETS["debug"] | {"stale": 5}))
    tokenizer = sample.Tokenizer.train(episodes.texts(), 512)
    episodes.episodes[0]["reason"], episodes.episodes[1]["reason"] = [[0, "red"], [4, "blue"]], [[0, "green"]]
    n, start = episodes.episodes[0]["length"], episodes.episodes[1]["start"]
    picks, older = [6, 6, 2, n, n + 3], [0, 3, 5, 4, 2]  # frame n is the second episode's first
    batch = episodes.samples(tokenizer, picks, older)
    at, seen = (
        [6, 6, 2, start, start + 3],
        [6, 3, 0, start, start + 1],
    )  # never a picture of the episode before
    assert batch["age"].tolist() == [0, 3, 2, 0, 2]
    for v, camera in enumerate(("front", "wrist")):
        assert np.array_equal(batch["images"][:, v], np.load(data / f"{camera}.npy")[seen])
    assert np.array_equal(batch["state"], np.load(data / "state.npy")[at]) and np.array_equal(
        batch["actions"][:, 0], np.load(data / "action.npy")[at]
    )
    thought = lambda b: batch["labels"][b][batch["labels"][b] >= 0].tolist()
    assert [thought(b) for b in range(5)] == [
        tokenizer.thought(reason) for reason in ("blue", "red", "red", "green", "green")
    ]
    fresh, plain = episodes.samples(tokenizer, picks, [0] * 5), episodes.samples(tokenizer, picks)
    assert (
        fresh.pop("age").tolist() == [0] * 5
        and fresh.keys() == plain.keys()
        and all(torch.equal(fresh[k], plain[k]) for k in plain)
    )


def test_switches_leave_the_other_random_numbers_alone(data):
    batches = {}
    for name, switches in {"off": {}, "on": {"stale": 5, "committed": 3}}.items():
        episodes = Episodes(data, Config(**PRESETS["debug"] | switches))
        batches[name] = episodes.batch(
            sample.Tokenizer.train(episodes.texts(), 512), np.random.default_rng(0), 64
        )
    off, on = batches["off"], batches["on"]
    assert all(
        torch.equal(off[k], on[k]) for k in ("state", "actions", "valid", "eps", "uniform")
    ) and off.keys() == on.keys() - {"age"}
    assert on["age"].min() == 0 and on["age"].max() == 5 and off["t"].shape == (64, 4)
    given = (on["t"] == 0).sum(-1)  # (64, 4), a prefix: what follows has the sample's own time
    assert set(given.unique().tolist()) == {0, 1, 2, 3}
    assert torch.equal(on["t"], off["t"][..., None] * (torch.arange(8) >= given[..., None]))


# -- measures ----------------------------------------------------------------------------------------------------


def test_measures_by_hand():
    runner = Runner(Clockwork(), "wait", 2)
    play(runner, 14)  # - - a a a a - - b b b b - -, a = (0, 2, h, 0), b = (6, 8, h, 0)
    told = measures(runner.arms.values())
    assert told["waiting"] == 6 / 14 and told["waiting_later"] == 4 / 12
    assert told["jerk_inside"] == pytest.approx(1 / 4) and told["jerk_border"] == pytest.approx(
        (6 + 6 + 3) / 4
    )
    assert told["staleness"] == {str(age): 1 / 4 for age in (2, 3, 4, 5)} and told["age"] == 3.5


def test_reaction_is_the_first_command_that_differs():
    done = Future()
    arm = lambda *commands: SimpleNamespace(
        log=[(np.array([c, 0.0]), Plan(done, 0, 0, 0, 0)) for c in commands]
    )
    still = SimpleNamespace(arms={0: arm(0, 0, 0, 0, 0, 0), 1: arm(0, 0, 0, 0), 2: arm(0, 9)})
    moved = SimpleNamespace(arms={0: arm(0, 0, 0, 1, 1, 3), 1: arm(0, 0, 0, 0), 2: arm(0, 0)})
    told = reaction(moved, still, [{"moved_at": 2}, {"moved_at": 1}, {"moved_at": None}])
    assert told == {"median": 3, "p90": 3, "reacted": 0.5, "moved": 2}  # 1 is too little to tell, 3 is not


def test_cube_is_moved_once_where_and_when_the_seed_says():
    seed = 2_000_001  # 1 modulo 4
    env, twin = sim_env.SO100Env(px=32, moved=2), sim_env.SO100Env(px=32)
    for _ in range(2):
        (_, info), _ = env.reset(seed=seed), twin.reset(seed=seed)
        colour = env.goal["legs"][0][0]
        before, action, places = env.cube_xyz(colour), env.position(), []
        assert info["moved_at"] is None
        for step in range(1, 6):
            *_, info = env.step(action)
            twin.step(action)
            places.append(env.cube_xyz(colour))
            assert np.array_equal(env.cube_xyz(colour), twin.cube_xyz(colour)) == (step <= 3)
            assert info["moved_at"] == (3 if step > 3 else None)
        assert (
            np.linalg.norm((places[-1] - before)[:2]) >= 0.05 and np.abs(places[-1] - places[-2]).max() < 1e-3
        )
        assert twin._info()["moved_at"] is None
    again = sim_env.SO100Env(px=32, moved=2, patience=0.1)
    again.reset(seed=seed)
    assert [again.step(action)[3] for _ in range(6)] == [False] * 5 + [True]  # a tenth of 60 steps
    assert np.allclose(again.cube_xyz(colour), places[-1], atol=1e-3)  # the place is the seed's
    for e in (env, twin, again):
        e.close()


# -- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def arguments(run, *words):
    return ["--config", "debug", f"--run={run}", "--threads=1", *words]


def test_table_of_success_against_delay(run, capsys, monkeypatch):
    monkeypatch.setattr(sim_env, "FPS", 1000)  # the live part need not take its time
    common = ["--eval=2", "--families=place", "--patience=0.2", "--arms=2"]
    sample.main(arguments(run, *common, "--mode=async", "--delay=3", "--moved=2"))
    sample.main(arguments(run, *common, "--mode=wait,async+rtc", "--delay=3"))
    table = json.loads((run / "async.json").read_text())
    assert {"VLM", "expert", "age", "waiting", "late", "steps"} == set(table["live"]) and table["live"][
        "VLM"
    ]["p95"] >= table["live"]["VLM"]["p50"] > 0
    moved, wait, rtc = table["cells"]  # cells of both commands
    assert (moved["mode"], moved["delay"], moved["moved"], wait["mode"], rtc["mode"], rtc["commit"]) == (
        "async",
        3,
        2,
        "wait",
        "async+rtc",
        1,
    )
    assert (
        moved["n"] == 2
        and 0 <= moved["low"] <= moved["success"] <= moved["high"] <= 1
        and moved["reaction"]["moved"] == 2
    )
    assert (
        moved["waiting"] == pytest.approx(3 / 12) and moved["waiting_later"] == 0
    )  # 12 steps, of which 3 before the first thought
    assert wait["waiting"] == pytest.approx(6 / 12)  # thinks 3, acts 4, thinks 3, acts 2
    assert set(moved["staleness"]) == {"3", "4", "5", "6"} and sum(
        moved["staleness"].values()
    ) == pytest.approx(1)
    said = capsys.readouterr().out
    assert "live" in said and len(re.findall(r"^(async|wait|async\+rtc) +3 place", said, re.M)) == 3
    sample.main(arguments(run, *common, "--mode=wait", "--delay=3"))
    assert [c["mode"] for c in json.loads((run / "async.json").read_text())["cells"]] == [
        "async",
        "async+rtc",
        "wait",
    ]  # replaced, not doubled


def test_film_on_a_simulated_clock(run, capsys):
    sample.main(arguments(run, "--family=tiny", "--mode=async", "--delay=2", "--refresh=8"))
    said = capsys.readouterr().out
    assert "success after" in said and not re.search(r"step +[01]  <reason>", said)
    assert list((run / "sample").glob("*.gif"))


@pytest.mark.parametrize(
    "words, said",
    [
        (["--mode=asink"], "unknown mode asink"),
        (["--delay=-1"], "counts control steps"),
        (["--delay=fast"], "counts control steps"),
        (["--mode=wait,async"], "add --eval"),
        (["--delay=0,4"], "add --eval"),
        (["--mode=async+prefix"], "--committed=1"),
        (["--mode=naive+prefix", "--delay=3"], "--committed=3"),
        (["--mode=wait+rtc"], "unknown mode"),
        (["--commit=5"], "lower --commit or --execute"),
        (["--execute=9"], "between 1 and chunk"),
        (["--moved=-1"], "0 or more"),
        (["--patience=0"], "more than 0"),
        (["--eval=1", "--mode=async", "--families=plaice"], "place"),
    ],
    ids=lambda words: " ".join(words)[:24] if isinstance(words, list) else "",
)
def test_bad_input_is_answered_in_one_line(trained, tmp_path, fails, words, said):
    assert said in fails(sample.main, arguments(trained, f"--out={tmp_path}", *words))


def test_conversation_through_a_pipe(run):
    """Nonsense is answered, a second instruction in mid motion interrupts the first, the end of the input ends it after the last."""
    program = f"import sim_env; sim_env.FPS = 200; import sample; sample.main({arguments(run, '--interactive', '--delay=2', '--seed=2000003')!r})"
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    talk = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=os.path.dirname(sample.__file__),
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    env = sim_env.SO100Env(px=32)
    env.reset(seed=2_000_003, options={"family": "place"})
    one, two = env.cube_colours[:2]
    heard = []

    def say(line, *until):
        talk.stdin.write(line + "\n")
        talk.stdin.flush()
        while not any(u in heard[-1] for u in until):
            heard.append(talk.stdout.readline())
            assert heard[-1], heard

    heard.append(talk.stdout.readline())
    say("sing me a song", "cannot tell")
    say(f"put the {one} cube on the blue pad", "<reason>")
    assert (
        "step   0  put" in heard[-2] and "step   2  <reason>" in heard[-1]
    )  # seen two steps after its picture
    say(f"put the {two} cube on the red pad", "no, put")
    rest, _ = talk.communicate(timeout=120)  # closes the pipe
    lines = rest.splitlines()
    assert (
        talk.returncode == 0
        and "step   2  <reason>" in lines[0]
        and re.search(r"step +\d+  (done|out of time)", rest)
    )
    assert lines[-1].startswith("wrote ") and (run / "sample" / "conversation.gif").is_file()
