"""The step as an SVG: for papers, issues and pages that run no script. Light or dark as its reader prefers."""

from __future__ import annotations

from html import escape

from vramplan.core import curve
from vramplan.core.rows import scale_for
from vramplan.core.types import GpuVerdict
from vramplan.report import picture as shared
from vramplan.report.estimate import run_line
from vramplan.report.fields import one_line
from vramplan.report.picture import Picture
from vramplan.report.tables import VERDICT_STYLES

WIDTH, HEIGHT = 960, 448
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 68, 88  # margins
PIXELS = 2  # of a piece of the step, of which lowest and highest point are kept
LEAST_PHASE = 72  # pixels, for its name
LABEL_HEIGHT = 15
STYLE = """
text{font:13px system-ui,sans-serif;fill:#1b1b1b}.t{font-size:16px;font-weight:600}.d{fill:#5a5a5a}
.p{fill:#fff}.a{stroke:#8a8a8a;fill:none}.g{stroke:#8a8a8a;stroke-opacity:.25}.c{stroke-width:1.5;stroke-dasharray:7 4}
.m{stroke:#1b1b1b;stroke-width:2;stroke-dasharray:2 3}.r{text-anchor:end}.l{font-size:12px}
@media(prefers-color-scheme:dark){text{fill:#e6e6e6}.d{fill:#a8a8a8}.p{fill:#16181c}.m{stroke:#e6e6e6}}
""".strip()


def svg(picture: Picture) -> str:
    """The whole file."""
    return _Drawing(picture).text()


class _Drawing:
    """Each group is painted from the axis up to its height in the stack, the highest first."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        self.found = curve.levels(picture.step)
        self.parts = curve.stretches(picture.step)
        cards = shared.capacities(picture.verdicts)
        self.bottom, self.top, self.inside = shared.span(self.found, cards)
        self.outside = [card for card in cards if card not in self.inside]
        self.scale = scale_for(self.top)
        self.across = curve.widths(self.parts, WIDTH - LEFT - RIGHT, LEAST_PHASE)

    def text(self) -> str:
        title = f"Memory of one optimizer step: {run_line(self.picture.ledger)}"
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="'
            f'{_safe(title)}"><title>{_safe(title)}</title><style>{STYLE}</style>',
            f'<rect class="p" width="{WIDTH}" height="{HEIGHT}"/>',
            *self._heading(),
            *self._axis(),
            *self._areas(),
            *self._phases(),
            *self._cards(),
            *self._measured(),
            *self._peak(),
            *self._legend(),
        ]
        return "\n".join(parts) + "\n</svg>\n"

    # ----------------------------------------------------------------------------------------------------- places
    def x(self, point: int) -> float:
        at = LEFT
        for part, width in zip(self.parts, self.across, strict=True):
            if point < part.end:
                return at + (point - part.first) * width / (part.end - part.first)
            at += width
        return at

    def y(self, size: int) -> float:
        high = HEIGHT - TOP - BOTTOM
        return TOP + high - (size - self.bottom) * high / max(self.top - self.bottom, 1)

    def size(self, size: int) -> str:
        return f"{self.scale.text(self.scale.steps(size))} {self.scale.unit}"

    # ----------------------------------------------------------------------------------------------------- pieces
    def _heading(self) -> list[str]:
        need = self.size(self.found.totals[self.found.peak])
        cut = f" Below {self.size(self.bottom)}: weights alone." if self.bottom else ""
        note = f"{need} at the peak. Left to right: allocations and releases in their order, not seconds.{cut}"
        return [_text(LEFT, 22, run_line(self.picture.ledger), "t"), _text(LEFT, 42, note, "d")]

    def _axis(self) -> list[str]:
        out = []
        for tick in shared.ticks(self.bottom, self.top):
            at = self.y(tick)
            number = self.scale.text(self.scale.steps(tick)).rstrip("0").rstrip(".")
            out.append(f'<path class="g" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            out.append(_text(LEFT - 8, at + 4, number, "r"))
        return [*out, _text(LEFT - 8, TOP - 10, self.scale.unit, "r d")]

    def _areas(self) -> list[str]:
        pieces = []
        for part, width in zip(self.parts, self.across, strict=True):
            pieces += curve.buckets(part, max(width // PIXELS, 1))
        points = curve.thinned(self.found.totals, pieces)
        heights = [0] * len(points)
        out: list[str] = []
        for group, sizes in self.found.groups.items():
            heights = [height + sizes[point] for height, point in zip(heights, points, strict=True)]
            out.append(f'<path fill="{shared.COLOURS[group]}" d="{self._outline(points, heights)}"/>')
        return out[::-1]

    def _outline(self, points: list[int], heights: list[int]) -> str:
        """From the axis up, in steps: a level holds until the next point."""
        floor = f"{self.y(self.bottom):.1f}"
        path, before = [f"M{LEFT} {floor}"], floor
        for point, height in zip(points, heights, strict=True):
            level = f"{self.y(max(height, self.bottom)):.1f}"
            if level != before:
                path.append(f"H{self.x(point):.1f}V{level}")
                before = level
        return "".join(path) + f"H{WIDTH - RIGHT}V{floor}z"

    def _phases(self) -> list[str]:
        low = HEIGHT - BOTTOM
        out, at = [f'<path class="a" d="M{LEFT} {TOP}V{low}H{WIDTH - RIGHT}"/>'], LEFT
        for part, width in zip(self.parts, self.across, strict=True):
            out.append(f'<path class="a" d="M{at} {TOP}V{low + 6}" stroke-opacity=".5"/>')
            out.append(_text(at + 5, low + 18, part.phase))
            at += width
        return out

    def _cards(self) -> list[str]:
        out: list[str] = []
        free = [HEIGHT] * 2  # of the right and the left end, where no label is yet, going up
        for card in self.inside:
            at = self.y(card.usable_bytes)
            out.append(
                f'<path class="c" stroke="{VERDICT_STYLES[card.verdict]}" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
            )
            side = 0 if at + LABEL_HEIGHT < free[0] else 1
            free[side] = int(at)
            where = (WIDTH - RIGHT - 4, "r") if side == 0 else (LEFT + 6, "")
            out.append(_text(where[0], at - 5, self._card(card), where[1]))
        return out

    def _card(self, card: GpuVerdict) -> str:
        return f"{card.gpu}: {self.size(card.usable_bytes)} usable"

    def _measured(self) -> list[str]:
        """The highest point that was allocated, as a line over each time that its phase comes."""
        peaks = {phase: measured for phase, measured, _ in shared.measured_peaks(self.picture)}
        out: list[str] = []
        for part in self.parts:
            peak = peaks.get(shared.phase_of(part))
            if peak is not None and peak >= self.bottom:
                begin, end = self.x(part.first), self.x(part.end)
                out.append(f'<path class="m" d="M{begin:.1f} {self.y(peak):.1f}H{end:.1f}"/>')
        return out

    def _peak(self) -> list[str]:
        point = self.found.peak
        x, y = self.x(point), self.y(self.found.totals[point])
        text, right = f"peak: {shared.where(self.picture.step, point)}", x > WIDTH / 2
        label = _text(x + (-9 if right else 9), max(y - 6, TOP - 4), text, "r" if right else "")
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#D55E00"/>', label]

    def _legend(self) -> list[str]:
        out, x, y = [], float(LEFT), HEIGHT - 40
        peak = self.found.peak
        entries = [
            (f'<rect x="{{x}}" y="{{y}}" width="12" height="12" fill="{shared.COLOURS[group]}"/>',
             f"{group} {self.size(sizes[peak])}")
            for group, sizes in self.found.groups.items()
        ]  # fmt: skip
        if self._measured():
            entries.append(('<path class="m" d="M{x} {y}m0 6h12"/>', "measured, most allocated in a phase"))
        entries += [("", f"{self._card(card)}, above the picture") for card in self.outside]
        for mark, text in entries:
            wide = 26 + 6.3 * len(text)
            if x + wide > WIDTH - RIGHT:
                x, y = LEFT, y + 20
            out += [mark.format(x=f"{x:.1f}", y=y), _text(x + (17 if mark else 0), y + 10, text, "l")]
            x += wide
        return out


def _safe(text: str) -> str:
    return escape(one_line(text))


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}">{_safe(text)}</text>'
