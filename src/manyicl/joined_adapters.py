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

# What peft calls the matrices that read a projection's input; dynamo writes names in small letters.
ADAPTER = "lora_a"
# Of functions that change how what comes after them is computed.
MODES = ("autocast", "grad_enabled", "inference_mode")
# What `x[i] = y`, `x += y` and their like are called.
IN_PLACE = {
    "setitem",
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "imatmul",
    "iand",
    "ior",
    "ixor",
}
Backend = str | Callable[..., Any]


def join_before(backend: Backend) -> Callable[..., Any]:
    """Return a backend of torch.compile that joins what reads one input, and hands the graph on to `backend`."""
    compile_graph: Callable[..., Any] = lookup_backend(backend)

    def join_and_compile(graph: fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        join_adapters(graph)
        return compile_graph(graph, inputs, **options)

    return join_and_compile


def join_adapters(graph: fx.GraphModule) -> None:
    """Join adapters' products of one input, in a graph of dynamo's and in those inside it.

    A product moves up to the first of its input. So a graph stays as it is where a tensor is changed in place, or where
    autocast or gradients are switched on its way: there it counts when something is computed.
    """
    for part in graph.modules():
        if isinstance(part, fx.GraphModule) and not any(_counts_on_order(node) for node in part.graph.nodes):
            for products in _find_products(part.graph):
                _join(part.graph, products)
            part.recompile()


def _counts_on_order(node: fx.Node) -> bool:
    """Return whether a node changes a tensor in place, or how what comes behind it is computed."""
    if node.op not in ("call_method", "call_function"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_in_place = name.endswith("_") and not name.startswith("_")  # add_, relu_
    is_in_place |= name in IN_PLACE or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    schema = getattr(node.target, "_schema", None)  # of torch's own operations and of custom ones
    is_in_place |= schema is not None and schema.is_mutable
    return is_in_place or any(mode in name for mode in MODES)


def _find_products(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the products to join: of one input, by adapters of one type, without bias."""
    found: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is functional.linear and not node.kwargs:
            source, weight, *bias = node.args
            if weight.op == "placeholder" and ADAPTER in weight.name.lower() and bias in ([], [None]):
                found[source, weight.meta["example_value"].dtype].append(node)
    return [products for products in found.values() if len(products) > 1]


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
