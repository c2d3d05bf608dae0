"""Adapters that read the same input as one matrix product, in what torch.compile makes of a layer.

LoRA puts a product to few features beside each projection: three read the input of attention, two that of the
feed-forward. Each reads all of that input, and in the backward pass once more, and each gives its gradient as a
tensor of the input's size. Joined, the input is read once and there is one gradient (docs/performance.md).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch.nn import functional

# Of a narrow product, features it gives over those it reads; a wider one is work enough by itself.
NARROW_SHARE = 1 / 16
Backend = str | Callable[..., Any]


def join_before(backend: Backend) -> Callable[..., Any]:
    """Return a backend of torch.compile that joins what reads one input, and hands the graph on to `backend`."""
    compile_graph: Callable[..., Any] = lookup_backend(backend)

    def join_and_compile(graph: fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        join_adapters(graph)
        return compile_graph(graph, inputs, **options)

    return join_and_compile


def join_adapters(graph: fx.GraphModule) -> int:
    """Join narrow products of one input, in a graph of dynamo's and those inside it; return how many there were."""
    num_joined = 0
    for part in graph.modules():
        if isinstance(part, fx.GraphModule):
            for products in _find_products(part.graph):
                _join(part.graph, products)
                num_joined += len(products)
            part.recompile()
    return num_joined


def _find_products(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the products to join: of one input, by weights of one type that are the graph's own inputs."""
    found: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = defaultdict(list)
    if any(node.op == "call_function" and "autocast" in str(node.target) for node in graph.nodes):
        return []  # products of one graph may then be of different types
    for node in graph.nodes:
        if node.op == "call_function" and node.target is functional.linear and not node.kwargs:
            source, weight, *bias = node.args
            value = weight.meta.get("example_value") if weight.op == "placeholder" else None
            if isinstance(value, Tensor) and _is_narrow(value) and bias in ([], [None]):
                found[source, value.dtype].append(node)
    return [products for products in found.values() if len(products) > 1]


def _is_narrow(weight: Tensor) -> bool:
    return weight.shape[0] <= NARROW_SHARE * weight.shape[1]


def _join(graph: fx.Graph, products: list[fx.Node]) -> None:
    source, weights = products[0].args[0], [product.args[1] for product in products]
    sizes = [weight.meta["example_value"].shape[0] for weight in weights]  # type: ignore[union-attr]
    with graph.inserting_before(products[0]):
        joined = graph.call_function(torch.cat, (weights, 0))
        outputs = graph.call_function(functional.linear, (source, joined))
        parts = graph.call_function(torch.split, (outputs, sizes, -1))
        own = [graph.call_function(operator.getitem, (parts, number)) for number in range(len(products))]
    for product, part in zip(products, own, strict=True):
        product.replace_all_uses_with(part)
        graph.erase_node(product)
