"""Deliberate faults, one at a time, that the tests must notice: ``python tests/mutants.py [NAME ...]``.

The packages are copied into a temporary folder; each mutant changes one text there, and the fast tests that concern it
run until the first fails. The exit code is 1 if a mutant survives, if its text is not found exactly once, or if the
tests fail without any.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("sde", "models", "solvers", "experiments", "conf", "tests", "pyproject.toml")

RECURSION = ("tests/solvers/test_recursion.py", "-k", "coefficient and uniform or b1 or b33")
MATRIX = ("tests/solvers/test_matrix.py", "-k", "under_every and (SubVP or EDM)")
ENDED = ("tests/solvers/test_matrix.py", "-k", "under_every and Heun and Rectified")
GRID = ("tests/solvers/test_grids.py", "-k", "(equally or pure_noise) and not balanced")
ADAPTIVE = ("tests/solvers/test_adaptive.py", "-k", "one_step or parts or refused or last_noise or b32 or tolerance_is")
LANGEVIN = ("tests/solvers/test_langevin.py", "-k", "b8 or b9 or ratio or balance or moves or count or alone")
OPTIONS = ("tests/solvers/test_options.py", "-k", "not compiled")
PROCESSES = ("tests/sde/test_processes.py",)
ADAMS = (
    "tests/solvers/test_exponential_adams.py",
    "-k",
    "polynomial or recurrence or fixed_order and VP or gates_are and 12-VP or half_a_step",
)
DEQUANTIZATION = ("tests/test_dequantization.py", "-k", "not round_trip and not extreme_draws_stay")
IMPORTANCE = ("tests/test_importance.py", "-k", "equal or average")
VARIATIONAL = ("tests/test_variational.py", "-k", "starts or jacobian or gradient")
CONVENTION = ("tests/experiments/test_convention.py", "-k", "every_dequantizer or not_say")
ONE_PASS = ("tests/solvers/test_one_pass.py", "-k", "gauss or rule or latent_of or learned and VE or defect or default")
DIVERGENCE = ("tests/solvers/test_divergence.py", "-k", "not 95_percent and not network")
MATCHED = ("tests/solvers/test_matched_prior.py", "-k", "moments and not exact or leading")
LIKELIHOOD = ("tests/test_likelihood.py", "-k", "trace or variance or change_of_a_gaussian or divergence")
BOUND = ("tests/solvers/test_continuous_bound.py", "-k", "ends and VP or wrong or integrated or toy")
CHAIN = ("tests/models/test_chain_objectives.py", "-k", "not random_levels")
VDM = ("tests/models/test_vdm.py", "-k", "definition or interior_follows or ends")

UNET = ("tests/models/test_unet.py",)
DIT = ("tests/models/test_dit.py", "-k", "not likelihood")
LABEL = ("tests/models/test_label.py", "-k", "not learns_with")
PAIR = ("tests/experiments/test_many_processes.py",)
DRAW = ("tests/experiments/test_draw.py",)
STATE = ("tests/experiments/test_stepper_state.py",)
STEP = ("tests/experiments/test_stepper.py", "-k", "not compiled")
AVERAGE = ("tests/experiments/test_average.py",)
WEIGHTED = ("tests/models/test_weighting.py",)
TIMES = ("tests/models/test_time_sampling.py",)
IMPLICIT = ("tests/models/test_implicit.py",)
QUALITY, DISTANCES = ("tests/test_quality.py",), ("tests/test_distances.py",)
NEIGHBOURS, FEATURES = ("tests/test_neighbours.py",), ("tests/test_features.py",)
KNOWN, ADVICE = ("tests/test_known.py",), ("tests/test_advice.py",)
GUIDANCE = ("tests/models/test_guidance.py",)
REPAINT, OPERATORS = ("tests/solvers/test_repaint.py",), ("tests/models/test_operators.py",)
CLASSES, CLASSIFY = ("tests/experiments/test_classes.py",), ("tests/experiments/test_classify_task.py",)
LEAGUE, CALLS = ("tests/experiments/test_comparison.py",), ("tests/solvers/test_calls.py",)
REPORT, PAGE = ("tests/experiments/test_report_task.py",), ("tests/test_page.py",)
FIGURES, DRAWN = ("tests/test_figures_more.py",), ("tests/experiments/test_figure_tasks.py",)
SWEEP, STORE = ("tests/experiments/test_sweep.py",), ("tests/experiments/test_network_store.py",)
ORDER = ("tests/experiments/test_order.py", "-k", "not workers")
RESUME = (
    "tests/experiments/test_resume.py",
    "-k",
    "plain or another_folder or which_checkpoints or damaged or examples",
)
FOLDER = ("tests/experiments/test_run.py",)
SIGNALS = ("tests/experiments/test_signals.py",)
TRAINING = ("tests/experiments/test_training.py", "-k", "finite or sound")
PLAIN = ("tests/experiments/test_resume.py", "-k", "twice and plain or place_in_the_data")
EARLY = ("tests/experiments/test_resume.py", "-k", "stops_early or which_checkpoints")
PREFLIGHT = ("tests/experiments/test_preflight.py",)
BUILD = ("tests/experiments/test_build.py", "-k", "refused")
AUDIT = ("tests/experiments/test_audit.py", "-k", "equal_draws or in_parts or own_probes or automatic_end_costs")


class Mutant(NamedTuple):
    """``old`` is in ``file`` exactly once, and ``tests`` (arguments of pytest) must fail with ``new`` in its place."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Change the file under ``root``; raises ``ValueError`` where the text is not there exactly once."""
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: found {text.count(self.old)} times in {self.file}: {self.old!r}")
        path.write_text(text.replace(self.old, self.new))


MUTANTS = [
    Mutant(
        "modulated norm without the bias's scale",
        "models/unet_blocks.py",
        "torch.addcmul(shift, self.bias, scale)",
        "self.bias + shift",
        UNET,
    ),
    Mutant(
        "modulated norm over groups of two samples",
        "models/unet_blocks.py",
        "len(x) * self.num_groups\n",
        "self.num_groups\n",
        UNET,
    ),
    Mutant(
        "variance of channels last that forgets the mean",
        "models/unet_blocks.py",
        "(square - mean.square()).clamp(min=0)",
        "square.clamp(min=0)",
        UNET,
    ),
    Mutant(
        "channels last in half precision",
        "models/unet_blocks.py",
        ".mT.to(torch.promote_types(x.dtype, torch.float32))",
        ".mT",
        UNET,
    ),
    Mutant(
        "scale without its one",
        "models/unet_blocks.py",
        "self.norm(h, 1 + scale, shift)",
        "self.norm(h, scale, shift)",
        UNET,
    ),
    Mutant(
        "shift for scale",
        "models/unet_blocks.py",
        "scale, shift = modulation.chunk",
        "shift, scale = modulation.chunk",
        UNET,
    ),
    Mutant(
        "shift after the norm",
        "models/unet_blocks.py",
        "self.norm(h.add_(_spread(modulation, h)))",
        "self.norm(h).add_(_spread(modulation, h))",
        UNET,
    ),
    Mutant(
        "a block that forgets its gain",
        "models/unet_blocks.py",
        "_times(h.add_(self.skip(self.resample(x))), self.gain)",
        "_times(h.add_(self.skip(self.resample(x))), 1)",
        UNET,
    ),
    Mutant(
        "gain of a half",
        "models/unet_blocks.py",
        "math.sqrt(0.5) if",
        "0.5 if",
        UNET,
    ),
    Mutant(
        "attention across heads",
        "models/unet_blocks.py",
        "unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)",
        "unflatten(2, (3, -1, self.heads)).permute(2, 0, 4, 1, 3)",
        UNET,
    ),
    Mutant(
        "attention without its input",
        "models/unet_blocks.py",
        "_times(x + h.mT.unflatten(2, x.shape[2:]), self.gain)",
        "_times(h.mT.unflatten(2, x.shape[2:]) * 1, self.gain)",
        UNET,
    ),
    Mutant(
        "a pyramid that stays at the input",
        "models/unet_blocks.py",
        "        return h, h",
        "        return h, self.down(pyramid)",
        UNET,
    ),
    Mutant(
        "groups of 8 channels",
        "models/unet_blocks.py",
        "min(channels // 4, 32)",
        "min(channels // 8, 32)",
        UNET,
    ),
    Mutant(
        "filter of equal taps",
        "models/resampling.py",
        "(1 / 8, 3 / 8, 3 / 8, 1 / 8)",
        "(1 / 4, 1 / 4, 1 / 4, 1 / 4)",
        UNET,
    ),
    Mutant(
        "filter up without its gain",
        "models/resampling.py",
        "self.weight * 2**self.rank",
        "self.weight",
        UNET,
    ),
    Mutant(
        "sums for means",
        "models/resampling.py",
        "return x * 0.5**self.rank",
        "return x",
        UNET,
    ),
    Mutant(
        "repetition of whole rows",
        "models/resampling.py",
        "x = torch.stack((x, x), dim + 1).flatten",
        "x = torch.stack((x, x), dim).flatten",
        UNET,
    ),
    Mutant(
        "skips in the order of the way down",
        "models/unet.py",
        "kept.pop()), dim=1)",
        "kept.pop(0)), dim=1)",
        UNET,
    ),
    Mutant(
        "octaves without pi",
        "models/unet.py",
        "(math.pi * 2.0**n)",
        "(2.0**n)",
        UNET,
    ),
    Mutant(
        "gates of both branches exchanged",
        "models/dit.py",
        "h = h + gate1 *",
        "h = h + gate2 *",
        DIT,
    ),
    Mutant(
        "patches that exchange their axes",
        "models/dit.py",
        "(1 + i, d + 2 + i)",
        "(d + 2 + i, 1 + i)",
        DIT,
    ),
    Mutant(
        "label of the wrong sign",
        "models/labels.py",
        "return torch.log(sigma / alpha)",
        "return torch.log(alpha / sigma)",
        LABEL,
    ),
    Mutant(
        "time from -8 to 24",
        "models/labels.py",
        "16 * (t - sde.t_min)",
        "32 * (t - sde.t_min)",
        LABEL,
    ),
    Mutant(
        "clipping that enlarges",
        "experiments/stepper.py",
        "(norm / self.settings.clip).clamp_min(1)",
        "(norm / self.settings.clip)",
        STEP,
    ),
    Mutant(
        "no clipping",
        "experiments/stepper.py",
        "self.scale.value * (norm / self.settings.clip).clamp_min(1)",
        "self.scale.value * torch.ones_like(norm)",
        STEP,
    ),
    Mutant(
        "norm of scaled gradients",
        "experiments/stepper.py",
        "get_total_norm(gradients)) / self.scale.value",
        "get_total_norm(gradients))",
        STEP,
    ),
    Mutant(
        "times taught by the losses of one process",
        "models/weighted_objective.py",
        "*gathered(generator, t, loss.detach())",
        "t, loss.detach()",
        PAIR,
    ),
    Mutant(
        "levels taught by the losses of one process",
        "models/chain_objectives.py",
        "*gathered(generator, k, term.detach())",
        "k, term.detach()",
        PAIR,
    ),
    Mutant(
        "a loss of one process",
        "experiments/stepper.py",
        "self.processes.mean(value.mean())",
        "value.mean()",
        PAIR,
    ),
    Mutant(
        "bins of one process",
        "experiments/tally.py",
        "self.processes.sum(self._bins)",
        "self._bins",
        PAIR,
    ),
    Mutant(
        "weights of the average kept for the next step",
        "experiments/parallel.py",
        "mesh=mesh, reshard_after_forward=True",
        "mesh=mesh",
        PAIR,
    ),
    Mutant(
        "samples in the order of the processes",
        "experiments/draw.py",
        "hands[i % len(hands)][i // len(hands)]",
        "[one for hand in hands for one in hand][i]",
        PAIR,
    ),
    Mutant(
        "a batch divided once for all its parts",
        "models/share.py",
        "(self.parts, self.count, -1)).select(axis + 1",
        "(self.count, self.parts, -1)).select(axis",
        PAIR,
    ),
    Mutant(
        "every batch from the first sample on",
        "experiments/draw.py",
        "first=start, progress",
        "first=0, progress",
        DRAW,
    ),
    Mutant(
        "a run of bad steps forgotten when read",
        "experiments/tally.py",
        "        self._present.copy_(present)",
        "        pass",
        STATE,
    ),
    Mutant(
        "moments that are not taken up again",
        "experiments/stepper.py",
        "            place(given[name], value)",
        "            place(given[name] if not name.startswith('moments') else value, value)",
        STATE,
    ),
    Mutant(
        "parts that add up",
        "experiments/stepper.py",
        "(self.scale.value / self.settings.accumulate)",
        "self.scale.value",
        STEP,
    ),
    Mutant(
        "average of bad steps",
        "experiments/stepper.py",
        "self.average.update(good)",
        "self.average.update(None)",
        STEP,
    ),
    Mutant(
        "a scale that never grows",
        "experiments/stepper.py",
        "0.5 + 0.5 * good + grow * good",
        "0.5 + 0.5 * good",
        STEP,
    ),
    Mutant(
        "loss alone decides what is good",
        "experiments/stepper.py",
        "torch.isfinite(loss + norm)",
        "torch.isfinite(loss)",
        STEP,
    ),
    Mutant(
        "average without its warm-up",
        "experiments/average.py",
        "(9 / (10 + self.updates)).clamp_min(1 - self.decay)",
        "(0 / (10 + self.updates)).clamp_min(1 - self.decay)",
        AVERAGE,
    ),
    Mutant(
        "a decay that never holds",
        "experiments/average.py",
        ".clamp_min(1 - self.decay) * good",
        " * good",
        AVERAGE,
    ),
    Mutant(
        "an average that stays in the model",
        "experiments/average.py",
        "                _exchanged(live[name], before)",
        "                pass",
        AVERAGE,
    ),
    Mutant(
        "buffers spoilt by a bad step",
        "experiments/average.py",
        "torch.where(good, value, mean)",
        "value",
        AVERAGE,
    ),
    Mutant(
        "losses in the bin below",
        "experiments/tally.py",
        "torch.bucketize(log_snr, self.edges[1:-1])",
        "torch.bucketize(log_snr, self.edges[2:])",
        STEP,
    ),
    Mutant(
        "bad steps in the mean loss",
        "experiments/tally.py",
        "torch.where(good, head, 0)",
        "torch.nan_to_num(head)",
        STEP,
    ),
    Mutant(
        "pair error with the wrong sign",
        "sde/bound_terms.py",
        "(sigma * (x0 - pair.x0) - alpha *",
        "(sigma * (x0 - pair.x0) + alpha *",
        WEIGHTED,
    ),
    Mutant(
        "share of a row of sigma for alpha",
        "models/weighting.py",
        "(a * sigma - b * alpha) /",
        "(a * alpha - b * sigma) /",
        WEIGHTED,
    ),
    Mutant(
        "likelihood weight without its half",
        "models/weighting.py",
        "/ (2 * at.sigma.square())",
        "/ at.sigma.square()",
        WEIGHTED,
    ),
    Mutant(
        "EDM weight of sigma squared s squared",
        "models/weighting.py",
        "(torch.hypot(alpha * s, sigma) / (s *",
        "(torch.hypot(alpha, s * sigma) / (s *",
        WEIGHTED,
    ),
    Mutant(
        "min-SNR with gamma for its root",
        "models/weighting.py",
        "math.sqrt(self.gamma) * sigma",
        "self.gamma * sigma",
        WEIGHTED,
    ),
    Mutant(
        "antithetic times that are all alike",
        "models/time_sampling.py",
        "1 - half[: n // 2]",
        "half[: n // 2]",
        TIMES,
    ),
    Mutant(
        "cumulative log-SNR from the wrong end",
        "models/time_sampling.py",
        "(high - sde.log_snr(t)) / (high - low)",
        "(sde.log_snr(t) - low) / (high - low)",
        TIMES,
    ),
    Mutant(
        "log-normal density without its truncation",
        "models/time_sampling.py",
        "0.5 * speed(t, sde) / self._ends(sde)[1]",
        "0.5 * speed(t, sde)",
        TIMES,
    ),
    Mutant(
        "log-normal times with the sign of lambda",
        "models/time_sampling.py",
        "(-2 * (self.mean",
        "(2 * (self.mean",
        TIMES,
    ),
    Mutant(
        "tabulated mass of a weight in log-SNR",
        "models/adaptive_times.py",
        "times.weight(t, sde) / speed(t, sde)",
        "times.weight(t, sde)",
        TIMES,
    ),
    Mutant(
        "adaptive importance upside down",
        "models/adaptive_times.py",
        "self.times.importance(t, sde) / self.steps()",
        "self.times.importance(t, sde) * self.steps()",
        TIMES,
    ),
    Mutant(
        "adaptive bins by the mean square",
        "models/adaptive_times.py",
        "clamp(min=tiny)).sqrt() + tiny",
        "clamp(min=tiny)) + tiny",
        TIMES,
    ),
    Mutant(
        "adaptive averages that start from zero",
        "models/adaptive_times.py",
        "self.squares / (1 - self.decay**self.counts)",
        "self.squares / (1 - 0 * self.counts)",
        TIMES,
    ),
    Mutant(
        "adaptive losses taught without a gradient",
        "models/weighted_objective.py",
        "if self.times.learns and loss.requires_grad:",
        "if self.times.learns:",
        TIMES,
    ),
    Mutant(
        "integral over time without the density",
        "models/weighted_objective.py",
        "weight / (importance * self.times.density(t, sde))",
        "weight / importance",
        TIMES,
    ),
    Mutant(
        "objective without the importance",
        "models/weighted_objective.py",
        "Losses(importance * loss,",
        "Losses(loss,",
        TIMES,
    ),
    Mutant(
        "implicit matching with half the divergence",
        "models/implicit.py",
        "(square - 2 * sigma * divergence)",
        "(square - sigma * divergence)",
        IMPLICIT,
    ),
    Mutant(
        "implicit matching of a trace off the diagonal",
        "models/implicit.py",
        "products.diagonal(0, 0, 2)",
        "products.diagonal(1, 0, 2)",
        IMPLICIT,
    ),
    Mutant(
        "sliced matching of |v| for v . s",
        "models/implicit.py",
        "(v * eps_hat).flatten(2).sum(2).square().mean(0)",
        "(v * eps_hat).flatten(2).square().sum(2).mean(0)",
        IMPLICIT,
    ),
    Mutant(
        "implicit matching through fused attention",
        "models/implicit.py",
        "torch.enable_grad(), sdpa_kernel(SDPBackend.MATH)",
        "torch.enable_grad()",
        IMPLICIT,
    ),
    Mutant(
        "every batch with the probes of the first",
        "experiments/estimator.py",
        "first + start)",
        "first)",
        AUDIT,
    ),
    Mutant(
        "every draw with the same probes",
        "experiments/estimator.py",
        "first=first + number * _APART",
        "first=first",
        AUDIT,
    ),
    Mutant(
        "diffusion without its factor 2",
        "sde/base.py",
        "return 2 * self.sigma * (self.d_sigma - self.rate * self.sigma)",
        "return self.sigma * (self.d_sigma - self.rate * self.sigma)",
        PROCESSES,
    ),
    Mutant(
        "drift with the wrong sign",
        "sde/base.py",
        "return expand(self.coefficients(t).rate, x) * x",
        "return -expand(self.coefficients(t).rate, x) * x",
        PROCESSES,
    ),
    Mutant(
        "variance of the kernel for its standard deviation",
        "sde/base.py",
        "self.sigma(t) * torch.sqrt(-torch.expm1(change))",
        "self.sigma(t) * -torch.expm1(change)",
        PROCESSES,
    ),
    Mutant(
        "score without 1 / sigma",
        "sde/score.py",
        "return -self(x, t, **condition).eps / expand(self.sde.sigma(t) if sigma is None else sigma, x)",
        "return -self(x, t, **condition).eps",
        RECURSION,
    ),
    Mutant(
        "velocity with alpha' and sigma' swapped",
        "sde/score.py",
        "expand(at.d_alpha, x) * prediction.x0 + expand(at.d_sigma, x) * prediction.eps",
        "expand(at.d_sigma, x) * prediction.x0 + expand(at.d_alpha, x) * prediction.eps",
        DIVERGENCE,
    ),
    Mutant(
        "log-SNR without its factor 2",
        "solvers/path.py",
        "return 2 * (self.alpha.log() - self.sigma.log())",
        "return self.alpha.log() - self.sigma.log()",
        RECURSION,
    ),
    Mutant("ratio upside down", "solvers/path.py", "self.sigma / self.alpha", "self.alpha / self.sigma", RECURSION),
    Mutant(
        "linear step without its noise",
        "solvers/linear.py",
        "return (x if weights.noise is None else torch.addcmul(x, weights.noise, step.draw(x))), past",
        "return x, past",
        RECURSION,
    ),
    Mutant("noise in the last step of a mean", "solvers/linear.py", "step.draw(x)", "step.fresh(x)", RECURSION),
    Mutant(
        "bridge at t for s",
        "solvers/bridge.py",
        "alpha, sigma = path.alpha[1:], path.sigma[1:]",
        "alpha, sigma = path.alpha[:-1], path.sigma[:-1]",
        RECURSION,
    ),
    Mutant(
        "bridge with the variance for the standard deviation",
        "solvers/bridge.py",
        "torch.sqrt(-torch.expm1(-change))",
        "-torch.expm1(-change)",
        RECURSION,
    ),
    Mutant(
        "bridge with a difference that cancels",
        "solvers/bridge.py",
        "1 - eta**2 + eta**2 * torch.exp(-change)",
        "1 - eta**2 * -torch.expm1(-change)",
        RECURSION,
    ),
    Mutant(
        "Euler-Maruyama with twice the score",
        "solvers/euler_maruyama.py",
        "-0.5 * (1 + eta**2) * dt",
        "-(1 + eta**2) * dt",
        RECURSION,
    ),
    Mutant(
        "Euler-Maruyama with g at s",
        "solvers/euler_maruyama.py",
        "path.times.diff(), path.diffusion[:-1]",
        "path.times.diff(), path.diffusion[1:]",
        RECURSION,
    ),
    Mutant(
        "Euler-Maruyama with eta^2 for (1 + eta^2)",
        "solvers/euler_maruyama.py",
        "-0.5 * (1 + eta**2)",
        "-0.5 * (2 * eta**2)",
        MATRIX,
    ),
    Mutant("Heun's second call at t", "solvers/heun.py", "euler, step.s)", "euler, step.t)", RECURSION),
    Mutant("Heun without 1/2", "solvers/heun.py", "bend, value=0.5)", "bend)", RECURSION),
    Mutant(
        "Heun's second slope where there is no noise",
        "solvers/heun.py",
        "torch.where(step.sigma_s > 0, heun, euler)",
        "heun",
        ENDED,
    ),
    Mutant("churn without its upper limit", "solvers/heun.py", "math.sqrt(2) - 1)", "math.sqrt(2))", MATRIX),
    Mutant(
        "churn beyond the first time",
        "solvers/heun.py",
        "torch.minimum((1 + gamma) * ratio, path.ratio[0])",
        "(1 + gamma) * ratio",
        ENDED,
    ),
    Mutant("churn silenced at the end", "solvers/heun.py", "step.fresh(y)", "step.draw(y)", MATRIX),
    Mutant(
        "churn with the difference of the deviations",
        "solvers/heun.py",
        "(raised**2 - ratio**2).clamp(min=0).sqrt()",
        "(raised - ratio).clamp(min=0)",
        MATRIX,
    ),
    Mutant("Euler with sigma' upside down", "solvers/euler.py", "sigma + dt * d_sigma", "sigma - dt * d_sigma", MATRIX),
    Mutant(
        "reverse diffusion with 1 / a for 2 - a",
        "solvers/reverse_diffusion.py",
        "2 - alpha / path.alpha[1:]",
        "path.alpha[1:] / alpha",
        MATRIX,
    ),
    Mutant(
        "reverse diffusion with the posterior's noise",
        "solvers/reverse_diffusion.py",
        "sigma * rho.sqrt())",
        "path.sigma[1:] * rho.sqrt())",
        MATRIX,
    ),
    Mutant(
        "SDE-DPM-Solver's ratio of steps upside down",
        "solvers/sde_dpm_solver.py",
        "h[1:-1] / h[:-2]",
        "h[:-2] / h[1:-1]",
        MATRIX,
    ),
    Mutant(
        "SDE-DPM-Solver's noise without its factor 2",
        "solvers/sde_dpm_solver.py",
        "-torch.expm1(-2 * noisy)",
        "-torch.expm1(-noisy)",
        MATRIX,
    ),
    Mutant(
        "SDE-DPM-Solver with eta for its square",
        "solvers/sde_dpm_solver.py",
        "self.stochasticity**2 * h",
        "self.stochasticity * h",
        MATRIX,
    ),
    Mutant(
        "Runge-Kutta's slopes in the middle counted once",
        "solvers/runge_kutta.py",
        "2 * (second + third)",
        "second + third",
        MATRIX,
    ),
    Mutant(
        "Runge-Kutta with the end for the middle",
        "solvers/runge_kutta.py",
        "0.5 * (angle[1:] + angle[:-1])",
        "angle[1:]",
        MATRIX,
    ),
    Mutant(
        "DPM-Solver's prediction counted twice",
        "solvers/multistep.py",
        "path.alpha[1:] - past.sum(1)",
        "path.alpha[1:] + past.sum(1)",
        MATRIX,
    ),
    Mutant(
        "UniPC's correction where it was, and not at the end of the step",
        "solvers/multistep.py",
        "path.sigma[2:, None] / path.sigma[1:-1, None] * change[:-1]",
        "change[:-1]",
        MATRIX,
    ),
    Mutant(
        "UniPC corrected without what was predicted",
        "solvers/multistep.py",
        "change[:, 1:] -= predictor",
        "change[:, 1:] -= 0",
        MATRIX,
    ),
    Mutant(
        "the order of the last of few steps",
        "solvers/multistep.py",
        "if len(index) < _FEW else",
        "if False else",
        MATRIX,
    ),
    Mutant(
        "moments off by one", "solvers/multistep.py", "value = (1 - k * value) / h", "value = (1 - value) / h", MATRIX
    ),
    Mutant(
        "a grid with another exponent at its ends than within",
        "solvers/grids.py",
        "-14 * torch.log",
        "-12 * torch.log",
        GRID,
    ),
    Mutant("a jump of the same end for any steps", "solvers/grids.py", "_JUMP_PER_STEP * steps", "0.0 * steps", GRID),
    Mutant(
        "noise of refused steps forgotten",
        "solvers/adaptive.py",
        "self.paths.pass_by(passed | (ahead == 0))",
        "self.paths.depth.zero_()",
        ADAPTIVE,
    ),
    Mutant(
        "improved Euler without 1/2", "solvers/adaptive.py", "slope = 0.5 * (slope", "slope = 1.0 * (slope", ADAPTIVE
    ),
    Mutant("a step of NaN accepted", "solvers/adaptive.py", 'nan=float("inf")', "nan=0.0", ADAPTIVE),
    Mutant("the last noise of an adaptive mean", "solvers/adaptive.py", "improved - added", "improved", ADAPTIVE),
    Mutant("a bridge that is not tied", "solvers/brownian.py", "h * (1 - share)).sqrt()", "h).sqrt()", ADAPTIVE),
    Mutant(
        "the rest of a stretch with all of its increment",
        "solvers/brownian.py",
        "self._put(part, width - h, value - w)",
        "self._put(part, width - h, value)",
        ADAPTIVE,
    ),
    Mutant(
        "Langevin noise without its factor 2",
        "solvers/langevin.py",
        "moved = x + size * score + (2 * size).sqrt() * step.fresh(x)",
        "moved = x + size * score + size.sqrt() * step.fresh(x)",
        LANGEVIN,
    ),
    Mutant(
        "Langevin noise silenced at the end",
        "solvers/langevin.py",
        "moved = x + size * score + (2 * size).sqrt() * step.fresh(x)",
        "moved = x + size * score + (2 * size).sqrt() * step.draw(x)",
        MATRIX,
    ),
    Mutant(
        "Langevin step from the norm of the whole batch",
        "solvers/langevin.py",
        "score.square().flatten(1).sum(1), score[0].numel()",
        "score.square().flatten(1).sum(1).mean().expand(len(score)), score[0].numel()",
        LANGEVIN,
    ),
    Mutant(
        "Metropolis ratio without the densities of the proposals",
        "solvers/langevin.py",
        "return moved.log_prob - state.log_prob + squares.flatten(1).sum(1) + widths",
        "return moved.log_prob - state.log_prob",
        LANGEVIN,
    ),
    Mutant(
        "Metropolis ratio without the widths of the proposals",
        "solvers/langevin.py",
        "squares.flatten(1).sum(1) + widths",
        "squares.flatten(1).sum(1)",
        LANGEVIN,
    ),
    Mutant(
        "accepting what must be refused", "solvers/langevin.py", "uniform < log_ratio", "uniform > log_ratio", LANGEVIN
    ),
    Mutant(
        "a state out of scale between levels",
        "solvers/langevin.py",
        "return self.correct(step.own.scale * x, step), None",
        "return self.correct(x, step), None",
        MATRIX,
    ),
    Mutant(
        "corrections uncounted",
        "solvers/corrector.py",
        "return self.predictor.calls_per_step + self.corrector.calls_per_step",
        "return self.predictor.calls_per_step",
        OPTIONS,
    ),
    Mutant(
        "silence one step early",
        "solvers/sampler.py",
        "last = i == self.steps - 1",
        "last = i == self.steps - 2",
        RECURSION,
    ),
    Mutant("denoising uncounted", "solvers/sampler.py", ' + (self.final == "denoise")', "", OPTIONS),
    Mutant("the same noise again and again", "solvers/sampler.py", "number += ahead", "number += 0", OPTIONS),
    Mutant(
        "levels of t and s swapped",
        "solvers/sampler.py",
        "(column[:-1], column[1:])",
        "(column[1:], column[:-1])",
        MATRIX,
    ),
    Mutant("micro-batches with one noise", "solvers/base.py", "Noise(seed, first)", "Noise(seed)", OPTIONS),
    Mutant(
        "a grid beyond t_min",
        "solvers/grids.py",
        "= last_time(sde), sde.t_min",
        "= last_time(sde), 0.5 * sde.t_min",
        RECURSION,
    ),
    Mutant(
        "DDPM off by one level",
        "solvers/chains.py",
        "k, chain = self.steps - step.index",
        "k, chain = self.steps - step.index - 1",
        MATRIX,
    ),
    Mutant(
        "divergence without the last direction",
        "solvers/divergence.py",
        "return pullback.trace(directions, self.chunk)[:, None]",
        "return pullback.trace(directions[:-1], self.chunk)[:, None]",
        DIVERGENCE,
    ),
    Mutant(
        "divergence with the wrong sign",
        "solvers/divergence.py",
        "(part, self(part, keep=i + 1 < len(parts)))",
        "(part, -self(part, keep=i + 1 < len(parts)))",
        DIVERGENCE,
    ),
    Mutant(
        "standard error of one probe for that of the mean",
        "solvers/divergence.py",
        "estimates.std(1) / math.sqrt(count)",
        "estimates.std(1)",
        DIVERGENCE,
    ),
    Mutant(
        "orthogonal probes with the error of independent ones",
        "solvers/divergence.py",
        "share = 1 - self.probes / pullback.x[0].numel()",
        "share = 1.0",
        DIVERGENCE,
    ),
    Mutant(
        "a residual of the length of a whole probe",
        "solvers/divergence.py",
        "math.sqrt(left.shape[1] - self.rank)",
        "math.sqrt(left.shape[1])",
        DIVERGENCE,
    ),
    Mutant(
        "residual probes that are not projected",
        "solvers/divergence.py",
        "left = probes - basis @ (basis.mT @ probes)",
        "left = probes",
        DIVERGENCE,
    ),
    Mutant(
        "a divergence whose gradient is lost",
        "solvers/divergence.py",
        "with torch.set_grad_enabled(graph):",
        "with torch.no_grad():",
        DIVERGENCE,
    ),
    Mutant(
        "orthogonal probes of length 1",
        "solvers/probes.py",
        "q * (math.sqrt(size) * r.",
        "q * (1.0 * r.",
        DIVERGENCE,
    ),
    Mutant(
        "matched prior without the noise",
        "solvers/matched_prior.py",
        "variances = alpha**2 * moments.variances + noise",
        "variances = alpha**2 * moments.variances + 1e-9",
        MATCHED,
    ),
    Mutant(
        "matched prior with the mean of the data",
        "solvers/matched_prior.py",
        "MatchedPrior(alpha * moments.mean,",
        "MatchedPrior(moments.mean,",
        MATCHED,
    ),
    Mutant(
        "matched prior without the density across its axes",
        "solvers/matched_prior.py",
        "(residual - along @ axes.mT).square().sum(1) / self.rest",
        "0 * along.sum(1)",
        MATCHED,
    ),
    Mutant(
        "all that is left in each of the other axes",
        "solvers/matched_prior.py",
        "- variances.sum()) / (size - rank)",
        "- variances.sum()) / size",
        MATCHED,
    ),
    Mutant(
        "fewer steps of the subspace than converge",
        "solvers/matched_prior.py",
        "_MORE, _POWERS = 10, 8",
        "_MORE, _POWERS = 10, 1",
        MATCHED,
    ),
    Mutant(
        "divided differences of the nodes of the step after",
        "solvers/adams.py",
        "products[:, :-1].roll(1, 0)",
        "products[:, :-1].roll(-1, 0)",
        ADAMS,
    ),
    Mutant(
        "end of a step for its start in exponential Adams",
        "solvers/exponential_adams.py",
        "start, eps, before = 1 / (alpha * size)[:-1]",
        "start, eps, before = 1 / (alpha * size)[1:]",
        ADAMS,
    ),
    Mutant(
        "a correction over the step ahead",
        "solvers/adams.py",
        "AdamsTable(integrals(0), integrals(1),",
        "AdamsTable(integrals(0), integrals(0),",
        ADAMS,
    ),
    Mutant(
        "a correction from the predicted state",
        "solvers/exponential_adams.py",
        "return x, Memory(u, phi[:-1], energy, eps)",
        "return x, Memory(u + (weights * phi).sum(0), phi[:-1], energy, eps)",
        ADAMS,
    ),
    Mutant(
        "half a step of encoding without its half",
        "solvers/exponential_adams.py",
        "/ (2 * s[1] * size[1])",
        "/ (s[1] * size[1])",
        ADAMS,
    ),
    Mutant(
        "end of exponential Adams without the bend of the score",
        "solvers/exponential_adams.py",
        "return -(0.5 * d + bend) / s, bend / before",
        "return -0.5 * d / s, 0 * before",
        ADAMS,
    ),
    Mutant(
        "gates that forget the nodes before",
        "solvers/exponential_adams.py",
        "_MEMORY, _STRICT, _MANY, _TINY = 0.9,",
        "_MEMORY, _STRICT, _MANY, _TINY = 0.0,",
        ADAMS,
    ),
    Mutant(
        "gates of the ratio for its square",
        "solvers/exponential_adams.py",
        "1 + strict**4 * rise.square()",
        "1 + strict**4 * rise",
        ADAMS,
    ),
    Mutant(
        "importance weighting without -log K",
        "experiments/dequantization.py",
        ".exp().mean(0).log()",
        ".exp().sum(0).log()",
        IMPORTANCE,
    ),
    Mutant(
        "log-determinant with the wrong sign",
        "experiments/dequantization.py",
        "return dimensions * math.log(self.bin_width)",
        "return -dimensions * math.log(self.bin_width)",
        DEQUANTIZATION,
    ),
    Mutant(
        "dequantization noise of the place in the batch",
        "experiments/dequantization.py",
        "Noise(seed, first).words",
        "Noise(seed).words",
        DEQUANTIZATION,
    ),
    Mutant(
        "the same dequantization again and again",
        "experiments/dequantization.py",
        "FIRST_DRAW + number",
        "FIRST_DRAW",
        DEQUANTIZATION,
    ),
    Mutant(
        "truncated normal with the density of the whole one",
        "experiments/centres.py",
        " - math.log(self.mass)",
        "",
        DEQUANTIZATION,
    ),
    Mutant(
        "noise around centres without alpha",
        "experiments/centres.py",
        "return self.alpha * self.centres(k, torch.float64)",
        "return self.centres(k, torch.float64)",
        DEQUANTIZATION,
    ),
    Mutant(
        "decoder without the levels below",
        "experiments/centres.py",
        "for m in (-distance, distance)",
        "for m in (distance,)",
        DEQUANTIZATION,
    ),
    Mutant(
        "decoder with levels that are not there",
        "experiments/centres.py",
        "(k + m >= 0) & (k + m < self.levels)",
        "(k + m >= 0)",
        DEQUANTIZATION,
    ),
    Mutant(
        "decoder of the nearest levels alone",
        "experiments/centres.py",
        "math.ceil(_REACH / self.spacing)",
        "math.ceil(6 / self.spacing)",
        DEQUANTIZATION,
    ),
    Mutant(
        "dequantizing flow with its Jacobian upside down",
        "experiments/variational.py",
        "_log_logistic(h) - change)",
        "_log_logistic(h) + change)",
        VARIATIONAL,
    ),
    Mutant(
        "dequantizer trained against the score",
        "experiments/variational.py",
        "return log_q - per_sample(score * x)",
        "return log_q + per_sample(score * x)",
        VARIATIONAL,
    ),
    Mutant(
        "dequantizer trained without its entropy",
        "experiments/variational.py",
        "return log_q - per_sample(score * x)",
        "return -per_sample(score * x)",
        VARIATIONAL,
    ),
    Mutant(
        "uniform noise on a model of centres",
        "experiments/dequantizers.py",
        'here["dequantization"] = dequantizer.trained_on',
        'here["dequantization"] = trained["dequantization"]',
        CONVENTION,
    ),
    Mutant(
        "checkpoints that don't say are of centres",
        "experiments/checkpoint.py",
        'convention.setdefault("dequantization", Uniform.trained_on if',
        'convention.setdefault("dequantization", "centres" if',
        CONVENTION,
    ),
    Mutant(
        "continuous bound without its factor 1/2",
        "solvers/continuous_bound.py",
        "return 0.5 * error.square().flatten(1).sum(1) - of_reference, expected",
        "return error.square().flatten(1).sum(1) - of_reference, expected",
        BOUND,
    ),
    Mutant(
        "continuous bound weighed as if log-SNR were uniform",
        "solvers/continuous_bound.py",
        "weight = (high - low) / (sampling.points * density)",
        "weight = (high - low) / (sampling.points * torch.ones_like(density))",
        BOUND,
    ),
    Mutant(
        "continuous bound without its last step",
        "solvers/continuous_bound.py",
        "log_prob = -(prior + total.mean(0))",
        "log_prob = -(prior + strata.sum(1).mean(0))",
        BOUND,
    ),
    Mutant(
        "reference integrated without the shift of its mean",
        "solvers/importance.py",
        "return _half_sum(of_noise + shift.square() / variance * rest)",
        "return _half_sum(of_noise)",
        BOUND,
    ),
    Mutant(
        "one pass with the defect's sign turned",
        "solvers/one_pass.py",
        "defect = -torch.tensordot(",
        "defect = torch.tensordot(",
        ONE_PASS,
    ),
    Mutant(
        "one pass without the defect",
        "solvers/one_pass.py",
        "(defect + stretch)[:, None]",
        "(0 * defect + stretch)[:, None]",
        ONE_PASS,
    ),
    Mutant(
        "score of x for that of the state",
        "solvers/one_pass.py",
        "-(length / sigma) * pair.eps",
        "-pair.eps / sigma",
        ONE_PASS,
    ),
    Mutant(
        "one pass without the units of the state",
        "solvers/one_pass.py",
        "(defect + stretch)[:, None]",
        "defect[:, None]",
        ONE_PASS,
    ),
    Mutant(
        "estimated error without the defect",
        "solvers/integration.py",
        "torch.maximum((whole - half).abs(), found.defect.abs())",
        "0.01 * (whole - half).abs()",
        ("tests/solvers/test_one_pass.py", "-k", "safe_side and VE"),
    ),
    Mutant(
        "rule of Radau without its shift",
        "solvers/spectral.py",
        "    diagonal[-1] -= 1\n",
        "",
        ONE_PASS,
    ),
    Mutant(
        "clock v with the weights exchanged",
        "solvers/flow.py",
        "return common * near, common * far",
        "return common * far, common * near",
        ONE_PASS,
    ),
    Mutant(
        "line without the score",
        "solvers/line.py",
        "(divergence.summary(said.traces)[0].double() + along)",
        "(divergence.summary(said.traces)[0].double())",
        ("tests/solvers/test_one_pass.py", "-k", "line_is_exact and VE"),
    ),
    Mutant(
        "finer pass no finer",
        "solvers/integration.py",
        "InOnePass(self.method, steps=2 * self.steps)",
        "InOnePass(self.method, steps=self.steps + 1)",
        ("tests/solvers/test_one_pass.py", "-k", "coarse_pass"),
    ),
    Mutant(
        "bias of the endpoint without its half",
        "solvers/endpoint.py",
        "return 0.5 * (found * (found - eps))",
        "return 0.5 * (found * (found + eps))",
        ("tests/solvers/test_sample_and_endpoint.py", "-k", "bias"),
    ),
    Mutant(
        "sampled density with the change turned",
        "solvers/sample.py",
        "divergence.summary(-back)",
        "divergence.summary(back)",
        ("tests/solvers/test_sample_and_endpoint.py", "-k", "sampled and VP"),
    ),
    Mutant(
        "gradients through a frozen model",
        "solvers/likelihood.py",
        "    if gradients:\n        yield",
        "    if not gradients:\n        yield",
        ("tests/test_likelihood_identities.py", "-k", "gradients and one_pass"),
    ),
    Mutant(
        "a compiled model that is not used",
        "solvers/likelihood.py",
        "run = Compiled(run) if compile else run",
        "run = run",
        ("tests/test_likelihood_identities.py", "-k", "compiled"),
    ),
    Mutant(
        "a bar that does not show",
        "solvers/likelihood.py",
        "leave=False, disable=not progress)",
        "leave=False, disable=True)",
        ("tests/test_likelihood_identities.py", "-k", "bar"),
    ),
    Mutant(
        "parts of the data with the probes of the first",
        "solvers/likelihood.py",
        "            number += len(part)\n",
        "",
        ("tests/test_likelihood_identities.py", "-k", "gradients and one_pass"),
    ),
    Mutant(
        "prior of the data for that of the latent",
        "solvers/likelihood.py",
        "log_prior = prior(latent)",
        "log_prior = prior(x)",
        ("tests/test_likelihood_identities.py", "-k", "guided and VE and one_pass"),
    ),
    Mutant(
        "endpoint extrapolated too far",
        "solvers/endpoint.py",
        "1.5 * growth - 0.25 *",
        "1.5 * growth - 0.5 *",
        ("tests/test_likelihood.py", "-k", "fourth_and_sixth"),
    ),
    Mutant(
        "endpoint without the change of scale",
        "solvers/endpoint.py",
        "x[0].numel() * alpha.log().to(x) - 0.5 * growth",
        "-0.5 * growth",
        ("tests/test_likelihood.py", "-k", "counts_the_scale"),
    ),
    Mutant(
        "endpoint without the square of the score",
        "solvers/endpoint.py",
        "(trace + score.square().flatten(1).sum(1, keepdim=True))",
        "trace",
        ("tests/test_likelihood.py", "-k", "fourth_and_sixth"),
    ),
    Mutant(
        "another process in its own units",
        "sde/score.py",
        "scale = torch.hypot(sde.alpha(t), sde.sigma(t)) / length",
        "scale = 1 / length",
        ("tests/test_likelihood_identities.py", "-k", "another_process and one_pass"),
    ),
    Mutant(
        "one pass in the middle of time",
        "solvers/one_pass.py",
        "    times[0] = sde.t_min\n",
        "    times[0] = 2 * sde.t_min\n",
        ("tests/test_likelihood_identities.py", "-k", "histogram and one_pass or uniform_data and one_pass"),
    ),
    Mutant(
        "flow with the units of the other end",
        "solvers/integration.py",
        "scale, last_scale = path.scale(start), path.scale(end)",
        "last_scale, scale = path.scale(start), path.scale(end)",
        ("tests/test_likelihood_identities.py", "-k", "affine_map and VP"),
    ),
    Mutant(
        "line without the units of the state",
        "solvers/line.py",
        "return (log_prior + total + stretch).to(x)",
        "return (log_prior + total).to(x)",
        ("tests/solvers/test_one_pass.py", "-k", "line_is_exact and VE"),
    ),
    Mutant(
        "solver's error with its sign turned",
        "solvers/solver_error.py",
        "gap = (coarse.log_prob - fine.log_prob).double()",
        "gap = (fine.log_prob - coarse.log_prob).double()",
        ("tests/solvers/test_one_pass.py", "-k", "coarse_pass"),
    ),
    Mutant(
        "ODE's error with its sign turned",
        "experiments/audit.py",
        "return done.head(len(values)).log_prob - tight.log_prob, ()",
        "return tight.log_prob - done.head(len(values)).log_prob, ()",
        ("tests/experiments/test_audit.py", "-k", "error_of_the_ode"),
    ),
    Mutant(
        "error of the mean from a mean of errors",
        "experiments/audit.py",
        "abs(scale) * stderr.square().sum().sqrt().item() / len(stderr)",
        "abs(scale) * stderr.square().mean().sqrt().item()",
        ("tests/experiments/test_audit.py", "-k", "their_spread"),
    ),
    Mutant(
        "bits of the example for bits per dimension",
        "experiments/audit.py",
        "-1 / (dimensions * math.log(2))",
        "-1 / math.log(2)",
        ("tests/test_likelihood_identities.py", "-k", "uniform_data and one_pass and VE"),
    ),
    Mutant(
        "draws after the batch's own number",
        "experiments/estimator.py",
        "self.dequantizer.draw(values, self.seed, number, first)",
        "self.dequantizer.draw(values, self.seed, number)",
        ("tests/experiments/test_audit.py", "-k", "in_parts"),
    ),
    Mutant(
        "bound weighed with half of the posterior",
        "sde/bound_terms.py",
        "excess - torch.log1p(excess)).to(x0))\n\n\ndef last_divergence",
        "excess).to(x0))\n\n\ndef last_divergence",
        ("tests/solvers/test_bound.py", "-k", "definition"),
    ),
    Mutant(
        "transitions weighed at the wrong variance",
        "sde/bound_terms.py",
        "r = -v * gap",
        "r = -(1 - v) * gap",
        CHAIN,
    ),
    Mutant(
        "transitions without the divergence of their variances",
        "sde/bound_terms.py",
        "return torch.exp(r), 0.5 * (torch.expm1(r) - r)",
        "return torch.exp(r), 0.5 * torch.expm1(r)",
        CHAIN,
    ),
    Mutant(
        "hybrid whose bound moves the mean",
        "models/chain_objectives.py",
        "if self.detached else draw.pair",
        "if False else draw.pair",
        CHAIN,
    ),
    Mutant(
        "bound with the first level as any other",
        "models/chain_objectives.py",
        "torch.where(draw.k == 1, last,",
        "torch.where(draw.k == 0, last,",
        CHAIN,
    ),
    Mutant(
        "bound without the probability of its levels",
        "models/chain_objectives.py",
        "rate = 1 / (self.chain.steps * p).to(x0)",
        "rate = torch.ones_like(p).to(x0)",
        CHAIN,
    ),
    Mutant(
        "bound without its prior",
        "models/chain_objectives.py",
        "        return self.prior(x0) / x0[0].numel()\n\n\nclass Hybrid",
        "        return 0 * self.prior(x0) / x0[0].numel()\n\n\nclass Hybrid",
        CHAIN,
    ),
    Mutant(
        "levels drawn by the mean and not by its square",
        "models/level_sampling.py",
        ".square().mean(1).sqrt()",
        ".mean(1)",
        CHAIN,
    ),
    Mutant(
        "levels off by one",
        "models/level_sampling.py",
        "return k + 1, p[k]",
        "return k.clamp(min=1), p[k]",
        CHAIN,
    ),
    Mutant(
        "losses of a batch over each other",
        "models/level_sampling.py",
        "(self.seen[k - 1] + earlier) % self.history",
        "self.seen[k - 1] % self.history",
        CHAIN,
    ),
    Mutant(
        "variance from the channels of the mean",
        "models/learned_variance.py",
        "output[:, -(output.shape[1] // self.outputs) :]",
        "output[:, : output.shape[1] // self.outputs]",
        CHAIN,
    ),
    Mutant(
        "schedule that follows the loss between its ends",
        "models/vdm.py",
        "_scale_gradients(curve, 2 * loss.detach())",
        "_scale_gradients(curve, torch.ones_like(loss))",
        VDM,
    ),
    Mutant(
        "schedule that does not know of the network",
        "models/vdm.py",
        "t + (log_snr - log_snr.detach()) / slope",
        "t",
        VDM,
    ),
    Mutant(
        "schedule whose gradient counts twice in the network",
        "models/vdm.py",
        "with held(model.sde):",
        "if True:",
        VDM,
    ),
    Mutant(
        "continuous objective without its prior",
        "models/vdm.py",
        "fixed = self._prior(sde, x0, last) + self._last",
        "fixed = self._last",
        VDM,
    ),
    Mutant(
        "ends of a schedule that stay",
        "sde/learned.py",
        "self.log_snr_max + shifts[0], self.log_snr_min + shifts[1]",
        "self.log_snr_max + shifts[0], self.log_snr_min + 0 * shifts[1]",
        VDM,
    ),
    Mutant(
        "width of a bin left out of a bound",
        "solvers/bound.py",
        "0.0 if self.discrete else math.log2(bin_width)",
        "0.0",
        ("tests/test_bounds.py", "-k", "bits_per_dim"),
    ),
    Mutant(
        "gap's error from independent errors",
        "experiments/bounds.py",
        "if flow_log_prob is not None:\n        differences",
        "if False:\n        differences",
        ("tests/test_bounds.py", "-k", "order and VP"),
    ),
    Mutant(
        "pieces of a bound with the first one's noise",
        "experiments/bounds.py",
        "first=batch_size * i, **options",
        "first=0 * i, **options",
        ("tests/test_bounds.py", "-k", "estimates_that_they_name"),
    ),
    Mutant(
        "one order for all epochs",
        "experiments/order.py",
        "Noise(seed, epoch).words((1, n), _PERMUTATION)",
        "Noise(seed, 0).words((1, n), _PERMUTATION)",
        ORDER,
    ),
    Mutant(
        "an order that is none",
        "experiments/order.py",
        "[0].argsort(stable=True)",
        "[0] % n",
        ORDER,
    ),
    Mutant(
        "the next epoch in the order of the last",
        "experiments/order.py",
        "[table(self.seed, e, self.n)[number",
        "[table(self.seed, int(number[0]) // self.n, self.n)[number",
        ORDER,
    ),
    Mutant(
        "upside down for mirrored",
        "experiments/order.py",
        "values.flip(-1), values",
        "values.flip(-2), values",
        ORDER,
    ),
    Mutant(
        "coins that follow the order",
        "experiments/order.py",
        "Noise(seed, epoch).words((1, n), _MIRROR)[0] % 2 == 1",
        "permutation(seed, epoch, n) % 2 == 1",
        ORDER,
    ),
    Mutant(
        "batches from the beginning after resuming",
        "experiments/order.py",
        "self.order.batch(self.first + i * self.order.batch_size)",
        "self.order.batch(i * self.order.batch_size)",
        ORDER,
    ),
    Mutant(
        "random numbers that begin anew",
        "experiments/training_state.py",
        "restore_random_states(states[self.group.rank])",
        "None",
        PLAIN,
    ),
    Mutant(
        "the state of the step left behind",
        "experiments/training_state.py",
        'self.stepper.load(step, content["ema"])',
        "None",
        PLAIN,
    ),
    Mutant(
        "weights left behind",
        "experiments/training_state.py",
        'self.stepper.load_weights(content["model"])',
        "None",
        PLAIN,
    ),
    Mutant(
        "any examples will do",
        "experiments/training_state.py",
        'content["training"]["examples"] != fingerprint(examples)',
        "False",
        RESUME,
    ),
    Mutant(
        "a fingerprint of the number alone",
        "experiments/training_state.py",
        "found.update(some.contiguous().numpy().tobytes())",
        'found.update(b"")',
        RESUME,
    ),
    Mutant(
        "the last is the best",
        "experiments/training_state.py",
        "better = self.validation_loss < self.best",
        "better = True",
        EARLY,
    ),
    Mutant(
        "no checkpoint before the last",
        "experiments/retention.py",
        "self._link(last, PREVIOUS)",
        "None",
        RESUME,
    ),
    Mutant(
        "a damaged checkpoint is the end",
        "experiments/retention.py",
        'log.warning("passing over a checkpoint: %s", error)',
        "raise",
        RESUME,
    ),
    Mutant(
        "the best of another run left there",
        "experiments/retention.py",
        "if file.parent != self.folder and best.is_file():",
        "if False:",
        ("tests/experiments/test_resume.py", "-k", "best_of_another"),
    ),
    Mutant(
        "no lock",
        "experiments/run.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "None",
        FOLDER,
    ),
    Mutant(
        "a child keeps the folder",
        "experiments/run.py",
        "os.register_at_fork(after_in_child=self._lock.close)",
        "None",
        FOLDER,
    ),
    Mutant(
        "rows beyond the checkpoint stay",
        "experiments/run.py",
        'if int(row["step"]) <= step]',
        "if True]",
        FOLDER,
    ),
    Mutant(
        "an impatient signal is put off too",
        "experiments/signals.py",
        "if _State.deferring and _State.first is None:",
        "if _State.deferring:",
        SIGNALS,
    ),
    Mutant(
        "handlers that stay",
        "experiments/signals.py",
        "signal.signal(number, handler)\n",
        "None\n",
        SIGNALS,
    ),
    Mutant(
        "an echo taken for impatience",
        "experiments/signals.py",
        "now - _State.first[1] > _ECHO",
        "True",
        SIGNALS,
    ),
    Mutant(
        "a signal that is not obeyed",
        "experiments/training.py",
        "return signals.requested() is not None",
        "return False",
        PLAIN,
    ),
    Mutant(
        "an interrupted step is judged",
        "experiments/training.py",
        "best = regular and self.progress.judge()",
        "best = self.progress.judge()",
        PLAIN,
    ),
    Mutant(
        "one step that is not finite ends the training",
        "experiments/training.py",
        "if found.run >= self.settings.max_bad_steps:",
        "if True:",
        TRAINING,
    ),
    Mutant(
        "no end of steps that are not finite",
        "experiments/training.py",
        "if found.run >= self.settings.max_bad_steps:",
        "if False:",
        TRAINING,
    ),
    Mutant(
        "settings without an end",
        "experiments/build.py",
        "0 < value < math.inf",
        "0 < value",
        PREFLIGHT,
    ),
    Mutant(
        "what a module imports is a part of it",
        "experiments/build.py",
        "if not (is_plugin(target) or _exports(module, name, part)):",
        "if False:",
        BUILD,
    ),
    Mutant(
        "a jackknife that divides by too much",
        "experiments/jackknife.py",
        "/ (h - 1)).mean(dim=0)",
        "/ h).mean(dim=0)",
        QUALITY,
    ),
    Mutant(
        "a distance to itself in U-statistics",
        "experiments/distances.py",
        "block.diagonal(offset=part.start).zero_()",
        "block.diagonal().zero_()",
        DISTANCES,
    ),
    Mutant(
        "pairs of a group that is left out counted twice",
        "experiments/distances.py",
        "gone = (2 * sums.sum(dim=1) - sums.diagonal())[:used]",
        "gone = (2 * sums.sum(dim=1))[:used]",
        QUALITY,
    ),
    Mutant(
        "a neighbour that is left out and stays",
        "experiments/neighbours.py",
        "radii[1 + g, groups.label == g] = -1",
        "pass",
        QUALITY,
    ),
    Mutant(
        "the error of a sum for that of a mean of seeds",
        "experiments/quality.py",
        "/ len(sets) ** 2",
        "/ len(sets)",
        QUALITY,
    ),
    Mutant(
        "features that can't be learned inside no_grad",
        "experiments/features.py",
        "with torch.inference_mode(False), torch.enable_grad():",
        "with torch.enable_grad():",
        FEATURES,
    ),
    Mutant(
        "an NLL gap without the entropy",
        "experiments/known.py",
        "Measured((values.mean() - self._entropy.mean()).item()",
        "Measured(values.mean().item()",
        KNOWN,
    ),
    Mutant(
        "an RMSE without its root's derivative",
        "experiments/known.py",
        "/ (2 * mean.sqrt()).clamp_min(1e-300)",
        "",
        KNOWN,
    ),
    Mutant(
        "the exact flow from another seed's noise",
        "experiments/known.py",
        "sample(self.seed + i, dtype=torch.float32)",
        "sample(self.seed, dtype=torch.float32)",
        KNOWN,
    ),
    Mutant(
        "a front that forgets passes back",
        "experiments/advice.py",
        'return row["nfe"] + row["backward"]',
        'return row["nfe"]',
        ADVICE,
    ),
    Mutant(
        "a floor of one draw for the mean of many",
        "experiments/advice.py",
        '_WITHIN * floor["std"] / seeds**0.5',
        '_WITHIN * floor["std"]',
        ADVICE,
    ),
    Mutant(
        "every seed the first one",
        "experiments/comparison.py",
        "draw(solver, model, shape, config.seed + i, device",
        "draw(solver, model, shape, config.seed, device",
        LEAGUE,
    ),
    Mutant(
        "a search that looks at the test split",
        "experiments/comparison.py",
        "return getattr(self.problem.data, self.split)",
        "return self.problem.data.test",
        LEAGUE,
    ),
    Mutant(
        "features for metrics of x",
        "experiments/comparison.py",
        "own = reference[metric.of_features]",
        "own = reference[True]",
        LEAGUE,
    ),
    Mutant(
        "the calls of a wrapper for those of its network",
        "solvers/calls.py",
        "return list(dict.fromkeys(inner)) or [model]",
        "return [model]",
        CALLS,
    ),
    Mutant(
        "a pass back for each part of the pair",
        "solvers/calls.py",
        'torch.autograd.graph.register_multi_grad_hook(parts, count_back, mode="any")',
        "_ = [part.register_hook(count_back) for part in parts]",
        CALLS,
    ),
    Mutant(
        "a deviation for a standard error over seeds",
        "experiments/grouping.py",
        "return mean(means), stdev(means) / len(means) ** 0.5",
        "return mean(means), stdev(means)",
        REPORT,
    ),
    Mutant(
        "different numbers of samples in one table",
        "experiments/grouping.py",
        'for name in ("samples", "reference", "features")}',
        'for name in ("reference", "features")}',
        REPORT,
    ),
    Mutant(
        "a dead run that is running",
        "experiments/collection.py",
        'if state == "running" and died(folder):',
        "if False:",
        REPORT,
    ),
    Mutant(
        "markup in a cell",
        "experiments/table_cells.py",
        'words = " ".join(links) if cell.links else escape(cell.text)',
        'words = " ".join(links) if cell.links else cell.text',
        PAGE,
    ),
    Mutant(
        "best without its error", "experiments/table_cells.py", "    limit = lowest + error", "    limit = lowest", PAGE
    ),
    Mutant(
        "another sample in the same column",
        "experiments/sampler_figures.py",
        "tile(torch.cat(rows), len(rows[0]))",
        "tile(torch.stack(rows, 1).flatten(0, 1), len(rows[0]))",
        FIGURES,
    ),
    Mutant(
        "an animation without pauses",
        "experiments/animation.py",
        "[FIRST, *[FRAME] * (frames - 2), LAST][-frames:]",
        "[FRAME] * frames",
        FIGURES,
    ),
    Mutant(
        "a frame late",
        "experiments/animation.py",
        "picture.set_data(mosaics[i].numpy())",
        "picture.set_data(mosaics[max(i - 1, 0)].numpy())",
        FIGURES,
    ),
    Mutant("two colours that one eye takes for one", "experiments/canvas.py", '"#CC79A7"', '"#1A9E83"', FIGURES),
    Mutant(
        "one figure that ends the others",
        "experiments/figure_tasks.py",
        "except SURVIVED as error:",
        "except MemoryError as error:",
        DRAWN,
    ),
    Mutant(
        "the last weights after an early stop", "experiments/networks.py", "(BEST if early else LAST)", "LAST", STORE
    ),
    Mutant(
        "what follows depends on who trained",
        "experiments/networks.py",
        "    seed_everything(session.config.seed)  # what follows must not depend on who trained\n",
        "",
        STORE,
    ),
    Mutant(
        "networks that an early stop tells apart",
        "experiments/training_state.py",
        "return found | judged",
        "return found",
        STORE,
    ),
    Mutant(
        "a failed cell tried twice in one sweep",
        "experiments/cells.py",
        'if status.get("state") == "done" or (status and status.get("sweep") == invocation):',
        'if status.get("state") == "done":',
        SWEEP,
    ),
    Mutant(
        "20 and 20.0 are two cells",
        "experiments/cells.py",
        "return float(value) if number else value",
        "return value",
        SWEEP,
    ),
    Mutant(
        "rounds without an end",
        "experiments/sweep.py",
        "return left if 0 < left < left_before else None",
        "return left if left else None",
        SWEEP,
    ),
    Mutant(
        "a gradient that leaves the invariant",
        "models/guidance.py",
        "pair.eps - alpha / sigma * shift",
        "pair.eps + alpha / sigma * shift",
        GUIDANCE,
    ),
    Mutant(
        "a classifier's gradient without alpha",
        "models/guidance.py",
        "return pair, sigma.square() / alpha * gradient",
        "return pair, sigma.square() * gradient",
        GUIDANCE,
    ),
    Mutant(
        "a blend of two models the other way round",
        "models/guidance.py",
        "torch.lerp(a, b, self.scale)",
        "torch.lerp(b, a, self.scale)",
        GUIDANCE,
    ),
    Mutant(
        "labels of all classes with one too many",
        "models/guidance.py",
        "classes is not None and high >= classes",
        "classes is not None and high > classes",
        GUIDANCE,
    ),
    Mutant(
        "moment matching without the noise",
        "models/posterior.py",
        "return variance * p + self.operator(spread), spread",
        "return self.operator(spread), spread",
        GUIDANCE,
    ),
    Mutant(
        "a noise level in the place of its square",
        "models/posterior.py",
        "self.noise_std.to(x).square()",
        "self.noise_std.to(x)",
        GUIDANCE,
    ),
    Mutant(
        "PiGDM for unit variance alone",
        "models/posterior.py",
        "(self.data_std * sigma).square() / ((self.data_std * alpha).square() + sigma.square())",
        "sigma.square() / (alpha.square() + sigma.square())",
        GUIDANCE,
    ),
    Mutant(
        "conjugate gradients that forget the direction",
        "models/conjugate_gradients.py",
        "residual + expand(ratio, target) * direction",
        "residual",
        GUIDANCE,
    ),
    Mutant(
        "a known part with one noise at all times",
        "models/replacement.py",
        "_number(t), x.device",
        "0, x.device",
        GUIDANCE,
    ),
    Mutant(
        "a known part without its noise in the pair",
        "models/replacement.py",
        "torch.where(mask, eps, pair.eps)",
        "pair.eps",
        GUIDANCE,
    ),
    Mutant(
        "a basis turned the wrong way",
        "models/replacement.py",
        "self.model(turned(self.matrix.mT, x), t",
        "self.model(turned(self.matrix, x), t",
        GUIDANCE,
    ),
    Mutant(
        "a posterior mixture that forgets its weights",
        "models/exact.py",
        "self.log_weights + of_misfit",
        "of_misfit",
        GUIDANCE,
    ),
    Mutant(
        "rows that don't follow the samples",
        "sde/score.py",
        "start = noise.first - self.noise.first",
        "start = 0",
        GUIDANCE,
    ),
    Mutant(
        "a model that is not told its samples",
        "solvers/base.py",
        "run = of_samples(model, noise, len(part))",
        "run = model",
        GUIDANCE,
    ),
    Mutant(
        "a likelihood that is not told its samples",
        "solvers/likelihood.py",
        "run = of_samples(model, Noise(0, number), len(part))",
        "run = model",
        GUIDANCE,
    ),
    Mutant(
        "resampling without the scale of the process",
        "solvers/repaint.py",
        "x = stretch.scale * x + stretch.std * step.fresh(x)",
        "x = x + stretch.std * step.fresh(x)",
        REPAINT,
    ),
    Mutant(
        "one noise of the known part for all rounds",
        "solvers/repaint.py",
        "noise = step.noise.other(i)",
        "noise = step.noise",
        REPAINT,
    ),
    Mutant(
        "resampling whose rounds end without noise",
        "solvers/repaint.py",
        "last = i == self.rounds - 1 and k == self.jump - 1",
        "last = k == self.jump - 1",
        REPAINT,
    ),
    Mutant(
        "a blur's adjoint without the flip",
        "models/image_operators.py",
        "self.kernel.flip(tuple(range(self.kernel.dim())))",
        "self.kernel",
        OPERATORS,
    ),
    Mutant("the adjoint of a mean as that of a sum", "models/image_operators.py", "(y / self._count)", "y", OPERATORS),
    Mutant(
        "a projection whose rows depend on the machine",
        "models/operators.py",
        "(q * r.diagonal().sign()).mT",
        "q.mT",
        OPERATORS,
    ),
    Mutant(
        "an observation with the noise of a sampler",
        "models/operators.py",
        "range(7 * 2**29, 7 * 2**29 + 4)",
        "range(4)",
        OPERATORS,
    ),
    Mutant(
        "observations in parts with one noise",
        "models/operators.py",
        "Noise(seed, first).normal(tuple(y.shape), NOISE",
        "Noise(seed).normal(tuple(y.shape), NOISE",
        OPERATORS,
    ),
    Mutant(
        "a linear function that is hardly tried",
        "models/linear_function.py",
        "_A, _B = -300.0, 7.0",
        "_A, _B = 3.0, 7.0",
        OPERATORS,
    ),
    Mutant(
        "labels that begin anew on resuming",
        "experiments/classes.py",
        "itertools.count(first, settings.batch_size)",
        "itertools.count(0, settings.batch_size)",
        CLASSES,
    ),
    Mutant(
        "labels of all processes for each",
        "experiments/classes.py",
        "yield {_TOLD: take(label)",
        "yield {_TOLD: label",
        CLASSES,
    ),
    Mutant(
        "a coin that is the permutation's",
        "experiments/order.py",
        "_PERMUTATION, _MIRROR, _UNIFORM = 0, 1, 2",
        "_PERMUTATION, _MIRROR, _UNIFORM = 0, 1, 0",
        CLASSES,
    ),
    Mutant("a validation without classes", "experiments/training.py", "noise, **self.told)", "noise)", CLASSES),
    Mutant(
        "a generative classifier without its prior",
        "experiments/classify_task.py",
        "self.log_prob + self.prior.double().log()",
        "self.log_prob",
        CLASSIFY,
    ),
    Mutant(
        "a classifier of noised data with kinks",
        "models/noisy_classifier.py",
        "F.silu(self.norm(h))",
        "F.relu(self.norm(h))",
        ("tests/models/test_noisy_classifier.py",),
    ),
    Mutant(
        "conjugate gradients along what no covariance has",
        "models/conjugate_gradients.py",
        " & (curvature >= least)",
        "",
        GUIDANCE,
    ),
    Mutant(
        "an observation read where a mask hides",
        "models/posterior.py",
        "_explained(observation_rows(observation, operator), operator)",
        "observation_rows(observation, operator)",
        ("tests/models/test_posterior_samples.py",),
    ),
    Mutant(
        "samples with the observation of another example",
        "experiments/posterior_tasks.py",
        "observation.repeat_interleave(settings.samples, dim=0)",
        "observation.repeat(settings.samples, *[1] * (observation.dim() - 1))",
        ("tests/experiments/test_posterior_tasks.py",),
    ),
    Mutant(
        "samples with the class of another row",
        "experiments/posterior_tasks.py",
        "chosen.repeat_interleave(settings.samples)",
        "chosen.repeat(settings.samples)",
        ("tests/experiments/test_posterior_tasks.py",),
    ),
    Mutant(
        "a coverage as of one sample more",
        "experiments/posteriors.py",
        "_mean(inside, (k - 1) / (k + 1))",
        "_mean(inside, (k - 1) / k)",
        ("tests/experiments/test_posterior_tasks.py",),
    ),
    Mutant(
        "observations with noise that is no part of the training",
        "experiments/observing.py",
        "self.noise_std * noise_like(y, source)",
        "self.noise_std * noise_like(y, None)",
        ("tests/experiments/test_observing.py",),
    ),
    Mutant(
        "a network asked under another noise",
        "experiments/observing.py",
        'if not same or not math.isclose(about["noise_std"], noise_std, rel_tol=1e-6):',
        "if not same:",
        ("tests/experiments/test_observing.py",),
    ),
    Mutant(
        "an observation that the embedding never sees",
        "models/observed.py",
        "or y is None else (None, y.flatten(1))",
        "or y is None else (None, None)",
        ("tests/models/test_observed.py",),
    ),
    Mutant(
        "an observed model without its observation",
        "experiments/session.py",
        "observing.refuse_observed(about, path)",
        "observing.refuse_observed(None, path)",
        ("tests/experiments/test_observing.py",),
    ),
    Mutant(
        "a scale of 0 that leaves the model at singular ends",
        "models/guidance.py",
        "self.singular = self.singular and self.scale != 0",
        "self.singular = self.singular",
        GUIDANCE,
    ),
]


def run(root: Path, tests: tuple[str, ...]) -> tuple[int, str, float]:
    """Exit code of pytest under ``root``, the first test that failed or the last line, and seconds."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *tests]
    start = time.monotonic()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    failed = re.search(r"^FAILED (\S+?::[^\s\[]+)", done.stdout, re.MULTILINE)
    said = failed[1] if failed else (done.stdout.strip().splitlines() or ["nothing"])[-1]
    return done.returncode, said, time.monotonic() - start


def copied(folder: str) -> Path:
    """A copy of what is tested."""
    root = Path(folder)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    return root


def tried(mutant: Mutant) -> tuple[str, str, float]:
    """What became of a mutant, the test that told, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        root = copied(folder)
        try:
            mutant.apply(root)
        except ValueError as error:
            return "TEXT GONE", str(error), 0.0
        code, said, seconds = run(root, mutant.tests)
    return {0: "SURVIVED", 1: "killed"}.get(code, "BROKEN"), said, seconds


def sound(mutants: list[Mutant]) -> bool:
    """Whether the tests pass without a mutant."""
    with tempfile.TemporaryDirectory() as folder:
        root = copied(folder)
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            code, said, seconds = run(root, tests)
            print(f"{'passed' if code == 0 else 'FAILED':9}  {'no mutant':55}  {seconds:5.1f} s  {said}", flush=True)
            if code:
                return False
    return True


def main(names: list[str]) -> int:
    """0 if every mutant named (all of them by default) is killed."""
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if not chosen or not sound(chosen):
        return 1
    alive = 0
    for mutant in chosen:
        fate, said, seconds = tried(mutant)
        alive += fate != "killed"
        print(f"{fate:9}  {mutant.name:55}  {seconds:5.1f} s  {said}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants killed")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
