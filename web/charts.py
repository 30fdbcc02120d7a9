"""Pictures for pages that are files: inline SVG that keeps its text size at any width and loads nothing.

Lengths along x are percentages and curves lie in a nested, stretched SVG, so one drawing serves desk, phone and paper.
"""

import html
import math
import re
from dataclasses import dataclass

DECADES = 12  # at most, of a logarithmic axis
TINY, HUGE = 1e-300, 1e300  # inside these, differences and logarithms of doubles are finite
# Control, bidirectional-override and lone surrogate characters: a file name must not break or disguise the page.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(value) -> str:
    """``str`` of anything: an int of thousands of digits and a nest without end are refused by Python."""
    try:
        return str(value)
    except (ValueError, RecursionError):
        return f"({type(value).__name__} that cannot be shown)"


def escape(value, limit: int = 600) -> str:
    """Text that is safe in HTML, as content and inside a quoted attribute, cut to ``limit`` characters."""
    text = plain(value)
    text = text if len(text) <= limit else text[: limit - 1] + "\u2026"
    return html.escape(UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text))


@dataclass(frozen=True)
class Scale:
    """An axis from ``low`` to ``high``, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def fit(cls, values, log: bool | None = None) -> "Scale":
        """The axis of finite values; logarithmic by default if they are positive and span a factor of 50."""
        values = [min(max(v, -HUGE), HUGE) for v in values if math.isfinite(v)]
        positive = [max(v, TINY) for v in values if v > 0]
        if log is None:
            log = bool(positive) and len(positive) == len(values) and max(positive) / min(positive) > 50
        if log:
            high = max(positive, default=1.0)
            low = max(min(positive, default=0.1), high / 10**DECADES)
            return cls(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high * 1.05)), True)
        low, high = min(values, default=0.0), max(values, default=1.0)
        pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        return cls(low - pad, high + pad)

    def at(self, value: float) -> float:
        """Place of a value in percent, kept inside the axis."""
        low, high, value = self.low, self.high, min(max(value, -HUGE), HUGE)
        if self.log:
            low, high, value = (math.log10(max(v, TINY)) for v in (low, high, value))
        return min(max(100 * (value - low) / (high - low), 0.0), 100.0)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values for at most about ``most`` labels."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**p for p in powers[:: math.ceil(len(powers) / most)]]
        raw = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
        first = math.ceil(self.low / step)
        return [(first + i) * step for i in range(most + 1) if (first + i) * step <= self.high]


def tick_text(value: float) -> str:
    """A short label: 0.5, 200, 1e-05."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:.6g}"


def text(x, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    """A label; ``words`` are escaped here."""
    return f'<text x="{x}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words, 80)}</text>'


def percent(value: float) -> str:
    return f"{value:.2f}%"


def svg(title: str, height: int, body: list[str]) -> str:
    """An outer SVG with its title; the page's style gives it the width and the margins for the labels."""
    words, parts = escape(title), "".join(body)
    return f'<svg class="chart" role="img" aria-label="{words}" height="{height}"><title>{words}</title>{parts}</svg>'


def stretched(y: float, height: float, body: str) -> str:
    """A nested SVG 1000 units wide that is stretched to the width of its chart."""
    size = f'viewBox="0 0 1000 {height:g}" preserveAspectRatio="none"'
    return f'<svg x="0" y="{y:g}" width="100%" height="{height:g}" {size} aria-hidden="true">{body}</svg>'


def grid(x: Scale, y: Scale, height: int, x_most: int = 5, y_most: int = 4) -> list[str]:
    """Grid lines and tick labels of both axes."""
    parts = [f'<line class="base" x1="0" x2="100%" y1="{height}" y2="{height}"/>']
    for value in y.ticks(y_most):
        place = height * (1 - y.at(value) / 100)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(text(-8, place + 4, tick_text(value), anchor="end"))
    parts += [text(percent(x.at(value)), height + 16, tick_text(value)) for value in x.ticks(x_most)]
    return parts


def bars(title: str, counts, x: Scale, words: str, log: bool = False, height: int = 140) -> str:
    """Bars of ``counts`` in bins of equal width on the axis ``x``; ``words`` stand below it."""
    most = max(counts)
    y = Scale(0.5, 10 ** math.ceil(math.log10(most * 1.05)), True) if log else Scale(0.0, max(most * 1.05, 1.0))
    wide = 1000 / len(counts)
    shape = ""
    for index, count in enumerate(counts):
        if count:
            top = height * (1 - y.at(count) / 100)
            shape += f"M{index * wide:.1f} {height}V{top:.1f}h{wide * 0.86:.1f}V{height}Z"
    parts = [*grid(x, y, height), stretched(0, height, f'<path class="area" d="{shape}"/>')]
    return svg(title, height + 40, [*parts, text("50%", height + 32, words)])
