"""Label-symbol augmentation: the names that a task's labels may bear in a renamed episode, and the draw of them.

A renamed episode writes each of its task's labels by another name, the same throughout the episode, so that what a name
means can only be read off the shots. The names are the task's own labels permuted, or words.

The words are a short list of common English nouns rather than words out of the task's inputs (which would tie a name to
the examples it occurs in, and could be answered by copying) or coined ones (which most tokenizers spell in many
pieces): every tokenizer of a language model writes them in few tokens, and one that cannot give a word back is never
asked to, as that word is then left out.
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
# Families whose labels are names of classes; a label of another family may be a statement of its own.
RENAMED_FAMILIES = ("classification", "nli")

# Things, lower-case and in one spelling; no word that judges, counts, agrees or denies.
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
    """What the plan knows of a task's labels and their names: lengths and places, no text.

    label_of: int32 (N,), the label of each example. num_labels: of the names, the first so many are the labels.
    name_tokens: int64 (num_labels + words,), each name with its terminator. num_head_tokens: of a renamed episode.
    """

    label_of: NDArray[np.int32]
    num_labels: int
    name_tokens: NDArray[np.int64]
    num_head_tokens: int


@dataclass(frozen=True, slots=True)
class LabelNames:
    """A task's labels, and after them the words that may stand for them, as answers.

    texts: those that the tokenizer can give back; no word is a label, whatever its case. ids: of each, terminator
    included; name_tokens: int64, how many. label_of: split -> int32 (N,), the label of each tokenised example.
    head_ids: int32, what opens a renamed episode: the task's own head, less an instruction that names a label.
    """

    texts: tuple[str, ...]
    num_labels: int
    ids: tuple[NDArray[np.int32], ...]
    label_of: Mapping[str, NDArray[np.int32]]
    head_ids: NDArray[np.int32]
    name_tokens: NDArray[np.int64]

    def lengths(self, split: str) -> LabelLengths:
        """Return what the plan of a split's episodes needs."""
        return LabelLengths(self.label_of[split], self.num_labels, self.name_tokens, len(self.head_ids))


def collect_names(
    task: Task,
    *,
    rows: Mapping[str, NDArray[np.int32]],
    encode_answers: Callable[[Sequence[str]], list[list[int] | str]],
    head_ids: NDArray[np.int32],
) -> LabelNames | None:
    """Return the names of a task's labels, None where it has no fixed set of two labels or more to rename.

    rows: split -> which of its examples are kept. encode_answers: text to ids with terminator, or why it cannot be.
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
    """Return whether a text holds one of `labels` as a whole word or words, whatever its case.

    >>> names_a_label("Is the tweet Ironic?", ["ironic", "not ironic"]), names_a_label("Find irony.", ["iron"])
    (True, False)
    """
    return any(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE) for label in labels)


def draw_names(labels: LabelLengths, *, to: RenameTo, rng: np.random.Generator) -> NDArray[np.int32]:
    """Return for each label the name that it bears, int32 (num_labels,): distinct, and never each label its own."""
    num_labels = labels.num_labels
    if to == "words":
        num_words = len(labels.name_tokens) - num_labels
        return (num_labels + rng.choice(num_words, size=num_labels, replace=False)).astype(np.int32)
    while True:
        names = rng.permutation(num_labels)
        if (names != np.arange(num_labels)).any():
            return names.astype(np.int32)


def check_names(labels: LabelLengths, *, task: str, to: RenameTo) -> None:
    """Refuse a task with more labels than there are words for.

    Raises:
        UserError: naming the task and the setting that helps.
    """
    num_words = len(labels.name_tokens) - labels.num_labels
    if to == "words" and num_words < labels.num_labels:
        raise UserError(
            f"episodes.rename_to = 'words': task '{task}' has {labels.num_labels} labels, but only {num_words} words"
            " can stand for them; set episodes.rename_to = 'permuted', or leave the task out"
        )
