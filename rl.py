"""Reinforcement learning: similar-sample guided PPO on the flow policy, SyVLA's third stage.

    python rl.py --config small --init_from=out/small                     # roll out, retrieve, update; table before and after
    python rl.py --config small --init_from=out/small --resume            # go on after a kill
    python rl.py --config small --init_from=out/small --experts=none --out=out/no_experts      # plain PPO

Every iteration: many simulated arms play whole episodes with a noisy denoising chain, whose Gaussian steps have a likelihood
(`step`). Every decision looks up one of the expert frames most like what it saw. PPO moves the adapter and the expert;
the expert samples join each minibatch with their advantage fixed at 1.0, outside GAE, outside normalisation, outside the
value loss. The VLM is frozen: what it made of an observation (the feature query states) is computed once and kept.

Paper: SyVLA, arXiv 2606.09009, section on reinforcement learning; what it leaves open follows pi_RL (arXiv 2510.25889).
"""

import copy
import hashlib
import json
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import sim_env
from data import Episodes, Neighbours, Tokenizer, flow_times
from model import SyVLA, fast_cpu, opt, parse_config, read_checkpoint_config
from train import Stopwatch, average_gradients, averaged_weights, check_resume, choose_device, explain_errors, save_policy, trim_log, write_atomically


@dataclass
class RLConfig:
    config: str = opt("small", "preset")
    init_from: str = opt("", "checkpoint folder of the policy to improve (default out/<config>)")
    data: str = opt("", "data set that expert samples come from (default: the one the policy was trained on)")
    out: str = opt("", "run folder (default out/<config>_rl)")
    resume: bool = opt(False, "go on with the run in --out")
    families: str = opt("", "task families to practise, with commas (default: those the policy was trained on)")
    iterations: int = opt(150, "rounds of rollouts and update")
    episodes: int = opt(96, "episodes per iteration, over all families and processes")
    arms: int = opt(32, "arms simulated at once")
    sampler: str = opt("chain", "noisy denoising: chain (every step Gaussian with --sigma) or sde (Flow-SDE, one random step per chunk)")
    sigma: float = opt(0.12, "standard deviation of the chain's first step, falling in proportion to flow time; normalised action units")
    sde_level: float = opt(0.5, "a, noise level of Flow-SDE")
    epochs: int = opt(2, "passes over the rollouts per iteration")
    minibatch: int = opt(256, "chunks per gradient step, over all processes")
    lr: float = opt(3e-4, "AdamW learning rate of adapter and expert, decaying to a tenth along a cosine")
    critic_lr: float = opt(1e-3, "AdamW learning rate of the value model")
    critic_warmup: int = opt(3, "iterations in which only the value model learns")
    gamma: float = opt(0.99, "discount per chunk")
    lam: float = opt(0.95, "lambda of GAE")
    clip: float = opt(0.2, "PPO clip of the probability ratio")
    target_kl: float = opt(0.02, "end an iteration's update when the policy has moved this far")
    grad_clip: float = opt(1.0, "gradient norm limit")
    ppo: bool = opt(True, "false: imitation of the expert samples alone, in as many updates of as many chunks")
    experts: str = opt("similar", "expert samples in every minibatch: similar (retrieved) | random | none")
    expert_weight: float = opt(0.1, "weight of the expert term")
    expert_form: str = opt("cfm", "cfm (flow-matching loss) | ratio (clipped ratio of it) | chain (likelihood of a noised path to the expert's chunk)")
    expert_advantage: str = opt("one", "one (the paper's 1.0) | gae (from the value model: the paper's failing control)")
    noise_samples: int = opt(1, "M, noise samples (eps, t) of every expert sample")
    neighbours: int = opt(4, "a decision draws one of its most similar expert frames")
    view_weights: str = opt("", "w_v of every camera in the similarity, with commas (default: 1 each)")
    index_frames: int = opt(10000, "expert frames that can be retrieved")
    decouple: str = opt("gradient", "intention decoupling in the expert term: gradient | random | attention | off")
    anchor: float = opt(0.0, "weight of the KL divergence from the starting policy, a baseline in place of experts")
    ema: float = opt(0.9, "decay per iteration of the weight average that is evaluated and saved")
    eval_every: int = opt(10, "iterations between evaluations without noise on validation seeds; the best is kept")
    eval_episodes: int = opt(50, "validation episodes per family in each of them")
    eval: int = opt(100, "report episodes per family and split for the tables before and after; 0 for none")
    seed: int = opt(0, "seed of scenes and noise")
    device: str = opt("auto", "auto (cuda, then mps, then cpu), cpu, cuda, mps")
    threads: int = opt(0, "CPU threads; 0 lets torch choose")

    def __post_init__(self):
        self.init_from, self.out = self.init_from or f"out/{self.config}", self.out or f"out/{self.config}_rl"
        choices = {"sampler": ("chain", "sde"), "experts": ("similar", "random", "none"), "expert_form": ("cfm", "ratio", "chain"),
                   "expert_advantage": ("one", "gae"), "decouple": ("gradient", "random", "attention", "off")}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("iterations", "episodes", "arms", "epochs", "minibatch", "noise_samples", "neighbours", "index_frames", "eval_every", "eval_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("sigma", "sde_level", "lr", "critic_lr", "clip", "target_kl", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be greater than 0")
        if self.seed < 0 or FIRST_SEED + (self.seed + 1) * self.iterations * self.episodes > len(sim_env.SEEDS["train"]):
            raise ValueError(f"--seed={self.seed} with {self.iterations} iterations of {self.episodes} episodes leaves the training seeds; choose less")
        try:
            [float(w) for w in self.view_weights.split(",") if self.view_weights]
        except ValueError:
            raise ValueError(f"view_weights must be numbers with commas between them, not {self.view_weights!r}") from None
        if not self.ppo and self.experts == "none":
            raise ValueError("--ppo=false needs expert samples to imitate; leave out --experts=none")


PRESETS = {
    "debug": dict(iterations=2, episodes=4, arms=2, epochs=2, minibatch=8, critic_warmup=1, index_frames=20, eval_every=1, eval_episodes=1, eval=0, families="place"),
    "tiny": dict(iterations=60),
    "small": dict(),
}
HARMLESS = {"config", "out", "resume", "init_from", "data", "device", "threads", "arms", "eval", "eval_every"}
FIRST_SEED = 600_000  # of the training range: no scene of the data set is practised on


# ---------------------------------------------------------------------------------------------------------------
# The denoising chain as a Markov chain with Gaussian steps


def timesteps(K, device=None):
    """Flow times at which the K steps begin, from noise to data: (K,)."""
    return torch.linspace(1, 1 / K, K, device=device)


def step(x, v, t, d, cfg):
    """One noisy step from time t to t - d -> mean (like x) and standard deviation (broadcasts with x), both fp32.

    chain: the Euler step of the sampler plus noise of a fixed spread sigma t (Flow-Noise without a noise network). What comes in
    early is denoised: about a fifth of it arrives, as one coherent motion of the whole chunk, which is what exploration needs. What
    comes in last reaches the motors as jitter, so there is less of it. sde: Flow-SDE (Flow-GRPO, arXiv 2505.05470), sigma_t =
    a sqrt(t / (1 - t)), which keeps the marginals of the ODE as d -> 0. x, v (..., H, A), t (..., 1, 1).
    """
    x, v = x.float(), v.float()
    if cfg.sampler == "chain":
        return x - d * v, cfg.sigma * t
    variance = cfg.sde_level**2 * t / (1 - t.clamp(max=1 - d))  # at t = 1 the next time stands in the denominator
    mean = (x - t * v) * (1 - t + d) + (x + (1 - t) * v) * (t - d - variance * d / (2 * t))
    return mean, (variance * d).sqrt()


def gaussian_logp(x, mean, std):
    """Log density of N(mean, std^2), per element."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


@torch.no_grad()
def sample_chain(policy, states, state, noise, noisy, cfg):
    """Walk the chain: states (B, Q, D), state (B, S) normalised, noise (B, K+1, H, A), noisy (B, m) indices of the noisy steps.

    -> chain (B, K+1, H, A), the first from noise at the policy's temperature, the last the chunk (normalised).
    """
    K = policy.cfg.denoise_steps
    times = timesteps(K, noise.device)
    modulation = policy.expert.modulation(times[:, None])
    keys_values = policy.expert.condition(policy.adapter(states))
    chain = [policy.cfg.temperature * noise[:, 0]]
    for k in range(K):
        x = chain[-1]
        v = policy.expert(x[:, None], [m[k : k + 1] for m in modulation], state, keys_values)[:, 0]  # (B, H, A)
        mean, std = step(x, v, times[k].view(1, 1, 1), 1 / K, cfg)
        here = (noisy == k).any(1)[:, None, None]  # (B, 1, 1)
        chain.append(torch.where(here, mean + std * noise[:, k + 1], x - v / K))
    return torch.stack(chain, dim=1)


def chain_logp(policy, b, cfg):
    """Log-probability of the noisy steps of rollouts, a mean over these steps, executed control steps and joints.

    b: states (B, Q, D), state (B, S), chain (B, K+1, H, A), noisy (B, m), executed (B, H) -> (B,) fp32, and the steps' means
    (B, m, H, A) and standard deviations (B or 1, m, 1, 1).
    """
    K = b["chain"].shape[1] - 1
    rows, t = torch.arange(len(b["chain"]), device=b["chain"].device)[:, None], timesteps(K, b["chain"].device)[b["noisy"]]  # (B, m)
    x, following = b["chain"][rows, b["noisy"]], b["chain"][rows, b["noisy"] + 1]  # (B, m, H, A)
    modulation = policy.expert.modulation(t[:1] if t.shape[1] == K else t)  # all steps in order: the same for every row
    v = policy.expert(x, modulation, b["state"], policy.expert.condition(policy.adapter(b["states"])))
    mean, std = step(x, v, t[..., None, None], 1 / K, cfg)
    logp = gaussian_logp(following, mean, std).mean(-1)  # (B, m, H)
    weight = b["executed"][:, None].float()
    return (logp * weight).sum((1, 2)) / (weight.sum((1, 2)) * logp.shape[1]), mean, std


# ---------------------------------------------------------------------------------------------------------------
# Values and advantages


class Critic(nn.Module):
    """V(o): a separate model on the frozen feature query states and the joint state (pi_RL: after the VLM beats after the expert)."""

    def __init__(self, cfg):
        super().__init__()
        sizes = (cfg.queries * cfg.width + cfg.action_dim, 512, 256, 128)
        layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(128, 1))
        nn.init.normal_(self.net[-1].weight, std=0.02)

    def forward(self, states, state):
        """states (B, Q, D), state (B, S) normalised -> (B,)."""
        return self.net(torch.cat((states.flatten(1), state), dim=1))[:, 0]


def gae(rewards, values, last_value, gamma, lam):
    """Generalised advantage estimation over the chunks of one episode: rewards, values (T,) -> advantages (T,).

    last_value: 0 where the episode ended by itself, V(final observation) where the time limit cut it off.
    """
    advantages, running, following = np.zeros(len(rewards), np.float32), 0.0, last_value
    for i in reversed(range(len(rewards))):
        running = rewards[i] + gamma * following - values[i] + gamma * lam * running
        advantages[i], following = running, values[i]
    return advantages


# ---------------------------------------------------------------------------------------------------------------
# Rollouts


@torch.inference_mode()
def observe(policy, obs):
    """What the frozen VLM makes of observations, once: feature query states (B, Q, D), normalised joint state (B, S), and the
    image encoder's tokens of every view (B, V, E) for the retrieval."""
    views = [sim_env.CAMERAS.index(camera) for camera in policy.cfg.cameras.split(",")]
    images, state = policy.check_inputs(obs["images"][:, views], obs["state"], obs["task"])
    visual = policy.vlm.see(images)  # (B, P, D)
    prompts = [policy.tokenizer.prompt(task, policy.cfg.reasoning) for task in obs["task"]]
    limit = policy.cfg.max_thought if policy.cfg.reasoning else 0
    _, states = policy.vlm.generate(visual, prompts, policy.tokenizer.end_thought, limit, with_queries=True)
    return states, policy.normalise(state, "state"), visual.view(len(visual), policy.cfg.views, -1)


def play(policy, jobs, vec, cfg, clock):
    """Whole episodes with the noisy chain, one per job (seed, family); arms that finish take the next job.

    -> list of episodes: {"seed", "family", "success", "steps", "final": (states, state) or None, and per chunk lists "states",
    "state", "views", "chain", "noisy", "executed", "reward"}. Noise is a function of the episode's seed and the control step.
    """
    K, H, A, execute = policy.cfg.denoise_steps, policy.cfg.chunk, policy.cfg.action_dim, policy.cfg.execute
    device = policy.vlm.queries.device
    episodes, waiting, running = [], list(jobs), {}  # running: arm -> its episode
    bar = tqdm(total=len(jobs), desc="rollouts", unit="episode", leave=False, disable=not sys.stderr.isatty())
    while waiting or running:
        free = [arm for arm in range(vec.n) if arm not in running][: len(waiting)]
        if free:
            for arm in free:
                seed, family = waiting.pop(0)
                running[arm] = {"seed": seed, "family": family, "final": None} | {k: [] for k in ("states", "state", "views", "chain", "noisy", "executed", "reward")}
                episodes.append(running[arm])
            vec.reset([running[arm]["seed"] for arm in free], [running[arm]["family"] for arm in free], "id", free)
            clock.mark("simulation")
        busy = sorted(running)
        states, state, views = observe(policy, vec.observations(busy))
        clock.mark("VLM")
        rngs = [np.random.default_rng([cfg.seed, running[arm]["seed"], len(running[arm]["reward"])]) for arm in busy]
        noise = torch.from_numpy(np.stack([r.standard_normal((K + 1, H, A), dtype=np.float32) for r in rngs])).to(device)
        noisy = torch.tensor([range(K) if cfg.sampler == "chain" else [r.integers(K)] for r in rngs], device=device)  # (B, m)
        chain = sample_chain(policy, states, state, noise, noisy, cfg)
        chunk = policy.denormalise(chain[:, -1].clamp(-1.5, 1.5)).cpu().numpy()  # (B, H, A)
        clock.mark("expert")
        actions = np.zeros((vec.n, execute, A))
        actions[busy] = chunk[:, :execute]
        _, reward, terminated, truncated, infos = vec.step_chunk(actions)
        clock.mark("simulation")
        for row, arm in enumerate(busy):
            episode = running[arm]
            executed = np.arange(H) < infos[arm]["executed"]
            values = {"states": states[row], "state": state[row], "views": views[row], "chain": chain[row], "noisy": noisy[row],
                      "executed": torch.from_numpy(executed), "reward": float(reward[arm])}  # fmt: skip
            for name, value in values.items():
                episode[name].append(value.cpu() if torch.is_tensor(value) else value)
        ended = [arm for arm in busy if terminated[arm] or truncated[arm]]
        cut = [arm for arm in ended if truncated[arm]]
        if cut:
            for arm, *last in zip(cut, *observe(policy, vec.observations(cut))[:2]):
                running[arm]["final"] = [x.cpu() for x in last]
            clock.mark("VLM")
        for arm in ended:
            episode = running.pop(arm)
            episode["success"], episode["steps"] = bool(terminated[arm]), infos[arm]["steps"]
            bar.update()
    bar.close()
    return episodes


def to_batch(episodes, critic, cfg, device):
    """Episodes of an iteration -> one batch over all chunks (n, ...), with old values, advantages and returns."""
    b = {name: torch.stack([x for e in episodes for x in e[name]]).to(device) for name in ("states", "state", "chain", "noisy", "executed")}
    with torch.no_grad():
        values = critic(b["states"], b["state"]).cpu().numpy()
        advantages, at = [], 0
        for e in episodes:
            n = len(e["reward"])
            last = critic(*[x[None].to(device) for x in e["final"]]).item() if e["final"] else 0.0
            advantages.append(gae(e["reward"], values[at : at + n], last, cfg.gamma, cfg.lam))
            at += n
    b["advantage"] = torch.from_numpy(np.concatenate(advantages)).to(device)
    b["value"] = torch.from_numpy(values).to(device)
    b["return"] = b["advantage"] + b["value"]
    return b


# ---------------------------------------------------------------------------------------------------------------
# Expert samples


class Experts:
    """Demonstrations as a source of imitation samples: retrieved by similarity of images, or drawn at random."""

    def __init__(self, policy, cfg, families, device):
        self.policy, self.cfg, self.device = policy, cfg, device
        self.episodes = Episodes(cfg.data, policy.cfg, families)
        self.states = {}  # frame -> feature query states: the VLM is frozen, so once is enough
        weights = torch.tensor([float(w) for w in cfg.view_weights.split(",")] if cfg.view_weights else [1.0] * policy.cfg.views)
        if len(weights) != policy.cfg.views:
            raise ValueError(f"view_weights {cfg.view_weights} must be one number for each of the cameras {policy.cfg.cameras}")
        made_of = hashlib.sha256(f"{policy.cfg.cameras} {families} {cfg.index_frames}".encode())
        for parameter in policy.vlm.vision.state_dict().values():
            made_of.update(parameter.float().cpu().numpy().tobytes())
        path = Path(cfg.data, f"similarity_{made_of.hexdigest()[:12]}.safetensors")
        self.index = Neighbours.build(path, self.episodes, self.embed, cfg.index_frames, weights)

    @torch.inference_mode()
    def embed(self, images):
        """(B, V, px, px, 3) uint8 -> tokens of the frozen image encoder, (B, V, E)."""
        return self.policy.vlm.see(images.to(self.device)).view(len(images), images.shape[1], -1).cpu()

    def retrieve(self, views, families, rng):
        """An expert frame for every decision: views (n, V, E), n families -> frames (n,), similarity (n,)."""
        if self.cfg.experts == "random":
            return self.index.random(views, rng)
        return self.index.nearest(views, families, self.cfg.neighbours, rng)

    @torch.inference_mode()
    def batch(self, frames):
        """Frames -> {"states", "state", "actions", "valid"}: what the flow loss takes, states from the teacher's own thought."""
        policy, samples = self.policy, self.episodes.samples(self.policy.tokenizer, frames)
        missing = [i for i, frame in enumerate(frames) if frame not in self.states]
        for i in range(0, len(missing), 64):
            part = missing[i : i + 64]
            tokens, segments, positions = (samples[k][part].to(self.device) for k in ("tokens", "segments", "positions"))
            _, states = policy.vlm(policy.vlm.see(samples["images"][part].to(self.device)), tokens, segments, positions, True)
            self.states |= {frames[row]: h for row, h in zip(part, states.cpu())}
        return {"states": torch.stack([self.states[frame] for frame in frames]).to(self.device),
                "state": policy.normalise(samples["state"].to(self.device), "state"),
                "actions": policy.normalise(samples["actions"].to(self.device), "action"), "valid": samples["valid"].to(self.device)}  # fmt: skip

    def chunks_left(self, frames):
        """How many more decisions each demonstration took from these frames to its end: (n,)."""
        ends = [self.episodes.episodes[self.episodes.episode_of[i]] for i in frames]
        steps = np.array([e["start"] + e["length"] - self.episodes.frames[i] for e, i in zip(ends, frames)])
        return np.ceil(steps / self.policy.cfg.execute)


def expert_loss(policy, e):
    """Flow-matching loss of every expert sample under intention decoupling -> (B,).

    e: states (B, Q, D), state (B, S), actions (B, H, A), valid (B, H), eps (B, M, H, A), t (B, M), uniform (B, Q).
    """
    flow = [e[k] for k in ("state", "actions", "valid", "eps", "t")]
    states = e["states"]
    if policy.cfg.decouple != "off":
        states = states * policy.keep_mask(states, *flow, e["uniform"])[..., None]
    return policy.flow_loss(states, *flow).mean(1)


def bridge(actions, noise, K, cfg):
    """A noisy path from noise to the expert's chunk: the chain with the conditional velocity (x - a) / t in the network's place.

    actions (B, H, A), noise (B, K+1, H, A) -> chain (B, K+1, H, A). Its expected log-probability under the policy's chain is a
    constant minus the flow-matching loss, weighted d^2 / (2 sigma^2 t^2) for `chain` and, for `sde`, by
    d (1 + a^2/2)^2 / (2 a^2) (1 - t) / t.
    """
    path = [noise[:, 0]]
    for k, t in enumerate(timesteps(K, actions.device)):
        mean, std = step(path[-1], (path[-1] - actions) / t, t.view(1, 1, 1), 1 / K, cfg)
        path.append(mean + std * noise[:, k + 1])
    return torch.stack(path, dim=1)


# ---------------------------------------------------------------------------------------------------------------
# Update


def ppo_loss(logp, old, advantage, clip):
    """Clipped surrogate -> losses (B,), ratios (B,)."""
    ratio = (logp - old).clamp(-20, 20).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage), ratio


def rows_of(b, rows):
    return {name: x[rows] for name, x in b.items()}


def expert_samples(policy, experts, episodes, cfg, iteration):
    """One expert sample for every chunk of the rollouts, with its noise -> batch dict (n, ...), similarity (n,), frames (n,)."""
    rng, device = np.random.default_rng([cfg.seed, iteration, 1]), policy.vlm.queries.device
    views, families = torch.stack([x for e in episodes for x in e["views"]]), [e["family"] for e in episodes for _ in e["views"]]
    frames, similarity = experts.retrieve(views, families, rng)
    e = experts.batch(frames)
    n, M, K, H, A = len(frames), cfg.noise_samples, policy.cfg.denoise_steps, policy.cfg.chunk, policy.cfg.action_dim
    drawn = {"t": flow_times(rng, (n, M)), "eps": rng.standard_normal((n, M, H, A)), "uniform": rng.random((n, policy.cfg.queries)), "path": rng.standard_normal((n, K + 1, H, A))}
    e |= {k: torch.as_tensor(v, dtype=torch.float32, device=device) for k, v in drawn.items()}
    e["left"] = torch.as_tensor(experts.chunks_left(frames), dtype=torch.float32, device=device)
    return e, similarity, frames


def expert_term(policy, critic, e, scale, cfg):
    """The expert samples' part of the loss: advantage times likelihood, in one of three forms. -> scalar.

    scale: mean and standard deviation of the rollouts' advantages; used by the GAE control alone.
    """
    advantage = torch.ones_like(e["left"])
    if cfg.expert_advantage == "gae":  # lambda = 1: the demonstration's discounted return minus the value model's guess
        with torch.no_grad():
            advantage = (cfg.gamma ** (e["left"] - 1) - critic(e["states"], e["state"]) - scale[0]) / scale[1]
    if cfg.expert_form == "cfm":
        return (advantage * expert_loss(policy, e)).mean()
    K = policy.cfg.denoise_steps
    if cfg.expert_form == "chain":
        steps = torch.arange(K, device=e["left"].device).expand(len(e["left"]), K)
        path = {"chain": bridge(e["actions"], e["path"], K, cfg), "noisy": steps, "executed": e["valid"], "states": e["states"], "state": e["state"]}
        return -(advantage * chain_logp(policy, path, cfg)[0]).mean()
    beta = (1 / (K * cfg.sigma * timesteps(K))).square().mean().item() / 2 if cfg.sampler == "chain" else 1.0  # to log-probability; or FPO's
    ratio = (beta * (e["old"] - expert_loss(policy, e))).clamp(-3, 3).exp()
    return ppo_loss(ratio.log(), torch.zeros_like(ratio), advantage, cfg.clip)[0].mean()


def update(policy, start, learner, b, e, optimizer, cfg, iteration, rank=0, world=1):
    """One iteration's update on rollouts b and expert samples e (None: without) -> {name: number}. Raises FloatingPointError.

    Every process holds all chunks and takes its rows of every minibatch; gradients are averaged, so that the result does not
    depend on the number of processes. start: the starting policy, for --anchor, or None. learner: adapter, expert, critic.
    """
    n, moving, critic = len(b["advantage"]), iteration >= cfg.critic_warmup, learner["critic"]
    scale = b["advantage"].mean(), b["advantage"].std().clamp(min=1e-6)
    b = b | {"advantage": (b["advantage"] - scale[0]) / scale[1]}
    pieces = [slice(i, i + cfg.minibatch) for i in range(0, n, cfg.minibatch)]
    with torch.no_grad():  # by the function that the update uses, not remembered from the rollout: ratios start at exactly 1
        b["old"] = torch.cat([chain_logp(policy, rows_of(b, piece), cfg)[0] for piece in pieces])
        if start is not None:
            b["start"] = torch.cat([chain_logp(start, rows_of(b, piece), cfg)[1] for piece in pieces])
    if e is not None and cfg.expert_form == "ratio":
        e = e | {"old": torch.cat([expert_loss(policy, rows_of(e, piece)).detach() for piece in pieces])}
    sums, updates, rng = defaultdict(float), 0, np.random.default_rng([cfg.seed, iteration, 2])
    for _ in range(cfg.epochs):
        for rows in np.array_split(rng.permutation(n), math.ceil(n / cfg.minibatch)):
            mine = rows[rank::world]
            share = len(mine) * world / len(rows)  # makes the mean over processes the mean over rows
            part = rows_of(b, mine)
            logs = {"value_loss": F.mse_loss(critic(part["states"], part["state"]), part["return"])}
            loss = logs["value_loss"]
            if moving:
                logp, mean, std = chain_logp(policy, part, cfg)
                losses, ratio = ppo_loss(logp, part["old"], part["advantage"], cfg.clip)
                logs |= {"kl": (ratio - 1 - ratio.log()).mean(), "clipped": ((ratio - 1).abs() > cfg.clip).float().mean()}
                if cfg.ppo:
                    loss = loss + losses.mean()
                if e is not None:
                    logs["expert_loss"] = expert_term(policy, critic, rows_of(e, mine), scale, cfg)
                    loss = loss + cfg.expert_weight * logs["expert_loss"]
                if start is not None:  # KL divergence between Gaussian steps of equal spread
                    logs["anchor"] = 0.5 * ((mean - part["start"]) / std).square().mean()
                    loss = loss + cfg.anchor * logs["anchor"]
            (loss * share).backward()
            numbers = share * torch.stack([v.detach() for v in logs.values()])
            if world > 1:
                average_gradients(learner, world)
                dist.all_reduce(numbers)
                numbers /= world
            norms = [nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], cfg.grad_clip)
                     for modules in ((learner["adapter"], learner["expert"]), (critic,))]  # fmt: skip
            numbers = dict(zip(logs, numbers.tolist())) | {"gnorm": norms[0].item(), "critic_gnorm": norms[1].item()}
            if not all(math.isfinite(v) for v in numbers.values()):
                raise FloatingPointError(f"non-finite number in iteration {iteration}: {numbers}; lower --lr, then --resume")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            updates += 1
            for k, v in numbers.items():
                sums[k] += v
        if cfg.ppo and sums.get("kl", 0) / updates > cfg.target_kl:  # the same decision on every process
            break
    explained = 1 - (b["return"] - b["value"]).var() / b["return"].var().clamp(min=1e-8)
    return {k: v / updates for k, v in sums.items()} | {"updates": updates, "explained": explained.item()}


# ---------------------------------------------------------------------------------------------------------------
# The run


def jobs_of(cfg, families, iteration):
    """Scenes of one iteration [(seed, family), ...], none practised twice, the longest episodes first so that no arm waits for them."""
    first = FIRST_SEED + (cfg.seed * cfg.iterations + iteration) * cfg.episodes
    jobs = [(first + i, families[i % len(families)]) for i in range(cfg.episodes)]
    return sorted(jobs, key=lambda job: -sim_env.LIMIT[job[1]])


def validate(policy, ema, families, cfg):
    """Success without noise on validation seeds -> {family: rate}."""
    seeds = sim_env.SEEDS["val"][50_000 : 50_000 + cfg.eval_episodes]
    with averaged_weights(policy, ema):
        runs = {f: sim_env.rollout(sim_env.driver(policy), seeds, f, "id", cfg.arms, policy.cfg.image_size, name=f"validation, {f}") for f in families}
    return {family: float(np.mean([e["success"] for e in episodes])) for family, episodes in runs.items()}


def main(argv=None):
    explain_errors(practise, parse_config(RLConfig, PRESETS, sys.argv[1:] if argv is None else argv))


def practise(cfg):
    """The whole run."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *a, **k: None
    fast_cpu(cfg.threads)
    device, *_ = choose_device(cfg.device)
    out = Path(cfg.out)
    if (out / "train_state.pt").is_file() != cfg.resume:
        raise ValueError(f"nothing to resume in {out}; leave --resume out" if cfg.resume else f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    began_with = read_checkpoint_config(cfg.init_from)
    cfg.data, cfg.families = cfg.data or began_with.get("data", ""), cfg.families or began_with.get("families", "place")
    families = cfg.families.split(",")
    if unknown := [f for f in families if f not in sim_env.LIMIT]:
        raise ValueError(f"{', '.join(unknown)} is no family of the simulation; set --families to some of {', '.join(sim_env.LIMIT)}")
    if cfg.resume:
        check_resume(cfg, read_checkpoint_config(out).get("rl", {}), HARMLESS, (), say)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    policy = SyVLA.load(cfg.init_from, Tokenizer.load(cfg.init_from), device)
    if not torch.isfinite(policy.state_low).all():
        raise ValueError(f"{cfg.init_from} has no normalisation statistics; choose a checkpoint that train.py wrote")
    policy.cfg.decouple = cfg.decouple
    policy.requires_grad_(False)
    start = copy.deepcopy(policy) if cfg.anchor else None
    torch.manual_seed(cfg.seed)
    learner = nn.ModuleDict({"adapter": policy.adapter, "expert": policy.expert, "critic": Critic(policy.cfg).to(device)}).requires_grad_(True)
    moving = [p for name, p in learner.named_parameters() if not name.startswith("critic")]
    optimizer = torch.optim.AdamW([{"params": moving}, {"params": learner["critic"].parameters()}], betas=(0.9, 0.95), weight_decay=0.0)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in trained.items()}
    first, best = 0, -1.0
    if cfg.resume:
        saved = torch.load(out / "train_state.pt", map_location=device, weights_only=True)
        learner.load_state_dict(saved["learner"])
        optimizer.load_state_dict(saved["optimizer"])
        first, best, ema = saved["iteration"], saved["best"], saved["ema"]
    experts = Experts(policy, cfg, families, device) if cfg.experts != "none" else None
    say(" ".join(f"{k}={v}" for k, v in asdict(cfg).items()))
    say(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {world} process(es); {sum(p.numel() for p in moving):,} parameters learn, {sum(p.numel() for p in learner['critic'].parameters()):,} judge")
    out.mkdir(parents=True, exist_ok=True)
    settings = asdict(policy.cfg) | {"data": cfg.data, "families": cfg.families, "rl": asdict(cfg)}

    def keep(iteration):
        state = {"iteration": iteration, "best": best, "learner": learner.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}
        write_atomically(out / "train_state.pt", lambda path: torch.save(state, path))

    if rank == 0 and cfg.resume:
        trim_log(out / "log.jsonl", "iteration", first)
    elif rank == 0:
        if cfg.eval:
            say("before:")
            report(policy, families, cfg, out / "eval_before.json", say)
        before = validate(policy, ema, families, cfg)
        best = float(np.mean(list(before.values())))
        save_policy(out, policy, settings)
        say("validation before: " + " ".join(f"{family} {rate:.2f}" for family, rate in before.items()))
    arms = min(cfg.arms, math.ceil(cfg.episodes / world))
    bar = tqdm(range(first, cfg.iterations), initial=first, total=cfg.iterations, unit="iteration", disable=rank > 0 or not sys.stderr.isatty())
    with sim_env.VecEnv(arms, os.cpu_count() // world or 1, px=policy.cfg.image_size) as vec:
        for iteration in bar:
            factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * iteration / cfg.iterations))
            for group, lr in zip(optimizer.param_groups, (cfg.lr, cfg.critic_lr)):
                group["lr"] = lr * factor
            clock, began = Stopwatch(device), time.time()
            episodes = play(policy, jobs_of(cfg, families, iteration)[rank::world], vec, cfg, clock)
            if world > 1:
                gathered = [None] * world
                dist.all_gather_object(gathered, episodes)
                episodes = [e for part in gathered for e in part]
            b = to_batch(episodes, learner["critic"], cfg, device)
            e, line = None, {"iteration": iteration + 1}
            if experts:
                e, similarity, frames = expert_samples(policy, experts, episodes, cfg, iteration)
                line |= {"similarity": float(similarity.mean()), "expert_frames": len(set(frames.tolist()))}
            clock.mark("retrieval")
            try:
                line |= update(policy, start, learner, b, e, optimizer, cfg, iteration, rank, world)
            except FloatingPointError:
                if rank == 0:
                    keep(iteration)
                raise
            clock.mark("update")
            for name, average in ema.items():
                average.lerp_(trained[name].detach(), 1 - cfg.ema)
            steps, seconds = sum(e["steps"] for e in episodes), time.time() - began
            line |= {f"success {f}": float(np.mean([e["success"] for e in episodes if e["family"] == f])) for f in families}
            line |= {"return": b["return"].mean().item(), "chunks": len(b["return"]), "steps_per_s": steps / sum(v for k, v in clock.seconds.items() if k not in ("update", "retrieval")),
                     "seconds": seconds, "time": dict(clock.seconds)}  # fmt: skip
            if (iteration + 1) % cfg.eval_every == 0 or iteration + 1 == cfg.iterations:
                if rank == 0:
                    line["validation"] = validate(policy, ema, families, cfg)
                    mean = float(np.mean(list(line["validation"].values())))
                    if mean > best:
                        best = mean
                        save_policy(out, policy, settings, policy.state_dict() | ema)
                if world > 1:
                    dist.barrier()
            if rank == 0:
                with open(out / "log.jsonl", "a") as f:
                    f.write(json.dumps(line) + "\n")
                keep(iteration + 1)
                bar.clear()
                say(describe(line, families, cfg), flush=True)
    untouched = SyVLA.load(cfg.init_from, policy.tokenizer, device).vlm.state_dict()
    assert all(torch.equal(x, untouched[name]) for name, x in policy.vlm.state_dict().items())
    say(f"practised {cfg.iterations - first} iterations; the VLM is the same bit for bit, so its answers are")
    if rank == 0:
        plot(out, say)
        if cfg.eval:
            say("after:")
            report(SyVLA.load(out, policy.tokenizer, device), families, cfg, out / "eval.json", say)


def report(policy, families, cfg, path, say):
    """Closed-loop success on held-out report seeds: a JSON file and the printed table."""
    results = sim_env.evaluate(policy, families, cfg.eval)
    write_atomically(path, lambda p: p.write_text(json.dumps(results, indent=1)))
    say(sim_env.table(results))


def describe(line, families, cfg):
    """The log line that a person reads."""
    total = sum(line["time"].values())
    noisy = " ".join(f"{line[f'success {f}']:.2f}" for f in families)
    parts = [f"iteration {line['iteration']}/{cfg.iterations}", f"noisy success {noisy}", f"return {line['return']:.3f}", f"value explains {line['explained']:.2f}"]
    if "kl" in line:
        parts += [f"kl {line['kl']:.4f}", f"clipped {line['clipped']:.2f}", f"gnorm {line['gnorm']:.2f}"]
    if "similarity" in line:
        parts += [f"similarity {line['similarity']:.3f} ({line['expert_frames']} frames)"]
    parts += [f"{line['steps_per_s']:.0f} steps/s", f"{line['seconds']:.1f} s: " + " ".join(f"{k} {v / total:.0%}" for k, v in line["time"].items())]
    if "validation" in line:
        parts += ["validation without noise " + " ".join(f"{v:.2f}" for v in line["validation"].values())]
    return " | ".join(parts)


def plot(out, say):
    """curves.png: success of rollouts and of validation, KL and gradient norm over iterations."""
    try:
        import matplotlib
    except ImportError:
        say("for a picture of the curves: pip install matplotlib, then run the same command with --resume")
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
    at = [line["iteration"] for line in lines]
    for name in [k for k in lines[0] if k.startswith("success ")]:
        (drawn,) = axes[0].plot(at, [line[name] for line in lines], alpha=0.4)
        checked = [line for line in lines if "validation" in line]
        axes[0].plot([line["iteration"] for line in checked], [line["validation"][name.removeprefix("success ")] for line in checked], color=drawn.get_color(), label=name.removeprefix("success "))
    for axis, name in ((axes[1], "kl"), (axes[2], "gnorm")):
        axis.plot(at, [line.get(name, math.nan) for line in lines])
        axis.set_title(name)
    axes[0].set_title("success: noisy rollouts (pale), validation without noise")
    axes[0].legend()
    for axis in axes:
        axis.set_xlabel("iteration")
    figure.tight_layout()
    figure.savefig(out / "curves.png")
    say(f"wrote {out / 'curves.png'}")


if __name__ == "__main__":
    main()
