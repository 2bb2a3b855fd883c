"""Does a running policy keep its promise? A test that may be looked at after every label, and what to do when it fails.

The promise: at most a share alpha of requests are promised their SLO and do not get it. Against it one bets: a wager
w on "more than that" turns a capital of 1 into the product of 1 + w (x - alpha), x = 1 for a violation and 0
otherwise. While each request's chance of a violation is at most alpha, the capital does not grow on average, so by
Ville's inequality it ever passes 1 / delta with a chance of at most delta, whenever one looks (Waudby-Smith and
Ramdas, Estimating means of bounded random variables by betting, https://arxiv.org/abs/2010.09686). Several wagers
share the capital: each is the best one against a violation rate of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from adaptivekv.selector import Prediction, Selector, is_lossless

ALPHA, DELTA = 0.05, 0.05
STEP = 0.1  # that a margin is widened by: log10 of what a broken SLO weighs
WIDENINGS = 5
WIDEST = 3.05  # a margin under which only lossless plans are trusted
MULTIPLES = (1.5, 2.0, 3.0, 5.0, 8.0)  # of alpha: the rates bet on
FALLBACK = {"selector": "rules", "margin": WIDEST}


class Widened:
    """A selector under a margin above its own: it expects 10**more times the risk and loss of every lossy plan, and
    under the widest margin trusts none.

    `margin` stays the certified one, which also says whether a policy is certified at all; 0 must stay 0.
    """

    def __init__(self, selector: Selector, margin: float):
        self.selector, self.by = selector, margin - selector.margin
        self.name, self.margin = f"{selector.name}~{margin:g}", selector.margin
        self.model = selector.model

    def predict(self, state: np.ndarray, plans: np.ndarray) -> Prediction:
        seen = self.selector.predict(state, plans)
        chance = seen.chance * 10**self.by
        if self.margin + self.by >= WIDEST:
            chance = np.where(is_lossless(plans), 0.0, 1e6)
        return seen._replace(loss_high=seen.loss_high * 10**self.by, chance=chance)


@dataclasses.dataclass
class Monitor:
    """Takes the outcomes of sampled requests in the order of their admission, missing ones as violations.

    `margin`: in force. Each setting of it is tested anew, with a chance of a false alarm of delta.
    """

    margin: float = 0.0
    alpha: float = ALPHA
    delta: float = DELTA
    step: float = STEP
    widenings: int = WIDENINGS  # before it falls back
    labels: int = 0  # since the last change
    promises: int = 0  # to them; where no plan was sure of the SLO nothing was promised, and nothing can be broken
    violations: int = 0
    changes: int = 0

    def __post_init__(self) -> None:
        rates = np.minimum(self.alpha * np.array(MULTIPLES), (1 + self.alpha) / 2)
        self._wagers = (rates - self.alpha) / (self.alpha * (1 - self.alpha))  # that of largest growth at each rate
        self._capital = np.zeros(len(rates))  # log

    @property
    def evidence(self) -> float:
        """The e-value: the capital, 1 at the start."""
        return float(np.exp(self._capital).mean())

    def feed(self, violated: bool, promised: bool = True) -> dict[str, Any] | None:
        """One outcome. Returns what to do about the policy, as `reconfigure` takes it, or None: let it be.

        Advice is {"margin": wider}, at last FALLBACK, the rule table at a margin where it takes lossless plans only.
        """
        self.labels += 1
        self.promises += promised
        self.violations += violated
        self._capital += np.log1p(self._wagers * (violated - self.alpha))
        if self.evidence < 1 / self.delta:
            return None
        self.changes += 1
        self.labels, self.promises, self.violations, self._capital = 0, 0, 0, np.zeros_like(self._capital)
        wider = round(self.margin + self.step, 6)
        if self.changes > self.widenings or wider > WIDEST:
            self.margin = WIDEST
            return dict(FALLBACK)
        self.margin = wider
        return {"margin": wider}

    def state(self) -> dict[str, Any]:
        names = ("margin", "labels", "promises", "violations", "changes", "alpha", "delta")
        return {name: getattr(self, name) for name in names} | {"evidence": self.evidence}
