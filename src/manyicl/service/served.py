"""The service: one model, its tasks, and their answers; in this process, from any number of threads."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from manyicl.errors import UserError, check_kind, check_list, take_path
from manyicl.inference import (
    AnswerSettings,
    EndpointSettings,
    InferenceModel,
    check_min_confidence,
    load_for_inference,
)
from manyicl.service.answering import Answerer, Switch, describe_model
from manyicl.service.items import check_inputs, make_items, make_prompts
from manyicl.service.library import Library, ServedExample, TaskRecord
from manyicl.service.measurement.findings import Measurement
from manyicl.service.measurement.measuring import Measurer
from manyicl.service.prefix_cache import PrefixCache
from manyicl.service.refusals import BadExamples, Closing
from manyicl.service.registering import (
    Registration,
    Rows,
    append_examples,
    append_settings,
    correct_example,
    read_examples,
    update_labels,
)
from manyicl.service.requests import (
    Generation,
    OnText,
    Reply,
    Request,
    Ticket,
    WaitingLine,
    to_deadline,
    wait_for,
)
from manyicl.service.selection import TaskBook, choose_shots
from manyicl.service.served_task import ServedTask
from manyicl.service.settings import BATCH_TOKENS, CPU_READ_TOKENS, ServiceSettings, ShotChoice
from manyicl.service.worker import Background, NoBackground, ServiceStats, Worker

PREFIX_FOLDER = "prefixes"
Message = Mapping[str, str]


def open_service(
    model: str | Path | InferenceModel,
    *,
    data: str | Path | None = None,
    endpoint: EndpointSettings | None = None,
    settings: ServiceSettings | None = None,
) -> Service:
    """Open a service. It is closed by `close`, or at the end of a `with` block.

    model: a checkpoint, an adapter, a run, or a hub name; or a model that is loaded.
    data: the folder of the library, which is made if it is not there. None: nothing is kept.
    endpoint: a server that runs the model; `model` then gives tokenizer, template and window.

    Raises:
        UserError: the model cannot be loaded, the server is not reached, or settings are of another kind.
        LibraryFault: the library is corrupt, from a newer version, or cannot be written.
    """
    check_kind("endpoint", endpoint, EndpointSettings)
    check_kind("settings", settings, ServiceSettings)
    # Before the model, which takes seconds.
    library = Library(Path(take_path("data", data))) if data is not None else None
    try:
        loaded = model if isinstance(model, InferenceModel) else load_for_inference(model, weights=endpoint is None)
        return Service(loaded, library=library, endpoint=endpoint, settings=settings or ServiceSettings())
    except BaseException:
        if library is not None:
            library.close()
        raise


class Service:
    """One model that serves many tasks. `open_service` makes it; its methods may be called from any thread.

    Raises:
        UserError: the server of `endpoint` is not reached.
    """

    def __init__(
        self,
        model: InferenceModel,
        *,
        library: Library | None,
        endpoint: EndpointSettings | None,
        settings: ServiceSettings,
    ) -> None:
        self.settings = settings
        if endpoint is not None and (settings.answering.normalize, settings.answering.calibrate) != ("none", "none"):
            raise UserError("answering: a server tells no likelihoods to normalize or calibrate; leave these out")
        self._has_answered = self._is_closed = False
        self._keeps_prefixes = library is not None
        if library is None:
            folder = Path(tempfile.mkdtemp(prefix="manyicl-service-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            library = Library(folder)
        self._library, self._model = library, model
        self._cache = PrefixCache(
            model,
            most_bytes=settings.cache_bytes,
            most_disk_bytes=settings.spill_bytes if endpoint is None else 0,
            folder=library.path.parent / PREFIX_FOLDER,
        )
        self._answerer = Answerer(model, endpoint=endpoint, cache=self._cache, answering=settings.answering)
        self.calls = self._answerer.calls
        self._book = TaskBook(library, model, shot_tokens=settings.shot_tokens)
        most, on_cpu = settings.max_batch_tokens, endpoint is None and model.on_cpu
        self._line = WaitingLine(
            max_items=settings.max_queue,
            max_batch_tokens=BATCH_TOKENS if most is None else most,
            max_read_tokens=CPU_READ_TOKENS if most is None and on_cpu else None,
        )
        self._measurer: Measurer | None = None
        self._worker = Worker(self._answerer, self._line, make_background=self._make_background)
        self._worker.start()
        self.info = describe_model(self._answerer)

    def __repr__(self) -> str:
        return f"<Service of {self._model.path!r}>"

    def _make_background(self, answerer: Answerer) -> Background:
        if not self.settings.measure:
            return NoBackground()
        self._measurer = Measurer(
            self._library, self._book, answerer, most_tokens=self.settings.measure_tokens, choice=self.settings.shots
        )
        return self._measurer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, finish: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and end.

        finish: answer those that wait first; else they fail with `Closing`.
        timeout: seconds after which they fail all the same.
        """
        self._line.close(finish=finish)
        has_ended = self._worker.join(timeout)
        if not has_ended:
            self._line.close(finish=False)
            has_ended = self._worker.join(1.0)
        if self._is_closed:
            return
        self._is_closed = True
        if has_ended and self._keeps_prefixes:
            self._cache.spill_all()
        self._cache.clear()
        self._library.close()

    @contextmanager
    def _open(self) -> Iterator[Library]:
        if self._is_closed:
            raise Closing("the service is closed; open it again")
        yield self._library

    # Tasks.

    def tasks(self) -> list[ServedTask]:
        """Return all tasks by name."""
        with self._open() as library:
            return [ServedTask(self, record) for record in library.tasks()]

    def task(self, name: str) -> ServedTask:
        """Return a task.

        Raises:
            UnknownTask: there is none of this name.
        """
        with self._open() as library:
            return ServedTask(self, library.task(name))

    def add_task(
        self,
        source: Rows,
        *,
        name: str | None = None,
        settings: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> ServedTask:
        """Keep a task and return it. It can be asked at once, and is measured when nothing else is to be done.

        source: a file that `manyicl check` reads, a folder of one task, or rows with `input` and `answer`.
        name: default: that in its task.json, else the file's without its suffix.
        settings: as a task.json; default: the one beside the file.
        replace: in place of a task of this name, if there is one.

        Raises:
            BadExamples: the rows cannot be read, or the name cannot be one.
            TaskExists: one of this name is there, and `replace` is False. UserError: there are too many tasks already.
        """
        with self._open() as library:
            read = read_examples(source, name=name, settings=settings, most=self.settings.max_examples)
            kept = name if name is not None else read.task.name
            lost = self._book.check_writable(read.task)
            about = read.about()
            notes = [f"{number:,} examples are never shown ({reason})" for reason, number in lost.items()]
            about["registration"]["warnings"] = [*about["registration"]["warnings"], *notes]
            library.add_task(
                kept,
                about,
                read.task.train,
                source=read.source,
                replace=replace,
                most_tasks=self.settings.max_tasks,
            )
        self._line.wake()
        return self.task(kept)

    def remove_task(self, name: str) -> None:
        """Remove a task with all of its examples.

        Raises:
            UnknownTask: there is none of this name.
        """
        with self._open() as library:
            library.remove_task(name)

    # Answers.

    def submit(
        self,
        name: str,
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
        """Let inputs of a task wait for their answers; `ServedTask.submit` says more.

        Raises:
            UnknownTask, InputTooLong, QueueFull, Closing: it is refused. UserError: an input is empty, or
                `min_confidence` is for answers that have no confidence.
        """
        texts = check_inputs(inputs, most_chars=self.settings.max_input_chars)
        with self._open():
            task = self._book.get(name)
        choice = shots if shots is not None else self.settings.shots
        chosen = choose_shots(task, choice)
        how = answering or self.settings.answering
        items = make_items(
            task,
            texts,
            tokenizer=self._model.tokenizer,
            options=options,
            shots=chosen,
            limit=min(how.max_new_tokens or task.limit, self.settings.max_new_tokens),
            answering=how,
            seeds=[seed] * len(texts) if isinstance(seed, int) else seed,
        )
        are_chosen = self._answerer.engine.has_likelihoods and all(item.choices for item in items)
        check_min_confidence(min_confidence, has_confidence=are_chosen or how.samples > 1)
        ticket: Ticket[list[Reply]] = Ticket()
        request = Request(
            key=name,
            group=(task.record.id, task.record.version, choice),
            items=items,
            ticket=ticket,
            task=task,
            shots=chosen,
            min_confidence=min_confidence,
            deadline=to_deadline(deadline),
            on_text=on_text,
        )
        self._line.add(request)
        return ticket

    def submit_generation(
        self,
        prompt: str | Sequence[Message],
        *,
        answering: AnswerSettings | None = None,
        seed: int | Sequence[int] = 0,
        deadline: float | None = None,
        on_text: OnText | None = None,
        switches: Mapping[str, Switch] | None = None,
    ) -> Ticket[list[Generation]]:
        """Let a prompt wait that the model completes as it is, without a task.

        prompt: a text, or the messages of a chat, which the model's chat template writes.
        answering: how it is completed; default: the service's settings.
        seed: decides what is sampled; each of several gives a completion of its own.
        deadline, on_text: as in `ServedTask.submit`; the index is that of the seed.
        switches: variables of the chat template, such as `enable_thinking`; a model that thinks does not by default.

        Raises:
            InputTooLong, QueueFull, Closing: it is refused. UserError: it is empty, or the model has no chat template
                with these switches.
        """
        text = prompt if isinstance(prompt, str) else "\n".join(str(one.get("content", "")) for one in prompt)
        check_inputs(text, most_chars=self.settings.max_input_chars)
        with self._open():
            ids = self._answerer.encode_prompt(prompt, switches=switches or {})
        how = answering or self.settings.answering
        items = make_prompts(
            text,
            ids,
            max_tokens=self._model.max_tokens,
            limit=min(how.max_new_tokens or self.settings.max_new_tokens, self.settings.max_new_tokens),
            answering=how,
            seeds=[seed] if isinstance(seed, int) else seed,
        )
        ticket: Ticket[list[Generation]] = Ticket()
        request = Request(
            key="", group="generation", items=items, ticket=ticket, deadline=to_deadline(deadline), on_text=on_text
        )
        self._line.add(request)
        return ticket

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        answering: AnswerSettings | None = None,
        seed: int = 0,
        timeout: float | None = None,
    ) -> Generation:
        """Return the one completion that `submit_generation` brings.

        Raises:
            DeadlinePassed: it takes more than `timeout` seconds. The others as `submit_generation`.
        """
        ticket = self.submit_generation(prompt, answering=answering, seed=seed, deadline=timeout)
        return wait_for(ticket, timeout=timeout)[0]

    @property
    def is_ready(self) -> bool:
        """Whether the model has answered a trial, and its server, if it has one, the last call."""
        return self._has_answered and not self.calls.fault

    def ready(self) -> None:
        """Try the model once, with a real forward pass; `is_ready` says that it went well.

        Raises:
            UserError: it did not.
        """
        self.generate("a", answering=AnswerSettings(max_new_tokens=1), timeout=self._answerer.trial_s)
        self._has_answered = True

    def stats(self) -> ServiceStats:
        """Return what has been done so far, and what is held."""
        served, cache, tokens = self._worker.served, asdict(self._cache.count), self._answerer.tokens
        engine = self._answerer.engine.count
        memory, disk = cache.pop("memory_bytes"), cache.pop("disk_bytes")
        with self._open() as library:
            num_tasks = len(library.versions())
        return ServiceStats(
            waiting=self._line.lengths(),
            requests=dict(self._line.outcomes),
            num_answers=served.num_answers,
            num_passes=served.num_passes,
            latency_sum_s=served.latency_sum_s,
            latency_counts=served.latency_counts(),
            prefixes=cache,
            prefix_bytes=memory,
            spilled_bytes=disk,
            tokens={
                "prompt": tokens.prompt,
                "answer": tokens.answer,
                "prefix": engine.num_prefix_tokens,
                "query": engine.num_query_tokens,
            },
            num_tasks=num_tasks,
            measuring=self._measurer.current if self._measurer is not None else None,
        )

    # What tasks need.

    def find_record(self, name: str) -> TaskRecord:
        """Return what the library knows of a task now."""
        with self._open() as library:
            return library.task(name)

    def find_measurement(self, name: str) -> Measurement:
        """Return what is known about the answers of a task."""
        record = self.find_record(name)
        if self._measurer is None:
            return Measurement("off", version=record.version)
        return self._measurer.find(record.id, record.version)

    def list_examples(self, name: str, *, start: int, limit: int) -> list[ServedExample]:
        """Return some examples of a task."""
        record = self.find_record(name)
        with self._open() as library:
            return library.examples(record.id, start=max(0, start), limit=max(0, limit))

    def count_examples(self, name: str) -> int:
        """Return how many examples a task has."""
        record = self.find_record(name)
        with self._open() as library:
            return library.num_examples(record.id)

    def append(self, name: str, source: Rows) -> Registration:
        """Add examples to a task."""
        with self._open() as library:
            settings = append_settings(library.task(name).about, source)
            most = self.settings.max_examples
            read = read_examples(source, name=name, settings=settings, most=most, is_append=True)
            self._book.check_writable(read.task)
            with library.changing(name) as change:
                if append_settings(change.about, source) != settings:
                    raise BadExamples(f"task '{name}': was replaced meanwhile by a task of another kind; try again")
                registration = append_examples(change, read, most=most)
        self._line.wake()
        return registration

    def correct(self, name: str, id_: int, answer: str) -> Registration:
        """Change the answer of an example."""
        with self._open() as library, library.changing(name) as change:
            registration = correct_example(change, id_, answer)
        self._line.wake()
        return registration

    def remove_examples(self, name: str, ids: Sequence[int]) -> None:
        """Remove examples; all or, if one is not there, none."""
        check_list("ids", ids, of=int)
        with self._open() as library, library.changing(name) as change:
            wanted = {change.find(id_).id for id_ in ids}
            if len(wanted) == change.num_examples():
                raise BadExamples(f"task '{name}': would have no examples left; remove the task instead")
            change.remove(sorted(wanted))
            update_labels(change)
        self._line.wake()
