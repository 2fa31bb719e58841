"""The page of a real run in a real browser: Debian's chromium with chromium-driver; skipped where they are
not installed.
"""

import base64
import json
import re

import numpy as np
import pytest
from conftest import HOSTILE
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from diffattack.plotting.charts import polylines
from diffattack.plotting.pages import PICTURES_BUDGET, encode


@pytest.fixture
def page(browser, finished):
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier tests left
    browser.set_window_size(1280, 900)
    browser.get((finished / "report.html").as_uri())
    return browser


def names(page) -> list[str]:
    return [
        card.find_element(By.TAG_NAME, "h3").text
        for card in page.find_elements(By.CSS_SELECTOR, ".card")
        if card.is_displayed()
    ]


def test_nothing_is_asked_of_a_network_and_the_console_is_silent(page):
    assert [entry for entry in page.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == [] and sum(
        url.startswith("file:") for url in urls
    ) == 1
    assert page.execute_script("return [...document.images].every(image => image.src.startsWith('data:'))")
    page.execute_script("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    assert (
        page.execute_async_script(
            "const done = arguments[0]; Promise.all([...document.images].map(image => "
            "image.decode())).then(() => done(true), error => done(String(error)))"
        )
        is True
    )


def test_a_hostile_file_name_stays_text(page):
    assert HOSTILE in names(page) and page.find_elements(By.CSS_SELECTOR, "img[src='x']") == []


@pytest.mark.nightly
def test_the_slider_moves_by_keyboard_and_shows_more_of_the_clean_picture(page):
    card = page.find_element(By.CSS_SELECTOR, ".card")
    slider, compare = (
        card.find_element(By.CSS_SELECTOR, "input[type=range]"),
        card.find_element(By.CSS_SELECTOR, ".compare"),
    )

    def clip():
        return page.execute_script(
            "return getComputedStyle(arguments[0].querySelector('.adversarial')).clipPath", compare
        )

    assert "50%" in clip()
    slider.send_keys(Keys.ARROW_RIGHT * 10)
    assert "60%" in clip()
    slider.send_keys(Keys.END)
    assert "100%" in clip()
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", compare)
    webdriver.ActionChains(page).move_to_element_with_offset(
        slider, -compare.size["width"] // 4, 0
    ).click().perform()
    assert abs(float(re.search(r"([\d.]+)%", clip())[1]) - 25) < 6


@pytest.mark.nightly
def test_differences_are_toggled_for_one_and_for_all(page):
    def shown():
        return [image.is_displayed() for image in page.find_elements(By.CSS_SELECTOR, ".difference")]

    assert shown() == [False] * 4
    button = page.find_elements(By.CSS_SELECTOR, ".toggle")[1]
    button.send_keys(Keys.ENTER)
    assert shown() == [False, True, False, False] and button.get_attribute("aria-pressed") == "true"
    everything = page.find_element(By.ID, "differences")
    everything.click()
    assert shown() == [True] * 4
    everything.click()
    assert shown() == [False] * 4


@pytest.mark.nightly
def test_sorting(page, finished):
    rows = json.loads((finished / "results.json").read_text())["images"]
    assert [name for name in names(page) if name.startswith("img")] == ["img2.png", "img10.png"]
    select = Select(page.find_element(By.ID, "sort"))
    select.select_by_value("drop")
    assert names(page) == [
        row["file"]
        for row in sorted(
            rows, key=lambda row: row["after"]["true_confidence"] - row["before"]["true_confidence"]
        )
    ]
    select.select_by_value("ssim")
    assert names(page) == [row["file"] for row in sorted(rows, key=lambda row: row["quality"]["SSIM"])]


def test_filtering(page, finished):
    rows = json.loads((finished / "results.json").read_text())["images"]
    select = Select(page.find_element(By.ID, "filter"))
    for outcome, success in (("fooled", True), ("not fooled", False), ("wrong before", None)):
        select.select_by_visible_text(outcome)
        assert sorted(names(page)) == sorted(row["file"] for row in rows if row["success"] is success)
        assert (
            page.find_element(By.ID, "count").text
            == f"{sum(row['success'] is success for row in rows)} of 4 images"
        )
    select.select_by_visible_text("all")
    assert len(names(page)) == 4


@pytest.mark.nightly
@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_sticks_out_at_the_side(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    try:
        page.find_element(By.TAG_NAME, "summary").click()
        assert page.execute_script("return document.scrollingElement.scrollWidth") <= width
        assert all(card.size["width"] <= width for card in page.find_elements(By.CSS_SELECTOR, ".card"))
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.nightly
def test_every_picture_and_control_has_a_name(page):
    assert all(image.get_attribute("alt") for image in page.find_elements(By.TAG_NAME, "img"))
    assert all(
        control.accessible_name for control in page.find_elements(By.CSS_SELECTOR, "input, select, button")
    )


@pytest.mark.nightly
def test_both_schemes_of_colours(page):
    grounds = []
    for scheme in ("light", "dark"):
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        grounds.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"]


@pytest.mark.parametrize("side, budget", [(224, 120_000), (512, 120_000), (512, PICTURES_BUDGET // 1000)])
def test_pictures_keep_to_their_budget_even_where_nothing_compresses(side, budget):
    pictures = np.random.default_rng(0).integers(0, 255, (3, side, side, 3), np.uint8)
    urls = encode(pictures, budget)
    size = sum(len(base64.b64decode(url.partition(",")[2])) for url in urls)
    assert size <= budget or (budget < 10_000 and size < 3 * 10_000)


def test_curves_have_gaps_where_values_are_missing():
    pieces = polylines(np.array([0, 1, np.nan, 0.5, np.nan]), 0, 1)
    assert pieces[0] == "38.0,92.0 92.0,8.0" and len(pieces) == 2 and pieces[1].startswith("200.0,50.0 ")
