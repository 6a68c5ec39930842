"""A compiled model: fewer and larger kernels, and on a GPU one launch for all of them."""

import torch
from torch import Tensor

from sde import Prediction, ScoreModel


class Compiled(ScoreModel):
    """``model`` through ``torch.compile``, for a fixed batch; on a GPU its kernels replay as a CUDA graph.

    It is compiled at the first call for each shape, type and device, once in a process.
    """

    def __init__(self, model: ScoreModel):
        if not isinstance(model, ScoreModel):
            raise TypeError(f"compile=True needs a ScoreModel, found {type(model).__name__}; leave it out")
        super().__init__(model.sde)
        self.model = model
        self.graph = any(p.is_cuda for p in model.parameters())
        self.run = torch.compile(model.forward, dynamic=False, mode="reduce-overhead" if self.graph else None)

    def forward(self, x: Tensor, t: Tensor, **condition) -> Prediction:
        if not self.graph:
            return self.run(x, t, **condition)
        torch.compiler.cudagraph_mark_step_begin()
        return Prediction(*(part.clone() for part in self.run(x, t, **condition)))  # the next replay overwrites them
