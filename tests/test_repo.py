"""Tests of the repository: imports, the core without extras/, documented commands, requirements, size."""

import ast
import importlib.metadata
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

import prepare
import rl
import sample
import train
from common import parse_config
from model import Config, all_presets

ROOMS = {  # file: which of our files it may import; extras/ only inside functions
    "common": set(),
    "sim_env": {"common"},
    "data": {"common", "model"},  # model for its type alone
    "model": {"common", "data", "extras"},
    "evaluate": {"common", "sim_env"},
    "train": {"common", "data", "model", "evaluate", "extras"},
    "prepare": {"common", "data", "sim_env", "evaluate", "model", "extras"},
    "rl": {"common", "data", "sim_env", "model", "evaluate", "train", "extras"},
    "sample": {"common", "data", "sim_env", "model", "evaluate", "extras"},
    "extras/backbones": {"common", "data", "model"},
    "extras/lerobot_io": {"common", "data", "sim_env"},
    "extras/nsvla": {"common", "data", "sim_env", "model", "evaluate", "train"},
    "extras/real_env": {"common", "sim_env", "evaluate"},
    "extras/realtime": {"common", "sim_env", "model", "evaluate", "extras"},
}
# Imported where it is used; without it the program says what to install.
OPTIONAL = {
    "matplotlib",
    "lerobot",
    "cv2",
    "scservo_sdk",
    "serial",
    "tokenizers",
    "transformers",
    "peft",
    "pyarrow",
    "av",
}
DISTRIBUTION = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}  # where the import has another name
PROGRAMS = {
    "prepare": (prepare.PrepareConfig, ""),
    "train": (train.TrainConfig, ""),
    "rl": (rl.RLConfig, ""),
    "sample": (sample.SampleConfig, "task"),
}


def imports(path, nodes=None):
    """Names of the top-level modules that a file imports, by default anywhere, also inside functions."""
    names = set()
    for node in nodes or ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import in a project without packages"
            names.add(node.module.split(".")[0])
    return names


def modules(root):
    return [*root.glob("*.py"), *root.glob("extras/*.py")]


def test_imports_go_one_way(root):
    ours = {name.split("/")[0] for name in ROOMS}
    for path in modules(root):
        room = str(path.relative_to(root).with_suffix(""))
        assert room in ROOMS, f"{room} has no room in the design"
        assert imports(path) & ours <= ROOMS[room], room
        if "/" not in room:  # no core file needs extras/ to be imported
            assert "extras" not in imports(path, ast.parse(path.read_text()).body), room
    for name in (
        "common.py",
        "sim_env.py",
        "evaluate.py",
        "extras/real_env.py",
    ):  # workers and arms without torch
        assert "torch" not in imports(root / name, ast.parse((root / name).read_text()).body), name


def test_the_core_works_without_extras(root, tmp_path):
    """All programs on `debug`, in a copy of the repository that lacks extras/."""
    for path in root.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "assets").mkdir()
    for name in ("so100.xml", "tasks.json"):
        shutil.copy(root / "assets" / name, tmp_path / "assets")
    for command in (
        "prepare.py --config debug",
        "train.py --config debug --device=cpu --threads=1 --eval=1",
        "rl.py --config debug --device=cpu --threads=1 --iterations=1",
        "sample.py --config debug",
        "sample.py --config debug --eval=1 --splits=id",
    ):
        words = [sys.executable, *command.split()]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert list(tmp_path.glob("out/debug/sample/*.gif"))
    missing = subprocess.run(
        [sys.executable, "sample.py", "--config", "debug", "--interactive"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 2 and "extras" in missing.stderr, missing.stderr


def test_requirements_name_what_is_imported_and_are_there(root):
    lines = (root / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w-]+", line).group() for line in lines if line.strip() and line[0] != "#"}
    own = {path.stem for path in [*modules(root), *root.glob("tests/*.py")]} | {
        "extras",
        "benchmarks",
        "reach",
        "glide",
    }
    for path in [*modules(root), *root.glob("tests/*.py")]:
        foreign = imports(path) - own - set(sys.stdlib_module_names) - OPTIONAL
        assert {DISTRIBUTION.get(name, name) for name in foreign} <= required, path.name
    modules_of = {v: k for k, v in DISTRIBUTION.items()}
    for name in required:
        assert importlib.metadata.version(name)
        assert importlib.util.find_spec(modules_of.get(name, name)), name


def test_every_file_says_what_it_is_and_every_public_function_what_it_does(root):
    for path in [*modules(root), *root.glob("tests/*.py")]:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path.name
        if path.parent.name == "tests":
            continue
        for node in tree.body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and node.name != "main":
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def commands(text):
    """(file, words) of every `python FILE.py ...` and `torchrun ... FILE.py ...` in a text."""
    for line in text.replace("\\\n", " ").splitlines():
        for match in re.finditer(r"(?:python3?|torchrun(?: --\S+)*) (\w+)\.py([^`#&|>\n]*)", line):
            yield match.group(1), shlex.split(match.group(2))


DOCUMENTED = ["README.md", "docs", "train.py", "prepare.py", "sample.py", "rl.py", "extras/realtime.py"]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_commands_parse(root, name):
    if name == "docs":
        text = "\n".join(path.read_text() for path in sorted(root.glob("docs/*.md")))
    else:
        text = (root / name).read_text()
        if name.endswith(".py"):
            text = ast.get_docstring(ast.parse(text))
    found = list(commands(text))
    assert found
    for file, words in found:
        assert (root / f"{file}.py").exists() or f"# {file}.py:" in text, file  # or one that the text shows
        if file in PROGRAMS and "--help" not in words:
            cls, positional = PROGRAMS[file]
            parse_config(cls, all_presets(), words, positional)


def test_readme_is_short_and_its_links_lead_somewhere(root):
    text = (root / "README.md").read_text()
    assert len(text.splitlines()) <= 230 and len(text.split()) <= 2200
    assert len(text[: text.index("python train.py")].split()) <= 200
    for path in [root / "README.md", *root.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_line_numbers_of_the_readme_are_true(root):
    text = (root / "README.md").read_text()
    for file, count in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text, re.M):
        assert len((root / file).read_text().splitlines()) == int(count), f"{file} has another length"
    for file, rest in re.findall(r"^\d\. `(\w+\.py)`: (.*)", text, re.M):
        lines = (root / file).read_text().splitlines()
        for first, last in re.findall(r"(\d+)-(\d+)", rest):
            begin = lines[int(first) - 1].strip()
            assert begin.startswith(("def ", "class ", "@")), f"{file}:{first} is {begin!r}"
            after = "".join(lines[int(last) : int(last) + 1]).strip()
            assert not after, f"{file}:{last} does not end what begins there: {after!r}"


def test_no_path_of_somebodys_machine(root):
    folders = "|".join(("work", "tmp", "home", "root", "Users"))
    pattern = re.compile(rf"(?<![\w.~])/({folders})/\w")
    kinds = (
        "*.py",
        "*.md",
        "*.txt",
        "*.json",
        "*.toml",
        "tests/*.py",
        "extras/*.py",
        "docs/*.md",
        "assets/*.json",
    )
    for kind in kinds:
        for path in root.glob(kind):
            assert not pattern.search(path.read_text()), path.name


def test_every_float_option_names_its_interval():
    """By it check_options() refuses what is no finite number."""
    for cls in (Config, *(cls for cls, _ in PROGRAMS.values())):
        for f in fields(cls):
            assert type(f.default) is not float or f.metadata["allowed"].startswith(("[", "(")), f.name
