"""Run a trained policy: films, success tables, questions, open-loop replay.

    python sample.py --config small "put the red cube on the blue pad"    # a GIF and a contact sheet, reasoning drawn in
    python sample.py --config small --eval 300                            # success by family and split, eval.json
    python sample.py --config small --ask "which pad is blue"             # a question about a scene
    python sample.py --config base --ask "what is on the table" --image x.png    # or about a picture of yours
    python sample.py --config small --replay                              # open-loop error per joint on recorded episodes
    python sample.py --config small --env=real --port=/dev/ttyACM0 --front=0 --wrist=2 --dry_run "put the red cube on the blue pad"

A checkpoint folder is all that a policy needs; only --replay reads the data set, because it compares with recorded actions.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import real_env
import sim_env
from data import Episodes, Tokenizer
from model import SyVLA, fast_cpu, opt, parse_config, read_checkpoint_config


@dataclass
class SampleConfig:
    config: str = opt("small", "preset whose run is used")
    run: str = opt("", "checkpoint folder (default out/<config>)")
    env: str = opt("", "sim; real: an SO-100 or SO-101 (with a task; --eval=N to judge N episodes yourself); or package.module:Class (default: as trained for)")
    task: str = opt("", "instruction; without one the environment draws it")
    family: str = opt("", "task family when the environment draws the instruction (default: the first that the policy was trained on)")
    split: str = opt("id", "id, ood_position or ood_instruction, when the environment draws the instruction")
    seed: int = opt(2_000_000, "scene seed (report seeds start at 2000000), and of the sampler's noise")
    eval: int = opt(0, "closed-loop episodes per family and split; writes eval.json and prints the table")
    families: str = opt("", "families for --eval, with commas (default: those the run was trained on)")
    seeds: str = opt("report", "scenes of --eval: report, for numbers to publish, or val, to choose between policies")
    splits: str = opt("", "splits for --eval, with commas (default: all three)")
    ask: str = opt("", "a question about the scene of --seed, or about --image")
    image: str = opt("", "picture files for --ask, with commas; models trained from nothing want one for every camera")
    replay: bool = opt(False, "open-loop error per joint on recorded episodes, with a plot")
    data: str = opt("", "data set for --replay (default: the one the run was trained on)")
    out: str = opt("", "folder for pictures (default out/<config>/sample)")
    arms: int = opt(24, "arms simulated at once in --eval")
    threads: int = opt(0, "CPU threads; 0 lets torch choose")
    port: str = opt("", "serial port of the real arm (lerobot-find-port)")
    id: str = opt("", "LeRobot's robot id, whose calibration is used; not needed if there is only one")
    front: str = opt("", "front camera of the real arm: number or path (lerobot-find-cameras opencv)")
    wrist: str = opt("", "wrist camera of the real arm")
    dry_run: bool = opt(False, "real arm: look and think, but only print what would be sent")

    def __post_init__(self):
        self.run = self.run or f"out/{self.config}"
        self.out = self.out or f"{self.run}/sample"
        if self.eval < 0 or self.arms < 1:
            raise ValueError("eval counts episodes (0 or more), arms at least 1")
        if self.seeds not in ("report", "val"):
            raise ValueError(f"seeds must be report or val, not {self.seeds!r}")
        if self.image and not self.ask:
            raise ValueError("image goes with a question: add --ask=...")
        if unknown := [s for s in self.splits.split(",") if s not in ("", *sim_env.SPLITS)]:
            raise ValueError(f"unknown split {', '.join(unknown)}; choose from {', '.join(sim_env.SPLITS)}")


PRESETS = {"debug": {}, "tiny": {}, "small": {}, "base256": {}, "base": {}, "paper": {}}


def load_policy(run):
    return SyVLA.load(run, Tokenizer.load(run))


def look(obs, policy):
    """One observation of the environment -> the policy's batch of one: images (1, V, px, px, 3), state (1, S), [task]."""
    views = policy.cfg.cameras.split(",")
    if missing := [v for v in views if v not in obs["images"]]:
        raise ValueError(f"the policy looks through {views}, the environment has {list(obs['images'])}: {missing} missing")
    return np.stack([obs["images"][v] for v in views])[None], obs["state"][None], [obs["task"]]


def real_arm(policy, cfg):
    return real_env.by_flags(real_env.RealEnv, cfg, policy.cfg.cameras.split(","), px=policy.cfg.image_size, dry_run=cfg.dry_run)


# ---------------------------------------------------------------------------------------------------------------
# Film


def importance(policy, obs, chunk):
    """How much each feature query state matters to the flow loss of the chunk just chosen: gradient norms (Q,), largest 1."""
    batch = look(obs, policy)
    images, state = policy.check_inputs(*batch)
    _, states = policy.think(images, batch[2])
    generator = torch.Generator().manual_seed(0)
    eps, t = torch.randn(1, 8, *chunk.shape, generator=generator), torch.linspace(0.1, 0.9, 8)[None]
    action = policy.normalise(torch.as_tensor(chunk)[None], "action")
    norms = policy.gradient_norms(states.clone(), policy.normalise(state, "state").clone(), action, torch.ones(1, len(chunk), dtype=torch.bool), eps, t)[0]
    return (norms / norms.max().clamp(min=1e-9)).numpy()


def wrap_text(text, font, width):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return lines


def draw_frame(env, cameras, task, reasoning, weights, note="", px=256):
    """The first two views side by side with the instruction, the reasoning and a bar per feature query state underneath."""
    frame = Image.new("RGB", (2 * px, px + 112), (250, 250, 247))
    for i, camera in enumerate(cameras[:2]):
        frame.paste(Image.fromarray(env.render(px, camera)), (i * px, 0))
    pen, font = ImageDraw.Draw(frame), ImageFont.load_default(13)
    y = px + 4
    for text, colour in ((task, (20, 20, 20)), (f"<reason> {reasoning} </reason>" if reasoning else "", (170, 60, 20))):
        for line in wrap_text(text, font, 2 * px - 12)[:3]:
            pen.text((6, y), line, fill=colour, font=font)
            y += 16
    pen.text((6, px + 92), f"query states {note}", fill=(120, 120, 120), font=ImageFont.load_default(11))
    left, step = 6 + 90 + 110, (2 * px - 218) / len(weights)
    for i, w in enumerate(weights):
        pen.rectangle((left + i * step, px + 106 - 24 * float(w), left + (i + 0.7) * step, px + 106), fill=(40, 90, 170))
    return frame


def film(policy, cfg):
    """One episode -> GIF and contact sheet in cfg.out, and the reasoning on the screen."""
    if cfg.task:
        policy.tokenizer.prompt(cfg.task)  # complain about the words before anything moves
    env, cameras = real_arm(policy, cfg) if cfg.env == "real" else sim_env.make_env(cfg.env, policy.cfg.image_size), policy.cfg.cameras.split(",")
    if cfg.env == "real":
        obs, info = env.reset(options={"task": cfg.task})
    elif cfg.env == "sim" and cfg.task:
        obs, info = env.reset_for(cfg.task, cfg.seed, "tiny" if cfg.family == "tiny" else "sequence")
    else:
        obs, info = env.reset(seed=cfg.seed, options={"family": cfg.family, "split": cfg.split} | ({"task": cfg.task} if cfg.task else {}))
    print(f"instruction: {obs['task']}")
    frames, terminated, truncated, said = [], False, False, None
    while not terminated and not truncated:
        chunk, (reasoning,) = policy.act(*look(obs, policy), seed=cfg.seed + info["steps"])
        if reasoning != said:
            print(f"step {info['steps']:3d}  <reason> {reasoning} </reason>")
            said = reasoning
        weights = importance(policy, obs, chunk[0])
        for action in chunk[0, : policy.cfg.execute]:
            frames.append(draw_frame(env, cameras, obs["task"], reasoning, weights, f"(step {info['steps']})"))
            obs, _, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                break
    frames += [draw_frame(env, cameras, obs["task"], reasoning, weights, "success" if terminated else "out of time")] * sim_env.FPS
    env.close()  # the real arm does so at any exit
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    name = "_".join("".join(c if c.isascii() and c.isalnum() else " " for c in obs["task"]).split())[:60] or "task"
    palette = [f.quantize(128, dither=Image.Dither.NONE) for f in frames]
    palette[0].save(out / f"{name}.gif", save_all=True, append_images=palette[1:], duration=1000 // sim_env.FPS, loop=0)
    contact_sheet(frames).save(out / f"{name}.png")
    print(f"{'success' if terminated else 'stopped' if cfg.env == 'real' else 'no success'} after {info['steps']} steps; wrote {out / name}.gif and .png")
    return terminated


def contact_sheet(frames, columns=4, rows=4):
    """Evenly spaced frames in a grid."""
    picks = [frames[i] for i in np.linspace(0, len(frames) - 1, columns * rows).round().astype(int)]
    w, h = picks[0].size
    sheet = Image.new("RGB", (columns * w, rows * h))
    for i, frame in enumerate(picks):
        sheet.paste(frame, (i % columns * w, i // columns * h))
    return sheet.resize((columns * w // 2, rows * h // 2))


# ---------------------------------------------------------------------------------------------------------------
# Numbers


def evaluate(policy, cfg):
    """Success by family and split; eval.json in the run folder, or eval_<seeds>_<splits>.json where they are not all report ones."""
    families = (cfg.families or read_checkpoint_config(cfg.run).get("families", ",".join(sim_env.FAMILIES))).split(",")
    began = time.time()
    results = sim_env.evaluate(policy, families, cfg.eval, cfg.arms, cfg.seeds, cfg.splits.split(",") if cfg.splits else sim_env.SPLITS, cfg.env)
    path = Path(cfg.run, "_".join(["eval", *([cfg.seeds] if cfg.seeds != "report" else []), *cfg.splits.split(",")]).rstrip("_") + ".json")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)
    print(sim_env.table(results))
    print(f"{time.time() - began:.0f} s; wrote {path}")


def evaluate_real(policy, cfg):
    """Episodes on the real arm, each judged by a person; eval_real.json in the run folder."""
    policy.tokenizer.prompt(cfg.task)
    successes, steps = [], []
    with real_arm(policy, cfg) as env:
        while len(successes) < cfg.eval:
            input(f"episode {len(successes) + 1} of {cfg.eval}: lay out the scene, keep clear of the arm, press Enter. Ctrl-C ends the episode ")
            obs, info = env.reset(options={"task": cfg.task})
            truncated = False
            try:
                while not truncated:
                    chunk, _ = policy.act(*look(obs, policy), seed=cfg.seed + info["steps"])
                    for action in chunk[0, : policy.cfg.execute]:
                        obs, _, _, truncated, info = env.step(action)
                        if truncated:
                            break
            except KeyboardInterrupt:
                print()
            while (answer := input("success? y or n: ").strip().lower()) not in ("y", "n"):
                pass
            successes.append(answer == "y")
            steps += [info["steps"]] * successes[-1]
    low, high = sim_env.wilson(sum(successes), cfg.eval)
    results = {"real": {"id": {"success": sum(successes) / cfg.eval, "n": cfg.eval, "low": low, "high": high, "target_at_0": None, "reasoning": None,
                               "steps": float(np.mean(steps)) if steps else None, "task": cfg.task}}}  # fmt: skip
    path = Path(cfg.run, "eval_real.json")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)
    print(f"{100 * sum(successes) / cfg.eval:.1f} % of {cfg.eval} (95 % interval {100 * low:.1f} - {100 * high:.1f}); wrote {path}")


def replay(policy, cfg):
    """Open-loop error per joint on recorded frames: the first thing to look at when a policy does nothing."""
    folder = cfg.data or read_checkpoint_config(cfg.run)["data"]
    episodes = Episodes(folder, policy.cfg)
    motors = policy.cfg.motors.split(",")
    rng = np.random.default_rng(0)
    picks = rng.choice(len(episodes), min(400, len(episodes)), replace=False)
    errors, valid = [], []
    for part in np.array_split(picks, max(1, len(picks) // 40)):
        batch = episodes.samples(policy.tokenizer, part)
        chunk, _ = policy.act(batch["images"], batch["state"], [episodes.reason_at(i)[0] for i in part])
        errors.append(np.abs(chunk - batch["actions"].numpy()))
        valid.append(batch["valid"].numpy())
    errors, valid = np.concatenate(errors), np.concatenate(valid)  # (n, H, A), (n, H)
    print(f"mean absolute error of the predicted chunk on {len(picks)} recorded frames, by step of the chunk:")
    print(f"{'':14s}" + "".join(f"{'t+' + str(h):>8s}" for h in range(errors.shape[1])) + "    mean")
    for j, motor in enumerate(motors):
        row = [errors[valid[:, h], h, j].mean() for h in range(errors.shape[1])]
        print(f"{motor:14s}" + "".join(f"{e:8.2f}" for e in row) + f"{errors[..., j][valid].mean():8.2f}")
    episode = episodes.episodes[int(rng.integers(len(episodes.episodes)))]
    first = episodes.frames.index(episode["start"])
    shown = range(first, first + episode["length"], policy.cfg.execute)
    batch = episodes.samples(policy.tokenizer, shown)
    chunk, _ = policy.act(batch["images"], batch["state"], [episode["task"]] * len(shown))
    truth = episodes.action[episode["start"] : episode["start"] + episode["length"]]
    path = Path(cfg.out) / "replay.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_replay(truth, chunk, policy.cfg.execute, motors, episode["task"]).save(path)
    print(f"wrote {path}: one episode, recorded actions in grey, predicted chunks in blue")


def plot_replay(truth, chunks, every, motors, title, width=640, height=110):
    """truth (n, A), chunks (k, H, A) that begin every `every` steps -> a picture with one strip per joint."""
    picture = Image.new("RGB", (width, height * len(motors) + 24), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((6, 4), title, fill="black")
    for j, motor in enumerate(motors):
        top = 24 + j * height
        low, high = min(truth[:, j].min(), chunks[..., j].min()), max(truth[:, j].max(), chunks[..., j].max()) + 1e-6
        point = lambda step, value: (90 + step / len(truth) * (width - 100), top + height - 10 - (value - low) / (high - low) * (height - 20))  # noqa: B023
        pen.text((6, top + height // 2 - 6), motor, fill="black")
        pen.line([point(s, v) for s, v in enumerate(truth[:, j])], fill=(150, 150, 150), width=4)
        for k, chunk in enumerate(chunks):
            line = [point(k * every + s, v) for s, v in enumerate(chunk[:, j]) if k * every + s < len(truth)]
            if len(line) > 1:
                pen.line(line, fill=(40, 90, 170), width=2)
    return picture


def read_pictures(policy, paths):
    """Picture files -> one batch row (1, n, h, w, 3) uint8 as the policy takes them, or a ValueError."""
    pictures = []
    for path in paths:
        try:
            pictures.append(Image.open(path).convert("RGB"))
        except (OSError, Image.DecompressionBombError) as e:
            raise ValueError(f"{path} is no picture that can be read ({str(e).splitlines()[0]})") from None
    c = policy.cfg
    if not c.backbone and len(pictures) != c.views:
        raise ValueError(f"this policy looks through {c.cameras}: give {c.views} pictures, --image={','.join(f'{name}.png' for name in c.cameras.split(','))}")
    side = min(1024, max(pictures[0].size))
    if not c.backbone:  # SmolVLM's own preparation takes any shape; a wrapped model gets a square
        shape = (c.image_size, c.image_size)
    else:
        shape = (side, side) if c.wrapped else pictures[0].size
    return np.stack([np.asarray(p if p.size == shape else p.resize(shape, Image.Resampling.LANCZOS)) for p in pictures])[None]


def ask(policy, cfg):
    """Answer a question about pictures, or about the scene of --seed; its picture is saved so that the answer can be checked."""
    if cfg.image:
        (answer,) = policy.answer(read_pictures(policy, cfg.image.split(",")), [cfg.ask], limit=max(24, policy.cfg.max_thought))
        return print(f"{cfg.ask}\n{answer}")
    env = sim_env.make_env(cfg.env, policy.cfg.image_size)
    obs, _ = env.reset(seed=cfg.seed, options={"family": "sequence" if cfg.env == "sim" else cfg.family})
    (answer,) = policy.answer(look(obs, policy)[0], [cfg.ask])
    path = Path(cfg.out) / f"scene_{cfg.seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.hstack([env.render(384, camera) for camera in sim_env.environment(cfg.env).cameras])).save(path)
    env.close()
    print(f"{cfg.ask}\n{answer}\n(the scene is in {path})")


def main(argv=None):
    cfg = parse_config(SampleConfig, PRESETS, sys.argv[1:] if argv is None else argv, positional="task")
    fast_cpu(cfg.threads)
    try:
        policy, trained = load_policy(cfg.run), read_checkpoint_config(cfg.run)
        cfg.env = cfg.env or trained.get("env", "sim")
        cfg.family = cfg.family or trained.get("families", "place").split(",")[0]
        if cfg.env != "real" and not (cfg.image or cfg.replay):  # complain before anything is simulated
            sim_env.views_of(policy, cfg.env)
            sim_env.check_families([cfg.family], cfg.env)
        (evaluate_real if cfg.eval and cfg.env == "real" else evaluate if cfg.eval else replay if cfg.replay else ask if cfg.ask else film)(policy, cfg)
    except (ValueError, FileNotFoundError, RuntimeError) as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
