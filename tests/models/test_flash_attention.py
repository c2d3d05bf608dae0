"""Which attention kernels are preferred, by what is installed and what attention does; tests/gpu runs the kernels."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from torch.nn import attention
from torch.nn.attention import SDPBackend

from manyicl.models.attention import flash, segments
from manyicl.models.attention.flash import flash_attention_3, flash_implementation, is_usable
from manyicl.models.attention.segments import kernel_order


@pytest.fixture
def hopper(monkeypatch):
    """A GPU whose kernels are never called, torch's registry with an FA3 that does nothing, and what was done to it."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    active: list[str] = []
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: active[-1] if active else None)
    monkeypatch.setattr(
        attention, "activate_flash_attention_impl", lambda name: (active.append(name), done.append(name))
    )
    monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda: (active.pop(), done.append("restored")))
    monkeypatch.setattr(segments, "_let_torch_set_its_order", lambda: None)
    flash._is_installed.cache_clear()
    yield done
    flash._is_installed.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    module = types.ModuleType(flash.PACKAGE)
    module.__spec__ = types.SimpleNamespace(name=flash.PACKAGE)  # type: ignore[assignment]
    monkeypatch.setattr(torch.ops, "flash_attn_3", types.SimpleNamespace(fwd=None, bwd=None), raising=False)
    monkeypatch.setitem(sys.modules, flash.PACKAGE, module)


def preferred(*, row_tokens: int = 8192, drops: bool = False) -> list[str]:
    """Return the order of kernels that the block asks torch for."""
    with pytest.MonkeyPatch.context() as patch:
        asked: list[SDPBackend] = []
        original = segments.sdpa_kernel
        patch.setattr(segments, "sdpa_kernel", lambda order, **k: (asked.extend(order), original(order, **k))[1])
        with kernel_order(row_tokens=row_tokens, drops=drops):
            return [backend.name for backend in asked[:2]]


def test_without_the_package_cudnn_is_first(hopper, monkeypatch):
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda _: None)
    assert not is_usable()
    assert preferred() == ["CUDNN_ATTENTION", "FLASH_ATTENTION"]
    assert hopper == []


def test_where_it_is_installed_it_is_first_in_the_block_alone(hopper, installed):
    assert is_usable()
    assert preferred() == ["FLASH_ATTENTION", "CUDNN_ATTENTION"]
    assert hopper == ["FA3", "restored"]
    assert flash_implementation() is None


def test_a_block_in_a_block_changes_nothing(hopper, installed):
    with flash_attention_3():
        with flash_attention_3():
            assert flash_implementation() == "FA3"
        assert flash_implementation() == "FA3"
    assert hopper == ["FA3", "restored"]


def test_attention_that_drops_weights_is_kept_from_it(hopper, installed):
    assert preferred(drops=True) == ["CUDNN_ATTENTION", "FLASH_ATTENTION"]
    assert hopper == []


@pytest.mark.parametrize("row_tokens", [0, 4095])
def test_short_rows_are_kept_from_it(hopper, installed, row_tokens):
    assert preferred(row_tokens=row_tokens) == ["CUDNN_ATTENTION", "FLASH_ATTENTION"]
    assert hopper == []


def test_what_a_user_put_in_place_stays(hopper, installed):
    attention.activate_flash_attention_impl("FA4")
    assert preferred() == ["FLASH_ATTENTION", "CUDNN_ATTENTION"]
    assert hopper == ["FA4"]


def test_attention_that_drops_weights_is_kept_from_what_a_user_put_in_place(hopper):
    attention.activate_flash_attention_impl("FA4")
    assert preferred(drops=True) == ["CUDNN_ATTENTION", "EFFICIENT_ATTENTION"]


def test_on_another_device_than_hopper_it_is_not_put_in_place(hopper, installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    assert preferred() == ["CUDNN_ATTENTION", "FLASH_ATTENTION"]
    assert hopper == []


def test_what_is_compiled_for_one_kernel_is_not_taken_from_the_cache_for_another(hopper, installed):
    tags = []
    for row_tokens in (4095, 4096):
        with kernel_order(row_tokens=row_tokens):
            tags.append(torch.compiler.config.cache_key_tag)
    assert tags == ["CUDNN_ATTENTION", "FLASH_ATTENTION"]
    with torch.compiler.config.patch(cache_key_tag="mine"):
        with kernel_order():
            assert torch.compiler.config.cache_key_tag == "mine-CUDNN_ATTENTION"
        assert torch.compiler.config.cache_key_tag == "mine"


def test_what_torch_says_when_a_kernel_is_replaced_is_kept_to_itself(hopper, installed, monkeypatch):
    said = "Warning only once for all operators.\n  Overriding a previously registered kernel for the same operator"
    monkeypatch.setattr(attention, "activate_flash_attention_impl", lambda _: warnings.warn(said, stacklevel=1))
    monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda: None)
    with flash_attention_3():
        pass  # a warning is an error in the tests


def test_a_package_that_cannot_be_loaded_is_told_of_once(hopper, monkeypatch, tmp_path):
    (tmp_path / f"{flash.PACKAGE}.py").write_text("raise ImportError('undefined symbol: aoti_torch_x')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="cannot be loaded, so cuDNN's attention is used: undefined symbol"):
        assert not is_usable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert preferred() == ["CUDNN_ATTENTION", "FLASH_ATTENTION"]


def test_a_package_without_a_backward_pass_is_not_used(hopper, installed, monkeypatch):
    monkeypatch.setattr(torch.ops, "flash_attn_3", types.SimpleNamespace(fwd=None))
    with pytest.warns(UserWarning, match="cannot be loaded, so cuDNN's attention is used: it has no bwd"):
        assert not is_usable()


def test_it_is_let_go_where_the_block_fails(hopper, installed):
    with pytest.raises(ValueError, match="in the block"), flash_attention_3():
        raise ValueError("in the block")
    assert flash_implementation() is None
