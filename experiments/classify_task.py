r"""The likelihood of a class-conditional model as a classifier: Bayes' rule with log p(x | c) of each class's flow.

    p(c | x) = p(c) p(x | c) / p(x),        p(x) = sum_c p(c) p(x | c),

p(c) the share of class c among the training examples. (Score-based generative classifiers of this kind are those of
Zimmermann et al., 2021.) The likelihood of a class is that of the flow of its scores (``solvers.log_likelihood``), for
integer levels the bound that a dequantizer gives; all classes see the same draws and the same probes of an example, so
that what is random in them mostly cancels in their differences.

That p(x) is the density of a mixture of K flows, the model without a class has one of its own: their likelihoods of the
same examples tell how far what was learned for the classes agrees with what was learned for all.
"""

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from experiments import likelihood_figures
from experiments.build import ConfigError
from experiments.classes import number_of, only_with_class
from experiments.estimator import Estimator, evaluate
from experiments.likelihood_tasks import check_settings, prepared
from experiments.run import Run, write_columns
from experiments.session import Session, load_model
from experiments.table_cells import table
from models import Conditioned
from sde import ScoreModel

log = logging.getLogger(__name__)
_WORST = 6


@dataclass(frozen=True, eq=False)
class Classified:
    """What the likelihoods of K classes say of N labelled examples.

    Parameters
    ----------
    log_prob: log p(x | c), nats, float64 ``(N, K)``. prior: p(c), ``(K,)``. labels: the true classes, int64 ``(N,)``.
    without: log p(x) of the model without a class, ``(N,)``, or None.
    dimensions: of an example of levels, for bits per dimension; None for continuous data.
    """

    log_prob: Tensor
    prior: Tensor
    labels: Tensor
    without: Tensor | None = None
    dimensions: int | None = None

    @cached_property
    def joint(self) -> Tensor:
        """log p(x, c), ``(N, K)``."""
        return self.log_prob + self.prior.double().log()

    @cached_property
    def marginal(self) -> Tensor:
        """log p(x) = log sum_c p(x, c), ``(N,)``."""
        return self.joint.logsumexp(dim=1)

    @cached_property
    def predicted(self) -> Tensor:
        """The most probable class, ``(N,)``."""
        return self.joint.argmax(dim=1)

    @property
    def accuracy(self) -> tuple[float, float]:
        """The share of examples whose class is the most probable one, and its binomial standard error."""
        p = (self.predicted == self.labels).double().mean().item()
        return p, (p * (1 - p) / len(self.labels)) ** 0.5

    @property
    def log_posterior(self) -> Tensor:
        """log p(true class | x), nats, ``(N,)``."""
        return self.joint.gather(1, self.labels[:, None])[:, 0] - self.marginal

    @property
    def confusion(self) -> Tensor:
        """How many examples of each class (rows) were taken for each (columns), ``(K, K)``."""
        k = len(self.prior)
        return torch.bincount(self.labels * k + self.predicted, minlength=k * k).view(k, k)

    def costs(self) -> dict[str, tuple[float, float]]:
        """Mean cost of an example and its standard error, in bits/dim or -nats: of p(x) by classes, and without."""
        scale = -1 / (self.dimensions * math.log(2)) if self.dimensions else -1.0
        parts = {"sum over classes": self.marginal} | ({} if self.without is None else {"without": self.without})
        return {name: _mean(scale * value) for name, value in parts.items()}

    def summary(self) -> dict[str, Any]:
        """Plain values, without those of each example."""
        (accuracy, stderr), (posterior, of_posterior) = self.accuracy, _mean(self.log_posterior)
        costs = {name: {"value": value, "stderr": error} for name, (value, error) in self.costs().items()}
        return {
            "n": len(self.labels),
            "classes": len(self.prior),
            "accuracy": accuracy,
            "accuracy_stderr": stderr,
            "log_posterior_of_the_truth": posterior,
            "log_posterior_of_the_truth_stderr": of_posterior,
            "unit": "bits/dim" if self.dimensions else "-nats",
            "log_prob": costs,
            "confusion": self.confusion.tolist(),
        }

    def columns(self) -> dict[str, Tensor]:
        """Of each example, by name."""
        found = {"index": torch.arange(len(self.labels)), "true": self.labels, "predicted": self.predicted}
        found |= {f"log_prob_{c}": column for c, column in enumerate(self.log_prob.unbind(1))}
        return found | ({} if self.without is None else {"log_prob_without": self.without})

    def __str__(self) -> str:
        (accuracy, stderr), (posterior, of_posterior) = self.accuracy, _mean(self.log_posterior)
        right, n = int((self.predicted == self.labels).sum()), len(self.labels)
        rows = [("accuracy", f"{accuracy:.4f}", f"± {stderr:.4f} (binomial, {right} of {n})")]
        rows.append(("log p(true class | x), nats", f"{posterior:.4f}", f"± {of_posterior:.4f} ({n} examples)"))
        unit = "bits/dim" if self.dimensions else "-log p(x), nats"
        for name, (value, error) in self.costs().items():
            rows.append((f"{unit}, {name}", f"{value:.4f}", f"± {error:.4f} ({n} examples)"))
        return "\n".join([table(("of the examples", "mean", "standard error"), rows), self._mistakes()])

    def _mistakes(self) -> str:
        """The most frequent mistakes, in words."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        order = wrong.flatten().argsort(descending=True, stable=True)[:_WORST].tolist()
        k = len(wrong)
        told = [f"{i // k} as {i % k} ({wrong.flatten()[i]})" for i in order if wrong.flatten()[i] > 0]
        return f"most frequent mistakes: {', '.join(told)}" if told else "no mistakes"


def classify(config: DictConfig, run: Run) -> None:
    """Classify a split by the likelihoods of a class-conditional checkpoint, with their accuracy and confusions."""
    session = Session(config, run)
    check_settings(config.likelihood)
    classes = number_of(session.problem.data, "task=classify")
    model = load_model(session, told=True)
    if session.classes != classes:
        found = f"of {session.classes} classes" if session.classes else "that is told no classes"
        raise ConfigError(
            f"task=classify: the model is one {found}, and {session.problem.data.name} has {classes}: train one with "
            f"net.classes={classes}"
        )
    session.diagnose(model.sde)
    model, estimator = prepared(session, model)
    report(session, classified(session, model, estimator, classes), estimator)
    session.close()


def classified(session: Session, model: ScoreModel, estimator: Estimator, classes: int) -> Classified:
    """The likelihoods of the configured split's examples for every class, and without one where that was trained."""
    settings, data = session.config.likelihood, session.problem.data
    values = getattr(data, settings.split)[: settings.samples]
    given = [Conditioned(model, label=c) for c in range(classes)]
    given += [] if only_with_class(session.trained) else [model]
    log.info("%d likelihoods of each of %d examples", len(given), len(values))
    # The same numbers of the examples, and so the same draws and probes.
    found = [evaluate(one, values, estimator, settings.batch_size, progress=None).log_prob for one in given]
    shares = torch.bincount(data.labels["train"], minlength=classes).double()
    return Classified(
        torch.stack(found[:classes], dim=1),
        shares / shares.sum(),
        data.labels[settings.split][: len(values)].long(),
        *found[classes:],
        dimensions=values[0].numel() if estimator.dequantizer else None,
    )


def report(session: Session, found: Classified, estimator: Estimator) -> None:
    """The file, the picture, the summary and the text."""
    run, split = session.run, session.config.likelihood.split
    write_columns(run.path("likelihood", "classes.csv"), found.columns())
    run.note(classification=found.summary() | {"split": split, "protocol": estimator.describe()})
    accuracy, stderr = found.accuracy
    title = f"accuracy {accuracy:.3f} ± {stderr:.3f}"
    session.figures.append(likelihood_figures.confusion(found.confusion, run.path("figures", "confusion.png"), title))
    how = estimator.describe()
    session.say(
        f"Classification of {len(found.labels)} examples of the {split} split by log p(x | class) + log p(class)\n"
        f"{found}\n{how['ode']}; {how['divergence']}; the same draws and probes for all classes"
    )


def _mean(values: Tensor) -> tuple[float, float]:
    """With its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5
