"""Tests of train.py: learning, resuming, processes, Muon, learning rate, checkpoints that survive, and what
it refuses.
"""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import debug_config, differences
from safetensors.torch import load_file, save_file

import common
import train
from common import read_json
from data import Episodes, Questions
from model import PRESETS, load_policy


@pytest.fixture
def go(data, tmp_path):
    """go(name, *flags) -> run folder of a debug training with these flags."""

    def run(name, *flags):
        train.main(arguments(data, tmp_path / name, *flags))
        return tmp_path / name

    return run


def arguments(data, out, *flags):
    words = ["--config", "debug", f"--data={data}", f"--out={out}", "--device=cpu", "--threads=1", *flags]
    if not any("precision" in word for word in words):
        words.append("--precision=fp32")  # the same on every processor
    return words


def config(**changes):
    """TrainConfig of the debug preset, with changes."""
    known = {field.name for field in fields(train.TrainConfig)}
    preset = {name: value for name, value in PRESETS["debug"].items() if name in known}
    fixed = {"cameras": "front,wrist", "precision": "fp32"}  # the same on every processor
    return train.TrainConfig(**preset | fixed | changes)


def build(**changes):
    return train.build(config(**changes), torch.device("cpu"))


def weights(folder):
    return load_file(folder / "model.safetensors")


def state(folder):
    return torch.load(folder / "train_state.pt", weights_only=True)


# -- learning -----------------------------------------------------------------------------------------------


def test_overfits_one_batch(data):
    run = build(
        data=str(data),
        adam_lr=1e-2,
        muon_lr=2e-2,
        warmup=5,
        steps=80,
        ground_steps=0,
        mix=0.5,
        max_reasoning_tokens=24,
    )
    micro = train.batches(run, 0)
    logs = [train.train_step(run, step, micro) for step in range(80)]
    first, last = logs[0], logs[-1]
    assert (
        last["action"] < 0.35 * first["action"]
        and last["text"] < 0.1 * first["text"]
        and last["question"] < 0.5 * first["question"]
    )
    assert last["kept"] == 0.75  # debug: one of four query states is masked
    # the reasoning of the batch can now be generated
    (_, batch), tokenizer = micro[0][1], run.policy.tokenizer
    tasks = []
    for row in batch["tokens"].tolist():
        tasks.append(tokenizer.decode(row[1 : row.index(tokenizer.reason)]))
    said, _ = run.policy.reason(batch["images"], tasks)
    wanted = [tokenizer.decode([i for i in row.tolist() if i >= 0]) for row in batch["labels"]]
    assert np.mean([a == b for a, b in zip(said, wanted)]) >= 0.5


def test_every_parameter_learns(data):
    """A part that gets no gradient is disconnected.

    One step opens the zero gates, the second must reach everything.
    """
    run = build(data=str(data), ground_steps=0, mix=0.5)
    before = {name: p.clone() for name, p in run.policy.named_parameters()}
    listed = [p for o in run.optimizers for g in o.param_groups for p in g["params"]]
    assert len(listed) == len(set(listed)) == len(before)  # every parameter has exactly one optimizer
    for step in (0, 1, 1, 1):  # the gates open one after the other
        train.train_step(run, 0, train.batches(run, step))
    assert not [name for name, p in run.policy.named_parameters() if torch.equal(p, before[name])]


def learns_in_bf16(monkeypatch, **changes):
    """A run as on a processor with bf16 arithmetic; others compute the same, slowly."""
    monkeypatch.setattr(train, "cpu_has_bf16", lambda: True)
    return build(precision="auto", **changes)


def test_gradients_in_bf16_are_near_those_in_fp32(data, monkeypatch):
    run = learns_in_bf16(monkeypatch, data=str(data), ground_steps=0, mix=0.5, decouple="off")
    for p in run.policy.parameters():
        if not p.any():  # a gate that is shut hides the gradients behind it
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    (micro,) = train.batches(run, 0)
    gradients = []
    for forward in (run.policy, run.bf16_copy):
        train.round_weights(run.policy, run.bf16_copy)
        loss = 0.0
        for _, batch in micro:
            losses = forward(batch)
            loss = loss + losses["text"] + losses.get("action", 0.0)
        loss.backward()
        train.return_gradients(run.bf16_copy, run.policy)  # of fp32 there are none
        parts = defaultdict(list)  # as in vlm.lm.blocks
        for name, p in run.policy.named_parameters():
            assert p.grad.dtype == p.dtype == torch.float32
            parts[".".join(name.split(".")[:3])].append(p.grad.flatten())
        gradients.append({part: torch.cat(pieces) for part, pieces in parts.items()})
        run.policy.zero_grad()
    exact, rounded = gradients
    for part, gradient in exact.items():
        assert torch.cosine_similarity(gradient, rounded[part], dim=0) > 0.98, part
        assert 0.95 < rounded[part].norm() / gradient.norm() < 1.05, part


def test_fp32_weights_move_in_a_bf16_step_and_the_copy_follows(data, monkeypatch):
    run = learns_in_bf16(monkeypatch, data=str(data), ground_steps=0, mix=0.5)
    run.policy.action_limit += 1  # a checkpoint that is loaded brings other statistics
    for step in (0, 1):
        train.train_step(run, step, train.batches(run, step))
    train.round_weights(run.policy, run.bf16_copy)
    torch.testing.assert_close(run.bf16_copy.action_limit, run.policy.action_limit, rtol=0, atol=0)
    for p, rounded in zip(run.policy.parameters(), run.bf16_copy.parameters()):
        assert p.dtype == torch.float32 and torch.equal(rounded, p.bfloat16())
        assert rounded.grad is None and p.grad is None
    small = [p for p in run.policy.parameters() if not torch.equal(p, p.bfloat16().float())]
    assert len(small) > 20  # updates are not lost in the rounding


def test_precision_fp32_computes_on_the_policy_itself(data, monkeypatch):
    monkeypatch.setattr(train, "cpu_has_bf16", lambda: True)
    run = build(data=str(data), precision="fp32")
    assert run.bf16_copy is None and run.forward is run.policy
    assert run.optimizers[0].dtype == torch.float32


def test_a_resumed_bf16_run_equals_the_uninterrupted_one_bit_for_bit(go, monkeypatch):
    monkeypatch.setattr(train, "cpu_has_bf16", lambda: True)
    flags = ["--precision=bf16", "--mix=0.5", "--accumulate=2", "--checkpointing"]
    whole = go("whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(3, patch)
        go("cut", *flags, "--save_every=1")
    assert differences(state(whole), state(go("cut", "--precision=bf16", "--resume"))) == 0


def test_precision_that_cannot_be_had(fails, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "cpu_has_bf16", lambda: False)
    assert "--precision=bf16" in fails(train.main, arguments(data, tmp_path / "x", "--precision=bf16"))
    assert build(data=str(data), precision="auto").bf16_copy is None


def test_learning_rate(data):
    cfg = train.TrainConfig(ground_steps=100, steps=200, warmup=10)

    def lr(step):
        return train.learning_rate(step, cfg)

    assert lr(0) == pytest.approx(0.1) and lr(4) == pytest.approx(0.5, rel=0.01)
    assert lr(50) == pytest.approx(0.75) and lr(99) == pytest.approx(
        0.5, abs=0.01
    )  # grounding decays to a half
    assert lr(100) == pytest.approx(0.1)  # actions warm up again
    assert (
        lr(150) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
        and lr(200) == pytest.approx(0.5)
        and lr(299) == pytest.approx(0, abs=1e-3)
    )


# -- Muon ---------------------------------------------------------------------------------------------------


def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values():
    g = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0))
    for x in (g, g.mT):
        U, S, V = torch.linalg.svd(x, full_matrices=False)
        in_basis = U.mT @ train.orthogonalise(x) @ V.mT
        values = in_basis.diagonal(dim1=1, dim2=2)
        assert values.min() > 0.6 and values.max() < 1.3 and S.max() / S.min() > 2
        assert (in_basis - torch.diag_embed(values)).abs().max() < 1e-3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_steps_like_torch():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(n, 32)) for n in (16, 64, 16)] for _ in range(2))
    start = [p.detach().clone() for p in ours]
    a = train.Muon(ours, lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, s in zip(ours, theirs, start):
        x, y = (p - s).detach().flatten(), (q - s).detach().flatten()
        assert torch.cosine_similarity(x, y, dim=0) > 0.99 and (x.norm() / y.norm()).item() == pytest.approx(
            1, abs=0.03
        )  # torch's runs in bf16


# -- resuming, accumulating, processes ----------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill_before(step, monkeypatch):
    """The process dies before this step."""
    real = train.batches

    def batches(run, at):
        if at == step:
            raise Killed
        return real(run, at)

    monkeypatch.setattr(train, "batches", batches)


@pytest.mark.parametrize("flags, dies", [(["--mix=0.5"], 2), (["--mix=0.5", "--steps=4"], 5)])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(go, monkeypatch, flags, dies):
    monkeypatch.setitem(PRESETS["debug"], "save_every", 3)
    whole = go("whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(dies, patch)
        go("parts", *flags)
    assert 0 < state(whole.parent / "parts")["step"] <= dies
    parts = go("parts", "--resume")
    assert differences(weights(whole), weights(parts)) == 0 and differences(state(whole), state(parts)) == 0
    clock = ("seconds", "samples_per_s", "data_ms")
    losses = [
        [
            {k: v for k, v in json.loads(line).items() if k not in clock}
            for line in (f / "log.jsonl").read_text().splitlines()
        ]
        for f in (whole, parts)
    ]
    assert losses[0] == losses[1] and [x["step"] for x in losses[0]] == list(range(1, len(losses[0]) + 1))


def test_accumulated_micro_batches_equal_one_batch(go):
    one, two = (go(f"accumulate{n}", "--mix=0.5", f"--accumulate={n}") for n in (1, 2))
    assert differences(weights(one), weights(two)) < 1e-5 and differences(weights(one), weights(two)) != 0


def test_two_processes_equal_one(go, data, tmp_path):
    one = go("one", "--mix=0.5")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    workers = []
    for rank in range(2):  # what torchrun sets
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, train.__file__, *arguments(data, tmp_path / "two", "--mix=0.5")]
        workers.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert not said[1][0].strip()  # only the first process talks
    assert differences(weights(one), weights(tmp_path / "two")) < 1e-5


def test_samples_that_do_not_divide_are_weighted(data):
    """7 rows in 3 micro-batches of 3, 2 and 2: the same gradient as in one."""
    gradients = []
    for accumulate in (1, 3):
        run = build(data=str(data), ground_steps=0, mix=0.5, batch_size=14, accumulate=accumulate)
        micro = train.batches(run, 0)
        assert [len(batch["tokens"]) for (_, batch), _ in micro] == ([7] if accumulate == 1 else [3, 2, 2])
        for weighted in micro:
            for weight, batch in weighted:
                losses = run.policy(batch)
                (weight * (losses["text"] + losses.get("action", 0)) / len(micro)).backward()
        gradients.append({name: p.grad for name, p in run.policy.named_parameters() if p.grad is not None})
    assert differences(*gradients) < 1e-5


def test_fewer_samples_than_micro_batches_are_refused(fails, data, tmp_path):
    said = fails(train.main, arguments(data, tmp_path / "a", "--accumulate=3"))
    assert (
        "1 question samples are not enough" in said and "change --batch_size, --mix or --accumulate" in said
    )


# -- checkpoints --------------------------------------------------------------------------------------------


def test_saved_policy_is_the_moving_average(go, monkeypatch):
    raw, real = [], train.save_checkpoint

    def spy(run):
        raw.append({name: p.detach().clone() for name, p in run.policy.named_parameters()})
        real(run)

    monkeypatch.setattr(train, "save_checkpoint", spy)
    monkeypatch.setitem(PRESETS["debug"], "save_every", 1)
    monkeypatch.setitem(PRESETS["debug"], "ema", 0.2)
    out = go("ema", "--mix=0.5", "--adam_lr=0.01")
    policy = build(data=read_json(out / "config.json")["data"]).policy
    ema = dict(policy.named_parameters())  # the same seed: what the run began with
    for step, now in enumerate(raw):
        decay = min(0.2, (1 + step) / (10 + step))  # an early average forgets faster
        ema = {k: decay * ema[k] + (1 - decay) * now[k] for k in now}
    saved = weights(out)
    assert len(raw) == 4 and max((saved[k] - ema[k]).abs().max() for k in ema) < 1e-6
    learnt = state(out)["model"]
    assert learnt.keys() == ema.keys()
    assert differences({k: saved[k] for k in learnt}, learnt) > 1e-4  # not the raw weights
    with pytest.raises(RuntimeError), train.averaged_weights(policy, {k: v.detach() for k, v in ema.items()}):
        assert torch.equal(policy.vlm.queries, ema["vlm.queries"])
        raise RuntimeError
    assert not torch.equal(policy.vlm.queries, ema["vlm.queries"])  # put back, whatever happened


def test_checkpoint_folder_is_enough_to_act(trained, make_policy):
    names = {p.name for p in trained.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "train_state.pt",
        "log.jsonl",
        "questions.json",
        "grounded",
    } <= names and not [n for n in names if n.endswith(".tmp")]
    for folder in (trained, trained / "grounded"):
        policy = load_policy(folder)
        images = np.zeros((1, 2, 32, 32, 3), np.uint8)
        chunk, _ = policy.act(images, np.zeros((1, 6), np.float32), ["put the red cube on the blue pad"])
        assert np.isfinite(chunk).all()
    questions = json.loads((trained / "questions.json").read_text())
    assert (
        list(questions) == ["before action training", "after action training"]
        and 0 <= questions["after action training"]["all"]["accuracy"] <= 1
    )
    assert json.loads((trained / "config.json").read_text())["image_size"] == 32
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["phase"]) for line in lines] == [
        (1, "grounding"),
        (2, "grounding"),
        (3, "actions"),
        (4, "actions"),
    ]
    assert "action" not in lines[1] and lines[-1]["kept"] == 0.75


def test_a_kill_between_any_two_files_leaves_a_run_that_goes_on(trained, data, tmp_path, monkeypatch):
    real = os.replace
    for n in range(4):  # tokenizer, weights, config, train state
        out = tmp_path / str(n)
        shutil.copytree(trained, out)
        moments = iter(range(n))

        def replace(a, b, moments=moments):
            if next(moments, None) is None:
                raise Killed
            real(a, b)

        flags = ["--resume", "--steps=3"]
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(common.os, "replace", replace)
            train.main(arguments(data, out, *flags))
        load_policy(out)
        assert state(out)["step"] == 4
    train.main(arguments(data, out, *flags))
    assert state(out)["step"] == 5


# -- what it refuses ----------------------------------------------------------------------------------------


def test_non_finite_numbers_stop_the_run_and_spare_the_checkpoint(data, tmp_path, fails, monkeypatch):
    monkeypatch.setitem(PRESETS["debug"], "save_every", 1)
    out = tmp_path / "run"
    monkeypatch.setattr(train, "learning_rate", lambda step, cfg: 1e30)
    said = fails(train.main, arguments(data, out, "--steps=9"))
    assert "non-finite" in said and "lower the learning rates" in said
    if (out / "model.safetensors").is_file():
        assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_folders_and_stages(trained, data, tmp_path, fails):
    assert "add --resume" in fails(train.main, arguments(data, trained))
    assert "nothing to resume" in fails(train.main, arguments(data, tmp_path / "new", "--resume"))
    assert "--init_from" in fails(train.main, ["--config", "debug", "--stage=finetune"])
    assert "is no checkpoint" in fails(
        train.main, arguments(data, tmp_path / "new", "--stage=finetune", f"--init_from={tmp_path}")
    )
    assert "--stage must be one of pretrain, finetune" in fails(train.main, ["--stage=pretain"])
    assert "python prepare.py --config debug" in fails(
        train.main, arguments(tmp_path / "none", tmp_path / "new")
    )
    for families in ("sequence", "place,squence"):
        assert "no successful episode" in fails(
            train.main, arguments(data, tmp_path / "new", f"--families={families}")
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flag",
    [
        "--batch_size=0",
        "--accumulate=0",
        "--eval=-1",
        "--steps=-1",
        "--mix=1",
        "--adam_lr=0",
        "--adam_lr=1e30",
        "--muon_lr=nan",
        "--seed=-1",
        "--seed=1e30",
        "--chunk_size=1e9",
        "--cameras=front,front",
        "--families=place,",
        "--out=",
    ],
)
def test_numbers_that_cannot_be_are_refused(fails, data, tmp_path, flag):
    assert flag[2:].split("=")[0] in fails(train.main, arguments(data, tmp_path / "new", flag))


def test_device_that_is_not_there(fails, data, tmp_path):
    for device in ("abacus",) if torch.cuda.is_available() else ("abacus", "cuda"):
        words = ["--config=debug", f"--data={data}", f"--out={tmp_path / 'x'}", f"--device={device}"]
        assert f"--device={device}" in fails(train.main, words)


def test_finetuning_starts_from_the_weights_and_scale_of_its_parent(trained, data, tmp_path):
    out = tmp_path / "fine"
    train.main(
        arguments(
            data,
            out,
            "--stage=finetune",
            f"--init_from={trained}",
            "--adam_lr=1e-30",
            "--muon_lr=1e-30",
            "--mix=0",
        )
    )
    assert differences(weights(out), weights(trained)) < 1e-6
    assert (out / "tokenizer.json").read_text() == (trained / "tokenizer.json").read_text()


def test_new_expert_of_another_size_learns_on_a_vlm_that_stays_bit_for_bit(trained, data, tmp_path, fails):
    out = tmp_path / "new"
    flags = ("--stage=finetune", "--new_expert", f"--init_from={trained}")
    train.main(arguments(data, out, *flags, "--expert_width=48", "--chunk_size=6"))
    new, old = weights(out), weights(trained)
    assert (
        all(torch.equal(new[k], old[k]) for k in old if k.startswith("vlm."))
        and new["expert.action_in.weight"].shape[0] == 48
    )
    assert not torch.equal(new["adapter.0.weight"][:32, :32], old["adapter.0.weight"])
    train.main(arguments(data, out, "--resume", "--steps=3"))
    assert all(torch.equal(v, old[k]) for k, v in weights(out).items() if k.startswith("vlm."))
    assert "--stage=finetune" in fails(
        train.main, arguments(data, tmp_path / "x", "--new_expert", f"--init_from={trained}")
    )
    assert "--width=32, this run 64" in fails(
        train.main, arguments(data, tmp_path / "x", *flags, "--width=64")
    )


def test_query_states_of_a_frozen_vlm_are_cached(trained, data, tmp_path):
    """They are those of a fresh pass, to half precision; a frame is seen once, stale pictures under their own
    frame.
    """
    policy = load_policy(trained)
    fresh = Episodes(data, replace(policy.cfg, stale=3))
    cached = Episodes(data, replace(policy.cfg, stale=3))
    shape = (policy.cfg.queries, policy.cfg.width)
    asked = []

    @torch.no_grad()
    def query_states_of(batch):
        asked.append(len(batch["images"]))
        visual = policy.vlm.encode_images(batch["images"])
        return policy.vlm(visual, batch["tokens"], batch["segments"], batch["positions"], True)[1]

    cached.cache_query_states(tmp_path / "states.npy", shape, query_states_of)
    picks, older = np.arange(20, 40), np.arange(20) % 4
    with_pictures = fresh.samples(policy.tokenizer, picks, older)
    for _ in range(2):
        batch = cached.samples(policy.tokenizer, picks, older)
        assert set(with_pictures) - set(batch) == {"images", "tokens", "segments", "positions", "labels"}
        assert (batch["age"] == with_pictures["age"]).all()
        assert torch.allclose(batch["query_states"], query_states_of(with_pictures), rtol=2e-3, atol=1e-3)
    assert asked[0] <= 20 and asked[1:] == [20, 20]  # ours; the second time the file knew them all
    again = Episodes(data, fresh.cfg)
    again.cache_query_states(tmp_path / "states.npy", shape, None)
    assert (again.samples(policy.tokenizer, picks, older)["query_states"] == batch["query_states"]).all()


def test_no_room_to_keep_what_a_frozen_vlm_makes(trained, data, tmp_path, capsys, monkeypatch):
    mine = tmp_path / "data"
    shutil.copytree(data, mine, ignore=shutil.ignore_patterns("states_*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    train.main(
        arguments(mine, tmp_path / "new", "--stage=finetune", "--new_expert", f"--init_from={trained}")
    )
    assert (
        "has no room for" in capsys.readouterr().out
        and not list(mine.glob("states_*"))
        and (tmp_path / "new" / "model.safetensors").is_file()
    )


def test_foreign_checkpoints_are_named_in_one_line(trained, data, tmp_path, fails):
    def tell(folder, *flags):
        return fails(
            train.main, arguments(data, tmp_path / "new", "--stage=finetune", f"--init_from={folder}", *flags)
        )

    assert "--width=32" in tell(trained, "--width=64")
    foreign = tmp_path / "foreign"
    shutil.copytree(trained, foreign)
    tensors = weights(foreign)
    name = "expert.action_out.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, foreign / "model.safetensors")
    assert "missing" in tell(foreign) and name in tell(foreign)
    save_file(tensors | {name: torch.zeros(2, 2)}, foreign / "model.safetensors")
    assert "(2, 2) there" in tell(foreign)
    (foreign / "model.safetensors").write_bytes(b"not weights")
    assert "model.safetensors" in tell(foreign)


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_a_damaged_state_is_named(trained, data, tmp_path, fails, content):
    run = shutil.copytree(trained, tmp_path / "run")
    torch.save({"step": 1}, run / "train_state.pt")
    if content is not None:
        (run / "train_state.pt").write_bytes(content)
    assert "run/train_state.pt cannot be read" in fails(train.main, arguments(data, run, "--resume"))


def test_settings_of_wrong_types_are_named(trained, data, tmp_path, fails):
    run = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    for wrong in ([], config | {"width": None}, config | {"chunk_size": "8"}, config | {"env": 3}):
        (run / "config.json").write_text(json.dumps(wrong))
        assert "run/config.json" in fails(train.main, arguments(data, run, "--resume"))


def broken_json(folder):
    (folder / "config.json").write_text("{")


def no_object(folder):
    (folder / "config.json").write_text("[]")


def words_of_numbers(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"chunk_size": 8', '"chunk_size": "8"'))


def other_words(folder):
    words = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(words[::-1]))


def whole_numbers(folder):
    rewrite(folder, lambda name, tensor: tensor.to(torch.int8))


def no_numbers(folder):
    rewrite(folder, lambda name, tensor: tensor * (math.nan if name == "vlm.queries" else 1))


def upside_down(folder):
    rewrite(folder, lambda name, tensor: -tensor if name in ("action_low", "action_high") else tensor)


def rewrite(folder, change):
    tensors = {name: change(name, tensor).contiguous() for name, tensor in weights(folder).items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (broken_json, "config.json cannot be read"),
        (no_object, "config.json is not what train.py writes"),
        (words_of_numbers, "config.json: --chunk_size takes int, not '8'"),
        (other_words, "tokenizer.json is another checkpoint's"),
        (whole_numbers, "torch.int8; weights must be floating-point"),
        (no_numbers, "model.safetensors: weight vlm.queries not finite"),
        (upside_down, "action_low lies above action_high"),
    ],
)
def test_every_program_refuses_a_checkpoint_that_cannot_be(trained, data, tmp_path, fails, spoil, said):
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    spoil(broken)
    new = arguments(data, tmp_path / "new", "--stage=finetune", f"--init_from={broken}", "--mix=0")
    again = arguments(data, broken, "--resume", "--steps=9")
    for words in (new, again):
        assert said in fails(train.main, words)
    with pytest.raises(ValueError, match=re.escape(said)):  # rl.py and sample.py
        load_policy(broken)


def test_targets_beyond_the_scale_are_counted(make_policy):
    policy = make_policy()
    actions = np.tile(policy.action_high.numpy(), (4, 1))
    assert policy.clipped(actions) == "none"
    actions[0, 4] += 1000
    assert policy.clipped(actions) == "wrist_roll 25.0%"


def test_resuming_another_run_is_refused_in_one_line(trained, data, tmp_path, fails):
    for flag in ("--width=64", "--decouple=off", "--seed=5", "--mix=0.5", "--batch_size=8", "--adam_lr=1"):
        assert flag[2:].split("=")[0] in fails(
            train.main, arguments(data, trained, "--resume", "--steps=9", flag)
        )


def test_bench_prints_the_split_and_writes_nothing(trained, data, capsys):
    before = sorted(p.name for p in trained.iterdir())
    train.main(arguments(data, trained, "--bench"))
    said = capsys.readouterr().out
    assert "grounding: " in said and "actions: " in said and "samples/s" in said and "expert" in said
    assert before == sorted(p.name for p in trained.iterdir())


def test_held_out_pictures_are_not_training_pictures(data):
    cfg = debug_config()
    a, b = Questions(data / "questions", cfg), Questions(data / "questions_val", cfg)
    assert not {x.tobytes() for x in a.images[0]} & {x.tobytes() for x in b.images[0]}
    assert len(Episodes(data, cfg)) > 0
