"""The plan and the pointer of NS-VLA on a policy of ours."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WORDS

from data import Episodes
from extras import nsvla
from extras.nsvla import Extractor, PlanConfig, PlanPointer, Solver, learn, learn_solver, split_reasoning

FETCH = "blue pad at t3 , red cube at t5 r3"
CARRY = "blue pad at t3 , red cube in hand"
DONE = "blue pad at t3 , red cube there , done"
SECOND = "first , blue pad at t3 , red cube there , then , green pad at t8 , lime cube in hand"


def test_split_reasoning():
    upto = "blue pad at t3 , red cube "
    assert [split_reasoning(text) for text in (FETCH, CARRY, DONE)] == [[(upto, i)] for i in range(3)]
    first, second = split_reasoning(SECOND)
    assert first == ("first , blue pad at t3 , red cube ", 2)
    assert second == (SECOND.removesuffix("in hand"), 1)
    assert split_reasoning("move left") == []


@pytest.fixture
def pointer(make_policy):
    return PlanPointer(make_policy(words=[*WORDS, " at", " in", " there"]))


def look(pointer, texts, seen, sees="in hand", doubts=0):
    """The beginnings of the next reasonings, where the head prefers the states `seen` and the policy sees
    the cube in one of STATES.
    """
    policy = pointer.policy
    n = len(texts)
    logits = torch.zeros(n, policy.cfg.vocab_size)
    logits[:, policy.tokenizer.encode(sees)[0]] = 9.0
    pointer.read = lambda visual, prompts: (torch.zeros(n, policy.cfg.width), logits)
    pointer.head = lambda hidden: torch.eye(3)[list(seen)]
    px = policy.cfg.image_size
    obs = {
        "images": np.zeros((n, 2, px, px, 3), np.uint8),
        "state": np.zeros((n, 6), np.float32),
        "task": ["put the red cube on the blue pad"] * n,
        "episode": [types.SimpleNamespace(extras=[(text, doubts)]) for text in texts],
    }
    actions, extras = pointer.decide(obs)
    assert actions.shape == (n, policy.cfg.n_action_steps, 6)
    return extras


def test_the_pointer_stays_or_advances_by_one(pointer):
    texts = [FETCH, FETCH, CARRY, CARRY, DONE, FETCH]
    wanted = ["at", "in hand", "in hand", "there", "there", "at"]
    # never back, never two at once: among the next two the head's favourite, or else the first
    extras = look(pointer, texts, [0, 1, 1, 2, 0, 2])
    for (text, doubts), state in zip(extras, wanted):
        assert text.startswith(f"blue pad at t3 , red cube {state}") and doubts == 0
    ((text, _),) = look(pointer, [SECOND], [2])
    assert text.startswith(SECOND.replace("in hand", "there"))


def test_a_plan_is_made_anew_where_the_cube_is_seen_elsewhere(pointer):
    ((text, doubts),) = look(pointer, [CARRY], [1], sees="at")
    assert text.startswith(CARRY) and doubts == 1
    ((text, doubts),) = look(pointer, [CARRY], [1], sees="at", doubts=1)
    assert not text.startswith("blue pad at t3") and doubts == 2
    pointer.replan = False
    ((text, _),) = look(pointer, [CARRY], [1], sees="at", doubts=1)
    assert text.startswith(CARRY)
    pointer.replan = True
    ((_, doubts),) = look(pointer, [CARRY], [1], sees="in hand", doubts=1)
    assert doubts == 0


def test_a_first_look_is_free(pointer):
    ((text, doubts),) = look(pointer, [""], [0])
    assert doubts == 0 and not text.startswith("blue pad at t3")


def test_the_head_learns_what_comes_next(make_policy, data):
    policy = make_policy()
    episodes = Episodes(data, policy.cfg, ["place"])
    pointer = PlanPointer(policy)
    labels = []
    head = pointer.head.forward

    def spy(x):
        labels.append(len(x))
        return head(x)

    pointer.head.forward = spy
    accuracy = learn(pointer, episodes, PlanConfig(frames=len(episodes), steps=3))
    assert 0 <= accuracy <= 1
    legs = [split_reasoning(episodes.reason_at(i)[1]) for i in range(len(episodes))]
    assert labels[-1] == -(-sum(map(len, legs)) // 10)  # a tenth is held out


def test_the_extractor_gives_the_tokens_most_like_what_is_asked_for():
    torch.manual_seed(0)
    extractor = Extractor(8, top_k=3)
    states, tokens = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    best = extractor(states, tokens)
    for row in range(2):
        asked = extractor.query.weight @ states[row].mean(0)
        score = [F.cosine_similarity(extractor.key.weight @ token, asked, dim=0) for token in tokens[row]]
        third = sorted(score)[-3]
        gated = [token / (1 + torch.exp((third - cosine) / 0.5)) for token, cosine in zip(tokens[row], score)]
        order = sorted(range(6), key=lambda i: -score[i])[:3]
        assert torch.allclose(best[row], torch.stack([gated[i] for i in order]), atol=1e-5)


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_new_expert_learns_on_a_vlm_that_stays_as_it_is(make_policy, data, pointer, top_k):
    policy = pointer.policy
    episodes = Episodes(data, policy.cfg, ["place"])
    policy.set_statistics(episodes.meta["statistics"])
    torch.manual_seed(0)
    solver = pointer.solver = Solver(policy, top_k)
    before = {name: p.clone() for name, p in solver.named_parameters()}
    learn_solver(solver, episodes, PlanConfig(solver_steps=3, top_k=top_k))
    moved = {name for name, p in solver.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name.startswith("actor.vlm")}.isdisjoint(moved)
    assert {"actor.adapter.0.weight", "actor.expert.action_out.weight"} <= moved
    assert ("extractor.key.weight" in moved) == bool(top_k)
    # it acts in the policy's place, in its units
    torch.nn.init.normal_(solver.actor.expert.action_out.weight)
    look(pointer, [FETCH, CARRY], [0, 1])
    images = torch.randint(256, (2, 2, 32, 32, 3), dtype=torch.uint8)
    visual = policy.vlm.encode_images(images)
    states = torch.randn(2, policy.cfg.queries, policy.cfg.width)
    assert solver.states(states, visual).shape == (2, policy.cfg.queries + top_k, policy.cfg.width)
    assert torch.equal(solver.actor.action_low, policy.action_low)


def test_bad_input_ends_in_a_message(fails, trained):
    assert "--splits" in fails(nsvla.main, ["--splits=moon"])
    assert "nowhere" in fails(nsvla.main, ["--run=nowhere"])
    assert "--solver_steps" in fails(nsvla.main, ["--top_k=4"])
    run = [f"--run={trained}", "--solver_steps=1"]
    assert "visual tokens" in fails(nsvla.main, [*run, "--top_k=1000"])
