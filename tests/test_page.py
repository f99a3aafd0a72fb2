"""The page: it loads nothing, holds every event exactly, and works in a browser, from a phone's width on."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from test_pictures import RUNS, make_picture

from vramplan.core import curve
from vramplan.core.groups import group_of
from vramplan.core.types import Timeline
from vramplan.core.units import human
from vramplan.report import page as page_module
from vramplan.report.page import page, page_data

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")


class Elements(HTMLParser):
    """(tag, attributes, text) of every element, in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][2].append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return [
            "".join(text) for name, attrs, text in self.found if name == tag and attributes.items() <= attrs.items()
        ]


def data_of(text: str) -> dict[str, Any]:
    (found,) = Elements(text).texts("script", id="data")
    return json.loads(found)


def curve_of(data: dict[str, Any]) -> list[int]:
    """Bytes on the card at every point, from a page's data alone."""
    events = [event for _, _, section in data["passages"] for event in data["sections"][section]]
    sizes = [kind[2] for kind in data["kinds"]]
    start = sum(sizes[k - 1] for k in data["resident"])
    totals = list(accumulate((sizes[abs(e) - 1] * (1 if e > 0 else -1) for e in events), initial=start))
    tail, tails = 0, dict(data["tails"])
    for point, _ in enumerate(totals):
        tail = tails.get(point, tail)
        totals[point] += tail
    return totals


# ----------------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("name", RUNS)
def test_every_event_goes_through_the_page_and_back(name: str) -> None:
    picture = make_picture(name)
    found = curve.levels(picture.step)
    data = data_of(page(picture))
    assert curve_of(data) == found.totals
    assert data == json.loads(json.dumps(page_data(picture)))
    assert data["peak"] == {
        "point": found.peak,
        "device_bytes": picture.ledger.peak.device_bytes,
        "allocated_bytes": picture.ledger.peak.allocated_bytes,
    }
    assert sum(line["bytes"] for line in data["ledger"]) == picture.ledger.peak.device_bytes
    assert [group["name"] for group in data["groups"]] == list(found.groups)


def test_a_kind_is_named_and_grouped_as_the_ledger_has_it() -> None:
    data = page_data(make_picture("stock"))
    names = [group["name"] for group in data["groups"]]
    by_group: dict[str, int] = dict.fromkeys(names, 0)
    for k in data["resident"]:
        by_group[names[data["kinds"][k - 1][1]]] += data["kinds"][k - 1][2]
    lines = make_picture("stock").ledger.lines
    for group in ("weights", "optimizer"):
        assert by_group[group] == sum(line.bytes for line in lines if group_of(line) == group)


@pytest.mark.parametrize("name", ["lean", "stock"])
def test_a_page_of_eight_billion_parameters_is_small(name: str) -> None:
    assert len(page(make_picture(name)).encode()) < 200_000


# --------------------------------------------------------------------------------------------------------- safety
def hostile(text: str) -> str:
    picture = make_picture("lean")
    ledger = replace(picture.ledger, model=replace(picture.ledger.model, name=text))
    kinds = (replace(picture.step.kinds[0], name=text), *picture.step.kinds[1:])
    step: Timeline = replace(picture.step, kinds=kinds)
    cards = tuple(replace(card, gpu=text) for card in picture.verdicts)
    return page(replace(picture, ledger=ledger, step=step, verdicts=cards))


@pytest.mark.parametrize(
    "text", ["</script><script>alert(1)</script>", "<!--<script>", '"><img src=x>', "$policy \ud800"]
)
def test_what_a_model_is_called_stays_text(text: str) -> None:
    made = hostile(text)
    tags = [tag for tag, _, _ in Elements(made).found]
    assert tags == [tag for tag, _, _ in Elements(hostile("plain")).found]
    assert data_of(made)["kinds"][0][0] == text.replace("\ud800", "").strip()
    made.encode()


def test_the_policy_allows_the_inlined_texts_alone() -> None:
    made = page(make_picture("lean"))
    elements = Elements(made)
    (policy,) = [attrs["content"] for tag, attrs, _ in elements.found if tag == "meta" and "http-equiv" in attrs]
    assert policy is not None and policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    inlined = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", made, flags=re.DOTALL)
    assert len(inlined) == 3
    for text in inlined:
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert not re.search(r"""(?:src|href)=["'](?!data:,)""", made)
    assert not any(name.startswith("on") for _, attrs, _ in elements.found for name in attrs)
    assert "style" not in {name for _, attrs, _ in elements.found for name in attrs}
    assert "Permission is hereby granted" in made and "Leon Sorokin" in made


# ------------------------------------------------------------------------------------------------------ a browser
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if BROWSER is None or DRIVER is None:
        pytest.skip("no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser: Any, folder: Path, name: str, width: int = 1200, scheme: str = "light") -> Any:
    file = folder / f"{name}.html"
    file.write_text(page(make_picture(name)), encoding="utf-8")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(file.as_uri())
    return browser


def text(browser: Any, selector: str) -> str:
    return browser.find_element("css selector", selector).text


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", RUNS)
def test_a_page_fits_its_window_and_complains_of_nothing(browser: Any, tmp_path: Path, name: str, scheme: str) -> None:
    for width in (360, 800, 1600):
        opened(browser, tmp_path, name, width, scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        canvas = browser.execute_script("return document.querySelector('#chart canvas').getBoundingClientRect().width")
        assert 250 < canvas <= width
        assert browser.get_log("browser") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lean", "stock"])
def test_the_peak_is_shown_first_with_its_tensors(browser: Any, tmp_path: Path, name: str) -> None:
    picture = make_picture(name)
    found = curve.levels(picture.step)
    opened(browser, tmp_path, name)
    assert text(browser, "#point-title").startswith(human(picture.ledger.peak.device_bytes))
    rows = text(browser, "#point-tensors tbody").splitlines()
    for (kind, count), row in zip(curve.live_at(picture.step, found.peak)[:12], rows, strict=False):
        assert row.startswith(f"{count} × {kind.name}" if count > 1 else kind.name)
        assert row.endswith(human(kind.bytes * count))


@pytest.mark.slow
def test_keys_and_the_pointer_find_what_is_live_at_any_point(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    picture = make_picture("lean")
    found = curve.levels(picture.step)
    chart = opened(browser, tmp_path, "lean").find_element("id", "chart")
    chart.send_keys(Keys.HOME)
    assert text(browser, "#point-title") == f"{human(found.totals[0])}, forward"
    chart.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert f"Point 2 of {len(found.totals) - 1:,}" in text(browser, "#point-event")
    chart.send_keys(Keys.PAGE_DOWN)
    point = int(chart.get_attribute("aria-valuenow"))
    assert point == curve.stretches(picture.step)[0].first + len(picture.step.passages[0].events) + 1
    assert text(browser, "#point-title").startswith(human(found.totals[point]))
    chart.send_keys("p")
    assert text(browser, "#point-title").endswith("the peak")
    over = browser.find_element("css selector", "#chart .u-over")
    ActionChains(browser).move_to_element_with_offset(over, 150, 20).perform()
    point = int(chart.get_attribute("aria-valuenow"))
    assert point not in (0, found.peak)
    assert text(browser, "#point-title").startswith(human(found.totals[point]))
    first = curve.live_at(picture.step, point)[0][0]
    assert text(browser, "#point-tensors tbody").startswith(first.name)
    assert browser.get_log("browser") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_browser_counts_the_same_bytes(browser: Any, tmp_path: Path, name: str) -> None:
    from selenium.webdriver import Keys

    found = curve.levels(make_picture(name).step)
    chart = opened(browser, tmp_path, name).find_element("id", "chart")
    for keys in ("p", Keys.HOME, *[Keys.PAGE_DOWN] * 30, Keys.ARROW_LEFT, Keys.END, *[Keys.PAGE_UP] * 10):
        chart.send_keys(keys)
        point = int(chart.get_attribute("aria-valuenow") or -1)
        assert int(chart.get_attribute("data-bytes") or 0) == found.totals[point]


@pytest.mark.slow
def test_groups_can_be_left_out_and_phases_looked_at(browser: Any, tmp_path: Path) -> None:
    opened(browser, tmp_path, "lean")
    drawn = (
        "return new Promise(done => setTimeout(() => done(document.querySelector('#chart canvas').toDataURL()), 50))"
    )
    seen = {browser.execute_script(drawn)}
    for made in browser.find_elements("css selector", "#controls button"):
        made.click()
        seen.add(browser.execute_script(drawn))
    assert len(seen) > 8
    pressed = browser.find_elements("css selector", "#legend [aria-pressed=false]")
    assert len(pressed) == len(curve.levels(make_picture("lean").step).groups)
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_the_ledger_is_sorted_by_its_heads(browser: Any, tmp_path: Path) -> None:
    opened(browser, tmp_path, "stock")
    lines = make_picture("stock").ledger.lines

    def column(number: int) -> list[str]:
        cells = browser.find_elements("css selector", f"table.ledger tbody td:nth-child({number})")
        return [cell.text for cell in cells]

    by_size = [line.label for line in sorted(lines, key=lambda line: -line.bytes)]
    assert column(1) == by_size
    heads = browser.find_elements("css selector", "table.ledger thead button")
    heads[2].click()
    assert [human(size) for size in sorted(line.bytes for line in lines)] == [cell.lstrip("~") for cell in column(3)]
    heads[0].click()
    assert column(1) == sorted(column(1), key=str.casefold)
    assert sorted(column(1)) == sorted(by_size)
    sorts = browser.find_elements("css selector", "table.ledger th[aria-sort]")
    assert [head.get_attribute("aria-sort") for head in sorts] == ["ascending"]
    heads[2].send_keys(" ")  # from the keyboard, the largest first
    assert column(1)[0] == by_size[0]


@pytest.mark.slow
def test_what_was_measured_stands_beside_it(browser: Any, tmp_path: Path) -> None:
    opened(browser, tmp_path, "accumulated")
    table = text(browser, "section[aria-labelledby=measured-title]")
    assert "forward" in table and "+3.0 MiB" in table


def test_the_library_is_the_one_that_the_notice_names() -> None:
    static = Path(page_module.__file__).parent / "static"
    notice = re.search(r"uPlot ([\d.]+) from npm", Path(page_module.__file__).read_text(encoding="utf-8"))
    assert notice is not None
    assert f"uPlot (v{notice[1]})" in (static / "uPlot.iife.min.js").read_text(encoding="utf-8")
    assert "MIT License" in (static / "uPlot.LICENSE").read_text(encoding="utf-8")
