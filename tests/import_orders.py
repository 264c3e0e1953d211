"""Draw pictures and use torch in one process, in the order of the command line (for test_common.py)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def draw():
    import sim_env

    env = sim_env.SO100Env(px=32)
    obs, _ = env.reset(seed=1)
    assert obs["images"]["front"].any()
    env.close()
    print("drawn")


def draw_with_mujoco_alone():
    os.environ.setdefault("MUJOCO_GL", "egl")
    import mujoco

    model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
    with mujoco.Renderer(model, 32, 32) as renderer:
        renderer.update_scene(mujoco.MjData(model))
        renderer.render()
    print("drawn")


def use_torch():
    import torch

    import model

    with torch.device("meta"):  # imports triton, where it is installed
        model.LanguageModel(model.Config())
    print("torch")


ORDERS = {
    "draw_then_torch": (draw, use_torch, draw),
    "torch_then_draw": (use_torch, draw, draw),
    "mujoco_then_torch": (draw_with_mujoco_alone, use_torch, draw),
}

if __name__ == "__main__":
    for part in ORDERS[sys.argv[1]]:
        part()
