"""Writes report.html, the page on which a run is looked through: a table of its images, each of which opens.

    python main.py --save_dir output_fixed/      # writes output_fixed/report.html at its end
    python utils.py output_fixed                 # writes it anew, with the figures

A run of up to EACH images is one file, which holds their pictures, too. Of more images, what the page shows
lies in the folder FILES beside it and is loaded as it is looked at, and pictures are the run's own:

    report_files/table.js           what the table shows, a row an image
    report_files/images_246.js      what is shown of images 12,300 to 12,349 when one of them is opened
"""

import base64
import io
import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffattack.data.images import delete_abandoned, read_pair, replacing
from diffattack.data.records import ANALYSIS, ImageRecord, Run, json_text, outcome_of
from diffattack.data.summaries import timestep_rows, timestep_shares
from diffattack.evaluation.tables import MEASURES, in_words

FILES = "report_files"  # beside report.html: file managers take a folder of that name along with the page
EACH = 50  # images whose details are in one file, or in the page
OUTCOMES = ("fooled", "not fooled", "wrong before")
DETAILS = ("target", "predictions", "quality", "curves")  # of an image, which are shown when it is opened
SIDES = ("before", "after", "reconstructed")
PICTURES = ("originImage", "adv_image", "diff_absolute")
LARGEST = 384  # pixels at the side of a picture that is part of a page
AMPLIFIED = 8  # times, of the absolute difference
# of single images, whose curves are on the page; of attacks without timesteps the last alone
IMAGE_FIGURES = ("attention", "contact_sheet")
FIGURES = {  # pooled, in the order of the page: what is shown, for those who do not see it, too
    "average_loss_per_timestep": "Bars: share of each timestep in the self-attention loss, with deviations",
    "layer_shares": "Grid of percentages: share of each layer in the loss of each timestep",
    "weight_curves": "Weight of each timestep over the iterations, and of the named schedules",
    "losses": "Losses before and after their factors, gradients, and confidence, over iterations",
    "loss_per_timestep": "Self-attention loss of each timestep at the second, middle and last iterations",
    "tradeoff": "Attack success over PSNR, SSIM and L2, with a point for each iteration that was judged",
}


def write_page(run: Run, results: dict) -> None:
    """Writes `report.html` into the folder of a finished run, and FILES beside it where there are more than
    EACH images.

    Args:
        results: of results.json, without what it says of each image.
    Raises:
        OSError: a picture is missing, or the page cannot be written.
        RecordError: a record cannot be used.
    """
    is_small = len(run.records) <= EACH
    models = [classifier["model"] for classifier in results.get("classifiers", ())]
    scripts = scripts_of(run, models, is_small)
    inline, beside = [script for _, script in scripts] if is_small else [], []
    (run.folder / FILES).mkdir(exist_ok=True)
    for name, script in scripts:
        beside.append(name)
        with replacing(run.folder / FILES / name) as temporary:
            temporary.write_text(script)
    drawn = {run.folder / ANALYSIS / f"{name}.png": text for name, text in FIGURES.items()}
    url = png_url if is_small else lambda path: f"{ANALYSIS}/{path.name}"
    write_filled(
        run.folder / "report.html",
        "run_template.html",
        name=run.folder.absolute().name,
        results=results,
        count=len(run.records),
        timestep_table=timestep_rows(run.summary.structure, run.timesteps) if run.timesteps else None,
        figures=[(text, url(path)) for path, text in drawn.items() if path.is_file()],
        inline=inline,
        files=FILES,
    )
    remove_page_files(run.folder, beside)


def read_results(folder: Path) -> dict:
    """results.json without what it says of each image, which comes last in it and is most of it.

    Raises:
        OSError: it is missing.
        ValueError: it is no JSON.
    """
    with open(folder / "results.json", encoding="utf-8") as file:
        text = "".join(takewhile(lambda line: not line.startswith('  "images": ['), file)).rstrip()
    return json.loads(text.removesuffix(",") + "}" if text.endswith(",") else text)


# ---------------------------------------------------------------- what pages are made of


def write_filled(path: Path, template: str, **content: object) -> None:
    """Writes a page: a template of this folder, filled in, with all that is filled in escaped.

    Raises:
        OSError: the page cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **blocks)
    environment.globals |= {"in_words": in_words, "amplified": AMPLIFIED}
    page = environment.get_template(template).render(**content)
    with replacing(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a file name need not be Unicode


def picture_url(picture: np.ndarray, lossless: bool = False) -> str:
    """A picture, uint8 `(H, W, 3)`, as part of a page: compressed, and no larger than LARGEST."""
    image, out = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((LARGEST, LARGEST))
    image.save(out, "WEBP", quality=90, lossless=lossless)
    return data_url(out.getvalue(), "image/webp")


def png_url(path: Path) -> str:
    return data_url(path.read_bytes(), "image/png")


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def amplified_difference(clean: np.ndarray, adversarial: np.ndarray) -> np.ndarray:
    """The absolute difference of two pictures, uint8 `(H, W, 3)`, AMPLIFIED times."""
    return (AMPLIFIED * np.abs(adversarial.astype(np.int16) - clean)).clip(0, 255).astype(np.uint8)


def script_json(value: object) -> str:
    """JSON as a script may hold it, in ASCII and without what could end the script or a comment in it; of
    numbers five digits, which is more than a page shows, and null for those that are not finite.
    """
    short = json.loads(json_text(value), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    text = json.dumps(short, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------------------------------------------------------------- the files beside a page


def page_files(folder: Path) -> list[Path]:
    """What lies in FILES beside the page of a run."""
    return [p for p in (folder / FILES).glob("*") if re.fullmatch(r"(table|images_\d+)\.js", p.name)]


def remove_page_files(folder: Path, kept: Collection[str] = ()) -> None:
    """Deletes them but for those of these names, what is half written, and FILES where it is empty."""
    for path in page_files(folder):
        if path.name not in kept:
            path.unlink(missing_ok=True)
    delete_abandoned(folder / FILES)
    with suppress(OSError):
        (folder / FILES).rmdir()


# ---------------------------------------------------------------- what the page shows of images


def scripts_of(run: Run, models: Sequence[str], is_small: bool) -> Iterator[tuple[str, str]]:
    """By the names of their files, the scripts that hand the page what it shows: EACH images after the other,
    and at the end the table of all.
    """
    rows, classes, measures = [], {}, []
    with tqdm(total=len(run.records), desc="page", unit="image", delay=1, leave=False) as bar:
        rows_of_images = run.rows
        for number, start in enumerate(range(0, len(run.records), EACH)):
            some = zip(run.records[start : start + EACH], rows_of_images)
            images = [describe(run, record, row, models, is_small) for record, row in some]
            bar.update(len(images))
            measures = measures or [name for name, _ in images[0]["quality"]]
            rows += [script_json(table_row(image, classes, measures)) for image in images]
            details = [{key: image[key] for key in DETAILS} for image in images]
            yield f"images_{number}.js", f"report.images({number}, {script_json(details)});\n"
    directions = [[name, MEASURES.get(name, ("higher",))[0] == "higher"] for name in measures]
    head = {"outcomes": OUTCOMES, "classes": list(classes), "measures": directions, "each": EACH}
    lines = ",\n".join(rows)
    yield "table.js", f"report.table({script_json(head)}, [\n{lines}\n]);\n"


def describe(run: Run, record: ImageRecord, row: dict, models: Sequence[str], is_small: bool) -> dict:
    """All that the page shows of an image, from its row of results.json and its record. What users named is a
    value everywhere, never a key, which would mean something to a script.

    Args:
        models: the classifiers whose predictions are shown; of none all.
        is_small: whether its pictures are part of the page, and not the run's own.
    """
    before, after = row["before"], row["after"]
    return {
        "file": row["file"],
        "class": row["class"],
        "target": row.get("target_class"),
        "outcome": OUTCOMES.index(outcome_of(row)),
        "before": (before["class"], before["confidence"]),
        "after": (after["class"], after["confidence"]),
        "drop": before["true_confidence"] - after["true_confidence"],
        "pictures": picture_urls(run, row["index"], is_small),
        "predictions": [
            [model, *(sides.get(side) and in_words(sides[side]) for side in SIDES)]
            for model, sides in row.get("predictions", {}).items()
            if model in models or not models
        ],
        "quality": list(row.get("quality", {"PSNR dB": row["psnr"]}).items()),
        "curves": curves(run, record),
    }


def picture_urls(run: Run, index: int, is_small: bool) -> list[str]:
    """Of the clean and the adversarial picture, and of their difference: amplified already where it is part
    of the page.
    """
    if is_small:
        clean, adversarial = read_pair(run.layout, index)
        return list(map(picture_url, (clean, adversarial, amplified_difference(clean, adversarial))))
    files = (run.layout.file(index, f"{kind}.png") for kind in PICTURES)
    return [file.relative_to(run.folder).as_posix() for file in files]


def table_row(image: dict, classes: dict[str, int], measures: Sequence[str]) -> list:
    """What the table shows of an image that `describe` describes, in the order in which the script takes it;
    the names of classes, which are many times the same, by their places among all, to which it adds.
    """
    (before, how_sure), (after, how_sure_after) = image["before"], image["after"]
    real, before, after = (classes.setdefault(name, len(classes)) for name in (image["class"], before, after))
    quality = dict(image["quality"])
    measured = [quality.get(name, False) for name in measures]  # null is infinite
    answers = [real, before, how_sure, after, how_sure_after, image["drop"]]
    return [image["file"], image["outcome"], *answers, measured, image["pictures"]]


# ---------------------------------------------------------------- an image's curves


def curves(run: Run, record: ImageRecord) -> list[dict]:
    """Charts of an image over its iterations, for the script to draw: confidence, losses before and after
    their factors, the attention terms' gradients, and weights; and the timesteps' shares of the loss.
    """
    from diffattack.plotting.figures import PALETTE, timestep_colours  # it takes matplotlib

    flip = int(record.fooled.argmax()) + 1 if record.fooled.any() else None
    title = "confidence in the true class" + (f"; fooled at iteration {flip}" if flip else "")
    confidence = chart(title, [record.confidence], highest=1, mark=flip)
    if not len(record.timesteps):
        return [confidence]
    attack, cross = (run.configuration[f"{name}_loss_weight"] for name in ("attack", "cross_attn"))
    factors = np.stack(np.broadcast_arrays(attack, record.self_attention_factor, cross))
    norms = record.gradient_norms.T.astype(np.float64)  # (3, M)
    with np.errstate(divide="ignore", invalid="ignore"):
        gradients = 100 * norms[1:] / norms[0]
    shares = 100 * np.nan_to_num(timestep_shares(record.layer_losses))
    terms = list(zip(("attack", "self-attention", "cross-attention"), (PALETTE[0], *PALETTE[2:4])))
    timesteps = [("", colour) for colour in timestep_colours(len(shares))]
    return [
        confidence,
        chart("losses (log)", record.losses[[0, 1, 3]], terms),
        chart("losses times weights and factors (log)", factors * record.losses[[0, 2, 3]], terms),
        chart("gradients, % of the attack's (log)", gradients, terms[1:], x=record.gradient_iterations),
        chart("share of each timestep, %", shares[:, None], timesteps, shares.max() or 1, record.timesteps),
        chart("weight of each timestep", record.weights.T, timesteps, highest=1),
    ]


def chart(
    title: str,
    lines: np.ndarray | Sequence[np.ndarray],
    looks: Sequence[tuple[str, str]] = (("", "currentColor"),),
    highest: float | None = None,
    x: Sequence[int] | None = None,
    mark: int | None = None,
) -> dict:
    """Lines `(count, K)`; of lines of one point each, where there are more points on the axis, bars.

    Args:
        looks: name and colour of each line.
        highest: where the axis ends that begins at zero; None for a logarithmic one.
        x: `(K,)`; from 1 where it is not given.
        mark: where on it a vertical line stands.
    """
    values = np.asarray(lines, np.float64)
    if highest is None:
        values = np.where(values > 0, values, np.nan)
    x = np.arange(1, values.shape[1] + 1) if x is None else np.asarray(x)
    drawn = {"lines": values.tolist(), "looks": looks, "x": x.tolist()}
    return {"title": title, "highest": highest, "mark": mark} | drawn
