"""Tests of rl.py: likelihood of a chunk, advantages, retrieval, losses, updates, runs, processes."""

import json
import math
import os
import shutil
import socket

import numpy as np
import pytest
import torch
from conftest import differences
from safetensors.torch import load_file, save_file

import rl
from common import leave_processes
from evaluate import Episode
from model import PRESETS, load_policy, save_policy, timesteps

SAMPLERS = [dict(sampler="chain", sigma=0.2), dict(sampler="sde", sigma=0.7)]


def config(**changes):
    """The debug preset's share of RLConfig, with changes."""
    known = rl.RLConfig.__dataclass_fields__
    preset = {name: value for name, value in PRESETS["debug"].items() if name in known}
    return rl.RLConfig(**preset | changes)


def observations(policy, n, seed=0):
    """Random query states (n, Q, D) and joint states (n, S)."""
    g = torch.Generator().manual_seed(seed)
    c = policy.cfg
    return torch.randn(n, c.queries, c.width, generator=g), torch.randn(n, c.state_dim, generator=g)


def decisions(policy, n, cfg, seed=0, seen=None):
    """A batch of n noisy decisions as to_batch() makes it, with random outcomes."""
    g = torch.Generator().manual_seed(seed)
    c = policy.cfg
    query_states, state = seen or observations(policy, n, seed)
    step = rl.noisy_last_step(policy, torch.randn(n, c.action_dim, generator=g), cfg)
    start = torch.zeros(n, c.chunk_size, c.action_dim)
    executed = torch.arange(c.chunk_size) < torch.randint(1, c.n_action_steps + 1, (n, 1), generator=g)
    return {
        "query_states": query_states,
        "state": state,
        "chain": policy.denoise(query_states, state, start, step),
        "executed": executed,
        "advantage": torch.randn(n, generator=g),
        "return": torch.rand(n, generator=g),
        "value": torch.zeros(n),
        "other": torch.randint(c.denoise_steps - 1, (n,), generator=g),
    }


def expert_samples(policy, n, seed=3):
    """A batch of n expert samples as ExpertSamples.samples() makes it."""
    g = torch.Generator().manual_seed(seed)
    c = policy.cfg
    samples = {
        "query_states": torch.randn(n, c.queries, c.width, generator=g),
        "state": torch.randn(n, c.state_dim, generator=g),
        "actions": torch.randn(n, c.chunk_size, c.action_dim, generator=g),
        "valid": torch.ones(n, c.chunk_size, dtype=torch.bool),
        "eps": torch.randn(n, 2, c.chunk_size, c.action_dim, generator=g),
        "t": torch.rand(n, 2, generator=g) * 0.9 + 0.1,
        "uniform": torch.rand(n, c.queries, generator=g),
        "left": torch.arange(n) % 5 + 1,
    }
    return {f"expert_{name}": tensor for name, tensor in samples.items()}


def learner_of(policy, cfg, lr):
    """A learner whose two learning rates are lr."""
    learner = rl.Learner(policy, cfg)
    for group in learner.optimizer.param_groups:
        group["lr"] = lr
    return learner


# -- likelihood ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["chain", "sde"])
def test_step_without_noise_is_the_euler_step(sampler):
    """At sigma 0 both are the sampler of evaluation, though Flow-SDE's mean is written differently."""
    quiet = config(sampler=sampler)
    quiet.sigma = 0.0
    x, v = torch.randn(2, 5, 8, 6)
    t = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])[:, None, None]
    mean, std = rl.gaussian_step(x, v, t, 0.2, quiet)
    assert torch.allclose(mean, x - 0.2 * v, atol=1e-5)
    assert std.abs().max() == 0


def test_flow_sde_against_the_published_formula():
    """mu = x (1 - sigma^2 d / 2t) - v d (1 + sigma^2 (1 - t) / 2t), sigma_t = a sqrt(t / (1 - t)); std for
    K=4, a=0.5 as published.
    """
    cfg = config(sampler="sde", sigma=0.5)
    x, v = torch.randn(2, 8, 6)
    d = 0.25
    stds = []
    for t in (1.0, 0.75, 0.5, 0.25):
        variance = 0.25 * t / (1 - min(t, 0.75))
        mean, std = rl.gaussian_step(x, v, torch.tensor(t).view(1, 1), d, cfg)
        published = x * (1 - variance * d / (2 * t)) - v * d * (1 + variance * (1 - t) / (2 * t))
        assert torch.allclose(mean, published, atol=1e-5)
        stds.append(std.item())
    assert stds == pytest.approx([0.50, 0.433, 0.25, 0.144], abs=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_log_probability_against_an_independent_computation(make_policy, sampler):
    policy = make_policy()
    cfg = config(**sampler)
    batch = decisions(policy, 4, cfg)
    logp, means, stds = rl.chain_likelihood(policy, batch, cfg)
    K = policy.cfg.denoise_steps
    for row in range(4):
        keys_values = policy.expert.condition(policy.adapter(batch["query_states"][row : row + 1]))
        for column, k in enumerate((K - 1, int(batch["other"][row]))):
            t = torch.tensor([[1 - k / K]])
            x = batch["chain"][row, k]
            modulation = policy.expert.modulation(t)
            v = policy.expert(x[None, None], modulation, batch["state"][row : row + 1], keys_values)[0, 0]
            mean, std = rl.gaussian_step(x, v, t, 1 / K, cfg)
            assert torch.allclose(means[row, column], mean, atol=1e-5)
            assert torch.allclose(stds[row, column], std)
            if k == K - 1:  # one draw per joint: the mean over the executed control steps
                executed = batch["executed"][row]
                normal = torch.distributions.Normal(mean[executed].mean(0), std[0])
                expected = normal.log_prob(batch["chain"][row, K][executed].mean(0)).mean()
        assert logp[row].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ratio_is_one_before_the_first_step_however_the_rows_are_cut(make_policy, sampler):
    policy = make_policy()
    cfg = config(**sampler)
    batch = decisions(policy, 12, cfg)
    whole = rl.chain_likelihood(policy, batch, cfg)[0]
    parts = []
    for first in (0, 5, 10):
        part = {name: tensor[first : first + 5] for name, tensor in batch.items()}
        parts.append(rl.chain_likelihood(policy, part, cfg)[0])
    ratio = rl.clipped_surrogate(whole, torch.cat(parts), torch.ones(12), 0.2)[1]
    assert (ratio - 1).abs().max() < 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_last_step_has_the_stated_spread_and_moves_the_whole_chunk(make_policy, sampler):
    policy = make_policy()
    cfg = config(**sampler)
    batch = decisions(policy, 400, cfg)
    _, mean, std = rl.chain_likelihood(policy, batch, cfg)
    z = (batch["chain"][:, -1] - mean[:, 0]) / std[:, 0]  # (400, H, A)
    assert torch.allclose(z, z[:, :1], atol=1e-3)
    assert z.mean().abs() < 0.05
    assert z[:, 0].std().item() == pytest.approx(1, abs=0.04)


def test_only_the_last_step_is_noisy(make_policy):
    policy = make_policy()
    cfg = config(sampler="chain", sigma=0.2)
    seen = observations(policy, 6)
    one, two = (decisions(policy, 6, cfg, seed, seen)["chain"] for seed in (1, 2))
    assert torch.equal(one[:, :-1], two[:, :-1])
    assert (one[:, -1] - two[:, -1]).abs().min() > 0
    quiet = policy.denoise(*seen, torch.zeros(6, 8, 6), rl.noisy_last_step(policy, torch.zeros(6, 6), cfg))
    euler = policy.denoise(*seen, torch.zeros(6, 8, 6), policy.euler_step)
    assert torch.allclose(quiet, euler, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_log_probability_of_the_experts_chunk_is_minus_its_flow_matching_loss(sampler):
    """Monte Carlo over the noise of one step from the same x_t: E log p = const - weight |v - u|^2."""
    cfg = config(**sampler)
    d = 1 / 5
    for t in timesteps(5).tolist():
        x, v, actions = torch.randn(3, 1, 8, 6)
        u = (x - actions) / t
        time = torch.tensor(t).view(1, 1, 1)
        mean, std = rl.gaussian_step(x, u, time, d, cfg)
        sampled = mean + std * torch.randn(20000, 8, 6)
        logp = rl.gaussian_logp(sampled, rl.gaussian_step(x, v, time, d, cfg)[0], std).mean()
        weight = d**2 / (2 * cfg.sigma**2)
        if cfg.sampler == "sde":
            variance = cfg.sigma**2 * t / (1 - min(t, 1 - d))
            weight = d * (1 + variance * (1 - t) / (2 * t)) ** 2 / (2 * variance)
        expected = -0.5 - std.log() - 0.5 * math.log(2 * math.pi) - weight * (v - u).square().mean()
        assert logp.item() == pytest.approx(expected.item(), rel=0.02, abs=0.02), t


# -- advantages ------------------------------------------------------------------------------------------


def test_gae_by_hand():
    """Three decisions, gamma .5, lambda .5: a value follows a truncation, not a termination."""
    values = [1.0, 2.0, 4.0]
    last = 1 - 4.0  # delta_2 = r + 0 - V
    middle = 0 + 0.5 * 4 - 2 + 0.25 * last
    first = 0 + 0.5 * 2 - 1 + 0.25 * middle
    assert rl.gae([0, 0, 1], values, 0.0, 0.5, 0.5).tolist() == pytest.approx([first, middle, last])
    last = 0 + 0.5 * 6 - 4
    middle = 0.25 * last
    assert rl.gae([0, 0, 0], values, 6.0, 0.5, 0.5).tolist() == pytest.approx([0.25 * middle, middle, last])


def test_episodes_become_a_batch_of_decisions():
    """Only executed control steps count; a cut episode bootstraps; returns are those of lambda 1."""
    cfg = config(gamma=0.5, gae_lambda=0.0)

    def episode(rewards, executed, final):
        extras = [{"chain": torch.zeros(6, 8, 2), "value": torch.tensor(2.0)} for _ in rewards]
        return Episode(0, {}, extras=extras, rewards=rewards, executed=executed, final=final)

    batch = rl.to_batch([episode([0.0, 1.0], [4, 2], None), episode([0.0], [4], 3.0)], cfg)
    assert batch["executed"].sum(1).tolist() == [4, 2, 4]
    assert batch["executed"][1].tolist() == [True, True] + 6 * [False]
    assert batch["advantage"].tolist() == pytest.approx([0.5 * 2 - 2, 1 - 2, 0.5 * 3 - 2])
    assert batch["return"].tolist() == pytest.approx([0.5, 1, 1.5])
    assert batch["chain"].shape == (3, 6, 8, 2)


def test_clipped_surrogate_by_hand():
    logp = torch.tensor([1.0, 1.0, 0.0, 0.0]).log1p()  # ratios 2, 2, 1, 1
    losses, ratio = rl.clipped_surrogate(logp, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert ratio.tolist() == pytest.approx([2, 2, 1, 1])
    assert losses.tolist() == pytest.approx([-1.2, 2, -1, 1])


# -- expert samples --------------------------------------------------------------------------------------


@pytest.fixture
def recorded(trained, data):
    """ExpertSamples of the debug data set, as made with "similar" and "random"."""
    policy = load_policy(trained)
    cfg = config(data=str(data), families="place")
    return rl.ExpertSamples(policy, cfg), policy


def test_the_table_is_what_the_vlm_makes_of_the_frames(recorded, data):
    """Read from the file of an earlier run it is the same; another policy's file is another."""
    experts, policy = recorded
    again = rl.ExpertSamples(policy, experts.cfg)
    assert differences(experts.table, again.table) == 0
    assert torch.equal(experts.keys, again.keys)
    assert len(experts.keys) == experts.cfg.index_frames
    files = set(data.glob("similarity_*"))
    policy.vlm.queries.data += 1
    other = rl.ExpertSamples(policy, experts.cfg)
    assert set(data.glob("similarity_*")) > files
    assert not torch.equal(other.table["query_states"], experts.table["query_states"])


def test_retrieval_finds_the_frame_itself_within_its_family(recorded):
    experts, _ = recorded
    g = torch.Generator().manual_seed(0)
    frames = torch.randn(30, 2, 48, generator=g)
    experts.keys = torch.nn.functional.normalize(frames, dim=-1).flatten(1)
    experts.families = np.array(["place", "calculate"] * 15)
    rows, similarity = experts.retrieve(frames[::2], "place", torch.zeros(15))
    assert rows.tolist() == list(range(0, 30, 2))
    assert torch.allclose(similarity, torch.tensor(2.0))  # the sum of both views' cosines
    uniform = torch.rand(30, generator=g)
    rows, similarity = experts.retrieve(frames, "calculate", uniform)
    assert (rows % 2 == 1).all()
    cosines = torch.nn.functional.cosine_similarity(frames, frames[rows], dim=-1)  # (30, V)
    assert torch.allclose(similarity, cosines.sum(1), atol=1e-5)
    every = torch.nn.functional.cosine_similarity(frames[:, None], frames[None, 1::2], dim=-1).sum(-1)
    nearest = every.topk(rl.NEIGHBOURS, dim=1)
    expected = nearest.indices[torch.arange(30), (uniform * rl.NEIGHBOURS).long()] * 2 + 1
    assert torch.equal(rows, expected)

    experts.cfg.experts = "random"
    rows, similarity = experts.retrieve(frames, "place", uniform)
    assert len(set(rows.tolist())) > 10
    cosines = torch.nn.functional.cosine_similarity(frames, frames[rows], dim=-1)
    assert torch.allclose(similarity, cosines.sum(1), atol=1e-5)


def test_expert_advantage_is_one_whatever_the_rollouts_advantages_are(make_policy):
    policy = make_policy()
    critic = rl.Critic(policy.cfg)
    samples = expert_samples(policy, 6)
    moments = [(torch.tensor(0.0), torch.tensor(1.0)), (torch.tensor(5.0), torch.tensor(0.1))]
    for mean, std in moments:
        assert rl.expert_advantage(samples, critic, mean, std, config()).tolist() == [1.0] * 6
        by_value = rl.expert_advantage(samples, critic, mean, std, config(expert_advantage="gae"))
        seen = {"query_states": samples["expert_query_states"], "state": samples["expert_state"]}
        expected = (0.9 ** (samples["expert_left"] - 1) - critic(seen) - mean) / std
        assert torch.allclose(by_value, expected)


def test_expert_samples_enter_the_loss_alone(make_policy):
    """With --ppo=false the rollouts' advantages have no say; with PPO the terms add up."""
    policy = make_policy()
    cfg = config(proximal=0.0)
    batch = decisions(policy, 6, cfg) | expert_samples(policy, 6)
    batch["old_logp"] = rl.chain_likelihood(policy, batch, cfg)[0]
    batch["expert_advantage"] = torch.ones(6)
    both = rl.policy_loss(policy, batch, cfg)
    alone = rl.policy_loss(policy, batch, config(proximal=0.0, ppo=False))
    ppo = rl.policy_loss(policy, batch, config(proximal=0.0, experts="none"))
    assert both["expert_loss"].item() == pytest.approx(rl.expert_loss(policy, batch).mean().item())
    assert alone["loss"].item() == pytest.approx(10 * both["expert_loss"].item(), rel=1e-5)
    assert ppo["loss"].item() == pytest.approx(-batch["advantage"].mean().item(), abs=1e-5)  # at ratio 1
    assert both["loss"].item() == pytest.approx((alone["loss"] + ppo["loss"]).item(), rel=1e-4)


def moved_parts(before, after):
    """First words of the names whose tensors differ."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


# -- updates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [dict(sampler="chain", sigma=0.3), dict(sampler="sde", sigma=0.7)])
def test_a_bandit_with_a_known_optimum_is_solved(make_policy, sampler):
    """One observation, one chunk; the reward asks for first joint targets near 0.8 on average."""
    policy = make_policy()
    cfg = config(**sampler, minibatch=22, critic_warmup=0, experts="none", target_kl=0.05)
    learner = learner_of(policy, cfg, 0.0)
    query_states, state = observations(policy, 1)
    seen = (query_states.expand(128, -1, -1), state.expand(128, -1))

    def error(chunk):
        return (chunk[:, : policy.cfg.n_action_steps, 0].mean(1) - 0.8).square()

    def acts():
        return policy.denoise(query_states, state, torch.zeros(1, 8, 6), policy.euler_step)[:, -1]

    before = error(acts()).item()
    for iteration in range(50):
        batch = decisions(policy, 128, cfg, iteration, seen)
        batch["executed"] = (torch.arange(8) < policy.cfg.n_action_steps).expand(128, -1)
        batch["return"] = -error(batch["chain"][:, -1])
        batch["advantage"] = batch["return"] - batch["return"].mean()
        learner.optimizer.param_groups[0]["lr"] = 2e-3 * (1 - iteration / 50)
        assert rl.update(learner, batch, iteration)["kl"] < 0.5
    after = error(acts()).item()
    assert before > 0.1
    assert after < 0.02, (before, after)


def test_value_model_warms_up_before_the_policy_moves(make_policy):
    policy = make_policy()
    cfg = config(critic_warmup=1, experts="none")
    learner = learner_of(policy, cfg, 1e-2)
    batch = decisions(policy, 16, cfg)
    old = {name: tensor.clone() for name, tensor in learner.net.state_dict().items()}
    first = rl.update(learner, batch, 0)
    moved = moved_parts(old, learner.net.state_dict())
    assert moved == {"critic"}
    assert "kl" not in first
    again = rl.update(learner, batch, 1)
    assert again["value_loss"] < first["value_loss"]
    moved = moved_parts(old, learner.net.state_dict())
    assert moved == {"adapter", "critic", "expert"}


@pytest.mark.parametrize("target_kl, stops", [(1e-4, True), (1e9, False)])
def test_update_stops_at_the_target_divergence(make_policy, target_kl, stops):
    policy = make_policy()
    cfg = config(critic_warmup=0, experts="none", minibatch=2, target_kl=target_kl)
    learner = learner_of(policy, cfg, 3e-3)
    assert (rl.update(learner, decisions(policy, 64, cfg), 1)["updates"] < 32) == stops


def test_anchor_is_zero_at_the_start_and_grows(make_policy):
    policy = make_policy()
    cfg = config(critic_warmup=0, experts="none", anchor=1e-9, minibatch=16)
    learner = learner_of(policy, cfg, 1e-2)
    batch = decisions(policy, 16, cfg)
    first, second = (rl.update(learner, batch, iteration)["anchor"] for iteration in (1, 2))
    assert first < 1e-6 < second


def test_penalties_are_divergences_of_gaussian_steps(make_policy):
    """KL divergence against torch.distributions, in the noisy step and in another, over the whole chunk."""
    policy = make_policy()
    cfg = config(experts="none", proximal=2.0, ppo=True)
    batch = decisions(policy, 16, cfg)
    batch["old_logp"], batch["proximal"], std = rl.chain_likelihood(policy, batch, cfg)
    moved = make_policy()
    for parameter in moved.expert.parameters():
        parameter.data += 0.01
    after = rl.chain_likelihood(moved, batch, cfg)[1]
    new = torch.distributions.Normal(after, std.expand_as(after))
    old = torch.distributions.Normal(batch["proximal"], std.expand_as(after))
    expected = torch.distributions.kl_divergence(new, old).mean().item()
    logs = rl.policy_loss(moved, batch, cfg)
    assert logs["proximal"].item() == pytest.approx(expected, rel=1e-3)
    assert (after - batch["proximal"])[:, 1].abs().max() > 0
    without = rl.policy_loss(moved, batch, config(experts="none", proximal=0.0))
    assert logs["loss"].item() == pytest.approx(without["loss"].item() + 2 * expected, rel=1e-3)


def test_a_loss_that_is_no_number_is_one_line(make_policy):
    policy = make_policy()
    cfg = config(critic_warmup=0, experts="none")
    batch = decisions(policy, 16, cfg)
    batch["return"][3] = math.nan
    with pytest.raises(rl.UserError, match="lower --lr"):
        rl.update(learner_of(policy, cfg, 1e-3), batch, 1)


# -- the run ---------------------------------------------------------------------------------------------


def test_noise_depends_on_the_episode_and_its_decision_alone(make_policy):
    """A decision is the same whichever arms move together; the next one of an episode has other noise."""
    policy = make_policy()
    cfg = config(env="sim", sigma=0.3)
    learner = rl.Learner(policy, cfg)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(2, 2, 32, 32, 3), dtype=np.uint8)
    state = rng.random((2, 6)).astype(np.float32)
    task = ["put the red cube on the blue pad"] * 2
    episodes = [Episode(7, {}), Episode(8, {})]

    def decide(rows):
        obs = {"images": images[rows], "state": state[rows], "task": [task[i] for i in rows]}
        return rl.explore(learner, obs | {"episode": [episodes[i] for i in rows]})

    actions, extras = decide([0, 1])
    assert actions.shape == (2, policy.cfg.n_action_steps, 6)
    alone, _ = decide([1])
    assert np.allclose(actions[1], alone[0], atol=1e-3)
    episodes[1].extras.append(extras[1])
    later, _ = decide([1])
    assert not np.allclose(actions[1], later[0], atol=0.1)


def arguments(trained, out, *flags):
    run = [f"--init_from={trained}", f"--out={out}", "--device=cpu", "--threads=1"]
    return ["--config", "debug", *run, *flags]


def test_run_resume_and_frozen_vlm(trained, tmp_path, capsys, monkeypatch, fails):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    rl.main(arguments(trained, whole))
    assert "bit for bit" in capsys.readouterr().out
    update = rl.update

    def dies(learner, batch, iteration):
        if iteration == 1:
            raise rl.UserError("as if killed")
        return update(learner, batch, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(rl, "update", dies)
        fails(rl.main, arguments(trained, cut))
    said = fails(rl.main, arguments(trained, cut, "--resume", "--sigma=0.5"))
    assert "begun with --sigma" in said
    assert "add --resume" in fails(rl.main, arguments(trained, cut))
    rl.main(arguments(trained, cut, "--resume"))
    states = [torch.load(run / "train_state.pt", weights_only=True) for run in (whole, cut)]
    assert differences(*states) == 0
    weights = [load_file(run / "model.safetensors") for run in (whole, cut)]
    assert differences(*weights) == 0
    lines = [json.loads(line) for line in (cut / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert {"kl", "similarity", "gnorm", "expert_loss", "validation place", "success place"} <= lines[
        1
    ].keys()


def test_the_vlm_is_frozen_and_the_average_of_the_rest_is_saved(trained, tmp_path):
    out = tmp_path / "run"
    rl.main(arguments(trained, out, "--eval_episodes=0"))
    before, after = (load_file(run / "model.safetensors") for run in (trained, out))
    moved = moved_parts(before, after)
    assert moved == {"adapter", "expert"}
    state = torch.load(out / "train_state.pt", weights_only=True)
    for name, average in state["ema"].items():
        assert torch.equal(after[name], average)
        # the policy stayed in the first iteration and moved in the second
        assert torch.allclose(average, 0.9 * before[name] + 0.1 * state["net"][name], atol=1e-7)
    assert load_policy(out).fingerprint() == load_policy(trained).fingerprint()


def test_a_vlm_that_changes_is_a_defect(trained, tmp_path, monkeypatch):
    update = rl.update

    def spoils(learner, batch, iteration):
        learner.policy.vlm.queries.data += 1
        return update(learner, batch, iteration)

    monkeypatch.setattr(rl, "update", spoils)
    with pytest.raises(RuntimeError, match="should be frozen"):
        rl.main(arguments(trained, tmp_path / "run", "--eval_episodes=0", "--experts=none"))


def one_update(rank, world, port, folder):
    """Body of a process: one update of the policy in `folder`; the first process writes what came of it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rl.join_processes(torch.device("cpu"))
    policy = load_policy(folder)
    cfg = config(critic_warmup=0, minibatch=6, target_kl=9)
    learner = rl.Learner(policy, cfg)
    learner.optimizer = torch.optim.SGD(learner.net.parameters(), lr=0.01)
    batch = decisions(policy, 16, cfg) | expert_samples(policy, 16)
    numbers = rl.update(learner, batch, 1)
    if rank == 0:
        torch.save((learner.net.state_dict(), numbers), folder / f"after_{world}")
    rl.wait_for_all()
    leave_processes()  # as the programs do: gloo aborts where a process only ends


def test_two_processes_make_the_same_update_as_one(make_policy, tmp_path):
    save_policy(tmp_path, make_policy(), rl.asdict(make_policy().cfg))
    for world in (1, 2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        torch.multiprocessing.spawn(one_update, (world, port, tmp_path), nprocs=world)
    (one, numbers), (two, numbers_two) = (torch.load(tmp_path / f"after_{world}") for world in (1, 2))
    assert differences(one, two) < 1e-5
    assert numbers == pytest.approx(numbers_two, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--experts=all"], "experts must be one of"),
        (["--seed=99999999"], "leaves the training seeds"),
        (["--lr=0"], "--lr must lie in (0, 1]"),
        (["--expert_weight=-1"], "--expert_weight must lie in"),
        (["--port=/dev/ttyACM0"], "--port does nothing without --env=real"),
        (["--experts=none", "--expert_advantage=gae"], "--expert_advantage does nothing with --experts=none"),
        (["--eval_episodes=1e7"], "--eval_episodes must lie in"),
        (["--families=place,calculate"], "calculate"),
        (["--data=nowhere"], "no data set"),
        (["--sigma=0"], "sigma"),
        (["--resume"], "nothing to resume"),
        (["--ppo=false", "--experts=none"], "imitate"),
        (["--families=dance"], "dance"),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, fails, flags, said):
    assert said in fails(rl.main, arguments(trained, tmp_path / "x", *flags))


def test_a_start_that_is_no_checkpoint_is_one_line(tmp_path, fails):
    assert "no checkpoint" in fails(rl.main, arguments("nowhere", tmp_path / "x"))


@pytest.mark.parametrize(
    "name, value", [("gamma", 2.0), ("gae_lambda", 5.0), ("clip_coef", -1.0), ("arms", 0)]
)
def test_settings_of_presets_have_bounds_too(name, value):
    with pytest.raises(ValueError, match=f"--{name} must lie in"):
        rl.RLConfig(**{name: value})


def test_the_real_arm_spends_no_episode_on_tables():
    cfg = rl.RLConfig(env="real")
    assert (cfg.eval, cfg.eval_episodes) == (0, 0)


def test_checkpoint_without_statistics_is_refused(trained, tmp_path, fails):
    bare = tmp_path / "bare"
    shutil.copytree(trained, bare)
    weights = load_file(bare / "model.safetensors")
    weights["state_low"] = weights["state_low"] * math.nan
    save_file(weights, bare / "model.safetensors")
    assert "statistics" in fails(rl.main, arguments(bare, tmp_path / "x"))
