"""Which profile fits: the meter's own word counts most, zeros say nothing, and what cannot be is no fit."""

from dataclasses import replace

from meter_agent.installer.identify import Fit, Look, Verdict, equally_good, judge, ranked
from meter_agent.profiles import load_profile
from meter_agent.readings import Sample

SDM630 = load_profile("eastron-sdm630")
SUNSPEC = load_profile("sunspec-inverter")
SHOWN = Sample(0.0, 0.0, 1_234_000_000, 567_000_000, 1_500, "4711")


def verdict(**changes: object) -> Verdict:
    return judge(Look(SDM630, replace(SHOWN, **changes)))


def test_a_meter_that_answers_everything_with_plausible_values_is_likely() -> None:
    assert verdict().fit is Fit.LIKELY


def test_the_meters_own_word_makes_it_certain() -> None:
    assert judge(Look(SDM630, SHOWN, model="SDM630")).fit is Fit.CERTAIN
    assert judge(Look(SUNSPEC, replace(SHOWN, import_mwh=None))).fit is Fit.CERTAIN
    # A new inverter has counted nothing yet.
    assert judge(Look(SUNSPEC, replace(SHOWN, import_mwh=None, export_mwh=1, power_w=0))).fit is Fit.CERTAIN


def test_an_unconfirmed_profile_fits_perhaps_at_best() -> None:
    judged = judge(Look(load_profile("acrel-adw300"), SHOWN))
    assert judged.fit is Fit.POSSIBLE
    assert "the profile is unconfirmed, compare with the display" in judged.reasons


def test_another_model_zeros_and_missing_values_leave_doubt() -> None:
    another = judge(Look(SDM630, SHOWN, doubt="it names another model", contradicted=True))
    assert another.fit is Fit.POSSIBLE
    assert "it names another model" in another.reasons
    # Old firmware has no such register.
    silent = judge(Look(SDM630, SHOWN, doubt="it does not say"))
    assert silent.fit is Fit.LIKELY
    assert silent.points < verdict().points
    assert verdict(import_mwh=0, export_mwh=0).fit is Fit.POSSIBLE
    assert verdict(export_mwh=None).fit is Fit.POSSIBLE
    assert verdict(serial_number=None).fit is Fit.POSSIBLE
    # One counter at zero is an ordinary meter without a roof.
    assert verdict(export_mwh=0).fit is Fit.LIKELY


def test_what_cannot_be_is_no_fit() -> None:
    assert judge(Look(SDM630, None)).fit is Fit.NONE
    assert verdict(import_mwh=5_000_000_000_001).fit is Fit.NONE
    assert verdict(power_w=2_000_001).fit is Fit.NONE
    assert verdict(power_w=-2_000_001).fit is Fit.NONE
    assert judge(Look(SUNSPEC, replace(SHOWN, power_w=2_000_001))).fit is Fit.NONE


def test_the_surest_kind_wins_and_ties_are_named() -> None:
    first, second = replace(verdict(), profile="b"), replace(verdict(), profile="a")
    weaker = replace(verdict(power_w=0), profile="c")
    doubtful = replace(verdict(export_mwh=None), profile="d")
    kept = ranked([weaker, doubtful, first, second, judge(Look(SDM630, None))])
    assert [each.profile for each in kept] == ["a", "b", "c"]
    assert equally_good(kept) == ("a", "b")
    certain = judge(Look(SDM630, SHOWN, model="SDM630"))
    assert ranked([first, certain]) == (certain,)
    assert ranked([judge(Look(SDM630, None))]) == ()
