"""The reward contract: every way in which peers' parsers are known to go wrong is a row here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rewards

E = "Emphysema"
GOOD = "<think>dark holes</think><answer>Emphysema</answer>"
# completion, format, validity, correctness (truth: Emphysema)
TABLE = [
    (GOOD, 1, 1, 1),
    ("<think>a</think><answer>Ground-glass opacity</answer>", 1, 1, 0),
    ("<think>a\nb\n</think>\n\n<answer>\nEmphysema\n</answer>", 1, 1, 1),  # newlines inside: DOTALL
    ("\n  " + GOOD + " \n", 1, 1, 1),  # outer whitespace
    ("<think>a</think><answer> EMPHYSEMA. </answer>", 1, 1, 1),  # case, spaces, one trailing period
    ("<think>a</think><answer>emphysema..</answer>", 1, 0, 0),  # only one period is dropped
    (
        "<think>a</think><answer>pleural   effusion/thickening</answer>",
        1,
        1,
        0,
    ),  # inner whitespace collapses
    ("<answer>Emphysema</answer>", 0, 1, 1),  # a direct answer: no format, yet valid and right
    ("Emphysema", 0, 0, 0),  # no tags
    ("<think>Emphysema</think>", 0, 0, 0),  # a class in the thinking is no answer
    ("<think>Emphysema</think><answer></answer>", 0, 0, 0),  # empty answer
    ("<think> </think><answer>Emphysema</answer>", 0, 1, 1),  # empty thinking
    ("<think></think><answer>Emphysema</answer>", 0, 1, 1),
    (
        "<think>a</think><answer>Emphysema or Ground-glass opacity</answer>",
        1,
        0,
        0,
    ),  # a list is no class
    ("<think>a</think><answer>" + "; ".join(rewards.CLASSES) + "</answer>", 1, 0, 0),  # all classes
    ("<think>a</think><answer>It is Emphysema</answer>", 1, 0, 0),  # a sentence
    ("<think>a</think><answer>Emphysem</answer>", 1, 0, 0),  # no fuzzy match
    ("<think>a</think><answer>Emphysema</answer><answer>Emphysema</answer>", 0, 0, 0),  # two pairs
    ("<think>a</think><think>b</think><answer>Emphysema</answer>", 0, 1, 1),
    ("<think>a<think>b</think></think><answer>Emphysema</answer>", 0, 1, 1),  # nested
    ("<think>a</think><answer><answer>Emphysema</answer></answer>", 0, 0, 0),
    ("<think>a<answer>Emphysema</answer></think>", 0, 1, 1),  # the answer inside the thinking
    ("<think>a</think><answer>Emphysema", 0, 0, 0),  # truncated
    ("<think>a<answer>Emphysema</answer>", 0, 1, 1),  # the thinking never closed
    ("x" + GOOD, 0, 1, 1),  # something before, between, after
    ("<think>a</think> so <answer>Emphysema</answer>", 0, 1, 1),
    (GOOD + "!", 0, 1, 1),
    ("<answer>Emphysema</answer><think>a</think>", 0, 1, 1),  # order
    ("</answer>Emphysema<answer>", 0, 0, 0),
    ("<Think>a</Think><Answer>Emphysema</Answer>", 0, 0, 0),  # tags are lower case
    ("", 0, 0, 0),
]

# The same under the direct prompt, whose format is the answer pair alone.
DIRECT = [
    ("<answer>Emphysema</answer>", 1, 1, 1),
    ("\n <answer> emphysema. </answer>\t\n", 1, 1, 1),  # whitespace, outer and inner
    ("<answer>Fibrosis-related changes</answer>", 1, 1, 0),
    ("<answer>it\nis\nEmphysema</answer>", 1, 0, 0),  # newlines inside: DOTALL
    ("<answer></answer>", 0, 0, 0),  # an empty pair
    ("<answer> \n </answer>", 0, 0, 0),
    (GOOD, 0, 1, 1),  # it should not have reasoned
    ("<think></think><answer>Emphysema</answer>", 0, 1, 1),
    ("</think>\n\n<answer>Emphysema</answer>", 0, 1, 1),
    ("<answer>Emphysema</answer><think>", 0, 1, 1),
    ("<think><answer>Emphysema</answer></think>", 0, 1, 1),
    ("<answer><think>a</think>Emphysema</answer>", 0, 0, 0),  # think tags inside
    ("<answer>Emphysema</think></answer>", 0, 0, 0),
    ("It is <answer>Emphysema</answer>", 0, 1, 1),  # text outside of the pair
    ("<answer>Emphysema</answer>.", 0, 1, 1),
    ("<answer>Emphysema</answer>\0", 0, 1, 1),
    ("<answer>Emphysema</answer><answer>Emphysema</answer>", 0, 0, 0),  # two pairs
    ("<answer>Emphysema</answer>\n<answer></answer>", 0, 0, 0),
    ("<answer><answer>Emphysema</answer></answer>", 0, 0, 0),  # nested
    ("<answer><answer>Emphysema</answer>", 0, 0, 0),
    ("<answer>Emphysema</answer></answer>", 0, 0, 0),
    ("<answer>Emphysema", 0, 0, 0),  # truncated
    ("</answer>Emphysema<answer>", 0, 0, 0),
    ("<Answer>Emphysema</Answer>", 0, 0, 0),  # tags are lower case
    ("Emphysema", 0, 0, 0),
    ("", 0, 0, 0),
]


@pytest.mark.parametrize(("completion", "form", "valid", "right"), TABLE)
def test_table(completion, form, valid, right):
    got = rewards.reward(completion, E)
    assert (got.format, got.validity, got.correctness) == (form, valid, right)
    assert got.total == form + valid + 2 * right
    assert got == rewards.reward(completion, E, mode="think")


@pytest.mark.parametrize(("completion", "form", "valid", "right"), DIRECT)
def test_direct_table(completion, form, valid, right):
    got = rewards.reward(completion, E, mode="direct")
    assert (got.format, got.validity, got.correctness) == (form, valid, right)
    assert got.total == form + valid + 2 * right
    assert rewards.format_reward(completion, "direct") == form


def test_weights_and_bad_label():
    assert rewards.reward(GOOD, E, (0.5, 0.25, 3)).total == 3.75
    with pytest.raises(ValueError, match="not one of the classes"):
        rewards.reward(GOOD, "emphysema")
    with pytest.raises(KeyError):
        rewards.reward(GOOD, E, mode="other")


def test_prompts_name_every_class_once():
    for mode in rewards.MODES:
        text = rewards.prompt(rewards.QUESTION, mode)
        assert all(text.count(name) == 1 for name in rewards.CLASSES)
    with pytest.raises(KeyError):
        rewards.prompt(rewards.QUESTION, "other")


TAGS = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "Emphysema", " ", "\n", ".", "a"]
)


@given(st.lists(TAGS, max_size=10).map("".join) | st.text(max_size=40))
def test_parser_properties(text):
    got = rewards.reward(text, E)
    assert got.correctness <= got.validity and (got.predicted in rewards.CLASSES) == bool(
        got.validity
    )
    assert rewards.reward(f"\n{text} ", E) == got  # outer whitespace never matters
    if got.format:
        assert all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    direct = rewards.reward(text, E, mode="direct")
    assert (direct.predicted, direct.correctness) == (got.predicted, got.correctness)
    assert got.format + direct.format <= 1  # no text is in both formats
    if direct.format:
        assert [text.count(tag) for tag in ("<answer>", "</answer>", "think>")] == [1, 1, 0]


@given(st.sampled_from(rewards.CLASSES))
def test_target_is_read_back(label):
    assert rewards.reward(rewards.target(label), label, mode="direct").total == 4
