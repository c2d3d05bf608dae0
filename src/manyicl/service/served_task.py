"""A task of a service: what it is, its examples, its measurement, and its answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from manyicl.errors import check_kind
from manyicl.inference import AnswerSettings
from manyicl.service.library import ServedExample, TaskRecord
from manyicl.service.measurement.findings import Measurement
from manyicl.service.refusals import BadExamples, DeadlinePassed
from manyicl.service.registering import Registration, Rows, append_settings
from manyicl.service.requests import OnText, Reply, Ticket, wait_for
from manyicl.service.settings import ShotChoice

if TYPE_CHECKING:
    from manyicl.service.served import Service


class ServedTask:
    """A task of a service. What it says is what the library has at that moment, whoever changed it."""

    def __init__(self, service: Service, record: TaskRecord) -> None:
        self._service, self.name = service, record.name

    def __repr__(self) -> str:
        return f"ServedTask({self.name!r})"

    @property
    def record(self) -> TaskRecord:
        """What the library knows of it besides its examples, read at once."""
        return self._service.find_record(self.name)

    @property
    def family(self) -> str:
        """The kind of task, such as classification."""
        return str(self.record.about["family"])

    @property
    def metric(self) -> str:
        """How answers are scored."""
        return str(self.record.about["metric"])

    @property
    def instruction(self) -> str:
        """The text before all examples."""
        return str(self.record.about["instruction"])

    @property
    def labels(self) -> tuple[str, ...]:
        """The fixed answers; () for open answers, or if each example has its own."""
        return tuple(self.record.about["labels"])

    @property
    def version(self) -> int:
        """Goes up by one with each change."""
        return self.record.version

    @property
    def created(self) -> str:
        """When it was first added, in UTC."""
        return self.record.created

    @property
    def changed(self) -> str:
        """When it was last changed, in UTC."""
        return self.record.changed

    @property
    def num_examples(self) -> int:
        """How many examples it has."""
        return self._service.count_examples(self.name)

    @property
    def registration(self) -> Registration:
        """What became of the rows that it was made from."""
        found = self.record.about["registration"]
        return Registration(found["kept"], found["dropped"], tuple(found["notes"]), tuple(found["warnings"]))

    @property
    def measurement(self) -> Measurement:
        """What its examples say about the answers to come, as far as it is known."""
        return self._service.find_measurement(self.name)

    def measure(self, timeout: float | None = None) -> Measurement:
        """Wait until its present version is measured, and return that.

        Raises:
            DeadlinePassed: it takes more than `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (found := self.measurement).state in ("waiting", "running"):
            if end is not None and time.monotonic() > end:
                raise DeadlinePassed(f"task '{self.name}': is not measured within {timeout:g} s; allow more time")
            time.sleep(0.05)
        return found

    def examples(self, start: int = 0, limit: int = 100) -> list[ServedExample]:
        """Return `limit` examples by id, from the `start`-th on."""
        return self._service.list_examples(self.name, start=start, limit=limit)

    def add_examples(self, source: Rows) -> Registration:
        """Add examples, read as the first ones were. Those whose input is there already are dropped and counted.

        Raises:
            BadExamples: they cannot be read, or are too many.
        """
        return self._service.append(self.name, source)

    def add_example(self, input: str, answer: str) -> int:
        """Add one example and return its id.

        Raises:
            BadExamples: it cannot be read, or its input is there already.
        """
        registration = self.add_examples([{"input": input, "answer": answer}])
        if not registration.ids:
            raise BadExamples(
                f"input: is an example of task '{self.name}' already ({', '.join(registration.dropped)}); correct that"
            )
        return registration.ids[0]

    def correct(self, id_: int, answer: str) -> Registration:
        """Change the answer of an example; a label that the task did not have is in the notes and may be a slip.

        Raises:
            UnknownExample: there is none with this id.
            BadExamples: the answer is not one of those to choose from.
        """
        return self._service.correct(self.name, id_, answer)

    def remove_examples(self, ids: Sequence[int]) -> None:
        """Remove examples.

        Raises:
            UnknownExample: there is none with one of these ids; none is removed then.
            BadExamples: no example would be left.
        """
        self._service.remove_examples(self.name, ids)

    def replace_examples(self, source: Rows) -> Registration:
        """Put other examples in the place of all that there are.

        Raises:
            BadExamples: they cannot be read; the old ones stay then.
        """
        settings = append_settings(self.record.about, source)
        return self._service.add_task(source, name=self.name, settings=settings, replace=True).registration

    def submit(
        self,
        inputs: str | Sequence[str],
        *,
        options: Sequence[Sequence[str]] | None = None,
        shots: ShotChoice | None = None,
        answering: AnswerSettings | None = None,
        seed: int | Sequence[int] = 0,
        min_confidence: float | None = None,
        deadline: float | None = None,
        on_text: OnText | None = None,
    ) -> Ticket[list[Reply]]:
        """Let inputs wait for their answers, and return the ticket for them.

        options: the candidate answers of each input; default: the task's labels, else the answer is generated.
        shots: which examples are shown; default: the service's choice.
        answering: how they are answered; default: the service's settings. `normalize` is for choices, the others are
            for generated answers, whose default limit is the task's longest answer.
        seed: decides what is sampled; one, or one for each input.
        min_confidence: replies with less confidence are marked as unsure; default: none is.
        deadline: seconds from now after which the future brings `DeadlinePassed`; looked at between passes.
        on_text: called with the index of an input and the next piece of its answer, by the thread of the model: it
            must return at once. The pieces of an answer join to the whole.

        Raises:
            UnknownTask, InputTooLong, QueueFull, Closing: it is refused. UserError: an input is empty, or
                `min_confidence` is for answers that have no confidence.
        """
        check_kind("shots", shots, ShotChoice)
        check_kind("answering", answering, AnswerSettings)
        return self._service.submit(
            self.name,
            inputs,
            options=options,
            shots=shots,
            answering=answering,
            seed=seed,
            min_confidence=min_confidence,
            deadline=deadline,
            on_text=on_text,
        )

    def predict(
        self,
        inputs: str | Sequence[str],
        *,
        options: Sequence[Sequence[str]] | None = None,
        shots: ShotChoice | None = None,
        answering: AnswerSettings | None = None,
        seed: int = 0,
        min_confidence: float | None = None,
        timeout: float | None = None,
    ) -> list[Reply]:
        """Return the replies to one input or several, as `submit` brings them.

        Raises:
            DeadlinePassed: they take more than `timeout` seconds. The others as `submit`.
        """
        ticket = self.submit(
            inputs,
            options=options,
            shots=shots,
            answering=answering,
            seed=seed,
            min_confidence=min_confidence,
            deadline=timeout,
        )
        return wait_for(ticket, timeout=timeout)
