"""The loop: how do the weights change?"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from bit_mixup.checkpoint import digest_weights, restore_checkpoint, save_checkpoint
from bit_mixup.environment import Speedups
from bit_mixup.errors import Interrupted, MemoryShortError, NonFiniteError
from bit_mixup.expansion import DataMeans
from bit_mixup.hyperrule import HyperParameters, learning_rate
from bit_mixup.interruption import Interruption
from bit_mixup.laws import TrainingLaw
from bit_mixup.layers import KeptFilters, quick_layers
from bit_mixup.loading import Stream, load_batches
from bit_mixup.losses import training_loss
from bit_mixup.memory import (
    Cuts,
    avoid_broken_primitives,
    find_cuts,
    free_bytes,
    is_out_of_memory,
    kept_memory,
    largest_pass,
    release_memory,
    smaller_cuts,
)
from bit_mixup.mixup import Place
from bit_mixup.models import Network, as_input
from bit_mixup.objectives import Objective, SoftmaxCrossEntropy
from bit_mixup.runs import RunFolder
from bit_mixup.sampling import MicroBatch, PositionBatches, cut_batch
from bit_mixup.storage import write_json
from bit_mixup.voting import Council

Trained = TypeVar("Trained", bound=Network)


def train(
    model: Trained,
    stream: Stream,
    hyper: HyperParameters,
    accelerator: Accelerator,
    *,
    law: TrainingLaw,
    cuts: Sequence[list[MicroBatch]],
    run: RunFolder,
    objective: Objective = SoftmaxCrossEntropy(),  # noqa: B008  (it has no state)
    means: DataMeans | None = None,
    watch: Callable[[int, Trained], None] | None = None,
    watch_every: int = 1,
    speedups: Speedups = Speedups(),  # noqa: B008  (it is frozen)
    seed: int = 0,
    num_workers: int = 0,
    log_every: int = 10,
    save_every: int = 100,
    keep_checkpoints: int = 2,
) -> Trained:
    """Trains the weights of a model that are not frozen by SGD, from the newest checkpoint of the run if there is one.

    Fine-tuning, of all weights, some or the head alone, pre-training and distillation are this loop with other data, rates and
    objectives.

    The gradient of a step is the mean over the examples of the global batch, whatever the cut into processes and micro-batches.

    Args:
        model: with the head that is to be trained; frozen weights (`bit_mixup.models.freeze`) get neither steps nor decay.
        stream: gives the example at each position of the run.
        hyper: rates, batch and length of the run.
        accelerator: of this process; its own gradient accumulation must be 1.
        law: what is done to pictures, labels and features. Its alpha counts, not that of `hyper`.
        cuts: for each process its micro-batches of a global batch (`bit_mixup.sampling.cut_batch`).
        run: where metrics and checkpoints are written.
        objective: the loss.
        means: of the training set, where `law.needs_means`.
        watch: called with the number of steps done and the model, in all processes; must leave the weights alone.
        watch_every: period in steps of these calls; there is always one at the end.
        speedups: how steps are computed; of the result they change rounding alone.
        seed: of all that the law draws.
        num_workers: processes that decode pictures.
        log_every: period in steps at which the device is waited for, metrics are written and losses are checked.
        save_every: period in steps of checkpoints; there is always one at the end.
        keep_checkpoints: how many of the newest stay.

    Returns:
        The model given, trained.

    Raises:
        NonFiniteError: a loss or weight was not finite. No checkpoint holds one.
        MemoryShortError: memory does not do for the smallest micro-batch. Before that, smaller ones are tried, alike in all
            processes, then gradient checkpointing; neither changes the result, but for rounding.
        CheckpointError: metrics or a checkpoint can not be written.
        ProcessError: processes start from different weights or steps.
        Interrupted: a signal asked for it; a checkpoint of the last step holds all.
    """
    setting = model, stream, hyper, accelerator, law, objective, means, speedups, seed, num_workers
    with closing(StepWork(*setting)) as work, Interruption(deferring=True) as signals:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A fused step hides from Accelerate whether fp16's loss scale was too large.
        fused = speedups.fused_optimizer and accelerator.scaler is None
        optimizer = torch.optim.SGD(trained, lr=0.0, momentum=hyper.momentum, weight_decay=hyper.weight_decay, fused=fused)
        done = first_step = restore_checkpoint(run, model, optimizer, scaler=accelerator.scaler)
        wrapped = accelerator.prepare_optimizer(optimizer)
        # Accelerate's wrapper searches for another optimizer's package in each step; only fp16's loss scale needs it.
        update = wrapped if accelerator.scaler else optimizer
        council = Council(accelerator)
        council.agree(lambda: {"the steps done": first_step, "the weights (digest)": digest_weights(model)})
        work.cut(cuts, first_step=first_step)
        model.train()
        with closing(StepLog(accelerator, run, stream, hyper, work, first_step=first_step)) as log:
            while done < hyper.steps:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(done, hyper)
                losses = work.fitting(done)
                memory_is_short, stopping = council.largest(losses is None, signals.number)
                if losses is None or memory_is_short:  # here or in another process
                    update.zero_grad()
                    log.say(work.retreat(done))
                    continue
                _sum_gradients(model, accelerator)
                update.step()
                update.zero_grad()
                log.add(done, *losses, _norm(trained), skipped=wrapped.step_was_skipped)
                done += 1
                saving, watching = (done % every == 0 or done == hyper.steps for every in (save_every, watch_every))
                if saving or stopping or (watch and watching) or done % log_every == 0:
                    log.flush()
                if watch and watching:
                    watch(done, model)
                    model.train()
                if (saving or stopping) and accelerator.is_main_process:
                    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
                    save_checkpoint(run, done, model, optimizer, scaler=scaler, keep=keep_checkpoints)
                if stopping:
                    accelerator.wait_for_everyone()
                    raise Interrupted(
                        stopping, f"stopped after step {done}; {run.checkpoint(done)} holds it. Go on with --resume."
                    )
    accelerator.wait_for_everyone()
    return model


def fit_micro_batch(
    model: Network,
    stream: Stream,
    hyper: HyperParameters,
    accelerator: Accelerator,
    *,
    law: TrainingLaw,
    estimate: Callable[[int], int],
    known: int | None = None,
    local_processes: int = 1,
    objective: Objective = SoftmaxCrossEntropy(),  # noqa: B008  (it has no state)
    means: DataMeans | None = None,
    speedups: Speedups = Speedups(),  # noqa: B008  (it is frozen)
    seed: int = 0,
) -> Cuts:
    """The cut into the largest micro-batches that fit into memory, by an estimate and then by trying the first of them.

    Args:
        model: to be trained; it is moved to the device, and not changed.
        stream: as in `train`.
        hyper: as in `train`.
        accelerator: of this process.
        law: as in `train`.
        estimate: memory in bytes that a process takes, by the examples of its largest backward pass.
        known: what was found before; a resumed run takes the same, so that it ends in the same bits.
        local_processes: that share this machine.
        objective: as in `train`.
        means: as in `train`.
        speedups: as in `train`.
        seed: as in `train`.

    Raises:
        MemoryShortError: not even the smallest fits.
    """
    world, group_size = accelerator.num_processes, law.group_size
    if known is not None:
        return cut_batch(hyper.batch_size, num_processes=world, micro_batch=known, group_size=group_size)
    work = StepWork(model, stream, hyper, accelerator, law, objective, means, speedups, seed, 0)
    model.train()
    council = Council(accelerator)
    free = -council.largest(-free_bytes(accelerator.device, local_processes=local_processes))[0]  # where there is least

    def attempt(cuts: Cuts) -> bool:
        work.cut(cuts, first_step=0)
        losses = work.fitting(0, passes=1)
        model.zero_grad()
        release_memory()
        return not council.largest(losses is None)[0]

    with closing(work):
        return find_cuts(
            batch_size=hyper.batch_size, num_processes=world, group_size=group_size, estimate=estimate, free=free, attempt=attempt
        )


@dataclass
class StepWork:
    """The backward passes of a step, in pieces that fit into memory.

    Args:
        model: is moved to the device, and set up for training until `close`.
        stream: as in `train`, and so on.
    """

    model: Network
    stream: Stream
    hyper: HyperParameters
    accelerator: Accelerator
    law: TrainingLaw
    objective: Objective
    means: DataMeans | None
    speedups: Speedups
    seed: int
    num_workers: int

    def __post_init__(self) -> None:
        last = self.speedups.memory_format == "channels_last"
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.model.to(self.accelerator.device).to(memory_format=self.memory_format)
        self.setting = ExitStack()
        self.setting.enter_context(kept_memory(self.accelerator.device))
        if self.speedups.quick_layers:  # approximate mixup differentiates twice
            norms = self.law.form != "approximate"
            self.setting.enter_context(quick_layers(self.model, norms=norms, fused=self.speedups.fused_norms))
        self.dtype = next(self.model.parameters()).dtype
        self.checkpointing = False
        self.waited = 0.0  # seconds
        self.batches = self._batches([])

    def close(self) -> None:
        """Ends the processes that decode pictures, and leaves the model as it was."""
        self.batches.close()
        self.setting.close()
        self.model.to(memory_format=torch.contiguous_format)
        if self.checkpointing:
            self.model.set_grad_checkpointing(False)

    def cut(self, cuts: Sequence[list[MicroBatch]], *, first_step: int) -> None:
        """Reads from a step on in these micro-batches, one list for each process."""
        self.cuts = list(cuts)
        self.own = self.cuts[self.accelerator.process_index]
        self.batches.close()
        positions = PositionBatches(self.own, batch_size=self.hyper.batch_size, first_step=first_step, steps=self.hyper.steps)
        self.batches = self._batches(positions)

    def _batches(self, positions: Iterable[list[int]]) -> Generator[tuple[Tensor, Tensor]]:
        return load_batches(self.stream, positions, num_workers=self.num_workers, device=self.accelerator.device)

    def fitting(self, step: int, *, passes: int | None = None) -> tuple[Tensor, Tensor] | None:
        """`backward`, or None where that did not fit into memory."""
        try:
            return self.backward(step, self.own[:passes])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            avoid_broken_primitives(error)
        return None  # the error is gone now, and with it what it held on to

    def backward(self, step: int, cuts: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Adds the gradients of a step's micro-batches to the model's; this process's share of the mean loss, and of the least
        that it could be."""
        loss_sum = torch.zeros((), device=self.accelerator.device, dtype=self.dtype)
        floor_sum = torch.zeros_like(loss_sum)
        with self._filters(len(cuts)):
            for cut in cuts:
                images, labels = self.next_batch()
                images = as_input(self.model, images, self.dtype, self.memory_format)
                targets = self.objective.targets(labels, num_classes=int(self.model.num_classes), dtype=self.dtype)
                start = cut.positions(step, self.hyper.batch_size).start
                place = Place(seed=self.seed, step=step, start=start, groups=cut.groups)
                with self.accelerator.autocast():
                    loss, floor = training_loss(
                        self.model, images, targets, law=self.law, mixes=self.law.mixes_at(step, self.hyper.steps),
                        means=self.means, objective=self.objective, place=place,
                    )  # fmt: skip
                loss = loss * (cut.weight / self.hyper.batch_size)
                self.accelerator.backward(loss)
                loss_sum += loss.detach()
                floor_sum += floor.detach() * (cut.weight / self.hyper.batch_size)
        return loss_sum, floor_sum

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next pictures and labels, on the device."""
        since = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - since
        return batch

    def take_waited(self) -> float:
        """Seconds that were spent on waiting for pictures since this was asked last."""
        waited, self.waited = self.waited, 0.0
        return waited

    def _filters(self, passes: int) -> AbstractContextManager[None]:
        """Standardised filters for all passes of a step, where there are several."""
        if passes < 2 or not (self.speedups.quick_layers and self.speedups.keep_filters):
            return nullcontext()
        kind = self.accelerator.device.type
        with self.accelerator.autocast():
            half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return KeptFilters(self.model).for_passes(half)

    def retreat(self, step: int) -> str:
        """Makes less be computed at a time from a step on, alike in all processes, and says what; the result stays the same.

        Raises:
            MemoryShortError: it can not be less.
        """
        before, group_size = largest_pass(self.cuts), self.law.group_size
        release_memory()
        smaller = smaller_cuts(self.cuts, batch_size=self.hyper.batch_size, group_size=group_size)
        if smaller is not None:
            self.cut(smaller, first_step=step)
            return (
                f"step {step}: out of memory with micro-batches of {before}; going on with {largest_pass(smaller)} "
                f"({len(self.own)} a step). The batch stays {self.hyper.batch_size}, the result the same but for rounding."
            )
        if not self.checkpointing:
            self.checkpointing = True
            self.model.set_grad_checkpointing(True)
            self.cut(self.cuts, first_step=step)
            return (
                f"step {step}: out of memory with micro-batches of {before}, the smallest; going on with gradient checkpointing: "
                "activations are computed twice instead of kept. The result stays the same."
            )
        raise MemoryShortError(
            f"step {step}: out of memory even with {before} example(s) at a time and gradient checkpointing. The last whole "
            "checkpoint stands. Lower crop_size, choose a smaller model, or use --precision bf16 or a larger machine."
        )


def _sum_gradients(model: Network, accelerator: Accelerator) -> None:
    """Adds up the gradients of all processes, once a step.

    DistributedDataParallel would hide this behind the backward pass, but it puts gradients into another order after its first
    step, and with three processes or more the order of addition shows in the last bits: a resumed run would not end in the same.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [_as_it_lies(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    summed = accelerator.reduce(torch.cat(gradients), reduction="sum")
    for gradient, part in zip(gradients, summed.split([len(gradient) for gradient in gradients]), strict=True):
        gradient.copy_(part)


@torch.no_grad()  # or it would prepare to be differentiated
def _norm(weights: Sequence[Tensor]) -> Tensor:
    """Norm of all weights together: not finite where one of them is not."""
    on_cpu = weights[0].device.type == "cpu"  # where torch does not choose the quicker way by itself
    return get_total_norm(weights, foreach=True if on_cpu else None)


def _as_it_lies(tensor: Tensor) -> Tensor:
    """All numbers of a tensor in the order in which they lie in memory, without a copy.

    A gradient lies as its parameter does, and so in all processes alike.
    """
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return (tensor.permute(0, 2, 3, 1) if last else tensor).view(-1)


@dataclass
class StepLog:
    """Losses that wait on the device until they are asked for, all at once: reading one stops the device.

    Args:
        accelerator: of this process.
        run: where metrics are written.
        stream: names the examples of a bad step.
        hyper: for rates and batch size.
        work: knows how long pictures were waited for.
        first_step: of this start of the run.
    """

    accelerator: Accelerator
    run: RunFolder
    stream: Stream
    hyper: HyperParameters
    work: StepWork
    first_step: int
    _waiting: list[tuple[int, Tensor, Tensor, Tensor, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        main = self.accelerator.is_main_process
        if main:
            self.run.trim_metrics(self.first_step)
        self._bar: tqdm[Any] = tqdm(
            total=self.hyper.steps, initial=self.first_step, desc="training", unit="step", disable=not main, dynamic_ncols=True
        )
        self._since = time.perf_counter()

    def add(self, step: int, loss: Tensor, floor: Tensor, weight_norm: Tensor, *, skipped: bool) -> None:
        """Notes one step: this process's share of the mean loss and of the least that it could be, the norm of all weights after
        it, and whether fp16's loss scale was found too large, so that the step changed nothing."""
        self._waiting.append((step, loss, floor, weight_norm, skipped))

    def flush(self) -> None:
        """Writes what waits, in all processes together.

        Raises:
            NonFiniteError: a loss or the norm of the weights is not finite, in the first such step.
        """
        if not self._waiting:
            return
        steps, losses, floors, norms, skips = zip(*self._waiting, strict=True)
        self._waiting.clear()
        values, least = self.accelerator.reduce(torch.stack([torch.stack(losses), torch.stack(floors)]), reduction="sum").tolist()
        finite_norms = torch.stack(norms).isfinite().tolist()
        seconds = time.perf_counter() - self._since
        speed, waited = len(steps) * self.hyper.batch_size / seconds, self.work.take_waited() / seconds
        rows = [
            {
                "step": step,
                "loss": loss,
                "excess_loss": loss - floor,
                "lr": learning_rate(step, self.hyper),
                "images_per_second": round(speed, 1),
            }
            for step, loss, floor in zip(steps, values, least, strict=True)
        ]
        for row, skipped in zip(rows, skips, strict=True):
            row |= {"skipped": True} if skipped else {}
        bad = next((i for i, loss in enumerate(values) if not (abs(loss) < float("inf") and finite_norms[i])), len(rows))
        if self.accelerator.is_main_process:
            self.run.add_metrics(rows[:bad])
            self._bar.set_postfix(
                loss=f"{values[-1]:.4f}",
                lr=f"{rows[-1]['lr']:.2g}",
                images_per_s=f"{speed:.0f}",
                data_wait=f"{waited:.0%}",
                refresh=False,
            )
            self._bar.update(bad)
        for row in rows[:bad]:
            self.accelerator.log({"loss": row["loss"], "lr": row["lr"]}, step=row["step"])
        if bad < len(rows):
            self._stop(steps[bad], values[bad])
        self._since = time.perf_counter()

    def _stop(self, step: int, loss: float) -> None:
        first = step * self.hyper.batch_size
        ids = self.stream.ids(range(first, first + self.hyper.batch_size))
        if self.accelerator.is_main_process:
            write_json(self.run.nonfinite, {"step": step, "loss": str(loss), "examples": ids})
        self.close()
        what = f"the loss is {loss}" if not abs(loss) < float("inf") else f"a weight is not finite (the loss was {loss:.4g})"
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise NonFiniteError(
            f"step {step}: {what}. Its examples: {shown} (all in {self.run.nonfinite}). No checkpoint holds it. Lower --base-lr "
            "or look at these pictures; with fp16, try --precision bf16."
        )

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, once for all processes."""
        if self.accelerator.is_main_process:
            self._bar.write(text)

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()
