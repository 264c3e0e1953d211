"""A server for test_kill.py and others: it runs programs as forks of itself and kills them at chosen changes
on disk.

Every line on standard input is a JSON list [program, argv, folder, at, nth, delay, alone, settings] (see
conftest.strike); the answer is the exit status. All programs are forks of this process, which has imported
what takes long.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def strike_at(folder, at, nth, delay, alone):
    """Kill this process right before the nth change on disk of a path below `folder` that contains `at`."""
    left = nth

    def hook(event, args):
        nonlocal left
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes and event not in ("os.rename", "os.remove"):
            return
        path = os.path.abspath(str(args[0]))
        if at not in path or not path.startswith(folder):
            return
        left -= 1
        if left == 0 and delay:
            threading.Timer(delay, os.kill, (0, signal.SIGKILL)).start()
        elif left == 0:
            os.kill(os.getpid() if alone else 0, signal.SIGKILL)

    sys.addaudithook(hook)


def run(modules, program, argv, folder, at, nth, delay, alone, settings):
    """Body of the fork: run the program in `folder`, its output in `folder`.log; never returns."""
    os.setsid()
    os.chdir(folder)
    for descriptor, path in ((0, os.devnull), (1, folder + ".log"), (2, folder + ".log")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
    signal.alarm(300)
    strike_at(folder, at, nth, delay, alone)
    for name, value in settings.items():  # a variable of the program, or "module.variable"
        module, _, variable = name.rpartition(".")
        setattr(importlib.import_module(module or program), variable, value)
    status = 0
    try:
        modules[program].main(argv)
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status or 0)


def main():
    modules = {name: importlib.import_module(name) for name in ("prepare", "rl", "train")}
    for slow in ("torch._dynamo", "matplotlib.pyplot"):  # the forks have them already
        with contextlib.suppress(ImportError):
            importlib.import_module(slow)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(modules, *json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
