"""What another server's /metrics says, as far as its series are this project's."""

import math

from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "anybit_"


class Scrape:
    """The series of one scrape, without their common prefix. Raises ValueError for text that is no such thing."""

    def __init__(self, text: str) -> None:
        self._samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(_PREFIX) and math.isfinite(sample.value)
        ]

    @property
    def is_empty(self) -> bool:
        return not self._samples

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The sums of a metric's series by the values of one label; empty when there are none."""
        sums: dict[str, float] = {}
        for sample in self._samples:
            if sample.name == _PREFIX + name and label in sample.labels:
                value = sample.labels[label]
                sums[value] = sums.get(value, 0.0) + sample.value
        return sums

    def by_width(self, name: str) -> dict[int, float]:
        """The same by bit-width; what was asked for as at least so many bits is left out."""
        return {int(label): value for label, value in self.by_label(name, "bit_width").items() if label.isdecimal()}
