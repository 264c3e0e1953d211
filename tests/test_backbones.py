"""Tests of pretrained backbones: SmolVLM against transformers, Qwen2.5-VL through the wrapper, chat tokens, pictures, training, bad checkpoints.

They need the optional packages (pip install transformers tokenizers peft) and no network: every checkpoint is
a tiny random one that the real package writes. The reference for pictures is its Pillow processor, which
wants no torchvision.
"""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import model as model_module
import rl
import sample
import train
from data import Tokenizer, pack
from model import Config, SyVLA, backbone_fields, fetch_backbone, fit

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from transformers.models.llama import modeling_llama  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil  # noqa: E402

SMOL_TEMPLATE = "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
QWEN_TEMPLATE = "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SMOL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<end_of_utterance>",
    "<video>",
]
QWEN_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def make_tokenizer(special, template):
    """A byte-level BPE trained on a few sentences, as the real ones are on the web."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        [
            "put the red cube on the blue pad, then User: Assistant: <reason> where is it? What colour is pad 3?"
        ]
        * 4,
        trainer,
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[2], pad_token=special[0], chat_template=template
    )


def live(model):
    """Weights large enough that every path shows."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=0.15).add_(1.0 if p.ndim == 1 else 0.0)
    return model


@pytest.fixture(scope="session")
def smol(tmp_path_factory):
    """folder(tied) of a tiny random SmolVLM with tokenizer and processor, written by save_pretrained."""

    def write(tied):
        folder = tmp_path_factory.mktemp("smol")
        tokenizer = make_tokenizer(SMOL_TOKENS, SMOL_TEMPLATE)
        text = dict(
            model_type="llama",
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=len(tokenizer) + 3,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        vision = dict(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=32,
            patch_size=4,
        )
        config = transformers.SmolVLMConfig(
            text_config=text,
            vision_config=vision,
            scale_factor=2,
            tie_word_embeddings=tied,
            image_token_id=SMOL_TOKENS.index("<image>"),
            pad_token_id=0,
        )
        live(transformers.SmolVLMForConditionalGeneration(config)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        SmolVLMImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        ).save_pretrained(folder)
        return folder

    made = {}
    return lambda tied=False: made.get(tied) or made.setdefault(tied, write(tied))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = make_tokenizer(QWEN_TOKENS, QWEN_TEMPLATE)
    text = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer) + 5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = dict(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=32,
        fullatt_block_indexes=[1],
        window_size=56,
    )
    ids = {
        f"{name}_token_id": QWEN_TOKENS.index(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
    )
    live(transformers.Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    return folder


def build(folder, **changes):
    """A policy on a pretrained backbone, small expert."""
    fields = backbone_fields(folder)
    small = dict(
        image_size=48,
        queries=3,
        expert_width=16,
        expert_depth=1,
        expert_heads=2,
        max_thought=6,
        decouple_percentile=34.0,
    )
    torch.manual_seed(0)
    policy = SyVLA(
        Config(**small | fields | dict(backbone=str(folder)) | changes),
        Tokenizer.load(folder),
        folder,
        pretrained=True,
    )
    low = torch.full((6,), -90.0)
    policy.set_statistics({name: {"q01": low, "q99": low + 180} for name in ("state", "action")})
    return policy.eval()


@pytest.fixture
def fp64_reference(monkeypatch):
    """transformers' RMSNorms compute in fp32 whatever the model's type; here the same formula without that cast."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    norm = lambda self, x: (
        self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
    )
    for cls in (modeling_llama.LlamaRMSNorm, modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm):
        monkeypatch.setattr(cls, "forward", norm)


def real_pictures(root, px=None):
    """Photographs of the simulation from the repository: uint8 arrays (n, h, w, 3)."""
    sheet = Image.open(root / "assets" / "tasks.png").convert("RGB")
    boxes = [(0, 0, 120, 120), (130, 40, 310, 220), (60, 90, 260, 190), (20, 10, 117, 200)]
    return [np.asarray(sheet.crop(box).resize((px, px)) if px else sheet.crop(box)) for box in boxes]


def reference_ids(tokenizer, question, views, tokens_per_view, family):
    """Token ids of the processor's prompt: its chat template, every picture's token repeated as its processor does."""
    content = [{"type": "image"}] * views + [{"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    if family == "smol":
        from transformers.models.smolvlm.processing_smolvlm import _prompt_single_image

        text = text.replace(
            "<image>",
            _prompt_single_image(tokens_per_view, "<fake_token_around_image>", "<image>", "<global-img>"),
        )
    else:
        text = text.replace("<|image_pad|>", "<|image_pad|>" * tokens_per_view)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# -- chat tokens and pictures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["smol", "qwen"])
@pytest.mark.parametrize("views", [1, 2])
def test_prompt_is_the_reference_processors_token_by_token(family, views, smol, qwen):
    folder = smol() if family == "smol" else qwen
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    image = theirs.convert_tokens_to_ids("<image>" if family == "smol" else "<|image_pad|>")
    for question in ("where is the red cube?", "What colour is pad 3", "señor \U0001f916, put it there"):
        prompt = ours.question(question)
        got = [*ours.start, *views * [*ours.image_open, *9 * [image], *ours.image_close], *prompt]
        assert got == reference_ids(theirs, question, views, 9, family)
        assert ours.decode(prompt).startswith(question)
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("family", ["smol", "qwen"])
def test_chat_tokenizer_round_trips(family, smol, qwen):
    tokenizer = Tokenizer.load(smol() if family == "smol" else qwen)
    for text in ("blue is pad 2 , red cube at t5 r3", "a <image> <|im_end|> in words", "ä\n\U0001f916"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end_thought not in tokenizer.encode(
        "say <end_of_utterance> <|im_end|>"
    )  # nobody types control tokens
    thought = tokenizer.thought("red cube at t5")
    assert (
        thought[-1] == tokenizer.end_thought
        and tokenizer.decode(thought) == "red cube at t5"
        and tokenizer.thought("") == [tokenizer.end_thought]
    )
    assert tokenizer.question("<task> put it") == tokenizer.prompt("put it") and tokenizer.answer(
        "<task> put it", "there"
    ) == tokenizer.thought("there")
    assert tokenizer.prompt("put it", reasoning=False) == tokenizer.question("put it")
    assert type(tokenizer)(tokenizer.dumps()).encode("the red cube") == tokenizer.encode("the red cube")
    for text, said in ((" ", "is empty"), ("why " * 3000, "tokens long")):
        with pytest.raises(ValueError, match=said):
            tokenizer.question(text)


@pytest.mark.parametrize("size, enlarge", [(32, 64), (512, 2048), (48, 100)])
def test_pictures_are_prepared_like_the_reference(root, size, enlarge):
    """Square pictures: nearly every pixel equal, the rest one grey level off (their filter rounds its weights).

    Others: Pillow 13 filters rows first where that is cheaper, older ones and we always columns, which moves
    sharp edges a little.
    """
    processor = SmolVLMImageProcessorPil(
        size={"longest_edge": enlarge}, max_image_size={"longest_edge": size}, do_image_splitting=False
    )
    for picture in real_pictures(root)[: 1 if enlarge == 2048 else None]:
        theirs = processor([Image.fromarray(picture)], return_tensors="pt")["pixel_values"][0, 0]
        ours = fit(torch.tensor(picture).permute(2, 0, 1)[None], size, enlarge)[0].div(127.5).sub(1.0)
        error = (ours - theirs).abs() * 127.5
        assert ours.shape == theirs.shape and error.mean() < 0.5
        assert picture.shape[0] != picture.shape[1] or (
            error.max() < 1.01 and (error > 0.01).float().mean() < 0.01
        )


# -- SmolVLM: parity with transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("views", [1, 2])
def test_logits_and_gradients_equal_transformers_in_fp64(smol, root, fp64_reference, tied, views):
    folder = smol(tied)
    policy = build(folder).double()
    theirs = transformers.SmolVLMForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    )
    tokenizer, questions = policy.tokenizer, ["where is the red cube?", "put it on pad 3, then"]
    images = torch.from_numpy(
        np.stack([real_pictures(root, 48)[i : i + views] for i in (0, 2)])
    )  # (2, views, 48, 48, 3)
    rows = [
        [(tokenizer.question(q), tokenizer.answer(q, a))]
        for q, a in zip(questions, ("on the blue pad", "no"))
    ]
    batch = {
        k: torch.from_numpy(v) for k, v in pack(rows).items()
    }  # rows of different length: the second is padded
    text, _ = policy.vlm(
        policy.vlm.see(images), batch["tokens"], batch["segments"], batch["positions"], False
    )
    ours = policy.vlm.lm.logits(text)  # (2, T, vocab)
    assert ours.dtype == torch.float64

    image = SMOL_TOKENS.index("<image>")
    head = [
        *tokenizer.start,
        *views * [*tokenizer.image_open, *policy.cfg.tokens_per_view * [image], *tokenizer.image_close],
    ]
    ids = torch.cat((torch.tensor([head, head]), batch["tokens"]), dim=1)
    mask = torch.cat((torch.ones(2, len(head), dtype=torch.int64), (batch["segments"] >= 0).long()), dim=1)
    pixels = (
        fit(images.flatten(0, 1).permute(0, 3, 1, 2), 32, 64)
        .double()
        .div(127.5)
        .sub(1)
        .view(2, views, 3, 32, 32)
    )
    reference = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, len(head) :]
    there = batch["segments"] >= 0
    assert not there.all() and (ours - reference)[there].abs().max() < 1e-9

    weights = (
        torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        * there[..., None]
    )
    (ours * weights).sum().backward()
    (reference * weights).sum().backward()
    parameters = dict(theirs.named_parameters())
    grad = lambda *names: torch.cat([parameters[name].grad for name in names])
    text, eye = "model.text_model.", "model.vision_model."
    for got, expected in (
        (policy.vlm.lm.embed.weight, grad(text + "embed_tokens.weight")),
        (
            policy.vlm.lm.blocks[0].qkv.weight,
            grad(*(f"{text}layers.0.self_attn.{x}_proj.weight" for x in "qkv")),
        ),
        (
            policy.vlm.lm.blocks[1].gate_up.weight,
            grad(text + "layers.1.mlp.gate_proj.weight", text + "layers.1.mlp.up_proj.weight"),
        ),
        (policy.vlm.lm.blocks[0].norm2.weight, grad(text + "layers.0.post_attention_layernorm.weight")),
        (policy.vlm.vision.connector.weight, grad("model.connector.modality_projection.proj.weight")),
        (
            policy.vlm.vision.blocks[0].qkv.bias,
            grad(*(f"{eye}encoder.layers.0.self_attn.{x}_proj.bias" for x in "qkv")),
        ),
        (policy.vlm.vision.blocks[1].up.weight, grad(eye + "encoder.layers.1.mlp.fc1.weight")),
        (policy.vlm.vision.patch.weight, grad(eye + "embeddings.patch_embedding.weight")),
        (policy.vlm.vision.position, grad(eye + "embeddings.position_embedding.weight")),
    ):
        assert expected.abs().max() > 1e-3 and (got.grad - expected).abs().max() < 1e-9 * max(
            1, expected.abs().max()
        )


@pytest.mark.parametrize("family", ["smol", "qwen"])
def test_greedy_answers_equal_transformers_generate(family, smol, qwen, root, fp64_reference):
    """Our cached decoding of two padded rows and two pictures, against their generate() of each row alone."""
    folder = smol() if family == "smol" else qwen
    policy = build(folder).double()
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    )
    tokenizer, questions = policy.tokenizer, ["where is the red cube?", "put it"]
    images = torch.from_numpy(
        np.stack([real_pictures(root, 56)[i : i + 2] for i in (0, 2)])
    )  # (2, 2, 56, 56, 3)
    visual = policy.vlm.see(images)
    got, _ = policy.vlm.generate(
        visual, [tokenizer.question(q) for q in questions], policy.cfg.vocab_size - 1, 8
    )  # a token that nobody says
    image = theirs.config.image_token_id
    for row, question in enumerate(questions):
        ids = torch.tensor(
            [
                [
                    *tokenizer.start,
                    *2 * [*tokenizer.image_open, *visual.shape[2] * [image], *tokenizer.image_close],
                    *tokenizer.question(question),
                ]
            ]
        )
        inputs = {"input_ids": ids}
        if family == "smol":
            inputs["pixel_values"] = (
                fit(images[row].permute(0, 3, 1, 2), 32, 64).double().div(127.5).sub(1)[None]
            )
        else:
            inputs |= dict(
                policy.vlm.processor(images=list(images[row].numpy()), return_tensors="pt"),
                mm_token_type_ids=(ids == image).int(),
            )
        with torch.no_grad():
            logits = theirs(**inputs).logits
        text = {k: torch.from_numpy(v) for k, v in pack([[(tokenizer.question(question), [])]]).items()}
        hidden, _ = policy.vlm(
            visual[row : row + 1], text["tokens"], text["segments"], text["positions"], False
        )
        ours = raw_logits(policy, hidden)
        assert (ours - logits[:, -ours.shape[1] :]).abs().max() < 1e-9
        out = theirs.generate(**inputs, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)[
            0, ids.shape[1] :
        ]
        assert got[row] == out.tolist()


def raw_logits(policy, hidden):
    """Logits in the model's own number format."""
    head = (
        policy.vlm.lm.head.weight
        if policy.vlm.lm.head is not None
        else policy.vlm.lm.embed(torch.arange(policy.cfg.vocab_size))
    )
    return hidden @ head.T


@pytest.mark.parametrize("family", ["smol", "qwen"])
def test_cached_thought_and_queries_equal_a_full_forward(family, smol, qwen, root):
    policy = build(smol() if family == "smol" else qwen).double()
    tokenizer = policy.tokenizer
    images = torch.from_numpy(np.stack([real_pictures(root, 56)[i : i + 2] for i in (0, 2)]))
    prompts = [tokenizer.prompt("put the red cube on the blue pad"), tokenizer.prompt("put it")]
    visual = policy.vlm.see(images)
    said, states = policy.vlm.generate(visual, prompts, tokenizer.end_thought, 6, with_queries=True)
    rows = {
        k: torch.from_numpy(v)
        for k, v in pack([[(p, s + [tokenizer.end_thought])] for p, s in zip(prompts, said)]).items()
    }
    _, full = policy.vlm(visual, rows["tokens"], rows["segments"], rows["positions"], True)
    assert (states - full).abs().max() < 1e-5  # their rotary tables and norms are in fp32
    packed = {k: torch.from_numpy(v) for k, v in pack([[(prompts[0], [5]), (prompts[1], [6, 7])]]).items()}
    alone = {k: torch.from_numpy(v) for k, v in pack([[(prompts[1], [6, 7])]]).items()}
    run = lambda b: policy.vlm(visual[:1], b["tokens"], b["segments"], b["positions"], False)[0]
    assert (
        run(packed)[:, len(prompts[0]) + 1 :] - run(alone)
    ).abs().max() < 1e-5  # isolated questions, as in `small`


def test_the_wrapper_and_the_native_model_agree(smol, root):
    """SmolVLM through the wrapper: the same logits and query states from two implementations of everything."""
    native, wrapped = build(smol()), build(smol(), wrapped=True)
    wrapped.vlm.queries.data = native.vlm.queries.data.clone()
    images = torch.from_numpy(np.stack([real_pictures(root, 48)[:2]]))
    rows = {
        k: torch.from_numpy(v)
        for k, v in pack([[(native.tokenizer.prompt("put the red cube"), [5])]]).items()
    }
    out = [
        policy.vlm(policy.vlm.see(images), rows["tokens"], rows["segments"], rows["positions"], True)
        for policy in (native, wrapped)
    ]
    for ours, theirs in zip(*out):
        assert (ours - theirs).abs().max() < 2e-3 * ours.abs().max()  # a grey level here and there


# -- bad checkpoints ---------------------------------------------------------------------------------------------------


def test_bad_checkpoints_are_answered_in_one_line(smol, tmp_path):
    def says(change, said, folder=None):
        folder = folder or shutil.copytree(smol(), tmp_path / str(len(list(tmp_path.iterdir()))))
        change(folder)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            build(folder)
        assert said in str(caught.value) and "\n" not in str(caught.value), caught.value

    def tensors(change):
        def apply(folder):
            path = folder / "model.safetensors"
            weights = load_file(path)
            change(weights)
            save_file(weights, path)

        return apply

    def config(**changes):
        def apply(folder):
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return apply

    name = "model.text_model.layers.1.self_attn.k_proj.weight"
    says(tensors(lambda w: w.pop(name)), f"lacks {name}")
    says(tensors(lambda w: w.update(extra=torch.zeros(1))), "does not know, such as extra")
    says(
        tensors(lambda w: w.update({name: w[name][:8].clone()})),
        "does not fit: model.text_model.layers.1.self_attn.q_proj.weight +",
    )
    says(
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:3000]),
        "is damaged",
    )
    says(lambda f: (f / "model.safetensors").unlink(), "no *.safetensors")
    says(lambda f: (f / "config.json").write_text("{"), "no vision-language model")
    says(lambda f: (f / "config.json").unlink(), "no vision-language model")
    says(lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read")
    text = json.loads((smol() / "config.json").read_text())["text_config"]
    says(config(text_config=text | {"head_dim": 16}), "head_dim 16")
    says(config(text_config=text | {"attention_bias": True}), "attention_bias True")
    says(config(model_type="nothing_known"), "transformers cannot load")


def test_missing_packages_and_wrong_names_are_answered_in_one_line(smol, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ValueError, match="pip install tokenizers"):
            Tokenizer.load(smol())
    tokenizer, fields = Tokenizer.load(smol()), backbone_fields(smol())
    for package, changes in (("peft", {"lora": 4}), ("transformers", {"wrapped": True})):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"pip install {package}"):
            patch.setitem(sys.modules, package, None)
            SyVLA(Config(**fields | {"backbone": str(smol())} | changes), tokenizer, smol())
    import huggingface_hub

    for error in (ConnectionError("no route to host"), OSError("no space left on device")):
        with (
            monkeypatch.context() as patch,
            pytest.raises(FileNotFoundError, match="cannot download nobody/nothing"),
        ):
            patch.setattr(
                huggingface_hub,
                "snapshot_download",
                lambda *_, error=error, **__: (_ for _ in ()).throw(error),
            )
            fetch_backbone("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        fetch_backbone("no such//name")


# -- training ----------------------------------------------------------------------------------------------------------


def arguments(data, out, folder, *flags):
    rates = ["--backbone_lr=1e-3", "--bridge_lr=1e-3", "--expert_lr=1e-3"]
    return [
        "--config",
        "debug",
        f"--data={data}",
        f"--out={out}",
        "--device=cpu",
        "--threads=1",
        f"--backbone={folder}",
        "--ground_steps=0",
        "--mix=0.5",
        *rates,
        *flags,
    ]


@pytest.mark.parametrize(
    "family, flags",
    [
        ("smol", []),
        ("smol", ["--lora=2", "--freeze_vision", "--checkpointing"]),
        ("qwen", ["--lora=2", "--freeze_vision", "--checkpointing"]),
    ],
    ids=["smol", "smol LoRA", "qwen LoRA"],
)
def test_train_save_load_act_answer_resume(family, flags, smol, qwen, data, tmp_path, monkeypatch, capsys):
    if "--lora=2" in flags:
        pytest.importorskip("peft")
    folder, out = smol() if family == "smol" else qwen, tmp_path / "run"
    before = {k: v.clone() for k, v in build(folder, lora=2 * ("--lora=2" in flags)).vlm.named_parameters()}
    train.main(arguments(data, out, folder, "--steps=20", "--save_every=10", "--ema=0.5", *flags))
    said = capsys.readouterr().out
    assert "predicted peak memory" in said and "of them trained" in said
    losses = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert losses[-1]["text"] < losses[0]["text"] and losses[-1]["step"] == 20
    monkeypatch.setattr(model_module, "fetch_backbone", None)  # the run folder is enough: no hub, no backbone
    policy = SyVLA.load(out, Tokenizer.load(out))
    moved = {k.split(".")[0] for k, p in policy.vlm.named_parameters() if not torch.equal(p, before[k])}
    still = {k for k, p in policy.vlm.named_parameters() if torch.equal(p, before[k])}
    if flags:  # only adapters, connector and queries have learnt
        learnt = {k for k in before if k not in still}
        assert learnt and all("lora_" in k or "connector" in k or k == "queries" for k in learnt)
    else:
        assert not still and moved == {"vision", "lm", "queries"}
    images, state = np.zeros((1, 2, 32, 32, 3), np.uint8), np.zeros((1, 6), np.float32)
    chunk, (thought,) = policy.act(images, state, ["put the red cube on the blue pad"])
    assert (
        np.isfinite(chunk).all()
        and isinstance(thought, str)
        and isinstance(policy.answer(images, ["which pad is blue"])[0], str)
    )
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "x.png")
    sample.main(
        [
            "--config",
            "debug",
            f"--run={out}",
            "--threads=1",
            "--ask",
            "what is it?",
            f"--image={tmp_path / 'x.png'}",
        ]
    )
    assert capsys.readouterr().out.startswith("what is it?\n")

    half = tmp_path / "half"  # the same run in two pieces
    train.main(arguments(data, half, folder, "--steps=20", "--save_every=10", "--ema=0.5", *flags))
    state = torch.load(half / "train_state.pt", weights_only=True)
    assert (
        all(
            "lora_" in k or not k.startswith("vlm.") or "connector" in k or k == "vlm.queries"
            for k in state["model"]
        )
        if flags
        else len(state["model"]) == len(load_file(half / "model.safetensors"))
    )
    for run in (out, half):
        train.main(
            arguments(data, run, folder, "--steps=22", "--save_every=10", "--ema=0.5", "--resume", *flags)
        )
    a, b = load_file(out / "model.safetensors"), load_file(half / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "family, flags", [("smol", []), ("qwen", ["--lora=2", "--freeze_vision"])], ids=["smol", "qwen LoRA"]
)
def test_practice_keeps_the_backbone_and_resumes_to_the_same_bits(
    family, flags, smol, qwen, data, tmp_path, monkeypatch, capsys
):
    """rl.py on a pretrained VLM: index of its demonstrations, rollouts in the simulation, updates of adapter and expert, saved and resumed."""
    if flags:
        pytest.importorskip("peft")
    start = tmp_path / "start"
    train.main(arguments(data, start, smol() if family == "smol" else qwen, "--steps=2", *flags))
    monkeypatch.setattr(model_module, "fetch_backbone", None)  # the run folder is enough
    more = ["--anchor=0.1", "--critic_warmup=0", "--eval_episodes=0", "--device=cpu", "--threads=1"]
    practise = lambda name, *words: rl.main(
        ["--config", "debug", f"--init_from={start}", f"--out={tmp_path / name}", *more, *words]
    )
    practise("whole")
    said = capsys.readouterr().out
    assert "the same bit for bit" in said and list(data.glob("similarity_*"))
    update = rl.update

    def dies(*args, **kwargs):
        if args[7] == 1:  # the second iteration
            raise KeyboardInterrupt
        return update(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl, "update", dies)
        practise("cut")
    practise("cut", "--resume")
    before, whole, cut = (
        load_file(folder / "model.safetensors") for folder in (start, tmp_path / "whole", tmp_path / "cut")
    )
    assert all(torch.equal(whole[k], cut[k]) for k in whole) and before.keys() == whole.keys()
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], whole[k])}
    assert moved == {"adapter", "expert"}
    policy = SyVLA.load(tmp_path / "whole", Tokenizer.load(tmp_path / "whole"))
    chunk, (thought,) = policy.act(
        np.zeros((1, 2, 32, 32, 3), np.uint8),
        np.zeros((1, 6), np.float32),
        ["put the red cube on the blue pad"],
    )
    assert np.isfinite(chunk).all() and isinstance(thought, str)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2] and {
        "kl",
        "similarity",
        "expert_loss",
        "anchor",
    } <= lines[1].keys()


def config(folder, data, **changes):
    cfg = train.TrainConfig(
        **train.PRESETS["debug"]
        | dict(
            backbone=str(folder),
            data=str(data),
            ground_steps=0,
            backbone_lr=1e-4,
            bridge_lr=2e-4,
            expert_lr=3e-4,
        )
        | changes
    )
    train.settle_backbone(cfg)
    return cfg


def test_backbone_bridge_and_expert_have_their_own_rates(smol, data):
    cfg = config(smol(), data)
    policy = train.build(cfg, torch.device("cpu"))[0]
    (optimizer,) = train.make_optimizers(policy, cfg)
    (rates,) = train.peak_rates(cfg)
    rate = {id(p): lr for group, lr in zip(optimizer.param_groups, rates) for p in group["params"]}
    assert len(rate) == len(list(policy.parameters()))
    for name, p in policy.named_parameters():
        wanted = (
            2e-4
            if name == "vlm.queries" or name.startswith("adapter")
            else 3e-4
            if name.startswith("expert")
            else 1e-4
        )
        assert rate[id(p)] == wanted, name
    assert cfg.image_size == 32 and cfg.vision_size == 32 and cfg.width == 48


@pytest.mark.parametrize("flags", [{}, {"freeze_vision": True}, {"checkpointing": True}], ids=str)
def test_predicted_activations_are_what_autograd_keeps(smol, data, flags):
    """bf16 autocast on the CPU, a batch of 8; storages that autograd holds on to, weights and inputs left out."""
    cfg = config(smol(), data, batch_size=8, mix=0.5, **flags)
    policy, episodes, questions, _ = train.build(cfg, torch.device("cpu"))
    (pair,) = train.batches(0, cfg, policy, episodes, questions, 0, 1, "cpu")
    own = {p.untyped_storage().data_ptr() for p in (*policy.parameters(), *policy.buffers())} | {
        v.untyped_storage().data_ptr() for b in pair for v in b.values()
    }
    kept = {}

    def pack_hook(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss = sum(sum(v for k, v in policy(batch).items() if k != "kept") for batch in pair)
    weights = sum(
        p.numel() * 2 for p in policy.parameters() if p.ndim > 1
    )  # bf16 copies that matrices keep are counted apart
    found = sum(n for n, _ in kept.values()) - weights
    predicted = train.memory(cfg, policy, 1, bf16=True)
    print(f"{flags}: predicted {predicted['activations']}, kept {found}")
    # with checkpointing the prediction also holds the one block that is being computed again, half of this
    # tiny model
    assert loss.requires_grad and 0.7 < predicted["activations"] / found < (3 if cfg.checkpointing else 1.5)
    assert predicted["optimizer"] == 8 * sum(p.numel() for p in policy.parameters() if p.requires_grad)


def test_work_is_what_torch_counts(smol, data):
    from torch.utils.flop_counter import FlopCounterMode

    cfg = config(smol(), data, batch_size=4, mix=0.0, decouple="off")
    policy, episodes, questions, _ = train.build(cfg, torch.device("cpu"))
    (pair,) = train.batches(0, cfg, policy, episodes, questions, 0, 1, "cpu")
    with FlopCounterMode(display=False) as counter:
        losses = policy(pair[0])
        (losses["text"] + losses["action"]).backward()
    assert 0.6 < 4 * train.work(cfg, policy) / counter.get_total_flops() < 1.6


def test_too_little_memory_stops_with_a_way_out(smol, data, tmp_path, fails, monkeypatch):
    for bytes, said in ((40 * 2**20, "add --accumulate"), (2**10, "a smaller preset")):
        monkeypatch.setattr(train, "room", lambda device, bytes=bytes: bytes)
        line = fails(train.main, arguments(data, tmp_path / "x", smol(), "--batch_size=64"))
        assert said in line and "free" in line
    assert not (tmp_path / "x").exists()
    train.main(arguments(data, tmp_path / "x", smol(), "--plan"))  # a plan only tells


@pytest.mark.parametrize("preset, parameters", [("base256", 256_484_928), ("base", 507_482_304)])
def test_presets_have_the_published_sizes(preset, parameters, capsys):
    train.main(["--config", preset, "--plan"])
    said = capsys.readouterr().out
    cfg = train.TrainConfig(**train.PRESETS[preset])
    with torch.device("meta"):
        assert (
            sum(
                p.numel()
                for name, p in SyVLA(cfg, train.NoTokenizer()).vlm.named_parameters()
                if name != "queries"
            )
            == parameters
        )
    assert "predicted peak memory" in said and "TFLOP a sample" in said


def test_wrong_use_is_answered_in_one_line(smol, data, tmp_path, fails):
    go = lambda *flags: fails(train.main, arguments(data, tmp_path / "x", smol(), *flags))
    assert "given together" in go("--expert_lr=0")
    assert "neither a folder nor" in fails(train.main, arguments(data, tmp_path / "x", "no such//name"))
    assert "add --backbone" in fails(train.main, ["--config", "debug", "--lora=4"])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    train.main(arguments(data, tmp_path / "run", smol(), "--steps=1"))
    ask = lambda *words: fails(sample.main, ["--config", "debug", f"--run={tmp_path / 'run'}", *words])
    assert "goes with a question" in ask(f"--image={tmp_path / 'a.png'}")
    assert "no picture that can be read" in ask(
        "--ask=what", f"--image={tmp_path / 'b.png'}"
    ) and "no picture that can be read" in ask("--ask=what", "--image=none.png")


def test_a_wrapped_model_checkpoints_in_training_and_caches_in_evaluation(qwen, data):
    pytest.importorskip("peft")
    cfg = config(qwen, data, lora=2, freeze_vision=True, checkpointing=True)
    policy, episodes, questions, _ = train.build(cfg, torch.device("cpu"))
    (pair,) = train.batches(0, cfg, policy, episodes, questions, 0, 1, "cpu")
    layer, runs = policy.vlm.lm.text.layers[1], []
    layer.mlp.register_forward_pre_hook(
        lambda *_: runs.append(1)
    )  # before: the second run stops as soon as it has what the way back needs
    losses = policy(pair[-1])
    (losses["text"] + losses["action"]).backward()
    assert len(runs) == 2  # once forward, once again on the way back
    images = np.zeros((1, 2, 32, 32, 3), np.uint8)
    with train.evaluating(policy):
        inside = policy.answer(images, ["which pad is blue"])
    assert policy.training and inside == policy.eval().answer(images, ["which pad is blue"])
