"""The document of what was measured."""

from collections import Counter

from benchmarks.report import DOCUMENT


def test_the_document_has_each_table_once() -> None:
    """Two that were written side by side are both kept by a merge; the older one is to be taken out."""
    titles = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
    assert not [title for title, times in Counter(titles).items() if times > 1]
