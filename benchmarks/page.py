"""How long does the page of a gallery of 32,768 latents take to open, in readings of its data files?

    uv run python -m benchmarks.page [--latents N]

The reference is an empty page that loads the same three files of data. Both are opened in Chromium, which must be installed, from
disk and in turn; a page is open when it first shows its table.
"""

import argparse
import importlib
import pathlib
import statistics
import sys
import tempfile

from playwright import sync_api

from benchmarks import common

TESTS = pathlib.Path(__file__).parent.parent / "tests"
FILES = ("stats", "traits", "compare")
N_REPEATS = 5
REFERENCE = """<script>var saev = {put: (name, value) => value}</script>
%s
<script>performance.mark("saev-shown")</script>
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=32768)
    n_latents = parser.parse_args().latents
    sys.path.insert(0, str(TESTS))
    data = importlib.import_module("gallery_data")
    chromium = importlib.import_module("browsing").CHROMIUM
    if chromium is None:
        sys.exit("no Chromium (apt-get install chromium-headless-shell)")
    with tempfile.TemporaryDirectory() as name, sync_api.sync_playwright() as playwright:
        dpath = pathlib.Path(name)
        data.write(dpath, data.MadeUp(n_latents=n_latents, n_stored=64, n_images=32, n_view=4))
        scripts = "\n".join(f'<script src="data/{file}.js"></script>' for file in FILES)
        (dpath / "reference.html").write_text(REFERENCE % scripts)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def opened(file: str) -> float:
            """Milliseconds."""
            page = browser.new_page()
            page.goto((dpath / file).as_uri())
            page.wait_for_function("performance.getEntriesByName('saev-shown').length")
            found = page.evaluate("performance.getEntriesByName('saev-shown')[0].startTime")
            page.close()
            return found

        pages = {file: lambda file=file: opened(file) for file in ("index.html", "reference.html")}
        ms, reference_ms = common.interleaved(pages, N_REPEATS).values()
        browser.close()
    common.report(
        [
            {
                "name": f"page of {n_latents:,} latents",
                "ratio": common.median_ratio(ms, reference_ms),
                "reference": "an empty page that loads the same data",
                "ms": statistics.median(ms),
                "reference_ms": statistics.median(reference_ms),
            }
        ]
    )


if __name__ == "__main__":
    main()
