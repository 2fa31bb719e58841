"""The commands as processes of their own that need not import the libraries: one process has imported them,
and forks the others. Signals, limits, file descriptors, arguments and the environment are as real as those of
`subprocess.Popen`, which `Forked` resembles; what a library reads from the environment while it is imported
is that of the process that forks.

    process = Forked(["main.py", "--help"], ROOT, os.environ)
    out, errors = process.communicate(timeout=60)
"""

import atexit
import os
import pickle
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IS_POSSIBLE = hasattr(os, "pidfd_open")  # Linux
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
    "skimage",
    "piq",
    "accelerate",
    "psutil",
    "natsort",
    "jinja2",
    "efficientnet_lite_pytorch",
)


# ---------------------------------------------------------------- in the process that forks


def serve(control: socket.socket) -> None:
    """Imports the libraries and then forks a process for each request, of which it tells the number and, when
    it has ended, the exit code; until nobody can ask it any more.
    """
    sys.path[0] = str(ROOT)
    for name in IMPORTED:
        __import__(name)
    # each process imports what is ours anew; what mends torchvision lasts as long as its module
    _ours = [sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "diffattack"]
    waited_for = selectors.DefaultSelector()
    waited_for.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in waited_for.select():
            if key.fileobj is control:
                request, streams, _, _ = socket.recv_fds(control, 1_000_000, 4)
                if not request:
                    os._exit(0)
                pid = os.fork()
                if pid == 0:
                    become(pickle.loads(request), streams[1:])
                answers = socket.socket(fileno=streams[0])
                for stream in streams[1:]:
                    os.close(stream)
                answers.send(pickle.dumps(pid))
                waited_for.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, answers))
                continue
            pid, answers = key.data
            waited_for.unregister(key.fileobj)
            os.close(key.fd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            try:
                answers.send(pickle.dumps(code))
            except BrokenPipeError:  # nobody waits for it any more
                pass
            answers.close()


def become(request: dict, streams: list[int]) -> None:
    """In a process that was forked: runs the command and ends as Python does."""
    if request["start_new_session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 1000)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["limits"]:
        import resource  # which Windows has not

        for limit, value in request["limits"].items():
            resource.setrlimit(limit, (value, value))
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).absolute().parent)
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


_server: socket.socket | None = None  # of this process


def server() -> socket.socket:
    """Starts the process that forks others, with the first of them; it ends with this process."""
    global _server
    if _server is None:
        _server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
    return _server


class Forked:
    """A command that runs; as `subprocess.Popen` with `text=True`.

    Args:
        command: of this project, "main.py" and its arguments.
        stdout, stderr: a pipe, or what is to be written to.
        limits: of `resource.setrlimit`, by their number.
    """

    def __init__(
        self,
        command: list[str],
        cwd: Path,
        env: Mapping[str, str],
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        start_new_session: bool = False,
        limits: dict[int, int] | None = None,
    ):
        self.args, self.returncode, self.read, self.said = command, None, {}, {}
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = dict(
            command=[*map(str, command)],
            cwd=str(cwd),
            env=dict(env),
            start_new_session=start_new_session,
            limits=limits or {},
        )
        ends = [theirs.detach(), os.open(os.devnull, os.O_RDWR)]
        for name, stream in (("stdout", stdout), ("stderr", stderr)):
            if stream == subprocess.PIPE:
                ours, stream = os.pipe()
                reader = threading.Thread(target=self._read, args=(name, ours), daemon=True)
                self.read[name] = reader
                reader.start()
            elif stream == subprocess.DEVNULL:
                stream = os.open(os.devnull, os.O_RDWR)
            ends.append(stream if isinstance(stream, int) else os.dup(stream.fileno()))
        socket.send_fds(server(), [pickle.dumps(request)], ends)
        for end in ends:
            os.close(end)
        self.pid = pickle.loads(self._answers.recv(1000))

    def _read(self, name: str, end: int) -> None:
        with os.fdopen(end) as stream:
            self.said[name] = stream.read()

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self.returncode = pickle.loads(self._answers.recv(1000))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for reader in self.read.values():
            reader.join(timeout)
        return self.said.get("stdout"), self.said.get("stderr")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
