"""A run's page in a real browser: Debian's chromium, driven by playwright (make test-browser). Skipped where
one is missing. docs/photograph.py takes the pictures of the README.

Every page is opened from disk. `visit` fails a test on any message in the console, on any dialog, and on any
request that leaves the folder of the run.
"""

import argparse
import json
import os
import random
import shutil
import time

import pytest
from test_report import ATTACKS, METRICS, answer, run

from slm import report
from slm.report import __main__ as watching
from slm.report import page

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no chromium here")]
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


def address(tab):
    """The hash as the page has it now; tab.url hears of a change some time later."""
    return tab.evaluate("location.hash")


def wait_until(tab, condition):
    """tab.wait_for_function evaluates text inside the page, which its policy forbids."""
    for _ in range(1500):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(20)
    raise AssertionError(f"never came true: {condition}")


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
        wait_until(tab, "document.querySelector('#detail .turn')")
        tab.keyboard.press("j")
    assert tab.evaluate("document.scripts.length") == 2 + 2  # two of its own, two blocks of data
    assert not tab.query_selector_all("img, iframe, a, base, object, embed")


def test_a_click_on_a_curve_opens_the_groups_of_its_step(visit, tmp_path):
    tab = visit(grpo(tmp_path / "r"))
    box = tab.locator("#curves svg").first.bounding_box()
    tab.mouse.click(box["x"] + box["width"] - 6, box["y"] + box["height"] / 2)
    assert "step=3" in address(tab)
    assert tab.locator("#count").inner_text().startswith("4 of 12 problems, 16 episodes")


def test_filters_search_and_order_are_kept_in_the_address(visit, tmp_path):
    path = grpo(tmp_path / "r")
    tab = visit(path)
    tab.click("#only-wrong")
    tab.fill("#q", "What is 3?")
    tab.select_option("#sort", "long")
    told = tab.locator("#count").inner_text()
    assert told.startswith("3 of 12 problems, 3 episodes")
    again = visit(path, address(tab))
    assert again.locator("#count").inner_text() == told and again.input_value("#q") == "What is 3?"


def test_an_episode_opens_by_its_address_and_the_keyboard_goes_on(visit, tmp_path):
    tab = visit(grpo(tmp_path / "r"), "#open=p13&at=1&n=2")
    assert tab.locator("#detail .verdict").inner_text().startswith("Right: answer 2")
    tab.keyboard.press("ArrowRight")
    wait_until(tab, "$('detail').textContent.includes('Wrong: answer 3')")
    tab.keyboard.press("k")
    wait_until(tab, "document.querySelector('#detail .question').textContent === 'What is 2?'")
    assert tab.locator("#detail math").count()
    tab.keyboard.press("r")
    wait_until(tab, "document.querySelector('#detail .turn').textContent.includes('\\\\boxed{0}')")
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
    wait_until(tab, "document.querySelector('#detail .said')")
    tab.fill("#q", "needle 300.")
    wait_until(tab, "document.getElementById('count').textContent.startsWith('1 of 600')")


def test_runs_are_read_side_by_side(visit, tmp_path):
    a = run(tmp_path / "report-a", answers=[answer(str(n), n < 2) for n in range(4)])
    b = run(tmp_path / "report-b", answers=[answer(str(n), n < 3) for n in range(4)])
    tab = visit(report.compare([a, b], tmp_path / "report.html"), "#only=divided&side=1")
    assert tab.locator("#count").inner_text().startswith("1 of 4 problems")
    assert tab.locator("#detail h3").all_inner_texts() == ["report-a", "report-b"]
    assert tab.evaluate("run.tables[0].rows.map(row => row[0])") == ["report-a", "report-b"]


def test_an_agents_page_counts_what_a_workflow_improved_and_one_click_lists_it(visit, tmp_path):
    rows = [answer(str(n), n % 2 == 0, first_correct=n % 4 < 2, first_answer="7", workflow="checker")
            for n in range(12)]  # 0, 4, 8 stay right; 1, 5, 9 get lost; 2, 6, 10 are mended
    rows += [row | {"workflow": "voter", "correct": True, "first_correct": True} for row in rows]
    tab = visit(report.write(run(tmp_path / "r", episodes=rows, table={})))
    assert tab.locator("tbody tr").first.inner_text().split("\t")[4:6] == ["3 (25.0 %)", "3 (25.0 %)"]
    chips = tab.locator("#chips button").all_inner_texts()
    assert chips == ["right 18", "wrong 6", "divided 6", "improved 3", "degraded 3"]
    tab.click("#only-degraded")
    assert tab.locator("#count").inner_text().startswith("3 of 12 problems, 3 episodes")
    listed = tab.locator("#rows .row p:first-child").all_inner_texts()
    assert listed == ["What is 1?", "What is 5?", "What is 9?"]


def test_10552_episodes_are_drawn_in_2_s_and_filtered_in_200_ms(visit, tmp_path):
    words = "so we add three apples to the other seven and then divide by two therefore it is".split()
    random.seed(0)
    talk = " ".join(random.choices(words, k=20_000))
    rows = [answer(f"p{n}", random.random() < 0.6, sample=k, response=talk[random.randrange(90_000):][:1200])
            for n in range(1319) for k in range(8)]
    path = report.write(run(tmp_path / "r", answers=rows))
    drawn = []
    while len(drawn) < 5 and min(drawn, default=2000) >= 2000:  # a busy machine gets five tries
        tab = visit(path)
        drawn.append(max(tab.evaluate("performance.getEntriesByType('paint').map(x => x.startTime)")))
    assert min(drawn) < 2000
    wait_until(tab, "unpacked === 10552")
    clicks = ["{only: 'wrong'}", "{only: 'wrong.divided'}", "{q: 'therefore it is so'}", "{q: 'there'}",
              "{q: '', only: '', sort: 'hardest'}"]
    took = """change => { const start = performance.now(); go(change); document.body.offsetHeight;
                          return performance.now() - start; }"""
    for click in clicks:
        times = []
        while len(times) < 5 and min(times, default=200) >= 200:
            tab.evaluate("go({q: '', only: '', sort: 'order'})")
            times.append(tab.evaluate(f"({took})({click})"))
        assert min(times) < 200, click
    assert tab.locator("#count").inner_text() == "1,319 of 1,319 problems, 10,552 episodes"


def test_a_print_shows_the_figures_and_the_episode_that_is_read_and_no_controls(visit, tmp_path):
    tab = visit(grpo(tmp_path / "r"), "#open=p13&at=1&n=2", dark=True)
    tab.wait_for_selector("#detail .verdict")
    tab.emulate_media(media="print")
    for part in ("h1", "#curves svg", "#detail .question", "#detail .verdict", "#detail .turn"):
        assert tab.locator(part).first.is_visible(), part
    for part in ("#nav", "#bar", "#list", ".keys", "#detail .place button", "#detail .colors", "#meta label"):
        assert not tab.locator(part).first.is_visible(), part
    assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(31, 32, 35)"  # dark ink
    assert tab.pdf().startswith(b"%PDF")


def test_watch_writes_the_page_again_when_the_run_grew(visit, tmp_path, monkeypatch):
    folder = run(tmp_path / "r", answers=[answer("1")])
    tabs = []

    def nap(_):
        if tabs:
            raise KeyboardInterrupt
        tabs.append(visit(folder / "report.html"))
        assert tabs[0].locator("#count").inner_text().startswith("1 of 1 problems")
        with (folder / "answers.jsonl").open("a") as log:
            log.write(json.dumps(answer("2")) + "\n")
        os.utime(folder / "report.html", (0, 0))  # both may be written within one tick of the clock

    monkeypatch.setattr(time, "sleep", nap)
    with pytest.raises(KeyboardInterrupt):
        watching.main(argparse.Namespace(runs=[str(folder)], out=None, watch=True))
    tabs[0].reload()
    tabs[0].wait_for_selector("body[data-ready]")
    assert tabs[0].locator("#count").inner_text().startswith("2 of 2 problems")


def test_seeds_of_one_run_share_a_curve_with_a_band(visit, tmp_path):
    runs = [run(tmp_path / f"seed-{seed}", {"algorithm": "grpo", "seed": seed}, metrics=[
        {**row, "reward": row["reward"] + seed / 10} for row in METRICS]) for seed in range(3)]
    tab = visit(report.compare(runs, tmp_path / "report.html"))
    panel = tab.locator(".panel").filter(has_text="reward").first
    assert panel.locator(".smooth").count() == 1
    band, curve = (panel.locator(part).bounding_box() for part in (".band", ".raw"))
    assert band["y"] < curve["y"] and band["y"] + band["height"] > curve["y"] + curve["height"]
