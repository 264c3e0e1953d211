"""Peers on our data: what they are told, what they are fed, and a run that is killed and goes on."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.peers import Peer, PeerConfig, goal_of

trains = pytest.mark.skipif(importlib.util.find_spec("lerobot") is None, reason="LeRobot is not installed")


def test_a_goal_is_what_the_reasoning_names_or_the_instruction():
    assert goal_of("put it there", "tomato is red , blue pad at t3 , red cube at t5 r3") == "blue red"
    assert goal_of("put it there", "blue pad at t4 , red cube there , done") == "blue red"
    assert goal_of("open the drawer", "") == goal_of("open the drawer", "move left") == "open the drawer"


def test_bad_input_ends_in_a_message(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "act, diffusion" in fails(peers.main, ["--policy=gpt"])
    assert "--minutes" in fails(peers.main, ["--minutes=0"])
    assert "nothing to resume" in fails(peers.main, ["--resume"])
    assert "train a peer first" in fails(peers.main, ["evaluate", "--out=nowhere"])


@pytest.fixture
def config(data):
    return PeerConfig(data=str(data), chunk_size=8, batch_size=3, minutes=1e-3, eval=1, threads=1)


@trains
def test_frames_are_those_of_the_data_set(config):
    peer = Peer(config)
    episodes = peer.episodes
    batch = peer.frames(np.random.default_rng(0))
    picks = np.searchsorted(episodes.cumulative, np.random.default_rng(0).random(3))
    for row, pick in enumerate(picks):
        frame, _, end, _ = episodes.rows[pick]
        assert torch.equal(batch["observation.state"][row], torch.tensor(episodes.state[frame]))
        picture = batch["observation.images.wrist"][row].permute(1, 2, 0) * 255
        assert np.array_equal(picture.round().byte().numpy(), episodes.images[1][frame])
        goal = sorted(peer.goals)[int(batch["observation.environment_state"][row].argmax())]
        assert goal == goal_of(*episodes.reason_at(pick))
        valid = min(8, end - frame)
        actions = torch.tensor(episodes.action[frame : frame + valid])
        assert torch.equal(batch["action"][row, :valid], actions)
        assert batch["action_is_pad"][row].tolist() == [False] * valid + [True] * (8 - valid)
    unknown = peer.observation(np.zeros((1, 2, 32, 32, 3), np.uint8), np.zeros((1, 6), np.float32), ["fly"])
    assert not unknown["observation.environment_state"].any()


@trains
@pytest.mark.parametrize("policy", ["act", "diffusion"])
def test_a_peer_learns_and_acts_in_our_units(config, policy):
    config.policy = policy
    peer = Peer(config)
    batch = peer.frames(np.random.default_rng(0))
    before = peer.loss(dict(batch))
    before.backward()
    assert torch.isfinite(before)
    obs = {
        "images": np.zeros((2, 2, 32, 32, 3), np.uint8),
        "state": peer.episodes.state[:2],
        "task": ["put the red cube on the blue pad"] * 2,
        "teacher_reasoning": [""] * 2,
    }
    actions, _ = peer.decide(obs)
    assert actions.shape == (2, 4, 6)
    # an untrained network says little: normalised near 0, that is near the mean in degrees
    spread = peer.episodes.action.std(0) + 1
    assert (np.abs(actions - peer.episodes.action.mean(0)) < 20 * spread).all()


@trains
def test_a_run_goes_on_after_a_kill(config, tmp_path, capsys):
    config.out = str(tmp_path / "act")
    config.eval = 0
    peers.train(config)
    first = torch.load(tmp_path / "act" / "train_state.pt", weights_only=True)
    assert first["step"] > 0 and first["seconds"] >= 60 * config.minutes
    settings = json.loads((tmp_path / "act" / "config.json").read_text())
    (tmp_path / "act" / "config.json").write_text(json.dumps(settings | {"minutes": 2e-2}))
    config.resume = True
    peers.train(config)
    second = torch.load(tmp_path / "act" / "train_state.pt", weights_only=True)
    assert second["step"] > first["step"] and second["seconds"] >= 1.2
