"""Tests of common.py: the command line, files that are written whole, LLVM's two libraries in one process."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from common import (
    FORMAT,
    UserError,
    append_log,
    atomic_path,
    check_options,
    claim_folder,
    opt,
    parse_config,
    read_json,
    read_log,
    release_folders,
    require,
    resumed_config,
    run_program,
    trim_log,
    write_json,
)

# -- the command line ---------------------------------------------------------------------------------------


@dataclass
class Options:
    config: str = opt("", "preset")
    steps: int = opt(3, "an int")
    rate: float = opt(0.5, "a float", "[0, 1)")
    fast: bool = opt(False, "a flag")
    name: str = opt("", "a string")
    kind: str = opt("one", "a choice", ("one", "two"))
    width: int = opt(8)
    out: str = opt("out/x", "a folder")
    views: str = opt("", "a list", many=True)
    delays: str = opt("", "a list of numbers", "[0, 9]", many=True)
    port: str = opt("", "for one kind alone", needs="kind=two")
    again: int = opt(0, "for neither", needs=("not fast", "name|not kind=one"))

    def __post_init__(self):
        check_options(self)


def options(*argv, positional=""):
    presets = {"small": {}, "tiny": dict(steps=7, width=4, of_another_program=1)}
    return parse_config(Options, presets, list(argv), positional)


def test_options_in_all_their_forms():
    tiny = options("--config", "tiny")
    assert (tiny.steps, tiny.width) == (7, 4) and tiny.typed == {"config": "tiny"}
    assert (
        options("--steps=9", "--config=tiny").steps == 9
    )  # what is typed wins over the preset, in any order
    assert options("--steps", "-4").steps == -4
    assert options("--steps=1e5").steps == 100_000 and options(f"--steps={2**60 + 1}").steps == 2**60 + 1
    assert options("--name=a=b=c").name == "a=b=c"
    assert options("--rate", "0").rate == 0.0
    assert options("a b", "--steps=1", positional="name").name == "a b"
    for words, value in (
        (["--fast"], True),
        (["--fast=1"], True),
        (["--fast", "false"], False),
        (["--fast=True"], True),
        (["--fast", "0"], False),
    ):
        assert options(*words).fast is value
    both = options("--fast", "--steps=2")  # a flag does not swallow the next option
    assert both.fast and both.steps == 2


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--stepz=3"], "did you mean steps"),
        (["--width=3"], "unknown option --width"),
        (["--config", "smal"], "did you mean small"),
        (["--config=qqq"], "choose from small, tiny"),
        (["--steps=2.5"], "--steps takes int, not '2.5'"),
        (["--steps=many"], "takes int"),
        (["--steps=inf"], "takes int"),
        (["--rate=x"], "takes float"),
        (["--rate=nan"], "--rate must lie in [0, 1), not nan"),
        (["--rate=1"], "--rate must lie in [0, 1), not 1.0"),
        (["--rate=-0.1"], "--rate must lie in [0, 1)"),
        (["--kind=three"], "--kind must be one of one, two, not 'three'"),
        (["--fast=maybe"], "takes bool"),
        (["word"], "unexpected word 'word'"),
        (["--steps"], "needs a value"),
        (["--steps", "--fast"], "needs a value"),
        (["--steps=2", "--steps=3"], "--steps is given twice: 2 and 3"),
        (["--name="], "--name is empty"),
        (["--name", " "], "--name is empty"),
        (["--rate=-inf"], "--rate must lie in [0, 1), not -inf"),
        (["--views=front,front"], "--views must list different words"),
        (["--views=front,"], "--views must list different words"),
        (["--views=front, wrist"], "--views must list different words"),
        (["--delays=1,-1"], "--delays must lie in [0, 9], not -1"),
        (["--delays=1,10"], "--delays must lie in [0, 9], not 10"),
        (["--delays=1,a"], "--delays must lie in [0, 9], not a"),
        (["--port=x"], "--port does nothing without --kind=two: add it or leave --port out"),
        (["--again=1", "--fast"], "--again does nothing with --fast: leave --again out"),
        (["--again=1"], "--again does nothing without --name and with --kind=one: leave --again out"),
    ],
)
def test_bad_options_exit_with_one_line(fails, argv, said):
    assert said in fails(lambda a: options(*a), argv)


def test_options_that_do_something_or_ask_for_nothing_pass():
    assert options("--port=x", "--kind=two").port == "x"
    assert options("--again=1", "--name=y").again == options("--again=1", "--kind=two").again == 1
    assert options("--again=0", "--fast").fast  # a zero asks for nothing
    assert options("--views=front,wrist", "--delays=0,4").views == "front,wrist"


def test_help_shows_every_option_and_what_it_allows(capsys):
    with pytest.raises(SystemExit) as caught:
        options("--help")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{name}=" in shown for name in ("steps", "rate", "fast", "name", "kind"))
    assert "an int" in shown and "[0, 1)" in shown and "one | two" in shown and "width" not in shown


def test_a_run_that_goes_on_keeps_its_settings():
    saved = {"steps": 5, "rate": 0.25, "width": 4, "fast": True, "format": FORMAT}
    resumed = resumed_config(options("--steps=9"), saved, {"steps"})
    assert (resumed.steps, resumed.rate, resumed.width, resumed.fast) == (9, 0.25, 4, True)
    with pytest.raises(UserError, match="begun with --rate=0.25, not 0.75; leave --rate out"):
        resumed_config(options("--rate=0.75"), saved, {"steps"})
    with pytest.raises(UserError, match="older version"):
        resumed_config(options(), {"steps": 5}, set())


def test_mistakes_end_in_one_line_and_defects_in_their_traceback(fails):
    def mistaken(config):
        raise UserError("type something else")

    assert fails(lambda _: run_program(mistaken, None), []) == "error: type something else"
    with pytest.raises(ZeroDivisionError):
        run_program(lambda config: 1 / 0, None)
    with pytest.raises(UserError, match="pip install surely-not-there"):
        require("surely_not_there", "surely-not-there")


# -- files --------------------------------------------------------------------------------------------------


def test_a_writer_that_dies_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": 1})

    def die():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        die()
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(path.parent) == ["file.json"]


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match="x.json cannot be read .*No such file"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="x.json cannot be read"):
        read_json(tmp_path / "x.json")


def test_log_lines_behind_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in range(4):
        append_log(path, {"step": step, "loss": math.pi})
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_log(path)] == [0, 1, 2, 3]
    trim_log(path, "step", 2)
    assert [line["step"] for line in read_log(path)] == [0, 1, 2] and path.read_text().endswith("}\n")


def test_a_folder_belongs_to_the_program_that_made_it(tmp_path):
    new = tmp_path / "new"
    claim_folder(new, "train.py")
    assert not new.exists()  # before there is anything to write
    claim_folder(new, "train.py", create=True)
    (new / "log.jsonl").write_text("mine")
    release_folders()
    claim_folder(new, "train.py")
    release_folders()
    with pytest.raises(UserError, match="was made by train.py and is left as it is"):
        claim_folder(new, "rl.py")
    for name in ("model.safetensors", "config.json", "meta.json", "log.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("somebody's")
        with pytest.raises(UserError, match=f"holds other things .{name}"):
            claim_folder(folder, "train.py", create=True)
        assert [path.name for path in folder.iterdir()] == [name]
        with pytest.raises(UserError, match="is a file; choose another --out"):
            claim_folder(folder / name, "train.py")


def test_two_programs_do_not_share_a_folder(tmp_path, root):
    script = (
        "import common, sys; common.claim_folder(sys.argv[1], 'train.py', True); print(flush=True); input()"
    )
    child = [sys.executable, "-c", script, tmp_path / "run"]
    other = subprocess.Popen(child, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(UserError, match="another program is at work"):
        claim_folder(tmp_path / "run", "train.py")
    other.kill()
    other.communicate()
    claim_folder(tmp_path / "run", "train.py")  # the dead keep no lock
    release_folders()


def test_ctrl_c_is_one_line_with_the_command_that_goes_on(tmp_path, monkeypatch, capsys):
    def stopped(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py", f"--out={tmp_path}", "--task=a b"])
    config = options(f"--out={tmp_path}")
    config.resume = False
    for ending in ("'--task=a b'", "'--task=a b' --resume"):
        with pytest.raises(SystemExit) as caught:
            run_program(stopped, config)
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 130 and line.endswith(f"python train.py --out={tmp_path} {ending}")
        (tmp_path / "train_state.pt").touch()


# -- libraries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["draw_then_torch", "torch_then_draw", "mujoco_then_torch"])
def test_pictures_and_triton_live_in_one_process(order, root):
    """Mesa and triton each bring an LLVM; drawing and torch's meta device must work in any order."""
    child = [sys.executable, root / "tests" / "import_orders.py", order]
    done = subprocess.run(child, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and sorted(done.stdout.split()) == ["drawn", "drawn", "torch"], done.stderr
    if importlib.util.find_spec("triton") is None:
        pytest.skip("passed, but without triton there is nothing that could go wrong")
