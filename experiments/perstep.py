"""Does a plan that changes during a long answer pay? Four ways to keep the same hard budget, measured token by token.

    python -m experiments.perstep

Answers are forced: a document goes on, or after half of the answer another begins. After the prompt nothing may leave
for the host: candidates are the controller's without their offloads. *once*: the controller decides at the end of the
prompt, for the whole answer. *steps*: as it is, it decides every 32 tokens too, still for the whole answer. *ahead*: a
plan need only fit until the next decision. *fixed*: of the plans that fit the whole answer, the one that in hindsight
was the cheapest within the quality, else lost least. Loss: nats per token against the full cache. Cost: mean bytes held
(of the host, a tenth) x processor time of a step (median, and the switching shared out), relative to *once*; the same
plan twice differs by some percent. Switch: applying plans after the prompt; relief under pressure is in the steps.
"""

import argparse
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

from adaptivekv import model
from adaptivekv.candidates import CANDIDATES
from adaptivekv.console import bar
from adaptivekv.controller import KAPPA, Controller
from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels.codec import PAGE
from adaptivekv.memory.shapes import DEVICE, HOST
from adaptivekv.plan import Plan
from adaptivekv.trainer import registry, sources
from adaptivekv.trainer.replay import reference, replay
from experiments.selector import machine, rounded

PLANS = tuple(dict.fromkeys(str(Plan.parse(plan).without("offload")) for plan in CANDIDATES))
PAIRS = ("book/14", "python/asyncio/tasks.py>book/22", "book/27>python/_pyio.py", "packages/01>book/35")
WAYS = {"once": 1 << 30, "steps": 32, "ahead": 32, "fixed": 1 << 30}  # tokens between two decisions


class Tight(Controller):
    """Nothing may leave for the host after the prompt. seen: (bytes that count, ms) of every step."""

    def __init__(self, way, **more):
        super().__init__(epoch=WAYS[way], **more)
        self.ahead, self.seen, self.switch_ms, self.began = way == "ahead", [], 0.0, 0.0

    def _room(self, request):
        return super()._room(request)[0], 0

    def _tokens(self, request):
        whole = Controller._tokens(request)
        return min(whole, request.sequence.length + self.epoch + PAGE) if self.ahead else whole

    def step(self, request, new=1):
        request.sequence.pool.host_capacity = request.sequence.pool.host_used
        if request.generated:  # the step before ends here
            held = request.sequence.bytes(DEVICE) + KAPPA * request.sequence.bytes(HOST)
            self.seen.append((held, 1e3 * (time.thread_time() - self.began)))
        self.began = time.thread_time()
        super().step(request, new)

    def _apply(self, request):
        begun = time.thread_time()
        super()._apply(request)
        self.switch_ms += 1e3 * (time.thread_time() - begun) * (request.generated > 0)


def forced(loaded, pair, prompt, new):
    """The full cache over `new` tokens that follow the prompt: of its document, or of "one>other" half of each."""
    ids = []
    for name, need in zip(pair.split(">"), (prompt + new, new), strict=False):
        ids.append(loaded.tokenizer(sources.text(name)[: 12 * need], verbose=False).input_ids[:need])
        if len(ids[-1]) < need:
            raise AdaptiveKVError(f"document {name}: {len(ids[-1])} tokens, {need} needed; choose a longer one")
    tokens = ids[0][prompt:] if len(ids) == 1 else ids[0][prompt : prompt + new // 2] + ids[1][: new - new // 2]
    return reference(loaded, ids[0][:prompt], new, plans=PLANS, tokens=tokens)


def measured(made, controller, budget):
    run = replay(made, controller, budget=budget)
    held, ms = np.array(controller.seen).T
    decided = [d for d in run.decisions if d.moment in ("prefill", "epoch")]
    plans = [decided[0].plan, *(b.plan for a, b in pairwise(decided) if a.plan != b.plan)]
    return {
        "loss": run.kl_mean, "worst": run.kl_worst, "loss_of_halves": [kl.mean() for kl in np.array_split(run.kl, 2)],
        "mib": held.mean() / 2**20, "step_ms": np.median(ms), "switches": len(plans) - 1,
        "switch_ms": controller.switch_ms, "switch_share": controller.switch_ms / ms.sum(), "plans": plans,
        "cost": held.mean() * (np.median(ms) + controller.switch_ms / len(ms)), "peak_mib": run.device_peak / 2**20,
        "pressure": [f"{d.step}: {d.reason}" for d in run.decisions if d.pressure and d.step],
        "host_mib": run.host_bytes / 2**20, "budget_mib": run.budget / 2**20, "selector": controller.name,
        "fits": [plan for plan, fits in zip(decided[0].plans, decided[0].allowed, strict=True) if fits],
    }  # fmt: skip


def study(loaded, pair, args, tick):
    selector, names = registry.find_champion(None, "sqlite:///none.db"), Controller(candidates=PLANS).names
    made, quality = forced(loaded, pair, args.prompt, args.new), args.quality
    tries = [(tick(), replay(made, plan))[1] for plan in names]
    # those within the quality by bytes x time, then the others by loss
    worth = [(run.kl_mean > quality, max(run.kl_mean, quality), run.device_mean * run.step_ms) for run in tries]
    for budget in args.budgets:
        once = None
        for way in WAYS:
            best = min((p not in once["fits"], *key, p) for key, p in zip(worth, names, strict=True)) if once else PLANS
            given = {"selector": selector, "quality": quality, "candidates": best[-1:] if way == "fixed" else PLANS}
            same = way == "fixed" and once["plans"] == [best[-1]]  # and the run would be too
            row = once if same else measured(made, Tight(way, **given), budget)
            once = once or row
            yield {"document": pair, "budget": budget, "way": way} | row | {"cost": row["cost"] / once["cost"]}
            tick()
    made.free()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("prompt", 768), ("new", 448), ("quality", 0.03)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.4, 0.3])
    parser.add_argument("--documents", nargs="+", default=PAIRS, help="ONE or ONE>OTHER, as trainer/sources names them")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/perstep.json"))
    args, rows = parser.parse_args(), []
    torch.set_num_threads(1)
    facts = {"command": " ".join(["python -m experiments.perstep", *sys.argv[1:]]), "machine": machine()}
    facts |= {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        loaded = model.load()
        with bar(False) as progress:
            task = progress.add_task("per step", total=(len(PLANS) + 4 * len(args.budgets)) * len(args.documents))
            for pair in args.documents:
                rows += study(loaded, pair, args, lambda: progress.advance(task))
    except (AdaptiveKVError, KeyboardInterrupt) as error:
        sys.exit(f"perstep: {str(error) or 'stopped'}")
    args.out.write_text(json.dumps(rounded(facts | vars(args) | {"out": str(args.out), "rows": rows}), indent=1) + "\n")
    axis = (figure := Figure((6, 4), layout="constrained")).subplots()
    for way, marker in zip(WAYS, "o+^x", strict=True):
        axis.plot(*np.array([(row["mib"], row["loss"]) for row in rows if row["way"] == way]).T, marker, label=way)
    axis.set(xlabel="MiB held, mean over the answer", ylabel="nats per token", yscale="log")
    axis.legend()
    figure.savefig(args.out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
