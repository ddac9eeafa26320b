"""Links between the documents, and the headers of the decision records."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", ".github/**/*.md", "docs/**/*.md", "charts/**/*.md", "models/**/*.md")
    for path in ROOT.glob(pattern)
)
DECISIONS = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
FOLDERS = "client|nodes|gateway|scheduler|operator|local|protos|crds|charts|docs|tests|e2e|bench|scripts|tools"
STATUSES = {"proposed", "accepted", "superseded"}
HEADER = re.compile(r"# (?P<number>\d{4}): (?P<title>.+)\n\n- Status: (?P<status>\w+)\n- Date: (?P<date>\S+)\n")


def prose(path: Path) -> str:
    """The text of a document without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def links(path: Path) -> Iterator[str]:
    """The targets of a document's links and images that are no URLs."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def header(path: Path) -> re.Match[str]:
    found = HEADER.match(path.read_text(encoding="utf-8"))
    assert found, f"{path.name} has to begin with its number and title, its status and its date"
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_relative_link_of_a_document_resolves(document: Path) -> None:
    for link in links(document):
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), f"{name(document)} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{name(document)} links to {link}, which has no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_file_of_the_repository_that_a_document_names_exists(document: Path) -> None:
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", document.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{name(document)} names {path}, which does not exist"


def test_the_readme_links_to_every_document() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert {path.resolve() for path in (ROOT / "docs").glob("*.md")} <= linked


@pytest.mark.parametrize("record", DECISIONS, ids=name)
def test_every_decision_record_has_its_number_a_status_and_a_date(record: Path) -> None:
    found = header(record)
    assert record.name.startswith(found["number"])
    assert found["status"] in STATUSES
    datetime.date.fromisoformat(found["date"])


def test_the_index_lists_every_decision_record_with_its_status_and_date() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| \[(\d{4}): (.+)\]\((\S+)\) \| (\w+) \| (\S+) \|", index, re.MULTILINE))
    records = {(record, header(record)) for record in DECISIONS}
    assert rows == {
        (found["number"], found["title"], record.name, found["status"], found["date"]) for record, found in records
    }


def test_a_superseded_decision_record_names_its_successor() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d{4}): .+\| (\w+) \| \S+ \| ?(.*)\|$", index, re.MULTILINE)
    numbers = {record.name[:4] for record in DECISIONS}
    assert rows
    for _, status, successor in rows:
        assert (successor.strip() in numbers) == (status == "superseded")
