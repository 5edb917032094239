"""The acceptance runbook as tests, for an installed package: ``pytest --pyargs mens_core.testing.acceptance``.

A file a row. ``python -m mens_core gate`` runs them, counts them, and takes what is skipped for a failure. They need
pytest and both backends: ``pip install 'mens-core[all,testing]'``. Frameworks are imported by name where a test needs
one, because the core imports none.
"""
