"""The named place where a block's attention weights appear.

Each block ends the computation of its weights in a `Gate`, so that a forward hook on it sees exactly what multiplies
the features, whatever the block: `[m for m in model.modules() if isinstance(m, Gate)]` finds all of them.
"""

from typing import Literal

from torch import nn

GateKind = Literal["channel", "spatial", "element", "fusion", "branch"]


class Gate(nn.Sequential):
    """An activation whose output is attention weights in [0, 1]; it has no parameters.

    Args:
        kind: what the output weighs, and its shape:

            - ``"channel"``: each channel, (N, C, 1, 1);
            - ``"spatial"``: each position, (N, 1, H, W);
            - ``"element"``: each channel at each position, (N, C, H, W);
            - ``"fusion"``: the first of two inputs against the second, (N, C, H, W);
            - ``"branch"``: each of M branches, per channel, summing to 1 over them, (N, M, C, 1, 1).
        activation: the module that makes weights from scores, of any shape.

    Shape:
        - input: scores of the kind's shape
        - output: the same shape, values in [0, 1]
    """

    def __init__(self, kind: GateKind, activation: nn.Module) -> None:
        super().__init__(activation)
        self.kind: GateKind = kind

    def extra_repr(self) -> str:
        """Show the kind."""
        return f"kind={self.kind!r}"
