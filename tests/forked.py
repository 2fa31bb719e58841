"""The commands as processes of their own that need not import the libraries: one process has imported them,
and forks the others. Signals, limits, arguments and the environment are as real as those of
`subprocess.Popen`, which `Forked` resembles; what a library reads from the environment while it is imported
is that of the process that forks.

    process = Forked(["main.py", "--help"], env=os.environ)
    out, errors = process.communicate(timeout=60)
"""

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (  # what a run imports of others, in its order
    "diffattack.common.torchvision",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.models.autoencoders.autoencoder_dc",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "torchmetrics.functional.image",
    "scipy.stats",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_pdf",
    *("skimage", "piq", "accelerate", "psutil", "natsort", "jinja2", "efficientnet_lite_pytorch"),
)


# ---------------------------------------------------------------- in the process that forks


def serve() -> None:
    """Imports the libraries and then, for each line of its input, forks a process that starts the command,
    writes its number, and waits for it to write its exit code.
    """
    sys.path[0] = str(ROOT)
    for name in IMPORTED:
        __import__(name)
    # each process imports what is ours anew; what mends torchvision lasts as long as its module
    _ours = [sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "diffattack"]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # it waits for none of them
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                become(**request)
            print(pid, flush=True)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            Path(request["folder"], "partial").write_text(str(code))
            os.rename(f"{request['folder']}/partial", f"{request['folder']}/code")
            os._exit(0)


def become(command: list[str], folder: str, env: dict, start_new_session: bool, limits: dict) -> None:
    """In a process that was forked: runs the command and ends as Python does."""
    if start_new_session:
        os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.closerange(3, 1000)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limits:
        import resource  # which Windows has not

        for limit, value in limits.items():
            resource.setrlimit(int(limit), (value, value))
    sys.argv = command
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:  # as at the end of a program
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# ---------------------------------------------------------------- in the tests


@functools.cache
def server() -> subprocess.Popen:
    """The process that forks others; it ends with this one."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True)


class Forked:
    """A command of this project, "main.py" and its arguments, that runs; as `subprocess.Popen`. `limits` are
    of `resource.setrlimit`, by their number.
    """

    def __init__(self, command: list[str], env: Mapping, start_new_session=False, limits: dict | None = None):
        self.args, self.folder = list(map(str, command)), Path(tempfile.mkdtemp())
        known = dict(folder=str(self.folder), env=dict(env), start_new_session=start_new_session)
        server().stdin.write(json.dumps(dict(command=self.args, limits=limits or {}, **known)) + "\n")
        server().stdin.flush()
        self.pid = int(server().stdout.readline())

    def poll(self) -> int | None:
        path = self.folder / "code"
        return int(path.read_text()) if path.exists() else None

    def wait(self, timeout: float = float("inf")) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return self.poll()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def communicate(self, timeout: float = float("inf")) -> tuple[str, str]:
        self.wait(timeout)
        return (self.folder / "stdout").read_text(), (self.folder / "stderr").read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    serve()
