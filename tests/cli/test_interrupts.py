"""Ctrl-C and SIGTERM come through wherever they arrive."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import caller

from rapidin.cli.interrupts import Interruptible, Terminated, exit_code


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """SIGINT as Python handles it, also where a shell began the tests in the background, ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_is_dropped_is_raised_again(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    dropped = []
    with Interruptible() as signals:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as first:
            dropped.append(first)  # as code does that takes every error for one of its own
        with pytest.raises(KeyboardInterrupt) as again:
            time.sleep(20)
        signals.settle()
        time.sleep(0.6)  # nothing more comes
    assert signals.stop is dropped[0]
    assert exit_code(again.value) == exit_code(signals.stop) == code
    assert isinstance(again.value, Terminated) == (number == signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_cleans_up_is_not_disturbed() -> None:
    cleaned = False
    with Interruptible() as signals, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            time.sleep(0.7)
            cleaned = True
            signals.settle()
    assert cleaned


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruptible() as signals:
            signal.raise_signal(signal.SIGINT)
        assert signals.stop is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_that_a_signal_led_to_is_the_signal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an interrupted import becomes an ImportError, or nothing at all."""

    def other_error(folder: Path) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("this is not installed") from None

    monkeypatch.setattr("rapidin.cache.manifest.Manifest.read", other_error)
    ran = caller(capsys)("info", tmp_path)
    assert (ran.code, ran.out, ran.err) == (130, "", "rapidin: interrupted\n")
