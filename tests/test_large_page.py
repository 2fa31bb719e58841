"""The page of a run of 1,000 images in a real browser, and how its files are written and kept up to date."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import HOSTILE
from filelock import FileLock
from multiplied import multiply
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from diffattack.data.images import write_image
from diffattack.data.records import Records, read_run
from diffattack.data.shares import timestep_rows
from diffattack.plotting.charts import charts
from diffattack.plotting.large_page import FILES, Columns, script_json
from diffattack.plotting.pages import amplified_difference
from diffattack.plotting.report import SMALL, read_results, write_page

COUNT = 1_000
OUTCOMES = ("fooled", "not fooled", "wrong before")
CLASSES = np.array(["</script><b>x</b>\u2028", "class 2", "class 10", "polar bear", "__proto__"])
random = np.random.default_rng(0)
psnr = random.uniform(20, 45, COUNT).round(3)
psnr[17] = np.inf  # equal pictures
gmsd = random.uniform(0, 0.2, COUNT).round(4)
outcome = random.integers(0, 3, COUNT)
real, before, after = random.integers(0, len(CLASSES), (3, COUNT))
drop = random.uniform(-1, 1, COUNT).round(4)


def changed(k: int, row: dict) -> dict:
    """The row of the k-th of many images, which differ in all that the table shows."""
    said = [
        {"class": str(CLASSES[of[k]]), "confidence": 0.5, "true_confidence": true, "label": 0}
        for of, true in ((before, float(drop[k])), (after, 0.0))
    ]
    predictions = {name: {"before": said[0], "after": said[1]} for name in ("no longer", *row["predictions"])}
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
    folder = shared / "large"
    with FileLock(shared / "large.lock"):
        if not (folder / "report.html").exists():
            multiply(finished, folder, COUNT, changed)
            write_page(read_run(folder), read_results(folder))
    return folder


@pytest.fixture
def some(finished, tmp_path) -> Path:
    """A run of a few more images than a page holds within itself, without its page."""
    return multiply(finished, tmp_path / "some", SMALL + 10, changed)


@pytest.fixture
def page(browser, large):
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier tests left
    browser.set_window_size(1280, 900)
    visit(browser, large)
    return browser


def visit(browser, folder: Path) -> None:
    """Waits for the table: now and then, chromedriver comes back from a page before its scripts have run."""
    browser.get("about:blank")
    browser.get((folder / "report.html").as_uri())
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#body button"))


def rows(page) -> list[int]:
    return page.execute_script(
        "return [...document.querySelectorAll('#body tr')].map(row => +row.dataset.place)"
    )


def all_rows(page) -> list[int]:
    """Of the first and the last page."""
    found = []
    for id in ("first", "last"):
        page.execute_script("document.getElementById(arguments[0]).click()", id)
        found += rows(page)
    return found


def ends(order: np.ndarray, size: int = 50) -> list[int]:
    last = (len(order) - 1) // size * size
    return [*order[:size], *order[last:]]


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


def test_it_opens_in_three_seconds_and_takes_little_memory(page):
    since = "return performance.getEntriesByName('drawn')[0].startTime"  # navigation started
    drawn = page.execute_script(since)
    page.execute_cdp_cmd("Performance.enable", {})
    metrics = page.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    heap = next(metric["value"] for metric in metrics if metric["name"] == "JSHeapUsedSize")
    chromium = psutil.Process(page.service.process.pid).children(recursive=True)
    renderers = [process for process in chromium if "--type=renderer" in process.cmdline()]
    memory = max(process.memory_info().rss for process in renderers)
    print(f"drawn after {drawn:.0f} ms, heap {heap / 1e6:.0f} MB, renderer {memory / 1e6:.0f} MB")
    assert len(rows(page)) == 50 and text(page, "count") == f"{COUNT:,} of {COUNT:,} images"
    assert drawn < 3000 and heap < 100e6 and memory < 500e6


@pytest.mark.nightly
def test_no_network_is_asked_and_the_console_is_silent(page, large):
    open_first(page)
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    inside = (f"{large.as_uri()}/", "data:", "about:blank")
    assert len(urls) > 5 and [url for url in urls if not url.startswith(inside)] == []
    assert page.get_log("browser") == []


@pytest.mark.nightly
def test_names_of_files_and_classes_stay_text(page):
    names = [button.text for button in page.find_elements(By.CSS_SELECTOR, "#body button")]
    assert any(name.endswith(HOSTILE) for name in names)
    assert page.find_elements(By.CSS_SELECTOR, "img[src='x']") == []
    page.find_element(By.ID, "answer").send_keys("</SCRIPT>")
    wait(page, lambda: not text(page, "count").startswith(f"{COUNT:,} of"))
    assert all("</script><b>x</b>" in row.text for row in page.find_elements(By.CSS_SELECTOR, "#body tr")[:5])
    open_first(page)
    assert "</script><b>x</b>" in text(page, "opened-predictions")
    assert page.find_elements(By.CSS_SELECTOR, "main b, dialog b") == []


places = np.array([1, 2, 3, 4, 0])  # of CLASSES in natural order


@pytest.mark.nightly
@pytest.mark.parametrize(
    "title, keys",
    {
        "name": np.arange(COUNT),
        "class": places[real],
        "outcome": outcome,
        "before": places[before],
        "after": places[after],
        "confidence drop": drop,
        "PSNR dB": psnr,
    }.items(),
)
def test_each_column_sorts_both_ways(page, title, keys):
    for sign, said in ((1, "ascending"), (-1, "descending")):
        head = page.find_element(By.XPATH, f"//th[button[starts-with(., '{title}')]]")
        head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
        assert focused(page).text.startswith(title)  # the heads are drawn anew, and the focus stays
        assert all_rows(page) == ends(np.lexsort((np.arange(COUNT), sign * keys)))
        sorted_by = page.find_elements(By.CSS_SELECTOR, "[aria-sort]")
        assert [head.get_attribute("aria-sort") for head in sorted_by] == [said]


@pytest.mark.nightly
def test_the_most_and_the_least_visible_come_first_whichever_way_a_measure_goes(page):
    for measure, nearness in (("PSNR dB", psnr), ("GMSD", -gmsd)):
        Select(page.find_element(By.ID, "measure")).select_by_visible_text(measure)
        for id, sign in (("most", 1), ("least", -1)):
            page.find_element(By.ID, id).send_keys(Keys.ENTER)
            assert all_rows(page) == ends(np.lexsort((np.arange(COUNT), sign * nearness)))
            assert page.find_element(By.ID, id).get_attribute("aria-pressed") == "true"
    Select(page.find_element(By.ID, "measure")).select_by_visible_text("PSNR dB")
    assert all_rows(page) == ends(np.lexsort((np.arange(COUNT), -psnr)))  # the least visible are still first


def test_filters_find_the_images_that_they_name(page):
    def expect(found: np.ndarray) -> None:
        wait(page, lambda: text(page, "count") == f"{found.sum():,} of {COUNT:,} images")
        assert all_rows(page) == ends(np.flatnonzero(found))

    select = Select(page.find_element(By.ID, "outcome"))
    for k, name in enumerate(OUTCOMES):
        select.select_by_visible_text(name)
        expect(outcome == k)
    page.find_element(By.ID, "low").send_keys("25.5")
    page.find_element(By.ID, "high").send_keys("35")
    found = (outcome == 2) & (psnr >= 25.5) & (psnr <= 35)
    expect(found)
    page.find_element(By.ID, "class").send_keys("Class 1")
    found &= CLASSES[real] == "class 10"
    expect(found)
    page.find_element(By.ID, "answer").send_keys("bear")
    found &= CLASSES[after] == "polar bear"
    expect(found)
    page.find_element(By.CSS_SELECTOR, "[type=reset]").send_keys(Keys.ENTER)
    expect(np.ones(COUNT, bool))
    page.find_element(By.ID, "name").send_keys("0042_")
    expect(np.arange(COUNT) == 42)
    page.find_element(By.ID, "class").send_keys("none has this")
    wait(page, lambda: text(page, "count") == f"0 of {COUNT:,} images")
    assert rows(page) == []
    assert page.find_element(By.ID, "count").get_attribute("role") == "status"


@pytest.mark.nightly
def test_the_table_is_walked_by_keyboard(page):
    page.find_element(By.CSS_SELECTOR, "#body button").send_keys(Keys.ARROW_DOWN)

    def here() -> int:
        return int(page.execute_script("return document.activeElement.closest('tr').dataset.place"))

    assert here() == 1
    for key, place in (
        (Keys.ARROW_RIGHT, 50),
        (Keys.ARROW_UP, 49),
        (Keys.ARROW_DOWN, 50),
        (Keys.END, COUNT - 50),
        (Keys.ARROW_RIGHT, COUNT - 50),
        (Keys.ARROW_LEFT, COUNT - 100),
        (Keys.HOME, 0),
        (Keys.ARROW_UP, 0),
    ):
        focused(page).send_keys(key)
        assert here() == place
    style = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.execute_script(style) == "solid"
    bottom = "return document.activeElement.getBoundingClientRect().bottom"
    top = "return document.querySelector('.pages').getBoundingClientRect().top"
    for _ in range(12):  # the bar of pages does not cover it
        focused(page).send_keys(Keys.ARROW_DOWN)
        assert page.execute_script(bottom) <= page.execute_script(top)


@pytest.mark.nightly
def test_pages_are_turned_by_buttons_and_number(page):
    number = page.find_element(By.ID, "page")
    page.find_element(By.ID, "next").send_keys(Keys.ENTER)
    assert rows(page) == list(range(50, 100)) and number.get_attribute("value") == "2"
    number.send_keys(Keys.BACKSPACE, "999", Keys.ENTER)
    assert rows(page) == list(range(COUNT - 50, COUNT)) and number.get_attribute("value") == str(COUNT // 50)
    Select(page.find_element(By.ID, "size")).select_by_visible_text("200")
    assert rows(page) == list(range(COUNT - 200, COUNT)) and text(page, "pages") == str(COUNT // 200)
    assert not page.find_element(By.ID, "next").is_enabled()


def test_an_image_opens_with_all_that_is_known_of_it(page, large):
    page.find_element(By.ID, "most").send_keys(Keys.ENTER)
    order = np.argsort(psnr, kind="stable")
    open_first(page)
    k = int(order[0])
    assert (
        text(page, "opened-file").startswith(f"{k:04d}_") and text(page, "opened-place") == f"1 of {COUNT:,}"
    )
    assert f"true class: {CLASSES[real[k]]}".strip() in text(page, "opened-class")
    record = read_run(large).records[k]
    (model,) = [name for name in record.row["predictions"] if name != "no longer"]
    predictions = page.find_elements(By.CSS_SELECTOR, "#opened-predictions tr")
    assert len(predictions) == 1 and predictions[0].text.startswith(model)  # of those that judge now
    assert f"{gmsd[k]:.3g}" in text(page, "opened-quality") and f"{psnr[k]:.3g}" in text(
        page, "opened-quality"
    )
    svgs = page.find_elements(By.CSS_SELECTOR, "#opened-charts svg")
    assert [svg.get_attribute("aria-label") for svg in svgs] == [of["title"] for of in charts(record)]
    decoded = page.execute_async_script(
        "const done = arguments[0]; const images = [...document.querySelectorAll('#compare img')];"
        "Promise.all(images.map(image => image.decode())).then("
        "() => done(images.map(image => image.naturalWidth)), error => done(String(error)))"
    )
    assert decoded == [96, 96, 96]
    sources = [image.get_attribute("src") for image in page.find_elements(By.CSS_SELECTOR, "#compare img")]
    assert [Path(source).name[:4] for source in sources] == [f"{k:04d}"] * 3
    focused(page).send_keys(Keys.ARROW_RIGHT)
    wait(page, lambda: text(page, "opened-place") == f"2 of {COUNT:,}")
    focused(page).send_keys(Keys.ESCAPE)
    assert not page.find_element(By.ID, "dialog").is_displayed()
    assert focused(page).text.startswith(f"{order[1]:04d}_")


@pytest.mark.nightly
def test_opened_images_are_walked_across_pages(page):
    page.find_elements(By.CSS_SELECTOR, "#body button")[49].send_keys(Keys.ENTER)
    wait(page, lambda: text(page, "opened-place") == f"50 of {COUNT:,}")
    for _ in range(60):  # more than one file of details
        focused(page).send_keys(Keys.ARROW_RIGHT)
    wait(page, lambda: text(page, "opened-place") == f"110 of {COUNT:,}")
    focused(page).send_keys(Keys.ESCAPE)
    assert rows(page) == list(range(100, 150)) and focused(page).text.startswith("0109_")
    page.find_element(By.ID, "first").send_keys(Keys.ENTER)
    open_first(page)
    page.find_element(By.ID, "opened-next").send_keys(Keys.ENTER)
    page.find_element(By.ID, "opened-previous").send_keys(Keys.ENTER)  # which goes off with it
    wait(page, lambda: text(page, "opened-place") == f"1 of {COUNT:,}")
    focused(page).send_keys(Keys.ARROW_RIGHT)
    wait(page, lambda: text(page, "opened-place") == f"2 of {COUNT:,}")


@pytest.mark.nightly
def test_the_slider_and_the_difference_work_by_keyboard(page, large):
    open_first(page)
    compare = page.find_element(By.ID, "compare")
    page.find_element(By.ID, "share").send_keys(Keys.ARROW_RIGHT * 10)
    clip = "return getComputedStyle(arguments[0].querySelector('.adversarial')).clipPath"
    assert "60%" in page.execute_script(clip, compare) and text(page, "opened-place") == f"1 of {COUNT:,}"
    focused(page).send_keys("d")
    assert page.find_element(By.ID, "difference").get_attribute("aria-pressed") == "true"
    assert compare.find_element(By.CLASS_NAME, "difference").is_displayed()


@pytest.mark.nightly
def test_the_difference_is_amplified_as_figures_amplify_it(browser, some):
    clean, adversarial = np.random.default_rng(1).integers(0, 255, (2, 96, 96, 3), np.uint8)
    adversarial = (clean * 0.9 + adversarial * 0.1).astype(np.uint8)
    run = read_run(some)
    difference = np.abs(adversarial.astype(int) - clean).astype(np.uint8)
    for name, picture in (
        ("originImage", clean),
        ("adv_image", adversarial),
        ("diff_absolute", difference),
    ):
        run.layout.file(0, f"{name}.png").unlink()  # a link
        write_image(picture, run.layout.file(0, f"{name}.png"))
    write_page(run, read_results(some))
    visit(browser, some)
    open_first(browser)
    browser.execute_script("""
        document.querySelector('dialog').style.cssText = 'width: 1000px; padding: 0; border: 0';
        document.getElementById('compare').style.cssText = 'width: 96px; height: 96px; border-radius: 0';
        for (const each of document.querySelectorAll('#compare input, .heading')) each.style.display = 'none';
    """)
    browser.find_element(By.ID, "difference").send_keys(Keys.ENTER)
    browser.execute_script("document.activeElement.blur()")
    wait(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#compare .difference").is_displayed())
    shot = some / "shot.png"
    browser.find_element(By.ID, "compare").screenshot(str(shot))
    seen = np.asarray(Image.open(shot).convert("RGB"))
    assert np.abs(seen.astype(int) - amplified_difference(clean, adversarial, 8)).max() <= 1


@pytest.mark.nightly
@pytest.mark.parametrize("width", [360, 700, 1280])
def test_nothing_is_cut_off_at_the_side(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    right = (
        "return Math.max(...[...document.querySelectorAll(arguments[0])].map("
        "each => each.getBoundingClientRect().right))"
    )
    try:
        page.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
        assert page.execute_script("return document.scrollingElement.scrollWidth") <= width
        for selector in ("#images ~ *", ".controls > *", ".pages > *"):
            assert page.execute_script(right, selector) <= width
        if width == 360:  # rows are cards
            assert page.execute_script(right, "#body td, #body th, #body button, #body img") <= width
        open_first(page)
        assert page.execute_script(right, "dialog, dialog *:not(svg *)") <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.nightly
def test_every_picture_and_control_has_a_name(page):
    open_first(page)
    page.find_element(By.ID, "close").send_keys(Keys.ENTER)
    assert all(image.get_attribute("alt") for image in page.find_elements(By.TAG_NAME, "img"))
    controls = page.find_elements(By.CSS_SELECTOR, "main input, main select, main button")
    shown = [control for control in controls if control.is_displayed()]
    assert len(shown) > 70 and all(control.accessible_name for control in shown)
    assert page.find_element(By.ID, "table").aria_role == "table"


@pytest.mark.nightly
def test_a_page_without_its_folder_says_so(browser, large, tmp_path):
    shutil.copy(large / "report.html", tmp_path)
    browser.get((tmp_path / "report.html").as_uri())
    wait(browser, lambda: browser.find_element(By.ID, "missing").is_displayed())


# ---------------------------------------------------------------- its files


def written_at(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder / FILES).as_posix(): path.stat().st_mtime_ns
        for path in (folder / FILES).rglob("*.*")
    }


def test_what_is_up_to_date_is_kept_and_what_is_not_part_of_the_run_goes(some):
    results = read_results(some)
    write_page(read_run(some), results)
    first = written_at(some)
    assert set(first) == {
        "columns.js",
        "details/0/0.js",
        "details/0/1.js",
        *(f"thumbnails/0/{k}.webp" for k in range(SMALL + 10)),
    }
    page, columns = (some / "report.html").read_text(), (some / FILES / "columns.js").read_text()

    layout = read_run(some).layout
    layout.record(3).touch()
    copy = layout.file(4, "adv_image.png").read_bytes()
    layout.file(4, "adv_image.png").unlink()
    time.sleep(0.02)
    layout.file(4, "adv_image.png").write_bytes(copy)
    time.sleep(0.02)
    half = some / FILES / "thumbnails" / "0" / "9.webp.elsewhere-1.partial"
    half.write_bytes(b"")  # of another machine, which may still write it
    write_page(read_run(some), results)
    second = written_at(some)
    assert {name for name in first if first[name] != second[name]} == {
        "columns.js",
        "details/0/0.js",
        "thumbnails/0/4.webp",
    }
    assert (some / "report.html").read_text() == page and (some / FILES / "columns.js").read_text() == columns

    layout.record(59).unlink()
    write_page(read_run(some), results)
    third = written_at(some)
    assert "thumbnails/0/59.webp" not in third and "59 images" in (some / "report.html").read_text()
    assert third["details/0/0.js"] == second["details/0/0.js"]
    assert third["details/0/1.js"] != second["details/0/1.js"]

    for k in range(40, 59):
        layout.record(k).unlink()
    write_page(read_run(some), read_results(some))
    assert (some / "report.html").read_text().count("data:image/webp") == 120
    assert [path for path in (some / FILES).rglob("*") if path.is_file()] == [half]
    half.unlink()
    write_page(read_run(some), read_results(some))
    assert not (some / FILES).exists()


def test_each_record_is_read_once_and_the_table_of_timesteps_is_that_of_all(some, monkeypatch):
    read = []
    of_one = Records.__getitem__

    def counted(self, k):
        if isinstance(k, int):
            read.append(self.paths[k].name)
        return of_one(self, k)

    run = read_run(some)
    expected = timestep_rows(run.pooled.structure, run.timesteps)  # read before
    monkeypatch.setattr(Records, "__getitem__", counted)
    write_page(run, read_results(some))
    first = run.records.paths[0].name
    assert sorted(name for name in read if name != first) == sorted(p.name for p in run.records.paths[1:])
    page = (some / "report.html").read_text()
    assert all(f"<td>{cell}</td>" in page for row in expected[1:] for cell in row)


def test_several_processes_write_the_same_files(some, monkeypatch):
    import diffattack.plotting.large_page as large_page

    write_page(read_run(some), read_results(some))
    alone = {path: path.read_bytes() for path in (some / FILES).rglob("*.*")}
    shutil.rmtree(some / FILES)
    monkeypatch.setattr(large_page, "processes_for", lambda parts: 2)
    write_page(read_run(some), read_results(some))
    assert {path: path.read_bytes() for path in (some / FILES).rglob("*.*")} == alone


def test_rows_without_quality_show_what_they_know(finished, tmp_path):
    def bare(k, row):
        return {name: value for name, value in row.items() if name != "quality"}

    folder = multiply(finished, tmp_path / "bare", SMALL + 1, bare)
    write_page(read_run(folder), read_results(folder))
    columns = (folder / FILES / "columns.js").read_text()
    assert '["PSNR dB",[' in columns and '"SSIM"' not in columns


def test_numbers_that_are_infinite_or_missing_reach_the_page(tmp_path):
    columns = Columns()
    entry = {"index": 0, "outcome": 0, "class": "a", "said": [["a", 0.5], ["b", None]], "timesteps": []}
    for quality in ([["PSNR dB", 30.123456]], [["PSNR dB", None], ["SSIM", 0.5]], []):
        columns.add(entry | {"file": HOSTILE, "drop": -0.25, "quality": quality})
    columns.write(tmp_path / "columns.js")
    text = (tmp_path / "columns.js").read_text()
    assert '["PSNR dB",[30.123,1/0,0/0]]' in text and '["SSIM",[0/0,0.5,0/0]]' in text
    assert "<" not in text and '"drop":[-0.25,-0.25,-0.25]' in text and '"after":[0/0,0/0,0/0]' in text


def test_json_in_a_script_ends_nothing():
    value = {"</script>": "<!--\u2028\u2029\udce9&"}
    text = script_json(value)
    assert text.isascii() and not set("<>&") & set(text) and json.loads(text) == value


# ---------------------------------------------------------------- results.json


def test_images_are_not_read_where_they_are_written_last(tmp_path):
    results = {"tables": [[["images"]]], "configuration": {"images": ["a"]}, "device": "cpu"}
    text = json.dumps(results | {"images": [{"index": 0}]}, indent=2)
    start = text.rindex('  "images": [\n')
    (tmp_path / "results.json").write_text(text[:start] + '  "images": [\nno JSON')
    assert read_results(tmp_path) == results
    for images in ([], [{"index": 0}]):
        for order in (results | {"images": images}, {"images": images} | results):
            for indent in (2, None):
                (tmp_path / "results.json").write_text(json.dumps(order, indent=indent) + "\n")
                assert read_results(tmp_path) == results
                assert read_results(tmp_path, images=True) == order
