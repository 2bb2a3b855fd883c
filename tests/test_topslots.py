"""The slots an eviction keeps: numpy against sorting by hand, the Triton kernel against numpy."""

from typing import Any

import pytest
import torch
from interpreter import SEED, run_in_interpreter

from adaptivekv.kernels import PAGE
from adaptivekv.kernels.topslots import nth, sampled_nth, top_slots


def case(seed: int, pages: int = 9) -> tuple[Any, ...]:
    """Runs of any length, pages of any number of slots, scores that are equal, infinite, negative and -0."""
    gen = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, pages + 1, (1,), generator=gen))
    cuts = torch.randint(0, n + 1, (3,), generator=gen).sort().values
    edges = torch.cat([torch.tensor([0]), cuts, torch.tensor([n])])
    score = torch.randn(n, PAGE, generator=gen) * 10.0 ** float(torch.randint(-20, 20, (1,), generator=gen))
    if seed % 3 == 0:
        score = (torch.randn(n, PAGE, generator=gen) * 2).round()  # ties, 0 and -0 among them
    for value in (torch.inf, -torch.inf):
        score[torch.rand(n, PAGE, generator=gen) < 0.05] = value
    head = (torch.arange(n) % 3).int()
    pos = torch.arange(n)[:, None] // 3 * PAGE + torch.stack([torch.randperm(PAGE, generator=gen) for _ in range(n)])
    count = torch.randint(0, PAGE + 1, (n,), generator=gen).int()
    used = (edges.diff() * PAGE).float()
    keep = (used * torch.rand(len(used), generator=gen) * 1.2).long() - 3 * (seed % 2)
    sure = torch.randint(-(2**63), 2**63 - 1, (n,), generator=gen) if seed % 4 == 0 else torch.zeros(n).long()
    return score, pos.int() + 2**28, count, head, 3, edges, keep, sure, torch.full((n,), -1)


def chosen(mask: torch.Tensor) -> set[tuple[int, int]]:
    return {(i, s) for i, bits in enumerate(mask.tolist()) for s in range(PAGE) if bits >> s & 1}


@pytest.mark.parametrize("seed", range(24))
def test_the_best_of_each_run_stay(seed):
    score, pos, count, head, _, edges, keep, sure, out = args = case(seed)
    top_slots(*args)
    want = set()
    for start, end, n in zip(edges.tolist(), edges.tolist()[1:], keep.tolist(), strict=False):
        slots = [(i, s) for i in range(start, end) for s in range(int(count[i]))]
        stay = {(i, s) for i, s in slots if score[i, s] == torch.inf or int(sure[i]) >> s & 1}
        rest = sorted(
            set(slots) - stay, key=lambda at: (float(score[at]), int(pos[at]), int(head[at[0]])), reverse=True
        )
        want |= stay | set(rest[: max(0, n - len(stay))])
    assert chosen(out) == want


@pytest.mark.parametrize("n", [1, 7, 40_000, 150_000, 199_000])
@pytest.mark.parametrize("kind", ["any", "equal", "sorted", "unlike its sample"])
def test_the_nth_is_that_of_sorting(kind, n):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(n))
    if kind == "equal":
        x = x.round()
    elif kind == "sorted":
        x = x.sort().values
    elif kind == "unlike its sample":
        x[::3] += 9
    want = x.sort(descending=True).values[n - 1]
    assert sampled_nth(x, n) == want
    assert nth(torch.cat([x, torch.full((999,), -torch.inf)]), n) == want


def check_triton(device: str, seeds: range, pages: int) -> None:
    from adaptivekv.kernels import topkernel

    for seed in seeds:
        args = case(seed, pages)
        there = [x.to(device, copy=True) if isinstance(x, torch.Tensor) else x for x in args]
        top_slots.__wrapped__(*args)
        topkernel.top_slots(*there)
        assert torch.equal(there[-1].cpu(), args[-1]), seed


def test_triton_equals_numpy_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.mark.gpu
def test_triton_equals_numpy_on_the_gpu():
    check_triton("cuda", range(SEED, SEED + 64), 9)
    check_triton("cuda", range(SEED, SEED + 32), 300)


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_triton("cpu", range(SEED, SEED + 5), 9)
    check_triton("cpu", range(3, 4), 300)  # runs of up to 214 pages, scores that are equal
