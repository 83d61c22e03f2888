"""The stated precision holds inside, whatever was set before, and what was set comes back."""

import pytest
import torch

from diffdistill.evaluation.precision import _operations, computing, strict_float32

X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
EXACT = (X.double() @ X.double()).float()


def error() -> float:
    return float((X @ X - EXACT).abs().max())


def state() -> list:
    cudnn = torch.backends.cudnn
    return [torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic]


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_products_are_exact_to_float32_inside_and_settings_come_back(before, precision):
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        found, ops = state(), [op.fp32_precision for op in _operations()]
        with computing(precision), computing(precision):
            assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
            assert torch.backends.cudnn.allow_tf32 is (precision == "tf32")
            assert torch.backends.cudnn.deterministic
            if precision == "float32":
                assert error() < 1e-4
        assert state() == found
        assert [op.fp32_precision for op in _operations()] == ops
    finally:
        torch.set_float32_matmul_precision(kept)


@pytest.mark.skipif(not _operations(), reason="this torch sets no precision by operation")
def test_a_precision_set_for_one_operation_does_not_reach_the_inside():
    matmul = torch.backends.mkldnn.matmul
    kept = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with strict_float32():
            assert error() < 1e-4
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = kept


def test_an_error_inside_restores_too():
    found = state()
    with pytest.raises(RuntimeError, match="inside"), computing("tf32"):
        raise RuntimeError("inside")
    assert state() == found


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_autocast_is_that_of_the_precision_and_gradients_are_off(precision, dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16), computing(precision):
        product = X.clone().requires_grad_() @ X
        assert product.dtype == dtype and not product.requires_grad
