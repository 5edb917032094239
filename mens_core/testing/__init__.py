"""Shipped for authors of backends: the hooks' specification as code, and the contract as tests."""
