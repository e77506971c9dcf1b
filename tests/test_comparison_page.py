"""The page: nothing a user names becomes markup, and in a browser it sorts, leafs through, fits and asks no network."""

import io
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from seg_attn.boundaries import boundary_counts
from seg_attn.compare import Comparison, Row, Setting, confusion_matrix
from seg_attn.comparison_page import _agreement, _label, page
from seg_attn.comparison_report import show, write_comparison
from seg_attn.data import VOCDataModule
from seg_attn.report import percent, signed
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
        row = Row(Setting(name), confusion.sum(0), Counts.of(confusion), Counts(near[:, 0], near[:, 1]))
        row.masks = [zlib.compress(mask.tobytes()) for mask in masks]
        if number < 2:
            row.gflops, row.latency_ms, row.parameters = 5.0 * (number + 1), 20.0 + number, 12_000_000
        rows.append(row)
    return Comparison(
        rows=rows,
        baseline=0,
        class_names=data.class_names,
        palette=data.palette,
        dataset=dataset,
        differences=[paired_difference(row.counts, rows[0].counts, 500) for row in rows],
        boundary_differences=[paired_difference(row.boundary, rows[0].boundary, 500) for row in rows],
        seed=0,
    )


@pytest.fixture(scope="module")
def html(comparison):
    return page(comparison, comparison.records(), f"A title {EVIL}", 4)


NAMES = [
    f"{stride}{mode}" for stride in (16, 8, 32) for mode in ("", ", scales 0.5 0.75 1", ", scales 0.5 0.75 1 + flip")
]


@pytest.fixture(scope="module")
def nine(comparison):
    """Nine rows, most of them with long names and close to each other in accuracy and cost."""
    generator = np.random.default_rng(0)
    rows = []
    for name in NAMES:
        row = comparison.rows[int(generator.integers(2))]
        setting = Setting(name, output_stride=int(name.split(",")[0]))
        cost, time = generator.uniform(4, 20), generator.uniform(10, 900)
        rows.append(replace(row, setting=setting, gflops=cost, latency_ms=time, peak_memory_bytes=2**31))
    return replace(
        comparison,
        rows=rows,
        differences=[paired_difference(row.counts, rows[0].counts, 500) for row in rows],
        boundary_differences=[comparison.boundary_differences[0]] * 9,
    )


def shown_on(comparison, width):
    console = Console(force_terminal=True, width=width, file=io.StringIO(), color_system=None)
    show(comparison, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return [line.strip() for line in lines]


@pytest.mark.parametrize("width", [80, 100])
def test_a_narrow_terminal_keeps_names_and_differences(nine, width):
    lines = shown_on(nine, width)
    end = next(index for index, line in enumerate(lines) if line.startswith("no room for "))
    table = lines[:end]
    for record in nine.records():
        interval = "" if record["baseline"] else " to ".join(map(signed, record["ci95"]))
        figures = [percent(record["miou"]), "baseline" if record["baseline"] else signed(record["difference"])]
        wanted = r"\s+".join(map(re.escape, [*figures, *interval.split()]))
        assert any(re.search(rf"\s{wanted}(\s|$)", line) for line in table), record["name"]
    # Names are wrapped between words: what is left of the figures, read downwards.
    names = " ".join(re.split(r"\s{2,}", line)[0] for line in table[4:])
    assert " ".join(names.split()) == " ".join(NAMES)
    heads = re.split(r"\s{2,}", lines[2])
    left_out = lines[end].removeprefix("no room for ").removesuffix(": compare.csv has them").split(", ")
    assert heads[:4] == ["setting", "mIoU", "difference", "95 % interval"]
    assert heads[4:] + left_out == ["ms", "GFLOPs", "MiB", "boundary", "img/s", "M param."]


def test_a_narrow_terminal_cuts_the_classes_table(nine):
    lines = shown_on(nine, 80)
    tables = [index for index, line in enumerate(lines) if line == "IoU per class (%)"]
    assert len(tables) > 1
    records = nine.records()
    for name in nine.class_names[:8]:
        shown = [line.split()[1:] for line in lines[tables[0] :] if line.split()[:1] == [name]]
        assert [figure for line in shown for figure in line] == [
            percent(record["per_class"][name]) for record in records
        ]


def test_a_wide_terminal_shows_all(nine):
    lines = shown_on(nine, 160)
    assert not any("no room" in line for line in lines)
    assert sum(line == "IoU per class (%)" for line in lines) == 1
    assert all(any(line.startswith(f"{name}  ") for line in lines) for name in NAMES)


def test_a_photograph_whose_name_is_no_utf8(comparison, tmp_path):
    pairs = list(comparison.dataset.pairs)
    for index, pair in enumerate(pairs):
        image = tmp_path / os.fsdecode(b"caf\xe9%d.jpg" % index)
        image.write_bytes(pair.image.read_bytes())
        pairs[index] = replace(pair, image=image)
    data = VOCDataModule(root=str(tmp_path), num_workers=0, class_names=comparison.class_names)
    dataset = type(comparison.dataset)(pairs, data.label_reader, mean=data.mean, std=data.std)
    write_comparison(replace(comparison, dataset=dataset), tmp_path / "out", os.fsdecode(b"t\xe9"), 1)
    html = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert re.fullmatch(r"caf\\xe9\d.jpg", content(html)["images"][0]["name"])
    assert "<title>t\\udce9</title>" in html


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
    right = comparison.rows[0].counts.intersection[first].sum()
    assert shown[0]["accuracy"][0] == pytest.approx(right / (target != 255).sum())


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
    """Open the page, or another; at the end nothing may have been requested, logged or thrown."""
    said, asked, contexts = [], [], []

    def open_page(width=1280, height=900, scheme="light", text=html):
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(text, encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        assert asked.count(path.as_uri()) == 1
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert sum(not url.startswith("data:") for url in asked) == len(contexts)


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_prints_dark_on_white(opened, scheme):
    tab = opened(scheme=scheme)
    if scheme == "light":
        tab.locator("#theme").click()  # dark by hand
    tab.emulate_media(media="print")
    style = "getComputedStyle(document.body)"
    assert tab.evaluate(f"{style}.color") == "rgb(0, 0, 0)"
    assert tab.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"


def test_only_a_number_that_is_the_output_stride_is_called_one():
    names = {"16": 16, "8, flip": 8, "2024-run at 8": 8, "16 at 8": 8, "masks in 3": None}
    labels = [_label({"name": name, "output_stride": stride}) for name, stride in names.items()]
    assert labels == ["stride 16", "stride 8, flip", "2024-run at 8", "16 at 8", "masks in 3"]


def test_plots_show_what_the_data_hold(opened, html):
    tab = opened()
    rows, classes = content(html)["rows"], content(html)["classes"]
    assert tab.locator("#cost-plot circle").count() == 2
    assert "Cost unknown" in tab.locator("#cost-plot").inner_text()
    base, other = (tab.locator(f"#cost-plot {kind} circle") for kind in (".basepoint", "g:not(.basepoint)"))
    higher = float(base.get_attribute("cy")) < float(other.get_attribute("cy"))
    assert higher == (rows[0]["miou"] > rows[1]["miou"])
    assert tab.locator("#axis option").all_inner_texts() == ["GFLOPs", "latency, ms", "parameters, M"]
    tab.locator("#row").select_option(index=1)
    titles = tab.locator("#class-plot title").all_text_contents()
    assert len(titles) == len(classes)
    difference = rows[2]["per_class_difference"]["a"]
    assert titles[0].startswith(f"a: {100 * difference:+.2f} (".replace("-", "−"))
    assert tab.title() == f"A title {EVIL}"


def boxes(tab, selector):
    return tab.eval_on_selector_all(
        selector, "found => found.map(e => e.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"
    )


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("cost", ["GFLOPs", "latency, ms", "peak memory, MiB"])
def test_labels_of_the_plot_lie_inside_and_apart(opened, nine, width, cost):
    tab = opened(width, 844, text=page(nine, nine.records(), "Nine", 1))
    tab.locator("#axis").select_option(label=cost)
    ((left, top, right, bottom),) = boxes(tab, "#cost-plot svg")
    labels = boxes(tab, "#cost-plot .name")
    assert len(labels) == 9
    for number, (x0, y0, x1, y1) in enumerate(labels):
        assert left <= x0
        assert x1 <= right
        assert top <= y0
        assert y1 <= bottom
        for u0, v0, u1, v1 in labels[:number]:
            # Boxes hold the line's height, of which letters fill less.
            assert x1 <= u0 or u1 <= x0 or y1 <= v0 + 4 or v1 <= y0 + 4
    named = tab.locator("#cost-plot .name").all_text_contents()
    full = [f"stride {name}" for name in NAMES]
    if named != full:  # numbers, told apart in a list
        assert named == [str(number) for number in range(1, 10)]
        assert tab.locator("#cost-plot .key li").all_inner_texts() == full
    titles = tab.locator("#cost-plot title").all_text_contents()
    assert sorted(title.split(":")[0] for title in titles) == sorted(full)
    assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_labels_are_names_where_there_is_room(opened, comparison, html):
    tab = opened()
    assert tab.locator("#cost-plot .name").all_text_contents() == ["16", "8"]
    assert tab.locator("#cost-plot .key").count() == 0


def test_long_names_are_whole_on_a_phone(opened, nine):
    tab = opened(390, 844, text=page(nine, nine.records(), "Nine", 1))
    assert tab.locator("#settings tbody th").all_inner_texts() == [f"stride {name}" for name in NAMES]
    assert tab.evaluate(
        "[...document.querySelectorAll('#settings tbody th')].every(e => e.scrollWidth <= e.clientWidth)"
    )


def test_the_current_thumbnail_stays_in_sight(opened, html):
    data = content(html)
    many = [{**data["images"][index % 4], "name": f"{index}.jpg"} for index in range(40)]
    text = html.replace(json_of(data["images"]), json_of(many))
    tab = opened(390, 844, text=text)
    tab.emulate_media(reduced_motion="reduce")
    assert tab.locator("#thumbs button").count() == 40
    for key, steps in (("ArrowRight", 45), ("ArrowLeft", 50)):
        for _ in range(steps):
            tab.keyboard.press(key)
            ((left, _, right, _),) = boxes(tab, "#thumbs button[aria-current=true]")
            ((start, _, end, _),) = boxes(tab, "#thumbs")
            assert start <= left
            assert right <= end
            if 5 < int(tab.locator("#place b").inner_text().split()[0]) < 35:  # neither end is near
                assert left + right == pytest.approx(start + end, abs=4)
    assert tab.locator("#place").inner_text().startswith("36 of 40")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390


def json_of(images):
    """The page's own way to write JSON."""
    text = json.dumps(images, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def test_without_images_there_is_no_browser_of_them(opened, comparison):
    tab = opened(text=page(comparison, comparison.records(), "None", 0))
    assert tab.locator("#images").count() == 0
    for key in ("ArrowRight", "ArrowLeft"):
        tab.keyboard.press(key)
    assert tab.locator("#cost-plot circle").count() == 2
