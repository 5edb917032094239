"""Rows become token ids with a mask, and token rows become packed batches."""
