"""What a conformance test tells: points that hold, are broken, or were left out."""

from __future__ import annotations

from dataclasses import dataclass


class Broken(Exception):
    """A point does not hold; the message says in what."""


class LeftOut(Exception):
    """A point that says nothing about an objective; the message says why."""


@dataclass(frozen=True)
class Point:
    """One point of a report: it "holds", is "broken", or was "left out"."""

    name: str
    outcome: str
    said: str = ""

    def __str__(self) -> str:
        return f"{self.outcome:9} {self.name}" + (f": {self.said}" if self.said else "")


@dataclass(frozen=True)
class Report:
    """What was checked of one objective."""

    objective: str
    points: tuple[Point, ...]

    @property
    def broken(self) -> tuple[Point, ...]:
        return tuple(p for p in self.points if p.outcome == "broken")

    @property
    def left_out(self) -> tuple[Point, ...]:
        return tuple(p for p in self.points if p.outcome == "left out")

    def __str__(self) -> str:
        return "\n".join([f"objective `{self.objective}`", *map(str, self.points)])
