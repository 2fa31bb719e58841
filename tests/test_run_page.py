"""The page of a run in a real browser, small and large, and the files that it is made of: Debian's chromium
with chromium-driver; tests in it are skipped where they are not installed.
"""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import HOSTILE, once
from multiplied import multiply
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from diffattack.data.records import read_configuration, read_run
from diffattack.plotting import run_page
from diffattack.plotting.run_page import EACH, FILES, read_results, write_page

COUNT = 3 * EACH
CLASSES = np.array(["</script><b>x</b>\u2028", "class 2", "class 10", "polar bear", "__proto__"])
random = np.random.default_rng(0)
psnr = random.uniform(20, 45, COUNT).round(3)
psnr[17] = np.inf  # equal pictures
gmsd = random.uniform(0, 0.2, COUNT).round(4)
outcome = random.integers(0, 3, COUNT)
real, before, after = random.integers(0, len(CLASSES), (3, COUNT))
drop = random.uniform(-1, 1, COUNT).round(4)


def model_of(folder: Path) -> str:
    return read_configuration(folder)["model_name"][0]


def changed(model: str, k: int, row: dict) -> dict:
    """The row of the k-th of many images, which differ in all that the table shows."""
    said = [
        {"class": str(CLASSES[of[k]]), "confidence": 0.5, "true_confidence": true, "label": 0}
        for of, true in ((before, float(drop[k])), (after, 0.0))
    ]
    predictions = {name: {"before": said[0], "after": said[1]} for name in ("no longer", model)}
    return row | {
        "class": str(CLASSES[real[k]]),
        "before": said[0],
        "after": said[1],
        "predictions": predictions,
        "success": (True, False, None)[outcome[k]],
        "psnr": float(psnr[k]),
        "quality": {"PSNR dB": float(psnr[k]) if np.isfinite(psnr[k]) else None, "GMSD": float(gmsd[k])},
    }


@pytest.fixture(scope="session")
def large(finished, shared) -> Path:
    def make(folder):
        multiply(finished, folder, COUNT, partial(changed, model_of(finished)))
        write_page(read_run(folder), read_results(folder))

    return once(shared, "large", make)


@pytest.fixture
def quiet(browser):
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier tests left
    browser.set_window_size(1280, 900)
    return browser


@pytest.fixture
def page(quiet, large):
    visit(quiet, large)
    return quiet


def visit(browser, folder: Path) -> None:
    """Waits for the table: now and then, chromedriver comes back from a page before its scripts have run."""
    browser.get("about:blank")
    browser.get((folder / "report.html").as_uri())
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#body button"))


def rows(page) -> list[int]:
    return page.execute_script(
        "return [...document.querySelectorAll('#body tr')].map(row => +row.dataset.place)"
    )


def rows_are(page, order: np.ndarray) -> bool:
    """On the first and the last page."""
    found = []
    for id in ("first", "last"):
        page.execute_script("document.getElementById(arguments[0]).click()", id)
        found += rows(page)
    return found == [*order[:50], *order[(len(order) - 1) // 50 * 50 :]]


def wait(page, condition) -> None:
    WebDriverWait(page, 10, poll_frequency=0.05).until(lambda _: condition())


def text(page, id: str) -> str:
    return page.find_element(By.ID, id).text


def focused(page):
    return page.switch_to.active_element


def open_first(page):
    page.find_element(By.CSS_SELECTOR, "#body button").send_keys(Keys.ENTER)
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#opened-charts svg"))


# ---------------------------------------------------------------- in a browser


def test_a_table_of_10_000_images_opens_in_three_seconds_and_takes_little_memory(quiet, large, tmp_path):
    shutil.copy(large / "report.html", tmp_path)
    (tmp_path / FILES).mkdir()
    head, *lines, foot = (large / FILES / "table.js").read_text().splitlines()
    more = [row.rstrip(",") for row in (lines * (10_000 // len(lines) + 1))[:10_000]]
    (tmp_path / FILES / "table.js").write_text("\n".join([head, ",\n".join(more), foot]))
    visit(quiet, tmp_path)
    drawn = quiet.execute_script("return performance.getEntriesByName('drawn')[0].startTime")
    quiet.execute_cdp_cmd("Performance.enable", {})
    metrics = quiet.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    heap = next(metric["value"] for metric in metrics if metric["name"] == "JSHeapUsedSize")
    assert len(rows(quiet)) == 50 and text(quiet, "count") == "10,000 of 10,000 images"
    assert drawn < 3000 and heap < 100e6


def requested(browser) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [event["request"]["url"] for event in sent]


def decoded(browser, selector: str) -> list[int]:
    """The widths of pictures."""
    return browser.execute_async_script(
        "const done = arguments[1]; const images = [...document.querySelectorAll(arguments[0])];"
        "images.forEach(image => image.loading = 'eager');"
        "Promise.all(images.map(image => image.decode())).then("
        "() => done(images.map(image => image.naturalWidth)), error => done(String(error)))",
        selector,
    )


def test_a_small_run_is_one_file(quiet, finished):
    visit(quiet, finished)
    open_first(quiet)
    asked = [url for url in requested(quiet) if not url.startswith("data:")]
    assert asked == [(finished / "report.html").as_uri()] and quiet.get_log("browser") == []
    assert decoded(quiet, "#body img, #compare img") == [96] * (2 * 4 + 3)
    assert not (finished / FILES).exists() and not quiet.find_element(By.ID, "next").is_displayed()


def test_names_of_files_and_classes_stay_text(page):
    names = [button.text for button in page.find_elements(By.CSS_SELECTOR, "#body button")]
    assert any(name.endswith(HOSTILE) for name in names)
    page.find_element(By.ID, "answer").send_keys("</SCRIPT>")
    wait(page, lambda: not text(page, "count").startswith(f"{COUNT:,} of"))
    open_first(page)
    assert "</script><b>x</b>" in text(page, "opened-predictions")
    assert page.find_elements(By.CSS_SELECTOR, "img[src='x'], main b, dialog b") == []


@pytest.mark.nightly
def test_each_column_sorts_both_ways(page):
    places = np.array([1, 2, 3, 4, 0])  # of CLASSES in natural order
    columns = {"name": np.arange(COUNT), "class": places[real], "outcome": outcome, "PSNR dB": psnr}
    columns |= {"before": places[before], "after": places[after], "confidence drop": drop}
    for title, keys in columns.items():
        for sign, said in ((1, "ascending"), (-1, "descending")):
            head = page.find_element(By.XPATH, f"//th[button[starts-with(., '{title}')]]")
            head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
            assert focused(page).text.startswith(title)  # the heads are drawn anew, and the focus stays
            assert rows_are(page, np.lexsort((np.arange(COUNT), sign * keys)))
            assert page.find_element(By.CSS_SELECTOR, "[aria-sort]").get_attribute("aria-sort") == said


def test_filters_find_the_images_that_they_name(page):
    def expect(found: np.ndarray) -> None:
        wait(page, lambda: text(page, "count") == f"{found.sum():,} of {COUNT:,} images")
        assert rows_are(page, np.flatnonzero(found))

    select = Select(page.find_element(By.ID, "outcome"))
    for k, name in enumerate(run_page.OUTCOMES):
        select.select_by_visible_text(name)
        expect(outcome == k)
    found = (outcome == 2) & (psnr >= 25.5) & (psnr <= 35)
    page.find_element(By.ID, "low").send_keys("25.5")
    page.find_element(By.ID, "high").send_keys("35")
    expect(found)
    page.find_element(By.ID, "class").send_keys("Class 1")
    expect(found := found & (CLASSES[real] == "class 10"))
    page.find_element(By.ID, "answer").send_keys("bear")
    expect(found & (CLASSES[after] == "polar bear"))
    page.find_element(By.CSS_SELECTOR, "[type=reset]").send_keys(Keys.ENTER)
    expect(np.ones(COUNT, bool))
    page.find_element(By.ID, "name").send_keys("042_")
    expect(np.arange(COUNT) == 42)


def test_an_image_opens_with_all_that_is_known_of_it_and_no_network_is_asked(page, large):
    page.find_element(By.ID, "most").send_keys(Keys.ENTER)
    k, second, *_ = np.argsort(psnr, kind="stable")
    open_first(page)
    assert text(page, "opened-file").startswith(f"{k:03d}_")
    assert text(page, "opened-place") == f"1 of {COUNT:,}"
    assert f"true class: {CLASSES[real[k]]}".strip() in text(page, "opened-class")
    (predicted,) = page.find_elements(By.CSS_SELECTOR, "#opened-predictions tr")
    assert predicted.text.startswith(model_of(large))  # of those that judge now
    assert all(f"{measure[k]:.3g}" in text(page, "opened-quality") for measure in (gmsd, psnr))
    run, svgs = read_run(large), page.find_elements(By.CSS_SELECTOR, "#opened-charts svg")
    titles = [of["title"] for of in run_page.curves(run, run.records[int(k)])]
    assert [svg.get_attribute("aria-label") for svg in svgs] == titles
    assert decoded(page, "#compare img") == [96, 96, 96]
    sources = [image.get_attribute("src") for image in page.find_elements(By.CSS_SELECTOR, "#compare img")]
    assert [Path(source).name[:4] for source in sources] == [f"{k:04d}"] * 3
    page.find_element(By.ID, "share").send_keys(Keys.ARROW_RIGHT * 10)
    style = "return getComputedStyle(document.querySelector('#compare .adversarial')).clipPath"
    assert "60%" in page.execute_script(style)
    focused(page).send_keys("d")
    assert page.find_element(By.CSS_SELECTOR, "#compare .difference").is_displayed()
    page.find_element(By.ID, "opened-next").send_keys(Keys.ENTER)
    wait(page, lambda: text(page, "opened-place") == f"2 of {COUNT:,}")
    focused(page).send_keys(Keys.ESCAPE)
    wait(page, lambda: focused(page).text.startswith(f"{second:03d}_"))
    inside, urls = (f"{large.as_uri()}/", "data:", "about:blank"), requested(page)
    assert len(urls) > 5 and all(url.startswith(inside) for url in urls) and page.get_log("browser") == []


def test_curves_are_drawn_with_gaps_where_values_are_missing(quiet, finished, tmp_path, monkeypatch):
    red_and_blue, few = [("a", "red"), ("b", "blue")], np.array([[1e-3, 0.1], [-1, np.nan]])
    of = [
        run_page.chart("one", np.array([[0, 1, np.nan, 0.5, np.nan]]), highest=1, mark=2),
        run_page.chart("two (log)", few, red_and_blue, x=[2, 6]),
        run_page.chart("three", np.array([[10], [40]]), red_and_blue, highest=40, x=[801, 1]),
    ]
    monkeypatch.setattr(run_page, "curves", lambda run, record: of)
    folder = multiply(finished, tmp_path / "out", 1)
    write_page(read_run(folder), read_results(folder))
    visit(quiet, folder)
    open_first(quiet)
    one, two, three = quiet.find_elements(By.CSS_SELECTOR, "#opened-charts svg")

    def points(svg) -> list[str]:
        return [line.get_attribute("points") for line in svg.find_elements(By.TAG_NAME, "polyline")]

    # the axes go from 38 to 254 and from 112 up to 30; a single value is a dash
    assert points(one) == ["38.0,112.0 92.0,30.0", "200.0,71.0 202.0,71.0"]
    assert [line.get_attribute("x1") for line in one.find_elements(By.TAG_NAME, "line")] == ["92"]
    assert points(two) == [f"38.0,112.0 254.0,{112 - (112 - 30) * 2 / 3:.1f}"]
    assert all(shown in two.text for shown in ("1e-3", "1e0", "2", "6", "a", "b"))
    bars = three.find_elements(By.TAG_NAME, "rect")
    assert [float(bar.get_attribute("height")) for bar in bars] == [20.5, 82]


# ---------------------------------------------------------------- its files


def test_what_is_not_part_of_the_run_goes(finished, tmp_path):
    some = multiply(finished, tmp_path / "some", EACH + 10, partial(changed, model_of(finished)))

    def written() -> dict[str, str]:
        write_page(read_run(some), read_results(some))
        return {path.name: path.read_text() for path in (some / FILES).glob("*")}

    first, half = written(), some / FILES / "images_9.js.elsewhere-1.partial"
    assert set(first) == {"table.js", "images_0.js", "images_1.js"}
    half.write_text("of another machine, which may still write it")
    (some / FILES / "images_7.js").write_text("of a run that was larger")
    assert written() == first | {half.name: half.read_text()}
    for k in range(40, 60):
        read_run(some).layout.record(k).unlink()
    assert set(written()) == {half.name}
    assert (some / "report.html").read_text().count("data:image/webp") == 3 * 40


def test_numbers_that_are_infinite_or_missing_reach_the_page(finished):
    image = {"file": "a.png", "outcome": 0, "class": "a", "before": ("a", 0.5), "after": ("b", None)}
    image |= {"drop": -0.25, "pictures": ["0_"]}
    of_quality = {"[30.123,false]": {"PSNR dB": 30.123456}, "[null,0.5]": {"PSNR dB": np.inf, "SSIM": 0.5}}
    for shown, quality in of_quality.items():
        row = run_page.table_row(image | {"quality": list(quality.items())}, {}, ["PSNR dB", "SSIM"])
        assert run_page.script_json(row) == f'["a.png",0,0,0,0.5,1,null,-0.25,{shown},["0_"]]'
    run = read_run(finished)
    record = run.records[0]
    confidence = record.confidence.copy()
    confidence[-1] = np.nan  # the image has ended
    sure, raw, weighted, _, shares, _ = run_page.curves(run, replace(record, confidence=confidence))
    of_script = run_page.script_json(sure)
    assert f'"lines":[[{confidence[0]:.5g},' in of_script and ",null]]" in of_script
    assert sum(line[0] for line in shares["lines"]) == pytest.approx(100)
    factor = run.configuration["attack_loss_weight"]
    np.testing.assert_allclose(weighted["lines"][0], factor * np.array(raw["lines"][0]))
