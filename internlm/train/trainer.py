"""The loop: batches in, reports out. All that a step does is here; what becomes of its report is not."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from internlm.config.schema import Config
from internlm.core.mesh import Mesh
from internlm.data.loader import StepBatch, TrainLoader, ValidLoader
from internlm.model.batch import Batch
from internlm.parallel.schedule import Schedule
from internlm.solver.hybrid_zero import HybridZero, StepResult
from internlm.solver.schedules import beta2_at, lr_at
from internlm.train.evaluate import evaluate
from internlm.train.metrics import BatchCounts, StepReport, StepSums, ValidReport, count_batch, perplexity
from internlm.train.routing import Routing, load_of
from internlm.train.state import TrainState
from internlm.utils.device import peak_flops, peak_memory, torch_dtype
from internlm.utils.errors import UserError
from internlm.utils.garbage import paused_collector
from internlm.utils.logger import common_warning, get_logger
from internlm.utils.timers import DeviceTimer, Timer

logger = get_logger(__name__)


class Trainer:
    """Trains on the batches of `train_loader`, one optimizer step each.

    They begin where `state` stands; it advances before a report is yielded, so a checkpoint written then stores a
    finished step. Every rank makes a trainer and runs the same steps.
    """

    def __init__(
        self,
        schedule: Schedule,
        optimizer: HybridZero,
        train_loader: TrainLoader,
        state: TrainState,
        config: Config,
        mesh: Mesh,
        valid_loaders: Mapping[str, ValidLoader],
        routing: Routing | None = None,
    ) -> None:
        assert routing is not None or config.model.num_experts == 1, "routing sets the weight of the routers' losses"
        self.schedule, self.optimizer, self.state, self.config, self.mesh = schedule, optimizer, state, config, mesh
        self.train_loader, self.valid_loaders = train_loader, valid_loaders
        self.routing = routing
        self.peak_flops = peak_flops(mesh.device, torch_dtype(config.model.dtype))
        self._fwd_bwd = DeviceTimer(mesh.device)
        self._skips_in_row = 0
        self._batches: Iterator[StepBatch] = iter(())
        self._fetched: tuple[StepBatch, Tensor | None] | None = None  # the next batch, and what all ranks hold in it

    def steps(self) -> Iterator[StepReport]:
        """Run until the loader ends, yielding a report after every batch.

        Raises UserError: no update was made for `monitor.max_skips_in_row` batches.
        """
        done, total = self.state.batch_count, self.config.data.total_steps
        if done >= total:
            logger.info(f"nothing to do: {done} batches are done, data.total_steps = {total}")
        self.train_loader.seek(done, self.state.place)
        self._batches = iter(self.train_loader)
        self._fetch()
        with paused_collector() as collect_garbage:
            while self._fetched is not None:
                collect_garbage()
                report = self._step(*self._fetched, Timer())
                every = self.config.data.valid_every
                yield replace(report, validation=self.validate()) if every and report.step % every == 0 else report
                self._check_skips_in_row()

    def _fetch(self) -> None:
        """Takes the next batch, if there is one, and starts to count it over the ranks."""
        batch = next(self._batches, None)
        self._fetched = None
        if batch is not None:
            facts = None if batch.skipped else count_batch(batch, self.config.model, self.mesh)
            self._fetched = batch, facts

    def validate(self) -> tuple[ValidReport, ...]:
        """Evaluate on every validation set."""
        return tuple(evaluate(self.schedule, loader, self.mesh) for loader in self.valid_loaders.values())

    def _step(self, batch: StepBatch, facts: Tensor | None, timer: Timer) -> StepReport:
        if facts is None:
            logger.info(f"batch {batch.index} is left out, as data.skip_batches asks")
            return self._skip(batch)
        counts = BatchCounts.of(facts, self.mesh.world.size)
        if counts.trained_tokens == 0:
            common_warning(logger, f"batch {batch.index} has no token to train on any rank; it is left out")
            return self._skip(batch)
        return self._train(batch, counts, timer)

    def _skip(self, batch: StepBatch) -> StepReport:
        """Counts a batch that is not computed, and reads the next one."""
        state = self.state
        state.batch_count, state.place = state.batch_count + 1, batch.end
        self._fetch()
        return StepReport(
            step=state.batch_count,
            step_count=state.step_count,
            skipped=True,
            num_consumed_tokens=state.num_consumed_tokens,
            inf_nan_skip_batches=state.inf_nan_skip_batches,
        )

    def _train(self, batch: StepBatch, counts: BatchCounts, timer: Timer) -> StepReport:
        """Forward, backward, update, and the one moment a step when the host waits for the device."""
        config, state = self.config, self.state
        lr = lr_at(config.lr_scheduler, config.adam.lr, config.data.total_steps, state.step_count)
        beta2 = beta2_at(config.beta2_scheduler, config.adam.adam_beta2, state.step_count)
        loss_scale = self.optimizer.loss_scale
        sums = self._forward_backward(batch, counts, loss_scale)
        result: StepResult = self.optimizer.step(lr, beta2)
        routed = self._end_routing(batch, result.ok)
        self._fetch()  # while the device computes
        totals, (grad_norm, ok, *experts) = sums.reduce(self.mesh, result.grad_norm, result.ok, *routed)
        seconds = timer.seconds
        self._advance(counts, bool(ok), grad_norm, batch)
        flops = counts.flops
        return StepReport(
            step=state.batch_count,
            step_count=state.step_count,
            updated=bool(ok),
            loss=totals.objective / counts.trained_tokens,
            perplexity=perplexity(totals.loss_sum / counts.trained_tokens),
            acc=totals.correct / counts.trained_tokens,
            grad_norm=grad_norm,
            lr=lr,
            adam_beta2=beta2,
            loss_scale=loss_scale,
            tgs=counts.tokens / self.mesh.world.size / seconds,
            tflops=flops.causal / seconds / 1e12,
            mfu=flops.causal / seconds / self.peak_flops,
            mfu_full=flops.full / seconds / self.peak_flops,
            hfu=flops.hardware / seconds / self.peak_flops,
            num_consumed_tokens=state.num_consumed_tokens,
            num_trained_tokens=counts.trained_tokens,
            inf_nan_skip_batches=state.inf_nan_skip_batches,
            micro_num=len(batch.micro_batches),
            num_samples_in_batch=counts.samples,
            largest_length=counts.largest_length,
            largest_batch=counts.largest_batch,
            smallest_batch=counts.smallest_batch,
            step_time=seconds,
            fwd_bwd_time=self._fwd_bwd.seconds,
            memory=peak_memory(self.mesh.device),
            types=totals.types,
            experts=load_of(experts),
        )

    def _forward_backward(self, batch: StepBatch, counts: BatchCounts, loss_scale: float) -> StepSums:
        """Accumulate the gradients of all micro batches; the engine sums them over the data ranks."""
        sums = StepSums(self.train_loader.type_names, self.mesh.device)
        rows = batch.micro_batches
        if self.routing is not None:
            self.routing.begin_step(loss_scale / self._num_rows(batch))
        self._fwd_bwd.start()
        self.schedule.train(rows, [self._weight(row, counts, len(rows)) * loss_scale for row in rows], sums.add)
        self._fwd_bwd.stop()
        return sums

    def _num_rows(self, batch: StepBatch) -> int:
        """Rows of the step on all data ranks."""
        return len(batch.micro_batches) * self.mesh.dp_size

    def _end_routing(self, batch: StepBatch, ok: Tensor) -> list[Tensor]:
        if self.routing is None or not self.routing.active:
            return []
        return [self.routing.end_step(self.mesh, self._num_rows(batch), ok)]

    def _weight(self, row: Batch, counts: BatchCounts, num_micro: int) -> float:
        """The factor on a micro batch's summed loss that makes the sum over ranks the step's mean."""
        if self.config.loss.reduction == "token":
            return 1 / counts.trained_tokens
        # The 2023 rule: the mean over micro batches and data ranks of each micro batch's mean.
        return 1 / (max(1, row.num_trained) * num_micro * self.mesh.dp_size)

    def _advance(self, counts: BatchCounts, ok: bool, grad_norm: float, batch: StepBatch) -> None:
        self.state.batch_count, self.state.place = self.state.batch_count + 1, batch.end
        self.state.num_consumed_tokens += counts.tokens
        if ok:
            self.state.step_count += 1
            self._skips_in_row = 0
            return
        self._skips_in_row += 1
        self.state.inf_nan_skip_batches += 1
        common_warning(
            logger,
            f"batch {batch.index}: the gradient norm is {grad_norm}; no update was made, weights and schedules stay "
            f"({self.state.inf_nan_skip_batches} such batches so far)",
        )

    def _check_skips_in_row(self) -> None:
        """Raises UserError after `monitor.max_skips_in_row` batches without an update.

        Weights that made a hundred batches overflow make the next hundred overflow too.
        """
        count, most = self._skips_in_row, self.config.monitor.max_skips_in_row
        if not 0 < most <= count:
            return
        done = self.state.batch_count
        raise UserError(
            f"batches {done - count} to {done - 1}: no gradient norm was finite, and no update was made since step "
            f"{self.state.step_count} (monitor.max_skips_in_row = {most}). Begin again from a checkpoint before the "
            "trouble (move newer ones away) with a lower adam.lr, or with data.skip_batches over the batches where it "
            "began; instead of float16 try model.dtype=torch.bfloat16"
        )
