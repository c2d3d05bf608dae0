from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import FrozenInstanceError

import pytest

from manyicl.demo.lexicon import all_words, coin_words, load_lexicon

LEXICON = load_lexicon()


def test_the_lists_have_their_sizes():
    assert len(LEXICON.topics) == 24
    assert {len(nouns) for nouns in LEXICON.topics.values()} == {32}
    assert [len(LEXICON.good), len(LEXICON.bad), len(LEXICON.plain), len(LEXICON.colours)] == [60, 60, 60, 16]
    assert [len(LEXICON.people), len(LEXICON.places), len(LEXICON.jobs)] == [160, 120, 48]
    assert [len(LEXICON.verbs), len(LEXICON.labels)] == [80, 480]


def test_a_word_is_in_one_list_only():
    words = all_words(LEXICON)
    assert [word for word, times in Counter(words).items() if times > 1] == []
    assert len(words) == 24 + 24 * 32 + 3 * 60 + 16 + 160 + 120 + 48 + 2 * 80 + 480


def test_a_word_is_lower_case_ascii():
    assert [word for word in all_words(LEXICON) if not re.fullmatch("[a-z]{2,16}", word)] == []


def test_words_that_a_reader_can_place():
    assert "plum" in LEXICON.topics["fruit"]
    assert ("take", "took") in LEXICON.verbs
    assert "velo" in LEXICON.places
    assert "ada" in LEXICON.people
    assert "happy" in LEXICON.good
    assert "ugly" in LEXICON.bad
    assert "wooden" in LEXICON.plain


def test_the_lexicon_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        LEXICON.good = ()
    with pytest.raises(TypeError):
        LEXICON.topics["fruit"] = ()


def test_coined_words_are_distinct_new_and_the_seeds():
    known = set(all_words(LEXICON))
    for seed in range(20):
        words = coin_words(random.Random(seed), count=200)
        assert len(set(words)) == 200
        assert not known & set(words)
        assert all(re.fullmatch("([bdfghjklmnprstvwz]{1,2}[aeiou]){2,3}[lmnrsx]?", word) for word in words)
    assert coin_words(random.Random(3), count=5) == coin_words(random.Random(3), count=5)
    assert coin_words(random.Random(3), count=5) != coin_words(random.Random(4), count=5)
    assert coin_words(random.Random(3), count=0) == []
