"""How busy an accelerator is, as its driver tells it."""

import time
from collections.abc import Callable

import torch

_SECONDS = 0.25  # for which a reading counts: drivers look back that long themselves


class DeviceUse:
    """The share of the last moment in which a device worked, 0 to 1; None where nobody tells.

    It is what `nvidia-smi` calls utilization: whether anything ran, not how much. A lone sequence
    that decodes keeps a GPU near 1.
    """

    def __init__(
        self,
        device: torch.device,
        read: Callable[[torch.device], int] = torch.cuda.utilization,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read` tells percents; torch's own needs nvidia-ml-py."""
        self._device, self._read, self._clock = device, read, clock
        self._tells = device.type == "cuda"
        self._until, self._share = -1.0, 0.0

    def __call__(self) -> float | None:
        """The share; read anew at most every quarter of a second. Safe on any thread."""
        if self._tells and self._clock() >= self._until:
            self._until = self._clock() + _SECONDS
            try:
                self._share = self._read(self._device) / 100
            except Exception:  # no nvidia-ml-py, a driver that does not tell: of many kinds
                self._tells = False
        return self._share if self._tells else None
