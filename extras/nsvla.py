"""NS-VLA's parts on a trained policy: a plan with a pointer, and an expert that sees the top-K visual tokens.

    python -m extras.nsvla --run=out/small                                           # plan and pointer
    python -m extras.nsvla --run=out/small --plan=free --solver_steps=800 --top_k=4  # the expert
    python -m extras.nsvla --run=out/small --plan=free --solver_steps=800            # its control

NS-VLA (arXiv 2603.09542) writes a plan of primitives once. A classifier on features of the frozen VLM says
which primitive a picture shows, and a pointer follows the plan: at every look it stays or advances, never
back. Here the primitives of a leg are to fetch its cube and to carry it. The plan is what the first reasoning
names; the policy goes on writing where things are.

NS-VLA's solver, which makes the actions, also gets the visual tokens that are most like what the primitive
asks for. Here a new adapter and a new expert learn on the frozen VLM, from the feature query states and from
those tokens.

Read it in this order: split_reasoning, PlanPointer, learn, Extractor, Solver.
"""

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm, trange

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
from model import Projection, SyVLA, Visual, checkpoint_folder, load_policy
from sim_env import FAMILIES, SEEDS, SPLITS
from train import TrainConfig, learning_rate, make_optimizers, to_device

STATES = ("at", "in hand", "there")  # of a leg's cube: to be fetched, being carried, done
CUBE = re.compile(rf"(?<= cube )({'|'.join(STATES)})")
GATE_WIDTH = 0.5  # of the soft gate, in cosines
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
    plan: str = opt("pointer", "free: its own words at every look", ("pointer", "free"))
    replan: bool = opt(True, "make the plan anew where the policy sees the cube elsewhere")
    solver_steps: int = opt(0, "steps of a new adapter and expert; 0: the policy's own", "[0, 1000000]")
    top_k: int = opt(
        0,
        "visual tokens that the new expert gets beside the query states (NS-VLA: one in eight)",
        "[0, 1024]",
    )
    eval: int = opt(100, "episodes per family and split", "[1, 1000000]")
    families: str = opt(",".join(FAMILIES), "task families", FAMILIES, many=True)
    splits: str = opt("id", "kinds of scenes, with commas", SPLITS, many=True)
    seeds: str = opt("report", "scenes; val: to choose between policies", ("report", "val"))
    seed: int = opt(0, "seed of the head", "[0, 4294967295]")
    threads: int = opt(0, "CPU threads; 0 lets torch choose", "[0, 1024]")

    def __post_init__(self):
        check_options(self)
        if self.top_k and not self.solver_steps:
            raise UserError("--top_k is for a new expert: add --solver_steps=800")


def split_reasoning(text: str) -> list[tuple[str, int]]:
    """What a reasoning says of each leg it names: [(the text up to its cube's state, the state), ...].

    "first , blue pad at t3 , red cube there , then , green pad at t8 , lime cube in hand" -> the texts up to
    "red cube " and up to "lime cube ", with states 2 and 1.
    """
    return [(text[: match.start()], STATES.index(match[1])) for match in CUBE.finditer(text)]


class PlanPointer:
    """A policy with a head, and what run_episodes() asks of it. Its extras are (reasoning, doubts)."""

    def __init__(self, policy: SyVLA, env: str = "sim", free: bool = False, replan: bool = True):
        self.policy = policy
        self.solver = None  # a Solver in place of the policy's expert
        self.free = free
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
            if self.free or not said or (self.replan and doubts[row] >= DOUBTS):
                beginnings.append("")  # a plan, made freely
                continue
            ahead = int(shown[row, now : now + 2].argmax())  # stay, or advance by one
            beginnings.append(said + STATES[now + ahead])
        prompts = list(map(self.ids, obs["task"], beginnings))
        limit = policy.cfg.max_reasoning_tokens
        written, query_states = policy.vlm.generate(visual, prompts, tokenizer.end_reasoning, limit, True)
        texts = [f"{said} {tokenizer.decode(ids)}".strip() for said, ids in zip(beginnings, written)]
        self.looks += 1
        actor = policy
        if self.solver is not None:
            actor = self.solver.actor
            query_states = self.solver.states(query_states, visual)
        chunk = actor.plan(query_states, state, self.looks)  # (n, H, A)
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


class Extractor(nn.Module):
    """Of the visual tokens those that are most like what the primitive asks for.

    What it asks for is read off the mean query state, which has seen the words that name the primitive.
    """

    def __init__(self, width: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.query = Projection(width, width)
        self.key = Projection(width, width)

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Query states (B, Q, D), visual tokens (B, P, D) -> the best tokens (B, K, D).

        A soft gate, half open at the K-th best, weighs them, which teaches the layers what to ask for. NS-VLA
        trains on all tokens so weighed: an expert that learnt so fails on the K that it gets later.
        """
        query = F.normalize(self.query(states.mean(1)), dim=-1)  # (B, D)
        key = F.normalize(self.key(tokens), dim=-1)  # (B, P, D)
        score = (key @ query[..., None])[..., 0]  # (B, P) cosines
        best, which = score.topk(self.top_k)  # (B, K)
        gate = torch.sigmoid((best - best[:, -1:]) / GATE_WIDTH)  # (B, K)
        return gate[..., None] * tokens.take_along_dim(which[..., None], dim=1)


class Solver(nn.Module):
    """A new adapter and expert on a policy's VLM, which stays as it is."""

    def __init__(self, policy: SyVLA, top_k: int):
        super().__init__()
        policy.vlm.requires_grad_(False)
        cfg = replace(policy.cfg, queries=policy.cfg.queries + top_k)
        self.actor = SyVLA(cfg, policy.tokenizer, policy.vlm).to(policy.action_low.device)
        for ours, theirs in zip(self.actor.buffers(), policy.buffers()):
            ours.copy_(theirs)  # the scale of states and actions
        self.extractor = None
        if top_k:
            self.extractor = Extractor(cfg.width, top_k).to(policy.action_low.device)

    def states(self, query_states: Tensor, visual: Visual) -> Tensor:
        """Query states (B, Q, D) -> all that the expert gets (B, Q + K, D)."""
        if self.extractor is None:
            return query_states
        tokens = self.extractor(query_states, visual.tokens.flatten(1, 2))  # (B, K, D)
        return torch.cat((query_states, tokens), dim=1)


def learn_solver(solver: Solver, episodes: Episodes, cfg: PlanConfig) -> None:
    """Train adapter, expert and extractor on demonstrations, by the recipe of train.py."""
    recipe = TrainConfig(ground_steps=0, steps=cfg.solver_steps)
    optimizers = make_optimizers(solver, recipe)
    vlm = solver.actor.vlm
    solver.train()
    for step in trange(cfg.solver_steps, desc="expert", disable=None):
        rng = np.random.default_rng([cfg.seed, step])
        batch = episodes.batch(solver.actor.tokenizer, rng, recipe.batch_size)
        batch = to_device(batch, vlm.queries.device)
        with torch.no_grad():
            visual = vlm.encode_images(batch["images"])
            text = (batch[name] for name in ("tokens", "segments", "positions"))
            query_states = vlm(visual, *text, with_queries=True).queries  # (B, Q, D)
        batch["query_states"] = solver.states(query_states, visual)
        solver.actor(batch)["action"].backward()
        nn.utils.clip_grad_norm_(solver.parameters(), recipe.max_grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, recipe)
            optimizer.step()
            optimizer.zero_grad()
    solver.eval()


def work(cfg: PlanConfig) -> None:
    """Train the head, and a new expert if asked for, then play."""
    fast_cpu(cfg.threads)
    device, *_ = choose_device("auto")
    policy = load_policy(checkpoint_folder(cfg.run), device)
    if not policy.cfg.reasoning:
        raise UserError(f"{cfg.run} does not reason: there is no plan to follow")
    size = policy.cfg.image_size
    blank = torch.zeros(1, len(policy.cfg.camera_names), size, size, 3, dtype=torch.uint8, device=device)
    n_tokens = policy.vlm.encode_images(blank).tokens.flatten(1, 2).shape[1]
    if cfg.top_k > n_tokens:
        raise UserError(
            f"--top_k={cfg.top_k}, but {cfg.run} has {n_tokens} visual tokens: type a smaller number"
        )
    pointer = PlanPointer(policy, free=cfg.plan == "free", replan=cfg.replan)
    episodes = Episodes(cfg.data, policy.cfg, cfg.families.split(","))
    if not all(any(split_reasoning(text) for _, text in e["reason"]) for e in episodes.episodes):
        raise UserError(f"{cfg.data} has episodes whose reasoning names no leg; choose a set of prepare.py")
    results = {}
    if cfg.plan == "pointer":
        accuracy = learn(pointer, episodes, cfg)
        print(f"head: {percent(accuracy)} % of held-out frames")
        results["head"] = accuracy
    if cfg.solver_steps:
        torch.manual_seed(cfg.seed)  # its weights are drawn here
        pointer.solver = Solver(policy, cfg.top_k)
        learn_solver(pointer.solver, episodes, cfg)
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
