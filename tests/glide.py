"""Environments of test_evaluate.py, built on `reach`, the example of docs/environments.md."""

import time

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


class Endless(Reach):
    """It never ends an episode."""

    def step(self, action):
        obs, reward, _, _, _ = super().step(action)
        return obs, reward, False, False, {}


class Falling(Reach):
    """It plays chunks itself and terminates on failure; info tells."""

    def step_chunk(self, actions):
        for action in actions:
            obs, reward, _, _, _ = self.step(action)
        return obs, reward, True, False, {"is_success": False}


class Telling(Reach):
    """Its state is the number of steps so far, and its teacher says it; ten steps are an episode."""

    def reset(self, **options):
        self.count = 0
        return super().reset(**options)[0], {"reason": self.teach()}

    def look(self):
        return super().look() | {"state": np.full(2, self.count, np.float32)}

    def step(self, action):
        self.count += 1
        obs, reward, *_ = super().step(action)
        return obs, reward, False, self.count == 10, {"reason": self.teach()}

    def teach(self):
        return f"blue pad at t3 , red cube at t{self.count} r1"


class Blocked(Reach):
    """Its step does not come back."""

    def step(self, action):
        time.sleep(60)


class Blind(Reach):
    """Its state is not a number."""

    def look(self):
        return super().look() | {"state": np.full(2, np.nan)}


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
