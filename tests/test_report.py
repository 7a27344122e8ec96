"""report.html in a real browser: only the page's own script runs, nothing leaves, and every control does its work.

Headless Chromium is driven through its DevTools pipe (one JSON message at a time, ended by a zero byte), so no driver
package is needed. Without Chromium on the PATH these tests are skipped.
"""

import json
import math
import os
import re
import shutil
import subprocess
import threading
from itertools import count, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewards import CLASSES
from support import report
from support.files import BadInput
from support.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")

HOSTILE = (
    "</script><script>document.title = 'pwned'</script><img src=x onerror=\"document.title = 'pwned'\"> --> <!-- "
    "<script> \u2028\u2029 ' \" ` \\ & &lt; ${1} {{data}} ]]> <svg onload=\"document.title = 'pwned'\"> \ud800 \0 Öl"
)
MODELS, MODES = ("base", "sft", "grpo"), ("direct", "think")


class Browser:
    """One headless Chromium and one tab of it; every event of the tab is kept in `events`."""

    def __init__(self, profile):
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        # The shell puts our ends where Chromium expects them: it reads commands from 3 and writes answers to 4.
        start = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", CHROMIUM, "--headless", "--no-sandbox",
                 "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage",
                 "--no-first-run", "--disable-background-networking",
                 f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        self.process = subprocess.Popen(start, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.patience = threading.Timer(300, self.process.kill)  # a browser that hangs fails the tests, and no more
        self.patience.start()
        self.input, self.numbers, self.events, self.session = os.fdopen(self.read, "rb"), count(1), [], {}
        page = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def _message(self):
        text = bytearray()
        while (byte := self.input.read(1)) != b"\0":
            assert byte, "Chromium ended"
            text += byte
        return json.loads(text)

    def __call__(self, method, **parameters):
        """The result of one DevTools command; events that come before it are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters, **self.session}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, address):
        """Loads a page to its end; `events` then holds that page's alone."""
        self.events.clear()
        self("Page.navigate", url=Path(address).as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def js(self, expression):
        """The value of an expression in the page. Commands are not bound by the page's policy; its own code is."""
        done = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def choose(self, **wanted):
        """Sets the filters as a person would, those not named to all, and returns the line that counts the answers."""
        return self.js(
            f"""(() => {{
            const wanted = {json.dumps(wanted)}, form = document.forms[0];
            for (const control of form.elements) if (control.name) control.value = wanted[control.name] ?? "";
            form.elements.truth.dispatchEvent(new Event("input", {{bubbles: true}}));
            return document.getElementById("count").textContent;
        }})()"""
        )

    def texts(self, selector):
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map(element => element.textContent)")

    def complaints(self):
        """Uncaught exceptions, console messages, and the browser's own log (policy violations, failed loads)."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in kinds]

    def requests(self):
        """Addresses that the page asked for, but for pictures that it holds itself."""
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith("data:")]

    def close(self):
        self.patience.cancel()
        self.process.terminate()
        self.process.wait(20)
        self.input.close()
        os.close(self.write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def make_cases(folder, slices=40):
    """Answers of three models under two prompt forms: every fifth invalid, of the others every third wrong."""
    images = [folder / f"{i}.png" for i in range(min(slices, 40))]
    for i, image in enumerate(images):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (56, 56), np.uint8)).save(image)
    cases = []
    for i, model, mode in product(range(slices), MODELS, MODES):
        truth, n = CLASSES[i % 7], len(cases)
        answer = None if n % 5 == 0 else CLASSES[(i + 1) % 7] if n % 3 == 0 else truth
        thinking = f"Shadow number {n}." if mode == "think" else ""
        text = f"<think>{thinking}</think><answer>{answer}</answer>" if thinking else str(answer)
        cases.append({"image": images[i % 40], "model": model, "mode": mode, "id": f"slice{i}", "truth": truth,
                      "prompt": f"Which abnormality? ({mode})", "text": text, "thinking": thinking, "answer": answer,
                      "correct": answer == truth, "rewards": {"format": float(mode == "think"),
                      "validity": float(answer is not None), "correctness": float(answer == truth)}})  # fmt: skip
    return cases


def make_run(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def parts(tmp_path):
    """The arguments of write_report for a small, complete report."""
    losses = [{"step": i, "loss": 2.0 - 0.01 * i, "grad_norm": math.nan if i < 5 else 0.5} for i in range(1, 31)]
    rewards = [{"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.75}]
    logs = {"sft": losses, "seed1/sft": losses[:20], "grpo": rewards}
    runs = [make_run(tmp_path / "runs" / name, rows) for name, rows in logs.items()]
    Image.new("RGB", (90, 60), "white").save(tmp_path / "confusion.png")
    table = [["model", "accuracy % (95 % interval)", "invalid %"], ["sft", "48.5 (44.1 to 52.9)", "0.2"]]
    return {"title": "Evaluation", "tables": [("Table 1", "n = 40", table)], "runs": runs,
            "figures": [("Confusion matrix", tmp_path / "confusion.png")], "cases": make_cases(tmp_path)}  # fmt: skip


def outcome(case):
    return "right" if case["correct"] else "wrong" if case["answer"] else "invalid"


def counted(cases):
    """The line that the page should show above these cases."""
    numbers = ", ".join(f"{sum(outcome(c) == kind for c in cases):,} {kind}" for kind in ("right", "wrong", "invalid"))
    slices, s = len({c["id"] for c in cases}), "" if len(cases) == 1 else "s"
    return f"{len(cases):,} answer{s} on {slices:,} slice{'' if slices == 1 else 's'}: {numbers}"


@needs_browser
def test_everything_is_on_the_page_and_nothing_else_is_asked_for(browser, parts, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, **parts)
    browser.open(path)
    assert browser.complaints() == [] and browser.requests() == [path.as_uri()]
    assert browser.texts("header nav a") == ["Results", "Training", "Figures", "Cases"]
    assert browser.texts("#overview") == ["40 test slices · 3 models · 2 prompt forms · 3 training runs"]
    assert browser.texts("#results :is(th, td)") == sum(parts["tables"][0][2], [])
    assert browser.js("[...document.images].every(image => !image.src || image.naturalWidth > 0)")
    assert browser.js("document.querySelector('#figures img').naturalWidth") == 90
    assert browser.texts("article:first-child dd.writes") == [c["text"] for c in parts["cases"][:6] if not c["answer"]]


@needs_browser
def test_curves_show_the_runs_of_a_stage_together_with_their_running_means(browser, parts, tmp_path):
    write_report(tmp_path / "report.html", **parts)
    browser.open(tmp_path / "report.html")
    assert browser.texts("#training h3") == ["loss", "grad norm", "reward"]
    assert browser.texts(".legend label") == ["sft", "seed1/sft", "grpo"]
    means = [np.mean([2.0 - 0.01 * i for i in range(end - 9, end + 1)]) for end in (30, 20)]  # 1.755 and 1.855
    shown = [float(text) for text in browser.texts("#training figure:first-child b")]  # loss of two runs, then reward
    assert np.allclose(shown, [*means, 0.5], rtol=0.005)
    pale = browser.js("[...document.querySelectorAll('.raw')].map(path => path.getAttribute('d').split('L').length)")
    assert pale == [30, 20, 26, 16, 2]  # what is not finite is a gap, not a point
    point = "{const svg = document.querySelector('svg'), box = svg.getBoundingClientRect();"
    point += "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2}))}"
    browser.js(point)
    step = int(re.match(r"step (\d+)", browser.texts("#training output")[0])[1])  # of 1 to 30, near the middle
    read = [float(text.split()[0]) for text in browser.texts("#training figure:first-child b")[:2]]
    assert 13 <= step <= 16 and np.allclose(read, 2.0 - 0.01 * step, rtol=0.005)
    browser.js("document.querySelector('.legend input').click()")
    assert len(browser.texts("#training figure:first-child b")) == 2 and browser.complaints() == []


@needs_browser
def test_filters_leave_exactly_the_answers_asked_for(browser, parts, tmp_path):
    cases = parts["cases"]
    write_report(tmp_path / "report.html", **parts)
    browser.open(tmp_path / "report.html")
    assert browser.texts("#count") == [counted(cases)]
    facets = {"truth": lambda c: c["truth"], "answer": lambda c: c["answer"] or "(no class)", "outcome": outcome,
              "mode": lambda c: c["mode"], "model": lambda c: c["model"]}  # fmt: skip
    for facet, value_of in facets.items():
        for value in {value_of(case) for case in cases}:
            assert browser.choose(**{facet: value}) == counted([c for c in cases if value_of(c) == value])
    wanted = {"truth": CLASSES[2], "outcome": "wrong", "mode": "think", "model": "sft"}
    left = [c for c in cases if all(facets[facet](c) == value for facet, value in wanted.items())]
    assert left and browser.choose(**wanted) == counted(left)
    assert browser.texts("dd.thinks") == [c["thinking"] for c in left]
    assert browser.texts("dd.answers") == [c["answer"] for c in left]
    assert browser.texts(".truth") == ["Truth: " + c["truth"] for c in left]
    assert browser.texts("dd.reward") == ["format\xa01 · validity\xa01 · correctness\xa00"] * len(left)
    assert browser.texts("pre") == sum([[c["prompt"], c["text"]] for c in left], [])
    assert browser.choose(search="SHADOW NUMBER 7.") == counted([cases[7]])
    assert browser.choose(search="no such words") == "0 answers on 0 slices: 0 right, 0 wrong, 0 invalid"
    assert "sft (0)" in browser.texts("select[name=model] option")
    browser.choose(search="shadow number 7.", show="all")
    assert len(browser.texts(".answer")) == 6 and len(browser.texts(".answer.matches")) == 1
    browser.js("document.querySelector('[type=reset]').click(); new Promise(done => setTimeout(done, 50))")
    assert browser.texts("#count") == [counted(cases)] and browser.complaints() == []


@needs_browser
def test_what_models_write_stays_text(browser, parts, tmp_path):
    hostile = parts["cases"][1] | {key: HOSTILE for key in ("id", "model", "prompt", "text", "thinking")}
    parts["title"] = title = HOSTILE.replace("\ud800", "").replace("\0", "")  # which no HTML file can hold
    parts["tables"] = [(HOSTILE, HOSTILE, [["model", HOSTILE], [HOSTILE, "1.0"]])]
    parts["figures"] = [(HOSTILE, parts["figures"][0][1])]
    parts["cases"] = [hostile, hostile | {"answer": None, "correct": False}]
    path = tmp_path / "report.html"
    write_report(path, **parts)
    browser.open(path)
    assert browser.complaints() == [] and browser.requests() == [path.as_uri()]
    assert browser.texts("h1") == [title] and browser.js("document.title") != "pwned"
    assert browser.js("document.scripts.length") == 2
    assert browser.js("document.querySelectorAll('img[src=x], [onerror], [onload]').length") == 0
    selector = "#results :is(h3, p, tbody th), #figures figcaption, .slice .soft, dd.thinks, dd.writes, pre"
    whole = f"[...document.querySelectorAll('{selector}')].map(e => e.textContent === {json.dumps(HOSTILE)})"
    assert browser.js(whole) == [True] * 11

    # That this test can fail: without the escapes the block ends early, and only the policy stands in the way.
    page = path.read_text().replace("\\u003c", "<").replace("\\u003e", ">")
    path.write_text(page)
    browser.open(path)
    assert any("Content Security Policy" in str(event) for event in browser.complaints())
    assert browser.js("document.title") != "pwned"
    path.write_text(page.replace("Content-Security-Policy", "x-none"))
    browser.open(path)
    assert browser.js("document.title") == "pwned"


@needs_browser
def test_three_thousand_answers_are_paged_and_filtered(browser, parts, tmp_path):
    parts["cases"] = cases = make_cases(tmp_path, slices=500)
    write_report(tmp_path / "report.html", **parts)
    browser.open(tmp_path / "report.html")
    assert len(cases) == 3000 and browser.texts("#count") == [counted(cases)]
    seen = []
    for page in range(1, 22):
        assert browser.texts("#place") == [f"page {page} of 21"]
        seen += browser.texts(".slice .soft")
        assert browser.js("document.getElementById('next').disabled") == (page == 21)
        browser.js("document.getElementById('next').click()")
    assert seen == [f"slice{i}" for i in range(500)]  # each once
    grpo = [c for c in cases if c["model"] == "grpo"]
    assert browser.choose(model="grpo") == counted(grpo) and browser.texts("#place") == ["page 1 of 21"]


@needs_browser
def test_phone_and_dark_mode(browser, parts, tmp_path):
    write_report(tmp_path / "report.html", **parts)
    browser("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=2, mobile=True)
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.open(tmp_path / "report.html")
    assert browser.js("document.documentElement.scrollWidth") <= 360  # wide tables scroll in their own frames
    colours = browser.js("(({color, backgroundColor}) => color + backgroundColor)(getComputedStyle(document.body))")
    ink, ground = np.array(re.findall(r"\d+", colours), int).reshape(2, 3)
    assert ink.min() > 200 and ground.max() < 50
    browser("Emulation.clearDeviceMetricsOverride")
    browser("Emulation.setEmulatedMedia", features=[])


def block(path):
    """The data block of a page."""
    return json.loads(re.search(r'type="application/json">(.*?)</script>', path.read_text())[1])


def test_a_page_too_large_keeps_an_even_selection_of_slices_and_says_so(parts, tmp_path, monkeypatch):
    write_report(tmp_path / "report.html", **parts)
    whole = block(tmp_path / "report.html")
    assert len(whole["cases"]) == 240 and len(whole["pictures"]) == 40 and len(whole["prompts"]) == 2
    monkeypatch.setattr(report, "BUDGET", len(whole["pictures"][0]) * 16)
    write_report(tmp_path / "report.html", **parts)
    small = block(tmp_path / "report.html")
    kept = [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]
    assert [case["id"] for case in small["cases"][::6]] == [f"slice{i}" for i in kept] and len(small["cases"]) == 6 * 16
    assert small["pictures"] == [whole["pictures"][i] for i in kept] and small["total"] == 40


@pytest.mark.parametrize("fault", ["picture", "figure", "run", "step"])
def test_what_cannot_be_read_is_named_and_no_page_is_left(parts, tmp_path, fault):
    run = parts["runs"][0] / "metrics.jsonl"
    if fault == "picture":
        (named := parts["cases"][60]["image"]).write_bytes(b"no picture")
    elif fault == "figure":
        (named := parts["figures"][0][1]).unlink()
    elif fault == "run":
        (named := run).unlink()
    else:
        (named := run).write_text('{"loss": 1}\n')
    with pytest.raises(BadInput, match=re.escape(str(named))):
        write_report(tmp_path / "out" / "report.html", **parts)
    assert not (tmp_path / "out").exists()
