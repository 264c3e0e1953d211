"""NS-VLA's plan and pointer on a trained policy: what is done is remembered, not read anew at every look.

    python -m extras.nsvla --run=out/small --data=data/small       # trains the head, then the table

NS-VLA (arXiv 2603.09542) writes a plan of primitives once. A classifier on features of the frozen VLM says
which primitive a picture shows, and a pointer follows the plan: at every look it stays or advances, never
back. Here the primitives of a leg are to fetch its cube and to carry it. The plan is what the first reasoning
names; the policy goes on writing where things are.

Read it in this order: split_reasoning, PlanPointer, learn.
"""

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import (
    UserError,
    check_options,
    choose_device,
    fast_cpu,
    opt,
    parse_config,
    run_program,
    write_json,
)
from data import Episodes, pictures
from evaluate import Episode, VecEnv, camera_indices, percent, run_episodes, summarise
from model import SyVLA, Visual, checkpoint_folder, load_policy
from sim_env import FAMILIES, SEEDS, SPLITS

STATES = ("at", "in hand", "there")  # of a leg's cube: to be fetched, being carried, done
CUBE = re.compile(rf"(?<= cube )({'|'.join(STATES)})")
DOUBTS = 2  # looks in a row at which the policy sees the cube elsewhere, after which the plan is made anew


@dataclass
class PlanConfig:
    """The options."""

    config: str = opt("", "there are no presets here", ("",))
    run: str = opt("out/small", "policy folder, or a policy in one file")
    data: str = opt("data/small", "data set from which the head learns")
    out: str = opt("out/nsvla", "folder for the table")
    frames: int = opt(8000, "frames from which the head learns", "[1, 10000000]")
    steps: int = opt(600, "steps of the head", "[1, 1000000]")
    ahead: int = opt(
        0, "so many control steps before a primitive ends it counts as ended (NS-VLA: 3)", "[0, 100]"
    )
    replan: bool = opt(True, "make the plan anew where the policy sees the cube elsewhere")
    eval: int = opt(100, "episodes per family and split", "[1, 1000000]")
    families: str = opt(",".join(FAMILIES), "task families", FAMILIES, many=True)
    splits: str = opt("id", "kinds of scenes, with commas", SPLITS, many=True)
    seeds: str = opt("report", "scenes; val: to choose between policies", ("report", "val"))
    seed: int = opt(0, "seed of the head", "[0, 4294967295]")
    threads: int = opt(0, "CPU threads; 0 lets torch choose", "[0, 1024]")

    def __post_init__(self):
        check_options(self)


def split_reasoning(text: str) -> list[tuple[str, int]]:
    """What a reasoning says of each leg it names: [(the text up to its cube's state, the state), ...].

    "first , blue pad at t3 , red cube there , then , green pad at t8 , lime cube in hand" -> the texts up to
    "red cube " and up to "lime cube ", with states 2 and 1.
    """
    return [(text[: match.start()], STATES.index(match[1])) for match in CUBE.finditer(text)]


class PlanPointer:
    """A policy with a head, and what run_episodes() asks of it. Its extras are (reasoning, doubts)."""

    def __init__(self, policy: SyVLA, env: str = "sim", replan: bool = True):
        self.policy = policy
        self.replan = replan
        self.views = camera_indices(policy, env)
        width = policy.cfg.width
        self.head = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, len(STATES)),
        ).to(policy.vlm.queries.device)
        self.looks = 0  # so that every one draws other noise

    @torch.inference_mode()
    def read(self, visual: Visual, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Behind every prompt: the hidden state (B, D), and the words' logits (B, vocab)."""
        vlm = self.policy.vlm
        tokens, segments, positions = vlm.packed(prompts)
        text, _, scores = vlm(visual, tokens, segments, positions, False)  # (B, T, D), -, (B, T, m)
        rows = torch.arange(len(prompts), device=tokens.device)
        last = (segments == 1).sum(1) - 1  # (B,)
        hidden = text[rows, last]  # (B, D)
        logits = vlm.logits(hidden, scores[rows, last], visual, rows)  # (B, vocab)
        return hidden, logits

    def ids(self, task: str, said: str) -> list[int]:
        """The prompt for a task whose reasoning begins with these words."""
        tokenizer = self.policy.tokenizer
        prompt = tokenizer.prompt(task)
        if said:
            prompt += tokenizer.encode(said.strip())
        return prompt

    @torch.inference_mode()
    def decide(self, obs: dict) -> tuple[np.ndarray, list[tuple[str, int]]]:
        """Actions (n, h, A) and extras for n arms."""
        policy = self.policy
        tokenizer = policy.tokenizer
        images, state = policy.check_inputs(obs["images"][:, self.views], obs["state"], obs["task"])
        visual = policy.vlm.encode_images(images)
        before = []  # at the look before: (reasoning, doubts)
        legs = []  # where its last leg stood: (the text up to its cube's state, the state)
        for episode in obs["episode"]:
            before.append(episode.extras[-1] if episode.extras else ("", 0))
            named = split_reasoning(before[-1][0])
            legs.append(named[-1] if named else ("", 0))
        prompts = list(map(self.ids, obs["task"], (said for said, _ in legs)))
        hidden, logits = self.read(visual, prompts)
        shown = self.head(hidden)  # (n, 3)
        words = [tokenizer.encode(state)[0] for state in STATES]
        own = logits[:, words].argmax(-1).tolist()  # n states that the policy itself would say
        beginnings = []  # of the reasoning at this look
        doubts = []
        for row, (said, now) in enumerate(legs):
            # on the table, neither in the hand nor where it was put
            elsewhere = said and now > 0 and own[row] == 0
            doubts.append(before[row][1] + 1 if elsewhere else 0)
            if not said or (self.replan and doubts[row] >= DOUBTS):
                beginnings.append("")  # a plan, made freely
                continue
            ahead = int(shown[row, now : now + 2].argmax())  # stay, or advance by one
            beginnings.append(said + STATES[now + ahead])
        prompts = list(map(self.ids, obs["task"], beginnings))
        limit = policy.cfg.max_reasoning_tokens
        written, query_states = policy.vlm.generate(visual, prompts, tokenizer.end_reasoning, limit, True)
        texts = [f"{said} {tokenizer.decode(ids)}".strip() for said, ids in zip(beginnings, written)]
        self.looks += 1
        chunk = policy.plan(query_states, state, self.looks)
        return chunk[:, : policy.cfg.n_action_steps], list(zip(texts, doubts))


def learn(pointer: PlanPointer, episodes: Episodes, cfg: PlanConfig) -> float:
    """Train the head on frames of demonstrations -> its accuracy on the tenth that it was not trained on."""
    rng = np.random.default_rng(cfg.seed)
    torch.manual_seed(cfg.seed)
    picks = rng.permutation(len(episodes))[: cfg.frames]
    device = pointer.policy.vlm.queries.device
    features = []
    labels = []
    for some in tqdm(np.array_split(picks, max(1, len(picks) // 64)), "features", leave=False, disable=None):
        prompts = []
        rows = []  # of the pictures
        for row, i in enumerate(some):
            _, step, _, number = episodes.rows[i]
            ahead = min(cfg.ahead, episodes.episodes[number]["length"] - 1 - step)
            task, text = episodes.reason_at(i)
            later = dict(split_reasoning(episodes.reason_at(i + ahead)[1]))
            for said, now in split_reasoning(text):
                prompts.append(pointer.ids(task, said))
                labels.append(later.get(said, now))
                rows.append(row)
        images = torch.from_numpy(pictures(episodes.images, episodes.rows[some, 0]))
        visual = pointer.policy.vlm.encode_images(images[rows].to(device))
        features.append(pointer.read(visual, prompts)[0].clone())
    x = torch.cat(features)  # (n, D)
    y = torch.tensor(labels, device=device)  # (n,)
    held_out = torch.arange(len(y), device=device) % 10 == 0
    train_x = x[~held_out]
    train_y = y[~held_out]
    # rare states weigh as much as frequent ones
    count = torch.bincount(y, minlength=len(STATES))
    weight = 1 / count.clamp(min=1)
    optimizer = torch.optim.AdamW(pointer.head.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(cfg.steps):
        # the learning rate falls linearly
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / cfg.steps)
        batch = torch.from_numpy(rng.integers(len(train_y), size=256)).to(device)
        logits = pointer.head(train_x[batch])  # (256, 3)
        loss = F.cross_entropy(logits, train_y[batch], weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        said = pointer.head(x[held_out]).argmax(-1)  # (n / 10,)
    right = said == y[held_out]
    return right.float().mean().item()


def work(cfg: PlanConfig) -> None:
    """Train the head, then play."""
    fast_cpu(cfg.threads)
    device, *_ = choose_device("auto")
    policy = load_policy(checkpoint_folder(cfg.run), device)
    if not policy.cfg.reasoning:
        raise UserError(f"{cfg.run} does not reason: there is no plan to follow")
    pointer = PlanPointer(policy, replan=cfg.replan)
    episodes = Episodes(cfg.data, policy.cfg, cfg.families.split(","))
    if not all(any(split_reasoning(text) for _, text in e["reason"]) for e in episodes.episodes):
        raise UserError(f"{cfg.data} has episodes whose reasoning names no leg; choose a set of prepare.py")
    accuracy = learn(pointer, episodes, cfg)
    print(f"head: {percent(accuracy)} % of held-out frames")
    results = {"head": accuracy}
    for family, split in itertools.product(cfg.families.split(","), cfg.splits.split(",")):
        options = {"family": family, "split": split}
        jobs = [Episode(seed, options) for seed in SEEDS[cfg.seeds][: cfg.eval]]
        with VecEnv(min(24, cfg.eval), 2, "sim", policy.cfg.image_size) as vec:
            cell = summarise(run_episodes(vec, jobs, pointer.decide, f"{family} {split}"))
        results[f"{family} {split}"] = cell
        low, high = percent(cell["low"]), percent(cell["high"])
        won = percent(cell["success"])
        print(f"{family} {split}: {won} % of {cell['n']} ({low} - {high})", flush=True)
    write_json(Path(cfg.out, "eval_nsvla.json"), results)


def main(argv: Sequence[str] | None = None) -> None:
    run_program(work, parse_config(PlanConfig, {}, sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
