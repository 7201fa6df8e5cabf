"""Write Python's own language documentation as one plain text: the default document of demo and eval.

Every topic of `pydoc_data.topics`, in key order, separated by a blank line, runs of blanks and tabs collapsed
to one blank. About half a megabyte; it is on every machine that has Python, so nothing is downloaded. The
text differs a little between Python versions: compare numbers taken with the same one.

    python3 scripts/pydoc-text.py target/pydoc-topics.txt
"""

import re
import sys

from pydoc_data.topics import topics


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: pydoc-text.py OUTPUT")
    text = "\n\n".join(topics[key] for key in sorted(topics))
    text = re.sub(r"[ \t]+", " ", text)
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        out.write(text)


main()
