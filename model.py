"""SyVLA in plain PyTorch: a small VLM that reasons in text, feature queries, a flow-matching action expert.

    images, instruction -> VLM writes <reason> ... </reason> -> the 20 query tokens follow the reasoning
    -> their last hidden states ("feature query states") -> MLP adapter -> action expert -> action chunk

Read it in this order: Config and PRESETS, VisionEncoder, LanguageModel, Pointer, VLM (its attention mask is
the interesting part), ActionExpert, then SyVLA: `forward` is training with intention decoupling, `act` is
inference.

Shapes.  B batch, V camera views, P prefix tokens, T text tokens, Q feature queries, N = P + T + Q, D width,
nh heads, hd head dim, H action chunk (horizon), A action dim, S state dim, De expert width, M noise samples
per observation, K denoising steps.

Flow time.  t=1 is noise, t=0 is data: x_t = t*eps + (1-t)*a, target velocity u = eps - a, Euler step
x <- x - v/K.

Paper: "Scaling by Diversified Experience for Vision-Language-Action Models" (SyVLA), arXiv 2606.09009.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common import (
    FORMAT,
    UserError,
    atomic_path,
    check_options,
    check_readable,
    choose_device,
    config_of,
    mark,
    opt,
    read_checkpoint_config,
    write_json,
)
from data import Tokenizer, as_array, pack, to_tensors

# k, chunk (B, H, A), velocity (B, H, A) -> next chunk
DenoisingStep = Callable[[int, Tensor, Tensor], Tensor]

# -----------------------------------------------------------------------------------------------------------
# Configuration

LEAST_LIMIT = 1.5  # scaled states and actions are clipped no closer than this
FARTHEST_LIMIT = 4.0  # half ranges that a scale reaches; values farther out widen its range
DECOUPLE = ("gradient", "random", "attention", "off")
# Named, because the default of torch's RMSNorm would change with the number format.
RMS_EPS = torch.finfo(torch.float32).eps


@dataclass
class Config:
    """What shapes the weights or the way a policy acts; every checkpoint keeps it as config.json."""

    cameras: str = opt(
        "", "camera roles, in the order the model sees them (default: the data set's)", many=True
    )
    patch_size: int = opt(6, "pixels per side of a vision patch", "[1, 1024]")
    pixel_shuffle: int = opt(4, "k: k x k neighbouring patches become one visual token", "[1, 64]")
    width: int = opt(128, "language model width D", "[1, 16384]")
    depth: int = opt(3, "language model blocks", "[1, 256]")
    heads: int = opt(4, "language model query heads", "[1, 256]")
    backbone: str = opt(
        "", "pretrained VLM, a hub name or a folder; it fixes the VLM's shapes. Empty: from nothing"
    )
    lora: int = opt(
        0,
        "rank of LoRA on the backbone's frozen language model; 0: trained whole",
        "[0, 4096]",
        needs="backbone|init_from",
    )
    pointer: bool = opt(
        True, "attention finds what words name in the first picture, where questions teach it to point"
    )
    query_pointer: bool = opt(
        False,
        "every feature query finds something in every picture, which actions teach",
        needs="not backbone",
    )
    queries: int = opt(20, "Q, feature query tokens (paper: 20)", "[2, 1024]")
    expert_width: int = opt(128, "action expert width", "[1, 16384]")
    expert_depth: int = opt(3, "action expert blocks", "[1, 256]")
    expert_heads: int = opt(4, "action expert heads", "[1, 256]")
    chunk_size: int = opt(8, "H, control steps predicted at once", "[1, 1024]")
    n_action_steps: int = opt(4, "control steps executed before looking again", "[1, 1024]")
    denoise_steps: int = opt(5, "K, Euler steps of the flow sampler", "[1, 1024]")
    temperature: float = opt(
        0.0, "scale of the sampler's starting noise: 0 acts by its mode, 1 by all of it", "[0, 10]"
    )
    reasoning: bool = opt(
        True, "write the chain of thought before the feature queries (paper: think before act)"
    )
    max_reasoning_tokens: int = opt(
        48, "longest chain of thought that is generated, tokens", "[0, 4096]", needs="reasoning"
    )
    decouple: str = opt("gradient", "intention decoupling, or a control of it", DECOUPLE)
    decouple_percentile: float = opt(
        5.0,
        "query states scoring under this percentile are masked to zero",
        "[0, 100)",
        needs="not decouple=off",
    )
    decouple_scope: str = opt(
        "sample",
        "where the percentile is taken; batch: of one process",
        ("sample", "batch"),
        needs="not decouple=off",
    )
    noise_samples: int = opt(4, "M, noise samples (eps, t) per observation", "[1, 1024]")
    stale: int = opt(0, "the expert learns from query states up to this many control steps old", "[0, 1024]")

    # Set by presets, data sets and backbones, not on the command line
    motors: str = opt(
        "shoulder_pan,shoulder_lift,elbow_flex,wrist_flex,wrist_roll,gripper", many=True
    )  # what an action moves
    state: str = opt("", many=True)  # names of the state's numbers; empty: the motors' positions
    fps: int = opt(10, allowed="[1, 10000]")  # control steps a second, as recorded
    fit: str = opt("")  # how camera pictures became square: crop, stretch, or empty: they were
    home: str = opt("")  # where demonstrations begin: the state's numbers, with commas; empty: unknown
    image_size: int = opt(96, allowed="[1, 4096]")  # pixels per side of a camera image
    vision_width: int = opt(48, allowed="[2, 65536]")
    mlp_width: int = opt(256, allowed="[1, 65536]")  # language model SwiGLU width
    vocab_size: int = opt(576, allowed="[1, inf)")  # rows of the token embedding
    kv_heads: int = opt(2, allowed="[1, 256]")  # language model key/value heads (grouped queries)
    qk_norm: bool = opt(True)  # RMS-normalise queries and keys per head
    norm_eps: float = opt(RMS_EPS, allowed="[0, 1]")  # language model RMSNorm
    tied: bool = opt(False)  # the output layer is the token embedding
    rope_theta: float = opt(10000.0, allowed="[1, inf)")  # rotary embedding base

    typed: ClassVar[dict[str, Any]] = {}  # what stood on the command line

    def __post_init__(self):
        check_options(self)
        # field, what it must be a multiple of, and why
        rules = [
            ("width", 2 * self.heads, "2 * heads"),  # sines and cosines come in pairs
            ("heads", self.kv_heads, "kv_heads"),
            ("expert_width", self.expert_heads, "expert_heads"),
            ("expert_width", 2, "sines and cosines come in pairs"),
        ]
        if not self.backbone:
            pooled = self.patch_size * self.pixel_shuffle  # pixels per side of a visual token
            rules += [
                ("patch_size", 2, "the convolution stem halves the picture"),
                ("image_size", pooled, "patch_size * pixel_shuffle"),
            ]
        for name, divisor, why in rules:
            value = getattr(self, name)
            if value % divisor:
                raise UserError(f"{name} ({value}) must be a multiple of {divisor} ({why})")
        if self.n_action_steps > self.chunk_size:
            raise UserError(f"n_action_steps ({self.n_action_steps}) exceeds chunk_size ({self.chunk_size})")

    @property
    def camera_names(self) -> list[str]:
        return (self.cameras or "front,wrist").split(",")

    @property
    def motor_names(self) -> list[str]:
        return self.motors.split(",")

    @property
    def state_names(self) -> list[str]:
        return (self.state or self.motors).split(",")

    @property
    def action_dim(self) -> int:
        return len(self.motor_names)

    @property
    def state_dim(self) -> int:
        return len(self.state_names)

    @classmethod
    def read(cls, folder: str | Path) -> "Config":
        """The model's share of a checkpoint's config.json; UserError names the file.

        The door for checkpoints: every program comes by here, and by SyVLA.load_weights() for the tensors.
        """
        config = read_checkpoint_config(folder)
        if config.get("format") != FORMAT:
            raise UserError(
                f"{folder} is of another format than {FORMAT}; version e6a1aa6 runs checkpoints of format 1"
            )
        path = Path(folder, "tokenizer.json")
        with check_readable(path, "copy the whole folder of the checkpoint"):
            identity = text_id(path.read_bytes())
        if config.get("tokenizer", identity) != identity:
            raise UserError(f"{path} is another checkpoint's; copy the one of the run that made {folder}")
        return config_of(cls, config, f"{folder}/config.json")


def text_id(content: bytes) -> str:
    """Twelve hex digits that name the content of a file."""
    return hashlib.sha256(content).hexdigest()[:12]


# One table for all programs: each takes the fields that its config has.
PRESETS = {
    # for tests: every part is present, nothing is learnt
    "debug": dict(
        image_size=32,
        patch_size=8,
        pixel_shuffle=2,
        vision_width=16,
        width=32,
        depth=2,
        mlp_width=32,
        expert_width=32,
        expert_depth=1,
        expert_heads=2,
        queries=4,
        max_reasoning_tokens=6,
        decouple_percentile=25.0,
        families="place",
        ground_steps=2,
        steps=2,
        batch_size=4,
        question_tokens=40,
        warmup=1,
        log_every=1,
        eval=0,
        demos=2,
        starts=2,
        start_steps=4,
        scenes=8,
        held_out_scenes=2,
        workers=1,
        iterations=2,
        episodes=4,
        arms=2,
        minibatch=8,
        critic_warmup=1,
        index_frames=20,
        eval_every=1,
        eval_episodes=1,
    ),
    # a newcomer's first success: one cube, one pad
    "tiny": dict(
        reasoning=False,
        width=96,
        depth=2,
        heads=3,
        kv_heads=3,
        expert_width=96,
        expert_depth=2,
        expert_heads=3,
        families="tiny",
        ground_steps=0,
        steps=500,
        mix=0.0,
        demos=150,
        starts=300,
        scenes=0,
        held_out_scenes=0,
    ),
    # the whole recipe from random weights on two CPU cores
    "small": dict(),
}


def all_presets() -> dict[str, dict]:
    """PRESETS, and those of pretrained backbones where extras/ is there."""
    try:
        from extras.backbones import PRESETS as PRETRAINED
    except ImportError:
        return PRESETS
    return PRESETS | PRETRAINED


# -----------------------------------------------------------------------------------------------------------
# The VLM, shaped like SmolVLM: vision encoder, pixel shuffle connector, Llama-style language model


# A linear map without a bias.
Projection = partial(nn.Linear, bias=False)


class VisionEncoder(nn.Module):
    """Two convolutions make patches of an image, SmolVLM's connector makes visual tokens of them.

    The overlapping filters learn to see far sooner than SigLIP's single filter a patch (Xiao et al. 2021,
    arXiv 2106.14881). No Transformer blocks follow: from random weights the language model's attention does
    as well for less.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.shuffle = cfg.pixel_shuffle
        half = cfg.patch_size // 2
        width = cfg.vision_width
        # The first filter halves the picture, the second makes one vector of every patch.
        self.patch = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, half + 2, stride=half, padding=1),
        )
        side = cfg.image_size // cfg.patch_size
        self.position = nn.Parameter(torch.zeros(side * side, width))
        self.norm = nn.LayerNorm(width, 1e-5)
        self.connector = Projection(width * self.shuffle**2, cfg.width)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 3, px, px) in [-1, 1] -> visual tokens (n, tokens, D).

        And the patches (n, vision_width, side, side) that they were made of, which do not know their places.
        """
        patches = self.patch(images)  # (n, vision_width, side, side)
        x = patches.flatten(2).transpose(1, 2)  # (n, side*side, vision_width)
        x = self.norm(x + self.position)
        x = pixel_shuffle(x, self.shuffle)  # (n, side*side / k^2, k*k*vision_width)
        return self.connector(x), patches


def pixel_shuffle(x: Tensor, k: int) -> Tensor:
    """Patches (n, side*side, W) -> k x k neighbours side by side (n, side*side / k^2, k*k*W)."""
    n, length, width = x.shape
    side = math.isqrt(length)
    x = x.view(n, side // k, k, side // k, k, width)
    x = x.transpose(2, 3)  # (n, side/k, side/k, k, k, W)
    return x.reshape(n, (side // k) ** 2, k * k * width)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers from width to width, with SiLU between them."""
    layers = []
    for width, next_width in pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q (B, nh, n, hd) to k and v (B, nkv, m, hd), nh / nkv neighbours share one -> q's shape.

    mask (B, 1, n, m) bool, True: may look.
    """
    B, nh, n, hd = q.shape
    nkv = k.shape[1]
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=nh != nkv)
    # The same in plain steps: the backward of torch's bf16 kernel for CPUs takes four times as long.
    q = q * hd**-0.5
    q = q.reshape(B, nkv, -1, hd)  # (B, nkv, nh/nkv n, hd): the heads of a group, one behind the other
    scores = q @ k.mT  # (B, nkv, nh/nkv n, m)
    if mask is not None:
        bias = torch.where(mask, 0.0, -math.inf).to(q.dtype)  # (B, 1, n, m)
        scores = scores.view(B, nh, n, -1) + bias
    weights = scores.softmax(-1).view(B, nkv, nh // nkv * n, -1)  # (B, nkv, nh/nkv n, m)
    y = weights @ v  # (B, nkv, nh/nkv n, hd)
    return y.view(B, nh, n, hd)  # the heads apart again


def rotation(positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (..., n) and frequencies (hd/2,) -> the tables cos, sin (..., n, hd) that rope() takes."""
    angle = positions[..., None] * frequency  # (..., n, hd/2)
    cos = angle.cos()
    sin = angle.sin()
    # both halves of a head turn by the same angles
    cos = torch.cat((cos, cos), dim=-1)
    sin = torch.cat((-sin, sin), dim=-1)
    return cos, sin


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in Llama's half-split form: a, b -> a cos - b sin, b cos + a sin.

    x (B, nh, n, hd).
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # b, a
    return torch.addcmul(x * cos, swapped, sin)


class UnitScale(torch.autograd.Function):
    """x / rms(x) over the last axis. torch's takes three times as long on a CPU, most of it for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)  # (..., 1)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)  # (..., 1)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        # what points along y would only make x longer
        along = torch.linalg.vecdot(dy, y)[..., None] / y.shape[-1]  # (..., 1)
        return torch.addcmul(dy, y, along, value=-1) * scale, None


def unit_scale(x: Tensor, eps: float = RMS_EPS) -> Tensor:
    """RMS normalisation without a gain: x (..., n) -> x / rms(x) over the last axis, of the same shape."""
    if x.device.type == "cpu" and x.requires_grad:
        return UnitScale.apply(x, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class RMSNorm(nn.Module):
    """RMS normalisation with a learnt gain for every number."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape."""
        return unit_scale(x, self.eps) * self.weight


class LanguageBlock(nn.Module):
    """Llama block: RMSNorm, rotary attention with grouped queries, SwiGLU."""

    def __init__(self, cfg: Config):
        super().__init__()
        # neighbouring query heads share a key and value head
        nh, nkv = self.heads = [cfg.heads, cfg.kv_heads]
        self.hd = cfg.width // nh
        self.norm1 = RMSNorm(cfg.width, cfg.norm_eps)
        self.norm2 = RMSNorm(cfg.width, cfg.norm_eps)
        # nh queries, nkv keys and nkv values in one matrix
        self.qkv = Projection(cfg.width, (nh + 2 * nkv) * self.hd)
        self.proj = Projection(cfg.width, cfg.width)
        self.gate = Projection(cfg.width, cfg.mlp_width)
        self.up = Projection(cfg.width, cfg.mlp_width)
        self.down = Projection(cfg.mlp_width, cfg.width)
        self.qk_gain = None
        if cfg.qk_norm:
            self.qk_gain = nn.Parameter(torch.ones(nh + nkv, 1, self.hd))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        cache: list | None = None,
    ) -> Tensor:
        """x (B, n, D) -> (B, n, D). mask (B, 1, n, past + n) bool, True: may look.

        cache: [k, v] of the past, extended.
        """
        nh, nkv = self.heads
        qkv = self.qkv(self.norm1(x))  # (B, n, (nh + 2 nkv) hd)
        qkv = qkv.unflatten(-1, (-1, self.hd))  # (B, n, nh + 2 nkv, hd)
        qkv = qkv.transpose(1, 2)  # (B, nh + 2 nkv, n, hd)
        qk, v = qkv.split([nh + nkv, nkv], dim=1)  # (B, nh + nkv, n, hd), (B, nkv, n, hd)
        if self.qk_gain is not None:
            qk = unit_scale(qk) * self.qk_gain
        qk = rope(qk, cos, sin)
        q, k = qk.split(self.heads, dim=1)  # (B, nh, n, hd), (B, nkv, n, hd)
        if cache is not None:
            if cache:
                k = torch.cat((cache[0], k), dim=2)  # (B, nkv, past + n, hd)
                v = torch.cat((cache[1], v), dim=2)
            cache[:] = [k, v]
        y = attend(q, k, v, mask)  # (B, nh, n, hd)
        y = y.transpose(1, 2).flatten(2)  # (B, n, D)
        x = x + self.proj(y)

        y = self.norm2(x)
        y = F.silu(self.gate(y)) * self.up(y)  # (B, n, mlp_width)
        return x + self.down(y)


class LanguageModel(nn.Module):
    """Causal language model over embeddings."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.width)
        self.blocks = nn.ModuleList(LanguageBlock(cfg) for _ in range(cfg.depth))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.head = None
        if not cfg.tied:
            self.head = Projection(cfg.width, cfg.vocab_size)
        hd = cfg.width // cfg.heads
        exponent = torch.arange(0, hd, 2) / hd
        self.register_buffer("frequency", cfg.rope_theta**-exponent, persistent=False)  # (hd/2,)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        caches: list | None = None,
    ) -> Tensor:
        """x (B, n, D), positions (B, n), mask (B, n, past + n) bool -> hidden states (B, n, D)."""
        cos, sin = rotation(positions[:, None], self.frequency.float())  # 2 x (B, 1, n, hd)
        cos = cos.to(x.dtype)  # angles need fp32, the tables do not
        sin = sin.to(x.dtype)
        mask = mask[:, None]  # (B, 1, n, past + n)
        caches = caches or [None] * len(self.blocks)
        for block, cache in zip(self.blocks, caches):
            x = block(x, cos, sin, mask, cache)
        return self.norm(x)

    def new_caches(self) -> list:
        """Empty key/value caches, one a block, for forward() to fill."""
        return [[] for _ in self.blocks]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> (..., vocab), at least in fp32."""
        logits = F.linear(hidden, (self.head or self.embed).weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Visual(NamedTuple):
    """What the VLM sees of pictures, B rows."""

    tokens: Tensor  # visual tokens of every view (B, V, n, D)
    looks: Tensor | None = None  # the pointer's, of the first view's patches (B, m, POINT_WIDTH)
    landmarks: Tensor | None = None  # their places in the first view (B, LANDMARKS, 2)
    windows: Tensor | None = None  # about its pixels (B, 3, px + 1, px + 1, window, window)
    views: Tensor | None = None  # the query pointer's looks, of every view (B, V, m, POINT_WIDTH)


POINT_WIDTH = 32  # of what a patch looks like, and of what a word looks for
POINT_WORDS = 4  # "red cube at t3" points: a word, with the three before it
DUE = 0.1  # likelihood, by the language model, from which on a word on a scale is read off a place
GLIMPSE = 3  # patches per side of the window about a place that is looked at closer
LANDMARKS = 8  # things that are looked up in every picture; training finds out which


def look_layers(cfg: Config) -> nn.Sequential:
    """What a patch looks like, by the 3 x 3 around it: they tell a cube from a pad, and where it lies."""
    width = cfg.vision_width
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(width, 2 * POINT_WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * POINT_WIDTH, POINT_WIDTH, 1),
    )


def looks_of(layers: nn.Sequential, patches: Tensor) -> Tensor:
    """Patches (n, vision_width, side, side) -> what each shows, not where it is (n, m, POINT_WIDTH)."""
    looks = layers(patches).flatten(2).mT  # (n, m, POINT_WIDTH)
    return unit_scale(looks)


def patch_grid(cfg: Config) -> Tensor:
    """Where the m patches of a picture lie, (m, 2) x, y in -1 .. 1."""
    side = cfg.image_size // cfg.patch_size
    middles = (torch.arange(side) + 0.5) / side * 2 - 1  # (side,)
    return torch.cartesian_prod(middles, middles).flip(-1)  # (m, 2)


def mean_place(scores: Tensor, grid: Tensor) -> Tensor:
    """Scores of the patches (..., m) -> the mean place that attention weighs (..., 2)."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.softmax(-1) @ grid.to(scores.dtype)


class QueryPointer(nn.Module):
    """Lets every feature query state look for something in every view, and tells it where that lies.

    What it looks for depends on the state, so on instruction and reasoning. Nothing but the actions teaches
    it. Mean places as in the Pointer below.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        views = len(cfg.camera_names)
        self.look = look_layers(cfg)
        self.query = nn.Linear(cfg.width, views * POINT_WIDTH)
        self.out = nn.Linear(2 * views, cfg.width)
        self.register_buffer("grid", patch_grid(cfg), persistent=False)

    def forward(self, states: Tensor, looks: Tensor) -> Tensor:
        """Query states (B, Q, D), looks (B, V, m, POINT_WIDTH) -> the states, told where (B, Q, D)."""
        query = self.query(states)  # (B, Q, V POINT_WIDTH)
        query = query.unflatten(-1, (-1, POINT_WIDTH)).transpose(1, 2)  # (B, V, Q, POINT_WIDTH)
        place = mean_place(query @ looks.mT, self.grid)  # (B, V, Q, 2)
        place = 4 * place.transpose(1, 2).flatten(2)  # (B, Q, 2 V), as loud as in the Pointer
        return states + self.out(place.to(states.dtype))


class Pointer(nn.Module):
    """Tells words where in the first picture that lies which they name, and says where it lies on a scale.

    The last words make a query, attention over the patches finds the thing by its looks, and the mean place
    that it weighs (spatial softmax, Levine et al. 2016, arXiv 1504.00702) joins the word's embedding. So does
    the mean look: a cube on its pad looks other than a cube beside it. Of words on a scale, as t0 .. t11, the
    language model says only that one is due: which one is read off the place, beside those of a few learnt
    landmarks, because the camera is never quite where it was. Such words are finer than patches: the pixels
    about the place are looked at once more (a glimpse, Mnih et al. 2014, arXiv 1406.6247) and correct it. The
    place of the last thing whose place is said also joins the feature query states: there the hand has to go.

    As neither words nor looks know of places, a thing is found where training never showed one. A language
    model would have to learn every place by itself.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer):
        super().__init__()
        self.look = look_layers(cfg)
        self.words = nn.Embedding(cfg.vocab_size, POINT_WIDTH)
        self.query = mlp(POINT_WORDS * POINT_WIDTH, 2 * POINT_WIDTH, POINT_WIDTH)
        self.landmarks = nn.Parameter(torch.zeros(LANDMARKS, POINT_WIDTH))  # their queries
        # and where they usually are: what may lie anywhere is no landmark
        grid = patch_grid(cfg)  # (m, 2)
        self.usual = nn.Parameter(torch.zeros(LANDMARKS, len(grid)))
        self.register_buffer("grid", grid, persistent=False)
        # waves two pictures long, one, a half and a quarter
        frequency = math.pi / 2 * 2.0 ** torch.arange(4)
        self.register_buffer("frequency", frequency, persistent=False)
        self.out = nn.Linear(2 * 2 * len(frequency) + POINT_WIDTH, cfg.width)

        # one number for each scale, in words from its middle
        n_scales = max(1, len(tokenizer.scales))  # a layer has at least one output
        self.lengths = [len(ids) for ids in tokenizer.scales]
        # their words one behind the other: token, scale, how far from the scale's middle
        words = []
        for scale, ids in enumerate(tokenizer.scales):
            middle = (len(ids) - 1) / 2
            for i, token in enumerate(ids):
                words.append((token, scale, i - middle))
        for name, column in zip(("scale_words", "scale", "steps"), zip(*words)):
            self.register_buffer(name, torch.tensor(column), persistent=False)  # (words on scales,)
        # from the pixels of a window, and from where in its middle pixel the place lies
        self.window = GLIMPSE * cfg.patch_size  # pixels per side
        self.closer = mlp(3 * self.window**2 + 2, 2 * POINT_WIDTH, POINT_WIDTH, 2)
        # right and down turn as a picture in torch.rot90: by no, one, two and three quarters
        quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        turns = torch.stack([quarter.matrix_power(i) for i in range(4)])  # (4, 2, 2)
        self.register_buffer("turns", turns, persistent=False)
        self.numbers = mlp(2 + 2 * LANDMARKS, 4 * POINT_WIDTH, 4 * POINT_WIDTH, n_scales)
        self.sharpness = nn.Parameter(torch.full((n_scales,), 0.3))  # its logarithm
        self.aim = nn.Linear(2 + 2 * LANDMARKS, cfg.width)
        # of every word that names a column or a row: (vocab, 2), NaN for all others
        named = torch.full((cfg.vocab_size, 2), math.nan)
        for token, axis, place in tokenizer.places:
            named[token, axis] = place
        self.register_buffer("named", named, persistent=False)
        said = named.isfinite().any(-1)  # (vocab,) words that tell a place
        for ids in tokenizer.scales:
            said[ids] = True
        self.register_buffer("said", said, persistent=False)

    def see(self, patches: Tensor, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, vision_width, side, side), pixels (B, 3, px, px) of a view -> what Visual has of it."""
        looks = looks_of(self.look, patches)  # (B, m, POINT_WIDTH)
        landmarks = mean_place(self.landmarks @ looks.mT + self.usual, self.grid)  # (B, LANDMARKS, 2)
        windows = F.pad(picture, [self.window // 2] * 4)  # (B, 3, px + window, px + window)
        windows = windows.unfold(2, self.window, 1)  # (B, 3, px + 1, px + window, window)
        windows = windows.unfold(3, self.window, 1)  # (B, 3, px + 1, px + 1, window, window), a view
        return looks, landmarks, windows

    def scores(self, recent: Tensor, looks: Tensor) -> Tensor:
        """Words with those before them (..., n, POINT_WORDS), looks (..., m, POINT_WIDTH) -> (..., n, m)."""
        # a place that has been said must not tell where to look
        recent = recent.masked_fill(self.said[recent], 0)
        words = self.words(recent).flatten(-2)  # (..., n, POINT_WORDS * POINT_WIDTH)
        return self.query(words) @ looks.mT

    def forward(self, scores: Tensor, looks: Tensor) -> Tensor:
        """Words' scores (B, n, m), looks (B, m, POINT_WIDTH) -> what joins their embeddings (B, n, D).

        It is made of the mean place, as waves, and of the mean look.
        """
        place = mean_place(scores, self.grid)  # (B, n, 2)
        angle = place[..., None] * self.frequency  # (B, n, 2, 4)
        waves = torch.cat((angle.sin(), angle.cos()), dim=-1)  # (B, n, 2, 8)
        waves = waves.flatten(2)  # (B, n, 16)
        look = scores.softmax(-1) @ looks  # (B, n, POINT_WIDTH)
        found = torch.cat((waves.to(look.dtype), look), dim=-1)  # (B, n, 16 + POINT_WIDTH)
        return self.out(found)

    def read(self, logits: Tensor, scores: Tensor, visual: Visual, rows: Tensor) -> Tensor:
        """Logits (k, vocab) whose words on a scale are as likely as they are near to the number read off.

        scores (k, m); rows (k,) of the pictures. Logits by which no such word is due stay as they are.
        """
        if not self.lengths:
            return logits
        language = logits[:, self.scale_words]  # (k, words on scales)
        chance = language.logsumexp(-1) - logits.logsumexp(-1)  # (k,), its logarithm
        (due,) = (chance > math.log(DUE)).nonzero(as_tuple=True)  # (j,)
        if not len(due) and not logits.requires_grad:  # in training every weight gets a gradient
            return logits
        numbers = self.numbers(self.places(scores[due], visual, rows[due]))  # (j, scales)
        far = numbers.to(logits.dtype)[:, self.scale] - self.steps  # (j, words on scales)
        near = -self.sharpness.exp()[self.scale] * far.abs()  # (j, words on scales)
        parts = []
        for words, nearness in zip(language[due].split(self.lengths, dim=1), near.split(self.lengths, dim=1)):
            some = words.logsumexp(-1, keepdim=True)  # (j, 1): that some word of the scale is due
            parts.append(some + nearness.log_softmax(-1))
        language = language.index_copy(0, due, torch.cat(parts, dim=1))
        return logits.index_copy(1, self.scale_words, language)

    def places(self, scores: Tensor, visual: Visual, rows: Tensor) -> Tensor:
        """Scores (k, m), rows (k,) of the pictures -> the place found and the landmarks', in a row each."""
        place = self.look_closer(mean_place(scores, self.grid), visual.windows, rows)  # (k, 2)
        landmarks = visual.landmarks[rows].flatten(1)  # (k, 2 LANDMARKS)
        places = torch.cat((place, landmarks), dim=1)  # (k, 2 + 2 LANDMARKS)
        places = 4 * places  # a word is a twentieth of the picture
        return places.to(self.sharpness.dtype)

    def look_closer(self, place: Tensor, windows: Tensor, rows: Tensor) -> Tensor:
        """Places (k, 2) in pictures `rows` (k,), corrected by the pixels about them; windows as in Visual.

        A window is seen from all four sides, and what each look says is turned back (Cohen and Welling 2016,
        arXiv 1602.07576). A pad looks the same from each: its middle can be told, but not which pad it is.
        """
        px = windows.shape[2] - 1
        where = (place.detach() + 1) / 2 * px  # (k, 2) in pixels
        middle = where.round()
        x, y = middle.long().unbind(-1)  # 2 x (k,)
        window = windows[rows, :, y, x]  # (k, 3, window, window)
        sides = [window.rot90(i, dims=(2, 3)).flatten(1) for i in range(4)]
        sides = torch.stack(sides, dim=1)  # (k, 4, 3 window^2)
        turns = self.turns.to(place.dtype)  # (4, 2, 2)
        beside = ((where - middle) @ turns).transpose(0, 1)  # (k, 4, 2): within the middle pixel
        seen = torch.cat((sides, beside.to(sides.dtype)), dim=2)  # (k, 4, 3 window^2 + 2)
        moved = self.closer(seen).to(place.dtype)  # (k, 4, 2) in pixels
        moved = (moved.transpose(0, 1) @ turns.mT).sum(0)  # (k, 2), turned back
        return place + 2 / px * moved

    def aimed(self, tokens: Tensor, segments: Tensor, positions: Tensor, visual: Visual) -> Tensor:
        """What joins the feature query states (B, 1, D): the place of the last thing whose place is said.

        That is a cube to be fetched, or its pad once the cube is in the hand. Zero where no place is said.
        tokens, segments, positions (B, T) as in VLM.forward().
        """
        said = self.said[tokens] & (segments == 1)  # (B, T)
        B, T = said.shape
        rows = torch.arange(B, device=tokens.device)
        order = torch.arange(T, device=tokens.device)
        last = (said * order).amax(1)  # (B,)
        # the words behind which it was said
        recent = recent_words(tokens, positions)[rows, last - 1]  # (B, POINT_WORDS)
        with torch.no_grad():  # questions teach where to look
            scores = self.scores(recent[:, None], visual.looks)[:, 0]  # (B, m)
            places = self.places(scores, visual, rows)  # (B, 2 + 2 LANDMARKS)
        aim = self.aim(places) * said.any(1)[:, None]  # (B, D)
        return aim[:, None]

    def target(self, labels: Tensor) -> Tensor:
        """Labels (B, T) -> the places (B, T, 2) that words such as "x17 y22" tell; NaN for other words."""
        x, y = self.named[labels.clamp(min=0)].unbind(-1)  # 2 x (B, T)
        earlier = F.pad(x, (1, 0), value=math.nan)[:, :-1]
        later = F.pad(y, (0, 1), value=math.nan)[:, 1:]
        # each of the two words tells both
        x = torch.where(x.isfinite(), x, earlier)
        y = torch.where(y.isfinite(), y, later)
        place = torch.stack((x, y), dim=-1)  # (B, T, 2)
        unknown = labels < 0
        return place.masked_fill(unknown[..., None], math.nan)

    def loss(self, scores: Tensor, place: Tensor) -> Tensor:
        """Cross-entropy of the attention: scores (k, m), place (k, 2) -> (k,), 0 where the place is NaN.

        The target are the four patches around the place, in shares by which their mean is the place.
        """
        last = self.grid[-1]  # (2,)
        patch = self.grid[1, 0] - self.grid[0, 0]  # width of a patch
        place = torch.clamp(place, -last, last)
        apart = (place[:, None] - self.grid).abs() / patch  # (k, m, 2)
        share = (1 - apart).clamp(min=0).prod(-1)  # (k, m)
        share = share.nan_to_num(0.0)
        log = scores.to(share.dtype).log_softmax(-1)  # (k, m)
        return -(share * log).sum(-1)


def checkpoint_blocks(blocks: nn.ModuleList) -> None:
    """Let every block keep only its input in the forward pass, and compute the rest again in the backward."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class Hidden(NamedTuple):
    """What VLM.forward() gives."""

    text: Tensor  # hidden states of the text (B, T, D)
    queries: Tensor | None  # of the feature queries (B, Q, D), if asked for
    scores: Tensor  # of the pointer, of every word for every patch (B, T, m); m is 0 without one


class VLM(nn.Module):
    """Images, text and feature queries in one sequence: [P prefix | T text | Q queries].

    The attention mask has one rule: a token sees itself, and earlier tokens of its own segment or of the
    shared prefix. The prefix, segment 0, is the images with what a chat format writes around them. Questions
    packed behind one image are segments 1, 2, ...: each sees the picture and itself, never another question
    or its answer. Without this isolation a model trained from nothing learns to answer from the neighbours'
    answers instead of from the picture. Padding is segment -1. The queries belong to segment 1, which is the
    instruction with its reasoning.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer):
        super().__init__()
        self.vision = VisionEncoder(cfg)
        self.lm = LanguageModel(cfg)
        self.queries = nn.Parameter(torch.randn(cfg.queries, cfg.width))
        self.query_pointer = QueryPointer(cfg) if cfg.query_pointer else None
        self.pointer = None
        if cfg.pointer and tokenizer.places:  # without words for places nothing would teach it
            self.pointer = Pointer(cfg, tokenizer)
        self.set_chat_format(tokenizer)

    def set_chat_format(self, tokenizer: Tokenizer) -> None:
        """Token ids that stand before the images, before each and behind each; none for our own tokenizer."""
        for name in ("start", "image_open", "image_close"):
            ids = torch.tensor(getattr(tokenizer, name), dtype=torch.int64)
            self.register_buffer(name, ids, persistent=False)

    def parts(self) -> dict[str, Iterable[nn.Parameter]]:
        """Parameters of the vision encoder and of the language model."""
        parts = {"vision": self.vision.parameters(), "language": self.lm.parameters()}
        if self.pointer is not None:
            parts["pointer"] = self.pointer.parameters()
        if self.query_pointer is not None:
            parts["query pointer"] = self.query_pointer.parameters()
        return parts

    def closed(self) -> list[nn.Module]:
        """Layers that begin at zero: pointers' attention is even at first, and every block the identity."""
        layers = []
        if self.pointer is not None:
            layers += [self.pointer.query[-1], self.pointer.numbers[-1], self.pointer.closer[-1]]
        if self.query_pointer is not None:
            layers.append(self.query_pointer.query)
        for block in self.lm.blocks:
            layers += [block.proj, block.down]
        if self.lm.head is not None:
            layers.append(self.lm.head)
        return layers

    def freeze_vision(self) -> None:
        """The vision encoder stops learning, but for its connector."""
        self.vision.requires_grad_(False)
        self.vision.connector.requires_grad_(True)

    def enable_checkpointing(self) -> None:
        """Keep only every block's input in the forward pass; the backward pass computes the rest again."""
        checkpoint_blocks(self.lm.blocks)

    def encode_images(self, images: Tensor) -> Visual:
        """Images (B, V, px, px, 3) uint8 -> visual tokens, and what the pointer sees."""
        x = images.flatten(0, 1).permute(0, 3, 1, 2)  # (B*V, 3, px, px)
        # 0 .. 255 -> -1 .. 1, at least in fp32: bf16 has no room for 256 grey levels
        x = x.to(torch.promote_types(self.queries.dtype, torch.float32))
        x = x.div(127.5).sub(1.0)
        x = x.to(self.queries.dtype)
        tokens, patches = self.vision(x)  # (B*V, n, D), (B*V, vision_width, side, side)
        tokens = tokens.unflatten(0, images.shape[:2])  # (B, V, n, D)
        visual = Visual(tokens)
        if self.pointer is not None:
            first = patches[:: images.shape[1]]  # (B, vision_width, side, side)
            picture = x[:: images.shape[1]]  # (B, 3, px, px)
            visual = Visual(tokens, *self.pointer.see(first, picture))
        if self.query_pointer is not None:
            looks = looks_of(self.query_pointer.look, patches)  # (B*V, m, POINT_WIDTH)
            visual = visual._replace(views=looks.unflatten(0, images.shape[:2]))  # (B, V, m, POINT_WIDTH)
        return visual

    def embed_words(self, recent: Tensor, visual: Visual) -> tuple[Tensor, Tensor]:
        """Words with those before them (B, n, POINT_WORDS) -> embeddings (B, n, D), the pointer's scores.

        Scores (B, n, m); m is 0 without a pointer.
        """
        x = self.lm.embed(recent[..., -1])  # (B, n, D)
        if self.pointer is None:
            return x, x[..., :0]
        scores = self.pointer.scores(recent, visual.looks)  # (B, n, m)
        return x + self.pointer(scores, visual.looks), scores

    def logits(self, hidden: Tensor, scores: Tensor, visual: Visual, rows: Tensor) -> Tensor:
        """Hidden states (k, D), scores (k, m), their rows of the pictures (k,) -> logits (k, vocab)."""
        logits = self.lm.logits(hidden)
        if self.pointer is not None:
            logits = self.pointer.read(logits, scores, visual, rows)
        return logits

    def prefix(self, visual: Tensor) -> tuple[Tensor, Tensor, int]:
        """What all texts follow: visual tokens (B, V, n, D), with what a chat format writes around them.

        -> embeddings (B, P, D), their positions (B, P) or (3, B, P), the position of the first text token.
        """
        x = visual.flatten(1, 2)  # (B, V*n, D)
        if len(self.start) or len(self.image_open):
            chat = []
            for ids in (self.start, self.image_open, self.image_close):
                words = self.lm.embed(ids)  # (ids, D)
                chat.append(words.expand(len(visual), -1, -1))
            start, before, behind = chat
            parts = [start]
            for view in visual.unbind(1):  # (B, n, D)
                parts += [before, view, behind]
            x = torch.cat(parts, dim=1)  # (B, P, D)
        B, P, _ = x.shape
        positions = torch.arange(P, device=x.device)
        return x, positions.expand(B, -1), P

    @staticmethod
    def append_positions(positions: Tensor, more: Tensor) -> Tensor:
        """Positions (..., B, P) and those of what follows (B, n) -> (..., B, P + n).

        Leading axes: Qwen's time, row, column.
        """
        more = more.expand(*positions.shape[:-1], -1)
        return torch.cat((positions, more), dim=-1)

    def query_positions(self, first: Tensor) -> Tensor:
        """Positions of the feature queries (B, Q), of which the first one stands at `first` (B,)."""
        order = torch.arange(len(self.queries), device=first.device)  # (Q,)
        return first[:, None] + order

    def embed(
        self,
        visual: Visual,
        text: Tensor,
        segments: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Images and embeddings of the text (B, T, D) in one sequence, see forward().

        -> embeddings (B, P + T, D), segments (B, P + T), positions (B, P + T) or (3, B, P + T), the position
        of the first text token.
        """
        prefix, prefix_positions, first = self.prefix(visual.tokens)
        x = torch.cat((prefix, text), dim=1)
        segments = F.pad(segments, (prefix.shape[1], 0))  # the images are segment 0
        positions = self.append_positions(prefix_positions, first + positions)
        return x, segments, positions, first

    @staticmethod
    def attention_mask(segments: Tensor) -> Tensor:
        """Segments (B, n) -> (B, n, n) bool: may token i look at token j?"""
        mine = segments[:, :, None]  # (B, n, 1)
        theirs = segments[:, None]  # (B, 1, n)
        allowed = (theirs == 0) | (theirs > 0) & (theirs == mine)
        # padding sees itself: a softmax over nothing would be NaN
        itself = torch.eye(segments.shape[1], device=segments.device)
        return allowed.tril() | itself.bool()

    def forward(
        self,
        visual: Visual,
        tokens: Tensor,
        segments: Tensor,
        positions: Tensor,
        with_queries: bool,
    ) -> Hidden:
        """Hidden states of the text, and of the queries if asked for.

        tokens, segments, positions (B, T). positions count within a segment from 0:
        every segment starts right behind the images, as if it were alone.
        """
        B, T = tokens.shape
        length = (segments == 1).sum(1)  # (B,) tokens of instruction and reasoning
        text, scores = self.embed_words(recent_words(tokens, positions), visual)  # (B, T, D), (B, T, m)
        aim = 0.0
        if with_queries and self.pointer is not None:
            aim = self.pointer.aimed(tokens, segments, positions, visual)  # (B, 1, D)
        x, segments, positions, first = self.embed(visual, text, segments, positions)
        P = x.shape[1] - T
        if with_queries:  # they are the end of segment 1
            Q = len(self.queries)
            queries = self.queries.expand(B, -1, -1)  # (B, Q, D)
            x = torch.cat((x, queries), dim=1)  # (B, N, D)
            segments = F.pad(segments, (0, Q), value=1)  # (B, N)
            positions = self.append_positions(positions, self.query_positions(first + length))
        hidden = self.lm(x, positions, self.attention_mask(segments))  # (B, N, D)
        text = hidden[:, P : P + T]  # (B, T, D)
        query_states = None
        if with_queries:
            query_states = hidden[:, P + T :] + aim  # (B, Q, D)
            if self.query_pointer is not None:
                query_states = self.query_pointer(query_states, visual.views)
        return Hidden(text, query_states, scores)

    def packed(self, texts: list[list[int]]) -> list[Tensor]:
        """B texts, lists of token ids, each a segment -> tokens, segments, positions (B, T)."""
        arrays = to_tensors(pack([[(text, [])] for text in texts]))
        return [arrays[name].to(self.queries.device) for name in ("tokens", "segments", "positions")]

    @torch.inference_mode()
    def generate(
        self,
        visual: Visual,
        prompts: list[list[int]],
        stop: int,
        limit: int,
        with_queries: bool = False,
        drafts: list[list[int]] | None = None,
    ) -> tuple[list[list[int]], Tensor | None]:
        """Greedy decoding with a key/value cache; prompts, lists of token ids, may differ in length.

        -> B lists of at most `limit` generated ids without `stop`, query states (B, Q, D)
        or None. limit 0 writes nothing: the queries follow the prompt.

        drafts: for every row texts such as may be written, in one list with `stop` before each. A pass also
        reads what follows there, and of it those words count that would have been written: the same words in
        fewer passes (speculative decoding, Leviathan et al. 2023, arXiv 2211.17192, with texts as the draft:
        He et al. 2023, arXiv 2311.08252).
        """
        drafts = [np.array(draft) for draft in drafts or []]
        texts = TextCache(self, visual, prompts)
        words = texts.words  # every row's next word
        written = [[] for _ in prompts]
        while True:
            # A pass reads the next word of every row, and what a draft has behind it.
            blocks = []
            for row, word in enumerate(words):
                n = len(written[row])
                if n == limit - 1:  # too long: close it
                    word = stop
                block = [word]
                if drafts and word != stop:
                    ahead = expected([stop, *written[row], word], drafts[row])
                    block += [*ahead, stop][: limit - 2 - n]
                if n == limit or stop in written[row]:
                    block = []
                blocks.append(block)
            if not any(blocks):
                break
            said = texts.read(blocks)  # the word behind every word
            for row, block in enumerate(blocks):
                blocks[row] = confirmed(block, said[row], stop)
                written[row] += blocks[row]
                words[row] = said[row][len(blocks[row]) - 1]
            texts.keep(blocks)
        query_states = None
        if with_queries:
            query_states = texts.read_queries()  # (B, Q, D)
            if self.pointer is not None:
                whole = [prompt + row for prompt, row in zip(prompts, written)]
                query_states = query_states + self.pointer.aimed(*self.packed(whole), visual)
            if self.query_pointer is not None:
                query_states = self.query_pointer(query_states, visual.views)
        return [before(stop, row) for row in written], query_states


class TextCache:
    """B texts behind their pictures, as far as they are read, with a key/value cache.

    `words` come behind the prompts. read() tries blocks of words, keep() says which of them count.
    """

    def __init__(self, vlm: VLM, visual: Visual, prompts: list[list[int]]):
        tokens, segments, positions = vlm.packed(prompts)
        B, T = tokens.shape
        self.vlm = vlm
        self.visual = visual
        self.caches = vlm.lm.new_caches()
        self.rows = torch.arange(B, device=tokens.device)
        self.length = (segments == 1).sum(1)  # (B,)
        recent = recent_words(tokens, positions)  # (B, T, POINT_WORDS)
        text, scores = vlm.embed_words(recent, visual)  # (B, T, D), (B, T, m)
        x, segments, positions, self.first = vlm.embed(visual, text, segments, positions)
        hidden = vlm.lm(x, positions, vlm.attention_mask(segments), self.caches)  # (B, P + T, D)
        self.past = segments >= 0  # (B, P + T): what every later token sees
        end = self.length - 1  # of every prompt
        self.recent = recent[self.rows, end]  # (B, POINT_WORDS)
        last = hidden[self.rows, end - T]  # (B, D)
        logits = vlm.logits(last, scores[self.rows, end], visual, self.rows)  # (B, vocab)
        self.words = logits.argmax(-1).tolist()  # what comes behind the prompts

    def read(self, blocks: list[list[int]]) -> list[list[int]]:
        """Words that may come next, a list for every row -> the word behind every one; keep() must follow."""
        n = max(map(len, blocks))
        padded = [block + [0] * (n - len(block)) for block in blocks]
        tokens = torch.tensor(padded, device=self.past.device)  # (B, n)
        recent = torch.cat((self.recent[:, 1:], tokens), dim=1)  # (B, POINT_WORDS - 1 + n)
        self.recent = recent.unfold(1, POINT_WORDS, 1)  # (B, n, POINT_WORDS)
        x, scores = self.vlm.embed_words(self.recent, self.visual)  # (B, n, D), (B, n, m)
        order = torch.arange(n, device=tokens.device)
        positions = self.first + self.length[:, None] + order  # (B, n)
        seen = self.past[:, None].expand(-1, n, -1)  # (B, n, past)
        earlier = order[:, None] >= order  # (n, n): of the block
        mask = torch.cat((seen, earlier.expand(len(x), -1, -1)), dim=2)  # (B, n, past + n)
        hidden = self.vlm.lm(x, positions, mask, self.caches)  # (B, n, D)
        pictures = self.rows.repeat_interleave(n)  # (B n,)
        logits = self.vlm.logits(hidden.flatten(0, 1), scores.flatten(0, 1), self.visual, pictures)
        return logits.argmax(-1).view(-1, n).tolist()

    def keep(self, blocks: list[list[int]]) -> None:
        """Of the blocks just read only these count, their beginnings."""
        count = torch.tensor(list(map(len, blocks)), device=self.past.device)  # (B,)
        order = torch.arange(self.recent.shape[1], device=count.device)  # (n,)
        # nobody sees the others, whose keys stay in the cache
        self.past = torch.cat((self.past, order < count[:, None]), dim=1)  # (B, past + n)
        self.recent = self.recent[self.rows, count - 1]  # (B, POINT_WORDS)
        self.length = self.length + count

    def read_queries(self) -> Tensor:
        """The feature queries' hidden states (B, Q, D): they see all that counts, and each other causally."""
        B, past = self.past.shape
        Q = len(self.vlm.queries)
        positions = self.vlm.query_positions(self.first + self.length)
        seen = F.pad(self.past, (0, Q), value=True)  # (B, past + Q)
        mask = seen[:, None].expand(-1, Q, -1)
        mask = mask.tril(past)  # (B, Q, past + Q)
        queries = self.vlm.queries.expand(B, -1, -1)  # (B, Q, D)
        return self.vlm.lm(queries, positions, mask, self.caches)


def recent_words(tokens: Tensor, positions: Tensor) -> Tensor:
    """Tokens (B, T) with those before them in their segment, 0 for none -> (B, T, POINT_WORDS)."""
    T = tokens.shape[1]
    recent = []
    for back in range(POINT_WORDS - 1, -1, -1):  # from the oldest word to this one
        earlier = F.pad(tokens, (back, 0))[:, :T]
        recent.append(earlier.masked_fill(positions < back, 0))
    return torch.stack(recent, dim=-1)


def confirmed(block: list[int], said: list[int], stop: int) -> list[int]:
    """The beginning of a block in which every word is what the model said behind the one before it.

    The first word is certain, and nothing follows `stop`.
    """
    kept = block[:1]
    for word, expected in zip(block[1:], said):
        if word != expected or kept[-1] == stop:
            break
        kept.append(word)
    return kept


def expected(words: list[int], draft: np.ndarray) -> list[int]:
    """What a draft, texts with `stop` before each, has behind words that begin with `stop`, up to the next.

    It goes on at the place before which most of the last eight words stand, at the last of such places. So a
    draft with "at t8" helps behind "at t3": the words before are the same.
    """
    n = len(draft) + 1
    likeness = np.zeros(n)  # (n,) of the words before every place
    for back in range(1, min(8, len(words), len(draft)) + 1):
        alike = draft[: n - back] == words[-back]
        likeness[back:] += 0.8**back * alike  # the nearest word counts most
    place = n - 1 - likeness[::-1].argmax()
    return before(words[0], draft[place:].tolist())


def before(end: int, ids: list[int]) -> list[int]:
    """The ids that stand before the first `end`."""
    return ids[: ids.index(end)] if end in ids else ids


# -----------------------------------------------------------------------------------------------------------
# The action expert: flow matching on a chunk of joint targets, conditioned on the adapted feature query
# states


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of flow time t in [0, 1], periods 4e-3 .. 4 (pi0's range): (...,) -> (..., dim)."""
    shortest = math.log10(4e-3)
    longest = math.log10(4.0)
    period = torch.logspace(shortest, longest, dim // 2, device=t.device)
    frequency = 2 * math.pi / period
    angle = t.float()[..., None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def timesteps(K: int, device: torch.device | None = None) -> Tensor:
    """Flow times at which the K denoising steps begin, from noise to data: (K,)."""
    return torch.linspace(1, 1 / K, K, device=device)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: layer norm of x (..., De) whose shift and scale come from flow time."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class ExpertBlock(nn.Module):
    """Self-attention over the chunk, cross-attention to the query states, MLP.

    Flow time shifts, scales and gates each of them (adaLN-zero, DiT, arXiv 2212.09748).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulate = nn.Linear(width, 9 * width)
        self.qkv = Projection(width, 3 * width)
        self.proj = Projection(width, width)
        self.cross_q = Projection(width, width)
        self.cross_proj = Projection(width, width)
        self.cross_kv = Projection(width, 2 * width)
        self.up = Projection(width, 4 * width)
        self.down = Projection(4 * width, width)

    def keys_values(self, query_states: Tensor) -> Tensor:
        """Adapted query states (B, Q, De) -> keys and values (2, B, nh, Q, hd).

        They are the same for all noise samples and denoising steps of a chunk.
        """
        kv = self.cross_kv(query_states)  # (B, Q, 2 De)
        kv = kv.unflatten(-1, (2, self.heads, -1))  # (B, Q, 2, nh, hd)
        return kv.permute(2, 0, 3, 1, 4)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        keys_values: Tensor,
        attention: list | None = None,
    ) -> Tensor:
        """x (B, M, L, De), modulation (B, M, 1, 9 De) -> (B, M, L, De).

        A list `attention` receives weights (B, nh, M*L, Q).
        """
        B, M, L, _ = x.shape
        for_self, for_cross, for_mlp = modulation.chunk(3, dim=-1)  # each (B, M, 1, 3 De)

        # the joint state and the actions of one chunk see each other
        shift, scale, gate = for_self.chunk(3, dim=-1)  # 3 x (B, M, 1, De)
        y = modulated_norm(x, shift, scale)
        qkv = self.qkv(y).view(B * M, L, 3, self.heads, -1)
        # 3 x (B*M, nh, L, hd): each chunk attends to itself
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = attend(q, k, v)  # (B*M, nh, L, hd)
        y = y.transpose(1, 2).reshape(x.shape)
        x = x + gate * self.proj(y)

        # they look at the feature query states
        shift, scale, gate = for_cross.chunk(3, dim=-1)
        y = modulated_norm(x, shift, scale)
        q = self.cross_q(y).view(B, M * L, self.heads, -1)
        q = q.transpose(1, 2)  # (B, nh, M*L, hd): all noise samples share keys and values
        k, v = keys_values
        if attention is not None:
            hd = q.shape[-1]
            scores = q @ k.mT / math.sqrt(hd)  # (B, nh, M*L, Q)
            attention.append(scores.softmax(-1))
        y = attend(q, k, v)  # (B, nh, M*L, hd)
        y = y.transpose(1, 2).reshape(x.shape)
        x = x + gate * self.cross_proj(y)

        # every token for itself
        shift, scale, gate = for_mlp.chunk(3, dim=-1)
        y = modulated_norm(x, shift, scale)
        y = F.relu(self.up(y)).square()  # squared ReLU: as good as GELU here and cheaper on a CPU
        return x + gate * self.down(y)


class ActionExpert(nn.Module):
    """Velocity field v(x_t, t | joint state, adapted query states). Tokens: [joint state | H actions]."""

    def __init__(self, cfg: Config):
        super().__init__()
        De = cfg.expert_width
        self.action_in = nn.Linear(cfg.action_dim, De)
        self.state_in = nn.Linear(cfg.state_dim, De)
        # of the joint state and every action
        self.position = nn.Parameter(torch.randn(1 + cfg.chunk_size, De) * 0.5)
        self.time = mlp(De, De, De)
        self.age = None
        if cfg.stale:
            self.age = nn.Embedding(cfg.stale + 1, De)
        self.blocks = nn.ModuleList(ExpertBlock(De, cfg.expert_heads) for _ in range(cfg.expert_depth))
        self.modulate = nn.Linear(De, 2 * De)
        self.action_out = nn.Linear(De, cfg.action_dim)

    def condition(self, query_states: Tensor) -> list[Tensor]:
        """Adapted query states (B, Q, De) -> keys and values of every block."""
        return [block.keys_values(query_states) for block in self.blocks]

    def modulation(self, t: Tensor, age: Tensor | None = None) -> list[Tensor]:
        """Flow times (B, M) -> adaLN numbers of the blocks (B, M, 1, 9 De) and the output (B, M, 1, 2 De).

        age: control steps since the pictures behind the query states, int64, broadcasts with (B, M); None: 0.
        """
        De = self.time[0].in_features
        embedding = time_embedding(t, De)[:, :, None]  # (B, M, 1, De)
        c = self.time(embedding.to(self.position.dtype))  # (B, M, 1, De)
        if self.age is not None:
            fresh = self.age.weight[0]  # (De,)
            c = c + (fresh if age is None else self.age(age)[:, :, None])
        c = F.silu(c)
        parts = [*self.blocks, self]
        return [part.modulate(c) for part in parts]

    def forward(
        self,
        x: Tensor,
        modulation: list[Tensor],
        state: Tensor,
        keys_values: list[Tensor],
        attention: list | None = None,
    ) -> Tensor:
        """Noisy chunk x (B, M, H, A), state (B, S), both normalised -> velocity (B, M, H, A)."""
        B, M = x.shape[:2]
        dtype = self.position.dtype  # of all weights; noise and joints come in fp32
        state = self.state_in(state.to(dtype))[:, None, None]  # (B, 1, 1, De)
        state = state.expand(B, M, 1, -1)  # (B, M, 1, De)
        actions = self.action_in(x.to(dtype))  # (B, M, H, De)
        h = torch.cat((state, actions), dim=2) + self.position  # (B, M, 1 + H, De)
        for block, m, kv in zip(self.blocks, modulation, keys_values):
            h = block(h, m, kv, attention)
        shift, scale = modulation[-1].chunk(2, dim=-1)  # 2 x (B, M, 1, De)
        h = modulated_norm(h[:, :, 1:], shift, scale)  # (B, M, H, De)
        return self.action_out(h)


# -----------------------------------------------------------------------------------------------------------
# The policy


def scale_of(statistics: dict[str, list[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of a data set's states or actions -> low, high and limit of every number.

    low and high are the 1st and 99th percentile. They are moved apart where recorded values lie farther than
    FARTHEST_LIMIT half ranges from their middle, as those of a gripper that opens in under 1 % of the frames.
    What varies by less than a ten thousandth of its size is constant: low equals high.
    """
    ends = [statistics[key] for key in ("min", "max", "q01", "q99")]
    # fp64: a middle and a half range do not round the percentiles that they come from
    smallest, largest, q01, q99 = torch.from_numpy(np.array(ends, np.float64))
    middle = (q01 + q99) / 2
    reach = torch.maximum(largest - middle, middle - smallest)
    low = torch.minimum(q01, middle - reach / FARTHEST_LIMIT)
    high = torch.maximum(q99, middle + reach / FARTHEST_LIMIT)
    size = torch.maximum(largest.abs(), smallest.abs())
    constant = largest - smallest <= 1e-4 * size
    limit = torch.where(constant, 0.0, 2 * reach / (high - low))
    low = torch.where(constant, middle, low)
    high = torch.where(constant, middle, high)
    return low.float(), high.float(), limit.clamp(min=LEAST_LIMIT).float()


def shapes(tensors: dict[str, Tensor], part: str) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors whose names begin with `part`."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(part)}


def check_rows(what: str, items: Any, rows: int, kind: type = str) -> None:
    """UserError unless there is a list with one of a kind, a string or a list, for every row."""
    is_list = isinstance(items, (list, tuple)) and len(items) == rows
    if not is_list or {type(item) for item in items} - {kind}:
        name = {str: "strings", list: "lists of strings"}[kind]
        raise UserError(f"{what} must be a list of {rows} {name}, one for each row; got {items!r}"[:300])


def check_whole(what: str, x: Any, least: int) -> None:
    """UserError unless x is a whole number, `least` or more."""
    if not isinstance(x, (int, np.integer)) or x < least:
        raise UserError(f"{what} must be a whole number from {least} on; got {x!r}")


class SyVLA(nn.Module):
    """VLM + feature queries + adapter + action expert, with the data's normalisation statistics as buffers.

    tokenizer: data.Tokenizer, or one with the same methods. vlm: a finished VLM, such as a pretrained one of
    extras/backbones.py; without one it is made from random weights.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer, vlm: VLM | None = None):
        super().__init__()
        if len(tokenizer) > cfg.vocab_size:
            raise UserError(f"the tokenizer has {len(tokenizer)} tokens but vocab_size is {cfg.vocab_size}")
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.vlm = vlm or VLM(cfg, tokenizer)
        # No bias before or after the nonlinearity: a query state masked to zero stays zero behind it.
        self.adapter = nn.Sequential(
            Projection(cfg.width, cfg.expert_width),
            nn.SiLU(),
            Projection(cfg.expert_width, cfg.expert_width),
        )
        self.expert = ActionExpert(cfg)
        # The scale: low and high map to -1 and 1, recorded values reach as far as +-limit.
        for name, size in (("state", cfg.state_dim), ("action", cfg.action_dim)):
            for side in ("low", "high"):  # NaN until set_statistics: never silently unnormalised
                self.register_buffer(f"{name}_{side}", torch.full((size,), math.nan))
            self.register_buffer(f"{name}_limit", torch.full((size,), LEAST_LIMIT))
        self._init_weights(own_vlm=vlm is None)

    def _init_weights(self, own_vlm: bool) -> None:
        """Normal weights of variance 1 / fan-in.

        Residual branches, gates and output layers start at zero, so that every block begins as the identity.
        """
        modules = [*self.adapter.modules(), *self.expert.modules()]
        if own_vlm:
            modules = self.modules()
        for module in modules:
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
        closed = [self.expert.modulate, self.expert.action_out]
        closed += [block.modulate for block in self.expert.blocks]
        if self.expert.age is not None:
            closed.append(self.expert.age)  # an age that was never met counts as none
        if own_vlm:
            # Filters that answer a grey patch with nothing: the table would drown the few pixels of a cube.
            filters = self.vlm.vision.patch[0].weight.data  # (channels, 3, 3, 3)
            filters -= filters.mean(dim=(1, 2, 3), keepdim=True)
            filters *= 2
            # As loud as the patches: attention brings a token's content to a word, so where it was must be
            # part of that.
            nn.init.normal_(self.vlm.vision.position, std=0.5)
            closed += self.vlm.closed()
        for module in closed:
            nn.init.zeros_(module.weight)

    def scale_buffers(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """low, high and limit of every number of "state" or "action"."""
        return tuple(getattr(self, f"{name}_{side}") for side in ("low", "high", "limit"))

    def set_statistics(self, statistics: dict[str, dict]) -> None:
        """Take the scale of a data set: {"state": ..., "action": ...} as data.statistics() computes them."""
        for name in ("state", "action"):
            for buffer, value in zip(self.scale_buffers(name), scale_of(statistics[name])):
                buffer.copy_(value)

    def widen_limits(self, statistics: dict[str, dict]) -> list[str]:
        """Keep the scale, but let everything that another data set recorded lie inside its limits.

        -> names of the state's and action's numbers for which the scale had to be replaced by the data set's:
        it was constant so far, or the recorded values lie more than FARTHEST_LIMIT half ranges away.
        """
        replaced = []
        for name, words in (("state", self.cfg.state_names), ("action", self.cfg.motor_names)):
            low, high, limit = own = self.scale_buffers(name)
            theirs = statistics[name]
            # (2, S) or (2, A)
            ends = torch.tensor([theirs["min"], theirs["max"]], device=low.device)
            reach = self.scale(ends, name).abs().amax(0)  # (S,) or (A,)
            # a constant joint that moves now has no scale at all
            moved = (low == high) & (ends[0] < ends[1])
            foreign = moved | (reach > FARTHEST_LIMIT)
            limit.copy_(torch.maximum(limit, reach))
            # all three, because a limit means nothing in another scale
            for kept, new in zip(own, scale_of(theirs)):
                kept[foreign] = new.to(kept)[foreign]
            replaced += [f"{name} {words[i]}" for i in foreign.nonzero()[:, 0].tolist()]
        return replaced

    def check_statistics(self) -> None:
        """UserError for a policy that knows no scale of state and action."""
        if not torch.isfinite(self.state_low).all():
            raise UserError(
                "the policy has no normalisation statistics; choose a checkpoint that train.py wrote"
            )

    def scale(self, x: Tensor, name: str) -> Tensor:
        """LeRobot units -> low and high mapped to -1 and 1; a constant joint maps to 0."""
        low, high, _ = self.scale_buffers(name)
        span = high - low
        constant = span == 0
        scaled = 2 * (x - low) / torch.where(constant, 1.0, span) - 1
        return torch.where(constant, 0.0, scaled)

    def clip(self, x: Tensor, name: str) -> Tensor:
        """Scaled values, kept within what was recorded."""
        limit = getattr(self, f"{name}_limit")
        return x.clamp(-limit, limit)

    def clipped(self, actions: np.ndarray) -> str:
        """Which share of recorded actions (N, A) lies beyond the limits, as in "gripper 45.0 %", or "none".

        Training would teach the limit in their place.
        """
        limit = self.action_limit
        scaled = self.scale(torch.tensor(actions).to(limit), "action")  # (N, A)
        beyond = scaled.abs() > limit * (1 + 1e-4)  # but for rounding
        share = beyond.float().mean(0).tolist()
        names = self.cfg.motor_names
        return ", ".join(f"{name} {part:.1%}" for name, part in zip(names, share) if part) or "none"

    def normalise(self, x: Tensor, name: str) -> Tensor:
        """State or action in LeRobot units -> scaled and clipped."""
        return self.clip(self.scale(x, name), name)

    def denormalise(self, x: Tensor) -> Tensor:
        """Normalised action -> LeRobot units."""
        return self.action_low + (x + 1) / 2 * (self.action_high - self.action_low)

    # -- training -------------------------------------------------------------------------------------------

    def flow_loss(
        self,
        query_states: Tensor,
        state: Tensor,
        actions: Tensor,
        valid: Tensor,
        eps: Tensor,
        t: Tensor,
        age: Tensor | None = None,
        attention: list | None = None,
    ) -> Tensor:
        """Conditional flow matching: fp32 losses (B, M), means over the valid steps and the joints.

        query_states (B, Q, D), state (B, S) and actions (B, H, A) normalised, valid (B, H) bool (False:
        behind the episode's end), eps (B, M, H, A), t (B, M), age (B,) of the query states in control steps.
        """
        clean = actions[:, None]  # (B, 1, H, A)
        time = t[:, :, None, None]  # (B, M, 1, 1)
        x_t = time * eps + (1 - time) * clean  # (B, M, H, A)
        keys_values = self.expert.condition(self.adapter(query_states))
        modulation = self.expert.modulation(t, None if age is None else age[:, None])
        v = self.expert(x_t, modulation, state, keys_values, attention)
        target = eps - clean  # (B, M, H, A), the velocity from data to noise
        error = (v.float() - target).square()  # (B, M, H, A)
        weight = valid[:, None].float()  # (B, 1, H)
        total = (error.mean(-1) * weight).sum(-1)  # (B, M)
        return total / weight.sum(-1).clamp(min=1)

    def gradient_norms(self, query_states: Tensor, *flow_args: Tensor | None) -> Tensor:
        """|| d loss / d h_i || (B, Q), the paper's measure of what a feature query state contributes.

        flow_args: the further arguments of flow_loss. Only the expert is walked through, no weight gradient
        is made.
        """
        leaf = query_states.detach().requires_grad_()
        # the sum over the batch keeps every sample's gradient exact
        loss = self.flow_loss(leaf, *flow_args)  # (B, M)
        loss = loss.mean(1).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)  # (B, Q, D)
        return gradient.float().norm(dim=-1)

    def keep_mask(
        self,
        query_states: Tensor,
        state: Tensor,
        actions: Tensor,
        valid: Tensor,
        eps: Tensor,
        t: Tensor,
        uniform: Tensor,
        age: Tensor | None = None,
    ) -> Tensor:
        """Intention decoupling, first pass: which feature query states may the second pass use?

        -> (B, Q) bool.

        States whose gradient norm lies under the percentile are dropped (paper: 5th). Scope `sample` drops at
        least one state of every sample, so 20 states at 5 % lose exactly one; scope `batch` sets one
        threshold for all. The controls `random` and `attention` drop as many: those with the lowest `uniform`
        (B, Q) or attention mass.
        """
        # one noise sample is enough, with the same noise and time that the second pass sees
        eps = eps[:, :1]
        t = t[:, :1]
        flow_args = (state, actions, valid, eps, t, age)
        if self.cfg.decouple == "gradient":
            score = self.gradient_norms(query_states, *flow_args)  # (B, Q)
        elif self.cfg.decouple == "attention":
            attention = []  # one (B, nh, H + 1, Q) per block
            with torch.no_grad():
                self.flow_loss(query_states, *flow_args, attention)
            # the mean over blocks, heads and tokens: (B, Q)
            attention = torch.stack(attention).float()  # (blocks, B, nh, H + 1, Q)
            score = attention.mean(dim=(0, 2, 3))
        else:
            score = uniform
        share = self.cfg.decouple_percentile / 100
        if self.cfg.decouple_scope == "batch":
            return score >= torch.quantile(score.flatten(), share)
        Q = score.shape[1]
        drop = 0
        if share > 0:  # at least one, never all of them
            drop = min(max(1, round(share * Q)), Q - 1)
        rank = score.argsort(dim=1).argsort(dim=1)  # (B, Q), 0: the lowest score
        return rank >= drop

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of one batch, means over its rows: {"text"}, and for action samples {"action", "kept"}.

        images (B, V, px, px, 3) uint8; tokens, segments, positions, labels (B, T) int64 (label -100: not
        trained). Action samples also have state (B, S) and actions (B, H, A) in LeRobot units, valid (B, H),
        eps (B, M, H, A), t (B, M), uniform (B, Q), and with --stale age (B,). A frozen VLM's query_states (B,
        Q, D) may replace images and text; there is no text loss then.
        """
        losses = {}
        query_states = batch.get("query_states")
        if query_states is None:
            losses["text"], query_states = self.text_loss(batch, with_queries="actions" in batch)
        else:
            query_states = query_states.to(self.expert.position.dtype)  # kept ones come in fp32
        if "actions" in batch:
            state = self.normalise(batch["state"], "state")
            actions = self.normalise(batch["actions"], "action")
            flow_args = (state, actions, batch["valid"], batch["eps"], batch["t"])
            age = batch.get("age")
            if self.cfg.decouple != "off":
                keep = self.keep_mask(query_states, *flow_args, batch["uniform"], age)
                query_states = query_states * keep[..., None]  # no gradient reaches a masked state
                losses["kept"] = keep.float().mean()
                mark("decoupling")
            losses["action"] = self.flow_loss(query_states, *flow_args, age).mean()
            mark("expert")
        return losses

    def text_loss(self, batch: dict[str, Tensor], with_queries: bool) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy of reasoning and answers -> scalar, and the query states (B, Q, D) if asked for.

        A mean per row, then over rows: unlike a mean over tokens it does not depend on how rows are spread
        over processes.
        """
        visual = self.vlm.encode_images(batch["images"])
        mark("vision")
        hidden = self.vlm(visual, batch["tokens"], batch["segments"], batch["positions"], with_queries)
        labels = batch["labels"]
        # the output layer is the widest of all: only where something is to be learnt
        rows, columns = (labels >= 0).nonzero(as_tuple=True)
        scores = hidden.scores[rows, columns]  # (k, m)
        logits = self.vlm.logits(hidden.text[rows, columns], scores, visual, rows)  # (k, vocab)
        nll = F.cross_entropy(logits, labels[rows, columns], reduction="none")  # (k,)
        if self.vlm.pointer is not None:
            place = self.vlm.pointer.target(labels)[rows, columns]  # (k, 2)
            nll = nll + self.vlm.pointer.loss(scores, place)
        total = nll.new_zeros(len(labels)).index_add(0, rows, nll)  # (B,)
        count = (labels >= 0).sum(1)  # (B,) targets; a row may have none
        per_row = total / count.clamp(min=1)
        loss = per_row.mean()
        mark("language")
        return loss, hidden.queries

    # -- acting ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def denoise(
        self,
        query_states: Tensor,
        state: Tensor,
        noise: Tensor,
        step: DenoisingStep,
        age: Tensor | None = None,
    ) -> Tensor:
        """The sampler: K steps from noise (B, H, A) at t=1 to actions at t=0 -> the chain (B, K+1, H, A).

        query_states (B, Q, D), state (B, S) and actions normalised, age (B,) of the query states. step(k, x,
        v) makes the next chunk of the present one and its velocity: euler_step() to act, a noisy step in RL,
        a pulled one in real time.
        """
        K = self.cfg.denoise_steps
        t = timesteps(K, noise.device)[:, None]  # (K, 1)
        modulation = self.expert.modulation(t, None if age is None else age[None])  # all K steps at once
        keys_values = self.expert.condition(self.adapter(query_states))
        chain = [noise]
        for k in range(K):
            m = [numbers[k][:, None] for numbers in modulation]  # each (1 or B, 1, 1, 9 De or 2 De)
            x = chain[-1]  # (B, H, A)
            v = self.expert(x[:, None], m, state, keys_values)[:, 0]  # (B, H, A)
            chain.append(step(k, x, v))
        return torch.stack(chain, dim=1)

    def euler_step(self, k: int, x: Tensor, v: Tensor) -> Tensor:
        """x, v (B, H, A) -> the Euler step x - v / K of the flow."""
        return x - v / self.cfg.denoise_steps

    @torch.inference_mode()
    def reason(
        self,
        images: Tensor,
        tasks: list[str],
        given: list[str] | None = None,
        guess: list[list[str]] | None = None,
    ) -> tuple[list[str], Tensor]:
        """images (B, V, px, px, 3) uint8, B tasks -> B reasoning texts, feature query states (B, Q, D).

        given: B reasoning texts in place of the policy's own. guess: B lists of texts such as the policy may
        write, which it then writes faster; the later in a list, the likelier.
        """
        visual = self.vlm.encode_images(images)
        mark("vision")
        prompts = [self.tokenizer.prompt(task, self.cfg.reasoning) for task in tasks]
        limit = self.cfg.max_reasoning_tokens if self.cfg.reasoning else 0
        if given is not None:  # all that is left to write is the end of the reasoning
            for prompt, text in zip(prompts, given):
                prompt += self.tokenizer.encode(text)
            limit = 1
        end = self.tokenizer.end_reasoning
        drafts = None
        if guess is not None:
            drafts = [[] for _ in guess]
            for draft, texts in zip(drafts, guess):
                for text in texts:
                    draft += [end, *self.tokenizer.encode(text)]
        written, query_states = self.vlm.generate(visual, prompts, end, limit, True, drafts)
        mark("reasoning")
        return given or [self.tokenizer.decode(ids) for ids in written], query_states

    @torch.inference_mode()
    def act(
        self,
        images: Any,
        state: Any,
        task: list[str],
        seed: int = 0,
        reasoning: list[str] | None = None,
        guess: list[list[str]] | None = None,
    ) -> tuple[np.ndarray, list[str]]:
        """What to do next: B observations and tasks -> chunk (B, H, A) float32, B reasoning texts.

        images (B, V, px, px, 3) uint8; state (B, S) and the chunk in LeRobot units.

        Arrays or tensors. The same seed gives the same chunk, at temperature 0 every seed does. reasoning:
        texts in place of the policy's own. guess: B lists of what it wrote before, last at the look before,
        of which most will hold again: the same words, sooner. Raises UserError for inputs of other shapes or
        types.
        """
        images, state = self.check_inputs(images, state, task)
        if reasoning is not None:
            check_rows("reasoning", reasoning, len(images))
        if guess is not None:
            check_rows("guess", guess, len(images), list)
            for texts in guess:
                check_rows("a list in guess", texts, len(texts))
        texts, query_states = self.reason(images, task, reasoning, guess)
        return self.plan(query_states, state, seed), texts

    @torch.inference_mode()
    def plan(
        self,
        query_states: Tensor,
        state: Any,
        seed: int = 0,
        age: Any = None,
        step: DenoisingStep | None = None,
    ) -> np.ndarray:
        """The expert alone: query states (B, Q, D), joint state (B, S) of now -> chunk (B, H, A) float32.

        State and chunk in LeRobot units. age (B,) of the query states in control steps; an expert that learnt
        from fresh ones only is not told. step: as denoise() takes it, by default Euler's.
        """
        state = self.check_state(state)
        sizes = (len(state), self.cfg.queries, self.cfg.width)
        query_states = self.check_array("query_states", query_states, sizes)
        check_whole("seed", seed, -(2**63))
        if age is not None:
            age = self.check_array("age", age, sizes[:1]).long()
            age = age.clamp(0, self.cfg.stale)  # older ones than were learnt count as the oldest
        # on the CPU: a seed means the same noise on every device
        generator = torch.Generator().manual_seed(seed)
        shape = (len(state), self.cfg.chunk_size, self.cfg.action_dim)
        noise = torch.randn(shape, generator=generator)  # (B, H, A)
        noise = self.cfg.temperature * noise.to(state.device)
        state = self.normalise(state, "state")
        chain = self.denoise(query_states, state, noise, step or self.euler_step, age)
        chunk = self.denormalise(self.clip(chain[:, -1], "action"))  # (B, H, A)
        mark("expert")
        return chunk.float().cpu().numpy()

    @torch.inference_mode()
    def answer(self, images: Any, questions: list[str], limit: int = 24) -> list[str]:
        """Answers to B questions about images (B, V, px, px, 3) uint8, at most `limit` tokens each."""
        # a pretrained VLM answers about any number of pictures of any size
        images = self.check_images(images, any_size=bool(self.cfg.backbone))
        check_rows("questions", questions, len(images))
        check_whole("limit", limit, 1)
        visual = self.vlm.encode_images(images)
        prompts = [self.tokenizer.question(question) for question in questions]
        written, _ = self.vlm.generate(visual, prompts, self.tokenizer.end_answer, limit)
        # the end of a reasoning closes the answer to an instruction
        end = self.tokenizer.end_reasoning
        return [self.tokenizer.decode(before(end, ids)) for ids in written]

    def check_array(
        self,
        what: str,
        x: Any,
        sizes: tuple,
        note: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Array, tensor or nested lists of numbers -> a tensor on the model's device.

        UserError shows both sides where the shape is not `sizes`, in which a word stands for any number, or
        where numbers are not finite. note: what else the message says.
        """
        if not isinstance(x, Tensor):
            x = as_array(what, x)
            x = torch.from_numpy(x.astype(x.dtype.newbyteorder("="), order="C"))
        fits = x.ndim == len(sizes) and len(x) > 0
        for there, wanted in zip(x.shape, sizes):
            fits = fits and (there == wanted or isinstance(wanted, str))
        if not fits or (dtype == torch.uint8 and x.dtype != dtype):
            expected = ", ".join(map(str, sizes))
            raise UserError(f"{what} must be ({expected}){note}; got {tuple(x.shape)} {x.dtype}")
        if not torch.isfinite(x).all():
            raise UserError(f"{what} must be finite numbers{note}; got {x.tolist()}"[:300])
        return x.to(self.vlm.queries.device, dtype)

    def check_images(self, images: Any, any_size: bool = False) -> Tensor:
        """Images (B, V, px, px, 3) uint8 of the policy's cameras, or of `any_size`, as check_array()."""
        px = self.cfg.image_size
        sizes = ("V", "h", "w") if any_size else (len(self.cfg.camera_names), px, px)
        note = f" uint8, cameras {self.cfg.cameras}"
        return self.check_array("images", images, ("B", *sizes, 3), note, torch.uint8)

    def check_state(self, state: Any, rows: int | str = "B") -> Tensor:
        """State (rows, S) in LeRobot units, as check_array()."""
        names = self.cfg.state_names
        return self.check_array("state", state, (rows, len(names)), f", {names}")

    def check_inputs(self, images: Any, state: Any, task: list[str]) -> tuple[Tensor, Tensor]:
        """What act() is given -> images and state as tensors on the model's device."""
        images = self.check_images(images)
        state = self.check_state(state, len(images))
        check_rows("tasks", task, len(images))
        self.check_statistics()
        return images, state

    # -- on disk --------------------------------------------------------------------------------------------

    def load_weights(self, path: str | Path, part: str = "") -> None:
        """Read model.safetensors; UserError names a tensor that is missing, unknown, misshapen or impossible.

        part: only tensors whose names begin so, as in "vlm.".
        """
        with check_readable(path, "choose another checkpoint"):
            weights = load_file(path)
        there = shapes(weights, part)
        here = shapes(self.state_dict(), part)
        for name, _ in sorted(there.items() ^ here.items()):  # the first one will do
            sizes = f"{there.get(name, 'missing')} there, {here.get(name, 'unknown')} here"
            raise UserError(
                f"{path} does not fit its config.json: {name} is {sizes}. If another version of this code "
                "made it, run it with that version or train anew"
            )
        for name in there:
            tensor = weights[name]
            if not tensor.is_floating_point():
                raise UserError(f"{path}: {name} is {tensor.dtype}; weights must be floating-point numbers")
            if not torch.isfinite(tensor).all():
                what = "weight" if "." in name else "normalisation statistics"
                raise UserError(f"{path}: {what} {name} not finite; choose a checkpoint that train.py wrote")
            if name.endswith("_low"):
                high = name.replace("_low", "_high")
                if (tensor > weights[high]).any():
                    raise UserError(f"{path}: {name} lies above {high}; choose another checkpoint")
        self.load_state_dict({name: weights[name] for name in there}, strict=False)

    @staticmethod
    def load(folder: str | Path, tokenizer: Any = None, device: torch.device | str = "cpu") -> "SyVLA":
        """load_policy() under the name that programs of others know; the folder's own tokenizer is used."""
        return load_policy(folder, device)

    def fingerprint(self, *words: Any) -> str:
        """Twelve hex digits that name the VLM's weights and `words`, for files made with a frozen VLM."""
        words = " ".join(map(str, words))
        return text_id(words.encode() + save(self.vlm.state_dict()))

    def parameter_table(self) -> dict[str, int]:
        """{part: number of parameters}."""
        parts = self.vlm.parts() | {
            "adapter": self.adapter.parameters(),
            "expert": self.expert.parameters(),
            "queries": [self.vlm.queries],
        }
        return {name: sum(p.numel() for p in part) for name, part in parts.items()}


def save_policy(
    folder: str | Path,
    policy: SyVLA,
    config: dict,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write what running a policy needs: weights with statistics, config, tokenizer.

    weights: in place of the policy's own.
    """
    folder = Path(folder)
    weights = weights or policy.state_dict()
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise UserError(f"non-finite weights; {folder} keeps the last checkpoint: lower the learning rates")
    if hasattr(policy.vlm, "save_description"):  # a pretrained backbone's own config
        policy.vlm.save_description(folder / "backbone")
    tokenizer = policy.tokenizer.dumps().encode()
    # as bytes: safetensors' save_file() writes for the owner alone, whatever the umask, and hides a full disk
    weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    for name, content in (("tokenizer.json", tokenizer), ("model.safetensors", save(weights))):
        with atomic_path(folder / name) as path:
            path.write_bytes(content)
    made_by = {"format": FORMAT, "torch": torch.__version__, "tokenizer": text_id(tokenizer)}
    write_json(folder / "config.json", config | made_by)


SHIPPED = Path(__file__).parent / "assets" / "small.safetensors"  # the trained policy of this repository
UNPACKED = "out/shipped"


def checkpoint_folder(path: str) -> str:
    """A checkpoint folder as it is; a policy in one file, as SHIPPED, unpacked to UNPACKED.

    The file is written by benchmarks/ship.py: config.json and tokenizer.json are its metadata. UserError for
    another file, and where UNPACKED holds a run.
    """
    if not path.endswith(".safetensors"):
        return path
    with check_readable(path, "choose another checkpoint"):
        content = Path(path).read_bytes()
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
    if set(texts) != {"config.json", "tokenizer.json"}:
        raise UserError(f"{path} is no policy in one file; name the checkpoint folder that it belongs to")
    if Path(UNPACKED, "train_state.pt").exists():
        raise UserError(f"{UNPACKED} holds a training run, {path} would be unpacked there: move the run away")
    files = {name: text.encode() for name, text in texts.items()} | {"model.safetensors": content}
    for name, content in files.items():
        with atomic_path(Path(UNPACKED, name)) as temporary:
            temporary.write_bytes(content)
    return UNPACKED


def load_policy(folder: str | Path, device: torch.device | str = "cpu") -> SyVLA:
    """A trained policy from its checkpoint folder alone, ready to act.

    Raises UserError where there is none.
    """
    folder = Path(folder)
    if isinstance(device, str):
        device, *_ = choose_device(device)
    cfg = Config.read(folder)
    if cfg.backbone:
        from extras.backbones import load_backbone

        tokenizer, vlm = load_backbone(cfg, folder / "backbone", folder / "tokenizer.json", pretrained=False)
    else:
        tokenizer, vlm = Tokenizer.load(folder), None
    policy = SyVLA(cfg, tokenizer, vlm).to(device).eval()
    policy.load_weights(folder / "model.safetensors")
    return policy
