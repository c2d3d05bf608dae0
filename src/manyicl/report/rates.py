"""What was chosen by trials of learning rates, and whether the best rate may lie beyond those that were tried."""

from __future__ import annotations

from manyicl.report.comparison import Comparison, Trial
from manyicl.report.numbers import count_noun, join_words, tell_rate


def tell_rates(comparison: Comparison) -> str:
    """Return which learning rate was chosen for each arm, and which of them lie at an end of the rates tried."""
    told, ends, warnings = [], {"lowest": list[str](), "highest": list[str]()}, []
    for arm in comparison.arms:
        trials = [trial for trial in comparison.trials if trial.arm == arm.arm]
        if any(trial.task is not None for trial in trials):
            warnings += _warn_of_tuned(comparison, arm.arm, trials)
            continue
        chosen = next((trial for trial in trials if trial.chosen), None)
        if chosen is None:
            continue
        told.append(f"{arm.title} {tell_rate(chosen.learning_rate)}")
        end = _end_of(chosen, trials)
        if end:
            ends[end].append(arm.title)
    sentences = [f"Chosen on validation rows: {', '.join(told)}."] if told else []
    for end, beyond in (("lowest", "lower"), ("highest", "higher")):
        if ends[end]:
            sentences.append(
                f"The rate of {join_words(ends[end])} is the {end} that was tried, so a {beyond} one may do better."
            )
    return " ".join([*sentences, *warnings])


def _end_of(chosen: Trial, trials: list[Trial]) -> str:
    """Return at which end of the rates tried the chosen one lies; "" if at none, or if there was no choice."""
    rates = {trial.learning_rate for trial in trials}
    if len(rates) < 2:
        return ""
    return {min(rates): "lowest", max(rates): "highest"}.get(chosen.learning_rate, "")


def _warn_of_tuned(comparison: Comparison, arm: str, trials: list[Trial]) -> list[str]:
    """Return a sentence if models that are tuned for each task have their rate or step at an end of what was tried."""
    chosen = [trial for trial in trials if trial.chosen]
    at_end = [t for t in chosen if _end_of(t, [other for other in trials if other.task == t.task])]
    models = [one for one in comparison.tuned if one.arm == arm]
    at_last = [one for one in models if one.step == one.steps]
    parts = []
    if at_end:
        parts.append(f"the rate of {len(at_end)} of {count_noun(len(chosen), 'task')} lies at an end of those tried")
    if at_last:
        parts.append(f"the last checkpoint is the best of {len(at_last)} of {count_noun(len(models), 'model')}")
    if not parts:
        return []
    return [f"{comparison.title_of(arm)}: {' and '.join(parts)}, so the ceiling may be higher."]
