"""SyVLA in plain PyTorch: a small VLM that thinks in text, 20 feature query tokens, a flow-matching action expert.

    images, instruction -> VLM writes <reason> ... </reason> -> the 20 query tokens follow the thought
    -> their last hidden states ("feature query states") -> MLP adapter -> Transformer flow-matching expert -> action chunk

Read it in this order: Config and PRESETS, VisionEncoder, LanguageModel, VLM (the mask is the interesting part), Expert,
then SyVLA: `forward` is training (with intention decoupling), `act` is inference.

Shapes.  B batch, V camera views, P visual tokens, T text tokens, Q feature queries, H action chunk (horizon), A action dim,
S state dim, D width, M noise samples per observation, K denoising steps, N = P + T + Q, nh heads, hd head dim.
Flow time.  t=1 is noise, t=0 is data: x_t = t*eps + (1-t)*a, target velocity u = eps - a, Euler step x <- x - v/K.

Paper: "Scaling by Diversified Experience for Vision-Language-Action Models" (SyVLA), arXiv 2606.09009.
"""

import ctypes
import dataclasses
import difflib
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------
# Configuration


def opt(default, help):
    """A dataclass field with the one line of meaning that --help prints."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """What shapes the weights or the way a policy acts; saved in every checkpoint as config.json."""

    cameras: str = opt("front,wrist", "camera roles, in the order the model sees them")
    motors: str = opt(
        "shoulder_pan,shoulder_lift,elbow_flex,wrist_flex,wrist_roll,gripper",
        "what an action moves, in order",
    )
    state: str = opt(
        "",
        "what the state measures, in order; empty: the motors' positions (train.py: what the data set says)",
    )
    image_size: int = opt(96, "pixels per side of each camera image")
    patch_size: int = opt(6, "pixels per side of a vision patch")
    conv_stem: bool = opt(
        True, "patches through two convolutions instead of SigLIP's single filter: learns to see far sooner"
    )
    vision_width: int = opt(48, "vision encoder width")
    vision_depth: int = opt(
        0, "vision encoder blocks; from random weights the language model's attention does as well for less"
    )
    vision_heads: int = opt(2, "vision encoder attention heads")
    vision_mlp: int = opt(0, "vision encoder MLP width; 0: 4 x vision_width")
    vision_act: str = opt("relu2", "vision encoder activation: relu2, or gelu_pytorch_tanh (SigLIP's)")
    vision_eps: float = opt(1e-5, "vision encoder LayerNorm epsilon")
    vision_size: int = opt(
        0, "pixels per side that the encoder takes, camera images are resized to it; 0: image_size"
    )
    vision_enlarge: int = opt(
        0, "SmolVLM's processor first brings the longest edge to this many pixels; 0: not"
    )
    pixel_shuffle: int = opt(4, "k: k x k neighbouring patches become one visual token")
    width: int = opt(128, "language model width D")
    depth: int = opt(3, "language model blocks")
    heads: int = opt(4, "language model query heads")
    kv_heads: int = opt(2, "language model key/value heads (grouped queries)")
    mlp_width: int = opt(256, "language model SwiGLU width")
    qk_norm: bool = opt(True, "RMS-normalise queries and keys per head")
    norm_eps: float = opt(0.0, "language model RMSNorm epsilon; 0: that of the number format")
    tied: bool = opt(False, "the output layer is the token embedding")
    rope_theta: float = opt(10000.0, "rotary embedding base")
    vocab_size: int = opt(512, "rows of the token embedding")
    backbone: str = opt(
        "", "pretrained VLM, a hub name or a folder; it fixes the shapes above. Empty: from nothing"
    )
    wrapped: bool = opt(
        False,
        "the backbone runs in `transformers`, not in this file (everything but SmolVLM); set by --backbone",
    )
    lora: int = opt(
        0, "rank of LoRA on the language model, which is then frozen (needs peft); 0: trained whole"
    )
    queries: int = opt(20, "Q, number of feature query tokens (paper: 20)")
    expert_width: int = opt(128, "action expert width")
    expert_depth: int = opt(3, "action expert blocks")
    expert_heads: int = opt(4, "action expert heads")
    chunk: int = opt(8, "H, control steps predicted at once")
    execute: int = opt(4, "control steps executed before looking again")
    denoise_steps: int = opt(5, "K, Euler steps of the flow sampler")
    temperature: float = opt(
        0.0, "scale of the flow sampler's starting noise: 0 acts by its mode, 1 by the whole distribution"
    )
    reasoning: bool = opt(
        True, "write the chain of thought before the feature queries (paper: think before act)"
    )
    max_thought: int = opt(24, "longest chain of thought generated, tokens")
    decouple: str = opt("gradient", "intention decoupling: gradient (the paper's) | random | attention | off")
    decouple_percentile: float = opt(
        5.0, "query states whose score is under this percentile are masked to zero"
    )
    decouple_scope: str = opt(
        "sample", "the percentile is taken per sample, or over the batch (of one process)"
    )
    decouple_samples: int = opt(
        1, "of the M noise samples, how many the first pass averages its gradient over"
    )
    noise_samples: int = opt(4, "M, noise samples (eps, t) per observation")
    stale: int = opt(
        0,
        "the expert also learns from query states up to this many control steps old, and is told their age (asynchronous inference)",
    )
    committed: int = opt(
        0,
        "the expert also learns to continue chunks whose first actions, up to this many, are given (real-time chunking)",
    )

    def __post_init__(self):
        choices = {
            "decouple": ("gradient", "random", "attention", "off"),
            "decouple_scope": ("sample", "batch"),
            "vision_act": ("relu2", "gelu_pytorch_tanh"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        may_be_zero = (
            "max_thought",
            "vision_depth",
            "vision_mlp",
            "vision_size",
            "vision_enlarge",
            "lora",
            "stale",
            "committed",
        )
        for f in dataclasses.fields(Config):
            if f.type in (int, "int") and getattr(self, f.name) < (f.name not in may_be_zero):
                raise ValueError(
                    f"{f.name} ({getattr(self, f.name)}) must be at least {int(f.name not in may_be_zero)}"
                )
        if self.lora and not self.backbone:
            raise ValueError(
                "lora adapts a pretrained language model; add --backbone=... or leave --lora out"
            )
        if not self.wrapped and (self.vision_size or self.image_size) % (
            self.patch_size * self.pixel_shuffle
        ):
            name = "vision_size" if self.vision_size else "image_size"
            raise ValueError(
                f"{name} {getattr(self, name)} must be a multiple of patch_size * pixel_shuffle = {self.patch_size * self.pixel_shuffle}"
            )
        for width, heads in (
            ("width", "heads"),
            ("heads", "kv_heads"),
            ("vision_width", "vision_heads"),
            ("expert_width", "expert_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width} ({getattr(self, width)}) must be a multiple of {heads} ({getattr(self, heads)})"
                )
        if self.conv_stem and (self.patch_size % 2 or self.vision_width % 2):
            raise ValueError(
                f"the convolution stem halves patch_size ({self.patch_size}) and vision_width ({self.vision_width}): make both even, or --conv_stem=false"
            )
        if self.width // self.heads % 2 or self.expert_width % 2:
            raise ValueError(
                f"width / heads ({self.width} / {self.heads}) and expert_width ({self.expert_width}) must be even: sines and cosines come in pairs"
            )
        if not 1 <= self.execute <= self.chunk:
            raise ValueError(f"execute ({self.execute}) must lie between 1 and chunk ({self.chunk})")
        if not 1 <= self.decouple_samples <= self.noise_samples:
            raise ValueError(
                f"decouple_samples ({self.decouple_samples}) must lie between 1 and noise_samples ({self.noise_samples})"
            )
        if self.stale < 0 or not 0 <= self.committed < self.chunk:
            raise ValueError(
                f"stale ({self.stale}) must be 0 or more, committed ({self.committed}) must lie between 0 and chunk - 1 ({self.chunk - 1})"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must be 0 or more")
        if not 0 <= self.decouple_percentile < 100:
            raise ValueError(f"decouple_percentile ({self.decouple_percentile}) must lie in [0, 100)")

    @property
    def views(self):
        return len(self.cameras.split(","))

    @property
    def action_dim(self):
        return len(self.motors.split(","))

    @property
    def state_names(self):
        return (self.state or self.motors).split(",")

    @property
    def state_dim(self):
        return len(self.state_names)

    @property
    def tokens_per_view(self):
        return ((self.vision_size or self.image_size) // self.patch_size // self.pixel_shuffle) ** 2

    @classmethod
    def pick(cls, config):
        """The model's share of a larger config (dataclass or dict); keys that are not the model's are left out."""
        values = config if isinstance(config, dict) else dataclasses.asdict(config)
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


# SmolVLM2: SigLIP-B/16 at 512 px, 64 tokens a view, and SmolLM2. The shapes are those of the published config.json, which wins.
SMOLVLM = dict(
    vision_width=768,
    vision_depth=12,
    vision_heads=12,
    patch_size=16,
    vision_size=512,
    vision_enlarge=2048,
    conv_stem=False,
    vision_act="gelu_pytorch_tanh",
    vision_eps=1e-6,
    qk_norm=False,
    norm_eps=1e-5,
    rope_theta=1e5,
    vocab_size=49280,
    max_thought=64,
)

PRESETS = {
    # for tests: every part present, nothing learnt
    "debug": dict(
        image_size=32,
        patch_size=8,
        pixel_shuffle=2,
        vision_width=16,
        vision_depth=1,
        vision_heads=2,
        width=32,
        depth=2,
        heads=4,
        kv_heads=2,
        mlp_width=32,
        expert_width=32,
        expert_depth=1,
        expert_heads=2,
        queries=4,
        max_thought=6,
        decouple_percentile=25.0,
    ),
    # a newcomer's first success: one cube, one pad
    "tiny": dict(
        reasoning=False,
        width=96,
        depth=2,
        heads=3,
        kv_heads=3,
        mlp_width=256,
        expert_width=96,
        expert_depth=2,
        expert_heads=3,
    ),
    # the whole recipe from random weights on two CPU cores
    "small": dict(),
    # pretrained, one consumer GPU: 256 M + 55 M of expert, 507 M + 106 M
    "base256": dict(
        SMOLVLM,
        backbone="HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        width=576,
        depth=30,
        heads=9,
        kv_heads=3,
        mlp_width=1536,
        expert_width=512,
        expert_depth=8,
        expert_heads=8,
    ),
    "base": dict(
        SMOLVLM,
        backbone="HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        width=960,
        depth=32,
        heads=15,
        kv_heads=5,
        mlp_width=2560,
        expert_width=768,
        expert_depth=7,
        expert_heads=12,
    ),
    # the paper's: Qwen2.5-VL-3B through `transformers`, 20 queries, an expert of 0.69 B
    "paper": dict(
        backbone="Qwen/Qwen2.5-VL-3B-Instruct",
        wrapped=True,
        lora=16,
        image_size=224,
        max_thought=64,
        width=2048,
        depth=36,
        heads=16,
        kv_heads=2,
        mlp_width=11008,
        vocab_size=151936,
        tied=True,
        vision_width=1280,
        vision_depth=32,
        vision_heads=16,
        vision_mlp=3420,
        patch_size=14,
        pixel_shuffle=2,
        conv_stem=False,
        expert_width=1280,
        expert_depth=17,
        expert_heads=20,
    ),
}


def parse_config(cls, presets, argv, positional=None):
    """Command line -> config dataclass: `--config NAME --key=value`, `--key value`, `--flag`. Exits with status 2 on bad input.

    `positional` names the field that takes the one free word, if any.
    """

    def fail(message):
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)

    def nearest(word, names):
        close = difflib.get_close_matches(word, names, 1)
        return f"; did you mean {close[0]}?" if close else f"; choose from {', '.join(sorted(names))}"

    fields = {f.name: f for f in dataclasses.fields(cls)}
    if "--help" in argv or "-h" in argv:
        print(f"--config NAME   preset: {', '.join(presets)}")
        for f in fields.values():
            print(f"--{f.name}={f.default}   {f.metadata.get('help', '')}")
        raise SystemExit(0)
    preset, given, words = None, {}, list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if positional is None or positional in given:
                fail(f"unexpected word {word!r}; options are written --key=value")
            given[positional] = word
            continue
        key, equals, text = word[2:].partition("=")
        if key != "config" and key not in fields:
            fail(f"unknown option --{key}{nearest(key, list(fields) + ['config'])}")
        is_flag = key != "config" and fields[key].type in (bool, "bool")
        if not equals and is_flag:
            text = words.pop(0) if words and words[0].lower() in ("true", "false", "0", "1") else "true"
        elif not equals:
            if not words or words[0].startswith("--"):
                fail(f"--{key} needs a value: --{key}=...")
            text = words.pop(0)
        if key == "config":
            if text not in presets:
                fail(f"unknown preset {text!r}{nearest(text, presets)}")
            preset = text
            continue
        kind = fields[key].type if isinstance(fields[key].type, str) else fields[key].type.__name__
        try:
            if kind == "bool":
                given[key] = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            elif kind == "int":
                given[key] = int(text) if text.lstrip("+-").isdigit() else int(float(text))
                if float(given[key]) != float(text):
                    raise ValueError
            else:
                given[key] = float(text) if kind == "float" else text
        except (KeyError, ValueError, OverflowError):
            fail(f"--{key} takes {kind}, not {text!r}")
    values = dict(presets.get(preset, {}), **given)
    if preset is not None and "config" in fields:
        values["config"] = preset
    try:
        return cls(**values)
    except ValueError as e:
        fail(str(e))


def fast_cpu(threads=0):
    """Process-wide settings that make CPU training faster; call before the first large tensor.

    glibc hands freed buffers back to the kernel and the page faults of fresh ones dominate; keep them instead. Denormal
    numbers are flushed to zero because arithmetic on them is slow.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
            for parameter, value in (
                (-3, 1 << 30),
                (-1, 2**31 - 1),
                (-2, 1 << 28),
            ):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
                mallopt(parameter, value)
        except AttributeError:
            pass  # musl and others have no mallopt
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------
# VLM, SmolVLM-shaped: SigLIP-style vision encoder, pixel-shuffle connector, Llama-style language model


def relu2(x):
    """Squared ReLU: as good as GELU here and measurably cheaper on a CPU."""
    return F.relu(x).square()


class VisionBlock(nn.Module):
    """Pre-norm Transformer block of SigLIP: LayerNorm, biases everywhere, full attention."""

    def __init__(self, cfg):
        super().__init__()
        width, hidden = cfg.vision_width, cfg.vision_mlp or 4 * cfg.vision_width
        self.heads, self.gelu = cfg.vision_heads, cfg.vision_act == "gelu_pytorch_tanh"
        self.norm1, self.norm2 = nn.LayerNorm(width, cfg.vision_eps), nn.LayerNorm(width, cfg.vision_eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )  # 3 x (n, nh, length, hd)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + self.proj(y)
        y = self.up(self.norm2(x))  # (n, length, hidden)
        return x + self.down(F.gelu(y, approximate="tanh") if self.gelu else relu2(y))


class VisionEncoder(nn.Module):
    """Patches of one image (convolution stem, or SigLIP's single filter), SigLIP blocks, then pixel shuffle and projection to the
    language model's width (SmolVLM's connector)."""

    def __init__(self, cfg):
        super().__init__()
        side, self.shuffle, self.checkpointing = (
            (cfg.vision_size or cfg.image_size) // cfg.patch_size,
            cfg.pixel_shuffle,
            False,
        )
        if (
            cfg.conv_stem
        ):  # overlapping filters and a ReLU, same grid of patches (Xiao et al. 2021, arXiv 2106.14881)
            half = cfg.patch_size // 2
            self.patch = nn.Sequential(
                nn.Conv2d(3, cfg.vision_width // 2, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(cfg.vision_width // 2, cfg.vision_width, half + 2, stride=half, padding=1),
            )
        else:
            self.patch = nn.Conv2d(3, cfg.vision_width, cfg.patch_size, stride=cfg.patch_size)
        self.position = nn.Parameter(torch.zeros(side * side, cfg.vision_width))
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.vision_depth))
        self.norm = nn.LayerNorm(cfg.vision_width, cfg.vision_eps)
        self.connector = nn.Linear(cfg.vision_width * self.shuffle**2, cfg.width, bias=False)

    def forward(self, images):
        """(n, 3, px, px) in [-1, 1] -> (n, tokens_per_view, D)."""
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position  # (n, side*side, vision_width)
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.checkpointing and x.requires_grad
                else block(x)
            )
        x, k = self.norm(x), self.shuffle
        side = math.isqrt(x.shape[1])
        x = (
            x.view(len(x), side // k, k, side // k, k, -1)
            .transpose(2, 3)
            .reshape(len(x), (side // k) ** 2, -1)
        )  # (n, side^2/k^2, k*k*vision_width)
        return self.connector(x)


@lru_cache(maxsize=32)
def lanczos(n, m):
    """Pillow's Lanczos filter from n to m pixels as a matrix (m, n)."""
    scale = max(n / m, 1.0)
    x = (
        torch.arange(n) + 0.5 - (torch.arange(m, dtype=torch.float64)[:, None] + 0.5) * n / m
    ) / scale  # (m, n) distance in filter units
    weights = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    return (weights / weights.sum(1, keepdim=True)).float()


def resize(x, height, width):
    """Pillow's Lanczos resizing, columns first, each pass rounded to whole grey values. x (n, 3, h, w) fp32 of 0..255 -> (n, 3, height, width)."""
    with torch.autocast(x.device.type, enabled=False):
        if x.shape[3] != width:
            x = (
                (x @ lanczos(x.shape[3], width).T.to(x.device) + 0.5).floor().clamp(0, 255)
            )  # (n, 3, h, width)
        if x.shape[2] != height:
            x = (
                (lanczos(x.shape[2], height).to(x.device) @ x + 0.5).floor().clamp(0, 255)
            )  # (n, 3, height, width)
    return x


def fit(x, size, enlarge):
    """What SmolVLM's processor makes of a picture that it does not split: longest edge to `enlarge`, then a square. (n, 3, h, w) uint8 -> (n, 3, size, size) fp32."""
    x, (h, w) = x.float(), x.shape[2:]
    if not enlarge:
        return resize(x, size, size)
    height, width = (int(enlarge / (w / h)), enlarge) if w >= h else (enlarge, int(enlarge * (w / h)))
    height, width = (
        (height + height % 2, width) if w >= h else (height, width + width % 2)
    )  # the shorter side is made even
    return torch.cat(
        [resize(resize(one, height, width), size, size) for one in x.split(1)]
    )  # one by one: 50 MB each on the way


def rotation(positions, frequency):
    """Positions (..., n) and frequencies (hd/2,) -> cos, sin (..., n, hd) of rotary embedding, as rope() takes them."""
    angle = positions[..., None] * frequency  # (..., n, hd/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope(x, cos, sin):
    """Rotary position embedding (Llama's half-split form): a, b -> a cos - b sin, b cos + a sin. x (B, nh, n, hd)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class LanguageBlock(nn.Module):
    """Llama block: RMSNorm, rotary grouped-query attention, SwiGLU."""

    def __init__(self, cfg):
        super().__init__()
        self.nh, self.nkv, self.hd = cfg.heads, cfg.kv_heads, cfg.width // cfg.heads
        self.norm1, self.norm2 = (
            nn.RMSNorm(cfg.width, cfg.norm_eps or None),
            nn.RMSNorm(cfg.width, cfg.norm_eps or None),
        )
        self.qkv = nn.Linear(cfg.width, (self.nh + 2 * self.nkv) * self.hd, bias=False)
        self.proj = nn.Linear(cfg.width, cfg.width, bias=False)
        self.gate_up = nn.Linear(cfg.width, 2 * cfg.mlp_width, bias=False)
        self.down = nn.Linear(cfg.mlp_width, cfg.width, bias=False)
        self.qk_gain = nn.Parameter(torch.ones(self.nh + self.nkv, 1, self.hd)) if cfg.qk_norm else None

    def forward(self, x, cos, sin, mask, cache=None):
        """x (B, n, D); mask (B, 1, n, past + n) bool, True = may look; cache: [k, v] of the past, extended in place."""
        B, n, D = x.shape
        qk, v = (
            self.qkv(self.norm1(x))
            .view(B, n, -1, self.hd)
            .transpose(1, 2)
            .split([self.nh + self.nkv, self.nkv], dim=1)
        )  # (B, heads, n, hd)
        if self.qk_gain is not None:
            qk = F.rms_norm(qk, (self.hd,)) * self.qk_gain
        q, k = rope(qk, cos, sin).split([self.nh, self.nkv], dim=1)  # (B, nh, n, hd), (B, kv_heads, n, hd)
        if cache is not None:
            if cache:
                k, v = (
                    torch.cat((cache[0], k), dim=2),
                    torch.cat((cache[1], v), dim=2),
                )  # (B, kv_heads, past + n, hd)
            cache[:] = [k, v]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=self.nh != self.nkv
        )  # (B, nh, n, hd)
        x = x + self.proj(y.transpose(1, 2).reshape(B, n, D))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)  # 2 x (B, n, mlp_width)
        return x + self.down(F.silu(gate) * up)


class LanguageModel(nn.Module):
    """Causal Llama-style language model over embeddings."""

    def __init__(self, cfg):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.width)
        self.blocks = nn.ModuleList(LanguageBlock(cfg) for _ in range(cfg.depth))
        self.norm = nn.RMSNorm(cfg.width, cfg.norm_eps or None)
        self.head = None if cfg.tied else nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        self.checkpointing = False
        hd = cfg.width // cfg.heads
        exponent = torch.arange(0, hd, 2) / hd
        # the same number, but pretrained weights know the rounding of the first form
        frequency = 1.0 / cfg.rope_theta**exponent if cfg.backbone else cfg.rope_theta**-exponent
        self.register_buffer("frequency", frequency, persistent=False)  # (hd/2,)

    def forward(self, x, positions, mask, caches=None):
        """x (B, n, D), positions (B, n), mask (B, n, past + n) -> hidden states (B, n, D)."""
        cos, sin = (
            table.to(x.dtype) for table in rotation(positions[:, None], self.frequency.float())
        )  # (B, 1, n, hd)
        for i, block in enumerate(self.blocks):
            if self.checkpointing and x.requires_grad:
                x = checkpoint(block, x, cos, sin, mask[:, None], use_reentrant=False)
            else:
                x = block(x, cos, sin, mask[:, None], caches[i] if caches is not None else None)
        return self.norm(x)

    def new_caches(self):
        return [[] for _ in self.blocks]

    def logits(self, hidden):
        """(..., D) -> (..., vocab) in fp32 (fp64 for a model in fp64)."""
        logits = F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class VLM(nn.Module):
    """Images, text and feature queries in one sequence: [P prefix | T text | Q queries].

    The mask has one rule: a token sees itself, and earlier tokens of its own segment or of the shared prefix (segment 0: the
    images, with what the chat format of a pretrained backbone writes around them). Questions packed behind one image are
    segments 1, 2, ...: each sees the picture and itself, never another question or its answer. Without that isolation a model
    trained from nothing learns to answer from the neighbours' answers instead of from the picture. Padding is segment -1. The
    queries belong to segment 1, the instruction with its thought.
    """

    def __init__(self, cfg, tokenizer):
        super().__init__()
        self.size, self.enlarge = cfg.vision_size, cfg.vision_enlarge
        self.vision = VisionEncoder(cfg)
        self.lm = LanguageModel(cfg)
        self.queries = nn.Parameter(torch.randn(cfg.queries, cfg.width))
        self.set_frame(tokenizer)

    def set_frame(self, tokenizer):
        """Token ids of the chat format: what stands before the images, before each and behind each."""
        for name in ("start", "image_open", "image_close"):
            self.register_buffer(
                name, torch.tensor(getattr(tokenizer, name), dtype=torch.int64), persistent=False
            )

    def parts(self):
        return {"vision": list(self.vision.parameters()), "language": list(self.lm.parameters())}

    def see(self, images):
        """(B, V, px, px, 3) uint8 -> visual tokens of every view (B, V, n, D)."""
        B, V = images.shape[:2]
        x = images.flatten(0, 1).permute(0, 3, 1, 2)  # (B*V, 3, px, px)
        x = fit(x, self.size, self.enlarge) if self.size else x
        x = x.to(self.queries.dtype).div(127.5).sub(1.0)
        return self.vision(x).view(B, V, -1, self.queries.shape[-1])  # (B, V, n, D)

    def prefix(self, visual):
        """Visual tokens (B, V, n, D) -> what all texts follow: embeddings (B, P, D), positions (P,), position of the first text token."""
        x = visual.flatten(1, 2)
        if len(self.start) or len(self.image_open):
            start, before, behind = (
                self.lm.embed(ids).expand(len(visual), -1, -1)
                for ids in (self.start, self.image_open, self.image_close)
            )
            x = torch.cat(
                [start, *(part for view in visual.unbind(1) for part in (before, view, behind))], dim=1
            )  # (B, P, D)
        return x, torch.arange(x.shape[1], device=x.device), x.shape[1]

    @staticmethod
    def visible(segments):
        """Segments (B, n) -> (B, n, n) bool: may token i look at token j?"""
        n = segments.shape[1]
        theirs, mine = segments[:, None, :], segments[:, :, None]
        causal = torch.ones(n, n, dtype=torch.bool, device=segments.device).tril()
        itself = torch.eye(
            n, dtype=torch.bool, device=segments.device
        )  # padding sees only itself, so that no softmax is empty
        return (((theirs == mine) & (theirs >= 0)) | (theirs == 0)) & causal | itself

    def forward(self, visual, tokens, segments, positions, with_queries):
        """visual (B, V, n, D); tokens, segments, positions (B, T) -> hidden states of text (B, T, D) and queries (B, Q, D) or None.

        `positions` count within a segment, from 0; every segment starts right behind the images, as if it were alone.
        """
        prefix, places, begin = self.prefix(visual)
        B, P, _ = prefix.shape
        x = [prefix, self.lm.embed(tokens)]
        seg = [segments.new_zeros(B, P), segments]
        pos = [begin + positions]
        if with_queries:
            Q = len(self.queries)
            x.append(self.queries.expand(B, -1, -1))
            seg.append(segments.new_ones(B, Q))
            length = (segments == 1).sum(1, keepdim=True)  # (B, 1) tokens of instruction and thought
            pos.append(begin + length + torch.arange(Q, device=tokens.device))
        seg = torch.cat(seg, dim=1)  # (B, N)
        hidden = self.lm(
            torch.cat(x, dim=1), self.places(places, torch.cat(pos, dim=1)), self.visible(seg)
        )  # (B, N, D)
        text, queries = hidden[:, P : P + tokens.shape[1]], hidden[:, P + tokens.shape[1] :]
        return text, queries if with_queries else None

    @staticmethod
    def places(prefix, text):
        """Positions of the prefix (..., P) and of text (B, n) -> of both (..., B, P + n). Leading axes: Qwen's time, row, column."""
        axes, B = prefix.shape[:-1], len(text)
        return torch.cat((prefix.unsqueeze(-2).expand(*axes, B, -1), text.expand(*axes, B, -1)), dim=-1)

    @torch.inference_mode()
    def generate(self, visual, prompts, stop, limit, with_queries=False):
        """Greedy decoding with a key/value cache; rows may have prompts of different length.

        visual (B, V, n, D), prompts: B lists of token ids -> (B lists of generated ids without `stop`, query states (B, Q, D) or None).
        `limit` 0 writes no thought and goes straight to the queries.
        """
        prefix, places, begin = self.prefix(visual)
        B, P, _ = prefix.shape
        device = visual.device
        length = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
        T = int(length.max())
        tokens = torch.tensor([list(p) + [0] * (T - len(p)) for p in prompts], device=device)  # (B, T)
        segments = torch.where(torch.arange(T, device=device) < length[:, None], 1, -1)  # (B, T)
        segments = torch.cat((segments.new_zeros(B, P), segments), dim=1)  # (B, P + T)
        positions = self.places(places, begin + torch.arange(T, device=device).expand(B, -1))
        caches = self.lm.new_caches()
        hidden = self.lm(
            torch.cat((prefix, self.lm.embed(tokens)), dim=1), positions, self.visible(segments), caches
        )
        last = hidden[torch.arange(B, device=device), P + length - 1]  # (B, D)
        past = segments >= 0  # (B, P + T): what every later token sees
        written = [[] for _ in range(B)]
        alive = torch.ones(B, dtype=torch.bool, device=device)
        for i in range(limit):
            token = (
                self.lm.logits(last).argmax(-1) if i < limit - 1 else torch.full((B,), stop, device=device)
            )  # (B,), closed at the limit
            for row, (word, live) in enumerate(zip(token.tolist(), alive.tolist())):
                if live and word != stop:
                    written[row].append(word)
            past = torch.cat((past, alive[:, None]), dim=1)  # rows that ended write padding
            last = self.lm(self.lm.embed(token)[:, None], (begin + length)[:, None], past[:, None], caches)[
                :, 0
            ]
            length = length + alive
            alive = alive & (token != stop)
            if not alive.any():
                break
        if not with_queries:
            return written, None
        Q = len(self.queries)
        positions = (begin + length)[:, None] + torch.arange(Q, device=device)  # (B, Q)
        causal = torch.ones(Q, Q, dtype=torch.bool, device=device).tril()
        mask = torch.cat(
            (past[:, None].expand(-1, Q, -1), causal.expand(B, -1, -1)), dim=2
        )  # (B, Q, past + Q)
        states = self.lm(self.queries.expand(B, -1, -1), positions, mask, caches)
        return written, states


# ---------------------------------------------------------------------------------------------------------------
# Pretrained backbones


def fetch_backbone(name, weights=True):
    """Folder of a pretrained VLM: `name` itself if it is one, else the hub repository of that name, downloaded or from the cache.

    Without `weights` only its configuration and tokenizer. Raises FileNotFoundError or ValueError in one line.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
            )
        )
    except GatedRepoError:
        raise FileNotFoundError(
            f"{name} asks for its licence to be accepted: do so on its hub page, then run: hf auth login"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"{name} is neither a folder nor a public model on the hub; check --backbone"
        ) from None
    except Exception as e:  # no network, a proxy, a full disk: the client has a dozen names for it
        raise FileNotFoundError(
            f"cannot download {name} ({type(e).__name__}); check network and disk, or give a folder: --backbone=FOLDER"
        ) from None


def backbone_fields(folder):
    """The fields of Config that a pretrained VLM's config.json fixes. SmolVLM that deviates from this file is refused with the reason."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        text, vision = config.get("text_config", config), config["vision_config"]
        fields = dict(
            width=text["hidden_size"],
            depth=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            mlp_width=text["intermediate_size"],
            vocab_size=text["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            qk_norm=False,
            conv_stem=False,
        )
        fields["kv_heads"] = text.get("num_key_value_heads") or fields["heads"]
    except (OSError, KeyError, json.JSONDecodeError) as e:
        raise ValueError(
            f"{folder} is no vision-language model that this program reads (config.json: {type(e).__name__} {e})"
        ) from None
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    fields["rope_theta"] = float(text.get("rope_theta") or rope.get("rope_theta", 1e4))
    get = lambda *names, default: next((vision[n] for n in names if n in vision), default)
    fields |= dict(
        vision_width=get("hidden_size", "embed_dim", default=1152),
        vision_depth=get("num_hidden_layers", "depth", default=12),
        vision_heads=get("num_attention_heads", "num_heads", default=16),
        vision_mlp=get("intermediate_size", default=3072),
        patch_size=get("patch_size", default=32),
        pixel_shuffle=config.get("scale_factor", vision.get("spatial_merge_size", 2)),
    )
    if config.get("model_type") not in ("smolvlm", "idefics3"):
        return fields | {"wrapped": True}
    pictures = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text())
            pictures |= found.get("image_processor", found)
    size = get("image_size", default=224)
    here = {
        "text hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "head_dim": (
            text.get("head_dim") or fields["width"] // fields["heads"],
            fields["width"] // fields["heads"],
        ),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "attention_bias": (text.get("attention_bias", False), False),
        "mlp_bias": (text.get("mlp_bias", False), False),
        "qk_layer_norms": (text.get("qk_layer_norms", False), False),
        "resample": (pictures.get("resample", 1), 1),
        "image_mean": (set(pictures.get("image_mean", [0.5])), {0.5}),
        "image_std": (set(pictures.get("image_std", [0.5])), {0.5}),
        "max_image_size": (pictures.get("max_image_size", {}).get("longest_edge", size), size),
    }
    for name, (theirs, ours) in here.items():
        if theirs != ours:
            raise ValueError(f"{folder} has {name} {theirs}, this program knows SmolVLM with {ours}")
    return fields | dict(
        wrapped=False,
        vision_act=get("hidden_act", default="gelu_pytorch_tanh"),
        vision_eps=get("layer_norm_eps", default=1e-6),
        norm_eps=text.get("rms_norm_eps", 1e-6),
        vision_size=size,
        vision_enlarge=pictures.get("size", {}).get("longest_edge", 4 * size),
    )


def read_safetensors(folder):
    """All tensors of a folder's *.safetensors files, or one line that says what is wrong with them."""
    tensors, files = {}, sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as e:
            raise ValueError(f"{file} is damaged ({e}); delete it and download it again") from None
    return tensors


def load_smolvlm(vlm, folder):
    """Every tensor of a SmolVLM checkpoint into `vlm`: q, k, v and gate, up are packed, every key and shape is checked. -> tensors read."""
    eye, text = "model.vision_model.", "model.text_model."
    sources = {
        "vision.patch": [eye + "embeddings.patch_embedding"],
        "vision.position": [eye + "embeddings.position_embedding.weight"],
        "vision.norm": [eye + "post_layernorm"],
        "vision.connector": ["model.connector.modality_projection.proj"],
        "lm.embed": [text + "embed_tokens"],
        "lm.norm": [text + "norm"],
        "lm.head": ["lm_head"],
    }
    for ours, theirs, parts in (
        (
            "vision.blocks.",
            eye + "encoder.layers.",
            {
                "norm1": "layer_norm1",
                "norm2": "layer_norm2",
                "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
                "proj": "self_attn.out_proj",
                "up": "mlp.fc1",
                "down": "mlp.fc2",
            },
        ),
        (
            "lm.blocks.",
            text + "layers.",
            {
                "norm1": "input_layernorm",
                "norm2": "post_attention_layernorm",
                "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
                "proj": "self_attn.o_proj",
                "gate_up": "mlp.gate_proj mlp.up_proj",
                "down": "mlp.down_proj",
            },
        ),
    ):
        for i in range(len(vlm.get_submodule(ours[:-1]))):
            sources |= {
                f"{ours}{i}.{mine}": [f"{theirs}{i}.{name}" for name in names.split()]
                for mine, names in parts.items()
            }
    theirs, own = read_safetensors(folder), {k: v for k, v in vlm.state_dict().items() if k != "queries"}
    if "lm_head.weight" in theirs and vlm.lm.head is None:  # tied, and yet written out
        theirs.pop("lm_head.weight")
    read, loaded = set(), {}
    for name, tensor in own.items():
        stem, _, kind = name.rpartition(".")
        keys = sources[name] if name in sources else [f"{source}.{kind}" for source in sources[stem]]
        if missing := [key for key in keys if key not in theirs]:
            raise ValueError(f"{folder} lacks {missing[0]}; its weights do not fit its config.json")
        loaded[name] = torch.cat([theirs[key] for key in keys])
        read |= set(keys)
        if loaded[name].shape != tensor.shape:
            raise ValueError(
                f"{folder} does not fit: {' + '.join(keys)} is {tuple(loaded[name].shape)} there, {name} {tuple(tensor.shape)} here"
            )
    if unknown := sorted(theirs.keys() - read):
        raise ValueError(
            f"{folder} holds {len(unknown)} tensors that SmolVLM does not know, such as {unknown[0]}"
        )
    vlm.load_state_dict(loaded | {"queries": vlm.queries.data})
    return len(read)


class WrappedLanguageModel:
    """The language model of a `transformers` VLM with LanguageModel's interface (no module: WrappedVLM.model holds the weights)."""

    def __init__(self, text, head):
        self.text, self.head = text, head

    def embed(self, tokens):
        return self.text.get_input_embeddings()(tokens)

    def __call__(self, x, positions, mask, caches=None):
        """x (B, n, D), positions (B, n) or (3, B, n), mask (B, n, past + n) -> hidden states (B, n, D)."""
        out = self.text(
            inputs_embeds=x,
            position_ids=positions,
            attention_mask=mask[:, None],
            past_key_values=caches,
            use_cache=caches is not None,
        )
        return out.last_hidden_state

    def new_caches(self):
        from transformers import DynamicCache

        return DynamicCache()

    def logits(self, hidden):
        return F.linear(
            hidden, self.head.weight if self.head is not None else self.text.get_input_embeddings().weight
        ).float()


class WrappedVLM(VLM):
    """Any image-text model of `transformers`: its vision tower and language model, called with our sequence, mask and positions.

    So packing, feature queries, generation and answers are VLM's own. The model must offer get_image_features and a language
    model that takes inputs_embeds and a 4-D mask; data.ChatTokenizer must know its chat format.
    """

    def __init__(self, cfg, tokenizer, folder, pretrained):
        nn.Module.__init__(self)
        try:
            import transformers
        except ImportError:
            raise ValueError(
                f"{cfg.backbone} runs in transformers: pip install transformers torchvision (or choose a SmolVLM)"
            ) from None
        load = transformers.AutoModelForImageTextToText
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            self.processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            self.whole = (
                {"do_image_splitting": False} if hasattr(self.processor, "do_image_splitting") else {}
            )
            if pretrained:
                whole, info = load.from_pretrained(
                    folder,
                    config=config,
                    dtype=torch.float32,
                    attn_implementation="sdpa",
                    output_loading_info=True,
                    local_files_only=True,
                )
            else:
                whole, info = load.from_config(config, attn_implementation="sdpa"), {}
        except ImportError as e:
            raise ValueError(
                f"{folder} needs a further package ({str(e).strip().splitlines()[0]}): pip install torchvision"
            ) from None
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
            raise ValueError(f"transformers cannot load {folder}: {' '.join(str(e).split())[:200]}") from None
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                raise ValueError(
                    f"{folder} does not fit its config.json: {kind.replace('_', ' ')} {sorted(map(str, info[kind]))[:3]}"
                )
        self.model, self.config = whole.model, config
        self.head = (
            None
            if whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
            else whole.get_output_embeddings()
        )
        text = next(
            getattr(self.model, name)
            for name in ("language_model", "text_model")
            if hasattr(self.model, name)
        )
        self.lm = WrappedLanguageModel(text, self.head)
        self.queries = nn.Parameter(torch.randn(cfg.queries, cfg.width))
        self.set_frame(tokenizer)

    def parts(self):
        language = list(self.lm.text.parameters()) + ([] if self.head is None else [self.head.weight])
        ids = {id(p) for p in language}
        return {"vision": [p for p in self.model.parameters() if id(p) not in ids], "language": language}

    def see(self, images):
        """(B, V, px, px, 3) uint8 -> visual tokens of every view (B, V, n, D), by the model's own image processor."""
        B, V = images.shape[:2]
        inputs = self.processor(
            images=[[picture] for picture in images.flatten(0, 1).cpu().numpy()],
            return_tensors="pt",
            **self.whole,
        )
        features = self.model.get_image_features(
            **{k: v.to(self.queries.device) for k, v in inputs.items()}
        ).pooler_output
        return torch.cat(list(features)).view(B, V, -1, self.queries.shape[-1])  # (B, V, n, D)

    def prefix(self, visual):
        x, positions, begin = super().prefix(visual)
        if not hasattr(self.model, "get_rope_index"):
            return x, positions, begin
        # Qwen: a picture's tokens stand at (time, row, column); the text goes on behind its longest side
        side, at, places = math.isqrt(visual.shape[2]), 0, []
        text = lambda n: (at + torch.arange(n, device=x.device)).expand(3, -1)  # (3, n)
        for view in range(visual.shape[1]):
            places.append(
                text(len(self.image_open) + (len(self.start) if view == 0 else len(self.image_close)))
            )
            at += places[-1].shape[1]
            row, column = (
                (at + torch.arange(side**2, device=x.device) // side),
                (at + torch.arange(side**2, device=x.device) % side),
            )
            places.append(torch.stack((torch.full_like(row, at), row, column)))  # (3, side^2)
            at += side
        places.append(text(len(self.image_close)))
        return x, torch.cat(places, dim=1), at + len(self.image_close)


# ---------------------------------------------------------------------------------------------------------------
# Action expert: flow matching on a chunk of joint targets, conditioned on the adapted feature query states


def time_embedding(t, dim):
    """Sines and cosines of flow time t in [0, 1], periods 4e-3 .. 4 (pi0's range): (...,) -> (..., dim)."""
    frequency = 2 * math.pi / torch.logspace(math.log10(4e-3), math.log10(4.0), dim // 2, device=t.device)
    angle = t.float()[..., None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class ExpertBlock(nn.Module):
    """Self-attention over the chunk, cross-attention to the query states, MLP; each modulated by flow time (adaLN-zero, DiT)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.modulate = nn.Linear(width, 9 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.cross_q, self.cross_proj = (
            nn.Linear(width, width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.cross_kv = nn.Linear(width, 2 * width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def keys_values(self, states):
        """Adapted states (B, Q, De) -> keys, values (2, B, nh, Q, hd): once per chunk, for all noise samples and steps."""
        B, Q, _ = states.shape
        return self.cross_kv(states).view(B, Q, 2, self.heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, modulation, keys_values, attention=None):
        """x (B, M, L, De), modulation (B, M, 1 or L, 9 De) -> (B, M, L, De). A list `attention` receives (B, nh, M*L, Q) weights."""
        B, M, L, De = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = modulation.chunk(9, dim=-1)
        y = F.layer_norm(x, (De,)) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).view(B * M, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (B*M, nh, L, hd)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, M, L, De)
        x = x + gate1 * self.proj(y)

        y = F.layer_norm(x, (De,)) * (1 + scale2) + shift2
        q = (
            self.cross_q(y).view(B, M * L, self.heads, -1).transpose(1, 2)
        )  # (B, nh, M*L, hd): the noise samples share keys and values
        k, v = keys_values
        if attention is not None:
            attention.append((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, M, L, De)
        x = x + gate2 * self.cross_proj(y)

        y = F.layer_norm(x, (De,)) * (1 + scale3) + shift3
        return x + gate3 * self.down(relu2(self.up(y)))


class Expert(nn.Module):
    """Velocity field v(x_t, t | joint state, adapted query states). Tokens: [joint state | H actions]."""

    def __init__(self, cfg):
        super().__init__()
        De, A = cfg.expert_width, cfg.action_dim
        self.action_in, self.state_in = nn.Linear(A, De), nn.Linear(cfg.state_dim, De)
        self.position = nn.Parameter(torch.randn(1 + cfg.chunk, De) * 0.5)
        self.time = nn.Sequential(nn.Linear(De, De), nn.SiLU(), nn.Linear(De, De))
        self.age = nn.Embedding(cfg.stale + 1, De) if cfg.stale else None
        self.blocks = nn.ModuleList(ExpertBlock(De, cfg.expert_heads) for _ in range(cfg.expert_depth))
        self.modulate = nn.Linear(De, 2 * De)
        self.action_out = nn.Linear(De, A)

    def condition(self, states):
        """Adapted states (B, Q, De) -> keys and values of every block."""
        return [block.keys_values(states) for block in self.blocks]

    def modulation(self, t, age=None):
        """Flow times (B, M), or (B, M, H) where each action has its own -> adaLN numbers of every block and of the output, each
        (B, M, 1 or 1 + H, 9 De or 2 De). age: control steps since the pictures behind the query states, int64, any shape that
        broadcasts with (B, M); None is 0."""
        De = self.time[0].in_features
        t = (
            t[..., None] if t.ndim == 2 else torch.cat((t[..., -1:], t), dim=-1)
        )  # (B, M, 1 or 1 + H): the joint state shares the last action's
        c = self.time(time_embedding(t, De).to(self.position.dtype))  # (B, M, 1 or 1 + H, De)
        if self.age is not None:
            c = (
                c
                + self.age(torch.zeros(1, 1, dtype=torch.long, device=t.device) if age is None else age)[
                    :, :, None
                ]
            )
        c = F.silu(c)
        return [block.modulate(c) for block in self.blocks] + [self.modulate(c)]

    def forward(self, x, modulation, state, keys_values, attention=None):
        """x (B, M, H, A) noisy chunk, state (B, S), both normalised -> velocity (B, M, H, A)."""
        B, M = x.shape[:2]
        state = self.state_in(state)[:, None, None].expand(B, M, 1, -1)  # (B, M, 1, De)
        h = torch.cat((state, self.action_in(x)), dim=2) + self.position  # (B, M, 1 + H, De)
        for block, m, kv in zip(self.blocks, modulation, keys_values):
            h = block(h, m, kv, attention)
        shift, scale = modulation[-1][:, :, -x.shape[2] :].chunk(2, dim=-1)  # 2 x (B, M, 1 or H, De)
        h = F.layer_norm(h[:, :, 1:], h.shape[-1:]) * (1 + scale) + shift  # (B, M, H, De)
        return self.action_out(h)


# ---------------------------------------------------------------------------------------------------------------
# The policy


class SyVLA(nn.Module):
    """VLM + feature queries + adapter + expert, with the data's normalisation statistics as buffers.

    tokenizer: data.Tokenizer, or anything with its `prompt`, `question`, `decode`, `end_thought`, `end_answer`, `start`,
    `image_open` and `image_close`. folder: where the backbone lies (a wrapped one needs its configuration); `pretrained`: with its weights.
    """

    def __init__(self, cfg, tokenizer, folder=None, pretrained=False):
        super().__init__()
        if len(tokenizer) > cfg.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens but vocab_size is {cfg.vocab_size}; raise --vocab_size"
            )
        self.cfg, self.tokenizer = cfg, tokenizer
        self.vlm = WrappedVLM(cfg, tokenizer, folder, pretrained) if cfg.wrapped else VLM(cfg, tokenizer)
        # No bias before or after the nonlinearity: a query state masked to zero stays zero behind the adapter.
        self.adapter = nn.Sequential(
            nn.Linear(cfg.width, cfg.expert_width, bias=False),
            nn.SiLU(),
            nn.Linear(cfg.expert_width, cfg.expert_width, bias=False),
        )
        self.expert = Expert(cfg)
        for name, size in (
            ("state_low", cfg.state_dim),
            ("state_high", cfg.state_dim),
            ("action_low", cfg.action_dim),
            ("action_high", cfg.action_dim),
        ):
            self.register_buffer(
                name, torch.full((size,), math.nan)
            )  # NaN until set_statistics: never silently unnormalised
        self.mark = lambda stage: (
            None
        )  # called after every stage; --bench and the latency table put a stopwatch here
        self._init_weights()
        if pretrained and not cfg.wrapped:
            count = load_smolvlm(self.vlm, folder)
            if os.environ.get("RANK", "0") == "0":
                print(f"{folder}: {count} tensors read, every key and shape as expected")
        if pretrained:  # queries as loud as words
            self.vlm.queries.data *= (
                self.vlm.lm.embed(torch.arange(cfg.vocab_size)).std() / self.vlm.queries.std()
            )
        if cfg.lora:
            self._add_lora()

    def _add_lora(self):
        """Low-rank adapters (Hu et al. 2021) beside every matrix of the language model's blocks, which is frozen."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ValueError("--lora needs peft: pip install peft") from None
        for parameter in self.vlm.parts()["language"]:
            parameter.requires_grad_(False)
        text = self.vlm.lm.text if self.cfg.wrapped else self.vlm.lm
        names = [
            name for name, module in text.named_modules() if isinstance(module, nn.Linear) and name != "head"
        ]
        inject_adapter_in_model(
            LoraConfig(r=self.cfg.lora, lora_alpha=2 * self.cfg.lora, target_modules=names), text
        )

    def _init_weights(self):
        for module in (
            [*self.adapter.modules(), *self.expert.modules()] if self.cfg.wrapped else self.modules()
        ):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
        for block in self.expert.blocks:
            nn.init.zeros_(block.modulate.weight)
        nn.init.zeros_(self.expert.modulate.weight)
        if self.expert.age is not None:
            nn.init.zeros_(self.expert.age.weight)  # an age that was never met counts as none
        nn.init.zeros_(self.expert.action_out.weight)
        if self.cfg.wrapped:
            return
        # Filters that answer a grey patch with nothing: the table would drown the few pixels of a cube.
        filters = next(self.vlm.vision.patch.parameters()).data  # (channels, 3, k, k)
        filters.sub_(filters.mean(dim=(1, 2, 3), keepdim=True)).mul_(2)
        # As loud as the patches: what attention brings to a word is a token's content, so where it was must be part of it.
        nn.init.normal_(self.vlm.vision.position, std=0.5)
        # Residual branches and modulation start at zero: every block begins as the identity (adaLN-zero in the expert).
        for block in [*self.vlm.vision.blocks, *self.vlm.lm.blocks]:
            nn.init.zeros_(block.proj.weight)
            nn.init.zeros_(block.down.weight)
        if self.vlm.lm.head is not None:
            nn.init.zeros_(self.vlm.lm.head.weight)

    def set_statistics(self, statistics):
        """{"state": {"q01": (S,), "q99": (S,)}, "action": {"q01": (A,), "q99": (A,)}} in LeRobot units, as data.py computes them."""
        for name in ("state", "action"):
            for side, quantile in (("low", "q01"), ("high", "q99")):
                getattr(self, f"{name}_{side}").copy_(torch.as_tensor(statistics[name][quantile]))

    def normalise(self, x, name):
        """LeRobot units -> 1st..99th percentile mapped to [-1, 1], clipped to +-1.5 (a constant joint maps to 0)."""
        low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
        span = high - low
        return torch.where(span <= 1e-3, torch.zeros_like(x), 2 * (x - low) / span.clamp(min=1e-3) - 1).clamp(
            -1.5, 1.5
        )

    def denormalise(self, x):
        """Normalised action -> LeRobot units."""
        return self.action_low + (x + 1) / 2 * (self.action_high - self.action_low)

    # -- training -----------------------------------------------------------------------------------------------

    def flow_loss(self, states, state, actions, valid, eps, t, attention=None, age=None):
        """Conditional flow matching, one number per noise sample.

        states (B, Q, D) feature query states, state (B, S), actions (B, H, A) normalised, valid (B, H) bool (False: padded
        tail of an episode), eps (B, M, H, A), t (B, M) -> (B, M), mean over valid steps and joints, fp32. t may be (B, M, H),
        with 0 for actions that are given and so not trained; age (B,) of the query states in control steps.
        """
        a, time = actions[:, None], t[:, :, None, None] if t.ndim == 2 else t[..., None]
        x_t = time * eps + (1 - time) * a  # (B, M, H, A)
        keys_values = self.expert.condition(self.adapter(states))
        v = self.expert(
            x_t,
            self.expert.modulation(t, None if age is None else age[:, None]),
            state,
            keys_values,
            attention,
        )
        error = (v.float() - (eps - a)).square().mean(-1)  # (B, M, H)
        weight = valid[:, None].float()  # (B, 1, H)
        if t.ndim == 3:
            weight = weight * (t > 0)  # (B, M, H)
        return (error * weight).sum(-1) / weight.sum(-1).clamp(min=1)

    def gradient_norms(self, states, *flow_args, **more):
        """|| d loss / d h_i || of every feature query state: the paper's measure of what a state contributes. -> (B, Q)."""
        leaf = states.detach().requires_grad_()
        loss = (
            self.flow_loss(leaf, *flow_args, **more).mean(1).sum()
        )  # a sum over the batch keeps per-sample gradients exact
        (gradient,) = torch.autograd.grad(
            loss, leaf
        )  # only the expert is walked through, and no weight gradient is made
        return gradient.float().norm(dim=-1)

    def keep_mask(self, states, state, actions, valid, eps, t, uniform, **more):
        """Intention decoupling, first pass: which feature query states the second pass may use. -> (B, Q) bool.

        States whose gradient norm lies under the percentile are dropped (paper: 5th). Per sample at least one is dropped, so
        n=20 at 5 % masks exactly one; over the batch one threshold serves all. `random` and `attention` are controls that drop
        as many, drawn by `uniform` (B, Q) or by lowest attention mass.
        """
        m = self.cfg.decouple_samples
        first = (
            state,
            actions,
            valid,
            eps[:, :m],
            t[:, :m],
        )  # the same noise and times that the second pass sees
        if self.cfg.decouple == "gradient":
            score = self.gradient_norms(states, *first, **more)
        elif self.cfg.decouple == "attention":
            attention = []
            with torch.no_grad():
                self.flow_loss(states, *first, attention, **more)
            score = (
                torch.stack(attention).float().mean(dim=(0, 2, 3))
            )  # (B, Q): mean over blocks, heads, action tokens
        else:
            score = uniform
        q = self.cfg.decouple_percentile / 100
        if self.cfg.decouple_scope == "batch":
            return score >= torch.quantile(score.flatten(), q)
        drop = min(max(1, round(q * score.shape[1])), score.shape[1] - 1) if q > 0 else 0  # never all of them
        return score.argsort(dim=1).argsort(dim=1) >= drop

    def forward(self, batch):
        """Losses of one batch, each a mean over the batch: {"text", and for action samples "action", "kept"}.

        images (B, V, px, px, 3) uint8; tokens, segments, positions, labels (B, T) int64 (label -100: not trained). Action
        samples also carry state (B, S), actions (B, H, A) in LeRobot units, valid (B, H), eps (B, M, H, A), t (B, M) or (B, M, H),
        uniform (B, Q), and with --stale age (B,): images and text are those of so many control steps before. Of a frozen VLM the
        batch may bring the query states (B, Q, D) in place of images and text; there is no text loss then.
        """
        with_actions, losses, states = "actions" in batch, {}, batch.get("states")
        if states is None:
            visual = self.vlm.see(batch["images"])
            self.mark("vision")
            text, states = self.vlm(
                visual, batch["tokens"], batch["segments"], batch["positions"], with_actions
            )
            labels = batch["labels"]
            rows, columns = (labels >= 0).nonzero(as_tuple=True)
            nll = F.cross_entropy(
                self.vlm.lm.logits(text[rows, columns]), labels[rows, columns], reduction="none"
            )
            # a mean per row, then over rows: unlike a mean over tokens it does not depend on how rows are spread over processes
            per_row = nll.new_zeros(len(labels)).index_add(0, rows, nll) / (labels >= 0).sum(1).clamp(min=1)
            losses["text"] = per_row.mean()
            self.mark("language")
        if with_actions:
            state, actions = (
                self.normalise(batch["state"], "state"),
                self.normalise(batch["actions"], "action"),
            )
            flow = (state, actions, batch["valid"], batch["eps"], batch["t"])
            more = {"age": batch["age"]} if "age" in batch else {}
            if self.cfg.decouple != "off":
                keep = self.keep_mask(states, *flow, batch["uniform"], **more)
                states = (
                    states * keep[..., None]
                )  # h_masked = h_raw * 1(||g|| >= tau): no gradient reaches a masked state
                losses["kept"] = keep.float().mean()
                self.mark("decoupling")
            losses["action"] = self.flow_loss(states, *flow, **more).mean()
            self.mark("expert")
        return losses

    def fingerprint(self, *words):
        """Twelve hex digits that name the VLM's weights, and words: for files of what a frozen VLM made of something."""
        made_of = hashlib.sha256(" ".join(map(str, words)).encode())
        for parameter in self.vlm.state_dict().values():
            made_of.update(parameter.float().cpu().numpy().tobytes())
        return made_of.hexdigest()[:12]

    # -- acting -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def sample_chunk(self, states, state, noise, age=None, running=None, pull=None, given=None):
        """Flow sampler: K Euler steps from noise (B, H, A) at t=1 to actions at t=0, normalised. states (B, Q, D), state (B, S).

        age (B,): of the query states. running (B, H, A): what the arm's running plan does at these steps, where it still does.
        The new chunk joins it by real-time chunking: pulled towards it by `pull` (B, H) in [0, 1] (Black et al. 2025,
        arXiv 2506.07339; with the identity for the network's Jacobian, so no backward pass), or, with an expert that was
        trained so (2512.05964), continuing the first given (B,) actions of it, clean and at flow time 0.
        """
        K = self.cfg.denoise_steps
        times = torch.linspace(1, 1 / K, K, device=noise.device)[:, None]  # (K, 1)
        if given is not None:
            held = torch.arange(noise.shape[1], device=noise.device) < given[:, None]  # (B, H)
            times = times[..., None] * ~held  # (K, B, H)
        ages = () if age is None else (age[None],)  # (1, B)
        modulation = self.expert.modulation(
            times, *ages
        )  # each (K, 1 or B, 1 or 1 + H, ...): the times are known, so computed at once
        keys_values = self.expert.condition(self.adapter(states))
        x = noise[:, None]  # (B, 1, H, A)
        for k in range(K):
            if given is not None:
                x = torch.where(held[:, None, :, None], running[:, None], x)
            v = self.expert(x, [m[k][:, None] for m in modulation], state, keys_values)
            if pull is not None:
                t = 1 - k / K
                gain = (
                    min(K, (t * t + (1 - t) ** 2) / (t * (1 - t))) if k else K
                )  # the paper's, at most the whole way in one step
                v = v - gain * pull[:, None, :, None] * (
                    running[:, None] - (x - t * v)
                )  # x - t v: the chunk as it looks from here
            x = x - v / K
        x = x[:, 0] if given is None else torch.where(held[..., None], running, x[:, 0])  # (B, H, A)
        return x.clamp(-1.5, 1.5)

    @torch.inference_mode()
    def think(self, images, tasks, thoughts=None):
        """images (B, V, px, px, 3) uint8, tasks: B strings -> (B reasonings, feature query states (B, Q, D)).

        thoughts: B reasonings to think in place of its own.
        """
        visual = self.vlm.see(images)
        self.mark("vision")
        prompts = [self.tokenizer.prompt(task, self.cfg.reasoning) for task in tasks]
        limit = self.cfg.max_thought if self.cfg.reasoning else 0
        if thoughts is not None:  # all that is left to write is the end of the thought
            prompts, limit = (
                [[*prompt, *self.tokenizer.encode(thought)] for prompt, thought in zip(prompts, thoughts)],
                1,
            )
        written, states = self.vlm.generate(
            visual, prompts, self.tokenizer.end_thought, limit, with_queries=True
        )
        self.mark("thinking")
        return thoughts or [self.tokenizer.decode(ids) for ids in written], states

    @torch.inference_mode()
    def act(self, images, state, task, seed=0, thoughts=None):
        """What to do next: images (B, V, px, px, 3) uint8, state (B, S) in LeRobot units, task: B strings.

        -> (chunk (B, H, A) float32 in LeRobot units, B reasonings). The same seed gives the same chunk, and at temperature 0
        every seed does. thoughts as in think. Arrays or tensors.
        """
        images, state = self.check_inputs(images, state, task)
        reasonings, states = self.think(images, task, thoughts)
        return self.plan(states, state, seed), reasonings

    @torch.inference_mode()
    def plan(self, states, state, seed=0, age=None, running=None, **joined):
        """The expert alone: query states (B, Q, D) of `think`, joint state (B, S) now -> chunk (B, H, A) in LeRobot units, float32.

        age, running (in LeRobot units) and joined (pull or given) as in sample_chunk; an expert that learnt from fresh states
        only is not told their age. Arrays or tensors.
        """
        to = lambda x, kind: torch.as_tensor(x, dtype=kind, device=states.device)
        generator = torch.Generator().manual_seed(
            seed
        )  # on the CPU, so that a seed means the same noise on every device
        noise = self.cfg.temperature * torch.randn(
            len(state), self.cfg.chunk, self.cfg.action_dim, generator=generator
        ).to(states.device)
        if age is not None and self.cfg.stale:
            joined["age"] = to(age, torch.long).clamp(0, self.cfg.stale)
        if running is not None:
            joined["running"] = self.normalise(to(running, torch.float32), "action")
        joined |= {
            name: to(joined[name], kind)
            for name, kind in (("pull", torch.float32), ("given", torch.long))
            if name in joined
        }
        chunk = self.denormalise(
            self.sample_chunk(states, self.normalise(to(state, torch.float32), "state"), noise, **joined)
        )
        self.mark("expert")
        return chunk.float().cpu().numpy()

    @torch.inference_mode()
    def answer(self, images, questions, limit=24):
        """Answers to B questions about B scenes. images (B, V, px, px, 3) uint8 -> B strings."""
        visual = self.vlm.see(torch.as_tensor(np.asarray(images)).to(self.vlm.queries.device))
        prompts = [self.tokenizer.question(q) for q in questions]
        ids, _ = self.vlm.generate(visual, prompts, self.tokenizer.end_answer, limit)
        end = self.tokenizer.end_thought
        return [self.tokenizer.decode(i[: i.index(end)] if end in i else i) for i in ids]

    def check_inputs(self, images, state, task):
        """Tensors on the model's device, or a ValueError that shows both sides of what does not fit."""
        device = self.vlm.queries.device
        images, state = (
            torch.as_tensor(np.asarray(images)).to(device),
            torch.as_tensor(np.asarray(state), dtype=torch.float32).to(device),
        )
        cfg = self.cfg
        expected = (cfg.views, cfg.image_size, cfg.image_size, 3)
        if tuple(images.shape[1:]) != expected or images.dtype != torch.uint8:
            raise ValueError(
                f"images must be (B, {', '.join(map(str, expected))}) uint8, cameras {cfg.cameras}; got {tuple(images.shape)} {images.dtype}"
            )
        if tuple(state.shape[1:]) != (cfg.state_dim,):
            raise ValueError(
                f"state must be (B, {cfg.state_dim}), {','.join(cfg.state_names)}; got {tuple(state.shape)}"
            )
        if isinstance(task, str) or not len(task) == len(images) == len(state):
            raise ValueError(
                f"one task string per row: got {len(images)} images, {len(state)} states, tasks {task!r}"[
                    :300
                ]
            )
        if not torch.isfinite(self.state_low).all():
            raise ValueError(
                "the policy has no normalisation statistics; train it with train.py or call set_statistics"
            )
        return images, state

    # -- on disk ------------------------------------------------------------------------------------------------

    def save_weights(self, path, state=None):
        """model.safetensors: every parameter and buffer (or `state`, a dict in their place, such as the EMA)."""
        save_file({k: v.detach().cpu().contiguous() for k, v in (state or self.state_dict()).items()}, path)

    def load_weights(self, path, part=""):
        """Strict: a missing, unknown or misshapen tensor is an error that names it. `part`: only what begins so, as in "vlm."."""
        try:
            loaded, own = (
                {k: v for k, v in weights.items() if k.startswith(part)}
                for weights in (load_file(path), self.state_dict())
            )
        except SafetensorError as e:
            raise ValueError(f"{path} is damaged ({e})") from None
        missing, unknown = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
        if missing or unknown:
            raise ValueError(f"{path} does not fit: missing {missing[:3]}, unknown {unknown[:3]}")
        for name, tensor in loaded.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{path} does not fit: {name} is {tuple(tensor.shape)} there, {tuple(own[name].shape)} here"
                )
        self.load_state_dict(self.state_dict() | loaded)

    @classmethod
    def load(cls, folder, tokenizer, device="cpu"):
        """A trained policy from its checkpoint folder alone (config.json + model.safetensors), ready to act."""
        config = read_checkpoint_config(folder)
        policy = cls(Config.pick(config), tokenizer, Path(folder) / "backbone").to(device).eval()
        policy.load_weights(os.path.join(folder, "model.safetensors"))
        return policy

    def parameter_table(self):
        """{part: number of parameters}."""
        parts = self.vlm.parts() | {
            "adapter": self.adapter.parameters(),
            "expert": self.expert.parameters(),
            "queries": [self.vlm.queries],
        }
        return {name: sum(p.numel() for p in part) for name, part in parts.items()}


def read_checkpoint_config(folder):
    """config.json of a checkpoint folder as a dict; an error that says what to type where there is none."""
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} is no checkpoint (needs config.json and model.safetensors); run: python train.py --config small --out={folder}"
        )
    return json.loads((folder / "config.json").read_text())
