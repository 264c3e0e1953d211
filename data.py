"""Data: text tokens, packed sequences, demonstrations, questions, statistics.

A data set is a folder that numpy alone can read:

    meta.json     cameras, motors, state (names, where it is not the motors' positions), fps, statistics, what
                  made it, and for every episode start, length, task, success, seed, family, kind,
                  reason [[first step, text], ...] and disturbed [[first step, end], ...], the spans in
                  which the arm did not obey the actions
    front.npy     (frames, px, px, 3) uint8, one file per camera
    state.npy     (frames, S) float32, LeRobot units (degrees, gripper 0..100)
    action.npy    (frames, A) float32, target positions in the same units

A question set has the camera files and `questions.json`: per image a list of [kind, question, answer]. Where
a question comes with a single picture, meta.json lists the other views as "grey": they have no file and are
seen as plain grey.

Batches are a pure function of (seed, step): resuming needs no sampler state, and every process of a torchrun
job draws the same global batch and takes its own rows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common import (
    POINTS,
    UserError,
    as_array,
    as_floats,
    check_array,
    check_names,
    check_readable,
    check_robot,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    from model import Config

# -----------------------------------------------------------------------------------------------------------
# Text


class Tokenizer:
    """Words of the training text as single tokens, anything else as UTF-8 bytes: lossless for every string.

    A token carries the space before it, so that decode(encode(text)) == text. Token ids: specials, 256 bytes,
    words.
    """

    SPECIAL = (
        "<pad>",
        "<task>",  # an instruction follows
        "<reason>",  # its chain of thought follows
        "</reason>",  # the feature queries follow
        "<ask>",  # a question about the picture follows
        "<answer>",  # its answer follows
        "<end>",  # of an answer
    )
    PIECES = re.compile(r" ?\w+| ?[^\w\s]|\s")
    LONGEST = 128  # tokens of an instruction or question; the longest of ours has under 40
    start = image_open = image_close = ()  # nothing stands around the images

    def __init__(self, words: Iterable[str]):
        self.words = list(words)
        self.first_word = len(self.SPECIAL) + 256
        self.ids = {word: self.first_word + i for i, word in enumerate(self.words)}
        self.encoded = {}  # training meets the same few thousand sentences again and again
        self.task, self.reason, self.end_reasoning, self.ask, self.reply, self.end_answer = range(1, 7)

    @property
    def places(self) -> list[tuple[int, int, float]]:
        """(id, axis, place) of the words x0, x1, .. and y0, y1, .., which name columns and rows of a picture.

        axis 0 for a column, 1 for a row; place of its middle, -1 .. 1.
        """
        found = []
        for word, token in self.ids.items():
            if match := re.fullmatch(r" ([xy])(\d+)", word):
                place = (int(match[2]) + 0.5) / POINTS * 2 - 1
                found.append((token, "xy".index(match[1]), place))
        return found

    @property
    def scales(self) -> list[list[int]]:
        """Ids of t0, t1, .. and of r0, r1, .., which name directions and distances."""
        scales = []
        for letter in "tr":
            numbers = (f" {letter}{i}" for i in itertools.count())
            scale = [self.ids[word] for word in itertools.takewhile(self.ids.__contains__, numbers)]
            if scale:
                scales.append(scale)
        return scales

    @classmethod
    def train(cls, texts: Iterable[str], limit: int) -> Tokenizer:
        """The most frequent pieces of `texts`, so that the whole vocabulary has at most `limit` tokens."""
        counts = Counter()
        for text in texts:
            counts.update(cls.PIECES.findall(" " + text))
        # A rare piece stays bytes: its embedding would hardly be trained.
        frequent = sorted(piece for piece in counts if counts[piece] >= 20)
        frequent.sort(key=counts.get, reverse=True)  # a stable sort: pieces of one count stay in their order
        return cls(frequent[: limit - len(cls.SPECIAL) - 256])  # special tokens and bytes come first

    def __len__(self) -> int:
        return self.first_word + len(self.words)

    def encode(self, text: str) -> list[int]:
        """Any string -> token ids."""
        if text in self.encoded:
            return self.encoded[text]
        ids = []
        for piece in self.PIECES.findall(" " + text):
            if piece in self.ids:
                ids.append(self.ids[piece])
            else:  # a word that training has not met
                ids += [len(self.SPECIAL) + byte for byte in piece.encode("utf-8", "surrogatepass")]
        if len(self.encoded) < 1_000_000:  # people's words must not fill the memory
            self.encoded[text] = ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids -> string; special tokens are left out."""
        text = b""
        for i in ids:
            # The model's table of embeddings may have more rows than there are words.
            if self.first_word <= i < len(self):
                text += self.words[i - self.first_word].encode()
            elif len(self.SPECIAL) <= i < self.first_word:
                text += bytes([i - len(self.SPECIAL)])
        # A chain of thought that was cut off may end within a character.
        return text.decode("utf-8", "replace").removeprefix(" ")

    def encode_user_text(self, text: str, what: str) -> list[int]:
        """A user's words -> ids; UserError for words that are empty or too many."""
        if not text.strip():
            raise UserError(f'the {what} is empty; try "put the red cube on the blue pad"')
        # the form of the training text: lower case, punctuation apart
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        ids = self.encode(" ".join(words))
        if len(ids) > self.LONGEST:
            raise UserError(f"the {what} is {len(ids)} tokens long, at most {self.LONGEST} fit")
        return ids

    def prompt(self, task: str, reasoning: bool = True) -> list[int]:
        """Instruction -> the ids that the chain of thought follows; without reasoning the feature queries."""
        ids = [self.task, *self.encode_user_text(task, "instruction")]
        if reasoning:
            ids.append(self.reason)
        return ids

    def reasoning_ids(self, reasoning: str) -> list[int]:
        """A chain of thought as training target."""
        return [*self.encode(reasoning), self.end_reasoning]

    def question(self, question: str) -> list[int]:
        """Question -> the ids that the answer follows."""
        # An instruction as a question asks for its reasoning: questions and demonstrations train one skill.
        if question.startswith("<task>"):
            return self.prompt(question.removeprefix("<task>"))
        return [self.ask, *self.encode_user_text(question, "question"), self.reply]

    def answer(self, question: str, answer: str) -> list[int]:
        """The answer to a question as training target."""
        end = self.end_reasoning if question.startswith("<task>") else self.end_answer
        return [*self.encode(answer), end]

    def dumps(self) -> str:
        """What stands in a checkpoint's tokenizer.json."""
        return json.dumps(self.words)

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder; UserError where there is none or where it is another's."""
        path = Path(folder, "tokenizer.json")
        words = read_json(path, "run: python train.py --config small")
        strings = isinstance(words, list) and all(isinstance(word, str) for word in words)
        if not strings or len(set(words)) < len(words):
            raise UserError(f"{path} is no list of different words; choose another checkpoint")
        return Tokenizer(words)


Segment = tuple[list[int], list[int]]  # prompt ids, target ids


def pack(rows: list[list[Segment]]) -> dict[str, np.ndarray]:
    """Rows of (prompt ids, target ids) pairs -> padded arrays (B, T) int64; a pair is a segment."""
    B = len(rows)
    T = 0
    for row in rows:
        T = max(T, sum(len(prompt) + len(target) for prompt, target in row))
    tokens = np.zeros((B, T), np.int64)
    segments = np.full((B, T), -1)  # 1, 2, ...; -1: padding. A token attends to its own segment alone
    positions = np.zeros((B, T), np.int64)  # within the segment
    labels = np.full((B, T), -100)  # the next token where it is a target; -100 is torch's "no label"
    for b, row in enumerate(rows):
        start = 0
        for number, (prompt, target) in enumerate(row, 1):
            middle = start + len(prompt)
            end = middle + len(target)
            tokens[b, start:middle] = prompt
            tokens[b, middle:end] = target
            segments[b, start:end] = number
            positions[b, start:end] = np.arange(end - start)
            labels[b, middle - 1 : end - 1] = target  # what follows the token at this place
            start = end
    return {
        "tokens": tokens,
        "segments": segments,
        "positions": positions,
        "labels": labels,
    }


def to_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays of any layout -> tensors."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def flow_times(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random flow times in (0, 1], float32: more of them near noise (t = 1)."""
    # pi0 (Black et al., 2024) draws its times from this Beta distribution. Time 0 is left out: there is no
    # noise to remove.
    return rng.beta(1.5, 1.0, shape).astype(np.float32) * 0.999 + 0.001


# -----------------------------------------------------------------------------------------------------------
# Demonstrations


class Episodes:
    """Demonstrations: frames to draw action samples from."""

    def __init__(self, folder: str | Path, cfg: Config, families: list[str] | None = None):
        """Open a data set; UserError shows both sides of what does not fit the model. families None: all."""
        # Everything is checked here: a training must not fail at a frame that it meets after hours.
        self.cfg = cfg
        self.folder = folder
        self.meta = read_meta(folder)
        self.images = open_images(folder, self.meta, cfg)  # per camera (frames, px, px, 3)
        self.state = open_array(folder, "state")  # (frames, S)
        self.action = open_array(folder, "action")  # (frames, A)
        arrays = dict(zip(cfg.camera_names, self.images))
        arrays["state"] = self.state
        arrays["action"] = self.action
        check_set(folder, self.meta, arrays)
        names = column_names(self.meta)
        check_robot(str(folder), cfg, names["action"], names["state"], self.meta["fps"])
        self.episodes = usable_episodes(folder, self.meta, families)
        self.cache = None  # of a frozen VLM's query states, see cache_query_states()

        rows = []  # per frame: its row in the arrays, its step, the row at which its chunk ends, its episode
        weights = []
        for number, episode in enumerate(self.episodes):
            start = episode["start"]
            changes = [step for step, _ in episode["reason"]]
            for step in range(episode["length"]):
                rows.append((start + step, step, start + chunk_end(episode, step), number))
                # Only the frames at which a new reasoning begins need the words: in later ones the arm's own
                # motion gives the target away. Drawing them more often makes the policy listen.
                new = any(0 <= step - change < 3 for change in changes)
                weights.append(3.0 if new else 1.0)
        self.rows = np.array(rows)  # (N, 4)
        self.frames, _, _, self.episode_of = self.rows.T.tolist()
        self.cumulative = np.cumsum(weights) / np.sum(weights)  # (N,), the last one is 1

    def __len__(self) -> int:
        return len(self.frames)

    def reason_at(self, i: int) -> tuple[str, str]:
        """(task, reasoning) of the i-th frame."""
        _, step, _, number = self.rows[i]
        episode = self.episodes[number]
        reasoning = ""
        for first, text in episode["reason"]:
            if first <= step:  # the last one that has begun holds
                reasoning = text
        return episode["task"], reasoning

    def home(self) -> str:
        """Where demonstrations begin: the median of their first states, with commas; "" if there are none."""
        # A `start` episode begins anywhere.
        first = [episode["start"] for episode in self.episodes if episode.get("kind") != "start"]
        if not first:
            return ""
        middle = np.median(self.state[first], axis=0)  # (S,)
        return ",".join(f"{number:.6g}" for number in middle)

    def check_tasks(self, tokenizer: Tokenizer) -> None:
        """UserError names the episode whose instruction or reasoning the model cannot take."""
        limit = 4 * tokenizer.LONGEST  # a reasoning may be longer than an instruction
        for episode in self.episodes:
            try:
                tokenizer.prompt(episode["task"], self.cfg.reasoning)
                for _, text in episode["reason"]:
                    if self.cfg.reasoning and len(tokenizer.reasoning_ids(text)) > limit:
                        raise UserError(f"a reasoning is too long, at most {limit} tokens fit")
            except UserError as error:
                number = self.meta["episodes"].index(episode)
                raise UserError(f"{self.folder}/meta.json: episode {number}: {error}") from None

    def texts(self) -> list[str]:
        """Every task and reasoning, for the tokenizer."""
        found = []
        for episode in self.episodes:
            found += [episode["task"], *(text for _, text in episode["reason"])]
        return found

    def batch(
        self, tokenizer: Tokenizer, rng: np.random.Generator, n: int, rows: slice = slice(None)
    ) -> dict[str, Tensor]:
        """n random frames as an action batch (the keys of SyVLA.forward); only `rows` of it are built."""
        cfg = self.cfg
        M = cfg.noise_samples
        # All random numbers are drawn for the whole batch, so that every process of a job agrees on them.
        picks = np.searchsorted(self.cumulative, rng.random(n))  # (n,), by the frames' weights
        eps = rng.standard_normal((n, M, cfg.chunk_size, cfg.action_dim), dtype=np.float32)
        t = flow_times(rng, (n, M))
        uniform = rng.random((n, cfg.queries), dtype=np.float32)
        older = None
        if cfg.stale:
            older = rng.integers(cfg.stale + 1, size=n)[rows]
        noise = {
            "eps": eps[rows],  # (B, M, H, A), the noise
            "t": t[rows],  # (B, M), flow times: 1 is noise, 0 is data
            "uniform": uniform[rows],  # (B, Q), for the control that drops queries at random
        }
        return self.samples(tokenizer, picks[rows], older) | to_tensors(noise)

    def samples(
        self, tokenizer: Tokenizer, picks: Sequence[int], older: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """Frames by index -> a batch: images, text, state (B, S), actions (B, H, A), valid (B, H).

        older (B,): images and text are those of so many control steps before, or of the episode's start;
        "age" (B,) says how many. Where query states are cached, "query_states" (B, Q, D) stand in place of
        images and text.
        """
        frames, since_start, end, _ = self.rows[picks].T  # (B,) each
        batch = {}
        seen = picks  # the frames whose pictures and text the VLM gets
        if older is not None:
            batch["age"] = np.minimum(older, since_start)
            seen = np.subtract(picks, batch["age"])
        # the chunk from each frame on; behind its end the last action is repeated and not valid
        steps = frames[:, None] + np.arange(self.cfg.chunk_size)  # (B, H)
        last = end[:, None] - 1  # (B, 1)
        batch["state"] = self.state[frames]  # (B, S)
        batch["actions"] = self.action[np.minimum(steps, last)]  # (B, H, A)
        batch["valid"] = steps <= last  # (B, H)
        if self.cache is None:
            batch |= self.prompts(tokenizer, seen)
        else:
            batch["query_states"] = self.cached_query_states(tokenizer, seen)
        return to_tensors(batch)

    def prompts(self, tokenizer: Tokenizer, picks: Sequence[int]) -> dict[str, np.ndarray]:
        """What the VLM gets of frames by index: images (B, V, px, px, 3), and text as pack() makes it."""
        rows = []
        for i in picks:
            task, reasoning = self.reason_at(i)
            prompt = tokenizer.prompt(task, self.cfg.reasoning)
            target = []
            if self.cfg.reasoning:
                target = tokenizer.reasoning_ids(reasoning)
            rows.append([(prompt, target)])
        return pack(rows) | {"images": pictures(self.images, self.rows[picks, 0])}

    def cache_query_states(self, path: Path, shape: tuple[int, int], query_states_of: Callable) -> None:
        """From now on keep a frozen VLM's query states in a file, each frame's when it is first drawn.

        query_states_of: prompts() as tensors -> query states (B, Q, D); shape: (Q, D).
        """
        record = np.dtype([("known", bool), ("states", np.float16, shape)])  # no kill parts the two
        if not path.is_file():
            temporary = f"{path}.tmp{os.getpid()}"  # several processes may come here at once
            # A sparse file: a frame takes no room on the disk until it is drawn.
            np.lib.format.open_memmap(temporary, "w+", record, (len(self.state),))
            os.replace(temporary, path)
        self.cache = np.load(path, mmap_mode="r+")
        self.query_states_of = query_states_of

    def cached_query_states(self, tokenizer: Tokenizer, picks: np.ndarray) -> np.ndarray:
        """Query states (B, Q, D) float32 of frames by index, computed where the cache has none yet."""
        frames = self.rows[picks, 0]  # (B,)
        new = np.flatnonzero(~self.cache["known"][frames])  # rows of the batch
        if len(new):
            states = self.query_states_of(to_tensors(self.prompts(tokenizer, picks[new])))
            self.cache["states"][frames[new]] = states.cpu().numpy()
            self.cache["known"][frames[new]] = True
        return self.cache["states"][frames].astype(np.float32)


def pictures(views: list[np.ndarray], frames: Sequence[int]) -> np.ndarray:
    """Some frames of all cameras' arrays -> (B, V, px, px, 3)."""
    return np.stack([view[frames] for view in views], axis=1)


def chunk_end(episode: dict, step: int) -> int:
    """The step at which a chunk that starts at `step` of an episode must end."""
    # After a disturbance the recorded actions react to it. They cannot be predicted from this frame, so the
    # target chunk ends with the first disturbed step.
    end = episode["length"]
    for first, last in episode.get("disturbed", ()):
        if step < last:
            end = min(end, max(step, first) + 1)
    return end


# -----------------------------------------------------------------------------------------------------------
# Questions


class Questions:
    """Pictures with questions and answers: for the mix, and held out as a test of language ability."""

    def __init__(self, folder: str | Path, cfg: Config):
        """Open a question set; UserError shows both sides of what does not fit the model."""
        self.path = Path(folder, "questions.json")
        self.meta = read_meta(folder, questions=True)
        self.images = open_images(folder, self.meta, cfg)
        self.questions = read_json(self.path)
        check_questions(self.path, self.questions)
        names = ["questions", *cfg.camera_names]
        check_lengths(str(self.path), dict(zip(names, [self.questions, *self.images])))
        self.scenes = np.arange(len(self.questions))

    def drop_long(self, tokenizer: Tokenizer) -> None:
        """Leave out questions and answers that the model is too small for, and pictures left without one."""

        def fits(question: str, answer: str) -> bool:
            if len(answer.encode()) > 4 * tokenizer.LONGEST:
                return False
            # Encoding all questions takes long. A byte with its space is two tokens at most.
            if 2 * len(question.encode()) <= tokenizer.LONGEST:
                return True
            try:
                return bool(tokenizer.question(question))
            except UserError:
                return False

        kept = []
        for scene in self.questions:
            kept.append([item for item in scene if fits(*item[1:])])
        self.questions = kept
        self.scenes = np.flatnonzero(list(map(len, kept)))
        if not len(self.scenes):
            raise UserError(
                f"{self.path} has no question of at most {tokenizer.LONGEST} tokens: "
                "make the set with prepare.py --longest=100"
            )

    def texts(self) -> list[str]:
        """Every question and answer, for the tokenizer."""
        found = []
        for scene in self.questions:
            for _, question, answer in scene:
                found += [question.removeprefix("<task>"), answer.removeprefix("<task>")]
        return found

    def batch(
        self,
        tokenizer: Tokenizer,
        rng: np.random.Generator,
        n: int,
        room: int,
        rows: slice = slice(None),
    ) -> dict[str, Tensor]:
        """n random pictures, each with as many random questions as fit into `room` tokens.

        Only `rows` of the batch are built.
        """
        picks = self.scenes[rng.integers(len(self.scenes), size=n)[rows]]  # (B,)
        # A picture has few questions or many: a seed of its own keeps all later draws where they are.
        seeds = rng.integers(2**31, size=n)[rows]
        packed = []
        for scene, seed in zip(picks, seeds):
            pool = self.questions[scene]
            order = np.random.default_rng(seed).permutation(len(pool))
            shuffled = [pool[i] for i in order]
            packed.append(fill_row(tokenizer, shuffled, room))
        return to_tensors(pack(packed) | {"images": pictures(self.images, picks)})

    def accuracy(self, answer: Callable, n: int = 2000, batch: int = 50) -> dict[str, dict]:
        """Exact-match accuracy per kind, on n fixed random questions; answer(images, questions) -> strings.

        -> {kind: {"accuracy", "n"}, ..., "all": ...}
        """
        items = []
        for scene, asked in enumerate(self.questions):
            items += [(scene, *item) for item in asked]
        chosen = np.random.default_rng(0).permutation(len(items))[:n]
        items = [items[i] for i in chosen]
        items.sort(key=lambda item: len(item[2]))  # rows of like length decode together without waste
        hits = defaultdict(list)  # kind -> whether each answer was right
        for start in range(0, len(items), batch):
            scenes, kinds, questions, truths = zip(*items[start : start + batch])
            images = pictures(self.images, list(scenes))
            answers = answer(images, list(questions))
            for kind, truth, said in zip(kinds, truths, answers):
                hits[kind].append(said == truth)
                hits["all"].append(said == truth)
        result = {}
        for kind, right in sorted(hits.items()):
            result[kind] = {"accuracy": sum(right) / len(right), "n": len(right)}
        return result


def fill_row(tokenizer: Tokenizer, items: list[list[str]], room: int) -> list[Segment]:
    """As many of [kind, question, answer] in their order as fit into `room` tokens, and one at least."""
    row = []
    for _, question, answer in items:
        prompt = tokenizer.question(question)
        target = tokenizer.answer(question, answer)
        length = len(prompt) + len(target)
        if not row or length <= room:
            row.append((prompt, target))
            room -= length
    return row


# -----------------------------------------------------------------------------------------------------------
# Data sets on disk


SET = ("cameras", "motors", "fps", "statistics", "episodes")  # what meta.json must hold
# What an entry of its episodes must hold, and what it may hold besides
EPISODE = {
    "start": int,  # row of its first frame in the arrays
    "length": int,  # frames
    "task": str,  # the instruction
    "reason": list,  # [[first step, text], ...]
    "success": bool,  # failures are not learnt from
}
OPTIONAL = {
    "family": str,  # of tasks, for --families
    "kind": str,  # "demo", or "start": a few good steps
    "disturbed": list,  # [[first step, end], ...], where the arm did not obey the actions
}


def read_meta(folder: str | Path, questions: bool = False) -> dict:
    """meta.json of a data set, or of a question set, which needs no more than cameras.

    UserError says what to type where there is none, and names the entry that cannot be.
    """
    path = Path(folder, "meta.json")
    if not path.is_file():
        raise UserError(f"{folder} is no data set (no meta.json); run: python prepare.py --config small")
    meta = read_json(path)
    needed = SET
    if questions:
        needed = ("cameras",)
    check_meta(str(path), meta, needed)
    return meta


def check_keys(where: str, entry: Any, needed: Iterable[str]) -> None:
    """UserError unless this is a JSON object with the needed keys."""
    missing = [key for key in needed if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; docs/data.md lists what it must hold")


def check_meta(where: str, meta: Any, needed: Sequence[str]) -> None:
    """The entries of meta.json, without its statistics and episodes."""
    check_keys(where, meta, needed)
    for key in ("cameras", "grey", "motors", "state"):
        if key in needed or meta.get(key):
            check_names(f"{where}: {key}", meta[key])
    if {"state", "action"} & set(meta["cameras"]):
        raise UserError(f"{where}: a camera cannot be named state or action, as other arrays of the set are")
    if "fps" in needed:
        fps = meta["fps"]
        if type(fps) not in (int, float) or not 1 <= fps <= 10_000 or fps != int(fps):
            raise UserError(f"{where}: fps must be a whole number above 0, not {fps!r}")
        meta["fps"] = int(fps)  # other programs write 30.0


def column_names(meta: dict) -> dict[str, list[str]]:
    """{array: names of its columns}; a state without names is the motors' positions."""
    motors = meta["motors"]
    return {
        "state": meta.get("state") or motors,
        "action": motors,  # targets of the motors' positions
    }


def open_images(folder: str | Path, meta: dict, cfg: Config) -> list[np.ndarray]:
    """The camera arrays (frames, px, px, 3) of a set, memory-mapped, in the model's order.

    Views that a set lists as grey have no file and are plain grey. UserError shows both sides of a misfit.
    """
    wanted = cfg.camera_names
    grey = meta.get("grey", [])
    stored = {}
    for camera in wanted:
        if camera in meta["cameras"] and camera not in grey:
            stored[camera] = open_images_of(folder, camera, cfg.image_size)
    if not stored or not set(wanted) <= set(meta["cameras"]):
        raise UserError(
            f"{folder} has cameras {meta['cameras']} (without pictures: {grey}), the model wants {wanted}; "
            "set --cameras, choose another --data, or add --mix=0 to train without questions"
        )
    some = next(iter(stored.values()))
    blank = np.broadcast_to(np.uint8(128), some.shape)  # (frames, px, px, 3), takes no memory
    return [stored.get(camera, blank) for camera in wanted]


def open_images_of(folder: str | Path, camera: str, px: int | str = "px") -> np.ndarray:
    """The pictures of one camera (frames, px, px, 3), memory-mapped. px: "px" for those of any size."""
    array = open_array(folder, camera)
    note = f", as prepare.py --image_size={px} makes them"
    check_array(f"{folder}/{camera}.npy", array, ("frames", px, px, 3), np.uint8, note)
    return array


def open_array(folder: str | Path, name: str) -> np.ndarray:
    """One array of a set, memory-mapped; UserError where it is missing or damaged."""
    path = Path(folder, f"{name}.npy")
    with check_readable(path, "make the data set again, or write this array with np.save"):
        return np.lib.format.open_memmap(path, "r")


# -----------------------------------------------------------------------------------------------------------
# The door for data: everything that a set must hold is checked before the first step of any work


def check_set(where: str | Path, meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """UserError names the file and the entry of the first thing in a data set that cannot be right.

    where: the folder, for messages. meta: as read_meta() takes it. arrays: state (frames, S), action
    (frames, A), and the cameras' (frames, px, px, 3).
    """
    asked = layout(meta)
    for name, x in arrays.items():
        check_array(f"{where}/{name}.npy", x, *asked[name])
    check_lengths(str(where), arrays)
    path = f"{where}/meta.json"
    for name in ("state", "action"):
        check_statistics(path, name, meta["statistics"], arrays[name])
    check_episodes(path, meta["episodes"], len(arrays["state"]))


def layout(meta: dict) -> dict[str, tuple]:
    """What check_array() asks of every array of a set: {name: (shape, type, words for the message)}."""
    asked = dict.fromkeys(meta["cameras"], (("frames", "px", "px", 3), np.uint8))
    for name, words in column_names(meta).items():
        shape = ("frames", len(words))
        asked[name] = (shape, np.float32, f" for {list(words)}")
    return asked


def check_lengths(where: str, arrays: dict[str, np.ndarray]) -> None:
    """UserError unless all arrays have the same number of frames."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{where} has different numbers of frames: {lengths}")


def check_statistics(path: str, name: str, said: Any, x: np.ndarray) -> None:
    """UserError unless the statistics in meta.json are those of the array (frames, D)."""
    # Others, as of another set or of one that has changed since, would scale what the policy learns.
    keys = ("min", "max", "q01", "q99")
    found = statistics(x)
    real = np.array([found[key] for key in keys])  # (4, D)
    # Rounding passes: another program may have computed them in float32.
    tolerance = 1e-3 * np.ptp(x, axis=0) + 1e-4 * np.abs(x).max(axis=0) + 1e-9  # (D,)
    with check_readable(f"{path}: statistics of {name}"):
        stated = np.array([said[name][key] for key in keys], np.float64)  # (4, D) if it is right
    if stated.shape != real.shape or not np.all(np.abs(stated - real) <= tolerance):
        raise UserError(f"{path}: the statistics of {name} are not those of {name}.npy; make the set again")


def is_row(x: Any, *kinds: type) -> bool:
    """Is this a list of entries of these types?"""
    return isinstance(x, (list, tuple)) and [type(entry) for entry in x] == [*kinds]


def check_episodes(path: str, episodes: Any, frames: int) -> None:
    """The episodes of meta.json, one by one, and that no two of them share a frame."""
    if not isinstance(episodes, list) or not episodes:
        raise UserError(f"{path}: episodes must be a list with one entry at least")
    taken = np.zeros(frames, bool)
    for number, episode in enumerate(episodes):
        where = f"{path}: episode {number}"
        check_episode(where, episode, frames)
        rows = slice(episode["start"], episode["start"] + episode["length"])
        if taken[rows].any():
            raise UserError(f"{where} has frames of an episode before it: they overlap")
        taken[rows] = True


def check_episode(where: str, episode: Any, frames: int) -> None:
    """One entry of meta.json of a set with so many frames."""
    check_keys(where, episode, EPISODE)
    for key, kind in (EPISODE | OPTIONAL).items():
        if key in episode and type(episode[key]) is not kind:
            raise UserError(f"{where}: {key} must be {kind.__name__}, not {episode[key]!r}"[:200])
    start, length = episode["start"], episode["length"]
    if not 0 <= start < start + length <= frames:
        raise UserError(f"{where} is frames {start} to {start + length}, the set has {frames}")
    if not episode["task"].strip():
        raise UserError(f"{where} has no instruction: its task is {episode['task']!r}")
    reasons = episode["reason"]
    pairs = all(is_row(entry, int, str) for entry in reasons)
    steps = [entry[0] for entry in reasons] if pairs else [-1]
    # Each reasoning holds from its step until the next one's.
    if steps != sorted(set(steps)) or not 0 <= min(steps, default=0) <= max(steps, default=0) < length:
        asked = f"[step, text] pairs with steps rising from 0 to {length - 1}"
        raise UserError(f"{where}: reason must be {asked}; it is {reasons}"[:300])
    # A span may reach beyond a short episode's end: what was planned need not have happened.
    spans = episode.get("disturbed", [])
    if not all(is_row(span, int, int) and 0 <= span[0] < span[1] for span in spans):
        raise UserError(f"{where}: disturbed must be [first, end] pairs of steps; it is {spans}"[:300])


def check_questions(path: Path, scenes: Any) -> None:
    """The door for question sets: a list for every picture, of [kind, question, answer]."""
    if not isinstance(scenes, list) or not all(isinstance(scene, list) for scene in scenes):
        raise UserError(f"{path} must be a list with a list for every picture; docs/data.md shows one")
    for number, scene in enumerate(scenes):
        for item in scene:
            if not is_row(item, str, str, str) or not all(map(str.strip, item)):
                said = repr(item)[:100]
                raise UserError(f"{path}: picture {number} has {said}, not [kind, question, answer]")


def data_id(meta: dict) -> str:
    """Twelve hex digits that name the content of a data set by its statistics and episodes."""
    # A run that goes on must not go on with other data. Reading all arrays would take minutes.
    content = json.dumps([meta["statistics"], meta["episodes"]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def usable_episodes(folder: str | Path, meta: dict, families: list[str] | None) -> list[dict]:
    """The successful episodes of some families; UserError where one has none."""
    # A `start` episode is a few good steps and need not succeed.
    usable = [e for e in meta["episodes"] if e["success"] or e.get("kind") == "start"]
    known = {episode.get("family", "") for episode in usable}
    wanted = known
    if families is not None:
        wanted = set(families)
    if not usable or wanted - known:
        raise UserError(
            f"{folder} has no successful episode of family {', '.join(sorted(wanted - known)) or 'any'}; "
            f"it has {', '.join(sorted(known)) or 'none'}: set --families"
        )
    return [episode for episode in usable if episode.get("family", "") in wanted]


def statistics(array: np.ndarray) -> dict[str, list[float]]:
    """Per column of (N, D): min, max, mean, std and the quantiles that normalisation uses."""
    x = np.asarray(array, np.float64)  # sums of many float32 numbers would lose digits
    found = {
        "min": x.min(0),  # (D,) each
        "max": x.max(0),
        "mean": x.mean(0),
        "std": x.std(0),
    }
    # The extremes of a column may be single slips; the quantiles are not moved by them.
    found |= zip(("q01", "q50", "q99"), np.quantile(x, (0.01, 0.5, 0.99), axis=0))
    return {name: value.tolist() for name, value in found.items()}


def save_episodes(
    folder: str | Path,
    episodes: list[dict],
    cameras: Sequence[str],
    motors: Sequence[str],
    fps: int = 10,
    state: Sequence[str] = (),
) -> None:
    """Write a data set from Python.

    An episode is {"images": {camera: (n, px, px, 3) uint8}, "state" (n, S), "action" (n, A), "task"} and what
    else meta.json should say of it: "family", "reason", "success", "seed", "disturbed". motors: names of an
    action's numbers, state: of the state's (none: the motors, whose positions they are). UserError for a
    folder that holds a data set already, or for shapes that do not fit the names.
    """
    folder = Path(folder)
    if (folder / "meta.json").is_file():
        raise UserError(f"{folder} already holds a data set; delete it or choose another folder")
    if not isinstance(episodes, (list, tuple)) or not episodes:
        raise UserError("there is no episode to save: episodes must be a list with one at least")
    meta = {
        "cameras": cameras,
        "motors": motors,
        "fps": fps,
    }
    if state:
        meta["state"] = state
    check_meta("save_episodes()", meta, SET[:3])
    entries = []
    pieces = defaultdict(list)  # array -> its part of every episode
    start = 0
    asked = layout(meta)
    for number, episode in enumerate(episodes):
        arrays, said = split_episode(f"episode {number}", episode, meta, asked)
        # Later episodes have pictures of the same size.
        for camera in cameras:
            asked[camera] = (("frames", *arrays[camera].shape[1:]), np.uint8)
        length = len(arrays["state"])
        defaults = {
            "reason": [],
            "success": True,
            "seed": number,
            "family": "demo",
            "kind": "demo",
        }
        entries.append(defaults | said | {"start": start, "length": length})
        start += length
        for name, array in arrays.items():
            pieces[name].append(array)
    arrays = {name: np.concatenate(parts) for name, parts in pieces.items()}
    meta["statistics"] = {name: statistics(arrays[name]) for name in ("state", "action")}
    meta["episodes"] = entries
    check_set(folder, meta, arrays)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    write_json(folder / "meta.json", meta)  # last: a folder without it is no data set


def split_episode(
    where: str, episode: Any, meta: dict, asked: dict[str, tuple]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An episode of save_episodes() -> its arrays, and what else meta.json says of it. asked: by layout()."""
    check_keys(where, episode, ("images", "state", "action", "task"))
    said = dict(episode)
    given = said.pop("images")
    check_keys(f"{where}: images", given, meta["cameras"])
    given = given | {"state": said.pop("state"), "action": said.pop("action")}
    arrays = {}
    for name, must_be in asked.items():
        what = f"{where}: {name}"
        # Any numbers will do for state and action. Pictures of 0..1 would become black as whole numbers.
        convert = as_floats
        if name in meta["cameras"]:
            convert = as_array
        arrays[name] = convert(what, given[name])
        check_array(what, arrays[name], *must_be)
    check_lengths(where, arrays)
    # JSON knows no numpy numbers.
    for name, value in said.items():
        if isinstance(value, (np.generic, np.ndarray)):
            said[name] = value.tolist()
    return arrays, said
