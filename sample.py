"""Run a trained policy: films, success tables, questions, open-loop replay.

    python sample.py "put the red cube on the blue pad"      # a film of the newest policy
    python sample.py --config small --eval=300                # success by family and split, eval.json
    python sample.py --config small --ask="which pad is blue"                      # a question about a scene
    python sample.py --config base --ask="what is on the table" --image=x.png      # or about a picture
    python sample.py --config small --replay                  # open-loop error on recorded episodes
    python sample.py --config small --interactive             # type instructions, also in mid motion
    python sample.py --config small --eval=300 --mode=wait,async --delay=0,4       # success against delay
    python sample.py --config small --env=real --port=/dev/ttyACM0 --front=0 --wrist=2 "stack the cubes"

A checkpoint folder is all that a policy needs. Only --replay reads the data set, to compare with recorded
actions. The last three commands need extras/realtime.py, the very last one also extras/real_env.py.
"""

import sys
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from common import (
    UserError,
    check_options,
    check_readable,
    fast_cpu,
    opt,
    parse_config,
    read_checkpoint_config,
    run_program,
)
from data import Episodes
from evaluate import (
    EVAL,
    Episode,
    PolicyFn,
    SingleEnv,
    camera_indices,
    check_families,
    draw_frame,
    environment_class,
    evaluate,
    make_env,
    policy_fn,
    report,
    run_episodes,
    save_film,
    summarise,
)
from model import SHIPPED, SyVLA, all_presets, checkpoint_folder, load_policy
from sim_env import FPS, SEEDS, SPLITS, resize_image

MODES = ("wait", "naive", "async", "async+rtc")  # extras/realtime.py explains them

# What some options need: something that moves, a scene, the real arm, see common.check_needs()
MOVING = ("not replay", "not ask")
SCENE = ("not replay", "not image", "not env=real")
REAL = "env=real"


@dataclass
class SampleConfig:
    """The command line."""

    config: str = opt("", "preset whose run is used (default: the newest policy under out/)", needs="not run")
    run: str = opt("", "checkpoint folder, or a policy in one file (default: out/<config>)")
    env: str = opt(
        "", "sim, real or package.module:Class (default: as trained for)", needs=("not replay", "not image")
    )
    # what is played
    task: str = opt(
        "",
        "instruction; without one the environment draws it",
        needs=("not replay", "not interactive", "not ask|env=real", "not eval|env=real"),
    )
    seed: int = opt(
        SEEDS["report"].start,
        "scene of a film or question; report seeds start here",
        "[0, 4294967295]",
        needs=("not replay", "not image", "not eval|env=real"),
    )
    eval: int = opt(0, "episodes per family and split; on the real arm a person judges them", EVAL)
    families: str = opt(
        "", "task families, with commas; a film takes the first (default: the run's)", needs=SCENE, many=True
    )
    splits: str = opt(
        "",
        "kinds of scenes, with commas; a film takes the first (default: all; films: id)",
        SPLITS,
        needs=SCENE,
        many=True,
    )
    seeds: str = opt(
        "report",
        "scenes of --eval; val: to choose between policies",
        ("report", "val"),
        needs=("eval", "not env=real"),
    )
    reasoning: str = opt(
        "own",
        "whose reasoning the policy acts on in --eval",
        ("own", "teacher"),
        needs=("eval", "not mode", "not delay", "not moved", "not env=real"),
    )
    # reasoning while acting, see extras/realtime.py
    mode: str = opt(
        "", "reasoning while acting; with commas for --eval, see docs/realtime.md", MODES, MOVING, True
    )
    delay: str = opt(
        "",
        "control steps from a picture to the reasoning; with commas for --eval",
        "[0, 10000]",
        MOVING,
        True,
    )
    moved: int = opt(
        0,
        "the simulation moves the cube at about this control step; 0: never",
        "[0, 10000]",
        needs=(*MOVING, "not env=real"),
    )
    interactive: bool = opt(
        False, "type instructions, also in mid motion", needs=("not eval", "not replay", "not ask")
    )
    # questions and recordings
    ask: str = opt(
        "", "a question about the scene of --seed, or about --image", needs=("not eval", "not replay")
    )
    image: str = opt("", "picture files for --ask, with commas", needs="ask")
    replay: bool = opt(False, "open-loop error per joint on recorded episodes, with a plot", needs="not eval")
    # the real arm, see docs/real_arm.md
    port: str = opt("", "serial port of the real arm (lerobot-find-port)", needs=REAL)
    id: str = opt(
        "", "LeRobot's robot id, whose calibration is used; not needed if there is only one", needs=REAL
    )
    front: str = opt(
        "", "front camera of the real arm: number or path (lerobot-find-cameras opencv)", needs=REAL
    )
    wrist: str = opt("", "wrist camera of the real arm", needs=REAL)
    dry_run: bool = opt(False, "real arm: look and reason, but only print what would be sent", needs=REAL)

    def __post_init__(self):
        check_options(self)
        if "," in self.mode + self.delay and not self.eval:
            raise UserError("several entries of --mode or --delay make a table: add --eval=300")

    @property
    def scene(self) -> dict[str, str]:
        """Options of reset() for a film."""
        family = self.families.split(",")[0]
        split = self.splits.split(",")[0] or "id"
        options = {"family": family, "split": split}
        if self.task:  # environments of one's own may not know this option
            options["task"] = self.task
        return options


# ------------------------------------------------------------------------------------------------------------
# Acting


def single_env(policy: SyVLA, cfg: SampleConfig, judged: bool = False) -> SingleEnv:
    """One environment in this process. judged: the real arm, with a person who tells success from failure."""
    if cfg.env == "real":
        from extras.real_env import connect

        return connect(cfg, policy, judged, cfg.dry_run)
    options = {"moved": cfg.moved} if cfg.moved else {}  # an option of the simulation alone
    env = make_env(cfg.env, policy.cfg.image_size, **options)
    cameras = environment_class(cfg.env).cameras
    return SingleEnv(env, policy.cfg.image_size, cameras, policy.cfg.state_dim)


def choose_policy_fn(policy: SyVLA, cfg: SampleConfig) -> PolicyFn:
    """Synchronous acting, or where reasoning takes its time, a runner of extras/realtime.py."""
    if not (cfg.mode or cfg.delay or cfg.interactive or cfg.env == "real"):
        return policy_fn(policy, cfg.env)
    from extras.realtime import make_runner

    return make_runner(policy, cfg)


def importance(policy: SyVLA, obs: dict, actions: np.ndarray, text: str) -> np.ndarray:
    """How much each feature query state matters to the flow loss of the actions (h, A) just chosen.

    obs: of one arm, through the policy's cameras; text: its reasoning. -> gradient norms (Q,), the largest 1.
    """
    images, state = policy.check_inputs(obs["images"], obs["state"], obs["task"])
    _, query_states = policy.reason(images, obs["task"], [text])  # (1, Q, D)
    padding = policy.cfg.chunk_size - len(actions)
    chunk = np.pad(actions, ((0, padding), (0, 0)))[None]  # (1, H, A)
    chunk = policy.normalise(torch.as_tensor(chunk), "action")
    valid = torch.arange(policy.cfg.chunk_size)[None] < len(actions)  # (1, H)
    # 8 noise samples at fixed flow times: the same film has the same bars
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(1, 8, *chunk.shape[1:], generator=generator)  # (1, M, H, A)
    t = torch.linspace(0.1, 0.9, 8)[None]  # (1, M)
    state = policy.normalise(state, "state")  # (1, S)
    norms = policy.gradient_norms(query_states.clone(), state, chunk, valid, eps, t)  # (1, Q)
    return (norms[0] / norms.max().clamp(min=1e-9)).numpy()


class Film:
    """A policy_fn for a single arm that does one action a call and draws a frame of it."""

    def __init__(self, policy: SyVLA, vec: SingleEnv, cfg: SampleConfig):
        self.policy = policy
        self.vec = vec
        self.decide = choose_policy_fn(policy, cfg)
        self.views = camera_indices(policy, cfg.env)
        self.actions = []  # decided, but not done yet
        self.text = ""
        self.weights = []  # importance of the query states behind the actions
        self.frames = deque(maxlen=60 * FPS)  # a conversation keeps its last minute

    def __call__(self, obs: dict) -> tuple[np.ndarray, list[str]]:
        steps = self.vec.infos[0]["steps"]
        if not self.actions:
            actions, (text,) = self.decide(obs)  # (1, h, A)
            self.actions = list(actions[0])
            if len(self.actions) > 1:  # a runner's come one by one, perhaps from an older picture
                # the policy's cameras alone, in its order
                seen = obs | {"images": obs["images"][:, self.views]}
                self.weights = importance(self.policy, seen, actions[0], text)
            if text and text != self.text:
                print(f"step {steps:3d}  <reason> {text} </reason>", flush=True)
            self.text = text
        self.draw(f"(step {steps})")  # before the action is done
        return self.actions.pop(0)[None, None], [self.text]  # (1, 1, A)

    def draw(self, note: str) -> None:
        """Add a frame of the arm as it is now."""
        cameras = self.policy.cfg.camera_names
        shown = (self.vec.task[0], self.text, self.weights, note)
        self.frames.append(draw_frame(self.vec.env, cameras, *shown))

    def end(self, episode: Episode) -> None:
        """Show the last frame for a second."""
        outcome = "success" if episode.success else "no success"
        print(f"{outcome} after {episode.steps} steps", flush=True)
        self.actions = []  # the rest of the chunk was for this episode
        self.draw(outcome)
        self.frames.extend([self.frames[-1]] * (FPS - 1))


def film(policy: SyVLA, cfg: SampleConfig) -> None:
    """One episode, or with --interactive a conversation -> GIF and contact sheet, reasoning on the screen."""
    if cfg.task:
        policy.tokenizer.prompt(cfg.task)  # complain about the words before anything moves
    episodes = [Episode(cfg.seed, cfg.scene)]
    with single_env(policy, cfg) as vec, suppress(EOFError, KeyboardInterrupt):
        movie = Film(policy, vec, cfg)
        if cfg.interactive:
            from extras.realtime import TalkingEnv

            vec.env = TalkingEnv(vec.env, policy.tokenizer, cfg.seed)
            # one per instruction, as many as anybody will type; the end of the input raises EOFError
            episodes = [Episode(cfg.seed, cfg.scene) for _ in range(1000)]
        run_episodes(vec, episodes, movie, "", on_end=movie.end)
    if movie.frames:  # none, if nobody typed an instruction
        title = "conversation" if cfg.interactive else episodes[0].task
        path = save_film(movie.frames, Path(cfg.run, "sample"), title)
        print(f"wrote {path}.gif and .png")


# ------------------------------------------------------------------------------------------------------------
# Numbers


def evaluate_policy(policy: SyVLA, cfg: SampleConfig) -> None:
    """Success by family and split: a table, and eval.json in the run's folder.

    eval_<teacher>_<seeds>_<splits>.json where the reasoning, the seeds or the splits are not the usual ones.
    """
    teacher = cfg.reasoning == "teacher"
    if teacher and not (policy.cfg.reasoning and cfg.env == "sim"):
        raise UserError("only the simulation has a teacher, for policies that reason: leave --reasoning out")
    name = "eval" + "_teacher" * teacher + "_val" * (cfg.seeds == "val")
    splits = SPLITS
    if cfg.splits:
        splits = cfg.splits.split(",")
        name = "_".join((name, *splits))
    families = cfg.families.split(",")
    results = evaluate(policy, families, cfg.eval, cfg.seeds, splits, cfg.env, teacher)
    report(results, Path(cfg.run, f"{name}.json"))


def evaluate_real(policy: SyVLA, cfg: SampleConfig) -> None:
    """Episodes on the real arm, each judged by a person: a table, and eval_real.json in the run's folder."""
    policy.tokenizer.prompt(cfg.task)  # complain about the words before anything moves
    episodes = [Episode(cfg.seed, cfg.scene) for _ in range(cfg.eval)]
    with single_env(policy, cfg, judged=True) as vec:
        run_episodes(vec, episodes, choose_policy_fn(policy, cfg), "")
    # success alone: nobody knows what a teacher would reason
    cell = summarise(episodes) | {"task": cfg.task}
    report({"real": {"id": cell}}, Path(cfg.run, "eval_real.json"))


def replay(policy: SyVLA, cfg: SampleConfig) -> None:
    """Open-loop error per joint on recorded frames: the first thing to look at when a policy does nothing."""
    episodes = Episodes(read_checkpoint_config(cfg.run)["data"], policy.cfg)
    episodes.check_tasks(policy.tokenizer)

    def predict(picks: Any) -> tuple[np.ndarray, dict]:
        """Recorded frames by index -> the chunks (B, H, A) that the policy would do there, their batch."""
        batch = episodes.samples(policy.tokenizer, picks)
        tasks = [episodes.reason_at(i)[0] for i in picks]
        return policy.act(batch["images"], batch["state"], tasks)[0], batch

    rng = np.random.default_rng(0)
    n = min(400, len(episodes))
    frames = rng.choice(len(episodes), n, replace=False)
    errors = []
    for picks in np.array_split(frames, n // 40 + 1):
        chunk, batch = predict(picks)
        error = np.abs(chunk - batch["actions"].numpy())  # (B, H, A)
        error[~batch["valid"].numpy()] = np.nan  # behind the episode's end
        errors.append(error)
    table = np.nanmean(np.concatenate(errors), axis=0)  # (H, A)
    print(f"mean absolute error of the chunk on {n} recorded frames, by its control steps:")
    for motor, row in zip(policy.cfg.motor_names, table.T):
        print(f"{motor:14}", *(f"{error:7.2f}" for error in row))

    # one whole episode, to look at
    episode = episodes.episodes[int(rng.integers(len(episodes.episodes)))]
    first = episodes.frames.index(episode["start"])
    # chunks from the frames at which the policy would have decided
    every = policy.cfg.n_action_steps
    chunks, _ = predict(range(first, first + episode["length"], every))
    truth = episodes.action[episode["start"] :][: episode["length"]]  # (n, A)
    path = Path(cfg.run, "sample", "replay.png")
    path.parent.mkdir(exist_ok=True)
    plot_replay(truth, chunks, every, policy.cfg.motor_names).save(path)
    print(f"wrote {path}: one episode, recorded actions in grey, predicted chunks in blue, a strip per joint")


def plot_replay(truth: np.ndarray, chunks: np.ndarray, every: int, motors: list[str]) -> Image.Image:
    """truth (n, A), chunks (k, H, A) that begin every `every` control steps -> a strip per joint."""
    # One strip of 110 pixels per joint; the recording is as wide as the picture.
    px = 640 / len(truth)  # pixels of a control step
    strips = 110 * np.arange(len(motors))  # (A,) their upper ends
    shown = np.concatenate((truth, *chunks))  # (n + k H, A)
    scale = 80 / (np.ptp(shown, axis=0) + 1e-6)  # (A,) pixels of a unit
    base = strips + 95 + scale * shown.min(axis=0)  # (A,)
    picture = Image.new("RGB", (640, 110 * len(motors)), "white")
    pen = ImageDraw.Draw(picture)
    curves = [(k * every, chunk, "blue") for k, chunk in enumerate(chunks)]
    for first, values, colour in [*curves, (0, truth, "grey")]:
        x = px * np.arange(first, first + len(values))
        for y in (base - scale * values).T:  # downwards
            pen.line([*zip(x, y)], fill=colour, width=3)
    for motor, top in zip(motors, strips):
        pen.text((4, top), motor, fill="black")
    return picture


def ask(policy: SyVLA, cfg: SampleConfig) -> None:
    """Answer a question about pictures, or about the scene of --seed, which is saved to check the answer."""
    if cfg.image:
        pictures = read_pictures(policy, cfg.image.split(","))
        limit = max(24, policy.cfg.max_reasoning_tokens)
        (answer,) = policy.answer(pictures, [cfg.ask], limit)
        print(f"{cfg.ask}\n{answer}")
        return
    with single_env(policy, cfg) as vec:
        vec.reset([0], [cfg.seed], [cfg.scene])
        views = camera_indices(policy, cfg.env)
        images = vec.observe([0])["images"][:, views]
        (answer,) = policy.answer(images, [cfg.ask])
        path = Path(cfg.run, "sample", f"scene_{cfg.seed}.png")
        path.parent.mkdir(exist_ok=True)
        pictures = [vec.env.render(384, camera) for camera in policy.cfg.camera_names]
        Image.fromarray(np.hstack(pictures)).save(path)
    print(f"{cfg.ask}\n{answer}\n(the scene is in {path})")


def read_pictures(policy: SyVLA, paths: list[str]) -> np.ndarray:
    """Picture files -> (1, n, px, px, 3) uint8; UserError for files and numbers of files that do not fit."""
    cameras = policy.cfg.camera_names
    if not policy.cfg.backbone and len(paths) != len(cameras):
        raise UserError(f"a picture of each camera is needed: --image={','.join(cameras)} in that order")
    # a pretrained VLM prepares pictures of any size itself
    px = 768 if policy.cfg.backbone else policy.cfg.image_size
    pictures = []
    for path in paths:
        with check_readable(path, "choose another picture"):
            pictures.append(resize_image(Image.open(path), px, "stretch"))
    return np.stack(pictures)[None]  # (1, n, px, px, 3)


# ------------------------------------------------------------------------------------------------------------
# The program


def newest_run() -> str:
    """The newest policy under out/; before any training the one that ships with the repository."""
    # A run that has not saved a policy yet has a config alone; a kill may leave weights alone.
    saved = {}
    for path in Path("out").glob("*/config.json"):
        if path.with_name("model.safetensors").is_file():
            saved[path.stat().st_mtime] = path.parent
    if not saved:
        print(f"policy: {SHIPPED.name}, which ships with the repository (nothing was trained under out/ yet)")
        return str(SHIPPED)
    newest = saved[max(saved)]
    print(f"policy: {newest}")
    return str(newest)


def sample(cfg: SampleConfig) -> None:
    """Load the policy and do what the command line asks for."""
    fast_cpu()
    cfg.run = checkpoint_folder(cfg.run or (f"out/{cfg.config}" if cfg.config else newest_run()))
    policy = load_policy(cfg.run)
    trained = read_checkpoint_config(cfg.run)
    cfg.env = cfg.env or trained.get("env", "sim")
    cfg.families = cfg.families or trained.get("families", "place")
    if cfg.moved and cfg.env != "sim":
        raise UserError(f"only the simulation moves the cube, not --env={cfg.env}: leave --moved out")
    if not (cfg.image or cfg.replay):  # complain before anything moves
        camera_indices(policy, cfg.env)
        if cfg.env != "real":
            check_families(cfg.families.split(","), cfg.env)
    if cfg.eval and cfg.env == "real":
        evaluate_real(policy, cfg)
    elif cfg.eval and (cfg.mode or cfg.delay or cfg.moved):
        from extras.realtime import compare

        compare(policy, cfg, single_env(policy, cfg))
    elif cfg.eval:
        evaluate_policy(policy, cfg)
    elif cfg.replay:
        replay(policy, cfg)
    elif cfg.ask:
        ask(policy, cfg)
    else:
        film(policy, cfg)


def main(argv: list[str]) -> None:
    presets = {name: {} for name in all_presets()}  # a checkpoint knows all its settings
    run_program(sample, parse_config(SampleConfig, presets, argv, positional="task"))


if __name__ == "__main__":
    main(sys.argv[1:])
