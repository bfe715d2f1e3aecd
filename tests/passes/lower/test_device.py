"""What a device is called, and what it has."""

from __future__ import annotations

import pytest
import torch

from passes.lower.device import Device


def test_the_device_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
    assert Device.of(torch.device("cpu")) == Device("cpu")
    assert Device.of(torch.device("cuda", 9)) == Device("cuda", (8, 9))


@pytest.mark.parametrize(
    ("device", "name", "ada", "hopper"),
    [
        (Device("cpu"), "a cpu device", False, False),
        (Device("cuda", (8, 6)), "compute capability 8.6", False, False),
        (Device("cuda", (8, 9)), "compute capability 8.9", True, False),
        (Device("cuda", (9, 0)), "compute capability 9.0", True, True),
        (Device("cuda", (10, 0)), "compute capability 10.0", True, False),
        (Device("cuda", (12, 0)), "compute capability 12.0", True, False),
    ],
    ids=lambda value: str(value),
)
def test_what_a_device_has(device: Device, name: str, ada: bool, hopper: bool) -> None:
    assert (str(device), device.has((8, 9)), device.is_hopper) == (name, ada, hopper)
