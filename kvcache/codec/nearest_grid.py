"""The nearest of many points of the plane, found by looking at few of them."""

import torch
from torch import Tensor

from anybit.kvcache.codec.clustering import nearest

_LIMIT = 4.0  # points further out are compared with all entries; of normal ones one in 16,000 is
_CELLS = 256  # along each axis


class NearestGrid:
    """Finds exactly what `nearest` finds among `entries` [n, 2], by cells that know which entries can be nearest in them."""

    def __init__(self, entries: Tensor) -> None:
        self._entries = entries
        self._candidates: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def search(self, points: Tensor) -> Tensor:
        """[points, 2] -> int64 [points]."""
        places = ((points + _LIMIT) * (_CELLS / (2 * _LIMIT))).floor()
        is_inside = ((places >= 0) & (places < _CELLS)).all(1)
        places = places.clamp_(0, _CELLS - 1)
        cells = (places[:, 0] * _CELLS + places[:, 1]).int()
        candidates, coordinates = self._of_cells(points.device)
        offsets = coordinates.index_select(0, cells).sub_(points.repeat(1, candidates.shape[1]))
        distances = offsets.square_().view(len(points), -1, 2).sum(2)
        found = candidates.view(-1).index_select(0, cells * candidates.shape[1] + distances.argmin(1).int())
        outside = (~is_inside).nonzero()[:, 0]
        if len(outside):
            found[outside] = nearest(points[outside], self._entries.to(points.device))[0]
        return found

    def _of_cells(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Per cell the entries that are nearest to some point of it: int64 [cells, most] and float32 [cells, 2 * most].

        Where there are fewer, the first of them is repeated.
        """
        if device not in self._candidates:
            width = 2 * _LIMIT / _CELLS
            centres = (torch.arange(_CELLS) + 0.5) * width - _LIMIT
            points = torch.cartesian_prod(centres, centres)
            distances = torch.cdist(points, self._entries.float().cpu())
            # Within a cell, distances are those of its centre up to half of its diagonal.
            possible = distances <= distances.amin(1, keepdim=True) + width * 2**0.5
            most = int(possible.sum(1).max())
            ordered = torch.sort(possible.to(torch.int8), dim=1, descending=True, stable=True).indices[:, :most]
            is_possible = possible.gather(1, ordered)
            candidates = torch.where(is_possible, ordered, ordered[:, :1])
            coordinates = self._entries.float().cpu()[candidates].flatten(1)
            self._candidates[device] = candidates.to(device), coordinates.to(device)
        return self._candidates[device]
