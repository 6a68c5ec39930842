"""Whether a process, a user's own for instance, is what it says: every relation between its methods, measured.

``verify(MySDE())`` gives a table with a row for each check of ``experiments.checks`` and ``experiments.path_checks``. A
row *holds*, *FAILS*, *warns* or is *not applicable* (to a process without a Gaussian kernel). It is about mathematics,
and not about the choice of parameters: that the prior is not quite p_T, which more noise would mend, is a warning; all
else that is not within its bound is an error of the code.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from experiments import checks, path_checks
from experiments.checks import Subject
from experiments.report import table
from sde import SDE, GaussianSDE
from sde.diagnosis import PRIOR_BOUND
from solvers.likelihood import frozen

HOLDS, FAILS, WARNS, NOT_APPLICABLE = "holds", "FAILS", "warns", "not applicable"


class VerificationFailed(RuntimeError):
    """A process is not what it says."""


@dataclass(frozen=True)
class Check:
    """``measure`` gives a number that must not exceed ``bound``; ``meaning`` is what it means when it does.

    kernel: whether it applies to processes with a Gaussian kernel, to those without one, or (None) to all.
    """

    name: str
    measure: Callable[[Subject], float]
    bound: float
    meaning: str
    kernel: bool | None = True
    beyond: str = FAILS


CHECKS = (
    Check("times", checks.times, 0, "0 <= t_min < t_max < infinity must hold, with drift and diffusion finite", None),
    Check("log_snr falls", checks.falling, 0, "the noise does not grow from t_min to t_max"),
    Check("shapes", checks.shapes, 0, "drift has the shape and dtype of x; diffusion, alpha, ... those of t", None),
    Check("own times", checks.own_times, 1e-9, "a sample's result depends on the times of its companions", None),
    Check("finite", checks.finite, 0, "a coefficient is not finite, or not positive, where solvers need it", None),
    Check("linear drift", checks.linear, 1e-6, "drift is not f(t) x, so that the kernel is not N(alpha x_0, sigma^2)"),
    Check("mean", checks.mean, 1e-6, "alpha' = f alpha: drift and alpha belong to different processes"),
    Check("variance", checks.variance, 1e-6, "(sigma^2)' = 2 f sigma^2 + g^2: sigma does not belong to drift and g"),
    Check("coefficients", checks.coefficients, 1e-6, "coefficients(t) are not alpha, sigma and their derivatives"),
    Check("log_snr", checks.log_snr, 1e-6, "log_snr is not 2 log(alpha / sigma)"),
    Check("time", checks.time, 1e-6, "time(log_snr(t)) is not t, or leaves [t_min, t_max]"),
    Check("kernel", checks.kernel, 1e-6, "kernel(s, t) does not carry alpha_s, sigma_s into alpha_t, sigma_t"),
    Check("composition", checks.composition, 1e-6, "kernel(s, t) after kernel(r, s) is not kernel(r, t)"),
    Check("perturb", checks.perturb, 1e-6, "perturb is not alpha x_0 + sigma eps"),
    Check("float32", checks.float32, 1e-5, "digits cancel in float32: take expm1, log1p or another form"),
    Check(
        "Fokker-Planck",
        path_checks.fokker_planck,
        1e-6,
        "p_t = N(alpha x_0, sigma^2) does not solve the SDE's equation",
    ),
    Check("simulation", path_checks.simulation, 5, "simulated paths leave the kernel, in standard errors"),
    Check("probability flow", path_checks.probability_flow, 1e-3, "f - g^2 score / 2 does not carry p_t; nats"),
    Check("likelihood", path_checks.likelihood, 1e-3, "log_likelihood of an exact model is wrong under it; nats"),
    Check("simulation end", path_checks.simulation_end, 0.25, "simulated paths do not end in the prior", kernel=False),
    Check("prior density", path_checks.prior_density, 1e-3, "exp(prior.log_prob) does not integrate to one", None),
    Check(
        "prior samples",
        path_checks.prior_samples,
        5,
        "prior.sample and prior.log_prob differ, in standard errors",
        None,
    ),
    Check("prior deviation", path_checks.prior_std, 0.01, "the prior is wider or narrower than x_t at t_max"),
    Check(
        "prior mismatch",
        path_checks.prior_mismatch,
        PRIOR_BOUND,
        "nats/dim between the prior and p_T of unit data: more noise at t_max would mend it",
        beyond=WARNS,
    ),
)


@dataclass(frozen=True)
class Row:
    """One check of a process. measured: a number, or words for what is none; None where it does not apply."""

    check: str
    measured: float | str | None
    bound: float
    state: str
    meaning: str

    def cells(self) -> tuple[str, ...]:
        """The columns of the table."""
        if self.state == NOT_APPLICABLE:
            return self.check, "", "", self.state
        value = "see below" if isinstance(self.measured, str) else f"{self.measured:.2g}"
        return self.check, value, f"{self.bound:g}", self.state

    def explanation(self) -> str:
        """What it means that it does not hold."""
        words = isinstance(self.measured, str)
        found = f"found: {self.measured}" if words else f"off by {self.measured:.3g}, more than {self.bound:g}"
        return f"{self.state}  {self.check}: {self.meaning}; {found.replace('off by nan', 'not a number')}"


@dataclass(frozen=True)
class Verification:
    """The checks of one process."""

    title: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing fails."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that fail."""
        return tuple(row.check for row in self.rows if row.state == FAILS)

    @property
    def warned(self) -> tuple[str, ...]:
        """Names of the checks that warn."""
        return tuple(row.check for row in self.rows if row.state == WARNS)

    def summary(self) -> dict[str, Any]:
        """Plain values for a file; a number that is not finite is in words."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["measured"] = row["measured"] if _plain(row["measured"]) else str(row["measured"])
        return {"sde": self.title, "ok": self.ok, "failed": self.failed, "warned": self.warned, "rows": rows}

    def __str__(self) -> str:
        count = sum(row.state != NOT_APPLICABLE for row in self.rows)
        verdict = f"{len(self.failed)} of {count} checks FAIL: {', '.join(self.failed)}"
        verdict += "; begin with the first, as others may follow from it" * (len(self.failed) > 1)
        lines = [self.title, "", table(("check", "measured", "bound", ""), [row.cells() for row in self.rows]), ""]
        lines += [row.explanation() for row in self.rows if row.state in (FAILS, WARNS)]
        return "\n".join([*lines, f"all {count} checks that apply hold" if self.ok else verdict])


def verify(sde: SDE, seed: int = 0) -> Verification:
    """Measure everything that must hold of ``sde``; about a second. An error inside a check is a failure of that check.

    >>> from sde import VP
    >>> verify(VP()).ok
    True
    """
    if not isinstance(sde, SDE):
        raise TypeError(f"verify: expected an SDE such as VP(), found {sde!r}; give an instance, not the class")
    gaussian = isinstance(sde, GaussianSDE)
    subject = Subject(sde, seed)
    with torch.no_grad(), frozen(sde) if isinstance(sde, nn.Module) else nullcontext():
        rows = tuple(_row(check, subject, gaussian) for check in CHECKS if not (gaussian and check.kernel is False))
    return Verification(str(sde), rows)


def _row(check: Check, subject: Subject, gaussian: bool) -> Row:
    if check.kernel and not gaussian:
        return Row(check.name, None, check.bound, NOT_APPLICABLE, check.meaning)
    try:
        measured = check.measure(subject)
    except checks.Violation as error:
        return Row(check.name, str(error), check.bound, FAILS, check.meaning)
    except Exception as error:  # of the user's code, and of solvers under it: of any type
        return Row(check.name, checks.brief(error), check.bound, FAILS, check.meaning)
    state = HOLDS if measured <= check.bound else check.beyond  # NaN is beyond any bound
    return Row(check.name, measured, check.bound, state, check.meaning)


def _plain(value: float | str | None) -> bool:
    return not isinstance(value, float) or value - value == 0
