"""Pack the weights of several models into one array of 16-bit numbers.

Every tensor is a sum of parts, and a part is an array of fp16 numbers. Tensors with equal values
share their parts. Training moves weights a little, so a trained tensor is packed as the parts of
the base model's tensor and one part for the difference. In fp16 a difference of 0.01 has an error
below 3e-6, whereas a weight of 0.5 has an error of up to 1e-4.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import nn

from spavl_lib.errors import InputError

_SMALL = 5e-5  # error of a weight, as a share of the tensor's largest weight, that does not matter


@dataclass
class Packed:
    """Tensors as sums of fp16 parts."""

    parts: list[np.ndarray] = field(default_factory=list)
    """Flat arrays of fp16 numbers."""
    _known: dict[bytes, int] = field(default_factory=dict)

    def _add(self, values: np.ndarray) -> int:
        """The number of a part with these values, which is added if there is none."""
        content = values.tobytes()
        if content not in self._known:
            self._known[content] = len(self.parts)
            self.parts.append(values)
        return self._known[content]

    def total(self, numbers: list[int]) -> np.ndarray:
        """The sum of some parts in fp32, added up as the page does it."""
        values = np.zeros(len(self.parts[numbers[0]]), np.float32)
        for number in numbers:
            values += self.parts[number].astype(np.float32)
        return values

    def add(self, values: np.ndarray, start: list[int] | None = None) -> list[int]:
        """Pack a tensor.

        Args:
            values: The tensor, fp32 and flat.
            start: Parts of a similar tensor, such as the base model's; None if there is none.

        Returns:
            The numbers of the parts whose sum is the tensor. A difference from `start` gets one
            part, or two if one would leave an error that matters.

        Raises:
            InputError: The values are not finite, or too large for fp16.
        """
        largest = float(np.abs(values).max(initial=0))
        if not largest < float(np.finfo(np.float16).max):
            raise InputError("the model has weights that are not finite, or that exceed 65,504")
        numbers = start or [self._add(values.astype(np.float16))]
        limit = 0.0
        for _ in range(2):
            rest = values - self.total(numbers)
            if np.abs(rest).max(initial=0) <= limit:
                break
            numbers = [*numbers, self._add(rest.astype(np.float16))]
            limit = _SMALL * largest
        return numbers

    def to_bytes(self) -> bytes:
        """All parts, one after the other, in little-endian order."""
        return b"".join(part.astype("<f2").tobytes() for part in self.parts)


def tensors_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Name -> tensor in fp32 of a LLaVA model. The names lack `model.`, with which most begin."""
    return {
        name.removeprefix("model."): values.detach().float().cpu().numpy()
        for name, values in model.state_dict().items()
    }
