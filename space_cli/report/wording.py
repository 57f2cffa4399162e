"""A run in words: its settings, its verdict and the evidence, the same in the terminal and in a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from space_cli.models.registry import name_with_masks
from space_cli.verify.record import MIN_P_VALUE

if TYPE_CHECKING:
    from space_cli.records import Record
    from space_cli.verify.record import Divergence, Verification

_LONGEST_SHOWN = 8
_BARS = " ▁▂▃▄▅▆▇█"


def run_settings(record: Record) -> list[str]:
    """Return the settings of a run, briefly."""
    settings, where = record.settings, record.environment
    sampling = settings["sampling"]
    mode = f"temperature {sampling['temperature']:g}, seed {sampling['seed']}" if sampling["temperature"] else "greedy"
    return [
        str(settings["model"]),
        where["dtype"],
        *([where["quantization"]] if where.get("quantization", "none") != "none" else []),
        where["device"],
        where["engine"],
        f"{where['threads']} threads",
        mode,
        f"{settings['max_new_tokens']} new tokens",
    ]


def without_masks(settings: Mapping[str, Any]) -> list[str]:
    """Return a line about drafting without masks, and how to have some; nothing for a model with masks."""
    model = settings["model"]
    if settings.get("masks_per_group") != 0 or "space" not in settings.get("methods", ("space",)):
        return []
    other = name_with_masks(settings.get("source", ""))
    way = f"--model {other} has" if other else f"`space train --model {model} --data FILE --output DIR` trains"
    return [f"{model} has no masks: what is guessed is copied from the text so far. {way} some, which guess anywhere."]


def verification_settings(record: Verification) -> list[str]:
    """Return the settings of a verification, briefly."""
    settings = record.settings
    k = [f"k = {settings['candidates']}"] if settings["candidates"] else []
    # numerics apply to the eager engine only
    numerics = [f"numerics: {settings['numerics']}"] if record.environment["engine"] == "eager" else []
    own = [*k, f"drafts: {settings['drafts']}", *numerics]
    return [*run_settings(record), *own, *([f"{settings['seeds']} seeds"] if settings["seeds"] > 1 else [])]


def evidence(record: Verification) -> list[str]:
    """Return the evidence for the verdict besides the table."""
    lengths = Counter({length + 1: count for length, count in enumerate(record.accepted) if count})
    lines = [f"Candidates accepted in a step: 0, 1, ...  {histogram(lengths)}"]
    if record.never_accepted:
        never = ", ".join(map(str, record.never_accepted))
        lines.append(f"No step accepted {never}: nothing is known of that; --drafts mixed gives every length.")
    if record.kernels is not None:
        kernels, bits = record.kernels, f"largest difference of a logit {record.kernels.largest_difference:.2g}"
        same = f"{kernels.bit_equal} of {kernels.positions} positions bit for bit"
        alone = "at the head" if record.settings["numerics"] == "same-shape" else "alone"
        lines.append(f"This machine, the same tokens {alone} and inside a block: equal at {same}, {bits}.")
    lines += without_masks(record.settings)
    lines += [
        f"First two tokens of {test.prompt} under {test.draws} seeds, {test.method} against transformers' distribution:"
        f" chi-squared {test.chi_squared:.1f} over {test.bins} bins, p = {test.p_value:.2g}."
        for test in record.distributions
    ]
    return lines


def verdict(record: Verification) -> str:
    """Return the verdict in one line."""
    places = [place[0] for place in by_place(record.divergences)]
    ties = sum(found.verdict == "tie" for found in places)
    violations = len(places) - ties
    unlikely = [test for test in record.distributions if test.p_value < MIN_P_VALUE]
    scope = f"{record.tokens} tokens of {len(record.answers)} answers"
    if record.lossless is None:
        return f"NO VERDICT: an error ended the run after {scope}"
    if violations or unlikely:
        found = [f"{violations} {'violation' if violations == 1 else 'violations'}"] if violations else []
        found += [
            f"the distribution of {test.method} is not transformers' (p = {test.p_value:.1g})" for test in unlikely
        ]
        return f"NOT LOSSLESS: {', '.join(found)} in {scope}"
    if ties:
        judged = "LOSSLESS UP TO ROUNDING" if record.lossless else "NOT LOSSLESS (--strict)"
        # nothing is more exact than float32: with a GGUF file's weights the rounding is that of activations
        advice = "" if record.environment["dtype"] == "float32" else "; --dtype float32 is exact"
        return f"{judged}: no violation and {ties} {'tie' if ties == 1 else 'ties'} in {scope}{advice}"
    return f"LOSSLESS: {scope} are identical"


def by_place(divergences: list[Divergence]) -> list[list[Divergence]]:
    """Group divergences at the same place with the same tokens, as those against ar and hf."""
    places: dict[tuple[object, ...], list[Divergence]] = {}
    for found in divergences:
        drafted = found.against == "drafts"
        key = (found.suite, found.prompt, found.seed, drafted, found.position, found.expected, found.got)
        places.setdefault(key, []).append(found)
    return list(places.values())


def heading(place: list[Divergence]) -> str:
    """Return the place of a divergence and what SPACE was compared with."""
    found = place[0]
    seed = "" if found.seed is None else f", seed {found.seed}"
    what = "draft" if found.against == "drafts" else "token"
    return f"{found.suite} {found.prompt}{seed}, {what} {found.position} against {sides(place)}"


def sides(place: list[Divergence]) -> str:
    """Return what differs from SPACE there."""
    return ", ".join(found.against for found in place)


def histogram(accepted: Counter[int]) -> str:
    """Return one bar per number of tokens in a step, with the fractions; the last bar includes longer steps."""
    if not accepted:
        return ""
    fractions, more = _fractions(accepted)
    return f"{''.join(map(_bar, fractions))}  " + " ".join(f"{fraction:.0%}" for fraction in fractions) + more


def named_histogram(accepted: Counter[int]) -> str:
    """Return the same with each number of tokens in front of its bar, for those that occurred: `1 ▆ 80%  2 ▂ 20%`."""
    fractions, more = _fractions(accepted)
    names = [str(length) for length in range(1, len(fractions) + 1)]
    names[-1] += more
    named = zip(names, fractions, strict=True)
    return "  ".join(f"{name} {_bar(fraction)} {fraction:.0%}" for name, fraction in named if fraction)


def _fractions(accepted: Counter[int]) -> tuple[list[float], str]:
    """Return the fraction of steps with 1, 2, ... tokens, and a + if the last fraction includes longer steps."""
    longest = min(max(accepted), _LONGEST_SHOWN)
    counts = [accepted[count] for count in range(1, longest + 1)]
    counts[-1] += sum(count for length, count in accepted.items() if length > longest)
    return [count / accepted.total() for count in counts], "+" if max(accepted) > longest else ""


def _bar(fraction: float) -> str:
    return _BARS[max(1 if fraction else 0, round(fraction * (len(_BARS) - 1)))]
