"""Each row of a batch has its own adapters, as if they were merged for it alone, and the weights stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentflow_nodes.adapters.layers import Layer, Layers
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.adapters.rows import RowAdapters

SETTINGS = settings(deadline=None, max_examples=40)
# By layer the shape of its input without the rows.
INPUTS = {"linear": (5, 12), "time": (12,), "wide": (6, 7, 9), "strided": (6, 8, 8), "point": (5, 4, 4)}
NAMES = {name: name for name in INPUTS}
Set = Sequence[tuple[Layers, float]]


def module(dtype: torch.dtype = torch.float32) -> torch.nn.ModuleDict:
    torch.manual_seed(1)
    return torch.nn.ModuleDict(
        {
            "linear": torch.nn.Linear(12, 8),
            "time": torch.nn.Linear(12, 6, bias=False),
            "wide": torch.nn.Conv2d(6, 10, 3, padding=1),
            "strided": torch.nn.Conv2d(6, 10, (3, 1), stride=2, dilation=(1, 2), padding=(2, 0)),
            "point": torch.nn.Conv2d(5, 7, 1, bias=False),
        }
    ).to(dtype)


def layers(seed: int, *names: str) -> dict[str, Layer]:
    """An adapter of some layers, with a rank for each."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        shape = module().get_parameter(f"{name}.weight").shape
        rank = 1 + (seed + len(name)) % 4
        a = torch.randn(rank, *shape[1:], generator=generator)
        b = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        found[name] = Layer(a=a, b=b, alpha=1.5)
    return found


def merged(network: torch.nn.ModuleDict, name: str, x: torch.Tensor, adapters: Set) -> torch.Tensor:
    """The output of a layer with adapters merged."""
    alone = copy.deepcopy(network)
    Merger(alone, names=NAMES, what="denoiser").apply(adapters)
    output: torch.Tensor = alone[name](x)
    return output


adapter_sets = st.lists(
    st.tuples(
        st.builds(lambda seed, names: layers(seed, *names), st.integers(0, 9), st.sets(st.sampled_from(list(INPUTS)))),
        st.floats(-2, 2),
    ),
    max_size=2,
)


@given(sets=st.lists(adapter_sets, min_size=1, max_size=4), data=st.data())
@SETTINGS
@torch.no_grad()
def test_each_row_equals_a_pass_with_its_own_set_merged(sets: list[Set], data: st.DataObject) -> None:
    network = module()
    by_row = RowAdapters(network, names=NAMES)
    # Several batches in a row, with other sets and numbers of rows.
    for keys in data.draw(st.lists(st.lists(st.sampled_from(range(len(sets))), min_size=1, max_size=6), max_size=3)):
        by_row.apply([(key, sets[key]) for key in keys])
        for name, shape in INPUTS.items():
            x = torch.randn(len(keys), *shape)
            output = network[name](x)
            for row, key in enumerate(keys):
                expected = merged(module(), name, x[row : row + 1], sets[key])
                torch.testing.assert_close(output[row : row + 1], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_without_adapters_and_removed_adapters_leave_every_bit() -> None:
    network = module()
    plain = {name: (x := torch.randn(3, *shape), network[name](x)) for name, shape in INPUTS.items()}
    by_row = RowAdapters(network, names=NAMES)
    by_row.apply([((), []), ("a", [(layers(1, *INPUTS), 1.0)]), ((), [])])
    for name, (x, expected) in plain.items():
        output = network[name](x)
        assert torch.equal(output[::2], expected[::2])
        assert not torch.equal(output[1], expected[1])
    by_row.remove()
    assert all(torch.equal(network[name](x), expected) for name, (x, expected) in plain.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_rows_are_as_close_as_merged_ones(dtype: torch.dtype) -> None:
    network, adapters = module(dtype), [(layers(2, "linear"), 0.5)]
    x = torch.randn(2, *INPUTS["linear"])
    exact = merged(module(), "linear", x, adapters)
    tolerance = 2 * (merged(network, "linear", x.to(dtype), adapters) - exact).abs().max()
    by_row = RowAdapters(network, names=NAMES)
    by_row.apply([("a", adapters), ("a", adapters)])
    assert (network["linear"](x.to(dtype)) - exact).abs().max() <= tolerance


@torch.no_grad()
def test_adapters_that_do_not_fit_leave_nothing_applied() -> None:
    network = module()
    x = torch.randn(2, *INPUTS["linear"])
    expected = network["linear"](x)
    by_row = RowAdapters(network, names=NAMES)
    odd = {"time": Layer(a=torch.ones(2, 5), b=torch.ones(6, 2), alpha=2.0)}
    good: tuple[Hashable, Set] = ("a", [(layers(1, "linear"), 1.0)])
    by_row.apply([good, good])
    with pytest.raises(RuntimeError):
        by_row.apply([good, ("b", [(odd, 1.0)])])
    assert torch.equal(network["linear"](x), expected)
    by_row.apply([good, good])
    assert not torch.equal(network["linear"](x), expected)


@pytest.mark.parametrize(
    "layer",
    [torch.nn.Conv2d(4, 4, 3, groups=2), torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")],
    ids=["grouped", "reflected"],
)
def test_a_network_with_other_convolutions_has_no_adapters_by_row(layer: torch.nn.Module) -> None:
    assert RowAdapters(module(), names=NAMES).is_supported
    assert not RowAdapters(torch.nn.Sequential(layer), names={"0": "0"}).is_supported
