"""A run's page in a real browser: Debian's chromium, driven by playwright. Skipped where one is missing.

Every page is opened from disk. `visit` fails a test on any message in the console, on any dialog, and on any
request that leaves the folder of the run.
"""

import shutil

import pytest
from test_report import ATTACKS, METRICS, answer, run

from slm import report
from slm.report import page

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(path, hash, width, dark) opens a page and waits until it is drawn."""
    contexts, faults = [], []

    def open_page(path, hash="", width=1280, dark=False):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800},
                                            color_scheme="dark" if dark else "light"))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}"))
        tab.on("request", lambda request: request.url.startswith(f"file://{path.parent}/report")
               or faults.append(request.url))
        tab.goto(f"file://{path}{hash}")
        tab.wait_for_selector("body[data-ready]")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def grpo(path, steps=3):
    tokens = {"text": ["What?", " four"], "mask": [0, 1], "logp": [-2.5], "old": [-2.4], "teacher": []}
    rows = []
    for step in range(1, steps + 1):
        for problem in range(4):
            for k in range(4):
                reply = {"text": f"It is \\boxed{{{k}}}", "finish": "stop"}
                rows.append({"step": step, "problem": f"p{step}{problem}", "question": f"What is {problem}?",
                             "gold": "4", "sample": k, "correct": k < problem, "reward": float(k < problem),
                             "reason": "x", "advantage": 0.5 - k, "tokens": 10 + k, "answer": str(k),
                             "records": [tokens], "turns": [{"role": "solver", "reply": reply}]})
    settings = {"algorithm": "grpo", "model": "tiny", "batch": 4, "samples": 4, "data": ["tiny"]}
    return report.write(run(path, settings, metrics=METRICS[:steps], episodes=rows))


def test_attacks_in_every_text_run_nothing(visit, tmp_path):
    rows = [answer(text, question=text, gold=text, response=text, reason=text, level=text, workflow=text)
            for text in ATTACKS]
    path = report.write(run(tmp_path / "r", answers=rows, summary={text: text for text in ATTACKS}))
    tab = visit(path)
    for _ in ATTACKS:
        tab.wait_for_function("document.querySelector('#detail .turn')")
        tab.keyboard.press("j")
    assert tab.evaluate("document.scripts.length") == 2 + 2  # two of its own, two blocks of data
    assert not tab.query_selector_all("img, iframe, a, base, object, embed")


def test_a_click_on_a_curve_opens_the_groups_of_its_step(visit, tmp_path):
    tab = visit(grpo(tmp_path / "r"))
    box = tab.locator("#curves svg").first.bounding_box()
    tab.mouse.click(box["x"] + box["width"] - 6, box["y"] + box["height"] / 2)
    assert "step=3" in tab.url
    assert tab.locator("#count").inner_text().startswith("4 of 12 problems, 16 episodes")


def test_filters_search_and_order_are_kept_in_the_address(visit, tmp_path):
    path = grpo(tmp_path / "r")
    tab = visit(path)
    tab.click("#only-wrong")
    tab.fill("#q", "What is 3?")
    tab.select_option("#sort", "long")
    told = tab.locator("#count").inner_text()
    assert told.startswith("3 of 12 problems, 3 episodes")
    again = visit(path, "#" + tab.url.partition("#")[2])
    assert again.locator("#count").inner_text() == told and again.input_value("#q") == "What is 3?"


def test_an_episode_opens_by_its_address_and_the_keyboard_goes_on(visit, tmp_path):
    tab = visit(grpo(tmp_path / "r"), "#open=p13&at=1&n=2")
    assert tab.locator("#detail .verdict").inner_text().startswith("Right: answer 2")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("$('detail').textContent.includes('Wrong: answer 3')")
    tab.keyboard.press("k")
    tab.wait_for_function("document.querySelector('#detail .question').textContent === 'What is 2?'")
    assert tab.locator("#detail math").count()
    tab.keyboard.press("r")
    tab.wait_for_function("document.querySelector('#detail .turn').textContent.includes('\\\\boxed{0}')")
    assert not tab.locator("#detail math").count()
    tab.keyboard.press("c")
    tab.hover("#detail .tokens span:nth-child(2)")
    assert "log-prob -2.5" in tab.locator(".readout").inner_text()
    assert "ratio 1.105" in tab.locator(".readout").inner_text()


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_the_page_without_a_scroll_to_the_side(visit, tmp_path, dark):
    for hash in ("", "#open=p13&at=1&n=2&side=1&color=ratio"):
        tab = visit(grpo(tmp_path / f"r{len(hash)}"), hash, width=375, dark=dark)
        assert tab.evaluate("document.documentElement.scrollWidth") == 375
        light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, light[4:-1].split(","))) < 200) == dark


def test_details_beside_the_page_are_read_and_searched_from_disk(visit, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 1000)
    rows = [answer(f"p{n}", response=f"needle {n}." + "x" * 50) for n in range(600)]
    tab = visit(report.write(run(tmp_path / "r", answers=rows)), "#open=p599&at=&n=0")
    tab.wait_for_function("document.querySelector('#detail .said')")
    tab.fill("#q", "needle 300.")
    tab.wait_for_function("document.getElementById('count').textContent.startsWith('1 of 600')")


def test_runs_are_read_side_by_side(visit, tmp_path):
    a = run(tmp_path / "report-a", answers=[answer(str(n), n < 2) for n in range(4)])
    b = run(tmp_path / "report-b", answers=[answer(str(n), n < 3) for n in range(4)])
    tab = visit(report.compare([a, b], tmp_path / "report.html"), "#only=divided&side=1")
    assert tab.locator("#count").inner_text().startswith("1 of 4 problems")
    assert tab.locator("#detail h3").all_inner_texts() == ["report-a", "report-b"]
    assert tab.evaluate("run.tables[0].rows.map(row => row[0])") == ["report-a", "report-b"]
