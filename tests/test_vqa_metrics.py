"""ChartQA's and TextVQA's metrics against values worked by hand, and the readers of their files."""

import json

import pytest
from PIL import Image

from support import vqa_metrics
from support.files import BadInput
from support.vqa_metrics import bare, normalise, read_questions, relaxed_accuracy, textvqa_accuracy


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("red", "red"),
        ("<answer> Red </answer>", "Red"),
        ("<think>It is blue, <answer>no</answer></think>\n<answer>red</answer>", "red"),
        ("<think>because</think>red", "red"),
        ("<think>never ends red", ""),
        ("because</think>red", "red"),  # the chat template had opened it
        ("<answer>cut off", "cut off"),
        ("red</answer>", "red"),
        ("<think>a\nb</think> <answer>1\n2</answer>", "1\n2"),
    ],
)
def test_tags_are_stripped(completion, answer):
    assert bare(completion) == answer


@pytest.mark.parametrize(
    ("prediction", "golds", "score"),
    [
        ("105", ["100"], 1),  # |105 - 100| / 100 = 0.05, the bound itself
        ("95", ["100"], 1),
        ("105.1", ["100"], 0),
        ("-95", ["-100"], 1),
        ("-100", ["100"], 0),
        ("12%", ["0.12"], 1),  # a percentage is divided by 100
        ("12%", ["12"], 0),
        ("0.124", ["12%"], 1),
        ("12 %", ["12%"], 1),
        ("0", ["0"], 1),  # a gold of zero is compared as text
        ("0.0", ["0"], 0),
        ("0.001", ["0"], 0),
        ("0%", ["0%"], 1),
        ("1,000", ["1000"], 0),  # a comma makes it text
        ("1,000", ["1,000"], 1),
        ("1e2", ["100"], 1),
        ("nan", ["NaN"], 1),  # text, not a number
        ("Yes", ["yes"], 1),
        ("Yes.", ["yes"], 0),
        ("light blue", ["blue"], 0),
        ("2010", ["Japan", "2011"], 1),  # the best over the golds
        ("", ["5"], 0),
    ],
)
def test_relaxed_accuracy(prediction, golds, score):
    assert relaxed_accuracy(prediction, golds) == score


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Red  Car", "red car"),
        ("a\nb\tc", "b c"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("Don't", "don't"),
        ("couldntve", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("its well", "its well"),  # words of their own
        ("1,200", "1200"),
        ("coca-cola", "coca cola"),  # between letters: a space
        ("coca- cola", "coca cola"),  # beside a space: gone
        ("1,200-meter", "1200meter"),  # with a number's comma in the text every mark goes
        ("yes!", "yes"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("st. john's", "st john's"),
        ("5.", "5"),
        ('"stop"', "stop"),
        ("the", ""),
    ],
)
def test_normal_form(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize("matching", range(11))
def test_ten_answers_are_averaged(matching):
    golds = ["Coca-Cola"] * matching + [f"other {i}" for i in range(10 - matching)]
    # k matches: k times min(1, (k - 1) / 3) and 10 - k times min(1, k / 3), over 10
    expected = {0: 0, 1: 0.3, 2: 0.6, 3: 0.9}.get(matching, 1)
    assert textvqa_accuracy("coca cola", golds) == pytest.approx(expected)


def test_exact_match_reads_the_normal_form():
    assert vqa_metrics.exact_match("Round.", ["round"]) == 1
    assert vqa_metrics.exact_match("round band", ["round"]) == 0


@pytest.fixture
def folder(tmp_path):
    for name in ("png/1.png", "train_images/abc.jpg", "own.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    return tmp_path


def write(path, value):
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, value)) if lines else json.dumps(value))
    return path


def test_readers_of_the_sets_own_files_and_of_jsonl(folder):
    record = {"imgname": "1.png", "query": "How many?", "label": "3"}
    chart = write(folder / "test_human.json", [record])
    expected = {"id": "test_human-1", "image": folder / "png" / "1.png", "part": "human"}
    expected |= {"question": "How many?", "answers": ["3"]}
    assert read_questions(chart) == [expected]
    ten = ["red"] * 10
    record = {"image_id": "abc", "question_id": 7, "question": "What?", "answers": ten}
    text = write(folder / "TextVQA_0.5.1_val.json", {"data": [record], "version": "0.5.1"})
    expected = {"id": "TextVQA_0.5.1_val-1", "image": folder / "train_images" / "abc.jpg"}
    expected |= {"question": "What?", "answers": ten, "part": None}
    assert read_questions(text, ten=True) == [expected]
    own = [
        {"image": "own.png", "question": "What\u2028now?", "answer": "red"},
        {"image": "own.png", "question": "And?", "answers": ["a", "b"], "part": "augmented"},
    ]
    read = read_questions(write(folder / "human_and_augmented.jsonl", own))
    assert [q["answers"] for q in read] == [["red"], ["a", "b"]]
    assert read[1]["part"] == "augmented" and read[0]["question"] == "What\u2028now?"


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"image": "../own.png", "question": "q", "answer": "a"}, "leads out"),
        ({"image": "/etc/passwd", "question": "q", "answer": "a"}, "leads out"),
        ({"image": "no.png", "question": "q", "answer": "a"}, "no picture"),
        ({"question": "q", "answer": "a"}, "'image'"),
        ({"image": 3, "question": "q", "answer": "a"}, "'image'"),
        ({"image": "own.png", "answer": "a"}, "'question'"),
        ({"image": "own.png", "question": "q"}, "'answers'"),
        ({"image": "own.png", "question": "q", "answer": 3}, "'answers'"),
        ({"image": "own.png", "question": "q", "answers": []}, "'answers'"),
        ("text", "not a JSON object"),
    ],
)
def test_a_bad_record_is_named(folder, record, field):
    good = {"image": "own.png", "question": "q", "answer": "a"}
    inner = folder / "set"
    inner.mkdir()
    Image.new("RGB", (40, 40)).save(inner / "own.png")
    with pytest.raises(BadInput, match=f"q.jsonl, record 2: .*{field}"):
        read_questions(write(inner / "q.jsonl", [good, record]))


@pytest.mark.parametrize("content", ["", "[]", "{}", "not JSON", "[" * 100_000, "\xff"])
def test_a_bad_file_is_named(tmp_path, content):
    (tmp_path / "q.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInput, match="q.json"):
        read_questions(tmp_path / "q.json")


def test_textvqa_needs_ten_answers(folder):
    record = {"image": "own.png", "question": "q", "answers": ["a"] * 9}
    with pytest.raises(BadInput, match="ten"):
        read_questions(write(folder / "q.jsonl", [record]), ten=True)
