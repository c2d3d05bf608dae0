"""Renamed labels (symbol tuning): the names that a task's labels can have in a renamed episode, and their draw.

In a renamed episode each of the task's labels has another name, the same throughout the episode, so that only the shots
show what a name means. The names are the task's own labels permuted, or words.

The words are common English nouns. Words from the task's inputs would tie a name to the examples that contain it, and
a model could answer by copying them. Invented words would take many tokens; nouns take few with every tokenizer of a
language model. A word that a tokenizer cannot decode exactly is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from manyicl.errors import UserError
from manyicl.tasks import Task

RenameTo = Literal["permuted", "words"]
# Families whose labels are names of classes. In other families a label may be a statement with a meaning of its own.
RENAMED_FAMILIES = ("classification", "nli")

# Things, in lower case and with one spelling; no word that judges, counts, agrees or denies.
_WORDS = """
acorn album alley anchor apple apron arrow attic autumn badge bagel ball bamboo banana banjo barn barrel basket beach
bead beam bean bear beaver bed bee bell belt bench berry bird blanket board boat bone book boot bottle bowl box
bracket branch brass bread brick bridge broom brush bubble bucket bulb bus bush butter button cabin cable cactus cake
camel camp canal candle canoe canvas cap car card carpet carrot cart castle cave cedar ceiling cell chain chair chalk
cheese cherry chess chest chicken chimney circle clay cliff clock cloth cloud clover coal coast coat coin comb copper
coral cord corn corner cotton couch cow crab cradle crane crayon creek crow crown cube cup curtain desert desk diamond
dish dock doll donkey door dragon drawer dress drum duck dust eagle ear echo edge egg elbow engine fabric farm feather
fence fern field finger fire fish flag flame flask flint floor flour flower flute foam fog forest fork fountain fox
frame frog fruit garage garden gate ghost giant giraffe glass globe glove goat gold goose grain grape grass gravel
guitar hair hall hammer hand harbor hat hawk hay hedge helmet hen hill hinge honey hood hook horn horse hotel house
ice ink iron island ivory ivy jacket jar jelly jewel juice jungle kettle key king kite kitten knee knife knot ladder
lake lamb lamp lantern lawn leaf leather lemon lens letter lid lily lime lion lizard lock log lunch magnet mango map
maple marble market mask mat meadow melon metal milk mill mint mirror mitten moon moss moth motor mouse mud muffin mug
mule museum mushroom nail napkin needle nest net noodle nose nut oak oar ocean olive onion orange orchid oven owl
oyster paddle page palace palm pan panda paper parcel park parrot pasta path peach peanut pear pearl pebble pen pencil
pepper piano pickle pie pig pillow pilot pine pipe plank plate plum pocket pond pony pool porch potato powder prince
puddle pump pumpkin puppet puppy purse quilt rabbit radio raft rail rain ribbon rice ring river road robin robot rock
rocket roof room rope rose ruby rug sack saddle sail salad salt sand sandal saucer scarf school screw seal seat seed
shadow sheep shelf shell ship shirt shoe shore shovel silk silver sink skate sketch skirt sky sled sleeve smoke snail
snake snow soap sock sofa soil soup spider spoon spring square stair star statue steam steel stem stone stool storm
stove straw stream street string sugar sun swan table tail tailor tape tea teapot tent thread throne thumb tiger tile
timber tin toast tomato tool tooth torch tower towel toy tractor trail train tray tree tribe truck trumpet trunk tulip
tunnel turkey turtle umbrella valley vase velvet vest village vine violin wagon wall walnut water wave wax whale wheat
wheel whistle wig willow window wing wire wolf wood wool yard yarn zebra
"""
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True, slots=True)
class LabelLengths:
    """What the plan needs to know of a task's labels and their names: no text, only lengths and indices."""

    label_of: NDArray[np.int32]
    """(N,), the label of each example."""
    num_labels: int
    """Number of labels: they are the first of the names."""
    name_tokens: NDArray[np.int64]
    """(num_labels + words,), tokens of each name with its terminator."""
    num_head_tokens: int
    """Tokens before the first example of a renamed episode."""


@dataclass(frozen=True, slots=True)
class LabelNames:
    """A task's labels, followed by the words that can replace them, as answers."""

    texts: tuple[str, ...]
    """Those that the tokenizer decodes exactly. No word equals a label, in any case."""
    num_labels: int
    """Number of labels: they come first."""
    ids: tuple[NDArray[np.int32], ...]
    """Ids of each text, terminator included."""
    label_of: Mapping[str, NDArray[np.int32]]
    """Split -> (N,), the label of each tokenised example."""
    head_ids: NDArray[np.int32]
    """Ids before the first example of a renamed episode: the task's own head, without an instruction that names a
    label."""
    name_tokens: NDArray[np.int64]
    """Tokens of each text, terminator included."""

    def lengths(self, split: str) -> LabelLengths:
        """Return what the plan needs to know for the episodes of a split."""
        return LabelLengths(self.label_of[split], self.num_labels, self.name_tokens, len(self.head_ids))


def collect_names(
    task: Task,
    *,
    rows: Mapping[str, NDArray[np.int32]],
    encode_answers: Callable[[Sequence[str]], list[list[int] | str]],
    head_ids: NDArray[np.int32],
) -> LabelNames | None:
    """Return the names for a task's labels; None if it does not have two or more fixed labels to rename.

    rows: split -> indices of the examples that are kept. encode_answers: gives for each text its ids with terminator,
    or the reason why it cannot be used. head_ids: ids before the first example of a renamed episode.
    """
    if task.family not in RENAMED_FAMILIES:
        return None
    known = {label.casefold() for label in task.labels}
    labels, words = (
        [(text, ids) for text, ids in zip(texts, encode_answers(texts), strict=True) if not isinstance(ids, str)]
        for texts in (task.labels, [word for word in WORDS if word not in known])
    )
    if len(labels) < 2:
        return None
    places = {label: place for place, (label, _) in enumerate(labels)}
    return LabelNames(
        texts=tuple(text for text, _ in labels + words),
        num_labels=len(labels),
        ids=tuple(np.asarray(ids, dtype=np.int32) for _, ids in labels + words),
        label_of={
            split: np.asarray([places[getattr(task, split)[row].answer] for row in kept], dtype=np.int32)
            for split, kept in rows.items()
        },
        head_ids=head_ids,
        name_tokens=np.asarray([len(ids) for _, ids in labels + words], dtype=np.int64),
    )


def names_a_label(text: str, labels: Sequence[str]) -> bool:
    """Return whether a text contains one of `labels` as a whole word or words, in any case.

    >>> names_a_label("Is the tweet Ironic?", ["ironic", "not ironic"]), names_a_label("Find irony.", ["iron"])
    (True, False)
    """
    return any(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE) for label in labels)


def draw_names(labels: LabelLengths, *, to: RenameTo, rng: np.random.Generator) -> NDArray[np.int32]:
    """Return an index of a name for each label, int32 (num_labels,): distinct, and not all labels unchanged."""
    num_labels = labels.num_labels
    if to == "words":
        num_words = len(labels.name_tokens) - num_labels
        return (num_labels + rng.choice(num_words, size=num_labels, replace=False)).astype(np.int32)
    while True:
        names = rng.permutation(num_labels)
        if (names != np.arange(num_labels)).any():
            return names.astype(np.int32)


def check_names(labels: LabelLengths, *, task: str, to: RenameTo) -> None:
    """Check that there are enough words to rename the labels.

    Raises:
        UserError: the task has more labels than there are words.
    """
    num_words = len(labels.name_tokens) - labels.num_labels
    if to == "words" and num_words < labels.num_labels:
        raise UserError(
            f"episodes.rename_to = 'words': task '{task}' has {labels.num_labels} labels, but only {num_words} words"
            " can replace them; set episodes.rename_to = 'permuted', or leave the task out"
        )
