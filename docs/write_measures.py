"""Writes the table of `docs/measures.md` from the registry of measures.

python docs/write_measures.py
"""

from pathlib import Path

from keras_jacmon.measures.registry import MEASURES

PAGE = Path(__file__).parent / "measures.md"
BEGIN = "<!-- The table is generated: python docs/write_measures.py -->\n"
END = "<!-- end of the table -->\n"


def markdown_table() -> str:
    """Returns the Markdown table of all measures."""
    head = ["measure", "preset", "definition", "unit", "keeps", "can be held", "reading"]
    rows = [
        [
            f"`{m.name}`",
            f'`"{m.cost}"`' if m.kind.selectable else "-",
            m.definition,
            m.unit,
            m.reference or "-",
            "yes" if m.differentiable else "-",
            m.reading,
        ]
        for m in MEASURES.values()
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def with_table(page: str) -> str:
    """Returns the page with the table of today between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown_table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
