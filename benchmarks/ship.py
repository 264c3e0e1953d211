"""A trained policy as one small file, as it ships with this repository.

    python -m benchmarks.ship --run=out/small --out=assets/small.safetensors

Weights are rounded to bf16. What `python sample.py --run=assets/small.safetensors --eval=300` then reports is
measured from that very file.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from common import UserError, atomic_path, check_options, opt, parse_config, run_program
from model import SHIPPED, Config


@dataclass
class ShipConfig:
    """The options of benchmarks.ship."""

    run: str = opt("out/small", "checkpoint folder")
    out: str = opt(str(SHIPPED), "file to write")

    def __post_init__(self):
        check_options(self)


def ship(cfg: ShipConfig) -> None:
    """Pack a checkpoint folder into one file."""
    # The door for checkpoints: it complains of a folder that is no whole one.
    Config.read(cfg.run)
    folder = Path(cfg.run)
    if not cfg.out.endswith(".safetensors"):
        raise UserError("the file must end in .safetensors: type --out=assets/small.safetensors")
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        # the scale of states and actions keeps all its digits
        if "." in name:
            weights[name] = tensor.to(torch.bfloat16)
    # A checkpoint's other two files are short texts: they fit into the metadata of a safetensors file.
    texts = {name: (folder / name).read_text() for name in ("config.json", "tokenizer.json")}
    with atomic_path(cfg.out) as temporary:
        temporary.write_bytes(save(weights, texts))
    print(f"{cfg.out}: {Path(cfg.out).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_program(ship, parse_config(ShipConfig, {}, sys.argv[1:]))
