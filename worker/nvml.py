"""An NVIDIA card as its driver sees it, through NVML: temperature and the energy it has used.

What always holds: nothing raises; None where there is no card, no driver, no nvidia-ml-py, or a card that does not
tell. The counter of energy is the card's own (Volta and later), in millijoules since the driver was loaded: all that
the card does is in it, also what other programs do there. NVML is asked for no more than it answers to any user.
"""

from __future__ import annotations

from typing import Any


class Card:
    """One card: by its UUID, or by its number where that is all that is known.

    NVML numbers all cards of the machine in the order of the bus, CUDA those that are visible, in an order of its own:
    whoever knows the UUID should give it.
    """

    def __init__(self, number: int = 0, uuid: str | None = None) -> None:
        self._number = number
        self._uuid = uuid
        self._handle: Any = None

    def temperature_c(self) -> float | None:
        """Of the chip, in degrees Celsius."""
        return self._ask(lambda nvml, card: float(nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU)))

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; only differences say something."""
        return self._ask(lambda nvml, card: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000.0)

    def _ask(self, question: Any) -> float | None:
        try:
            import pynvml
        except ImportError:
            return None
        try:
            if self._handle is None:
                pynvml.nvmlInit()
                if self._uuid is None:
                    self._handle = pynvml.nvmlDeviceGetHandleByIndex(self._number)
                else:
                    self._handle = pynvml.nvmlDeviceGetHandleByUUID(self._uuid)
            answer: float = question(pynvml, self._handle)
        except pynvml.NVMLError:
            self._handle = None
            return None
        return answer
