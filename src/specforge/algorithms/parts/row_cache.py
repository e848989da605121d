"""What proposers keep of one sequence, row by row: keys and values of a decoder layer, and plain rows.

Legend: R new rows, C rows in the cache, n query heads, m key/value heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL_ROWS = 256


class RowBuffer:
    """Rows of one tensor, appended in order; :meth:`truncate` drops the last ones. Grows by doubling."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._buffer: Tensor | None = None

    def append(self, rows: Tensor) -> Tensor:
        """Append ``rows`` [R, ..]; a view of all rows [C, ..]."""
        start, end = self.num_rows, self.num_rows + len(rows)
        if self._buffer is None or len(self._buffer) < end:
            grown = rows.new_empty(max(INITIAL_ROWS, 2 * end), *rows.shape[1:])
            if self._buffer is not None:
                grown[:start] = self._buffer[:start]
            self._buffer = grown
        self._buffer[start:end] = rows
        self.num_rows = end
        return self._buffer[:end]

    def truncate(self, num_rows: int) -> None:
        """Keep at most the first ``num_rows``."""
        self.num_rows = min(self.num_rows, max(num_rows, 0))

    def rows(self, start: int, end: int) -> Tensor:
        """A view of the rows from ``start`` up to ``end``, which must be there."""
        assert self._buffer is not None, "no row was appended"
        assert start <= end <= self.num_rows, (start, end, self.num_rows)
        return self._buffer[start:end]


class RowCache:
    """Keys and values of a layer."""

    def __init__(self) -> None:
        self._keys, self._values = RowBuffer(), RowBuffer()

    @property
    def num_rows(self) -> int:
        return self._keys.num_rows

    def truncate(self, num_rows: int) -> None:
        """Keep at most the first ``num_rows``."""
        self._keys.truncate(num_rows)
        self._values.truncate(num_rows)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Append ``keys`` and ``values`` [R, m, d]; attention [R, n, d] of the same rows' ``queries`` [R, n, d].

        Each new row sees the rows that were there and the new ones up to itself. Softmax in fp32.
        """
        start = self.num_rows
        all_keys, all_values = self._keys.append(keys).transpose(0, 1), self._values.append(values).transpose(0, 1)
        num_groups, size = keys.shape[1:]
        grouped = queries.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)  # [m, g, R, d]
        scores = torch.matmul(grouped, all_keys.transpose(1, 2).unsqueeze(1)).float() * size**-0.5
        columns = torch.arange(self.num_rows, device=keys.device)
        hidden = columns > columns[start:].unsqueeze(-1)
        shares = torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1).to(values.dtype)
        return torch.matmul(shares, all_values.unsqueeze(1)).permute(2, 0, 1, 3).flatten(1, 2)
