"""mini-VLA on push-v3 of Meta-World: its own code, on the demonstrations and scenes that our policy has.

    git clone https://github.com/keivalya/mini-vla
    python -m benchmarks.metaworld --tasks=push-v3 --demos=100 --reasoning=places --out=data/push
    python -m benchmarks.mini_vla --data=data/push --out=mini-vla/data/push.npz
    (cd mini-vla && python -m scripts.train --dataset-path=data/push.npz --resize-to=96 --epochs=50)
    python -m benchmarks.mini_vla evaluate --clone=mini-vla --run=mini-vla/checkpoints/model.pt

Model, loss and training loop are mini-VLA's (Keivalya Pandya, MIT). Its policy sees all 39 numbers of the
benchmark's state, with the puck's true place and the target's; ours sees the hand alone. docs/benchmarks.md
says what else differs.

Read it in this order: WholeState, export, Policy, evaluate_run.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from benchmarks.metaworld import CAMERA, LIMIT, MT50, demonstrate, import_metaworld
from benchmarks.shared import count, count_row, table_row
from common import (
    UserError,
    atomic_path,
    check_options,
    check_readable,
    fast_cpu,
    opt,
    parse_config,
    run_program,
)
from data import read_meta
from evaluate import Episode, VecEnv, run_episodes
from sim_env import SEEDS

TASK = "push-v3"
ITS_LIMIT = 150  # control steps: --max-steps of the command in its README


class WholeState(MT50):
    """MT50 as mini-VLA sees it: one camera, and the benchmark's whole state in place of the hand's."""

    cameras = (CAMERA,)
    state = tuple(f"state_{i}" for i in range(39))

    def hand(self) -> ndarray:
        """The state (39,) float32; its first four numbers are the hand's."""
        return self.raw.astype(np.float32)


@dataclass
class MiniVLAConfig:
    """The options of both programs."""

    config: str = opt("", "there are no presets here", ("",))
    work: str = opt("export", "export or evaluate; a word without --", ("export", "evaluate"))
    data: str = opt("data/push", "data set of push-v3 to export", needs="work=export")
    out: str = opt("mini-vla/data/push.npz", "file to write", needs="work=export")
    clone: str = opt("mini-vla", "folder of mini-VLA's code", needs="work=evaluate")
    run: str = opt("mini-vla/checkpoints/model.pt", "checkpoint that it wrote", needs="work=evaluate")
    episodes: int = opt(100, "episodes", f"[1, {len(SEEDS['report'])}]", "work=evaluate")
    seeds: str = opt("report", "scenes; val: to choose between runs", ("report", "val"), "work=evaluate")
    threads: int = opt(0, "CPU threads of the policy; 0 lets torch choose", "[0, 1024]", "work=evaluate")

    def __post_init__(self):
        check_options(self)


def export(cfg: MiniVLAConfig) -> None:
    """A data set of push-v3 -> the arrays that mini-VLA's scripts/train.py reads.

    The episodes are played again, seed by seed, because the data set lacks the whole state.
    """
    meta = read_meta(cfg.data)
    names = {episode.get("name") for episode in meta["episodes"]}
    if names != {TASK}:
        raise UserError(f"{cfg.data} must hold {TASK} alone: python -m benchmarks.metaworld --tasks={TASK}")
    env = WholeState(px=meta["image_size"])
    pieces = defaultdict(list)
    for episode in meta["episodes"]:
        arrays, again = demonstrate(env, TASK, episode["seed"])
        if again["length"] != episode["length"]:
            raise UserError(f"seed {episode['seed']} of {cfg.data} does not repeat; make the data set anew")
        for key, array in arrays.items():
            pieces[key].append(array)
    env.close()
    images = np.concatenate(pieces[CAMERA])  # (N, px, px, 3)
    states = np.concatenate(pieces["state"])  # (N, 39)
    actions = np.concatenate(pieces["action"])  # (N, 4)
    # One instruction: its words in order, behind the two that mini-VLA's tokenizer begins with.
    words = meta["episodes"][0]["task"].split()
    vocab = {word: number for number, word in enumerate(dict.fromkeys(["<pad>", "<unk>", *words]))}
    text = np.array([vocab[word] for word in words])  # (words,)
    text_ids = np.tile(text, (len(images), 1))  # (N, words)
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, images=images, states=states, actions=actions, text_ids=text_ids, vocab=vocab)
    print(f"{out}: {len(images)} frames of {len(meta['episodes'])} episodes")


class Policy:
    """mini-VLA from its checkpoint, as run_episodes() asks a policy."""

    def __init__(self, clone: str, run: str):
        if not Path(clone, "models", "vla_diffusion_policy.py").is_file():
            raise UserError(
                f"{clone} is not mini-VLA: git clone https://github.com/keivalya/mini-vla {clone}"
            )
        sys.path.append(clone)
        from models.vla_diffusion_policy import VLADiffusionPolicy

        with check_readable(Path(run), "train it first, by scripts.train of mini-VLA"):
            saved = torch.load(run, weights_only=True)
            self.vocab = saved["vocab"]
            shape = {key: saved[key] for key in ("state_dim", "action_dim", "d_model", "diffusion_T")}
            self.net = VLADiffusionPolicy(vocab_size=max(self.vocab.values()) + 1, **shape)
            self.net.load_state_dict(saved["model_state_dict"])
        self.net.eval()

    def decide(self, obs: dict[str, Any]) -> tuple[ndarray, list[None]]:
        """Actions (n, 1, 4) for n arms: it looks before every control step."""
        images = torch.from_numpy(obs["images"][:, 0]).permute(0, 3, 1, 2).float() / 255  # (n, 3, px, px)
        words = [[self.vocab.get(word, 1) for word in task.split()] for task in obs["task"]]
        actions = self.net.act(images, torch.tensor(words), torch.tensor(obs["state"]))  # (n, 4)
        return actions.numpy()[:, None], [None] * len(actions)


def evaluate_run(cfg: MiniVLAConfig) -> None:
    """Play the scenes of our own evaluation and print success within both limits."""
    fast_cpu(cfg.threads)
    policy = Policy(cfg.clone, cfg.run)
    million = sum(p.numel() for p in policy.net.parameters()) / 1e6
    print(f"mini-VLA: {million:.2f} M parameters")
    jobs = [Episode(seed, {"family": TASK, "split": "id"}) for seed in SEEDS[cfg.seeds][: cfg.episodes]]
    torch.manual_seed(0)  # of its sampler's noise
    with VecEnv(min(16, len(jobs)), 2, "benchmarks.mini_vla:WholeState") as vec:
        run_episodes(vec, jobs, policy.decide, TASK)
    print(table_row("within", "success %", "n", "95 % interval"))
    for limit in (ITS_LIMIT, LIMIT):
        print(count_row(f"{limit} control steps", count(jobs, limit)))


def work(cfg: MiniVLAConfig) -> None:
    """What the command line asks for."""
    import_metaworld()  # complain before any file is written
    if cfg.work == "evaluate":
        evaluate_run(cfg)
    else:
        export(cfg)


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    run_program(work, parse_config(MiniVLAConfig, {}, words, "work"))


if __name__ == "__main__":
    main()
