"""A run directory as one page, report.html, that opens from disk and needs no network.

`write(run_dir)` works on what any script leaves behind, finished or not; RunDir's `Live` does so while a run
goes on; `compare(runs, file)` puts several runs on one page. told.py reads the logs, figures.py says in
tables and a sentence what came of a run, page.py packs that into page.html with page.css and page.js, which
draws it. vendor/ holds temml, which typesets formulas. Text of models is only ever set as text. See also
`python -m slm.report --help`. Not covered: editing, pages over a network.
"""

from slm.report.page import Live, compare, write

__all__ = ["Live", "compare", "write"]
