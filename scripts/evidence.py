"""Write measured quality into the policies' pages.

    kvsieve eval --recipe ... --budget 50%,25%,10% --json > text.json
    kvsieve eval --task span-copy --recipe ... --budget 50%,25%,10% --json > span.json
    kvsieve eval --task span-copy --asked --recipe ... --budget 50%,25%,10% --json > asked.json
    python3 scripts/evidence.py text.json span.json [asked.json]

Replaces what stands between the evidence markers of docs/policies/NAME.md, for every recipe that has a page.
"""

import json
import re
import sys
from pathlib import Path

PAGES = Path(__file__).resolve().parent.parent / "docs" / "policies"


def means(rows, of):
    """NLL and accuracy of a recipe and budget, over the depths of passages that the prompt contains."""
    same = lambda row: row["recipe"] == of["recipe"] and row["budget"] == of["budget"] and row["depth"] is not None
    seen = [row for row in rows if same(row)]
    mean = lambda key: sum(row[key] for row in seen) / len(seen) if seen else None
    return mean("nll"), mean("accuracy")


def cells(nll, top1):
    return f"{'' if nll is None else f'{nll:.2f}'} | {'' if top1 is None else f'{100 * top1:.0f} %'}"


def main(text_path, span_path, asked_path=None):
    text = json.loads(Path(text_path).read_text())
    span = json.loads(Path(span_path).read_text())
    asked = json.loads(Path(asked_path).read_text()) if asked_path else []
    for recipe in dict.fromkeys(row["recipe"] for row in text):
        page = PAGES / f"{recipe}.md"
        if not page.exists():
            continue
        lines = [
            "| budget | entries per head | KV bytes resident | mean KL | same top-1 | NLL − full | span copy: NLL | span copy: top-1 |",
            "|---|---|---|---|---|---|---|---|",
        ]
        if asked:
            lines = [lines[0] + " asked: NLL | asked: top-1 |", lines[1] + "---|---|"]
        for row in (r for r in text if r["recipe"] == recipe):
            nll, top1 = means(span, row)
            lines.append(
                f"| {row['budget'] if row['budget'] not in ('', '-') else 'all'} "
                f"| {row['entries_per_head']:.0f} | {row['kv_bytes_resident'] / 2**20:.2f} MiB "
                f"| {row['kl']:.4f} | {100 * row['same_top1']:.1f} % | {row['nll_over_full']:+.3f} "
                f"| {cells(nll, top1)} |"
            )
            if asked:
                lines[-1] += f" {cells(*means(asked, row))} |"
        marker = re.compile(rf"(<!-- evidence:{recipe} -->\n).*?(<!-- /evidence -->)", re.S)
        body = page.read_text()
        if not marker.search(body):
            sys.exit(f"{page} has no evidence markers")
        page.write_text(marker.sub(lambda m: m.group(1) + "\n".join(lines) + "\n" + m.group(2), body))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
