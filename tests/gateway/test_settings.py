"""The command line of the gateway."""

from __future__ import annotations

import pytest
from latentflow_gateway.settings import parse


@pytest.mark.parametrize(
    ("option", "least"),
    [
        ("--max-running=0", "1"),
        ("--max-queued=-1", "0"),
        ("--max-steps=0", "1"),
        ("--ready-seconds=-1", "0"),
        ("--request-seconds=0", "0.1"),
        ("--request-seconds=nan", "0.1"),
        ("--checkpoint-interval=-1", "0"),
        ("--drain=-0.5", "0"),
    ],
)
def test_a_number_below_the_least_is_refused_by_its_option(
    option: str, least: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--directory=a", option])
    assert ended.value.code == 2
    assert f"{option.partition('=')[0]} must be at least {least}, not " in capsys.readouterr().err


@pytest.mark.parametrize("origin", ["https://app.example/", "app.example", "", "a b"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--directory=a", f"--http-cors-origin={origin}"])
    assert f"{origin!r} is not an origin, such as https://app.example" in capsys.readouterr().err


@pytest.mark.parametrize("origin", ["*", "https://app.example", "http://localhost:3000", "http://[::1]:3000"])
def test_an_origin_that_browsers_send_is_accepted(origin: str) -> None:
    assert parse(["--directory=a", f"--http-cors-origin={origin}"]).cors_origins == (origin,)
