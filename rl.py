"""Reinforcement learning: similar-sample guided PPO on the flow policy, SyVLA's third stage.

    python rl.py --config small --init_from=out/small                     # roll out, retrieve, update; table before and after
    python rl.py --config small --init_from=out/small --resume            # go on after a kill
    python rl.py --config small --init_from=out/small --experts=none --out=out/no_experts      # plain PPO
    python rl.py --config small --env=real --port=/dev/ttyACM0 --front=0 --wrist=2 --task="put the red cube on the blue pad" --eval=0 --eval_episodes=0

Every iteration: many simulated arms play whole episodes with a noisy denoising chain, whose Gaussian steps have a likelihood
(`step`). Every decision looks up one of the expert frames most like what it saw. PPO moves the adapter and the expert;
the expert samples join each minibatch with their advantage fixed at 1.0, outside GAE, outside normalisation, outside the
value loss. The VLM is frozen: what it made of an observation (the feature query states) is computed once and kept.

Paper: SyVLA, arXiv 2606.09009, section on reinforcement learning; what it leaves open follows pi_RL (arXiv 2510.25889).
"""

import copy
import json
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm
import real_env
import sim_env
from data import Episodes, Neighbours, Tokenizer, flow_times
from model import SyVLA, fast_cpu, opt, parse_config, read_checkpoint_config
from train import (
    Stopwatch,
    average_gradients,
    averaged_weights,
    check_resume,
    choose_device,
    explain_errors,
    save_policy,
    trim_log,
    write_atomically,
)


# ---------------------------------------------------------------------------------------------------------------
# Retrieval


class Neighbours:
    """Recorded frames by similarity of what the cameras saw: sum_v w_v cos(E(o_v), E(x_v)) (SyVLA), one matrix product per batch.

    keys (N, V, E): what an image encoder E makes of every frame's views; families: N names; weights (V,): w_v.
    """

    def __init__(self, keys, families, weights):
        self.keys, self.families, self.weights = (
            F.normalize(keys.float(), dim=-1).flatten(1),
            np.asarray(families),
            weights,
        )

    def queries(self, tokens):
        """Embeddings (n, V, E) -> (n, V * E), whose inner products with keys are the weighted sums of cosines."""
        return (F.normalize(tokens.float(), dim=-1) * self.weights[:, None]).flatten(1)

    def random(self, tokens, uniform):
        """Any frame for every embedding (n, V, E), drawn by uniform (n,) -> rows (n,), similarity (n,): the control for nearest()."""
        rows = torch.from_numpy((uniform * len(self.keys)).astype(np.int64))
        return rows, (self.queries(tokens) * self.keys[rows]).sum(1)

    def nearest(self, tokens, families, k, uniform):
        """For every embedding (n, V, E) one of the k most similar frames of its family, drawn by uniform (n,) -> rows (n,), similarity (n,)."""
        k = min(k, *(int((self.families == family).sum()) for family in set(families)))
        if k == 0:
            raise ValueError(
                f"no frame of family {', '.join(sorted(set(families) - set(self.families)))} can be retrieved; raise --index_frames"
            )
        similarity = self.queries(tokens) @ self.keys.T  # (n, N)
        other = np.asarray(families)[:, None] != self.families[None]
        best, rows = similarity.masked_fill_(torch.from_numpy(other), -math.inf).topk(k, dim=1)  # (n, k)
        column = torch.from_numpy((uniform * k).astype(np.int64))[:, None]  # (n, 1)
        return rows.gather(1, column)[:, 0], best.gather(1, column)[:, 0]


@dataclass
class RLConfig:
    config: str = opt("small", "preset")
    init_from: str = opt("", "checkpoint folder of the policy to improve (default out/<config>)")
    data: str = opt("", "data set that expert samples come from (default: the one the policy was trained on)")
    out: str = opt("", "run folder (default out/<config>_rl)")
    resume: bool = opt(False, "go on with the run in --out")
    env: str = opt(
        "",
        "sim; real: an SO-100 or SO-101 and a person who judges; or package.module:Class (default: as trained for)",
    )
    port: str = opt("", "real: serial port of the arm (lerobot-find-port)")
    id: str = opt("", "real: LeRobot's robot id, whose calibration is used; not needed if there is only one")
    front: str = opt("", "real: front camera, number or path (lerobot-find-cameras opencv)")
    wrist: str = opt("", "real: wrist camera")
    task: str = opt("", "real: the instruction of every episode")
    families: str = opt(
        "", "task families to practise, with commas (default: those the policy was trained on)"
    )
    iterations: int = opt(50, "rounds of rollouts and update")
    episodes: int = opt(192, "episodes per iteration, over all families and processes")
    arms: int = opt(32, "arms simulated at once")
    sampler: str = opt(
        "chain", "noisy denoising: chain (Gaussian Euler steps of fixed --sigma) or sde (Flow-SDE)"
    )
    sigma: float = opt(0.04, "standard deviation of the chain's noisy steps; normalised action units")
    noisy: str = opt("last", "which denoising steps have noise: last | one (drawn for every chunk) | all")
    noise: str = opt(
        "chunk",
        "draws of a noisy step: chunk (one per joint, for the whole chunk) or step (one per joint and control step)",
    )
    sde_level: float = opt(0.5, "a, noise level of Flow-SDE")
    epochs: int = opt(1, "passes of the policy over the rollouts of an iteration")
    critic_epochs: int = opt(3, "passes of the value model over them")
    minibatch: int = opt(256, "chunks per gradient step, over all processes")
    lr: float = opt(3e-4, "AdamW learning rate of adapter and expert, decaying to a tenth along a cosine")
    critic_lr: float = opt(5e-4, "AdamW learning rate of the value model")
    critic_warmup: int = opt(2, "iterations in which only the value model learns")
    gamma: float = opt(0.9, "discount per chunk")
    lam: float = opt(0.5, "lambda of GAE, for the advantages")
    clip: float = opt(0.2, "PPO clip of the probability ratio")
    target_kl: float = opt(
        0.02, "the policy rests for the remainder of an iteration in which it has moved this far"
    )
    grad_clip: float = opt(1.0, "gradient norm limit")
    ppo: bool = opt(
        True, "false: imitation of the expert samples alone, in as many updates of as many chunks"
    )
    experts: str = opt("similar", "expert samples in every minibatch: similar (retrieved) | random | none")
    expert_weight: float = opt(10.0, "weight of the expert term")
    expert_form: str = opt(
        "cfm",
        "cfm (flow-matching loss) | ratio (clipped ratio of it) | chain (likelihood of a noised path to the expert's chunk)",
    )
    expert_advantage: str = opt(
        "one", "one (the paper's 1.0) | gae (from the value model: the paper's failing control)"
    )
    noise_samples: int = opt(2, "M, noise samples (eps, t) of every expert sample")
    neighbours: int = opt(4, "a decision draws one of its most similar expert frames")
    view_weights: str = opt("", "w_v of every camera in the similarity, with commas (default: 1 each)")
    index_frames: int = opt(6000, "expert frames that can be retrieved")
    decouple: str = opt(
        "gradient", "intention decoupling in the expert term: gradient | random | attention | off"
    )
    proximal: float = opt(
        0.5,
        "weight of the KL divergence from the policy that played, over the whole chunk and all denoising steps",
    )
    anchor: float = opt(
        0.0, "weight of the KL divergence from the starting policy, a baseline in place of experts"
    )
    ema: float = opt(0.9, "decay per iteration of the weight average that is evaluated and saved")
    eval_every: int = opt(
        10, "iterations between evaluations without noise on validation seeds; the best is kept"
    )
    eval_episodes: int = opt(
        150, "validation episodes per family in each of them; 0 for none, the last policy is kept"
    )
    eval: int = opt(100, "report episodes per family and split for the tables before and after; 0 for none")
    seed: int = opt(0, "seed of scenes and noise")
    device: str = opt("auto", "auto (cuda, then mps, then cpu), cpu, cuda, mps")
    threads: int = opt(0, "CPU threads; 0 lets torch choose")

    def __post_init__(self):
        self.init_from, self.out = self.init_from or f"out/{self.config}", self.out or f"out/{self.config}_rl"
        choices = {
            "sampler": ("chain", "sde"),
            "noisy": ("last", "one", "all"),
            "noise": ("chunk", "step"),
            "experts": ("similar", "random", "none"),
            "expert_form": ("cfm", "ratio", "chain"),
            "expert_advantage": ("one", "gae"),
            "decouple": ("gradient", "random", "attention", "off"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in (
            "iterations",
            "episodes",
            "arms",
            "epochs",
            "critic_epochs",
            "minibatch",
            "noise_samples",
            "neighbours",
            "index_frames",
            "eval_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("sigma", "sde_level", "lr", "critic_lr", "clip", "target_kl", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be greater than 0")
        if self.seed < 0 or FIRST_SEED + (self.seed + 1) * self.iterations * self.episodes > len(
            sim_env.SEEDS["train"]
        ):
            raise ValueError(
                f"--seed={self.seed} with {self.iterations} iterations of {self.episodes} episodes leaves the training seeds; choose less"
            )
        try:
            [float(w) for w in self.view_weights.split(",") if self.view_weights]
        except ValueError:
            raise ValueError(
                f"view_weights must be numbers with commas between them, not {self.view_weights!r}"
            ) from None
        if min(self.eval, self.eval_episodes) < 0:
            raise ValueError("eval and eval_episodes count episodes: 0 or more")
        if self.env == "real" and (self.eval or self.eval_episodes):
            raise ValueError(
                "practice on the real arm is judged episode by episode: add --eval=0 --eval_episodes=0, and try the policy with sample.py"
            )
        if not self.ppo and self.experts == "none":
            raise ValueError("--ppo=false needs expert samples to imitate; leave out --experts=none")


PRESETS = {
    "debug": dict(
        iterations=2,
        episodes=4,
        arms=2,
        epochs=2,
        minibatch=8,
        critic_warmup=1,
        index_frames=20,
        eval_every=1,
        eval_episodes=1,
        eval=0,
        families="place",
    ),
    **{name: {} for name in ("tiny", "small", "base256", "base", "paper")},
}
HARMLESS = {
    "config",
    "out",
    "resume",
    "init_from",
    "data",
    "device",
    "threads",
    "arms",
    "eval",
    "eval_every",
    "port",
    "id",
    "front",
    "wrist",
}
FIRST_SEED = 600_000  # of the training range: no scene of the data set is practised on


# ---------------------------------------------------------------------------------------------------------------
# The denoising chain as a Markov chain with Gaussian steps


def timesteps(K, device=None):
    """Flow times at which the K steps begin, from noise to data: (K,)."""
    return torch.linspace(1, 1 / K, K, device=device)


def step(x, v, t, d, cfg):
    """One noisy step from time t to t - d -> mean (like x) and standard deviation (broadcasts with x), both fp32.

    chain: the Euler step of the sampler plus noise of fixed spread sigma (Flow-Noise without a noise network). sde: Flow-SDE
    (Flow-GRPO, arXiv 2505.05470), sigma_t = a sqrt(t / (1 - t)), which keeps the marginals of the ODE as d -> 0.
    x, v (..., H, A), t (..., 1, 1).
    """
    x, v = x.float(), v.float()
    if cfg.sampler == "chain":
        return x - d * v, torch.full_like(t, cfg.sigma)
    variance = (
        cfg.sde_level**2 * t / (1 - t.clamp(max=1 - d))
    )  # at t = 1 the next time stands in the denominator
    mean = (x - t * v) * (1 - t + d) + (x + (1 - t) * v) * (t - d - variance * d / (2 * t))
    return mean, (variance * d).sqrt()


def gaussian_logp(x, mean, std):
    """Log density of N(mean, std^2), per element."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def draw(rng, K, H, A, cfg):
    """Noise of one chunk's chain, the starting noise first, (K+1, H, A) float32, and the indices of its noisy steps (m,)."""
    noise = rng.standard_normal((K + 1, H, A), dtype=np.float32)
    if cfg.noise == "chunk":
        noise[1:] = noise[1:, :1]
    return noise, np.array({"last": [K - 1], "one": [rng.integers(K)], "all": range(K)}[cfg.noisy])


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
        v = policy.expert(x[:, None], [m[k : k + 1] for m in modulation], state, keys_values)[
            :, 0
        ]  # (B, H, A)
        mean, std = step(x, v, times[k].view(1, 1, 1), 1 / K, cfg)
        here = (noisy == k).any(1)[:, None, None]  # (B, 1, 1)
        chain.append(torch.where(here, mean + std * noise[:, k + 1], x - v / K))
    return torch.stack(chain, dim=1)


def chain_logp(policy, b, cfg):
    """Log-probability of the noisy steps of rollouts, a mean over these steps, executed control steps and joints.

    Where one draw moves the whole chunk (--noise=chunk), what was drawn is the mean displacement of the executed control steps,
    so the density is that of this mean: 6 numbers of a chunk speak in the gradient instead of 48, all of which exploration has tried.

    b: states (B, Q, D), state (B, S), chain (B, K+1, H, A), noisy (B, m), executed (B, H), and optionally other (B, o), further
    steps to walk, without a say in the likelihood. -> (B,) fp32, and the steps' means (B, m+o, H, A) and standard deviations (B or 1, m+o, 1, 1).
    """
    K, m = b["chain"].shape[1] - 1, b["noisy"].shape[1]
    steps = torch.cat((b["noisy"], b["other"]), dim=1) if "other" in b else b["noisy"]  # (B, m+o)
    rows, t = (
        torch.arange(len(b["chain"]), device=b["chain"].device)[:, None],
        timesteps(K, b["chain"].device)[steps],
    )  # (B, m+o)
    x, following = b["chain"][rows, steps], b["chain"][rows, steps + 1]  # (B, m+o, H, A)
    modulation = policy.expert.modulation(
        t[:1] if (t == t[:1]).all() else t
    )  # the same steps in every row: computed once
    v = policy.expert(x, modulation, b["state"], policy.expert.condition(policy.adapter(b["states"])))
    mean, std = step(x, v, t[..., None, None], 1 / K, cfg)
    weight = b["executed"][:, None, :, None].float()
    weight = weight / weight.sum(2, keepdim=True)  # (B, 1, H, 1)
    if cfg.noise == "chunk":
        logp = gaussian_logp((following * weight).sum(2), (mean * weight).sum(2), std[..., 0])  # (B, m+o, A)
    else:
        logp = (gaussian_logp(following, mean, std) * weight).sum(2)  # (B, m+o, A)
    return logp[:, :m].mean((1, 2)), mean, std


# ---------------------------------------------------------------------------------------------------------------
# Values and advantages


class Critic(nn.Module):
    """V(o), the discounted chance of success: a separate model on the frozen feature query states and the joint state (pi_RL: after the VLM beats after the expert)."""

    def __init__(self, cfg):
        super().__init__()
        sizes = (cfg.queries * cfg.width + cfg.state_dim, 256, 128)
        layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(nn.LayerNorm(sizes[0]), *layers, nn.Linear(128, 1))
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


CHUNKS = ("states", "state", "views", "chain", "noisy", "executed")  # what a rollout keeps of every decision


@torch.inference_mode()
def observe(policy, obs, views):
    """What the frozen VLM makes of observations, once: feature query states (B, Q, D), normalised joint state (B, S), and the
    image encoder's tokens of every view (B, V, E) for the retrieval. views: which of the environment's cameras it looks through."""
    images, state = policy.check_inputs(obs["images"][:, views], obs["state"], obs["task"])
    visual = policy.vlm.see(images)  # (B, P, D)
    prompts = [policy.tokenizer.prompt(task, policy.cfg.reasoning) for task in obs["task"]]
    limit = policy.cfg.max_thought if policy.cfg.reasoning else 0
    _, states = policy.vlm.generate(visual, prompts, policy.tokenizer.end_thought, limit, with_queries=True)
    return states, policy.normalise(state, "state"), visual.view(len(visual), policy.cfg.views, -1)


def play(policy, jobs, vec, cfg, clock, keep=lambda episode: None):
    """Whole episodes with the noisy chain, one per job (seed, family); arms that finish take the next job. keep: told each as it ends.

    -> list of episodes by seed: {"seed", "family", "success", "steps", "final": (states, state) or None, "reward": [T numbers], and
    stacked over its T chunks "states", "state", "views", "chain", "noisy", "executed"}. Noise depends on the episode's seed and time alone.
    """
    K, H, A, execute = policy.cfg.denoise_steps, policy.cfg.chunk, policy.cfg.action_dim, policy.cfg.execute
    device, cameras = policy.vlm.queries.device, sim_env.views_of(policy, twin(cfg))
    episodes, waiting, running = [], list(jobs), {}  # running: arm -> its episode
    bar = tqdm(total=len(jobs), desc="rollouts", unit="episode", leave=False, disable=not sys.stderr.isatty())
    while waiting or running:
        free = [arm for arm in range(vec.n) if arm not in running][: len(waiting)]
        if free:
            for arm in free:
                seed, family = waiting.pop(0)
                running[arm] = {"seed": seed, "family": family, "final": None, "reward": []} | {
                    name: [] for name in CHUNKS
                }
                episodes.append(running[arm])
            vec.reset(
                [running[arm]["seed"] for arm in free], [running[arm]["family"] for arm in free], "id", free
            )
            clock.mark("simulation")
        busy = sorted(running)
        states, state, views = observe(policy, vec.observations(busy), cameras)
        clock.mark("VLM")
        drawn = [
            draw(
                np.random.default_rng([cfg.seed, running[arm]["seed"], len(running[arm]["reward"])]),
                K,
                H,
                A,
                cfg,
            )
            for arm in busy
        ]
        noise, noisy = (
            torch.from_numpy(np.stack(x)).to(device) for x in zip(*drawn)
        )  # (B, K+1, H, A), (B, m)
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
            episode["reward"].append(float(reward[arm]))
            for name, value in zip(
                CHUNKS,
                (states[row], state[row], views[row], chain[row], noisy[row], torch.from_numpy(executed)),
            ):
                episode[name].append(value.cpu())
        ended = [arm for arm in busy if terminated[arm] or truncated[arm]]
        cut = [arm for arm in ended if truncated[arm]]
        if cut:
            for arm, *last in zip(cut, *observe(policy, vec.observations(cut), cameras)[:2]):
                running[arm]["final"] = [x.cpu() for x in last]
            clock.mark("VLM")
        for arm in ended:
            episode = running.pop(arm)
            episode["success"], episode["steps"] = bool(terminated[arm]), infos[arm]["steps"]
            episode |= {name: torch.stack(x) for name, x in episode.items() if name in CHUNKS}
            keep(episode)
            bar.update()
    bar.close()
    return sorted(episodes, key=lambda e: e["seed"])


def to_batch(episodes, critic, cfg, device):
    """Episodes of an iteration -> one batch over all chunks (n, ...), with old values, advantages and returns.

    Returns, which the value model learns, are those of lambda 1: it must not learn from its own guesses (VC-PPO, arXiv 2503.01491).
    """
    b = {name: torch.cat([e[name] for e in episodes]).to(device) for name in CHUNKS if name != "views"}
    with torch.no_grad():
        values = critic(b["states"], b["state"]).cpu().numpy()
        advantages, returns, at = [], [], 0
        for e in episodes:
            guesses, at = values[at : at + len(e["reward"])], at + len(e["reward"])
            last = critic(*[x[None].to(device) for x in e["final"]]).item() if e["final"] else 0.0
            advantages.append(gae(e["reward"], guesses, last, cfg.gamma, cfg.lam))
            returns.append(gae(e["reward"], guesses, last, cfg.gamma, 1.0) + guesses)
    b["advantage"] = torch.from_numpy(np.concatenate(advantages)).to(device)
    b["value"] = torch.from_numpy(values).to(device)
    b["return"] = torch.from_numpy(np.concatenate(returns)).to(device)
    return b


# ---------------------------------------------------------------------------------------------------------------
# Expert samples


class Experts:
    """Demonstrations as a source of imitation samples: retrieved by similarity of images, or drawn at random."""

    def __init__(self, policy, cfg, families, device):
        self.policy, self.cfg, self.device = policy, cfg, device
        weights = torch.tensor(
            [float(w) for w in cfg.view_weights.split(",")] if cfg.view_weights else [1.0] * policy.cfg.views
        )
        if len(weights) != policy.cfg.views:
            raise ValueError(
                f"view_weights {cfg.view_weights} must be one number for each of the cameras {policy.cfg.cameras}"
            )
        episodes = Episodes(cfg.data, policy.cfg, families)
        frames = np.sort(np.random.default_rng(0).permutation(len(episodes))[: cfg.index_frames])
        made_of = policy.fingerprint(
            policy.cfg.cameras, families, cfg.index_frames, policy.cfg.chunk, policy.cfg.reasoning
        )
        path = Path(cfg.data, f"similarity_{made_of}.safetensors")
        if not path.is_file():
            parts = tqdm(
                np.array_split(frames, math.ceil(len(frames) / 64)),
                desc="similarity index",
                leave=False,
                disable=not sys.stderr.isatty(),
            )
            parts = [self.embed(episodes.samples(policy.tokenizer, part)) for part in parts]
            temporary = Path(f"{path}.tmp{os.getpid()}")  # several processes may come here at once
            save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, temporary)
            os.replace(temporary, path)
        table = load_file(path)
        demonstrations = [episodes.episodes[episodes.episode_of[i]] for i in frames]
        self.index = Neighbours(table.pop("keys"), [e["family"] for e in demonstrations], weights)
        table["state"], table["actions"] = (
            policy.normalise(table["state"].to(device), "state"),
            policy.normalise(table["actions"].to(device), "action"),
        )
        steps = [e["start"] + e["length"] - episodes.frames[i] for e, i in zip(demonstrations, frames)]
        table["left"] = torch.tensor(
            np.ceil(np.array(steps) / policy.cfg.execute), dtype=torch.float32
        )  # decisions to the end
        self.table = {name: x.to(device) for name, x in table.items()}

    @torch.inference_mode()
    def embed(self, samples):
        """What the frozen VLM makes of demonstrated frames, once -> keys (B, V, E), feature query states after the teacher's own
        thought (B, Q, D), and what the flow loss takes besides."""
        visual = self.policy.vlm.see(samples["images"].to(self.device))  # (B, P, D)
        _, states = self.policy.vlm(
            visual, *(samples[k].to(self.device) for k in ("tokens", "segments", "positions")), True
        )
        return {
            "keys": visual.view(len(visual), self.policy.cfg.views, -1).half().cpu(),
            "states": states.float().cpu(),
            "state": samples["state"],
            "actions": samples["actions"],
            "valid": samples["valid"],
        }

    def retrieve(self, episodes):
        """Every decision of these episodes looks up a frame: adds "experts" and "similarity" (T,) to each, consumes "views"."""
        uniform = np.concatenate(
            [np.random.default_rng([self.cfg.seed, e["seed"], 1]).random(len(e["reward"])) for e in episodes]
        )
        views = torch.cat([e.pop("views") for e in episodes])  # (n, V, E)
        if self.cfg.experts == "random":
            rows, similarity = self.index.random(views, uniform)
        else:
            families = [e["family"] for e in episodes for _ in e["reward"]]
            rows, similarity = self.index.nearest(views, families, self.cfg.neighbours, uniform)
        at = np.cumsum([len(e["reward"]) for e in episodes])[:-1].tolist()
        for e, mine, alike in zip(episodes, rows.tensor_split(at), similarity.tensor_split(at)):
            e["experts"], e["similarity"] = mine, alike

    def batch(self, episodes, iteration):
        """The frames looked up, with their noise -> batch dict (n, ...)."""
        rng, c = np.random.default_rng([self.cfg.seed, iteration, 1]), self.policy.cfg
        rows = torch.cat([e["experts"] for e in episodes])
        n, M, K, H, A = len(rows), self.cfg.noise_samples, c.denoise_steps, c.chunk, c.action_dim
        drawn = {
            "t": flow_times(rng, (n, M)),
            "eps": rng.standard_normal((n, M, H, A)),
            "uniform": rng.random((n, c.queries)),
            "path": rng.standard_normal((n, K + 1, H, A)),
        }
        e = {name: x[rows.to(self.device)] for name, x in self.table.items()}
        return e | {k: torch.as_tensor(v, dtype=torch.float32, device=self.device) for k, v in drawn.items()}


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
    constant minus the flow-matching loss, weighted d^2 / (2 sigma^2) for `chain` and, for `sde`, by
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


def expert_term(policy, critic, e, scale, cfg):
    """The expert samples' part of the loss: advantage times likelihood, in one of three forms. -> scalar.

    scale: mean and standard deviation of the rollouts' advantages; used by the GAE control alone.
    """
    advantage = torch.ones_like(e["left"])
    if (
        cfg.expert_advantage == "gae"
    ):  # lambda = 1: the demonstration's discounted return minus the value model's guess
        with torch.no_grad():
            advantage = (cfg.gamma ** (e["left"] - 1) - critic(e["states"], e["state"]) - scale[0]) / scale[1]
    if cfg.expert_form == "cfm":
        return (advantage * expert_loss(policy, e)).mean()
    K = policy.cfg.denoise_steps
    if cfg.expert_form == "chain":
        steps = torch.arange(K, device=e["left"].device).expand(len(e["left"]), K)
        path = {
            "chain": bridge(e["actions"], e["path"], K, cfg),
            "noisy": steps,
            "executed": e["valid"],
            "states": e["states"],
            "state": e["state"],
        }
        return -(
            advantage * chain_logp(policy, path, replace(cfg, noise="step"))[0]
        ).mean()  # the path's draws are one per control step
    beta = 1 / (K * cfg.sigma) ** 2 / 2 if cfg.sampler == "chain" else 1.0  # to log-probability; or FPO's
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
    K, rng = b["chain"].shape[1] - 1, np.random.default_rng([cfg.seed, iteration, 2])
    if cfg.proximal and b["noisy"].shape[1] == 1 < K:  # besides the noisy step one of the others, drawn
        b["other"] = (
            b["noisy"] + 1 + torch.from_numpy(rng.integers(K - 1, size=(n, 1))).to(b["noisy"])
        ) % K  # (n, 1)
    with (
        torch.no_grad()
    ):  # by the function that the update uses, not remembered from the rollout: ratios start at exactly 1
        b["old"], b["mean"] = (
            torch.cat(x) for x in zip(*[chain_logp(policy, rows_of(b, piece), cfg)[:2] for piece in pieces])
        )
        if start is not None:
            b["start"] = torch.cat([chain_logp(start, rows_of(b, piece), cfg)[1] for piece in pieces])
    if e is not None and cfg.expert_form == "ratio":
        e = e | {"old": torch.cat([expert_loss(policy, rows_of(e, piece)).detach() for piece in pieces])}
    numbers = defaultdict(list)
    for epoch in range(max(cfg.epochs, cfg.critic_epochs)):
        for rows in np.array_split(rng.permutation(n), math.ceil(n / cfg.minibatch)):
            moving, judging = moving and epoch < cfg.epochs, epoch < cfg.critic_epochs
            mine = rows[rank::world]
            share = len(mine) * world / len(rows)  # makes the mean over processes the mean over rows
            part, logs, loss = rows_of(b, mine), {}, 0.0
            if judging:
                loss = logs["value_loss"] = F.mse_loss(critic(part["states"], part["state"]), part["return"])
            if moving:
                logp, mean, std = chain_logp(policy, part, cfg)
                losses, ratio = ppo_loss(logp, part["old"], part["advantage"], cfg.clip)
                logs |= {
                    "kl": (ratio - 1 - ratio.log()).mean(),
                    "clipped": ((ratio - 1).abs() > cfg.clip).float().mean(),
                }
                if cfg.ppo:
                    loss = loss + losses.mean()
                if e is not None:
                    logs["expert_loss"] = expert_term(policy, critic, rows_of(e, mine), scale, cfg)
                    loss = loss + cfg.expert_weight * logs["expert_loss"]
                # KL divergences between Gaussian steps of equal spread, from the policy before this iteration and from the first one
                for name, reference, weight in (
                    ("proximal", "mean", cfg.proximal),
                    ("anchor", "start", cfg.anchor),
                ):
                    if weight:
                        logs[name] = 0.5 * ((mean - part[reference]) / std).square().mean()
                        loss = loss + weight * logs[name]
            if not logs:  # the policy stopped early and the value model has seen enough
                break
            (loss * share).backward()
            values = share * torch.stack([v.detach() for v in logs.values()])
            if world > 1:
                average_gradients(learner, world)
                dist.all_reduce(values)
                values /= world
            logs = dict(zip(logs, values.tolist()))
            for name, learns, modules in (
                ("gnorm", moving, (learner["adapter"], learner["expert"])),
                ("critic_gnorm", judging, (critic,)),
            ):
                if learns:
                    logs[name] = nn.utils.clip_grad_norm_(
                        [p for module in modules for p in module.parameters()], cfg.grad_clip
                    ).item()
            if not all(math.isfinite(v) for v in logs.values()):
                raise FloatingPointError(
                    f"non-finite number in iteration {iteration}: {logs}; lower --lr, then --resume"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            moving = moving and (
                not cfg.ppo or logs["kl"] <= cfg.target_kl
            )  # the same decision on every process
            for k, v in logs.items():
                numbers[k].append(v)
    explained = 1 - (b["return"] - b["value"]).var() / b["return"].var().clamp(min=1e-8)
    return {k: float(np.mean(v)) for k, v in numbers.items()} | {
        "updates": len(numbers["kl"]),
        "explained": explained.item(),
    }


# ---------------------------------------------------------------------------------------------------------------
# The run


def twin(cfg):
    """The environment whose cameras and motors are those of --env: the real arm has the simulated one's."""
    return "sim" if cfg.env == "real" else cfg.env


def connect(policy, cfg):
    """The real arm in VecEnv's place; a ValueError of one line where it does not answer."""
    try:
        arm = real_env.by_flags(
            real_env.PracticeEnv,
            cfg,
            policy.cfg.cameras.split(","),
            instruction=cfg.task,
            px=policy.cfg.image_size,
        )
    except RuntimeError as e:
        raise ValueError(str(e)) from None
    return sim_env.Alone(arm, policy.cfg.image_size)


def play_real(policy, jobs, vec, cfg, clock):
    """play() on the real arm. Every episode is on disk as soon as it ends, so that a person's time is not lost when the program dies."""
    folder = Path(cfg.out, "episodes")
    folder.mkdir(parents=True, exist_ok=True)
    path = lambda seed: folder / f"{seed}.pt"
    keep = lambda episode: write_atomically(path(episode["seed"]), lambda file: torch.save(episode, file))
    done = [torch.load(path(seed), weights_only=True) for seed, _ in jobs if path(seed).is_file()]
    try:
        episodes = play(policy, [job for job in jobs if not path(job[0]).is_file()], vec, cfg, clock, keep)
        vec.env.rest()
    except real_env.ArmError as e:
        raise ValueError(f"{e}; the episodes so far are kept: go on with --resume") from None
    return sorted(done + episodes, key=lambda e: e["seed"])


def jobs_of(cfg, families, iteration):
    """Scenes of one iteration [(seed, family), ...], none practised twice, the longest episodes first so that no arm waits for them."""
    first = FIRST_SEED + (cfg.seed * cfg.iterations + iteration) * cfg.episodes
    jobs = [(first + i, families[i % len(families)]) for i in range(cfg.episodes)]
    limit = sim_env.environment(twin(cfg)).families
    return sorted(jobs, key=lambda job: -limit.get(job[1], 0))


def validate(policy, ema, families, cfg, rank=0, world=1):
    """Success without noise on validation seeds, shared among the processes -> {family: rate}, empty if there are to be none."""
    if not cfg.eval_episodes:
        return {}
    seeds, workers = sim_env.SEEDS["val"][50_000 : 50_000 + cfg.eval_episodes], os.cpu_count() // world or 1
    with averaged_weights(policy, ema):
        runs = [
            sim_env.rollout(
                sim_env.driver(policy, cfg.env),
                seeds[rank::world],
                f,
                "id",
                cfg.arms,
                policy.cfg.image_size,
                workers,
                f"validation, {f}",
                cfg.env,
            )
            for f in families
        ]
    wins = torch.tensor(
        [sum(e["success"] for e in episodes) for episodes in runs],
        dtype=torch.float32,
        device=policy.vlm.queries.device,
    )
    if world > 1:
        dist.all_reduce(wins)
    return {family: n / len(seeds) for family, n in zip(families, wins.tolist())}


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
        raise ValueError(
            f"nothing to resume in {out}; leave --resume out"
            if cfg.resume
            else f"{out} already holds a run; add --resume to go on with it, or choose another --out"
        )
    began_with = read_checkpoint_config(cfg.init_from)
    cfg.data, cfg.families = (
        cfg.data or began_with.get("data", ""),
        cfg.families or began_with.get("families", "place"),
    )
    cfg.env, families = cfg.env or began_with.get("env", "sim"), cfg.families.split(",")
    if cfg.env != "real":
        sim_env.check_families(families, cfg.env)
    if cfg.resume:
        check_resume(cfg, read_checkpoint_config(out).get("rl", {}), HARMLESS, (), say)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    policy = SyVLA.load(cfg.init_from, Tokenizer.load(cfg.init_from), device)
    if not torch.isfinite(policy.state_low).all():
        raise ValueError(
            f"{cfg.init_from} has no normalisation statistics; choose a checkpoint that train.py wrote"
        )
    policy.cfg.decouple = cfg.decouple
    policy.requires_grad_(False)
    start = copy.deepcopy(policy) if cfg.anchor else None
    torch.manual_seed(cfg.seed)
    learner = nn.ModuleDict(
        {"adapter": policy.adapter, "expert": policy.expert, "critic": Critic(policy.cfg).to(device)}
    ).requires_grad_(True)
    moving = [p for name, p in learner.named_parameters() if not name.startswith("critic")]
    optimizer = torch.optim.AdamW(
        [{"params": moving}, {"params": learner["critic"].parameters(), "weight_decay": 0.1}],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
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
    say(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {world} process(es); {sum(p.numel() for p in moving):,} parameters learn, {sum(p.numel() for p in learner['critic'].parameters()):,} judge"
    )
    out.mkdir(parents=True, exist_ok=True)
    settings = asdict(policy.cfg) | {
        "data": cfg.data,
        "env": twin(cfg),
        "families": cfg.families,
        "rl": asdict(cfg),
    }

    def keep(iteration):
        state = {
            "iteration": iteration,
            "best": best,
            "learner": learner.state_dict(),
            "ema": ema,
            "optimizer": optimizer.state_dict(),
        }
        write_atomically(out / "train_state.pt", lambda path: torch.save(state, path))

    if rank == 0 and cfg.resume:
        trim_log(out / "log.jsonl", "iteration", first)
    elif rank == 0:
        if cfg.eval:
            say("before:")
            report(policy, families, cfg, out / "eval_before.json", say)
        save_policy(out, policy, settings)
    if not cfg.resume:
        if before := validate(policy, ema, families, cfg, rank, world):
            best = float(np.mean(list(before.values())))
            say("validation before: " + " ".join(f"{family} {rate:.2f}" for family, rate in before.items()))
        if rank == 0:
            keep(0)
    arms = min(cfg.arms, math.ceil(cfg.episodes / world))
    bar = tqdm(
        range(first, cfg.iterations),
        initial=first,
        total=cfg.iterations,
        unit="iteration",
        disable=rank > 0 or not sys.stderr.isatty(),
    )
    with (
        connect(policy, cfg)
        if cfg.env == "real"
        else sim_env.VecEnv(arms, os.cpu_count() // world or 1, cfg.env, policy.cfg.image_size) as vec
    ):
        for iteration in bar:
            factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * iteration / cfg.iterations))
            rise = min(
                1, (iteration + 1 - cfg.critic_warmup) / 5
            )  # AdamW's first steps are of full size however small the gradient
            for group, lr in zip(optimizer.param_groups, (cfg.lr * max(0, rise), cfg.critic_lr)):
                group["lr"] = lr * factor
            spent, clock, began = vec.spent(), Stopwatch(device), time.time()
            jobs = jobs_of(cfg, families, iteration)[rank::world]
            episodes = (play_real if cfg.env == "real" else play)(policy, jobs, vec, cfg, clock)
            rollout = sum(clock.seconds.values()) or math.inf  # no time: every episode was on disk already
            for stage, seconds in vec.spent().items():
                clock.seconds[stage] = seconds - spent[stage]
                clock.seconds["simulation"] -= clock.seconds[
                    stage
                ]  # what is left: resets, pipes, waiting for the slower worker
            if experts:
                experts.retrieve(episodes)
            for episode in episodes:
                episode.pop("views", None)  # large, and no longer needed
            if world > 1:
                gathered = [None] * world
                dist.all_gather_object(gathered, episodes)
                episodes = sorted((e for part in gathered for e in part), key=lambda e: e["seed"])
            b = to_batch(episodes, learner["critic"], cfg, device)
            e, line = None, {"iteration": iteration + 1}
            if experts:
                e = experts.batch(episodes, iteration)
                line |= {
                    "similarity": torch.cat([e["similarity"] for e in episodes]).mean().item(),
                    "expert_frames": len(torch.cat([e["experts"] for e in episodes]).unique()),
                }
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
            line |= {
                f"success {f}": float(np.mean([e["success"] for e in episodes if e["family"] == f]))
                for f in families
            }
            line |= {
                "return": b["return"].mean().item(),
                "chunks": len(b["return"]),
                "steps_per_s": steps / rollout,
                "chunks_per_s": len(b["return"]) / rollout,
                "seconds": seconds,
                "time": dict(clock.seconds),
            }
            if not cfg.eval_episodes:
                if rank == 0:
                    save_policy(out, policy, settings, policy.state_dict() | ema)
            elif (iteration + 1) % cfg.eval_every == 0 or iteration + 1 == cfg.iterations:
                line["validation"] = validate(policy, ema, families, cfg, rank, world)
                mean = float(np.mean(list(line["validation"].values())))
                if mean > best:
                    best = mean
                    if rank == 0:
                        save_policy(out, policy, settings, policy.state_dict() | ema)
            if rank == 0:
                with open(out / "log.jsonl", "a") as f:
                    f.write(json.dumps(line) + "\n")
                keep(iteration + 1)
                bar.clear()
                say(describe(line, families, cfg), flush=True)
    untouched = load_file(Path(cfg.init_from, "model.safetensors"))
    assert all(
        torch.equal(x.cpu(), untouched[f"vlm.{name}"].to(x.dtype))
        for name, x in policy.vlm.state_dict().items()
    )
    say(f"practised {cfg.iterations - first} iterations; the VLM is the same bit for bit, so its answers are")
    if rank == 0:
        plot(out, say)
        if cfg.eval:
            say("after:")
            policy.load_weights(out / "model.safetensors")  # the best, not the last
            report(policy, families, cfg, out / "eval.json", say)
    if world > 1:
        dist.barrier()  # gloo aborts one who hangs up while another is still busy
        dist.destroy_process_group()


def report(policy, families, cfg, path, say):
    """Closed-loop success on held-out report seeds: a JSON file and the printed table."""
    results = sim_env.evaluate(policy, families, cfg.eval, env=cfg.env)
    write_atomically(path, lambda p: p.write_text(json.dumps(results, indent=1)))
    say(sim_env.table(results))


def describe(line, families, cfg):
    """The log line that a person reads."""
    total = sum(line["time"].values())
    noisy = " ".join(f"{line[f'success {f}']:.2f}" for f in families)
    parts = [
        f"iteration {line['iteration']}/{cfg.iterations}",
        f"noisy success {noisy}",
        f"return {line['return']:.3f}",
        f"value explains {line['explained']:.2f}",
    ]
    if "kl" in line:
        parts += [f"kl {line['kl']:.4f}", f"clipped {line['clipped']:.2f}", f"gnorm {line['gnorm']:.2f}"]
    if "similarity" in line:
        parts += [f"similarity {line['similarity']:.3f} ({line['expert_frames']} frames)"]
    parts += [
        f"{line['steps_per_s']:.0f} steps/s",
        f"{line['seconds']:.1f} s: " + " ".join(f"{k} {v / total:.0%}" for k, v in line["time"].items()),
    ]
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
        axes[0].plot(
            [line["iteration"] for line in checked],
            [line["validation"][name.removeprefix("success ")] for line in checked],
            color=drawn.get_color(),
            label=name.removeprefix("success "),
        )
    for axis, name in ((axes[1], "kl"), (axes[2], "gnorm")):
        axis.plot(at, [line.get(name, math.nan) for line in lines])
        axis.set_title(name)
    axes[0].set_title("success: noisy rollouts (pale), validation without noise")
    axes[0].legend()
    for axis in axes:
        axis.set_xlabel("iteration")
    figure.tight_layout()
    write_atomically(out / "curves.png", lambda path: figure.savefig(path, format="png"))
    say(f"wrote {out / 'curves.png'}")


if __name__ == "__main__":
    main()
