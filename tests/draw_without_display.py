"""A process of its own for test_sim_env.py: import the named modules in this order, then draw."""

import importlib
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    sim_env = sys.modules["sim_env"]
    print("imported")
    try:
        obs, _ = sim_env.SO100Env().reset(seed=0)
    except sim_env.UserError as error:
        raise SystemExit(f"error: {error}") from None
    assert "torch" not in sys.modules
    print("drawn", int(obs["images"]["front"].std()))


if __name__ == "__main__":
    main()
