"""The training loop: epochs, steps, logging, stopping.

Nothing in a step waits for the device. Sums of the loss and its parts, and the watch for values that are not
finite, stay there until a logging interval ends.
"""

import math
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cakd_cli.data import Batch, ImageDataSet
from cakd_cli.engine import limits
from cakd_cli.engine.answers import Answers
from cakd_cli.engine.average import Average
from cakd_cli.engine.guard import Guard
from cakd_cli.engine.optimizer import flat_state, load_flat_state, make_optimizer
from cakd_cli.engine.progress import Progress
from cakd_cli.engine.run_directory import Checkpoint, RunDirectory
from cakd_cli.engine.schedule import learning_rate
from cakd_cli.engine.stopping import StopRequest
from cakd_cli.engine.task import Task
from cakd_cli.errors import DivergedError, InputError, StoppedError
from cakd_cli.evaluation import metrics
from cakd_cli.evaluation.predict import predict
from cakd_cli.recipe.schema import Recipe

# An epoch as short as this needs no advice on how to make it shorter.
_WORTH_A_LINE_SECONDS = 5.0


class Trainer:
    """Everything that changes while a run runs, and how to save and restore it."""

    def __init__(
        self,
        task: Task,
        answers: Answers | None,
        data: ImageDataSet,
        recipe: Recipe,
        run: RunDirectory,
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        self.task = task
        self.answers = answers
        self.data = data
        self.recipe = recipe
        self.run = run
        self.progress = progress
        self.stop = stop
        self.hardware = task.hardware
        self.parameters = [*task.student.parameters(), *task.learners.parameters()]
        self.optimizer = make_optimizer(recipe.optimizer, self.parameters)
        self.average = Average(task.student, recipe.engine.ema_decay) if recipe.engine.ema_decay else None
        self.guard = Guard(self.optimizer, self.hardware.device)
        self.steps_per_epoch = len(data.train) // recipe.engine.batch_size
        self.epoch = 0  # epochs completed
        self.step = 0  # steps completed in the epoch under way
        self.part_names: list[str] = []
        self.sums: Tensor | None = None
        self.pulls: list[float] = []  # of each term at the logits, in the epoch's first batch
        self.best: dict[str, Any] | None = None
        self.best_state: dict[str, Tensor] = {}
        self._balance_said = False
        self._saved_at = time.monotonic()

    @property
    def network(self) -> nn.Module:
        """The network that is validated and saved: the average where there is one."""
        return self.average.network if self.average is not None else self.task.student

    def fit(self) -> None:
        """Train to the last epoch; the best network on the validation split is then in ``best_state``.

        Raises:
            DivergedError: If a loss or gradient is not finite; no weight has been touched by it.
            StoppedError: If a signal asked for it; a checkpoint has been saved.
        """
        limit_said = False
        while self.epoch < self.recipe.engine.epochs:
            line = self.train_epoch() | self._validate()
            self.epoch, self.step, self.sums = self.epoch + 1, 0, None
            self.run.append_metrics(line)
            self.progress.epoch(line)
            if not limit_said and line["seconds"] > _WORTH_A_LINE_SECONDS:
                self.progress.note(limits.sentence(line["time"], self.recipe))
                limit_said = True
            self._save_if_due(last=self.epoch == self.recipe.engine.epochs)
            self._stop_if_asked()
        if not self.best_state:
            self.best_state = _copy(self.network.state_dict())

    def train_epoch(self) -> dict[str, Any]:
        """Train from the step that has been reached to the end of the epoch; returns its line for metrics.jsonl."""
        engine, watch = self.recipe.engine, self.task.watch
        self.task.student.train()
        started, first_step, rate = time.perf_counter(), self.step, 0.0
        watch.reset()
        for batch, teacher in self._taught_batches():
            rate = self._set_learning_rate()
            for part in _cut(batch.images, batch.labels, teacher, parts=engine.gradient_accumulation):
                total, parts = self.task.loss(*part, self.epoch + 1)
                with watch("backward"):
                    (total / engine.gradient_accumulation).backward()
                self._add(parts)
            with watch("optimizer"):
                # The sum over the epoch holds the loss of every part of this batch.
                assert self.sums is not None
                self.guard.look(self.sums[0], self.parameters, self.epoch * self.steps_per_epoch + self.step)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                if self.average is not None:
                    self.average.update(first=self.epoch == self.step == 0)
            self.step += 1
            if self.step % engine.log_interval == 0 and self.step < self.steps_per_epoch:
                means = self._means()
                seconds = time.perf_counter() - started
                images_per_second = (self.step - first_step) * engine.batch_size / seconds
                self._say_imbalance()
                self.progress.step(epoch=self.epoch, step=self.step, images_per_second=images_per_second, parts=means)
                self._save_if_due()
            if self.step < self.steps_per_epoch:
                self._stop_if_asked()
        means = self._means()
        self._say_imbalance()
        weights = self.task.weights.varying(self.epoch + 1)
        self.task.end_epoch(means)
        seconds = time.perf_counter() - started
        return {
            "epoch": self.epoch + 1,
            "step": (self.epoch + 1) * self.steps_per_epoch,
            "learning_rate": rate,
            "seconds": round(seconds, 3),
            "images_per_second": round((self.step - first_step) * engine.batch_size / seconds, 1),
            "time": {part: round(share, 4) for part, share in watch.shares(seconds).items()},
            **({} if self.answers is None else {"teacher": self.answers.take_counts()}),
            **({"weights": weights} if weights else {}),
            **({"pull": self.task.balance(self.pulls)} if len(self.pulls) > 1 else {}),
            "train": means,
        }

    def _taught_batches(self) -> Iterator[tuple[Batch, Tensor | None]]:
        batches = self.task.watch.each(
            "data",
            self.data.train.train_batches(
                batch_size=self.recipe.engine.batch_size,
                seed=self.recipe.seed,
                epoch=self.epoch,
                start=self.step,
                device=self.hardware.device,
            ),
        )
        if self.answers is not None:
            return self.answers.alongside(batches, self.task.watch)
        return ((batch, None) for batch in batches)

    def _set_learning_rate(self) -> float:
        rate = learning_rate(
            self.recipe.schedule,
            self.recipe.optimizer.learning_rate,
            step=self.epoch * self.steps_per_epoch + self.step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.recipe.engine.epochs,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _add(self, parts: Mapping[str, Tensor]) -> None:
        values = torch.stack(list(parts.values()))
        if self.sums is None:
            self.part_names = list(parts)
            self.sums = torch.zeros_like(values)
        self.sums += values

    def _means(self) -> dict[str, float]:
        """Mean of each part over the epoch so far. The one place where the host waits for the device."""
        assert self.sums is not None
        guard = torch.stack([self.guard.raised, self.guard.first_bad_step])
        values = torch.cat([self.sums, guard, self.task.pulls]).tolist()
        count = len(self.sums)
        sums, (raised, first_bad), self.pulls = values[:count], values[count : count + 2], values[count + 2 :]
        if raised:
            where = f"step {int(first_bad)} (epoch {int(first_bad) // self.steps_per_epoch + 1})"
            bad = [name for name, value in zip(self.part_names, sums, strict=True) if not math.isfinite(value)]
            what = f"the loss ({', '.join(bad)})" if bad else "a gradient"
            raise DivergedError(
                f"{what} is not finite at {where}; the weights were left as they were before it",
                hint=self._hint_on_divergence(),
            )
        parts = self.step * self.recipe.engine.gradient_accumulation
        return {name: value / parts for name, value in zip(self.part_names, sums, strict=True)}

    def _say_imbalance(self) -> None:
        """Say once, when the host first looks at the device anyway, that a term hardly counts beside another."""
        if self.epoch == 0 and not self._balance_said:
            self._balance_said = True
            for line in self.task.imbalance(self.pulls):
                self.progress.note(line)

    def _hint_on_divergence(self) -> str:
        hint = "lower optimizer.learning_rate or the weight of a loss term, or set schedule.warmup_epochs"
        return hint + (", or engine.precision=fp32" if self.hardware.precision == "bf16" else "")

    def _validate(self) -> dict[str, Any]:
        if self.data.validation is None:
            return {}
        logits, labels = predict(
            self.network,
            self.data.validation,
            self.task.normalisation,
            self.hardware,
            batch_size=self.recipe.engine.evaluation_batch_size,
        )
        figures = metrics.brief(logits, labels)
        if not math.isfinite(figures["nll"]):
            raise DivergedError(
                f"the answers to held-out images are not finite after epoch {self.epoch + 1}",
                hint=self._hint_on_divergence(),
            )
        if metrics.is_better(figures, self.best):
            self.best = {"epoch": self.epoch + 1, **figures}
            self.best_state = _copy(self.network.state_dict())
        return {"validation": figures}

    def _stop_if_asked(self) -> None:
        if self.stop.signal_name is None or self.epoch == self.recipe.engine.epochs:
            return
        if self.sums is not None:
            self._means()  # a checkpoint of a diverged run would be of no use
        self._save()
        command = "distill" if self.recipe.teacher else "train-teacher"
        raise StoppedError(
            f"stopped by {self.stop.signal_name} after epoch {self.epoch}, step {self.step}; checkpoint saved",
            hint=f"cakd {command} --resume --out {shlex.quote(str(self.run.path))}",
        )

    def _save_if_due(self, *, last: bool = False) -> None:
        if last or time.monotonic() - self._saved_at >= self.recipe.engine.checkpoint_seconds:
            self._save()

    def _save(self) -> None:
        training = {f"optimizer.{key}": tensor for key, tensor in flat_state(self.optimizer).items()}
        if self.average is not None:
            training |= {f"average.{key}": tensor for key, tensor in self.average.network.state_dict().items()}
        training |= {f"learners.{key}": tensor for key, tensor in self.task.learners.state_dict().items()}
        training["random.cpu"] = torch.get_rng_state()
        if self.hardware.device.type == "cuda":
            training["random.cuda"] = torch.cuda.get_rng_state(self.hardware.device)
        if self.sums is not None:
            training["sums"] = self.sums
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "part_names": self.part_names,
            "best": self.best,
            "weights": self.task.weights.state(),
            "pulls": {"epoch": self.task.pulls_epoch, "values": self.task.pulls.tolist(), "said": self._balance_said},
        }
        self.run.save_checkpoint(Checkpoint(self.task.student.state_dict(), training, self.best_state, state))
        self._saved_at = time.monotonic()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a saved moment.

        Raises:
            InputError: If its parts do not fit the run.
        """
        try:
            self._restore(checkpoint)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(
                f"{self.run.path}: damaged checkpoint: {what}", hint="start again with --overwrite"
            ) from error

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.task.student.load_state_dict(checkpoint.model)
        tensors = checkpoint.training
        load_flat_state(self.optimizer, self.parameters, _under("optimizer.", tensors))
        if self.average is not None:
            self.average.network.load_state_dict(_under("average.", tensors))
        self.task.learners.load_state_dict(_under("learners.", tensors))
        torch.set_rng_state(tensors["random.cpu"])
        if self.hardware.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.hardware.device)
        self.sums = tensors["sums"].to(self.hardware.device) if "sums" in tensors else None
        self.epoch, self.step = int(checkpoint.state["epoch"]), int(checkpoint.state["step"])
        if not (0 <= self.epoch <= self.recipe.engine.epochs and 0 <= self.step < self.steps_per_epoch):
            raise ValueError(f"epoch {self.epoch}, step {self.step} lies outside the run")
        self.part_names, self.best = checkpoint.state["part_names"], checkpoint.state["best"]
        if "pulls" in checkpoint.state:  # which an earlier version did not save
            self.task.weights.restore(checkpoint.state["weights"])
            pulls = checkpoint.state["pulls"]
            self.task.pulls_epoch, self._balance_said = pulls["epoch"], pulls["said"]
            self.task.pulls = torch.tensor(pulls["values"], device=self.hardware.device)
        self.best_state = checkpoint.best


def _cut(
    images: Tensor, labels: Tensor, teacher: Tensor | None, *, parts: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    answers = [None] * parts if teacher is None else teacher.chunk(parts)
    yield from zip(images.chunk(parts), labels.chunk(parts), answers, strict=True)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
