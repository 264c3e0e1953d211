"""Pretrained vision-language models (VLM) as the VLM of a policy, and what it takes to train them.

    SmolVLM                  in plain PyTorch: SigLIP below, the language model of model.py
    Qwen2.5-VL, any other    in `transformers`, called with our sequence, mask and positions

Read it in this order: ChatTokenizer, SigLIP and SmolVLM, WrappedVLM, load_backbone, plan_memory. A backbone's
own config.json fixes its shapes. <checkpoint>/backbone keeps it, so that a checkpoint folder is enough to run
a policy.

Shapes.  B batch, V camera views, n visual tokens of a view, P prefix tokens, D width of the language model,
W width of the vision tower, h and w the pixels of a camera image.
"""

import dataclasses
import math
import os
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from common import UserError, atomic_path, has_bf16, print0, read_json, require
from data import Tokenizer, pack, to_tensors
from model import VLM, Config, LanguageModel, SyVLA, Visual, checkpoint_blocks, pixel_shuffle

# What the presets share. Pretrained backbones already know words and pictures: there is no grounding phase.
# These numbers are first guesses, not yet tried.
FINETUNE = dict(
    data="data/small",
    max_reasoning_tokens=64,
    ground_steps=0,
    steps=20000,
    batch_size=64,
    question_tokens=128,
    mix=0.25,
    backbone_lr=2e-5,
    adam_lr=1e-4,  # of feature queries, adapter and expert
    checkpointing=True,
    warmup=500,
    ema=0.999,
    save_every=1000,
)
PRESETS = {
    # SmolVLM2-256M and an expert of 54 M
    "base256": dict(
        FINETUNE,
        backbone="HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        expert_width=512,
        expert_depth=8,
        expert_heads=8,
        accumulate=4,
    ),
    # SmolVLM2-500M and an expert of 106 M
    "base": dict(
        FINETUNE,
        backbone="HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        expert_width=768,
        expert_depth=7,
        expert_heads=12,
        accumulate=8,
    ),
    # the paper's: Qwen2.5-VL-3B, 20 queries, an expert of 0.69 B
    "paper": dict(
        FINETUNE,
        backbone="Qwen/Qwen2.5-VL-3B-Instruct",
        lora=16,
        freeze_vision=True,
        image_size=224,
        expert_width=1280,
        expert_depth=17,
        expert_heads=20,
        accumulate=16,  # micro-batches of 4 samples
    ),
}


# -----------------------------------------------------------------------------------------------------------
# Text


# By a token that only this family has: START, OPEN, CLOSE, TURN, END, and what stands before an answer.
CHAT_FORMATS = {
    "<end_of_utterance>": (  # SmolVLM
        "<|im_start|>User:",
        "<fake_token_around_image><global-img>",
        "<fake_token_around_image>",
        "<end_of_utterance>\nAssistant:",
        "<end_of_utterance>",
        " ",
    ),
    "<|vision_start|>": (  # Qwen-VL
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        "",
    ),
}


class ChatTokenizer:
    """A pretrained model's tokenizer and chat format, with the methods of data.Tokenizer.

    The conversation is written as the model learnt it: START (OPEN picture CLOSE)* instruction TURN answer
    END. Reasoning is an answer that begins with the words <reason>. END stands for </reason>: one token that
    every chat model knows.
    """

    LONGEST = 512  # tokens of an instruction or question

    def __init__(self, text: str):
        """text: the content of a tokenizer.json."""
        self.text = text
        self.pretrained = require("tokenizers").Tokenizer.from_str(text)
        # the formats are encoded with their special tokens
        known = [mark for mark in CHAT_FORMATS if self.pretrained.token_to_id(mark) is not None]
        if not known:
            raise UserError(
                "this tokenizer's chat format is unknown: add it to CHAT_FORMATS in extras/backbones.py"
            )
        *pieces, self.space = CHAT_FORMATS[known[0]]
        # END is a single token
        self.start, self.image_open, self.image_close, self.turn, end = map(self.encode, pieces)
        self.end_reasoning = self.end_answer = end[0]
        # from here on nobody types control tokens: "<image>" in a text is seven characters
        self.pretrained.encode_special_tokens = True

    def __len__(self) -> int:
        return self.pretrained.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Any string -> token ids."""
        return self.pretrained.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids -> string; special tokens are left out."""
        return self.pretrained.decode(list(ids)).strip()

    def encode_user_text(self, text: str, what: str) -> list[int]:
        """A user's words with single spaces between them -> ids; UserError if unusable."""
        ids = self.encode(" ".join(text.split()))
        if not 0 < len(ids) <= self.LONGEST:
            raise UserError(f"the {what} has {len(ids)} tokens; write between 1 and {self.LONGEST}")
        return ids

    def prompt(self, task: str, reasoning: bool = True) -> list[int]:
        """Instruction -> the ids that the chain of thought follows, or without it the feature queries."""
        ids = self.encode_user_text(task, "instruction") + self.turn
        if reasoning:
            ids += self.encode(self.space + "<reason>")
        return ids

    def reasoning_ids(self, reasoning: str) -> list[int]:
        """A chain of thought as training target."""
        return [*self.encode(" " + reasoning if reasoning else ""), self.end_reasoning]

    def question(self, question: str) -> list[int]:
        """Question -> the ids that the answer follows. As a question, an instruction asks for reasoning."""
        if question.startswith("<task>"):
            return self.prompt(question.removeprefix("<task>"))
        return self.encode_user_text(question, "question") + self.turn

    def answer(self, question: str, answer: str) -> list[int]:
        """The answer to a question as training target."""
        if question.startswith("<task>"):
            return self.reasoning_ids(answer)
        return [*self.encode(self.space + answer), self.end_answer]

    def dumps(self) -> str:
        """What stands in a checkpoint's tokenizer.json."""
        return self.text


# -----------------------------------------------------------------------------------------------------------
# Where a backbone comes from


def fetch_backbone(name: str, weights: bool) -> Path:
    """Folder of a pretrained VLM: `name` if it is one, else a hub repository, downloaded or from the cache.

    Without `weights` only its configuration and tokenizer.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.jinja"]
    if weights:
        patterns.append("*.safetensors")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # no network, a wrong name, a full disk: the client has a dozen types for it
        raise UserError(
            f"cannot download {name} ({type(error).__name__}); check its name, network and disk, or give a "
            "folder: --backbone=FOLDER. If the model's page asks for a licence to be accepted, accept it and "
            "type: hf auth login"
        ) from None


TEXT_FIELDS = {  # field of Config -> of a config.json's "text_config"
    "width": "hidden_size",  # D
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
}


def apply_backbone_config(cfg: Config) -> None:
    """Fill in a TrainConfig what its backbone fixes, and the pixels of the data set's cameras.

    What is about vision alone stays in the backbone's config.json.
    """
    if cfg.init_from:  # that checkpoint's fields have been taken already
        return
    folder = fetch_backbone(cfg.backbone, weights=False)
    config = read_json(folder / "config.json")
    if "vision_config" not in config:
        raise UserError(f"{folder} is no vision-language model: its config.json has no vision_config")
    text = config.get("text_config", config)  # older files hold the text's fields at the top
    for ours, theirs in TEXT_FIELDS.items():
        setattr(cfg, ours, text[theirs])
    rope = text.get("rope_parameters", text)  # where transformers 5 writes it
    cfg.rope_theta = float(rope["rope_theta"])
    cfg.tied = config.get("tie_word_embeddings", False)
    cfg.qk_norm = False  # Qwen2.5 and SmolLM2 have none
    camera = Path(cfg.data, f"{cfg.camera_names[0]}.npy")
    if camera.is_file():
        cfg.image_size = np.load(camera, mmap_mode="r").shape[1]
    cfg.__post_init__()


class PretrainedVLM(VLM):
    """What both kinds of backbone share: feature queries, chat format and a folder that describes them."""

    def __init__(self, cfg: Config, tokenizer: ChatTokenizer, folder: Path):
        nn.Module.__init__(self)  # VLM's own would make a vision encoder and a language model
        self.folder = folder
        self.queries = nn.Parameter(torch.randn(cfg.queries, cfg.width))
        self.set_chat_format(tokenizer)
        self.pointer = self.query_pointer = None

    def save_description(self, folder: Path) -> None:
        """Copy the files from which the architecture can be made again; they hold no weights."""
        for source in self.folder.glob("*config.json"):
            with atomic_path(folder / source.name) as path:
                path.write_bytes(source.read_bytes())


# -----------------------------------------------------------------------------------------------------------
# SmolVLM in plain PyTorch


@lru_cache(maxsize=32)
def lanczos(side: int, longest: int, size: int) -> Tensor:
    """How SmolVLM's processor resizes one side of a picture, as a matrix (size, side).

    It makes the longest side of the picture, which has `longest` pixels, 4 * size pixels long, and after that
    the picture square. Pillow's filter is linear: the unit pictures show all of it.
    """
    enlarged = 4 * size * side // longest
    enlarged += enlarged % 2  # the processor makes it even
    picture = Image.fromarray(np.eye(side, dtype=np.float32))  # column i: a picture of pixel i alone
    for pixels in (enlarged, size):
        picture = picture.resize((side, pixels), Image.Resampling.LANCZOS)
    return torch.tensor(np.asarray(picture))  # (size, side)


class SigLIP(nn.Module):
    """SmolVLM's vision tower: patches, pre-norm Transformer blocks, pixel shuffle, a projection to width D.

    config: the backbone's config.json. width: D.
    """

    def __init__(self, config: dict[str, Any], width: int):
        super().__init__()
        # published files may leave out what equals these
        defaults = dict(intermediate_size=3072, num_hidden_layers=12, layer_norm_eps=1e-6)
        vision = defaults | config["vision_config"]
        W = vision["hidden_size"]
        self.size = vision["image_size"]
        self.shuffle = config["scale_factor"]
        self.patch = nn.Conv2d(3, W, vision["patch_size"], stride=vision["patch_size"])
        self.position = nn.Parameter(torch.zeros((self.size // vision["patch_size"]) ** 2, W))
        self.blocks = nn.ModuleList()
        for _ in range(vision["num_hidden_layers"]):
            block = nn.TransformerEncoderLayer(
                W,
                vision["num_attention_heads"],
                vision["intermediate_size"],
                dropout=0.0,
                activation=partial(F.gelu, approximate="tanh"),
                layer_norm_eps=vision["layer_norm_eps"],
                batch_first=True,
                norm_first=True,
            )
            self.blocks.append(block)
        self.norm = nn.LayerNorm(W, vision["layer_norm_eps"])
        self.connector = nn.Linear(W * self.shuffle**2, width, bias=False)

    def resize(self, images: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [-1, 1] -> (n, 3, size, size) as SmolVLM's processor prepares a picture.

        Both of its steps are linear, so one small matrix a side does them on any device. Pillow also rounds
        and clips in between. On our camera images that makes 0.05 grey levels on average; 0.1 to 0.4 % of the
        pixels, at sharp edges, differ by more than 1.5.
        """
        h, w = images.shape[2:]
        rows = lanczos(h, max(h, w), self.size).to(images)  # (size, h)
        columns = lanczos(w, max(h, w), self.size).to(images)  # (size, w)
        with torch.autocast(images.device.type, enabled=False):  # bf16 has no room for 256 grey levels
            x = rows @ images @ columns.T  # (n, 3, size, size)
        return x.clamp(-1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Images (n, 3, h, w) in [-1, 1] -> visual tokens (n, tokens, D), and nothing for a pointer."""
        x = self.resize(images)  # (n, 3, size, size)
        x = self.patch(x)  # (n, W, side, side)
        x = x.flatten(2).transpose(1, 2)  # (n, side*side, W)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        x = pixel_shuffle(self.norm(x), self.shuffle)  # (n, side*side / shuffle^2, shuffle^2 * W)
        return self.connector(x), None


# Published names -> ours, as regular expressions. Tensors that get the same name are stacked.
SMOLVLM_NAMES = {
    r"model\.vision_model\.encoder\.layers": "vision.blocks",
    r"model\.vision_model\.embeddings\.patch_embedding": "vision.patch",
    r"model\.vision_model\.embeddings\.position_embedding\.weight": "vision.position",
    r"model\.vision_model\.post_layernorm": "vision.norm",
    r"model\.connector\.modality_projection\.proj": "vision.connector",
    r"layer_norm(\d)": r"norm\1",
    r"mlp\.fc": "linear",
    r"model\.text_model\.layers": "lm.blocks",
    r"model\.text_model\.embed_tokens": "lm.embed",
    r"model\.text_model\.norm": "lm.norm",
    r"lm_head": "lm.head",
    r"input_layernorm": "norm1",
    r"post_attention_layernorm": "norm2",
    r"[qkv]_proj\.": "in_proj_",
    r"(lm.*)self_attn\.in_proj_": r"\1qkv.",
    r"self_attn\.o_proj": "proj",
    r"mlp\.(gate|up)_proj": r"\1",
    r"mlp\.down_proj": "down",
}


def read_smolvlm(folder: Path) -> dict[str, Tensor]:
    """Published weights of a SmolVLM, under the names that they have in class SmolVLM."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    stacks = defaultdict(list)
    # in the order in which they are stacked: q, k, v
    for theirs in sorted(tensors, key=lambda name: name.replace("q_proj", "a_proj")):
        ours = theirs
        for pattern, replacement in SMOLVLM_NAMES.items():
            ours = re.sub(pattern, replacement, ours)
        stacks[ours].append(tensors[theirs])
    return {name: torch.cat(stack) for name, stack in stacks.items()}


class SmolVLM(PretrainedVLM):
    """SmolVLM and SmolVLM2: SigLIP and the language model of model.py."""

    def __init__(self, cfg: Config, tokenizer: ChatTokenizer, folder: Path, pretrained: bool):
        super().__init__(cfg, tokenizer, folder)
        self.vision = SigLIP(read_json(folder / "config.json"), cfg.width)
        self.lm = LanguageModel(cfg)
        hd = cfg.width // cfg.heads
        self.lm.frequency = 1 / cfg.rope_theta ** (torch.arange(0, hd, 2) / hd)  # rounded as in pretraining
        if pretrained:
            self.load_state_dict(read_smolvlm(folder) | {"queries": self.queries})

    def enable_checkpointing(self) -> None:
        """In training keep only every block's input, and compute the rest again in the backward pass."""
        super().enable_checkpointing()
        checkpoint_blocks(self.vision.blocks)


# -----------------------------------------------------------------------------------------------------------
# Any other VLM, through transformers


class WrappedLanguageModel:
    """The language model of a `transformers` VLM with LanguageModel's interface.

    It is no module: WrappedVLM holds the weights.
    """

    def __init__(self, text: nn.Module, head: nn.Module | None, new_caches: Callable):
        """head: the output layer, None where it is the token embedding."""
        self.text = text
        self.head = head
        self.embed = text.get_input_embeddings()
        self.new_caches = new_caches

    def __call__(self, x: Tensor, positions: Tensor, mask: Tensor, caches: Any = None) -> Tensor:
        """x (B, n, D), positions (B, n) or (3, B, n), mask (B, n, past + n) bool -> hidden (B, n, D)."""
        mask = mask[:, None]  # (B, 1, n, past + n)
        out = self.text(
            inputs_embeds=x,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=caches,
            use_cache=caches is not None,  # else transformers makes one in training, too
        )
        return out.last_hidden_state  # (B, n, D)

    logits = LanguageModel.logits


class WrappedVLM(PretrainedVLM):
    """Any image-text model of `transformers`: its vision tower and language model with our sequence and mask.

    Packing, feature queries, generation and answers are VLM's own. The model must offer get_image_features
    and a language model that takes inputs_embeds and a 4-D mask. CHAT_FORMATS must have its chat format.
    """

    def __init__(self, cfg: Config, tokenizer: ChatTokenizer, folder: Path, pretrained: bool):
        super().__init__(cfg, tokenizer, folder)
        transformers = require("transformers")
        auto = transformers.AutoModelForImageTextToText
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder)
        self.processor.do_image_splitting = False  # SmolVLM's would cut a picture into many
        if pretrained:
            whole = auto.from_pretrained(folder, dtype=torch.float32)
        else:
            whole = auto.from_config(transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32)
        self.model = whole.model  # vision tower and language model, without the output layer
        head = whole.get_output_embeddings()
        self.head = None if head.weight is whole.get_input_embeddings().weight else head
        text = getattr(self.model, "language_model", None) or self.model.text_model
        self.lm = WrappedLanguageModel(text, self.head, transformers.DynamicCache)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of the vision tower and of the language model."""
        language = list(self.lm.text.parameters())
        if self.head is not None:
            language += self.head.parameters()
        known = set(language)  # by identity
        vision = [p for p in self.model.parameters() if p not in known]
        return {"vision": vision, "language": language}

    def freeze_vision(self) -> None:
        """Leave the vision tower with its connector as it is."""
        for parameter in self.parts()["vision"]:
            parameter.requires_grad_(False)

    def enable_checkpointing(self) -> None:
        """In training keep only every block's input, and compute the rest again in the backward pass."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.disable_input_require_grads()  # else gradients go through a frozen vision tower, too
        self.model.train()  # from_pretrained left it in evaluation mode, in which nothing is checkpointed

    def encode_images(self, images: Tensor) -> Visual:
        """Images (B, V, h, w, 3) uint8 -> their visual tokens.

        The model's own processor prepares the pictures, one by one on the CPU.
        """
        pictures = images.flatten(0, 1)[:, None]  # (B*V, 1, h, w, 3): lists of one picture
        inputs = self.processor(images=[list(p.cpu().numpy()) for p in pictures], return_tensors="pt")
        features = self.model.get_image_features(**inputs.to(self.queries.device)).pooler_output
        visual = torch.cat(list(features))  # (B*V*n, D)
        return Visual(visual.view(*images.shape[:2], -1, self.queries.shape[-1]))  # (B, V, n, D)

    def prefix(self, visual: Tensor) -> tuple[Tensor, Tensor, int]:
        """As VLM.prefix(), but Qwen's positions are (3, B, P): time, row, column, all equal in text."""
        x, positions, first = super().prefix(visual)
        if not hasattr(self.model, "get_rope_index"):
            return x, positions, first
        V, n = visual.shape[1:3]
        side = math.isqrt(n)
        # of every token: how far it moves the position of the next one, its row and its column in a picture
        text = (1, 0, 0)
        picture = [(0, i // side, i % side) for i in range(n)]
        picture[-1] = (side, side - 1, side - 1)  # what follows stands behind the longest side
        view = len(self.image_open) * [text] + picture + len(self.image_close) * [text]
        tokens = len(self.start) * [text] + V * view
        move, row, column = torch.tensor(tokens, device=x.device).T  # each (P,)
        time = move.cumsum(0) - move  # (P,): a picture's tokens share one
        positions = torch.stack((time, time + row, time + column))[:, None]  # (3, 1, P)
        return x, positions.expand(-1, len(x), -1), sum(moved for moved, _, _ in tokens)


# -----------------------------------------------------------------------------------------------------------
# Making one


def load_backbone(
    cfg: Config, folder: Path, tokenizer_path: Path, pretrained: bool
) -> tuple[ChatTokenizer, PretrainedVLM]:
    """Tokenizer and VLM of a backbone's folder.

    Without `pretrained` its weights are random: a checkpoint's are to be loaded into it.
    """
    tokenizer = ChatTokenizer(tokenizer_path.read_text(encoding="utf-8"))
    is_smolvlm = read_json(folder / "config.json")["model_type"] in ("smolvlm", "idefics3")
    kind = SmolVLM if is_smolvlm else WrappedVLM
    vlm = kind(cfg, tokenizer, folder, pretrained)
    if pretrained:  # feature queries as loud as words
        # nn.Embedding tables of pretrained models are far from variance 1
        words = vlm.lm.embed(torch.arange(cfg.vocab_size))  # (vocab, D)
        vlm.queries.data *= words.std() / vlm.queries.std()
    if cfg.lora:  # behind the pretrained weights: it renames the matrices
        add_lora(vlm, cfg.lora)
    return tokenizer, vlm


def backbone_of_run(cfg: Config, start: str, weights: bool = True) -> tuple[ChatTokenizer, PretrainedVLM]:
    """Tokenizer and VLM of a training run that begins from the checkpoint folder `start`, "" for none."""
    folder = Path(start, "backbone") if start else fetch_backbone(cfg.backbone, weights)
    return load_backbone(cfg, folder, Path(start or folder, "tokenizer.json"), weights and not start)


def add_lora(vlm: PretrainedVLM, rank: int) -> None:
    """Freeze the language model; put low-rank adapters (Hu et al. 2021) beside the matrices of its blocks."""
    peft = require("peft")
    for parameter in vlm.parts()["language"]:
        parameter.requires_grad_(False)
    # theirs are called q_proj, up_proj and the like, ours by five names
    targets = r".*(proj|qkv|gate|up|down)"
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    peft.inject_adapter_in_model(config, getattr(vlm.lm, "text", vlm.lm))


def cast_frozen_to_bf16(policy: SyVLA) -> None:
    """Round frozen matrices to bf16, for devices that compute in bf16: autocast would round them anyway."""
    for module in policy.modules():
        if isinstance(module, (nn.Linear, nn.MultiheadAttention, nn.Conv2d, nn.Conv3d)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


# -----------------------------------------------------------------------------------------------------------
# What training takes: memory and work, predicted


FLOPS = flop_registry | {  # operation -> formula; torch's table lacks attention on the CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Meter(TorchDispatchMode):
    """Counts floating point operations and the bytes of living tensors, of all operations inside.

    Views share the storage of what they show, so they cost nothing; neither does a change in place.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.bytes = 0  # now
        self.peak = 0  # most bytes at once
        self.known = weakref.WeakSet()  # storages that are counted

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # torch calls this in place of every operation, below autograd and autocast
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **kwargs, out_val=out)
        self.count((args, kwargs, out))
        return out

    def count(self, tree: Any) -> None:
        """Add the tensors in nested containers that are not known yet, until they are freed."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self.known:
                storage = leaf.untyped_storage()
                self.known.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.bytes)

    def release(self, size: int) -> None:
        """A storage of `size` bytes has been freed."""
        self.bytes -= size


def longest_batch(cfg: Config, rows: int) -> dict[str, Tensor]:
    """Action samples for SyVLA.forward with as much text as can be; half of it are targets."""
    # room for packed questions, or for an instruction with its reasoning
    half = max(cfg.question_tokens, 32 + cfg.max_reasoning_tokens) // 2
    batch = to_tensors(pack(rows * [[(half * [0], half * [0])]]))
    images = (len(cfg.camera_names), cfg.image_size, cfg.image_size, 3)
    batch["images"] = torch.zeros(rows, *images, dtype=torch.uint8)
    chunk = (cfg.chunk_size, cfg.action_dim)
    shapes = {
        "state": (cfg.state_dim,),
        "actions": chunk,
        "valid": (cfg.chunk_size,),  # all of them
        "eps": (cfg.noise_samples, *chunk),
        "t": (cfg.noise_samples,),  # values do not matter: all are 1
        "uniform": (cfg.queries,),
    }
    for name, shape in shapes.items():
        batch[name] = torch.ones(rows, *shape)
    return batch


def predict(
    cfg: Config, rows: int, bf16: bool, freeze: Callable, make_optimizers: Callable
) -> tuple[SyVLA, int, Meter]:
    """Run a step of one micro-batch with weights that have shapes but no memory.

    -> the policy, the bytes of weights, gradients and optimizer, the counts of all of the step.

    The code that runs is the policy's own, so nothing is written down a second time. Approximate are: the
    text, which is as long as it can be; what is computed in bf16, which autocast decides as for a CPU;
    attention, where a GPU may choose another kernel. Not counted are gaps between tensors, the libraries' own
    buffers, and the buffer of torchrun's all-reduce.
    """
    with torch.device("meta"):
        if cfg.backbone:
            start = cfg.out if cfg.resume else cfg.init_from
            policy = SyVLA(cfg, *backbone_of_run(cfg, start, weights=False))
        else:
            policy = SyVLA(cfg, Tokenizer([]))
    freeze(policy, cfg)
    if bf16:
        cast_frozen_to_bf16(policy)
    batch = longest_batch(cfg, rows)
    # Fake tensors have no memory, and neither have the results of operations on them. The batch is real and
    # small, so that code which looks at values works: at labels, or at the sizes that a processor returns.
    # They pretend to be on the CPU, because autocast does nothing for the device "meta".
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        policy.to_empty(device="cpu")
        trained = [p for p in policy.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)
    with Meter() as meter:
        meter.count([list(policy.parameters()), [p.grad for p in trained]])
        with fake:  # the optimizers' states become fake, too
            for optimizer in make_optimizers(policy, cfg):
                optimizer.step()
        held = meter.bytes
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = policy(batch)
        (losses["text"] + losses["action"]).backward()
    return policy, held, meter


def available_memory(device: torch.device) -> float:
    """Bytes of memory that a device has for this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]  # free now
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return math.inf  # Windows does not tell


def plan_memory(
    cfg: Config, device: torch.device, world: int, freeze: Callable, make_optimizers: Callable
) -> None:
    """Print parameters, predicted peak memory of one of `world` processes, and work of a sample.

    UserError names the flags that would make it fit where the device has less. cfg: a TrainConfig. freeze,
    make_optimizers: train.py's functions of these names.
    """
    bf16 = cfg.plan or has_bf16(device)  # a plan is made for the GPU that is yet to come
    rows = cfg.batch_size // (world * cfg.accumulate)
    policy, held, meter = predict(cfg, rows, bf16, freeze, make_optimizers)
    parts = policy.parameter_table()  # of vision, language, queries, adapter, expert
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    # GiB
    need = meter.peak / 2**30
    free = available_memory(device) / 2**30
    print0(f"{sum(parts.values()):,} parameters, {trained:,} of them trained: {parts}")
    print0(
        f"predicted peak memory {need:.1f} GiB, {held / 2**30:.1f} of them weights, gradients and optimizer; "
        f"{meter.flops / rows / 1e12:.3g} TFLOP a sample"
    )
    if cfg.plan or need <= free:
        return
    # the most micro-batches that both questions and actions divide by
    most = math.gcd(round(cfg.batch_size * cfg.mix), cfg.batch_size)
    most = max(1, most // world)
    flags = {}  # first what costs no quality, last what does
    for more in ({"accumulate": most}, {"checkpointing": True}, {"lora": 16, "freeze_vision": True}):
        flags |= more
        smaller = dataclasses.replace(cfg, **flags)
        _, _, meter = predict(smaller, cfg.batch_size // (world * most), bf16, freeze, make_optimizers)
        if meter.peak / 2**30 <= free:
            words = " ".join(f"--{name}={value}" for name, value in flags.items())
            raise UserError(f"training takes {need:.1f} GiB, {device} has {free:.1f}: add {words}")
    raise UserError(f"training takes {need:.1f} GiB, {device} has {free:.1f}: choose a smaller backbone")
