"""Averaged weights of a run: timm's moving average, sharded as the model is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bypass_fx import sharded
from bypass_fx.engine import Engine


class Averages:
    """An exponential moving average of a model's parameters and buffers, in the model's original architecture.

    Args:
        model: not sharded yet, as a sharded model can't be copied.
        decay: the share that stays in a step, from 0 to below 1.
        engine: shards the average where it shards the model.
    """

    def __init__(self, model: nn.Module, decay: float, engine: Engine) -> None:
        from timm.utils import ModelEmaV3

        self._ema = ModelEmaV3(model, decay=decay)
        engine.shard(self._ema.module)

    def update(self, model: nn.Module) -> None:
        """Note a step."""
        self._ema.update(model)

    def begin_anew(self, model: nn.Module) -> None:
        """Forget what was averaged, and go on from this model's weights."""
        self._ema.set(model)  # type: ignore[no-untyped-call]

    def state_dict(self) -> dict[str, Tensor]:
        """The average in whole tensors; all processes must call this together."""
        state: dict[str, Tensor] = sharded.gathered(self._ema.module.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        sharded.load_model(self._ema.module, state)
