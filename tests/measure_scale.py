"""Measures what the end of a run takes at any size: a finished run of main.py with its default flags, copied
to so many images, is checked, added up, drawn and put on a page, and then started again.

    python main.py --save_dir output/
    python tests/measure_scale.py output/ demo/images 1000 5000 50000

For each number: seconds and milliseconds an image, the largest process's peak memory, and the seconds of
starting again. Flags that it does not know are main.py's. With --killed the first attempt is killed in its
middle. docs/performance.md has what came out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from multiplied import multiply  # noqa: E402

from diffattack.data.records import read_configuration  # noqa: E402

MAIN = Path(__file__).resolve().parent.parent / "main.py"


def copy_inputs(pictures: Path, source: Path, run: Path, folder: Path) -> list[str]:
    """Hard links of the pictures under the names of the copied run, and their labels; the flags that say
    so.
    """
    configuration, names = read_configuration(run), read_configuration(source)["images"]
    images = folder / "images"
    images.mkdir()
    for name in configuration["images"]:
        original = next(one for one in names if name.split("_", 1)[1] == one)
        try:
            os.link(pictures / original, images / name)
        except OSError:  # on another file system
            shutil.copy2(pictures / original, images / name)
    labels = folder / "labels.txt"
    labels.write_text("".join(f"{label}\n" for label in configuration["labels"]))
    return ["--images_root", str(images), "--label_path", str(labels), "--save_dir", str(run)]


def timed(command: list[str], kill_after: float | None = None) -> tuple[float, float]:
    """Seconds, and the largest process's peak memory in MB."""
    started = time.perf_counter()
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen(command, stdout=nothing, stderr=None, cwd=MAIN.parent)
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    _, status, usage = os.wait4(process.pid, 0)
    if kill_after is None and status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="of main.py with its default flags")
    parser.add_argument("pictures", type=Path, help="its --images_root")
    parser.add_argument("counts", type=int, nargs="+", help="of images")
    parser.add_argument("--folder", type=Path, default=Path("output_scale"), help="is deleted at the end")
    parser.add_argument("--killed", type=float, help="kill the first attempt after so many seconds")
    arguments, flags = parser.parse_known_args()
    for count in arguments.counts:
        folder = arguments.folder.absolute() / str(count)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings = {"images_root": str(folder / "images"), "label_path": str(folder / "labels.txt")}
        run = multiply(arguments.run, folder / "run", count, settings=settings)
        inputs = copy_inputs(arguments.pictures.absolute(), arguments.run, run, folder)
        command = [sys.executable, str(MAIN), *inputs, *flags]
        if arguments.killed:
            timed(command, arguments.killed)
        seconds, memory = timed(command)
        again, _ = timed(command)
        print(
            f"{count:6} images: {seconds:7.1f} s, {1000 * seconds / count:6.1f} ms an image, "
            f"{memory:6.0f} MB; again {again:.1f} s",
            flush=True,
        )
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
