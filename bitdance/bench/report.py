"""What was measured against what the shape asks for, as JSON values and as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from bitdance.bench.phases import PHASES
from bitdance.costs.peak import Peak
from bitdance.costs.work import Work

COLUMNS = ("phase", "seconds", "share", "GFLOP", "GB", "GFLOP/s", "of peak", "GB/s", "of copy", "floor s", "reached")


def phase_records(work: Mapping[str, Work], peak: Peak, seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """By phase and under "total": flops, bytes, kernels, floor_seconds, and with measured `seconds` also rates and shares."""
    rows = {phase: work.get(phase, Work()) for phase in PHASES if phase in work or seconds}
    rooflines = {phase: row.roofline(peak) for phase, row in rows.items()}
    rows["total"] = sum(rows.values(), Work())
    rooflines["total"] = sum(rooflines.values())
    records: dict[str, Any] = {}
    for phase, row in rows.items():
        record: dict[str, Any] = {
            "flops": row.flops,
            "bytes": row.bytes,
            "kernels": row.kernels,
            "floor_seconds": rooflines[phase],
        }
        if seconds:
            spent = seconds[phase]
            record |= {"seconds": spent, "share": spent / seconds["total"]}
            if row.flops and spent:
                record |= {
                    "flops_per_s": row.flops / spent,
                    "share_of_peak": row.flops / spent / peak.flops_per_s,
                    "bytes_per_s": row.bytes / spent,
                    "share_of_copy": row.bytes / spent / peak.bytes_per_s,
                    "floor_reached": rooflines[phase] / spent,
                }
        records[phase] = record
    return records


def phase_table(records: Mapping[str, Any]) -> str:
    """The table of `phase_records`."""
    measured = "seconds" in records["total"]
    columns = COLUMNS if measured else ("phase", "floor s", "share", "GFLOP", "GB")
    total = records["total"]["floor_seconds"]
    rows = []
    for phase, record in records.items():
        cells = {
            "phase": phase,
            "GFLOP": _number(record["flops"] / 1e9 or None),
            "GB": _number(record["bytes"] / 1e9 or None),
            "floor s": _number(record["floor_seconds"] or None),
            "share": _percent(record["share"] if measured else record["floor_seconds"] / total),
            "seconds": _number(record.get("seconds")),
            "GFLOP/s": _number(record["flops_per_s"] / 1e9 if "flops_per_s" in record else None),
            "of peak": _percent(record.get("share_of_peak")),
            "GB/s": _number(record["bytes_per_s"] / 1e9 if "bytes_per_s" in record else None),
            "of copy": _percent(record.get("share_of_copy")),
            "reached": _percent(record.get("floor_reached")),
        }
        rows.append([cells[column] for column in columns])
    return table(columns, rows)


def speed_table(runs: Sequence[Mapping[str, Any]], yardsticks: Mapping[int, Mapping[str, Any]]) -> str:
    """Images per second, a row for each precision and preset, a column for each batch size."""
    batches = sorted({run["batch"] for run in runs})
    cells: dict[str, dict[int, str]] = {}
    for run in runs:
        speed = f"{run['images_per_s']:.4g}"
        if "yardstick" in run:
            speed += f" ({run['yardstick']['times_faster']:.2f}×)"
        cells.setdefault(label(run), {})[run["batch"]] = speed
    for batch, base in yardsticks.items():
        cells.setdefault(f"{base['dtype']}, yardstick", {})[batch] = f"{base['images_per_s']:.4g} (1.00×)"
    columns = ["images/s", *(f"batch {batch}" for batch in batches)]
    return table(columns, [[name, *(row.get(batch, "") for batch in batches)] for name, row in cells.items()])


def label(run: Mapping[str, Any]) -> str:
    """Precision and preset."""
    return f"{run['dtype']}, {run['preset']}"


def shown(found: Mapping[str, Any]) -> str:
    """All of what `Study` found, for people."""
    sizes = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in found["parameters"].items())
    lines = [
        f"{found['shape']}, {found['weights']} weights: {sizes}",
        f"{found['height']}×{found['width']} in {found['blocks']} blocks, prompt of {found['prompt_tokens'][0]} tokens",
    ]
    if kinds := [f"{part} {kind}" for part, kind in found["quantized"].items() if kind]:
        lines.append(f"quantised: {', '.join(kinds)}")
    if machine := found.get("machine"):
        threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
        lines.append(f"{machine['device']} ({machine['name']}), {threads}, torch {machine['torch']}; seconds: {machine['clock']}")
    for dtype, peak in found["peaks"].items():
        flops, copied = peak["flops_per_s"] / 1e9, peak["bytes_per_s"] / 1e9
        each = f", each of {peak['devices']}, which make pictures of their own" if peak["devices"] > 1 else ""
        lines.append(f"peak {dtype}: {flops:,.0f} GFLOP/s ({peak['kernel']}), copy {copied:,.1f} GB/s{each}")
    for run in found["runs"]:
        lines += ["", f"{label(run)}, batch {run['batch']}: {_how(run['sampling'])}", "", phase_table(run["phases"])]
        if memory := run.get("peak_memory_bytes"):
            lines.append(f"peak memory {memory / 1e9:.1f} GB")
        if "yardstick" in run:
            equal = run["yardstick"].get("equal_bits")
            said = "" if equal is None else f"; {100 * equal:.4g} % of the bits equal"
            lines.append(f"{run['yardstick']['times_faster']:.2f} times as fast as the yardstick{said}")
    baselines = {row["batch"]: row for row in found["yardsticks"]}
    turns = ["", turning_table(found["turns"])] if found.get("turns") else []
    return "\n".join([*lines, "", speed_table(found["runs"], baselines), *turns])


def turning_table(turns: Sequence[Mapping[str, Any]]) -> str:
    """From which batch size on each phase is set by arithmetic instead of bytes."""
    phases = [name for name in turns[0] if name not in ("dtype", "preset")]
    rows = [[label(row), *("never" if row[phase] is None else str(row[phase]) for phase in phases)] for row in turns]
    return table(["arithmetic from batch", *phases], rows)


def _how(sampling: Mapping[str, Any]) -> str:
    low, high = sampling["guidance_interval"]
    said = f"{sampling['sampler']}, {sampling['steps']} steps, guidance {sampling['guidance']:g}"
    said += f" from {low:g} to {high:g}" if (low, high) != (0, 1) else ""
    return said + (f", last block {sampling['last_steps']} steps" if sampling["last_steps"] else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned for people, and Markdown: it can be pasted into a document."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (f"{cell:<{n}}" if i == 0 else f"{cell:>{n}}" for i, (cell, n) in enumerate(zip(cells, widths)))
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join(("-" * (n + 2)) if i == 0 else "-" * (n + 1) + ":" for i, n in enumerate(widths)) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def _number(value: float | None) -> str:
    """Three digits that count, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
