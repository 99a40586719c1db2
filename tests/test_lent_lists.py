"""Lists that a forward hands to its children, which may fill them."""

from __future__ import annotations

from torch import Tensor, nn

from bypass_fx.passes.link import Linked


class Aggregates(nn.Module):
    """A tree of blocks, as deep layer aggregation has them: each hands on a list that it has made or was given."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(4, 4), nn.ReLU()
        self.second = Aggregates(levels - 1) if levels > 1 else nn.Linear(4, 4)

    def forward(self, x: Tensor, made: list[Tensor] | None = None) -> Tensor:
        if made is None:
            made = []
        y = self.act(self.first(x))
        if isinstance(self.second, nn.Linear):
            return self.second(y) + sum(made)  # type: ignore[no-any-return]
        made.append(y)
        return self.second(y, made)  # type: ignore[no-any-return]


def test_a_child_that_could_fill_a_list_and_is_given_none_is_no_reason() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tree = Aggregates(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.tree(x) * 2  # type: ignore[no-any-return]

    assert not Linked(Calls()).failures
