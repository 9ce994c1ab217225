"""k-means in batches: the clustering behind every codebook of this package."""

import torch
from torch import Tensor

_DISTANCES_TOGETHER = 1 << 24


def cluster(points: Tensor, num_centroids: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm from points drawn without repetition: [points, dims] -> centroids [num_centroids, dims].

    A centroid that loses all its points is moved to the point that is served worst.
    """
    start = torch.randperm(len(points), generator=generator)[:num_centroids].to(points.device)
    centroids = points[start].clone()
    for _ in range(iterations):
        labels, distances = nearest(points, centroids)
        counts = torch.bincount(labels, minlength=num_centroids)
        sums = torch.zeros_like(centroids).index_add_(0, labels, points)
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centroids)
        for empty in (counts == 0).nonzero()[:, 0].tolist():
            worst = int(distances.argmax())
            centroids[empty] = points[worst]
            distances[worst] = 0
    return centroids


def nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each point and the squared distance to it: int64 [points], float [points].

    Some points at a time, so that distances take bounded memory.
    """
    step = max(1, _DISTANCES_TOGETHER // len(centroids))
    norms = centroids.square().sum(1)
    labels, distances = [], []
    for part in torch.split(points, step):
        reduced, label = torch.addmm(norms, part, centroids.T, alpha=-2).min(1)
        labels.append(label)
        distances.append((reduced + part.square().sum(1)).clamp_min(0))
    return torch.cat(labels), torch.cat(distances)
