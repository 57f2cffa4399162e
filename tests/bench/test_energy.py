import pytest

from space_cli.bench import energy


@pytest.fixture
def zones(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    energy._counters.cache_clear()
    for number, count in enumerate((1_500_000, 2_000_000)):
        (tmp_path / f"intel-rapl:{number}").mkdir()
        (tmp_path / f"intel-rapl:{number}" / "energy_uj").write_text(f"{count}\n")
    yield tmp_path
    energy._counters.cache_clear()


@pytest.mark.usefixtures("zones")
def test_packages_are_summed_in_joules():
    assert energy.joules() == pytest.approx(3.5)


def test_a_counter_that_cannot_be_read_is_left_out(zones):
    (zones / "intel-rapl:0" / "energy_uj").unlink()

    assert energy.joules() == pytest.approx(2.0)


def test_a_platform_that_does_not_tell_gives_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path / "none")
    energy._counters.cache_clear()

    assert energy.joules() is None
