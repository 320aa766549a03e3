"""The heat map of the robustness benchmark, as SVG written by hand: it needs no library and its changes can be read.

What always holds: the same numbers give the same bytes. A missing number leaves a gap.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

Fraction = Callable[[str, str, float], float | None]
"""(defence, attack, share of attackers) -> share of the clean gain that is kept, or None."""


def colour(value: float) -> str:
    """0 or less is red, 0.85 yellow, 0.95 and more green."""
    stops = (
        (0.0, (196, 60, 52)),
        (0.5, (232, 132, 72)),
        (0.85, (246, 220, 130)),
        (0.95, (130, 186, 110)),
        (1.0, (70, 150, 90)),
    )
    value = min(max(value, 0.0), 1.0)
    for (low, one), (high, other) in itertools.pairwise(stops):
        if value <= high:
            t = (value - low) / (high - low)
            return "#" + "".join(f"{round(a + (b - a) * t):02x}" for a, b in zip(one, other, strict=True))
    return "#46965a"


def picture(defences: list[str], attacks: list[str], shares: list[float], fraction: Fraction) -> str:
    """Heat map: a block of rows for each attack, a row for each share, a column for each defence."""
    left, top, width, height, gap = 150, 62, 112, 22, 8
    rows = [(attack, share) for attack in attacks for share in shares]
    total = top + len(rows) * height + len(attacks) * gap + 12
    across = left + len(defences) * width + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {total}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{across}" height="{total}" fill="#ffffff"/>',
        '<text x="12" y="20" font-size="14">Share of the clean gain that is kept, by attack, share of attackers and '
        "defence</text>",
    ]
    for column, defence in enumerate(defences):
        x = left + column * width + width // 2
        parts.append(f'<text x="{x}" y="{top - 8}" text-anchor="middle">{defence}</text>')
    y = top
    for attack in attacks:
        parts.append(f'<text x="12" y="{y + 15}">{attack}</text>')
        for share in shares:
            parts.append(f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{share:.0%}</text>')
            for column, defence in enumerate(defences):
                value = fraction(defence, attack, share)
                x = left + column * width
                if value is None:
                    continue
                ink = "#ffffff" if value < 0.4 or value > 0.97 else "#202020"
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{width - 2}" height="{height - 2}" fill="{colour(value)}"/>'
                )
                label = "&lt; −100 %" if value < -1 else f"{value:.0%}".replace("-", "−")
                parts.append(
                    f'<text x="{x + width // 2}" y="{y + 15}" text-anchor="middle" fill="{ink}">{label}</text>'
                )
            y += height
        y += gap
    return "\n".join([*parts, "</svg>"]) + "\n"
