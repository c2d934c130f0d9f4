"""Specs: rows of a value for each row of a plan's input."""

from fractions import Fraction

import torch

from opsgraph.op import Spec, row
from opsgraph.precision.quantizers import TensorQuantizer

CPU = torch.device("cpu")


def test_a_spec_with_another_number_of_rows() -> None:
    x = row(6, torch.bfloat16, CPU)
    assert x.times(1) is x
    assert x.times(Fraction(1)) is x
    half = x.times(Fraction(1, 4))
    assert (half.factor, half.bytes_per_row, str(half)) == (Fraction(1, 4), 3, "bf16[*/4,6]")
    assert half.times(1) == x
    assert half.stored(None) == half


def test_parts_of_a_quantized_value_have_its_rows() -> None:
    quantizer = TensorQuantizer(torch.float8_e4m3fn)
    x = row(32, torch.bfloat16, CPU)
    for spec in (x, x.times(Fraction(2))):
        stored = spec.stored(quantizer.storage)
        assert (stored.storage, stored.factor) == (quantizer.storage, spec.factor)
        parts: tuple[Spec, ...] = quantizer.part_specs(stored, "row")
        assert [part.factor for part in parts] == [spec.factor] * len(parts)
