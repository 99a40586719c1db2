"""The machine under a run: accelerate's processes, precision and gradients, sharding, compilation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx import fsdp, gradient_averaging, inductor
from bypass_fx.feed import Shares
from bypass_fx.settings import Settings, SettingsError
from bypass_fx.task import Task, TaskError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from bypass_fx.schedule import BypassSchedule

FOREIGN_ERRORS = (IndexError, TypeError, ValueError, RuntimeError)  # what models and losses raise of their own
_WITH_MODES: dict[str, Any] = {"inductor": "inductor", "bypass_fx": inductor.backend}  # they know torch.compile's modes
_GRAPHED = ("reduce-overhead", "max-autotune")  # the modes of torch.compile with CUDA graphs; on a CPU it skips them


class Runner(nn.Module):
    """Whatever of a step the processes do together: DDP, FSDP2, autocast and torch.compile wrap this module.

    In training mode a call gives the loss of a minibatch and the penalty, both 0-dim; in evaluation mode the task's sums.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.schedule: BypassSchedule | None = None
        self.late = False  # sharded parameters are whole within a forward; the penalty reads them outside of it

    def forward(self, batch: Any) -> Any:
        """Of a minibatch: (loss, penalty), or the sums."""
        if not self.training:
            return self.task.sums(self.model, batch)
        loss = self.task.loss(self.model, batch)
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        return loss, loss.new_zeros(()) if self.late else self.penalty(loss)

    def penalty(self, loss: Tensor) -> Tensor:
        """What the schedule adds to the loss, in full precision whatever autocast says."""
        if self.schedule is None:
            return loss.new_zeros(())
        with torch.autocast(loss.device.type, enabled=False):
            return self.schedule.penalty()


class Engine:
    """accelerate, set up as the settings and the launcher say.

    Raises:
        SettingsError: the device, the precision or the sharding can't be had here.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._plugin = fsdp.configured()
        if self._plugin and settings.sharding == "ddp":
            raise SettingsError("accelerate is configured for FSDP; set sharding to auto, or launch without it")
        self.accelerator = _accelerator(settings)
        self.device: torch.device = self.accelerator.device
        _expect_compilable(settings, self.device)
        world = self.accelerator.num_processes
        self.shares = Shares(self.accelerator.process_index, world, self.accelerator.gradient_accumulation_steps)
        # A group of one process is sharded too: accelerate, configured for FSDP, refuses to prepare the model otherwise.
        wants_shards = settings.sharding == "fsdp2" or self._plugin is not None
        self.sharded = wants_shards and torch.distributed.is_available() and torch.distributed.is_initialized()
        if settings.tf32:
            torch.set_float32_matmul_precision("high")

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return bool(self.accelerator.is_main_process)

    def runner(self, model: nn.Module, task: Task) -> nn.Module:
        """The model in a `Runner`, wrapped for the processes; its parameters stay the same objects unless sharded."""
        runner = Runner(model, task).to(self.device)
        if self._settings.channels_last:
            runner.to(memory_format=torch.channels_last)
        if self.sharded:
            runner.late = True
            fsdp.shard(runner, model, self.device, self._plugin)
            wrapped: nn.Module = runner
        else:
            wrapped = self.accelerator.prepare_model(runner, device_placement=False)
            # Its autocast is an object of each wrapper's own, for which torch.compile would compile each arm anew; ours is
            # entered around the calls.
            for name in ("forward", "_original_forward"):
                runner.__dict__.pop(name, None)
        if self._settings.compile:
            name = self._settings.compile_backend
            mode = self._settings.compile if name in _WITH_MODES and self._settings.compile != "default" else None
            # dynamic=False: another size of minibatch is a mistake here, and must not make a slower graph of all
            wrapped.compile(
                fullgraph=self.shares.world == 1, dynamic=False, backend=_WITH_MODES.get(name, name), mode=mode
            )
        return wrapped

    def shard(self, model: nn.Module) -> None:
        """Shard a model that no step is taken with, where those are sharded that are trained."""
        if self.sharded:
            fsdp.shard(model, model, self.device, self._plugin)

    def stepper(self, optimizer: Optimizer) -> Any:
        """The optimiser, behind accelerate's where gradients are scaled: that one looks for packages at every step."""
        if self.accelerator.scaler is None:
            return optimizer
        return self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def backward(self, runner: nn.Module, parts: list[Any], describe: Callable[[Exception], Exception]) -> Tensor:
        """Accumulate the gradients of one minibatch in its parts; returns this process's mean loss, detached.

        Args:
            runner: from `runner`.
            parts: this process's share of the minibatch, on the device.
            describe: makes a clear error of what the model or the loss raised.
        """
        losses = []
        for index, batch in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(runner):
                try:
                    with self.accelerator.autocast():
                        loss, penalty = runner(batch)
                except FOREIGN_ERRORS as error:
                    raise describe(error) from error
                if not loss.requires_grad:
                    raise TaskError(
                        "the loss has no gradient: no parameter of the model needs one, or loss_fn detaches or converts it"
                    )
                losses.append(loss.detach().clone())  # a CUDA graph writes the next loss over this one
                if self.sharded:
                    self.accelerator.backward(loss)
                    penalty = inner(runner).penalty(loss)
                    if penalty.requires_grad:
                        self.accelerator.backward(penalty)
                else:
                    self.accelerator.backward(loss + penalty)
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    def share_gradients(self, deltas: list[nn.Parameter]) -> None:
        """Average the gradients of D, which came after the wrapping, over the processes."""
        if self.shares.world > 1:
            gradient_averaging.average_gradients(deltas)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        reduced: Tensor = self.accelerator.reduce(values, "mean")
        return reduced

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        reduced: Tensor = self.accelerator.reduce(values, "sum")
        return reduced

    def agreed(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.shares.world == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.device)).max())

    def from_main(self, value: Any) -> Any:
        """The main process's value, on all."""
        if self.shares.world == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


def inner(runner: nn.Module) -> Runner:
    """The `Runner` inside DDP's wrapper."""
    found = getattr(runner, "module", runner)
    assert isinstance(found, Runner)
    return found


@contextlib.contextmanager
def evaluating(runner: nn.Module) -> Iterator[None]:
    """In evaluation mode, and not compiled: another mode would need graphs of its own."""
    was_training = runner.training
    runner.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        runner.train(was_training)


def is_main_process() -> bool:
    """Whether this process writes and shows; known before accelerate is, from what the launcher set."""
    return os.environ.get("RANK", "0") == "0"


def leave() -> None:
    """End the group of processes, where there is one, once all have come here: a process that ends alone fails others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the accelerator where there is one, else the CPU.

    Raises:
        SettingsError: there is no such device here.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    try:
        found = torch.accelerator.current_accelerator(check_available=True) if name == "auto" else torch.device(name)
        return torch.empty(0, device=found or "cpu").device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device {name!r} can't be used here ({reason}); take auto or cpu") from error


def _expect_compilable(settings: Settings, device: torch.device) -> None:
    """CUDA graphs keep gradients in memory that the next backward may write over, a fault that torch's makers know of."""
    if settings.compile in _GRAPHED and settings.accumulate > 1 and device.type == "cuda":
        raise SettingsError(
            f"compile {settings.compile} takes CUDA graphs, which lose accumulated gradients; set accumulate to 1, or "
            "compile to default"
        )


def _accelerator(settings: Settings) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    device = resolve_device(settings.device)
    if settings.precision == "fp16" and device.type == "cpu":  # accelerate would leave it float32 without a word
        raise SettingsError("precision fp16 is for accelerators; set it to bf16 or no on the CPU")
    if PartialState._shared_state and not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this process, set up otherwise
    elif AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    placed = {"ACCELERATE_TORCH_DEVICE": str(device)} if ":" in settings.device else {}
    try:
        with _environment(placed):
            return Accelerator(
                cpu=device.type == "cpu",
                mixed_precision=None if settings.precision == "no" else settings.precision,
                gradient_accumulation_steps=settings.accumulate,
            )
    except (ValueError, RuntimeError) as error:
        raise SettingsError(f"precision {settings.precision!r} on {device}: {error}; set precision to no") from error


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
