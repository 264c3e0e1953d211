"""Tests of rl.py: likelihood of the denoising chain, advantages, retrieval, the expert term, updates, resuming, processes."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import rl
from data import Neighbours

FORMS = [
    dict(sampler="chain", noisy="last", noise="chunk", sigma=0.2),
    dict(sampler="chain", noisy="all", noise="step", sigma=0.2),
    dict(sampler="sde", noisy="one", noise="step", sde_level=0.7),
    dict(sampler="sde", noisy="all", noise="chunk", sde_level=0.7),
]


def config(**changes):
    return rl.RLConfig(**rl.PRESETS["debug"] | changes)


def chains(policy, n, cfg, seed=0, states=None, state=None):
    """n rollout chunks, as to_batch makes them (without values), with random observations if none are given."""
    g, rng, c = torch.Generator().manual_seed(seed), np.random.default_rng(seed), policy.cfg
    states = torch.randn(n, c.queries, c.width, generator=g) if states is None else states
    state = torch.randn(n, c.action_dim, generator=g) if state is None else state
    drawn = [rl.draw(rng, c.denoise_steps, c.chunk, c.action_dim, cfg) for _ in range(n)]
    noise, noisy = (torch.from_numpy(np.stack(x)) for x in zip(*drawn))
    executed = torch.arange(c.chunk) < torch.randint(1, c.execute + 1, (n, 1), generator=g)
    return {
        "states": states,
        "state": state,
        "chain": rl.sample_chain(policy, states, state, noise, noisy, cfg),
        "noisy": noisy,
        "executed": executed,
    }


# -- likelihood ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_step_without_noise_is_the_euler_step(form):
    """sigma = a = 0 is the sampler of evaluation; Flow-SDE's mean is written differently, yet must agree."""
    quiet = config(**form)
    quiet.sigma = quiet.sde_level = 0.0
    x, v, t = (
        torch.randn(5, 8, 6),
        torch.randn(5, 8, 6),
        torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])[:, None, None],
    )
    mean, std = rl.step(x, v, t, 0.2, quiet)
    assert torch.allclose(mean, x - 0.2 * v, atol=1e-5) and std.abs().max() == 0


def test_flow_sde_against_the_published_formula():
    """mu = x (1 - sigma^2 d / 2t) - v d (1 + sigma^2 (1 - t) / 2t), sigma_t = a sqrt(t / (1 - t)); per-step std for K=4, a=0.5."""
    cfg, x, v = config(sampler="sde", sde_level=0.5), torch.randn(8, 6), torch.randn(8, 6)
    stds = []
    for t in (1.0, 0.75, 0.5, 0.25):
        variance = 0.25 * t / (1 - t) if t < 1 else 0.25 * t / (1 - 0.75)
        mean, std = rl.step(x, v, torch.tensor(t).view(1, 1), 0.25, cfg)
        assert torch.allclose(
            mean,
            x * (1 - variance * 0.25 / (2 * t)) - v * 0.25 * (1 + variance * (1 - t) / (2 * t)),
            atol=1e-5,
        )
        stds.append(std.item())
    assert stds == pytest.approx([0.50, 0.433, 0.25, 0.144], abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_log_probability_against_an_independent_computation(make_policy, form):
    policy, cfg = make_policy(), config(**form)
    b = chains(policy, 4, cfg)
    logp, _, _ = rl.chain_logp(policy, b, cfg)
    K = policy.cfg.denoise_steps
    for row in range(4):
        terms = []
        for k in b["noisy"][row].tolist():
            t = torch.tensor([[1 - k / K]])
            x, following = b["chain"][row, k], b["chain"][row, k + 1]
            v = policy.expert(
                x[None, None],
                policy.expert.modulation(t),
                b["state"][row : row + 1],
                policy.expert.condition(policy.adapter(b["states"][row : row + 1])),
            )[0, 0]
            mean, std = rl.step(x, v, t, 1 / K, cfg)
            mean, std, following = (
                mean[b["executed"][row]].double(),
                std.double(),
                following[b["executed"][row]].double(),
            )
            if cfg.noise == "chunk":  # one draw per joint
                mean, following = mean.mean(0), following.mean(0)
            terms.append(
                torch.distributions.Normal(mean, std.reshape(-1)[0].expand_as(mean))
                .log_prob(following)
                .mean()
            )
        assert logp[row].item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_ratio_is_one_before_the_first_step_however_the_rows_are_cut(make_policy, form):
    policy, cfg = make_policy(), config(**form)
    b = chains(policy, 12, cfg)
    whole = rl.chain_logp(policy, b, cfg)[0]
    parts = torch.cat([rl.chain_logp(policy, rl.rows_of(b, slice(i, i + 5)), cfg)[0] for i in (0, 5, 10)])
    assert (rl.ppo_loss(whole, parts, torch.ones(12), 0.2)[1] - 1).abs().max() < 1e-5


def test_sampled_steps_have_the_stated_spread(make_policy):
    policy, cfg = make_policy(), config(sampler="chain", noisy="all", noise="step", sigma=0.2)
    b = chains(policy, 400, cfg)
    _, mean, std = rl.chain_logp(policy, b, cfg)
    z = (b["chain"][:, 1:] - mean) / std
    assert z.mean().abs() < 0.02 and z.std().item() == pytest.approx(1, abs=0.02)


def test_flow_sde_is_noisy_in_the_drawn_step_alone(make_policy):
    policy, cfg = make_policy(), config(sampler="sde")
    K, n = policy.cfg.denoise_steps, 6
    a = torch.randn(n, policy.cfg.queries, policy.cfg.width), torch.randn(n, 6)
    noisy = torch.tensor([[2]] * n)
    one, two = (
        rl.sample_chain(policy, *a, torch.randn(n, K + 1, 8, 6), noisy, cfg) for _ in range(2)
    )  # temperature 0: both begin at 0
    assert torch.allclose(one[:, :3], two[:, :3], atol=1e-6) and (one[:, 3] - two[:, 3]).abs().min() > 0
    quiet = rl.sample_chain(policy, *a, torch.randn(n, K + 1, 8, 6), torch.full((n, 1), -1), cfg)
    assert torch.allclose(
        quiet[:, -1].clamp(-1.5, 1.5), policy.sample_chunk(*a, torch.zeros(n, 8, 6)), atol=1e-5
    )


@pytest.mark.parametrize("form", FORMS)
def test_experts_log_probability_is_minus_their_flow_matching_loss(form):
    """Monte Carlo over the noise of one step from the same x_t: E log p = const - weight |v - u|^2 (algorithms 3.6)."""
    cfg, n, d, a = config(**form), 20000, 1 / 5, torch.randn(1, 8, 6)
    for t in (1.0, 0.8, 0.6, 0.4, 0.2):
        x, v, time = torch.randn(1, 8, 6), torch.randn(1, 8, 6), torch.tensor(t).view(1, 1, 1)
        u = (x - a) / t
        mean, std = rl.step(x, u, time, d, cfg)
        sampled = mean + std * torch.randn(n, 8, 6)
        logp = rl.gaussian_logp(sampled, rl.step(x, v, time, d, cfg)[0], std).mean()
        weight = d**2 / (2 * cfg.sigma**2)
        if cfg.sampler == "sde":
            at = min(t, 1 - d)  # sigma's denominator at t = 1
            variance = cfg.sde_level**2 * t / (1 - at)
            weight = d * (1 + variance * (1 - t) / (2 * t)) ** 2 / (2 * variance)
            if t < 1:
                kappa = (1 + cfg.sde_level**2 / 2) ** 2 / (2 * cfg.sde_level**2)
                assert weight == pytest.approx(d * kappa * (1 - t) / t)
        expected = -0.5 - std.log() - 0.5 * math.log(2 * math.pi) - weight * (v - u).square().mean()
        assert logp.item() == pytest.approx(expected.item(), rel=0.02, abs=0.02), t


def test_bridge_ends_at_the_experts_chunk():
    cfg, a = config(sampler="chain", sigma=1e-4), torch.randn(3, 8, 6)
    path = rl.bridge(a, torch.randn(3, 6, 8, 6), 5, cfg)
    assert path.shape == (3, 6, 8, 6) and (path[:, -1] - a).abs().max() < 1e-3


# -- advantages ----------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    """Three chunks, gamma .5, lambda .5. Termination: nothing follows. Truncation: the value of the last observation does."""
    values = np.array([1.0, 2.0, 4.0])
    last = 1 - 4.0  # delta_2 = r + 0 - V
    middle = 0 + 0.5 * 4 - 2 + 0.25 * last
    first = 0 + 0.5 * 2 - 1 + 0.25 * middle
    assert rl.gae([0, 0, 1], values, 0.0, 0.5, 0.5).tolist() == pytest.approx([first, middle, last])
    last = 0 + 0.5 * 6 - 4
    middle = 0.25 * last
    assert rl.gae([0, 0, 0], values, 6.0, 0.5, 0.5).tolist() == pytest.approx([0.25 * middle, middle, last])


def test_clipped_surrogate_by_hand():
    logp, old = torch.tensor([1.0, 1.0, 0.0, 0.0]).log1p(), torch.zeros(4)  # ratios 2, 2, 1, 1
    losses, ratio = rl.ppo_loss(logp, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert ratio.tolist() == pytest.approx([2, 2, 1, 1]) and losses.tolist() == pytest.approx(
        [-1.2, 2, -1, 1]
    )


# -- retrieval -----------------------------------------------------------------------------------------------------


def test_retrieval_finds_the_frame_itself_within_its_family():
    tokens, weights = (
        torch.randn(30, 2, 48, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1.0, 0.5]),
    )
    families, uniform = ["place", "calculate"] * 15, np.random.default_rng(0).random(30)
    index = Neighbours(tokens, families, weights)
    rows, similarity = index.nearest(tokens, families, 1, uniform)
    assert rows.tolist() == list(range(30)) and np.allclose(similarity, 1.5, atol=1e-5)
    rows, similarity = index.nearest(tokens, ["calculate"] * 30, 3, uniform)
    assert (rows % 2 == 1).all() and similarity[0] < 1.5
    cosines = torch.nn.functional.cosine_similarity(tokens[0], tokens[rows[0]], dim=-1)
    assert similarity[0].item() == pytest.approx((cosines * weights).sum().item(), abs=1e-5)
    rows, similarity = index.random(tokens, uniform)
    cosines = torch.nn.functional.cosine_similarity(tokens, tokens[rows], dim=-1)  # (30, V)
    assert len(set(rows.tolist())) > 10 and np.allclose(similarity, (cosines * weights).sum(1), atol=1e-5)


# -- the expert term -----------------------------------------------------------------------------------------------


def expert_batch(policy, n, seed=3):
    g, c = torch.Generator().manual_seed(seed), policy.cfg
    draw = lambda *shape: torch.randn(n, *shape, generator=g)  # noqa: E731
    return {
        "states": draw(c.queries, c.width),
        "state": draw(6),
        "actions": draw(8, 6),
        "valid": torch.ones(n, 8, dtype=torch.bool),
        "eps": draw(4, 8, 6),
        "t": torch.rand(n, 4, generator=g) * 0.9 + 0.1,
        "uniform": torch.rand(n, c.queries, generator=g),
        "path": draw(c.denoise_steps + 1, 8, 6),
        "left": torch.ones(n),
    }


@pytest.mark.parametrize("form", ["cfm", "ratio", "chain"])
def test_expert_advantage_is_one_whatever_the_rollouts_advantages_are(make_policy, form):
    policy, cfg = make_policy(decouple="off"), config(expert_form=form, sigma=0.2)
    critic, e = rl.Critic(policy.cfg), expert_batch(policy, 6)
    e["old"] = rl.expert_loss(policy, e).detach()
    terms = [rl.expert_term(policy, critic, e, scale, cfg) for scale in ((0.0, 1.0), (5.0, 0.1))]
    assert torch.equal(*terms)
    by_value = config(expert_form=form, sigma=0.2, expert_advantage="gae")
    assert not torch.equal(
        *(rl.expert_term(policy, critic, e, scale, by_value) for scale in ((0.0, 1.0), (5.0, 0.1)))
    )


def test_forms_of_the_expert_term_pull_the_same_way(make_policy):
    """The three gradients at the starting point: ratio is cfm times beta exactly, chain is a noisy estimate of the same objective."""
    policy = make_policy(decouple="off")
    critic, e = rl.Critic(policy.cfg), expert_batch(policy, 200)
    e["old"] = rl.expert_loss(policy, e).detach()
    gradients = {}
    for form in ("cfm", "ratio", "chain"):
        cfg = config(expert_form=form, sigma=0.2)
        policy.zero_grad()
        rl.expert_term(policy, critic, e, (0.0, 1.0), cfg).backward()
        gradients[form] = torch.cat(
            [p.grad.flatten() for p in policy.expert.parameters() if p.grad is not None]
        )
    K = policy.cfg.denoise_steps
    beta = (1 / K) ** 2 / (2 * 0.2**2)
    assert torch.allclose(gradients["ratio"], beta * gradients["cfm"], rtol=1e-3, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(gradients["chain"], gradients["cfm"], dim=0) > 0.5


# -- updates -------------------------------------------------------------------------------------------------------


def learner_of(policy):
    torch.manual_seed(0)
    policy.requires_grad_(False)
    return torch.nn.ModuleDict(
        {"adapter": policy.adapter, "expert": policy.expert, "critic": rl.Critic(policy.cfg)}
    ).requires_grad_(True)


@pytest.mark.parametrize("form", FORMS[:2])
def test_a_bandit_with_a_known_optimum_is_solved(make_policy, form):
    """One observation, one chunk; reward for first joint targets near 0.8 on average: PPO moves the chain there."""
    policy = make_policy()
    cfg = config(
        **form | dict(sigma=0.3, minibatch=64, epochs=3, critic_warmup=0, experts="none", target_kl=0.05)
    )
    learner = learner_of(policy)
    optimizer = torch.optim.AdamW(learner.parameters())
    states, state = (
        torch.randn(1, policy.cfg.queries, policy.cfg.width).expand(128, -1, -1),
        torch.zeros(128, 6),
    )
    error = lambda chunk: (chunk[:, : policy.cfg.execute, 0].mean(1) - 0.8).square()  # noqa: E731
    before = error(policy.sample_chunk(states[:1], state[:1], torch.zeros(1, 8, 6))).item()
    for iteration in range(50):
        b = chains(policy, 128, cfg, iteration, states, state)
        reward = -error(b["chain"][:, -1])
        b |= {
            "executed": (torch.arange(8) < policy.cfg.execute).expand(128, -1),
            "advantage": reward - reward.mean(),
            "return": reward,
            "value": torch.zeros(128),
        }
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - iteration / 50)
        assert rl.update(policy, None, learner, b, None, optimizer, cfg, iteration)["kl"] < 0.5
    after = error(policy.sample_chunk(states[:1], state[:1], torch.zeros(1, 8, 6))).item()
    assert before > 0.1 and after < 0.02, (before, after)


def test_value_model_warms_up_before_the_policy_moves(make_policy):
    policy, cfg = make_policy(), config(critic_warmup=1)
    learner = learner_of(policy)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2, weight_decay=0)
    b = chains(policy, 16, cfg) | {
        "advantage": torch.randn(16),
        "return": torch.rand(16),
        "value": torch.zeros(16),
    }
    old = {k: v.clone() for k, v in learner.state_dict().items()}
    first = rl.update(policy, None, learner, b, None, optimizer, cfg, 0)
    assert (
        all(torch.equal(v, old[k]) == (not k.startswith("critic")) for k, v in learner.state_dict().items())
        and "kl" not in first
    )
    again = rl.update(policy, None, learner, b, None, optimizer, cfg, 1)
    assert again["value_loss"] < first["value_loss"] and any(
        not torch.equal(v, old[k]) for k, v in learner.state_dict().items() if k.startswith("expert")
    )


def test_update_stops_at_the_target_divergence(make_policy):
    policy = make_policy()
    cfg = config(critic_warmup=0, epochs=20, target_kl=1e-4)
    learner = learner_of(policy)
    b = chains(policy, 16, cfg) | {
        "advantage": torch.randn(16),
        "return": torch.rand(16),
        "value": torch.zeros(16),
    }
    assert (
        rl.update(policy, None, learner, b, None, torch.optim.AdamW(learner.parameters(), lr=3e-3), cfg, 1)[
            "updates"
        ]
        < 20
    )


def test_anchor_is_zero_at_the_start_and_grows(make_policy):
    policy, start = make_policy(), make_policy()
    cfg = config(critic_warmup=0, anchor=1e-9, epochs=1, minibatch=16)
    learner = learner_of(policy)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    b = chains(policy, 16, cfg) | {
        "advantage": torch.randn(16),
        "return": torch.rand(16),
        "value": torch.zeros(16),
    }
    first, second = (rl.update(policy, start, learner, b, None, optimizer, cfg, i)["anchor"] for i in (1, 2))
    assert first < 1e-6 < second


def test_proximal_penalty_is_the_divergence_from_the_policy_that_played(make_policy):
    """KL of Gaussian steps against torch.distributions, at the noisy step and one other; the likelihood does not see the other."""
    policy, cfg = (
        make_policy(),
        config(sampler="chain", noisy="last", critic_warmup=0, proximal=1e-9, epochs=2, minibatch=16),
    )
    learner = learner_of(policy)
    b = chains(policy, 16, cfg) | {
        "advantage": torch.randn(16),
        "return": torch.rand(16),
        "value": torch.zeros(16),
    }
    alone = rl.chain_logp(policy, b, cfg)[0]
    other = b | {"other": torch.randint(policy.cfg.denoise_steps - 1, (16, 1))}
    together, before, std = rl.chain_logp(policy, other, cfg)
    assert torch.allclose(alone, together, atol=1e-5) and before.shape[1] == 2
    moved = rl.update(
        policy, None, learner, b, None, torch.optim.AdamW(learner.parameters(), lr=1e-2), cfg, 1
    )
    assert moved["proximal"] > 0  # mean over two passes: zero in the first, not in the second
    after = rl.chain_logp(policy, other, cfg)[1]
    normal = lambda mean: torch.distributions.Normal(mean.detach(), std.expand_as(mean))
    assert torch.allclose(
        0.5 * ((after - before) / std).square(),
        torch.distributions.kl_divergence(normal(after), normal(before)),
        rtol=1e-3,
        atol=1e-5,
    )
    assert (after - before)[:, 1].abs().max() > 0


# -- the run -------------------------------------------------------------------------------------------------------


def arguments(trained, out, *flags):
    return [
        "--config",
        "debug",
        f"--init_from={trained}",
        f"--out={out}",
        "--device=cpu",
        "--threads=1",
        *flags,
    ]


def test_run_resume_and_frozen_language(trained, tmp_path, capsys, monkeypatch, fails):
    rl.main(arguments(trained, tmp_path / "whole"))
    said = capsys.readouterr().out
    assert "bit for bit" in said
    real = rl.update

    def dies(*args, **kwargs):
        if args[7] == 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(rl, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        rl.main(arguments(trained, tmp_path / "cut"))
    monkeypatch.setattr(rl, "update", real)
    assert "begun with sigma" in fails(
        rl.main, arguments(trained, tmp_path / "cut", "--resume", "--sigma=0.5")
    )
    rl.main(arguments(trained, tmp_path / "cut", "--resume"))
    whole, cut = (
        torch.load(tmp_path / name / "train_state.pt", weights_only=True) for name in ("whole", "cut")
    )
    for part in ("learner", "ema"):
        assert all(torch.equal(v, cut[part][k]) for k, v in whole[part].items())
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2] and {
        "kl",
        "similarity",
        "gnorm",
        "validation",
    } <= lines[1].keys()


def test_two_processes_make_the_same_update_as_one(make_policy, tmp_path):
    code = f"""
import os, sys; sys.path[:0] = [{str(os.path.dirname(os.path.dirname(__file__)))!r},
{os.path.dirname(__file__)!r}] import torch, torch.distributed as dist, rl from conftest import make_policy
from test_rl import chains, config, learner_of torch.set_num_threads(1) rank, world =
int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) if world > 1:
dist.init_process_group("gloo") policy, cfg = make_policy.__wrapped__()(), config(critic_warmup=0,
minibatch=6, target_kl=9) learner = learner_of(policy) torch.manual_seed(1) b = chains(policy, 16, cfg) |
{{"advantage": torch.randn(16), "return": torch.rand(16), "value": torch.zeros(16)}} logs = rl.update(policy,
None, learner, b, None, torch.optim.SGD(learner.parameters(), lr=.01), cfg, 1, rank, world) if rank == 0:
torch.save((learner.state_dict(), logs), sys.argv[1]) if world > 1: dist.barrier();
dist.destroy_process_group()
"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run = [sys.executable, "-c", code]
    subprocess.run([*run, tmp_path / "one"], check=True)
    both = [
        subprocess.Popen(
            [*run, tmp_path / "two"],
            env=os.environ
            | {"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for r in (0, 1)
    ]
    assert [p.wait() for p in both] == [0, 0]
    (one, logs), (two, logs_two) = (torch.load(tmp_path / name) for name in ("one", "two"))
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-5
    assert logs == pytest.approx(logs_two, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--init_from=nowhere"], "no checkpoint"),
        (["--experts=all"], "experts must be one of"),
        (["--seed=99999"], "leaves the training seeds"),
        (["--view_weights=1"], "view_weights"),
        (["--view_weights=a,b"], "must be numbers"),
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


def test_checkpoint_without_statistics_is_refused(trained, tmp_path, fails):
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained, tmp_path / "bare")
    weights = load_file(tmp_path / "bare" / "model.safetensors")
    save_file(
        {k: v * math.nan if k == "state_low" else v for k, v in weights.items()},
        tmp_path / "bare" / "model.safetensors",
    )
    assert "statistics" in fails(rl.main, arguments(tmp_path / "bare", tmp_path / "x"))
