"""Linear layers on a CPU, for the few rows of a decode step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

SLICE = 32


class CPULinear(nn.Linear):
    """A ``nn.Linear`` that chooses its matrix product by the number of rows.

    For float32 on x86, ``linear`` is a matrix-vector product up to 3 rows and a good
    matrix product from some 50 rows on; between, MKL repacks the weight in every call
    and then multiplies it slowly. Milliseconds for all linear layers of SmolLM2-135M
    (538 MB of weights, float32, 2 cores of an Ice Lake Xeon with other work on them,
    best of 5, good to 10 %):

        rows         1    3    4    8   12   16   32   48   64  128
        linear      27   30   52   73   76  122  144  138  125  173
        sliced      31   31   34   44   49  114  147  150  200  299
        transposed  27   55   50   49   46   52   68   68  144  184

    The weight is not copied: it stays mapped from its file and shared with other processes; a
    prepacked one would be a private copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if rows <= 3 or rows > 48:
            return linear(x, self.weight, self.bias)
        flat = x.reshape(rows, self.in_features)
        if rows < 12 and self.out_features % SLICE == 0:
            output = self._sliced(flat)
        else:
            output = torch.mm(self.weight, flat.t()).t().contiguous()
        if self.bias is not None:
            output = output + self.bias
        return output.view(*x.shape[:-1], self.out_features)

    def _sliced(self, x: Tensor) -> Tensor:
        """Multiply slices of the weight as one batch, too small for MKL to repack them."""
        weight = self.weight.view(-1, SLICE, self.in_features).transpose(1, 2)
        output = torch.bmm(x.expand(len(weight), -1, -1), weight)
        return output.transpose(0, 1).reshape(len(x), self.out_features)


def adapt(model: nn.Module) -> None:
    """Make every ``nn.Linear`` of a float32 model on a CPU a ``CPULinear``, in place."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = CPULinear
