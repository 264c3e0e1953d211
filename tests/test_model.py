"""Tests of model.py: shapes, masks, attention, generation, flow matching, intention decoupling, sampler,
statistics.
"""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS, debug_config
from safetensors.torch import load_file, save_file

from benchmarks.ship import ShipConfig, ship
from common import UserError, parse_config, write_json
from data import Tokenizer, pack, statistics
from model import (
    PRESETS,
    SHIPPED,
    UNPACKED,
    VLM,
    Config,
    LanguageBlock,
    SyVLA,
    Visual,
    attend,
    checkpoint_folder,
    expected,
    load_policy,
    mean_place,
    pixel_shuffle,
    read_checkpoint_config,
    recent_words,
    rope,
    rotation,
    save_policy,
    unit_scale,
)
from sim_env import SO100Env
from train import make_bf16_copy


def pictures(policy, n, seed=0):
    cfg = policy.cfg
    return torch.randint(
        0,
        256,
        (n, len(cfg.camera_names), cfg.image_size, cfg.image_size, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )


def packed(rows):
    return {k: torch.from_numpy(v) for k, v in pack(rows).items()}


def flow_inputs(policy, n, seed=0):
    """states, and the other arguments of flow_loss: state, actions, valid, eps, t."""
    cfg, g = policy.cfg, torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(policy.vlm.queries.dtype)

    H, A, M = cfg.chunk_size, cfg.action_dim, cfg.noise_samples
    t = torch.rand(n, M, generator=g).to(policy.vlm.queries.dtype)
    return (
        draw(n, cfg.queries, cfg.width),
        draw(n, A),
        draw(n, H, A),
        torch.ones(n, H, dtype=torch.bool),
        draw(n, M, H, A),
        t,
    )


def action_batch(policy, n, seed=0):
    """What data.Episodes.batch hands to SyVLA.forward."""
    cfg, g = policy.cfg, torch.Generator().manual_seed(seed)
    rows = [[([1, 270 + i, 271, 2], [265, 266, 3])] for i in range(n)]
    _, _, _, valid, eps, t = flow_inputs(policy, n, seed)
    return packed(rows) | {
        "images": pictures(policy, n, seed),
        "state": 50 * torch.randn(n, cfg.action_dim, generator=g),
        "valid": valid,
        "eps": eps,
        "actions": 50 * torch.randn(n, cfg.chunk_size, cfg.action_dim, generator=g),
        "t": t,
        "uniform": torch.rand(n, cfg.queries, generator=g),
    }


@pytest.mark.parametrize(
    "argv",
    [
        ["--heads=5"],
        ["--kv_heads=3"],
        ["--n_action_steps=9"],
        ["--n_action_steps=0"],
        ["--decouple=none"],
        ["--decouple_percentile=100"],
        ["--patch_size=0"],
        ["--heads=0"],
        ["--denoise_steps=0"],
        ["--temperature=-1"],
        ["--patch_size=5"],
        ["--pixel_shuffle=5"],
        ["--lora=4"],
    ],
)
def test_impossible_models_are_refused_before_anything_runs(fails, argv):
    assert argv[0][2:].split("=")[0] in fails(lambda a: parse_config(Config, PRESETS, a), argv)


# -- vision and language ------------------------------------------------------------------------------------


def test_shapes_of_every_part(make_policy):
    policy = make_policy()
    cfg, n = policy.cfg, 3
    visual = policy.vlm.encode_images(pictures(policy, n))
    assert visual.tokens.shape == (n, len(cfg.camera_names), (32 // 8 // 2) ** 2, cfg.width)
    text = packed([[([1, 300], [3])]] * n)
    hidden, states, _ = policy.vlm(visual, text["tokens"], text["segments"], text["positions"], True)
    assert hidden.shape == (n, 3, cfg.width) and states.shape == (n, cfg.queries, cfg.width)
    assert policy.vlm.lm.logits(hidden).shape == (n, 3, cfg.vocab_size)
    inputs = flow_inputs(policy, n)
    assert policy.flow_loss(*inputs).shape == (n, cfg.noise_samples)
    assert policy.gradient_norms(*inputs).shape == (n, cfg.queries)
    assert policy.keep_mask(*inputs, torch.rand(n, cfg.queries)).shape == (n, cfg.queries)
    chunk, reasonings = policy.act(
        pictures(policy, n), torch.zeros(n, cfg.action_dim), ["put the red cube"] * n
    )
    assert (
        chunk.shape == (n, cfg.chunk_size, cfg.action_dim)
        and chunk.dtype == np.float32
        and len(reasonings) == n
    )
    assert sum(policy.parameter_table().values()) == sum(p.numel() for p in policy.parameters())


def test_see_maps_bytes_to_minus_one_to_one_per_view(make_policy):
    policy = make_policy()
    images = pictures(policy, 2)
    expected = torch.stack(
        [policy.vlm.vision((images[:, v].permute(0, 3, 1, 2).float() / 255) * 2 - 1)[0] for v in range(2)],
        dim=1,
    )
    assert torch.allclose(policy.vlm.encode_images(images).tokens, expected, atol=1e-4)


def test_pixel_shuffle_gathers_square_neighbourhoods():
    patches = torch.randn(1, 6 * 6, 16)
    x = pixel_shuffle(patches, 2)
    assert x.shape == (1, 9, 64)
    for row in range(3):
        for column in range(3):
            four = [patches[0, (2 * row + i) * 6 + 2 * column + j] for i in (0, 1) for j in (0, 1)]
            assert torch.equal(x[0, 3 * row + column], torch.cat(four))


@pytest.mark.parametrize("patch", [4, 6, 8])
def test_convolution_stem_makes_the_same_grid_of_patches_and_sees_what_is_there(make_policy, patch):
    cfg = debug_config(patch_size=patch, image_size=8 * patch, pixel_shuffle=1)
    encoder = SyVLA(cfg, make_policy().tokenizer).vlm.vision  # freshly initialised
    assert encoder.patch(torch.zeros(2, 3, cfg.image_size, cfg.image_size)).shape == (
        2,
        cfg.vision_width,
        8,
        8,
    )
    grey = encoder.patch(torch.full((1, 3, cfg.image_size, cfg.image_size), 0.7))[0]
    assert grey[:, 2:-2, 2:-2].abs().max() < 1e-5  # an even surface is nothing, away from the border
    x = torch.zeros(1, 3, cfg.image_size, cfg.image_size)
    x[:, 0, 5 * patch + patch // 2, 2 * patch + patch // 2] = 1  # one red pixel in the middle of patch (5, 2)
    where = {(row, column) for row, column in encoder.patch(x)[0].abs().amax(0).nonzero().tolist()}
    assert (5, 2) in where and where <= {(row, column) for row in (4, 5, 6) for column in (1, 2, 3)}


def test_mask_rule():
    #                        images | question 1 | question 2 | padding | queries of segment 1
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, -1, 1, 1]])
    seen = VLM.attention_mask(segments)[0]
    for i, mine in enumerate(segments[0].tolist()):
        for j, other in enumerate(segments[0].tolist()):
            allowed = j == i or (j < i and other >= 0 and (other == 0 or other == mine))
            assert seen[i, j] == allowed, (i, j)
    assert seen.any(-1).all()  # an empty softmax would be NaN


@pytest.mark.parametrize("qk_norm", [True, False])
def test_language_block_against_plain_loops(qk_norm):
    """Grouped-query attention with rotary embedding as complex rotation, in fp64, one head and token at a
    time.
    """
    torch.manual_seed(0)
    cfg = debug_config(qk_norm=qk_norm)
    block = LanguageBlock(cfg).double()
    for p in block.parameters():
        p.data = torch.randn_like(p) * 0.3
    n, D, hd, nh, nkv = 5, cfg.width, cfg.width // cfg.heads, cfg.heads, cfg.kv_heads
    x, positions = torch.randn(1, n, D, dtype=torch.float64), [0, 1, 4, 5, 9]
    frequency = torch.tensor([cfg.rope_theta ** (-2 * i / hd) for i in range(hd // 2)], dtype=torch.float64)
    angle = torch.tensor(positions, dtype=torch.float64)[:, None] * frequency
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[4, 1] = False
    got = block(x, *rotation(torch.tensor([[positions]]), frequency), mask[None, None])[0]

    def rms(v):
        return v / (v.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt()

    def turn(v, i):
        return (lambda z: torch.cat((z.real, z.imag)))(
            torch.complex(v[: hd // 2], v[hd // 2 :]) * torch.polar(torch.ones_like(angle[i]), angle[i])
        )

    heads = (block.qkv.weight @ (rms(x[0]) * block.norm1.weight).T).T.view(n, nh + 2 * nkv, hd)

    def key_or_query(i, head):
        v = heads[i, head]
        return turn(rms(v) * block.qk_gain[head, 0] if qk_norm else v, i)

    mixed = torch.zeros(n, D, dtype=torch.float64)
    for i in range(n):
        for h in range(nh):
            group = h // (nh // nkv)  # neighbouring query heads share one key/value head
            seen = [j for j in range(n) if mask[i, j]]
            weights = torch.stack(
                [key_or_query(i, h) @ key_or_query(j, nh + group) / math.sqrt(hd) for j in seen]
            ).softmax(0)
            mixed[i, h * hd : (h + 1) * hd] = sum(
                w * heads[j, nh + nkv + group] for w, j in zip(weights, seen)
            )
    y = x[0] + mixed @ block.proj.weight.T
    gate, up = (rms(y) * block.norm2.weight @ w.weight.T for w in (block.gate, block.up))
    expected = y + (gate / (1 + (-gate).exp()) * up) @ block.down.weight.T
    assert torch.allclose(got, expected, atol=1e-10)


def test_rms_normalisation_and_its_gradient_are_those_of_torch():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64).transpose(0, 1).requires_grad_()
    torch.autograd.gradcheck(lambda x: unit_scale(x, 1e-2), x)
    y = unit_scale(x, 1e-2)
    assert torch.allclose(y, F.rms_norm(x, (8,), eps=1e-2), rtol=1e-12)
    rounded = unit_scale(x.bfloat16(), 1e-2)
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.double(), y, atol=0.02)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_bf16_steps_equals_torch_in_fp32(masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 5, 5).tril().bool() if masked else None
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, mask), wanted, rtol=0, atol=0)
    got = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=0.03)


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)

    def at(v, position):
        return rope(v, *rotation(torch.tensor([position]), frequency))

    def score(i, j):
        return (at(q, i) * at(k, j)).sum()

    assert torch.allclose(score(7, 3), score(104, 100)) and not torch.allclose(score(7, 3), score(8, 3))
    assert torch.allclose(at(q, 5).norm(), q.norm())


QUESTIONS = [
    ([4, 300, 301, 5], [302, 6]),
    ([4, 303, 5], [304, 305, 306, 6]),
    ([4, 307, 308, 309, 5], [310, 6]),
]


def test_packed_questions_equal_each_question_alone(make_policy):
    policy = make_policy()
    visual = policy.vlm.encode_images(pictures(policy, 1))
    together = packed([QUESTIONS])
    hidden, *_ = policy.vlm(visual, together["tokens"], together["segments"], together["positions"], False)
    alone = []
    for question in QUESTIONS:
        one = packed([[question]])
        alone.append(policy.vlm(visual, one["tokens"], one["segments"], one["positions"], False)[0])
    assert torch.allclose(hidden, torch.cat(alone, dim=1), atol=1e-5)
    assert torch.allclose(
        policy.vlm.lm.logits(hidden), policy.vlm.lm.logits(torch.cat(alone, dim=1)), atol=1e-4
    )


def test_a_question_never_sees_its_neighbours(make_policy):
    policy = make_policy()
    visual = policy.vlm.encode_images(pictures(policy, 1))

    def run(rows):
        return policy.vlm(visual, *(packed([rows])[k] for k in ("tokens", "segments", "positions")), False)[0]

    before = run(QUESTIONS)
    changed = run([([4, 311, 312, 5], [313, 6]), *QUESTIONS[1:]])
    assert torch.equal(changed[:, 6:], before[:, 6:]) and not torch.allclose(changed[:, :6], before[:, :6])
    # and it does see the picture
    other = policy.vlm(
        policy.vlm.encode_images(pictures(policy, 1, seed=1)),
        *(packed([QUESTIONS])[k] for k in ("tokens", "segments", "positions")),
        False,
    )[0]
    assert ((other - before).abs().amax(-1) > 1e-3).all()


def test_padding_does_not_change_the_query_states(make_policy):
    policy = make_policy()
    visual = policy.vlm.encode_images(pictures(policy, 2))
    short, long = [([1, 300, 2], [301, 3])], [([1, 300, 302, 303, 304, 2], [305, 306, 3])]

    def states(visual, rows):
        return policy.vlm(visual, *(packed(rows)[k] for k in ("tokens", "segments", "positions")), True)[1]

    together = states(visual, [short, long])
    assert torch.allclose(together[:1], states(one_row(visual, 0), [short]), atol=1e-5)
    assert torch.allclose(together[1:], states(one_row(visual, 1), [long]), atol=1e-5)


def one_row(visual, i):
    return Visual(*(None if part is None else part[i : i + 1] for part in visual))


def greedy(policy, visual, prompt, n):
    """Greedy decoding of n words by a full forward pass per word."""
    written = []
    while len(written) < n:
        row = packed([[(prompt + written, [])]])
        hidden, *_ = policy.vlm(visual, row["tokens"], row["segments"], row["positions"], False)
        written.append(int(policy.vlm.lm.logits(hidden[:, -1]).argmax()))
    return written


@pytest.mark.parametrize("words", [WORDS, [" x0", " y0", *WORDS]], ids=["plain", "pointers"])
def test_cached_generation_equals_full_forward_passes(make_policy, words):
    policy = make_policy(seed=2, words=words, query_pointer=words is not WORDS)
    assert (policy.vlm.pointer is not None) == (words is not WORDS)
    visual = policy.vlm.encode_images(pictures(policy, 3))
    prompts, limit = [[1, 300, 2], [1, 301, 302, 303, 304, 2], [1, 305, 306, 2]], 7
    free = [greedy(policy, one_row(visual, i), p, limit - 1) for i, p in enumerate(prompts)]

    def cut(stop):
        return [w[: w.index(stop)] if stop in w else w for w in free]

    stop = free[1][2]  # a word from the middle of one row, so that rows end at different times
    wanted = cut(stop)
    assert {len(w) for w in wanted} == {2, limit - 1}
    written, states = policy.vlm.generate(visual, prompts, stop, limit, with_queries=True)
    assert written == wanted
    for i, (prompt, words) in enumerate(zip(prompts, written)):
        row = packed([[(prompt, words + [stop])]])  # at the limit the reasoning is closed, as in training
        full = policy.vlm(one_row(visual, i), row["tokens"], row["segments"], row["positions"], True)[1]
        assert torch.allclose(states[i : i + 1], full, atol=1e-5)


def test_a_draft_changes_how_soon_words_are_written_and_not_which(make_policy, monkeypatch):
    policy = make_policy(words=[" x0", " y0", *WORDS])
    visual = policy.vlm.encode_images(pictures(policy, 3))
    prompts = [[4, 313], [4, 314, 315, 5], [4]]
    words, _ = policy.vlm.generate(visual, prompts, 3, 8)  # 3, padding, is never said
    a, b, c = words
    assert len(a) == 7 and b[2] not in b[:2]
    lm, passes = policy.vlm.lm.forward, []
    monkeypatch.setattr(policy.vlm.lm, "forward", lambda *args: passes.append(0) or lm(*args))
    wrong = [*a[:3], 9, *a[4:]]
    longer = [8, 8, 8, *a[1:]]  # the second pass sees where it goes on
    for stop in (3, b[2]):  # all rows at the limit, or at different times
        plain, states = policy.vlm.generate(visual, prompts, stop, 8, with_queries=True)
        # a row's draft, and how many words have to be read alone
        for draft, alone in ((a, 0), (wrong, 1), (longer, 1), ([*a, stop, 9, 9], 0), ([7] * 40, None)):
            drafts = [[stop, *draft], [stop, *b], [stop, *c]]
            passes.clear()
            written, again = policy.vlm.generate(visual, prompts, stop, 8, with_queries=True, drafts=drafts)
            assert written == plain and torch.allclose(again, states, atol=1e-4)
            if stop == 3 and alone is not None:  # prompts, words, the end, queries
                assert len(passes) == 4 + alone
        assert policy.vlm.generate(visual, prompts, stop, 8, drafts=[[], [], []])[0] == plain


@pytest.mark.parametrize(
    "words, draft, ahead",
    [
        ([0, 5, 6], [0, 5, 6, 7, 8], [7, 8]),
        ([0, 5, 9], [0, 5, 6, 7, 8], [7, 8]),  # another word at the same place
        ([0, 5, 9, 9], [0, 5, 6, 7, 8], [8]),
        ([0, 9], [0, 5, 6], [6]),
        ([0, 9, 9, 9, 6, 7], [0, 5, 6, 7, 8], [8]),  # more words before it
        ([0, 6], [0, 6, 7, 0, 6, 8, 0, 5], [8]),  # the last text that begins so, up to its end
        ([0, 9], [0, 6, 7, 0, 6, 8, 0, 5, 4], [4]),  # like the last text
        ([0, 5, 6], [0, 5, 6, 7, 0, 4, 6, 8], [7]),  # two words are as in the first text, one as in the last
        ([0, 9, 9, 6], [0, 5, 4, 3, 7, 0, 8, 6, 1], [1]),  # the nearer counts more
        ([0, 5, 4, 6], [0, 5, 4, 3, 7, 0, 8, 6, 1], [7]),  # but not more than all others
        ([0, 5], [0, 5], []),
        ([0, 5], [], []),
    ],
)
def test_a_draft_goes_on_where_words_are_likest(words, draft, ahead):
    assert expected(words, np.array(draft)) == ahead


PLACES = [" cube", *(f"{axis}{i}" for axis in (" x", " y") for i in range(32))]
SCALES = [*(f" t{i}" for i in range(12)), *(f" r{i}" for i in range(8))]


def test_words_for_places_cover_the_picture():
    tokenizer = Tokenizer([" x0", " cube", " y31", " x16", " x", " xy1"])
    assert tokenizer.places == [(263, 0, -31 / 32), (265, 1, 31 / 32), (266, 0, 1 / 32)]


def test_the_pointer_sees_looks_and_not_places(make_policy):
    policy = make_policy(words=PLACES)
    patches = torch.randn(1, policy.cfg.vision_width, 6, 6)
    looks = policy.vlm.pointer.look(patches)  # (1, POINT_WIDTH, 6, 6)
    moved = policy.vlm.pointer.look(patches.roll(1, dims=3))
    # away from the border, whose neighbours did not all move along
    assert torch.allclose(moved[..., 1:-1, 2:-1], looks[..., 1:-1, 1:-2], atol=1e-5)
    # other views do not matter
    images = pictures(policy, 2)
    images[:, 1] = 0
    same = policy.vlm.encode_images(images).looks
    assert torch.equal(policy.vlm.encode_images(pictures(policy, 2)).looks, same)


def test_a_word_is_told_the_mean_place_and_look_that_attention_weighs(make_policy):
    policy = make_policy(words=PLACES)
    pointer = policy.vlm.pointer
    visual = policy.vlm.encode_images(pictures(policy, 2))
    recent = torch.randint(1, 264, (2, 5, 4))
    x, _ = policy.vlm.embed_words(recent, visual)
    for row in range(2):
        for i in range(5):
            query = pointer.query(pointer.words(recent[row, i]).flatten())
            score = visual.looks[row] @ query  # (m,)
            weights = score.exp() / score.exp().sum()
            column, line = (sum(w * place for w, place in zip(weights, pointer.grid[:, k])) for k in (0, 1))
            waves = []
            for place in (column, line):
                angles = [place * math.pi / 2 * 2**k for k in range(4)]
                waves += [torch.sin(a) for a in angles] + [torch.cos(a) for a in angles]
            look = sum(w * seen for w, seen in zip(weights, visual.looks[row]))
            found = pointer.out(torch.cat((torch.stack(waves), look)))
            expected = policy.vlm.lm.embed(recent[row, i, -1]) + found
            assert torch.allclose(x[row, i], expected, atol=1e-4)


def test_attention_is_taught_places_that_answers_name(make_policy):
    policy = make_policy(words=PLACES)
    pointer, ids = policy.vlm.pointer, policy.tokenizer.ids
    question = [4, ids[" cube"], 5]
    other = (question, [ids[" cube"], 6])
    # x19 lies on the third column of patches and a quarter of the way to the fourth
    rows = [[other, (question, [ids[" x19"], ids[" y12"], 6])], [other]]
    batch = {**packed(rows), "images": pictures(policy, 2)}
    visual = policy.vlm.encode_images(batch["images"])
    query = pointer.query(pointer.words(torch.tensor([0, *question])).flatten())
    log = (visual.looks[0] @ query).log_softmax(-1).view(4, 4)
    query = pointer.query(pointer.words(torch.tensor([*question, 0])).flatten())  # x19 is not to be read
    log = log + (visual.looks[0] @ query).log_softmax(-1).view(4, 4)  # both words point there
    column = (19.5 / 32) * 4 - 0.5  # in patches from the middle of the first
    line = (12.5 / 32) * 4 - 0.5
    error = 0.0
    for i, share_i in ((1, 2 - line), (2, line - 1)):
        for j, share_j in ((1, 2 - column), (2, column - 1)):
            error = error - share_i * share_j * log[i, j]
    loss, _ = policy.text_loss(batch, with_queries=False)
    hidden, *_ = policy.vlm(visual, *(batch[k] for k in ("tokens", "segments", "positions")), False)
    logits = policy.vlm.lm.logits(hidden).transpose(1, 2)  # (2, vocab, T)
    words = F.cross_entropy(logits, batch["labels"], ignore_index=-100, reduction="none").sum(1)
    count = (batch["labels"] >= 0).sum(1)
    expected = ((words + torch.stack([error, 0 * error])) / count).mean()
    assert torch.allclose(loss, expected, atol=1e-5)


def test_words_on_a_scale_are_as_likely_as_they_are_near_to_the_number_read_off(make_policy):
    policy = make_policy(words=PLACES + SCALES)
    pointer, ids = policy.vlm.pointer, policy.tokenizer.ids
    scales = [[ids[f" t{i}"] for i in range(12)], [ids[f" r{i}"] for i in range(8)]]
    assert policy.tokenizer.scales == scales
    logits, scores = torch.randn(4, policy.cfg.vocab_size), torch.randn(4, 16)
    logits[:3, sum(scales, [])] += 2  # a word on a scale is due
    logits[3, sum(scales, [])] -= 2  # and is not
    visual = policy.vlm.encode_images(pictures(policy, 2))
    rows = torch.tensor([1, 0, 1, 1])
    read = pointer.read(logits, scores, visual, rows)
    assert torch.equal(read[3], logits[3])
    for row in range(3):
        place = scores[row].softmax(0) @ pointer.grid
        place = pointer.look_closer(place[None], visual.windows, rows[row : row + 1])[0]
        numbers = pointer.numbers(4 * torch.cat((place, *visual.landmarks[rows[row]])))
        for k, (scale, middle) in enumerate(zip(scales, (5.5, 3.5))):
            far = (numbers[k] + middle - torch.arange(len(scale))).abs()
            near = (-pointer.sharpness[k].exp() * far).softmax(0)
            # that a word of the scale is due stays as likely as the language model says
            due = logits[row].softmax(0)[scale].sum()
            assert torch.allclose(read[row].softmax(0)[scale], due * near, atol=1e-5)
        others = [i for i in range(policy.cfg.vocab_size) if i not in sum(scales, [])]
        assert torch.equal(read[row, others], logits[row, others])


def test_the_pixels_about_a_place_correct_it(make_policy):
    policy = make_policy(words=PLACES + SCALES)
    pointer, px = policy.vlm.pointer, policy.cfg.image_size
    assert not SyVLA(policy.cfg, policy.tokenizer).vlm.pointer.closer[-1].weight.any()  # not at first
    windows = policy.vlm.encode_images(pictures(policy, 2)).windows
    rows = torch.tensor([1, 0, 1])
    pixels = torch.tensor([[17.25, 9.0], [16.75, 20.0], [0.25, px]])  # to the right and down
    place = (2 * pixels / px - 1).requires_grad_()
    closer = pointer.look_closer(place, windows, rows)
    half = pointer.window // 2
    picture = pictures(policy, 2)[:, 0].permute(0, 3, 1, 2) / 127.5 - 1
    padded = F.pad(picture, [half] * 4)
    for k, (row, (x, y)) in enumerate(zip(rows, [(17, 9), (17, 20), (0, px)])):
        window = padded[row, :, y : y + 2 * half, x : x + 2 * half]  # its middle is (x, y) of the picture
        right, down = pixels[k] - torch.tensor([x, y])
        moved = torch.zeros(2)
        for turns, beside in enumerate([(right, down), (down, -right), (-right, -down), (-down, right)]):
            seen = torch.cat((window.rot90(turns, (1, 2)).flatten(), torch.stack(beside)))
            says = pointer.closer(seen)
            for _ in range(turns):  # back to the right
                says = torch.stack((-says[1], says[0]))
            moved = moved + says
        assert torch.allclose(closer[k], 2 * (pixels[k] + moved) / px - 1, atol=1e-5)
    # attention learns as if nothing had been corrected
    closer.sum().backward()
    assert torch.equal(place.grad, torch.ones(3, 2))


def test_a_turned_picture_is_corrected_by_the_turned_step(make_policy):
    policy = make_policy(words=PLACES + SCALES)
    images = pictures(policy, 1)
    place = torch.tensor([[0.3, -0.22]])  # to the right and up
    turned_place = torch.tensor([[-0.22, -0.3]])  # up and to the left
    steps = []
    for turned, where in ((images, place), (images.rot90(dims=(2, 3)), turned_place)):
        windows = policy.vlm.encode_images(turned).windows
        steps.append(policy.vlm.pointer.look_closer(where, windows, torch.tensor([0])) - where)
    right, down = steps[0][0]
    assert min(abs(right), abs(down)) > 1e-3
    assert torch.allclose(steps[1][0], torch.stack((down, -right)), atol=1e-5)


def test_the_closer_look_trains_in_bf16(make_policy):
    policy = make_policy(words=PLACES + SCALES)
    rounded = make_bf16_copy(policy)
    place = torch.tensor([[0.3, -0.22], [-0.5, 0.61]])
    steps = []
    for model in (policy, rounded):
        windows = model.vlm.encode_images(pictures(policy, 1)).windows
        steps.append(model.vlm.pointer.look_closer(place, windows, torch.tensor([0, 0])) - place)
    assert steps[1].dtype == torch.float32  # bf16 would round places to half a pixel
    assert (steps[1] - steps[0]).abs().max() < 0.05 * steps[0].abs().max()


def test_the_last_place_that_is_said_joins_the_query_states(make_policy):
    policy = make_policy(words=PLACES + SCALES + [" pad", " at"])
    vlm, pointer, ids = policy.vlm, policy.vlm.pointer, policy.tokenizer.ids
    torch.nn.init.normal_(pointer.query[-1].weight)  # attention is even at first
    visual = vlm.encode_images(pictures(policy, 3))
    both = [1, 30, 2, *policy.tokenizer.encode("pad at t3 , cube at t5 r3")]
    pad = [1, 30, 2, *policy.tokenizer.encode("pad at t3 , cube in")]
    rows = [[(both, [3])], [(pad, [3]), ([4], [ids[" x3"]])], [([1, 30, 2], [3])]]  # a question is not ours
    row = packed(rows)
    text = [row[name] for name in ("tokens", "segments", "positions")]
    aim = pointer.aimed(*text, visual)[:, 0]  # (3, D)
    cube_at_t5 = [ids[" cube"], ids[" at"], 0]  # t5 is not to be read
    for i, words in enumerate((both[-5:-4] + cube_at_t5, [30, 2, ids[" pad"], ids[" at"]])):
        query = pointer.query(pointer.words(torch.tensor(words)).flatten())
        place = (visual.looks[i] @ query).softmax(0) @ pointer.grid
        place = pointer.look_closer(place[None], visual.windows, torch.tensor([i]))[0]
        expected = pointer.aim(4 * torch.cat((place, *visual.landmarks[i])))
        assert torch.allclose(aim[i], expected, atol=1e-4)
    assert not aim[2].any()  # no place is said
    states = vlm(visual, *text, True).queries
    for parameter in pointer.aim.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.allclose(states - aim[:, None], vlm(visual, *text, True).queries, atol=1e-5)


def test_words_written_one_by_one_give_the_same_aim(make_policy):
    policy = make_policy(words=PLACES + SCALES + [" pad", " at"])
    torch.nn.init.normal_(policy.vlm.pointer.query[-1].weight)
    visual = policy.vlm.encode_images(pictures(policy, 1))
    prompt = [1, 30, 2, *policy.tokenizer.encode("pad at t3 , cube")]
    row = packed([[(prompt, [3])]])
    whole = policy.vlm(visual, row["tokens"], row["segments"], row["positions"], True).queries
    _, states = policy.vlm.generate(visual, [prompt], 3, 1, with_queries=True)
    assert torch.allclose(states, whole, atol=1e-5)


def test_every_query_state_is_told_where_the_views_show_what_it_looks_for(make_policy):
    policy = make_policy(words=PLACES, query_pointer=True)
    vlm, pointer = policy.vlm, policy.vlm.query_pointer
    assert not SyVLA(policy.cfg, policy.tokenizer).vlm.query_pointer.query.weight.any()  # even at first
    torch.nn.init.normal_(pointer.query.weight, std=0.3)
    visual = vlm.encode_images(pictures(policy, 2))
    row = packed([[([1, 30, 2], [3])], [([1, 30, 31, 2], [3])]])
    told = vlm(visual, row["tokens"], row["segments"], row["positions"], True).queries
    vlm.query_pointer = None
    states = vlm(visual, row["tokens"], row["segments"], row["positions"], True).queries
    for i in range(2):
        for k in (0, len(vlm.queries) - 1):
            places = []
            for view, query in enumerate(pointer.query(states[i, k]).view(2, -1)):
                weights = (visual.views[i, view] @ query).exp()
                places.append((weights / weights.sum()) @ pointer.grid)
            expected = states[i, k] + pointer.out(4 * torch.cat(places))
            assert torch.allclose(told[i, k], expected, atol=1e-4)


def test_the_pointer_finds_things_where_training_never_showed_one(make_policy):
    policy = make_policy(words=PLACES).train()
    pointer, ids = policy.vlm.pointer, policy.tokenizer.ids
    rng = np.random.default_rng(0)

    def scenes(n, new):
        """Red squares of 6 pixels; new: in the quarter that training leaves out."""
        images = np.full((n, 2, 32, 32, 3), 128, np.uint8)
        corners = rng.integers(0, 27, (20 * n, 2))  # row, column
        left_out = (corners >= 14).all(1)
        corners = corners[left_out == new][:n]
        for image, (row, column) in zip(images, corners):
            image[0, row : row + 6, column : column + 6] = (200, 30, 30)
        return torch.from_numpy(images), corners + 3  # their middles

    question = [4, ids[" cube"], 5]
    optimizer = torch.optim.Adam(policy.vlm.parameters(), 3e-3)
    for _ in range(120):
        images, middles = scenes(32, new=False)
        rows = [[(question, [ids[f" x{column}"], ids[f" y{row}"]])] for row, column in middles]
        policy.text_loss({**packed(rows), "images": images}, with_queries=False)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    images, middles = scenes(50, new=True)
    with torch.no_grad():
        looks = policy.vlm.encode_images(images).looks
        recent = torch.tensor([0, *question]).expand(50, 1, -1)
        place = mean_place(pointer.scores(recent, looks), pointer.grid)[:, 0]  # (50, 2) x, y
    apart = (place + 1) * 16 - torch.from_numpy(middles).flip(1)  # pixels
    assert apart.norm(dim=1).median() < 3


def test_a_word_points_with_the_three_before_it_in_its_segment():
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1]])
    recent = recent_words(torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), positions)
    assert recent[0, :3].tolist() == [[0, 0, 0, 5], [0, 0, 5, 6], [0, 5, 6, 7]]
    assert recent[0, 3:].tolist() == [[5, 6, 7, 8], [6, 7, 8, 9], [0, 0, 0, 10], [0, 0, 10, 11]]


def test_without_reasoning_the_queries_follow_the_instruction(make_policy):
    policy = make_policy(reasoning=False)
    images = pictures(policy, 2)
    texts, states = policy.reason(images, ["put the red cube", "put the blue cube on the pad"])
    assert texts == ["", ""]
    rows = packed(
        [
            [(policy.tokenizer.prompt(t, False), [])]
            for t in ("put the red cube", "put the blue cube on the pad")
        ]
    )
    full = policy.vlm(
        policy.vlm.encode_images(images), rows["tokens"], rows["segments"], rows["positions"], True
    )[1]
    assert torch.allclose(states, full, atol=1e-5)


def test_given_reasoning_is_followed_as_if_it_were_written(make_policy):
    policy = make_policy()
    images, tasks, texts = (
        pictures(policy, 2),
        ["put the red cube", "put the blue cube on the pad"],
        ["red cube is near", "left"],
    )
    said, states = policy.reason(images, tasks, texts)
    tok = policy.tokenizer
    rows = packed([[(tok.prompt(task), tok.reasoning_ids(text))] for task, text in zip(tasks, texts)])
    full = policy.vlm(
        policy.vlm.encode_images(images), rows["tokens"], rows["segments"], rows["positions"], True
    )[1]
    assert said == texts and torch.allclose(states, full, atol=1e-5)
    state = torch.zeros(2, policy.cfg.action_dim)
    assert (policy.act(images, state, tasks, reasoning=texts)[0] == policy.plan(states, state)).all()


def test_answers_end_where_the_training_text_ends(make_policy, monkeypatch):
    """Questions end with <end>, instructions asked as questions with </reason>: what is written behind is no
    part of the answer.
    """
    policy = make_policy()
    tok = policy.tokenizer
    for question, end in (
        ("where is the red cube", tok.end_answer),
        ("<task> put the red cube", tok.end_reasoning),
    ):
        script = iter([tok.ids[" red"], end] + [tok.ids[" blue"]] * 50)  # the model's next words

        def logits(hidden, script=script):
            return F.one_hot(torch.tensor([next(script)]), len(tok)).float()

        monkeypatch.setattr(policy.vlm.lm, "logits", logits)
        assert policy.answer(pictures(policy, 1), [question]) == ["red"]


# -- flow matching ------------------------------------------------------------------------------------------


def test_flow_loss_by_hand(make_policy):
    policy = make_policy()
    cfg = policy.cfg
    states, state, actions, valid, eps, t = flow_inputs(policy, 2)
    valid[1, 5:] = False
    got = policy.flow_loss(states, state, actions, valid, eps, t)
    for b in range(2):
        kv = policy.expert.condition(policy.adapter(states[b : b + 1]))
        for m in range(cfg.noise_samples):
            time = t[b, m]
            x = time * eps[b, m] + (1 - time) * actions[b]
            v = policy.expert(x[None, None], policy.expert.modulation(time.view(1, 1)), state[b : b + 1], kv)[
                0, 0
            ]
            steps = 5 if b == 1 else cfg.chunk_size
            expected = (v - (eps[b, m] - actions[b]))[:steps].square().mean()
            assert torch.allclose(got[b, m], expected, rtol=1e-4)


def test_padded_steps_carry_no_target(make_policy):
    policy = make_policy()
    states, state, actions, valid, eps, t = flow_inputs(policy, 1)
    valid[:, 3:] = False
    actions.requires_grad_()
    policy.flow_loss(
        states, state, actions, valid, eps, torch.ones_like(t)
    ).sum().backward()  # at t=1 the input is pure noise
    assert actions.grad[:, 3:].abs().max() == 0 and actions.grad[:, :3].abs().min() > 0


def test_gradient_norms_against_finite_differences(make_policy):
    policy = make_policy(queries=3, width=8, heads=2, kv_heads=1, expert_width=8).double()
    states, *flow = flow_inputs(policy, 2)
    norms = policy.gradient_norms(states, *flow)
    step = 1e-2
    for b in range(2):
        one = [x[b : b + 1] for x in flow]
        for i in range(3):
            slope = []
            for d in range(8):
                bump = torch.zeros(1, 3, 8, dtype=torch.float64)
                bump[0, i, d] = step
                up, down = (
                    policy.flow_loss(states[b : b + 1] + s * bump, *one).mean().item() for s in (1, -1)
                )
                slope.append((up - down) / (2 * step))
            assert norms[b, i].item() == pytest.approx(
                np.linalg.norm(slope), rel=2e-2
            )  # per sample: the batch does not mix


def test_closed_form_gradient_of_single_layer_attention():
    """dl/dh_i = p_i [W_V^T g + (g^T (v_i - z)) W_K^T q / sqrt(d)]: what the gradient norm of a query state is
    made of.
    """
    torch.manual_seed(0)
    Q, d = 5, 6
    W_K, W_V, q, h = (torch.randn(*s, dtype=torch.float64) for s in ((d, d), (d, d), (d,), (Q, d)))
    h.requires_grad_()
    p = (h @ W_K.T @ q / math.sqrt(d)).softmax(0)
    z = p @ (h @ W_V.T)
    z.retain_grad()
    z.sin().square().sum().backward()
    g, v = z.grad, h @ W_V.T
    expected = p[:, None] * (W_V.T @ g + ((v - z) @ g)[:, None] * (W_K.T @ q) / math.sqrt(d))
    assert torch.allclose(h.grad, expected, atol=1e-12)


def test_expert_keeps_noise_samples_apart(make_policy):
    policy = make_policy()
    states, state, actions, valid, eps, t = flow_inputs(policy, 2)
    before = policy.flow_loss(states, state, actions, valid, eps, t)
    eps[0, 1] += 1
    after = policy.flow_loss(states, state, actions, valid, eps, t)
    same = before == after
    assert not same[0, 1] and same.sum() == same.numel() - 1


# -- intention decoupling -----------------------------------------------------------------------------------


def test_paper_setting_drops_exactly_the_state_of_least_gradient(make_policy):
    policy = make_policy(queries=20, decouple_percentile=5.0)
    inputs = flow_inputs(policy, 6)
    keep = policy.keep_mask(*inputs, torch.rand(6, 20))
    assert ((~keep).sum(1) == 1).all()
    states, state, actions, valid, eps, t = inputs
    norms = policy.gradient_norms(states, state, actions, valid, eps[:, :1], t[:, :1])
    assert torch.equal((~keep).int().argmax(1), norms.argmin(1))
    for percent, dropped in ((0.0, 0), (1.0, 1), (10.0, 2), (20.0, 4)):
        policy.cfg.decouple_percentile = percent
        assert ((~policy.keep_mask(*inputs, torch.rand(6, 20))).sum(1) == dropped).all()


def test_controls_drop_as_many_by_their_own_score(make_policy):
    policy = make_policy(queries=20, decouple_percentile=10.0)
    inputs, uniform = flow_inputs(policy, 5), torch.rand(5, 20, generator=torch.Generator().manual_seed(1))
    masks = {}
    for kind in ("gradient", "random", "attention"):
        policy.cfg.decouple = kind
        masks[kind] = ~policy.keep_mask(*inputs, uniform)
        assert (masks[kind].sum(1) == 2).all()

    def lowest(score):
        return torch.zeros(5, 20, dtype=torch.bool).scatter(1, score.topk(2, largest=False).indices, True)

    assert torch.equal(masks["random"], lowest(uniform))
    # attention mass by hand: expert's only block, mean over heads and tokens
    states, state, actions, _, eps, t = inputs
    block, seen = policy.expert.blocks[0], []
    block.register_forward_pre_hook(lambda _, args: seen.append(args))
    policy.flow_loss(states, state, actions, inputs[3], eps[:, :1], t[:, :1])
    x, modulation, (k, _), _ = seen[0]
    shift1, scale1, gate1, shift2, scale2 = modulation.chunk(9, dim=-1)[:5]
    B, M, L, De = x.shape
    q, kk, v = (
        block.qkv(F.layer_norm(x, (De,)) * (1 + scale1) + shift1).view(B, L, 3, block.heads, -1).unbind(2)
    )
    w = torch.einsum("blhd,bshd->bhls", q, kk).div((De // block.heads) ** 0.5).softmax(-1)
    x = x + gate1 * block.proj(torch.einsum("bhls,bshd->blhd", w, v).reshape(B, 1, L, De))
    q = block.cross_q(F.layer_norm(x, (De,)) * (1 + scale2) + shift2).view(B, L, block.heads, -1)
    mass = torch.einsum("blhd,bhqd->bhlq", q, k).div((De // block.heads) ** 0.5).softmax(-1).mean((1, 2))
    assert torch.equal(masks["attention"], lowest(mass))
    policy.cfg.decouple = "off"
    assert "kept" not in policy(action_batch(policy, 2))


def test_batch_scope_sets_one_threshold_for_all_samples(make_policy):
    policy = make_policy(queries=20, decouple_percentile=5.0, decouple_scope="batch", noise_samples=1)
    inputs = flow_inputs(policy, 8)
    keep, norms = policy.keep_mask(*inputs, None), policy.gradient_norms(*inputs)
    assert (~keep).sum() == 8 and norms[~keep].max() < norms[keep].min()


def test_second_pass_with_the_same_noise_sends_no_gradient_into_a_masked_state(make_policy, monkeypatch):
    policy = make_policy()
    batch, calls, queries = action_batch(policy, 3), [], []
    flow_loss, vlm = policy.flow_loss, policy.vlm.forward

    def spy_vlm(*args):
        hidden = vlm(*args)
        hidden.queries.retain_grad()
        queries.append(hidden.queries)
        return hidden

    monkeypatch.setattr(policy, "flow_loss", lambda *args: calls.append(args) or flow_loss(*args))
    monkeypatch.setattr(policy.vlm, "forward", spy_vlm)
    losses = policy(batch)
    losses["action"].backward()
    (first, second), (states,) = calls, queries
    assert torch.equal(first[4], second[4][:, :1]) and torch.equal(
        first[5], second[5][:, :1]
    )  # the same eps and t
    dropped = (second[0] == 0).all(-1)
    assert torch.equal(dropped.sum(1), torch.ones(3, dtype=torch.int64)) and losses[
        "kept"
    ].item() == pytest.approx(0.75)
    assert states.grad[dropped].abs().max() == 0 and (states.grad[~dropped].norm(dim=-1) > 0).all()
    # the first pass leaves nothing behind: weights got the gradient of the masked loss alone
    got = policy.expert.action_out.weight.grad.clone()
    policy.zero_grad()
    flow_loss(second[0].detach(), *second[1:]).mean().backward()
    assert torch.allclose(got, policy.expert.action_out.weight.grad, atol=1e-6)


def test_adapter_of_nothing_is_nothing(make_policy):
    policy = make_policy()
    assert not policy.adapter(torch.zeros(1, 2, policy.cfg.width)).any()


# -- losses of a batch --------------------------------------------------------------------------------------


def test_text_loss_is_a_mean_over_rows_of_means_over_targets(make_policy):
    policy = make_policy()
    rows = [QUESTIONS, QUESTIONS[:1]]
    batch = packed(rows) | {"images": pictures(policy, 2)}
    hidden, *_ = policy.vlm(
        policy.vlm.encode_images(batch["images"]),
        batch["tokens"],
        batch["segments"],
        batch["positions"],
        False,
    )
    log_p, per_row = policy.vlm.lm.logits(hidden).log_softmax(-1), []
    for b, row in enumerate(rows):
        i, terms = 0, []
        for prompt, target in row:
            terms += [-log_p[b, i + len(prompt) + j - 1, word] for j, word in enumerate(target)]
            i += len(prompt) + len(target)
        per_row.append(torch.stack(terms).mean())
    assert torch.allclose(policy(batch)["text"], torch.stack(per_row).mean(), rtol=1e-4)


def test_a_policy_without_reasoning_has_no_text_loss(make_policy):
    policy = make_policy(reasoning=False)
    batch = action_batch(policy, 2)
    batch["labels"][:] = -100
    losses = policy(batch)
    assert losses["text"] == 0 and torch.isfinite(losses["action"])


# -- acting -------------------------------------------------------------------------------------------------


def test_sampler_lands_exactly_on_the_data_of_an_exact_field(make_policy, monkeypatch):
    """u = (x - a) / t is the field whose paths are straight lines into a: any number of Euler steps must end
    there.
    """
    policy = make_policy()
    a = torch.rand(2, 1, policy.cfg.chunk_size, policy.cfg.action_dim) - 0.5
    monkeypatch.setattr(policy.expert, "modulation", lambda t, age: [t[:, :, None, None]])
    monkeypatch.setattr(policy.expert, "forward", lambda x, modulation, *_: (x - a) / modulation[0])
    for steps in (1, 3, 5):
        policy.cfg.denoise_steps = steps
        noise = torch.randn(2, policy.cfg.chunk_size, 6)
        chain = policy.denoise(
            torch.zeros(2, 4, policy.cfg.width), torch.zeros(2, 6), noise, policy.euler_step
        )
        assert chain.shape == (2, steps + 1, policy.cfg.chunk_size, 6) and torch.equal(chain[:, 0], noise)
        assert torch.allclose(chain[:, -1], a[:, 0], atol=1e-5)


def test_sampler_steps_a_linear_field_from_noise_to_data(make_policy, monkeypatch):
    policy = make_policy(denoise_steps=4)
    times = []
    monkeypatch.setattr(policy.expert, "modulation", lambda t, age: [t[:, :, None, None]])
    monkeypatch.setattr(
        policy.expert, "forward", lambda x, modulation, *_: times.append(modulation[0].item()) or 0.5 * x + 1
    )
    noise = torch.rand(1, policy.cfg.chunk_size, 6) - 0.5
    chain = policy.denoise(torch.zeros(1, 4, policy.cfg.width), torch.zeros(1, 6), noise, policy.euler_step)
    assert times == pytest.approx([1, 0.75, 0.5, 0.25])
    assert torch.allclose(chain[:, -1], (noise + 2) * (1 - 0.5 / 4) ** 4 - 2, atol=1e-5)


def test_temperature_scales_the_noise(make_policy):
    """Zero: every seed acts alike. Otherwise the sampler starts from that multiple of the seed's noise."""
    images, state = torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8), torch.ones(1, 6)
    begun = []
    for temperature in (0.0, 0.5, 1.0):
        policy = make_policy(temperature=temperature)

        def denoise(states, state, noise, *rest, sampler=policy.denoise):
            begun.append(noise)
            return sampler(states, state, noise, *rest)

        policy.denoise = denoise
        chunks = [policy.act(images, state, ["put"], seed=seed)[0] for seed in (1, 2)]
        assert np.array_equal(*chunks) == (temperature == 0)
    assert (
        begun[0].abs().max() == 0
        and torch.equal(2 * begun[2], begun[4])
        and begun[4].std() == pytest.approx(1, abs=0.3)
    )


def test_acting_is_deterministic_and_rows_do_not_mix(make_policy):
    policy = make_policy(temperature=1.0)
    images, state = pictures(policy, 2), torch.tensor([[1.0, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]])
    tasks = ["put the red cube on the blue pad", "put the cube"]
    chunk, said = policy.act(images, state, tasks, seed=3)
    again, _ = policy.act(images.numpy(), state.numpy(), tasks, seed=3)  # arrays do as well as tensors
    assert np.array_equal(chunk, again)
    assert np.abs(policy.act(images, state, tasks, seed=4)[0] - chunk).max() > 1e-3
    other, said_other = policy.act(
        pictures(policy, 2, seed=9).index_copy(0, torch.tensor([0]), images[:1]),
        state * torch.tensor([[1.0], [2]]),
        [tasks[0], "where is the pad"],
        seed=3,
    )
    assert np.allclose(other[0], chunk[0], atol=1e-3) and said_other[0] == said[0]  # degrees
    assert np.abs(other[1] - chunk[1]).max() > 1e-3
    low, high = policy.action_low.numpy(), policy.action_high.numpy()
    assert (chunk >= low - 0.26 * (high - low)).all() and (
        chunk <= high + 0.26 * (high - low)
    ).all()  # normalised to +-1.5


def test_inputs_that_do_not_fit_show_both_sides(make_policy):
    policy = make_policy()
    images, state = pictures(policy, 1), torch.zeros(1, 6)
    for arguments, shown in (
        ((images[:, :1], state, ["x"]), ("2, 32, 32, 3", "1, 1, 32, 32, 3", "front,wrist")),
        ((images.float(), state, ["x"]), ("uint8", "float32")),
        ((images, state * float("nan"), ["x"]), ("finite", "nan")),
        ((images, state[:, :5], ["x"]), ("(1, 6)", "(1, 5)", "gripper")),
        ((images, state, "a string"), ("tasks", "one for each row")),
        ((images, state, ["x", "y"]), ("tasks", "one for each row")),
    ):
        with pytest.raises(ValueError) as caught:
            policy.act(*arguments)
        assert all(part in str(caught.value) for part in shown) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method, changes, said",
    [
        ("act", {"images": [[1], [2, 3]]}, "images must be an array of numbers"),
        ("act", {"state": None}, "state must be an array of numbers"),
        ("act", {"state": [["a"] * 6]}, "state must be an array of numbers"),
        ("act", {"state": [0.0] * 6}, "state must be (1, 6)"),
        ("plan", {"state": [0.0] * 6}, "state must be (B, 6)"),
        ("act", {"state": [[math.inf] * 6]}, "state must be finite"),
        ("act", {"task": [3]}, "tasks must be a list of 1 strings"),
        ("act", {"reasoning": ["a", "b"]}, "reasoning must be a list of 1 strings"),
        ("act", {"guess": ["cube"]}, "guess must be a list of 1 lists of strings"),
        ("act", {"guess": [[3]]}, "a list in guess must be a list of 1 strings"),
        ("act", {"seed": 1.5}, "seed must be a whole number"),
        ("answer", {"images": np.zeros((1, 2, 32, 32, 3))}, "images must be (B, 2, 32, 32, 3) uint8"),
        (
            "answer",
            {"images": np.zeros((1, 1, 32, 32, 3), np.uint8)},
            "images must be (B, 2, 32, 32, 3) uint8",
        ),
        ("answer", {"questions": "where"}, "questions must be a list of 1 strings"),
        ("answer", {"limit": 0}, "limit must be a whole number"),
        ("plan", {"state": [[math.nan] * 6]}, "state must be finite"),
        ("plan", {"query_states": np.zeros((1, 2, 32))}, "query_states must be (1, 4, 32)"),
        ("plan", {"age": "old"}, "age must be an array of numbers"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_python_users_get_a_value_error(make_policy, method, changes, said):
    policy = make_policy()
    seen = {"images": np.zeros((1, 2, 32, 32, 3), np.uint8)}
    right = {
        "act": seen | {"state": np.zeros((1, 6)), "task": ["put"]},
        "answer": seen | {"questions": ["where"]},
        "plan": {"query_states": np.zeros((1, 4, 32)), "state": np.zeros((1, 6))},
    }
    getattr(policy, method)(**right[method])
    with pytest.raises(ValueError, match=re.escape(said)):
        getattr(policy, method)(**right[method] | changes)


# -- statistics and weights on disk -------------------------------------------------------------------------


def statistics_of(x):
    """data.statistics() of (N, 6) states, which are the actions, too."""
    return {"state": statistics(x), "action": statistics(x)}


def test_normalisation(make_policy):
    policy = make_policy()
    rng = np.random.default_rng(0)
    x = rng.uniform(-90, 90, (10_000, 6))
    x[:, 1] = 5.0  # never moved
    x[:, 2] = 5 + rng.uniform(0, 1e-4, 10_000)  # hardly moved: the encoder's noise
    x[:, 3] = rng.choice([-4e-4, 4e-4], 10_000)  # metres a step at 50 Hz
    x[:, 4] = 2.0
    x[:50, 4] = 60.0  # a gripper that opens in half a per cent of the frames
    policy.set_statistics(statistics_of(x))
    given = torch.tensor(x, dtype=torch.float32)
    scaled = policy.normalise(given, "action")
    low, high = np.quantile(x[:, 0], [0.01, 0.99])
    assert torch.allclose(
        scaled[:, 0], torch.tensor(2 * (x[:, 0] - low) / (high - low) - 1).float(), atol=1e-5
    )
    assert not scaled[:, 1:3].any()
    assert torch.allclose(scaled[:, 3].abs(), torch.ones(10_000), atol=1e-5)
    assert scaled[:50, 4].min() > scaled[50:, 4].max() + 0.5 and scaled[:, 4].abs().max() <= 4.0
    # nothing recorded is cut off, what lies beyond it is
    moved = [0, 3, 4, 5]
    assert torch.allclose(policy.denormalise(scaled)[:, moved], given[:, moved], rtol=1e-4, atol=1e-3)
    assert policy.normalise(10 * given, "action")[:, 0].abs().max() == policy.action_limit[0]


def test_another_arms_recordings_are_reached_in_the_old_scale(make_policy):
    policy = make_policy()
    rng = np.random.default_rng(0)
    x = rng.uniform(-50, 50, (1000, 6))
    x[:, 5] = 3.0
    policy.set_statistics(statistics_of(x))
    before = policy.action_low.clone(), policy.action_high.clone()
    theirs = rng.uniform(-50, 50, (1000, 6))
    theirs[:, 1] += 60  # level jaws
    theirs[:, 2] *= 10
    assert policy.widen_limits(statistics_of(theirs)) == [
        f"{what} {motor}" for what in ("state", "action") for motor in ("elbow_flex", "gripper")
    ]
    kept = [0, 1, 3, 4]
    assert torch.equal(policy.action_low[kept], before[0][kept])
    assert torch.equal(policy.action_high[kept], before[1][kept])
    given = torch.tensor(theirs, dtype=torch.float32)
    assert torch.allclose(policy.denormalise(policy.normalise(given, "action")), given, atol=1e-2)


def test_without_statistics_nothing_runs_silently(make_policy):
    policy = make_policy(statistics=False)
    with pytest.raises(ValueError, match="no normalisation statistics"):
        policy.act(pictures(policy, 1), torch.zeros(1, 6), ["put the cube"])
    assert not torch.isfinite(
        policy.normalise(torch.ones(1, 6), "action")
    ).any()  # training on them shows as a NaN loss, not as zeros
    with pytest.raises(ValueError, match="vocab_size"):
        make_policy(vocab_size=200)


def test_checkpoint_round_trip_and_foreign_weights_are_named(make_policy, tmp_path):
    policy = make_policy()
    save_policy(tmp_path, policy, dataclasses.asdict(policy.cfg))
    copy = load_policy(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(policy.state_dict().values(), copy.state_dict().values()))
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "expert.action_out.bias"
    for change, shown in (
        (lambda w: w.pop(name), "missing"),
        (lambda w: w.update(extra=w[name].clone()), "extra is (6,) there, unknown here"),
        (lambda w: w.update({name: w[name][:3].clone()}), f"{name} is (3,) there, (6,) here"),
    ):
        other = dict(weights)
        change(other)
        save_file(other, path)
        with pytest.raises(ValueError) as caught:
            copy.load_weights(path)
        assert shown in str(caught.value)


def test_checkpoints_of_format_1_are_refused_with_the_version_that_runs_them(make_policy, tmp_path):
    policy = make_policy()
    save_policy(tmp_path, policy, dataclasses.asdict(policy.cfg))
    old = read_checkpoint_config(tmp_path)
    del old["format"]
    write_json(tmp_path / "config.json", old)
    with pytest.raises(ValueError, match="e6a1aa6 runs checkpoints of format 1"):
        load_policy(tmp_path)


# -- a policy in one file -----------------------------------------------------------------------------------


def test_the_shipped_policy_is_small_and_says_what_the_teacher_would(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert SHIPPED.stat().st_size < 4.5e6
    folder = checkpoint_folder(str(SHIPPED))
    policy = load_policy(folder)
    env = SO100Env()
    right = []
    for seed in range(1_000_000, 1_000_012):
        obs, info = env.reset(seed=seed, options={"family": "place"})
        images = np.stack([obs["images"][camera] for camera in policy.cfg.camera_names])
        _, (said,) = policy.act(images[None], obs["state"][None], [obs["task"]])
        right.append(said.split(" at ")[0] == info["reason"].split(" at ")[0])
    env.close()
    assert sum(right) >= 11


def test_a_policy_in_one_file(make_policy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    policy = make_policy()
    save_policy("run", policy, dataclasses.asdict(policy.cfg))
    file = str(tmp_path / "one.safetensors")
    ship(ShipConfig(run="run", out=file))
    assert checkpoint_folder("run") == "run"
    unpacked = load_policy(checkpoint_folder(file))
    for name, tensor in policy.state_dict().items():
        expected = tensor.bfloat16().float() if "." in name else tensor  # the scale keeps its digits
        assert torch.equal(unpacked.state_dict()[name], expected)
    with pytest.raises(UserError, match="no policy in one file"):
        checkpoint_folder("run/model.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint_folder("nowhere.safetensors")
    Path(UNPACKED, "train_state.pt").touch()
    with pytest.raises(UserError, match="holds a training run"):
        checkpoint_folder(file)
