"""Peers: LeRobot's ACT and Diffusion Policy on a data set of ours, for as many minutes as our own policy had.

    python -m benchmarks.peers --policy=act --data=data/small --families=place --minutes=60 --out=out/act
    python -m benchmarks.peers evaluate --out=out/act --eval=100

docs/benchmarks.md has what to install and what came out. Networks, losses, normalisation and optimizers are
LeRobot's own, with random weights. Two things are ours. Frames come from memory maps, as in train.py, so that
no peer waits for a decoder. And as neither policy reads, each is told what the instruction means: which of
the data set's goals it is, one-hot.

Read it in this order: goal_of, Peer, train, play.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from common import (
    UserError,
    atomic_path,
    check_options,
    claim_folder,
    claim_run,
    fast_cpu,
    lock_folder,
    opt,
    parse_config,
    read_json,
    require,
    run_program,
    write_json,
)
from data import Episodes, open_images_of, pictures, read_meta
from evaluate import (
    Episode,
    VecEnv,
    camera_indices,
    check_families,
    percent,
    run_episodes,
    summarise,
    target_of,
)
from model import Config
from sim_env import SEEDS

INSTALL = "'lerobot==0.4.4'"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # LeRobot's scale of pictures
LEARNING = ("work=train",)


@dataclass
class PeerConfig:
    """The options of both programs."""

    config: str = opt("", "there are no presets here", ("",))
    work: str = opt("train", "train or evaluate; a word without --", ("train", "evaluate"))
    policy: str = opt("act", "LeRobot's policy", ("act", "diffusion"), LEARNING)
    data: str = opt("data/small", "data set folder", needs="work=train")
    env: str = opt(
        "sim", "where to evaluate: sim, or an environment package.module:Class", needs="work=train"
    )
    families: str = opt("place", "task families, of one cube each", many=True, needs="work=train")
    out: str = opt("out/act", "run folder")
    minutes: float = opt(60.0, "of training", "(0, 10000]", LEARNING)
    batch_size: int = opt(64, "frames a step", "[1, 65536]", LEARNING)
    lr: float = opt(1e-4, "learning rate; it falls as a cosine over the minutes", "(0, 1]", LEARNING)
    chunk_size: int = opt(16, "control steps predicted at once", "[1, 1024]", LEARNING)
    n_action_steps: int = opt(4, "control steps executed before looking again", "[1, 1024]", LEARNING)
    seed: int = opt(0, "seed of weights and batches", "[0, 4294967295]", LEARNING)
    resume: bool = opt(False, "go on with the run in --out, with its settings", needs="work=train")
    eval: int = opt(100, "episodes per family, or per --tasks", "[0, 1000000]")
    tasks: str = opt("", "evaluate these in place of the families, as in reach-v3,push-v3", many=True)
    seeds: str = opt("report", "scenes of --eval; val: to choose between settings", ("report", "val"))
    threads: int = opt(0, "CPU threads; 0 lets torch choose", "[0, 1024]")

    def __post_init__(self):
        check_options(self)
        if self.policy == "diffusion" and self.chunk_size % 8:
            raise UserError(
                f"--policy=diffusion halves its chunk three times: {self.chunk_size} is not 8, 16, .."
            )
        if self.work == "evaluate" and not self.eval:
            raise UserError("--eval=0 plays nothing: set --eval to more")


def goal_of(task: str, reasoning: str) -> str:
    """What an instruction means: the cube and pad that a teacher's reasoning names, else its own words."""
    named = target_of(reasoning)
    if named is None:
        return task
    cube, pad = named
    return f"{pad} {cube}"


# -----------------------------------------------------------------------------------------------------------
# The policy


class Peer:
    """A LeRobot policy from random weights, and what it is fed with."""

    def __init__(self, cfg: PeerConfig):
        require("lerobot", INSTALL)
        meta = read_meta(cfg.data)
        self.cfg = cfg
        cameras = meta["cameras"]
        self.shape = Config(
            cameras=",".join(cameras),
            motors=",".join(meta["motors"]),
            state=",".join(meta.get("state", ())),
            fps=meta["fps"],
            image_size=open_images_of(cfg.data, cameras[0]).shape[1],
            patch_size=2,  # any picture will do
            pixel_shuffle=1,
            chunk_size=cfg.chunk_size,
            n_action_steps=cfg.n_action_steps,
        )
        # complain of an environment that does not fit before the training, not behind it
        check_families(cfg.families.split(","), cfg.env)
        self.views = camera_indices(SimpleNamespace(cfg=self.shape), cfg.env)
        self.episodes = Episodes(cfg.data, self.shape, cfg.families.split(","))
        goals = {goal_of(*self.episodes.reason_at(i)) for i in range(len(self.episodes))}
        self.goals = {goal: number for number, goal in enumerate(sorted(goals))}
        torch.manual_seed(cfg.seed)
        self._build()

    def _build(self) -> None:
        from lerobot.configs.types import FeatureType, PolicyFeature
        from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

        px = self.shape.image_size
        inputs = {}
        statistics = {}
        for camera in self.shape.camera_names:
            inputs[f"observation.images.{camera}"] = PolicyFeature(FeatureType.VISUAL, (3, px, px))
            statistics[f"observation.images.{camera}"] = {
                key: torch.tensor(numbers).view(3, 1, 1) for key, numbers in IMAGENET.items()
            }
        inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (self.shape.state_dim,))
        inputs["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (len(self.goals),))
        outputs = {"action": PolicyFeature(FeatureType.ACTION, (self.shape.action_dim,))}
        for name, array in (("observation.state", self.episodes.state), ("action", self.episodes.action)):
            numbers = {"mean": array.mean(0), "std": array.std(0), "min": array.min(0), "max": array.max(0)}
            statistics[name] = {key: torch.tensor(number) for key, number in numbers.items()}
        settings = dict(
            input_features=inputs,
            output_features=outputs,
            device="cpu",
            push_to_hub=False,
            pretrained_backbone_weights=None,
            n_action_steps=self.cfg.n_action_steps,
            optimizer_lr=self.cfg.lr,
            n_obs_steps=1,  # as ours: it acts on what it sees now
        )
        if self.cfg.policy == "act":
            settings |= dict(chunk_size=self.cfg.chunk_size, optimizer_lr_backbone=self.cfg.lr)
        else:
            # a hundred denoising steps, its default, take a CPU seconds
            settings |= dict(horizon=self.cfg.chunk_size, noise_scheduler_type="DDIM", num_inference_steps=10)
        config = make_policy_config(self.cfg.policy, **settings)
        self.net = get_policy_class(self.cfg.policy)(config)
        self.before, self.behind = make_pre_post_processors(config, dataset_stats=statistics)
        self.optimizer = config.get_optimizer_preset().build(self.net.get_optim_params())

    def observation(self, images: np.ndarray, state: np.ndarray, goals: Sequence[str]) -> dict[str, Tensor]:
        """images (B, V, px, px, 3) uint8, state (B, S), B goals -> a batch under LeRobot's names."""
        batch = {}
        for view, camera in enumerate(self.shape.camera_names):
            picture = torch.from_numpy(images[:, view]).permute(0, 3, 1, 2)  # (B, 3, px, px)
            batch[f"observation.images.{camera}"] = picture.float() / 255
        batch["observation.state"] = torch.tensor(state)  # (B, S)
        # a goal that the data set has not is none of them
        numbers = torch.tensor([self.goals.get(goal, -1) for goal in goals])  # (B,)
        one_hot = numbers[:, None] == torch.arange(len(self.goals))
        batch["observation.environment_state"] = one_hot.float()  # (B, goals)
        return batch

    def frames(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """Random frames of the data set, drawn as train.py draws them."""
        episodes = self.episodes
        picks = np.searchsorted(episodes.cumulative, rng.random(self.cfg.batch_size))  # (B,)
        rows, _, end, _ = episodes.rows[picks].T  # (B,) each
        goals = [goal_of(*episodes.reason_at(i)) for i in picks]
        batch = self.observation(pictures(episodes.images, rows), episodes.state[rows], goals)
        steps = rows[:, None] + np.arange(self.cfg.chunk_size)  # (B, H)
        last = end[:, None] - 1  # (B, 1)
        batch["action"] = torch.from_numpy(episodes.action[np.minimum(steps, last)])  # (B, H, A)
        batch["action_is_pad"] = torch.from_numpy(steps > last)  # (B, H)
        return batch

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """LeRobot's loss of a batch."""
        batch = self.before(batch)
        if self.cfg.policy == "diffusion":  # it takes a history, of one observation
            for name in ("observation.state", "observation.environment_state"):
                batch[name] = batch[name][:, None]  # (B, 1, ...)
        loss, _ = self.net.forward(batch)
        return loss

    def learn(self, step: int, share: float) -> float:
        """One step, at a share of the minutes -> its loss."""
        cfg = self.cfg
        for group in self.optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * share)) / 2
        self.net.train()
        loss = self.loss(self.frames(np.random.default_rng([cfg.seed, step])))
        if not torch.isfinite(loss):
            raise UserError(f"non-finite loss at step {step}: lower --lr in a new run")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 10.0)  # LeRobot's
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self, folder: Path, step: int, seconds: float) -> None:
        """Write what a run goes on from."""
        state = {
            "step": step,
            "seconds": seconds,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_path(folder / "train_state.pt") as path:
            torch.save(state, path)

    def load(self, folder: Path) -> tuple[int, float]:
        """Read what save() wrote -> steps and seconds done."""
        state = torch.load(folder / "train_state.pt", weights_only=True)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["seconds"]

    @torch.no_grad()
    def decide(self, obs: dict) -> tuple[np.ndarray, list[None]]:
        """Actions (n, h, A) for n arms, as run_episodes() takes them."""
        goals = list(map(goal_of, obs["task"], obs["teacher_reasoning"]))
        batch = self.before(self.observation(obs["images"][:, self.views], obs["state"], goals))
        self.net.eval()
        if self.cfg.policy == "diffusion":
            history = {name: batch[name][:, None] for name in batch if name in self.net.config.input_features}
            looks = [history.pop(f"observation.images.{camera}") for camera in self.shape.camera_names]
            history["observation.images"] = torch.stack(looks, dim=2)  # (n, 1, V, 3, px, px)
            chunk = self.net.diffusion.generate_actions(history)  # (n, h, A)
        else:
            chunk = self.net.predict_action_chunk(batch)  # (n, H, A)
        chunk = self.behind(chunk)[:, : self.cfg.n_action_steps]
        return chunk.numpy(), [None] * len(chunk)


# -----------------------------------------------------------------------------------------------------------
# The programs

SAVE_SECONDS = 300
SETTINGS = "config.json"
NOT_KEPT = ("work", "resume", "out", "eval", "tasks", "seeds", "threads")  # they may change from call to call


def settled(cfg: PeerConfig) -> PeerConfig:
    """The settings of the run in --out in place of those of the command line."""
    kept = read_json(Path(cfg.out, SETTINGS), "train a peer first: python -m benchmarks.peers --policy=act")
    for name, value in kept.items():
        setattr(cfg, name, value)
    return cfg


def train(cfg: PeerConfig) -> None:
    """Train for cfg.minutes, then evaluate."""
    claim_run(cfg, "benchmarks/peers.py")
    if cfg.resume:
        settled(cfg)
    fast_cpu(cfg.threads)
    peer = Peer(cfg)
    out = Path(cfg.out)
    claim_folder(out, "benchmarks/peers.py", create=True)
    write_json(out / SETTINGS, {name: value for name, value in vars(cfg).items() if name not in NOT_KEPT})
    step, seconds = 0, 0.0  # done so far
    if cfg.resume:
        step, seconds = peer.load(out)
    million = sum(p.numel() for p in peer.net.parameters()) / 1e6
    print(f"{cfg.policy}: {million:.1f} M parameters, {len(peer.goals)} goals, {len(peer.episodes)} frames")
    budget = 60 * cfg.minutes
    saved = seconds
    losses = []
    while seconds < budget:
        began = time.perf_counter()
        losses.append(peer.learn(step, seconds / budget))
        step += 1
        seconds += time.perf_counter() - began
        if step % 50 == 0:
            mean = np.mean(losses[-50:])
            spent = f"{seconds / 60:.1f} of {cfg.minutes:g} minutes"
            print(f"step {step} | loss {mean:.4f} | {spent}", flush=True)
        if seconds - saved > SAVE_SECONDS or seconds >= budget:
            saved = seconds
            peer.save(out, step, seconds)
    if cfg.eval:
        play(cfg, peer)


def play(cfg: PeerConfig, peer: Peer) -> None:
    """Closed-loop episodes of every family in distribution -> a table, and eval_peer.json in the run."""
    results = {}
    for family in (cfg.tasks or cfg.families).split(","):
        jobs = [Episode(seed, {"family": family, "split": "id"}) for seed in SEEDS[cfg.seeds][: cfg.eval]]
        torch.manual_seed(0)  # of the sampler's noise
        with VecEnv(min(16, cfg.eval), 2, cfg.env, peer.shape.image_size) as vec:
            cell = summarise(run_episodes(vec, jobs, peer.decide, family))
        results[family] = cell
        low, high = percent(cell["low"]), percent(cell["high"])
        print(f"{family}: {percent(cell['success'])} % of {cell['n']} ({low} - {high})", flush=True)
    write_json(Path(cfg.out, "eval_peer.json"), results)


def evaluate_run(cfg: PeerConfig) -> None:
    """Evaluate the run in --out."""
    settled(cfg)
    lock_folder(cfg.out, "benchmarks/peers.py")
    fast_cpu(cfg.threads)
    peer = Peer(cfg)
    peer.load(Path(cfg.out))
    play(cfg, peer)


def work(cfg: PeerConfig) -> None:
    """What the command line asks for."""
    if cfg.work == "train":
        train(cfg)
    else:
        evaluate_run(cfg)


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    run_program(work, parse_config(PeerConfig, {}, words, "work"))


if __name__ == "__main__":
    main()
