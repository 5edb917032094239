"""Conversations as text, and which part of it an assistant has to write: a model's own chat template, or ChatML."""
