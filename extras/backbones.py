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

import json
import math
import os
from functools import lru_cache
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file


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


class ChatTokenizer:
    """A pretrained model's tokenizer and chat format behind Tokenizer's interface. Needs the package `tokenizers`.

    The conversation is written as the model learnt it: START (OPEN picture CLOSE)* instruction TURN answer END. A thought is an
    answer that begins with the words <reason>; END stands for </reason>, one token that every chat model knows how to say.
    """

    LONGEST = 512
    FORMATS = (  # START, OPEN, CLOSE, TURN, space before an answer, END; the first whose special tokens are all there
        (
            "<|im_start|>User:",
            "<fake_token_around_image><global-img>",
            "<fake_token_around_image>",
            "<end_of_utterance>\nAssistant:",
            " ",
            "<end_of_utterance>",
        ),  # SmolVLM
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|im_end|>\n<|im_start|>assistant\n",
            "",
            "<|im_end|>",
        ),  # Qwen-VL
    )

    def __init__(self, text):
        try:
            from tokenizers import Tokenizer as Pretrained
        except ImportError:
            raise ValueError("a pretrained backbone needs its tokenizer: pip install tokenizers") from None
        try:
            self.text, self.pretrained = text, Pretrained.from_str(text)
        except Exception as e:  # the package raises nothing narrower
            raise ValueError(f"tokenizer.json cannot be read ({str(e)[:100]}); download it again") from None
        known = lambda format: all(
            self.pretrained.token_to_id(token) is not None
            for piece in format
            for token in re.findall(r"<[^<>\s]+>", piece)
        )
        format = next((f for f in self.FORMATS if known(f)), None)
        if format is None:
            raise ValueError(
                "the chat format of this tokenizer is unknown; add a line to ChatTokenizer.FORMATS in data.py"
            )
        ids = lambda piece: self.pretrained.encode(piece, add_special_tokens=False).ids
        self.start, self.image_open, self.image_close, self.turn, _, (self.end_answer,) = map(ids, format)
        self.end_thought, self.space = self.end_answer, format[4]
        self.pretrained.encode_special_tokens = True  # from here on: nobody types control tokens
        self.encoded = {}

    def __len__(self):
        return self.pretrained.get_vocab_size(with_added_tokens=True)

    def encode(self, text):
        if text not in self.encoded and len(self.encoded) < 1_000_000:
            self.encoded[text] = self.pretrained.encode(text, add_special_tokens=False).ids
        return self.encoded.get(text) or self.pretrained.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.pretrained.decode(list(ids), skip_special_tokens=True).strip()

    def tidy(self, text, what):
        """A user's words with single spaces, or a ValueError."""
        ids = self.encode(" ".join(text.split()))
        if not ids:
            raise ValueError(f'the {what} is empty; try "put the red cube on the blue pad"')
        if len(ids) > self.LONGEST:
            raise ValueError(
                f"the {what} is {len(ids)} tokens long; at most {self.LONGEST} fit, say it in fewer words"
            )
        return ids

    def prompt(self, task, reasoning=True):
        return [
            *self.tidy(task, "instruction"),
            *self.turn,
            *(self.encode(self.space + "<reason>") if reasoning else []),
        ]

    def thought(self, reason):
        return [*self.encode(" " + reason if reason else ""), self.end_thought]

    def question(self, question):
        if question.startswith("<task>"):
            return self.prompt(question.removeprefix("<task>"))
        return [*self.tidy(question, "question"), *self.turn]

    def answer(self, question, answer):
        return (
            self.thought(answer)
            if question.startswith("<task>")
            else [*self.encode(self.space + answer), self.end_answer]
        )

    def dumps(self):
        return self.text


# ---------------------------------------------------------------------------------------------------------------
# Memory and work, foretold


def memory(cfg, policy, world, bf16):
    """Predicted peak bytes on one device by kind. policy: parameters and their requires_grad matter, values do not (meta device will do).

    Activations: what autograd keeps of one micro-batch, counted from the blocks' definitions; tests hold it against autograd's own count.
    """
    trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    n = sum(p.numel() for _, p in trained)
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    still = sum((2 if bf16 and p.ndim > 1 else 4) * p.numel() for p in frozen) + 2 * bf16 * sum(
        p.numel() for p in frozen if p.shape == (cfg.vocab_size, cfg.width)
    )
    states = sum(
        4 * p.numel() if isinstance(o, Muon) else 8 * p.numel()
        for o in make_optimizers(policy, cfg)
        for g in o.param_groups
        for p in g["params"]
    )
    e = 2 if bf16 else 4  # bytes of a number in arithmetic; the residual stream has 4
    rows = math.ceil(cfg.batch_size / (world * cfg.accumulate))
    text = max(
        cfg.question_tokens, 32 + cfg.max_thought
    )  # tokens of instruction, thought and answers, at most
    tokens = cfg.views * (cfg.tokens_per_view + 4) + text + cfg.queries
    patches = cfg.views * ((cfg.vision_size or cfg.image_size) // cfg.patch_size) ** 2
    D, F, W = cfg.width, cfg.mlp_width, cfg.vision_width
    kv = D // cfg.heads * cfg.kv_heads
    # a block's norms keep their fp32 input and its matrices theirs; attention q, k, v, its output and (general masks) its weights
    block = tokens * (4 * 2 * D + e * (2 * D + D + 2 * kv + 2 * D + 4 * F) + e * cfg.heads * tokens)
    hidden = cfg.vision_mlp or 4 * W
    eye = patches * (4 * 2 * W + e * (2 * W + 5 * W + 2 * hidden))
    sees = any(p.requires_grad for p in policy.vlm.parts()["vision"][:1])  # a frozen tower keeps nothing
    if cfg.checkpointing:
        language, vision = tokens * 4 * D * cfg.depth + block, patches * 4 * W * cfg.vision_depth * sees + eye
    else:
        language, vision = block * cfg.depth, eye * max(1, cfg.vision_depth * sees)
    De, chunk = cfg.expert_width, cfg.noise_samples * (1 + cfg.chunk)
    expert = chunk * cfg.expert_depth * De * (4 * 9 + e * 22)
    logits = (
        text * cfg.vocab_size * (e + 4 + 4 + 4) // 2
    )  # logits, log-softmax, their gradients; half of the text are targets
    return {
        "weights": 4 * n + still,
        "bf16 copies": 2 * n if bf16 else 0,
        "gradients": 4 * n,
        "optimizer": states,
        "EMA": 0 if cfg.ema_on_host else 4 * n,
        "activations": rows * (language + vision + expert + logits),
    }


def work(cfg, policy):
    """Floating point operations of one training sample: 2 per weight and token forward, as many again for inputs' and for weights' gradients."""
    tokens = {
        "vision": cfg.views * ((cfg.vision_size or cfg.image_size) // cfg.patch_size) ** 2,
        "expert": cfg.noise_samples * (1 + cfg.chunk),
        "adapter": cfg.queries,
    }
    tokens["language"] = (
        cfg.views * (cfg.tokens_per_view + 4) + max(cfg.question_tokens, 32 + cfg.max_thought) + cfg.queries
    )
    widths = {"vision": (cfg.vision_width, cfg.vision_depth), "language": (cfg.width, cfg.depth)}
    total, parts = (
        0,
        policy.vlm.parts()
        | {"adapter": list(policy.adapter.parameters()), "expert": list(policy.expert.parameters())},
    )
    for name, n in tokens.items():
        embedding = (
            cfg.vocab_size * cfg.width * (name == "language") * (1 if cfg.tied else 2)
        )  # looked up, and few tokens reach the output
        width, depth = widths.get(name, (0, 0))
        per_view = n // cfg.views if name == "vision" else n
        forward = (
            2 * n * (sum(p.numel() for p in parts[name] if p.ndim > 1) - embedding)
            + 4 * n * per_view * width * depth
        )  # and q.k, weights.v
        learns, through = (
            any(p.requires_grad for p in parts[name]),
            any(p.requires_grad for p in parts["vision"][:1]) or name != "vision",
        )
        most = (
            sum(p.numel() for p in parts[name] if p.requires_grad) > sum(p.numel() for p in parts[name]) / 2
        )
        again = cfg.checkpointing and name in widths and through
        total += forward * (1 + again + (through and learns) + (through and most))
        if name == "expert" and cfg.decouple != "off":
            total += (
                2 * forward * cfg.decouple_samples // cfg.noise_samples
            )  # the first pass: forward, and back to the query states
    return total


def room(device):
    """Bytes of memory that the device has for this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def foretell(cfg, device, world, say):
    """Print parameters by part, predicted peak memory and work; ValueError with what would help where the device has less."""
    bf16 = has_bf16(device) or (
        cfg.plan and bool(cfg.backbone)
    )  # a plan is made for the GPU that is yet to come
    size = lambda n: f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"

    def predict(**changes):
        changed = type(cfg)(**asdict(cfg) | changes)
        with torch.device("meta"):
            folder = (
                None
                if not cfg.wrapped
                else Path(cfg.out if cfg.resume else cfg.init_from, "backbone")
                if cfg.resume or cfg.init_from
                else fetch_backbone(cfg.backbone, weights=False)
            )
            policy = SyVLA(changed, NoTokenizer(), folder)
        freeze(policy, changed)
        return policy, memory(changed, policy, world, bf16)

    policy, bytes = predict()
    parts, trained = policy.parameter_table(), sum(p.numel() for p in policy.parameters() if p.requires_grad)
    need, there = sum(bytes.values()), room(device)
    say(
        f"{sum(parts.values()):,} parameters, {trained:,} of them trained: "
        + ", ".join(f"{k} {v:,}" for k, v in parts.items())
    )
    say(
        f"predicted peak memory {size(need)}: "
        + ", ".join(f"{k} {size(v)}" for k, v in bytes.items() if v)
        + f"; {work(cfg, policy) / 1e12:.3g} TFLOP a sample"
    )
    if need <= there or cfg.plan:
        return
    ways, rows = [], cfg.batch_size // (world * cfg.accumulate)
    for flags in (
        {"accumulate": cfg.accumulate * rows},
        {"checkpointing": True},
        {"accumulate": cfg.accumulate * rows, "checkpointing": True},
        {"lora": 16, "freeze_vision": True, "checkpointing": True},
        {"lora": 16, "freeze_vision": True, "checkpointing": True, "accumulate": cfg.accumulate * rows},
    ):
        if any(getattr(cfg, k) != v for k, v in flags.items()) and (cfg.backbone or "lora" not in flags):
            try:
                ways.append(
                    (
                        sum(predict(**flags)[1].values()),
                        " ".join(f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items()),
                    )
                )
            except ValueError:  # LoRA without peft
                continue
    fitting = [f"{flags} ({size(n)})" for n, flags in ways if n <= there]
    raise ValueError(
        f"training takes about {size(need)}, {device} has {size(there)} free; "
        + (f"add {fitting[0]}" if fitting else "a smaller preset is needed")
    )


class NoTokenizer:
    """In place of a tokenizer where only shapes count."""

    start = image_open = image_close = ()

    def __len__(self):
        return 0


def settle_backbone(cfg):
    """Fill in what a pretrained backbone fixes, from its config.json or the checkpoint's, and the camera pixels of the data set."""
    if not cfg.backbone:
        return
    source = cfg.out if cfg.resume else cfg.init_from
    names = (
        "wrapped",
        "width",
        "depth",
        "heads",
        "kv_heads",
        "mlp_width",
        "vocab_size",
        "tied",
        "qk_norm",
        "conv_stem",
        "rope_theta",
        "norm_eps",
        "vision_width",
        "vision_depth",
        "vision_heads",
        "vision_mlp",
        "vision_act",
        "vision_eps",
        "vision_size",
        "vision_enlarge",
        "patch_size",
        "pixel_shuffle",
    )
    known = (
        source or not cfg.plan or Path(cfg.backbone).is_dir() or cfg.wrapped
    )  # the plan of a SmolVLM preset needs no network
    saved = (
        read_checkpoint_config(source)
        if source
        else backbone_fields(fetch_backbone(cfg.backbone, weights=False))
        if known
        else {}
    )
    for name in names:
        setattr(cfg, name, saved.get(name, getattr(cfg, name)))
    camera = Path(cfg.data) / f"{cfg.cameras.split(',')[0]}.npy"
    if camera.is_file():
        cfg.image_size = np.load(camera, mmap_mode="r").shape[1]
    cfg.__post_init__()


def shrink(policy, device):
    """Frozen matrices go to bf16 where the arithmetic does: nothing is lost, autocast would round them anyway. fp32 masters stay fp32."""
    for module in policy.modules() if has_bf16(device) else ():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
    return policy


# Pretrained backbones already know words and pictures: no grounding phase. These numbers are first guesses, not yet tried.
FINETUNE = dict(
    data="data/small",
    ground_steps=0,
    steps=20000,
    batch_size=64,
    question_tokens=128,
    mix=0.25,
    backbone_lr=2e-5,
    bridge_lr=1e-4,
    expert_lr=1e-4,
    warmup=500,
    ema=0.999,
    save_every=1000,
)


PRESETS |= {
    "base256": dict(model_module.PRESETS["base256"], **FINETUNE, accumulate=4, checkpointing=True),
    "base": dict(model_module.PRESETS["base"], **FINETUNE, accumulate=8, checkpointing=True),
    "paper": dict(
        model_module.PRESETS["paper"],
        **FINETUNE,
        accumulate=16,
        freeze_vision=True,
        checkpointing=True,
        ema_on_host=True,
    ),
}
