"""The pages of a comparison in a real browser, as that of a run is (test_run_page.py): what is judged on one
of them by keys is what is read and counted afterwards; and files that nobody could have saved there.
"""

import base64
import csv
import json
import re
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from diffattack.common.errors import InputError
from diffattack.data.images import read_pair, write_image
from diffattack.data.records import Records, Run, read_run
from diffattack.evaluation.other_sources import judging_section, read_study
from diffattack.plotting.comparison_pages import write_comparison_page, write_judging_page

HOSTILE = "<b>torchattack</b>:MIFGSM"


@pytest.fixture
def runs(whole) -> dict[str, Run]:
    """Two runs whose pictures differ a little."""
    return {"fixed": read_run(whole("fixed")), HOSTILE: read_run(whole("learnable"))}


def made_runs(folder: Path, names: str, images: int) -> dict[str, Run]:
    """By name, runs with pictures of noise and nothing else; the last two agree on the first image."""
    random, made = np.random.default_rng(0), {}
    clean = random.integers(0, 256, (images, 8, 8, 3), np.uint8)
    for name in names:
        of_run = folder / f"run_{name}"
        of_run.mkdir(parents=True)
        for k in range(images):
            noise = 1 if k == 0 and name in names[-2:] else random.integers(0, 8, (8, 8, 3), np.uint8)
            write_image(clean[k], of_run / f"{k:04d}_originImage.png")
            write_image(clean[k] ^ noise, of_run / f"{k:04d}_adv_image.png")
        rows = [f'    {{"index": {k}, "file": "{k}.png", "psnr": 40.0}}' for k in range(images)]
        (of_run / "results.json").write_text(",\n".join(rows))
        paths = [of_run / f"{k:04d}_record.npz" for k in range(images)]
        made[name] = Run(of_run, {"images": []}, Records(paths, ""))
    return made


def content_of(page: Path) -> dict:
    """What the page's script works with."""
    return json.loads(re.search(r'id="content">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def trials_of(folder: Path) -> dict[str, dict]:
    """What the page's key says, by the trial's name."""
    return json.loads((folder / "judging_key.json").read_text())["trials"]


def pixels(url: str) -> np.ndarray:
    image = Image.open(BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert not image.info  # nor any text that would tell where it is from
    return np.asarray(image)


# ---------------------------------------------------------------- the page and its key


def test_the_page_does_not_depend_on_the_names_and_says_none(tmp_path):
    made, pages = list(made_runs(tmp_path, "abc", 12).values()), []
    for names in ("alpha_attack beta_attack gamma_attack", "beta_attack gamma_attack alpha_attack"):
        runs = dict(sorted(zip(names.split(), made)))
        # without the pictures that are the same
        assert write_judging_page(tmp_path, runs, seed=1) == 3 * 12 - 1
        pages.append((tmp_path / "judging.html").read_bytes())
    assert pages[0] == pages[1] and not re.search(rb"_attack|run_|\d\.png|seed", pages[0])


def test_the_key_says_of_every_trial_whose_pictures_are_where(tmp_path):
    """Of too many images some are left out at random, with all their pairs."""
    made = made_runs(tmp_path, "abc", 60)
    assert 117 <= write_judging_page(tmp_path, made, seed=1) <= 120
    content, trials = content_of(tmp_path / "judging.html"), trials_of(tmp_path)
    for name, *pictures in content["trials"][:60]:
        trial, shown = trials[name], [pixels(content["pictures"][k]) for k in pictures]
        assert trial["image"] == f"{trial['index']}.png"
        pairs = [read_pair(made[trial[side]].layout, trial["index"]) for side in ("left", "right")]
        for picture, written in zip(shown, (pairs[0][0], pairs[0][1], pairs[1][1])):
            assert np.array_equal(picture, written)
    shown = [trials[name] for name, *_ in content["trials"]]
    sides = Counter((trial["left"], trial["right"]) for trial in trials.values())
    assert len(sides) == 6 and all(binom.cdf(count, 40, 0.5) > 1e-3 for count in sides.values())
    chosen = [trials[name]["image"] for name, *_ in content["trials"]]
    assert len(set(chosen[:20])) > 8 and set(Counter(chosen).values()) <= {2, 3}  # in no order of images
    assert len(set(chosen)) == 40 and set(chosen) != {f"{k}.png" for k in range(40)}


def open_page(browser, path: Path):
    browser.get_log("browser")
    downloads = {"behavior": "allow", "downloadPath": str(path.parent)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)
    browser.set_window_size(1280, 900)
    browser.get(path.as_uri())
    return browser


def shown_when(browser, count: int, over: bool = False) -> list[str]:
    """Sources of the three pictures, once so many trials are judged and the next is shown."""
    return browser.execute_async_script(
        """const [count, over, done] = arguments;
        (function wait() {
          const stage = document.getElementById("stage");
          const ready = over ? stage.hidden : !stage.classList.contains("waiting");
          if (document.getElementById("progress").value === count && ready)
            done([...stage.querySelectorAll("img")].map(image => image.src));
          else setTimeout(wait, 5);
        })()""",
        count,
        over,
    )


def press(browser, key: str) -> None:
    browser.switch_to.active_element.send_keys(key)


def test_what_is_chosen_by_keys_is_counted_for_the_right_attack(browser, runs, tmp_path):
    """A person who finds the pictures of `fixed` nearer, but cannot tell on the first trial."""
    assert write_judging_page(tmp_path, runs, seed=1) == 4
    page = open_page(browser, tmp_path / "judging.html")
    source = page.page_source
    assert not [name for name in ("fixed", "torchattack", "MIFGSM", "learnable", "img0") if name in source]
    fixed = [read_pair(runs["fixed"].layout, k)[1] for k in range(4)]
    for trial in range(4):
        clean, left, right = map(pixels, shown_when(page, trial))
        is_fixed = [any(np.array_equal(picture, other) for other in fixed) for picture in (left, right)]
        assert sum(is_fixed) == 1
        if trial == 0:
            press(page, Keys.SPACE)
        elif trial == 1:  # wrong, and taken back
            press(page, Keys.ARROW_RIGHT if is_fixed[0] else Keys.ARROW_LEFT)
            shown_when(page, 2)
            press(page, Keys.BACKSPACE)
            assert np.array_equal(pixels(shown_when(page, 2)[1]), left)
            press(page, "1" if is_fixed[0] else "2")
        elif trial == 2:  # by the buttons; a reload goes on
            page.find_element(By.CSS_SELECTOR, f"[data-choice={'left' if is_fixed[0] else 'right'}]").click()
            page.refresh()
            assert "Trial 4 of 4" in page.find_element(By.ID, "state").text
        else:
            press(page, Keys.ARROW_LEFT if is_fixed[0] else Keys.ARROW_RIGHT)
    shown_when(page, 4, over=True)
    press(page, "s")
    path = tmp_path / "judged.csv"
    WebDriverWait(None, 4, poll_frequency=0.02).until(lambda _: path.exists() and path.stat().st_size)
    attacks, judgements = read_study([path], tmp_path / "judging_key.json")
    assert [each["nearer"] for each in judgements] == [None, "fixed", "fixed", "fixed"]
    written = list(csv.DictReader(path.open()))
    assert [row["trial"] for row in written] == list(trials_of(tmp_path))
    assert all(0 <= float(row["seconds"]) < 60 for row in written)
    _, rows = judging_section(judgements, attacks)
    assert rows[1][:6] == [f"fixed : {HOSTILE}", "4", "3", "0", "1", "3/3 = 100% [44%, 100%]"]
    assert rows[1][6:] == ["0.25", "0.25"]  # 2 of 2^3 outcomes are as far from half and half
    assert page.get_log("browser") == []


# ---------------------------------------------------------------- what was saved


def judged(count: int, nearer: str | None, left: str, right: str) -> list[dict]:
    return [{"attacks": [left, right], "image": "x.png", "nearer": nearer}] * count


def test_the_table_counts_sides_for_their_attacks_and_ties_apart():
    of_a_and_b = [*judged(9, "b", "b", "a"), *judged(6, "b", "a", "b"), *judged(1, "a", "a", "b")]
    ties = [*judged(4, None, "a", "b"), *judged(2, None, "c", "a")]
    _, rows = judging_section([*of_a_and_b, *ties], ["c", "a", "b"])
    # Wilson's interval of 1 of 16, worked out by hand: (1 + z²/2 -+ z sqrt(15/16 + z²/4)) / (16 + z²)
    z = 1.959964
    low, high = ((1 + z**2 / 2 + sign * z * (15 / 16 + z**2 / 4) ** 0.5) / (16 + z**2) for sign in (-1, 1))
    assert rows[1:] == [
        ["c : a", "2", "0", "0", "2", "0/0", "1", "1"],
        ["a : b", "20", "1", "15", "4", f"1/16 = 6% [{low:.0%}, {high:.0%}]", "0.00052", "0.001"],
    ]
    assert 2 * 17 / 2**16 == pytest.approx(0.00052, abs=5e-6)


SAVED = b"trial,choice,seconds\n"


@pytest.mark.parametrize(
    "content, line, message",
    [
        (b"", 1, "holds no row"),
        (SAVED + b"k2,left,2\n", 2, "trial 'k2', choice 'left'; expected a file"),
        (SAVED + b"k1,left,2\n\nk1,left,2\n", 4, "each once"),
    ],
)
def test_a_file_that_the_page_cannot_have_saved(tmp_path, content, line, message):
    path, key = tmp_path / "judged.csv", tmp_path / "key.json"
    path.write_bytes(content)
    trial = {"image": "x.png", "left": "a", "right": "b"}
    key.write_text(json.dumps({"attacks": ["a", "b"], "trials": {"k1": trial}}))
    with pytest.raises(InputError, match=f"^{path}, line {line}: .*{message}"):
        read_study([path], key)
    # a spreadsheet may have been at it
    path.write_bytes(b"\xef\xbb\xbfjudge,trial,choice,seconds\r\nme,k1,right,2.5\r\n\r\n")
    assert read_study([path], key) == (["a", "b"], judged(1, "b", "a", "b"))


# ---------------------------------------------------------------- comparison.html


def test_the_page_of_a_comparison(browser, runs, tmp_path):
    table = [["", *runs, ""], ["a metric with a long name", *["11/12 = 92% [65%, 99%]"] * 3]]
    (tmp_path / "timestep_analysis").mkdir()
    write_image(np.zeros((4, 4, 3), np.uint8), tmp_path / "timestep_analysis" / "tradeoff.png")
    write_comparison_page(tmp_path, "Comparison", runs, [("Figures", table)], ["warning: <i>closer</i>"])
    page = open_page(browser, tmp_path / "comparison.html")
    body = page.find_element(By.TAG_NAME, "body")
    for row in (row for run in runs.values() for row in run.rows):
        said = f"{row['after']['class']} {row['after']['confidence']:.2f}"
        assert said in body.text and row["file"] in body.text
    assert HOSTILE in body.text and "<i>closer</i>" in body.text and "92% [65%, 99%]" in body.text
    assert len(page.find_elements(By.CSS_SELECTOR, ".figures img")) == 1

    def shown() -> list[int]:
        kinds = ("clean", "difference", "covering")
        of_kinds = [page.find_elements(By.CSS_SELECTOR, f".{kind}") for kind in kinds]
        return [sum(image.is_displayed() for image in images) for images in of_kinds]

    seen = [shown()]
    for key in "dcc":
        body.send_keys(key)
        seen.append(shown())
    assert seen == [[4, 0, 0], [4, 8, 0], [4, 0, 8], [4, 0, 0]]
    body.send_keys("f")
    covering = page.find_element(By.CSS_SELECTOR, ".covering")
    assert covering.value_of_css_property("animation-name") == "flicker"
    assert page.get_log("browser") == []
