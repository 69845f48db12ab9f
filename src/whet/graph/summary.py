"""What a model is made of: `whet.inspect` returns this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from whet import htmltext


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer that ran. macs: multiply-accumulates for one example; parameters counts shared weights where first seen."""

    name: str
    kind: str
    output_shape: tuple[int | None, ...]
    parameters: int
    macs: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The layers in execution order, their totals, and `never_run`: layers the example did not reach."""

    rows: tuple[LayerRow, ...]
    never_run: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """All parameters, shared ones once."""
        return sum(row.parameters for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one example."""
        return sum(row.macs for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of the parameters as they are held in memory."""
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The rows and totals in plain values."""
        rows = [{name: getattr(row, name) for name in LayerRow.__slots__} for row in self.rows]
        return {
            "layers": rows,
            "parameters": self.parameters,
            "macs": self.macs,
            "bytes": self.bytes,
            "never_run": list(self.never_run),
        }

    def _repr_html_(self) -> str:
        header, body, total = self._table()
        never = [f"never run by the example: {name}" for name in self.never_run]
        return htmltext.table(header, [*body, total], notes=never)

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], tuple[str, ...]]:
        """The header, a row for each layer, and the totals."""
        header = ("layer", "kind", "output", "parameters", "MACs", "bytes")
        body: list[tuple[str, ...]] = [
            (
                r.name,
                r.kind,
                "×".join("?" if n is None else str(n) for n in r.output_shape),
                f"{r.parameters:,}",
                f"{r.macs:,}",
                f"{r.bytes:,}",
            )
            for r in self.rows
        ]
        return header, body, ("total", "", "", f"{self.parameters:,}", f"{self.macs:,}", f"{self.bytes:,}")

    def __str__(self) -> str:
        header, body, total = self._table()
        widths = [max(len(row[i]) for row in (header, total, *body)) for i in range(6)]

        def line(cells: tuple[str, ...]) -> str:
            left = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
            return "  ".join(left + [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]).rstrip()

        rule = "─" * len(line(header))
        lines = [line(header), rule, *(line(row) for row in body), rule, line(total)]
        return "\n".join(lines + [f"never run by the example: {name}" for name in self.never_run])
