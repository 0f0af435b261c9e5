"""Reports of runs: tables, figures, and the page of ``jwins report``."""
