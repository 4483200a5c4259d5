"""The table of what was measured, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date

from bench.kernels import kinds, launches, plain_names
from bench.rows import Key, Row

NOISE = "_words"  # the kernel that draws
HEAD = "row | batch | how | img/s | share | memory GB | first s | kernels | outside | recompiled"


def table(rows: Mapping[str, Row], results: Mapping[Key, dict], changes: Sequence[str]) -> str:
    """The table, and what follows from it."""
    fine = [found for found in results.values() if "error" not in found]
    where = sorted({f"{f['device']}, torch {f['torch']}" for f in fine})
    where += [f"ours with {' '.join(changes)}"] * bool(changes)
    lines = [f"{date.today()}, {'; '.join(where)}", "", f"| {HEAD} |", "|---" * 10 + "|"]
    said = []
    for name, row in rows.items():
        found = {
            c.label: results.get((name, c.label), {"error": "not run"}) for c in row.contenders
        }
        measured = {label: one for label, one in found.items() if "error" not in one}
        beyond(row, measured)
        lines += [line(row, label, one) for label, one in found.items()]
        said += [f"- {row.title}, batch {row.batch}: {s}" for s in sentences(row, measured)]
    said += list(best(rows, results))
    rates = sorted(f["matmul"] / 1e12 for f in fine)
    if rates:
        said.append(f"- matrix products: {rates[0]:.3g} to {rates[-1]:.3g} TFLOP/s")
    return "\n".join([*lines, "", *said])


def line(row: Row, label: str, found: Mapping) -> str:
    """One contender's line of the table."""
    start = f"| {row.title} | {row.batch} | {label} |"
    if "error" in found:
        return f"{start} {found['error']} |" + " |" * 6
    held = " / ".join(f"{found[k]:.1f}" for k in ("allocated", "reserved") if k in found)
    asked = {name for name in found["hits"] if name.startswith("fxgraph_cache")}
    hit = " cached" * (asked == {"fxgraph_cache_hit"})  # nothing was missing
    cells = [
        f"{row.batch / found['seconds']:.1f}",
        f"{found['share']:.1%}",
        held,
        f"{found['first']:.1f}{hit}",
        str(launches(found["kernels"]) or "-"),
        str(found.get("outside") or "-"),
        str(found["recompiled"]),
    ]
    return f"{start} {' | '.join(cells)} |"


def beyond(row: Row, found: Mapping[str, dict]) -> None:
    """Counts our kernels outside the network: what the objective adds, and the update."""
    if row.around and all(label in found for label in row.around):
        whole, bare = (found[label] for label in row.around)
        if bare.get("update"):
            bare["outside"] = bare["update"]
            more = launches(whole["kernels"]) - launches(bare["kernels"])
            whole["outside"] = more + bare["update"]


def sentences(row: Row, found: Mapping[str, Mapping]) -> Iterator[str]:
    """What the row was measured for, as far as its contenders were."""
    for bar in row.faster[1:]:
        if bar in found and row.faster[0] in found:
            yield ratio(found, bar, row.faster[0], "{1} is {2:.2f} times as fast as {0}")
    for costly, plain in row.costs:
        if costly in found and plain in found:
            yield ratio(found, costly, plain, "a step of {0} takes {2:.2f} times one of {1}")
    if row.around and all(label in found for label in row.around):
        yield around(*(found[label] for label in row.around))
    for label, one in found.items():
        if one["kernels"]:
            yield f"{label} spends {kinds(one['kernels'])}"


def ratio(found: Mapping[str, Mapping], slow: str, fast: str, words: str) -> str:
    """How much longer one takes than the other; two GPUs are not quite alike, as their rates of
    products say."""
    a, b = found[slow], found[fast]
    rates = f"{a['matmul'] / 1e12:.3g} and {b['matmul'] / 1e12:.3g} TFLOP/s of products"
    other = "" if a.get("gpu") == b.get("gpu") else f", on GPUs with {rates}"
    return words.format(slow, fast, a["seconds"] / b["seconds"]) + other


def around(whole: Mapping, bare: Mapping) -> str:
    """What an objective adds to its network and update: time and kernels."""
    share = 1 - bare["seconds"] / whole["seconds"]
    here, there = (plain_names(found["kernels"]) for found in (whole, bare))
    if not here or not there:
        return f"the objective takes {share:.1%} of the step"
    count, noise = sum(here.values()) - sum(there.values()), here[NOISE] - there[NOISE]
    listed = "; ".join(f"{n} {name}" for name, n in (here - there).most_common())
    gone = "; ".join(f"{n} {name}" for name, n in (there - here).most_common())
    return (
        f"the objective takes {share:.1%} of the step and {count} kernels, {noise} of them draws"
        f" (more: {listed or 'none'}; fewer: {gone or 'none'})"
    )


def best(rows: Mapping[str, Row], results: Mapping[Key, Mapping]) -> Iterator[str]:
    """Where a network was measured at several batches: the best of ours, and of the bars, where
    the row has any."""
    alike: dict[str, list[tuple[str, Row]]] = {}
    for name, row in rows.items():
        alike.setdefault(name.partition(":")[0], []).append((name, row))
    for several in (some for some in alike.values() if len(some) > 1 and some[0][1].faster):
        ours, *bars = several[0][1].faster
        tops = [top(several, results, labels) for labels in ([ours], bars)]
        if all(tops):
            (rate, batch, _), (bar, at, label) = tops
            yield (
                f"- {several[0][1].title} at its best batch: {ours} {rate:.1f} img/s at {batch},"
                f" {label} {bar:.1f} at {at}: {rate / bar:.2f} times as fast"
            )


def top(
    several: Sequence[tuple[str, Row]], results: Mapping[Key, Mapping], labels: Sequence[str]
) -> tuple[float, int, str] | None:
    """The highest rate in img/s, at which batch and whose."""
    keys = [(name, row.batch, label) for name, row in several for label in labels]
    found = [(results.get((name, label), {}), batch, label) for name, batch, label in keys]
    rates = [
        (batch / one["seconds"], batch, label) for one, batch, label in found if "seconds" in one
    ]
    return max(rates, default=None)
