"""What a training that stopped being finite leaves behind: where it happened, for a person to find out why."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.run import write_json
from experiments.stepper import Stepper
from experiments.tally import Tallied

_WORST = 20


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is not finite, time and again."""


def nan_report(path: Path, stepper: Stepper, found: Tallied, examples: Tensor, step: int, first: int) -> None:
    """Write where it happened, the loss by log-SNR, the last gradients, and what is wrong with weights and data."""
    bins = zip(stepper.tally.bins(), found.means, found.counts, strict=True)
    gradients = {name: p.grad.norm().item() for name, p in stepper.model.named_parameters() if p.grad is not None}
    bad = {name: norm for name, norm in gradients.items() if not torch.tensor(norm).isfinite()}
    worst = dict(sorted(gradients.items(), key=lambda pair: -pair[1])[:_WORST])
    report = {
        "last_step": step,
        "first_bad_step": first,
        "bad_steps_in_a_row": found.run,
        "log_snr_of_bad_losses": found.levels,
        "learning_rate": stepper.rate.item(),
        "loss_scale": stepper.scale.value.item(),
        "loss_by_log_snr": [{"low": low, "high": high, "mean": mean, "count": n} for (low, high), mean, n in bins],
        "gradients_not_finite": sorted(bad),
        "largest_gradients": worst,
        "weights_not_finite": [n for n, p in stepper.model.named_parameters() if not p.isfinite().all()],
        "examples_not_finite": _bad_examples(examples),
    }
    write_json(path, _plain(report))


def _bad_examples(examples: Tensor) -> dict[str, Any]:
    if not examples.is_floating_point():
        return {"count": 0, "first": []}
    bad = (~examples.flatten(1).isfinite().all(1)).nonzero().flatten()
    return {"count": len(bad), "first": bad[:_WORST].tolist()}


def _plain(value: Any) -> Any:
    """Numbers that JSON lacks as text."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not torch.tensor(value).isfinite():
        return str(value)
    return value
