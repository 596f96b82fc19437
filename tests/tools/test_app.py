"""The page of `tomesd app`: what it does, without gradio, and itself in a real browser."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import tomesd
from tomesd.__main__ import main
from tomesd.commands.app.comparison import Run, Settings, error_over_time
from tomesd.commands.app.studio import Cancelled, Studio
from tomesd.commands.common import UserError
from tomesd.commands.options import METHODS
from tomesd.commands.pipelines import EMOJI_MODEL, load_pipeline
from tomesd.hosts.hooks import patch_of

CPU = torch.device("cpu")
FIELDS = dict(prompt="a cat", size="64x32", steps=2, method="merge", ratio=0.5, levels="finest", seed=0)


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(tiny.sd(), CPU, shipped=False)


@pytest.fixture(autouse=True)
def _unpatched(studio: Studio) -> Iterator[None]:
    yield
    assert patch_of(studio.pipe.unet) is None
    assert not studio.pipe.unet._forward_pre_hooks


def settings(studio: Studio, **changes: Any) -> Settings:
    return studio.settings(**{**FIELDS, **changes})[0]


def quiet(label: str, step: int, steps: int) -> None:
    pass


def test_a_run_compares_two_pictures_and_keeps_the_plain_one(studio: Studio) -> None:
    told: list[tuple[str, int, int]] = []
    first = studio.compare(settings(studio), True, lambda *step: told.append(step))
    assert [step for step in told if "warm" not in step[0]] == [
        ("plain", 1, 2),
        ("plain", 2, 2),
        ("Merge", 1, 2),
        ("Merge", 2, 2),
    ]
    plain, merged = (np.asarray(drawn.picture) for drawn in (first.plain, first.merged))
    assert plain.shape == merged.shape == (32, 64, 3)
    assert (plain != merged).any()
    second = studio.compare(settings(studio, method="sample-keys"), True, quiet)
    assert second.plain is first.plain
    assert studio.compare(settings(studio, seed=1), True, quiet).plain is not first.plain
    run = second.run
    assert run.time == pytest.approx(second.merged.seconds / first.plain.seconds, abs=1e-3)
    error = np.square(plain.astype(float) - np.asarray(second.merged.picture)).mean()
    assert run.psnr == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)
    assert run[3:7] == ("a cat", "64x32", 2, 0)
    assert second.difference.size == (512, 256)
    names, *rows = second.table()
    assert [len(row) for row in rows] == [len(names)] * 2
    assert float(rows[1][2]) == pytest.approx(2 / second.merged.seconds, abs=0.01)


def test_without_plain_there_is_nothing_to_compare_with(studio: Studio) -> None:
    done = studio.compare(settings(studio), False, quiet)
    assert (done.plain, done.difference, done.run, len(done.table())) == (None, None, None, 2)


def test_a_large_picture_is_drawn_small_and_then_refined(studio: Studio) -> None:
    told: list[tuple[str, int]] = []

    def tell(label: str, step: int, steps: int) -> None:
        merged = patch_of(studio.pipe.unet) is not None
        assert merged == label.endswith("Merge")
        told.append((label, steps))

    done = studio.compare(settings(studio, size="320x256", steps=5), True, tell)
    assert [step for step in told if "warm" not in step[0]] == [("plain", 5)] * 5 + [
        *[("plain", 2)] * 2,
        *[("Merge", 2)] * 2,
    ]
    assert done.merged.picture.size == (320, 256)
    assert done.merged.steps == 2
    assert done.run.psnr > 20  # both refine the same picture
    with pytest.raises(UserError, match="takes at least 3 steps, not 2"):
        studio.compare(settings(studio, size="320x256"), True, quiet)


@pytest.mark.parametrize("method", METHODS)
def test_the_line_to_copy_patches_as_the_page_does(studio: Studio, method: str) -> None:
    wanted = settings(studio, method=method, ratio=0.25, levels=2)
    eval(wanted.line, {"tomesd": tomesd, "pipe": studio.pipe})
    rows = [row for row in tomesd.explain(studio.pipe).rows if row.left_alone is None]
    assert {row.method for row in rows} == {wanted.method}
    assert {row.downsample for row in rows} == {1, 2}
    tomesd.remove_patch(studio.pipe)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"size": "60"}, "size 60x60: 60 is not a multiple of 8; take 56 or 64"),
        ({"size": "big"}, "'big' is neither a side like 512 nor a size like 3840x2176"),
        ({"size": ""}, "'' is neither"),
        ({"ratio": 1.5}, "ratio must be in [0, 1], the share of tokens to save, got 1.5"),
        ({"ratio": 1, "method": "sample-keys"}, "ratio must be in [0, 1)"),
        ({"ratio": None}, "ratio must be a number"),
        ({"steps": 0}, "steps: '0' is not a whole number of at least 1"),
        ({"seed": -1}, "seed: '-1' is not a whole number in 0..2^63-1"),
        ({"seed": None}, "seed: '' is not a whole number in 0..2^63-1"),
    ],
)
def test_mistakes_are_one_sentence(studio: Studio, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        settings(studio, **wrong)


def test_a_method_that_cannot_be_had_is_known_before_anything_is_drawn() -> None:
    studio = Studio(tiny.sdxl(), CPU, shipped=False)
    with pytest.raises(UserError, match=r"nothing to merge .* with max_downsample=1"):
        studio.compare(settings(studio, levels=1), True, lambda *step: pytest.fail("it draws"))
    assert patch_of(studio.pipe.unet) is None


def test_a_ratio_that_is_cut_is_told(studio: Studio) -> None:
    wanted, notes = studio.settings(**{**FIELDS, "ratio": 0.9})
    assert wanted.method.ratio == 0.75
    assert ["ratio 0.9 is above 0.75" in note for note in notes] == [True]


@pytest.mark.parametrize("draw", [lambda s, *a: s.compare(a[0], False, *a[1:]), Studio.trace])
def test_a_run_that_is_stopped_ends_at_its_next_step(studio: Studio, draw: Any) -> None:
    steps = []

    def told(label: str, step: int, of: int) -> None:
        steps.append(step)
        assert not studio.stop("somebody else")
        if step == 2:
            assert studio.stop("me")

    studio.warm.clear()
    with pytest.raises(Cancelled):
        draw(studio, settings(studio, steps=9), told, "me")
    assert max(steps) == 2
    assert not studio.stop("me")
    assert draw(studio, settings(studio), quiet, "me")  # and the next one draws


def test_one_picture_is_drawn_at_a_time(studio: Studio) -> None:
    order: list[int] = []

    def draw(number: int) -> None:
        studio.compare(settings(studio, steps=4), False, lambda *step: order.append(number))

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order in (sorted(order), sorted(order, reverse=True))
    assert len(set(order)) == 2


def test_who_waits_can_be_stopped_too(studio: Studio) -> None:
    told: list[object] = []
    ended = []

    def draw() -> None:
        try:
            studio.compare(settings(studio), False, lambda *step: told.append(step), "me")
        except Cancelled:
            ended.append("cancelled")

    thread = threading.Thread(target=draw)
    with studio.turn:
        thread.start()
        while not studio.stop("me"):
            pass
    thread.join()
    assert (ended, told) == (["cancelled"], [])


@pytest.mark.parametrize("method", METHODS)
def test_a_click_shows_what_merged_with_a_pixel(studio: Studio, method: str) -> None:
    traced = studio.trace(settings(studio, method=method, size="128x64"), quiet)
    assert traced.steps == 2
    plan = next(plan for plan in traced.plans if (plan.block, plan.step) == (traced.finest, 1))
    spot = traced.spot(traced.finest, 127, 3)  # in the last token of the first row
    picture, words = traced.show(traced.finest, 2, spot)
    assert (plan.w, plan.h, picture.size) == (16, 8, (128, 64))
    shown = np.asarray(picture).reshape(8, 8, 16, 8, 3)
    grey = (shown == shown[..., :1]).all((1, 3, 4)).flatten()
    if method == "sample-keys":
        lit = torch.zeros(128, dtype=torch.bool).index_fill(0, plan.map.keep[-1], True)
        assert f"Every pixel looked at the {plan.map.groups} of 128 tokens" in words
        assert ("is one of them" in words) == bool(lit[15])
    else:
        lit = plan.map.index[-1] == plan.map.index[-1, 15]
        others = int(lit.sum()) - 1
        assert f"merged with {f'{others} in yellow' if others else 'no other'}" in words
    lit[15] = True  # it has a colour of its own
    assert np.array_equal(~grey, lit.numpy())
    assert "column 16, row 1" in words
    assert "column" not in traced.show(traced.blocks[0], 1)[1]


def test_the_presets_can_be_drawn(studio: Studio) -> None:
    for name, preset in studio.presets().items():
        values = {key: value for key, value in preset.items() if key != "beside"}
        wanted = settings(studio, **values)
        tomesd.apply_patch(studio.pipe, wanted.method, wanted.levels)
        assert wanted.size == ((3840, 2176) if name == "4K" else (128, 128))
    tomesd.remove_patch(studio.pipe)


def test_each_run_is_a_point_over_time() -> None:
    runs = [Run(name, 0.5, psnr, "a", "8x8", 1, 0, 1.0) for name, psnr in (("A", 40), ("B", 60), ("A", 90))]
    (axes,) = error_over_time(runs).axes
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines[1:]}
    assert points == {"A": [[0.5, 40], [0.5, 90]], "B": [[0.5, 60]]}
    assert axes.get_ylim()[1] > 90


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "/nowhere/at/all"], "there is no folder /nowhere/at/all"),
        (["--port", "99999"], "cannot listen at 127.0.0.1, port 99999: "),
        (["--port", "0", "--host", "256.0.0.1"], "cannot listen at 256.0.0.1, port 0: "),
        (["--port", "TAKEN"], "cannot listen at 127.0.0.1, port "),
    ],
)
def test_a_wrong_command_line_is_told_before_gradio_is_wanted(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["app", *(port if a == "TAKEN" else a for a in arguments)]) == 2
    assert f"tomesd app: error: {says}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the page of the shipped model is."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'tomesd[app]'")
    from tomesd.commands.app.page import THEME, make_page

    page = make_page(Studio(load_pipeline(str(EMOJI_MODEL), CPU, torch.float32), CPU, shipped=True))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, theme=THEME)
    yield url
    page.close()


def test_the_page_draws_without_a_browser(address: str) -> None:
    from gradio_client import Client

    client = Client(address, verbose=False)
    slider, _, figures, *_, table = client.predict(
        True, "red apple", "128", 3, "sample-keys", 0.5, "finest", 0, api_name="/draw"
    )
    assert len(slider["value"]) == 2
    assert "times as fast" in figures
    assert table["data"][0][0] == "SampleKeys(0.5)"
    assert (
        client.predict("merge", 2, 1, api_name="/line")
        == "# ratio must be in [0, 1], the share of tokens to save, got 2"
    )


def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("the browser test needs chromium: apt-get install chromium")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("the browser test needs playwright: pip install playwright")
    return found


FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


@pytest.fixture
def browser(address: str) -> Iterator[Any]:
    """The page in a real browser."""
    program = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=program, args=FLAGS)
        tab = window.new_page(viewport={"width": 1360, "height": 900})
        tab.set_default_timeout(30_000)
        tab.goto(address)
        yield tab
        window.close()


def test_in_a_browser(browser: Any) -> None:
    press = lambda name: browser.get_by_role("button", name=name, exact=True).click()  # noqa: E731
    fill = lambda name, value: browser.get_by_label(name, exact=True).fill(value)  # noqa: E731
    sees = lambda text: browser.get_by_text(text).filter(visible=True).first.wait_for()  # noqa: E731

    fill("Prompt", "blue heart")
    fill("Steps", "3")
    press("Exact look")
    sees("MergeKeys(0.5)")
    press("Generate")
    sees("times as fast")
    pictures = "[...document.querySelectorAll('[role=tabpanel] img')].filter(i => i.naturalWidth >= 128)"
    browser.wait_for_function(f"{pictures}.length >= 3")  # plain, merged, their difference
    figures = browser.locator("table").first.inner_text()
    assert [row.split()[0] for row in figures.splitlines()[1:]] == ["plain", "merged"]

    fill("Size", "60")
    press("Generate")
    sees("60 is not a multiple of 8; take 56 or 64")
    fill("Size", "128")
    fill("Ratio", "1.5")
    press("Generate")
    sees("ratio must be in [0, 1), the share of tokens to save, got 1.5")
    fill("Ratio", "0.5")
    assert "times as fast" in browser.inner_text("body")  # what was drawn before stays

    fill("Steps", "500")
    press("Generate")
    sees("/500 steps")
    press("Cancel")
    sees("Stopped.")
    fill("Steps", "3")

    browser.get_by_role("tab", name="What merged").click()
    press("Draw and trace")  # once the run before has stopped
    sees("Every pixel looked at 1024 merged keys of 4096 tokens.")
    browser.locator("[data-testid=image] img, .image-frame img").last.click(position={"x": 100, "y": 60})
    sees("has a key that merged with")
    browser.get_by_role("tab", name="Error over time").click()
    sees("MergeKeys(0.5)")
    sees("blue heart")
