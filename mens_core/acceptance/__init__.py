"""The runbook as one command: its steps, what each must show, the receipt. Its tests lie in ``testing/acceptance``."""
