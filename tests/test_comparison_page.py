"""The page: nothing a user names becomes markup, and in a browser it sorts, leafs through, fits and asks no network."""

import json
import re
import shutil

import numpy as np
import pytest

from seg_attn.boundaries import boundary_counts
from seg_attn.compare import Comparison, Row, Setting, confusion_matrix
from seg_attn.comparison_page import _agreement, page
from seg_attn.data import VOCDataModule
from seg_attn.statistics import Counts, paired_difference

EVIL = '<img src=x onerror="document.title=1">&{{DATA}}</script>'


def noisy(target, share, generator):
    """A prediction that differs from its label in so many pixels."""
    prediction = np.where(target == 255, 0, target).astype(np.uint8)
    wrong = generator.random(target.shape) < share
    prediction[wrong] = generator.integers(0, 9, int(wrong.sum()))
    return prediction


@pytest.fixture(scope="module")
def comparison(devkit):
    """Three rows of made-up predictions, the last one named with markup, on the six training scenes."""
    import zlib

    data = VOCDataModule(root=str(devkit), num_workers=0, class_names=[*"abcdefgh", EVIL])
    dataset = data.dataset("train")
    rows = []
    for number, (name, share) in enumerate((("16", 0.3), ("8", 0.1), (EVIL, 0.5))):
        generator = np.random.default_rng(number)
        targets = [dataset.load(index)[1] for index in range(len(dataset))]
        masks = [noisy(target, share * (1 + index) / 6, generator) for index, target in enumerate(targets)]
        near = np.array([boundary_counts(*pair, 9) for pair in zip(targets, masks, strict=True)])
        confusion = np.stack([confusion_matrix(*pair, 9) for pair in zip(targets, masks, strict=True)])
        row = Row(Setting(name), confusion, Counts(near[:, 0], near[:, 1]))
        row.masks = [zlib.compress(mask.tobytes()) for mask in masks]
        if number < 2:
            row.gflops, row.latency_ms, row.parameters = 5.0 * (number + 1), 20.0 + number, 12_000_000
        rows.append(row)
    counts = [Counts.of(row.confusion) for row in rows]
    return Comparison(
        rows=rows,
        baseline=0,
        class_names=data.class_names,
        palette=data.palette,
        dataset=dataset,
        differences=[paired_difference(count, counts[0], 500) for count in counts],
        boundary_differences=[paired_difference(row.boundary, rows[0].boundary, 500) for row in rows],
        seed=0,
    )


@pytest.fixture(scope="module")
def html(comparison):
    return page(comparison, comparison.records(), f"A title {EVIL}", 4)


def content(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))


def test_names_never_become_markup(html):
    assert html.count("</script>") == 2
    assert "<img" not in html
    assert content(html)["classes"][8]["name"] == EVIL
    assert html.count("&lt;img src=x") >= 4  # title, heading, a row, a class
    assert "{{TITLE}}" not in html


def test_nothing_points_outside(html):
    assert not re.search(r'(?:src|href|action)="(?!data:)', html)
    assert not re.search(r"@import|url\((?!data:)", html)
    assert set(re.findall(r"https?://[^\s\"'<]*", html)) == {"http://www.w3.org/2000/svg"}


def test_the_images_are_those_that_rows_disagree_on_most(html, comparison):
    shown = content(html)["images"]
    shares = comparison.disagreement()
    assert [image["share"] for image in shown] == sorted(shares, reverse=True)[:4]
    names = [pair.image.name for pair in comparison.dataset.pairs]
    assert [image["name"] for image in shown] == [names[i] for i in np.argsort(shares)[::-1][:4]]
    first = names.index(shown[0]["name"])
    target = comparison.dataset.load(first)[1]
    mask = noisy(target, 0.0, np.random.default_rng(0))
    assert (mask == target)[target != 255].all()
    right = comparison.rows[0].confusion[first]
    assert shown[0]["accuracy"][0] == pytest.approx(np.trace(right) / right.sum())


def test_disagreement_is_of_labelled_pixels():
    target = np.array([[0, 1, 1, 255]])
    masks = np.array([[[0, 1, 2, 0]], [[0, 2, 2, 1]]], dtype=np.uint8)
    found = _agreement(masks, masks == target, target != 255)
    assert found.tolist() == [[0, 2, 1, 3]]  # all right, differ, wrong alike, no label


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, html, tmp_path):
    """Open the page; at the end nothing may have been requested, logged or thrown."""
    path = tmp_path / "compare.html"
    path.write_text(html, encoding="utf-8")
    said, asked, contexts = [], [], []

    def open_page(width=1280, height=900, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert asked.count(path.as_uri()) == len(contexts)
    assert all(url == path.as_uri() or url.startswith("data:") for url in asked)


def column(tab, number):
    return tab.eval_on_selector_all(
        f"#settings tbody tr > :nth-child({number})", "cells => cells.map(cell => cell.dataset.value)"
    )


def test_headings_sort_and_say_so(opened, comparison):
    tab = opened()
    mious = [row.miou for row in comparison.rows]
    head = tab.locator("#settings thead th").nth(1)
    assert head.get_attribute("aria-sort") == "none"
    head.locator("button").click()
    assert [float(value) for value in column(tab, 2)] == sorted(mious, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").focus()
    tab.keyboard.press("Enter")
    assert [float(value) for value in column(tab, 2)] == sorted(mious)
    assert head.get_attribute("aria-sort") == "ascending"
    tab.locator("#settings thead button", has_text="GFLOPs").click()
    assert column(tab, 9) == ["10.0", "5.0", ""]  # what is unknown stays at the end, either way
    tab.locator("#settings thead button", has_text="GFLOPs").click()
    assert column(tab, 9) == ["5.0", "10.0", ""]
    assert head.get_attribute("aria-sort") == "none"


def test_images_are_leafed_through_by_keys_buttons_and_thumbnails(opened, html):
    tab = opened()
    names = [image["name"] for image in content(html)["images"]]

    def shown():
        position, name, _ = tab.locator("#place").inner_text().split(" · ")
        assert tab.locator("#thumbs button[aria-current=true]").get_attribute("aria-label").endswith(name)
        assert tab.locator("#panes img").first.get_attribute("alt") == f"Photograph {name}"
        return int(position.split(" of ")[0]) - 1, name

    assert shown() == (0, names[0])
    tab.keyboard.press("ArrowRight")
    assert shown() == (1, names[1])
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    assert shown() == (3, names[3])
    tab.locator("#next").click()
    assert shown() == (0, names[0])
    tab.locator("#previous").click()
    assert shown() == (3, names[3])
    tab.locator("#thumbs button").nth(2).click()
    assert shown() == (2, names[2])
    assert tab.locator("#panes figure").count() == 2 + 3 + 1
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert tab.evaluate("[...document.querySelectorAll('#panes img')].every(image => image.alt)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone_and_follows_the_colour_scheme(opened, scheme):
    tab = opened(390, 844, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    light = (
        "const c = getComputedStyle(document.body).backgroundColor.match(/\\d+/g); return +c[0] + +c[1] + +c[2] > 384"
    )
    is_light = f"(() => {{ {light} }})()"
    assert tab.evaluate(is_light) == (scheme == "light")
    tab.locator("#theme").click()
    assert tab.evaluate(is_light) == (scheme == "dark")
    tab.locator("#row").select_option(index=1)
    tab.locator("#axis").select_option(index=1)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert tab.locator("#settings").evaluate("table => table.offsetWidth > table.parentElement.clientWidth")


def test_plots_show_what_the_data_hold(opened, html):
    tab = opened()
    rows, classes = content(html)["rows"], content(html)["classes"]
    assert tab.locator("#cost-plot circle").count() == 2
    assert "Cost unknown" in tab.locator("#cost-plot").inner_text()
    heights = [
        float(value) for value in tab.locator("#cost-plot circle").evaluate_all("c => c.map(d => d.getAttribute('cy'))")
    ]
    assert (heights[0] < heights[1]) == (rows[0]["miou"] > rows[1]["miou"])
    assert tab.locator("#axis option").all_inner_texts() == ["GFLOPs", "latency, ms", "parameters, M"]
    tab.locator("#row").select_option(index=1)
    titles = tab.locator("#class-plot title").all_text_contents()
    assert len(titles) == len(classes)
    difference = rows[2]["per_class_difference"]["a"]
    assert titles[0].startswith(f"a: {100 * difference:+.2f} (".replace("-", "−"))
    assert tab.title() == f"A title {EVIL}"
