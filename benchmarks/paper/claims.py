"""The paper's claims as assertions about runs: each judges one seed, and says by which number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from .experiment import BASELINE

Verdict = tuple[bool, float]


class Trace:
    """What one arm did in one seed: a row of the results."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row

    def during(self, phase: str, column: str) -> list[float]:
        """The records of a phase in one column, those without a number left out."""
        curve = self.row["curve"]
        pairs = zip(curve["phase"], curve[column], strict=True)
        return [value for at, value in pairs if at == phase and value is not None]

    def steps(self, phase: str) -> list[int]:
        """The steps of a phase that were recorded."""
        curve = self.row["curve"]
        return [step for at, step in zip(curve["phase"], curve["step"], strict=True) if at == phase]

    def at(self, steps: Sequence[int], column: str) -> list[float]:
        """The records at these steps in one column."""
        wanted = {*steps}
        curve = self.row["curve"]
        return [value for step, value in zip(curve["step"], curve[column], strict=True) if step in wanted]

    def score(self, step: int, name: str) -> float:
        """A score over a whole set at a step that was scored."""
        return float(self.row["scores"][str(step)][name])

    def end(self, moment: str) -> int:
        """The step of a moment."""
        return int(self.row["ends"][moment])


Case = Mapping[str, Trace]  # the arms of one seed
Judge = Callable[[Case], Verdict]


@dataclass(frozen=True, slots=True)
class Claim:
    """What the paper says, where, of which experiments, and how a seed bears it out.

    `number` says what the number of `judge` is.
    """

    text: str
    source: str
    experiments: tuple[str, ...]
    judge: Judge
    number: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim, and what the seeds of one experiment made of it; `number` is the median over them."""

    claim: Claim
    experiment: str
    borne_out: int
    seeds: int
    number: float


def find(claim: Claim, experiment: str, cases: Sequence[Case]) -> Finding:
    """Judge a claim by every seed; one whose run broke down does not bear it out."""
    verdicts = []
    for case in cases:
        broken = any(trace.row.get("failure") for trace in case.values())
        verdicts.append((False, math.nan) if broken else claim.judge(case))
    numbers = [number for _, number in verdicts if not math.isnan(number)]
    return Finding(
        claim, experiment, sum(holds for holds, _ in verdicts), len(verdicts), median(numbers) if numbers else math.nan
    )


def norm_rises(case: Case) -> Verdict:
    """‖ADW‖ grows in opt1, and is near its highest at the end."""
    norms = case["bypass"].during("opt1", "residual")
    return norms[-1] > norms[0] and norms[-1] >= 0.9 * max(norms), norms[-1]


def norm_returns(case: Case) -> Verdict:
    """Every site comes within ε before the budget of opt2 is used up."""
    return bool(case["bypass"].row["arrived"]), case["bypass"].row["norm_at_proj"]


def norm_falls(case: Case) -> Verdict:
    """‖ADW‖ falls below a tenth of what opt1 left, at its lowest in opt2."""
    bypass = case["bypass"]
    left = bypass.during("opt1", "residual")[-1]
    lowest = min([bypass.row["norm_at_proj"], *bypass.during("opt2", "residual")])
    return lowest < 0.1 * left, lowest / left


def _beside_baseline(moment: str, score: str) -> Judge:
    def judge(case: Case) -> Verdict:
        step = case["bypass"].end(moment)
        ratio = case["bypass"].score(step, score) / case[BASELINE].score(step, score)
        return ratio < 1, ratio

    return judge


def loss_rebounds(case: Case) -> Verdict:
    """The training loss is higher after proj than after opt1."""
    bypass = case["bypass"]
    ratio = bypass.score(bypass.end("after proj"), "train_loss") / bypass.score(bypass.end("after opt1"), "train_loss")
    return ratio > 1, ratio


def _more_accurate(moment: str, score: str) -> Judge:
    def judge(case: Case) -> Verdict:
        step = case["bypass"].end(moment)
        gap = 100 * (case["bypass"].score(step, score) - case[BASELINE].score(step, score))
        return gap > 0, gap

    return judge


def _wider_steps(phase: str) -> Judge:
    def judge(case: Case) -> Verdict:
        sizes = case["bypass"].during(phase, "size")
        ratio = median(sizes) / median(case[BASELINE].at(case["bypass"].steps(phase), "size"))
        return ratio > 1, ratio

    return judge


def parts_from_baseline(case: Case) -> Verdict:
    """The distances from θ* differ more at the end of train3 than at its beginning."""
    bypass, baseline = case["bypass"], case[BASELINE]
    own = bypass.during("train3", "distance")
    gaps = [abs(a - b) for a, b in zip(own, baseline.at(bypass.steps("train3"), "distance"), strict=True)]
    return gaps[-1] > gaps[0], own[-1] / baseline.at(bypass.steps("train3"), "distance")[-1]


def distance_turns(case: Case) -> Verdict:
    """‖θ* − ω_t‖ grows in opt1 and is smaller at the end of opt2 than at its beginning."""
    out, back = (case["bypass"].during(phase, "distance") for phase in ("opt1", "opt2"))
    return out[-1] > out[0] and back[-1] < out[-1], back[-1] / out[-1]


def baseline_keeps_direction(case: Case) -> Verdict:
    """cos ∠θ*Oθ_t of the baseline stays above 0.9 to the end."""
    cosines = case[BASELINE].during("train3", "cosine")
    return min(cosines) > 0.9, cosines[-1]


def bypass_turns_away(case: Case) -> Verdict:
    """cos ∠θ*Oω_t is below the baseline's at the end of opt1."""
    steps = case["bypass"].steps("opt1")[-1:]
    own, other = (case[arm].at(steps, "cosine")[0] for arm in ("bypass", BASELINE))
    return own < other, own


def bypass_turns_back(case: Case) -> Verdict:
    """cos ∠θ*Oω_t is nearer to 1 at the end of opt2 than at the end of opt1, and below the baseline's."""
    bypass = case["bypass"]
    last = bypass.steps("opt2")[-1:]
    out, back = bypass.during("opt1", "cosine")[-1], bypass.at(last, "cosine")[0]
    return out < back < case[BASELINE].at(last, "cosine")[0], back


def relative_falls(case: Case) -> Verdict:
    """cos ∠θ_tθ*ω_t ends lower than it began, and below cos ∠θ*Oω_t."""
    bypass = case["bypass"]
    began, ends = bypass.during("opt1", "relative")[0], bypass.during("train3", "relative")[-1]
    return ends < min(began, bypass.during("train3", "cosine")[-1]), ends


def fewer_n_smaller_norm(case: Case) -> Verdict:
    """‖ADW‖ after a third of opt1 is below that after the whole."""
    few, all_of_it = (case[arm].during("opt1", "residual")[-1] for arm in ("n = 100", "bypass"))
    return few < all_of_it, few / all_of_it


def fewer_n_less_gain(case: Case) -> Verdict:
    """After a third of opt1 and the return, the training loss ends above that after the whole."""
    few, all_of_it = (case[arm].score(case[arm].end("end"), "train_loss") for arm in ("n = 100", "bypass"))
    return few > all_of_it, few / all_of_it


GAMMAS = ("γ = 0.0005t", "bypass", "γ = 0.05t")


def steps_to_a_tenth(trace: Trace) -> float:
    """Steps of opt2 until the norm was first seen below a tenth of what opt1 left; infinite if never."""
    left = trace.during("opt1", "residual")[-1]
    started = trace.end("after opt1")
    steps, norms = trace.steps("opt2"), trace.during("opt2", "residual")
    found = [step - started for step, norm in zip(steps, norms, strict=False) if norm < 0.1 * left]
    return float(found[0]) if found else trace.row["opt2_steps"] if trace.row["arrived"] else math.inf


def faster_gamma_sooner(case: Case) -> Verdict:
    """The steeper γ is, the sooner the norm is below a tenth of what opt1 left."""
    slow, middle, fast = (steps_to_a_tenth(case[arm]) for arm in GAMMAS)
    return fast <= middle <= slow and fast < slow, fast


def faster_gamma_higher_peak(case: Case) -> Verdict:
    """The highest minibatch loss in opt2 rises with the slope of γ."""
    slow, middle, fast = (max(case[arm].during("opt2", "loss")) for arm in GAMMAS)
    return slow <= middle <= fast and slow < fast, fast / slow


def _over_opt2(case: Case, arm: str) -> tuple[list[float], list[float]]:
    steps = case[arm].steps("opt2")
    return case[arm].at(steps, "loss"), case[BASELINE].at(steps, "loss")


def fast_gamma_above_baseline(case: Case) -> Verdict:
    """With the steepest γ the loss in opt2 peaks above the baseline's on the same minibatches."""
    own, other = _over_opt2(case, GAMMAS[-1])
    ratio = max(own) / max(other)
    return ratio > 1, ratio


def slow_gamma_below_baseline(case: Case) -> Verdict:
    """With the flattest γ the mean loss over opt2 is below the baseline's on the same minibatches."""
    own, other = _over_opt2(case, GAMMAS[0])
    ratio = fmean(own) / fmean(other)
    return ratio < 1, ratio


EPSILONS = ("bypass", "ε = 0.005", "ε = 0.05")


def larger_epsilon_sooner(case: Case) -> Verdict:
    """The larger ε is, the fewer steps opt2 takes; an arm that does not arrive takes its whole budget."""
    small, middle, large = (case[arm].row["opt2_steps"] for arm in EPSILONS)
    return large <= middle <= small and large < small, large


def larger_epsilon_jumps(case: Case) -> Verdict:
    """The relative change of the training loss by proj rises with ε."""
    small, middle, large = (case[arm].row["jump"] for arm in EPSILONS)
    return small <= middle <= large and small < large, large


def train3_mends_jump(case: Case) -> Verdict:
    """With the largest ε the training loss at the end is below that after proj."""
    trace = case[EPSILONS[-1]]
    ratio = trace.score(trace.end("end"), "train_loss") / trace.score(trace.end("after proj"), "train_loss")
    return ratio < 1, ratio


def gradient_never_vanishes(case: Case) -> Verdict:
    """‖∇‖ADW‖‖ · ‖(A, D, W)‖ is at least 3‖ADW‖ in every draw, as the norm is of degree 3."""
    least = case["theorem"].row["least"]
    return least >= 1 - 1e-9, least


def cost_is_linear(case: Case) -> Verdict:
    """What the extension adds to each example's forward and backward, per node of the layer, is the same at every width."""
    row = case["cost"].row
    per_node = [extra / width for extra, width in zip(row["pointwise"], row["widths"], strict=True)]
    return max(per_node) <= 1.01 * min(per_node) and not any(row["matmul_flops"]), per_node[-1]


def penalty_takes_few_matmuls(case: Case) -> Verdict:
    """‖ADW‖ and its gradients take the same number of products of the size of ADW at every width."""
    products = case["cost"].row["products"]
    return max(products) <= 1.01 * min(products), products[-1]


EVERY = ("V-A", "V-B", "VI-B", "VI-C")
IMAGES = ("V-B", "VI-B", "VI-C")
_NORM = "‖ADW‖ (Σ‖D‖ in VI-C)"

CLAIMS: tuple[Claim, ...] = (
    Claim(f"{_NORM} rises in opt1", "Fig. 3b, 4c, 7c, 8c", EVERY, norm_rises, "norm after opt1"),
    Claim("it falls below a tenth of that in opt2", "Fig. 3b, 4c, 7c, 8c", EVERY, norm_falls, "lowest / after opt1"),
    Claim("it comes within ε in opt2", "Sec. IV", EVERY, norm_returns, "norm as it was projected"),
    Claim(
        "the loss dips below the baseline's in opt1", "Fig. 3a, 4a, 7, 8a", EVERY,
        _beside_baseline("after opt1", "train_loss"), "training loss / baseline's after opt1",
    ),
    Claim("it rebounds in opt2", "Fig. 3a, 4a", EVERY, loss_rebounds, "training loss after proj / after opt1"),
    Claim(
        "it is still below the baseline's after proj", "Fig. 4a, 7, 8a", EVERY,
        _beside_baseline("after proj", "train_loss"), "training loss / baseline's after proj",
    ),
    Claim(
        "it ends below the baseline's", "Fig. 3a, 4a, 7, 8a", EVERY, _beside_baseline("end", "train_loss"),
        "training loss / baseline's at the end",
    ),
    Claim(
        "so does the test loss", "Fig. 4b", EVERY, _beside_baseline("end", "test_loss"),
        "test loss / baseline's at the end",
    ),
    Claim(
        "the training accuracy ends above the baseline's", "Fig. 4e, 7a, 8b", IMAGES,
        _more_accurate("end", "train_accuracy"), "points above the baseline at the end",
    ),
    Claim(
        "so does the test accuracy", "Fig. 4e, 7b, 8b", IMAGES, _more_accurate("end", "test_accuracy"),
        "points above the baseline at the end",
    ),
    Claim("steps are wider in opt1", "Fig. 3c, 4f", EVERY, _wider_steps("opt1"), "median ‖ω′ − ω‖ / baseline's"),
    Claim("steps are wider in train3", "Fig. 3c", EVERY, _wider_steps("train3"), "median ‖ω′ − ω‖ / baseline's"),
    Claim(
        "the distances from θ* part further in train3", "Fig. 3d, 5a", EVERY, parts_from_baseline,
        "‖θ* − ω‖ / baseline's at the end",
    ),
    Claim(
        "the distance from θ* grows in opt1 and shrinks in opt2", "Fig. 5a", EVERY, distance_turns,
        "after opt2 / after opt1",
    ),
    Claim("the baseline keeps its direction", "Fig. 5b", ("V-B",), baseline_keeps_direction, "cos ∠θ*Oθ at the end"),
    Claim("the bypass turns away in opt1", "Fig. 5b", ("V-B",), bypass_turns_away, "cos ∠θ*Oω after opt1"),
    Claim("it turns back in opt2, not all the way", "Fig. 5b", ("V-B",), bypass_turns_back, "cos ∠θ*Oω after opt2"),
    Claim(
        "the relative angle opens furthest", "Fig. 5b, 5c", ("V-B",), relative_falls, "cos ∠θθ*ω at the end"
    ),
    Claim("fewer n: smaller ‖ADW‖", "Fig. 6d", ("VI-A",), fewer_n_smaller_norm, "after n = 100 / n = 300"),
    Claim("fewer n: less gain", "Fig. 6a", ("VI-A",), fewer_n_less_gain, "training loss at the end / n = 300's"),
    Claim("faster γ: sooner back", "Fig. 6e", ("VI-A",), faster_gamma_sooner, "steps to a tenth, γ = 0.05t"),
    Claim(
        "faster γ: higher peak of the loss", "Fig. 6b", ("VI-A",), faster_gamma_higher_peak,
        "peak, γ = 0.05t / γ = 0.0005t",
    ),
    Claim(
        "the fastest γ peaks above the baseline", "Fig. 6b", ("VI-A",), fast_gamma_above_baseline, "peak / baseline's"
    ),
    Claim(
        "the slowest γ stays below the baseline", "Fig. 6b", ("VI-A",), slow_gamma_below_baseline,
        "mean loss in opt2 / baseline's",
    ),
    Claim("larger ε: fewer steps of opt2", "Fig. 6f", ("VI-A",), larger_epsilon_sooner, "steps, ε = 0.05"),
    Claim(
        "larger ε: larger jump at proj", "Fig. 6c", ("VI-A",), larger_epsilon_jumps, "relative change of loss, ε = 0.05"
    ),
    Claim("train3 mends the jump", "Fig. 6c", ("VI-A",), train3_mends_jump, "training loss at the end / after proj"),
    Claim(
        "∇‖ADW‖ ≠ 0 where ADW ≠ 0", "Theorem 2", ("theorem",), gradient_never_vanishes,
        "least ‖∇‖·‖(A, D, W)‖ / 3‖ADW‖",
    ),
    Claim(
        "the extension costs O(s_W)", "Sec. VII", ("cost",), cost_is_linear,
        "element operations per node and example, forward and backward",
    ),
    Claim(
        "‖ADW‖ costs a constant number of matrix products", "Sec. VII", ("cost",), penalty_takes_few_matmuls,
        "products of ADW's size, forward and backward",
    ),
)  # fmt: skip
