"""What was measured, for people: tables, figures, and the page of ``jwins report``."""
