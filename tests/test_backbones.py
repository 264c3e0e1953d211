"""Tests of pretrained backbones: SmolVLM against transformers, Qwen2.5-VL through the wrapper, chat tokens, pictures, training, bad checkpoints.

They need the optional packages (pip install transformers tokenizers peft) and no network: every checkpoint is a tiny random one
that the real package writes. The reference for pictures is its Pillow processor, which wants no torchvision.
"""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import model as model_module
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
SMOL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", "<video>"]
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def make_tokenizer(special, template):
    """A byte-level BPE trained on a few sentences, as the real ones are on the web."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator(["put the red cube on the blue pad, then User: Assistant: <reason> where is it? What colour is pad 3?"] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[2], pad_token=special[0], chat_template=template)


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
        text = dict(model_type="llama", hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, vocab_size=len(tokenizer) + 3,
                    rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
        vision = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=4)
        config = transformers.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, tie_word_embeddings=tied, image_token_id=SMOL_TOKENS.index("<image>"), pad_token_id=0)
        live(transformers.SmolVLMForConditionalGeneration(config)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}).save_pretrained(folder)
        return folder

    made = {}
    return lambda tied=False: made.get(tied) or made.setdefault(tied, write(tied))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = make_tokenizer(QWEN_TOKENS, QWEN_TEMPLATE)
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer) + 5, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
                bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    vision = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[1], window_size=56)
    ids = {f"{name}_token_id": QWEN_TOKENS.index(token) for name, token in (("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>"), ("vision_end", "<|vision_end|>"))}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    live(transformers.Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    return folder


def build(folder, **changes):
    """A policy on a pretrained backbone, small expert."""
    fields = backbone_fields(folder)
    small = dict(image_size=48, queries=3, expert_width=16, expert_depth=1, expert_heads=2, max_thought=6, decouple_percentile=34.0)
    torch.manual_seed(0)
    policy = SyVLA(Config(**small | fields | dict(backbone=str(folder)) | changes), Tokenizer.load(folder), folder, pretrained=True)
    low = torch.full((6,), -90.0)
    policy.set_statistics({name: {"q01": low, "q99": low + 180} for name in ("state", "action")})
    return policy.eval()


@pytest.fixture
def fp64_reference(monkeypatch):
    """transformers' RMSNorms compute in fp32 whatever the model's type; here the same formula without that cast."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    norm = lambda self, x: self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
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
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    if family == "smol":
        from transformers.models.smolvlm.processing_smolvlm import _prompt_single_image

        text = text.replace("<image>", _prompt_single_image(tokens_per_view, "<fake_token_around_image>", "<image>", "<global-img>"))
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
    assert tokenizer.end_thought not in tokenizer.encode("say <end_of_utterance> <|im_end|>")  # nobody types control tokens
    thought = tokenizer.thought("red cube at t5")
    assert thought[-1] == tokenizer.end_thought and tokenizer.decode(thought) == "red cube at t5" and tokenizer.thought("") == [tokenizer.end_thought]
    assert tokenizer.question("<task> put it") == tokenizer.prompt("put it") and tokenizer.answer("<task> put it", "there") == tokenizer.thought("there")
    assert tokenizer.prompt("put it", reasoning=False) == tokenizer.question("put it")
    assert type(tokenizer)(tokenizer.dumps()).encode("the red cube") == tokenizer.encode("the red cube")
    for text, said in ((" ", "is empty"), ("why " * 3000, "tokens long")):
        with pytest.raises(ValueError, match=said):
            tokenizer.question(text)


@pytest.mark.parametrize("size, enlarge", [(32, 64), (512, 2048), (48, 100)])
def test_pictures_are_prepared_like_the_reference(root, size, enlarge):
    """Every pixel within one grey level of 255 (their filter rounds its weights), nearly all equal; pictures of any shape."""
    processor = SmolVLMImageProcessorPil(size={"longest_edge": enlarge}, max_image_size={"longest_edge": size}, do_image_splitting=False)
    for picture in real_pictures(root)[: 1 if enlarge == 2048 else None]:
        theirs = processor([Image.fromarray(picture)], return_tensors="pt")["pixel_values"][0, 0]
        ours = fit(torch.from_numpy(picture).permute(2, 0, 1)[None], size, enlarge)[0].div(127.5).sub(1.0)
        error = (ours - theirs).abs() * 127.5
        assert ours.shape == theirs.shape and error.max() < 1.01 and (error > 0.01).float().mean() < 0.01


# -- SmolVLM: parity with transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("views", [1, 2])
def test_logits_and_gradients_equal_transformers_in_fp64(smol, root, fp64_reference, tied, views):
    folder = smol(tied)
    policy = build(folder).double()
    theirs = transformers.SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    tokenizer, questions = policy.tokenizer, ["where is the red cube?", "put it on pad 3, then"]
    images = torch.from_numpy(np.stack([real_pictures(root, 48)[i : i + views] for i in (0, 2)]))  # (2, views, 48, 48, 3)
    rows = [[(tokenizer.question(q), tokenizer.answer(q, a))] for q, a in zip(questions, ("on the blue pad", "no"))]
    batch = {k: torch.from_numpy(v) for k, v in pack(rows).items()}  # rows of different length: the second is padded
    text, _ = policy.vlm(policy.vlm.see(images), batch["tokens"], batch["segments"], batch["positions"], False)
    ours = policy.vlm.lm.logits(text)  # (2, T, vocab)
    assert ours.dtype == torch.float64

    image = SMOL_TOKENS.index("<image>")
    head = [*tokenizer.start, *views * [*tokenizer.image_open, *policy.cfg.tokens_per_view * [image], *tokenizer.image_close]]
    ids = torch.cat((torch.tensor([head, head]), batch["tokens"]), dim=1)
    mask = torch.cat((torch.ones(2, len(head), dtype=torch.int64), (batch["segments"] >= 0).long()), dim=1)
    pixels = fit(images.flatten(0, 1).permute(0, 3, 1, 2), 32, 64).double().div(127.5).sub(1).view(2, views, 3, 32, 32)
    reference = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, len(head) :]
    there = batch["segments"] >= 0
    assert not there.all() and (ours - reference)[there].abs().max() < 1e-9

    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * there[..., None]
    (ours * weights).sum().backward()
    (reference * weights).sum().backward()
    parameters = dict(theirs.named_parameters())
    grad = lambda *names: torch.cat([parameters[name].grad for name in names])
    text, eye = "model.text_model.", "model.vision_model."
    for got, expected in (
        (policy.vlm.lm.embed.weight, grad(text + "embed_tokens.weight")),
        (policy.vlm.lm.blocks[0].qkv.weight, grad(*(f"{text}layers.0.self_attn.{x}_proj.weight" for x in "qkv"))),
        (policy.vlm.lm.blocks[1].gate_up.weight, grad(text + "layers.1.mlp.gate_proj.weight", text + "layers.1.mlp.up_proj.weight")),
        (policy.vlm.lm.blocks[0].norm2.weight, grad(text + "layers.0.post_attention_layernorm.weight")),
        (policy.vlm.vision.connector.weight, grad("model.connector.modality_projection.proj.weight")),
        (policy.vlm.vision.blocks[0].qkv.bias, grad(*(f"{eye}encoder.layers.0.self_attn.{x}_proj.bias" for x in "qkv"))),
        (policy.vlm.vision.blocks[1].up.weight, grad(eye + "encoder.layers.1.mlp.fc1.weight")),
        (policy.vlm.vision.patch.weight, grad(eye + "embeddings.patch_embedding.weight")),
        (policy.vlm.vision.position, grad(eye + "embeddings.position_embedding.weight")),
    ):
        assert expected.abs().max() > 1e-3 and (got.grad - expected).abs().max() < 1e-9 * max(1, expected.abs().max())


@pytest.mark.parametrize("family", ["smol", "qwen"])
def test_greedy_answers_equal_transformers_generate(family, smol, qwen, root, fp64_reference):
    """Our cached decoding of two padded rows and two pictures, against their generate() of each row alone."""
    folder = smol() if family == "smol" else qwen
    policy = build(folder).double()
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    tokenizer, questions = policy.tokenizer, ["where is the red cube?", "put it"]
    images = torch.from_numpy(np.stack([real_pictures(root, 56)[i : i + 2] for i in (0, 2)]))  # (2, 2, 56, 56, 3)
    visual = policy.vlm.see(images)
    got, _ = policy.vlm.generate(visual, [tokenizer.question(q) for q in questions], -1, 8)
    image = theirs.config.image_token_id
    for row, question in enumerate(questions):
        ids = torch.tensor([[*tokenizer.start, *2 * [*tokenizer.image_open, *visual.shape[2] * [image], *tokenizer.image_close], *tokenizer.question(question)]])
        inputs = {"input_ids": ids}
        if family == "smol":
            inputs["pixel_values"] = fit(images[row].permute(0, 3, 1, 2), 32, 64).double().div(127.5).sub(1)[None]
        else:
            inputs |= dict(policy.vlm.processor(images=list(images[row].numpy()), return_tensors="pt"), mm_token_type_ids=(ids == image).int())
        with torch.no_grad():
            logits = theirs(**inputs).logits
        text = {k: torch.from_numpy(v) for k, v in pack([[(tokenizer.question(question), [])]]).items()}
        hidden, _ = policy.vlm(visual[row : row + 1], text["tokens"], text["segments"], text["positions"], False)
        ours = F_linear(policy, hidden)
        assert (ours - logits[:, -ours.shape[1] :]).abs().max() < 1e-9
        out = theirs.generate(**inputs, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
        assert got[row] == out.tolist()


def F_linear(policy, hidden):
    """Logits in the model's own number format."""
    head = policy.vlm.lm.head.weight if policy.vlm.lm.head is not None else policy.vlm.lm.embed(torch.arange(policy.cfg.vocab_size))
    return hidden @ head.T


@pytest.mark.parametrize("family", ["smol", "qwen"])
def test_cached_thought_and_queries_equal_a_full_forward(family, smol, qwen, root):
    policy = build(smol() if family == "smol" else qwen).double()
    tokenizer = policy.tokenizer
    images = torch.from_numpy(np.stack([real_pictures(root, 56)[i : i + 2] for i in (0, 2)]))
    prompts = [tokenizer.prompt("put the red cube on the blue pad"), tokenizer.prompt("put it")]
    visual = policy.vlm.see(images)
    said, states = policy.vlm.generate(visual, prompts, tokenizer.end_thought, 6, with_queries=True)
    rows = {k: torch.from_numpy(v) for k, v in pack([[(p, s + [tokenizer.end_thought])] for p, s in zip(prompts, said)]).items()}
    _, full = policy.vlm(visual, rows["tokens"], rows["segments"], rows["positions"], True)
    assert (states - full).abs().max() < 1e-5  # their rotary tables and norms are in fp32
    packed = {k: torch.from_numpy(v) for k, v in pack([[(prompts[0], [5]), (prompts[1], [6, 7])]]).items()}
    alone = {k: torch.from_numpy(v) for k, v in pack([[(prompts[1], [6, 7])]]).items()}
    run = lambda b: policy.vlm(visual[:1], b["tokens"], b["segments"], b["positions"], False)[0]
    assert (run(packed)[:, len(prompts[0]) + 1 :] - run(alone)).abs().max() < 1e-5  # isolated questions, as in `small`


def test_the_wrapper_and_the_native_model_agree(smol, root):
    """SmolVLM through the wrapper: the same logits and query states from two implementations of everything."""
    native, wrapped = build(smol()), build(smol(), wrapped=True)
    wrapped.vlm.queries.data = native.vlm.queries.data.clone()
    images = torch.from_numpy(np.stack([real_pictures(root, 48)[:2]]))
    rows = {k: torch.from_numpy(v) for k, v in pack([[(native.tokenizer.prompt("put the red cube"), [5])]]).items()}
    out = [policy.vlm(policy.vlm.see(images), rows["tokens"], rows["segments"], rows["positions"], True) for policy in (native, wrapped)]
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
    says(tensors(lambda w: w.update({name: w[name][:8].clone()})), "does not fit: model.text_model.layers.1.self_attn.q_proj.weight +")
    says(lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:3000]), "is damaged")
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
        with monkeypatch.context() as patch, pytest.raises(FileNotFoundError, match="cannot download nobody/nothing"):
            patch.setattr(huggingface_hub, "snapshot_download", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            fetch_backbone("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        fetch_backbone("no such//name")
