"""Reinforcement learning: similar-sample guided PPO on the flow policy, SyVLA's third stage.

    python rl.py --config small --init_from=out/small               # rollouts, retrieval, updates
    python rl.py --config small --init_from=out/small --resume      # go on after a kill
    python rl.py --config small --init_from=out/small --experts=none --out=out/no_experts     # plain PPO
    python rl.py --env=real --port=/dev/ttyACM0 --front=0 --wrist=2 --task="put the red cube on the blue pad"

In every iteration many simulated arms play whole episodes. The last denoising step of every chunk is noisy,
so the chunk has a likelihood. Every decision looks up one of the recorded frames whose pictures are most like
what it saw. PPO then moves the adapter and the action expert. The expert samples that were looked up join
each minibatch with their advantage fixed at 1.0: they stay outside GAE, outside the normalisation of
advantages and outside the value loss. The VLM is frozen: its query states of an observation are kept.

Read it in this order: the noisy denoising step and its likelihood, values and advantages, ExpertSamples, the
losses, Learner.train_pass() and update(). Rollouts and the run itself follow.

Shapes.  n decisions of an iteration, B of a minibatch, T of an episode, N recorded frames, V camera views,
E numbers of a view's visual tokens, Q feature queries, D their width, H control steps of a chunk, A action
dim, S state dim, K denoising steps, M noise samples.

Paper: SyVLA, arXiv 2606.09009. What it leaves open follows pi_RL, arXiv 2510.25889.
"""

import copy
import functools
import itertools
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import default_collate

from common import (
    Stopwatch,
    UserError,
    append_log,
    atomic_path,
    check_options,
    check_readable,
    choose_device,
    claim_folder,
    claim_run,
    fast_cpu,
    join_processes,
    mark,
    opt,
    parse_config,
    print0,
    rank_and_world,
    read_checkpoint_config,
    read_log,
    resumed_config,
    run_program,
    trim_log,
    wait_for_all,
)
from data import Episodes, flow_times
from evaluate import (
    EVAL,
    SEEDS,
    Episode,
    VecEnv,
    camera_indices,
    check_evaluation,
    evaluate,
    policy_fn,
    report,
    run_episodes,
)
from model import (
    Config,
    DenoisingStep,
    SyVLA,
    all_presets,
    checkpoint_folder,
    load_policy,
    save_policy,
    timesteps,
)
from train import average_gradients, averaged_weights, in_every_process, save_state

Batch = dict[str, Tensor]

# Settings that no table of ours varies
FIRST_SEED = 600_000  # of the training range: no scene of the data set is practised on
VALIDATION_SEEDS = SEEDS["val"][50_000:]  # train.py and sample.py use the first ones
CRITIC_PASSES = 3  # over the decisions of an iteration; the policy takes one
MAX_GRAD_NORM = 1.0
NOISE_SAMPLES = 2  # M, noise samples (eps, t) of an expert sample
NEIGHBOURS = 4  # a decision draws one of so many most similar frames
EMA = 0.9  # decay per iteration of the weight average that is validated and saved

REAL = "env=real"  # what the options of the real arm need

MAY_CHANGE = {  # on --resume: where things lie, what the machine is, and a rate that proved too high
    "config",
    "data",
    "device",
    "eval",
    "front",
    "id",
    "init_from",
    "lr",
    "out",
    "port",
    "resume",
    "threads",
    "wrist",
}


@dataclass
class RLConfig:
    """How a policy practises."""

    config: str = opt("small", "preset")
    init_from: str = opt("", "checkpoint folder of the policy to improve (default out/<config>)")
    data: str = opt("", "data set of the expert samples (default: the one the policy was trained on)")
    out: str = opt("", "run folder (default out/<config>_rl)")
    resume: bool = opt(False, "go on with the run in --out, with its settings")
    env: str = opt(
        "",
        "sim; real: an SO-100 or SO-101 and a person who judges; package.module:Class (default: as trained)",
    )
    port: str = opt("", "real: serial port of the arm (lerobot-find-port)", needs=REAL)
    id: str = opt(
        "",
        "real: LeRobot's robot id, whose calibration is used; not needed if there is only one",
        needs=REAL,
    )
    front: str = opt("", "real: front camera, number or path (lerobot-find-cameras opencv)", needs=REAL)
    wrist: str = opt("", "real: wrist camera", needs=REAL)
    task: str = opt("", "real: the instruction of every episode", needs=REAL)
    families: str = opt(
        "",
        "task families, with commas (default: those the policy was trained on)",
        needs="not env=real",
        many=True,
    )
    iterations: int = opt(50, "rounds of rollouts and update", "[1, 1000000]")
    episodes: int = opt(192, "episodes per iteration, over all families and processes", "[1, 1000000]")
    sampler: str = opt(
        "chain", "the noisy step: Euler's and noise of fixed spread, or Flow-SDE's", ("chain", "sde")
    )
    sigma: float = opt(
        0.04, "chain: the noise's spread in normalised action units; sde: its level a, like 0.5", "(0, 10]"
    )
    lr: float = opt(
        3e-4, "AdamW learning rate of adapter and expert, decaying to a tenth along a cosine", "(0, 1]"
    )
    minibatch: int = opt(256, "decisions per gradient step, over all processes", "[1, 1000000]")
    ppo: bool = opt(
        True, "false: imitation of the expert samples alone, in as many updates of as many chunks"
    )
    experts: str = opt(
        "similar", "where the expert samples of every minibatch come from", ("similar", "random", "none")
    )
    expert_weight: float = opt(10.0, "weight of the expert term", "[0, 1e6]", needs="not experts=none")
    expert_advantage: str = opt(
        "one",
        "the paper's fixed 1.0, or the value model's (the paper's failing control)",
        ("one", "gae"),
        needs="not experts=none",
    )
    proximal: float = opt(
        0.5, "weight of the KL divergence from the policy that played, over the whole chain", "[0, 1e6]"
    )
    anchor: float = opt(
        0.0,
        "weight of the KL divergence from the starting policy, a baseline in place of experts",
        "[0, 1e6]",
    )
    eval_episodes: int = opt(
        150,
        "validation episodes per family, which choose the policy kept; 0: the last is kept",
        f"[0, {len(VALIDATION_SEEDS)}]",
        needs="not env=real",
    )
    eval: int = opt(
        100,
        "report episodes per family and split for the tables before and after; 0 for none",
        EVAL,
        needs="not env=real",
    )
    seed: int = opt(0, "seed of scenes and noise", "[0, 4294967295]")
    device: str = opt("auto", "auto (cuda, then mps, then cpu), cpu, cuda, mps")
    threads: int = opt(0, "CPU threads; 0 lets torch choose", "[0, 1024]")

    # Set by presets
    arms: int = opt(32, allowed="[1, inf)")  # simulated at once
    critic_warmup: int = opt(2, allowed="[0, inf)")  # iterations in which only the value model learns
    critic_lr: float = opt(5e-4, allowed="(0, 1]")  # AdamW learning rate of the value model
    gamma: float = opt(0.9, allowed="[0, 1]")  # discount per decision
    gae_lambda: float = opt(0.5, allowed="[0, 1]")  # of the advantages
    clip_coef: float = opt(0.2, allowed="(0, 1)")  # of PPO's probability ratio
    target_kl: float = opt(0.02, allowed="(0, inf)")  # an update of the policy ends when it moved this far
    index_frames: int = opt(6000, allowed="[1, inf)")  # N, recorded frames that can be looked up
    eval_every: int = opt(10, allowed="[1, inf)")  # iterations between validations

    def __post_init__(self):
        self.init_from = self.init_from or f"out/{self.config}"
        self.out = self.out or f"out/{self.config}_rl"
        if self.env == "real":  # a person judges every episode: all of them go into learning
            self.eval = 0
            self.eval_episodes = 0
        check_options(self)
        if self.first_seed(self.iterations) > len(SEEDS["train"]):
            said = f"--seed={self.seed} with {self.iterations} x {self.episodes} --episodes"
            raise UserError(f"{said} leaves the training seeds; lower one of them, or --iterations")
        if not self.ppo and self.experts == "none":
            raise UserError("--ppo=false needs expert samples to imitate; leave out --experts=none")

    def first_seed(self, iteration: int) -> int:
        """Seed of an iteration's first scene. Other iterations and other values of --seed have others."""
        return FIRST_SEED + (self.seed * self.iterations + iteration) * self.episodes

    @property
    def family_names(self) -> list[str]:
        return self.families.split(",")


# -----------------------------------------------------------------------------------------------------------
# The noisy denoising step and the likelihood of a chunk


def gaussian_step(x: Tensor, v: Tensor, t: Tensor, d: float, cfg: RLConfig) -> tuple[Tensor, Tensor]:
    """A noisy denoising step from flow time t to t - d -> its mean, like x, and its std, like t; fp32.

    chain: the Euler step with noise of fixed spread (ReinFlow's Flow-Noise, arXiv 2505.22094, without a noise
    network). sde: Flow-SDE (Flow-GRPO, arXiv 2505.05470), sigma_t = a sqrt(t / (1 - t)), whose marginals are
    those of the ODE as d -> 0. x and v (..., H, A), t (..., 1, 1).
    """
    x = x.float()  # bf16 is too coarse for a likelihood
    v = v.float()
    if cfg.sampler == "chain":
        return x - d * v, torch.full_like(t, cfg.sigma)
    variance = cfg.sigma**2 * t / (1 - t.clamp(max=1 - d))  # at t = 1 the next time in the denominator
    clean = x - t * v  # where the flow ends, at t = 0
    noise = x + (1 - t) * v  # where it began, at t = 1
    noise_share = t - d - variance * d / (2 * t)
    mean = clean * (1 - t + d) + noise * noise_share
    return mean, (variance * d).sqrt()


def gaussian_logp(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of N(mean, std^2), per element."""
    z = (x - mean) / std
    return -0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)


def noisy_last_step(policy: SyVLA, noise: Tensor, cfg: RLConfig) -> DenoisingStep:
    """The step that SyVLA.denoise() takes in rollouts: Euler's, but with noise (B, A) in the last one.

    One draw per joint moves the whole chunk. With one draw per control step the arm would only tremble, and
    the likelihood would have H times as many dimensions.
    """
    K = policy.cfg.denoise_steps
    t = timesteps(K, noise.device)[-1:, None]  # (1, 1)

    def step(k: int, x: Tensor, v: Tensor) -> Tensor:
        if k < K - 1:
            return policy.euler_step(k, x, v)
        mean, std = gaussian_step(x, v, t, 1 / K, cfg)  # (B, H, A), (1, 1)
        return mean + std * noise[:, None]

    return step


def chain_likelihood(net: Any, batch: Batch, cfg: RLConfig) -> tuple[Tensor, Tensor, Tensor]:
    """How likely a policy makes the noisy step of a chunk, and where two of its denoising steps lead.

    What was drawn is one displacement per joint, so the density is that of the mean over the executed control
    steps. The log-probability is a mean over its A dimensions, all of which exploration has covered.

    net: what has an adapter and an expert. batch: query_states (B, Q, D), state (B, S), chain (B, K+1, H, A),
    executed (B, H) bool; other (B,) int64, a second denoising step, which only the KL penalties look at.
    -> log-probability (B,); mean (B, 2, H, A) and std (B, 2, 1, 1) of the last step and of the other.
    """
    chain = batch["chain"]
    K = chain.shape[1] - 1
    last = torch.full_like(batch["other"], K - 1)
    steps = torch.stack((last, batch["other"]), dim=1)  # (B, 2)
    x = chain.take_along_dim(steps[..., None, None], dim=1)  # (B, 2, H, A)
    t = timesteps(K, chain.device)[steps]  # (B, 2)
    keys_values = net.expert.condition(net.adapter(batch["query_states"]))
    modulation = net.expert.modulation(t)
    v = net.expert(x, modulation, batch["state"], keys_values)  # (B, 2, H, A)
    mean, std = gaussian_step(x, v, t[..., None, None], 1 / K, cfg)

    # The arm executes the first control steps alone: the rest of the chunk has earned no reward.
    executed = batch["executed"][..., None].float()  # (B, H, 1)
    weight = executed / executed.sum(1, keepdim=True)  # (B, H, 1)
    drawn = (chain[:, K] * weight).sum(1)  # (B, A)
    expected = (mean[:, 0] * weight).sum(1)  # (B, A)
    logp = gaussian_logp(drawn, expected, std[:, 0, 0])  # (B, A)
    return logp.mean(1), mean, std


# -----------------------------------------------------------------------------------------------------------
# Values and advantages


class Critic(nn.Module):
    """V(o), the discounted chance of success: a separate model of feature query states and joint state.

    It sees what the VLM makes of an observation. What the expert makes of it serves less (pi_RL).
    """

    def __init__(self, cfg: Config):
        super().__init__()
        inputs = cfg.queries * cfg.width + cfg.state_dim
        self.net = nn.Sequential(
            nn.LayerNorm(inputs),
            nn.Linear(inputs, 256),
            nn.ReLU(),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, 1),
        )
        nn.init.normal_(self.net[-1].weight, std=0.02)  # first guesses near 0

    def forward(self, batch: Batch) -> Tensor:
        """query_states (B, Q, D), state (B, S) normalised -> (B,)."""
        flat = batch["query_states"].flatten(1)  # (B, Q*D)
        inputs = torch.cat((flat, batch["state"]), dim=1)  # (B, Q*D + S)
        return self.net(inputs)[:, 0]


def gae(
    rewards: Sequence[float], values: Sequence[float], last: float, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantage estimation over the T decisions of an episode -> advantages (T,).

    last: 0 where the episode ended by itself, V(final observation) where the time limit cut it off.
    """
    advantages = torch.zeros(len(rewards))
    running = 0.0  # the advantage of the decision after i
    following = last  # the value after i
    for i in reversed(range(len(rewards))):
        delta = rewards[i] + gamma * following - values[i]
        running = delta + gamma * gae_lambda * running
        advantages[i] = running
        following = values[i]
    return advantages


def to_batch(episodes: list[Episode], cfg: RLConfig) -> Batch:
    """Episodes -> a batch of their n decisions: their extras, executed (n, H), advantage (n,), return (n,).

    Returns, which the value model learns, are those of lambda 1: it must not learn from its own guesses
    (VC-PPO, arXiv 2503.01491).
    """
    extras = [extra for episode in episodes for extra in episode.extras]
    batch = default_collate(extras)  # {name: (n, ...)}
    advantages = []
    returns = []
    executed = []
    for episode in episodes:
        values = [float(extra["value"]) for extra in episode.extras]
        outcome = (episode.rewards, values, episode.final or 0.0, cfg.gamma)
        advantages.append(gae(*outcome, cfg.gae_lambda))  # (T,)
        returns.append(gae(*outcome, 1.0) + torch.tensor(values))  # (T,)
        executed += episode.executed
    H = batch["chain"].shape[2]
    batch["executed"] = torch.arange(H) < torch.tensor(executed)[:, None]  # (n, H)
    batch["advantage"] = torch.cat(advantages)
    batch["return"] = torch.cat(returns)
    return batch


# -----------------------------------------------------------------------------------------------------------
# Expert samples


class ExpertSamples:
    """Recorded frames to imitate: retrieved by similarity of what the cameras saw, or drawn at random.

    The similarity of two observations is the sum over views of cos(E(o_v), E(x_v)) (SyVLA). E are the frozen
    VLM's visual tokens. What the VLM makes of recorded frames is computed once and kept with the data set.
    """

    def __init__(self, policy: SyVLA, cfg: RLConfig):
        self.cfg = cfg
        self.policy_cfg = policy.cfg
        recorded = Episodes(cfg.data, policy.cfg, cfg.family_names)
        recorded.check_tasks(policy.tokenizer)
        print0(f"expert samples of {cfg.data}; clipped targets: {policy.clipped(recorded.action)}")
        shuffled = np.random.default_rng(0).permutation(len(recorded))  # (all frames,)
        frames = np.sort(shuffled[: cfg.index_frames])  # (N,), in the order in which they lie on disk
        table = load_table(policy, recorded, frames, cfg)
        keys = F.normalize(table.pop("keys").float(), dim=-1)  # (N, V, E) of length 1
        self.keys = keys.flatten(1)  # (N, V*E): one product with them sums the cosines over views
        device = policy.vlm.queries.device
        table["state"] = policy.normalise(table["state"].to(device), "state")  # (N, S)
        table["actions"] = policy.normalise(table["actions"].to(device), "action")  # (N, H, A)

        # Success is so many decisions away: the value model's control needs it (expert_advantage).
        episodes = [recorded.episodes[recorded.episode_of[i]] for i in frames]
        ends = np.array([episode["start"] + episode["length"] for episode in episodes])  # (N,)
        steps_left = ends - np.array(recorded.frames)[frames]  # (N,)
        left = np.ceil(steps_left / policy.cfg.n_action_steps)  # (N,)
        self.table = table | {"left": torch.from_numpy(left)}
        self.families = np.array([episode.get("family", "") for episode in episodes])  # (N,)

    def look_up(self, episodes: list[Episode]) -> None:
        """Each decision retrieves a frame by its "views": its extras gain "expert" (row) and "similarity"."""
        for episode in episodes:
            rng = np.random.default_rng([self.cfg.seed, episode.seed, 1])
            uniform = torch.from_numpy(rng.random(len(episode.extras)))  # (T,)
            views = torch.stack([extra.pop("views") for extra in episode.extras])  # (T, V, E)
            rows, similarity = self.retrieve(views, episode.options["family"], uniform)
            for extra, row, alike in zip(episode.extras, rows, similarity):
                extra["expert"] = row
                extra["similarity"] = alike

    def retrieve(self, views: Tensor, family: str, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """views (T, V, E) -> one row of the table each and its similarity, both (T,).

        uniform (T,) in [0, 1) draws among the most similar frames, those of the same task family if there
        are any; or among all frames.
        """
        queries = F.normalize(views.float(), dim=-1).flatten(1)  # (T, V*E)
        similarity = queries @ self.keys.T  # (T, N)
        if self.cfg.experts == "random":
            candidates = torch.arange(len(self.keys)).expand_as(similarity)  # (T, N)
        else:
            other_family = torch.from_numpy(self.families != family)  # (N,)
            ranked = similarity - 100 * other_family  # (T, N), other families' frames last
            candidates = ranked.topk(NEIGHBOURS, dim=1).indices  # (T, NEIGHBOURS)
        column = (uniform * candidates.shape[1]).long()[:, None]  # (T, 1)
        rows = candidates.gather(1, column)  # (T, 1)
        return rows[:, 0], similarity.gather(1, rows)[:, 0]

    def samples(self, rows: Tensor, iteration: int) -> Batch:
        """Rows (n,) of the table and noise for their flow loss, under names that begin with "expert_"."""
        rng = np.random.default_rng([self.cfg.seed, iteration, 1])
        c = self.policy_cfg
        shape = (len(rows), NOISE_SAMPLES)
        samples = {name: tensor[rows] for name, tensor in self.table.items()}
        noise = {
            "t": flow_times(rng, shape),
            "eps": rng.standard_normal((*shape, c.chunk_size, c.action_dim)),
            "uniform": rng.random((len(rows), c.queries)),  # for the control --decouple=random
        }
        samples |= {name: torch.from_numpy(array).float() for name, array in noise.items()}
        return {f"expert_{name}": tensor for name, tensor in samples.items()}


@torch.inference_mode()
def load_table(policy: SyVLA, recorded: Episodes, frames: np.ndarray, cfg: RLConfig) -> Batch:
    """What the frozen VLM makes of N recorded frames, from its file in the data set, written if missing.

    -> keys (N, V, E), query_states (N, Q, D) after the recorded reasoning, state, actions and valid.
    """
    c = policy.cfg
    device = policy.vlm.queries.device
    made_of = policy.fingerprint(2, c.cameras, cfg.families, len(frames), c.chunk_size, c.reasoning)
    path = Path(cfg.data, f"similarity_{made_of}.safetensors")
    if path.is_file():
        return load_file(path)
    table = defaultdict(list)
    for picks in np.array_split(frames, math.ceil(len(frames) / 64)):
        samples = recorded.samples(policy.tokenizer, picks)
        visual = policy.vlm.encode_images(samples["images"].to(device))
        text = [samples[name].to(device) for name in ("tokens", "segments", "positions")]
        query_states = policy.vlm(visual, *text, with_queries=True).queries  # (64, Q, D)
        table["keys"].append(visual.tokens.flatten(2).half().cpu())  # (64, V, E)
        table["query_states"].append(query_states.float().cpu())
        for name in ("state", "actions", "valid"):
            table[name].append(samples[name])
    # Other processes and other runs may be writing the same file: each writes its own and renames it.
    own = path.with_suffix(f".{os.getpid()}")
    save_file({name: torch.cat(parts) for name, parts in table.items()}, own)
    own.replace(path)
    return load_file(path)


# -----------------------------------------------------------------------------------------------------------
# Losses


def clipped_surrogate(logp: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate -> losses (B,), probability ratios (B,)."""
    ratio = (logp - old).clamp(-20, 20).exp()  # (B,)
    clipped = ratio.clamp(1 - clip, 1 + clip)  # (B,)
    return -torch.minimum(ratio * advantage, clipped * advantage), ratio


@torch.no_grad()
def expert_advantage(batch: Batch, critic: Critic, mean: Tensor, std: Tensor, cfg: RLConfig) -> Tensor:
    """Advantages (n,) of expert samples: the paper's 1.0 or, as its control, those of GAE with lambda 1.

    GAE's are the demonstration's discounted return less the value model's guess, normalised by mean and std
    of the rollouts' advantages.
    """
    left = batch["expert_left"].float()
    if cfg.expert_advantage == "one":
        return torch.ones_like(left)
    guess = critic({"query_states": batch["expert_query_states"], "state": batch["expert_state"]})
    returns = cfg.gamma ** (left - 1)  # (n,) success, so many decisions later
    return (returns - guess - mean) / std


def expert_loss(policy: SyVLA, batch: Batch) -> Tensor:
    """Flow-matching loss of every expert sample under intention decoupling -> (B,).

    Minus this loss bounds the log-probability of the expert's chunk from below, up to a constant and a
    weight. So its gradient times the advantage is that of PPO's term at ratio 1.
    """
    query_states = batch["expert_query_states"]
    flow_args = [batch[f"expert_{name}"] for name in ("state", "actions", "valid", "eps", "t")]
    if policy.cfg.decouple != "off":
        keep = policy.keep_mask(query_states, *flow_args, batch["expert_uniform"])  # (B, Q)
        query_states = query_states * keep[..., None]  # (B, Q, D)
    loss = policy.flow_loss(query_states, *flow_args)  # (B, M)
    return loss.mean(1)


def policy_loss(policy: SyVLA, batch: Batch, cfg: RLConfig) -> Batch:
    """Losses of a minibatch of decisions and their expert samples -> {"loss", what is logged}, scalars."""
    logp, mean, std = chain_likelihood(policy, batch, cfg)
    surrogate, ratio = clipped_surrogate(logp, batch["old_logp"], batch["advantage"], cfg.clip_coef)
    clipped = (ratio - 1).abs() > cfg.clip_coef  # (B,)
    logs = {
        "kl": (ratio - 1 - ratio.log()).mean(),  # an unbiased estimate that is never negative
        "clipped": clipped.float().mean(),
    }
    loss = cfg.ppo * surrogate.mean()  # 0 where the expert samples alone are imitated
    if cfg.experts != "none":
        weighted = batch["expert_advantage"] * expert_loss(policy, batch)  # (B,)
        logs["expert_loss"] = weighted.mean()
        loss = loss + cfg.expert_weight * logs["expert_loss"]
    for name, weight in (("proximal", cfg.proximal), ("anchor", cfg.anchor)):
        if weight:  # KL divergence of Gaussian steps of equal std
            z = (mean - batch[name]) / std  # (B, 2, H, A)
            logs[name] = 0.5 * z.square().mean()
            loss = loss + weight * logs[name]
    return logs | {"loss": loss}


# -----------------------------------------------------------------------------------------------------------
# Update


class Learner:
    """What a run changes: a policy's adapter and action expert, and a value model. The VLM is frozen."""

    def __init__(self, policy: SyVLA, cfg: RLConfig):
        self.policy = policy.requires_grad_(False)
        self.cfg = cfg
        self.device = policy.vlm.queries.device
        torch.manual_seed(cfg.seed)
        modules = {"adapter": policy.adapter, "expert": policy.expert, "critic": Critic(policy.cfg)}
        self.net = nn.ModuleDict(modules).to(self.device).requires_grad_(True)
        self.start = copy.deepcopy(self.net)  # for the KL divergence from the starting policy
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        groups = [
            {"params": trained.values(), "weight_decay": 0.0},
            {"params": self.net.critic.parameters(), "weight_decay": 0.1},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.ema = {name: p.detach().clone() for name, p in trained.items()}
        self.best = -1.0  # validation success of the policy in --out

    def set_learning_rates(self, iteration: int) -> None:
        """A cosine to a tenth; the policy's rises during 5 iterations, as AdamW's first steps are large."""
        cosine = 0.55 + 0.45 * math.cos(math.pi * iteration / self.cfg.iterations)
        rise = (iteration + 1 - self.cfg.critic_warmup) / 5
        policy_group, critic_group = self.optimizer.param_groups
        policy_group["lr"] = self.cfg.lr * min(1, max(0, rise)) * cosine
        critic_group["lr"] = self.cfg.critic_lr * cosine

    def train_pass(
        self, losses_of: Callable[[Batch], Batch], batch: Batch, order: np.ndarray
    ) -> dict[str, float]:
        """Gradient steps on minibatches of a batch, in this order, up to target_kl -> mean numbers.

        losses_of(minibatch) -> {"loss", what is logged}, scalars. Every process holds the whole batch and
        takes its rows of each minibatch, so the result does not depend on the number of processes.
        """
        rank, world = rank_and_world()
        steps = []
        for rows in np.array_split(order, math.ceil(len(order) / self.cfg.minibatch)):
            mine = rows[rank::world]
            logs = losses_of({name: tensor[mine] for name, tensor in batch.items()})
            share = len(mine) * world / len(rows)  # makes the mean over processes the mean over rows
            (logs["loss"] * share).backward()
            average_gradients(self.net)
            values = share * torch.stack(list(logs.values())).detach()
            if world > 1:
                dist.all_reduce(values)
                values /= world
            step = dict(zip(logs, values.tolist()))
            step["gnorm"] = nn.utils.clip_grad_norm_(self.net.parameters(), MAX_GRAD_NORM).item()
            if not all(map(math.isfinite, step.values())):
                raise UserError(f"numbers are no longer finite: {step}; type a lower --lr and --resume")
            self.optimizer.step()
            self.optimizer.zero_grad()
            steps.append(step)
            if self.cfg.ppo and step.get("kl", 0) > self.cfg.target_kl:  # the same on every process
                break
        means = {name: float(np.mean([step[name] for step in steps])) for name in step}
        return means | {"updates": len(steps)}

    def save(self, path: Path, iteration: int) -> None:
        """Write what --resume needs after so many iterations."""
        state = {
            "iteration": iteration,
            "best": self.best,
            "ema": self.ema,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_state(path, state)

    def load(self, path: Path) -> int:
        """Read what save() wrote -> the number of iterations that are done."""
        with check_readable(path, "start anew with another --out"):
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema = state["ema"]
            self.best = state["best"]
            return state["iteration"]


def update(learner: Learner, batch: Batch, iteration: int) -> dict[str, float]:
    """One iteration's update on a batch of decisions with their expert samples -> numbers for the log."""
    cfg = learner.cfg
    policy = learner.policy
    critic = learner.net.critic
    n = len(batch["chain"])
    K = policy.cfg.denoise_steps
    rng = np.random.default_rng([cfg.seed, iteration, 2])
    other = rng.integers(max(1, K - 1), size=n)  # (n,) one of the steps before the last
    orders = [rng.permutation(n) for _ in range(CRITIC_PASSES)]  # of rows; the policy takes the first
    advantage = batch["advantage"]  # (n,)
    mean = advantage.mean()
    std = advantage.std().clamp(min=1e-6)
    batch = batch | {
        "advantage": (advantage - mean) / std,
        "other": torch.as_tensor(other, device=learner.device),
    }
    numbers = {"updates": 0}
    if iteration >= cfg.critic_warmup:
        if cfg.experts != "none":
            batch["expert_advantage"] = expert_advantage(batch, critic, mean, std, cfg)
        with torch.no_grad():
            # By the function that the update uses: what rollouts computed, in other batches, would differ by
            # rounding. So all ratios start at 1.
            batch["old_logp"], batch["proximal"], _ = chain_likelihood(policy, batch, cfg)
            if cfg.anchor:
                _, batch["anchor"], _ = chain_likelihood(learner.start, batch, cfg)
        losses = functools.partial(policy_loss, policy, cfg=cfg)
        numbers = learner.train_pass(losses, batch, orders[0])

    def value_loss(part: Batch) -> Batch:
        return {"loss": F.mse_loss(critic(part), part["return"])}

    passes = [learner.train_pass(value_loss, batch, order)["loss"] for order in orders]
    error = batch["return"] - batch["value"]  # (n,)
    unexplained = error.var() / batch["return"].var().clamp(min=1e-8)
    return numbers | {"value_loss": float(np.mean(passes)), "explained": 1 - unexplained.item()}


# -----------------------------------------------------------------------------------------------------------
# Rollouts


@torch.no_grad()
def look(learner: Learner, obs: dict) -> Batch:
    """What the frozen VLM and the value model make of n observations, as run_episodes() has them.

    -> query_states (n, Q, D), state (n, S) normalised, value (n,), and views (n, V, E) for the retrieval.
    """
    policy = learner.policy
    c = policy.cfg
    cameras = camera_indices(policy, learner.cfg.env)
    images, state = policy.check_inputs(obs["images"][:, cameras], obs["state"], obs["task"])
    # As SyVLA.reason(), but the visual tokens are kept for the retrieval.
    visual = policy.vlm.encode_images(images)
    prompts = [policy.tokenizer.prompt(task, c.reasoning) for task in obs["task"]]
    limit = c.max_reasoning_tokens if c.reasoning else 0
    _, query_states = policy.vlm.generate(visual, prompts, policy.tokenizer.end_reasoning, limit, True)
    seen = {"query_states": query_states, "state": policy.normalise(state, "state")}
    seen["value"] = learner.net.critic(seen)
    if learner.cfg.experts != "none":
        seen["views"] = visual.tokens.flatten(2)  # (n, V, E)
    mark("VLM")
    return seen


def explore(learner: Learner, obs: dict) -> tuple[np.ndarray, list[Batch]]:
    """Noisy decisions for n arms, as run_episodes() takes them -> actions (n, h, A), n extras.

    The noise depends on the episode's seed and the decision's number, not on which arms move together.
    """
    mark("simulation")
    policy = learner.policy
    c = policy.cfg
    shape = (c.denoise_steps + 1, c.chunk_size, c.action_dim)
    draws = []
    for episode in obs["episode"]:
        rng = np.random.default_rng([learner.cfg.seed, episode.seed, len(episode.extras)])
        draws.append(rng.standard_normal(shape, np.float32))  # the first starts the chain, the last moves it
    noise = torch.from_numpy(np.stack(draws)).to(learner.device)  # (n, K+1, H, A)
    seen = look(learner, obs)
    step = noisy_last_step(policy, noise[:, -1, 0], learner.cfg)
    start = c.temperature * noise[:, 0]  # (n, H, A)
    chain = policy.denoise(seen["query_states"], seen["state"], start, step)  # (n, K+1, H, A)
    actions = policy.denormalise(policy.clip(chain[:, -1], "action"))  # (n, H, A)
    seen["chain"] = chain
    extras = []
    for row in range(len(chain)):  # copies, as a view of the batch would keep and send all of it
        extras.append({name: tensor[row].to("cpu", copy=True) for name, tensor in seen.items()})
    mark("expert")
    return actions[:, : c.n_action_steps].cpu().numpy(), extras


def play(learner: Learner, vec: VecEnv, jobs: list[Episode]) -> list[Episode]:
    """Play episodes with noise. Episode.final is the value of an observation cut off by the time limit."""

    def final_values(obs: dict) -> list[float]:
        return look(learner, obs)["value"].tolist()

    decide = functools.partial(explore, learner)
    if learner.cfg.env != "real":
        return run_episodes(vec, jobs, decide, "rollouts", final_values)

    # A person's time is not lost when the program dies: an episode is on disk as soon as it ends, and an
    # interrupted run plays only what is missing.
    folder = Path(learner.cfg.out, "episodes")
    for job in jobs:
        path = folder / f"{job.seed}.pt"
        if path.is_file():
            vars(job).update(torch.load(path, weights_only=True))

    def save(episode: Episode) -> None:
        save_state(folder / f"{episode.seed}.pt", vars(episode))

    missing = [job for job in jobs if not job.extras]
    try:
        run_episodes(vec, missing, decide, "episodes", final_values, save)
        vec.env.rest()
    except UserError as error:  # of the arm, of its cameras, or nobody is at the keyboard
        raise UserError(f"{error}; the episodes so far are kept: go on with --resume") from None
    return jobs


def gather(episodes: list[Episode]) -> list[Episode]:
    """The episodes of all processes, by seed."""
    world = rank_and_world()[1]
    parts = [episodes] * world
    if world > 1:
        dist.all_gather_object(parts, episodes)
    return sorted(itertools.chain(*parts), key=lambda episode: episode.seed)


def success_rates(name: str, episodes: list[Episode]) -> dict[str, float]:
    """{"name family": share of successful episodes}."""
    won = defaultdict(list)
    for episode in episodes:
        won[episode.options["family"]].append(episode.success)
    return {f"{name} {family}": float(np.mean(successes)) for family, successes in won.items()}


# -----------------------------------------------------------------------------------------------------------
# The run


def practise(learner: Learner, experts: ExpertSamples | None, vec: VecEnv, iteration: int) -> dict[str, Any]:
    """One iteration: rollouts, retrieval, update -> a line of log.jsonl."""
    cfg = learner.cfg
    rank, world = rank_and_world()
    jobs = []
    for i in range(rank, cfg.episodes, world):  # of this process; all families take turns
        options = {"family": cfg.family_names[i % len(cfg.family_names)], "split": "id"}
        if cfg.env == "real":
            options = {"family": "real", "task": cfg.task}
        jobs.append(Episode(cfg.first_seed(iteration) + i, options))
    line = {"iteration": iteration + 1}
    learner.set_learning_rates(iteration)
    with Stopwatch(learner.device) as watch:
        episodes = play(learner, vec, jobs)
        mark("simulation")
        if experts:
            experts.look_up(episodes)
        episodes = gather(episodes)
        batch = to_batch(episodes, cfg)
        if experts:
            batch |= experts.samples(batch["expert"], iteration)
            line["similarity"] = batch["similarity"].mean().item()
            line["expert_frames"] = len(batch["expert"].unique())
        batch = {name: tensor.to(learner.device) for name, tensor in batch.items()}
        mark("retrieval")
        line |= update(learner, batch, iteration)
        for name, average in learner.ema.items():
            weight = learner.policy.get_parameter(name).detach()
            average.lerp_(weight, 1 - EMA)
        mark("update")
    line |= success_rates("success", episodes)
    line |= {"return": batch["return"].mean().item(), "seconds": sum(watch.seconds.values())}
    return line | {"time": dict(watch.seconds)}


def keep_best(learner: Learner, vec: VecEnv) -> dict[str, float]:
    """Validate the averaged policy, without noise, and write it to --out if none before was better.

    -> {"validation family": success}. Without validation episodes every policy is written.
    """
    cfg = learner.cfg
    policy = learner.policy
    rank, world = rank_and_world()
    jobs = []
    for family in cfg.family_names:
        for seed in VALIDATION_SEEDS[: cfg.eval_episodes]:
            jobs.append(Episode(seed, {"family": family, "split": "id"}))
    with averaged_weights(policy, learner.ema):
        episodes = run_episodes(vec, jobs[rank::world], policy_fn(policy, cfg.env), "validation")
    rates = success_rates("validation", gather(episodes))
    score = sum(rates.values())  # every family counts the same
    if score > learner.best or not rates:
        learner.best = score
        settings = asdict(policy.cfg) | {"data": cfg.data, "families": cfg.families, "env": cfg.env}
        if cfg.env == "real":
            settings["env"] = "sim"  # which has the real arm's cameras and motors
        settings["rl"] = asdict(cfg)
        if rank == 0:
            save_policy(cfg.out, policy, settings, policy.state_dict() | learner.ema)
    return rates


def settle(cfg: RLConfig) -> RLConfig:
    """Complete a config from the run to resume, or from the starting policy."""
    claim_run(cfg, "rl.py")
    if cfg.resume:
        saved = read_checkpoint_config(cfg.out)
        settings = saved.get("rl", {}) | {"format": saved.get("format")}
        cfg = resumed_config(cfg, settings, MAY_CHANGE)
    cfg.init_from = checkpoint_folder(cfg.init_from)
    trained = read_checkpoint_config(cfg.init_from)
    for name in ("data", "families", "env"):
        setattr(cfg, name, getattr(cfg, name) or trained.get(name, ""))
    return cfg


def connect(policy: SyVLA, cfg: RLConfig) -> VecEnv:
    """The simulated arms of this process, or the real one with a person who judges."""
    if cfg.env == "real":
        from extras.real_env import connect

        return connect(cfg, policy, judged=True)
    world = rank_and_world()[1]
    arms = min(cfg.arms, math.ceil(cfg.episodes / world))
    workers = max(1, os.cpu_count() // world)
    return VecEnv(arms, workers, cfg.env, policy.cfg.image_size)


def train_rl(cfg: RLConfig) -> None:
    """The whole program: a success table, practice, another table."""
    rank, world = rank_and_world()
    fast_cpu(cfg.threads)
    device, _, _ = choose_device(cfg.device)
    join_processes(device)
    cfg = in_every_process(settle, cfg)
    policy = load_policy(cfg.init_from, device)
    if cfg.env != "real":
        check_evaluation(policy, cfg.family_names, cfg.env)
    fingerprint = policy.fingerprint()
    learner = Learner(policy, cfg)
    experts = None if cfg.experts == "none" else ExpertSamples(policy, cfg)
    print0(*(f"{name}={value}" for name, value in asdict(cfg).items()))
    print0(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {world} process(es)")
    out = Path(cfg.out)
    if rank == 0:
        claim_folder(out, "rl.py", create=True)
    with connect(policy, cfg) as vec:
        first = 0
        if cfg.resume:
            first = learner.load(out / "train_state.pt")
        else:
            report_success(learner, "eval_before.json")
            print0("before:", keep_best(learner, vec))
        if rank == 0:
            trim_log(out / "log.jsonl", "iteration", first)
            learner.save(out / "train_state.pt", first)
        for iteration in range(first, cfg.iterations):
            line = practise(learner, experts, vec, iteration)
            done = iteration + 1
            if not cfg.eval_episodes or done % cfg.eval_every == 0 or done == cfg.iterations:
                line |= keep_best(learner, vec)
            if rank == 0:
                append_log(out / "log.jsonl", line)
                learner.save(out / "train_state.pt", done)
            line.pop("time")
            print0(" | ".join(f"{name} {number:.4g}" for name, number in line.items()))
    if policy.fingerprint() != fingerprint:
        raise RuntimeError("the VLM should be frozen, but its weights have changed")
    print0("the VLM is the same bit for bit, so its answers are")
    wait_for_all()
    policy.load_weights(out / "model.safetensors")  # the best, not the last
    report_success(learner, "eval.json")
    if rank == 0:
        plot(out)


def report_success(learner: Learner, name: str) -> None:
    """The success table on report seeds, printed and written to --out, unless --eval=0."""
    cfg = learner.cfg
    if cfg.eval and rank_and_world()[0] == 0:
        results = evaluate(learner.policy, cfg.family_names, cfg.eval, env=cfg.env)
        report(results, Path(cfg.out, name))


def plot(out: Path) -> None:
    """curves.png: success with noise and on validation scenes, KL and gradient norm over iterations."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("for a picture of the curves: pip install matplotlib, then run the same with --resume")
        return
    lines = read_log(out / "log.jsonl")
    figure = Figure((12, 3.2), layout="tight")
    for axis, shown in zip(figure.subplots(1, 3), ("success validation", "kl", "gnorm")):
        for key in lines[-1]:
            if key.split()[0] in shown:  # "success place" is that of a family
                points = [(line["iteration"], line[key]) for line in lines if key in line]
                axis.plot(*zip(*points), label=key)
        axis.set_xlabel("iteration")
        axis.legend()
    with atomic_path(out / "curves.png") as path:
        figure.savefig(path, format="png")
    print(f"wrote {out / 'curves.png'}")


def main(argv: list[str]) -> None:
    """Entry point of the command line."""
    run_program(train_rl, parse_config(RLConfig, all_presets(), argv))


if __name__ == "__main__":
    main(sys.argv[1:])
