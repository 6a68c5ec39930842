"""One step of the optimizer: forward, backward, clipping, Adam (Kingma and Ba, 2015), and the average of the weights.

With gradients G of the loss times a scale S and the norm n = |G| / S, clipping to c divides G by S max(1, n / c). The
fused kernels of Adam take that divisor, and a flag that makes them leave weights and moments alone, in the pass that
they make anyway: clipping costs the norm and nothing else, and a step whose loss or norm is not finite changes nothing.
The average takes the same flag. No number leaves the device in a step: what was measured is in ``Stepper.tally``.

Half precision is that of the network's forward pass and loss (``torch.autocast``): weights, gradients, moments and
average stay in float32. float16 has S > 1 (Micikevicius et al., "Mixed precision training", 2018, section 3.2): halved
after a step that overflowed, which is then left out, and doubled after 2000 good ones. For others S = 1.

A batch in ``accumulate`` parts gives the mean of their gradients, which is the gradient of the batch for the same
times and noise. The objective draws them part by part, one after another from the generator: each part has its own
stratified times, over all of time.

Several processes have a share of the batch each (``models.share``): the mean of their gradients is that of the batch,
whatever their number; ``experiments.parallel`` says how they hold the model. All share one loss and one norm, and so
one verdict on the step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from experiments.average import Average
from experiments.build import ConfigError
from experiments.parallel import WAYS, Alone, place, whole
from experiments.processes import Processes, current
from experiments.step_settings import PRECISIONS, StepSettings
from experiments.tally import Tally
from models import Objective, ScoreNetwork


class LossScale:
    """The factor of the loss, on the device; one that starts at 1 stays there."""

    PATIENCE = 2000

    def __init__(self, initial: float, device: torch.device):
        self.adapts = initial != 1
        self.value, self.streak = torch.full((), initial, device=device), torch.zeros((), device=device)

    def update(self, good: Tensor) -> None:
        """Half after a bad step, twice after ``PATIENCE`` good ones in a row."""
        if self.adapts:
            self.streak.add_(1).mul_(good)
            grow = self.streak >= self.PATIENCE
            self.value.mul_(0.5 + 0.5 * good + grow * good)
            self.streak.mul_(~grow)

    def excuses(self) -> Tensor | None:
        """Whether a bad step is none of the training's, (): a scale above 1 may be too large. None: never."""
        return self.value > 1 if self.adapts else None


class Stepper:
    """Steps of one training: ``stepper(x, rate)``. Raises ``ConfigError`` where device and settings don't go together.

    Parameters
    ----------
    model: on its device; ``channels_last`` changes the memory format of its weights.
    objective: on the same device. generator: of all times and noise, on the same device; of several processes, in the
        same state in all.
    processes: that step together, by default the ``current()`` ones.

    Attributes
    ----------
    average: of the model's state. tally: what was measured since it was read last. scale: of the loss.
    """

    def __init__(
        self,
        model: ScoreNetwork,
        objective: Objective,
        settings: StepSettings,
        generator: torch.Generator,
        processes: Processes | None = None,
    ):
        self.model, self.objective, self.settings, self.generator = model, objective, settings, generator
        self.processes = processes or current()
        self.source = self.processes.share(generator)
        way = WAYS[settings.distributed] if self.processes.count > 1 else Alone
        self.device, self.precision = generator.device, PRECISIONS[settings.precision]
        self.format = torch.channels_last if settings.channels_last else torch.contiguous_format
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        way.prepare(model, objective, self.processes)
        self.trained = _compiled(model) if settings.compile else model
        self.way = way(objective, self.trained)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.rate = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.Adam(
            self.parameters,
            lr=self.rate if settings.fused else 0.0,
            fused=settings.fused,
            capturable=settings.cuda_graphs,
        )
        self._begin()
        self.scale, self.average = LossScale(self.precision.scale, self.device), Average(model, settings.ema)
        self.tally = Tally(*model.sde.log_snr_range, self.device, processes=self.processes)
        self._adam = self._fused if settings.fused else self._plain
        self._run = _Recorded(self._step, generator) if settings.cuda_graphs else self._step

    def __call__(self, x: Tensor, rate: float, **condition: Tensor) -> None:
        """One step on clean data ``x``, (B, ...), at a learning rate; ``condition``: (B, ...) of the network's own.

        Of several processes each brings its share of both, B of it.
        """
        self.rate.fill_(rate)
        self._run({"x0": x.contiguous(memory_format=self.format), **condition})

    def state(self) -> dict[str, Any]:
        """What the steps to come depend on beside the weights and their average: tensors by name, as they lie.

        All of several processes must ask; what the first one gets is that of all.
        """
        return whole(self._lying()) | {"tally": self.tally.state(), "generator": self.generator.get_state()}

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The model's state and its average, each as one where they lie in parts; all processes must ask."""
        return whole(self.model.state_dict()), whole(self.average.state)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take over a model's state, also where the own one lies in parts. Raises ``ConfigError`` for another's."""
        own = self.model.state_dict()
        _require_alike(own, weights)
        for name, value in own.items():
            place(weights[name], value)

    def load(self, state: dict[str, Any], average: dict[str, Tensor]) -> None:
        """Go on from ``state()`` and the average that went with it; the model's weights must be loaded before or after.

        All is copied into the tensors that there are, so that what was compiled or captured stays valid. A loss scale
        begins anew where only one of both precisions has one. Raises ``ConfigError`` for another network's state.
        """
        own, given = self._lying(), {name: dict(state[name]) for name in self._lying()}
        if not (own["scale"] and given["scale"]):
            own["scale"] = given["scale"] = {}
        own, given = dict(_leaves(own | {"average": self.average.state})), dict(_leaves(given | {"average": average}))
        _require_alike(own, given)
        for name, value in own.items():
            place(given[name], value)
        self.tally.load(state["tally"])
        self.generator.set_state(state["generator"].cpu())

    def _lying(self) -> dict[str, dict[str, Any]]:
        """The tensors that steps change, where they lie."""
        scale = {"value": self.scale.value, "streak": self.scale.streak} if self.scale.adapts else {}
        moments = {name: self.optimizer.state[p] for name, p in self.model.named_parameters() if p.requires_grad}
        return {
            "moments": moments,
            "scale": scale,
            "objective": self.objective.state_dict(),
            "updates": {"average": self.average.updates},
        }

    def _begin(self) -> None:
        """Adam's moments as its first step would make them, so that they can be loaded before it."""
        for parameter in self.parameters:
            count = torch.zeros((), device=parameter.device if self.settings.fused else None)
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": count, **zeros}

    def _step(self, batch: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        parts = zip(*(value.chunk(self.settings.accumulate) for value in batch.values()), strict=True)
        losses = [self._backward(dict(zip(batch, part, strict=True)), i + 1) for i, part in enumerate(parts)]
        value, log_snr = (torch.cat(both) for both in zip(*losses, strict=True))
        loss, norm = self.processes.mean(value.mean()), self._norm()
        good = torch.isfinite(loss + norm)
        self._adam(self.scale.value * (norm / self.settings.clip).clamp_min(1), good)
        self.average.update(good)
        self.tally.add(loss, norm, good, value, log_snr, self.scale.excuses())
        self.scale.update(good)

    def _backward(self, part: dict[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
        """Adds the gradient of one part's share in the mean loss; returns its losses and their log-SNR."""
        dtype = self.precision.dtype
        with self.way.sending(number == self.settings.accumulate):
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                value, log_snr = self.way.loss(self.source, part)
            (value.mean() * (self.scale.value / self.settings.accumulate)).backward()
        return value.detach(), log_snr.detach()

    def _norm(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients)) / self.scale.value

    def _fused(self, divisor: Tensor, good: Tensor) -> None:
        # The two attributes by which torch.amp.GradScaler tells fused optimizers what to divide by and when to skip;
        # the kernels take float32 alone.
        self.optimizer.grad_scale, self.optimizer.found_inf = divisor.float(), (~good).float()
        self.optimizer.step()

    def _plain(self, divisor: Tensor, good: Tensor) -> None:
        if good:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], divisor)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate.item()
            self.optimizer.step()


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts, with their paths."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value


def _require_alike(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    shapes = [{name: tuple(value.shape) for name, value in one.items()} for one in (own, given)]
    other = sorted({name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items())})
    if other:
        raise ConfigError(
            f"the training state is of another network or objective: {len(other)} names or shapes differ "
            f"({', '.join(other[:3])}); resume with the configuration that it was saved under"
        )


def _compiled(model: ScoreNetwork) -> ScoreNetwork:
    """A twin that shares everything with the model, and runs its network compiled; the model itself stays as it is."""
    twin = ScoreNetwork(torch.compile(model.net), model.sde, model.parametrization)
    twin.label = model.label  # a function of a table, in place of the default one
    return twin


class _Recorded:
    """A step as a CUDA graph: the first ones run as they are, to warm up, then one is recorded, and all are replays."""

    WARM_UP = 3

    def __init__(self, step: Callable[[dict[str, Tensor]], Any], generator: torch.Generator):
        self.step, self.generator, self.calls = step, generator, 0
        self.stream = torch.cuda.Stream(generator.device)
        self.graph, self.batch = torch.cuda.CUDAGraph(), {}

    def __call__(self, batch: dict[str, Tensor]) -> None:
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self._warm(batch)
        if not self.batch:
            self._record(batch)
        for name, value in batch.items():
            self.batch[name].copy_(value)
        self.graph.replay()

    def _warm(self, batch: dict[str, Tensor]) -> None:
        here = torch.cuda.current_stream(self.generator.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            self.step(batch)
        here.wait_stream(self.stream)

    def _record(self, batch: dict[str, Tensor]) -> None:
        """Recording runs nothing: it only notes the kernels and where their tensors lie."""
        self.batch = {name: value.clone() for name, value in batch.items()}
        self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step(self.batch)
