"""The papers' claims as rows: which students are compared, by which figure, and from which gain on a claim holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from bench.proof.students.worth import gain_of

OUTSIDE = 2.0  # sigmas a gain must exceed
ARMS = ("real", "synthetic", "both")


@dataclass(frozen=True)
class Claim:
    """One table of the papers in this world's size."""

    name: str
    title: str
    paper: str
    figure: str  # what is compared, in words
    rule: str  # points, times, less, or same
    need: float  # points gained, times as much, share less, or sigmas apart at most

    def target(self) -> str:
        """What would make it hold, in words."""
        words = {
            "points": f"at least {self.need:g} points more",
            "times": f"at least {self.need:g} times as much",
            "less": f"at least {self.need:.0%} less",
        }
        if self.rule == "same":
            return f"no further apart than {self.need:g} sigma"
        return f"{words[self.rule]}, outside {OUTSIDE:g} sigma"


HARMONIC = "harmonic mean of seen and unseen mIoU"
ZERO_SHOT = "VOC, 5 of 20 classes without labels: harmonic mean 18.3 to 68.4"
INSTANCES = "COCO, 400 and 800 real, two sizes of student: 14.4 to 26.5 AP"
DOMAINS = "taught by day, asked at night and in fog: better than real alone"
RARE = "mIoU of the rare classes"
ENGINES = "Generated with fast or with torch", "a second engine must teach the same"
CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            "semantic", "Semantic segmentation", "VOC, 100 real + 40k synthetic: 65.2 to 78.5 mIoU", "mIoU", "points", 5
        ),
        Claim("instance", "Instance segmentation", INSTANCES, "AP", "times", 1.4),
        Claim("depth", "Depth", "NYU, 50 real: REL 0.31 to 0.21", "REL (less is better)", "less", 0.2),
        Claim("pose", "Pose", "COCO: 42.4 to 47.5 AP", "OKS-AP", "points", 3),
        Claim("zero-shot", "Zero-shot", ZERO_SHOT, HARMONIC, "times", 2),
        Claim("long-tail", "Long tail", "rare classes gain about 20 points", RARE, "points", 10),
        Claim("domain", "Domain generalisation", DOMAINS, "mIoU", "points", 5),
        Claim("parity", *ENGINES, "mIoU", "same", OUTSIDE),
    )
}


def spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else math.inf


def enough(claim: Claim, before: float, after: float) -> bool:
    """Whether a gain is as large as the claim asks for."""
    if claim.rule == "less":
        return after <= (1 - claim.need) * before
    return after >= claim.need * before if claim.rule == "times" else after - before >= claim.need


def judged(claim: Claim, before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Gain, its sigma, its 95 % interval and whether the claim holds, from the figures of every seed.

    Sigma is the spread of one pair of students over the seeds, not the smaller error of the mean.
    """
    gain, sigma, half = gain_of(before, after)
    if claim.rule == "same":
        holds = abs(gain) <= claim.need * sigma
    else:
        holds = enough(claim, fmean(before), fmean(after)) and abs(gain) > OUTSIDE * sigma
    return {"gain": gain, "sigma": sigma, "interval": [gain - half, gain + half], "holds": bool(holds)}


def reason(claim: Claim, row: Mapping[str, Any]) -> str:
    """Why a claim does not hold, as far as its own figures say it; empty where it holds."""
    if row["holds"]:
        return ""
    gain, sigma = row["gain"], row["sigma"]
    if claim.rule == "same":
        return f"the two engines' students are {abs(gain):.3g} apart, more than {claim.need:g} sigma of {sigma:.2g}"
    better = -gain if claim.rule == "less" else gain
    most = row.get("ceiling")
    if most is not None and not enough(claim, row["real"], most):
        scenes = f"even {row['ceiling_scenes']:,} real scenes in place of the generated images"
        lack = "what it lacks is size or steps, not data"
        return f"{scenes} bring this student to {most:.3g} only: {lack}; both reach {row['both']:.3g}"
    cause = ""
    if row["synthetic"] is not None and ((row["synthetic"] > row["real"]) == (claim.rule == "less")):
        cause = "synthetic images alone teach less than the real ones, so half of every batch is the weaker teacher"
    elif most is not None:
        scenes = f"{row['ceiling_scenes']:,} real scenes bring this student to {most:.3g}"
        cause = f"{scenes}, so what the generated images say is at fault, not their number"
    if better <= 0:
        first = "adding synthetic images did not help"
    elif better <= OUTSIDE * sigma:
        first = f"the gain of {better:.3g} lies within {OUTSIDE:g} sigma of {sigma:.2g}: seeds differ more than arms"
    else:
        first = f"the gain of {better:.3g} is outside {OUTSIDE:g} sigma but short of the claim ({claim.target()})"
    return f"{first}; {cause}" if cause else first


def row_of(claim: Claim, scores: Mapping[str, Sequence[float]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the result: the mean of each arm, its seeds, and the verdict."""
    row: dict[str, Any] = {arm: fmean(scores[arm]) if arm in scores else None for arm in ARMS}
    row |= judged(claim, scores["real"], scores["both"])
    row["seeds"] = {arm: list(values) for arm, values in scores.items()}
    row["spread"] = {arm: spread(values) for arm, values in scores.items()}
    row |= {"figure": claim.figure, "paper": claim.paper, "target": claim.target(), **facts}
    return row | {"reason": reason(claim, row)}
