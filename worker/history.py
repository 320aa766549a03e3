"""The loss curve of the present training, from its first step to the last one, in a bounded number of points.

What always holds: there are at most `MAX_POINTS` points, each the mean of equally many steps but for the last one;
steps that are computed again after a crash replace what they computed first.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_POINTS = 240


@dataclass(frozen=True)
class Point:
    """Some steps next to each other."""

    step: int
    """The last of them."""
    loss: float
    """Their mean, in nats per token."""
    count: int


class LossCurve:
    """Grows step by step; where it has too many points, pairs of neighbours become one."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._each = 1

    def points(self) -> tuple[tuple[int, float], ...]:
        """(step, loss) of each point."""
        return tuple((point.step, point.loss) for point in self._points)

    def add(self, step: int, loss: float) -> None:
        """One more step."""
        while self._points and self._points[-1].step >= step:
            self._points.pop()
        last = self._points[-1] if self._points else None
        if last is not None and last.count < self._each:
            self._points[-1] = _joined(last, Point(step, loss, 1))
            return
        self._points.append(Point(step, loss, 1))
        if len(self._points) > MAX_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            rest = self._points[-1:] if len(self._points) % 2 else []
            self._points = [_joined(left, right) for left, right in pairs] + rest
            self._each *= 2


def _joined(left: Point, right: Point) -> Point:
    count = left.count + right.count
    return Point(right.step, (left.loss * left.count + right.loss * right.count) / count, count)
