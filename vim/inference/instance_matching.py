"""Objects of a segmentation, found as connected pixels and compared with the true objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from scipy import ndimage

_IOU = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InstanceMatches:
    """True and found objects, and the pairs of them whose intersection over union is above 0.5."""

    matched: int
    true: int
    found: int

    @property
    def ap50(self) -> float:
        """Matched objects relative to matched, missed and wrongly found ones, in percent; NaN without objects.

        Source: the 2018 Data Science Bowl; Schmidt et al. 2018, arXiv:1806.03535, section 3.
        """
        total = self.true + self.found - self.matched
        return 100 * self.matched / total if total else float("nan")


def match_instances(masks: Iterable[tuple[np.ndarray, np.ndarray]]) -> InstanceMatches:
    """Match the connected parts of predicted foregrounds with true objects.

    Above an intersection over union of 0.5, a part fits one object at most, and an object one part.

    Args:
        masks: For each image its predicted labels, where 0 is the background, and the number of the true object in each
            pixel, where 0 is none; both (height, width). Pixels are connected by their sides.
    """
    matched = true = found = 0
    for labels, instances in masks:
        parts, count = ndimage.label(labels > 0)
        numbers, objects = np.unique(instances, return_inverse=True)
        objects = objects.reshape(instances.shape)
        shared = np.zeros((count + 1, len(numbers)), dtype=np.int64)
        np.add.at(shared, (parts, objects), 1)
        union = shared.sum(axis=1, keepdims=True) + shared.sum(axis=0) - shared
        is_object = numbers > 0
        matched += int((shared > _IOU * union)[1:, is_object].sum())
        true += int(is_object.sum())
        found += count
    return InstanceMatches(matched=matched, true=true, found=found)
