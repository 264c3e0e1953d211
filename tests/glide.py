"""Environments of test_evaluate.py, built on `reach`, the example of docs/environments.md."""

import numpy as np
from reach import Reach


class Glide(Reach):
    """Its state begins with the speed."""

    state = ("speed", "x", "y")

    def step(self, action):
        before = self.dot
        obs, *rest = super().step(action)
        speed = np.abs(self.dot - before).max()
        return obs | {"state": np.append(speed, self.dot).astype(np.float32)}, *rest

    def look(self):
        obs = super().look()
        return obs | {"state": np.append(0, obs["state"]).astype(np.float32)}


class Veiled(Glide):
    """Its motors are not in its state."""

    state = ("speed", "east", "north")


class Short(Glide):
    """It names more numbers than its state has."""

    state = ("speed", "x", "y", "z")


class Wrong(Glide):
    """Its state is no tuple of names."""

    state = property(lambda self: self.dot)


class Rolling(Reach):
    """It terminates on failure, too, and says in info whether it succeeded."""

    def step(self, action):
        obs, reward, there, out_of_time, info = super().step(action)
        return obs, reward, there or out_of_time, False, info | {"is_success": there}


class Broken(Reach):
    """Its step fails."""

    def step(self, action):
        return 1 / 0


class Odd(Reach):
    """Its observations are spoilt by what the test sets."""

    spoil = None

    def look(self):
        obs = super().look()
        Odd.spoil(obs)
        return obs
