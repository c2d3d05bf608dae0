"""A query's input among its shots: what counts as its very input, and what as a near-duplicate."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl.tasks.duplicates import MIN_JACCARD, Copies, CopyIndex, find_copies, split_words

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=12).map(" ".join)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = split_words(text)
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))} if words else set()


def jaccard(one: str, other: str) -> float:
    """Compare two texts as the module's docstring says, with Python's own sets."""
    mine, others = shingles(one), shingles(other)
    return len(mine & others) / len(mine | others) if mine | others else 0.0


def test_the_very_input_and_a_near_duplicate_are_told_apart():
    shots = ["the red fox runs", "THE RED FOX RUNS!", "a blue owl sleeps", "the red fox runs"]
    assert find_copies(["the red fox runs", "a cat"], shots=shots) == [Copies((0, 3), (1,)), Copies((), ())]


@given(text=st.text(st.characters(codec="ascii")))
def test_words_of_ascii_are_those_that_the_text_has_beside_other_letters(text):
    assert split_words(text) == split_words(text + " \u00e9")[:-1]


def test_one_word_of_twenty_changed_is_near_and_one_of_ten_is_not():
    # 20 words have 18 shingles; a changed last word changes one of them: 17 / 19 are shared.
    words = [f"w{letter}" for letter in "abcdefghijklmnopqrst"]
    near = " ".join([*words[:-1], "other"])
    assert jaccard(" ".join(words), near) == 17 / 19
    assert find_copies([" ".join(words)], shots=[near])[0].near == (0,)
    # Of 10 words a change in the middle changes three of eight shingles: 5 / 11.
    middle = [*words[:5], "other", *words[6:10]]
    assert jaccard(" ".join(words[:10]), " ".join(middle)) == 5 / 11
    assert find_copies([" ".join(words[:10])], shots=[" ".join(middle)])[0].near == ()


def test_four_fifths_exactly_is_near():
    one, other = "a b c d e f", "a b c d e f g"  # four of five shingles
    assert jaccard(one, other) == MIN_JACCARD
    assert find_copies([one], shots=[other])[0].near == (0,)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("What is X?", "what is x", True),
        ("“Quoted” text…", '"quoted" text', True),
        ("ﬁve  cats", "five cats", True),  # a ligature: the same in NFKC
        ("5 - 3", "5 + 3", False),
        ("1.5", "15", False),
        ("1,000 cats", "1000 cats", False),
        ("is 12 > 7", "is 12 < 7", False),
        ("漢字", "漢", False),
        ("", "...", False),  # nothing to compare
    ],
)
def test_which_texts_have_the_same_words(one, other, equal):
    assert find_copies([one], shots=[other])[0].near == ((0,) if equal else ())


def test_ideographs_are_words_of_their_own():
    text = "我们今天去公园看红色的狐狸和蓝色的猫头鹰睡觉"
    assert len(shingles(text)) == len(text) - 2
    assert find_copies([text], shots=[text[:-1] + "吃"])[0].near == (0,)


@pytest.mark.slow
@given(st.lists(WORDS, max_size=8), st.lists(WORDS, max_size=12))
@settings(max_examples=200)
def test_the_index_finds_what_comparing_all_pairs_finds(queries, shots):
    for text, found in zip(queries, find_copies(queries, shots=shots), strict=True):
        assert found.exact == tuple(n for n, shot in enumerate(shots) if shot == text)
        similar = [jaccard(text, shot) >= MIN_JACCARD for shot in shots]
        assert found.near == tuple(n for n, shot in enumerate(shots) if similar[n] and shot != text)


def test_boilerplate_that_all_inputs_share_makes_none_of_them_near():
    frame = "please read the following message of a customer and name its topic: "
    names = [letter * times for times in (1, 2) for letter in "abcdefghijklmno"]
    texts = [frame + " ".join(f"{word}{name}" for word in ("my", "card", "was", "lost", "again")) for name in names]
    assert all(found == Copies((n,), ()) for n, found in enumerate(find_copies(texts, shots=texts)))


@pytest.mark.slow
@given(st.lists(WORDS, max_size=8), st.lists(st.tuples(WORDS, st.integers(0, 2)), max_size=16))
@settings(max_examples=200)
def test_with_groups_a_similar_input_of_each_group_is_found(queries, grouped):
    texts, groups = [text for text, _ in grouped], [group for _, group in grouped]
    found = list(CopyIndex(texts, groups=groups).find_similar(queries))
    similar = {(q, n) for q, one in enumerate(queries) for n, two in enumerate(texts) if jaccard(one, two) >= 0.8}
    assert set(found) <= similar
    assert {(q, groups[n]) for q, n in found} == {(q, groups[n]) for q, n in similar}


def test_texts_of_many_blocks_are_compared_like_those_of_one(monkeypatch):
    texts = [f"order {n} of bike {n % 7}" for n in range(300)]
    shown = [text.upper() for text in texts[::3]]
    whole = find_copies(texts, shots=shown)
    assert [copies.near for copies in whole] == [(n // 3,) if n % 3 == 0 else () for n in range(300)]
    monkeypatch.setattr("manyicl.tasks.duplicates.BLOCK", 10)
    assert find_copies(texts, shots=shown) == whole


def test_inputs_that_are_all_alike_are_compared_in_seconds():
    """200 by 2,000 inputs of 50 words that differ in the last: one that is similar is enough for each query."""
    frame = " ".join(f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(49))
    index = CopyIndex([f"{frame} {n}" for n in range(2000)], groups=[0] * 2000)
    assert {query for query, _ in index.find_similar([f"{frame} x{n}" for n in range(200)])} == set(range(200))
