"""Imitation: one command from nothing to a policy with a success table.

    python train.py --config small                                        # data if missing, grounding, actions, evaluation
    python train.py --config small --resume                               # go on after a kill, to the same bits
    python train.py --config small --stage=finetune --init_from=out/small --families=sequence --out=out/seq
    torchrun --standalone --nproc_per_node=2 train.py --config small      # same global batch, split over processes
    python train.py --config base --data=data/small                       # on a pretrained VLM (pip install tokenizers)
    python train.py --config paper --data=data/small --plan               # parameters, predicted memory and work; trains nothing

Stage `pretrain` has two phases.  1. Grounding: only questions about pictures (packed and isolated), because from random
weights the obstacle is what the words mean, not control.  2. Actions: demonstrations with their chain of thought, and ~30 %
of the samples still questions.  Stage `finetune` is phase 2 alone, from the weights of --init_from.

A pretrained backbone fixes the model's shapes. Before its weights are fetched the peak memory is predicted and compared with the
device's. Tokens of a frozen vision tower are computed anew each time: on disk they would take 10 times the room of the pictures.

What is left out on purpose: data loader workers (a batch takes 2 ms), DistributedDataParallel (gradients are averaged in one
call), GradScaler (bf16 needs none), schedulers as objects (`learning_rate` is a function of the step).
"""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import model as model_module
from data import Episodes, Questions, Tokenizer
from model import (
    Config,
    SyVLA,
    fast_cpu,
    fetch_backbone,
    opt,
    parse_config,
    read_checkpoint_config,
)


@dataclass
class TrainConfig(Config):
    cameras: str = opt("", "camera roles, in the order the model sees them (default: the data set's)")
    motors: str = opt("", "what an action moves, in order (default: the data set's)")
    config: str = opt("small", "preset this run started from")
    data: str = opt("", "data set folder (default data/<config>)")
    out: str = opt("", "run folder (default out/<config>)")
    stage: str = opt("pretrain", "pretrain (grounding, then actions) or finetune (actions, from --init_from)")
    init_from: str = opt("", "checkpoint folder whose weights and tokenizer start this run")
    new_expert: bool = opt(
        False,
        "finetune: keep the VLM of --init_from as it is; a new adapter and expert, of any size, learn from random weights",
    )
    resume: bool = opt(False, "go on with the run in --out")
    env: str = opt("sim", "where to evaluate: sim, or an environment package.module:Class")
    families: str = opt("place,calculate,sequence", "task families to train on and evaluate")
    ground_steps: int = opt(1800, "steps of phase 1, questions only")
    steps: int = opt(4900, "steps of phase 2, actions")
    batch_size: int = opt(64, "samples (pictures) per step over all processes")
    mix: float = opt(0.3, "share of question samples in phase 2 (paper: ~30 %); 0 turns mixed data off")
    question_tokens: int = opt(64, "room for questions packed behind one picture, tokens")
    accumulate: int = opt(1, "micro-batches per step and process")
    adam_lr: float = opt(
        2e-3, "AdamW learning rate: embeddings, norms, biases, everything not a block matrix"
    )
    muon_lr: float = opt(
        4e-3, "Muon learning rate: the matrices of Transformer blocks, connector and adapter"
    )
    backbone_lr: float = opt(
        0.0, "with the next two: AdamW for all, this rate for the VLM; 0 keeps the two rates above"
    )
    bridge_lr: float = opt(0.0, "rate of feature queries and adapter")
    expert_lr: float = opt(0.0, "rate of the action expert")
    freeze_vision: bool = opt(False, "leave the vision tower as it is (SmolVLM's connector still learns)")
    checkpointing: bool = opt(
        False, "keep only every block's input and compute the rest twice: less memory, a third more work"
    )
    warmup: int = opt(50, "steps of linear warmup of each phase")
    weight_decay: float = opt(0.01, "decoupled weight decay on matrices")
    clip: float = opt(1.0, "gradient norm limit")
    ema: float = opt(0.995, "decay of the weight average that is saved, evaluated and run")
    ema_on_host: bool = opt(False, "keep that average in the host's memory, not the device's")
    seed: int = opt(0, "seed of weights, batches and noise")
    eval: int = opt(100, "closed-loop episodes per family and split at the end; 0 for none")
    device: str = opt("auto", "auto (cuda, then mps, then cpu), cpu, cuda, mps")
    threads: int = opt(0, "CPU threads; 0 lets torch choose")
    compile: bool = opt(False, "torch.compile the model (pays off on long GPU runs)")
    log_every: int = opt(25, "steps between log lines")
    save_every: int = opt(250, "steps between checkpoints")
    plan: bool = opt(
        False, "print parameters, predicted memory and work, and stop: needs no data and no weights"
    )
    bench: bool = opt(False, "time 20 steps of each phase by part, print the split and stop")

    def __post_init__(self):
        super().__post_init__()
        self.data, self.out = self.data or f"data/{self.config}", self.out or f"out/{self.config}"
        meta = Path(self.data, "meta.json")
        robot = (
            json.loads(meta.read_text()) if meta.is_file() else {}
        )  # a set that is still to be made will be the SO-100's
        for name in ("cameras", "motors", "state"):
            setattr(self, name, getattr(self, name) or ",".join(robot.get(name, ())) or getattr(Config, name))
        if self.stage not in ("pretrain", "finetune"):
            raise ValueError(f"stage must be pretrain or finetune, not {self.stage!r}")
        if self.stage == "finetune":
            self.ground_steps = 0
            if not self.init_from and not self.resume:
                raise ValueError("stage finetune needs weights to start from: add --init_from=out/small")
        if self.new_expert and self.stage != "finetune":
            raise ValueError(
                "a new expert needs a VLM that has learnt to see and think: add --stage=finetune --init_from=out/small"
            )
        if self.new_expert:
            self.mix = 0.0  # questions teach the VLM, and it stays as it is
        if len({rate > 0 for rate in (self.backbone_lr, self.bridge_lr, self.expert_lr)}) > 1:
            raise ValueError("backbone_lr, bridge_lr and expert_lr are given together or not at all")
        for name in ("batch_size", "accumulate", "warmup", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if (
            min(self.ground_steps, self.steps, self.eval, self.threads) < 0
            or self.ground_steps + self.steps == 0
        ):
            raise ValueError(
                "ground_steps, steps, eval and threads count things: 0 or more, and at least one step"
            )
        if not 0 < self.ema < 1:
            raise ValueError(f"ema ({self.ema}) must lie in (0, 1)")
        if not 0 <= self.mix < 1:
            raise ValueError(f"mix ({self.mix}) must lie in [0, 1)")


PRESETS = {
    "debug": dict(
        model_module.PRESETS["debug"],
        families="place",
        ground_steps=2,
        steps=2,
        batch_size=4,
        question_tokens=40,
        eval=0,
        log_every=1,
        warmup=1,
    ),
    "tiny": dict(model_module.PRESETS["tiny"], families="tiny", ground_steps=0, steps=500, mix=0.0),
    "small": dict(model_module.PRESETS["small"]),
}


# Grounding goes from easy to hard. To name what lies where, a model only has to look at fixed places: the pads' colours are
# learnt in a hundred steps. Then places can be found by colour, first the pads' and then the smaller cubes', and only then can
# instructions be read. All at once takes far longer, and cubes before pads keeps the pads from being found by colour at all.
# Each lesson starts at a share of grounding; None: every kind of question.
LESSONS = (
    (0.0, ("describe pads",)),
    (0.06, ("describe pads", "pad", "pad colour")),
    (0.2, ("describe pads", "pad", "pad colour", "describe cubes")),
    (0.4, ("pad", "describe cubes", "where")),
    (0.75, None),
)


def lesson(step, cfg):
    """The kinds of question that a step of training may ask; after grounding all of them."""
    return [kinds for start, kinds in LESSONS if step >= start * cfg.ground_steps][-1]


# ---------------------------------------------------------------------------------------------------------------
# Optimisation


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by a Newton-Schulz iteration (Jordan et al. 2024), for weight matrices.

    torch.optim.Muon goes matrix by matrix in bf16; here equal shapes share one batched fp32 iteration, which takes a third
    of the time on a CPU (77 against 255 ms a step for `small`, a fifth of the whole step). Updates are scaled to AdamW's RMS.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                grads, buffers = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
                update = orthogonalise(torch.stack(nesterov)) * (0.2 * max(shape) ** 0.5)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"])


def orthogonalise(g, steps=5):
    """(n, rows, columns) -> matrices of the same singular vectors with singular values near 1 (quintic Newton-Schulz)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(policy, cfg):
    """Muon on the matrices inside blocks, the connector and the adapter; AdamW on the rest, without decay on vectors.

    With rates for backbone, bridge and expert: AdamW alone, as the pretrained weights are used to.
    """
    trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    if cfg.backbone_lr:
        groups = [
            {"params": [], "weight_decay": cfg.weight_decay * (i % 2 == 0)} for i in range(6)
        ]  # matrices, vectors of each part
        for name, p in trained:
            part = 1 if name.startswith(("vlm.queries", "adapter")) else 2 if name.startswith("expert") else 0
            groups[2 * part + (p.ndim < 2)]["params"].append(p)
        return [torch.optim.AdamW(groups, lr=cfg.backbone_lr, betas=(0.9, 0.95), fused=True)]
    muon, matrices, vectors = [], [], []
    for name, p in trained:
        if (
            p.ndim == 2
            and any(part in name for part in ("blocks", "connector", "adapter"))
            and "modulate" not in name
        ):
            muon.append(p)
        else:
            (vectors if p.ndim < 2 or "gain" in name else matrices).append(p)
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [
        Muon(muon, cfg.muon_lr, cfg.weight_decay),
        torch.optim.AdamW(groups, lr=cfg.adam_lr, betas=(0.9, 0.95), fused=True),
    ]


def peak_rates(cfg):
    """Peak learning rate of every group of every optimizer that make_optimizers returns."""
    if cfg.backbone_lr:
        return [[rate for rate in (cfg.backbone_lr, cfg.bridge_lr, cfg.expert_lr) for _ in range(2)]]
    return [[cfg.muon_lr], [cfg.adam_lr, cfg.adam_lr]]


def learning_rate(step, cfg):
    """Factor on the learning rates: each phase warms up linearly and decays along a cosine (grounding to a half, actions to 0)."""
    start, length, floor = (
        (0, cfg.ground_steps, 0.5) if step < cfg.ground_steps else (cfg.ground_steps, cfg.steps, 0.0)
    )
    done = (step - start) / length
    warm = min(1.0, (step - start + 1) / cfg.warmup)
    return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def save_policy(folder, policy, config, state=None):
    """What running a policy needs: weights with statistics, config (a dict that holds at least the model's fields), tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not all(torch.isfinite(v).all() for v in (state or policy.state_dict()).values()):
        raise FloatingPointError(
            f"non-finite weights; the last checkpoint in {folder} is untouched. Lower the learning rates, then --resume"
        )
    if policy.cfg.wrapped:
        policy.vlm.config.save_pretrained(folder / "backbone")
        policy.vlm.processor.save_pretrained(folder / "backbone")
    for left in folder.glob(".tmp*"):  # safetensors writes under such a name, and a kill leaves it there
        left.unlink()
    write_atomically(folder / "tokenizer.json", lambda path: path.write_text(policy.tokenizer.dumps()))
    write_atomically(folder / "model.safetensors", lambda path: policy.save_weights(path, state))
    write_atomically(
        folder / "config.json",
        lambda path: path.write_text(json.dumps(config | {"torch": torch.__version__}, indent=1)),
    )


def save_checkpoint(folder, policy, ema, optimizers, step, cfg):
    """The policy (EMA weights) and train_state.pt (raw weights but frozen ones, EMA, optimizers, step: all that a resume needs)."""
    save_policy(folder, policy, asdict(cfg), policy.state_dict() | ema)
    frozen = {name for name, p in policy.named_parameters() if not p.requires_grad}
    state = {
        "step": step,
        "model": {k: v for k, v in policy.state_dict().items() if k not in frozen},
        "ema": ema,
        "optimizers": [o.state_dict() for o in optimizers],
    }
    write_atomically(Path(folder) / "train_state.pt", lambda path: torch.save(state, path))


@contextlib.contextmanager
def averaged_weights(policy, ema):
    """Inside, the policy carries its EMA weights."""
    raw = {k: v.clone() for k, v in policy.state_dict().items() if k in ema}
    policy.load_state_dict(ema, strict=False)
    try:
        yield policy
    finally:
        policy.load_state_dict(raw, strict=False)


@contextlib.contextmanager
def evaluating(policy):
    """Evaluation mode (transformers refuses to cache in training mode with checkpointing), fp32 but where frozen weights were rounded to bf16."""
    rounded = any(p.dtype == torch.bfloat16 for p in policy.parameters())
    policy.eval()
    try:
        with (
            torch.autocast(policy.vlm.queries.device.type, torch.bfloat16)
            if rounded
            else contextlib.nullcontext()
        ):
            yield
    finally:
        policy.train()


# ---------------------------------------------------------------------------------------------------------------
# Training


def make_data(cfg):
    """Run prepare.py if the data set is missing (it resumes what a kill left unfinished)."""
    if not (Path(cfg.data) / "meta.json").is_file():
        preset = "small" if cfg.backbone else cfg.config
        if cfg.data != f"data/{preset}":
            raise FileNotFoundError(
                f"no data set in {cfg.data}; run: python prepare.py --config {preset} --out={cfg.data}"
            )
        print(f"no data set in {cfg.data} yet: running prepare.py --config {preset}")
        command = [sys.executable, Path(__file__).with_name("prepare.py"), "--config", preset]
        if subprocess.run(command).returncode:
            raise RuntimeError(f"prepare.py failed; run: python prepare.py --config {preset}")


# What may differ from the checkpoint that a run starts from: behaviour, not weights.
FREE = {
    "execute",
    "denoise_steps",
    "temperature",
    "max_thought",
    "reasoning",
    "decouple",
    "decouple_percentile",
    "decouple_scope",
    "decouple_samples",
    "noise_samples",
}


# What besides may differ with --new_expert.
EXPERT = {"motors", "state", "expert_width", "expert_depth", "expert_heads", "chunk", "stale", "committed"}


# What a --resume may change: things that the result does not depend on, and what one lengthens or calms a run with.
HARMLESS = {
    "config",
    "data",
    "out",
    "env",
    "resume",
    "init_from",
    "device",
    "threads",
    "compile",
    "ema_on_host",
    "plan",
    "bench",
    "eval",
    "log_every",
    "save_every",
}
ADJUSTABLE = {"ground_steps", "steps", "adam_lr", "muon_lr"}


def check_resume(cfg, saved, harmless, adjustable, say):
    """A resumed run must be the run that was begun, with the settings `saved`: refuse others, point out adjusted ones."""
    for name, value in asdict(cfg).items():
        begun = saved.get(name, value)
        if name in adjustable and begun != value:
            say(f"{cfg.out} was begun with --{name}={begun} and goes on with {value}")
        elif name not in harmless and begun != value:
            raise ValueError(f"{cfg.out} was begun with {name} {begun}, not {value}; add --{name}={begun}")


def freeze(policy, cfg):
    """--freeze_vision, --new_expert and --checkpointing. (--lora has frozen the language model already: it changes the weights' names.)"""
    if cfg.new_expert:
        policy.vlm.requires_grad_(False)
    if cfg.freeze_vision:
        for parameter in policy.vlm.parts()["vision"]:
            parameter.requires_grad_(False)
        if not cfg.wrapped:
            policy.vlm.vision.connector.requires_grad_(True)
    if cfg.checkpointing and cfg.wrapped:
        policy.vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.vlm.model.train()  # from_pretrained left it in evaluation mode, in which nothing is checkpointed
    elif cfg.checkpointing:
        policy.vlm.vision.checkpointing = policy.vlm.lm.checkpointing = True


def build(cfg, device):
    """-> policy, episodes, questions (training), questions (held out)."""
    families = cfg.families.split(",")
    episodes = Episodes(cfg.data, cfg, families)
    if (cfg.mix > 0 or cfg.ground_steps > 0) and not Path(cfg.data, "questions").is_dir():
        raise FileNotFoundError(
            f"{cfg.data} has no questions; add --mix=0 and --ground_steps=0 to train on actions alone"
        )
    questions = Questions(f"{cfg.data}/questions", cfg) if cfg.mix > 0 or cfg.ground_steps > 0 else None
    held_out = (
        Questions(f"{cfg.data}/questions_val", cfg) if Path(cfg.data, "questions_val").is_dir() else None
    )
    if cfg.init_from and not cfg.resume:
        saved = Config.pick(read_checkpoint_config(cfg.init_from))
        for name in (
            f.name for f in fields(Config) if f.name not in (FREE | EXPERT if cfg.new_expert else FREE)
        ):
            if getattr(saved, name) != getattr(cfg, name):
                raise ValueError(
                    f"{cfg.init_from} has {name} {getattr(saved, name)}, this run {getattr(cfg, name)}; add --{name}={getattr(saved, name)}"
                )
    folder = None  # where the backbone lies
    if cfg.resume or cfg.init_from:
        tokenizer = Tokenizer.load(cfg.out if cfg.resume else cfg.init_from)
        folder = Path(cfg.out if cfg.resume else cfg.init_from, "backbone")
    elif cfg.backbone:
        folder = fetch_backbone(cfg.backbone)
        tokenizer = Tokenizer.load(folder)
    else:
        tokenizer = Tokenizer.train(
            episodes.texts() + (questions.texts() if questions else []), cfg.vocab_size
        )
    for asked in filter(None, (questions, held_out)):
        asked.drop_long(tokenizer)
    torch.manual_seed(cfg.seed)
    policy = SyVLA(
        cfg, tokenizer, folder, pretrained=bool(cfg.backbone) and not (cfg.resume or cfg.init_from)
    )
    freeze(policy, cfg)
    policy = shrink(policy, torch.device(device)).to(device)
    policy.set_statistics(episodes.meta["statistics"])
    if cfg.init_from and not cfg.resume:
        statistics = {k: v.clone() for k, v in policy.state_dict().items() if k.endswith(("_low", "_high"))}
        policy.load_weights(
            os.path.join(cfg.init_from, "model.safetensors"), "vlm." if cfg.new_expert else ""
        )
        if not torch.isfinite(policy.state_low).all():
            raise ValueError(
                f"{cfg.init_from} has no normalisation statistics; choose a checkpoint that train.py wrote"
            )
        if cfg.stage == "pretrain":
            policy.load_state_dict(
                policy.state_dict() | statistics
            )  # fine-tuning keeps the scale its expert learnt
    return policy, episodes, questions, held_out


def keep_states(cfg, policy, episodes, autocast, say):
    """--new_expert: the VLM does not learn, so what it makes of a frame is computed once and kept beside the data."""
    path = Path(cfg.data, f"states_{policy.fingerprint(cfg.cameras, cfg.reasoning)}.npy")
    need = 2 * cfg.queries * cfg.width * len(episodes.state)
    there = path.is_file()
    if (
        not os.access(path if there else cfg.data, os.W_OK)
        or not there
        and shutil.disk_usage(cfg.data).free < need
    ):
        return say(
            f"the VLM is frozen, but what it makes of a frame cannot be kept: {cfg.data} is read-only or has less than {need / 2**20:.0f} MiB free; a step takes longer"
        )

    @torch.no_grad()
    def see(batch):
        with autocast():
            batch = {k: v.to(policy.vlm.queries.device) for k, v in batch.items()}
            return policy.vlm(
                policy.vlm.see(batch["images"]),
                *(batch[k] for k in ("tokens", "segments", "positions")),
                True,
            )[1].float()

    episodes.freeze(path, (cfg.queries, cfg.width), see)
    say(f"the VLM is frozen: what it makes of a frame is kept in {path}, up to {need / 2**20:.0f} MiB")


def batches(step, cfg, policy, episodes, questions, rank, world, device):
    """The micro-batches of one step: a list of lists of (loss weight, batch dict)."""
    grounding = step < cfg.ground_steps
    n_questions = cfg.batch_size if grounding else round(cfg.batch_size * cfg.mix)
    n_actions = cfg.batch_size - n_questions
    parts = world * cfg.accumulate
    for name, n in (("question", n_questions), ("action", n_actions)):
        if n % parts:
            raise ValueError(
                f"{n} {name} samples do not divide by {world} processes x {cfg.accumulate} micro-batches; change --batch_size, --mix or --accumulate"
            )
    micro = []
    for i in range(cfg.accumulate):
        rows = slice(
            rank * cfg.accumulate + i, None, parts
        )  # every part draws the same global batch and takes its own rows
        pair = []
        if n_questions:
            pair.append(
                questions.batch(
                    policy.tokenizer,
                    np.random.default_rng([cfg.seed, step, 0]),
                    n_questions,
                    cfg.question_tokens,
                    lesson(step, cfg),
                    rows,
                )
            )
        if n_actions:
            pair.append(
                episodes.batch(policy.tokenizer, np.random.default_rng([cfg.seed, step, 1]), n_actions, rows)
            )
        micro.append([{k: v.to(device, non_blocking=True) for k, v in batch.items()} for batch in pair])
    return micro


def average_gradients(policy, world):
    """One all-reduce over all gradients; parameters without one (the expert, in grounding) take part as zeros."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world
    for p, g in zip(trained, flat.split([g.numel() for g in grads])):
        if p.grad is not None:
            p.grad.copy_(g.view_as(p))


def train_step(step, cfg, policy, run, optimizers, micro, world, autocast):
    """Forward, backward, clip, update. -> {"text", "action", "kept", "gnorm"} as floats. Raises FloatingPointError on non-finite numbers."""
    logs = defaultdict(float)
    for pair in micro:
        loss = 0.0
        for batch in pair:
            with autocast():
                losses = run(batch)
            # text of questions and text of thoughts weigh the same as the action loss each
            loss = loss + sum(losses[k] for k in ("text", "action") if k in losses)
            for k, v in losses.items():
                logs[("question" if k == "text" and "action" not in losses else k)] += v.item() / len(micro)
        (loss / len(micro)).backward()
        policy.mark("backward")
    if world > 1:
        average_gradients(policy, world)
    parameters = [p for p in policy.parameters() if p.grad is not None]
    logs["gnorm"] = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip).item()
    if not all(math.isfinite(v) for v in logs.values()):
        raise FloatingPointError(
            f"non-finite number at step {step}: {dict(logs)}; the last checkpoint is untouched. Lower the learning rates, then --resume"
        )
    factor = learning_rate(step, cfg)
    for optimizer, rates in zip(optimizers, peak_rates(cfg)):
        for group, lr in zip(optimizer.param_groups, rates):
            group["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    policy.mark("optimizer")
    return logs


def bench(cfg, policy, run, episodes, questions, optimizers, device, autocast):
    """--bench: milliseconds per step by part, for both phases."""
    for name, first in (("grounding", cfg.ground_steps - 1), ("actions", cfg.ground_steps)):
        if first >= 0 and (name == "grounding" or cfg.steps > 0):
            watch = Stopwatch(device)
            for i in range(25):
                if i == 5:  # the first steps warm up
                    watch.seconds.clear()
                policy.mark = watch.mark
                micro = batches(
                    first + i if name == "actions" else first, cfg, policy, episodes, questions, 0, 1, device
                )
                watch.mark("data")
                train_step(first, cfg, policy, run, optimizers, micro, 1, autocast)
            total = sum(watch.seconds.values())
            split = " | ".join(
                f"{k} {v / 20 * 1e3:.0f} ms ({v / total:.1%})" for k, v in watch.seconds.items()
            )
            print(
                f"{name}: {total / 20 * 1e3:.0f} ms a step, {20 * cfg.batch_size / total:.0f} samples/s | {split}"
            )


def main(argv=None):
    explain_errors(train, parse_config(TrainConfig, PRESETS, sys.argv[1:] if argv is None else argv))


def train(cfg):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *a, **k: None
    fast_cpu(cfg.threads)
    device, autocast, why = choose_device(cfg.device)
    out = Path(cfg.out)
    if (out / "train_state.pt").is_file() and not (cfg.resume or cfg.bench or cfg.plan):
        raise ValueError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    if cfg.resume and not (out / "train_state.pt").is_file():
        raise FileNotFoundError(f"nothing to resume in {out}; leave --resume out")
    settle_backbone(cfg)
    if cfg.resume:
        check_resume(cfg, read_checkpoint_config(out), HARMLESS, ADJUSTABLE, say)
    foretell(cfg, device, world, say)
    if cfg.plan:
        return
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if cfg.eval:  # complain of a wrong name now, not after the training
        import sim_env

        sim_env.environment(cfg.env)
    if rank == 0:
        make_data(cfg)
    if world > 1:
        dist.barrier()
    began = time.time()
    policy, episodes, questions, held_out = build(cfg, device)
    optimizers = make_optimizers(policy, cfg)
    step, trainable = 0, {k: p for k, p in policy.named_parameters() if p.requires_grad}
    host = torch.device("cpu") if cfg.ema_on_host else device
    ema = {k: p.detach().to(host, copy=True) for k, p in trainable.items()}
    if cfg.resume:
        saved = torch.load(out / "train_state.pt", map_location=device, weights_only=True)
        if len(trainable) < len(list(policy.parameters())):
            policy.load_weights(out / "model.safetensors")  # what is frozen stands there alone
        policy.load_state_dict(saved["model"], strict=len(trainable) == len(list(policy.parameters())))
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        step, ema = saved["step"], {k: v.to(host) for k, v in saved["ema"].items()}
    say(" ".join(f"{k}={v}" for k, v in asdict(cfg).items()))
    say(f"torch {torch.__version__}, {device}, {why}, {torch.get_num_threads()} threads, {world} process(es)")
    say(
        f"{len(episodes.episodes)} episodes, {len(episodes)} frames"
        + (f", {len(questions.questions)} pictures with questions" if questions else "")
    )
    if cfg.new_expert:
        keep_states(cfg, policy, episodes, autocast, say)
    run = torch.compile(policy) if cfg.compile else policy
    if cfg.bench:
        return bench(cfg, policy, run, episodes, questions, optimizers, device, autocast)

    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:  # also when nothing is resumed: a kill before the first checkpoint leaves lines
        trim_log(out / "log.jsonl", "step", step)
    if rank == 0 and not cfg.resume:
        (out / "questions.json").unlink(missing_ok=True)
    report = lambda when: (
        report_questions(policy, ema, held_out, when, out, say) if held_out and rank == 0 else None
    )
    total = cfg.ground_steps + cfg.steps
    window, window_began, window_data = defaultdict(list), time.time(), 0.0
    first = step
    while step < total:
        if step == cfg.ground_steps:
            report("before action training")
            window_began = time.time()
        data_began = time.time()
        micro = batches(step, cfg, policy, episodes, questions, rank, world, device)
        window_data += time.time() - data_began
        logs = train_step(step, cfg, policy, run, optimizers, micro, world, autocast)
        decay = min(cfg.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach().to(host) for p in trainable.values()], 1 - decay)
        step += 1
        for k, v in logs.items():
            window[k].append(v)

        if rank == 0 and (step % cfg.log_every == 0 or step == total):
            n, now = len(window["gnorm"]), time.time()
            means = {k: sum(v) / len(v) for k, v in window.items()}
            speed = n * cfg.batch_size / (now - window_began)
            eta = (total - step) * (now - window_began) / n / 60
            phase = "grounding" if step <= cfg.ground_steps else "actions"
            numbers = " | ".join(
                f"{k} {means[k]:.4f}" for k in ("question", "text", "action", "kept", "gnorm") if k in means
            )
            say(
                f"step {step:06d}/{total:06d} {phase} | {numbers} | lr {learning_rate(step - 1, cfg):.3f} | {speed:.0f} samples/s | data {window_data / n * 1e3:.0f} ms | eta {eta:.1f} m",
                flush=True,
            )
            line = {
                "step": step,
                "phase": phase,
                **means,
                "lr": learning_rate(step - 1, cfg),
                "samples_per_s": speed,
                "data_ms": window_data / n * 1e3,
                "seconds": now - began,
            }
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            window, window_began, window_data = defaultdict(list), now, 0.0
        if rank == 0 and (step % cfg.save_every == 0 or step in (cfg.ground_steps, total)):
            if step == cfg.ground_steps:  # first, because a resume does not come by here again
                save_policy(out / "grounded", policy, asdict(cfg), policy.state_dict() | ema)
            save_checkpoint(out, policy, ema, optimizers, step, cfg)
    report("after action training" if cfg.steps else "before action training")
    say(f"trained {step - first} steps in {(time.time() - began) / 60:.1f} min")
    if (
        world > 1
    ):  # the others need not wait for the evaluation; gloo aborts one who hangs up while another is still busy
        dist.barrier()
        dist.destroy_process_group()
    if cfg.eval and rank == 0:
        evaluate(policy, ema, cfg, out, say)


def report_questions(policy, ema, held_out, when, out, say):
    """Held-out question accuracy, printed and kept in questions.json under `when`: the paper's forgetting test."""
    path = out / "questions.json"
    history = json.loads(path.read_text()) if path.is_file() else {}
    if when in history:  # a resumed run measured it already
        return
    with averaged_weights(policy, ema), evaluating(policy):
        result = held_out.accuracy(policy.answer)
    say(
        f"held-out questions {when}: "
        + ", ".join(f"{k} {v['accuracy']:.3f}" for k, v in result.items())
        + f" (n={result['all']['n']})",
        flush=True,
    )
    write_atomically(path, lambda p: p.write_text(json.dumps(history | {when: result}, indent=1)))


def evaluate(policy, ema, cfg, out, say):
    """Closed-loop success on held-out report seeds: eval.json and the printed table."""
    import sim_env

    there = sim_env.environment(cfg.env).families
    families = [family for family in cfg.families.split(",") if family in there]
    if not families:
        say(f"no evaluation: {cfg.families} is no task family of --env={cfg.env} ({', '.join(there)})")
        return
    with averaged_weights(policy, ema), evaluating(policy):
        results = sim_env.evaluate(policy, families, cfg.eval, env=cfg.env)
    write_atomically(out / "eval.json", lambda p: p.write_text(json.dumps(results, indent=1)))
    say(sim_env.table(results))


if __name__ == "__main__":
    main()
