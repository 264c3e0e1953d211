"""Episodes and questions on disk, text tokens, statistics, batches, and retrieval of similar frames.

A data set is a folder that numpy alone can read:

    data/<name>/meta.json     cameras, motors, fps, statistics, state (names, where it is not the motors' positions), what made it,
                              and one entry per episode:
                              {start, length, task, reason: [[first step, text], ...], success, seed, family, kind,
                              disturbed: [[first step, end], ...]}: while the arm did not obey the actions
    data/<name>/front.npy     (frames, px, px, 3) uint8, one file per camera
    data/<name>/state.npy     (frames, S) float32, LeRobot units (degrees, gripper 0..100)
    data/<name>/action.npy    (frames, A) float32, target positions in the same units

A question set has the camera files and `questions.json`: per image a list of [kind, question, answer]. Where a question comes
with a single picture, meta.json lists the other views as "grey": they have no file and are seen as plain grey. rl.py leaves its
similarity index with the data that it was made from, `similarity_<what it depends on>.safetensors`.

Batches are a pure function of (seed, step): resuming needs no sampler state, and every process of a torchrun job draws the
same global batch and takes its own rows.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from common import UserError, read_json


# ---------------------------------------------------------------------------------------------------------------
# Text


class Tokenizer:
    """Words of the training text as single tokens, anything else as UTF-8 bytes: lossless for every string, no packages needed.

    A token carries the space before it, so that decode(encode(text)) == text. Token ids: specials, 256 bytes, words.
    """

    SPECIAL = ("<pad>", "<task>", "<reason>", "</reason>", "<ask>", "<answer>", "<end>")
    PIECES = re.compile(r" ?\w+| ?[^\w\s]|\s")
    LONGEST = 128  # tokens of an instruction or question; the longest of ours has under 40
    start = image_open = image_close = ()  # nothing stands around the images

    def __init__(self, words):
        self.words = list(words)
        self.first_word = len(self.SPECIAL) + 256
        self.ids = {word: self.first_word + i for i, word in enumerate(self.words)}
        self.encoded = {}  # training meets the same few thousand sentences again and again
        self.task, self.reason, self.end_reasoning, self.ask, self.reply, self.end_answer = range(1, 7)

    @classmethod
    def train(cls, texts, limit):
        """The most frequent pieces of `texts`, so that the whole vocabulary has at most `limit` tokens.

        A piece seen fewer than 20 times stays bytes: its embedding would hardly be trained.
        """
        counts = Counter(piece for text in texts for piece in cls.PIECES.findall(" " + text))
        ranked = sorted(
            (piece for piece in counts if counts[piece] >= 20), key=lambda piece: (-counts[piece], piece)
        )
        return cls(ranked[: limit - len(cls.SPECIAL) - 256])

    def __len__(self):
        return self.first_word + len(self.words)

    def encode(self, text):
        """Any string -> token ids."""
        if text in self.encoded:
            return self.encoded[text]
        ids = []
        for piece in self.PIECES.findall(" " + text):
            if piece in self.ids:
                ids.append(self.ids[piece])
            else:
                ids += [len(self.SPECIAL) + byte for byte in piece.encode("utf-8", "surrogatepass")]
        if len(self.encoded) < 1_000_000:
            self.encoded[text] = ids
        return ids

    def decode(self, ids):
        """Token ids -> string; special tokens are left out."""
        parts = []
        for i in ids:
            if i >= self.first_word:
                parts.append(self.words[i - self.first_word].encode() if i < len(self) else b"")
            elif i >= len(self.SPECIAL):
                parts.append(bytes([i - len(self.SPECIAL)]))
        return b"".join(parts).decode("utf-8", "replace").removeprefix(" ")

    def encode_user_text(self, text, what):
        """A user's words in the form of the training text (lower case, punctuation apart), or a ValueError."""
        ids = self.encode(" ".join(re.findall(r"\w+|[^\w\s]", text.lower())))
        if not text.strip():
            raise UserError(f'the {what} is empty; try "put the red cube on the blue pad"')
        if len(ids) > self.LONGEST:
            raise UserError(
                f"the {what} is {len(ids)} tokens long; at most {self.LONGEST} fit, say it in fewer words"
            )
        return ids

    def prompt(self, task, reasoning=True):
        """Instruction -> the ids that the chain of thought (or, without reasoning, the feature queries) follows."""
        return [self.task, *self.encode_user_text(task, "instruction"), *([self.reason] if reasoning else [])]

    def reasoning_ids(self, reason):
        return [*self.encode(reason), self.end_reasoning]

    def question(self, question):
        """Question -> the ids that the answer follows. An instruction as a question asks for its reasoning."""
        if question.startswith("<task>"):
            return self.prompt(question.removeprefix("<task>"))
        return [self.ask, *self.encode_user_text(question, "question"), self.reply]

    def answer(self, question, answer):
        return [*self.encode(answer), self.end_reasoning if question.startswith("<task>") else self.end_answer]

    def dumps(self):
        """What stands in a checkpoint's tokenizer.json."""
        return json.dumps(self.words)

    @staticmethod
    def load(folder):
        """The tokenizer of a checkpoint, or of a pretrained model: words, or what the package `tokenizers` writes."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{folder} is no checkpoint: it has no tokenizer.json; run: python train.py --config small"
            )
        text = path.read_text()
        return Tokenizer(json.loads(text))


def pack(rows):
    """Rows of segments -> padded tensors. A row is a list of (prompt ids, target ids); each pair becomes a segment 1, 2, ...

    -> tokens, segments (-1: padding), positions (within the segment), labels (the next token where it is a target, else
    -100), all (B, T) int64.
    """
    T = max(sum(len(p) + len(t) for p, t in row) for row in rows)
    tokens, segments, positions, labels = (
        np.full((len(rows), T), fill, np.int64) for fill in (0, -1, 0, -100)
    )
    for b, row in enumerate(rows):
        i = 0
        for k, (prompt, target) in enumerate(row):
            n, m = len(prompt), len(prompt) + len(target)
            tokens[b, i : i + m] = prompt + target
            segments[b, i : i + m] = k + 1
            positions[b, i : i + m] = np.arange(m)
            labels[b, i + n - 1 : i + m - 1] = target
            i += m
    return {"tokens": tokens, "segments": segments, "positions": positions, "labels": labels}


# ---------------------------------------------------------------------------------------------------------------
# Statistics


def statistics(array):
    """Per dimension of (N, D): min, max, mean, std and the quantiles that normalisation uses, as plain lists."""
    x = np.asarray(array, np.float64)
    names = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    names |= {f"q{int(q * 100):02d}": np.quantile(x, q, axis=0) for q in (0.01, 0.5, 0.99)}
    return {name: value.tolist() for name, value in names.items()}


# ---------------------------------------------------------------------------------------------------------------
# Data sets


def save_episodes(folder, episodes, cameras, motors, fps=10, state=()):
    """Write a data set from Python. An episode is {"images": {camera: (n, px, px, 3) uint8}, "state" (n, S), "action" (n, A), "task"}
    and what else meta.json should say of it: "family", "reason", "success", "seed", "disturbed".
    motors: names of the action's numbers, state: of the state's (none: the motors, whose positions they are).
    """
    folder = Path(folder)
    if (folder / "meta.json").is_file():
        raise UserError(f"{folder} already holds a data set; delete it or choose another folder")
    arrays = {
        name: np.concatenate([e[name] for e in episodes]).astype(np.float32) for name in ("state", "action")
    }
    for name, names in (("state", state or motors), ("action", motors)):
        if arrays[name].shape[1:] != (len(names),):
            raise UserError(f"{name} has shape {arrays[name].shape}, its names are {list(names)}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    for camera in cameras:
        np.save(folder / f"{camera}.npy", np.concatenate([e["images"][camera] for e in episodes]))
    entries, start = [], 0
    for i, e in enumerate(episodes):
        said = {k: v for k, v in e.items() if k not in ("images", "state", "action")}
        entries.append(
            {
                "start": start,
                "length": len(e["state"]),
                "reason": [],
                "success": True,
                "seed": i,
                "family": "demo",
                "kind": "demo",
            }
            | said
        )
        start += len(e["state"])
    meta = {
        "cameras": list(cameras),
        "motors": list(motors),
        **({"state": list(state)} if state else {}),
        "fps": fps,
        "statistics": {k: statistics(v) for k, v in arrays.items()},
        "episodes": entries,
    }
    (folder / "meta.json.tmp").write_text(json.dumps(meta))
    (folder / "meta.json.tmp").replace(folder / "meta.json")  # last: a folder without it is no data set


def read_meta(folder):
    """meta.json of a data set folder; UserError says what to type where there is none."""
    if not Path(folder, "meta.json").is_file():
        raise UserError(f"{folder} is no data set (no meta.json); run: python prepare.py --config small")
    return read_json(Path(folder, "meta.json"))


def read_images(folder, meta, cfg):
    """The camera arrays of a data set, memory-mapped, in the model's order; an error that shows both sides if they do not fit."""
    wanted = cfg.camera_names
    if missing := [c for c in wanted if c not in meta["cameras"]]:
        raise UserError(
            f"{folder} has cameras {meta['cameras']}, the model wants {wanted} ({missing} missing); set --cameras or choose another --data"
        )
    grey = meta.get("grey", [])
    stored = {
        camera: np.load(Path(folder) / f"{camera}.npy", mmap_mode="r")
        for camera in wanted
        if camera not in grey
    }
    if not stored:
        raise UserError(
            f"{folder} has pictures for {[c for c in meta['cameras'] if c not in grey]} alone, the model wants {wanted}; set --cameras or --mix=0"
        )
    images = [
        stored[c] if c in stored else np.broadcast_to(np.uint8(128), next(iter(stored.values())).shape)
        for c in wanted
    ]
    if images[0].shape[1] != cfg.image_size:
        raise UserError(
            f"{folder} has images of {images[0].shape[1]} px, the model takes {cfg.image_size}; set --image_size={images[0].shape[1]}"
        )
    return images


def flow_times(rng, shape):
    """Random flow times in (0, 1] as pi0 draws them, float32: more mass at noise (t = 1)."""
    return rng.beta(1.5, 1.0, shape).astype(np.float32) * 0.999 + 0.001


class Episodes:
    """Demonstrations: frames to draw action samples from."""

    def __init__(self, folder, cfg, families=None):
        self.meta, self.cfg, self.frozen = read_meta(folder), cfg, None
        if missing := {"cameras", "motors", "statistics", "episodes"} - self.meta.keys():
            raise UserError(
                f"{folder}/meta.json lacks {', '.join(sorted(missing))}; the README lists what it must hold"
            )
        for what, theirs, own in (
            ("motors", self.meta["motors"], cfg.motor_names),
            ("state", self.meta.get("state") or self.meta["motors"], cfg.state_names),
        ):
            if theirs != own:
                raise UserError(f"{folder} has {what} {theirs}, the model {own}")
        self.images = read_images(folder, self.meta, cfg)
        self.state, self.action = (
            np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in ("state", "action")
        )
        if (self.state.shape[1], self.action.shape[1]) != (cfg.state_dim, cfg.action_dim):
            raise UserError(
                f"{folder} has states of {self.state.shape[1]} and actions of {self.action.shape[1]} numbers, its meta.json names {cfg.state_dim} and {cfg.action_dim}"
            )
        usable = [
            e for e in self.meta["episodes"] if e["success"] or e.get("kind") == "start"
        ]  # a start is a few good steps
        there = sorted({e.get("family", "") for e in usable})
        if not usable or (missing := [f for f in families or () if f not in there]):
            raise UserError(
                f"{folder} has no successful episode of family {', '.join(missing) if usable else 'any'}; it has {', '.join(there) or 'none'}: set --families"
            )
        self.episodes = [e for e in usable if families is None or e["family"] in families]
        self.frames, self.end, self.episode_of, weights = [], [], [], []
        for i, e in enumerate(self.episodes):
            changes = [step for step, _ in e["reason"]]
            for step in range(e["length"]):
                self.frames.append(e["start"] + step)
                # What is done after a disturbance answers it, and nobody could have known of it: such a step ends the chunk.
                struck = [max(step, first) + 1 for first, last in e.get("disturbed", ()) if step < last]
                self.end.append(e["start"] + min([e["length"], *struck]))
                self.episode_of.append(i)
                # Only the frames at which a new thought begins need the words: later ones give the target away by the arm's
                # own motion. Drawing them more often is what makes the policy listen.
                weights.append(3.0 if any(0 <= step - change < 3 for change in changes) else 1.0)
        self.cumulative = np.cumsum(weights) / np.sum(weights)

    def reason_at(self, i):
        """(task, reason) of the i-th frame."""
        e = self.episodes[self.episode_of[i]]
        step = self.frames[i] - e["start"]
        return e["task"], ([text for first, text in e["reason"] if first <= step] or [""])[-1]

    def texts(self):
        return [text for e in self.episodes for text in (e["task"], *(r for _, r in e["reason"]))]

    def batch(self, tokenizer, rng, n, rows=slice(None)):
        """n random frames as one action batch (dict of tensors, SyVLA.forward's keys); only `rows` of it are built.

        All random numbers are drawn for the whole batch first, so every process of a job agrees on them.
        """
        cfg, H, A = self.cfg, self.cfg.chunk_size, self.cfg.action_dim
        picks = np.searchsorted(self.cumulative, rng.random(n))[rows]
        eps = rng.standard_normal((n, cfg.noise_samples, H, A), dtype=np.float32)[rows]
        t = flow_times(rng, (n, cfg.noise_samples))[rows]
        uniform = rng.random((n, cfg.queries), dtype=np.float32)[rows]
        older = rng.integers(cfg.stale + 1, size=n)[rows] if cfg.stale else None
        return self.samples(tokenizer, picks, older) | {
            k: torch.from_numpy(np.ascontiguousarray(v))
            for k, v in {"eps": eps, "t": t, "uniform": uniform}.items()
        }

    def samples(self, tokenizer, picks, older=None):
        """Frames by index -> images, text, state, actions, valid (False behind the episode's end) as tensors.

        older (B,): images and text are of so many control steps before, or of the episode's start; "age" says how many.
        Where `frozen` is set, "states" (B, Q, D), what a VLM that does not learn makes of images and text, stand in their place.
        """
        H, seen = self.cfg.chunk_size, np.asarray(picks)  # seen: the frames whose pictures and text the VLM gets
        if older is not None:
            age = np.array(
                [
                    min(k, self.frames[i] - self.episodes[self.episode_of[i]]["start"])
                    for i, k in zip(picks, older)
                ]
            )
            seen = seen - age
        frames = np.array([self.frames[i] for i in picks])
        steps = frames[:, None] + np.arange(H)  # (B, H)
        last = np.array([self.end[i] for i in picks])[:, None] - 1
        batch = (
            self.prompts(tokenizer, seen) if self.frozen is None else {"query_states": self.states(tokenizer, seen)}
        )
        batch |= {
            "state": self.state[frames],
            "actions": self.action[np.minimum(steps, last)],  # (B, H, A)
            "valid": steps <= last,
        } | ({} if older is None else {"age": age})
        return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in batch.items()}

    def prompts(self, tokenizer, picks):
        """What the VLM gets of frames by index: pictures, and text packed as pack() does."""
        rows = []
        for i in picks:
            task, reason = self.reason_at(i)
            rows.append(
                [
                    (
                        tokenizer.prompt(task, self.cfg.reasoning),
                        tokenizer.reasoning_ids(reason) if self.cfg.reasoning else [],
                    )
                ]
            )
        return pack(rows) | {
            "images": np.stack([view[[self.frames[i] for i in picks]] for view in self.images], axis=1)
        }  # (B, V, px, px, 3)

    def freeze(self, path, shape, see):
        """Keep what a frozen VLM makes of frames in a file, each when it is first drawn. see: prompts() as tensors -> query states (B, Q, D); shape: (Q, D)."""
        kind = np.dtype(
            [("known", bool), ("states", np.float16, shape)]
        )  # one record a frame, so that no kill parts the two
        if not Path(path).is_file():
            temporary = f"{path}.tmp{os.getpid()}"  # several processes may come here at once
            np.lib.format.open_memmap(
                temporary, "w+", kind, (len(self.state),)
            )  # a sparse file: frames never drawn take no room
            os.replace(temporary, path)
        self.frozen, self.see = np.load(path, mmap_mode="r+"), see

    def states(self, tokenizer, picks):
        """Query states of frames by index from the file of freeze() -> (B, Q, D) float32."""
        frames = np.array([self.frames[i] for i in picks])
        if len(new := np.flatnonzero(~self.frozen["known"][frames])):
            prompts = self.prompts(tokenizer, np.asarray(picks)[new])
            states = self.see({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in prompts.items()})
            self.frozen["states"][frames[new]] = states.cpu().numpy()
            self.frozen["known"][frames[new]] = True
        return self.frozen["states"][frames].astype(np.float32)

    def __len__(self):
        return len(self.frames)


class Questions:
    """Pictures with questions and answers: the multimodal part of the mix, and the held-out test of language ability."""

    def __init__(self, folder, cfg):
        self.meta = read_meta(folder)
        self.images = read_images(folder, self.meta, cfg)
        self.questions = read_json(Path(folder, "questions.json"))
        self.scenes = np.arange(len(self.questions))

    def drop_long(self, tokenizer):
        """Leave out questions of more tokens than the model is made for, as sets of others have them, and pictures that have no other."""

        def fits(question):
            if (
                2 * len(question.encode()) <= tokenizer.LONGEST
            ):  # a byte, with a space before it, is two tokens at most
                return True
            try:
                return bool(tokenizer.question(question))
            except UserError:
                return False

        self.questions = [[q for q in scene if fits(q[1])] for scene in self.questions]
        self.scenes = np.array([i for i, scene in enumerate(self.questions) if scene])
        if not len(self.scenes):
            raise UserError(
                f"no question of the set has at most {tokenizer.LONGEST} tokens; make it again with a smaller --longest"
            )

    def texts(self):
        return [
            text.removeprefix("<task>")
            for scene in self.questions
            for _, question, answer in scene
            for text in (question, answer)
        ]

    def batch(self, tokenizer, rng, n, room, kinds=None, rows=slice(None)):
        """n random pictures, each with as many random questions (of some kinds, or all) as fit into `room` tokens.

        -> dict of tensors (SyVLA.forward's keys).
        """
        picks = self.scenes[rng.integers(len(self.scenes), size=n)[rows]]
        seeds = rng.integers(2**31, size=n)[rows]
        packed = []
        for scene, seed in zip(picks, seeds):
            row, left = [], room
            pool = [q for q in self.questions[scene] if kinds is None or q[0] in kinds]
            for i in np.random.default_rng(seed).permutation(len(pool)):
                _, question, answer = pool[i]
                prompt, target = tokenizer.question(question), tokenizer.answer(question, answer)
                if not row or len(prompt) + len(target) <= left:
                    row.append((prompt, target))
                    left -= len(prompt) + len(target)
            packed.append(row)
        batch = pack(packed) | {"images": np.stack([view[picks] for view in self.images], axis=1)}
        return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in batch.items()}

    def accuracy(self, answer, n=2000, batch=50):
        """Exact-match accuracy per kind of question on n fixed random questions; answer(images, questions) -> strings.

        -> {kind: {"accuracy", "n"}, ..., "all": ...}
        """
        items = [(scene, *q) for scene, qs in enumerate(self.questions) for q in qs]
        items = [items[i] for i in np.random.default_rng(0).permutation(len(items))[:n]]
        items.sort(key=lambda item: len(item[2]))  # rows of like length decode together without waste
        right, total = Counter(), Counter()
        for i in range(0, len(items), batch):
            part = items[i : i + batch]
            images = np.stack([view[[scene for scene, *_ in part]] for view in self.images], axis=1)
            for (_, kind, _, truth), said in zip(part, answer(images, [q for _, _, q, _ in part])):
                for name in (kind, "all"):
                    right[name] += said == truth
                    total[name] += 1
        return {kind: {"accuracy": right[kind] / total[kind], "n": total[kind]} for kind in sorted(total)}
