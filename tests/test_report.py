"""report.html in a real browser: its own script alone runs, nothing leaves, every control works.

Headless Chromium is driven through its DevTools pipe (one JSON message at a time, ended by a zero
byte), so no driver package is needed. Without Chromium on the PATH these tests are skipped.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from collections import Counter
from itertools import count, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewards import CLASSES
from support import report
from support.files import BadInput
from support.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WITHOUT = "no chromium or google-chrome on the PATH"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)

PWN = "document.title = 'pwned'"
HOSTILE = f'</script><script>{PWN}</script><img src=x onerror="{PWN}"> --> <!-- <script> '
HOSTILE += "\u2028\u2029 ' \" ` \\ & &lt; ${1} {{data}} ]]> "
HOSTILE += f'<svg onload="{PWN}"> \ud800 \0 Öl'
MODELS, MODES = ("base", "sft", "grpo"), ("direct", "think")
CHOOSE = """wanted => {
    const form = document.forms[0];
    for (const control of form.elements)
        if (control.name) control.value = wanted[control.name] ?? "";
    form.elements.truth.dispatchEvent(new Event("input", {bubbles: true}));
    return document.getElementById("count").textContent;
}"""


class Browser:
    """One headless Chromium and one tab of it; every event of the tab is kept in `events`."""

    def __init__(self, profile):
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        # The shell puts our ends where Chromium expects them: it reads commands from 3 and
        # writes answers to 4.
        start = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", CHROMIUM]
        start += "--headless --no-sandbox --remote-debugging-pipe --disable-gpu".split()
        start += "--disable-dev-shm-usage --no-first-run".split()
        start += ["--disable-background-networking", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(start, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        # A browser that hangs fails the tests, and no more.
        self.patience = threading.Timer(300, self.process.kill)
        self.patience.start()
        self.input, self.numbers = os.fdopen(self.read, "rb"), count(1)
        self.events, self.session = [], {}
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
        """The value of an expression in the page.

        Commands are not bound by the page's policy; its own code is.
        """
        options = {"returnByValue": True, "awaitPromise": True}
        done = self("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def choose(self, **wanted):
        """Sets the filters as a person would, those not named to all.

        Returns the line that counts the answers.
        """
        return self.js(f"({CHOOSE})({json.dumps(wanted)})")

    def all(self, selector, get):
        """`get`, a JavaScript function, of all elements that a selector finds."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map({get})")

    def texts(self, selector):
        return self.all(selector, "element => element.textContent")

    def complaints(self):
        """Uncaught exceptions, console messages, and the browser's own log.

        The log tells of violations of the page's policy and of failed loads.
        """
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in kinds]

    def requests(self):
        """Addresses that the page asked for, but for pictures that it holds itself."""
        asked = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        addresses = [event["params"]["request"]["url"] for event in asked]
        return [address for address in addresses if not address.startswith("data:")]

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
    """Answers of three models under two prompts: each fifth invalid, each third other wrong."""
    images = [folder / f"{i}.png" for i in range(min(slices, 40))]
    for i, image in enumerate(images):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (56, 56), np.uint8)).save(image)
    cases = []
    for i, model, mode in product(range(slices), MODELS, MODES):
        truth, n = CLASSES[i % 7], len(cases)
        answer = None if n % 5 == 0 else CLASSES[(i + 1) % 7] if n % 3 == 0 else truth
        thinking = f"Shadow number {n}." if mode == "think" else ""
        text = f"<think>{thinking}</think><answer>{answer}</answer>" if thinking else str(answer)
        case = {"image": images[i % 40], "id": f"slice{i}", "model": model, "mode": mode}
        case |= {"prompt": f"Which abnormality? ({mode})", "text": text, "thinking": thinking}
        case |= {"label": truth, "predicted": answer, "correctness": float(answer == truth)}
        case |= {"format": float(mode == "think"), "validity": float(answer is not None)}
        cases.append(case)
    return cases


@pytest.fixture
def parts(tmp_path):
    """The arguments of write_report for a small, complete report."""
    Image.new("RGB", (90, 60), "white").save(tmp_path / "confusion.png")
    rows = [["model", "accuracy % (95 % interval)", "invalid %"]]
    rows += [["sft", "48.5 (44.1 to 52.9)", "0.2"]]
    figures = {"Confusion matrix": tmp_path / "confusion.png"}
    parts = {"title": "Evaluation", "tables": [("Table 1", "n = 40", rows)], "figures": figures}
    return {**parts, "cases": make_cases(tmp_path)}


def outcome(case):
    if case["predicted"] is None:
        return "invalid"
    return "right" if case["correctness"] else "wrong"


def counted(cases):
    """The line that the page should show above these cases."""
    kinds = Counter(outcome(case) for case in cases)
    numbers = [f"{kinds[kind]:,} {kind}" for kind in ("right", "wrong", "invalid")]
    slices = len({case["id"] for case in cases})
    answers = f"{len(cases):,} answer{'' if len(cases) == 1 else 's'}"
    return f"{answers} on {slices:,} slice{'' if slices == 1 else 's'}: {', '.join(numbers)}"


@needs_browser
def test_everything_is_on_the_page_and_nothing_else_is_asked_for(browser, parts, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, **parts)
    browser.open(path)
    assert browser.complaints() == [] and browser.requests() == [path.as_uri()]
    assert browser.texts("header nav a") == ["Results", "Figures", "Cases"]
    overview = "40 test slices · 3 models · 2 prompt forms"
    assert browser.texts("#overview") == [overview]
    assert browser.texts("#results :is(th, td)") == sum(parts["tables"][0][2], [])
    assert browser.js("[...document.images].every(image => !image.src || image.naturalWidth > 0)")
    assert browser.js("document.querySelector('#figures img').naturalWidth") == 90
    without = [case["text"] for case in parts["cases"][:6] if not case["predicted"]]
    assert browser.texts("article:first-child dd.writes") == without


@needs_browser
def test_filters_leave_exactly_the_answers_asked_for(browser, parts, tmp_path):
    cases = parts["cases"]
    write_report(tmp_path / "report.html", **parts)
    browser.open(tmp_path / "report.html")
    assert browser.texts("#count") == [counted(cases)]
    facets = {
        "truth": lambda c: c["label"],
        "answer": lambda c: c["predicted"] or "(no class)",
        "outcome": outcome,
        "mode": lambda c: c["mode"],
        "model": lambda c: c["model"],
    }
    for facet, value_of in facets.items():
        for value in {value_of(case) for case in cases}:
            left = [case for case in cases if value_of(case) == value]
            assert browser.choose(**{facet: value}) == counted(left)
    wanted = {"truth": CLASSES[2], "outcome": "wrong", "mode": "think", "model": "sft"}
    left = cases
    for facet, value in wanted.items():
        left = [case for case in left if facets[facet](case) == value]
    assert left and browser.choose(**wanted) == counted(left)
    assert browser.texts("dd.thinks") == [c["thinking"] for c in left]
    assert browser.texts("dd.answers") == [c["predicted"] for c in left]
    assert browser.texts(".truth") == ["Truth: " + c["label"] for c in left]
    reward = "format\xa01 · validity\xa01 · correctness\xa00"
    assert browser.texts("dd.reward") == [reward] * len(left)
    assert browser.texts("pre") == sum([[c["prompt"], c["text"]] for c in left], [])
    assert browser.choose(search="SHADOW NUMBER 7.") == counted([cases[7]])
    none = "0 answers on 0 slices: 0 right, 0 wrong, 0 invalid"
    assert browser.choose(search="no such words") == none
    assert "sft (0)" in browser.texts("select[name=model] option")
    browser.choose(search="shadow number 7.", show="all")
    assert len(browser.texts(".answer")) == 6 and len(browser.texts(".answer.matches")) == 1
    browser.js("document.querySelector('[type=reset]').click()")
    browser.js("new Promise(done => setTimeout(done, 50))")
    assert browser.texts("#count") == [counted(cases)] and browser.complaints() == []


@needs_browser
def test_what_models_write_stays_text(browser, parts, tmp_path):
    keys = ("id", "model", "prompt", "text", "thinking", "label", "predicted", "mode", "patient")
    hostile = parts["cases"][1] | dict.fromkeys((*keys, "judged"), HOSTILE)
    title = HOSTILE.replace("\ud800", "").replace("\0", "")  # which no HTML file can hold
    parts["title"] = title
    parts["tables"] = [(HOSTILE, HOSTILE, [["model", HOSTILE], [HOSTILE, "1.0"]])]
    parts["figures"] = {HOSTILE: parts["figures"]["Confusion matrix"]}
    parts["cases"] = [hostile, hostile | {"predicted": None, "correctness": 0.0}]
    path = tmp_path / "report.html"
    write_report(path, **parts)
    browser.open(path)
    assert browser.complaints() == [] and browser.requests() == [path.as_uri()]
    assert browser.texts("h1") == [title] and browser.js("document.title") != "pwned"
    assert browser.js("document.scripts.length") == 2
    assert browser.js("document.querySelectorAll('img[src=x], [onerror], [onload]').length") == 0
    selector = "#results :is(h3, p, tbody th), #figures figcaption, .slice .soft, dd.thinks, "
    same = f"element => element.textContent === {json.dumps(HOSTILE)}"
    assert browser.all(selector + "dd.writes, pre", same) == [True] * 11

    # That this test can fail: without the escapes the block ends early, and only the policy
    # stands in the way.
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
    assert browser.choose(model="grpo") == counted(grpo)
    assert browser.texts("#place") == ["page 1 of 21"]


@needs_browser
def test_phone_and_dark_mode(browser, parts, tmp_path):
    write_report(tmp_path / "report.html", **parts)
    phone = {"width": 360, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    browser("Emulation.setDeviceMetricsOverride", **phone)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser("Emulation.setEmulatedMedia", features=[dark])
    browser.open(tmp_path / "report.html")
    # Wide tables scroll in their own frames.
    assert browser.js("document.documentElement.scrollWidth") <= 360
    style = "getComputedStyle(document.body)"
    colours = browser.js(f"{style}.color + {style}.backgroundColor")
    ink, ground = np.array(re.findall(r"\d+", colours), int).reshape(2, 3)
    assert ink.min() > 200 and ground.max() < 50
    browser("Emulation.clearDeviceMetricsOverride")
    browser("Emulation.setEmulatedMedia", features=[])


def block(path):
    """The data block of a page."""
    return json.loads(re.search(r'type="application/json">(.*?)</script>', path.read_text())[1])


def test_a_page_too_large_keeps_an_even_selection_of_slices_and_says_so(
    parts, tmp_path, monkeypatch
):
    write_report(tmp_path / "report.html", **parts)
    whole = block(tmp_path / "report.html")
    assert len(whole["cases"]) == 240
    assert len(whole["pictures"]) == 40 and len(whole["prompts"]) == 2
    monkeypatch.setattr(report, "BUDGET", len(whole["pictures"][0]) * 16)
    write_report(tmp_path / "report.html", **parts)
    small = block(tmp_path / "report.html")
    kept = [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]
    assert len(small["cases"]) == 6 * 16
    names = [case["id"].removeprefix("slice") for case in small["cases"][::6]]
    assert list(map(int, names)) == kept
    assert small["pictures"] == [whole["pictures"][i] for i in kept] and small["total"] == 40


@pytest.mark.parametrize("fault", ["picture", "figure"])
def test_what_cannot_be_read_is_named_and_no_page_is_left(parts, tmp_path, fault):
    if fault == "picture":
        named = parts["cases"][60]["image"]
        named.write_bytes(b"no picture")
    else:
        named = parts["figures"]["Confusion matrix"]
        named.unlink()
    with pytest.raises(BadInput, match=re.escape(str(named))):
        write_report(tmp_path / "out" / "report.html", **parts)
    assert not (tmp_path / "out").exists()
