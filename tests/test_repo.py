"""Tests of the repository as a whole: who imports whom, commands in the documentation, docstrings, requirements, paths."""

import ast
import importlib.metadata
import importlib.util
import re
import shlex
import sys

import pytest

import prepare
import rl
import sample
import train
from model import parse_config

ROOMS = {  # file: which of our files it may import
    "sim_env": set(),
    "data": set(),
    "model": set(),
    "real_env": {"sim_env"},
    "prepare": {"sim_env", "data", "model"},
    "train": {"sim_env", "data", "model"},
    "rl": {"train", "sim_env", "real_env", "data", "model"},
    "sample": {"sim_env", "real_env", "data", "model"},
}
OPTIONAL = {
    "matplotlib",
    "lerobot",
    "cv2",
    "scservo_sdk",
    "tokenizers",
    "transformers",
    "peft",
    "pyarrow",
    "av",
}  # imported where it is used; without it the program says what to install
DISTRIBUTION = {
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
}  # where the import's name is not the package's


def imports(path):
    """Names of the top-level modules that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import in a project without packages"
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_one_way(root):
    for path in root.glob("*.py"):
        assert path.stem in ROOMS, f"{path.name} has no room in the design"
        assert imports(path) & set(ROOMS) <= ROOMS[path.stem], path.name
    for name in ("sim_env", "real_env"):  # they run on machines without torch
        assert not (root / f"{name}.py").exists() or "torch" not in imports(root / f"{name}.py")


def test_requirements_name_what_is_imported_and_are_there(root):
    required = {
        re.match(r"[\w-]+", line).group()
        for line in (root / "requirements.txt").read_text().splitlines()
        if line.strip() and line[0] != "#"
    }
    for path in [*root.glob("*.py"), *root.glob("tests/*.py")]:
        foreign = (
            imports(path)
            - set(ROOMS)
            - set(sys.stdlib_module_names)
            - OPTIONAL
            - {"conftest", "feetech_emulator"}
        )
        assert {DISTRIBUTION.get(name, name) for name in foreign} <= required, path.name
    for name in required:
        assert importlib.metadata.version(name)
        module = {v: k for k, v in DISTRIBUTION.items()}.get(name, name)
        assert importlib.util.find_spec(module), name


def test_every_file_says_what_it_is(root):
    for path in [*root.glob("*.py"), *root.glob("tests/*.py")]:
        assert ast.get_docstring(ast.parse(path.read_text())), path.name


def commands(text):
    """(file, words) of every `python FILE.py ...` and `torchrun ... FILE.py ...` in a text."""
    for line in text.replace("\\\n", " ").splitlines():
        for match in re.finditer(r"(?:python3?|torchrun(?: --\S+)*) (\w+)\.py([^`#&|>\n]*)", line):
            yield match.group(1), shlex.split(match.group(2))


def check(name, words):
    cls, presets = {
        "prepare": (prepare.PrepareConfig, prepare.PRESETS),
        "train": (train.TrainConfig, train.PRESETS),
        "rl": (rl.RLConfig, rl.PRESETS),
        "sample": (
            sample.SampleConfig,
            dict.fromkeys(("debug", "tiny", "small", "base256", "base", "paper"), {}),
        ),
    }[name]
    if not {"--help", "-h"} & set(words):
        parse_config(cls, presets, words, "task" if name == "sample" else None)


@pytest.mark.parametrize("name", ["README.md", "train.py", "prepare.py", "sample.py", "rl.py"])
def test_documented_commands_parse(root, name):
    if not (root / name).exists():
        pytest.skip(f"no {name} yet")
    text = (root / name).read_text()
    found = list(commands(text if name.endswith(".md") else ast.get_docstring(ast.parse(text))))
    assert found
    for file, words in found:
        assert (root / f"{file}.py").exists() or f"# {file}.py:" in text, (
            file
        )  # its own, or one that the text itself shows
        if file in ("prepare", "train", "sample", "rl"):
            check(file, words)


def test_no_path_of_somebodys_machine(root):
    pattern = re.compile("(?<![\\w.~])/(" + "|".join(("work", "tmp", "home", "root", "Users")) + r")/\w")
    for path in [
        p
        for end in ("*.py", "*.md", "*.txt", "*.json", "*.toml", "tests/*.py", "assets/*.json")
        for p in root.glob(end)
    ]:
        assert not pattern.search(path.read_text()), path.name
