"""What became of requests like this one: the weights that a forest gives the requests it was grown on.

A tree puts a request among those of the same leaf; over all trees that is a weight for each of them, and weighted
shares of their measured losses are chances (quantile regression forests, Meinshausen 2006, JMLR 7:983-999).
"""

from functools import lru_cache

import numpy as np

from adaptivekv import trees

LEAVES = 64  # of a tree at most: a bit each
FLOOR = 1e-4  # nats, added before the logarithm: what is below decides no SLO
TENTH = 1.2816  # deviations above the mean of a normal distribution lies a tenth of it
ARRAYS = {
    "forest_feature": (np.int32, 1),  # [m] nodes, as in selector.ARRAYS
    "forest_threshold": (np.float64, 1),
    "forest_left": (np.int32, 1),
    "forest_right": (np.int32, 1),
    "forest_roots": (np.int32, 1),  # [T]
    "forest_member": (np.int32, 2),  # [T, n] the leaf of each request it was grown on
    "forest_loss": (np.float64, 2),  # [n, P] nats per token
    "forest_plans": (np.float64, 2),  # [P, PF] features of these plans
    "forest_fill": (np.float64, 1),  # [F] what an unknown feature counts as
}


class Forest:
    """Chances for the P plans that it has seen, of a state [F]."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        get = {name.removeprefix("forest_"): array for name, array in arrays.items()}
        made = trees.lay_out(get["left"], get["right"], get["roots"], LEAVES, np.uint64)
        self._feature = np.where(made.empty, 0, get["feature"][made.node])
        self._threshold = np.where(made.empty, np.inf, get["threshold"][made.node])
        self._clears, self._fill, self._loss = made.clears, get["fill"], get["loss"]
        log = np.log10(self._loss + FLOOR)
        self._moments, self._lossy = np.hstack([log, log**2]), self._loss.max(axis=0) > 0
        position = np.zeros(len(get["left"]), np.uint8)
        for leaf, count in zip(made.leaf, LEAVES - made.empty.sum(0), strict=True):
            position[leaf[:count]] = np.arange(count)
        self._member = position[get["member"]]  # [T, n] which leaf of its tree, from the left
        self._share = np.stack([1 / np.maximum(1, np.bincount(m, minlength=LEAVES)) for m in self._member])
        self._trees = np.arange(len(self._member))
        self._plans = {row.tobytes(): i for i, row in enumerate(get["plans"])}
        self.known = lru_cache(maxsize=64)(self._known)
        self._broke = lru_cache(maxsize=64)(lambda quality: (self._loss > quality).astype(np.float64))

    def _known(self, plans: bytes, width: int) -> np.ndarray:
        """For each plan [k] of these feature rows its number among those seen, else -1."""
        step = width * 8
        return np.array([self._plans.get(plans[i : i + step], -1) for i in range(0, len(plans), step)])

    def filled(self, state: np.ndarray) -> np.ndarray:
        """As the trees see it: in float32, as scikit-learn compares."""
        return np.where(np.isnan(state), self._fill, state).astype(np.float32)

    def predict(self, state: np.ndarray, known: np.ndarray, quality: float) -> tuple[np.ndarray, ...]:
        """Of the plans `known` [k]: loss and its 0.9 quantile, as if its logarithm were normal, and the chance that it
        exceeds `quality`, as it did with the requests it was grown on."""
        weight = self.weights(state)
        mean, square = np.split(weight @ self._moments, 2)
        deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
        # What never lost anything loses nothing, not a rounding error.
        loss, high = (np.maximum(10.0**x - FLOOR, 0.0) * self._lossy for x in (mean, mean + TENTH * deviation))
        return loss[known], high[known], (weight @ self._broke(quality))[known]

    def weights(self, state: np.ndarray) -> np.ndarray:
        """[n], of the requests it was grown on; they add up to 1."""
        x = self.filled(state)
        kept = np.where(x.take(self._feature) > self._threshold, self._clears, ~np.uint64(0))
        alive = np.bitwise_and.reduce(kept, axis=0)  # [T]
        leaf = np.bitwise_count((alive & -alive) - np.uint64(1))
        same = (self._member == leaf[:, None]).astype(np.float64)
        return self._share[self._trees, leaf] @ same / len(leaf)


def fault(arrays: dict[str, np.ndarray], features: int, plan_features: int) -> str | None:
    """What makes the arrays unfit for `Forest`, or None."""
    for name, (dtype, dimensions) in ARRAYS.items():
        if arrays[name].dtype != dtype or arrays[name].ndim != dimensions:
            return f"{name} is {arrays[name].dtype} {arrays[name].ndim}-D, not {np.dtype(dtype)} {dimensions}-D"
    feature, threshold, left, right, roots, member, loss, plans, fill = (arrays[name] for name in ARRAYS)
    if not len(left) == len(feature) == len(threshold):
        return "forest: node arrays differ in length"
    if found := trees.fault(left, right, roots, LEAVES):
        return f"forest: {found}"
    inner = left != -1
    if ((feature[inner] < 0) | (feature[inner] >= features)).any():
        return f"forest: a feature index lies outside 0..{features - 1}"
    shapes = [member.shape, loss.shape, plans.shape, fill.shape]
    if shapes != [(len(roots), len(loss)), (len(loss), len(plans)), (len(plans), plan_features), (features,)]:
        return "forest: member, loss, plans and fill do not fit each other"
    ends = np.append(roots[1:], len(left))[:, None]
    if not len(loss) or ((member < roots[:, None]) | (member >= ends)).any() or inner[member].any():
        return "forest: a member is not in a leaf of its tree"
    if not all(np.isfinite(x).all() for x in (loss, plans, fill)) or (loss < 0).any() or np.isnan(threshold).any():
        return "forest: a loss, plan or fill is not finite, or a threshold is NaN"
    return None
