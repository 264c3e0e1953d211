"""What every program shares: the command line, files that are written whole, devices, processes."""

# torch is imported inside the functions that need it, so that the workers of a simulation start without it.

import contextlib
import ctypes
import difflib
import errno
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


class UserError(ValueError):
    """Something that a person can put right: the message says what is wrong and what to type."""


# -----------------------------------------------------------------------------------------------------------
# The command line: a dataclass is a program's options, its fields are declared by opt()


def opt(
    default: Any,  # its type is the option's
    help: str = "",  # the line of --help; without one only presets, data sets and checkpoints set the field
    allowed: str | Sequence[str] = "",  # an interval such as "[0, 1)", or a tuple of words
    needs: str | Sequence[str] = (),  # without these other options it does nothing, see check_needs()
    many: bool = False,  # it is a list with commas, of different entries that are all allowed
) -> Any:
    """A config field."""
    if isinstance(needs, str):
        needs = (needs,)
    return field(default=default, metadata=dict(help=help, allowed=allowed, needs=needs, many=many))


def check_options(config: Any) -> None:
    """Raise UserError for the first field of a config whose value lies outside what opt() allows."""
    for f in fields(config):
        value = getattr(config, f.name)
        allowed = f.metadata["allowed"]
        kind = type(f.default)
        # A preset or a checkpoint's JSON file may say 1 where 1.0 is meant.
        if type(value) is not kind and (type(value), kind) != (int, float):
            raise UserError(f"--{f.name} takes {kind.__name__}, not {value!r}")
        values = [value]
        if f.metadata["many"]:
            values = value.split(",") if value else []
            if len(set(values)) < len(values) or not all(word and word == word.strip() for word in values):
                raise UserError(f"--{f.name} must list different words, as in a,b without spaces: {value!r}")
        # An interval is a string, a choice of words is a tuple. Every float has an interval: nan is in none.
        for word in values:
            if not isinstance(allowed, str) and word not in allowed:
                known = ", ".join(filter(None, allowed))
                raise UserError(f"--{f.name} must be one of {known}, not {word!r}")
            if allowed and isinstance(allowed, str) and not _inside(word, allowed):
                raise UserError(f"--{f.name} must lie in {allowed}, not {word}")


def _inside(value: float | str, interval: str) -> bool:
    """Does a number lie in an interval such as "(0, 1]" or "[0, inf)"? In a list it is a whole number."""
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        return False
    number = float(value)
    low, high = map(float, interval[1:-1].split(","))
    # An end belongs to the interval if its bracket is square.
    at_an_end = (number == low and interval[0] == "[") or (number == high and interval[-1] == "]")
    return low < number < high or at_an_end


def check_needs(config: Any) -> None:
    """Raise UserError for a typed option that does nothing beside the others.

    Each of opt()'s `needs` must hold: "eval" means that --eval is set, "env=real" that --env has this value,
    "not eval" the opposite, and "a|b" that one of both holds.
    """
    for f in fields(config):
        typed = config.typed.get(f.name)
        # What is typed as the default is, or as nothing (0, false), asks for nothing.
        if not typed or typed == f.default:
            continue
        for need in f.metadata["needs"]:
            alternatives = need.split("|")
            if any(_holds(config, condition) for condition in alternatives):
                continue
            reasons = " and ".join(f"without --{condition}" for condition in alternatives)
            advice = f"leave --{f.name} out"
            if "not " not in need:
                advice = f"add it or {advice}"
            raise UserError(
                f"--{f.name} does nothing {reasons.replace('without --not ', 'with --')}: {advice}"
            )


def _holds(config: Any, condition: str) -> bool:
    """Is a condition such as "eval", "env=real" or "not eval" true of a config?"""
    positive = condition.removeprefix("not ")
    name, equals, value = positive.partition("=")
    there = getattr(config, name, "")  # a smaller config may lack the other option
    holds = there == value if equals else bool(there)
    return holds == (positive == condition)


def parse_config(cls: type, presets: dict[str, dict], argv: Sequence[str], positional: str = "") -> Any:
    """Command line -> an instance of the config dataclass `cls`; what was typed is kept as its dict `typed`.

    presets: one table for all programs; each takes the fields that it knows. positional: the field that takes
    a free word. A mistake ends in one line and exit status 2.
    """
    options = {f.name: f for f in fields(cls) if f.metadata["help"]}
    if "--help" in argv or "-h" in argv:
        run_program(lambda _: _print_help(options, presets), None)
        raise SystemExit(0)
    try:
        typed = _read_words(options, presets, list(argv), positional)
        # What is typed wins over the preset, in any order.
        values = presets.get(typed.get("config", ""), {}) | typed
        known = {f.name for f in fields(cls)}
        config = cls(**{name: value for name, value in values.items() if name in known})
        config.typed = typed
        if not typed.get("resume"):  # resumed_config() checks a run that goes on
            check_needs(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config


def _print_help(options: dict[str, Field], presets: dict[str, dict]) -> None:
    print(f"--config NAME   preset: {', '.join(presets)}")
    for name, option in options.items():
        allowed = option.metadata["allowed"]
        if not isinstance(allowed, str):
            allowed = " | ".join(filter(None, allowed))
        print(f"--{name}={option.default}   {option.metadata['help']}   {allowed}".rstrip())


def _read_words(
    options: dict[str, Field], presets: dict, words: list[str], positional: str
) -> dict[str, Any]:
    """The words `--key=value`, `--key value`, `--flag` of a command line -> {option: value}."""
    # argparse would need as many lines: it knows neither `--flag false`, nor a near name, nor "given twice".
    typed = {}
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("-") and positional:
            name, value = positional, word
        elif not word.startswith("--"):
            raise UserError(f"unexpected word {word!r}; options are written --key=value")
        elif name not in options:
            raise UserError(f"unknown option --{name}{_nearest(name, options)}")
        else:
            kind = type(options[name].default)
            following = words[0].lower() if words else "--"
            if not equals and kind is bool and following not in BOOLEANS:
                text = "true"  # a flag may stand alone
            elif not equals:
                if following.startswith("--"):
                    raise UserError(f"--{name} needs a value: --{name}=...")
                text = words.pop(0)
            value = _convert(name, kind, text)
        if name in typed:
            raise UserError(f"--{name} is given twice: {typed[name]!r} and {value!r}")
        if name == "config" and value not in presets:
            raise UserError(f"unknown preset {value!r}{_nearest(value, presets)}")
        typed[name] = value
    return typed


BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def _convert(name: str, kind: type, text: str) -> Any:
    """The text of an option's value -> its value."""
    if not text.strip():
        raise UserError(f"--{name} is empty; give it a value or leave it out")
    try:
        if kind is bool:
            return BOOLEANS[text.lower()]
        # int() does not know 1e6, and float() would round large integers.
        if kind is int and not text.lstrip("+-").isdigit() and float(text).is_integer():
            return int(float(text))
        return kind(text)
    except (KeyError, ValueError):
        raise UserError(f"--{name} takes {kind.__name__}, not {text!r}") from None


def _nearest(word: str, names: Sequence[str]) -> str:
    """The end of a message about a word that is none of these names."""
    close = difflib.get_close_matches(word, names, 1)  # at most one
    if close:
        return f"; did you mean {close[0]}?"
    return f"; choose from {', '.join(sorted(names))}"


def resumed_config(config: Any, saved: dict[str, Any], may_change: set[str]) -> Any:
    """The config of a run that goes on: as it was saved, but for fields that were typed and may change."""
    if saved.get("format") != FORMAT:
        raise UserError(f"{config.out} was begun by an older version and cannot go on: choose another --out")
    changed = {}
    for name, value in config.typed.items():
        # Others would make another run of it: what was typed as it was saved may stay.
        if name in may_change:
            changed[name] = value
        elif saved.get(name, value) != value:
            raise UserError(
                f"{config.out} was begun with --{name}={saved[name]}, not {value}; leave --{name} out"
            )
    resumed = config_of(type(config), saved | changed, f"{config.out}/config.json")
    resumed.typed = config.typed
    check_needs(resumed)
    return resumed


def config_of(cls: type, saved: dict[str, Any], path: str) -> Any:
    """A config from those of the saved settings that `cls` knows; UserError names the file."""
    known = {f.name: saved[f.name] for f in fields(cls) if f.name in saved}
    # The settings are checked again: a person may have edited the file.
    try:
        return cls(**known)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def run_program(program: Callable[[Any], None], config: Any) -> None:
    """Run it: a mistake ends in one line and exit status 2, Ctrl-C in 130, a defect in its traceback."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a letter that a terminal lacks must not end a program
            stream.reconfigure(errors="replace")
    try:
        program(config)
        if sys.stdout:
            sys.stdout.flush()  # now a full disk can still be told
    except KeyboardInterrupt:
        if rank_and_world()[0] == 0:
            print(f"stopped; to go on, type: {_again(config)}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever reads the output has gone, as in `| head`
        raise SystemExit(1) from None
    except Exception as error:
        line = explain(error)
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        # Tests run several programs in one process.
        _drop_output()
        release_folders()
        leave_processes()


def _again(config: Any) -> str:
    """The command that goes on with what this one has begun."""
    _, world = rank_and_world()
    # sys.argv does not tell that torchrun started the program.
    start = f"torchrun --standalone --nproc_per_node={world}" if world > 1 else "python"
    words = list(sys.argv)
    # Only a run that has saved a state can be resumed.
    if not getattr(config, "resume", True) and Path(config.out, "train_state.pt").is_file():
        words.append("--resume")
    return f"{start} {shlex.join(words)}"


def _drop_output() -> None:
    """Forget words that cannot be written."""
    # Python would complain of them when it exits, behind the one line that says what is wrong.
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Errors of the operating system that a person can put right: no room, and no right to write there.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


def explain(error: Exception) -> str:
    """One line for an error that a person can put right, else an empty string."""
    if isinstance(error, UserError):
        return str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL:
        return "the disk is full; free some space and run the same command again"
    if number in CLOSED and error.filename:
        return f"{error.filename} cannot be written or read ({error.strerror}); choose another folder"
    # Core files import extras where they are used, and work where a fork has deleted them.
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("extras"):
        return f"this needs {error.name.replace('.', '/')} of the repository, which is not there"
    return ""


# -----------------------------------------------------------------------------------------------------------
# Checks that several files share


def check_names(where: str, names: Any) -> None:
    """UserError unless `names` is a list of different words."""
    words = list(names) if isinstance(names, (list, tuple)) else []
    texts = all(isinstance(word, str) and word.strip() for word in words)
    # Names are joined with commas and become file names.
    if not words or not texts or set("".join(words)) & set(",/\\\0") or len(set(words)) < len(words):
        raise UserError(f"{where} must be a list of different names without commas and slashes: {names!r}")


def as_array(what: str, x: Any) -> np.ndarray:
    """Anything -> an array of real numbers; UserError where it is none."""
    try:
        x = np.asarray(x)
    except ValueError:  # rows of different lengths
        x = np.asarray(None)
    if x.dtype.kind not in "fiub":
        raise UserError(f"{what} must be an array of numbers; it is {x.shape} {x.dtype}")
    return x


def as_floats(what: str, x: Any) -> np.ndarray:
    """Anything -> an array of float32 numbers; UserError where it is none."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and check_array() tells
        return as_array(what, x).astype(np.float32)


def check_array(what: str, x: np.ndarray, shape: tuple, dtype: type, note: str = "") -> None:
    """UserError unless an array has this type and shape and holds finite numbers.

    A word in `shape`, as in ("frames", "px", "px", 3), stands for any size above 0, but always for the same.
    """
    # The size that each word stands for is that of the last axis of its name.
    sizes = dict(zip(shape, x.shape))
    expected = tuple(size if isinstance(size, int) else sizes.get(size) for size in shape)
    if x.shape != expected or x.dtype != dtype or not x.size:
        wanted = str(shape).replace("'", "")
        name = np.dtype(dtype).name
        raise UserError(f"{what} must be {wanted} {name}{note}; it is {x.shape} {x.dtype}")
    if (
        x.dtype.kind == "f" and not np.isfinite(x).all()
    ):  # pictures are bytes: reading them all would take long
        row = int(np.argwhere(~np.isfinite(x))[0, 0])
        raise UserError(f"{what} is not finite: its entry {row} is {x[row]}; repair it or leave it out")


def check_robot(where: str, cfg: Any, motors: Sequence[str], state: Sequence[str], fps: int) -> None:
    """UserError where a data set or an environment is of another robot than the model `cfg` was made for."""
    there = {"motors": list(motors), "state": list(state), "fps": fps}
    # Actions are targets of single control steps: at another rate they would be other speeds.
    here = {"motors": cfg.motor_names, "state": cfg.state_names, "fps": cfg.fps}
    if there != here:
        lower = min(fps, cfg.fps)  # frames can be left out, not made up
        hint = f"another fps becomes the same by prepare.py --fps={lower}"
        raise UserError(f"{where} has {there}, the model {here}; {hint}")


# -----------------------------------------------------------------------------------------------------------
# Files. A file appears under its own name only when it is whole: a kill at any moment leaves the old one or
# the new one.

# The number that config.json of a checkpoint holds, so that a later version can tell an older one.
FORMAT = 2  # 1 has no such key, its field names are listed in model.RENAMED
POINTS = 32  # columns and rows of a picture for which there are words


@contextlib.contextmanager
def check_readable(what: Any, hint: str = "") -> Iterator[None]:
    """Inside, whatever is wrong with a file or a device becomes a UserError that names it, with a hint."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries that read files raise dozens of kinds
        # Where a library wraps an error, the inner one says why.
        reason = repr(error.__cause__ or error)[:200]
        # The cache of Hugging Face's hub has a folder snapshots.
        again = "download it again" if "/snapshots/" in str(what) else "copy or make it again"
        raise UserError(f"{what} cannot be read ({reason}); {hint or again}") from None


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`: renamed to it when the block ends well, and removed if it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a file cannot be renamed from one disk to another.
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_json(path: str | Path, hint: str = "") -> Any:
    """The content of a JSON file; UserError names a file that is missing or damaged."""
    with check_readable(path, hint):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; the last one is left out if a kill cut it short."""
    if not path.is_file():
        return []
    # A line is whole when its end is written.
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    with check_readable(path, "delete it to go on without"):
        return [dict(json.loads(line)) for line in whole]


def trim_log(path: Path, key: str, last: int) -> None:
    """Drop the lines of a log.jsonl behind the checkpoint of a resumed run: they will be written again."""
    kept = [line for line in read_log(path) if line.get(key, math.inf) <= last]
    with atomic_path(path) as temporary:
        temporary.touch()
        for line in kept:
            append_log(temporary, line)


def append_log(path: Path, line: dict) -> None:
    """Add one line to a log.jsonl."""
    # A kill may cut the line short: read_log() leaves it out.
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_checkpoint_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder; UserError says what to type where there is no checkpoint."""
    folder = Path(folder)
    if not all((folder / name).is_file() for name in ("config.json", "model.safetensors")):
        raise UserError(
            f"{folder} is no checkpoint (needs config.json and model.safetensors); "
            f"run: python train.py --config small --out={folder}"
        )
    config = read_json(folder / "config.json")
    # These words are split before Config checks the fields.
    words = ("cameras", "motors", "state", "data", "env", "families")
    if not isinstance(config, dict) or any(type(config.get(word, "")) is not str for word in words):
        raise UserError(f"{folder}/config.json is not what train.py writes; choose another checkpoint")
    return config


# -----------------------------------------------------------------------------------------------------------
# Folders. A program writes into a folder that is new, empty or its own, and is alone in it.

LOCK = ".lock"  # names the program that made a folder, and is locked while one is at work there
held: dict[Path, int] = {}  # folder -> descriptor of its lock


def claim_folder(folder: str | Path, program: str, create: bool = False) -> None:
    """Make sure that --out is this program's, and keep all others out until it ends.

    UserError for a folder that holds what another program or a person has put there, and for one that a
    running program has claimed. A folder that is not there yet is claimed when it is to be created.
    """
    folder = Path(folder)
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    if folder.absolute() in held or not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    # Hidden files are those of desktops and editors, and the lock.
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    owner = ""
    if (folder / LOCK).is_file():
        owner = (folder / LOCK).read_text(encoding="utf-8").strip()
    elif "train_state.pt" in there:  # a run from before there were locks
        owner = program
    if there and owner != program:
        made = f"was made by {owner}" if owner else f"holds other things ({', '.join(there[:3])})"
        raise UserError(f"{folder} {made} and is left as it is; choose another --out")
    lock_folder(folder, program)


def claim_run(config: Any, program: str) -> None:
    """claim_folder() for the --out of a training; UserError unless --resume is set where a run was begun."""
    if rank_and_world()[0] == 0:  # the only one that writes
        claim_folder(config.out, program)
    begun = Path(config.out, "train_state.pt").is_file()
    if begun and not config.resume:
        raise UserError(f"{config.out} already holds a run; add --resume to go on, or choose another --out")
    if config.resume and not begun:
        raise UserError(f"nothing to resume in {config.out}; leave --resume out")


def lock_folder(folder: str | Path, program: str) -> None:
    """Keep other programs out of a folder until this process ends, however it ends."""
    key = Path(folder).absolute()
    if key in held:
        return
    lock = os.open(key / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.suppress(ImportError):  # Windows has no fcntl: two programs there are not kept apart
        import fcntl

        try:
            # Unlike flock(), a lock of this kind is this process's alone: its children do not keep it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # else it is a file system without locks
                os.close(lock)
                raise UserError(f"another program is at work in {folder}; choose another --out") from None
    held[key] = lock
    # The name outlives the lock: it tells later programs whose folder this is.
    os.ftruncate(lock, 0)
    os.write(lock, f"{program}\n".encode())


def release_folders() -> None:
    """Let other programs into the folders again."""
    # Closing a descriptor ends its lock.
    while held:
        os.close(held.popitem()[1])


# -----------------------------------------------------------------------------------------------------------
# Packages, devices, processes


def require(module: str, package: str = "") -> ModuleType:
    """An optional module, imported; UserError says what to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"a package is missing; type: pip install {package or module}") from None


def load_triton_apart() -> None:
    """Load triton's library so that it uses its own LLVM, whatever was loaded before."""
    # Mesa, which draws on machines without a GPU, brings an LLVM, too. Where a picture was drawn first, an
    # ordinary import of triton (torch does it by itself) takes Mesa's, and the process dies of a segmentation
    # fault.
    triton = importlib.util.find_spec("triton") if sys.platform == "linux" else None
    if triton and triton.origin:
        for library in Path(triton.origin).parent.glob("_C/libtriton*.so"):
            ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_DEEPBIND)


load_triton_apart()


def fast_cpu(threads: int = 0) -> None:
    """Settings of the process that make training on a CPU faster; call before the first large tensor.

    threads: CPU threads of torch, 0: torch chooses.
    """
    import torch

    # glibc returns freed buffers to the kernel, and the page faults of new ones dominate: it is told to keep
    # them. The numbers of the parameters are those of its malloc.h.
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no mallopt
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: buffers below 1 GiB come from the heap
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not given back
            mallopt(-2, 1 << 28)  # M_TOP_PAD: it grows by 256 MiB at once
    torch.set_flush_denormal(True)  # arithmetic on denormal numbers is slow: they become zero
    if threads:
        torch.set_num_threads(threads)


def choose_device(name: str, precision: str = "auto") -> tuple[Any, Callable, str]:
    """--device and --precision -> (torch.device, a factory of autocast contexts, the arithmetic in words).

    "auto" is cuda, then mps, then cpu. Raises UserError for a device that is not there.
    """
    import torch

    if name == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = next(kind for kind, is_there in there.items() if is_there)
    # Under torchrun every process has a GPU of its own.
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    # Only a tensor shows whether a device can be used: a driver may be too old for torch.
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device={name} is not available here ({reason}); try --device=cpu") from None
    # fp16 would need a scaled loss; bf16 has the range of fp32.
    if has_bf16(device) and precision != "fp32":
        return device, lambda: torch.autocast("cuda", torch.bfloat16), "bf16 (the GPU has it), fp32 masters"
    return device, contextlib.nullcontext, "fp32"


def has_bf16(device: Any) -> bool:
    """Is it a GPU that computes in bf16? CUDA GPUs do from compute capability 8.0."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def cpu_has_bf16() -> bool:
    """Does the processor multiply bf16 matrices faster than fp32 ones? Those with AVX512-BF16 or AMX do."""
    import torch

    # A function that torch does not declare as public: it may go.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and supported()


def rank_and_world() -> tuple[int, int]:
    """This process's number and the number of processes, as torchrun sets them."""
    # Read anew at every call: the programs' output depends on it before torch.distributed is there.
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*words: Any) -> None:
    """print() on the first process only."""
    if rank_and_world()[0] == 0:
        print(*words, flush=True)


def join_processes(device: Any) -> None:
    """Meet the other processes of torchrun."""
    import torch.distributed as dist

    # nccl is the fast backend between GPUs and knows no CPU; gloo is the one for CPUs.
    if rank_and_world()[1] > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def wait_for_all() -> None:
    """Wait until every process has come here."""
    # The first process makes the data set that the others then read.
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def leave_processes() -> None:
    """Part from the other processes."""
    # Call wait_for_all() before: gloo aborts a process whose peer hangs up too soon.
    if "torch" in sys.modules:  # a program that has not imported it is not made to wait for it
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM ends the program by an exception, so that its other processes are ended, too."""

    # By default SIGTERM ends a process without its `finally` blocks.
    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_child(command: Sequence[str | Path]) -> int:
    """Run another program -> its exit status. It ends when this one is stopped."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child keeps this: we end it after Ctrl-C
    try:
        child = subprocess.Popen(command)
    finally:
        signal.signal(signal.SIGINT, before)
    # A killed parent must not leave a child behind that writes to the same folder.
    with terminable():
        try:
            return child.wait()
        finally:
            child.terminate()  # nothing happens to one that has ended
            child.wait()


class Stopwatch:
    """Seconds per stage of work: inside `with Stopwatch() as watch:` every mark(stage) ends a stage."""

    active: "Stopwatch | None" = None  # the model's code marks its stages without being handed one

    def __init__(self, device: Any = None):
        self.device = device
        self.seconds = defaultdict(float)
        self.last = time.perf_counter()

    def __enter__(self) -> "Stopwatch":
        Stopwatch.active = self
        return self

    def __exit__(self, *_: Any) -> None:
        Stopwatch.active = None

    def book(self, stage: str) -> None:
        """Book the time since the last call under `stage`."""
        # A GPU works behind the program's back: what it was given belongs to this stage.
        if self.device is not None and self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


def mark(stage: str) -> None:
    """The stage of that name ends here, if somebody holds a stopwatch."""
    if Stopwatch.active is not None:
        Stopwatch.active.book(stage)
