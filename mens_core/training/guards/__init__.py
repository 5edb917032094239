"""The nothing-trained gate: named verdicts that turn a run that only looks healthy into a failed one."""
