"""The page of a report in a browser: headless Chromium opens it from the disk, as people do."""

import json
import shutil
from itertools import pairwise

import pytest
from summaries import comparison, likelihood, stored, training

from experiments.collection import collect
from experiments.report_task import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="the extra browser (selenium) is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium and its driver")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The address of a report with long tables, wide ones, pictures, and a name that is markup."""
    root = tmp_path_factory.mktemp("report")
    for i, sde in enumerate(("vp", "ve")):
        for seed in range(2):
            summary = {"comparison": comparison(0.01 * i + 0.003 * seed), "likelihood": likelihood(3.1 + seed)}
            stored(root / "runs" / f"{sde}-{seed}", sde, seed, picture=True, training=training(0.4), **summary)
    error = "ValueError: <script>window.hacked = 1; console.error('hacked')</script> " + "long " * 60
    stored(root / "runs" / "<img src=x onerror=window.hacked=1>", state="failed", error=error)
    write_report(collect([root / "runs"]), root / "report")
    return (root / "report" / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    """The page, opened anew in a wide window in light colours."""
    resize(browser, 1400)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page)
    return browser


def resize(browser, width, scheme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def samplers(browser):
    """The table of samplers."""
    (table,) = [
        t for t in browser.find_elements(By.TAG_NAME, "table") if "samples each" in t.get_attribute("aria-label")
    ]
    return table


def column(table, name):
    """The header cell of a column and the texts below it, from top to bottom."""
    heads = table.find_elements(By.CSS_SELECTOR, "thead th")
    i = [head.text.split()[0] == name.split()[0] and head.text.startswith(name) for head in heads].index(True)
    rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
    return heads[i], [row.find_elements(By.TAG_NAME, "td")[i].text for row in rows]


def values(texts):
    return [float(text.split()[0]) for text in texts]


def test_nothing_is_asked_for_and_nothing_is_wrong(opened):
    asked = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert [url.partition(":")[0] for url in requests if not url.startswith("data:")] == ["file"], requests
    timing = "return performance.getEntriesByType('resource').map((one) => one.name)"
    assert [name for name in opened.execute_script(timing) if not name.startswith("data:")] == []
    assert opened.get_log("browser") == []
    assert opened.execute_script("return window.hacked") is None
    pictures = opened.execute_script("return [...document.images].map((one) => one.naturalWidth)")
    assert len(pictures) >= 2 and all(pictures)


def test_a_click_sorts_numbers_up_and_down_and_the_floor_stays_last(opened):
    table = samplers(opened)
    head, before = column(table, "sliced W2")
    head.find_element(By.TAG_NAME, "button").click()
    _, up = column(table, "sliced W2")
    assert head.get_attribute("aria-sort") == "ascending" and values(up) == sorted(values(before)) != values(before)
    head.find_element(By.TAG_NAME, "button").click()
    _, down = column(table, "sliced W2")
    assert head.get_attribute("aria-sort") == "descending" and values(down) == sorted(values(before), reverse=True)
    assert "noise floor" in table.find_elements(By.TAG_NAME, "tr")[-1].text
    other, _ = column(table, "NFE")
    other.find_element(By.TAG_NAME, "button").click()
    assert head.get_attribute("aria-sort") is None and other.get_attribute("aria-sort") == "ascending"
    assert all(a <= b for a, b in pairwise(values(column(table, "NFE")[1])))


def test_the_keyboard_sorts(opened):
    table = samplers(opened)
    head, before = column(table, "seconds")
    opened.execute_script("arguments[0].focus()", table.find_element(By.TAG_NAME, "button"))
    for _ in range(20):
        if opened.execute_script("return arguments[0].contains(document.activeElement)", head):
            break
        opened.switch_to.active_element.send_keys(Keys.TAB)
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    assert values(column(table, "seconds")[1]) == sorted(values(before))
    opened.switch_to.active_element.send_keys(Keys.SPACE)
    assert values(column(table, "seconds")[1]) == sorted(values(before), reverse=True)


def test_missing_numbers_come_last_both_ways(opened):
    table = opened.find_elements(By.TAG_NAME, "table")[-1]  # all runs; the failed one has no pictures
    head, _ = column(table, "pictures")
    for _ in range(2):
        head.find_element(By.TAG_NAME, "button").click()
        assert column(table, "pictures")[1] == [*["samples"] * 4, "–"]


def test_a_long_table_is_filtered_by_words(opened):
    (box,) = opened.find_elements(By.CSS_SELECTOR, ".filter")
    box.find_element(By.TAG_NAME, "input").send_keys("heun ve")
    rows = [row for row in samplers(opened).find_elements(By.CSS_SELECTOR, "tbody tr") if row.is_displayed()]
    assert len(rows) == 3 and all("heun" in row.text and "VE" in row.text for row in rows)
    assert box.find_element(By.TAG_NAME, "output").text == "3 of 18 rows"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 380])
def test_no_width_makes_the_page_overflow_and_both_schemes_can_be_read(opened, width, scheme):
    resize(opened, width, scheme)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    style = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    ink, paper = (sum(map(int, c.strip("rgba()").split(",")[:3])) / 3 for c in opened.execute_script(style))
    assert (ink < 60 and paper > 230) if scheme == "light" else (ink > 200 and paper < 60)


def test_the_header_stays_in_sight(opened):
    table = samplers(opened)
    place = "const s = arguments[0].closest('.scroll'); s.style.maxHeight = '200px'; s.scrollTop = 150;"
    place += "return arguments[0].tHead.rows[0].cells[0].getBoundingClientRect().top - s.getBoundingClientRect().top"
    assert 0 <= opened.execute_script(place, table) <= 2


def test_the_page_reads_without_its_script(browser, page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(page)
    table = samplers(browser)
    assert len(table.find_elements(By.CSS_SELECTOR, "tbody tr")) == 18 and "sliced W2" in table.text
    assert not browser.find_elements(By.TAG_NAME, "button")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
