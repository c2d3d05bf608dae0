"""The verdict and the facts below it: sentences made from paired differences, and no stronger than these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from manyicl.comparison import (
    Comparison,
    PairDifference,
    Role,
    Trial,
    count_seeds,
    tell_flatness,
    tell_pair,
)
from manyicl.console import deciding_digits, is_known, tell_rate
from manyicl.evaluation import tell_shot_count
from manyicl.intervals import MIN_SEEDS
from manyicl.report.numbers import (
    count_noun,
    join_words,
    tell_change,
    tell_interval,
    tell_percent,
    tell_plain_path,
    tell_shots_range,
)
from manyicl.report.tables import ASKED, fewest_shots_changes, overlap_note

METHOD = "manyicl"
# The verdict is about the first of these that any two matched arms were both asked with.
MATCHING = {"tokens": "tokens", "answers": "answers", "flops": "FLOPs"}
PAIRED_NOTE = (
    "Both arms answered the same queries after the same draws of shots, with the same seed. Where no difference can be"
    " shown, the number is the score of the arm named first minus that of the other, in points."
)
KINDS_NOTE = (
    "Only a score that the base had can be forgotten: tasks on which its interval lies above the scores of always"
    " giving the most common answer and of chance count as forgetting, the others as transfer."
)


@dataclass(frozen=True, slots=True)
class Standing:
    """By how much one arm is ahead of another."""

    other: str
    """The arm that it is compared with."""
    points: float
    """The difference of scores, as a fraction; negative if the other arm is ahead."""
    low: float | None
    high: float | None
    tasks: int
    """How many tasks the two are compared on."""
    seeds: int
    """How many finished seeds the difference is over."""

    @property
    def sign(self) -> int:
        """1 if the interval is above zero, -1 if it is below, 0 if it contains zero or there is none."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True, slots=True)
class Basis:
    """The numbers that the verdict is made from."""

    arm: str
    """The arm that it is about."""
    role: Role
    """The role of the tasks."""
    asked: str
    """How the numbers of shots were picked, as in `ASKED`."""
    standings: tuple[Standing, ...]
    """Its differences to the other matched arms."""


def method_arm(comparison: Comparison) -> str | None:
    """Return the arm that the verdict is about: ManyICL, or without it the matched arm with the best score."""
    matched = [arm.arm for arm in comparison.arms if arm.matched]
    if METHOD in matched:
        return METHOD
    for role in reversed(comparison.roles):
        for asked in comparison.asked_order:
            found = {arm: comparison.headline_score(arm, role, asked) for arm in matched}
            scores = {arm: one.score for arm, one in found.items() if one and one.score is not None}
            if scores:
                return max(scores, key=lambda arm: scores[arm])
    compared = [arm for pair in comparison.differences for arm in (pair.a, pair.b) if arm in matched]
    return compared[0] if compared else None


def main_role(comparison: Comparison) -> Role:
    """Return the role that decides: held-out tasks, if there are any."""
    return comparison.roles[-1] if comparison.roles else "trained"


def standings(comparison: Comparison, arm: str, role: str, *, asked: str = "chosen") -> list[Standing]:
    """Return how far `arm` is ahead of every other on the tasks of a role, in the order of the arms."""
    found = {}
    for pair in comparison.differences:
        if (pair.role, pair.asked) == (role, asked) and arm in (pair.a, pair.b) and is_known(pair.difference):
            standing = _orient(pair, arm)
            found[standing.other] = standing
    return [found[other] for other in comparison.place if other in found]


def _orient(pair: PairDifference, arm: str) -> Standing:
    """Return a difference from the side of `arm`, which is one of its two."""
    points, seeds = pair.difference or 0.0, count_seeds(pair.seeds)
    if pair.a == arm:
        return Standing(pair.b, points, pair.low, pair.high, pair.tasks, seeds)
    low, high = (None if pair.high is None else -pair.high), (None if pair.low is None else -pair.low)
    return Standing(pair.a, -points, low, high, pair.tasks, seeds)


def verdict_basis(comparison: Comparison) -> Basis | None:
    """Return the numbers of the verdict: held-out tasks with chosen shots, or the next best that there are.

    Arms that are not matched take no part.
    """
    arm = method_arm(comparison)
    for role in reversed(comparison.roles) if arm else ():
        for asked in comparison.asked_order:
            found = standings(comparison, arm or "", role, asked=asked)
            matched = tuple(one for one in found if comparison.arm_of(one.other).matched)
            if matched:
                return Basis(arm or "", role, asked, matched)
    return None


def tell_verdict(comparison: Comparison) -> str:
    """Return what a reader should take away: one sentence per number of tasks that arms are compared on.

    A sentence lists only matched arms, and the base in a sentence of its own. The number of tasks in it is that of each
    of its differences. A verdict on held-out tasks ends with the arms that are better on trained ones. If there are few
    finished seeds, the verdict says how many.
    """
    basis = verdict_basis(comparison)
    if basis is None:
        return _tell_nothing(comparison)
    sentences: list[str] = []
    named = False  # the arm, as the subject of a sentence before
    for part in (basis, _ahead_on_trained(comparison, basis)):
        groups: dict[tuple[bool, int], list[Standing]] = {}
        for one in part.standings:
            groups.setdefault((comparison.arm_of(one.other).is_trained, one.tasks), []).append(one)
        for key in sorted(groups, reverse=True):  # trained arms first, then those compared on most tasks
            sentences.append(_tell_group(comparison, part, groups[key], first=not named, is_trained=key[0]))
            named = named or any(one.sign for one in groups[key])
    if lead := _lead(comparison, basis):
        return " ".join([f"{lead}: {sentences[0]}", *map(_capitalize, sentences[1:])])
    return " ".join(map(_capitalize, sentences))


def _ahead_on_trained(comparison: Comparison, basis: Basis) -> Basis:
    """Return the matched arms that are better on trained tasks, asked likewise; none if the verdict is about these."""
    role: Role = "trained"
    found = standings(comparison, basis.arm, role, asked=basis.asked) if basis.role != role else []
    ahead = (one for one in found if one.sign < 0 and comparison.arm_of(one.other).matched)
    return Basis(basis.arm, role, basis.asked, tuple(ahead))


def _lead(comparison: Comparison, basis: Basis) -> str:
    """Return what limits every sentence of the verdict: missing work, few seeds, other shots or tasks."""
    limits = [] if comparison.finished else ["so far, and unfinished"]
    fewest, most = (pick(one.seeds for one in basis.standings) for pick in (min, max))
    if fewest < MIN_SEEDS:
        limits.append(f"for {tell_runs(fewest, most)}")
    if basis.asked != "chosen":
        missing = "with chosen shots there is nothing to compare"
        why = missing if comparison.chooses_shots else "no number was chosen on validation rows"
        limits.append(f"with {ASKED[basis.asked]} ({why})")
    if basis.role != main_role(comparison):
        limits.append(f"on {basis.role} tasks (on {main_role(comparison)} tasks there is nothing to compare)")
    return _capitalize(", ".join(limits))


def tell_runs(fewest: int, most: int) -> str:
    """Return "this run (1 seed)", "these runs (2 seeds)", "these runs (1 to 3 seeds)"."""
    if fewest != most:
        return f"these runs ({fewest} to {most} seeds)"
    return f"{'this run' if most == 1 else 'these runs'} ({count_noun(most, 'seed')})"


def _tell_group(comparison: Comparison, basis: Basis, those: list[Standing], *, first: bool, is_trained: bool) -> str:
    """Return one sentence about differences on the same number of tasks; it begins with a small letter."""
    title = comparison.title_of(basis.arm)
    matching = f"at equal training {MATCHING.get(comparison.match, comparison.match)}, " if is_trained else ""
    tasks = count_noun(those[0].tasks, f"{basis.role} task")

    def name(found: list[Standing], *, last: str = "and") -> str:
        words = join_words([comparison.title_of(one.other) for one in found], last=last)
        return words if is_trained else f"{words}, which is not trained"

    unclear = [one for one in those if one.sign == 0]
    parts = [
        f"{word} than {name(found)}, {_tell_span(found)}"
        for word, sign in (("better", 1), ("worse", -1))
        for found in [[one for one in those if one.sign == sign]]
        if found
    ]
    if not parts:
        comma = "" if is_trained else ","
        return f"{matching}no difference between {title} and {name(unclear, last='or')}{comma} can be shown on {tasks}."
    rest = f"; no difference from {name(unclear, last='or')} can be shown" if unclear else ""
    return f"{matching}{title if first else 'it'} answers {tasks} {', but '.join(parts)}{rest}."


def _tell_nothing(comparison: Comparison) -> str:
    """Return why there is no verdict."""
    arm = method_arm(comparison)
    if arm is not None and any(is_known(pair.difference) for pair in comparison.differences):
        return (
            f"No verdict: no arm that is matched to {comparison.title_of(arm)} has answered the same queries as it; the"
            " paired differences list the other arms."
        )
    arms_that_answered = {point.arm for point in comparison.curves if point.num_scored}
    answered = [one.title for one in comparison.arms if one.arm in arms_that_answered]
    if not comparison.finished and len(answered) == 1:
        return f"No verdict yet: only {answered[0]} has answered test queries."
    if not comparison.finished and not answered:
        return "No verdict yet: no arm has answered test queries."
    if not comparison.finished:
        return f"No verdict yet: {join_words(answered)} have not answered the same queries with the same seed."
    return "No verdict: no two arms have answered the same queries."


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _tell_span(those: list[Standing]) -> str:
    """Return "by 3.0 points", or "by 3.0 to 11.0 points" from the smallest difference to the largest."""
    sizes = sorted((_tell_size(one) for one in those), key=float)
    return f"by {sizes[0]} points" if sizes[0] == sizes[-1] else f"by {sizes[0]} to {sizes[-1]} points"


def _tell_size(one: Standing) -> str:
    size = 100 * abs(one.points)
    return f"{size:.{deciding_digits(size, size)}f}"  # a difference that is shown is never one of 0.0 points


def tell_intervals(comparison: Comparison) -> str:
    """Return a sentence on what the intervals of the first table cover, given the seeds that are finished."""
    fewest, most = comparison.done_seeds
    if most == 0:
        return "No training seed is finished yet."
    if fewest >= MIN_SEEDS:
        count = count_noun(fewest, "training seed") if fewest == most else f"{fewest} to {most} training seeds"
        return f"Mean of {count} with 95 % intervals over them."
    over = "intervals cover draws of shots and queries, and hold for these runs only; each seed's value is shown"
    if most < MIN_SEEDS:
        count = str(most) if fewest == most else f"{fewest} to {most}"
        noun = "training seed is" if count == "1" else "training seeds are"
        return f"{count} {noun} finished: {over}. No arm is called best with fewer than five seeds."
    return (
        f"{fewest} to {most} training seeds are finished: with five or more, intervals cover seeds too; with fewer,"
        f" {over}."
    )


def key_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the facts below the verdict: (what each is about, a sentence)."""
    arm = method_arm(comparison)
    if arm is None:
        return []
    decisive = main_role(comparison)
    facts = [(f"{role} tasks".capitalize(), _tell_role(comparison, arm, role)) for role in reversed(comparison.roles)]
    mine = [one for one in comparison.flatness if (one.arm, one.role) == (arm, decisive)]
    facts += [("More shots", tell_flatness(one, title=comparison.title_of)) for one in mine]
    facts += [
        ("Forgetting, text", _tell_forgotten_text(comparison)),
        ("Forgetting, tasks", _tell_forgotten_tasks(comparison)),
        ("Learning rates", tell_rates(comparison)),
        ("Shots in training", " ".join(f"{arm.fewer_shots}." for arm in comparison.arms if arm.fewer_shots)),
    ]
    if comparison.plain_path is not None:
        cost = tell_plain_path(**comparison.plain_path.model_dump())
        facts.append(("Evaluation", f"{_capitalize(cost)}."))
    if any(task.overlap is not None and task.overlap.test.count for task in comparison.tasks):
        facts.append(("Caution", overlap_note(comparison)))
    return [(about, sentence) for about, sentence in facts if sentence]


def _tell_role(comparison: Comparison, arm: str, role: str) -> str:
    ways = (comparison.main_asked(role), *comparison.asked_order)
    asked = next((how for how in ways if comparison.headline_score(arm, role, how)), "")
    score = comparison.headline_score(arm, role, asked)
    if score is None or not is_known(score.score):
        return ""
    shots = f" with {tell_shot_count(score.shots)}" if score.shots is not None else ""
    if score.shots is None and score.shots_by_task:
        shots = f" with each task's {asked} shots ({tell_shots_range(score.shots_by_task.values())})"
    found = standings(comparison, arm, role, asked=asked)
    counts = {one.tasks for one in found}
    leads = [_tell_standing(comparison, one, tell_tasks=len(counts) > 1) for one in found]
    where = f", on {count_noun(counts.pop(), 'task')}" if len(counts) == 1 else ""
    against = f"; points above the other arms{where}: {', '.join(leads)}" if leads else ""
    return f"{comparison.title_of(arm)} scores {tell_percent(score.score)} %{shots}{against}."


def _tell_standing(comparison: Comparison, one: Standing, *, tell_tasks: bool) -> str:
    """Return "few-shot FT +3.0 [+2.0, +4.0] (3 tasks, not matched)"."""
    notes = [count_noun(one.tasks, "task")] if tell_tasks else []
    title = comparison.title_of(one.other)
    if not comparison.arm_of(one.other).matched and "not matched" not in title:
        notes.append("not matched")
    interval = tell_interval(one.low, one.high, unit="points") or "[no interval]"
    noted = f" ({', '.join(notes)})" if notes else ""
    return f"{title} {tell_change(one.points, unit='points', low=one.low, high=one.high)} {interval}{noted}"


def _tell_forgotten_text(comparison: Comparison) -> str:
    """Return how much worse each arm predicts the first neutral text than the base did."""
    changes = comparison.forgetting.text
    first = next((change.file for change in changes if is_known(change.difference)), None)
    losses = [
        f"{comparison.title_of(change.arm)}"
        f" {tell_change(change.difference, unit='bits', low=change.low, high=change.high)}"
        f" {tell_interval(change.low, change.high, unit='bits')}".rstrip()
        for change in changes
        if change.file == first and is_known(change.difference)
    ]
    return f"Bits per byte lost on {first}: {', '.join(losses)}." if losses else ""


def _tell_forgotten_tasks(comparison: Comparison) -> str:
    """Return what each arm lost or gained, at the fewest shots, on the tasks that the base could do."""
    changes = fewest_shots_changes(comparison)
    if not changes:
        return ""
    counts = {len(change.tasks) for change in changes}
    parts = []
    for change in changes:
        interval = tell_interval(change.low, change.high, unit="points") or "[no interval]"
        tasks = f" ({count_noun(len(change.tasks), 'task')})" if len(counts) > 1 else ""
        points = tell_change(change.difference, unit="points", low=change.low, high=change.high)
        parts.append(f"{comparison.title_of(change.arm)} {points} {interval}{tasks}")
    where = count_noun(counts.pop(), "task") if len(counts) == 1 else "the tasks"
    shots = "the fewest shots" if changes[0].shots is None else tell_shot_count(changes[0].shots)
    return f"Points above the base on {where} that it could do at {shots}: {', '.join(parts)}."


def tell_not_asked(comparison: Comparison) -> str:
    """Return which tasks were trained on and not evaluated; "" if there are none."""
    names = [task.task for task in comparison.tasks if not task.asked]
    is_one = len(names) == 1
    return f"Trained on but not evaluated {'is' if is_one else 'are'} {join_words(names)}." if names else ""


def told_pairs(comparison: Comparison, role: str) -> list[tuple[PairDifference, str, str]]:
    """Return the paired differences on the tasks of a role: (difference, how both arms were asked, a sentence)."""
    return [
        (pair, _tell_ways(pair, asked), tell_pair(pair, title=comparison.title_of, asked=asked))
        for pair, asked in comparison.distinct_pairs(role)
    ]


def _tell_ways(pair: PairDifference, asked: Sequence[str]) -> str:
    """Return the ways of asking that came to the shots of a pair: "chosen shots and most shots (fill)"."""
    ways = [words for way, words in ASKED.items() if way in asked]
    if pair.shots_a is None or pair.shots_b is None:
        return join_words(ways)
    if not ways:
        return tell_shot_count(pair.shots_a)
    numbers = dict.fromkeys(map(str, (pair.shots_a, pair.shots_b)))
    return join_words(ways) if ways == [ASKED["zero"]] else f"{join_words(ways)} ({', '.join(numbers)})"


def tell_rates(comparison: Comparison) -> str:
    """Return which learning rate was chosen for each arm or given, and which are the lowest or highest tried."""
    rates, given, ends, warnings = [], dict[str, float](), {"lowest": list[str](), "highest": list[str]()}, []
    for arm in comparison.arms:
        trials = [trial for trial in comparison.trials if trial.arm == arm.arm]
        if not trials and arm.learning_rate:
            given[arm.title] = arm.learning_rate
        if any(trial.task is not None for trial in trials):
            warnings += _warn_of_tuned(comparison, arm.arm, trials)
            continue
        if chosen := next((trial for trial in trials if trial.chosen), None):
            rates.append(f"{arm.title} {tell_rate(chosen.learning_rate)}")
            if end := _end_of(chosen, trials):
                ends[end].append(arm.title)
    sentences = [f"Chosen on validation rows: {', '.join(rates)}."] if rates else []
    if given and (comparison.trials or len({*given.values()}) > 1):
        told = ", ".join(f"{title} {tell_rate(rate)}" for title, rate in given.items())
        sentences.append(f"Given by the recipe: {told}.")
    for end, beyond in (("lowest", "lower"), ("highest", "higher")):
        if ends[end]:
            one = f"The rate of {ends[end][0]} is the {end} that was tried, so a {beyond} one may do better."
            more = (
                f"The rates of {join_words(ends[end])} are the {end} that were tried, so {beyond} ones may do better."
            )
            sentences.append(one if len(ends[end]) == 1 else more)
    return " ".join([*sentences, *_tell_diverged(comparison), *warnings])


def _tell_diverged(comparison: Comparison) -> list[str]:
    """Return a sentence that names the trials that diverged, those of a tuned arm counted by rate; [] if none did."""
    counts = Counter((trial.arm, trial.learning_rate) for trial in comparison.trials if trial.diverged)
    told = [
        f"{comparison.title_of(arm)} {tell_rate(rate)}{f' ({count} tasks)' if count > 1 else ''}"
        for (arm, rate), count in counts.items()
    ]
    return [f"Diverged (a loss that is not finite), so counted as worst: {', '.join(told)}."] if told else []


def _end_of(chosen: Trial, trials: list[Trial]) -> str:
    """Return whether the chosen rate is the "lowest" or "highest" tried; "" if neither, or if only one was tried."""
    rates = {trial.learning_rate for trial in trials}
    if len(rates) < 2:
        return ""
    return {min(rates): "lowest", max(rates): "highest"}.get(chosen.learning_rate, "")


def _warn_of_tuned(comparison: Comparison, arm: str, trials: list[Trial]) -> list[str]:
    """Return a warning if some models of a tuned arm chose a rate or a number of steps at the end of their range."""
    chosen = [trial for trial in trials if trial.chosen]
    at_end = [t for t in chosen if _end_of(t, [other for other in trials if other.task == t.task])]
    models = [one for one in comparison.tuned if one.arm == arm]
    at_last = [one for one in models if one.step == one.steps]
    parts = []
    if at_end:
        parts.append(f"the rate of {len(at_end)} of {count_noun(len(chosen), 'task')} is the lowest or highest tried")
    if at_last:
        parts.append(f"the last checkpoint is the best of {len(at_last)} of {count_noun(len(models), 'model')}")
    if not parts:
        return []
    return [f"{comparison.title_of(arm)}: {' and '.join(parts)}, so the ceiling may be higher."]
