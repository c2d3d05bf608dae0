"""Linear layers of a frozen base in 8 bits (float8 e4m3), whose products are made in them, forward and backward.

A weight is stored once, with a scale per output feature. What is multiplied with it is rounded to 8 bits too, with a
scale per token that is found anew each time, so the product runs on the hardware's units for 8 bits. For the gradient
of the input the sum runs over output features, so their scales go to the gradient before that is rounded, and the
weight is turned for the moment (those units read both operands along the sum). The sums are made in float32, the
results are in bfloat16.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from manyicl.errors import UserError

# Of a weight; its scales, 4 bytes per output feature, add less than 1 % to matrices with 400 input features or more.
FLOAT8_BYTES = 1
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
# A row whose largest value is below it would have a scale that cannot be divided by; it becomes zeros.
SMALLEST_ROW = 1e-30
# Sizes of a matrix are multiples of it, or torch's product refuses them.
MULTIPLE = 16
# First GPUs with units for products in 8 bits: Ada (8.9), Hopper (9.0) and what came after them.
FEWEST_CAPABILITY = (8, 9)
TOLD = "model.quantize = 'float8'"


def check_float8(device: torch.device) -> None:
    """Refuse a GPU without units for products in 8 bits. A CPU emulates them, for trials.

    Raises:
        UserError: as said.
    """
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < FEWEST_CAPABILITY:
        name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise UserError(
            f"{TOLD}: {name} has no products in 8 bits (compute capability {version}; 8.9 or more is needed);"
            " leave it out, or ask with quantize='none'"
        )


def store_in_float8(model: Any, *, dtype: torch.dtype, device: torch.device) -> None:
    """Replace all linear layers of `model` but its head, one by one, by layers in 8 bits on `device`.

    dtype: that layers compute in, see `Float8Linear`.

    Raises:
        UserError: the sizes of a layer do not allow it.
    """
    head = model.get_output_embeddings()
    found = [(name, part) for name, part in model.named_modules() if type(part) is nn.Linear and part is not head]
    for name, part in found:
        if part.in_features % MULTIPLE or part.out_features % MULTIPLE:
            raise UserError(
                f"{TOLD}: {name} is {part.out_features} x {part.in_features}, and products in 8 bits need multiples of"
                f" {MULTIPLE}; leave it out"
            )
    for name, part in found:
        model.set_submodule(name, Float8Linear(part, dtype=dtype, device=device))


class Float8Linear(nn.Linear):
    """Takes the place of a frozen linear layer.

    weight: (O, I), the bits of its 8-bit numbers as integers; of a floating type it would be what peft gives adapters.
    scale: (O, 1), float32. compute_dtype: bfloat16 multiplies in 8 bits; in float32, that of a trial or of a CPU
    without units for bfloat16, the weights that the numbers stand for are multiplied with what comes, not rounded.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear, *, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        # From bfloat16, in whatever precision the base was loaded, so that an adapter meets the base it was trained on.
        weight_OI = linear.weight.detach().to(device).to(torch.bfloat16)
        numbers_OI, scale_O1 = round_rows(weight_OI)
        self.weight = nn.Parameter(numbers_OI.view(torch.uint8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale_O1)
        self.compute_dtype = dtype
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of `input`, (..., I), with the weight, (..., O), in the layer's `compute_dtype`."""
        if self.compute_dtype == torch.float32:
            return functional.linear(input.float(), self.unpack(), self.bias)
        x_TI = input.to(self.compute_dtype).flatten(0, -2)
        product: Tensor = _Product.apply(x_TI, self.weight, self.scale)
        product = product.view(*input.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def unpack(self) -> Tensor:
        """Return the weight that the layer stands for, (O, I), in float32."""
        return self.weight.view(FLOAT8).float() * self.scale


def round_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers of 8 bits, (T, I), and the scale of each row, (T, 1) in float32, that stand for x together.

    The largest value of a row becomes the largest number, so none is beyond it but by a rounding of the quotient, which
    is rounded down again. Written in plain operations: a compiler fuses them with what made x.
    """
    least_T1, most_T1 = torch.aminmax(x_TI, dim=-1, keepdim=True)
    scale_T1 = torch.maximum(-least_T1, most_T1).float().clamp_min(SMALLEST_ROW) / LARGEST
    return (x_TI / scale_T1).to(FLOAT8), scale_T1


@torch.library.custom_op("manyicl::float8_product", mutates_args=())
def multiply_rows(x_TI: Tensor, scale_T1: Tensor, weight_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """Return the product of rows of x with rows of a weight (its bits as integers), (T, O), in bfloat16.

    An operation of its own, so that a compiler that lays out tensors as it likes hands them over, and here they are
    laid out as the kernel reads them: it takes the scales for packed, whatever their strides.
    """
    weight_OI, scale_1O = weight_OI.contiguous().view(FLOAT8), scale_O1.contiguous().view(1, -1)
    if not x_TI.is_cuda:
        # What torch emulates there has one scale per matrix in some versions, and autocast rounds its sums to bfloat16.
        with torch.autocast(x_TI.device.type, enabled=False):
            return (x_TI.float() @ weight_OI.float().t() * scale_T1 * scale_1O).bfloat16()
    return torch._scaled_mm(
        x_TI.contiguous(),
        weight_OI.t(),
        scale_a=scale_T1.contiguous(),
        scale_b=scale_1O,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


@multiply_rows.register_fake
def _(x_TI: Tensor, _: Tensor, weight_OI: Tensor, __: Tensor) -> Tensor:
    return x_TI.new_empty(len(x_TI), len(weight_OI), dtype=torch.bfloat16)


class _Product(torch.autograd.Function):
    """x times a transposed weight, both in 8 bits; the gradient of x alone, in 8 bits too."""

    apply: Any

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, scale_O1: Tensor) -> Tensor:
        """Return the product, (T, O)."""
        ctx.save_for_backward(weight_OI, scale_O1)
        product: Tensor = multiply_rows(*round_rows(x_TI), weight_OI, scale_O1)
        return product

    @staticmethod
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x, (T, I)."""
        weight_OI, scale_O1 = ctx.saved_tensors
        scaled_TO = (gradient_TO * scale_O1.view(1, -1)).to(gradient_TO.dtype)  # it is read twice: half the traffic
        ones_I1 = scale_O1.new_ones(weight_OI.shape[1], 1)
        return multiply_rows(*round_rows(scaled_TO), weight_OI.t().contiguous(), ones_I1), None, None
