"""Tests of pretrained backbones: SmolVLM against transformers, Qwen2.5-VL through the wrapper, chat tokens,
pictures, training, predicted memory.

They need the optional packages (pip install transformers tokenizers peft) and no network: every checkpoint is
a tiny random one that the real package writes. The reference for pictures is its Pillow processor, which
wants no torchvision.
"""

import dataclasses
import json
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import train
from common import UserError, read_json, read_log
from data import pack, to_tensors
from extras import backbones
from extras.backbones import ChatTokenizer, SmolVLM, WrappedVLM, apply_backbone_config, load_backbone
from model import PRESETS, SyVLA, Visual, load_policy

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")
qwen2_5_vl = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
qwen_pictures = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
smol_pictures = pytest.importorskip("transformers.models.smolvlm.image_processing_pil_smolvlm")
smol_prompt = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm")._prompt_single_image

CPU = torch.device("cpu")
TASK = "put the red cube on the blue pad"
NO_EOS = dict(do_sample=False, eos_token_id=None, pad_token_id=0)

# The chat templates of the published models.
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<end_of_utterance>",
    "<video>",
)
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


# -- tiny random checkpoints --------------------------------------------------------------------------------


def make_tokenizer(special, template):
    """A byte-level BPE trained on a few sentences, as the real ones are on the web."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    text = TASK + ", then User: Assistant: <reason> where is it? What colour is pad 3?"
    core.train_from_iterator([text] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[2], pad_token=special[0], chat_template=template
    )


def live(model):
    """Weights large enough that every path shows."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=0.15).add_(1.0 if p.ndim == 1 else 0.0)
    return model


def write_smol(folder, tied):
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
    smol_processor(32).save_pretrained(folder)


def smol_processor(size):
    return smol_pictures.SmolVLMImageProcessorPil(
        size={"longest_edge": 4 * size}, max_image_size={"longest_edge": size}, do_image_splitting=False
    )


def write_qwen(folder):
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
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=QWEN_TOKENS.index("<|image_pad|>"),
        video_token_id=QWEN_TOKENS.index("<|video_pad|>"),
        vision_start_token_id=QWEN_TOKENS.index("<|vision_start|>"),
        vision_end_token_id=QWEN_TOKENS.index("<|vision_end|>"),
    )
    live(transformers.Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    qwen_pictures.Qwen2VLImageProcessorPil().save_pretrained(folder)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of a tiny random SmolVLM, the same with tied embeddings, and a Qwen2.5-VL."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("smol", "tied", "qwen")}
    write_smol(folders["smol"], tied=False)
    write_smol(folders["tied"], tied=True)
    write_qwen(folders["qwen"])
    return folders


def read_tokenizer(folder):
    return ChatTokenizer((folder / "tokenizer.json").read_text())


def config(folder, **changes):
    """TrainConfig of the debug preset on a backbone, with its fields filled in."""
    known = {field.name for field in dataclasses.fields(train.TrainConfig)}
    preset = {name: value for name, value in PRESETS["debug"].items() if name in known}
    own = dict(backbone=str(folder), cameras="front,wrist", ground_steps=0, backbone_lr=1e-4, adam_lr=2e-4)
    cfg = train.TrainConfig(**preset | own | changes)
    apply_backbone_config(cfg)
    return cfg


def build(folder, **changes):
    """A policy on a pretrained backbone, with statistics."""
    torch.manual_seed(0)
    cfg = config(folder, image_size=48, **changes)
    policy = SyVLA(cfg, *load_backbone(cfg, folder, folder / "tokenizer.json", pretrained=True))
    low = torch.full((6,), -90.0)
    ends = {"q01": low, "min": low, "q99": low + 180, "max": low + 180}
    policy.set_statistics(dict.fromkeys(("state", "action"), ends))
    return policy.eval()


def fp64_norm(self, x):
    """RMSNorm without the cast to fp32."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.fixture
def fp64_reference(monkeypatch):
    """transformers' RMSNorms compute in fp32 whatever the model's type; here the same formula in its type."""
    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", fp64_norm)
    monkeypatch.setattr(qwen2_5_vl.Qwen2_5_VLRMSNorm, "forward", fp64_norm)


def real_pictures(root, px=None):
    """Four photographs of the simulation from the repository: uint8 arrays (h, w, 3)."""
    sheet = Image.open(root / "assets" / "tasks.png").convert("RGB")
    boxes = [(0, 0, 120, 120), (130, 40, 310, 220), (60, 90, 260, 190), (20, 10, 117, 200)]
    pictures = [sheet.crop(box) for box in boxes]
    if px:
        pictures = [picture.resize((px, px)) for picture in pictures]
    return [np.asarray(picture) for picture in pictures]


def two_scenes(root, px, views=2):
    """Images (2, views, px, px, 3) uint8."""
    pictures = real_pictures(root, px)
    return torch.from_numpy(np.stack([pictures[i : i + views] for i in (0, 2)]))


def batch_of(rows):
    return to_tensors(pack(rows))


def prefix_ids(tokenizer, views, tokens_per_view, image):
    """Token ids before the text as transformers wants them: `image` where a visual token stands."""
    view = [*tokenizer.image_open, *tokens_per_view * [image], *tokenizer.image_close]
    return [*tokenizer.start, *views * view]


# -- chat tokens and pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["smol", "qwen"])
@pytest.mark.parametrize("views", [1, 2])
def test_prompt_is_the_reference_processors_token_by_token(family, views, checkpoints):
    """The reference: its chat template, every picture's token repeated as its processor does."""
    folder = checkpoints[family]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = read_tokenizer(folder)
    word = "<image>" if family == "smol" else "<|image_pad|>"
    repeated = 9 * word
    if family == "smol":
        repeated = smol_prompt(9, "<fake_token_around_image>", "<image>", "<global-img>")
    for question in ("where is the red cube?", "What colour is pad 3", "señor \U0001f916, put it there"):
        content = [{"type": "image"}] * views + [{"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        text = theirs.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        expected = theirs(text.replace(word, repeated), add_special_tokens=False)["input_ids"]
        prompt = ours.question(question)
        assert prefix_ids(ours, views, 9, theirs.convert_tokens_to_ids(word)) + prompt == expected
        assert ours.decode(prompt).startswith(question)
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("family", ["smol", "qwen"])
def test_chat_tokenizer_round_trips(family, checkpoints):
    tokenizer = read_tokenizer(checkpoints[family])
    for text in ("blue pad at t3 , red cube at t5 r3", "a <image> <|im_end|> in words", "ä\n\U0001f916"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    typed = tokenizer.encode("say <end_of_utterance> <|im_end|>")
    assert tokenizer.end_reasoning not in typed  # nobody types control tokens
    reasoning = tokenizer.reasoning_ids("red cube at t5")
    assert reasoning[-1] == tokenizer.end_reasoning
    assert tokenizer.decode(reasoning) == "red cube at t5"
    assert tokenizer.reasoning_ids("") == [tokenizer.end_reasoning]
    assert tokenizer.question("<task> put it") == tokenizer.prompt("put it")
    assert tokenizer.answer("<task> put it", "there") == tokenizer.reasoning_ids("there")
    assert tokenizer.prompt("put it", reasoning=False) == tokenizer.question("put it")
    assert ChatTokenizer(tokenizer.dumps()).encode("the red cube") == tokenizer.encode("the red cube")
    for text, said in ((" ", "has 0 tokens"), ("why " * 3000, "tokens; write between 1 and 512")):
        with pytest.raises(UserError, match=said):
            tokenizer.question(text)


def test_an_unknown_chat_format_is_named(checkpoints):
    text = (checkpoints["smol"] / "tokenizer.json").read_text().replace("end_of_utterance", "end_of_story")
    with pytest.raises(UserError, match="CHAT_FORMATS"):
        ChatTokenizer(text)


@pytest.mark.parametrize("size", [32, 512])
def test_pictures_are_prepared_like_the_reference(root, checkpoints, size):
    """Half a grey level for the rounding that we leave out, more where Pillow clips between its two steps.

    Pictures of low contrast are never clipped.
    """
    tower = build(checkpoints["smol"]).vlm.vision
    tower.size = size
    for picture in real_pictures(root)[: 1 if size == 512 else None]:
        for pixels, most in ((picture, 40), (picture // 2 + 64, 1.6)):
            theirs = smol_processor(size)([Image.fromarray(pixels)], return_tensors="pt")["pixel_values"][
                0, 0
            ]
            ours = tower.resize(torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1)[0]
            error = (ours - theirs).abs() * 127.5
            assert ours.shape == theirs.shape
            assert error.mean() < (1 if most > 2 else 0.5)
            assert error.max() < most


# -- parity with transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["smol", "tied"])
@pytest.mark.parametrize("views", [1, 2])
def test_logits_and_gradients_equal_transformers_in_fp64(checkpoints, root, fp64_reference, family, views):
    folder = checkpoints[family]
    policy = build(folder).double()
    vlm = policy.vlm
    assert isinstance(vlm, SmolVLM)
    theirs = transformers.SmolVLMForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    )
    images = two_scenes(root, 48, views)  # (2, views, 48, 48, 3)
    rows = []  # of different length: the second is padded
    for question, answer in (("where is the red cube?", "on the blue pad"), ("put it on pad 3, then", "no")):
        rows.append([(policy.tokenizer.question(question), policy.tokenizer.answer(question, answer))])
    batch = batch_of(rows)
    visual = vlm.encode_images(images)
    text, *_ = vlm(visual, batch["tokens"], batch["segments"], batch["positions"], False)
    ours = vlm.lm.logits(text)  # (2, T, vocab)
    assert ours.dtype == torch.float64

    head = prefix_ids(policy.tokenizer, views, visual.tokens.shape[2], SMOL_TOKENS.index("<image>"))
    ids = torch.cat((torch.tensor([head, head]), batch["tokens"]), dim=1)
    there = batch["segments"] >= 0
    mask = torch.cat((torch.ones(2, len(head), dtype=torch.int64), there.long()), dim=1)
    pixels = prepared(vlm, images)
    reference = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, len(head) :]
    assert not there.all()
    assert (ours - reference)[there].abs().max() < 1e-9

    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator) * there[..., None]
    (ours * weights).sum().backward()
    (reference * weights).sum().backward()
    compare_gradients(vlm, theirs)


def prepared(vlm, images):
    """Images (B, V, h, w, 3) uint8 as transformers takes them, (B, V, 3, size, size), by our own resizing."""
    x = images.flatten(0, 1).permute(0, 3, 1, 2).double() / 127.5 - 1
    x = vlm.vision.resize(x)
    return x.view(*images.shape[:2], *x.shape[1:])


def compare_gradients(vlm, theirs):
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    text = "model.text_model."
    tower = "model.vision_model."
    attention = [f"layers.0.self_attn.{part}_proj" for part in "qkv"]
    lm, vision = vlm.lm, vlm.vision
    for ours, names in (
        (lm.embed.weight, [text + "embed_tokens.weight"]),
        (lm.blocks[0].qkv.weight, [f"{text}{part}.weight" for part in attention]),
        (lm.blocks[1].gate.weight, [text + "layers.1.mlp.gate_proj.weight"]),
        (lm.blocks[1].up.weight, [text + "layers.1.mlp.up_proj.weight"]),
        (lm.blocks[0].norm2.weight, [text + "layers.0.post_attention_layernorm.weight"]),
        (vision.connector.weight, ["model.connector.modality_projection.proj.weight"]),
        (vision.blocks[0].self_attn.in_proj_bias, [f"{tower}encoder.{part}.bias" for part in attention]),
        (vision.blocks[1].linear1.weight, [tower + "encoder.layers.1.mlp.fc1.weight"]),
        (vision.patch.weight, [tower + "embeddings.patch_embedding.weight"]),
        (vision.position, [tower + "embeddings.position_embedding.weight"]),
    ):
        expected = torch.cat([gradients[name] for name in names])
        size = expected.abs().max()
        assert size > 1e-3
        assert (ours.grad - expected).abs().max() < 1e-9 * max(1, size), names


@pytest.mark.parametrize("family", ["smol", "qwen"])
def test_greedy_answers_equal_transformers_generate(family, checkpoints, root, fp64_reference):
    """Our cached decoding of two padded rows and two pictures, against their generate() of each row alone."""
    folder = checkpoints[family]
    policy = build(folder).double()
    vlm, tokenizer = policy.vlm, policy.tokenizer
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    )
    questions = ["where is the red cube?", "put it"]
    images = two_scenes(root, 56)
    visual = vlm.encode_images(images)
    stop = policy.cfg.vocab_size - 1  # a token that nobody says
    got, _ = vlm.generate(visual, [tokenizer.question(q) for q in questions], stop, 8)
    image = theirs.config.image_token_id
    for row, question in enumerate(questions):
        prompt = tokenizer.question(question)
        ids = torch.tensor([prefix_ids(tokenizer, 2, visual.tokens.shape[2], image) + prompt])
        inputs = {"input_ids": ids}
        if family == "smol":
            inputs["pixel_values"] = prepared(vlm, images[row : row + 1])
        else:
            inputs |= vlm.processor(images=list(images[row].numpy()), return_tensors="pt")
            inputs["mm_token_type_ids"] = (ids == image).int()
        text = batch_of([[(prompt, [])]])
        with torch.no_grad():
            expected = theirs(**inputs).logits[:, -len(prompt) :]
            hidden, *_ = vlm(
                Visual(visual.tokens[row : row + 1]),
                text["tokens"],
                text["segments"],
                text["positions"],
                False,
            )
            ours = vlm.lm.logits(hidden)
        assert (ours - expected).abs().max() < 1e-9
        said = theirs.generate(**inputs, max_new_tokens=7, **NO_EOS)[0, ids.shape[1] :]
        assert got[row] == said.tolist()


@pytest.mark.parametrize("family", ["smol", "qwen"])
def test_cached_reasoning_and_queries_equal_a_full_forward(family, checkpoints, root):
    policy = build(checkpoints[family]).double()
    vlm, tokenizer = policy.vlm, policy.tokenizer
    stop = tokenizer.end_reasoning
    prompts = [tokenizer.prompt(TASK), tokenizer.prompt("put it")]
    visual = vlm.encode_images(two_scenes(root, 56))
    said, query_states = vlm.generate(visual, prompts, stop, 6, with_queries=True)
    rows = batch_of([[(prompt, ids + [stop])] for prompt, ids in zip(prompts, said)])
    _, full, _ = vlm(visual, rows["tokens"], rows["segments"], rows["positions"], True)
    assert (query_states - full).abs().max() < 1e-5  # their rotary tables and norms are in fp32

    # questions packed behind one picture do not see each other
    packed = batch_of([[(prompts[0], [5]), (prompts[1], [6, 7])]])
    alone = batch_of([[(prompts[1], [6, 7])]])
    hidden = []
    for batch in (packed, alone):
        text = [batch[name] for name in ("tokens", "segments", "positions")]
        out, *_ = vlm(Visual(visual.tokens[:1]), *text, False)
        hidden.append(out[:, -len(prompts[1]) - 2 :])
    assert (hidden[0] - hidden[1]).abs().max() < 1e-5


def test_the_wrapper_and_the_native_model_agree(checkpoints, root):
    """SmolVLM through the wrapper: the same hidden states from two implementations of everything."""
    folder = checkpoints["smol"]
    policy = build(folder)
    native = policy.vlm
    wrapped = WrappedVLM(policy.cfg, policy.tokenizer, folder, pretrained=True).eval()
    wrapped.queries.data = native.queries.data.clone()
    images = (
        torch.from_numpy(np.stack([real_pictures(root, 48)[:2]])) // 2 + 64
    )  # low contrast: never clipped
    rows = batch_of([[(policy.tokenizer.prompt("put the red cube"), [5])]])
    out = []
    for vlm in (native, wrapped):
        visual = vlm.encode_images(images)
        out.append(vlm(visual, rows["tokens"], rows["segments"], rows["positions"], True)[:2])
    for ours, theirs in zip(*out):
        assert (ours - theirs).abs().max() < 1e-2 * ours.abs().max()  # half a grey level here and there


# -- what users get wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("package, changes", [("tokenizers", {}), ("peft", {"lora": 4})])
def test_missing_packages_are_named(package, changes, checkpoints, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        build(checkpoints["smol"], **changes)


def test_a_wrapped_model_needs_transformers(checkpoints, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    build(checkpoints["smol"])  # runs without
    with pytest.raises(UserError, match="pip install transformers"):
        build(checkpoints["qwen"])


@pytest.mark.parametrize("error", [ConnectionError("no route to host"), OSError("no space left on device")])
def test_a_failed_download_is_answered(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="cannot download nobody/nothing"):
        backbones.fetch_backbone("nobody/nothing", weights=True)


def test_a_language_model_without_pictures_is_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["smol"], tmp_path / "text")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 48}))
    with pytest.raises(UserError, match="no vision-language model"):
        build(folder)


def test_wrong_use_is_answered_in_one_line(checkpoints, data, tmp_path, fails):
    nowhere = arguments(data, tmp_path / "x", "no such//name")
    assert "cannot download" in fails(train.main, nowhere)
    assert "without --backbone" in fails(train.main, ["--config", "debug", "--lora=4"])


# -- training -----------------------------------------------------------------------------------------------


def arguments(data, out, folder, *flags):
    words = ["--config", "debug", f"--data={data}", f"--out={out}", "--device=cpu", "--threads=1"]
    words += [f"--backbone={folder}", "--ground_steps=0", "--mix=0.5"]
    return [*words, "--backbone_lr=1e-3", "--adam_lr=1e-3", *flags]


RUNS = {
    "smol": ("smol", []),
    "smol LoRA": ("smol", ["--lora=2", "--freeze_vision", "--checkpointing"]),
    "qwen LoRA": ("qwen", ["--lora=2", "--freeze_vision", "--checkpointing"]),
}


@pytest.fixture(scope="module", params=RUNS, ids=RUNS)
def finished(request, checkpoints, data, tmp_path_factory):
    """Family, flags and folder of a run of 20 steps."""
    family, flags = RUNS[request.param]
    if flags:
        pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("run") / family
    train.main(arguments(data, out, checkpoints[family], "--steps=20", *flags))
    return family, flags, out


def learns_with_lora(name):
    """Do --lora and --freeze_vision leave this parameter to learn?"""
    return "lora_" in name or "connector" in name or name.endswith("queries")


def test_a_run_learns_what_is_not_frozen(finished, checkpoints):
    family, flags, out = finished
    lines = read_log(out / "log.jsonl")
    assert lines[-1]["text"] < lines[0]["text"]
    assert lines[-1]["step"] == 20
    before = dict(build(checkpoints[family], lora=2 if flags else 0).vlm.named_parameters())
    learnt = set()
    for name, p in load_policy(out).vlm.named_parameters():
        if not torch.equal(p, before[name]):
            learnt.add(name)
    if flags:
        assert learnt and all(learns_with_lora(name) for name in learnt)
    else:
        assert learnt == before.keys()


def test_a_run_folder_is_enough_to_act_and_answer(finished, monkeypatch, tmp_path, capsys):
    _, _, out = finished
    monkeypatch.setattr(backbones, "fetch_backbone", None)
    moved = shutil.copytree(out, tmp_path / "moved")
    policy = load_policy(moved)
    images = np.zeros((1, 2, 32, 32, 3), np.uint8)
    chunk, (reasoning,) = policy.act(images, np.zeros((1, 6), np.float32), [TASK])
    assert np.isfinite(chunk).all()
    assert isinstance(reasoning, str)
    assert isinstance(policy.answer(images, ["which pad is blue"])[0], str)


def test_a_question_about_a_picture(finished, tmp_path, capsys):
    import sample

    _, _, out = finished
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "x.png")
    sample.main([f"--run={out}", "--ask", "what is it?", f"--image={tmp_path / 'x.png'}"])
    assert "what is it?" in capsys.readouterr().out


def test_a_run_in_two_pieces_ends_in_the_same_bits(finished, checkpoints, data, tmp_path, monkeypatch):
    family, flags, out = finished
    monkeypatch.setitem(PRESETS["debug"], "save_every", 10)
    words = arguments(data, tmp_path / "cut", checkpoints[family], "--steps=20", *flags)
    train_step = train.train_step

    def dies(run, step, micro):
        if step == 15:
            raise KeyboardInterrupt
        return train_step(run, step, micro)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_step", dies)
        train.main(words)
    state = torch.load(tmp_path / "cut" / "train_state.pt", weights_only=True)
    assert state["step"] == 10
    if flags:  # frozen weights are not kept a second time
        assert all(learns_with_lora(name) for name in state["model"] if name.startswith("vlm."))
    train.main([*words, "--resume"])
    whole, cut = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("family, flags", [("smol", []), ("qwen", ["--lora=2", "--freeze_vision"])])
def test_rl_keeps_the_backbone_and_resumes_to_the_same_bits(
    family, flags, checkpoints, data, tmp_path, monkeypatch
):
    """rl.py on a pretrained VLM: retrieval from its demonstrations, rollouts in the simulation, updates of
    adapter and expert, saved and resumed.
    """
    import rl

    if flags:
        pytest.importorskip("peft")
    start = tmp_path / "start"
    train.main(arguments(data, start, checkpoints[family], "--steps=2", *flags))
    monkeypatch.setattr(backbones, "fetch_backbone", None)  # the run folder is enough

    def practise(name, *words):
        more = ["--config", "debug", "--anchor=0.1", "--eval_episodes=0", "--device=cpu", "--threads=1"]
        rl.main([*more, f"--init_from={start}", f"--data={data}", f"--out={tmp_path / name}", *words])

    update = rl.update

    def dies(*args):
        if args[-1] == 1:  # the second iteration
            raise KeyboardInterrupt
        return update(*args)

    practise("whole")
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
        patch.setattr(rl, "update", dies)
        practise("cut")
    practise("cut", "--resume")
    before, whole, cut = (
        load_file(tmp_path / name / "model.safetensors") for name in ("start", "whole", "cut")
    )
    assert before.keys() == whole.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], whole[name])}
    assert moved == {"adapter", "expert"}
    chunk, _ = load_policy(tmp_path / "whole").act(
        np.zeros((1, 2, 32, 32, 3), np.uint8), np.zeros((1, 6), np.float32), [TASK]
    )
    assert np.isfinite(chunk).all()
    assert [line["iteration"] for line in read_log(tmp_path / "whole" / "log.jsonl")] == [1, 2]


def test_backbone_and_the_rest_have_their_own_rates(checkpoints, data):
    cfg = config(checkpoints["smol"], data=str(data))
    assert cfg.image_size == 32 and cfg.width == 48
    run = train.build(cfg, CPU)
    (optimizer,) = run.optimizers
    rates = {}
    for group in optimizer.param_groups:
        rates |= dict.fromkeys(group["params"], group["peak"])
    for name, p in run.policy.named_parameters():
        is_backbone = name.startswith("vlm.") and name != "vlm.queries"
        assert rates[p] == (1e-4 if is_backbone else 2e-4), name


@pytest.mark.parametrize("family", ["smol", "qwen"])
def test_checkpointing_in_training_and_caches_in_evaluation(family, checkpoints, data):
    cfg = config(checkpoints[family], data=str(data), freeze_vision=True, checkpointing=True)
    run = train.build(cfg, CPU)
    policy = run.policy
    if family == "smol":
        tower, block = policy.vlm.vision.blocks[0].linear1, policy.vlm.lm.blocks[1].qkv
    else:
        tower, block = policy.vlm.model.visual.blocks[0].mlp, policy.vlm.lm.text.layers[1].mlp
    runs = Counter()
    # before and not behind: the second run stops as soon as it has what the backward pass needs
    block.register_forward_pre_hook(lambda *_: runs.update(["language"]))
    tower.register_forward_pre_hook(lambda *_: runs.update(["vision"]))
    _, action_batch = train.batches(run, 0)[0][-1]
    losses = policy(action_batch)
    (losses["text"] + losses["action"]).backward()
    assert runs == {"language": 2, "vision": 1}  # the frozen tower needs no backward pass
    images = np.zeros((1, 2, 32, 32, 3), np.uint8)
    with train.averaged_weights(policy, run.ema):
        inside = policy.answer(images, ["which pad is blue"])
    assert policy.training
    assert inside == policy.eval().answer(images, ["which pad is blue"])


def test_frozen_matrices_are_cast(checkpoints):
    policy = build(checkpoints["smol"])
    policy.vlm.freeze_vision()
    backbones.cast_frozen_to_bf16(policy)
    types = {name: p.dtype for name, p in policy.named_parameters()}
    assert types["vlm.vision.blocks.0.self_attn.in_proj_weight"] == torch.bfloat16
    assert types["vlm.vision.blocks.0.norm1.weight"] == torch.float32
    assert types["vlm.vision.connector.weight"] == types["expert.state_in.weight"] == torch.float32


# -- predicted memory and work ------------------------------------------------------------------------------


def predict(cfg, rows, bf16=False):
    return backbones.predict(cfg, rows, bf16, train.freeze, train.make_optimizers)


def test_the_meter_counts_living_bytes():
    with backbones.Meter() as meter:
        x = torch.zeros(1000)
        view = x[10:]
        view += 1
        assert meter.bytes == 4000
        y = x * 2
        assert meter.bytes == 8000
        del y
        assert meter.bytes == 4000
        torch.ones(3, 5) @ torch.ones(5, 7)
    assert meter.peak == 8000
    assert meter.flops == 2 * 3 * 5 * 7
    with backbones.Meter() as meter:
        x = torch.ones(1, 2, 16, 8)  # (batch, heads, tokens, head dim)
        scaled_dot_product_attention(x, x, x)
    assert meter.flops == 2 * 2 * 2 * 16 * 16 * 8


@pytest.mark.parametrize("family", ["smol", "qwen"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_prediction_is_what_a_real_step_takes(family, bf16, checkpoints, data):
    """The same counts from real tensors."""
    cfg = config(checkpoints[family], data=str(data), freeze_vision=family == "qwen")
    _, held, predicted = predict(cfg, 4, bf16)
    policy = train.build(cfg, CPU).policy
    if bf16:
        backbones.cast_frozen_to_bf16(policy)
    batch = backbones.longest_batch(cfg, 4)
    trained = [p for p in policy.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    own = sum(p.numel() * p.element_size() for p in policy.parameters())
    states = 3 * 4 * sum(p.numel() for p in trained)  # a gradient and AdamW's two moments
    assert held == pytest.approx(own + states, rel=0.01)
    with backbones.Meter() as meter:
        meter.count([*policy.parameters(), *(p.grad for p in trained)])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = policy(batch)
        (losses["text"] + losses["action"]).backward()
    activations = meter.peak - (own + states / 3)
    assert predicted.peak - held == pytest.approx(activations, rel=0.02)
    assert predicted.flops == meter.flops


@pytest.mark.parametrize("flags", [{}, {"freeze_vision": True}, {"checkpointing": True}], ids=str)
def test_predicted_activations_are_what_autograd_keeps(checkpoints, data, flags):
    """bf16 autocast on the CPU; storages that autograd holds on to, weights and inputs left out."""
    cfg = config(checkpoints["smol"], data=str(data), **flags)
    _, held, predicted = predict(cfg, 8, bf16=True)
    policy = train.build(cfg, CPU).policy
    batch = backbones.longest_batch(cfg, 8)
    own = [*policy.parameters(), *policy.buffers(), *batch.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        losses = policy(batch)
    assert losses["action"].requires_grad
    found = sum(size for size, _ in kept.values())
    # above what is kept: the operation that runs; with checkpointing also the block that is computed again
    assert 1 < (predicted.peak - held) / found < (4 if cfg.checkpointing else 1.6)


def test_checkpointing_lora_and_small_batches_need_less(checkpoints, data):
    pytest.importorskip("peft")
    peaks = []
    flags = {}
    for more in ({}, {"checkpointing": True}, {"lora": 2, "freeze_vision": True}):
        flags |= more
        cfg = config(checkpoints["smol"], data=str(data), **flags)
        peaks.append(predict(cfg, 8)[2].peak)
    peaks.append(predict(cfg, 2)[2].peak)
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4


@pytest.mark.parametrize("family", ["smol", "qwen"])
def test_work_is_what_torch_counts(family, checkpoints, data, monkeypatch):
    """Its own counter knows neither attention on the CPU nor nested gradients."""
    monkeypatch.setattr(backbones, "FLOPS", flop_registry)
    cfg = config(checkpoints[family], data=str(data), decouple="off")
    _, _, predicted = predict(cfg, 2)
    policy = train.build(cfg, CPU).policy
    with FlopCounterMode(display=False) as counter:
        losses = policy(backbones.longest_batch(cfg, 2))
        (losses["text"] + losses["action"]).backward()
    assert predicted.flops == counter.get_total_flops()


@pytest.mark.parametrize(
    "size, said", [(30 * 2**20, "add --accumulate"), (2**10, "choose a smaller backbone")]
)
def test_too_little_memory_stops_with_a_way_out(checkpoints, data, tmp_path, fails, monkeypatch, size, said):
    pytest.importorskip("peft")
    monkeypatch.setattr(backbones, "available_memory", lambda device: size)
    words = arguments(data, tmp_path / "x", checkpoints["smol"], "--batch_size=64")
    assert said in fails(train.main, words)
    assert not (tmp_path / "x").exists()
    train.main([*words, "--plan"])  # a plan only tells


# Shapes of the published config.json files.
PUBLISHED = {
    "base256": dict(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
    ),
    "base": dict(
        hidden_size=960,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        intermediate_size=2560,
    ),
}


@pytest.mark.parametrize("preset, parameters", [("base256", 256_484_928), ("base", 507_482_304)])
def test_presets_have_the_published_sizes(preset, parameters, checkpoints, tmp_path, capsys):
    text = dict(vocab_size=49280, rms_norm_eps=1e-5, rope_theta=100000.0) | PUBLISHED[preset]
    vision = dict(hidden_size=768, num_attention_heads=12, image_size=512, patch_size=16)
    whole = dict(model_type="smolvlm", scale_factor=4, text_config=text, vision_config=vision)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    shutil.copy(checkpoints["smol"] / "tokenizer.json", tmp_path)
    train.main(["--config", preset, f"--backbone={tmp_path}", "--plan", "--device=cpu"])
    said = capsys.readouterr().out
    assert "predicted peak memory" in said
    assert "TFLOP a sample" in said
    cfg = config(tmp_path)
    with torch.device("meta"):
        _, vlm = load_backbone(cfg, tmp_path, tmp_path / "tokenizer.json", pretrained=False)
    assert sum(p.numel() for name, p in vlm.named_parameters() if name != "queries") == parameters


def test_presets_name_options_that_exist():
    known = {field.name for field in dataclasses.fields(train.TrainConfig)}
    for preset in backbones.PRESETS.values():
        assert preset.keys() <= known


def test_a_checkpoint_describes_its_backbone(checkpoints, tmp_path):
    for family in ("smol", "qwen"):
        vlm = build(checkpoints[family]).vlm
        vlm.save_description(tmp_path / family)
        written = read_json(tmp_path / family / "config.json")
        assert written == read_json(checkpoints[family] / "config.json")
        vlm.folder = tmp_path / family
        vlm.save_description(tmp_path / family)  # onto itself
        assert written == read_json(tmp_path / family / "config.json")
