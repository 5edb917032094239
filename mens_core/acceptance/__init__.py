"""The runbook as one command: its steps, what each must show, and the receipt. The tests lie in ``testing/acceptance``."""
