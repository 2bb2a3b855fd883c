"""A few rows times large matrices: the kernel in the interpreter, the pass for compiled steps on a CPU."""

import copy
import itertools

import numpy as np
import pytest
import torch
from interpreter import SEED, run_in_interpreter
from models import tiny

pytest.importorskip("triton")

from adaptivekv.errors import AdaptiveKVError
from adaptivekv.kernels import skinny, skinnypass, skinnytune
from adaptivekv.kernels.skinny import Config, fits, skinny_products


def test_the_kernel_equals_a_product_in_the_interpreter():
    run_in_interpreter(__file__, 60)


def compiled(model, choose, *args, **kwargs):
    """What the model gives when it is compiled, with the pass, as one graph; what that graph calls."""
    targets = []

    class Pass(skinnypass.SkinnyPass):
        def __call__(self, graph):
            super().__call__(graph)
            graph.lint()
            targets.extend(str(node.target) for node in graph.nodes)

        def uuid(self):
            return None  # nothing is kept: another test compiles the same with another choice

    options = {"post_grad_custom_pre_pass": Pass(model, choose)}
    with torch.inference_mode():
        return torch.compile(model.forward, dynamic=False, fullgraph=True, options=options)(*args, **kwargs), targets


def test_a_compiled_step_equals_the_model():
    """Three products in a launch, one, two, and one left to the library; the model is left as it was."""
    model, asked = tiny("llama"), []
    model.model.layers = model.model.layers[:1]

    def choose(model, rows, outs, inner, dtype, device):
        asked.append((rows, outs, inner))
        return Config(32, 16, 2, 1, {3: 4, 2: 1, 1: 2}[len(outs)]) if inner == 64 else None

    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    ids = torch.arange(6)[:, None]
    with torch.inference_mode():
        want = model(ids, use_cache=False).logits
    got, targets = compiled(model, choose, input_ids=ids, use_cache=False)
    torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-5)
    assert asked == [(6, (64, 32, 32), 64), (6, (64,), 64), (6, (96, 96), 64), (6, (64,), 96), (6, (160,), 64)]
    assert targets.count("adaptivekv.skinny_linear.default") == 4 and targets.count("aten.mm.default") == 1
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert all(before[name].keys() == after[name].keys() for name in before)


def test_more_than_sixteen_rows_are_left_to_the_library():
    layer, x = torch.nn.Linear(32, 48, bias=False), torch.randn(17, 32)
    got, targets = compiled(layer, None, x)
    torch.testing.assert_close(got, layer(x))
    assert targets.count("aten.mm.default") == 1


def test_passes_of_one_model_are_equal_and_copies_do_not_copy_it():
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    one = skinnypass.compile_options(model)["post_grad_custom_pre_pass"]
    assert copy.deepcopy(one) == one == skinnypass.SkinnyPass(model) != skinnypass.SkinnyPass(other)
    assert copy.deepcopy(one).model() is model


def test_shapes_that_do_not_fit_are_refused():
    config = Config(32, 64, 3, 2, 2)
    assert fits(config, 8, (64, 32), 256)
    refused = [(0, (64,), 256), (17, (64,), 256), (8, (48,), 256), (8, (64,), 192), (8, (), 256), (8, (64,) * 4, 256)]
    assert not any(fits(config, *shape) for shape in refused)
    with pytest.raises(AdaptiveKVError, match="does not fit"):
        skinny_products(torch.zeros(8, 192), [torch.zeros(64, 192)], config)
    found = set(skinnytune.candidates(8, (1024, 4096), 4096, 132))
    assert found and all(fits(c, 8, (1024, 4096), 4096) and 132 <= 5120 // c.block_n * c.split < 2112 for c in found)
    assert {c.split for c in skinnytune.candidates(8, (64,), 4096, 132)} == {4}, "too few programs, but all there are"
    assert skinnytune.choose(torch.nn.Linear(2, 2), 8, (64,), 64, torch.bfloat16, torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 8, 13])
def test_the_kernel_equals_a_product_on_the_gpu(rows):
    """Every configuration that may be chosen, launched again while the launch before it runs: the same bits."""
    x, *weights = (torch.randn(n, 4096, device="cuda", dtype=torch.bfloat16) for n in (rows, 2048, 512, 512))
    want = x.double() @ torch.cat(weights).double().T
    tried = set(skinnytune.candidates(rows, (2048, 512, 512), 4096, 64))
    assert len(tried) > 4
    for config in tried:
        first, *others = (skinny_products(x, weights, config) for _ in range(20))
        assert all(torch.equal(first, other) for other in others), config
        error = (first.double().sum(0) - want).norm() / want.norm()
        assert error < (1e-5 if config.split > 1 else 3e-3), (config, float(error))


@pytest.mark.gpu
def test_a_compiled_step_equals_the_model_on_the_gpu():
    """Products chosen by measurement, kernels that overlap: replayed many times, always the same bits."""
    torch.manual_seed(0)
    wide = [(torch.nn.Linear(2048, 4096, False), torch.nn.SiLU(), torch.nn.Linear(4096, 2048, False)) for _ in range(4)]
    model = torch.nn.Sequential(*itertools.chain(*wide)).to("cuda", torch.bfloat16)
    x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16)
    step = torch.compile(model.forward, dynamic=False, fullgraph=True, options=skinnypass.compile_options(model))
    with torch.inference_mode():
        want, got = model(x).float(), step(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(x)
        for _ in range(100):
            graph.replay()
            assert torch.equal(out, got)
    assert (got.float() - want).norm() / want.norm() < 2e-2


if __name__ == "__main__":
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    for split in (1, 2, 4, 1, 2, 4):
        block_n, block_k = (int(rng.choice([16, 32])) for _ in range(2))
        outs = [block_n * int(n) for n in rng.integers(1, 4, rng.integers(1, 4))]
        m, inner = int(rng.integers(1, 17)), block_k * split * int(rng.integers(1, 4))
        x, *weights = (torch.from_numpy(rng.standard_normal((n, inner))).half() for n in (m, *outs))
        got = skinny_products(x, weights, Config(block_n, block_k, 2, 1, split))
        want = x.double() @ torch.cat(weights).double().T
        assert skinny._INTERPRETED and got.shape == (split, m, sum(outs))
        assert got.dtype is (torch.float32 if split > 1 else torch.float16)
        error = (got.double().sum(0) - want).abs().max() / want.abs().max()
        assert error < (1e-5 if split > 1 else 1e-3), (m, outs, inner, split, float(error))
