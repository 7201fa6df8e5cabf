"""Write measured quality into the policies' pages.

    kvsieve eval --recipe ... --budget 50%,25%,10% --json > text.json
    kvsieve eval --task span-copy --recipe ... --budget 50%,25%,10% --json > span.json
    python3 scripts/evidence.py text.json span.json

Replaces what stands between the evidence markers of docs/policies/NAME.md, for every recipe that has a page.
"""

import json
import re
import sys
from pathlib import Path

PAGES = Path(__file__).resolve().parent.parent / "docs" / "policies"


def main(text_path, span_path):
    text = json.loads(Path(text_path).read_text())
    span = json.loads(Path(span_path).read_text())
    for recipe in dict.fromkeys(row["recipe"] for row in text):
        page = PAGES / f"{recipe}.md"
        if not page.exists():
            continue
        lines = [
            "| budget | entries per head | KV bytes resident | mean KL | same top-1 | NLL − full | span copy: NLL | span copy: top-1 |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in (r for r in text if r["recipe"] == recipe):
            seen = [s for s in span if s["recipe"] == recipe and s["budget"] == row["budget"] and s["depth"] is not None]
            mean = lambda key: sum(s[key] for s in seen) / len(seen) if seen else None
            nll, top1 = mean("nll"), mean("accuracy")
            lines.append(
                f"| {row['budget'] if row['budget'] not in ('', '-') else 'all'} "
                f"| {row['entries_per_head']:.0f} | {row['kv_bytes_resident'] / 2**20:.2f} MiB "
                f"| {row['kl']:.4f} | {100 * row['same_top1']:.1f} % | {row['nll_over_full']:+.3f} "
                f"| {'' if nll is None else f'{nll:.2f}'} | {'' if top1 is None else f'{100 * top1:.0f} %'} |"
            )
        marker = re.compile(rf"(<!-- evidence:{recipe} -->\n).*?(<!-- /evidence -->)", re.S)
        body = page.read_text()
        if not marker.search(body):
            sys.exit(f"{page} has no evidence markers")
        page.write_text(marker.sub(lambda m: m.group(1) + "\n".join(lines) + "\n" + m.group(2), body))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
