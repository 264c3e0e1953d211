"""Imitation: one command from nothing to a policy with a success table.

    python train.py --config small                # data if missing, grounding, actions, evaluation
    python train.py --config small --resume       # go on after a kill, to the same bits
    python train.py --stage=finetune --init_from=out/small --families=sequence --out=out/sequence
    torchrun --standalone --nproc_per_node=2 train.py --config small    # same batches, split over processes
    python train.py --config base --data=data/small                     # on a pretrained VLM
    python train.py --config paper --data=data/small --plan             # memory and work; trains nothing

Stage `pretrain` has two phases. 1. Grounding: only questions about pictures, because from random weights the
obstacle is what the words mean, not control. 2. Actions: demonstrations with their chain of thought, and ~30
% of the samples still questions. Stage `finetune` is phase 2 alone, from the weights of --init_from.

Left out on purpose: data loader workers (a batch takes 2 ms), DistributedDataParallel (gradients are averaged
in one call), GradScaler (bf16 needs none), schedulers as objects (`learning_rate` is a function of the step).
"""

import contextlib
import copy
import math
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import evaluate
from common import (
    Stopwatch,
    UserError,
    append_log,
    atomic_path,
    check_readable,
    choose_device,
    claim_folder,
    claim_run,
    cpu_has_bf16,
    fast_cpu,
    has_bf16,
    join_processes,
    leave_processes,
    mark,
    opt,
    parse_config,
    print0,
    rank_and_world,
    read_checkpoint_config,
    read_json,
    resumed_config,
    run_child,
    run_program,
    trim_log,
    wait_for_all,
    write_json,
)
from data import Episodes, Questions, Tokenizer, data_id, open_images_of, read_meta
from model import Config, SyVLA, all_presets, checkpoint_folder, save_policy

TRAINING = ("not plan", "not bench")  # what options that need a training need, see common.check_needs()


@dataclass
class TrainConfig(Config):
    """The model's fields, and how it is trained."""

    # Where the run begins
    config: str = opt("small", "preset this run starts from")
    data: str = opt("", "data set folder (default data/<config>)")
    out: str = opt("", "run folder (default out/<config>)")
    stage: str = opt("pretrain", "finetune: actions alone, from --init_from", ("pretrain", "finetune"))
    init_from: str = opt("", "checkpoint folder, or a policy in one file, that starts this run")
    resume: bool = opt(False, "go on with the run in --out, with its settings")
    new_expert: bool = opt(
        False,
        "finetune: keep the VLM frozen; a new adapter and expert learn from random weights",
        needs="stage=finetune",
    )
    # What it learns from, and for how long
    env: str = opt("sim", "where to evaluate: sim, or an environment package.module:Class")
    families: str = opt("place,calculate,sequence", "task families to train on and to evaluate", many=True)
    ground_steps: int = opt(
        2200, "steps of phase 1, questions only", "[0, 1000000000]", needs="stage=pretrain"
    )
    steps: int = opt(4800, "steps of phase 2, actions", "[0, 1000000000]")
    batch_size: int = opt(64, "samples (pictures) per step over all processes", "[1, 65536]")
    mix: float = opt(
        0.3,
        "share of question samples in phase 2 (paper: ~30 %); 0: no mixed data",
        "[0, 1)",
        needs="not new_expert",
    )
    accumulate: int = opt(1, "micro-batches per step and process", "[1, 65536]")
    # How weights move
    adam_lr: float = opt(
        2e-3, "AdamW learning rate: embeddings, norms, biases, all but matrices of blocks", "(0, 1]"
    )
    muon_lr: float = opt(
        4e-3,
        "Muon learning rate: matrices of blocks, connector and adapter",
        "(0, 1]",
        needs="not backbone_lr",
    )
    backbone_lr: float = opt(
        0.0,
        "AdamW for all, this rate for the VLM and adam_lr for the rest; 0: Muon",
        "[0, 1]",
        needs="backbone|init_from",
    )
    freeze_vision: bool = opt(
        False, "leave the vision tower as it is; its connector still learns", needs="backbone|init_from"
    )
    checkpointing: bool = opt(
        False, "keep only every block's input: less memory, a third more work", needs="not new_expert"
    )
    seed: int = opt(0, "seed of weights, batches and noise", "[0, 4294967295]")
    # The machine, and what is told on the way
    eval: int = opt(
        100, "closed-loop episodes per family and split at the end; 0 for none", evaluate.EVAL, TRAINING
    )
    device: str = opt("auto", "auto (cuda, then mps, then cpu), cpu, cuda, mps")
    precision: str = opt(
        "auto", "of the arithmetic in training; auto: bf16 where the device has it", ("auto", "fp32", "bf16")
    )
    threads: int = opt(0, "CPU threads; 0 lets torch choose", "[0, 1024]")
    save_every: int = opt(250, "steps between checkpoints", "[1, 1000000000]", TRAINING)
    compile: bool = opt(False, "torch.compile the model (pays off on long GPU runs)")
    plan: bool = opt(False, "print parameters, predicted memory and work, and stop")
    bench: bool = opt(
        False, "time 20 steps of each phase by part, print the split and stop", needs="not plan"
    )

    # Set by presets
    question_tokens: int = opt(64, allowed="[1, 4096]")  # room for the questions packed behind one picture
    warmup: int = opt(50, allowed="[1, inf)")  # steps of linear warm-up of each phase
    weight_decay: float = opt(0.01, allowed="[0, 1]")  # decoupled, on matrices
    max_grad_norm: float = opt(1.0, allowed="(0, inf)")
    ema: float = opt(0.995, allowed="[0, 1)")  # decay of the weight average that is saved and run
    log_every: int = opt(25, allowed="[1, inf)")  # steps
    data_id: str = opt("")  # of the data set that the run was begun with

    def __post_init__(self):
        super().__post_init__()
        self.data = self.data or f"data/{self.config}"
        self.out = self.out or f"out/{self.config}"
        if self.stage == "finetune":
            self.ground_steps = 0
            if not self.init_from and not self.resume:
                raise UserError("--stage=finetune needs weights to start from: add --init_from=out/small")
        if self.new_expert:
            self.mix = 0.0  # questions teach the VLM, which is frozen
        if self.ground_steps + self.steps == 0:
            raise UserError("--ground_steps and --steps are both 0: there is nothing to train")

    @property
    def family_names(self) -> list[str]:
        return self.families.split(",")


# -----------------------------------------------------------------------------------------------------------
# One step: which samples, which loss, which update


@dataclass
class Run:
    """What a training consists of."""

    cfg: TrainConfig
    policy: SyVLA
    bf16_copy: SyVLA | None  # what a CPU with bf16 arithmetic computes on, see make_bf16_copy()
    forward: Callable  # the policy or its copy, perhaps compiled
    episodes: Episodes  # demonstrations
    questions: Questions | None  # None where nothing is asked
    held_out: Questions | None  # questions never trained on
    optimizers: list[torch.optim.Optimizer]  # Muon, if there is one, and AdamW
    ema: dict[str, Tensor]  # averages of the trained parameters
    device: torch.device
    autocast: Callable  # makes a context: bf16 where the device has it
    step: int = 0  # steps done


def samples_of_step(step: int, cfg: TrainConfig) -> tuple[int, int]:
    """How many question and action samples a step draws, over all processes."""
    n_questions = cfg.batch_size if step < cfg.ground_steps else round(cfg.batch_size * cfg.mix)
    return n_questions, cfg.batch_size - n_questions


def check_split(cfg: TrainConfig, world: int) -> None:
    """UserError, before any work, where a phase has fewer samples than processes times micro-batches."""
    # a small share of a small batch rounds to nothing
    if cfg.mix > 0 and not samples_of_step(cfg.ground_steps, cfg)[0]:
        raise UserError(
            f"--mix={cfg.mix} of --batch_size={cfg.batch_size} is not one question: raise one or add --mix=0"
        )
    parts = world * cfg.accumulate
    # the first step of each phase
    for step in {0, cfg.ground_steps}:
        for name, n in zip(("question", "action"), samples_of_step(step, cfg)):
            if 0 < n < parts:
                raise UserError(
                    f"{n} {name} samples are not enough for {world} processes x {cfg.accumulate} "
                    "micro-batches: change --batch_size, --mix or --accumulate"
                )


# A micro-batch: the weight of the loss and the batch, of questions, actions or both.
Micro = list[tuple[float, dict[str, Tensor]]]


def batches(run: Run, step: int) -> list[Micro]:
    """The micro-batches of one step, each a question batch, an action batch or both.

    A pure function of seed and step: every process draws the same global batch and takes its own rows of it.
    Where the rows do not divide, parts have different numbers of them. The weight (near 1) makes the mean
    over parts the mean over rows.
    """
    cfg = run.cfg
    tokenizer = run.policy.tokenizer
    rank, world = rank_and_world()
    parts = world * cfg.accumulate
    n_questions, n_actions = samples_of_step(step, cfg)
    micro = []
    for i in range(cfg.accumulate):
        # every parts-th row of the global batch is ours
        rows = slice(rank * cfg.accumulate + i, None, parts)
        weighted = []
        if n_questions:
            # not from the state of a generator: a resumed run draws the same
            rng = np.random.default_rng([cfg.seed, step, 0])
            batch = run.questions.batch(tokenizer, rng, n_questions, cfg.question_tokens, rows)
            weighted.append((n_questions, batch))
        if n_actions:
            rng = np.random.default_rng([cfg.seed, step, 1])
            weighted.append((n_actions, run.episodes.batch(tokenizer, rng, n_actions, rows)))
        # 1 where the rows divide by the parts
        for k, (n, batch) in enumerate(weighted):
            weight = len(range(n)[rows]) * parts / n
            weighted[k] = weight, to_device(batch, run.device)
        micro.append(weighted)
    return micro


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch with its tensors on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def train_step(run: Run, step: int, micro: list[Micro]) -> dict[str, float]:
    """Forward, backward, clip, update -> means over micro-batches of the losses, "kept" and "gnorm".

    Text of questions, text of reasoning and the action loss weigh the same. Raises UserError on non-finite
    numbers.
    """
    logs = defaultdict(float)  # name -> mean over the micro-batches
    # once a step: all of its micro-batches see the same weights
    if run.bf16_copy:
        round_weights(run.policy, run.bf16_copy)
    for weighted in micro:
        loss = 0.0
        for weight, batch in weighted:
            with run.autocast():
                losses = run.forward(batch)
            for name, value in losses.items():
                if name != "kept":  # a share, not a loss
                    loss = loss + weight * value
                # text without actions is that of questions
                if name == "text" and "action" not in losses:
                    name = "question"
                logs[name] += weight * value.item() / len(micro)
        # gradients of the micro-batches add up
        (loss / len(micro)).backward()
        # in fp32, so that small gradients are not lost beside large ones
        if run.bf16_copy:
            return_gradients(run.bf16_copy, run.policy)
        mark("backward")
    average_gradients(run.policy)
    # parameters without a gradient, as the expert's in grounding, are passed over
    norm = nn.utils.clip_grad_norm_(run.policy.parameters(), run.cfg.max_grad_norm)
    logs["gnorm"] = norm.item()
    # before the update, so that no weight has taken harm
    if not all(math.isfinite(value) for value in logs.values()):
        raise UserError(
            f"non-finite number at step {step}: {dict(logs)}; the last checkpoint is untouched: "
            "lower the learning rates in a new run"
        )
    factor = learning_rate(step, run.cfg)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    mark("optimizer")
    return logs


def make_bf16_copy(policy: SyVLA) -> SyVLA:
    """The policy with bf16 weights, for a CPU, which multiplies bf16 matrices two to four times as fast.

    Losses and gradients come from the copy, optimizers move the policy's fp32 weights (Micikevicius et al.
    2018). Autocast, which does so on GPUs, gains 8 % on a CPU: products with fp32 vectors are slow there.
    """
    bf16_copy = copy.deepcopy(policy)
    for p in bf16_copy.parameters():
        # convolutions take half the time if the colours of a pixel lie side by side
        layout = torch.channels_last if p.ndim == 4 else torch.contiguous_format
        p.data = p.data.to(torch.bfloat16, memory_format=layout)
    return bf16_copy


@torch.no_grad()
def round_weights(policy: SyVLA, bf16_copy: SyVLA) -> None:
    """Give the copy the policy's weights and statistics of now."""
    weights = policy.state_dict().values()
    torch._foreach_copy_(list(bf16_copy.state_dict().values()), list(weights))


def return_gradients(bf16_copy: SyVLA, policy: SyVLA) -> None:
    """Add the copy's gradients to those of the policy, in fp32, and clear them."""
    for rounded, p in zip(bf16_copy.parameters(), policy.parameters()):
        if rounded.grad is None:  # frozen, or of the expert in grounding
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad += rounded.grad
        rounded.grad = None


def average_gradients(module: nn.Module) -> None:
    """One all-reduce over all gradients; parameters without one, as the expert in grounding, are left out."""
    _, world = rank_and_world()
    if world == 1:
        return
    # the same parameters in all processes: in a phase either all have a gradient or none has
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    # one vector, so that one call does it
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= world  # the sum of all processes becomes the mean
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


def update_average(run: Run, step: int) -> None:
    """Move the weight average towards the weights; early in training it follows them closely."""
    # from 0.1 at the first step to cfg.ema
    decay = min(run.cfg.ema, (1 + step) / (10 + step))
    weights = dict(run.policy.named_parameters())
    # the average may stand on another device, see build()
    for name, average in run.ema.items():
        average.lerp_(weights[name].detach().to(average), 1 - decay)


# -----------------------------------------------------------------------------------------------------------
# Optimisation


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by a Newton-Schulz iteration, for weight matrices.

    Jordan et al. 2024. torch.optim.Muon goes matrix by matrix in bf16. Here equal shapes share one batched
    iteration, which takes a third of the time on a CPU, and a ninth in bf16.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,  # of the iteration
    ):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            # matrices of one shape are stacked
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self._step_one_shape(group, params)

    def _step_one_shape(self, group: dict, params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:  # the first step
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        # Nesterov: the gradient, mixed into the average once more
        nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
        update = orthogonalise(torch.stack(nesterov).to(self.dtype))  # (n, rows, columns)
        update = update.to(params[0].dtype) * (0.2 * max(params[0].shape) ** 0.5)  # as large as AdamW's steps
        # decay apart from the gradient, as in AdamW
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"])


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """(n, rows, columns) -> matrices with the same singular vectors and singular values near 1.

    A quintic Newton-Schulz iteration: x <- a x + b (x x^T) x + c (x x^T)^2 x.
    """
    # chosen by Jordan et al. for the steepest rise at small singular values
    a, b, c = 3.4445, -4.7750, 2.0315
    # the smaller of the two Gram matrices
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values of at most 1
    for _ in range(steps):
        gram = x @ x.mT  # (n, rows, rows)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(
    policy: SyVLA, cfg: TrainConfig, muon_dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of blocks, connector and adapter; AdamW on the rest, without decay on vectors.

    With --backbone_lr AdamW alone, as pretrained weights are used to. Every group keeps its peak rate as
    "peak". muon_dtype: of Muon's iteration.
    """
    muon = []
    groups = {}  # (rate, weight decay) -> group of AdamW
    for name, p in policy.named_parameters():
        if not p.requires_grad:
            continue
        # modulate: the adaLN numbers start at zero and are no map between features
        in_block = re.search("blocks|connector|adapter", name) and "modulate" not in name
        if p.ndim == 2 and in_block and not cfg.backbone_lr:
            muon.append(p)
            continue
        rate = cfg.adam_lr
        if cfg.backbone_lr and name.startswith("vlm.") and name != "vlm.queries":
            rate = cfg.backbone_lr
        decay = cfg.weight_decay
        if p.ndim < 2 or "gain" in name:  # a vector, or one a head
            decay = 0.0
        group = {"params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault((rate, decay), group)["params"].append(p)
    optimizers = [torch.optim.AdamW([*groups.values()], betas=(0.9, 0.95), fused=True)]
    if muon:
        optimizers.insert(0, Muon(muon, cfg.muon_lr, cfg.weight_decay, dtype=muon_dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Factor on the peak rates. Each phase warms up linearly and then follows a cosine.

    Grounding ends at a half of the peak, actions at 0.
    """
    length = cfg.ground_steps
    floor = 0.5
    if step >= length:  # steps of the action phase, counted from its beginning
        step -= length
        length = cfg.steps
        floor = 0.0
    warm = min(1.0, (step + 1) / cfg.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * step / length))
    return warm * (floor + (1 - floor) * cosine)


# -----------------------------------------------------------------------------------------------------------
# From a config to a run


def make_data(cfg: TrainConfig) -> None:
    """Run prepare.py if the data set of a preset is missing; it resumes what a kill left unfinished."""
    if Path(cfg.data, "meta.json").is_file():
        return
    # presets of pretrained backbones have no data set of their own
    preset = "small" if cfg.backbone else cfg.config
    command = f"python prepare.py --config {preset}"
    if cfg.data != f"data/{preset}":
        raise UserError(f"no data set in {cfg.data}; run: {command} --out={cfg.data}")
    print(f"no data set in {cfg.data} yet: running {command}", flush=True)
    program = Path(__file__).with_name("prepare.py")
    # a process of its own: the simulation's memory goes with it
    if run_child([sys.executable, program, "--config", preset]):
        raise UserError(f"prepare.py failed; run: {command}")


# Names of fields. What may differ from the checkpoint that a run starts from: behaviour, not weights.
BEHAVIOUR = (
    "n_action_steps denoise_steps temperature max_reasoning_tokens reasoning decouple decouple_percentile "
    "decouple_scope noise_samples"
)
# What a run with --new_expert does not take from there.
EXPERT = "motors state fps expert_width expert_depth expert_heads chunk_size stale"


def inherit_shapes(cfg: TrainConfig) -> None:
    """Take the model's fields of --init_from; typed ones may differ where they shape no weights."""
    saved = Config.read(cfg.init_from)
    # what a new expert chooses for itself
    own = EXPERT.split() if cfg.new_expert else ()
    for field in fields(Config):
        name = field.name
        value = getattr(saved, name)
        if name in own:
            continue
        if name not in cfg.typed:
            setattr(cfg, name, value)
        elif name not in BEHAVIOUR.split() and cfg.typed[name] != value:
            raise UserError(
                f"{cfg.init_from} has --{name}={value}, this run {cfg.typed[name]}; leave --{name} out"
            )


def describe_robot(cfg: TrainConfig) -> None:
    """Take cameras, motors, state and picture size of the data set, where no checkpoint has fixed them."""
    meta = read_meta(cfg.data)
    cfg.cameras = cfg.cameras or ",".join(meta["cameras"])
    cfg.fit = meta.get("fit", "")
    # a fine-tuned expert keeps the joints that it has learnt to move
    if not cfg.init_from or cfg.new_expert:
        cfg.motors = ",".join(meta["motors"])
        cfg.state = ",".join(meta.get("state", ()))
        cfg.fps = meta["fps"]
    # a camera that the set lacks is named where the pictures are opened
    if not cfg.init_from and cfg.camera_names[0] in meta["cameras"]:
        cfg.image_size = open_images_of(cfg.data, cfg.camera_names[0]).shape[1]
    # the picture may not fit the patches
    cfg.__post_init__()


def open_data(cfg: TrainConfig) -> tuple[Episodes, Questions | None, Questions | None]:
    """-> demonstrations, questions to train on, held-out questions."""
    episodes = Episodes(cfg.data, cfg, cfg.family_names)
    identity = data_id(episodes.meta)
    if cfg.resume and cfg.data_id != identity:
        raise UserError(f"{cfg.data} is another data set than {cfg.out} was begun with; choose a new --out")
    # both go into config.json: a resume compares the one, the real arm begins at the other
    cfg.data_id = identity
    cfg.home = episodes.home()
    questions = None
    if cfg.mix > 0 or cfg.ground_steps > 0:
        folder = Path(cfg.data, "questions")
        if not folder.is_dir():
            raise UserError(f"{cfg.data} has no questions; to go without, add --mix=0 and --ground_steps=0")
        questions = Questions(folder, cfg)
    held_out = Path(cfg.data, "questions_val")
    return episodes, questions, Questions(held_out, cfg) if held_out.is_dir() else None


def build(cfg: TrainConfig, device: torch.device, autocast: Callable = contextlib.nullcontext) -> Run:
    """Data, policy and optimizers of a config whose fields are settled, before the first step."""
    episodes, questions, held_out = open_data(cfg)
    start = cfg.out if cfg.resume else cfg.init_from  # a checkpoint folder, or ""
    # weights and feature queries are drawn from here on
    torch.manual_seed(cfg.seed)
    # the tokenizer, and a pretrained VLM where there is one, of the checkpoint that this run goes on from
    vlm = None
    if cfg.backbone:
        from extras.backbones import backbone_of_run

        tokenizer, vlm = backbone_of_run(cfg, start)
    elif start:
        tokenizer = Tokenizer.load(start)
    else:
        texts = episodes.texts()
        if questions:
            texts = texts + questions.texts()
        tokenizer = Tokenizer.train(texts, cfg.vocab_size)
    # texts that are too long: a task is the user's to shorten, a question can be spared
    episodes.check_tasks(tokenizer)
    for asked in filter(None, (questions, held_out)):
        asked.drop_long(tokenizer)
    policy = SyVLA(cfg, tokenizer, vlm)
    freeze(policy, cfg)
    # autocast would round frozen matrices at every step
    if cfg.backbone and has_bf16(device) and cfg.precision != "fp32":
        from extras.backbones import cast_frozen_to_bf16

        cast_frozen_to_bf16(policy)
    policy.to(device)
    policy.set_statistics(episodes.meta["statistics"])
    if cfg.init_from and not cfg.resume:
        start_from_checkpoint(policy, cfg, episodes)
    # a large model's average needs no room on the GPU
    host = "cpu" if cfg.backbone else device
    ema = {}
    for name, p in policy.named_parameters():
        if p.requires_grad:
            ema[name] = p.detach().to(host, copy=True)
    bf16_copy = make_bf16_copy(policy) if computes_on_bf16_copy(cfg, device) else None
    forward = bf16_copy or policy
    if cfg.compile:
        forward = torch.compile(forward)
    # Muon's iteration forgives rounding: its authors run it in bf16 everywhere
    optimizers = make_optimizers(policy, cfg, torch.bfloat16 if bf16_copy else torch.float32)
    return Run(
        cfg, policy, bf16_copy, forward, episodes, questions, held_out, optimizers, ema, device, autocast
    )


def computes_on_bf16_copy(cfg: TrainConfig, device: torch.device) -> bool:
    """Does a run compute on a bf16 copy of its weights? UserError where --precision cannot be had."""
    possible = device.type == "cpu" and cpu_has_bf16() and not cfg.backbone
    if cfg.precision == "bf16" and not (possible or has_bf16(device)):
        owner = "a pretrained backbone" if cfg.backbone else "this device"
        raise UserError(f"--precision=bf16 is not for {owner} ({device}); leave --precision out")
    return possible and cfg.precision != "fp32"


def start_from_checkpoint(policy: SyVLA, cfg: TrainConfig, episodes: Episodes) -> None:
    """Load --init_from.

    Its expert has learnt a scale: fine-tuning keeps it, with wider limits where needed.
    """
    part = "vlm." if cfg.new_expert else ""  # the rest has other shapes
    policy.load_weights(Path(cfg.init_from, "model.safetensors"), part)
    # a new expert, and one that begins anew on all of the data, take the data's scale
    statistics = episodes.meta["statistics"]
    if cfg.stage == "pretrain" or cfg.new_expert:
        policy.set_statistics(statistics)
        return
    replaced = policy.widen_limits(statistics)
    # such joints move differently from what the expert has learnt: told, not refused
    if replaced:
        print0(f"the scale of {cfg.init_from} does not reach {', '.join(replaced)}: taken from {cfg.data}")
    limits = ", ".join(f"{limit:.1f}" for limit in policy.action_limit.tolist())
    print0(
        f"clipped targets: {policy.clipped(episodes.action)}; they reach {limits} half ranges of the "
        f"scale of {cfg.init_from}"
    )


def freeze(policy: SyVLA, cfg: TrainConfig) -> None:
    """Apply --new_expert, --freeze_vision and --checkpointing; --lora has frozen its part already."""
    if cfg.new_expert:
        policy.vlm.requires_grad_(False)
    if cfg.freeze_vision:
        policy.vlm.freeze_vision()
    if cfg.checkpointing:
        policy.vlm.enable_checkpointing()


def cache_query_states(run: Run) -> None:
    """--new_expert: a frozen VLM's query states of a frame are computed once and kept beside the data."""
    cfg = run.cfg
    policy = run.policy
    # another VLM, other cameras or no reasoning: another file
    path = Path(cfg.data, f"states_{policy.fingerprint(cfg.cameras, cfg.reasoning)}.npy")
    size = 2 * cfg.queries * cfg.width * len(run.episodes.state)  # bytes, fp16
    fits = path.is_file() or shutil.disk_usage(cfg.data).free > size
    if not fits or not os.access(path if path.is_file() else cfg.data, os.W_OK):
        return print0(f"{cfg.data} has no room for {size / 2**20:.0f} MiB of query states; steps take longer")

    @torch.no_grad()
    def query_states_of(batch: dict[str, Tensor]) -> Tensor:
        batch = to_device(batch, run.device)
        with run.autocast():
            visual = policy.vlm.encode_images(batch["images"])
            states = policy.vlm(visual, batch["tokens"], batch["segments"], batch["positions"], True).queries
        return states.float()

    run.episodes.cache_query_states(path, (cfg.queries, cfg.width), query_states_of)
    print0(f"the VLM is frozen: its query states are kept in {path}, up to {size / 2**20:.0f} MiB")


# -----------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(run: Run) -> None:
    """The policy (averaged weights) and train_state.pt: raw trained weights, averages, optimizers, step."""
    weights = run.policy.state_dict()
    save_policy(run.cfg.out, run.policy, asdict(run.cfg), weights | run.ema)
    state = {
        "step": run.step,
        # frozen weights stand in model.safetensors, they do not change
        "model": {name: weights[name] for name in run.ema},
        "ema": run.ema,
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
    }
    save_state(Path(run.cfg.out, "train_state.pt"), state)


def save_state(path: Path, state: dict) -> None:
    """torch.save(), atomically. torch makes a RuntimeError of a full disk; here it is an OSError again."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise (error.__context__ or error) from None


def load_checkpoint(run: Run) -> None:
    """Bring a fresh run to where the one in --out was saved."""
    out = Path(run.cfg.out)
    with check_readable(out / "train_state.pt", "start anew with another --out"):
        saved = torch.load(out / "train_state.pt", map_location=run.device, weights_only=True)
        run.policy.load_weights(out / "model.safetensors")  # frozen weights stand there alone
        for name, average in run.ema.items():
            run.policy.get_parameter(name).data.copy_(saved["model"][name])
            average.copy_(saved["ema"][name])
        # strict: as many optimizers as were saved
        for optimizer, state in zip(run.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        run.step = int(saved["step"])
    # --resume may have been typed with other numbers of steps
    total = run.cfg.ground_steps + run.cfg.steps
    if not 0 <= run.step <= total:
        raise UserError(f"{out}/train_state.pt has done {run.step} of {total} steps: raise --steps")


@contextlib.contextmanager
def averaged_weights(policy: SyVLA, ema: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the policy carries its averaged weights and is in evaluation mode."""
    # by copies and not by exchanging tensors: optimizers and a compiled model hold on to them
    raw = {name: tensor.clone() for name, tensor in policy.state_dict().items() if name in ema}
    policy.load_state_dict(ema, strict=False)
    training = policy.training
    policy.eval()  # transformers refuses to cache in training mode with checkpointing
    # where frozen weights were rounded to bf16, the arithmetic must be, too
    rounded = any(p.dtype == torch.bfloat16 for p in policy.parameters())
    try:
        with torch.autocast(policy.vlm.queries.device.type, torch.bfloat16, enabled=rounded):
            yield
    finally:
        policy.train(training)
        policy.load_state_dict(raw, strict=False)


# -----------------------------------------------------------------------------------------------------------
# The program


# What --resume may change: where a run works and for how long.
MAY_CHANGE = "config data out env resume device precision threads compile eval steps ground_steps"


def settle(cfg: TrainConfig) -> TrainConfig:
    """Complete a config from the run to resume, the checkpoint to start from, or the backbone."""
    out = Path(cfg.out)
    if not (cfg.bench or cfg.plan):
        claim_run(cfg, "train.py")
    if cfg.resume:
        Config.read(out)  # complains of a folder that is no whole checkpoint
        return resumed_config(cfg, read_checkpoint_config(out), set(MAY_CHANGE.split()))
    if cfg.init_from:
        cfg.init_from = checkpoint_folder(cfg.init_from)
        inherit_shapes(cfg)
    if cfg.backbone:
        from extras.backbones import apply_backbone_config

        apply_backbone_config(cfg)
    return cfg


def in_every_process(work: Callable, cfg: Any) -> Any:
    """work(cfg) -> a config; an error in one process of torchrun, or another config, ends all of them."""
    _, world = rank_and_world()
    if world == 1:
        return work(cfg)
    try:
        cfg = work(cfg)
        answer = asdict(cfg)
    except UserError as error:
        answer = str(error)
    # every process learns how the others fared, so that none waits for one that has given up
    answers = [None] * world
    dist.all_gather_object(answers, answer)
    for answer in answers:
        if isinstance(answer, str):
            raise UserError(answer)
        if answer != answers[0]:
            differ = [f"--{name}" for name in answer if answer[name] != answers[0][name]]
            raise UserError(f"the processes have different {', '.join(differ)}: start all with one command")
    return cfg


def train(cfg: TrainConfig) -> None:
    """The whole program: data, training, evaluation."""
    rank, world = rank_and_world()
    fast_cpu(cfg.threads)
    device, autocast, arithmetic = choose_device(cfg.device, cfg.precision)
    join_processes(device)
    cfg = in_every_process(settle, cfg)
    check_split(cfg, world)
    # will it fit? Before any weights are downloaded
    if cfg.backbone or cfg.plan:
        from extras.backbones import plan_memory

        plan_memory(cfg, device, world, freeze, make_optimizers)
        if cfg.plan:
            return
    # complain of a wrong name now, not after the training
    if cfg.eval or "env" in cfg.typed:
        evaluate.environment_class(cfg.env)
    if rank == 0:
        make_data(cfg)
    wait_for_all()  # the others read what it has written
    if not cfg.resume:
        describe_robot(cfg)
    run = build(cfg, device, autocast)
    if run.bf16_copy:
        arithmetic = "bf16 (the CPU has it), fp32 masters"
    if cfg.resume:
        load_checkpoint(run)
    # the head of the log: settings, machine, data
    print0(" ".join(f"{name}={value}" for name, value in asdict(cfg).items()))
    machine = f"torch {torch.__version__}, {device}, {arithmetic}, {torch.get_num_threads()} threads"
    print0(f"{machine}, {world} process(es)")
    pictures = f", {len(run.questions.questions)} pictures with questions" if run.questions else ""
    print0(f"{len(run.episodes.episodes)} episodes, {len(run.episodes)} frames{pictures}")
    if cfg.new_expert:
        cache_query_states(run)
    if cfg.bench:
        return bench(run)
    families = families_to_evaluate(run) if cfg.eval else []
    train_loop(run)
    wait_for_all()
    leave_processes()  # the others need not wait for the evaluation
    # closed loop, with the weights that were saved
    if families and rank == 0:
        with averaged_weights(run.policy, run.ema):
            results = evaluate.evaluate(run.policy, families, cfg.eval, env=cfg.env)
        evaluate.report(results, Path(cfg.out, "eval.json"))


def train_loop(run: Run) -> None:
    """Train until all steps are done; log, report and save on the way."""
    cfg = run.cfg
    out = Path(cfg.out)
    is_first = rank_and_world()[0] == 0
    if is_first:
        claim_folder(out, "train.py", create=True)
        # also in a new run: a kill before the first checkpoint leaves lines
        trim_log(out / "log.jsonl", "step", run.step)
        if not cfg.resume:
            (out / "questions.json").unlink(missing_ok=True)
    first = run.step
    total = cfg.ground_steps + cfg.steps
    log = TrainLog(cfg)
    while run.step < total:
        # the first question of the paper's forgetting test, before actions can make the VLM forget
        if run.step == cfg.ground_steps and is_first:
            report_questions(run, "before action training")
            log.restart()
        began = time.time()
        micro = batches(run, run.step)
        data_ms = 1e3 * (time.time() - began)
        log.add(train_step(run, run.step, micro) | {"data_ms": data_ms})
        update_average(run, run.step)
        run.step += 1
        if not is_first:
            continue
        # Once in a while: a log line, a checkpoint. The first process alone writes.
        if run.step % cfg.log_every == 0 or run.step == total:
            log.write(run.step)
        if run.step % cfg.save_every == 0 or run.step in (cfg.ground_steps, total):
            if run.step == cfg.ground_steps:  # before the checkpoint: a resume does not come by here again
                save_policy(out / "grounded", run.policy, asdict(cfg), run.policy.state_dict() | run.ema)
            save_checkpoint(run)
    if is_first:
        report_questions(run, "after action training" if cfg.steps else "before action training")
    print0(f"trained {total - first} steps in {(time.time() - log.began) / 60:.1f} min")


class TrainLog:
    """Means over the steps since the last log line, for the screen and for log.jsonl."""

    def __init__(self, cfg: TrainConfig):
        self.cfg = cfg
        self.began = time.time()
        self.restart()

    def restart(self) -> None:
        """Begin a new window."""
        self.window_began = time.time()
        self.values = defaultdict(list)

    def add(self, numbers: dict[str, float]) -> None:
        """Numbers of one step."""
        for name, value in numbers.items():
            self.values[name].append(value)

    def write(self, step: int) -> None:
        """Print and append the window's means, then begin a new one."""
        cfg = self.cfg
        now = time.time()
        seconds = (now - self.window_began) / len(self.values["gnorm"])  # a step
        total = cfg.ground_steps + cfg.steps
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        line = {
            "step": step,
            "phase": "grounding" if step <= cfg.ground_steps else "actions",
            **means,
            "lr": learning_rate(step - 1, cfg),
            "samples_per_s": cfg.batch_size / seconds,
            "seconds": now - self.began,
        }
        order = ("question", "text", "action", "kept", "gnorm")
        shown = " | ".join(f"{name} {means[name]:.4f}" for name in order if name in means)
        print0(
            f"step {step:06d}/{total:06d} {line['phase']} | {shown} | lr {line['lr']:.3f} | "
            f"{line['samples_per_s']:.0f} samples/s | data {line['data_ms']:.0f} ms | "
            f"eta {(total - step) * seconds / 60:.1f} m"
        )
        append_log(Path(cfg.out, "log.jsonl"), line)
        self.restart()


def report_questions(run: Run, when: str) -> None:
    """The paper's forgetting test: accuracy on held-out questions, printed, and kept in questions.json."""
    path = Path(run.cfg.out, "questions.json")
    history = read_json(path) if path.is_file() else {}
    if not run.held_out or when in history:  # a resumed run measured it already
        return
    with averaged_weights(run.policy, run.ema):
        result = run.held_out.accuracy(run.policy.answer)
    shown = ", ".join(f"{kind} {cell['accuracy']:.3f}" for kind, cell in result.items())
    print0(f"held-out questions {when}: {shown} (n={result['all']['n']})")
    write_json(path, history | {when: result})


def families_to_evaluate(run: Run) -> list[str]:
    """The task families that the evaluation will play; what is wrong is told before the training."""
    cfg = run.cfg
    known = evaluate.environment_class(cfg.env).families
    # an environment of one's own may have other families than the simulation
    families = [family for family in cfg.family_names if family in known]
    if not families:
        print0(f"no evaluation: {cfg.families} is no task family of --env={cfg.env} ({', '.join(known)})")
        return []
    try:
        evaluate.check_evaluation(run.policy, families, cfg.env)
    except UserError as error:
        raise UserError(f"{error}; --eval=0 trains without an evaluation") from None
    return families


def bench(run: Run) -> None:
    """--bench: milliseconds a step by part, for both phases; nothing is written."""
    cfg = run.cfg
    # a step of each phase; grounding's last one asks questions of every kind
    phases = {}
    if cfg.ground_steps:
        phases["grounding"] = cfg.ground_steps - 1
    if cfg.steps:
        phases["actions"] = cfg.ground_steps
    for phase, step in phases.items():
        with Stopwatch(run.device) as watch:
            for i in range(25):
                if i == 5:  # the first steps warm up
                    watch.seconds.clear()
                micro = batches(run, step + i if phase == "actions" else step)
                mark("data")
                train_step(run, step, micro)
        # seconds of 20 steps
        total = sum(watch.seconds.values())
        parts = [f"{part} {s / 20 * 1e3:.0f} ms ({s / total:.1%})" for part, s in watch.seconds.items()]
        speed = f"{total / 20 * 1e3:.0f} ms a step, {20 * cfg.batch_size / total:.0f} samples/s"
        print0(f"{phase}: {speed} | {' | '.join(parts)}")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command line."""
    run_program(train, parse_config(TrainConfig, all_presets(), sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
