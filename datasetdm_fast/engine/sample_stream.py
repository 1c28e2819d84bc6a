"""Samples made while a trainer reads them: a data set for torch, and a class for Ray Data."""

import atexit
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from functools import cached_property
from itertools import count, islice
from numbers import Integral
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import get_worker_info

from datasetdm_fast.config import MOST_TRIES
from datasetdm_fast.data import Sample
from datasetdm_fast.engine.labels import kind_of, number_classes
from datasetdm_fast.engine.labels.label_files import image_tensor, label_tensors, stack
from datasetdm_fast.engine.loop.recipe import as_texts, check_numbers, label_tables
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.engine.shares import SharedDataset
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.messages import count_noun

POLL_SECONDS = 0.1  # in which a thread whose samples nobody reads any more ends


class SampleStream(SharedDataset):
    """Pairs of image and label, as `Run.as_dataset` gives them, each made shortly before it is read.

    Sample k has the seed `seed` + k and the prompt k of `prompts`, which repeat, and so do negative prompts of each;
    every rank and loader worker makes its own share of them, `prefetch` samples ahead in a thread. `number` is the
    length of an epoch over all shares, 0 means no end; with `trusted`, doubtful samples do not count and others are
    made in their place. `pipeline` is a Pipeline, or a function that opens one, as the worker processes of a DataLoader
    need it. Other choices are those of `Pipeline.stream`.
    """

    def __init__(
        self,
        pipeline: Pipeline | Callable[[], Pipeline],
        prompts: Sequence[str],
        task: str | Sequence[str],
        *,
        number: int = 0,
        seed: int = 0,
        trusted: bool = False,
        prefetch: int = 8,
        transform: Callable[[Any, Any], Any] | None = None,
        **choices: Any,
    ):
        if isinstance(prompts, str) or not isinstance(prompts, Sized) or not len(prompts):
            raise Refused("prompts: expected a sequence of texts", "Write (prompt,) for one.")
        if not all(isinstance(value, Integral) and value >= k for k, value in enumerate((number, prefetch))):
            raise Refused(
                f"number {number}, prefetch {prefetch}: expected whole numbers of at least 0 and 1",
                "Choose other numbers.",
            )
        check_numbers(seed=seed)
        if not isinstance(negatives := choices.get("negative_prompt"), str | None):
            some = list(islice(as_texts("negative_prompt", negatives), len(prompts) + 1))  # it may have no end
            if len(some) != len(prompts):
                number_given = len(some) if len(some) < len(prompts) else f"more than {len(prompts)}"
                raise Refused(
                    f"negative_prompt: {number_given} given for {count_noun(len(prompts), 'prompt')}",
                    "Give one, or one per prompt.",
                )
            choices["negative_prompt"] = some
        self.prompts, self.task, self.number, self.seed = prompts, task, number, seed
        self.trusted, self.prefetch, self.transform, self.choices = trusted, prefetch, transform, choices
        self.epoch = 0
        self._opener = pipeline
        self._opened: tuple[int, Pipeline] | None = None  # by which process, as none survives a fork or a pickle

    collate = staticmethod(stack)

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._opener, Pipeline):
            raise _no_sharing()
        return super().__getstate__() | {"_opened": None}

    @property
    def pipeline(self) -> Pipeline:
        if isinstance(self._opener, Pipeline):
            if get_worker_info() is not None:
                raise _no_sharing()
            return self._opener
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), self._opener()
        return self._opened[1]

    @cached_property
    def tables(self) -> Mapping[str, Any]:
        return number_tables(self.pipeline, self._tasks, self.choices)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of all labels, each at the place of its number."""
        return tuple(self.tables["classes"])

    @property
    def _tasks(self) -> tuple[str, ...]:
        return (self.task,) if isinstance(self.task, str) else tuple(self.task)

    def set_epoch(self, epoch: int) -> None:
        """Has the next iteration make the samples that follow those of `epoch` epochs; an endless stream has none, and
        begins anew.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        """The share of this rank and loader worker."""
        samples: Queue[Any] = Queue(self.prefetch)
        over, share = Event(), self.find_share()
        thread = Thread(target=self._fill, args=(samples, over, *share), name="samples", daemon=True)
        thread.start()

        def end() -> None:
            over.set()
            thread.join()

        atexit.register(end)  # a thread that is amid a product when its process ends would abort that
        try:
            while (sample := samples.get()) is not None:
                if isinstance(sample, BaseException):
                    raise sample
                image, tables = image_tensor(sample.image), self.tables["labels"]
                labels = {task: label_tensors(task, sample.annotations[task], tables[task]) for task in self._tasks}
                label = labels[self.task] if isinstance(self.task, str) else labels
                yield (image, label) if self.transform is None else self.transform(image, label)
        finally:
            atexit.unregister(end)
            end()

    def _fill(self, samples: Queue[Any], over: Event, share: int, shares: int) -> None:
        """Puts samples, and at their end None or what went wrong, into a queue that another thread empties."""

        def put(item: Any) -> None:
            while not over.is_set():
                with suppress(Full):
                    return samples.put(item, timeout=POLL_SECONDS)

        try:
            for sample in self._make_samples(share, shares, over):
                put(sample)
                if over.is_set():
                    return
            put(None)
        except BaseException as error:  # a reader would wait for ever
            put(error)

    def _make_samples(self, share: int, shares: int, over: Event) -> Iterator[Sample]:
        tries = MOST_TRIES if self.trusted else 1
        requested = len(range(share, self.number, shares)) if self.number else None
        if requested == 0:
            return
        first = self.epoch * self.number * tries + share
        indices = list(range(first, first + requested * tries * shares, shares)) if requested else None

        def of_each(texts: Sequence[str]) -> Iterator[str]:
            return (texts[k % len(texts)] for k in indices or count(first, shares))

        choices, seeds = dict(self.choices), (self.seed + k for k in indices or count(first, shares))
        on_step = choices.pop("callback", None)

        def end_if_over(step: int, latents: Tensor) -> None:
            if over.is_set():  # nobody reads the rest of this batch
                raise InterruptedError
            if on_step:
                on_step(step, latents)

        if isinstance(negatives := choices.get("negative_prompt"), list):
            choices["negative_prompt"] = of_each(negatives)
        stream = self.pipeline.stream(
            of_each(self.prompts), seeds=seeds, tasks=self._tasks, callback=end_if_over, **choices
        )
        samples = self._in_turns(stream, over)
        passing = (sample for sample in samples if not (self.trusted and sample.is_doubtful))
        number = 0
        for sample in islice(passing, requested):
            number += 1
            yield sample
        if requested is not None and number < requested:
            raise GateFailed(f"trusted: {number} of {requested * tries} samples are", "Use other prompts.")

    def _in_turns(self, samples: Iterator[Sample], over: Event) -> Iterator[Sample]:
        """The samples, none any more once it is over: who waits for the end of this thread may be in the middle of a
        call of the pipeline, for whose end this thread would wait.
        """
        turn = self.pipeline._turn
        while not over.is_set():
            if turn.acquire(timeout=POLL_SECONDS):
                try:
                    sample = next(samples, None)
                finally:
                    turn.release()
                if sample is None:
                    return
                yield sample


class MakeSamples:
    """A class for `ray.data.Dataset.map_batches`: rows with a prompt and a seed get an image and labels."""

    def __init__(self, model: str = "demo", tasks: Sequence[str] = ("semantic",), choices: Any = None, **options: Any):
        """`choices` are those of `Pipeline.stream`, `options` those of `Pipeline.from_pretrained`."""
        self.tasks, self.choices = tuple(tasks), dict(choices or {})
        self.pipeline = Pipeline.from_pretrained(model, **options)
        self.tables = number_tables(self.pipeline, self.tasks, self.choices)["labels"]

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The rows with `image`, `trusted`, and each label: maps as arrays, things as the records of a run in JSON."""
        seeds = [int(seed) for seed in rows["seed"]]
        samples = self.pipeline(list(map(str, rows["prompt"])), seeds, tasks=self.tasks, **self.choices).samples
        columns = {"image": np.stack([sample.image for sample in samples])}
        columns["trusted"] = np.array([not sample.is_doubtful for sample in samples])
        for task in self.tasks:
            kind, table, labels = kind_of(task), self.tables[task], [sample.annotations for sample in samples]
            if kind.coco_file:
                columns[task] = np.array([json.dumps(kind.encode(each[task], each, table)[1]) for each in labels])
            else:
                columns[task] = np.stack([np.asarray(kind.arrays(each[task], table)) for each in labels])
        return {**rows, **columns}


def number_tables(pipeline: Pipeline, tasks: Sequence[str], choices: Mapping[str, Any]) -> Mapping[str, Any]:
    """The classes of these labels and the table of each, as run.json has them."""
    choices = {name: value for name, value in choices.items() if name not in ("batch_size", "callback")}
    recipe, _ = pipeline.prepare([], [], tasks=tasks, **choices)
    return number_classes(label_tables(pipeline.engine, recipe))


def _no_sharing() -> Refused:
    return Refused(
        "pipeline: an engine cannot be shared with the worker processes of a DataLoader",
        "Give a function that opens it, such as functools.partial(Pipeline.from_pretrained, 'demo').",
    )
