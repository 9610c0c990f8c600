"""The training loop, and what changes while it runs."""

import contextlib
import math
import shlex
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cakd_cli.data import Batch
from cakd_cli.engine import advice
from cakd_cli.engine.build import Job
from cakd_cli.engine.optimizer import Optimizer
from cakd_cli.engine.progress import Progress
from cakd_cli.engine.run_directory import RunDirectory
from cakd_cli.engine.state import seed_of_rank, snapshot
from cakd_cli.engine.stopping import StopRequest, name_of
from cakd_cli.engine.tracking import Tracker
from cakd_cli.errors import DivergedError, StoppedError
from cakd_cli.evaluation import metrics
from cakd_cli.evaluation.teacher_check import IMAGES, Part
from cakd_cli.losses import Weights
from cakd_cli.machine.memory import is_out_of_memory
from cakd_cli.machine.sharding import whole_state
from cakd_cli.models.layers import Answers

# An epoch as short as this needs no advice on how to make it shorter.
_WORTH_A_LINE_SECONDS = 5.0


class Trainer:
    """Everything that changes while a run runs."""

    def __init__(
        self, job: Job, run: RunDirectory, progress: Progress, stop: StopRequest, tracker: Tracker | None = None
    ) -> None:
        self.job, self.run, self.progress, self.stop = job, run, progress, stop
        self.tracker = tracker or Tracker()
        self.recipe, self.data, self.task, self.source = job.recipe, job.data, job.task, job.source
        self.ranks = job.ranks
        self.parallel = job.ranks.wrap(job.task)
        self._graph_known = False
        self.hardware = job.hardware
        self.share = job.ranks.share(job.recipe)
        self.steps_per_epoch = self.share.steps(len(job.data.train), job.recipe.engine.batch_size)
        self.optimizer = Optimizer(job.task, job.recipe, self.steps_per_epoch, job.ranks, job.average)
        self.weights = Weights(job.recipe.loss)
        self.epoch = 0  # epochs completed
        self.step = 0  # steps completed in the epoch under way
        self.part_names: list[str] = []
        self.sums: Tensor | None = None
        # How strongly each term acts on the logits, in the first batch of an epoch: on the device, and as last read.
        self.norms: Tensor = torch.zeros(len(job.recipe.loss), device=job.hardware.device)
        self.norms_epoch = 0
        self.read_norms: list[float] = []
        self.best: dict[str, Any] | None = None
        self.best_state: dict[str, Tensor] = {}
        self.balance_said = False
        self._saved_at = time.monotonic()
        seed_of_rank(self)

    @property
    def network(self) -> nn.Module:
        """The network that is validated and saved: the average where there is one."""
        return self.task.student if self.optimizer.average is None else self.optimizer.average.network

    def fit(self) -> None:
        """Train to the last epoch; the best network on the validation split is then in ``best_state``.

        Raises:
            DivergedError: If a loss or gradient is not finite; no weight has been touched by it.
            StoppedError: If a signal asked for it; a checkpoint has been saved.
        """
        limit_said = False
        while self.epoch < self.recipe.engine.epochs:
            line = self.train_epoch() | self.validate()
            self.epoch, self.step, self.sums = self.epoch + 1, 0, None
            if self.ranks.first:
                self.run.append_metrics(line)
                self.tracker.epoch(line)
            self.progress.epoch(line)
            if not limit_said and line["seconds"] > _WORTH_A_LINE_SECONDS:
                self.progress.note(advice.sentence(line["time"], self.recipe, fast_bf16=self.hardware.fast_bf16))
                limit_said = True
            self._save_or_stop(last=self.epoch == self.recipe.engine.epochs)
        if not self.best_state:
            self.ranks.share_buffers(self.network)
            self.best_state = _copy(whole_state(self.network))

    def train_epoch(self) -> dict[str, Any]:
        """Train from the step that has been reached to the end of the epoch; returns its line for metrics.jsonl."""
        engine = self.recipe.engine
        self.task.train()
        started, first_step = time.perf_counter(), self.step
        self.task.watch.reset()
        with contextlib.closing(self._batches()) as batches:
            for batch, answers in batches:
                self.train_step(batch, answers)
                self.progress.tick(epoch=self.epoch, step=self.step)
                if self.step == self.steps_per_epoch:
                    break
                if self.step % engine.log_interval == 0:
                    means = self._means()
                    rate = self._images(first_step) / (time.perf_counter() - started)
                    self._say_imbalance()
                    self.progress.step(epoch=self.epoch, step=self.step, images_per_second=rate, parts=means)
                self._save_or_stop()
        means = self._means()  # waits for the device: the time is told after it
        return self._end_epoch(means, time.perf_counter() - started, self._images(first_step))

    def _images(self, first_step: int) -> int:
        """Count the images of the epoch since a step; the last batch may be incomplete."""
        size = self.recipe.engine.batch_size
        return min(self.step * size, len(self.data.train)) - first_step * size

    def train_step(self, batch: Batch, answers: Answers | None) -> None:
        """Learn from one batch, in the parts that the recipe asks for.

        Raises:
            DeviceFullError: If the device has no room for a part.
        """
        try:
            self._learn(batch, answers)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise advice.device_full(self.recipe, self.ranks.count, error) from error

    def _learn(self, batch: Batch, answers: Answers | None) -> None:
        parts = self.recipe.engine.gradient_accumulation
        terms, number = self.weights.at(self.epoch + 1), self.epoch + 1
        for i, (part, part_answers) in enumerate(_cut(batch, answers, parts)):
            with self._exchange(last=i == parts - 1):
                step = self.parallel(part, part_answers, terms, number, norms=self.norms_epoch != number)
                if step.gradient_norms is not None:
                    self.norms_epoch, self.norms = number, self._norms_of_all(step.gradient_norms)
                with self.task.watch("backward"):
                    self.optimizer.backward(step, parts)
            self._add(step.parts)
        self._graph_known = True
        with self.task.watch("optimizer"):
            # The sum over the epoch holds the loss of every part of this batch.
            assert self.sums is not None
            loss = self.sums[self.part_names.index("loss")]
            self.optimizer.step(self.epoch * self.steps_per_epoch + self.step, loss)
        self.step += 1

    def _exchange(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Average the gradients over the processes with the last part of a batch alone, once their graph is known."""
        if last or not isinstance(self.parallel, DistributedDataParallel) or not self._graph_known:
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _norms_of_all(self, norms: Tensor) -> Tensor:
        """Combine each process's norms of a gradient that all have a share of; -1 stays."""
        if self.ranks.count == 1:
            return norms
        return torch.where(norms < 0, norms, (self.ranks.mean(norms.square()) / self.ranks.count).sqrt())

    def _batches(self) -> Generator[tuple[Batch, Answers | None], None, None]:
        batches = self.task.watch.each(
            "data",
            self.data.train.train_batches(
                batch_size=self.recipe.engine.batch_size,
                seed=self.recipe.seed,
                epoch=self.epoch,
                start=self.step,
                device=self.hardware.device,
                share=self.share,
            ),
        )
        if self.source is None:
            yield from ((batch, None) for batch in batches)
        else:
            yield from self.source.beside(batches, self.task.watch)

    def _end_epoch(self, means: dict[str, float], seconds: float, images: int) -> dict[str, Any]:
        number = self.epoch + 1
        self._say_imbalance()
        norms = advice.norms_by_term(self.recipe.loss, self.read_norms)
        changing = self.weights.changing(number)
        self.weights.end_epoch(self.task.parts_by_term(means))
        return {
            "epoch": number,
            "step": number * self.steps_per_epoch,
            "learning_rate": self.optimizer.learning_rate(number * self.steps_per_epoch - 1),
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds, 1),
            "time": {part: round(share, 4) for part, share in self.task.watch.shares(seconds).items()},
            **({} if self.source is None else {"teacher": self._counts()}),
            **({"weights": changing} if changing else {}),
            **({"gradient_norm": norms} if len(self.read_norms) > 1 else {}),
            "train": means,
        }

    def _counts(self) -> dict[str, int]:
        """Images asked about and remembered, by all processes."""
        assert self.source is not None
        counts = self.ranks.gathered(self.source.take_counts())
        return {key: sum(count[key] for count in counts) for key in counts[0]}

    def _add(self, parts: Mapping[str, Tensor]) -> None:
        # A share of the step: a later start may cut its batches otherwise.
        values = torch.stack(list(parts.values())) / self.recipe.engine.gradient_accumulation
        if self.sums is None:
            self.part_names = list(parts)
            self.sums = torch.zeros_like(values)
        self.sums += values

    def _means(self) -> dict[str, float]:
        """Mean of each part over the epoch so far. The one place in an epoch where the host waits for the device."""
        assert self.sums is not None
        guard = torch.stack([self.optimizer.raised, self.optimizer.first_bad_step])
        values = torch.cat([self.ranks.mean(self.sums), guard, self.norms]).tolist()
        count = len(self.sums)
        sums, (raised, first_bad), self.read_norms = values[:count], values[count : count + 2], values[count + 2 :]
        if raised:
            where = f"step {int(first_bad)} (epoch {int(first_bad) // self.steps_per_epoch + 1})"
            bad = [name for name, value in zip(self.part_names, sums, strict=True) if not math.isfinite(value)]
            what = f"the loss ({', '.join(bad)})" if bad else "a gradient"
            raise DivergedError(
                f"{what} is not finite at {where}; the weights were left as they were before it",
                hint=self._hint_on_divergence(),
            )
        return {name: value / self.step for name, value in zip(self.part_names, sums, strict=True)}

    def _say_imbalance(self) -> None:
        """Say once, when the host first looks at the device anyway, that a term hardly counts beside another."""
        if self.epoch == 0 and not self.balance_said:
            self.balance_said = True
            for line in advice.imbalance(self.weights, self.read_norms):
                self.progress.warn(line)

    def _hint_on_divergence(self) -> str:
        hint = "lower optimizer.learning_rate or the weight of a loss term, or set schedule.warmup_epochs"
        return hint + (", or engine.precision=fp32" if self.hardware.is_half else "")

    def validate(self) -> dict[str, Any]:
        """Measure the network on held-out images and keep the best; the literature notes the best on the test's."""
        name: Part = "test" if self.recipe.protocol == "literature" else "validation"
        split = getattr(self.data, name)
        if split is None:
            return {}
        self.ranks.share_buffers(self.network)
        size = self.recipe.engine.evaluation_batch_size
        answers = self.ranks.predict(self.network, split, self.task.normalisation, self.hardware, batch_size=size)
        figures = self.ranks.told(metrics.brief(*answers))
        if not math.isfinite(figures["nll"]):
            raise DivergedError(
                f"the answers to {IMAGES[name]} images are not finite after epoch {self.epoch + 1}",
                hint=self._hint_on_divergence(),
            )
        if metrics.is_better(figures, self.best):
            self.best = {"epoch": self.epoch + 1, **figures}
            if name == "validation":
                self.best_state = _copy(whole_state(self.network))
        return {name: figures}

    def _save_or_stop(self, *, last: bool = False) -> None:
        """Save if it is time, and stop if somebody asked one of the processes to."""
        due = last or time.monotonic() - self._saved_at >= self.recipe.engine.checkpoint_seconds
        number, due_somewhere = self.ranks.agreed(self.stop.number, due)
        if due_somewhere or (number and not last):
            self._save()
        if number and not last:
            command = "distill" if self.recipe.teacher else "train-teacher"
            raise StoppedError(
                f"stopped by {name_of(number)} after epoch {self.epoch}, step {self.step}; checkpoint saved",
                hint=f"cakd {command} --resume --out {shlex.quote(str(self.run.path))}",
            )

    def _save(self) -> None:
        if self.sums is not None:
            self._means()  # a checkpoint of a diverged run would be of no use
        checkpoint = snapshot(self)
        if self.ranks.first:
            self.run.checkpoints.save(checkpoint)
        self._saved_at = time.monotonic()


def _cut(batch: Batch, answers: Answers | None, parts: int) -> Iterator[tuple[Batch, Answers | None]]:
    """Cut a batch, and the answers to it, into equal parts."""
    if parts == 1:
        yield batch, answers
        return
    cut: dict[str, Any] = {
        name: (None,) * parts if value is None else value.chunk(parts) for name, value in batch._asdict().items()
    }
    for i in range(parts):
        part = Batch(**{name: values[i] for name, values in cut.items()})
        yield part, None if answers is None else {name: answer.chunk(parts)[i] for name, answer in answers.items()}


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
