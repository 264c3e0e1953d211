"""Run a trained policy: films, success tables, questions, open-loop replay.

    python sample.py --config small "put the red cube on the blue pad"    # a GIF and a contact sheet, reasoning drawn in
    python sample.py --config small --eval 300                            # success by family and split, eval.json
    python sample.py --config small --ask "which pad is blue"             # a question about a scene
    python sample.py --config base --ask "what is on the table" --image x.png    # or about a picture of yours
    python sample.py --config small --replay                              # open-loop error per joint on recorded episodes
    python sample.py --config small --env=real --port=/dev/ttyACM0 --front=0 --wrist=2 --dry_run "put the red cube on the blue pad"
    python sample.py --config small --interactive                         # type instructions, also while the arm moves
    python sample.py --config small --eval 300 --families=place --mode=wait,naive,async,async+rtc --delay=0,1,2,4,8    # success against the VLM's delay

A checkpoint folder is all that a policy needs; only --replay reads the data set, because it compares with recorded actions.
"""

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import torch
from PIL import Image, ImageDraw
import real_env
import sim_env
from data import Episodes
from model import fast_cpu, opt, parse_config, read_checkpoint_config


@dataclass
class SampleConfig:
    config: str = opt("small", "preset whose run is used")
    run: str = opt("", "checkpoint folder (default out/<config>)")
    env: str = opt(
        "",
        "sim; real: an SO-100 or SO-101 (with a task, or --interactive; --eval=N to judge N episodes yourself); or package.module:Class (default: as trained for)",
    )
    task: str = opt("", "instruction; without one the environment draws it")
    family: str = opt(
        "",
        "task family when the environment draws the instruction (default: the first that the policy was trained on)",
    )
    split: str = opt("id", "id, ood_position or ood_instruction, when the environment draws the instruction")
    seed: int = opt(2_000_000, "scene seed (report seeds start at 2000000), and of the sampler's noise")
    eval: int = opt(0, "closed-loop episodes per family and split; writes eval.json and prints the table")
    families: str = opt("", "families for --eval, with commas (default: those the run was trained on)")
    seeds: str = opt(
        "report", "scenes of --eval: report, for numbers to publish, or val, to choose between policies"
    )
    thoughts: str = opt(
        "own",
        "own, or for --eval in simulation teacher: at every look what a teacher would think, to tell failures of thinking from the hand's",
    )
    splits: str = opt(
        "", "splits for --eval, with commas (default: all three; id for a table of modes and delays)"
    )
    mode: str = opt(
        "", f"thinking while acting: {', '.join(MODES_AND_JOINS)}; several with commas make --eval a table"
    )
    delay: str = opt(
        "",
        "control steps from a picture to the thought about it, on a simulated clock; several with commas for --eval",
    )
    refresh: int = opt(
        0,
        "control steps between the pictures that the VLM thinks about, one at a time (default: the policy's execute)",
    )
    commit: int = opt(
        0, "control steps that the expert may take: so long a new plan leaves the arm to the running one"
    )
    execute: int = opt(0, "control steps between plans (default: the policy's)")
    moved: int = opt(
        0,
        "the simulation moves the cube to be fetched at about this control step; 0 never. --eval then measures reaction time",
    )
    patience: float = opt(1.0, "step limit of the simulation, as a multiple of the family's")
    interactive: bool = opt(False, "type instructions, also in mid motion")
    ask: str = opt("", "a question about the scene of --seed, or about --image")
    image: str = opt(
        "", "picture files for --ask, with commas; models trained from nothing want one for every camera"
    )
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
        if min(self.refresh, self.commit, self.execute, self.moved) < 0 or self.patience <= 0:
            raise ValueError(
                "refresh, commit, execute and moved count control steps (0 or more); patience is more than 0"
            )
        if unknown := [m for m in self.mode.split(",") if m not in ("", *MODES_AND_JOINS)]:
            raise ValueError(f"unknown mode {', '.join(unknown)}; choose from {', '.join(MODES_AND_JOINS)}")
        if not all(d.isdigit() for d in self.delay.split(",") if self.delay):
            raise ValueError(
                f"delay counts control steps, as in --delay=4 or --delay=0,1,2,4,8, not {self.delay!r}"
            )
        if not self.eval and "," in self.mode + self.delay:
            raise ValueError("several modes or delays make a table: add --eval=300")
        if self.seeds not in ("report", "val"):
            raise ValueError(f"seeds must be report or val, not {self.seeds!r}")
        if self.thoughts not in ("own", "teacher"):
            raise ValueError(f"thoughts must be own or teacher, not {self.thoughts!r}")
        if self.thoughts == "teacher" and (not self.eval or self.mode or self.env == "real"):
            raise ValueError(
                "the teacher thinks in simulation and for --eval without --mode alone: add --eval=300"
            )
        if self.image and not self.ask:
            raise ValueError("image goes with a question: add --ask=...")
        if unknown := [s for s in self.splits.split(",") if s not in ("", *sim_env.SPLITS)]:
            raise ValueError(f"unknown split {', '.join(unknown)}; choose from {', '.join(sim_env.SPLITS)}")


PRESETS = {"debug": {}, "tiny": {}, "small": {}, "base256": {}, "base": {}, "paper": {}}


def real_arm(policy, cfg):
    return real_env.by_flags(
        real_env.RealEnv, cfg, policy.cfg.cameras.split(","), px=policy.cfg.image_size, dry_run=cfg.dry_run
    )


# ---------------------------------------------------------------------------------------------------------------
# Film


def importance(policy, obs, chunk, states=None):
    """How much each feature query state (1, Q, D), by default those of obs, matters to the flow loss of the chunk just chosen:
    gradient norms (Q,), largest 1."""
    batch = look(obs, policy)
    images, state = policy.check_inputs(*batch)
    if states is None:
        _, states = policy.think(images, batch[2])
    generator = torch.Generator().manual_seed(0)
    eps, t = torch.randn(1, 8, *chunk.shape, generator=generator), torch.linspace(0.1, 0.9, 8)[None]
    action = policy.normalise(torch.as_tensor(chunk)[None], "action")
    norms = policy.gradient_norms(
        states.clone(),
        policy.normalise(state, "state").clone(),
        action,
        torch.ones(1, len(chunk), dtype=torch.bool),
        eps,
        t,
    )[0]
    return (norms / norms.max().clamp(min=1e-9)).numpy()


def film(policy, cfg):
    """One episode -> GIF and contact sheet in cfg.out, and the reasoning on the screen."""
    runner = runner_by_flags(policy, cfg)
    if cfg.task:
        policy.tokenizer.prompt(cfg.task)  # complain about the words before anything moves
    env = (
        real_arm(policy, cfg)
        if cfg.env == "real"
        else sim_env.make_env(cfg.env, policy.cfg.image_size, **scene_options(cfg))
    )
    cameras = policy.cfg.cameras.split(",")
    if cfg.env == "real":
        obs, info = env.reset(options={"task": cfg.task})
    elif cfg.env == "sim" and cfg.task:
        obs, info = env.reset_for(cfg.task, cfg.seed, "tiny" if cfg.family == "tiny" else "sequence")
    else:
        obs, info = env.reset(
            seed=cfg.seed,
            options={"family": cfg.family, "split": cfg.split} | ({"task": cfg.task} if cfg.task else {}),
        )
    print(f"instruction: {obs['task']}")
    frames, terminated, truncated, said, shown, weights = (
        [],
        False,
        False,
        None,
        None,
        np.zeros(policy.cfg.queries),
    )
    while not terminated and not truncated:
        actions, (reasoning,) = runner(batch_of_one(obs, policy))
        arm = runner.arms[0]
        if reasoning != said and arm.states is not None:
            print(f"step {info['steps']:3d}  <reason> {reasoning} </reason>")
            said = reasoning
        if arm.plans and arm.plans[-1] is not shown:
            shown = arm.plans[-1]
            weights = importance(policy, obs, shown.chunks.result()[0], arm.states[None])
        waits = "" if arm.log[-1][1] else ", waiting"
        frames.append(
            draw_frame(env, cameras, obs["task"], reasoning, weights, f"(step {info['steps']}{waits})")
        )
        obs, _, terminated, truncated, info = env.step(actions[0, 0])
    frames += [
        draw_frame(env, cameras, obs["task"], reasoning, weights, "success" if terminated else "out of time")
    ] * sim_env.FPS
    env.close()  # the real arm does so at any exit
    path = save_film(frames, cfg, obs["task"])
    print(
        f"{'success' if terminated else 'stopped' if cfg.env == 'real' else 'no success'} after {info['steps']} steps; wrote {path}.gif and .png"
    )
    return terminated


# ---------------------------------------------------------------------------------------------------------------
# Numbers


def evaluate(policy, cfg):
    """Success by family and split; eval.json in the run folder, or eval_<teacher>_<seeds>_<splits>.json where they are not all report ones, or not its own thoughts."""
    taught = cfg.thoughts == "teacher"
    if taught and not (policy.cfg.reasoning and cfg.env == "sim"):
        raise ValueError(
            f"there is no teacher's thought: --env is {cfg.env} and the policy {'thinks' if policy.cfg.reasoning else 'does not think'}; leave --thoughts out"
        )
    families = (
        cfg.families or read_checkpoint_config(cfg.run).get("families", ",".join(sim_env.FAMILIES))
    ).split(",")
    began = time.time()
    results = sim_env.evaluate(
        policy,
        families,
        cfg.eval,
        cfg.arms,
        cfg.seeds,
        cfg.splits.split(",") if cfg.splits else sim_env.SPLITS,
        cfg.env,
        taught,
    )
    path = Path(
        cfg.run,
        "_".join(
            [
                "eval",
                *(["teacher"] if taught else []),
                *([cfg.seeds] if cfg.seeds != "report" else []),
                *cfg.splits.split(","),
            ]
        ).rstrip("_")
        + ".json",
    )
    write_json(path, results)
    print(sim_env.table(results))
    print(f"{time.time() - began:.0f} s; wrote {path}")


def evaluate_real(policy, cfg):
    """Episodes on the real arm, each judged by a person; eval_real.json in the run folder."""
    policy.tokenizer.prompt(cfg.task)
    runner, successes, steps = runner_by_flags(policy, cfg), [], []
    with real_arm(policy, cfg) as env:
        while len(successes) < cfg.eval:
            input(
                f"episode {len(successes) + 1} of {cfg.eval}: lay out the scene, keep clear of the arm, press Enter. Ctrl-C ends the episode "
            )
            obs, info = env.reset(options={"task": cfg.task})
            truncated = False
            try:
                while not truncated:
                    actions, _ = runner(batch_of_one(obs, policy, len(successes)))
                    obs, _, _, truncated, info = env.step(actions[0, 0])
            except KeyboardInterrupt:
                print()
            while (answer := input("success? y or n: ").strip().lower()) not in ("y", "n"):
                pass
            successes.append(answer == "y")
            steps += [info["steps"]] * successes[-1]
    low, high = sim_env.wilson(sum(successes), cfg.eval)
    results = {
        "real": {
            "id": {
                "success": sum(successes) / cfg.eval,
                "n": cfg.eval,
                "low": low,
                "high": high,
                "target_at_0": None,
                "reasoning": None,
                "steps": float(np.mean(steps)) if steps else None,
                "task": cfg.task,
            }
        }
    }
    path = Path(cfg.run, "eval_real.json")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)
    print(
        f"{100 * sum(successes) / cfg.eval:.1f} % of {cfg.eval} (95 % interval {100 * low:.1f} - {100 * high:.1f}); wrote {path}"
    )


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
    print(
        f"mean absolute error of the predicted chunk on {len(picks)} recorded frames, by step of the chunk:"
    )
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
        low, high = (
            min(truth[:, j].min(), chunks[..., j].min()),
            max(truth[:, j].max(), chunks[..., j].max()) + 1e-6,
        )
        point = lambda step, value: (
            90 + step / len(truth) * (width - 100),
            top + height - 10 - (value - low) / (high - low) * (height - 20),
        )  # noqa: B023
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
        raise ValueError(
            f"this policy looks through {c.cameras}: give {c.views} pictures, --image={','.join(f'{name}.png' for name in c.cameras.split(','))}"
        )
    side = min(1024, max(pictures[0].size))
    if not c.backbone:  # SmolVLM's own preparation takes any shape; a wrapped model gets a square
        shape = (c.image_size, c.image_size)
    else:
        shape = (side, side) if c.wrapped else pictures[0].size
    return np.stack(
        [np.asarray(p if p.size == shape else p.resize(shape, Image.Resampling.LANCZOS)) for p in pictures]
    )[None]


def ask(policy, cfg):
    """Answer a question about pictures, or about the scene of --seed; its picture is saved so that the answer can be checked."""
    if cfg.image:
        (answer,) = policy.answer(
            read_pictures(policy, cfg.image.split(",")), [cfg.ask], limit=max(24, policy.cfg.max_thought)
        )
        return print(f"{cfg.ask}\n{answer}")
    env = sim_env.make_env(cfg.env, policy.cfg.image_size)
    obs, _ = env.reset(seed=cfg.seed, options={"family": "sequence" if cfg.env == "sim" else cfg.family})
    (answer,) = policy.answer(look(obs, policy)[0], [cfg.ask])
    path = Path(cfg.out) / f"scene_{cfg.seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.hstack([env.render(384, camera) for camera in sim_env.environment(cfg.env).cameras])
    ).save(path)
    env.close()
    print(f"{cfg.ask}\n{answer}\n(the scene is in {path})")


def main(argv=None):
    cfg = parse_config(SampleConfig, PRESETS, sys.argv[1:] if argv is None else argv, positional="task")
    fast_cpu(cfg.threads)
    try:
        policy, trained = load_policy(cfg.run), read_checkpoint_config(cfg.run)
        cfg.env = cfg.env or trained.get("env", "sim")
        cfg.family = cfg.family or trained.get("families", "place").split(",")[0]
        if not (cfg.image or cfg.replay):  # complain before anything moves
            sim_env.views_of(policy, "sim" if cfg.env == "real" else cfg.env)
            if cfg.env != "real":
                sim_env.check_families([cfg.family], cfg.env)
        if scene_options(cfg) and cfg.env != "sim":
            raise ValueError(f"--moved and --patience are the simulation's, --env={cfg.env} has none")
        if cfg.execute:
            policy.cfg = dataclasses.replace(policy.cfg, execute=cfg.execute)
        table = (
            evaluate_real
            if cfg.env == "real"
            else compare
            if cfg.mode or cfg.delay or cfg.moved
            else evaluate
        )
        (
            table
            if cfg.eval
            else replay
            if cfg.replay
            else ask
            if cfg.ask
            else interactive
            if cfg.interactive
            else film
        )(policy, cfg)
    except (ValueError, FileNotFoundError, RuntimeError) as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
